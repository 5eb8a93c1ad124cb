# SPDX-License-Identifier: MIT
"""Adversarial training of fixed-parameter state space models: S4, DSS, S5, with Adaptive Scaling.

    python s4_adv.py                     # MNIST if ./data has it, else drawn digits
    python s4_adv.py --ssm dss --data-dir DIR

    MNIST: 6000 training and 1000 test images, PGD-AT, eps 0.100
                 parameters   clean   PGD-10
    without AdS      19,210   47.7%   30.6%
    with AdS         35,850   84.9%   63.2%

77 s on a 2-core x86-64 CPU, torch 2.14.1, one seed. On drawn digits S4 without AdS stays near
chance in this short a run; AdS brings parameters, too (see ads.py for its controls).

Papers     AdS      Qi et al. 2024, arXiv 2406.05532       PGD     Madry et al. 2018, 1706.06083
           S4       Gu et al. 2022, arXiv 2111.00396       TRADES  Zhang et al. 2019, 1901.08573
           DSS      Gupta et al. 2022, arXiv 2203.14343    FGSM    Goodfellow et al. 2015, 1412.6572
           S5       Smith et al. 2023, arXiv 2208.04933    HiPPO   Gu et al. 2020, 2008.07669
Glossary   B batch, L tokens, H = d_model channels, N = d_state states of a channel (S5: P, of all)
           u (B, L, H) input of the map, y (B, L, H) its output, x image, delta its perturbation
           A B C D the paper's matrices, dt step size, K convolution kernel, lam eigenvalues of A
           eps radius and alpha step of an attack in pixel units ([0, 1]; 8/255, not 8)
Not here   other data sets, FreeAT, YOPO, checkpoints, strong evaluation: train.py. Dropout,
           warm-up, input normalisation: not in the protocol. Bidirectional or multi-head SSMs.

The whole program is this file and ads.py: copy the two.
"""
import argparse
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ads import middle


# --------------------------------------------------------------------------------------------------
# The sequence map: h_t = A' h_{t-1} + B' u_t,  y_t = Re(C h_t) + D u_t  with A', B', C, D fixed
# --------------------------------------------------------------------------------------------------

def hippo_legs(N):
    """Eigenvalues and low-rank term of HiPPO-LegS, A = V (lam - P P*) V*.    S4, Thm 1 and App. C.1

    N  int  number of states. A_nk = -sqrt(2n+1) sqrt(2k+1) for n > k, -(n+1) for n = k, else 0.

    Returns lam (N,), P (N,), B (N,), V (N, N), complex128, sorted by the imaginary part of lam, so
    that the second half of an even N holds one of each conjugate pair.
    A + P P^T is -1/2 plus a skew matrix, so V is unitary and eigh applies.
    """
    n = torch.arange(N, dtype=torch.float64)
    P, B = (n + 0.5).sqrt(), (2 * n + 1).sqrt()
    A = -torch.tril(B[:, None] * B[None, :], -1) - torch.diag(n + 1)
    skew = A + P[:, None] * P[None, :] + 0.5 * torch.eye(N, dtype=torch.float64)
    imag, V = torch.linalg.eigh(-1j * skew)
    P, B = V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype)
    return torch.complex(torch.full_like(imag, -0.5), imag), P, B, V


