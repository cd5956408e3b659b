"""Numba twins of the layers in ref/nn.py that touch every activation:
one pass over memory where NumPy makes several.

Rows are cut into pieces of fixed size and partial sums are added in the order of the pieces, so the
results do not depend on the number of threads.
"""

import math

import numpy as np
from numba import njit, prange

from ref.backend import empty, parallel_lock
from ref.kernels.numeric import exp, normal_cdf

PIECE = 4096  # elements of a flat array, or
ROWS = 256  # rows of (..., D) in one thread's hands
C, CUBIC = math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form


def _launch(kernel, *arrays):
    with parallel_lock:
        kernel(*arrays)


def _flat(x):
    return np.ascontiguousarray(x).reshape(-1)


def _rows(x):
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def gelu_forward(x):
    """See ref.nn.gelu_forward"""
    y = empty(x.shape, x.dtype)
    _launch(_gelu_forward, _flat(x), y.reshape(-1))
    return y


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _gelu_forward(x, y):
    half = x.dtype.type(0.5)
    for piece in prange((len(x) + PIECE - 1) // PIECE):
        for i in range(piece * PIECE, min(len(x), (piece + 1) * PIECE)):
            y[i] = x[i] * normal_cdf(x[i], exp(-half * x[i] * x[i]))


def gelu_backward(dy, x):
    """See ref.nn.gelu_backward"""
    dx = empty(x.shape, x.dtype)
    _launch(_gelu_backward, _flat(dy), _flat(x), dx.reshape(-1))
    return dx


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _gelu_backward(dy, x, dx):
    half, scale = x.dtype.type(0.5), x.dtype.type(1 / math.sqrt(2 * math.pi))
    for piece in prange((len(x) + PIECE - 1) // PIECE):
        for i in range(piece * PIECE, min(len(x), (piece + 1) * PIECE)):
            e = exp(-half * x[i] * x[i])
            dx[i] = dy[i] * (normal_cdf(x[i], e) + x[i] * (scale * e))


def gelu_tanh_forward(x):
    """See ref.nn.gelu_tanh_forward"""
    y = empty(x.shape, x.dtype)
    _launch(_gelu_tanh_forward, _flat(x), y.reshape(-1))
    return y


# (1 + tanh(u)) / 2 is the sigmoid of 2u, which needs one exp and loses nothing for large -u.


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _gelu_tanh_forward(x, y):
    one, c, cubic = x.dtype.type(1), x.dtype.type(-2 * C), x.dtype.type(CUBIC)
    for piece in prange((len(x) + PIECE - 1) // PIECE):
        for i in range(piece * PIECE, min(len(x), (piece + 1) * PIECE)):
            y[i] = x[i] / (one + exp(c * x[i] * (one + cubic * x[i] * x[i])))


def gelu_tanh_backward(dy, x):
    """See ref.nn.gelu_tanh_backward"""
    dx = empty(x.shape, x.dtype)
    _launch(_gelu_tanh_backward, _flat(dy), _flat(x), dx.reshape(-1))
    return dx


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _gelu_tanh_backward(dy, x, dx):
    one, c, cubic = x.dtype.type(1), x.dtype.type(2 * C), x.dtype.type(CUBIC)
    three = x.dtype.type(3 * CUBIC)
    for piece in prange((len(x) + PIECE - 1) // PIECE):
        for i in range(piece * PIECE, min(len(x), (piece + 1) * PIECE)):
            square = x[i] * x[i]
            s = one / (one + exp(-c * x[i] * (one + cubic * square)))
            dx[i] = dy[i] * (s + s * (one - s) * (c * x[i] * (one + three * square)))


def layer_norm_forward(x, weight, bias, eps):
    """-> y, mean, r (..., 1): see ref.nn.layer_norm_forward"""
    y, (mean, r) = empty(x.shape, x.dtype), np.empty((2, *x.shape[:-1], 1), x.dtype)
    arrays = _rows(x), weight, bias, x.dtype.type(eps), y.reshape(-1, x.shape[-1])
    _launch(_layer_norm_forward, *arrays, mean.reshape(-1), r.reshape(-1))
    return y, mean, r


@njit(parallel=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _layer_norm_forward(x, weight, bias, eps, y, mean, r):
    R, D = x.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            total, square = x.dtype.type(0), x.dtype.type(0)
            for d in range(D):
                total += x[row, d]
            m = total / x.dtype.type(D)
            for d in range(D):
                square += (x[row, d] - m) * (x[row, d] - m)
            s = x.dtype.type(1) / math.sqrt(square / x.dtype.type(D) + eps)
            for d in range(D):
                y[row, d] = weight[d] * ((x[row, d] - m) * s) + bias[d]
            mean[row], r[row] = m, s


def layer_norm_backward(dy, x, mean, r, weight):
    """-> dx, dweight, dbias: see ref.nn.layer_norm_backward"""
    dx, rows = empty(x.shape, x.dtype), _rows(dy)
    sums = np.empty((-(-len(rows) // ROWS), 2, x.shape[-1]))
    arrays = rows, _rows(x), mean.reshape(-1), r.reshape(-1), weight
    _launch(_layer_norm_backward, *arrays, dx.reshape(-1, x.shape[-1]), sums)
    dweight, dbias = sums.sum(axis=0).astype(x.dtype)
    return dx, dweight, dbias


@njit(parallel=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _layer_norm_backward(dy, x, mean, r, weight, dx, sums):
    R, D = x.shape
    for piece in prange(len(sums)):
        dweight, dbias = np.zeros(D, x.dtype), np.zeros(D, x.dtype)
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            m, s = mean[row], r[row]
            total, along = x.dtype.type(0), x.dtype.type(0)
            for d in range(D):
                xhat, g = (x[row, d] - m) * s, weight[d] * dy[row, d]
                total += g
                along += g * xhat
                dweight[d] += dy[row, d] * xhat
                dbias[d] += dy[row, d]
            total, along = total / x.dtype.type(D), along / x.dtype.type(D)
            for d in range(D):
                xhat = (x[row, d] - m) * s
                dx[row, d] = s * (weight[d] * dy[row, d] - total - xhat * along)
        for d in range(D):
            sums[piece, 0, d], sums[piece, 1, d] = dweight[d], dbias[d]


def glu_forward(a):
    """See ref.nn.glu_forward"""
    D = a.shape[-1] // 2
    y = empty((*a.shape[:-1], D), a.dtype)
    _launch(_glu_forward, _rows(a), y.reshape(-1, D))
    return y


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _glu_forward(a, y):
    R, D = y.shape
    one = a.dtype.type(1)
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            for d in range(D):
                y[row, d] = a[row, d] / (one + exp(-a[row, D + d]))


def glu_backward(dy, a):
    """See ref.nn.glu_backward"""
    da = empty(a.shape, a.dtype)
    _launch(_glu_backward, _rows(dy), _rows(a), da.reshape(-1, a.shape[-1]))
    return da


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _glu_backward(dy, a, da):
    R, D = dy.shape
    one = a.dtype.type(1)
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            for d in range(D):
                s = one / (one + exp(-a[row, D + d]))
                g = dy[row, d] * s
                da[row, d] = g
                da[row, D + d] = g * a[row, d] * (one - s)


def batch_norm_moments(x):
    """x (..., D) -> mean, biased variance (D,), by pieces' own moments: no cancellation"""
    rows = _rows(x)
    R, D = rows.shape
    pieces = -(-R // ROWS)
    mean, square = np.empty((pieces, D)), np.empty((pieces, D))
    _launch(_moments, rows, mean, square)
    count = np.minimum(ROWS, R - ROWS * np.arange(pieces))[:, None]
    total = (count * mean).sum(axis=0) / R
    var = (square + count * (mean - total) ** 2).sum(axis=0) / R
    return total.astype(x.dtype), var.astype(x.dtype)


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _moments(x, mean, square):
    R, D = x.shape
    for piece in prange(len(mean)):
        first, last = piece * ROWS, min(R, (piece + 1) * ROWS)
        m, s = np.zeros(D, x.dtype), np.zeros(D, x.dtype)
        for row in range(first, last):
            for d in range(D):
                m[d] += x[row, d]
        for d in range(D):
            m[d] /= last - first
        for row in range(first, last):
            for d in range(D):
                c = x[row, d] - m[d]
                s[d] += c * c
        for d in range(D):
            mean[piece, d], square[piece, d] = m[d], s[d]


def scale_shift(x, mean, scale, shift):
    """x (..., D), mean, scale, shift (D,) -> scale (x - mean) + shift"""
    y = empty(x.shape, x.dtype)
    _launch(_scale_shift, _rows(x), mean, scale, shift, y.reshape(-1, x.shape[-1]))
    return y


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _scale_shift(x, mean, scale, shift, y):
    R, D = x.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            for d in range(D):
                y[row, d] = scale[d] * (x[row, d] - mean[d]) + shift[d]


def batch_norm_sums(dy, x, mean, r):
    """dy, x (..., D), mean, r (D,) -> the sums over all rows of dy (x - mean) r and of dy (D,)"""
    rows = _rows(dy)
    sums = np.empty((-(-len(rows) // ROWS), 2, rows.shape[1]))
    _launch(_batch_norm_sums, rows, _rows(x), mean, r, sums)
    return sums.sum(axis=0).astype(dy.dtype)


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _batch_norm_sums(dy, x, mean, r, sums):
    R, D = dy.shape
    for piece in prange(len(sums)):
        s, p = np.zeros(D, x.dtype), np.zeros(D, x.dtype)
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            for d in range(D):
                s[d] += dy[row, d]
                p[d] += dy[row, d] * ((x[row, d] - mean[d]) * r[d])
        for d in range(D):
            sums[piece, 0, d], sums[piece, 1, d] = p[d], s[d]


def batch_norm_input_gradient(dy, x, mean, r, scale, mean_dy, mean_dy_xhat):
    """dy, x (..., D), the others (D,) -> scale (dy - mean_dy - x̂ mean_dy_xhat), x̂ = (x - mean) r"""
    dx = empty(dy.shape, dy.dtype)
    arrays = _rows(dy), _rows(x), mean, r, scale, mean_dy, mean_dy_xhat
    _launch(_batch_norm_input_gradient, *arrays, dx.reshape(-1, dy.shape[-1]))
    return dx


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _batch_norm_input_gradient(dy, x, mean, r, scale, mean_dy, mean_dy_xhat, dx):
    R, D = dy.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            for d in range(D):
                xhat = (x[row, d] - mean[d]) * r[d]
                dx[row, d] = scale[d] * (dy[row, d] - mean_dy[d] - xhat * mean_dy_xhat[d])


def skip_forward(y, D, x):
    """See ref.nn.skip_forward"""
    z = empty(x.shape, x.dtype)
    _launch(_skip_forward, _rows(y), D, _rows(x), z.reshape(-1, x.shape[-1]))
    return z


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _skip_forward(y, D, x, z):
    for piece in prange((len(x) + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(len(x), (piece + 1) * ROWS)):
            for d in range(x.shape[1]):
                z[row, d] = y[row, d] + D[d] * x[row, d]


def skip_backward(dy, D, x):
    """-> dD, dx: see ref.nn.skip_backward"""
    dx, rows = empty(x.shape, x.dtype), _rows(dy)
    sums = np.empty((-(-len(rows) // ROWS), x.shape[-1]))
    _launch(_skip_backward, rows, D, _rows(x), dx.reshape(-1, x.shape[-1]), sums)
    return sums.sum(axis=0).astype(x.dtype), dx


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _skip_backward(dy, D, x, dx, sums):
    for piece in prange(len(sums)):
        s = np.zeros(x.shape[1], x.dtype)
        for row in range(piece * ROWS, min(len(x), (piece + 1) * ROWS)):
            for d in range(x.shape[1]):
                dx[row, d] = D[d] * dy[row, d]
                s[d] += dy[row, d] * x[row, d]
        for d in range(x.shape[1]):
            sums[piece, d] = s[d]


def spectral_product(X, G):
    """X (B, J, D), G (J, D) -> X G"""
    Y = empty(X.shape, X.dtype)
    _launch(_spectral_product, np.ascontiguousarray(X), np.ascontiguousarray(G), Y)
    return Y


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _spectral_product(X, G, Y):
    B, J, D = X.shape
    for j in prange(J):
        for b in range(B):
            for d in range(D):
                Y[b, j, d] = X[b, j, d] * G[j, d]


def spectral_gradients(dY, X, G):
    """dY, X (B, J, D), G (J, D) -> conj(G) dY, and conj(X) dY summed over the batch (J, D)"""
    dX, sums = empty(X.shape, X.dtype), np.zeros(G.shape, X.dtype)
    arrays = (np.ascontiguousarray(a) for a in (dY, X, G))
    _launch(_spectral_gradients, *arrays, dX, sums)
    return dX, sums


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _spectral_gradients(dY, X, G, dX, sums):
    B, J, D = X.shape
    for j in prange(J):
        for b in range(B):
            for d in range(D):
                dX[b, j, d] = dY[b, j, d] * G[j, d].conjugate()
                sums[j, d] += X[b, j, d].conjugate() * dY[b, j, d]


def embedding_backward(dy, tokens, V):
    """See ref.nn.embedding_backward; the sum runs in the order of the tokens"""
    dW = np.zeros((V, dy.shape[-1]), dy.dtype)
    _embedding_backward(_rows(dy), np.ascontiguousarray(tokens).reshape(-1), dW)
    return dW


@njit(cache=True)
def _embedding_backward(dy, tokens, dW):
    for row in range(len(tokens)):
        for d in range(dy.shape[1]):
            dW[tokens[row], d] += dy[row, d]
