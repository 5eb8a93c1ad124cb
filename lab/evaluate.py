# SPDX-License-Identifier: MIT
"""--evaluate: attack a checkpoint; accuracies with their intervals, per-image outcomes, transfer.

    python train.py --evaluate runs/NAME/best.pt --attacks clean,fgsm,pgd-50x5,aa
    python train.py --evaluate runs/NAME/best.pt --checks --eps-sweep 0,4/255,8/255 --images

Tables are printed, and lie beside the checkpoint as CSV and JSON. The JSON also keeps which images
survive an attack, so that two models can be compared on the same images (`mcnemar`). It keeps what
earlier evaluations found of the same weights. An evaluation that was cut goes on by its command.

Papers     AutoAttack  Croce & Hein 2020, arXiv 2003.01690; flags_doc.md of its repository
Glossary   spec   name of an attack, as --attacks takes it
           stage  one attack of an ensemble: "aa: square"
"""
import argparse
import hashlib
import json
import math
import os
import time
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import s4_adv
import train
from lab import autoattack, checks, figures

# What else is asked for, beside or without --attacks.
MORE = ("checks", "eps_sweep", "steps_sweep", "transfer_from", "images")
# What may differ from the settings of the checkpoint.
FREE = ("evaluate", *MORE, "data_dir", "device", "eps", "alpha", "attacks", "test_size",
        "batch_size", "seed")
COLUMNS = ("attack", "accuracy", "low", "high", "n", "seconds", "eps", "alpha", "seed", "source")
UPPER_BOUND = "Square improved on the white-box attacks: this AutoAttack accuracy is an upper bound"


def main(words):
    """The job: exit code 1 if a check fails, else 0."""
    c, state = settings(words)
    model = train.load_model(state, c.evaluate, c.device)
    source = load_source(c) if c.transfer_from else None
    weights = digest(*state["model"].values())
    path = state["path"]
    stem = path.with_suffix("")
    asked = [name for name in MORE if getattr(c, name)]
    report = "evaluation" if c.attacks else "-".join(asked).replace("_", "-")
    file = stem.with_name(f"{stem.name}-{report}.json")
    before = read_report(file, weights)         # a damaged one is refused before the work
    probe(stem.parent)
    images, labels = train.load_data(c)["test"]
    kept = Kept(stem, images, labels, weights, c)
    train.say(f"{c.evaluate}: epoch {state['epoch']}, {c.dataset} test, eps {train.show(c.eps)}, "
              f"alpha {train.show(c.alpha)}, seed {c.seed}")
    rows = measure_all(model, images, labels, c, kept, source, stem)
    if c.images:
        figures.draw_images(model, images[:8], labels[:8], c, stem)
    checked = checks.check_gradients(model, images, labels, c) if c.checks else []
    # Of one measurement the last row stays.
    rows = list({identity(row): row for row in before["rows"] + rows}.values())
    if rows:
        columns = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
        train.write_csv(file.with_suffix(".csv"), columns)
    train.write(file, json.dumps({
        "checkpoint": path.name, "epoch": state["epoch"], "weights": weights, "rows": rows,
        "checks": checked or before["checks"], "config": vars(c), **train.machine(c)}, indent=1))
    kept.path.unlink(missing_ok=True)
    return int(not all(check["passed"] for check in checked))


def probe(folder):
    """UserError if nothing can be written into a folder: that is said before the work."""
    path = folder / f".probe-{os.getpid()}"
    try:
        open(path, "a").close()
        os.unlink(path)
    except OSError as e:
        raise train.UserError(f"cannot write into {folder} ({e.strerror}); make room, or copy the "
                              "checkpoint to another folder") from e


def counts(text):
    """'1,5,10' -> [1, 5, 10]."""
    if not all(v.isdecimal() and len(v) <= 6 for v in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is no list of whole numbers below 10^6; write it "
                                         "as 1,5,10")
    return [int(v) for v in text.split(",")]


