# SPDX-License-Identifier: MIT
"""README and results/README.md say what the runs and logs in results/ say, number by number."""
import csv
import json
import math
import re
from itertools import combinations

import pytest

import train
from lab import tables
from lab.test_house import findings
from test_all import HERE


pytestmark = pytest.mark.usefixtures("results")


def prose():
    """The findings in one line."""
    return " ".join(findings().split())


def cell_of(family, run, attack):
    """Mean over seeds, in per cent, of Best under an attack, and (how many), if not three."""
    clean, pgd, auto = outcomes((family,), run)
    found = {"clean": clean, "pgd-10": pgd, "aa": auto}[attack]
    if not found:
        return "not run"
    return f"{mean(found):.1f}" + (f" ({len(found)})" if len(found) < 3 else "")


# README's one table: model -> the folder in results/ of its runs on MNIST with a constant step,
# and the runs' name there and in the folders of the falling step and of CIFAR-10.
ROWS = {"S4": ("mnist-eps0.3-long", "s4"), "S4 + MLP": ("mnist-eps0.3-long", "s4-mlp"),
        "S4 + GLU": ("mnist-step-constant", "s4-glu"),
        "S4 + GLU with ReLU": ("mnist-step-constant", "s4-glu_relu"),
        "S4 + AdS": ("mnist-eps0.3-long", "s4-ads"),
        "Mamba": ("mnist-step-constant", "mamba"), "Mega": ("mnist-eps0.3-long", "attention"),
        "CNN": ("mnist-baselines", "cnn")}


def row_of(name):
    """The cells of a model's row."""
    family, run = ROWS[name]
    cifar10 = "cifar10-baselines" if family == "mnist-baselines" else "cifar10-patch4"
    sizes = []
    for place in (family, "mnist-step-falling", cifar10):
        log = HERE / "results" / place / f"{run}-seed0" / "log.txt"
        if log.exists():
            sizes += re.findall(r": ([\d,]+) trainable", log.read_text())
    return [" / ".join(dict.fromkeys(sizes)),
            *(cell_of(family, run, a) for a in ("clean", "pgd-10", "aa")),
            *(cell_of(place, run, "aa") for place in ("mnist-step-falling", "mnist-all")),
            *(cell_of(cifar10, run, a) for a in ("clean", "pgd-10", "aa")),
            cell_of("cifar10-step-falling", run, "aa")]


def test_the_table_of_the_readme_is_that_of_the_runs():
    findings()
    text = (HERE / "README.md").read_text()
    found = re.findall(r"^\| ([\w +]+) \| (\d[\d, /]+ \| .*) \|$", text, re.M)
    assert [(name, cells.split(" | ")) for name, cells in found] == [
        (name, row_of(name)) for name in ROWS]


# (h) of the findings: what stands in the middle of the block -> the name of its runs.
MIDDLES = {"nothing": "s4", "nothing, 102 channels": "s4-wide", "activation alone, ReLU": "s4-relu",
           "activation alone, GELU": "s4-gelu", "MLP, ReLU": "s4-mlp_relu",
           "MLP, GELU": "s4-mlp", "GLU, ReLU": "s4-glu_relu", "GLU, GELU": "s4-glu",
           "scale alone, ReLU": "s4-scale", "AdS, ReLU": "s4-ads", "AdS, GELU": "s4-ads_gelu",
           "Mamba, SiLU": "mamba", "Mega, SiLU": "attention"}
CONSTANT = ("mnist-step-constant", "mnist-eps0.3-long")
# The steps of the training attack -> the folders of its runs.
SCHEDULES = {"ten of .04 (the paper's)": ("mnist-eps0.3-steps10",), "five of .10": CONSTANT,
             ".04, .08, .12, .16, .20": ("mnist-step-rising",),
             ".30, then four of .05": ("mnist-step-first",),
             ".20, .16, .12, .08, .04": ("mnist-step-falling",)}


def outcomes(families, run):
    """Of a run's seeds, by number: [clean], [PGD-10], [AutoAttack] in per cent."""
    clean, pgd, auto = [], [], []
    for family in families:
        for folder in sorted((HERE / "results" / family).glob(f"{run}-seed[0-9]")):
            best = json.loads((folder / "result.json").read_text())["Best"]
            rows = json.loads((folder / "best-evaluation.json").read_text())["rows"]
            rows = [row for row in rows if row["attack"] == "aa"]
            clean.append(100 * best["clean"])
            pgd.append(100 * best["pgd-10"])
            auto += [100 * max(rows, key=lambda row: row["n"])["accuracy"]] if rows else []
    return clean, pgd, auto


