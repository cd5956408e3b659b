"""Transformer: golden case, the definition of a derivative, other forms of the same map, PyTorch, a
GPT-2 checkpoint, memory, precision, bad input."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import error
from safetensors.numpy import save_file
from scipy.special import softmax

from ref import Error, backend, cases, gradcheck, network, nn, optim
from ref import transformer as T

GOLDEN = sorted((Path(__file__).parent / "golden").glob("transformer_*.safetensors"))
MASKS = [  # causal, lengths of a batch of 3 relative to L
    (True, None),
    (False, None),
    (True, (1.0, 0.3, 0.0)),
    (False, (1.0, 0.3, 0.0)),
    (False, (0.7, 0.3, 0.0)),
]
SIZES = [(1, 4), (2, 1), (7, 3), (13, 5), (13, 13), (13, 64), (127, 32)]  # L, block


def lengths_of(parts, L):
    return None if parts is None else np.array([max(1, int(part * L)) for part in parts])


def layer(rng, dtype="float64", part="block", **settings):
    """A layer with nothing at a special value"""
    cfg = T.Config(**dict(d_model=6, n_heads=2, d_mlp=10, block=4, context=32) | settings)
    params = getattr(T, f"{part}_init")(cfg, rng, "float64")
    for name, p in params.items():
        noise = rng.standard_normal(p.shape) * (0.5 if p.ndim == 1 else p.shape[1] ** -0.5)
        params[name] = (p + noise).astype(dtype)
    return cfg, params


def run(params, x, dy, cfg, part="block", lengths=None):
    """-> [y, dx, every gradient], in a fixed order"""
    y, cache = getattr(T, f"{part}_forward")(params, x, cfg, lengths=lengths)
    dx, grads = getattr(T, f"{part}_backward")(dy, cache)
    assert grads.keys() == params.keys()
    return [y, dx] + [grads[name] for name in sorted(grads)]


def attention(q, k, v, dy, *options):
    y, cache = T.attention_forward(q, k, v, *options)
    return [y, *T.attention_backward(dy, cache)]


def visible(L, causal, lengths):
    """(B or 1, 1, L, L): whether query t sees key s"""
    t = np.arange(L)
    seen = (t[:, None] >= t[None, :]) | (not causal)
    return seen[None, None] & (True if lengths is None else t < lengths[:, None, None, None])


def naive(q, k, v, causal, lengths):
    """All L² weights at once"""
    S = np.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(q.shape[-1])
    P = softmax(np.where(visible(q.shape[2], causal, lengths), S, -np.inf), axis=-1)
    return np.einsum("bhts,bhsd->bhtd", P, v)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path, plain):
    case = cases.read_case(path)
    for rows in (cases.verify(case), plain(cases.verify, case)):
        assert len(rows) == 29
        assert all(row.ok and row.allowed == 1e-9 for row in rows), rows


def test_gradients():
    for label, errors in gradcheck.errors_of("transformer"):
        assert max(errors.values()) < gradcheck.TOLERANCE, (label, errors)


@pytest.mark.parametrize("causal, parts", MASKS)
def test_gradients_of_the_attention_and_of_masked_blocks(causal, parts, plain):
    rng = np.random.default_rng(0)
    for L, block in ((1, 4), (7, 3), (5, 8)):
        lengths = lengths_of(parts, L)
        q, k, v = rng.standard_normal((3, 3, 2, L, 3))
        cfg, params = layer(rng, bidirectional=not causal, block=block)

        def attend(arrays, options=(causal, lengths, block)):
            return T.attention_forward(*(arrays[n] for n in "qkv"), *options)

        def attend_back(dy, cache):
            return dict(zip("qkv", T.attention_backward(dy, cache), strict=True))

        def whole(arrays, params=params, cfg=cfg, lengths=lengths):
            return T.block_forward({n: arrays[n] for n in params}, arrays["x"], cfg, None, lengths)

        def whole_back(dy, cache):
            dx, grads = T.block_backward(dy, cache)
            return grads | {"x": dx}

        given = {"q": q, "k": k, "v": v}
        if L == 1:  # the only weight is 1, whatever q and k: their gradients are rounding alone
            y, cache = attend(given)
            own = attend_back(np.ones_like(y), cache)
            assert max(np.abs(own.pop("q")).max(), np.abs(own.pop("k")).max()) < 1e-14
            given = {"v": v}

        def attend_some(arrays, q=q, k=k):
            return attend({"q": q, "k": k} | arrays)

        for pair in (
            (attend_some, attend_back, given),
            (whole, whole_back, params | {"x": rng.standard_normal((3, L, 6))}),
        ):
            for errors in (gradcheck.check_pair(*pair), plain(gradcheck.check_pair, *pair)):
                assert max(errors.values()) < gradcheck.TOLERANCE, (L, block, errors)


@pytest.mark.parametrize("causal, parts", MASKS)
@pytest.mark.parametrize("L, block", SIZES)
def test_attention_in_blocks_is_attention(L, block, causal, parts, plain):
    rng = np.random.default_rng(L)
    lengths = lengths_of(parts, L)
    q, k, v, dy = rng.standard_normal((4, 3, 2, L, 5))
    options = causal, lengths, block
    twin, readable = attention(q, k, v, dy, *options), plain(attention, q, k, v, dy, *options)
    assert error(readable[0], naive(q, k, v, causal, lengths)) < 1e-14
    assert max(map(error, twin, readable)) < 1e-13


def test_scores_of_any_size_do_not_overflow(plain):
    rng = np.random.default_rng(0)
    q, k, v, dy = rng.standard_normal((4, 1, 1, 40, 5)).astype("float32")
    for results in (attention(200 * q, k, v, dy), plain(attention, 200 * q, k, v, dy)):
        assert all(np.isfinite(r).all() for r in results)
        assert error(results[0], naive(200.0 * q.astype("f8"), k, v, True, None)) < 1e-3


def test_nan_is_not_hidden(plain):
    rng = np.random.default_rng(0)
    for wrong in range(3):
        q, k, v, dy = rng.standard_normal((4, 1, 1, 40, 5)).astype("float32")
        (q, k, v)[wrong][0, 0, 3, 1] = np.nan
        for y, *_ in (attention(q, k, v, dy), plain(attention, q, k, v, dy)):
            assert np.isnan(y[0, 0, 3]).any()


@pytest.mark.parametrize("settings", [dict(), dict(bidirectional=True)], ids=str)
def test_float32_stays_float32_and_is_precise(settings, plain):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, d_model=32, n_heads=4, d_mlp=0, block=64, **settings)
    x, dy = rng.standard_normal((2, 2, 301, 32))
    lengths = np.array([301, 200])
    exact = run(params, x, dy, cfg, lengths=lengths)
    params = {n: p.astype("f4") for n, p in params.items()}
    given = params, x.astype("f4"), dy.astype("f4"), cfg, "block", lengths
    for results in (run(*given), plain(run, *given)):
        assert {r.dtype.name for r in results} == {"float32"}
        assert max(map(error, results, exact)) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_block_agrees_with_pytorch(causal):
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    rng, L, lengths = np.random.default_rng(0), 11, np.array([11, 6, 1])
    cfg, params = layer(rng, bidirectional=not causal)
    x, dy = rng.standard_normal((2, 3, L, 6))
    inputs = {n: torch.tensor(a, requires_grad=True) for n, a in (params | {"x": x}).items()}
    mask = torch.tensor(visible(L, causal, lengths))
    y = torch_block(torch, inputs, inputs["x"], 2, mask)
    y.backward(torch.tensor(dy))
    expected = [y.detach().numpy(), inputs["x"].grad.numpy()]
    expected += [inputs[n].grad.numpy() for n in sorted(params)]
    results = run(params, x, dy, cfg, lengths=lengths)
    assert max(map(error, results, expected)) < 1e-12


def torch_block(torch, p, x, heads, mask):
    """By PyTorch's own norm, attention and GELU; p has our names, W as (outputs, inputs)"""
    F, (B, L, D) = torch.nn.functional, x.shape
    a = F.layer_norm(x, (D,), p["norm1_weight"], p["norm1_bias"])
    qkv = F.linear(a, p["W_qkv"], p["b_qkv"]).split(D, dim=2)
    q, k, v = (t.view(B, L, heads, D // heads).transpose(1, 2) for t in qkv)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + F.linear(o.transpose(1, 2).reshape(B, L, D), p["W_o"], p["b_o"])
    a = F.layer_norm(x, (D,), p["norm2_weight"], p["norm2_bias"])
    a = F.gelu(F.linear(a, p["W_1"], p["b_1"]), approximate="tanh")
    return x + F.linear(a, p["W_2"], p["b_2"])


def test_step_is_the_causal_block():
    rng = np.random.default_rng(0)
    for part, one_step, L in (("operator", T.operator_step, 32), ("block", T.step, 31)):
        cfg, params = layer(rng, part=part)
        x = rng.standard_normal((3, L, 6))
        y, s, steps = getattr(T, f"{part}_forward")(params, x, cfg)[0], T.state(params, cfg, 3), []
        for t in range(L):
            y_t, s = one_step(params, x[:, t], s, cfg)
            steps.append(y_t)
        assert error(np.stack(steps, axis=1), y) < 1e-12
        assert s["k"].shape == s["v"].shape == (3, 2, 32, 3) and backend.item(s["position"]) == L


def test_step_leaves_its_state_and_refuses_beyond_the_context():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, context=3, dtype="float32")
    x, s = (
        rng.standard_normal((2, 6)).astype("float32"),
        T.state(params, layer(rng, context=3)[0], 2),
    )
    for _ in range(3):
        before = {n: a.copy() for n, a in s.items()}
        y, after = T.step(params, x, s, cfg)
        assert all((s[n] == before[n]).all() for n in s)
        assert y.dtype == after["k"].dtype == np.float32
        s = after
    with pytest.raises(Error, match="context=3 positions"):
        T.step(params, x, s, cfg)
    with pytest.raises(Error, match="no recurrent step"):
        T.state(params, T.Config(bidirectional=True), 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_has_no_influence(bidirectional, plain):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, bidirectional=bidirectional)
    lengths = np.array([11, 7, 1])
    x, dy = rng.standard_normal((2, 3, 13, 6))
    own = np.arange(13) < lengths[:, None]
    dy = dy * own[:, :, None]
    other = np.where(own[:, :, None], x, 1e3 * rng.standard_normal(x.shape))
    for form in (lambda f, *args: f(*args), plain):
        y, dx, *grads = form(run, params, x, dy, cfg, "block", lengths)
        y2, dx2, *grads2 = form(run, params, other, dy, cfg, "block", lengths)
        assert error(y2[own], y[own]) < 1e-15 and error(dx2[own], dx[own]) < 1e-15
        assert not dx[~own].any() and not dx2[~own].any()
        assert max(map(error, grads2, grads)) < 1e-14
        for b, n in enumerate(lengths):  # as without padding
            alone = form(T.block_forward, params, x[b : b + 1, :n], cfg)[0]
            assert error(alone[0], y[b, :n]) < 1e-14
    assert error(T.block_forward(params, other, cfg)[0][own], y[own]) > 1e-3 or not bidirectional


def test_a_causal_map_knows_no_future():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng)
    x = rng.standard_normal((2, 9, 6))
    later = np.concatenate([x[:, :5], rng.standard_normal((2, 4, 6))], axis=1)
    a, b = T.block_forward(params, x, cfg)[0], T.block_forward(params, later, cfg)[0]
    assert error(a[:, :5], b[:, :5]) < 1e-15 and error(a[:, 5:], b[:, 5:]) > 1e-3