def settings(words):
    """The settings c, and the checkpoint's state.  UserError for what cannot be measured."""
    p = train.Parser("Attack a checkpoint: accuracies on the test images.")
    p.add_argument("--evaluate", metavar="CKPT", required=True,
                   help="a checkpoint, or a run's folder: its last.pt")
    train.add_flags(p, "data_dir eps alpha test_size batch_size attacks seed device")
    p.add_argument("--checks", action="store_true",
                   help="look for masked gradients, on 200 images; exit code 1 if found")
    p.add_argument("--eps-sweep", type=train.fractions, metavar="E,E",
                   help="each attack of --attacks, or pgd-10, at these radii (default: none)")
    p.add_argument("--steps-sweep", type=counts, metavar="K,K",
                   help="PGD with these numbers of steps (default: none)")
    p.add_argument("--transfer-from", metavar="CKPT",
                   help="measure pgd-10, and fgsm, pgd-K of --attacks, made on this other model")
    p.add_argument("--images", action="store_true",
                   help="draw eight images, their perturbations and adversarial images")
    p.epilog = """What is not given is the checkpoint's, but for --device; --test-size is all.
--attacks also takes pgd-official, the attack of the paper's published code.
Beside one of the last five flags --attacks is none unless given."""
    given = {"test_size": None} | p.given(words)
    state = train.read_checkpoint(given["evaluate"], "--evaluate")
    c = train.settings(given, train.add_flags(train.Parser("")) | dict.fromkeys(MORE))
    c = train.checkpoint_settings(c, given, state, c.evaluate, FREE)
    c.precision = "fp32"                        # training alone has another
    if "attacks" not in given and any(getattr(c, name) for name in MORE):
        c.attacks = []
    specs = [spec for spec in c.attacks if spec != "pgd-official"]
    train.check(SimpleNamespace(**vars(c) | {"attacks": specs}))
    for eps in c.eps_sweep or ():
        if not 0 <= eps <= 1:
            raise train.UserError(f"--eps-sweep {train.show(eps)}: radii must lie in [0, 1], pixel "
                                  "units; 8/255, not 8")
    if c.checks and (not c.eps or c.classes < 4):
        raise train.UserError(f"--checks need an eps above 0 and 4 classes; here are eps "
                              f"{train.show(c.eps)} and {c.classes} classes")
    return c, state


def load_source(c):
    """The model of --transfer-from.  UserError if it is of other images."""
    state = train.read_checkpoint(c.transfer_from, "--transfer-from")
    for key in ("dataset", "classes"):
        if state["config"][key] != getattr(c, key):
            raise train.UserError(f"--transfer-from {c.transfer_from}: its {key} is "
                                  f"{state['config'][key]}, and that of {c.evaluate} "
                                  f"{getattr(c, key)}; give a model of the same images")
    return train.load_model(state, c.transfer_from, c.device)


# ---- Attacks, and what they leave ----------------------------------------------------------------

@autoattack.attack
def pgd_official(model, x, y, eps, alpha, steps=10):
    """PGD as in the paper's published code, never used here but for comparison.

        d_0 uniform,  x_0 = clamp(x + d_0),  d <- clip(d + alpha sign grad_d CE(clamp(x_0 + d)))

    Arguments, result and errors as pgd. The start is added twice, so that gradients are taken up to
    2 eps from x; the clamp to [0, 1] lies inside the graph, so that a pixel beyond it never moves.
    """
    d = eps * (2 * torch.rand_like(x) - 1)
    start = (x + d).clamp(0, 1)
    loss = partial(F.cross_entropy, reduction="none")

    def logits(d):
        return model((start + d).clamp(0, 1))
    for _ in range(steps):
        _, _, grad = autoattack.differentiate(logits, d, loss, y)
        d = (d + alpha * grad.sign()).clamp(-eps, eps)
    if eps > 0 and steps > 0:
        s4_adv.tell_zero_gradients(model, grad)
    return (x + d).clamp(0, 1)


def attacks_named(spec, c):
    """train.attacks_of, and the published attack."""
    if spec == "pgd-official":
        return [partial(pgd_official, eps=c.eps, alpha=c.alpha)]
    return train.attacks_of(spec, c)


