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

import json
import math
from dataclasses import asdict, dataclass, field, replace

import ml_dtypes
import numpy as np

from ref import Error, cases, files, frameworks, hints, recompute, rounding
from ref.backend import check_choice

TOLERANCE = 1e-9  # of float64, where the case does not name its own
UNKNOWN = 5  # tensors that the part does not compute are named one by one, up to so many
VAGUE = 0.5  # allowed errors above which a comparison shows little
SMALL = {"d_model": 8, "d_state": 16}  # of a callable's case, unless asked for otherwise
# Outputs whose sum has the gradients, of parts that no gradient is fed back into
LOSSES = {"student-loss": ("loss",), "teacher": ("teacher_loss", "dln_loss")}
ALONE = {"features": "features", "dln": "weight", "student-loss": "loss"}  # outputs, of l2t's parts


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
class Reference:
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
        own, (part, sources) = cases.computed(case), recompute.checked(case)
        results, sizes = cases.run(part, sources, steps), _sizes(own, part)
        inexact = case.precision != "float64"
        unavoidable = rounding.unavoidable(own, part, sources, results, steps) if inexact else {}
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
        allowed = 4 * own + rounding.ulp(self.case.precision) if self.unavoidable else TOLERANCE
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
        about = [f"{self.case.model} {self.case.part}, {self.case.precision}", *named(self.sizes)]
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


def named(sizes):
    return [f"{letter} {n}" for letter, n in sizes.items()]


def verify(case):
    """Recompute a case, compare its out.* and grad.* tensors -> list of Row.   Error: as compute"""
    return list(report(case).rows)


def report(case, label="", explain=True):
    """As verify -> Report"""
    claims = {n: t for n, t in case.tensors.items() if n.startswith(("out.", "grad."))}
    if not claims:
        recompute.compute(case)  # what is wrong with its sources comes first
        raise Error("the case has nothing to compare: no out.* and no grad.* tensor.")
    reference = Reference.of(case, "out.y_steps" in claims, explain)
    if claims.keys() - reference.results.keys():  # its sentence lists all that there is
        reference = Reference.of(case, True, explain)
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
        from ref.sweep import over_shapes  # which needs this module

        return over_shapes(f, model, part, dtype, **given)
    if case is not None:
        if (case.model, case.part) != (model, part):
            asked = f"{model}'s {part}"
            raise Error(f"the case is of {case.model}'s {case.part}, and {asked} was asked for.")
        return report_on(f, case, framework, label)
    settings = case_settings(model, part, settings, D, N)
    drawn = (
        cases.draw(model, part, settings, B, L, dtype, seed + i, initial_state)[0]
        for i in range(seeds)
    )
    return worst_of([report_on(f, c, framework, label, seed + i) for i, c in enumerate(drawn)])


def case_settings(model, part, settings, D, N, needed=True):
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


def report_on(f, case, framework, label="", seed=0, explain=True):
    """One call of f, compared"""
    part, _ = recompute.checked(case)
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
    reference = Reference.of(case, "out.y_steps" in outcome.claims, explain)
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
            if float(ml_dtypes.finfo(dtype).eps) <= rounding.ulp(precision):
                return ""
            return f"has the precision {dtype.name}; expected {precision} or better"
    except (ValueError, TypeError, KeyError):
        pass
    return f"has the type {dtype.name}; expected {precision}"


def worst_of(reports):
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
