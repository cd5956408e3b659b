"""The Numba twins of the selective scans against loops over time in float64.

The loops keep every state and are derived from the equations one by one; they share nothing with
the twins, which recompute from checkpoints, guard decays and pad channels.
"""

import tracemalloc

import numba
import numpy as np
import pytest
from conftest import error

from ref.kernels import longhorn, mamba, simd
from ref.kernels import nn as layers

SHAPES = [  # B, L, E, N
    (1, 1, 1, 1),
    (3, 2, 5, 3),
    (2, 3, 100, 4),
    (2, 127, 21, 13),
    (1, 33, 257, 17),
    (2, 64, 128, 16),
    (1, 37, 20, 64),
    (1, 1021, 16, 1),
    (1, 5, 3, 130),
]
compiled = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="vectors exist in compiled code only"
)
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}


def inputs(shape, dtype, seed=0):
    B, L, E, N = shape
    draw = np.random.default_rng(seed).standard_normal
    arrays = dict(
        x=draw((B, L, E)),
        delta=np.log1p(np.exp(draw((B, L, E)) - 2)),
        beta=1 / (1 + np.exp(-draw((B, L, E)))),
        A=-np.exp(draw((E, N))),
        B=draw((B, L, N)),
        C=draw((B, L, N)),
        k=draw((B, L, N)),
        q=draw((B, L, N)),
        D=draw(E),
        state=draw((B, E, N)),
        dy=draw((B, L, E)),
        dlast=draw((B, E, N)),
    )
    return {name: a.astype(dtype) for name, a in arrays.items()}


def zeros_for(a, like):
    return np.zeros(like) if a is None else a


def mamba_loop(dy, x, delta, A, B, C, D, h0, dlast):
    """-> y, h_L and the gradients in the order of mamba.scan_backward"""
    dy, x, delta, A, B, C = (np.asarray(a, np.float64) for a in (dy, x, delta, A, B, C))
    (batch, L, E), N = x.shape, A.shape[1]
    skip, hs = zeros_for(D, E), [np.float64(zeros_for(h0, (batch, E, N)))]
    with np.errstate(over="ignore", under="ignore"):
        a = np.exp(delta[..., None] * A)
    for t in range(L):
        hs.append(a[:, t] * hs[-1] + (delta * x)[:, t, :, None] * B[:, t, None])
    h = np.stack(hs, axis=1)
    y = np.einsum("blen,bln->ble", h[:, 1:], C) + skip * x
    g, gs = np.float64(zeros_for(dlast, (batch, E, N))), np.empty_like(a)
    for t in reversed(range(L)):
        gs[:, t] = g + dy[:, t, :, None] * C[:, t, None]
        g = gs[:, t] * a[:, t]
    dexponent = gs * a * h[:, :-1]
    du = np.einsum("blen,bln->ble", gs, B)
    return (
        y,
        h[:, -1],
        du * delta + dy * skip,
        du * x + np.einsum("blen,en->ble", dexponent, A),
        np.einsum("blen,ble->en", dexponent, delta),
        np.einsum("blen,ble->bln", gs, delta * x),
        np.einsum("blen,ble->bln", h[:, 1:], dy),
        None if D is None else np.einsum("ble,ble->e", dy, x),
        g,
    )


def longhorn_loop(dy, x, beta, k, q, D, s0, dlast):
    """-> y, S_L and the gradients in the order of longhorn.scan_backward"""
    dy, x, beta, k, q = (np.asarray(a, np.float64) for a in (dy, x, beta, k, q))
    (batch, L, E), N = x.shape, k.shape[2]
    skip, states = zeros_for(D, E), [np.float64(zeros_for(s0, (batch, E, N)))]
    kappa = (k * k).sum(axis=-1, keepdims=True)
    Delta = beta / (1 + beta * kappa)
    decay = 1 - Delta[..., None] * (k * k)[:, :, None]
    for t in range(L):
        states.append(decay[:, t] * states[-1] + (Delta * x)[:, t, :, None] * k[:, t, None])
    S = np.stack(states, axis=1)
    g, gs = np.float64(zeros_for(dlast, (batch, E, N))), np.empty_like(decay)
    for t in reversed(range(L)):
        gs[:, t] = g + dy[:, t, :, None] * q[:, t, None]
        g = gs[:, t] * decay[:, t]
    before, key = S[:, :-1], k[:, :, None]
    dDelta = (gs * (x[..., None] * key - key * key * before)).sum(axis=-1)
    dkappa = -(dDelta * Delta**2).sum(axis=-1, keepdims=True)
    through_decay = (gs * Delta[..., None] * (x[..., None] - 2 * key * before)).sum(axis=2)
    return (
        np.einsum("blen,bln->ble", S[:, 1:], q) + skip * x,
        S[:, -1],
        Delta * np.einsum("blen,bln->ble", gs, k) + dy * skip,
        dDelta / (1 + beta * kappa) ** 2,
        through_decay + 2 * k * dkappa,
        np.einsum("blen,ble->bln", S[:, 1:], dy),
        None if D is None else np.einsum("ble,ble->e", dy, x),
        g,
    )


