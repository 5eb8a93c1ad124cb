# SPDX-License-Identifier: MIT
"""Train and evaluate the three scripts' models: data, FreeAT, YOPO, AutoAttack, runs, tables.

    python train.py --model s4 --ads --dataset synthetic                  # a minute on a laptop
    python train.py --model s4 --ads --dataset cifar10                    # the paper's protocol
    python train.py --evaluate runs/NAME/best.pt --attacks clean,pgd-50x5,aa
    python train.py --bench --model mamba --batch-size 4 --lengths 256,1024     # what a step costs
    torchrun --nproc-per-node 4 train.py --model s4 --ads                 # the same on four GPUs

Papers     AdS      Qi et al. 2024, arXiv 2406.05532        FreeAT  Shafahi et al. 2019, 1904.12843
           YOPO     Zhang et al. 2019, arXiv 1905.00877     PGD     Madry et al. 2018, 1706.06083
           APGD     Croce & Hein 2020, arXiv 2003.01690     FAB     Croce & Hein 2020, 1907.02044
           Square   Andriushchenko et al. 2020, 1912.00049  AutoAttack  as APGD, Sec. 5
Glossary   x (B, C, h, w) images in [0, 1], y (B,) labels, c the run's settings (a flat namespace),
           eps radius and alpha step, pixel units (8/255, not 8), rank and world: torchrun's
Chance     Every random number is a function of --seed and the place it is used at (`seed_of`), not
           of what came before: so a run that was cut goes on exactly, and no random state is saved.
"""
import argparse
import copy
import csv
import functools
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

import ads
import attention_adv
import mamba_adv
import s4_adv
from ads import ACTIVATIONS, CONTROLS, error_parts
from s4_adv import ascend, drawn_digits, fgsm, frozen, kl_pgd, param_groups, pgd, trades_at

SCRIPTS = {"s4": s4_adv, "dss": s4_adv, "s5": s4_adv, "mamba": mamba_adv,
           "attention": attention_adv}
METHODS = ("standard", "pgd", "trades", "free", "yopo")

# The paper's protocol, by data set (Qi et al. 2024, experimental settings); synthetic is ours: a
# minute on a laptop. Whatever the command line leaves out comes from here.
PAPER = dict(d_model=128, d_state=64, n_layers=4, d_hidden=256, epochs=180, batch_size=256, lr=1e-3,
             weight_decay=2e-4, eps=8 / 255, alpha=2 / 255, steps=10, beta=6.0, pad=4, flip=True)
PRESETS = {
    "cifar10": PAPER | dict(shape=(3, 32, 32), classes=10, patch_size=1),
    "mnist": PAPER | dict(shape=(1, 28, 28), classes=10, patch_size=1, d_state=32, n_layers=2,
                          d_hidden=32, epochs=100, eps=0.3, alpha=0.04, beta=1.0, pad=0,
                          flip=False),
    "tiny-imagenet": PAPER | dict(shape=(3, 64, 64), classes=50, patch_size=4),
    "synthetic": PAPER | dict(shape=(1, 28, 28), classes=10, patch_size=4, d_model=64, n_layers=2,
                              epochs=6, batch_size=64, lr=3e-3, eps_warmup=4.0, steps=5,
                              train_size=4000, pad=0, flip=False, test_size=500),
}
# The scripts' kernels, kept in one place: `frozen` is s4_adv's here, whatever the model.
attention_adv.MEMO = mamba_adv.MEMO = s4_adv.MEMO
HELD_OUT = 1000                                 # training images that choose Best, not trained on
STATES = {"mamba": 16, "attention": 16}                              # d_state whatever the data set
# What may change on --resume, and what else on --evaluate.
FREE = ("data_dir", "device", "out", "resume", "save_every", "attacks", "nan")
JOBS = ("checks", "eps_sweep", "steps_sweep", "transfer_from", "images")      # beside --attacks
EVALUATION = ("evaluate", "analyse", "eps", "alpha", "test_size", "batch_size", "seed", "precision",
              *JOBS)


class UserError(Exception):
    """Something that the user can mend: one sentence, printed to stderr, exit code 2."""


# --------------------------------------------------------------------------------------------------
# Data: uint8 tensors (n, C, h, w) on the device, labels (n,)
# --------------------------------------------------------------------------------------------------

def load_data(c):
    """{"train", "val", "test": (images uint8 (n, C, h, w), labels (n,))}, on c.device.

    val is the last HELD_OUT training images, train the first c.train_size of the others, test the
    first c.test_size test images.  UserError where data are missing or fewer than asked for.
    """
    first = not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:                                   # the first process of a machine downloads and
        dist.barrier()                              # decodes for all; and nobody writes to --out
    if c.dataset == "synthetic":                    # before everybody has looked at it
        x, y = drawn_digits(11_000, 0)
        x_test, y_test = drawn_digits(2_000, 1)
    elif c.dataset == "tiny-imagenet":
        x, y, x_test, y_test = tiny_imagenet(Path(c.data_dir) / "tiny-imagenet-200", c.classes)
    else:
        x, y, x_test, y_test = torchvision_data(c.dataset, c.data_dir)
    if first and dist.is_initialized():
        dist.barrier()
    if len(x) <= HELD_OUT:
        raise UserError(f"--classes {c.classes}: they have {len(x):,} training images, and "
                        f"{HELD_OUT:,} are held out to choose Best; give more classes")
    sets = {"train": (x[:-HELD_OUT], y[:-HELD_OUT]), "val": (x[-HELD_OUT:], y[-HELD_OUT:]),
            "test": (x_test, y_test)}
    for name, size in (("train", c.train_size), ("test", c.test_size)):
        n = len(sets[name][0])
        if size is not None and size > n:
            raise UserError(f"--{name}-size {size}: {c.dataset} has {n} such images; "
                            f"give at most {n}")
        sets[name] = tuple(v[:size] for v in sets[name])
    if c.eval_train > len(sets["train"][0]):
        raise UserError(f"--eval-train {c.eval_train}: there are {len(sets['train'][0])} training "
                        "images; give at most as many")
    return {name: tuple(v.to(c.device) for v in pair) for name, pair in sets.items()}


def torchvision_data(name, root):
    """Images and labels, training then test, of MNIST or CIFAR-10; downloaded when absent."""
    try:
        from torchvision.datasets import CIFAR10, MNIST
    except Exception as e:
        raise UserError(f"--dataset {name} needs torchvision, which cannot be imported here ({e}); "
                        "install it, or use --dataset synthetic") from e
    kind, folder = {"mnist": (MNIST, "MNIST"), "cifar10": (CIFAR10, "cifar-10-batches-py")}[name]
    root, sets = Path(root), []
    if not (root / folder).exists():
        download(kind, root, folder)
    try:
        sets = [kind(root, train=train, download=False) for train in (True, False)]
        x, x_test = (torch.as_tensor(s.data) for s in sets)
        y, y_test = (torch.as_tensor(s.targets) for s in sets)
        whole = (len(x), len(y)) == {"mnist": (60000,) * 2, "cifar10": (50000,) * 2}[name]
    except Exception:                                                 # whatever a damaged file does
        whole = False
    if not whole or (len(x_test), len(y_test)) != (10000,) * 2:
        raise UserError(f"--data-dir {root}: {folder} there is incomplete or damaged; put "
                        "torchvision's files there, delete that folder to download them again, "
                        "or use --dataset synthetic")
    layout = (lambda v: v[:, None]) if name == "mnist" else (lambda v: v.permute(0, 3, 1, 2))
    return layout(x).contiguous(), y, layout(x_test).contiguous(), y_test


def download(kind, root, folder):
    """torchvision's download, into a folder beside its place first: half of it is never left."""
    import shutil
    part, made = root / f".{folder}.part", [d for d in (root, *root.parents) if not d.exists()]
    try:
        kind(part, download=True)
        os.replace(part / folder, root / folder)
    except Exception as e:
        raise UserError(f"--data-dir {root}: there is no {folder}, and it could not be downloaded "
                        f"({str(e).splitlines()[0]}); put torchvision's files into "
                        f"{root / folder}, or use --dataset synthetic, which needs none") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:                                           # nothing is left of a failure
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def tiny_imagenet(root, n_classes):
    """The first n_classes of wnids.txt, decoded once into one uint8 file of our own cache folder.

    Training images come in one fixed shuffled order, since the official one goes class by class.
    """
    try:
        wnids = (root / "wnids.txt").read_text().split()
        wnids = [w for w in wnids if (root / "train" / w / "images").is_dir()] or wnids[:0]
        rows = (root / "val" / "val_annotations.txt").read_text().splitlines()
        rows = [r.split("\t")[:2] for r in rows]
    except OSError as e:
        raise UserError(f"--data-dir {root.parent}: no Tiny-ImageNet there ({e}); unpack the "
                        f"official tiny-imagenet-200.zip so that {root / 'wnids.txt'} exists, "
                        "or use --dataset synthetic") from e
    if n_classes > len(wnids):
        raise UserError(f"--classes {n_classes}: {root} has the images of {len(wnids)} classes; "
                        f"give at most {len(wnids)}")
    label = {w: i for i, w in enumerate(wnids[:n_classes])}
    train = [(p, i) for w, i in label.items()
             for p in sorted((root / "train" / w / "images").glob("*.JPEG"))]
    test = [(root / "val" / "images" / name, label[w]) for name, w in rows if w in label]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    train = [train[i] for i in order]
    cache = Path(os.environ.get("SSM_ADV_CACHE", Path(__file__).resolve().parent / ".cache"))
    key = hashlib.sha256("\n".join(f"{p.relative_to(root)} {i}" for p, i in train + test).encode())
    cache = cache / f"tiny-imagenet-{n_classes}-{key.hexdigest()[:12]}.pt"
    try:
        return torch.load(cache, weights_only=True)
    except Exception:                                                    # absent or damaged: decode
        pass
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    data = []
    for files in (train, test):
        try:
            images = [decode_jpeg(read_file(str(p)), mode=ImageReadMode.RGB) for p, _ in files]
            data += [torch.stack(images), torch.tensor([i for _, i in files])]
        except RuntimeError as e:
            raise UserError(f"--data-dir {root.parent}: an image of {root} is missing or damaged "
                            f"({e}); unpack the official archive again") from e
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write(cache, data)
    except (OSError, UserError) as e:
        print(f"the decoded images could not be kept in {cache} ({e}); the next run decodes again")
    return data


def augment(x, pad, flip, generator):
    """Random crop of the zero-padded images, mirrored for half of them: a choice for each image.

    x (B, C, h, w), pad int pixels, flip bool; a generator makes the same choices on any device.
    """
    B, C, h, w = x.shape
    top, left = torch.randint(2 * pad + 1, (2, B, 1), generator=generator)
    mirror = (torch.rand(B, 1, generator=generator) < 0.5) & flip
    columns = torch.where(mirror, torch.arange(w).flip(0), torch.arange(w)) + left     # (B, w)
    rows = torch.arange(h) + top                                            # (B, h)
    at = torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None]
    x = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)                      # (B, h + 2 pad, w + 2 pad, C)
    return x[tuple(i.to(x.device) for i in at)].permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------------------------
# Training methods: each leaves the gradient of one optimiser step, and returns its loss
# --------------------------------------------------------------------------------------------------

def part_size(c, width=None):
    """Images at a time: on a CPU as many as have 2^18 numbers (1 MiB in float32) in a sequence of
    so many channels, d_model unless given, so that they stay in its cache; on a GPU the batch."""
    tokens = c.shape[1] * c.shape[2] // c.patch_size ** 2
    numbers = tokens * (width or c.d_model)
    return max(1, 2 ** 18 // numbers) if c.device.startswith("cpu") else c.batch_size


def in_parts(c, attack):
    """attack, pgd or the like, taking part_size(c) images at a time, --micro-batch at most, under
    one `frozen`: each kernel is computed once for all."""
    def attack_parts(model, x, y, *args):
        n = min(part_size(c), c.micro_batch or math.inf)
        with frozen(model):
            return torch.cat([attack(model, *part, *args) for part in zip(x.split(n), y.split(n))])
    return attack_parts


def attacked(c, method, model, x, y, eps, alpha):
    """What a method trains at: x, pgd's result for it, or that of TRADES; in parts."""
    attack = {"pgd": pgd, "trades": lambda model, x, y, *args: kl_pgd(model, x, *args)}.get(method)
    return in_parts(c, attack)(model, x, y, eps, alpha, c.steps) if attack else x


def loss_of(c, method, model, x, x_adv, y):
    """The loss of standard training, PGD-AT (Madry et al. 2018) or TRADES (Zhang et al. 2019)."""
    if method == "trades":
        return trades_at(model, x, x_adv, y, c.beta)
    return F.cross_entropy(model(x_adv), y)


def free_backward(model, x, y, noise, eps):
    """One replay of FreeAT: one backward pass gives both gradients.    Shafahi et al. 2019, Alg. 1

        w    descends  grad_w CE(model(x'), y),  x' = clamp(x + noise)  (left in .grad)
        noise  <-  Proj_eps(noise + eps sign grad_x' CE(model(x'), y))

    noise  like x, changed in place: it is carried from replay to replay and to the next batch.
    Returns the loss, a scalar.
    """
    x_adv = (x + noise).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    noise.add_(eps * x_adv.grad.sign()).clamp_(-eps, eps)
    return loss.detach()


def yopo_backward(model, x, y, eps, alpha, passes, inner):
    """YOPO-m-n: m full passes, each followed by n steps of the image on the first layer alone.

    With z = embed(x_adv) and the costate p = -grad_z CE(logits(z), y) held fixed, the image
    descends the Hamiltonian H = <p, embed(x_adv)> n times:
        x_adv  <-  Proj(x_adv - alpha sign grad_x H)     Zhang et al. 2019 (YOPO), Alg. 1, Sec. 3
    The embedding's weights ascend H, all others descend the loss, by the mean gradient of the m
    passes. Returns their mean loss. AdamW works number by number, so that one optimiser over both
    sets of weights is the same as one for each.
    """
    x_adv, total = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1), 0.0
    for _ in range(passes):
        z = model.embed(x_adv).detach().requires_grad_()                    # (B, L, H)
        loss = F.cross_entropy(model.logits(z), y) / passes
        loss.backward()
        p, total = -z.grad, total + loss.detach()
        x_adv = ascend(model, lambda v: -(p * model.embed(v)).sum(), x, x_adv, eps, alpha, inner)
        (-(p * model.embed(x_adv)).sum()).backward()
    return total


# --------------------------------------------------------------------------------------------------
# AutoAttack, standard version: the worst case over APGD-CE, APGD-T, FAB-T and Square (Croce & Hein)
# --------------------------------------------------------------------------------------------------
# Every attack takes (model, x, y, eps) and returns x_adv, like x, detached: |x_adv - x|_inf <= eps,
# in [0, 1], misclassified where the attack succeeds. A broken image costs no further step or query.
# Chance: torch's global generator.

def scores(model, x):
    """z = model(x), logits (B, n_classes).  UserError if one is not finite."""
    z = model(x)
    if not z.isfinite().all():
        raise UserError("the model returns logits that are not finite, so its accuracy means "
                        "nothing; take an earlier checkpoint, or train with a smaller --lr")
    return z


@torch.no_grad()
def hits(model, x, y):
    """argmax_k z_k == y, (B,) bool: which images are classified correctly."""
    return scores(model, x).argmax(1) == y


