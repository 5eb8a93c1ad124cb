# SPDX-License-Identifier: MIT
"""Train one model of the three scripts, from images to the paper's row.

    python train.py --model s4 --ads --dataset synthetic             # half a minute on a laptop
    python train.py --model s4 --ads --dataset cifar10               # the paper's protocol
    python train.py --resume runs/NAME                               # goes on after a cut
    torchrun --nproc-per-node 4 train.py --model s4 --ads            # the same on four GPUs

A run prints a line for each epoch, then Best / Last / Diff on the test images. It leaves log.csv,
config.json, last.pt, best.pt and result.json in --out.

Papers     AdS     Qi et al. 2024, arXiv 2406.05532         PGD   Madry et al. 2018, 1706.06083
           TRADES  Zhang et al. 2019, arXiv 1901.08573      YOPO  Zhang et al. 2019, 1905.00877
           FreeAT  Shafahi et al. 2019, arXiv 1904.12843
Glossary   x (B, C, h, w) images in [0, 1], y (B,) labels, c the run's settings (a flat namespace),
           eps radius and alpha step, pixel units (8/255, not 8), rank and world: torchrun's
Chance     Every random number of a run is a function of --seed and the place where it is used
           (`seed_of`), not of what came before. So a run that was cut goes on exactly, and no
           random state is saved. The synthetic images are always the same.
Not here   the models and PGD (the scripts); what asks questions of a trained model (lab/).
"""
import argparse
import csv
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

import attention_adv
import mamba_adv
import s4_adv
from ads import ACTIVATIONS, CONTROLS
from s4_adv import (ascend, fgsm, frozen, param_groups, pgd, pgd_at_loss, tell_zero_gradients,
                    trades_loss)                # the shared text: each script has the same

SCRIPTS = {"s4": s4_adv, "dss": s4_adv, "s5": s4_adv, "mamba": mamba_adv,
           "attention": attention_adv}
BASELINES = ("cnn", "vit")                      # lab/baselines.py: no state space models
METHODS = ("standard", "pgd", "trades", "free", "yopo")
# Flags that belong to some methods or models alone.
OWNERS = {"steps": ("pgd", "trades"), "eps_warmup": METHODS[1:], "beta": ("trades",),
          "replays": ("free",), "yopo": ("yopo",), "d_hidden": ("attention", "vit"),
          "d_state": tuple(SCRIPTS), "patch_size": (*SCRIPTS, "vit")}

# The paper's protocol, by data set (Qi et al. 2024, experimental settings); synthetic is ours, for
# a laptop. What is not given on the command line and depends on the data set comes from here.
PAPER = dict(d_model=128, d_state=64, n_layers=4, d_hidden=256, epochs=180, batch_size=256, lr=1e-3,
             weight_decay=2e-4, eps=8 / 255, alpha=2 / 255, steps=10, beta=6.0, pad=4, flip=True)
PRESETS = {
    "cifar10": PAPER | dict(shape=(3, 32, 32), classes=10, patch_size=1),
    "mnist": PAPER | dict(shape=(1, 28, 28), classes=10, patch_size=1, d_state=32, n_layers=2,
                          d_hidden=32, epochs=100, eps=0.3, alpha=0.04, beta=1.0, pad=0,
                          flip=False),
    "tiny-imagenet": PAPER | dict(shape=(3, 64, 64), classes=50, patch_size=4),
    "synthetic": PAPER | dict(shape=(1, 28, 28), classes=10, patch_size=7, d_model=64, n_layers=2,
                              d_hidden=64, epochs=4, batch_size=64, lr=4e-3, eps_warmup=3.0,
                              alpha=3 / 255, steps=3, train_size=6000, pad=0, flip=False,
                              test_size=500),
}
STATES = {"mamba": 16, "attention": 16}         # d_state, whatever the data set
HELD_OUT = 1000                                 # training images that choose Best, not trained on
RUN_FILES = ("last.pt", "best.pt", "config.json", "log.csv", "result.json")
NEEDED = {"model", "dataset", "seed", "ads", "control", *PRESETS["cifar10"]}   # in a checkpoint
MAY_CHANGE = ("data_dir", "device", "save_every", "attacks")            # beside --resume
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")   # what it sets

# The other jobs, each a module of lab/ that takes the whole command line.
JOBS = {"--evaluate": "evaluate", "--analyse": "analyse", "--bench": "bench", "--plot": "figures",
        "--table": "tables"}


class UserError(Exception):
    """Something that the user can mend: one sentence, printed to stderr, exit code 2."""


def laboratory(name, asked):
    """The module lab/NAME.py.  UserError if it is not there.   asked: what the user gave"""
    try:
        return importlib.import_module(f"lab.{name}")
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith("lab"):
            raise
        raise UserError(f"{asked} needs the folder lab/, which is not beside train.py; copy it "
                        "there, or leave that out") from None


# --------------------------------------------------------------------------------------------------
# Data: uint8 tensors (n, C, h, w) on the device, labels (n,)
# --------------------------------------------------------------------------------------------------

def load_data(c):
    """{"train", "val", "test": (images uint8 (n, C, h, w), labels (n,))}, on c.device.

    val is the last HELD_OUT training images, train the first c.train_size of those before them,
    test the first c.test_size test images.  UserError where data are missing, or too few.
    """
    # The first process of a machine loads first, since it may download; the others wait for it at
    # the barrier. Then all have looked at --out, to which the first process writes next.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    if c.dataset == "synthetic":
        x, y = drawn_digits(11_000, 0)
        x_test, y_test = drawn_digits(2_000, 1)
    elif c.dataset == "tiny-imagenet":
        tiny = laboratory("tiny_imagenet", "--dataset tiny-imagenet")
        x, y, x_test, y_test = tiny.load(Path(c.data_dir) / "tiny-imagenet-200", c.classes)
    else:
        x, y, x_test, y_test = torchvision_data(c.dataset, c.data_dir)
    if dist.is_initialized() and first:
        dist.barrier()
    if len(x) <= HELD_OUT:
        raise UserError(f"--classes {c.classes}: they have {len(x):,} training images, and "
                        f"{HELD_OUT:,} are held out to choose Best; give more classes")
    sets = {"train": (x[:-HELD_OUT], y[:-HELD_OUT]), "val": (x[-HELD_OUT:], y[-HELD_OUT:]),
            "test": (x_test, y_test)}
    for name, size in (("train", c.train_size), ("test", c.test_size)):
        images, labels = sets[name]
        if size is not None and size > len(images):
            raise UserError(f"--{name}-size {size}: {c.dataset} has {len(images)} such images; "
                            f"give at most {len(images)}")
        sets[name] = images[:size], labels[:size]
    if c.eval_train > len(sets["train"][0]):
        raise UserError(f"--eval-train {c.eval_train}: there are {len(sets['train'][0])} training "
                        "images; give at most as many")
    return {name: (x.to(c.device), y.to(c.device)) for name, (x, y) in sets.items()}


def lack_of_torchvision(name, error):
    return UserError(f"--dataset {name} needs torchvision, which cannot be used here ({error}); "
                     "install it, or use --dataset synthetic")


