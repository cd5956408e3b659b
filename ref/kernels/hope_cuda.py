"""Launchers of hope.cu, with the signatures and meaning of ref/kernels/hope.py."""

import math

from ref.backend import array_module, complex_dtype
from ref.kernels import cuda

CHUNK = 64  # nodes that one thread adds up; n when that is more, so that the parts are O(D (J + n))


# The sampling runs in float64 whatever the precision outside, as the Numba twin's does.


def _tables(log_dt, L, J):
    """dt (D,), and cosine and sine of the half angles (J,), float64"""
    xp = array_module(log_dt)
    half = xp.arange(J, dtype="float64") * (math.pi / L)
    return xp.exp(log_dt.astype("float64")), xp.cos(half), xp.sin(half)


def _complex128(x):
    return x.astype("complex128", order="C", copy=False)


def sample_forward(h, log_dt, L, J):
    """h (D, n), log_dt (D,) -> g (D, J): see ref.hope.sample_forward"""
    (D, n), xp, launch = h.shape, array_module(h), cuda.launcher("hope", "float64")
    g = xp.empty((D, J), dtype="complex128")
    launch("sample_forward", D * J, D, J, n, _complex128(h), *_tables(log_dt, L, J), g)
    return g.astype(complex_dtype(log_dt.dtype), copy=False)


def sample_backward(dg, h, log_dt, L, J):
    """dg (D, J) -> dh (D, n) complex, dlog_dt (D,): see ref.hope.sample_backward"""
    (D, n), xp, launch = h.shape, array_module(h), cuda.launcher("hope", "float64")
    chunk = max(CHUNK, n)
    chunks = -(-J // chunk)
    arrays = _complex128(dg), _complex128(h), *_tables(log_dt, L, J)
    parts = xp.empty((n, D, chunks), dtype="complex128"), xp.empty((D, chunks), dtype="float64")
    launch("sample_backward", D * chunks, D, J, n, chunk, *arrays, *parts)
    dh, dlog_dt = xp.empty((D, n), dtype="complex128"), xp.empty(D, dtype="float64")
    launch("sample_backward_sum", D * (n + 1), D, n, chunks, *parts, dh, dlog_dt)
    dtype = log_dt.dtype
    return dh.astype(complex_dtype(dtype), copy=False), dlog_dt.astype(dtype, copy=False)


def _pole(log_dt):
    return -array_module(log_dt).tanh(0.5 * log_dt.astype("float64"))


def ladder_forward(h, log_dt, L):
    """h (D, n) real, log_dt (D,) -> k (D, L): see ref.hope.ladder_forward"""
    (D, n), xp = h.shape, array_module(h)
    states, k = xp.zeros((n, D), dtype="float64"), xp.empty((D, L), dtype=h.dtype)
    h = xp.ascontiguousarray(h)
    launch = cuda.launcher("hope", log_dt.dtype.name)
    launch("ladder_forward", D, D, L, n, h, _pole(log_dt), states, k)
    return k


def ladder_backward(dk, h, log_dt, L):
    """dk (D, L) -> dh (D, n), dlog_dt (D,): see ref.hope.ladder_backward"""
    (D, n), xp, a = h.shape, array_module(h), _pole(log_dt)
    states, dh = xp.zeros((n, D), dtype="float64"), xp.zeros((n, D), dtype="float64")
    da = xp.empty(D, dtype="float64")
    dk, h = xp.ascontiguousarray(dk), xp.ascontiguousarray(h)
    launch = cuda.launcher("hope", log_dt.dtype.name)
    launch("ladder_backward", D, D, L, n, dk, h, a, states, dh, da)
    return dh.T.astype(h.dtype, order="C"), (da * (-0.5 * (1 - a * a))).astype(log_dt.dtype)
