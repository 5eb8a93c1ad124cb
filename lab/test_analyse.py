# SPDX-License-Identifier: MIT
"""--analyse: every statement is measured on every model, and by hand on a few."""
import importlib.util
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ads
import train
from lab import analyse, figures
from lab.steps import falling_steps, step_lengths
from lab.test_findings import prose
from lab.test_house import findings
from test_all import HERE, TINY, close, images, randn, settings, tiny, trains, weights

SIZES = "--d-model 8 --d-state 4 --n-layers 1 --patch-size 14".split()


def analyses(out, *words):
    return train.main(["--analyse", *words, "--test-size", "6", "--device", "cpu", "--data-dir",
                       "nowhere", "--out", str(out)])


def at_start(out, *words):
    return analyses(out, "--dataset", "synthetic", *SIZES, *words)


def rows_of(folder, stem):
    assert len((folder / f"{stem}.csv").read_text().splitlines()) > 10
    rows = json.loads((folder / f"{stem}.json").read_text())["rows"]
    assert all(math.isfinite(row["value"]) for row in rows)
    return {(row["statement"], row["on"], row["layer"], row["quantity"]): row["value"]
            for row in rows}


# ---- What is measured ----------------------------------------------------------------------------

@pytest.mark.parametrize("options", ([], ["--ads"], ["--control", "mlp"]), ids=str)
def test_every_model_is_measured_at_initialisation(name, options, tmp_path, capsys):
    assert at_start(tmp_path, "--model", name, *options) == 0
    rows = rows_of(tmp_path, "analysis")
    expected = {"P3" if name == "mamba" else "P1,", "change", "how"}
    if name == "attention":
        expected.add("P4")
    if options == ["--ads"]:
        expected.add("P5")
    if name in ("s4", "dss", "s5") and not options:
        expected.add("certified")
    assert {statement.split()[0] for statement, _, _, _ in rows} == expected
    text = capsys.readouterr().out
    assert "at initialisation" in text and all(quantity in text for _, _, _, quantity in rows)
    for (_, _, _, quantity), value in rows.items():
        if quantity == "worst input reaches / gain":
            assert abs(value - 1) < 1e-10
        if quantity == "|e - its three terms|, largest":
            assert value < 1e-10
        if quantity in ("error seen / gain, largest", "error / bound, largest"):
            assert 0 < value <= 1


def test_the_shares_of_the_three_terms_of_p5_sum_to_1(tmp_path):
    assert at_start(tmp_path, "--ads") == 0
    rows = rows_of(tmp_path, "analysis")
    for on in ("test", "train"):
        shares = [value for (statement, images, _, quantity), value in rows.items()
                  if (statement, images) == ("P5 AdS", on) and quantity.startswith("share of")]
        assert len(shares) == 3 and abs(sum(shares) - 1) < 1e-10


