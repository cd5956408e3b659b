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

from ref.backend import empty, parallel_lock

W = 32  # nodes side by side: the inner loops over l are vector code


def cauchy_forward(v, a, L):
    """v (S, D, n), a (D, n) -> R (S, D, L//2+1): see ref.s4.cauchy_forward"""
    R = empty((*v.shape[:2], L // 2 + 1), a.dtype)
    with parallel_lock:
        _cauchy_forward(*_coefficients(v, a), *_tables(L), R.view(a.real.dtype))
    return R


def cauchy_backward(dR, v, a, L):
    """dR (S, D, J) -> dv (S, D, n), da (D, n): see ref.s4.cauchy_backward"""
    grads = empty((2 * len(v) + 2, *a.shape), np.float64)
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


# The inner loops are functions of few one-dimensional arrays: the compiler can then see that they
# do not overlap and makes vector code.


@njit(cache=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _reciprocals(c, s, m, r, re, im):
    """re, im (W,) = 1/q"""
    for l in range(W):
        x = c[l] * c[l] * m - 4 * s[l] * s[l]
        y = -4 * s[l] * c[l] * r
        scale = 1 / (x * x + y * y)
        re[l], im[l] = x * scale, -y * scale


@njit(cache=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _add_scaled(a, b, re, im, y):
    """y (4, W) += a re, a im, b re, b im"""
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    for l in range(W):
        y0[l] += a * re[l]
        y1[l] += a * im[l]
        y2[l] += b * re[l]
        y3[l] += b * im[l]


@njit(cache=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _add_products(x0, x1, re, im, y):
    """y (W,) += x0 re + x1 im"""
    for l in range(W):
        y[l] += x0[l] * re[l] + x1[l] * im[l]


@njit(cache=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _add_combination(a, x0, b, x1, y):
    """y (W,) += a x0 + b x1"""
    for l in range(W):
        y[l] += a * x0[l] + b * x1[l]


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _cauchy_forward(alpha, beta, m, r, c, s, R):
    S, D, n = alpha.shape
    J = R.shape[2] // 2
    for d in prange(D):
        re, im = np.empty(W), np.empty(W)
        sums = np.empty((S, 4, W))  # Re and Im of Σ alpha/q, of Σ beta/q
        for j0 in range(0, J, W):
            sums[:] = 0
            cosine, sine = c[j0 : j0 + W], s[j0 : j0 + W]
            for i in range(n):
                _reciprocals(cosine, sine, m[d, i], r[d, i], re, im)
                for k in range(S):
                    _add_scaled(alpha[k, d, i], beta[k, d, i], re, im, sums[k])
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
        re, im, dre, dim = np.empty(W), np.empty(W), np.empty(W), np.empty(W)  # 1/q, its gradient
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
                _reciprocals(cosine, sine, m[d, i], r[d, i], re, im)
                dre[:], dim[:] = 0, 0
                for k in range(S):
                    a, b, p = alpha[k, d, i], beta[k, d, i], own[k]
                    _add_products(p[0], p[1], re, im, sums[i, k])
                    _add_products(p[2], p[3], re, im, sums[i, S + k])
                    _add_combination(a, p[0], b, p[2], dre)
                    _add_combination(a, p[1], b, p[3], dim)
                _add_pole(cosine, sine, re, im, dre, dim, sums[i, 2 * S], sums[i, 2 * S + 1])
        for i in range(n):
            for k in range(2 * S + 2):
                grads[k, d, i] = sums[i, k].sum()


@njit(cache=True, fastmath={"contract"}, error_model="numpy", inline="always")
def _add_pole(c, s, re, im, dre, dim, dm, dr):
    """The gradient of q, -conj(1/q²) times that of 1/q, into dm and dr (W,)"""
    for l in range(W):
        u, v = re[l] * re[l] - im[l] * im[l], 2 * re[l] * im[l]
        dm[l] -= c[l] * c[l] * (u * dre[l] + v * dim[l])
        dr[l] += 4 * s[l] * c[l] * (u * dim[l] - v * dre[l])
