"""What it means that another implementation agrees, and the report of where it does not.

The reference is recomputed in float64 from inputs, parameters and upstream gradients as they are,
rounded to the precision p of the case. A tensor t of the other implementation agrees with the
reference r when

    max |t - r| <= allowed max |r|,   allowed = 1e-9 in float64, else 4 own + ulp(p)             (1)
    own = max over 8 draws of max |r' - r| / max |r|                                             (2)

where r' is recomputed in float64 with every input, parameter and named intermediate (arguments and
results of the model's forward and backward functions and of those it shares: projections, gates,
kernels, convolutions, scans) off by random relative amounts of up to half an ulp of p, and itself
rounded like them. In float32 equal numbers are off by equal amounts, as they are in a mean's
gradient; every operation within norms, gates, discretisations and the like rounds, not only what
comes out of them; and sums over positions are made in float32, one after the other. In bfloat16,
within whose functions others have float32, it is results and activations (arrays of three axes and
more). Our own forms in float32 have no say in it, so `own` is what rounding at that precision does
to this computation on these numbers, whoever does it. A case may name its own tolerance of a
tensor in place of (1).

Nothing is compared, and the tensor fails with a sentence, when it is missing or unknown, has
another shape, a value that is not finite, or, from a function, fewer digits than p.

A function is asked for y, and for everything else that a gradient is fed back into: that must be
there. What else it gives by name is compared too. Its gradients are all compared or none: with
outputs alone, and no framework that can differentiate, it is checked forward only, and the report
says so.
"""

import contextlib
import inspect
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace

import ml_dtypes
import numpy as np

from ref import Error, block, cases, files, frameworks, hints, nn
from ref.backend import check_choice

TOLERANCE = 1e-9  # of float64, where the case does not name its own
UNKNOWN = 5  # tensors that the part does not compute are named one by one, up to so many
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
VAGUE = 0.5  # allowed errors above which a comparison shows little
LENGTHS = (1, 2, 3, 7, 64, 127, 1000, 2048)  # of a sweep
WIDTHS = ((8, 16), (5, 7), (6, 5), (7, 4))  # of a sweep: D, N
SMALL = {"d_model": 8, "d_state": 16}  # of a callable's case, unless asked for otherwise
# Outputs whose sum has the gradients, of parts that no gradient is fed back into
LOSSES = {"student-loss": ("loss",), "teacher": ("teacher_loss", "dln_loss")}
ALONE = {"features": "features", "dln": "weight", "student-loss": "loss"}  # outputs, of l2t's parts


# Recomputing


def compute(case, steps=True):
    """Recompute a case in float64 from its in.*, param.* and dout.* alone -> {"out.*", "grad.*"}"""
    part, sources = _checked(case)
    return cases.run(part, sources, steps)


def _checked(case):
    """-> Part, sources in float64.   Error: they do not go together"""
    case = cases.computed(case)
    part = cases.part_of(case)
    given = {n: t for n, t in case.tensors.items() if n.startswith(cases.SOURCES)}
    sources = cases.in_float64(given)
    _check_sources(case, part, sources)
    return part, sources


def _check_sources(case, part, sources):
    """Error for a parameter or input that is missing, unknown, or of another shape"""
    if case.model in cases.OWN:
        _check_own_sources(case, part, sources)
        return
    template, aliases, given = part.template(), part.aliases(), case.of("param.")
    for name in sorted(template.keys() - given.keys() - aliases.keys()):
        raise Error(f"param.{name} {template[name].shape} is missing.")
    template |= {name: template[other] for name, other in aliases.items() if name in given}
    for name in sorted(given.keys() - template.keys()):
        raise Error(f"param.{name} is not a parameter of {case.model}'s {case.part} here.")
    for name, expected in template.items():
        if name not in given:
            continue  # an alias
        if expected.dtype.kind == "i" and given[name].size == 1:
            continue  # a number, with an axis or without
        if given[name].shape != expected.shape:
            shapes = f"{given[name].shape}; expected {expected.shape}"
            raise Error(f"param.{name} has the shape {shapes}.")
    block.untied(given, aliases)
    _check_inputs(case, part, sources)
    _check_finite(sources)


