# SPDX-License-Identifier: MIT
"""--bench: every form computes the same, costs are those of one run, and nothing is left unsaid."""
import copy
import csv
import math
import os
import re
import sys
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import attention_adv
import mamba_adv
import s4_adv
import train
from lab import bench, floor, peers
from lab.test_house import findings
from test_all import ALPHA, EPS, HERE, KERNELS, MODELS, close, randn, scrambled, tiny_model

SMALL = ("--d-model 8 --d-state 4 --n-layers 1 --patch-size 14 --steps 2 --dataset synthetic "
         "--device cpu").split()
WORKS = ["attack step", "pgd-2 AT step"]


def bench_settings(*words):
    return bench.settings(["--bench", "1", *SMALL, *words])


def benches(out, *words):
    return train.main(["--bench", "1", *SMALL, *words, "--out", str(out)])


def rows(out):
    with open(out / "bench.csv") as file:
        return list(csv.DictReader(file))


# ---- The plain form ------------------------------------------------------------------------------

def trace(name):
    """Losses, images and weights of three replays of FreeAT with an attack after each."""
    torch.manual_seed(0)
    model, x, y = tiny_model(name), torch.rand(3, 1, 4, 4).double(), torch.tensor([1, 2, 3])
    optimizer, noise, seen = torch.optim.SGD(model.parameters(), lr=0.5), torch.zeros_like(x), []
    script = MODELS[name]
    for _ in range(3):
        optimizer.zero_grad()
        seen.append(train.free_backward(model, x, y, noise, EPS))
        optimizer.step()
        with script.frozen(model), torch.no_grad():
            seen += [script.pgd(model, x, y, EPS, ALPHA, 2), model(x), noise.clone()]
    return [*seen, *(w.detach() for w in model.parameters())]


def test_the_plain_form_trains_and_attacks_to_the_same_numbers(name):
    plain = bench.plainly()(trace)(name)
    for a, b in zip(trace(name), plain):
        close(a, b)


def test_the_plain_form_has_the_same_gradient(name):
    model, x, results = tiny_model(name), randn(3, 1, 4, 4).requires_grad_(), []
    for form in ("fast", "plain"):
        with bench.CONTEXTS.get(form, nullcontext)():
            y = model(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    for fast, plain in zip(*results):
        close(fast, plain)


def test_the_plain_form_uses_nothing_of_the_fast_one_and_leaves_all_as_it_was(name, monkeypatch):
    def refused(*args):
        raise AssertionError("this is the fast form")
    fast = [(owner, "frozen") for owner in (s4_adv, mamba_adv, attention_adv)]
    fast += [(s4_adv, "vandermonde"), (attention_adv, "vandermonde"), (s4_adv.Scan, "apply"),
             (mamba_adv, "selective_scan")]
    jobs = bench.bench_jobs(bench_settings("--model", name, "--forms", "plain"))
    for owner, function in fast:
        monkeypatch.setattr(owner, function, refused)
    with bench.plainly():
        for job in jobs.values():
            job()
    assert all(getattr(owner, function) is refused for owner, function in fast)


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_outlives_a_replay_of_free_at_and_a_stale_one_would_be_seen(name, monkeypatch):
    right, kept, script = trace(name), {}, MODELS[name]

    def stale(module, key, make):
        if not hasattr(module, "kept") or next(module.parameters()).requires_grad:
            return make()
        return kept.setdefault((module, key), make())
    monkeypatch.setattr(script, "once", stale)
    assert any(not torch.allclose(a, b) for a, b in zip(trace(name), right))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("form", ("fast", "plain"))
def test_a_work_makes_each_kernel_once_in_an_attack_and_plainly_at_each_step(
        name, form, monkeypatch):
    owner, method = KERNELS[name]
    original, calls = getattr(owner, method), []
    monkeypatch.setattr(owner, method, lambda *args: calls.append(1) or original(*args))
    jobs = bench.bench_jobs(bench_settings("--model", name, "--steps", "3", "--forms", form))
    for job, fast, plain in (("attack step", 1, 1), ("pgd-3 AT step", 2, 4)):
        calls.clear()
        with bench.CONTEXTS.get(form, nullcontext)():
            jobs[job]()
        assert len(calls) == (fast if form == "fast" else plain), job   # one layer


def test_without_triton_mamba_s_scan_is_made_of_pytorch_s_operations():
    before = mamba_adv.TritonScan
    with bench.CONTEXTS["no-triton"]():
        assert mamba_adv.TritonScan is None
    assert mamba_adv.TritonScan is before


# ---- Peers ---------------------------------------------------------------------------------------

MODULES = {"s5": "s5", "mamba": "mambapy.mamba",
           "attention": "transformers.models.deprecated.mega.modeling_mega"}


def needs_peer(name):
    package, _ = peers.PEERS[name]
    return pytest.importorskip(MODULES[name], reason=f"{package} is not installed")


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_with_our_weights_has_our_logits_and_gradient(name, monkeypatch):
    module = needs_peer(name)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)     # they cut some numbers
    if name == "s5":
        monkeypatch.setattr(module.s5_model, "as_complex", torch.view_as_complex)
    c = bench_settings("--model", name, "--n-layers", "2", "--patch-size", "4", "--forms", "fast")
    model = scrambled(train.build(c))
    twin = peers.put_peers(c, copy.deepcopy(model))
    x = torch.rand(2, *c.shape, dtype=torch.float64).requires_grad_()
    for a, b in zip(*((y, *torch.autograd.grad(y.square().sum(), x))
                      for y in (model(x), twin(x)))):
        close(a, b, 1e-12)


