"""Where a wrong tensor is wrong, and how, where a pattern is certain.

A hint is a hypothesis that fits: what the tensor would be under it agrees with the claim within
what is allowed, and three times as closely as the reference does, or a hundred times as closely.
Patterns of the places alone (one block, everything after a position, a growing error) need no other
numbers. Where nothing fits, nothing is said.
"""

import itertools
import math

import numpy as np

from ref import Error, cases

REST = ("channel", "state", "number")  # axes after batch and time
FEWEST = 8  # elements of a block, and outside of it: fewer may look like one by chance
MOST_ARGUMENTS = 40  # that are left out one after the other


def axes(name, shape, B, L, whole=()):
    """What each axis is.   B, L: of the inputs, or None; whole: names that have no batch"""
    short = name.rpartition(".")[2]
    plain = tuple(f"axis {i}" for i in range(len(shape)))
    if B is None or name.startswith("grad.param.") or short in whole or short == "kernel":
        return plain
    for leading, sizes in ((("batch", "time"), (B, L)), (("batch",), (B,))):
        if "state." in name and len(shape) == 4:
            leading = ("layer", "batch")
        elif shape[: len(sizes)] != sizes or (name.endswith("state") and len(sizes) == 2):
            continue
        if len(shape) - len(leading) <= len(REST):
            return (*leading, *REST[: len(shape) - len(leading)])
    return plain


# Where


def wrong_at(claim, r, allowed, labels):
    """{axis: {"first", "last", "count", "of"}} of the positions with a deviation above `allowed`"""
    wrong = _wrong(claim, r, allowed)
    found = {}
    for i, label in enumerate(labels):
        at = np.flatnonzero(wrong.any(axis=tuple(j for j in range(wrong.ndim) if j != i)))
        if len(at):
            ends = {"first": int(at[0]), "last": int(at[-1])}
            found[label] = ends | {"count": len(at), "of": wrong.shape[i]}
    return found


def where_text(found):
    """One line about the positions that are wrong"""
    if not found:
        return ""
    order = sorted(found, key=lambda label: label != "time")
    return "wrong " + "; ".join(_axis_text(label, found[label]) for label in order)


def _axis_text(label, at):
    if label == "time":
        if at["count"] == at["of"]:
            return f"at every t, {at['of']} of {at['of']}"
        return f"first at t = {at['first']}, last at t = {at['last']}, {at['count']} of {at['of']}"
    plural = label if label.startswith("axis") else label + ("es" if label == "batch" else "s")
    count = "all" if at["count"] == at["of"] else f"{at['count']} of"
    first = "" if at["count"] == at["of"] else f", first {at['first']}"
    return f"{plural}: {count} {at['of']}{first}"


def _wrong(claim, r, allowed):
    return np.abs(claim - r) > allowed * (np.abs(r).max() or 1.0)


# How


def hint(name, claim, r, allowed, labels, sizes, variant):
    """What a wrong claim is instead of the reference r, in a few words, or "".

    labels: of the axes; sizes: {letter: number}, whose values a factor may have;
    variant(kind, *which) -> {name: array}, the reference computed otherwise, {} where it cannot be.
    """
    if r.size < 3 or not r.any():
        return ""
    if not claim.any():
        return "it is zero everywhere"
    fits = _Fit(claim, r, allowed)
    with np.errstate(all="ignore"):
        guesses = itertools.chain(
            _rearranged(r, labels),
            _scaled(claim, r, sizes),
            _parts(name, labels, sizes, variant),
            _left_out(name, variant),
            _states(name, claim, r, allowed, labels, variant),
        )
        for text, h, where in guesses:
            if fits(h, where):
                return text
        return _pattern(claim, r, allowed, labels)


class _Fit:
    """Whether a hypothesis fits a claim much better than the reference"""

    def __init__(self, claim, r, allowed):
        self.claim, self.r, self.allowed = claim, r, allowed
        self.scale = np.abs(r).max() or 1.0

    def __call__(self, h, where=...):
        """h: what claim[where] would be"""
        claim, r = self.claim[where], self.r[where]
        if h is None or h.shape != claim.shape or h.size < 3 or not np.isfinite(h).all():
            return False
        error = np.abs(claim - r).max() / self.scale
        left = np.abs(claim - h).max() / self.scale
        if error <= self.allowed:
            return False
        return left <= error / 100 or (left <= self.allowed and left < error / 3)


