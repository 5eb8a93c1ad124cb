# SPDX-License-Identifier: MIT
"""What the papers say, as tests. A name is a sentence; its body is the proof.

    python -m pytest -q test_all.py            # half a minute on one core; no GPU, no data

Identities are checked in float64 at tiny sizes. A `Spy` is a model that keeps what it is fed. The
section "Parity" writes all five models once more, in numpy loops, from the formulas of the papers.
What a copier may run into is tested in lab/test_scripts.py, the theory in lab/test_theory.py.

A test that takes `kind` runs once for each fixed map, `name` for each model, `script` for each
script, `attack` for each attack and loss, `L` for eight lengths.
"""
import copy
import functools
import inspect
import os
import pickle
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ads
import attention_adv
import mamba_adv
import s4_adv
import train

HERE = Path(__file__).resolve().parent
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
L = each(1, 2, 3, 7, 16, 33, 50, 64)


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

def test_a_script_and_ads_alone_train_in_an_empty_folder(script, tmp_path):
    for needed in ("ads.py", f"{script.__name__}.py"):
        (tmp_path / needed).write_bytes((HERE / needed).read_bytes())
    code = f"""
import sys, torch, {script.__name__} as script
assert "torchvision" not in sys.modules
model = script.Classifier(1, 10, d_model=8, d_state=4, n_layers=1, patch_size=7, ads="relu")
before = [w.clone() for w in model.parameters()]
optimizer = torch.optim.AdamW(script.param_groups(model, 2e-4))
script.pgd_at_loss(model, torch.rand(8, 1, 28, 28), torch.arange(8), 0.1, 0.05, 2).backward()
optimizer.step()
assert not any(torch.equal(*pair) for pair in zip(before, model.parameters()))"""
    done = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")   # importing is silent


def test_the_shared_text_of_the_three_scripts_is_equal_character_for_character():
    mark = r"\n# --- shared text.*\n# --- end of the shared text ---\n"
    texts = [re.search(mark, inspect.getsource(s), re.S)[0] for s in SCRIPTS]
    assert texts[0] == texts[1] == texts[2]
    for f in "pgd fgsm pgd_at_loss trades_loss accuracy param_groups frozen demo".split():
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


# ---- Fixed maps (S4, DSS, S5, the moving average of Mega): one system, two forms -----------------

def test_convolution_is_recurrence_in_value_and_gradient(kind, L):
    layer, u = scrambled(MAPS[kind](6, 4)), randn(3, L, 6).requires_grad_()
    before = u.detach().clone()
    close(layer(u), layer.recurrence(u))
    same_gradients(layer(u), layer.recurrence(u), [u, *layer.parameters()])
    same_gradients(layer(u), layer.recurrence(u), [u])                  # an attack
    close(layer(u.mT.contiguous().mT), layer.recurrence(u))             # channels before time
    assert torch.equal(u, before)


@pytest.mark.parametrize("kind", ("s4", "dss", "ema"))
def test_the_kernel_is_the_impulse_response_of_the_recurrence(kind, L):
    layer, t = scrambled(MAPS[kind](6, 4)), L // 2 if kind == "ema" else 0
    u = torch.zeros(6, L, 6, dtype=torch.float64)
    u[range(6), t, range(6)] = 1                                        # image i has channel i
    response, K = layer.recurrence(u).permute(1, 2, 0), layer.kernel(L)         # (L, out, in)
    if kind == "ema":
        K = K[:, (torch.arange(L) - t) % (2 * L)]                       # it is circular
    close(response, torch.diag_embed(K.T))


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


