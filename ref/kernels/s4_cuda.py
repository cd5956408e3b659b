"""Launchers of s4.cu, with the signatures and meaning of ref/kernels/s4.py."""

import math

from ref.backend import array_module
from ref.kernels import cuda

CHUNK = 64  # nodes that one thread adds up; n when that is more, so that the parts are O(D (J + n))


def _complex128(x):
    return x.astype("complex128", order="C", copy=False)


def _tables(xp, L):
    """cos θ/2 and sin θ/2 (J,), float64, exact at θ = π"""
    half = xp.arange(L // 2 + 1, dtype="float64") * (math.pi / L)
    c, s = xp.cos(half), xp.sin(half)
    if L % 2 == 0:
        c[-1] = 0
    return c, s


def cauchy_forward(v, a, L):
    """v (S, D, n), a (D, n) -> R (S, D, L//2+1): see ref.s4.cauchy_forward"""
    (S, D, n), J, xp, launch = v.shape, L // 2 + 1, array_module(a), cuda.launcher("s4", "float64")
    R = xp.empty((S, D, J), dtype="complex128")
    arrays = _complex128(v), _complex128(a), *_tables(xp, L)
    launch("cauchy_forward", D * J, S, D, n, J, *arrays, R)
    return R.astype(a.dtype, copy=False)


def cauchy_backward(dR, v, a, L):
    """dR (S, D, J) -> dv (S, D, n), da (D, n): see ref.s4.cauchy_backward"""
    (S, D, n), J, xp, launch = v.shape, L // 2 + 1, array_module(a), cuda.launcher("s4", "float64")
    chunk = max(CHUNK, n)
    chunks = -(-J // chunk)
    parts = xp.empty((chunks, 2 * S + 2, D, n), dtype="float64")
    sums = xp.empty((2 * S + 2, D, n), dtype="float64")
    arrays = _complex128(dR), _complex128(v), _complex128(a), *_tables(xp, L)
    launch("cauchy_backward", D * n * chunks, S, D, n, J, chunk, *arrays, parts)
    launch("cauchy_backward_sum", sums.size, sums.size, chunks, parts, sums)
    dalpha, dbeta, dmodulus, dreal = sums[:S], sums[S : 2 * S], sums[2 * S], sums[2 * S + 1]
    dv = dalpha * a + dbeta
    da = (dalpha * v).sum(axis=0) + 2 * dmodulus * a + dreal
    return dv.astype(v.dtype, copy=False), da.astype(a.dtype, copy=False)
