# SPDX-License-Identifier: MIT
"""The command line of training: presets, flags, and what it says of bad input."""
import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from test_all import HERE, TINY, settings, trains


def test_presets_are_the_papers_protocol():
    c = settings()
    assert (c.dataset, c.model, c.method, c.ads) == ("cifar10", "s4", "pgd", None)
    assert (c.n_layers, c.d_model, c.d_state, c.epochs, c.batch_size) == (4, 128, 64, 180, 256)
    assert (c.eps, c.alpha, c.steps, c.beta, c.lr, c.weight_decay) == (
        8 / 255, 2 / 255, 10, 6, 1e-3, 2e-4)
    c = settings("--dataset", "mnist")
    assert (c.n_layers, c.d_state, c.epochs, c.eps, c.alpha, c.beta) == (2, 32, 100, 0.3, 0.04, 1)
    assert settings("--model", "mamba").d_state == 16
    assert settings("--model", "s5").d_state == 128


def test_a_radius_is_shown_as_it_is_written():
    for text in ("8/255", "1/255", "16/255", "0.3", "0.2", "0.4", "0", "1", "0.012549"):
        assert train.show(train.fraction(text)) == text


def test_mamba_has_half_the_channels_on_the_drawn_digits_unless_they_are_given():
    drawn = ("--dataset", "synthetic", "--model")
    assert [settings(*drawn, model).d_model for model in train.SCRIPTS] == [64, 64, 64, 32, 64]
    assert settings(*drawn, "mamba", "--d-model", "48").d_model == 48
    assert settings("--model", "mamba").d_model == 128


