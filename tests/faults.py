"""Faults that are planted in the parts of all models, for tests/test_faults.py: `faults(problem)`
lists those of a problem, each by its kind, and computes with it in float64.

They are planted where mistakes are made:
- in the result of one of the functions that the part is made of (`plants`): a sign, a factor, a
  time step, a term, a conjugate, an axis, and in their state between batches and chunks of time;
- in the constants of the norms (`epsilons`), also on samples that are as small as their roots;
- around the part: batches, gradients and chunks of time that are not put together as they have to
  be (`assemblies`);
- and in the tensors of the case itself (`claims`), as for parts that are no more than these.
"""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable

import numpy as np

from ref import block, cases, hyena_filters, l2t, nn, selective, ssm, tnn_rpe

KINDS = {
    "sign",
    "factor",
    "off by one",
    "dropped term",
    "conjugate",
    "swapped axes",
    "transposed",
    "epsilon",
    "stale state",
    "not summed",
}
STATE_SPACE = {"d_model": 4, "d_state": 6}
HYENA = {"d_model": 4, "filter_order": 5, "l_max": 18}
ROUND = {"K": 2, "n_classes": 3, "hidden": 3, "cells": 2, "dln_hidden": 4, "dln_layers": 2}
LAYERED = ("operator", "mixer", "block", "network")
SETTINGS = {  # model -> settings, parts
    "hope": (STATE_SPACE, LAYERED),
    "s4": (STATE_SPACE | {"l_max": 18}, (*LAYERED, "init")),
    "s4d": (STATE_SPACE, LAYERED),
    "hyena": (HYENA, LAYERED),
    "l2t-student": ({"d_model": 4, "l_max": 18}, LAYERED),
    "longhorn": (STATE_SPACE, ("scan", *LAYERED)),
    "mamba": (STATE_SPACE, ("scan", *LAYERED)),
    "tnn": ({"d_model": 4, "expand_ratio": 1.5, "rpe_dim": 7}, LAYERED),
    "transformer": ({"d_model": 4, "n_heads": 2}, LAYERED),
    "etsc": ({}, ("solve",)),
    "l2t": ({}, ("features", "dln", "teacher", "student-loss", "unrolled")),
}
PARTS = [(model, part) for model, (_, parts) in SETTINGS.items() for part in parts]
OWN_SETTINGS = {
    ("transformer", "network"): {"positions": 12},
    ("l2t", "features"): {"features": "corrected"},
    ("l2t", "dln"): {"gru_size": 6, "B": 8},
    ("l2t", "teacher"): {"gru_size": 6, "B": 8},
    ("l2t", "student-loss"): {"context_length": 18},
    ("l2t", "unrolled"): ROUND,
}
ROOT, SIMPLE = 3e-3, 1e-8  # the sizes at which the norms' epsilons count
TAIL = {"output_linear": ROOT}
BRANCH = {"(tok|pos)_emb|head": ROOT, "proj_output": ROOT}
SMALL = {  # (model, part) -> which sources are made that small: what the norms see then is
    **{(m, "block"): {"in.x": ROOT} | TAIL for m in ("hope", "s4", "s4d")},
    **{(m, "network"): {"encoder": ROOT} | TAIL for m in ("hope", "s4", "s4d")},
    **{(m, "block"): {"in.x": ROOT} for m in ("hyena", "longhorn", "mamba", "transformer")},
    **{(m, "network"): {"embedding": ROOT} for m in ("hyena", "longhorn", "mamba")},
    ("l2t-student", "network"): BRANCH,
    ("transformer", "network"): {"wte|wpe": ROOT},
    ("tnn", "operator"): {"pos_proj": SIMPLE},
    ("tnn", "mixer"): {"pos_proj": SIMPLE},
    ("tnn", "block"): {"in.x": SIMPLE},
    ("tnn", "network"): {"embed_tokens": SIMPLE},
    ("l2t", "features"): {"in.logits": 1e-4},
    ("l2t", "dln"): {"gru": ROOT},
    ("l2t", "student-loss"): BRANCH,
}
CONSTANTS = ((nn, "EPS"), (nn, "SIMPLE_EPS"), (l2t, "STD_FLOOR"))


