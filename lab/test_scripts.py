# SPDX-License-Identifier: MIT
"""What a copier of a script may run into: damaged data, odd input, autocast, compile, replicas.

The mathematics is tested in test_all.py, whose helpers serve here, too.
"""
import ast
import copy
import functools
import io
import re
import sys
import tokenize
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import ads
import attention_adv
import mamba_adv
from lab import autoattack
from test_all import (ALPHA, EPS, HERE, KERNELS, MAPS, MODELS, Spy, close, images, linear, run,
                      same_gradients, scan_inputs, scrambled, smooth, tiny)

GPU = torch.cuda.is_available()
FILES = [str(file.relative_to(HERE)) for folder in (HERE, HERE / "lab")
         for file in sorted(folder.glob("*.py"))]


# ---- The files -----------------------------------------------------------------------------------

@pytest.mark.parametrize("file", FILES)
def test_a_file_has_its_licence_and_lines_of_100_columns(file):
    text = (HERE / file).read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    assert re.findall("@[A-Z]+@", text) == []                           # a number still to fill in


def check_grammar(text, version):
    """SyntaxError if a Python of that version, (3, minor), cannot compile the text."""
    ast.parse(text, feature_version=version)
    # From 3.12 on ast takes an f-string within whose braces its own quote comes again.
    quotes = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        quote = token.string.lstrip("rRbBuUfF")
        if kind in ("STRING", "FSTRING_START") and any(quote.startswith(q) for q in quotes):
            raise SyntaxError(f"line {token.start[0]}: an f-string's own quote within it")
        if kind == "FSTRING_START":
            quotes.append(quote)
        if kind == "FSTRING_END":
            quotes.pop()


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_the_grammar_of_the_oldest_python_that_the_readme_names(file):
    minor = re.search(r"Python >= 3\.(\d+)", (HERE / "README.md").read_text(encoding="utf-8"))[1]
    check_grammar((HERE / file).read_text(encoding="utf-8"), (3, int(minor)))


@pytest.mark.parametrize("text", ["type X = int", "def f[T](x): return x", "f'{x['a']}'"])
def test_newer_grammar_is_seen(text):
    with pytest.raises(SyntaxError):
        check_grammar(text + "\n", (3, 11))


@pytest.mark.parametrize("file", ["ads.py", "s4_adv.py", "mamba_adv.py", "attention_adv.py"])
def test_a_script_needs_torch_and_ads_alone(file):
    nodes = list(ast.walk(ast.parse((HERE / file).read_text(encoding="utf-8"))))
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    taken_where_it_is_there = {"torchvision"} | ({"lab"} if file == "mamba_adv.py" else set())
    allowed = {"ads", "torch", *taken_where_it_is_there, *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in names} <= allowed


# ---- The demo ------------------------------------------------------------------------------------

def demo(script, monkeypatch, folder, *words):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--data-dir", str(folder), *words])
    script.main()


def test_the_demo_trains_without_and_with_ads(script, monkeypatch, capsys, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets, "MNIST", lambda *args, **options: SimpleNamespace(
        data=torch.randint(256, (70, 28, 28), dtype=torch.uint8), targets=torch.arange(70) % 10))
    demo(script, monkeypatch, tmp_path, "--epochs", "1", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MNIST: 70 training, 70 test images, PGD-AT, eps 0.1, step 0.04")
    assert [line.split("A")[0] for line in lines[2:]] == ["without ", "with "]
    for line in lines[2:]:
        assert re.search(r"AdS +[\d,]+ +[\d.]+% +[\d.]+%$", line)


@pytest.mark.parametrize("state", ["no torchvision", "no network", "damaged"])
def test_without_mnist_the_demo_says_in_one_sentence_what_to_do(
        script, state, monkeypatch, capsys, tmp_path):
    if state == "no torchvision":
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    else:
        datasets = pytest.importorskip("torchvision.datasets")
    if state == "no network":
        def download(dataset):
            raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
        monkeypatch.setattr(datasets.MNIST, "download", download)
    if state == "damaged":
        (tmp_path / "MNIST" / "raw").mkdir(parents=True)
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3",
                     "t10k-labels-idx1"):
            (tmp_path / "MNIST" / "raw" / f"{part}-ubyte").write_bytes(b"x" * 99)
    with pytest.raises(SystemExit) as end:
        demo(script, monkeypatch, tmp_path)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    for word in (str(tmp_path), "--data-dir", "python train.py --dataset synthetic"):
        assert word in said.err