def _check_inputs(case, part, sources):
    """Error for an input or upstream gradient that is missing, unknown, or of another shape"""
    inputs = {"x": True} | ({"lengths": False} if case.part == "network" else {})
    inputs = {} if case.part == "init" else inputs
    if case.part == "scan":
        inputs = cases.scan_arguments(cases.module_of(case.model))
    for name, required in inputs.items():
        if required and f"in.{name}" not in sources:
            raise Error(f"in.{name} is missing.")
    states = part.state_shapes(len(sources["in.x"])) if "in.x" in sources else {}
    given = {n for n in sources if n.startswith("in.state.")}
    if unknown := {n for n in sources if n.startswith("in.")} - {
        f"in.{n}" for n in inputs | states
    }:
        raise Error(f"{sorted(unknown)[0]} is not an input of {case.model}'s {case.part}.")
    for name, shape in states.items():
        if given and f"in.{name}" not in given:
            raise Error(f"in.{name} {shape} is missing: a state is {', '.join(states)}.")
        for whole in (f"in.{name}", f"dout.{name}"):
            if whole in sources and sources[whole].shape != shape:
                shapes = f"{sources[whole].shape}; expected {shape}"
                raise Error(f"{whole} has the shape {shapes}.")
    wants = [n for n in case.tensors if n.startswith("grad.")]
    if wants and "dout.y" not in sources:
        raise Error(f"dout.y is missing, so {wants[0]} cannot be recomputed.")
    feeds_back = {"y", *states} | ({"last_state"} if case.part == "scan" else set())
    if unknown := {n for n in sources if n.startswith("dout.")} - {f"dout.{n}" for n in feeds_back}:
        raise Error(f"{sorted(unknown)[0]} is not the gradient of an output that feeds back here.")


def _check_own_sources(case, part, sources):
    """The same, of a model of OWN, which looks itself at the shapes of its inputs"""
    template, douts = part.template(), cases.module_of(case.model).CASE_PARTS[case.part]
    aliases = {f"param.{name}": f"param.{other}" for name, other in part.aliases().items()}
    template = {n: t for n, t in template.items() if n not in aliases}
    template |= {name: template[other] for name, other in aliases.items() if name in sources}
    for name in sorted(template.keys() - sources.keys()):
        raise Error(f"{name} is missing.")
    for name in sorted(sources.keys() - template.keys() - {f"dout.{n}" for n in douts}):
        raise Error(f"{name} is nothing that {case.model}'s {case.part} takes.")
    for name, expected in template.items():
        if name.startswith("param.") and sources[name].shape != expected.shape:
            shapes = f"{sources[name].shape}; expected {expected.shape}"
            raise Error(f"{name} has the shape {shapes}.")
    block.untied(case.of("param."), part.aliases())
    _check_finite(sources)


def _check_finite(sources):
    for name, t in sources.items():
        if t.dtype.kind == "f" and not np.isfinite(t).all():
            raise Error(f"{name} has values that are not finite, so nothing can be compared.")


# Comparing


@dataclass(frozen=True)
class Row:
    """What became of one tensor."""

    tensor: str
    error: float  # largest deviation over the reference's largest magnitude
    allowed: float
    unavoidable: float  # the error of rounding at the case's precision alone, (2); 0 in float64
    index: tuple  # of the worst element
    value: float  # there
    expected: float
    problem: str = ""  # a sentence, where no comparison was possible
    wrong: dict = field(default_factory=dict)  # of a failure: axis -> first, last, count, of
    hint: str = ""  # what the claim is instead, where that is certain
    seed: int = 0

    @property
    def ok(self):
        """Whether the tensor passes."""
        return not self.problem and self.error <= self.allowed

    @property
    def excess(self):
        """error over allowed: above 1 it fails"""
        if self.problem:
            return math.inf
        return self.error / max(self.allowed, 1e-300)

    def lines(self):
        """What is printed about it"""
        if self.problem:
            return [f"FAIL  {self.tensor}: {self.problem}", *self._hints()]
        own = f", rounding alone {self.unavoidable:.1e}" if self.unavoidable else ""
        error = f"{self.tensor}: error {self.error:.1e} (allowed {self.allowed:.1e}{own})"
        at = f"worst at {list(self.index)}: {self.value:.9g}, expected {self.expected:.9g}"
        return [f"{'ok  ' if self.ok else 'FAIL'}  {error}; {at}", *self._hints()]

    def _hints(self):
        texts = (hints.where_text(self.wrong), self.hint and f"hint: {self.hint}")
        return [f"      {text}" for text in texts if text]

    def as_dict(self):
        """What JSON can hold"""
        values = asdict(self) | {"ok": self.ok}
        numbers = {n: v for n, v in values.items() if isinstance(v, float)}
        return values | {n: v if math.isfinite(v) else None for n, v in numbers.items()}


