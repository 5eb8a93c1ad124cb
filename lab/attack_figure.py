# SPDX-License-Identifier: MIT
"""--plot RUN ... --attacks: accuracies under attacks of growing strength, as one PNG file.

    python train.py --plot runs/A-seed0 runs/A-seed1 runs/B-seed0 --attacks

The accuracies are those of best.pt that --evaluate left in best-evaluation.json.
"""
from statistics import fmean

import train
from lab import figures, tables


def draw_attacks(path, folders, attacks):
    """A panel for each data set, radius and list of steps, in it a line for each model: the mean
    over its seeds, each of which is a dot. attacks [str] from the weakest to the strongest."""
    panels = {}                                                         # {title: [run]}
    numbers = {}                                # {name of a line: k}, for one style in all panels
    for folder in folders:
        run = read_run(folder, attacks)
        panels.setdefault(title_of(run["config"]), []).append(run)
    with figures.picture(path, 1, len(panels), (5.2, 4.2)) as axes:
        for ax, (title, runs) in zip(axes[0], panels.items()):
            draw_panel(ax, runs, attacks, numbers)
            sizes = [run["n"] for run in runs]
            n = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
            ax.set(title=title, xlabel=f"attack  (n = {n})", ylabel="accuracy, %")


def title_of(config):
    """'mnist, eps 0.3, step 0.1', or 'steps 0.2 to 0.04': those of the attack in training."""
    eps = train.show(config["eps"])
    steps = config.get("alphas") or [config["alpha"]]
    ends = [train.show(a) if "/" in eps else f"{a:g}" for a in (steps[0], steps[-1])]
    word = "steps" if len(steps) > 1 else "step"
    return f"{config['dataset']}, eps {eps}, {word} {' to '.join(dict.fromkeys(ends))}"


def read_run(folder, attacks):
    """tables.read_run, with "n" and "percent": the accuracies of best.pt under attacks, on the
    largest number n of images that all of them have.  UserError where there are none."""
    run = tables.read_run(folder, "--plot")
    rows = run["rows"]
    sizes = [n for _, n in rows if all((attack, n) in rows for attack in attacks)]
    if not sizes:
        raise train.UserError(
            f"--plot {folder}: its best-evaluation.json does not have all of these attacks on the "
            f"same images; --evaluate {folder}/best.pt --attacks {','.join(attacks)}")
    run["n"] = max(sizes)
    run["percent"] = [100 * rows[attack, run["n"]]["accuracy"] for attack in attacks]
    return run


def draw_panel(ax, runs, attacks, numbers):
    """The lines of read_run's runs. A name is the model's, with all that differs where two lines
    are of one model; beside it stands the last mean."""
    tables.name_runs(runs)
    groups = tables.group(runs)
    models = [seeds[0]["columns"]["model"] for seeds in groups]
    lines = {}
    for name, seeds in zip(models, groups):
        if models.count(name) > 1:
            name = " ".join(str(cell) for cell in seeds[0]["name"].values())
        for run in seeds:
            ax.plot(attacks, run["percent"], ".", color="0.6", ms=4)
        means = [fmean(column) for column in zip(*(run["percent"] for run in seeds))]
        k = numbers.setdefault(name, len(numbers))
        lines[f"{name}  {means[-1]:.1f}"] = {"x": attacks, "y": means, "fmt": figures.style(k)}
    most = max(percent for run in runs for percent in run["percent"])
    figures.draw_lines(ax, lines, top=1.08 * max(1, most))
