# SPDX-License-Identifier: MIT
"""--evaluate: rows, stages, per-image outcomes, sweeps, transfer, cuts, the published attack."""
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mamba_adv
import train
from lab import autoattack, evaluate
from lab.test_autoattack import ATTACKS, LinearSpy, dotted, net
from lab.test_house import findings
from test_all import HERE, TINY, close, randn, settings, tiny_model, trains

TINY_7 = [*TINY, "--patch-size", "7", "--batch-size", "8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """best.pt of two tiny runs of two models, trained once."""
    out = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "say", lambda *words, **kw: None)
        for name in ("s4", "mamba"):
            assert trains(out / name, *TINY_7, "--model", name, "--eval-train", "16") == 0
    return out / "s4" / "best.pt", out / "mamba" / "best.pt"


def evaluates(checkpoint, *words, size="20"):
    """train.main on a checkpoint that has no table yet: an earlier one's rows would be kept."""
    checkpoint.with_name(f"{checkpoint.stem}-evaluation.json").unlink(missing_ok=True)
    return train.main(["--evaluate", str(checkpoint), "--device", "cpu", "--test-size", size,
                       *words])


def report(checkpoint, name="evaluation"):
    return json.loads(checkpoint.with_name(f"{checkpoint.stem}-{name}.json").read_text())


def batches(monkeypatch):
    """A list that grows by one with every batch that an attack is run on."""
    real, calls = train.still_right, []
    monkeypatch.setattr(train, "still_right", lambda *args: calls.append(args) or real(*args))
    return calls


def plain(report):
    """Without what no two evaluations share."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in report["rows"]]


def attack_settings(**kw):
    return SimpleNamespace(**{"model": "s4", "eps": 0.03, "alpha": 0.0075, "classes": 5,
                              "batch_size": 10, "seed": 0, "device": "cpu"} | kw)


def survivors(model, x, y, spec, c):
    return train.survivors(model, x, y, spec, evaluate.attacks_named(spec, c), c, "here")


# ---- AutoAttack, stage by stage ------------------------------------------------------------------

def test_autoattack_is_the_worst_case_of_four_attacks_each_on_what_is_left(monkeypatch):
    model, x = net(), (255 * dotted(30)).round().to(torch.uint8)
    y = model(x / 255).argmax(1)
    y[:7] = (y[:7] + 1) % 5                                                 # seven clean errors
    fed = {}
    for stage in autoattack.AUTO:
        def attack(m, x, y, eps, stage=stage):
            fed[stage] = fed.get(stage, 0) + len(x)
            return ATTACKS[stage](m, x, y, eps)
        monkeypatch.setitem(autoattack.AUTO, stage, attack)
    c, left = attack_settings(), {}
    for spec in ("clean", "aa", "aa-fast", "square"):
        left[spec] = survivors(model, x, y, spec, c).sum(1).tolist()
    assert list(fed) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert left["clean"] == [23] and {row[0] for row in left.values()} == {23}
    assert left["aa"] == sorted(left["aa"], reverse=True) and len(left["aa"]) == 5
    assert 0 < left["aa"][-1] < 23 and [len(left[s]) for s in ("aa-fast", "square")] == [3, 2]
    # each of the three runs of apgd-ce, apgd-t, square gets what the one before has left
    assert fed["apgd-ce"] == 2 * 23 and fed["square"] == left["aa"][3] + 23
    assert fed["fab-t"] == left["aa"][2] and fed["apgd-t"] == left["aa"][1] + left["aa-fast"][1]


def test_when_nothing_is_left_the_later_stages_are_listed_with_zero():
    model, x = net(), (255 * dotted(4)).round().to(torch.uint8)
    y = (model(x / 255).argmax(1) + 1) % 5
    assert survivors(model, x, y, "aa", attack_settings()).sum(1).tolist() == [0] * 5


@pytest.mark.parametrize("spec, classes, needs", [
    ("aa", 3, 4), ("aa-fast", 3, 4), ("apgd-t", 3, 4), ("apgd-ce", 1, 2), ("square", 1, 2)])
def test_too_few_classes_for_an_attack_are_refused_in_words(spec, classes, needs):
    with pytest.raises(train.UserError, match=f"--attacks {spec}: it needs at least {needs} cl"):
        train.attacks_of(spec, attack_settings(classes=classes))
    assert train.attacks_of(spec, attack_settings(classes=needs))


def test_evaluate_prints_a_line_for_each_stage_of_autoattack(trained, capsys, monkeypatch):
    for stage in autoattack.AUTO:
        monkeypatch.setitem(autoattack.AUTO, stage, ATTACKS[stage])
    assert evaluates(trained[0], "--attacks", "clean,aa") == 0
    names = [line[:16].strip() for line in capsys.readouterr().out.splitlines()[3:9]]
    assert names == ["clean", "aa: apgd-ce", "aa: apgd-t", "aa: fab-t", "aa: square", "aa"]
    table = trained[0].with_name("best-evaluation.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table[1:]] == names


@pytest.mark.parametrize("square_helps", [True, False])
def test_autoattack_is_called_an_upper_bound_where_square_helps(
        square_helps, trained, capsys, monkeypatch):
    right = torch.ones(5, 20, dtype=torch.bool)             # as they are, after each of the four
    right[4 if square_helps else 1:, 0] = False
    monkeypatch.setattr(train, "survivors", lambda *args: right)
    assert evaluates(trained[0], "--attacks", "aa") == 0
    rows, out = report(trained[0])["rows"], capsys.readouterr().out
    stages = [1.0 if square_helps else 0.95] * 3 + [0.95, 0.95]
    assert [row["accuracy"] for row in rows] == stages
    assert [row.get("upper_bound", False) for row in rows] == 4 * [False] + [square_helps]
    line = "Square improved on the white-box attacks: this AutoAttack accuracy is an upper bound\n"
    assert out.count(line) == square_helps
    assert "upper_bound" not in trained[0].with_name("best-evaluation.csv").read_text()


# ---- Rows and intervals --------------------------------------------------------------------------

def test_evaluate_measures_a_checkpoint_and_writes_csv_and_json(trained, capsys):
    assert evaluates(trained[0], "--attacks", "clean,fgsm,pgd-3x2", size="30") == 0
    rows = report(trained[0])["rows"]
    assert [row["attack"] for row in rows] == ["clean", "fgsm", "pgd-3x2"]
    assert {row["n"] for row in rows} == {30}
    assert rows[0]["accuracy"] >= max(row["accuracy"] for row in rows[1:])
    assert trained[0].with_name("best-evaluation.csv").read_text().count("\n") == 4
    assert "95 % interval" in capsys.readouterr().out


def test_the_interval_is_wilsons():
    low, high = evaluate.interval(7, 10)
    for p in (low, high):                                   # |7/10 - p| = z sqrt(p (1-p) / n)
        close(abs(0.7 - p), 1.959964 * math.sqrt(p * (1 - p) / 10))
    assert evaluate.interval(0, 10)[0] == 0 and 0.2 < evaluate.interval(0, 10)[1] < 0.35
    for n in (500, 700, *range(1, 50)):                                     # rounding, too
        assert evaluate.interval(0, n)[0] >= 0 and evaluate.interval(n, n)[1] <= 1


def test_a_row_says_which_images_survive(trained, monkeypatch):
    assert evaluates(trained[0], "--attacks", "clean,pgd-2", size="19") == 0
    c, state = evaluate.settings(["--evaluate", str(trained[0]), "--device", "cpu"])
    c.test_size, model = 19, train.load_model(state, "")
    x, y = train.load_data(c)["test"]
    with torch.no_grad():
        right = (model(x / 255).argmax(1) == y).tolist()
    clean, pgd = (evaluate.survivors_of(row) for row in report(trained[0])["rows"])
    assert clean == right and len(pgd) == 19 and all(a or not b for a, b in zip(clean, pgd))
    assert sum(pgd) / 19 == report(trained[0])["rows"][1]["accuracy"]
    assert "survivors" not in trained[0].with_name("best-evaluation.csv").read_text()


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 97])
def test_survivors_come_back_from_hex_as_they_went(n):
    survived = torch.rand(n) < 0.5
    digits = evaluate.to_hex(survived)
    assert len(digits) == -(-n // 4) and int(digits[0], 16) >> 3 == int(survived[0])
    assert evaluate.survivors_of({"survivors": digits, "n": n}) == survived.tolist()
    with pytest.raises(ValueError):
        evaluate.survivors_of({"survivors": digits, "n": n + 8})


def test_survivors_by_hand_are_bits_from_the_left():
    assert evaluate.to_hex(torch.tensor([1, 0, 1, 0, 0, 1]) == 1) == "a4"   # 1010 01(00)
    assert evaluate.survivors_of({"survivors": "03", "n": 8}) == [False] * 6 + [True] * 2


FIVE_TO_ONE = [True] * 5 + [False] * 3, [False] * 5 + [True] + [False] * 2


def test_mcnemar_is_the_binomial_test_of_the_images_that_one_model_alone_gets_right():
    a, b = FIVE_TO_ONE
    assert evaluate.mcnemar(a, b) == evaluate.mcnemar(b, a) == 2 * (1 + 6) / 2 ** 6
    assert evaluate.mcnemar(a, a) == 1 and evaluate.mcnemar([True, False], [False, True]) == 1
    assert evaluate.mcnemar([True] * 10, [False] * 10) == 2 / 2 ** 10


def test_mcnemar_of_thousands_of_images_is_a_number():
    a, b = [True] * 2600 + [False] * 2400, [False] * 2600 + [True] * 2400
    z = (200 - 1) / math.sqrt(5000)                                         # with continuity
    assert math.isclose(evaluate.mcnemar(a, b), math.erfc(z / math.sqrt(2)), rel_tol=1e-2)


def test_the_paired_interval_is_wald_s_with_half_an_image_more_in_each_cell():
    gap, low, high = evaluate.paired_interval(*FIVE_TO_ONE)
    assert gap == 4 / 8 and (low + high) / 2 == pytest.approx(4 / 10)
    assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(5.5 + 1.5 - 16 / 10) / 10)


def test_the_paired_interval_ends_at_one():
    assert evaluate.paired_interval([True] * 2, [False] * 2)[2] == 1
    assert evaluate.paired_interval([False] * 2, [True] * 2)[1] == -1


@pytest.mark.parametrize("compare", [evaluate.mcnemar, evaluate.paired_interval])
def test_models_on_different_images_are_not_compared(compare):
    with pytest.raises(ValueError):
        compare([True, False], [True])


def test_of_one_measurement_the_new_value_stays(trained):
    words = ["--evaluate", str(trained[0]), "--attacks", "fgsm,clean", "--test-size", "19"]
    file = trained[0].with_name("best-evaluation.json")
    file.unlink(missing_ok=True)
    found = []
    for _ in range(2):
        assert train.main(words) == 0
        rows = report(trained[0])["rows"]
        found.append([row["accuracy"] for row in rows if row["n"] == 19])
        rows = [row | {"accuracy": 0.123} for row in rows]                  # of an older program
        file.write_text(json.dumps(report(trained[0]) | {"rows": rows}))
    assert found[0] == found[1] and len(found[0]) == 2


def test_an_evaluation_keeps_what_was_measured_of_the_same_weights(tmp_path):
    for seed in "01":
        assert trains(tmp_path / f"run{seed}.x", *TINY, "--seed", seed) == 0
    path = tmp_path / "run0.x"
    for attacks, n in ("clean,fgsm", "9"), ("fgsm", "8"), ("pgd-2,fgsm", "9"):
        assert train.main(["--evaluate", str(path), "--attacks", attacks, "--test-size", n]) == 0
    rows = json.loads((path / "last-evaluation.json").read_text())["rows"]      # of a folder: last
    assert [(r["attack"], r["n"]) for r in rows] == [
        ("clean", 9), ("fgsm", 9), ("fgsm", 8), ("pgd-2", 9)]
    for source in "10":                                                 # its rows are its own
        assert train.main(["--evaluate", str(path), "--attacks", "fgsm", "--test-size", "9",
                           "--transfer-from", str(tmp_path / f"run{source}.x" / "last.pt")]) == 0
    kept = json.loads((path / "last-evaluation.json").read_text())
    moved = [r for r in kept["rows"] if r["attack"].startswith("transfer: ")]
    assert [r["attack"] for r in moved] == 2 * ["transfer: pgd-10", "transfer: fgsm"]
    assert len(kept["rows"]) == 4 + 4 and len({r["source"] for r in moved}) == 2
    kept["checks"] = [{"passed": False}]                                # of an earlier --checks
    (path / "last-evaluation.json").write_text(json.dumps(kept))
    assert train.main(["--evaluate", str(path), "--attacks", "clean", "--test-size", "9"]) == 0
    assert json.loads((path / "last-evaluation.json").read_text())["checks"] == [{"passed": False}]
    (tmp_path / "run1.x" / "last.pt").replace(path / "last.pt")
    assert train.main(["--evaluate", str(path), "--attacks", "clean", "--test-size", "9"]) == 0
    kept = json.loads((path / "last-evaluation.json").read_text())
    assert len(kept["rows"]) == 1 and kept["checks"] == []


def test_an_earlier_evaluation_that_is_damaged_is_refused_before_the_work(
        trained, capsys, monkeypatch):
    file = trained[0].with_name("best-evaluation.json")
    calls = batches(monkeypatch)
    words = "--evaluate", str(trained[0]), "--attacks", "clean", "--device", "cpu"
    for text in ("", "{", "[]", "{}", "7", '{"rows": {}}', 100_000 * "[", "\udcff",
                 '{"rows": [1], "weights": "", "checks": []}',
                 '{"rows": {}, "weights": "", "checks": []}',
                 '{"rows": [], "weights": "", "checks": 1}', '{"rows": [], "checks": []}'):
        file.write_text(text, errors="surrogateescape")
        before = file.read_bytes()
        assert train.main(words) == 2, text
        err = capsys.readouterr().err
        assert f"{file}: this earlier evaluation is damaged" in err and err.count("\n") == 1
        assert file.read_bytes() == before and calls == []
    file.unlink()
    file.mkdir()                                                            # cannot be read
    assert train.main(words) == 2 and "mend it, or move it away" in capsys.readouterr().err
    file.rmdir()


@pytest.mark.parametrize("rank", [1, 3])                                    # of one image
def test_a_process_without_an_image_counts_nothing(monkeypatch, rank):
    monkeypatch.setattr(train.dist, "all_reduce", lambda values: None)
    monkeypatch.setattr(train, "world", lambda: rank + 1)                   # more than images
    monkeypatch.setattr(train, "rank", lambda: rank)
    images, c = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), settings("--dataset", "synthetic")
    right = train.survivors(tiny_model("s4"), images, torch.tensor([0]), "clean", [], c, "here")
    assert right.tolist() == [[False]]


# ---- The published attack ------------------------------------------------------------------------

def test_the_published_attack_by_hand_its_black_pixels_stay_and_its_gradients_leave_the_ball():
    x, up = randn(2, 1, 1, 1, 4)
    x[:], up[:] = torch.tensor([0, 1, 0.5, 0.5]), torch.tensor([1, -1, 1, -1])
    model, eps, alpha = LinearSpy(2, 4).requires_grad_(False), 0.1, 0.03
    model.linear.weight[:] = torch.stack([0 * up.flatten(), up.flatten()])
    stays, moves, far = 0, 0, 0.0
    for seed in range(40):
        model.seen.clear()
        torch.manual_seed(seed)
        d = 2 * eps * torch.rand_like(x) - eps
        torch.manual_seed(seed)
        x_adv = evaluate.pgd_official(model, x, torch.tensor([0]), eps, alpha)
        start = (x + d).clamp(0, 1)
        for k in range(10):
            close(model.seen[k], (start + d).clamp(0, 1), 1e-12)
            inside = (start + d >= 0) & (start + d <= 1)
            d = (d + alpha * up * inside).clamp(-eps, eps)
        close(x_adv, (x + d).clamp(0, 1), 1e-12)
        stays += int(x_adv[0, 0, 0, 0] == 0)
        moves += int(x_adv[0, 0, 0, 0] > eps - 1e-9)
        far = max(far, *(float((p - x).abs().max()) for p in model.seen))
        assert (x_adv - x).abs().max() <= eps + 1e-12 and 0 <= x_adv.min() <= x_adv.max() <= 1
    assert stays + moves == 40 and 10 <= stays <= 30                    # half of the black pixels
    assert 1.9 * eps < far <= 2 * eps + 1e-12


def test_the_published_attack_is_refused_in_training(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY_7, "--attacks", "pgd-official") == 2
    assert "--attacks pgd-official: it stands for comparison only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(train.UserError, match="comparison only"):       # nor to choose Best
        train.attacks_of("pgd-official", attack_settings())


def test_the_published_attack_is_measured_in_evaluation(trained):
    assert evaluates(trained[0], "--attacks", "pgd-10,pgd-official") == 0
    assert [r["attack"] for r in report(trained[0])["rows"]] == ["pgd-10", "pgd-official"]


def test_the_published_attack_takes_what_pgd_takes():
    model, x = net(), dotted(3)
    y = model(x).argmax(1)
    assert evaluate.pgd_official(model, x[:0], y[:0], 0.1, 0.03).shape == x[:0].shape
    assert not evaluate.pgd_official(model, x.requires_grad_(), y, 0.1, 0.03).requires_grad
    with pytest.raises(ValueError, match="images must lie in"):
        evaluate.pgd_official(model, 2 * x - 1, y, 0.1, 0.03)
    with pytest.raises(ValueError, match="8/255, not 8"):
        evaluate.pgd_official(model, x, y, 8, 0.03)


# ---- Sweeps, transfer, cuts ----------------------------------------------------------------------

def test_sweeps_are_rows_at_their_radius_and_steps_and_equal_single_evaluations(
        trained, capsys, monkeypatch):
    checkpoint, calls = trained[0], batches(monkeypatch)
    assert evaluates(checkpoint, "--eps-sweep", "0,4/255,0.5", "--steps-sweep", "1,10",
                     "--attacks", "clean,pgd-2", "--eps", "8/255", "--alpha", "2/255") == 0
    rows, out = report(checkpoint)["rows"], capsys.readouterr().out
    assert [r["attack"] for r in rows] == ["clean"] + 4 * ["pgd-2"] + ["pgd-1", "pgd-10"]
    assert [round(r["alpha"], 6) for r in rows[2:5]] == [0, round(1 / 255, 6), 0.125]
    assert rows[2]["accuracy"] == rows[0]["accuracy"] and "pgd-2, eps 4/255" in out
    assert len(calls) == 7 * 3                                          # no row serves for another
    table = checkpoint.with_name("best-evaluation.csv").read_text()
    assert len(table.splitlines()) == 8 and list(checkpoint.parent.glob("*.part")) == []
    assert evaluates(checkpoint, "--eps", "4/255", "--alpha", "1/255", "--attacks", "pgd-2") == 0
    assert report(checkpoint)["rows"][0]["accuracy"] == rows[3]["accuracy"]


def test_what_is_not_given_is_the_checkpoint_s_but_for_the_number_of_images(trained, tmp_path):
    state = torch.load(trained[0], weights_only=True)
    state["config"] |= {"data_dir": "there", "seed": 7, "attacks": ["fgsm"],
                        "precision": "bf16", "test_size": 5}
    torch.save(state, tmp_path / "best.pt")
    c, _ = evaluate.settings(["--evaluate", str(tmp_path / "best.pt"), "--device", "cpu"])
    assert (c.data_dir, c.seed, c.attacks, c.batch_size) == ("there", 7, ["fgsm"], 8)
    assert (c.test_size, c.precision) == (None, "fp32")
    given = "--data-dir", "here", "--seed", "1", "--batch-size", "3", "--checks", "--test-size", "4"
    c, _ = evaluate.settings(["--evaluate", str(tmp_path / "best.pt"), "--device", "cpu", *given])
    assert (c.data_dir, c.seed, c.attacks, c.batch_size, c.test_size) == ("here", 1, [], 3, 4)


@pytest.mark.parametrize("words, alpha", [
    (("--eps", "64/255"), 24), (("--eps", "64/255", "--alpha", "1/255"), 1),
    (("--alpha", "1/255"), 1), ((), 3)])
def test_eps_alone_takes_the_step_along(words, alpha, trained):
    c, _ = evaluate.settings(["--evaluate", str(trained[0]), "--device", "cpu", *words])
    assert math.isclose(255 * c.alpha, alpha)


def test_without_attacks_only_what_is_asked_for_is_measured(trained):
    assert evaluates(trained[0], "--steps-sweep", "1") == 0
    assert [r["attack"] for r in report(trained[0], "steps-sweep")["rows"]] == ["pgd-1"]


def test_a_measurement_that_is_asked_for_twice_is_kept_once(trained):
    assert evaluates(trained[0], "--attacks", "clean,fgsm", "--eps-sweep", "8/255") == 0
    assert [row["attack"] for row in report(trained[0])["rows"]] == ["clean", "fgsm"]


def test_a_report_names_the_checkpoint_as_its_file_is_called(trained, tmp_path):
    for name in ("last.pt", "model.ckpt"):
        (tmp_path / name).write_bytes(trained[0].read_bytes())
    for path, name in ((tmp_path, "last"), (tmp_path / "model.ckpt", "model")):
        assert train.main(["--evaluate", str(path), "--attacks", "clean", "--device", "cpu"]) == 0
        found = json.loads((tmp_path / f"{name}-evaluation.json").read_text())["checkpoint"]
        assert found == {"last": "last.pt", "model": "model.ckpt"}[name]


def test_transfer_attacks_the_other_model_and_measures_this_one(trained, monkeypatch):
    attacked, calls = [], batches(monkeypatch)

    def black(model, x, y, **rest):
        attacked.append(type(model))
        return torch.zeros_like(x)
    monkeypatch.setattr(train, "pgd", black)
    monkeypatch.setitem(autoattack.AUTO, "square", lambda model, x, y, eps: x)
    words = "--transfer-from", str(trained[1]), "--attacks", "fgsm,square"  # that one: no transfer
    assert evaluates(trained[0], *words) == 0
    rows = report(trained[0])["rows"]
    assert [r["attack"] for r in rows] == ["fgsm", "square", "transfer: pgd-10", "transfer: fgsm"]
    assert attacked and set(attacked) == {mamba_adv.Classifier} and len(calls) == 4 * 3
    c, state = evaluate.settings(["--evaluate", str(trained[0]), "--device", "cpu"])
    c.test_size, model = 20, train.load_model(state, "")
    x, y = train.load_data(c)["test"]
    with torch.no_grad():
        both = (model(x / 255).argmax(1) == y) & (model(0 * x / 255).argmax(1) == y)
    assert rows[2]["accuracy"] == both.double().mean()


def test_transfer_between_data_sets_is_refused(trained, tmp_path, capsys):
    state = torch.load(trained[1], weights_only=True)
    state["config"]["dataset"] = "mnist"
    torch.save(state, tmp_path / "mnist.pt")
    assert evaluates(trained[0], "--transfer-from", str(tmp_path / "mnist.pt")) == 2
    err = capsys.readouterr().err
    assert "mnist.pt: its dataset is mnist, and that of" in err and err.count("\n") == 1


def test_a_cut_evaluation_goes_on_and_ends_like_one_that_was_not_cut(trained, monkeypatch):
    checkpoint, words = trained[0], ("--attacks", "clean,pgd-2x2", "--steps-sweep", "1,3")
    assert evaluates(checkpoint, *words) == 0
    whole, real, calls = plain(report(checkpoint)), train.still_right, []

    def cut(*args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "still_right", cut)
    for at in (2, 5, 12):                                               # 3 batches, 4 attacks
        calls.clear()
        assert evaluates(checkpoint, *words) == 130
        assert evaluates(checkpoint, "--attacks", "clean") == 0         # another leaves it alone
        del calls[at:]
        part, = checkpoint.parent.glob("*.part")
        part.write_bytes(part.read_bytes() + b'\n{"key": "half a li')
        done = at - 1
        assert evaluates(checkpoint, *words, "--seed", "1") == 0 and len(calls) == at + 12
        assert part.exists() and evaluates(checkpoint, *words) == 0     # another seed is another
        assert len(calls) == at + 12 + 12 - done and plain(report(checkpoint)) == whole
        assert not part.exists()


def kept_at(stem, seed=0):
    """Batches that wait for an evaluation of 2 images, in a file beside stem."""
    c = SimpleNamespace(seed=seed)
    return evaluate.Kept(stem, torch.zeros(2), torch.zeros(2), "weights", c)


def test_kept_batches_come_back_with_their_seconds(tmp_path, monkeypatch):
    clock = iter([10.0, 13.5, 20.0, 20.25])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    kept, right = kept_at(tmp_path / "best"), torch.tensor([[True, False], [False, False]])
    for key in "ab":
        assert key not in kept                                              # as train.survivors
        kept[key] = right
    again = kept_at(tmp_path / "best")
    assert torch.equal(again["a"], right) and torch.equal(again["b"], right)
    assert again.seconds == 3.75 and "c" not in again.batches
    assert kept_at(tmp_path / "best", seed=1).batches == {}                 # another evaluation


def test_lines_that_are_no_whole_batch_are_ignored(tmp_path):
    kept = kept_at(tmp_path / "best")
    assert "a" not in kept
    kept["a"] = torch.tensor([[True]])
    line = kept.path.read_bytes().strip()
    foreign = [line[:at] for at in range(len(line))]
    foreign += [line.replace(b'"a"', b'"x"'), line.replace(b"[[1]]", b"[[0]]")]    # a bit flipped
    foreign += [b"7", b"null", b'"text"', b"[1, 2]", b"{}", b"\xff", 100_000 * b"[",
                b'{"key": "x", "right": 1, "seconds": 1}',
                b'{"key": "x", "right": [[1]]}', b'{"key": "x", "right": [["1"]], "seconds": 1}',
                b'{"key": "x", "right": [[1], [1, 0]], "seconds": 1}',
                b'{"key": "x", "right": [[1]], "seconds": null}',
                b'{"key": ["x"], "right": [[1]], "seconds": 1}',
                b'{"key": "x", "right": [[1]], "seconds": 1' + 400 * b"0" + b"}"]
    kept.path.write_bytes(b"\n".join([*foreign, line, *foreign]))
    assert list(kept_at(tmp_path / "best").batches) == ["a"]


@pytest.mark.parametrize("change", ["weights", "images", "n", "seed", "batch", "code"])
def test_finished_batches_serve_only_the_very_same_evaluation(
        change, trained, tmp_path, monkeypatch):
    state, file, names = torch.load(trained[0], weights_only=True), tmp_path / "best.pt", []
    torch.save(state, file)

    def stop(model, images, labels, c, kept, *rest):
        names.append(kept.path.name)
        raise ZeroDivisionError
    monkeypatch.setattr(evaluate, "measure_all", stop)
    words = {"seed": ["--seed", "9"], "batch": ["--batch-size", "9"]}.get(change, [])
    images, labels = torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.zeros(20)
    monkeypatch.setattr(train, "load_data", lambda c: {"test": (images, labels)})
    for changed in (False, True):
        if changed and change == "weights":
            next(iter(state["model"].values())).view(-1)[0] += 1e-3
            torch.save(state, file)
        if changed and change == "images":
            images[0, 0, 0, 0] += 1
        if changed and change == "code":
            (tmp_path / "code" / "lab").mkdir(parents=True)
            for file_of_code in [*HERE.glob("*.py"), *HERE.glob("lab/*.py")]:
                copy = tmp_path / "code" / file_of_code.relative_to(HERE)
                more = "\n" if copy.name == "ads.py" else ""
                copy.write_text(file_of_code.read_text() + more)
            monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "code" / "lab" / "x.py"))
        with pytest.raises(ZeroDivisionError):
            size = "19" if changed and change == "n" else "20"
            evaluates(file, *(words if changed else []), size=size)
    assert names[0] != names[1]


BAD = {
    "--evaluate FILE": "this is damaged, or no checkpoint of this program",
    "--evaluate NOWHERE": "there is no such file; give one of a run's checkpoints",
    "--evaluate EMPTY": "--evaluate EMPTY/last.pt: there is no such file; give one",
    "--evaluate EMPTY --transfer-from=": "--transfer-from is empty; give a value, or leave it out",
    "--evaluate BEST --out EMPTY": "unrecognized arguments: --out EMPTY",
    "--evaluate FILE --analyse FILE": "unrecognized arguments: --analyse FILE",
    "--evaluate BEST --eps-sweep 0,x": "x is no number; write it as 8/255 or 0.031",
    "--evaluate BEST --eps-sweep 0,8": "radii must lie in [0, 1], pixel units; 8/255, not 8",
    "--evaluate BEST --steps-sweep 1,-5": "1,-5 is no list of whole numbers below 10^6; write",
    "--evaluate BEST --attacks magic": "--attacks magic: no such attack; choose from clean, fgsm",
    "--evaluate BEST --eps 8": "--eps 8.0: it must lie in [0, 1], pixel units; 8/255, not 8",
    "--evaluate BEST --checks --eps 0": "--checks need an eps above 0 and 4 classes",
    "--evaluate BEST --test-size 0": "--test-size 0: it must be at least 1",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence_and_writes_nothing(
        words, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("FILE").write_text("{}")
    Path("BEST").write_bytes(trained[0].read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert train.main(words.split()) == 2
    err = capsys.readouterr().err
    assert BAD[words] in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_matrix_of_transfer_is_that_of_the_logs():
    rows = re.findall(r"^\| [\w, ]+ \| (.*) \| \[log\]\(transfer/(\S+)\.txt\) \|$",
                      findings(), re.M)
    names = [name for _, name in rows]
    assert len(names) == 7
    for cells, name in rows:
        log = (HERE / "results" / "transfer" / f"{name}.txt").read_text()
        sources = re.findall(r"--transfer-from results/mnist-step-(\w+)/(\S+)-seed0/best.pt", log)
        own = re.findall(r"^pgd-10 +([\d.]+)0% .* 500 ", log, re.M)
        left = re.findall(r"^transfer: pgd-10 +([\d.]+)0% .* 500 ", log, re.M)
        found = dict(zip(("-".join(source) for source in sources), left, strict=True))
        assert len(set(own)) == 1 and len(found) == 6
        assert cells.split(" | ") == [found.get(source, f"**{own[0]}**") for source in names], name
