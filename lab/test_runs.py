# SPDX-License-Identifier: MIT
"""Faults and the unusual: kills, signals, full disks, damaged files, many processes, bf16."""
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamba_adv
import train
from lab.tiny_imagenet import load as load_tiny_imagenet
from test_all import (ALPHA, DATA, EPS, HERE, MODELS, TINY, close, images, log, needs, settings,
                      tiny, tiny_model, trains, weights)


def tiny_settings(*words):
    return settings("--dataset", "synthetic", *TINY, *words)


# ---- Data ----------------------------------------------------------------------------------------

@needs("tiny-imagenet-200")
@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
def test_tiny_imagenet_is_decoded_shuffled_and_in_colour():
    x, y, x_test, y_test = load_tiny_imagenet(DATA / "tiny-imagenet-200", 2)
    assert x.shape == (1000, 3, 64, 64) and x_test.shape == (100, 3, 64, 64)
    assert x.dtype == torch.uint8 and torch.bincount(y).tolist() == [500, 500]
    assert torch.bincount(y_test).tolist() == [50, 50]
    assert 200 < int(y[:500].sum()) < 300                               # not class by class


def test_too_few_training_images_to_hold_some_out_are_refused(monkeypatch):
    few = torch.zeros(1000, 3, 64, 64, dtype=torch.uint8), torch.zeros(1000, dtype=torch.long)
    monkeypatch.setattr(train, "HELD_OUT", 1000)
    monkeypatch.setattr("lab.tiny_imagenet.load", lambda *args: (*few, *few))
    with pytest.raises(train.UserError, match="--classes 2: they have 1,000 training images, and"):
        train.load_data(settings("--dataset", "tiny-imagenet", "--classes", "2"))


def test_augmentation_shifts_each_image_by_its_own_choice_and_mirrors_half():
    x = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(400, 1, 5, 5)
    out = train.augment(x, 2, True, torch.Generator().manual_seed(0))
    wide, crops = F.pad(x[:1], (2,) * 4)[0, 0], {}
    for i in range(5):
        for j in range(5):
            crop = wide[i:i + 5, j:j + 5]
            crops[crop.numpy().tobytes()] = i, j, 0
            crops[crop.flip(-1).numpy().tobytes()] = i, j, 1
    seen = [crops[image[0].numpy().tobytes()] for image in out]         # KeyError: no crop of it
    assert len({(i, j) for i, j, _ in seen}) == 25 and 150 < sum(m for *_, m in seen) < 250
    assert torch.equal(train.augment(x, 0, False, torch.Generator()), x)


# ---- The loss in parts ---------------------------------------------------------------------------

def backward(c, model, *batch):
    return train.backward(SimpleNamespace(c=c, model=model), *batch)


@pytest.mark.parametrize("method", ("standard", "pgd", "trades"))
def test_micro_batches_make_the_gradient_of_the_batch(name, method):
    c, x, y = tiny_settings("--model", name), torch.rand(5, 1, 4, 4).double(), torch.arange(5)
    model, seen = tiny_model(name), []
    c.method = method
    for c.micro_batch in (2, None):
        model.zero_grad()
        loss = backward(c, model, x, y, 0.0, 0.0)
        seen.append([loss] + [w.grad.clone() for w in model.parameters()])
    for part, whole in zip(*seen):
        close(part, whole)


@pytest.mark.parametrize("method", ("pgd", "trades"))
def test_no_pass_takes_more_than_a_micro_batch(method):
    c, (x, y), model, seen = tiny_settings(), images(), tiny("s4"), []
    c.method = method
    model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    for c.micro_batch, largest in ((2, 2), (None, 5)):
        seen.clear()
        backward(c, model, x, y, EPS, ALPHA)
        assert max(seen) == largest


