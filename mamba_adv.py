# SPDX-License-Identifier: MIT
"""Adversarial training of a data-dependent state space model: Mamba, with Adaptive Scaling.

    python mamba_adv.py                  # torchvision downloads MNIST to ./data if it is not there
    python mamba_adv.py --epochs 8 --data-dir DIR

The first prints, in 121 CPU seconds (2-core x86-64 machine, torch 2.14.1, one thread, one seed):

    MNIST: 6000 training, 1000 test images, PGD-AT, eps 0.1, step 0.04
                 parameters   clean   PGD-10
    without AdS      18,890   87.0%   57.3%
    with AdS         35,530   90.2%   64.9%

Papers     AdS    Qi et al. 2024, arXiv 2406.05532          PGD   Madry et al. 2018, 1706.06083
           Mamba  Gu and Dao 2023, arXiv 2312.00752         TRADES  Zhang et al. 2019, 1901.08573
                                                            FGSM  Goodfellow et al. 2015, 1412.6572
Glossary   B batch, L tokens, H = d_model channels, d = 2 H inner channels, N = d_state states of
           each; in the scan, where B is a matrix, the batch size is b
           z tokens, u (b, L, d) input of the scan, y its output, x image, delta its perturbation
           A B C D the paper's matrices, dt step size, h state (b, d, N)
           eps radius and alpha step of an attack in pixel units ([0, 1]; 8/255, not 8)
Not here   other data sets, FreeAT, YOPO, checkpoints, strong evaluation: train.py. A GPU's own
           kernel for the scan: lab/triton_scan.py, taken where it is there. Dropout, warm-up, input
           normalisation: not in the protocol. Generation of text token by token.

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

try:
    from lab.triton_scan import TritonScan
except ImportError:
    TritonScan = None


# --------------------------------------------------------------------------------------------------
# The sequence map: h_t = e^{dt_t A} h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t; dt, B, C from u
# --------------------------------------------------------------------------------------------------

def selective_scan_loop(u, dt, A, B, C, D):
    """The definition, step by step.                               Gu and Dao 2023, Algorithm 2

    u   (b, L, d)  input           dt  (b, L, d)  step sizes, > 0
    A   (d, N)     negative        B   (b, L, N)  input matrix    C  (b, L, N)  output matrix
    D   (d,)       skip            returns y (b, L, d)

    A by zero-order hold, e^{dt A}; B by Euler's rule, dt B, as in Mamba's code, not as in Eq. (4).
    """
    h = torch.zeros_like(A).expand(len(u), -1, -1)                          # (b, d, N)
    ys = []
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        ys.append((h * C_t[:, None]).sum(-1) + D * u_t)
    return torch.stack(ys, 1)                                               # (b, L, d)


def selective_scan(u, dt, A, B, C, D):
    """What selective_scan_loop returns, with the gradient in closed form and less memory."""
    u, dt, B, C = (v.to(A.dtype) for v in (u, dt, B, C))                    # bf16 is too coarse
    if len(u) == 0:
        return u                                            # no images, no chunks
    # Sizes of 1 are expanded, as the loop broadcasts them.
    dt = dt.expand_as(u)
    A = A.expand(u.shape[2], -1)
    B, C = (v.expand(*u.shape[:2], A.shape[1]) for v in (B, C))
    if u.is_cuda and TritonScan is not None:
        return TritonScan.apply(u, dt, A, B, C, D)
    # On a CPU the batch is split, so that 8 steps of a part's states fit the cache.
    n = len(u) if u.is_cuda else max(1, SelectiveScan.SIZE // (8 * A.numel()))
    parts = zip(*(v.split(n) for v in (u, dt, B, C)))
    return torch.cat([SelectiveScan.apply(u, dt, A, B, C, D) for u, dt, B, C in parts])


class SelectiveScan(torch.autograd.Function):
    """The same map and its gradient. Only the states at the borders of chunks are kept; backward
    computes the others again, chunk by chunk (Mamba, Sec. 3.3.2, "recomputation").

    Let a_t = e^{dt_t A}, w_t = dt_t u_t, g_t = dloss/dy_t and e_t = dloss/dh_t. From
        h_t = a_t h_{t-1} + w_t B_t,    y_t = sum_n C_t h_t + D u_t
    the chain rule gives, running backwards in time,
        e_t  = a_{t+1} e_{t+1} + C_t g_t                       (b, N, d)
        dC_t = sum_d g_t h_t        dB_t = sum_d w_t e_t        dw_t = sum_n B_t e_t
        q_t  = e_t a_t h_{t-1}   (the gradient of dt_t A)       dA = sum_{b,t} dt_t q_t
        du_t = dt_t dw_t + D g_t    ddt_t = u_t dw_t + sum_n A q_t    dD = sum_{b,t} g_t u_t
    dA, dB_t, ddt_t and so on are gradients of the loss. A state is (b, N, d), the loop's (b, d, N).
    No exponential of a positive number and no division occurs: no power of a_t can overflow.

    All chunks share three buffers (T + 1, b, N, d): with new ones for each, peak memory grew.
    """
    SIZE = 2 ** 18                              # states of one chunk, T b N d: 1 MiB in float32

    @staticmethod
    def chunks(A, *inputs):
        """Inputs (b, L, .), time first, cut in pieces of T steps; and the three buffers."""
        N, d = A.shape
        b, L, _ = inputs[0].shape
        # On a GPU larger chunks: there the number of launches counts.
        size = SelectiveScan.SIZE * (64 if A.is_cuda else 1)
        T = max(1, min(L, size // (b * N * d)))
        pieces = [v.transpose(0, 1).contiguous().split(T) for v in inputs]
        return list(zip(*pieces)), [A.new_empty(T + 1, b, N, d) for _ in range(3)]

    @staticmethod
    def sum_over_states(v, x):
        """sum_n v_n x_n: (T, b, N), (T, b, N, d) -> (T, b, d). Autocast would cut its bits."""
        with torch.autocast(x.device.type, enabled=False):
            return (v[:, :, None] @ x).squeeze(2)

    @staticmethod
    def states(h, dt, w, A, B, a, hs):
        """a_t (T, b, N, d) and the states before and after, hs (T + 1, b, N, d), from h; written
        into the buffers a and hs."""
        a = a[:len(dt)]
        hs = hs[:len(dt) + 1]
        torch.mul(dt[:, :, None], A, out=a).exp_()
        torch.mul(w[:, :, None], B[..., None], out=hs[1:])
        hs[0] = h
        for before, a_t, now in zip(hs.unbind(0), a.unbind(0), hs[1:].unbind(0)):
            now.addcmul_(a_t, before)
        return a, hs

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D):
        A = A.T.contiguous()                                                # (N, d) from here on
        pieces, (a_buffer, h_buffer, _) = SelectiveScan.chunks(A, dt, dt * u, B, C)
        h = A.new_zeros(len(u), *A.shape)                                   # (b, N, d)
        borders, ys = [], []
        for dt_c, w_c, B_c, C_c in pieces:
            borders.append(h)
            _, hs = SelectiveScan.states(h, dt_c, w_c, A, B_c, a_buffer, h_buffer)
            ys.append(SelectiveScan.sum_over_states(C_c, hs[1:]))           # (T, b, d)
            h = hs[-1].clone()
        ctx.save_for_backward(u, dt, A, B, C, D, *borders)
        return torch.cat(ys).transpose(0, 1).contiguous().addcmul_(D, u)

    @staticmethod
    def backward(ctx, g):
        # Autograd would leave the scan out; once_differentiable does not notice in autograd.grad.
        if torch.is_grad_enabled():
            raise RuntimeError("the scan has no second derivative; take selective_scan_loop for "
                               "that")
        u, dt, A, B, C, D, *borders = ctx.saved_tensors
        pieces, (a_buffer, h_buffer, e_buffer) = SelectiveScan.chunks(A, dt, dt * u, B, C, g)
        carry = torch.zeros_like(borders[0])                                # a_{t+1} e_{t+1}
        dA = torch.zeros_like(A)
        found = []                                                          # of each chunk
        for h, (dt_c, w_c, B_c, C_c, g_c) in zip(reversed(borders), reversed(pieces)):
            T = len(dt_c)
            a, hs = SelectiveScan.states(h, dt_c, w_c, A, B_c, a_buffer, h_buffer)
            # Buffers are used again, so the order counts: e overwrites dC's product, q the states,
            # dA's product a, dB's product e.
            dC = torch.mul(hs[1:], g_c[:, :, None], out=e_buffer[:T]).sum(-1)   # (T, b, N)
            e = torch.mul(g_c[:, :, None], C_c[..., None], out=e_buffer[:T])    # (T, b, N, d)
            e[-1] += carry
            for t in range(T - 2, -1, -1):
                e[t].addcmul_(a[t + 1], e[t + 1])
            carry = a[0] * e[0]
            dw = SelectiveScan.sum_over_states(B_c, e)                      # (T, b, d)
            q = torch.mul(a, hs[:-1], out=hs[:-1]).mul_(e)                  # (T, b, N, d)
            dB = e.mul_(w_c[:, :, None]).sum(-1)                            # (T, b, N)
            if ctx.needs_input_grad[2]:
                dA += torch.mul(q, dt_c[:, :, None], out=a).sum((0, 1))
            ddt = q.mul_(A).sum(2)                                          # u dw follows below
            found.append((dw, ddt, dB, dC))
        dw, ddt, dB, dC = (torch.cat(v[::-1]).transpose(0, 1) for v in zip(*found))
        dD = (g * u).sum((0, 1)) if ctx.needs_input_grad[5] else None
        return torch.addcmul(dt * dw, D, g), ddt.addcmul_(u, dw), dA.T, dB, dC, dD


class Mamba(nn.Module):
    """Linear([AdS](scan(SiLU(conv u)) * SiLU(gate))), u, gate = Linear(z).   Gu and Dao, Sec. 3.4

    d_model       int         channels H; inside there are d = 2 H
    d_state       int         states N of each inner channel
    ads, control  str | None  see ads.middle: before the output Linear, on d channels; AdS is ours

    (B, L, H) -> (B, L, H). Kernel size 4, rank of dt ceil(H / 16), A = -(1 .. N): Mamba's defaults.

    here    in Mamba's code    here    in Mamba's code    here         in Mamba's code
    into    in_proj (x, z)     select  x_proj             log_minus_A  A_log
    conv    conv1d             step    dt_proj            out          out_proj
    """

    def __init__(self, d_model, d_state=16, ads=None, control=None):
        super().__init__()
        d = 2 * d_model
        self.rank = -(-d_model // 16)
        self.N = d_state
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
        """What u (B, L, d) selects: dt (B, L, d) > 0, A (d, N) < 0, B and C (B, L, N)."""
        low_rank, B, C = self.select(u).split([self.rank, self.N, self.N], -1)
        return F.softplus(self.step(low_rank)), -torch.exp(self.log_minus_A), B, C

    def forward(self, z):
        u, gate = self.into(z).chunk(2, -1)                                 # (B, L, d) each
        u = F.silu(self.conv(u.mT)[..., :z.shape[1]].mT)                    # causal: the first L
        y = selective_scan(u, *self.parameters_of(u), self.D)               # (B, L, d)
        return self.out(self.middle(y * F.silu(gate)))                      # (B, L, H)


# --------------------------------------------------------------------------------------------------
# The network around it
# --------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """Images -> tokens -> LayerNorm -> n x { z = LayerNorm(z + Mamba(z)) } -> mean -> logits.

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
    return Classifier(1, 10, d_model=32, d_state=8, n_layers=2, patch_size=7, ads=ads)


def main():
    demo(argparse.ArgumentParser(description=__doc__.splitlines()[0]), build)


if __name__ == "__main__":
    main()