def mean(numbers):
    """As the tables round it: statistics.mean breaks ties otherwise."""
    return sum(numbers) / len(numbers)


def middle_row(run):
    """Clean / PGD-10, mean over seeds, and AutoAttack of each seed; constant, falling steps."""
    cells = []
    for families in (CONSTANT, ("mnist-step-falling",)):
        clean, pgd, auto = outcomes(families, run)
        cells += [f"{mean(clean):.1f} / {mean(pgd):.1f}" if clean else "not run",
                  ", ".join(f"{accuracy:.1f}" for accuracy in auto) or "not run"]
    return cells


def schedule_row(families):
    """Clean, mean over seeds, and AutoAttack of each seed, of GLU, MLP and AdS."""
    cells = []
    for run in ("s4-glu", "s4-mlp", "s4-ads"):
        clean, _, auto = outcomes(families, run)
        cells += [f"{mean(clean):.1f}" if clean else "not run",
                  ", ".join(f"{accuracy:.1f}" for accuracy in auto) or "not run"]
    return cells


def test_the_tables_of_steps_are_those_of_the_runs():
    rows = re.findall(r"^\| ([\w ,]+) \| \d+,\d{3} \| (.*) \|$", findings(), re.M)
    found = {name: cells.split(" | ") for name, cells in rows if name in MIDDLES}
    assert found == {name: middle_row(run) for name, run in MIDDLES.items()}
    rows = re.findall(r"^\| ([\w ,.()']+) \| (.*) \|$", findings(), re.M)
    found = {name: cells.split(" | ") for name, cells in rows if name in SCHEDULES}
    assert found == {name: schedule_row(families) for name, families in SCHEDULES.items()}


def span(accuracies):
    """'66.0 to 74.5'."""
    return f"{min(accuracies):.1f} to {max(accuracies):.1f}"


def test_the_spans_in_the_findings_are_those_of_the_runs():
    text = prose()
    falling = {name: outcomes(("mnist-step-falling",), run)[2] for name, run in MIDDLES.items()}
    wide = sum((left for name, left in falling.items() if name[:3] in ("MLP", "GLU", "sca", "AdS")),
               [])
    assert f"MLP, GLU, scale and AdS keep {span(wide)} % under AutoAttack" in text
    glu, mlp = (outcomes(CONSTANT, run)[2] for run in ("s4-glu", "s4-mlp"))
    assert f"with a GELU, GLU keeps {span(glu)}, the MLP {span(mlp)}." in text
    assert f"with GELU {span(glu)}. " in text
    ads = sum((outcomes(families, "s4-ads")[2] for families in SCHEDULES.values()), [])
    assert f"AdS with its ReLU keeps {span(ads)} with each schedule tried." in text
    kept = {name: mean(left) for name, left in falling.items()}
    relu = kept["activation alone, ReLU"]
    more = [kept[f"{name}, ReLU"] - relu for name in ("MLP", "scale alone", "AdS", "GLU")]
    said = "With a ReLU and weights the MLP adds {:.1f} to that, the scale {:.1f}, AdS {:.1f}, GLU"
    assert (f"a ReLU alone is worth {relu - kept['nothing']:.1f} points over nothing. {said} "
            "{:.1f}.").format(*more) in text
    equal = [mean(outcomes(CONSTANT, run)[2]) for run in ("s4-scale", "s4-ads")]
    assert "; after equal steps it keeps {:.1f}, AdS {:.1f}.".format(*equal) in text


# (h) of the findings, equal steps: the names of the runs with a GELU, in the logs with flat GELU,
# and of the runs with a ReLU.
DIP = {"GLU": ("s4-glu", "glu", "s4-glu_relu"), "MLP": ("s4-mlp", "mlp", "s4-mlp_relu"),
       "activation alone": ("s4-gelu", "gelu", "s4-relu"),
       "AdS": ("s4-ads_gelu", "ads", "s4-ads"),
       "Mega (SiLU)": ("attention", "attention", "attention_relu")}