def torchvision_data(name, root):
    """Images and labels, training then test, of MNIST or CIFAR-10. They are unpacked where their
    archives lie, as torchvision names them, and downloaded where they are absent."""
    try:
        from torchvision.datasets import CIFAR10, MNIST
    except Exception as e:
        raise lack_of_torchvision(name, e) from e
    kind = {"mnist": MNIST, "cifar10": CIFAR10}[name]
    folder = Path(root) / {"mnist": "MNIST", "cifar10": "cifar-10-batches-py"}[name]
    archives = {"mnist": "MNIST/raw/*.gz", "cifar10": "cifar-10-python.tar.gz"}[name]
    n_train = {"mnist": 60_000, "cifar10": 50_000}[name]
    absent = not any(path.is_file() for path in folder.rglob("*"))
    tensors = []
    try:
        unpack = absent or any(Path(root).glob(archives))
        for first in (True, False):
            data = kind(root, train=first, download=unpack)
            x = torch.as_tensor(data.data)                                  # (n, h, w[, C])
            x = x.view(*x.shape[:3], -1).movedim(3, 1).contiguous()         # (n, C, h, w)
            tensors += [x, torch.as_tensor(data.targets)]
        if [len(v) for v in tensors] != [n_train, n_train, 10_000, 10_000]:
            raise ValueError("another number of images")
    except Exception as e:                      # whatever a damaged file or a network does
        what = "is not there, and could not be downloaded" if absent else "is incomplete or damaged"
        raise UserError(f"--data-dir {root}: {folder.name} {what} "
                        f"({str(e).partition(chr(10))[0]}); put torchvision's files there, delete "
                        "that folder to download them, or use --dataset synthetic") from e
    return tensors


def drawn_digits(n, seed, size=28):
    """n faint, slightly tilted digits of a 3 x 5 font on noise, ten classes: no download.

    n, seed, size  int   images, random seed, height and width in pixels
    Returns images (n, 1, size, size) uint8 and labels (n,) int64. Place, size, tilt, contrast
    (0.4 to 0.55 of the range) and noise vary; what is faint can be broken within a small eps.
    """
    font = "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717"    # 5 rows of 3 bits
    font = [[[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in digit] for digit in font.split()]
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=g)
    images = []
    for y in labels.split(500):
        affine = 0.1 * (torch.rand(len(y), 2, 3, generator=g) - 0.5)        # tilt, slant, shift
        affine += torch.tensor([[2.2, 0.0, 0.0], [0.0, 1.7, 0.0]])          # and size
        grid = F.affine_grid(affine, (len(y), 1, size, size), align_corners=False)
        ink = F.grid_sample(torch.tensor(font)[y][:, None].float(), grid, align_corners=False)
        ground, contrast = torch.rand(2, len(y), 1, 1, 1, generator=g)
        x = 0.1 + 0.15 * ground + (0.4 + 0.15 * contrast) * ink             # (b, 1, size, size)
        x = x + 0.025 * torch.randn(x.shape, generator=g)
        images.append((255 * x.clamp(0, 1)).round().to(torch.uint8))
    return torch.cat(images), labels


def augment(x, pad, flip, generator):
    """Random crop of the zero-padded images, mirrored for half of them: a choice for each image.

    x (B, C, h, w), pad int pixels, flip bool; a generator makes the same choices on any device.
    """
    B, _, h, w = x.shape
    tops, lefts = torch.randint(2 * pad + 1, (2, B), generator=generator).tolist()
    mirrored = (torch.rand(B, generator=generator) < 0.5).tolist()
    images = []
    for image, top, left, mirror in zip(F.pad(x, [pad] * 4), tops, lefts, mirrored):
        crop = image[:, top:top + h, left:left + w]
        images.append(crop.flip(2) if flip and mirror else crop)
    return torch.stack(images)


# --------------------------------------------------------------------------------------------------
# The five methods: each leaves the gradient of one optimiser step in .grad, and returns its loss
# --------------------------------------------------------------------------------------------------

def backward(run, x, y, eps, alpha):
    """The gradient and loss of the run's method on images x, labels y.

    standard  CE(model(x), y)
    pgd       CE(model(x'), y), x' by PGD                   Madry et al. 2018, Eq. 2.1
    trades    CE(model(x), y) + beta KL(p(x) || p(x'))      Zhang et al. 2019, Alg. 1
    free      one of M replays of the batch                 Shafahi et al. 2019, Alg. 1
    yopo      M passes with N steps of the image each       Zhang et al. 2019 (YOPO), Alg. 1

    eps, alpha  float  radius and step of this batch, pixel units; alpha may be a list of steps
    The first three take c.micro_batch images at a time, if it is given.
    """
    c, model = run.c, run.model
    if c.method == "free":
        # This process's slots, as train_epoch cuts x. A view: run.noise itself is changed.
        noise = run.noise[rank()::world()][:len(x)]
        return free_backward(model, x, y, noise, eps)
    if c.method == "yopo":
        passes, inner = c.yopo
        return yopo_backward(model, x, y, eps, alpha, passes, inner)
    total_loss = 0.0
    n = c.micro_batch or len(x)
    for x_n, y_n in zip(x.split(n), y.split(n)):
        if c.method == "standard":
            loss = F.cross_entropy(model(x_n), y_n)
        elif c.method == "pgd":
            loss = pgd_at_loss(model, x_n, y_n, eps, alpha, c.steps)
        else:
            loss = trades_loss(model, x_n, y_n, eps, alpha, c.steps, c.beta)
        loss = loss * (len(x_n) / len(x))       # the parts add up to the mean of the batch
        loss.backward()
        total_loss += loss.detach()
    return total_loss


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
    tell_zero_gradients(model, x_adv.grad)
    noise.add_(eps * x_adv.grad.sign()).clamp_(-eps, eps)
    return loss.detach()


def yopo_backward(model, x, y, eps, alpha, passes, inner):
    """YOPO-m-n: m full passes, each followed by n steps of the image on the first layer alone.

    With z = embed(x_adv) and the costate p = -grad_z CE(logits(z), y) held fixed, the image
    descends the Hamiltonian H = <p, embed(x_adv)> n times:
        x_adv  <-  Proj(x_adv - alpha sign grad_x H)     Zhang et al. 2019 (YOPO), Alg. 1, Sec. 3
    The embedding's weights ascend H, all others descend the loss, by the mean gradient of the m
    passes. Returns their mean loss. AdamW treats each number by itself, so that one optimiser over
    both sets of weights equals one for each.
    """
    x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    total_loss = 0.0
    for _ in range(passes):
        z = model.embed(x_adv).detach().requires_grad_()                    # (B, L, H)
        loss = F.cross_entropy(model.logits(z), y) / passes
        loss.backward()
        total_loss += loss.detach()
        p = -z.grad

        def minus_hamiltonian(v):
            return -(p * model.embed(v)).sum()
        x_adv = ascend(model, minus_hamiltonian, x, start=x_adv, eps=eps, alpha=alpha, steps=inner)
        minus_hamiltonian(x_adv).backward()
    return total_loss


# --------------------------------------------------------------------------------------------------
# A run: what it holds and where it stands; its files; many processes
# --------------------------------------------------------------------------------------------------

