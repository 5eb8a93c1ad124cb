# SPDX-License-Identifier: MIT
"""Train and evaluate the models of the three scripts: data, FreeAT, YOPO, runs, tables.

    python train.py --model s4 --ads --dataset synthetic                  # a minute on a laptop
    python train.py --model s4 --ads --dataset cifar10                    # the paper's protocol
    python train.py --evaluate runs/NAME/best.pt --attacks clean,pgd-50x5
    torchrun --nproc-per-node 4 train.py --model s4 --ads                 # the same on four GPUs

Papers     AdS      Qi et al. 2024, arXiv 2406.05532        FreeAT  Shafahi et al. 2019, 1904.12843
           YOPO     Zhang et al. 2019, arXiv 1905.00877     PGD     Madry et al. 2018, 1706.06083
Glossary   x (B, C, h, w) images in [0, 1], y (B,) labels, c the run's settings (a namespace),
           eps radius, alpha step in pixel units ([0, 1]; 8/255, not 8), rank, world: torchrun's
Chance     Every random number is a function of --seed and the place it is used at (`seed_of`), not
           of what came before: so a run that was cut goes on exactly, and no random state is saved.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

import attention_adv
import mamba_adv
import s4_adv
from ads import ACTIVATIONS, CONTROLS
from s4_adv import ascend, drawn_digits, fgsm, frozen, param_groups, pgd, pgd_at_loss, trades_loss

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
                          d_hidden=32,
                          epochs=100, eps=0.3, alpha=0.04, beta=1.0, pad=0, flip=False),
    "tiny-imagenet": PAPER | dict(shape=(3, 64, 64), classes=50, patch_size=4),
    "synthetic": PAPER | dict(shape=(1, 28, 28), classes=10, patch_size=4, d_model=64, n_layers=2,
                              epochs=6, batch_size=64, lr=3e-3, eps_warmup=4.0, steps=5,
                              train_size=4000, pad=0, flip=False, test_size=500),
}
STATES = {"mamba": 16,
          "attention": 16}                                     # d_state whatever the data set
FREE = ("data_dir", "device", "out", "resume", "save_every", "attacks",
        "nan")      # may change on --resume
EVALUATION = ("evaluate", "eps", "alpha", "test_size", "batch_size", "seed",
              "precision")   # on --evaluate


class UserError(Exception):
    """Something that the user can mend: one sentence, printed to stderr, exit code 2."""


# --------------------------------------------------------------------------------------------------
# Data: uint8 tensors (n, C, h, w) on the device, labels (n,)
# --------------------------------------------------------------------------------------------------

def load_data(c):
    """{"train", "val", "test": (images uint8 (n, C, h, w), labels (n,))}, on c.device.

    val is the last 1,000 training images, train the first c.train_size of the others, test the
    first c.test_size test images.  UserError if data are missing, or fewer than asked for.
    """
    if c.dataset == "synthetic":
        x, y = drawn_digits(11_000, 0)
        x_test, y_test = drawn_digits(2_000, 1)
    elif c.dataset == "tiny-imagenet":
        x, y, x_test, y_test = tiny_imagenet(Path(c.data_dir) / "tiny-imagenet-200", c.classes)
    else:
        x, y, x_test, y_test = torchvision_data(c.dataset, c.data_dir)
    sets = {"train": (x[:-1000], y[:-1000]), "val": (x[-1000:], y[-1000:]),
            "test": (x_test, y_test)}
    for name, size in (("train", c.train_size), ("test", c.test_size)):
        n = len(sets[name][0])
        if size is not None and size > n:
            raise UserError(f"--{name}-size {size}: {c.dataset} has {n} such images; give at most "
                            f"{n}")
        sets[name] = tuple(v[:size] for v in sets[name])
    return {name: tuple(v.to(c.device) for v in pair) for name, pair in sets.items()}


def torchvision_data(name, root):
    """Images and labels, training then test, of MNIST or CIFAR-10; downloaded if absent."""
    try:
        from torchvision.datasets import CIFAR10, MNIST
    except Exception as e:
        raise UserError(f"--dataset {name} needs torchvision, which cannot be imported here ({e}); "
                        "install it, or use --dataset synthetic") from e
    kind, folder = {"mnist": (MNIST, "MNIST"), "cifar10": (CIFAR10, "cifar-10-batches-py")}[name]
    root, sets = Path(root), []
    if not (root / folder).exists():
        if rank() == 0:
            download(kind, root, folder)
        if world() > 1:
            dist.barrier()
    try:
        sets = [kind(root, train=train, download=False) for train in (True, False)]
        x, x_test = (torch.as_tensor(s.data) for s in sets)
        y, y_test = (torch.as_tensor(s.targets) for s in sets)
        whole = (len(x), len(y)) == {"mnist": (60000,) * 2, "cifar10": (50000,) * 2}[name]
    except Exception:                                                 # whatever a damaged file does
        whole = False
    if not whole or (len(x_test), len(y_test)) != (10000,) * 2:
        raise UserError(f"--data-dir {root}: {folder} there is incomplete or damaged; put "
                        "torchvision's files "
                        "there, delete that folder to download them again, or use --dataset "
                        "synthetic")
    layout = (lambda v: v[:, None]) if name == "mnist" else (lambda v: v.permute(0, 3, 1, 2))
    return layout(x).contiguous(), y, layout(x_test).contiguous(), y_test


def download(kind, root, folder):
    """torchvision's download, into a folder beside its place first: half is never left there."""
    import shutil
    part, made = root / f".{folder}.part", [d for d in (root, *root.parents) if not d.exists()]
    try:
        kind(part, download=True)
        os.replace(part / folder, root / folder)
    except Exception as e:
        raise UserError(f"--data-dir {root}: there is no {folder}, and it could not be downloaded "
                        f"({str(e).splitlines()[0]}); put "
                        f"torchvision's files into {root / folder}, or use --dataset synthetic, "
                        "which needs "
                        "none") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:                                           # nothing is left of a failure
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def tiny_imagenet(root, n_classes):
    """The first n_classes of wnids.txt, decoded once into one uint8 file of a cache of our own.

    Training images come in one fixed shuffled order, since the official one goes class by class.
    """
    try:
        wnids = (root / "wnids.txt").read_text().split()
        wnids = [w for w in wnids if (root / "train" / w / "images").is_dir()] or wnids[:0]
        rows = (root / "val" / "val_annotations.txt").read_text().splitlines()
        rows = [row.split("\t")[:2] for row in rows]
    except OSError as e:
        raise UserError(f"--data-dir {root.parent}: no Tiny-ImageNet there ({e}); unpack the "
                        "official "
                        f"tiny-imagenet-200.zip so that {root / 'wnids.txt'} exists, or use "
                        "--dataset "
                        "synthetic") from e
    if n_classes > len(wnids):
        raise UserError(f"--classes {n_classes}: {root} has the images of {len(wnids)} classes; "
                        f"give at most {len(wnids)}")
    label = {w: i for i, w in enumerate(wnids[:n_classes])}
    train = [(p, i) for w,
             i in label.items() for p in sorted((root / "train" / w / "images").glob("*.JPEG"))]
    test = [(root / "val" / "images" / name, label[w]) for name, w in rows if w in label]
    train = [train[i] for i in torch.randperm(len(train),
                                              generator=torch.Generator().manual_seed(0))]
    cache = Path(os.environ.get("SSM_ADV_CACHE", Path(__file__).resolve().parent / ".cache"))
    key = hashlib.sha256("\n".join(f"{p.relative_to(root)} {i}" for p, i in train + test).encode())
    cache = cache / f"tiny-imagenet-{n_classes}-{key.hexdigest()[:12]}.pt"
    try:
        return torch.load(cache, weights_only=True)
    except Exception:                                                   # absent or damaged: decode
        pass
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    data = []
    for files in (train, test):
        try:
            images = [decode_jpeg(read_file(str(p)), mode=ImageReadMode.RGB) for p, _ in files]
            data += [torch.stack(images), torch.tensor([i for _, i in files])]
        except RuntimeError as e:
            raise UserError(f"--data-dir {root.parent}: an image of {root} is missing or damaged "
                            f"({e}); "
                            "unpack the official archive again") from e
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write(cache, data)
    except (OSError, UserError) as e:
        print(f"the decoded images could not be kept in {cache} ({e}); the next run decodes again")
    return data