def dip_row(name):
    """AutoAttack of each seed: with GELU, with flat GELU, with ReLU."""
    gelu, flat, relu = DIP[name]
    logs = sorted((HERE / "results" / "analysis").glob(f"flat-{flat}-seed?.txt"))
    kept = [float(re.search(r"^aa +([\d.]+)%", log.read_text(), re.M)[1]) for log in logs]
    columns = outcomes(CONSTANT, gelu)[2], kept, outcomes(CONSTANT, relu)[2]
    return [", ".join(f"{accuracy:.1f}" for accuracy in column) or "not run" for column in columns]


def test_the_table_of_the_dip_is_that_of_the_runs():
    for name in DIP:
        assert f"| {name} | {' | '.join(dip_row(name))} |" in findings(), name
    relu = span(outcomes(CONSTANT, "s4-ads")[2])
    assert f"AdS with a GELU keeps {dip_row('AdS')[0]}, with a ReLU {relu};" in prose()


def test_the_findings_on_autoattack_in_the_readme_are_those_of_the_runs():
    text = " ".join((HERE / "README.md").read_text().split())
    constant, falling = ({name: float(row_of(name)[cell].split()[0]) for name in ROWS
                          if row_of(name)[cell] != "not run"} for cell in (3, 4))
    kept = [float(cell) for cells in dip_row("GLU")[1:] for cell in cells.split(", ")]
    assert f"GLU keeps {span(kept)} %" in prose()
    relu = "S4 + GLU with ReLU"
    assert f"leaves it {falling['S4 + AdS']} %, S4 {falling['S4']}, an" in text
    assert f"leaves it {constant['S4 + GLU']} %, with a ReLU {constant[relu]}." in text
    assert max(falling, key=falling.get) == "CNN"
    assert f"A CNN leads:** after falling steps {falling['CNN']} %" in text
    assert (f"AutoAttack leaves a GLU {falling['S4 + GLU']} %, with a ReLU {falling[relu]}, "
            f"an MLP {falling['S4 + MLP']}, AdS {falling['S4 + AdS']} |") in text
    glu, ads, mlp = (f"{100 * mean(sum(on_500_images(run), [])):.1f}"
                     for run in ("s4-glu_relu", "s4-ads", "s4-mlp_relu"))
    assert f"On all 500 it keeps {glu}, AdS {ads}:" in prose()
    assert (f"of 500 images a GLU with a ReLU keeps {glu} %, AdS {ads}, an MLP with a ReLU {mlp}, "
            "after falling steps") in text
    cnn = [steps["CNN"] - steps[relu] for steps in (falling, constant)]
    more = [outcomes(("mnist-all",), "cnn")[2][0] - outcomes(("mnist-all",), run)[2][0]
            for run in ("s4-ads", "s4-glu_relu")]
    assert (f"S4 + GLU with ReLU by {math.floor(cnn[0])} to {math.ceil(cnn[1])} (with all of "
            "MNIST, one seed, by {:.1f} and {:.1f}).").format(*more) in prose()
    mega = differences_of_falling_steps("s4-seed?")["attention", "aa", 200]
    lead = mega["difference"]
    assert f"S4 after equal steps, {float(lead):.0f} points more after falling ones," in text
    said = f"is level under AutoAttack ({constant['Mega']}, {constant['S4']}; n = 200)."
    assert (f"{said} After falling steps it leads by {lead} under AutoAttack "
            f"({mega['95 % interval']}; {falling['Mega']}, {falling['S4']}).") in prose()


# (h) of the findings, PGD-50 with another derivative of GELU: a model -> the names of its runs.
SLOPES = {"GLU after equal steps": "mnist-step-constant/s4-glu-seed",
          "GLU after ten of .04": "mnist-eps0.3-steps10/s4-glu-seed",
          "GLU after falling steps": "mnist-step-falling/s4-glu-seed",
          "GLU with ReLU after equal steps": "mnist-step-constant/s4-glu_relu-seed",
          "AdS with GELU after equal steps": "mnist-step-constant/s4-ads_gelu-seed",
          "Mamba after equal steps": "mnist-step-constant/mamba-seed",
          "Mamba after falling steps": "mnist-step-falling/mamba-seed"}


def left_through_another_slope(run):
    """Of each seed: clean, then PGD-50 of eps/3 and from 2 eps: as it is, attack, slope, left."""
    log = (HERE / "results" / "analysis" / "flat-attack.txt").read_text()
    lines = re.findall(rf"^ *([\d. ]+) results/{run}\d/best.pt$", log, re.M)
    return [line.split() for line in lines]