class Run:
    """One training run. What a checkpoint keeps of it is said in `save`."""

    def __init__(self, c, n):
        self.c = c                              # the settings
        self.n = n                              # training images
        self.batches = math.ceil(n / c.batch_size)              # of an epoch
        self.model = build(c)
        self.size = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, c.weight_decay), lr=c.lr)
        self.replays = c.replays if c.method == "free" else 1   # optimiser steps on a batch
        self.epochs = math.ceil(c.epochs / self.replays)        # FreeAT: divided by its replays
        # FreeAT's perturbation, one slot for each image of a batch
        self.noise = (torch.zeros(c.batch_size, *c.shape, device=c.device)
                      if c.method == "free" else None)
        self.epoch = 0                          # epochs that are done
        self.batch = 0                          # batches that are done in the epoch at hand
        self.loss = 0.0                         # sum of the loss over the images of those batches
        self.seconds = 0.0                      # that those batches took
        self.rows = []                          # log.csv: a dict for each epoch that is done
        self.best = None                        # [PGD-10, clean] of best.pt on the chooser's images
        self.saved = time.monotonic()           # when the last checkpoint was written
        self.busy = False                       # in the middle of an epoch: a signal waits
        self.asked = False                      # a signal has asked this process to stop
        self.stop = False                       # some process was asked to stop
        self.due = False                        # a checkpoint is due


# The fields of a Run that are plain numbers and lists, and go into a checkpoint as they are.
PROGRESS = ("epoch", "batch", "loss", "seconds", "rows", "best")


def seed_of(*key):
    """A seed that is a function of key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def build(c):
    """The Classifier that the settings describe, with weights drawn from c.seed, on c.device."""
    torch.manual_seed(seed_of(c.seed, "weights"))
    if c.model in BASELINES:
        return laboratory("baselines", f"--model {c.model}").build(c).to(c.device)
    channels, h, w = c.shape
    script = SCRIPTS[c.model]
    sizes = dict(d_model=c.d_model, d_state=c.d_state, n_layers=c.n_layers, patch_size=c.patch_size)
    if script is s4_adv:
        sizes["ssm"] = c.model
    if c.model == "attention":
        sizes["d_hidden"] = c.d_hidden
        sizes["max_len"] = h * w // c.patch_size ** 2
    model = script.Classifier(channels, c.classes, **sizes, ads=c.ads, control=c.control)
    return model.to(c.device)


def load(path):
    """The trained model in best.pt or last.pt, for other programs; in eval mode, on the CPU.
    Images (B, C, h, w) in [0, 1] -> logits.  UserError where there is none."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):   # `build` seeds
        return load_model(read_checkpoint(path, "train.load"), path)


def load_model(state, path, device="cpu"):
    """The model of a checkpoint's state.  UserError if the weights are of another model."""
    model = build(SimpleNamespace(**state["config"] | {"device": device}))
    put_weights(model, state["model"], path)
    return model.eval()


def put_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError) as e:
        raise UserError(f"{path}: the checkpoint does not fit the model that its settings describe "
                        f"({str(e).splitlines()[-1].strip()[:100]}); take another") from None


def write(path, content):
    """Writes text, bytes, or what torch.save takes; the first process alone. An old file is
    replaced by the whole new one, or stays as it is.  UserError where it cannot be written."""
    if rank() > 0:
        return
    part = path.with_name(path.name + ".part")
    if isinstance(content, str):
        content = content.encode()
    elif not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
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


def write_csv(path, rows):
    """A table of dicts with the same keys."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, table.getvalue())


def save(run):
    """last.pt: the run as it stands. All processes call it together: FreeAT's noise is gathered."""
    noise = run.noise
    if noise is not None and world() > 1:
        noise = torch.zeros_like(run.noise)
        noise[rank()::world()] = run.noise[rank()::world()]             # each knows its own slots
        dist.all_reduce(noise)
    place = {name: getattr(run, name) for name in PROGRESS}
    write(Path(run.c.out) / "last.pt", {
        "format": 1, "config": vars(run.c), "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(), "noise": noise, **place})
    run.saved = time.monotonic()


def read_checkpoint(path, flag):
    """The dict in a checkpoint, or in last.pt of a run's folder; with "path", its file.  UserError
    if it is missing, damaged or foreign.   flag: what the user gave it by, for the message"""
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    try:
        if not path.is_file():
            raise UserError(f"{flag} {path}: there is no such file; give one of a run's "
                            "checkpoints, last.pt or best.pt")
        content = io.BytesIO(path.read_bytes())
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be read ({e.strerror}); see to its access rights, "
                        "or copy it") from None
    try:
        with zipfile.ZipFile(content) as file:  # torch.load does not look at the checksums
            damaged = file.testzip()
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        check_saved(state["config"])
        if (damaged is None and state["format"] == 1 and state["model"]
                and NEEDED <= state["config"].keys()
                and type(state["epoch"]) is int and state["epoch"] >= 0):
            return state | {"path": path}
    except Exception:                           # whatever a damaged file does
        pass
    raise UserError(f"{flag} {path}: this is damaged, or no checkpoint of this program; give "
                    "another, or train anew with another --out")


def check_saved(config):
    """Raises an exception unless a checkpoint's settings could stand on a command line."""
    if not all(isinstance(word, str) for word in config["attacks"]):        # names: see lab/
        raise TypeError("attacks")
    unchecked = {"attacks", "device", "out", "resume"}
    p = Parser("")
    defaults = add_flags(p)
    words = []
    for name in (defaults.keys() & config.keys()) - unchecked:
        value = config[name]
        if isinstance(value, list):
            value = ("-" if name == "yopo" else ",").join(str(v) for v in value)
        if value is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    c = settings(p.given(words), defaults)
    for name in (vars(c).keys() & config.keys()) - unchecked:
        if config[name] != getattr(c, name):
            raise ValueError(name)
    check(SimpleNamespace(**vars(c) | {"device": "cpu"}))


def restore(run, state):
    """Puts a checkpoint's state into a new run.  UserError if it is of another model, or if the
    best.pt that it counts on is not there."""
    put_weights(run.model, state["model"], f"--resume {run.c.out}")
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        if run.noise is not None:
            run.noise.copy_(state["noise"])
        for name in PROGRESS:
            setattr(run, name, state[name])
        for row in run.rows:
            format_row(row, run.c)              # raises one of these if the row is damaged
        numbers = [run.loss, run.seconds, *(row["seconds"] for row in run.rows), *(run.best or ())]
        if not (0 <= run.batch <= run.batches and math.isfinite(sum(numbers))
                and len(run.rows) == run.epoch <= run.epochs):
            raise ValueError("its numbers do not go together")
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        if lacks_memory(e):
            raise
        raise UserError(f"--resume {run.c.out}: the checkpoint is damaged ({e}); start again with "
                        "another --out") from None
    if run.best is not None:
        try:
            read_checkpoint(Path(run.c.out) / "best.pt", "--resume")
        except UserError as e:
            raise UserError(f"{e}; it holds the run's Best so far: copy it there, too, or start "
                            "again with another --out") from None


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words, **kw):
    """Prints, once for all processes."""
    if rank() == 0:
        print(*words, **kw, flush=True)


def on_terminal():
    return sys.stdout is not None and sys.stdout.isatty()


