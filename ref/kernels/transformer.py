"""Numba twins of ref/transformer.py: what happens to a block of scores between two products.

One pass over the scores where NumPy makes several. A row of scores is one thread's work, so the
results do not depend on the number of threads.
"""

import math

import numpy as np
from numba import njit, prange

from ref.backend import parallel_lock
from ref.kernels.numeric import exp


def exponentials_in_place(S, seen):
    """See ref.transformer._exponentials; the first result takes the place of S"""
    total, log_total = np.empty((2, *S.shape[:3]), S.dtype)
    with parallel_lock:
        _exponentials(S, _per_row(seen, S), total, log_total)
    return S, total, log_total


def weights_in_place(S, dP, log_total, inner, seen):
    """See ref.transformer._weights; the results take the places of S and dP"""
    with parallel_lock:
        _weights(S, dP, *map(np.ascontiguousarray, (log_total, inner)), _per_row(seen, S))
    return S, dP


def _per_row(seen, S):
    """seen (B or 1, n) -> (B, n)"""
    return np.ascontiguousarray(np.broadcast_to(seen, (S.shape[0], S.shape[2])), np.int64)


@njit(cache=True, fastmath={"nnan", "nsz"}, error_model="numpy")
def _largest(x):
    """The largest element of x. With NaN among them any of them: the exponentials show it."""
    m = x[0]
    for j in range(1, len(x)):
        m = max(m, x[j])
    return m


@njit(parallel=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _exponentials(S, seen, total, log_total):
    B, H, R, K = S.shape
    for row in prange(B * H * R):
        b, h, i = row // (H * R), row // R % H, row % R
        n, scores = min(seen[b, i], K), S[b, h, i]
        largest, z = _largest(scores[:n]), S.dtype.type(0)
        for j in range(n):
            e = exp(scores[j] - largest)
            scores[j] = e
            z += e
        scores[n:] = 0
        total[b, h, i], log_total[b, h, i] = z, largest + math.log(z)


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _weights(S, dP, log_total, inner, seen):
    B, H, R, K = S.shape
    for row in prange(B * H * R):
        b, h, i = row // (H * R), row // R % H, row % R
        n, scores, slopes = min(seen[b, i], K), S[b, h, i], dP[b, h, i]
        for j in range(n):
            p = exp(scores[j] - log_total[b, h, i])
            scores[j] = p
            slopes[j] = p * (slopes[j] - inner[b, h, i])
        scores[n:] = 0
        slopes[n:] = 0
