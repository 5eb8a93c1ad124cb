# SPDX-License-Identifier: MIT
"""--bench: what a training step costs, and what it consists of; a table, and bench.csv in --out.

    python train.py --bench --model mamba --batch-size 4 --lengths 256,1024
    OMP_NUM_THREADS=1 python train.py --bench 2 --model s4 --ads --batch-size 16

Each kind of work runs on one batch of random images of L tokens, in each of FORMS. Runs are
interleaved, and each is the second one of its process. On a CPU the process is new, since the peak
of its memory never falls. All forms have the C library's default allocator.
"""
import math
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
from torch import nn

import attention_adv
import mamba_adv
import s4_adv
import train

# How a work is done; all forms but bf16 and no-ads compute the same numbers.
FORMS = {"fast": "as the scripts have it",
         "bf16": "training's products in bfloat16, beside --precision fp32",
         "no-ads": "the same without --ads",
         "no-triton": "Mamba's scan on a GPU by PyTorch's own operations",
         "plain": "as one would first write it",
         "peer": "with layers of s5-pytorch (s5), of mambapy (mamba), if installed; without --ads"}


def changed(c, **changes):
    """The settings c, some of them changed."""
    return SimpleNamespace(**vars(c) | changes)


def at_length(c, L):
    """The settings c for images of L tokens: a row of L patches."""
    return changed(c, shape=(c.shape[0], c.patch_size, c.patch_size * L))


def on_gpu(c):
    return c.device.startswith("cuda")


# --------------------------------------------------------------------------------------------------
# Forms: plain, and with a peer's layers
# --------------------------------------------------------------------------------------------------

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
    """Within it work is done as one would first write it down.

    Weights are not frozen in an attack, so each kernel is made at each step. A kernel is the sum
    that defines it, and a scan is a loop whose states autograd stores.
    """
    loop = mamba_adv.selective_scan_loop
    with (patch.multiple(s4_adv, frozen=nullcontext, vandermonde=plain_vandermonde),
          patch.object(s4_adv.Scan, "apply", plain_scan),
          patch.multiple(mamba_adv, frozen=nullcontext, selective_scan=loop),
          patch.multiple(attention_adv, frozen=nullcontext, vandermonde=plain_vandermonde),
          patch.object(train, "frozen", nullcontext)):
        yield


# Packages whose layers compute what ours do; s5-pytorch 0.2.1 and mambapy 1.2.0 were tested.
PEERS = {"s5": "s5-pytorch", "mamba": "mambapy"}


def s5_peer(c, layer):
    """s5-pytorch's layer with the weights of an s4_adv.S5."""
    from s5 import S5
    peer = S5(c.d_model, c.d_state)
    weights = {"Lambda": torch.complex(-torch.exp(layer.log_minus_real), layer.imag),
               "B": layer.B, "C": torch.view_as_complex(layer.C), "D": layer.D,
               "log_step": layer.log_dt}
    for name, value in weights.items():
        setattr(peer.seq, name, nn.Parameter(value.detach().clone()))
    return peer


def mamba_peer(c, layer):
    """mambapy's layer with the weights of a mamba_adv.Mamba."""
    from mambapy.mamba import MambaBlock, MambaConfig
    peer = MambaBlock(MambaConfig(d_model=c.d_model, n_layers=1, d_state=c.d_state)).to(layer.D)
    # Both list their weights in the same order, under other names.
    peer.load_state_dict(dict(zip(peer.state_dict(), layer.state_dict().values())))
    return peer


def put_peers(c, model):
    """The model, each of its sequence maps replaced by the peer's with the same weights."""
    for k, block in enumerate(model.blocks):
        if c.model == "s5":
            block.ssm = s5_peer(c, block.ssm)
        else:
            model.blocks[k] = mamba_peer(c, block)
    return model.to(c.device)


def same_function(c):
    """Has a model the same logits with the peer's layers? On 2 images of 50 tokens, in float64.

    Both packages cut some of their weights to float32 even so: 1e-6 is allowed.
    """
    c = at_length(changed(c, device="cpu"), 50)
    model = train.build(c).double()
    x = torch.rand(2, *c.shape, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        found = put_peers(c, model)(x)
    return bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())


def has_peer(c):
    """Can a peer's layers be timed? Says why not where PEERS has them."""
    if c.model not in PEERS or c.ads or c.control:
        return False
    try:
        same = same_function(c)
    except ImportError as e:
        train.say(f"No peer is timed: {PEERS[c.model]} is not installed here ({e})")
        return False
    if not same:
        train.say(f"No peer is timed: the {PEERS[c.model]} installed here computes other logits "
                  "from the same weights")
    return same


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


