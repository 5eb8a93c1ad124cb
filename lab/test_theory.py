# SPDX-License-Identifier: MIT
"""The five facts of lab/theory.py, P1 to P5, and the certificate, each against its definition."""
import math

import pytest
import torch
import torch.nn.functional as F

import ads
import attention_adv
import mamba_adv
import s4_adv
from lab import certificate, theory
from lab.analyse import mixing
from test_all import MAPS, close, each, images, randn, scan_inputs, scrambled, tiny

fixed_map = each("s4", "dss", "s5")
few = pytest.mark.parametrize("L", (1, 7, 16))


def some_map(kind):
    return scrambled(MAPS[kind](6, 8))


# ---- P1: the gain of a fixed map -----------------------------------------------------------------

@few
@torch.no_grad()
def test_the_kernel_of_s5_is_the_impulse_response_of_its_recurrence(L):
    s5 = some_map("s5")
    u = torch.zeros(6, L, 6, dtype=torch.float64)
    u[range(6), 0, range(6)] = 1                                        # image i has channel i
    close(s5.recurrence(u).permute(1, 2, 0), theory.kernel(s5, L))      # (L, out, in)


@few
@torch.no_grad()
def test_p1_the_worst_input_reaches_the_gain_whatever_u_is(kind, L):
    ssm = some_map(kind)
    gain, worst = theory.gain(ssm, L)
    u = randn(len(worst), L, 6)
    seen = (ssm.recurrence(u + 0.1 * worst) - ssm.recurrence(u)).abs().amax((0, 1))
    assert worst.abs().max() <= 1
    close(seen, 0.1 * gain, 1e-10)


@few
@torch.no_grad()
def test_p1_no_input_passes_the_gain(kind, L):
    ssm = some_map(kind)
    du = torch.cat([randn(50, L, 6).sign(), 2 * torch.rand(50, L, 6, dtype=torch.float64) - 1])
    gain, _ = theory.gain(ssm, L)
    assert (ssm.recurrence(du).abs().amax((0, 1)) <= gain + 1e-10).all()


# ---- P2: the gain between spectrum and modes -----------------------------------------------------

def norm_of_kernel(ssm, L):
    """||K||_1: the gain, but of EMA over all 2L - 1 lags."""
    if isinstance(ssm, attention_adv.EMA):
        return ssm.kernel(L).abs().sum(1)
    return theory.gain(ssm, L)[0]


@few
@torch.no_grad()
def test_p2_the_norm_of_the_kernel_lies_between_the_spectral_gain_and_the_modal_bound(kind, L):
    ssm = some_map(kind)
    norm, (spectral, modal) = norm_of_kernel(ssm, L), theory.gain_bounds(ssm, L)
    assert (spectral <= norm + 1e-10).all()
    assert (norm <= modal + 1e-10).all()
    assert (theory.gain(ssm, L)[0] <= norm + 1e-10).all()


@pytest.mark.parametrize("kind", ("s4", "dss"))
@pytest.mark.parametrize("L", (7, 16))
@torch.no_grad()
def test_p2_a_wave_passes_with_the_spectral_gain_at_most(kind, L):
    ssm = some_map(kind)
    spectral, _ = theory.gain_bounds(ssm, L)
    wave = torch.exp(2j * math.pi * 3 / (2 * L) * torch.arange(L, dtype=torch.float64))
    last = 0                                                            # one of the 2L frequencies
    for part, unit in ((wave.real, 1), (wave.imag, 1j)):
        last = last + ssm(part.flip(0)[None, :, None].expand(1, L, 6))[0, -1] * unit
    assert (last.abs() <= spectral + 1e-10).all()
    assert (last.abs() > 0.01 * spectral).any()