def gradient(model, x, f):
    """z = model(x) (B, n_classes), f(z) (B,) and grad_x f(model(x)), like x; all detached.

    FloatingPointError if the gradient is not finite: the sign of a NaN would stop the attack.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = scores(model, x)
        value = f(z)
        grad, = torch.autograd.grad(value.sum(), x)
    if not grad.isfinite().all():
        raise FloatingPointError("the attack met a gradient that is not finite")
    return z.detach(), value.detach(), grad


def others(model, x, y, targets):
    """The classes but y, likeliest first: (targets, B), or (n_classes - 1, B) if that is less.

    ValueError if targets < 1.
    """
    if targets < 1:
        raise ValueError(f"a targeted attack needs at least 1 target class; got {targets}")
    with torch.no_grad():
        z = scores(model, x).scatter(1, y[:, None], -torch.inf)
    return z.argsort(1, descending=True)[:, :min(targets, z.shape[1] - 1)].T


def pick(mask, new, old):
    """Pairwise over tensors (B, ...): rows of new where mask (B,) holds, else rows of old."""
    return [torch.where(mask.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(new, old)]


def margin(z, y):
    """z_y - max_{i != y} z_i, (B,): negative means misclassified.                 Square, Sec. 3"""
    return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)


def dlr(z, y, target=None):
    """(max_{i != y} z_i - z_y) / (z_(1) - z_(3)), difference of logits ratio.          APGD, Sec. 4

    z       (B, n_classes)  logits; z_(k) is the k-th largest
    target  (B,) or None    with it: (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)

    Returns (B,). Logits times 100 hide nothing.  ValueError with fewer than 3, or 4, classes.
    """
    need, kind = (3, "DLR") if target is None else (4, "targeted DLR")
    if z.shape[1] < need:
        raise ValueError(f"the {kind} loss needs at least {need} classes; got {z.shape[1]}")
    top = z.topk(need, 1).values                                            # (B, 3) or (B, 4)
    if target is None:
        return -margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)
    rise = (z.gather(1, target[:, None]) - z.gather(1, y[:, None]))[:, 0]   # (B,)
    return rise / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def checkpoints(steps):
    """ceil(p_j steps), p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06).    APGD, Sec. 3"""
    p, gap, marks = 22, 22, []                                              # in per cent: exact
    while p <= 100:
        marks.append(-(-p * steps // 100))
        gap = max(gap - 3, 6)
        p += gap
    return marks


def apgd(model, x, y, eps, steps=100, loss="ce", target=None):
    """max loss(x') over the ball: projected ascent, momentum, an adaptive step.   APGD, Algorithm 1

    steps   int           gradient steps, from one uniform random start
    loss    str           "ce" | "dlr"
    target  (B,) or None  classes to move to, with loss "dlr"

    alpha starts at 2 eps; at a checkpoint it is halved, and the search goes back to the best point,
    if fewer than rho of the steps raised the loss, or if alpha was kept the last time and the best
    loss has not risen since.
    ValueError on another loss, or a target with "ce".
    """
    if loss not in ("ce", "dlr") or (loss == "ce" and target is not None):
        raise ValueError(f"loss is 'ce', or 'dlr' with or without a target; got {loss!r}"
                         + ("" if target is None else " with a target"))
    x, rho, marks = x.detach(), 0.75, checkpoints(steps)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)

    def value(z, i):
        if loss == "ce":
            return F.cross_entropy(z, y[i], reduction="none")
        return dlr(z, y[i], None if target is None else target[i])

    def look(point):
        """point, gradient and loss there of the unbroken images; x_adv keeps what it breaks."""
        i, grad, f = robust.nonzero()[:, 0], torch.zeros_like(x), x.new_zeros(len(x))
        if len(i):
            z, f[i], grad[i] = gradient(model, point[i], lambda z: value(z, i))
            x_adv[i], robust[i] = point[i], z.argmax(1) == y[i]
        return point, grad, f

    with frozen(model):
        x_adv, robust = x.clone(), hits(model, x, y)
        now = best = look((x + eps * (2 * torch.rand_like(x) - 1)).clamp(low, high))
        before, f_check, last, rises = now[0], now[2], 0, torch.zeros_like(y)
        alpha, halved = torch.full_like(x[:, :1, :1, :1], 2 * eps), torch.ones_like(robust)
        for k in range(1, steps + 1):
            if not robust.any():
                break
            (point, grad, f), a = now, 0.75 if k > 1 else 1.0
            step = (point + alpha * grad.sign()).clamp(low, high) - point
            now = look((point + a * step + (1 - a) * (point - before)).clamp(low, high))
            best, rises, before = pick(now[2] > best[2], now, best), rises + (now[2] > f), point
            if k in marks:
                halved = (rises < rho * (k - last)) | (~halved & (best[2] <= f_check))
                now, alpha = pick(halved, best, now), pick(halved, [alpha / 2], [alpha])[0]
                f_check, last, rises = best[2], k, torch.zeros_like(rises)
    return pick(robust, best, [x_adv])[0]


def apgd_ce(model, x, y, eps, steps=100):
    """APGD on the cross-entropy.                                                    APGD, Sec. 5"""
    return apgd(model, x, y, eps, steps)


def apgd_t(model, x, y, eps, targets=9, steps=100):
    """APGD on the targeted DLR loss, one class after another, likeliest first.         APGD, Sec. 5

    targets  int  classes to try, capped at n_classes - 1          steps  int  for each of them
    """
    x_adv = x.detach().clone()
    with frozen(model):
        robust = hits(model, x, y)
        for target in others(model, x, y, targets):
            i = robust.nonzero()[:, 0]
            if len(i):
                x_adv[i] = apgd(model, x[i], y[i], eps, steps, "dlr", target[i])
                robust[i] = hits(model, x_adv[i], y[i])
    return x_adv


def project(x, w, c):
    """argmin |d|_inf over d with <w, d> = c and x + d in [0, 1]^n.                      FAB, Sec. 2

    x, w, c  (B, n), (B, n), (B,)    points of the box, normals, what <w, d> has to reach
    Returns (B, n); the d that comes closest where the box does not meet the hyperplane.
    Every pixel moves by min(r, room_i), so <|w|, d> grows with r, linearly between sorted rooms:
    find the piece that holds |c|, solve for r.
    """
    side, goal = w.sign() * c.sign()[:, None], c.abs()[:, None]             # (B, n), (B, 1)
    room = torch.where(side > 0, 1 - x, x)
    knot, order = room.sort(1)
    w = w.abs().gather(1, order)
    full = (w * knot).cumsum(1) - w * knot                                  # pixels before k give
    slope = w.flip(1).cumsum(1).flip(1)                                     # sum of |w| from k on
    k = (full + slope * knot < goal).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
    r = (goal - full.gather(1, k)) / slope.gather(1, k).clamp(min=torch.finfo(x.dtype).tiny)
    return side * torch.minimum(r, room)


def fab_step(x_i, x, f, w, alpha_max=0.1, eta=1.05):
    """(1 - a) (x_i + eta d_i) + a (x + eta d), clamped to [0, 1].                  FAB, Algorithm 1

    x_i, x  (B, C, h, w)        current and original image, d_i and d their ways to the hyperplane
    f, w    (B,), (B, C, h, w)  f + <w, . - x_i> = 0;  a = min(|d_i| / (|d_i| + |d|), alpha_max)
    """
    u, v, w = x_i.flatten(1), x.flatten(1), w.flatten(1)                    # (B, n)
    d_i, d = project(u, w, -f), project(v, w, -f - (w * (v - u)).sum(1))
    far_i, far = d_i.abs().amax(1, keepdim=True), d.abs().amax(1, keepdim=True)
    a = (far_i / (far_i + far).clamp(min=1e-8)).clamp(max=alpha_max)        # (B, 1)
    return ((1 - a) * (u + eta * d_i) + a * (v + eta * d)).clamp(0, 1).view_as(x)


def fab_t(model, x, y, eps, targets=9, steps=100, beta=0.9):
    """min |x' - x|_inf over misclassified x', z_t - z_y linearised at each step.        FAB, Sec. 2

    targets, steps  int    as apgd_t; no random start
    beta            float  after a misclassified x' the next step starts at x + beta (x' - x)

    An image is done when the distance falls to eps: how far it falls below is not asked.
    """
    x, x_adv = x.detach(), x.detach().clone()
    with frozen(model):
        robust = hits(model, x, y)
        for target in others(model, x, y, targets):
            point = x.clone()
            for _ in range(steps):
                i = robust.nonzero()[:, 0]
                if len(i) == 0:
                    return x_adv
                pair = torch.stack([y[i], target[i]], 1)                    # (b, 2)
                _, f, w = gradient(model, point[i], lambda z: z.gather(1, pair).diff(dim=1)[:, 0])
                new = fab_step(point[i], x[i], f, w)
                wrong = ~hits(model, new, y[i])
                point[i], = pick(wrong, [x[i] + beta * (new - x[i])], [new])
                found = wrong & ((new - x[i]).abs().flatten(1).amax(1) <= eps)
                x_adv[i[found]], robust[i[found]] = new[found], False
    return x_adv


def square(model, x, y, eps, queries=5000, span=10_000):
    """min margin by random search: +-2 eps on a square, kept if better.     Square, Algorithms 1, 2

    queries  int  proposals for each image; the start, vertical stripes x +- eps, is one more
    span     int  the square's area, first .8 of the image, is halved nine times within span
                  proposals; AutoAttack stops at 5000 of 10,000, span=queries would resize it
    """
    def signs(*shape):
        return torch.randint(2, shape, device=x.device, dtype=x.dtype) * 2 - 1

    def inside(n, size, s):
        """n random intervals of s out of size pixels, as masks (n, size)."""
        begin = torch.randint(size - s + 1, (n, 1), device=x.device)
        return (torch.arange(size, device=x.device) - begin).div(s, rounding_mode="floor") == 0

    x, (B, C, h, w) = x.detach(), x.shape
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    halvings = [at * span / 10_000 for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)]
    with frozen(model), torch.no_grad():
        stripes = (x + eps * signs(B, C, 1, w)).clamp(low, high)
        x_adv, = pick(hits(model, x, y), [stripes], [x])
        worst = margin(scores(model, x_adv), y)                             # (B,)
        for q in range(queries):
            i = (worst >= 0).nonzero()[:, 0]
            if len(i) == 0:
                break
            p = 0.8 / 2 ** sum(q > at for at in halvings)
            s = min(max(round((p * h * w) ** 0.5), 1), h, w)                # side of the square
            mask = inside(len(i), h, s)[:, None, :, None] & inside(len(i), w, s)[:, None, None]
            new = (x_adv[i] + 2 * eps * signs(len(i), C, 1, 1) * mask).clamp(low[i], high[i])
            value = margin(scores(model, new), y[i])
            x_adv[i], worst[i] = pick(value < worst[i], [new, value], [x_adv[i], worst[i]])
    return x_adv


AUTO = {"apgd-ce": apgd_ce, "apgd-t": apgd_t, "fab-t": fab_t, "square": square}
ENSEMBLES = {"aa": tuple(AUTO), "aa-fast": ("apgd-ce", "apgd-t")}           # in this order


# --------------------------------------------------------------------------------------------------
# A run: model, optimiser, where it stands; checkpoints; many processes
# --------------------------------------------------------------------------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words, **kw):
    if rank() == 0:
        print(*words, **kw, flush=True)


def on_terminal():
    return sys.stdout is not None and sys.stdout.isatty()


def seed_of(*key):
    """A seed that is a function of key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def build(c):
    """The Classifier that the settings describe, with weights drawn from c.seed, on c.device."""
    channels, h, w = c.shape
    sizes = dict(d_model=c.d_model, d_state=c.d_state, n_layers=c.n_layers, patch_size=c.patch_size)
    if SCRIPTS[c.model] is s4_adv:
        sizes["ssm"] = c.model
    if c.model == "attention":
        sizes.update(d_hidden=c.d_hidden, max_len=h * w // c.patch_size ** 2)
    torch.manual_seed(seed_of(c.seed, "weights"))
    model = SCRIPTS[c.model].Classifier(channels, c.classes, **sizes, ads=c.ads, control=c.control)
    return model.to(c.device, torch.float64 if c.precision == "fp64" else torch.float32)


def new_run(c):
    """A run before its first step."""
    model = build(c)
    noise = torch.zeros(c.batch_size, *c.shape, device=c.device,            # one slot per image
                        dtype=next(model.parameters()).dtype)
    return SimpleNamespace(
        c=c, model=model, optimizer=torch.optim.AdamW(param_groups(model, c.weight_decay), lr=c.lr),
        noise=noise if c.method == "free" else None, epochs=math.ceil(c.epochs / replays(c)),
        epoch=0, batch=0, loss=0.0, seen=0, skipped=0, seconds=0.0,     # where it is in the epoch
        rows=[], best=None, saved=time.monotonic(), busy=False, asked=False, flags=[0, 0])


def replays(c):
    """Optimiser steps on a batch, and what divides the number of epochs: M for FreeAT, else 1."""
    return c.replays if c.method == "free" else 1


COUNTERS = ("epoch", "batch", "loss", "seen", "skipped", "seconds", "rows", "best")


def write(path, content):
    """torch.save, all or nothing: a whole new file replaces the old one, or nothing changes."""
    buffer, part = io.BytesIO(), path.with_name(path.name + ".part")
    if not isinstance(content, (str, bytes)):
        torch.save(content, buffer)
        content = buffer.getvalue()
    content = content.encode() if isinstance(content, str) else content
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {path} ({e.strerror}); what was there before is whole: make "
                        "room, or choose another folder; a run goes on with --resume") from e


def save(run):
    """last.pt of the run as it stands; the one before it becomes previous.pt."""
    state = {"format": 1, "config": vars(run.c), "model": run.model.state_dict(),
             "optimizer": run.optimizer.state_dict(), "noise": run.noise}
    state |= {k: getattr(run, k) for k in COUNTERS}
    state["loss"], state["seen"] = total([run.loss, run.seen], next(run.model.parameters()).device)
    if run.noise is not None and world() > 1:                         # each process knows its slots
        state["noise"] = torch.zeros_like(run.noise)
        state["noise"][rank()::world()] = run.noise[rank()::world()]
        dist.all_reduce(state["noise"])
    if rank() == 0:
        out = Path(run.c.out)
        fresh = out / "new.pt"
        write(fresh, state)
        if (out / "last.pt").exists():
            os.replace(out / "last.pt", out / "previous.pt")
        os.replace(fresh, out / "last.pt")
    run.saved = time.monotonic()


def ours(config):
    """Are these the settings of a run of ours?  KeyError or TypeError if not even nearly."""
    return config["model"] in SCRIPTS and config["dataset"] in PRESETS and "seed" in config


def read_checkpoint(path, flag):
    """The dict in a checkpoint of this program.  UserError if it is missing, damaged or foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if (state["format"] == 1 and ours(state["config"]) and state["epoch"] >= 0
                and state["model"]):
            return state
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: there is no such file; give one of a run's checkpoints, "
                        "last.pt or best.pt") from None
    except IsADirectoryError:
        raise UserError(f"{flag} {path}: this is a folder; give a checkpoint in it") from None
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be read ({e.strerror}); see to its access rights, "
                        "or copy it") from None
    except Exception:                                                 # whatever a damaged file does
        pass
    raise UserError(f"{flag} {path}: this is damaged, or no checkpoint of this program; give "
                    "another, or train anew with another --out")


def find_checkpoint(out, flag):
    """The newest whole checkpoint in a run's folder, or None if it has none yet."""
    names = [n for n in ("last.pt", "previous.pt") if (out / n).exists()]
    for name in names:
        try:
            return read_checkpoint(out / name, flag)
        except UserError as e:
            if name == names[-1]:
                raise
            say(f"{e}; trying the one before", file=sys.stderr)
    return None


def read_config(out):
    """What a run's config.json says, or None if there is none.  UserError if it is no run's."""
    try:
        config = json.loads((out / "config.json").read_text())
        if ours(config):
            return config
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--resume {out}: its config.json is damaged, or of another program; take "
                    "another folder, with the run's checkpoints alone in it") from None


def fill(model, weights, path):
    """Puts a checkpoint's weights into a model.  UserError if they are of another."""
    try:
        model.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError) as e:
        raise UserError(f"{path}: the checkpoint does not fit the model that its settings describe "
                        f"({str(e).splitlines()[0]}); take another") from None


def restore(run, state):
    """Puts a checkpoint's state into a new run.  UserError if it is of another model, or if the
    best.pt that it counts on is not there."""
    fill(run.model, state["model"], f"--resume {run.c.out}")
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        if run.noise is not None:
            run.noise.copy_(state["noise"])
        for k in COUNTERS:
            setattr(run, k, state[k])
    except (KeyError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"--resume {run.c.out}: the checkpoint is damaged ({e}); start again with "
                        "another --out") from None
    if run.best is not None:
        try:
            read_checkpoint(Path(run.c.out) / "best.pt", "--resume")
        except UserError as e:
            raise UserError(f"{e}; it holds the run's Best so far: copy it there, too, or start "
                            "again with another --out") from None
    if rank() > 0:                                                      # sums, kept in one place
        run.loss = run.seen = 0