def synchronise(model, share, numbers):
    """Makes .grad the whole batch's: the sum over processes of share * .grad, share = n_local / n.

    One flat all_reduce after each backward pass: what DDP does, but without its hooks, which
    attacks, FreeAT and YOPO would trigger. Returns the sums of the numbers, which travel along.
    """
    if world() == 1:
        return numbers
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() * share for g in grads] + [grads[0].new_tensor(numbers)])
    dist.all_reduce(flat)
    *gradients, summed = flat.split([g.numel() for g in grads] + [len(numbers)])
    for p, g in zip(model.parameters(), gradients):
        p.grad = g.view_as(p)
    return summed.tolist()


def machine(c):
    """What a result needs beside it: versions, device, date."""
    cuda = c.device.startswith("cuda")
    name = torch.cuda.get_device_name(c.device) if cuda else platform.machine()
    return {"torch": torch.__version__, "device": f"{c.device} {name}",
            "threads": torch.get_num_threads(), "world": world(), "date": time.strftime("%Y-%m-%d")}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def descend(run, x, y, n, eps, alpha):
    """One optimiser step on a batch of n images, of which x, y are this process's part. Returns the
    loss summed over the batch.  UserError if the loss or a gradient is not finite."""
    run.optimizer.zero_grad()
    loss = 0.0
    try:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=run.c.precision == "bf16"):
            if len(x):
                loss = float(backward(run, x, y, eps, alpha)) * len(x)
    except FloatingPointError:                  # all processes have to hear of it
        loss = math.nan
    due = rank() == 0 and time.monotonic() - run.saved > 60 * run.c.save_every
    loss, run.stop, run.due = synchronise(run.model, len(x) / n, [loss, run.asked, due])
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    if not (math.isfinite(loss) and all(bool(g.isfinite().all()) for g in grads)):
        raise UserError(f"loss or gradient is not finite at epoch {run.epoch + 1}, batch "
                        f"{run.batch + 1}; the last checkpoint is {Path(run.c.out) / 'last.pt'}: "
                        "train anew with a smaller --lr, or with --eps-warmup")
    run.optimizer.step()
    return loss


def train_batch(run, x, y, n):
    """All optimiser steps on one batch: one, or FreeAT's replays. Returns the batch's summed loss,
    the mean over replays. Over the first c.eps_warmup epochs eps and alpha grow from 0."""
    c = run.c
    ramp = 1.0
    if c.eps_warmup:
        epochs = (run.epoch + run.batch / run.batches) * run.replays
        ramp = min(1.0, epochs / c.eps_warmup)
    alpha = [ramp * a for a in c.alphas] if c.alphas else ramp * c.alpha
    losses = [descend(run, x, y, n, ramp * c.eps, alpha) for _ in range(run.replays)]
    return sum(losses) / run.replays


def train_epoch(run, images, labels):
    """The rest of run.epoch, from run.batch on; saves every c.save_every minutes and at its end."""
    c = run.c
    start = time.monotonic() - run.seconds
    order = torch.Generator().manual_seed(seed_of(c.seed, "order", run.epoch))
    batches = torch.randperm(len(images), generator=order).to(images.device).split(c.batch_size)
    for group in run.optimizer.param_groups:                                # cosine to 0, per epoch
        group["lr"] = c.lr * 0.5 * (1 + math.cos(math.pi * run.epoch / run.epochs))
    run.model.train()
    run.busy = True
    while run.batch < run.batches:
        i = batches[run.batch]
        x, y = images[i], labels[i]
        if c.pad or c.flip:
            crops = torch.Generator().manual_seed(seed_of(c.seed, "augment", run.epoch, run.batch))
            x = augment(x, c.pad, c.flip, crops)
        x, y = x[rank()::world()], y[rank()::world()]                       # this process's part
        x = x.to(next(run.model.parameters()).dtype) / 255
        torch.manual_seed(seed_of(c.seed, "attack", run.epoch, run.batch, rank()))
        run.loss += train_batch(run, x, y, len(i))
        run.batch += 1
        run.seconds = time.monotonic() - start
        show_progress(run)
        if run.stop or run.due or run.batch == run.batches:
            save(run)
        if run.stop:
            raise KeyboardInterrupt
    run.busy = False
    # A signal may have come while the last checkpoint was written.
    asked = torch.tensor(float(run.asked), device=images.device)
    if world() > 1:
        dist.all_reduce(asked)
    if asked:
        raise KeyboardInterrupt


def show_progress(run):
    """The live line: only on a terminal."""
    if on_terminal():
        per_batch = run.seconds / run.batch
        left = (run.batches - run.batch) * per_batch
        later = (run.epochs - run.epoch - 1) * run.batches * per_batch
        seen = min(run.batch * run.c.batch_size, run.n)
        say(f"\r{run.epoch + 1:5d}  batch {run.batch}/{run.batches}  loss {run.loss / seen:.3f}  "
            f"{clock(left)} left of the epoch, {clock(left + later)} of the run \033[K", end="")


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def stop_at_signal(run):
    """Ctrl-C and SIGTERM end the run after the batch at hand, with a checkpoint."""
    def note(signum, frame):
        signal.signal(signum, signal.SIG_DFL)                           # a second one ends at once
        if not run.busy:                                                # measuring: nothing to lose
            raise KeyboardInterrupt
        run.asked = True
        with suppress(OSError):                                         # nobody reads stderr
            os.write(2, b"\nstopping after this batch; a second signal ends at once\n")
    at_signals(note, note)