@torch.no_grad()
def test_p2_is_an_equality_on_both_sides_where_every_mode_is_real_and_positive():
    ema, s5 = some_map("ema"), some_map("s5")
    for w in (ema.beta, ema.gamma, ema.omega, s5.D, s5.B, s5.C):
        w.abs_()
    for w in (s5.imag, s5.B[..., 1], s5.C[..., 1]):
        w.zero_()
    for ssm in (ema, s5):
        spectral, modal = theory.gain_bounds(ssm, 16)
        close(spectral, modal, 1e-10)
        close(spectral, norm_of_kernel(ssm, 16), 1e-10)


# ---- P3: the error of a selective scan -----------------------------------------------------------

def scan_pair(L=12):
    """What a scan is fed, clean and attacked, each (u, dt, B); and A."""
    u, dt, A, B, _, _ = scan_inputs(2, L, 3, 4)
    u_adv, log_dt_adv, B_adv = (v + 0.1 * randn(*v.shape) for v in (u, dt.log(), B))
    return (u, dt, B), (u_adv, log_dt_adv.exp(), B_adv), A


def states(fed, A):
    """h (b, L, d, N) of the definition: one component of C at a time."""
    u, dt, B = fed
    none = torch.zeros_like(A[:, 0])
    return torch.stack([mamba_adv.selective_scan_loop(u, dt, A, B, unit.expand_as(B), none)
                        for unit in torch.eye(A.shape[1], dtype=A.dtype)], -1)


def test_p3_the_error_of_a_selective_scan_is_the_sum_of_its_three_terms():
    clean, attacked, A = scan_pair()
    error = states(attacked, A) - states(clean, A)
    for t, (h, h_adv, *terms) in enumerate(theory.scan_errors(clean, attacked, A)):
        close(sum(terms), error[:, t], 1e-10)
        close(h_adv - h, error[:, t], 1e-10)
        before = error[:, t - 1] if t else torch.zeros_like(h)
        close(terms[0], torch.exp(attacked[1][:, t, :, None] * A) * before, 1e-10)
    assert t == 11


def test_p3_the_error_grows_at_most_by_what_each_step_adds():
    clean, attacked, A = scan_pair()
    error, reach = states(attacked, A) - states(clean, A), 0
    for t, (_, _, _, stored, fed) in enumerate(theory.scan_errors(clean, attacked, A)):
        reach = reach + stored.abs() + fed.abs()
        assert (error[:, t].abs() <= reach + 1e-10).all()


def test_p3_the_error_is_linear_in_the_stored_state():
    clean, attacked, A = scan_pair(L=1)

    def stored(M):
        return next(theory.scan_errors(clean, attacked, A, M))[3]
    assert stored(1.0).abs().max() > 1e-3
    for M in (10.0, 100.0, 1000.0):
        close(stored(M), M * stored(1.0), 1e-10)


def test_p3_without_selection_the_error_is_independent_of_the_stored_state():
    (u, dt, B), (u_adv, _, B_adv), A = scan_pair(L=1)                   # dt is what selects A'
    errors = []
    for M in (1.0, 1000.0):
        h, h_adv, *_ = next(theory.scan_errors((u, dt, B), (u_adv, dt, B_adv), A, M))
        errors.append(h_adv - h)
    close(errors[0], errors[1], 1e-10)


def test_p3_the_local_gain_of_a_fixed_map_is_its_gain(fixed_map):
    ssm = some_map(fixed_map)
    gain, _ = theory.gain(ssm, 7)
    close(theory.local_gain(ssm, randn(2, 7, 6), range(6)), gain.expand(2, 6), 1e-9)


def test_p3_the_local_gain_of_mamba_is_a_bound_to_first_order_that_is_reached():
    mamba, u = scrambled(mamba_adv.Mamba(6, 4)), randn(1, 7, 6).requires_grad_()
    slope, = torch.autograd.grad(mamba(u)[0, -1, 2], u)
    with torch.no_grad():
        moves = [(mamba(u + du) - mamba(u))[0, -1, 2].abs() / 1e-6
                 for du in 1e-6 * torch.cat([slope.sign(), randn(20, 7, 6).sign()])]
    gain = theory.local_gain(mamba, u, [2])[0, 0]
    close(moves[0], gain, 1e-4)
    assert max(moves) <= gain * (1 + 1e-4)


