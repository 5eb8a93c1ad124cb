# SPDX-License-Identifier: MIT
"""What the papers say, as tests. A name is a sentence; its body is the proof.

    python -m pytest -q test_all.py            # four minutes on one core; no GPU, no data needed

Identities are checked in float64 at tiny sizes. A `Spy` is a model that keeps what it is fed. The
section "Parity" writes all five models once more, in numpy loops, from the formulas of the papers.
"""
import ast
import copy
import functools
import inspect
import io
import json
import math
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")      # Triton's kernels run in numpy, then

import ads
import attention_adv
import mamba_adv
import s4_adv
import train

HERE = Path(__file__).resolve().parent
FILES = sorted(file.name for file in HERE.glob("*.py"))
SCRIPTS = s4_adv, mamba_adv, attention_adv
MODELS = {"s4": s4_adv, "dss": s4_adv, "s5": s4_adv, "mamba": mamba_adv, "attention": attention_adv}
MAPS = {"s4": s4_adv.S4, "dss": s4_adv.DSS, "s5": s4_adv.S5, "ema": attention_adv.EMA}
MIDDLES = [{}, *({"ads": a} for a in ads.ACTIVATIONS), *({"control": c} for c in ads.CONTROLS)]
EPS, ALPHA, STEPS = 0.1, 0.03, 8                                        # ALPHA * STEPS > 2 * EPS


# Data are drawn and read once, and few images choose Best: that is where a tiny run's time went.
train.drawn_digits = functools.cache(train.drawn_digits)
train.torchvision_data = functools.cache(train.torchvision_data)
train.HELD_OUT = 50
torch.set_num_threads(1)                # as in the processes that tests start: bits depend on it


def each(*values):
    """A fixture: a test that takes it runs once for each value."""
    return pytest.fixture(params=values, ids=lambda v: getattr(v, "__name__", str(v)))(
        lambda request: request.param)


script, name, kind = each(*SCRIPTS), each(*MODELS), each(*MAPS)
attack = each("fgsm", "pgd", "pgd_at_loss", "trades_loss")
L, file = each(1, 2, 3, 7, 16, 33, 50, 64), each(*FILES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, tolerance=1e-9):
    """Equal up to tolerance times the largest number expected (or 1)."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same_gradients(first, second, tensors, tolerance=1e-9):
    g = torch.randn_like(first)
    for a, b in zip(*(torch.autograd.grad(y, tensors, g) for y in (first, second))):
        close(a, b, tolerance)


def scrambled(module):
    """In float64 with every weight moved, so that none is 0 or 1 by its initialisation."""
    with torch.no_grad():
        for w in (*module.double().parameters(), *module.buffers()):
            w.add_(0.3 * torch.randn_like(w))
    return module


def tiny(name, **options):
    """Classifier of 2-colour images in 3 classes: 2 layers, 6 channels, 4 states, patches 2 x 2."""
    options = {"d_model": 6, "d_state": 4, "n_layers": 2, "patch_size": 2, **options}
    own = {"mamba": {}, "attention": {"d_hidden": 8, "max_len": 10}}.get(name, {"ssm": name})
    return scrambled(MODELS[name].Classifier(2, 3, **{**own, **options}))


def images(n=5, shape=(2, 4, 6), classes=3):
    """n images, the first black, the second white, and their labels."""
    x = torch.rand(n, *shape, dtype=torch.float64)
    x[0], x[1:2] = 0, 1
    return x, torch.arange(n) % classes


class Spy(nn.Module):
    """net, and a record of its inputs, of who wanted a gradient, and of its mode at each call."""

    def __init__(self, net, fails_at=None):
        super().__init__()
        self.net, self.fails_at, self.fed, self.asked, self.modes = net, fails_at, [], [], []

    def forward(self, x):
        self.fed.append(x.detach().clone())
        self.asked.append(x.requires_grad)
        self.modes.append(self.training)
        if len(self.fed) == self.fails_at:
            raise ZeroDivisionError
        return self.net(x)


def linear(classes=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).double()


def smooth(*between):
    layers = nn.Linear(48, 8), *between, nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(nn.Flatten(), *layers).double()


def moody():
    """Another function in train mode than in eval mode."""
    return smooth(nn.BatchNorm1d(8), nn.Dropout(0.5)).train()


def run(script, attack, model, x, y, eps=EPS, alpha=ALPHA, steps=STEPS):
    rest = {"fgsm": (eps,), "trades_loss": (eps, alpha, steps, 6.0)}
    return getattr(script, attack)(model, x, y, *rest.get(attack, (eps, alpha, steps)))


# ---- The files: a script and ads.py are a whole program ------------------------------------------

def test_a_file_has_its_licence_lines_of_100_columns_and_few_imports(file):
    text = (HERE / file).read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    assert re.findall("@[A-Z]+@", text) == []                           # a number still to fill in
    nodes = list(ast.walk(ast.parse(text)))
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = ["ads"] if file.endswith("_adv.py") else [name[:-3] for name in FILES]
    extra = ["pytest"] if file == "test_all.py" else []
    extra += ["triton"] if file == "mamba_adv.py" else []                # where there is one
    extra += ["matplotlib", "s5", "mambapy"] if file == "train.py" else []   # where there is one
    allowed = {*own, *extra, "torch", "torchvision", "numpy", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in names} <= allowed


def test_a_script_and_ads_alone_train_in_an_empty_folder_and_importing_is_silent(script, tmp_path):
    for needed in ("ads.py", f"{script.__name__}.py"):
        (tmp_path / needed).write_bytes((HERE / needed).read_bytes())
    code = f"""
