# SPDX-License-Identifier: MIT
"""lab/autoattack.py: closed forms, what every attack promises, each attack's own ways, bad input.

    python -m pytest -q lab/test_autoattack.py      # half a minute; with pyautoattack a minute more
"""
import ast
import importlib.util
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import s4_adv
import train
from lab import autoattack
from test_all import Spy, close, randn

def quick(module):
    """Its attacks with few steps, by name."""
    return {"apgd-ce": partial(module.apgd_ce, steps=30),
            "apgd-dlr": partial(module.apgd, steps=30, loss="dlr"),
            "apgd-t": partial(module.apgd_t, steps=30),
            "fab-t": partial(module.fab_t, steps=30),
            "square": partial(module.square, queries=100, span=100)}


ATTACKS = quick(autoattack)


class LinearSpy(nn.Module):
    """Linear on pixels; remembers every point that it is shown."""

    def __init__(self, n_classes, pixels, dtype=torch.float64, detach=False):
        super().__init__()
        self.linear = nn.Linear(pixels, n_classes, dtype=dtype)
        self.detach, self.seen = detach, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        z = self.linear(x.flatten(1))
        return z.detach() if self.detach else z


def net(n_classes=5, dtype=torch.float32, channels=1):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(216, 24), nn.ReLU(), nn.Linear(24, n_classes)).to(dtype)


def dotted(n=24, dtype=torch.float32, channels=1):
    """n images 6 x 6 with black and white pixels among them."""
    torch.manual_seed(4)
    return (1.6 * torch.rand(n, channels, 6, 6, dtype=dtype) - 0.3).clamp(0, 1)


def gap(model, x, y, t, r):
    """max z_t - z_y over ball and box for a linear model: every pixel goes to the better bound."""
    W, b = model.linear.weight, model.linear.bias
    v = W[t] - W[y]
    low, high = (x - r).clamp(min=0).flatten(1), (x + r).clamp(max=1).flatten(1)
    return (torch.maximum(v * low, v * high).sum(1) + b[t] - b[y]).item()


def critical_radius(model, x, y):
    """The least r at which some class t reaches class y, for one image, by bisection."""
    a, b = 0.0, 1.0
    wrong = [t for t in range(model.linear.out_features) if t != int(y)]
    for _ in range(60):
        r = (a + b) / 2
        a, b = (a, r) if max(gap(model, x, y, t, r) for t in wrong) > 0 else (r, b)
    return b


# ---- closed forms --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, n_classes, slack", [
    ("apgd-ce", 2, 1e-3), ("apgd-t", 5, 1e-3), ("fab-t", 2, 1e-2), ("fab-t", 5, 1e-2)])
def test_on_a_linear_model_an_image_breaks_exactly_at_its_closed_form_radius(
        name, n_classes, slack):
    torch.manual_seed(0)                                        # slack: FAB overshoots, eta = 1.05
    model = LinearSpy(n_classes, 36).requires_grad_(False)
    x = dotted(3, torch.float64)
    y = model(x).argmax(1)
    for x_1, y_1 in zip(x.split(1), y.split(1)):
        r = critical_radius(model, x_1, y_1)
        for eps, broken in ((r * (1 - slack), False), (r * (1 + slack), True)):
            x_adv = ATTACKS[name](model, x_1, y_1, eps)
            assert (model(x_adv).argmax(1) != y_1).item() is broken


def test_fab_projects_onto_the_hyperplane_with_the_least_norm_within_the_box():
    torch.manual_seed(0)
    x, w = dotted(40, torch.float64).flatten(1), torch.randn(40, 36, dtype=torch.float64)
    w[:, :5] = 0
    c = 10 * torch.randn(40, dtype=torch.float64)
    d = autoattack.project(x, w, c)
    assert (x + d).min() >= -1e-12 and (x + d).max() <= 1 + 1e-12

    def most(r):                                                            # max <w, d> sign c
        s = w * c.sign()[:, None]
        down, up = (x - r).clamp(min=0), (x + r).clamp(max=1)
        return (torch.maximum(s * down, s * up) - s * x).sum(1)
    one = torch.ones(40, 1, dtype=torch.float64)
    low, high = 0 * one, one
    for _ in range(60):
        r = (low + high) / 2
        enough = (most(r) >= c.abs())[:, None]
        low, high = torch.where(enough, low, r), torch.where(enough, r, high)
    met = most(one) >= c.abs()
    assert met.any() and not met.all()                                      # both cases occur
    torch.testing.assert_close((w * d).sum(1)[met], c[met])
    torch.testing.assert_close(d.abs().amax(1)[met], high[met, 0])
    reach = most(one) * c.sign()
    torch.testing.assert_close((w * d).sum(1)[~met], reach[~met])
    assert (autoattack.project(x, w, 0 * c) == 0).all()
    assert (autoattack.project(x, 0 * w, c) == 0).all()


