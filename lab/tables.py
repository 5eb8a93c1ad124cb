# SPDX-License-Identifier: MIT
"""--table: finished runs as Markdown, a line for each model: mean +- spread over its seeds.

    python train.py --table runs/A-seed0 runs/A-seed1 runs/B-seed0 > table.md

Accuracies are in per cent; spread is the sample standard deviation. "Best: pgd-official" and
"Best: aa" are what --evaluate RUN/best.pt left in the folder, with n where that is not the run's
own number of test images, and with seeds where those are not all of the line's. Where --evaluate
also left which images survived, a second table compares lines image by image.

Glossary   run   result.json as a dict, with what read_run and read_evaluation add to it
           line  a list of runs that differ in their seeds alone
"""
import json
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import train
from lab.evaluate import mcnemar, paired_interval, survivors_of

# Settings that keep runs apart though no column shows them, beside those of train.OWNERS.
SETTINGS = ("alpha", "n_layers", "batch_size", "lr", "weight_decay", "eps_warmup", "precision",
            "classes", "alphas")
TASK = ("dataset", "eps", "attacks", "select")      # what all runs of a table share
LATER = ("pgd-official", "aa")          # attacks that --evaluate may have added to a finished run
WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def main(words):
    p = train.Parser("Print the results of finished runs as one Markdown table.")
    p.add_argument("--table", nargs="+", metavar="RUN", required=True, help="folders of runs")
    runs = [read_run(str(Path(folder))) for folder in p.given(words)["table"]]
    first = runs[0]
    for run in runs:
        if any(run["config"][name] != first["config"][name] for name in TASK):
            raise train.UserError(f"--table {run['folder']}: its dataset, eps, attacks or select "
                                  f"differ from those of {first['folder']}; print them apart")
    name_runs(runs)
    lines = group(runs)
    attacks = first["config"]["attacks"]
    later = [attack for attack in LATER if attack not in attacks
             and any(attack in run["widest"] for run in runs)]
    alike = [f"{head} {value}" for head, value in first["columns"].items()
             if head not in first["name"]]
    train.say(f"{first['config']['dataset']}, {', '.join(alike)}\n")
    print_markdown([line[0]["name"] | results(line, attacks, later) for line in lines])
    differences = compare(lines)
    if differences:
        train.say("\nDifferences on the same images, in points\n")
        print_markdown(differences)


def check(values, low=0, high=1e9):
    """ValueError unless all are numbers in [low, high]: no NaN, no true, no text."""
    for value in values:
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError


def read_run(folder, flag="--table"):
    """result.json, with "folder", "log", "seed", the dicts "columns" and "settings", and what
    read_evaluation adds.  UserError where it is missing, damaged or of another form.
    flag: what the user gave it by, for messages"""
    try:
        run = json.loads((Path(folder) / "result.json").read_text())
        c = SimpleNamespace(**run["config"])
        names = [c.dataset, c.select, c.model, c.method, *c.attacks]
        if not all(isinstance(name, str) for name in names):
            raise ValueError
        check([c.seed], -1e30, 1e30)
        check([c.eps, c.alpha, *(vars(c).get("alphas") or [])], 0, 1)
        check([c.steps, c.d_model, c.epochs, run["n_train"], run["n_test"], run["parameters"],
               run["Best"]["epoch"]])
        for attack in c.attacks:
            check([run["Best"][attack], run["Last"][attack]], 0, 1)
            check([run["Diff"][attack]], -1, 1)
        run |= {"folder": folder, "flag": flag, "seed": c.seed}
        run["log"] = "log.txt" if (Path(folder) / "log.txt").exists() else "log.csv"
        run["columns"] = {"model": train.name_of(c), "method": c.method, "eps": train.show(c.eps),
                          "steps": c.steps, "width": c.d_model, "epochs": c.epochs,
                          "n train": run["n_train"], "n test": run["n_test"]}
        run["settings"] = {}
        for name in (*SETTINGS, *train.OWNERS):
            used = name in SETTINGS or {c.method, c.model} & set(train.OWNERS[name])
            run["settings"][name.replace("_", "-")] = str(vars(c).get(name)) if used else ""
    except WRONG:
        raise train.UserError(f"{flag} {folder}: there is no result.json of a finished run; let "
                              "the run end, or leave it out; give many as runs/*") from None
    read_evaluation(run)
    return run


