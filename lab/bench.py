# SPDX-License-Identifier: MIT
"""--bench: what a training step costs, beside a peer and beside its floor by operations.

    OMP_NUM_THREADS=1 python train.py --bench --model mamba --batch-size 2

A table, and bench.csv in --out. Each work runs on one batch of random images of L tokens, in each
of FORMS. Runs are interleaved, and each is the second one of its process. On a CPU the process is
new, since the peak of its memory never falls. No form changes how memory is allocated.
"""
import math
import os
import statistics
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

import attention_adv
import mamba_adv
import s4_adv
import train
from lab import floor
from lab.evaluate import counts
from lab.peers import has_peer, put_peers

# How a work is done; all forms but bf16 and no-ads compute the same numbers.
FORMS = {"fast": "as the scripts have it",
         "bf16": "training's products in bfloat16, beside --precision fp32",
         "no-ads": "the same without --ads",
         "no-triton": "Mamba's scan on a GPU by PyTorch's own operations",
         "plain": "as one would first write it",
         "peer": "with layers of s5-pytorch, mambapy, transformers, if installed; without --ads"}


def changed(c, **changes):
    """The settings c, some of them changed."""
    return SimpleNamespace(**vars(c) | changes)


def on_gpu(c):
    return c.device.startswith("cuda")


# ---- The plain form, and what the others change --------------------------------------------------

def plain_vandermonde(c, log_lam, L):
    """vandermonde of s4_adv and attention_adv: an exponential for each state and token."""
    powers = torch.exp(log_lam[..., None] * torch.arange(L, device=c.device))       # (H, N, L)
    return (c[..., None] * powers).sum(1)                                   # (H, L)


def plain_scan(a, b):
    """s4_adv.Scan: a loop, left to autograd."""
    hs = [b[:, 0]]                                                          # (B, P)
    for b_t in b.unbind(1)[1:]:
        hs.append(a * hs[-1] + b_t)
    return torch.stack(hs, 1)                                               # (B, L, P)


@contextmanager
def plainly():
    """Within it work is done as one would first write it down: weights are not frozen in an attack,
    so each kernel is made at each step; a kernel is the sum that defines it; a scan is a loop.
    """
    loop = mamba_adv.selective_scan_loop
    with (patch.multiple(s4_adv, frozen=nullcontext, vandermonde=plain_vandermonde),
          patch.object(s4_adv.Scan, "apply", plain_scan),
          patch.multiple(mamba_adv, frozen=nullcontext, selective_scan=loop),
          patch.multiple(attention_adv, frozen=nullcontext, vandermonde=plain_vandermonde)):
        yield


# The context that a form runs in, and the settings that it changes, if any.
CONTEXTS = {"no-triton": partial(patch.object, mamba_adv, "TritonScan", None), "plain": plainly}
CHANGES = {"bf16": {"precision": "bf16"}, "no-ads": {"ads": None}}


def forms_here(c):
    """The forms that can be timed, of those that --forms names.  UserError if one cannot."""
    wanted = c.forms or list(FORMS)
    here = {"fast": True,
            "bf16": c.precision == "fp32" and (not on_gpu(c) or torch.cuda.is_bf16_supported()),
            "no-ads": c.ads,
            "no-triton": on_gpu(c) and c.model == "mamba" and mamba_adv.TritonScan,
            "plain": True,
            "peer": "peer" in wanted and has_peer(c)}
    for form in c.forms or ():
        if not here.get(form):
            raise train.UserError(f"--forms {form}: choose from "
                                  + ", ".join(f"{name} ({FORMS[name]})" for name in FORMS))
    return [form for form in FORMS if form in wanted and here[form]]


# ---- What a work costs ---------------------------------------------------------------------------

def passes(c):
    """{work: its passes to the logits and back to the image, its gradients by the weights}."""
    return {"attack step": (1, 0), f"pgd-{c.steps} AT step": (c.steps + 1, 1)}