# ---- Numbers: precision, devices, second derivatives ---------------------------------------------

def test_a_model_is_made_in_torch_s_default_precision(name):
    x, before = torch.rand(2, 2, 4, 6, dtype=torch.float64), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        own = {"mamba": {}, "attention": {"max_len": 10}}.get(name, {"ssm": name})
        model = MODELS[name].Classifier(2, 3, 6, 4, 2, 2, ads="relu", **own)
        assert {w.dtype for w in (*model.parameters(), *model.buffers())} == {torch.float64}
        assert model(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", [*MAPS, "mamba"])
def test_float32_is_close_to_float64_at_1024_tokens(kind):
    layer = mamba_adv.Mamba(8, 16) if kind == "mamba" else MAPS[kind](8, 64)
    u, g = torch.randn(2, 1, 1024, 8)
    results = []
    for dtype in (torch.float32, torch.float64):
        v = u.to(dtype).requires_grad_()
        y = layer.to(dtype)(v)
        results.append((y, *torch.autograd.grad(y, v, g.to(dtype))))
    for single, double in zip(*results):
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 1e-4 * double.abs().max()


def test_under_autocast_kernels_and_states_keep_their_bits(kind):
    layer, u = scrambled(MAPS[kind](6, 4)).float(), torch.randn(2, 33, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(u).float()
    close(result, layer(u), 0.02 if kind == "s5" else 1e-6)             # S5 multiplies u by B, C


def test_a_saturated_moving_average_stays_finite():
    for dtype in (torch.float32, torch.float64):
        layer = attention_adv.EMA(4, 2).to(dtype)
        for size in (17.0, 40.0, 100.0):
            layer.delta.data.fill_(size)
            layer.alpha.data.fill_(size)
            u = torch.rand(2, 5, 4, dtype=dtype, requires_grad=True)
            y = layer(u)
            y.sum().backward()
            grads = u.grad, *(w.grad for w in layer.parameters())
            assert all(v.isfinite().all() for v in (y, *grads))
            close(y, layer.recurrence(u), 1e-5 if dtype == torch.float32 else 1e-9)


def test_a_second_derivative_of_a_model_is_right_or_refused(name):
    """A Function that differentiates by hand may leave itself out of the Hessian, silently."""
    model, (x, y) = tiny(name, ads="tanh"), images()
    moved = [x.requires_grad_(), *model.parameters()]
    ways = [torch.randn_like(v) for v in moved]

    def gradient(step=0.0, **options):
        with torch.no_grad():
            for v, way in zip(moved, ways):
                v.add_(step * way)
        return torch.autograd.grad(F.cross_entropy(model(x), y), moved, **options)
    if name == "mamba":
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient(create_graph=True)
        return
    slope = sum((g * way).sum() for g, way in zip(gradient(create_graph=True), ways))
    found = torch.autograd.grad(slope, moved)
    for v, up, down in zip(found, gradient(1e-5), gradient(-2e-5)):
        close(v, (up - down) / 2e-5, 1e-6)


def test_the_scan_refuses_a_second_gradient():
    inputs = [v.requires_grad_() for v in scan_inputs(2, 5, 2, 3)]
    with pytest.raises(RuntimeError, match="no second derivative; take selective_scan_loop"):
        torch.autograd.grad(mamba_adv.selective_scan(*inputs).sum(), inputs, create_graph=True)


def test_the_scan_takes_the_shapes_that_the_loop_takes(monkeypatch):
    monkeypatch.setattr(mamba_adv.SelectiveScan, "SIZE", 2 * 8 * 3 * 4)     # parts of two images
    b, L, d, N = 5, 7, 3, 4
    full = (b, L, d), (b, L, d), (d, N), (b, L, N), (b, L, N), (d,)
    for k, shape in [(1, (b, L, 1)), (1, (1, L, d)), (2, (1, N)), (3, (1, L, N)), (3, (1, 1, N)),
                     (4, (1, L, N)), (4, (b, 1, N)), (5, (1,))]:
        inputs = scan_inputs(b, L, d, N)
        inputs[k] = inputs[k][tuple(slice(n) for n in shape)].clone()
        assert [v.shape for v in inputs] != list(full) and inputs[k].shape == shape
        inputs = [v.requires_grad_() for v in inputs]
        fast = mamba_adv.selective_scan(*inputs)
        slow = mamba_adv.selective_scan_loop(*(v.expand(n) for v, n in zip(inputs, full)))
        close(fast, slow)
        same_gradients(fast, slow, inputs)


def test_every_tensor_is_made_on_the_device_of_the_images(name):
    script, model, (x, y) = MODELS[name], tiny(name, ads="tanh"), images()
    expected = model(x)
    with torch.device("meta"):                                          # where no device is named
        result = model(x)
        script.trades_loss(model, x, y, EPS, ALPHA, 2, 6.0).backward()
        script.accuracy(model, [(x, y)], lambda *args: script.pgd(*args, EPS, ALPHA, 2))
    close(result, expected, 1e-12)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_gpu_returns_the_numbers_of_the_cpu(name):
    model, (x, y), results = tiny(name, ads="tanh"), images(), []
    for device in ("cpu", "cuda"):
        z = x.to(device).requires_grad_()
        loss = F.cross_entropy(model.to(device)(z), y.to(device))
        results.append([loss, *torch.autograd.grad(loss, [z, *model.parameters()])])
    for expected, result in zip(*results):
        close(result.cpu(), expected)


# ---- Input ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda: ads.AdaptiveScaling(4, "swish"), "'swish' is unknown; .* relu, sigmoid, tanh"),
    (lambda: ads.AdaptiveScaling(4, only="bias"), "only='bias' is unknown; choose scale or shift"),
    *((lambda m=m, f=f: f(MODELS[m], tiny(m), 2 * images()[0] - 0.5, images()[1]),
       "images must lie in .0, 1.; normalisation belongs inside the model") for m in MODELS
      for f in (lambda s, *at: s.fgsm(*at, EPS), lambda s, *at: s.pgd(*at, EPS, ALPHA, 2),
                lambda s, *at: s.trades_loss(*at, EPS, ALPHA, 2, 6.0))),
    *((lambda m=m, f=f, eps=eps: f(MODELS[m], tiny(m), *images(), eps),
       f"eps {eps} is outside .0, 1.; give pixel units, 8/255, not 8") for m in MODELS
      for eps in (8, -0.1, float("nan"))
      for f in (lambda s, *at: s.fgsm(*at), lambda s, *at: s.pgd(*at, ALPHA, 2),
                lambda s, *at: s.trades_loss(*at, ALPHA, 2, 6.0))),
    (lambda: ads.middle(4, control="rnn"), "control .rnn. is unknown; .* gelu, glu, glu-relu,"),
    *((lambda m=m: tiny(m, ads="relu", control="mlp"), "'relu' and control='mlp' name two things")
      for m in MODELS),
    *((lambda m=m, P=P: tiny(m, patch_size=P)(images()[0]),
       f"patch size {P} does not divide an image of 4 x 6") for m in MODELS for P in (3, 4)),
    (lambda: tiny("s4", ssm="s6"), "ssm 's6' is unknown; choose one of s4, dss, s5"),
    (lambda: tiny("s4", d_state=5), "d_state 5 is odd"),
    (lambda: tiny("dss", d_state=5), "d_state 5 is odd"),
    (lambda: tiny("attention", max_len=5)(images()[0]), "6 tokens are more than max_len 5; .*=6")])
