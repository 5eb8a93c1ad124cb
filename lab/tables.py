# SPDX-License-Identifier: MIT
"""--table: finished runs as Markdown, a line for each model: mean +- spread over its seeds.

    python train.py --table runs/A-seed0 runs/A-seed1 runs/B-seed0 > table.md

Accuracies are in per cent; spread is the sample standard deviation. "Best: pgd-official" and
"Best: aa" are what --evaluate RUN/best.pt left in the folder, with n where that is not all test
images and with seeds where those are not all of the line's. Where --evaluate also left which images
survived, a second table compares lines image by image.

Glossary   run   result.json as a dict, with what read_run and read_evaluation add to it
           line  a list of runs that differ in their seeds alone
"""
import json
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import train
from lab.evaluate import mcnemar, paired_interval, survivors_of

# Settings that keep runs apart though no column shows them, beside those of train.OWNERS.
SETTINGS = ("alpha", "d_state", "n_layers", "patch_size", "batch_size", "lr", "weight_decay",
            "eps_warmup", "precision", "classes", "alphas")
LATER = ("pgd-official", "aa")          # attacks that --evaluate may have added to a finished run
WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def main(words):
    p = train.Parser("Print the results of finished runs as one Markdown table.")
    p.add_argument("--table", nargs="+", metavar="RUN", required=True, help="folders of runs")
    runs = [read_run(str(Path(folder))) for folder in p.given(words)["table"]]
    first = runs[0]
    for run in runs:
        if run["task"] != first["task"]:
            raise train.UserError(f"--table {run['folder']}: its dataset, eps, attacks or select "
                                  f"differ from those of {first['folder']}; print them apart")
    name_runs(runs)
    lines = group(runs)
    attacks = first["config"]["attacks"]
    later = [attack for attack in LATER if attack not in attacks
             and any(find_row(run, attack) for run in runs)]
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
    """result.json, with "folder", "seed", "task" (what all runs of a table share), and the dicts
    "columns" and "settings".  UserError where it is missing, damaged or of another form.
    flag: what the user gave it by, for messages"""
    try:
        run = json.loads((Path(folder) / "result.json").read_text())
        c = SimpleNamespace(**run["config"])
        names = [c.dataset, c.select, c.model, c.method, *c.attacks]
        if not all(isinstance(name, str) for name in names):
            raise ValueError
        check([c.seed], -1e30, 1e30)
        check([c.eps], 0, 1)
        check([c.steps, c.d_model, c.epochs, run["n_train"], run["n_test"], run["Best"]["epoch"],
               run.get("parameters", 1)])
        for attack in c.attacks:
            check([run["Best"][attack], run["Last"][attack]], 0, 1)
            check([run["Diff"][attack]], -1, 1)
        run |= {"folder": folder, "seed": c.seed, "flag": flag}
        run["task"] = [c.dataset, c.eps, c.attacks, c.select]
        run["columns"] = {"model": train.name_of(c), "method": c.method, "eps": train.show(c.eps),
                          "steps": c.steps, "width": c.d_model, "epochs": c.epochs,
                          "n train": run["n_train"], "n test": run["n_test"]}
        run["settings"] = {name: str(vars(c).get(name)) for name in SETTINGS}
        for name, owners in train.OWNERS.items():
            owned = {c.method, c.model} & set(owners)
            run["settings"][name] = str(vars(c).get(name)) if owned else ""
    except WRONG:
        raise train.UserError(f"{flag} {folder}: there is no result.json of a finished run; let "
                              "the run end, or leave it out") from None
    read_evaluation(run)
    return run


def read_evaluation(run):
    """Adds "rows", those of best-evaluation.json at the run's own eps and alpha, and "outcomes":
    {(attack, n, classes): [bool], which images survived}.  UserError where it is damaged."""
    run |= {"rows": [], "outcomes": {}}
    file = Path(run["folder"]) / "best-evaluation.json"
    c = run["config"]
    if not file.exists():
        return
    try:
        evaluation = json.loads(file.read_text())
        if evaluation.get("epoch", run["Best"]["epoch"]) != run["Best"]["epoch"]:
            return
        for row in evaluation["rows"]:
            if row["eps"] == c["eps"] and (row["attack"] == "aa" or row["alpha"] == c["alpha"]):
                check([row["n"]], 1)
                check([row["accuracy"]], 0, 1)
                run["rows"].append(row)
        # Of several seeds the worst comes last and stays.
        for row in sorted(run["rows"], key=lambda row: -row["accuracy"]):
            if "survivors" in row and ": " not in row["attack"]:            # no stage, no transfer
                survived = survivors_of(row)
                check([fmean(survived) - row["accuracy"]], -1e-6, 1e-6)
                run["outcomes"][row["attack"], row["n"], run["settings"]["classes"]] = survived
    except WRONG:
        raise train.UserError(f"{run['flag']} {run['folder']}: its best-evaluation.json is "
                              "damaged; evaluate best.pt again, or remove the file") from None


def find_row(run, attack):
    """The row of an attack on most images, of several seeds the worst; or None."""
    rows = [row for row in run["rows"] if row["attack"] == attack]
    return min(rows, key=lambda row: (-row["n"], row["accuracy"]), default=None)


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
        for flag in apart:
            run["name"][flag.replace("_", "-")] = run["settings"][flag]


def group(runs):
    """Lines: runs whose columns and settings are the same.  UserError if a seed comes twice."""
    lines = {}
    for run in runs:
        line = lines.setdefault((*run["columns"].items(), *run["settings"].items()), [])
        for other in line:
            if other["seed"] == run["seed"]:
                raise train.UserError(f"{run['flag']} {run['folder']}: {other['folder']} has the "
                                      "same settings and seed; give one of them")
        line.append(run)
    return list(lines.values())


def results(line, attacks, later):
    """{head: cell} of a line: how many seeds, accuracies, size, links."""
    cells = {"seeds": len(line)}
    for which in ("Best", "Last", "Diff"):
        cells[f"{which}: {' / '.join(attacks)}"] = " / ".join(
            spread([100 * run[which][attack] for run in line]) for attack in attacks)
    cells["parameters"] = line[0].get("parameters", "")
    for attack in later:
        cells[f"Best: {attack}"] = later_result(line, attack)
    cells["logs"] = links(line, "log.txt", "log.csv")
    if later:
        evaluated = [run for run in line if any(find_row(run, attack) for attack in later)]
        cells["evaluations"] = links(evaluated, "best-evaluation.json")
    return cells


def later_result(line, attack):
    """'67.6 +- 1.4, n 200 to 500, seed 0 1': n and seeds where they are not those of the line."""
    found = {run["seed"]: find_row(run, attack) for run in line if find_row(run, attack)}
    if not found:
        return ""
    cell = spread([100 * row["accuracy"] for row in found.values()])
    sizes = sorted({row["n"] for row in found.values()})
    if sizes != [line[0]["n_test"]]:
        cell += f", n {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
    if len(found) < len(line):
        cell += ", seed " + " ".join(str(seed) for seed in found)
    return cell


def links(runs, *files):
    """A link for each run, by its seed, to the first of these files that is there, or the last."""
    found = []
    for run in runs:
        file = next((file for file in files if (Path(run["folder"]) / file).exists()), files[-1])
        found.append(f"[{run['seed']}]({run['folder']}/{file})")
    return " ".join(found)


def spread(values):
    """'mean +- standard deviation', or the one value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return f"{mean:.1f} +- {variance ** 0.5:.1f}"


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
        train.say("| " + " | ".join(str(cell) for cell in row.values()) + " |")
