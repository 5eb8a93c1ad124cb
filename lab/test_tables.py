# SPDX-License-Identifier: MIT
"""--table: a line for each experiment, means over seeds, differences in pairs, damage in words."""
import copy
import json
from pathlib import Path

import pytest
import torch

import train
from lab.evaluate import mcnemar, paired_interval, to_hex
from test_all import TINY, settings, trains


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """result.json of a tiny run, trained once."""
    out = tmp_path_factory.mktemp("tables") / "run"
    assert trains(out, *TINY) == 0
    return json.loads((out / "result.json").read_text())


def finished(folder, result, best=None, rows=None, **config):
    """A folder as a run leaves it, with other settings, accuracies of Best, rows of --evaluate."""
    new = copy.deepcopy(result)
    new["config"] |= config
    new["Best"] |= best or {}
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(new))
    if rows is not None:
        (folder / "best-evaluation.json").write_text(json.dumps(
            {"epoch": new["Best"]["epoch"], "rows": rows}))
    return str(folder)


def row_of(attack, survivors=None, **others):
    """A row of --evaluate at the run's eps and alpha."""
    row = {"attack": attack, "accuracy": 0.5, "n": 20, "eps": 8 / 255, "alpha": 3 / 255, "seed": 0}
    if survivors is not None:
        row |= {"survivors": to_hex(torch.tensor(survivors)), "n": len(survivors),
                "accuracy": sum(survivors) / len(survivors)}
    return row | others


