"""Numba twins of ref/hope.py: Horner on the nodes for the transfer function, the all-pass ladder
for the causal kernel.

Everything runs in float64 inside, whatever the precision outside: an error of 1/w' or of the pole
counts n times in what is made of it. Memory O(D L); nothing of size (D, L, n). Results do not
depend on the number of threads: one channel (sampling) or one block of channels (ladder) is one
thread's work.
"""

import math

import numpy as np
from numba import njit, prange

from ref.backend import complex_dtype, parallel_lock

W = 32  # nodes side by side: the inner loops over l are vector code
CHANNELS = 8  # channels side by side in the ladder


def _float64(h, log_dt, L, J):
    """Re h, Im h (D, n), dt (D,), cosine and sine of the half angles (J,)"""
    half = np.arange(J) * (math.pi / L)
    h = h.astype(np.complex128)
    dt = np.exp(log_dt.astype(np.float64))
    return h.real.copy(), h.imag.copy(), dt, np.cos(half), np.sin(half)


def sample_forward(h, log_dt, L, J):
    """h (D, n), log_dt (D,) -> g (D, J): see ref.hope.sample_forward"""
    g = np.empty((len(h), J), complex_dtype(log_dt.dtype))
    with parallel_lock:
        _sample_forward(*_float64(h, log_dt, L, J), g.view(log_dt.dtype))
    return g


def sample_backward(dg, h, log_dt, L, J):
    """dg (D, J) -> dh (D, n) complex, dlog_dt (D,): see ref.hope.sample_backward"""
    dh, dlog_dt = np.empty(h.shape, complex_dtype(log_dt.dtype)), np.empty_like(log_dt)
    dg = np.ascontiguousarray(dg).view(log_dt.dtype)
    with parallel_lock:
        _sample_backward(dg, *_float64(h, log_dt, L, J), dh.view(log_dt.dtype), dlog_dt)
    return dh, dlog_dt


# 1/w' = exp(-iθ') with tan(θ'/2) = s/c, s = sin(θ/2), c = dt cos(θ/2):
# (c² - s² - 2i s c)/(c² + s²). No angle is formed. Each thread's lanes stand in one work array,
# which spares the compiler the question whether they overlap.