def slope_row(name):
    columns = list(zip(*left_through_another_slope(SLOPES[name])))
    return [", ".join(columns[k]) for k in (1, 3, 4)]


def test_the_table_of_slopes_is_that_of_its_log():
    for name in SLOPES:
        assert f"| {name} | {' | '.join(slope_row(name))} |" in findings(), name
    long = [float(row[7]) for row in left_through_another_slope(SLOPES["GLU after equal steps"])]
    plain = [float(row[5]) for row in left_through_another_slope(SLOPES["GLU after equal steps"])]
    assert f"PGD-50 leaves the first row {min(plain)} to {max(plain)}, so that" in prose()
    assert f"with the changed derivative it leaves {min(long)} to {max(long)}, " in prose()
    log = (HERE / "results" / "analysis" / "flat-attention-seed0.txt").read_text()
    ten, auto = (re.search(rf"^{name} +([\d.]+)0% .* 200 ", log, re.M)[1]
                 for name in ("pgd-10", "aa"))
    assert f"PGD-10 leaves {ten}, AutoAttack {auto} (n = 200" in prose()


def test_what_mamba_keeps_after_equal_and_after_falling_steps_is_what_its_runs_and_logs_say():
    families = ("mnist-step-constant", "mnist-step-falling")
    folders = [f"{family}/{path.name}" for family in families
               for path in sorted((HERE / "results" / family).glob("mamba-seed?"))]
    row = differences(*folders)["mamba", "aa", 200]
    _, robust, auto = zip(*(outcomes((family,), "mamba") for family in families))
    each = [", ".join(f"{accuracy:.1f}" for accuracy in accuracies) for accuracies in auto]
    equal, falling = (f"{mean(accuracies):.1f}" for accuracies in auto)
    text = prose()
    assert (f"AutoAttack leaves Mamba {each[0]} %, after falling ones {each[1]}: "
            f"{row['difference']} points more ({row['95 % interval']}; n = 200;") in text
    ten = [f"{mean(accuracies):.1f}" for accuracies in robust]
    assert (f"Mamba keeps {ten[0]} under PGD-10 and {equal} under AutoAttack after equal steps, "
            f"{ten[1]} and {falling} after falling ones") in text
    paths = [HERE / "results" / folder / "best-evaluation.json" for folder in folders]
    ten = [100 * row["accuracy"] for path in paths for row in json.loads(path.read_text())["rows"]
           if (row["attack"], row["n"]) == ("pgd-10", 200)]
    said = "PGD-10 leaves {:.1f} and {:.1f} of these images, mean over seeds."
    assert said.format(mean(ten[:3]), mean(ten[3:])) in text
    broken = []
    for steps in ("equal", "falling"):
        plain, other, _ = (map(float, cells.split(", "))
                           for cells in slope_row(f"Mamba after {steps} steps"))
        broken.append([a - b for a, b in zip(plain, other, strict=True)])
    said = "breaks {:.1f}, {:.1f}, {:.1f} points more than plain PGD-50 after equal steps,"
    assert (f"{said} {min(broken[1])} to {max(broken[1])} after falling ones."
            ).format(*broken[0]) in text


def test_the_runs_whose_attack_alone_is_changed_keep_what_their_logs_say():
    text = prose()
    kept = {}
    for form in ("attack", "slope"):
        log = (HERE / "results" / "analysis" / f"flat-glu-{form}-seed0.txt").read_text()
        own, = re.findall(r"Best \(epoch \d+\) +\S+ +([\d.]+)", log)
        ten, = re.findall(r"^pgd-10 +([\d.]+)% .* 2,000 ", log, re.M)
        auto, = re.findall(r"^aa +([\d.]+)% ", log, re.M)
        lost, = re.findall(r"Diff +\S+ +([\d.]+)", log)
        kept[form] = [f"{float(own):.1f}", f"{float(ten):g}", f"{float(auto):.1f}", float(lost)]
    own, ten, auto, lost = kept["attack"]
    assert (f"GLU keeps {own} % on that attack's images, {ten} under its own PGD-10 (n = 2,000), "
            f"{auto} under AutoAttack") in text
    own, ten, auto, also_lost = kept["slope"]
    assert f"sees another GELU {lost + 1e-9:.1f} and {also_lost + 1e-9:.1f} (see" in text
    assert f"derivative of flat GELU alone, GLU keeps {own}, {ten} and {auto} (" in text


