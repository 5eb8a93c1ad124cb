# SPDX-License-Identifier: MIT
"""train.py with a GELU that never falls: is it GELU's dip that misleads the training attack?

    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py model  TRAIN'S FLAGS
    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py attack TRAIN'S FLAGS
    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py measure DATA_DIR best.pt [best.pt ...]

GELU(a) = a Phi(a) falls until a = -0.7518 and rises from there on. Flat GELU is the same above that
place and constant below: GELU(max(a, -0.7518)). SiLU(a) = a sigmoid(a), of Mega and Mamba, likewise
at -1.2785.

model    the flat ones stand in their place everywhere: in training, attacks and evaluation
attack   the model stays as it is; only PGD, in training and in the choice of Best, climbs the loss
         of the model with flat GELU, at the same cost (models of s4_adv.py)
measure  what PGD-50 leaves of the first 200 test images of MNIST, where it climbs the loss of the
         model as it is, and of that with flat GELU: with steps of eps/3, and falling from 2 eps
"""
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import s4_adv                                                                   # noqa: E402
import train                                                                    # noqa: E402
from lab.steps import falling_steps                                             # noqa: E402

PLAIN_GELU, PLAIN_SILU, plain_pgd = F.gelu, F.silu, s4_adv.pgd


def flat(activation, lowest):
    """The activation, constant below the place where it has its minimum."""
    return lambda a, *args, **kw: activation(a.clamp(min=lowest), *args, **kw)


@contextmanager
def flat_gelu():
    """Within it GELU and SiLU are flat below their minima."""
    F.gelu, F.silu = flat(PLAIN_GELU, -0.7517915), flat(PLAIN_SILU, -1.2784645)
    try:
        yield
    finally:
        F.gelu, F.silu = PLAIN_GELU, PLAIN_SILU


def flat_pgd(*args, **kw):
    """PGD on the model with flat GELU."""
    with flat_gelu():
        return plain_pgd(*args, **kw)


def measure(data_dir, files):
    """One line for each checkpoint."""
    *_, x, y = train.torchvision_data("mnist", data_dir)
    x, y = x[:200] / 255, y[:200]
    print("         PGD-50 of eps/3        PGD-50 from 2 eps")
    print("  clean  as it is  flat GELU    as it is  flat GELU")
    for file in files:
        model, eps = train.load(file), 0.3
        cells = [train.hits(model, x, y)]
        for alpha in (eps / 3, falling_steps(2 * eps, 50)):
            for attack in (plain_pgd, flat_pgd):
                torch.manual_seed(0)
                cells.append(train.hits(model, attack(model, x, y, eps, alpha, 50), y))
        row = [f"{100 * right.double().mean():.1f}" for right in cells]
        print(f"{row[0]:>7}{row[1]:>10}{row[2]:>11}{row[3]:>12}{row[4]:>11}  {file}", flush=True)


def main(where, *words):
    if where == "measure":
        return measure(words[0], words[1:])
    if where == "attack":
        s4_adv.pgd = flat_pgd
        return train.main(words)
    with flat_gelu():
        return train.main(words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
