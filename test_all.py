# SPDX-License-Identifier: MIT
"""What the papers say, as tests. A name is a sentence; its body is the proof.

    python -m pytest -q test_all.py            # about half a minute on one core, no GPU, no data

Identities are checked in float64 at tiny sizes. `Spy` is a model that keeps what it is fed. The
section "parity" writes all five models once more, in numpy loops, from the formulas of the papers.
"""
import ast
import copy
import inspect
import os
import pickle
import re
import subprocess
import sys
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

HERE = Path(__file__).resolve().parent
SCRIPTS = (s4_adv, mamba_adv, attention_adv)
MODELS = {"s4": s4_adv, "dss": s4_adv, "s5": s4_adv, "mamba": mamba_adv, "attention": attention_adv}
MAPS = {"s4": s4_adv.S4, "dss": s4_adv.DSS, "s5": s4_adv.S5, "ema": attention_adv.EMA}
LENGTHS = (1, 2, 3, 7, 16, 33, 50, 64)
EPS, ALPHA, STEPS = 0.1, 0.03, 8                                            # ALPHA STEPS > 2 EPS

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
each_model = pytest.mark.parametrize("name", MODELS)
each_map = pytest.mark.parametrize("kind", MAPS)
each_attack = pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd_at_loss", "trades_loss"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, tolerance=1e-9):
    """Equal up to tolerance, relative to the largest number expected."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1.0))


def randn(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def scrambled(module):
    """In float64, with every weight moved, so that no weight is 0 or 1 by its initialisation."""
    with torch.no_grad():
        for w in (*module.double().parameters(), *module.buffers()):
            w.add_(0.3 * torch.randn_like(w))
    return module


def tiny(name, **options):
    """Classifier of 2-colour images in 3 classes: 2 layers, 6 channels, 4 states, patches 2 x 2."""
    options = {"d_model": 6, "d_state": 4, "n_layers": 2, "patch_size": 2, **options}
    if name == "attention":
        options = {"d_hidden": 8, "max_len": 10, **options}
    elif name != "mamba":
        options["ssm"] = name
    return scrambled(MODELS[name].Classifier(2, 3, **options))


def images(n=5, shape=(2, 4, 6), classes=3):
    """n images, the first black, the second white, and labels."""
    x = torch.rand(n, *shape, dtype=torch.float64)
    x[0], x[1:2] = 0, 1
    return x, torch.arange(n) % classes


class Spy(nn.Module):
    """net, and a record of its inputs, of who asked for a gradient, and of its mode at each call."""

    def __init__(self, net, fails_at=None):
        super().__init__()
        self.net, self.fails_at = net.double(), fails_at
        self.fed, self.asked, self.modes = [], [], []

    def forward(self, x):
        self.fed.append(x.detach().clone())
        self.asked.append(x.requires_grad)
        self.modes.append(self.training)
        if len(self.fed) == self.fails_at:
            raise ZeroDivisionError("the model fails")
        return self.net(x)


def linear(classes=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))


def curved():
    """A network that knows its mode: batch normalisation and dropout."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Tanh(),
                         nn.Dropout(0.5), nn.Linear(8, 3))


def smooth():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def run(script, attack, model, x, y, eps=EPS, alpha=ALPHA, steps=STEPS):
    rest = {"fgsm": (eps,), "trades_loss": (eps, alpha, steps, 6.0)}.get(attack, (eps, alpha, steps))
    return getattr(script, attack)(model, x, y, *rest)


# --------------------------------------------------------------------------------------------------
# The files: a script and ads.py are a whole program
# --------------------------------------------------------------------------------------------------

FILES = sorted(HERE.glob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@each_file
def test_every_file_carries_its_licence_and_fits_in_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# SPDX-License-Identifier: MIT"
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
    assert [i for i, line in enumerate(lines, 1) if re.search("@[A-Z]+@", line)] == []


@each_file
def test_a_file_imports_nothing_but_torch_numpy_and_the_standard_library(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {"ads"} if path.stem in MODELS or path.stem.endswith("_adv") else {f.stem for f in FILES}
    allowed = own | {"torch", "torchvision", "numpy", "pytest"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in names} <= allowed
    assert path.stem == "test_all" or "pytest" not in names


@each_script
def test_a_script_and_ads_alone_train_in_an_empty_folder_and_importing_is_silent(script, tmp_path):
    for name in ("ads", script.__name__):
        (tmp_path / f"{name}.py").write_bytes((HERE / f"{name}.py").read_bytes())
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


def shared_text(script):
    text = Path(script.__file__).read_text(encoding="utf-8")
    return re.search(r"\n# --- shared text.*\n# --- end of the shared text ---\n", text, re.S)[0]


def test_the_shared_text_of_the_three_scripts_is_equal_character_for_character():
    first, second, third = map(shared_text, SCRIPTS)
    assert first == second == third
    for name in ("fgsm", "pgd", "pgd_at_loss", "trades_loss", "accuracy", "frozen", "param_groups"):
        assert f"\ndef {name}(" in first


@pytest.mark.parametrize("name, scripts", [
    ("vandermonde", (s4_adv, attention_adv)), ("Classifier.embed", SCRIPTS),
    ("Classifier.logits", (s4_adv, mamba_adv)), ("Classifier.forward", SCRIPTS)])
def test_what_else_two_scripts_both_need_has_one_text(name, scripts):
    found = [eval(f"script.{name}", {"script": script}) for script in scripts]
    assert len({inspect.getsource(f) for f in found}) == 1


@each_script
def test_the_names_that_coursework_copies_keep_their_arguments(script):
    for name, arguments in [("fgsm", "model x y eps"), ("pgd", "model x y eps alpha steps"),
                            ("pgd_at_loss", "model x y eps alpha steps"),
                            ("trades_loss", "model x y eps alpha steps beta"),
                            ("accuracy", "model batches attack")]:
        assert list(inspect.signature(getattr(script, name)).parameters) == arguments.split()
    assert list(inspect.signature(script.Classifier).parameters)[:7] == [
        "in_channels", "n_classes", "d_model", "d_state", "n_layers", "patch_size", "ads"]


# --------------------------------------------------------------------------------------------------
# Fixed-parameter maps (S4, DSS, S5, Mega's EMA): one system, two forms
# --------------------------------------------------------------------------------------------------

@each_map
@pytest.mark.parametrize("L", LENGTHS)
def test_convolution_is_recurrence_in_value_and_gradient(kind, L):
    layer = scrambled(MAPS[kind](6, 4))
    u = randn(2, L, 6, requires_grad=True)
    before = u.detach().clone()
    fast, slow = layer(u), layer.recurrence(u)
    close(fast, slow)
    weights, g = [u, *layer.parameters()], torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad(y, weights, g) for y in (fast, slow))):
        close(a, b)
    assert torch.equal(u, before)


