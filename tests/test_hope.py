"""HOPE: golden cases, the definition of a derivative, other forms of the same map, precision, bad
input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import error

from ref import Error, backend, cases, gradcheck, hope, nn

GOLDEN = sorted((Path(__file__).parent / "golden").glob("hope_*.safetensors"))
SHAPES = [(1, 1), (2, 2), (3, 7), (2, 24), (1, 127), (2, 128)]
LAYERS = [
    dict(),
    dict(markov="real"),
    dict(bidirectional=True),
    dict(conv="causal"),
    dict(conv="causal", markov="real"),
    dict(bidirectional=True, layout="published"),
]


def layer(rng, dtype="float64", part="operator", **settings):
    cfg = hope.Config(**dict(d_model=5, d_state=14, dt_max=2.0) | settings)
    return cfg, getattr(hope, f"{part}_init")(cfg, rng, dtype)


def run(params, x, dy, cfg, part="operator"):
    """-> [y, dx, every gradient], in a fixed order"""
    y, cache = getattr(hope, f"{part}_forward")(params, x, cfg)
    dx, grads = getattr(hope, f"{part}_backward")(dy, cache)
    return [y, dx] + [grads[name] for name in sorted(grads)]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path, plain):
    case = cases.read_case(path)
    for rows in (cases.verify(case), plain(cases.verify, case)):
        assert len(rows) >= 6
        assert all(row.ok and row.allowed == 1e-9 for row in rows), rows


def test_gradients():
    for label, errors in gradcheck.errors_of("hope"):
        assert max(errors.values()) < gradcheck.TOLERANCE, (label, errors)


@pytest.mark.parametrize("settings", LAYERS, ids=str)
@pytest.mark.parametrize("B, L", SHAPES)
def test_twins_are_the_readable_form(settings, B, L, plain):
    if settings.get("layout") == "published" and L % 2:
        return
    rng = np.random.default_rng(L)
    cfg, params = layer(rng, dt_min=1e-4, **settings)
    x, dy = rng.standard_normal((2, B, L, 5))
    twin, readable = run(params, x, dy, cfg), plain(run, params, x, dy, cfg)
    for a, b in zip(twin, readable, strict=True):  # at L = 2, dlog_dt is 0 but for rounding
        assert np.abs(a - b).max() < 1e-11 * max(1e-3, np.abs(b).max())


@pytest.mark.parametrize("settings", LAYERS, ids=str)
def test_float32_stays_float32_and_is_precise(settings, plain):
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="block", d_state=128, norm="batch", **settings)
    x, dy = rng.standard_normal((2, 2, 256, 5))
    exact = run(params, x, dy, cfg, "block")
    params, x, dy = (
        {n: p.astype("f4") for n, p in params.items()},
        x.astype("f4"),
        dy.astype("f4"),
    )
    for results in (run(params, x, dy, cfg, "block"), plain(run, params, x, dy, cfg, "block")):
        assert {r.dtype.name for r in results} == {"float32"}
    bound = (
        1e-4 if backend.plain() else 1e-5
    )  # the readable form rounds angles, and sums less cleverly
    assert max(map(error, run(params, x, dy, cfg, "block"), exact)) < bound


@pytest.mark.parametrize("settings", LAYERS, ids=str)
@pytest.mark.parametrize("L", [1, 2, 9, 16])
def test_matrix_is_the_operator(settings, L):
    if settings.get("layout") == "published" and L % 2:
        return
    rng = np.random.default_rng(L)
    cfg, params = layer(rng, **settings)
    x = rng.standard_normal((3, L, 5))
    M = hope.matrix(params, cfg, L=L)
    assert M.shape == (1, 5, L, L)
    y = np.einsum("dts,bsd->btd", M[0], x)
    assert error(hope.operator_forward(params, x, cfg)[0], y) < 1e-13
    if cfg.conv == "causal":
        assert not np.triu(M, 1).any()


def test_sampling_is_the_sum_at_the_mapped_nodes():
    """(1) at (2), by complex powers, where (2) has no singular point"""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((3, 4)) + 1j * rng.standard_normal((3, 4))
    dt, L = np.array([0.01, 1.0, 3.0])[:, None], 9
    w = np.exp(2j * np.pi * np.arange(L) / L)
    mapped = ((1 + dt) * w + dt - 1) / ((dt - 1) * w + dt + 1)
    g = sum(h[:, i, None] * mapped ** -(i + 1) for i in range(4))
    assert error(hope.sample_forward(h, np.log(dt[:, 0]), L, L)[0], g) < 1e-14


def test_the_imaginary_part_is_dead_unless_published():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 10, 5))
    for settings in LAYERS:
        cfg, params = layer(rng, **settings)
        if cfg.markov == "real":
            continue
        other = params | {"H": params["H"] * [1.0, -7.0]}
        y, dx, D, H, log_dt = run(params, x, dy, cfg)
        changed = run(other, x, dy, cfg)
        if cfg.layout == "published":
            assert error(changed[0], y) > 1e-2
            assert np.abs(H[..., 1]).max() > 1e-2
        else:
            assert all((a == b).all() for a, b in zip(changed, (y, dx, D, H, log_dt), strict=True))
            assert not H[..., 1].any()
            # and it is so for the literal formula (3) with complex h
            h = params["H"][..., 0] + 1j * params["H"][..., 1]
            if cfg.conv == "circular":
                g = hope.sample_forward(h[:5], params["log_dt"][:5], 10, 10)[0]
                if cfg.bidirectional:  # at conj w'
                    g = (
                        g
                        + hope.sample_forward(h[5:].conj(), params["log_dt"][5:], 10, 10)[0].conj()
                    )
                literal = np.fft.ifft(np.fft.fft(x, axis=1) * g.T, axis=1).real
                assert error(literal + params["D"] * x, y) < 1e-13


def test_dt_one_is_a_delayed_fir_filter():
    rng = np.random.default_rng(0)
    for conv in ("circular", "causal"):
        cfg, params = layer(rng, conv=conv, markov="real", dt_min=1.0, dt_max=1.0)
        k = np.concatenate([np.zeros((5, 1)), params["H"], np.zeros((5, 12))], axis=1)
        assert error(hope.impulse_response(params, cfg, 20), k) < 1e-14


@pytest.mark.parametrize("dt", [1e-4, 1e-2, 0.5, 1.0, 1.7, 30.0])
def test_step_is_the_causal_convolution(dt):
    """The ladder of all-pass sections: 1e-10 in float64 is promised"""
    rng = np.random.default_rng(0)
    L = 300
    cfg, params = layer(
        rng, part="block", conv="causal", dt_min=dt, dt_max=dt, d_state=64, norm="batch", d_model=3
    )
    params["norm_mean"], params["norm_var"] = rng.standard_normal(3), 1 + rng.random(3)
    x = rng.standard_normal((2, L, 3))
    for forward, one_step in (
        (hope.operator_forward, hope.operator_step),
        (hope.block_forward, hope.step),
    ):
        y, s, steps = forward(params, x, cfg)[0], hope.state(params, cfg, 2), []
        for t in range(L):
            y_t, s = one_step(params, x[:, t], s, cfg)
            steps.append(y_t)
        assert s["s"].shape == (2, 3, 32)
        assert error(np.stack(steps, axis=1), y) < 1e-10


def test_the_causal_kernel_is_the_circular_one_of_a_long_sequence():
    """Two derivations meet: sampling on the circle, and the ladder; the difference is what wraps
    around"""
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, dt_min=0.3, dt_max=2.0)
    circular = hope.impulse_response(params, cfg, 4096)
    assert (
        error(hope.impulse_response(params, replace(cfg, conv="causal"), 200), circular[:, :200])
        < 1e-13
    )


def test_hankel_singular_values():
    h = np.array([[1.0, 0.5, 0.25, 0.0]])
    hankel = np.array([[1, 0.5, 0.25, 0], [0.5, 0.25, 0, 0], [0.25, 0, 0, 0], [0, 0, 0, 0]])
    values = hope.hankel_singular_values(h)
    assert error(values[0], np.linalg.svd(hankel, compute_uv=False)) < 1e-15
    many = hope.hankel_singular_values(np.random.default_rng(0).standard_normal((6, 32)) * (1 + 1j))
    assert many.shape == (6, 32)
    assert (np.diff(many) <= 0).all()
    assert np.median(many[:, 16] / many[:, 0]) > 0.1  # random h decays slowly: the paper's point


def test_initialisation_follows_both_conventions():
    rng = np.random.default_rng(0)
    for convention, d_state, n, std in (
        ("minimal", 64, 32, 0.5 / 8),
        ("lra", 64, 64, 0.5 / 8),
        ("lra", 16, 16, 0.5 / 4),
    ):
        cfg = hope.Config(d_model=400, d_state=d_state, convention=convention, bidirectional=True)
        params = hope.block_init(cfg, rng, "float32")
        assert params["H"].shape == (800, n, 2)
        assert abs(params["H"].std() / (std * np.sqrt(0.5)) - 1) < 0.02
        assert params["log_dt"].min() > np.log(cfg.dt_min) and params["log_dt"].max() < np.log(
            cfg.dt_max
        )
        assert {p.dtype.name for p in params.values()} == {"float32"}


def test_dropout_masks_are_shared_over_time():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="block", dropout=0.5, d_model=40)
    x = rng.standard_normal((2, 9, 40))
    y, cache = hope.block_forward(params, x, cfg, np.random.default_rng(3))
    again = hope.block_forward(params, x, cfg, np.random.default_rng(3))[0]
    assert (y == again).all()
    (mask,) = cache[3]
    assert mask.shape == (2, 1, 40) and 0.2 < (mask == 0).mean() < 0.8


def test_odd_memory_layouts_and_read_only_input():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, part="mixer")
    x, dy = rng.standard_normal((2, 2, 9, 5))
    expected = run(params, x, dy, cfg, "mixer")
    wide = np.zeros((2, 9, 10))
    wide[..., ::2] = x
    frozen, before = x.copy(), x.copy()
    frozen.flags.writeable = False
    for form in (np.asfortranarray(x), wide[..., ::2], frozen):
        transposed = {n: np.asfortranarray(p) for n, p in params.items()}
        results = run(transposed, form, np.asfortranarray(dy), cfg, "mixer")
        assert max(map(error, results, expected)) < 1e-13
    assert (x == before).all()


def test_bad_input_gets_its_sentence():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng)
    with pytest.raises(Error, match="float16"):
        hope.operator_forward(params, np.zeros((1, 4, 5), "float16"), cfg)
    for shape in ((4, 5), (1, 4, 6), (1, 0, 5), (0, 4, 5)):
        with pytest.raises(Error, match="expected \\(B, L, 5\\)"):
            hope.operator_forward(params, np.zeros(shape), cfg)
    with pytest.raises(Error, match="no recurrent step"):
        hope.state(params, cfg, 1)
    published, p = layer(rng, bidirectional=True, layout="published")
    with pytest.raises(Error, match="even length"):
        hope.operator_forward(p, np.zeros((1, 7, 5)), published)
    for wrong in (
        dict(conv="cyclic"),
        dict(d_state=1),
        dict(dt_min=0.0),
        dict(dt_min=float("nan")),
        dict(dropout=1.0),
        dict(conv="causal", bidirectional=True),
        dict(layout="published"),
        dict(norm="group"),
    ):
        with pytest.raises(Error):
            hope.Config(**wrong)


def test_published_names_are_linear_and_invertible():
    rng = np.random.default_rng(0)
    for settings in (dict(), dict(markov="real"), dict(bidirectional=True, norm="batch")):
        cfg, params = layer(rng, part="block", **settings)
        tensors = hope.to_published(params, cfg, "block")
        back = hope.from_published(tensors, cfg, "block")
        assert back.keys() == params.keys()
        assert all((back[n] == params[n]).all() for n in params)
        doubled = hope.from_published({n: 2 * t for n, t in tensors.items()}, cfg, "block")
        assert all((doubled[n] == 2 * params[n]).all() for n in params)


def test_the_identity_is_the_identity():
    rng = np.random.default_rng(0)
    cfg, params = layer(rng, conv="identity")
    x = rng.standard_normal((2, 6, 5))
    assert params == {}
    assert (hope.operator_forward(params, x, cfg)[0] == x).all()
    with pytest.raises(Error, match="identity"):
        hope.impulse_response(params, cfg, 6)


def test_ten_steps_are_pinned():
    """A loss trajectory of the whole chain, to catch a change that no other test sees"""
    from ref import network, optim

    rng = np.random.default_rng(0)
    block = hope.Config(d_model=8, d_state=8, norm="batch", dropout=0.1, bidirectional=True)
    cfg = network.Config("hope", block, n_layers=2, d_input=7, d_output=3)
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
    assert error(losses, PINNED) < 1e-9


PINNED = [
    1.0443889323650437,
    0.9928557131833147,
    1.0073315126468063,
    0.9963624801029476,
    0.951926200124218,
    0.9220972474537432,
    0.9154991826218916,
    0.8597489222865664,
    0.8504136712451478,
    0.883587050566107,
]