def weight_gradients(layer, u):
    """The gradients of the sum of squares of a layer's output on u, by name."""
    for w in layer.parameters():
        w.requires_grad_()
    layer(u).square().sum().backward()
    return {name: w.grad for name, w in layer.named_parameters()}


def test_mambapy_s_weights_have_the_gradients_of_ours(monkeypatch):
    needs_peer("mamba")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)     # mambapy cuts A and D
    c = bench_settings("--model", "mamba", "--forms", "fast")
    layer = scrambled(train.build(c)).blocks[0]
    twin = peers.mamba_peer(c, layer)
    u = torch.randn(2, 30, c.d_model, dtype=torch.float64)
    ours, theirs = weight_gradients(layer, u), weight_gradients(twin, u)
    assert len(ours) == len(theirs)
    for a, b in zip(ours.values(), theirs.values()):                    # in the same order
        close(a, b, 1e-12)


def test_s5_pytorch_s_weights_have_the_gradients_of_ours(monkeypatch):
    module = needs_peer("s5")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(module.s5_model, "as_complex", torch.view_as_complex)
    c = bench_settings("--model", "s5", "--forms", "fast")
    block = scrambled(train.build(c)).blocks[0]
    layer = block.ssm
    twin = peers.s5_peer(c, block).ssm
    u = torch.randn(2, 30, c.d_model, dtype=torch.float64)
    ours, theirs = weight_gradients(layer, u), weight_gradients(twin, u)
    close(ours["B"], theirs["seq.B"], 1e-12)
    close(ours["C"], torch.view_as_real(theirs["seq.C"]), 1e-12)
    close(ours["D"], theirs["seq.D"], 1e-12)
    close(ours["log_dt"], theirs["seq.log_step"], 1e-12)
    # Lambda = -exp(log_minus_real) + i imag
    close(ours["log_minus_real"], -layer.log_minus_real.exp() * theirs["seq.Lambda"].real, 1e-12)
    close(ours["imag"], theirs["seq.Lambda"].imag, 1e-12)
    assert len(ours) == 6


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_as_it_comes_has_our_logits(name):
    needs_peer(name)
    assert peers.has_peer(bench_settings("--model", name, "--forms", "fast"))


def replace_peer(monkeypatch, name, peer):
    """Puts a function (c, block) -> block in the place of the one that calls the package."""
    package, _ = peers.PEERS[name]
    monkeypatch.setitem(peers.PEERS, name, (package, peer))