def synchronise(model, share, flags):
    """Gradients summed over processes with weight share = n_local / n: that of the whole batch.

    One flat all_reduce after each backward pass: what DDP does, but without hooks in the forward
    pass, so that attacks cannot trigger it, and FreeAT and YOPO, which walk backwards as they
    like, need no exception. flags (numbers) travel along, so that all processes save and stop
    after the same batch; returns which of them any process has set.
    """
    if world() == 1:
        return flags
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() * share for g in grads] + [grads[0].new_tensor(flags)])
    dist.all_reduce(flat)
    *sums, flags = flat.split([g.numel() for g in grads] + [len(flags)])
    for p, g in zip(model.parameters(), sums):
        p.grad = g.view_as(p)
    return (flags > 0).tolist()


class Blowup(Exception):
    """A loss or a gradient that is not finite."""


def largest_activation(model, x):
    """Name of the layer whose output is the largest (or not finite) on x, and that size."""
    if len(x) == 0:                                                     # another process has them
        return "no layer", 0.0
    sizes = {}

    def hook_of(name):
        def hook(module, args, out):                            # returns None: the output stays
            sizes[name] = float(out.detach().abs().max())
        return hook
    hooks = [m.register_forward_hook(hook_of(name)) for name, m in model.named_modules() if name]
    with frozen(model), torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return max(sizes.items(), key=lambda item: (not math.isfinite(item[1]), item[1]))


def descend(run, backward, x, n):
    """One optimiser step on the gradient that backward() leaves. Returns the loss summed over x and
    how many images that are: none where the step was skipped.

    n  int  images of the whole batch, of which x is this process's part.  Blowup if not finite.
    """
    run.optimizer.zero_grad()
    try:
        loss = float(backward()) if len(x) else 0.0
    except FloatingPointError:
        loss = math.nan
    if not math.isfinite(loss):                                           # tell the other processes
        for p in run.model.parameters():
            p.grad = torch.full_like(p, math.nan)
    due = rank() == 0 and time.monotonic() - run.saved > 60 * run.c.save_every
    run.flags = synchronise(run.model, len(x) / n, [run.asked, due])
    if not all(bool(p.grad.isfinite().all()) for p in run.model.parameters() if p.grad is not None):
        run.optimizer.zero_grad()
        if run.c.nan == "stop":
            raise Blowup
        run.skipped += 1
        return 0.0, 0
    run.optimizer.step()
    return loss * len(x), len(x)


def train_batch(run, x, y, n):
    """All optimiser steps on one batch: one, or FreeAT's replays. Returns descend's (or means)."""
    c, at = run.c, (run.epoch + run.batch / run.batches) * replays(run.c)
    ramp = min(1.0, at / c.eps_warmup) if c.eps_warmup else 1.0
    eps, alpha = ramp * c.eps, ramp * c.alpha
    if c.alphas:
        alpha = [ramp * a for a in c.alphas]

    @reduced(c)
    def backward():
        if c.method == "free":
            return free_backward(run.model, x, y, noise, eps)
        if c.method == "yopo":
            return yopo_backward(run.model, x, y, eps, alpha, *c.yopo)
        return loss_backward(c, c.method, run.model, x, y, eps, alpha)
    if c.method != "free":
        return descend(run, backward, x, n)
    noise = run.noise[rank()::world()][:len(x)]                          # a view: replays change it
    sums = zip(*(descend(run, backward, x, n) for _ in range(c.replays)))
    return [sum(values) / c.replays for values in sums]


def total(values, device):
    """Sum of a list of numbers over processes."""
    if world() == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def train_epoch(run, images, labels):
    """The rest of run.epoch, from run.batch on; saves every c.save_every minutes and at its end."""
    c, device, start = run.c, images.device, time.monotonic() - run.seconds
    order = torch.Generator().manual_seed(seed_of(c.seed, "order", run.epoch))
    batches = torch.randperm(len(images), generator=order).to(device).split(c.batch_size)
    for group in run.optimizer.param_groups:                                # cosine to 0, per epoch
        group["lr"] = c.lr * 0.5 * (1 + math.cos(math.pi * run.epoch / run.epochs))
    run.model.train()
    run.busy = True
    while run.batch < len(batches):
        i = batches[run.batch]
        x = images[i]
        if c.pad or c.flip:
            crops = torch.Generator().manual_seed(seed_of(c.seed, "augment", run.epoch, run.batch))
            x = augment(x, c.pad, c.flip, crops)
        x, y = x[rank()::world()], labels[i][rank()::world()]               # this process's part
        x = x.to(next(run.model.parameters()).dtype) / 255
        torch.manual_seed(seed_of(c.seed, "attack", run.epoch, run.batch, rank()))
        try:
            loss, seen = train_batch(run, x, y, len(i))
        except Blowup:
            layer, size = largest_activation(run.model, x)
            raise UserError(
                f"loss or gradient is not finite at epoch {run.epoch + 1}, batch {run.batch + 1}; "
                f"the largest activation is {size:.3g}, in {layer}; the last checkpoint is "
                f"{Path(c.out) / 'last.pt'}: try a smaller --lr, or --resume with --nan skip, "
                "which drops such steps") from None
        run.loss, run.seen, run.batch = run.loss + loss, run.seen + seen, run.batch + 1
        run.seconds = time.monotonic() - start
        progress(run, len(batches))
        stop, due = run.flags
        if stop or due or run.batch == len(batches):
            save(run)
        if stop:
            raise KeyboardInterrupt
    run.busy = False
    if total([run.asked], device)[0]:                                   # while the last was saved
        raise KeyboardInterrupt


def progress(run, batches):
    """The live line: only on a terminal."""
    if rank() == 0 and on_terminal():
        per_batch = run.seconds / run.batch
        left = (batches - run.batch) * per_batch
        later = (run.epochs - run.epoch - 1) * batches * per_batch
        print(f"\r{run.epoch + 1:5d}  batch {run.batch}/{batches}  "
              f"loss {run.loss / max(run.seen, 1):.3f}  {clock(left)} left of the epoch, "
              f"{clock(left + later)} of the run \033[K", end="", flush=True)


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def greet(run, n):
    """The first line of a new run, on n training images."""
    c, size = run.c, sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    extra = f" + AdS {c.ads}" if c.ads else f" + {c.control}" if c.control else ""
    say(f"{c.model}{extra}: {size:,} trainable parameters; {c.dataset}, {n:,} training images, "
        f"{c.method}, eps {show(c.eps)}, {run.epochs} epochs; {c.out}")


def stop_at_signal(run):
    """Ctrl-C and SIGTERM end the run after the batch at hand, with a checkpoint."""
    def note(signum, frame):
        signal.signal(signum, signal.SIG_DFL)                           # a second one ends at once
        if not run.busy:                                                # measuring: nothing to lose
            raise KeyboardInterrupt
        run.asked = True
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)


def train(c, data, state=None):
    """The whole run, from a checkpoint's state or the beginning; ends with the paper's row."""
    run, n = new_run(c), len(data["train"][0])
    if state is not None:
        restore(run, state)
    if rank() == 0:
        write(Path(c.out) / "config.json", json.dumps(vars(c) | machine(c), indent=1))
    run.batches = -(-n // c.batch_size)
    if state is None:
        greet(run, n)
        save(run)
    else:
        say(f"{c.out}: " + (f"going on at epoch {run.epoch + 1}, batch {run.batch + 1}"
                            if run.epoch < run.epochs else "trained to its end; the test is left"))
        write_log(run)                                                  # if it was cut before it
    stop_at_signal(run)
    columns = [f"{f'{name} {kind}':>12}" for name in watched(c) for kind in ("clean", "pgd-10")]
    say("  ".join([f"{'epoch':>5}", f"{'lr':>8}", f"{'loss':>7}", *columns, f"{'time':>7}"]))
    for row in run.rows:
        say(format_row(row, c))
    while run.epoch < run.epochs:
        train_epoch(run, *data["train"])
        row = end_epoch(run, data)
        score = row[f"{c.select}_pgd-10"], row[f"{c.select}_clean"]
        if score[0] is not None and (run.best is None or score > tuple(run.best)):
            run.best = list(score)
            if rank() == 0:
                write(Path(c.out) / "best.pt", {"format": 1, "config": vars(c), "epoch": run.epoch,
                                                "model": run.model.state_dict()})
        save(run)
        write_log(run)
        say(("\r\033[K" if on_terminal() else "") + format_row(row, c))
    return finish(run, data)


def watched(c):
    """The sets measured after an epoch: training images where asked for, then the chooser."""
    return (["train"] if c.eval_train else []) + [c.select]


def end_epoch(run, data):
    """The row of the epoch that just ended; the run then stands before the next one."""
    c, device = run.c, data["train"][0].device
    loss, seen = total([run.loss, run.seen], device)
    row = {"epoch": run.epoch + 1, "lr": run.optimizer.param_groups[0]["lr"],
           "loss": loss / seen if seen else math.nan}
    measure = (run.epoch + 1) % c.eval_every == 0 or run.epoch + 1 == run.epochs
    for name in watched(c):
        images, labels = (v[:c.eval_train] if name == "train" else v for v in data[name])
        for spec in ("clean", "pgd-10"):
            row[f"{name}_{spec}"] = None
        if measure:
            found = evaluate(run.model, images, labels, ("clean", "pgd-10"), c, (name, run.epoch))
            row.update({f"{name}_{spec}": r["accuracy"] for spec, r in found.items()})
    row.update(skipped=run.skipped, seconds=round(run.seconds, 1))
    run.rows.append(row)
    run.epoch, run.batch, run.loss, run.seen = run.epoch + 1, 0, 0.0, 0
    run.skipped, run.seconds = 0, 0.0
    return row


def format_row(row, c):
    cells = [f"{row['epoch']:5d}  {row['lr']:8.1e}  {row['loss']:7.4f}"]
    cells += [f"{'-' if row[k] is None else f'{row[k]:.2%}':>12}"
              for name in watched(c) for k in (f"{name}_clean", f"{name}_pgd-10")]
    return "  ".join(cells) + f"  {clock(row['seconds']):>7}" + (
        f"  {row['skipped']} steps dropped" if row["skipped"] else "")


def write_log(run):
    """log.csv, written anew from the checkpoint's rows: what a crash did to it is mended."""
    if rank() == 0 and run.rows:
        write_csv(Path(run.c.out) / "log.csv", run.rows)


def write_csv(path, rows):
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, table.getvalue())


def finish(run, data):
    """The paper's row, Best / Last / Diff on the test set; printed, and kept in result.json."""
    c, out = run.c, Path(run.c.out)
    if world() > 1:
        dist.barrier()
    best, table = read_checkpoint(out / "best.pt", "--resume"), {}
    for name, weights, epoch in (("Last", run.model.state_dict(), run.epochs),
                                 ("Best", best["model"], best["epoch"])):
        if name == "Best" and epoch == run.epochs:
            table["Best"] = table["Last"]
            continue
        run.model.load_state_dict(weights)
        found = evaluate(run.model, *data["test"], c.attacks, c, ("test", epoch))
        table[name] = {"epoch": epoch} | {spec: r["accuracy"] for spec, r in found.items()}
    n, n_train = len(data["test"][0]), len(data["train"][0])
    say(f"\ntest, n = {n:,}, eps {show(c.eps)}" + "".join(f"{s:>10}" for s in c.attacks))
    for name in ("Best", "Last"):
        say(f"  {name} (epoch {table[name]['epoch']})".ljust(30) + "".join(
            f"{100 * table[name][s]:10.2f}" for s in c.attacks))
    diff = {s: table["Best"][s] - table["Last"][s] for s in c.attacks}
    say("  Diff".ljust(30) + "".join(f"{100 * diff[s]:10.2f}" for s in c.attacks))
    chosen = (f"{HELD_OUT:,} held-out training images" if c.select == "val"
              else f"the {n:,} test images (--select test)")
    say(f"Best is chosen by PGD-10 on {chosen}; {n_train:,} training images, {c.method}, "
        f"seed {c.seed}")
    if rank() == 0:
        write(out / "result.json", json.dumps(
            {"Best": table["Best"], "Last": table["Last"], "Diff": diff,
             "n_test": n, "n_train": n_train,
             "seconds": round(sum(r["seconds"] for r in run.rows), 1),
             "config": vars(c), **machine(c)}, indent=1))


# What makes two runs different experiments though the columns of a table, those of results_table,
# are the same: then it gets a column more.
SHAPES = {"all": ("alpha", "d_state", "n_layers", "patch_size", "batch_size", "lr", "weight_decay",
                  "eps_warmup", "precision", "classes", "alphas"),
          "trades": ("beta",), "free": ("replays",), "yopo": ("yopo",), "attention": ("d_hidden",)}


LATER = ("pgd-official", "aa")        # attacks of a finished run by --evaluate that --table shows


def results_table(folders):
    """--table: finished runs as Markdown, a line for each model: mean +- spread over its seeds.

    Accuracies in per cent, each as clean / PGD-10 / ...; spread is the sample standard deviation.
    Under "Best: pgd-official" and "Best: aa" stands what --evaluate RUN/best.pt --attacks
    pgd-official,aa left beside runs, with n where that is not all test images and with seeds where
    those are not all of the line's.
    """
    groups, common = {}, None                       # {columns, other settings: {seed: a run}}
    for folder in folders:
        result = read_result(folder)
        c = SimpleNamespace(**result["config"])
        same = {k: result["config"][k] for k in ("dataset", "eps", "attacks", "select")}
        if (common := common or same) != same:
            raise UserError(f"--table {folder}: its dataset, eps, attacks or select differ from "
                            f"those of {folders[0]}; print them apart")
        name = c.model + (f" + AdS {c.ads}" if c.ads else f" + {c.control}" if c.control else "")
        columns = (name, c.method, show(c.eps), c.steps, c.d_model, c.epochs, result["n_train"],
                   result["n_test"])
        shape = [k for part in ("all", c.method, c.model) for k in SHAPES.get(part, ())]
        others = tuple((k, str(vars(c).get(k))) for k in shape)
        runs = groups.setdefault((columns, others), {})
        if c.seed in runs:
            raise UserError(f"--table {folder}: {runs[c.seed][0]} has the same settings and seed; "
                            "give one of them")
        runs[c.seed] = folder, result
    names = ("model", "method", "eps", "steps", "width", "epochs", "n train", "n test")
    lines = [columns for columns, _ in groups]
    vary = [i for i, values in enumerate(zip(*lines)) if i == 0 or len(set(values)) > 1]
    alike = [f"{names[i]} {v}" for i, v in enumerate(lines[0]) if i not in vary]
    apart = list(dict.fromkeys(k for a, u in groups for b, v in groups if a == b
                               for (k, _), differs in zip(u, map(tuple.__ne__, u, v)) if differs))
    later = [a for a in LATER if a not in common["attacks"]
             and any(r["later"][a] for runs in groups.values() for _, r in runs.values())]
    heads = (*(names[i] for i in vary), *(k.replace("_", "-") for k in apart), "seeds",
             *(f"{which}: {' / '.join(common['attacks'])}" for which in ("Best", "Last", "Diff")),
             *(f"Best: {a}" for a in later), "logs",
             *["evaluations"] * bool(later))
    lines = [f"{common['dataset']}, {', '.join(alike)}", "",
             "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (columns, others), runs in groups.items():
        runs = list(runs.values())
        cells = [*(str(columns[i]) for i in vary), *(dict(others).get(k, "") for k in apart),
                 str(len(runs)), *(" / ".join(spread([100 * r[which][a] for _, r in runs])
                                              for a in common["attacks"])
                                   for which in ("Best", "Last", "Diff"))]
        for attack in later:
            hit = {r["config"]["seed"]: r["later"][attack] for _, r in runs if r["later"][attack]}
            accuracies, sizes = zip(*hit.values()) if hit else ((), (columns[-1],))
            n = " to ".join(map(str, dict.fromkeys((min(sizes), max(sizes)))))
            cells.append((spread(accuracies) if hit else "")
                         + f", n {n}" * (n != str(columns[-1]))
                         + f", seed {' '.join(map(str, hit))}" * (0 < len(hit) < len(runs)))
        cells.append(links(runs, "log.txt", "log.csv"))
        if later:
            hit = [run for run in runs if any(run[1]["later"][attack] for attack in later)]
            cells.append(links(hit, "best-evaluation.json"))
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))


