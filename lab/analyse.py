# SPDX-License-Identifier: MIT
"""--analyse: the paper's argument, P1 to P5 of lab/theory.py, in numbers of one model.

    python train.py --analyse runs/NAME/best.pt                 # a checkpoint
    python train.py --analyse --model s4 --dataset synthetic    # a model at initialisation

One table for each statement, printed and as CSV, JSON and figure. All in float64, on the first test
and training images and PGD-10 against them; "start" is the model before it was trained.

Glossary   u, y   input and output of a part of a block, (B, L, .); u_adv, y_adv on attacked images
           rms    root of the mean square over images, tokens and channels; |.| the largest entry
"""
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook

import s4_adv
import train
from lab.certificate import certified_radius
from lab.evaluate import probe
from lab.figures import attempt, draw_changes
from lab.steps import step_lengths
from lab.theory import attention_error, error_parts, gain, gain_bounds, local_gain, scan_errors
from mamba_adv import selective_scan

FLAGS = ("model ads control dataset data_dir classes eps alpha d_model d_state d_hidden n_layers "
         "patch_size seed device")
# What may differ from the settings of a checkpoint.
FREE = ("analyse", "data_dir", "eps", "alpha", "test_size", "seed", "device")


class Part(NamedTuple):
    """A part of a block at work, on clean and on attacked images."""
    u: torch.Tensor
    y: torch.Tensor
    u_adv: torch.Tensor
    y_adv: torch.Tensor


def watch(model, x, x_adv):
    """[(layer, parts)] on clean and attacked images: layer holds a sequence map and its middle,
    parts is {name of a child: Part}, in which "" stands for the layer itself."""
    layers = [layer for layer in model.modules() if hasattr(layer, "middle")]
    seen = {part: [] for layer in layers for part in (layer, *layer.children())}

    def record(module, args, out):
        if module in seen:
            seen[module] += [args[0], out]      # u, y; then u_adv, y_adv
    with register_module_forward_hook(record), torch.no_grad():
        model(x)
        model(x_adv)
    return [(layer, {name: Part(*seen[part])
                     for name, part in [("", layer), *layer.named_children()]})
            for layer in layers]


# ---- One function for each statement: {quantity: value} ------------------------------------------

def rms(v):
    return v.square().mean().sqrt()


def response(part):
    """What a part does to the signal, and to the error that PGD made of it."""
    signal = rms(part.y) / rms(part.u)
    du, dy = part.u_adv - part.u, part.y_adv - part.y
    error = rms(dy) / rms(du)
    return {"signal, rms y / rms u": signal,
            "error seen, |dy| / |du|": dy.abs().max() / du.abs().max(),
            "error seen, rms dy / rms du": error,
            "the same, relative to the signal": error / signal}


def measure_fixed_map(ssm, part):
    """P1, P2 of S4, DSS, S5 or Mega's average: the gain, its bounds, what PGD reaches of it."""
    L = part.u.shape[1]
    largest, worst = gain(ssm, L)                                           # (H,), (., L, H)
    spectral, modal = gain_bounds(ssm, L)
    seen = (part.y_adv - part.y).abs().amax((0, 1)) / (part.u_adv - part.u).abs().max()
    return {"gain ||K||_1, mean of channels": largest.mean(),
            "gain ||K||_1, largest": largest.max(),
            "worst input reaches / gain": (ssm(worst).abs().amax((0, 1)) / largest).min(),
            "spectral gain / gain, mean": (spectral / largest).mean(),
            "modal bound / gain, median": (modal / largest).median(),
            **response(part),
            "error seen / gain, largest": (seen / largest).max()}


def measure_scan(mamba, part):
    """P3 of Mamba. part belongs to the Linear that selects dt, B and C: its u is the scan's u."""
    u, u_adv = part.u, part.u_adv
    dt, A, B, C = mamba.parameters_of(u)
    dt_adv, _, B_adv, C_adv = mamba.parameters_of(u_adv)
    y = selective_scan(u, dt, A, B, C, mamba.D)
    y_adv = selective_scan(u_adv, dt_adv, A, B_adv, C_adv, mamba.D)
    clean, attacked = (u, dt, B), (u_adv, dt_adv, B_adv)
    return (response(Part(u, y, u_adv, y_adv)) | measure_states(clean, attacked, A)
            | measure_token(clean, attacked, A) | measure_local_gain(mamba, u[:8]))