def _rearranged(r, labels):
    """The reference with other signs, places or axes"""
    yield "its sign is wrong", -r, ...
    if r.ndim and r.shape[-1] == 2:
        yield "it is the complex conjugate", r * np.array([1.0, -1.0]), ...
        yield "real and imaginary parts are swapped", r[..., ::-1], ...
    if "time" in labels:
        yield from _in_time(r, labels.index("time"))
    if "batch" in labels:
        i = labels.index("batch")
        first = np.broadcast_to(np.take(r, [0], i), r.shape)
        yield "every batch has the values of batch 0", first, ...
        yield "the batches are in reverse order", np.flip(r, i), ...
    for i, j in itertools.combinations(range(r.ndim), 2):
        other = np.swapaxes(r, i, j)
        same = other.shape == r.shape
        text = f"the axes {_called(labels, i)} and {_called(labels, j)} are swapped"
        yield text + ("" if same else " in memory"), other.reshape(r.shape), ...


def _called(labels, i):
    return labels[i].removeprefix("axis ")


def _in_time(r, axis):
    """Off by one, and reversed"""
    L = r.shape[axis]
    early, late = ((slice(None),) * axis + (s,) for s in (slice(0, L - 1), slice(1, L)))
    if L > 2:
        yield "it is one step late: at t it has what belongs to t - 1", r[early], late
        yield "it is one step early: at t it has what belongs to t + 1", r[late], early
    yield "it is reversed in time", np.flip(r, axis), ...


def _scaled(claim, r, sizes):
    """The reference times a number, one that has a name if that is close"""
    c = float((claim * r).sum() / (r * r).sum())
    if c == 0 or abs(c - 1) < 1e-3:
        return
    for text, value in _constants(sizes):
        if abs(c / value - 1) < 0.02:
            yield f"it is {text} times what it should be", value * r, ...
    yield f"it is {c:.4g} times what it should be", c * r, ...


def _constants(sizes):
    """(how it is called, its value) of numbers that factors often are"""
    known = {"2": 2.0, "4": 4.0, "3": 3.0, "sqrt 2": 2**0.5, "pi": math.pi, "2 pi": 2 * math.pi}
    known |= {"log 2": math.log(2), "10": 10.0}
    B, L = sizes.get("B"), sizes.get("L")
    named = {letter: n for letter, n in sizes.items() if n and n > 1}
    if B and L and B > 1 and L > 1:
        named["B L"] = B * L
    for letter, n in named.items():
        known[f"{letter} (= {n})"] = float(n)
        known[f"sqrt {letter} ({letter} = {n})"] = math.sqrt(n)
    constants = []
    for text, value in known.items():
        inverse = f"1/{text}" if " " not in text or "(=" in text else f"1/({text})"
        constants += [(text, value), (inverse, 1 / value)]
    constants += [(f"-{t}" if "-" not in t else t, -v) for t, v in constants]
    return constants


def _parts(name, labels, sizes, variant):
    """A gradient that is not summed: the part of one sample, or of one step"""
    if not name.startswith("grad.") or "batch" in labels:
        return
    B, L = sizes.get("B") or 1, sizes.get("L") or 1
    for b in range(B if 1 < B <= 8 else 0):
        text = f"it is the part of batch {b} alone: not summed over the batches"
        yield text, variant("batch", b).get(name), ...
    for t in sorted({0, L - 1}) if L > 1 else ():
        text = f"it is the part of t = {t} alone: not summed over time"
        yield text, variant("time", t).get(name), ...


def _left_out(name, variant):
    """Computed without one of the arguments"""
    arguments = variant("arguments")
    for argument in [*arguments][:MOST_ARGUMENTS]:
        text = f"it is what comes without {argument}"
        yield text, variant("without", argument).get(name), ...