import sys, torch, {script.__name__} as script
assert "torchvision" not in sys.modules
model = script.Classifier(1, 10, d_model=8, d_state=4, n_layers=1, patch_size=7, ads="relu")
before = [w.clone() for w in model.parameters()]
optimizer = torch.optim.AdamW(script.param_groups(model, 2e-4))
x, y = script.drawn_digits(8, seed=0)
script.pgd_at_loss(model, x / 255, y, 0.1, 0.05, 2).backward()
optimizer.step()
assert not any(torch.equal(*pair) for pair in zip(before, model.parameters()))"""
    done = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_shared_text_of_the_three_scripts_is_equal_character_for_character():
    mark = r"\n# --- shared text.*\n# --- end of the shared text ---\n"
    texts = [re.search(mark, inspect.getsource(s), re.S)[0] for s in SCRIPTS]
    assert texts[0] == texts[1] == texts[2]
    for f in "frozen fgsm pgd pgd_at_loss trades_loss accuracy param_groups drawn_digits".split():
        assert f"\ndef {f}(" in texts[0]
    for f, where in [("vandermonde", (s4_adv, attention_adv)), ("Classifier.embed", SCRIPTS),
                     ("Classifier.logits", (s4_adv, mamba_adv)), ("Classifier.forward", SCRIPTS)]:
        assert len({inspect.getsource(attrgetter(f)(s)) for s in where}) == 1   # outside of it


def test_the_names_that_coursework_copies_keep_their_arguments(script):
    for f, arguments in {"fgsm": "model x y eps", "pgd": "model x y eps alpha steps",
                         "pgd_at_loss": "model x y eps alpha steps",
                         "trades_loss": "model x y eps alpha steps beta",
                         "accuracy": "model batches attack"}.items():
        assert list(inspect.signature(getattr(script, f)).parameters) == arguments.split()
    assert list(inspect.signature(script.Classifier).parameters)[:7] == (
        "in_channels n_classes d_model d_state n_layers patch_size ads".split())


def test_a_script_draws_its_digits_where_mnist_is_absent_or_damaged(script, tmp_path, capsys):
    for state in "absent", "damaged":
        if state == "damaged":
            (tmp_path / "MNIST" / "raw").mkdir(parents=True)
            for name in ("train", "t10k"):
                for kind in ("images-idx3", "labels-idx1"):
                    (tmp_path / "MNIST" / "raw" / f"{name}-{kind}-ubyte").write_bytes(b"x" * 99)
        script.demo(lambda ads: script.Classifier(1, 10, 4, 2, n_layers=1, patch_size=14, ads=ads,
                                                  **({"d_hidden": 4, "max_len": 4}
                                                     if script is attention_adv else {})),
                    tmp_path, 1, 8, 8, 4)
        assert f"drawn digits (no readable MNIST in {tmp_path})" in capsys.readouterr().out


# ---- Fixed-parameter maps (S4, DSS, S5, the moving average of Mega): one system, two forms -------

@pytest.mark.parametrize("at_a_time", [1, 2, 1000])
def test_convolution_is_recurrence_in_value_and_gradient(kind, L, at_a_time, monkeypatch):
    for part in (v for s in SCRIPTS for v in vars(s).values() if hasattr(v, "SIZE")):
        monkeypatch.setattr(part, "SIZE", at_a_time * 6 * L)            # so many of the 3 images
    layer, u = scrambled(MAPS[kind](6, 4)), randn(3, L, 6).requires_grad_()
    before = u.detach().clone()
    close(layer(u), layer.recurrence(u))
    same_gradients(layer(u), layer.recurrence(u), [u, *layer.parameters()])
    same_gradients(layer(u), layer.recurrence(u), [u])                  # an attack
    close(layer(u.mT.contiguous().mT), layer.recurrence(u))             # channels before time
    assert torch.equal(u, before)


@pytest.mark.parametrize("kind", ("s4", "dss"))
def test_the_convolution_of_a_gpu_is_that_of_a_cpu(kind, L, monkeypatch):
    layer, u = scrambled(MAPS[kind](6, 4)), randn(3, L, 6).requires_grad_()
    wanted = [u, *layer.parameters()]
    with monkeypatch.context() as m:
        m.setattr(s4_adv.Convolution, "run", s4_adv.Convolution.whole)
        y = layer(u)
        assert y.is_contiguous()
        same_gradients(y, layer.recurrence(u), wanted)
        assert torch.autograd.gradgradcheck(layer, u, fast_mode=True)
    close(y, layer(u))


def test_the_kernel_is_the_impulse_response_of_the_recurrence(kind, L):
    layer, t = scrambled(MAPS[kind](6, 4)), L // 2 if kind == "ema" else 0
    u = torch.zeros(6, L, 6, dtype=torch.float64)
    u[range(6), t, range(6)] = 1                                        # image i has channel i
    response, K = layer.recurrence(u).permute(1, 2, 0), layer.kernel(L)         # (L, out, in)
    if kind == "ema":
        K = K[:, (torch.arange(L) - t) % (2 * L)]                       # it is circular
    close(response, K if kind == "s5" else torch.diag_embed(K.T))


def test_no_state_space_model_looks_ahead_but_the_moving_average_of_mega_does(kind):
    layers, u = [scrambled(MAPS[kind](6, 4)), scrambled(mamba_adv.Mamba(6, 4))], randn(2, 11, 6)
    for layer, two_sided in zip(layers, (kind == "ema", False)):
        for t in range(11):
            v = u.clone()
            v[:, t] += randn(2, 6)
            change = (layer(v) - layer(u)).abs().amax((0, 2))
            assert change[t:].min() > 1e-7
            assert two_sided or (change[:t] < 1e-12).all()
            assert not two_sided or (change[:t] > 1e-7).all()


@pytest.mark.parametrize("trial", range(5))
def test_every_mode_decays_whatever_the_weights(trial):
    torch.manual_seed(trial)
    s4, dss, s5, ema = (scrambled(scrambled(MAPS[kind](6, 8))) for kind in MAPS)
    lam, P, _, _, dt = s4.matrices()
    lam, P = torch.cat([lam, lam.conj()]), torch.cat([P, P.conj()])
    A, one = dt[:, None, None] / 2 * (torch.diag(lam) - torch.outer(P, P.conj())), torch.eye(8)
    dt, minus, _, _ = scrambled(mamba_adv.Mamba(6, 8)).parameters_of(5 * randn(2, 9, 12))
    for bar in (torch.linalg.eigvals(torch.linalg.solve(one - A, one + A)),     # bilinear
                dss.matrices(50)[0].exp(), s5.matrices()[0], ema.matrices()[0].exp(),
                torch.exp(dt[..., None] * minus)):
        assert bar.abs().max() < 1 and (torch.is_complex(bar) or bar.min() >= 0)


def test_a_saturated_moving_average_stays_finite():
    for dtype in (torch.float32, torch.float64):
        layer = attention_adv.EMA(4, 2).to(dtype)
        for size in (17.0, 40.0, 100.0):
            layer.delta.data.fill_(size)
            layer.alpha.data.fill_(size)
            u = torch.rand(2, 5, 4, dtype=dtype, requires_grad=True)
            y = layer(u)
            y.sum().backward()
            grads = u.grad, *(w.grad for w in layer.parameters())
            assert all(v.isfinite().all() for v in (y, *grads))
            close(y, layer.recurrence(u), 1e-5 if dtype == torch.float32 else 1e-9)


def test_a_model_is_made_in_torch_s_default_precision(name):
    x, before = torch.rand(2, 2, 4, 6, dtype=torch.float64), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        own = {"mamba": {}, "attention": {"max_len": 10}}.get(name, {"ssm": name})
        model = MODELS[name].Classifier(2, 3, 6, 4, 2, 2, ads="relu", **own)
        assert {w.dtype for w in (*model.parameters(), *model.buffers())} == {torch.float64}
        assert model(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("N", [2, 3, 8, 64])
def test_hippo_legs_is_normal_plus_low_rank_and_every_model_starts_there(N):
    A = np.zeros((N, N), complex)
    for n in range(N):
        A[n, :n] = [-(2 * n + 1) ** 0.5 * (2 * k + 1) ** 0.5 for k in range(n)]
        A[n, n] = -(n + 1)
    lam, P, B, V = (z.numpy() for z in s4_adv.hippo_legs(N))
    close(V @ V.conj().T, np.eye(N, dtype=complex), 1e-12)
    close(V @ (np.diag(lam) - np.outer(P, P.conj())) @ V.conj().T, A, 1e-12)
    close(V @ B, np.sqrt(2 * np.arange(N) + 1).astype(complex), 1e-12)
    assert (np.diff(lam.imag) > 0).all() and np.allclose(lam, lam[::-1].conj())
    for kind in ("s4", "dss", "s5") if N % 2 == 0 else ("s5",):
        layer, half = MAPS[kind](3, N).double(), 0 if kind == "s5" else N // 2
        close(-layer.log_minus_real.exp() + 1j * layer.imag, lam[half:], 1e-6)  # float32
        assert 0.000999 < layer.log_dt.exp().min() and layer.log_dt.exp().max() < 0.1001
        if kind == "s4":
            close(torch.view_as_complex(layer.P), P[half:], 1e-6)
            close(torch.view_as_complex(layer.B), B[half:], 1e-6)


@pytest.mark.parametrize("kind", [*MAPS, "mamba"])
def test_float32_is_close_to_float64_at_1024_tokens(kind):
    layer = mamba_adv.Mamba(8, 16) if kind == "mamba" else MAPS[kind](8, 64)
    u, g = torch.randn(2, 1, 1024, 8)
    results = []
    for dtype in (torch.float32, torch.float64):
        v = u.to(dtype).requires_grad_()
        y = layer.to(dtype)(v)
        results.append((y, *torch.autograd.grad(y, v, g.to(dtype))))
    for single, double in zip(*results):
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 1e-4 * double.abs().max()


def test_under_autocast_kernels_and_states_keep_their_bits(kind):
    layer, u = scrambled(MAPS[kind](6, 4)).float(), torch.randn(2, 33, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(u).float()
    close(result, layer(u), 0.02 if kind == "s5" else 1e-6)             # S5 multiplies u by B, C


def test_the_worst_perturbation_of_a_fixed_map_is_eps_times_the_l1_norm_of_its_kernel():
    layer = scrambled(s4_adv.DSS(6, 4))
    K = layer.kernel(20)                                                # (H, L)
    for u in (randn(1, 20, 6), 100 * randn(1, 20, 6)):                  # whatever the input is
        error = layer(u + EPS * K.sign().flip(1).T) - layer(u)
        close(error[0, -1], EPS * K.abs().sum(1))


@pytest.mark.parametrize("options", MIDDLES, ids=str)
@pytest.mark.parametrize("kind", ["s4", "dss", "s5"])
def test_a_block_is_affine_exactly_when_nothing_stands_in_its_middle(kind, options):
    block, zero = scrambled(s4_adv.Block(6, 4, **options, ssm=kind)), randn(2, 9, 6) * 0
    u, v = randn(2, 2, 9, 6)
    error = block(2 * u - 3 * v) - (2 * block(u) - 3 * block(v) + 2 * block(zero))
    assert error.abs().max() > 1e-3 if options else error.abs().max() < 1e-12


# ---- The data-dependent map: Mamba ---------------------------------------------------------------

def scan_inputs(b, L, d, N):
    """u, dt, A, B, C, D of a selective scan."""
    return [randn(b, L, d), F.softplus(randn(b, L, d)), -randn(d, N).exp(), randn(b, L, N),
            randn(b, L, N), randn(d)]


@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_the_chunked_scan_is_the_loop_in_value_and_gradient(L, steps, monkeypatch):
    monkeypatch.setattr(mamba_adv.SelectiveScan, "SIZE", steps * 2 * 3 * 4)     # states of a chunk
    inputs = scan_inputs(2, L, 3, 4)
    for wanted in (range(6), [0], [1, 3], [2, 4], [5]):                 # [0] alone: an attack
        some = [v for i, v in enumerate(inputs) if v.requires_grad_(i in wanted).requires_grad]
        fast, slow = (f(*inputs) for f in (mamba_adv.selective_scan, mamba_adv.selective_scan_loop))
        close(fast, slow)
        same_gradients(fast, slow, some)


def test_the_scan_passes_gradcheck_and_refuses_a_second_gradient(monkeypatch):
    monkeypatch.setattr(mamba_adv.SelectiveScan, "SIZE", 3 * 2 * 2 * 3)
    inputs = [v.requires_grad_() for v in scan_inputs(2, 5, 2, 3)]
    assert torch.autograd.gradcheck(mamba_adv.selective_scan, inputs)
    with pytest.raises(RuntimeError, match="no second derivative; take selective_scan_loop"):
        torch.autograd.grad(mamba_adv.selective_scan(*inputs).sum(), inputs, create_graph=True)


def test_the_scan_takes_the_shapes_that_the_loop_takes(monkeypatch):
    monkeypatch.setattr(mamba_adv.SelectiveScan, "SIZE", 2 * 8 * 3 * 4)     # parts of two images
    b, L, d, N = 5, 7, 3, 4
    full = (b, L, d), (b, L, d), (d, N), (b, L, N), (b, L, N), (d,)
    for k, shape in [(1, (b, L, 1)), (1, (1, L, d)), (2, (1, N)), (3, (1, L, N)), (3, (1, 1, N)),
                     (4, (1, L, N)), (4, (b, 1, N)), (5, (1,))]:
        inputs = scan_inputs(b, L, d, N)
        inputs[k] = inputs[k][tuple(slice(n) for n in shape)].clone()
        assert [v.shape for v in inputs] != list(full) and inputs[k].shape == shape
        inputs = [v.requires_grad_() for v in inputs]
        fast = mamba_adv.selective_scan(*inputs)
        slow = mamba_adv.selective_scan_loop(*(v.expand(n) for v, n in zip(inputs, full)))
        close(fast, slow)
        same_gradients(fast, slow, inputs)


@pytest.mark.skipif(not mamba_adv.triton, reason="needs triton, which PyTorch's GPU builds bring")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (1, 40, 70, 4), (2, 9, 3, 16)])
@pytest.mark.parametrize("T, block", [(4, 2), (16, 64)])
def test_triton_s_scan_is_the_loop_in_value_and_gradient(shape, T, block, monkeypatch):
    monkeypatch.setattr(mamba_adv.TritonScan, "T", T)
    monkeypatch.setattr(mamba_adv.TritonScan, "BLOCK", block if shape[2] < 70 else 64)
    inputs = [v.to("cuda" if GPU else "cpu") for v in scan_inputs(*shape)]
    inputs[3] = inputs[3][:, :1].expand_as(inputs[3])                   # not contiguous
    for wanted in (range(6), [0]):                                      # [0] alone: an attack
        some = [v for i, v in enumerate(inputs) if v.requires_grad_(i in wanted).requires_grad]
        fast, slow = (f(*inputs) for f in (mamba_adv.TritonScan.apply,
                                           mamba_adv.selective_scan_loop))
        close(fast, slow)
        same_gradients(fast, slow, some)


def test_without_a_c_compiler_or_triton_the_scan_does_without(tmp_path):
    code = "import mamba_adv; assert not mamba_adv.triton; print(mamba_adv.compiled(3))"
    empty = {k: v for k, v in os.environ.items() if k != "CC"} | {"PATH": str(tmp_path)}
    for env, first in ((empty, ""), (os.environ | {"CC": "there is none"}, ""),
                       (os.environ, "import sys; sys.modules['triton'] = None; "),
                       (os.environ, "import torch, sysconfig; sysconfig.get_path = str.upper; ")):
        assert subprocess.run([sys.executable, "-c", first + code], cwd=HERE, env=env, check=True,
                              capture_output=True, text=True).stdout == "3\n"


def test_with_constant_dt_B_and_C_the_scan_is_a_linear_time_invariant_system():
    u, dt, A, B, C, D = scan_inputs(2, 12, 3, 4)
    dt, B, C = (v[:1, :1].expand_as(v) for v in (dt, B, C))
    powers = torch.exp(dt[0, 0, :, None] * A * torch.arange(12)[:, None, None])     # (L, d, N)
    K = (C[0, 0] * powers * dt[0, 0, :, None] * B[0, 0]).sum(-1)        # (L, d)
    y = mamba_adv.selective_scan(u, dt, A, B, C, D)
    for t in range(12):
        close(y[:, t], D * u[:, t] + sum(K[s] * u[:, t - s] for s in range(t + 1)))


def test_a_new_mamba_has_steps_of_a_thousandth_to_a_tenth_and_A_of_minus_1_to_minus_N():
    blocks = mamba_adv.Classifier(3, 10).blocks
    dt = F.softplus(torch.cat([block.step.bias for block in blocks]))
    assert 0.000999 < dt.min() < 0.00103 and 0.0975 < dt.max() < 0.1001
    for block in blocks:
        close(-torch.exp(block.log_minus_A), -torch.arange(1.0, 17.0).expand(256, 16), 1e-6)


# ---- Attention: Mega -----------------------------------------------------------------------------

@pytest.mark.parametrize("L", [1, 2, 7, 9])
def test_megas_attention_is_a_probability_and_its_bias_depends_on_the_distance_alone(L):
    mega = scrambled(attention_adv.Mega(6, 4, d_hidden=8, d_attn=5, max_len=9))
    weights, bias = mega.attention(randn(2, L, 5)), mega.relative_bias(L)
    close(weights.sum(-1), torch.ones(2, L, dtype=torch.float64), 1e-12)
    assert weights.shape == (2, L, L) and weights.min() > 0
    assert L == 1 or weights.std(-1).min() > 1e-4
    assert bias.tolist() == [[mega.bias[8 + j - i].item() for j in range(L)] for i in range(L)]


# ---- Adaptive Scaling, and the controls that stand in its place ----------------------------------

@pytest.mark.parametrize("activation, act", [
    ("relu", lambda v: np.maximum(v, 0)), ("sigmoid", lambda v: sigmoid(v)), ("tanh", np.tanh),
    ("gelu", lambda v: F.gelu(torch.as_tensor(v)).numpy())])
def test_ads_is_s_of_y_times_y_plus_t_of_y_token_by_token(activation, act):
    layer, y = scrambled(ads.AdaptiveScaling(4, activation)), randn(2, 3, 4)
    w = {key: v.numpy() for key, v in layer.state_dict().items()}
    for token, result in zip(y.view(-1, 4).numpy(), layer(y).view(-1, 4)):
        s, t = (act(w[f"{part}.weight"] @ token + w[f"{part}.bias"]) for part in ("scale", "shift"))
        close(result, s * token + t, 1e-12)


def test_the_controls_are_an_activation_glu_and_a_perceptron():
    y, act = randn(2, 3, 4), lambda v: 0.5 * v * (1 + torch.erf(v / 2 ** 0.5))
    glu, mlp, relu_mlp = (scrambled(ads.middle(4, control=control))
                          for control in ("glu", "mlp", "mlp-relu"))
    (W, b), (V, c, U, d) = glu.parameters(), mlp.parameters()
    S, e, T, f = relu_mlp.parameters()
    value, gate = (act(y) @ W.T + b).split(4, -1)
    for layer, expected in [(ads.middle(4), y), (ads.middle(4, control="gelu"), act(y)),
                            (ads.middle(4, control="relu"), y.clamp(min=0)),
                            (glu, value * torch.sigmoid(gate)), (mlp, act(y @ V.T + c) @ U.T + d),
                            (relu_mlp, (y @ S.T + e).clamp(min=0) @ T.T + f)]:
        close(layer(y), expected)


def test_half_of_ads_is_ads_with_the_other_half_at_its_neutral_value():
    y = randn(2, 3, 4)
    scale, shift = (scrambled(ads.middle(4, control=control)) for control in ("scale", "shift"))
    (W, b), (V, c) = scale.parameters(), shift.parameters()
    close(scale(y), (y @ W.T + b).clamp(min=0) * y)
    close(shift(y), y + (y @ V.T + c).clamp(min=0))


@pytest.mark.parametrize("d", [1, 5, 128])
def test_ads_glu_and_mlp_have_2_d_squared_plus_d_parameters_half_ads_half_of_that(d):
    counts = [sum(w.numel() for w in ads.middle(d, **options).parameters()) for options in MIDDLES]
    n = 2 * (d * d + d)
    assert counts == [0, n, n, n, n, 0, 0, n, n, n, n / 2, n / 2]


# ---- Parity: all five models once more, in numpy, as the papers write them -----------------------

def pairs(v):
    return v[..., 0] + 1j * v[..., 1]


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def silu(v):
    return v * sigmoid(v)


def part(w, prefix):
    return {key[len(prefix) + 1:]: v for key, v in w.items() if key.startswith(prefix + ".")}


def affine(w, key, z):
    return z @ w[key + ".weight"].T + w.get(key + ".bias", 0.0)


def layer_norm(w, key, z):
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    return z * w[key + ".weight"] + w[key + ".bias"]


def out(w, y):
    """[AdS with tanh], then the output Linear."""
    if "middle.scale.weight" in w:
        y = np.tanh(affine(w, "middle.scale", y)) * y + np.tanh(affine(w, "middle.shift", y))
    return affine(w, "out", y)


def convolved(K, u):
    return np.array([sum(K[s] * u[t - s] for s in range(t + 1)) for t in range(len(u))])


def s4(w, u):
    """u (L, H): K_l = C~ (1 - A'^L)^-1 A'^l B', A' and B' bilinear, A = diag(lam) - P P* dense."""
    lam = -np.exp(w["log_minus_real"]) + 1j * w["imag"]
    lam, P, B, C = (np.concatenate([v, v.conj()], -1) for v in (
        lam, pairs(w["P"]), pairs(w["B"]), pairs(w["C"])))
    A, one, y = np.diag(lam) - np.outer(P, P.conj()), np.eye(len(lam)), w["D"] * u
    for h, dt in enumerate(np.exp(w["log_dt"])):
        left = np.linalg.inv(one - dt / 2 * A)
        powers = [np.linalg.matrix_power(left @ (one + dt / 2 * A), l) for l in range(len(u) + 1)]
        c = C[h] @ np.linalg.inv(one - powers[-1])
        y[:, h] += convolved([(c @ power @ left @ B * dt).real for power in powers], u[:, h])
    return y


def dss(w, u):
    """K_l = Re sum_n C_n / lam_n softmax_l(lam_n dt l)."""
    lam, y = -np.exp(w["log_minus_real"]) + 1j * w["imag"], w["D"] * u
    for h, dt in enumerate(np.exp(w["log_dt"])):
        e = np.exp(np.outer(lam * dt, np.arange(len(u))))               # (N/2, L)
        K = (pairs(w["C"])[h] / lam) @ (e / e.sum(1, keepdims=True))
        y[:, h] += convolved(K.real, u[:, h])
    return y


def s5(w, u):
    """Zero-order hold, one matrix exponential: exp [[dt A, dt B], [0, 0]] = [[A', B'], [0, 1]]."""
    B, dt = pairs(w["B"]), np.exp(w["log_dt"])
    P, x, ys = len(dt), np.zeros(len(dt), complex), []
    M = np.zeros((sum(B.shape), sum(B.shape)), complex)
    M[:P, :P] = np.diag(dt * (-np.exp(w["log_minus_real"]) + 1j * w["imag"]))
    M[:P, P:] = dt[:, None] * B
    M = torch.linalg.matrix_exp(torch.from_numpy(M)).numpy()
    for u_t in u:
        x = M[:P] @ np.concatenate([x, u_t])
        ys.append((pairs(w["C"]) @ x).real + w["D"] * u_t)
    return np.array(ys)


def mamba(w, z):
    """Mamba's Alg. 2 in its block, one channel and one token at a time."""
    u, gate = np.split(affine(w, "into", z), 2, -1)
    d, rank, A = len(w["D"]), w["step.weight"].shape[1], -np.exp(w["log_minus_A"])
    past, y = np.concatenate([np.zeros((3, d)), u]), np.zeros_like(u)
    u = silu(np.array([[w["conv.weight"][c, 0] @ past[t:t + 4, c] + w["conv.bias"][c]
                        for c in range(d)] for t in range(len(u))]))
    low, B, C = np.split(affine(w, "select", u), [rank, rank + A.shape[1]], -1)
    dt = np.log1p(np.exp(affine(w, "step", low)))
    for c in range(d):
        h = np.zeros(A.shape[1])
        for t in range(len(u)):
            h = np.exp(dt[t, c] * A[c]) * h + dt[t, c] * B[t] * u[t, c]
            y[t, c] = C[t] @ h + w["D"][c] * u[t, c]
    return out(w, y * silu(gate))


def mega(w, u):
    """Mega's Eq. (4)-(16): the moving average as a double sum, softmax attention, two gates."""
    m, (n, H), Z = part(w, "ema"), u.shape, w["gamma"].shape[1]
    p, q = sigmoid(m["delta"]), 1 - sigmoid(m["delta"]) * sigmoid(m["alpha"])
    c, ema = p * m["beta"] * m["gamma"] / p.shape[1] ** 0.5, m["omega"] * u
    for t in range(n):
        for s in range(n):
            for rows in [slice(H)] * (s <= t) + [slice(H, None)] * (s >= t):    # back, ahead
                ema[t] += (c[rows] * q[rows] ** abs(t - s)).sum(1) * u[s]
    cuts = np.cumsum([H, Z, len(w["values.bias"])])
    update, z, reset, here = np.split(affine(w, "gates", silu(ema)), cuts, -1)
    query, key = (silu(z) * w["gamma"][i] + w["beta"][i] for i in (0, 1))
    scores, middle = query @ key.T / Z ** 0.5, len(w["bias"]) // 2
    e = np.exp(scores + [[w["bias"][middle + j - i] for j in range(n)] for i in range(n)])
    mixed = e / e.sum(1, keepdims=True) @ silu(affine(w, "values", u))
    new = silu(here + out(w, mixed * silu(reset)))
    return sigmoid(update) * new + (1 - sigmoid(update)) * u


def classifier(name, w, image):
    """w is the state_dict of a Classifier of two layers, image is (C, h, w)."""
    P = w["patches.weight"].shape[-1]
    z = w["patches.bias"] + np.array([
        (w["patches.weight"] * image[:, i:i + P, j:j + P]).sum((1, 2, 3))
        for i in range(0, image.shape[1], P) for j in range(0, image.shape[2], P)])
    z = z if name == "attention" else layer_norm(w, "norm", z)
    for i, b in enumerate([part(w, "blocks.0"), part(w, "blocks.1")]):
        if name == "attention":
            z = layer_norm(b, "norms.0", mega(part(b, "mega"), z))
            z = layer_norm(b, "norms.1", z + affine(b, "feed.2", silu(affine(b, "feed.0", z))))
        else:
            y = mamba(b, z) if name == "mamba" else out(b, eval(name)(part(b, "ssm"), z))
            z = layer_norm(w, f"norms.{i}", z + y)
    return affine(w, "head", z.mean(0))


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_parity_with_an_independent_float64_reference(name, activation):
    model, (x, _) = tiny(name, ads=activation), images(3)
    w = {key: v.numpy() for key, v in model.state_dict().items()}
    close(model(x), np.array([classifier(name, w, image) for image in x.numpy()]))


# ---- The classifier around a map -----------------------------------------------------------------

@pytest.mark.parametrize("name, options, expected", [
    ("s4", {}, 103_562), ("s4", {"ads": "relu"}, 235_658), ("dss", {"ssm": "dss"}, 103_178),
    ("mamba", {}, 469_002), ("attention", {}, 903_686)], ids=str)
def test_at_cifar10_size_a_model_has_as_many_parameters_as_the_authors(name, options, expected):
    model = MODELS[name].Classifier(3, 10, **options)
    assert sum(w.numel() for w in model.parameters() if w.requires_grad) == expected


@pytest.mark.parametrize("P", [1, 2])
def test_token_i_j_holds_the_colours_of_pixel_or_patch_i_j_row_by_row(name, P):
    model, (x, _) = tiny(name, d_model=2 * P * P, patch_size=P), images()
    model.patches.weight.data.copy_(torch.eye(2 * P * P).view(-1, 2, P, P))
    model.patches.bias.data.zero_()
    z = model.embed(x).unflatten(1, (4 // P, 6 // P))
    for i in range(4 // P):
        for j in range(6 // P):
            assert torch.equal(z[:, i, j], x[..., P * i:P * i + P, P * j:P * j + P].flatten(1))


def test_forward_is_logits_of_embed_and_embed_is_affine(name):
    model, (x, _) = tiny(name), images()
    assert torch.equal(model(x), model.logits(model.embed(x)))
    a, b, zero = (model.embed(v) for v in (x, x.flip(0), 0 * x))
    close(model.embed(2 * x - 3 * x.flip(0)), 2 * a - 3 * b + 2 * zero)


@pytest.mark.parametrize("options", MIDDLES, ids=str)
def test_adversarial_training_reaches_every_weight_on_images_that_are_not_square(name, options):
    model, (x, y) = tiny(name, **options), images()
    assert model(x).shape == (5, 3)
    MODELS[name].pgd_at_loss(model, x, y, EPS, ALPHA, 2).backward()
    for key, w in model.named_parameters():
        assert w.dtype == torch.float64, f"{key} is not real"
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-9, key


@pytest.mark.parametrize("options", [{}, {"ads": "tanh"}, {"control": "mlp"}], ids=str)
@pytest.mark.parametrize("what", ["image", "weights"])
def test_a_gradient_agrees_with_finite_differences(name, options, what):
    model, (x, y) = tiny(name, **options), images()
    moved = [x.requires_grad_()] if what == "image" else list(model.parameters())
    ways = [torch.randn_like(v) for v in moved]

    def loss(step):
        with torch.no_grad():
            for v, way in zip(moved, ways):
                v.add_(step * way)
        return F.cross_entropy(model(x), y)
    with MODELS[name].frozen(model) if what == "image" else torch.enable_grad():
        grads = torch.autograd.grad(loss(0), moved)
        slope = (loss(1e-5) - loss(-2e-5)).item() / 2e-5
    expected = float(sum((g * way).sum() for g, way in zip(grads, ways)))
    assert abs(expected) > 1e-4 and abs(slope - expected) < 1e-6 * max(1, abs(expected))


def test_a_second_derivative_of_a_model_is_right_or_refused(name):
    """A Function that differentiates by hand may leave itself out of the Hessian, silently."""
    model, (x, y) = tiny(name, ads="tanh"), images()
    moved = [x.requires_grad_(), *model.parameters()]
    ways = [torch.randn_like(v) for v in moved]

    def gradient(step=0.0, **options):
        with torch.no_grad():
            for v, way in zip(moved, ways):
                v.add_(step * way)
        return torch.autograd.grad(F.cross_entropy(model(x), y), moved, **options)
    if name == "mamba":
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient(create_graph=True)
        return
    slope = sum((g * way).sum() for g, way in zip(gradient(create_graph=True), ways))
    found = torch.autograd.grad(slope, moved)
    for v, up, down in zip(found, gradient(1e-5), gradient(-2e-5)):
        close(v, (up - down) / 2e-5, 1e-6)


def test_every_tensor_is_made_on_the_device_of_the_images(name):
    script, model, (x, y) = MODELS[name], tiny(name, ads="tanh"), images()
    expected = model(x)
    with torch.device("meta"):                                          # where no device is named
        result = model(x)
        script.trades_loss(model, x, y, EPS, ALPHA, 2, 6.0).backward()
        script.accuracy(model, [(x, y)], lambda *args: script.pgd(*args, EPS, ALPHA, 2))
    close(result, expected, 1e-12)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_gpu_returns_the_numbers_of_the_cpu(name):
    model, (x, y), results = tiny(name, ads="tanh"), images(), []
    for device in ("cpu", "cuda"):
        z = x.to(device).requires_grad_()
        loss = F.cross_entropy(model.to(device)(z), y.to(device))
        results.append([loss, *torch.autograd.grad(loss, [z, *model.parameters()])])
    for expected, result in zip(*results):
        close(result.cpu(), expected)


def test_weight_decay_is_for_the_weights_of_linear_and_conv_layers_alone(name):
    model = tiny(name, ads="relu")
    decayed, rest = MODELS[name].param_groups(model, 0.25)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    names = {w: key for key, w in model.named_parameters()}
    decayed, rest = ([names[w] for w in group["params"]] for group in (decayed, rest))
    assert sorted(decayed + rest) == sorted(names.values())             # each exactly once
    assert set(decayed) == {k for k in names.values() if k.endswith(".weight") and "norm" not in k}


@pytest.mark.parametrize("make, message", [
    (lambda: ads.AdaptiveScaling(4, "swish"), "'swish' is unknown; .* relu, sigmoid, tanh"),
    (lambda: ads.AdaptiveScaling(4, only="bias"), "only='bias' is unknown; choose scale or shift"),
    *((lambda m=m, f=f: f(MODELS[m], tiny(m), 2 * images()[0] - 0.5, images()[1]),
       "images must lie in .0, 1.; a normalisation belongs into the model") for m in MODELS
      for f in (lambda s, *at: s.fgsm(*at, EPS), lambda s, *at: s.pgd(*at, EPS, ALPHA, 2),
                lambda s, *at: s.trades_loss(*at, EPS, ALPHA, 2, 6.0))),
    (lambda: ads.middle(4, control="rnn"), "control .rnn. is unknown; .* relu, gelu, glu, mlp,"),
    *((lambda m=m: tiny(m, ads="relu", control="mlp"), "'relu' and control='mlp' name two things")
      for m in MODELS),
    *((lambda m=m, P=P: tiny(m, patch_size=P)(images()[0]),
       f"patch size {P} does not divide an image of 4 x 6") for m in MODELS for P in (3, 4)),
    (lambda: tiny("s4", ssm="s6"), "ssm 's6' is unknown; choose one of s4, dss, s5"),
    (lambda: tiny("s4", d_state=5), "d_state 5 is odd"),
    (lambda: tiny("dss", d_state=5), "d_state 5 is odd"),
    (lambda: tiny("attention", max_len=5)(images()[0]), "6 tokens are more than max_len 5; .*=6")])
def test_what_cannot_work_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- Attacks -------------------------------------------------------------------------------------

@pytest.mark.parametrize("eps", [0.0005, EPS, 0.7])
def test_every_point_that_an_attack_touches_lies_in_ball_and_box(script, attack, eps):
    (x, y), spy = images(), Spy(linear(3).float())
    x = x.float()
    result = run(script, attack, spy, x, y, eps, eps / 3)
    for z in (*spy.fed, *([result] if result.dim() else [])):
        assert (z - x).abs().max() <= eps + 1e-6 and z.min() >= 0 and z.max() <= 1


def test_pgd_starts_once_and_uniformly_in_the_ball(script):
    x, spy = torch.full((40, 2, 4, 6), 0.5, dtype=torch.float64), Spy(linear())
    script.pgd(spy, x, torch.zeros(40).long(), EPS, 1e-9, 3)            # steps too small to see
    for z in spy.fed:
        noise = (z - x) / EPS
        assert 0.99 < noise.max() <= 1.00001 and 0.99 < -noise.min() <= 1.00001
        assert (torch.histc(noise, 10, -1, 1) / noise.numel() - 0.1).abs().max() < 0.03
        assert (z - spy.fed[0]).abs().max() < 1e-8                      # no second start
    assert (spy.fed[0][0] - spy.fed[0][1]).abs().max() > 0.1            # not one for all images


def test_pgd_and_fgsm_reach_the_closed_form_optimum_of_a_linear_model(script):
    (x, y), net = images(6, classes=2), linear()
    w = net[1].weight[1 - y] - net[1].weight[y]                         # slope of the margin lost
    best = (x + EPS * w.sign().view_as(x)).clamp(0, 1)                  # black pixels move as well
    assert ((best - x)[0] > 0).sum() > 10 and ((best - x)[1] < 0).sum() > 10
    inside = 0.2 + 0.6 * x                                              # where the box doesn't bind
    for attack in ("pgd", "fgsm"):
        close(run(script, attack, net, x, y), best, 1e-12)
        moved = (run(script, attack, net, inside, y) - inside).flatten(1)
        close((w * moved).sum(1), EPS * w.abs().sum(1), 1e-12)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_eps_0_an_attack_returns_the_image_exactly_and_no_images_ask_nothing(
        script, attack, dtype):
    (x, y), spy = images(), Spy(linear(3).to(dtype))
    x = x.to(dtype)
    assert torch.equal(run(script, attack, spy, x, y, eps=0.0), x)
    spy.fed.clear()
    assert run(script, attack, spy, x[:0], y[:0]).shape == x[:0].shape and spy.fed == []


def test_an_attack_takes_one_gradient_per_step_in_eval_mode(script, attack):
    (x, y), spy = images(), Spy(moody())
    run(script, attack, spy, x, y, steps=4)
    before, steps, after = {"fgsm": (0, 1, 0), "pgd": (0, 4, 0), "pgd_at_loss": (0, 4, 1),
                            "trades_loss": (1, 4, 2)}[attack]           # p(x); attack; training
    assert spy.asked == [False] * before + [True] * steps + [False] * after
    assert spy.modes == [False] * (before + steps) + [True] * after
    assert attack != "fgsm" or torch.equal(spy.fed[0], x)               # it has no random start


def test_a_list_of_step_sizes_is_taken_one_after_another(script):
    x, slope = torch.full((3, 2, 4, 6), 0.5, dtype=torch.float64), linear()
    spy = Spy(slope)
    script.pgd(spy, x, torch.zeros(3).long(), 0.4, [0.02, 0.01, 0.005], 3)
    moved = [float((b - a).abs().amax()) for a, b in zip(spy.fed, spy.fed[1:])]
    close(moved, [0.02, 0.01], 1e-7)
    torch.manual_seed(1)
    falling = script.pgd(slope, x, torch.zeros(3).long(), 0.4, [0.02, 0.02], 2)
    torch.manual_seed(1)
    close(script.pgd(slope, x, torch.zeros(3).long(), 0.4, 0.02, 2), falling, 0)


@pytest.mark.parametrize("fails_at", [None, 1, 2])
def test_an_attack_leaves_model_and_image_as_they_were_also_when_the_model_raises(
        script, attack, fails_at):
    (x, y), spy = images(), Spy(moody(), fails_at)
    spy.net[2].eval()                                                   # a mode of its own
    spy.net[1].bias.requires_grad_(False)
    spy.net[1].weight.grad = torch.ones_like(spy.net[1].weight)
    x.requires_grad_()

    def state():
        return ([m.training for m in spy.modules()], [w.requires_grad for w in spy.parameters()],
                [v.tolist() for v in (x, *spy.state_dict().values())],
                [None if v.grad is None else v.grad.tolist() for v in (x, *spy.parameters())])
    before = state()
    try:
        run(script, attack, spy, x, y)
        assert fails_at is None or len(spy.fed) < fails_at
    except ZeroDivisionError:
        assert len(spy.fed) == fails_at
    assert state() == before


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_works_under_no_grad_and_its_result_is_detached(script, attack):
    (x, y), net, results = images(), smooth(), []
    for mode in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(mode):
            results.append(run(script, attack, net, x, y))
            assert torch.is_grad_enabled() == mode
        assert not results[-1].requires_grad and results[-1].grad_fn is None
    assert torch.equal(*results) and (results[0] - x).abs().max() > EPS / 2


def test_a_gradient_that_is_not_finite_is_an_error_and_not_robustness(script, attack):
    x, y = images()                                                     # image 0 is black
    model = Spy(lambda x: x.flatten(1)[:, :3].abs().sqrt())             # a finite value
    run(script, attack, model, x[1:], y[1:], eps=0.0)
    with pytest.raises(FloatingPointError, match="gradient that is not finite"):
        run(script, attack, model, x, y, eps=0.0)
    once = Spy(lambda x: x.flatten(1)[:, :3] * (np.nan if len(once.fed) == 2 else 1))
    with pytest.raises(FloatingPointError, match="gradient that is not finite"):
        run(script, attack if attack != "fgsm" else "pgd", once, x, y)


def test_the_same_seed_gives_the_same_attack(script, attack):
    (x, y), spy, results = images(), Spy(smooth()), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        spy.fed.clear()
        run(script, attack, spy, x, y, steps=1)
        results.append(torch.stack(spy.fed))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (attack == "fgsm")


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_attacking_an_image_alone_is_attacking_it_in_a_batch(script, attack, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.7))      # one start
    (x, y), net = images(), moody()
    batch = run(script, attack, net, x, y)
    for i in range(len(x)):
        close(run(script, attack, net, x[i:i + 1], y[i:i + 1]), batch[i:i + 1], 1e-12)


# ---- Adversarial training: PGD-AT and TRADES -----------------------------------------------------

def trades_by_hand(net, x, y, eps, alpha, steps, beta, wrong=None):
    """Zhang et al. 2019, Eq. (5) and Alg. 1, with KL(p || q) = sum_k p_k log(p_k / q_k)."""
    z = x + 1e-3 * torch.randn_like(x)
    for k in range(steps + 1):
        z = torch.maximum(torch.minimum(z, x + eps), x - eps).clamp(0, 1).detach().requires_grad_()
        p, q = net(x).softmax(1), net(z).softmax(1)
        p, q = (q, p) if wrong == "reversed" else (p.detach(), q) if wrong == "constant" else (p, q)
        kl = (p * (p / q).log()).sum()
        if k < steps:
            z = z + alpha * torch.autograd.grad(kl, z)[0].sign()
    return -net(x).log_softmax(1)[range(len(y)), y].mean() + beta * kl / len(y)


def value_and_gradients(net, loss):
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


def test_pgd_at_is_the_mean_cross_entropy_at_the_attacked_images(script):
    (x, y), net = images(), smooth()
    torch.manual_seed(1)
    ours = value_and_gradients(net, script.pgd_at_loss(net, x, y, EPS, ALPHA, STEPS))
    torch.manual_seed(1)
    log_p = net(script.pgd(net, x, y, EPS, ALPHA, STEPS)).log_softmax(1)
    for a, b in zip(ours, value_and_gradients(net, -log_p[range(5), y].sum() / 5)):
        close(a, b, 1e-12)


def test_trades_is_clean_cross_entropy_plus_beta_times_kl_of_clean_from_attacked(script):
    (x, y), net, results = images(), smooth(), []
    for wrong in (None, None, "reversed", "constant"):
        torch.manual_seed(1)
        args = net, x, y, EPS, ALPHA, STEPS, 6.0
        loss = trades_by_hand(*args, wrong) if results else script.trades_loss(*args)
        results.append(value_and_gradients(net, loss))
    for ours, expected in zip(*results[:2]):
        close(ours, expected, 1e-12)
    assert abs(results[0][0] - results[2][0]) > 1e-6                    # KL(adv || clean) differs,
    assert (results[0][1] - results[3][1]).abs().max() > 1e-3           # and so would a constant p


def test_trades_with_beta_0_is_standard_training(script):
    (x, y), net = images(), smooth()
    ours = value_and_gradients(net, script.trades_loss(net, x, y, EPS, ALPHA, 3, 0.0))
    standard = value_and_gradients(net, F.cross_entropy(net(x), y))
    assert all(torch.equal(a, b) for a, b in zip(ours, standard))


# ---- Accuracy ------------------------------------------------------------------------------------

def test_accuracy_counts_images_and_attacks_only_those_that_are_still_right(script):
    model, seen = Spy(lambda x: torch.cat([0.5 - x, x - 0.5], 1).flatten(1)), []    # x > 1/2 ?
    x = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, 0.4]).view(6, 1, 1, 1)
    y = torch.tensor([0, 0, 1, 1, 0, 1])
    batches = [(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])]        # right: 0.1 0.2 0.9

    def attack(model, x, y):
        seen.append((x, y))
        return x + 0.35                                                 # 0.2 crosses 1/2
    assert script.accuracy(model, batches) == 3 / 6
    assert script.accuracy(model, iter(batches), attack) == 2 / 6
    assert len(seen) == 1 and torch.equal(seen[0][0], x[[0, 1, 3]])     # and no empty batch
    assert seen[0][1].tolist() == [0, 0, 1] and not any(model.modes) and model.training


def test_an_attack_of_eps_0_gives_the_clean_accuracy_and_a_real_one_less(script):
    (x, y), net = images(40), smooth()
    clean, same, less = (script.accuracy(net, zip(x.split(16), y.split(16)), attack) for attack in (
        None, lambda *a: script.pgd(*a, 0.0, 0.1, 3), lambda *a: script.pgd(*a, 1.0, 0.2, 9)))
    assert 0 < clean < 1 and clean == same and less < clean


def test_accuracy_of_nothing_or_of_a_broken_model_is_an_error(script):
    with pytest.raises(ValueError, match="accuracy of no images"):
        script.accuracy(linear(), [])
    x, y = images()
    with pytest.raises(FloatingPointError, match="logit that is not finite"):
        script.accuracy(linear(3), [(x.masked_fill(x == 1, float("nan")), y)])


def test_labels_of_shape_B_1_count_as_labels_and_one_hot_ones_are_refused(script):
    (x, y), net = images(40), smooth()
    expected = script.accuracy(net, [(x, y)])
    assert 0 < expected < 1 and script.accuracy(net, [(x, y[:, None])]) == expected
    attack = functools.partial(script.fgsm, eps=EPS)
    assert script.accuracy(net, [(x, y[:, None])], attack) == script.accuracy(net, [(x, y)], attack)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        script.accuracy(net, [(x, F.one_hot(y, 3))])


# ---- Frozen: within an attack a kernel is computed once, and it is never stale -------------------

KERNELS = {"s4": (s4_adv.S4, "kernel"), "dss": (s4_adv.DSS, "kernel"),
           "s5": (s4_adv.S5, "matrices"), "attention": (attention_adv.EMA, "kernel")}


@pytest.mark.parametrize("name", KERNELS)
def test_an_attack_computes_each_kernel_once_and_training_every_time(name, monkeypatch):
    owner, method = KERNELS[name]
    original, calls = getattr(owner, method), []
    monkeypatch.setattr(owner, method, lambda *args: calls.append(1) or original(*args))
    script, model, (x, y) = MODELS[name], tiny(name), images()          # two layers
    attack = EPS, ALPHA, 5
    for job, expected in [
            (lambda: (model(x), model(x)), 2 + 2), (lambda: script.pgd(model, x, y, *attack), 2),
            (lambda: script.pgd_at_loss(model, x, y, *attack), 2 + 2),
            (lambda: script.trades_loss(model, x, y, *attack, 6.0), 2 + 2 + 2),
            (lambda: script.accuracy(model, 3 * [(x, y)], lambda *a: script.pgd(*a, *attack)), 2)]:
        calls.clear()
        job()
        assert len(calls) == expected


def test_a_frozen_model_returns_the_same_numbers_at_every_length_and_wants_no_gradient(name):
    model, (x, _) = tiny(name, ads="relu"), images()
    inputs = [x, x[..., :4], x[:2], x]
    expected = [model(v) for v in inputs]
    with MODELS[name].frozen(model):
        for v, y in zip(inputs, expected):
            close(model(v), y.detach(), 1e-12)
            assert not model(v).requires_grad
        model.requires_grad_()                                          # who asks for one gets it
        for _ in range(2):
            model(x).sum().backward()
        assert all(w.grad is not None for w in model.parameters())
    close(model.requires_grad_(False)(x), expected[0].detach(), 1e-12)


def test_a_changed_weight_makes_a_new_kernel_at_once(name):
    model, other, fresh, (x, _) = tiny(name), tiny(name), tiny(name), images()
    buffers = list(model.buffers()) or list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    with MODELS[name].frozen(model):
        last = model(x)
        for change in (optimizer.step, lambda: model.load_state_dict(other.state_dict()),
                       lambda: [w.mul_(1.1) for w in buffers]):
            with torch.no_grad():
                change()
            fresh.load_state_dict(model.state_dict())
            close(model(x), fresh(x), 1e-12)
            assert (model(x) - last).abs().max() > 1e-6
            last = model(x)


@pytest.mark.parametrize("name", KERNELS)
def test_weights_given_from_outside_never_meet_a_kernel_of_others_at_their_address(name):
    script, model, (x, _) = MODELS[name], tiny(name), images()
    flat = nn.utils.parameters_to_vector(model.requires_grad_(False).parameters())

    def out(factor):
        parts = (factor * flat).split([w.numel() for w in model.parameters()])
        given = {n: v.view_as(w) for (n, w), v in zip(model.named_parameters(), parts)}
        return torch.func.functional_call(model, given, (x,))           # freed when it returns
    factors = [1 + 0.1 * k for k in range(8)]
    expected = [out(factor) for factor in factors]
    with script.frozen(model):
        for factor, y in zip(factors, expected):
            close(out(factor), y, 1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_a_module_without_weights_as_data_parallel_makes_them_keeps_nothing(name):
    made, script, module = [], MODELS[name], nn.Identity()
    with script.frozen(module):
        assert [script.once(module, 0, lambda: made.append(1) or len(made)) for _ in "ab"] == [1, 1]
    assert script.once(module, 0, lambda: 7) == 7


def test_frozen_may_be_nested_and_left_by_an_exception_and_leaves_nothing_behind(name):
    script, model, (x, _) = MODELS[name], tiny(name), images(shape=(2, 32, 32))
    if name == "attention":
        model = tiny(name, max_len=256)
    keys, before, size = list(model.state_dict()), model(x), len(pickle.dumps(model))
    model.blocks[0].eval()
    with script.frozen(model):
        with pytest.raises(ZeroDivisionError), script.frozen(model):
            model(x)
            raise ZeroDivisionError
        assert not model.training and not any(w.requires_grad for w in model.parameters())
        model(x)
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert all(w.requires_grad for w in model.parameters()) and list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), before)
        twin(x).sum().backward()
    assert name == "s5" or len(pickle.dumps(model)) < size + 4000       # a kernel is 25 kB or more