def bench_jobs(c, form="fast"):
    """{work: function}: each kind of work on one batch of random images.

    The learning rate is 0, so that every repetition meets the same weights.
    """
    script = train.SCRIPTS[c.model]
    model = train.build(c)
    x = torch.rand(c.batch_size, *c.shape).to(c.device)
    y = torch.randint(c.classes, (c.batch_size,)).to(c.device)
    if form == "peer":
        put_peers(c, model)
    optimizer = torch.optim.AdamW(script.param_groups(model, c.weight_decay), lr=0.0)
    precision = torch.autocast(x.device.type, torch.bfloat16, enabled=c.precision == "bf16")

    def attack():
        with precision:
            script.pgd(model, x, y, c.eps, c.alpha, 1)

    def step():
        optimizer.zero_grad()
        with precision:
            script.pgd_at_loss(model, x, y, c.eps, c.alpha, c.steps).backward()
        optimizer.step()
    return dict(zip(passes(c), (attack, step), strict=True))


def clocks(c):
    """{"seconds", "cpu_seconds" of all threads} until now; a GPU has then done its work."""
    if on_gpu(c):
        torch.cuda.synchronize(c.device)
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def growth(c, job):
    """MB by which job() raises the memory of this process, or of its GPU, at most.

    nan where there is no /proc. (getrusage's peak would do, but begins with the parent's.)
    """
    def memory(field):
        status = Path("/proc/self/status").read_text()
        return int(status.split(field + ":")[1].split()[0]) / 2 ** 10
    if on_gpu(c):
        torch.cuda.reset_peak_memory_stats(c.device)
        before = torch.cuda.memory_allocated(c.device)
        job()
        return (torch.cuda.max_memory_allocated(c.device) - before) / 2 ** 20
    try:
        Path("/proc/self/clear_refs").write_text("5")                   # the peak := memory now
    except OSError:
        job()
        return math.nan
    before = memory("VmRSS")
    job()
    return memory("VmHWM") - before


def sample(c, work, form):
    """What a work takes of both clocks in a form, and "peak_mb", from another run before it."""
    c = changed(c, **CHANGES.get(form, {}))
    job = bench_jobs(c, form)[work]
    with CONTEXTS.get(form, nullcontext)():
        peak = growth(c, job)
        before = clocks(c)
        job()
        after = clocks(c)
    return {kind: after[kind] - before[kind] for kind in after} | {"peak_mb": peak}


def sample_apart(c, work, form):
    """sample(...), on a CPU in a new process.  UserError if the system has killed that."""
    if on_gpu(c):
        return sample(c, work, form)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(sample, c, work, form).result()
    except BrokenExecutor:
        raise train.UserError(f"memory does not suffice for {form}; give a smaller --batch-size, "
                              "or --forms without it") from None


def least(c, L, work, form, rate):
    """Seconds that a work's operations take at these rates of a CPU in float32; nan elsewhere."""
    c = changed(c, **CHANGES.get(form, {}))
    if c.precision == "bf16" or on_gpu(c):
        return math.nan
    return c.batch_size * floor.seconds(train.build(c), L, *passes(c)[work], rate)


def timings(c, L, rate):
    """Rows of the table: a dict for each kind of work and form, on images of L tokens."""
    c = changed(c, shape=(c.shape[0], c.patch_size, c.patch_size * L))      # a row of L patches
    samples = {(work, form): [] for work in passes(c) for form in c.forms}
    for _ in range(c.bench):                                            # interleaved
        for key, costs in samples.items():
            costs.append(sample_apart(c, *key))
    medians = {}
    for (work, form), costs in samples.items():
        median = {kind: statistics.median(cost[kind] for cost in costs) for kind in costs[0]}
        times = [cost[c.clock] for cost in costs]
        medians[work, form] = median[c.clock]
        yield {"L": L, "work": work, "form": form, **median,
               "spread": (max(times) - min(times)) / median[c.clock],
               "images_per_second": c.batch_size / median["seconds"],
               "us_per_token": 1e6 * median["seconds"] / c.batch_size / L,
               "floor_share": least(c, L, work, form, rate) / median[c.clock],
               "times_fast": median[c.clock] / medians.get((work, "fast"), math.nan)}


# ---- Command line --------------------------------------------------------------------------------

