"""Numba twin of ref/etsc.py: one step of the recurrence in one pass over the state.

float64 inside, whatever the state's precision. One channel of one sequence is one thread's work:
the results do not depend on the number of threads. λ shared by all channels is read as one row.
"""

import numpy as np
from numba import njit, prange

from ref.backend import empty, parallel_lock


def step(lam, b, d, x, u):
    """lam (C or 1, n), b (C, n), d (C,), x (B, C), u (B, C, n) -> y (B, C), u (B, C, n)"""
    y, after = empty(x.shape, d.dtype), empty(u.shape, u.dtype)
    arrays = (np.ascontiguousarray(a) for a in (lam, b, d, x, u))
    with parallel_lock:
        _step(*arrays, y, after)
    return y, after


@njit(parallel=True, cache=True, error_model="numpy")
def _step(lam, b, d, x, u, y, after):
    B, C, _ = u.shape
    for i in prange(B * C):  # the sequences of one channel are neighbours: they share λ and b
        c, s = i // B, i % B
        total = _row(lam[c if len(lam) > 1 else 0], b[c], np.float64(x[s, c]), u[s, c], after[s, c])
        y[s, c] = total + d[c] * x[s, c]


@njit(cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _row(lam, b, x, u, after):
    total = 0.0
    for k in range(len(u)):
        v = lam[k] * u[k] + b[k] * x
        after[k] = v
        total += v.real
    return total