MODELS = {
    "mamba": (mamba, mamba_loop, ("x", "delta", "A", "B", "C")),
    "longhorn": (longhorn, longhorn_loop, ("x", "beta", "k", "q")),
}


def twin(model, a, optional=True):
    """Forward and backward of the twin -> what the loop returns"""
    module, _, names = MODELS[model]
    D, state, dlast = (a[n] if optional else None for n in ("D", "state", "dlast"))
    main = [a[n] for n in names]
    y, last, checkpoints = module.scan_forward(*main, D, state)
    return y, last, *module.scan_backward(a["dy"], *main, D, checkpoints, dlast)


def loop(model, a, optional=True):
    _, reference, names = MODELS[model]
    D, state, dlast = (a[n] if optional else None for n in ("D", "state", "dlast"))
    return reference(a["dy"], *(a[n] for n in names), D, state, dlast)


def check(found, expected, dtype, tolerance=None):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if b is None:
            assert a is None
            continue
        assert a.dtype == dtype and a.flags.c_contiguous
        assert error(a, b) < (tolerance or TOLERANCE[np.dtype(dtype).name]), i


@compiled
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan(model, shape, dtype):
    for optional in (True, False):
        a = inputs(shape, dtype)
        check(twin(model, a, optional), loop(model, a, optional), dtype)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_derivatives(model):
    """The loops' gradients, by which the twins are judged, against differences of the loops"""
    a = inputs((2, 5, 3, 4), "float64")
    names = (*MODELS[model][2], "D", "state")
    gradients = loop(model, a)[2:]

    def value(changed):
        y, last = loop(model, changed)[:2]
        return (y * a["dy"]).sum() + (last * a["dlast"]).sum()

    for name, gradient in zip(names, gradients, strict=True):
        v = np.random.default_rng(1).standard_normal(a[name].shape)
        plus, minus = (value({**a, name: a[name] + s * 1e-5 * v}) for s in (1, -1))
        assert abs((plus - minus) / 2e-5 - (gradient * v).sum()) < 1e-7, name


def every_second(a):
    return np.repeat(a, 2, axis=-1)[..., ::2]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


@compiled
@pytest.mark.parametrize("layout", [every_second, np.asfortranarray, read_only])
@pytest.mark.parametrize("model", MODELS)
def test_inputs_of_any_layout(model, layout):
    a = inputs((2, 19, 21, 3), "float32")
    expected = twin(model, a)
    for found, same in zip(
        twin(model, {n: layout(x) for n, x in a.items()}), expected, strict=True
    ):
        assert np.array_equal(found, same)


@compiled
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("size", [1e4, 1e30, 1e-30])
def test_extreme_step(size, dtype):
    """Decays of exactly 0 and exactly 1"""
    a = inputs((2, 40, 21, 5), dtype)
    a["delta"][:, ::3] = size
    a["x"][:, ::3] /= max(size, 1)  # the input's part stays of order 1
    found, expected = twin("mamba", a), loop("mamba", a)
    check(found, expected, dtype, 1e-12 if dtype == "float64" else 4e-6)


@compiled
def test_underflow_is_exact():
    """A decay of 0 forgets even a large state, also where the exponent overflows"""
    a = inputs((1, 4, 16, 2), "float32")
    a["state"][:], a["B"][:] = 1e30, 0
    a["delta"][:, 1], a["A"][:] = 1e30, -1e20
    _, last, *gradients = twin("mamba", a)
    assert np.array_equal(last, np.zeros_like(last))
    assert all(np.isfinite(g).all() for g in gradients)


@compiled
def test_growing_states():
    """A > 0: no guard needed for a moderate growth, infinity for a wild one"""
    a = inputs((1, 3, 20, 2), "float64")
    a["A"] *= -1
    check(twin("mamba", a), loop("mamba", a), "float64")
    a["A"][:], a["delta"][:], a["state"][:] = 1e4, 1, 1
    _, last, _ = mamba.scan_forward(*(a[n] for n in MODELS["mamba"][2]), None, a["state"])
    assert np.isposinf(last).all()