def test_one_step_of_fab_solves_a_linear_problem():
    torch.manual_seed(0)
    model = LinearSpy(2, 36).requires_grad_(False)
    x = dotted(1, torch.float64)
    y = model(x).argmax(1)
    z, W = model(x)[0], model.linear.weight
    w = (W[1 - y] - W[y]).view_as(x)
    new = autoattack.fab_step(x, x, z[1 - y] - z[y], w, eta=1.0)
    torch.testing.assert_close((new - x).abs().max().item(), critical_radius(model, x, y))
    assert model(new).diff().abs() < 1e-9


def test_the_dlr_losses_are_those_of_the_paper():
    z, y, target = torch.tensor([[4.0, 1.0, 3.0, -2.0]]), torch.tensor([0]), torch.tensor([3])
    dlr = autoattack.dlr
    assert dlr(z, y).item() == pytest.approx(-(4 - 3) / (4 - 1))
    assert dlr(z, y, target).item() == pytest.approx(-(4 + 2) / (4 - (1 - 2) / 2))
    assert dlr(z, torch.tensor([1])).item() == pytest.approx(-(1 - 4) / (4 - 1))
    torch.testing.assert_close(dlr(100 * z, y), dlr(z, y))


def test_the_checkpoints_of_100_steps_are_those_of_the_paper():
    assert autoattack.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


# ---- what every attack promises ------------------------------------------------------------------

@pytest.fixture(params=ATTACKS)
def name(request):
    return request.param


@pytest.fixture
def attack(name):
    return ATTACKS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_lies_in_ball_and_box_and_is_detached(attack, dtype):
    model, x = net(dtype=dtype), dotted(dtype=dtype)
    y = model(x).argmax(1)
    with torch.no_grad():                                       # as an evaluation calls it
        x_adv = attack(model, x, y, 0.1)
    assert x_adv.dtype == dtype and x_adv.shape == x.shape and not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (model(x_adv).argmax(1) != y).any()


def test_eps_0_returns_x(attack):
    model, x = net(), dotted()
    x_adv = attack(model, x, model(x).argmax(1), 0.0)
    torch.testing.assert_close(x_adv, x, rtol=0, atol=0)


def test_misclassified_images_are_left_alone(attack):
    model, x = net(), dotted()
    assert torch.equal(attack(model, x, (model(x).argmax(1) + 1) % 5, 0.1), x)


def test_the_images_that_were_given_stay_what_they_are(attack):
    model, x = net(), dotted()
    before = x.clone()
    x_adv = attack(model, x, model(x).argmax(1), 0.1)
    x_adv.zero_()                                               # it shares no memory with them
    assert torch.equal(x, before)


def test_images_that_want_a_gradient_get_none(attack):
    model, x = net(), dotted().requires_grad_()
    x_adv = attack(model, x, model(x).argmax(1), 0.1)
    assert not x_adv.requires_grad and x.requires_grad and x.grad is None


def test_attacks_leave_weights_gradients_and_mode_untouched(attack):
    model = net()
    x = dotted()
    y = model(x).argmax(1)
    before = [w.clone() for w in model.parameters()]
    model.train()
    attack(model, x, y, 0.1)
    assert model.training and all(w.grad is None and w.requires_grad for w in model.parameters())
    assert all(torch.equal(w, v) for w, v in zip(model.parameters(), before))


def test_the_model_is_in_eval_mode_whenever_an_attack_asks_it(attack):
    spy, x = Spy(net()), dotted(4)
    y = spy.net(x).argmax(1)
    attack(spy, x, y, 0.1)
    assert spy.modes and not any(spy.modes)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_mode_and_weights_are_as_before_also_after_an_error(attack, call):
    spy, x = Spy(net(), fails_at=call), dotted(4)
    y = spy.net(x).argmax(1)
    spy.net[0].eval()
    spy.net[3].requires_grad_(False)
    modes = [m.training for m in spy.modules()]
    wanted = [w.requires_grad for w in spy.parameters()]
    assert len(set(modes)) == len(set(wanted)) == 2             # some yes, some no
    with pytest.raises(ZeroDivisionError):
        attack(spy, x, y, 0.01)
    assert [m.training for m in spy.modules()] == modes
    assert [w.requires_grad for w in spy.parameters()] == wanted


