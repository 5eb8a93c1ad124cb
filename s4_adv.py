# SPDX-License-Identifier: MIT
"""Adversarial training of fixed-parameter state space models: S4, DSS, S5, with Adaptive Scaling.

    python s4_adv.py                     # torchvision downloads MNIST to ./data if it is not there
    python s4_adv.py --ssm dss --data-dir DIR

The first prints, in 49 CPU seconds (2-core x86-64 machine, torch 2.14.1, one thread, one seed):

    MNIST: 6000 training, 1000 test images, PGD-AT, eps 0.1, step 0.04
                 parameters   clean   PGD-10
    without AdS      21,322   68.8%   39.1%
    with AdS         37,962   94.2%   74.0%

Papers     AdS      Qi et al. 2024, arXiv 2406.05532       PGD     Madry et al. 2018, 1706.06083
           S4       Gu et al. 2022, arXiv 2111.00396       TRADES  Zhang et al. 2019, 1901.08573
           DSS      Gupta et al. 2022, arXiv 2203.14343    FGSM    Goodfellow et al. 2015, 1412.6572
           S5       Smith et al. 2023, arXiv 2208.04933    HiPPO   Gu et al. 2020, 2008.07669
Glossary   B batch, L tokens, H = d_model channels, N = d_state states of a channel; in S5
           P = d_state states, of all channels together
           u (B, L, H) input of the map, y (B, L, H) its output, x image, delta its perturbation
           A B C D the paper's matrices, A' B' discretised, dt step size, h state, lam A's diagonal
           K convolution kernel, K_hat its Fourier transform, z* the complex conjugate of z
           eps radius and alpha step of an attack in pixel units ([0, 1]; 8/255, not 8)
           A complex parameter (N,) is stored as real pairs (N, 2): optimisers see real numbers.
Not here   other data sets, FreeAT, YOPO, checkpoints, strong evaluation: train.py. Dropout,
           warm-up, input normalisation: not in the protocol. Bidirectional or multi-head SSMs.

The whole program is this file and ads.py: copy the two. ads.py has controls of AdS's size, too.
"""
import argparse
import math
import os
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ads import middle


# --------------------------------------------------------------------------------------------------
# Where the state matrix starts: HiPPO-LegS
# --------------------------------------------------------------------------------------------------

def hippo_legs(N):
    """HiPPO-LegS as normal minus rank one, A = V (diag(lam) - P P*) V*.      S4, Thm 1 and App. C.1

    N  int  number of states. A_nk = -sqrt(2n+1) sqrt(2k+1) for n > k, -(n+1) for n = k, else 0.

    With p_n = sqrt(n + 1/2), b_n = sqrt(2n+1): A + p p^T is -1/2 plus a skew matrix, hence normal,
    and V unitary. Returns lam, P = V* p, B = V* b (N,), V (N, N), complex128, sorted by the
    imaginary part of lam: the second half of an even N holds one of each conjugate pair.
    """
    n = torch.arange(N, dtype=torch.float64)
    p = (n + 0.5).sqrt()
    b = (2 * n + 1).sqrt()
    A = -torch.tril(b[:, None] * b[None, :], -1) - torch.diag(n + 1)
    skew = A + p[:, None] * p[None, :] + 0.5 * torch.eye(N, dtype=torch.float64)
    imag, V = torch.linalg.eigh(-1j * skew)
    lam = torch.complex(torch.full_like(imag, -0.5), imag)
    P = V.mH @ p.to(V.dtype)
    B = V.mH @ b.to(V.dtype)
    return lam, P, B, V