# ---- Drawn digits: data without a download -------------------------------------------------------

def test_drawn_digits_depend_on_their_seed_alone(script):
    state = torch.get_rng_state()
    x, y = script.drawn_digits(501, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (x.dtype, x.shape) == (torch.uint8, (501, 1, 28, 28)) and x.min() < 50 and x.max() > 150
    assert (y.dtype, y.shape) == (torch.int64, (501,)) and set(y.tolist()) == set(range(10))
    torch.manual_seed(7)
    again, other = script.drawn_digits(501, seed=3), script.drawn_digits(501, seed=4)
    assert torch.equal(again[0], x) and torch.equal(again[1], y) and not torch.equal(other[0], x)
    assert script.drawn_digits(2, seed=0, size=16)[0].shape == (2, 1, 16, 16)


def test_drawn_digits_show_their_labels():
    x, y = s4_adv.drawn_digits(4000, seed=0)
    x = F.pad(x.flatten(1).double() / 255, (0, 1), value=1)             # least squares, with a bias
    gram = x[:3000].T @ x[:3000] + 10 * torch.eye(785)
    w = torch.linalg.solve(gram, x[:3000].T @ F.one_hot(y[:3000]).double())
    assert ((x[3000:] @ w).argmax(1) == y[3000:]).double().mean() > 0.3         # chance is 0.1


# ---- train.py: data ------------------------------------------------------------------------------

TINY = (
    "--d-model 8 --d-state 4 --n-layers 1 --patch-size 14 --batch-size 16 --train-size 32 "
    "--test-size 20 --epochs 1 --steps 2"
).split()
DATA = next(
    (
        Path(d)
        for d in (os.environ.get("SSM_ADV_DATA"), HERE.parent / "shared" / "data", HERE / "data")
        if d and Path(d).is_dir()
    ),
    None,
)


train.drawn_digits = functools.cache(train.drawn_digits)  # a function of its arguments


def needs(folder):
    return pytest.mark.skipif(
        DATA is None or not (DATA / folder).exists(),
        reason=f"no {folder} in SSM_ADV_DATA, ../shared/data or ./data",
    )


def settings(*words):
    return train.settings([*words, "--device", "cpu"])[0]


def trains(out, *words):
    """train.main in this process, on the drawn digits unless told otherwise."""
    kind = (
        [] if {"--dataset", "--resume", "--evaluate"} & set(words) else ["--dataset", "synthetic"]
    )
    return train.main([*kind, *words, "--out", str(out), "--device", "cpu"])


def log(out):
    """log.csv without its last column, the seconds, which no two runs share."""
    return [line.rsplit(",", 1)[0] for line in (Path(out) / "log.csv").read_text().splitlines()]


def weights(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)["model"]


def test_the_last_1000_training_images_are_held_out_and_sizes_take_the_first(monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", int(re.search(r"^HELD_OUT = (\d+)", inspect.getsource(
        train), re.M)[1]))
    whole = train.load_data(
        settings("--dataset", "synthetic", "--out", "x", "--train-size", "10000")
    )
    part = train.load_data(
        settings("--dataset", "synthetic", "--out", "x", "--train-size", "7", "--test-size", "5")
    )
    assert [len(whole[k][0]) for k in ("train", "val", "test")] == [10_000, 1000, 500]
    assert [len(part[k][0]) for k in ("train", "val", "test")] == [7, 1000, 5]
    for kind, n in (("train", 7), ("val", 1000), ("test", 5)):
        assert all(torch.equal(a, b[:n]) for a, b in zip(part[kind], whole[kind]))
    both = torch.cat([whole["train"][0], whole["val"][0]])
    assert torch.equal(both, s4_adv.drawn_digits(11_000, 0)[0])
    few = torch.zeros(1000, 3, 64, 64, dtype=torch.uint8), torch.zeros(1000, dtype=torch.long)
    monkeypatch.setattr(train, "tiny_imagenet", lambda *args: (*few, *few))
    with pytest.raises(train.UserError, match="--classes 2: they have 1,000 training images, and"):
        train.load_data(settings("--dataset", "tiny-imagenet", "--out", "x", "--classes", "2"))


@pytest.mark.parametrize(
    "dataset,folder,shape,mean",
    [
        ("mnist", "MNIST", (1, 28, 28), 0.1307),
        ("cifar10", "cifar-10-batches-py", (3, 32, 32), 0.4734),
    ],
)
def test_real_images_are_whole_upright_and_in_the_published_mean(dataset, folder, shape, mean):
    if DATA is None or not (DATA / folder).exists():
        pytest.skip(f"no {folder} in SSM_ADV_DATA, ../shared/data or ./data")
    data = train.load_data(settings("--dataset", dataset, "--data-dir", str(DATA), "--out", "x"))
    n = {"mnist": 60_000, "cifar10": 50_000}[dataset] - train.HELD_OUT
    assert data["train"][0].shape == (n, *shape) and data["test"][0].shape == (10_000, *shape)
    x = torch.cat([data["train"][0], data["val"][0]])
    assert x.dtype == torch.uint8 and abs(float(x.float().mean()) / 255 - mean) < 1e-3
    rows, columns = (x.float().diff(dim=d).abs().mean() for d in (-2, -1))
    assert 0.5 < rows / columns < 2  # neighbours are alike both ways
    counts = torch.bincount(torch.cat([data["train"][1], data["val"][1]]))
    assert len(counts) == 10 and (dataset == "mnist" or set(counts.tolist()) == {5000})


@needs("tiny-imagenet-200")
@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
def test_tiny_imagenet_is_decoded_once_into_a_cache_outside_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SSM_ADV_CACHE", str(tmp_path))
    x, y, x_test, y_test = train.tiny_imagenet(DATA / "tiny-imagenet-200", 2)
    assert x.shape == (1000, 3, 64, 64) and x_test.shape == (100, 3, 64, 64)
    assert x.dtype == torch.uint8 and torch.bincount(y).tolist() == [500, 500]
    assert 200 < int(y[:500].sum()) < 300  # shuffled, not class by class
    from torchvision import io

    monkeypatch.setattr(io, "decode_jpeg", None)  # a second decoding would fail
    again = train.tiny_imagenet(DATA / "tiny-imagenet-200", 2)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, y, x_test, y_test)))
    assert len(list(tmp_path.iterdir())) == 1


def test_augmentation_shifts_each_image_by_its_own_choice_and_mirrors_half():
    x = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(400, 1, 5, 5)
    out = train.augment(x, 2, True, torch.Generator().manual_seed(0))
    wide = F.pad(x[:1], (2,) * 4)[0, 0]
    crops = {}
    for i in range(5):
        for j in range(5):
            crop = wide[i : i + 5, j : j + 5]
            crops[crop.numpy().tobytes()], crops[crop.flip(-1).numpy().tobytes()] = (i, j, 0), (
                i,
                j,
                1,
            )
    seen = [crops[image[0].numpy().tobytes()] for image in out]  # KeyError: no crop of the image
    assert len({(i, j) for i, j, _ in seen}) == 25 and 150 < sum(m for *_, m in seen) < 250
    assert torch.equal(train.augment(x, 0, False, torch.Generator()), x)


# ---- train.py: FreeAT and YOPO -------------------------------------------------------------------


def tiny_model(name):
    d_state = {"s5": 8}.get(name, 4)
    extra = {"ssm": name} if MODELS[name] is s4_adv else {}
    return scrambled(MODELS[name].Classifier(1, 10, 8, d_state, 1, 2, **extra))


def test_a_free_replay_is_one_backward_pass_that_serves_weights_and_noise(name):
    model, twin = tiny_model(name), tiny_model(name)
    twin.load_state_dict(model.state_dict())
    x, y, noise = torch.rand(3, 1, 4, 4).double(), torch.tensor([1, 2, 3]), 0.1 * randn(3, 1, 4, 4)
    noise = noise.clamp(-EPS, EPS)
    x_adv = (x + noise).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(twin(x_adv), y)
    loss.backward()
    expected = (noise + EPS * x_adv.grad.sign()).clamp(-EPS, EPS)
    assert train.free_backward(model, x, y, noise, EPS) == loss
    assert torch.equal(noise, expected) and not torch.equal(x_adv.grad, torch.zeros_like(x))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters()))


def test_free_at_replays_m_times_carries_its_noise_and_divides_its_epochs(tmp_path, monkeypatch):
    calls, real = [], train.free_backward

    def spy(model, x, y, noise, eps):
        before, w = noise.clone(), next(model.parameters()).detach().clone()
        loss = real(model, x, y, noise, eps)
        calls.append((x.clone(), before, noise.clone(), w))
        return loss

    monkeypatch.setattr(train, "free_backward", spy)
    words = [*TINY, "--method", "free", "--replays", "3", "--epochs", "6"]
    assert trains(tmp_path / "free", *words) == 0
    assert (
        len(calls) == 2 * 2 * 3 and len(log(tmp_path / "free")) == 1 + 2
    )  # epochs, batches, replays
    assert torch.equal(calls[0][1], torch.zeros_like(calls[0][1]))
    for a, b in zip(calls, calls[1:]):
        assert torch.equal(b[1], a[2]) and not torch.equal(
            b[3], a[3]
        )  # noise carried, weights moved
    assert all(
        torch.equal(calls[3 * i][0], calls[3 * i + k][0]) for i in range(4) for k in range(3)
    )


def test_yopo_holds_minus_the_gradient_at_the_embedding(name, monkeypatch):
    model, x, y = tiny_model(name), torch.rand(2, 1, 4, 4).double(), torch.tensor([1, 2])
    seen, real = [], train.ascend

    def spy(model, loss, x, start, *args):
        v = start.clone().requires_grad_()
        seen.append((start, torch.autograd.grad(loss(v), v)[0]))
        return real(model, loss, x, start, *args)

    monkeypatch.setattr(train, "ascend", spy)
    train.yopo_backward(model, x, y, EPS, ALPHA, 1, 2)
    (start, ascent), h = seen[0], 1e-6
    d = randn(*x.shape)  # loss goes up by <grad, d>: p is its negative
    with torch.no_grad():
        rise = F.cross_entropy(model(start + h * d), y) - F.cross_entropy(model(start - h * d), y)
    close((ascent * d).sum(), rise / (2 * h), 1e-6)


def test_yopo_5_3_passes_five_times_through_the_network_and_stays_in_ball_and_box(monkeypatch):
    model, x, y = tiny_model("s4"), torch.rand(2, 1, 4, 4).double(), torch.tensor([1, 2])
    full, points, embed, logits = [], [], model.embed, model.logits
    monkeypatch.setattr(model, "logits", lambda z: full.append(1) or logits(z))
    monkeypatch.setattr(model, "embed", lambda v: points.append(v.detach()) or embed(v))
    train.yopo_backward(model, x, y, EPS, ALPHA, 5, 3)
    assert len(full) == 5 and len(points) == 5 * (1 + 3 + 1)
    for v in points:
        assert (v - x).abs().max() <= EPS + 1e-12 and v.min() >= 0 and v.max() <= 1
    assert (points[0] - x).unique().numel() > 4  # a uniform start, not a corner
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_yopo_without_inner_steps_and_radius_is_standard_training():
    model, twin = tiny_model("dss"), tiny_model("dss")
    twin.load_state_dict(model.state_dict())
    x, y = torch.rand(2, 1, 4, 4).double(), torch.tensor([1, 2])
    loss = F.cross_entropy(twin(x), y)
    loss.backward()
    close(train.yopo_backward(model, x, y, 0.0, 0.0, 2, 1), loss.detach())
    for a, b in zip(model.parameters(), twin.parameters()):
        close(a.grad, b.grad)


# ---- train.py: runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("ads_given", ([], ["--ads"]), ids=("without", "ads"))
def test_every_model_trains_two_steps_by_every_method_with_and_without_ads(
    name, method, ads_given, tmp_path
):
    data = (
        ["--dataset", "mnist", "--data-dir", str(DATA)]
        if DATA and (DATA / "MNIST").exists()
        else ["--dataset", "synthetic"]
    )
    before = weights_at_start(name, method, ads_given, data)
    assert (
        trains(
            tmp_path / "run",
            *TINY,
            *data,
            "--model",
            name,
            "--method",
            method,
            *ads_given,
            "--replays",
            "1",
        )
        == 0
    )
    after = weights(tmp_path / "run")
    trained = [k for k in before if not torch.equal(before[k], after[k])]
    assert {
        k
        for k, _ in train.build(
            settings(*data, *TINY, "--model", name, *ads_given, "--out", "x")
        ).named_parameters()
    } == set(trained)


def weights_at_start(name, method, ads_given, data):
    data = data or ["--dataset", "synthetic"]
    return train.build(
        settings(*data, *TINY, "--model", name, *ads_given, "--out", "x")
    ).state_dict()


@pytest.mark.parametrize("method", ("pgd", "free", "yopo"))
def test_a_run_cut_after_any_batch_resumes_bit_for_bit(method, tmp_path, monkeypatch):
    words = [*TINY, "--method", method, "--epochs", "3", "--replays", "1", "--save-every", "0"]
    assert trains(tmp_path / "whole", *words) == 0
    real, todo = train.train_batch, [0]

    def dies(*args):
        todo[0] -= 1
        if todo[0] < 0:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(train, "train_batch", dies)
    for cuts in range(7):  # 3 epochs of 2 batches
        todo[0] = 1
        try:
            assert trains(tmp_path / "cut", *words, *(["--resume"] if cuts else [])) == 0
            break
        except ZeroDivisionError:
            pass
    assert cuts == 5 and log(tmp_path / "cut") == log(tmp_path / "whole")
    for kind in ("last.pt", "best.pt"):
        a, b = weights(tmp_path / "whole", kind), weights(tmp_path / "cut", kind)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert trains(tmp_path / out, *TINY, "--seed", seed) == 0
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and log(tmp_path / "a") == log(tmp_path / "b")
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_best_is_the_highest_pgd_10_on_the_held_out_images_and_diff_is_best_minus_last(
    tmp_path, monkeypatch, capsys
):
    scores, real = iter([0.2, 0.5, 0.3]), train.evaluate

    def planted(model, images, labels, specs, c, place):
        found = real(model, images[:20], labels[:20], specs, c, place)
        if place[0] == "val":
            found["pgd-10"]["accuracy"] = next(scores)
        return found

    monkeypatch.setattr(train, "evaluate", planted)
    assert trains(tmp_path / "run", *TINY, "--epochs", "3") == 0
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["epoch"] == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["Best"]["epoch"], result["Last"]["epoch"]) == (2, 3)
    for k in ("clean", "pgd-10"):
        assert result["Diff"][k] == result["Best"][k] - result["Last"][k]
    assert "Best (epoch 2)" in capsys.readouterr().out


def test_eps_and_alpha_grow_linearly_through_the_warm_up(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train,
        "attacked",
        lambda c, method, model, x, y, eps, alpha: seen.append((eps, alpha)) or x,
    )
    assert (
        trains(
            tmp_path / "run",
            *TINY,
            "--epochs",
            "3",
            "--eps-warmup",
            "2",
            "--eps",
            "0.4",
            "--alpha",
            "0.1",
        )
        == 0
    )
    close([e for e, _ in seen], [0, 0.1, 0.2, 0.3, 0.4, 0.4])
    close([a for _, a in seen], [0, 0.025, 0.05, 0.075, 0.1, 0.1])


def test_alphas_are_the_steps_of_the_attack_in_training_and_grow_with_the_warm_up(
        tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "attacked", lambda c, method, model, x, y, eps, alpha: seen.append(
        alpha) or x)
    words = "--epochs 2 --eps-warmup 1 --eps 0.4 --alphas 0.2,0.1 --alpha 0.3".split()
    assert trains(tmp_path / "run", *TINY, *words) == 0                     # two batches an epoch
    close(seen, [[0, 0], [0.1, 0.05], [0.2, 0.1], [0.2, 0.1]])