@each_map
@pytest.mark.parametrize("L", LENGTHS)
def test_the_kernel_is_the_impulse_response_of_the_recurrence(kind, L):
    layer, t = scrambled(MAPS[kind](6, 4)), L // 2 if kind == "ema" else 0
    u = torch.zeros(6, L, 6, dtype=torch.float64)
    u[range(6), t, range(6)] = 1                                            # image i: channel i
    response, K = layer.recurrence(u).permute(1, 2, 0), layer.kernel(L)     # (L, out, in)
    if kind == "ema":
        K = K[:, (torch.arange(L) - t) % (2 * L)]
    close(response, K if kind == "s5" else torch.diag_embed(K.T))


@pytest.mark.parametrize("kind", ["s4", "dss", "s5", "mamba"])
def test_no_output_of_a_state_space_model_depends_on_a_later_token(kind):
    layer = scrambled(mamba_adv.Mamba(6, 4) if kind == "mamba" else MAPS[kind](6, 4))
    u = randn(2, 11, 6)
    for t in range(11):
        v = u.clone()
        v[:, t] += randn(2, 6)
        change = (layer(v) - layer(u)).abs().amax((0, 2))
        assert change[:t].max() < 1e-12 if t else True
        assert change[t:].min() > 1e-6


def test_the_moving_average_of_mega_looks_both_ways():
    layer, u = scrambled(attention_adv.EMA(6, 4)), randn(2, 11, 6)
    v = u.clone()
    v[:, 5] += 1
    assert (layer(v) - layer(u)).abs().amin((0, 2)).min() > 1e-9


@pytest.mark.parametrize("trial", range(5))
def test_every_mode_decays_whatever_the_weights(trial):
    layers = {kind: MAPS[kind](6, 8).double() for kind in MAPS}
    with torch.no_grad():
        for w in (w for layer in layers.values() for w in layer.parameters()):
            w.add_(torch.randn_like(w))
        lam, P, _, _, dt = layers["s4"].matrices()
        lam, P = torch.cat([lam, lam.conj()]), torch.cat([P, P.conj()])
        A = dt[:, None, None] / 2 * (torch.diag(lam) - torch.outer(P, P.conj()))
        one = torch.eye(8)
        bars = [torch.linalg.eigvals(torch.linalg.solve(one - A, one + A)),
                layers["dss"].matrices(50)[0].exp(), layers["s5"].matrices()[0],
                layers["ema"].matrices()[0].exp()]
        mamba = mamba_adv.Mamba(6, 8)
        dt, A, _, _ = mamba.parameters_of(5 * torch.randn(2, 9, 12))
        for bar in (*bars, torch.exp(dt[..., None] * A)):
            assert bar.abs().max() < 1 and bar.abs().min() >= 0


@pytest.mark.parametrize("N", [2, 3, 8, 64])
def test_hippo_legs_is_normal_plus_low_rank(N):
    A = np.zeros((N, N))
    for n in range(N):
        for k in range(n):
            A[n, k] = -(2 * n + 1) ** 0.5 * (2 * k + 1) ** 0.5
        A[n, n] = -(n + 1)
    lam, P, B, V = (z.numpy() for z in s4_adv.hippo_legs(N))
    close(V @ V.conj().T, np.eye(N, dtype=complex), 1e-12)
    close(V @ (np.diag(lam) - np.outer(P, P.conj())) @ V.conj().T, A.astype(complex), 1e-12)
    close(V @ B, np.sqrt(2 * np.arange(N) + 1).astype(complex), 1e-12)
    close(lam, lam[::-1].conj().copy(), 1e-12)
    assert (np.diff(lam.imag) > 0).all()


def test_a_new_s4_is_the_bilinear_discretisation_of_hippo_legs():
    N, L = 8, 20
    layer = s4_adv.S4(3, N).double()
    n = np.arange(N)
    A = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1)
    p = np.sqrt(n + 0.5)
    W = np.linalg.eig(A + np.outer(p, p))[1]                                # in any order and phase
    W = W[:, np.argsort((W.conj().T @ A @ W).diagonal().imag)][:, N // 2:]
    phase = complex_of(layer.P) / (W.conj().T @ p)                          # the layer's choice
    assert np.allclose(abs(phase), 1, atol=1e-5)
    C = 2 * (complex_of(layer.C) @ (phase[:, None] * W.conj().T)).real      # in HiPPO's own basis
    for c, dt, D, K in zip(C, layer.log_dt.exp().tolist(), layer.D, layer.kernel(L)):
        K = K.detach() - D.detach() * torch.eye(L)[0]
        left = np.linalg.inv(np.eye(N) - dt / 2 * A)
        A_bar, b = left @ (np.eye(N) + dt / 2 * A), left @ np.sqrt(2 * n + 1) * dt
        c = c @ np.linalg.inv(np.eye(N) - np.linalg.matrix_power(A_bar, L))
        close(K, np.array([c @ np.linalg.matrix_power(A_bar, l) @ b for l in range(L)]), 1e-5)


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


def test_the_worst_perturbation_of_a_fixed_map_is_eps_times_the_l1_norm_of_its_kernel():
    layer, L = scrambled(s4_adv.DSS(6, 4)), 20
    K = layer.kernel(L)                                                     # (H, L)
    worst = EPS * K.sign().flip(1).T
    for u in (randn(1, L, 6), 100 * randn(1, L, 6)):                        # whatever the input is
        close((layer(u + worst) - layer(u))[0, -1], EPS * K.abs().sum(1))


@pytest.mark.parametrize("kind", ["s4", "dss", "s5"])
@pytest.mark.parametrize("ads, control", [(None, None), ("relu", None), ("sigmoid", None),
                                          ("tanh", None), (None, "gelu"), (None, "glu"),
                                          (None, "mlp")])
def test_a_block_is_affine_exactly_when_nothing_stands_in_its_middle(kind, ads, control):
    block = scrambled(s4_adv.Block(6, 4, ads, control, ssm=kind))
    u, v, zero = randn(2, 9, 6), randn(2, 9, 6), torch.zeros(2, 9, 6).double()
    error = block(2 * u - 3 * v) - (2 * block(u) - 3 * block(v) + 2 * block(zero))
    assert error.abs().max() < 1e-12 if ads is control is None else error.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["S4", "DSS"])