def settings(words):
    """The settings c of a command line.  UserError for what cannot be timed."""
    p = train.Parser("What a training step costs, beside a peer and a floor: a table, and "
                     "bench.csv in --out. On a CPU --batch-size is 16 unless given.")
    train.add_flags(p, "model ads control dataset d_model d_state d_hidden n_layers patch_size "
                    "batch_size eps alpha steps precision seed device")
    p.add_argument("--bench", nargs="?", type=int, const=3, metavar="N",
                   help="interleaved runs of each work in each form (default: 3)")
    p.add_argument("--lengths", type=counts, metavar="L,L",
                   help="tokens of an image (default: that of the data set)")
    p.add_argument("--forms", type=train.comma_list, metavar="F,F",
                   help="; ".join(f"{form}: {meaning}" for form, meaning in FORMS.items())
                   + " (default: all that there are)")
    p.add_argument("--out", metavar="DIR", help="folder of bench.csv (default: runs/bench-NAME)")
    given = p.given(words)
    c = train.settings(given, train.add_flags(train.Parser("")) | {"lengths": None, "forms": None})
    c.clock = "seconds" if on_gpu(c) else "cpu_seconds"     # another program may run beside
    if not on_gpu(c):
        c.batch_size = given.get("batch_size", 16)
    train.check(c)
    if not 1 <= c.bench < 2 ** 31:
        raise train.UserError(f"--bench {c.bench}: it must be at least 1, below 2^31")
    if 0 in (c.lengths or ()):
        raise train.UserError(f"--lengths {c.lengths}: each must be at least 1")
    if torch.device(c.device).type not in ("cpu", "cuda") or train.world() > 1:
        raise train.UserError(f"--bench {c.bench}: it runs on cpu or cuda, in one process; leave "
                              "out torchrun and another --device")
    run = train.folder_of(c).replace("runs/", "runs/bench-")
    lengths = "".join(f"-{part}" for part in ("L", *c.lengths)) if c.lengths else ""
    c.out = c.out or f"{run}-{c.n_layers}x{c.d_model}-batch{c.batch_size}{lengths}"
    c.lengths = c.lengths or [c.shape[1] * c.shape[2] // c.patch_size ** 2]
    c.forms = forms_here(c)
    return c


def allocator():
    """What gives memory to all forms alike, in words: their processes inherit the environment."""
    names = sorted(name for name in os.environ
                   if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")))
    return f"allocator of {', '.join(names)}" if names else "the C library's default allocator"


def main(words):
    """--bench: the table, and bench.csv."""
    c = settings(words)
    rows = []
    with train.lock(Path(c.out)):
        machine = train.machine(c)
        process = "" if on_gpu(c) else " of a new process"
        train.say(
            f"{train.name_of(c)}, d_model {c.d_model}, {c.n_layers} layers, batch {c.batch_size}, "
            f"{c.precision}, {machine['device']}, {machine['threads']} threads, torch "
            f"{machine['torch']}, {machine['date']}; all forms with {allocator()}\n"
            f"Medians of {c.bench} interleaved runs, each the second one{process}. Spread (max - "
            f"min), floor and times fast: of {c.clock.replace('cpu_', 'CPU ')}.\n"
            "Peak MB: growth of memory. Floor: share of the time that its products, FFTs and scan "
            "take at this machine's rates.\n"
            "    L  work             form      seconds    CPU s  spread  images/s  us/token   "
            "peak MB   floor  times fast")
        line = ("{L:5d}  {work:16} {form:9} {seconds:8.3f} {cpu_seconds:8.3f} {spread:7.0%} "
                "{images_per_second:9.1f} {us_per_token:9.2f} {peak_mb:9.0f} {floor_share:7.0%} "
                "{times_fast:11.2f}")
        for L in c.lengths:
            rate = floor.rates(L)
            train.say(f"{L:5d}  in a second at most " + ", ".join(
                f"{n:.2g} {kind}" for kind, n in rate.items()))
            for row in timings(c, L, rate):
                train.say(line.format(**row).replace("   nan%", "      -"))
                rows.append({"model": c.model, "ads": c.ads, "batch": c.batch_size, **row})
        train.write_csv(Path(c.out) / "bench.csv", rows)