def at_signals(interrupt, terminate):
    """Sets what SIGINT and SIGTERM do; a thread other than the main one may not, and does not."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def train_model(c, data, state=None):
    """The whole run, from a checkpoint's state or the beginning; ends with the paper's row."""
    run = Run(c, len(data["train"][0]))
    stop_at_signal(run)
    if state is None:
        say(f"{name_of(c)}: {run.size:,} trainable parameters; {c.dataset}, {run.n:,} "
            f"training images, {c.method}, eps {show(c.eps)}, {run.epochs} epochs; {c.out}")
        save(run)
    else:
        restore(run, state)
        left = "trained to its end; the test is left"
        if run.epoch < run.epochs:
            left = f"going on in epoch {run.epoch + 1}, after batch {run.batch} of {run.batches}"
        say(f"{c.out}: {left}")
        if run.rows:                            # a cut may have come before it was written
            write_csv(Path(c.out) / "log.csv", run.rows)
    write(Path(c.out) / "config.json", json.dumps(vars(c) | machine(c), indent=1))
    columns = [f"{name + ' ' + attack:>12}" for name in watched(c) for attack in ROW]
    say("  ".join([f"{'epoch':>5}", f"{'lr':>8}", f"{'loss':>7}", *columns, f"{'time':>7}"]))
    for row in run.rows:
        say(format_row(row, c))
    while run.epoch < run.epochs:
        train_epoch(run, *data["train"])
        row = end_epoch(run, data)
        keep_best(run, row)
        save(run)
        write_csv(Path(c.out) / "log.csv", run.rows)
        if on_terminal():
            say("\r\033[K", end="")
        say(format_row(row, c))
        hint(run)
    finish(run, data)


# What is measured after each epoch; PGD-10 chooses Best, clean accuracy breaks a tie.
ROW = ("clean", "pgd-10")


def watched(c):
    """The sets measured after an epoch: training images where asked for, then the chooser."""
    return ["train", c.select] if c.eval_train else [c.select]


def end_epoch(run, data):
    """The row of the epoch that just ended; the run then stands before the next one."""
    c = run.c
    row = {"epoch": run.epoch + 1, "lr": run.optimizer.param_groups[0]["lr"],
           "loss": run.loss / run.n}
    measure = (run.epoch + 1) % c.eval_every == 0 or run.epoch + 1 == run.epochs
    for name in watched(c):
        images, labels = data[name]
        if name == "train":
            images, labels = images[:c.eval_train], labels[:c.eval_train]
        found = evaluate(run.model, images, labels, ROW, c, (name, run.epoch)) if measure else {}
        for attack in ROW:
            row[f"{name}_{attack}"] = found.get(attack)
    row["seconds"] = round(run.seconds, 1)
    run.rows.append(row)
    run.epoch += 1
    run.batch = 0
    run.loss = run.seconds = 0.0
    return row


def keep_best(run, row):
    """best.pt, if this epoch is the best so far on the images that choose."""
    clean, robust = (row[f"{run.c.select}_{attack}"] for attack in ROW)
    if robust is None or (run.best is not None and [robust, clean] <= run.best):
        return
    run.best = [robust, clean]
    write(Path(run.c.out) / "best.pt", {"format": 1, "config": vars(run.c), "epoch": run.epoch,
                                        "model": run.model.state_dict()})


def hint(run):
    """Says, once, that the first three epochs that were measured have not led above chance."""
    key = f"{run.c.select}_clean"
    known = [row[key] for row in run.rows if row[key] is not None]
    third = len(known) == 3 and run.rows[-1][key] is not None
    if third and max(known) < 1.5 / run.c.classes and run.epoch < run.epochs:
        say(f"hint: after {run.epoch} epochs accuracy is still that of chance; if it stays there, "
            "train anew with --eps-warmup, which begins with small eps, or another --lr")


def name_of(c):
    """The model, and what stands in the middle of its blocks: 's4', 's4 + AdS relu', 's4 + mlp'."""
    middle = f"AdS {c.ads}" if c.ads else c.control
    return f"{c.model} + {middle}" if middle else c.model


def folder_of(c):
    """--out where it is not given: 'runs/cifar10-s4-ads_relu-pgd-seed0'."""
    middle = f"ads_{c.ads}" if c.ads else c.control
    parts = [c.dataset, c.model, middle, c.method, f"seed{c.seed}"]
    return "runs/" + "-".join(part for part in parts if part)


def format_row(row, c):
    cells = [f"{row['epoch']:5d}", f"{row['lr']:8.1e}", f"{row['loss']:7.4f}"]
    for name in watched(c):
        for attack in ROW:
            accuracy = row[f"{name}_{attack}"]
            cells.append(f"{'-' if accuracy is None else f'{accuracy:.2%}':>12}")
    return "  ".join([*cells, f"{clock(row['seconds']):>7}"])


def finish(run, data):
    """The paper's row, Best / Last / Diff on the test set; printed, and kept in result.json."""
    c, out = run.c, Path(run.c.out)
    if world() > 1:
        dist.barrier()                          # until best.pt is written
    best = read_checkpoint(out / "best.pt", "--resume")
    n = len(data["test"][0])
    last = {"epoch": run.epochs, **evaluate(run.model, *data["test"], c.attacks, c,
                                            ("test", run.epochs))}
    table = {"Best": last, "Last": last}
    if best["epoch"] != run.epochs:
        put_weights(run.model, best["model"], out / "best.pt")
        found = evaluate(run.model, *data["test"], c.attacks, c, ("test", best["epoch"]))
        table["Best"] = {"epoch": best["epoch"], **found}
    table["Diff"] = {attack: table["Best"][attack] - last[attack] for attack in c.attacks}
    head = f"test, n = {n:,}, eps {show(c.eps)}".ljust(30)
    say("\n" + head + "".join(f"{attack:>10}" for attack in c.attacks))
    for name, row in table.items():
        epoch = f" (epoch {row['epoch']})" if "epoch" in row else ""
        cells = [f"{100 * row[attack]:10.2f}" for attack in c.attacks]
        say(f"  {name}{epoch}".ljust(30) + "".join(cells))
    chosen = (f"{HELD_OUT:,} held-out training images" if c.select == "val"
              else f"the {n:,} test images (--select test)")
    say(f"Best is chosen by PGD-10 on {chosen}; {run.n:,} training images, {c.method}, "
        f"seed {c.seed}")
    seconds = round(sum(row["seconds"] for row in run.rows), 1)
    write(out / "result.json", json.dumps(
        {**table, "n_test": n, "n_train": run.n, "parameters": run.size, "seconds": seconds,
         "config": vars(c), **machine(c)}, indent=1))


# --------------------------------------------------------------------------------------------------
# Accuracy, under attacks that the command line names
# --------------------------------------------------------------------------------------------------

def attacks_of(spec, c):
    """The attacks (model, x, y) -> x_adv of a name, each run on what the ones before left.

    "clean" none | "fgsm" | "pgd-K" K steps of c.alpha | "pgd-KxR" with R random restarts |
    a name of lab/autoattack.py.  UserError for another name, or too few classes for it.
    """
    if spec == "clean":
        return []
    if spec == "fgsm":
        return [partial(fgsm, eps=c.eps)]
    if found := re.fullmatch(r"pgd-(\d{1,6})(?:x([1-9]\d{0,5}))?", spec, re.ASCII):
        steps, restarts = int(found[1]), int(found[2] or 1)
        return restarts * [partial(pgd, eps=c.eps, alpha=c.alpha, steps=steps)]
    if spec == "pgd-official":
        raise UserError(f"--attacks {spec}: it stands for comparison only, so a run cannot have it "
                        "measured; give it with --evaluate CKPT")
    auto = laboratory("autoattack", f"--attacks {spec}")
    names = auto.ENSEMBLES.get(spec, [spec])
    if names[0] not in auto.AUTO:
        raise UserError(f"--attacks {spec}: no such attack; choose from clean, fgsm, pgd-K and "
                        f"pgd-KxR (K steps, R restarts), {', '.join([*auto.ENSEMBLES, *auto.AUTO])}"
                        ", pgd-official, separated by commas")
    need = 4 if "apgd-t" in names else 2
    if c.classes < need:
        raise UserError(f"--attacks {spec}: it needs at least {need} classes, and there are "
                        f"{c.classes}; leave it out")
    return [partial(auto.AUTO[name], eps=c.eps) for name in names]


def scores(model, x):
    """Logits z = model(x), (B, n_classes).  FloatingPointError if one is not finite."""
    z = model(x)
    if not z.isfinite().all():
        raise FloatingPointError("the model returns logits that are not finite, so its accuracy "
                                 "means nothing; take an earlier checkpoint, or train with a "
                                 "smaller --lr")
    return z


@torch.no_grad()
def hits(model, x, y):
    """argmax_k z_k == y, (B,) bool: which images are classified correctly."""
    return scores(model, x).argmax(1) == y


def still_right(model, x, y, attacks, seed, source=None):
    """[(B,) bool]: which images are right as they are, and after each attack on what was right.

    seed    function  number of the attack -> the seed of its random numbers
    source  Module    the model that is attacked, where it is not the one that is measured
    """
    found = [hits(model, x, y)]
    for k, attack in enumerate(attacks):
        was = found[-1]
        right = was.clone()
        if was.any():
            torch.manual_seed(seed(k))
            x_adv = attack(model if source is None else source, x[was], y[was])
            right[was] = hits(model, x_adv, y[was])
        found.append(right)
    return found