# Problems


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A random case without claims: sources that bfloat16 can hold, the float64 results of them."""

    case: cases.Case
    sources: dict  # float64
    reference: dict

    @property
    def id(self):
        """model part"""
        return f"{self.case.model} {self.case.part}"

    @property
    def length(self):
        """Positions of its sequences; of what has none, 0"""
        return next((t.shape[1] for t in self.sources.values() if t.ndim > 1), 0)

    def run(self, sources=None, steps=False):
        """What the part computes now, from these sources or its own -> {"out.*", "grad.*"}"""
        with np.errstate(all="ignore"):
            return cases.run(cases.part_of(self.case), sources or self.sources, steps)

    def at(self, precision, claims):
        """The case in this precision, with these results rounded to it"""
        tensors = {n: cases._rounded(t, precision) for n, t in (self.sources | claims).items()}
        return dataclasses.replace(self.case, precision=precision, tensors=tensors)


def problem(model, part, small=False, B=3, L=9, seed=1, **settings):
    """A Problem of a model's part; small: of the size at which the norms' epsilons count"""
    settings = SETTINGS[model][0] | OWN_SETTINGS.get((model, part), {}) | settings
    B = settings.pop("B", B)
    case = cases.make_case(
        model, part, settings, B, L, "bfloat16", seed, initial_state=part == "scan"
    )
    sources = {n: t for n, t in case.tensors.items() if n.startswith(cases.SOURCES)}
    for pattern, size in SMALL[model, part].items() if small else ():
        for name, t in sources.items():
            if not name.startswith("dout.") and re.search(pattern, name) and t.dtype.kind != "i":
                sources[name] = (t * size).astype(t.dtype)
    case = dataclasses.replace(case, tensors=sources)
    made = Problem(case, cases.in_float64(sources), {})
    return dataclasses.replace(made, reference=made.run(steps=True))


@contextlib.contextmanager
def put(owner, name, value):
    """While this is open, owner.name is value"""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# Faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault in a problem."""

    kind: str
    name: str
    results: Callable  # () -> {"out.*", "grad.*"}, those that differ


def faults(problem, small=False):
    """All faults of a problem; of a small one, those in epsilons"""
    if small:
        return epsilons(problem)
    made = [*plants(problem), *assemblies(problem), *claims(problem)]
    return made if problem.id not in map(" ".join, SMALL) else made + epsilons(problem)


def changes(a, L):
    """(kind, name, changed) of an array, as far as they make sense for it"""
    last_two = a.ndim > 1 and a.shape[-1] == a.shape[-2] > 1
    yield "sign", "sign", -a
    for factor in (2, 0.5**0.5, 1.01):
        yield "factor", f"times {factor:.3g}", a.dtype.type(factor) * a
    axes = [i for i in range(a.ndim) if a.shape[i] == L] if L else [*range(a.ndim)]
    if axes and a.shape[axes[0]] > 1:
        yield "off by one", "a step late", late(a, axes[0])
    if a.size > 1:
        yield "dropped term", "half dropped", half_dropped(a)
    if a.dtype.kind == "c":
        yield "conjugate", "conjugate", a.conj()
    elif a.ndim > 1 and a.shape[-1] == 2:
        yield "conjugate", "conjugate", a * np.array([1, -1], dtype=a.dtype)
    if a.ndim and a.shape[-1] > 1:
        yield "swapped axes", "next channel", np.roll(a, 1, axis=-1)
    if last_two:
        yield "transposed", "transposed", a.swapaxes(-1, -2)
    elif a.ndim > 1 and min(a.shape[-2:]) > 1:
        yield "transposed", "transposed in memory", a.swapaxes(-1, -2).reshape(a.shape)


