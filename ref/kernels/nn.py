"""Numba twins of the layers in ref/nn.py that touch every activation:
one pass over memory where NumPy makes several.

Rows are cut into pieces of fixed size and partial sums are added in the order of the pieces, so the
results do not depend on the number of threads.
"""

import math

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

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


# Rows that need not be adjacent, such as half of the columns of an array: 1-D memory, the step from
# row to row, and work on one row in functions of 1-D views, which compile to vector code.


def _strided(x):
    """x (..., D) -> 1-D memory m and a step, the rows being m[i * step :][:D]"""
    x = x.reshape(-1, x.shape[-1])
    step, size = x.strides[0] // x.itemsize, x.shape[1]
    regular = x.strides == (step * x.itemsize, x.itemsize) and step >= size
    if not (regular and x.flags.writeable):
        x, step = np.array(x, order="C"), size
    return np.lib.stride_tricks.as_strided(x, ((len(x) - 1) * step + size,), x.strides[1:]), step


def _elementwise(kernel, *arrays, shape, results=1):
    """Launch a kernel on rows of `arrays` and of fresh ones"""
    rows = tuple(part for a in arrays for part in _strided(a))
    outs = tuple(empty(shape, arrays[0].dtype) for _ in range(results))
    _launch(kernel, *rows, *(a.reshape(-1, shape[-1]) for a in outs))
    return outs if results > 1 else outs[0]


def gate_forward(y, z):
    """y, z (...) -> y silu(z)"""
    return _elementwise(_gate_forward, y, z, shape=y.shape)


