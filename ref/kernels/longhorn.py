"""Numba twins of the scan in ref/longhorn.py, forward and backward in one pass each.

With Delta_t = beta_t e_t, e_t = 1 / (1 + beta_t κ_t) and κ_t = k_t·k_t the decay of equation (4) is

    1 - Delta_t k_n² = e_t + Delta_t (κ_t - k_n²),

a sum without cancellation, κ_t - k_n² being the sum of the other squares. V channels lie side by
side in a vector. The forward keeps the state at the start of every chunk of T steps; the backward
goes through the chunks from the last to the first and recomputes the states of one chunk and one
block of V channels from these checkpoints. With g the running gradient of the state:

    g += dy_t q_t,   dq_t = Σ dy_t S_t                                     sums over the channels
    dx_t = Delta_t Σ g k + D dy_t,   dDelta_t = Σ g k (x_t - k S_{t-1})    sums over the state
    dk_t = Σ g Delta_t (x_t - 2 k S_{t-1}) - 2 k Σ dDelta_t Delta_t²       sums over the channels
    dbeta_t = dDelta_t e_t²,   g = g (decay)

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
)
from ref.kernels.simd import fma, fold, lane_count, lanes, load, load_half, splat, store, total


def scan_forward(x, beta, k, q, D, s0):
    """x, beta (B,L,E), k, q (B,L,N), D (E,) or None, s0 (B,E,N) or None
    -> y (B,L,E), S_L (B,E,N), checkpoints for scan_backward
    """
    (batch, L, E), N, dtype = x.shape, k.shape[2], x.dtype
    S, y = state_in_lanes(s0, batch, E, N, dtype), empty(x.shape, dtype)
    checkpoints = empty((batch, -(-L // chunk_length(N)), *S.shape[1:]), dtype)
    sizes = batch, L, E, N, chunk_length(N), channel_groups(E, N)
    x, beta, k, q = flat(x, beta, k, q)
    with parallel_lock:
        inputs = x, beta, k, *_squares(k, N), q, channels_in_lanes(D, E, dtype)
        _forward(sizes, *inputs, *flat(S, y, checkpoints))
    return y, from_lanes(S, E), checkpoints


def scan_backward(dy, x, beta, k, q, D, checkpoints, dlast):
    """dy (B,L,E), dlast (B,E,N) or None: the gradients of y and S_L
    -> dx, dbeta, dk, dq, dD, ds0; dD is None where D is
    """
    (batch, L, E), N, dtype = x.shape, k.shape[2], x.dtype
    groups, V = channel_groups(E, N), lanes(dtype)
    dS = state_in_lanes(dlast, batch, E, N, dtype)
    dx, dbeta = empty(x.shape, dtype), empty(x.shape, dtype)
    dD = np.zeros((batch, dS.shape[1] * V), dtype)
    dk, dq = (empty((groups, batch, L, N), dtype) for _ in range(2))
    sizes = batch, L, E, N, chunk_length(N), groups
    dy, x, beta, k, q = flat(dy, x, beta, k, q)
    with parallel_lock:
        inputs = dy, x, beta, k, *_squares(k, N), q, channels_in_lanes(D, E, dtype)
        _backward(sizes, *inputs, *flat(checkpoints, dS, dx, dbeta, dk, dq, dD))
    dD = None if D is None else dD.sum(axis=0)[:E]
    return dx, dbeta, sum_groups(dk), sum_groups(dq), dD, from_lanes(dS, E)


def _squares(k, N):
    """k (B L N) -> κ (B L), and the sum of the other squares for each k (B L N)"""
    kappa, others = empty(len(k) // N, k.dtype), empty(len(k), k.dtype)
    _sum_squares(k, kappa, others)
    return kappa, others


@njit(parallel=True, cache=True)
def _sum_squares(k, kappa, others):
    N = len(k) // len(kappa)
    for row in prange(len(kappa)):
        before, after = k.dtype.type(0), k.dtype.type(0)
        for i in range(row * N, (row + 1) * N):
            others[i] = before
            before += k[i] * k[i]
        kappa[row] = before
        for i in range((row + 1) * N - 1, row * N - 1, -1):
            others[i] += after
            after += k[i] * k[i]


@njit(parallel=True, cache=True, error_model="numpy")
def _forward(sizes, x, beta, k, kappa, others, q, D, S, y, checkpoints):
    batch, L, E, N, T, groups = sizes
    V = lane_count(x)
    chunks, blocks, size = (L + T - 1) // T, (E + V - 1) // V, N * V
    for task in prange(batch * groups):
        b, group = task // groups, task % groups
        xs, betas = np.empty(T * V, x.dtype), np.empty(T * V, x.dtype)
        for chunk in range(chunks):
            row, steps = b * L + chunk * T, min(T, L - chunk * T)
            for block in range(group * blocks // groups, (group + 1) * blocks // groups):
                first, width = row * E + block * V, min(V, E - block * V)
                gather(x, first, E, width, steps, xs)
                gather(beta, first, E, width, steps, betas)
                prefetch_rows(x, first + T * E, E, T)
                prefetch_rows(beta, first + T * E, E, T)
                own = b * blocks + block
                saved = (own + (b * (chunks - 1) + chunk) * blocks) * size
                copy(S, own * size, checkpoints, saved, N)
                for t in range(steps):
                    _forward_step(
                        xs, betas, t * V, k, kappa[row + t], others, q, (row + t) * N,
                        load(D, block * V), S, own * size, N,
                    )  # fmt: skip
                scatter(xs, y, first, E, width, steps)


@njit(cache=True)
def _forward_step(xs, betas, i, k, kappa, others, q, kq, D, S, s, N):
    """One time step of V channels; xs[i:], betas[i:] are its inputs, xs[i:] becomes y"""
    V = lane_count(xs)
    beta, x = load(betas, i), load(xs, i)
    e = 1 / (1 + beta * kappa)
    Delta = beta * e
    u, y = Delta * x, D * x
    for n in range(N):
        decay = fma(Delta, others[kq + n], e)
        state = fma(decay, load(S, s + n * V), u * k[kq + n])
        store(S, s + n * V, state)
        y = fma(state, q[kq + n], y)
    store(xs, i, y)


@njit(parallel=True, cache=True, error_model="numpy")
def _backward(sizes, dy, x, beta, k, kappa, others, q, D, checkpoints, dS, dx, dbeta, dk, dq, dD):
    batch, L, E, N, T, groups = sizes
    V = lane_count(x)
    chunks, blocks, size = (L + T - 1) // T, (E + V - 1) // V, N * V
    for task in prange(batch * groups):
        b, group = task // groups, task % groups
        tile, dtype = T * V, x.dtype
        xs, dys, es = np.empty(tile, dtype), np.empty(tile, dtype), np.empty(tile, dtype)
        Deltas, dkappas = np.empty(tile, dtype), np.empty(tile, dtype)
        states = np.empty((T + 1) * size, dtype)
        dks, dqs = np.empty(T * size // 2, dtype), np.empty(T * size // 2, dtype)
        for chunk in range(chunks - 1, -1, -1):
            row, steps = b * L + chunk * T, min(T, L - chunk * T)
            clear(dks)
            clear(dqs)
            clear(dkappas)
            for block in range(group * blocks // groups, (group + 1) * blocks // groups):
                first, width = row * E + block * V, min(V, E - block * V)
                gather(x, first, E, width, steps, xs)
                gather(beta, first, E, width, steps, Deltas)
                gather(dy, first, E, width, steps, dys)
                prefetch_rows(x, first - T * E, E, T)
                prefetch_rows(beta, first - T * E, E, T)
                prefetch_rows(dy, first - T * E, E, T)
                own = b * blocks + block
                saved = (own + (b * (chunks - 1) + chunk) * blocks) * size
                copy(checkpoints, saved, states, 0, N)
                prefetch_rows(checkpoints, saved - blocks * size, V, N)
                add_D = splat(x.dtype.type(0))
                for t in range(steps):
                    add_D = fma(load(xs, t * V), load(dys, t * V), add_D)
                    _recompute_step(
                        xs, Deltas, es, dys, t * V, k, kappa[row + t], others, (row + t) * N,
                        states, dqs, t * size, N,
                    )  # fmt: skip
                for t in range(steps - 1, -1, -1):
                    _reverse_step(
                        xs, Deltas, es, dys, t * V, k, others, q, (row + t) * N,
                        load(D, block * V), dS, own * size, states, dks, dkappas, t * size, N,
                    )  # fmt: skip
                store(dD, own * V, load(dD, own * V) + add_D)
                scatter(xs, dx, first, E, width, steps)
                scatter(Deltas, dbeta, first, E, width, steps)
            out = (group * batch * L + row) * N
            for t in range(steps):
                dkappa = total(load(dkappas, t * V))
                for n in range(t * N, (t + 1) * N):
                    own_k = total(load_half(dks, n * V // 2))
                    dk[out + n] = own_k - 2 * dkappa * k[row * N + n]
                    dq[out + n] = total(load_half(dqs, n * V // 2))


@njit(cache=True)
def _recompute_step(xs, Deltas, es, dys, i, k, kappa, others, kq, states, dqs, j, N):
    """One step of V channels forward from states[j:]; Deltas[i:] is beta and becomes Delta"""
    V = lane_count(xs)
    beta, x, dy = load(Deltas, i), load(xs, i), load(dys, i)
    e = 1 / (1 + beta * kappa)
    Delta = beta * e
    u = Delta * x
    store(es, i, e)
    store(Deltas, i, Delta)
    for n in range(N):
        decay = fma(Delta, others[kq + n], e)
        state = fma(decay, load(states, j + n * V), u * k[kq + n])
        store(states, j + (N + n) * V, state)
        c = (j + n * V) // 2
        store(dqs, c, load_half(dqs, c) + fold(dy * state))


@njit(cache=True)
def _reverse_step(xs, Deltas, es, dys, i, k, others, q, kq, D, dS, s, states, dks, dkappas, j, N):
    """One step of V channels backward; xs[i:] becomes dx, Deltas[i:] dbeta"""
    V = lane_count(xs)
    Delta, e, dy, x = load(Deltas, i), load(es, i), load(dys, i), load(xs, i)
    du, dDelta = splat(xs.dtype.type(0)), splat(xs.dtype.type(0))
    for n in range(N):
        g = fma(dy, q[kq + n], load(dS, s + n * V))
        gk = g * k[kq + n]
        du = du + gk
        recalled = load(states, j + n * V) * k[kq + n]
        missing = x - recalled
        dDelta = fma(gk, missing, dDelta)
        store(dS, s + n * V, g * fma(Delta, others[kq + n], e))
        c = (j + n * V) // 2
        store(dks, c, load_half(dks, c) + fold(g * Delta * (missing - recalled)))
    store(dkappas, i, fma(dDelta * Delta, Delta, load(dkappas, i)))
    store(xs, i, fma(du, Delta, dy * D))
    store(Deltas, i, dDelta * e * e)
