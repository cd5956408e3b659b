"""Mamba and Longhorn: golden cases, the definition of a derivative, sequences that are cut, other
forms of the same map, extreme decays, precision, bad input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import error

from ref import Error, cases, gradcheck, longhorn, mamba, network, nn, selective

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted([*GOLDEN.glob("mamba_*.safetensors"), *GOLDEN.glob("longhorn_*.safetensors")])
SHAPES = [(1, 1), (2, 2), (1, 3), (3, 127), (1, 1021)]
LAYERS = [(mamba, {}), (longhorn, {}), (longhorn, {"update": "exact"})]
EACH = pytest.mark.parametrize("module, settings", LAYERS, ids=str)


def scan(module, arrays, dy, dlast=None, **settings):
    """-> everything a scan computes, by name"""
    y, last, cache = module.scan_forward(**arrays, **settings)
    return {"y": y, "last": last} | module.scan_backward(dy, cache, dlast)


def arguments(module, rng, B, L, E=5, N=3, dtype="float64"):
    """Arguments of a scan, dy, dlast"""
    inputs = module.scan_inputs(module.Config(d_model=E, d_state=N), B, L, rng)
    dy, dlast = rng.standard_normal((B, L, E)), rng.standard_normal((B, E, N))
    return {n: a.astype(dtype) for n, a in inputs.items()}, dy.astype(dtype), dlast.astype(dtype)


def layer(module, rng, part="block", **settings):
    """A layer of which no parameter has a special value"""
    cfg = module.Config(**dict(d_model=5, d_state=3) | settings)
    params = getattr(module, f"{part}_init")(cfg, rng, "float64")
    return cfg, {n: p + 0.3 * rng.standard_normal(p.shape) for n, p in params.items()}


def decode(one_step, state, params, x, cfg):
    steps = []
    for t in range(x.shape[1]):
        y_t, state = one_step(params, x[:, t], state, cfg)
        steps.append(y_t)
    return np.stack(steps, axis=1)


def close(a, b, allowed=1e-12):
    """Whether all that both dicts hold agrees, each on its own scale"""
    assert a.keys() == b.keys()
    for name in a:
        assert error(a[name], b[name]) < allowed, (name, error(a[name], b[name]))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path, plain):
    case = cases.read_case(path)
    claims = [n for n in case.tensors if n.startswith(("out.", "grad."))]
    for rows in (cases.verify(case), plain(cases.verify, case)):
        assert len(rows) == len(claims) >= 8
        assert all(row.ok and row.allowed == 1e-9 for row in rows), rows


@pytest.mark.parametrize("model", ["mamba", "longhorn"])
def test_gradients(model, plain):
    for errors_of in (gradcheck.errors_of, lambda m: plain(list, gradcheck.errors_of(m))):
        for label, errors in errors_of(model):
            assert max(errors.values()) < gradcheck.TOLERANCE, (label, errors)


FAULTS = {
    "a decay that is not decayed": (mamba, "_decay", lambda a: a**0.999),
    "a step size": (longhorn, "_step_size", lambda delta: 0.999 * delta),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch, plain):
    module, name, spoil = FAULTS[fault]
    right, path = getattr(module, name), GOLDEN / f"{module.__name__[4:]}_scan_a.safetensors"
    monkeypatch.setattr(module, name, lambda *args: spoil(right(*args)))
    assert not all(row.ok for row in plain(cases.verify, cases.read_case(path)))


# Twins


@pytest.mark.parametrize("module", [mamba, longhorn])
@pytest.mark.parametrize("B, L", SHAPES)
def test_twins_are_the_readable_form(module, B, L, plain):
    rng = np.random.default_rng(L)
    arrays, dy, dlast = arguments(module, rng, B, L)
    close(scan(module, arrays, dy, dlast), plain(scan, module, arrays, dy, dlast))
    needed = {n: a for n, a in arrays.items() if n not in ("D", "z", "dt_bias", module.SCAN_STATE)}
    close(scan(module, needed, dy), plain(scan, module, needed, dy))


@pytest.mark.parametrize("module", [mamba, longhorn])
@pytest.mark.parametrize("E, N", [(1, 1), (33, 4), (8, 17), (100, 13)])
def test_any_number_of_channels_and_states(module, E, N, plain):
    given = arguments(module, np.random.default_rng(E), 2, 40, E, N)
    close(scan(module, *given), plain(scan, module, *given))


@EACH
def test_float32_stays_float32_and_is_precise(module, settings, plain):
    arrays, dy, dlast = arguments(module, np.random.default_rng(0), 2, 300, 17, 16)
    arrays |= {n: 0.25 * a for n, a in arrays.items() if n in ("B", "C", "k", "q")}
    exact = scan(module, arrays, dy, dlast, **settings)
    narrow = {n: a.astype("float32") for n, a in arrays.items()}
    given = module, narrow, dy.astype("float32"), dlast.astype("float32")
    for results in (scan(*given, **settings), plain(scan, *given, **settings)):
        assert {a.dtype.name for a in results.values()} == {"float32"}
        close(results, exact, 5e-6)


@EACH
def test_a_float32_layer_stays_float32(module, settings):
    rng = np.random.default_rng(0)
    cfg = module.Config(d_model=20, **settings)
    params = module.block_init(cfg, rng)
    x = rng.standard_normal((2, 7, 20)).astype("float32")
    y, cache = module.block_forward(params, x, cfg)
    dx, grads = module.block_backward(y, cache)
    state = module.final_state(cache).values()
    assert {a.dtype.name for a in (y, dx, *grads.values(), *state)} == {"float32"}


@pytest.mark.parametrize("module", [mamba, longhorn])
def test_views_and_arrays_for_reading_only(module, plain):
    """Every second element of every axis, in Fortran's order, is as good as a copy of its own"""
    arrays, dy, dlast = arguments(module, np.random.default_rng(3), 2, 30)

    def view(a):
        wide = np.full([2 * n for n in a.shape], np.nan, order="F")
        inner = wide[tuple(slice(None, None, 2) for _ in a.shape)]
        inner[:] = a
        inner.flags.writeable = False
        return inner

    strange = {n: view(a) for n, a in arrays.items()}
    for run in (scan, lambda *args: plain(scan, *args)):
        close(run(module, strange, view(dy), view(dlast)), run(module, arrays, dy, dlast))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_decay_next_to_zero_and_to_one(dtype, plain):
    """δ from 1e-30 to 1e30: the state is kept or lost entirely, and every number stays finite"""
    arrays, dy, dlast = arguments(mamba, np.random.default_rng(4), 1, 60, 6, 4, dtype)
    del arrays["dt_bias"]
    arrays["dt"][:, :, 0] = -80  # δ = 1.8e-35: nothing enters, nothing is lost
    arrays["dt"][:, :, 1] = 1e4
    arrays["dt"][:, ::2, 2] = 1e30 if dtype == "float64" else 1e15
    arrays["dt"][:, :, 3] = -1e4  # δ = 0
    arrays["A"][4], arrays["A"][5] = -1e-30, -1e30
    twin, readable = scan(mamba, arrays, dy, dlast), plain(scan, mamba, arrays, dy, dlast)
    assert all(np.isfinite(a).all() for a in twin.values())
    close(twin, readable, 1e-12 if dtype == "float64" else 1e-5)
    h0, z = arrays["h0"], arrays["z"]
    kept = twin["last"][:, 3] - h0[:, 3]
    assert not kept.any()
    silu = nn.silu_forward(z)[0]
    direct = (h0[:, None, 3] * arrays["C"]).sum(-1) + arrays["D"][3] * arrays["x"][:, :, 3]
    assert error(twin["y"][:, :, 3], direct * silu[:, :, 3]) < 1e-5
    assert not twin["h0"][:, 1].any()  # gone after one step


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_saturated_step_sizes(dtype, plain):
    """β exactly 0 and 1, keys of 0 and of 1e4"""
    arrays, dy, dlast = arguments(longhorn, np.random.default_rng(4), 1, 60, 6, 4, dtype)
    del arrays["dt_bias"]
    arrays["dt"][:, :, 0], arrays["dt"][:, :, 1] = -1e4, 1e4
    arrays["k"][:, 10:20] = 0
    arrays["k"][:, 30:33] *= 1e4
    twin, readable = scan(longhorn, arrays, dy, dlast), plain(scan, longhorn, arrays, dy, dlast)
    assert all(np.isfinite(a).all() for a in twin.values())
    close(twin, readable, 1e-12 if dtype == "float64" else 1e-4)
    assert (twin["last"][:, 0] == arrays["s0"][:, 0]).all()  # β = 0: nothing is learned
    assert (twin["s0"][:, 0] != 0).any() and not twin["dt"][:, 10:20].any()


