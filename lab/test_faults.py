# SPDX-License-Identifier: MIT
"""What stands in a file, in the environment or in a folder and is not what it should be."""
import os
import threading
import time

import pytest
import torch

import train
from test_all import TINY, seeded, trains


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
        found[path] = None if path.is_dir() else path.read_bytes()
        if path.is_symlink():
            found[path] = os.readlink(path)
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
    assert f"--steps-sweep {number}: an attack has fewer than 10^6 steps" in message