def state_size(h):
    """The largest entry of a state (B, d, N), averaged over images."""
    return h.abs().amax((1, 2)).mean()


def measure_states(clean, attacked, A):
    """P3: the error of the states is the sum of three terms, and grows at most linearly."""
    wrong = 0.0
    sizes = []
    for h, h_adv, carried, stored, fed in scan_errors(clean, attacked, A):
        e = h_adv - h
        wrong = max(wrong, float((e - carried - stored - fed).abs().max()))
        sizes.append(torch.stack([state_size(v) for v in (h, e, carried, stored, fed)]))
    h, e, carried, stored, fed = torch.stack(sizes, 1)                      # (L,) each
    total = carried.mean() + stored.mean() + fed.mean()
    L = len(e)
    return {"|e - its three terms|, largest": wrong,
            **{f"|e_t|, t = {t}": e[t - 1] for t in (1, math.ceil(L / 4), math.ceil(L / 2), L)},
            "|h_t|, t = L": h[-1],
            "share of a' e carried": carried.mean() / total,
            "share of (a' - a) h stored": stored.mean() / total,
            "share of b' - b fed": fed.mean() / total,
            "|e_L| / its linear bound": e[-1] / (stored.sum() + fed.sum())}


def measure_token(clean, attacked, A):
    """P3: the error that the middle token makes grows with the state that it meets."""
    t = clean[0].shape[1] // 2
    clean, attacked = ([v[:, t:t + 1] for v in inputs] for inputs in (clean, attacked))
    numbers = {}
    for state in (1, 10, 100, 1000):
        _, _, _, stored, fed = next(scan_errors(clean, attacked, A, float(state)))
        numbers[f"|e| after a token, state {state}"] = state_size(stored + fed)
    return numbers


def measure_local_gain(mamba, u):
    """P3: the gain near u, on 16 channels, as it is, and with dt, B and C held at those of u."""
    dt, A, B, C = mamba.parameters_of(u)

    def selecting(v):
        return selective_scan(v, *mamba.parameters_of(v), mamba.D)

    def holding(v):
        return selective_scan(v, dt, A, B, C, mamba.D)
    channels = range(0, u.shape[2], math.ceil(u.shape[2] / 16))
    numbers = {}
    for name, scan in (("it selects", selecting), ("selection held", holding)):
        gains = local_gain(scan, u, channels)
        numbers[f"local gain, {name}, mean"] = gains.mean()
        numbers[f"local gain, {name}, max"] = gains.max()
    return numbers


def mixing(mega, u):
    """Attention (B, L, L) and the values (B, L, V) that it mixes."""
    _, shared, _, _ = mega.split_gates(u)
    return mega.attention(F.silu(shared)), F.silu(mega.values(u))


def measure_attention(mega, part):
    """P4 of Mega, of 20 images, since attention has L^2 numbers for each."""
    P, V = mixing(mega, part.u[:20])
    P_adv, V_adv = mixing(mega, part.u_adv[:20])
    error, bound, tv, osc = attention_error(P, V, P_adv, V_adv)
    return {"|P'V' - PV|, largest": error.max(),
            "error / bound, largest": (error / bound).max(),
            "error / bound, mean": (error / bound).mean(),
            "TV(P', P), mean": tv.mean(), "TV(P', P), largest": tv.max(),
            "osc(V), mean": osc.mean(), "|dV|, largest": (V_adv - V).abs().max(),
            "share of TV osc in the bound": (tv * osc).mean() / bound.mean()}