@pytest.mark.parametrize("N", [2, 3, 8, 64])
def test_hippo_legs_is_normal_plus_low_rank(N):
    A = np.zeros((N, N), complex)
    for n in range(N):
        A[n, :n] = [-(2 * n + 1) ** 0.5 * (2 * k + 1) ** 0.5 for k in range(n)]
        A[n, n] = -(n + 1)
    lam, P, B, V = (z.numpy() for z in s4_adv.hippo_legs(N))
    close(V @ V.conj().T, np.eye(N, dtype=complex), 1e-12)
    close(V @ (np.diag(lam) - np.outer(P, P.conj())) @ V.conj().T, A, 1e-12)
    close(V @ B, np.sqrt(2 * np.arange(N) + 1).astype(complex), 1e-12)
    assert (np.diff(lam.imag) > 0).all() and np.allclose(lam, lam[::-1].conj())


@pytest.mark.parametrize("N", [2, 3, 8, 64])
def test_s4_dss_and_s5_start_at_hippo_legs_with_steps_of_a_thousandth_to_a_tenth(N):
    lam, P, B, _ = s4_adv.hippo_legs(N)
    for kind in ("s4", "dss", "s5") if N % 2 == 0 else ("s5",):
        layer, half = MAPS[kind](3, N).double(), 0 if kind == "s5" else N // 2
        close(-layer.log_minus_real.exp() + 1j * layer.imag, lam[half:], 1e-6)  # float32
        assert 0.000999 < layer.log_dt.exp().min() and layer.log_dt.exp().max() < 0.1001
        if kind == "s4":
            close(torch.view_as_complex(layer.P), P[half:], 1e-6)
            close(torch.view_as_complex(layer.B), B[half:], 1e-6)


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


def test_the_scan_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(mamba_adv.SelectiveScan, "SIZE", 3 * 2 * 2 * 3)
    inputs = [v.requires_grad_() for v in scan_inputs(2, 5, 2, 3)]
    assert torch.autograd.gradcheck(mamba_adv.selective_scan, inputs)


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


def test_the_controls_are_an_activation_a_glu_and_a_perceptron():
    y = randn(2, 3, 4)
    close(ads.middle(4)(y), y)
    for name, suffix, act in [("gelu", "", lambda v: 0.5 * v * (1 + torch.erf(v / 2 ** 0.5))),
                              ("relu", "-relu", lambda v: v.clamp(min=0))]:
        close(ads.middle(4, control=name)(y), act(y))
        glu, mlp = (scrambled(ads.middle(4, control=kind + suffix)) for kind in ("glu", "mlp"))
        (W, b), (V, c, U, d) = glu.parameters(), mlp.parameters()
        value, gate = (act(y) @ W.T + b).split(4, -1)
        close(glu(y), value * torch.sigmoid(gate))
        close(mlp(y), act(y @ V.T + c) @ U.T + d)


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
    assert counts == [0, n, n, n, n, 0, 0, n, n, n, n, n / 2, n / 2]


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


def test_weight_decay_is_for_the_weights_of_linear_and_conv_layers_alone(name):
    model = tiny(name, ads="relu")
    decayed, rest = MODELS[name].param_groups(model, 0.25)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    names = {w: key for key, w in model.named_parameters()}
    decayed, rest = ([names[w] for w in group["params"]] for group in (decayed, rest))
    assert sorted(decayed + rest) == sorted(names.values())             # each exactly once
    assert set(decayed) == {k for k in names.values() if k.endswith(".weight") and "norm" not in k}


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
def test_with_eps_0_an_attack_returns_the_image_exactly(script, attack, dtype):
    (x, y), net = images(), linear(3).to(dtype)
    assert torch.equal(run(script, attack, net, x.to(dtype), y, eps=0.0), x.to(dtype))


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


# ---- FreeAT and YOPO -----------------------------------------------------------------------------

def tiny_model(name):
    d_state = 8 if name == "s5" else 4
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
    assert len(calls) == 2 * 2 * 3                                      # epochs, batches, replays
    assert len(log(tmp_path / "free")) == 1 + 2
    assert torch.equal(calls[0][1], torch.zeros_like(calls[0][1]))
    for a, b in zip(calls, calls[1:]):
        assert torch.equal(b[1], a[2]) and not torch.equal(b[3], a[3])  # noise kept, weights moved
    for i in range(4):
        assert all(torch.equal(calls[3 * i][0], calls[3 * i + k][0]) for k in range(3))


