"""Numba twins of the selective scan in ref/mamba.py, forward and backward in one pass each.

    h_t = a_t h_{t-1} + u_t B_t,  a_t = exp(delta_t A),  u_t = delta_t x_t,  y_t = h_t C_t + D x_t

V channels lie side by side in a vector. The forward keeps the state at the start of every chunk of
T steps; the backward goes through the chunks from the last to the first and recomputes from these
checkpoints what it needs of one chunk and one block of V channels: the decays a_t and the decayed
states p_t = a_t h_{t-1}. With g the running gradient of the state:

    g += dy_t C_t,   dB_t = Σ g u_t,   dC_t = Σ dy_t h_t               sums over the channels
    w = g p_t,       dA += w delta_t,  dD += x_t dy_t
    r = Σ g B_t,     dx_t = delta_t r + D dy_t,  ddelta_t = x_t r + Σ w A       over the state
    g = g a_t

One task of the threads is one sequence and one group of channels: see ref/kernels/scan.py.
"""

import numpy as np
from numba import njit, prange

from ref.backend import empty, parallel_lock
from ref.kernels.scan import (
    COMPILED,  # noqa: F401, read by ref.backend.twins
    channel_groups,
    channels_in_lanes,
    chunk_length,
    clear,
    copy,
    flat,
    from_lanes,
    gather,
    prefetch_rows,
    scatter,
    state_in_lanes,
    sum_groups,
    to_lanes,
)
from ref.kernels.simd import (
    any_greater,
    exp2_product,
    exp2_product_guarded,
    fma,
    fold,
    lane_count,
    lanes,
    load,
    load_half,
    splat,
    store,
    total,
)

LOG2E = 1.4426950408889634
SAFE = 120  # |log2 of a decay| up to which exp2_product needs no guard


