# SPDX-License-Identifier: MIT
"""How long must the steps of an attack be?

A step of alpha sign(grad) moves every pixel by alpha. Short steps climb to the maximum next to
their start. A first step of eps or more leaves it; steps that fall to 0 then settle elsewhere.
APGD therefore begins with 2 eps. A model may be robust to the short steps alone:
results/README.md, (h).

Papers     PGD   Madry et al. 2018, arXiv 1706.06083
           APGD  Croce & Hein 2020, arXiv 2003.01690, Sec. 3
"""
import torch
import torch.nn.functional as F

from lab.autoattack import apgd_ce
from s4_adv import ascend, pgd, summed_cross_entropy

# Lengths of a first step, in units of eps.
FIRST = {"eps/10": 1 / 10, "eps/3": 1 / 3, "2 eps/3": 2 / 3, "eps": 1, "2 eps": 2}


def falling_steps(first, steps):
    """Steps that fall linearly to 0: .20, .16, .12, .08, .04 for first 0.2, steps 5."""
    return [first * (steps - k) / steps for k in range(steps)]


def gradient(model, x, y):
    """grad_x CE(model(x), y), one row for each image, (B, C h w)."""
    x = x.clone().requires_grad_()
    grad, = torch.autograd.grad(summed_cross_entropy(model, y)(x), x)
    return grad.flatten(1)


def step_lengths(model, x, y, eps):
    """{quantity: value}: what short and long steps leave of an accuracy; how far a gradient holds.

    model, x, y  a classifier, images (B, C, h, w) in [0, 1], labels (B,)
    eps          float  radius, pixel units

    cosine     of grad CE at x and at x + alpha sign grad CE, alpha = eps / 10 or eps / 3: the mean
               over images; 1 where the loss is linear
    loss       mean CE of the images after PGD; APGD-CE leaves an image as soon as it is broken, so
               that its losses say nothing
    accuracy   on the same points, and under APGD-CE (100 steps)
    """
    here = gradient(model, x, y)
    numbers = {}
    for name in ("eps/10", "eps/3"):
        x_next = ascend(model, summed_cross_entropy(model, y), x, start=x, eps=eps,
                        alpha=FIRST[name] * eps, steps=1)
        cosine = F.cosine_similarity(here, gradient(model, x_next, y), eps=1e-30)
        numbers[f"cosine of gradients, a step of {name} apart"] = cosine.mean()
    points = {"clean": x,
              "PGD-5 of eps/3": pgd(model, x, y, eps, eps / 3, 5),
              "PGD-5 falling from 2 eps/3": pgd(model, x, y, eps, falling_steps(2 / 3 * eps, 5), 5),
              "PGD-50 of eps/3": pgd(model, x, y, eps, eps / 3, 50)}
    for name, first in FIRST.items():
        alphas = falling_steps(first * eps, 50)
        points[f"PGD-50 falling from {name}"] = pgd(model, x, y, eps, alphas, 50)
    points["APGD-CE"] = apgd_ce(model, x, y, eps)
    for name, x_adv in points.items():
        with torch.no_grad():
            z = model(x_adv)
        if name != "APGD-CE":
            numbers[f"loss, {name}"] = F.cross_entropy(z, y)
        numbers[f"accuracy, {name}"] = (z.argmax(1) == y).double().mean()
    return numbers
