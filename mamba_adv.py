# SPDX-License-Identifier: MIT
"""Adversarial training of a data-dependent state space model: Mamba, with Adaptive Scaling.

    python mamba_adv.py                  # MNIST if ./data has it, else drawn digits
    python mamba_adv.py --epochs 8 --data-dir DIR

    MNIST: 3000 training and 1000 test images, PGD-AT, eps 0.100
                 parameters   clean   PGD-10
    without AdS      21,962   57.3%   36.9%
    with AdS         38,602   54.5%   36.7%

82 s on a 2-core x86-64 CPU, torch 2.14.1, one seed. On drawn digits it stays at chance in this
short a run: give it --epochs.

Papers     AdS    Qi et al. 2024, arXiv 2406.05532          PGD   Madry et al. 2018, 1706.06083
           Mamba  Gu and Dao 2023, arXiv 2312.00752         TRADES  Zhang et al. 2019, 1901.08573
                                                            FGSM  Goodfellow et al. 2015, 1412.6572
Glossary   B batch, L tokens, H = d_model channels, d = 2 H inner channels, N = d_state states of
           each; b batch of the scan
           u (B, L, d) input of the scan, y (B, L, d) its output, x image, delta its perturbation
           A B C D the paper's matrices, dt step size, h state (B, d, N)
           eps radius and alpha step of an attack in pixel units ([0, 1]; 8/255, not 8)
Not here   other data sets, FreeAT, YOPO, checkpoints, strong evaluation: train.py. Dropout,
           warm-up, input normalisation: not in the protocol. Generation of text token by token.

The whole program is this file and ads.py: copy the two.
"""
import argparse
import math
import os
import shutil
import sysconfig
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ads import middle

try:
    import triton                       # comes with PyTorch's builds for GPUs, and is used there
    from triton import language as tl
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
            or not any(map(shutil.which, compilers))
            or not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))):
        raise ImportError("older than what was tested, or without what it compiles its calls with")
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)


# --------------------------------------------------------------------------------------------------
# The sequence map: h_t = e^{dt_t A} h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t; dt, B, C from u
# --------------------------------------------------------------------------------------------------

def selective_scan_loop(u, dt, A, B, C, D):
    """The definition, step by step.                               Gu and Dao 2023, Algorithm 2

    u   (b, L, d)  input           dt  (b, L, d)  step sizes, > 0
    A   (d, N)     negative        B   (b, L, N)  input matrix    C  (b, L, N)  output matrix
    D   (d,)       skip            returns y (b, L, d)

    A by zero-order hold, e^{dt A}; B by Euler's rule, dt B, as in Mamba's code (Eq. (4): ZOH).
    """
    h, ys = torch.zeros_like(A).expand(len(u), -1, -1), []                  # (b, d, N)
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        ys.append((h * C_t[:, None]).sum(-1) + D * u_t)
    return torch.stack(ys, 1)                                               # (b, L, d)


def first_only():
    """RuntimeError where the gradient itself is to be differentiated: autograd would leave out what
    passes through the scan (once_differentiable does not notice in autograd.grad)."""
    if torch.is_grad_enabled():
        raise RuntimeError("the scan has no second derivative; take selective_scan_loop for that")


