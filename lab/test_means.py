# SPDX-License-Identifier: MIT
"""Further tables of results/README.md say what the runs and logs in results/ say."""
import json
import math
import re

import pytest

import train
from lab import evaluate
from lab.test_findings import (CONSTANT, cell_of, differences, differences_of_falling_steps, mean,
                               on_500_images, outcomes, prose, span)
from lab.test_house import findings
from test_all import HERE


pytestmark = pytest.mark.usefixtures("results")


def means(run, row="Best"):
    """(clean, PGD-10) of results/RUN-seedN, mean over seeds, in per cent; and how many seeds."""
    rows = [json.loads((folder / "result.json").read_text())[row]
            for folder in sorted((HERE / "results").glob(f"{run}-seed[0-9]"))]
    return [mean([100 * row[attack] for row in rows]) for attack in train.ROW], len(rows)


def cell(run, row="Best"):
    (clean, robust), _ = means(run, row)
    return f"{clean:.1f} / {robust:.1f}"


# (a): model -> the run by PGD-AT; the others lie in mnist-methods, with the method in their name.
METHODS = {"S4": "mnist-eps0.3/s4", "DSS": "mnist-methods/dss", "S5": "mnist-methods/s5",
           "Mamba": "mnist-methods/mamba", "Mega": "mnist-eps0.3/attention"}


@pytest.mark.parametrize("name", METHODS)
def test_a_model_s_row_of_three_methods_is_that_of_its_runs(name):
    run = METHODS[name]
    other = f"mnist-methods/{run.rpartition('/')[2]}"
    runs = [f"{other}-standard", run, f"{other}-trades"]
    assert [means(run)[1] for run in runs] == [3, 3, 3]
    cells = [cell(run, "Last") for run in runs]
    assert re.search(rf"^\| {name} \| [\d,]+ \| {' . '.join(cells)} \|$", findings(), re.M)


def test_what_adversarial_training_gives_the_pure_s4_in_the_readme_is_what_its_runs_say():
    (before, none), _ = means("mnist-methods/s4-standard", "Last")
    (clean, robust), _ = means("mnist-eps0.3/s4", "Last")
    ads = means("mnist-eps0.3/s4-ads", "Last")[0][1]
    said = "S4 goes from {:.0f} to {:.0f} % under PGD-10, and loses {:.0f} points clean; S4 + AdS"
    assert f"{said} keeps {{:.0f}} |".format(none, robust, before - clean, ads) in (
        HERE / "README.md").read_text()


# (c): conditions -> the folder of the runs.
GAINS = {"MNIST, eps 0.3, 40 epochs of PGD-5 of 0.1": "mnist-eps0.3-long",
         "the same, PGD-10 of 0.04": "mnist-eps0.3-steps10",
         "MNIST, eps 0.3, 16 epochs of PGD-5 of 0.1": "mnist-eps0.3",
         "MNIST, eps 0.1, 16 epochs of PGD-5 of 0.03": "mnist-eps0.1",
         "CIFAR-10, 64 tokens, 25 epochs": "cifar10-patch4",
         "CIFAR-10, 1,024 tokens, 5 epochs": "cifar10-full",
         "Tiny-ImageNet, ten classes, 25 epochs, n = 500": "tiny-imagenet-10"}


@pytest.mark.parametrize("name", GAINS)
def test_a_row_of_gains_over_s4_is_that_of_its_runs(name):
    base, seeds = means(f"{GAINS[name]}/s4")
    cells = []
    for kind in ("ads", "mlp", "gelu"):
        if not list((HERE / "results").glob(f"{GAINS[name]}/s4-{kind}-seed?")):
            cells.append("not run")
            continue
        found, n = means(f"{GAINS[name]}/s4-{kind}")
        assert n == seeds
        cells.append(" / ".join(f"{a - b:+.1f}" for a, b in zip(found, base)))
    assert f"| {name} | {seeds} | {' | '.join(cells)} |" in findings()


def test_by_how_much_the_mlp_gains_less_or_more_than_ads_is_what_their_runs_say():
    less, more = (means(f"{folder}/s4-ads")[0][1] - means(f"{folder}/s4-mlp")[0][1]
                  for folder in ("mnist-eps0.1", "mnist-eps0.3"))
    said = ("After 16 epochs on MNIST it gains {:.0f} points less at eps 0.1, "
            "{:.0f} more at eps 0.3.")
    assert said.format(less, -more) in prose()


