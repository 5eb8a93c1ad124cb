# SPDX-License-Identifier: MIT
"""train.py with a GELU that does not fall: is it GELU's dip that misleads the training attack?

    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py model  TRAIN'S FLAGS
    OMP_NUM_THREADS=1 python results/analysis/flat_gelu.py attack TRAIN'S FLAGS

GELU(a) = a Phi(a) falls until a = -0.7518 and rises from there on. Flat GELU is the same above that
place and constant below: GELU(max(a, -0.7518)). "model" puts it in the place of GELU everywhere.
"attack" leaves the model as it is; only PGD, in training and in the choice of Best, climbs the loss
of the model with flat GELU, at the same cost.
"""
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import s4_adv                                                                   # noqa: E402
import train                                                                    # noqa: E402

LOWEST = -0.7517915                             # where GELU has its minimum, GELU'(a) = 0


@contextmanager
def flat_gelu():
    """Within it every nn.GELU is flat below its minimum."""
    plain = nn.GELU.forward
    nn.GELU.forward = lambda self, a: F.gelu(a.clamp(min=LOWEST))
    try:
        yield
    finally:
        nn.GELU.forward = plain


def flat_pgd(*args, **kw):
    """PGD on the model with flat GELU."""
    with flat_gelu():
        return plain_pgd(*args, **kw)


plain_pgd = s4_adv.pgd


if __name__ == "__main__":
    where, *words = sys.argv[1:]
    if where == "attack":
        s4_adv.pgd = flat_pgd
        sys.exit(train.main(words))
    with flat_gelu():
        sys.exit(train.main(words))
