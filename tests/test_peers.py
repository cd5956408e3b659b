"""Mamba against other people's: transformers' MambaForCausalLM and mamba.py, on the CPU.

transformers casts to float32 within (norms, A, dt_bias, B, x, the logits), so that in float64 it
comes no closer than float32 does: 5e-7. mamba.py casts A_log and D alone: with numbers that survive
this (see exact_A_log) its outputs are float64 throughout, and the gradients but for those two.

And TNN against its authors' tnn-pytorch, which casts nothing. What PyPI has under this name (0.0.0
to 0.0.5) is empty, without a module: the code is that of github.com/Doraemonzzz/tnn-pytorch.
"""

import importlib
import os

import numpy as np
import pytest
from conftest import error

from ref import checkpoints, files, mamba, network, tnn

torch = pytest.importorskip("torch", reason="torch is not installed (the extra `peers`)")

V, D, N, R, LAYERS, B, L = 40, 12, 5, 3, 2, 2, 19


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be fetched
    return pytest.importorskip(
        "transformers", reason="transformers is not installed (the extra `peers`)"
    )


@pytest.fixture(scope="module")
def mambapy():
    pytest.importorskip("mambapy", reason="mambapy is not installed (the extra `peers`)")
    return importlib.import_module("mambapy.mamba")


def their_model(transformers, dtype="float32", **settings):
    """MambaForCausalLM with nothing at a special value"""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=D, state_size=N, time_step_rank=R)
    cfg = transformers.MambaConfig(
        **sizes, num_hidden_layers=LAYERS, residual_in_fp32=dtype == "float32", **settings
    )
    model = transformers.MambaForCausalLM(cfg).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=torch.float64)
    return model


def problem(dtype):
    """tokens (B, L), dlogits (B, L, V)"""
    rng = np.random.default_rng(0)
    return rng.integers(0, V, (B, L)), rng.standard_normal((B, L, V)).astype(dtype)


def ours(params, cfg, tokens, dlogits):
    """-> logits, gradients under their published names"""
    logits, cache = network.forward(params, tokens, cfg)
    _, grads = network.backward(dlogits, cache)
    return logits, network.to_published(grads, cfg)


def theirs(model, tokens, dlogits):
    logits = model(torch.tensor(tokens))
    logits = getattr(logits, "logits", logits)
    logits.backward(torch.tensor(dlogits, dtype=logits.dtype))
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return logits.detach().numpy(), grads


# transformers


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 2e-6)])
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize("form", ["loop", "mambapy"])
def test_a_saved_model_has_the_same_logits_and_gradients(
    transformers, tmp_path, dtype, bound, settings, form, request
):
    if form == "mambapy":
        request.getfixturevalue("mambapy")  # else transformers would take its loop
    model = their_model(transformers, dtype, use_mambapy=form == "mambapy", **settings)
    model.save_pretrained(tmp_path)
    params, cfg = checkpoints.load(tmp_path, "mamba")
    assert cfg.tied == (settings == {}) and cfg.layer.layout == "transformers"
    tokens, dlogits = problem(dtype)
    logits, grads = ours(params, cfg, tokens, dlogits)
    expected, expected_grads = theirs(model, tokens, dlogits)
    assert logits.dtype == dtype and expected.dtype == "float32"
    assert error(logits, expected) < bound
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        assert error(grads[name], expected_grads[name]) < bound, name


def test_shards_hold_the_same_model(transformers, tmp_path):
    model = their_model(transformers)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    params, cfg = checkpoints.load(tmp_path)
    tensors = network.to_published(params, cfg)
    for name, p in model.named_parameters():
        assert (p.detach().numpy() == tensors[name]).all(), name


def test_decoding_agrees_with_its_cache(transformers, tmp_path):
    model = their_model(transformers)
    model.save_pretrained(tmp_path)
    params, cfg = checkpoints.load(tmp_path)
    tokens, _ = problem("float32")
    state, past = network.state(params, cfg, B), None
    for t in range(L):
        logits, state = network.step(params, tokens[:, t], state, cfg)
        with torch.no_grad():
            now = torch.tensor(tokens[:, t : t + 1])
            out = model(now, cache_params=past, use_cache=True)
        past = out.cache_params
        assert error(logits, out.logits[:, 0].numpy()) < 1e-5, t


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [0, 3000])
def test_what_we_write_it_loads(transformers, tmp_path, dtype, tied, shard_bytes):
    rng = np.random.default_rng(0)
    layer = mamba.Config(d_model=D, d_state=N, dt_rank=R, d_conv=3, expand=3, layout="transformers")
    own = dict(d_input=V, d_output=V, decoder="lm", tied=tied, decoder_bias=False, final_norm=True)
    cfg = network.Config("mamba", layer, LAYERS, **own)
    params = network.init(cfg, rng, "float64")
    params = {n: (p + 0.3 * rng.standard_normal(p.shape)).astype(dtype) for n, p in params.items()}
    checkpoints.save(tmp_path, params, cfg, shard_bytes=shard_bytes)
    model, how = transformers.MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(how.values()), how
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert model.config.tie_word_embeddings == tied
    tokens, _ = problem(dtype)
    logits, _ = network.forward(params, tokens, cfg)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(tokens)).logits.numpy()
    assert error(logits, expected) < 1e-5