def survivors(model, images, labels, spec, attacks, c, place, kept=None, source=None):
    """Which images are right as they are, and after each attack: (1 + len(attacks), n) bool.

    images, labels  (n, C, h, w) uint8, (n,)
    spec    str           the attacks' name
    place   str or tuple  what is measured, and when; fixes the random numbers, with spec, c.seed,
                          and the numbers of attack, batch and process
    kept    mapping       a batch's key -> its part of the result: read, or else filled
    source  Module        as still_right
    """
    kept = {} if kept is None else kept
    dtype = next(model.parameters()).dtype
    found = torch.zeros(1 + len(attacks), len(images), dtype=torch.bool)
    with frozen(model):
        mine = torch.arange(len(images))[rank()::world()]
        for b, i in enumerate(mine.split(c.batch_size) if len(mine) else ()):
            key = repr((place, spec, c.eps, c.alpha, b))
            if key not in kept:
                def seed(k):
                    return seed_of(c.seed, place, spec, k, b, rank())
                x = images[i].to(dtype) / 255
                right = still_right(model, x, labels[i], attacks, seed, source)
                kept[key] = torch.stack(right).cpu()
            found[:, i] = kept[key]
    if world() == 1:
        return found
    everywhere = found.to(images.device, torch.uint8)
    dist.all_reduce(everywhere)
    return everywhere.bool().cpu()


def evaluate(model, images, labels, specs, c, place):
    """{name: share of images that are right as they are and after every attack of the name}.

    So a clean error counts as broken, and attacks run only on what is still right.
    """
    found = {}
    for spec in specs:
        right = survivors(model, images, labels, spec, attacks_of(spec, c), c, place)
        found[spec] = int(right[-1].sum()) / len(images)
    return found


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def fraction(text):
    """'8/255', '3.2/255', '0.031' -> float."""
    try:
        parts = [float(part) for part in text.split("/", 1)]
        value = parts[0] / parts[1] if len(parts) == 2 else parts[0]
        if all(math.isfinite(number) for number in (*parts, value)):
            return value
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text} is no number; write it as 8/255 or 0.031")


def fractions(text):
    """'0,8/255' -> [0.0, 0.0313...]."""
    return [fraction(v) for v in text.split(",")]


def comma_list(text):
    return text.split(",")