def measure_all(model, images, labels, c, kept, source, stem):
    """The rows of --attacks, --eps-sweep, --steps-sweep and --transfer-from; sweeps are drawn."""
    table = partial(measure, model, images, labels, kept)
    attacks = [spec for spec in c.attacks if spec != "clean"]
    rows = []
    if c.attacks:
        rows += table(c.attacks, [c])
    if c.eps_sweep:
        swept = table(attacks or ["pgd-10"], [train.at_radius(c, eps) for eps in c.eps_sweep],
                      label="{spec}, eps {eps}")
        rows += swept
        figures.draw_sweep(stem, "eps", [row for row in swept if ": " not in row["attack"]])
    if c.steps_sweep:
        swept = table([f"pgd-{steps}" for steps in c.steps_sweep], [c])
        rows += swept
        figures.draw_sweep(stem, "steps", [row | {"attack": "pgd", "steps": steps}
                                           for row, steps in zip(swept, c.steps_sweep)])
    if source:
        # AutoAttack's attacks stop as soon as the source errs, which says little of this model.
        gradual = [spec for spec in attacks if spec.startswith(("fgsm", "pgd-"))]
        rows += table(dict.fromkeys(["pgd-10", *gradual]), [c], "transfer: {spec}", source)
    return rows


def measure(model, images, labels, kept, specs, variants, label="{spec}", source=None):
    """Prints a table, and returns its rows: one for each stage of an ensemble, then its own.

    kept      Kept            batches that an evaluation before this one finished
    variants  [c]             each attack is measured with each of these settings
    label     str             how a line of the table is named
    source    Module or None  what is attacked, where that is another model than what is measured
    """
    weights = digest(*source.state_dict().values()) if source else ""
    place = ("transfer", weights) if source else "evaluate"
    train.say(f"\n{'attack':24} {'accuracy':>9}   95 % interval        n   seconds")
    rows = []
    for spec, c in product(specs, variants):
        kept.seconds = 0.0
        found = train.survivors(model, images, labels, spec, attacks_named(spec, c), c, place, kept,
                                source)                                     # (1 + attacks, n)
        stages = [f": {name}" for name in autoattack.ENSEMBLES.get(spec, ())]
        for stage, right in [*zip(stages, found[1:]), ("", found[-1])]:
            n = len(right)
            share = float(right.double().mean())
            low, high = interval(int(right.sum()), n)
            seconds = None if stage else round(kept.seconds, 1)
            rows.append({"attack": ("transfer: " if source else "") + spec + stage,
                         "accuracy": share, "low": low, "high": high, "n": n, "seconds": seconds,
                         "eps": c.eps, "alpha": c.alpha, "seed": c.seed, "source": weights,
                         "survivors": to_hex(right)})
            name = label.format(spec=spec, eps=train.show(c.eps)) + stage
            train.say(f"{name:24} {share:9.2%}  {low:7.2%} - {high:.2%}  {n:7,}"
                      + ("" if stage else f"  {seconds:8.1f}"))
        # AutoAttack's own flag: Square, the last stage, broke what the three before it left.
        if spec == "aa" and found[-1].sum() < found[-2].sum():
            rows[-1]["upper_bound"] = True
    if any("upper_bound" in row for row in rows):
        train.say(UPPER_BOUND)
    return rows


# ---- Shares of images, and two models on the same images -----------------------------------------

def interval(right, n, z=1.959964):
    """95 % interval of a share right / n.                                          Wilson 1927"""
    p = right / n
    shrink = 1 / (1 + z * z / n)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding may lead out of [0, 1].
    return max(shrink * (centre - half), 0.0), min(shrink * (centre + half), 1.0)