def test_what_cannot_work_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_image_that_is_not_a_number_is_refused(script):
    x, y = images()
    with pytest.raises(ValueError, match="images must lie in"):
        script.pgd(linear(3), x.masked_fill(x == 1, float("nan")), y, EPS, ALPHA, 2)


def test_a_gradient_of_exactly_0_is_told_once_with_its_share_and_an_attack_that_moves_is_not(
        script, attack):
    x, y = images(10)
    dead = Spy(lambda x: x.flatten(1)[:, :3] * (x[:, 0, 0, :1] > 2))    # for every image

    def saturated(x):
        """The first half of the images has logits so large that the softmax loses them."""
        large = 1 + 1e5 * (torch.arange(len(x)) < len(x) // 2)
        return large[:, None].to(x) * (2 * F.one_hot(y, 3) + 0.1 * x.flatten(1)[:, :3])
    for net, share in ((dead, "100%"), (Spy(saturated), "50%"), (Spy(smooth()), None)):
        for eps in (0.0, EPS, EPS):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                run(script, attack, net, x, y, eps=eps)
            if share and eps:
                (warning,) = told
                assert f"{share} of the images" in str(warning.message)
                assert "--checks" in str(warning.message)
                share = None
            else:
                assert not told, told[0].message


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_returns_an_empty_batch_without_asking_the_model(script, attack):
    (x, y), spy = images(), Spy(linear(3))
    assert run(script, attack, spy, x[:0], y[:0]).shape == x[:0].shape
    assert spy.fed == []


@pytest.mark.parametrize("options", [{}, {"ads": "relu"}], ids=str)
def test_a_model_takes_an_empty_batch(name, options):
    model, (x, _) = tiny(name, **options), images()
    assert model(x[:0]).shape == (0, 3)
    with MODELS[name].frozen(model):
        assert model(x[:0]).shape == (0, 3) and model(x).shape == (5, 3)


@pytest.mark.parametrize("attack", ["pgd_at_loss", "trades_loss"])
def test_the_loss_of_an_empty_batch_is_an_error(script, attack):
    x, y = images()
    with pytest.raises(ValueError, match="the loss of no images is not defined"):
        run(script, attack, linear(3), x[:0], y[:0])


def test_accuracy_ignores_an_empty_batch_among_others(script):
    (x, y), spy = images(40), Spy(smooth())
    expected = script.accuracy(spy, [(x, y)])
    spy.fed.clear()
    assert script.accuracy(spy, [(x[:0], y[:0]), (x[:9], y[:9]), (x[9:], y[9:])]) == expected
    assert [len(v) for v in spy.fed] == [9, 31]


def test_accuracy_of_nothing_or_of_a_broken_model_is_an_error(script):
    with pytest.raises(ValueError, match="accuracy of no images"):
        script.accuracy(linear(), [])
    x, y = images()
    with pytest.raises(FloatingPointError, match="logit that is not finite"):
        script.accuracy(linear(3), [(x.masked_fill(x == 1, float("nan")), y)])


def test_labels_of_shape_B_1_count_as_labels_and_one_hot_ones_are_refused(script):
    (x, y), net = images(40), smooth()
    expected = script.accuracy(net, [(x, y)])
    assert 0 < expected < 1 and script.accuracy(net, [(x, y[:, None])]) == expected
    attack = functools.partial(script.fgsm, eps=EPS)
    assert script.accuracy(net, [(x, y[:, None])], attack) == script.accuracy(net, [(x, y)], attack)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        script.accuracy(net, [(x, F.one_hot(y, 3))])


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_weight_that_is_parametrised_keeps_its_decay(script, wrap):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), wrap(nn.Linear(4, 3)))
    decayed, rest = script.param_groups(model, 0.25)
    names = {id(w): key for key, w in model.named_parameters()}
    decayed, rest = ([names[id(w)] for w in group["params"]] for group in (decayed, rest))
    assert sorted(decayed + rest) == sorted(names.values())             # each exactly once
    assert set(rest) == {"0.bias", "1.weight", "1.bias", "2.bias"}


