"""Numba twin of the optimiser's update: one pass over parameter, gradient and moments."""

import math

from numba import njit, prange

from ref.backend import parallel_lock

PIECE = 1 << 14


def adamw(p, g, m, v, b1, b2, size, root, eps, keep):
    """p, g, m, v of one shape, p, m, v in place: see ref.optim.adamw_update"""
    numbers = [p.dtype.type(number) for number in (b1, b2, size, root, eps, keep)]
    with parallel_lock:
        _adamw(p.reshape(-1), g.reshape(-1), m.reshape(-1), v.reshape(-1), *numbers)


@njit(parallel=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _adamw(p, g, m, v, b1, b2, size, root, eps, keep):
    one = p.dtype.type(1)
    for piece in prange((len(p) + PIECE - 1) // PIECE):
        for i in range(piece * PIECE, min(len(p), (piece + 1) * PIECE)):
            m[i] += (one - b1) * (g[i] - m[i])
            v[i] += (one - b2) * (g[i] * g[i] - v[i])
            p[i] = p[i] * keep - size * m[i] / (math.sqrt(v[i]) * root + eps)