def test_conjugate_pairs_need_an_even_number_of_states(kind):
    with pytest.raises(ValueError, match="d_state 5 is odd"):
        getattr(s4_adv, kind)(6, 5)
    with pytest.raises(ValueError, match="ssm 's6' is unknown; choose one of s4, dss, s5"):
        s4_adv.Classifier(2, 3, ssm="s6")


# --------------------------------------------------------------------------------------------------
# The data-dependent map: Mamba
# --------------------------------------------------------------------------------------------------

def scan_inputs(b, L, d, N):
    """u, dt, A, B, C, D of a selective scan."""
    u, dt, A, D = randn(b, L, d), F.softplus(randn(b, L, d)), -torch.exp(randn(d, N)), randn(d)
    return u, dt, A, randn(b, L, N), randn(b, L, N), D


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_the_chunked_scan_is_the_loop_in_value_and_gradient(L, steps, monkeypatch):
    monkeypatch.setattr(mamba_adv.SelectiveScan, "SIZE", steps * 2 * 3 * 4)     # steps of one chunk
    inputs = scan_inputs(2, L, 3, 4)
    g = randn(2, L, 3)
    for wanted in (range(6), [0], [1, 3], [2, 4], [5]):                     # [0] alone: an attack
        some = [inputs[i].requires_grad_(i in wanted) for i in range(6)]
        some = [v for v in some if v.requires_grad]
        fast, slow = (f(*inputs) for f in (mamba_adv.selective_scan, mamba_adv.selective_scan_loop))
        close(fast, slow)
        for a, b in zip(*(torch.autograd.grad(y, some, g) for y in (fast, slow))):
            close(a, b)


def test_the_gradient_of_the_scan_is_right_by_finite_differences(monkeypatch):
    monkeypatch.setattr(mamba_adv.SelectiveScan, "SIZE", 3 * 2 * 2 * 3)
    inputs = [v.requires_grad_() for v in scan_inputs(2, 5, 2, 3)]
    assert torch.autograd.gradcheck(mamba_adv.selective_scan, inputs)


def test_a_second_derivative_of_the_scan_is_right_or_refused():
    def second(scan):
        u, *rest = (v.clone().requires_grad_() for v in inputs)
        first, = torch.autograd.grad(scan(u, *rest).pow(2).sum(), u, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), u)[0]
    inputs = scan_inputs(2, 5, 2, 3)
    expected = second(mamba_adv.selective_scan_loop)
    try:
        close(second(mamba_adv.selective_scan), expected)
    except RuntimeError as refused:
        assert "autograd" in str(refused) or "differentia" in str(refused)


def test_with_constant_dt_B_and_C_mamba_is_a_linear_time_invariant_system():
    u, dt, A, B, C, D = scan_inputs(2, 12, 3, 4)
    dt, B, C = (v[:1, :1].expand_as(v) for v in (dt, B, C))
    l = torch.arange(12)[:, None, None]
    K = (C[0, 0] * torch.exp(dt[0, 0, :, None] * A * l) * dt[0, 0, :, None] * B[0, 0]).sum(-1)
    y = mamba_adv.selective_scan(u, dt, A, B, C, D)
    for t in range(12):
        close(y[:, t], D * u[:, t] + sum(K[s] * u[:, t - s] for s in range(t + 1)))


def test_a_new_mamba_steps_between_a_thousandth_and_a_tenth():
    for block in mamba_adv.Classifier(3, 10).blocks:
        dt = F.softplus(block.step.bias)
        assert 1e-3 * (1 - 1e-4) <= dt.min() < 2e-3 and 0.08 < dt.max() <= 0.1 * (1 + 1e-4)
        close(-torch.exp(block.log_minus_A), -torch.arange(1.0, 17.0).expand(256, 16), 1e-6)


# --------------------------------------------------------------------------------------------------
# Attention: Mega
# --------------------------------------------------------------------------------------------------

def test_the_rows_of_megas_attention_are_probabilities():
    mega = scrambled(attention_adv.Mega(6, 4, d_hidden=8, d_attn=5, max_len=9))
    weights = mega.attention(randn(2, 7, 5))
    close(weights.sum(-1), torch.ones(2, 7, dtype=torch.float64), 1e-12)
    assert weights.min() > 0 and weights.var(-1).min() > 1e-6


@pytest.mark.parametrize("L", [1, 2, 7, 9])
def test_the_relative_bias_depends_on_the_distance_only(L):
    mega = scrambled(attention_adv.Mega(6, 4, d_hidden=8, max_len=9))
    bias = mega.relative_bias(L)
    assert bias.shape == (L, L)
    for i in range(L):
        for j in range(L):
            assert bias[i, j] == mega.bias[8 + j - i]                       # [8] is distance 0


def test_more_tokens_than_mega_was_built_for_are_refused_in_words():
    model = tiny("attention", max_len=5)
    with pytest.raises(ValueError, match="6 tokens are more than max_len 5; .*max_len=6"):
        model(images()[0])


# --------------------------------------------------------------------------------------------------
# Adaptive Scaling, and the controls that stand in its place
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation, act", [
    ("relu", lambda v: np.maximum(v, 0)), ("sigmoid", lambda v: 1 / (1 + np.exp(-v))),
    ("tanh", np.tanh)])
def test_ads_is_s_of_y_times_y_plus_t_of_y(activation, act):
    layer, y = scrambled(ads.AdaptiveScaling(4, activation)), randn(2, 3, 4)
    W1, b1, W2, b2 = (layer.state_dict()[k].numpy() for k in (
        "scale.weight", "scale.bias", "shift.weight", "shift.bias"))
    for token, expected in zip(y.view(-1, 4).numpy(), layer(y).view(-1, 4)):
        close(expected, act(W1 @ token + b1) * token + act(W2 @ token + b2), 1e-12)