def augment(x, pad, flip, generator):
    """Random crop of the zero-padded images, half of them mirrored: one choice per image, by index.

    x (B, C, h, w), pad int pixels, flip bool; a generator makes the same choices on any device.
    """
    B, C, h, w = x.shape
    top, left = torch.randint(2 * pad + 1, (2, B, 1), generator=generator)
    mirror = (torch.rand(B, 1, generator=generator) < 0.5) & flip
    columns = torch.where(mirror, torch.arange(w).flip(0), torch.arange(w)) + left     # (B, w)
    rows = torch.arange(h) + top                                            # (B, h)
    at = torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None]
    x = F.pad(x, (pad,) * 4).permute(0, 2, 3,
                                     1)                            # (B, h + 2 pad, w + 2 pad, C)
    return x[tuple(i.to(x.device) for i in at)].permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------------------------
# Training methods: each leaves the gradient of one optimiser step, and returns its loss
# --------------------------------------------------------------------------------------------------

def loss_of(method, model, x, y, eps, alpha, steps, beta):
    """The loss of standard training, PGD-AT (Madry et al. 2018) or TRADES (Zhang et al. 2019)."""
    if method == "standard":
        return F.cross_entropy(model(x), y)
    if method == "pgd":
        return pgd_at_loss(model, x, y, eps, alpha, steps)
    return trades_loss(model, x, y, eps, alpha, steps, beta)


