"""Numba twins of ref/s4d.py: the Vandermonde product by running powers.

exp(z (b W + l)) = exp(z W)^b exp(z l): W lanes l side by side, an anchor for each block b that runs
by one multiplication and is made afresh, by an exponential, every REFRESH blocks, so that its
rounding does not grow. float64 inside, whatever the precision outside. One channel is one thread's
work: the results do not depend on the number of threads, the memory is O(L) a thread.
"""

import cmath

import numpy as np
from numba import njit, prange

from ref.backend import empty, parallel_lock

W = 64  # lanes: the inner loops over l are vector code
REFRESH = 16


def vandermonde_forward(c, z, L):
    """c (d, D, n), z (D, n) -> k (d, D, L): see ref.s4d.vandermonde_forward"""
    k = empty((*c.shape[:2], L), z.real.dtype)
    with parallel_lock:
        _vandermonde_forward(_complex128(c), _complex128(z), k)
    return k


def vandermonde_backward(dk, c, z):
    """dk (d, D, L) -> dc (d, D, n), dz (D, n): see ref.s4d.vandermonde_backward"""
    dc, dz = empty(c.shape, z.dtype), empty(z.shape, z.dtype)
    with parallel_lock:
        _vandermonde_backward(np.ascontiguousarray(dk), _complex128(c), _complex128(z), dc, dz)
    return dc, dz


def _complex128(x):
    return np.ascontiguousarray(x, np.complex128)


@njit(cache=True)
def _lanes(z, re, im):
    """Real and imaginary parts of exp(z l), l < W"""
    step, power = cmath.exp(z), 1 + 0j
    for l in range(W):
        re[l], im[l] = power.real, power.imag
        power *= step


@njit(cache=True)
def _anchor(z, before, step, b):
    """exp(z W b), from the one of block b-1"""
    return cmath.exp(z * (W * b)) if b % REFRESH == 0 else before * step


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _vandermonde_forward(c, z, k):
    d, D, L = k.shape
    blocks = (L + W - 1) // W
    for i in prange(D):
        re, im, sums = np.empty(W), np.empty(W), np.zeros((d, blocks, W))
        for n in range(z.shape[1]):
            _lanes(z[i, n], re, im)
            step, anchor = cmath.exp(z[i, n] * W), 1 + 0j
            for b in range(blocks):
                anchor = _anchor(z[i, n], anchor, step, b)
                for j in range(d):
                    term, row = 2 * c[j, i, n] * anchor, sums[j, b]
                    x, y = term.real, term.imag
                    for l in range(W):
                        row[l] += x * re[l] - y * im[l]
        for j in range(d):
            for l in range(L):
                k[j, i, l] = sums[j, l // W, l % W]


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _vandermonde_backward(dk, c, z, dc, dz):
    d, D, L = dk.shape
    blocks = (L + W - 1) // W
    for i in prange(D):
        re, im = np.empty(W), np.empty(W)
        sums = np.empty((4, W))  # Σ dk exp(z W b) over the blocks, and with the weight W b
        rows = np.zeros((d, blocks, W))
        for j in range(d):
            for l in range(L):
                rows[j, l // W, l % W] = dk[j, i, l]
        for n in range(z.shape[1]):
            _lanes(z[i, n], re, im)
            step, total = cmath.exp(z[i, n] * W), 0j
            for j in range(d):
                sums[:] = 0
                anchor = 1 + 0j
                for b in range(blocks):
                    anchor = _anchor(z[i, n], anchor, step, b)
                    x, y, row = anchor.real, anchor.imag, rows[j, b]
                    u, v = x * (W * b), y * (W * b)
                    for l in range(W):
                        sums[0, l] += x * row[l]
                        sums[1, l] += y * row[l]
                        sums[2, l] += u * row[l]
                        sums[3, l] += v * row[l]
                zeroth = first = 0j
                for l in range(W):
                    power = complex(re[l], im[l])
                    own = complex(sums[0, l], sums[1, l])
                    zeroth += power * own
                    first += power * (complex(sums[2, l], sums[3, l]) + l * own)
                dc[j, i, n] = 2 * zeroth.conjugate()
                total += 2 * (c[j, i, n] * first).conjugate()
            dz[i, n] = total