@pytest.mark.parametrize("module", [mamba, longhorn])
def test_extreme_gradients_by_their_definition(module):
    """Decays of e^-20 and of 1 - 1e-9 between ordinary ones"""
    rng = np.random.default_rng(5)
    arrays, _, _ = arguments(module, rng, 1, 9, 4, 2)
    arrays["dt"][:, 2] = 20 if module is mamba else 8
    arrays["dt"][:, 5] = -20 if module is mamba else -8

    def forward(arrays):
        y, last, cache = module.scan_forward(**arrays)
        return np.concatenate([y.ravel(), last.ravel()]), (cache, y.shape, last.shape)

    def backward(dout, cache):
        cache, y, last = cache
        n = np.prod(y)
        return module.scan_backward(dout[:n].reshape(y), cache, dout[n:].reshape(last))

    errors = gradcheck.check_pair(forward, backward, arrays)
    assert max(errors.values()) < gradcheck.TOLERANCE, errors


# A sequence that is cut


@EACH
@pytest.mark.parametrize("cut", [1, 2, 8, 30, 36])
def test_a_scan_goes_on_where_it_was_cut(module, settings, cut):
    rng = np.random.default_rng(cut)
    arrays, dy, dlast = arguments(module, rng, 2, 37)
    whole = scan(module, arrays, dy, dlast, **settings)
    parts = [
        arrays | {n: arrays[n][:, part] for n in module.SCAN_IN_TIME}
        for part in (slice(0, cut), slice(cut, None))
    ]
    y1, state, cache1 = module.scan_forward(**parts[0], **settings)
    y2, last, cache2 = module.scan_forward(**parts[1] | {module.SCAN_STATE: state}, **settings)
    second = module.scan_backward(dy[:, cut:], cache2, dlast)
    first = module.scan_backward(dy[:, :cut], cache1, second.pop(module.SCAN_STATE))
    joined = {"y": np.concatenate([y1, y2], 1), "last": last} | {
        n: np.concatenate([first[n], second[n]], 1)
        if n in module.SCAN_IN_TIME
        else first[n] + second.get(n, 0)
        for n in first
    }
    close(joined, whole)