@pytest.mark.parametrize("name", peers.PEERS)
def test_bench_times_a_peer_s_layers_in_the_place_of_ours_where_one_is_installed(
        name, tmp_path, monkeypatch):
    made = []

    def twin(c, block):
        made.append(copy.deepcopy(block))
        return made[-1]
    replace_peer(monkeypatch, name, twin)
    monkeypatch.setattr(bench, "sample_apart", bench.sample)
    assert benches(tmp_path, "--model", name) == 0
    assert [row["form"] for row in rows(tmp_path)] == ["fast", "bf16", "plain", "peer"] * 2
    assert len(made) == 1 + 2                                           # to compare; for each work
    assert sum(w.grad.abs().sum() for w in made[-1].parameters()) > 0


@pytest.mark.parametrize("words", (["--ads"], ["--control", "mlp"]))
def test_no_peer_has_ads_or_what_stands_in_its_place(words, monkeypatch):
    replace_peer(monkeypatch, "mamba", lambda c, block: block)
    assert "peer" not in bench_settings("--model", "mamba", *words).forms


@pytest.mark.parametrize("name", peers.PEERS)
def test_without_the_peer_bench_says_what_to_install(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    assert "peer" not in bench_settings("--model", name).forms
    package, _ = peers.PEERS[name]
    assert f"No peer is timed: {package} is not installed here" in capsys.readouterr().out


@pytest.mark.parametrize("factor", (0.5, 1 + 1e-3))
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_computes_something_else_is_not_timed(
        name, factor, tmp_path, monkeypatch, capsys):
    def other(c, block):
        with torch.no_grad():
            for w in block.parameters():
                w *= factor
        return block
    replace_peer(monkeypatch, name, other)
    assert "peer" not in bench_settings("--model", name).forms
    said = capsys.readouterr().out
    assert said.startswith("No peer is timed: with the same weights ") and said.count("\n") == 1
    assert benches(tmp_path, "--model", name, "--forms", "peer") == 2
    assert "--forms peer: choose from" in capsys.readouterr().err


# ---- What a work costs ---------------------------------------------------------------------------

@pytest.mark.parametrize("changes", ({"precision": "bf16"}, {"device": "cuda:0"}), ids=str)
def test_bf16_and_a_gpu_have_no_floor(changes):
    c = bench.changed(bench_settings("--forms", "fast"), **changes)
    assert math.isnan(bench.least(c, 4, "attack step", "fast", {}))


def test_no_file_sets_the_allocator_and_the_log_says_which_one_all_forms_have(
        tmp_path, monkeypatch, capsys):
    for path in [*HERE.glob("*.py"), *(HERE / "lab").glob("*.py")]:
        assert "mallopt" + "(" not in path.read_text(), path.name
    for known in [*os.environ]:
        if known.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")):
            monkeypatch.delenv(known)
    monkeypatch.setattr(bench, "timings", lambda c, L, rate: iter(()))
    monkeypatch.setattr(train, "write_csv", lambda path, rows: None)
    assert benches(tmp_path, "--forms", "fast,plain") == 0
    head, _ = capsys.readouterr().out.split("\n", 1)
    assert head.endswith("; all forms with the C library's default allocator")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "-1")
    assert benches(tmp_path, "--forms", "fast,plain") == 0
    head, _ = capsys.readouterr().out.split("\n", 1)
    assert head.endswith("; all forms with allocator of MALLOC_TRIM_THRESHOLD_")


def test_each_form_is_measured_with_what_it_says(monkeypatch):
    c, seen = bench_settings("--ads"), []

    def jobs(c, form):
        return {"work": lambda: seen.append((form, c.precision, c.ads,
                                             s4_adv.frozen is nullcontext))}
    monkeypatch.setattr(bench, "bench_jobs", jobs)
    for form in bench.FORMS:
        bench.sample(c, "work", form)
    assert seen[::2] == seen[1::2] == [
        ("fast", "fp32", "relu", False), ("bf16", "bf16", "relu", False),
        ("no-ads", "fp32", None, False), ("no-triton", "fp32", "relu", False),
        ("plain", "fp32", "relu", True), ("peer", "fp32", "relu", False)]
    assert (c.precision, c.ads) == ("fp32", "relu")


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_training_s_products_have_the_bits_of_the_form(precision):
    c, seen = bench_settings("--precision", precision), []
    jobs = bench.bench_jobs(c)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out.dtype) if type(module) is nn.Linear else None)
    try:
        for job, run in jobs.items():
            seen.clear()
            run()
            assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}, job
    finally:
        hook.remove()


