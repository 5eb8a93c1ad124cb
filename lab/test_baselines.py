# SPDX-License-Identifier: MIT
"""lab/baselines.py: the plain networks train, attack and resume as the models of the paper do."""
import json

import pytest
import torch

import train
from lab.baselines import Cnn, ViT
from lab.test_findings import mean, outcomes, prose, span
from lab.test_house import findings
from test_all import HERE, close, images, settings, trains, weights

SMALL = "--d-model 8 --n-layers 1 --batch-size 16 --train-size 32 --test-size 20 --epochs 1".split()
CHECKS = {"cnn": lambda: Cnn(2, 3, (4, 8), d_model=3, n_layers=2),
          "vit": lambda: ViT(2, 3, (4, 8), d_model=8, n_layers=1, patch_size=2, d_hidden=6)}


def build(kind):
    return CHECKS[kind]().double()


@pytest.mark.parametrize("kind", train.BASELINES)
def test_a_baseline_is_its_logits_of_an_affine_embedding(kind):
    model = build(kind)
    x, y = images(2, (2, 4, 8))[0]
    zero = model.embed(torch.zeros(1, 2, 4, 8).double())[0]
    close(model.embed((0.3 * x - 2 * y)[None])[0] - zero,
          0.3 * (model.embed(x[None])[0] - zero) - 2 * (model.embed(y[None])[0] - zero))
    both = torch.stack([x, y])
    close(model(both), model.logits(model.embed(both)))
    assert model(both).shape == (2, 3)


def test_the_vit_mixes_tokens_whose_order_only_the_positions_tell():
    model = build("vit")
    z = torch.randn(1, 8, 8).double()
    order = torch.randperm(8)
    close(model.logits(z[:, order]), model.logits(z))
    moved = z.clone()
    moved[:, 0] += torch.randn(8).double()
    one = model.blocks[0]
    assert (one(moved) - one(z))[:, 1:].abs().max() > 1e-3
    assert model.positions.shape == (8, 8) and len(model.positions.unique(dim=0)) == 8


@pytest.mark.parametrize("kind, words, size", [
    ("cnn", ["--d-model", "20", "--n-layers", "2"], 20 * 17 + 40 * 321 + 10 * (40 * 49 + 1)),
    ("vit", ["--d-model", "32", "--d-hidden", "128", "--n-layers", "2", "--patch-size", "4"],
     32 * 17 + 49 * 32 + 2 * (3 * 32 * 33 + 32 * 33 + 128 * 33 + 32 * 129 + 4 * 32) + 64 + 330)])
def test_a_baseline_has_the_parameters_that_its_sizes_tell(kind, words, size):
    model = train.build(settings("--dataset", "mnist", "--model", kind, *words))
    assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("kind", train.BASELINES)
def test_a_baseline_trains_by_every_method_and_its_checkpoint_is_evaluated(kind, method, tmp_path):
    out = tmp_path / "run"
    words = [*SMALL, "--model", kind, "--method", method, "--attacks", "clean,pgd-2"]
    torch.manual_seed(0)
    before = train.build(settings("--dataset", "synthetic", *words)).state_dict()
    assert trains(out, *words) == 0
    assert any(not torch.equal(v, before[k]) for k, v in weights(out).items())
    assert train.main(["--evaluate", str(out), "--attacks", "clean,apgd-ce", "--test-size", "4",
                       "--device", "cpu"]) == 0


@pytest.mark.parametrize("words, why", [
    (["cnn", "--ads"], "--model cnn: it has no sequence map"),
    (["vit", "--control", "mlp"], "--model vit: it has no sequence map"),
    (["vit", "--d-model", "10"], "--d-model 10 must be divisible by 4"),
    (["cnn", "--patch-size", "4"], "--patch-size has an effect with --model s4 or "),
    (["vit", "--d-state", "4"], "--d-state has an effect with --model s4 or "),
    (["cnn", "--n-layers", "3"], "halve an image of 28 x 28 pixels too often")])
def test_what_a_baseline_has_no_place_for_is_refused(words, why, tmp_path, capsys):
    assert trains(tmp_path / "run", *SMALL, "--n-layers", "2", "--model", *words) == 2
    assert why in capsys.readouterr().err


def test_of_a_baseline_the_lengths_of_steps_alone_are_measured(tmp_path, capsys):
    assert trains(tmp_path / "run", *SMALL, "--model", "cnn") == 0
    assert train.main(["--analyse", str(tmp_path / "run"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "run" / "last-analysis.json").read_text())["rows"]
    assert {row["statement"] for row in found} == {"how long must steps be"}
    assert not list((tmp_path / "run").glob("*.png"))


def test_the_plain_networks_and_the_ssms_keep_on_cifar10_what_the_findings_say(results):
    (cnn,), (vit,) = (outcomes(("cifar10-baselines",), run)[2] for run in ("cnn", "vit"))
    ssms = sum((outcomes(("cifar10-patch4",), run)[2] for run in ("s4*", "mamba", "attention")), [])
    assert f"one seed keeps {cnn:.1f}, a ViT's {vit:.1f}, the SSMs {span(ssms)}." in prose()
    glu = outcomes(("mnist-eps0.3-steps10",), "s4-glu")[2]
    assert "After PGD-10 of 0.04 GLU keeps {:.1f} and {:.1f},".format(*glu) in prose()


# (i) of the findings: images, model, steps -> the folder and the name of its runs.
PLAIN = {"MNIST | CNN | equal": ("mnist-baselines", "cnn"),
         "MNIST | CNN | falling": ("mnist-step-falling", "cnn"),
         "MNIST | ViT | equal": ("mnist-baselines", "vit"),
         "CIFAR-10 | CNN | equal": ("cifar10-baselines", "cnn"),
         "CIFAR-10 | ViT | equal": ("cifar10-baselines", "vit")}


def plain_row(family, run):
    """Parameters, seeds, clean / PGD-10, mean over seeds, and AutoAttack of each seed."""
    clean, pgd, auto = outcomes((family,), run)
    result = json.loads((HERE / "results" / family / f"{run}-seed0" / "result.json").read_text())
    return [f"{result['parameters']:,}", str(len(clean)), f"{mean(clean):.1f} / {mean(pgd):.1f}",
            ", ".join(f"{accuracy:.1f}" for accuracy in auto)]


def test_the_table_of_plain_networks_is_that_of_the_runs(results):
    for name, (family, run) in PLAIN.items():
        assert f"| {name} | {' | '.join(plain_row(family, run))} |" in findings(), name