@EACH
@pytest.mark.parametrize("cut", [1, 3, 20])
@pytest.mark.parametrize("part", ["mixer", "block"])
def test_a_layer_goes_on_where_it_was_cut(module, settings, cut, part):
    rng = np.random.default_rng(cut)
    cfg, params = layer(module, rng, part, **settings)
    x, dy = rng.standard_normal((2, 2, 21, 5))
    state = {n: rng.standard_normal(a.shape) for n, a in module.state(params, cfg, 2).items()}
    dstate = {n: rng.standard_normal(a.shape) for n, a in state.items()}
    forward, backward = (getattr(module, f"{part}_{way}") for way in ("forward", "backward"))
    after = module.mixer_state if part == "mixer" else module.final_state

    y, cache = forward(params, x, cfg, None, state)
    dx, grads = backward(dy, cache, dstate)
    whole = {"y": y, "dx": dx} | after(cache) | grads

    y1, cache1 = forward(params, x[:, :cut], cfg, None, state)
    y2, cache2 = forward(params, x[:, cut:], cfg, None, after(cache1))
    dx2, grads2 = backward(dy[:, cut:], cache2, dstate)
    dmiddle = {n: grads2.pop(f"state.{n}") for n in state}
    dx1, grads1 = backward(dy[:, :cut], cache1, dmiddle)
    joined = {"y": np.concatenate([y1, y2], 1), "dx": np.concatenate([dx1, dx2], 1)}
    close(joined | after(cache2) | {n: g + grads2.get(n, 0) for n, g in grads1.items()}, whole)