def test_ads_the_glu_and_the_mlp_have_2_d_squared_plus_d_parameters_and_gelu_has_none():
    for d in (1, 5, 128):
        for options in ({"ads": "relu"}, {"control": "glu"}, {"control": "mlp"}):
            assert sum(w.numel() for w in ads.middle(d, **options).parameters()) == 2 * (d * d + d)
    assert not list(ads.middle(5, control="gelu").parameters()) + list(ads.middle(5).parameters())
    assert inspect.signature(ads.AdaptiveScaling).parameters["activation"].default == "relu"


def test_the_controls_are_gelu_glu_and_a_perceptron():
    y = randn(2, 3, 4)
    gelu = 0.5 * y * (1 + torch.erf(y / 2 ** 0.5))
    close(ads.middle(4)(y), y)
    close(ads.middle(4, control="gelu")(y), gelu)
    glu, mlp = (scrambled(ads.middle(4, control=control)) for control in ("glu", "mlp"))
    W, b = (w for w in glu.parameters())
    close(glu(y), (gelu @ W.T + b)[..., :4] * torch.sigmoid((gelu @ W.T + b)[..., 4:]))
    W, b, V, c = (w for w in mlp.parameters())
    z = y @ W.T + b
    close(mlp(y), 0.5 * z * (1 + torch.erf(z / 2 ** 0.5)) @ V.T + c)


@pytest.mark.parametrize("options, message", [
    ({"ads": "swish"}, "AdS activation 'swish' is unknown; choose one of relu, sigmoid, tanh"),
    ({"control": "rnn"}, "control 'rnn' is unknown; choose one of gelu, glu, mlp"),
    ({"ads": "relu", "control": "mlp"}, "ads='relu' and control='mlp' name two things for one")])
@each_model
def test_a_wrong_middle_is_refused_in_words(name, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **options)


# --------------------------------------------------------------------------------------------------
# Parity: all five models once more, in numpy, as the papers write them
# --------------------------------------------------------------------------------------------------

def complex_of(pairs):
    pairs = pairs.detach().numpy() if isinstance(pairs, torch.Tensor) else pairs
    return pairs[..., 0] + 1j * pairs[..., 1]


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def silu(v):
    return v * sigmoid(v)


def toeplitz(K):
    return np.array([[K[t - s] if s <= t else 0.0 for s in range(len(K))] for t in range(len(K))])


def part(w, prefix):
    return {key[len(prefix) + 1:]: v for key, v in w.items() if key.startswith(prefix + ".")}


def affine(w, key, z):
    return z @ w[key + ".weight"].T + w.get(key + ".bias", 0.0)


def layer_norm(w, key, z):
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    return z * w[key + ".weight"] + w[key + ".bias"]


def middle_ref(w, y):
    if "middle.scale.weight" not in w:
        return y
    return np.tanh(affine(w, "middle.scale", y)) * y + np.tanh(affine(w, "middle.shift", y))


def s4_ref(w, u):
    """u (L, H): K_l = C~ (1 - A'^L)^-1 A'^l B', with the dense A = diag(lam) - P P*."""
    lam = -np.exp(w["log_minus_real"]) + 1j * w["imag"]
    lam, P, B, C = (np.concatenate([v, v.conj()], -1) for v in (
        lam, complex_of(w["P"]), complex_of(w["B"]), complex_of(w["C"])))
    A, one, y = np.diag(lam) - np.outer(P, P.conj()), np.eye(len(lam)), np.zeros_like(u)
    for h, dt in enumerate(np.exp(w["log_dt"])):
        left = np.linalg.inv(one - dt / 2 * A)
        A_bar, B_bar = left @ (one + dt / 2 * A), left @ (dt * B)
        powers = [np.linalg.matrix_power(A_bar, l) for l in range(len(u) + 1)]
        C_bar = C[h] @ np.linalg.inv(one - powers[-1])
        y[:, h] = toeplitz([(C_bar @ p @ B_bar).real for p in powers[:-1]]) @ u[:, h]
    return y + w["D"] * u


def dss_ref(w, u):
    """K_l = Re sum_n C_n / lam_n softmax_l(lam_n dt l)."""
    lam, C, y = -np.exp(w["log_minus_real"]) + 1j * w["imag"], complex_of(w["C"]), np.zeros_like(u)
    for h, dt in enumerate(np.exp(w["log_dt"])):
        e = np.exp(np.outer(lam * dt, np.arange(len(u))))
        K = (C[h] / lam) @ (e / e.sum(1, keepdims=True))
        y[:, h] = toeplitz(K.real) @ u[:, h]
    return y + w["D"] * u


def s5_ref(w, u):
    """Zero-order hold: exp of [[dt A, dt B], [0, 0]] is [[A', B'], [0, 1]]."""
    B, C, dt = complex_of(w["B"]), complex_of(w["C"]), np.exp(w["log_dt"])
    P, H = B.shape
    M = np.zeros((P + H, P + H), complex)
    M[:P, :P] = np.diag(dt * (-np.exp(w["log_minus_real"]) + 1j * w["imag"]))
    M[:P, P:] = dt[:, None] * B
    M = torch.linalg.matrix_exp(torch.from_numpy(M)).numpy()
    x, ys = np.zeros(P, complex), []
    for u_t in u:
        x = M[:P, :P] @ x + M[:P, P:] @ u_t
        ys.append((C @ x).real + w["D"] * u_t)
    return np.array(ys)


def mamba_ref(w, z):
    """Alg. 2 of Mamba inside its block, one token and one channel at a time."""
    (L, _), d = z.shape, len(w["D"])
    u, gate = np.split(z @ w["into.weight"].T, 2, -1)
    past = np.concatenate([np.zeros((3, d)), u])
    u = silu(np.array([[w["conv.weight"][c, 0] @ past[t:t + 4, c] for c in range(d)]
                       for t in range(L)]) + w["conv.bias"])
    (_, rank), A = w["step.weight"].shape, -np.exp(w["log_minus_A"])
    low, B, C = np.split(u @ w["select.weight"].T, [rank, rank + A.shape[1]], -1)
    dt, y = np.log1p(np.exp(affine(w, "step", low))), np.zeros((L, d))
    for c in range(d):
        h = np.zeros(A.shape[1])
        for t in range(L):
            h = np.exp(dt[t, c] * A[c]) * h + dt[t, c] * B[t] * u[t, c]
            y[t, c] = C[t] @ h + w["D"][c] * u[t, c]
    return affine(w, "out", middle_ref(w, y * silu(gate)))


