"""TNN: golden cases, the definition of a derivative, other forms of the same map, length
extrapolation, decoding, precision, bad input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import error

from ref import Error, cases, etsc, gradcheck, network, nn, optim, tnn, tnn_rpe

GOLDEN = sorted((Path(__file__).parent / "golden").glob("tnn_*.safetensors"))
SHAPES = [(1, 1), (2, 2), (3, 3), (3, 7), (2, 24), (1, 127)]
CAUSAL = [
    dict(),
    dict(use_decay=True, gamma=0.9),
    dict(use_multi_decay=True, gamma=0.6, num_heads=2),
    dict(par_type=2, residual=True, rpe_act="silu"),
    dict(par_type=3, rpe_layers=0, use_decay=True, act_type="silu"),
    dict(act_type="relu", use_multi_decay=True, rpe_act="gelu"),
]
BOTH = [
    dict(bidirectional=True),
    dict(bidirectional=True, use_decay=True, gamma=0.8, prenorm=False),
    dict(bidirectional=True, use_multi_decay=True, par_type=2, residual=True),
    dict(bidirectional=True, par_type=3, rpe_act="none", act_type="2+elu"),
]
EACH = pytest.mark.parametrize("settings", CAUSAL + BOTH, ids=str)
OF_CAUSAL = pytest.mark.parametrize("settings", CAUSAL, ids=str)
D, E = 5, 8  # with two heads or one


def layer(rng, dtype="float64", part="operator", **settings):
    """A layer away from its initialisation: no parameter has a special value"""
    own = dict(d_model=D, expand_ratio=1.7, glu_dim=4, rpe_dim=6, rpe_layers=2)
    cfg = tnn.Config(**own | settings)
    params = getattr(tnn, f"{part}_init")(cfg, rng, "float64")
    params = {
        n: p + 0.1 * rng.standard_normal(p.shape) * (n not in tnn.buffers(cfg))
        for n, p in params.items()
    }
    return cfg, {n: p.astype(dtype) for n, p in params.items()}


def run(params, x, dy, cfg, part="operator"):
    """-> [y, dx, every gradient], in a fixed order"""
    y, cache = getattr(tnn, f"{part}_forward")(params, x, cfg)
    dx, grads = getattr(tnn, f"{part}_backward")(dy, cache)
    assert grads.keys() == params.keys() - set(tnn.buffers(cfg))
    return [y, dx] + [grads[name] for name in sorted(grads)]


def decode(one_step, state, params, x, cfg):
    steps = []
    for t in range(x.shape[1]):
        y_t, state = one_step(params, x[:, t], state, cfg)
        steps.append(y_t)
    return np.stack(steps, axis=1)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path, plain):
    case = cases.read_case(path)
    for rows in (cases.verify(case), plain(cases.verify, case)):
        assert len(rows) == sum(n.startswith(("out.", "grad.")) for n in case.tensors)
        assert all(row.ok and row.allowed == 1e-9 for row in rows), rows


def test_gradients():
    for label, errors in gradcheck.errors_of("tnn"):
        assert max(errors.values()) < gradcheck.TOLERANCE, (label, errors)


def test_the_simple_norm_at_zero_and_far_from_it():
    """Where |x| has no slope the gradient is that of x / 1e-8; large and small x differ in scale"""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 7))
    x[1] = 0
    y, cache = nn.simple_rms_norm_forward(x)
    dx = nn.simple_rms_norm_backward(dy, cache)
    assert not y[1].any() and error(dx[1], dy[1] / 1e-8) < 1e-15
    assert error((y[0] ** 2).mean(), 1.0) < 1e-7
    for size in (1e-6, 1e6):
        other, cache = nn.simple_rms_norm_forward(size * x)
        assert error(other, y) < 0.02
        assert error(nn.simple_rms_norm_backward(dy, cache)[0], dx[0] / size) < 0.03
    x = rng.standard_normal((2, 5)).astype("float32")
    y, cache = nn.simple_rms_norm_forward(x)
    assert y.dtype == nn.simple_rms_norm_backward(y, cache).dtype == np.float32


# Other forms of the same map


def rpe(params, p, cfg, act=None):
    """r of one position p, its equations one after the other"""
    acts = {
        "relu": lambda z: z * (z > 0),
        "silu": lambda z: z / (1 + np.exp(-z)),
        "gelu": lambda z: nn.gelu_forward(z)[0],
        "none": lambda z: z,
    }
    act = act or acts[cfg.rpe_act]
    h = params["W_p"][:, 0] * p + params["b_p"]
    for i in range(cfg.rpe_layers):
        a = act(h / (np.linalg.norm(h) / np.sqrt(h.size) + 1e-8))
        a = params["W_r"][i] @ a + params["b_r"][i]
        h = a + h if cfg.residual else a
    a = act(h / (np.linalg.norm(h) / np.sqrt(h.size) + 1e-8))
    return params["W_t"] @ a + params["b_t"]


F = {
    "none": lambda t: t,
    "relu": lambda t: np.maximum(t, 0),
    "silu": lambda t: t / (1 + np.exp(-t)),
    "2+elu": lambda t: 2 + np.where(t > 0, t, np.exp(np.minimum(t, 0)) - 1),
}


def coefficient(params, k, L, cfg):
    """t_k (E,) of (2) to (5)"""
    p = {1: k, 2: k / max(1, L - 1), 3: np.exp(k / max(1, L - 1))}[cfg.par_type]
    r = rpe(params, p, cfg)
    if cfg.use_decay:
        r = r * params["gamma"] ** abs(k)
    if cfg.use_multi_decay:
        s = 1 / (1 + np.exp(-params["gamma"]))
        r = r * (cfg.gamma + (1 - cfg.gamma) * s) ** abs(k)
    return F[cfg.act_type](r)


@EACH
@pytest.mark.parametrize("B, L", SHAPES[:-1])
def test_the_operator_is_the_double_sum(settings, B, L):
    rng = np.random.default_rng(L)
    cfg, params = layer(rng, **settings)
    assert cfg.width == E
    x, t = rng.standard_normal((B, L, E)), {}
    for k in range(-(L - 1) if cfg.bidirectional else 0, L):
        t[k] = coefficient(params, k, L, cfg)
    zero = np.zeros(E)
    y = [sum(t.get(i - j, zero) * x[:, j] for j in range(L)) for i in range(L)]
    assert error(tnn.operator_forward(params, x, cfg)[0], np.stack(y, axis=1)) < 1e-13


@EACH
@pytest.mark.parametrize("L", [1, 2, 9, 16])
def test_matrix_is_the_operator(settings, L):
    rng = np.random.default_rng(L)
    cfg, params = layer(rng, **settings)
    x = rng.standard_normal((3, L, E))
    M = tnn.matrix(params, cfg, L=L)
    assert M.shape == (1, E, L, L)
    y = np.einsum("dts,bsd->btd", M[0], x)
    assert error(tnn.operator_forward(params, x, cfg)[0], y) < 1e-13
    assert (tnn.matrix(params, cfg, x) == M).all()
    assert (L > 1 and cfg.bidirectional) == np.triu(M, 1).any()  # causal: exactly zero
    assert (M[:, :, :, 0] == tnn.impulse_response(params, cfg, L)).all()


@OF_CAUSAL
def test_a_causal_map_knows_no_future(settings):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="block", **settings)
    x = rng.standard_normal((2, 11, D))
    later = np.concatenate([x[:, :5], 10 * rng.standard_normal((2, 6, D))], axis=1)
    a, b = (tnn.block_forward(params, z, cfg)[0] for z in (x, later))
    assert error(b[:, :5], a[:, :5]) < 1e-13 and error(b[:, 5:], a[:, 5:]) > 1e-2
    cfg = replace(cfg, bidirectional=True)
    a, b = (tnn.block_forward(params, z, cfg)[0] for z in (x, later))
    assert error(b[:, :5], a[:, :5]) > 1e-2


@pytest.mark.parametrize("settings", CAUSAL + BOTH, ids=str)
def test_longer_inputs_go_on_where_shorter_ones_end(settings):
    """Type 1: the coefficients of L are among those of 2 L; the others look at fractions of L"""
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, **settings)
    for L in (1, 2, 13):
        short = tnn_rpe.coefficients_forward(params, L, cfg)[0]
        long = tnn_rpe.coefficients_forward(params, 2 * L, cfg)[0]
        long = long[:, L : 3 * L - 1] if cfg.bidirectional else long[:, :L]
        same = error(long, short)
        assert same < 1e-14 if cfg.par_type == 1 or L == 1 else same > 1e-3
    y = tnn.operator_forward(params, rng.standard_normal((1, 2000, E)), cfg)[0]
    assert np.isfinite(y).all()


def test_heads_change_the_width_alone():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="mixer", use_multi_decay=True)
    x = rng.standard_normal((2, 9, D))
    y = tnn.mixer_forward(params, x, cfg)[0]
    for heads in (2, 4, 8):
        assert (tnn.mixer_forward(params, x, replace(cfg, num_heads=heads))[0] == y).all()
    for heads, ratio, width in ((3, 1.7, 6), (3, 3, 15), (2, 1, 4), (7, 2, 7), (1, 0.5, 2)):
        assert tnn.Config(d_model=D, num_heads=heads, expand_ratio=ratio).width == width


def test_powers_of_the_decay_keep_their_digits():
    """exp(k log γ) far out against repeated multiplication in long double"""
    gamma = np.array([0.9, 0.999, 0.9999, 1.0])
    cfg, lags = tnn.Config(use_decay=True), np.arange(20_000.0)
    powers, _ = tnn_rpe.decay_forward(np.ones((20_000, 4)), gamma, lags, cfg)
    exact = np.cumprod(np.tile(np.longdouble(gamma), (20_000, 1)), axis=0) / np.longdouble(gamma)
    seen = exact > 1e-300
    assert (np.abs(powers - exact)[seen] / exact[seen]).max() < 1e-12
    assert (powers[:, 3] == 1).all()


def test_a_learned_decay_of_zero_is_no_nan():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, use_multi_decay=True, gamma=0.0)
    params["gamma"] = np.array([-1e3, -50, 0, 1, 50, 1e3, 2, 3.0])
    x, dy = rng.standard_normal((2, 2, 9, E))
    assert all(np.isfinite(r).all() for r in run(params, x, dy, cfg))
    t = tnn_rpe.coefficients_forward(params, 9, cfg)[0]
    assert t[0, 0] != 0 and np.abs(t[0, 1:]).max() < 1e-290


@pytest.mark.parametrize("kind", tnn_rpe.ACTIVATIONS)
def test_activations(kind):
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    functional = torch.nn.functional
    theirs = {
        "none": lambda t: t,
        "leak": functional.leaky_relu,
        "1+elu": lambda t: 1 + functional.elu(t),
        "2+elu": lambda t: 2 + functional.elu(t),
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
    } | {name: getattr(functional, name) for name in ("relu", "silu", "gelu", "elu")}
    x, dy = np.random.default_rng(0).standard_normal((2, 3, 50))
    own = torch.tensor(x, requires_grad=True)
    expected = theirs[kind](own)
    expected.backward(torch.tensor(dy))
    y, cache = tnn_rpe.activation_forward(x, kind)
    assert error(y, expected.detach().numpy()) < 1e-15
    assert error(tnn_rpe.activation_backward(dy, cache), own.grad.numpy()) < 1e-14
    single, cache = tnn_rpe.activation_forward(x.astype("f4"), kind)
    assert single.dtype == tnn_rpe.activation_backward(single, cache).dtype == np.float32


# Decoding


@OF_CAUSAL
@pytest.mark.parametrize("L", [1, 2, 3, 37, 64])
def test_step_is_the_forward_of_l_max(settings, L):
    rng = np.random.default_rng(L)
    cfg, params = layer(rng, part="block", l_max=L, **settings)
    for width, forward, one_step in (
        (E, tnn.operator_forward, tnn.operator_step),
        (D, tnn.mixer_forward, tnn.mixer_step),
        (D, tnn.block_forward, tnn.step),
    ):
        x = rng.standard_normal((3, L, width))
        y = decode(one_step, tnn.state(params, cfg, 3), params, x, cfg)
        assert error(y, forward(params, x, cfg)[0]) < 1e-11


@OF_CAUSAL
@pytest.mark.parametrize("L", [1, 7, 30])
def test_prefill_is_as_many_steps(settings, L):
    """Also of types 2 and 3, whose positions are fractions of l_max, not of the prompt's length"""
    rng = np.random.default_rng(L)
    cfg, params = layer(rng, part="block", l_max=30, **settings)
    x = rng.standard_normal((2, 30, D))
    y, state = tnn.prefill(params, x[:, :L], cfg, tnn.state(params, cfg, 2))
    rest = decode(tnn.step, state, params, x[:, L:], cfg) if L < 30 else x[:, :0]
    y = np.concatenate([y, rest], axis=1)
    assert error(y, tnn.block_forward(params, x, cfg)[0]) < 1e-11


