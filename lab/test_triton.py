# SPDX-License-Identifier: MIT
"""Mamba's scan as Triton kernels: on a GPU, elsewhere in Triton's interpreter.

The interpreter must be asked for before triton is imported, so it has a process of its own.
"""
import os
import subprocess
import sys

import pytest
import torch

import mamba_adv
from test_all import HERE, close, same_gradients, scan_inputs

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not (mamba_adv.TritonScan and (GPU or INTERPRETED)),
                          reason="needs Triton, and a GPU or Triton's interpreter")


@pytest.mark.skipif(not mamba_adv.TritonScan, reason="needs Triton, which GPU builds bring")
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run in this process")
def test_the_tests_below_pass_in_a_process_of_triton_s_interpreter():
    words = "-m pytest -q -p no:cacheprovider lab/test_triton.py -k triton_s_scan".split()
    done = subprocess.run([sys.executable, *words], cwd=HERE, text=True, capture_output=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and "9 passed" in done.stdout, done.stdout + done.stderr


@runs
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (1, 40, 70, 4), (2, 9, 3, 16)])
@pytest.mark.parametrize("T, block", [(4, 2), (16, 64)])
def test_triton_s_scan_is_the_loop_in_value_and_gradient(shape, T, block, monkeypatch):
    monkeypatch.setattr(mamba_adv.TritonScan, "T", T)
    monkeypatch.setattr(mamba_adv.TritonScan, "BLOCK", block if shape[2] < 70 else 64)
    inputs = [v.to("cuda" if GPU else "cpu") for v in scan_inputs(*shape)]
    inputs[3] = inputs[3][:, :1].expand_as(inputs[3])                   # not contiguous
    for wanted in (range(6), [0]):                                      # [0] alone: an attack
        some = [v for i, v in enumerate(inputs) if v.requires_grad_(i in wanted).requires_grad]
        fast = mamba_adv.TritonScan.apply(*inputs)
        slow = mamba_adv.selective_scan_loop(*inputs)
        close(fast, slow)
        same_gradients(fast, slow, some)


@runs
def test_triton_s_scan_refuses_a_second_gradient():
    inputs = [v.to("cuda" if GPU else "cpu").requires_grad_() for v in scan_inputs(2, 5, 2, 3)]
    with pytest.raises(RuntimeError, match="no second derivative; take selective_scan_loop"):
        torch.autograd.grad(mamba_adv.TritonScan.apply(*inputs).sum(), inputs, create_graph=True)


@pytest.mark.skipif(not mamba_adv.TritonScan, reason="needs Triton, which GPU builds bring")
def test_the_module_imports_no_script():
    code = "import sys, lab.triton_scan; print([m for m in sys.modules if m.endswith('_adv')])"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, text=True,
                          capture_output=True).stdout == "[]\n"


@pytest.mark.parametrize("missing", ["compiler", "CC", "triton", "Python.h"])
def test_without_a_c_compiler_or_triton_the_scan_does_without(missing, tmp_path):
    first = {"triton": "import sys; sys.modules['triton'] = None; ",
             "Python.h": "import torch, sysconfig; sysconfig.get_path = str.upper; "}
    env = dict(os.environ)
    if missing == "compiler":
        env.pop("CC", None)
        env["PATH"] = str(tmp_path)
    if missing == "CC":
        env["CC"] = "there is none"
    code = first.get(missing, "") + "import mamba_adv; print(mamba_adv.TritonScan)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, check=True, text=True,
                          capture_output=True).stdout == "None\n"


@pytest.mark.skipif(not GPU or not mamba_adv.TritonScan, reason="needs a GPU and Triton")
def test_a_gpu_takes_the_kernels(monkeypatch):
    calls, launch = [], mamba_adv.TritonScan.launch
    monkeypatch.setattr(mamba_adv.TritonScan, "launch", lambda *args: calls.append(1) or launch(
        *args))
    mamba_adv.selective_scan(*(v.cuda() for v in scan_inputs(2, 9, 3, 4)))
    assert calls == [1]