STRONG = {"apgd_ce": 3, "fab_t": 3, "square": 9}             # with so many steps


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "kl_pgd", *STRONG])
def test_an_attack_under_inference_mode_is_that_without_it(name, attack):
    script, model, results = MODELS[name], tiny(name), []
    search = getattr(autoattack if attack in STRONG else script, attack)
    for inference in (False, True):
        torch.manual_seed(0)
        with torch.inference_mode(inference):
            x, y = images()                                             # inference tensors, too
            labels = [] if attack == "kl_pgd" else [y]
            rest = {"fgsm": [EPS], "pgd": [EPS, ALPHA, 3], "kl_pgd": [EPS, ALPHA, 3]}
            results.append(search(model, x, *labels, *rest.get(attack, [EPS, STRONG.get(attack)])))
    assert torch.equal(*results)


# ---- Frozen --------------------------------------------------------------------------------------

def test_the_frozen_of_any_script_serves_the_models_of_all(name, script, monkeypatch):
    if name not in KERNELS:
        pytest.skip("Mamba has no kernel")
    owner, method = KERNELS[name]
    original, calls = getattr(owner, method), []
    monkeypatch.setattr(owner, method, lambda *args: calls.append(1) or original(*args))
    model, x = tiny(name), images()[0]
    with script.frozen(model):
        for _ in range(3):
            model(x)
    assert len(calls) == 2                                              # of two layers