@dataclass(frozen=True)
class _Reference:
    """A case recomputed, and what is needed to say more."""

    case: object
    part: object
    sources: dict
    results: dict
    unavoidable: dict  # {} in float64
    sizes: dict
    variants: object  # None: without hints

    @classmethod
    def of(cls, case, steps=True, explain=True):
        """Error: as compute"""
        own, (part, sources) = cases.computed(case), _checked(case)
        results, sizes = cases.run(part, sources, steps), _sizes(own, part)
        inexact = case.precision != "float64"
        unavoidable = _unavoidable(own, part, sources, results, steps) if inexact else {}
        variants = hints.Variants(own, part, sources, sizes) if explain else None
        return cls(own, part, sources, results, unavoidable, sizes, variants)

    def row(self, name, claim):
        """Row of one tensor of the other implementation"""
        if name not in self.results:
            known, name = ", ".join(self.results), files.one_line(name, 100)
            return _failed(name, f"not something this part computes; it computes {known}")
        r = np.asarray(self.results[name])
        if claim.dtype.kind == "c":
            claim = np.stack([claim.real, claim.imag], axis=-1)
        if claim.size == r.size == 1:
            claim = claim.reshape(r.shape)
        if claim.shape != r.shape:
            problem = f"has the shape {claim.shape}; expected {r.shape}"
            return _failed(name, problem, self._turned(claim, r))
        claim = claim.astype("float64")
        bad = ~np.isfinite(claim)
        if bad.any():
            first = [int(i) for i in np.argwhere(bad)[0]]
            return _failed(name, f"{bad.sum()} values are not finite, the first at {first}")
        return self._compared(name, claim, r)

    def _compared(self, name, claim, r):
        deviation = np.abs(claim - r)
        index = tuple(int(i) for i in np.unravel_index(deviation.argmax(), r.shape))
        own = self.unavoidable.get(name, 0.0)
        allowed = 4 * own + _ulp(self.case.precision) if self.unavoidable else TOLERANCE
        allowed = float(self.case.tolerance.get(name, allowed))
        error, at = deviation[index] / (np.abs(r).max() or 1.0), (claim[index], r[index])
        row = Row(name, float(error), allowed, own, index, *map(float, at))
        if row.ok or self.variants is None:
            return row
        labels = hints.axes(name, r.shape, self.sizes.get("B"), self.sizes.get("L"), self._whole())
        text = hints.hint(name, claim, r, allowed, labels, self.sizes, self.variants)
        return replace(row, wrong=hints.wrong_at(claim, r, allowed, labels), hint=text)

    def _turned(self, claim, r):
        """A hint about a claim whose axes are those of r in another order"""
        if claim.ndim != r.ndim or claim.dtype.kind not in "fV":
            return ""
        return hints.turned(claim.astype("float64"), r, 0.02)

    def _whole(self):
        """Arguments of a scan that all sequences share"""
        if self.case.part != "scan":
            return ()
        module = cases.module_of(self.case.model)
        own = {n[3:] for n in self.sources if n.startswith("in.")}
        return own - {*module.SCAN_IN_TIME, module.SCAN_STATE}


def _failed(name, problem, hint=""):
    return Row(name, math.nan, 0.0, 0.0, (), math.nan, math.nan, problem, hint=hint)


def _sizes(case, part):
    """{letter: size} of a case: B, L, D, N, those that it has"""
    named = ("in.x", "in.features", "in.mem_features", "in.logits")
    x = next((case.tensors[n] for n in named if n in case.tensors), None)
    sizes = {} if x is None else dict(zip("BL", x.shape, strict=False))
    if case.part == "scan":
        narrow = [n for n in cases.module_of(case.model).SCAN_IN_TIME if n not in ("x", "dt", "z")]
        return sizes | {"D": x.shape[2], "N": case.tensors[f"in.{narrow[0]}"].shape[2]}
    cfg = part.cfg.layer if case.part == "network" else part.cfg
    own = {"D": getattr(cfg, "d_model", None), "N": getattr(cfg, "d_state", None)}
    return sizes | {letter: n for letter, n in own.items() if n}