def mega_ref(w, u):
    """Eq. (4)-(16) of Mega: the moving average as a double sum, softmax attention, two gates."""
    (L, H), m = u.shape, part(w, "ema")
    N, Z = m["delta"].shape[1], w["gamma"].shape[1]
    p, q = sigmoid(m["delta"]), 1 - sigmoid(m["delta"]) * sigmoid(m["alpha"])
    c, ema = p * m["beta"] * m["gamma"] / N ** 0.5, m["omega"] * u
    for t in range(L):
        for s in range(L):
            if s <= t:
                ema[t] += (c[:H] * q[:H] ** (t - s)).sum(1) * u[s]
            if s >= t:
                ema[t] += (c[H:] * q[H:] ** (s - t)).sum(1) * u[s]
    update, z, reset, here = np.split(affine(w, "gates", silu(ema)), np.cumsum(
        [H, Z, len(w["values.bias"])]), -1)
    query, key = (silu(z) * w["gamma"][i] + w["beta"][i] for i in (0, 1))
    middle = len(w["bias"]) // 2
    scores = query @ key.T / Z ** 0.5 + np.array(
        [[w["bias"][middle + j - i] for j in range(L)] for i in range(L)])
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    mixed = weights @ silu(affine(w, "values", u))
    new = silu(here + affine(w, "out", middle_ref(w, mixed * silu(reset))))
    return sigmoid(update) * new + (1 - sigmoid(update)) * u


def classifier_ref(name, w, image):
    """One image (C, h, w) -> logits; w is the model's state_dict."""
    P, maps = w["patches.weight"].shape[-1], {"s4": s4_ref, "dss": dss_ref, "s5": s5_ref}
    z = np.array([(w["patches.weight"] * image[:, i:i + P, j:j + P]).sum((1, 2, 3))
                  for i in range(0, image.shape[1], P) for j in range(0, image.shape[2], P)])
    z = z + w["patches.bias"]
    if name != "attention":
        z = layer_norm(w, "norm", z)
    for i in range(2):
        b = part(w, f"blocks.{i}")
        if name == "attention":
            z = layer_norm(b, "norms.0", mega_ref(part(b, "mega"), z))
            z = layer_norm(b, "norms.1", z + affine(b, "feed.2", silu(affine(b, "feed.0", z))))
        elif name == "mamba":
            z = layer_norm(w, f"norms.{i}", z + mamba_ref(b, z))
        else:
            y = maps[name](part(b, "ssm"), z)
            z = layer_norm(w, f"norms.{i}", z + affine(b, "out", middle_ref(b, y)))
    return affine(w, "head", z.mean(0))


@each_model
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_parity_with_an_independent_float64_reference(name, activation):
    model, (x, _) = tiny(name, ads=activation), images(3)
    w = {key: v.numpy() for key, v in model.state_dict().items()}
    close(model(x), np.array([classifier_ref(name, w, image) for image in x.numpy()]))


# --------------------------------------------------------------------------------------------------
# The classifier around a map
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options, expected", [
    ("s4", {}, 103_562), ("s4", {"ads": "relu"}, 235_658), ("dss", {"ssm": "dss"}, 103_178),
    ("s5", {"ssm": "s5", "d_state": 128}, 201_226), ("mamba", {}, 469_002),
    ("attention", {}, 903_686)])
