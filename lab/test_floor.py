# SPDX-License-Identifier: MIT
"""lab/floor.py: operations are counted as they run, rates are those of the fastest try."""
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mamba_adv
from lab import floor
from test_all import MODELS, close, randn, tiny

pytestmark = pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
                                reason="torch < 2.6 cannot count operators of complex constants")


class Tally(TorchDispatchMode):
    """Keeps the name, the inputs and the result of each of PyTorch's operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, args, result))
        return result


def run_blocks(name, model, n, w):
    """n images through the blocks and back; the weights' gradient, too, if w is 1. Returns L."""
    z = randn(n, 6, 6).requires_grad_()
    with nullcontext() if w else MODELS[name].frozen(model):
        y = z
        for block in model.blocks:
            y = block(y)
        y.square().sum().backward()
    return z.shape[1]


@pytest.mark.parametrize("options", ({}, {"ads": "relu"}, {"control": "glu"}), ids=str)
@pytest.mark.parametrize("w", (0, 1))
def test_the_floor_s_products_are_those_that_pytorch_counts(name, options, w, monkeypatch):
    # The loop has no products of its own.
    monkeypatch.setattr(mamba_adv, "selective_scan", mamba_adv.selective_scan_loop)
    model = tiny(name, **options)
    flops = []
    for n in (1, 3):
        with FlopCounterMode(display=False) as counter:
            L = run_blocks(name, model, n, w)
        flops.append(sum(count for operator, count in counter.get_flop_counts()["Global"].items()
                         if "convolution" not in str(operator)))
    expected = floor.operations(model, L, 1, w)["products"]
    # Mamba's convolution pads at the end what it then cuts off; PyTorch counts that, too.
    expected -= sum((2 + w) * L * part.weight.numel() for part in model.modules()
                    if isinstance(part, nn.Conv1d))
    # What does not grow with the batch belongs to the kernels. A multiply-add is two FLOPs.
    assert flops[1] - flops[0] == 2 * 2 * expected > 0


@pytest.mark.parametrize("w", (0, 1))
def test_the_floor_s_ffts_are_those_that_run(name, w):
    model = tiny(name)
    ffts = []
    for n in (1, 3):
        with Tally() as tally:
            L = run_blocks(name, model, n, w)
        ffts.append(sum(result.numel() // result.shape[-1] for operator, _, result in tally.seen
                        if operator.startswith("_fft_")))
    assert ffts[1] - ffts[0] == 2 * floor.operations(model, L, 1, w)["FFTs"]
    assert (ffts[1] > 0) == (name in ("s4", "dss", "attention"))


def test_the_floor_s_scan_of_s5_is_its_definition_s_and_as_much_for_each_gradient():
    model = tiny("s5", n_layers=1)
    with Tally() as tally, torch.no_grad():
        model.blocks[0].ssm.recurrence(randn(3, 6, 6))
    found = sum(4 * result.numel() for operator, _, result in tally.seen
                if operator == "mul" and result.is_complex() and result.shape == (3, 4))
    assert 2 * found == 3 * floor.operations(model, 6, 1, 0)["scan"]
    assert 3 * found == 3 * floor.operations(model, 6, 1, 1)["scan"]


@pytest.mark.parametrize("w", (0, 1))
def test_the_floor_s_scan_of_mamba_is_what_runs_but_for_the_states_made_again(w):
    model = tiny("mamba", n_layers=1)
    d, N = model.blocks[0].log_minus_A.shape
    with Tally() as tally:
        L = run_blocks("mamba", model, 3, w)
    found = 0
    for operator, args, result in tally.seen:
        if operator in ("mul", "mul_", "addcmul_") and result.shape[-2:] == (N, d):
            found += result.numel()
        if operator == "bmm" and args[1].shape[-2:] == (N, d):          # sums over the states
            found += args[1].numel()
    again = 3 * L * d * N
    assert found == 3 * (floor.operations(model, L, 1, w)["scan"] + again)


def test_the_floor_takes_each_operation_s_count_over_its_rate():
    model = tiny("s5")
    found = floor.operations(model, 6, 11, 1)
    close(floor.seconds(model, 6, 11, 1, {"products": 2.0, "scan": 4.0, "FFTs": 1.0}),
          found["products"] / 2 + found["scan"] / 4)


def test_the_rates_of_a_machine_are_those_of_its_fastest_try(monkeypatch):
    # 50 tries of each kind, that take 3 and then 2 seconds.
    ticks = iter([tick for try_ in range(150) for tick in (10 * try_, 10 * try_ + 3 - try_ % 2)])
    monkeypatch.setattr(floor.time, "process_time", lambda: next(ticks))
    assert floor.rates(8) == {"products": 1024 ** 3 / 2, "FFTs": 128, "scan": 2 ** 15}
