# SPDX-License-Identifier: MIT
"""--plot, and the figures of --evaluate: what is drawn is what was measured, or one sentence."""
import json
import sys
from pathlib import Path

import pytest
import torch

import train
from lab import figures
from test_all import TINY, log, trains

TINY_7 = [*TINY, "--patch-size", "7", "--batch-size", "8", "--attacks", "clean"]
HEAD = "epoch,val_clean,val_pgd-10\n"
CHANGE = {"statement": "change rate", "on": "test", "layer": 1, "quantity": "SSM: MSE",
          "value": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of two tiny runs of two models, trained once."""
    out = tmp_path_factory.mktemp("figures")
    for name in ("s4", "mamba"):
        assert trains(out / name, *TINY_7, "--model", name, "--eval-train", "16") == 0
    return out / "s4", out / "mamba"


def plots(*names, out):
    return train.main(["--plot", *map(str, names), "--out", str(out)])


def png_size(path):
    data = Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def recorded(monkeypatch, name):
    """A list that grows by the arguments of each call of a function of figures."""
    real, calls = getattr(figures, name), []

    def record(*args, **kw):
        calls.append(args)
        return real(*args, **kw)
    monkeypatch.setattr(figures, name, record)
    return calls


def texts(monkeypatch):
    """A list that grows by every text that a figure shows."""
    text = pytest.importorskip("matplotlib.text")
    real, shown = text.Text.draw, []

    def draw(self, renderer):
        shown.append(self.get_text())
        real(self, renderer)
    monkeypatch.setattr(text.Text, "draw", draw)
    return shown


# ---- Accuracies over epochs ----------------------------------------------------------------------

def test_runs_are_plotted_from_their_logs(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = recorded(monkeypatch, "draw_lines")
    assert plots(*trained, out=tmp_path / "a.png") == 0
    wide, high = png_size(tmp_path / "a.png")
    assert wide > 2 * high and len(calls) == 2
    lines = calls[0][1]
    assert list(lines) == [
        f"{name}, {attack}" for name in ("train", "held-out") for attack in ("clean", "pgd-10")]
    assert len({line["fmt"] for line in lines.values()}) == 4
    row = dict(zip(*(line.split(",") for line in log(trained[0])[:2])))
    assert lines["held-out, clean"]["x"] == [1]
    assert lines["held-out, clean"]["y"] == [100 * float(row["val_clean"])]


def test_best_is_the_first_epoch_of_the_highest_pgd_10_then_of_the_highest_clean(
        tmp_path, monkeypatch):
    shown = texts(monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text(
        HEAD + "1,0.9,0.2\n2,,\n3,0.7,0.4\n4,0.8,0.4\n5,0.8,0.4\n6,0.9,0.1\n")
    assert plots(tmp_path / "run", out=tmp_path / "a.png") == 0
    assert "run\nheld-out, pgd-10: Best 40.0 (epoch 4), Last 10.0" in shown


def test_a_dollar_in_a_name_begins_no_formula(tmp_path, monkeypatch, capsys):
    text = pytest.importorskip("matplotlib.text")
    shown = texts(monkeypatch)
    run = tmp_path / r"run$x$, $\frac$"
    run.mkdir()
    (run / "log.csv").write_text(HEAD + "1,0.5,0.5\n")
    assert plots(run, out=tmp_path / "a.png") == 0, capsys.readouterr().err
    assert any(line.startswith(run.name) for line in shown)
    assert text.Text()._parse_math                                      # elsewhere it still does


def test_a_folder_without_a_measured_epoch_is_refused_and_nothing_is_drawn(tmp_path, capsys):
    for text in (None, "", HEAD, HEAD + "1,,\n"):
        if text is not None:
            (tmp_path / "log.csv").write_text(text)
        assert plots(tmp_path, out=tmp_path / "b.png") == 2
        assert f"--plot {tmp_path}: there is no log.csv with" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("text", [
    "inf,1,1\n", "1,nan,1\n", "1,1," + 200_000 * "1", "1,0.5,half\n", "1,1.01,1\n", "1,0.5,-0.1\n",
    "one,1,1\n", "-1,1,1\n", 4000 * "1" + ",1,1\n", "1,,0.5\n", "1,0.5\n2,0.5,0.5\n3", "\0",
    "1,0.5,0.5\n\u2028,0.5,0.5\n"],
    ids=lambda text: ascii(text[:20]))
def test_a_damaged_log_is_said_to_be_so(text, tmp_path, capsys):
    (tmp_path / "log.csv").write_text(HEAD + text)
    assert plots(tmp_path, out=tmp_path / "b.png") == 2
    err = capsys.readouterr().err
    assert "its log.csv is damaged; --resume writes it anew" in err and err.count("\n") == 1
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("head", ["epoch,val_pgd-10\n1,1\n", "epoch,val_clean\n1,1\n",
                                  "val_clean,val_pgd-10\n1,1\n",
                                  "epoch,train_clean,val_clean,val_pgd-10\n1,1,1,1\n"])
def test_a_log_without_a_column_is_damaged(head, tmp_path, capsys):
    (tmp_path / "log.csv").write_text(head)
    assert plots(tmp_path, out=tmp_path / "b.png") == 2
    assert "its log.csv is damaged" in capsys.readouterr().err


# ---- Accuracies under attacks --------------------------------------------------------------------

def evaluated(folder, trained, rows, **config):
    """A copy of a run's results with other settings, and these rows of --evaluate:
    {attack: {n: per cent}}."""
    result = json.loads((trained / "result.json").read_text())
    result["config"] |= config
    c = result["config"]
    kept = [{"attack": attack, "n": n, "accuracy": percent / 100, "eps": c["eps"],
             "alpha": c["alpha"]} for attack, sizes in rows.items() for n, percent in sizes.items()]
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "best-evaluation.json").write_text(json.dumps(
        {"epoch": result["Best"]["epoch"], "rows": kept}))
    return folder


def plots_attacks(*names, out, attacks="clean,pgd-10,aa"):
    return train.main(["--plot", *map(str, names), "--attacks", attacks, "--out", str(out)])


def test_a_line_of_a_model_is_the_mean_of_its_seeds(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = recorded(monkeypatch, "draw_lines")
    runs = [evaluated(tmp_path / f"s4-{seed}", trained[0], seed=seed, rows={
        "aa": {20: percent}, "clean": {20: 80}, "pgd-10": {20: 60}})
        for seed, percent in enumerate((10, 40))]
    runs += [evaluated(tmp_path / "mamba", trained[1], {
        "clean": {20: 70}, "pgd-10": {20: 50}, "aa": {20: 30}})]
    assert plots_attacks(*runs, out=tmp_path / "a.png") == 0
    (_, lines), = calls
    assert {name: line["y"] for name, line in lines.items()} == {
        "s4  25.0": pytest.approx([80, 60, 25]), "mamba  30.0": pytest.approx([70, 50, 30])}
    assert lines["s4  25.0"]["x"] == ["clean", "pgd-10", "aa"]
    assert png_size(tmp_path / "a.png")


def test_each_seed_is_a_row_of_dots(trained, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    real, dots = axes.Axes.plot, []

    def plot(ax, x, y, *args, **kw):
        dots.append(y)
        return real(ax, x, y, *args, **kw)
    monkeypatch.setattr(axes.Axes, "plot", plot)
    runs = [evaluated(tmp_path / f"{seed}", trained[0], {"clean": {20: 80}, "aa": {20: 10 * seed}},
                      seed=seed) for seed in (1, 2)]
    assert plots_attacks(*runs, out=tmp_path / "a.png", attacks="clean,aa") == 0
    assert dots == [pytest.approx([80, 10]), pytest.approx([80, 20])]


def test_each_data_set_radius_and_step_has_a_panel_that_says_how_many_images(
        trained, tmp_path, monkeypatch):
    shown = texts(monkeypatch)
    rows = {"clean": {20: 80}, "aa": {20: 10}}
    more = {"clean": {200: 80}, "aa": {200: 10}}
    runs = [evaluated(tmp_path / "a", trained[0], rows),
            evaluated(tmp_path / "b", trained[1], more),
            evaluated(tmp_path / "c", trained[0], rows, eps=0.3),
            evaluated(tmp_path / "d", trained[0], rows, eps=0.3, alphas=[0.2, 0.1, 0.04])]
    assert plots_attacks(*runs, out=tmp_path / "a.png", attacks="clean,aa") == 0
    head, wide = "synthetic, eps 8/255", "synthetic, eps 0.3"
    assert list(dict.fromkeys(text for text in shown if text.startswith("synthetic"))) == [
        f"{head}, step 3/255", f"{wide}, step 0.0117647", f"{wide}, steps 0.2 to 0.04"]
    assert {"attack  (n = 20 to 200)", "attack  (n = 20)"} <= set(shown)


def test_accuracies_are_on_the_most_images_that_all_attacks_have(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = recorded(monkeypatch, "draw_lines")
    run = evaluated(tmp_path / "a", trained[0], {
        "clean": {10: 50, 20: 60, 100: 90}, "pgd-10": {10: 20, 20: 30, 100: 40},
        "aa": {20: 10, 10: 5}})
    assert plots_attacks(run, out=tmp_path / "a.png") == 0
    (_, lines), = calls
    assert [line["y"] for line in lines.values()] == [pytest.approx([60, 30, 10])]


def test_lines_of_one_model_with_other_settings_say_what_differs(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = recorded(monkeypatch, "draw_lines")
    runs = [evaluated(tmp_path / str(lr), trained[0], {"clean": {20: 80}, "aa": {20: 10}}, lr=lr)
            for lr in (0.5, 0.25)]
    assert plots_attacks(*runs, out=tmp_path / "a.png", attacks="clean,aa") == 0
    (_, lines), = calls
    assert list(lines) == ["s4 0.5  10.0", "s4 0.25  10.0"]
    assert len({line["fmt"] for line in lines.values()}) == 2


def test_attacks_without_a_word_are_five_of_growing_strength(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = recorded(monkeypatch, "draw_lines")
    monkeypatch.chdir(tmp_path)
    run = evaluated(tmp_path / "a", trained[0], {attack: {20: 50} for attack in figures.GROWING})
    assert train.main(["--plot", str(run), "--attacks"]) == 0
    (_, lines), = calls
    assert [line["x"] for line in lines.values()] == [figures.GROWING]
    assert png_size("attacks.png")


def test_a_run_without_one_of_the_attacks_is_refused_with_the_command_that_measures_them(
        trained, tmp_path, capsys):
    run = evaluated(tmp_path / "a", trained[0], {"clean": {20: 80}, "pgd-10": {20: 60},
                                                 "aa": {10: 10}})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_bytes((trained[0] / "result.json").read_bytes())
    for folder in (run, tmp_path / "b"):
        assert plots_attacks(folder, out=tmp_path / "a.png") == 2
        err = capsys.readouterr().err
        assert f"--evaluate {folder}/best.pt --attacks clean,pgd-10,aa" in err
        assert f"--plot {folder}: " in err and err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_a_folder_without_a_finished_run_has_no_attacks_to_plot(tmp_path, capsys):
    assert plots_attacks(tmp_path, out=tmp_path / "a.png") == 2
    assert f"--plot {tmp_path}: there is no result.json" in capsys.readouterr().err


@pytest.mark.parametrize("heights, expected", [
    ([1, 2, 3], [1, 2, 3]), ([5, 5, 5], [4, 5, 6]), ([0, 5, 5.5, 9], [0, 4.75, 5.75, 9]),
    ([2], [2])], ids=str)
def test_labels_that_would_meet_are_moved_apart_as_little_as_it_takes(heights, expected):
    assert figures.apart(heights, 1) == pytest.approx(expected)


# ---- Change rates --------------------------------------------------------------------------------

def write_analysis(path, *rows, method="pgd"):
    path.write_text(json.dumps({"config": {"method": method}, "rows": rows}))
    return path


def test_change_rates_are_drawn_as_factors_in_a_panel_for_each_distance(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    real, plotted = axes.Axes.plot, []

    def plot(ax, x, y, *args, **kw):
        plotted.append((ax.get_xlabel(), kw["label"], x, y))
        return real(ax, x, y, *args, **kw)
    monkeypatch.setattr(axes.Axes, "plot", plot)
    rows = [CHANGE | {"on": on, "quantity": f"{part}: {distance}", "layer": layer, "value": value}
            for on, value in (("start", 9.0), ("test", -0.5), ("train", 1.0))
            for layer in (1, 2) for part in ("SSM", "Linear") for distance in ("MSE", "KL")]
    assert plots(write_analysis(tmp_path / "a.json", *rows, method="trades"),
                 out=tmp_path / "a.png") == 0
    parts = ["SSM 1", "Linear 1", "SSM 2", "Linear 2"]
    assert [line[1:] for line in plotted] == 2 * [
        ("TRADES test", [0.5] * 4, parts), ("TRADES train", [2.0] * 4, parts)]


def test_several_analyses_of_one_method_all_keep_their_points(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = recorded(monkeypatch, "draw_changes")
    files = [write_analysis(tmp_path / f"{k}.json", CHANGE | {"value": k}) for k in range(3)]
    assert plots(*files, out=tmp_path / "a.png") == 0
    (_, rows), = calls
    assert [(row["on"], row["value"]) for row in rows] == [("PGD-AT test", k) for k in range(3)]


@pytest.mark.parametrize("row", [
    CHANGE | {"value": None}, CHANGE | {"value": float("nan")}, CHANGE | {"value": -1.5},
    CHANGE | {"value": "1"}, CHANGE | {"quantity": "MSE"}, CHANGE | {"quantity": 7},
    CHANGE | {"layer": None}, CHANGE | {"layer": 0}, CHANGE | {"on": "start"},
    CHANGE | {"statement": 1}, {"statement": "change"}, None, [], 7], ids=str)
def test_what_is_no_analysis_is_said_to_be_so(row, tmp_path, capsys):
    assert plots(write_analysis(tmp_path / "a.json", row), out=tmp_path / "a.png") == 2
    err = capsys.readouterr().err
    assert "a.json: this is no analysis" in err and err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", "7", '{"config": [], "rows": []}', "[" * 100_000,
                                  '{"config": {"method": []}, "rows": [{}]}', "\ud800"], ids=len)
def test_json_of_another_form_is_no_analysis(text, tmp_path, capsys):
    (tmp_path / "b.json").write_text(text, errors="surrogatepass")
    assert plots(tmp_path / "b.json", out=tmp_path / "b.png") == 2
    assert "b.json: this is no analysis" in capsys.readouterr().err


# ---- Sweeps and images ---------------------------------------------------------------------------

def evaluates(run, *words):
    """train.main on a checkpoint that has no table yet: an earlier one's rows would be kept."""
    (run / "best-evaluation.json").unlink(missing_ok=True)
    for file in run.glob("best-*.png"):
        file.unlink()
    return train.main(["--evaluate", str(run / "best.pt"), "--device", "cpu", "--test-size", "20",
                       *words])


@pytest.mark.parametrize("there", [True, False])
def test_sweeps_and_images_are_drawn_and_without_matplotlib_the_tables_still_come(
        there, trained, monkeypatch, capsys, tmp_path):
    if there:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run, _ = trained
    assert evaluates(run, "--eps-sweep", "0,0.1", "--images") == 0
    out = capsys.readouterr().out
    assert "pgd-10, eps 0.1" in out and out.count("no figure: ") == (0 if there else 2)
    assert (run / "best-eps-sweep.png").exists() is there
    assert (run / "best-images.png").exists() is there
    if there:
        wide, high = png_size(run / "best-images.png")
        assert wide > 2 * high
    else:
        assert plots(run, out=tmp_path / "c.png") == 2
        assert "a figure needs matplotlib, which is not installed" in capsys.readouterr().err
    state = train.read_checkpoint(run / "best.pt", "--evaluate")
    c = train.settings({"device": "cpu"}, train.add_flags(train.Parser("")))
    c = train.checkpoint_settings(c, {}, state, run, ())
    x, y = (v[:8] for v in train.load_data(c)["test"])
    with torch.no_grad():
        clean = train.load(run / "best.pt")(x / 255).argmax(1)
    seen = [line.split() for line in out.split("perturbation x 15.9 + 0.5")[1].splitlines()[1:9]]
    assert [row[:3] for row in seen] == [
        [str(v) for v in row] for row in zip(range(8), y.tolist(), clean.tolist())]


def test_a_sweep_is_drawn_in_the_order_of_its_radii_with_its_interval(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    calls = recorded(monkeypatch, "draw_lines")
    rows = [{"attack": attack, "eps": eps, "accuracy": 0.5, "low": 0.4, "high": 0.7, "n": 20}
            for attack in ("fgsm", "pgd-10") for eps in (0.2, 0.1)]
    figures.draw_sweep(tmp_path / "best", "eps", rows)
    (_, lines), = calls
    assert list(lines) == ["fgsm", "pgd-10"] and lines["fgsm"]["x"] == [0.1, 0.2]
    assert lines["fgsm"]["fmt"] != lines["pgd-10"]["fmt"]
    below, above = lines["fgsm"]["yerr"]
    assert below == pytest.approx([10, 10]) and above == pytest.approx([20, 20])
    assert png_size(tmp_path / "best-eps-sweep.png")


# ---- The command line ----------------------------------------------------------------------------

BAD = {
    "--plot": "argument --plot: expected at least one argument",
    "--plot EMPTY --model s5": "unrecognized arguments: --model s5",
    "--plot BROKEN EMPTY/a.json": "--plot BROKEN: its log.csv is damaged",
    "--plot OTHER/config.json": "--plot OTHER/config.json: this is no analysis",
    "--plot OTHER/nowhere.json": "--plot OTHER/nowhere.json: this is no analysis",
    "--plot BROKEN --out FILE": "--out FILE: a figure is a PNG file; give a name that ends in .png",
    "--plot BROKEN --out=": "--out is empty; give a value, or leave it out",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence_exit_code_2_and_nothing_is_written(
        words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("EMPTY", "BROKEN", "OTHER"):
        Path(folder).mkdir()
    Path("OTHER/config.json").write_text("{}")
    Path("BROKEN/log.csv").write_text(HEAD + "1,0.5,half\n")
    before = sorted(tmp_path.rglob("*"))
    assert train.main(words.split()) == 2
    err = capsys.readouterr().err
    assert BAD[words] in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_that_leads_to_itself_is_no_run(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert plots(tmp_path / "loop", out=tmp_path / "a.png") == 2
    assert "loop: there is no log.csv with a measured epoch" in capsys.readouterr().err


def test_a_figure_that_cannot_be_written_is_said_in_one_sentence(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert plots(trained[0], out=tmp_path / "nowhere" / "a.png") == 2
    err = capsys.readouterr().err
    assert "cannot write" in err and err.count("\n") == 1
