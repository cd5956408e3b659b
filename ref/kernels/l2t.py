"""Numba twins of ref/l2t.py: what features and loss need of each position's logits, and the loss's
gradient of them, each in one reading of a row while it is in the cache.

A row is one thread's work: the results do not depend on the number of threads. Sums are over the
wrong classes, those before the right one and those after it, and the right one is added: nothing is
taken out of a sum again. They are in float64, block by block, but for the sums that the released
features are the rounding of.
"""

import math

import numpy as np
from numba import njit, prange

from ref import backend
from ref.backend import parallel_lock
from ref.kernels import numeric
from ref.kernels.simd import exp, lane_count, load, splat, store, total
from ref.kernels.softmax import BLOCK, COMPILED, PIECE, _largest  # noqa: F401  COMPILED: for twins()

RUN = 8  # vectors of a run of the released sums


def summarise(logits, y, mask):
    """logits (B, S, V), y (B, S) classes -> eight (B, S): top, log_z, right, Σ z², Σ p log p, best,
    mean and std, see ref.l2t.summarise; mask: what the released features subtract, or 0"""
    V, targets = logits.shape[2], y.reshape(-1).astype(np.int64)
    out = backend.empty((8, len(targets)), logits.dtype)
    with parallel_lock:
        _summarise(_flat(logits), V, targets, logits.dtype.type(mask), out)
    return tuple(out.reshape(8, *y.shape))


def logit_gradient(logits, y, top, log_z, coefficients):
    """a p + b p log p + c z - d 1[v = y], the coefficients a, b, c, d (B, S) -> (B, S, V)"""
    V, targets = logits.shape[2], y.reshape(-1).astype(np.int64)
    rows = [np.ravel(x).astype(logits.dtype) for x in (top, log_z, *coefficients)]
    out = backend.empty((logits.size,), logits.dtype)
    with parallel_lock:
        _logit_gradient(_flat(logits), V, targets, np.stack(rows), out)
    return out.reshape(logits.shape)


def _flat(logits):
    return np.ascontiguousarray(logits).reshape(-1)


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _summarise(p, V, targets, mask, out):
    step = max(1, PIECE // V)
    for piece in prange((len(targets) + step - 1) // step):
        tail = np.empty(lane_count(p), p.dtype)
        for row in range(piece * step, min(len(targets), (piece + 1) * step)):
            first, end = row * V, (row + 1) * V
            at = first + targets[row]
            best = _largest(p, first, at - first, tail)
            best = max(best, _largest(p, at + 1, end - at - 1, tail))
            top, own = max(best, p[at]), p[at]
            Z, linear, square, xe = _sums(p, first, at, top)
            more = _sums(p, at + 1, end, top)
            x, e = own - top, math.exp(own - top)
            Z, mean = Z + more[0] + e, (linear + more[1]) / (V - 1)
            log_z = p.dtype.type(math.log(Z))
            out[0, row], out[1, row], out[2, row] = top, log_z, x - log_z
            out[3, row] = square + more[2] + own * own
            out[4, row] = (xe + more[3] + x * e) / Z - math.log(Z)
            if mask != 0:
                _released(p, first, at, end, top, log_z, mask, best, out, row)
            else:
                centre = p.dtype.type(mean)
                squares = _squares(p, first, at, top, centre)
                squares += _squares(p, at + 1, end, top, centre)
                out[5, row], out[6, row] = best - top - log_z, mean - log_z
                out[7, row] = math.sqrt(squares / max(V - 2, 1))


@njit(cache=True)
def _sums(p, first, end, top):
    """Of x = z - top: Σ e^x, Σ x, Σ z², Σ x e^x, in float64"""
    W, zero = lane_count(p), p.dtype.type(0)
    last = end - (end - first) % W
    Z = linear = square = xe = 0.0
    for block in range(first, last, BLOCK * W):
        s, t, u, v = splat(zero), splat(zero), splat(zero), splat(zero)
        for i in range(block, min(last, block + BLOCK * W), W):
            z = load(p, i)
            x = z - top
            e = exp(x)
            s, t, u, v = s + e, t + x, u + z * z, v + x * e
        Z, linear, square, xe = Z + total(s), linear + total(t), square + total(u), xe + total(v)
    for i in range(last, end):
        x = p[i] - top
        e = numeric.exp(x)
        Z, linear, square, xe = Z + e, linear + x, square + p[i] * p[i], xe + x * e
    return Z, linear, square, xe


@njit(cache=True)
def _squares(p, first, end, top, centre):
    """Σ (z - top - centre)², in float64"""
    W, squares = lane_count(p), 0.0
    last = end - (end - first) % W
    for block in range(first, last, BLOCK * W):
        s = splat(p.dtype.type(0))
        for i in range(block, min(last, block + BLOCK * W), W):
            x = load(p, i) - top - centre
            s = s + x * x
        squares += total(s)
    for i in range(last, end):
        x = p[i] - top - centre
        squares += x * x
    return squares


@njit(cache=True)
def _released(p, first, at, end, top, log_z, mask, best, out, row):
    """m, μ, σ with the wrong classes masked; the sums in the logits' own precision"""
    V, right, none = end - first, p[at] - top - log_z, p.dtype.type(0)
    s = _masked(p, first, at, top, log_z, mask, none, 1) + right
    s += _masked(p, at + 1, end, top, log_z, mask, none, 1)
    mean = p.dtype.type(s / V)
    squares = _masked(p, first, at, top, log_z, mask, mean, 2) + (right - mean) * (right - mean)
    squares += _masked(p, at + 1, end, top, log_z, mask, mean, 2)
    m = max(right, best - top - log_z - mask)
    out[5, row], out[6, row] = m, p.dtype.type(s - m) / p.dtype.type(V - 1)
    out[7, row] = math.sqrt(squares / (V - 1))


@njit(cache=True)
def _masked(p, first, end, top, log_z, mask, mean, power):
    """Σ (log p - mask - mean)^power, power 1 or 2, of short runs: what is equal adds up without
    rounding for long, so that the sum is off by an ulp or two as a pairwise one is"""
    W, s, rest = lane_count(p), p.dtype.type(0), p.dtype.type(0)
    last = end - (end - first) % W
    for block in range(first, last, BLOCK * W):
        part = p.dtype.type(0)
        for run in range(block, min(last, block + BLOCK * W), RUN * W):
            t = splat(p.dtype.type(0))
            for i in range(run, min(last, run + RUN * W), W):
                x = load(p, i) - top - log_z - mask - mean
                t = t + x * x if power == 2 else t + x
            part = part + total(t)
        s = s + part
    for i in range(last, end):
        x = p[i] - top - log_z - mask - mean
        rest = rest + (x * x if power == 2 else x)
    return s + rest


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _logit_gradient(p, V, targets, rows, out):
    step = max(1, PIECE // V)
    for piece in prange((len(targets) + step - 1) // step):
        for row in range(piece * step, min(len(targets), (piece + 1) * step)):
            first, end, W = row * V, (row + 1) * V, lane_count(p)
            top, log_z = rows[0, row], rows[1, row]
            a, b, c = rows[2, row], rows[3, row], rows[4, row]
            last = end - V % W
            for i in range(first, last, W):
                z = load(p, i)
                x = z - top - log_z
                store(out, i, exp(x) * (a + b * x) + c * z)
            for i in range(last, end):
                x = p[i] - top - log_z
                out[i] = numeric.exp(x) * (a + b * x) + c * p[i]
            out[first + targets[row]] -= rows[5, row]