@compiled
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("beta", "scale"), [(0, 1), (1, 1), (1, 0), (1, 1e4), (1e-30, 1e4)])
def test_extreme_update(beta, scale, dtype):
    """No update, a full one, no key, and keys so large that the state is replaced"""
    a = inputs((2, 40, 21, 5), dtype)
    a["beta"][:, ::2] = beta
    a["k"][:, ::3] *= scale
    check(twin("longhorn", a), loop("longhorn", a), dtype, 1e-10 if dtype == "float64" else 1e-5)


@compiled
@pytest.mark.parametrize("model", MODELS)
def test_one_thread_or_many(model):
    a = inputs((1, 70, 150, 5), "float32")
    many, threads = twin(model, a), numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = twin(model, a)
    finally:
        numba.set_num_threads(threads)
    for x, y in zip(one, many, strict=True):
        assert np.array_equal(x, y)


@compiled
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(2, 512, 256, 16), (1, 256, 128, 64)], ids=str)
def test_memory(model, shape, monkeypatch):
    """Forward and backward stay below three times inputs and outputs"""
    for module in (mamba, longhorn):
        monkeypatch.setattr(module, "empty", np.empty)
    a = inputs(shape, "float32")
    twin(model, inputs((1, 3, 5, 2), "float32"))  # compiled outside the measurement
    used = {n: a[n] for n in (*MODELS[model][2], "D", "state", "dy", "dlast")}
    given = sum(x.nbytes for x in used.values())
    tracemalloc.start()
    try:
        results = twin(model, a)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert given + peak < 3 * (given + sum(x.nbytes for x in results))


@numba.njit
def each_exp(x, y):
    V = simd.lane_count(x)
    for i in range(0, len(x), V):
        simd.store(y, i, simd.exp(simd.load(x, i)))


@compiled
@pytest.mark.parametrize(("dtype", "ulps"), [("float32", 2), ("float64", 2)])
def test_exp(dtype, ulps):
    edge = {"float32": 104.0, "float64": 746.0}[dtype]
    special = [np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0, 1e-30]
    x = np.concatenate([np.linspace(-edge, edge, 2**16), np.linspace(-1, 1, 2**14), special * 2])
    x = x.astype(dtype)
    y, info = np.empty_like(x), np.finfo(dtype)
    each_exp(x, y)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(np.longdouble))
    normal = (exact > info.tiny) & (exact < info.max)
    assert np.abs(y[normal] / exact[normal] - 1).max() < ulps * info.eps / 2
    small = exact <= info.tiny
    assert np.abs(y[small] - exact[small]).max() <= info.smallest_subnormal
    assert np.isposinf(y[exact > info.max]).all() and np.isnan(y[np.isnan(x)]).all()


@numba.njit
def operators(x, y):
    v, w = simd.load(x, 0), simd.load(y, 0)
    result = -abs(v) * 2 + 3 / w - v / 4 + simd.fma(v, w, 1)
    simd.store(y, 0, result)
    return simd.total(result), simd.total(simd.fold(result)), simd.any_greater(v, w)


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operators(dtype):
    V = simd.lanes(np.dtype(dtype))
    x, y = np.random.default_rng(0).uniform(1, 2, (2, V)).astype(dtype)
    expected, greater = -abs(x) * 2 + 3 / y - x / 4 + (x * y + 1), (x > y).any()
    whole, folded, found = operators(x, y)
    assert error(y, expected) < 4 * np.finfo(dtype).eps and found == greater
    assert abs(whole - expected.sum()) < 50 * np.finfo(dtype).eps and whole == folded


# The layers around the scans: each twin's forward against a NumPy expression, its gradients against
# differences of that expression.


def rms_norm(x, weight):
    return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)


def short_conv(x, w, b, before):
    padded, K = np.concatenate([before, x], axis=1), w.shape[2]
    window = np.lib.stride_tricks.sliding_window_view(padded, K, axis=1)
    return (window * w[:, 0]).sum(axis=-1) + b


def rms_norm_backward(dy, x, weight):
    _, r = layers.rms_norm_forward(x, weight, 1e-5)
    return layers.rms_norm_backward(dy, x, r, weight)