@pytest.mark.parametrize("name", KERNELS)
def test_weights_given_from_outside_never_meet_a_kernel_of_others_at_their_address(name):
    script, model, (x, _) = MODELS[name], tiny(name), images()
    flat = nn.utils.parameters_to_vector(model.requires_grad_(False).parameters())

    def out(factor):
        parts = (factor * flat).split([w.numel() for w in model.parameters()])
        given = {n: v.view_as(w) for (n, w), v in zip(model.named_parameters(), parts)}
        return torch.func.functional_call(model, given, (x,))           # freed when it returns
    factors = [1 + 0.1 * k for k in range(8)]
    expected = [out(factor) for factor in factors]
    with script.frozen(model):
        for factor, y in zip(factors, expected):
            close(out(factor), y, 1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_a_module_without_weights_as_data_parallel_makes_them_keeps_nothing(name):
    made, script, module = [], MODELS[name], nn.Identity()
    with script.frozen(module):
        assert [script.once(module, 0, lambda: made.append(1) or len(made)) for _ in "ab"] == [1, 2]
    assert script.once(module, 0, lambda: 7) == 7


@pytest.mark.parametrize("name", KERNELS)
def test_two_results_of_one_module_are_kept_side_by_side_until_a_weight_changes(name):
    script, module = MODELS[name], nn.Linear(1, 1).requires_grad_(False)
    module.kept = {}

    def make(key):
        return script.once(module, key, lambda: made.append(key) or key)
    with script.frozen(nn.Sequential(module)):
        for _ in range(2):
            made = []
            assert [make(key) for key in (3, 5, 3, 5)] == [3, 5, 3, 5] and made == [3, 5]
            module.weight.mul_(2)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_made_under_inference_mode_serves_an_attack(name):
    script, model, (x, y) = MODELS[name], tiny(name), images()
    expected = script.fgsm(model, x, y, EPS)
    with script.frozen(model):
        with torch.inference_mode():
            model(x)
        assert torch.equal(script.fgsm(model, x, y, EPS), expected)


@pytest.mark.parametrize("name", KERNELS)
def test_weights_made_under_inference_mode_serve_evaluation(name):
    with torch.inference_mode():
        model, (x, _) = tiny(name), images()
        expected = model(x)
        with MODELS[name].frozen(model.requires_grad_(False)):
            close(model(x), expected, 1e-12)
            close(model(x), expected, 1e-12)


def test_under_autocast_an_attack_keeps_a_kernel_with_all_its_bits(name):
    if name not in KERNELS:
        pytest.skip("Mamba has no kernel")
    script, model, (x, _), kept = MODELS[name], tiny(name).float(), images(), []
    with script.frozen(model):
        for dtype in (torch.bfloat16, torch.float32):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                model(x.float())
            kept.append([v for m in model.modules() for v in m.kept.values()])
    assert repr(kept[0]) == repr(kept[1])


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
                    reason="torch.compile of an autograd.Function needs a newer torch")
@pytest.mark.parametrize("name", ("s4", "mamba", "attention"))
def test_a_compiled_model_is_attacked_alike_and_keeps_no_kernel(name):
    model, (x, y), script = tiny(name, ads="relu"), images(), MODELS[name]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")                        # the trace, no compiler
    for _ in range(2):
        try:
            close(compiled(x), model(x))
        except RuntimeError as e:
            if "not supported" not in str(e):
                raise
            pytest.skip(f"torch.compile does not run here: {e}")
        seen = []
        for m in (model, compiled):
            torch.manual_seed(0)
            seen.append(script.pgd(m, x, y, EPS, ALPHA, 3))
        close(*seen)
        script.pgd_at_loss(compiled, x, y, EPS, ALPHA, 1).backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= 0.1 * w.grad
                w.grad = None


def test_a_copy_made_within_frozen_follows_its_own_weights(name):
    script, model, (x, _) = MODELS[name], tiny(name), images()
    with script.frozen(model):
        model(x)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for w in twin.parameters():
                w.mul_(1.1)
        fresh = tiny(name)
        fresh.load_state_dict(twin.state_dict())
        close(twin(x), fresh(x).detach(), 1e-12)
