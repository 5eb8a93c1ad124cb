# SPDX-License-Identifier: MIT
"""--plot: accuracies of runs over epochs or attacks, or change rates of analyses, as one PNG file.

    python train.py --plot runs/A runs/B --out robust-overfitting.png
    python train.py --plot runs/A-seed0 runs/A-seed1 runs/B-seed0 --attacks
    python train.py --plot a/analysis.json b/analysis.json --out analyses.png

Also the figures of --evaluate and --analyse. Black and grey, but for the images themselves.
"""
import csv
import io
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch

import s4_adv
import train

GROWING = ("clean", "pgd-official", "pgd-10", "pgd-50x5", "aa")         # ever stronger attacks
SETS = {"train": "train", "val": "held-out", "test": "test"}            # there, and in a figure
METHODS = {"standard": "ST", "pgd": "PGD-AT", "trades": "TRADES"}       # the paper's abbreviations
MARKERS, DASHES = "osD^v", ("-", "--", ":", "-.")
LEADER = dict(arrowstyle="-", color="0.6", lw=0.5, relpos=(0, 0.5), shrinkA=1, shrinkB=4)


def main(words):
    p = train.Parser("Draw accuracies of runs, or the change rates of models.")
    p.add_argument("--plot", nargs="+", metavar="RUN", required=True,
                   help="folders of runs, or the .json files that --analyse left")
    p.add_argument("--attacks", nargs="?", type=train.comma_list, const=GROWING, metavar="A,A",
                   help="draw best.pt under attacks that --evaluate measured, in this order; "
                   f"without a word {','.join(GROWING)} (default: accuracies over epochs)")
    p.add_argument("--out", metavar="FILE.png", help="the figure (default: "
                   "robust-overfitting.png, attacks.png or analyses.png)")
    given = p.given(words)
    names = given["plot"]
    analyses = all(name.endswith(".json") for name in names)
    kind = "attacks" if "attacks" in given else "analyses" if analyses else "robust-overfitting"
    out = Path(given.get("out", f"{kind}.png"))
    if out.suffix != ".png":
        raise train.UserError(f"--out {out}: a figure is a PNG file; give a name that ends in .png")
    if kind == "attacks":
        from lab import attack_figure           # which imports this file
        attack_figure.draw_attacks(out, names, given["attacks"])
    elif kind == "analyses":
        draw_changes(out, [row for file in names for row in read_analysis(file)])
    else:
        draw_runs(out, [read_log(run) for run in names])


@contextmanager
def picture(path, rows=1, columns=1, size=(4.2, 3.2), **sharing):
    """Axes (rows, columns) to draw into; at the end they are written to path as PNG.

    size is that of one panel, in inches; sharing as in matplotlib's subplots.  UserError where
    matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise train.UserError("a figure needs matplotlib, which is not installed; pip install "
                              "matplotlib") from None
    file = io.BytesIO()
    # A dollar sign in a run's name does not begin a formula.
    with rc_context({"text.parse_math": False}):
        figure = Figure((size[0] * columns, size[1] * rows), layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, **sharing)
        figure.savefig(file, format="png", dpi=150)
    train.write(path, file.getvalue())
    train.say(f"drawn: {path}")


@contextmanager
def attempt():
    """Around a figure beside printed numbers: if it fails, that is said, and the job goes on."""
    try:
        yield
    except train.UserError as e:
        train.say(f"no figure: {e}")


def draw_lines(ax, lines, top):
    """{label: arguments of errorbar} in black, y from 0 to top; labels stand at the lines' ends."""
    ax.set_ylim(0, top)
    ax.tick_params(labelbottom=True)
    ax.spines[["top", "right"]].set_visible(False)
    ends = sorted(lines.items(), key=lambda item: item[1]["y"][-1])
    heights = apart([line["y"][-1] for _, line in ends], 0.06 * top)
    for (label, line), height in zip(ends, heights):
        face = "white" if "--" in line["fmt"] else "black"
        every = math.ceil(len(line["x"]) / 12)
        ax.errorbar(**line, color="black", mfc=face, markevery=every, lw=1, ms=4, capsize=2)
        ax.annotate(label, (line["x"][-1], line["y"][-1]), (18, height), va="center", size=8,
                    textcoords=("offset points", "data"), arrowprops=LEADER)