def _ulp(precision):
    return float(ml_dtypes.finfo(cases.PRECISIONS[precision]).eps)


def _unavoidable(case, part, sources, reference, steps):
    """(2).   -> {name: own}"""
    half, module = 0.5 * _ulp(case.precision), cases.module_of(case.model)
    worst = dict.fromkeys(reference, 0.0)

    def compare(results):
        for name, r in reference.items():
            deviation = np.abs(results[name] - r).max() / (np.abs(r).max() or 1.0)
            worst[name] = max(worst[name], float(deviation))

    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        with perturbed(half, rng, module):
            moved = {n: _perturb(t, half, rng) for n, t in sources.items()}
            results = cases.run(part, moved, steps)
        compare({name: _perturb(results[name], half, rng) for name in reference})
    return worst


def _perturb(x, half, rng):
    """x off by up to `half` of itself: by the rounding of a multiple of it, so that equal numbers
    get equal errors; in bfloat16 at random, as nothing inside of functions is drawn there.

    Of complex numbers both parts; of a dict every entry; what is no floating array, as it is.
    """
    if isinstance(x, dict):
        return {name: _perturb(t, half, rng) for name, t in x.items()}
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
        return _perturb(x, half, rng)

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


# Reports


@dataclass(frozen=True)
class Report:
    """What became of one case, from a file or of a function."""

    label: str
    case: object = None  # of whose model, part and precision it speaks
    rows: tuple = ()
    sizes: dict = field(default_factory=dict)  # that are worth saying
    seeds: int = 1
    notes: tuple = ()
    problem: str = ""  # why there are no rows

    @property
    def ok(self):
        """Whether everything that was compared agrees, and something was."""
        return not self.problem and all(row.ok for row in self.rows)

    def head(self):
        """The first line"""
        if self.problem:
            return f"{self.label}: FAILED"
        agree = f"{sum(row.ok for row in self.rows)} of {len(self.rows)} tensors agree"
        agree += ", forward only" if any("forward only" in note for note in self.notes) else ""
        about = [f"{self.case.model} {self.case.part}, {self.case.precision}", *_named(self.sizes)]
        about += [f"{self.seeds} seeds"] if self.seeds > 1 else []
        return f"{self.label}: {'ok' if self.ok else 'FAILED'}  ({', '.join(about)}: {agree})"

    def remarks(self):
        """The notes, and one on tensors of which so much is allowed that little is shown"""
        vague = [row.tensor for row in self.rows if row.allowed > VAGUE and not row.problem]
        text = (
            f"rounding alone may hide any fault of {', '.join(vague)} here: allowed above {VAGUE}"
        )
        return (*self.notes, text) if vague else self.notes

    def text(self, quiet=False):
        """What the command prints; quiet: of the tensors only those that fail"""
        lines = [self.problem] if self.problem else [f"note  {n}" for n in self.remarks()]
        for row in sorted(self.rows, key=lambda row: row.ok):
            lines += [] if quiet and row.ok else row.lines()
        return "\n".join([self.head(), *(f"    {line}" for line in lines)])

    def as_dict(self):
        """What JSON can hold"""
        case = self.case
        about = (
            {} if case is None else {n: getattr(case, n) for n in ("model", "part", "precision")}
        )
        own = {"label": self.label, "ok": self.ok} | about | {"sizes": self.sizes}
        own |= {"seeds": self.seeds, "problem": self.problem, "notes": [*self.remarks()]}
        return own | {"rows": [row.as_dict() for row in self.rows]}

    def json(self):
        """The report as JSON"""
        return json.dumps(self.as_dict())


def _named(sizes):
    return [f"{letter} {n}" for letter, n in sizes.items()]


def verify(case):
    """Recompute a case, compare its out.* and grad.* tensors -> list of Row.   Error: as compute"""
    return list(report(case).rows)


