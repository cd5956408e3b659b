"""Random Pathfinder images in Numba: do the two marked ends belong to one path?

In the spirit of Linsley et al. 2018 (arXiv:1805.08315) and of the Long Range Arena's hard level,
but ours. Two long paths of dashes and some short ones wind through the image without touching; two
ends of the long ones carry a disc. Whatever is lit is drawn before the label. An image is kept only
if it has two ends of one path and two ends of both that are about as far apart and about as far
from the middle; the label then says which of these pairs is marked. So neither the amount of light
nor the places of the two discs tell the label.

Lengths are in cells, 1/32 of the image's side: image i at another resolution shows the same paths.
"""

import math

import numpy as np
from numba import njit, prange

from ref import backend
from ref.kernels.listops import GOLDEN, _mix

CELLS = 32.0
LONG, SHORT, SHORT_PATHS = 14, 14 // 3, 6  # dashes of the two long paths and of the short ones
DASHES = 2 * LONG + SHORT_PATHS * SHORT
DASH, GAP = 1.5, 1.2  # lengths of a dash and of what lies between two of them
CLEAR = 1.9  # least distance between dashes
CLEAR_END = 2.7  # least distance of other dashes from an end of a long path
MARGIN = 1.5  # least distance of a dash from the image's border
EASY, HARD = 1.8, 0.8  # continuity, uniform: a dash turns by at most BEND / continuity
BEND = 1.1  # radians; small turns are more frequent
TURNS, STARTS = 12, 60  # attempts at a dash and at a path, before what was drawn is given up
EQUAL_APART, EQUAL_OFF = 1.0, 1.4  # differences of two pairs of ends that count as none
WIDTH, DISC = {32: 1.0, 128: 2.0}, {32: 1.3, 128: 3.5}  # of a dash; radius; pixels, by side
S11 = np.uint64(11)


@njit(cache=True)
def _uniform(state):
    """-> the next state, a number in [0, 1)."""
    state += GOLDEN
    return state, float(_mix(state) >> S11) * 2.0**-53


@njit(cache=True)
def _squared(x, y, dash):
    """Squared distance of a point from a dash (x0, y0, x1, y1), which may be a point itself."""
    x0, y0, x1, y1 = dash[0], dash[1], dash[2], dash[3]
    along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) * (1 / DASH**2)
    along = min(max(along, 0.0), 1.0)
    dx, dy = x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)
    return dx * dx + dy * dy


@njit(cache=True)
def _fits(dash, dashes, n, ends, e, k, last):
    """Whether a dash may follow dashes[:n], as dash k of its path, whose end it is if last.

    ends[:e] are those of the long paths so far that it has to keep its distance from.
    """
    x0, y0, x1, y1 = dash
    if min(x0, y0, x1, y1) < MARGIN or max(x0, y0, x1, y1) > CELLS - MARGIN:
        return False
    for i in range(e):
        if _squared(ends[i, 0], ends[i, 1], dash) < CLEAR_END**2:
            return False
    clear_0 = CLEAR_END if k == 0 and last >= 0 else CLEAR
    clear_1 = CLEAR_END if k == last else CLEAR
    for i in range(n - min(k, 1)):  # the dash before it is near by construction
        dx = x0 + x1 - dashes[i, 0] - dashes[i, 2]
        dy = y0 + y1 - dashes[i, 1] - dashes[i, 3]
        if dx * dx + dy * dy > (2 * (CLEAR_END + DASH)) ** 2:  # their middles are far apart
            continue
        other = dashes[i]
        # Dashes are shorter than twice the least distance: those that cross are found as well.
        if (
            _squared(x0, y0, other) < clear_0**2
            or _squared(x1, y1, other) < clear_1**2
            or _squared(other[0], other[1], dash) < CLEAR**2
            or _squared(other[2], other[3], dash) < CLEAR**2
        ):
            return False
    return True


@njit(cache=True)
def _path(state, length, bend, dashes, n, ends, e):
    """Try to draw a path into dashes[n : n + length].   -> the next state, whether it is there.

    ends[:e] are the ends of the long paths before it.
    """
    last = length - 1 if length == LONG else -1
    state, x = _uniform(state)
    state, y = _uniform(state)
    state, turn = _uniform(state)
    x, y = MARGIN + (CELLS - 2 * MARGIN) * x, MARGIN + (CELLS - 2 * MARGIN) * y
    angle = 2 * math.pi * turn
    for k in range(length):
        for attempt in range(TURNS):
            state, a = _uniform(state)
            state, b = _uniform(state)
            new = angle + (bend * (a + b - 1) if k else 0.0)
            dx, dy, gap = math.cos(new), math.sin(new), GAP if k else 0.0
            x0, y0 = x + gap * dx, y + gap * dy
            dash = (x0, y0, x0 + DASH * dx, y0 + DASH * dy)
            # Its own beginning is behind a path's second dash, and in the way of the later ones.
            kept = e + 1 if last >= 0 and k >= 2 else e
            if _fits(dash, dashes, n + k, ends, kept, k, last):
                break
            if k == 0 or attempt == TURNS - 1:
                return state, False
        dashes[n + k] = dash
        angle, x, y = new, dash[2], dash[3]
        if last >= 0 and k == 0:
            ends[e] = dash[0], dash[1]
        if k == last:
            ends[e + 1] = x, y
    return state, True


