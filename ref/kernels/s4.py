"""Numba twins of ref/s4.py: the Cauchy sums of conjugate pairs, in real numbers.

    v/(2is - ca) + conj(v)/(2is - c conj(a)) = (4is Re v - 2c Re(v conj(a))) / q,
    q = c² |a|² - 4s² - 4isc Re a

so that one complex reciprocal 1/q serves all sums of a mode and node. float64 inside, whatever the
precision outside. One channel is one thread's work: the results do not depend on the number of
threads; nothing of size (D, n, J) is formed.
"""

import math

import numpy as np
from numba import njit, prange

from ref.backend import parallel_lock

W = 32  # nodes side by side: the inner loops over l are vector code


def cauchy_forward(v, a, L):
    """v (S, D, n), a (D, n) -> R (S, D, L//2+1): see ref.s4.cauchy_forward"""
    R = np.empty((*v.shape[:2], L // 2 + 1), a.dtype)
    with parallel_lock:
        _cauchy_forward(*_coefficients(v, a), *_tables(L), R.view(a.real.dtype))
    return R


def cauchy_backward(dR, v, a, L):
    """dR (S, D, J) -> dv (S, D, n), da (D, n): see ref.s4.cauchy_backward"""
    grads = np.empty((2 * len(v) + 2, *a.shape))
    with parallel_lock:
        dR = np.ascontiguousarray(dR).view(a.real.dtype)
        _cauchy_backward(dR, *_coefficients(v, a), *_tables(L), grads)
    S = len(v)
    dalpha, dbeta, dm, dr = grads[:S], grads[S : 2 * S], grads[2 * S], grads[2 * S + 1]
    dv = dalpha * a + dbeta
    da = (dalpha * v).sum(axis=0) + 2 * dm * a + dr
    return dv.astype(v.dtype), da.astype(a.dtype)


def _coefficients(v, a):
    """Re(v conj(a)) and Re v (S, D, n), |a|² and Re a (D, n), float64"""
    v, a = v.astype(np.complex128), a.astype(np.complex128)
    products = (v * a.conj()).real.copy()
    return products, v.real.copy(), (a * a.conj()).real.copy(), a.real.copy()


def _tables(L):
    """cos θ/2 and sin θ/2, padded to full lanes by θ = 0"""
    J = L // 2 + 1
    half = np.zeros(-(-J // W) * W)
    half[:J] = np.arange(J) * (math.pi / L)
    c, s = np.cos(half), np.sin(half)
    if L % 2 == 0:
        c[J - 1] = 0
    return c, s


@njit(cache=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _reciprocals(c, s, m, r, work):
    """work[:2W] = real and imaginary parts of 1/q"""
    for l in range(W):
        x = c[l] * c[l] * m - 4 * s[l] * s[l]
        y = -4 * s[l] * c[l] * r
        scale = 1 / (x * x + y * y)
        work[l], work[W + l] = x * scale, -y * scale


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _cauchy_forward(alpha, beta, m, r, c, s, R):
    S, D, n = alpha.shape
    J = R.shape[2] // 2
    for d in prange(D):
        work = np.empty(2 * W)
        sums = np.empty((S, 4, W))  # Re and Im of Σ alpha/q, of Σ beta/q
        for j0 in range(0, J, W):
            sums[:] = 0
            cosine, sine = c[j0 : j0 + W], s[j0 : j0 + W]
            for i in range(n):
                _reciprocals(cosine, sine, m[d, i], r[d, i], work)
                for k in range(S):
                    a, b, own = alpha[k, d, i], beta[k, d, i], sums[k]
                    for l in range(W):
                        own[0, l] += a * work[l]
                        own[1, l] += a * work[W + l]
                        own[2, l] += b * work[l]
                        own[3, l] += b * work[W + l]
            for k in range(S):
                own = sums[k]
                for l in range(min(W, J - j0)):
                    x, y = -2 * cosine[l], 4 * sine[l]
                    R[k, d, 2 * (j0 + l)] = x * own[0, l] - y * own[3, l]
                    R[k, d, 2 * (j0 + l) + 1] = x * own[1, l] + y * own[2, l]


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _cauchy_backward(dR, alpha, beta, m, r, c, s, grads):
    S, D, n = alpha.shape
    J = dR.shape[2] // 2
    for d in prange(D):
        work = np.empty(4 * W)  # 1/q and its gradient
        own = np.empty((S, 4, W))  # the gradients of Σ alpha/q and Σ beta/q
        sums = np.zeros((n, 2 * S + 2, W))  # of the gradients, lane by lane
        for j0 in range(0, J, W):
            cosine, sine = c[j0 : j0 + W], s[j0 : j0 + W]
            for k in range(S):
                for l in range(W):
                    x = dR[k, d, 2 * (j0 + l)] if j0 + l < J else 0.0
                    y = dR[k, d, 2 * (j0 + l) + 1] if j0 + l < J else 0.0
                    own[k, 0, l], own[k, 1, l] = -2 * cosine[l] * x, -2 * cosine[l] * y
                    own[k, 2, l], own[k, 3, l] = 4 * sine[l] * y, -4 * sine[l] * x
            for i in range(n):
                _reciprocals(cosine, sine, m[d, i], r[d, i], work)
                work[2 * W :] = 0
                lanes = sums[i]
                for k in range(S):
                    a, b, p = alpha[k, d, i], beta[k, d, i], own[k]
                    for l in range(W):
                        x, y = work[l], work[W + l]
                        lanes[k, l] += p[0, l] * x + p[1, l] * y
                        lanes[S + k, l] += p[2, l] * x + p[3, l] * y
                        work[2 * W + l] += a * p[0, l] + b * p[2, l]
                        work[3 * W + l] += a * p[1, l] + b * p[3, l]
                for l in range(W):
                    x, y = work[l], work[W + l]
                    u, v = x * x - y * y, 2 * x * y  # 1/q²; the gradient of q is -conj(1/q²) g
                    p, q = work[2 * W + l], work[3 * W + l]
                    lanes[2 * S, l] -= cosine[l] * cosine[l] * (u * p + v * q)
                    lanes[2 * S + 1, l] += 4 * sine[l] * cosine[l] * (u * q - v * p)
        for i in range(n):
            for k in range(2 * S + 2):
                grads[k, d, i] = sums[i, k].sum()