def report(case, label="", explain=True):
    """As verify -> Report"""
    claims = {n: t for n, t in case.tensors.items() if n.startswith(("out.", "grad."))}
    if not claims:
        compute(case)  # what is wrong with its sources comes first
        raise Error("the case has nothing to compare: no out.* and no grad.* tensor.")
    reference = _Reference.of(case, "out.y_steps" in claims, explain)
    if claims.keys() - reference.results.keys():  # its sentence lists all that there is
        reference = _Reference.of(case, True, explain)
    unknown = [name for name in claims if name not in reference.results]
    surplus = {*unknown[UNKNOWN:]}
    rows = [reference.row(n, t) for n, t in claims.items() if n not in surplus]
    if surplus:
        rows.append(_failed(f"{len(surplus)} more tensors", "not something this part computes"))
    return Report(label, case, tuple(rows))


def report_file(path):
    """The Report of a case file, also of one that cannot be read or computed"""
    try:
        with np.errstate(all="ignore"):  # numbers beyond all measure are found in what is compared
            return report(cases.read_case(path), str(path))
    except Error as e:
        return Report(str(path), problem=files.one_line(e))
    except (ArithmeticError, LookupError, TypeError, ValueError) as e:
        problem = f"settings and tensors do not go together ({type(e).__name__}: {e})."
        return Report(str(path), problem=files.one_line(problem))
    except MemoryError:
        return Report(str(path), problem="out of memory: this case is too large for this machine.")


# Functions


def verify_callable(
    f,
    model,
    part,
    dtype="float32",
    settings=None,
    seed=0,
    seeds=1,
    B=2,
    L=24,
    D=None,
    N=None,
    framework="numpy",
    initial_state=False,
    case=None,
    sweep=False,
    label="",
):
    """Check a function against the reference -> Report, with sweep=True Sweep.

    f: of part "scan" f(**arrays), by the names of scan_forward's arguments; of others f(params, x),
    params a dict under published names, with lengths=, state= (a dict) where the case has them; of
    etsc and l2t f(params, **inputs). It returns outputs, y or a dict by name, or (outputs,
    backward): backward(douts), like the outputs that a gradient is fed back into, returns a dict of
    gradients by argument. Outputs alone of PyTorch with a grad_fn, or of JAX, are differentiated.
    framework: numpy, torch (or torch:cuda), cupy or jax, whose arrays of `dtype` f gets.
    D, N: d_model and d_state; settings: further fields of the model's Config.
    case: a Case whose sources to take instead of random ones; label: what the report calls f.
    Error: an unknown model, part, setting, dtype or framework; what f does is in the report
    """
    check_choice("dtype", dtype, cases.PRECISIONS)
    frameworks.check(framework)
    if seeds < 1:
        raise Error(f"seeds={seeds}: expected at least 1.")
    if sweep:
        given = {"settings": settings, "seed": seed, "seeds": seeds, "D": D, "N": N}
        given |= {"framework": framework, "initial_state": initial_state, "label": label}
        return over_shapes(f, model, part, dtype, **given)
    if case is not None:
        if (case.model, case.part) != (model, part):
            asked = f"{model}'s {part}"
            raise Error(f"the case is of {case.model}'s {case.part}, and {asked} was asked for.")
        return _report_on(f, case, framework, label)
    settings = _settings(model, part, settings, D, N)
    drawn = (
        cases.draw(model, part, settings, B, L, dtype, seed + i, initial_state)[0]
        for i in range(seeds)
    )
    return _worst([_report_on(f, c, framework, label, seed + i) for i, c in enumerate(drawn)])


def _settings(model, part, settings, D, N, needed=True):
    """Those of a case, small where nothing is asked for; D, N where there are such settings, which
    there must be if they are needed"""
    settings = settings or {}
    fields = cases.config_class(cases.module_of(model), part).__dataclass_fields__
    own = {n: v for n, v in (("d_model", D), ("d_state", N)) if v is not None}
    own = {n: v for n, v in own.items() if needed or (n in fields and n not in settings)}
    return {n: v for n, v in SMALL.items() if n in fields} | settings | own


def _label(f):
    module, name = getattr(f, "__module__", None), getattr(f, "__qualname__", None)
    return f"{module}:{name}" if module and name else type(f).__name__