# --------------------------------------------------------------------------------------------------
# What a work costs
# --------------------------------------------------------------------------------------------------

def bench_jobs(c, form="fast"):
    """{name: function}: each kind of work on one batch of random images.

    Labels are the model's own answers, so that evaluation attacks every image. The learning rate
    is 0, so that every repetition meets the same weights.
    """
    script = train.SCRIPTS[c.model]
    model = train.build(c)
    if form == "peer":
        put_peers(c, model)
    optimizer = torch.optim.AdamW(script.param_groups(model, c.weight_decay), lr=0.0)
    draw = torch.Generator().manual_seed(train.seed_of(c.seed, "bench"))
    images = torch.randint(256, (c.batch_size, *c.shape), generator=draw, dtype=torch.uint8)
    images = images.to(c.device)
    x = images.to(next(model.parameters()).dtype) / 255
    with torch.no_grad():                       # one by one: the peak is not yet measured
        y = torch.cat([model(image).argmax(1) for image in x.split(1)])
    precision = torch.autocast(x.device.type, torch.bfloat16, enabled=c.precision == "bf16")

    def forward():
        with script.frozen(model), torch.no_grad(), precision:
            model(x)

    def attack():
        with precision:
            script.pgd(model, x, y, c.eps, c.alpha, 1)

    def step(method):
        optimizer.zero_grad()
        with precision:
            train.loss_backward(changed(c, method=method), model, x, y, c.eps, c.alpha)
        optimizer.step()

    def evaluation():
        train.evaluate(model, images, y, ("clean", "pgd-10"), c, "bench")

    return {"forward": forward, "attack step": attack,
            f"pgd-{c.steps} AT step": partial(step, "pgd"),
            f"TRADES-{c.steps} step": partial(step, "trades"), "evaluation": evaluation}


def stopwatch(c, job):
    """{"seconds", "cpu_seconds" of all threads} that job() takes, and its result."""
    def clocks():
        if on_gpu(c):
            torch.cuda.synchronize(c.device)
        return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
    before = clocks()
    result = job()
    after = clocks()
    return {kind: after[kind] - before[kind] for kind in after}, result


def timed(c, job):
    """{"seconds", "cpu_seconds", "kernel_share"} of job(): the last is the share of the time that
    `once` takes to make kernels and their FFTs, in [0, 1]. Their gradient is not in it."""
    script = train.SCRIPTS[c.model]
    once = script.once
    made = []

    def watched(module, key, make):
        def measured():
            spent, result = stopwatch(c, make)
            made.append(spent[c.clock])
            return result
        return once(module, key, measured)
    with patch.object(script, "once", watched):
        spent, _ = stopwatch(c, job)
    share = sum(made) / spent[c.clock]
    if on_gpu(c):
        # Once more: the clock has waited for the GPU at each kernel.
        spent, _ = stopwatch(c, job)
    return spent | {"kernel_share": share}


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


def sample(c, name, form):
    """What timed tells of a work in a form, and "peak_mb", from another run before it."""
    c = changed(c, **CHANGES.get(form, {}))
    job = bench_jobs(c, form)[name]
    with CONTEXTS.get(form, nullcontext)():
        peak = growth(c, job)
        return {**timed(c, job), "peak_mb": peak}


def sample_apart(c, name, form):
    """sample(...), on a CPU in a new process; None if memory did not suffice."""
    try:
        if on_gpu(c):
            return sample(c, name, form)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(sample, c, name, form).result()
    except RuntimeError as e:                   # a BrokenExecutor: the system has killed it
        if isinstance(e, BrokenExecutor) or train.lacks_memory(e):
            return None
        raise