@njit(parallel=True, cache=True, error_model="numpy")
def _gate_forward(y, y_step, z, z_step, out):
    R, D = out.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            i, j = row * y_step, row * z_step
            _gate_forward_row(y[i : i + D], z[j : j + D], out[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _gate_forward_row(y, z, out):
    one = out.dtype.type(1)
    for d in range(len(out)):
        out[d] = y[d] * (z[d] / (one + exp(-z[d])))


def gate_backward(dout, y, z):
    """-> dy, dz"""
    return _elementwise(_gate_backward, dout, y, z, shape=y.shape, results=2)


@njit(parallel=True, cache=True, error_model="numpy")
def _gate_backward(dout, dout_step, y, y_step, z, z_step, dy, dz):
    R, D = dy.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            i, j, k = row * dout_step, row * y_step, row * z_step
            _gate_backward_row(dout[i : i + D], y[j : j + D], z[k : k + D], dy[row], dz[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _gate_backward_row(dout, y, z, dy, dz):
    one = dy.dtype.type(1)
    for d in range(len(dy)):
        s = one / (one + exp(-z[d]))
        dy[d] = dout[d] * (z[d] * s)
        dz[d] = dout[d] * y[d] * s * (one + z[d] * (one - s))


def silu_forward(x):
    """See ref.nn.silu_forward"""
    return _elementwise(_silu_forward, x, shape=x.shape)


@njit(parallel=True, cache=True, error_model="numpy")
def _silu_forward(x, x_step, y):
    R, D = y.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            _silu_forward_row(x[row * x_step : row * x_step + D], y[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _silu_forward_row(x, y):
    one = y.dtype.type(1)
    for d in range(len(y)):
        y[d] = x[d] / (one + exp(-x[d]))


def silu_backward(dy, x):
    """-> dx: see ref.nn.silu_backward"""
    return _elementwise(_silu_backward, dy, x, shape=x.shape)


@njit(parallel=True, cache=True, error_model="numpy")
def _silu_backward(dy, dy_step, x, x_step, dx):
    R, D = dx.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            i, j = row * dy_step, row * x_step
            _silu_backward_row(dy[i : i + D], x[j : j + D], dx[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _silu_backward_row(dy, x, dx):
    one = dx.dtype.type(1)
    for d in range(len(dx)):
        s = one / (one + exp(-x[d]))
        dx[d] = dy[d] * s * (one + x[d] * (one - s))


def _log1p(t):
    """log(1 + t) for 0 <= t <= 1"""
    return math.log1p(t)


@overload(_log1p, inline="always")
def _log1p_of_type(t):
    if t != types.float32:
        return lambda t: math.log1p(t)

    def log1p32(t):
        # 2 artanh(s), s = t/(2 + t) <= 1/3: eight terms of the series leave 2e-9
        s = t / (np.float32(2.0) + t)
        square = s * s
        p = np.float32(2.0 / 15.0)
        p = p * square + np.float32(2.0 / 13.0)
        p = p * square + np.float32(2.0 / 11.0)
        p = p * square + np.float32(2.0 / 9.0)
        p = p * square + np.float32(2.0 / 7.0)
        p = p * square + np.float32(2.0 / 5.0)
        p = p * square + np.float32(2.0 / 3.0)
        p = p * square + np.float32(2.0)
        return p * s

    return log1p32


def softplus_forward(x):
    """See ref.nn.softplus_forward"""
    return _elementwise(_softplus_forward, x, shape=x.shape)


@njit(parallel=True, cache=True, error_model="numpy")
def _softplus_forward(x, x_step, y):
    R, D = y.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            _softplus_forward_row(x[row * x_step : row * x_step + D], y[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _softplus_forward_row(x, y):
    zero = y.dtype.type(0)
    for d in range(len(y)):
        y[d] = (x[d] if x[d] > zero else zero) + _log1p(exp(-abs(x[d])))


def softplus_backward(dy, x):
    """-> dx: see ref.nn.softplus_backward"""
    return _elementwise(_softplus_backward, dy, x, shape=x.shape)


@njit(parallel=True, cache=True, error_model="numpy")
def _softplus_backward(dy, dy_step, x, x_step, dx):
    R, D = dx.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            i, j = row * dy_step, row * x_step
            _softplus_backward_row(dy[i : i + D], x[j : j + D], dx[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _softplus_backward_row(dy, x, dx):
    one = dx.dtype.type(1)
    for d in range(len(dx)):
        dx[d] = dy[d] / (one + exp(-x[d]))


def sigmoid_forward(x):
    """See ref.nn.sigmoid_forward"""
    return _elementwise(_sigmoid_forward, x, shape=x.shape)


@njit(parallel=True, cache=True, error_model="numpy")
def _sigmoid_forward(x, x_step, y):
    R, D = y.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            _sigmoid_forward_row(x[row * x_step : row * x_step + D], y[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _sigmoid_forward_row(x, y):
    one = y.dtype.type(1)
    for d in range(len(y)):
        y[d] = one / (one + exp(-x[d]))


def sigmoid_backward(dy, y):
    """-> dx: see ref.nn.sigmoid_backward"""
    return _elementwise(_sigmoid_backward, dy, y, shape=y.shape)


@njit(parallel=True, cache=True, error_model="numpy")
def _sigmoid_backward(dy, dy_step, y, y_step, dx):
    R, D = dx.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            i, j = row * dy_step, row * y_step
            _sigmoid_backward_row(dy[i : i + D], y[j : j + D], dx[row])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _sigmoid_backward_row(dy, y, dx):
    one = dx.dtype.type(1)
    for d in range(len(dx)):
        dx[d] = dy[d] * y[d] * (one - y[d])


def rms_norm_forward(x, weight, eps):
    """-> y, r (..., 1): see ref.nn.rms_norm_forward"""
    y, r = empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)
    arrays = weight, x.dtype.type(eps), y.reshape(-1, x.shape[-1]), r.reshape(-1)
    _launch(_rms_norm_forward, *_strided(x), *arrays)
    return y, r


@njit(parallel=True, cache=True, error_model="numpy")
def _rms_norm_forward(x, x_step, weight, eps, y, r):
    R, D = y.shape
    for piece in prange((R + ROWS - 1) // ROWS):
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            xs = x[row * x_step : row * x_step + D]
            r[row] = y.dtype.type(1) / math.sqrt(_product(xs, xs) / y.dtype.type(D) + eps)
            _scale_row(xs, weight, r[row], y[row])


@njit(cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _product(x, y):
    total = x.dtype.type(0)
    for d in range(len(x)):
        total += x[d] * y[d]
    return total


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _scale_row(x, weight, r, y):
    for d in range(len(y)):
        y[d] = weight[d] * (x[d] * r)


def _sums_of_rows(x):
    """For the sum of each piece of the rows of x (..., D)"""
    return np.empty((-(-(x.size // x.shape[-1]) // ROWS), x.shape[-1]))


def rms_norm_backward(dy, x, r, weight):
    """-> dx, dweight: see ref.nn.rms_norm_backward"""
    dx, sums = empty(x.shape, x.dtype), _sums_of_rows(x)
    arrays = *_strided(dy), *_strided(x), r.reshape(-1), weight, dx.reshape(-1, x.shape[-1]), sums
    _launch(_rms_norm_backward, *arrays)
    return dx, sums.sum(axis=0).astype(x.dtype)


@njit(parallel=True, cache=True, error_model="numpy")
def _rms_norm_backward(dy, dy_step, x, x_step, r, weight, dx, sums):
    R, D = dx.shape
    for piece in prange(len(sums)):
        dweight = np.zeros(D, dx.dtype)
        for row in range(piece * ROWS, min(R, (piece + 1) * ROWS)):
            g, xs = dy[row * dy_step : row * dy_step + D], x[row * x_step : row * x_step + D]
            _scale_row(g, weight, dx.dtype.type(1), dx[row])
            along = _product(dx[row], xs) * r[row] / dx.dtype.type(D)
            _rms_norm_backward_row(g, xs, r[row], along, dx[row], dweight)
        for d in range(D):
            sums[piece, d] = dweight[d]


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _rms_norm_backward_row(dy, x, r, along, dx, dweight):
    """dx holds weight dy and becomes the gradient"""
    for d in range(len(dx)):
        xhat = x[d] * r
        dx[d] = r * (dx[d] - xhat * along)
        dweight[d] += dy[d] * xhat


def _taps(w):
    """w (C, 1, K) -> (K, C)"""
    return np.ascontiguousarray(w[:, 0].T)


def short_conv_forward(x, w, b, before):
    """-> y: see ref.nn.short_conv_forward"""
    y, b = empty(x.shape, x.dtype), np.zeros(len(w), x.dtype) if b is None else b
    arrays = _taps(w), np.ascontiguousarray(b), np.ascontiguousarray(before), y
    _launch(_short_conv_forward, *_strided(x), *arrays)
    return y


@njit(parallel=True, cache=True, error_model="numpy")
def _short_conv_forward(x, x_step, w, b, before, y):
    (B, L, D), K = y.shape, len(w)
    pieces = (L + ROWS - 1) // ROWS
    for piece in prange(B * pieces):
        i, first = piece // pieces, piece % pieces * ROWS
        for t in range(first, min(L, first + ROWS)):
            y[i, t, :] = b
            for j in range(K):
                s = t - K + 1 + j
                if s < 0:
                    _add_product(before[i, s + K - 1], w[j], y[i, t])
                else:
                    _add_product(x[(i * L + s) * x_step : (i * L + s) * x_step + D], w[j], y[i, t])


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _add_product(x, w, y):
    for d in range(len(y)):
        y[d] += w[d] * x[d]


def short_conv_backward(dy, x, w, before):
    """-> dx, dw, db, dbefore: see ref.nn.short_conv_backward"""
    (B, L, C), K = x.shape, w.shape[2]
    dx, dbefore = empty(x.shape, x.dtype), empty((B, K - 1, C), x.dtype)
    sums = np.empty((B * -(-L // ROWS), K + 1, C))
    arrays = _taps(w), np.ascontiguousarray(before), dx, dbefore, sums
    _launch(_short_conv_backward, *_strided(dy), *_strided(x), *arrays)
    sums = sums.sum(axis=0).astype(x.dtype)
    return dx, np.ascontiguousarray(sums[:K].T)[:, None], sums[K], dbefore


@njit(parallel=True, cache=True, error_model="numpy")
def _short_conv_backward(dy, dy_step, x, x_step, w, before, dx, dbefore, sums):
    (B, L, D), K = dx.shape, len(w)
    pieces = (L + ROWS - 1) // ROWS
    for piece in prange(B * pieces):
        i, first = piece // pieces, piece % pieces * ROWS
        last, dw, ones = min(L, first + ROWS), np.zeros((K + 1, D), dx.dtype), np.ones(D, dx.dtype)
        for t in range(first, last):
            g = dy[(i * L + t) * dy_step : (i * L + t) * dy_step + D]
            _add_product(g, ones, dw[K])
            for j in range(K):
                s = t - K + 1 + j
                if s < 0:
                    _add_product(g, before[i, s + K - 1], dw[j])
                else:
                    _add_product(g, x[(i * L + s) * x_step : (i * L + s) * x_step + D], dw[j])
        for s in range(first if first else 1 - K, last):
            row = dx[i, s] if s >= 0 else dbefore[i, s + K - 1]
            row[:] = 0
            for t in range(max(s, 0), min(L, s + K)):
                g = dy[(i * L + t) * dy_step : (i * L + t) * dy_step + D]
                _add_product(g, w[s - t + K - 1], row)
        for j in range(K + 1):
            for d in range(D):
                sums[piece, j, d] = dw[j, d]


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
