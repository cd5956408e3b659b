"""Launchers of s4d.cu, with the signatures and meaning of ref/kernels/s4d.py."""

from ref.backend import array_module
from ref.kernels import cuda

RUN = 16  # taps of one thread, as in s4d.cu
CHUNK = 64  # taps that one thread adds up; n when that is more, so that the parts are O(D (L + n))


def _complex128(x):
    return x.astype("complex128", order="C", copy=False)


def vandermonde_forward(c, z, L):
    """c (d, D, n), z (D, n) -> k (d, D, L): see ref.s4d.vandermonde_forward"""
    (d, D, n), xp, launch = c.shape, array_module(z), cuda.launcher("s4d", "float64")
    runs, dtype = -(-L // RUN), z.real.dtype
    c, z, k = _complex128(c), _complex128(z), xp.empty((d, D, L), dtype="float64")
    step = xp.exp(runs * z)
    launch("vandermonde_forward", d * D * runs, d, D, n, L, runs, c, z, step, k)
    return k.astype(dtype, copy=False)


def vandermonde_backward(dk, c, z):
    """dk (d, D, L) -> dc (d, D, n), dz (D, n): see ref.s4d.vandermonde_backward"""
    (d, D, n), xp, launch = c.shape, array_module(z), cuda.launcher("s4d", "float64")
    L, chunk = dk.shape[2], max(CHUNK, n)
    chunks = -(-L // chunk)
    parts = xp.empty((chunks, 2, d, D, n), dtype="complex128")
    sums = xp.empty((2, d, D, n), dtype="complex128")
    dk, wide = dk.astype("float64", order="C", copy=False), _complex128(z)
    arrays = dk, wide, xp.exp(wide)
    launch("vandermonde_backward", d * D * n * chunks, d, D, n, L, chunk, *arrays, parts)
    launch("vandermonde_backward_sum", sums.size, sums.size, chunks, parts, sums)
    dc, dz = 2 * sums[0].conj(), 2 * (c * sums[1]).conj().sum(axis=0)
    return dc.astype(c.dtype, copy=False), dz.astype(z.dtype, copy=False)