def test_within_the_scripts_own_frozen_the_result_is_the_same(attack):
    torch.manual_seed(0)
    model, x = s4_adv.Classifier(1, 5, 8, 8, 1, 2), dotted(6)
    y = model(x).argmax(1)
    torch.manual_seed(1)
    alone = attack(model, x, y, 0.05)
    torch.manual_seed(1)
    with s4_adv.frozen(model):
        within = attack(model, x, y, 0.05)
        assert not any(w.requires_grad for w in model.parameters()) and not model.training
    assert all(w.requires_grad for w in model.parameters()) and model.training
    assert torch.equal(alone, within)


def test_the_seed_decides(name, attack):
    model, x = net(), dotted()
    y = model(x).argmax(1)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(attack(model, x, y, 0.05))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (name == "fab-t")               # the one without chance


def test_every_tensor_that_an_attack_makes_is_on_the_device_of_x(attack):
    model, x = net(), dotted(4)
    y = model(x).argmax(1)
    with torch.device("meta"):                                  # what names no device lands there
        attack(model, x, y, 0.02)


@pytest.mark.parametrize("change", [
    lambda x: 255 * x, lambda x: x - 0.01, lambda x: x + 0.01, lambda x: x / 0],
    ids=["255 x", "x - .01", "x + .01", "nan"])
def test_images_outside_0_to_1_are_refused(attack, change):
    spy, x = Spy(net()), dotted()
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]; normalisation belongs"):
        attack(spy, change(x), torch.zeros(24).long(), 0.1)
    assert not spy.fed


def test_images_outside_0_to_1_by_rounding_are_taken(attack):
    model, x = net(), dotted()
    y = model(x).argmax(1)
    x_adv = attack(model, x + 5e-7 * (2 * x - 1), y, 0.1)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and (model(x_adv).argmax(1) != y).any()


@pytest.mark.parametrize("eps", [8, 1.5, -0.1, math.nan])
def test_a_radius_outside_0_to_1_is_refused(attack, eps):
    spy, x = Spy(net()), dotted()
    with pytest.raises(ValueError, match=f"eps {eps}: pixel units; 8/255, not 8"):
        attack(spy, x, torch.zeros(24).long(), eps)
    assert not spy.fed


def test_a_radius_of_1_reaches_the_whole_box(attack):
    model, x = net(), dotted()
    y = model(x).argmax(1)
    assert (model(attack(model, x, y, 1.0)).argmax(1) != y).all()


def test_an_empty_batch_comes_back_without_a_question_to_the_model(attack):
    spy, x = Spy(net(dtype=torch.float64)), dotted(dtype=torch.float64)[:0]
    x_adv = attack(spy, x, torch.zeros(0).long(), 0.1)
    assert x_adv.shape == (0, 1, 6, 6) and x_adv.dtype == torch.float64 and not spy.fed


# ---- each attack's own ways ----------------------------------------------------------------------

def test_apgd_breaks_every_image_of_a_small_network_that_pgd_breaks():
    model, x = net(dtype=torch.float64), dotted(dtype=torch.float64)
    y = model(x).argmax(1)
    for eps in (0.03, 0.06):
        weaker = model(s4_adv.pgd(model, x, y, eps, eps / 4, 20)).argmax(1) != y
        stronger = model(ATTACKS["apgd-ce"](model, x, y, eps)).argmax(1) != y
        assert (stronger >= weaker).all()


def algorithm_1(f, x, start, eps, steps):
    """The points x(0), x(1), ... of APGD on f for one image, as the paper writes it."""
    def P(v):
        return v.clamp(x - eps, x + eps).clamp(0, 1)

    def ascent(v):
        v = v.detach().requires_grad_()
        return P(v.detach() + eta * torch.autograd.grad(f(v), v)[0].sign())
    eta, points, x_before, x_k, x_max = 2 * eps, [start], start, start, start
    w, eta_w, f_w, rises = 0, None, None, 0                     # at the last checkpoint, and since
    for k in range(1, steps + 1):
        z = ascent(x_k)
        new = z if k == 1 else P(x_k + 0.75 * (z - x_k) + 0.25 * (x_k - x_before))
        points.append(new)
        rises += f(new) > f(x_k)
        x_max = new if f(new) > f(x_max) else x_max
        x_before, x_k = x_k, new
        if k in autoattack.checkpoints(steps):
            condition_1 = rises < 0.75 * (k - w)
            condition_2 = eta == eta_w and f(x_max) == f_w
            w, eta_w, f_w, rises = k, eta, f(x_max), 0
            if condition_1 or condition_2:
                eta, x_k = eta / 2, x_max
    return points


