"""The case format `ssm-case-1`: write cases, read them, run the part of a model they are about.

A case is a safetensors file with inputs `in.*`, parameters `param.*` under their published names,
upstream gradients `dout.*`, and what came of them: `out.*`, `grad.in.*`, `grad.param.*`.
Recomputing reads the first three only. What of another implementation agrees is in ref/verify.py,
whose functions are also found here.
"""

import dataclasses
import importlib
import inspect
import json
import math

import ml_dtypes
import numpy as np

from ref import Error, files, network
from ref.presets import check_kinds

FORMAT = "ssm-case-1"
PRECISIONS = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SOURCES = ("in.", "param.", "dout.")
HEAD = {"format": str, "model": str, "part": str, "precision": str, "config": dict}
LAYERS = ("n_layers", "num_inner_mlps", "rpe_layers")  # each has parameters
LEAST = 1 << 16  # a setting may be so large whatever the tensors are: lengths, depths
SCAN_SETTINGS = ("update",)  # arguments of a scan that are no arrays
STATEFUL = ("mixer", "block", "network")  # parts that go on from a state, of models that have one
NETWORK = ("n_layers", "decoder", "tied", "final_norm", "positions", "pool_from")
ALIASES = {  # a case's model -> whose module computes it, with which settings unless it has others
    "l2t-student": ("hyena", {"block": "bare", "filter": "gated", "recurrence": "residual"}),
}
# Models that are no layers: modules that say themselves what a case is
OWN = {"etsc": "ref.etsc", "l2t": "ref.l2t_cases"}
ELSEWHERE = {n: f"ref.verify.{n}" for n in ("Report", "Row", "verify", "verify_callable")}
ELSEWHERE |= {
    "compute": "ref.recompute.compute",
    "sweep": "ref.sweep.over_shapes",
}  # ... found here


def __getattr__(name):
    """Names of the modules that say what agrees, which themselves need this one"""
    if name in ELSEWHERE:
        module, _, own = ELSEWHERE[name].rpartition(".")
        return getattr(importlib.import_module(module), own)
    raise AttributeError(f"module 'ref.cases' has no attribute {name!r}")


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
        return _under(prefix, self.tensors)


def read_case(path):
    """-> Case.   Error: missing, truncated, foreign, of an unknown format or model or precision"""
    tensors, metadata = files.read_tensors(path)
    head = _head(path, metadata)
    if head["format"] != FORMAT:
        raise Error(f"{path} has the format {head['format']!r}; this program reads {FORMAT!r}.")
    if head["precision"] not in PRECISIONS:
        raise Error(f"{path}: precision {head['precision']!r}; known: {', '.join(PRECISIONS)}.")
    known = ("in.", "out.", "param.", "dout.", "grad.in.", "grad.param.")
    if strange := [name for name in tensors if not name.startswith(known)]:
        raise Error(f"{path}: the name {strange[0]!r} is of no kind that the format has.")
    own = ("model", "part", "precision", "config")
    for name, t in tensors.items():
        whole = t.dtype.kind in "iu" and not name.startswith(("dout.", "grad."))
        if not whole and t.dtype not in PRECISIONS.values():
            names = ", ".join(PRECISIONS)
            raise Error(f"{path}: {name} is of type {t.dtype}; expected {names}.")
    return Case(*(head[name] for name in own), tensors, head["tolerance"])