def apart(heights, gap):
    """Sorted heights, moved as little as keeps neighbours a gap apart (isotonic regression)."""
    blocks = []                                 # of neighbours that touch: heights less the gaps
    for k, height in enumerate(heights):
        blocks.append([height - k * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    moved = [fmean(block) for block in blocks for _ in block]
    return [height + k * gap for k, height in enumerate(moved)]


def style(k):
    """Marker and dash of the k-th line."""
    return MARKERS[k % len(MARKERS)] + DASHES[k % len(DASHES)]


def read_log(run):
    """The measured epochs of a run's log.csv.  UserError if there are none, or for a damaged file.

    Returns {"run": name, "epoch": [int], "lines": {(set, attack): [accuracies]}}; the last set is
    the one that chose Best.
    """
    file = Path(run) / "log.csv"
    title = Path(os.path.realpath(run)).name.encode(errors="replace").decode()      # of any bytes
    log = {"run": title, "lines": {}}
    try:
        rows = csv.DictReader(file.read_text().splitlines() if file.is_file() else [])
        columns = set(rows.fieldnames or [])
        sets = [name for name in SETS if columns & {f"{name}_clean", f"{name}_pgd-10"}]
        rows = [row for row in rows if sets and row[f"{sets[-1]}_pgd-10"] != ""]
        log["epoch"] = [int(row["epoch"]) for row in rows]
        for name in sets:
            for attack in train.ROW:
                log["lines"][name, attack] = [float(row[f"{name}_{attack}"]) for row in rows]
        if not (all(0 < epoch < 1e9 for epoch in log["epoch"])
                and all(0 <= v <= 1 for line in log["lines"].values() for v in line)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        raise train.UserError(f"--plot {run}: its log.csv is damaged; --resume writes it anew from "
                              "the checkpoint") from None
    if not log["epoch"]:
        raise train.UserError(f"--plot {run}: there is no log.csv with a measured epoch; give "
                              "folders of runs that have come so far")
    return log


def draw_runs(path, logs):
    """A panel for each of read_log's logs."""
    columns = 2 if len(logs) == 4 else min(len(logs), 3)
    most = max(max(accuracies) for log in logs for accuracies in log["lines"].values())
    with picture(path, math.ceil(len(logs) / columns), columns, sharex=True) as axes:
        for ax in axes.flat[len(logs):]:
            ax.axis("off")
        for ax, log in zip(axes.flat, logs):
            draw_run(ax, log, top=108 * max(0.01, most))


def draw_run(ax, log, top):
    """Accuracies in per cent over epochs, with a vertical line where Best was chosen."""
    lines = {}
    for (name, attack), accuracies in log["lines"].items():
        fmt = ("o" if attack == "clean" else "s") + ("--" if name == "train" else "-")
        percent = [100 * accuracy for accuracy in accuracies]
        lines[f"{SETS[name]}, {attack}"] = {"x": log["epoch"], "y": percent, "fmt": fmt}
    draw_lines(ax, lines, top)
    # As in train.keep_best.
    chooser, _ = list(log["lines"])[-1]
    scores = list(zip(log["lines"][chooser, "pgd-10"], log["lines"][chooser, "clean"]))
    best = scores.index(max(scores))
    ax.axvline(log["epoch"][best], color="0.6", lw=0.8)
    ax.set_title(f"{log['run']}\n{SETS[chooser]}, pgd-10: Best {100 * scores[best][0]:.1f} "
                 f"(epoch {log['epoch'][best]}), Last {100 * scores[-1][0]:.1f}", size=9)
    ax.set(xlabel="epoch", ylabel="accuracy, %")
    ax.xaxis.get_major_locator().set_params(integer=True)


def draw_sweep(stem, what, rows):
    """A sweep's rows: accuracy in per cent, with its interval, against what ("eps", "steps")."""
    lines = {}
    for k, attack in enumerate(dict.fromkeys(row["attack"] for row in rows)):
        line = sorted((r for r in rows if r["attack"] == attack), key=lambda row: row[what])
        bars = [[100 * abs(row[end] - row["accuracy"]) for row in line] for end in ("low", "high")]
        lines[attack] = {"x": [row[what] for row in line], "yerr": bars, "fmt": style(k),
                         "y": [100 * row["accuracy"] for row in line]}
    with attempt(), picture(stem.with_name(f"{stem.name}-{what}-sweep.png")) as axes:
        draw_lines(axes[0, 0], lines, top=105 * max(row["high"] for row in rows))
        axes[0, 0].set(xlabel=what, ylabel=f"accuracy, %  (n = {rows[0]['n']:,})")


def draw_images(model, images, labels, c, stem):
    """--images: uint8 images, perturbations, and images under PGD-10; predictions are printed."""
    x = images.to(next(model.parameters()).dtype) / 255                 # (n, C, h, w)
    torch.manual_seed(train.seed_of(c.seed, "images"))
    x_adv = s4_adv.pgd(model, x, labels, c.eps, c.alpha, 10)
    with train.frozen(model), torch.no_grad():
        clean = train.scores(model, x).argmax(1).tolist()
        attacked = train.scores(model, x_adv).argmax(1).tolist()
    scale = 0.5 / c.eps if c.eps else 0.0
    noise = f"perturbation x {scale:.3g} + 0.5"
    train.say(f"\n{'image':>6} {'label':>6} {'clean':>6} {'pgd-10':>6}    the grid shows {noise}")
    for i, label in enumerate(labels.tolist()):
        train.say(f"{i:6} {label:6} {clean[i]:6} {attacked[i]:6}")
    path = stem.with_name(f"{stem.name}-images.png")
    with attempt(), picture(path, 3, len(x), (1.1, 1.3)) as axes:
        for row, shown in zip(axes, (x, 0.5 + scale * (x_adv - x), x_adv)):
            for ax, image in zip(row, shown.clamp(0, 1).float().cpu()):
                ax.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy())     # (h, w, 3)
                ax.axis("off")
        for i, label in enumerate(labels.tolist()):
            axes[0, i].set_title(f"label {label}\nclean: {clean[i]}", size=7)
            axes[2, i].set_title(f"pgd-10: {attacked[i]}", size=7)
        axes[1, 0].set_title(noise, size=7, loc="left")


def read_analysis(file):
    """The change rates in a file of --analyse, "on" headed by the method: "ST test".  UserError."""
    try:
        analysis = json.loads(Path(file).read_text())
        method = analysis["config"]["method"]
        rows = [row | {"on": f"{METHODS.get(method, method)} {row['on']}"}
                for row in analysis["rows"]
                if row["statement"].startswith("change") and row["on"] != "start"]
        if rows and all(-1 <= row["value"] < 1e30 and 0 < row["layer"] < 1e9
                        and ": " in row["quantity"] for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise train.UserError(f"--plot {file}: this is no analysis; give the .json files that "
                          "--analyse left")


def draw_changes(path, rows):
    """The paper's figure: by what each part multiplies the error, 1 + its change rate.

    rows  [{"on": "model images", "layer": int, "quantity": "part: distance", "value": rate}]
    A panel for each distance; a model's marker is filled on test, large on training, x at "start".
    """
    panels = {}                                 # {distance: {"model images": factors and parts}}
    for row in rows:
        part, distance = row["quantity"].split(": ")[:2]
        points = panels.setdefault(distance, {}).setdefault(row["on"], {"x": [], "y": []})
        points["x"].append(1 + row["value"])
        points["y"].append(f"{part} {row['layer']}")
    parts = {(row["quantity"].split(": ")[0], row["layer"]) for row in rows}
    models = list(dict.fromkeys(row["on"].rpartition(" ")[0] for row in rows))
    with picture(path, 1, len(panels), (3.0, 1.2 + 0.3 * len(parts)), sharey=True) as axes:
        for ax, (distance, lines) in zip(axes[0], panels.items()):
            for name, points in lines.items():
                model, _, images = name.rpartition(" ")
                marker = MARKERS[models.index(model) % len(MARKERS)]
                ax.plot(points["x"], points["y"], "x" if images == "start" else marker,
                        mfc="black" if images == "test" else "none", color="black",
                        ms=9 if images == "train" else 5, label=name)
            ax.axvline(1, color="black", lw=0.8)
            ax.set(xscale="log", xlabel=f"{distance}, after / before",
                   ylim=(len(parts) - 0.5, -0.5))
            low, high = ax.get_xlim()
            ax.set_xlim(min(low, 0.1), max(high, 10))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
            ax.grid(axis="y", color="0.85")
        axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=6, frameon=False,
                                 loc="outside upper center")
