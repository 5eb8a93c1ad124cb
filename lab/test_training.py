# SPDX-License-Identifier: MIT
"""train.py: data, seeds, Best and Last, the warm-up, what accuracy counts."""
import json

import pytest
import torch
import torch.nn.functional as F

import train
from test_all import DATA, TINY, close, log, settings, tiny_model, trains, weights


def test_the_last_1000_training_images_are_held_out_and_sizes_take_the_first(monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 1000)
    whole, part = (train.load_data(settings("--dataset", "synthetic", *words)) for words in (
        ["--train-size", "10000"], ["--train-size", "7", "--test-size", "5"]))
    assert [len(whole[k][0]) for k in ("train", "val", "test")] == [10_000, 1000, 500]
    assert [len(part[k][0]) for k in ("train", "val", "test")] == [7, 1000, 5]
    for kind, n in (("train", 7), ("val", 1000), ("test", 5)):
        assert all(torch.equal(a, b[:n]) for a, b in zip(part[kind], whole[kind]))
    both = torch.cat([whole["train"][0], whole["val"][0]])
    assert torch.equal(both, train.drawn_digits(11_000, 0)[0])


@pytest.mark.parametrize("dataset, folder, shape, mean", [
    ("mnist", "MNIST", (1, 28, 28), 0.1307),
    ("cifar10", "cifar-10-batches-py", (3, 32, 32), 0.4734)])
def test_real_images_are_whole_upright_and_in_the_published_mean(dataset, folder, shape, mean):
    if DATA is None or not (DATA / folder).exists():
        pytest.skip(f"no {folder} in SSM_ADV_DATA, ../shared/data or ./data")
    data = train.load_data(settings("--dataset", dataset, "--data-dir", str(DATA)))
    n = {"mnist": 60_000, "cifar10": 50_000}[dataset] - train.HELD_OUT
    assert data["train"][0].shape == (n, *shape) and data["test"][0].shape == (10_000, *shape)
    x = torch.cat([data["train"][0], data["val"][0]])
    assert x.dtype == torch.uint8 and abs(float(x.float().mean()) / 255 - mean) < 1e-3
    rows, columns = (x.float().diff(dim=d).abs().mean() for d in (-2, -1))
    assert 0.5 < rows / columns < 2                                     # neighbours are alike
    counts = torch.bincount(torch.cat([data["train"][1], data["val"][1]]))
    assert len(counts) == 10 and (dataset == "mnist" or set(counts.tolist()) == {5000})


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert trains(tmp_path / out, *TINY, "--seed", seed) == 0
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and log(tmp_path / "a") == log(tmp_path / "b")
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_best_is_the_highest_pgd_10_on_the_held_out_images_and_diff_is_best_minus_last(
        tmp_path, monkeypatch, capsys):
    planted, real = iter([0.2, 0.5, 0.3]), train.evaluate

    def evaluate(model, images, labels, specs, c, place):
        found = real(model, images[:20], labels[:20], specs, c, place)
        return found | {"pgd-10": next(planted)} if place[0] == "val" else found
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert trains(tmp_path / "run", *TINY, "--epochs", "3") == 0
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["epoch"] == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["Best"]["epoch"], result["Last"]["epoch"]) == (2, 3)
    for k in ("clean", "pgd-10"):
        assert result["Diff"][k] == result["Best"][k] - result["Last"][k]
    assert "Best (epoch 2)" in capsys.readouterr().out


def test_eps_and_alpha_grow_linearly_through_the_warm_up(tmp_path, monkeypatch):
    seen, real = [], train.backward
    monkeypatch.setattr(train, "backward", lambda run, x, y, eps, alpha: seen.append(
        (eps, alpha)) or real(run, x, y, eps, alpha))
    words = "--epochs 3 --eps-warmup 2 --eps 0.4 --alpha 0.1".split()
    assert trains(tmp_path / "run", *TINY, *words) == 0                     # two batches an epoch
    close([eps for eps, _ in seen], [0, 0.1, 0.2, 0.3, 0.4, 0.4])
    close([alpha for _, alpha in seen], [0, 0.025, 0.05, 0.075, 0.1, 0.1])


