# SPDX-License-Identifier: MIT
"""Adversarial training of fixed-parameter state space models: S4, DSS and S5, with Adaptive Scaling.

    python s4_adv.py                     # MNIST if ./data has it, else drawn digits; @MINUTES@
    python s4_adv.py --ssm dss --data-dir DIR

Papers     AdS      Qi et al. 2024, arXiv 2406.05532        PGD     Madry et al. 2018, arXiv 1706.06083
           S4       Gu et al. 2022, arXiv 2111.00396        TRADES  Zhang et al. 2019, arXiv 1901.08573
           DSS      Gupta et al. 2022, arXiv 2203.14343     FGSM    Goodfellow et al. 2015, 1412.6572
           S5       Smith et al. 2023, arXiv 2208.04933     HiPPO   Gu et al. 2020, arXiv 2008.07669
Glossary   B batch, L tokens, H = d_model channels, N = d_state states of one channel (S5: of the layer)
           u (B, L, H) input of the map, y (B, L, H) its output, x image, delta its perturbation
           A B C D the paper's matrices, dt step size, K convolution kernel, lam eigenvalues of A
           eps radius and alpha step of an attack in pixel units ([0, 1]; 8/255, not 8)
Not here   other data sets, FreeAT, YOPO, checkpoints, strong evaluation: train.py. Dropout, warm-up,
           input normalisation: the protocol has none. Bidirectional or multi-head SSMs.

The whole program is this file and ads.py: copy the two.
"""
import argparse
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ads import middle


# ---------------------------------------------------------------------------------------------
# The sequence map: x_t = A' x_{t-1} + B' u_t,  y_t = Re(C x_t) + D u_t  with A', B', C, D fixed
# ---------------------------------------------------------------------------------------------