def timings(c, L):
    """Rows of the table: a dict for each kind of work and form, on images of L tokens."""
    c = at_length(c, L)
    samples = {(name, form): [] for name in bench_jobs(c) for form in c.forms
               if (name, form) != ("evaluation", "bf16")}               # it never runs in bf16
    for _ in range(c.bench):                                            # interleaved
        for key, costs in samples.items():
            if None not in costs:
                costs.append(sample_apart(c, *key))
    medians = {}
    for (name, form), costs in samples.items():
        if None in costs:
            train.say(f"{L:5d}  {name:16} {form:9}  did not fit into memory")
            continue
        median = {kind: statistics.median(cost[kind] for cost in costs) for kind in costs[0]}
        times = [cost[c.clock] for cost in costs]
        medians[name, form] = median[c.clock]
        yield {"L": L, "work": name, "form": form, **median,
               "spread": (max(times) - min(times)) / medians[name, form],
               "images_per_second": c.batch_size / median["seconds"],
               "us_per_token": 1e6 * median["seconds"] / c.batch_size / L,
               "times_fast": medians[name, form] / medians.get((name, "fast"), math.nan)}


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def settings(words):
    """The settings c of a command line.  UserError for what cannot be timed."""
    p = train.new_parser("What a training step costs, and what it consists of: a table, and "
                         "bench.csv in --out. On a CPU --batch-size is 16 unless given.")
    train.add_flags(p, "model ads control dataset d_model d_state d_hidden n_layers patch_size "
                    "batch_size micro_batch eps alpha steps beta precision seed device")
    p.add_argument("--bench", nargs="?", type=int, const=3, metavar="N",
                   help="interleaved runs of each work in each form (default: 3)")
    p.add_argument("--lengths", type=train.counts, metavar="L,L",
                   help="tokens of an image (default: that of the data set)")
    p.add_argument("--forms", type=train.comma_list, metavar="F,F",
                   help="; ".join(f"{form}: {meaning}" for form, meaning in FORMS.items())
                   + " (default: all that there are)")
    p.add_argument("--out", metavar="DIR", help="folder of bench.csv (default: runs/bench-NAME)")
    given = p.given(words)
    defaults = train.add_flags(train.new_parser("")) | {"bench": 3, "lengths": None, "forms": None}
    c = train.settings(given, defaults)
    c.clock = "seconds"                         # by what forms are compared
    if not on_gpu(c):
        c.clock = "cpu_seconds"                 # another program may run beside
        c.batch_size = given.get("batch_size", 16)
    train.check(c)
    if not 1 <= c.bench < 2 ** 31:
        raise train.UserError(f"--bench {c.bench}: it must be at least 1, below 2^31")
    if not all(1 <= L < 2 ** 31 for L in c.lengths or ()):
        raise train.UserError(f"--lengths {c.lengths}: each must be at least 1, below 2^31")
    if torch.device(c.device).type not in ("cpu", "cuda") or train.world() > 1:
        raise train.UserError(f"--bench {c.bench}: it runs on cpu or cuda, in one process; leave "
                              "out torchrun and another --device")
    lengths = "-".join(["L", *map(str, c.lengths)]) if c.lengths else None
    parts = ["bench", c.dataset, c.model, f"ads_{c.ads}" if c.ads else c.control, c.method,
             f"seed{c.seed}", f"{c.n_layers}x{c.d_model}-batch{c.batch_size}", lengths]
    c.out = c.out or "runs/" + "-".join(part for part in parts if part)
    c.lengths = c.lengths or [c.shape[1] * c.shape[2] // c.patch_size ** 2]
    c.forms = forms_here(c)
    return c


def main(words):
    """--bench: the table, and bench.csv. Returns the exit code."""
    c = settings(words)
    rows = []
    with train.lock(Path(c.out)):
        process = "" if on_gpu(c) else " of a new process"
        train.say(
            f"{train.name_of(c)}, d_model {c.d_model}, {c.n_layers} layers, batch {c.batch_size}, "
            f"micro-batch {c.micro_batch or 'all'}, {c.precision}, {train.machine(c)['device']}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
            f"Medians of {c.bench} interleaved runs, each the second one{process}. Spread (max - "
            f"min) and times fast: of {c.clock.replace('cpu_', 'CPU ')}.\n"
            "Peak MB: growth of memory. Kernel: its share of the time, without its gradient.\n"
            "    L  work             form      seconds    CPU s  spread  images/s  us/token   "
            "peak MB  kernel  times fast")
        line = ("{L:5d}  {work:16} {form:9} {seconds:8.3f} {cpu_seconds:8.3f} {spread:7.0%} "
                "{images_per_second:9.1f} {us_per_token:9.2f} {peak_mb:9.0f} {kernel_share:7.1%} "
                "{times_fast:11.2f}")
        for L in c.lengths:
            for row in timings(c, L):
                train.say(line.format(**row))
                rows.append({"model": c.model, "ads": c.ads, "batch": c.batch_size, **row})
        if not rows:
            raise train.UserError(f"--batch-size {c.batch_size}: nothing fits into memory; give "
                                  "fewer")
        train.write_csv(Path(c.out) / "bench.csv", rows)
    return 0
