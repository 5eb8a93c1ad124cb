# SPDX-License-Identifier: MIT
"""--checks: eleven looks for masked gradients. None proves that gradients tell the truth; each
catches a way in which they have not.

Sources    Carlini et al. 2019, On Evaluating Adversarial Robustness (1902.06705), Sec. 5;
           Athalye et al. 2018, Obfuscated Gradients Give a False Sense of Security (1802.00420)
"""
import copy
import functools
import math

import torch
import torch.nn.functional as F

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
    y = labels[:n]
    slack = max(0.02, 1 / n) + 1e-9
    found, known, errors = [], {}, []

    def attempt(measure, *args):
        try:
            return measure(model, x, y, c, *args)
        except (train.UserError, FloatingPointError) as e:
            errors.append(str(e))
            return math.nan                     # which passes no comparison

    def left(attack, eps=None, logits=1.0):
        """The share of images that an attack leaves right, at a radius, with scaled logits."""
        key = attack + (f" at eps {train.show(eps)}" if eps is not None else "")
        key += f", logits x {logits:g}" if logits != 1 else ""
        if key not in known:
            known[key] = attempt(share_left, attack, eps, logits)
        numbers[key] = known[key]
        return known[key]

    def passes(name, condition):
        passed = bool(condition) and not errors
        shown = {"error": errors[-1]} if errors else dict(numbers)
        found.append({"name": name, "passed": passed, "numbers": shown})
        train.say(f"{'pass' if passed else 'FAIL'}  {name:36}  " + "; ".join(
            f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in shown.items()))
        numbers.clear()
        errors.clear()

    def falls(*shares):
        return all(b <= a + slack for a, b in zip(shares, shares[1:]))

    numbers = {}                                # of the check at hand
    train.say(f"\nchecks for masked gradients, n = {n:,}")
    with train.frozen(model):
        gap = numbers["largest relative difference"] = attempt(repetition_gap)
        passes("forward deterministic and finite", gap < 1e-6)
        share = numbers["images without"] = attempt(share_without_gradient)
        passes("gradient not zero", share <= 0.01)
        share = numbers["images off by 0.1 %"] = attempt(share_off_the_slope, numbers)
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
        passes("noise weaker than pgd-10", left("pgd-10") < left(NOISE) or left(NOISE) == 0)
    return found


def by_batch(c, function, x, y):
    """function(x, y) of all images, the batches joined."""
    return torch.cat([function(*batch) for batch in zip(x.split(c.batch_size),
                                                        y.split(c.batch_size))])


def share_left(model, x, y, c, attack, eps, logits):
    """The share of images that an attack leaves right."""
    at = c if eps is None else train.at_radius(c, eps)

    def noise(model, x, y):
        return (x + at.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    quick = {WHITE: [lambda *batch: autoattack.apgd_ce(*batch, at.eps, 50)],
             TARGETED: [lambda *batch: autoattack.apgd_t(*batch, at.eps, 3, 50)],
             BLACK: [lambda *batch: autoattack.square(*batch, at.eps, 500, 500)],
             NOISE: 10 * [noise]}
    attacks = quick.get(attack) or train.attacks_of(attack, at)

    def seed(k):
        return train.seed_of(c.seed, attack, k)

    def right(x, y):
        return train.still_right(model, x, y, attacks, seed)[-1]
    hook = model.register_forward_hook(lambda module, args, z: z * logits)
    try:
        return float(by_batch(c, right, x, y).double().mean())
    finally:
        hook.remove()


def repetition_gap(model, x, y, c):
    """The largest difference of two forward passes, over the largest logit."""
    with torch.no_grad():
        first = by_batch(c, lambda x, y: train.scores(model, x), x, y)
        second = by_batch(c, lambda x, y: train.scores(model, x), x, y)
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))


def share_without_gradient(model, x, y, c):
    """The share of images whose cross-entropy has gradient 0."""
    def size(x, y):
        loss = functools.partial(F.cross_entropy, reduction="none")
        _, _, grad = autoattack.differentiate(model, x, loss, y)
        return grad.abs().flatten(1).amax(1)
    return float((by_batch(c, size, x, y) == 0).double().mean())


def share_off_the_slope(model, x, y, c, numbers, h=1e-7):
    """(f(x + h v) - f(x - h v)) / 2 h against <grad f(x), v>, f a random sum of logits, in float64:
    the share of images that is off by more than 0.1 %. numbers gets the median error."""
    model = copy.deepcopy(model).double()

    def error(x, y):
        x = x.double()
        v = torch.randint_like(x, 2).double() * 2 - 1
        mix = torch.randn(len(x), c.classes, dtype=x.dtype, device=x.device)

        def mixed(z):
            return (z * mix).sum(1)
        _, _, grad = autoattack.differentiate(model, x, mixed)
        with torch.no_grad():
            rise = (mixed(model(x + h * v)) - mixed(model(x - h * v))) / (2 * h)
        return (rise - (grad * v).flatten(1).sum(1)).abs() / grad.flatten(1).norm(dim=1)
    torch.manual_seed(train.seed_of(c.seed, "direction"))
    with train.frozen(model):
        errors = by_batch(c, error, x, y)
    numbers["median error"] = float(errors.median())
    return float((~(errors < 1e-3)).double().mean())                        # NaN: no gradient