def test_the_lead_of_glu_over_the_mlp_with_relu_is_the_one_that_the_table_prints():
    said = []
    for family, n in ("mnist-step-constant", 200), ("evaluation/falling-500", 500):
        row = differences(*(f"{family}/s4-{kind}-seed{seed}" for kind in ("mlp_relu", "glu_relu")
                            for seed in range(3)))["s4 + glu-relu", "aa", n]
        assert (row["minus"], row["seeds"]) == ("s4 + mlp-relu", "0 1 2")
        said += [row["difference"], row["95 % interval"]]
    assert ("GLU leads the MLP by {} points after equal steps ({}; n = 200), by {} after falling "
            "ones ({}; n = 500).").format(*said) in prose()
    assert f"GLU's product of two maps does gain, {said[2]} points over that MLP." in prose()


def test_what_gelu_costs_glu_after_falling_steps_is_what_the_table_prints():
    row = differences(*(f"evaluation/falling-500/s4-{kind}-seed{seed}"
                        for kind in ("glu", "glu_relu")
                        for seed in range(3)))["s4 + glu-relu", "aa", 500]
    assert row["minus"] == "s4 + glu"
    assert (f"with a GELU keeps {row['difference'].lstrip('-')} points less than with a ReLU "
            f"({row['95 % interval']}; n = 500), though more under PGD-10 "
            "({:.1f} and {:.1f}; n = 2,000)".format(*(
                mean(outcomes(("mnist-step-falling",), run)[1])
                for run in ("s4-glu", "s4-glu_relu")))) in prose()


# The steps of the training attack on CIFAR-10 -> the folder of its runs.
CIFAR10_SCHEDULES = {"five of 2/255": "cifar10-patch4",
                     "4/255, 3.2/255, 2.4/255, 1.6/255, 0.8/255": "cifar10-step-falling"}


def cifar10_schedule_row(family):
    """AutoAttack of each seed, of the columns of the table."""
    runs = ("s4", "s4-mlp", "s4-glu", "s4-ads", "mamba", "attention")
    return [", ".join(f"{accuracy:.1f}" for accuracy in outcomes((family,), run)[2]) or "not run"
            for run in runs]


def test_the_table_of_steps_on_cifar10_is_that_of_the_runs():
    for name, family in CIFAR10_SCHEDULES.items():
        row = f"| {name} | {' | '.join(cifar10_schedule_row(family))} |"
        assert row in findings(), row


# (c) of the findings, CIFAR-10 with falling steps -> the name of the runs.
ALL_IMAGES = {"S4": "s4", "S4 + MLP": "s4-mlp", "S4 + GLU": "s4-glu", "S4 + AdS": "s4-ads",
              "Mamba": "mamba", "Mega": "attention"}


def all_images_row(run):
    """Of each seed: clean on 10,000 test images, PGD-10 on the first 1,000 and on 10,000."""
    cells = {(10000, "clean"): [], (1000, "pgd-10"): [], (10000, "pgd-10"): []}
    for path in sorted((HERE / "results" / "cifar10-step-falling").glob(f"{run}-seed?")):
        rows = json.loads((path / "best-evaluation.json").read_text())["rows"]
        left = {(row["n"], row["attack"]): row["accuracy"] for row in rows}
        for key, found in cells.items():
            found.append(f"{100 * left[key]:.1f}")
    return [", ".join(found) for found in cells.values()]


def test_the_table_of_all_images_is_that_of_the_runs():
    for name, run in ALL_IMAGES.items():
        row = f"| {name} | {' | '.join(all_images_row(run))} |"
        assert row in findings(), row


def differences(*folders):
    """{(model, attack, n): row} as `--table` prints them, of runs in results/."""
    runs = [tables.read_run(str(HERE / "results" / folder)) for folder in folders]
    tables.name_runs(runs)
    return {(row["model"], row["attack"], row["n"]): row
            for row in tables.compare(tables.group(runs))}


