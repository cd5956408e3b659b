"""What rounding alone does to a case: `own` of ref.verify (2)."""

import contextlib
import inspect
import re

import ml_dtypes
import numpy as np

from ref import cases, nn

DRAWS = 8  # perturbed recomputations that measure what rounding alone does
NAMED = {  # functions besides pairs whose arguments and results round, too
    "ref.hope": ("pole",),
    "ref.l2t": ("summarise", "standardised"),
    "ref.s4d": ("_expm1",),
    "ref.transformer": ("_exponentials", "_weights"),
}
OPEN = {  # pairs and such, by a pattern, of whose readable forms in float32 every operation rounds
    "ref.nn": "(?!fft|spectral|embedding|lstm).*",
    "ref.l2t": ".*",
    "ref.hyena_filters": ".*",
    "ref.tnn_rpe": ".*",
    "ref.s4d": "discretize_.*|_expm1",
}
READABLE = ("ref.nn", "ref.l2t", "ref.hope")  # whose twins do much that rounds in one


def ulp(precision):
    """The distance from 1 to the next number"""
    return float(ml_dtypes.finfo(cases.PRECISIONS[precision]).eps)


def unavoidable(case, part, sources, reference, steps):
    """(2) of ref.verify, of a case's results.   -> {name: own}"""
    half, module = 0.5 * ulp(case.precision), cases.module_of(case.model)
    worst = dict.fromkeys(reference, 0.0)

    def compare(results):
        for name, r in reference.items():
            deviation = np.abs(results[name] - r).max() / (np.abs(r).max() or 1.0)
            worst[name] = max(worst[name], float(deviation))

    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        with perturbed(half, rng, module):
            moved = {n: perturbed_array(t, half, rng) for n, t in sources.items()}
            results = cases.run(part, moved, steps)
        compare({name: perturbed_array(results[name], half, rng) for name in reference})
    return worst


def perturbed_array(x, half, rng):
    """x off by up to `half` of itself: by the rounding of a multiple of it, so that equal numbers
    get equal errors; in bfloat16 at random, as nothing inside of functions is drawn there.

    Of complex numbers both parts; of a dict every entry; what is no floating array, as it is.
    """
    if isinstance(x, dict):
        return {name: perturbed_array(t, half, rng) for name, t in x.items()}
    if not isinstance(x, np.ndarray | np.inexact) or x.dtype.kind not in "fc":
        return x
    x, unit = _plain(x), rng.uniform(1, 2)
    if half > 2.0**-20 and x.dtype.kind == "f":
        return x * (1 + half * rng.uniform(-1, 1, x.shape))
    with np.errstate(all="ignore"):
        scaled = x * unit
        many = scaled * (half * 2.0**53 + 1)
        rounded = (many - (many - scaled)) / unit  # the leading digits alone
    return np.where(np.isfinite(rounded), rounded, x)[()]


class _Rounding(np.ndarray):
    """An array that rounds: `perturb` is done to the result of every operation on it."""

    perturb = None

    def __array_finalize__(self, other):
        self.perturb = getattr(other, "perturb", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        perturb = next(x.perturb for x in (*inputs, *out) if isinstance(x, _Rounding))
        if out:
            kwargs["out"] = tuple(_plain(x) for x in out)
        result = getattr(ufunc, method)(*(_plain(x) for x in inputs), **kwargs)
        if not out:
            return _rounding(perturb(result), perturb)
        out[0][...] = perturb(kwargs["out"][0])
        return out[0]


def _rounding(x, perturb):
    """A _Rounding of a floating array; what is none, as it is"""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc":
        return x
    x = x.view(_Rounding)
    x.perturb = perturb
    return x


def _plain(x):
    """The array of a _Rounding, also in a dict"""
    if isinstance(x, dict):
        return {name: _plain(t) for name, t in x.items()}
    return x.view(np.ndarray) if isinstance(x, _Rounding) else x


@contextlib.contextmanager
def perturbed(half, rng, module):
    """While this is open, every argument and result of a model's pairs, and of those it shares, is
    off a little: projections, kernels, gates, convolutions, pooled features.

    In float32 so is what the functions of OPEN do, and nn.sum_rows adds one row after the other; in
    bfloat16 a function has float32 inside.
    """
    single, before = half < 2.0**-20, []

    def put(owner, name, f):
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, f)

    def perturb(x):
        return perturbed_array(x, half, rng)

    def perturb_argument(x):
        if not isinstance(x, np.ndarray) or not (single or x.ndim > 2):
            return x
        x = _plain(x)
        whole = x.dtype.kind == "f" and (x == np.rint(x)).all()  # such as positions, or a mask
        return x if whole else perturb(x)

    def wrap(f, opened):
        def perturbing(*args, **kwargs):
            args = [perturb_argument(a) for a in args]
            kwargs = {n: perturb_argument(a) for n, a in kwargs.items()}
            if opened:
                args = [_rounding(a, perturb) for a in args]
                kwargs = {n: _rounding(a, perturb) for n, a in kwargs.items()}
            first, *others = _as_tuple(f(*args, **kwargs))
            if not others:
                return perturb(_plain(first))
            first = perturb(_plain(first)) if not isinstance(first, dict) else first
            return first, *(perturb(_plain(other)) for other in others)

        return perturbing

    def one_by_one(x):
        rows = _plain(x).reshape(-1, x.shape[-1])
        unit = rng.uniform(1, 2) / (np.abs(rows).max() or 1)
        return np.add.accumulate((rows * unit).astype("float32"))[-1] / unit

    for owner in _rounded_modules(module):
        place = owner.__name__
        for name, f in list(vars(owner).items()):
            pair = name.endswith(("_forward", "_backward"))
            if callable(f) and (pair or name in NAMED.get(place, ())):
                put(owner, name, wrap(f, single and re.fullmatch(OPEN.get(place, ""), name)))
        if single and place in READABLE:
            put(owner, "twins", lambda *_: None)
    if single:
        put(nn, "sum_rows", one_by_one)
    try:
        yield
    finally:
        for owner, name, f in reversed(before):
            setattr(owner, name, f)


def _rounded_modules(module):
    """Those whose functions a case of this module goes through"""
    found = [nn]
    for model in (*getattr(module, "CASE_MODULES", ()), module):
        own = (f"{model.__name__}_", "ref.selective")  # files that hold a part of the model's
        used = [used for used in vars(model).values() if inspect.ismodule(used)]
        found += [*(u for u in used if u.__name__.startswith(own)), model]
    return dict.fromkeys(found)


def _as_tuple(result):
    return result if isinstance(result, tuple) else (result,)
