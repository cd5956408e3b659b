"""Launchers of longhorn.cu, with the signatures and meaning of ref/kernels/longhorn.py."""

from ref.backend import array_module
from ref.kernels import cuda
from ref.kernels.scan_cuda import CHANNELS, STEPS, split, states_at, states_with, sum_tiles, tiles


def _arrays(x, beta, k, q, D):
    """As the kernels take them: x, delta, shrink, k, others, q, and D"""
    (B, L, E), xp, dtype = x.shape, array_module(x), x.dtype
    squares, others = k * k, xp.zeros(k.shape, dtype=dtype)
    others[..., 1:] += xp.cumsum(squares[..., :-1], axis=-1)
    others[..., :-1] += xp.cumsum(squares[..., :0:-1], axis=-1)[..., ::-1]
    D = xp.zeros(E, dtype=dtype) if D is None else D
    x, beta, D, kappa = map(xp.ascontiguousarray, (x, beta, D, squares.sum(axis=-1)))
    delta, shrink = (xp.empty(x.shape, dtype=dtype) for _ in range(2))
    launch = cuda.launcher("longhorn", dtype.name)
    launch("step_sizes", x.size, B, L, E, beta, kappa, delta, shrink)
    return (x, delta, shrink, tiles(k), tiles(others), tiles(q)), D


def scan_forward(x, beta, k, q, D, s0):
    """x, beta (B, L, E), k, q (B, L, N), D (E,) or None, s0 (B, E, N) or None
    -> y (B, L, E), S_L (B, E, N), checkpoints: see ref.longhorn.recurrence_forward"""
    (B, L, E), N, xp, dtype = x.shape, k.shape[2], array_module(x), x.dtype
    chunks, span, parts = split(B, L, E)
    sizes, launch = (B, L, E, N, span), cuda.launcher("longhorn", dtype.name)
    given, D = _arrays(x, beta, k, q, D)
    states = states_with(s0, 0, xp.empty((chunks + 1, B, N, E), dtype=dtype))
    if parts > 1:
        decays = xp.empty((parts - 1, B, N, E), dtype=dtype)
        launch("state_ends", (parts - 1) * B * E, *sizes, *given[:5], states, decays)
        launch("carry", B * N * E, *sizes, 0, decays, states)
    y = xp.empty(x.shape, dtype=dtype)
    launch("scan_forward", parts * B * E, *sizes, *given, D, states, y)
    return y, states_at(chunks, states), states


def scan_backward(dy, x, beta, k, q, D, checkpoints, dlast):
    """dy (B, L, E), dlast (B, E, N) or None -> dx, dbeta, dk, dq, dD (None without D), dS0:
    see ref.longhorn.recurrence_backward"""
    (B, L, E), N, xp, dtype = x.shape, k.shape[2], array_module(x), x.dtype
    chunks, span, parts = split(B, L, E)
    sizes, launch = (B, L, E, N), cuda.launcher("longhorn", dtype.name)
    (x, delta, shrink, k, others, q), skip = _arrays(x, beta, k, q, D)
    dy = xp.ascontiguousarray(dy)
    grads = states_with(dlast, chunks, xp.empty(checkpoints.shape, dtype=dtype))
    if parts > 1:
        decays = xp.empty((parts - 1, B, N, E), dtype=dtype)
        given = dy, delta, shrink, others, q
        launch("grad_ends", (parts - 1) * B * E, *sizes, span, *given, grads, decays)
        launch("carry", B * N * E, *sizes, span, 1, decays, grads)
    dx, dbeta, stepped = (xp.empty(x.shape, dtype=dtype) for _ in range(3))
    dD, given = xp.empty((parts, B, E), dtype="float64"), (dy, x, delta, shrink, k, others, q)
    out = grads, dx, dbeta, stepped, dD
    launch("scan_backward", dD.size, *sizes, span, *given, skip, checkpoints, *out)
    blocks = -(-E // CHANNELS)
    dk, dq = (xp.empty((blocks, *k.shape), dtype=dtype) for _ in range(2))
    shared = *given, stepped, checkpoints, grads, dk, dq
    launch("scan_backward_shared", dk.size // STEPS, *sizes, CHANNELS, *shared)
    dD = None if D is None else dD.sum(axis=(0, 1)).astype(dtype)
    return dx, dbeta, sum_tiles(dk, L), sum_tiles(dq, L), dD, states_at(0, grads)