# ---- P4: attention -------------------------------------------------------------------------------

@pytest.mark.parametrize("size", (0.01, 1, 100))
@torch.no_grad()
def test_p4_attention_clips_the_error(size):
    V, scores = randn(3, 7, 5), randn(3, 7, 7)
    V_adv, scores_adv = V + size * randn(3, 7, 5), scores + size * randn(3, 7, 7)
    error, bound, tv, osc = theory.attention_error(
        scores.softmax(-1), V, scores_adv.softmax(-1), V_adv)
    assert (error <= bound + 1e-12).all() and (tv <= 1 + 1e-12).all() and (osc > 0).all()


@torch.no_grad()
def test_p4_a_jump_of_all_the_mass_from_the_lowest_to_the_highest_value_reaches_the_bound():
    V = randn(1, 7, 1)
    order = V[..., 0].sort(1)[1]
    P, P_adv = (F.one_hot(order[:, [k]], 7).double().expand(1, 7, 7) for k in (0, 6))
    error, bound, _, _ = theory.attention_error(P, V, P_adv, V + 0.1)
    close(error, bound, 1e-12)
    close(bound, (V.max() - V.min() + 0.1).expand(1, 7, 1), 1e-12)


@torch.no_grad()
def test_p4_mixing_is_what_mega_computes_with():
    mega, u, fed = scrambled(attention_adv.Mega(6, 4, 8, 5, max_len=9)), randn(2, 9, 6), []
    mega.middle.register_forward_hook(lambda module, args, out: fed.append(args[0]))
    mega(u)
    P, V = mixing(mega, u)
    reset = mega.gates(F.silu(mega.ema(u))).split(mega.sizes, -1)[2]
    close(P.sum(-1), torch.ones(2, 9).double(), 1e-12)
    close(P @ V * F.silu(reset), fed[0], 1e-12)


# ---- P5: AdS -------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation", ads.ACTIVATIONS)
@torch.no_grad()
def test_p5_the_error_after_ads_is_its_three_terms(activation):
    module, y = scrambled(ads.AdaptiveScaling(6, activation)), randn(40, 6)
    y_adv = y + 0.3 * randn(40, 6)
    *terms, _ = theory.error_parts(module, y, y_adv)
    s, s_adv = (module.scale_and_shift(v)[0] for v in (y, y_adv))
    close(sum(terms), module(y_adv) - module(y), 1e-12)
    close(terms[0], s_adv * (y_adv - y), 1e-12)
    close(terms[1], (s_adv - s) * y, 1e-12)


@pytest.mark.parametrize("activation", ads.ACTIVATIONS)
@torch.no_grad()
def test_p5_relu_removes_the_error_exactly_where_no_pre_activation_is_positive(activation):
    module, y = scrambled(ads.AdaptiveScaling(6, activation)), randn(40, 6)
    y_adv = y + 0.3 * randn(40, 6)
    *_, removed = theory.error_parts(module, y, y_adv)
    positive = sum((part(v) > 0).int() for part in (module.scale, module.shift) for v in (y, y_adv))
    assert torch.equal(removed, (positive == 0) & torch.tensor(activation == "relu"))
    assert (module(y_adv) - module(y))[removed].eq(0).all()
    assert activation != "relu" or 0 < int(removed.sum()) < removed.numel()


# ---- The certificate -----------------------------------------------------------------------------