class SelectiveScan(torch.autograd.Function):
    """The same map and its gradient with memory O(b L d): states are kept at chunk borders only and
    computed again, chunk by chunk, in backward (Mamba, Sec. 3.3.2, "recomputation").

    Let a_t = e^{dt_t A}, w_t = dt_t u_t, g_t = dloss/dy_t and e_t = dloss/dh_t. From
        h_t = a_t h_{t-1} + w_t B_t,    y_t = sum_n C_t h_t + D u_t
    the chain rule gives, running backwards in time,
        e_t  = a_{t+1} e_{t+1} + C_t g_t                       (b, N, d)
        dC_t = sum_d g_t h_t        dB_t = sum_d w_t e_t        dw_t = sum_n B_t e_t
        q_t  = e_t a_t h_{t-1}   (the gradient of dt_t A)       dA = sum_{b,t} dt_t q_t
        du_t = dt_t dw_t + D g_t    ddt_t = u_t dw_t + sum_n A q_t    dD = sum_{b,t} g_t u_t
    No exponential of a positive number and no division occurs: nothing can overflow.
    """
    SIZE = 2 ** 18                                                          # states of one chunk

    @staticmethod
    def chunks(A, *inputs):
        """Inputs (b, L, .) time first and cut in T steps; buffers (T, b, N, d) for all chunks."""
        (N, d), (b, L, _) = A.shape, inputs[0].shape
        size = SelectiveScan.SIZE * (64 if A.is_cuda else 1)                # there: fewer launches
        T = max(1, min(L, size // (b * N * d)))
        inputs = [v.transpose(0, 1).contiguous().split(T) for v in inputs]
        return list(zip(*inputs)), [A.new_empty(T + 1, b, N, d) for _ in range(3)]

    @staticmethod
    def sum_n(v, x):
        """sum_n v_n x_n: (T, b, N), (T, b, N, d) -> (T, b, d). Autocast would cut its bits."""
        with torch.autocast(x.device.type, enabled=False):
            return (v[:, :, None] @ x).squeeze(2)

    @staticmethod
    def states(h, dt, w, A, B, a, hs):
        """Fills a_t (T, b, N, d) and the states before and after, hs (T + 1, b, N, d), from h."""
        a, hs = a[:len(dt)], hs[:len(dt) + 1]
        torch.mul(dt[:, :, None], A, out=a).exp_()
        torch.mul(w[:, :, None], B[..., None], out=hs[1:])
        hs[0] = h
        for before, a_t, now in zip(hs.unbind(0), a.unbind(0), hs[1:].unbind(0)):
            now.addcmul_(a_t, before)
        return a, hs

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D):
        A_t = A.T.contiguous()                                              # (N, d)
        chunks, (a, hs, _) = SelectiveScan.chunks(A_t, dt, dt * u, B, C)
        h, borders, ys = A.new_zeros(len(u), *A_t.shape), [], []            # (b, N, d)
        for dt_c, w_c, B_c, C_c in chunks:
            borders.append(h)
            hs_c = SelectiveScan.states(h, dt_c, w_c, A_t, B_c, a, hs)[1]
            ys.append(SelectiveScan.sum_n(C_c, hs_c[1:]))                   # (T, b, d)
            h = hs_c[-1].clone()
        ctx.save_for_backward(u, dt, A, B, C, D, *borders)
        return torch.cat(ys).transpose(0, 1).contiguous().addcmul_(D, u)

    @staticmethod
    def backward(ctx, g):
        first_only()
        u, dt, A, B, C, D, *borders = ctx.saved_tensors
        A_t, need = A.T.contiguous(), ctx.needs_input_grad
        chunks, (a, hs, es) = SelectiveScan.chunks(A_t, dt, dt * u, B, C, g)
        carry, dA, out = torch.zeros_like(borders[0]), torch.zeros_like(A_t), []
        for h, (dt_c, w_c, B_c, C_c, g_c) in zip(reversed(borders), reversed(chunks)):
            a_c, hs_c = SelectiveScan.states(h, dt_c, w_c, A_t, B_c, a, hs)
            dC = torch.mul(hs_c[1:], g_c[:, :, None], out=es[1:len(hs_c)]).sum(-1)     # (T, b, N)
            e_c = torch.mul(g_c[:, :, None], C_c[..., None], out=es[:len(g_c)])    # (T, b, N, d)
            e_c[-1] += carry                                                # a_{t+1} e_{t+1}
            e, a_t = e_c.unbind(0), a_c.unbind(0)
            for t in range(len(e) - 2, -1, -1):
                e[t].addcmul_(a_t[t + 1], e[t + 1])
            carry = a_t[0] * e[0]
            dw = SelectiveScan.sum_n(B_c, e_c)                              # (T, b, d)
            q = torch.mul(a_c, hs_c[:-1], out=hs_c[:-1]).mul_(e_c)          # (T, b, N, d)
            dB = e_c.mul_(w_c[:, :, None]).sum(-1)                          # (T, b, N)
            if need[2]:
                dA += torch.mul(q, dt_c[:, :, None], out=a_c).sum((0, 1))
            out.append((dw, q.mul_(A_t).sum(2), dB, dC))
        dw, ddt, dB, dC = (torch.cat(v[::-1]).transpose(0, 1) for v in zip(*out))
        dD = (g * u).sum((0, 1)) if need[5] else None
        return torch.addcmul(dt * dw, D, g), ddt.addcmul_(u, dw), dA.T, dB, dC, dD


def compiled(kernel):
    """kernel, made for a GPU by Triton at its first launch; as it is where there is no Triton."""
    return triton.jit(kernel) if triton else kernel


@compiled
def share(d, N, BLOCK: tl.constexpr, STATES: tl.constexpr):
    """What a program does: image i, a block k of the d channels, all their states n, kept (N, d).

    Returns i, k, k < d, n, n < N, the places of the states in (N, d), and which of them exist.
    """
    k, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    real_k, real_n = k < d, n < N
    return (tl.program_id(0).to(tl.int64), k, real_k, n, real_n, n[:, None] * d + k[None],
            real_n[:, None] & real_k[None])


@compiled
def scan_forward(u, dt, A, B, C, D, y, borders, L, d, N,
                 chunks: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr):
    """One image, BLOCK channels: the loop, its state in registers; keeps every T-th state.

    Past the end all inputs are read as 0, so dt = 0 leaves the state as it is.
    """
    i, k, real_k, n, real_n, nk, real = share(d, N, BLOCK, STATES)
    A, D = tl.load(A + nk, real, 0.0), tl.load(D + k, real_k, 0.0)
    h = tl.zeros_like(A)                                                    # (N, BLOCK)
    for chunk in range(chunks):
        tl.store(borders + (i * chunks + chunk) * N * d + nk, h, real)
        for s in range(T):
            t = chunk * T + s
            at_k, here_k = (i * L + t) * d + k, real_k & (t < L)
            at_n, here_n = (i * L + t) * N + n, real_n & (t < L)
            u_t, dt_t = tl.load(u + at_k, here_k, 0.0), tl.load(dt + at_k, here_k, 0.0)
            B_t, C_t = tl.load(B + at_n, here_n, 0.0), tl.load(C + at_n, here_n, 0.0)
            h = tl.exp(dt_t * A) * h + (dt_t * u_t) * B_t[:, None]
            tl.store(y + at_k, tl.sum(C_t[:, None] * h, 0) + D * u_t, here_k)


@compiled
def scan_backward(u, dt, A, B, C, D, g, borders, before, du, ddt, dA, dB, dC, L, d, N,
                  chunks: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr):
    """SelectiveScan's formulas, chunk by chunk from the last: its states once more into `before`
    (b, T, N, d), then e_t backwards. Parts of sums: dA (b, N, d), dB and dC (d / BLOCK, b, L, N).
    """
    i, k, real_k, n, real_n, nk, real = share(d, N, BLOCK, STATES)
    A, D = tl.load(A + nk, real, 0.0), tl.load(D + k, real_k, 0.0)
    part = (tl.program_id(1) * tl.num_programs(0) + i) * L                  # of dB and dC
    carry, sum_A = tl.zeros_like(A), tl.zeros_like(A)                       # a_{t+1} e_{t+1}
    for later in range(chunks):
        chunk = chunks - 1 - later
        h = tl.load(borders + (i * chunks + chunk) * N * d + nk, real, 0.0)
        for s in range(T):
            t = chunk * T + s
            at_k, here_k = (i * L + t) * d + k, real_k & (t < L)
            at_n, here_n = (i * L + t) * N + n, real_n & (t < L)
            u_t, dt_t = tl.load(u + at_k, here_k, 0.0), tl.load(dt + at_k, here_k, 0.0)
            B_t = tl.load(B + at_n, here_n, 0.0)
            tl.store(before + (i * T + s) * N * d + nk, h, real)
            h = tl.exp(dt_t * A) * h + (dt_t * u_t) * B_t[:, None]
        tl.debug_barrier()                                                  # all have written
        for s in range(T):
            t = chunk * T + T - 1 - s
            at_k, here_k = (i * L + t) * d + k, real_k & (t < L)
            at_n, here_n = (i * L + t) * N + n, real_n & (t < L)
            u_t, dt_t = tl.load(u + at_k, here_k, 0.0), tl.load(dt + at_k, here_k, 0.0)
            B_t, C_t = tl.load(B + at_n, here_n, 0.0), tl.load(C + at_n, here_n, 0.0)
            g_t = tl.load(g + at_k, here_k, 0.0)
            ah = tl.exp(dt_t * A)                                           # a_t (N, BLOCK)
            e = carry + C_t[:, None] * g_t
            carry = ah * e
            ah *= tl.load(before + (i * T + T - 1 - s) * N * d + nk, real, 0.0)
            w, q, dw = dt_t * u_t, e * ah, tl.sum(B_t[:, None] * e, 0)
            sum_A += dt_t * q
            tl.store(du + at_k, dt_t * dw + D * g_t, here_k)
            tl.store(ddt + at_k, u_t * dw + tl.sum(A * q, 0), here_k)
            tl.store(dB + (part + t) * N + n, tl.sum(w * e, 1), here_n)
            tl.store(dC + (part + t) * N + n, tl.sum(g_t * (ah + w * B_t[:, None]), 1), here_n)
        tl.debug_barrier()                                                  # all have read
    tl.store(dA + i * N * d + nk, sum_A, real)


class TritonScan(torch.autograd.Function):
    """SelectiveScan on a GPU, one launch each way instead of some for each step: the same formulas,
    each program with the states of BLOCK channels of one image in registers (Mamba, Sec. 3.3.2)."""
    T, BLOCK, WARPS = 32, 32, 2                                             # fastest on an H200

    @staticmethod
    def launch(kernel, tensors, u, N):
        """kernel over images and blocks of channels, on the device of u (b, L, d)."""
        (b, L, d), T = u.shape, TritonScan
        with torch.cuda.device_of(u):
            kernel[b, -(-d // T.BLOCK)](*tensors, L, d, N, -(-L // T.T), T.T, T.BLOCK,
                                        triton.next_power_of_2(N), num_warps=T.WARPS)

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D):
        (b, L, d), N = u.shape, A.shape[1]
        inputs = [v.contiguous() for v in (u, dt, A.T, B, C, D)]
        y, borders = torch.empty_like(inputs[0]), u.new_empty(b, -(-L // TritonScan.T), N, d)
        TritonScan.launch(scan_forward, (*inputs, y, borders), u, N)
        ctx.save_for_backward(*inputs, borders)
        return y

    @staticmethod
    def backward(ctx, g):
        first_only()
        u, dt, A, B, C, D, borders = ctx.saved_tensors
        (b, L, d), N, g = u.shape, len(A), g.contiguous()
        before, dA = u.new_empty(b, TritonScan.T, N, d), u.new_empty(b, N, d)
        du, ddt = torch.empty_like(u), torch.empty_like(u)
        dB, dC = u.new_empty(2, -(-d // TritonScan.BLOCK), b, L, N)
        TritonScan.launch(scan_backward, (u, dt, A, B, C, D, g, borders, before,
                                          du, ddt, dA, dB, dC), u, N)
        return du, ddt, dA.sum(0).T, dB.sum(0), dC.sum(0), (g * u).sum((0, 1))


def selective_scan(u, dt, A, B, C, D):
    """selective_scan_loop(...), the same numbers: its gradient in closed form, linear memory."""
    u, dt, B, C = (v.to(A.dtype) for v in (u, dt, B, C))                    # autocast: not in here
    dt, A = dt.expand_as(u), A.expand(u.shape[2], -1)                       # what the loop takes
    B, C = (v.expand(*u.shape[:2], A.shape[1]) for v in (B, C))
    if u.is_cuda and triton:
        return TritonScan.apply(u, dt, A, B, C, D)
    n = len(u) if u.is_cuda else max(1, SelectiveScan.SIZE // (8 * A.numel()))     # fit the cache
    parts = zip(*(v.split(n) for v in (u, dt, B, C)))
    return torch.cat([SelectiveScan.apply(u, dt, A, B, C, D) for u, dt, B, C in parts])


class Mamba(nn.Module):
    """Linear -> causal conv -> selective scan, gated -> [AdS] -> Linear.  Gu and Dao 2023, Sec. 3.4

    d_model       int         channels H; inside there are d = 2 H
    d_state       int         states N of each inner channel
    ads, control  str | None  see ads.middle: in front of the output Linear, on d channels

    (B, L, H) -> (B, L, H). Kernel size 4, rank of dt ceil(H / 16), A = -(1 .. N): Mamba's defaults.
    """

    def __init__(self, d_model, d_state=16, ads=None, control=None):
        super().__init__()
        d, self.rank, self.N = 2 * d_model, -(-d_model // 16), d_state
        self.into = nn.Linear(d_model, 2 * d, bias=False)                   # -> u and gate
        self.conv = nn.Conv1d(d, d, 4, groups=d, padding=3)
        self.select = nn.Linear(d, self.rank + 2 * d_state, bias=False)     # -> dt (low rank), B, C
        self.step = nn.Linear(self.rank, d)                                 # low rank -> dt
        self.log_minus_A = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.middle = middle(d, ads, control)
        self.out = nn.Linear(d, d_model, bias=False)
        dt = torch.exp(math.log(1e-3) + torch.rand(d) * (math.log(1e-1) - math.log(1e-3)))
        nn.init.uniform_(self.step.weight, -self.rank ** -0.5, self.rank ** -0.5)
        with torch.no_grad():
            self.step.bias.copy_(dt + torch.log(-torch.expm1(-dt)))         # softplus(bias) = dt

    def parameters_of(self, u):
        """dt (B, L, d) > 0, A (d, N) < 0, B and C (B, L, N), the parameters for u (B, L, d)."""
        dt, B, C = self.select(u).split([self.rank, self.N, self.N], -1)
        return F.softplus(self.step(dt)), -torch.exp(self.log_minus_A), B, C

    def forward(self, z):
        u, gate = self.into(z).chunk(2, -1)                                 # (B, L, d) each
        u = F.silu(self.conv(u.transpose(1, 2))[..., :z.shape[1]].transpose(1, 2))
        y = selective_scan(u, *self.parameters_of(u), self.D)               # (B, L, d)
        return self.out(self.middle(y * F.silu(gate)))                      # (B, L, H)


# --------------------------------------------------------------------------------------------------
# What a perturbation can do to a data-dependent map
# --------------------------------------------------------------------------------------------------

def scan_errors(clean, attacked, A, h=0.0):
    """e_t = h'_t - h_t = a'_t e_{t-1} + (a'_t - a_t) h_{t-1} + (b'_t - b_t).      Derived here, P3

    clean, attacked  (u, dt, B)  what the scan is fed, as in selective_scan_loop
    A                (d, N)      negative
    h                float       every state before the first step, in both

    with a_t = e^{dt_t A}, b_t = dt_t u_t B_t. Yields h_t, h'_t, each from its own recurrence, and
    the three terms, all (b, d, N), for t = 1, 2, ...
    With fixed parameters the second term is 0. Here no bound of it follows from the weights: it is
    as large as the stored state. But 0 < a'_t < 1, so |e_t| <= sum_{k <= t} (|second| + |third|):
    the error grows with the state and with t, at most linearly in each; never exponentially.
    """
    h = h_adv = torch.full_like(A, h).expand(len(clean[0]), -1, -1)         # (b, d, N)
    for step in zip(*(v.unbind(1) for v in (*clean, *attacked))):
        (a, b), (a_adv, b_adv) = ((torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, None])
                                  for u, dt, B in (step[:3], step[3:]))     # (b, d, N) each
        terms = a_adv * (h_adv - h), (a_adv - a) * h, b_adv - b
        h, h_adv = a * h + b, a_adv * h_adv + b_adv
        yield h, h_adv, *terms


def local_gain(layer, u, outputs):
    """sum_{s,j} |dy_{L,i} / du_{s,j}|: the l_inf gain near u of the last token.   Derived here, P3

    layer  function  (B, L, H) -> (B, L, H')         outputs  indices i

    Returns (B, len(outputs)). To first order |dy_i| <= this |du|_inf, reached by the signs of the
    derivative; of a layer with fixed parameters it is the gain, whatever u is.
    """
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        y = layer(u)[:, -1].sum(0)                                          # images do not mix
        return torch.stack([torch.autograd.grad(y[i], u, retain_graph=True)[0].abs().sum((1, 2))
                            for i in outputs], 1)


# --------------------------------------------------------------------------------------------------
# The network around it
# --------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """Images -> tokens -> n x { z = LayerNorm(z + Mamba(z)) } -> mean over tokens -> logits.

    in_channels, n_classes  int         colours of an image, classes
    d_model, d_state        int         channels H, states N of an inner channel
    n_layers, patch_size    int         blocks; a token is a patch of patch_size^2 pixels, by rows
    ads, control            str | None  see ads.middle

    Images (B, C, h, w) in [0, 1] -> logits (B, n_classes).  ValueError if patches do not fill them.
    """

    def __init__(self, in_channels, n_classes, d_model=128, d_state=16, n_layers=4, patch_size=1,
                 ads=None, control=None):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, d_model, patch_size, patch_size)
        self.norm = nn.LayerNorm(d_model)
        self.blocks = nn.ModuleList(Mamba(d_model, d_state, ads, control) for _ in range(n_layers))
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
    parser.add_argument("--data-dir", default="./data", help="folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    args = parser.parse_args()
    demo(lambda ads: Classifier(1, 10, d_model=32, n_layers=2, patch_size=7, ads=ads),
         args.data_dir, args.epochs, n_train=3000)


if __name__ == "__main__":
    main()