def prints(capsys, *folders):
    """What --table prints: its lines, each split into cells where it belongs to a table."""
    capsys.readouterr()
    assert train.main(["--table", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line[2:-2].split(" | ") if line.startswith("| ") else line for line in lines]


# ---- Lines ---------------------------------------------------------------------------------------

def test_each_model_has_a_line_with_mean_and_spread_over_its_seeds(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result, best={"clean": 0.25})
    b = finished(tmp_path / "b", result, best={"clean": 0.75}, seed=1)
    c = finished(tmp_path / "c", result, ads="relu")
    caption, empty, heads, rule, first, second = prints(capsys, a, b, c)
    assert caption == ("synthetic, method pgd, eps 8/255, steps 3, width 8, epochs 1, n train 32, "
                       "n test 20") and not empty
    pair = "clean / pgd-10"
    assert heads == ["model", "seeds", f"Best: {pair}", f"Last: {pair}", f"Diff: {pair}",
                     "parameters", "logs"]
    assert rule == "|---" * 7 + "|"
    model = train.build(settings("--dataset", "synthetic", *TINY))
    assert first[5] == str(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert first[:2] == ["s4", "2"] and first[2].startswith("50.0 +- 35.4 / ")
    assert first[-1] == f"[0]({a}/log.csv) [1]({b}/log.csv)"
    assert second[:2] == ["s4 + AdS relu", "1"]


def test_a_log_that_was_kept_as_text_is_linked_before_the_csv(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result)
    (tmp_path / "a" / "log.txt").write_text("")
    assert prints(capsys, a)[4][-1] == f"[0]({a}/log.txt)"


def test_experiments_that_differ_in_a_setting_without_a_column_are_kept_apart(
        result, tmp_path, capsys):
    a = finished(tmp_path / "a", result, lr=1e-3)
    b = finished(tmp_path / "b", result, lr=2e-3)
    c = finished(tmp_path / "c", result, lr=1e-3, seed=1)
    _, _, heads, _, *lines = prints(capsys, a, b, c)
    assert heads[:3] == ["model", "lr", "seeds"]
    assert [line[:3] for line in lines] == [["s4", "0.001", "2"], ["s4", "0.002", "1"]]
    assert f"({a}/log.csv)" in lines[0][-1]


def test_a_setting_of_one_method_stands_in_that_method_s_lines(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result, lr=1e-3)
    b = finished(tmp_path / "b", result, lr=2e-3)
    d = finished(tmp_path / "d", result, method="trades", beta=2.0)
    e = finished(tmp_path / "e", result, method="trades", beta=3.0)
    _, _, heads, _, *lines = prints(capsys, a, b, d, e)
    assert heads[:5] == ["model", "method", "lr", "beta", "seeds"]
    assert [line[2:4] for line in lines] == [
        ["0.001", ""], ["0.002", ""], ["0.004", "2.0"], ["0.004", "3.0"]]


def test_another_task_is_no_other_seed_of_a_run(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result, classes=7)
    c = finished(tmp_path / "c", result, seed=1)
    assert prints(capsys, a, c)[2][:3] == ["model", "classes", "seeds"]


def test_step_sizes_keep_runs_apart_and_runs_of_before_there_were_any_have_none(
        result, tmp_path, capsys):
    a = finished(tmp_path / "a", result, alphas=[0.1, 0.05])
    b = finished(tmp_path / "b", result, alphas=None)
    c = finished(tmp_path / "c", result, seed=1)
    new = json.loads((tmp_path / "c" / "result.json").read_text())
    del new["config"]["alphas"]
    (tmp_path / "c" / "result.json").write_text(json.dumps(new))
    _, _, heads, _, *lines = prints(capsys, a, b, c)
    assert heads[:3] == ["model", "alphas", "seeds"]
    assert [line[:3] for line in lines] == [["s4", "[0.1, 0.05]", "1"], ["s4", "None", "2"]]


def test_a_run_is_not_counted_twice(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result)
    for folders in ([a, a], [a, f"{a}/../a"]):
        assert train.main(["--table", *folders]) == 2
        assert "has the same settings and seed; give one" in capsys.readouterr().err


def test_runs_of_two_tasks_have_two_tables(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result)
    for k, config in enumerate(({"dataset": "mnist"}, {"eps": 0.1}, {"select": "test"},
                                {"attacks": ["clean"]})):
        b = finished(tmp_path / f"b{k}", result, **config)
        assert train.main(["--table", a, b]) == 2
        err = capsys.readouterr().err
        assert f"--table {b}: its dataset, eps, attacks or select differ from those of {a}" in err


# ---- What --evaluate has added -------------------------------------------------------------------

def test_autoattack_of_the_run_s_own_radius_becomes_a_column(tmp_path, capsys):
    for out, *words in ("a", "--seed", "0"), ("b", "--seed", "1"), ("c", "--ads"):
        assert trains(tmp_path / out, *TINY, *words) == 0
    for eps, out in (("0", "a"), ("8/255", "b"), ("16/255", "c")):          # b at the run's own
        assert train.main(["--evaluate", str(tmp_path / out / "best.pt"), "--attacks", "clean,aa",
                           "--test-size", "6", "--eps", eps, "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "b" / "best-evaluation.json").read_text())["rows"]
    assert rows[-1]["attack"] == "aa"
    _, _, heads, _, first, second = prints(capsys, *(str(tmp_path / out) for out in "abc"))
    assert heads[-3:] == ["Best: aa", "logs", "evaluations"]
    assert first[-3] == f"{100 * rows[-1]['accuracy']:.1f}, n 6, seed 1"
    assert first[-1] == f"[1]({tmp_path}/b/best-evaluation.json)"
    assert second[-3:] == ["", f"[0]({tmp_path}/c/log.csv)", ""]


def test_the_published_attack_counts_at_the_run_s_own_step_on_the_most_images(
        tmp_path, capsys):
    assert trains(tmp_path / "a", *TINY) == 0
    a = str(tmp_path / "a")
    size = json.loads((tmp_path / "a" / "result.json").read_text())["n_test"]
    for n, *other in (size,), (6,), (size, "--alpha", "1/255"):
        assert train.main(["--evaluate", a + "/best.pt", "--attacks", "pgd-official", "--device",
                           "cpu", "--test-size", str(n), *other]) == 0
    rows = json.loads((tmp_path / "a" / "best-evaluation.json").read_text())["rows"]
    assert [row["n"] for row in rows] == [size, 6, size]
    _, _, heads, _, line = prints(capsys, a)
    assert heads[-3:] == ["Best: pgd-official", "logs", "evaluations"]
    assert line[-3] == f"{100 * rows[0]['accuracy']:.1f}"


def test_of_two_seeds_of_an_evaluation_the_worse_counts(result, tmp_path, capsys):
    for accuracies in ([0.25, 0.75], [0.75, 0.25]):
        a = finished(tmp_path / "a", result, rows=[
            row_of("aa", seed=k, accuracy=v) for k, v in enumerate(accuracies)])
        assert prints(capsys, a)[4][-3] == "25.0"


def test_autoattack_needs_no_step_so_that_of_another_alpha_counts(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result, rows=[
        row_of("aa", alpha=0.0), row_of("pgd-official", alpha=0.0), row_of("aa", eps=0.0, n=99)])
    heads, _, line = prints(capsys, a)[2:]
    assert "Best: pgd-official" not in heads and line[heads.index("Best: aa")] == "50.0"


def test_an_evaluation_of_an_older_best_does_not_count(result, tmp_path, capsys):
    a = finished(tmp_path / "a", result, rows=[row_of("aa")])
    path = tmp_path / "a" / "best-evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epoch": 77}))
    assert "aa" not in " ".join(prints(capsys, a)[2])


def test_n_and_seeds_are_named_where_they_are_not_those_of_the_line(result, tmp_path, capsys):
    runs = [finished(tmp_path / f"{k}", result, seed=k, rows=rows) for k, rows in enumerate((
        [row_of("aa", n=5, accuracy=0.2)], [row_of("aa", n=10, accuracy=0.6)], [], None))]
    line = prints(capsys, *runs)[4]
    assert line[-3] == "40.0 +- 28.3, n 5 to 10, seed 0 1"
    assert line[-1] == f"[0]({runs[0]}/best-evaluation.json) [1]({runs[1]}/best-evaluation.json)"
    assert prints(capsys, runs[0])[4][-3] == "20.0, n 5"


def test_an_attack_that_the_runs_have_in_their_own_row_gets_no_second_column(
        result, tmp_path, capsys):
    for which in ("Best", "Last", "Diff"):
        result = copy.deepcopy(result)
        result[which]["aa"] = 0.0
    a = finished(tmp_path / "a", result, attacks=["clean", "aa"], rows=[row_of("aa")])
    assert prints(capsys, a)[2][-1] == "logs"


# ---- Differences on the same images --------------------------------------------------------------

def outcomes(bits):
    return [bit == "1" for bit in bits]


def test_lines_are_compared_image_by_image_over_the_seeds_that_both_have(
        result, tmp_path, capsys):
    s4 = {0: "1111000000", 1: "1110000000", 2: "0000000001"}
    ads = {0: "1111111000", 1: "0111110000", 3: "1111111111"}
    runs = [finished(tmp_path / f"s4-{k}", result, seed=k, rows=[row_of("aa", outcomes(v))])
            for k, v in s4.items()]
    runs += [finished(tmp_path / f"ads-{k}", result, seed=k, ads="relu",
                      rows=[row_of("aa", outcomes(v))]) for k, v in ads.items()]
    empty, caption, gap, heads, _, line = prints(capsys, *runs)[-6:]
    assert (empty, caption, gap) == ("", "Differences on the same images, in points", "")
    assert heads == ["model", "minus", "attack", "n", "seeds", "difference", "95 % interval",
                     "McNemar's p"]
    assert line[:6] == ["s4 + AdS relu", "s4", "aa", "10", "0 1", "25.0"]   # 30 and 20 points
    ends = [paired_interval(outcomes(ads[k]), outcomes(s4[k]))[1:] for k in (0, 1)]
    low, high = (50 * (first + second) for first, second in zip(*ends))
    assert line[6] == f"{low:.1f} to {high:.1f}" and low < 25 < high
    assert line[7] == " ".join(f"{mcnemar(outcomes(ads[k]), outcomes(s4[k])):.2g}" for k in (0, 1))
    assert line[7] == "0.25 0.62"


def test_each_attack_is_compared_with_the_first_line_that_has_it_on_as_many_images(
        result, tmp_path, capsys):
    bits = outcomes("10101")
    s4 = finished(tmp_path / "s4", result, rows=[
        row_of("pgd-10", bits), row_of("aa", accuracy=0.1)])
    dss = finished(tmp_path / "dss", result, model="dss", rows=[
        row_of("aa", bits), row_of("pgd-10", bits[:4]), row_of("aa: square", bits)])
    s5 = finished(tmp_path / "s5", result, model="s5", rows=[
        row_of("aa", outcomes("00101")), row_of("pgd-10", outcomes("11111")),
        row_of("aa: square", bits), row_of("transfer: pgd-10", bits)])
    first, second = prints(capsys, s4, dss, s5)[-2:]
    assert first[:6] == ["s5", "s4", "pgd-10", "5", "0", "40.0"]
    assert second[:6] == ["s5", "dss", "aa", "5", "0", "-20.0"]


def test_other_images_are_not_compared(result, tmp_path, capsys):
    bits = outcomes("10101")
    a = finished(tmp_path / "a", result, rows=[row_of("aa", bits)])
    for config, row in (({"classes": 5}, row_of("aa", bits)), ({"seed": 1}, row_of("aa", bits)),
                        ({"ads": "relu", "seed": 1}, row_of("aa", bits)),
                        ({"ads": "relu"}, row_of("aa", bits, eps=0.1)),
                        ({"ads": "relu"}, row_of("aa"))):
        b = finished(tmp_path / "b", result, rows=[row], **config)
        assert "Differences" not in " ".join(map(str, prints(capsys, a, b)))


# ---- Damage --------------------------------------------------------------------------------------

DAMAGES = {
    "no data set": lambda r: r["config"].pop("dataset"),
    "no chooser": lambda r: r["config"].pop("select"),
    "no eps": lambda r: r["config"].update(eps=None),
    "eps in words": lambda r: r["config"].update(eps="8/255"),
    "alpha in words": lambda r: r["config"].update(alpha="2/255"),
    "a number for a list of steps": lambda r: r["config"].update(alphas=7),
    "a word for a step": lambda r: r["config"].update(alphas=["x"]),
    "a list for a seed": lambda r: r["config"].update(seed=[1]),
    "a word for a seed": lambda r: r["config"].update(seed="1"),
    "a list for a method": lambda r: r["config"].update(method=[]),
    "a dict for a model": lambda r: r["config"].update(model={}),
    "a word for steps": lambda r: r["config"].update(steps="2"),
    "attacks in a word": lambda r: r["config"].update(attacks="clean"),
    "a number for attacks": lambda r: r["config"].update(attacks=7),
    "a list of numbers for attacks": lambda r: r["config"].update(attacks=[7]),
    "an accuracy out of float's range": lambda r: r["Best"].update(clean=10 ** 400),
    "an accuracy above 1": lambda r: r["Best"].update(clean=1.5),
    "an accuracy below 0": lambda r: r["Last"].update(clean=-0.1),
    "NaN": lambda r: r["Last"].update({"pgd-10": float("nan")}),
    "true": lambda r: r["Last"].update({"pgd-10": True}),
    "an accuracy in words": lambda r: r["Best"].update(clean="0.5"),
    "a difference above 1": lambda r: r["Diff"].update(clean=1.5),
    "no number of images": lambda r: r.update(n_test=None),
    "a list for settings": lambda r: r.update(config=[]),
    "no Best": lambda r: r.pop("Best"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_said_to_be_so(damage, result, tmp_path, capsys):
    a = finished(tmp_path / "a", result)
    new = copy.deepcopy(result)
    DAMAGES[damage](new)
    (tmp_path / "a" / "result.json").write_text(json.dumps(new))
    assert train.main(["--table", a]) == 2
    err = capsys.readouterr().err
    assert f"--table {a}: there is no result.json of a finished run" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", "7", "null", '"run"', "[" * 100_000, "\0",
                                  '{"config": {}, "n_train": 1, "n_test": 1}'], ids=len)
def test_json_of_another_form_is_no_result(text, result, tmp_path, capsys):
    a = finished(tmp_path / "a", result)
    (tmp_path / "a" / "result.json").write_text(text)
    for folder in (a, str(tmp_path)):
        assert train.main(["--table", folder]) == 2
        assert "there is no result.json of a finished run" in capsys.readouterr().err


@pytest.mark.parametrize("evaluation", [
    {}, [], 7, None, {"rows": 7}, {"rows": {"aa": 0.5}}, {"rows": [7]}, {"rows": [{}]},
    {"rows": [row_of("aa", accuracy=1.5)]}, {"rows": [row_of("aa", accuracy=float("nan"))]},
    {"rows": [row_of("aa", accuracy="half")]}, {"rows": [row_of("aa", n=None)]},
    {"rows": [row_of("aa", n=0)]}, {"rows": [row_of("aa", survivors=[True] * 8, n=20)]},
    {"rows": [row_of("aa") | {"survivors": "xyz"}]}, {"rows": [row_of("aa") | {"survivors": 7}]},
    {"rows": [row_of("aa", survivors=[True] * 8) | {"accuracy": 0.5}]},
    {"rows": [row_of([], survivors=[True] * 8)]}], ids=str)
def test_a_damaged_evaluation_is_said_to_be_so(evaluation, result, tmp_path, capsys):
    a = finished(tmp_path / "a", result)
    (tmp_path / "a" / "best-evaluation.json").write_text(json.dumps(evaluation))
    assert train.main(["--table", a]) == 2
    err = capsys.readouterr().err
    assert f"--table {a}: its best-evaluation.json is damaged" in err and err.count("\n") == 1


# ---- The command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    ("--table", "argument --table: expected at least one argument"),
    ("--table EMPTY --seed 1", "unrecognized arguments: --seed 1"),
    ("--table nowhere", "--table nowhere: there is no result.json of a finished run"),
])
def test_bad_input_gets_one_sentence_exit_code_2_and_nothing_is_written(
        words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    assert train.main(words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["EMPTY"]