def free_backward(model, x, y, noise, eps):
    """One replay of FreeAT: one backward pass gives both gradients.  Shafahi et al. 2019, Alg. 1

        w    descends  grad_w CE(model(x + noise), y)                   (left in .grad)
        noise  <-  Proj_eps(noise + eps sign grad_x CE(model(x + noise), y))

    noise  like x, changed in place: it is carried from replay to replay and to the next batch.
    Returns the loss, a scalar.
    """
    x_adv = (x + noise).clamp(0, 1).requires_grad_()
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    noise.add_(eps * x_adv.grad.sign()).clamp_(-eps, eps)
    return loss.detach()


def yopo_backward(model, x, y, eps, alpha, passes, inner):
    """YOPO-m-n: m full passes, and n steps of the image on the first layer alone after each.

    With z = embed(x_adv) and the costate p = -grad_z CE(logits(z), y) held fixed, the image
    descends the Hamiltonian H = <p, embed(x_adv)>:  x_adv <- Proj(x_adv - alpha sign grad_x H),
    n times. The embedding's weights then ascend H, all others descend the loss; gradients are the
    mean over the m passes.                                     Zhang et al. 2019 (YOPO), Alg. 1
    Returns the mean loss of the passes. AdamW works number by number, so that one optimiser over
    both sets of weights is the same as one for each.
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
# A run: model, optimiser, where it stands; checkpoints; many processes
# --------------------------------------------------------------------------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words, **kw):
    if rank() == 0:
        print(*words, **kw, flush=True)


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
    noise = torch.zeros(c.batch_size, *c.shape, device=c.device,
                        dtype=next(model.parameters()).dtype)
    return SimpleNamespace(
        c=c, model=model, optimizer=torch.optim.AdamW(param_groups(model, c.weight_decay), lr=c.lr),
        noise=noise if c.method == "free" else None, epochs=math.ceil(c.epochs / replays(c)),
        # FreeAT's, one slot per image
        epoch=0, batch=0, loss=0.0, seen=0, skipped=0, seconds=0.0,
        # where it stands in the epoch
        rows=[], best=None, saved=time.monotonic())


def replays(c):
    """Optimiser steps on a batch, by which the epochs are divided: M for FreeAT, else 1."""
    return c.replays if c.method == "free" else 1


COUNTERS = ("epoch", "batch", "loss", "seen", "skipped", "seconds", "rows", "best")


def write(path, content):
    """torch.save, all or nothing: a whole file replaces the old one, whenever the process dies."""
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
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({e.strerror}); what was there before is whole: make "
                        "room or "
                        "choose another --out, and go on with --resume") from e


def save(run):
    """last.pt of the run as it stands; the one before it becomes previous.pt."""
    state = {"format": 1, "config": vars(run.c), "model": run.model.state_dict(),
             "optimizer": run.optimizer.state_dict(), "noise": run.noise}
    if run.noise is not None and world() > 1:                         # each process knows its slots
        state["noise"] = torch.zeros_like(run.noise)
        state["noise"][rank()::world()] = run.noise[rank()::world()]
        dist.all_reduce(state["noise"])
    if rank() == 0:
        out = Path(run.c.out)
        fresh = out / "new.pt"
        write(fresh, state | {k: getattr(run, k) for k in COUNTERS})
        if (out / "last.pt").exists():
            os.replace(out / "last.pt", out / "previous.pt")
        os.replace(fresh, out / "last.pt")
    run.saved = time.monotonic()


def read_checkpoint(path, flag):
    """The dict in a checkpoint of this program.  UserError if it is missing, damaged or foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] == 1 and state["model"] and state["config"]:
            return state
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: there is no such file") from None
    except Exception:                                                 # whatever a damaged file does
        pass
    raise UserError(f"{flag} {path}: this is damaged, or no checkpoint of this program")


