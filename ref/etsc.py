"""ETSC.  Qin, Zhong: Accelerating Toeplitz Neural Network with Constant-time Inference Complexity,
EMNLP 2023, arXiv 2311.08756.

A long convolution with known coefficients becomes a diagonal linear recurrence, which decodes at
constant time and memory per token:

    u_i = λ u_{i-1} + b x_i,  y_i = Re Σ_k u_ik + d x_i              the system                  (1)
    k_j = Re Σ_k b_k λ_k^j + d [j = 0]                               its kernel                  (2)
    k_j = γ^j t_j, j = 0..n-1                                        what is asked of it         (3)
    λ_k = γ exp(-2πik/m), m = n + 1, k = 1..n                        the paper's answer, a DFT   (4)
    b_k = 1/m Σ_{j<=n} t_j exp(2πijk/m), t_n = -Σ_{j<n} t_j, d = 0
    k = 1..floor(m/2) alone, with 2 b_k, and b_{m/2} as it is        half of it: t is real       (5)
    λ and b from r singular triples of t's Hankel matrix             fewer states: ref.hankel    (6)

    letter  shape             what                C channels, n coefficients, N modes, B batch
    t       (C, n)            coefficients, a row for each channel
    γ       one or (C,)       decay
    λ, b    (C or 1, N), (C, N)
    d       (C,)              direct term
    u       (B, C, N)         state

The exact system is right for n lags and no more: its kernel at lag n is -γ^n Σ_j t_j, and from lag
m on it repeats, times γ^m. So a System has a horizon, and refuses to go beyond. It costs O(n) a
token and channel, as a ring buffer of the last n inputs does (`cost` has both); (6) is what is
cheaper. The matrix λ_k^j, j = 0..n-1, has singular values √m and, for constant t alone, 1: rounding
grows by at most √m, for kernels with a large sum. Only with t_n is it a DFT, of condition 1.

λ is complex128 even where t, b and u are of float32. Rounded to complex64, its error counts j times
in λ^j: decoded at n = 8192, white noise for t, |k - t| / |t| is 1.3e-4 instead of some 1e-6.

Differences from the published code (ETSC-Exact-Toeplitz-to-SSM-Conversion): half of the modes,
unless spectrum="full", which is the form of `solve`; exp(2πijk/m) by jk modulo m, where exp(θ_k j)
loses a digit; the horizon; (6). What the paper compares with, gradient descent, is method="adam":
its radius goes through a sigmoid, its angles begin at random.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ref import Error, optim, ssm
from ref import hankel as reduction
from ref.backend import (
    array_module,
    check_choice,
    complex_dtype,
    item,
    rfft,
    to_device,
    to_host,
    twins,
)
from ref.hankel import powers

BLOCK = 64  # lags at once
TABLE = 1 << 22  # elements of a table of powers


@dataclass(frozen=True, eq=False)
class System:
    """The recurrence (1) of C channels; `step` refuses positions from `horizon` on."""

    lam: object  # (C or 1, N) complex128
    b: object  # (C, N) complex
    d: object  # (C,) real
    horizon: int
    method: str  # exact, hankel, adam
    form: str = ""  # of exact: half, full; of hankel: triangle, rectangle
    gamma: object = None  # (C or 1, 1); where it is given, λ is as (4) says
    error: object = None  # (C,) |k - t| / |t| over the horizon, of the numbers stored here
    bound: object = None  # (C,) 2 Σ_{k>r} σ_k, or more where not all are known; of hankel
    lower: object = None  # (C,) σ_{r+1}; as is what follows
    sup_error: object = None  # (C,) the largest difference of the transfer functions
    reflected: object = None  # (C,) poles that were found on the unit circle or outside

    @property
    def modes(self):
        """Entries of the state of one channel."""
        return self.lam.shape[1]

    @property
    def states(self):
        """(C,) real numbers in the state of each channel: two of a complex mode, one of a real."""
        xp = array_module(self.lam)
        numbers = xp.where(self.lam.imag == 0, 1, 2) * (self.lam != 0)
        return xp.broadcast_to(numbers.sum(axis=1), self.d.shape)


def to_ssm(
    t,
    gamma=None,
    method="exact",
    horizon=None,
    rank=None,
    tol=None,
    spectrum="half",
    hankel="rectangle",
    refit=True,
    steps=2000,
    lr=0.02,
    seed=0,
):
    """A recurrence with the kernel γ^j t_j, j < horizon.   t (C, n) real -> System

    horizon: n unless less. exact: (4), or half of it (5), by spectrum. hankel: (6), of a triangle
    or a rectangle, with `rank` real states (32), or the least that have an error of at most `tol`
    in every channel (then `rank` is the most, 256 unless given); refit as in ref.hankel.fit. adam:
    `rank` complex modes (n), `steps` of Adam at rate lr, falling to 0.
    Error: t not real, not (C, n), not finite; γ outside (0, 1]; horizon beyond n; tol not reached.
    """
    check_choice("method", method, ("exact", "hankel", "adam"))
    check_choice("spectrum", spectrum, ("half", "full"))
    check_choice("hankel", hankel, ("triangle", "rectangle"))
    t, gamma = _checked(t, gamma, horizon)
    size = _size(t)
    t = t / size
    if (method == "exact" and rank is not None) or (method != "hankel" and tol is not None):
        raise Error(f"method={method!r} takes no {'rank' if tol is None else 'tol'}.")
    if method == "exact":
        system = _exact(t, gamma, spectrum)
    elif method == "adam":
        modes = _whole(t.shape[1] if rank is None else rank, "rank")
        if not (isinstance(lr, (int, float, np.number)) and 0 < lr < math.inf):
            raise Error(f"lr={lr!r}: expected a learning rate, a number above 0.")
        seed = _whole(seed, "seed", 0)
        system = _adam(_decayed(t, gamma), t.dtype, modes, _whole(steps, "steps"), lr, seed)
    else:
        system = _reduced(_decayed(t, gamma), t.dtype, rank, tol, hankel, refit)
    return _of_size(system, size, _decayed(t, gamma))


def _checked(t, gamma, horizon):
    """t up to the horizon, γ (C or 1, 1)"""
    if not hasattr(t, "dtype"):
        raise Error(
            f"t is a {type(t).__name__}; expected an array, float32 or float64 (channels, n)."
        )
    xp = array_module(t)
    if t.ndim != 2 or 0 in t.shape or t.dtype.name not in ("float32", "float64"):
        raise Error(f"t is {t.dtype} {tuple(t.shape)}; expected float32 or float64 (channels, n).")
    horizon = t.shape[1] if horizon is None else _whole(horizon, "horizon")
    if horizon > t.shape[1]:
        raise Error(
            f"horizon={horizon}, but {t.shape[1]} coefficients are given: what comes after them is "
            "not known; compute more."
        )
    try:
        gamma = xp.asarray(1.0 if gamma is None else gamma, dtype="float64").reshape(-1, 1)
        known = len(gamma) in (1, len(t)) and item(((gamma > 0) & (gamma <= 1)).all())
    except (TypeError, ValueError):  # not a number
        known = False
    if not known:
        raise Error(f"gamma: expected a number above 0 and up to 1, or {len(t)} of them.")
    if not item(xp.isfinite(t[:, :horizon]).all()):
        raise Error("t has values that are not finite.")
    return t[:, :horizon], gamma


def _whole(value, name, least=1):
    if not (reduction.is_whole(value) and value >= least):
        raise Error(f"{name}={value!r}: expected a whole number of at least {least}.")
    return int(value)


def _size(t):
    """Powers of 2, t / size being at most 2: the squares of it are no zeros and not infinite

    t (C, n) -> (C, 1)
    """
    xp = array_module(t)
    exponents = np.frexp(to_host(xp.abs(t).max(axis=1, keepdims=True)))[1]
    return to_device(np.ldexp(t.dtype.type(1), exponents - 1), xp)


def _decayed(t, gamma):
    """γ^j t_j in float64"""
    return t.astype("float64") * gamma ** array_module(t).arange(t.shape[1], dtype="float64")


# The exact system


def roots(k, m):
    """exp(-2πi k/m) to rounding.   k integers, 0 <= k <= m -> complex128, on the host

    Whole quarters of the circle are taken off in integers, so that the angle is at most π/4.
    """
    quarter = (8 * k + m) // (2 * m)
    rest = np.exp(-0.5j * np.pi * (4 * k - quarter * m) / m)
    return rest * np.array([1, -1j, -1, 1j])[quarter % 4]


def _exact(t, gamma, spectrum):
    """(4), (5).   t (C, n), γ (C or 1, 1) -> System"""
    xp, n = array_module(t), t.shape[1]
    m, wide = n + 1, t.astype("float64")
    wide = xp.concatenate([wide, -wide.sum(axis=1, keepdims=True)], axis=1)
    if spectrum == "half":
        b = rfft(wide, m, 1)[:, 1:].conj() / m
        b = b * to_device(np.where(2 * np.arange(1, b.shape[1] + 1) < m, 2.0, 1.0), xp)
    else:
        b = xp.fft.ifft(wide, axis=1)[:, 1:]
    lam = gamma * to_device(roots(np.arange(1, b.shape[1] + 1), m), xp)
    b, d = b.astype(complex_dtype(t.dtype)), xp.zeros(len(t), dtype=t.dtype)
    return System(lam, b, d, n, "exact", form=spectrum, gamma=gamma)


def _of_size(system, size, t):
    """The System of t, times size, and |k - t| / |t| of it; where t is zero, |k|"""
    xp, own = array_module(t), {"b": system.b * size}
    for name in ("d", "bound", "lower", "sup_error"):
        value = getattr(system, name)
        own[name] = None if value is None else value * size[:, 0]
    system = replace(system, **own)
    off, norm = coefficients(system, t.shape[1]) / size - t, xp.sqrt((t * t).sum(axis=1))
    error = xp.sqrt((off * off).sum(axis=1)) / xp.where(norm == 0, 1, norm)
    return replace(system, error=error)


def solve(t):
    """(4) as published, without γ.   t (n, d) -> theta (1, n, 1) = log λ, b (n+1, d), b[0] = 0"""
    n, xp = len(t), array_module(t)
    system = _exact(t.T, xp.ones((1, 1), dtype="float64"), "full")
    theta = -2j * np.pi / (n + 1) * xp.arange(1, n + 1, dtype=t.dtype)
    none = xp.zeros((1, t.shape[1]), dtype=system.b.dtype)
    return theta.astype(system.b.dtype)[None, :, None], xp.concatenate([none, system.b.T])


# Decoding, and the way back


def start(system, batch):
    """The state before the first input: u (B, C, N) zeros, at position 0"""
    u = array_module(system.b).zeros((batch, *system.b.shape), dtype=system.b.dtype)
    return {"u": u, "position": 0}


def step(system, x_t, state):
    """(1).   x_t (B, C) -> y_t (B, C), state.   Error: the state is at the horizon"""
    position, u = state["position"], state["u"]
    if position >= system.horizon:
        raise Error(
            f"position {position}: the kernel of this system holds for {system.horizon} positions; "
            "convert for a longer horizon."
        )
    _check(system, x_t, u.shape[:2])
    if twin := twins("etsc", u):
        y, u = twin.step(system.lam, system.b, system.d, x_t, u)
    else:
        x = x_t.astype("float64")
        wide = system.lam * u + system.b * x[:, :, None]
        y = (wide.real.sum(axis=2) + system.d * x).astype(x_t.dtype)
        u = wide.astype(u.dtype)
    return y, {"u": u, "position": position + 1}


def _check(system, x, shape):
    if x.shape != shape or x.dtype != system.d.dtype:
        raise Error(
            f"x is {x.dtype} {tuple(x.shape)}; this system and state take {system.d.dtype} "
            f"({', '.join(map(str, shape))})."
        )


def prefill(system, x, state):
    """u_L = Σ_j λ^{L-1-j} b x_j in one pass, of an exact system one DFT.   x (B, L, C) -> state

    Error: the state is not a new one; L is beyond the horizon.
    """
    u, L = state["u"], x.shape[1] if x.ndim == 3 else None
    _check(system, x, (len(u), "L" if L is None else L, u.shape[1]))
    if state["position"] != 0:
        raise Error(f"the state is at position {state['position']}; prefill takes a new one.")
    if L == 0:
        raise Error("x has no positions; prefill takes at least one. `start` is the state before.")
    if system.horizon < L:
        raise Error(
            f"{L} inputs: the kernel of this system holds for {system.horizon} positions; "
            "convert for a longer horizon."
        )
    sums = _power_sums(system.lam, x) if system.gamma is None else _circle_sums(system, x)
    u = array_module(u).ascontiguousarray((system.b * sums).astype(u.dtype))
    return {"u": u, "position": L}


def _circle_sums(system, x):
    """Σ_j λ^{L-1-j} x_j, λ by (4).   -> (B, C, N)"""
    xp, m = array_module(x), system.horizon + 1
    weights = system.gamma.T ** xp.arange(x.shape[1], dtype="float64")[:, None]
    latest_first = x[:, ::-1] * weights
    if system.form == "half":
        sums = rfft(latest_first, m, 1)
    else:
        sums = xp.fft.fft(latest_first, m, axis=1)
    return sums[:, 1:].transpose(0, 2, 1)


def _power_sums(lam, x):
    """Σ_j λ^{L-1-j} x_j, any λ, a block of j at a time.   -> (B, C, N)"""
    xp, (B, L, C), W = array_module(x), x.shape, _block(lam)
    table, jump = powers(lam, W)
    table = table[:, :, ::-1].transpose(0, 2, 1)  # (C or 1, W, N)
    sums = xp.zeros((C, B, lam.shape[1]), dtype="complex128")
    x = x.astype("float64").transpose(2, 0, 1)
    x = xp.concatenate([xp.zeros((C, B, -L % W), dtype="float64"), x], axis=2)
    for first in range(0, x.shape[2], W):
        sums = sums * jump[:, None] + x[:, :, first : first + W] @ table
    return sums.transpose(1, 0, 2)


def coefficients(system, n):
    """The kernel (2), also beyond the horizon.   -> k (C, n) float64"""
    xp, (C, N) = array_module(system.b), system.b.shape
    if system.gamma is not None:
        m, j = system.horizon + 1, xp.arange(n)
        b = xp.zeros((C, m), dtype="complex128")
        b[:, 1 : N + 1] = system.b
        k = xp.fft.fft(b, axis=1).real[:, j % m] * system.gamma ** j.astype("float64")
    else:
        k = _kernel(system.lam, system.b, n)
    return xp.concatenate([k[:, :1] + system.d[:, None], k[:, 1:]], axis=1)


def _kernel(lam, b, n):
    """Re Σ_k b_k λ_k^j, a block of j at a time.   -> (C, n)"""
    xp, W = array_module(b), _block(lam)
    table, jump = powers(lam, W)
    anchor, blocks = b.astype("complex128"), []
    for _ in range(0, n, W):
        blocks.append((anchor[:, None] @ table)[:, 0].real)
        anchor = anchor * jump
    return xp.concatenate(blocks, axis=1)[:, :n]


def _block(lam):
    """How many lags at once: a power of 2, such that the table of powers is of TABLE elements"""
    return 1 << (min(BLOCK, max(1, TABLE // lam.size)).bit_length() - 1)


def cost(system):
    """Of a token and channel: {"states": numbers kept, "operations", "bytes" moved}, and the same
    with ring_ in front, of a ring buffer of the last `horizon` inputs and their coefficients"""
    number, N, n = system.d.dtype.itemsize, system.modes, system.horizon
    own = 16 if len(system.lam) > 1 else 0  # of λ; one for all channels stays in the cache
    ours = {"states": item(system.states.max()), "operations": 11 * N + 2}
    ours["bytes"] = N * (6 * number + own)  # u is read and written, b read
    return ours | {"ring_states": n, "ring_operations": 2 * n, "ring_bytes": 2 * n * number}


# Fewer states


def _reduced(t, dtype, rank, tol, form, refit):
    """(6).   t (C, n) float64 -> System"""
    xp = array_module(t)
    *arrays, results = reduction.reduce(t, dtype, rank, tol, form, refit)
    results = {name: to_device(a, xp) for name, a in results.items()}
    arrays = (to_device(a, xp) for a in arrays)
    return System(*arrays, t.shape[1], "hankel", form=form, **results)


# Gradient descent


def vandermonde_forward(b, z, L):
    """k_j = Re Σ_k b_k exp(z_k j).   b, z (C, N) -> k (C, L)"""
    if twin := twins("s4d", z):
        return twin.vandermonde_forward(0.5 * b[None], z, L)[0], (b, z, L)
    powers = array_module(z).exp(z[:, :, None] * array_module(z).arange(L, dtype=z.real.dtype))
    return (b[:, None] @ powers)[:, 0].real, (b, z, L, powers)


def vandermonde_backward(dk, cache):
    """dk (C, L) -> db, dz.   From ∂exp(z j)/∂z = j exp(z j)"""
    b, z, L, *table = cache
    if twin := twins("s4d", z):
        db, dz = twin.vandermonde_backward(dk[None], 0.5 * b[None], z)
        return 0.5 * db[0], dz
    j, (powers,) = array_module(z).arange(L, dtype=z.real.dtype), table
    conjugate = powers.conj()
    slope = (conjugate @ (j * dk)[:, :, None])[:, :, 0]
    return (conjugate @ dk[:, :, None])[:, :, 0], b.conj() * slope


def polar_forward(params, L):
    """log λ = log sigmoid(radius) + i angle, b as (re, im).   -> k (C, L)"""
    xp, b = array_module(params["b"]), ssm.as_complex(params["b"])
    log_radius = -xp.logaddexp(0, -params["radius"])
    k, cache = vandermonde_forward(b, log_radius + 1j * params["angle"], L)
    return k, (log_radius, cache)


def polar_backward(dk, cache):
    """dk (C, L) -> grads of radius, angle (C, N), b (C, N, 2)"""
    log_radius, cache = cache
    db, dz = vandermonde_backward(dk, cache)
    dradius = -array_module(dk).expm1(log_radius) * dz.real
    return {"radius": dradius, "angle": dz.imag, "b": ssm.as_pairs(db)}


def _adam(t, dtype, N, steps, lr, seed):
    """The mean squared error of t at unit RMS, in steps of Adam.   t (C, n) -> System"""
    xp, (C, n), rng = array_module(t), t.shape, np.random.default_rng(seed)
    rms = xp.sqrt((t * t).mean(axis=1, keepdims=True))
    rms = xp.where(rms == 0, 1, rms)
    params = {
        "radius": rng.uniform(0, math.log(n + 1), (C, N)),  # time constants of 2 to n
        "angle": rng.uniform(-math.pi, math.pi, (C, N)),
        "b": rng.standard_normal((C, N, 2)) / N,
    }
    params = {name: to_device(p, xp) for name, p in params.items()}
    moments, groups = optim.adamw_init(params), {name: optim.Group(lr) for name in params}
    for i in range(1, steps + 1):
        k, cache = polar_forward(params, n)
        grads = polar_backward(2 / n * (k - t / rms), cache)
        scale = optim.warmup_cosine(i, steps, 0)
        optim.adamw_update(params, grads, moments, i, groups, scale)
    lam = xp.exp(-xp.logaddexp(0, -params["radius"]) + 1j * params["angle"])
    b = (rms * ssm.as_complex(params["b"])).astype(complex_dtype(dtype))
    return System(lam, b, xp.zeros(C, dtype=dtype), n, "adam")


# Cases

CASE_PARTS = {"solve": ()}


@dataclass(frozen=True)
class Config:
    """What a case of `solve` is drawn with."""

    d_model: int = 8


def config_of(settings, tensors, part):
    """The Config of a case"""
    t = tensors.get("in.t")
    return Config(**settings) if t is None or t.ndim != 2 else Config(t.shape[1])


def case_sources(part, cfg, B, L, rng):
    """A random case's in.t (n, d), n = L"""
    if cfg.d_model < 1:
        raise Error(f"d_model={cfg.d_model}: at least 1.")
    return {"in.t": rng.standard_normal((L, cfg.d_model))}


def case_results(part, cfg, params, inputs, douts):
    """`solve`, complex numbers as (re, im)"""
    if inputs["t"].ndim != 2 or 0 in inputs["t"].shape:
        raise Error(f"in.t has the shape {inputs['t'].shape}; expected (n, d).")
    theta, b = solve(inputs["t"])
    return {"out.theta": ssm.as_pairs(theta), "out.b": ssm.as_pairs(b)}