def _head(path, metadata):
    """What a file says about itself -> {name: value}.   Error: it lacks something"""
    texts = {name: metadata.get(name, "{}") for name in ("case", "tolerance")}
    try:
        head, tolerance = map(json.loads, texts.values())
    except (ValueError, RecursionError) as e:
        raise Error(f"{path} is no case file: its metadata are not JSON.") from e
    for name, kind in HEAD.items():
        if not isinstance(head, dict) or not isinstance(head.get(name), kind):
            what = {str: "a text", dict: "an object"}[kind]
            raise Error(f"{path} is no case file: {name!r} in its metadata has to be {what}.")
    tolerance = head.get("tolerance") or tolerance
    if not isinstance(tolerance, dict):
        raise Error(f"{path}: the tolerance has to be an object, a number for each tensor.")
    for name, allowed in tolerance.items():
        if not isinstance(allowed, int | float) or not 0 <= allowed < 1e300:
            raise Error(f"{path}: the tolerance of {name} is {allowed!r}; expected 0 or more.")
    return head | {"tolerance": tolerance}


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

    def run(self, tensors, inputs, douts=None, steps=True):
        """-> {"out.*"}, with douts also {"grad.*"}; out.y_steps where it can be and steps is true

        Without dropout, with running moments.
        """
        module = self._module()
        if self.part == "init":
            return {f"out.{name}": t for name, t in module.init_outputs(self.cfg).items()}
        if self.part == "scan":
            return self._scan(inputs, douts, steps)
        x, state = inputs["x"], _under("state.", inputs)
        params, y, cache = self._forward(tensors, x, inputs.get("lengths"), state)
        results = {"out.y": y} | (self._steps(params, x, state) if steps else {})
        if not state and hasattr(module, "case_outputs"):
            extra = module.case_outputs(self.part, params, x, self.cfg)
            results |= {f"out.{name}": value for name, value in extra.items()}
        if state or _under("state.", douts or {}):
            last = self._last_state(cache)
            results |= {f"out.state.{name}": value for name, value in last.items()}
        if douts is not None:
            _check_douts(douts, results)
            results |= self._backward(douts, cache)
        return results

    def _forward(self, tensors, x, lengths, state):
        """-> params, y, cache"""
        given, module = {"state": state} if state else {}, self._module()
        if self.part == "network":
            if state:
                given = {"state": {"position": 0, "blocks": self._by_layer(state)}}
            params = network.from_published(tensors, self.cfg)
            return params, *network.forward(params, x, self.cfg, lengths, **given)
        params = module.from_published(tensors, self.cfg, self.part)
        return params, *getattr(module, f"{self.part}_forward")(params, x, self.cfg, **given)

    def _backward(self, douts, cache):
        """-> {"grad.in.*", "grad.param.*"}"""
        module, given, after = self._module(), {}, _under("state.", douts)
        if after:
            last = self._last_state(cache)
            after = {name: after.get(name, np.zeros_like(t)) for name, t in last.items()}
            given = {"dstate": after}
        if self.part == "network":
            given = {"dstate": {"blocks": self._by_layer(after)}} if after else {}
            dx, grads = network.backward(douts["y"], cache, **given)
        else:
            dx, grads = getattr(module, f"{self.part}_backward")(douts["y"], cache, **given)
        before = _under("blocks.state." if self.part == "network" else "state.", grads)
        grads = {name: g for name, g in grads.items() if "state." not in name}
        results = {} if dx is None else {"grad.in.x": dx}
        results |= {f"grad.in.state.{name}": g for name, g in before.items()}
        grads = self._to_published(grads)
        return results | {f"grad.param.{name}": g for name, g in grads.items()}

    def _by_layer(self, state):
        """A network's state, stacked on a leading axis of layers -> one of each block"""
        return [{name: t[i] for name, t in state.items()} for i in range(self.cfg.n_layers)]

    def _last_state(self, cache):
        """The state after what forward saw; of a network stacked"""
        if self.part == "mixer":
            return self._module().mixer_state(cache)
        if self.part == "block":
            return self._module().final_state(cache)
        blocks = network.final_state(cache)["blocks"]
        return {name: np.stack([own[name] for own in blocks]) for name in blocks[0]}

    def state_shapes(self, B):
        """{"state.*": shape} of a state of B sequences; {} where the part takes none"""
        module = self._module()
        if self.part not in STATEFUL or not hasattr(module, "final_state"):
            return {}
        layer = self.cfg.layer if self.part == "network" else self.cfg
        params = module.mixer_init(layer, np.random.default_rng(0))
        layers = (self.cfg.n_layers,) if self.part == "network" else ()
        state = module.state(params, layer, B)
        return {f"state.{name}": (*layers, *t.shape) for name, t in state.items()}

    def _scan(self, inputs, douts, steps):
        """A recurrence with skip and gate: arguments in, their gradients out"""
        module = self._module()
        y, last, cache = module.scan_forward(**inputs, **self.cfg)
        results = {"out.y": y, "out.last_state": last}
        results |= {"out.y_steps": self._scan_steps(inputs)} if steps else {}
        if douts is not None:
            _check_douts(douts, results)
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

    def _steps(self, params, x, state):
        """out.y_steps: y by decoding, one time step after the other; nothing where there is none"""
        module = self._module()
        names = {"operator": "operator_step", "mixer": "mixer_step", "block": "step"}
        one_step = names.get(self.part, "")
        if not hasattr(module, one_step):
            return {}
        steps = []
        try:
            state = state or module.state(params, self.cfg, len(x))
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

    def run(self, tensors, inputs, douts=None, steps=True):
        """-> {"out.*"}, and {"grad.*"} where there are some"""
        return self._module().case_results(self.part, self.cfg, tensors, inputs, douts or {})