@EACH
def test_a_network_goes_on_where_it_was_cut(module, settings):
    rng = np.random.default_rng(0)
    cfg = lm(module, **settings)
    params = network.init(cfg, rng, "float64")
    x, cut = rng.integers(0, 9, (2, 13)), 6
    y, cache = network.forward(params, x, cfg, state=network.state(params, cfg, 2))
    dy = rng.standard_normal(y.shape)
    _, grads = network.backward(dy, cache)
    y1, cache1 = network.forward(params, x[:, :cut], cfg, state=network.state(params, cfg, 2))
    middle = network.final_state(cache1)
    y2, cache2 = network.forward(params, x[:, cut:], cfg, state=middle)
    assert error(np.concatenate([y1, y2], 1), y) < 1e-12
    assert (middle["position"], network.final_state(cache2)["position"]) == (cut, 13)
    _, grads2 = network.backward(dy[:, cut:], cache2)
    dmiddle = network.state_gradient(grads2)
    _, grads1 = network.backward(dy[:, :cut], cache1, dmiddle)
    starts = [n for n in grads if ".state." in n]
    assert len(starts) == 2 and all(grads[n].any() for n in starts)
    close({n: g if n in starts else g + grads2[n] for n, g in grads1.items()}, grads)


@EACH
@pytest.mark.parametrize("conv", [1, 4])
def test_step_is_the_parallel_form(module, settings, conv):
    rng = np.random.default_rng(0)
    cfg, params = layer(module, rng, d_conv=conv, expand=3, **settings)
    x = rng.standard_normal((2, 40, 5))
    state = module.state(params, cfg, 2)
    for forward, one_step in (
        (module.mixer_forward, module.mixer_step),
        (module.block_forward, module.step),
    ):
        y = decode(one_step, state, params, x, cfg)
        assert error(y, forward(params, x, cfg)[0]) < 1e-12
    wide = rng.standard_normal((2, 40, 15))
    y = decode(module.operator_step, state, params, wide, cfg)
    assert error(y, module.operator_forward(params, wide, cfg)[0]) < 1e-12
    assert all(not a.any() for a in state.values())  # a step changes no state in place


def lm(module, **settings):
    layer = module.Config(d_model=6, d_state=3, **settings)
    return network.Config(
        module.__name__[4:], layer, 2, 9, 9, decoder="lm", tied=True, final_norm=True
    )


@EACH
def test_a_network_steps_through_what_it_sees_at_once(module, settings):
    rng = np.random.default_rng(0)
    cfg = lm(module, **settings)
    params, x = network.init(cfg, rng, "float64"), rng.integers(0, 9, (2, 11))
    y, _ = network.forward(params, x, cfg)
    assert error(decode(network.step, network.state(params, cfg, 2), params, x, cfg), y) < 1e-12
    where = rng.random((2, 11)) < 0.4
    some, cache = network.forward(params, x, cfg, where=where)
    assert error(some, y[where]) < 1e-12
    dy = np.zeros_like(y)
    dy[where] = rng.standard_normal(some.shape)
    _, whole = network.backward(dy, network.forward(params, x, cfg)[1])
    close(network.backward(dy[where], cache)[1], whole)
    with pytest.raises(Error, match="outside the vocabulary"):
        network.step(params, np.array([9, 0]), network.state(params, cfg, 2), cfg)