@pytest.mark.parametrize("bidirectional", [False, True])
def test_matrix_is_the_operator(bidirectional):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="operator", bidirectional=bidirectional)
    x = rng.standard_normal((3, 9, 6))
    M = T.matrix(params, cfg, x)
    assert M.shape == (3, 6, 9, 9) and error(M.sum(axis=-1), np.ones((3, 6, 9))) < 1e-14
    assert bidirectional or not np.triu(M, 1).any()
    assert (M[:, 0] == M[:, 2]).all() and error(M[:, 0], M[:, 3]) > 1e-3  # a head has 3 channels
    v = x @ params["W_qkv"][12:].T + params["b_qkv"][12:]
    o = np.einsum("bdts,bsd->btd", M, v)
    y = o @ params["W_o"].T + params["b_o"]
    assert error(T.operator_forward(params, x, cfg)[0], y) < 1e-14
    if not bidirectional:
        assert error(T.matrix(params, cfg, x, L=4), M[:, :, :4, :4]) < 1e-14


@pytest.mark.parametrize("form", ["twin", "readable"])
def test_memory_is_linear_in_the_length(form, plain, monkeypatch):
    """Peak of a block's forward and backward beyond its input, output and their gradients"""
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, "float32", d_model=8, n_heads=1, d_mlp=8, block=32)
    monkeypatch.setattr(backend, "_pool", {})  # else recycled memory is not counted
    monkeypatch.setattr(backend, "_free_bytes", 0)

    def call(x):
        y, cache = T.block_forward(params, x, cfg)
        return y, T.block_backward(x, cache)

    peaks = []
    for L in (1024, 2048, 4096, 8192):
        x = rng.standard_normal((1, L, 8)).astype("float32")
        tracemalloc.start()
        plain(call, x) if form == "readable" else call(x)
        peaks.append(tracemalloc.get_traced_memory()[1] - 2 * x.nbytes)  # y, dx; x, dy were there
        tracemalloc.stop()
        backend._pool.clear()
        backend._free_bytes = 0
    growth = np.divide(peaks[1:], peaks[:-1])
    assert (growth > 1.8).all() and (growth < 2.1).all(), peaks
    assert peaks[-1] < 8192**2 * 4 / 8  # an eighth of one matrix of one head