@OF_CAUSAL
def test_decoding_stays_in_float32_and_ends_at_l_max(settings):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, "float32", "block", l_max=20, **settings)
    x = rng.standard_normal((2, 20, D)).astype("f4")
    y, after = tnn.prefill(params, x[:, :9], cfg, tnn.state(params, cfg, 2))
    rest = decode(tnn.step, after, params, x[:, 9:], cfg)
    assert y.dtype == rest.dtype == np.float32
    expected = tnn.block_forward(params, x, cfg)[0]
    assert error(np.concatenate([y, rest], axis=1), expected) < 2e-5
    with pytest.raises(Error, match="20"):
        decode(tnn.step, after, params, np.concatenate([x[:, 9:], x[:, :1]], axis=1), cfg)
    with pytest.raises(Error, match="20"):
        tnn.prefill(params, np.tile(x, (1, 2, 1)), cfg, tnn.state(params, cfg, 2))


@OF_CAUSAL
def test_conversion_gets_the_decay_apart_where_it_can(settings):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="block", **settings)
    t, gamma = tnn.coefficients(params, cfg, 25)
    k = tnn.kernels(params, cfg, 25)
    assert t.shape == k.shape == (1, E, 25)
    apart = "gamma" in params and cfg.act_type != "silu"
    assert (gamma is not None) == apart
    if apart:
        t = t * gamma[:, None] ** np.arange(25.0)
    assert error(t, k) < 1e-14
    system = etsc.to_ssm(tnn.coefficients(params, cfg, 25)[0][0], gamma)
    assert error(etsc.coefficients(system, 25), k[0]) < 1e-12