def pair(text):
    """'5-3' -> [5, 3]."""
    found = re.fullmatch(r"(\d+)-(\d+)", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not of the form M-N; write it as 5-3")
    return [int(found[1]), int(found[2])]


def show(value):
    """'8/255' for 0.0313725..., else the number; '0.2', too, though it is 51/255."""
    k = value * 255
    whole = 0 < k < 255 and abs(k - round(k)) < 1e-6
    return f"{round(k)}/255" if whole and len(f"{value:g}") > 3 else f"{value:g}"


class Parser(argparse.ArgumentParser):
    """Says what is wrong as a UserError. What it returns holds the given flags alone."""

    def __init__(self, description, **kw):
        super().__init__(description=description, argument_default=argparse.SUPPRESS,
                         allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **kw)
        self._negative_number_matcher = re.compile(r"-[\d.]")   # -1/255 is a value, and no flag

    def error(self, message):
        raise UserError(message)

    def given(self, words):
        """{flag: value} of the command line."""
        found = vars(self.parse_args(words))
        for name, value in found.items():
            if value == "":
                self.error(f"--{name.replace('_', '-')} is empty; give a value, or leave it out")
        return found


BY_DATA = "by data set"


def add_flags(p, only=None):
    """Adds training's flags to a parser, or only those named: name, type, default, meaning.

    Returns {flag: default}. argparse sets none, so that `given` holds only what the user wrote.
    """
    defaults = {}

    def flag(names, kind, default, help, shown=None, **kw):
        dest = names.split()[0][2:].replace("-", "_")
        if only is None or dest in only.split():
            p.add_argument(*names.split(), type=kind, help=f"{help} (default: {shown or default})",
                           **kw)
            defaults[dest] = None if default == BY_DATA else default
    plain = ", or cnn, vit: plain networks to compare with" if only is None else ""
    flag("--model", str, "s4", f"sequence model (attention: Mega){plain}",
         choices=(*SCRIPTS, *BASELINES) if only is None else tuple(SCRIPTS))
    flag("--ads", str, None, "Adaptive Scaling after each sequence map, with this activation",
         "no AdS; relu if given without a word", nargs="?", const="relu",
         choices=tuple(ACTIVATIONS))
    flag("--control", str, None, "what stands in the place of AdS for comparison; scale, shift: "
         "half of ReLU-AdS", "nothing", choices=CONTROLS)
    flag("--dataset", str, "cifar10", "images; synthetic: faint, slightly tilted digits on noise, "
         "drawn here", choices=tuple(PRESETS))
    flag("--data-dir", os.path.expanduser, "./data", "torchvision's layout; downloaded where "
         "absent", metavar="DIR")
    flag("--classes", int, BY_DATA, "Tiny-ImageNet: the first N of wnids.txt", "50", metavar="N")
    flag("--method", str, "pgd", "training method", choices=METHODS)
    flag("--eps --epsilon", fraction, BY_DATA, "radius eps of the l_inf ball, pixel units in "
         "[0, 1], 8/255")
    flag("--alpha --step-size", fraction, BY_DATA, "attack step alpha, pixel units",
         "by data set, in proportion to --eps")
    flag("--alphas", fractions, None, "pgd, trades: a step size for each step of the attack in "
         "training, pixel units", "--alpha at each", metavar="A,A")
    flag("--steps --num-steps", int, BY_DATA, "attack steps in training", metavar="K")
    flag("--beta", float, BY_DATA, "TRADES: weight of the robust term, no unit")
    flag("--replays", int, 4, "FreeAT: replays of a batch; epochs are divided by M", metavar="M")
    flag("--yopo", pair, [5, 3], "YOPO: full passes and inner steps", "5-3", metavar="M-N")
    flag("--eps-warmup", float, 0.0, "eps and alpha grow from 0 over the first E epochs",
         "0; synthetic 3", metavar="E")
    flag("--d-model", int, BY_DATA, "channels", "by data set; mamba on synthetic 32", metavar="H")
    flag("--d-state", int, BY_DATA, "states of a sequence map",
         "by data set; mamba, attention 16; s5 H", metavar="N")
    flag("--d-hidden", int, BY_DATA, "channels of feed-forward, and of Mega's values", metavar="V")
    flag("--n-layers", int, BY_DATA, "blocks", metavar="N")
    flag("--patch-size", int, BY_DATA, "a token is a patch of P x P pixels",
         "1; tiny-imagenet 4, synthetic 7", metavar="P")
    flag("--batch-size", int, BY_DATA, "images of a step, over all processes", metavar="B")
    flag("--micro-batch", int, None, "images of a batch at a time: less memory, the same step; "
         "not for free and yopo", "all", metavar="M")
    flag("--epochs", int, BY_DATA, "passes over the training images")
    flag("--lr", float, BY_DATA, "AdamW's learning rate, cosine to 0")
    flag("--weight-decay", float, BY_DATA, "AdamW's, on Linear and Conv weights only")
    flag("--train-size", int, BY_DATA, "the first N training images",
         "all but the held-out 1,000", metavar="N")
    flag("--test-size", int, BY_DATA, "the first N test images", "all", metavar="N")
    flag("--eval-every", int, 1, "measure every E epochs", metavar="E")
    flag("--eval-train", int, 0, "also measure the first N training images", metavar="N")
    flag("--select", str, "val", "what chooses Best: 1,000 held-out training images, or the test "
         "set as in the paper", choices=("val", "test"))
    flag("--attacks", comma_list, ["clean", "pgd-10"], "what is measured at the end: clean, fgsm, "
         "pgd-K, pgd-KxR (K steps, R restarts), apgd-ce, apgd-t, fab-t, square; aa: AutoAttack, "
         "these four in turn; aa-fast: the first two", "clean,pgd-10", metavar="A,B")
    flag("--seed", int, 0, "fixes weights, order, augmentation and attacks")
    flag("--device", str, None, "cpu, cuda, cuda:1, ...", "cuda if there; --resume: cpu stays cpu")
    flag("--precision", str, "fp32", "bf16: products in training; kernels, states and "
         "evaluation stay fp32", choices=("fp32", "bf16"))
    flag("--out", os.path.expanduser, None, "folder of log.csv, config.json, last.pt, best.pt, "
         "result.json", "runs/NAME", metavar="DIR")
    flag("--resume", str, None, "go on with the run in --out, or in PATH (a run's folder or its "
         "last.pt)", "a new run", nargs="?", const=True, metavar="PATH")
    flag("--save-every", float, 10.0, "between two checkpoints inside an epoch", metavar="MINUTES")
    return defaults


OTHER_JOBS = """other jobs, each with flags of its own (--help beside it shows them):
  --evaluate CKPT        attack a checkpoint; checks, sweeps, transfer, images
  --analyse [CKPT]       the paper's theory in numbers
  --table RUN [RUN ...]  finished runs as one Markdown table
  --plot RUN [RUN ...]   accuracies over epochs, or under attacks, as a picture
  --bench [N]            what a training step costs"""


def settings(given, defaults):
    """The settings c: what was given, else the data set's preset, else the flag's default."""
    c = SimpleNamespace(**defaults | PRESETS[given.get("dataset", "cifar10")])
    if "eps" in given:
        c = at_radius(c, given["eps"])
    c = SimpleNamespace(**vars(c) | given)
    if "d_state" not in given:
        c.d_state = c.d_model if c.model == "s5" else STATES.get(c.model, c.d_state)
    if c.dataset == "synthetic" and c.model == "mamba" and "d_model" not in given:
        c.d_model //= 2                         # Mamba is twice as wide inside, 64 like the others
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return c


def at_radius(c, eps):
    """c with another radius, and a step in proportion to it."""
    alpha = eps * c.alpha / c.eps if c.eps else eps / 4
    return SimpleNamespace(**vars(c) | {"eps": eps, "alpha": alpha})


def check(c):
    """UserError for the first setting that cannot be run."""
    def refuse(name, why):
        raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: {why}")
    for name in ("d_model", "d_state", "d_hidden", "n_layers", "patch_size", "batch_size", "epochs",
                 "classes", "eval_every", "replays", "train_size", "test_size", "micro_batch"):
        size = getattr(c, name)
        if size is not None and not 1 <= size < 2 ** 31:
            refuse(name, "it must be at least 1" if size < 1 else "it is too large")
    for name in ("steps", "beta", "weight_decay", "eps_warmup", "save_every", "eval_train"):
        if not 0 <= getattr(c, name) < 2 ** 31:
            refuse(name, "it must be a number of at least 0, below 2^31")
    h, w = c.shape[1:]
    for name in ("eps", "alpha"):
        if not 0 <= getattr(c, name) <= 1:
            refuse(name, "it must lie in [0, 1], pixel units; 8/255, not 8")
    if not all(0 <= alpha <= 1 for alpha in c.alphas or ()):
        refuse("alphas", "they must lie in [0, 1], pixel units; 2/255, not 2")
    if c.alphas and (c.method not in ("pgd", "trades") or len(c.alphas) != c.steps):
        refuse("alphas", f"give one for each of the {c.steps} --steps, with --method pgd or trades")
    if c.eps and 0 in (c.alpha, max(c.alphas or [1])):
        raise UserError("--alpha or --alphas 0: the attack would not move; give steps above 0")
    if not 0 < c.lr < 1e30:
        refuse("lr", "it must be a number above 0, below 1e30")
    if not all(1 <= n < 2 ** 31 for n in c.yopo):
        refuse("yopo", "give numbers from 1 on, as in 5-3")
    if c.ads and c.control:
        refuse("control", f"it stands in the place of --ads {c.ads}; give one of them")
    if c.model in BASELINES:
        laboratory("baselines", f"--model {c.model}").check(c)
    if c.model in ("s4", "dss") and c.d_state % 2:
        refuse("d_state", f"{c.model} stores conjugate pairs; give an even number")
    if h % c.patch_size:
        refuse("patch_size", f"it does not divide an image of {h} x {w} pixels; give a divisor")
    if c.dataset != "tiny-imagenet" and c.classes != 10:
        refuse("classes", f"{c.dataset} has 10 classes; only tiny-imagenet takes another number")
    if c.micro_batch and c.method in ("free", "yopo"):
        refuse("micro_batch", f"--method {c.method} takes a batch at once; leave it out")
    for spec in c.attacks:
        attacks_of(spec, c)
    check_device(c)


def refuse_idle(c, given):
    """UserError for a given flag without effect, and for --steps 0 of a method that attacks."""
    for name, owners in OWNERS.items():
        if name in given and not {c.method, c.model} & set(owners):
            kind = "method" if owners[0] in METHODS else "model"
            raise UserError(f"--{name.replace('_', '-')} has an effect with --{kind} "
                            f"{' or '.join(owners)} alone, and this is {getattr(c, kind)}; "
                            "leave it out")
    if c.method in OWNERS["steps"] and c.steps == 0:
        raise UserError(f"--steps 0: --method {c.method} would train on noise, not on an attack; "
                        "use --method standard")


def check_device(c):
    """UserError if there is no such device, or if it cannot do c.precision."""
    try:
        float(torch.zeros(1, device=c.device))                              # fails on meta, too
    except Exception as e:                      # each backend has its own
        if lacks_memory(e):
            raise
        raise UserError(f"--device {c.device}: there is no such device here; leave it out, or give "
                        "cpu") from None
    gpu = torch.device(c.device).type == "cuda"
    if c.precision == "bf16" and gpu and torch.cuda.get_device_capability(c.device) < (8, 0):
        raise UserError(f"--precision bf16: {c.device} has none; use a GPU of compute capability "
                        "8.0 or above, or a CPU, or leave it out")


def resumed(c, given):
    """c and the state of the run that --resume names; state None where there is nothing yet.
    UserError where a run cannot go on."""
    path = Path(c.out)
    if c.resume is not True:
        path = Path(c.resume)
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        if not path.exists():
            raise UserError(f"--resume {path}: there is no such file or folder")
    folder = path.parent if path.is_file() else path
    if "out" in given and os.path.realpath(given["out"]) != os.path.realpath(folder):
        raise UserError(f"--out {given['out']}: a run goes on in its own folder, {folder}; leave "
                        "--out out, or copy that folder and --resume the copy")
    if path.is_file() and path.name != "last.pt":
        read_checkpoint(path, "--resume")
        raise UserError(f"--resume {path}: a run goes on from the last.pt of its folder; give the "
                        "folder, or copy this there under that name")
    there = [name for name in RUN_FILES if (folder / name).exists()]
    if there and "last.pt" not in there:
        raise UserError(f"--resume {folder}: it has {there[0]}, but no last.pt to go on from; "
                        "train anew with another --out")
    if not there and c.resume is True:
        say(f"--resume: there is no run in {folder} yet; a new one begins")
        return c, None
    if not there:
        raise UserError(f"--resume {folder}: there is no run in this folder; leave the flag out to "
                        "begin one")
    state = read_checkpoint(folder, "--resume")
    if "optimizer" not in state:
        raise UserError(f"--resume {folder}: its last.pt holds weights for --evaluate, not a run")
    c = checkpoint_settings(c, given, state, folder, MAY_CHANGE)
    c.out = str(folder)
    if state["config"].get("device") == "cpu" and not dist.is_initialized():
        c.device = given.get("device", "cpu")                   # a GPU would give other bits
    return c, state


def checkpoint_settings(c, given, state, path, free):
    """c with a checkpoint's settings. A given flag in free replaces one.  UserError if any other
    given flag differs from it."""
    config = state["config"]
    for k, v in given.items():
        if k not in (*free, "resume", "out") and config.get(k) != v:
            there = "without it" if config.get(k) is None else f"with {config[k]}"
            raise UserError(f"--{k.replace('_', '-')} {v}: {path} was trained {there}; "
                            "leave the flag out, or choose another run")
    own = {k: v for k, v in config.items() if k in vars(c)}
    c = SimpleNamespace(**vars(c) | own | {"device": c.device})
    if "eps" in given and "eps" in free:
        c = at_radius(c, given["eps"])
    return SimpleNamespace(**vars(c) | {k: given[k] for k in free if k in given})


def refuse_old_run(out):
    """UserError if a run, or a part of one, is in --out already."""
    for name in (*RUN_FILES, "best-evaluation.json"):                       # --table reads it, too
        if (out / name).exists():
            raise UserError(f"--out {out} holds another run ({name}); go on with it by --resume, "
                            "or choose another --out")


@contextmanager
def lock(out):
    """Within it the folder is this process's alone. Afterwards the lock is gone, and so are the
    folders that were made for it, where nothing has come into them."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = open(out / ".lock", "a")
    except OSError as e:
        raise UserError(f"--out {out}: {e.filename} cannot be written ({e.strerror}); choose "
                        "another --out") from e
    with held:
        try:
            import fcntl
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(held.fileno()).st_nlink == 0:
                raise BlockingIOError           # its owner has ended since, and deleted it
        except ImportError:                                                 # Windows has none
            pass
        except OSError:
            raise UserError(f"--out {out}: another process is training there; wait for it, or "
                            "choose another --out") from None
        try:
            yield
        finally:
            with suppress(OSError):
                (out / ".lock").unlink()
                for folder in made:
                    folder.rmdir()


def run_from(words):
    """A training run, from its command line."""
    p = Parser(__doc__.splitlines()[0], epilog=OTHER_JOBS)
    defaults = add_flags(p)
    given = p.given(words)
    c = settings(given, defaults)
    c.out = c.out or folder_of(c)
    state = None
    if c.resume:
        c, state = resumed(c, given)
    else:
        refuse_old_run(Path(c.out))
    check(c)
    refuse_idle(c, given)
    data = load_data(c)                         # before anything is written
    with lock(Path(c.out)) if rank() == 0 else nullcontext():
        if rank() == 0 and state is None:
            refuse_old_run(Path(c.out))         # another process may have begun one meanwhile
        try:
            train_model(c, data, state)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"go on with: python train.py --resume {shlex.quote(c.out)}"
                                    ) from None
        finally:
            at_signals(signal.default_int_handler, signal.SIG_DFL)


def join_processes():
    """Joins the other processes, if torchrun has started this one.  UserError where only a part of
    its variables is set: each process would train alone."""
    missing = [name for name in TORCHRUN if name not in os.environ]
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return
    if missing:
        raise UserError(f"the environment has RANK or WORLD_SIZE, but no {missing[0]}; start the "
                        f"processes by torchrun, which sets {', '.join(TORCHRUN)}, or set none")
    gpus = torch.cuda.device_count()
    try:
        if 0 < gpus < (wanted := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
            raise UserError(f"--nproc-per-node {wanted}: give {gpus}, one process for each GPU")
        dist.init_process_group("nccl" if gpus else "gloo")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    except (ValueError, RuntimeError) as e:
        raise UserError(f"{', '.join(TORCHRUN)}: the processes do not come together "
                        f"({str(e).partition(chr(10))[0]}); start them by torchrun") from e


def complain(words, alone=False):
    """Prints to stderr and returns exit code 2. An error that all processes of a machine meet is
    told by the first; with alone=True by this one."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            print(f"train.py: {words}", file=sys.stderr, flush=True)
    return 2


def lacks_memory(error):
    """True for a lack of memory. PyTorch's CPU allocator and CUDA's libraries have no exception of
    their own for it."""
    signs = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED",
             "Storage size calculation overflowed")
    return (isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
            or any(sign in str(error) for sign in signs))


