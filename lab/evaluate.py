# SPDX-License-Identifier: MIT
"""--evaluate: attack a checkpoint; accuracies with their intervals, per-image outcomes, transfer.

    python train.py --evaluate runs/NAME/best.pt --attacks clean,fgsm,pgd-50x5,aa
    python train.py --evaluate runs/NAME/best.pt --checks --eps-sweep 0,4/255,8/255 --images

Tables are printed, and lie beside the checkpoint as CSV and JSON. The JSON also keeps which images
survive an attack, so that two models can be compared on the same images (`mcnemar`). It keeps what
earlier evaluations found of the same weights. An evaluation that was cut goes on by its command.

Papers     AutoAttack  Croce & Hein 2020, arXiv 2003.01690; its flags stand in its documentation
Glossary   spec   name of an attack, as --attacks takes it
           stage  one attack of an ensemble: "aa: square"
"""
import functools
import hashlib
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import ads
import attention_adv
import mamba_adv
import s4_adv
import train
from lab import autoattack, checks, figures

COLUMNS = ("attack", "accuracy", "low", "high", "n", "seconds", "eps", "alpha", "seed", "source")
UPPER_BOUND = ("Square improved on the white-box attacks: this AutoAttack accuracy is an upper "
               "bound, and the gradients mislead")


def main(words):
    """The job: exit code 1 if a check fails, else 0."""
    c, state = settings(words)
    model = train.load_model(c, state, c.evaluate)
    source = None
    if c.transfer_from:
        source = read_source(c)
    weights = digest(*state["model"].values())
    stem = Path(c.evaluate) / "last.pt" if Path(c.evaluate).is_dir() else Path(c.evaluate)
    stem = stem.with_suffix("")
    asked = [job for job in ("checks", "eps_sweep", "steps_sweep", "transfer_from", "images")
             if getattr(c, job)]
    report = "evaluation" if c.attacks else "-".join(asked).replace("_", "-")
    file = stem.with_name(f"{stem.name}-{report}.json")
    before = read_report(file, weights)                                     # before the work
    images, labels = train.load_data(c)["test"]
    kept = Kept(stem, images, labels, weights, c)
    train.say(f"{c.evaluate}: epoch {state['epoch']}, {c.dataset} test, eps {train.show(c.eps)}, "
              f"alpha {train.show(c.alpha)}, seed {c.seed}")
    rows = measure_all(model, images, labels, c, kept, source, stem)
    if c.images:
        figures.draw_images(model, images[:8], labels[:8], c, stem)
    checked = checks.check_gradients(model, images, labels, c) if c.checks else []
    again = [identity(row) for row in rows]
    rows = [row for row in before["rows"] if identity(row) not in again] + rows
    if train.rank() == 0:
        if rows:
            columns = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
            train.write_csv(file.with_suffix(".csv"), columns)
        train.write(file, json.dumps({
            "checkpoint": stem.name + ".pt", "epoch": state["epoch"], "weights": weights,
            "rows": rows, "checks": checked or before["checks"], "config": vars(c),
            **train.machine(c)}, indent=1))
    kept.path.unlink(missing_ok=True)
    return int(not all(check["passed"] for check in checked))


def settings(words):
    """c, the run's settings with what was given, and the checkpoint's state."""
    p = train.new_parser("Attack a checkpoint: accuracies on the test images.")
    p.add_argument("--evaluate", metavar="CKPT", required=True,
                   help="a checkpoint, or a run's folder: its last.pt")
    p.add_argument("--checks", action="store_true",
                   help="look for masked gradients, on 200 images; exit code 1 if found")
    p.add_argument("--eps-sweep", type=train.fractions, metavar="E,E",
                   help="each attack of --attacks, or pgd-10, at these radii (default: none)")
    p.add_argument("--steps-sweep", type=train.counts, metavar="K,K",
                   help="PGD with these numbers of steps (default: none)")
    p.add_argument("--transfer-from", metavar="CKPT",
                   help="pgd-10 and fgsm, pgd-K of --attacks, made on this other model")
    p.add_argument("--images", action="store_true",
                   help="draw eight images, their perturbations and adversarial images")
    train.add_flags(p, "data_dir eps alpha test_size batch_size attacks seed device")
    given = p.given(words)
    state = train.read_checkpoint(given["evaluate"], "--evaluate")
    jobs = dict.fromkeys(("checks", "eps_sweep", "steps_sweep", "transfer_from", "images"))
    defaults = train.add_flags(train.new_parser(""))
    own = {"device": None, "test_size": None, "train_size": None, "eval_train": 0,
           "data_dir": defaults["data_dir"], "precision": "fp32"}
    config = defaults | state["config"] | own | jobs
    c = SimpleNamespace(**config)
    if "eps" in given:
        c = train.at_radius(c, given["eps"])
    c = SimpleNamespace(**vars(c) | given)
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "attacks" not in given and any(getattr(c, job) for job in jobs):
        c.attacks = []
    known = [spec for spec in c.attacks if spec != "pgd-official"]
    train.check(SimpleNamespace(**vars(c) | {"attacks": known}))
    if any(not 0 <= eps <= 1 for eps in c.eps_sweep or ()):
        raise train.UserError(f"--eps-sweep {c.eps_sweep}: radii must lie in [0, 1], pixel units; "
                              "8/255, not 8")
    for steps in c.steps_sweep or ():
        attacks_named(f"pgd-{steps}", c)
    if c.checks and (not c.eps or c.classes < 4):
        raise train.UserError(f"--checks need an eps above 0 and 4 classes; here are eps "
                              f"{train.show(c.eps)} and {c.classes} classes")
    return c, state


