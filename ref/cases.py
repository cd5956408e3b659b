"""The case format `ssm-case-1`: write cases, read them, recompute them, and say where another
implementation differs.

A case is a safetensors file with inputs `in.*`, parameters `param.*` under their published names,
upstream gradients `dout.*`, and what came of them: `out.*`, `grad.in.*`, `grad.param.*`.
Recomputing reads the first three only.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import math

import ml_dtypes
import numpy as np

from ref import Error, block, files, network, nn
from ref.presets import check_kinds

FORMAT = "ssm-case-1"
TOLERANCE = 1e-9  # of float64, where the case does not name its own
PRECISIONS = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SOURCES = ("in.", "param.", "dout.")
SCAN_SETTINGS = ("update",)  # arguments of a scan that are no arrays
ALIASES = {  # a case's model -> whose module computes it, with which settings unless it has others
    "l2t-student": ("hyena", {"block": "bare", "filter": "gated", "recurrence": "residual"}),
}
# Models that are no layers: modules that say themselves what a case is
OWN = {"etsc": "ref.etsc", "l2t": "ref.l2t_cases"}
DRAWS = 8  # perturbed recomputations that measure what rounding alone does


@dataclasses.dataclass(frozen=True)
class Case:
    """One case file in memory."""

    model: str
    part: str
    precision: str
    settings: dict  # the metadata's "config"
    tensors: dict  # name -> array, prefixes included
    tolerance: dict = dataclasses.field(default_factory=dict)  # tensor name -> allowed error
    source: str = "ref"

    def of(self, prefix):
        """The tensors whose names begin with prefix, without it"""
        return {n[len(prefix) :]: t for n, t in self.tensors.items() if n.startswith(prefix)}


def read_case(path):
    """-> Case.   Error: missing, truncated, foreign, of an unknown format or model or precision"""
    tensors, metadata = files.read_tensors(path)
    try:
        head = json.loads(metadata["case"])
        tolerance = head.get("tolerance") or json.loads(metadata.get("tolerance", "{}"))
        head = {name: head[name] for name in ("format", "model", "part", "precision", "config")}
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise Error(f"{path} is no case file: its metadata lack {e}.") from e
    if head["format"] != FORMAT:
        raise Error(f"{path} has the format {head['format']!r}; this program reads {FORMAT!r}.")
    if head["precision"] not in PRECISIONS:
        raise Error(f"{path}: precision {head['precision']!r}; known: {', '.join(PRECISIONS)}.")
    known = ("in.", "out.", "param.", "dout.", "grad.in.", "grad.param.")
    if strange := [name for name in tensors if not name.startswith(known)]:
        raise Error(f"{path}: the name {strange[0]!r} is of no kind that the format has.")
    return Case(head["model"], head["part"], head["precision"], head["config"], tensors, tolerance)


def write_case(path, case):
    """Write a Case as one safetensors file, atomically"""
    head = {
        "format": FORMAT,
        "model": case.model,
        "part": case.part,
        "precision": case.precision,
        "source": case.source,
        "config": case.settings,
    }
    if case.tolerance:
        head["tolerance"] = case.tolerance
    files.write_tensors(path, case.tensors, {"case": json.dumps(head)})


# Computing a part from published tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model in the form of cases: published tensors in, published tensors out."""

    model: str
    part: str
    cfg: object  # the model's Config; of a network, network.Config

    def template(self):
        """The published tensors that the part has, {name: array}, from a fixed seed"""
        return self.init(np.random.default_rng(0))

    def init(self, rng):
        """Published tensors of a random part, float64; noise keeps parameters off special values"""
        if self.part in ("init", "scan"):
            return {}
        if self.part == "network":
            params = network.init(self.cfg, rng, "float64")
        else:
            params = getattr(self._module(), f"{self.part}_init")(self.cfg, rng, "float64")
        layer = self.cfg.layer if self.part == "network" else self.cfg
        for name, p in params.items():
            if not network.is_buffer(name, self.model, layer):
                params[name] = p + 0.1 * np.abs(rng.standard_normal(p.shape))
        return self._to_published(params) | self._buffers()

    def run(self, tensors, inputs, douts=None):
        """-> {"out.*"}, with douts also {"grad.*"}.   Without dropout, with running moments"""
        module = self._module()
        if self.part == "init":
            return {f"out.{name}": t for name, t in module.init_outputs(self.cfg).items()}
        if self.part == "scan":
            return self._scan(inputs, douts)
        x = inputs["x"]
        if self.part == "network":
            params = network.from_published(tensors, self.cfg)
            y, cache = network.forward(params, x, self.cfg, inputs.get("lengths"))
        else:
            params = module.from_published(tensors, self.cfg, self.part)
            y, cache = getattr(module, f"{self.part}_forward")(params, x, self.cfg)
        results = {"out.y": y} | self._steps(params, x)
        if hasattr(module, "case_outputs"):
            extra = module.case_outputs(self.part, params, x, self.cfg)
            results |= {f"out.{name}": value for name, value in extra.items()}
        if douts is not None:
            if douts["y"].shape != y.shape:
                raise Error(f"dout.y has the shape {douts['y'].shape}; out.y has {y.shape}.")
            backward = network.backward
            if self.part != "network":
                backward = getattr(module, f"{self.part}_backward")
            dx, grads = backward(douts["y"], cache)
            results |= {} if dx is None else {"grad.in.x": dx}
            grads = self._to_published(grads)
            results |= {f"grad.param.{name}": g for name, g in grads.items()}
        return results

    def _scan(self, inputs, douts):
        """A recurrence with skip and gate: arguments in, their gradients out"""
        module = self._module()
        y, last, cache = module.scan_forward(**inputs, **self.cfg)
        results = {"out.y": y, "out.last_state": last, "out.y_steps": self._scan_steps(inputs)}
        if douts is not None:
            for name, t in (("y", y), ("last_state", last)):
                if name in douts and douts[name].shape != t.shape:
                    shapes = f"{douts[name].shape}; out.{name} has {t.shape}"
                    raise Error(f"dout.{name} has the shape {shapes}.")
            grads = module.scan_backward(douts["y"], cache, douts.get("last_state"))
            results |= {f"grad.in.{name}": g for name, g in grads.items()}
        return results

    def _scan_steps(self, inputs):
        """y, position after position, each from the state after the one before"""
        module, steps, state = self._module(), [], {}
        for t in range(inputs["x"].shape[1]):
            now = {n: a[:, t : t + 1] for n, a in inputs.items() if n in module.SCAN_IN_TIME}
            y, last, _ = module.scan_forward(**inputs | now | state, **self.cfg)
            steps.append(y[:, 0])
            state = {module.SCAN_STATE: last}
        return np.stack(steps, axis=1)

    def _steps(self, params, x):
        """out.y_steps: y by decoding, one time step after the other; nothing where there is none"""
        module = self._module()
        names = {"operator": "operator_step", "mixer": "mixer_step", "block": "step"}
        one_step = names.get(self.part, "")
        if not hasattr(module, one_step):
            return {}
        steps = []
        try:
            state = module.state(params, self.cfg, len(x))
            for t in range(x.shape[1]):
                y_t, state = getattr(module, one_step)(params, x[:, t], state, self.cfg)
                steps.append(y_t)
        except Error:  # it is not causal, or x is longer than it can decode
            return {}
        return {"out.y_steps": np.stack(steps, axis=1)}

    def aliases(self):
        """{name: the other name of the same tensor} of tied parameters, which a published state
        dict may list twice: their gradient, the whole one, is listed under both names then"""
        if self.part == "network":
            return network.published_aliases(self.cfg)
        own = getattr(self._module(), "published_aliases", lambda cfg, part: {})
        return own(self.cfg, self.part)

    def _buffers(self):
        """Published tensors that are neither parameters nor moments: integers of the settings"""
        module = self._module()
        if not hasattr(module, "published_buffers"):
            return {}
        if self.part != "network":
            return module.published_buffers(self.cfg, self.part)
        return network.published_buffers(self.cfg)

    def _module(self):
        return module_of(self.model)

    def _to_published(self, params):
        if self.part == "network":
            return network.to_published(params, self.cfg)
        return self._module().to_published(params, self.cfg, self.part)