# mamba.py


def exact_A_log(rng, shape):
    """A_log in float64 whose A the detour over float32, -exp(float(A_log)), leaves as it is"""

    def A_of(A_log):
        return torch.tensor(A_log).float().exp().double().numpy()

    A_log = rng.uniform(-1, 1.5, shape)
    for _ in range(100):
        A_log = np.log(A_of(A_log))
        wrong = np.abs(np.exp(A_log) - A_of(A_log)) > 1e-15
        A_log[wrong] = rng.uniform(-1, 1.5, wrong.sum())
        if not wrong.any():
            return A_log
    raise AssertionError("no such numbers found")


def mambapy_model(mambapy, rng, **settings):
    """A language model of mamba.py's parts, float64; its parameters by their published names

    Its own, mambapy.lm, cannot be imported without mamba_ssm, which needs a GPU.
    """
    own = mambapy.MambaConfig(d_model=D, n_layers=LAYERS, dt_rank=R, d_state=N, **settings)
    layers = mambapy.Mamba(own).layers
    parts = {"embedding": torch.nn.Embedding(V, D), "layers": layers}
    backbone = torch.nn.ModuleDict(parts | {"norm_f": mambapy.RMSNorm(D)})
    head = torch.nn.Linear(D, V, bias=False)
    model = torch.nn.ModuleDict({"backbone": backbone, "lm_head": head}).double()
    for name, p in model.named_parameters():
        value = p.detach().numpy() + 0.3 * rng.standard_normal(p.shape)
        if name.endswith("A_log"):
            value = exact_A_log(rng, p.shape)
        elif name.endswith("mixer.D"):
            value = value.astype("float32").astype("float64")
        with torch.no_grad():
            p.copy_(torch.tensor(value))
    return model, {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("pscan", [True, False])
def test_mambapy_agrees_in_float64(mambapy, tmp_path, pscan):
    model, tensors = mambapy_model(mambapy, np.random.default_rng(0), pscan=pscan)
    path = tmp_path / "model.safetensors"
    files.write_tensors(path, tensors, {})
    params, cfg = checkpoints.load(path)  # no config.json: all from shapes and numbers
    assert not cfg.tied and not cfg.decoder_bias and cfg.layer.layout == "original"
    tokens, dlogits = problem("float64")
    logits, grads = ours(params, cfg, tokens, dlogits)
    z = model["backbone"]["embedding"](torch.tensor(tokens))
    for layer in model["backbone"]["layers"]:
        z = layer(z)
    expected = model["lm_head"](model["backbone"]["norm_f"](z))
    expected.backward(torch.tensor(dlogits))
    assert error(logits, expected.detach().numpy()) < 1e-12
    assert grads.keys() == tensors.keys()
    for name, p in model.named_parameters():
        cast = name.endswith(("A_log", "mixer.D"))
        assert error(grads[name], p.grad.numpy()) < (1e-6 if cast else 1e-11), name


def test_mambapy_decodes_as_we_do(mambapy):
    model, tensors = mambapy_model(mambapy, np.random.default_rng(0))
    layer = mamba.Config(d_model=D, d_state=N, dt_rank=R)
    own = dict(d_input=V, d_output=V, decoder="lm", decoder_bias=False, final_norm=True)
    cfg = network.Config("mamba", layer, LAYERS, **own)
    params = network.from_published(tensors, cfg)
    tokens, _ = problem("float64")
    inputs = torch.zeros(B, 2 * D, 3, dtype=torch.float64)
    state, caches = network.state(params, cfg, B), [(None, inputs)] * LAYERS
    for t in range(L):
        logits, state = network.step(params, tokens[:, t], state, cfg)
        with torch.no_grad():
            z = model["backbone"]["embedding"](torch.tensor(tokens[:, t]))
            for i, layer in enumerate(model["backbone"]["layers"]):
                z, caches[i] = layer.step(z, caches[i])
            expected = model["lm_head"](model["backbone"]["norm_f"](z))
        assert error(logits, expected.numpy()) < 1e-12, t


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 19, 64])
def test_its_parallel_scan_is_the_recurrence(mambapy, length):
    """Of real A, forward and backward; its backward has a fault that only complex A shows"""
    rng, E = np.random.default_rng(length), 7
    x, delta, dy = rng.standard_normal((3, B, length, E))
    b, c = rng.standard_normal((2, B, length, N))
    A, skip = -np.exp(rng.standard_normal((E, N))), rng.standard_normal(E)
    given = [x, np.exp(delta - 1), A, b, c, skip]
    y, _, cache = mamba.recurrence_forward(*given)
    grads = mamba.recurrence_backward(dy, cache)[:6]
    inputs = [torch.tensor(a, requires_grad=True) for a in given]
    block = mambapy.Mamba(mambapy.MambaConfig(d_model=4, n_layers=1)).layers[0].mixer
    expected = block.selective_scan(*inputs)
    expected_grads = torch.autograd.grad(expected, inputs, torch.tensor(dy))
    assert error(y, expected.detach().numpy()) < 1e-13
    for name, g, e in zip(["x", "delta", "A", "B", "C", "D"], grads, expected_grads, strict=True):
        assert error(g, e.numpy()) < 1e-12, name