def test_a_training_step_has_one_step_of_the_optimiser(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: steps.append(1))
    for job, run in bench.bench_jobs(bench_settings()).items():
        steps.clear()
        run()
        assert len(steps) == (job == "pgd-2 AT step"), job


def test_a_work_repeated_meets_the_same_weights_and_attacks_every_image(monkeypatch):
    c, attacked, real = bench_settings(), [], MODELS["s4"].pgd
    monkeypatch.setattr(MODELS["s4"], "pgd", lambda model, x, *rest: attacked.append(
        (len(x), [w.detach().clone() for w in model.parameters()])) or real(model, x, *rest))
    jobs = bench.bench_jobs(c)
    for job in WORKS * 2:
        jobs[job]()
    assert [n for n, _ in attacked] == [16] * 4
    for _, weights in attacked:
        assert all(torch.equal(a, b) for a, b in zip(weights, attacked[0][1]))


def test_peak_memory_is_that_of_one_job_in_a_process_of_its_own():
    c = bench_settings("--model", "mamba", "--forms", "plain", "--batch-size", "4", "--patch-size",
                       "1", "--d-model", "32", "--d-state", "32")
    c = bench.changed(c, shape=(1, 1, 256))
    fast, plain = (bench.sample_apart(c, "attack step", form)["peak_mb"]
                   for form in ("fast", "plain"))
    states = 4 * 256 * 64 * 32 * 4 / 2 ** 20                            # MB; autograd keeps some
    assert plain > 2 * states and plain > fast + states and fast > 0 or math.isnan(fast)