# (d), (e): the first cells of a row -> the run.
PARTS = {"AdS, ReLU": "mnist-eps0.3/s4-ads", "its scale alone": "mnist-methods/s4-scale",
         "its shift alone": "mnist-methods/s4-shift", "AdS, tanh": "mnist-methods/s4-tanh",
         "AdS, sigmoid": "mnist-methods/s4-sigmoid"}
CHEAP = {"S4 + AdS | PGD-AT": "mnist-eps0.3/s4-ads",
         "S4 + AdS | FreeAT": "mnist-methods/s4-ads-free",
         "S4 + AdS | YOPO-5-3": "mnist-methods/s4-ads-yopo", "S4 | PGD-AT": "mnist-eps0.3/s4",
         "S4 | FreeAT": "mnist-methods/s4-free", "S4 | YOPO-5-3": "mnist-methods/s4-yopo"}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_ads_keeps_what_its_runs_say(name):
    assert f"| {name} | {means(PARTS[name])[1]} | {cell(PARTS[name])} |" in findings()


@pytest.mark.parametrize("name", CHEAP)
def test_a_cheap_method_s_row_is_that_of_its_runs(name):
    assert means(CHEAP[name])[1] == 3
    assert f"| {name} | {cell(CHEAP[name])} | {cell(CHEAP[name], 'Last')}" in findings()