# tnn-pytorch


@pytest.fixture
def tnn_pytorch():
    """The package, made and run in float64: it makes its positions in the default precision"""
    package = pytest.importorskip(
        "tnn_pytorch", reason="tnn_pytorch is not installed: PyPI's is empty, GitHub's has the code"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield package
    torch.set_default_dtype(before)


def against_the_module(part, cfg, module, call, width):
    """Our part against their module with our parameters: output and every gradient"""
    rng = np.random.default_rng(0)
    params = getattr(tnn, f"{part}_init")(cfg, rng, "float64")
    params = {n: p + 0.1 * np.abs(rng.standard_normal(p.shape)) for n, p in params.items()}
    x, dy = rng.standard_normal((2, B, L, width))
    y, cache = getattr(tnn, f"{part}_forward")(params, x, cfg)
    dx, grads = getattr(tnn, f"{part}_backward")(dy, cache)
    grads = tnn.to_published(grads, cfg, part)
    tensors = tnn.to_published(params, cfg, part)
    module.load_state_dict({name: torch.tensor(t) for name, t in tensors.items()})
    own = torch.tensor(x, requires_grad=True)
    expected = call(own)
    expected.backward(torch.tensor(dy))
    assert error(y, expected.detach().numpy()) < 1e-13
    assert error(dx, own.grad.numpy()) < 1e-13
    trained = {name: p.grad.numpy() for name, p in module.named_parameters() if p.requires_grad}
    assert grads.keys() == trained.keys()
    for name, g in trained.items():
        assert error(grads[name], g) < 1e-12, name


TOEPLITZ = [
    {},
    {"causal": True, "use_decay": True, "gamma": 0.9, "layers": 0},
    {"use_decay": True, "gamma": 0.99, "residual": True, "layers": 1},
    {"causal": True, "use_multi_decay": True, "gamma": 0.7, "act_type": "relu"},
    {"use_multi_decay": True, "gamma": 0.5, "act": "gelu", "act_type": "silu"},
    {"causal": True, "par_type": 2, "act": "silu", "act_type": "gelu"},
    {"par_type": 2, "use_decay": True, "act": "none", "act_type": "exp"},
    {"causal": True, "par_type": 3, "residual": True, "act_type": "sigmoid"},
    {"causal": True, "par_type": 3, "use_multi_decay": True, "gamma": 0.9, "act_type": "elu"},
    {"causal": True, "use_decay": True, "act_type": "1+elu"},
    {"act_type": "2+elu"},
    {"use_decay": True, "act_type": "leak"},
]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("settings", TOEPLITZ, ids=str)
def test_tnn_is_what_its_authors_published(tnn_pytorch, settings, heads):
    E, r = 6, 7
    module = tnn_pytorch.Tno(h=heads, dim=E // heads, rpe_dim=r, **settings)
    names = {"act": "rpe_act", "layers": "rpe_layers"}
    own = {names.get(name, name): value for name, value in settings.items() if name != "causal"}
    own |= {"bidirectional": not settings.get("causal", False), "num_heads": heads, "rpe_dim": r}

    def operator(x):
        x = x.reshape(B, L, heads, -1).transpose(1, 2)
        return module(x).transpose(1, 2).reshape(B, L, E)

    cfg = tnn.Config(d_model=E, expand_ratio=1.0, **own)
    against_the_module("operator", cfg, module, operator, E)
    module = tnn_pytorch.Gtu(
        embed_dim=5,
        num_heads=heads,
        rpe_embedding=r,
        expand_ratio=2.5,
        **{{"act": "rpe_act", "layers": "rpe_layers"}.get(n, n): v for n, v in settings.items()},
    )
    cfg = tnn.Config(d_model=5, expand_ratio=2.5, **own)
    assert cfg.width == 12
    against_the_module("mixer", cfg, module, module, 5)


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_layer_of_tnn_is_what_its_authors_published(tnn_pytorch, causal, prenorm):
    own = dict(prenorm=prenorm, use_decay=True, gamma=0.8, expand_ratio=3, rpe_layers=2)
    module = tnn_pytorch.TnnLayer(
        dim=5, num_heads=1, rpe_embedding=7, glu_dim=4, causal=causal, **own
    )
    cfg = tnn.Config(d_model=5, rpe_dim=7, glu_dim=4, bidirectional=not causal, **own)
    against_the_module("block", cfg, module, module, 5)
