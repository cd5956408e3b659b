"""What a case of model "l2t" is: features, dln, teacher, student-loss and unrolled, in published
names, those of the settings too."""

import re
from dataclasses import dataclass

import numpy as np

from ref import Error, hyena, l2t, l2t_unrolled, network

CASE_PARTS = {
    "features": (),
    "dln": ("weight",),
    "teacher": (),
    "student-loss": (),
    "unrolled": (),
}
CASE_CONFIGS = {"unrolled": l2t_unrolled.Config}  # whose settings are not those of Config
CASE_MODULES = (l2t, l2t_unrolled, hyena)  # whose pairs carry rounding
STUDENT = {"block": "bare", "filter": "gated"}
RENAMED = {"dln_layers": "n_layers", "dln_size": "layer_size", "dln_dropout": "dropout"}
BOUNDS = ("clamp_low", "clamp_high")  # of the published clamp
SIZES = {  # of a part: published name, the field of Config that its shape says, the axis
    "features": (),
    "dln": (("batch_norm.weight", "gru_size", 0), ("net.0.weight", "layer_size", 0)),
    "teacher": (
        ("dln.batch_norm.weight", "gru_size", 0),
        ("dln.net.0.weight", "layer_size", 0),
        ("teacher.teacher_net.0.weight", "teacher_size", 0),
    ),
    "student-loss": (
        ("tok_emb.weight", "vocab_size", 0),
        ("tok_emb.weight", "d_model", 1),
        ("pos_emb", "context_length", 1),
        ("layers.0.filter.h_basis", "order", 0),
        ("layers.0.proj_input.conv.weight", "short_conv_size", 2),
    ),
}
LAYERS = {  # published names, of which there is one for each layer
    "dln": r"param\.net\.(\d+)\.weight",
    "teacher": r"param\.dln\.net\.(\d+)\.weight",
    "student-loss": r"param\.layers\.(\d+)\.B",
}


@dataclass(frozen=True)
class Config(l2t.Config):
    """The settings of a case; of student-loss n_layers and what follows are the student's.

    Fields of l2t.Config that have other names than the published settings follow from these.
    """

    dln_layers: object = None
    dln_size: object = None
    dln_dropout: object = None
    clamp_low: object = None
    clamp_high: object = None
    n_layers: int = 2
    layer_size: int = 12
    dropout: float = 0.0
    clamp: tuple = (0.05, 0.95)
    teacher_size: int = 12
    filter: str = "gated"
    recurrence: str = "residual"
    order: int = 2
    d_model: int = 8
    short_conv_size: int = 3
    vocab_size: int = 23
    context_length: int = 0  # 0: as long as the input

    def __post_init__(self):
        published = RENAMED | dict.fromkeys(BOUNDS, "clamp")
        for own, name in published.items():
            if getattr(self, own) is not None:
                raise Error(f"{own}: the settings of a case have the published name, {name}.")
        values = {own: getattr(self, name) for own, name in RENAMED.items()}
        for own, value in (values | dict(zip(BOUNDS, _bounds(self.clamp), strict=True))).items():
            object.__setattr__(self, own, value)
        super().__post_init__()
        if self.dropout:
            raise Error(f"dropout={self.dropout}: cases are without dropout.")
        if self.filter != "gated":
            raise Error(f"filter={self.filter!r}: the student's filters are gated.")
        if self.vocab_size < 1 or self.context_length < 0:
            sizes = f"vocab_size={self.vocab_size}, context_length={self.context_length}"
            raise Error(f"{sizes}: expected at least 1, and 0 or more.")


def config_of(settings, tensors, part):
    """The Config of a case: sizes off its published tensors' shapes, the rest from its settings"""
    if part == "unrolled":
        return l2t_unrolled.config_of(settings, tensors)
    sizes = {}
    for name, field, axis in SIZES[part]:
        t = tensors.get(f"param.{name}")
        if t is not None and t.ndim > axis:
            sizes[field] = t.shape[axis]
    if "order" in sizes and settings.get("recurrence") == "standard":
        sizes["order"] += 1  # which has one filter less
    found = [re.fullmatch(LAYERS.get(part, "-"), name) for name in tensors]
    layers = {int(m[1]) for m in found if m}
    if layers and part != "student-loss":
        layers.remove(max(layers))  # the output
    return Config(**settings | sizes | ({"n_layers": len(layers)} if layers else {}))


def _bounds(clamp):
    number = (int, float)
    two = isinstance(clamp, (list, tuple)) and len(clamp) == 2
    if not (two and all(type(v) in number for v in clamp)):
        raise Error(f"the setting clamp={clamp!r}: expected a list of two numbers.")
    return clamp


def _student(cfg, L=1):
    """The network of the student, for length L at least"""
    own = {"d_model": cfg.d_model, "order": cfg.order, "short_filter_order": cfg.short_conv_size}
    l_max = cfg.context_length or L
    layer = hyena.Config(**STUDENT, recurrence=cfg.recurrence, l_max=l_max, **own)
    V = cfg.vocab_size
    outer = {"decoder": "lm", "tied": True, "final_norm": True, "positions": l_max}
    return network.Config("hyena", layer, cfg.n_layers, V, V, **outer)


def _networks(cfg, part):
    """prefix -> (names {ours: theirs}, init) of a part's networks"""
    dln = l2t.dln_names(cfg.dln_layers), l2t.dln_init
    if part == "teacher":
        return {"dln.": dln, "teacher.": (l2t.teacher_names(), l2t.teacher_init)}
    return {"": dln} if part == "dln" else {}