def test_the_lead_of_ads_on_cifar10_is_the_one_that_the_table_prints():
    rows = differences(*(f"cifar10-step-falling/{run}-seed{seed}"
                         for run in ("s4", "s4-ads") for seed in range(2)))
    text = prose()
    row = rows["s4 + AdS relu", "pgd-10", 10000]
    assert row["minus"] == "s4"
    said = f"by {row['difference']} points (two seeds; 95 % interval {row['95 % interval']};"
    assert said in text
    assert f"(+{row['difference']}; falling steps, 2 seeds)" in (HERE / "README.md").read_text()
    rows = differences(*(f"cifar10-step-falling/{run}-seed0" for run in ("s4", "s4-ads")))
    ten, apgd = (rows["s4 + AdS relu", attack, 2000] for attack in ("pgd-10", "apgd-t"))
    assert (f"AdS leads by {ten['difference']} under PGD-10 ({ten['95 % interval']}), "
            f"{apgd['difference']} under APGD-T ({apgd['95 % interval']}).") in text


def test_the_gain_of_falling_steps_in_trades_is_the_one_that_the_table_prints():
    rows = differences(*(f"mnist-trades-steps/s4-glu-{steps}-seed0"
                         for steps in ("constant", "falling")))
    row = rows["s4 + glu", "aa", 200]
    said = f"{row['difference']} points more ({row['95 % interval']};"
    assert row["minus"] == "s4 + glu None" and said in prose()


def test_best_and_last_of_the_runs_of_steps_lie_as_close_as_the_findings_say():
    """All but the rising run, which the findings name."""
    gaps, epochs = [], []
    for family in {name for names in SCHEDULES.values() for name in names} - {"mnist-step-rising"}:
        for path in (HERE / "results" / family).glob("*/result.json"):
            result = json.loads(path.read_text())
            gaps.append(abs(100 * result["Diff"]["pgd-10"]))
            epochs.append(result["Best"]["epoch"])
    text = prose()
    assert f"Best stands at epoch {min(epochs)} of 40 or later" in text
    assert f"Last lies within {max(gaps):.1f} points of it under PGD-10" in text


def test_the_table_of_the_default_is_that_of_its_logs():
    rows = re.findall(r"^\| \w+ \| (.*) \| (\[PGD-AT\]\(demo/.*) \|$", findings(), re.M)
    assert len(rows) == 5
    for cells, links in rows:
        logs = [(HERE / "results" / log).read_text() for log in re.findall(r"\((\S+)\)", links)]
        best = [re.search(r"Best \(epoch \d+\) +(\S+) +(\S+)", log).groups() for log in logs]
        assert cells.split(" | ") == [f"{float(c):.1f} / {float(r):.1f}" for c, r in best]
        assert float(best[2][1]) <= 1                       # standard training can be broken


def test_the_permutation_test_of_the_findings_is_that_of_the_runs():
    """All ways to call three of the six AutoAttack accuracies of each recipe those of AdS."""
    found, sums = 0, [0]
    for families in (CONSTANT, ("mnist-eps0.3-steps10",)):
        ads, mlp = (outcomes(families, run)[2] for run in ("s4-ads", "s4-mlp"))
        assert len(ads) == len(mlp) == 3
        found += sum(ads) - sum(mlp)
        leads = [2 * sum(three) - sum(ads + mlp) for three in combinations(ads + mlp, 3)]
        sums = [one + other for one in sums for other in leads]
    p = sum(abs(one) > abs(found) - 1e-9 for one in sums) / len(sums)
    assert (f"p = {p:.3f}".replace("0.", ".") + ", six runs against six, permuted within each "
            "recipe") in prose()