def half_legs(N):
    """lam, P, B (N/2,) of hippo_legs: one of each conjugate pair.  ValueError if N is odd."""
    if N % 2:
        raise ValueError(f"d_state {N} is odd; states come in conjugate pairs, give an even number")
    lam, P, B, _ = hippo_legs(N)
    return lam[N // 2:], P[N // 2:], B[N // 2:]


def log_uniform(size, low=1e-3, high=1e-1):
    """log dt with dt log-uniform in [low, high], S4's initialisation of the step size."""
    return math.log(low) + torch.rand(size) * (math.log(high) - math.log(low))


def parameter(z):
    """z as a Parameter of torch's default dtype; a complex z (...) as real pairs (..., 2)."""
    v = torch.view_as_real(z) if z.is_complex() else z
    return nn.Parameter(v.to(torch.get_default_dtype(), copy=True))


# --------------------------------------------------------------------------------------------------
# The sequence map: h_t = A' h_{t-1} + B' u_t,  y_t = Re(C h_t) + D u_t  with A', B', C, D fixed
# --------------------------------------------------------------------------------------------------

def apply_kernel(ssm, u):
    """y_t = sum_s K_s u_{t-s} with K = ssm.kernel(L), by FFTs of length 2L: nothing wraps around.

    u  (B, L, H)  input        returns (B, L, H).   `once`: within an attack one FFT of K serves.
    """
    if len(u) == 0:
        return u                                            # MKL's FFT refuses an empty batch
    L = u.shape[1]
    K_hat = once(ssm, L, lambda: torch.fft.rfft(ssm.kernel(L), 2 * L))      # (H, L+1)
    u_hat = torch.fft.rfft(u.to(K_hat.real.dtype).mT, 2 * L)                # no FFT in bf16
    return torch.fft.irfft(u_hat * K_hat, 2 * L)[..., :L].mT


def cauchy(w, lam, s, c):
    """sum_n w_n / (is - c lam_n) + w_n* / (is - c lam_n*).              S4, Sec. 3.2: Cauchy kernel

    w (H, 4, N/2), lam (N/2,)  complex    s (H, M), c (M,)  real, M frequencies    returns (H, 4, M)
    """
    R = (1j * s[:, None] - c * lam[:, None]).reciprocal()                   # (H, N/2, M)
    R_conj = (1j * s[:, None] - c * lam.conj()[:, None]).reciprocal()
    return w @ R + w.conj() @ R_conj                                        # (H, 4, M)


class S4(nn.Module):
    """S4: A = lam - P P* shared by all channels, dt and C per channel.      Gu et al. 2022, Alg. 1

    d_model  int  channels H
    d_state  int  states N, even: N/2 conjugate pairs; one number of each pair is stored

    (B, L, H) -> (B, L, H). As in the paper (App. C.3) the learned output matrix is
    C~ = C (1 - A'^L), so that the kernel needs no power of A'. C then depends on L: at another
    length the same weights are another model, and no error says so.
    """

    def __init__(self, d_model, d_state=64):
        super().__init__()
        lam, P, B = half_legs(d_state)
        # Re lam is not trained, as in the authors' models.
        self.register_buffer("log_minus_real", parameter(torch.log(-lam.real)).detach())
        self.imag = parameter(lam.imag)                                     # (N/2,)
        self.P = parameter(P)                                               # (N/2, 2)
        self.B = parameter(B)                                               # (N/2, 2)
        self.C = parameter(torch.randn(d_model, len(lam), dtype=torch.cfloat))    # C~, (H, N/2, 2)
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_dt = nn.Parameter(log_uniform(d_model))

    def matrices(self):
        """lam, P, B (N/2,), C~ (H, N/2), complex, one of each conjugate pair; dt (H,)."""
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        P, B, C = (torch.view_as_complex(v) for v in (self.P, self.B, self.C))
        return lam, P, B, C, self.log_dt.exp()

    def discrete(self, L):
        """A' (H, N, N), B' (H, N), C (H, N) by the bilinear rule.               S4, Eq. (3)

        A' = (1 - dt/2 A)^-1 (1 + dt/2 A),  B' = (1 - dt/2 A)^-1 dt B,  C = C~ (1 - A'^L)^-1.
        """
        *stored, dt = self.matrices()
        lam, P, B, C = (torch.cat([v, v.conj()], -1) for v in stored)       # both of each pair
        one = torch.eye(len(lam), dtype=lam.dtype, device=lam.device)
        half_dt_A = dt[:, None, None] / 2 * (torch.diag(lam) - P[:, None] * P.conj())
        A = torch.linalg.solve(one - half_dt_A, one + half_dt_A)
        B = torch.linalg.solve(one - half_dt_A, dt[:, None] * B)
        C = torch.linalg.solve(one - torch.matrix_power(A, L), C[:, None], left=False)[:, 0]
        return A, B, C

    def recurrence(self, u):
        """The definition, step by step: h_t = A' h_{t-1} + B' u_t, y_t = C h_t + D u_t."""
        A, B, C = self.discrete(u.shape[1])
        h = torch.zeros_like(B).expand(len(u), -1, -1)                      # (B, H, N)
        ys = []
        for u_t in u.unbind(1):
            h = torch.einsum("hmn,bhn->bhm", A, h) + B * u_t[..., None]
            ys.append((C * h).sum(-1).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def kernel(self, L):
        """K (H, L) with D in K_0, from its Fourier transform.             S4, Lemma C.3 and Alg. 1

        The DFT of K_l = C A'^l B' is K_hat(z) = C~ (1 - z A')^-1 B' at the L-th roots of unity,
        z = e^{-2ia} with a = pi k / L. The bilinear rule, 1 - z = 2i e^{-ia} sin a and
        1 + z = 2 e^{-ia} cos a turn it into
            K_hat = e^{ia} C~ (is - c A)^-1 B,    s = 2/dt sin a,  c = cos a.
        A = lam - P P* is diagonal but for rank one. With R = (is - c lam)^-1 Woodbury's identity is
            (is - c A)^-1 = R - R P c (1 + c P* R P)^-1 P* R.
        The lemma's 2 / (1 + z) = e^{ia} / c and R = (is/c - lam)^-1 do not exist at c = 0.
        """
        lam, P, B, C, dt = self.matrices()
        a = math.pi / L * torch.arange(L // 2 + 1, device=dt.device, dtype=dt.dtype)
        s = 2 / dt[:, None] * a.sin()                                       # (H, L/2+1)
        c = a.cos()                                                         # (L/2+1,)
        w = torch.stack(torch.broadcast_tensors(C * B, C * P, P.conj() * B, P.conj() * P), 1)
        CRB, CRP, PRB, PRP = cauchy(w, lam, s, c).unbind(1)     # C~ R B and so on, (H, L/2+1) each
        K_hat = torch.exp(1j * a) * (CRB - CRP * c * PRB / (1 + c * PRP))
        K = torch.fft.irfft(K_hat, L)                                       # (H, L)
        K[:, 0] += self.D
        return K

    def forward(self, u):
        return apply_kernel(self, u)


def vandermonde(c, log_a, L):
    """K_l = sum_n c_n a_n^l for l < L, a Vandermonde product.      S4D (Gu et al. 2022, 2206.11893)

    c, log_a  (H, N)  real or complex, |a| <= 1                returns (H, L)
    With l = q T + r the powers factor, a^l = a^(qT) a^r: about 2 sqrt(L) exponentials for
    each state instead of L, and one matrix product for the sum.
    """
    T = math.isqrt(L - 1) + 1
    r = torch.arange(T, device=c.device, dtype=log_a.real.dtype)
    qT = T * torch.arange(-(-L // T), device=c.device, dtype=log_a.real.dtype)
    left = c[:, None] * torch.exp(log_a[:, None] * qT[:, None])             # (H, L/T, N)
    right = torch.exp(log_a[:, :, None] * r)                                # (H, N, T)
    return (left @ right).flatten(1)[:, :L]                                 # (H, L)


class DSS(nn.Module):
    """K_l = Re sum_n C_n/lam_n softmax_l(lam_n dt l), diagonal A.     Gupta et al. 2022, Prop. 1(b)

    d_model  int  channels H
    d_state  int  states N, even: one number of each conjugate pair of hippo_legs' lam is stored

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
        """lam dt and C' = C lam^-1 (e^{lam dt} - 1) / (e^{lam dt L} - 1), complex, each (H, N/2).

        C' holds the softmax's denominator, a geometric sum: sum_r q^r = (q^L - 1) / (q - 1).
        """
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        lam_dt = lam * self.log_dt.exp()[:, None]
        C = torch.view_as_complex(self.C)
        return lam_dt, C / lam * torch.expm1(lam_dt) / torch.expm1(lam_dt * L)

    def recurrence(self, u):
        """The definition: h_t = e^{lam dt} h_{t-1} + u_t, y_t = Re(C' h_t) + D u_t, stepwise."""
        lam_dt, C = self.matrices(u.shape[1])
        A = lam_dt.exp()
        h = torch.zeros_like(C).expand(len(u), -1, -1)                      # (B, H, N/2)
        ys = []
        for u_t in u.unbind(1):
            h = A * h + u_t[..., None]
            ys.append((C * h).sum(-1).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def kernel(self, L):
        """K (H, L), K_l = Re sum_n C'_n e^{lam_n dt l}, with D in K_0."""
        lam_dt, C = self.matrices(L)
        K = vandermonde(C, lam_dt, L).real                                  # (H, L)
        K[:, 0] += self.D
        return K

    def forward(self, u):
        return apply_kernel(self, u)


class Scan(torch.autograd.Function):
    """h_t = a h_{t-1} + b_t for all t, by chunks: in about 2 sqrt(L) steps instead of L.

    S5's recurrence (Smith et al. 2023, Sec. 2.2); there a parallel scan computes it (App. H).

    a  (P,)  |a| <= 1    b  (B, L, P)    returns h (B, L, P), from h = 0; real or complex

    Backward: with g = dloss/dh, e_t = dloss/db_t obeys the same recurrence in reverse,
        e_t = conj(a) e_{t+1} + g_t,      dloss/da = sum_{b,t} conj(h_{t-1}) e_t.
    It is written out since autograd would keep every step.
    """

    @staticmethod
    def forward(ctx, a, b):
        L = b.shape[1]
        T = math.isqrt(L - 1) + 1                                           # steps of a chunk
        h = F.pad(b, (0, 0, 0, -L % T)).unflatten(1, (-1, T))       # a copy of b, (B, L/T, T, P)
        # 1. Step by step within all chunks at once, as if each began with h = 0.
        steps = h.unbind(2)
        for before, now in zip(steps, steps[1:]):                           # (B, L/T, P)
            now.addcmul_(a, before)
        # 2. Chunk by chunk: the k-th step gains a^k times the last state of the chunk before.
        powers = a.expand(T, -1).cumprod(0)                                 # a^1 .. a^T, (T, P)
        chunks = h.unbind(1)
        for before, now in zip(chunks, chunks[1:]):                         # (B, T, P)
            now.addcmul_(powers, before[:, -1:])
        h = h.flatten(1, 2)[:, :L]
        ctx.save_for_backward(a, h if ctx.needs_input_grad[0] else None)
        return h

    @staticmethod
    def backward(ctx, g):
        a, h = ctx.saved_tensors
        e = Scan.apply(a.conj_physical(), g.flip(1)).flip(1)
        da = (h[:, :-1].conj() * e[:, 1:]).sum((0, 1)) if ctx.needs_input_grad[0] else None
        return da, e


def pairs(z):
    """Complex (..., P) as real (..., 2P): Re and Im of each number side by side."""
    return torch.view_as_real(z).flatten(-2)


class S5(nn.Module):
    """S5: one system for all channels, diagonal A, computed by a scan.   Smith et al. 2023, Sec. 3

    d_model  int  channels H
    d_state  int  complex states P of the layer (Qi et al. take P = d_model)

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
        B = (torch.expm1(lam_dt) / lam)[:, None] * torch.view_as_complex(self.B)
        return lam_dt.exp(), B, torch.view_as_complex(self.C)

    def recurrence(self, u):
        """The definition, step by step."""
        A, B, C = self.matrices()
        h = torch.zeros(len(u), len(A), dtype=A.dtype, device=A.device)     # (B, P)
        ys = []
        for u_t in u.unbind(1):
            h = A * h + u_t.to(B.dtype) @ B.T
            ys.append((h @ C.T).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def forward(self, u):
        A, B, C = once(self, None, self.matrices)
        b = (u @ pairs(B.T)).to(B.real.dtype)                               # (B, L, 2P)
        h = Scan.apply(A, torch.view_as_complex(b.unflatten(-1, (-1, 2))))  # (B, L, P)
        # Re(c h) = (Re c, -Im c) . (Re h, Im h)
        return pairs(h) @ pairs(C.conj_physical()).T + self.D * u           # (B, L, H)


# --------------------------------------------------------------------------------------------------
# The network around it
# --------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Sequence map -> [AdS or control] -> Linear; (B, L, H) -> (B, L, H).           Qi et al. 2024

    Without AdS the block is linear in its input, as in the authors' models; their S5 has no Linear.
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
    """Images -> tokens -> LayerNorm -> n x { z = LayerNorm(z + Block(z)) } -> mean -> logits.

    in_channels, n_classes  int         colours of an image, classes
    d_model, d_state        int         channels H, states N of a sequence map
    n_layers, patch_size    int         blocks; a token is a patch of patch_size^2 pixels, by rows
    ads, control            str | None  see ads.middle
    ssm                     str         "s4" | "dss" | "s5"; give S5 d_state = d_model, as Qi et al.

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
        """Images -> tokens (B, L, H), an affine map. YOPO differentiates this layer alone."""
        size = self.patches.kernel_size[0]
        h, w = x.shape[-2:]
        if h % size or w % size:
            raise ValueError(f"patch size {size} does not divide an image of {h} x {w}")
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

def pgd(model, x, y, eps, alpha, steps):
    """argmax_{|x' - x|_inf <= eps} CE(model(x'), y), by ascent.         Madry et al. 2018, Sec. 2.1

    model   Module        images (B, C, h, w) in [0, 1] -> logits; a normalisation is part of it
    x       (B, C, h, w)  images in [0, 1]
    y       (B,)          labels
    eps     float         radius, pixel units (8/255, not 8)
    alpha   float         step, pixel units; or a list with one for each of the steps
    steps   int           gradient steps, from one uniform random start in the ball

    Returns x_adv, like x and detached: |x_adv - x|_inf <= eps, x_adv in [0, 1]. Weights, their
    gradients and train/eval mode are left as they were.  ValueError, FloatingPointError: ascend.
    """
    start = x + eps * (2 * torch.rand_like(x) - 1)
    loss = summed_cross_entropy(model, y)
    return ascend(model, loss, x, start=start, eps=eps, alpha=alpha, steps=steps)


def fgsm(model, x, y, eps):
    """x + eps sign grad_x CE(model(x), y), clamped to [0, 1].    Goodfellow et al. 2015, Sec. 4

    Arguments and result as pgd.  One step from x itself, no random start.
    """
    loss = summed_cross_entropy(model, y)
    return ascend(model, loss, x, start=x, eps=eps, alpha=eps, steps=1)


def summed_cross_entropy(model, y):
    """The function z -> CE(model(z), y), summed over the batch."""
    # Labels made in inference mode cannot be kept for a gradient; their copy can.
    return lambda z: F.cross_entropy(model(z), y.clone(), reduction="sum")


def ascend(model, loss, x, start, eps, alpha, steps):
    """x_{k+1} = Proj(x_k + alpha sign grad loss(x_k)), Proj on |x' - x|_inf <= eps and [0, 1].

    loss   function  points (B, C, h, w) -> a scalar, summed over the batch
    start  like x    the first point, projected before its gradient is taken; the rest as in pgd

    ValueError if x or eps leaves [0, 1], or if alpha lists another number of steps.
    FloatingPointError if a gradient is not finite: the sign of a NaN is 0, so the attack would stop
    unseen and report robustness. For a last gradient of exactly 0 see `tell_zero_gradients`.
    """
    if not ((x >= -1e-6) & (x <= 1 + 1e-6)).all():                          # but for rounding
        raise ValueError("images must lie in [0, 1]; normalisation belongs inside the model")
    if not 0 <= eps <= 1:
        raise ValueError(f"eps {eps} is outside [0, 1]; give pixel units, 8/255, not 8")
    step_sizes = list(alpha) if isinstance(alpha, (list, tuple)) else [alpha] * steps
    if len(step_sizes) != steps:
        raise ValueError(f"{len(step_sizes)} step sizes for {steps} steps; give one for each")
    if len(x) == 0:
        return x.detach().clone()
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        low = (x.detach() - eps).clamp(min=0)
        high = (x.detach() + eps).clamp(max=1)
        x_adv = start.detach().clamp(low, high)
        finite = torch.ones((), dtype=torch.bool, device=x.device)
        for step_size in step_sizes:
            x_adv.requires_grad_()
            grad, = torch.autograd.grad(loss(x_adv), x_adv)
            finite = finite & grad.isfinite().all()
            x_adv = (x_adv.detach() + step_size * grad.sign()).clamp(low, high)
    if not finite:
        raise FloatingPointError("the attack met a gradient that is not finite")
    if eps > 0 and len(step_sizes) > 0:
        tell_zero_gradients(model, grad)
    return x_adv.detach()


def tell_zero_gradients(model, grad):
    """Warns, once for each model, if more than a tenth of the images have a gradient of 0."""
    share = float((grad == 0).flatten(1).all(1).float().mean())
    if share > 0.1 and model not in warned_models:
        warned_models.add(model)
        warnings.warn(f"{share:.0%} of the images under attack have a gradient of exactly 0. They "
                      "do not move, which proves no robustness; for the cause see the repository's "
                      "python train.py --evaluate CKPT --checks", stacklevel=4)


warned_models = WeakSet()


def pgd_at_loss(model, x, y, eps, alpha, steps):
    """CE(model(pgd(...)), y), mean over the batch; arguments as pgd.  Madry et al. 2018, Eq. 2.1"""
    if len(x) == 0:
        raise ValueError("the loss of no images is not defined")
    return F.cross_entropy(model(pgd(model, x, y, eps, alpha, steps)), y)


def trades_loss(model, x, y, eps, alpha, steps, beta):
    """CE(model(x), y) + beta max_delta KL(p(x) || p(x + delta)).         Zhang et al. 2019, Alg. 1

    beta  float  weight of the robust term, no unit; 0 is standard training.  Others as in pgd.
    p = softmax(model(.)); the paper's 1 / lambda is beta. KL as in its code. Mean over the batch.
    """
    if len(x) == 0:
        raise ValueError("the loss of no images is not defined")
    x_adv = kl_pgd(model, x, eps, alpha, steps)
    logits = model(x)
    log_p = logits.log_softmax(1)
    log_q = model(x_adv).log_softmax(1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)     # KL(p || q)
    return F.cross_entropy(logits, y) + beta * kl


def kl_pgd(model, x, eps, alpha, steps):
    """argmax_{|x' - x|_inf <= eps} KL(p(x) || p(x')), by ascent; arguments and result as pgd.

    It starts from x + 0.001 normal noise: at x itself the KL is flat.
    """
    with frozen(model), torch.inference_mode(False):
        with torch.no_grad():
            log_p = model(x).log_softmax(1)

        def loss(z):
            return F.kl_div(model(z).log_softmax(1), log_p, reduction="sum", log_target=True)
        start = x + 1e-3 * torch.randn_like(x)
        return ascend(model, loss, x, start=start, eps=eps, alpha=alpha, steps=steps)


def accuracy(model, batches, attack=None):
    """Share of images classified correctly, and still so after attack(model, x, y); in [0, 1].

    batches  iterable of x (B, C, h, w), y (B,)
    attack   function (model, x, y) -> x_adv, or None; it gets only what is still classified
             correctly, since x itself lies in the ball: a clean error counts as broken
    ValueError without images, FloatingPointError if a logit is not finite.
    """
    def classified(x, y):
        with torch.no_grad():
            logits = model(x)
        if not logits.isfinite().all():
            raise FloatingPointError("the model returned a logit that is not finite")
        return logits.argmax(1) == y

    right = 0
    total = 0
    with frozen(model):
        for x, y in batches:
            if len(x) == 0:
                continue
            total += len(x)
            y = y.view(len(x))                                              # labels (B, 1), too
            ok = classified(x, y)
            if attack is not None and ok.any():
                x, y = x[ok], y[ok]
                ok = classified(attack(model, x, y), y)
            right += int(ok.sum())
    if total == 0:
        raise ValueError("accuracy of no images is not defined")
    return right / total


def param_groups(model, weight_decay):
    """Groups for AdamW: weights of Linear and Conv layers decay, all other parameters do not.

    Decay would pull log dt to 0, so dt to 1: ten times S4's largest at the start. In Mamba the
    Linear layers `select` and `step` do decay. In the authors' models all parameters decay.
    """
    decaying = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            decaying |= {w for name, w in module.named_parameters() if "bias" not in name}
    decayed = [w for w in model.parameters() if w in decaying]
    rest = [w for w in model.parameters() if w not in decaying]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0}]


# --- Within an attack weights are constants: each kernel is made once ---

@contextmanager
def frozen(model):
    """Within it: eval mode, no gradients of weights, each kernel made once. Afterwards: as before.

    Every attack and `accuracy` run in it. It may be nested, and left by an exception. Two threads
    must not attack one model at a time: each would restore what the other has set.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradient_flags = [(w, w.requires_grad) for w in model.parameters()]
    entered = [module for module in model.modules() if not hasattr(module, "kept")]
    try:
        for module in entered:
            module.kept = {}                                            # what `once` has made
        model.eval().requires_grad_(False)
        yield
    finally:
        for module in entered:
            vars(module).pop("kept", None)
        for module, training in modes:
            module.training = training
        for w, wants_gradient in gradient_flags:
            w.requires_grad_(wants_gradient)


def once(module, key, make):
    """make(), a function of the module's weights; within `frozen` a key's result serves again.

    All is made anew when a weight is another tensor or was changed in place: its address or version
    counter differs. (.data and fused optimisers move neither: keep them out of `frozen`.) Nothing
    is kept while a weight wants a gradient or torch.compile traces. Autocast would cut bits.
    """
    # The replicas that nn.DataParallel makes on GPUs list no parameters: there weights is empty.
    weights = [*module.parameters(), *module.buffers()]
    with torch.autocast(weights[0].device.type if weights else "cuda", enabled=False):
        if (torch.compiler.is_compiling() or not weights or not hasattr(module, "kept")
                or any(w.requires_grad or w.is_inference() for w in weights)):
            return make()
        state = [(w.data_ptr(), w._version) for w in weights]
        with torch.inference_mode(False):                               # an attack may follow
            if module.kept.get("state") != state:
                # While these are held no other tensor can take their addresses.
                module.kept = {"state": state, "held": [w.detach() for w in weights]}
            if key not in module.kept:
                module.kept[key] = make()
        return module.kept[key]


# --- The demo ---

def demo(parser, make_model):
    """PGD-AT on MNIST, quicker than the paper's, without and with AdS; prints a table."""
    parser.add_argument("--data-dir", type=os.path.expanduser, default="./data",
                        help="folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        from torchvision.datasets import MNIST
        sets = [MNIST(args.data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:                      # no torchvision, no network, damaged files
        print(f"no MNIST in {args.data_dir} ({error!r}): put torchvision's files there, name their "
              "folder by --data-dir, or run python train.py --dataset synthetic", file=sys.stderr)
        sys.exit(2)
    train, test = (TensorDataset(s.data[:n, None] / 255, s.targets[:n])
                   for s, n in zip(sets, (6000, 1000)))
    eps, alpha = 0.1, 0.04
    print(f"MNIST: {len(train)} training, {len(test)} test images, PGD-AT, eps {eps}, step {alpha}")
    print("             parameters   clean   PGD-10")
    for ads in (None, "relu"):
        torch.manual_seed(0)
        model = make_model(args, ads).to(args.device)
        optimizer = torch.optim.AdamW(param_groups(model, weight_decay=2e-4), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
        for epoch in range(args.epochs):
            # eps grows over half the epochs: at full eps a pure S4 never begins to learn.
            ramp = min(1.0, 2 * (epoch + 0.5) / args.epochs)
            for x, y in DataLoader(train, batch_size=64, shuffle=True):
                x, y = x.to(args.device), y.to(args.device)
                loss = pgd_at_loss(model, x, y, ramp * eps, ramp * alpha, steps=3)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        batches = [(x.to(args.device), y.to(args.device)) for x, y in DataLoader(test, 250)]
        clean = accuracy(model, batches)
        robust = accuracy(model, batches, partial(pgd, eps=eps, alpha=alpha, steps=10))
        size = sum(w.numel() for w in model.parameters())
        name = "with AdS" if ads else "without AdS"
        print(f"{name:12}{size:11,d}  {clean:6.1%}  {robust:6.1%}", flush=True)

# --- end of the shared text ---


def build(args, ads):
    return Classifier(1, 10, d_model=64, d_state=64, n_layers=2, patch_size=7, ads=ads,
                      ssm=args.ssm)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ssm", choices=("s4", "dss", "s5"), default="s4", help="sequence map")
    demo(parser, build)


if __name__ == "__main__":
    main()
