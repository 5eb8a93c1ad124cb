# SPDX-License-Identifier: MIT
"""Mamba's selective scan as two kernels for a GPU; mamba_adv.py takes TritonScan where it is there.

The mathematics, and the names a, w, g, e, q, stand in mamba_adv.SelectiveScan.
ImportError where Triton is older than 3.6, or lacks what it compiles its calls with.
"""
import os
import shutil
import sysconfig

import torch
import triton
from triton import language as tl

COMPILERS = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
HEADER = os.path.join(sysconfig.get_path("include"), "Python.h")
VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
if VERSION < (3, 6) or not any(map(shutil.which, COMPILERS)) or not os.path.exists(HEADER):
    raise ImportError("Triton >= 3.6, a C compiler and Python.h are needed for the kernels")


@triton.jit
def share(d, N, BLOCK: tl.constexpr, STATES: tl.constexpr):
    """What a program does: image i, a block k of the d channels, all their states n, kept (N, d).

    Returns i, k, k < d, n, n < N, the places of the states in (N, d), and which of them exist.
    """
    k, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    real_k, real_n = k < d, n < N
    return (tl.program_id(0).to(tl.int64), k, real_k, n, real_n, n[:, None] * d + k[None],
            real_n[:, None] & real_k[None])


@triton.jit
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


@triton.jit
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
        if torch.is_grad_enabled():
            raise RuntimeError("the scan has no second derivative; take selective_scan_loop for "
                               "that")
        u, dt, A, B, C, D, borders = ctx.saved_tensors
        (b, L, d), N, g = u.shape, len(A), g.contiguous()
        before, dA = u.new_empty(b, TritonScan.T, N, d), u.new_empty(b, N, d)
        du, ddt = torch.empty_like(u), torch.empty_like(u)
        dB, dC = u.new_empty(2, -(-d // TritonScan.BLOCK), b, L, N)
        TritonScan.launch(scan_backward, (u, dt, A, B, C, D, g, borders, before,
                                          du, ddt, dA, dB, dC), u, N)
        return du, ddt, dA.sum(0).T, dB.sum(0), dC.sum(0), (g * u).sum((0, 1))