@dataclasses.dataclass(frozen=True)
class OwnPart(Part):
    """One part of a model of OWN.

    Its module has CASE_PARTS, part -> the outputs whose gradients feed back; Config, the settings;
    config_of(settings, tensors, part) -> Config, tensors with their prefixes;
    case_sources(part, cfg, B, L, rng) -> {"in.*", "param.*"}, random ones, float64; and
    case_results(part, cfg, params, inputs, douts) -> {"out.*", "grad.*"}. It may have
    case_aliases(part, cfg), as Part.aliases; CASE_CONFIGS, part -> a Config of its own; and
    CASE_MODULES, others whose pairs carry rounding.
    """

    def template(self):
        """{"in.*", "param.*"}: the names, and of the parameters the shapes"""
        return self._module().case_sources(self.part, self.cfg, 1, 1, np.random.default_rng(0))

    def aliases(self):
        """As Part.aliases"""
        own = getattr(self._module(), "case_aliases", lambda part, cfg: {})
        return own(self.part, self.cfg)

    def run(self, tensors, inputs, douts=None):
        """-> {"out.*"}, and {"grad.*"} where there are some"""
        return self._module().case_results(self.part, self.cfg, tensors, inputs, douts or {})


def module_of(model):
    """The module that computes a case's model.   Error: unknown name"""
    if model in OWN:
        return importlib.import_module(OWN[model])
    return network.model_module(ALIASES.get(model, (model,))[0])