@OF_CAUSAL
def test_eight_times_the_length_of_training(settings):
    """A language model, l_max 8: converted for 64 positions it decodes what forward computes"""
    rng = np.random.default_rng(0)
    own, _ = layer(rng, l_max=8, **settings)
    cfg = network.Config("tnn", replace(own, l_max=64), 2, 9, 9, decoder="lm", tied=True)
    cfg = replace(cfg, final_norm=True)
    params, x = network.init(cfg, rng, "float64"), rng.integers(0, 9, (2, 64))
    state, logits = network.state(params, cfg, 2), []
    for t in range(64):
        y_t, state = network.step(params, x[:, t], state, cfg)
        logits.append(y_t)
    y = network.forward(params, x, cfg)[0]
    assert error(np.stack(logits, axis=1), y) < 1e-10
    last, _ = network.prefill(params, x, cfg, network.state(params, cfg, 2))
    assert error(last, y[:, -1]) < 1e-10


def test_hankel_values(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(tnn, "HANKEL_SIZE", 20)
    for l_max, n in ((0, 20), (12, 12), (300, 20)):
        cfg, params = layer(rng, l_max=l_max, use_decay=True, gamma=0.9)
        k = tnn.kernels(params, cfg, n)[0][:, 1:]
        values = tnn.hankel_values(params, cfg)
        assert values.shape == (E, n - 1)
        padded = np.concatenate([k, np.zeros_like(k)], axis=1)
        index = np.arange(n - 1)[:, None] + np.arange(n - 1)
        assert error(values, np.linalg.svd(padded[:, index], compute_uv=False)) < 1e-12
        both = replace(cfg, bidirectional=True)
        t = tnn_rpe.coefficients_forward(params, n, both)[0]
        backward = np.concatenate([t[:, : n - 1][:, ::-1], np.zeros_like(k)], axis=1)
        backward = np.linalg.svd(backward[:, index], compute_uv=False)
        assert error(tnn.hankel_values(params, both), np.concatenate([values, backward])) < 1e-12


# Precision, initialisation, names


@EACH
def test_float32_stays_float32_and_is_precise(settings):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, "float32", "block", **settings)
    x, dy = rng.standard_normal((2, 2, 131, D)).astype("float32")
    wide = {n: p.astype("float64") for n, p in params.items()}
    exact = run(wide, x.astype("float64"), dy.astype("float64"), cfg, "block")
    results = run(params, x, dy, cfg, "block")
    assert {r.dtype.name for r in results} == {"float32"}
    assert max(map(error, results, exact)) < 5e-6