def test_alphas_are_the_steps_of_the_attack_in_training_and_grow_with_the_warm_up(
        tmp_path, monkeypatch):
    seen, real = [], train.backward
    monkeypatch.setattr(train, "backward", lambda run, x, y, eps, alpha: seen.append(
        alpha) or real(run, x, y, eps, alpha))
    words = "--epochs 2 --eps-warmup 1 --eps 0.4 --alphas 0.2,0.1 --steps 2 --alpha 0.3".split()
    assert trains(tmp_path / "run", *TINY, *words) == 0
    close(seen, [[0, 0], [0.1, 0.05], [0.2, 0.1], [0.2, 0.1]])


def test_evaluation_counts_by_hand_and_attacks_only_what_is_still_right(monkeypatch):
    c = settings("--dataset", "synthetic", "--batch-size", "4")
    images = torch.randint(256, (10, 1, 4, 4), dtype=torch.uint8)
    model, asked = tiny_model("s4").float(), []
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    labels[::3] = (labels[::3] + 1) % 10                                # 4 of 10 are wrong at once

    def breaks_the_first(model, x, y):
        asked.append(len(x))
        return torch.cat([1 - x[:1], x[1:]])
    monkeypatch.setattr(train, "attacks_of", lambda spec, c: (
        [] if spec == "clean" else [breaks_the_first]))
    found = train.evaluate(model, images, labels, ("clean", "x"), c, "here")
    assert found["clean"] == 0.6 and sum(asked) == 6
    broken = 0
    with torch.no_grad():
        right = model(images.float() / 255).argmax(1) == labels
        for b in (slice(0, 4), slice(4, 8), slice(8, 10)):
            x, y = images[b][right[b]][:1], labels[b][right[b]][:1]
            broken += int((model(1 - x.float() / 255).argmax(1) != y).sum())
    assert found["x"] == (6 - broken) / 10


def test_drawn_digits_depend_on_their_seed_alone():
    state = torch.get_rng_state()
    x, y = train.drawn_digits(501, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (x.dtype, x.shape) == (torch.uint8, (501, 1, 28, 28)) and x.min() < 50 and x.max() > 150
    assert (y.dtype, y.shape) == (torch.int64, (501,)) and set(y.tolist()) == set(range(10))
    torch.manual_seed(7)
    train.drawn_digits.cache_clear()
    again, other = train.drawn_digits(501, seed=3), train.drawn_digits(501, seed=4)
    assert torch.equal(again[0], x) and torch.equal(again[1], y) and not torch.equal(other[0], x)
    assert train.drawn_digits(2, seed=0, size=16)[0].shape == (2, 1, 16, 16)


def test_drawn_digits_show_their_labels():
    x, y = train.drawn_digits(4000, seed=0)
    x = F.pad(x.flatten(1).double() / 255, (0, 1), value=1)             # least squares, with a bias
    gram = x[:3000].T @ x[:3000] + 10 * torch.eye(785)
    w = torch.linalg.solve(gram, x[:3000].T @ F.one_hot(y[:3000]).double())
    assert ((x[3000:] @ w).argmax(1) == y[3000:]).double().mean() > 0.3         # chance is 0.1


# ---- The trained model, for other programs -------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    """The folder of a tiny run."""
    assert trains(tmp_path / "run", *TINY, "--ads") == 0
    return tmp_path / "run"


@pytest.mark.parametrize("file", ("best.pt", "last.pt"))
def test_load_gives_the_trained_model_in_eval_mode(file, run):
    model = train.load(run / file)
    assert not any(module.training for module in model.modules())
    saved = weights(run, file)
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(w, saved[name]) for name, w in model.state_dict().items())
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_load_says_in_one_sentence_that_there_is_no_checkpoint(tmp_path):
    with pytest.raises(train.UserError, match="best.pt: there is no such file; give one of"):
        train.load(tmp_path / "best.pt")