def part_of(case):
    """The Part that a case is about.   Error: unknown model, part or setting"""
    case = _computed(case)
    module = module_of(case.model)
    _check_part(module, case.model, case.part)
    kind = OwnPart if case.model in OWN else Part
    return kind(case.model, case.part, part_config(case, module))


def _computed(case):
    """The case as one of the model that computes it"""
    model, usual = ALIASES.get(case.model, (case.model, {}))
    return dataclasses.replace(case, model=model, settings=usual | case.settings)


def _check_part(module, model, part):
    scan = ("scan",) if hasattr(module, "scan_forward") else ()
    parts = tuple(module.CASE_PARTS) if model in OWN else (*scan, *module.PUBLISHED, "network")
    if part not in parts:
        raise Error(f"{model} has no part {part!r}; it has: {', '.join(parts)}.")


def part_config(case, module):
    """The Config that a case's settings and tensors give; of a scan its settings alone"""
    if case.model in OWN:
        return _own_config(case, module)
    if case.part == "scan":
        return _scan_config(case, module)
    auto = {n for n, v in case.settings.items() if v == "auto"}  # what the shapes say
    case = dataclasses.replace(
        case, settings={n: v for n, v in case.settings.items() if n not in auto}
    )
    layer_fields = {f.name for f in dataclasses.fields(module.Config)}
    network_fields = {f.name for f in dataclasses.fields(network.Config)} - {"model", "layer"}
    published = set(getattr(module, "PUBLISHED_SETTINGS", ()))  # that are no fields of ours
    known = layer_fields | published | {"note"}
    if case.part == "network":
        known |= network_fields
    if unknown := case.settings.keys() - known:
        raise Error(
            f"the setting {sorted(unknown)[0]!r} is not one of {case.model}'s {case.part}; "
            f"it has: {', '.join(sorted(known - {'note'}))}."
        )
    outer = [network.Config] if case.part == "network" else []
    check_kinds(case.settings, module.Config, *outer, what="the setting ")
    settings = {n: v for n, v in case.settings.items() if n in layer_fields | published}
    params = case.of("param.")
    if case.settings.get("n_layers", 0) > max(1, len(params)):
        raise Error(
            f"n_layers={case.settings['n_layers']}, but there are {len(params)} parameters."
        )
    try:
        layer = module.config_of(settings, params, case.part)
        if case.part != "network":
            return layer
        if hasattr(module, "network_settings") and "decoder" not in case.settings:
            own = module.network_settings(case.settings, params)
            return network.Config(case.model, layer, **own)
        names = {ours: theirs for theirs, ours in network.outside_names(case.model, layer).items()}
        weight = params[names["encoder.weight"]]
        tokens = case.tensors["in.x"].dtype.kind in "iu"
        own = {n: v for n, v in case.settings.items() if n in network_fields}
        own |= {"tokens": tokens, "d_input": weight.shape[0 if tokens else 1]}
        own.setdefault("d_output", len(params.get(names["decoder.weight"], weight)))
        return network.Config(case.model, layer, **own)
    except (KeyError, TypeError, IndexError, ValueError) as e:
        raise Error(
            f"the case's settings and parameters do not describe a {case.part}: {e} is missing or "
            "has another form."
        ) from e


def config_class(module, part):
    """The Config of a module's part, which few have one of their own for"""
    return getattr(module, "CASE_CONFIGS", {}).get(part, module.Config)


