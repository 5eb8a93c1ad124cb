# SPDX-License-Identifier: MIT
"""The floor of --bench: what a model must calculate, and how fast this machine's CPU can do so.

    found = operations(model, L=1024, g=11, w=1)        # a PGD-10 AT step, for each image
    at_least = seconds(model, 1024, 11, 1, rates(1024))
"""
import time
import timeit
from collections import Counter
from functools import partial

import torch
from torch import nn

import attention_adv
import mamba_adv
import s4_adv


def operations(model, L, g, w):
    """{kind: how many}: what the blocks of a model do to an image of L tokens, at the least.

    g  int  passes to the logits and back to the image
    w  int  gradients by the weights besides

    products    (2 g + w) L W         of each Linear and Conv of W weights
                (2 g + w) L 4 H P     of B and C of S5
                3 g L^2 (Z + V)       of Mega's attention: both of its factors have a gradient
    FFTs        4 g H                 of a convolution: S4, DSS, Mega's EMA
    scan        (2 g + w) L 4 P       of S5, see s4_adv.Scan
                (12 g + w) L d N      of Mamba, see mamba_adv.SelectiveScan

    Products and scan in multiply-adds, a complex one is four; FFTs real, of length 2L. Not counted:
    activations, norms, exponentials, copies, and kernels, which do not grow with the batch.
    """
    found = Counter()
    for part in model.blocks.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d)):
            found["products"] += (2 * g + w) * L * part.weight.numel()
        elif isinstance(part, s4_adv.S5):
            found["products"] += (2 * g + w) * L * (part.B.numel() + part.C.numel())
            found["scan"] += (2 * g + w) * L * 4 * len(part.imag)
        elif isinstance(part, attention_adv.Mega):
            H, Z, V, _ = part.sizes
            found["products"] += 3 * g * L ** 2 * (Z + V)
            found["FFTs"] += 4 * g * H
        elif isinstance(part, (s4_adv.S4, s4_adv.DSS)):
            found["FFTs"] += 4 * g * len(part.D)
        elif isinstance(part, mamba_adv.Mamba):
            found["scan"] += (12 * g + w) * L * part.log_minus_A.numel()
    return found


def rates(L):
    """{kind: operations in a CPU second}, the best of 50 tries: products of 1024 x 1024 matrices,
    FFTs of 256 rows, and for the scan three times 2^16 numbers, which the cache holds."""
    square = torch.rand(1024, 1024)
    rows = torch.rand(256, 2 * L)
    h, a, b = torch.rand(3, 2 ** 16)
    tries = {"products": (1024 ** 3, partial(torch.mm, square, square)),
             "FFTs": (len(rows), partial(torch.fft.rfft, rows)),
             "scan": (len(h), partial(h.addcmul_, a, b))}
    return {kind: n / min(timeit.repeat(job, timer=time.process_time, number=1, repeat=50))
            for kind, (n, job) in tries.items()}


def seconds(model, L, g, w, rate):
    """CPU seconds that the operations of one image take at these rates."""
    return sum(n / rate[kind] for kind, n in operations(model, L, g, w).items())