@njit(cache=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _inverse_nodes(j0, dt, cosine, sine, work):
    """work[:2W] = real and imaginary parts of 1/w' at nodes j0 .. j0+W, the last one repeated"""
    for l in range(W):
        j = min(j0 + l, len(cosine) - 1)
        c, s = dt * cosine[j], sine[j]
        r = 1 / (c * c + s * s)
        work[l], work[W + l] = (c * c - s * s) * r, -(s * c + s * c) * r


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _sample_forward(hr, hi, dt, cosine, sine, g):
    D, n = hr.shape
    J = len(cosine)
    for d in prange(D):
        work = np.empty(4 * W, dt.dtype)  # 1/w', g
        for j0 in range(0, J, W):
            _inverse_nodes(j0, dt[d], cosine, sine, work)
            work[2 * W :] = 0
            for i in range(n - 1, -1, -1):
                a, b = hr[d, i], hi[d, i]
                for l in range(W):
                    x, y = work[2 * W + l] + a, work[3 * W + l] + b
                    work[2 * W + l] = work[l] * x - work[W + l] * y
                    work[3 * W + l] = work[l] * y + work[W + l] * x
            for l in range(min(W, J - j0)):
                g[d, 2 * (j0 + l)], g[d, 2 * (j0 + l) + 1] = work[2 * W + l], work[3 * W + l]


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _sample_backward(dg, hr, hi, dt, cosine, sine, dh, dlog_dt):
    D, n = hr.shape
    J = len(cosine)
    for d in prange(D):
        work = np.zeros(8 * W, dt.dtype)  # 1/w', its power, dg, Σ (i+1) h_i power
        sums = np.zeros((n, 2 * W), dt.dtype)  # of dh, lane by lane
        total = 0.0
        for j0 in range(0, J, W):
            _inverse_nodes(j0, dt[d], cosine, sine, work)
            for l in range(W):
                j = j0 + l
                work[2 * W + l], work[3 * W + l] = 1, 0
                work[4 * W + l] = dg[d, 2 * j] if j < J else 0
                work[5 * W + l] = dg[d, 2 * j + 1] if j < J else 0
                work[6 * W + l] = work[7 * W + l] = 0
            for i in range(n):
                a, b = (i + 1) * hr[d, i], (i + 1) * hi[d, i]
                lane = sums[i]
                for l in range(W):
                    x = work[2 * W + l] * work[l] - work[3 * W + l] * work[W + l]
                    y = work[2 * W + l] * work[W + l] + work[3 * W + l] * work[l]
                    work[2 * W + l], work[3 * W + l] = x, y
                    lane[l] += x * work[4 * W + l] + y * work[5 * W + l]
                    lane[W + l] += x * work[5 * W + l] - y * work[4 * W + l]
                    work[6 * W + l] += a * x - b * y
                    work[7 * W + l] += a * y + b * x
            for l in range(min(W, J - j0)):
                c, s = dt[d] * cosine[j0 + l], sine[j0 + l]
                slope = -2 * s * c / (s * s + c * c)
                total += (
                    work[4 * W + l] * work[7 * W + l] - work[5 * W + l] * work[6 * W + l]
                ) * slope
        for i in range(n):
            dh[d, 2 * i], dh[d, 2 * i + 1] = sums[i, :W].sum(), sums[i, W:].sum()
        dlog_dt[d] = total


def ladder_forward(h, log_dt, L):
    """h (D, n) real, log_dt (D,) -> k (D, L): see ref.hope.ladder_forward"""
    k = np.empty((len(h), L), h.dtype)
    with parallel_lock:
        _ladder_forward(np.ascontiguousarray(h), _pole(log_dt), k)
    return k


def ladder_backward(dk, h, log_dt, L):
    """dk (D, L) -> dh (D, n), dlog_dt (D,): see ref.hope.ladder_backward"""
    a = _pole(log_dt)
    dh, da = np.empty_like(h, order="C"), np.empty(len(h))
    with parallel_lock:
        _ladder_backward(np.ascontiguousarray(dk), np.ascontiguousarray(h), a, dh, da)
    return dh, (da * (-0.5 * (1 - a * a))).astype(log_dt.dtype)


def _pole(log_dt):
    return -np.tanh(0.5 * log_dt.astype(np.float64))


@njit(cache=True, fastmath={"contract"})
def _all_pass(q, a, s):
    """One section, in place.   q (L, CHANNELS) input, then output; a, s (CHANNELS,)"""
    s[:] = 0
    for t in range(len(q)):
        for l in range(CHANNELS):
            p = q[t, l]
            q[t, l] = s[l] - a[l] * p
            s[l] = a[l] * q[t, l] + p


@njit(parallel=True, cache=True, fastmath={"contract"})
def _ladder_forward(h, a, k):
    D, n = h.shape
    L = k.shape[1]
    for block in prange((D + CHANNELS - 1) // CHANNELS):
        d0 = block * CHANNELS
        width = min(CHANNELS, D - d0)
        al, s, hl = np.zeros(CHANNELS), np.empty(CHANNELS), np.zeros(CHANNELS)
        al[:width] = a[d0 : d0 + width]
        q, y = np.zeros((L, CHANNELS)), np.zeros((L, CHANNELS))
        q[0] = 1
        for i in range(n):
            _all_pass(q, al, s)
            hl[:width] = h[d0 : d0 + width, i]
            for t in range(L):
                for l in range(CHANNELS):
                    y[t, l] += hl[l] * q[t, l]
        for l in range(width):
            for t in range(L):
                k[d0 + l, t] = y[t, l]


@njit(parallel=True, cache=True, fastmath={"contract"})
def _ladder_backward(dk, h, a, dh, da):
    D, n = h.shape
    L = dk.shape[1]
    for block in prange((D + CHANNELS - 1) // CHANNELS):
        d0 = block * CHANNELS
        width = min(CHANNELS, D - d0)
        al, s, hl = np.zeros(CHANNELS), np.empty(CHANNELS), np.zeros(CHANNELS)
        al[:width] = a[d0 : d0 + width]
        q, r, g = np.zeros((L, CHANNELS)), np.zeros((L, CHANNELS)), np.zeros((L, CHANNELS))
        for l in range(width):
            for t in range(L):
                g[t, l] = dk[d0 + l, t]
        q[0] = 1
        for i in range(n):
            hl[:width] = h[d0 : d0 + width, i]
            for t in range(L):
                for l in range(CHANNELS):
                    r[t, l] += (i + 1) * hl[l] * q[t, l]
            _all_pass(q, al, s)
            s[:] = 0
            for t in range(L):
                for l in range(CHANNELS):
                    s[l] += g[t, l] * q[t, l]
            for l in range(width):
                dh[d0 + l, i] = s[l]
        for l in range(width):
            total = last = before = 0.0
            for t in range(L):
                w = 2 * al[l] * last - al[l] * al[l] * before - r[t, l]
                if t >= 2:
                    w += r[t - 2, l]
                total += g[t, l] * w
                before, last = last, w
            da[d0 + l] = total