def test_a_loss_that_is_not_finite_stops_the_run_or_is_dropped_and_counted(
    tmp_path, monkeypatch, capsys
):
    real, n = train.loss_of, [0]

    def explodes(*args):
        n[0] += 1
        return real(*args) * (math.nan if n[0] == 2 else 1.0)

    monkeypatch.setattr(train, "loss_of", explodes)
    assert trains(tmp_path / "stop", *TINY) == 2
    assert "not finite at epoch 1, batch 2" in capsys.readouterr().err
    n[0] = 0
    assert trains(tmp_path / "skip", *TINY, "--nan", "skip") == 0
    assert [row.split(",")[-1] for row in log(tmp_path / "skip")] == ["skipped", "1"]
    rows = [row.split(",") for row in log(tmp_path / "skip")]
    assert 2.0 < float(rows[1][rows[0].index("loss")]) < 2.7            # the mean of what counted
    assert all(v.isfinite().all() for v in weights(tmp_path / "skip").values())


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train.write(path, "before")
    monkeypatch.setattr(
        train.os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(train.UserError, match="No space left"):
        train.write(path, "after")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["last.pt"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, capsys):
    words = [*TINY, "--epochs", "2", "--save-every", "0"]
    assert trains(tmp_path / "run", *words) == 0
    whole = log(tmp_path / "run"), weights(tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert trains(tmp_path / "run", *words, "--resume") == 0
    assert "damaged" in capsys.readouterr().err
    assert log(tmp_path / "run") == whole[0]
    assert all(torch.equal(v, whole[1][k]) for k, v in weights(tmp_path / "run").items())
    assert trains(tmp_path / "run", *words, "--resume") == 0        # of a finished run: the test
    assert "trained to its end" in capsys.readouterr().out and log(tmp_path / "run") == whole[0]


def test_the_table_gives_each_model_a_line_with_mean_and_spread_over_its_seeds(tmp_path, capsys):
    for out, *words in ("a", "--seed", "0"), ("b", "--seed", "1"), ("c", "--ads"):
        assert trains(tmp_path / out, *TINY, *words) == 0
    for out, clean in ("a", 0.25), ("b", 0.75):
        path = tmp_path / out / "result.json"
        result = json.loads(path.read_text())
        result["Best"]["clean"] = clean
        path.write_text(json.dumps(result))
    table = ["--table", *(str(tmp_path / out) for out in "abc")]
    capsys.readouterr()
    assert train.main(table) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("synthetic, method pgd, eps 8/255, steps 2, width 8")
    assert lines[4].startswith("| s4 | 2 | 50.0 +- 35.4 / ")
    assert lines[5].startswith("| s4 + AdS relu | 1 |") and not lines[1]
    assert len({line.count("|") for line in lines[2:]}) == 1 and "aa" not in lines[2]

    for eps, out in (("0", "a"), ("8/255", "b"), ("16/255", "c")):          # b at the run's own
        assert train.main(["--evaluate", str(tmp_path / out / "best.pt"), "--attacks", "clean,aa",
                           "--test-size", "6", "--eps", eps]) == 0
    rows = json.loads((tmp_path / "b" / "best-evaluation.json").read_text())["rows"]
    capsys.readouterr()
    assert train.main(table) == 0
    with_aa = capsys.readouterr().out.splitlines()
    assert rows[-1]["attack"] == "aa" and with_aa[2].endswith("| Best: aa | logs | evaluations |")
    assert with_aa[4].split(" | ")[-3] == f"{100 * rows[-1]['accuracy']:.1f}, n 6, seed 1"
    assert with_aa[4].split(" | ")[-1] == f"[1]({tmp_path}/b/best-evaluation.json) |"
    assert with_aa[5].split(" | ")[-3:-1] == ["", f"[0]({tmp_path}/c/log.csv)"]
    for accuracy in 0.0, 1.0:                                           # of two seeds the worse
        kept = json.loads((tmp_path / "b" / "best-evaluation.json").read_text())
        kept["rows"].append(kept["rows"][-1] | {"seed": accuracy, "accuracy": accuracy})
        (tmp_path / "b" / "best-evaluation.json").write_text(json.dumps(kept))
    assert train.main(table) == 0 and " | 0.0, n 6, seed 1 |" in capsys.readouterr().out
    path = tmp_path / "b" / "best-evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epoch": 77}))   # of an older Best
    assert train.main(table) == 0 and "aa" not in capsys.readouterr().out
    size = json.loads((tmp_path / "b" / "result.json").read_text())["n_test"]
    for n, *other in (size,), (6,), (size, "--alpha", "0"):     # the largest n, the run's own step
        assert train.main(["--evaluate", str(tmp_path / "a" / "best.pt"), "--attacks",
                           "pgd-official", "--test-size", str(n), *other]) == 0
    rows = json.loads((tmp_path / "a" / "best-evaluation.json").read_text())["rows"]
    rows = [r for r in rows if r["attack"] == "pgd-official"]
    assert [r["n"] for r in rows] == [size, 6, size]
    capsys.readouterr()
    assert train.main(table) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("| Best: pgd-official | logs | evaluations |")
    assert lines[4].split(" | ")[-3] == f"{100 * rows[0]['accuracy']:.1f}, seed 0"
    (tmp_path / "c" / "best-evaluation.json").write_text("{}")
    assert train.main(table) == 2 and "best-evaluation.json is damaged" in capsys.readouterr().err