def read_source(c):
    """The checkpoint of --transfer-from.  UserError if it is of other images."""
    state = train.read_checkpoint(c.transfer_from, "--transfer-from")
    for key in ("dataset", "classes"):
        if state["config"][key] != getattr(c, key):
            raise train.UserError(f"--transfer-from {c.transfer_from}: its {key} is "
                                  f"{state['config'][key]}, and that of {c.evaluate} "
                                  f"{getattr(c, key)}; give a model of the same images")
    return state


# --------------------------------------------------------------------------------------------------
# Attacks, and what they leave
# --------------------------------------------------------------------------------------------------

def pgd_official(model, x, y, eps, alpha, steps=10):
    """PGD as in the paper's published code, never used here but for comparison.

        d_0 uniform,  x_0 = clamp(x + d_0),  d <- clip(d + alpha sign grad_d CE(clamp(x_0 + d)))

    Arguments, result and errors as pgd. The start is added twice, so that gradients are taken up to
    2 eps from x; the clamp to [0, 1] lies inside the graph, so that a pixel beyond it never moves.
    """
    @autoattack.attack
    def search(model, x, y, eps):
        d = eps * (2 * torch.rand_like(x) - 1)
        start = (x + d).clamp(0, 1)
        cross_entropy = functools.partial(F.cross_entropy, reduction="none")
        for _ in range(steps):
            _, _, grad = autoattack.differentiate(lambda d: model((start + d).clamp(0, 1)), d,
                                                  cross_entropy, y)
            d = (d + alpha * grad.sign()).clamp(-eps, eps)
        return (x + d).clamp(0, 1)
    return search(model, x, y, eps)


def attacks_named(spec, c):
    """train.attacks_of, and the authors' own PGD."""
    if spec == "pgd-official":
        return [lambda model, x, y: pgd_official(model, x, y, c.eps, c.alpha)]
    return train.attacks_of(spec, c)


def measure_all(model, images, labels, c, kept, source, stem):
    """The rows of --attacks, --eps-sweep, --steps-sweep and --transfer-from; sweeps are drawn.

    source  dict or None  the checkpoint of --transfer-from: it is attacked, the model measured
    """
    table = functools.partial(measure, model, images, labels, kept=kept)
    attacks = [spec for spec in c.attacks if spec != "clean"]
    rows = []
    if c.attacks:
        rows += table([(spec, spec, c) for spec in c.attacks])
    if c.eps_sweep:
        lines = []
        for spec in attacks or ["pgd-10"]:
            for eps in c.eps_sweep:
                lines.append((f"{spec}, eps {train.show(eps)}", spec, train.at_radius(c, eps)))
        swept = table(lines)
        rows += swept
        figures.draw_sweep(stem, "eps", [row for row in swept if ": " not in row["attack"]])
    if c.steps_sweep:
        swept = table([(f"pgd-{k}", f"pgd-{k}", c) for k in c.steps_sweep])
        rows += swept
        figures.draw_sweep(stem, "steps", [row | {"attack": "pgd", "steps": k}
                                           for row, k in zip(swept, c.steps_sweep)])
    if source:
        # AutoAttack's attacks stop as soon as the source errs, which says little of this model.
        gradual = [spec for spec in attacks if spec.startswith(("fgsm", "pgd-"))]
        specs = dict.fromkeys(["pgd-10", *gradual])
        rows += table([(f"transfer: {spec}", spec, c) for spec in specs],
                      source=train.load_model(c, source, c.transfer_from),
                      source_weights=digest(*source["model"].values()))
    return rows


def measure(model, images, labels, lines, kept, source=None, source_weights=""):
    """Prints and returns a row for each (label, spec, settings) of lines, and one for each stage of
    an ensemble; source as in train.survivors."""
    train.say(f"\n{'attack':24} {'accuracy':>9}   95 % interval        n   seconds")
    kind = "transfer: " if source else ""
    place = ("transfer", source_weights) if source else "evaluate"
    rows = []
    for label, spec, c in lines:
        start = time.monotonic()
        attacks = attacks_named(spec, c)
        right = train.survivors(model, images, labels, spec, attacks, c, place, kept, source)
        seconds = round(time.monotonic() - start, 1)
        stages = [f": {name}" for name in autoattack.ENSEMBLES.get(spec, ())]
        for stage, survived in zip([*stages, ""], [*right[1:len(stages) + 1], right[-1]]):
            low, high = interval(int(survived.sum()), len(survived))
            rows.append({"attack": kind + spec + stage, "accuracy": float(survived.double().mean()),
                         "low": low, "high": high, "n": len(survived),
                         "seconds": None if stage else seconds, "eps": c.eps, "alpha": c.alpha,
                         "seed": c.seed, "source": source_weights, "survivors": to_hex(survived)})
            print_row(label + stage, rows[-1])
        if spec == "aa" and not torch.equal(right[-1], right[-2]):
            rows[-1]["upper_bound"] = True
    if any("upper_bound" in row for row in rows):
        train.say(UPPER_BOUND)
    return rows