@pytest.mark.parametrize("size", (0.0, 0.3, 2.0))
@torch.no_grad()
def test_the_box_of_a_normalised_vector_is_sound_and_no_smaller_one_is(size):
    c, r = randn(20, 4), size * torch.rand(20, 4, dtype=torch.float64)
    centre, radius = certificate.normalised(c, r, 1e-5)

    def normalise(v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    ends = torch.stack([c - r, c + r, torch.minimum(torch.maximum(c - r, 0 * c), c + r)])
    grid = torch.cartesian_prod(*[torch.arange(3)] * 4)                 # an extreme is at one of 81
    f = normalise(torch.stack([ends[g, :, torch.arange(4)].T for g in grid]))
    close(f.amax(0), centre + radius, 1e-12)
    close(f.amin(0), centre - radius, 1e-12)
    f = normalise(c + r * (2 * torch.rand(500, 20, 4, dtype=torch.float64) - 1))
    assert ((f - centre).abs() <= radius + 1e-12).all()


@torch.no_grad()
def test_a_block_with_its_residual_is_the_convolution_with_linear_block(fixed_map):
    block, z = scrambled(s4_adv.Block(6, 4, ssm=fixed_map)), randn(2, 7, 6)
    M = certificate.linear_block(block, 7)
    by_hand = torch.stack([sum(z[:, t - s] @ M[s].T for s in range(t + 1)) for t in range(7)], 1)
    close(by_hand + block.out.bias, z + block(z), 1e-10)


def test_a_block_with_ads_has_no_certificate():
    with pytest.raises(ValueError, match="AdaptiveScaling is not linear"):
        certificate.linear_block(s4_adv.Block(6, 4, ads="relu"), 7)


def true_margin(model, x, y):
    """z_y - max_{k != y} z_k."""
    z = model(x)
    return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -math.inf).amax(1)


def certified(kind):
    """A model, images, the labels that it gives them, and their certified radii."""
    model, (x, _) = tiny(kind), images(8)
    y = model(x).argmax(1)
    return model, x, y, certificate.certified_radius(model, x, y)


def test_the_certificate_is_exact_at_eps_0(fixed_map):
    model, x, y, _ = certified(fixed_map)
    close(certificate.certified_margin(model, x, y, 0.0), true_margin(model, x, y), 1e-7)


def test_no_attack_leaves_the_certificate_nor_would_bounds_30_times_as_tight_hold(fixed_map):
    model, x, y, radius = certified(fixed_map)
    clean, tightest = true_margin(model, x, y), math.inf
    radius = radius.view(-1, 1, 1, 1)
    with s4_adv.frozen(model), torch.no_grad():
        for eps in [torch.full_like(radius, e) for e in (1e-4, 1e-3, 1e-2, 0.1)] + [radius]:
            bound = certificate.certified_margin(model, x, y, eps)
            points = [x + eps * (2 * torch.rand_like(x) - 1) for _ in range(20)]
            points += [x + eps * randn(*x.shape).sign() for _ in range(20)]
            points += [attacked(model, x, y, start, eps) for start in points[-3:]]
            for point in points:
                gap = true_margin(model, point.clamp(0, 1), y) - bound
                assert gap.min() >= 0
                tightest = min(tightest, float((gap / (clean - bound)).min()))
    assert tightest < 1 - 1 / 30


def attacked(model, x, y, start, eps):
    """The margin's descent within eps (n, 1, 1, 1), an image at a time: eps differs."""
    found = []
    for x_i, y_i, start_i, eps_i in zip(x.split(1), y.split(1), start.split(1), eps.flatten()):
        found.append(s4_adv.ascend(model, lambda z: -true_margin(model, z, y_i).sum(), x_i, start_i,
                                   float(eps_i), float(eps_i) / 4, 12))
    return torch.cat(found)


def test_the_certified_radius_is_the_largest_with_a_positive_margin(fixed_map):
    model, x, y, radius = certified(fixed_map)
    assert (radius > 1e-5).all()
    at, beyond = (certificate.certified_margin(model, x, y, (radius + more).view(-1, 1, 1, 1))
                  for more in (0, 2e-9))
    assert (at > 0).all() and (beyond <= 0).all()


def test_a_wrong_image_has_the_radius_0(fixed_map):
    model, x, y, _ = certified(fixed_map)
    assert certificate.certified_radius(model, x, (y + 1) % 3).eq(0).all()