def test_flags_take_fractions_and_both_spellings():
    c = settings("--epsilon", "4/255", "--step-size", "1/255", "--num-steps", "7", "--ads")
    assert (c.eps, c.alpha, c.steps, c.ads) == (4 / 255, 1 / 255, 7, "relu")
    assert settings("--ads", "tanh", "--eps", "0.031").eps == 0.031
    assert [train.fraction(f"{k}/255") for k in range(256)] == [k / 255 for k in range(256)]
    assert train.fraction("3.2/255") == 3.2 / 255
    for text in ("8/", "1/2/3", "/3", "1/0", "1/inf", "nan", "1e308/1e-308"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number; write it as 8/255"):
            train.fraction(text)


def test_eps_alone_takes_the_step_along():
    assert settings("--eps", "4/255").alpha == pytest.approx(1 / 255)
    assert settings("--eps", "4/255", "--alpha", "3/255").alpha == 3 / 255


BAD = {
    "--model lstm": "invalid choice: 'lstm'",
    "--method fast": "invalid choice: 'fast'",
    "--dataset svhn": "invalid choice: 'svhn'",
    "--ads swish": "invalid choice: 'swish'",
    "--precision fp8": "invalid choice: 'fp8'",
    "--alphas 0.1,0.05": "--alphas [0.1, 0.05]: give one for each of the 10 --steps",
    "--alphas 2,1 --steps 2": "--alphas [2.0, 1.0]: they must lie in [0, 1], pixel units",
    "--eps 8": "--eps 8.0: it must lie in [0, 1], pixel units; 8/255, not 8",
    "--eps eight": "eight is no number; write it as 8/255 or 0.031",
    "--eps 1e400": "1e400 is no number; write it as 8/255 or 0.031",
    "--eps 1e999999999": "1e999999999 is no number; write it as 8/255 or 0.031",
    "--alpha -0.1": "--alpha -0.1: it must lie in [0, 1]",
    "--steps -1": "--steps -1: it must be a number of at least 0",
    "--lr 0": "--lr 0.0: it must be a number above 0",
    "--lr 1e38": "--lr 1e+38: it must be a number above 0, below 1e30",
    "--yopo 5": "5 is not of the form M-N; write it as 5-3",
    "--batch-size 99999999999999999999": "--batch-size 99999999999999999999: it is too large",
    "--micro-batch 2 --method free": "--micro-batch 2: --method free takes a batch at once",
    "--dataset cifar10 --data-dir EMPTY": "cifar-10-batches-py is not there, and could not be",
    "--dataset mnist --data-dir EMPTY": "MNIST is not there, and could not be downloaded (no net",
    "--dataset cifar10 --data-dir BROKEN": "cifar-10-batches-py is incomplete or damaged",
    "--dataset mnist --data-dir BROKEN": "MNIST is incomplete or damaged",
    "--dataset tiny-imagenet --data-dir EMPTY": "no Tiny-ImageNet there",
    "--dataset tiny-imagenet --data-dir BROKEN --classes 2": "has the images of 1 classes",
    "--patch-size 5": "--patch-size 5: it does not divide an image of 32 x 32 pixels",
    "--ads --control mlp": "--control mlp: it stands in the place of --ads relu; give one of them",
    "--d-state 63": "--d-state 63: s4 stores conjugate pairs; give an even number",
    "--device cuda:99": "--device cuda:99: there is no such device here",
    "--device tpu9": "--device tpu9: there is no such device here",
    "--device meta": "--device meta: there is no such device here",
    "--attacks clean,magic": "--attacks magic: no such attack",
    "--attacks pgd-\u00b2": "--attacks pgd-\u00b2: no such attack",
    "--attacks pgd-1x1000000000000": "--attacks pgd-1x1000000000000: no such attack",
    "--attacks pgd-official": "--attacks pgd-official: it stands for comparison only",
    "--dataset synthetic --train-size 20000": "--train-size 20000: synthetic has 10000 such images",
    "--dataset synthetic --eval-train 20000": "--eval-train 20000: there are 6000 training images",
    "--dataset synthetic --out FILE/run": "cannot be written",
    "--dataset synthetic --out OTHER": "--out OTHER holds another run (config.json)",
    "--resume NOWHERE": "there is no such file or folder",
    "--resume FILE": "this is damaged, or no checkpoint of this program",
    "--resume OTHER": "--resume OTHER: it has config.json, but no last.pt to go on from",
    "--resume EMPTY": "--resume EMPTY: there is no run in this folder",
    "--resume EMPTY --out OTHER": "--out OTHER: a run goes on in its own folder, EMPTY; leave",
    "--resume OTHER --checks": "unrecognized arguments: --checks",
    "--checks": "unrecognized arguments: --checks",
    "--lengths 64": "unrecognized arguments: --lengths 64",
    "--colour blue": "unrecognized arguments: --colour blue",
    "--data-dir=": "--data-dir is empty; give a value, or leave it out",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence_exit_code_2_and_nothing_is_written(
        words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "HELD_OUT", 1000)
    monkeypatch.setattr(train, "torchvision_data", train.torchvision_data.__wrapped__)
    for folder in ("EMPTY", "BROKEN/cifar-10-batches-py", "BROKEN/MNIST/raw", "OTHER",
                   "BROKEN/tiny-imagenet-200/train/n01/images", "BROKEN/tiny-imagenet-200/val"):
        Path(folder).mkdir(parents=True)
    for file in ("FILE", "OTHER/config.json", "BROKEN/cifar-10-batches-py/test_batch",
                 "BROKEN/MNIST/raw/train-images-idx3-ubyte",
                 "BROKEN/tiny-imagenet-200/val/val_annotations.txt"):
        Path(file).write_text("{}")
    Path("BROKEN/tiny-imagenet-200/wnids.txt").write_text("n01\nn02\n")
    if "EMPTY" in words and "--dataset" in words:
        datasets = pytest.importorskip("torchvision.datasets")
        for kind in ("MNIST", "CIFAR10"):
            monkeypatch.setattr(getattr(datasets, kind), "download", no_network)
    before = sorted(tmp_path.rglob("*"))
    assert train.main(words.split()) == 2
    captured = capsys.readouterr()
    assert BAD[words] in captured.err and captured.err.startswith("train.py: ")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before and Path("OTHER/config.json").read_text() == "{}"


def no_network(dataset):
    raise RuntimeError("no network")


def test_resume_refuses_a_flag_that_contradicts_the_run(tmp_path, capsys):
    assert trains(tmp_path / "run", *TINY) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert train.main(["--resume", str(tmp_path / "run"), "--model", "dss"]) == 2
    assert "--model dss" in (err := capsys.readouterr().err) and "was trained with s4" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_run_that_was_begun_on_the_cpu_goes_on_there(tmp_path, monkeypatch):
    c, given = settings("--dataset", "synthetic", "--out", "x"), {"resume": str(tmp_path)}
    (tmp_path / "last.pt").touch()
    for begun, here in (("cpu", "cpu"), ("cuda", "cuda:1")):
        state = {"optimizer": {}, "config": vars(c) | {"device": begun}}
        monkeypatch.setattr(train, "read_checkpoint", lambda path, flag: state)
        c.resume, c.device = str(tmp_path), "cuda:1"
        assert train.resumed(c, given)[0].device == here
        assert train.resumed(c, given | {"device": "cuda:1"})[0].device == "cuda:1"


def test_a_run_is_not_begun_beside_the_evaluation_of_another(tmp_path, capsys):
    (tmp_path / "best-evaluation.json").write_text("{}")
    assert trains(tmp_path, *TINY) == 2
    assert "holds another run (best-evaluation.json)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["best-evaluation.json"]


def test_what_does_not_fit_into_memory_is_said_and_leaves_no_run(tmp_path, monkeypatch, capsys):
    def too_large(c):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 EB\nat x.cpp")
    monkeypatch.setattr(train, "build", too_large)
    assert trains(tmp_path / "run", *TINY) == 2
    err = capsys.readouterr().err
    assert "memory does not suffice" in err and "--micro-batch" in err and err.count("\n") == 1
    assert not any((tmp_path / "run" / file).exists() for file in train.RUN_FILES)


def test_a_defect_is_not_called_a_lack_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda c: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trains(tmp_path / "run", *TINY)


def test_two_processes_cannot_share_a_run(tmp_path):
    with train.lock(tmp_path):
        with pytest.raises(train.UserError, match="another process is training there"):
            with train.lock(tmp_path):
                pass
    with train.lock(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_help_states_every_flag_with_its_default_and_names_the_jobs(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    p = train.Parser("")
    defaults = train.add_flags(p)
    assert end.value.code == 0 and text.count("(default: ") == len(defaults)
    assert all(option in text for action in p._actions for option in action.option_strings)
    assert all(f"{job} " in text for job in train.JOBS)


@pytest.mark.parametrize("job", train.JOBS)
def test_help_beside_a_job_shows_that_job_s_flags(job, monkeypatch, capsys):
    parsers = []
    real = train.Parser.given
    monkeypatch.setattr(train.Parser, "given",
                        lambda parser, words: parsers.append(parser) or real(parser, words))
    with pytest.raises(SystemExit) as end:
        train.main([job, "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "--epochs" not in text
    for action in parsers[-1]._actions:
        assert all(word in text for word in [*action.option_strings, *action.help.split()])
    assert job in text and len(parsers[-1]._actions) > 1


def test_without_lab_a_job_is_refused_and_training_is_not(tmp_path):
    for file in ("train.py", "ads.py", "s4_adv.py", "mamba_adv.py", "attention_adv.py"):
        (tmp_path / file).write_bytes((HERE / file).read_bytes())
    tiny = [*TINY, "--train-size", "16", "--dataset", "synthetic", "--device", "cpu"]
    needing = [*([job, "x"] for job in train.JOBS), [*tiny, "--attacks", "clean,aa"],
               [*tiny, "--model", "cnn"],
               [*tiny, "--dataset", "tiny-imagenet", "--patch-size", "16"]]
    code = f"import train\nprint([train.main(words) for words in {[*needing, tiny]}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True)
    told = done.stderr.splitlines()
    assert len(told) == len(needing) and done.stdout.endswith(f"{[2] * len(needing) + [0]}\n")
    for line in told:
        assert re.search(r"--(\w+|attacks aa|model cnn|dataset tiny-\w+) needs the folder lab/",
                         line), line
    assert "Best (epoch 1)" in done.stdout
