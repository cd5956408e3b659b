"""A case recomputed in float64, and what its sources have to be like."""

import numpy as np

from ref import Error, block, cases


def compute(case, steps=True):
    """Recompute a case in float64 from its in.*, param.* and dout.* alone -> {"out.*", "grad.*"}"""
    part, sources = checked(case)
    return cases.run(part, sources, steps)


def checked(case):
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
