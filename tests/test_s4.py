"""S4 and S4D: golden cases, the definition of a derivative, other forms of the same map, precision,
bad input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import error
from scipy.linalg import expm

from ref import Error, cases, gradcheck, network, nn, optim, s4, s4d, ssm

GOLDEN = sorted((Path(__file__).parent / "golden").glob("s4*.safetensors"))
SHAPES = [(1, 1), (2, 2), (3, 7), (2, 24), (1, 127), (2, 130)]
LAYERS = [
    (s4d, dict()),
    (s4d, dict(discretization="bilinear")),
    (s4d, dict(bidirectional=True)),
    (s4d, dict(discretization="bilinear", bidirectional=True, init="legs")),
    (s4, dict()),
    (s4, dict(bidirectional=True)),
    (s4, dict(l_max=131)),
    (s4, dict(l_max=256, bidirectional=True)),
]
EACH = pytest.mark.parametrize("module, settings", LAYERS, ids=str)


def layer(module, rng, dtype="float64", part="operator", **settings):
    """A layer away from its initialisation: no parameter has a special value"""
    cfg = module.Config(**dict(d_model=5, d_state=6) | settings)
    params = getattr(module, f"{part}_init")(cfg, rng, "float64")
    params = {n: p + 0.1 * rng.standard_normal(p.shape) for n, p in params.items()}
    if "norm_var" in params:
        params["norm_var"] = np.abs(params["norm_var"])
    return cfg, {n: p.astype(dtype) for n, p in params.items()}


def run(module, params, x, dy, cfg, part="operator"):
    """-> [y, dx, every gradient], in a fixed order"""
    y, cache = getattr(module, f"{part}_forward")(params, x, cfg)
    dx, grads = getattr(module, f"{part}_backward")(dy, cache)
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
        assert len(rows) >= 3
        assert all(row.ok and row.allowed == 1e-9 for row in rows), rows


@pytest.mark.parametrize("model", ["s4", "s4d"])
def test_gradients(model):
    for label, errors in gradcheck.errors_of(model):
        assert max(errors.values()) < gradcheck.TOLERANCE, (label, errors)


@EACH
@pytest.mark.parametrize("B, L", SHAPES)
def test_twins_are_the_readable_form(module, settings, B, L, plain):
    rng = np.random.default_rng(L)
    cfg, params = layer(module, rng, **settings)
    x, dy = rng.standard_normal((2, B, L, 5))
    twin, readable = (
        run(module, params, x, dy, cfg),
        plain(run, module, params, x, dy, cfg),
    )
    for a, b in zip(twin, readable, strict=True):  # at L = 1, S4's dlog_dt is 0 but for rounding
        assert np.abs(a - b).max() < 1e-11 * max(1e-2, np.abs(b).max())


@EACH
def test_float32_stays_float32_and_is_precise(module, settings, plain):
    rng = np.random.default_rng(0)
    settings = dict(settings, d_state=64, norm="batch")
    cfg, params = layer(module, rng, "float32", "block", **settings)
    x, dy = rng.standard_normal((2, 2, 131, 5)).astype("float32")
    wide = {n: p.astype("float64") for n, p in params.items()}
    exact = run(module, wide, x.astype("float64"), dy.astype("float64"), cfg, "block")
    for results in (
        run(module, params, x, dy, cfg, "block"),
        plain(run, module, params, x, dy, cfg, "block"),
    ):
        assert {r.dtype.name for r in results} == {"float32"}
        assert max(map(error, results, exact)) < 5e-6


@EACH
@pytest.mark.parametrize("L", [1, 2, 9, 16])
def test_matrix_is_the_operator(module, settings, L):
    rng = np.random.default_rng(L)
    cfg, params = layer(module, rng, **settings)
    x = rng.standard_normal((3, L, 5))
    M = module.matrix(params, cfg, L=L)
    assert M.shape == (1, 5, L, L)
    y = np.einsum("dts,bsd->btd", M[0], x)
    assert error(module.operator_forward(params, x, cfg)[0], y) < 1e-12
    assert cfg.causal == (not np.triu(M, 1).any() and not cfg.bidirectional)


# Convolution and recurrence


@pytest.mark.parametrize("dt", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize(
    "module, settings",
    [
        (s4d, dict()),
        (s4d, dict(discretization="bilinear", init="legs")),
        (s4d, dict(init="random")),
        (s4, dict(l_max=300)),
        (s4, dict(l_max=301)),
    ],
    ids=str,
)
def test_step_is_the_convolution(module, settings, dt):
    rng = np.random.default_rng(0)
    cfg = module.Config(d_model=3, d_state=64, dt_min=dt, dt_max=dt, norm="batch", **settings)
    params = module.block_init(cfg, rng, "float64")
    params["norm_mean"], params["norm_var"] = rng.standard_normal(3), 1 + rng.random(3)
    x = rng.standard_normal((2, 300, 3))
    for forward, one_step in (
        (module.operator_forward, module.operator_step),
        (module.block_forward, module.step),
    ):
        y = decode(one_step, module.state(params, cfg, 2), params, x, cfg)
        assert error(y, forward(params, x, cfg)[0]) < 1e-9


@pytest.mark.parametrize("l_max", [40, 41])
def test_dense_and_diagonal_recurrence_of_s4(l_max):
    for form, N, allowed in (("dense", 64, 1e-9), ("diagonal", 8, 1e-9)):
        rng = np.random.default_rng(0)
        cfg = s4.Config(d_model=3, d_state=N, l_max=l_max)
        params = s4.operator_init(cfg, rng, "float64")
        system, x = s4.recurrence(params, cfg, form), rng.standard_normal((2, 40, 3))
        assert system[0].ndim == (3 if form == "dense" else 2)
        s, y = np.zeros((2, 3, N), complex), []
        for t in range(40):
            y_t, s = s4.recurrence_step(system, x[:, t], s)
            y.append(y_t + params["D"] * x[:, t])
        assert error(np.stack(y, axis=1), s4.operator_forward(params, x, cfg)[0]) < allowed


def test_s4_s_kernel_is_its_definition():
    """(3), (4) and (7) by dense matrices, for even and odd lengths: w = -1 is a node of the even"""
    rng = np.random.default_rng(0)
    for l_max in (1, 2, 3, 16, 17):
        cfg, params = layer(s4, rng, d_state=8)
        C = params["C"]
        dA, dB, A = s4.dense(params)
        assert (
            np.abs(A - A.conj()[:, [4, 5, 6, 7, 0, 1, 2, 3]][:, :, [4, 5, 6, 7, 0, 1, 2, 3]]).max()
            < 1e-13
        )
        rows, kernel, state = ssm.with_conjugates(ssm.as_complex(C[0])), [], dB
        for _ in range(l_max):
            kernel.append((rows * state).sum(axis=1))
            state = (dA @ state[:, :, None])[:, :, 0]
        k = np.stack(kernel, axis=1)
        assert np.abs(k.imag).max() < 1e-12
        own = params | {"C": s4.truncated(params, l_max)}
        cfg = replace(cfg, l_max=l_max)
        assert error(s4.impulse_response(own, cfg, l_max), k.real) < 1e-12


def test_s4_truncation_is_undone_and_its_length_doubled():
    rng = np.random.default_rng(0)
    for bidirectional in (False, True):
        cfg, params = layer(s4, rng, d_state=16, l_max=20, bidirectional=bidirectional)
        true = params | {"C": s4.output_matrix(params, 20)}
        assert error(s4.truncated(true, 20), params["C"]) < 1e-12
        doubled, longer = s4.double_length(params, cfg)
        assert longer.l_max == 40
        assert error(s4.truncated(true, 40), doubled["C"]) < 1e-12
        k, _ = s4.kernel_forward(doubled, 40, longer)
        assert error(s4.kernel_forward(params, 20, cfg)[0], k[:, :, :20]) < 1e-11
        assert error(s4.kernel_forward(doubled, 7, longer)[0], k[:, :, :7]) == 0
        with pytest.raises(Error, match="double_length"):
            s4.kernel_forward(params, 21, cfg)


def test_s4_without_its_low_rank_term_is_s4d():
    """Two derivations of the bilinear kernel meet: Cauchy sums and powers"""
    rng = np.random.default_rng(0)
    for L in (12, 13):
        cfg, params = layer(s4, rng, d_state=8, l_max=L, bidirectional=True)
        params["P"] *= 0
        C = ssm.as_complex(s4.output_matrix(params, L)) * ssm.as_complex(params["B"])
        other = s4d.Config(d_model=5, d_state=8, discretization="bilinear", bidirectional=True)
        same = {
            "C": ssm.as_pairs(C),
            "log_A_real": params["A_real"],
            "A_imag": -params["A_imag"],
            "log_dt": params["log_dt"],
            "D": params["D"],
        }
        x = rng.standard_normal((2, L, 5))
        y = s4.operator_forward(params, x, cfg)[0]
        assert error(s4d.operator_forward(same, x, other)[0], y) < 1e-12


def test_s4d_s_kernel_is_its_definition():
    """Zero-order hold: the matrix exponential of the sampled system, and far out in l"""
    rng = np.random.default_rng(0)
    cfg, params = layer(s4d, rng, d_model=2, d_state=4)
    C, A, dt = s4d.modes(params)
    for d in range(2):
        system = np.zeros((3, 3), complex)  # x' = A x + u, u' = 0
        system[:2, :2], system[:2, 2] = np.diag(A[d]), 1
        step = expm(system * dt[d, 0])
        x, k = step[:2, 2], []
        for _ in range(50):
            k.append(2 * (C[0, d] @ x).real)
            x = step[:2, :2] @ x
        assert error(s4d.impulse_response(params, cfg, 50)[d], k) < 1e-13
    c = rng.standard_normal((1, 2, 3)) + 0j
    z = -1e-5 * rng.random((2, 3)) + 0.3j * rng.standard_normal((2, 3))
    k, _ = s4d.vandermonde_forward(c, z, 20_000)
    exact = 2 * (c[0, :, :, None] * np.exp(z[:, :, None] * np.arange(20_000))).sum(axis=1).real
    assert error(k[0], exact) < 1e-12


def test_the_second_direction_begins_one_step_ahead():
    """The published layout: circular convolution of length 2L with [k0, flip(k1)]"""
    rng = np.random.default_rng(0)
    for L in (1, 6, 7):
        k, x = rng.standard_normal((2, 3, L)), rng.standard_normal((2, L, 3))
        both = np.concatenate([k[0], k[1, :, ::-1]], axis=1)
        spectrum = np.fft.rfft(both, axis=1).T * np.fft.rfft(x, 2 * L, axis=1)
        y = np.fft.irfft(spectrum, 2 * L, axis=1)[:, :L]
        assert error(ssm.convolution_forward(x, k)[0], y) < 1e-13


def test_a_time_constant_beyond_the_sequence_matters_not():
    """log_dt of S4 with one sample: C~ takes all of it, the kernel is real(C~ (P P^* - Λ)⁻¹ B)"""
    rng = np.random.default_rng(0)
    cfg, params = layer(s4, rng)
    x = rng.standard_normal((2, 1, 5))
    _, cache = s4.operator_forward(params, x, cfg)
    _, grads = s4.operator_backward(x, cache)
    assert np.abs(grads["log_dt"]).max() < 1e-12 * np.abs(grads["C"]).max()


# Initialisation


@pytest.mark.parametrize("N", [2, 8, 64])
def test_legs_is_normal_plus_low_rank(N):
    W, P, B, V = ssm.legs_nplr(N)
    i = np.arange(N)
    hippo = -np.tril(np.sqrt(np.outer(2 * i + 1, 2 * i + 1)), -1) - np.diag(i + 1.0)
    W, P, B = (ssm.with_conjugates(x) for x in (W, P, B))
    V = ssm.with_conjugates(V)
    assert error(V @ V.conj().T, np.eye(N)) < 1e-12
    assert error(V @ (np.diag(W) - np.outer(P, P.conj())) @ V.conj().T, hippo) < 1e-12
    assert error(V @ B, np.sqrt(2 * i + 1)) < 1e-12
    assert (W[: N // 2].imag < 0).all() and (W.real == -0.5).all()
    assert (V[0].real > 0).all() and np.abs(V[0].imag).max() < 1e-15


def test_initialisations():
    rng = np.random.default_rng(0)
    n = np.arange(16)
    for init, imaginary in (
        ("lin", np.pi * n),
        ("inv", 32 / np.pi * (32 / (2 * n + 1) - 1)),
        ("legs", -ssm.legs_nplr(32)[0].imag),
    ):
        cfg = s4d.Config(d_model=300, d_state=32, init=init)
        params = s4d.block_init(cfg, rng, "float32")
        _, A, dt = s4d.modes(params)
        assert error(A, np.tile(-0.5 + 1j * imaginary, (300, 1))) < 1e-6
        assert dt.min() > 1e-3 * (1 - 1e-6) and dt.max() < 1e-1
        assert abs(params["C"].std() - np.sqrt(0.5)) < 0.02
        assert {p.dtype.name for p in params.values()} == {"float32"}
    random = s4d.modes(s4d.operator_init(s4d.Config(init="random"), rng))[1]
    assert (random.real < 0).all() and abs(random.imag.std() - 1) < 0.1
    cfg = s4.Config(d_model=20, d_state=64, l_max=100, bidirectional=True)
    params = s4.operator_init(cfg, rng, "float64")
    assert params["B"].min() >= -2 and params["B"].max() <= 2
    assert abs(s4.output_matrix(params, 100).std() - np.sqrt(0.5)) < 0.03


def test_hankel_singular_values():
    rng = np.random.default_rng(0)
    for module, settings in [*LAYERS[:4], (s4, dict(l_max=64)), LAYERS[5]]:
        cfg, params = layer(module, rng, d_model=2, dt_min=0.2, dt_max=0.3, **settings)
        values = module.hankel_values(params, cfg)
        assert values.shape == (4 if cfg.bidirectional else 2, 6)
        long = replace(cfg, l_max=0) if module is s4 else cfg
        if module is s4:  # the kernel of a C~ for 800 taps
            C = s4.output_matrix(params, cfg.l_max) if cfg.l_max else params["C"]
            params = params | {"C": s4.truncated(params | {"C": C}, 800)}
        k, _ = module.kernel_forward(params, 800, long)
        index = np.arange(400)[:, None] + np.arange(400)
        dense = np.linalg.svd(k.reshape(-1, 800)[:, index], compute_uv=False)[:, :6]
        assert error(values, dense) < 1e-10


# Names, input


@EACH
def test_published_names_are_linear_and_invertible(module, settings):
    rng = np.random.default_rng(0)
    cfg, params = layer(module, rng, part="block", norm="batch", **settings)
    tensors = module.to_published(params, cfg, "block")
    back = module.from_published(tensors, cfg, "block")
    assert back.keys() == params.keys()
    assert all((back[n] == params[n]).all() for n in params)
    doubled = module.from_published({n: 2 * t for n, t in tensors.items()}, cfg, "block")
    assert all((doubled[n] == 2 * params[n]).all() for n in params)
    net = network.Config(module.__name__[4:], cfg, n_layers=2, d_input=7, d_output=3)
    params = network.init(net, rng, "float64")
    tensors = network.to_published(params, net)
    assert "s4_layers.1.kernel.C" in tensors and "norms.0.running_var" in tensors
    back = network.from_published(tensors, net)
    assert all((back[n] == params[n]).all() for n in params)


@pytest.mark.parametrize("part", ["operator", "mixer", "block", "network"])
@EACH
def test_cases_written_here_verify(module, settings, part):
    case = cases.make_case(module.__name__[4:], part, settings | {"d_model": 3}, 2, 9, "float32")
    rows = cases.verify(case)
    assert all(row.ok for row in rows), rows
    names = {row.tensor for row in rows}
    steps = part in ("operator", "block") and not settings.get("bidirectional")
    assert ("out.y_steps" in names) == steps and ("out.kernel" in names) == (part != "network")
    if module is s4:
        wrong = {n: t + n.endswith("l_kernel") for n, t in case.tensors.items()}
        with pytest.raises(Error, match="l_kernel is"):
            cases.verify(replace(case, tensors=wrong))


def test_odd_memory_layouts_and_read_only_input():
    rng = np.random.default_rng(0)
    for module, settings in LAYERS:
        cfg, params = layer(module, rng, part="mixer", **settings)
        x, dy = rng.standard_normal((2, 2, 9, 5))
        expected = run(module, params, x, dy, cfg, "mixer")
        wide = np.zeros((2, 9, 10))
        wide[..., ::2] = x
        frozen, before = x.copy(), x.copy()
        frozen.flags.writeable = False
        for form in (np.asfortranarray(x), wide[..., ::2], frozen):
            other = {n: np.asfortranarray(p) for n, p in params.items()}
            results = run(module, other, form, np.asfortranarray(dy), cfg, "mixer")
            assert max(map(error, results, expected)) < 1e-12
        assert (x == before).all()


def test_bad_input_gets_its_sentence():
    rng = np.random.default_rng(0)
    for module in (s4, s4d):
        cfg, params = layer(module, rng)
        with pytest.raises(Error, match="float16"):
            module.operator_forward(params, np.zeros((1, 4, 5), "float16"), cfg)
        for shape in ((4, 5), (1, 4, 6), (1, 0, 5), (0, 4, 5)):
            with pytest.raises(Error, match="expected \\(B, L, 5\\)"):
                module.operator_forward(params, np.zeros(shape), cfg)
        with pytest.raises(Error, match="no recurrent step"):
            module.state(params, replace(cfg, bidirectional=True), 1)
        for wrong in (
            dict(d_state=3),
            dict(d_state=0),
            dict(d_model=0),
            dict(dt_min=0.0),
            dict(dt_min=float("nan")),
            dict(dropout=1.0),
            dict(norm="group"),
        ):
            with pytest.raises(Error):
                module.Config(**wrong)
    for wrong in (dict(init="hippo"), dict(discretization="euler")):
        with pytest.raises(Error, match="not known"):
            s4d.Config(**wrong)
    cfg, params = layer(s4, rng)
    with pytest.raises(Error, match="needs l_max"):
        s4.state(params, cfg, 1)
    for call in (lambda: s4.output_matrix(params, 0), lambda: s4.recurrence(params, cfg)):
        with pytest.raises(Error, match="Give l_max"):
            call()
    with pytest.raises(Error, match="no recurrent step"):
        s4.recurrence(params, replace(cfg, bidirectional=True, l_max=9))
    for module in (s4, s4d):
        own, p = layer(module, rng)
        with pytest.raises(Error, match="give L"):
            module.matrix(p, own)
        assert module.matrix(p, own, np.zeros((1, 6, 5))).shape == (1, 5, 6, 6)
    with pytest.raises(Error, match="no length that could be doubled"):
        s4.double_length(params, cfg)
    with pytest.raises(Error, match="l_max >= 0"):
        s4.Config(l_max=-1)
    for setting, sentence in (({"rank": 2}, "rank 1"), ({"dt_transform": "softplus"}, "exp")):
        with pytest.raises(Error, match=sentence):
            s4.config_of(setting, {}, "operator")


@pytest.mark.parametrize("module", [s4, s4d])
def test_ten_steps_are_pinned(module):
    """A loss trajectory of the whole chain, to catch a change that no other test sees"""
    rng = np.random.default_rng(0)
    more = {"l_max": 12} if module is s4 else {}
    own = module.Config(d_model=8, d_state=8, norm="batch", dropout=0.1, bidirectional=True, **more)
    cfg = network.Config(module.__name__[4:], own, n_layers=2, d_input=7, d_output=3)
    params = network.init(cfg, rng, "float64")
    moments, groups = optim.adamw_init(params), dict.fromkeys(params, optim.Group(1e-2, 0.1))
    x, targets, losses = rng.integers(0, 7, (4, 12)), rng.integers(0, 3, 4), []
    for i in range(1, 11):
        logits, cache = network.forward(params, x, cfg, rng=np.random.default_rng([1, i]))
        loss, loss_cache = nn.softmax_cross_entropy_forward(logits, targets)
        _, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)
        optim.adamw_update(params, grads, moments, i, groups)
        params |= network.running_statistics(params, cache)
        losses.append(float(loss))
    assert error(losses[4::5], PINNED[module]) < 1e-9


PINNED = {
    s4: [1.0699266090438813, 0.9944948392462521],
    s4d: [1.07381058167008, 1.0008909790348428],
}