@pytest.mark.parametrize("steepness", [1, 100])
def test_apgd_visits_the_points_of_algorithm_1(steepness):
    class Hills(nn.Module):                                     # class 0 always wins
        def forward(self, x):
            return F.pad((x.flatten(1) @ W).sin(), (1, 0), value=3)
    torch.manual_seed(0)
    x, y = torch.rand(60, 1, 6, 6, dtype=torch.float64), torch.zeros(60).long()
    W, spy = steepness * randn(36, 4), Spy(Hills())
    autoattack.apgd_ce(spy, x, y, 0.1, 20)
    points = torch.stack(spy.fed[1:])                           # (21, 60, 1, 6, 6)

    def loss(v):
        return F.cross_entropy(spy.net(v), y[:1])
    for x_1, points_1 in zip(x.split(1), points.split(1, 1)):
        close(points_1, torch.stack(algorithm_1(loss, x_1, points_1[0], 0.1, 20)))


def test_apgd_returns_the_best_point_that_it_saw_where_nothing_broke_the_image():
    torch.manual_seed(1)
    network, x, held = net(dtype=torch.float64), dotted(24, torch.float64), 0
    for x_1 in x.split(1):
        y = network(x_1).argmax(1)
        for steps in (5, 10):
            spy = Spy(network)
            x_adv = autoattack.apgd_ce(spy, x_1, y, 0.02, steps)
            if network(x_adv).argmax(1) == y:
                held += 1
                losses = [F.cross_entropy(network(v), y) for v in (*spy.fed[1:], x_adv)]
                close(losses[-1], max(losses))
    assert held >= 20


def test_apgd_returns_the_first_point_that_broke_the_image():
    network, x, broken = net(dtype=torch.float64), dotted(24, torch.float64), 0
    for x_1 in x.split(1):
        y = network(x_1).argmax(1)
        spy = Spy(network)
        x_adv = autoattack.apgd_ce(spy, x_1, y, 0.1, 20)
        if network(x_adv).argmax(1) != y:
            broken += 1
            assert torch.equal(x_adv, spy.fed[-1])              # and nothing was asked after it
            assert all(network(v).argmax(1) == y for v in spy.fed[:-1])
    assert broken >= 15


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "square"])
def test_every_point_that_the_model_is_shown_lies_in_ball_and_box(name):
    torch.manual_seed(1)
    model, x, eps = LinearSpy(5, 36), dotted(1, torch.float64), 0.01
    y = model(x).argmax(1)
    ATTACKS[name](model, x, y, eps)
    seen = torch.cat(model.seen)
    assert len(seen) > 20 and seen.min() >= 0 and seen.max() <= 1
    assert (seen - x).abs().max() <= eps + 1e-12


def test_fab_may_leave_the_ball_on_its_way_but_never_the_box():
    torch.manual_seed(1)
    model, x = LinearSpy(5, 36), dotted(2, torch.float64)
    ATTACKS["fab-t"](model, x, model(x).argmax(1), 1e-4)
    seen = torch.cat(model.seen)
    assert seen.min() >= 0 and seen.max() <= 1


def test_square_asks_for_no_gradient():
    torch.manual_seed(1)
    model, x = LinearSpy(5, 36, detach=True), dotted(8, torch.float64)      # has none to give
    y = model(x).argmax(1)
    x_adv = autoattack.square(model, x, y, 0.2, queries=200, span=200)
    assert (model(x_adv).argmax(1) != y).any()