def _under(prefix, tensors):
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


def _check_douts(douts, results):
    """Error: a gradient of an output has another shape than it"""
    for name, dout in douts.items():
        out = results.get(f"out.{name}")
        if out is not None and out.shape != dout.shape:
            shapes = f"{dout.shape}; out.{name} has {out.shape}"
            raise Error(f"dout.{name} has the shape {shapes}.")


def module_of(model):
    """The module that computes a case's model.   Error: unknown name"""
    if model in OWN:
        return importlib.import_module(OWN[model])
    return network.model_module(ALIASES.get(model, (model,))[0])


def part_of(case):
    """The Part that a case is about.   Error: unknown model, part or setting"""
    case = computed(case)
    module = module_of(case.model)
    _check_part(module, case.model, case.part)
    _check_numbers(case)
    kind = OwnPart if case.model in OWN else Part
    return kind(case.model, case.part, part_config(case, module))


def computed(case):
    """The case as one of the model that computes it"""
    model, usual = ALIASES.get(case.model, (case.model, {}))
    return dataclasses.replace(case, model=model, settings=usual | case.settings)


def _check_numbers(case):
    """Error: a setting is larger than anything that tensors of this size can need, or no number"""
    most = max(LEAST, sum(t.size for t in case.tensors.values()))
    for name, value in case.settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Error(f"the setting {name}={value}: expected a finite number.")
        if name not in LAYERS and isinstance(value, int) and not -most <= value <= most:
            raise Error(f"the setting {name} is beyond {most}, more than the tensors need.")


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
    for name in LAYERS:
        if (case.settings.get(name) or 0) > max(1, len(params)):
            raise Error(f"{name}={case.settings[name]}, but there are {len(params)} parameters.")
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
    if (n := settings.get("n_layers", 0)) > max(16, len(case.tensors)):
        raise Error(f"n_layers={n}, but there are {len(case.tensors)} tensors.")
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


def scan_arguments(module):
    """name -> whether it is required, of the arrays that a scan takes"""
    given = inspect.signature(module.scan_forward).parameters.items()
    return {n: p.default is p.empty for n, p in given if n not in SCAN_SETTINGS}


def in_float64(tensors):
    """Floating tensors as float64; integers as they are"""
    floats = {*PRECISIONS.values()}
    return {n: t.astype("float64") if t.dtype in floats else t for n, t in tensors.items()}


def run(part, sources, steps=True):
    """What the part computes; of a tied parameter that is listed twice from one, for both names"""
    aliases = {f"param.{name}": f"param.{other}" for name, other in part.aliases().items()}
    tied = {name: other for name, other in aliases.items() if name in sources}

    def of(prefix):
        return _under(prefix, {n: t for n, t in sources.items() if n not in tied})

    results = part.run(of("param."), of("in."), of("dout.") or None, steps)
    grads = {f"grad.{name}": results.get(f"grad.{other}") for name, other in tied.items()}
    return results | {name: g for name, g in grads.items() if g is not None}


# Making cases


def make_case(model, part, settings, B=2, L=24, precision="float64", seed=0, initial_state=False):
    """A Case from the reference, for others to be checked against.

    Inputs and parameters are drawn and rounded to the precision; everything else is computed from
    them in float64 and rounded once. initial_state: a part that can gets one, and a gradient of its
    last.   Error: an unknown part or setting, B or L below 1, an initial state of what takes none
    """
    case, part = draw(model, part, settings, B, L, precision, seed, initial_state)
    results = run(part, in_float64(case.tensors))
    results = {name: _rounded(t, precision) for name, t in results.items()}
    return dataclasses.replace(case, tensors=case.tensors | results)