# The same map in other forms


@EACH
def test_matrix_is_the_operator(module, settings):
    rng = np.random.default_rng(0)
    cfg, params = layer(module, rng, "operator", **settings)
    x = rng.standard_normal((2, 9, 10))
    M = module.matrix(params, cfg, x)
    assert M.shape == (2, 10, 9, 9) and not np.triu(M, 1).any()
    y = np.einsum("bets,bse->bte", M, x)
    assert error(module.operator_forward(params, x, cfg)[0], y) < 1e-12
    assert error(module.matrix(params, cfg, x, L=4), M[:, :, :4, :4]) < 1e-12
    assert error(module.matrix(params, cfg, x, channels=3), M[:, :3]) < 1e-12
    with pytest.raises(Error, match="give x"):
        module.matrix(params, cfg)


def test_hidden_attention_by_its_formula():
    """α_ts = C_t · Π_{r=s+1..t} exp(δ_r A) · δ_s B_s, product by product"""
    rng = np.random.default_rng(0)
    cfg, params = layer(mamba, rng, "operator")
    x = rng.standard_normal((1, 6, 10))
    M = mamba.matrix(params, cfg, x)
    dt, B, C, _ = selective.selection_forward(params, x)
    delta, A = np.log1p(np.exp(dt)), -np.exp(params["A_log"])
    for t in range(6):
        for s in range(t + 1):
            decay = np.prod([np.exp(delta[0, r, :, None] * A) for r in range(s + 1, t + 1)], axis=0)
            alpha = (C[0, t] * decay * delta[0, s, :, None] * B[0, s]).sum(-1)
            assert error(M[0, :, t, s], alpha + (t == s) * params["D"]) < 1e-12


def test_the_exact_update_solves_the_objective():
    """The derivative of |S - S'|² + |S k - x|²_β vanishes at (3); at (4) it does not"""
    rng = np.random.default_rng(0)
    S, x, beta = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 5)), rng.random((2, 5))
    k = rng.standard_normal((2, 3))
    delta = beta / (1 + beta * (k * k).sum(-1, keepdims=True))

    def slope(new):
        missing = (new * k[:, None]).sum(-1) - x
        return 2 * (new - S) + 2 * (beta * missing)[..., None] * k[:, None]

    assert np.abs(slope(longhorn.exact_update(S, x, delta, k))).max() < 1e-14
    assert np.abs(slope(longhorn.diagonal_update(S, x, delta, k))).max() > 0.1


def test_both_updates_agree_for_one_state():
    rng = np.random.default_rng(0)
    arrays, dy, dlast = arguments(longhorn, rng, 2, 40, 5, 1)
    close(
        scan(longhorn, arrays, dy, dlast, update="exact"),
        scan(longhorn, arrays, dy, dlast, update="diagonal"),
    )


def test_a_state_recalls_what_it_learned():
    """The exact update at β → ∞ recalls the value of orthogonal keys: Δ = 1 / k.k"""
    keys, values = np.eye(3), np.array([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]])
    S = np.zeros((1, 2, 3))
    for k, x in zip(keys, values, strict=True):
        S = longhorn.exact_update(S, x[None], np.ones((1, 2)), k[None])
    assert np.allclose(S[0] @ keys.T, values.T)


# Published names, settings, bad input


@EACH
@pytest.mark.parametrize("part", ["operator", "mixer", "block"])
def test_published_names_go_both_ways(module, settings, part):
    cfg, params = layer(module, np.random.default_rng(0), part, dt_rank=2, **settings)
    tensors = module.to_published(params, cfg, part)
    back = module.from_published(tensors, cfg, part)
    assert back.keys() == params.keys() and all(back[n] is params[n] for n in params)
    given = settings | ({"d_model": 5} if part == "operator" else {})
    assert module.config_of(given, tensors, part) == replace(cfg, depth=cfg.depth)