def test_damaged_results_logs_and_analyses_are_said_to_be_so(tmp_path, capsys):
    out = tmp_path / "run"
    assert trains(out, *TINY) == 0
    result = json.loads((out / "result.json").read_text())
    damages = [lambda r: r["config"].pop("dataset"), lambda r: r["config"].update(eps=None),
               lambda r: r["config"].update(seed=[1]), lambda r: r["Best"].update(clean=10 ** 400),
               lambda r: r.update(config=[])]
    rows = [dict(statement="change", on="test", layer=1, quantity="a: MSE", value=1.0)]
    wrong = [dict(rows[0], value=None), dict(rows[0], quantity="MSE"), {"statement": "change"}]
    jobs = [("--table", "result.json", json.dumps(r), "no result.json of a finished run")
            for damage in damages for r in [copy.deepcopy(result)] if [damage(r)]]
    jobs += [("--plot", "log.csv", text, "log.csv is damaged") for text in (
        "epoch,val_clean,val_pgd-10\ninf,1,1\n", "epoch,val_clean,val_pgd-10\n1,nan,1\n",
        "epoch,val_pgd-10\n1,1\n", "epoch,val_clean,val_pgd-10\n1,1," + 200_000 * "1")]
    jobs += [("--plot", "a.json", json.dumps({"config": {"method": "pgd"}, "rows": [row]}),
              "this is no analysis") for row in wrong]
    for job, name, text, message in jobs:
        (out / name).write_text(text)
        capsys.readouterr()
        assert train.main([job, str(out / name if name == "a.json" else out)]) == 2, (name, text)
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_table_keeps_experiments_apart_and_counts_no_run_twice(tmp_path, capsys):
    for out, *words in (("a", "--lr", "1e-3"), ("b", "--lr", "2e-3"),
                        ("c", "--lr", "1e-3", "--seed", "1"),
                        ("d", "--method", "trades", "--beta", "2"),
                        ("e", "--method", "trades", "--beta", "3")):
        assert trains(tmp_path / out, *TINY, *words) == 0
    a, b, c, d, e = (str(tmp_path / out) for out in "abcde")
    capsys.readouterr()
    assert train.main(["--table", a, b, c]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:3] for line in lines[2:]] == [["| s4", "0.001", "2"], ["| s4", "0.002", "1"]]
    assert lines[0][:3] == ["| model", "lr", "seeds"] and f"({a}/log.csv)" in lines[2][-1]
    assert train.main(["--table", a, b, d, e]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[0][:5] == ["| model", "method", "lr", "beta", "seeds"]
    assert [line[2:4] for line in lines[2:]] == [
        ["0.001", ""], ["0.002", ""], ["0.003", "2.0"], ["0.003", "3.0"]]
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    result["config"]["classes"] = 7                                     # another task, no seed of c
    (tmp_path / "a" / "result.json").write_text(json.dumps(result))
    assert train.main(["--table", a, c]) == 0
    assert "| model | classes | seeds |" in capsys.readouterr().out
    for words in ([a, a], [a, f"{a}/../a"]):
        assert train.main(["--table", *words]) == 2
        assert "has the same settings and seed; give one" in capsys.readouterr().err
    (tmp_path / "a" / "result.json").write_text('{"config": {}, "n_train": 1, "n_test": 1}')
    for out in (a, str(tmp_path)):
        assert train.main(["--table", out]) == 2
        assert "there is no result.json of a finished run" in capsys.readouterr().err


def test_an_evaluation_keeps_what_was_measured_of_the_same_weights(tmp_path, monkeypatch):
    for seed in "01":
        assert trains(tmp_path / f"run{seed}.x", *TINY, "--seed", seed) == 0
    path = tmp_path / "run0.x"
    for attacks, n in ("clean,fgsm", "9"), ("fgsm", "8"), ("pgd-2,fgsm", "9"):
        assert train.main(["--evaluate", str(path), "--attacks", attacks, "--test-size", n]) == 0
    rows = json.loads((path / "last-evaluation.json").read_text())["rows"]      # of a folder: last
    assert [(r["attack"], r["n"]) for r in rows] == [
        ("clean", 9), ("fgsm", 8), ("pgd-2", 9), ("fgsm", 9)]
    for source in "10":                                                 # its rows are its own
        assert train.main(["--evaluate", str(path), "--attacks", "fgsm", "--test-size", "9",
                           "--transfer-from", str(tmp_path / f"run{source}.x" / "last.pt")]) == 0
    kept = json.loads((path / "last-evaluation.json").read_text())
    moved = [r for r in kept["rows"] if r["attack"].startswith("transfer: ")]
    assert [r["attack"] for r in moved] == 2 * ["transfer: pgd-10", "transfer: fgsm"]
    assert len(kept["rows"]) == 4 + 4 and len({r["source"] for r in moved}) == 2
    kept["checks"] = [{"passed": False}]                                # of an earlier --checks
    (path / "last-evaluation.json").write_text(json.dumps(kept))
    assert train.main(["--evaluate", str(path), "--attacks", "clean", "--test-size", "9"]) == 0
    assert json.loads((path / "last-evaluation.json").read_text())["checks"] == [{"passed": False}]
    (tmp_path / "run1.x" / "last.pt").replace(path / "last.pt")
    assert train.main(["--evaluate", str(path), "--attacks", "clean", "--test-size", "9"]) == 0
    kept = json.loads((path / "last-evaluation.json").read_text())
    assert len(kept["rows"]) == 1 and kept["checks"] == []

    monkeypatch.setattr(train, "total", lambda values, device: values)
    monkeypatch.setattr(train, "world", lambda: 2)                          # more than images
    monkeypatch.setattr(train, "rank", lambda: 1)
    found = train.evaluate(tiny_model("s4"), torch.zeros(1, 1, 4, 4), torch.tensor([0]),
                           ("clean", "fgsm"), settings("--out", "x"), "here")
    assert found["fgsm"]["right"] == 0


def test_a_run_goes_on_in_its_own_folder_alone(tmp_path, capsys):
    for out in "ab":
        assert trains(tmp_path / out, *TINY) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for place in "bc":
        capsys.readouterr()
        assert train.main(["--resume", str(tmp_path / "a"), "--out", str(tmp_path / place)]) == 2
        assert "a run goes on in its own folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert train.main(["--resume", str(tmp_path / "a"), "--out", f"{tmp_path}/b/../a"]) == 0


# ---- train.py: faults ----------------------------------------------------------------------------

# In a process of its own: starts a run again and again and kills it each time, then lets it end.
# Half of the kills come at a random time, half at a random write of a checkpoint or log: before it
# reaches the disk, before it takes its place, or after. Prints how many kills it took.
KILLER = """
import functools, os, random, signal, sys, time, train

kills, words = int(sys.argv[1]), sys.argv[2:]
chance = random.Random(0)
train.HELD_OUT, train.drawn_digits = 50, functools.cache(train.drawn_digits)
train.drawn_digits(11_000, 0), train.drawn_digits(2_000, 1)             # once, for all children
for n in range(10 * kills):
    after = chance.uniform(0.05, 0.8) if n % 2 else None
    at = chance.randint(1, 12)
    child = os.fork()
    if child == 0:
        def deadly(real):
            def call(*args):
                global at
                at -= 1
                if at == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)
            return call
        if after is None and n < kills:
            os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        os._exit(train.main(words + ["--resume"] * (n > 0)))
    if after is not None and n < kills:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(print("kills", n) if status == 0 else f"the run ended with status {status}")
"""


def alone(*words, **kw):
    """A process of its own, one thread, that finds the project's files."""
    return subprocess.Popen([sys.executable, *map(str, words)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, cwd=HERE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


def same_run(a, b):
    """Two runs' logs, checkpoints and results are the same, bit for bit, but for their clocks."""
    assert log(a) == log(b)
    for kind in ("last.pt", "best.pt"):
        x, y = (torch.load(out / kind, weights_only=True) for out in (a, b))
        for state in (x, y):
            for row in state.get("rows", ()):
                row.pop("seconds")
            state["config"] = state["seconds"] = None
        assert repr(x) == repr(y)                       # names, counters, scores, and every printed
        assert all(torch.equal(u, v) for u, v in zip(tensors(x), tensors(y), strict=True))
    x, y = (json.loads((out / "result.json").read_text()) for out in (a, b))
    assert all(x[k] == y[k] for k in ("Best", "Last", "Diff"))


def tensors(state):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    nested = (dict, list, tuple, torch.Tensor)
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values if isinstance(v, nested) for t in tensors(v)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("method", ("pgd", "free"))
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(method, tmp_path):
    """SSM_ADV_KILLS=300 python -m pytest -q test_all.py -k killed       # minutes, not seconds"""
    kills = int(os.environ.get("SSM_ADV_KILLS", 24)) // 2
    words = (f"{' '.join(TINY)} --dataset synthetic --device cpu --save-every 0 --replays 2 "
             f"--method {method} --train-size {30 * kills} --epochs 4 --eval-every 2").split()
    killer = alone("-c", KILLER, kills, *words, "--out", tmp_path / "killed")
    out, err = killer.communicate(timeout=3600)
    assert killer.returncode == 0 and f"kills {kills}\n" in out, out + err
    assert train.main([*words, "--out", str(tmp_path / "whole")]) == 0
    same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("signum", ("SIGINT", "SIGTERM"))
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(signum, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 1000)                    # this process is a user's own
    words = [*TINY, "--dataset", "synthetic", "--device", "cpu", "--train-size", "320",
             "--epochs", "2", "--save-every", "60"]
    process = alone(HERE / "train.py", *words, "--out", tmp_path / "cut")
    while "epoch" not in (line := process.stdout.readline()):               # the table's head
        assert line, process.stderr.read()
    process.stdout.readline()                                               # an epoch's row
    process.send_signal(getattr(signal, signum))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"stopped; go on with: python train.py --resume {tmp_path / 'cut'}" in err
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert train.main([*words, "--out", str(tmp_path / "whole")]) == 0
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_full_disk_stops_the_run_and_damages_nothing(tmp_path):
    words = [*TINY, "--dataset", "synthetic", "--device", "cpu", "--epochs", "2"]
    full = ("import resource, train\n"              # a file may not grow past 4 kB from epoch 2 on
            "train.HELD_OUT, end_epoch = 50, train.end_epoch\n"
            "def fills(run, data):\n"
            "    if run.epoch == 1:\n"
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "    return end_epoch(run, data)\n"
            "train.end_epoch = fills\n"
            "raise SystemExit(train.main())\n")
    process = alone("-c", full, *words, "--out", tmp_path / "full")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert err.startswith("train.py: cannot write") and "goes on with --resume" in err
    assert len(log(tmp_path / "full")) == 1 + 1 and not list((tmp_path / "full").glob("*.part"))
    assert train.main(["--resume", str(tmp_path / "full")]) == 0
    assert train.main([*words, "--out", str(tmp_path / "whole")]) == 0
    same_run(tmp_path / "full", tmp_path / "whole")


def test_a_log_that_a_crash_cut_is_written_anew(tmp_path):
    assert trains(tmp_path / "run", *TINY, "--epochs", "2") == 0
    whole = log(tmp_path / "run")
    (tmp_path / "run" / "log.csv").write_text("epoch,lr\n1,0.0")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert log(tmp_path / "run") == whole


def test_a_run_cut_before_its_first_checkpoint_begins_with_its_own_settings(tmp_path):
    assert trains(tmp_path / "run", *TINY, "--seed", "5") == 0
    (tmp_path / "whole").mkdir()
    for file in (tmp_path / "run").iterdir():
        file.rename(tmp_path / "whole" / file.name)
    text = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(text)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    same_run(tmp_path / "run", tmp_path / "whole")


def test_resume_refuses_what_is_no_run(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    (tmp_path / "empty").mkdir()
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["config"]["d_model"] = 16
    (tmp_path / "misfit").mkdir()
    torch.save(state, tmp_path / "misfit" / "last.pt")
    torch.save({"format": 1, "model": {}, "config": {"model": "bert"}}, tmp_path / "foreign.pt")
    for job, path, message in (
            ("--resume", tmp_path / "run" / "best.pt", "this holds weights for --evaluate"),
            ("--resume", tmp_path / "empty", "there is no run in this folder"),
            ("--resume", tmp_path / "misfit", "does not fit the model that its settings"),
            ("--evaluate", tmp_path / "misfit", "does not fit the model that its settings"),
            ("--analyse", tmp_path / "misfit", "does not fit the model that its settings"),
            ("--evaluate", tmp_path / "foreign.pt", "damaged, or no checkpoint of this program")):
        capsys.readouterr()
        assert train.main([job, str(path), "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_checkpoint_is_not_resumed_beside_another_run_or_without_its_best(tmp_path, capsys):
    a, b, alone = (tmp_path / name for name in ("a", "b", "alone"))
    assert trains(a, *TINY) == 0 and trains(b, *TINY, "--seed", "7") == 0
    (b / "last.pt").rename(a / "seed7.pt")
    before = {p: p.read_bytes() for p in a.iterdir()}
    alone.mkdir()
    (alone / "last.pt").write_bytes((a / "last.pt").read_bytes())
    (tmp_path / "link.pt").symlink_to(a / "last.pt")
    for path, message in ((a / "seed7.pt", "the config.json beside it is of another run"),
                          (alone / "last.pt", "best.pt: there is no such file")):
        capsys.readouterr()
        assert train.main(["--resume", str(path)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in a.iterdir()} == before
    (alone / "best.pt").write_bytes((a / "best.pt").read_bytes())
    assert train.main(["--resume", str(alone / "last.pt")]) == 0
    assert train.main(["--resume", str(tmp_path / "link.pt")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "alone", "b", "link.pt"]


def test_a_run_that_was_begun_while_the_data_were_read_is_left_alone(tmp_path, monkeypatch, capsys):
    out, load_data = tmp_path / "run", train.load_data

    def slow(c):
        monkeypatch.setattr(train, "load_data", load_data)
        assert trains(out, *TINY, "--seed", "1") == 0
        return load_data(c)
    monkeypatch.setattr(train, "load_data", slow)
    assert trains(out, *TINY, "--seed", "2") == 2
    assert "holds another run" in capsys.readouterr().err
    assert json.loads((out / "result.json").read_text())["config"]["seed"] == 1


def test_a_signal_while_the_last_checkpoint_is_written_stops_before_the_test(
        tmp_path, monkeypatch, capsys):
    out, save = tmp_path / "run", train.save

    def slow(run):
        save(run)
        if run.batch:                                                   # not the first, not the end
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train, "save", slow)
    assert trains(out, *TINY) == 130
    assert "go on with: python train.py --resume" in capsys.readouterr().err
    monkeypatch.setattr(train, "save", save)
    assert not (out / "result.json").exists() and train.main(["--resume", str(out)]) == 0


def test_where_nobody_reads_or_nothing_can_be_opened_one_sentence_says_so(
        tmp_path, monkeypatch, capsys):
    class Closed(io.TextIOWrapper):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(sys, "stdout", Closed(io.BytesIO()))
    assert trains(tmp_path / "a", *TINY) == 2
    monkeypatch.setattr(sys, "stdout", None)                            # as after >&-
    assert trains(tmp_path / "b", *TINY) == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert trains(tmp_path / "\u00fc x", *TINY) == 0
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert train.main(["--evaluate", 300 * "x"]) == 2

    def refuse(*args, **kw):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(torch, "load", refuse)
    assert train.main(["--evaluate", str(tmp_path / "b" / "best.pt")]) == 2
    broken, long, closed = capsys.readouterr().err.splitlines()
    assert "train.py: the output: Broken pipe; choose another path; a run goes on" in broken
    assert "xxx: File name too long" in long
    assert "best.pt: cannot be read (Permission denied); see to its access rights" in closed


def test_a_part_of_a_batch_without_images_has_activations_of_size_0():
    found = train.largest_activation(tiny_model("s4").float(), torch.zeros(0, 1, 4, 4))
    assert found == ("no layer", 0.0)


# ---- train.py: evaluation ------------------------------------------------------------------------


def test_evaluation_counts_by_hand_and_attacks_only_what_is_still_right(monkeypatch):
    c = settings("--dataset", "synthetic", "--out", "x", "--batch-size", "4")
    images = torch.randint(256, (10, 1, 4, 4), dtype=torch.uint8)
    model, asked = tiny_model("s4").float(), []
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    labels[::3] = (labels[::3] + 1) % 10  # 4 of 10 are wrong from the start

    def breaks_the_first(model, x, y):
        asked.append(len(x))
        return torch.cat([1 - x[:1], x[1:]])

    monkeypatch.setattr(
        train, "attacks_of", lambda spec, c: [] if spec == "clean" else [breaks_the_first]
    )
    found = train.evaluate(model, images, labels, ("clean", "x"), c, "here")
    assert found["clean"]["right"] == 6 and found["clean"]["accuracy"] == 0.6 and sum(asked) == 6
    with torch.no_grad():
        right = model(images.float() / 255).argmax(1) == labels
        broken = sum(
            int(
                model(1 - images[b][right[b]][:1].float() / 255).argmax(1) != labels[b][right[b]][0]
            )
            for b in (slice(0, 4), slice(4, 8), slice(8, 10))
        )
    assert found["x"]["right"] == 6 - broken


def test_the_interval_is_wilsons():
    low, high = train.interval(7, 10)
    for p in (low, high):  # |7/10 - p| = z sqrt(p (1-p) / n)
        close(abs(0.7 - p), 1.959964 * math.sqrt(p * (1 - p) / 10))
    assert train.interval(0, 10)[0] == 0 and 0.2 < train.interval(0, 10)[1] < 0.35
    for n in (500, 700, *range(1, 50)):                                     # rounding, too
        assert train.interval(0, n)[0] >= 0 and train.interval(n, n)[1] <= 1


def test_evaluate_measures_a_checkpoint_and_writes_csv_and_json(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    best = tmp_path / "run" / "best.pt"
    assert (
        train.main(
            ["--evaluate", str(best), "--attacks", "clean,fgsm,pgd-3x2", "--test-size", "30"]
        )
        == 0
    )
    rows = json.loads((tmp_path / "run" / "best-evaluation.json").read_text())["rows"]
    assert [r["attack"] for r in rows] == ["clean", "fgsm", "pgd-3x2"] and {
        r["n"] for r in rows
    } == {30}
    assert rows[0]["accuracy"] >= max(r["accuracy"] for r in rows[1:])
    assert (tmp_path / "run" / "best-evaluation.csv").read_text().count("\n") == 4
    assert "95 % interval" in capsys.readouterr().out


# ---- train.py: AutoAttack ------------------------------------------------------------------------

ATTACKS = {
    "apgd-ce": lambda m, x, y, eps: train.apgd_ce(m, x, y, eps, steps=30),
    "apgd-dlr": lambda m, x, y, eps: train.apgd(m, x, y, eps, 30, "dlr"),
    "apgd-t": lambda m, x, y, eps: train.apgd_t(m, x, y, eps, steps=30),
    "fab-t": lambda m, x, y, eps: train.fab_t(m, x, y, eps, steps=30),
    "square": lambda m, x, y, eps: train.square(m, x, y, eps, queries=100, span=100),
}


class LinearSpy(nn.Module):
    """Linear on pixels; remembers every point that it is shown."""

    def __init__(self, n_classes, pixels, dtype=torch.float64, detach=False):
        super().__init__()
        self.linear = nn.Linear(pixels, n_classes, dtype=dtype)
        self.detach, self.seen = detach, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        z = self.linear(x.flatten(1))
        return z.detach() if self.detach else z


def net(n_classes=5, dtype=torch.float32, channels=1):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(216, 24), nn.ReLU(), nn.Linear(24, n_classes)).to(dtype)


def dotted(n=24, dtype=torch.float32, channels=1):
    """n images 6 x 6 with black and white pixels among them."""
    torch.manual_seed(4)
    return (1.6 * torch.rand(n, channels, 6, 6, dtype=dtype) - 0.3).clamp(0, 1)


def gap(model, x, y, t, r):
    """max z_t - z_y over ball and box for a linear model: every pixel goes to the better bound."""
    W, b = model.linear.weight, model.linear.bias
    v, low, high = W[t] - W[y], (x - r).clamp(min=0).flatten(1), (x + r).clamp(max=1).flatten(1)
    return (torch.maximum(v * low, v * high).sum(1) + b[t] - b[y]).item()


def critical_radius(model, x, y):
    """The least r at which some class t reaches class y, for one image, by bisection."""
    a, b = 0.0, 1.0
    for _ in range(60):
        r = (a + b) / 2
        others = [t for t in range(model.linear.out_features) if t != int(y)]
        a, b = (a, r) if max(gap(model, x, y, t, r) for t in others) > 0 else (r, b)
    return b


# --- closed forms -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, n_classes, slack", [
    ("apgd-ce", 2, 1e-3), ("apgd-t", 5, 1e-3), ("fab-t", 2, 1e-2), ("fab-t", 5, 1e-2)])
def test_on_a_linear_model_an_image_breaks_exactly_at_its_closed_form_radius(
        name, n_classes, slack):
    torch.manual_seed(0)                                        # slack: FAB overshoots, eta = 1.05
    model = LinearSpy(n_classes, 36).requires_grad_(False)
    x = dotted(3, torch.float64)
    y = model(x).argmax(1)
    for x_1, y_1 in zip(x.split(1), y.split(1)):
        r = critical_radius(model, x_1, y_1)
        for eps, broken in ((r * (1 - slack), False), (r * (1 + slack), True)):
            x_adv = ATTACKS[name](model, x_1, y_1, eps)
            assert (model(x_adv).argmax(1) != y_1).item() is broken


def test_fab_projects_onto_the_hyperplane_with_the_least_norm_within_the_box():
    torch.manual_seed(0)
    x, w = dotted(40, torch.float64).flatten(1), torch.randn(40, 36, dtype=torch.float64)
    w[:, :5], c = 0, 10 * torch.randn(40, dtype=torch.float64)
    d = train.project(x, w, c)
    assert (x + d).min() >= -1e-12 and (x + d).max() <= 1 + 1e-12

    def most(r):                                                            # max <w, d> sign c
        s = w * c.sign()[:, None]
        down, up = (x - r).clamp(min=0), (x + r).clamp(max=1)
        return (torch.maximum(s * down, s * up) - s * x).sum(1)
    low, high = torch.zeros(40, 1, dtype=torch.float64), torch.ones(40, 1, dtype=torch.float64)
    for _ in range(60):
        r = (low + high) / 2
        enough = (most(r) >= c.abs())[:, None]
        low, high = torch.where(enough, low, r), torch.where(enough, r, high)
    met = most(torch.ones(40, 1, dtype=torch.float64)) >= c.abs()
    assert met.any() and not met.all()                                      # both cases occur
    torch.testing.assert_close((w * d).sum(1)[met], c[met])
    torch.testing.assert_close(d.abs().amax(1)[met], high[met, 0])
    reach = most(torch.ones(40, 1, dtype=torch.float64)) * c.sign()
    torch.testing.assert_close((w * d).sum(1)[~met], reach[~met])
    assert (train.project(x, w, 0 * c) == 0).all() and (train.project(x, 0 * w, c) == 0).all()


def test_one_step_of_fab_solves_a_linear_problem():
    torch.manual_seed(0)
    model = LinearSpy(2, 36).requires_grad_(False)
    x = dotted(1, torch.float64)
    y = model(x).argmax(1)
    z, W = model(x)[0], model.linear.weight
    w = (W[1 - y] - W[y]).view_as(x)
    new = train.fab_step(x, x, z[1 - y] - z[y], w, eta=1.0)
    torch.testing.assert_close((new - x).abs().max().item(), critical_radius(model, x, y))
    assert model(new).diff().abs() < 1e-9


def test_the_dlr_losses_are_those_of_the_paper():
    z, y = torch.tensor([[4.0, 1.0, 3.0, -2.0]]), torch.tensor([0])
    assert train.dlr(z, y).item() == pytest.approx(-(4 - 3) / (4 - 1))
    assert train.dlr(z, y, torch.tensor([3])).item() == pytest.approx(-(4 + 2) / (4 - (1 - 2) / 2))
    assert train.dlr(z, torch.tensor([1])).item() == pytest.approx(-(1 - 4) / (4 - 1))
    torch.testing.assert_close(train.dlr(100 * z, y), train.dlr(z, y))


def test_the_checkpoints_of_100_steps_are_those_of_the_paper():
    assert train.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_never_ends_below_pgd_on_a_smooth_problem():
    model, x = net(dtype=torch.float64), dotted(dtype=torch.float64)
    y = model(x).argmax(1)
    for eps in (0.03, 0.06):
        weaker = model(s4_adv.pgd(model, x, y, eps, eps / 4, 20)).argmax(1) != y
        stronger = model(ATTACKS["apgd-ce"](model, x, y, eps)).argmax(1) != y
        assert (stronger >= weaker).all()


def test_apgd_returns_the_best_point_that_it_saw_where_nothing_broke_the_image():
    torch.manual_seed(1)
    network, images, seen, held = net(dtype=torch.float64), dotted(24, torch.float64), [], 0
    spy = nn.Module()
    spy.forward = lambda x: seen.append(x.detach()) or network(x)
    for x in images.split(1):
        y = network(x).argmax(1)
        for steps in (5, 10):
            seen.clear()
            x_adv = train.apgd_ce(spy, x, y, 0.02, steps)
            if network(x_adv).argmax(1) == y:
                held += 1
                losses = [F.cross_entropy(network(v), y) for v in (*seen[1:], x_adv)]
                close(losses[-1], max(losses))
    assert held >= 20


# --- what every attack promises ---------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_result_lies_in_ball_and_box_and_is_detached(name, dtype):
    model, x = net(dtype=dtype), dotted(dtype=dtype)
    y = model(x).argmax(1)
    with torch.no_grad():                                       # as an evaluation calls it
        x_adv = ATTACKS[name](model, x, y, 0.1)
    assert x_adv.dtype == dtype and x_adv.shape == x.shape and not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (model(x_adv).argmax(1) != y).any()


@pytest.mark.parametrize("name", ATTACKS)
def test_eps_0_returns_x_and_misclassified_images_are_left_alone(name):
    model, x = net(), dotted()
    y = model(x).argmax(1)
    torch.testing.assert_close(ATTACKS[name](model, x, y, 0.0), x, rtol=0, atol=0)
    assert torch.equal(ATTACKS[name](model, x, (y + 1) % 5, 0.1), x)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_leave_weights_gradients_and_mode_untouched(name):
    model = net()
    x = dotted()
    y = model(x).argmax(1)
    before = [w.clone() for w in model.parameters()]
    model.train()
    ATTACKS[name](model, x, y, 0.1)
    assert model.training and all(w.grad is None and w.requires_grad for w in model.parameters())
    assert all(torch.equal(w, v) for w, v in zip(model.parameters(), before))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_seed_decides(name):
    model, x = net(), dotted()
    y = model(x).argmax(1)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(ATTACKS[name](model, x, y, 0.05))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (name == "fab-t")               # the one without chance


@pytest.mark.parametrize("name", ATTACKS)
def test_every_tensor_that_an_attack_makes_is_on_the_device_of_x(name):
    model, x = net(), dotted(4)
    y = model(x).argmax(1)
    with torch.device("meta"):                                  # what names no device lands there
        ATTACKS[name](model, x, y, 0.02)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "square"])
def test_every_point_that_the_model_is_shown_lies_in_ball_and_box(name):
    torch.manual_seed(1)
    model, x, eps = LinearSpy(5, 36), dotted(1, torch.float64), 0.01
    y = model(x).argmax(1)
    ATTACKS[name](model, x, y, eps)
    seen = torch.cat(model.seen)
    assert len(seen) > 20 and seen.min() >= 0 and seen.max() <= 1
    assert (seen - x).abs().max() <= eps + 1e-12


def test_fab_may_leave_the_ball_on_its_way_but_never_the_box():
    torch.manual_seed(1)
    model, x = LinearSpy(5, 36), dotted(2, torch.float64)
    ATTACKS["fab-t"](model, x, model(x).argmax(1), 1e-4)
    seen = torch.cat(model.seen)
    assert seen.min() >= 0 and seen.max() <= 1


def test_square_asks_for_no_gradient():
    torch.manual_seed(1)
    model, x = LinearSpy(5, 36, detach=True), dotted(8, torch.float64)            # has none to give
    y = model(x).argmax(1)
    x_adv = train.square(model, x, y, 0.2, queries=200, span=200)
    assert (model(x_adv).argmax(1) != y).any()


def test_square_proposes_one_square_at_a_time_that_shrinks():
    torch.manual_seed(1)
    model, x = LinearSpy(2, 400), torch.full((1, 1, 20, 20), 0.5, dtype=torch.float64)
    y = model(x).argmax(1)
    model.seen.clear()
    train.square(model, x, y, 1e-4, queries=300, span=300)
    assert len(model.seen) == 302                               # clean, stripes, queries
    best, worst, sides = model.seen[1], float("inf"), []
    for point in model.seen[1:]:
        changed = (point != best)[0, 0].nonzero()
        if len(changed):
            sides.append(int((changed.amax(0) - changed.amin(0)).max()) + 1)
        value = train.margin(model.linear(point.flatten(1)), y).item()
        best, worst = (point, value) if value < worst else (best, worst)
    assert max(sides) <= 18 and sides[0] > 9                    # round(sqrt(.8) 20) = 18
    assert set(sides[-30:]) == {1}


def test_targets_beyond_the_other_classes_are_capped_and_only_what_is_robust_is_attacked():
    torch.manual_seed(1)
    model, x = LinearSpy(4, 36), dotted(6, torch.float64)
    y = model(x).argmax(1)
    model.seen.clear()
    train.apgd_t(model, x, y, 1e-6, targets=99, steps=5)
    # clean and order; for each of 3 targets x, the start, 5 steps, the result
    assert sum(len(s) for s in model.seen) == 6 * (2 + 3 * (1 + 1 + 5 + 1))


def test_targets_are_the_other_classes_also_where_logits_are_equal():
    torch.manual_seed(1)
    z = torch.randint(4, (200, 50)).double()                                # many equal
    y = z.argmax(1)
    for targets in (1, 9, 49, 60):
        found = train.others(nn.Identity(), z, y, targets).T
        assert found.shape == (200, min(targets, 49)) and (found != y[:, None]).all()
        assert all(len(set(row)) == len(row) for row in found.tolist())
        assert (z.gather(1, found).diff(dim=1) <= 0).all()


# --- the ensemble -----------------------------------------------------------------------------

def ensemble_c(**kw):
    return SimpleNamespace(**{"eps": 0.03, "alpha": 0.0075, "classes": 5, "batch_size": 10,
                              "micro_batch": None,
                              "seed": 0, "device": "cpu", "shape": (1, 8, 8), "patch_size": 1,
                              "d_model": 8} | kw)


def test_autoattack_is_the_worst_case_of_four_attacks_each_on_what_is_left(monkeypatch):
    model, x = net(), (255 * dotted(30)).round().to(torch.uint8)
    y = model(x / 255).argmax(1)
    y[:7] = (y[:7] + 1) % 5                                                 # seven clean errors
    fed = {}
    for stage in train.AUTO:
        def attack(m, x, y, eps, stage=stage):
            fed[stage] = fed.get(stage, 0) + len(x)
            return ATTACKS[stage](m, x, y, eps)
        monkeypatch.setitem(train.AUTO, stage, attack)
    found = train.evaluate(model, x, y, ("clean", "aa", "aa-fast", "square"), ensemble_c(), "here")
    left = found["aa"]["left"]
    assert list(fed) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert found["clean"]["right"] == 23 and found["clean"]["left"] == []
    assert left == sorted(left, reverse=True) and len(left) == 4
    assert 0 < left[-1] == found["aa"]["right"] < 23
    assert len(found["aa-fast"]["left"]) == 2 and len(found["square"]["left"]) == 1
    # each of the three runs of apgd-ce, apgd-t, square gets what the one before has left
    assert fed["apgd-ce"] == 2 * 23 and fed["square"] == left[2] + 23 and fed["fab-t"] == left[1]
    assert fed["apgd-t"] == left[0] + found["aa-fast"]["left"][0]


def test_when_nothing_is_left_the_later_stages_are_listed_with_zero():
    model, x = net(), (255 * dotted(4)).round().to(torch.uint8)
    y = (model(x / 255).argmax(1) + 1) % 5
    assert train.evaluate(model, x, y, ("aa",), ensemble_c(), "here")["aa"]["left"] == [0] * 4


@pytest.mark.parametrize("spec, classes, needs", [
    ("aa", 3, 4), ("aa-fast", 3, 4), ("apgd-t", 3, 4), ("apgd-ce", 1, 2), ("square", 1, 2)])
def test_too_few_classes_for_an_attack_are_refused_in_words(spec, classes, needs):
    with pytest.raises(train.UserError, match=f"--attacks {spec}: it needs at least {needs} cl"):
        train.attacks_of(spec, ensemble_c(classes=classes))
    assert train.attacks_of(spec, ensemble_c(classes=needs))


def test_evaluate_prints_a_line_for_each_stage_of_autoattack(tmp_path, capsys, monkeypatch):
    for stage in train.AUTO:
        monkeypatch.setitem(train.AUTO, stage, ATTACKS[stage])
    tiny = ("--dataset synthetic --d-model 8 --d-state 4 --n-layers 1 --patch-size 7 --train-size "
            "32 --test-size 20 --batch-size 32 --epochs 1 --steps 1 --attacks clean --device cpu")
    assert train.main([*tiny.split(), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    best = tmp_path / "run" / "best.pt"
    assert evaluates(best, "--attacks", "clean,aa") == 0
    names = [line[:16].strip() for line in capsys.readouterr().out.splitlines()[3:]]
    assert names == ["clean", "aa: apgd-ce", "aa: apgd-t", "aa: fab-t", "aa: square", "aa"]
    table = (tmp_path / "run" / "best-evaluation.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table[1:]] == names


class Bad(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.net = kind, net()

    def forward(self, x):
        z = self.net(x)
        if self.kind == "logit":
            return z / 0
        return z + (x - x.detach()).sqrt().flatten(1).sum(1, keepdim=True)  # its gradient is inf


@pytest.mark.parametrize("model, call, error, message", [
    (net(3), train.apgd_t, ValueError, "targeted DLR loss needs at least 4 classes; got 3"),
    (net(2), lambda *a: train.apgd(*a, 5, "dlr"), ValueError, "DLR loss needs at least 3 classes"),
    (net(), lambda *a: train.apgd(*a, 5, "mse"), ValueError, "got 'mse'"),
    (net(), lambda *a: train.apgd(*a, target=a[2]), ValueError, "got 'ce' with a target"),
    (net(), lambda *a: train.fab_t(*a, targets=0), ValueError, "at least 1 target class; got 0"),
    (Bad("logit"), train.square, train.UserError, "logits that are not finite"),
    (Bad("gradient"), train.apgd_ce, FloatingPointError, "a gradient that is not finite"),
    (Bad("gradient"), train.fab_t, FloatingPointError, "a gradient that is not finite"),
])
def test_bad_input_gives_a_clear_error(model, call, error, message):
    x = dotted()
    y = model.net(x).argmax(1) if isinstance(model, Bad) else model(x).argmax(1)
    with pytest.raises(error, match=message):
        call(model, x, y, 0.1)


def test_logits_times_100_hide_nothing_from_the_dlr_stages():
    model, x = net(), dotted()
    y = model(x).argmax(1)
    loud = nn.Sequential(model, nn.Linear(5, 5, bias=False))
    loud[1].weight.data = 1000 * torch.eye(5)
    broken = []
    for m in (model, loud):
        torch.manual_seed(0)
        broken.append(m(ATTACKS["apgd-t"](m, x, y, 0.05)).argmax(1) != y)
    assert (broken[0] == broken[1]).float().mean() > 0.95


# --- against the published implementation, where one is installed -------------------------------

@pytest.mark.parametrize("kind, radii", [("CNN", (0.01, 0.015)), ("S4", (0.006, 0.01))])
def test_each_stage_agrees_image_by_image_with_pyautoattack(kind, radii):
    reference = pytest.importorskip("pyautoattack").AutoAttack
    torch.manual_seed(0)
    x, y = s4_adv.drawn_digits(1200, 0, size=14)
    x = x / 255
    cnn = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(392, 32),
                        nn.ReLU(), nn.Linear(32, 10))
    model = cnn if kind == "CNN" else s4_adv.Classifier(1, 10, 32, 16, 1, 2, ads="relu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(6 if kind == "CNN" else 30):
        for i in torch.randperm(1200).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    x, y = x[:60], y[:60]
    x, y = (v[model(x).argmax(1) == y] for v in (x, y))
    for eps in radii:
        theirs = reference(model, eps=eps, seed=0, version="standard")
        theirs.fab.targeted, theirs.fab.n_iter, theirs.square.n_queries = True, 40, 150
        theirs.fab.n_target_classes = theirs.apgd_targeted.n_target_classes = 2
        worst = torch.ones(2, len(y), dtype=torch.bool)
        for ours, attack in (
                (train.apgd_ce(model, x, y, eps), theirs.apgd),
                (train.apgd_t(model, x, y, eps, targets=2), theirs.apgd_targeted),
                (train.fab_t(model, x, y, eps, targets=2, steps=40), theirs.fab),
                (train.square(model, x, y, eps, queries=150), theirs.square)):
            attack.seed = 0
            robust = torch.stack([model(z).argmax(1) == y
                                  for z in (ours, attack.perturb(x.clone(), y))])
            worst &= robust
            print(f"{kind:4} eps {eps:<6} {type(attack).__name__:19} of {len(y)} images robust: "
                  "ours {} theirs {}, they differ on {}; worst case so far {} {}, on {}".format(
                      *robust.sum(1).tolist(), int((robust[0] != robust[1]).sum()),
                      *worst.sum(1).tolist(), int((worst[0] != worst[1]).sum())))
            assert 0 < robust[0].sum() < len(y), (eps, attack, robust[0].sum())
            if attack is theirs.square:         # chance decides more: a sign test on who differs
                b, n = int((robust[0] & ~robust[1]).sum()), int((robust[0] != robust[1]).sum())
                p = 2 * sum(math.comb(n, k) for k in range(min(b, n - b) + 1)) / 2 ** n
                assert p > 0.01, (eps, b, n)
            else:
                assert (robust[0] != robust[1]).sum() <= 4, (eps, attack)
        assert (worst[0] != worst[1]).sum() <= 1, eps


# ---- train.py: many processes --------------------------------------------------------------------


def one_and_two(tmp_path, method, train_size, script):
    """A run in this process, and in two processes that a script starts; their words and folders."""
    words = (f"{' '.join(TINY)} --dataset synthetic --precision fp64 --method {method} --replays 2 "
             f"--epochs 4 --train-size {train_size} --device cpu --attacks clean").split()
    assert trains(tmp_path / "one", *words) == 0
    (tmp_path / "script.py").write_text(
        "import os, signal, sys, time, train\ntrain.HELD_OUT = 50\n" + script)
    torchrun(2, tmp_path / "script.py", *words, "--out", str(tmp_path / "two"))
    return tmp_path / "one", tmp_path / "two"


def nearly_the_same_run(a, b):
    """Weights and logged losses agree to rounding: sums over images have another order."""
    for k, w in weights(a).items():
        close(weights(b)[k], w, 1e-9)
    rows = [torch.load(out / "last.pt", weights_only=True)["rows"] for out in (a, b)]
    assert len(log(a)) == len(log(b)) == 1 + len(rows[0])
    close(*([row["loss"] for row in each_run] for each_run in rows))


@pytest.mark.parametrize("method", ("standard", "free"))
def test_two_processes_give_the_run_of_one_also_if_one_of_them_is_late(method, tmp_path):
    one, two = one_and_two(tmp_path, method, 41, (
        "settings = train.settings\n"
        "def late(argv):\n"                 # the first process is past its checks long before
        "    time.sleep(3 * int(os.environ['RANK']))\n"
        "    return settings(argv)\n"
        "train.settings = late\n"
        "train.leave(train.main())\n"))
    nearly_the_same_run(one, two)


def test_a_signal_to_one_of_two_processes_saves_and_stops_both_and_one_alone_goes_on(tmp_path):
    one, two = one_and_two(tmp_path, "free", 57, (
        "train_batch = train.train_batch\n"
        "def batch(run, *rest):\n"
        "    if os.environ['RANK'] == '1' and (run.epoch, run.batch) == (1, 1):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return train_batch(run, *rest)\n"
        "train.train_batch = batch\n"
        "train.leave(train.main() != 130)\n"))
    state = torch.load(two / "last.pt", weights_only=True)
    assert (state["epoch"], state["batch"], state["seen"]) == (1, 2, 32)
    assert train.main(["--resume", str(two)]) == 0
    nearly_the_same_run(one, two)


def torchrun(n, *words):
    """n processes of a script; what they print, or the test fails with it."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", str(n), *map(str, words)], capture_output=True,
                          text=True, timeout=300, env=os.environ | {
                              "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE),
                              "PYTHONFAULTHANDLER": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- train.py: the command line ------------------------------------------------------------------


def test_presets_are_the_papers_protocol():
    c = settings("--out", "x")
    assert (c.dataset, c.model, c.method, c.ads) == ("cifar10", "s4", "pgd", None)
    assert (c.n_layers, c.d_model, c.d_state, c.epochs, c.batch_size) == (4, 128, 64, 180, 256)
    assert (c.eps, c.alpha, c.steps, c.beta, c.lr, c.weight_decay) == (
        8 / 255,
        2 / 255,
        10,
        6,
        1e-3,
        2e-4,
    )
    c = settings("--dataset", "mnist", "--out", "x")
    assert (c.n_layers, c.d_state, c.epochs, c.eps, c.alpha, c.beta) == (2, 32, 100, 0.3, 0.04, 1)
    assert settings("--model", "mamba", "--out", "x").d_state == 16
    assert settings("--model", "s5", "--out", "x").d_state == 128


def test_flags_take_fractions_and_both_spellings():
    c = settings(
        "--epsilon", "4/255", "--step-size", "1/255", "--num-steps", "7", "--ads", "--out", "x"
    )
    assert (c.eps, c.alpha, c.steps, c.ads) == (4 / 255, 1 / 255, 7, "relu")
    assert settings("--ads", "tanh", "--eps", "0.031", "--out", "x").eps == 0.031


BAD = {
    "--model lstm": "invalid choice: 'lstm'",
    "--method fast": "invalid choice: 'fast'",
    "--dataset svhn": "invalid choice: 'svhn'",
    "--ads swish": "invalid choice: 'swish'",
    "--alphas 0.1,0.05": "--alphas [0.1, 0.05]: give one for each of the 10 --steps",
    "--alphas 2,1 --steps 2": "--alphas [2.0, 1.0]: they must lie in [0, 1], pixel units",
    "--eps 8": "--eps 8.0: it must lie in [0, 1], pixel units; 8/255, not 8",
    "--eps eight": "eight is no number; write it as 8/255 or 0.031",
    "--alpha -0.1": "--alpha -0.1: it must lie in [0, 1]",
    "--steps -1": "--steps -1: it must be a number of at least 0",
    "--lr 0": "--lr 0.0: it must be a number above 0",
    "--yopo 5": "5 is not of the form M-N; write it as 5-3",
    "--dataset cifar10 --data-dir EMPTY": "put torchvision's files into",
    "--dataset cifar10 --data-dir BROKEN": "cifar-10-batches-py there is incomplete or damaged",
    "--dataset mnist --data-dir BROKEN": "MNIST there is incomplete or damaged",
    "--dataset tiny-imagenet --data-dir EMPTY": "no Tiny-ImageNet there",
    "--dataset tiny-imagenet --data-dir BROKEN --classes 2": "has the images of 1 classes",
    "--patch-size 5": "--patch-size 5: it does not divide an image of 32 x 32 pixels",
    "--ads --control mlp": "--control mlp: it stands in the place of --ads relu; give one of them",
    "--d-state 63": "--d-state 63: s4 stores conjugate pairs; give an even number",
    "--device cuda:99": "--device cuda:99: there is no such device here",
    "--device tpu9": "--device tpu9: there is no such device here",
    "--attacks clean,magic": "--attacks magic: no such attack",
    "--dataset synthetic --train-size 20000": "--train-size 20000: synthetic has 10000 such images",
    "--dataset synthetic --out FILE/run": "cannot be written",
    "--dataset synthetic --out OTHER": "holds another run",
    "--resume NOWHERE": "there is no such file or folder",
    "--resume FILE": "this is damaged, or no checkpoint of this program",
    "--evaluate FILE": "this is damaged, or no checkpoint of this program",
    "--colour blue": "unrecognized arguments: --colour blue",
    "--checks": "--checks measures a checkpoint; add --evaluate CKPT",
    "--eps-sweep 0,8/255": "--eps-sweep measures a checkpoint; add --evaluate CKPT",
    "--eps-sweep 0,x": "x is no number; write it as 8/255 or 0.031",
    "--steps-sweep 1,-5": "1,-5 is no list of whole numbers; write it as 1,5,10",
    "--attacks pgd-official": "--attacks pgd-official: it stands for comparison only",
    "--plot EMPTY": "--plot EMPTY: there is no log.csv with a measured epoch",
    "--plot EMPTY --model s5": "--model has no place beside --plot",
    "--plot BROKEN": "--plot BROKEN: its log.csv is damaged; --resume writes it anew",
    "--plot OTHER/config.json": "--plot OTHER/config.json: this is no analysis",
    "--table EMPTY --seed 1": "--seed has no place beside --table",
    "--evaluate FILE --analyse FILE": "--analyse and --evaluate are two jobs; give one of them",
    "--evaluate EMPTY --transfer-from=": "--transfer-from is empty; give a value, or leave it out",
    "--evaluate EMPTY": "--evaluate EMPTY: there is no checkpoint in that folder",
    "--eps 1e400": "1e400 is no number; write it as 8/255 or 0.031",
    "--attacks pgd-\u00b2": "--attacks pgd-\u00b2: no such attack",
    "--evaluate FILE --out EMPTY": "--out EMPTY: tables lie beside the checkpoint",
    "--device meta": "--device meta: there is no such device here",
    "--out OTHER/hollow --resume": "its config.json is damaged, or of another program",
    "--resume OTHER": "--resume OTHER: its config.json is damaged, or of another program",
    "--resume OTHER --checks": "--checks measures a checkpoint; add --evaluate CKPT",
    "--lr 1e38": "--lr 1e+38: it must be a number above 0, below 1e30",
    "--batch-size 99999999999999999999": "--batch-size 99999999999999999999: it is too large",
    "--attacks pgd-1x1000000000000": "--attacks pgd-1x1000000000000: no such attack",
    "--eps 1e999999999": "1e999999999 is no number; write it as 8/255 or 0.031",
    "--plot BROKEN --out FILE": "--out FILE: a figure is a PNG file; give a name that ends in .png",
    "--dataset synthetic --eval-train 20000": "--eval-train 20000: there are 4000 training images",
    "--resume EMPTY --out OTHER": "--out OTHER: a run goes on in its own folder, EMPTY; leave",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence_exit_code_2_and_nothing_is_written(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "HELD_OUT", 1000)
    monkeypatch.setattr(train, "download", refused) if "EMPTY" in words else None
    for folder in (
        "EMPTY",
        "BROKEN/cifar-10-batches-py",
        "BROKEN/MNIST/raw",
        "OTHER/hollow",
        "BROKEN/tiny-imagenet-200/train/n01/images",
        "BROKEN/tiny-imagenet-200/val",
    ):
        Path(folder).mkdir(parents=True)
    for text in (
        "FILE",
        "OTHER/config.json",
        "BROKEN/cifar-10-batches-py/test_batch",
        "BROKEN/tiny-imagenet-200/val/val_annotations.txt",
    ):
        Path(text).write_text("{}")
    Path("BROKEN/tiny-imagenet-200/wnids.txt").write_text("n01\nn02\n")
    Path("BROKEN/log.csv").write_text("epoch,val_clean,val_pgd-10\n1,0.5,half\n")
    Path("OTHER/hollow/config.json").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert train.main(words.split()) == 2
    captured = capsys.readouterr()
    assert BAD[words] in captured.err and captured.err.startswith("train.py: ")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before and Path("OTHER/config.json").read_text() == "{}"


def refused(kind, root, folder):
    raise train.UserError(f"--data-dir {root}: no {folder}; put torchvision's files into it")


def test_a_download_that_fails_leaves_nothing_behind(tmp_path):
    def kind(root, download):
        (Path(root) / "half").mkdir(parents=True)
        raise RuntimeError("no network")

    with pytest.raises(train.UserError, match="could not be downloaded .no network."):
        train.download(kind, tmp_path / "a" / "b", "MNIST")
    assert list(tmp_path.iterdir()) == []


def test_resume_refuses_a_flag_that_contradicts_the_run(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert train.main(["--resume", str(tmp_path / "run"), "--model", "dss"]) == 2
    assert "--model dss" in (err := capsys.readouterr().err) and "was trained with s4" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_what_does_not_fit_into_memory_is_said_and_leaves_no_run(tmp_path, monkeypatch, capsys):
    def too_large(c):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 EB\nat x.cpp")
    monkeypatch.setattr(train, "build", too_large)
    assert trains(tmp_path / "run", *TINY) == 2
    err = capsys.readouterr().err
    assert "the memory of cpu does not suffice" in err and "--micro-batch" in err
    assert err.count("\n") == 1 and not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(train, "build", lambda c: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):                                       # a defect stays one
        trains(tmp_path / "run", *TINY)


def test_two_processes_cannot_share_a_run(tmp_path, capsys):
    held = train.lock(tmp_path)
    with pytest.raises(train.UserError, match="another process is training there"):
        train.lock(tmp_path)
    held.close()
    train.lock(tmp_path).close()


def test_help_states_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    p, defaults = train.parser()
    assert end.value.code == 0 and text.count("(default: ") == len(defaults)
    assert all(option in text for action in p._actions for option in action.option_strings)


def findings():
    """results/README.md, or a skip where the code was copied without it."""
    if not (HERE / "results" / "README.md").exists():
        pytest.skip("no results/ beside the code")
    return (HERE / "results" / "README.md").read_text()


def test_the_tables_of_results_in_the_readmes_are_what_their_commands_print(monkeypatch, capsys):
    text, more = (HERE / "README.md").read_text(), findings()
    folders = re.findall(r"`python train\.py --table (\S+)/\*`", text)
    assert folders
    monkeypatch.chdir(HERE)
    for folder in folders:
        runs = sorted(str(run) for run in Path(folder).iterdir())
        assert train.main(["--table", *runs]) == 0
        assert capsys.readouterr().out.strip() in text
    monkeypatch.chdir(HERE / "results")
    assert "`cd results && python ../train.py --table NAME/* > NAME.md`" in more
    assert len(names := sorted(Path().glob("*.md"))) > 4
    for name in (path.stem for path in names if path.stem != "README"):
        assert train.main(["--table", *sorted(str(run) for run in Path(name).iterdir())]) == 0
        assert capsys.readouterr().out == Path(f"{name}.md").read_text()


def test_the_accuracies_under_attack_in_the_findings_are_those_of_the_logs():
    table = re.search(r"^(\| model \|.*\| aa \|.*)\n\|[-|]+\n((?:\|.*\n)+)", findings(), re.M)
    heads, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                    for line in (table[1], *table[2].splitlines())]
    logs = [[HERE / "results" / log for log in re.findall(r"\((evaluation/\S+)\)", row[-1])]
            for row in rows]                                            # of a row's seeds
    assert all(logs)
    for row, some in zip(rows, logs):
        found = [{name: (f"{float(value):.1f}", n) for name, value, n in re.findall(
            r"^(\S+) +([\d.]+)% +[\d.]+% - +[\d.]+% +([\d,]+) ", log.read_text(), re.M)}
            for log in some]
        assert row[heads.index("n")] == ", ".join(names["clean"][1] for names in found)
        for head, cell in list(zip(heads, row))[heads.index("n") + 1:-1]:
            expected = [names[head][0] for names in found if head in names]
            assert cell == ", ".join(expected) and len(expected) in (0, len(some)), (some, head)


def test_the_findings_say_of_all_runs_how_far_the_published_attack_lies_above_pgd_10():
    said = re.findall(r"^\| (.+) \| (\d+) \| (\S+) to (\S+) \|$", findings(), re.M)
    logs = dict(re.findall(r"\[([\w.-]+/[\w.-]+)\]\((evaluation/\S+\.txt)\)", findings()))
    gaps, others = {}, []
    for path in (HERE / "results").glob("*/*/result.json"):
        result = json.loads(path.read_text())
        c, run = result["config"], "/".join(path.parts[-3:-1])
        if run in logs:                                     # its checkpoint is gone
            text = (HERE / "results" / logs[run]).read_text()
            left = dict(re.findall(r"^(pgd-\S+) +([\d.]+)%", text, re.M))
            assert f"/{path.parts[-2]}/best.pt" in text
            others.append(float(left["pgd-official"]) - float(left["pgd-10"]))
            continue
        kept = json.loads(path.with_name("best-evaluation.json").read_text())
        at = {(r["n"], r["attack"]): 100 * r["accuracy"] for r in kept["rows"]
              if (r["eps"], r["alpha"]) == (c["eps"], c["alpha"])}
        n = max(n for n, attack in at if attack == "pgd-official")
        assert kept["epoch"] == result["Best"]["epoch"] and n >= 500, path
        kind = "standard" if c["method"] == "standard" else "adversarial"
        name = f"{c['dataset']}, eps {train.show(c['eps'])}, {kind} training"
        gaps.setdefault(name, []).append(at[n, "pgd-official"] - at[n, "pgd-10"])
    assert len(said) > 4 and sorted(said) == sorted(
        (name, str(len(found)), *(f"{f(found) + 0.0:.1f}" for f in (min, max)))
        for name, found in gaps.items())
    text = " ".join(findings().split())
    assert f"Best of {sum(map(len, gaps.values()))} trained models" in text and len(others) == 9
    assert f"lies {min(others):.1f} to {max(others):.1f} points above" in text


def test_the_speeds_in_the_readme_are_those_of_the_logs():
    findings()
    text, step = (HERE / "README.md").read_text(), r"pgd-10 AT step +(\S+) +\S+ +(\S+) .*%"
    rows = re.findall(r"^(\| \S.*\(results/bench/([\w-]+)\.txt\) \|)$", text, re.M)
    assert len(rows) == 6
    for row, name in rows:
        log = (HERE / "results" / "bench" / f"{name}.txt").read_text()
        cpu = {form: float(seconds) for form, seconds in re.findall(step, log)}
        mb = dict(re.findall(r"pgd-10 AT step +(\S+) +(?:\S+ +){5}(\d+) +[\d.]+%", log))
        _, batch, here, bf16, plain, other, peak, _ = row.strip("|").split("|")
        assert f"batch {batch.strip()}," in log and f"**{cpu['fast']:.1f} s**" in here
        assert bf16.strip().startswith(f"{cpu['bf16']:.1f} s")
        assert plain.strip() == f"{cpu['plain']:.1f} s, {cpu['plain'] / cpu['fast']:.1f}x"
        assert peak.strip().startswith(f"{mb['fast']} / {mb['plain']}")
        if "no-ads" in cpu:
            assert f"{cpu['fast'] / cpu['no-ads']:.2f}x S4" in here
            assert f"{cpu['bf16'] / cpu['no-ads']:.2f}x S4" in bf16
        if "peer" in cpu:
            assert f" {cpu['peer']:.1f} s, {cpu['peer'] / cpu['fast']:.1f}x" in other
            assert f"/ {mb['peer']} MB" in peak


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_link_of_a_readme_leads_somewhere(name):
    findings()
    found = re.findall(r"\]\(((?!http)[^)]+)\)", (HERE / name).read_text())
    assert len(found) > 20
    for link in found:
        path, _, heading = link.partition("#")
        assert (goal := (HERE / name).parent / path if path else HERE / name).exists(), link
        slugs = [re.sub(r"[^\w -]", "", line.lstrip("# ")).replace(" ", "-").lower()
                 for line in (goal.read_text().splitlines() if heading else ())
                 if line.startswith("#")]
        assert not heading or heading in slugs, link


def test_every_command_of_the_readme_parses_and_its_settings_hold(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"^(?:torchrun .* )?(?:python )?train\.py (.*)$", text, re.M)
    inline = re.findall(r"`(?:OMP_NUM_THREADS=1 )?python\s+train\.py\s([^`]*)`", text)
    assert len(commands) >= 3 and any("--bench" in command for command in inline)
    monkeypatch.chdir(tmp_path)
    for command in commands + [words for words in inline if words != "--help"]:
        words = command.split("#")[0].replace("MODEL", "mamba").replace("-size N", "-size 4")
        words = words.split()
        train.parser()[0].parse_args(words)                     # UserError: a flag that is not
        if not {"--evaluate", "--analyse", "--plot", "--table", "--help"} & set(words):
            assert train.settings(words)[0].device                          # without --device, too


def test_bench_needs_no_device_and_takes_16_images_on_a_cpu(monkeypatch):
    for there, batch in (False, 16), (True, 256):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(train, "check", lambda c, given: c)
        assert train.settings(["--bench", "1", "--out", "x"])[0].batch_size == batch


# ---- train.py: speed -----------------------------------------------------------------------------

def bench_settings(name="s4", *words):
    return settings("--bench", "1", "--model", name, *TINY, "--dataset", "synthetic", *words)


def trace(name):
    """Losses, images and weights of three replays of FreeAT with an attack after each."""
    torch.manual_seed(0)
    model, x, y = tiny_model(name), torch.rand(3, 1, 4, 4).double(), torch.tensor([1, 2, 3])
    optimizer, noise, seen = torch.optim.SGD(model.parameters(), lr=0.5), torch.zeros_like(x), []
    for _ in range(3):
        optimizer.zero_grad()
        seen.append(train.free_backward(model, x, y, noise, EPS))
        optimizer.step()
        with train.frozen(model), torch.no_grad():
            seen += [train.pgd(model, x, y, EPS, ALPHA, 2), model(x), noise.clone()]
    return [*seen, *(w.detach() for w in model.parameters())]


def test_the_plain_form_of_the_benchmark_computes_the_same_numbers(name):
    for fast, slow in zip(trace(name), train.plainly()(trace)(name)):
        close(fast, slow)
    model, x, results = tiny_model(name), randn(3, 1, 4, 4).requires_grad_(), []
    for form in ("fast", "plain"):
        with train.FORMS[form][0]():
            y = model(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    for fast, slow in zip(*results):
        close(fast, slow)


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_outlives_a_replay_of_free_at_and_a_stale_one_would_be_seen(name, monkeypatch):
    right, kept, script = trace(name), {}, MODELS[name]

    def stale(module, key, make):
        if module not in script.MEMO or next(module.parameters()).requires_grad:
            return make()
        return kept.setdefault((module, key), make())
    monkeypatch.setattr(script, "once", stale)
    assert any(not torch.allclose(a, b) for a, b in zip(trace(name), right))


@pytest.mark.parametrize("name", KERNELS)
def test_train_py_too_computes_each_kernel_once_in_an_attack(name, monkeypatch):
    owner, method = KERNELS[name]
    original, calls = getattr(owner, method), []
    monkeypatch.setattr(owner, method, lambda *args: calls.append(1) or original(*args))
    jobs = train.bench_jobs(bench_settings(name, "--steps", "3"))
    for job, fast, plain in (("forward", 1, 1), ("attack step", 1, 1), ("pgd-3 AT step", 2, 4),
                             ("TRADES-3 step", 3, 6), ("evaluation", 1, 1 + 1 + 10 + 1)):
        for form, expected in (("fast", fast), ("plain", plain)):
            calls.clear()
            with train.FORMS[form][0]():
                jobs[job]()
            assert len(calls) == expected, (job, form)              # one layer


def test_bench_times_every_work_in_every_form_at_every_length_into_a_table_and_a_csv(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "sample_apart", lambda c, name, form: (
        None if (name, form) == ("evaluation", "plain") else
        (*train.sample(c, name, form)[:3], 2 ** 21)))
    assert trains(tmp_path, "--bench", "2", *TINY, "--lengths", "3,8", "--ads") == 0
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    works = ["forward", "attack step", "pgd-2 AT step", "TRADES-2 step", "evaluation"]
    expected = [(L, w, f) for L in "38" for w in works for f in ("fast", "bf16", "no-ads", "plain")
                if (w, f) != ("evaluation", "bf16")]
    assert [(r["L"], r["work"], r["form"]) for r in rows] == [
        e for e in expected if e[1:] != ("evaluation", "plain")]
    for r in rows:
        assert float(r["peak_mb"]) == 2 and 0 < float(r["kernel_share"]) < 1
        close(float(r["images_per_second"]) * float(r["seconds"]), 16.0)
        close(float(r["us_per_token"]) * 16 * int(r["L"]), 1e6 * float(r["seconds"]), 1e-6)
        assert r["form"] != "fast" or float(r["times_fast"]) == 1
    text = capsys.readouterr().out
    assert text.count("evaluation       plain      did not fit into memory") == 2
    assert text.count("\n") == 4 + len(expected) and "micro-batch by itself" in text


def test_the_plain_form_is_plain_in_the_processes_of_bench_too():
    main = runpy.run_path(str(HERE / "train.py"), run_name="__mp_main__")   # as a new process does
    names, c = main["in_parts"].__globals__, bench_settings("s4", "--batch-size", "1000")
    with main["plainly"]():
        assert names["frozen"] is nullcontext and names["part_size"](c) == 1000
    assert names["frozen"] is s4_adv.frozen and names["part_size"](c) == train.part_size(c) != 1000


def test_bench_measures_each_form_with_what_it_says(monkeypatch):
    c, seen = bench_settings("s4", "--ads", "--batch-size", "2"), []
    monkeypatch.setattr(train, "bench_jobs", lambda c, form: {"work": lambda: seen.append(
        (form, c.precision, c.ads, train.part_size(c)))})
    monkeypatch.setattr(train, "part_size", lambda c, *width: 1)
    for form in train.FORMS:
        train.sample(c, "work", form)
    assert seen[::2] == seen[1::2] == [
        ("fast", "fp32", "relu", 1), ("bf16", "bf16", "relu", 1), ("no-ads", "fp32", None, 1),
        ("no-triton", "fp32", "relu", 1), ("plain", "fp32", "relu", 2), ("peer", "fp32", "relu", 2)]
    assert (c.precision, c.ads) == ("fp32", "relu")


def test_bench_on_a_gpu_stays_in_one_process_and_adds_its_rates(tmp_path, monkeypatch, capsys):
    for name, fake in {"bench_jobs": lambda c: ["forward"], "has": lambda c, precision: True,
                       "limits": lambda device: f"{device} copies.", "machine": lambda c: vars(c),
                       "sample": lambda c, name, form: (0.5, 0.25, 0.1, 2 ** 20, 3.0, 7.0),
                       "peer": lambda c: None, "get_context": refused}.items():     # no process
        monkeypatch.setattr(train, name, fake)
    c = bench_settings("mamba", "--batch-size", "2", "--out", str(tmp_path))
    train.bench(SimpleNamespace(**vars(c) | {"device": "cuda:0"}))
    text = capsys.readouterr().out
    heads, *rows = [line.split() for line in text[text.index("    L  work"):].splitlines()]
    assert heads[-2:] == ["TB/s", "TFLOP/s"] and all(row[-2:] == ["3.00", "7.0"] for row in rows)
    assert [row[2] for row in rows] == [
        "fast", "bf16", *["no-triton"] * bool(mamba_adv.triton), "plain"]
    assert "cuda:0 copies." in text
    assert "tb_per_second,tflop_per_second\n" in (tmp_path / "bench.csv").read_text()


def test_without_triton_mamba_s_scan_is_made_of_pytorch_s_operations():
    before = mamba_adv.triton
    with train.FORMS["no-triton"][0]():
        assert mamba_adv.triton is None
    assert mamba_adv.triton is before


def test_traffic_and_products_of_a_job_are_counted():
    x, y = torch.zeros(8, 4), torch.zeros(4, 2)                         # 128 and 32 bytes

    def job():
        z = (x.T.contiguous().T + 1).view(8, 4)                         # 4 * 128; views: nothing
        torch.empty(1000)                                               # written by no one
        (x.expand(3, 8, 4) * 2.0)                                       # 128 + 3 * 128
        z @ y                                                           # 128 + 32 + 64
        z.relu_()                                                       # 2 * 128
        z.copy_(x)                                                      # 2 * 128
        z.zero_()                                                       # 128
        torch.mul(x, x, out=z)                                          # 3 * 128
        torch._foreach_add_([z, y], 1.0)                                # 2 * (128 + 32)
    tera_bytes, tera_flops = train.rates(job, 2.0)
    close(tera_bytes * 2e12, 4 * 128.0 + 4 * 128 + 224 + 256 + 256 + 128 + 384 + 320)
    close(tera_flops * 2e12, 2 * 8 * 4 * 2.0)


@pytest.mark.parametrize("words", ["no-ads", "no-triton", "fast,peer", "slow",
                                   "bf16 --precision fp64"])
def test_a_form_that_bench_does_not_have_is_refused_before_anything_is_written(
    words, tmp_path, capsys
):
    out = tmp_path / "new"
    assert trains(out, "--bench", "1", *TINY, "--forms", *words.split()) == 2
    message = capsys.readouterr().err
    form = words.split()[0].split(",")[-1]
    assert message.startswith(f"train.py: --forms {form}: choose from") and not out.exists()


@pytest.mark.parametrize("name", ["s5", "mamba"])
def test_bench_times_a_peer_s_layers_in_the_place_of_ours_where_one_is_installed(
    name, tmp_path, monkeypatch, capsys
):
    made = []
    monkeypatch.setattr(train, "peer", lambda c: lambda: made.append(nn.Linear(4, 4)) or made[-1])
    monkeypatch.setattr(train, "sample_apart", train.sample)
    assert trains(tmp_path, "--bench", "1", *TINY, "--d-model", "4", "--model", name) == 0
    forms = [line.split(",")[5] for line in (tmp_path / "bench.csv").read_text().splitlines()[1:]]
    kinds = ["fast", "bf16", "plain", "peer"]
    assert forms == kinds * 4 + ["fast", "plain", "peer"]
    assert len(made) == 5 and made[2].weight.grad.abs().sum() > 0       # one for each work
    words = "--bench --model mamba --dataset synthetic --device cpu --ads".split()
    monkeypatch.undo()
    assert train.peer(train.settings(words)[0]) is None                     # no peer has AdS


@pytest.mark.parametrize("module, package, name", [
    ("s5", "s5-pytorch", "s5"), ("mambapy.mamba", "mambapy", "mamba")])
def test_without_the_peer_bench_says_what_to_install(
    module, package, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(train, "sample_apart", train.sample)
    assert trains(tmp_path, "--bench", "1", *TINY, "--model", name) == 0
    out = capsys.readouterr().out
    assert f"No peer is timed: {package} is not installed here" in out and " peer  " not in out


@pytest.mark.parametrize("package, name", [("s5", "s5"), ("mambapy", "mamba")])
def test_a_peer_s_layer_keeps_the_shape(package, name):
    pytest.importorskip(package)
    layer = train.peer(bench_settings(name, "--d-state", "4", "--d-model", "4"))()
    assert layer(torch.rand(2, 7, 4)).shape == (2, 7, 4)


def test_peak_memory_is_that_of_one_job_in_a_process_of_its_own():
    c, job = bench_settings("mamba", "--batch-size", "4", "--patch-size", "1"), "attack step"
    c.d_model, c.d_state, c.shape = 32, 32, (1, 1, 256)
    fast, plain = (train.sample_apart(c, job, form)[3] for form in ("fast", "plain"))
    states = 4 * 256 * 64 * 32 * 4                                      # bytes; autograd keeps some
    assert plain > 2 * states and plain > fast + states and fast > 0 or math.isnan(fast)


@pytest.mark.parametrize("device", ("cpu", "cuda:0"))
def test_a_job_that_memory_does_not_suffice_for_has_no_peak_and_a_bug_is_no_lack_of_it(
    device, monkeypatch
):
    def raises(error):
        monkeypatch.setattr(train, "sample", lambda c, name, form: (_ for _ in ()).throw(error))
        return train.sample_apart(SimpleNamespace(device=device), "forward", "fast")
    monkeypatch.setattr(train, "ProcessPoolExecutor", ThreadPoolExecutor)
    for error in (BrokenExecutor("terminated"), torch.cuda.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert raises(error) is None
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        raises(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attack", ("pgd", "kl_pgd"))
def test_an_attack_in_parts_is_that_of_the_batch_with_each_kernel_made_once(
        name, attack, monkeypatch):
    c = SimpleNamespace(shape=(1, 512, 512), patch_size=8, d_model=32, device="cpu", batch_size=7,
                        micro_batch=None)
    assert [train.part_size(SimpleNamespace(**vars(c) | v)) for v in (     # 2^18 = 64 * 64 * 32 * 2
        {}, {"d_model": 1000}, {"device": "cuda:0"})] == [2, 1, 7]
    model, (x, y), made, seen = tiny(name), images(), [], []
    model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    script, once = MODELS[name], MODELS[name].once
    monkeypatch.setattr(script, "once", lambda m, key, make: once(
        m, key, lambda: made.append((m, key)) or make()))
    monkeypatch.setattr(train, "part_size", lambda c, *width: 2)
    x_adv, forwards = [], 3
    whole = script.pgd
    if attack == "kl_pgd":                                              # and once for log p(x)
        whole, forwards = (lambda model, x, y, *args: script.kl_pgd(model, x, *args)), 4
    for attack in (train.in_parts(c, whole), whole):
        made.clear(), seen.clear()
        torch.manual_seed(0)
        x_adv.append(attack(model, x, y, EPS, ALPHA, 3))
        if not x_adv[1:]:
            assert len(made) == len(set(made)) and set(seen) <= {1, 2}
            assert sum(seen) == forwards * len(x)
    close(*x_adv)
    assert (x_adv[0] - x).abs().amax((1, 2, 3)).min() > 0


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
                    reason="torch.compile of an autograd.Function needs a newer torch")
@pytest.mark.parametrize("name", ("s4", "mamba", "attention"))
def test_a_compiled_model_is_attacked_alike_and_keeps_no_kernel(name):
    model, (x, y), script = tiny(name, ads="relu"), images(), MODELS[name]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")                        # the trace, no compiler
    for _ in range(2):
        try:
            close(compiled(x), model(x))
        except RuntimeError as e:
            if "not supported" not in str(e):
                raise
            pytest.skip(f"torch.compile does not run here: {e}")
        seen = []
        for m in (model, compiled):
            torch.manual_seed(0)
            seen.append(script.pgd(m, x, y, EPS, ALPHA, 3))
        close(*seen)
        script.pgd_at_loss(compiled, x, y, EPS, ALPHA, 1).backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= 0.1 * w.grad
                w.grad = None


def test_training_attacks_in_parts(monkeypatch):
    c, (x, y), model, seen = bench_settings(), images(), tiny("s4"), []
    pixels = (255 * x).to(torch.uint8)
    monkeypatch.setattr(train, "part_size", lambda c, *width: 1)
    for name in ("pgd", "kl_pgd"):
        real = getattr(train, name)
        monkeypatch.setattr(train, name, lambda m, x, *rest, real=real, name=name: seen.append(
            (name, len(x))) or real(m, x, *rest))
    for work in (lambda: train.loss_backward(c, "pgd", model, x, y, EPS, ALPHA),
                 lambda: train.evaluate(model, pixels, model(pixels.double() / 255).argmax(1),
                                        ("clean", "pgd-2"), c, "test"),
                 lambda: train.loss_backward(c, "trades", model, x, y, EPS, ALPHA)):
        seen.clear()
        work()
        assert [size for _, size in seen] == [1] * len(x)
    assert {name for name, _ in seen} == {"kl_pgd"}


def test_training_takes_what_a_cache_holds_of_mamba_s_inner_channels_too(monkeypatch):
    wide = 2 * bench_settings().d_model
    monkeypatch.setattr(train, "part_size", lambda c, width=0: 2 if width == wide else 4)
    for name, given, sizes in (("mamba", None, [2, 2, 1]), ("mamba", 1, [1] * 5),
                               ("s4", None, [4, 1]), ("s4", 3, [3, 2]), ("s4", 9, [4, 1])):
        c, (x, y), model, seen = bench_settings(name), images(), tiny(name), []
        c.micro_batch = given
        model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
        train.loss_backward(c, "standard", model, x, y, EPS, ALPHA)
        assert seen == sizes


@pytest.mark.parametrize("method", ("pgd", "trades"))
def test_no_pass_takes_more_than_a_micro_batch_also_where_attacks_take_the_batch(
    method, monkeypatch
):
    c, (x, y), model, seen = bench_settings("s4"), images(), tiny("s4"), []
    monkeypatch.setattr(train, "part_size", lambda c, *width: c.batch_size)         # a GPU
    model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    for c.micro_batch, largest in ((2, 2), (None, 5)):
        seen.clear()
        train.loss_backward(c, method, model, x, y, EPS, ALPHA)
        assert max(seen) == largest


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ("pgd", "trades"))
def test_train_py_s_losses_are_those_of_the_scripts(name, method, monkeypatch):
    c, (x, y), model = bench_settings(name, "--beta", "3"), images(), tiny(name)
    script, c.micro_batch, at = MODELS[name], 2, (x, y, EPS, ALPHA, c.steps)
    monkeypatch.setattr(train, "part_size", lambda c, *width: 3)

    def theirs():
        loss = script.pgd_at_loss(model, *at) if method == "pgd" else script.trades_loss(
            model, *at, c.beta)
        loss.backward()
        return loss
    seen = []
    for work in (theirs, lambda: train.loss_backward(c, method, model, x, y, EPS, ALPHA)):
        torch.manual_seed(0)
        model.zero_grad()
        seen.append([work(), *(w.grad.clone() for w in model.parameters())])
    for a, b in zip(*seen):
        close(a, b)


@pytest.mark.parametrize("method", ("standard", "pgd", "trades"))
def test_micro_batches_make_the_gradient_of_the_batch(name, method):
    c, x, y = bench_settings(name), torch.rand(5, 1, 4, 4).double(), torch.arange(5)
    model, once, seen = tiny_model(name), MODELS[name].once, []
    for c.micro_batch in (2, None):
        model.zero_grad()
        loss = train.loss_backward(c, method, model, x, y, 0.0, 0.0)
        seen.append([loss] + [w.grad.clone() for w in model.parameters()])
    for part, whole in zip(*seen):
        close(part, whole)
    assert MODELS[name].once is once


@pytest.mark.parametrize("name", KERNELS)
def test_parts_of_a_batch_share_a_kernel_that_is_made_twice_whatever_their_number(
        name, monkeypatch):
    owner, method = KERNELS[name]
    original, made = getattr(owner, method), []
    monkeypatch.setattr(owner, method, lambda *args: made.append(
        torch.is_grad_enabled()) or original(*args))
    c, (x, y), script, model = bench_settings(name), images(), MODELS[name], tiny(name)
    for c.micro_batch, expected in (1, [False, False, True, True]), (2, [False, False, True, True]):
        made.clear()
        train.loss_backward(c, "trades", model, x, y, EPS, 0.0)             # two layers
        assert made[2:] == expected and not any(w.grad is None for w in model.parameters())
    once = script.once
    with pytest.raises(ZeroDivisionError), train.kernels_apart(script):
        model(x)
        raise ZeroDivisionError
    assert script.once is once


# ---- train.py: precision -------------------------------------------------------------------------

def as_on_a_gpu(model):
    """There autocast makes LayerNorm and softmax return float32."""
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            m.register_forward_hook(lambda module, args, out: out.float())
    return model


@pytest.mark.parametrize("options", ({}, {"ads": "relu"}, {"control": "glu"}), ids=str)
@pytest.mark.parametrize("like", (lambda model: model, as_on_a_gpu), ids=("cpu", "gpu"))
def test_in_bf16_weights_and_gradients_stay_float32_and_finite(name, options, like):
    c = bench_settings(name, "--precision", "bf16")
    model = like(tiny(name, **options).float())
    x, y = images()
    x, noise, types = x.float(), torch.zeros(x.shape), set()
    model.head.register_forward_hook(lambda module, args, out: types.add(out.dtype))
    for method in train.METHODS:
        model.zero_grad()
        with train.reduced(c):
            if method == "free":
                train.free_backward(model, x, y, noise, EPS)
            elif method == "yopo":
                train.yopo_backward(model, x, y, EPS, ALPHA, 2, 2)
            else:
                train.loss_backward(c, method, model, x, y, EPS, ALPHA)
        for w in model.parameters():
            assert w.dtype == w.grad.dtype == torch.float32 and w.grad.isfinite().all()
    assert types == {torch.bfloat16}


def test_in_bf16_kernels_and_the_selective_scan_keep_every_bit(name, monkeypatch):
    c, script, made, scanned = bench_settings(name, "--precision", "bf16"), MODELS[name], [], []
    model, (x, y) = tiny(name).float(), images()
    x, once, scan = x.float(), script.once, mamba_adv.selective_scan
    monkeypatch.setattr(script, "once", lambda m, k, make: made.append((m, k, make)) or once(
        m, k, make))
    monkeypatch.setattr(mamba_adv, "selective_scan", lambda *args: scanned.append(args) or scan(
        *args))
    with train.reduced(c):
        train.loss_backward(c, "pgd", model, x, y, EPS, ALPHA)
        kept = [once(*args) for args in made]
    for value, (_, _, make) in zip(kept, made):
        for a, b in zip(*([v] if torch.is_tensor(v) else v for v in (value, make()))):
            assert torch.equal(a, b)
    for args in scanned:
        args = [v.detach().float().requires_grad_() for v in args]
        expected, results = scan(*args), []
        g = torch.randn_like(expected)
        with train.reduced(c):                                          # its backward, too
            results.append((scan(*args), *torch.autograd.grad(scan(*args), args, g)))
        for a, b in zip(results[0], (expected, *torch.autograd.grad(expected, args, g))):
            assert a.dtype == torch.float32 and torch.equal(a, b)
    assert made or scanned


def test_whatever_trained_a_model_evaluation_is_float32_without_tf32(tmp_path, monkeypatch, capsys):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    seen, real, rows = [], train.hits, {}

    def spy(model, x, y):
        autocast = (x.flatten(1) @ x.flatten(1).mT).dtype == torch.bfloat16
        seen.append((autocast, *(f.allow_tf32 for f in flags), model(x).dtype))
        return real(model, x, y)
    monkeypatch.setattr(train, "hits", spy)
    out = tmp_path / "run"
    assert trains(out, *TINY, "--precision", "bf16") == 0
    assert {v.dtype for v in weights(out).values()} == {torch.float32}
    for precision in ("bf16", "fp32"):
        assert train.main(["--evaluate", str(out / "last.pt"), "--precision", precision]) == 0
        rows[precision] = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert set(seen) == {(False, False, False, torch.float32)} and rows["bf16"] == rows["fp32"]
    c = bench_settings()
    c.precision = "tf32"
    with pytest.raises(ZeroDivisionError), train.reduced(c):
        assert all(f.allow_tf32 for f in flags)
        raise ZeroDivisionError
    assert not any(f.allow_tf32 for f in flags)
    state = torch.load(out / "last.pt", weights_only=True)                  # trained elsewhere
    state["config"]["precision"] = "tf32"
    for file in out.glob("*.pt"):
        torch.save(state, file)
    (out / "config.json").write_text(json.dumps(state["config"]))
    words = ["--evaluate", str(out / "last.pt"), "--device", "cpu"]
    assert train.main(words) == 0 and train.main([*words, "--precision", "tf32"]) == 2
    assert "--precision tf32: cpu has none" in capsys.readouterr().err
    for words in (["--resume", str(out)], ["--resume", "--out", str(out)]):
        assert train.main([*words, "--device", "cpu"]) == 2
        assert f"--resume {out}: the run's precision is tf32, which" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", {
    "--precision tf32": "--precision tf32: cpu has none; use a GPU of compute capability 8.0",
    "--precision fp8": "invalid choice: 'fp8'",
    "--bench 0": "--bench 0: it must be at least 1",
    "--bench --lengths 64,x": "64,x is no list of whole numbers; write it as 1,5,10",
    "--bench --lengths 0": "--lengths [0]: each must be at least 1",
    "--bench --resume": "--bench and --resume are two jobs; give one of them",
    "--lengths 64": "--lengths has no place without --bench; add it, or leave this out",
    "--micro-batch 2 --method free": "--micro-batch 2: --method free takes a batch at once",
}.items(), ids=lambda v: v if v.startswith("--") else "")
def test_speed_flags_refuse_in_one_sentence_and_write_nothing(words, message, tmp_path, capsys):
    assert trains(tmp_path / "run", *words.split(), "--dataset", "synthetic") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


# ---- train.py: evidence --------------------------------------------------------------------------

TINY_7 = [*TINY, "--patch-size", "7", "--batch-size", "8", "--attacks", "clean"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """best.pt of two tiny runs of two models, trained once."""
    out = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "say", lambda *words, **kw: None)
        for name in ("s4", "mamba"):
            assert trains(out / name, *TINY_7, "--model", name, "--eval-train", "16") == 0
    return out / "s4" / "best.pt", out / "mamba" / "best.pt"


def evaluates(checkpoint, *words, size="20"):
    """train.main on a checkpoint that has no table yet: an earlier one's rows would be kept."""
    checkpoint.with_name(f"{checkpoint.stem}-evaluation.json").unlink(missing_ok=True)
    return train.main(["--evaluate", str(checkpoint), "--device", "cpu", "--test-size", size,
                       *words])


def report(checkpoint, name="evaluation"):
    return json.loads(checkpoint.with_name(f"{checkpoint.stem}-{name}.json").read_text())


def batches(monkeypatch):
    """A list that grows by one with every batch that an attack is run on."""
    real, calls = train.still_right, []
    monkeypatch.setattr(train, "still_right", lambda *args: calls.append(args) or real(*args))
    return calls


def plain(report):
    """Without what no two evaluations share."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in report["rows"]]


# --- the published attack -----------------------------------------------------------------------

def test_the_published_attack_by_hand_its_black_pixels_stay_and_its_gradients_leave_the_ball():
    x, up = randn(2, 1, 1, 1, 4)
    x[:], up[:] = torch.tensor([0, 1, 0.5, 0.5]), torch.tensor([1, -1, 1, -1])
    model, eps, alpha = LinearSpy(2, 4).requires_grad_(False), 0.1, 0.03
    model.linear.weight[:] = torch.stack([0 * up.flatten(), up.flatten()])
    stays, moves, far = 0, 0, 0.0
    for seed in range(40):
        model.seen.clear()
        torch.manual_seed(seed)
        d = 2 * eps * torch.rand_like(x) - eps
        torch.manual_seed(seed)
        x_adv = train.pgd_official(model, x, torch.tensor([0]), eps, alpha)
        start = (x + d).clamp(0, 1)
        for k in range(10):
            close(model.seen[k], (start + d).clamp(0, 1), 1e-12)
            inside = (start + d >= 0) & (start + d <= 1)
            d = (d + alpha * up * inside).clamp(-eps, eps)
        close(x_adv, (x + d).clamp(0, 1), 1e-12)
        stays += int(x_adv[0, 0, 0, 0] == 0)
        moves += int(x_adv[0, 0, 0, 0] > eps - 1e-9)
        far = max(far, *(float((p - x).abs().max()) for p in model.seen))
        assert (x_adv - x).abs().max() <= eps + 1e-12 and 0 <= x_adv.min() <= x_adv.max() <= 1
    assert stays + moves == 40 and 10 <= stays <= 30                    # half of the black pixels
    assert 1.9 * eps < far <= 2 * eps + 1e-12


def test_the_published_attack_is_refused_in_training_and_measured_in_evaluation(
        trained, tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY_7, "--attacks", "pgd-official") == 2
    assert "--attacks pgd-official: it stands for comparison only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(train.UserError, match="comparison only"):       # nor to choose Best
        train.evaluate(net(), dotted(), torch.zeros(24), ("pgd-official",), check_c(), "val")
    assert evaluates(trained[0], "--attacks", "pgd-10,pgd-official") == 0
    assert [r["attack"] for r in report(trained[0])["rows"]] == ["pgd-10", "pgd-official"]


# --- checks for masked gradients ----------------------------------------------------------------

def check_c(**kw):
    return ensemble_c(**{"classes": 10, "batch_size": 60,
                         "test_size": 60, "evaluate": None} | kw)


class Masked(nn.Module):
    """A model that hides its gradients, or its nature, in one of the known ways."""

    def __init__(self, net, fault=None):
        super().__init__()
        self.net, self.fault = net, fault

    def forward(self, x):
        z = self.net((x * 8).round() / 8 if self.fault == "quantised input" else x)
        if self.fault == "chance":
            z = z + 0.01 * torch.randn_like(z)
        return {"logits times 100": 100 * z, "not finite": z / 0}.get(self.fault, z)


class Scanned(nn.Module):
    """h_t = sigmoid(a u_t) h_{t-1} + u_t over pixels; the decay without gradient, where told so."""

    def __init__(self, detach):
        super().__init__()
        self.out, self.detach = nn.Linear(1, 10), detach
        with torch.no_grad():
            self.out.weight.copy_(torch.linspace(-1, 1, 10)[:, None])

    def forward(self, x):
        h = 0
        for u in x.flatten(1).unbind(1):
            decay = torch.sigmoid(2 * u - 1)
            h = (decay.detach() if self.detach else decay) * h + u
        return self.out(h[:, None])


@pytest.fixture(scope="module")
def digits_net():
    """A CNN trained on drawn digits of 14 x 14 pixels, and 60 images with their labels."""
    torch.manual_seed(0)
    x, y = s4_adv.drawn_digits(1260, 0, size=14)
    model = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(392, 32),
                          nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for i in [i for _ in range(12) for i in torch.randperm(1200).split(60)]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[i] / 255), y[i]).backward()
        optimizer.step()
    return model, x[1200:], y[1200:]


def failures(found):
    return {check["name"]: check["numbers"] for check in found if not check["passed"]}


def test_a_healthy_cnn_and_a_healthy_s4_pass_all_checks(digits_net):
    model, x, y = digits_net
    found = train.checks(model, x, y, check_c())
    assert failures(found) == {} and [f["name"] for f in found] == list(train.CHECKS)
    s4 = s4_adv.Classifier(1, 10, d_model=16, d_state=4, n_layers=1, patch_size=7, ads="relu")
    optimizer = torch.optim.AdamW(s4.parameters(), lr=1e-2)
    images, labels = s4_adv.drawn_digits(1000, 0, size=14)
    for i in [i for _ in range(6) for i in torch.randperm(1000).split(50)]:
        optimizer.zero_grad()
        F.cross_entropy(s4(images[i] / 255), labels[i]).backward()
        optimizer.step()
    assert failures(train.checks(s4, x, y, check_c())) == {}


@pytest.mark.parametrize("fault, names", [
    ("logits times 100", ["gradient not zero", "cross-entropy and targeted DLR agree",
                          "square not stronger than pgd-50x5", "smaller logits change nothing"]),
    ("quantised input", ["gradient not zero", "gradient is the slope, in float64",
                         "noise weaker than pgd-10"]),
    ("chance", ["forward deterministic and finite"]),
    ("not finite", ["forward deterministic and finite"]),
])
def test_a_planted_fault_is_caught_by_named_checks(fault, names, digits_net, monkeypatch):
    model, x, y = digits_net
    monkeypatch.setattr(train, "CHECKS", {name: train.CHECKS[name] for name in names})
    assert list(failures(train.checks(Masked(model, fault), x, y, check_c()))) == names


@pytest.mark.parametrize("detach", [True, False])
def test_a_scan_without_gradient_for_its_decay_is_caught_by_the_slope(detach, monkeypatch):
    model, x = Scanned(detach), (255 * dotted(100)).to(torch.uint8)
    name = "gradient is the slope, in float64"
    monkeypatch.setattr(train, "CHECKS", {name: train.CHECKS[name]})
    with torch.no_grad():
        found = train.checks(model, x, model(x / 255).argmax(1), check_c())
    assert list(failures(found)) == [name] * detach


@pytest.mark.parametrize("name, possible, impossible", [
    ("fgsm, pgd-10, pgd-50x5 in this order", (.9, .5, .3, .31), (.9, .3, .5, .5)),
    ("accuracy falls with eps", (.9, .5, .3, .1, 0), (.9, .5, .6, .1, 0)),
    ("accuracy falls with steps", (.9, .5, .3, .3), (.5, .5, .3, .4)),
    ("accuracy is 0 at eps 1", (.01,), (.03,)),
    ("cross-entropy and targeted DLR agree", (.5, .45), (.5, .3)),
    ("square not stronger than pgd-50x5", (.5, .6), (.5, .4)),
    ("smaller logits change nothing", (.5, .6, .6), (.5, .6, .4)),
    ("noise weaker than pgd-10", (.9, .5), (.9, .9)),
])
def test_a_check_passes_what_is_possible_and_fails_what_is_not(
        name, possible, impossible, monkeypatch):
    for shares, passes in ((possible, True), (impossible, False)):
        left = iter(enumerate(shares))
        monkeypatch.setattr(train, "survivors", lambda t, *attack: next(left))
        passed, numbers = train.CHECKS[name](SimpleNamespace(c=check_c(), y=range(200)))
        assert passed is passes and tuple(numbers.values()) == shares


def test_checks_are_printed_written_and_decide_the_exit_code(trained, capsys, monkeypatch):
    names = list(train.CHECKS)[:2]
    for fails in (False, True):
        monkeypatch.setattr(train, "CHECKS", {
            names[0]: train.deterministic, names[1]: lambda t: (not fails, {"n": len(t.y)})})
        assert evaluates(trained[0], "--checks") == int(fails)
        out = capsys.readouterr().out
        assert f"{'FAIL' if fails else 'pass'}  gradient not zero" in out and "n = 20" in out
        found = report(trained[0], "checks")
        assert [f["passed"] for f in found["checks"]] == [True, not fails] and found["rows"] == []
    assert found["checks"][1]["numbers"] == {"n": 20}
    assert train.main(["--evaluate", str(trained[0]), "--checks", "--device", "cpu"]) == 1
    assert report(trained[0], "checks")["checks"][1]["numbers"] == {"n": 200}   # unless told
    assert evaluates(trained[0], "--checks", size="210") == 1
    assert report(trained[0], "checks")["checks"][1]["numbers"] == {"n": 210}


# --- sweeps, transfer, cuts -----------------------------------------------------------------------

def test_sweeps_are_rows_at_their_radius_and_steps_and_equal_single_evaluations(
        trained, capsys, monkeypatch):
    checkpoint, calls = trained[0], batches(monkeypatch)
    assert evaluates(checkpoint, "--eps-sweep", "0,4/255,0.5", "--steps-sweep", "1,10",
                     "--attacks", "clean,pgd-2", "--eps", "8/255", "--alpha", "2/255") == 0
    rows, out = report(checkpoint)["rows"], capsys.readouterr().out
    assert [r["attack"] for r in rows] == ["clean"] + 4 * ["pgd-2"] + ["pgd-1", "pgd-10"]
    assert [round(r["alpha"], 6) for r in rows[2:5]] == [0, round(1 / 255, 6), 0.125]
    assert rows[2]["accuracy"] == rows[0]["accuracy"] and "pgd-2, eps 4/255" in out
    assert len(calls) == 7 * 3                                          # no row serves for another
    table = checkpoint.with_name("best-evaluation.csv").read_text()
    assert len(table.splitlines()) == 8 and list(checkpoint.parent.glob("*.part")) == []
    assert evaluates(checkpoint, "--eps", "4/255", "--alpha", "1/255", "--attacks", "pgd-2") == 0
    assert report(checkpoint)["rows"][0]["accuracy"] == rows[3]["accuracy"]


def test_eps_alone_takes_the_step_along(trained):
    for words, alpha in ((("--eps", "64/255"), 16), (("--eps", "64/255", "--alpha", "1/255"), 1),
                         (("--alpha", "1/255"), 1), ((), 2)):
        for job in (["--evaluate", str(trained[0])], ["--dataset", "synthetic", "--out", "new"]):
            c = settings(*job, *words)
            assert math.isclose(255 * c.alpha, alpha), (job, words)


def test_without_attacks_only_what_is_asked_for_is_measured(trained):
    assert evaluates(trained[0], "--steps-sweep", "1") == 0
    assert [r["attack"] for r in report(trained[0], "steps-sweep")["rows"]] == ["pgd-1"]


def test_transfer_attacks_the_other_model_and_measures_this_one(trained, monkeypatch):
    attacked, calls = [], batches(monkeypatch)

    def black(model, x, y, *rest):
        attacked.append(type(model))
        return torch.zeros_like(x)
    monkeypatch.setattr(train, "pgd", black)
    monkeypatch.setitem(train.AUTO, "square", lambda model, x, y, eps: x)   # stops where it breaks
    words = "--transfer-from", str(trained[1]), "--attacks", "fgsm,square"  # that one: no transfer
    assert evaluates(trained[0], *words) == 0
    rows = report(trained[0])["rows"]
    assert [r["attack"] for r in rows] == ["fgsm", "square", "transfer: pgd-10", "transfer: fgsm"]
    assert set(attacked) == {mamba_adv.Classifier} and len(calls) == 4 * 3
    c, state = train.settings(["--evaluate", str(trained[0]), "--device", "cpu"])
    c.test_size, model = 20, train.load_model(c, state)
    x, y = train.load_data(c)["test"]
    with torch.no_grad():
        both = (model(x / 255).argmax(1) == y) & (model(0 * x / 255).argmax(1) == y)
    assert rows[2]["accuracy"] == both.double().mean()


def test_transfer_between_data_sets_is_refused(trained, tmp_path, capsys):
    state = torch.load(trained[1], weights_only=True)
    state["config"]["dataset"] = "mnist"
    torch.save(state, tmp_path / "mnist.pt")
    assert evaluates(trained[0], "--transfer-from", str(tmp_path / "mnist.pt")) == 2
    err = capsys.readouterr().err
    assert "mnist.pt: its dataset is mnist, and that of" in err and err.count("\n") == 1


def test_a_cut_evaluation_goes_on_and_ends_like_one_that_was_not_cut(trained, monkeypatch):
    checkpoint, words = trained[0], ("--attacks", "clean,pgd-2x2", "--steps-sweep", "1,3")
    assert evaluates(checkpoint, *words) == 0
    whole, real, calls = plain(report(checkpoint)), train.still_right, []

    def cut(*args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "still_right", cut)
    for at in (2, 5, 12):                                               # 3 batches, 4 attacks
        calls.clear()
        assert evaluates(checkpoint, *words) == 130
        assert evaluates(checkpoint, "--attacks", "clean") == 0         # another leaves it alone
        del calls[at:]
        part, = checkpoint.parent.glob("*.part")
        part.write_bytes(part.read_bytes() + b'\n["half a li')
        done = at - 1
        assert evaluates(checkpoint, *words, "--seed", "1") == 0 and len(calls) == at + 12
        assert part.exists() and evaluates(checkpoint, *words) == 0     # another seed is another
        assert len(calls) == at + 12 + 12 - done and plain(report(checkpoint)) == whole
        assert not part.exists()


@pytest.mark.parametrize("change", ["weights", "n", "seed", "batch", "code"])
def test_finished_batches_serve_only_the_very_same_evaluation(
        change, trained, tmp_path, monkeypatch):
    state, file, names = torch.load(trained[0], weights_only=True), tmp_path / "best.pt", []
    torch.save(state, file)
    monkeypatch.setattr(train, "Kept", lambda path: names.append(path.name) or {})
    monkeypatch.setattr(train, "tables", lambda *args: 1 / 0)
    words = {"seed": ["--seed", "9"], "batch": ["--batch-size", "9"]}.get(change, [])
    for changed in (False, True):
        if changed and change == "weights":
            next(iter(state["model"].values())).view(-1)[0] += 1e-3
            torch.save(state, file)
        if changed and change == "code":
            (tmp_path / "ads.py").write_text(Path(ads.__file__).read_text() + "\n")
            monkeypatch.setattr(ads, "__file__", str(tmp_path / "ads.py"))
        with pytest.raises(ZeroDivisionError):
            size = "19" if changed and change == "n" else "20"
            evaluates(file, *(words if changed else []), size=size)
    assert names[0] != names[1]


# --- figures --------------------------------------------------------------------------------------

def png_size(path):
    data = Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_runs_are_plotted_from_their_logs(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    lines, draw_lines = [], train.draw_lines
    monkeypatch.setattr(train, "draw_lines", lambda ax, drawn, top: (
        lines.append(drawn), draw_lines(ax, drawn, top)))
    runs = [str(checkpoint.parent) for checkpoint in trained]
    assert train.main(["--plot", *runs, "--out", str(tmp_path / "a.png")]) == 0
    wide, high = png_size(tmp_path / "a.png")
    assert wide > 2 * high and len(lines) == 2
    assert list(lines[0]) == [
        f"{name}, {attack}" for name in ("train", "held-out") for attack in ("clean", "pgd-10")]
    assert len({style for _, _, _, style in lines[0].values()}) == 4
    row = dict(zip(*(line.split(",") for line in log(trained[0].parent)[:2])))
    epochs, accuracies = lines[0]["held-out, clean"][:2]
    assert list(epochs) == [1] and list(accuracies) == [100 * float(row["val_clean"])]
    assert train.main(["--plot", str(tmp_path), "--out", str(tmp_path / "b.png")]) == 2
    assert f"--plot {tmp_path}: there is no log.csv with" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("there", [True, False])
def test_sweeps_and_images_are_drawn_and_without_matplotlib_the_tables_still_come(
        there, trained, monkeypatch, capsys, tmp_path):
    if there:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for file in trained[0].parent.glob("best-*.png"):
        file.unlink()
    assert evaluates(trained[0], "--eps-sweep", "0,0.1", "--images") == 0
    out, grid = capsys.readouterr().out, trained[0].with_name("best-images.png")
    assert "pgd-10, eps 0.1" in out and ("no figure: " in out) is not there
    assert trained[0].with_name("best-eps-sweep.png").exists() is there
    wide, high = png_size(grid)
    assert wide > 2 * high and ("without captions" in out) is not there
    seen = [line.split() for line in out.split("perturbation x 15.9 + 0.5")[1].splitlines()[1:9]]
    c, state = train.settings(["--evaluate", str(trained[0]), "--device", "cpu"])
    x, y = (v[:8] for v in train.load_data(c)["test"])
    with torch.no_grad():
        clean = train.load_model(c, state)(x / 255).argmax(1)
    assert [row[:3] for row in seen] == [
        [str(v) for v in row] for row in zip(range(8), y.tolist(), clean.tolist())]
    if not there:
        assert train.main(["--plot", str(tmp_path), "--out", str(tmp_path / "c.png")]) == 2


# ---- The theory: gains, bounds and identities (P1 to P5), a certificate, --analyse ---------------

fixed_map, few = each("s4", "dss", "s5"), pytest.mark.parametrize("L", (1, 7, 16))


def some_map(kind):
    return scrambled(MAPS[kind](6, 8))


def gain_of(kind):
    return (attention_adv if kind == "ema" else s4_adv).gain


@few
@torch.no_grad()
def test_p1_the_gain_is_reached_by_its_worst_input_and_never_passed(kind, L):
    ssm = some_map(kind)
    gain, worst = gain_of(kind)(ssm, L)
    u = randn(len(worst), L, 6)
    seen = (ssm.recurrence(u + 0.1 * worst) - ssm.recurrence(u)).abs().amax((0, 1))
    assert worst.abs().max() <= 1
    close(seen, 0.1 * gain, 1e-10)                                      # whatever u is
    du = torch.cat([randn(50, L, 6).sign(), 2 * torch.rand(50, L, 6, dtype=torch.float64) - 1])
    assert (ssm.recurrence(du).abs().amax((0, 1)) <= gain + 1e-10).all()


@few
@torch.no_grad()
def test_p2_the_gain_lies_between_the_spectral_gain_and_the_modal_bound(kind, L):
    ssm = some_map(kind)
    gain, (spectral, modal) = gain_of(kind)(ssm, L)[0], (
        attention_adv if kind == "ema" else s4_adv).gain_bounds(ssm, L)
    total = ssm.kernel(L).abs().sum(1) if kind == "ema" else gain       # ||K||_1 of all 2L - 1 lags
    wave = torch.exp(2j * math.pi * 3 / (2 * L) * torch.arange(L, dtype=torch.float64))
    last = sum(ssm(part.flip(0)[None, :, None].expand(1, L, 6))[:, -1] * unit
               for part, unit in ((wave.real, 1), (wave.imag, 1j)))[0].abs()
    assert (spectral <= total + 1e-10).all() and (total <= modal + 1e-10).all()
    assert (gain <= total + 1e-10).all()
    if kind in ("s4", "dss") and L >= 3:                                # one of the 2L frequencies
        assert (last <= spectral + 1e-10).all() and (last > 0.01 * spectral).any()


@torch.no_grad()
def test_p2_is_an_equality_on_both_sides_where_every_mode_is_real_and_positive():
    ema, s5 = some_map("ema"), some_map("s5")
    for w in (ema.beta, ema.gamma, ema.omega, s5.D, s5.B, s5.C):
        w.abs_()
    s5.imag.zero_()
    s5.B[..., 1], s5.C[..., 1] = 0, 0
    spectral, modal = attention_adv.gain_bounds(ema, 16)
    close(spectral, modal, 1e-10)
    spectral, modal = s4_adv.gain_bounds(s5, 16)
    close(spectral, modal, 1e-10)
    close(spectral, s4_adv.gain(s5, 16)[0], 1e-10)


def scan_pair(L=12):
    u, dt, A, B, _, _ = scan_inputs(2, L, 3, 4)
    move = [v + 0.1 * randn(*v.shape) for v in (u, dt.log(), B)]
    return (u, dt, B), (move[0], move[1].exp(), move[2]), A


def states(fed, A):
    """h (b, L, d, N) of the definition: one component of C at a time."""
    u, dt, B = fed
    none = torch.zeros_like(A[:, 0])
    return torch.stack([mamba_adv.selective_scan_loop(u, dt, A, B, unit.expand_as(B), none)
                        for unit in torch.eye(A.shape[1], dtype=A.dtype)], -1)


def test_p3_the_error_of_a_selective_scan_is_the_sum_of_its_three_terms_and_grows_linearly():
    clean, attacked, A = scan_pair()
    error, reach = states(attacked, A) - states(clean, A), 0
    for t, (h, h_adv, *terms) in enumerate(mamba_adv.scan_errors(clean, attacked, A)):
        close(sum(terms), error[:, t], 1e-10)
        close(h_adv - h, error[:, t], 1e-10)
        before = error[:, t - 1] if t else torch.zeros_like(h)
        close(terms[0], torch.exp(attacked[1][:, t, :, None] * A) * before, 1e-10)
        reach = reach + sum(v.abs() for v in terms[1:])
        assert (error[:, t].abs() <= reach + 1e-10).all()
    assert t == 11


def test_p3_the_error_is_linear_in_the_stored_state_and_independent_of_it_without_selection():
    clean, attacked, A = scan_pair(L=1)

    def moved(M, attacked):
        return next(mamba_adv.scan_errors(clean, attacked, A, M))[3]
    assert moved(1.0, attacked).abs().max() > 1e-3
    for M in (10.0, 100.0, 1000.0):
        close(moved(M, attacked), M * moved(1.0, attacked), 1e-10)
    u, _, B = attacked
    fixed = [next(mamba_adv.scan_errors(clean, (u, clean[1], B), A, M)) for M in (1.0, 1000.0)]
    close(fixed[0][1] - fixed[0][0], fixed[1][1] - fixed[1][0], 1e-10)  # dt is what selects A'


def test_p3_the_local_gain_is_the_gain_of_a_fixed_map_and_a_first_order_bound_of_mamba(fixed_map):
    ssm = some_map(fixed_map)
    close(mamba_adv.local_gain(ssm, randn(2, 7, 6), range(6)),
          s4_adv.gain(ssm, 7)[0].expand(2, 6), 1e-9)
    mamba, u = scrambled(mamba_adv.Mamba(6, 4)), randn(1, 7, 6).requires_grad_()
    slope, = torch.autograd.grad(mamba(u)[0, -1, 2], u)
    with torch.no_grad():
        moves = [(mamba(u + du) - mamba(u))[0, -1, 2].abs() / 1e-6
                 for du in 1e-6 * torch.cat([slope.sign(), randn(20, 7, 6).sign()])]
    gain = mamba_adv.local_gain(mamba, u, [2])[0, 0]
    close(moves[0], gain, 1e-4)
    assert max(moves) <= gain * (1 + 1e-4)


@torch.no_grad()
def test_p4_attention_clips_the_error_and_a_jump_of_all_its_mass_reaches_the_bound():
    for size in (0.01, 1, 100):
        V, scores = randn(3, 7, 5), randn(3, 7, 7)
        V_adv, scores_adv = V + size * randn(3, 7, 5), scores + size * randn(3, 7, 7)
        error, bound, tv, osc = attention_adv.attention_error(
            scores.softmax(-1), V, scores_adv.softmax(-1), V_adv)
        assert (error <= bound + 1e-12).all() and (tv <= 1 + 1e-12).all() and (osc > 0).all()
    V = randn(1, 7, 1)
    P, P_adv = (F.one_hot(V[..., 0].sort(1)[1][:, [k]], 7).double().expand(1, 7, 7) for k in (0, 6))
    error, bound, tv, osc = attention_adv.attention_error(P, V, P_adv, V + 0.1)
    close(error, bound, 1e-12)
    close(bound, (V.max() - V.min() + 0.1).expand(1, 7, 1), 1e-12)


@torch.no_grad()
def test_p4_mixing_is_what_mega_computes_with():
    mega, u, fed = scrambled(attention_adv.Mega(6, 4, 8, 5, max_len=9)), randn(2, 9, 6), []
    mega.middle.register_forward_hook(lambda module, args, out: fed.append(args[0]))
    mega(u)
    P, V = mega.mixing(u)
    reset = mega.gates(F.silu(mega.ema(u))).split(mega.sizes, -1)[2]
    close(P.sum(-1), torch.ones(2, 9).double(), 1e-12)
    close(P @ V * F.silu(reset), fed[0], 1e-12)


@pytest.mark.parametrize("activation", ads.ACTIVATIONS)
@torch.no_grad()
def test_p5_the_error_after_ads_is_its_three_terms_and_relu_removes_some_of_it_exactly(activation):
    module, y = scrambled(ads.AdaptiveScaling(6, activation)), randn(40, 6)
    y_adv = y + 0.3 * randn(40, 6)
    *terms, removed = ads.error_parts(module, y, y_adv)
    s, s_adv = (module.scale_and_shift(v)[0] for v in (y, y_adv))
    close(sum(terms), module(y_adv) - module(y), 1e-12)
    close(terms[0], s_adv * (y_adv - y), 1e-12)
    close(terms[1], (s_adv - s) * y, 1e-12)
    both = sum((layer(v) > 0).int() for layer in (module.scale, module.shift) for v in (y, y_adv))
    assert torch.equal(removed, (both == 0) & torch.tensor(activation == "relu"))
    assert (module(y_adv) - module(y))[removed].eq(0).all() and (
        0 < int(removed.sum()) < removed.numel() or activation != "relu")


@torch.no_grad()
def test_the_box_of_a_normalised_vector_is_sound_and_no_smaller_one_is():
    for c, r in ((randn(20, 4), 0.3), (randn(20, 4), 2.0), (randn(20, 4), 0.0)):
        r = r * torch.rand(20, 4, dtype=torch.float64)
        centre, radius = s4_adv.normalised(c, r, 1e-5)
        ends = torch.stack([c - r, c + r, torch.minimum(torch.maximum(c - r, 0 * c), c + r)])
        grid = torch.cartesian_prod(*[torch.arange(3)] * 4)                 # an extreme is at one
        v = torch.stack([ends[g, :, torch.arange(4)].T for g in grid])      # (81, 20, 4)
        f = v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        close(f.amax(0), centre + radius, 1e-12)
        close(f.amin(0), centre - radius, 1e-12)
        v = c + r * (2 * torch.rand(500, 20, 4, dtype=torch.float64) - 1)
        f = v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert ((f - centre).abs() <= radius + 1e-12).all()


@torch.no_grad()
def test_a_block_with_its_residual_is_the_convolution_with_linear_block(fixed_map):
    block, z = scrambled(s4_adv.Block(6, 4, ssm=fixed_map)), randn(2, 7, 6)
    M = s4_adv.linear_block(block, 7)
    by_hand = torch.stack([sum(z[:, t - s] @ M[s].T for s in range(t + 1)) for t in range(7)], 1)
    close(by_hand + block.out.bias, z + block(z), 1e-10)
    with pytest.raises(ValueError, match="AdaptiveScaling is not linear"):
        s4_adv.linear_block(s4_adv.Block(6, 4, ads="relu"), 7)


def true_margin(model, x, y):
    """z_y - max_{k != y} z_k."""
    z = model(x)
    return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -math.inf).amax(1)


def test_the_certificate_is_exact_at_eps_0_and_no_attack_leaves_it(fixed_map):
    model, (x, _) = tiny(fixed_map), images(8)
    y = model(x).argmax(1)
    close(s4_adv.certified_margin(model, x, y, 0.0), true_margin(model, x, y), 1e-7)
    radius, tightest = s4_adv.certified_radius(model, x, y), math.inf
    assert (radius > 1e-5).all()
    with s4_adv.frozen(model), torch.no_grad():
        for eps in (1e-4, 1e-3, 1e-2, radius.view(-1, 1, 1, 1), 0.1):
            bound = s4_adv.certified_margin(model, x, y, eps)
            points = [x + eps * (2 * torch.rand_like(x) - 1) for _ in range(20)]
            points += [x + eps * randn(*x.shape).sign() for _ in range(20)]
            step = torch.as_tensor(eps) / 4
            points += [s4_adv.ascend(model, lambda v: -true_margin(model, v, y).sum(), x, p, eps,
                                     step, 12) for p in points[-3:]]
            gaps = [true_margin(model, p.clamp(0, 1), y) - bound for p in points]
            assert min(gap.min() for gap in gaps) >= 0
            tightest = min(tightest, *(float((g / (true_margin(model, x, y) - bound)).min())
                                       for g in gaps))
    assert tightest < 1 - 1 / 30                # bounds 30 times as tight would have been refuted
    assert (s4_adv.certified_margin(model, x, y, radius.view(-1, 1, 1, 1)) > 0).all()
    assert (s4_adv.certified_margin(model, x, y, radius.view(-1, 1, 1, 1) + 2e-9) <= 0).all()
    assert s4_adv.certified_radius(model, x, (y + 1) % 3).eq(0).all()


ANALYSIS = [*TINY, "--test-size", "6", "--data-dir", "nowhere"]


def rows_of(folder, stem):
    assert len((folder / f"{stem}.csv").read_text().splitlines()) > 10
    rows = json.loads((folder / f"{stem}.json").read_text())["rows"]
    assert all(math.isfinite(r["value"]) for r in rows)
    return {(r["statement"], r["on"], r["layer"], r["quantity"]): r["value"] for r in rows}


@pytest.mark.parametrize("options", ([], ["--ads"], ["--control", "mlp"]), ids=str)
def test_analyse_measures_every_model_at_initialisation(name, options, tmp_path, capsys):
    assert trains(tmp_path, "--analyse", *ANALYSIS, "--model", name, *options) == 0
    rows = rows_of(tmp_path, "analysis")
    text, statements = capsys.readouterr().out, {key[0].split()[0] for key in rows}
    assert statements == {"P3" if name == "mamba" else "P1,", "change"} | (
        {"P4"} if name == "attention" else set()) | ({"P5"} if options == ["--ads"] else set()) | (
        {"certified"} if name in ("s4", "dss", "s5") and not options else set())
    assert "at initialisation" in text and all(key[3] in text for key in rows)
    for (statement, on, layer, what), value in rows.items():
        if what == "worst input reaches / gain":
            assert abs(value - 1) < 1e-10
        if what == "|e - its three terms|, largest":
            assert value < 1e-10
        if what in ("error seen / gain, largest", "error / bound, largest"):
            assert 0 < value <= 1
        if statement.startswith("P5") and "share of" in what and "share of 0" not in what:
            shares = [v for k, v in rows.items() if k[:3] == (statement, on, layer)
                      and k[3].startswith("share of")]
            assert abs(sum(shares) - 1) < 1e-10


def test_analyse_measures_a_checkpoint_beside_its_initialisation(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    best = str(tmp_path / "run" / "best.pt")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert trains(tmp_path / "a", "--analyse", best, "--test-size", "6") == 0
    assert trains(tmp_path / "b", "--analyse", *ANALYSIS) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    trained, start = rows_of(tmp_path / "a", "best-analysis"), rows_of(tmp_path / "b", "analysis")
    gain = "P1, P2 fixed parameters: S4", 1, "gain ||K||_1, largest"
    assert trained[gain[0], "start", *gain[1:]] == start[gain[0], "test", *gain[1:]]
    model = train.build(settings("--dataset", "synthetic", *TINY))
    model.load_state_dict(weights(tmp_path / "run", "best.pt"))
    by_hand = float(model.double().blocks[0].ssm.kernel(4).detach().abs().sum(1).max())
    assert abs(trained[gain[0], "test", *gain[1:]] - by_hand) < 1e-10
    assert trained[gain[0], "test", *gain[1:]] != trained[gain[0], "start", *gain[1:]]
    drawn = (tmp_path / "a" / "best-analysis.png").exists()
    assert drawn or "no figure: a figure needs matplotlib" in capsys.readouterr().out


def test_analyses_of_several_models_are_drawn_into_one_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    drawn, files, draw_changes = [], [], train.draw_changes
    for method in ("standard", "pgd"):
        assert trains(tmp_path / method, "--analyse", *ANALYSIS, "--method", method) == 0
        files.append(str(tmp_path / method / "analysis.json"))
    monkeypatch.setattr(train, "draw_changes", lambda path, rows: (
        drawn.append((path, rows)), draw_changes(path, rows)))
    assert train.main(["--plot", *files, "--out", str(tmp_path / "a.png")]) == 0
    wide, high = png_size(tmp_path / "a.png")
    assert wide > 2 * high
    (_, rows), = drawn
    assert list(dict.fromkeys(r["on"] for r in rows)) == [
        "ST test", "ST train", "PGD-AT test", "PGD-AT train"]
    kept = json.loads(Path(files[0]).read_text())["rows"]
    assert [r["value"] for r in rows if r["on"] == "ST test"] == [
        r["value"] for r in kept if r["statement"].startswith("change") and r["on"] == "test"]
    (tmp_path / "b.json").write_text("{}")
    assert train.main(["--plot", str(tmp_path / "b.json"), "--out", str(tmp_path / "b.png")]) == 2
    assert "b.json: this is no analysis" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


@torch.no_grad()
def test_the_parts_that_the_figure_compares_follow_each_other_and_their_change_is_by_hand():
    f, g, h, k = randn(4, 2, 3, 5)
    p, q = f.softmax(-1), g.softmax(-1)
    found, later = train.distances(f, g), train.distances(h, k)
    close(found["MSE"], ((f - g) ** 2).sum() / 30, 1e-12)
    close(found["KL"], (p * (p / q).log()).sum() / 6, 1e-12)
    close(found["MSE / mean square"], ((f - g) ** 2).sum() / (f ** 2).sum(), 1e-12)
    close(train.distances(7 * f, 7 * g)["MSE / mean square"], found["MSE / mean square"], 1e-12)
    for name in MODELS:
        c = SimpleNamespace(model=name, ads="relu", control=None)
        mixers, seen = train.watch(model := tiny(name, ads="relu"), images()[0])
        assert len(mixers) == 2 and not any(m._forward_hooks for m in model.modules())
        parts = train.components(c, seen[1])
        assert list(parts) == ["SSM", *["attention"] * (name == "attention"), "AdS", "Linear"]
        assert parts["AdS"][1] is parts["Linear"][0]
        assert parts["SSM" if name != "attention" else name][1] is parts["AdS"][0]


@pytest.mark.parametrize("words, message", [
    ("--analyse --eps 0", "--eps 0.0: an analysis needs a perturbation; give a radius above 0"),
    ("--analyse nowhere.pt", "--analyse nowhere.pt: there is no such file or folder"),
    ("--analyse EMPTY", "--analyse EMPTY: there is no checkpoint in that folder"),
    ("--analyse --dataset cifar10 --data-dir EMPTY", "put torchvision's files into"),
])
def test_analyse_refuses_what_it_cannot_do_and_writes_nothing(
        words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "download", refused)
    (tmp_path / "EMPTY").mkdir()
    words = words.split() + ([] if "--dataset" in words else ["--dataset", "synthetic"])
    assert train.main([*words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["EMPTY"]
