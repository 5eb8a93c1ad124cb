# SPDX-License-Identifier: MIT
"""--checks: a healthy model passes, and each planted fault is caught by the checks named for it."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import s4_adv
import train
from lab import checks
from lab.test_autoattack import dotted
from lab.test_evaluate import evaluates, report, trained

NAMES = ["forward deterministic and finite", "gradient not zero",
         "gradient is the slope, in float64", "fgsm, pgd-10, pgd-50x5 in this order",
         "accuracy falls with eps", "accuracy falls with steps", "accuracy is 0 at eps 1",
         "cross-entropy and targeted DLR agree", "square not stronger than pgd-50x5",
         "smaller logits change nothing", "noise weaker than pgd-10"]
MEASURES = "repetition_gap", "share_without_gradient", "share_off_slope", "share_left"


def check_settings(**kw):
    return SimpleNamespace(**{"model": "s4", "eps": 0.03, "alpha": 0.0075, "classes": 10,
                              "batch_size": 60, "test_size": 60, "seed": 0, "device": "cpu"} | kw)


def check(*args):
    return checks.check_gradients(*args, check_settings())


class Masked(nn.Module):
    """A model that hides its gradients, or its nature, in one of the known ways."""

    def __init__(self, net, fault=None):
        super().__init__()
        self.net, self.fault = net, fault

    def forward(self, x):
        z = self.net((x * 8).round() / 8 if self.fault == "quantised input" else x)
        if self.fault == "chance":
            z = z + 0.01 * torch.randn_like(z)
        return {"logits times 100": 100 * z, "not finite": z / 0}.get(self.fault, z)


class Scanned(nn.Module):
    """h_t = sigmoid(a u_t) h_{t-1} + u_t over pixels; the decay without gradient, where told so."""

    def __init__(self, detach):
        super().__init__()
        self.out, self.detach = nn.Linear(1, 10), detach
        with torch.no_grad():
            self.out.weight.copy_(torch.linspace(-1, 1, 10)[:, None])

    def forward(self, x):
        h = 0
        for u in x.flatten(1).unbind(1):
            decay = torch.sigmoid(2 * u - 1)
            h = (decay.detach() if self.detach else decay) * h + u
        return self.out(h[:, None])


@pytest.fixture(scope="module")
def digits_net():
    """A CNN trained on drawn digits of 14 x 14 pixels, and 60 images with their labels."""
    torch.manual_seed(0)
    x, y = train.drawn_digits(1260, 0, size=14)
    model = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(392, 32),
                          nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for i in [i for _ in range(12) for i in torch.randperm(1200).split(60)]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[i] / 255), y[i]).backward()
        optimizer.step()
    return model, x[1200:], y[1200:]


def failures(found):
    return {check["name"]: check["numbers"] for check in found if not check["passed"]}


def test_a_healthy_cnn_passes_all_checks(digits_net):
    found = check(*digits_net)
    assert failures(found) == {} and [check["name"] for check in found] == NAMES


def test_a_healthy_s4_passes_all_checks(digits_net):
    _, x, y = digits_net
    s4 = s4_adv.Classifier(1, 10, d_model=16, d_state=4, n_layers=1, patch_size=7, ads="relu")
    optimizer = torch.optim.AdamW(s4.parameters(), lr=1e-2)
    images, labels = train.drawn_digits(1000, 0, size=14)
    for _ in range(6):
        for i in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            F.cross_entropy(s4(images[i] / 255), labels[i]).backward()
            optimizer.step()
    assert failures(check(s4, x, y)) == {}


@pytest.mark.filterwarnings("ignore:.*gradient of exactly 0:UserWarning")
@pytest.mark.parametrize("fault, names", [
    ("logits times 100", ["gradient not zero", "cross-entropy and targeted DLR agree",
                          "square not stronger than pgd-50x5", "smaller logits change nothing"]),
    ("quantised input", ["gradient not zero", "gradient is the slope, in float64",
                         "noise weaker than pgd-10"]),
    ("chance", ["forward deterministic and finite"]),
    ("not finite", ["forward deterministic and finite"])])
def test_a_planted_fault_is_caught_by_named_checks(fault, names, digits_net):
    model, x, y = digits_net
    found = failures(check(Masked(model, fault), x, y))
    assert set(names) <= set(found)
    if fault == "not finite":
        assert all("logits that are not finite" in v.get("error", "") for v in found.values())


@pytest.mark.parametrize("detach", [True, False])
def test_a_scan_without_gradient_for_its_decay_is_caught_by_the_slope(detach):
    model, x = Scanned(detach), (255 * dotted(60)).to(torch.uint8)
    with torch.no_grad():
        found = failures(check(model, x, model(x / 255).argmax(1)))
    assert ("gradient is the slope, in float64" in found) is detach


@pytest.mark.parametrize("name, possible, impossible", [
    ("fgsm, pgd-10, pgd-50x5 in this order", (.9, .5, .3, .31), (.9, .3, .5, .5)),
    ("accuracy falls with eps", (.9, .5, .3, .1, 0), (.9, .5, .6, .1, 0)),
    ("accuracy falls with steps", (.9, .5, .3, .3), (.5, .5, .3, .4)),
    ("accuracy is 0 at eps 1", (.01,), (.03,)),
    ("cross-entropy and targeted DLR agree", (.5, .45), (.5, .3)),
    ("square not stronger than pgd-50x5", (.5, .6), (.5, .4)),
    ("smaller logits change nothing", (.5, .6, .6), (.5, .6, .4)),
    ("noise weaker than pgd-10", (.9, .5, .5), (.9, .9, .5)),
    ("noise weaker than pgd-10", (.9, .9, .9), (.5, .9, .5))])
def test_a_check_passes_what_is_possible_and_fails_what_is_not(
        name, possible, impossible, digits_net, monkeypatch):
    asked = {"fgsm, pgd-10, pgd-50x5 in this order": ["clean", "fgsm", "pgd-10", "pgd-50x5"],
             "accuracy falls with eps": [("pgd-10", k * 0.03) for k in (0, 0.5, 1, 2, 4)],
             "accuracy falls with steps": ["pgd-1", "pgd-5", "pgd-10", "pgd-50"],
             "accuracy is 0 at eps 1": [("pgd-50", 1.0)],
             "cross-entropy and targeted DLR agree": [checks.WHITE, checks.TARGETED],
             "square not stronger than pgd-50x5": ["pgd-50x5", checks.BLACK],
             "smaller logits change nothing": [("pgd-10", None, k) for k in (1, 0.1, 0.01)],
             "noise weaker than pgd-10": [checks.NOISE, "pgd-10", checks.BLACK]}[name]
    asked = [(key,) if isinstance(key, str) else key for key in asked]
    asked = [(*key, None, 1.0)[:3] if len(key) == 1 else (*key, 1.0)[:3] for key in asked]
    for shares, passes in ((possible, True), (impossible, False)):
        known = dict(zip(asked, shares))
        monkeypatch.setattr(checks, "share_left",
                            lambda model, batches, c, *key: known.get(key, 0.5))
        model, x, y = digits_net
        found = checks.check_gradients(model, x.repeat(4, 1, 1, 1), y.repeat(4),
                                       check_settings(test_size=200))
        found = {check["name"]: check for check in found}
        assert found[name]["passed"] is passes
        assert tuple(found[name]["numbers"].values()) == shares


def test_a_check_fails_whenever_a_number_that_it_needs_cannot_be_had(digits_net, monkeypatch):
    def share_left(model, batches, c, attack, *rest):
        if attack == "pgd-10":
            raise FloatingPointError("no gradient")
        return 0.0
    monkeypatch.setattr(checks, "share_left", share_left)
    found = failures(check(*digits_net))
    assert list(found) == [NAMES[k] for k in (3, 4, 5, 9, 10)]              # those with pgd-10
    assert all(numbers == {"error": "no gradient"} for numbers in found.values())


def test_checks_are_printed_written_and_decide_the_exit_code(trained, capsys, monkeypatch):
    for fails in (False, True):
        for name in MEASURES:
            monkeypatch.setattr(checks, name, lambda *args: 0.0)
        monkeypatch.setattr(checks, "repetition_gap", lambda *args: float(fails))
        assert evaluates(trained[0], "--checks") == int(fails)
        out = capsys.readouterr().out
        assert f"{'FAIL' if fails else 'pass'}  forward deterministic" in out and "n = 20" in out
        found = report(trained[0], "checks")
        assert [f["passed"] for f in found["checks"]] == [not fails] + 10 * [True]
        assert found["rows"] == []


@pytest.mark.parametrize("words, n", [([], 200), (["--test-size", "210"], 210)])
def test_checks_take_200_images_unless_told(words, n, trained, capsys, monkeypatch):
    def wrong_size(model, batches, *args):
        return float(sum(len(y) for _, y in batches) != n)
    for name in MEASURES:
        monkeypatch.setattr(checks, name, wrong_size)
    assert train.main(["--evaluate", str(trained[0]), "--checks", "--device", "cpu", *words]) == 0
    assert f"n = {n}" in capsys.readouterr().out