def test_at_cifar10_size_a_model_has_as_many_parameters_as_the_authors(name, options, expected):
    weights = MODELS[name].Classifier(3, 10, **options).parameters()
    once = name == "s5"                                             # there complex numbers count once
    assert sum(w.numel() // (2 if once and w.shape[-1] == 2 else 1) for w in weights) == expected


@each_model
def test_token_i_j_is_the_rgb_of_pixel_i_j(name):
    model = tiny(name, d_model=2, patch_size=1)
    model.patches.weight.data.copy_(torch.eye(2)[..., None, None])
    model.patches.bias.data.zero_()
    x, _ = images()
    z = model.embed(x)
    for i in range(4):
        for j in range(6):
            assert torch.equal(z[:, 6 * i + j], x[:, :, i, j])


@each_model
def test_a_patch_of_two_by_two_is_one_token_and_tokens_run_row_by_row(name):
    model = tiny(name, d_model=8)
    model.patches.weight.data.copy_(torch.eye(8).view(8, 2, 2, 2))
    model.patches.bias.data.zero_()
    x, _ = images()
    z = model.embed(x)
    for i in range(2):
        for j in range(3):
            patch = x[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2]
            assert torch.equal(z[:, 3 * i + j], patch.flatten(1))


@each_model
def test_forward_is_logits_of_embed_and_embed_is_affine(name):
    model, (x, _) = tiny(name), images()
    assert torch.equal(model(x), model.logits(model.embed(x)))
    a, b, zero = x, x.flip(0), torch.zeros_like(x)
    close(model.embed(2 * a - 3 * b), 2 * model.embed(a) - 3 * model.embed(b) + 2 * model.embed(zero))


@each_model
def test_an_image_that_the_patches_do_not_fill_is_refused_in_words(name):
    for patch, shape in ((4, (4, 6)), (3, (4, 6))):                         # width, then height
        with pytest.raises(ValueError, match=f"patch size {patch} does not divide an image of 4 x 6"):
            tiny(name, patch_size=patch)(torch.rand(1, 2, *shape).double())


@each_model
@pytest.mark.parametrize("options", [{}, *({"ads": a} for a in ads.ACTIVATIONS),
                                     *({"control": c} for c in ads.CONTROLS)], ids=str)
def test_adversarial_training_reaches_every_weight_on_non_square_images(name, options):
    model, (x, y) = tiny(name, **options), images()
    assert model(x).shape == (5, 3)
    MODELS[name].pgd_at_loss(model, x, y, EPS, ALPHA, 2).backward()
    for key, w in model.named_parameters():
        assert w.dtype == torch.float64, f"{key} is complex"
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-9, key


@each_model
@pytest.mark.parametrize("options", [{}, {"ads": "tanh"}, {"control": "mlp"}], ids=str)
def test_gradients_of_image_and_weights_agree_with_finite_differences(name, options):
    model, (x, y) = tiny(name, **options), images()
    script, h = MODELS[name], 1e-5
    for moved in ([x], list(model.parameters())):                           # an attack, training
        ways = [torch.randn_like(v) for v in moved]

        def loss(step):
            with torch.no_grad():
                for v, way in zip(moved, ways):
                    v.add_(step * way)
            return F.cross_entropy(model(x), y)
        slope = (loss(h) - loss(-2 * h)).item() / (2 * h)
        x.requires_grad_()
        with script.frozen(model) if moved[0] is x else torch.enable_grad():
            grads = torch.autograd.grad(loss(h), moved)
        x.requires_grad_(False)
        inner = sum((g * way).sum() for g, way in zip(grads, ways)).item()
        assert abs(slope - inner) < 1e-6 * max(abs(inner), 1e-2) and abs(inner) > 1e-4


@each_model
def test_no_tensor_is_made_on_another_device_than_the_images(name):
    model, (x, _) = tiny(name, ads="relu").to("meta"), images()
    assert model(x.to("meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_model
def test_a_gpu_returns_the_numbers_of_the_cpu(name):
    model, (x, y) = tiny(name, ads="tanh"), images()
    results = []
    for device in ("cpu", "cuda"):
        z = x.to(device).requires_grad_()
        loss = F.cross_entropy(model.to(device)(z), y.to(device))
        results.append([v.cpu() for v in torch.autograd.grad(loss, [z, *model.parameters()])])
    for a, b in zip(*results):
        close(a, b)


@each_model
def test_weight_decay_is_for_the_weights_of_linear_and_conv_layers_only(name):
    model = tiny(name, ads="relu")
    decayed, rest = MODELS[name].param_groups(model, 0.25)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    names = {w: key for key, w in model.named_parameters()}
    found = [names[w] for w in (*decayed["params"], *rest["params"])]
    assert sorted(found) == sorted(names.values())                          # each exactly once
    assert {names[w] for w in decayed["params"]} == {
        key for key in found if key.endswith(".weight") and "norm" not in key}
    assert any("middle.scale.weight" in names[w] for w in decayed["params"])


# --------------------------------------------------------------------------------------------------
# Attacks
# --------------------------------------------------------------------------------------------------

@each_script
@each_attack
def test_every_point_that_an_attack_touches_lies_in_ball_and_box(script, attack):
    for shape, eps in ((2, 4, 6), EPS), ((2, 4, 6), 0.7):
        (x, y), spy = images(6, shape), Spy(linear(3))
        result = run(script, attack, spy, x, y, eps, eps / 3)
        for z in (*spy.fed, *([result] if result.shape == x.shape else [])):
            assert (z - x).abs().max() <= eps + 1e-6
            assert z.min() >= 0 and z.max() <= 1


@each_script
def test_pgd_starts_once_and_uniformly_in_the_ball(script):
    x = torch.full((40, 2, 4, 6), 0.5, dtype=torch.float64)
    spy = Spy(linear())
    script.pgd(spy, x, torch.zeros(40).long(), EPS, 1e-9, 3)                # steps too small to see
    for z in spy.fed:
        noise = (z - x) / EPS
        assert 0.99 < noise.max() <= 1.0001 and -1.0001 <= noise.min() < -0.99
        assert (torch.histc(noise, 10, -1, 1) / noise.numel() - 0.1).abs().max() < 0.03
    assert (spy.fed[0] - spy.fed[-1]).abs().max() < 1e-8
    assert (spy.fed[0][0] - spy.fed[0][1]).abs().max() > 0.1                # not one for all images


@each_script
def test_pgd_reaches_the_closed_form_optimum_of_a_linear_model(script):
    (x, y), net = images(6, classes=2), linear().double()
    w = net[1].weight[1 - y] - net[1].weight[y]                             # of the margin lost
    best = (x + EPS * w.sign().view_as(x)).clamp(0, 1)
    close(script.pgd(net, x, y, EPS, ALPHA, STEPS), best, 1e-12)
    inside = 0.2 + 0.6 * x                                                  # the box does not bind
    for attack in ("pgd", "fgsm"):
        moved = run(script, attack, net, inside, y) - inside
        close((w * moved.flatten(1)).sum(1), EPS * w.abs().sum(1), 1e-12)


@each_script
def test_black_pixels_move_wherever_the_loss_rises_with_them(script):
    net, x, y = linear().double(), torch.zeros(2, 2, 4, 6, dtype=torch.float64), torch.arange(2)
    rises = (net[1].weight[1 - y] > net[1].weight[y]).view_as(x)
    for attack in ("pgd", "fgsm"):
        close(run(script, attack, net, x, y), EPS * rises.double(), 1e-12)


@each_script
def test_fgsm_is_one_signed_step_from_the_image_itself(script):
    (x, y), net = images(), smooth()
    z = x.clone().requires_grad_()
    F.cross_entropy(net(z), y).backward()
    spy = Spy(net)
    assert torch.equal(script.fgsm(spy, x, y, EPS), (x + EPS * z.grad.sign()).clamp(0, 1))
    assert len(spy.fed) == 1 and torch.equal(spy.fed[0], x)


@each_script
def test_with_eps_0_an_attack_returns_the_image_exactly(script):
    for dtype in (torch.float32, torch.float64):
        x, y = images()
        x, net = x.to(dtype), linear(3).to(dtype)
        for attack in ("fgsm", "pgd"):
            result = run(script, attack, net, x, y, eps=0.0)
            assert torch.equal(result, x) and result.dtype == dtype


@each_script
@each_attack
def test_an_attack_takes_one_gradient_per_step_in_eval_mode(script, attack):
    (x, y), spy = images(), Spy(curved()).train()
    run(script, attack, spy, x, y, steps=4)
    before, n, after = {"fgsm": (0, 1, 0), "pgd": (0, 4, 0), "pgd_at_loss": (0, 4, 1),
                        "trades_loss": (1, 4, 2)}[attack]                   # p(x), steps, training
    assert spy.asked == [False] * before + [True] * n + [False] * after
    assert spy.modes == [False] * (before + n) + [True] * after


@each_script
@each_attack
@pytest.mark.parametrize("fails_at", [None, 1, 2])
def test_an_attack_leaves_model_and_image_as_they_were_even_if_the_model_raises(
        script, attack, fails_at):
    (x, y), spy = images(), Spy(curved(), fails_at).train()
    spy.net[2].eval()                                                       # a mode of its own
    spy.net[1].bias.requires_grad_(False)
    spy.net[1].weight.grad = torch.ones_like(spy.net[1].weight)
    x.requires_grad_()

    def state():
        return ([m.training for m in spy.modules()], [w.requires_grad for w in spy.parameters()],
                {k: v.tolist() for k, v in spy.state_dict().items()}, x.tolist(), x.grad,
                [None if w.grad is None else w.grad.tolist() for w in spy.parameters()])
    before = state()
    try:
        run(script, attack, spy, x, y)
        assert fails_at is None or attack == "fgsm"
    except ZeroDivisionError:
        assert fails_at is not None
    assert state() == before


@each_script
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_works_under_no_grad_and_its_result_is_detached(script, attack):
    (x, y), net = images(), smooth()
    torch.manual_seed(1)
    expected = run(script, attack, net, x, y)
    torch.manual_seed(1)
    with torch.no_grad():
        result = run(script, attack, net, x, y)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and torch.equal(result, expected)
    assert not expected.requires_grad and expected.grad_fn is None and not result.requires_grad
    assert (result - x).abs().max() > EPS / 2


@each_script
@each_attack
def test_a_gradient_that_is_not_finite_is_an_error_not_robustness(script, attack):
    class Broken(nn.Module):
        def forward(self, x):
            z = x.flatten(1)[:, :3]
            return z + 0 * (z[:, :1] - z[:, :1].detach()).abs().sqrt() * (x.mean((1, 2, 3)) == 1)[:, None]
    x, y = images()                                                         # image 1 is white
    x[1] -= 0.0
    with pytest.raises(FloatingPointError, match="gradient that is not finite"):
        run(script, attack, Broken(), x, y, eps=0.0)
    run(script, attack, Broken(), x[2:], y[2:], eps=0.0)


@each_script
@each_attack
def test_the_same_seed_gives_the_same_attack(script, attack):
    (x, y), net, results = images(), smooth(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        spy = Spy(net)
        run(script, attack, spy, x, y, steps=1)
        results.append(torch.stack(spy.fed))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (attack == "fgsm")


@each_script
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_attacking_an_image_alone_is_attacking_it_in_a_batch(script, attack, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.7))
    (x, y), net = images(), curved().double().train()
    batch = run(script, attack, net, x, y)
    for i in range(len(x)):
        close(run(script, attack, net, x[i:i + 1], y[i:i + 1]), batch[i:i + 1], 1e-12)


# --------------------------------------------------------------------------------------------------
# Adversarial training: PGD-AT and TRADES
# --------------------------------------------------------------------------------------------------

@each_script
def test_pgd_at_is_the_cross_entropy_at_the_attacked_images(script):
    (x, y), net = images(), smooth()
    torch.manual_seed(1)
    loss = script.pgd_at_loss(net, x, y, EPS, ALPHA, STEPS)
    torch.manual_seed(1)
    log_p = net(script.pgd(net, x, y, EPS, ALPHA, STEPS)).log_softmax(1)
    expected = -sum(log_p[i, y[i]] for i in range(5)) / 5
    close(loss, expected, 1e-12)
    weights = list(net.parameters())
    for a, b in zip(*(torch.autograd.grad(v, weights) for v in (loss, expected))):
        close(a, b, 1e-12)


def trades_by_hand(net, x, y, eps, alpha, steps, beta, reverse=False, constant=False):
    """Zhang et al. 2019, Eq. (5) and Alg. 1, with KL(p || q) = sum_k p_k log(p_k / q_k)."""
    z = x + 1e-3 * torch.randn_like(x)
    for k in range(steps + 1):
        z = torch.maximum(torch.minimum(z, x + eps), x - eps).clamp(0, 1).detach().requires_grad_()
        p, q = net(x).softmax(1), net(z).softmax(1)
        p, q = (q, p) if reverse else (p.detach(), q) if constant else (p, q)
        divergence = (p * (p / q).log()).sum()
        if k < steps:
            z = z + alpha * torch.autograd.grad(divergence, z)[0].sign()
    return -net(x).log_softmax(1)[range(len(y)), y].mean() + beta * divergence / len(y)


@each_script
def test_trades_is_clean_cross_entropy_plus_beta_kl_of_clean_from_attacked(script):
    (x, y), net = images(), smooth()
    weights, results = list(net.parameters()), []
    for loss in (script.trades_loss, trades_by_hand,
                 lambda *args: trades_by_hand(*args, reverse=True),
                 lambda *args: trades_by_hand(*args, constant=True)):
        torch.manual_seed(1)
        value = loss(net, x, y, EPS, ALPHA, STEPS, 6.0)
        results.append([value.detach(), *torch.autograd.grad(value, weights)])
    for ours, expected in zip(*results[:2]):
        close(ours, expected, 1e-12)
    assert abs(results[0][0] - results[2][0]) > 1e-6                        # the other KL differs,
    assert (results[0][1] - results[3][1]).abs().max() > 1e-3               # and so a constant p(x)


@each_script
def test_trades_with_beta_0_is_standard_training(script):
    (x, y), net = images(), smooth()
    weights, losses = list(net.parameters()), []
    for loss in (script.trades_loss(net, x, y, EPS, ALPHA, 3, 0.0), F.cross_entropy(net(x), y)):
        losses.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    assert all(torch.equal(a, b) for a, b in zip(*losses))


# --------------------------------------------------------------------------------------------------
# Accuracy
# --------------------------------------------------------------------------------------------------

class Threshold(nn.Module):
    """Class 1 if the one pixel is above 1/2, else class 0."""

    def forward(self, x):
        assert not self.training
        return torch.cat([0.5 - x, x - 0.5], 1).flatten(1)


@each_script
def test_accuracy_counts_images_and_attacks_only_those_still_right(script):
    x, y = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, 0.4]).view(6, 1, 1, 1), torch.tensor([0, 0, 1, 1, 0, 1])
    batches = [(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])]            # right: 0.1 0.2 0.9
    model, seen = Threshold(), []

    def attack(model, x, y):
        seen.append((x.flatten().tolist(), y.tolist()))
        return x + 0.35                                                     # 0.2 crosses 1/2
    assert script.accuracy(model, batches) == 3 / 6
    assert script.accuracy(model, iter(batches), attack) == 2 / 6
    assert seen == [(x[[0, 1, 3]].flatten().tolist(), [0, 0, 1])]           # and no empty batch
    assert model.training