def main(argv=None):
    """A training run, or the job whose word stands on the command line. Returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    asked = next((word for word in words if word.partition("=")[0] in JOBS), None)
    helps = {"-h", "--help"} & set(words)
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):               # any name is printed
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        if not helps:
            join_processes()
        # Products and convolutions in full float32 on a GPU, too.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        if asked:
            job = asked.partition("=")[0]
            return laboratory(JOBS[job], job).main(["--help"] if helps else words) or 0
        run_from(words)
    except (UserError, FloatingPointError) as e:
        return complain(e, alone=isinstance(e, FloatingPointError))     # of this process's images
    except KeyboardInterrupt as e:
        say(f"\nstopped; {e}" if str(e) else "\nstopped", file=sys.stderr)
        return 130
    except OSError as e:                        # a path, or nobody reads stdout
        if e.filename is None:
            sys.stdout = open(os.devnull, "w")
        return complain(f"{e.filename or 'the output'}: {e.strerror or e}; choose another place; a "
                        "run goes on with --resume")
    except (MemoryError, RuntimeError) as e:
        if dist.is_initialized() and "by peer" in str(e):
            return complain("another process has ended; its own message says why")
        if not lacks_memory(e):
            raise
        why = str(e).partition("\n")[0] or type(e).__name__
        return complain(f"memory does not suffice ({why}); try a smaller model, --batch-size, or "
                        "in training --micro-batch", alone=True)
    finally:
        # gloo would wait here for a peer that has left.
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.destroy_process_group()
    return 0


def leave(code):
    """Ends the program; a process of torchrun's at once: if a thread of gloo's frees a tensor while
    Python shuts down, it aborts what was complete (pytorch/pytorch, 179291)."""
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    import train                                # by name, as lab/ does: there is one UserError
    train.leave(train.main())