def test_the_table_of_robust_overfitting_is_that_of_the_runs():
    rows = re.findall(r"^\| (\w[\w +]*) \| ([\d,]+) \| ([\d.]+ / [\d.]+) \| ([\d.]+) \| ([\d.]+) "
                      r"\| (-?[\d.]+) \| (\d+) \|$", findings(), re.M)
    names = {"S4": "s4", "S4 + MLP": "s4-mlp", "S4 + AdS": "s4-ads", "Mega": "attention",
             "Mamba": "mamba"}
    lost, fit = {}, {}
    assert len(rows) == len(list((HERE / "results").glob("cifar10-overfit-*/*/result.json"))) > 3
    for name, size, fitted, *cells, n in rows:
        path = HERE / "results" / f"cifar10-overfit-{n}" / f"{names[name]}-seed0" / "result.json"
        result = json.loads(path.read_text())
        last = list(csv.DictReader(path.with_name("log.csv").open()))[-1]
        assert int(size.replace(",", "")) == result["parameters"]
        assert fitted == " / ".join(f"{100 * float(last[f'train_{a}']):.1f}" for a in train.ROW)
        assert cells == [f"{100 * result[row]['pgd-10']:.1f}" for row in ("Best", "Last", "Diff")]
        lost[name, n] = cells[2]
        fit[name, n] = f"{float(fitted.split()[2]):.0f} %"
    said = "Mega loses {} points of PGD-10 from Best to Last; but Mamba {}, S4 + AdS {} |"
    assert said.format(*(lost[name, "500"] for name in ("Mega", "Mamba", "S4 + AdS"))) in (
        HERE / "README.md").read_text()
    mamba, mlp, mega = ((name, "500") for name in ("Mamba", "S4 + MLP", "Mega"))
    assert fit[mamba] == fit[mlp]
    log = HERE / "results" / "cifar10-overfit-500" / "attention-seed0" / "log.csv"
    held_out = {row["epoch"]: 100 * float(row["val_pgd-10"] or 0)
                for row in csv.DictReader(log.open())}
    assert (f"At {fit[mlp]} on their training images Mamba loses {lost[mamba]} points and the MLP "
            f"{lost[mlp]}. Mega loses {lost[mega]} at {fit[mega]}. Its held-out accuracy falls "
            f"from {held_out['100']:.1f} to {held_out['200']:.1f} between") in prose()


def differences_of_falling_steps(s4="s4-*seed[0-2]"):
    falling = HERE / "results" / "mnist-step-falling"
    folders = [*sorted(falling.glob(s4)), *sorted(falling.glob("attention-seed?"))]
    return differences(*(folder for folder in folders if "wide" not in folder.name))


def on_500_images(name):
    """Of each seed: [bool], which images survive AutoAttack; falling steps."""
    folder = HERE / "results" / "evaluation" / "falling-500"
    runs = [tables.read_run(str(folder / f"{name}-seed{seed}")) for seed in range(3)]
    return [run["outcomes"]["aa", 500, "10"] for run in runs]


def test_what_square_takes_in_the_findings_is_what_the_evaluations_say():
    """The images, in points, that the three white-box attacks leave and Square takes."""
    gaps = {}
    for path in (HERE / "results").glob("*/*/best-evaluation.json"):
        left = {(row["n"], row["attack"]): row["accuracy"]
                for row in json.loads(path.read_text())["rows"]}
        for n in [n for n, attack in left if attack == "aa: square"]:
            white = min(left[n, f"aa: {attack}"] for attack in ("apgd-ce", "apgd-t", "fab-t"))
            run = "/".join(path.parts[-3:-1])
            gaps[run] = round(100 * (white - left[n, "aa: square"]), 1)
    text = prose()
    equal = "mnist-(eps0.3-long|eps0.3-steps10|step-constant|lr)/"
    for name, run in {"points of GLU": "s4-glu(-0.12)?", "of the MLP with a GELU": "s4-mlp",
                      "of GELU alone": "s4-gelu", "of Mega": "attention", "of Mamba": "mamba",
                      "of S4 (23": "s4", "of AdS,": "s4-ads",
                      "of an S4 of 102 channels": "s4-wide",
                      "of AdS with a GELU": "s4-ads_gelu"}.items():
        found = [gap for key, gap in gaps.items()
                 if re.fullmatch(rf"{equal}{run}(-lr1e-2)?-seed\d", key)]
        assert f"{min(found):g} to {max(found):g} {name}" in text, name
    assert gaps["mnist-lr/s4-lr3e-2-seed0"] == 23
    wide = gaps["mnist-step-constant/s4-wide-seed2"]
    assert f"Square takes {wide:.1f} points of it that APGD and FAB leave;" in text
    falling = [gap for key, gap in gaps.items() if key.startswith("mnist-step-falling/")]
    last, mamba = (gaps[f"mnist-all/{run}-seed0"] for run in ("s4-glu", "mamba"))
    assert (f"at most {max(falling):g} of any (with all of MNIST {last:g} of a GLU with GELU, "
            f"{mamba:g} of Mamba).") in text and f"Square takes {last:g} points of it" in text
    assert f"({gaps['mnist-all/s4-glu-constant-seed0']:g} with all of MNIST, where" in text
    none = sum(gap == 0 for key, gap in gaps.items() if key.startswith("mnist"))
    assert f"in all but {none} of those on MNIST that our tables hold" in text
    assert not any(gap for key, gap in gaps.items() if key.startswith("cifar10"))