def measure_ads(ads, part):
    """P5 of AdS. The share of a term is <term, error> / <error, error>."""
    *terms, removed = error_parts(ads, part.u, part.u_adv)
    error = sum(terms)
    numbers = {}
    for name, term in zip(("s' dy", "(s' - s) y", "t' - t"), terms):
        numbers[f"share of {name}"] = (term * error).sum() / error.square().sum()
    numbers["rms error after / before"] = rms(error) / rms(part.u_adv - part.u)
    numbers["error removed exactly"] = removed.double().mean()
    for when, y in (("clean", part.u), ("attacked", part.u_adv)):
        for name, v in zip("st", ads.scale_and_shift(y)):
            numbers[f"{name}, {when}: mean"] = v.mean()
            numbers[f"{name}, {when}: std"] = v.std()
            numbers[f"{name}, {when}: share of 0"] = (v == 0).double().mean()
    return numbers


# ---- Change rates, as in the paper's figure ------------------------------------------------------

def distances(f, f_adv):
    """MSE, KL of softmax over channels, MSE / mean square, of attacked features from clean ones."""
    mse = (f_adv - f).square().mean()
    log_p, log_q = f.log_softmax(-1), f_adv.log_softmax(-1)
    return {"MSE": mse, "KL": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
            "MSE / mean square": mse / f.square().mean()}


def components(c, parts):
    """{name: Part} of what the paper's figure compares: each begins where the last one ends."""
    def up_to_middle(first):
        middle = parts["middle"]
        return Part(first.u, middle.u, first.u_adv, middle.u_adv)
    if c.model == "mamba":
        found = {"SSM": up_to_middle(parts[""])}
    elif c.model == "attention":
        found = {"SSM": parts["ema"], "attention": up_to_middle(parts["gates"])}
    else:
        found = {"SSM": parts["ssm"]}
    if c.ads or c.control:
        found["AdS" if c.ads else c.control] = parts["middle"]
    return found | {"Linear": parts["out"]}


def measure_changes(c, parts):
    """The paper's change rate of each distance: (after - before) / before."""
    numbers = {}
    for name, part in components(c, parts).items():
        before, after = distances(part.u, part.u_adv), distances(part.y, part.y_adv)
        for distance, v in before.items():
            numbers[f"{name}: {distance}"] = (after[distance] - v) / v
    return numbers


# ---- The whole model -----------------------------------------------------------------------------

def certify(c, model, x, y):
    """The share of images that no perturbation can break, by eps, and PGD-10 beside it."""
    radius = certified_radius(model, x, y)
    right = train.hits(model, x, y)
    numbers = {"accuracy, clean": right.double().mean()}
    if right.any():
        numbers["radius * 255, median of correct"] = 255 * radius[right].median()
    numbers["radius * 255, largest"] = 255 * radius.max()
    for k in range(7):
        eps = c.eps / 4 ** k
        robust = right & train.hits(model, s4_adv.pgd(model, x, y, eps, eps / 4, 10), y)
        numbers[f"certified, eps {255 * eps:.2g}/255"] = (radius >= eps).double().mean()
        numbers[f"PGD-10, eps {255 * eps:.2g}/255"] = robust.double().mean()
    return numbers


def measure(c, model, x, y):
    """Yields (statement, layer, {quantity: value}), on images x and on PGD-10's."""
    if c.model in train.BASELINES:
        return                                              # they have no sequence map
    x_adv = train.SCRIPTS[c.model].pgd(model, x, y, c.eps, c.alpha, 10)
    for k, (layer, parts) in enumerate(watch(model, x, x_adv), 1):
        if c.model == "mamba":
            yield "P3 data-dependent: the selective scan", k, measure_scan(layer, parts["select"])
        else:
            name = "ema" if c.model == "attention" else "ssm"
            ssm = getattr(layer, name)
            numbers = measure_fixed_map(ssm, parts[name])
            yield f"P1, P2 fixed parameters: {type(ssm).__name__}", k, numbers
        if c.model == "attention":
            yield "P4 attention", k, measure_attention(layer, parts[""])
        if c.ads:
            yield "P5 AdS", k, measure_ads(layer.middle, parts["middle"])
        yield "change rate, clean against attacked features", k, measure_changes(c, parts)