def late(a, axis):
    """a one step later, zero at first"""
    shifted = np.roll(a, 1, axis)
    shifted[(slice(None),) * axis + (0,)] = 0
    return shifted


def half_dropped(a):
    """a without the latter half of its longest axis: a loop that ends early"""
    axis = int(np.argmax(a.shape))
    kept = a.copy()
    kept[(slice(None),) * axis + (slice((a.shape[axis] + 1) // 2, None),)] = 0
    return kept


# In the functions of a part


def functions(problem):
    """(owner, name) -> its results' arrays, of the forwards and backwards that the part uses; what
    one of them merely hands on is its maker's"""
    module, used, known = cases.module_of(problem.case.model), {}, {}
    more = [vars(module)[n] for n in vars(module) if inspect.ismodule(vars(module)[n])]
    more = [m for m in more if m.__name__.startswith(f"{module.__name__}_")]
    owners = [nn, ssm, block, selective, hyena_filters, tnn_rpe, module, *more]
    owners += getattr(module, "CASE_MODULES", ())
    with contextlib.ExitStack() as stack:
        for owner in dict.fromkeys(owners):
            for name, f in list(vars(owner).items()):
                own = getattr(f, "__module__", "") == owner.__name__
                if own and name.endswith(("_forward", "_backward")):
                    recording = _recording(f, used.setdefault((owner, name), {}), known)
                    stack.enter_context(put(owner, name, recording))
        problem.run()
    return {place: arrays for place, arrays in used.items() if arrays}


def _recording(f, seen, known):
    def recording(*args, **kwargs):
        result = f(*args, **kwargs)
        for place, a in arrays(result).items():
            if id(a) not in known:
                seen[place] = known[id(a)] = a
        return result

    return recording


def arrays(result):
    """(position, key) -> array, of what a forward or a backward returns beside its cache"""
    found = {}
    for i, r in enumerate(result if isinstance(result, tuple) else (result,)):
        entries = r.items() if isinstance(r, dict) else [(None, r)]
        found |= {(i, k): a for k, a in entries if isinstance(a, np.ndarray | np.floating)}
    return {place: a for place, a in found.items() if a.dtype.kind in "fc"}


def with_array(result, place, a):
    """The result with this array in the place"""
    i, key = place
    if not isinstance(result, tuple):
        return a if key is None else result | {key: a}
    new = a if key is None else result[i] | {key: a}
    return (*result[:i], new, *result[i + 1 :])


def plants(problem):
    """One change of one array that one function returns, wherever it is called.

    Each array in turn has a few of the changes, all of them by the end.
    """
    L, turn = problem.length, 0
    for (owner, name), seen in functions(problem).items():
        for place, a in seen.items():
            possible = list(changes(a, L))
            for i in {turn % len(possible), (turn + 4) % len(possible)}:
                kind, change, _ = possible[i]
                where = f"{owner.__name__[4:]}.{name}[{place[0]}]" + (place[1] or "")
                results = _planted(problem, owner, name, place, change)
                yield Fault(kind, f"{where} {change}", results)
            turn += 1
    yield from stale(problem)
    yield from unsummed(problem)


def _planted(problem, owner, name, place, change):
    before, L = getattr(owner, name), problem.length

    def faulty(*args, **kwargs):
        result = before(*args, **kwargs)
        a = arrays(result).get(place)
        made = {} if a is None else {c: new for _, c, new in changes(a, L)}
        return with_array(result, place, made[change]) if change in made else result

    def results():
        with put(owner, name, faulty):
            return problem.run()

    return results


def unsummed(problem):
    """Gradients of weights and biases without some of the rows that they are sums over"""

    def linear(dy, cache, backward=nn.linear_backward):
        dx, *_ = backward(dy, cache)
        rows = dy.reshape(-1, dy.shape[-1])[::2]
        return dx, rows.T @ cache[0].reshape(-1, cache[0].shape[-1])[::2], nn.sum_rows(rows)

    def rows(x, sums=nn.sum_rows):
        return sums(x[:1])

    for name, wrong in (("linear_backward", linear), ("sum_rows", rows)):

        def results(name=name, wrong=wrong):
            with put(nn, name, wrong):
                return problem.run()

        yield Fault("not summed", f"nn.{name} of some rows", results)


RECURRENCES = {  # model -> the function that carries something along time
    "mamba": "recurrence_forward",
    "longhorn": "recurrence_forward",
    "transformer": "attention_forward",
}


def stale(problem):
    """States that are lost at a chunk's boundary, or still there when the next sequence begins"""
    module, part = cases.module_of(problem.case.model), problem.case.part
    if part in ("dln", "teacher"):
        owner, name = nn, "gru_forward"
    elif part == "unrolled":
        owner, name = nn, "lstm_cell_forward"
    elif part == "student-loss":
        owner, name = l2t_student(), "operator_forward"
    elif problem.case.model in cases.OWN or part == "init":
        return
    else:
        owner, name = module, RECURRENCES.get(problem.case.model, "operator_forward")
    f = getattr(owner, name)
    for change, wrong in (("kept for the next", _kept(f)), ("lost at half", _lost(f))):

        def results(wrong=wrong):
            with put(owner, name, wrong):
                return problem.run()

        yield Fault("stale state", f"{name} state {change}", results)


def l2t_student():
    """The module of the student's layers"""
    return cases.module_of("l2t-student")


def _kept(f):
    """f whose second sequence goes on where the first one ended, and so on"""

    def faulty(x, *args, **kwargs):
        given, result = (x, *args), f(x, *args, **kwargs)
        axis = time_axis(given)
        if axis is None:  # a cell: its state comes in rolled along the batch
            given = [np.roll(a, 1, axis=1) if _is_array(a, 3) else a for a in given]
            return f(*given, **kwargs)
        joined = [_before(a, axis) if _in_time(a, given, axis) else a for a in given]
        return _later(f(*joined, **kwargs), result, axis)

    return faulty


def _lost(f):
    """f that forgets what was before the latter half"""

    def faulty(x, *args, **kwargs):
        given, result = (x, *args), f(x, *args, **kwargs)
        axis = time_axis(given)
        if axis is None:
            given = [0 * a if _is_array(a, 3) else a for a in given]
            return f(*given, **kwargs)
        L = _longest(given).shape[axis]
        half = [_part(a, axis, L // 2) if _in_time(a, given, axis) else a for a in given]
        return _later(f(*half, **kwargs), result, axis)

    return faulty


def _is_array(a, ndim):
    return isinstance(a, np.ndarray) and a.ndim >= ndim


def _longest(given):
    return next(a for a in given if _is_array(a, 3))


def time_axis(given):
    """Of the first array with an axis of time: 1, or 2 of (B, H, L, d); None of what has none"""
    found = [a for a in given if _is_array(a, 3)]
    if not found or (len(found[0]) == 2 and len(given) == 6):  # an LSTM cell's state (2, B, H)
        return None
    return 1 if found[0].ndim == 3 else 2


def _in_time(a, given, axis):
    x = _longest(given)
    return _is_array(a, 3) and a.shape[: axis + 1] == x.shape[: axis + 1]


def _part(a, axis, first):
    return a[(slice(None),) * axis + (slice(first, None),)]


def _before(a, axis):
    """The sequence before in the batch, and then its own"""
    return np.concatenate([np.roll(a, 1, axis=0), a], axis=axis)


def _later(wrong, result, axis):
    """result with the last positions of its first array from the wrong one"""
    y, right = wrong[0], result[0]
    if y.ndim <= axis or right.shape == y.shape:
        return y, *result[1:]
    L, n = right.shape[axis], min(right.shape[axis], y.shape[axis])
    y = _part(y, axis, y.shape[axis] - n)
    first = right[(slice(None),) * axis + (slice(0, L - n),)]
    return np.concatenate([first, y], axis=axis), *result[1:]


# In the constants


def epsilons(problem):
    """Norms with another epsilon"""
    made = []
    for owner, name in CONSTANTS:
        for value in (1e-6, 1e-8, 1e-12):

            def results(owner=owner, name=name, value=value):
                with put(owner, name, value):
                    return problem.run()

            made.append(Fault("epsilon", f"{name} {value}", results))
    return made


# Around the part


def assemblies(problem):
    """Gradients of one sequence of the batch only, or of a chunk of time; a scan in two chunks
    without the state between them; decoding that loses it"""
    sources, L = problem.sources, problem.length
    for name, t in sources.items():
        if name.startswith("in.") and t.ndim > 1 and t.shape[1] == L:
            moved = sources | {name: late(t, 1)}
            yield Fault("off by one", f"{name} a step late", lambda moved=moved: problem.run(moved))
    if problem.case.model in cases.OWN or problem.case.part == "init":
        return
    B = len(sources["in.x"])
    alone = {n: t[:1] if _of_batch(n, t, B) else t for n, t in sources.items()}

    def summed(results):
        own = {n: g for n, g in results.items() if n.startswith("grad.")}
        return {n: g for n, g in own.items() if g.shape == problem.reference[n].shape}

    yield Fault(
        "not summed",
        "gradients of the first sequence alone",
        lambda: {n: g for n, g in summed(problem.run(alone)).items() if "in.x" not in n},
    )
    douts = {n: t.copy() for n, t in sources.items() if n.startswith("dout.") and t.ndim > 2}
    for t in douts.values():
        t[:, L // 2 :] = 0
    yield Fault(
        "not summed",
        "gradients of the first half of the positions alone",
        lambda: summed(problem.run(sources | douts)),
    )
    if "out.y_steps" in problem.reference:
        yield Fault("stale state", "decoding begins anew at half", lambda: restarted(problem))
    if problem.case.part == "scan":
        module = cases.module_of(problem.case.model)
        state = f"in.{module.SCAN_STATE}"
        rolled = {state: np.roll(sources[state], 1, axis=0)}
        yield Fault("stale state", "another's state", lambda: problem.run(sources | rolled))
        yield Fault(
            "dropped term",
            "without the initial state",
            lambda: problem.run(sources | {state: 0 * sources[state]}),
        )


def _of_batch(name, t, B):
    return name.startswith(("in.", "dout.")) and t.ndim > 1 and len(t) == B


def restarted(problem):
    """y_steps whose latter half begins from the state before the first position"""
    L, sources = problem.length, problem.sources
    found = problem.reference["out.y_steps"]
    in_time = {n: t for n, t in sources.items() if t.ndim > 2 and t.shape[1] == L}
    in_time = {n: t[:, L // 2 :] for n, t in in_time.items() if not n.startswith("param.")}
    later = problem.run(sources | in_time, steps=True)["out.y_steps"]
    return {"out.y_steps": np.concatenate([found[:, : L // 2], later], axis=1)}


# In what the part gives


def claims(problem):
    """Changes of the tensors themselves: of all outputs and some gradients"""
    outputs = [n for n in problem.reference if n.startswith("out.")]
    grads = [n for n in problem.reference if n.startswith("grad.")]
    for name in outputs + grads[:: max(1, len(grads) // 2)]:
        a = problem.reference[name]
        for kind, change, new in changes(a, problem.length):
            yield Fault(kind, f"{name} {change}", lambda name=name, new=new: {name: new})
        if len(a) > 1:
            rolled = np.roll(a, 1, axis=0)
            yield Fault(
                "stale state",
                f"{name} of the one before",
                lambda name=name, rolled=rolled: {name: rolled},
            )