@pytest.mark.parametrize("method", ("pgd", "trades"))
def test_train_py_s_losses_are_those_of_the_scripts(name, method):
    c, (x, y), model = tiny_settings("--model", name, "--beta", "3"), images(), tiny(name)
    script, at, seen = MODELS[name], (x, y, EPS, ALPHA, c.steps), []
    c.method = method

    def by_script():
        loss = script.pgd_at_loss(model, *at) if method == "pgd" else script.trades_loss(
            model, *at, c.beta)
        loss.backward()
        return loss
    for work in (by_script, lambda: backward(c, model, x, y, EPS, ALPHA)):
        torch.manual_seed(0)
        model.zero_grad()
        seen.append([work(), *(w.grad.clone() for w in model.parameters())])
    for a, b in zip(*seen):
        close(a, b)


# ---- Faults --------------------------------------------------------------------------------------

# In a process of its own: starts a run again and again and kills it each time, then lets it end.
# Half of the kills come at a random time, half at a random write of a checkpoint or log: before it
# reaches the disk, before it takes its place, or after. Prints how many kills it took.
KILLER = """
import functools, os, random, signal, sys, time, train

kills, words = int(sys.argv[1]), sys.argv[2:]
chance = random.Random(0)
train.HELD_OUT, train.drawn_digits = 50, functools.cache(train.drawn_digits)
train.drawn_digits(11_000, 0), train.drawn_digits(2_000, 1)             # once, for all children
for n in range(10 * kills):
    after = chance.uniform(0.05, 0.8) if n % 2 else None
    at = chance.randint(1, 12)
    child = os.fork()
    if child == 0:
        def deadly(real):
            def call(*args):
                global at
                at -= 1
                if at == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)
            return call
        if after is None and n < kills:
            os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        os._exit(train.main(words + ["--resume"] * (n > 0)))
    if after is not None and n < kills:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(print("kills", n) if status == 0 else f"the run ended with status {status}")
"""