def test_dropout_acts_on_both_branches_element_by_element():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, dropout=0.5, d_model=40)
    x = rng.standard_normal((2, 9, 40))
    y, cache = T.block_forward(params, x, cfg, np.random.default_rng(3))
    assert (y == T.block_forward(params, x, cfg, np.random.default_rng(3))[0]).all()
    for (mask,) in (cache[2], cache[5]):
        assert mask.shape == x.shape and 0.4 < (mask == 0).mean() < 0.6
    assert (cache[2][0] != cache[5][0]).any()
    assert not T.running_statistics(params, cache)
    evaluated = T.block_forward(params, x, cfg)[0]
    cfg = layer(rng, d_model=40)[0]
    assert (evaluated == T.block_forward(params, x, cfg, rng)[0]).all()


def test_initialisation_is_that_of_gpt2():
    rng = np.random.default_rng(0)
    cfg = T.Config(d_model=256, depth=8)
    params = T.block_init(cfg, rng)
    assert {p.dtype.name for p in params.values()} == {"float32"}
    for name, p in params.items():
        if name.startswith("W"):
            deviation = 0.02 / (4 if name in ("W_o", "W_2") else 1)
            assert abs(p.std() / deviation - 1) < 0.02 and abs(p.mean()) < 0.02 * deviation
        else:
            assert (p == (1 if name in ("norm1_weight", "norm2_weight") else 0)).all()
    assert params["W_1"].shape == (1024, 256) and params["W_qkv"].shape == (768, 256)
    assert sum(p.size for p in params.values()) == 12 * 256**2 + 13 * 256
    assert T.mixer_init(cfg, rng).keys() == {"W_qkv", "b_qkv", "W_o", "b_o"}
    assert set(network.groups(params, network.Config("transformer", cfg, 1, 3, 2)).values()) == {
        "main"
    }