@pytest.mark.parametrize("settings", [dict(), *CAUSAL[1:3], BOTH[0]], ids=str)
def test_float32_far_out(settings):
    """10⁴ positions: coefficients to a rounding, gradients of the RPE and of g as well"""
    rng, L = np.random.default_rng(0), 10_000
    cfg, params = layer(rng, "float32", **settings)
    t, cache = tnn_rpe.coefficients_forward(params, L, cfg)
    dt = rng.standard_normal(t.shape).astype("float32")
    grads = tnn_rpe.coefficients_backward(dt, cache)
    wide = {n: p.astype("float64") for n, p in params.items()}
    exact, cache = tnn_rpe.coefficients_forward(wide, L, cfg)
    exact_grads = tnn_rpe.coefficients_backward(dt.astype("float64"), cache)
    assert t.dtype == np.float32 and error(t, exact) < 1e-7
    assert max(error(g, exact_grads[n]) for n, g in grads.items()) < 1e-7


def test_initialisation_is_that_of_the_published_layers():
    rng = np.random.default_rng(0)
    cfg = tnn.Config(d_model=200, use_multi_decay=True, rpe_dim=40)
    params = tnn.block_init(cfg, rng)
    assert {p.dtype.name for p in params.values()} == {"float32"}
    shapes = {"W_p": (40, 1), "W_r": (3, 40, 40), "W_t": (600, 40), "W_u": (600, 200)}
    shapes |= {"W_o": (200, 600), "W_1": (200, 200), "b_r": (3, 40), "gamma": (600,)}
    assert {n: params[n].shape for n in shapes} == shapes
    for name, p in params.items():
        if name == "gamma":
            assert abs(p.mean()) < 0.15 and abs(p.std() - 1) < 0.1
        else:
            bound = params["W" + name[1:]].shape[-1] ** -0.5
            assert np.abs(p).max() <= bound * (1 + 1e-6) and abs(p.mean()) < 0.4 * bound
            assert p.size < 500 or abs(p.std() / bound - 3**-0.5) < 0.03
    fixed = tnn.Config(use_decay=True, gamma=0.97)
    params = tnn.operator_init(fixed, rng)
    assert (params["gamma"] == np.float32(0.97)).all() and tnn.groups(fixed) == {"gamma": "frozen"}
    assert tnn.groups(cfg) == {} and params["W_p"].shape == (32, 1)  # a learned decay is trained
    assert tnn.operator_init(tnn.Config(d_model=512), rng)["W_p"].shape == (64, 1)
    assert "gamma" not in tnn.operator_init(tnn.Config(), rng)


