# SPDX-License-Identifier: MIT
"""How rugged is the loss around an image, so that the steps of an attack matter?

A constant step of sign gradients cannot settle: where the gradient turns within one step, the
attack jumps to and fro. A step that falls to 0 settles. On a smooth loss both reach the same.
That this is why falling steps train more robust models did not hold: results/README.md, (h).

Papers     PGD   Madry et al. 2018, arXiv 1706.06083
           APGD  Croce & Hein 2020, arXiv 2003.01690, whose step halves where the loss stalls
"""
import torch
import torch.nn.functional as F

from lab.autoattack import apgd_ce
from s4_adv import ascend, pgd, summed_cross_entropy


def falling_steps(eps, steps):
    """Steps that fall linearly and sum to 2 eps: .20, .16, .12, .08, .04 for eps 0.3, K = 5."""
    return [4 * eps * (steps - k) / (steps * (steps + 1)) for k in range(steps)]


def gradient(model, x, y):
    """grad_x CE(model(x), y), one row for each image, (B, C h w)."""
    x = x.clone().requires_grad_()
    grad, = torch.autograd.grad(summed_cross_entropy(model, y)(x), x)
    return grad.flatten(1)


def ruggedness(model, x, y, eps):
    """{quantity: value}: how far a gradient holds, and what short attacks miss.

    model, x, y  a classifier, images (B, C, h, w) in [0, 1], labels (B,)
    eps          float  radius, pixel units

    cosine     of grad CE at x and at x + alpha sign grad CE, alpha = eps / 10 or eps / 3: the mean
               over images; 1 where the loss is linear
    loss       mean CE of the images after PGD; APGD-CE leaves an image as soon as it is broken, so
               that its losses would not compare
    accuracy   on the same points, and under APGD-CE (100 steps)
    """
    here = gradient(model, x, y)
    numbers = {}
    for part in (10, 3):
        x_next = ascend(model, summed_cross_entropy(model, y), x, start=x, eps=eps,
                        alpha=eps / part, steps=1)
        cosine = F.cosine_similarity(here, gradient(model, x_next, y), eps=1e-30)
        numbers[f"cosine of gradients, a step of eps/{part} apart"] = cosine.mean()
    points = {"clean": x,
              "PGD-5, constant": pgd(model, x, y, eps, eps / 3, 5),
              "PGD-5, falling": pgd(model, x, y, eps, falling_steps(eps, 5), 5),
              "PGD-50, constant": pgd(model, x, y, eps, eps / 3, 50),
              "PGD-50, falling": pgd(model, x, y, eps, falling_steps(eps, 50), 50),
              "APGD-CE": apgd_ce(model, x, y, eps)}
    for name, x_adv in points.items():
        with torch.no_grad():
            z = model(x_adv)
        if name != "APGD-CE":
            numbers[f"loss, {name}"] = F.cross_entropy(z, y)
        numbers[f"accuracy, {name}"] = (z.argmax(1) == y).double().mean()
    return numbers