def draw(model, part, settings, B, L, precision, seed=0, initial_state=False):
    """As make_case, without what is computed -> Case of in.*, param.* and dout.*, its Part"""
    if model in ALIASES:
        own, usual = ALIASES[model]
        case, p = draw(own, part, usual | settings, B, L, precision, seed, initial_state)
        return dataclasses.replace(case, model=model), p
    module, rng = module_of(model), np.random.default_rng(seed)
    if B < 1 or L < 1:
        raise Error(f"B={B}, L={L}: both at least 1.")
    head = Case(model, part, precision, settings, {})
    _check_part(module, model, part)
    of_kind = _draw_scan if part == "scan" else _draw_own if model in OWN else _draw
    head, p, sources, feeds_back = of_kind(head, module, B, L, rng, initial_state)
    sources = {n: _rounded(t, precision) for n, t in sources.items()}
    outputs = run(p, in_float64(sources), steps=False) if feeds_back else {}
    for name in feeds_back:
        if name.startswith("state."):
            shape = sources[f"in.{name}"].shape
        else:
            shape = outputs[f"out.{name}"].shape
        sources[f"dout.{name}"] = _rounded(rng.standard_normal(shape), precision)
    return dataclasses.replace(head, tensors=sources), p


def _draw(head, module, B, L, rng, initial_state):
    """-> head with its settings, Part, sources, names of the outputs whose gradients feed back"""
    if "l_max" in {f.name for f in dataclasses.fields(module.Config)}:
        # the length that S4's C~ is made for
        head = dataclasses.replace(head, settings={"l_max": L} | head.settings)
    p = Part(head.model, head.part, _free_config(head, module))
    states = p.state_shapes(B)
    if initial_state and not states:
        _refuse_state(head)
    if head.part == "init":
        return head, p, {}, ()
    if head.part == "network":
        own = {n: getattr(p.cfg, n) for n in NETWORK}
        head = dataclasses.replace(head, settings=head.settings | own)
    if head.part == "network" and p.cfg.tokens:
        x = rng.integers(0, p.cfg.d_input, (B, L))
    elif head.part == "network":
        x = rng.standard_normal((B, L, p.cfg.d_input))
    else:
        x = rng.standard_normal((B, L, network.part_width(head.model, head.part, p.cfg)))
    sources = {"in.x": x} | {f"param.{n}": t for n, t in p.init(rng).items()}
    if not initial_state:
        return head, p, sources, ("y",)
    sources |= {f"in.{name}": rng.standard_normal(shape) for name, shape in states.items()}
    return head, p, sources, ("y", *states)


def _draw_scan(head, module, B, L, rng, initial_state):
    """As _draw, of a scan"""
    if strange := sorted(head.settings.keys() - {"d_model", "d_state", *SCAN_SETTINGS}):
        raise Error(f"the setting {strange[0]!r} is not one of {head.model}'s scan.")
    inputs = module.scan_inputs(_free_config(head, module), B, L, rng)
    if not initial_state:
        del inputs[module.SCAN_STATE]
    own = {n: v for n, v in head.settings.items() if n in SCAN_SETTINGS}
    sources = {f"in.{n}": a for n, a in inputs.items()}
    feeds_back = ("y", "last_state") if initial_state else ("y",)
    head = dataclasses.replace(head, settings=own)
    return head, Part(head.model, head.part, own), sources, feeds_back


def _draw_own(head, module, B, L, rng, initial_state):
    """As _draw, of a model of OWN"""
    if initial_state:
        _refuse_state(head)
    p = OwnPart(head.model, head.part, _own_config(head, module))
    return head, p, module.case_sources(head.part, p.cfg, B, L, rng), module.CASE_PARTS[head.part]


def _refuse_state(case):
    raise Error(
        "an initial state is for part 'scan', and for mixer, block and network, of mamba and "
        f"longhorn; {case.model}'s {case.part} takes none."
    )


def _free_config(case, module):
    """The Config of a case that has no tensors yet"""
    check_kinds(case.settings, module.Config, network.Config, what="the setting ")
    layer_fields = {f.name for f in dataclasses.fields(module.Config)}
    outer = {f.name for f in dataclasses.fields(network.Config)} - {"model", "layer"}
    known = layer_fields | (outer if case.part == "network" else set())
    if unknown := sorted(case.settings.keys() - known):
        raise Error(f"the setting {unknown[0]!r} is not one of {case.model}'s {case.part}.")
    layer = module.Config(**{n: v for n, v in case.settings.items() if n in layer_fields})
    if case.part != "network":
        return layer
    own = {"n_layers": 2, "d_input": 11, "final_norm": layer.prenorm}
    own["positions"] = getattr(layer, "context", 0)
    own |= {n: v for n, v in case.settings.items() if n not in layer_fields}
    own.setdefault("d_output", own["d_input"] if own.get("tied") else 5)
    return network.Config(case.model, layer, **own)


def _rounded(t, precision):
    return t.astype(PRECISIONS[precision]) if t.dtype.kind == "f" else t