@each_script
def test_an_attack_of_eps_0_gives_the_clean_accuracy(script):
    (x, y), net = images(40), smooth()
    batches = list(zip(x.split(16), y.split(16)))
    clean = script.accuracy(net, batches)
    assert 0 < clean < 1
    for eps, check in ((0.0, lambda a: a == clean), (1.0, lambda a: a < clean)):
        assert check(script.accuracy(net, batches, lambda *args: script.pgd(*args, eps, eps / 4, 10)))


@each_script
def test_accuracy_of_nothing_or_of_a_broken_model_is_an_error(script):
    with pytest.raises(ValueError, match="accuracy of no images"):
        script.accuracy(linear(), [])
    x, y = images()
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="logit that is not finite"):
        script.accuracy(linear(3).double(), [(x, y)])


# --------------------------------------------------------------------------------------------------
# Frozen: within an attack a kernel is computed once, and never used when it is stale
# --------------------------------------------------------------------------------------------------

KERNELS = {"s4": (s4_adv.S4, "kernel"), "dss": (s4_adv.DSS, "kernel"),
           "s5": (s4_adv.S5, "matrices"), "attention": (attention_adv.EMA, "kernel")}
each_kernel = pytest.mark.parametrize("name", KERNELS)


@each_kernel
def test_an_attack_computes_each_kernel_once_and_training_each_time(name, monkeypatch):
    owner, method = KERNELS[name]
    original, calls = getattr(owner, method), []

    def counted(self, *args):
        calls.append(args)
        return original(self, *args)
    monkeypatch.setattr(owner, method, counted)
    script, model, (x, y) = MODELS[name], tiny(name), images()              # two layers
    attack = lambda *args: script.pgd(*args, EPS, ALPHA, 5)
    for job, expected in [(lambda: model(x), 2), (lambda: attack(model, x, y), 2),
                          (lambda: script.pgd_at_loss(model, x, y, EPS, ALPHA, 5), 2 + 2),
                          (lambda: script.trades_loss(model, x, y, EPS, ALPHA, 5, 6.0), 2 + 4),
                          (lambda: script.accuracy(model, [(x, y)] * 3, attack), 2),
                          (lambda: (model(x), model(x)), 4)]:
        calls.clear()
        job()
        assert len(calls) == expected