@njit(cache=True)
def _paths(state, count, length, bend, dashes, n, ends, e):
    """Draw `count` paths.   -> the next state, whether they are there."""
    for i in range(count):
        for _ in range(STARTS):
            at = e + 2 * i if length == LONG else e
            state, there = _path(state, length, bend, dashes, n + i * length, ends, at)
            if there:
                break
        else:
            return state, False
    return state, True


@njit(cache=True)
def _pair(p, q):
    """Of two ends (2,): how far they are apart, and how far the image's middle is from theirs."""
    half = CELLS / 2
    return (
        math.hypot(p[0] - q[0], p[1] - q[1]),
        math.hypot((p[0] + q[0]) / 2 - half, (p[1] + q[1]) / 2 - half),
    )


@njit(cache=True)
def _marks(state, ends):
    """-> the next state, ends p and q of one path, r and s of both that lie alike; p = -1: none."""
    found, kept = 0, (-1, -1, -1, -1)
    for p in (0, 2):
        apart, off = _pair(ends[p], ends[p + 1])
        for r in (0, 1):
            for s in (2, 3):
                apart_2, off_2 = _pair(ends[r], ends[s])
                if abs(apart - apart_2) < EQUAL_APART and abs(off - off_2) < EQUAL_OFF:
                    found += 1
                    state, u = _uniform(state)
                    if u * found < 1:  # each of those found is kept with the same probability
                        kept = p, p + 1, r, s
    return state, kept


@njit(cache=True)
def _light(image, side, dash, radius):
    """Light what lies within `radius` pixels of a dash, with soft edges.   image (side * side,)"""
    scale = side / CELLS
    reach = radius / scale + 1
    left = max(int((min(dash[0], dash[2]) - reach) * scale), 0)
    right = min(int((max(dash[0], dash[2]) + reach) * scale) + 1, side)
    top = max(int((min(dash[1], dash[3]) - reach) * scale), 0)
    bottom = min(int((max(dash[1], dash[3]) + reach) * scale) + 1, side)
    for row in range(top, bottom):
        for column in range(left, right):
            away = scale * math.sqrt(_squared((column + 0.5) / scale, (row + 0.5) / scale, dash))
            value = int(255 * min(max(radius + 0.5 - away, 0.0), 1.0) + 0.5)
            i = row * side + column
            image[i] = max(image[i], value)


@njit(parallel=True, cache=True)
def _draw(seed, first, side, width, disc, images, labels):
    for i in prange(len(labels)):
        state = _mix(_mix(seed + GOLDEN) + np.uint64(first) + np.uint64(i))
        dashes, ends = np.empty((DASHES, 4)), np.empty((4, 2))
        p = -1
        while p < 0:
            state, difficulty = _uniform(state)
            bend = BEND / (EASY + difficulty * (HARD - EASY))
            state, there = _paths(state, 2, LONG, bend, dashes, 0, ends, 0)
            if there:
                state, (p, q, r, s) = _marks(state, ends)
            if p >= 0:
                state, there = _paths(state, SHORT_PATHS, SHORT, bend, dashes, 2 * LONG, ends, 4)
                if not there:
                    p = -1
        state, coin = _uniform(state)
        labels[i] = coin < 0.5
        for dash in dashes:
            _light(images[i], side, dash, width / 2)
        for end in (p, q) if labels[i] else (r, s):
            x, y = ends[end]
            _light(images[i], side, (x, y, x, y), disc)


def draw(seed, first, count, side):
    """Images first .. first + count - 1 of `seed`, with side 32 or 128.

    -> images (count, side * side) uint8, labels (count,) int64, 1: one path. Image i depends on
    seed, i and side alone: not on count, nor on the number of threads.
    """
    images, labels = np.zeros((count, side * side), np.uint8), np.empty(count, np.int64)
    # Without the compiler (NUMBA_DISABLE_JIT=1) NumPy's scalars warn where the mixer wraps around.
    with backend.parallel_lock, np.errstate(over="ignore"):
        _draw(np.uint64(seed), first, side, WIDTH[side], DISC[side], images, labels)
    return images, labels