def test_the_same_seed_gives_the_same_bits():
    def once():
        cfg, params = layer(np.random.default_rng(3), "float32", "block", dropout=0.3)
        x, dy = np.random.default_rng(4).standard_normal((2, 2, 33, D)).astype("float32")
        y, cache = tnn.block_forward(params, x, cfg, np.random.default_rng(5))
        dx, grads = tnn.block_backward(dy, cache)
        return [y, dx, *grads.values()]

    assert all((a == b).all() for a, b in zip(once(), once(), strict=True))


def test_dropout_acts_on_both_branches():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="block", dropout=0.5)
    x = rng.standard_normal((2, 9, D))
    y, ((*_, (first,)), (*_, (second,))) = tnn.block_forward(params, x, cfg, rng)
    for mask in (first, second):
        assert mask.shape == x.shape and 0.3 < (mask == 0).mean() < 0.7
    assert (first != second).any() and not tnn.running_statistics(params, None)
    assert error(y, tnn.block_forward(params, x, cfg)[0]) > 1e-2


@EACH
def test_published_names_both_ways(settings):
    rng = np.random.default_rng(0)
    for part in tnn.PUBLISHED:
        cfg, params = layer(rng, part=part, **settings)
        tensors = tnn.to_published(params, cfg, part)
        back = tnn.from_published(tensors, cfg, part)
        assert back.keys() == params.keys()
        assert all((back[n] == params[n]).all() for n in params)
        doubled = tnn.from_published({n: 2 * t for n, t in tensors.items()}, cfg, part)
        assert all((doubled[n] == 2 * params[n]).all() for n in params)
    assert ("token_mixer.toep.rpe.layers.1.2.weight" in tensors) == (cfg.rpe_layers == 2)
    if "gamma" in params:
        shape = (cfg.num_heads, 1, E // cfg.num_heads)
        assert tensors["token_mixer.toep.gamma"].shape == shape
    net = network.Config("tnn", cfg, n_layers=2, d_input=7, d_output=7, final_norm=cfg.prenorm)
    params = network.init(net, rng, "float64")
    tensors = network.to_published(params, net)
    assert "layers.1.feature_mixer.l3.bias" in tensors and "embed_tokens.weight" in tensors
    back = network.from_published(tensors, net)
    assert all((back[n] == params[n]).all() for n in params)


@pytest.mark.parametrize("part", ["operator", "mixer", "block", "network"])
@EACH
def test_cases_written_here_verify(settings, part):
    own = dict(d_model=3, expand_ratio=2.4, rpe_dim=4, rpe_layers=2, gamma=0.9)
    case = cases.make_case("tnn", part, own | settings, 2, 9, "float32")
    rows = cases.verify(case)
    assert all(row.ok for row in rows), rows
    names = {row.tensor for row in rows}
    steps = part != "network" and not settings.get("bidirectional")
    assert ("out.y_steps" in names) == steps and ("out.kernel" in names) == (part != "network")
    grads = {n for n in names if n.startswith("grad.param") and n.endswith("gamma")}
    assert bool(grads) == bool(settings.get("use_multi_decay"))
    used = cases.part_of(case).cfg
    used = used if part != "network" else used.layer
    assert used.rpe_layers == settings.get("rpe_layers", 2) and used.rpe_dim == 4


@pytest.mark.parametrize("kind", tnn_rpe.ACTIVATIONS)
def test_every_activation_in_the_rpe(kind):
    """Any of the published code, in the layers and before the last one"""
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, rpe_act=kind, act_type="none", residual=True)
    t, _ = tnn_rpe.coefficients_forward(params, 6, cfg)

    def act(z):
        return tnn_rpe.activation_forward(z, kind)[0]

    expected = np.stack([rpe(params, k, cfg, act) for k in range(6)], axis=1)
    assert error(t, expected) < 1e-13
    errors = gradcheck.check_pair(
        lambda a: tnn_rpe.coefficients_forward(a, 6, cfg), tnn_rpe.coefficients_backward, params
    )
    assert max(errors.values()) < gradcheck.TOLERANCE, errors
    case = cases.make_case("tnn", "block", {"d_model": 3, "rpe_dim": 4, "rpe_act": kind}, 2, 5)
    assert all(row.ok for row in cases.verify(case))