def test_square_proposes_one_square_at_a_time_that_shrinks():
    torch.manual_seed(1)
    model, x = LinearSpy(2, 400), torch.full((1, 1, 20, 20), 0.5, dtype=torch.float64)
    y = model(x).argmax(1)
    model.seen.clear()
    autoattack.square(model, x, y, 1e-4, queries=300, span=300)
    assert len(model.seen) == 302                               # clean, stripes, queries
    best, worst, sides = model.seen[1], float("inf"), []
    for point in model.seen[1:]:
        changed = (point != best)[0, 0].nonzero()
        if len(changed):
            sides.append(int((changed.amax(0) - changed.amin(0)).max()) + 1)
        value = autoattack.margin(model.linear(point.flatten(1)), y).item()
        best, worst = (point, value) if value < worst else (best, worst)
    assert max(sides) <= 18 and sides[0] > 9                    # round(sqrt(.8) 20) = 18
    assert set(sides[-30:]) == {1}


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_random_square_may_lie_anywhere_in_the_image_with_all_its_pixels(side):
    torch.manual_seed(0)
    squares = autoattack.random_squares(torch.zeros(2000, 3, 4, 6), side)
    assert squares.shape == (2000, 1, 4, 6) and (squares.sum((1, 2, 3)) == side ** 2).all()
    for axis in (2, 3):                                         # `side` rows, `side` columns
        assert (squares.any(axis).sum((1, 2)) == side).all()
    corners = {tuple(s.nonzero()[0].tolist()) for s in squares[:, 0]}
    assert len(corners) == (4 - side + 1) * (6 - side + 1)


def test_targets_beyond_the_other_classes_are_capped_and_only_what_is_robust_is_attacked():
    torch.manual_seed(1)
    model, x = LinearSpy(4, 36), dotted(6, torch.float64)
    y = model(x).argmax(1)
    model.seen.clear()
    autoattack.apgd_t(model, x, y, 1e-6, targets=99, steps=5)
    # clean and order; for each of 3 targets x, the start, 5 steps, the result
    assert sum(len(s) for s in model.seen) == 6 * (2 + 3 * (1 + 1 + 5 + 1))


def test_targets_are_the_other_classes_also_where_logits_are_equal():
    torch.manual_seed(1)
    z = torch.randint(4, (200, 50)).double()                                # many equal
    y = z.argmax(1)
    for targets in (1, 9, 49, 60):
        found = autoattack.target_classes(nn.Identity(), z, y, targets).T
        assert found.shape == (200, min(targets, 49)) and (found != y[:, None]).all()
        assert all(len(set(row)) == len(row) for row in found.tolist())
        assert (z.gather(1, found).diff(dim=1) <= 0).all()


def test_logits_times_1000_hide_nothing_from_the_targeted_dlr_stage():
    model, x = net(), dotted()
    y = model(x).argmax(1)
    loud = nn.Sequential(model, nn.Linear(5, 5, bias=False))
    loud[1].weight.data = 1000 * torch.eye(5)
    broken = []
    for m in (model, loud):
        torch.manual_seed(0)
        broken.append(m(ATTACKS["apgd-t"](m, x, y, 0.05)).argmax(1) != y)
    assert (broken[0] == broken[1]).float().mean() > 0.95


# ---- bad input -----------------------------------------------------------------------------------