def read_result(folder):
    """result.json of a finished run, and under "later" its best.pt's (per cent, n) under each
    attack of LATER at the run's eps and alpha, of the largest n, the worst of several seeds, from
    what --evaluate left in the folder, or None."""
    try:
        result = json.loads((Path(folder) / "result.json").read_text())
        c, best = result["config"], result["Best"]["epoch"]
        numbers = [result["n_train"], result["n_test"], *(
            c[k] for k in ("seed", "eps", "steps", "d_model", "epochs")), *(
            result[which][a] for which in ("Best", "Last", "Diff") for a in c["attacks"])]
        if not (all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers) and
                c.keys() > {"dataset", "select", "model", "ads", "control", "method"}):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"--table {folder}: there is no result.json of a finished run; let the "
                        "run end, or leave it out") from None
    file = Path(folder) / "best-evaluation.json"
    try:
        kept = json.loads(file.read_text()) if file.exists() else {"rows": []}
        found = [(int(r["n"]), -100 * float(r["accuracy"]), r["attack"]) for r in kept["rows"]
                 if r["eps"] == c["eps"] and kept.get("epoch", best) == best
                 and (r["attack"] == "aa" or r["alpha"] == c["alpha"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--table {folder}: its best-evaluation.json is damaged; evaluate best.pt "
                        "again, or remove the file") from None
    worst = {attack: (-v, n) for n, v, attack in sorted(found)}
    return result | {"later": {attack: worst.get(attack) for attack in LATER}}


def links(runs, *files):
    """A link to the first of these files that is there, of each (folder, result), by its seed."""
    return " ".join(f"[{r['config']['seed']}]({folder}/" + next(
        (f for f in files if (Path(folder) / f).exists()), files[-1]) + ")" for folder, r in runs)


def spread(values):
    """'mean +- standard deviation', or the one value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} +- {(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5:.1f}"


def machine(c):
    """What a result needs beside it: versions, device, date."""
    cuda = c.device.startswith("cuda")
    name = torch.cuda.get_device_name(c.device) if cuda else platform.machine()
    return {"torch": torch.__version__, "device": f"{c.device} {name}",
            "threads": torch.get_num_threads(), "world": world(), "date": time.strftime("%Y-%m-%d")}


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

def attacks_of(spec, c):
    """The attacks (model, x, y) -> x_adv of a name, each run on what the ones before left.

    "clean" none | "fgsm" | "pgd-K" K steps of c.alpha | "pgd-KxR" with R random restarts |
    "pgd-official", for --evaluate only | a name in AUTO | a name in ENSEMBLES.  UserError for
    another name, or too few classes for it.
    """
    names = ENSEMBLES.get(spec, (spec,))
    if names[0] in AUTO:
        need = 4 if "apgd-t" in names else 2
        if c.classes < need:
            raise UserError(f"--attacks {spec}: it needs at least {need} classes, and there are "
                            f"{c.classes}; leave it out")
        return [lambda model, x, y, f=AUTO[name]: f(model, x, y, c.eps) for name in names]
    if spec == "clean":
        return []
    if spec == "pgd-official" and c.evaluate:
        return [lambda model, x, y: pgd_official(model, x, y, c.eps, c.alpha)]
    if spec == "pgd-official":
        raise UserError(f"--attacks {spec}: it stands for comparison only, so a run cannot have it "
                        "measured; give it with --evaluate CKPT")
    if spec == "fgsm":
        return [lambda model, x, y: fgsm(model, x, y, c.eps)]
    kind, _, size = spec.partition("-")
    steps, _, restarts = size.partition("x")
    if kind == "pgd" and all(v.isdecimal() and len(v) < 7 for v in (steps, restarts or "1")) and (
            int(restarts or 1)):
        attack = in_parts(c, pgd)
        return [lambda *xy: attack(*xy, c.eps, c.alpha, int(steps))] * int(restarts or 1)
    raise UserError(f"--attacks {spec}: no such attack; choose from clean, fgsm, pgd-K and pgd-KxR "
                    f"(K steps, R restarts), {', '.join([*ENSEMBLES, *AUTO])}, pgd-official, "
                    "separated by commas")


def still_right(model, x, y, attacks, seed, source=None):
    """[(B,) bool]: which images are right as they are, and after each attack on what was right.

    seed    function  number of the attack -> the seed of its chances
    source  Module    the model that is attacked, where it is not the one that is measured
    """
    found = [hits(model, x, y)]
    for k, attack in enumerate(attacks):
        was, ok = found[-1], found[-1].clone()
        if was.any():
            torch.manual_seed(seed(k))
            x_adv = attack(model if source is None else source, x[was], y[was])
            ok[was] = hits(model, x_adv, y[was])
        found.append(ok)
    return found


def evaluate(model, images, labels, specs, c, place, kept=None, source=None):
    """{name: {"accuracy", "n", "right", "left", "seconds"}} on uint8 images (n, C, h, w).

    An image counts as right if it is classified correctly as it is and after every attack of the
    name; so a clean error counts as broken, and attacks run only on what is still right. left: how
    many are right after the first attack of the name, after the second, ...
    place  tuple   what is measured and when: fixes the chances, with c.seed, batch and attack
    kept   Kept    batches that an evaluation before this one finished        source  as still_right
    """
    images, labels, n = images[rank()::world()], labels[rank()::world()], len(images)
    dtype, results, kept = next(model.parameters()).dtype, {}, {} if kept is None else kept
    with frozen(model):
        for spec in specs:
            attacks, seconds = attacks_of(spec, c), 0.0
            left = [0] * (1 + len(attacks))                     # as they are, after each attack
            for b, (x, y) in enumerate(zip(images.split(c.batch_size), labels.split(c.batch_size))):
                if not len(x):                                          # more processes than images
                    continue
                at, start = repr((place, spec, c.eps, c.alpha, b)), time.monotonic()
                if at not in kept:
                    found = still_right(model, x.to(dtype) / 255, y, attacks, lambda k: seed_of(
                        c.seed, place, spec, k, b, rank()), source)
                    found = [int(ok.sum()) for ok in found]
                    kept[at] = [*found, time.monotonic() - start]
                left = [v + w for v, w in zip(left, kept[at])]
                seconds += kept[at][-1]
            left = [int(v) for v in total(left, images.device)]
            results[spec] = {"accuracy": left[-1] / n, "n": n, "right": left[-1], "left": left[1:],
                             "seconds": round(seconds, 1)}
    return results


def interval(right, n, z=1.959964):
    """95 % interval of a share.                                                    Wilson 1927"""
    p, shrink = right / n, 1 / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (shrink * (p + z * z / (2 * n) + side * half) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)                                    # but for rounding


# --------------------------------------------------------------------------------------------------
# Evidence: what --evaluate does with a checkpoint, checks for masked gradients, figures
# --------------------------------------------------------------------------------------------------

def pgd_official(model, x, y, eps, alpha, steps=10):
    """PGD as in the paper's published code, never used here but for comparison.

        d_0 uniform,  x_0 = clamp(x + d_0),  d <- clip(d + alpha sign grad_d CE(clamp(x_0 + d)))

    Arguments and result as pgd. The start is added twice, so that gradients are taken up to 2 eps
    from x; the clamp to [0, 1] lies inside the graph, so that a pixel beyond it never moves.
    """
    d = eps * (2 * torch.rand_like(x) - 1)
    start = (x + d).clamp(0, 1)
    with frozen(model):
        for _ in range(steps):
            _, _, grad = gradient(lambda d: model((start + d).clamp(0, 1)), d,
                                  lambda z: F.cross_entropy(z, y, reduction="none"))
            d = (d + alpha * grad.sign()).clamp(-eps, eps)
    return (x + d).clamp(0, 1)


class Kept(dict):
    """{batch of an attack: counts, seconds}, also as lines of a file, which outlives a cut."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                super().__setitem__(*json.loads(line))
            except (ValueError, TypeError):                                 # half a line: the cut
                pass

    def __setitem__(self, at, found):
        super().__setitem__(at, found)
        try:
            with open(self.path, "a") as f:
                f.write("\n" + json.dumps([at, found]))
        except OSError as e:
            raise UserError(f"cannot write {self.path} ({e.strerror}); copy the checkpoint to a "
                            "folder with room, and evaluate it there") from e


def digest(*parts):
    """16 characters that stand for tensors, and for anything that says in words what it is."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.cpu().numpy().tobytes() if torch.is_tensor(part) else repr(part).encode())
    return h.hexdigest()[:16]


def evaluate_checkpoint(c, state):
    """--evaluate: tables, also as CSV and JSON beside the checkpoint.  Returns the exit code.

    Finished batches wait in a file named after all that they depend on, until the tables are done.
    What the JSON has of other attacks on the same weights is kept.
    """
    model, other, stem = load_model(c, state), None, stem_of(c.evaluate)
    if c.transfer_from:
        other = read_checkpoint(Path(c.transfer_from), "--transfer-from")
        for key in ("dataset", "classes"):
            if other["config"][key] != getattr(c, key):
                raise UserError(f"--transfer-from {c.transfer_from}: its {key} is "
                                f"{other['config'][key]}, and that of {c.evaluate} "
                                f"{getattr(c, key)}; give a model of the same images")
    images, labels = load_data(c)["test"]
    code = [Path(file).read_bytes() for file in (__file__, *(
        module.__file__ for module in (ads, s4_adv, mamba_adv, attention_adv)))]
    key = digest(images, labels, *state["model"].values(), code, c.seed, c.batch_size, c.precision,
                 c.device, world(), torch.__version__, c.eps, c.alpha, c.attacks, c.eps_sweep,
                 c.steps_sweep, c.transfer_from)
    kept = Kept(stem.with_name(f"{stem.name}-{key}-{rank()}.part"))
    say(f"{c.evaluate}: epoch {state['epoch']}, {c.dataset} test, eps {show(c.eps)}, "
        f"alpha {show(c.alpha)}, seed {c.seed}")
    rows = tables(model, images, labels, c, kept, other)
    if c.images and rank() == 0:
        draw_images(model, images[:8], labels[:8], c, stem)
    checked = checks(model, images, labels, c) if c.checks else []
    if rank() == 0:
        job = "evaluation" if c.attacks else "-".join(job for job in JOBS if getattr(c, job))
        name, weights = stem.with_name(f"{stem.name}-{job.replace('_', '-')}"), digest(
            *state["model"].values())
        other_rows, other_checks = earlier(name.with_name(name.name + ".json"), weights, rows)
        rows = other_rows + rows
        if rows:
            write_csv(name.with_name(name.name + ".csv"), rows)
        write(name.with_name(name.name + ".json"),
              json.dumps({"checkpoint": stem.name + ".pt", "epoch": state["epoch"],
                          "weights": weights, "rows": rows, "checks": checked or other_checks,
                          "config": vars(c), **machine(c)}, indent=1))
    kept.path.unlink(missing_ok=True)
    return int(not all(check["passed"] for check in checked))


def stem_of(checkpoint):
    """Where what is said of a checkpoint lies: beside the file; of a run's folder, in it."""
    path = Path(checkpoint)
    return path / "last" if path.is_dir() else path.with_suffix("")


def earlier(file, weights, rows):
    """The rows of a table on the same weights that are not measured again by these; its checks."""
    def what(row):
        return [row.get(k, "") for k in ("attack", "eps", "alpha", "n", "seed", "source")]
    try:
        found, again = json.loads(file.read_text()), [what(row) for row in rows]
        if found["weights"] != weights:
            return [], []
        before = [row | {"source": row.get("source", "")} for row in found["rows"]]
        return [row for row in before if what(row) not in again and (
            not rows or row.keys() == rows[0].keys())], found["checks"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], []


def load_model(c, state):
    """The checkpoint's model, on c's device and in c's precision."""
    model = build(SimpleNamespace(**vars(c) | state["config"] | {
        "device": c.device, "precision": c.precision}))
    fill(model, state["model"], c.evaluate or c.analyse)
    return model


def tables(model, images, labels, c, kept, other):
    """The rows of --attacks, --eps-sweep, --steps-sweep and --transfer-from; sweeps are drawn.

    other  dict or None  the checkpoint of --transfer-from: its model is attacked, ours measured
    """
    measure = functools.partial(table, model, images, labels, kept=kept)
    stem, specs = stem_of(c.evaluate), [s for s in c.attacks if s != "clean"]
    rows = measure([(spec, spec, c) for spec in c.attacks]) if c.attacks else []
    if c.eps_sweep:
        swept = measure([(f"{spec}, eps {show(eps)}", spec, at_radius(c, eps))
                         for spec in specs or ["pgd-10"] for eps in c.eps_sweep])
        rows += swept
        draw_sweep(stem, "eps", [r for r in swept if ": " not in r["attack"]])
    if c.steps_sweep:
        swept = measure([(f"pgd-{k}", f"pgd-{k}", c) for k in c.steps_sweep])
        rows += swept
        draw_sweep(stem, "steps", [r | {"attack": "pgd", "steps": k}
                                   for r, k in zip(swept, c.steps_sweep)])
    if other:
        rows += measure([(f"transfer: {spec}", spec, c) for spec in dict.fromkeys(
            ["pgd-10", *(s for s in specs if s not in {**AUTO, **ENSEMBLES})])],
                        source=load_model(c, other),
            place=("transfer", digest(*other["model"].values())))
    return rows


def at_radius(c, eps):
    """c with another radius, and a step in proportion to it."""
    return SimpleNamespace(**vars(c) | {
        "eps": eps, "alpha": eps * c.alpha / c.eps if c.eps else eps / 4})


def table(model, images, labels, lines, kept, source=None, place="evaluate"):
    """Prints and returns a row for each (label, name of the attack, settings) of lines, and one for
    each stage of an ensemble; source and place as evaluate."""
    say(f"\n{'attack':24} {'accuracy':>9}   95 % interval        n   seconds")
    rows = []
    for label, spec, c in lines:
        r = evaluate(model, images, labels, (spec,), c, place, kept, source)[spec]
        stages = [(f": {name}", left) for name, left in zip(ENSEMBLES.get(spec, ()), r["left"])]
        for stage, right in stages + [("", r["right"])]:
            (low, high), seconds = interval(right, r["n"]), None if stage else r["seconds"]
            rows.append({"attack": ("transfer: " if source else "") + spec + stage,
                         "accuracy": right / r["n"], "low": low, "high": high, "n": r["n"],
                         "seconds": seconds, "eps": c.eps, "alpha": c.alpha, "seed": c.seed,
                         "source": place[1] if source else ""})
            say(f"{label + stage:24} {right / r['n']:9.2%}  {low:7.2%} - {high:.2%}  {r['n']:7,}"
                + ("" if stage else f"  {seconds:8.1f}"))
    return rows


# A check takes t (model, images x, labels y, settings c, known survivors) and returns whether the
# model passes, and its numbers: shares of the images. No check proves that gradients tell the
# truth; each catches a way in which they have not.

QUICK = {                                                               # for the checks alone
    "apgd-ce, 50 steps": [lambda c, *a: apgd_ce(*a, c.eps, 50)],
    "apgd-t, 3 x 50 steps": [lambda c, *a: apgd_t(*a, c.eps, 3, 50)],
    "square, 500 queries": [lambda c, *a: square(*a, c.eps, 500, 500)],
    "noise, 10 draws": 10 * [lambda c, m, x, y: (
        x + c.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)],
}


def by_batch(t, f):
    """f(x, y) of all images, the batches joined."""
    size = t.c.batch_size
    return torch.cat([f(x, y) for x, y in zip(t.x.split(size), t.y.split(size))])


def survivors(t, spec, eps=None, logits=1.0):
    """The share of images that an attack leaves right, at a radius or with scaled logits; kept."""
    key = spec + (f" at eps {show(eps)}" if eps is not None else "") + (
        f", logits x {logits:g}" if logits != 1 else "")
    if key not in t.known:
        c = t.c if eps is None else at_radius(t.c, eps)
        attacks = [functools.partial(f, c) for f in QUICK.get(spec, ())] or attacks_of(spec, c)
        hook = t.model.register_forward_hook(lambda module, args, z: z * logits)
        try:
            t.known[key] = float(by_batch(t, lambda x, y: still_right(
                t.model, x, y, attacks, lambda k: seed_of(c.seed, spec, k))[-1]).double().mean())
        finally:
            hook.remove()
    return key, t.known[key]


def compare(t, rule, *attacks):
    """Whether rule(slack, shares) holds for what attacks, (name, eps, logits) each, leave right."""
    shares = dict(survivors(t, *attack) for attack in attacks)
    return bool(rule(max(0.02, 1 / len(t.y)) + 1e-9, *shares.values())), shares


def falls(slack, *shares):
    return all(b <= a + slack for a, b in zip(shares, shares[1:]))


def deterministic(t):
    with torch.no_grad():
        first, second = (by_batch(t, lambda x, y: scores(t.model, x)) for _ in range(2))
    gap = float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))
    return gap < 1e-6, {"largest relative difference": gap}