def test_the_accuracies_under_attack_in_the_findings_are_those_of_the_logs():
    table = re.search(r"^(\| model \|.*\| aa \|.*)\n\|[-|]+\n((?:\|.*\n)+)", findings(), re.M)
    heads, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                    for line in (table[1], *table[2].splitlines())]
    logs = [[HERE / "results" / log for log in re.findall(r"\((evaluation/\S+)\)", row[-1])]
            for row in rows]                                            # of a row's seeds
    assert all(logs)
    for row, some in zip(rows, logs):
        found = [{name: (f"{float(value):.1f}", n) for name, value, n in re.findall(
            r"^(\S+) +([\d.]+)% +[\d.]+% - +[\d.]+% +([\d,]+) ", log.read_text(), re.M)}
            for log in some]
        assert row[heads.index("n")] == ", ".join(names["clean"][1] for names in found)
        for head, cell in list(zip(heads, row))[heads.index("n") + 1:-1]:
            expected = [names[head][0] for names in found if head in names]
            assert cell == ", ".join(expected) and len(expected) in (0, len(some)), (some, head)


def test_the_findings_say_of_all_runs_how_far_the_published_attack_lies_above_pgd_10():
    said = re.findall(r"^\| (.+) \| (\d+) \| (\S+) to (\S+) \|$", findings(), re.M)
    logs = dict(re.findall(r"\[([\w.-]+/[\w.-]+)\]\((evaluation/\S+\.txt)\)", findings()))
    gaps, others, apart = {}, [], {True: [], False: []}     # apart: all of MNIST, and the rest
    plain = []                                              # MNIST, eps 0.3, PGD-AT alone
    for path in (HERE / "results").glob("*/*/result.json"):
        result = json.loads(path.read_text())
        c, run = result["config"], "/".join(path.parts[-3:-1])
        if run in logs:                                     # its checkpoint is gone
            text = (HERE / "results" / logs[run]).read_text()
            left = dict(re.findall(r"^(pgd-\S+) +([\d.]+)%", text, re.M))
            assert f"/{path.parts[-2]}/best.pt" in text
            others.append(float(left["pgd-official"]) - float(left["pgd-10"]))
            plain += others[-1:] if (c["eps"], c["method"]) == (0.3, "pgd") else []
            continue
        kept = json.loads(path.with_name("best-evaluation.json").read_text())
        at = {(r["n"], r["attack"]): 100 * r["accuracy"] for r in kept["rows"]
              if (r["eps"], r["alpha"]) == (c["eps"], c["alpha"])}
        n = max(n for n, attack in at if attack == "pgd-official")
        assert kept["epoch"] == result["Best"]["epoch"] and n >= 500, path
        kind = "standard" if c["method"] == "standard" else "adversarial"
        name = f"{c['dataset']}, eps {train.show(c['eps'])}, {kind} training"
        gaps.setdefault(name, []).append(at[n, "pgd-official"] - at[n, "pgd-10"])
        if name == "mnist, eps 0.3, adversarial training":
            apart[run.startswith("mnist-all/")].append(gaps[name][-1])
            plain += gaps[name][-1:] if c["method"] == "pgd" else []
    assert len(said) > 4 and sorted(said) == sorted(
        (name, str(len(found)), *(f"{f(found) + 0.0:.1f}" for f in (min, max)))
        for name, found in gaps.items())
    text = prose()
    assert f"Best of {sum(map(len, gaps.values()))} trained models" in text and len(others) == 9
    assert f"lies {min(others):.1f} to {max(others):.1f} points above" in text
    least, (constant, second, *_) = min(apart[True]), sorted(apart[False])
    assert constant < 1e-9 and (f"the gap is {least:.1f} points or more with all of MNIST, else "
                                f"{second:.1f} or more, but for the one model") in text
    assert f"After PGD-AT alone it is {max(plain):.1f} points at most." in text
    assert (f"leaves {sorted(plain)[1]:.0f} to {max(plain):.0f} points more than PGD-10"
            in (HERE / "README.md").read_text())
    most = max(apart[False] + others)
    assert f"by {least:.0f} to {most:.0f} points at eps 0.3 (one constant prediction apart)" in text
