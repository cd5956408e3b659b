"""What the Numba twins of the selective scans share: channels in the lanes of vectors, chunks of
time, groups of channels.

A state (E, N) is held as (blocks, N, V): V neighbouring channels are one vector, the last block is
filled up with zeros. Time is cut into chunks of `chunk_length` steps, channels into groups for the
threads; both depend on the shape only, and so do the bits of the results.
"""

import numpy as np
from numba import config, njit

from ref.kernels.simd import lane_count, lanes, load, prefetch, store

COMPILED = not config.DISABLE_JIT  # vectors exist in compiled code only


def chunk_length(N):
    """Steps from checkpoint to checkpoint: one chunk of one block stays in the second cache, and
    the checkpoints of a long sequence take about as much memory as four arrays like x or less"""
    return max(16, N // 4, min(64, 512 // N))


def channel_groups(E, N):
    """Groups of channels, each with partial sums of its own for what all channels share"""
    return -(-E // max(64, N))


def to_lanes(a):
    """(..., E, N) -> (..., blocks, N, V)"""
    *lead, E, N = a.shape
    V = lanes(a.dtype)
    padded = np.zeros((*lead, -(-E // V) * V, N), a.dtype)
    padded[..., :E, :] = a
    return np.ascontiguousarray(padded.reshape(*lead, -1, V, N).swapaxes(-1, -2))


def from_lanes(a, E):
    """(..., blocks, N, V) -> (..., E, N)"""
    *lead, blocks, N, V = a.shape
    rows = a.swapaxes(-1, -2).reshape(*lead, blocks * V, N)
    return np.ascontiguousarray(rows[..., :E, :])


def state_in_lanes(state, B, E, N, dtype):
    """A state (B, E, N), or zeros where there is none -> a fresh array (B, blocks, N, V)"""
    if state is None:
        return np.zeros((B, -(-E // lanes(dtype)), N, lanes(dtype)), dtype)
    return to_lanes(state)


def channels_in_lanes(D, E, dtype):
    """D (E,), or zeros where there is none -> (blocks * V,)"""
    padded = np.zeros(-(-E // lanes(dtype)) * lanes(dtype), dtype)
    if D is not None:
        padded[:E] = D
    return padded


def flat(*arrays):
    """1-D, contiguous and writable: one type for Numba, hence one compilation"""
    return tuple(np.require(a, requirements=["C", "W"]).reshape(-1) for a in arrays)


def sum_groups(partial):
    """(groups, ...) -> the sum over the groups in their order"""
    return partial[0] if len(partial) == 1 else partial.sum(axis=0)


@njit(cache=True)
def gather(a, first, stride, width, T, tile):
    """tile[t, :width] = a[first + t stride + ...], zeros in the other lanes"""
    V = lane_count(a)
    if width == V:
        for t in range(T):
            store(tile, t * V, load(a, first + t * stride))
    else:
        for t in range(T):
            for i in range(V):
                tile[t * V + i] = a[first + t * stride + i] if i < width else 0


@njit(cache=True)
def scatter(tile, a, first, stride, width, T):
    """a[first + t stride + ...] = tile[t, :width]"""
    V = lane_count(a)
    if width == V:
        for t in range(T):
            store(a, first + t * stride, load(tile, t * V))
    else:
        for t in range(T):
            for i in range(width):
                a[first + t * stride + i] = tile[t * V + i]


@njit(cache=True)
def prefetch_rows(a, first, stride, T):
    """Ask for the lines that a later `gather` will want; rows outside the array do no harm"""
    for t in range(T):
        prefetch(a, first + t * stride)


@njit(cache=True)
def copy(a, first, b, start, n):
    """b[start:] = a[first:], n vectors"""
    V = lane_count(a)
    for i in range(n):
        store(b, start + i * V, load(a, first + i * V))


@njit(cache=True)
def clear(a):
    """a = 0"""
    for i in range(len(a)):
        a[i] = 0