def gradient_there(t):
    size = by_batch(t, lambda x, y: gradient(t.model, x, lambda z: F.cross_entropy(
        z, y, reduction="none"))[2].abs().flatten(1).amax(1))
    share = float((size == 0).double().mean())
    return share <= 0.01, {"images without": share}


def gradient_right(t, h=1e-7):
    """(f(x + h v) - f(x - h v)) / 2 h against <grad f(x), v>, f a random sum of logits, float64."""
    model = copy.deepcopy(t.model).double()

    def error(x, y):
        x, v = x.double(), torch.randint_like(x, 2).double() * 2 - 1
        mix = torch.randn(len(x), t.c.classes, dtype=x.dtype, device=x.device)
        _, _, grad = gradient(model, x, lambda z: (z * mix).sum(1))
        with torch.no_grad():
            rise = ((scores(model, x + h * v) - scores(model, x - h * v)) * mix).sum(1)
        return (rise / (2 * h) - (grad * v).flatten(1).sum(1)).abs() / grad.flatten(1).norm(dim=1)
    torch.manual_seed(seed_of(t.c.seed, "direction"))
    with frozen(model):
        error = by_batch(t, error)
    share = float((~(error < 1e-3)).double().mean())                        # NaN: no gradient
    return share <= 0.01, {"images off by 0.1 %": share, "median error": float(error.median())}


CHECKS = {
    "forward deterministic and finite": deterministic,
    "gradient not zero": gradient_there,
    "gradient is the slope, in float64": gradient_right,
    "fgsm, pgd-10, pgd-50x5 in this order": lambda t: compare(
        t, falls, ["clean"], ["fgsm"], ["pgd-10"], ["pgd-50x5"]),
    "accuracy falls with eps": lambda t: compare(
        t, falls, *(["pgd-10", min(k * t.c.eps, 1.0)] for k in (0, 0.5, 1, 2, 4))),
    "accuracy falls with steps": lambda t: compare(
        t, falls, ["pgd-1"], ["pgd-5"], ["pgd-10"], ["pgd-50"]),
    "accuracy is 0 at eps 1": lambda t: compare(
        t, lambda slack, left: left <= slack, ["pgd-50", 1.0]),
    "cross-entropy and targeted DLR agree": lambda t: compare(
        t, lambda slack, ce, dlr: ce <= dlr + 0.1, *([name] for name in list(QUICK)[:2])),
    "square not stronger than pgd-50x5": lambda t: compare(
        t, lambda slack, white, black: black >= white - slack,
        ["pgd-50x5"], ["square, 500 queries"]),
    "smaller logits change nothing": lambda t: compare(                     # saturation hides
        t, lambda slack, left, *would: left <= min(would) + slack,
        *(["pgd-10", None, k] for k in (1, 0.1, 0.01))),
    "noise weaker than pgd-10": lambda t: compare(
        t, lambda slack, noise, pgd_10: pgd_10 < noise or noise == 0,
        ["noise, 10 draws"], ["pgd-10"]),
}


def checks(model, images, labels, c):
    """[{"name", "passed", "numbers"}] of CHECKS on the first 200 images, or --test-size; printed.

    slack: two images of a hundred.
    """
    n, found = min(len(labels), c.test_size or 200), []
    t = SimpleNamespace(model=model, x=images[:n].to(next(model.parameters()).dtype) / 255,
                        y=labels[:n], c=c, known={})
    say(f"\nchecks for masked gradients, n = {n:,}")
    with frozen(model):
        for name, check in CHECKS.items():
            try:
                passed, numbers = check(t)
            except (UserError, FloatingPointError) as e:
                passed, numbers = False, {"error": str(e)}
            found.append({"name": name, "passed": passed, "numbers": numbers})
            say(f"{'pass' if passed else 'FAIL'}  {name:36}  " + "; ".join(
                f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}"
                for k, v in numbers.items()))
    return found


def draw(path, fill, rows=1, columns=1, size=(4.2, 3.2), sharex=True):
    """fill(axes) draws into a grid of panels (rows, columns) with common scales; saved as PNG.

    UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a figure needs matplotlib, which is not installed; pip install "
                        "matplotlib") from None
    figure, file = Figure((size[0] * columns, size[1] * rows), layout="constrained"), io.BytesIO()
    fill(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=True))
    figure.savefig(file, format="png", dpi=150)
    write(path, file.getvalue())
    say(f"drawn: {path}")


def draw_lines(ax, lines, top):
    """{label: (x, y, bars or None, style)} in black, each labelled at its end, y from 0 to top."""
    at = -math.inf
    ax.set_ylim(0, top)
    ax.tick_params(labelleft=True, labelbottom=True)
    ax.spines[["top", "right"]].set_visible(False)
    for label, (x, y, bars, style) in sorted(lines.items(), key=lambda item: item[1][1][-1]):
        ax.errorbar(x, y, bars, fmt=style, color="black", mfc="white" if "--" in style else "black",
                    lw=1, ms=4, capsize=2, markevery=-(-len(x) // 12))
        at = max(y[-1], at + 0.06 * top)                                # no label on another
        ax.annotate(label, (x[-1], at), (7, 0), textcoords="offset points", va="center", size=8)


def draw_sweep(stem, what, rows):
    """A sweep's rows: accuracy in per cent, with its interval, against eps or number of steps."""
    def fill(axes):
        lines = {}
        for k, name in enumerate(dict.fromkeys(r["attack"] for r in rows)):
            line = sorted((r for r in rows if r["attack"] == name), key=lambda r: r[what])
            y = [100 * r["accuracy"] for r in line]
            bars = [[abs(100 * r[end] - v) for r, v in zip(line, y)] for end in ("low", "high")]
            lines[name] = ([r[what] for r in line], y, bars,
                           "osD^v"[k % 5] + ("-", "--", ":", "-.")[k % 4])
        draw_lines(axes[0, 0], lines, 105 * max(r["high"] for r in rows))
        axes[0, 0].set(xlabel=what, ylabel=f"accuracy, %  (n = {rows[0]['n']:,})")
    try:
        draw(stem.with_name(f"{stem.name}-{what}-sweep.png"), fill) if rank() == 0 else None
    except UserError as e:
        say(f"no figure: {e}")


def plot_runs(runs, path):
    """--plot: accuracies over epochs from each run's log.csv, a panel for each run.

    The second set is what chose Best, which the log has: held-out images, or test (--select test).
    """
    logs, sets = [], {"train": "train", "val": "held-out", "test": "test"}
    pairs = [f"{name}_{attack}" for name in sets for attack in ("clean", "pgd-10")]
    for run in runs:
        file = Path(run) / "log.csv"
        try:
            rows = csv.DictReader(file.read_text().splitlines() if file.is_file() else ())
            keys = [k for k in rows.fieldnames or () if k in pairs]
            logs.append((keys, [{k: float(r[k]) for k in ("epoch", *keys)} for r in rows
                                if keys and r[keys[-1]]]))
            if len(keys) % 2 or not all(0 <= v < 1e9 for r in logs[-1][1] for v in r.values()):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, csv.Error):
            raise UserError(f"--plot {run}: its log.csv is damaged; --resume writes it anew from "
                            "the checkpoint") from None
        if not logs[-1][1]:
            raise UserError(f"--plot {run}: there is no log.csv with a measured epoch; give "
                            "folders of runs that have come so far")

    def fill(axes):
        for ax in axes.flat[len(runs):]:
            ax.axis("off")
        for ax, run, (keys, rows) in zip(axes.flat, runs, logs):
            lines, epochs = {}, [round(r["epoch"]) for r in rows]
            for key in keys:
                name, attack = key.split("_")
                style = ("o" if attack == "clean" else "s") + ("--" if name == "train" else "-")
                y = [100 * r[key] for r in rows]
                lines[f"{sets[name]}, {attack}"] = epochs, y, None, style
            draw_lines(ax, lines, top)
            clean = lines[f"{sets[name]}, clean"][1]                    # y: PGD-10 of the chooser
            best = max(range(len(y)), key=lambda i: (y[i], clean[i]))
            ax.axvline(epochs[best], color="0.6", lw=0.8)
            ax.set_title(f"{Path(run).resolve().name}\n{sets[name]}, {attack}: Best "
                         f"{y[best]:.1f} (epoch {epochs[best]}), Last {y[-1]:.1f}", size=9)
            ax.set(xlabel="epoch", ylabel="accuracy, %")
    top = 108 * max(0.01, *(r[k] for keys, rows in logs for r in rows for k in keys))
    columns = 2 if len(runs) == 4 else min(len(runs), 3)
    draw(Path(path), fill, -(-len(runs) // columns), columns)


def draw_images(model, images, labels, c, stem):
    """--images: images, perturbations, images under PGD-10; predictions are printed as a table."""
    x, path = images.to(next(model.parameters()).dtype) / 255, f"{stem.name}-images.png"
    torch.manual_seed(seed_of(c.seed, "images"))
    x_adv, gain = pgd(model, x, labels, c.eps, c.alpha, 10), 0.5 / c.eps if c.eps else 0.0
    noise = f"perturbation x {gain:.3g} + 0.5"
    with frozen(model), torch.no_grad():
        seen = [labels, *(scores(model, v).argmax(1) for v in (x, x_adv))]
    say(f"\n{'image':>6} {'label':>6} {'clean':>6} {'pgd-10':>6}    the grid shows {noise}")
    for i, row in enumerate(zip(*(v.tolist() for v in seen))):
        say(f"{i:6} " + " ".join(f"{v:6}" for v in row))
    grid = torch.stack([x, 0.5 + gain * (x_adv - x), x_adv]).clamp(0, 1).cpu()  # (3, n, C, h, w)

    def fill(axes):
        for ax, picture in zip(axes.flat, grid.flatten(0, 1)):
            ax.imshow(picture.expand(3, -1, -1).permute(1, 2, 0).float().numpy())
            ax.axis("off")
        for i, (y, clean, attacked) in enumerate(zip(*(v.tolist() for v in seen))):
            axes[0, i].set_title(f"label {y}\nclean: {clean}", size=7)
            axes[2, i].set_title(f"pgd-10: {attacked}", size=7)
        axes[1, 0].set_title(noise, size=7, loc="left")
    try:
        draw(stem.with_name(path), fill, 3, len(x), (1.1, 1.3))
    except UserError as e:
        from torchvision.utils import save_image
        file = io.BytesIO()
        save_image(F.interpolate(grid.flatten(0, 1), scale_factor=4), file, "png", nrow=len(x))
        write(stem.with_name(path), file.getvalue())
        say(f"drawn without captions: {stem.with_name(path)} ({e})")


# --------------------------------------------------------------------------------------------------
# Speed: fewer bits in training; --bench, what a step costs
# --------------------------------------------------------------------------------------------------

@contextmanager
def reduced(c):
    """Training's products, attacks included, with the bits of --precision; also a decorator.

    bf16  autocast: products of Linear and Conv layers; kernels and states leave it (`once`)
    tf32  products on a GPU take inputs of 10 bits
    Weights, their gradients and the optimiser are float32 in both, and evaluation never runs in it.
    """
    gpu = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in gpu]
    bf16 = c.precision == "bf16"
    try:
        for part in gpu:
            part.allow_tf32 = c.precision == "tf32"
        with torch.autocast(torch.device(c.device).type, torch.bfloat16) if bf16 else nullcontext():
            yield
    finally:
        for part, allowed in zip(gpu, before):
            part.allow_tf32 = allowed


def loss_backward(c, method, model, x, y, eps, alpha):
    """The loss and its gradient, part_size(c) images at a time, --micro-batch at most: memory for
    these, the same mean."""
    total, x_adv = 0.0, attacked(c, method, model, x, y, eps, alpha)
    n = min(part_size(c, c.d_model * (2 if c.model == "mamba" else 1)), c.micro_batch or math.inf)
    with kernels_apart(SCRIPTS[c.model]) if n < len(x) else nullcontext():
        for part in zip(*(v.split(n) for v in (x, x_adv, y))):
            loss = loss_of(c, method, model, *part) * (len(part[0]) / len(x))
            loss.backward()
            total = total + loss.detach()
    return total


@contextmanager
def kernels_apart(script):
    """Within it each kernel is made once for all parts of a batch, as a constant that gathers its
    gradient; at the end that goes on to the weights, through the kernel made once more, layer by
    layer: so no part makes a kernel, and only one kernel's intermediate results are held."""
    once, made = script.once, {}

    def gather(module, key, make):
        if module not in made:
            with torch.no_grad():
                found, tree = tree_flatten(once(module, key, make))
            made[module] = key, make, tree, [v.detach().requires_grad_() for v in found]
        return tree_unflatten(made[module][-1], made[module][-2])
    script.once = gather
    try:
        yield
    finally:
        script.once = once
    for module, (key, make, _, constants) in made.items():
        found, _ = tree_flatten(once(module, key, make))
        torch.autograd.backward(found, [v.grad for v in constants])


def plain_cauchy(w, lam, s, c):
    """s4_adv.cauchy, both of each pair, term by term."""
    w, lam = (torch.cat([v, v.conj()], -1) for v in (w, lam))               # (H, 4, N), (N,)
    R = 1 / (1j * s[:, None] - c * lam[:, None])                            # (H, N, M)
    return (w[..., None] * R[:, None]).sum(2)                               # (H, 4, M)


def plain_vandermonde(c, log_lam, L):
    """vandermonde of s4_adv and attention_adv, an exponential for each state and token."""
    powers = torch.exp(log_lam[..., None] * torch.arange(L, device=c.device))       # (H, N, L)
    return (c[..., None] * powers).sum(1)                                   # (H, L)


def plain_convolution(u, K_hat):
    """s4_adv.Convolution, left to autograd."""
    L = u.shape[1]
    u_hat = torch.fft.rfft(u.transpose(1, 2), 2 * L)                        # (B, H, L+1)
    y = torch.fft.irfft(u_hat * K_hat, 2 * L, norm="forward")               # (B, H, 2L)
    return y[..., :L].transpose(1, 2)                                       # (B, L, H)


def plain_scan(a, b):
    """s4_adv.Scan, a loop left to autograd."""
    xs = [b[:, 0]]                                                          # (B, P)
    for b_t in b.unbind(1)[1:]:
        xs.append(a * xs[-1] + b_t)
    return torch.stack(xs, 1)                                               # (B, L, P)


@contextmanager
def plainly():
    """Within it the work is done as one would first write it down, to compare: each kernel is
    computed at each step, as the sum that defines it, weights are not frozen, PGD takes the whole
    batch, and autograd stores every state of a loop."""
    from unittest.mock import patch
    with ExitStack() as stack:
        for module, names in ((s4_adv, {"Convolution": SimpleNamespace(apply=plain_convolution),
                                        "Scan": SimpleNamespace(apply=plain_scan),
                                        "cauchy": plain_cauchy, "vandermonde": plain_vandermonde}),
                              (mamba_adv, {"selective_scan": mamba_adv.selective_scan_loop}),
                              (attention_adv, {"vandermonde": plain_vandermonde})):
            stack.enter_context(patch.multiple(
                module, frozen=nullcontext, once=lambda module, key, make: make(), **names))
        # Not the module's attributes: in a process of --bench they are a copy of these.
        stack.enter_context(patch.dict(globals(), frozen=nullcontext,
                                       part_size=lambda c, *width: c.batch_size))
        yield


@contextmanager
def without_triton():
    """Within it Mamba's scan is made of PyTorch's own operations on a GPU, too."""
    from unittest.mock import patch
    with patch.object(mamba_adv, "triton", None):
        yield


# The forms of a work that --bench compares: the context of each, and what it changes in c.
FORMS = {"fast": (nullcontext, {}), "bf16": (nullcontext, {"precision": "bf16"}),
         "no-ads": (nullcontext, {"ads": None}), "no-triton": (without_triton, {}),
         "plain": (plainly, {}), "peer": (plainly, {})}
PEERS = {"s5": "s5-pytorch", "mamba": "mambapy"}                         # on PyPI, without AdS


def peer(c):
    """A function that makes the layer of PEERS that does the work of c's, (B, L, H) -> (B, L, H);
    None where there is none, or it is not installed."""
    if c.ads or c.control:
        return None
    try:
        if c.model == "s5":
            from s5 import S5
            return lambda: S5(c.d_model, c.d_state)
        if c.model == "mamba":
            from mambapy.mamba import MambaBlock, MambaConfig
            return lambda: MambaBlock(MambaConfig(d_model=c.d_model, n_layers=1, d_state=c.d_state))
    except ImportError:
        say(f"No peer is timed: {PEERS[c.model]} is not installed here")


def bench_jobs(c, form="fast"):
    """{name: function}: each kind of work on one batch of random images.

    Labels are the model's own answers, so that evaluation attacks every image; the learning rate
    is 0, so that every repetition meets the same weights. form "peer": with peer(c)'s layers.
    """
    model, draw = build(c), torch.Generator().manual_seed(seed_of(c.seed, "bench"))
    for k, block in enumerate(model.blocks if form == "peer" else ()):
        if c.model == "s5":
            block.ssm = peer(c)()
        else:
            model.blocks[k] = peer(c)()
    model.to(c.device)
    optimizer = torch.optim.AdamW(param_groups(model, c.weight_decay), lr=0.0)
    images = torch.randint(256, (c.batch_size, *c.shape), generator=draw, dtype=torch.uint8)
    images = images.to(c.device)
    x = images.to(next(model.parameters()).dtype) / 255
    with torch.no_grad():                                 # one by one: the peak is not yet measured
        y = torch.cat([model(v).argmax(1) for v in x.split(1)])

    @reduced(c)
    def forward():
        with frozen(model), torch.no_grad():
            model(x)

    @reduced(c)
    def attack():
        in_parts(c, pgd)(model, x, y, c.eps, c.alpha, 1)

    @reduced(c)
    def step(method):
        optimizer.zero_grad()
        loss_backward(c, method, model, x, y, c.eps, c.alpha)
        optimizer.step()

    return {"forward": forward, "attack step": attack,
            f"pgd-{c.steps} AT step": lambda: step("pgd"),
            f"TRADES-{c.steps} step": lambda: step("trades"),
            "evaluation": lambda: evaluate(model, images, y, ("clean", "pgd-10"), c, "bench")}


def stopwatch(job, device):
    """job(): its seconds, the CPU seconds of all threads of this process, and its result."""
    begin, cpu, cuda = time.perf_counter(), time.process_time(), device.startswith("cuda")
    if cuda:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
    result = job()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if cuda:
        last.record()
        torch.cuda.synchronize(device)
        seconds = first.elapsed_time(last) / 1000
    return seconds, cpu, result


def timed(c, job):
    """job(): seconds, CPU seconds of all threads, and the share of that in what `once` makes:
    kernels and their FFTs, without their gradient. On a GPU a share of the seconds of one more
    run, since the clock has to wait for the GPU at each of them."""
    from unittest.mock import patch
    spent, once, gpu = [], SCRIPTS[c.model].once, c.device.startswith("cuda")
    undisturbed = stopwatch(job, c.device) if gpu else None

    def watched(module, key, make):
        def measured():
            *seconds, made = stopwatch(make, c.device)
            spent.append(seconds)
            return made
        return once(module, key, measured)
    with patch.object(SCRIPTS[c.model], "once", watched):
        whole, which = stopwatch(job, c.device), 0 if gpu else 1
    share = sum(seconds[which] for seconds in spent) / whole[which]
    return *(undisturbed or whole)[:2], share


def growth(job, device):
    """Bytes by which job() raises the memory of this process, or of its GPU, at most.

    nan where there is no /proc. (getrusage's peak would do, but begins with the parent's.)
    """
    cuda = device.startswith("cuda")

    def memory(what):
        if cuda:
            return getattr(torch.cuda, what)(device)
        return 1024 * int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")               # peak := memory now
        before = memory("memory_allocated" if cuda else "VmRSS")
        job()
        return memory("max_memory_allocated" if cuda else "VmHWM") - before
    except OSError:
        job()
        return math.nan


class Traffic(TorchDispatchMode):
    """Within it .bytes counts what PyTorch's operators read and write, views apart, and .flop the
    operations of their products (PyTorch's own formulas; FlopCounterMode refuses autograd.grad)."""
    bytes = flop = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out, schema, kwargs = operator(*args, **(kwargs or {})), operator._schema, kwargs or {}
        given = kwargs | {a.name: v for a, v in zip(schema.arguments, args)}
        changed = {a.name: a.kwarg_only for a in schema.arguments           # out=... or not
                   if a.alias_info and a.alias_info.is_write}
        fills = operator.overloadpacket.__name__ in ("copy_", "fill_", "zero_")
        unread = {name for name, is_out in changed.items() if is_out or fills}
        read, written = ([t for t in tree_flatten(v)[0] if isinstance(t, torch.Tensor)] for v in (
            [v for name, v in given.items() if name not in unread],
            [given[name] for name in changed] if changed else out))
        places = {t.untyped_storage().data_ptr() for t in read}
        view = any(t.untyped_storage().data_ptr() in places for t in written)
        if (changed or not view) and "empty" not in str(operator):
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in read + written)
        if (count := flop_registry.get(operator.overloadpacket)) is not None:
            self.flop += count(*args, **kwargs, out_val=out)
        return out