def _states(name, claim, r, allowed, labels, variant):
    """A sequence that begins anew where it should go on, or goes on where it should begin"""
    if name != "out.y" or labels[:2] != ("batch", "time"):
        return
    if len(r) > 1:
        y = variant("joined").get(name)
        text = "each batch goes on from the last state of the one before: the state is not reset"
        yield text, None if y is None else y.reshape(r.shape), ...
    at = np.flatnonzero(_wrong(claim, r, allowed).any(axis=(0, *range(2, r.ndim))))
    t0 = int(at[0]) if len(at) else 0
    L = r.shape[1]
    if 0 < t0 < L - 1:
        y = variant("from", t0).get(name)
        end = min(L, max(2 * t0, t0 + 2))
        text = (
            f"right up to t = {t0 - 1}; from t = {t0} on it begins anew: the state is not carried"
        )
        yield text, None if y is None else y[:, : end - t0], (slice(None), slice(t0, end))


def turned(claim, r, allowed):
    """A hint about a claim whose shape is r's with axes in another order"""
    for order in itertools.permutations(range(r.ndim)) if r.ndim <= 4 else ():
        other = r.transpose(order)
        if other.shape != claim.shape or not r.any():
            continue
        if np.abs(claim - other).max() <= allowed * np.abs(r).max():
            return f"its axes are in the order {list(order)} of what is expected"
    return ""


# Patterns of the places


def _pattern(claim, r, allowed, labels):
    wrong = _wrong(claim, r, allowed)
    return (
        _growing(claim, r, allowed, labels)
        or _first_batch(wrong, labels)
        or _boundary(claim, r, wrong, labels)
        or _block(wrong, labels)
    )


def _over_time(x, labels):
    """The largest of each step"""
    i = labels.index("time")
    return x.max(axis=tuple(j for j in range(x.ndim) if j != i))


def _growing(claim, r, allowed, labels):
    """An error that grows as a geometric series"""
    if "time" not in labels:
        return ""
    error = _over_time(np.abs(claim - r), labels)
    t = np.flatnonzero(error > allowed * (np.abs(r).max() or 1.0))
    if len(t) < 8 or len(t) < 0.9 * (t[-1] - t[0] + 1) or 0 < t[0] < t[-1] < len(error) - 1:
        return ""
    log = np.log(error[t])
    slope, start = np.polyfit(t, log, 1)
    spread = np.std(log - slope * t - start)
    rise = abs(slope) * (t[-1] - t[0])
    if rise < math.log(100) or spread > 0.1 * rise:
        return ""
    towards = "with every t" if slope > 0 else "with every t towards the beginning"
    return f"its error grows {math.exp(abs(slope)):.3g} times {towards}"


def _first_batch(wrong, labels):
    if "batch" not in labels:
        return ""
    i = labels.index("batch")
    share = wrong.mean(axis=tuple(j for j in range(wrong.ndim) if j != i))
    if len(share) > 1 and share[0] == 0 and (share[1:] > 0.5).all():
        return "right for batch 0 alone"
    return ""


def _boundary(claim, r, wrong, labels):
    """Right before a position and wrong after it, at once, or the other way round"""
    if "time" not in labels:
        return ""
    at, error = _over_time(wrong, labels), _over_time(np.abs(claim - r), labels)
    for forwards in (True, False):
        now, e = (at, error) if forwards else (at[::-1], error[::-1])
        t0 = int(now.argmax())
        if t0 == 0 or len(now) - t0 < 3 or not now[-1] or now[t0:].mean() < 0.8:
            continue
        if np.median(e[t0 : t0 + 4]) < 0.1 * np.median(e[t0:]):
            continue
        i = labels.index("time")
        after = np.moveaxis(wrong, i, 0) if forwards else np.moveaxis(wrong, i, 0)[::-1]
        share = after[t0:].mean()
        if share * after[:t0].size < FEWEST:  # as many right ones before could be chance
            continue
        if forwards:
            return f"right up to t = {t0 - 1}, wrong from t = {t0} on"
        return f"wrong up to t = {len(at) - 1 - t0}, right from t = {len(at) - t0} on"
    return ""


