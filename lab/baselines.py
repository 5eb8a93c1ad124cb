# SPDX-License-Identifier: MIT
"""Two plain networks for the same protocol: how far is a state space model from them?

    python train.py --model cnn --d-model 20 --n-layers 2 --dataset mnist
    python train.py --model vit --d-model 32 --d-hidden 128 --n-layers 2 --patch-size 4

Papers     ViT  Dosovitskiy et al. 2021, arXiv 2010.11929    CNN  Madry et al. 2018, 1706.06083
Glossary   x image (B, C, h, w), H = d_model channels, L tokens
Not here   attacks and losses: s4_adv.py's are taken. AdS: it belongs behind a sequence map.
"""
import torch
import torch.nn.functional as F
from torch import nn

import train


def build(c):
    """The network that a run's settings describe."""
    channels, h, w = c.shape
    if c.model == "cnn":
        return Cnn(channels, c.classes, (h, w), c.d_model, c.n_layers)
    return ViT(channels, c.classes, (h, w), c.d_model, c.n_layers, c.patch_size, c.d_hidden)


def check(c):
    """UserError for settings that these networks have no place for."""
    _, h, w = c.shape
    if c.ads or c.control:
        raise train.UserError(f"--model {c.model}: it has no sequence map, behind which --ads or "
                              "--control could stand")
    if c.model == "vit" and c.d_model % 4:
        raise train.UserError(f"--model vit: it has 4 heads; --d-model {c.d_model} must be "
                              "divisible by 4")
    if c.model == "cnn" and (h % 2 ** c.n_layers or w % 2 ** c.n_layers):
        raise train.UserError(f"--model cnn: its {c.n_layers} --n-layers halve an image of "
                              f"{h} x {w} pixels too often")


class Cnn(nn.Module):
    """n x (Conv 4 x 4 of stride 2, ReLU), Linear: as Madry et al. 2018, smaller, without pooling.

    in_channels, n_classes  int         colours of an image, classes
    image_size              (int, int)  height and width in pixels, divisible by 2^n_layers
    d_model, n_layers       int         channels of the first layer, doubled by each; layers

    Images (B, C, h, w) in [0, 1] -> logits (B, n_classes).  ValueError for another size.
    """

    def __init__(self, in_channels, n_classes, image_size, d_model=20, n_layers=2):
        super().__init__()
        h, w = image_size
        shrink = 2 ** n_layers
        if h % shrink or w % shrink:
            raise ValueError(f"{n_layers} layers of stride 2 do not divide an image of {h} x {w}")
        channels = [in_channels] + [d_model * 2 ** k for k in range(n_layers)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1)
                                    for a, b in zip(channels, channels[1:]))
        self.head = nn.Linear(channels[-1] * (h // shrink) * (w // shrink), n_classes)

    def embed(self, x):
        """The first, affine layer, (B, H, h/2, w/2)."""
        return self.layers[0](x)

    def logits(self, z):
        z = F.relu(z)
        for layer in self.layers[1:]:
            z = F.relu(layer(z))
        return self.head(z.flatten(1))

    def forward(self, x):
        return self.logits(self.embed(x))


class ViT(nn.Module):
    """Patches, learned positions, n x pre-norm Transformer layer, mean over tokens, Linear.

    in_channels, n_classes  int         colours of an image, classes
    image_size, patch_size  (int, int), int         pixels; a patch is a token
    d_model, n_layers       int         channels H, divisible by 4 heads; layers
    d_hidden                int         channels of the feed-forward layers, between which is a GELU

    Images (B, C, h, w) in [0, 1] -> logits (B, n_classes). As Dosovitskiy et al. 2021, Sec. 3.1,
    but for the mean in the place of a class token, and no dropout.
    """

    def __init__(self, in_channels, n_classes, image_size, d_model=32, n_layers=2, patch_size=4,
                 d_hidden=128):
        super().__init__()
        h, w = image_size
        if d_model % 4:
            raise ValueError(f"{d_model} channels are not divisible by the 4 heads")
        self.patches = nn.Conv2d(in_channels, d_model, patch_size, patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(h * w // patch_size ** 2, d_model))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, 4, d_hidden, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True)
            for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)

    def embed(self, x):
        """Images -> tokens (B, L, H), affine."""
        return self.patches(x).flatten(2).transpose(1, 2) + self.positions

    def logits(self, z):
        for block in self.blocks:
            z = block(z)                                                    # (B, L, H)
        return self.head(self.norm(z).mean(1))

    def forward(self, x):
        return self.logits(self.embed(x))
