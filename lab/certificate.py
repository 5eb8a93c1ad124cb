# SPDX-License-Identifier: MIT
"""A certificate: the radius within which a classifier of pure S4, DSS or S5 cannot be fooled.

Such a classifier is linear but for its LayerNorms. A box |v - c| <= r of inputs is pushed through
it, layer by layer, as in Gowal et al. 2018 (1810.12715), Sec. 3: an affine map W takes c to W c + b
and r to |W| r. A whole block with its residual is one such map, so this is its gain (lab/theory.py,
P1), token by token, and exact. `python train.py --analyse` prints the radius. All in float64.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from lab.theory import kernel
from s4_adv import S5


def linear_block(block, L):
    """M (L, H, H) with z + Block(z) = sum_s M_s z_{t-s} + out.bias.  ValueError if it has AdS."""
    if not isinstance(block.middle, nn.Identity):
        raise ValueError(f"a block with {type(block.middle).__name__} is not linear")
    K = kernel(block.ssm, L)
    M = block.out.weight @ (K if isinstance(block.ssm, S5) else torch.diag_embed(K.T))
    M[0] += torch.eye(M.shape[1]).to(M)
    return M


def box_through(W, b, c, r):
    """The box |v - c| <= r behind the affine map W, b: centre W c + b, radius |W| r.

    W  (H, n) on tokens, or (L, H, H) convolved with them      c, r  (B, L, n)
    float64 rounds: the radius is widened by 1e-9 of itself and 1e-11.
    """
    def apply(W, v):
        if W.dim() == 2:
            return v @ W.T
        L = len(W)
        products = torch.einsum("wij,bwj->bwi", torch.fft.rfft(W, 2 * L, 0),
                                torch.fft.rfft(v, 2 * L, 1))
        return torch.fft.irfft(products, 2 * L, 1)[:, :L]
    return apply(W, c) + b, (1 + 1e-9) * apply(W.abs(), r) + 1e-11


def normalised(c, r, e):
    """Centre and radius of v / sqrt(mean v^2 + e) over the box |v - c| <= r: LayerNorm without its
    mean, which is linear. c, r (..., H), e float.                                  Derived here

    f(v_i, R) = v_i / sqrt((v_i^2 + R) / H + e) rises with v_i, and moves towards 0 as R, the sum of
    the other squares, grows; in a box v_i and R are free of each other. So the ends lie at corners:
    no other box is smaller, and the variance needs no bound from outside.
    """
    def f(v, R):
        return v / ((v * v + R) / v.shape[-1] + e).sqrt()

    def sum_of_others(squares):
        return (squares.sum(-1, keepdim=True) - squares).clamp(min=0)
    least = sum_of_others((c.abs() - r).clamp(min=0) ** 2)
    most = sum_of_others((c.abs() + r) ** 2)
    low = f(c - r, torch.where(c - r < 0, least, most))
    high = f(c + r, torch.where(c + r > 0, least, most))
    return (low + high) / 2, (high - low) / 2


def certified_margin(model, x, y, eps):
    """A lower bound of z_y - max_{k != y} z_k over |x' - x|_inf <= eps, x' in [0, 1].

    model  s4_adv.Classifier without AdS, in float64         x  (B, C, h, w)  images, y (B,) labels
    eps    float | (B, 1, 1, 1)  radius, pixel units

    Returns (B,): above 0, no x' is misclassified.  ValueError: see linear_block.
    The mean that LayerNorm takes off is the matrix pi, put into the affine map in front of it.
    """
    H = model.head.in_features
    P = model.patches.kernel_size[0]
    pi = torch.eye(H).to(x) - 1 / H
    low = (x - eps).clamp(0, 1)
    high = (x + eps).clamp(0, 1)
    c = F.unfold((low + high) / 2, P, stride=P).mT                          # (B, L, C P^2)
    r = F.unfold((high - low) / 2, P, stride=P).mT
    c, r = box_through(pi @ model.patches.weight.flatten(1), pi @ model.patches.bias, c, r)
    for norm, block in zip([model.norm, *model.norms], [*model.blocks, None]):
        c, r = normalised(c, r, norm.eps)
        c, r = c * norm.weight + norm.bias, r * norm.weight.abs()
        if block is not None:
            M = linear_block(block, c.shape[1])
            c, r = box_through(pi @ M, pi @ block.out.bias, c, r)           # (B, L, H)
    W = model.head.weight[y, None] - model.head.weight                      # (B, n_classes, H)
    b = model.head.bias[y, None] - model.head.bias                          # (B, n_classes)
    gap = b + (W @ c.mean(1)[..., None] - W.abs() @ r.mean(1)[..., None])[..., 0]
    return gap.scatter(1, y[:, None], math.inf).amin(1)


def certified_radius(model, x, y, steps=30):
    """The largest eps with certified_margin > 0, (B,), by bisection of [0, 1]; 0 if x is wrong."""
    low = torch.zeros(len(x), 1, 1, 1).to(x)
    for k in range(1, steps + 1):
        half = low + 2.0 ** -k
        certified = certified_margin(model, x, y, half) > 0
        low = torch.where(certified.view_as(low), half, low)
    return low.flatten()