def find_checkpoint(out):
    """The newest whole checkpoint in a run's folder, or None if it has none yet."""
    names = [n for n in ("last.pt", "previous.pt") if (out / n).exists()]
    for name in names:
        try:
            return read_checkpoint(out / name, "--resume")
        except UserError as e:
            say(f"{e}; trying the one before", file=sys.stderr)
    if names:
        raise UserError(f"--resume {out}: neither last.pt nor previous.pt there can be read; start "
                        "again with "
                        "another --out")
    return None


def restore(run, state):
    """Puts a checkpoint's state into a new run."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.noise is not None:
        run.noise.copy_(state["noise"])
    for k in COUNTERS:
        setattr(run, k, state[k])


def synchronise(model, share, stop):
    """Gradients summed over processes with weight share = n_local / n: that of the batch's mean.

    One flat all_reduce after each backward pass. It is what DDP does, without its hooks in the
    forward pass: so attacks cannot trigger it, and FreeAT and YOPO, which walk backwards as they
    like, need no exception. stop (0 or 1) travels along; returns the largest of all processes.
    """
    if world() == 1:
        return stop
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() * share for g in grads] + [grads[0].new_tensor([stop])])
    dist.all_reduce(flat)
    for p, g in zip(model.parameters(), flat[:-1].split([g.numel() for g in grads])):
        p.grad = g.view_as(p)
    return int(flat[-1] > 0)


class Blowup(Exception):
    """A loss or a gradient that is not finite."""


def largest_activation(model, x):
    """Name of the layer whose output is the largest (or not finite) on x, and that size."""
    sizes = {}

    def hook_of(name):
        def hook(module, args, out):             # returns None: the output stays
            sizes[name] = float(out.detach().abs().max())
        return hook
    hooks = [m.register_forward_hook(hook_of(name)) for name, m in model.named_modules() if name]
    with frozen(model), torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return max(sizes.items(), key=lambda item: (not math.isfinite(item[1]), item[1]))


def descend(run, backward, x, n):
    """One optimiser step on the gradient that backward() leaves. Returns the loss summed over x.

    n  int  images of the whole batch, of which x is this process's part.  Blowup if not finite.
    """
    run.optimizer.zero_grad()
    try:
        loss = float(backward()) if len(x) else 0.0
    except FloatingPointError:
        loss = math.nan
    if not math.isfinite(loss):                                         # tell the other processes
        for p in run.model.parameters():
            p.grad = torch.full_like(p, math.nan)
    run.stop = synchronise(run.model, len(x) / n, run.stop)
    if not all(bool(p.grad.isfinite().all()) for p in run.model.parameters() if p.grad is not None):
        run.optimizer.zero_grad()
        if run.c.nan == "stop":
            raise Blowup
        run.skipped += 1
        return 0.0
    run.optimizer.step()
    return loss * len(x)


def train_batch(run, x, y, n):
    """All optimiser steps on one batch: one, or as many as FreeAT has replays."""
    c, at = run.c, (run.epoch + run.batch / run.batches) * replays(run.c)
    ramp = min(1.0, at / c.eps_warmup) if c.eps_warmup else 1.0
    eps, alpha = ramp * c.eps, ramp * c.alpha

    def backward():
        if c.method == "free":
            return free_backward(run.model, x, y, noise, eps)
        if c.method == "yopo":
            return yopo_backward(run.model, x, y, eps, alpha, *c.yopo)
        loss = loss_of(c.method, run.model, x, y, eps, alpha, c.steps, c.beta)
        loss.backward()
        return loss.detach()
    if c.method != "free":
        return descend(run, backward, x, n)
    noise = run.noise[rank()::world()][:len(x)]                         # a view: replays change it
    return sum(descend(run, backward, x, n) for _ in range(c.replays)) / c.replays


def total(values, device):
    """Sum of a list of numbers over processes."""
    if world() == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def train_epoch(run, images, labels):
    """The rest of run.epoch, from run.batch on; saves every c.save_every minutes, and to stop."""
    c, device, start = run.c, images.device, time.monotonic() - run.seconds
    order = torch.Generator().manual_seed(seed_of(c.seed, "order", run.epoch))
    batches = torch.randperm(len(images), generator=order).to(device).split(c.batch_size)
    for group in run.optimizer.param_groups:                                # cosine to 0, per epoch
        group["lr"] = c.lr * 0.5 * (1 + math.cos(math.pi * run.epoch / run.epochs))
    run.model.train()
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
            run.loss += train_batch(run, x, y, len(i))
        except Blowup:
            layer, size = largest_activation(run.model, x)
            raise UserError(
                f"loss or gradient is not finite at epoch {run.epoch + 1}, batch {run.batch + 1}; "
                "the largest "
                f"activation is {size:.3g}, in {layer}; the last checkpoint is "
                f"{Path(c.out) / 'last.pt'}: try "
                "a smaller --lr, or --resume with --nan skip, which drops such steps") from None
        run.seen, run.batch = run.seen + len(x), run.batch + 1
        run.seconds = time.monotonic() - start
        progress(run, len(batches))
        if run.stop or time.monotonic() - run.saved > 60 * c.save_every:
            save(run)
        if run.stop:
            raise KeyboardInterrupt


def progress(run, batches):
    """The live line: only on a terminal."""
    if rank() == 0 and sys.stdout.isatty():
        per_batch = run.seconds / run.batch
        left = (batches - run.batch) * per_batch
        later = (run.epochs - run.epoch - 1) * batches * per_batch
        print(f"\r{run.epoch + 1:5d}  batch {run.batch}/{batches}  loss "
              f"{run.loss / max(run.seen, 1):.3f}  "
              f"{clock(left)} left of the epoch, {clock(left + later)} of the run \033[K", end="",
              flush=True)


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def train(c, data, state=None):
    """The whole run, from a checkpoint's state or the beginning; ends with the paper's row."""
    run = new_run(c)
    if state is not None:
        restore(run, state)
    run.batches, run.stop = -(-len(data["train"][0]) // c.batch_size), 0
    if state is None:
        size = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        extra = f" + AdS {c.ads}" if c.ads else f" + {c.control}" if c.control else ""
        say(f"{c.model}{extra}: {size:,} trainable parameters; {c.dataset}, "
            f"{len(data['train'][0]):,} training images, {c.method}, eps {show(c.eps)}, "
            f"{run.epochs} epochs; {c.out}")
        save(run)
    else:
        say(f"{c.out}: going on at epoch {run.epoch + 1}, batch {run.batch + 1}")

    def note(signum, frame):
        run.stop = 1
        signal.signal(signum, signal.SIG_DFL)                               # a second one ends it
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    columns = [f"{name} {kind}" for name in watched(c) for kind in ("clean", "pgd-10")]
    say(f"{'epoch':>5}  {'lr':>8}  {'loss':>7}  " + "  ".join(f"{k:>12}" for k in columns)
        + f"  {'time':>7}")
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
        if rank() == 0:
            write_csv(Path(c.out) / "log.csv", run.rows)
        say(("\r\033[K" if sys.stdout.isatty() else "") + format_row(row, c))
        if run.stop:
            raise KeyboardInterrupt
    return finish(run, data)


def watched(c):
    """The sets that are measured after an epoch; the last one chooses Best."""
    return (["train"] if c.eval_train else []) + [c.select]


def end_epoch(run, data):
    """The row of the epoch that just ended; the run then stands before the next one."""
    c, device = run.c, data["train"][0].device
    loss, seen = total([run.loss, run.seen], device)
    row = {"epoch": run.epoch + 1, "lr": run.optimizer.param_groups[0]["lr"],
           "loss": loss / max(seen, 1)}
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
    run.epoch, run.batch, run.seen, run.skipped = run.epoch + 1, 0, 0, 0
    run.loss = run.seconds = 0.0
    return row


def format_row(row, c):
    cells = [f"{row['epoch']:5d}  {row['lr']:8.1e}  {row['loss']:7.4f}"]
    cells += [f"{'-' if row[k] is None else f'{row[k]:.2%}':>12}"
              for name in watched(c) for k in (f"{name}_clean", f"{name}_pgd-10")]
    return "  ".join(cells) + f"  {clock(row['seconds']):>7}" + (
        f"  {row['skipped']} steps dropped" if row["skipped"] else "")


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
    chosen = {"val": "1,000 held-out training images",
              "test": f"the {n:,} test images (--select test)"}[c.select]
    say(f"Best is chosen by PGD-10 on {chosen}; {n_train:,} training images, {c.method}, seed "
        f"{c.seed}")
    if rank() == 0:
        write(out / "result.json", json.dumps(
            {"Best": table["Best"], "Last": table["Last"], "Diff": diff, "n_test": n,
             "n_train": n_train,
             "seconds": round(sum(r["seconds"] for r in run.rows), 1), "config": vars(c),
             **machine(c)}, indent=1))


def machine(c):
    """What a result needs beside it: versions, device, date."""
    gpu = c.device.startswith("cuda")
    name = torch.cuda.get_device_name(c.device) if gpu else platform.machine()
    return {"torch": torch.__version__, "device": f"{c.device} {name}",
            "threads": torch.get_num_threads(),
            "world": world(), "date": time.strftime("%Y-%m-%d")}


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

def attacks_of(spec, c):
    """The attacks (model, x, y) -> x_adv that a name stands for; each gets what is still right.

    "clean" none | "fgsm" | "pgd-K" K steps of c.alpha | "pgd-KxR" with R random restarts.
    UserError for another name.
    """
    if spec == "clean":
        return []
    if spec == "fgsm":
        return [lambda model, x, y: fgsm(model, x, y, c.eps)]
    kind, _, size = spec.partition("-")
    steps, _, restarts = size.partition("x")
    if kind == "pgd" and steps.isdigit() and (restarts or "1").isdigit() and int(restarts or 1):
        return [lambda model, x,
                y: pgd(model, x, y, c.eps, c.alpha, int(steps))] * int(restarts or 1)
    raise UserError(f"--attacks {spec}: no such attack; choose from clean, fgsm, pgd-K and pgd-KxR "
                    "(K steps, R restarts), separated by commas")


def evaluate(model, images, labels, specs, c, place):
    """{name of attack: {"accuracy", "n", "right", "seconds"}} on uint8 images (n, C, h, w).

    An image counts as right if it is classified correctly as it is and after every attack of the
    name; so a clean error counts as broken, and attacks run only on what is still right.
    place  tuple  what is measured and when: it seeds the attacks, with c.seed, batch and attack
    """
    images, labels, n = images[rank()::world()], labels[rank()::world()], len(images)
    dtype, results = next(model.parameters()).dtype, {}
    with frozen(model):
        for spec in specs:
            attacks, right, start = attacks_of(spec, c), 0, time.monotonic()
            for b, (x, y) in enumerate(zip(images.split(c.batch_size), labels.split(c.batch_size))):
                x = x.to(dtype) / 255
                ok = hits(model, x, y)
                for k, attack in enumerate(attacks):
                    if ok.any():
                        torch.manual_seed(seed_of(c.seed, place, spec, k, b, rank()))
                        ok[ok.clone()] = hits(model, attack(model, x[ok], y[ok]), y[ok])
                right += int(ok.sum())
            right = int(total([right], images.device)[0])
            results[spec] = {"accuracy": right / n, "n": n, "right": right,
                             "seconds": round(time.monotonic() - start, 1)}
    return results


@torch.no_grad()
def hits(model, x, y):
    """Which images are classified correctly, (B,) bool.  UserError if a logit is not finite."""
    logits = model(x)
    if not logits.isfinite().all():
        raise UserError("the model returns logits that are not finite, so its accuracy means "
                        "nothing; "
                        "take an earlier checkpoint, or train with a smaller --lr")
    return logits.argmax(1) == y


def interval(right, n, z=1.959964):
    """95 % interval of a share.                                                    Wilson 1927"""
    p, shrink = right / n, 1 / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return shrink * (p + z * z / (2 * n) - half), shrink * (p + z * z / (2 * n) + half)


def evaluate_checkpoint(c, state):
    """--evaluate: one table, also as CSV and JSON beside the checkpoint."""
    model = build(c)
    model.load_state_dict(state["model"])
    data, rows = load_data(c)["test"], []
    say(f"{c.evaluate}: epoch {state['epoch']}, {c.dataset} test, eps {show(c.eps)}, alpha "
        f"{show(c.alpha)}, "
        f"seed {c.seed}\n{'attack':12} {'accuracy':>9}   95 % interval        n   seconds")
    for spec in c.attacks:
        r = evaluate(model, *data, (spec,), c, "evaluate")[spec]
        low, high = interval(r["right"], r["n"])
        rows.append({"attack": spec, "accuracy": r["accuracy"], "low": low, "high": high,
                     "n": r["n"],
                     "seconds": r["seconds"], "eps": c.eps, "alpha": c.alpha, "seed": c.seed})
        say(f"{spec:12} {r['accuracy']:9.2%}  {low:7.2%} - {high:.2%}  {r['n']:7,}  "
            f"{r['seconds']:8.1f}")
    if rank() == 0:
        name = Path(c.evaluate).with_suffix("")
        write_csv(name.with_name(name.name + "-evaluation.csv"), rows)
        write(name.with_name(name.name + "-evaluation.json"),
              json.dumps({"checkpoint": name.name + ".pt", "rows": rows, "config": vars(c),
                          **machine(c)}, indent=1))


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def fraction(text):
    """'8/255', '0.031' -> float."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        message = f"{text} is no number; write it as 8/255 or 0.031"
        raise argparse.ArgumentTypeError(message) from None