def read_evaluation(run):
    """Adds what best-evaluation.json says at the run's own eps and alpha, of several seeds the
    worst: "rows" {(attack, n): row}, "widest" {attack: its row on most images}, and "outcomes"
    {(attack, n, classes): [bool], which images survived}.  UserError where it is damaged."""
    run |= {"rows": {}, "widest": {}, "outcomes": {}}
    file = Path(run["folder"]) / "best-evaluation.json"
    c = run["config"]
    if not file.exists():
        return
    try:
        evaluation = json.loads(file.read_text())
        if evaluation.get("epoch", run["Best"]["epoch"]) != run["Best"]["epoch"]:
            return
        rows = [row for row in evaluation["rows"] if row["eps"] == c["eps"]
                and (row["attack"] == "aa" or row["alpha"] == c["alpha"])]
        check([row["n"] for row in rows], 1)
        check([row["accuracy"] for row in rows], 0, 1)
        # Of several seeds the worst comes last and stays.
        for row in sorted(rows, key=lambda row: -row["accuracy"]):
            attack, n = row["attack"], row["n"]
            run["rows"][attack, n] = row
            if "survivors" in row and ": " not in attack:           # no stage, no transfer
                survived = survivors_of(row)
                check([fmean(survived) - row["accuracy"]], -1e-6, 1e-6)
                run["outcomes"][attack, n, run["settings"]["classes"]] = survived
        for attack, n in sorted(run["rows"]):
            run["widest"][attack] = run["rows"][attack, n]
    except WRONG:
        raise train.UserError(f"{run['flag']} {run['folder']}: its best-evaluation.json is "
                              "damaged; evaluate best.pt again, or remove the file") from None


def name_runs(runs):
    """Adds "name" {head: cell}: the columns that vary, and the settings that differ between runs
    whose columns are the same, which the table would otherwise show as one."""
    first = runs[0]
    vary = [head for head in first["columns"] if head == "model"
            or any(run["columns"][head] != first["columns"][head] for run in runs)]
    apart = [flag for flag in first["settings"]
             if any(a["settings"][flag] != b["settings"][flag] for a in runs for b in runs
                    if a["columns"] == b["columns"])]
    for run in runs:
        run["name"] = {head: run["columns"][head] for head in vary}
        run["name"] |= {flag: run["settings"][flag] for flag in apart}


def group(runs):
    """Lines: runs whose columns and settings are the same.  UserError if a seed comes twice."""
    lines = {}
    for run in runs:
        line = lines.setdefault((*run["columns"].items(), *run["settings"].items()), {})
        if run["seed"] in line:
            other = line[run["seed"]]
            raise train.UserError(f"{run['flag']} {run['folder']}: {other['folder']} has the same "
                                  "settings and seed; give one of them")
        line[run["seed"]] = run
    return [list(line.values()) for line in lines.values()]


def results(line, attacks, later):
    """{head: cell} of a line: how many seeds, accuracies, size, links."""
    cells = {"seeds": len(line)}
    for which in ("Best", "Last", "Diff"):
        cells[f"{which}: {' / '.join(attacks)}"] = " / ".join(
            spread([100 * run[which][attack] for run in line]) for attack in attacks)
    cells["parameters"] = line[0]["parameters"]
    for attack in later:
        cells[f"Best: {attack}"] = later_result(line, attack)
    cells["logs"] = " ".join(f"[{run['seed']}]({run['folder']}/{run['log']})" for run in line)
    if later:
        cells["evaluations"] = " ".join(f"[{run['seed']}]({run['folder']}/best-evaluation.json)"
                                        for run in line if run["widest"].keys() & later)
    return cells


def later_result(line, attack):
    """'67.6 +- 1.4, n 200 to 500, seed 0 1': n and seeds where they are not those of the line."""
    found = {run["seed"]: run["widest"][attack] for run in line if attack in run["widest"]}
    if not found:
        return ""
    cell = spread([100 * row["accuracy"] for row in found.values()])
    sizes = sorted({row["n"] for row in found.values()})
    if sizes != [line[0]["n_test"]]:
        cell += f", n {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
    if len(found) < len(line):
        cell += ", seed " + " ".join(str(seed) for seed in found)
    return cell


def spread(values):
    """'mean +- standard deviation', or the one value."""
    deviation = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{deviation}"


def outcomes_of(line, key):
    """{seed: [bool]}: which images survived, in the runs of a line of which that is known."""
    return {run["seed"]: run["outcomes"][key] for run in line if key in run["outcomes"]}


def compare(lines):
    """[{head: cell}]: each line minus the first one with the same attack on the same images.

    Difference and interval are means over the seeds that both lines have. All seeds have the same
    images, so that the interval gets no narrower by their number. p is that of each seed.
    """
    rows = []
    for key in dict.fromkeys(key for line in lines for run in line for key in run["outcomes"]):
        base, *others = [line for line in lines if outcomes_of(line, key)]
        for line in others:
            minus, survived = outcomes_of(base, key), outcomes_of(line, key)
            pairs = {seed: (survived[seed], minus[seed]) for seed in survived if seed in minus}
            if not pairs:
                continue
            found = [paired_interval(*pair) for pair in pairs.values()]
            difference, low, high = (100 * fmean(values) for values in zip(*found))
            attack, n, _ = key
            rows.append(line[0]["name"] | {
                "minus": " ".join(str(cell) for cell in base[0]["name"].values()),
                "attack": attack, "n": n, "seeds": " ".join(str(seed) for seed in pairs),
                "difference": f"{difference:.1f}", "95 % interval": f"{low:.1f} to {high:.1f}",
                "McNemar's p": " ".join(f"{mcnemar(*pair):.2g}" for pair in pairs.values())})
    return rows


def print_markdown(rows):
    """A list of {head: cell} with the same heads."""
    train.say("| " + " | ".join(rows[0]) + " |")
    train.say("|---" * len(rows[0]) + "|")
    for row in rows:
        train.say("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row.values()) + " |")