def test_yopo_holds_minus_the_gradient_at_the_embedding(name, monkeypatch):
    model, x, y = tiny_model(name), torch.rand(2, 1, 4, 4).double(), torch.tensor([1, 2])
    seen, real = [], train.ascend

    def spy(model, loss, x, start, **rest):
        v = start.clone().requires_grad_()
        seen.append((start, torch.autograd.grad(loss(v), v)[0]))
        return real(model, loss, x, start=start, **rest)
    monkeypatch.setattr(train, "ascend", spy)
    train.yopo_backward(model, x, y, EPS, ALPHA, 1, 2)
    (start, ascent), h = seen[0], 1e-6
    d = randn(*x.shape)                                 # loss goes up by <grad, d>: p is minus that
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
    assert (points[0] - x).unique().numel() > 4                         # uniform, not a corner
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


# ---- Runs: every model by every method, and cut anywhere -----------------------------------------

TINY = ("--d-model 8 --d-state 4 --n-layers 1 --patch-size 14 --batch-size 16 --train-size 32 "
        "--test-size 20 --epochs 1").split()
PLACES = os.environ.get("SSM_ADV_DATA"), HERE.parent / "shared" / "data", HERE / "data"
DATA = next((Path(place) for place in PLACES if place and Path(place).is_dir()), None)


def needs(folder):
    return pytest.mark.skipif(DATA is None or not (DATA / folder).exists(),
                              reason=f"no {folder} in SSM_ADV_DATA, ../shared/data or ./data")


def settings(*words):
    """The settings of a command line, on the CPU."""
    p = train.Parser("")
    defaults = train.add_flags(p)
    c = train.settings(p.given([*words, "--device", "cpu"]), defaults)
    train.check(c)
    return c


def trains(out, *words):
    """train.main in this process, on the drawn digits unless told otherwise."""
    kind = [] if {"--dataset", "--resume"} & set(words) else ["--dataset", "synthetic"]
    return train.main([*kind, *words, "--out", str(out), "--device", "cpu"])


def log(out):
    """log.csv without its last column, the seconds, which no two runs share."""
    return [line.rsplit(",", 1)[0] for line in (Path(out) / "log.csv").read_text().splitlines()]


def weights(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)["model"]


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("ads_given", ([], ["--ads"]), ids=("without", "ads"))
def test_every_model_trains_two_steps_by_every_method_with_and_without_ads(
        name, method, ads_given, tmp_path):
    real = DATA is not None and (DATA / "MNIST").exists()
    data = ["--dataset", "mnist", "--data-dir", str(DATA)] if real else ["--dataset", "synthetic"]
    words = [*TINY, *data, "--model", name, "--method", method, *ads_given]
    fresh = train.build(settings(*words))
    assert trains(tmp_path / "run", *words) == 0
    after = weights(tmp_path / "run")
    trained = {k for k, w in fresh.state_dict().items() if not torch.equal(w, after[k])}
    assert trained == {k for k, _ in fresh.named_parameters()}


@pytest.mark.parametrize("method", ("pgd", "free", "yopo"))
def test_a_run_cut_after_any_batch_resumes_bit_for_bit(method, tmp_path, monkeypatch):
    words = [*TINY, "--method", method, "--epochs", "3", "--save-every", "0"]
    words += ["--replays", "1"] if method == "free" else []
    assert trains(tmp_path / "whole", *words) == 0
    real, todo = train.train_batch, [0]

    def dies(*args):
        todo[0] -= 1
        if todo[0] < 0:
            raise ZeroDivisionError
        return real(*args)
    monkeypatch.setattr(train, "train_batch", dies)
    for cuts in range(7):                                               # 3 epochs of 2 batches
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