@pytest.mark.parametrize("layout", selective.LAYOUTS)
@pytest.mark.parametrize("module", [mamba, longhorn])
def test_networks_in_both_layouts(module, layout):
    cfg = lm(module, layout=layout)
    params = network.init(cfg, np.random.default_rng(0), "float64")
    tensors = network.to_published(params, cfg)
    embedding = {"original": "embedding", "transformers": "embeddings"}[layout]
    assert f"backbone.{embedding}.weight" in tensors
    assert ("lm_head.weight" in tensors) == (layout == "original")
    close(network.from_published(tensors, cfg), params)
    tensors["lm_head.weight"] = params["encoder.weight"] + 1
    with pytest.raises(Error, match="the two differ"):
        network.from_published(tensors, cfg)


@pytest.mark.parametrize("module", [mamba, longhorn])
def test_a_network_case_as_the_published_code_would_write_it(module):
    """Tied head listed twice, each time with the whole gradient; settings of its own names"""
    cfg = lm(module)
    part = cases.Part(module.__name__[4:], "network", cfg)
    params, x = part.template(), np.array([[1, 5, 0, 8, 3]])
    dy = np.random.default_rng(0).standard_normal((1, 5, 9))
    tensors = {f"param.{n}": t for n, t in params.items()} | {"in.x": x, "dout.y": dy}
    tensors |= part.run(params, {"x": x}, {"y": dy})
    heads = [f"grad.param.{n}" for n in ("backbone.embedding.weight", "lm_head.weight")]
    assert (tensors[heads[0]] == tensors[heads[1]]).all() and tensors[heads[0]].any()
    settings = {"n_layer": 2, "vocab_size": 9, "rms_norm": True, "dt_rank": "auto"}
    case = cases.Case(part.model, "network", "float64", settings, tensors)
    assert all(row.ok for row in cases.verify(case))
    with pytest.raises(Error, match="rms_norm=False"):
        cases.verify(replace(case, settings=settings | {"rms_norm": False}))


@pytest.mark.parametrize("model", ["mamba", "longhorn"])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("part", ["scan", "operator", "mixer", "block", "network"])
def test_cases_of_every_part(model, part, precision, tmp_path):
    settings = {"d_model": 4, "d_state": 3}
    case = cases.make_case(model, part, settings, L=9, precision=precision)
    cases.write_case(tmp_path / "c.safetensors", case)
    rows = cases.verify(cases.read_case(tmp_path / "c.safetensors"))
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
    assert ("out.y_steps" in {row.tensor for row in rows}) == (part != "network")


@pytest.mark.parametrize("model", ["mamba", "longhorn"])
def test_cases_of_scans_with_initial_state(model):
    case = cases.make_case(model, "scan", {"d_model": 4, "d_state": 3}, L=9, initial_state=True)
    state = f"in.{network.model_module(model).SCAN_STATE}"
    assert {state, "dout.last_state", f"grad.{state}"} <= case.tensors.keys()
    assert all(row.ok for row in cases.verify(case))
    lost = {n: t for n, t in case.tensors.items() if n != state}
    rows = cases.verify(replace(case, tensors=lost))
    assert not any(row.ok for row in rows if row.tensor in ("out.y", "out.last_state"))
    with pytest.raises(Error, match="'expand' is not one of"):
        cases.make_case(model, "scan", {"d_model": 4, "expand": 3})
    bad = case.tensors | {"dout.last_state": case.tensors["dout.last_state"][:1]}
    with pytest.raises(Error, match=r"dout.last_state has the shape \(1, 4, 3\)"):
        cases.verify(replace(case, tensors=bad))
    with pytest.raises(Error, match=r"in.x is missing"):
        cases.verify(replace(case, tensors={state: case.tensors[state]}))
    with pytest.raises(Error, match=r"in\.h9 is not an input"):
        cases.verify(replace(case, tensors=case.tensors | {"in.h9": case.tensors["in.x"]}))
    with pytest.raises(Error, match="not one of"):
        cases.verify(replace(case, settings={"d_state": 3}))


