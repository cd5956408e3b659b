"""Launchers of mamba.cu, with the signatures and meaning of ref/kernels/mamba.py."""

from ref.backend import array_module
from ref.kernels import cuda
from ref.kernels.scan_cuda import CHANNELS, STEPS, split, states_at, states_with, sum_tiles, tiles


def _arrays(x, delta, A, B, C, D):
    """As the kernels take them"""
    xp = array_module(x)
    D = xp.zeros(x.shape[2], dtype=x.dtype) if D is None else D
    x, delta, A, D = map(xp.ascontiguousarray, (x, delta, A.T, D))
    return (x, delta, A, tiles(B), tiles(C)), D


def scan_forward(x, delta, A, B, C, D, h0):
    """x, delta (B, L, E), A (E, N), B, C (B, L, N), D (E,) or None, h0 (B, E, N) or None
    -> y (B, L, E), h_L (B, E, N), checkpoints: see ref.mamba.recurrence_forward"""
    (batch, L, E), N, xp, dtype = x.shape, A.shape[1], array_module(x), x.dtype
    chunks, span, parts = split(batch, L, E)
    sizes, launch = (batch, L, E, N, span), cuda.launcher("mamba", dtype.name)
    given, D = _arrays(x, delta, A, B, C, D)
    states = states_with(h0, 0, xp.empty((chunks + 1, batch, N, E), dtype=dtype))
    if parts > 1:
        totals = xp.empty((parts - 1, batch, E), dtype="float64")
        launch("state_ends", totals.size, *sizes, *given[:4], states, totals)
        launch("carry", batch * N * E, *sizes, 0, given[2], totals, states)
    y = xp.empty(x.shape, dtype=dtype)
    launch("scan_forward", parts * batch * E, *sizes, *given, D, states, y)
    return y, states_at(chunks, states), states


def scan_backward(dy, x, delta, A, B, C, D, checkpoints, dlast):
    """dy (B, L, E), dlast (B, E, N) or None -> dx, ddelta, dA, dB, dC, dD (None without D), dh0:
    see ref.mamba.recurrence_backward"""
    (batch, L, E), N, xp, dtype = x.shape, A.shape[1], array_module(x), x.dtype
    chunks, span, parts = split(batch, L, E)
    sizes, launch = (batch, L, E, N), cuda.launcher("mamba", dtype.name)
    (x, delta, A, B, C), skip = _arrays(x, delta, A, B, C, D)
    dy = xp.ascontiguousarray(dy)
    grads = states_with(dlast, chunks, xp.empty(checkpoints.shape, dtype=dtype))
    if parts > 1:
        totals = xp.empty((parts - 1, batch, E), dtype="float64")
        launch("grad_ends", totals.size, *sizes, span, dy, delta, A, C, grads, totals)
        launch("carry", batch * N * E, *sizes, span, 1, A, totals, grads)
    dx, ddelta = (xp.empty(x.shape, dtype=dtype) for _ in range(2))
    dA = xp.empty((parts, batch, N, E), dtype="float64")
    dD = xp.empty((parts, batch, E), dtype="float64")
    given, out = (dy, x, delta, A, B, C), (grads, dx, ddelta, dA, dD)
    launch("scan_backward", dD.size, *sizes, span, *given, skip, checkpoints, *out)
    blocks = -(-E // CHANNELS)
    dB, dC = (xp.empty((blocks, *B.shape), dtype=dtype) for _ in range(2))
    shared = *given, checkpoints, grads, dB, dC
    launch("scan_backward_shared", dB.size // STEPS, *sizes, CHANNELS, *shared)
    dA, dD = (s.sum(axis=(0, 1)).T.astype(dtype, order="C") for s in (dA, dD))
    dB, dC = sum_tiles(dB, L), sum_tiles(dC, L)
    return dx, ddelta, dA, dB, dC, None if D is None else dD, states_at(0, grads)