class Bad(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.net = kind, net()

    def forward(self, x):
        z = self.net(x)
        if self.kind == "logit":
            return z / 0
        return z + (x - x.detach()).sqrt().flatten(1).sum(1, keepdim=True)  # its gradient is inf


@pytest.mark.parametrize("model, attack, options, error, message", [
    (net(3), "apgd_t", {}, ValueError, "targeted DLR loss needs at least 4 classes; got 3"),
    (net(2), "apgd", {"loss": "dlr"}, ValueError, "DLR loss needs at least 3 classes"),
    (net(), "apgd", {"loss": "mse"}, ValueError, "got 'mse'"),
    (net(), "apgd", {"target": torch.zeros(24).long()}, ValueError, "got 'ce' with a target"),
    (net(), "apgd_t", {"targets": 0}, ValueError, "at least 1 target class; got 0"),
    (net(), "fab_t", {"targets": 0}, ValueError, "at least 1 target class; got 0"),
    *((Bad("logit"), attack, {}, FloatingPointError, "returns logits that are not finite")
      for attack in ("apgd_ce", "apgd_t", "fab_t", "square")),
    *((Bad("gradient"), attack, {}, FloatingPointError, "a gradient that is not finite")
      for attack in ("apgd_ce", "apgd_t", "fab_t")),
])
def test_bad_input_gives_a_clear_error(model, attack, options, error, message):
    x = dotted()
    y = (model.net if isinstance(model, Bad) else model)(x).argmax(1)
    with pytest.raises(error, match=message):
        getattr(autoattack, attack)(model, x, y, 0.1, **options)


# ---- a single file, and the ensemble -------------------------------------------------------------

@pytest.fixture
def copied(tmp_path):
    """autoattack.py alone in another folder, as a module."""
    file = shutil.copy(autoattack.__file__, tmp_path)
    spec = importlib.util.spec_from_file_location("autoattack", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_needs_nothing_but_torch():
    tree = ast.parse(Path(autoattack.__file__).read_text())
    needed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            needed |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            needed.add("." if node.level else node.module.split(".")[0])
    assert "torch" in needed and needed - {"torch"} <= sys.stdlib_module_names


def test_the_five_lines_of_the_docstring_leave_the_worst_case(copied, monkeypatch):
    model, x, fed, results = net().eval(), dotted(), [], []
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 5                                                 # three clean errors
    for stage in copied.AUTO:
        def recorded(model, x, y, eps, attack=quick(copied)[stage]):
            fed.append(len(x))
            results.append(attack(model, x, y, eps))
            return results[-1]
        monkeypatch.setitem(copied.AUTO, stage, recorded)
    monkeypatch.setitem(sys.modules, "autoattack", copied)
    example = [line[4:] for line in copied.__doc__.splitlines() if line.startswith("    ")][:5]
    example = "\n".join(example).replace("lab.autoattack", "autoattack").replace("8 / 255", "0.03")
    names = {"model": model, "x": x, "y": y}
    exec(example, names)
    x_adv = names["x_adv"]
    assert fed[0] == 21 and fed == sorted(fed, reverse=True) and len(fed) == 4
    assert torch.equal(x_adv[:3], x[:3]) and (x_adv - x).abs().max() <= 0.03 + 1e-6
    assert 0 < (model(x_adv).argmax(1) == y).sum() <= fed[-1] < 21          # some held, some broke


def test_the_ensembles_are_those_of_the_paper_in_its_order():
    assert autoattack.ENSEMBLES["aa"] == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert autoattack.ENSEMBLES["aa-fast"] == ("apgd-ce", "apgd-t")


# ---- against the published implementation, where one is installed --------------------------------

@pytest.mark.parametrize("kind, radii", [("CNN", (0.01, 0.015)), ("S4", (0.006, 0.01))])
def test_each_stage_agrees_image_by_image_with_pyautoattack(kind, radii):
    reference = pytest.importorskip("pyautoattack").AutoAttack
    torch.manual_seed(0)
    x, y = train.drawn_digits(1200, 0, size=14)
    x = x / 255
    cnn = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(392, 32),
                        nn.ReLU(), nn.Linear(32, 10))
    model = cnn if kind == "CNN" else s4_adv.Classifier(1, 10, 32, 16, 1, 2, ads="relu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(6 if kind == "CNN" else 30):
        for i in torch.randperm(1200).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    x, y = x[:60], y[:60]
    x, y = (v[model(x).argmax(1) == y] for v in (x, y))
    for eps in radii:
        theirs = reference(model, eps=eps, seed=0, version="standard")
        theirs.fab.targeted, theirs.fab.n_iter, theirs.square.n_queries = True, 40, 150
        theirs.fab.n_target_classes = theirs.apgd_targeted.n_target_classes = 2
        worst = torch.ones(2, len(y), dtype=torch.bool)
        for search, attack in (
                (autoattack.apgd_ce, theirs.apgd),
                (partial(autoattack.apgd_t, targets=2), theirs.apgd_targeted),
                (partial(autoattack.fab_t, targets=2, steps=40), theirs.fab),
                (partial(autoattack.square, queries=150), theirs.square)):
            attack.seed = 0
            torch.manual_seed(0)                # APGD's random starts are the same, then
            ours = search(model, x, y, eps)
            robust = torch.stack([model(z).argmax(1) == y
                                  for z in (ours, attack.perturb(x.clone(), y))])
            worst &= robust
            print(f"{kind:4} eps {eps:<6} {type(attack).__name__:19} of {len(y)} images robust: "
                  "ours {} theirs {}, they differ on {}; worst case so far {} {}, on {}".format(
                      *robust.sum(1).tolist(), int((robust[0] != robust[1]).sum()),
                      *worst.sum(1).tolist(), int((worst[0] != worst[1]).sum())))
            assert 0 < robust[0].sum() < len(y), (eps, attack, robust[0].sum())
            if attack is theirs.square:         # chance decides more: a sign test on who differs
                b, n = int((robust[0] & ~robust[1]).sum()), int((robust[0] != robust[1]).sum())
                p = 2 * sum(math.comb(n, k) for k in range(min(b, n - b) + 1)) / 2 ** n
                assert p > 0.01, (eps, b, n)
            else:
                assert (robust[0] != robust[1]).sum() <= 1, (eps, attack)
        assert (worst[0] != worst[1]).sum() <= 1, eps