def test_published_settings_of_a_case():
    case = cases.read_case(GOLDEN[0])
    assert case.part == "block"
    more = {"norm": "simplermsnorm", "act": "relu", "gtu_act": "silu", "glu_act": "silu"}
    more |= {"par_type": 1, "residual": False, "act_type": "none", "num_heads": 1}
    more |= {"bias": True, "resi_param": False, "use_norm": False, "normalize": False}
    more |= {"n": 512, "max_l": 512, "embed_dim": 6, "dim": 6, "rpe_embedding": 8, "layers": 3}
    settings = case.settings | more
    assert all(row.ok for row in cases.verify(replace(case, settings=settings)))
    for wrong, sentence in (
        ({"norm": "layernorm"}, "norm='layernorm' is not known"),
        ({"act": "tanh"}, "rpe_act='tanh' is not known"),
        ({"gtu_act": "relu"}, "gtu_act='relu' is not known"),
        ({"act_type": "tanh"}, "act_type='tanh' is not known"),
        ({"bias": False}, "bias=False: the layer here is the published one with bias=True"),
        ({"resi_param": True}, "resi_param=True: the layer here"),
        ({"use_norm": True}, "with use_norm=False"),
        ({"normalize": True}, "with normalize=False"),
        ({"biases": False}, "'biases' is not one of tnn's block"),
        ({"use_decay": False}, "gamma is not a parameter"),
    ):
        with pytest.raises(Error, match=sentence):
            cases.verify(replace(case, settings=settings | wrong))


