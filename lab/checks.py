# SPDX-License-Identifier: MIT
"""--checks: eleven looks for masked gradients. None proves that gradients tell the truth; each
catches a way in which they have not.

Sources    Carlini et al. 2019, On Evaluating Adversarial Robustness (1902.06705), Sec. 5;
           Athalye et al. 2018, Obfuscated Gradients Give a False Sense of Security (1802.00420)
"""
import copy
import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.linalg import vecdot

import train
from lab import autoattack

WHITE, TARGETED = "apgd-ce, 50 steps", "apgd-t, 3 x 50 steps"
BLACK, NOISE = "square, 500 queries", "noise, 10 draws"


def check_gradients(model, images, labels, c):
    """[{"name", "passed", "numbers"}] on the first 200 images, or --test-size; also printed.

    Numbers are shares of the images, unless named. Two images of a hundred may be the other way.
    """
    n = min(len(labels), c.test_size or 200)
    x = images[:n].to(next(model.parameters()).dtype) / 255
    batches = list(zip(x.split(c.batch_size), labels[:n].split(c.batch_size)))
    slack = max(0.02, 1 / n) + 1e-9
    found = []
    known = {}                                  # all numbers so far
    numbers = {}                                # those of the check at hand
    errors = []                                 # of the check at hand

    def number(name, measure, *args):
        """measure(model, batches, c, *args), noted for the next `passes` to print. After an error
        it is NaN, which passes no comparison."""
        if name not in known:
            try:
                known[name] = measure(model, batches, c, *args)
            except (train.UserError, FloatingPointError) as e:
                errors.append(str(e))
                return math.nan
        numbers[name] = known[name]
        return known[name]

    def left(attack, eps=None, logits=1.0):
        """The share of images that an attack leaves right, at a radius, with scaled logits."""
        name = attack
        if eps is not None:
            name += f" at eps {train.show(eps)}"
        if logits != 1:
            name += f", logits x {logits:g}"
        return number(name, share_left, attack, eps, logits)

    def falls(*shares):
        return all(b <= a + slack for a, b in pairwise(shares))

    def passes(name, condition):
        passed = bool(condition) and not errors
        shown = {"error": errors[0]} if errors else dict(numbers)
        found.append({"name": name, "passed": passed, "numbers": shown})
        train.say(f"{'pass' if passed else 'FAIL'}  {name:36}  " + "; ".join(
            f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in shown.items()))
        numbers.clear()
        errors.clear()

    train.say(f"\nchecks for masked gradients, n = {n:,}")
    with train.frozen(model):
        gap = number("largest relative difference", repetition_gap)
        passes("forward deterministic and finite", gap < 1e-6)
        passes("gradient not zero", number("images without", share_without_gradient) <= 0.01)
        share = number("images off by 0.1 %", share_off_slope)
        passes("gradient is the slope, in float64", share <= 0.01)
        passes("fgsm, pgd-10, pgd-50x5 in this order",
               falls(left("clean"), left("fgsm"), left("pgd-10"), left("pgd-50x5")))
        radii = [min(k * c.eps, 1.0) for k in (0, 0.5, 1, 2, 4)]
        passes("accuracy falls with eps", falls(*(left("pgd-10", eps) for eps in radii)))
        passes("accuracy falls with steps", falls(*(left(f"pgd-{k}") for k in (1, 5, 10, 50))))
        passes("accuracy is 0 at eps 1", left("pgd-50", 1.0) <= slack)
        passes("cross-entropy and targeted DLR agree", left(WHITE) <= left(TARGETED) + 0.1)
        passes("square not stronger than pgd-50x5", left("pgd-50x5") - slack <= left(BLACK))
        # Logits so large that the softmax saturates hide the gradient; smaller ones show it.
        scaled = [left("pgd-10", None, k) for k in (1, 0.1, 0.01)]
        passes("smaller logits change nothing", all(scaled[0] <= v + slack for v in scaled[1:]))
        noise = left(NOISE)
        passes("noise weaker than pgd-10", (left("pgd-10"), noise) < (noise, left(BLACK) + 1e-9))
    return found


def share_left(model, batches, c, attack, eps, logits):
    """The share of images that an attack leaves right, at a radius, with scaled logits."""
    at = c if eps is None else train.at_radius(c, eps)

    def noise(model, x, y):
        return (x + at.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    quick = {WHITE: [partial(autoattack.apgd_ce, eps=at.eps, steps=50)],
             TARGETED: [partial(autoattack.apgd_t, eps=at.eps, targets=3, steps=50)],
             BLACK: [partial(autoattack.square, eps=at.eps, queries=500, span=500)],
             NOISE: 10 * [noise]}
    attacks = quick.get(attack) or train.attacks_of(attack, at)
    seed = partial(train.seed_of, c.seed, attack)

    def scale(module, args, z):
        return z * logits
    with model.register_forward_hook(scale):
        right = [train.still_right(model, x, y, attacks, seed)[-1] for x, y in batches]
    return float(torch.cat(right).double().mean())


def repetition_gap(model, batches, c):
    """The largest difference of two forward passes, over the largest logit."""
    first, second = (torch.cat([train.scores(model, x) for x, _ in batches]) for _ in range(2))
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))


def share_without_gradient(model, batches, c):
    """The share of images whose cross-entropy has gradient 0."""
    without = []
    for x, y in batches:
        loss = partial(F.cross_entropy, reduction="none")
        _, _, grad = autoattack.differentiate(model, x, loss, y)
        without.append((grad == 0).flatten(1).all(1))
    return float(torch.cat(without).double().mean())


def share_off_slope(model, batches, c, h=1e-7):
    """The share of images with |(f(x + h v) - f(x - h v)) / 2 h - <grad f, v>| / |grad f| >= 1e-3.

    f is a random sum of logits, v a random direction; float64. No gradient counts as an error.
    """
    model = copy.deepcopy(model).double()
    torch.manual_seed(train.seed_of(c.seed, "direction"))
    errors = []
    for x, _ in batches:
        x = x.double()
        v = torch.randint_like(x, 2).double() * 2 - 1
        mix = torch.randn(len(x), c.classes, dtype=x.dtype, device=x.device)
        _, _, grad = autoattack.differentiate(model, x, vecdot, mix)
        rise = vecdot(train.scores(model, x + h * v) - train.scores(model, x - h * v), mix)
        slope = (grad * v).flatten(1).sum(1)
        errors.append((rise / (2 * h) - slope).abs() / grad.flatten(1).norm(dim=1))
    return float((~(torch.cat(errors) < 1e-3)).double().mean())