def show(value):
    """8/255 for 0.0313725..., else the number."""
    k = value * 255
    return f"{round(k)}/255" if k and abs(k - round(k)) < 1e-6 else f"{value:g}"


def comma_list(text):
    return text.split(",")


def pair(text):
    """'5-3' -> [5, 3]."""
    m, _, n = text.partition("-")
    if not (m.isdigit() and n.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not of the form M-N; write it as 5-3")
    return [int(m), int(n)]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parser():
    """Every flag with its unit, symbol and default; and the defaults, which argparse does not set,
    so that what was given can be told from what was not."""
    p = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS,
               allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    defaults = {}

    def flag(*names, default=None, help, shown=None, **kw):
        action = p.add_argument(*names,
                                help=f"{help} (default: {shown or default})".replace("%", "%%"),
                                **kw)
        defaults[action.dest] = default
    by = "by data set"
    flag("--model", default="s4", choices=tuple(SCRIPTS), help="sequence model")
    flag("--ads", nargs="?", const="relu", choices=tuple(ACTIVATIONS),
         shown="no AdS; relu if given without a word",
         help="Adaptive Scaling after each sequence map, with this activation")
    flag("--control", choices=CONTROLS, help="what stands in the place of AdS for comparison",
         shown="nothing")
    flag("--dataset", default="cifar10", choices=tuple(PRESETS), help="images")
    flag("--data-dir", default="./data", metavar="DIR", help="torchvision's layout; downloaded "
                                                             "when absent")
    flag("--classes", type=int, metavar="N", help="Tiny-ImageNet: the first N of wnids.txt",
         shown=50)
    flag("--method", default="pgd", choices=METHODS, help="training method")
    flag("--eps", "--epsilon", type=fraction, help="radius eps of the l_inf ball, pixel units in "
                                                   "[0, 1], 8/255", shown=by)
    flag("--alpha", "--step-size", type=fraction, help="attack step alpha, pixel units", shown=by)
    flag("--steps", "--num-steps", type=int, metavar="K", help="attack steps in training", shown=by)
    flag("--beta", type=float, help="TRADES: weight of the robust term, no unit", shown=by)
    flag("--replays", type=int, default=4, metavar="M", help="FreeAT: replays of a batch; epochs "
                                                             "are divided by M")
    flag("--yopo", type=pair, default=[5, 3], metavar="M-N", help="YOPO: full passes and inner "
                                                                  "steps", shown="5-3")
    flag("--eps-warmup", type=float, metavar="E", help="eps and alpha grow from 0 over the first E "
                                                       "epochs",
         shown="0; synthetic 4")
    flag("--d-model", type=int, metavar="H", help="channels", shown=by)
    flag("--d-state", type=int, metavar="N", help="states of a sequence map",
         shown="by data set; mamba, attention 16; "
         "s5 H")
    flag("--d-hidden", type=int, metavar="V", help="attention: channels of values and feed-forward",
         shown=by)
    flag("--n-layers", type=int, metavar="N", help="blocks", shown=by)
    flag("--patch-size", type=int, metavar="P", help="a token is a patch of P x P pixels",
         shown="1; tiny-imagenet, "
         "synthetic 4")
    flag("--batch-size", type=int, metavar="B", help="images of a step, over all processes",
         shown=by)
    flag("--epochs", type=int, help="passes over the training images", shown=by)
    flag("--lr", type=float, help="AdamW's learning rate, cosine to 0", shown=by)
    flag("--weight-decay", type=float, help="AdamW's, on Linear and Conv weights only", shown=by)
    flag("--train-size", type=int, metavar="N", help="the first N training images",
         shown="all but the held-out 1,000")
    flag("--test-size", type=int, metavar="N", help="the first N test images", shown="all")
    flag("--eval-every", type=int, default=1, metavar="E", help="measure every E epochs")
    flag("--eval-train", type=int, default=0, metavar="N", help="also measure the first N training "
                                                                "images")
    flag("--select", default="val", choices=("val", "test"),
         help="what chooses Best: 1,000 held-out training images, or the test set as in the paper")
    flag("--attacks", type=comma_list, default=["clean", "pgd-10"], metavar="A,B",
         shown="clean,pgd-10",
         help="for the final row and --evaluate: clean, fgsm, pgd-K, pgd-KxR (K steps, R restarts)")
    flag("--seed", type=int, default=0, help="fixes weights, order, augmentation and attacks")
    flag("--device", shown="cuda if there is one", help="cpu, cuda, cuda:1, ...")
    flag("--precision", default="fp32", choices=("fp32", "fp64"), help="of weights and images")
    flag("--out", metavar="DIR", help="log.csv, config.json, last.pt, best.pt, result.json",
         shown="runs/NAME")
    flag("--resume", nargs="?", const=True, metavar="PATH", shown="a new run",
         help="go on with the run in --out, or in PATH (a run's folder or checkpoint)")
    flag("--save-every", type=float, default=10.0, metavar="MINUTES",
         help="checkpoint inside an epoch")
    flag("--nan", default="stop", choices=("stop", "skip"), help="what a loss that is not finite "
                                                                 "does to the run")
    flag("--evaluate", metavar="CKPT", help="measure this checkpoint instead of training",
         shown="train")
    return p, defaults


def settings(argv):
    """The run's settings and the checkpoint's state: what was given, else the checkpoint's
    settings, else PRESETS, else the flag's default."""
    p, defaults = parser()
    given = vars(p.parse_args(argv))
    chosen = defaults | PRESETS[given.get("dataset", "cifar10")] | given
    c = SimpleNamespace(**chosen)
    c.d_state = given.get("d_state",
                          c.d_model if c.model == "s5" else STATES.get(c.model, c.d_state))
    c.eps_warmup = c.eps_warmup or 0.0
    path, flag, state, free = c.resume, "--resume", None, FREE
    if c.evaluate:
        path, flag, free = c.evaluate, "--evaluate", FREE + EVALUATION
    if isinstance(path, str):
        if not Path(path).exists():
            raise UserError(f"{flag} {path}: there is no such file or folder")
        c.out = given.get("out", path if Path(path).is_dir() else str(Path(path).parent))
    c.out = c.out or "runs/" + "-".join(filter(None, (
        c.dataset, c.model, c.ads and f"ads_{c.ads}", c.control, c.method, f"seed{c.seed}")))
    if path:
        file = isinstance(path, str) and Path(path).is_file()
        state = read_checkpoint(Path(path), flag) if file else find_checkpoint(Path(c.out))
    elif any((Path(c.out) / name).exists() for name in ("config.json", "last.pt")):
        raise UserError(f"--out {c.out} holds another run; go on with it by --resume, or choose "
                        "another --out")
    if state:
        for k, v in given.items():
            if k not in free and state["config"].get(k, v) != v:
                raise UserError(f"--{k.replace('_', '-')} {v}: {path if c.evaluate else c.out} was "
                                "trained with "
                                f"{state['config'][k]}; leave the flag out, or choose another run")
        kept = {k: v for k,
                v in state["config"].items() if k not in ("device", "resume", "evaluate", "out")}
        c = SimpleNamespace(**{**vars(c), **kept, **{k: given[k] for k in free if k in given}})
    return check(c), state


def check(c):
    """c, if it can be run.  UserError for the first thing that cannot."""
    def refuse(name, why):
        value = getattr(c, name)
        raise UserError(f"--{name.replace('_', '-')} {value}: {why}")
    for name in ("eps", "alpha"):
        if not 0 <= getattr(c, name) <= 1:
            refuse(name, "it must lie in [0, 1], pixel units; 8/255, not 8")
    for name in ("d_model", "d_state", "d_hidden", "n_layers", "patch_size", "batch_size", "epochs",
                 "classes", "eval_every",
                 "replays", "train_size", "test_size"):
        if getattr(c, name) is not None and getattr(c, name) < 1:
            refuse(name, "it must be at least 1")
    for name in ("steps", "beta", "weight_decay", "eps_warmup", "save_every", "eval_train"):
        if not 0 <= getattr(c, name) < math.inf:
            refuse(name, "it must be a number of at least 0")
    if not 0 < c.lr < math.inf:
        refuse("lr", "it must be a number above 0")
    if min(c.yopo) < 1:
        refuse("yopo", "both numbers must be at least 1, as in 5-3")
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
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=c.device)
    except Exception:                                                   # each backend has its own
        refuse("device", "there is no such device here; leave it out, or give cpu")
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
                        "another "
                        "--out") from None
    return held


def main(argv=None):
    try:
        if "RANK" in os.environ:                                            # started by torchrun
            gpu = torch.cuda.is_available()
            dist.init_process_group("nccl" if gpu else "gloo")
            if gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cudnn.allow_tf32 = False                       # convolutions in full float32
        c, state = settings(argv)
        if c.evaluate:
            evaluate_checkpoint(c, state)
            return 0
        data = load_data(c)                                             # before anything is written
        held = lock(Path(c.out)) if rank() == 0 else None
        if rank() == 0:
            write(Path(c.out) / "config.json", json.dumps(vars(c) | machine(c), indent=1))
        train(c, data, state)
    except UserError as e:
        say(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"\nstopped; go on with: python train.py --resume {c.out}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