def test_odd_memory_layouts_and_read_only_input():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng)
    x, dy = rng.standard_normal((2, 2, 9, 6))
    expected = run(params, x, dy, cfg)
    wide = np.zeros((2, 9, 12))
    wide[..., ::2] = x
    frozen, before = x.copy(), x.copy()
    frozen.flags.writeable = False
    for form in (np.asfortranarray(x), wide[..., ::2], frozen):
        transposed = {n: np.asfortranarray(p) for n, p in params.items()}
        results = run(transposed, form, np.asfortranarray(dy), cfg)
        assert max(map(error, results, expected)) < 1e-13
    assert (x == before).all()
    q, k, v, dy = rng.standard_normal((4, 2, 3, 9, 5))
    expected = attention(q, k, v, dy)
    for form in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2], _frozen):
        assert max(map(error, attention(*map(form, (q, k, v, dy))), expected)) < 1e-13


def _frozen(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def test_bad_input_gets_its_sentence():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng)
    for forward in (T.operator_forward, T.mixer_forward, T.block_forward):
        with pytest.raises(Error, match="float16"):
            forward(params, np.zeros((1, 4, 6), "float16"), cfg)
        for shape in ((4, 6), (1, 4, 5), (1, 0, 6), (0, 4, 6)):
            with pytest.raises(Error, match="expected \\(B, L, 6\\)"):
                forward(params, np.zeros(shape), cfg)
        for lengths in ([0, 4], [1, 5], [4]):
            with pytest.raises(Error, match="2 lengths between 1 and 4"):
                forward(params, np.zeros((2, 4, 6)), cfg, lengths=np.array(lengths))
    with pytest.raises(Error, match="give x"):
        T.matrix(params, cfg, L=4)
    for look in (lambda: T.impulse_response(params, cfg, 4), lambda: T.hankel_values(params, cfg)):
        with pytest.raises(Error, match="no linear time-invariant map"):
            look()
    with pytest.raises(Error, match="n_heads=3 does not divide d_model=128"):
        T.Config(n_heads=3)
    for wrong in (
        dict(d_model=0),
        dict(n_heads=0),
        dict(context=0),
        dict(block=0),
        dict(depth=0),
        dict(d_mlp=-1),
        dict(dropout=1.0),
        dict(dropout=float("nan")),
    ):
        with pytest.raises(Error, match=next(iter(wrong))):
            T.Config(**wrong)