def test_a_checkpoint_is_measured_beside_its_initialisation(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    best = str(tmp_path / "run" / "best.pt")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert analyses(tmp_path / "a", best) == 0
    text = capsys.readouterr().out
    assert f"{best}: s4, synthetic, n = 6 images, eps 8/255, seed 0" in text
    assert at_start(tmp_path / "b") == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    trained, start = rows_of(tmp_path / "a", "best-analysis"), rows_of(tmp_path / "b", "analysis")
    statement, gain = "P1, P2 fixed parameters: S4", "gain ||K||_1, largest"
    assert trained[statement, "start", 1, gain] == start[statement, "test", 1, gain]
    model = train.build(settings("--dataset", "synthetic", *TINY))
    model.load_state_dict(weights(tmp_path / "run", "best.pt"))
    by_hand = float(model.double().blocks[0].ssm.kernel(4).detach().abs().sum(1).max())
    assert abs(trained[statement, "test", 1, gain] - by_hand) < 1e-10
    assert trained[statement, "test", 1, gain] != trained[statement, "start", 1, gain]
    names = [{row["on"] for row in figures.read_analysis(tmp_path / file)}
             for file in ("a/best-analysis.json", "b/analysis.json")]
    assert names == [{f"{model} test", f"{model} train"} for model in ("PGD-AT", "untrained")]
    drawn = (tmp_path / "a" / "best-analysis.png").exists()
    assert drawn or "no figure: a figure needs matplotlib" in text


def test_another_seed_of_the_attack_leaves_the_start_of_the_checkpoint(tmp_path):
    assert trains(tmp_path / "run", *TINY, "--seed", "2") == 0
    best = str(tmp_path / "run" / "best.pt")
    assert analyses(tmp_path / "a", best) == analyses(tmp_path / "b", best, "--seed", "1") == 0
    a, b = (rows_of(tmp_path / folder, "best-analysis") for folder in "ab")
    statement = "P1, P2 fixed parameters: S4", "start", 1
    for quantity, same in (("gain ||K||_1, largest", True), ("error seen / gain, largest", False)):
        assert (a[*statement, quantity] == b[*statement, quantity]) is same


def test_a_checkpoint_whose_settings_name_other_jobs_is_analysed_and_evaluated(tmp_path):
    assert trains(tmp_path, *TINY) == 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["config"] |= {"analyse": None, "evaluate": None, "plot": None}    # as older ones have
    torch.save(state, tmp_path / "last.pt")
    for job in ("--analyse", "--evaluate"):
        assert train.main([job, str(tmp_path), "--test-size", "2", "--device", "cpu"]) == 0


def test_a_run_s_folder_stands_for_its_last_checkpoint_and_takes_the_results(tmp_path):
    assert trains(tmp_path, *TINY) == 0
    assert train.main(["--analyse", str(tmp_path), "--test-size", "2", "--device", "cpu"]) == 0
    assert len(rows_of(tmp_path, "last-analysis")) > 10


def test_eps_takes_alpha_along_and_both_may_differ_from_the_checkpoint_s(tmp_path):
    assert trains(tmp_path, *TINY) == 0
    for words, alpha in (([], 3 / 255), (["--eps", "4/255"], 1.5 / 255),
                         (["--eps", "4/255", "--alpha", "3/255"], 3 / 255)):
        c, _, _ = analyse.settings(["--analyse", str(tmp_path), "--device", "cpu", *words])
        assert c.alpha == pytest.approx(alpha) and c.test_size == 100


# ---- Change rates --------------------------------------------------------------------------------

@torch.no_grad()
def test_the_distances_are_by_hand():
    f, g = randn(2, 2, 3, 5)
    p, q = f.softmax(-1), g.softmax(-1)
    found = analyse.distances(f, g)
    close(found["MSE"], ((f - g) ** 2).sum() / 30, 1e-12)
    close(found["KL"], (p * (p / q).log()).sum() / 6, 1e-12)
    close(found["MSE / mean square"], ((f - g) ** 2).sum() / (f ** 2).sum(), 1e-12)
    close(analyse.distances(7 * f, 7 * g)["MSE / mean square"], found["MSE / mean square"], 1e-12)


@torch.no_grad()
def test_a_part_is_seen_at_work_on_clean_and_on_attacked_images(name):
    model, (x, _), (x_adv, _) = tiny(name, ads="relu"), images(), images()
    found = analyse.watch(model, x, x_adv)
    assert len(found) == 2 and not any(module._forward_hooks for module in model.modules())
    for layer, parts in found:
        for seen in (parts["middle"], parts["out"], parts[""]):
            assert not torch.equal(seen.u, seen.u_adv)
        close(layer.middle(parts["middle"].u), parts["middle"].y)
        close(layer.middle(parts["middle"].u_adv), parts["middle"].y_adv)


def test_the_parts_that_the_figure_compares_follow_each_other(name):
    c = SimpleNamespace(model=name, ads="relu", control=None)
    _, (_, seen) = analyse.watch(tiny(name, ads="relu"), images()[0], images()[0])
    parts = analyse.components(c, seen)
    mixing = ["attention"] if name == "attention" else []
    assert list(parts) == ["SSM", *mixing, "AdS", "Linear"]
    assert parts["AdS"].y is parts["Linear"].u and parts["AdS"].y_adv is parts["Linear"].u_adv
    last = parts["attention" if mixing else "SSM"]
    assert last.y is parts["AdS"].u and last.y_adv is parts["AdS"].u_adv


@torch.no_grad()
def test_a_change_rate_is_the_distance_after_over_the_distance_before_less_1():
    c = SimpleNamespace(model="s4", ads=None, control=None)
    (_, seen), _ = analyse.watch(tiny("s4"), images()[0], images()[0])
    rates = analyse.measure_changes(c, seen)
    assert [key.split(": ")[0] for key in rates] == 3 * ["SSM"] + 3 * ["Linear"]
    out = seen["out"]
    before, after = ((b - a).square().sum() / a.numel() for a, b in (
        (out.u, out.u_adv), (out.y, out.y_adv)))
    close(rates["Linear: MSE"], after / before - 1, 1e-9)


# ---- The figure of several models ----------------------------------------------------------------

def test_analyses_of_several_models_are_drawn_into_one_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    files, drawn, draw_changes = [], [], figures.draw_changes
    for method in ("standard", "pgd"):
        assert trains(tmp_path / method, *TINY, "--method", method) == 0
        assert analyses(tmp_path / method, str(tmp_path / method / "best.pt")) == 0
        files.append(tmp_path / method / "best-analysis.json")

    def draw(path, rows):
        drawn.append(rows)
        draw_changes(path, rows)
    monkeypatch.setattr(figures, "draw_changes", draw)
    assert train.main(["--plot", *map(str, files), "--out", str(tmp_path / "a.png")]) == 0
    size = (tmp_path / "a.png").read_bytes()[16:24]
    assert int.from_bytes(size[:4], "big") > 2 * int.from_bytes(size[4:], "big")
    rows, = drawn
    assert list(dict.fromkeys(row["on"] for row in rows)) == [
        "ST test", "ST train", "PGD-AT test", "PGD-AT train"]
    kept = json.loads(files[0].read_text())["rows"]
    assert [row["value"] for row in rows if row["on"] == "ST test"] == [
        row["value"] for row in kept
        if row["statement"].startswith("change") and row["on"] == "test"]


# ---- The command line ----------------------------------------------------------------------------

BAD = {
    "--analyse --dataset synthetic --eps 0":
        "--eps 0.0: an analysis needs a perturbation; give a radius above 0",
    "--analyse --dataset synthetic --eps 8": "--eps 8.0: it must lie in [0, 1]",
    "--analyse --dataset synthetic --test-size 0": "--test-size 0: it must be at least 1",
    "--analyse --dataset synthetic --test-size 9999": "--test-size 9999: synthetic has 2000 such",
    "--analyse --dataset synthetic --d-state 3": "--d-state 3: s4 stores conjugate pairs",
    "--analyse --dataset synthetic --epochs 2": "unrecognized arguments: --epochs 2",
    "--analyse --dataset synthetic --device cuda:99": "--device cuda:99: there is no such device",
    "--analyse --evaluate FILE": "unrecognized arguments: --evaluate FILE",
    "--analyse=": "--analyse is empty; give a value, or leave it out",
    "--analyse nowhere.pt": "--analyse nowhere.pt: there is no such file",
    "--analyse FILE": "--analyse FILE: this is damaged, or no checkpoint of this program",
    "--analyse EMPTY": "--analyse EMPTY/last.pt: there is no such file; give one",
    "--analyse --dataset cifar10 --data-dir EMPTY": "cifar-10-batches-py is not there",
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_analysed_is_refused_and_nothing_is_written(
        words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "torchvision_data", train.torchvision_data.__wrapped__)
    if "cifar10" in words:
        datasets = pytest.importorskip("torchvision.datasets")
        monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    Path("EMPTY").mkdir()
    Path("FILE").write_text("{}")
    words = words.split() + ([] if "--device" in words else ["--device", "cpu"])
    assert train.main(words) == 2
    err = capsys.readouterr().err
    assert BAD[" ".join(words).removesuffix(" --device cpu")] in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["EMPTY", "FILE"]


def no_network(dataset):
    raise RuntimeError("no network")


def test_a_flag_that_contradicts_the_checkpoint_is_refused(tmp_path, capsys):
    assert trains(tmp_path, *TINY) == 0
    assert analyses(tmp_path, str(tmp_path / "best.pt"), "--model", "dss") == 2
    assert "--model dss" in (err := capsys.readouterr().err) and "was trained with s4" in err


# ---- Ruggedness ----------------------------------------------------------------------------------

class Logits(torch.nn.Module):
    """A model that is a function of the flattened images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))


def test_falling_steps_are_those_of_the_recipe():
    close(falling_steps(0.2, 5), [0.20, 0.16, 0.12, 0.08, 0.04])
    close(sum(falling_steps(0.6, 50)), 15.3)


def test_the_gradients_of_a_linear_model_agree_and_pgd_reaches_its_closed_form():
    torch.manual_seed(0)
    w, x = torch.randn(2, 12).double(), 0.3 + 0.4 * torch.rand(6, 1, 3, 4).double()
    y = torch.arange(6) % 2

    model = Logits(lambda z: z @ w.T)
    numbers = step_lengths(model, x, y, 0.1)
    margin = (w[1 - y] - w[y]).abs().sum(1)             # |w|_1 of the difference
    shifted = (model(x)[range(6), 1 - y] - model(x)[range(6), y]) + 0.1 * margin
    assert abs(numbers["cosine of gradients, a step of eps/3 apart"] - 1) < 1e-12
    # The five constant steps sum to 5/3 eps: they do not cross the whole ball.
    attacks = [attack.removeprefix("loss, ") for attack in numbers if attack.startswith("loss, P")]
    attacks.remove("PGD-5 of eps/3")
    assert len(attacks) == 7
    for attack in attacks:
        close(numbers[f"loss, {attack}"], F.softplus(shifted).mean())
        close(numbers[f"accuracy, {attack}"], (shifted < 0).double().mean())


def test_the_gradients_of_a_rugged_model_disagree_and_only_falling_steps_settle():
    x = torch.full((4, 1, 1, 1), 0.5).double()
    y = torch.zeros(4).long()

    def peaked(z):
        # The loss of class 0 is largest at 0.513, and falls steeply to both sides.
        peak = -40 * (z - 0.513).abs()
        return torch.cat([torch.zeros_like(peak), peak], 1)
    numbers = step_lengths(Logits(peaked), x, y, 0.3)
    assert numbers["cosine of gradients, a step of eps/10 apart"] == -1
    assert numbers["loss, PGD-50 falling from eps/3"] > numbers["loss, PGD-50 of eps/3"] + 0.3


def test_long_steps_leave_the_maximum_that_holds_short_ones():
    torch.manual_seed(0)
    x = torch.full((64, 1, 1, 1), 0.5).double()
    y = torch.zeros(64).long()

    def trap(z):
        # Beyond 0.35 all paths lead to a low peak at 0.6; before it, to the border 0.2, a mistake.
        margin = torch.where(z > 0.35, 1 + (z - 0.6).abs(), 10 * (z - 0.25))
        return torch.cat([margin, torch.zeros_like(margin)], 1)
    numbers = step_lengths(Logits(trap), x, y, 0.3)
    for short in ("PGD-50 of eps/3", "PGD-50 falling from eps/10"):
        assert numbers[f"accuracy, {short}"] > 0.6
    for long in ("PGD-50 falling from 2 eps", "APGD-CE"):
        assert numbers[f"accuracy, {long}"] == 0


def test_the_forms_of_gelu_differ_from_it_where_their_script_says():
    """results/analysis/flat_gelu.py: values, derivatives, and who gets them."""
    path = HERE / "results" / "analysis" / "flat_gelu.py"
    if not path.exists():
        pytest.skip("no results/ beside the code")
    spec = importlib.util.spec_from_file_location("flat_gelu", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    a = torch.linspace(-6, 6, 601, dtype=torch.double, requires_grad=True)

    def value_and_slope(f):
        return f(a).detach(), torch.autograd.grad(f(a).sum(), a)[0]
    users = {F.gelu: (nn.GELU(), lambda v: F.gelu(v), lambda v: ads.ACTIVATIONS["gelu"](v)),
             F.silu: (nn.SiLU(), lambda v: F.silu(v))}
    for plain, functions in users.items():
        value, slope = value_and_slope(plain)
        dip = a.detach() < script.DIP[plain]
        assert (slope[dip] < 0).all() and (slope[~dip] > 0).all()
        left = slope.masked_fill(~dip & (a < 0), 0.0)
        for form, expected in ((script.flat, (value.masked_fill(dip, value.min()), slope.relu())),
                               (script.slope, (value, slope.relu())), (script.left, (value, left))):
            with script.replaced(form):
                found = [value_and_slope(f) for f in functions]
            for pair in found:
                torch.testing.assert_close(pair, expected, atol=1e-4, rtol=0)
        for f in functions:                                             # as it was
            torch.testing.assert_close(value_and_slope(f), (value, slope))


# ---- What the findings say of its logs -----------------------------------------------------------

def test_what_short_attacks_leave_after_free_at_is_what_its_log_says(results):
    log = (HERE / "results" / "analysis" / "s4-ads-free.txt").read_text()
    left = dict(re.findall(r"accuracy, (.*?) +0\.(\d\d)$", log, re.M))
    said = (f"PGD-50 of eps/3 leaves {left['PGD-50 of eps/3']} %, falling from eps/10 "
            f"{left['PGD-50 falling from eps/10']}, falling from 2 eps "
            f"{left['PGD-50 falling from 2 eps']}, APGD-CE {left['APGD-CE']} ")
    assert said in prose()


def test_what_short_attacks_leave_after_yopo_is_what_its_log_says(results):
    log = (HERE / "results" / "analysis" / "s4-ads-yopo.txt").read_text()
    left = dict(re.findall(r"accuracy, (.*?) +0\.(\d\d)$", log, re.M))
    auto, = re.findall(r"^aa +([\d.]+)0% .* 200 ", log, re.M)
    assert (f"leave {left['PGD-50 of eps/3']}, {left['PGD-50 falling from eps/10']}, "
            f"{left['PGD-50 falling from 2 eps']} and {left['APGD-CE']}, and AutoAttack {auto} "
            "(n = 200)") in prose()
    clean, ten = re.search(r"Last \(epoch 19\) +(\S+) +(\S+)", log).groups()
    assert f"and {float(clean):.1f} / {float(ten) + 1e-9:.1f} ([log]" in prose()


def test_what_short_attacks_leave_in_the_findings_is_what_the_logs_say():
    rows = re.findall(r"^\| (.*) \| \[log\]\((analysis/steps-\S+)\) \|$", findings(), re.M)
    assert len(rows) == 6
    keys = ("cosine of gradients, a step of eps/10 apart",
            "cosine of gradients, a step of eps/3 apart", "accuracy, PGD-50 of eps/3",
            "accuracy, PGD-50 falling from 2 eps", "accuracy, APGD-CE")
    for cells, file in rows:
        log = (HERE / "results" / file).read_text()
        near, far, *left = [float(re.search(rf"{key} +([\d.]+)$", log, re.M)[1]) for key in keys]
        assert cells.split(" | ")[2:] == [f"{near:.2f}, {far:.2f}",
                                          *(f"{100 * share:.0f}" for share in left)], file


def test_the_epochs_of_glu_in_the_findings_are_those_of_the_logs():
    rows = re.findall(r"^\| (\d+)" + 4 * r" \| (.* / .*)" + r" \|$", findings(), re.M)
    assert len(rows) == 6
    shares = {"constant": [], "falling": []}
    for epoch, *cells in rows:
        found = []
        for steps in ("constant", "falling"):
            log = (HERE / "results" / "analysis" / f"epochs-glu-{steps}.txt").read_text()
            line, = re.findall(rf"^ *{epoch} +(.*)$", log, re.M)
            loss, strong, _, ten, long = line.split()
            found += [f"{loss} / {strong}", f"{ten} / {long}"]
            shares[steps].append(100 * float(loss) / float(strong))
        assert cells == found, epoch
    early, *_, late, last = shares["constant"]
    falling = shares["falling"]
    assert max(late, last) < 100 / 3
    assert (f"reaches {early:.0f} % of that PGD-50's loss at epoch 8, less than a third from epoch "
            "28 on. With falling steps it stays at "
            f"{min(falling):.0f} to {max(falling):.0f} %:") in prose()


def test_what_the_epoch_chosen_by_a_long_attack_keeps_is_what_its_log_says(results):
    log = (HERE / "results" / "analysis" / "epochs-glu-constant.txt").read_text()
    left = re.findall(r"^aa +([\d.]+)0% ", log, re.M)
    said = f"AutoAttack leaves epoch 12 {left[0]} % (n = 200), PGD-10's choice {left[1]} ("
    assert len(left) == 2 and said in prose()
