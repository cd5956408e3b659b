"""Numba twin of the softmax cross-entropy in ref/nn.py: three passes over a row of logits while it
is in the cache, where NumPy makes seven over all rows.

A row is one thread's work, and its exponentials are added up in float64, block by block: the
results do not depend on the number of threads, nor their rounding on the size of the vocabulary.
"""

import math

import numpy as np
from numba import config, njit, prange

from ref.backend import parallel_lock
from ref.kernels.simd import exp, lane_count, load, maximum, splat, store, total

COMPILED = not config.DISABLE_JIT  # vectors exist in compiled code only
PIECE = 1 << 15  # logits in one thread's hands, or one row of them
BLOCK = 64  # vectors that are added up in the logits' own precision


def cross_entropy(p, targets, ignore):
    """p (n, V) contiguous, float32 or float64, targets (n,), each ignored or one of the V classes
    -> loss, correct (n,): see ref.nn._cross_entropy"""
    counted, V = targets != ignore, p.shape[1]
    count, losses, correct = max(int(counted.sum()), 1), np.zeros(len(p)), np.zeros(len(p), bool)
    arrays = np.where(counted, targets, -1), 1 / count, losses, correct
    with parallel_lock:
        _cross_entropy(p.reshape(-1), V, *arrays)
    return p.dtype.type(losses.sum() / count), correct


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _cross_entropy(p, V, targets, scale, losses, correct):
    step = max(1, PIECE // V)
    for piece in prange((len(targets) + step - 1) // step):
        tail = np.empty(lane_count(p), p.dtype)
        for row in range(piece * step, min(len(targets), (piece + 1) * step)):
            first, target = row * V, row * V + targets[row]
            if targets[row] < 0:
                p[first : first + V] = 0
                continue
            own, m = p[target], _largest(p, first, V, tail)
            correct[row] = own == m and not _occurs(m, p, first, target)
            Z = _exponentials(p, first, V, m, tail)
            losses[row] = math.log(Z) - (own - m)
            _multiply(p, first, V, p.dtype.type(scale / Z))
            p[target] -= p.dtype.type(scale)


@njit(cache=True)
def _rest(p, first, V, tail):
    """The last logits of a row, too few for a vector, before lanes of -inf   -> their number"""
    W = lane_count(p)
    count = V % W
    for i in range(W):
        tail[i] = p[first + V - count + i] if i < count else -np.inf
    return count


@njit(cache=True)
def _largest(p, first, V, tail):
    W = lane_count(p)
    _rest(p, first, V, tail)
    largest = load(tail, 0)
    for i in range(first, first + V - W + 1, W):
        largest = maximum(load(p, i), largest)
    store(tail, 0, largest)
    m = tail[0]
    for i in range(1, W):
        m = max(m, tail[i])
    return m


@njit(cache=True)
def _occurs(m, p, first, end):
    """Whether a row has m before: of equal logits the first is the guess"""
    for i in range(first, end):  # noqa: SIM110  Numba has no any()
        if p[i] == m:
            return True
    return False


@njit(cache=True)
def _exponentials(p, first, V, m, tail):
    """p = exp(p - m) in a row -> their sum, in float64"""
    W = lane_count(p)
    count, last, Z = _rest(p, first, V, tail), first + V - V % W, 0.0
    for block in range(first, last, BLOCK * W):
        s = splat(p.dtype.type(0))
        for i in range(block, min(last, block + BLOCK * W), W):
            e = exp(load(p, i) - m)
            store(p, i, e)
            s = s + e
        Z += total(s)
    if count:
        e = exp(load(tail, 0) - m)
        store(tail, 0, e)
        Z += total(e)
        p[last : last + count] = tail[:count]
    return Z


@njit(cache=True)
def _multiply(p, first, V, factor):
    W = lane_count(p)
    last = first + V - V % W
    for i in range(first, last, W):
        store(p, i, load(p, i) * factor)
    for i in range(last, first + V):
        p[i] *= factor