# Input


def test_odd_memory_layouts_and_read_only_input():
    rng = np.random.default_rng(0)
    for settings in CAUSAL + BOTH:
        cfg, params = layer(rng, part="block", **settings)
        x, dy = rng.standard_normal((2, 2, 9, D))
        expected = run(params, x, dy, cfg, "block")
        wide = np.zeros((2, 9, 2 * D))
        wide[..., ::2] = x
        frozen, before = x.copy(), x.copy()
        kept = {n: p.copy() for n, p in params.items()}
        frozen.flags.writeable = False
        for form in (np.asfortranarray(x), wide[..., ::2], frozen):
            other = {n: np.asfortranarray(p) for n, p in params.items()}
            for p in other.values():
                p.flags.writeable = False
            results = run(other, form, np.asfortranarray(dy), cfg, "block")
            assert max(map(error, results, expected)) < 1e-12
        assert (x == before).all() and all((params[n] == p).all() for n, p in kept.items())


def test_bad_input_gets_its_sentence():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="block")
    with pytest.raises(Error, match="float16"):
        tnn.operator_forward(params, np.zeros((1, 4, E), "float16"), cfg)
    for shape in ((4, E), (1, 4, E + 1), (1, 0, E), (0, 4, E)):
        with pytest.raises(Error, match="expected \\(B, L, 8\\)"):
            tnn.operator_forward(params, np.zeros(shape), cfg)
    for forward in (tnn.mixer_forward, tnn.block_forward):
        with pytest.raises(Error, match="expected \\(B, L, 5\\)"):
            forward(params, np.zeros((1, 4, E)), cfg)
    with pytest.raises(Error, match="decoding needs l_max"):
        tnn.state(params, cfg, 1)
    both = replace(cfg, bidirectional=True, l_max=9)
    for call in (
        lambda: tnn.state(params, both, 1),
        lambda: tnn.kernels(params, both, 9),
    ):
        with pytest.raises(Error, match="no recurrent step"):
            call()
    with pytest.raises(Error, match="give L"):
        tnn.matrix(params, cfg)
    for wrong, sentence in (
        (dict(rpe_act="tanh"), "rpe_act='tanh' is not known"),
        (dict(act_type="softplus"), "act_type='softplus' is not known"),
        (dict(par_type=4), "par_type=4: expected 1"),
        (dict(use_decay=True, use_multi_decay=True), "give one"),
        (dict(gamma=0.0), "gamma=0.0: expected more than 0"),
        (dict(gamma=1.1, use_multi_decay=True), "at most 1"),
        (dict(gamma=float("nan")), "gamma=nan"),
        (dict(rpe_layers=-1), "rpe_layers=-1"),
        (dict(l_max=-1), "l_max=-1"),
        (dict(num_heads=0), "num_heads=0"),
        (dict(num_heads=400), "num_heads=400"),
        (dict(expand_ratio=0.0), "expand_ratio=0.0"),
        (dict(d_model=0), "d_model=0"),
        (dict(expand_ratio=float("nan")), "expand_ratio=nan"),
        (dict(expand_ratio=float("inf")), "expand_ratio=inf"),
        (dict(dropout=1.0), "dropout=1.0"),
    ):
        with pytest.raises(Error, match=sentence):
            tnn.Config(**wrong)
    with pytest.raises(Error, match="needs a causal map"):
        network.Config("tnn", both, 1, 4, 4, decoder="lm")