def alone(*words, **kw):
    """A process of its own, one thread, that finds the project's files."""
    return subprocess.Popen([sys.executable, *map(str, words)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, cwd=HERE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


def same_run(a, b):
    """Two runs' logs, checkpoints and results are the same, bit for bit, but for their clocks."""
    assert log(a) == log(b)
    for kind in ("last.pt", "best.pt"):
        x, y = (torch.load(out / kind, weights_only=True) for out in (a, b))
        for state in (x, y):
            for row in state.get("rows", ()):
                row.pop("seconds")
            state["config"] = None
            state["seconds"] = None
        assert repr(x) == repr(y)                       # names, counters, scores, and every printed
        assert all(torch.equal(u, v) for u, v in zip(tensors(x), tensors(y), strict=True))
    x, y = (json.loads((out / "result.json").read_text()) for out in (a, b))
    assert all(x[k] == y[k] for k in ("Best", "Last", "Diff"))


def tensors(state):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    nested = (dict, list, tuple, torch.Tensor)
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values if isinstance(v, nested) for t in tensors(v)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("method", ("pgd", "free"))
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(method, tmp_path):
    """SSM_ADV_KILLS=300 python -m pytest -q lab/test_runs.py -k killed   # minutes, not seconds"""
    kills = int(os.environ.get("SSM_ADV_KILLS", 24)) // 2
    replays = "--replays 2" if method == "free" else ""
    words = (f"{' '.join(TINY)} --dataset synthetic --device cpu --save-every 0 {replays} "
             f"--method {method} --train-size {30 * kills} --epochs 4 --eval-every 2").split()
    killer = alone("-c", KILLER, kills, *words, "--out", tmp_path / "killed")
    out, err = killer.communicate(timeout=3600)
    assert killer.returncode == 0 and f"kills {kills}\n" in out, out + err
    assert train.main([*words, "--out", str(tmp_path / "whole")]) == 0
    same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("signum", ("SIGINT", "SIGTERM"))
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(signum, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 1000)                    # this process is a user's own
    words = [*TINY, "--dataset", "synthetic", "--device", "cpu", "--train-size", "320",
             "--epochs", "2", "--save-every", "60"]
    process = alone(HERE / "train.py", *words, "--out", tmp_path / "cut")
    while "epoch" not in (line := process.stdout.readline()):               # the table's head
        assert line, process.stderr.read()
    process.stdout.readline()                                               # an epoch's row
    process.send_signal(getattr(signal, signum))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"stopped; go on with: python train.py --resume {tmp_path / 'cut'}" in err
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert train.main([*words, "--out", str(tmp_path / "whole")]) == 0
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_full_disk_stops_the_run_and_damages_nothing(tmp_path):
    words = [*TINY, "--dataset", "synthetic", "--device", "cpu", "--epochs", "2"]
    full = ("import resource, train\n"              # a file may not grow past 4 kB from epoch 2 on
            "train.HELD_OUT, end_epoch = 50, train.end_epoch\n"
            "def fills(run, data):\n"
            "    if run.epoch == 1:\n"
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "    return end_epoch(run, data)\n"
            "train.end_epoch = fills\n"
            "raise SystemExit(train.main())\n")
    process = alone("-c", full, *words, "--out", tmp_path / "full")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert err.startswith("train.py: cannot write") and "goes on with --resume" in err
    assert len(log(tmp_path / "full")) == 1 + 1 and not list((tmp_path / "full").glob("*.part"))
    assert train.main(["--resume", str(tmp_path / "full")]) == 0
    assert train.main([*words, "--out", str(tmp_path / "whole")]) == 0
    same_run(tmp_path / "full", tmp_path / "whole")


def test_a_log_that_a_crash_cut_is_written_anew(tmp_path):
    assert trains(tmp_path / "run", *TINY, "--epochs", "2") == 0
    whole = log(tmp_path / "run")
    (tmp_path / "run" / "log.csv").write_text("epoch,lr\n1,0.0")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert log(tmp_path / "run") == whole


def test_a_run_killed_before_its_first_checkpoint_begins_by_the_same_command(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "last.pt.part").write_bytes(b"half")
    assert trains(tmp_path / "run", *TINY, "--dataset", "synthetic", "--resume") == 0
    assert "no run in " in (out := capsys.readouterr().out) and "yet; a new one begins" in out
    assert trains(tmp_path / "whole", *TINY) == 0
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kept", [name for name in train.RUN_FILES if name != "last.pt"])
@pytest.mark.parametrize("words", ["", "--resume"])
def test_a_folder_with_any_file_of_a_run_is_not_begun_anew(kept, words, tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    (tmp_path / "left").mkdir()
    (tmp_path / "run" / kept).rename(tmp_path / "left" / kept)
    before = (tmp_path / "left" / kept).read_bytes()
    capsys.readouterr()
    assert trains(tmp_path / "left", *TINY, *words.split()) == 2
    message = f"it has {kept}, but no last.pt" if words else f"holds another run ({kept})"
    assert message in capsys.readouterr().err
    assert (tmp_path / "left" / kept).read_bytes() == before
    assert [p.name for p in (tmp_path / "left").iterdir()] == [kept]


def test_a_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    assert trains(tmp_path / "run", *TINY) == 0
    path = tmp_path / "run" / "last.pt"
    whole, chance, seen = path.read_bytes(), torch.Generator().manual_seed(0), 0
    expected = train.read_checkpoint(path, "--resume")
    for _ in range(60):
        damaged = bytearray(whole)
        bit = int(torch.randint(8 * len(whole), (), generator=chance))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            state = train.read_checkpoint(path, "--resume")
        except train.UserError:
            seen += 1
            continue
        assert repr(state) == repr(expected)                            # it was the zip's padding
        assert all(torch.equal(u, v) for u, v in zip(tensors(state), tensors(expected)))
    assert seen > 30


def test_a_model_that_is_loaded_leaves_the_caller_s_random_numbers_as_they_were(tmp_path):
    assert trains(tmp_path / "run", *TINY) == 0
    torch.manual_seed(3)
    train.load(tmp_path / "run" / "best.pt")
    drawn = torch.rand(5)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(5))


def test_a_finished_run_that_is_resumed_has_only_its_test_left(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    whole = log(tmp_path / "run")
    capsys.readouterr()
    assert trains(tmp_path / "run", *TINY, "--resume") == 0
    assert "trained to its end" in capsys.readouterr().out and log(tmp_path / "run") == whole


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(f):
        raise OSError(28, "No space left")
    path = tmp_path / "last.pt"
    train.write(path, "before")
    monkeypatch.setattr(train.os, "fsync", full)
    with pytest.raises(train.UserError, match="No space left"):
        train.write(path, "after")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["last.pt"]


def test_resume_refuses_what_is_no_run(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    for folder in ("empty", "misfit", "weights"):
        (tmp_path / folder).mkdir()
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["config"]["d_model"] = 16
    torch.save(state, tmp_path / "misfit" / "last.pt")
    (tmp_path / "weights" / "last.pt").write_bytes((tmp_path / "run" / "best.pt").read_bytes())
    torch.save({"format": 1, "model": {}, "config": {"model": "bert"}}, tmp_path / "foreign.pt")
    for job, path, message in (
            ("--resume", tmp_path / "run" / "best.pt", "a run goes on from the last.pt of its"),
            ("--resume", tmp_path / "weights", "its last.pt holds weights for --evaluate"),
            ("--resume", tmp_path / "empty", "there is no run in this folder"),
            ("--resume", tmp_path / "misfit", "does not fit the model that its settings"),
            ("--evaluate", tmp_path / "misfit", "does not fit the model that its settings"),
            ("--analyse", tmp_path / "misfit", "does not fit the model that its settings"),
            ("--evaluate", tmp_path / "foreign.pt", "damaged, or no checkpoint of this program")):
        capsys.readouterr()
        assert train.main([job, str(path), "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_checkpoint_is_not_resumed_beside_another_run(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    assert trains(a, *TINY) == 0 and trains(b, *TINY, "--seed", "7") == 0
    (b / "last.pt").rename(a / "seed7.pt")
    before = {p: p.read_bytes() for p in a.iterdir()}
    capsys.readouterr()
    assert train.main(["--resume", str(a / "seed7.pt")]) == 2
    assert "a run goes on from the last.pt of its folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in a.iterdir()} == before


def test_a_checkpoint_is_not_resumed_without_its_best(tmp_path, capsys):
    a, alone = tmp_path / "a", tmp_path / "alone"
    assert trains(a, *TINY) == 0
    alone.mkdir()
    (alone / "last.pt").write_bytes((a / "last.pt").read_bytes())
    (tmp_path / "link.pt").symlink_to(a / "last.pt")
    capsys.readouterr()
    assert train.main(["--resume", str(alone / "last.pt")]) == 2
    err = capsys.readouterr().err
    assert "best.pt: there is no such file" in err and err.count("\n") == 1
    (alone / "best.pt").write_bytes((a / "best.pt").read_bytes())
    assert train.main(["--resume", str(alone / "last.pt")]) == 0
    assert train.main(["--resume", str(tmp_path / "link.pt")]) == 0         # where it points
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "alone", "link.pt"]


def test_a_run_goes_on_in_its_own_folder_alone(tmp_path, capsys):
    for out in "ab":
        assert trains(tmp_path / out, *TINY) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for place in "bc":
        capsys.readouterr()
        assert train.main(["--resume", str(tmp_path / "a"), "--out", str(tmp_path / place)]) == 2
        assert "a run goes on in its own folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert train.main(["--resume", str(tmp_path / "a"), "--out", f"{tmp_path}/b/../a"]) == 0


def test_a_run_that_was_begun_while_the_data_were_read_is_left_alone(tmp_path, monkeypatch, capsys):
    out, load_data = tmp_path / "run", train.load_data

    def slow(c):
        monkeypatch.setattr(train, "load_data", load_data)
        assert trains(out, *TINY, "--seed", "1") == 0
        return load_data(c)
    monkeypatch.setattr(train, "load_data", slow)
    assert trains(out, *TINY, "--seed", "2") == 2
    assert "holds another run" in capsys.readouterr().err
    assert json.loads((out / "result.json").read_text())["config"]["seed"] == 1


def test_a_signal_while_the_last_checkpoint_is_written_stops_before_the_test(
        tmp_path, monkeypatch, capsys):
    out, save = tmp_path / "run", train.save

    def slow(run):
        save(run)
        if run.batch:                                                   # not the first, not the end
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train, "save", slow)
    assert trains(out, *TINY) == 130
    assert "go on with: python train.py --resume" in capsys.readouterr().err
    monkeypatch.setattr(train, "save", save)
    assert not (out / "result.json").exists() and train.main(["--resume", str(out)]) == 0


def test_where_nobody_reads_or_nothing_can_be_opened_one_sentence_says_so(
        tmp_path, monkeypatch, capsys):
    class Closed(io.TextIOWrapper):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(sys, "stdout", Closed(io.BytesIO()))
    assert trains(tmp_path / "a", *TINY) == 2
    monkeypatch.setattr(sys, "stdout", None)                            # as after >&-
    assert trains(tmp_path / "b", *TINY) == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert trains(tmp_path / "\u00fc x", *TINY) == 0
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert train.main(["--evaluate", 300 * "x"]) == 2

    def refuse(*args, **kw):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert train.main(["--evaluate", str(tmp_path / "b" / "best.pt")]) == 2
    broken, long, closed = capsys.readouterr().err.splitlines()
    assert "train.py: the output: Broken pipe; choose another place; a run goes on" in broken
    assert "xxx: File name too long" in long
    assert "best.pt: cannot be read (Permission denied); see to its access rights" in closed


@pytest.mark.parametrize("broken", ("loss", "gradient"))
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(broken, tmp_path, monkeypatch, capsys):
    calls, real = [], train.backward

    def explodes(run, *args):
        loss = real(run, *args)
        calls.append(loss)
        if len(calls) == 2 and broken == "gradient":
            next(run.model.parameters()).grad.fill_(math.inf)
        return loss * math.nan if len(calls) == 2 and broken == "loss" else loss
    monkeypatch.setattr(train, "backward", explodes)
    assert trains(tmp_path / "run", *TINY) == 2
    err = capsys.readouterr().err
    assert f"not finite at epoch 1, batch 2; the last checkpoint is {tmp_path}" in err
    assert "--lr" in err and err.count("\n") == 1
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


# ---- Many processes ------------------------------------------------------------------------------

def one_and_two(tmp_path, method, train_size, script):
    """A run in this process, and in two processes that a script starts; their words and folders."""
    replays = "--replays 2" if method == "free" else ""
    words = (f"{' '.join(TINY)} --dataset synthetic --method {method} {replays} "
             f"--epochs 4 --train-size {train_size} --device cpu --attacks clean").split()
    assert trains(tmp_path / "one", *words) == 0
    (tmp_path / "script.py").write_text(
        "import os, signal, sys, time, train\n"
        "build = train.build\n"
        "train.HELD_OUT = 50\n"
        "train.build = lambda c: build(c).double()\n" + script)
    torchrun(2, tmp_path / "script.py", *words, "--out", str(tmp_path / "two"))
    return tmp_path / "one", tmp_path / "two"


def nearly_the_same_run(a, b):
    """Weights and logged losses agree to rounding: sums over images have another order."""
    for k, w in weights(a).items():
        close(weights(b)[k], w, 1e-9)
    rows = [torch.load(out / "last.pt", weights_only=True)["rows"] for out in (a, b)]
    assert len(log(a)) == len(log(b)) == 1 + len(rows[0])
    close(*([row["loss"] for row in each_run] for each_run in rows))


@pytest.fixture
def float64(monkeypatch):
    """Models in float64: two sums in another order differ by less than the tolerance."""
    build = train.build
    monkeypatch.setattr(train, "build", lambda c: build(c).double())


@pytest.mark.parametrize("method", ("standard", "free"))
def test_two_processes_give_the_run_of_one_also_if_one_of_them_is_late(method, tmp_path, float64):
    one, two = one_and_two(tmp_path, method, 41, (
        "settings = train.settings\n"
        "def late(*args):\n"                # the first process is past its checks long before
        "    time.sleep(3 * int(os.environ['RANK']))\n"
        "    return settings(*args)\n"
        "train.settings = late\n"
        "train.leave(train.main())\n"))
    nearly_the_same_run(one, two)


def test_a_signal_to_one_of_two_processes_saves_and_stops_both_and_one_alone_goes_on(
        tmp_path, float64):
    one, two = one_and_two(tmp_path, "free", 57, (
        "train_batch = train.train_batch\n"
        "def batch(run, *rest):\n"
        "    if os.environ['RANK'] == '1' and (run.epoch, run.batch) == (1, 1):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return train_batch(run, *rest)\n"
        "train.train_batch = batch\n"
        "train.leave(train.main() != 130)\n"))
    state = torch.load(two / "last.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (1, 2)
    assert train.main(["--resume", str(two)]) == 0
    nearly_the_same_run(one, two)


def torchrun(n, *words):
    """n processes of a script; what they print, or the test fails with it."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", str(n), *map(str, words)], capture_output=True,
                          text=True, timeout=300, env=os.environ | {
                              "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE),
                              "PYTHONFAULTHANDLER": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- bf16 ----------------------------------------------------------------------------------------

def as_on_a_gpu(model):
    """There autocast makes LayerNorm and softmax return float32."""
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            m.register_forward_hook(lambda module, args, out: out.float())
    return model


def unchanged(model):
    return model


def in_bf16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("options", ({}, {"ads": "relu"}, {"control": "glu"}), ids=str)
@pytest.mark.parametrize("like", (unchanged, as_on_a_gpu), ids=("cpu", "gpu"))
def test_in_bf16_weights_and_gradients_stay_float32_and_finite(name, options, like):
    c = tiny_settings("--model", name, "--precision", "bf16")
    model = like(tiny(name, **options).float())
    x, y = images()
    x, types = x.float(), set()
    model.head.register_forward_hook(lambda module, args, out: types.add(out.dtype))
    for c.method in train.METHODS:
        model.zero_grad()
        with in_bf16():
            if c.method == "free":
                train.free_backward(model, x, y, torch.zeros(x.shape), EPS)
            elif c.method == "yopo":
                train.yopo_backward(model, x, y, EPS, ALPHA, 2, 2)
            else:
                backward(c, model, x, y, EPS, ALPHA)
        for w in model.parameters():
            assert w.dtype == w.grad.dtype == torch.float32 and w.grad.isfinite().all()
    assert types == {torch.bfloat16}


def test_in_bf16_kernels_and_the_selective_scan_keep_every_bit(name, monkeypatch):
    c, script, made, scanned = tiny_settings("--model", name), MODELS[name], [], []
    model, (x, y) = tiny(name).float(), images()
    x, once, scan = x.float(), script.once, mamba_adv.selective_scan
    monkeypatch.setattr(script, "once", lambda m, k, make: made.append((m, k, make)) or once(
        m, k, make))
    monkeypatch.setattr(mamba_adv, "selective_scan", lambda *args: scanned.append(args) or scan(
        *args))
    with in_bf16():
        backward(c, model, x, y, EPS, ALPHA)
        kept = [once(*args) for args in made]
    for value, (_, _, make) in zip(kept, made):
        for a, b in zip(*([v] if torch.is_tensor(v) else v for v in (value, make()))):
            assert torch.equal(a, b)
    for args in scanned:
        args = [v.detach().float().requires_grad_() for v in args]
        expected = scan(*args)
        g = torch.randn_like(expected)
        with in_bf16():                                                 # its backward, too
            results = scan(*args), *torch.autograd.grad(scan(*args), args, g)
        for a, b in zip(results, (expected, *torch.autograd.grad(expected, args, g))):
            assert a.dtype == torch.float32 and torch.equal(a, b)
    assert made or scanned


def test_whatever_trained_a_model_evaluation_is_float32_without_tf32(tmp_path, monkeypatch):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    seen, real = [], train.hits

    def spy(model, x, y):
        autocast = (x.flatten(1) @ x.flatten(1).mT).dtype == torch.bfloat16
        seen.append((autocast, *(f.allow_tf32 for f in flags), model(x).dtype))
        return real(model, x, y)
    monkeypatch.setattr(train, "hits", spy)
    out = tmp_path / "run"
    assert trains(out, *TINY, "--precision", "bf16") == 0
    assert {v.dtype for v in weights(out).values()} == {torch.float32}
    assert train.main(["--evaluate", str(out / "last.pt"), "--device", "cpu"]) == 0
    assert set(seen) == {(False, False, False, torch.float32)}