def to_hex(right):
    """(n,) bool -> n bits as hex, image 0 in the highest bit of the first digit, padded by 0."""
    bits = "".join("1" if ok else "0" for ok in right.tolist()) + "0" * (-len(right) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def survivors_of(row):
    """[bool] of a row: which images are still right.  KeyError, ValueError if it does not say."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in row["survivors"])
    if not 0 <= len(bits) - row["n"] < 4:
        raise ValueError("another number of bits than images")
    return [bit == "1" for bit in bits[:row["n"]]]


def discordant(a, b):
    """How many images a alone has right, and b alone.  ValueError if their lengths differ."""
    pairs = list(zip(a, b, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def mcnemar(a, b):
    """p = min(1, 2 P(X <= min(only_a, only_b))),  X binomial (only_a + only_b, 1/2).   McNemar 1947

    a, b  [bool]  which images two models have right: the same images in the same order

    Exact and two-sided. Small where one model has many more images for itself than the other.
    """
    only_a, only_b = discordant(a, b)
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n)


def paired_interval(a, b, z=1.959964):
    """Difference of the shares of a and b, [bool] as in mcnemar, and the ends of its 95 % interval.

    Wald's interval after 1/2 is added to each cell of the 2 x 2 table: "Wald+2" of Agresti and Min
    2005, Statistics in Medicine 24, 729-740. It ends at -1 and 1.
    """
    only_a, only_b = discordant(a, b)
    n = len(a) + 2
    centre = (only_a - only_b) / n
    half = z * math.sqrt(only_a + only_b + 1 - (only_a - only_b) ** 2 / n) / n
    return (only_a - only_b) / len(a), max(centre - half, -1.0), min(centre + half, 1.0)


# ---- What was measured before --------------------------------------------------------------------

def digest(*parts):
    """16 characters that stand for tensors, and for anything that says in words what it is."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.cpu().numpy().tobytes() if torch.is_tensor(part) else repr(part).encode())
    return h.hexdigest()[:16]


def identity(row):
    """What makes two rows the same measurement."""
    return str([row.get(key, "") for key in ("attack", "eps", "alpha", "n", "seed", "source")])


def read_report(file, weights):
    """Rows and checks of an earlier report, none if it is of other weights.  UserError if it is
    damaged or cannot be read."""
    try:
        report = json.loads(file.read_bytes())
        found = {key: report[key] for key in ("rows", "checks")}
        for row in found["rows"] + found["checks"]:
            row.keys()
        return found if report["weights"] == weights else {"rows": [], "checks": []}
    except FileNotFoundError:
        return {"rows": [], "checks": []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise train.UserError(f"{file}: this earlier evaluation is damaged or cannot be read, and "
                              "would be replaced; mend it, or move it away") from None


class Kept:
    """Finished batches, for train.survivors: {key: right, (1 + attacks, b)}; also lines of a file.

    The file outlives a cut. Its name stands for all that its lines depend on: weights, images,
    settings, code. seconds: the cost of the batches taken since it was last set to 0.
    """

    def __init__(self, stem, images, labels, weights, c):
        folder = Path(__file__).parents[1]
        code = sorted([*folder.glob("*.py"), *folder.glob("lab/*.py")])
        what = digest(images, labels, weights, *(file.read_bytes() for file in code),
                      torch.__version__, train.world(), vars(c))
        self.path = stem.with_name(f"{stem.name}-{what}-{train.rank()}.part")
        self.batches = {}
        self.seconds = 0.0
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            # What has another sum is half a line, where the cut was, or damaged.
            checksum, _, record = line.partition(" ")
            if checksum == digest(record):
                batch = json.loads(record)
                self.batches[batch["key"]] = torch.tensor(batch["right"]) == 1, batch["seconds"]

    def __contains__(self, key):
        self.asked = time.monotonic()
        return key in self.batches

    def __getitem__(self, key):
        right, seconds = self.batches[key]
        self.seconds += seconds
        return right

    def __setitem__(self, key, right):
        """Keeps a batch that was measured since __contains__ asked for it."""
        seconds = time.monotonic() - self.asked
        self.batches[key] = right, seconds
        record = json.dumps({"key": key, "right": right.int().tolist(), "seconds": seconds})
        try:
            with open(self.path, "a") as f:
                f.write(f"\n{digest(record)} {record}")
        except OSError as e:
            raise train.UserError(f"cannot write {self.path} ({e.strerror}); copy the checkpoint "
                                  "to a folder with room, and evaluate it there") from e