def case_aliases(part, cfg):
    """{the tied head: the embedding} of the student"""
    return network.published_aliases(_student(cfg)) if part == "student-loss" else {}


def case_sources(part, cfg, B, L, rng):
    """A random case's inputs and parameters, off special values.   Error: too few sequences"""
    if part == "unrolled":
        return l2t_unrolled.case_sources(cfg, B, L, rng)
    weights = rng.uniform(0.1, 0.9, (B, L) if cfg.granularity == "token" else B)
    F = rng.standard_normal((B, L, l2t.CHANNELS))
    y = rng.integers(0, cfg.vocab_size, (B, L))
    inputs = {
        "features": {"logits": rng.standard_normal((B, L, cfg.vocab_size)), "y": y},
        "dln": {"features": F},
        "teacher": {"mem_features": F, "mem_ce": 5 + rng.standard_normal(B)},
        "student-loss": {"x": rng.integers(0, cfg.vocab_size, (B, L)), "y": y, "weight": weights},
    }[part]
    params = {}
    if part == "student-loss":
        student = _student(cfg, L)
        own = _moved(network.init(student, rng, "float64"), rng)
        params = network.to_published(own, student)
    for prefix, (names, init) in _networks(cfg, part).items():
        own = _moved(init(cfg, rng, "float64"), rng)
        params |= {prefix + names[n]: p for n, p in own.items()}
    return {f"in.{n}": t for n, t in inputs.items()} | {f"param.{n}": p for n, p in params.items()}


def _moved(params, rng):
    return {n: p + 0.1 * np.abs(rng.standard_normal(p.shape)) for n, p in params.items()}


def case_results(part, cfg, params, inputs, douts):
    """-> {"out.*"}, and {"grad.*"} of the loss, where the part is none of douts.weight"""
    if part == "unrolled":
        return l2t_unrolled.case_results(cfg, params, inputs)
    run = {"features": _features, "dln": _dln, "teacher": _teacher, "student-loss": _student_loss}
    return run[part](cfg, params, inputs, douts)


def _features(cfg, params, inputs, douts):
    """Of the released form the channels that implementations agree on"""
    F, _ = l2t.features_forward(inputs["logits"], inputs["y"], cfg)
    return {"out.features": F[..., :3] if cfg.features == "released" else F}


def _dln(cfg, params, inputs, douts):
    F, names = inputs["features"], l2t.dln_names(cfg.dln_layers)
    _check_features("features", F)
    w, cache = l2t.dln_forward(_from_published(params, names), F, cfg)
    if not douts:
        return {"out.weight": w}
    if douts["weight"].shape != w.shape:
        raise Error(f"dout.weight has the shape {douts['weight'].shape}; out.weight has {w.shape}.")
    dF, grads = l2t.dln_backward(douts["weight"], cache)
    return {"out.weight": w, "grad.in.features": dF} | _gradients(grads, names)


def _teacher(cfg, params, inputs, douts):
    F, ce = inputs["mem_features"], inputs["mem_ce"]
    _check_features("mem_features", F)
    if ce.shape != F.shape[:1]:
        raise Error(f"in.mem_ce has the shape {ce.shape}; expected {F.shape[:1]}.")
    names = {prefix: names for prefix, (names, _) in _networks(cfg, "teacher").items()}
    teacher, dln = (_from_published(params, names[n], n) for n in ("teacher.", "dln."))
    _, values, cache = l2t.teaching_forward(teacher, dln, F, ce, cfg)
    outputs = {"mem_pred": values["prediction"], "mem_weights": values["weight"]}
    outputs |= {name: np.reshape(values[name], 1) for name in ("teacher_loss", "dln_loss")}
    teacher, dln = l2t.teaching_backward(1.0, cache)
    results = {f"out.{n}": t for n, t in outputs.items()}
    results |= _gradients(teacher, names["teacher."], "teacher.")
    return results | _gradients(dln, names["dln."], "dln.")


def _student_loss(cfg, params, inputs, douts):
    x, y, w = (inputs[n] for n in ("x", "y", "weight"))
    expected = x.shape if cfg.granularity == "token" else x.shape[:1]
    if w.shape != expected or w.dtype.kind != "f":
        raise Error(f"in.weight has the shape {w.shape}; expected {expected}.")
    student = _student(cfg, x.shape[-1])
    theta = network.from_published(params, student)
    logits, cache = network.forward(theta, x, student)
    square = sum((p * p).sum() for p in theta.values())
    loss, (ce, reg), loss_cache = l2t.student_loss_forward(logits, y, w, cfg, square)
    dlogits, _, dsquare = l2t.student_loss_backward(1.0, loss_cache)
    _, grads = network.backward(dlogits, cache)
    grads = {n: g + 2 * dsquare * theta[n] for n, g in grads.items()}
    grads = {f"grad.param.{n}": g for n, g in network.to_published(grads, student).items()}
    return {"out.loss": np.reshape(loss, 1), "out.ce": ce, "out.reg": reg} | grads


def _check_features(name, F):
    if F.ndim != 3 or F.shape[2] != l2t.CHANNELS or 0 in F.shape:
        raise Error(f"in.{name} has the shape {F.shape}; expected (B, S, {l2t.CHANNELS}).")


def _from_published(tensors, names, prefix=""):
    return {ours: tensors[prefix + theirs] for ours, theirs in names.items()}


def _gradients(grads, names, prefix=""):
    return {f"grad.param.{prefix}{theirs}": grads[ours] for ours, theirs in names.items()}