def _own_config(case, module):
    """The Config of a model of OWN.   Error: a setting that it does not have, or of another type"""
    settings = {n: v for n, v in case.settings.items() if n != "note"}
    config = config_class(module, case.part)
    known = {f.name for f in dataclasses.fields(config)}
    if unknown := sorted(settings.keys() - known):
        has = ", ".join(sorted(known))
        raise Error(f"the setting {unknown[0]!r} is not one of {case.model}'s; it has: {has}.")
    check_kinds(settings, config, what="the setting ")
    sources = {n: t for n, t in case.tensors.items() if n.startswith(SOURCES)}
    return module.config_of(settings, sources, case.part)


def _scan_config(case, module):
    """The settings of a scan.   Error: one that it does not have, or of another type"""
    known = {p for p in inspect.signature(module.scan_forward).parameters if p in SCAN_SETTINGS}
    own = {n: v for n, v in case.settings.items() if n != "note"}
    if unknown := sorted(own.keys() - known):
        has = ", ".join(sorted(known)) or "none"
        raise Error(f"the setting {unknown[0]!r} is not one of {case.model}'s scan; it has: {has}.")
    check_kinds(own, module.Config, what="the setting ")
    return own


def _scan_inputs(module):
    """name -> whether it is required, of the arrays that a scan takes"""
    given = inspect.signature(module.scan_forward).parameters.items()
    return {n: p.default is p.empty for n, p in given if n not in SCAN_SETTINGS}


def compute(case):
    """Recompute a case in float64 from its in.*, param.* and dout.* alone -> {"out.*", "grad.*"}"""
    case = _computed(case)
    part = part_of(case)
    sources = _float64({n: t for n, t in case.tensors.items() if n.startswith(SOURCES)})
    _check_sources(case, part, sources)
    return _run(part, sources)


def _float64(tensors):
    """Floating tensors as float64; integers as they are"""
    floats = {*PRECISIONS.values()}
    return {n: t.astype("float64") if t.dtype in floats else t for n, t in tensors.items()}


def _run(part, sources):
    """What the part computes; of a tied parameter that is listed twice from one, for both names"""
    aliases = {f"param.{name}": f"param.{other}" for name, other in part.aliases().items()}
    tied = {name: other for name, other in aliases.items() if name in sources}

    def of(prefix):
        own = {n: t for n, t in sources.items() if n.startswith(prefix) and n not in tied}
        return {n[len(prefix) :]: t for n, t in own.items()}

    results = part.run(of("param."), of("in."), of("dout.") or None)
    grads = {f"grad.{name}": results.get(f"grad.{other}") for name, other in tied.items()}
    return results | {name: g for name, g in grads.items() if g is not None}


def _check_sources(case, part, sources):
    """Error for a parameter or input that is missing, unknown, or of another shape"""
    if case.model in OWN:
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
    inputs = {"x": True} | ({"lengths": False} if case.part == "network" else {})
    inputs = {} if case.part == "init" else inputs
    if case.part == "scan":
        inputs = _scan_inputs(module_of(case.model))
    allowed = {f"in.{name}" for name in inputs}
    for name, required in inputs.items():
        if required and f"in.{name}" not in sources:
            raise Error(f"in.{name} is missing.")
    if unknown := {n for n in sources if n.startswith("in.")} - allowed:
        raise Error(f"{sorted(unknown)[0]} is not an input of {case.model}'s {case.part}.")
    wants = [n for n in case.tensors if n.startswith("grad.")]
    if wants and "dout.y" not in sources:
        raise Error(f"dout.y is missing, so {wants[0]} cannot be recomputed.")
    feeds_back = {"dout.y"} | ({"dout.last_state"} if case.part == "scan" else set())
    if unknown := {n for n in sources if n.startswith("dout.")} - feeds_back:
        raise Error(f"{sorted(unknown)[0]} is not the gradient of an output that feeds back here.")
    _check_finite(sources)


