# SPDX-License-Identifier: MIT
"""Adversarial training of a state space model plus attention: Mega, with Adaptive Scaling.

    python attention_adv.py              # torchvision downloads MNIST to ./data if it is not there
    python attention_adv.py --epochs 8 --data-dir DIR

The first prints, in 75 CPU seconds (2-core x86-64 machine, torch 2.14.1, one thread, one seed):

    MNIST: 6000 training, 1000 test images, PGD-AT, eps 0.1, step 0.04
                 parameters   clean   PGD-10
    without AdS      40,456   68.0%   37.4%
    with AdS         57,096   75.1%   43.4%

Papers     AdS    Qi et al. 2024, arXiv 2406.05532          PGD   Madry et al. 2018, 1706.06083
           Mega   Ma et al. 2023, arXiv 2209.10655          TRADES  Zhang et al. 2019, 1901.08573
                                                            FGSM  Goodfellow et al. 2015, 1412.6572
Glossary   B batch, L tokens, H = d_model channels, N = d_state states of a channel's average,
           V = d_hidden channels of values, Z = d_attn channels of queries and keys
           u (B, L, H) input of a map, y its output, z tokens, x image, delta its perturbation
           K convolution kernel, K_hat its Fourier transform
           eps radius and alpha step of an attack in pixel units ([0, 1]; 8/255, not 8). Mega's own
           alpha, delta, beta, gamma are parameters of its maps: see EMA
Not here   other data sets, FreeAT, YOPO, checkpoints, strong evaluation: train.py. Dropout,
           warm-up, input normalisation: not in the protocol. Chunking, Laplace attention.

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
# The sequence map: attention. A moving average, a two-sided SSM, feeds queries, keys and gates
# --------------------------------------------------------------------------------------------------

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


class EMA(nn.Module):
    """Two-sided damped moving average with N states per channel.          Ma et al. 2023, Sec. 3.1

        h_t = q h_{t-1} + p beta u_t,   y_t = sum_n gamma_n h_tn / sqrt(N)
    forwards, and with parameters of its own backwards in time; EMA(u) is the sum of both and
    omega u.

    in the paper       in Mega's code, and here    what it is
    alpha              p = sigmoid(delta)          how much of the input enters, in (0, 1)
    1 - alpha * delta  q = 1 - p sigmoid(alpha)    the decay A' of a state, damped, in (0, 1)
    beta               beta                        input weights of the states: B' = p beta
    eta                gamma                       output weights: C = gamma / sqrt(N)
    (only in the code) omega, 1 / sqrt(N)          weight of the input itself; a constant

    d_model  int  channels H
    d_state  int  states N of each channel and direction

    (B, L, H) -> (B, L, H).
    """

    def __init__(self, d_model, d_state=16):
        super().__init__()
        size = (2 * d_model, d_state)                                       # forward, then backward
        self.delta = nn.Parameter(0.2 * torch.randn(size))
        self.alpha = nn.Parameter(0.2 * torch.randn(size))
        sign = 1.0 - 2.0 * (torch.arange(d_state) % 2)
        self.beta = nn.Parameter(0.02 * torch.randn(size) + sign)
        self.gamma = nn.Parameter(torch.randn(size))
        self.omega = nn.Parameter(torch.randn(d_model))

    def matrices(self):
        """log q and p beta gamma / sqrt(N), each (2H, N)."""
        p = torch.sigmoid(self.delta)
        damping = torch.sigmoid(self.alpha)
        # q > 0, so that its logarithm is finite in float32, too.
        log_q = torch.log1p((-p * damping).clamp(min=2.0 ** -24 - 1))
        return log_q, p * self.beta * self.gamma / math.sqrt(self.gamma.shape[1])

    def recurrence(self, u):
        """The definition, step by step, both ways; the factor p beta stands at the output."""
        log_q, c = self.matrices()
        past, future = zip(log_q.exp().chunk(2), c.chunk(2))                # (q, c), each (H, N)
        y = self.average(u, *past) + self.average(u.flip(1), *future).flip(1)
        return y + self.omega * u                                           # (B, L, H)

    @staticmethod
    def average(u, q, c):
        """sum_n c_n h_t with h_t = q h_{t-1} + u_t."""
        h = torch.zeros_like(c).expand(len(u), -1, -1)                      # (B, H, N)
        ys = []
        for u_t in u.unbind(1):
            h = q * h + u_t[..., None]
            ys.append((c * h).sum(-1))
        return torch.stack(ys, 1)

    def kernel(self, L):
        """K (H, 2L): K_s weighs the token s steps back, K_{2L-s} the token s steps ahead.

        An FFT of length 2L convolves on a circle, where s steps ahead are 2L - s steps back. So
        the backward kernel stands mirrored at the end, entry L is 0, and omega is in K_0.
        """
        log_q, c = self.matrices()
        back, ahead = vandermonde(c, log_q, L).chunk(2)                     # (H, L) each
        here = back[:, :1] + ahead[:, :1] + self.omega[:, None]
        return torch.cat([here, back[:, 1:], torch.zeros_like(here), ahead[:, 1:].flip(1)], 1)

    def forward(self, u):
        L = u.shape[1]
        if len(u) == 0:
            return u                                        # MKL's FFT refuses an empty batch
        K_hat = once(self, L, lambda: torch.fft.rfft(self.kernel(L)))       # (H, L+1)
        u_hat = torch.fft.rfft(u.mT.to(K_hat.real.dtype), 2 * L)            # (B, H, L+1)
        return torch.fft.irfft(u_hat * K_hat, 2 * L)[..., :L].mT            # (B, L, H)


class Mega(nn.Module):
    """Moving average equipped gated attention.                            Ma et al. 2023, Sec. 3.2

        update, shared, reset, candidate = Linear(SiLU(EMA(u)))
        mixed = softmax(q k^T / sqrt(Z) + bias) SiLU(Linear(u))      q, k: affine in SiLU(shared)
        new = SiLU(candidate + Linear([AdS](SiLU(reset) * mixed)))
        y = sigmoid(update) * new + (1 - sigmoid(update)) * u

    The paper calls sigmoid(update) phi, SiLU(shared) Z, SiLU(reset) gamma, mixed O, new H^. Here Z
    is d_attn, and `gamma` is the paper's kappa. The SiLU around EMA stands in Mega's code only.

    d_model       int         channels H
    d_state       int         states N of the moving average
    d_hidden      int         channels V of the values
    d_attn        int         channels Z of queries and keys
    max_len       int         longest sequence L: the relative bias has 2 max_len - 1 numbers
    ads, control  str | None  see ads.middle: before the output Linear, on V channels; AdS is ours

    (B, L, H) -> (B, L, H), its gated residual included.  ValueError if L > max_len.
    """

    def __init__(self, d_model, d_state=16, d_hidden=256, d_attn=64, max_len=1024, ads=None,
                 control=None):
        super().__init__()
        self.sizes = [d_model, d_attn, d_hidden, d_model]       # update, shared, reset, candidate
        self.ema = EMA(d_model, d_state)
        self.values = nn.Linear(d_model, d_hidden)
        self.gates = nn.Linear(d_model, sum(self.sizes))
        # q, k = gamma shared + beta (kappa, mu in the paper), row 0 and row 1.
        self.gamma = nn.Parameter(0.02 * torch.randn(2, d_attn))
        self.beta = nn.Parameter(torch.zeros(2, d_attn))
        self.bias = nn.Parameter(0.02 * torch.randn(2 * max_len - 1))       # of the distance j - i
        self.middle = middle(d_hidden, ads, control)
        self.out = nn.Linear(d_hidden, d_model)
        for layer in (self.values, self.gates, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def relative_bias(self, L):
        """b_{j-i} as a matrix (L, L): row i reads b_{-i} .. b_{L-1-i}."""
        max_len = (len(self.bias) + 1) // 2
        if L > max_len:
            raise ValueError(f"{L} tokens are more than max_len {max_len}; build the model with "
                             f"max_len={L}")
        used = self.bias[max_len - L:max_len + L - 1]                       # b_{1-L} .. b_{L-1}
        return used.unfold(0, L, 1).flip(0)

    def attention(self, shared):
        """softmax(q k^T / sqrt(Z) + bias), rows sum to 1; SiLU(shared) (B, L, Z) -> (B, L, L)."""
        _, L, Z = shared.shape
        q = (self.gamma[0] * shared + self.beta[0]) / math.sqrt(Z)          # (B, L, Z)
        k = self.gamma[1] * shared + self.beta[1]                           # (B, L, Z)
        return torch.softmax(q @ k.mT + self.relative_bias(L), -1)

    def split_gates(self, u):
        """update (B, L, H), shared (B, L, Z), reset (B, L, V), candidate (B, L, H)."""
        return self.gates(F.silu(self.ema(u))).split(self.sizes, -1)

    def forward(self, u):
        update, shared, reset, candidate = self.split_gates(u)
        mixed = self.attention(F.silu(shared)) @ F.silu(self.values(u))     # (B, L, V)
        new = F.silu(candidate + self.out(self.middle(mixed * F.silu(reset))))      # (B, L, H)
        phi = torch.sigmoid(update).to(u.dtype)             # under bf16, too: 1 - phi is exact
        return phi * new + (1 - phi) * u


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
    d_hidden, max_len       int         channels of values and feed-forward; largest token count

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
        """Images -> tokens (B, L, H), an affine map. YOPO differentiates this layer alone."""
        size = self.patches.kernel_size[0]
        h, w = x.shape[-2:]
        if h % size or w % size:
            raise ValueError(f"patch size {size} does not divide an image of {h} x {w}")
        return self.patches(x).flatten(2).transpose(1, 2)                   # (B, L, H), row by row

    def logits(self, z):
        """Tokens (B, L, H) -> logits (B, n_classes)."""
        for block in self.blocks:
            z = block(z)                                                    # (B, L, H)
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
    return Classifier(1, 10, d_model=32, n_layers=2, patch_size=7, ads=ads, d_hidden=64, max_len=16)


def main():
    demo(argparse.ArgumentParser(description=__doc__.splitlines()[0]), build)


if __name__ == "__main__":
    main()