# (b): model -> the run by 25 epochs on 10,000 images of CIFAR-10.
LOSSES = {"Mega": "attention", "S4": "s4", "Mamba": "mamba", "S4 + AdS": "s4-ads",
          "S4 + MLP": "s4-mlp", "S4 + GELU": "s4-gelu", "S4 + GLU": "s4-glu", "DSS": "dss",
          "S5": "s5"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_best_last_and_diff_is_that_of_its_runs(name):
    run = f"cifar10-patch4/{LOSSES[name]}"
    found = [f"{means(run, row)[0][1]:.1f}" for row in ("Best", "Last", "Diff")]
    spread = r"( \+- [\d.]+)?"
    assert re.search(rf"^\| {re.escape(name)} \| [\d,]+ \| {' . '.join(found)}{spread} \|$",
                     findings(), re.M)


# (c), learning rates and 1,024 tokens: model -> how its runs are called.
RATES = {"S4": "s4", "S4 + AdS": "s4-ads", "S4 + MLP": "s4-mlp"}


@pytest.mark.parametrize("name", RATES)
def test_a_row_of_learning_rates_is_that_of_its_runs(name):
    run = RATES[name]
    cells = [cell(f"mnist-lr/{run}-lr1e-3")]
    best = json.loads((HERE / f"results/mnist-eps0.3-long/{run}-seed0/result.json").read_text())
    cells.append(f"{100 * best['Best']['clean']:.1f} / {100 * best['Best']['pgd-10']:.1f}")
    cells.append(cell(f"mnist-lr/{run}-lr1e-2"))
    assert f"| {name} | {' | '.join(cells)} | " in findings()


# ---- Under AutoAttack ----------------------------------------------------------------------------

# (c), seed by seed: model -> how its runs are called.
SEEDS = {"S4": "s4", "S4 + AdS": "s4-ads", "S4 + MLP": "s4-mlp", "S4 + GELU": "s4-gelu",
         "S4 + GLU": "s4-glu", "Mega": "attention", "Mamba": "mamba"}


@pytest.mark.parametrize("name", SEEDS)
def test_a_row_of_autoattack_seed_by_seed_is_that_of_its_runs(name):
    ten = ("mnist-eps0.3-steps10",) if name in ("S4", "S4 + AdS", "S4 + MLP") else ()
    mnist = outcomes((*CONSTANT, *ten), SEEDS[name])[2]
    many = {3: "three", 6: "six"}[len(mnist)]
    cifar10 = ", ".join(f"{left:.1f}" for left in outcomes(("cifar10-patch4",), SEEDS[name])[2])
    row = f"| {name} | {span(mnist)}, {many} runs | {cifar10}"
    seed, = re.findall(rf"^{re.escape(row)}(?: \(seed (\d)\))? \|$", findings(), re.M)
    runs = (HERE / "results" / "cifar10-patch4").glob(f"{SEEDS[name]}-seed?/best-evaluation.json")
    known = [path.parts[-2][-1] for path in runs if '"aa"' in path.read_text()]
    assert known == [seed] if seed else len(known) == 3


@pytest.mark.parametrize("name", RATES)
def test_the_last_cells_of_a_row_of_learning_rates_are_those_of_its_runs(name):
    left, = outcomes(("mnist-lr",), f"{RATES[name]}-lr1e-2")[2]
    high = cell(f"mnist-lr/{RATES[name]}-lr3e-2")
    collapsed = means(f"mnist-lr/{RATES[name]}-lr3e-2", "Last")[0][0] < 15      # of ten classes
    assert collapsed == (name != "S4 + MLP")
    shown = {"S4": f"{high}, then the constant prediction", "S4 + MLP": high,
             "S4 + AdS": "the constant prediction"}[name]
    assert re.search(rf"^\| {re.escape(name)} \| .* \| {left:.1f} \| {shown} \|$", findings(), re.M)


@pytest.mark.parametrize("name", RATES)
def test_a_row_of_1024_tokens_is_that_of_its_run_and_log(name):
    run = RATES[name]
    log = (HERE / "results" / "evaluation" / f"cifar10-full-{run}-seed0-aa.txt").read_text()
    left = dict(re.findall(r"^(?:aa: )?(\S+) +([\d.]+)0% .* 1,000", log, re.M))
    cells = [cell(f"cifar10-full/{run}"),
             *(left[stage] for stage in ("apgd-ce", "apgd-t", "fab-t", "square"))]
    assert f"| {name} | {' | '.join(cells)} |" in findings()


# (j): a model -> its run on all of MNIST, and the folder and run with 5,000 images.
ALL_OF_MNIST = {"S4": ("s4", "mnist-step-falling", "s4"),
                "S4 + AdS": ("s4-ads", "mnist-step-falling", "s4-ads"),
                "S4 + GLU with ReLU": ("s4-glu_relu", "mnist-step-falling", "s4-glu_relu"),
                "S4 + GLU": ("s4-glu", "mnist-step-falling", "s4-glu"),
                "S4 + GLU, equal steps": ("s4-glu-constant", "mnist-step-constant", "s4-glu"),
                "Mamba": ("mamba", "mnist-step-falling", "mamba"),
                "Mega": ("attention", "mnist-step-falling", "attention"),
                "CNN": ("cnn", "mnist-step-falling", "cnn")}


def all_of_mnist_row(name):
    """Clean / PGD-10 on 10,000 images; PGD-50x5 and AutoAttack on 500; on 200: all / 5,000."""
    run, *before = ALL_OF_MNIST[name]
    folder = HERE / "results" / "mnist-all" / f"{run}-seed0"
    rows = json.loads((folder / "best-evaluation.json").read_text())["rows"]
    rows = {row["attack"]: row for row in rows if row["n"] == 500}
    left = [f"{100 * rows[attack]['accuracy']:.1f}" for attack in ("pgd-50x5", "aa")]
    (clean,), (robust,), _ = outcomes(("mnist-all",), run)
    first = 100 * mean(evaluate.survivors_of(rows["aa"])[:200])
    return [f"{clean:.1f} / {robust:.1f}", *left, f"{first:.1f} / {cell_of(*before, 'aa')}"]


def test_the_table_of_all_of_mnist_is_that_of_the_runs():
    for name in ALL_OF_MNIST:
        assert f"| {name} | {' | '.join(all_of_mnist_row(name))} |" in findings(), name


def lead(run, over, name):
    """Under AutoAttack on the same 500 images: the row of --table."""
    return differences(f"mnist-all/{over}-seed0", f"mnist-all/{run}-seed0")[name, "aa", 500]


def test_the_leads_with_all_of_mnist_are_those_that_the_table_prints():
    mega, glu, ads, cnn, behind, gelu, relu = (lead(*runs) for runs in (
        ("attention", "s4-ads", "attention"), ("s4-glu_relu", "s4-ads", "s4 + glu-relu"),
        ("s4-ads", "s4", "s4 + AdS relu"), ("cnn", "s4-glu_relu", "cnn"),
        ("attention", "s4-glu_relu", "attention"), ("s4-glu", "s4-ads", "s4 + glu"),
        ("s4-glu", "s4-glu_relu", "s4 + glu")))

    def said(row, p=""):
        return f"{row['difference']} ({row['95 % interval']}{p})"
    assert (f"leads AdS by {mega['difference']} ({mega['95 % interval']}; p "
            f"""{mega["McNemar's p"]}). A GLU with a ReLU leads AdS by """
            f"""{said(glu, "; p " + glu["McNemar's p"])}, AdS the pure S4 by {said(ads)}, """
            f"a CNN that GLU by {said(cnn)}.") in prose()
    assert (f"Mega keeps {behind['difference'].lstrip('-')} less ({behind['95 % interval']})."
            ) in prose()

    def less(row, p=""):
        most, least = (end.lstrip("-") for end in row["95 % interval"].split(" to "))
        return f"{row['difference'].lstrip('-')} less than {{}} ({least} to {most}{p})"
    words = less(gelu, "; p " + gelu["McNemar's p"]).format("AdS")
    assert f"keeps {words} and {less(relu).format('with a ReLU')}, though" in prose()
    mamba, above = (lead("mamba", over, "mamba") for over in ("s4-ads", "s4"))
    assert (f"Mamba, attacked by two processes, keeps {less(mamba).format('AdS')}, "
            f"{above['difference']} more than the pure S4 ({above['95 % interval']}).") in prose()
    ten = [differences(f"mnist-all/{over}-seed0", "mnist-all/s4-glu-seed0")[
        "s4 + glu", "pgd-10", 10000]["difference"] for over in ("s4-ads", "s4-glu_relu")]
    assert f"though {ten[0]} and {ten[1]} more under PGD-10 (n = 10,000; by" in prose()


def test_how_far_models_lead_the_pure_s4_with_all_of_mnist_is_what_their_runs_say():
    left = {run: outcomes(("mnist-all",), run)[2][0]
            for run in ("s4", "s4-ads", "attention")}
    mega = f"{left['attention'] - left['s4']:.0f}"
    readme = (HERE / "README.md").read_text()
    more = f"{left['attention'] - left['s4-ads']:.0f} more than S4 + AdS |"
    assert f"With all images (1 seed) it leaves Mega {mega} more than S4, {more}" in readme
    assert f"by {mega} ({left['attention']:.1f}, {left['s4']:.1f}; n = 500, one seed)" in prose()
    path = HERE / "results" / "mnist-all" / "s4-seed0" / "best-evaluation.json"
    row, = (row for row in json.loads(path.read_text())["rows"]
            if (row["attack"], row["n"]) == ("pgd-10", 10000))
    first = 100 * mean(evaluate.survivors_of(row)[:2000])
    before = mean(outcomes(("mnist-step-falling",), "s4")[1])
    assert f"keeps {first:.1f} % under PGD-10, with 5,000 training images {before:.1f}." in prose()


def test_what_equal_steps_make_of_a_glu_with_all_of_mnist_is_what_its_run_says():
    (ten,), (auto,) = outcomes(("mnist-all",), "s4-glu-constant")[1:]
    (best, _), (last, _) = (means("mnist-all/s4-glu-constant", row)[0] for row in ("Best", "Last"))
    readme = " ".join((HERE / "README.md").read_text().split())
    assert f"seed) it keeps {ten:.1f} % under PGD-10, {auto:.1f} under AutoAttack" in readme
    assert (f"keeps {ten:.1f} % under PGD-10 and {auto:.1f} under AutoAttack, and gets worse late: "
            f"clean it keeps {best:.1f} at Best (epoch 7), {last:.1f} at Last.") in prose()


# ---- (h): AdS's product, and its size -----------------------------------------------------------

# (h) of the findings, minus AdS with ReLU -> the model in the table of falling steps.
MINUS_ADS = {"GLU, ReLU": "s4 + glu-relu", "GLU, GELU": "s4 + glu",
             "MLP, ReLU": "s4 + mlp-relu", "MLP, GELU": "s4 + mlp",
             "AdS, GELU": "s4 + AdS gelu", "scale alone": "s4 + scale", "nothing": "s4",
             "Mega": "attention", "activation alone, ReLU": "s4 + relu",
             "activation alone, GELU": "s4 + gelu"}


def difference_row(rows, name):
    """Images, points, interval and p of each seed under AutoAttack."""
    n = max(n for model, attack, n in rows if (model, attack) == (MINUS_ADS[name], "aa"))
    row = rows[MINUS_ADS[name], "aa", n]
    assert row["minus"].startswith("s4 + AdS relu") and row["seeds"] == "0 1 2"
    return [str(n), row["difference"], row["95 % interval"], row["McNemar's p"].replace(" ", ", ")]


def test_the_differences_in_the_findings_are_those_that_the_table_prints():
    folder = HERE / "results" / "evaluation" / "falling-500"
    rows = differences_of_falling_steps() | differences(*sorted(folder.glob("s4-*")))
    mlp = rows["s4 + mlp-relu", "aa", 500]
    less, most, least = (f"{-float(end):.1f}" for end in (
        mlp["difference"], *mlp["95 % interval"].split(" to ")))
    assert f"AdS leads an MLP with a ReLU by {less} points (n = 500; {least} to {most})," in prose()
    scale = rows["s4 + scale", "aa", 500]
    less, most, least = (f"{-float(end):.1f}" for end in (
        scale["difference"], *scale["95 % interval"].split(" to ")))
    assert f"the scale alone keeps {less} less than AdS ({least} to {most});" in prose()
    for name in MINUS_ADS:
        assert f"| {name} | {' | '.join(difference_row(rows, name))} |" in findings(), name


def test_what_a_wider_pure_s4_keeps_is_what_its_run_says():
    ads, s4 = (differences(*(f"mnist-step-falling/{run}-seed{seed}" for run in (over, "s4-wide")
                             for seed in range(3))) for over in ("s4-ads", "s4"))
    (less, few, many), (same, low, high) = (
        [f"{-float(end):.1f}" for end in (row["difference"], *row["95 % interval"].split(" to "))]
        for row in (rows["s4", "aa", 200] for rows in (ads, s4)))
    ten = s4["s4", "pgd-10", 2000]
    assert (f"leaves it {less} points less than AdS ({many} to {few}), and {same} less than the "
            f"pure S4 with 64 channels ({high} to {low}). The PGD-10 of `--evaluate` leaves it "
            f"{ten['difference']} more than that S4 ({ten['95 % interval']}; n = 2,000)."
            ) in prose()
    _, robust, auto = outcomes(("mnist-step-constant",), "s4-wide")
    assert (f"keeps {min(auto):.1f} % under AutoAttack, and {robust[auto.index(min(auto))]:.1f} "
            "under PGD-10.") in prose()
    log = (HERE / "results" / "analysis" / "steps-s4_wide-constant.txt").read_text()
    long, apgd = (100 * float(re.search(rf"accuracy, {name} +([\d.]+)$", log, re.M)[1])
                  for name in ("PGD-50 falling from 2 eps", "APGD-CE"))
    assert f"PGD-50 from 2 eps leaves {long:.0f} of 100 images, APGD-CE {apgd:.0f} (" in prose()
    left = mean(outcomes(("mnist-step-falling",), "s4-wide")[2])
    readme = " ".join((HERE / "README.md").read_text().split())
    assert f"an S4 of AdS's size {left:.1f}. On" in readme


def test_the_lead_of_glu_with_relu_over_ads_is_that_of_its_500_images():
    pairs = list(zip(on_500_images("s4-glu_relu"), on_500_images("s4-ads")))
    said = []
    for first in (0, 200):
        found = zip(*(evaluate.paired_interval(a[first:], b[first:]) for a, b in pairs))
        said.append([f"{100 * mean(values):.1f}" for values in found])
    p = ", ".join(f"{evaluate.mcnemar(a[200:], b[200:]):.2g}" for a, b in pairs)
    (lead, low, high), (other, least, most) = said
    each = ", ".join(f"{100 * (mean(a) - mean(b)):.1f}" for a, b in pairs)
    assert f"a GLU with a ReLU leads AdS by {lead}." in prose()
    assert f"{lead} points more ({low} to {high}; seeds {each})." in prose()
    mlp = [100 * (mean(b) - mean(a)) for a, b in zip(on_500_images("s4-mlp_relu"),
                                                     on_500_images("s4-ads"))]
    assert "in each seed, by {:.1f}, {:.1f} and {:.1f} points:".format(*mlp) in prose()
    assert f"300 others it leads AdS by {other} points ({least} to {most}; p {p})." in prose()


# ---- The argument, measured ----------------------------------------------------------------------

def logged(log, quantity, column="test"):
    """[layer 1, layer 2] of a quantity in a log of --analyse, to four digits."""
    text = (HERE / "results" / "analysis" / f"{log}.txt").read_text()
    values = re.search(rf"^  {re.escape(quantity)}  +(.*)$", text, re.M)[1].split()
    first = {"start": 0, "test": 2}[column]
    return [float(value) for value in values[first:first + 2]]


def cells_of(name):
    """The cells of the row that begins so, each as [number in words]."""
    row, = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", findings(), re.M)
    return [re.findall(r"\d[\d.]*", text) for text in row.split(" | ")]


def rounds(numbers, values):
    """Each number of a cell is a value, rounded to the digits shown after the log's four."""
    for shown, value in zip(numbers, values, strict=True):
        last = -len(shown.partition(".")[2])                # places of the last digits, here, there
        fourth = math.floor(math.log10(abs(value))) - 3
        if abs(float(shown) - value) > (10.0 ** last + 10.0 ** fourth) / 2 + 1e-9:
            return False
    return True


@pytest.mark.parametrize("name, quantity", [
    ("gain: mean of the channels' norm of K, sum of abs(K_l)", "gain ||K||_1, mean of channels"),
    ("the signal is multiplied by", "signal, rms y / rms u"),
    ("relative error", "the same, relative to the signal")])
def test_what_the_maps_of_s4_do_is_what_the_logs_say(name, quantity):
    found = (logged("s4", quantity, "start"), logged("s4-standard", quantity),
             logged("s4", quantity))
    assert all(map(rounds, cells_of(name), found)) and len(cells_of(name)) == 3


@pytest.mark.parametrize("name, quantity, factor", [
    ("local gain, at most, where the layer selects", "local gain, it selects, max", 1),
    ("local gain, at most, with the selection held", "local gain, selection held, max", 1),
    ("local gain, on average, where the layer selects", "local gain, it selects, mean", 1),
    ("local gain, on average, with the selection held", "local gain, selection held, mean", 1),
    ("the last one over its linear bound", "|e_L| / its linear bound", 100)])
def test_what_the_scan_of_mamba_does_is_what_its_log_says(name, quantity, factor):
    numbers, = cells_of(name)
    assert rounds(numbers, [factor * value for value in logged("mamba", quantity)])


def test_the_local_gains_of_mamba_in_the_readme_are_those_of_its_log():
    gains = [logged("mamba", f"local gain, {what}, max")[0] for what in
             ("it selects", "selection held")]
    means = [logged("mamba", f"local gain, {what}, mean")[0] for what in
             ("it selects", "selection held")]
    said = ("the local gain of layer 1 reaches {:.0f}, with the selection held {:.1f} (CIFAR-10, "
            "1 seed, largest of 8 images; means {:.1f}, {:.1f})")
    assert said.format(*gains, *means) in (HERE / "README.md").read_text()


@pytest.mark.parametrize("layer", [1, 2])
def test_how_the_error_of_mamba_s_state_grows_is_what_its_log_says(layer):
    numbers, = cells_of(f"abs(e_t) at t = 1, 16, 32, 64, layer {layer}")
    found = [logged("mamba", f"|e_t|, t = {t}")[layer - 1] for t in (1, 16, 32, 64)]
    assert rounds(numbers, found)


# On CIFAR-10, then on MNIST; standard training, then adversarial training.
ADS_LOGS = "s4-ads-standard", "s4-ads", "mnist-s4-ads-standard", "mnist-s4-ads"


@pytest.mark.parametrize("name, quantity", [
    ("share of s' dy, the error that passes", "share of s' dy"),
    ("share of (s' - s) y, the scale's own change", "share of (s' - s) y"),
    ("share of t' - t, the shift's own change", "share of t' - t"),
    ("entries that ReLU removes exactly", "error removed exactly")])
def test_what_ads_does_is_what_the_logs_say(name, quantity):
    for numbers, log in zip(cells_of(name), ADS_LOGS, strict=True):
        assert rounds(numbers, [100 * value for value in logged(log, quantity)])


def test_by_what_ads_multiplies_the_relative_error_is_what_the_logs_say():
    name = "mean square error over mean square, behind AdS over before it"
    for numbers, log in zip(cells_of(name), ADS_LOGS, strict=True):
        assert rounds(numbers, [1 + change for change in logged(log, "AdS: MSE / mean square")])
