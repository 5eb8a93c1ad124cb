# SPDX-License-Identifier: MIT
"""Adaptive Scaling (AdS), and what may stand in its place to tell what AdS does.

    y ── AdS ──> s(y) * y + t(y),    s(y) = act(W1 y + b1),  t(y) = act(W2 y + b2)

    from ads import AdaptiveScaling
    scaled = AdaptiveScaling(128)(y)                # y (..., 128) -> (..., 128)

Paper: Qi et al., Exploring Adversarial Robustness of Deep State Space Models, NeurIPS 2024
(arXiv 2406.05532): in S4 and DSS AdS stands between the sequence map and the output Linear of each
block; in S5, Mamba and Mega it is ours. Without AdS a block of S4 or DSS is linear. So AdS also is
the block's first non-linearity, and with 128 channels it more than doubles the model's parameters.
`middle` offers controls that separate these effects, and each half of AdS alone.

Glossary   y  (..., d_model)  output of a sequence map        d  d_model, the number of channels
           s  (..., d_model)  scale, one number per token and channel
           t  (..., d_model)  shift, likewise
Not here   anything else that the three scripts share: that is repeated in each of them.
"""
import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu}
CONTROLS = ("relu", "gelu", "glu", "glu-relu", "mlp", "mlp-relu", "scale", "shift")


class AdaptiveScaling(nn.Module):
    """act(W1 y + b1) * y + act(W2 y + b2).             Qi et al. 2024 (2406.05532), AdS

    d_model     int    channels d; 2 (d^2 + d) parameters
    activation  str    "relu" | "sigmoid" | "tanh", the same for scale and shift; "gelu" is ours
    only        str | None  "scale": t = 0;  "shift": s = 1;  (d^2 + d) parameters. An ablation

    (..., d_model) -> (..., d_model), token by token.   ValueError for an unknown name.
    """

    def __init__(self, d_model, activation="relu", only=None):
        super().__init__()
        if only not in (None, "scale", "shift"):
            raise ValueError(f"only={only!r} is unknown; choose scale or shift, or leave it out")
        if activation not in ACTIVATIONS:
            raise ValueError(f"AdS activation {activation!r} is unknown; choose one of "
                             f"{', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.scale = nn.Linear(d_model, d_model) if only != "shift" else None      # W1, b1
        self.shift = nn.Linear(d_model, d_model) if only != "scale" else None      # W2, b2

    def scale_and_shift(self, y):
        """s(y), t(y): each (..., d_model), the two halves of AdS."""
        act = ACTIVATIONS[self.activation]
        s = act(self.scale(y)) if self.scale else torch.ones_like(y)
        t = act(self.shift(y)) if self.shift else torch.zeros_like(y)
        return s, t

    def forward(self, y):
        y = y.contiguous()                                                  # read by three products
        s, t = self.scale_and_shift(y)
        return s * y + t


def middle(d_model, ads=None, control=None):
    """What stands in the middle of a block: AdS, a control, or nothing (the paper's pure SSM).

    d_model  int         channels d at that place, between sequence map and output Linear
    ads      str | None  the activation of AdS: "relu" | "sigmoid" | "tanh" | "gelu"
    control  str | None  "relu", "gelu"    one plain non-linearity, no parameters
                         "glu"             GELU, Linear(d, 2d), GLU: the usual S4 block
                         "mlp"             Linear, GELU, Linear: no product with y
                         "glu-relu",       these two with AdS's ReLU in the place of GELU
                         "mlp-relu"
                         "scale", "shift"  one half of ReLU-AdS: s(y) * y, y + t(y)

    "glu", "mlp" and their ReLU forms have as many parameters as AdS. GELU(a) falls until
    a = -0.75. On MNIST at eps 0.3 this dip misleads PGD of equal steps: results/README.md, (h).
    Returns a module (..., d_model) -> (..., d_model).  ValueError for both at once, unknown names.
    """
    if ads and control:
        raise ValueError(f"ads={ads!r} and control={control!r} name two things for one place; "
                         "give one of them")
    if ads:
        return AdaptiveScaling(d_model, ads)
    activation = nn.ReLU() if control in ("relu", "glu-relu", "mlp-relu") else nn.GELU()
    if control in ("relu", "gelu"):
        return activation
    if control in ("glu", "glu-relu"):
        return nn.Sequential(activation, nn.Linear(d_model, 2 * d_model), nn.GLU())
    if control in ("mlp", "mlp-relu"):
        return nn.Sequential(nn.Linear(d_model, d_model), activation, nn.Linear(d_model, d_model))
    if control in ("scale", "shift"):
        return AdaptiveScaling(d_model, "relu", only=control)
    if control:
        raise ValueError(f"control {control!r} is unknown; choose one of {', '.join(CONTROLS)}")
    return nn.Identity()
