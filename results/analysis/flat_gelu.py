# SPDX-License-Identifier: MIT
"""train.py with a GELU that never falls: is it GELU's dip that misleads the training attack?

    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py model  TRAIN'S FLAGS
    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py attack TRAIN'S FLAGS
    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py slope  TRAIN'S FLAGS
    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py measure DATA_DIR best.pt [best.pt ...]

GELU(a) = a Phi(a) falls until a = -0.7518 and rises from there on. Flat GELU is the same above that
place and constant below: GELU(max(a, -0.7518)). SiLU(a) = a sigmoid(a), of Mega and Mamba, likewise
at -1.2785.

model    the flat ones stand in their place everywhere: in training, attacks and evaluation
attack   the model stays as it is; only PGD, in training and in the choice of Best, climbs the loss
         of the model with flat GELU, at the same cost (models of s4_adv.py)
slope    likewise, but PGD's forward pass stays as it is, too: only its backward pass takes the
         derivative of flat GELU, which is 0 where that of GELU is negative
measure  what PGD-50 leaves of the first 200 test images of MNIST, with steps of eps/3 and falling
         from 2 eps, where PGD takes the model as it is; "attack"; "slope"; "left": the derivative
         0 where that of GELU lies between 0 and 1/2, for comparison
"""
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import s4_adv                                                                   # noqa: E402
import train                                                                    # noqa: E402
from ads import ACTIVATIONS                                                     # noqa: E402
from lab.steps import falling_steps                                             # noqa: E402

PLAIN_GELU, PLAIN_SILU, plain_pgd = F.gelu, F.silu, s4_adv.pgd
DIP = {PLAIN_GELU: -0.7517915, PLAIN_SILU: -1.2784645}                 # where the derivative is 0


def flat(activation, a, *args, **kw):
    """The activation, constant below its dip."""
    return activation(a.clamp(min=DIP[activation]), *args, **kw)


def slope(activation, a, *args, **kw):
    """The activation, with the derivative of its flat form."""
    rising = flat(activation, a)
    return rising + (activation(a) - rising).detach()


def left(activation, a, *args, **kw):
    """The activation, with derivative 0 between its dip and 0."""
    value = activation(a)
    return torch.where((a > DIP[activation]) & (a < 0), value.detach(), value)


@contextmanager
def replaced(form):
    """Within it GELU and SiLU have another form: flat, slope or left."""
    F.gelu, F.silu = partial(form, PLAIN_GELU), partial(form, PLAIN_SILU)
    ACTIVATIONS["gelu"] = F.gelu                                        # that of AdS
    try:
        yield
    finally:
        F.gelu, F.silu = PLAIN_GELU, PLAIN_SILU
        ACTIVATIONS["gelu"] = F.gelu


def pgd_with(form, *args, **kw):
    """PGD on the model with that form of GELU."""
    with replaced(form) if form else nullcontext():
        return plain_pgd(*args, **kw)


def measure(data_dir, files):
    """One line for each checkpoint."""
    *_, x, y = train.torchvision_data("mnist", data_dir)
    x, y = x[:200] / 255, y[:200]
    heads = ["as it is", "attack", "slope", "left"]
    print(f"{'PGD-50 of eps/3':>30}{'PGD-50 from 2 eps':>40}")
    print(f"{'clean':>7}" + "".join(f"{head:>10}" for head in 2 * heads))
    for file in files:
        model, eps = train.load(file), 0.3
        cells = [train.hits(model, x, y)]
        for alpha in (eps / 3, falling_steps(2 * eps, 50)):
            for form in (None, flat, slope, left):
                torch.manual_seed(0)
                x_adv = pgd_with(form, model, x, y, eps, alpha, 50)
                cells.append(train.hits(model, x_adv, y))
        row = [f"{100 * right.double().mean():.1f}" for right in cells]
        print(f"{row[0]:>7}" + "".join(f"{cell:>10}" for cell in row[1:]) + f"  {file}", flush=True)


def main(where, *words):
    if where == "measure":
        return measure(words[0], words[1:])
    if where == "model":
        with replaced(flat):
            return train.main(words)
    s4_adv.pgd = train.pgd = partial(pgd_with, {"attack": flat, "slope": slope}[where])
    return train.main(words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