def _check_own_sources(case, part, sources):
    """The same, of a model of OWN, which looks itself at the shapes of its inputs"""
    template, douts = part.template(), module_of(case.model).CASE_PARTS[case.part]
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


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one tensor."""

    tensor: str
    error: float  # largest deviation over the reference's largest magnitude
    allowed: float
    unavoidable: (
        float  # the error that rounding at the case's precision makes by itself; 0 in float64
    )
    index: tuple  # of the worst element
    value: float  # there
    expected: float
    problem: str = ""  # a sentence, where no comparison was possible

    @property
    def ok(self):
        """Whether the tensor passes."""
        return not self.problem and self.error <= self.allowed


def verify(case):
    """Recompute a case, compare its out.* and grad.* tensors -> list of Row.   Error: as compute"""
    reference = compute(case)
    claims = {n: t for n, t in case.tensors.items() if n.startswith(("out.", "grad."))}
    if not claims:
        raise Error("the case has nothing to compare: no out.* and no grad.* tensor.")
    unavoidable = _unavoidable(case, reference) if case.precision != "float64" else {}
    return [_compare(case, name, t, reference, unavoidable) for name, t in claims.items()]


def _compare(case, name, claim, reference, unavoidable):
    def failed(problem):
        return Row(name, math.nan, 0.0, 0.0, (), math.nan, math.nan, problem)

    if name not in reference:
        return failed(f"not something this part computes; it computes {', '.join(reference)}")
    r = np.asarray(reference[name])
    if claim.shape != r.shape:
        return failed(f"has the shape {claim.shape}; expected {r.shape}")
    claim = claim.astype("float64")
    bad = ~np.isfinite(claim)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        return failed(f"{bad.sum()} values are not finite, the first at {list(first)}")
    scale = np.abs(r).max() or 1.0
    deviation = np.abs(claim - r)
    index = tuple(int(i) for i in np.unravel_index(deviation.argmax(), r.shape))
    own = unavoidable.get(name, 0.0)
    allowed = 4 * own + _ulp(case.precision) if unavoidable else TOLERANCE
    allowed = float(case.tolerance.get(name, allowed))
    at = float(claim[index]), float(r[index])
    return Row(name, float(deviation[index] / scale), allowed, own, index, *at)


def _ulp(precision):
    return float(ml_dtypes.finfo(PRECISIONS[precision]).eps)


def _unavoidable(case, reference):
    """name -> the largest deviation of recomputations with everything off by up to half an ulp"""
    case = _computed(case)
    part, half = part_of(case), 0.5 * _ulp(case.precision)
    sources = _float64({n: t for n, t in case.tensors.items() if n.startswith(SOURCES)})
    worst = dict.fromkeys(reference, 0.0)
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        with perturbed(half, rng, module_of(case.model)):
            results = _run(part, {n: _perturb(t, half, rng) for n, t in sources.items()})
        for name, r in reference.items():
            deviation = np.abs(_perturb(results[name], half, rng) - r).max()
            worst[name] = max(worst[name], float(deviation / (np.abs(r).max() or 1.0)))
    return worst


def _perturb(x, half, rng):
    """x with every element off by up to `half` of itself; what is no floating array, as it is"""
    if isinstance(x, np.ndarray) and x.dtype.kind in "fc":
        return x * (1 + half * rng.uniform(-1, 1, x.shape))
    return x


@contextlib.contextmanager
def perturbed(half, rng, module):
    """While this is open, every result of a model's pairs, and of those it shares, is off a little.

    These are the named intermediates: projections, kernels, gates, convolutions, pooled features.
    """
    before = []

    def wrap(f):
        def perturbing(*args, **kwargs):
            first, *others = _as_tuple(f(*args, **kwargs))
            if isinstance(first, np.ndarray):
                first = _perturb(first, half, rng)
            others = [_perturb(other, half, rng) for other in others]
            return (first, *others) if others else first

        return perturbing

    own = (f"{module.__name__}_", "ref.selective")  # files that hold a part of the model's
    used = [used for used in vars(module).values() if inspect.ismodule(used)]
    used = [u for u in used if u.__name__.startswith(own)]
    for owner in (nn, *used, *getattr(module, "CASE_MODULES", ()), module):
        for name, f in list(vars(owner).items()):
            if name.endswith(("_forward", "_backward")) and callable(f):
                before.append((owner, name, f))
                setattr(owner, name, wrap(f))
    try:
        yield
    finally:
        for owner, name, f in before:
            setattr(owner, name, f)


def _as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


# Making cases


def make_case(model, part, settings, B=2, L=24, precision="float64", seed=0, initial_state=False):
    """A Case from the reference, for others to be checked against.

    Inputs and parameters are drawn and rounded to the precision; everything else is computed from
    them in float64 and rounded once. initial_state: a scan gets one, and a gradient of its last.
    Error: an unknown part or setting, B or L below 1, an initial state of what takes none.
    """
    if model in ALIASES:
        own, usual = ALIASES[model]
        made = make_case(own, part, usual | settings, B, L, precision, seed, initial_state)
        return dataclasses.replace(made, model=model)
    module, rng = module_of(model), np.random.default_rng(seed)
    if B < 1 or L < 1:
        raise Error(f"B={B}, L={L}: both at least 1.")
    if model in OWN:
        if initial_state:
            raise Error(f"an initial state is for part 'scan', not for {model}.")
        head = Case(model, part, precision, settings, {})
        _check_part(module, model, part)
        p = OwnPart(model, part, _own_config(head, module))
        sources = module.case_sources(part, p.cfg, B, L, rng)
        sources = {n: _rounded(t, precision) for n, t in sources.items()}
        return _made(head, p, sources, module.CASE_PARTS[part], rng)
    if "l_max" in {f.name for f in dataclasses.fields(module.Config)}:
        settings = {"l_max": L} | settings  # the length that S4's C~ is made for
    head = Case(model, part, precision, settings, {})
    _check_part(module, model, part)
    cfg = _free_config(head, module)
    if initial_state and part != "scan":
        raise Error(f"an initial state is for part 'scan'; a case of a {part} starts from zero.")
    if part == "scan":
        if strange := sorted(settings.keys() - {"d_model", "d_state", *SCAN_SETTINGS}):
            raise Error(f"the setting {strange[0]!r} is not one of {model}'s scan.")
        own = {n: v for n, v in settings.items() if n in SCAN_SETTINGS}
        inputs = module.scan_inputs(cfg, B, L, rng)
        if not initial_state:
            del inputs[module.SCAN_STATE]
        sources = {f"in.{n}": _rounded(a, precision) for n, a in inputs.items()}
        douts = ("y", "last_state") if initial_state else ("y",)
        head = dataclasses.replace(head, settings=own)
        return _made(head, Part(model, part, own), sources, douts, rng)
    if part == "network":
        names = ("n_layers", "decoder", "tied", "final_norm", "positions", "pool_from")
        own = {n: getattr(cfg, n) for n in names}
        head = dataclasses.replace(head, settings=settings | own)
    p = Part(model, part, cfg)
    if part == "init":
        results = _run(p, {})
        return dataclasses.replace(
            head, tensors={n: _rounded(t, precision) for n, t in results.items()}
        )
    width = cfg.d_input if part == "network" else network.part_width(model, part, cfg)
    x = rng.standard_normal((B, L, width))
    if part == "network" and cfg.tokens:
        x = rng.integers(0, cfg.d_input, (B, L))
    sources = {"in.x": x} | {f"param.{n}": t for n, t in p.init(rng).items()}
    sources = {n: _rounded(t, precision) for n, t in sources.items()}
    return _made(head, p, sources, ("y",), rng)


def _made(head, part, sources, douts, rng):
    """The Case of these inputs and parameters, with random gradients of the outputs `douts`"""
    outputs = _run(part, _float64(sources))
    for name in douts:
        dout = rng.standard_normal(outputs[f"out.{name}"].shape)
        sources[f"dout.{name}"] = _rounded(dout, head.precision)
    results = _run(part, _float64(sources))
    tensors = sources | {n: _rounded(t, head.precision) for n, t in results.items()}
    return dataclasses.replace(head, tensors=tensors)


def _free_config(case, module):
    """The Config of a case that has no tensors yet"""
    layer_fields = {f.name for f in dataclasses.fields(module.Config)}
    check_kinds(case.settings, module.Config, network.Config, what="the setting ")
    known = layer_fields | {f.name for f in dataclasses.fields(network.Config)} - {"model", "layer"}
    if unknown := sorted(case.settings.keys() - known):
        raise Error(f"the setting {unknown[0]!r} is not one of {case.model}'s {case.part}.")
    layer = module.Config(**{n: v for n, v in case.settings.items() if n in layer_fields})
    if case.part != "network":
        return layer
    own = {"n_layers": 2, "d_input": 11, "d_output": 5, "final_norm": layer.prenorm}
    own["positions"] = getattr(layer, "context", 0)
    own |= {n: v for n, v in case.settings.items() if n not in layer_fields}
    return network.Config(case.model, layer, **own)


def _rounded(t, precision):
    return t.astype(PRECISIONS[precision]) if t.dtype.kind == "f" else t