def print_row(label, row):
    seconds = "" if row["seconds"] is None else f"  {row['seconds']:8.1f}"
    train.say(f"{label:24} {row['accuracy']:9.2%}  {row['low']:7.2%} - {row['high']:.2%}  "
              f"{row['n']:7,}{seconds}")


# --------------------------------------------------------------------------------------------------
# Shares of images, and two models on the same images
# --------------------------------------------------------------------------------------------------

def interval(right, n, z=1.959964):
    """95 % interval of a share.                                                    Wilson 1927"""
    p = right / n
    shrink = 1 / (1 + z * z / n)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(shrink * (centre - half), 0.0), min(shrink * (centre + half), 1.0)


def to_hex(survived):
    """(n,) bool -> n bits as hex, image 0 in the highest bit of the first digit, padded by 0."""
    bits = "".join("1" if right else "0" for right in survived.tolist())
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[i:i + 4], 2):x}" for i in range(0, len(bits), 4))


def survivors_of(row):
    """[bool] of a row: which images are still right.  KeyError, ValueError if it does not say."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in row["survivors"])
    if not 0 <= len(bits) - row["n"] < 4:
        raise ValueError("another number of bits than images")
    return [bit == "1" for bit in bits[:row["n"]]]


def mcnemar(a, b):
    """Exact two-sided p of: on the images that one of two models alone gets right, each has them as
    often.   a, b: [bool] on the same images.                                       McNemar 1947"""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n
    return min(1.0, 2 * tail)


def paired_interval(a, b, z=1.959964):
    """Difference of the shares of a and b, [bool] on the same images, and its 95 % interval.

    Wald's interval with 1/2 added to each cell of the 2 x 2 table.        Agresti and Min 2005, (4)
    """
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    gap = (only_a - only_b) / (n + 2)
    half = z * math.sqrt(only_a + only_b + 1 - (only_a - only_b) ** 2 / (n + 2)) / (n + 2)
    return (only_a - only_b) / n, gap - half, gap + half


# --------------------------------------------------------------------------------------------------
# What was measured before
# --------------------------------------------------------------------------------------------------

def digest(*parts):
    """16 characters that stand for tensors, and for anything that says in words what it is."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.cpu().numpy().tobytes() if torch.is_tensor(part) else repr(part).encode())
    return h.hexdigest()[:16]


def identity(row):
    """What makes two rows the same measurement."""
    return [row.get(key, "") for key in ("attack", "eps", "alpha", "n", "seed", "source")]


def read_report(file, weights):
    """Rows and checks of an earlier report on the same weights.  UserError if it is damaged."""
    if not file.exists():
        return {"rows": [], "checks": []}
    try:
        report = json.loads(file.read_text())
        for row in report["rows"]:
            identity(row)
        if report["weights"] == weights:
            return {"rows": list(report["rows"]), "checks": list(report["checks"])}
        return {"rows": [], "checks": []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise train.UserError(f"{file}: an earlier evaluation that is damaged, and would be "
                              "replaced; move it away, or mend it") from None


class Kept(dict):
    """{batch of an attack: which images survive}, also as lines of a file, which outlives a cut.

    The file's name stands for all that its lines depend on: weights, images, settings, code.
    """

    def __init__(self, stem, images, labels, weights, c):
        super().__init__()
        code = [Path(module.__file__).read_bytes() for module in (
            train, ads, s4_adv, mamba_adv, attention_adv, autoattack, checks)]
        code.append(Path(__file__).read_bytes())
        what = digest(images, labels, weights, code, c.seed, c.batch_size, c.device, train.world(),
                      torch.__version__, c.eps, c.alpha, c.attacks, c.eps_sweep, c.steps_sweep,
                      c.transfer_from)
        self.path = stem.with_name(f"{stem.name}-{what}-{train.rank()}.part")
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for line in lines:
            try:
                key, rows = json.loads(line)
                super().__setitem__(key, torch.tensor(rows) == 1)
            except (ValueError, TypeError, RuntimeError):                   # half a line: the cut
                pass

    def __setitem__(self, key, survived):
        super().__setitem__(key, survived)
        try:
            with open(self.path, "a") as f:
                f.write("\n" + json.dumps([key, survived.int().tolist()]))
        except OSError as e:
            raise train.UserError(f"cannot write {self.path} ({e.strerror}); copy the checkpoint "
                                  "to a folder with room, and evaluate it there") from e