def test_published_names_are_linear_and_invertible():
    rng = np.random.default_rng(0)
    for part in T.PUBLISHED:
        cfg, params = layer(rng, part=part)
        tensors = T.to_published(params, cfg, part)
        prefix = "attn." if part == "block" else ""
        assert tensors[f"{prefix}c_attn.weight"].shape == (6, 18)
        back = T.from_published(tensors, cfg, part)
        assert back.keys() == params.keys()
        assert all((back[n] == params[n]).all() for n in params)
        assert T.config_of({"n_heads": 2, "block": 4, "context": 32}, tensors, part) == (
            cfg if part == "block" else layer(rng, d_mlp=0)[0]
        )


def test_published_settings_of_another_gpt2_are_refused():
    settings = {"n_layers": 1, "vocab_size": 7, "context_length": 8, "norm_eps": 1e-5}
    settings["layout"] = "transformers"
    assert T.network_settings(settings, {})["positions"] == 8
    with pytest.raises(Error, match="norm_eps=1e-06"):
        T.network_settings(settings | {"norm_eps": 1e-6}, {})
    with pytest.raises(Error, match="layout"):
        T.network_settings(settings | {"layout": "nanogpt"}, {})


# A checkpoint of GPT-2


def checkpoint(rng, V=13, P=10, D=8, layers=2, dtype="float32"):
    """Random tensors under transformers' names, with the buffers of older versions"""
    shapes = {"wte.weight": (V, D), "wpe.weight": (P, D)}
    for i in range(layers):
        for name, shape in (
            ("ln_1.weight", (D,)),
            ("ln_1.bias", (D,)),
            ("attn.c_attn.weight", (D, 3 * D)),
            ("attn.c_attn.bias", (3 * D,)),
            ("attn.c_proj.weight", (D, D)),
            ("attn.c_proj.bias", (D,)),
            ("ln_2.weight", (D,)),
            ("ln_2.bias", (D,)),
            ("mlp.c_fc.weight", (D, 4 * D)),
            ("mlp.c_fc.bias", (4 * D,)),
            ("mlp.c_proj.weight", (4 * D, D)),
            ("mlp.c_proj.bias", (D,)),
            ("attn.bias", (1, 1, P, P)),
            ("attn.masked_bias", ()),
        ):
            shapes[f"h.{i}.{name}"] = shape
    shapes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    return {
        n: np.asarray(0.5 * rng.standard_normal(shape)).astype(dtype) for n, shape in shapes.items()
    }