def hippo_legs(N):
    """Eigenvalues and low-rank terms of HiPPO-LegS, A = V (lam - P P*) V*.     S4, Thm 1 and App. C.1

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


def log_uniform(size, low=1e-3, high=1e-1):
    """log dt with dt log-uniform in [low, high], one per channel or state.         S4, App. (training)"""
    return math.log(low) + torch.rand(size) * (math.log(high) - math.log(low))


def pairs(z):
    """Complex (...) -> real Parameter (..., 2): optimisers and checkpoints see real numbers only."""
    return nn.Parameter(torch.view_as_real(z.to(torch.complex64).resolve_conj()).clone())


def vandermonde(c, log_lam, L):
    """K_l = sum_n c_n lam_n^l for l = 0 .. L-1.                              S4D (2206.11893), Eq. (7)

    c, log_lam  (H, N)  real or complex, |lam| <= 1            returns (H, L)
    With l = q T + r the powers factor, lam^l = lam^(qT) lam^r: about 2 sqrt(L) exponentials for each
    state instead of L, and one matrix product for the sum.
    """
    T = math.isqrt(L - 1) + 1
    r = torch.arange(T, device=c.device, dtype=log_lam.real.dtype)
    q = T * torch.arange(-(-L // T), device=c.device, dtype=log_lam.real.dtype)
    left = c[:, None] * torch.exp(log_lam[:, None] * q[:, None])            # (H, Q, N)
    right = torch.exp(log_lam[:, :, None] * r)                              # (H, N, T)
    return (left @ right).flatten(1)[:, :L]                                 # (H, L)


def convolve(u, K_hat):
    """y_t = sum_{s <= t} K_s u_{t-s}, by FFT of length 2L, so that nothing wraps around.

    u (B, L, H), K_hat (H, L+1) = rfft(K, 2L)                                    returns (B, L, H)
    """
    L = u.shape[1]
    u_hat = torch.fft.rfft(u.transpose(1, 2), 2 * L)                        # (B, H, L+1)
    return torch.fft.irfft(u_hat * K_hat, 2 * L)[..., :L].transpose(1, 2)   # (B, L, H)


class S4(nn.Module):
    """S4: A = lam - P P* shared by all channels, one dt and C per channel.        Gu et al. 2022, Alg. 1

    d_model  int  channels H
    d_state  int  states N, even: N/2 conjugate pairs are stored

    (B, L, H) -> (B, L, H). As in the paper (App. C.3) the learned output matrix is C~ = C (1 - A'^L),
    which spares the power A'^L; so the model belongs to the length that it was trained at.
    The real part of lam stays at its initial value, as in the authors' models.
    """

    def __init__(self, d_model, d_state=64):
        super().__init__()
        if d_state % 2:
            raise ValueError(f"d_state {d_state} is odd; S4 stores conjugate pairs, so give an even number")
        lam, P, B, _ = (z[d_state // 2:] for z in hippo_legs(d_state))      # imag > 0
        self.register_buffer("log_minus_real", torch.log(-lam.real).float())
        self.imag = nn.Parameter(lam.imag.float())                          # (N/2,)
        self.P, self.B = pairs(P), pairs(B)                                 # (N/2, 2)
        self.C = pairs(torch.randn(d_model, d_state // 2, dtype=torch.cfloat))     # C~, (H, N/2, 2)
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_dt = nn.Parameter(log_uniform(d_model))

    def matrices(self):
        """lam, P, B (N/2,), C~ (H, N/2), complex; dt (H,)."""
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        return (lam, *map(torch.view_as_complex, (self.P, self.B, self.C)), self.log_dt.exp())

    def kernel(self, L):
        """K (H, L), D included in K_0: inverse DFT of C~ (1 - z A')^-1 B' at the L-th roots of unity z.

        With a = 2(1-z)/dt, b = 1+z the bilinear rule gives K^ = 2 C~ (a - b A)^-1 B, and Woodbury
            (a - b lam + b P P*)^-1 = R - R P b (1 + b P* R P)^-1 P* R,   R = 1/(a - b lam).
        Written so, nothing is singular at z = -1. Each sum runs over conjugate pairs:
            w/(a - b lam) + w*/(a - b lam*) = 2 (a Re w - b Re(w lam*)) / (a^2 - 2ab Re lam + b^2 |lam|^2)
        """
        lam, P, B, C, dt = self.matrices()
        k = torch.arange(L // 2 + 1, device=dt.device, dtype=dt.dtype)
        z = torch.polar(torch.ones_like(k), -2 * math.pi / L * k)           # (L/2+1,)
        a, b = 2 * (1 - z) / dt[:, None], 1 + z                             # (H, L/2+1), (L/2+1,)
        R = a[:, None]                                                      # (H, N/2, L/2+1)
        R = 2 / (R * R - 2 * R * b * lam.real[:, None] + (b * lam.abs()[:, None]) ** 2)
        w = torch.stack([C * B, C * P, (P.conj() * B).expand_as(C), (P.conj() * P).expand_as(C)], 1)
        w = torch.cat([w.real, (w * lam.conj()).real], 1).to(R.dtype)       # (H, 8, N/2)
        plus, minus = (w @ R).unflatten(1, (2, 4)).unbind(1)                # (H, 4, L/2+1)
        CB, CP, PB, PP = (a[:, None] * plus - b * minus).unbind(1)          # (H, L/2+1)
        K = torch.fft.irfft(2 * (CB - CP * b * PB / (1 + b * PP)), L)       # (H, L)
        return torch.cat([K[:, :1] + self.D[:, None], K[:, 1:]], 1)

    def recurrence(self, u):
        """The definition: A' = (1 - dt/2 A)^-1 (1 + dt/2 A), B' = (1 - dt/2 A)^-1 dt B, step by step."""
        lam, P, B, C, dt = self.matrices()
        lam, P, B, C = (torch.cat([v, v.conj()], -1) for v in (lam, P, B, C))
        A = torch.diag(lam) - P[:, None] * P.conj()                         # (N, N)
        one = torch.eye(len(lam), dtype=A.dtype, device=A.device)
        A, half = dt[:, None, None] * A, 0.5
        B = torch.linalg.solve(one - half * A, dt[:, None] * B)             # (H, N)
        A = torch.linalg.solve(one - half * A, one + half * A)              # (H, N, N)
        C = torch.linalg.solve(one - torch.matrix_power(A, u.shape[1]), C[:, None], left=False)[:, 0]
        x, ys = torch.zeros_like(B).expand(len(u), -1, -1), []              # (B, H, N)
        for u_t in u.unbind(1):
            x = torch.einsum("hmn,bhn->bhm", A, x) + B * u_t[..., None]
            ys.append((C * x).sum(-1).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def forward(self, u):
        L = u.shape[1]
        return convolve(u, once(self, L, lambda: torch.fft.rfft(self.kernel(L), 2 * L)))


class DSS(nn.Module):
    """DSS (softmax): diagonal A, K_l = Re sum_n C_n/lam_n softmax_l(lam_n dt l).   Gupta et al. 2022, Prop. 1(b)

    d_model  int  channels H
    d_state  int  states N, even: N/2 complex numbers, the eigenvalues of HiPPO-LegS with imag > 0

    (B, L, H) -> (B, L, H). The softmax runs over l < L, so the kernel depends on the length.
    """

    def __init__(self, d_model, d_state=64):
        super().__init__()
        if d_state % 2:
            raise ValueError(f"d_state {d_state} is odd; DSS starts from conjugate pairs, so give an even number")
        lam = hippo_legs(d_state)[0][d_state // 2:]
        self.log_minus_real = nn.Parameter(torch.log(-lam.real).float())    # (N/2,)
        self.imag = nn.Parameter(lam.imag.float())                          # (N/2,)
        self.C = pairs(torch.randn(d_model, d_state // 2, dtype=torch.cfloat))     # (H, N/2, 2)
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_dt = nn.Parameter(log_uniform(d_model))

    def matrices(self, L):
        """lam dt (H, N/2) and C lam^-1 (e^{lam dt} - 1) / (e^{lam dt L} - 1) (H, N/2), complex."""
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        lam_dt = lam * self.log_dt.exp()[:, None]
        C = torch.view_as_complex(self.C)
        return lam_dt, C / lam * torch.expm1(lam_dt) / torch.expm1(lam_dt * L)

    def kernel(self, L):
        """K (H, L), D included in K_0. The softmax's sum is geometric: sum_r q^r = (q^L - 1) / (q - 1)."""
        lam_dt, C = self.matrices(L)
        K = vandermonde(C, lam_dt, L).real                                  # (H, L)
        return torch.cat([K[:, :1] + self.D[:, None], K[:, 1:]], 1)

    def recurrence(self, u):
        """The definition: x_t = e^{lam dt} x_{t-1} + u_t, y_t = Re(C' x_t) + D u_t, step by step."""
        lam_dt, C = self.matrices(u.shape[1])
        A, x, ys = lam_dt.exp(), torch.zeros_like(C).expand(len(u), -1, -1), []    # (B, H, N/2)
        for u_t in u.unbind(1):
            x = A * x + u_t[..., None]
            ys.append((C * x).sum(-1).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def forward(self, u):
        L = u.shape[1]
        return convolve(u, once(self, L, lambda: torch.fft.rfft(self.kernel(L), 2 * L)))


class Scan(torch.autograd.Function):
    """x_t = a x_{t-1} + b_t in parallel over chunks; only x is kept.           S5, App. H; Blelloch 1990

    a  (P,)       |a| <= 1, real or complex            b  (B, L, P)            x  (B, L, P)

    Backward: with g = dloss/dx, the same recurrence run in reverse gives dloss/db,
        e_t = conj(a) e_{t+1} + g_t,      dloss/da = sum_{b,t} conj(x_{t-1}) e_t.
    """

    @staticmethod
    def run(a, b):
        """Scan inside all chunks of T = sqrt(L) at once, then carry across chunks: 2 sqrt(L) steps."""
        L = b.shape[1]
        T = math.isqrt(L - 1) + 1
        x = F.pad(b, (0, 0, 0, -L % T)).unflatten(1, (-1, T))               # (B, L/T, T, P)
        power = [a]                                                         # a^1 .. a^T
        for t in range(1, T):
            x[:, :, t].addcmul_(a, x[:, :, t - 1])
            power.append(power[-1] * a)
        carry = x[:, :, -1].clone()                                         # (B, L/T, P)
        for c in range(1, carry.shape[1]):
            carry[:, c].addcmul_(power[-1], carry[:, c - 1])
        x[:, 1:].addcmul_(torch.stack(power), carry[:, :-1, None])
        return x.flatten(1, 2)[:, :L]

    @staticmethod
    def forward(ctx, a, b):
        x = Scan.run(a, b)
        ctx.save_for_backward(a, x)
        return x

    @staticmethod
    def backward(ctx, g):
        a, x = ctx.saved_tensors
        e = Scan.run(a.conj().resolve_conj(), g.flip(1)).flip(1)
        grad_a = (x[:, :-1].conj() * e[:, 1:]).sum((0, 1)) if ctx.needs_input_grad[0] else None
        return grad_a, e


class S5(nn.Module):
    """S5: one MIMO system for all channels, diagonal A, zero-order hold, parallel scan. Smith et al. 2023

    d_model  int  channels H
    d_state  int  complex states P of the layer (the paper here: P = d_model)

    (B, L, H) -> (B, L, H): x_t = A' x_{t-1} + B' u_t, y_t = Re(C x_t) + D u_t     (Eq. 2, Sec. 3.2),
    A' = e^{lam dt}, B' = lam^-1 (e^{lam dt} - 1) B                                (Eq. 6), dt per state.
    """

    def __init__(self, d_model, d_state=128):
        super().__init__()
        lam, _, _, V = hippo_legs(d_state)                                  # (P,), (P, P)
        B = torch.randn(d_state, d_model, dtype=V.real.dtype) / math.sqrt(d_model)
        C = torch.randn(d_model, d_state, dtype=V.dtype) / math.sqrt(d_state)
        self.log_minus_real = nn.Parameter(torch.log(-lam.real).float())    # (P,)
        self.imag = nn.Parameter(lam.imag.float())                          # (P,)
        self.B, self.C = pairs(V.mH @ B.to(V.dtype)), pairs(C @ V)          # (P, H, 2), (H, P, 2)
        self.D = nn.Parameter(torch.rand(d_model))
        self.log_dt = nn.Parameter(log_uniform(d_state))

    def matrices(self):
        """A' (P,), B' (P, H), C (H, P), complex."""
        lam = torch.complex(-torch.exp(self.log_minus_real), self.imag)
        lam_dt = lam * self.log_dt.exp()
        B, C = map(torch.view_as_complex, (self.B, self.C))
        return lam_dt.exp(), (torch.expm1(lam_dt) / lam)[:, None] * B, C

    def kernel(self, L):
        """K (L, H, H) with K_l = Re(C A'^l B'), D included in K_0: y_t = sum_s K_s u_{t-s}."""
        A, B, C = self.matrices()
        powers = A ** torch.arange(L, device=A.device)[:, None]             # (L, P)
        K = torch.einsum("hp,lp,pi->lhi", C, powers, B).real                # (L, H, H)
        return torch.cat([K[:1] + torch.diag(self.D), K[1:]])

    def recurrence(self, u):
        """The definition, step by step."""
        A, B, C = self.matrices()
        x, ys = torch.zeros(len(u), len(A), dtype=A.dtype, device=A.device), []    # (B, P)
        for u_t in u.unbind(1):
            x = A * x + u_t.to(B.dtype) @ B.T
            ys.append((x @ C.T).real + self.D * u_t)
        return torch.stack(ys, 1)                                           # (B, L, H)

    def forward(self, u):
        A, B, C = once(self, None, self.matrices)
        B = torch.view_as_real(B.T.contiguous()).flatten(1)                 # (H, 2P), real pairs
        C = torch.view_as_real(C.conj().resolve_conj()).flatten(1)          # (H, 2P): Re(C x)
        x = torch.view_as_complex((u @ B).unflatten(-1, (-1, 2)))           # (B, L, P)
        x = torch.view_as_real(Scan.apply(A, x)).flatten(2)                 # (B, L, 2P)
        return torch.addcmul(x @ C.T, self.D, u)                            # (B, L, H)


# ---------------------------------------------------------------------------------------------
# The network around it
# ---------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Sequence map -> [AdS or control] -> Linear.                     Qi et al. 2024; (B, L, H) -> (B, L, H)

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
    n_layers, patch_size    int         blocks; a token is a patch of patch_size^2 pixels, row by row
    ads, control            str | None  see ads.middle
    ssm                     str         "s4" | "dss" | "s5"

    Images (B, C, h, w) in [0, 1] -> logits (B, n_classes).  ValueError if patches do not fill the image.
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
        """Images -> tokens (B, L, H): the one affine layer that YOPO differentiates again and again."""
        P = self.patches.kernel_size[0]
        if x.shape[-1] % P or x.shape[-2] % P:
            raise ValueError(f"patch size {P} does not divide an image of {x.shape[-2]} x {x.shape[-1]}")
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

@contextmanager
def frozen(model):
    """Within it the weights are constants: eval mode, no weight gradients, each kernel computed once.

    Every attack runs in it, and so does evaluation. It may be nested; mode, requires_grad and kernels
    are as before afterwards, also when an exception is raised.
    """
    modules, weights = list(model.modules()), list(model.parameters())
    before = [(m, m.training, getattr(m, "memo", None)) for m in modules]
    wanted = [w.requires_grad for w in weights]
    try:
        model.eval().requires_grad_(False)
        for m, _, memo in before:
            m.memo = {} if memo is None else memo
        yield
    finally:
        for m, training, memo in before:
            m.training, m.memo = training, memo
        for w, wants in zip(weights, wanted):
            w.requires_grad_(wants)


def once(module, key, make):
    """make(), a function of the module's weights; inside `frozen` its first result is used again.

    The weights' version counters are part of the key: a weight changed in place makes a new result.
    """
    memo = getattr(module, "memo", None)
    if memo is None:
        return make()
    key = (key, *((id(w), w._version) for w in module.parameters()))
    if key not in memo:
        memo.clear()
        memo[key] = make()
    return memo[key]


def ascend(model, loss, x, start, eps, alpha, steps):
    """x_{k+1} = Proj(x_k + alpha sign grad loss(x_k)), Proj on |x' - x|_inf <= eps and [0, 1].

    loss   function   points (B, C, h, w) -> a scalar, summed over the batch
    start  like x     the first point, projected before its gradient is taken
    The other arguments are those of pgd.  FloatingPointError if a gradient is not finite: the sign of
    a NaN is 0, so the attack would silently stop and report robustness.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv = start.detach().clamp(low, high)
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    with frozen(model), torch.enable_grad():
        for _ in range(steps):
            x_adv.requires_grad_()
            grad, = torch.autograd.grad(loss(x_adv), x_adv)
            finite = finite & grad.isfinite().all()
            x_adv = (x_adv.detach() + alpha * grad.sign()).clamp(low, high)
    if not finite:
        raise FloatingPointError("the attack met a gradient that is not finite")
    return x_adv.detach()


def fgsm(model, x, y, eps):
    """x + eps sign grad_x CE(model(x), y), clamped to [0, 1].       Goodfellow et al. 2015, Sec. 4; no random start"""
    return ascend(model, lambda z: F.cross_entropy(model(z), y, reduction="sum"), x, x, eps, eps, 1)


def pgd(model, x, y, eps, alpha, steps):
    """max_{|delta|_inf <= eps} CE(model(x + delta), y) by projected gradient ascent.    Madry et al. 2018, Sec. 2.1

    x       (B, C, h, w)  images in [0, 1]
    y       (B,)          labels
    eps     float         radius, pixel units (8/255, not 8)
    alpha   float         step, pixel units
    steps   int           gradient steps, from one uniform random start in the ball

    Returns x_adv, like x and detached: |x_adv - x|_inf <= eps, x_adv in [0, 1]. Weights, their
    gradients and train/eval mode are left as they were.  FloatingPointError: see ascend.
    """
    start = x + eps * (2 * torch.rand_like(x) - 1)
    return ascend(model, lambda z: F.cross_entropy(model(z), y, reduction="sum"),
                  x, start, eps, alpha, steps)


def pgd_at_loss(model, x, y, eps, alpha, steps):
    """CE(model(x_adv), y), x_adv = pgd(...), mean over the batch; arguments as pgd.     Madry et al. 2018, Eq. (2.1)"""
    return F.cross_entropy(model(pgd(model, x, y, eps, alpha, steps)), y)


def trades_loss(model, x, y, eps, alpha, steps, beta):
    """CE(model(x), y) + beta max_delta KL(p(x) || p(x + delta)), mean over the batch.   Zhang et al. 2019, Eq. (5)

    beta  float  weight of the robust term, no unit; 0 is standard training.  Others as in pgd.
    The maximum is sought from x + 0.001 normal noise, since the KL's gradient vanishes at x itself.
    """
    def kl(log_q, log_p, reduction):
        return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)     # KL(p || q)

    with frozen(model):
        with torch.no_grad():
            target = model(x).log_softmax(1)
        x_adv = ascend(model, lambda z: kl(model(z).log_softmax(1), target, "sum"),
                       x, x + 1e-3 * torch.randn_like(x), eps, alpha, steps)
    logits = model(x)
    robust = kl(model(x_adv).log_softmax(1), logits.log_softmax(1), "batchmean")
    return F.cross_entropy(logits, y) + beta * robust


def accuracy(model, batches, attack=None):
    """Share of (x, y) in batches that is classified correctly, and still is after attack(model, x, y).

    batches  iterable of x (B, C, h, w), y (B,)
    attack   function (model, x, y) -> x_adv, or None; it gets only what is still classified correctly,
             since x itself lies in the ball: a clean error counts as broken

    Returns a float in [0, 1].  ValueError without images, FloatingPointError if a logit is not finite.
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
            n += len(y)
            ok = hits(x, y)
            if attack is not None and ok.any():
                x, y = x[ok], y[ok]
                ok = hits(attack(model, x, y), y)
            right += int(ok.sum())
    if n == 0:
        raise ValueError("accuracy of no images is not defined")
    return right / n


def param_groups(model, weight_decay):
    """Two groups for AdamW: the weights of Linear and Conv layers decay; SSM parameters, norms, biases do not.

    lam, dt and their kin are no weights of a linear layer: decay would pull the time constants of the
    system to values that mean nothing (S4, App. on training; the authors' models decay all alike).
    """
    decay = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    groups = [[p for p in model.parameters() if (id(p) in decay) == wanted] for wanted in (True, False)]
    return [{"params": groups[0], "weight_decay": weight_decay},
            {"params": groups[1], "weight_decay": 0.0}]


def drawn_digits(n, seed, size=28):
    """n faint seven-segment digits on noise, ten classes: data without a download.

    n, seed, size  int   images, random seed, height and width in pixels
    Returns images (n, 1, size, size) uint8 and labels (n,) int64. Position, size, slant, rotation, stroke,
    contrast (0.25 to 0.5 of the range) and noise vary; the faint strokes keep a standard model breakable.
    """
    ends = torch.tensor([[0, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 2], [0, 2, 1, 2], [0, 1, 0, 2],
                         [0, 0, 0, 1], [0, 1, 1, 1]]) - torch.tensor([0.5, 1.0, 0.5, 1.0])
    lit = "abcdef bc abged abgcd fgbc afgcd afgedc abc abcdefg abcdfg".split()
    lit = torch.tensor([[s in digit for s in "abcdefg"] for digit in lit])      # (10, 7)
    g = torch.Generator().manual_seed(seed)
    grid = (torch.arange(size) + 0.5) / size - 0.5
    images, labels = [], torch.randint(10, (n,), generator=g)
    for y in labels.split(500):
        def uniform(low, high):
            return low + (high - low) * torch.rand(len(y), 1, 1, 1, generator=g)
        angle, slant, scale = uniform(-0.25, 0.25), uniform(-0.3, 0.3), uniform(0.22, 0.32)
        px, py = grid - uniform(-0.12, 0.12), grid[:, None] - uniform(-0.1, 0.1)
        px, py = angle.cos() * px + angle.sin() * py, angle.cos() * py - angle.sin() * px
        px, py = (px + slant * py) / scale, py / scale                      # (b, 1, size, size)
        x0, y0, x1, y1 = (e.view(1, 7, 1, 1) for e in ends.unbind(1))
        t = ((px - x0) * (x1 - x0) + (py - y0) * (y1 - y0)).clamp(0, 1)     # (b, 7, size, size)
        far = torch.hypot(px - x0 - t * (x1 - x0), py - y0 - t * (y1 - y0))
        far = torch.where(lit[y][..., None, None], far, 9.0).amin(1, keepdim=True)
        ink = uniform(0.25, 0.5) * torch.sigmoid((uniform(0.08, 0.25) - far) / 0.05)
        x = uniform(0.1, 0.4) + ink + 0.05 * torch.randn(ink.shape, generator=g)
        images.append((x.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images), labels


def demo(classifier, data_dir, epochs):
    """PGD-AT of a small classifier(ads=...) on MNIST (or drawn digits), without and with AdS; prints a table."""
    eps, alpha, steps, n_train, n_test = 0.1, 0.025, 5, 8000, 1000
    try:
        from torchvision.datasets import MNIST
        sets = [MNIST(data_dir, train=t, download=False) for t in (True, False)]
        name, sets = "MNIST", [(s.data[:, None], s.targets) for s in sets]
    except (ImportError, RuntimeError):
        name, eps, alpha = f"drawn digits (no MNIST in {data_dir})", 8 / 255, 2 / 255
        sets = [drawn_digits(n_train, 0), drawn_digits(n_test, 1)]
    (x, y), (x_test, y_test) = ((x[:n] / 255, y[:n]) for (x, y), n in zip(sets, (n_train, n_test)))
    print(f"{name}: {len(x)} training, {len(x_test)} test images; PGD-AT, eps {eps:.3g}, {epochs} epochs")
    print("             parameters   clean   PGD-10")
    for ads in (None, "relu"):
        torch.manual_seed(0)
        model = classifier(ads=ads)
        optimizer = torch.optim.AdamW(param_groups(model, 2e-4), lr=3e-3)
        batches = -(-len(x) // 64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        for step in range(epochs * batches):
            if step % batches == 0:
                order = torch.randperm(len(x)).split(64)
            ramp = min(1.0, step / (epochs * batches / 2))                  # eps grows: a linear block
            i = order[step % batches]                                       # learns nothing at full eps
            loss = pgd_at_loss(model, x[i], y[i], ramp * eps, ramp * alpha, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        test = list(zip(x_test.split(250), y_test.split(250)))
        robust = accuracy(model, test, lambda *args: pgd(*args, eps, alpha, 10))
        print(f"{'with AdS' if ads else 'without AdS':12} {sum(p.numel() for p in model.parameters()):10,d}"
              f"  {accuracy(model, test):6.1%}  {robust:6.1%}")

# --- end of the shared text ---


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ssm", choices=("s4", "dss", "s5"), default="s4", help="sequence map (default: s4)")
    parser.add_argument("--data-dir", default="./data", help="folder that holds MNIST/raw (default: ./data)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images (default: 4)")
    args = parser.parse_args()
    demo(lambda ads: Classifier(1, 10, d_model=64, d_state=64, n_layers=2, patch_size=4, ads=ads, ssm=args.ssm),
         args.data_dir, args.epochs)


if __name__ == "__main__":
    main()