LAYERS = {  # name -> twin, its gradients, the expression, shapes of what comes after x
    "gate": (
        layers.gate_forward,
        layers.gate_backward,
        lambda y, z: y * z / (1 + np.exp(-z)),
        lambda B, L, D: [(B, L, D)],
    ),
    "silu": (
        layers.silu_forward,
        lambda dy, x: (layers.silu_backward(dy, x),),
        lambda x: x / (1 + np.exp(-x)),
        lambda B, L, D: [],
    ),
    "softplus": (
        layers.softplus_forward,
        lambda dy, x: (layers.softplus_backward(dy, x),),
        lambda x: np.logaddexp(0, x),
        lambda B, L, D: [],
    ),
    "sigmoid": (
        layers.sigmoid_forward,
        lambda dy, x: (layers.sigmoid_backward(dy, layers.sigmoid_forward(x)),),
        lambda x: 1 / (1 + np.exp(-x)),
        lambda B, L, D: [],
    ),
    "rms_norm": (
        lambda x, weight: layers.rms_norm_forward(x, weight, 1e-5)[0],
        rms_norm_backward,
        rms_norm,
        lambda B, L, D: [(D,)],
    ),
    "short_conv": (
        layers.short_conv_forward,
        lambda dy, x, w, b, before: layers.short_conv_backward(dy, x, w, before),
        short_conv,
        lambda B, L, D: [(D, 1, 4), (D,), (B, 3, D)],
    ),
}
LAYER_SHAPES = [(1, 1, 1), (2, 3, 5), (3, 300, 17), (1, 513, 64)]


def layer_inputs(name, shape, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return [draw(s) for s in (shape, *LAYERS[name][3](*shape))]


@pytest.mark.parametrize("shape", LAYER_SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, shape):
    forward, backward, expression, _ = LAYERS[name]
    a = layer_inputs(name, shape)
    y = forward(*a)
    dy = np.random.default_rng(1).standard_normal(shape)
    assert error(y, expression(*a)) < 1e-13
    gradients = backward(dy, *a)
    for i, gradient in enumerate(gradients):
        v = np.random.default_rng(2).standard_normal(a[i].shape)
        plus, minus = (expression(*a[:i], a[i] + s * 1e-5 * v, *a[i + 1 :]) for s in (1, -1))
        slope = ((plus - minus) / 2e-5 * dy).sum()
        assert abs(slope - (gradient * v).sum()) < 1e-8 * max(1, dy.size), i
    single = [x.astype(np.float32) for x in a]
    results = (forward(*single), *backward(dy.astype(np.float32), *single))
    for found, expected in zip(results, (y, *gradients), strict=True):
        assert found.dtype == np.float32 and found.flags.c_contiguous
        assert np.abs(found - expected).max() < 2e-6 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", LAYERS)
def test_layer_of_columns(name):
    """Half of the columns of an array, and read-only inputs, give the same bits"""
    forward, backward, *_ = LAYERS[name]
    x, *others = (a.astype(np.float32) for a in layer_inputs(name, (2, 270, 24)))
    dy = x[::-1].copy()
    both, pair = np.concatenate([x, x], axis=-1), np.stack([dy, dy], axis=2)
    frozen = [a.copy() for a in others]
    for a in frozen:
        a.flags.writeable = False
    expected = forward(x, *others), *backward(dy, x, *others)
    found = (
        forward(both[..., 24:], *frozen),
        *backward(pair[:, :, 1], both[..., 24:], *frozen),
    )
    for f, e in zip(found, expected, strict=True):
        assert np.array_equal(f, e)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_on_one_thread_or_many(name):
    forward, backward, *_ = LAYERS[name]
    a = layer_inputs(name, (2, 600, 24))
    many, threads = (forward(*a), *backward(a[0], *a)), numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = (forward(*a), *backward(a[0], *a))
    finally:
        numba.set_num_threads(threads)
    for x, y in zip(one, many, strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_layers_far_out(dtype):
    """No overflow, and the small side of softplus keeps its digits"""
    x = np.array([[-1e4, -80, -20, 0, 20, 80, 1e4]], dtype)
    exact = np.logaddexp(np.longdouble(0), x.astype(np.longdouble))
    y = layers.softplus_forward(x)
    close = exact > np.finfo(dtype).tiny
    assert np.abs(y[close] / exact[close] - 1).max() < 4 * np.finfo(dtype).eps
    assert y[0, 0] == 0
    one = np.ones_like(x)
    results = (
        layers.silu_forward(x),
        layers.silu_backward(one, x),
        *layers.gate_backward(one, one, x),
        layers.sigmoid_forward(x),
        layers.softplus_backward(one, x),
    )
    assert all(np.isfinite(r).all() for r in results)


def test_a_convolution_without_bias():
    x, before = np.random.default_rng(0).standard_normal((2, 2, 5, 3))
    w = np.random.default_rng(1).standard_normal((3, 1, 6))
    found, expected = (layers.short_conv_forward(x, w, b, before) for b in (None, np.zeros(3)))
    assert np.array_equal(found, expected)