def _report_on(f, case, framework, label="", seed=0, explain=True):
    """One call of f, compared"""
    part, _ = _checked(case)
    own = isinstance(part, cases.OwnPart)
    aliases = {f"param.{name}": f"param.{other}" for name, other in part.aliases().items()}
    douts = case.of("dout.")
    douts = douts or {n: np.ones(1, cases.PRECISIONS[case.precision]) for n in _losses(case)}
    only = ALONE.get(case.part) if own else "y"
    label = label or _label(f)
    outcome = frameworks.called(f, case, framework, douts, aliases, only, own)
    sizes = _sizes(cases.computed(case), part)
    if outcome.failed:
        return Report(label, case, sizes=sizes, problem=outcome.failed)
    if not outcome.backward:
        kept = {n: t for n, t in case.tensors.items() if not n.startswith("dout.")}
        case = replace(case, tensors=kept)
    reference = _Reference.of(case, "out.y_steps" in outcome.claims, explain)
    rows = _rows(reference, outcome, [f"out.{name}" for name in douts])
    rows = tuple(replace(row, seed=seed) for row in rows)
    return Report(label, case, rows, sizes, notes=tuple(outcome.notes))


def _losses(case):
    return LOSSES.get(case.part, ()) if case.model in cases.OWN else ()


def _rows(reference, outcome, required):
    """Of all that f gave and of what it should have given"""
    results, claims, rows = reference.results, dict(outcome.claims), []
    gradients = {n for n in results if n.startswith("grad.") and outcome.backward}
    for name in [n for n in claims if n.startswith("grad.") and n not in results]:
        del claims[name]
        outcome.notes.append(f"{name} is not compared: it is not trained here")
    rows = [_failed(name, sentence) for name, sentence in outcome.problems.items()]
    for name, claim in claims.items():
        problem = _imprecise(claim.dtype, reference.case.precision)
        rows.append(_failed(name, problem) if problem else reference.row(name, claim))
    given = claims.keys() | outcome.problems.keys()
    missing = [n for n in required if n not in given]
    if "backward" not in outcome.problems:
        missing += sorted(gradients - given)
    rows += [_failed(name, "is missing: f did not give it") for name in missing]
    unchecked = [n[4:] for n in results if n.startswith("out.") and n not in {*given, *missing}]
    if unchecked:
        outcome.notes.append(f"not given, so not checked: {', '.join(unchecked)}")
    if not any(row.tensor in results for row in rows):
        rows.append(_failed("out", f"nothing to compare: f gave none of {', '.join(unchecked)}"))
    return rows


def _imprecise(dtype, precision):
    """A sentence about numbers of fewer digits than the case's"""
    try:
        if dtype.kind in "fcV":
            if float(ml_dtypes.finfo(dtype).eps) <= _ulp(precision):
                return ""
            return f"has the precision {dtype.name}; expected {precision} or better"
    except (ValueError, TypeError, KeyError):
        pass
    return f"has the type {dtype.name}; expected {precision}"


def _worst(reports):
    """Of several seeds one Report with the worst row of each tensor"""
    if broken := [r for r in reports if r.problem]:
        return replace(broken[0], seeds=len(reports))
    rows = {}
    for row in (row for r in reports for row in r.rows):
        if row.tensor not in rows or row.excess > rows[row.tensor].excess:
            rows[row.tensor] = row
    notes = dict.fromkeys(note for r in reports for note in r.notes)
    own = {"rows": tuple(rows.values()), "notes": tuple(notes), "seeds": len(reports)}
    return replace(reports[0], **own)


# Many shapes