@pytest.mark.parametrize("module", [mamba, longhorn])
def test_bad_input_gets_its_sentence(module):
    rng = np.random.default_rng(0)
    arrays, dy, _ = arguments(module, rng, 2, 7)
    name = "B" if module is mamba else "k"
    for change, sentence in (
        ({"x": arrays["x"].astype("float16")}, "dtype float16"),
        ({"x": arrays["x"][0]}, "expected"),
        ({"dt": arrays["dt"][:, :-1]}, "dt has shape"),
        ({name: arrays[name][:1]}, f"{name} has shape"),
        ({name: arrays[name].astype("float32")}, "dtype float32"),
        ({"D": arrays["D"][:-1]}, "D has shape"),
        ({module.SCAN_STATE: dy}, f"{module.SCAN_STATE} has shape"),
    ):
        with pytest.raises(Error, match=sentence):
            module.scan_forward(**arrays | change)
    y, last, cache = module.scan_forward(**arrays)
    for dy, dlast, sentence in (
        (y[:, :-1], last, "dy has shape"),
        (y[:, :, :1], None, "dy has shape"),
        (y.astype("float32"), last, "dy has shape .* dtype float32"),
        (y, last[:1], "the gradient of the last state has shape"),
        (y, last[:, :, :1], "the gradient of the last state has shape"),
    ):
        with pytest.raises(Error, match=sentence):
            module.scan_backward(dy, cache, dlast)
    if module is mamba:
        with pytest.raises(Error, match="A has shape"):
            mamba.scan_forward(**arrays | {"A": arrays["A"].T})
    else:
        with pytest.raises(Error, match="update='rank one'"):
            longhorn.scan_forward(**arrays, update="rank one")
    for settings, sentence in (
        ({"d_state": 0}, "d_state=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dt_rank": -1}, "dt_rank=-1"),
        ({"layout": "mine"}, "layout='mine'"),
    ):
        with pytest.raises(Error, match=sentence):
            module.Config(**settings)
    cfg, params = layer(module, rng)
    with pytest.raises(Error, match="expected"):
        module.block_forward(params, rng.standard_normal((2, 7, 4)), cfg)
    x, state = rng.standard_normal((2, 7, 5)), module.state(params, cfg, 2)
    for wrong, sentence in (
        (module.state(params, cfg, 1), "state conv has shape"),
        (state | {"conv": state["conv"][:, 1:]}, "state conv has shape"),
        (state | {"ssm": state["ssm"].astype("float32")}, "state ssm has shape .* float32"),
        ({}, "the state has no 'conv'"),
    ):
        with pytest.raises(Error, match=sentence):
            module.block_forward(params, x, cfg, state=wrong)
    _, cache = module.block_forward(params, x, cfg, state=state)
    for name in state:
        with pytest.raises(Error, match="the gradient of"):
            module.block_backward(x, cache, state | {name: state[name][:1]})
    for look in (module.impulse_response, module.hankel_values):
        with pytest.raises(Error, match="no linear time-invariant map"):
            look(params, cfg, *([5] if look is module.impulse_response else []))


def test_states_belong_to_the_scans():
    cfg = network.Config("s4d", network.model_module("s4d").Config(4, 4), 1, 5, 5, decoder="lm")
    params = network.init(cfg, np.random.default_rng(0))
    x = np.zeros((1, 3), int)
    with pytest.raises(Error, match="by `step` alone"):
        network.forward(params, x, cfg, state=network.state(params, cfg, 1))
    with pytest.raises(Error, match="where is for decoder 'lm'"):
        network.forward(params, x, replace(cfg, decoder="last"), where=x == 0)