def half_legs(N):
    """lam, P, B (N/2,) of hippo_legs: one of each conjugate pair.  ValueError if N is odd."""
    if N % 2:
        raise ValueError(f"d_state {N} is odd; states come in conjugate pairs, give an even number")
    return [z[N // 2:] for z in hippo_legs(N)[:3]]


def log_uniform(size, low=1e-3, high=1e-1):
    """log dt with dt log-uniform in [low, high], S4's initialisation of the step size."""
    return math.log(low) + torch.rand(size) * (math.log(high) - math.log(low))


def parameter(z):
    """z as Parameter of torch's default dtype; complex (...) as real pairs (..., 2): optimisers and
    checkpoints see real numbers."""
    v = torch.view_as_real(z.resolve_conj()) if z.is_complex() else z
    return nn.Parameter(v.to(torch.get_default_dtype(), copy=True))


def vandermonde(c, log_lam, L):
    """K_l = sum_n c_n lam_n^l for l < L.                  S4D (2206.11893), Vandermonde product

    c, log_lam  (H, N)  real or complex, |lam| <= 1            returns (H, L)
    With l = q T + r the powers factor, lam^l = lam^(qT) lam^r: about 2 sqrt(L) exponentials for
    each state instead of L, and one matrix product for the sum.
    """
    T = math.isqrt(L - 1) + 1
    r = torch.arange(T, device=c.device, dtype=log_lam.real.dtype)
    q = T * torch.arange(-(-L // T), device=c.device, dtype=log_lam.real.dtype)
    left = c[:, None] * torch.exp(log_lam[:, None] * q[:, None])            # (H, Q, N)
    right = torch.exp(log_lam[:, :, None] * r)                              # (H, N, T)
    return (left @ right).flatten(1)[:, :L]                                 # (H, L)


def cauchy(w, lam, s, c):
    """sum_n w_n / (is - c lam_n), and the terms of each lam_n*, w_n*.   S4, Sec. 3.2: Cauchy kernel

    w  (H, 4, N/2)  complex, four sums at a time     lam  (N/2,)  complex, one of each pair
    s  (H, M)       real                             c    (M,)    real         returns (H, 4, M)
    The two terms of a pair are together, in real numbers but for i,
        2 (is Re w - c Re(w lam*)) / (c^2 |lam|^2 - s^2 - 2isc Re lam).
    """
    size = lam.abs()[:, None] * c                                           # (N/2, M)
    R = torch.complex(size ** 2 - s[:, None] ** 2, -2 * lam.real[:, None] * (s * c)[:, None])
    R = torch.view_as_real(R.reciprocal()).flatten(2)                       # (H, N/2, 2M)
    w = 2 * torch.cat([w.real, (w * lam.conj()).real], 1)                   # (H, 8, N/2)
    over = torch.view_as_complex((w @ R).unflatten(-1, (-1, 2)))            # (H, 8, M)
    return 1j * s[:, None] * over[:, :4] - c * over[:, 4:]


class Convolution(torch.autograd.Function):
    """y_t = sum_s K_s u_{t-s} by FFT of length 2L, so that nothing wraps around.

    u (B, L, H), K_hat (H, L+1) = rfft(K, 2L) / 2L                              returns y (B, L, H)
    The 1/2L of the inverse FFT is in K_hat: one pass over y less. Backward: a convolution's
    gradient is a correlation, the same map with K_hat conjugated. It is written out since autograd
    takes complex FFTs of full length where real ones do; autograd can follow it, for second
    derivatives.
    """
    SIZE = 2 ** 19                                  # numbers at a time: what a CPU's cache holds

    @staticmethod
    def parts(*tensors):
        """Each (B, L, H), a few images at a time: (H, n, L), so that time is adjacent in memory."""
        b, L, H = tensors[0].shape
        n = b if tensors[0].is_cuda else max(1, Convolution.SIZE // (L * H))
        for part in zip(*(v.reshape(-1, H).split(n * L) for v in tensors)):
            yield [v.T.contiguous().unflatten(1, (-1, L)) for v in part]

    @staticmethod
    def whole(u, K_hat):
        """All images at once, as it is written: on a GPU what counts is how often memory moves."""
        L = u.shape[1]
        y_hat = torch.fft.rfft(u.mT, 2 * L).mul_(K_hat)                     # (B, H, L+1)
        return torch.fft.irfft(y_hat, 2 * L, norm="forward")[..., :L].mT.contiguous()

    @staticmethod
    def run(u, K_hat):
        if u.is_cuda:
            return Convolution.whole(u, K_hat)
        L, y, rows = u.shape[1], u.new_empty(u.shape[0] * u.shape[1], u.shape[2]), 0
        for u_n, in Convolution.parts(u):
            y_hat = torch.fft.rfft(u_n, 2 * L).mul_(K_hat[:, None])         # (H, n, L+1)
            y_n = torch.fft.irfft(y_hat, 2 * L, norm="forward")[..., :L].flatten(1)     # (H, n L)
            y[rows:rows + y_n.shape[1]] = y_n.T
            rows += y_n.shape[1]
        return y.view(u.shape)

    @staticmethod
    def forward(ctx, u, K_hat):
        ctx.save_for_backward(u if ctx.needs_input_grad[1] else None, K_hat)
        return Convolution.run(u, K_hat)

    @staticmethod
    def backward(ctx, g):
        u, K_hat = ctx.saved_tensors
        L, dK_hat = g.shape[1], None
        if u is not None:
            dK_hat = torch.zeros_like(K_hat)
            for part in Convolution.parts(u, g):
                u_hat, g_hat = (torch.fft.rfft(v, 2 * L) for v in part)     # (H, n, L+1)
                dK_hat += 2 * (u_hat.conj() * g_hat).sum(1)                 # irfft counts the inner
            dK_hat[:, [0, -1]] /= 2                                         # frequencies twice
        return Convolution.run(g, K_hat.conj().resolve_conj()), dK_hat


def convolve(ssm, u):
    """y (B, L, H) = kernel(L) of the ssm * u (B, L, H); within `frozen` the kernel is kept."""
    L = u.shape[1]
    K_hat = once(ssm, L, lambda: torch.fft.rfft(ssm.kernel(L), 2 * L, norm="forward"))  # (H, L+1)
    return Convolution.apply(u.to(K_hat.real.dtype), K_hat)


class S4(nn.Module):
    """S4: A = lam - P P* shared by all channels, dt and C per channel.      Gu et al. 2022, Alg. 1

    d_model  int  channels H
    d_state  int  states N, even: N/2 conjugate pairs are stored

    (B, L, H) -> (B, L, H). As in the paper (App. C.3) the learned output matrix is
    C~ = C (1 - A'^L), which spares the power A'^L; so the model belongs to the length that it was
    trained at. The real part of lam stays at its initial value, as in the authors' models.
    """

    def __init__(self, d_model, d_state=64):
        super().__init__()
        lam, P, B = half_legs(d_state)
        self.register_buffer("log_minus_real", parameter(torch.log(-lam.real)).detach())
        self.imag = parameter(lam.imag)                                     # (N/2,)
        self.P, self.B = parameter(P), parameter(B)                         # (N/2, 2)
        self.C = parameter(torch.randn(d_model, len(lam), dtype=torch.cfloat))    # C~, (H, N/2, 2)
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_dt = nn.Parameter(log_uniform(d_model))

    def matrices(self):
        """lam, P, B (N/2,), C~ (H, N/2), complex; dt (H,)."""
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        return (lam, *map(torch.view_as_complex, (self.P, self.B, self.C)), self.log_dt.exp())

    def kernel(self, L):
        """K (H, L), D included in K_0: inverse DFT of K^ = C~ (1 - z A')^-1 B' at z = e^{-2i a},
        a = pi k / L.

        The bilinear rule turns K^ into e^{ia} C~ (is - cA)^-1 B with the real s = 2/dt sin a,
        c = cos a; nothing is singular at z = -1. With R = 1 / (is - c lam), Woodbury gives
            (is - c lam + c P P*)^-1 = R - R P c (1 + c P* R P)^-1 P* R.
        """
        lam, P, B, C, dt = self.matrices()
        a = math.pi / L * torch.arange(L // 2 + 1, device=dt.device, dtype=dt.dtype)
        s, c = 2 / dt[:, None] * a.sin(), a.cos()                           # (H, L/2+1), (L/2+1,)
        w = torch.stack(torch.broadcast_tensors(C * B, C * P, P.conj() * B, P.conj() * P), 1)
        CB, CP, PB, PP = cauchy(w, lam, s, c).unbind(1)                     # (H, L/2+1) each
        K = torch.fft.irfft(torch.exp(1j * a) * (CB - CP * c * PB / (1 + c * PP)), L)      # (H, L)
        return torch.cat([K[:, :1] + self.D[:, None], K[:, 1:]], 1)

    def discrete(self, L):
        """A' = (1 - dt/2 A)^-1 (1 + dt/2 A), B' = (1 - dt/2 A)^-1 dt B, C = C~ (1 - A'^L)^-1."""
        lam, P, B, C, dt = self.matrices()
        lam, P, B, C = (torch.cat([v, v.conj()], -1) for v in (lam, P, B, C))
        one = torch.eye(len(lam), dtype=lam.dtype, device=lam.device)
        A = dt[:, None, None] / 2 * (torch.diag(lam) - P[:, None] * P.conj())      # (H, N, N)
        B = torch.linalg.solve(one - A, dt[:, None] * B)                    # (H, N)
        A = torch.linalg.solve(one - A, one + A)                            # (H, N, N)
        power = torch.matrix_power(A, L)
        return A, B, torch.linalg.solve(one - power, C[:, None], left=False)[:, 0]     # C (H, N)

    def modes(self, L):
        """|C| |B'| and |A'|_2, (H, 1) each: |K_l| <= |C| |A'|^l |B'|. A + A* < 0, so |A'|_2 < 1.

        Not its eigenvalues: A is far from normal, and the eigenvectors' condition would enter.
        """
        A, B, C = self.discrete(L)
        return (C.norm(dim=1) * B.norm(dim=1))[:, None], torch.linalg.matrix_norm(A, 2)[:, None]

    def recurrence(self, u):
        """The definition, step by step."""
        A, B, C = self.discrete(u.shape[1])
        h, ys = torch.zeros_like(B).expand(len(u), -1, -1), []              # (B, H, N)
        for u_t in u.unbind(1):
            h = torch.einsum("hmn,bhn->bhm", A, h) + B * u_t[..., None]
            ys.append((C * h).sum(-1).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def forward(self, u):
        return convolve(self, u)


class DSS(nn.Module):
    """K_l = Re sum_n C_n/lam_n softmax_l(lam_n dt l), diagonal A.     Gupta et al. 2022, Prop. 1(b)

    d_model  int  channels H
    d_state  int  states N, even: N/2 complex numbers, the eigenvalues of HiPPO-LegS with imag > 0

    (B, L, H) -> (B, L, H). The softmax runs over l < L, so the kernel depends on the length.
    """

    def __init__(self, d_model, d_state=64):
        super().__init__()
        lam, _, _ = half_legs(d_state)
        self.log_minus_real = parameter(torch.log(-lam.real))               # (N/2,)
        self.imag = parameter(lam.imag)                                     # (N/2,)
        self.C = parameter(torch.randn(d_model, len(lam), dtype=torch.cfloat))    # (H, N/2, 2)
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_dt = nn.Parameter(log_uniform(d_model))

    def matrices(self, L):
        """lam dt and C lam^-1 (e^{lam dt} - 1) / (e^{lam dt L} - 1), complex, each (H, N/2)."""
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        lam_dt = lam * self.log_dt.exp()[:, None]
        C = torch.view_as_complex(self.C)
        return lam_dt, C / lam * torch.expm1(lam_dt) / torch.expm1(lam_dt * L)

    def modes(self, L):
        """|C'_n| and |e^{lam_n dt}|, (H, N/2) each: |K_l| <= sum_n |C'_n| |e^{lam_n dt}|^l."""
        lam_dt, C = self.matrices(L)
        return C.abs(), lam_dt.exp().abs()

    def kernel(self, L):
        """K (H, L), D in K_0. The softmax's sum is geometric: sum_r q^r = (q^L - 1) / (q - 1)."""
        lam_dt, C = self.matrices(L)
        K = vandermonde(C, lam_dt, L).real                                  # (H, L)
        return torch.cat([K[:, :1] + self.D[:, None], K[:, 1:]], 1)

    def recurrence(self, u):
        """The definition: h_t = e^{lam dt} h_{t-1} + u_t, y_t = Re(C' h_t) + D u_t, stepwise."""
        lam_dt, C = self.matrices(u.shape[1])
        A, h, ys = lam_dt.exp(), torch.zeros_like(C).expand(len(u), -1, -1), []    # (B, H, N/2)
        for u_t in u.unbind(1):
            h = A * h + u_t[..., None]
            ys.append((C * h).sum(-1).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def forward(self, u):
        return convolve(self, u)


class Scan(torch.autograd.Function):
    """h_t = a h_{t-1} + b_t, in parallel over chunks; only h is kept.                  S5, App. H

    a  (P,)       |a| <= 1, real or complex            b  (B, L, P)            h  (B, L, P)
    last  int  -1 forwards in time, 0 backwards: where the last state of a chunk lies

    Backward: with g = dloss/dh, the same recurrence run in reverse gives dloss/db,
        e_t = conj(a) e_{t+1} + g_t,      dloss/da = sum_{b,t} conj(h_{t-1}) e_t.
    """

    @staticmethod
    def run(a, b, last):
        """Time is cut into about sqrt(L) chunks of T steps: first the scan within all chunks at
        once, then, chunk by chunk, a^k times the last state before it is added: 2 sqrt(L) steps."""
        L, way = b.shape[1], 1 if last else -1
        T = math.isqrt(L - 1) + 1
        h = F.pad(b, (0, 0, 0, -L % T)).unflatten(1, (-1, T))               # (B, L/T, T, P)
        steps, chunks, power = h.unbind(2)[::way], h.unbind(1)[::way], [a]
        for before, now in zip(steps, steps[1:]):                           # (B, L/T, P)
            now.addcmul_(a, before)
            power.append(power[-1] * a)
        power = torch.stack(power[::way])                                   # a^1 .. a^T, (T, P)
        for before, now in zip(chunks, chunks[1:]):                         # (B, T, P)
            now.addcmul_(power, before[:, last, None])
        return h.flatten(1, 2)[:, :L]

    @staticmethod
    def forward(ctx, a, b, last=-1):
        h, ctx.last = Scan.run(a, b, last), last
        ctx.save_for_backward(a, h if ctx.needs_input_grad[0] else None)
        return h

    @staticmethod
    def backward(ctx, g):
        (a, h), back = ctx.saved_tensors, 0 if ctx.last else -1
        e = Scan.apply(a.conj().resolve_conj(), g, back)
        if h is None:
            return None, e, None
        h, later = (h[:, :-1], e[:, 1:]) if ctx.last else (h[:, 1:], e[:, :-1])
        return (h.conj() * later).sum((0, 1)), e, None


class S5(nn.Module):
    """S5: one MIMO system for all channels, diagonal A, parallel scan.            Smith et al. 2023

    d_model  int  channels H
    d_state  int  complex states P of the layer (the paper here: P = d_model)

    (B, L, H) -> (B, L, H): h_t = A' h_{t-1} + B' u_t, y_t = Re(C h_t) + D u_t, by zero-order hold
    A' = e^{lam dt}, B' = lam^-1 (e^{lam dt} - 1) B, dt per state (Sec. 3.2).
    """

    def __init__(self, d_model, d_state=128):
        super().__init__()
        lam, _, _, V = hippo_legs(d_state)                                  # (P,), (P, P)
        B = torch.randn(d_state, d_model, dtype=V.real.dtype) / math.sqrt(d_model)
        C = torch.randn(d_model, d_state, dtype=V.dtype) / math.sqrt(d_state)
        self.log_minus_real = parameter(torch.log(-lam.real))               # (P,)
        self.imag = parameter(lam.imag)                                     # (P,)
        self.B = parameter(V.mH @ B.to(V.dtype))                            # (P, H, 2)
        self.C = parameter(C @ V)                                           # (H, P, 2)
        self.D = nn.Parameter(torch.rand(d_model))
        self.log_dt = nn.Parameter(log_uniform(d_state))

    def matrices(self):
        """A' (P,), B' (P, H), C (H, P), complex."""
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        lam_dt = lam * self.log_dt.exp()
        B, C = map(torch.view_as_complex, (self.B, self.C))
        return lam_dt.exp(), (torch.expm1(lam_dt) / lam)[:, None] * B, C

    def modes(self, L):
        """|C_in| sum_j |B'_nj| (H, P) and |A'_n| (P,), as in DSS, for row i of K_l."""
        A, B, C = self.matrices()
        return C.abs() * B.abs().sum(1), A.abs()

    def kernel(self, L):
        """K (L, H, H) with K_l = Re(C A'^l B'), D included in K_0: y_t = sum_s K_s u_{t-s}."""
        A, B, C = self.matrices()
        powers = A ** torch.arange(L, device=A.device)[:, None]             # (L, P)
        K = torch.einsum("hp,lp,pi->lhi", C, powers, B).real                # (L, H, H)
        return torch.cat([K[:1] + torch.diag(self.D), K[1:]])

    def recurrence(self, u):
        """The definition, step by step."""
        A, B, C = self.matrices()
        h, ys = torch.zeros(len(u), len(A), dtype=A.dtype, device=A.device), []    # (B, P)
        for u_t in u.unbind(1):
            h = A * h + u_t.to(B.dtype) @ B.T
            ys.append((h @ C.T).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def forward(self, u):
        A, B, C = once(self, None, self.matrices)
        B = torch.view_as_real(B.T.contiguous()).flatten(1)                 # (H, 2P), real pairs
        C = torch.view_as_real(C.conj().resolve_conj()).flatten(1)          # (H, 2P): Re(C h)
        h = (u @ B).to(B.dtype).unflatten(-1, (-1, 2))                      # (B, L, P, 2)
        h = Scan.apply(A, torch.view_as_complex(h))                         # (B, L, P)
        return torch.addcmul(torch.view_as_real(h).flatten(2) @ C.T, self.D, u)     # (B, L, H)


# --------------------------------------------------------------------------------------------------
# What a perturbation can do to a fixed map: dy = K * du, whatever u is
# --------------------------------------------------------------------------------------------------

def gain(ssm, L):
    """max |dy_i|_inf over |du|_inf <= 1: sum_s sum_j |(K_s)_ij|, and du for it.  Derived here, P1

    ssm  S4 | DSS | S5, in float64                              L  int  tokens

    |dy_ti| <= sum_{s <= t} sum_j |(K_s)_ij| |du_{t-s,j}|: largest at t = L-1, and there an equality
    for du_{L-1-s,j} = sign (K_s)_ij. K_s is diagonal in S4 and DSS.
    Returns the gain (H,), and du: (1, L, H), of S5 (H, L, H), one for each channel i.
    """
    K = ssm.kernel(L)
    if K.dim() == 2:                                                        # (H, L)
        return K.abs().sum(1), K.sign().T.flip(0)[None]
    return K.abs().sum((0, 2)), K.sign().flip(0).transpose(0, 1)            # from (L, H, H)


def gain_bounds(ssm, L):
    """sup_w sum_j |K^_ij(w)| <= gain_i <= |D_i| + sum_n g_in (1 - rho_n^L) / (1 - rho_n).

    Arguments as gain. Returns both ends (H,); w on the 2L-th roots of 1.         Derived here, P2
    Left: |K^(w)| = |sum_s K_s e^{-iws}| <= sum_s |K_s|. Right: |K_s| <= sum_n g_n rho_n^s (modes).
    So a smaller gain of the error caps the signal's at every frequency; but they can lie apart, by
    as much as sqrt(L) (Parseval and Cauchy-Schwarz).
    """
    K, (g, rho) = ssm.kernel(L), ssm.modes(L)
    if K.dim() == 2:
        spectral = torch.fft.rfft(K, 2 * L).abs().amax(1)
    else:
        spectral = torch.fft.rfft(K, 2 * L, 0).abs().sum(2).amax(0)
    return spectral, ssm.D.abs() + (g * (1 - rho ** L) / (1 - rho)).sum(1)


def linear_block(block, L):
    """M (L, H, H) with z + Block(z) = sum_s M_s z_{t-s} + out.bias.  ValueError if it has AdS."""
    if not isinstance(block.middle, nn.Identity):
        raise ValueError(f"a block with {type(block.middle).__name__} is not linear")
    K = block.ssm.kernel(L)
    M = block.out.weight @ (torch.diag_embed(K.T) if K.dim() == 2 else K)
    return torch.cat([M[:1] + torch.eye(M.shape[1]).to(M), M[1:]])


def normalised(c, r, e):
    """Centre and radius of v / sqrt(mean v^2 + e) over the box |v - c| <= r: LayerNorm without its
    mean, which is linear. c, r (..., H), e float.                                  Derived here

    f(v_i, R) = v_i / sqrt((v_i^2 + R) / H + e) rises with v_i, and moves towards 0 as R, the sum of
    the other squares, grows; in a box v_i and R are free of each other. So the ends lie at corners:
    no other box is smaller, and the variance needs no bound from outside.
    """
    least, most = (c.abs() - r).clamp(min=0) ** 2, (c.abs() + r) ** 2
    least, most = ((v.sum(-1, keepdim=True) - v).clamp(min=0) for v in (least, most))
    low, high = (v / ((v * v + torch.where(sign * v > 0, least, most)) / v.shape[-1] + e).sqrt()
                 for v, sign in ((c - r, -1), (c + r, 1)))
    return (low + high) / 2, (high - low) / 2


def certified_margin(model, x, y, eps):
    """A lower bound of z_y - max_{k != y} z_k over |x' - x|_inf <= eps, x' in [0, 1].

    Arguments as pgd; eps float or (B, 1, 1, 1); a Classifier without AdS, in float64.
    Returns (B,): above 0, no x' is misclassified.  ValueError: see linear_block.

    Boxes |v - c| <= r, as in Gowal et al. 2018 (1810.12715), Sec. 3: an affine map W takes c to
    W c + b and r to |W| r; with W_s = pi M_s, the mean taken off by pi, this is the gain of the
    whole block, token by token, and exact for each LayerNorm's input. The rest: `normalised`.
    float64 rounds; each radius is widened by 1e-9 of itself and 1e-11 for that.
    """
    def affine(W, b, c, r):
        """W (H, n) on tokens or W (L, H, H) convolved with them; c, r (B, L, n)."""
        if W.dim() == 2:
            c, r = c @ W.T, r @ W.abs().T
        else:
            c, r = (torch.fft.irfft(torch.einsum(
                "wij,bwj->bwi", torch.fft.rfft(V, 2 * len(V), 0), torch.fft.rfft(v, 2 * len(V), 1)),
                2 * len(V), 1)[:, :len(V)] for V, v in ((W, c), (W.abs(), r)))
        return c + b, (1 + 1e-9) * r + 1e-11

    H, P = model.head.in_features, model.patches.kernel_size[0]
    pi = torch.eye(H).to(x) - 1 / H
    low, high = ((x + way * eps).clamp(0, 1) for way in (-1, 1))
    c, r = (F.unfold(v, P, stride=P).mT for v in ((low + high) / 2, (high - low) / 2))
    c, r = affine(pi @ model.patches.weight.flatten(1), pi @ model.patches.bias, c, r)
    for norm, block in zip([model.norm, *model.norms], [*model.blocks, None]):
        c, r = normalised(c, r, norm.eps)
        c, r = c * norm.weight + norm.bias, r * norm.weight.abs()
        if block is not None:
            M = linear_block(block, c.shape[1])
            c, r = affine(pi @ M, pi @ block.out.bias, c, r)                # (B, L, H)
    W = model.head.weight[y, None] - model.head.weight                      # (B, n_classes, H)
    gap = model.head.bias[y, None] - model.head.bias + (
        W @ c.mean(1)[..., None] - W.abs() @ r.mean(1)[..., None])[..., 0]
    return gap.scatter(1, y[:, None], math.inf).amin(1)


def certified_radius(model, x, y, steps=30):
    """The largest eps with certified_margin > 0, (B,), by bisection of [0, 1]; 0 if x is wrong."""
    low = torch.zeros(len(x), 1, 1, 1).to(x)
    for k in range(1, steps + 1):
        half = low + 2.0 ** -k
        low = torch.where(certified_margin(model, x, y, half).view_as(low) > 0, half, low)
    return low.flatten()


# --------------------------------------------------------------------------------------------------
# The network around it
# --------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Sequence map -> [AdS or control] -> Linear; (B, L, H) -> (B, L, H).           Qi et al. 2024

    Without AdS the block is linear in its input: there is no activation, as in the authors' models.
    """

    def __init__(self, d_model, d_state, ads=None, control=None, ssm="s4"):
        super().__init__()
        kinds = {"s4": S4, "dss": DSS, "s5": S5}
        if ssm not in kinds:
            raise ValueError(f"ssm {ssm!r} is unknown; choose one of {', '.join(kinds)}")
        self.ssm = kinds[ssm](d_model, d_state)
        self.middle = middle(d_model, ads, control)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, u):
        return self.out(self.middle(self.ssm(u)))


class Classifier(nn.Module):
    """Images -> tokens -> n x { z = LayerNorm(z + Block(z)) } -> mean over tokens -> logits.

    in_channels, n_classes  int         colours of an image, classes
    d_model, d_state        int         channels H, states N of a sequence map
    n_layers, patch_size    int         blocks; a token is a patch of patch_size^2 pixels, by rows
    ads, control            str | None  see ads.middle
    ssm                     str         "s4" | "dss" | "s5"

    Images (B, C, h, w) in [0, 1] -> logits (B, n_classes).  ValueError if patches do not fill them.
    """

    def __init__(self, in_channels, n_classes, d_model=128, d_state=64, n_layers=4, patch_size=1,
                 ads=None, control=None, ssm="s4"):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, d_model, patch_size, patch_size)
        self.norm = nn.LayerNorm(d_model)
        self.blocks = nn.ModuleList(Block(d_model, d_state, ads, control, ssm)
                                    for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))
        self.head = nn.Linear(d_model, n_classes)

    def embed(self, x):
        """Images -> tokens (B, L, H): the one affine layer that YOPO differentiates repeatedly."""
        P, (h, w) = self.patches.kernel_size[0], x.shape[-2:]
        if h % P or w % P:
            raise ValueError(f"patch size {P} does not divide an image of {h} x {w}")
        return self.patches(x).flatten(2).transpose(1, 2)                   # (B, L, H), row by row

    def logits(self, z):
        """Tokens (B, L, H) -> logits (B, n_classes)."""
        z = self.norm(z)
        for block, norm in zip(self.blocks, self.norms):
            z = norm(z + block(z))                                          # (B, L, H)
        return self.head(z.mean(1))                                         # (B, n_classes)

    def forward(self, x):
        return self.logits(self.embed(x))


# --- shared text: the same in s4_adv.py, mamba_adv.py and attention_adv.py (a test compares) ---

MEMO = {}       # module -> what `once` made from its weights; filled within `frozen` only


@contextmanager
def frozen(model):
    """Within it weights are constants: eval mode, no weight gradients, each kernel computed once.

    Every attack runs in it, and so does evaluation. It may be nested; mode, requires_grad and MEMO
    are as before afterwards, also when an exception is raised.
    """
    modes = [(m, m.training, m in MEMO) for m in model.modules()]
    wanted = [(w, w.requires_grad) for w in model.parameters()]
    try:
        MEMO.update((m, {}) for m, _, nested in modes if not nested)
        model.eval().requires_grad_(False)
        yield
    finally:
        for m, training, nested in modes:
            m.training = training
            if not nested:
                MEMO.pop(m, None)
        for w, wants in wanted:
            w.requires_grad_(wants)


def once(module, key, make):
    """make(), a function of the module's weights; within `frozen` its first result serves again.

    Until a weight is another tensor or its version counter moves (.data and fused optimisers do not
    move it: keep them out of `frozen`); never while a weight wants a gradient, or where
    torch.compile traces. Autocast is off: kernels need all their bits.
    """
    weights = [*module.parameters(), *module.buffers()]                 # DataParallel's copies: []
    with torch.autocast(weights[0].device.type if weights else "cuda", enabled=False):
        if (torch.compiler.is_compiling() or module not in MEMO
                or any(w.requires_grad for w in weights)):
            return make()
        memo, key = MEMO[module], (key, *((w.data_ptr(), w._version) for w in weights))
        if key not in memo:
            memo.clear()
            memo[key] = make(), [w.detach() for w in weights]   # held, so are their addresses
        return memo[key][0]


def ascend(model, loss, x, start, eps, alpha, steps):
    """x_{k+1} = Proj(x_k + alpha sign grad loss(x_k)), Proj on |x' - x|_inf <= eps and [0, 1].

    loss   function   points (B, C, h, w) -> a scalar, summed over the batch
    start  like x     the first point, projected before its gradient is taken
    alpha  float, or a list of steps floats: a step size for each step
    The other arguments are those of pgd.  ValueError if x leaves [0, 1], where the projection would
    move it by more than eps.  FloatingPointError if a gradient is not finite: the sign of a NaN is
    0, so the attack would silently stop and report robustness.
    """
    if ((x < -1e-6) | (x > 1 + 1e-6)).any():                                # rounding may stay
        raise ValueError("images must lie in [0, 1]; a normalisation belongs into the model")
    alphas = alpha if isinstance(alpha, list) else [alpha] * steps
    low, high = (x.detach() - eps).clamp(min=0), (x.detach() + eps).clamp(max=1)
    x_adv = start.detach().clamp(low, high)
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    with frozen(model), torch.enable_grad():
        for step_size in alphas if len(x) else ():
            x_adv.requires_grad_()
            grad, = torch.autograd.grad(loss(x_adv), x_adv)
            finite = finite & grad.isfinite().all()
            x_adv = (x_adv.detach() + step_size * grad.sign()).clamp(low, high)
    if not finite:
        raise FloatingPointError("the attack met a gradient that is not finite")
    return x_adv.detach()


def fgsm(model, x, y, eps):
    """x + eps sign grad_x CE(model(x), y), clamped to [0, 1].    Goodfellow et al. 2015, Sec. 4

    Arguments and result as pgd.  One step from x itself, no random start.
    """
    return ascend(model, lambda z: F.cross_entropy(model(z), y, reduction="sum"), x, x, eps, eps, 1)


def pgd(model, x, y, eps, alpha, steps):
    """max_{|delta|_inf <= eps} CE(model(x + delta), y), by ascent.      Madry et al. 2018, Sec. 2.1

    model   Module        images (B, C, h, w) in [0, 1] -> logits; a normalisation is part of it
    x       (B, C, h, w)  images in [0, 1]
    y       (B,)          labels
    eps     float         radius, pixel units (8/255, not 8)
    alpha   float         step, pixel units; or a list, one for each step
    steps   int           gradient steps, from one uniform random start in the ball

    Returns x_adv, like x and detached: |x_adv - x|_inf <= eps, x_adv in [0, 1]. Weights, their
    gradients and train/eval mode are left as they were.  ValueError, FloatingPointError: ascend.
    """
    start = x + eps * (2 * torch.rand_like(x) - 1)
    return ascend(model, lambda z: F.cross_entropy(model(z), y, reduction="sum"),
                  x, start, eps, alpha, steps)


def kl_pgd(model, x, eps, alpha, steps):
    """max_{|delta|_inf <= eps} KL(p(x) || p(x + delta)), by ascent.      Zhang et al. 2019, Alg. 1

    Arguments and result as pgd. It starts from x + 0.001 normal noise: at x itself the KL is flat.
    """
    with frozen(model):
        with torch.no_grad():
            log_p = model(x).log_softmax(1)
        return ascend(model, lambda z: kl_divergence(log_p, model(z), "sum"),
                      x, x + 1e-3 * torch.randn_like(x), eps, alpha, steps)


def kl_divergence(log_p, logits, reduction):
    """KL(p || softmax(logits)), a scalar: of the batch the "sum" or its mean, "batchmean"."""
    return F.kl_div(logits.log_softmax(1), log_p, reduction=reduction, log_target=True)


def pgd_at_loss(model, x, y, eps, alpha, steps):
    """CE(model(pgd(...)), y), mean over the batch; arguments as pgd.  Madry et al. 2018, Eq. 2.1"""
    return F.cross_entropy(model(pgd(model, x, y, eps, alpha, steps)), y)


def trades_loss(model, x, y, eps, alpha, steps, beta):
    """CE(model(x), y) + beta max_delta KL(p(x) || p(x + delta)).         Zhang et al. 2019, Alg. 1

    beta  float  weight of the robust term, no unit; 0 is standard training.  Others as in pgd.
    Mean over the batch.
    """
    return trades_at(model, x, kl_pgd(model, x, eps, alpha, steps), y, beta)


def trades_at(model, x, x_adv, y, beta):
    """CE(model(x), y) + beta KL(p(x) || p(x_adv)), mean over the batch: what TRADES descends."""
    logits = model(x)
    robust = kl_divergence(logits.log_softmax(1), model(x_adv), "batchmean")
    return F.cross_entropy(logits, y) + beta * robust


def accuracy(model, batches, attack=None):
    """Share of images classified correctly, and still so after attack(model, x, y); in [0, 1].

    batches  iterable of x (B, C, h, w), y (B,)
    attack   function (model, x, y) -> x_adv, or None; it gets only what is still classified
             correctly, since x itself lies in the ball: a clean error counts as broken
    ValueError without images, FloatingPointError if a logit is not finite.
    """
    def hits(x, y):
        with torch.no_grad():
            logits = model(x)
        if not logits.isfinite().all():
            raise FloatingPointError("the model returned a logit that is not finite")
        return logits.argmax(1) == y

    right = n = 0
    with frozen(model):
        for x, y in batches:
            n, y = n + len(x), y.view(len(x))                           # (B, 1), too
            ok = hits(x, y)
            if attack is not None and ok.any():
                x, y = x[ok], y[ok]
                ok = hits(attack(model, x, y), y)
            right += int(ok.sum())
    if n == 0:
        raise ValueError("accuracy of no images is not defined")
    return right / n


def param_groups(model, weight_decay):
    """Groups for AdamW: weights of Linear and Conv layers decay; SSM parameters, norms, biases not.

    Decay would pull the time constants, lam and dt, to values that mean nothing (the authors'
    models decay all alike).
    """
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d)
    decay = {id(m.weight) for m in model.modules() if isinstance(m, linear)}
    return [{"params": [p for p in model.parameters() if (id(p) in decay) == decays],
             "weight_decay": weight_decay if decays else 0.0} for decays in (True, False)]


def drawn_digits(n, seed, size=28):
    """n faint, tilted digits on noise, ten classes: data without a download.

    n, seed, size  int   images, random seed, height and width in pixels
    Returns images (n, 1, size, size) uint8 and labels (n,) int64. Place, size, tilt, contrast
    (0.25 to 0.5 of the range) and noise vary; what is faint can be broken within a small eps.
    """
    font = "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717"    # 5 rows of 3 bits
    font = [[[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in digit] for digit in font.split()]
    g = torch.Generator().manual_seed(seed)
    images, labels = [], torch.randint(10, (n,), generator=g)
    for y in labels.split(500):
        affine = 0.4 * (torch.rand(len(y), 2, 3, generator=g) - 0.5)        # tilt, slant, shift
        affine += torch.tensor([[2.2, 0.0, 0.0], [0.0, 1.7, 0.0]])          # and size
        grid = F.affine_grid(affine, (len(y), 1, size, size), align_corners=False)
        ink = F.grid_sample(torch.tensor(font)[y][:, None].float(), grid, align_corners=False)
        ground, contrast = torch.rand(2, len(y), 1, 1, 1, generator=g)
        x = 0.1 + 0.3 * ground + (0.25 + 0.25 * contrast) * ink             # (b, 1, size, size)
        x = x + 0.05 * torch.randn(x.shape, generator=g)
        images.append((255 * x.clamp(0, 1)).round().to(torch.uint8))
    return torch.cat(images), labels


def demo(classifier, data_dir, epochs, n_train, n_test=1000, batch=64):
    """PGD-AT of classifier(ads=...) on MNIST or drawn digits, without and with AdS; a table."""
    eps, alpha, name = 0.1, 0.025, "MNIST"
    try:
        from torchvision.datasets import MNIST
        sets = [MNIST(data_dir, train=train, download=False) for train in (True, False)]
        sets = [(s.data[:, None], s.targets) for s in sets]
    except Exception:                               # none there, damaged, or no torchvision
        eps, alpha, name = 8 / 255, 2 / 255, f"drawn digits (no readable MNIST in {data_dir})"
        sets = [drawn_digits(n_train, 0), drawn_digits(n_test, 1)]
    (x, y), (x_test, y_test) = ((x[:n] / 255, y[:n]) for (x, y), n in zip(sets, (n_train, n_test)))
    print(f"{name}: {len(x)} training and {len(x_test)} test images, PGD-AT, eps {eps:.3f}")
    print("             parameters   clean   PGD-10")
    for ads in (None, "relu"):
        torch.manual_seed(0)
        model = classifier(ads=ads)
        optimizer = torch.optim.AdamW(param_groups(model, 2e-4), lr=3e-3)
        order = [i for _ in range(epochs) for i in torch.randperm(len(x)).split(batch)]
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
        for step, i in enumerate(order):
            ramp = min(1.0, 2 * step / len(order))      # at full eps a linear block never starts
            loss = pgd_at_loss(model, x[i], y[i], ramp * eps, ramp * alpha, steps=5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        test = list(zip(x_test.split(250), y_test.split(250)))
        robust = accuracy(model, test, lambda *args: pgd(*args, eps, alpha, steps=10))
        size = sum(p.numel() for p in model.parameters())
        print(f"{'with AdS' if ads else 'without AdS':12}{size:11,d}  {accuracy(model, test):6.1%}"
              f"  {robust:6.1%}", flush=True)

# --- end of the shared text ---


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ssm", choices=("s4", "dss", "s5"), default="s4", help="sequence map")
    parser.add_argument("--data-dir", default="./data", help="folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    args = parser.parse_args()
    demo(lambda ads: Classifier(1, 10, d_model=64, d_state=64, n_layers=2, patch_size=4, ads=ads,
                                ssm=args.ssm), args.data_dir, args.epochs, n_train=6000)


if __name__ == "__main__":
    main()
