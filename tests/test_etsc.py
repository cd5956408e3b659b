"""The exact conversion and the reduced ones: other forms of the same system, known bounds, golden
case, precision, bad input."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
import strict
from conftest import error

from ref import Error, backend, bench_etsc, cases, etsc, gradcheck, hankel, tnn

GOLDEN = Path(__file__).parent / "golden" / "etsc_solve_a.safetensors"
LENGTHS = (1, 2, 3, 16, 17, 64, 127)
DECAYS = (None, 0.93, (1.0, 0.97, 0.5))
FORMS = ("triangle", "rectangle")
TRIANGLE = {"method": "hankel", "hankel": "triangle"}


def decayed(t, gamma):
    """The kernel that is asked for"""
    gamma = 1.0 if gamma is None else np.reshape(gamma, (-1, 1))
    return t.astype("float64") * gamma ** np.arange(t.shape[1])


def decode(system, x, state=None):
    """x (B, L, C) -> y (B, L, C), state, one step after another"""
    state, steps = state or etsc.start(system, len(x)), []
    for t in range(x.shape[1]):
        y_t, state = etsc.step(system, x[:, t], state)
        steps.append(y_t)
    return np.stack(steps, axis=1), state


def answer(system, n):
    """To an impulse at the first position, by `step`.   -> k (C, n)"""
    x = np.zeros((1, n, len(system.b)), system.d.dtype)
    x[:, 0] = 1
    return decode(replace(system, horizon=n), x)[0][0].T


def definition(system, n):
    """(2) by powers"""
    powers = system.lam[:, :, None] ** np.arange(n)
    k = (system.b[:, :, None].astype("complex128") * powers).sum(axis=1).real
    k[:, 0] += system.d
    return k


def smooth(n, channels=3):
    """Sums of decaying exponentials with a power-law tail"""
    j = np.arange(n)
    kernels = (
        np.exp(-j / 30) * np.cos(0.3 * j) + 0.5 * 0.9**j + 0.1 / (1 + j) ** 1.2,
        0.99**j - 0.6 * 0.95**j + 0.2 / (1 + j),
        0.8**j * np.sin(j + 1) + 0.3 * 0.97**j,
    )
    return np.stack(kernels[:channels])


# The exact system


@pytest.mark.parametrize("gamma", DECAYS, ids=str)
@pytest.mark.parametrize("form", ["half", "full"])
@pytest.mark.parametrize("n", LENGTHS)
def test_exact_over_the_horizon_and_no_further(n, form, gamma):
    t = np.random.default_rng(n).standard_normal((3, n))
    system = etsc.to_ssm(t, gamma, spectrum=form)
    assert system.modes == ((n + 1) // 2 if form == "half" else n) and system.form == form
    assert system.lam.shape == (3 if np.ndim(gamma) else 1, system.modes)
    assert (system.states == (n if form == "half" else 2 * n - n % 2)).all()
    m, rate = n + 1, np.reshape(1.0 if gamma is None else gamma, (-1, 1))
    for k in (answer(system, 2 * m), etsc.coefficients(system, 2 * m), definition(system, 2 * m)):
        assert error(k[:, :n], decayed(t, gamma)) < 1e-12
        assert error(k[:, n], -(rate**n)[:, 0] * t.sum(axis=1)) < 1e-12
        assert error(k[:, m:] / rate**m, k[:, :m]) < 1e-11
    assert system.error.shape == (3,) and (system.error < 1e-14).all()
    assert system.bound is None and (system.d == 0).all()


def test_the_roots_are_right_to_rounding():
    mpmath.mp.dps = 30
    for m in (2, 3, 8, 17, 97, 1000):
        w = etsc.roots(np.arange(m + 1), m)
        exact = [mpmath.expjpi(mpmath.mpf(-2 * k) / m) for k in range(m + 1)]
        off = [abs(mpmath.mpc(complex(a)) - b) for a, b in zip(w, exact, strict=True)]
        assert max(off) < 1.5e-16
        assert w[0] == 1 and w[m] == 1 and (m % 2 or w[m // 2] == -1)


def test_half_is_full_folded():
    for n in (2, 9, 10):
        t = np.random.default_rng(n).standard_normal((2, n))
        half, full = (etsc.to_ssm(t, 0.9, spectrum=form) for form in ("half", "full"))
        assert error(full.lam[:, ::-1].conj(), full.lam) < 1e-15
        assert error(full.b[:, ::-1].conj(), full.b) < 1e-14
        N = half.modes
        assert error(half.lam, full.lam[:, :N]) == 0
        weight = np.where(2 * np.arange(1, N + 1) < n + 1, 2, 1)
        assert error(half.b, weight * full.b[:, :N]) < 1e-14
        if n % 2:
            assert (half.lam[:, -1] == -0.9).all() and (half.b[:, -1].imag == 0).all()
        assert error(answer(half, n), answer(full, n)) < 1e-13


def test_condition():
    """Of the matrix b -> t: √m, along constants; of the DFT, with t_n, 1: m |b|² = |t|² + (Σ t)²"""
    for n in (1, 2, 9, 32):
        lam = etsc.to_ssm(np.ones((1, n)), spectrum="full").lam[0]
        values = np.linalg.svd(lam ** np.arange(n)[:, None], compute_uv=False)
        assert error(values, np.append(np.full(n - 1, np.sqrt(n + 1)), 1)) < 1e-12
    t, off = np.random.default_rng(0).standard_normal((2, 4, 33))
    b = etsc.to_ssm(t, spectrum="full").b
    assert error(34 * (np.abs(b) ** 2).sum(axis=1), (t**2).sum(axis=1) + t.sum(axis=1) ** 2) < 1e-13
    moved = etsc.to_ssm(t + 1e-3 * off, spectrum="full").b - b
    assert error(moved, 1e-3 * etsc.to_ssm(off, spectrum="full").b) < 1e-10


@pytest.mark.parametrize("n", [100, 2047])
def test_float32_loses_no_more_than_rounding(n):
    """The limits of rounding, which λ in complex64 would be 20 times over at n = 2047"""
    t = np.random.default_rng(0).standard_normal((1, n)).astype("float32")
    for dtype, allowed in (("float32", 1.5e-6), ("float64", 2e-13)):
        system = etsc.to_ssm(t.astype(dtype))
        assert system.lam.dtype == "complex128" and system.b.dtype == backend.complex_dtype(dtype)
        k = answer(system, n)
        assert k.dtype == dtype
        assert np.linalg.norm(k - t) < allowed * np.linalg.norm(t)
        assert 0 < system.error[0] < allowed / 10


def test_horizon():
    rng = np.random.default_rng(0)
    t, x = rng.standard_normal((3, 20)), rng.standard_normal((2, 20, 3))
    for method in ({}, {"method": "hankel", "rank": 2}, {"method": "adam", "steps": 2, "rank": 3}):
        system = etsc.to_ssm(t, horizon=7, **method)
        same = etsc.to_ssm(t[:, :7], **method)
        assert system.horizon == 7 and (system.b == same.b).all()
        _, state = decode(system, x[:, :7])
        with pytest.raises(Error, match=r"position 7: .* for 7 positions; convert"):
            etsc.step(system, x[:, 7], state)
        with pytest.raises(Error, match=r"8 inputs: .* 7 positions"):
            etsc.prefill(system, x[:, :8], etsc.start(system, 2))
    with pytest.raises(Error, match="horizon=21, but 20 coefficients"):
        etsc.to_ssm(t, horizon=21)


def test_zero_coefficients():
    for method in ("exact", "hankel", "adam"):
        settings = {"rank": 2} if method == "hankel" else {"steps": 1} if method == "adam" else {}
        system = etsc.to_ssm(np.zeros((2, 9)), method=method, **settings)
        if method != "adam":
            assert (system.error == 0).all() and (answer(system, 9) == 0).all()
        assert np.isfinite(system.error).all() and np.isfinite(system.lam).all()


# Decoding


def systems():
    t = np.random.default_rng(0).standard_normal((3, 67))
    yield from (etsc.to_ssm(t, gamma, spectrum=f) for gamma in DECAYS for f in ("half", "full"))
    yield from (etsc.to_ssm(smooth(67), method="hankel", rank=7, hankel=form) for form in FORMS)
    yield etsc.to_ssm(t, 0.9, method="adam", steps=3, rank=5)


@pytest.mark.parametrize(
    "system", tuple(systems()), ids=lambda s: f"{s.method}-{s.form}-{s.lam.shape}"
)
def test_prefill_is_the_steps(system):
    rng = np.random.default_rng(1)
    for L in (1, 2, 64, 67):
        x = rng.standard_normal((2, L, 3))
        _, state = decode(system, x)
        ahead = etsc.prefill(system, x, etsc.start(system, 2))
        assert ahead["position"] == state["position"] == L
        assert ahead["u"].dtype == state["u"].dtype and ahead["u"].flags.c_contiguous
        assert error(ahead["u"], state["u"]) < 1e-11
    with pytest.raises(Error, match="at position 67; prefill takes a new one"):
        etsc.prefill(system, x[:, :1], ahead)


@pytest.mark.parametrize(
    "system", tuple(systems()), ids=lambda s: f"{s.method}-{s.form}-{s.lam.shape}"
)
def test_decoding_is_the_convolution(system, plain):
    x = np.random.default_rng(2).standard_normal((2, 67, 3))
    k = etsc.coefficients(system, 67)
    assert error(k, definition(system, 67)) < 1e-12
    y = np.stack([(k[:, : t + 1] * x[:, t::-1].mT).sum(axis=2) for t in range(67)], axis=1)
    assert error(decode(system, x)[0], y) < 1e-11
    assert error(plain(decode, system, x)[0], y) < 1e-11
    halfway = etsc.prefill(system, x[:, :40], etsc.start(system, 2))
    assert error(decode(system, x[:, 40:], halfway)[0], y[:, 40:]) < 1e-11


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 8), (5, 7, 131)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_twin_is_the_readable_form(shape, shared, dtype, plain):
    rng, (B, C, n) = np.random.default_rng(0), shape
    gamma = 0.9 if shared else rng.uniform(0.5, 1, C)
    system = etsc.to_ssm(rng.standard_normal((C, n)).astype(dtype), gamma)
    d = rng.standard_normal(C).astype(dtype)
    system, state = replace(system, d=d), etsc.start(system, B)
    state["u"] = state["u"] + rng.standard_normal((B, C, system.modes)).astype(dtype)
    x, before = rng.standard_normal((B, C)).astype(dtype), state["u"].copy()
    (y, after), (expected, other) = (f(etsc.step, system, x, state) for f in (_call, plain))
    assert y.dtype == expected.dtype == dtype and y.shape == (B, C)
    assert after["u"].dtype == other["u"].dtype == system.b.dtype
    allowed = {"float32": 1.3e-7, "float64": 1e-14}[dtype]
    assert error(y, expected) < allowed and error(after["u"], other["u"]) < allowed
    assert (state["u"] == before).all() and state["position"] == 0  # inputs are left as they are


def _call(f, *args):
    return f(*args)


def test_memory_order_of_the_inputs_matters_not(plain):
    rng = np.random.default_rng(0)
    t, x = rng.standard_normal((3, 10)), rng.standard_normal((2, 10, 3))
    for settings in ({}, {"method": "hankel", "rank": 3}):
        system = etsc.to_ssm(t, **settings)
        y, state = decode(system, x)
        for order in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]):
            other_t, other_x = order(t), order(x)
            other_t.flags.writeable = other_x.flags.writeable = False
            other = etsc.to_ssm(other_t, **settings)
            assert error(other.b, system.b) < 1e-13
            for run in (_call, plain):
                assert error(run(decode, system, other_x)[0], y) < 1e-13
            ahead = etsc.prefill(system, other_x, etsc.start(system, 2))
            assert error(ahead["u"], state["u"]) < 1e-11


def test_what_does_not_fit_gets_its_sentence():
    t = np.random.default_rng(0).standard_normal((3, 12))
    hole = t.copy()
    hole[1, 5] = np.nan
    for arguments, settings, sentence in (
        ((t + 0j,), {}, "t is complex128 .*; expected float32 or float64"),
        ((t.astype("float16"),), {}, "t is float16"),
        ((t[0],), {}, "expected .* \\(channels, n\\)"),
        ((t[:, :0],), {}, "expected .* \\(channels, n\\)"),
        ((hole,), {}, "not finite"),
        ((hole,), {"method": "hankel"}, "not finite"),
        ((t, 1.1), {}, "gamma: .* above 0 and up to 1"),
        ((t, 0.0), {}, "gamma"),
        ((t, [0.5, 0.6]), {}, "or 3 of them"),
        ((t, np.nan), {}, "gamma"),
        ((t,), {"horizon": 0}, "horizon=0: expected a whole number"),
        ((t,), {"horizon": 2.5}, "horizon=2.5"),
        ((t,), {"method": "prony"}, "method='prony' is not known"),
        ((t,), {"spectrum": "quarter"}, "spectrum='quarter'"),
        ((t,), {"hankel": "square"}, "hankel='square'"),
        ((t,), {"rank": 3}, "method='exact' takes no rank"),
        ((t,), {"tol": 0.1}, "method='exact' takes no tol"),
        ((t,), {"method": "adam", "tol": 0.1}, "method='adam' takes no tol"),
        ((t,), TRIANGLE | {"rank": 7}, "rank=7: expected 1 to 6 states"),
        ((t,), {"method": "hankel", "rank": 6}, "1 to 5 states"),
        ((t,), {"method": "hankel", "rank": 0}, "rank=0"),
        ((t,), {"method": "hankel", "tol": 0}, "tol=0"),
        ((t,), TRIANGLE | {"tol": 1e-9}, "1e-09 is not reached with 6 states: channel"),
        ((t,), {"method": "hankel", "tol": 1e-9, "rank": 2}, "not reached with 2 states"),
        ((t[:, :1],), {"method": "hankel"}, "1 coefficients are too few"),
        ((t,), {"method": "adam", "rank": 0}, "rank=0"),
        ((t,), {"method": "adam", "steps": 0}, "steps=0"),
        ((t.tolist(),), {}, "t is a list; expected an array"),
        ((t, "a"), {}, "gamma: .* above 0 and up to 1"),
        ((t, 1j), {}, "gamma: .* above 0 and up to 1"),
        ((t, [[0.5], [0.6, 0.7]]), {}, "gamma: .* above 0 and up to 1"),
        ((t,), {"method": "hankel", "tol": "a"}, "tol='a': expected a relative error"),
        ((t,), {"method": "hankel", "rank": True}, "rank=True: expected 1 to"),
        ((t,), {"method": "adam", "rank": True}, "rank=True: expected a whole number"),
        ((t,), {"horizon": True}, "horizon=True"),
        ((t,), {"method": "adam", "lr": -1}, "lr=-1: expected a learning rate"),
        ((t,), {"method": "adam", "lr": "a"}, "lr='a'"),
        ((t,), {"method": "adam", "lr": np.nan}, "lr=nan"),
        ((t,), {"method": "adam", "seed": -1}, "seed=-1: expected a whole number of at least 0"),
    ):
        with pytest.raises(Error, match=sentence):
            etsc.to_ssm(*arguments, **settings)
    system = etsc.to_ssm(t)
    for x in (np.zeros((2, 4)), np.zeros((1, 3)), np.zeros((2, 3), "float32"), np.zeros(3)):
        with pytest.raises(Error, match=r"this system and state take float64 \(2, 3\)"):
            etsc.step(system, x, etsc.start(system, 2))
        with pytest.raises(Error, match=r"this system and state take float64 \(2, (1|3|L), 3\)"):
            etsc.prefill(system, x[:, None], etsc.start(system, 2))
    with pytest.raises(Error, match=r"x is float64 \(2, 3\); .* \(2, L, 3\)"):
        etsc.prefill(system, np.zeros((2, 3)), etsc.start(system, 2))
    with pytest.raises(Error, match="no positions; prefill takes at least one"):
        etsc.prefill(system, np.zeros((2, 0, 3)), etsc.start(system, 2))


def test_cost():
    t = np.ones((2, 64), "float32")
    exact, own = etsc.cost(etsc.to_ssm(t)), etsc.cost(etsc.to_ssm(t, np.array([0.9, 0.8])))
    assert exact["states"] == 64 and exact["ring_states"] == 64 and exact["ring_bytes"] == 512
    assert exact["bytes"] == 32 * 24 and own["bytes"] == 32 * 40 and own["ring_operations"] == 128
    reduced = etsc.cost(etsc.to_ssm(smooth(64), method="hankel", rank=5))
    assert reduced["states"] == 5 and reduced["operations"] < exact["operations"] / 4


# Fewer states


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [120, 121])
def test_singular_values_are_those_of_the_dense_matrix(form, n, monkeypatch):
    """With a kernel of low rank, one of slowly falling values, a delay, whose values are all 1, and
    zeros"""
    rng, j = np.random.default_rng(0), np.arange(n)
    noise = rng.standard_normal(n) * 0.97**j
    t = np.stack([*smooth(n), noise, np.eye(1, n, 5)[0], 0 * j])
    large = hankel.decompose(t[:, 1:], form, 20)
    monkeypatch.setattr(hankel, "DENSE", 0)
    U, s, V, rest = hankel.decompose(t[:, 1:], form, 20)
    p, q = (n - 1, n - 1) if form == "triangle" else (n // 2, n - n // 2)
    assert U.shape == (6, p, 20) and V.shape == (6, q, 20) and s.shape == (6, 20)
    h = np.concatenate([t[:, 1:], np.zeros((6, n))], axis=1)
    H = h[:, np.arange(p)[:, None] + np.arange(q)]
    dense = np.linalg.svd(H, compute_uv=False)
    for c in range(6):
        assert np.abs(s[c] - dense[c, :20]).max() <= 1e-11 * dense[c, 0]
        assert np.abs(large[1][c] - dense[c, :20]).max() <= 1e-13 * dense[c, 0]
        for basis in (U[c], V[c]):
            assert np.abs(basis.T @ basis - np.eye(20)).max() < 1e-13
        assert np.abs(H[c] @ V[c] - U[c] * s[c]).max() <= 1e-8 * dense[c, 0]
        tail = dense[c, 20:].sum()
        assert tail <= rest[c] * (1 + 1e-9) + 1e-12 and abs(large[3][c] - tail) < 1e-10
    a, b = (hankel.lanczos(h[:, : p + q - 1], p, q, 20) for _ in range(2))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))


def test_the_basis_grows_until_the_values_are_right():
    """White noise, whose singular values lie close together"""
    h = np.random.default_rng(0).standard_normal((1, 600))
    s = hankel.lanczos(h, 300, 301, 20)[1][0]
    H = h[0][np.arange(300)[:, None] + np.arange(301)]
    dense = np.linalg.svd(H, compute_uv=False)[:20]
    assert np.abs(s - dense).max() < 1e-9 * dense[0]


def test_a_kernel_of_few_states_is_found():
    """Poles and residues come back, whatever the form, decay and length"""
    lam = np.array([0.9, -0.5, 0.8 * np.exp(0.7j), 0.95 * np.exp(2j)])
    amplitude = np.array([1.0, 0.4, 0.5 - 0.3j, 0.2j])
    for n in (30, 301, 800):
        t = (amplitude[:, None] * lam[:, None] ** np.arange(n)).sum(axis=0).real[None]
        t[0, 0] += 3.0
        for form in FORMS:
            for refit in (True, False):
                system = etsc.to_ssm(t, method="hankel", hankel=form, rank=6, refit=refit)
                assert system.form == form and system.states == [6]
                if form == "triangle" and n == 30:
                    continue  # its zeros beyond the horizon belong to another kernel
                assert system.modes == 4
                found = np.sort_complex(system.lam[0])
                assert error(found, np.sort_complex(lam)) < 1e-7
                assert error(system.b[0].sum(), amplitude.sum()) < 1e-7
                assert abs(system.d[0] - 3) < 1e-7 and system.error[0] < 1e-8
                assert error(answer(system, n), t) < 1e-7


@pytest.mark.parametrize("gamma", [None, 0.98])
def test_the_bounds_of_the_triangle_hold(gamma):
    """σ_{r+1} <= sup error <= 2 Σ_{k>r} σ_k, for balanced truncation of the truncated kernel"""
    t = np.concatenate([smooth(90), np.random.default_rng(0).standard_normal((1, 90))])
    for rank in (1, 2, 3, 7, 30):
        system = etsc.to_ssm(t, gamma, rank=rank, refit=False, **TRIANGLE)
        assert (system.reflected == 0).all() and (np.abs(system.lam) < 1).all()
        assert (system.states <= rank).all()
        assert (system.lower * (1 - 1e-9) <= system.sup_error).all()
        assert (system.sup_error <= system.bound).all()
        better = etsc.to_ssm(t, gamma, rank=rank, **TRIANGLE)
        assert (better.lam == system.lam).all() and (better.error <= system.error + 1e-12).all()
        assert (better.lower * (1 - 1e-9) <= better.sup_error).all()  # of any system of r states
        kernel = etsc.coefficients(better, 90)
        t_norm = np.linalg.norm(decayed(t, gamma), axis=1)
        off = np.linalg.norm(kernel - decayed(t, gamma), axis=1)
        assert np.abs(better.error - off / t_norm).max() < 1e-13


def test_sup_error_is_that_of_the_kernels():
    """Of the triangle on the kernel for ever, which here is one of 4,000 lags"""
    t = smooth(60)
    system = etsc.to_ssm(t, rank=5, **TRIANGLE)
    k = etsc.coefficients(system, 4000)
    k[:, :60] -= t
    spectrum = np.abs(np.fft.rfft(k, 240 * 20, axis=1)).max(axis=1)
    assert np.abs(spectrum / system.sup_error - 1).max() < 0.03
    system = etsc.to_ssm(t, method="hankel", rank=5, hankel="rectangle")
    spectrum = np.abs(np.fft.rfft(etsc.coefficients(system, 60) - t, 4800, axis=1)).max(axis=1)
    assert np.abs(spectrum / system.sup_error - 1).max() < 0.03


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [4, 5, 7, 12, 31])
def test_sup_error_of_short_kernels(n, form):
    t = np.random.default_rng(n).standard_normal((5, n))
    system = etsc.to_ssm(t, method="hankel", rank=1, hankel=form)
    k = etsc.coefficients(system, n if form == "rectangle" else 2000)
    k[:, :n] -= t
    spectrum = np.abs(np.fft.rfft(k, 1 << 17, axis=1)).max(axis=1)
    assert np.abs(system.sup_error / spectrum - 1).max() < 3e-4


def sparse():
    """Kernels whose A is nilpotent or defective, with ranks that are enough for them"""
    rng, j = np.random.default_rng(0), np.arange(200)
    for lag in range(2, 8):
        yield f"delay {lag}", np.eye(1, 40, lag), (lag, lag + 1, 17)
    yield "box", (j < 10)[None] * 1.0, (9, 10, 16, 32)
    yield "taps", np.append(rng.standard_normal((3, 8)), np.zeros((3, 56)), axis=1), (7, 16)
    yield "many taps", np.append(rng.standard_normal((3, 30)), np.zeros((3, 220)), axis=1), (29, 64)
    yield "5-fold pole", (j**4 * 0.8**j)[None], (5, 10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "name, t, ranks", tuple(sparse()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_kernels_without_eigenvectors(name, t, ranks, dtype, form):
    """Delays, filters of few taps, a pole of order 5: without perturbed poles, 0.3 to 1e4"""
    t, allowed = t.astype(dtype), {"float64": 3e-7, "float32": 2e-3}[dtype]
    for rank in ranks:
        system = etsc.to_ssm(t, method="hankel", rank=rank, hankel=form)
        assert (system.error < allowed).all() and (np.abs(system.lam) < 1).all()
        off = np.linalg.norm(answer(system, t.shape[1]) - t, axis=1) / np.linalg.norm(t, axis=1)
        assert (off < 2 * allowed).all()
        assert (system.sup_error < 30 * allowed * np.linalg.norm(t, axis=1)).all()


@pytest.mark.parametrize("form", FORMS)
def test_no_reduction_is_worse_than_none_at_all(form):
    """And more states are not worse than few, but for what perturbed poles lose"""
    rng, j = np.random.default_rng(1), np.arange(64.0)
    t = np.stack([j**3, j < 5, (j < 20) - 0.5, j == 9, j == 40, (j - 30) ** 2, 1.1**j, 1 / (1 + j)])
    t = np.concatenate([t, rng.standard_normal((2, 64)), rng.standard_normal((2, 64)) * (j < 12)])
    for dtype in ("float32", "float64"):
        own, best = t.astype(dtype), np.inf
        none = np.linalg.norm(own[:, 1:], axis=1) / np.linalg.norm(own, axis=1)
        for rank in (1, 2, 3, 5, 8, 13, 21, 31):
            found = etsc.to_ssm(own, method="hankel", rank=rank, hankel=form).error
            assert (found <= none * (1 + 1e-6)).all()
            assert (found <= 3 * best + 20 * np.sqrt(np.finfo(dtype).eps)).all()
            best = np.minimum(best, found)
    empty = hankel.none(t[0], np.dtype("float64"))
    assert empty[0].shape == empty[1].shape == (1,) and empty[2] == 0 and empty[4] == 1


def test_a_toeplitz_network_at_its_start_is_reduced():
    """Pieces of straight lines: poles twice at 1"""
    cfg = tnn.Config(d_model=16, act_type="relu", l_max=128, rpe_layers=1)
    params = tnn.operator_init(cfg, np.random.default_rng(0), "float64")
    t = tnn.kernels(params, cfg, 128)[0]
    for dtype, allowed in (("float64", 2e-5), ("float32", 3e-3)):
        system = etsc.to_ssm(t.astype(dtype), method="hankel", rank=32)
        assert (system.error < allowed).all() and (system.sup_error < 10 * allowed).all()
        triangle = etsc.to_ssm(t.astype(dtype), rank=32, **TRIANGLE)
        assert (triangle.error < 0.1).all()
        assert (triangle.sup_error <= triangle.bound + allowed).all()


def test_refit_of_a_sound_system_is_by_the_bound_alone():
    """Without refit the balanced system comes back, even where none at all is closer on average"""
    t = np.random.default_rng(0).standard_normal((40, 30))
    plain = etsc.to_ssm(t, rank=1, refit=False, **TRIANGLE)
    refit = etsc.to_ssm(t, rank=1, **TRIANGLE)
    none = np.linalg.norm(t[:, 1:], axis=1) / np.linalg.norm(t, axis=1)
    assert (plain.b[:, 0] != 0).all() and (plain.error > none).any() and (refit.error <= none).all()
    assert (plain.sup_error <= plain.bound).all()


@pytest.mark.parametrize("power", [-960, -600, 600, 1000])
def test_size_does_not_matter(power):
    """A power of 2, however small or large, stays one; errors are relative"""
    t = np.concatenate([smooth(40), np.random.default_rng(0).standard_normal((1, 40))])
    for settings in (
        {"gamma": 0.9},
        {"spectrum": "full"},
        {"method": "hankel", "rank": 4},
        TRIANGLE | {"rank": 4, "refit": False},
        {"method": "adam", "steps": 5, "rank": 8},
    ):
        one, other = (etsc.to_ssm(own, **settings) for own in (t, np.ldexp(t, power)))
        assert (one.lam == other.lam).all()
        expected, found = (own.b.view("float64") for own in (one, other))
        assert (np.ldexp(expected, power) == found).all()
        assert (one.error == other.error).all() and (one.error > 0).all()
        for name in ("d", "bound", "lower", "sup_error"):
            value = getattr(one, name)
            assert value is None or (np.ldexp(value, power) == getattr(other, name)).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_rank_of_a_tolerance_is_the_least(form):
    t = smooth(60)
    for tol in (0.3, 0.05) if form == "triangle" else (0.3, 0.01, 1e-6):
        system = etsc.to_ssm(t, method="hankel", tol=tol, hankel=form)
        rank = system.states.max()
        assert (system.error <= tol).all()
        for less in range(1, rank):
            assert etsc.to_ssm(t, method="hankel", rank=less, hankel=form).error.max() > tol
        same = etsc.to_ssm(t, method="hankel", rank=int(rank), hankel=form)
        assert (same.b == system.b).all()


def test_a_tolerance_asks_for_few_states_unless_told(monkeypatch):
    """Noise would end with the SVD of dense matrices"""
    t, asked = np.random.default_rng(0).standard_normal((1, 400)), []
    own = hankel.decompose
    monkeypatch.setattr(hankel, "MOST", 20)
    monkeypatch.setattr(hankel, "decompose", lambda h, f, k: asked.append(k) or own(h, f, k))
    with pytest.raises(Error, match="not reached with 20 states"):
        etsc.to_ssm(t, tol=0.5, **TRIANGLE)
    assert max(asked) <= 28
    with pytest.raises(Error, match="not reached with 30 states"):
        etsc.to_ssm(t, tol=0.5, rank=30, **TRIANGLE)


def test_a_large_rank_is_found_by_bisection(monkeypatch):
    t = np.random.default_rng(0).standard_normal((2, 70)) * 0.98 ** np.arange(70)
    least = etsc.to_ssm(t, tol=0.4, **TRIANGLE).states.max()
    monkeypatch.setattr(hankel, "LINEAR", 3)
    found = etsc.to_ssm(t, tol=0.4, **TRIANGLE)
    assert least > 6 and (found.error <= 0.4).all() and found.states.max() <= least + 2
    with pytest.raises(Error, match="not reached with 35 states"):
        etsc.to_ssm(t, tol=1e-3, **TRIANGLE)


def test_poles_outside_are_reflected_and_counted():
    """Growth, which no stable system has: the pole comes back inside, and the error says what it
    cost; on the circle, it moves by less than matters"""
    j = np.arange(40)
    growing = etsc.to_ssm(1.05 ** j[None], method="hankel", rank=1, hankel="rectangle")
    assert growing.reflected == [1] and abs(growing.lam[0, 0] - 1 / 1.05) < 1e-9
    assert growing.error[0] > 0.5
    for form in FORMS:
        system = etsc.to_ssm(np.cos(0.7 * j)[None], method="hankel", rank=2, hankel=form)
        assert (np.abs(system.lam) < 1).all()
        assert form == "triangle" or system.error[0] < 1e-12
    with pytest.raises(Error, match="not reached"):
        etsc.to_ssm(1.05 ** j[None], method="hankel", tol=0.1, hankel="rectangle")


def test_a_short_kernel_keeps_its_poles_off_zero():
    for dtype, allowed in (("float64", 1e-7), ("float32", 1e-3)):
        t = np.array([[2.0, 0.5] + 10 * [0.0]], dtype)
        for form in FORMS:
            system = etsc.to_ssm(t, method="hankel", rank=1, hankel=form)
            assert 0 < np.abs(system.lam[0, 0]) < allowed and system.d.dtype == dtype
            assert error(answer(system, 12), t) < allowed


def test_reduction_in_float32():
    t = smooth(200).astype("float32")
    for form in FORMS:
        system = etsc.to_ssm(t, method="hankel", rank=12, hankel=form)
        exact = etsc.to_ssm(t.astype("float64"), method="hankel", rank=12, hankel=form)
        assert (system.b.dtype, system.d.dtype) == ("complex64", "float32")
        off = np.linalg.norm(answer(system, 200) - t, axis=1) / np.linalg.norm(t, axis=1)
        assert (off < exact.error + 3e-6).all() and np.abs(off - system.error).max() < 3e-6


# Gradient descent


@pytest.mark.parametrize("readable", [False, True])
def test_gradients_of_the_vandermonde_product(readable, plain):
    rng = np.random.default_rng(0)
    z = -0.1 * rng.random((2, 5)) + 1j * rng.standard_normal((2, 5))
    arrays = {"b": rng.standard_normal((2, 5)) + 1j * rng.standard_normal((2, 5)), "z": z}

    def forward(arrays):
        return etsc.vandermonde_forward(arrays["b"], arrays["z"], 13)

    def backward(dk, cache):
        return dict(zip("bz", etsc.vandermonde_backward(dk, cache), strict=True))

    run = plain if readable else _call
    errors = run(gradcheck.check_pair, forward, backward, arrays)
    assert max(errors.values()) < gradcheck.TOLERANCE, errors
    k, _ = run(forward, arrays)
    exact = (arrays["b"][:, :, None] * np.exp(z[:, :, None] * np.arange(13))).sum(axis=1).real
    assert error(k, exact) < 1e-13


def test_gradients_of_what_adam_moves(plain):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((2, 5)) for name in ("radius", "angle")}
    arrays["b"] = rng.standard_normal((2, 5, 2))

    def forward(arrays):
        return etsc.polar_forward(arrays, 13)

    for run in (_call, plain):
        errors = run(gradcheck.check_pair, forward, etsc.polar_backward, arrays)
        assert max(errors.values()) < gradcheck.TOLERANCE, errors
    lam = np.exp(1j * arrays["angle"]) / (1 + np.exp(-arrays["radius"]))
    powers = lam[:, :, None] ** np.arange(13)
    b = arrays["b"][..., 0] + 1j * arrays["b"][..., 1]
    assert error(forward(arrays)[0], (b[:, :, None] * powers).sum(axis=1).real) < 1e-13


def test_adam_descends_and_repeats(plain):
    t = smooth(48)
    few, many = (etsc.to_ssm(t, 0.95, method="adam", steps=n, seed=3) for n in (10, 300))
    assert (many.error < 0.5 * few.error).all() and many.modes == 48
    assert (np.abs(many.lam) < 1).all() and (many.d == 0).all()
    off = np.linalg.norm(answer(many, 48) - decayed(t, 0.95), axis=1)
    assert error(off / np.linalg.norm(decayed(t, 0.95), axis=1), many.error) < 1e-10
    again = etsc.to_ssm(t, 0.95, method="adam", steps=10, seed=3)
    assert (again.b == few.b).all() and (again.lam == few.lam).all()
    assert (etsc.to_ssm(t, 0.95, method="adam", steps=10, seed=4).b != few.b).any()
    readable = plain(etsc.to_ssm, t, 0.95, method="adam", steps=10, seed=3)
    assert error(readable.b, few.b) < 1e-9
    assert etsc.to_ssm(t.astype("float32"), method="adam", steps=2, rank=4).b.dtype == "complex64"


# On the device


def test_nothing_leaves_the_device(plain):
    """Strict arrays refuse what CuPy refuses"""
    t, x = smooth(30), np.random.default_rng(0).standard_normal((2, 30, 3))
    for settings in (
        {"gamma": 0.9},
        {"spectrum": "full", "gamma": np.array([0.9, 0.8, 1.0])},
        {"method": "hankel", "rank": 4},
        {"method": "hankel", "tol": 0.1, "hankel": "rectangle"},
        {"method": "adam", "steps": 3},
    ):
        given = dict(settings)
        if np.ndim(settings.get("gamma")):
            given["gamma"] = backend.to_device(settings["gamma"], strict)
        system = plain(etsc.to_ssm, backend.to_device(t, strict), **given)
        expected = plain(etsc.to_ssm, t, **settings)
        for name, value in vars(expected).items():
            if isinstance(value, np.ndarray):
                own = getattr(system, name)
                assert backend.array_module(own) is strict, name
                assert error(backend.to_host(own), value) < 1e-9, name
        inputs = backend.to_device(x, strict)
        state = plain(etsc.prefill, system, inputs[:, :20], etsc.start(system, 2))
        y, _ = plain(etsc.step, system, inputs[:, 20], state)
        ahead = plain(etsc.prefill, expected, x[:, :20], etsc.start(expected, 2))
        assert error(backend.to_host(y), plain(etsc.step, expected, x[:, 20], ahead)[0]) < 1e-9
        assert etsc.cost(system) == etsc.cost(expected)


# The published form


def test_golden(plain):
    case = cases.read_case(GOLDEN)
    for rows in (cases.verify(case), plain(cases.verify, case)):
        assert {row.tensor for row in rows} == {"out.theta", "out.b"}
        assert all(row.ok and row.allowed == 1e-9 for row in rows), rows


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_solve_solves(n):
    """b_0 = 0, and Σ_k b_k exp(θ_k j) = t_j in the published layout"""
    t = np.random.default_rng(n).standard_normal((n, 4))
    theta, b = etsc.solve(t)
    assert theta.shape == (1, n, 1) and b.shape == (n + 1, 4) and (b[0] == 0).all()
    k = (b[1:, None] * np.exp(theta[0] * np.arange(n))[:, :, None]).sum(axis=0)
    assert error(k, t) < 1e-12
    theta, b = etsc.solve(t.astype("float32"))
    assert theta.dtype == b.dtype == "complex64"


def test_the_checks_of_cases_find_what_is_wrong():
    case = cases.make_case("etsc", "solve", {"d_model": 3}, L=7)
    assert set(case.tensors) == {"in.t", "out.theta", "out.b"}
    assert case.tensors["in.t"].shape == (7, 3)
    assert all(row.ok for row in cases.verify(case))
    off = case.tensors | {"out.b": case.tensors["out.b"] + 1e-6}
    rows = {row.tensor: row.ok for row in cases.verify(replace(case, tensors=off))}
    assert rows == {"out.theta": True, "out.b": False}
    without = {n: t for n, t in case.tensors.items() if n != "in.t"}
    for changed, sentence in (
        ({"tensors": without}, "in.t is missing"),
        ({"tensors": case.tensors | {"param.t": off["in.t"]}}, "param.t is nothing that"),
        ({"tensors": case.tensors | {"dout.b": off["out.b"]}}, "dout.b is nothing that"),
        ({"tensors": case.tensors | {"in.t": off["in.t"] * np.inf}}, "not finite"),
        ({"tensors": case.tensors | {"in.t": off["in.t"][0]}}, r"expected \(n, d\)"),
        ({"part": "mixer"}, "etsc has no part 'mixer'; it has: solve"),
        ({"settings": {"order": 2}}, "the setting 'order' is not one of etsc's"),
        ({"settings": {"d_model": "3"}}, "d_model='3'"),
    ):
        with pytest.raises(Error, match=sentence):
            cases.verify(replace(case, **changed))
    with pytest.raises(Error, match="an initial state"):
        cases.make_case("etsc", "solve", {}, initial_state=True)


def test_every_model_of_cases_is_known_to_the_command_line():
    from ref import __main__, network

    assert set(__main__.CASE_MODELS) == {*network.MODELS, *cases.ALIASES, *cases.OWN}


def test_case_command(tmp_path, capsys):
    path = str(tmp_path / "c.safetensors")
    made = ("case", "--model", "etsc", "--part", "solve", "-L", "13", "--d-model", "5", "-o", path)
    assert _command(*made, "--precision", "float32") == 0
    assert cases.read_case(path).tensors["in.t"].shape == (13, 5)
    assert _command("verify", path) == 0 and "2 of 2 tensors agree" in capsys.readouterr().out
    assert _command("case", "--model", "etsc", "--part", "mixer", "-o", path) == 1


def _command(*arguments):
    from ref import __main__
    from ref.options import run_command

    with pytest.MonkeyPatch.context() as m:
        m.setattr("sys.argv", ["ref", *arguments])  # where the options of a model are looked for
        return run_command(__main__.main, list(arguments), "python -m ref")


# The benchmark


@pytest.mark.parametrize("what", ["conversion", "decode"])
def test_bench(what, tmp_path, capsys):
    path = tmp_path / "etsc.png"
    assert _command("bench", "etsc", "--quick", "--what", what, "-o", str(path)) == 0
    out, results = capsys.readouterr().out, json.loads(path.with_suffix(".json").read_text())
    assert "threads" in out and results["what"] == what and results["quick"]
    if what == "conversion":
        assert out.count("hankel, rectangle") == 4 and "decoded to its end" in out
        rows = results["by_n"] + results["by_width"]
        assert {row["method"] for row in rows} == set(bench_etsc.METHODS)
        assert all(row["smooth"] < 1e-13 for row in rows if row["method"] == "exact")
        assert out.count("adam, always 20 steps, n modes or 16") == 2
        assert {row["steps"] for row in rows if row["method"] == "adam"} == {20}
        errors = {n: v[-1] for n, v in results["growth"].items() if n != "position"}
        assert errors["float64"] < 1e-12 < errors["float32"] < 5e-6
        assert errors["float32, λ complex64"] > 2 * errors["float32"]
    else:
        assert out.count("ring buffer") == out.count("FFT of the whole prefix") == 5
        assert {row["form"] for row in results["rows"]} >= {"exact system", "system of 8 states"}
        held = {r["bytes"] for r in results["rows"] if r["form"] == "exact system"}
        assert len(held) == 1
    if importlib.util.find_spec("matplotlib"):
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert _command("bench", "hope", "--quick") == 2
    assert _command("bench", "etsc", "hope") == 2
    assert _command("bench", "etsc", "-o", str(tmp_path / "none" / "x.png")) == 1


def test_forms_of_decoding_agree():
    """What `bench etsc --what decode` times gives the same outputs"""
    t = bench_etsc.kernels(5, 200).astype("float32")
    x = np.random.default_rng(0).standard_normal((1, 200, 5)).astype("float32")
    system = etsc.to_ssm(t)
    for position in (0, 1, 100, 190):
        calls = (
            bench_etsc.prefix(t, x, position)[0],
            bench_etsc.ring_buffer(t, x, position)[0],
            bench_etsc.recurrence(system, x, position)[0] if position else None,
        )
        expected = (t[:, : position + 1] * x[0, position::-1].T).sum(axis=1)
        for call in filter(None, calls):
            assert error(call().reshape(-1), expected) < 2e-6
