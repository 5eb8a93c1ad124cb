# SPDX-License-Identifier: MIT
"""The peers of --bench: layers of other packages that compute what ours do, with our weights.

    has_peer(c) and put_peers(c, model)         # c: the settings of a run, see train.py

A peer is a function (settings, block of a model) -> the block with the package's layer. Packages
are imported where they are used: each may be absent.
"""
from types import SimpleNamespace

import torch
from torch import nn

import train


def s5_peer(c, block):
    """The block with s5-pytorch's layer and the weights of its s4_adv.S5."""
    from s5 import S5
    layer = block.ssm
    weights = {"Lambda": torch.complex(-torch.exp(layer.log_minus_real), layer.imag),
               "B": layer.B, "C": torch.view_as_complex(layer.C), "D": layer.D,
               "log_step": layer.log_dt}
    block.ssm = S5(c.d_model, c.d_state)
    for name, value in weights.items():
        setattr(block.ssm.seq, name, nn.Parameter(value.detach().clone()))
    return block


def mamba_peer(c, block):
    """mambapy's layer with the weights of a mamba_adv.Mamba."""
    from mambapy.mamba import MambaBlock, MambaConfig
    peer = MambaBlock(MambaConfig(d_model=c.d_model, n_layers=1, d_state=c.d_state)).to(block.D)
    # Both list their weights in the same order, under other names.
    peer.load_state_dict(dict(zip(peer.state_dict(), block.state_dict().values())))
    return peer


def attention_peer(c, block):
    """transformers' Mega block with the weights of an attention_adv.Block.

    Its defaults make it another function: ScaleNorm before the layers, dropout, rotary bias.
    """
    from transformers.models.deprecated.mega.configuration_mega import MegaConfig
    from transformers.models.deprecated.mega.modeling_mega import MegaBlock

    class Peer(MegaBlock):
        def forward(self, z):                                               # tokens come first
            return super().forward(z.transpose(0, 1))[0].transpose(0, 1)
    mega = block.mega
    peer = Peer(MegaConfig(
        hidden_size=c.d_model, intermediate_size=c.d_hidden, nffn_hidden_size=c.d_hidden,
        ema_projection_size=c.d_state, shared_representation_size=mega.gamma.shape[1],
        max_positions=(len(mega.bias) + 1) // 2, relative_positional_bias="simple",
        normalization_type="layernorm", normalize_before_mega=False, normalize_before_ffn=False,
        dropout_prob=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        nffn_activation_dropout_prob=0.0))
    # In the order of the peer's list.
    weights = [mega.gamma, mega.beta, *block.norms[0].parameters(), *mega.ema.parameters(),
               *mega.values.parameters(), *mega.gates.parameters(), *mega.out.parameters(),
               mega.bias, *block.norms[1].parameters(), *block.feed.parameters()]
    for theirs, ours in zip(peer.parameters(), weights, strict=True):
        theirs.data = ours.detach().reshape(theirs.shape).clone()
    return peer


# Packages whose layers compute what ours do, in the versions that were tested.
PEERS = {"s5": ("s5-pytorch 0.2.1", s5_peer), "mamba": ("mambapy 1.2.0", mamba_peer),
         "attention": ("transformers 4.44.2", attention_peer)}


def put_peers(c, model):
    """The model with each block made of the peer's layers, with the same weights."""
    _, peer = PEERS[c.model]
    model.blocks = nn.ModuleList(peer(c, block) for block in model.blocks)
    return model.to(c.device)


def has_peer(c):
    """Can a peer be timed? On 2 images of 50 tokens its logits must be ours to 1e-6 of the largest;
    each package cuts some numbers to float32. Tells which package is missing, or differs."""
    if c.model not in PEERS or c.ads or c.control:
        return False
    package, _ = PEERS[c.model]
    tokens = (c.shape[0], c.patch_size, 50 * c.patch_size)
    c = SimpleNamespace(**vars(c) | {"device": "cpu", "shape": tokens})
    model = train.build(c).double()
    x = torch.rand(2, *c.shape, dtype=torch.float64)
    try:
        with torch.no_grad():
            expected = model(x)
            found = put_peers(c, model)(x)
    except ImportError as e:
        train.say(f"No peer is timed: {package} is not installed here ({e})")
        return False
    same = bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())
    if not same:
        train.say(f"No peer is timed: with the same weights {package.split()[0]} computes other "
                  "logits here")
    return same