def torch_gpt2(torch, tensors, tokens, heads):
    """Logits from transformers' tensors"""
    t, F, L = {n: torch.tensor(a) for n, a in tensors.items()}, torch.nn.functional, tokens.shape[1]
    x, D = t["wte.weight"][torch.tensor(tokens)] + t["wpe.weight"][:L], len(t["ln_f.bias"])
    causal = torch.full((L, L), -torch.inf, dtype=x.dtype).triu(1)
    i = 0
    while f"h.{i}.ln_1.weight" in t:
        h = {n.removeprefix(f"h.{i}."): a for n, a in t.items() if n.startswith(f"h.{i}.")}
        a = F.layer_norm(x, (D,), h["ln_1.weight"], h["ln_1.bias"])
        q, k, v = (a @ h["attn.c_attn.weight"] + h["attn.c_attn.bias"]).chunk(3, dim=2)
        outs = []
        for c in torch.arange(D).chunk(heads):
            S = q[..., c] @ k[..., c].mT / len(c) ** 0.5
            outs.append(torch.softmax(S + causal, dim=2) @ v[..., c])
        x = x + torch.cat(outs, dim=2) @ h["attn.c_proj.weight"] + h["attn.c_proj.bias"]
        a = F.layer_norm(x, (D,), h["ln_2.weight"], h["ln_2.bias"])
        a = F.gelu(a @ h["mlp.c_fc.weight"] + h["mlp.c_fc.bias"], approximate="tanh")
        x = x + a @ h["mlp.c_proj.weight"] + h["mlp.c_proj.bias"]
        i += 1
    return F.layer_norm(x, (D,), t["ln_f.weight"], t["ln_f.bias"]) @ t["wte.weight"].T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_gpt2_checkpoint_gives_its_logits(tmp_path, dtype, prefix):
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    rng, path = np.random.default_rng(0), tmp_path / "model.safetensors"
    tensors, tokens = checkpoint(rng, dtype=dtype), rng.integers(0, 13, (2, 9))
    stored = {prefix + n: t for n, t in tensors.items()}
    if prefix:
        stored["lm_head.weight"] = tensors["wte.weight"].copy()
    save_file(stored, path)
    for heads, given in ((4, 4), (1, None), (2, None)):  # from the argument, D/64, config.json
        if heads == 2:
            settings = {"n_head": 2, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
            (tmp_path / "config.json").write_text(json.dumps(settings))
        params, cfg = T.load_gpt2(path, given)
        assert cfg.layer.n_heads == heads and cfg.positions == cfg.layer.context == 10
        logits, _ = network.forward(params, tokens, cfg)
        expected = torch_gpt2(torch, tensors, tokens, heads).numpy()
        assert logits.dtype == expected.dtype == np.dtype(dtype)
        assert error(logits, expected) < (1e-13 if dtype == "float64" else 1e-5)


def test_half_precision_checkpoints_load_as_float32(tmp_path):
    path, tensors = tmp_path / "g.safetensors", checkpoint(np.random.default_rng(0), dtype="f2")
    save_file(tensors, path)
    params, _ = T.load_gpt2(str(path))
    assert {p.dtype.name for p in params.values()} == {"float32"}
    assert (params["encoder.weight"] == tensors["wte.weight"]).all()


def test_other_checkpoints_get_their_sentence(tmp_path):
    path, tensors = tmp_path / "g.safetensors", checkpoint(np.random.default_rng(0))
    wide = np.zeros((8, 25), "float32")

    def load(changes):
        save_file({n: t for n, t in (tensors | changes).items() if t is not None}, path)
        return T.load_gpt2(path)

    for changes, sentence in (
        (
            {"h.1.attn.c_attn.weight": wide},
            r"c_attn.weight has the shape \(8, 25\); expected \(8, 24",
        ),
        ({"h.1.mlp.c_fc.bias": None}, r"h.1.mlp.c_fc.bias \(32,\) is missing"),
        ({"h.0.extra": wide}, r"h.0.extra has the shape \(8, 25\); expected no tensor"),
        ({"wte.weight": None}, "is no GPT-2 checkpoint"),
        ({"wpe.weight": wide[0]}, "is no GPT-2 checkpoint"),
        ({"h.first.extra": wide}, "is no GPT-2 checkpoint"),
        ({"lm_head.weight": tensors["wte.weight"] + 1}, "lm_head.weight is not the embedding"),
        ({"lm_head.weight": wide}, "lm_head.weight is not the embedding"),
    ):
        with pytest.raises(Error, match=sentence):
            load(changes)
    load({})
    for settings, sentence in (
        ({"activation_function": "relu"}, "relu"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True"),
        ({"layer_norm_epsilon": 1e-6}, "1e-06"),
        ({"n_head": 3}, "n_heads=3 does not divide d_model=8"),
        ({"n_head": "2"}, "is no GPT-2 checkpoint"),
        ({"n_layer": 3}, "n_layer=3, but .* has 2"),
        ({"n_positions": 1024}, "n_positions=1024, but .* has 10"),
        ([], "config.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(Error, match=sentence):
            T.load_gpt2(path)
    with pytest.raises(Error, match="There is no file"):
        T.load_gpt2(tmp_path / "no" / "model.safetensors")


def test_ten_steps_are_pinned():
    """A loss trajectory of the whole chain, to catch a change that no other test sees"""
    rng = np.random.default_rng(0)
    own = T.Config(d_model=8, n_heads=2, bidirectional=True, dropout=0.1, depth=2, block=5)
    sizes = dict(n_layers=2, d_input=7, d_output=3, final_norm=True, positions=12)
    cfg = network.Config("transformer", own, **sizes)
    params = network.init(cfg, rng, "float64")
    moments, groups = optim.adamw_init(params), dict.fromkeys(params, optim.Group(1e-2, 0.1))
    x, targets, losses = rng.integers(0, 7, (4, 12)), rng.integers(0, 3, 4), []
    for i in range(1, 11):
        lengths, dropout = np.array([12, 3, 7, 1]), np.random.default_rng([1, i])
        logits, cache = network.forward(params, x, cfg, lengths, dropout)
        loss, loss_cache = nn.softmax_cross_entropy_forward(logits, targets)
        _, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)
        optim.adamw_update(params, grads, moments, i, groups)
        losses.append(float(loss))
    assert error(losses, PINNED) < 1e-9, losses


PINNED = [
    1.17888174864059,
    0.9847251789793721,
    0.7996716736622903,
    0.7167028411297744,
    0.6230895541034924,
    0.5455515042430001,
    0.5168281781624746,
    0.4809479163888877,
    0.48169654975941495,
    0.4164257796032067,
]