def _block(wrong, labels):
    """One block, a tile, is wrong and the rest is right"""
    ranges = []
    for i in range(wrong.ndim):
        at = np.flatnonzero(wrong.any(axis=tuple(j for j in range(wrong.ndim) if j != i)))
        ranges.append((int(at[0]), int(at[-1])))
    box = tuple(slice(a, b + 1) for a, b in ranges)
    inside, outside = wrong[box].size, wrong.size - wrong[box].size
    if min(inside, outside) < FEWEST or wrong[box].mean() < 0.8:
        return ""
    parts = []
    for label, (a, b), n in zip(labels, ranges, wrong.shape, strict=True):
        if b - a + 1 < n:
            label = "t" if label == "time" else label
            parts.append(f"{label} = {a}" if a == b else f"{label} = {a} to {b}")
    return f"one block is wrong, the rest right: {', '.join(parts)}"


# The reference computed otherwise


class Variants:
    """What a case's part computes from other sources, each once: {name: array}, or {}"""

    def __init__(self, case, part, sources, sizes):
        self.part, self.sources, self.sizes = part, sources, sizes
        self.scan = cases.module_of(case.model) if case.part == "scan" else None
        self.made = {}

    def __call__(self, *which):
        """kind and what of it, as `hint` asks for it"""
        if which not in self.made:
            kind, *what = which
            try:
                self.made[which] = getattr(self, f"_{kind}")(*what)
            except (Error, ValueError, IndexError):  # the part does not take it
                self.made[which] = {}
        return self.made[which]

    def _run(self, sources):
        return cases.run(self.part, sources, steps=False)

    def _arguments(self):
        """Those that can be left out"""
        if self.scan:
            arguments = cases.scan_arguments(self.scan).items()
            names = [n for n, needed in arguments if not needed and f"in.{n}" in self.sources]
            return dict.fromkeys(names)
        floats = (n for n, t in self.sources.items() if t.dtype.kind == "f")
        return dict.fromkeys(n[6:] for n in floats if n.startswith("param."))

    def _without(self, argument):
        if self.scan:
            return self._run({n: t for n, t in self.sources.items() if n != f"in.{argument}"})
        name = f"param.{argument}"
        return self._run(self.sources | {name: np.zeros_like(self.sources[name])})

    def _batch(self, b):
        """Gradients of sample b's outputs alone"""
        return self._run(self.sources | self._only((slice(b, b + 1),)))

    def _time(self, t):
        """Gradients of the outputs at t alone"""
        return self._run(self.sources | self._only((slice(None), slice(t, t + 1))))

    def _only(self, where):
        douts = {n: t for n, t in self.sources.items() if n.startswith("dout.")}
        if not douts:
            raise Error("no gradient is fed back.")
        kept = {n: np.zeros_like(t) for n, t in douts.items()}
        for n, t in douts.items():
            if n == "dout.y" and t.shape[: len(where)] == self._batch_and_time[: len(where)]:
                kept[n][where] = t[where]
            elif n != "dout.y" and len(where) == 1:
                place = (slice(None), *where) if "state." in n and t.ndim == 4 else where
                kept[n][place] = t[place]
        return kept

    @property
    def _batch_and_time(self):
        return self.sizes["B"], self.sizes["L"]

    def _sequences(self, change, state):
        """Inputs with change(array) of those in time; state(array, its batch axis) or nothing"""
        changed = {}
        for n, t in self.sources.items():
            if n.startswith("dout.") or n == "in.lengths":
                continue
            if n == "in.x" or (self.scan and n[3:] in self.scan.SCAN_IN_TIME):
                t = change(t)
            elif n.startswith("in.state.") or (self.scan and n[3:] == self.scan.SCAN_STATE):
                t = state(t, int(t.ndim == 4))
            if t is not None:
                changed[n] = t
        return self._run(changed)

    def _joined(self):
        """All sequences as one, one after the other"""
        return self._sequences(
            lambda t: t.reshape(1, -1, *t.shape[2:]), lambda t, axis: np.take(t, [0], axis)
        )

    def _from(self, t0):
        """The sequences from t0 on, with nothing before"""
        return self._sequences(lambda t: t[:, t0:], lambda t, axis: None)