def test_ten_steps_are_pinned():
    """A loss trajectory of the whole chain, to catch a change that no other test sees"""
    rng = np.random.default_rng(0)
    own = tnn.Config(d_model=8, rpe_dim=8, use_decay=True, gamma=0.9, dropout=0.1)
    cfg = network.Config("tnn", own, n_layers=2, d_input=7, d_output=7, decoder="lm", tied=True)
    cfg = replace(cfg, final_norm=True)
    params = network.init(cfg, rng, "float64")
    groups = network.groups(params, cfg)
    assert [n for n, group in groups.items() if group == "frozen"] == ["blocks.gamma"]
    groups = {n: optim.Group(1e-2 if g == "main" else 0.0, 0.1) for n, g in groups.items()}
    moments = optim.adamw_init(params)
    x, losses = rng.integers(0, 7, (4, 13)), []
    for i in range(1, 11):
        logits, cache = network.forward(params, x[:, :-1], cfg, rng=np.random.default_rng([1, i]))
        loss, loss_cache = nn.softmax_cross_entropy_forward(logits, x[:, 1:])
        _, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)
        optim.adamw_update(params, grads, moments, i, groups)
        losses.append(float(loss))
    assert (params["blocks.gamma"] == 0.9).all()
    assert error(losses[4::5], PINNED) < 1e-9


def test_a_picture_of_both_directions(tmp_path, monkeypatch):
    """Each lag stands where it is, and a cut Hankel matrix says that it is one"""
    plots = pytest.importorskip("ref.plots", reason="matplotlib is not installed")
    shown, path = [], tmp_path / "a.png"
    monkeypatch.setattr(plots, "_save", lambda figure, path: shown.append(figure))
    plots.draw("kernel", None, ("tnn",), {"d_model": 4, "bidirectional": True}, 9, 0, path)
    ((_, (module, params, cfg)),) = plots.initial_layers(
        ("tnn",), {"d_model": 4, "bidirectional": True}, 9, 0
    ).items()
    left, right = shown[-1].axes
    M = module.matrix(params, cfg, L=9)[0, 1]
    lags, k = left.lines[1].get_data()
    for lag, value in zip(lags, k, strict=True):
        assert error(np.diag(M, -int(lag)), np.full(9 - abs(int(lag)), value)) < 1e-13
    assert list(lags) == list(range(-8, 9)) == list(right.lines[0].get_xdata())
    assert "later inputs" in left.get_xlabel()
    plots.draw("kernel", None, ("tnn", "s4d"), {"d_model": 4}, 9, 0, path)
    assert list(shown[-1].axes[0].lines[0].get_xdata()) == list(range(9))
    plots.draw("kernel", None, ("s4d",), {"d_model": 4, "bidirectional": True}, 9, 0, path)
    assert "forward direction" in shown[-1].axes[0].get_title()
    for models, cut in ((("tnn", "s4d"), True), (("hyena",), True), (("s4d",), False)):
        plots.draw("hankel", None, models, {"d_model": 4}, 9, 0, path)
        (axis,) = shown[-1].axes
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert ["9 taps" in label for label in labels] == [m != "s4d" for m in models]
        assert any("the plateau" in text.get_text() for text in axis.texts) == cut
    settings = {"d_model": 4, "rpe_act": "silu", "act_type": "silu", "par_type": 2}
    plots.draw("matrix", None, ("tnn",), settings, 9, 0, path)
    figure = shown[-1]
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


PINNED = [1.8725429939060856, 1.7410098715113904]