@each_model
def test_a_frozen_model_returns_the_same_numbers_and_wants_no_gradient(name):
    model, (x, _) = tiny(name, ads="relu"), images()
    expected = model(x).detach()
    with MODELS[name].frozen(model):
        for _ in range(2):
            assert torch.equal(model(x), expected) and not model(x).requires_grad
            close(model(x[..., :4]), copy.deepcopy(model)(x[..., :4]))      # another length
    assert torch.equal(model(x), expected) and model(x).requires_grad


@each_model
def test_a_changed_weight_makes_a_new_kernel_at_once(name):
    model, other, (x, _) = tiny(name), tiny(name), images()
    script, fresh = MODELS[name], tiny(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        for w in model.parameters():
            w.grad = torch.ones_like(w)
        optimizer.step()

    def shift():
        with torch.no_grad():
            for w in model.parameters():
                w.mul_(1.1)
    with script.frozen(model):
        last = model(x)
        for change in (step, shift, lambda: model.load_state_dict(other.state_dict())):
            change()
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(model(x), fresh(x))
            assert (model(x) - last).abs().max() > 1e-6
            last = model(x)


@each_kernel
def test_frozen_may_be_nested_and_left_by_an_exception_and_leaves_nothing_behind(name):
    script, model, (x, _) = MODELS[name], tiny(name), images(shape=(2, 32, 32))
    if name == "attention":
        model = tiny(name, max_len=256)
    keys, before, size = list(model.state_dict()), model(x), len(pickle.dumps(model))
    model.blocks[0].eval()
    with script.frozen(model):
        with pytest.raises(ZeroDivisionError):
            with script.frozen(model):
                model(x)
                raise ZeroDivisionError
        assert not any(w.requires_grad for w in model.parameters()) and not model.training
        model(x)
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert all(w.requires_grad for w in model.parameters())
    assert list(model.state_dict()) == keys
    assert len(pickle.dumps(model)) < size + 4000                           # no kernel: 15 kB or more
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), before)
        twin(x).sum().backward()


# --------------------------------------------------------------------------------------------------
# Drawn digits: data without a download
# --------------------------------------------------------------------------------------------------

@each_script
def test_drawn_digits_depend_on_their_seed_alone(script):
    state = torch.get_rng_state()
    x, y = script.drawn_digits(501, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.uint8, torch.int64, (501, 1, 28, 28), (501,))
    assert sorted(set(y.tolist())) == list(range(10))
    torch.manual_seed(7)
    again, other = script.drawn_digits(501, seed=3), script.drawn_digits(501, seed=4)
    assert torch.equal(again[0], x) and torch.equal(again[1], y) and not torch.equal(other[0], x)
    assert script.drawn_digits(2, seed=0, size=16)[0].shape == (2, 1, 16, 16)


def test_drawn_digits_show_their_labels():
    x, y = s4_adv.drawn_digits(4000, seed=0)
    x = torch.cat([x.flatten(1).double() / 255, torch.ones(4000, 1).double()], 1)
    train, test, target = x[:3000], x[3000:], F.one_hot(y[:3000]).double()
    w = torch.linalg.solve(train.T @ train + 10 * torch.eye(785).double(), train.T @ target)
    assert ((test @ w).argmax(1) == y[3000:]).double().mean() > 0.3         # chance: 0.1
