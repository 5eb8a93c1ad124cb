# SPDX-License-Identifier: MIT
"""Adversarial training of state space model plus attention: Mega, with Adaptive Scaling.

    python attention_adv.py              # MNIST if ./data has it, else drawn digits
    python attention_adv.py --epochs 8 --data-dir DIR

    MNIST: 3000 training and 1000 test images, PGD-AT, eps 0.100
                 parameters   clean   PGD-10
    without AdS      39,532   25.3%   17.8%
    with AdS         56,172   27.0%   20.7%

77 s on a 2-core x86-64 CPU, torch 2.14.1, one seed. On drawn digits it stays at chance in this
short a run: give it --epochs.

Papers     AdS    Qi et al. 2024, arXiv 2406.05532          PGD   Madry et al. 2018, 1706.06083
           Mega   Ma et al. 2023, arXiv 2209.10655          TRADES  Zhang et al. 2019, 1901.08573
                                                            FGSM  Goodfellow et al. 2015, 1412.6572
Glossary   B batch, L tokens, H = d_model channels, N = d_state states of a channel's average,
           V = d_hidden channels of values, Z = d_attn channels of queries and keys
           u (B, L, H) input of a map, y its output, x image, delta its perturbation
           q = 1 - p a decay of the average (p the paper's alpha, a its delta), K its kernel
           eps radius and alpha step of an attack in pixel units ([0, 1]; 8/255, not 8)
Not here   other data sets, FreeAT, YOPO, checkpoints, strong evaluation: train.py. Dropout,
           warm-up, input normalisation: not in the protocol. Chunking, Laplace attention.

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
# The sequence map: a moving average (a real, fixed, two-sided SSM), then attention over its outputs
# --------------------------------------------------------------------------------------------------

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


class EMA(nn.Module):
    """Two-sided damped moving average with N states per channel.          Ma et al. 2023, Sec. 3.1

    d_model  int  channels H
    d_state  int  states N of each channel and direction

    (B, L, H) -> (B, L, H): one pass forward, one backward in time, their sum plus omega u.
    It is a diagonal SSM: A' = q = 1 - p a in (0, 1), B' = p beta, C = gamma / sqrt(N), D = omega.
    """

    def __init__(self, d_model, d_state=16):
        super().__init__()
        size = (2 * d_model, d_state)                                       # forward, then backward
        # Names as in Mega's code: the paper's alpha is p, its delta (damping) a, its eta gamma.
        self.delta = nn.Parameter(0.2 * torch.randn(size))                  # p = sigmoid(delta)
        self.alpha = nn.Parameter(0.2 * torch.randn(size))                  # a = sigmoid(alpha)
        sign = 1.0 - 2.0 * (torch.arange(d_state) % 2)
        self.beta = nn.Parameter(0.02 * torch.randn(size) + sign)
        self.gamma = nn.Parameter(torch.randn(size))
        self.omega = nn.Parameter(torch.randn(d_model))

    def matrices(self):
        """log q and p beta gamma / sqrt(N), each (2H, N)."""
        p, a = torch.sigmoid(self.delta), torch.sigmoid(self.alpha)
        log_q = torch.log1p((-p * a).clamp(min=2.0 ** -24 - 1))             # finite: q > 0
        return log_q, p * self.beta * self.gamma / math.sqrt(self.gamma.shape[1])

    def kernel(self, L):
        """K (H, 2L), for FFTs of length 2L: entry s < L weighs the token s steps back, entry 2L - s
        that s steps ahead, entry L nothing; omega is in K_0."""
        log_q, c = self.matrices()
        back, ahead = vandermonde(c, log_q, L).chunk(2)                     # (H, L) each
        here = back[:, :1] + ahead[:, :1] + self.omega[:, None]
        return torch.cat([here, back[:, 1:], torch.zeros_like(here), ahead[:, 1:].flip(1)], 1)

    def recurrence(self, u):
        """The definition: h_t = q h_{t-1} + p beta u_t, y_t = gamma h_t / sqrt(N), both ways."""
        log_q, c = self.matrices()
        total = self.omega * u
        for log_q, c, flip in zip(log_q.chunk(2), c.chunk(2), (False, True)):
            h, ys = torch.zeros_like(c).expand(len(u), -1, -1), []          # (B, H, N)
            for u_t in (u.flip(1) if flip else u).unbind(1):
                h = log_q.exp() * h + u_t[..., None]
                ys.append((c * h).sum(-1))
            y = torch.stack(ys, 1)
            total = total + (y.flip(1) if flip else y)
        return total                                                        # (B, L, H)

    def forward(self, u):
        L = u.shape[1]
        K_hat = once(self, L, lambda: torch.fft.rfft(self.kernel(L)))       # (H, L+1)
        u_hat = torch.fft.rfft(u.transpose(1, 2).to(K_hat.real.dtype), 2 * L)      # (B, H, L+1)
        return torch.fft.irfft(u_hat * K_hat, 2 * L)[..., :L].transpose(1, 2)


class Mega(nn.Module):
    """Moving average equipped gated attention.                            Ma et al. 2023, Sec. 3.2

    d_model       int         channels H
    d_state       int         states N of the moving average
    d_hidden      int         channels V of the values
    d_attn        int         channels Z of queries and keys
    max_len       int         longest sequence L: the relative bias has 2 max_len - 1 numbers
    ads, control  str | None  see ads.middle: in front of the output Linear, on V channels

    (B, L, H) -> (B, L, H), its gated residual included.  ValueError if L > max_len.
    """

    def __init__(self, d_model, d_state=16, d_hidden=256, d_attn=64, max_len=1024, ads=None,
                 control=None):
        super().__init__()
        self.sizes = d_model, d_attn, d_hidden, d_model                     # update, z, reset, here
        self.ema = EMA(d_model, d_state)
        self.values = nn.Linear(d_model, d_hidden)
        self.gates = nn.Linear(d_model, sum(self.sizes))
        self.gamma = nn.Parameter(0.02 * torch.randn(2, d_attn))            # queries, keys from z
        self.beta = nn.Parameter(torch.zeros(2, d_attn))
        self.bias = nn.Parameter(0.02 * torch.randn(2 * max_len - 1))       # of the distance j - i
        self.middle = middle(d_hidden, ads, control)
        self.out = nn.Linear(d_hidden, d_model)
        for layer in (self.values, self.gates, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def relative_bias(self, L):
        """b_{j-i} as a matrix (L, L)."""
        max_len = (len(self.bias) + 1) // 2
        if L > max_len:
            raise ValueError(f"{L} tokens are more than max_len {max_len}; build the model with "
                             f"max_len={L}")
        return self.bias[max_len - L:max_len + L - 1].unfold(0, L, 1).flip(0)

    def attention(self, z):
        """softmax(q k^T / sqrt(Z) + bias), rows sum to 1; z (B, L, Z) -> (B, L, L)."""
        (b, L, Z), gamma, beta = z.shape, self.gamma, self.beta
        q = torch.addcmul(beta[0], gamma[0], z) * Z ** -0.5                 # (B, L, Z)
        k = torch.addcmul(beta[1], gamma[1], z)                             # (B, L, Z)
        bias = once(self, L, lambda: self.relative_bias(L))
        return torch.softmax(torch.baddbmm(bias.expand(b, L, L), q, k.mT), -1)

    def mixing(self, u):
        """Attention (B, L, L) and the values (B, L, V) that it mixes, to be looked at."""
        z = self.gates(F.silu(self.ema(u))).split(self.sizes, -1)[1]
        return self.attention(F.silu(z)), F.silu(self.values(u))

    def forward(self, u):
        values = F.silu(self.values(u))                                     # (B, L, V)
        update, z, reset, here = self.gates(F.silu(self.ema(u))).split(self.sizes, -1)
        mixed = self.attention(F.silu(z)) @ values                          # (B, L, V)
        new = F.silu(here + self.out(self.middle(mixed * F.silu(reset))))   # (B, L, H)
        update = torch.sigmoid(update).to(u.dtype)                          # autocast: bf16
        return torch.lerp(u, new.to(u.dtype), update)                       # u + update (new - u)


# --------------------------------------------------------------------------------------------------
# What a perturbation can do to the average, which is fixed, and to attention
# --------------------------------------------------------------------------------------------------

def gain(ema, L):
    """max_t sum_{s = t-L+1}^{t} |K_s| = max |dy|_inf over |du|_inf <= 1.          Derived here, P1

    ema  EMA, in float64                                        L  int  tokens

    |dy_t| <= sum_s |K_s| |du_{t-s}|, an equality for du_{t-s} = sign K_s. The kernel has two sides:
    the worst t is where the two partial sums, of L numbers in all, are largest together.
    Returns the gain (H,) and du (1, L, H), which reaches it in every channel, each at its t.
    """
    K = ema.kernel(L)                                                       # (H, 2L)
    ahead = F.pad(K.abs()[:, L:].flip(1).cumsum(1)[:, :-1], (1, 0))         # of the next 0 .. L-1
    total, t = (K.abs()[:, :L].cumsum(1) + ahead.flip(1)).max(1)            # (H,)
    s = (t[:, None] - torch.arange(L, device=t.device)) % (2 * L)           # (H, L)
    return total, K.sign().gather(1, s).T[None]


def gain_bounds(ema, L):
    """sup_w |K^(w)| <= ||K||_1 and gain <= ||K||_1 <= |omega| + sum_n |c_n| (1 - q_n^L)/(1 - q_n).

    Arguments as gain. Returns the two outer ends (H,); w on the 2L-th roots of 1.  Derived here, P2
    ||K||_1 takes all 2L - 1 lags; one output sees L of them, so sup |K^| may exceed the gain.
    """
    log_q, c = ema.matrices()                                               # (2H, N), two sides
    modal = (c.abs() * torch.expm1(L * log_q) / torch.expm1(log_q)).sum(1)
    return torch.fft.rfft(ema.kernel(L)).abs().amax(1), ema.omega.abs() + sum(modal.chunk(2))


def attention_error(P, V, P_adv, V_adv):
    """|P'V' - PV| <= max_s |V'_s - V_s| + TV(P', P) osc(V): clipped.              Derived here, P4

    P, V, P_adv, V_adv  (B, L, L), (B, L, V)  probabilities in rows and values, clean and attacked

    P'V' - PV = P'(V' - V) + (P' - P)(V - m): P' - P has rows of sum 0, so any m per channel may go.
    With m in the middle of V's range the last is at most |P' - P|_1 / 2 = TV times the range, osc.
    TV <= 1: however far the scores move, the error stays below the range of the values.
    Returns |P'V' - PV| and its bound (B, L, V), TV (B, L, 1), osc (B, 1, V).
    """
    tv = (P_adv - P).abs().sum(-1, keepdim=True) / 2
    osc = V.amax(1, keepdim=True) - V.amin(1, keepdim=True)
    bound = (V_adv - V).abs().amax(1, keepdim=True) + tv * osc
    return (P_adv @ V_adv - P @ V).abs(), bound, tv, osc


# --------------------------------------------------------------------------------------------------
# The network around it
# --------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """z = LayerNorm(Mega(z)); z = LayerNorm(z + Linear(SiLU(Linear(z)))). Ma et al., Mega Blocks

    (B, L, H) -> (B, L, H).
    """

    def __init__(self, d_model, d_state, d_hidden, max_len, ads=None, control=None):
        super().__init__()
        self.mega = Mega(d_model, d_state, d_hidden, max_len=max_len, ads=ads, control=control)
        self.feed = nn.Sequential(nn.Linear(d_model, d_hidden), nn.SiLU(),
                                  nn.Linear(d_hidden, d_model))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        for layer in (self.feed[0], self.feed[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, z):
        z = self.norms[0](self.mega(z))
        return self.norms[1](z + self.feed(z))


class Classifier(nn.Module):
    """Images -> tokens -> n x Block -> mean over tokens -> logits.

    in_channels, n_classes  int         colours of an image, classes
    d_model, d_state        int         channels H, states N of the moving average
    n_layers, patch_size    int         blocks; a token is a patch of patch_size^2 pixels, by rows
    ads, control            str | None  see ads.middle
    d_hidden, max_len       int         channels of values and feed-forward; most tokens of an image

    Images (B, C, h, w) in [0, 1] -> logits (B, n_classes).  ValueError if patches do not fill them,
    or are more than max_len.
    """

    def __init__(self, in_channels, n_classes, d_model=128, d_state=16, n_layers=4, patch_size=1,
                 ads=None, control=None, d_hidden=256, max_len=1024):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, d_model, patch_size, patch_size)
        self.blocks = nn.ModuleList(Block(d_model, d_state, d_hidden, max_len, ads, control)
                                    for _ in range(n_layers))
        self.head = nn.Linear(d_model, n_classes)

    def embed(self, x):
        """Images -> tokens (B, L, H): the one affine layer that YOPO differentiates repeatedly."""
        P, (h, w) = self.patches.kernel_size[0], x.shape[-2:]
        if h % P or w % P:
            raise ValueError(f"patch size {P} does not divide an image of {h} x {w}")
        return self.patches(x).flatten(2).transpose(1, 2)                   # (B, L, H), row by row

    def logits(self, z):
        """Tokens (B, L, H) -> logits (B, n_classes)."""
        for block in self.blocks:
            z = block(z)                                                    # (B, L, H)
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
    demo(lambda ads: Classifier(1, 10, d_model=32, n_layers=2, patch_size=4, ads=ads, d_hidden=64,
                                max_len=49), args.data_dir, args.epochs, n_train=3000)


if __name__ == "__main__":
    main()