def test_a_form_that_memory_does_not_suffice_for_is_named_and_a_bug_is_no_lack_of_it(monkeypatch):
    def fails_by(error):
        def fails(c, work, form):
            raise error
        monkeypatch.setattr(bench, "sample", fails)
        return bench.sample_apart(SimpleNamespace(device="cpu"), "attack step", "plain")
    monkeypatch.setattr(bench, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(bench, "get_context", lambda kind: None)
    with pytest.raises(train.UserError, match="memory does not suffice for plain; give a smaller"):
        fails_by(BrokenExecutor("terminated"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fails_by(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# ---- The table -----------------------------------------------------------------------------------

def test_bench_times_every_work_in_every_form_at_every_length_into_a_table_and_a_csv(
        tmp_path, monkeypatch, capsys):
    def sample(c, work, form):
        return bench.sample(c, work, form) | {"peak_mb": 2.0}
    monkeypatch.setattr(bench, "sample_apart", sample)
    assert benches(tmp_path, "--bench", "2", "--lengths", "3,8", "--ads") == 0
    found = rows(tmp_path)
    assert [(r["L"], r["work"], r["form"]) for r in found] == [
        (L, work, form) for L in "38" for work in WORKS
        for form in ("fast", "bf16", "no-ads", "plain")]
    for r in found:
        assert (r["model"], r["ads"], r["batch"]) == ("s4", "relu", "16")
        assert float(r["peak_mb"]) == 2
        assert math.isnan(float(r["floor_share"])) == (r["form"] == "bf16")
        close(float(r["images_per_second"]) * float(r["seconds"]), 16.0)
        close(float(r["us_per_token"]) * 16 * int(r["L"]), 1e6 * float(r["seconds"]), 1e-6)
        assert r["form"] != "fast" or float(r["times_fast"]) == 1
    text = capsys.readouterr().out
    assert text.count("\n") == 4 + 2 + len(found)
    assert text.startswith("s4 + AdS relu, d_model 8, 1 layers, batch 16, fp32,")


def test_a_row_is_the_median_of_its_runs_and_their_spread_and_compares_cpu_seconds(monkeypatch):
    costs = {"fast": iter([1.0, 4.0, 2.0]), "plain": iter([6.0, 6.0, 6.0])}
    monkeypatch.setattr(bench, "sample_apart", lambda c, work, form: {
        "seconds": 8.0, "cpu_seconds": next(costs[form]), "peak_mb": 1.0})
    monkeypatch.setattr(bench, "passes", lambda c: {"attack step": (1, 0)})
    monkeypatch.setattr(floor, "seconds", lambda *args: 0.0625)         # of one image
    c = bench_settings("--forms", "fast,plain", "--bench", "3")
    fast, plain = bench.timings(c, 4, {})
    assert (fast["cpu_seconds"], fast["spread"], fast["times_fast"]) == (2.0, 1.5, 1.0)
    assert (plain["seconds"], plain["spread"], plain["times_fast"]) == (8.0, 0.0, 3.0)
    assert (fast["floor_share"], plain["floor_share"]) == (16 * 0.0625 / 2, 16 * 0.0625 / 6)
    assert plain["images_per_second"] == 2 and plain["us_per_token"] == 8e6 / 16 / 4


def test_the_floor_is_that_of_the_form_s_settings_and_of_the_work(monkeypatch):
    seen = []

    def seconds(model, L, g, w, rate):
        seen.append((model.blocks[0].middle.__class__.__name__, L, g, w, rate))
        return 0.0
    monkeypatch.setattr(floor, "seconds", seconds)
    c = bench_settings("--ads", "--forms", "fast")
    for form in ("fast", "no-ads", "plain"):
        bench.least(c, 4, "pgd-2 AT step", form, "rate")
    bench.least(c, 4, "attack step", "fast", "rate")
    assert seen == [("AdaptiveScaling", 4, 3, 1, "rate"), ("Identity", 4, 3, 1, "rate"),
                    ("AdaptiveScaling", 4, 3, 1, "rate"), ("AdaptiveScaling", 4, 1, 0, "rate")]


def test_bench_on_a_gpu_stays_in_one_process_and_compares_seconds(monkeypatch):
    def refused(*args):
        raise AssertionError("a new process")
    for function, fake in {"passes": lambda c: {"attack step": (1, 0)}, "get_context": refused,
                           "sample": lambda c, work, form: {
                               "seconds": 0.5 if form == "fast" else 1.0, "cpu_seconds": 0.25,
                               "peak_mb": 1.0}}.items():
        monkeypatch.setattr(bench, function, fake)
    c = bench.changed(bench_settings("--forms", "fast,plain"), device="cuda:0", clock="seconds")
    assert [row["times_fast"] for row in bench.timings(c, 4, {})] == [1.0, 2.0]


def test_on_a_gpu_mamba_is_timed_without_triton_too(monkeypatch):
    monkeypatch.setattr(mamba_adv, "TritonScan", nn.Module)
    monkeypatch.setattr(bench, "has_peer", lambda c: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    c = bench.changed(bench_settings("--model", "mamba", "--forms", "fast"), device="cuda:0",
                      forms=None)
    assert bench.forms_here(c) == ["fast", "bf16", "no-triton", "plain"]
    assert "no-triton" not in bench.forms_here(bench.changed(c, model="s4"))
    assert "no-triton" not in bench.forms_here(bench.changed(c, device="cpu"))


def test_on_a_cpu_a_run_has_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    # The new process has passes of its own.
    monkeypatch.setattr(bench, "passes", lambda c: {"attack step": (1, 0)})
    assert benches(tmp_path, "--forms", "fast") == 0
    row, = rows(tmp_path)
    assert row["work"] == "attack step" and float(row["cpu_seconds"]) > 0
    assert "each the second one of a new process" in capsys.readouterr().out


# ---- The command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("there, batch", [(False, 16), (True, 256)])
def test_bench_needs_no_device_and_takes_16_images_on_a_cpu(there, batch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: there)
    monkeypatch.setattr(train, "check", lambda c: None)
    assert bench.settings(["--bench", "--out", "x"]).batch_size == batch
    assert bench.settings(["--bench", "--batch-size", "5"]).batch_size == 5


def test_bench_runs_3_times_at_the_length_of_the_data_set_in_a_folder_of_its_own_name():
    words = "--bench --ads --device cpu --n-layers 2".split()
    c = bench.settings(words)
    assert (c.bench, c.lengths, c.forms) == (3, [1024], ["fast", "bf16", "no-ads", "plain"])
    assert c.out == "runs/bench-cifar10-s4-ads_relu-pgd-seed0-2x128-batch16"
    assert bench.settings([*words, "--lengths", "64,256"]).out == c.out + "-L-64-256"


BAD = {
    "--bench 0": "--bench 0: it must be at least 1",
    "--bench x": "argument --bench: invalid int value: 'x'",
    "--bench --lengths 64,x": "64,x is no list of whole numbers below 10^6; write it",
    "--bench --lengths 2000000000": "2000000000 is no list of whole numbers below 10^6; write it",
    "--bench --lengths 0": "--lengths [0]: each must be at least 1",
    "--bench --micro-batch 2": "unrecognized arguments: --micro-batch",
    "--bench --resume": "unrecognized arguments: --resume",
    "--bench --device meta": "--device meta: there is no such device here",
    "--bench --d-state 3": "--d-state 3: s4 stores conjugate pairs; give an even number",
    "--bench --forms no-ads": "--forms no-ads: choose from fast (as the scripts have it), bf16",
    "--bench --forms no-triton": "--forms no-triton: choose from",
    "--bench --forms fast,peer": "--forms peer: choose from",
    "--bench --forms slow": "--forms slow: choose from",
    "--bench --forms bf16 --precision bf16": "--forms bf16: choose from",
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_timed_is_refused_before_anything_is_written(
        words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and BAD[words] in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device, world", [("mps", 1), ("cpu", 2)])
def test_another_kind_of_device_and_several_processes_are_refused(device, world, monkeypatch):
    monkeypatch.setattr(train, "check", lambda c: None)
    monkeypatch.setattr(train, "world", lambda: world)
    with pytest.raises(train.UserError, match="--bench 3: it runs on cpu or cuda, in one process"):
        bench.settings(["--bench", "--device", device])


# ---- What the findings say of speed --------------------------------------------------------------

def test_the_speeds_in_the_findings_are_those_of_the_logs():
    step = r"pgd-10 AT step +(\S+) +\S+ +(\S+) +\S+ +\S+ +\S+ +(\d+) +(\S+)%"
    rows = re.findall(r"^(\| \S.*\(bench/([\w-]+)\.txt\) \|)$", findings(), re.M)
    assert len(rows) == 6
    for row, name in rows:
        log = (HERE / "results" / "bench" / f"{name}.txt").read_text()
        cpu, mb, share = {}, {}, {}
        for form, seconds, peak, of_floor in re.findall(step, log):
            cpu[form], mb[form], share[form] = float(seconds), peak, of_floor
        _, batch, here, of_floor, bf16, plain, other, peak, _ = row.strip("|").split("|")
        assert f"batch {batch.strip()}," in log and "C library's default allocator" in log
        assert f"**{cpu['fast']:.1f} s**" in here and of_floor == f" {share['fast']} % "
        assert bf16.strip().startswith(f"{cpu['bf16']:.1f} s")
        assert plain.strip() == f"{cpu['plain']:.1f} s, {cpu['plain'] / cpu['fast']:.1f}x"
        peaks = [mb[form] for form in ("fast", "plain", "peer") if form in mb]
        assert peak.strip() == " / ".join(peaks) + " MB"
        if "no-ads" in cpu:
            assert f"{cpu['fast'] / cpu['no-ads']:.2f}x S4" in here
            assert f"{cpu['bf16'] / cpu['no-ads']:.2f}x S4" in bf16
        assert ("peer" in cpu) == bool(other.strip())
        if "peer" in cpu:
            assert f" {cpu['peer']:.1f} s, {cpu['peer'] / cpu['fast']:.2f}x" in other


def test_the_lengths_in_the_findings_are_those_of_the_logs():
    rows = re.findall(r"^\| \[\w+\]\((bench/lengths-\w+\.txt)\) \| (.*) \|$", findings(), re.M)
    assert len(rows) == 4
    step = r"^ *(\d+) +pgd-10 AT step +fast +\S+ +(\S+) +\S+ +\S+ +\S+ +(\d+) "
    for file, cells in rows:
        runs = re.findall(step, (HERE / "results" / file).read_text(), re.M)
        assert cells.split(" | ") == [f"{1e6 * float(cpu) / 2 / int(L):.0f}, {mb}"
                                      for L, cpu, mb in runs], file
