# SPDX-License-Identifier: MIT
"""The tables of means in (a) to (e) of results/README.md are those of the runs in results/."""
import json
import re

import pytest

import train
from lab.test_findings import mean
from lab.test_house import findings
from test_all import HERE


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


# (c), learning rates: model -> what follows its name in its runs'.
RATES = {"S4": "s4", "S4 + AdS": "s4-ads", "S4 + MLP": "s4-mlp"}


@pytest.mark.parametrize("name", RATES)
def test_a_row_of_learning_rates_is_that_of_its_runs(name):
    run = RATES[name]
    cells = [cell(f"mnist-lr/{run}-lr1e-3")]
    best = json.loads((HERE / f"results/mnist-eps0.3-long/{run}-seed0/result.json").read_text())
    cells.append(f"{100 * best['Best']['clean']:.1f} / {100 * best['Best']['pgd-10']:.1f}")
    cells.append(cell(f"mnist-lr/{run}-lr1e-2"))
    assert f"| {name} | {' | '.join(cells)} | " in findings()