def scan_forward(x, delta, A, B, C, D, h0):
    """x, delta (B,L,E), A (E,N), B, C (B,L,N), D (E,) or None, h0 (B,E,N) or None
    -> y (B,L,E), h_L (B,E,N), checkpoints for scan_backward
    """
    (batch, L, E), N, dtype = x.shape, A.shape[1], x.dtype
    h, y = state_in_lanes(h0, batch, E, N, dtype), empty(x.shape, dtype)
    checkpoints = empty((batch, -(-L // chunk_length(N)), *h.shape[1:]), dtype)
    sizes = batch, L, E, N, chunk_length(N), channel_groups(E, N)
    inputs = *flat(x, delta, B, C), *_log2_decay(A), channels_in_lanes(D, E, dtype)
    with parallel_lock:
        _forward(sizes, *inputs, *flat(h, y, checkpoints))
    return y, from_lanes(h, E), checkpoints


def scan_backward(dy, x, delta, A, B, C, D, checkpoints, dlast):
    """dy (B,L,E), dlast (B,E,N) or None: the gradients of y and h_L
    -> dx, ddelta, dA, dB, dC, dD, dh0; dD is None where D is
    """
    (batch, L, E), N, dtype = x.shape, A.shape[1], x.dtype
    groups, V = channel_groups(E, N), lanes(dtype)
    dh = state_in_lanes(dlast, batch, E, N, dtype)
    dx, ddelta = empty(x.shape, dtype), empty(x.shape, dtype)
    dA, dD = np.zeros(dh.shape, dtype), np.zeros((batch, dh.shape[1] * V), dtype)
    dB, dC = (empty((groups, batch, L, N), dtype) for _ in range(2))
    sizes = batch, L, E, N, chunk_length(N), groups
    inputs = *flat(dy, x, delta, B, C, to_lanes(A)), *_log2_decay(A), channels_in_lanes(D, E, dtype)
    with parallel_lock:
        _backward(sizes, *inputs, *flat(checkpoints, dh, dx, ddelta, dA, dB, dC, dD))
    dA, dD = from_lanes(dA.sum(axis=0), E), None if D is None else dD.sum(axis=0)[:E]
    return dx, ddelta, dA, sum_groups(dB), sum_groups(dC), dD, from_lanes(dh, E)


def _log2_decay(A):
    """-> A log2(e) in lanes, and its largest magnitude for each channel, both flat"""
    with np.errstate(over="ignore"):
        A2 = to_lanes(A * A.dtype.type(LOG2E))
    return flat(A2, np.abs(A2).max(axis=1))


@njit(cache=True)
def _needs_guard(deltas, reach, T):
    """Whether a decay in the tile deltas (T, V) may be out of the range of exp2_product"""
    V, guard, safe = lane_count(deltas), False, splat(deltas.dtype.type(SAFE))
    for t in range(T):
        guard |= any_greater(abs(load(deltas, t * V)) * reach, safe)
    return guard


@njit(cache=True)
def _decay(delta, A2, guard):
    return exp2_product_guarded(delta, A2) if guard else exp2_product(delta, A2)


@njit(parallel=True, cache=True, error_model="numpy")
def _forward(sizes, x, delta, B, C, A2, reach, D, h, y, checkpoints):
    batch, L, E, N, T, groups = sizes
    V = lane_count(x)
    chunks, blocks, size = (L + T - 1) // T, (E + V - 1) // V, N * V
    for task in prange(batch * groups):
        b, group = task // groups, task % groups
        xs, deltas = np.empty(T * V, x.dtype), np.empty(T * V, x.dtype)
        for chunk in range(chunks):
            row, steps = b * L + chunk * T, min(T, L - chunk * T)
            for block in range(group * blocks // groups, (group + 1) * blocks // groups):
                first, width = row * E + block * V, min(V, E - block * V)
                gather(x, first, E, width, steps, xs)
                gather(delta, first, E, width, steps, deltas)
                prefetch_rows(x, first + T * E, E, T)
                prefetch_rows(delta, first + T * E, E, T)
                own = b * blocks + block
                saved = (own + (b * (chunks - 1) + chunk) * blocks) * size
                copy(h, own * size, checkpoints, saved, N)
                guard = _needs_guard(deltas, load(reach, block * V), steps)
                for t in range(steps):
                    _forward_step(
                        xs, deltas, t * V, A2, block * size, B, C, (row + t) * N,
                        load(D, block * V), h, own * size, N, guard,
                    )  # fmt: skip
                scatter(xs, y, first, E, width, steps)


@njit(cache=True)
def _forward_step(xs, deltas, i, A2, a, B, C, bc, D, h, s, N, guard):
    """One time step of V channels; xs[i:], deltas[i:] are its inputs, xs[i:] becomes y"""
    V = lane_count(xs)
    delta, x = load(deltas, i), load(xs, i)
    u, y = delta * x, D * x
    for n in range(N):
        decay = _decay(delta, load(A2, a + n * V), guard)
        state = fma(decay, load(h, s + n * V), u * B[bc + n])
        store(h, s + n * V, state)
        y = fma(state, C[bc + n], y)
    store(xs, i, y)


@njit(parallel=True, cache=True, error_model="numpy")
def _backward(
    sizes, dy, x, delta, B, C, A, A2, reach, D, checkpoints, dh, dx, ddelta, dA, dB, dC, dD
):
    batch, L, E, N, T, groups = sizes
    V = lane_count(x)
    chunks, blocks, size = (L + T - 1) // T, (E + V - 1) // V, N * V
    for task in prange(batch * groups):
        b, group = task // groups, task % groups
        tile, dtype = T * V, x.dtype
        xs, us = np.empty(tile, dtype), np.empty(tile, dtype)
        deltas, dys = np.empty(tile, dtype), np.empty(tile, dtype)
        h, dAs = np.empty(size, dtype), np.empty(size, dtype)
        decays, decayed = np.empty(T * size, dtype), np.empty(T * size, dtype)
        dBs, dCs = np.empty(T * size // 2, dtype), np.empty(T * size // 2, dtype)
        for chunk in range(chunks - 1, -1, -1):
            row, steps = b * L + chunk * T, min(T, L - chunk * T)
            clear(dBs)
            clear(dCs)
            for block in range(group * blocks // groups, (group + 1) * blocks // groups):
                first, width = row * E + block * V, min(V, E - block * V)
                gather(x, first, E, width, steps, xs)
                gather(delta, first, E, width, steps, deltas)
                gather(dy, first, E, width, steps, dys)
                prefetch_rows(x, first - T * E, E, T)
                prefetch_rows(delta, first - T * E, E, T)
                prefetch_rows(dy, first - T * E, E, T)
                own = b * blocks + block
                saved = (own + (b * (chunks - 1) + chunk) * blocks) * size
                copy(checkpoints, saved, h, 0, N)
                prefetch_rows(checkpoints, saved - blocks * size, V, N)
                clear(dAs)
                guard = _needs_guard(deltas, load(reach, block * V), steps)
                add_D = splat(x.dtype.type(0))
                for t in range(steps):
                    add_D = fma(load(xs, t * V), load(dys, t * V), add_D)
                    store(us, t * V, load(xs, t * V) * load(deltas, t * V))
                    _recompute_step(
                        us, deltas, dys, t * V, A2, block * size, B, (row + t) * N,
                        h, decays, decayed, dCs, t * size, N, guard,
                    )  # fmt: skip
                for t in range(steps - 1, -1, -1):
                    _reverse_step(
                        xs, us, deltas, dys, t * V, A, block * size, B, C, (row + t) * N,
                        load(D, block * V), dh, own * size, decays, decayed, dBs, dAs,
                        t * size, N,
                    )  # fmt: skip
                store(dD, own * V, load(dD, own * V) + add_D)
                for n in range(N):
                    i = own * size + n * V
                    store(dA, i, load(dA, i) + load(dAs, n * V))
                scatter(xs, dx, first, E, width, steps)
                scatter(deltas, ddelta, first, E, width, steps)
            out = (group * batch * L + row) * N
            for i in range(steps * N):
                dB[out + i] = total(load_half(dBs, i * V // 2))
                dC[out + i] = total(load_half(dCs, i * V // 2))


@njit(cache=True)
def _recompute_step(us, deltas, dys, i, A2, a, B, bc, h, decays, decayed, dCs, k, N, guard):
    """One step of V channels forward; the decays and the decayed states are kept from k on"""
    V = lane_count(us)
    delta, u, dy = load(deltas, i), load(us, i), load(dys, i)
    for n in range(N):
        decay = _decay(delta, load(A2, a + n * V), guard)
        p = decay * load(h, n * V)
        state = fma(u, B[bc + n], p)
        store(decays, k + n * V, decay)
        store(decayed, k + n * V, p)
        store(h, n * V, state)
        c = (k + n * V) // 2
        store(dCs, c, load_half(dCs, c) + fold(dy * state))


@njit(cache=True)
def _reverse_step(
    xs, us, deltas, dys, i, A, a, B, C, bc, D, dh, s, decays, decayed, dBs, dAs, k, N
):
    """One step of V channels backward; xs[i:] becomes dx, deltas[i:] ddelta"""
    V = lane_count(xs)
    delta, u, dy, x = load(deltas, i), load(us, i), load(dys, i), load(xs, i)
    du, ddecay = splat(xs.dtype.type(0)), splat(xs.dtype.type(0))
    for n in range(N):
        g = fma(dy, C[bc + n], load(dh, s + n * V))
        du = fma(g, B[bc + n], du)
        w = g * load(decayed, k + n * V)
        ddecay = fma(w, load(A, a + n * V), ddecay)
        store(dAs, n * V, fma(w, delta, load(dAs, n * V)))
        store(dh, s + n * V, g * load(decays, k + n * V))
        b = (k + n * V) // 2
        store(dBs, b, load_half(dBs, b) + fold(g * u))
    store(xs, i, fma(du, delta, dy * D))
    store(deltas, i, fma(du, x, ddecay))
