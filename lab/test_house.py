# SPDX-License-Identifier: MIT
"""The house rules: who imports whom, how long a file may be; README's code, links and commands."""
import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from lab.evaluate import survivors_of
from test_all import DATA, HERE

FLOORS = [["ads"], ["s4_adv", "mamba_adv", "attention_adv"], ["train"]]

# Lines at most. A file that outgrows its budget is split or shortened; a budget only falls.
BUDGETS = {"README.md": 130, "ads.py": 95, "s4_adv.py": 693, "mamba_adv.py": 545,
           "attention_adv.py": 543, "train.py": 1360, "test_all.py": 1000,
           "lab/autoattack.py": 373, "lab/evaluate.py": 366, "lab/checks.py": 146,
           "lab/theory.py": 200, "lab/certificate.py": 105, "lab/analyse.py": 352,
           "lab/bench.py": 286, "lab/peers.py": 100, "lab/figures.py": 266, "lab/tables.py": 224,
           "lab/triton_scan.py": 135, "lab/baselines.py": 120,
           "lab/steps.py": 70, "lab/floor.py": 75,
           "lab/tiny_imagenet.py": 85,
           "lab/attack_figure.py": 70}


def imports(path):
    """The modules that a file imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_scripts_import_ads_alone_train_the_scripts_and_none_of_them_lab():
    below = set()
    for floor in FLOORS:
        for name in floor:
            found = imports(HERE / f"{name}.py")
            own = {m for m in found if (HERE / f"{m}.py").exists()}
            assert own - {name} <= below, name
            lab = {m for m in found if m.partition(".")[0] == "lab"}        # Mamba's, in a try
            assert lab == ({"lab.triton_scan"} if name == "mamba_adv" else set()), name
        below |= set(floor)


def test_importing_train_loads_nothing_of_lab():
    code = ("import sys, train\n"
            "print([m for m in sys.modules if m.startswith('lab') and m != 'lab.triton_scan'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True)
    assert done.stdout.strip() in ("[]", "['lab']"), done.stdout + done.stderr


def test_no_file_outgrows_its_budget():
    others = {str(f.relative_to(HERE)): 600 for f in (HERE / "lab").glob("*.py")}
    for name, most in (others | BUDGETS).items():
        if (HERE / name).exists():
            assert (n := len((HERE / name).read_text().splitlines())) <= most, (name, n)


def findings():
    """results/README.md, or a skip where the code was copied without it."""
    if not (HERE / "results" / "README.md").exists():
        pytest.skip("no results/ beside the code")
    return (HERE / "results" / "README.md").read_text()


def test_the_tables_of_results_are_what_their_command_prints(monkeypatch, capsys):
    text = findings()
    monkeypatch.chdir(HERE / "results")
    assert "python ../train.py --table NAME/* > NAME.md`" in text
    names = sorted(path.stem for path in Path().glob("*.md") if path.stem != "README")
    assert len(names) > 8
    for name in names:
        assert train.main(["--table", *sorted(str(run) for run in Path(name).iterdir())]) == 0
        assert capsys.readouterr().out == Path(f"{name}.md").read_text()
        assert f"({name}.md)" in text


def test_the_readme_states_the_lines_of_each_file():
    text = (HERE / "README.md").read_text()
    found = re.findall(r"^\| \[(\w+\.py)\].*? \| ([\d,]+) \|", text, re.M)
    assert len(found) == 6
    for name, n in found:
        assert int(n.replace(",", "")) == len((HERE / name).read_text().splitlines()), name


def test_the_code_to_copy_runs(tmp_path):
    """README's ten lines, in a folder with two files, on random images."""
    code, = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    for file in ("ads.py", "s4_adv.py"):
        (tmp_path / file).write_bytes((HERE / file).read_bytes())
    (tmp_path / "own.py").write_text(code + """
torch.manual_seed(0)
batch = [(torch.rand(4, 3, 32, 32), torch.arange(4))]
losses = []
for epochs in (1, 4):
    torch.manual_seed(1)
    losses.append(pgd_at_loss(train(batch, epochs), *batch[0], 8 / 255, 2 / 255, steps=10).item())
assert losses[1] < losses[0], losses
""")
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


CHECKPOINTS = sorted((HERE / "results").rglob("best.pt"))


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_a_checkpoint_of_results_classifies_test_images_as_its_evaluation_records(path):
    kept = json.loads(path.with_name("best-evaluation.json").read_text())
    row = next(row for row in kept["rows"] if row["attack"] == "clean" and "survivors" in row)
    folder = {"mnist": "MNIST", "cifar10": "cifar-10-batches-py"}[kept["config"]["dataset"]]
    if DATA is None or not (DATA / folder).exists():
        pytest.skip(f"no {folder} in SSM_ADV_DATA, ../shared/data or ./data")
    *_, x, y = train.torchvision_data(kept["config"]["dataset"], str(DATA))
    with torch.no_grad():
        right = train.load(path)(x[:20] / 255).argmax(1) == y[:20]
    assert right.tolist() == survivors_of(row)[:20]


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_link_of_a_readme_leads_somewhere(name):
    findings()
    found = re.findall(r"\]\(((?!http)[^)]+)\)", (HERE / name).read_text())
    assert len(found) > 12
    for link in found:
        path, _, heading = link.partition("#")
        assert (goal := (HERE / name).parent / path if path else HERE / name).exists(), link
        slugs = [re.sub(r"[^\w -]", "", line.lstrip("# ")).replace(" ", "-").lower()
                 for line in (goal.read_text().splitlines() if heading else ())
                 if line.startswith("#")]
        assert not heading or heading in slugs, link


def test_every_command_of_the_readme_has_flags_that_its_job_knows(monkeypatch):
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"^(?:torchrun .* )?(?:python )?train\.py (.*)$", text, re.M)
    inline = re.findall(r"`(?:OMP_NUM_THREADS=1 )?python\s+train\.py\s([^`]*)`", text)
    assert len(commands) >= 6 and any("--bench" in command for command in commands)
    parsed = []

    def stop(parser, words):
        parsed.append(real(parser, words))
        raise train.UserError("parsed")
    real = train.Parser.given
    monkeypatch.setattr(train.Parser, "given", stop)
    for command in commands + inline:
        words = command.replace("MODEL", "mamba").replace("-size N", "-size 4")
        words = shlex.split(words, comments=True)
        parsed.clear()
        assert train.main(words) == 2 and len(parsed) == 1, command     # no flag is unknown