def print_tables(rows):
    """A table for each statement: a line for each quantity, a column for images and layer."""
    for statement in dict.fromkeys(row["statement"] for row in rows):
        these = [row for row in rows if row["statement"] == statement]
        columns = list(dict.fromkeys((row["on"], row["layer"]) for row in these))
        heads = [f"{on} {layer or ''}" for on, layer in columns]
        train.say(f"\n{statement:45}" + "".join(f"{head:>10}" for head in heads))
        for quantity in dict.fromkeys(row["quantity"] for row in these):
            values = {(row["on"], row["layer"]): row["value"] for row in these
                      if row["quantity"] == quantity}
            cells = [f"{values.get(column, math.nan):10.4g}" for column in columns]
            train.say(f"  {quantity:43}" + "".join(cells))


def settings(words):
    """The settings c, the checkpoint's state or None, and where the results go, without suffix."""
    p = train.Parser("The paper's theory in numbers, of a checkpoint, or of the model that the "
                     "flags describe, at initialisation.")
    train.add_flags(p, FLAGS)
    p.add_argument("--analyse", nargs="?", const=True, metavar="CKPT", required=True,
                   help="a checkpoint or a run's folder (default: the model at initialisation)")
    p.add_argument("--test-size", type=int, metavar="N",
                   help="the first N test images, and the first N training images (default: 100)")
    p.add_argument("--out", metavar="DIR", help="folder of the results (default: that of CKPT; at "
                   "initialisation runs/NAME)")
    given = {"test_size": 100} | p.given(words)
    c = train.settings(given, train.add_flags(train.Parser("")))
    state = None
    stem = Path(train.folder_of(c)) / "analysis"
    if c.analyse is True:
        c.method = "untrained"
    else:
        state = train.read_checkpoint(c.analyse, "--analyse")
        c = train.checkpoint_settings(c, given, state, c.analyse, FREE)
        stem = state["path"].with_name(f"{state['path'].stem}-analysis")
    c.precision = "fp32"                        # training alone has another
    c.out = given.get("out", str(stem.parent))
    train.check(c)
    if not c.eps:
        raise train.UserError(f"--eps {c.eps}: an analysis needs a perturbation; give a radius "
                              "above 0")
    return c, state, Path(c.out) / stem.name


def main(words):
    c, state, stem = settings(words)
    sets = {name: (x[:c.test_size].double() / 255, y[:c.test_size])
            for name, (x, y) in train.load_data(c).items()}
    n, n_train = (len(sets[name][1]) for name in ("test", "train"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    probe(stem.parent)
    seed = state["config"]["seed"] if state else c.seed
    start = train.build(SimpleNamespace(**vars(c) | {"seed": seed})).double()
    columns = [("test", start, "test"), ("train", start, "train")]
    if state:
        trained = train.load_model(state, c.analyse, c.device).double()
        columns = [("start", start, "test"), ("test", trained, "test"), ("train", trained, "train")]
    shown = f"{n}" if n == n_train else f"{n} and {n_train}"
    train.say(f"{c.analyse if state else 'at initialisation'}: {c.model}, {c.dataset}, n = {shown} "
              f"images, eps {train.show(c.eps)}, seed {c.seed}")
    rows = []
    for on, model, images in columns:
        x, y = sets[images]
        torch.manual_seed(train.seed_of(c.seed, "analysis", on))
        with train.frozen(model):
            found = list(measure(c, model, x, y))
            if on != "train" and c.model in ("s4", "dss", "s5") and not (c.ads or c.control):
                found.append(("certified", 0, certify(c, model, x, y)))
            if on == "test":
                found.append(("how long must steps be", 0, step_lengths(model, x, y, c.eps)))
        for statement, layer, numbers in found:
            rows += [{"statement": statement, "on": on, "layer": layer, "quantity": quantity,
                      "value": float(value)} for quantity, value in numbers.items()]
    print_tables(rows)
    train.write_csv(Path(f"{stem}.csv"), rows)
    report = {"n": n, "n_train": n_train, "rows": rows, "config": vars(c), **train.machine(c)}
    train.write(Path(f"{stem}.json"), json.dumps(report, indent=1))
    changes = [row for row in rows if row["statement"].startswith("change")]
    with attempt():
        if changes:
            draw_changes(Path(f"{stem}.png"), changes)
    train.say(f"written: {stem}.csv and .json")