def rates(job, seconds):
    """TB/s and TFLOP/s of a job that takes so many seconds; a kernel of Triton's is not seen."""
    with Traffic() as traffic:
        job()
    return traffic.bytes / seconds / 1e12, traffic.flop / seconds / 1e12


def limits(device):
    """A sentence on what a GPU reaches: a copy of 1 GiB, and products of 8192 x 8192 numbers."""
    def best(job):
        return min(stopwatch(job, device)[0] for _ in range(6))
    n, a = 8192, torch.randn(2 ** 28, device=device)
    copy, b = torch.empty_like(a), a[:n * n].view(n, n)
    found = [8 * len(a) / best(lambda: copy.copy_(a)) / 1e12]
    found += [2 * n ** 3 / best(lambda: v @ v) / 1e12 for v in (b, b.bfloat16())]
    return "This GPU: copy {:.2f} TB/s, products {:.1f} TFLOP/s, in bf16 {:.0f}.".format(*found)


def sample(c, name, form):
    """A job, run once for the growth of memory, once more for the rest: timed(...), growth(...),
    and on a GPU once more for its rates.

    On a CPU in a new process: a peak never falls, and keep_memory is ours, plain and peer run
    without.
    """
    all_bits()
    context, changes = FORMS[form]
    if context is nullcontext:
        keep_memory()
    c = SimpleNamespace(**vars(c) | changes)
    job = bench_jobs(c, form)[name]
    with context():
        peak = growth(job, c.device)
        costs = timed(c, job)
        return *costs, peak, *(rates(job, costs[0]) if c.device.startswith("cuda") else ())


def sample_apart(c, *args):
    """sample(...), on a CPU in a new process; None if memory did not suffice."""
    try:
        if c.device.startswith("cuda"):
            return sample(c, *args)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(sample, c, *args).result()
    except RuntimeError as e:                                               # or it was killed
        if not isinstance(e, BrokenExecutor) and "memory" not in str(e):
            raise
        return None


def timings(c, L):
    """Rows of the table: a dict for each kind of work and form, on images of L tokens."""
    c = SimpleNamespace(**vars(c) | {"shape": (c.shape[0], c.patch_size, c.patch_size * L)})
    which, costs = 0 if c.device.startswith("cuda") else 1, {}
    samples = {(name, form): [] for name in bench_jobs(c) for form in c.forms
               if (name, form) != ("evaluation", "bf16")}                   # it never runs in bf16
    for _ in range(c.bench):                                                # interleaved
        for key, seen in samples.items():
            if None not in seen:
                seen.append(sample_apart(c, *key))
    for (name, form), seen in samples.items():
        if None in seen:
            say(f"{L:5d}  {name:16} {form:9}  did not fit into memory")
            continue
        seconds, cpu, share, peak, *rate = (statistics.median(v) for v in zip(*seen))
        cost = [s[which] for s in seen]
        costs[name, form] = statistics.median(cost)
        yield dict(L=L, work=name, form=form, seconds=seconds, cpu_seconds=cpu,
                   spread=(max(cost) - min(cost)) / costs[name, form],
                   images_per_second=c.batch_size / seconds,
                   us_per_token=1e6 * seconds / c.batch_size / L,
                   peak_mb=peak / 2 ** 20, kernel_share=share,
                   times_fast=costs[name, form] / costs.get((name, "fast"), math.nan),
                   **dict(zip(("tb_per_second", "tflop_per_second"), rate)))


