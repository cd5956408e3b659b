"""Random ListOps trees in Numba; their rules stand in data.py, literally in tests/test_data.py."""

import numpy as np
from numba import njit, prange

from ref import backend

DIGIT, OPERATOR, CLOSE = 3, 13, 17  # ids of "0", "[MIN" and "]"; data.py holds the whole vocabulary
MIN, MAX, MED, SM = range(4)
MAX_DEPTH, MAX_ARGUMENTS = 10, 10

# SplitMix64 (Steele, Lea and Flood 2014): a counter in steps of GOLDEN, seen through a bijection.
# All constants are uint64, because Numba turns uint64 with int64 into float64.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1, MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31, S32, S60, S62 = (np.uint64(n) for n in (27, 30, 31, 32, 60, 62))
LOW32, THREE = np.uint64(0xFFFFFFFF), np.uint64(3)


@njit(cache=True)
def _mix(z):
    z = (z ^ (z >> S30)) * MIX1
    z = (z ^ (z >> S27)) * MIX2
    return z ^ (z >> S31)


@njit(cache=True)
def _below(z, n):
    """0 .. n - 1 from the low 32 bits of z, uniform to a relative n / 2**32."""
    return np.int64(((z & LOW32) * np.uint64(n)) >> S32)


@njit(cache=True)
def _apply(operator, arguments, n):
    """The operator's value for arguments[:n]."""
    if operator == SM:
        return arguments[:n].sum() % 10
    ordered = np.sort(arguments[:n])
    if operator == MIN:
        return ordered[0]
    if operator == MAX:
        return ordered[n - 1]
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2


@njit(cache=True)
def _tree(state, low, high, tokens, operators, arities, filled, values):
    """Draw a tree into tokens (high,).   -> its length (0: not kept), its value, the next state.

    The operators still open stand in operators, arities, filled (MAX_DEPTH,) and their arguments in
    values (MAX_DEPTH, MAX_ARGUMENTS).
    """
    length = 1  # the least that the finished tree can have: every argument still to come counts 1
    written = depth = 0
    while True:
        state += GOLDEN
        z = _mix(state)
        if depth < MAX_DEPTH - 1 and z >> S62 == 0:
            n = 2 + _below(z, MAX_ARGUMENTS - 1)
            length += 1 + n
            if length >= high:
                return 0, 0, state
            operators[depth] = np.int64((z >> S60) & THREE)
            tokens[written] = OPERATOR + operators[depth]
            arities[depth], filled[depth] = n, 0
            written += 1
            depth += 1
            continue
        value = _below(z, 10)
        tokens[written] = DIGIT + value
        written += 1
        while depth > 0:  # hand the value up, through every operator that it completes
            top = depth - 1
            values[top, filled[top]] = value
            filled[top] += 1
            if filled[top] < arities[top]:
                break
            value = _apply(operators[top], values[top], arities[top])
            tokens[written] = CLOSE
            written += 1
            depth -= 1
        if depth == 0:
            return (length if length > low else 0), value, state


@njit(parallel=True, cache=True)
def _draw(seed, first, low, high, tokens, lengths, targets):
    for i in prange(len(lengths)):
        state = _mix(_mix(seed + GOLDEN) + np.uint64(first) + np.uint64(i))
        operators = np.empty(MAX_DEPTH, np.int64)
        arities = np.empty(MAX_DEPTH, np.int64)
        filled = np.empty(MAX_DEPTH, np.int64)
        values = np.empty((MAX_DEPTH, MAX_ARGUMENTS), np.int64)
        length = value = 0
        while length == 0:
            length, value, state = _tree(
                state, low, high, tokens[i], operators, arities, filled, values
            )
        lengths[i], targets[i] = length, value


def draw(seed, first, count, low, high):
    """Samples first .. first + count - 1 of `seed`, trees with low < length < high.

    -> tokens (count, high) uint8, lengths (count,) int64, targets (count,) int64. Sample i depends
    on seed, i, low and high alone: not on count, nor on the number of threads.
    """
    tokens = np.zeros((count, high), np.uint8)
    lengths, targets = np.empty(count, np.int64), np.empty(count, np.int64)
    # Without the compiler (NUMBA_DISABLE_JIT=1) NumPy's scalars warn where the mixer wraps around.
    with backend.parallel_lock, np.errstate(over="ignore"):
        _draw(np.uint64(seed), first, low, high, tokens, lengths, targets)
    return tokens, lengths, targets
