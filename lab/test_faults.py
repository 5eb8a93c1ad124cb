# SPDX-License-Identifier: MIT
"""What stands in a file, in the environment or in a folder and is not what it should be."""
import io
import json
import math
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

import attention_adv
import mamba_adv
import s4_adv
import train
from lab import autoattack, evaluate
from test_all import TINY, trains


def refused(words, capsys):
    """The one sentence that train.main says of a command line that it refuses."""
    capsys.readouterr()
    assert train.main([str(word) for word in words]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("train.py: ") and sentence.count("\n") == 1, sentence
    return sentence


def contents(folder):
    """{path: its bytes, None for a folder, where a link points}: all that is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        else:
            found[path] = None if path.is_dir() else path.read_bytes()
    return found


# ---- The environment -----------------------------------------------------------------------------

ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999",
               "LOCAL_RANK": "0"}


@pytest.mark.parametrize("missing", ENVIRONMENT)
def test_a_part_of_what_torchrun_sets_is_refused_before_every_process_trains_alone(
        missing, tmp_path, monkeypatch, capsys):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    message = refused([*TINY, "--dataset", "synthetic", "--out", tmp_path / "run"], capsys)
    assert f"no {missing}; start the processes by torchrun" in message
    assert contents(tmp_path) == {}
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0 and "--epochs" in capsys.readouterr().out


def test_processes_that_have_no_number_do_not_come_together(monkeypatch, capsys):
    for name, value in (ENVIRONMENT | {"RANK": "first"}).items():
        monkeypatch.setenv(name, value)
    assert "start them by torchrun" in refused(["--dataset", "synthetic"], capsys)
    with pytest.raises(SystemExit):
        train.main(["--help"])


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    for name, value in (ENVIRONMENT | {"LOCAL_WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--nproc-per-node 3: give 2, one" in refused(["--dataset", "synthetic"], capsys)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert "start them by torchrun" in refused(["--dataset", "synthetic"], capsys)


@pytest.mark.parametrize("together", [True, False])
def test_of_a_process_that_has_ended_the_others_say_so(together, monkeypatch, capsys):
    def fails(words):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    monkeypatch.setattr(train, "run_from", fails)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: together)
    monkeypatch.setattr(train.dist, "get_backend", lambda: "gloo")
    if together:
        assert "another process has ended; its own message says why" in refused([], capsys)
    else:
        with pytest.raises(RuntimeError, match="closed by peer"):
            train.main([])


def test_a_thread_trains_though_it_cannot_take_signals(tmp_path):
    codes = []

    def work():
        codes.append(trains(tmp_path / "run", *TINY))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0] and (tmp_path / "run" / "result.json").exists()


# ---- Numbers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [2 ** 31, 10 ** 20, 10 ** 400])
@pytest.mark.parametrize("words", [
    "--steps", "--eval-train", "--beta", "--yopo 1-", "--d-model", "--bench --lengths",
    "--bench --steps", "--bench"])
def test_a_number_beyond_what_a_tensor_can_count_is_refused(words, number, capsys):
    message = refused(f"{words}{'' if words.endswith('-') else ' '}{number}".split(), capsys)
    assert words.split()[-2 if words.endswith("-") else -1] in message


@pytest.mark.parametrize("number", [10 ** 6, 2 ** 63, 10 ** 400])
def test_a_sweep_of_too_many_steps_is_refused_by_its_own_name(number, tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    message = refused(["--evaluate", tmp_path / "run", "--steps-sweep", f"1,{number}"], capsys)
    assert f"--steps-sweep: 1,{number} is no list of whole numbers below 10^6; write" in message


# ---- Messages ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert trains(folder, *TINY, "--epochs", "2") == 0
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_cut_checkpoint_is_called_damaged_and_not_a_matter_of_access_rights(run_folder, capsys):
    last = run_folder / "last.pt"
    whole = last.read_bytes()
    for n in (0, 1, 100, 1000, len(whole) - 1):
        last.write_bytes(whole[:n])
        for job in ("--resume", "--evaluate", "--analyse"):
            assert "this is damaged, or no checkpoint" in refused([job, run_folder], capsys)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
@pytest.mark.parametrize("job", ["--evaluate", "--analyse"])
def test_a_device_is_no_checkpoint_and_no_folder(job, path, capsys):
    assert f"{job} {path}: there is no such file" in refused([job, path], capsys)


@pytest.mark.parametrize("words, message", [
    ("--eps -1/255", "--eps -0.0039"), ("--alpha -1/255", "--alpha -0.0039"),
    ("--eps -.5", "--eps -0.5"), ("--alphas -1/255,0", "--alphas [-0.0039"),
    ("--bench --lengths -64", "-64 is no list of whole numbers")])
def test_a_negative_fraction_is_a_value_and_no_flag(words, message, capsys):
    assert message in refused(words.split(), capsys)


@pytest.mark.parametrize("error, lacks", [
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("invalid memory format"), False), (ValueError("out of bounds"), False),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("CUDA error: out of memory"), True), (MemoryError(), True),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
    (torch.cuda.OutOfMemoryError("CUDA ..."), True)])
def test_not_every_error_that_names_memory_is_a_lack_of_it(error, lacks):
    assert train.lacks_memory(error) == lacks


@pytest.mark.parametrize("job", ["--resume", "--evaluate", "--analyse"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapped_model_are_refused_by_a_name_of_theirs(
        prefix, job, run_folder, capsys):
    last = run_folder / "last.pt"
    state = torch.load(last, weights_only=True)
    state["model"] = {prefix + name: w for name, w in state["model"].items()}
    torch.save(state, last)
    message = refused([job, run_folder, "--device", "cpu"], capsys)
    assert f'does not fit the model that its settings describe (Unexpected key(s) in state_dict: ' \
        f'"{prefix}patches.weight", ' in message and len(message) < 300


def test_a_flag_that_a_checkpoint_was_trained_without_is_refused(run_folder, capsys):
    message = refused(["--resume", run_folder, "--control", "mlp"], capsys)
    assert f"--control mlp: {run_folder} was trained without it; leave the flag out" in message


def test_an_attack_that_would_not_move_is_refused_in_evaluation_too(run_folder, capsys):
    words = ["--evaluate", run_folder, "--device", "cpu", "--alpha", "0"]
    assert "--alpha or --alphas 0: the attack would not move" in refused(words, capsys)


def test_a_lack_of_memory_is_no_damage_and_no_missing_device(run_folder, monkeypatch, capsys):
    def too_large(*args, **kw):
        raise torch.cuda.OutOfMemoryError
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", too_large)
    message = refused(["--resume", run_folder], capsys)
    assert "memory does not suffice (OutOfMemoryError)" in message
    monkeypatch.setattr(torch, "zeros", too_large)
    assert "memory does not suffice" in refused(["--dataset", "synthetic"], capsys)


@pytest.mark.parametrize("setting", ["ads", "control", "n_layers", "patch_size", "shape"])
def test_a_checkpoint_without_a_setting_of_its_model_is_refused(setting, run_folder, capsys):
    last = run_folder / "last.pt"
    state = torch.load(last, weights_only=True)
    del state["config"][setting]
    torch.save(state, last)
    for job in ("--resume", "--evaluate", "--analyse"):
        assert "no checkpoint of this program" in refused([job, run_folder], capsys)
    with pytest.raises(train.UserError, match="no checkpoint of this program"):
        train.load(last)


@pytest.mark.parametrize("error, told", [(FloatingPointError, 1), (train.UserError, 0)])
def test_a_process_beside_the_first_tells_of_what_its_own_images_did_alone(
        error, told, monkeypatch, capsys):
    def fails(words):
        raise error("a sentence")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(train, "run_from", fails)
    assert train.main([]) == 2
    assert capsys.readouterr().err == told * "train.py: a sentence\n"


def test_a_logit_that_is_not_finite_is_told_by_the_process_whose_image_it_is():
    with pytest.raises(FloatingPointError, match="logits that are not finite"):
        train.hits(torch.nn.Identity(), torch.tensor([[0.0, math.nan]]), torch.zeros(1))


@pytest.mark.parametrize("words", ["--evaluate", "--evaluate --checks", "--analyse"])
def test_a_folder_that_takes_no_file_is_said_to_be_so_before_the_work(
        words, run_folder, monkeypatch, capsys):
    job, *more = words.split()
    before = contents(run_folder)

    def work(*args):
        raise AssertionError("the work has begun")

    def read_only(file, mode="r", *args, **kw):
        if set(mode) & set("wxa+"):
            raise OSError(30, "Read-only file system", str(file))
        return open(file, mode, *args, **kw)
    monkeypatch.setattr(train, "scores", work)
    monkeypatch.setattr(s4_adv, "ascend", work)
    for module in train, evaluate:
        monkeypatch.setattr(module, "open", read_only, raising=False)
    message = refused([job, run_folder, *more, "--device", "cpu"], capsys)
    assert "cannot write" in message and "Read-only file system" in message
    assert contents(run_folder) == before


def test_a_refusal_leaves_neither_lock_nor_folder(tmp_path, monkeypatch, capsys):
    def too_large(c):
        raise MemoryError
    monkeypatch.setattr(train, "build", too_large)
    assert trains(tmp_path / "new" / "run", *TINY) == 2
    (tmp_path / "there").mkdir()
    assert trains(tmp_path / "there", *TINY) == 2
    assert contents(tmp_path) == {tmp_path / "there": None}
    assert "memory does not suffice" in capsys.readouterr().err


# ---- Flags that do nothing, and runs that learn nothing ------------------------------------------

@pytest.mark.parametrize("words, message", [
    ("--method pgd --beta 6", "--beta has an effect with --method trades alone, and this is pgd"),
    ("--method standard --steps 3", "--steps has an effect with --method pgd or trades alone"),
    ("--method standard --eps-warmup 2", "--eps-warmup has an effect with --method pgd or trades"),
    ("--method yopo --steps 3", "--steps has an effect with --method pgd or trades alone"),
    ("--method pgd --replays 2", "--replays has an effect with --method free alone"),
    ("--method free --yopo 5-3", "--yopo has an effect with --method yopo alone"),
    ("--model s4 --d-hidden 8", "--d-hidden has an effect with --model attention or vit alone"),
    ("--alpha 0", "--alpha or --alphas 0: the attack would not move; give steps above 0"),
    ("--alphas 0,0 --steps 2", "--alpha or --alphas 0: the attack would not move; give"),
    ("--method pgd --steps 0", "--steps 0: --method pgd would train on noise, not on an attack"),
    ("--method trades --steps 0", "use --method standard"),
    ("--bench --train-size 9", "unrecognized arguments: --train-size 9")])
def test_a_flag_without_effect_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(["--dataset", "synthetic", *words.split()], capsys)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("words", ["--method trades --beta 2 --steps 1", "--method yopo --yopo 1-1",
                                   "--model attention --d-hidden 8 --method standard"])
def test_a_flag_with_an_effect_and_a_preset_that_has_none_are_taken(words, tmp_path):
    assert trains(tmp_path / "run", *TINY, *words.split()) == 0


@pytest.mark.parametrize("accuracies, hints", [
    ([0.1, 0.11, 0.12, 0.1, 0.1], 1), ([0.1, 0.1, 0.2, 0.1, 0.1], 0), ([0.1, 0.1, 0.1], 0)])
def test_a_run_at_chance_gets_one_hint_that_names_the_warm_up(
        accuracies, hints, tmp_path, monkeypatch, capsys):
    planted, real = iter(accuracies), train.evaluate

    def evaluate(model, images, labels, specs, c, place):
        found = real(model, images[:20], labels[:20], specs, c, place)
        return found | {"clean": next(planted)} if place[0] == "val" else found
    monkeypatch.setattr(train, "evaluate", evaluate)
    words = ["--epochs", str(2 * len(accuracies)), "--eval-every", "2", "--method", "standard"]
    assert trains(tmp_path / "run", *TINY, *words) == 0
    out = capsys.readouterr().out
    assert out.count("hint: after 6 epochs accuracy is still that of chance") == hints
    assert out.count("--eps-warmup") == out.count("--lr") == hints


# ---- Mutations -----------------------------------------------------------------------------------

# Seeded; with SSM_ADV_MUTATIONS=25 there are twenty-five times as many, which takes minutes.
TIMES = int(os.environ.get("SSM_ADV_MUTATIONS", 1))
OTHERS = (None, True, -1, 0, 1.5, "x", "", [], {}, [1, "x"], {"clean": 1}, math.nan, math.inf,
          10 ** 30)
SMALL = "--attacks clean --device cpu --test-size 4".split()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The folder of a finished run that was evaluated, with the batches of a cut evaluation."""
    folder = tmp_path_factory.mktemp("mutations") / "run"
    words = [*TINY, "--epochs", "2", "--method", "standard", "--test-size", "4",
             "--attacks", "clean"]
    assert trains(folder, *words) == 0 and train.main(["--resume", str(folder)]) == 0
    evaluate = ["--evaluate", str(folder / "best.pt"), *SMALL]
    assert train.main([*evaluate, "--attacks", "clean,fgsm"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **options: None)
        patch.setattr(train, "write", lambda path, content: None)
        assert train.main(evaluate) == 0
    assert len(list(folder.glob("best-*-0.part"))) == 1
    return folder


def places(value, depth=3):
    """Where something stands in nested dicts and lists: paths of keys."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, (list, tuple)):
        keys = list(range(len(value)))
    else:
        return [()]
    if depth == 0 or not keys:
        return [()]
    return [(key, *rest) for key in keys for rest in places(value[key], depth - 1)]


def retype(value, chance):
    """The value with something in it, or all of it, replaced by something of another kind."""
    *outer, last = chance.choice([("all",), *places(value)])
    other = chance.choice(OTHERS)
    if last == "all" or not isinstance(value, (dict, list)):
        return other
    place = value
    for key in outer:
        place = place[key]
    try:
        if chance.random() < 0.2:
            del place[last]
        else:
            place[last] = other
    except TypeError:                           # a tuple
        return other
    return value


def retyped(name, whole, chance):
    """The bytes of a file with one value of another kind."""
    if name.endswith(".pt"):
        state = torch.load(io.BytesIO(whole), weights_only=True)
        shallow = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
        file = io.BytesIO()
        changed = retype(shallow, chance)
        torch.save(state | changed if isinstance(changed, dict) else changed, file)
        return file.getvalue()
    if name.endswith(".json"):
        return json.dumps(retype(json.loads(whole), chance)).encode()
    words = whole.split(b",")
    words[chance.randrange(len(words))] = str(chance.choice(OTHERS)).encode()
    return b",".join(words)


def flipped(whole, chance):
    damaged = bytearray(whole)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def mutations(name, whole, chance):
    """(kind, bytes) of a file: None where it is removed, "folder" where a folder stands there.

    Of what is written and never read, the contents are not varied.
    """
    yield "removed", None
    yield "a folder", "folder"
    yield "empty", b""
    yield "not UTF-8", whole[:20] + b"\xff\xfe" + whole[20:]
    yield "foreign", bytes(chance.randrange(256) for _ in range(300))
    yield "deep", 100_000 * b"["
    if name in ("config.json", ".lock", "last.pt.part", "log.csv.part"):
        return
    for _ in range(6 * TIMES):
        yield "cut", whole[:chance.randrange(1, max(2, len(whole)))]
        yield "flipped", flipped(whole or b"\0", chance)
    for _ in range(20 * TIMES):
        yield "retyped", retyped(name, whole, chance)


def jobs(name, kind, run):
    """The command lines that meet a file of a run; of one value that is retyped, its reader."""
    resume = ["--resume", run]
    evaluate = ["--evaluate", run / "best.pt", *SMALL]
    found = {"last.pt": [resume, ["--evaluate", run, *SMALL]],
             "best.pt": [resume, evaluate], "config.json": [resume],
             "log.csv": [["--plot", run, "--out", run / "figure.png"], resume],
             "result.json": [["--table", run], resume],
             "best-evaluation.json": [["--table", run], evaluate]}
    found = found.get(name, [evaluate] if name.startswith("best-") else [resume])
    return found[:1] if kind in ("retyped", "cut") else found


def put(path, content):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


def fault(words, run, capsys):
    """What is wrong with how a command line ends, or None."""
    before = contents(run)
    capsys.readouterr()
    try:
        code = train.main([str(word) for word in words])
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    err = capsys.readouterr().err
    if code == 0:
        now = contents(run)
        lost = [file for file in before if file.name == "best.pt" and now[file] != before[file]]
        return err or ("best.pt was changed" if lost else None)
    if code != 2 or not err.startswith("train.py: ") or err.count("\n") != 1:
        return f"exit code {code}: {err}"
    if contents(run) != before:
        return f"files were changed: {err}"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.json", "log.csv", "result.json",
                                  "best-evaluation.json", "best-*-0.part", "last.pt.part",
                                  "log.csv.part", ".lock"])
def test_a_damaged_file_ends_in_success_or_one_sentence_and_nothing_good_is_lost(
        name, evaluated, capsys, monkeypatch):
    monkeypatch.setattr("lab.figures.draw_runs", lambda path, logs: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)                     # for speed
    whole = contents(evaluated)
    path = next(evaluated.glob(name), evaluated / name)
    chance = random.Random(name)
    faults = []
    for kind, content in mutations(path.name, whole.get(path, b"x"), chance):
        for words in jobs(path.name, kind, evaluated):
            put(path, content)
            wrong = fault(words, evaluated, capsys)
            if wrong:
                faults.append(f"{words[0]}, {name} {kind}: {wrong}")
            now = contents(evaluated)
            for file in now.keys() | whole.keys():
                if now.get(file, "none") != whole.get(file, "none"):
                    put(file, whole.get(file))
    assert not faults, "\n".join(faults)


# ---- Gradients of exactly 0 ----------------------------------------------------------------------

class Dead(torch.nn.Module):
    """Logits that are right for label 0 and have a gradient of 0 everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight * (x.flatten(1)[:, :3] > 2) + torch.tensor([1.0, 0.0, 0.0]) + 0 * x.sum()


@pytest.mark.parametrize("attack", ["apgd_ce", "pgd_official", "free_backward"])
def test_an_attack_of_the_lab_and_free_at_tell_of_a_gradient_of_0(attack):
    x, y = torch.rand(4, 1, 3, 3), torch.zeros(4).long()
    attacks = {"apgd_ce": lambda: autoattack.apgd_ce(Dead(), x, y, 0.1),
               "pgd_official": lambda: evaluate.pgd_official(Dead(), x, y, 0.1, 0.02),
               "free_backward": lambda: train.free_backward(Dead(), x, y, torch.zeros_like(x), 0.1)}
    with pytest.warns(UserWarning, match="images .*have a gradient of exactly 0"):
        attacks[attack]()


@pytest.mark.parametrize("script", (s4_adv, mamba_adv, attention_adv))
def test_the_warning_of_a_gradient_of_0_points_at_the_line_that_called_pgd(script):
    with pytest.warns(UserWarning, match="gradient of exactly 0") as found:
        script.pgd(Dead(), torch.rand(4, 1, 3, 3), torch.zeros(4).long(), 0.1, 0.02, 2)
    assert found[0].filename == __file__


@pytest.mark.parametrize("script", (s4_adv, mamba_adv, attention_adv))
@pytest.mark.parametrize("alphas", [[0.1, 0.05], (0.1, 0.05), []])
def test_step_sizes_of_another_number_than_the_steps_are_refused(script, alphas):
    with pytest.raises(ValueError, match="one for each"):
        script.pgd(Dead(), torch.rand(4, 1, 3, 3), torch.zeros(4).long(), 0.1, alphas, 3)