def bench(c):
    """--bench: what each kind of work costs in each of FORMS; table and bench.csv."""
    asked, cuda = c.forms or FORMS, c.device.startswith("cuda")
    here = {"fast": True, "bf16": c.precision == "fp32" and has(c, "bf16"), "no-ads": c.ads,
            "no-triton": cuda and c.model == "mamba" and mamba_adv.triton, "plain": True,
            "peer": "peer" in asked and peer(c)}
    if c.forms and (missing := [form for form in c.forms if not here.get(form)]):
        raise UserError(f"--forms {missing[0]}: choose from fast, plain; bf16 (--precision fp32, "
                        "where the device has it); no-ads (with --ads); no-triton (mamba on a "
                        "GPU); peer (s5: s5-pytorch, mamba: mambapy, installed, without --ads and "
                        "--control)")
    c.forms = [form for form in FORMS if form in asked and here[form]]
    held, rows = lock(Path(c.out)), []
    own, which, rate = (("", "seconds", "    TB/s  TFLOP/s") if cuda else
                        (" of a new process", "CPU seconds", ""))
    say(f"{c.model}{f' + AdS {c.ads}' if c.ads else ''}, d_model {c.d_model}, {c.n_layers} layers, "
        f"batch {c.batch_size}, micro-batch {c.micro_batch or 'by itself'}, {c.precision}, "
        f"{machine(c)['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"Medians of {c.bench} interleaved runs, each the second one{own}. Spread (max - min) and "
        f"times fast: of {which}.\nPeak MB: growth of memory. "
        "Kernel: its share of the time, without its gradient.")
    if cuda:
        say(limits(c.device) + " TB/s and TFLOP/s of a work: of PyTorch's operators.")
    say("    L  work             form      seconds    CPU s  spread  images/s  us/token   peak MB  "
        "kernel  times fast" + rate)
    line = ("{L:5d}  {work:16} {form:9} {seconds:8.3f} {cpu_seconds:8.3f} {spread:7.0%} "
            "{images_per_second:9.1f} {us_per_token:9.2f} {peak_mb:9.0f} {kernel_share:7.1%} "
            "{times_fast:11.2f}" + ("{tb_per_second:8.2f} {tflop_per_second:8.1f}" if cuda else ""))
    for L in c.lengths or [c.shape[1] * c.shape[2] // c.patch_size ** 2]:
        for row in timings(c, L):
            say(line.format(**row))
            rows.append(dict(model=c.model, ads=c.ads, batch=c.batch_size, **row))
    if not rows:
        raise UserError(f"--batch-size {c.batch_size}: nothing fits into memory; give fewer")
    write_csv(Path(c.out) / "bench.csv", rows)
    held.close()


# --------------------------------------------------------------------------------------------------
# Analysis: the paper's argument in numbers (README, "The argument in one page"); the mathematics
# stands beside the models
# --------------------------------------------------------------------------------------------------

def watch(model, x):
    """The layers' sequence parts, and for each {name: (input, output)} on images x of the part
    itself (""), and of what it is made of."""
    mixers, hooks = [m for m in model.modules() if hasattr(m, "middle")], []
    seen = [{} for _ in mixers]
    for m, at in zip(mixers, seen):
        for name, part in [("", m), *m.named_children()]:
            hooks.append(part.register_forward_hook(
                lambda _, args, out, at=at, name=name: at.update({name: (args[0], out)})))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return mixers, seen


def components(c, at):
    """{name: (before, after)} of the parts that the paper's figure compares; at as in watch."""
    last = at["middle"][0]
    parts = {"mamba": {"SSM": (at[""][0], last)},
             "attention": {"SSM": at.get("ema"), "attention": (at.get("gates", at[""])[0], last)}
             }.get(c.model, {"SSM": at.get("ssm")})
    if c.ads or c.control:
        parts["AdS" if c.ads else c.control] = at["middle"]
    return parts | {"Linear": at["out"]}


def distances(f, g):
    """MSE, KL of softmax over channels, MSE / mean square, of attacked g from clean f (B, L, .)."""
    mse, p, q = (g - f).square().mean(), f.log_softmax(-1), g.log_softmax(-1)
    return {"MSE": mse, "KL": (p.exp() * (p - q)).sum(-1).mean(),
            "MSE / mean square": mse / f.square().mean()}


def rms(v):
    return v.square().mean().sqrt()


def response(u, u_adv, y, y_adv):
    """What a map does to the signal, and to the error that PGD made of it."""
    seen = (y_adv - y).abs().max() / (u_adv - u).abs().max()
    return {"signal, rms y / rms u": rms(y) / rms(u), "error seen, |dy| / |du|": seen,
            "error seen, rms dy / rms du": rms(y_adv - y) / rms(u_adv - u),
            "the same, relative to the signal": rms(y_adv - y) / rms(u_adv - u) * rms(u) / rms(y)}


def fixed(script, ssm, u, u_adv, y, y_adv):
    """P1, P2 of S4, DSS, S5 or the moving average on inputs u and outputs y, clean and attacked."""
    L, numbers = u.shape[1], response(u, u_adv, y, y_adv)
    (gain, worst), (spectral, modal) = script.gain(ssm, L), script.gain_bounds(ssm, L)
    share = (y_adv - y).abs().amax((0, 1)) / gain / (u_adv - u).abs().max()
    return {"gain ||K||_1, mean of channels": gain.mean(), "gain ||K||_1, largest": gain.max(),
            "worst input reaches / gain": (ssm(worst).abs().amax((0, 1)) / gain).min(),
            "spectral gain / gain, mean": (spectral / gain).mean(),
            "modal bound / gain, median": (modal / gain).median(), **numbers,
            "error seen / gain, largest": share.max()}


def selective(mamba, u, u_adv):
    """P3 of Mamba on the inputs of its scan, clean and attacked."""
    def scan(v, given=None):
        return mamba_adv.selective_scan(v, *(given or mamba.parameters_of(v)), mamba.D)
    (dt, A, B, C), (dt_adv, _, B_adv, _) = given, _ = [mamba.parameters_of(v) for v in (u, u_adv)]
    clean, attacked, L = (u, dt, B), (u_adv, dt_adv, B_adv), u.shape[1]
    wrong, sizes = 0.0, []                                                  # of h, e, three terms
    for h, h_adv, *terms in mamba_adv.scan_errors(clean, attacked, A):
        wrong = max(wrong, float((h_adv - h - sum(terms)).abs().max()))
        sizes.append(torch.stack([v.abs().amax((1, 2)).mean() for v in (h, h_adv - h, *terms)]))
    sizes, numbers = torch.stack(sizes), response(u, u_adv, scan(u), scan(u_adv))
    numbers["|e - its three terms|, largest"] = wrong
    for t in dict.fromkeys((1, -(-L // 4), -(-L // 2), L)):
        numbers[f"|e_t|, t = {t}"] = sizes[t - 1, 1]
    numbers["|h_t|, t = L"], total = sizes[-1, 0], sizes[:, 2:].mean(0).sum()
    for k, name in enumerate(("a' e carried", "(a' - a) h stored", "b' - b fed")):
        numbers[f"share of {name}"] = sizes[:, 2 + k].mean() / total
    numbers["|e_L| / its linear bound"] = sizes[-1, 1] / sizes[:, 3:].sum()
    token = [[v[:, L // 2:L // 2 + 1] for v in vs] for vs in (clean, attacked)]
    for M in (1, 10, 100, 1000):
        _, h_adv, _, moved, fed = next(mamba_adv.scan_errors(*token, A, float(M)))
        numbers[f"|e| after a token, state {M}"] = (moved + fed).abs().amax((1, 2)).mean()
    few, outputs = [w[:8] if w.dim() > 2 else w for w in given], range(0, u.shape[2],
                                                                       -(-u.shape[2] // 16))
    for name, f in ("it selects", scan), ("selection held", lambda v: scan(v, few)):
        gains = mamba_adv.local_gain(f, u[:8], outputs)
        numbers[f"local gain, {name}, mean"], numbers[f"local gain, {name}, max"] = (
            gains.mean(), gains.max())
    return numbers


def clipped(mega, u, u_adv):
    """P4 of attention on the inputs of Mega, clean and attacked; of 20 images."""
    (P, V), (P_adv, V_adv) = (mega.mixing(v[:20]) for v in (u, u_adv))
    error, bound, tv, osc = attention_adv.attention_error(P, V, P_adv, V_adv)
    return {"|P'V' - PV|, largest": error.max(), "error / bound, largest": (error / bound).max(),
            "error / bound, mean": (error / bound).mean(), "TV(P', P), mean": tv.mean(),
            "TV(P', P), largest": tv.max(), "osc(V), mean": osc.mean(),
            "|dV|, largest": (V_adv - V).abs().max(),
            "share of TV osc in the bound": (tv * osc).mean() / bound.mean()}


def scaled(layer, y, y_adv):
    """P5 of AdS on its inputs, clean and attacked. Shares are <term, error> / <error, error>."""
    *terms, removed = error_parts(layer, y, y_adv)
    error, numbers = sum(terms), {}
    for name, term in zip(("s' dy", "(s' - s) y", "t' - t"), terms):
        numbers[f"share of {name}"] = (term * error).sum() / error.square().sum()
    numbers |= {"rms error after / before": rms(error) / rms(y_adv - y),
                "error removed exactly": removed.double().mean()}
    for when, v in (("clean", y), ("attacked", y_adv)):
        for name, w in zip("st", layer.scale_and_shift(v)):
            numbers |= {f"{name}, {when}: mean": w.mean(), f"{name}, {when}: std": w.std(),
                        f"{name}, {when}: share of 0": (w == 0).double().mean()}
    return numbers


def measure(c, model, x, y):
    """Yields (statement, layer, quantity, value), on images x and PGD-10 at c.eps against model."""
    x_adv = pgd(model, x, y, c.eps, c.alpha, 10)
    (mixers, clean), (_, attacked) = watch(model, x), watch(model, x_adv)
    for k, (m, at, at_adv) in enumerate(zip(mixers, clean, attacked), 1):
        found, inputs = {}, {name: (at[name][0], at_adv[name][0]) for name in at}
        if c.model == "mamba":
            found["P3 data-dependent: the selective scan"] = selective(m, *inputs["select"])
        else:
            name = "ema" if c.model == "attention" else "ssm"
            found["P1, P2 fixed parameters: " + type(getattr(m, name)).__name__] = fixed(
                SCRIPTS[c.model], getattr(m, name), *inputs[name], at[name][1], at_adv[name][1])
        if c.model == "attention":
            found["P4 attention"] = clipped(m, *inputs[""])
        if c.ads:
            found["P5 AdS"] = scaled(m.middle, *inputs["middle"])
        changes = found["change rate, clean against attacked features"] = {}
        pairs = zip(components(c, at).items(), components(c, at_adv).values())
        for (name, before_after), before_after_adv in pairs:
            before, after = (distances(f, g) for f, g in zip(before_after, before_after_adv))
            changes |= {f"{name}: {what}": (after[what] - v) / v for what, v in before.items()}
        for statement, numbers in found.items():
            for what, value in numbers.items():
                yield statement, k, what, float(value)


def certify(c, model, x, y):
    """Yields as measure, of the whole model (layer 0): what is certified, and PGD-10 beside it."""
    radius, right = s4_adv.certified_radius(model, x, y), hits(model, x, y)
    yield "certified", 0, "accuracy, clean", float(right.double().mean())
    if right.any():
        yield "certified", 0, "radius * 255, median of correct", 255 * float(radius[right].median())
    yield "certified", 0, "radius * 255, largest", 255 * float(radius.max())
    for eps in (c.eps / 4 ** k for k in range(7)):
        robust = right & hits(model, pgd(model, x, y, eps, eps / 4, 10), y)
        for name, ok in ("certified", radius >= eps), ("PGD-10", robust):
            yield "certified", 0, f"{name}, eps {255 * eps:.2g}/255", float(ok.double().mean())


def analyse(c, state):
    """--analyse: one table for each statement, also as CSV, JSON and figure in --out.

    In float64, on the first --test-size images, test and training. start: the weights at
    initialisation, which follow from the seed, on the test images.
    """
    start, data, rows, out = build(c).double(), load_data(c), [], Path(c.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); choose another "
                        "--out") from e
    data = {name: [v[:c.test_size] for v in data[name]] for name in ("test", "train")}
    sizes = {name: len(y) for name, (_, y) in data.items()}
    jobs = [("test", start), ("train", start)]
    if state:
        model = load_model(SimpleNamespace(**vars(c) | {"precision": "fp64"}), state)
        jobs = [("start", start), ("test", model), ("train", model)]
    n = " and ".join(map(str, dict.fromkeys(sizes.values())))              # test, training
    say(f"{c.analyse if state else 'at initialisation'}: {c.model}, {c.dataset}, n = {n} images, "
        f"eps {show(c.eps)}, seed {c.seed}")
    for on, model in jobs:
        x, y = data["train" if on == "train" else "test"]
        x = x.double() / 255
        torch.manual_seed(seed_of(c.seed, "analysis", on))
        with frozen(model):
            found = list(measure(c, model, x, y))
            if on != "train" and SCRIPTS[c.model] is s4_adv and not (c.ads or c.control):
                found += certify(c, model, x, y)
        rows += [dict(zip(("statement", "on", "layer", "quantity", "value"), (s, on, *rest)))
                 for s, *rest in found]
    for statement in dict.fromkeys(r["statement"] for r in rows):
        these = [r for r in rows if r["statement"] == statement]
        columns = list(dict.fromkeys((r["on"], r["layer"]) for r in these))
        say(f"\n{statement:45}" + "".join(f"{on} {k or ''}".rjust(10) for on, k in columns))
        for what in dict.fromkeys(r["quantity"] for r in these):
            values = {(r["on"], r["layer"]): r["value"] for r in these if r["quantity"] == what}
            say(f"  {what:43}" + "".join(f"{values.get(k, math.nan):10.4g}" for k in columns))
    if rank() == 0:
        stem = stem_of(c.analyse).name + "-analysis" if state else "analysis"
        write_csv(out / f"{stem}.csv", rows)
        write(out / f"{stem}.json", json.dumps(
            {"n": sizes["test"], "n_train": sizes["train"], "rows": rows, "config": vars(c),
             **machine(c)}, indent=1))
        try:
            draw_changes(out / f"{stem}.png",
                         [r for r in rows if r["statement"].startswith("change")])
        except UserError as e:
            say(f"no figure: {e}")
        say(f"written: {out / stem}.csv and .json")


def draw_changes(path, rows):
    """The paper's figure: by what each part multiplies the error, 1 + its change rate, as PNG."""
    what = list(dict.fromkeys(r["quantity"].split(": ")[1] for r in rows))
    parts = list(dict.fromkeys((r["layer"], r["quantity"].split(": ")[0]) for r in rows))
    models = list(dict.fromkeys(r["on"].rpartition(" ")[0] for r in rows))

    def fill(axes):
        for ax, measure in zip(axes.flat, what):
            for on in dict.fromkeys(r["on"] for r in rows):
                of, _, images = on.rpartition(" ")
                ax.plot(*zip(*((1 + r["value"],
                                parts.index((r["layer"], r["quantity"].split(": ")[0])))
                               for r in rows if (r["on"], r["quantity"].split(": ")[1]) == (
                                   on, measure))),
                        "x" if images == "start" else "osD^v"[models.index(of) % 5], label=on,
                        color="black", mfc="black" if images == "test" else "none",
                        ms=9 if images == "train" else 5)
            ax.axvline(1, color="black", lw=0.8)
            ax.set(xscale="log", xlabel=f"{measure}, after / before", ylim=(len(parts) - 0.5, -0.5),
                   yticks=range(len(parts)), yticklabels=[f"{part} {k}" for k, part in parts])
            ax.xaxis.set_minor_formatter("")
            ax.set_xlim(*(end(v, w) for end, v, w in zip((min, max), ax.get_xlim(), (0.1, 10))))
            ax.grid(axis="y", color="0.85")
        axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=6, frameon=False,
                                 loc="outside upper center")
    draw(path, fill, 1, len(what), (3.0, 1.2 + 0.3 * len(parts)), sharex=False)


def plot_analyses(files, path):
    """--plot of analyses: change rates of several models, named by their training, in one figure.

    Only the paper's: MSE and KL; and MSE / mean square, which does not reward shrinking.
    """
    rows, names = [], {"standard": "ST", "pgd": "PGD-AT", "trades": "TRADES"}
    for file in files:
        try:
            found = json.loads(Path(file).read_text())
            method = found["config"]["method"]
            found = [r | {"on": f"{names.get(method, method)} {r['on']}"} for r in found["rows"]
                     if r["statement"].startswith("change") and r["on"] != "start"]
            if not found or not all(math.isfinite(r["value"]) and r["layer"] > 0 and (
                    ": " in r["quantity"]) for r in found):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"--plot {file}: this is no analysis; give the .json files that "
                            "--analyse left") from None
        rows += found
    draw_changes(Path(path), rows)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def fraction(text):
    """'8/255', '0.031' -> float."""
    try:
        value = float(Fraction(text) if "/" in text else text)
        if math.isfinite(value):
            return value
        raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        message = f"{text} is no number; write it as 8/255 or 0.031"
        raise argparse.ArgumentTypeError(message) from None


def show(value):
    """8/255 for 0.0313725..., else the number."""
    k = value * 255
    return f"{round(k)}/255" if 0 < k < 255 and abs(k - round(k)) < 1e-6 else f"{value:g}"


def comma_list(text):
    return text.split(",")


def counts(text):
    """'1,5,10' -> [1, 5, 10]."""
    if not all(v.isdecimal() for v in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is no list of whole numbers; write it as 1,5,10")
    return [int(v) for v in text.split(",")]


def pair(text):
    """'5-3' -> [5, 3]."""
    m, _, n = text.partition("-")
    if not (m.isdecimal() and n.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is not of the form M-N; write it as 5-3")
    return [int(m), int(n)]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parser():
    """Every flag with its unit, symbol and default; and the defaults, which argparse does not set,
    so that what was given can be told from what was not."""
    p = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS,
               allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    defaults = {}

    def flag(*names, default=None, help, shown=None, **kw):
        help = f"{help} (default: {shown or default})".replace("%", "%%")
        defaults[p.add_argument(*names, help=help, **kw).dest] = default
    by = "by data set"
    flag("--model", default="s4", choices=tuple(SCRIPTS), help="sequence model")
    flag("--ads", nargs="?", const="relu", choices=tuple(ACTIVATIONS),
         shown="no AdS; relu if given without a word",
         help="Adaptive Scaling after each sequence map, with this activation")
    flag("--control", choices=CONTROLS, shown="nothing",
         help="what stands in the place of AdS for comparison; scale, shift: half of ReLU-AdS")
    flag("--dataset", default="cifar10", choices=tuple(PRESETS), help="images")
    flag("--data-dir", default="./data", metavar="DIR",
         help="torchvision's layout; downloaded when absent")
    flag("--classes", type=int, metavar="N", shown=50,
         help="Tiny-ImageNet: the first N of wnids.txt")
    flag("--method", default="pgd", choices=METHODS, help="training method")
    flag("--eps", "--epsilon", type=fraction, shown=by,
         help="radius eps of the l_inf ball, pixel units in [0, 1], 8/255")
    flag("--alpha", "--step-size", type=fraction, shown=by + ", in proportion to --eps",
         help="attack step alpha, pixel units")
    flag("--alphas", type=lambda text: [fraction(v) for v in text.split(",")], metavar="A,A",
         shown="--alpha at each",
         help="pgd, trades: a step size for each step of the attack in training, pixel units")
    flag("--steps", "--num-steps", type=int, metavar="K", help="attack steps in training", shown=by)
    flag("--beta", type=float, help="TRADES: weight of the robust term, no unit", shown=by)
    flag("--replays", type=int, default=4, metavar="M",
         help="FreeAT: replays of a batch; epochs are divided by M")
    flag("--yopo", type=pair, default=[5, 3], metavar="M-N", shown="5-3",
         help="YOPO: full passes and inner steps")
    flag("--eps-warmup", type=float, metavar="E", shown="0; synthetic 4",
         help="eps and alpha grow from 0 over the first E epochs")
    flag("--d-model", type=int, metavar="H", help="channels", shown=by)
    flag("--d-state", type=int, metavar="N", help="states of a sequence map",
         shown="by data set; mamba, attention 16; s5 H")
    flag("--d-hidden", type=int, metavar="V", shown=by,
         help="attention: channels of values and feed-forward")
    flag("--n-layers", type=int, metavar="N", help="blocks", shown=by)
    flag("--patch-size", type=int, metavar="P", help="a token is a patch of P x P pixels",
         shown="1; tiny-imagenet, synthetic 4")
    flag("--batch-size", type=int, metavar="B", shown="by data set; --bench on a CPU 16",
         help="images of a step, over all processes")
    flag("--micro-batch", type=int, metavar="M", shown="all; on a CPU: what its cache holds",
         help="images of a batch at a time: less memory, the same step; not for free and yopo")
    flag("--epochs", type=int, help="passes over the training images", shown=by)
    flag("--lr", type=float, help="AdamW's learning rate, cosine to 0", shown=by)
    flag("--weight-decay", type=float, help="AdamW's, on Linear and Conv weights only", shown=by)
    flag("--train-size", type=int, metavar="N", help="the first N training images",
         shown="all but the held-out 1,000")
    flag("--test-size", type=int, metavar="N", help="the first N test images", shown="all")
    flag("--eval-every", type=int, default=1, metavar="E", help="measure every E epochs")
    flag("--eval-train", type=int, default=0, metavar="N",
         help="also measure the first N training images")
    flag("--select", default="val", choices=("val", "test"),
         help="what chooses Best: 1,000 held-out training images, or the test set as in the paper")
    flag("--attacks", type=comma_list, default=["clean", "pgd-10"], metavar="A,B",
         shown="clean,pgd-10",
         help="for the final row and --evaluate: clean, fgsm, pgd-K, pgd-KxR (K steps, R restarts),"
              f" {', '.join(AUTO)}; aa: AutoAttack, these four in turn; aa-fast: the first two; "
              "pgd-official, with --evaluate: the attack of the paper's published code")
    flag("--seed", type=int, default=0, help="fixes weights, order, augmentation and attacks")
    flag("--device", shown="cuda if there is one", help="cpu, cuda, cuda:1, ...")
    flag("--precision", default="fp32", choices=("fp32", "fp64", "bf16", "tf32"),
         help="of weights and images; bf16, tf32: of products in training, the rest is fp32")
    flag("--out", metavar="DIR", shown="runs/NAME",
         help="log.csv, config.json, last.pt, best.pt, result.json")
    flag("--resume", nargs="?", const=True, metavar="PATH", shown="a new run",
         help="go on with the run in --out, or in PATH (a run's folder or checkpoint)")
    flag("--save-every", type=float, default=10.0, metavar="MINUTES",
         help="checkpoint inside an epoch")
    flag("--nan", default="stop", choices=("stop", "skip"),
         help="what a loss that is not finite does to the run")
    flag("--table", nargs="+", metavar="RUN", shown="train",
         help="print the results of these finished runs as one Markdown table instead of training")
    flag("--evaluate", metavar="CKPT", shown="train",
         help="measure this checkpoint instead of training")
    flag("--bench", nargs="?", type=int, const=3, metavar="N", shown="train; 3 if given alone",
         help="time N runs of each kind of work instead of training, on random images")
    flag("--lengths", type=counts, metavar="L,L", shown="that of the data set",
         help="--bench: tokens of an image")
    flag("--forms", type=comma_list, metavar="F,F", shown="all that there are",
         help="--bench: fast, bf16, no-ads (the same without --ads), no-triton (mamba on a GPU), "
              "plain, peer")
    flag("--checks", action="store_true", shown="none",
         help="with --evaluate: look for masked gradients, on 200 images; exit code 1 if found")
    flag("--eps-sweep", type=lambda text: [fraction(v) for v in text.split(",")], metavar="E,E",
         shown="none", help="with --evaluate: each attack of --attacks, or pgd-10, at these radii")
    flag("--steps-sweep", type=counts, metavar="K,K", shown="none",
         help="with --evaluate: PGD with these numbers of steps")
    flag("--transfer-from", metavar="CKPT", shown="none",
         help="with --evaluate: pgd-10 and fgsm, pgd-K of --attacks made on this other model; "
              "AutoAttack's stop as soon as that one errs, which says little of ours")
    flag("--images", action="store_true", shown="none",
         help="with --evaluate: draw eight images, their perturbations and adversarial images")
    flag("--plot", nargs="+", metavar="RUN", shown="train",
         help="draw the accuracies over epochs of these runs' folders, or the change rates of "
              "these analyses (.json), into --out FILE.png")
    flag("--analyse", nargs="?", const=True, metavar="CKPT", shown="train",
         help="the paper's theory in numbers, on 100 images or --test-size, of this checkpoint or "
              "of the flags' model at initialisation")
    return p, defaults


def settings(argv):
    """The run's settings and the checkpoint's state: what was given, else the checkpoint's
    settings, else PRESETS, else the flag's default."""
    p, defaults = parser()
    given = vars(p.parse_args(argv))
    if empty := [k for k, v in given.items() if v == ""]:
        raise UserError(f"--{empty[0].replace('_', '-')} is empty; give a value, or leave it out")
    jobs = [k for k in ("plot", "bench", "analyse", "evaluate", "resume") if k in given]
    if len(jobs) > 1:
        raise UserError(f"--{jobs[0]} and --{jobs[1]} are two jobs; give one of them")
    if other := [k for k in ("lengths", "forms") if k in given and "bench" not in given]:
        raise UserError(f"--{other[0]} has no place without --bench; add it, or leave this out")
    if other := [k for k in JOBS if k in given and "evaluate" not in given]:
        raise UserError(f"--{other[0].replace('_', '-')} measures a checkpoint; add --evaluate "
                        "CKPT")
    preset = SimpleNamespace(**defaults | PRESETS[given.get("dataset", "cifar10")])
    c = at_radius(preset, given["eps"]) if "eps" in given else preset
    c = SimpleNamespace(**vars(c) | given)
    states = c.d_model if c.model == "s5" else STATES.get(c.model, c.d_state)
    c.d_state = given.get("d_state", states)
    c.eps_warmup = c.eps_warmup or 0.0
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if c.bench is not None and c.device.startswith("cpu"):
        c.batch_size = given.get("batch_size", 16)
    if c.plot:
        c.out = c.out or ("analyses.png" if c.plot[0].endswith(".json") else
                          "robust-overfitting.png")
        if not c.out.endswith(".png"):
            raise UserError(f"--out {c.out}: a figure is a PNG file; give a name that ends in .png")
        if other := sorted(set(given) - {"plot", "out"}):
            raise UserError(f"--{other[0].replace('_', '-')} has no place beside --plot, which "
                            "draws what runs have logged; leave it out")
        return c, None
    path, flag, state, free = c.resume, "--resume", None, FREE
    if c.evaluate:
        path, flag, free = c.evaluate, "--evaluate", FREE + EVALUATION
        if "out" in given:
            raise UserError(f"--out {c.out}: tables lie beside the checkpoint that --evaluate is "
                            "given; leave it out, or evaluate a copy elsewhere")
    if c.analyse:
        path, flag, free = c.analyse, "--analyse", FREE + EVALUATION
        path, c.test_size = None if path is True else path, given.get("test_size", 100)
    if isinstance(path, str):
        if not Path(path).exists():
            raise UserError(f"{flag} {path}: there is no such file or folder")
        path = os.path.realpath(path) if Path(path).is_symlink() else path
        own = path if Path(path).is_dir() else str(Path(path).parent)
        c.out = given.get("out", own)
        if c.resume and Path(c.out).resolve() != Path(own).resolve():
            raise UserError(f"--out {c.out}: a run goes on in its own folder, {own}; leave --out "
                            f"out, or copy that folder and --resume the copy")
    c.out = c.out or "runs/" + "-".join(filter(None, (
        c.bench and "bench", c.dataset, c.model, c.ads and f"ads_{c.ads}", c.control, c.method,
        f"seed{c.seed}", c.bench and f"{c.n_layers}x{c.d_model}-batch{c.batch_size}",
        c.lengths and "-".join(["L", *map(str, c.lengths)]))))
    if path:
        path = path if isinstance(path, str) else c.out
        file = Path(path).is_file()
        state = read_checkpoint(Path(path), flag) if file else find_checkpoint(Path(path), flag)
        if c.resume and state and "optimizer" not in state:
            raise UserError(f"--resume {path}: this holds weights for --evaluate, not a run; give "
                            "last.pt or the run's folder")
        if state is None and free is not FREE:
            raise UserError(f"{flag} {path}: there is no checkpoint in that folder; give another")
        config = read_config(Path(c.out)) if c.resume else None
        if state and config and any(config.get(k) != v for k, v in json.loads(json.dumps(
                state["config"])).items() if k not in FREE):
            raise UserError(f"--resume {path}: the config.json beside it is of another run; give "
                            "the checkpoint a folder of its own")
        if state is None and config:                                    # cut before its first save
            config = {"config": {k: config[k] for k in vars(c) if k in config}}
            return check(restored(c, given, config, path, free), given), None
        if state is None and isinstance(c.resume, str):
            raise UserError(f"--resume {path}: there is no run in this folder; leave the flag out "
                            "to begin one")
    elif not c.analyse:
        not_taken(c)
    c = restored(c, given, state, path, free) if state else c
    if "attacks" not in given and c.evaluate and any(getattr(c, job) for job in JOBS):
        c.attacks = []
    return check(c, given), state


def not_taken(c):
    """UserError if a run is in --out already."""
    if any((Path(c.out) / name).exists() for name in ("config.json", "last.pt")):
        raise UserError(f"--out {c.out} holds another run; go on with it by --resume, or choose "
                        "another --out")


def restored(c, given, state, path, free):
    """c with the checkpoint's settings, but for what is free and given.  UserError at a clash."""
    config = state["config"]
    for k, v in given.items():
        if k not in free and config.get(k, v) != v:
            raise UserError(f"--{k.replace('_', '-')} {v}: {path if c.evaluate else c.out} was "
                            f"trained with {config[k]}; leave the flag out, or choose another run")
    own = ("device", "resume", "evaluate", "analyse", "out")
    own += ("test_size",) * bool(c.evaluate or c.analyse)
    c = SimpleNamespace(**vars(c) | {k: v for k, v in config.items() if k not in own})
    c = at_radius(c, given["eps"]) if "eps" in given and "eps" in free else c
    return SimpleNamespace(**vars(c) | {k: given[k] for k in free if k in given})


def has(c, precision):
    """Can c.device do it? A GPU: from compute capability 8.0 on; a CPU: bf16, but not tf32."""
    kind = torch.device(c.device).type
    ampere = kind == "cuda" and torch.cuda.get_device_capability(c.device) >= (8, 0)
    return ampere or precision in ("fp32", "fp64") or (precision, kind) == ("bf16", "cpu")


def check(c, given):
    """c, if it can be run.  UserError for the first thing that cannot.   given: the user's flags"""
    def refuse(name, why):
        value = getattr(c, name)
        raise UserError(f"--{name.replace('_', '-')} {value}: {why}")
    for name in ("eps", "alpha"):
        if not 0 <= getattr(c, name) <= 1:
            refuse(name, "it must lie in [0, 1], pixel units; 8/255, not 8")
    for name in ("d_model", "d_state", "d_hidden", "n_layers", "patch_size", "batch_size", "epochs",
                 "classes", "eval_every", "replays", "train_size", "test_size", "bench",
                 "micro_batch"):
        if getattr(c, name) is not None and not 1 <= getattr(c, name) < 2 ** 31:
            refuse(name, "it must be at least 1" if getattr(c, name) < 1 else "it is too large")
    for name in ("steps", "beta", "weight_decay", "eps_warmup", "save_every", "eval_train"):
        if not 0 <= getattr(c, name) < math.inf:
            refuse(name, "it must be a number of at least 0")
    if any(not 0 <= v <= 1 for v in c.eps_sweep or ()):
        refuse("eps_sweep", "radii must lie in [0, 1], pixel units; 8/255, not 8")
    if c.checks and (not c.eps or c.classes < 4):
        raise UserError(f"--checks need an eps above 0 and 4 classes; here are eps {show(c.eps)} "
                        f"and {c.classes} classes")
    if c.analyse and not c.eps:
        refuse("eps", "an analysis needs a perturbation; give a radius above 0")
    if not 0 < c.lr < 1e30:
        refuse("lr", "it must be a number above 0, below 1e30")
    if min(c.yopo) < 1:
        refuse("yopo", "both numbers must be at least 1, as in 5-3")
    if c.alphas and (c.method not in ("pgd", "trades") or len(c.alphas) != c.steps):
        refuse("alphas", f"give one for each of the {c.steps} --steps, with --method pgd or trades")
    if any(not 0 <= a <= 1 for a in c.alphas or ()):
        refuse("alphas", "they must lie in [0, 1], pixel units; 2/255, not 2")
    if c.ads and c.control:
        refuse("control", f"it stands in the place of --ads {c.ads}; give one of them")
    if c.model in ("s4", "dss") and c.d_state % 2:
        refuse("d_state", f"{c.model} stores conjugate pairs; give an even number")
    if c.shape[1] % c.patch_size:
        refuse("patch_size", f"it does not divide an image of {c.shape[1]} x {c.shape[2]} pixels; "
               "give a divisor")
    if c.dataset != "tiny-imagenet" and c.classes != 10:
        refuse("classes", f"{c.dataset} has 10 classes; only tiny-imagenet takes another number")
    for spec in c.attacks:
        attacks_of(spec, c)
    try:
        float(torch.zeros(1, device=c.device))                              # meta has no numbers
    except Exception:                                                     # each backend has its own
        refuse("device", "there is no such device here; leave it out, or give cpu")
    if c.micro_batch and c.method in ("free", "yopo"):
        refuse("micro_batch", f"--method {c.method} takes a batch at once; leave it out")
    kind = torch.device(c.device).type
    if (c.evaluate or c.analyse) and "precision" not in given and not has(c, c.precision):
        c.precision = "fp32"                                                # the run's, elsewhere
    if c.resume and "precision" not in given and not has(c, c.precision):
        raise UserError(f"--resume {c.out}: the run's precision is {c.precision}, which {c.device} "
                        "has not; go on where it began, or begin another run")
    if not has(c, c.precision):
        refuse("precision", f"{c.device} has none; use a GPU of compute capability 8.0 or above, "
               "or leave it out" + " (bf16 runs on a CPU, too)" * (kind == "cpu"))
    if c.bench is None:
        return c
    if min(c.lengths or [1]) < 1:
        refuse("lengths", "each must be at least 1")
    if kind not in ("cpu", "cuda") or world() > 1:
        refuse("bench", "it runs on cpu or cuda, in one process; leave out torchrun and another "
               "--device")
    return c


def lock(out):
    """The run's folder, for this process alone: the lock goes when the process does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = open(out / ".lock", "w")
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); choose another "
                        "--out") from e
    try:
        import fcntl
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:                                                     # not on Windows
        pass
    except OSError:
        raise UserError(f"--out {out}: another process is training there; wait for it, or choose "
                        "another --out") from None
    return held


def all_bits():
    """Products in full float32 on a GPU, too (torch's convolutions are not, if left alone)."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def keep_memory():
    """Freed memory stays with this process, where the C library can be told so (glibc, mallopt):
    else the pages of each large tensor are taken and zeroed anew."""
    import ctypes
    try:
        trim_threshold, mmap_max = -1, -4                                   # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1), mallopt(mmap_max, 0)
    except (AttributeError, OSError, TypeError):                            # another C library
        pass


def by_torchrun():
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def complain(words, alone=False):
    """To stderr, by the first process of a machine if all of them meet it, else alone."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            print(f"train.py: {words}", file=sys.stderr, flush=True)
    return 2


def main(argv=None):
    c = None
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):               # any name is printable
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        if by_torchrun():
            gpu = torch.cuda.is_available()
            dist.init_process_group("nccl" if gpu else "gloo")
            if gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        all_bits()
        if (asked := vars(parser()[0].parse_args(argv))) and "table" in asked:
            if other := sorted(set(asked) - {"table"}):
                raise UserError(f"--{other[0].replace('_', '-')} has no place beside --table, "
                                "which prints what runs have left; leave it out")
            results_table([str(Path(folder)) for folder in asked["table"]])
            return 0
        c, state = settings(argv)
        if not c.bench:                                                 # that has its own processes
            keep_memory()
        if c.plot:
            analyses = all(name.endswith(".json") for name in c.plot)
            (plot_analyses if analyses else plot_runs)(c.plot, c.out)
            return 0
        if c.evaluate:
            return evaluate_checkpoint(c, state)
        if c.bench or c.analyse:
            bench(c) if c.bench else analyse(c, state)
            return 0
        data = load_data(c)                                             # before anything is written
        held = lock(Path(c.out)) if rank() == 0 else None
        if rank() == 0 and not c.resume:
            not_taken(c)                                                # by one that was faster
        train(c, data, state)
    except (UserError, FloatingPointError) as e:
        return complain(e)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        why = str(e).partition("\n")[0]
        return complain(f"the memory of {c.device if c else 'this machine'} does not suffice "
                        f"({why}); try a smaller --micro-batch, --batch-size or model", True)
    except OSError as e:                                            # a path, or nobody reads stdout
        if e.filename is None:
            sys.stdout = open(os.devnull, "w")
        return complain(f"{e.filename or 'the output'}: {e.strerror or e}; choose another path; a "
                        "run goes on with --resume")
    except KeyboardInterrupt:
        goes_on = ("the same command goes on with it" if c and c.evaluate else
                   f"go on with: python train.py --resume {shlex.quote(c.out)}"
                   if c and not c.analyse and (Path(c.out) / "config.json").exists() else "")
        say("\nstopped" + ("; " + goes_on if goes_on else ""), file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized() and dist.get_backend() == "nccl":      # gloo's may wait for a peer
            dist.destroy_process_group()                                # that has left; see `leave`
    return 0


def leave(code):
    """Ends the program; a process of torchrun's at once: if a thread of gloo's frees a tensor while
    Python shuts down, it aborts what was complete (pytorch/pytorch, 179291)."""
    if by_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