@dataclass(frozen=True)
class Sweep:
    """Reports over a ladder of shapes."""

    reports: tuple
    skipped: tuple = ()  # (shape, why the model does not have it)
    detail: object = None  # of the smallest shape that fails, with hints

    @property
    def ok(self):
        """Whether all shapes agree."""
        return all(r.ok for r in self.reports)

    @property
    def smallest(self):
        """Sizes of the smallest shape that fails, by L, then in all; None"""
        failing = [r.sizes for r in self.reports if not r.ok]
        return min(failing, key=_size, default=None)

    @property
    def rows(self):
        """The worst row of each tensor."""
        return _worst([r for r in self.reports if not r.problem] or [*self.reports]).rows

    def closing(self, quiet=False):
        """What comes after the lines of the shapes"""
        agree = f"{sum(r.ok for r in self.reports)} of {len(self.reports)} shapes agree"
        if self.ok:
            return agree
        return f"{agree}; the smallest that fails: {', '.join(_named(self.smallest))}\n" + (
            self.detail or next(r for r in self.reports if not r.ok)
        ).text(quiet)

    def text(self, quiet=False):
        """What the command prints: a line a shape, and the smallest that fails"""
        lines = [_shape_line(r) for r in self.reports]
        return "\n".join([*lines, *(_skipped(*s) for s in self.skipped), self.closing(quiet)])

    def as_dict(self):
        """What JSON can hold"""
        skipped = [{"shape": shape, "why": why} for shape, why in self.skipped]
        reports = [r.as_dict() for r in self.reports]
        detail = self.detail and self.detail.as_dict()
        own = {"ok": self.ok, "smallest": self.smallest, "detail": detail}
        return own | {"reports": reports, "skipped": skipped}

    def json(self):
        """The sweep as JSON"""
        return json.dumps(self.as_dict())


def _size(sizes):
    return sizes.get("L", 0), math.prod(sizes.values())


def _shape_line(report):
    shape = ", ".join(_named(report.sizes))
    if report.problem:
        return f"FAIL  {shape}: {report.problem}"
    if not report.ok:
        return f"FAIL  {shape}: {', '.join(row.tensor for row in report.rows if not row.ok)}"
    row = max(report.rows, key=lambda row: row.excess)
    return f"ok    {shape}: {row.tensor} at {row.excess:.2f} of what is allowed"


def _skipped(shape, why):
    return f"      {', '.join(_named(shape))}: {why}"


def over_shapes(
    f,
    model,
    part,
    dtype="float32",
    settings=None,
    seed=0,
    seeds=1,
    D=None,
    N=None,
    framework="numpy",
    initial_state=False,
    label="",
    show=None,
):
    """verify_callable over L in LENGTHS, B in 1, 2, 3, D and N odd and even -> Sweep.

    D and N stay what they are when given. show(line): called for each shape.   Error: as
    verify_callable; a shape that the model does not have is skipped
    """
    check_choice("dtype", dtype, cases.PRECISIONS)
    frameworks.check(framework)
    seeds = range(seed, seed + seeds)
    done, skipped = [], []

    def on(drawn, explain):
        return _worst(
            [
                _report_on(f, c, framework, label, i, explain)
                for i, c in zip(seeds, drawn, strict=True)
            ]
        )

    def tell(line):
        if show:
            show(line)

    for B, L, widths in _shapes(D, N):
        try:
            drawn = _drawn(model, part, settings, B, L, widths, dtype, seeds, initial_state)
        except Error as e:
            skipped.append(({"B": B, "L": L}, str(e)))
            tell(_skipped(*skipped[-1]))
            continue
        done.append((on(drawn, False), drawn))
        tell(_shape_line(done[-1][0]))
    if not done:
        raise Error(skipped[0][1])
    reports, failing = tuple(r for r, _ in done), [(r, d) for r, d in done if not r.ok]
    detail = None
    if failing:
        detail = on(min(failing, key=lambda one: _size(one[0].sizes))[1], True)
    return Sweep(reports, tuple(skipped), detail)


def _shapes(D, N):
    """(B, L, choices of (D, N)): the next of WIDTHS, then with N, D or both rounded up"""
    at = 0
    for L in LENGTHS:
        for B in (1, 2, 3):
            d, n = WIDTHS[at % len(WIDTHS)]
            at += 1
            d, n = d if D is None else D, n if N is None else N
            even = d + (d % 2 if D is None else 0), n + (n % 2 if N is None else 0)
            eight = even[0] if D is not None else -(-d // 8) * 8, even[1]  # for several heads
            yield B, L, [*dict.fromkeys([(d, n), (d, even[1]), (even[0], n), even, eight])]


def _drawn(model, part, settings, B, L, widths, dtype, seeds, initial_state):
    """Cases of the first of the widths that the model has, one a seed.   Error: it has none"""
    refused = None
    for D, N in widths:
        own = _settings(model, part, settings, D, N, needed=False)
        try:
            return [cases.draw(model, part, own, B, L, dtype, i, initial_state)[0] for i in seeds]
        except Error as e:
            refused = refused or e
    raise refused
