"""How a run is set up: its fields, and the recipes behind --preset, which stand in recipes.toml.

Preset and options make the settings of a run; config.json is their JSON.
"""

import functools
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ref import Error, network, teaching
from ref.backend import check_choice
from ref.files import read_json
from ref.options import described

PRESETS = ("small", "paper")
STREAMS = ("shakespeare-char", "ptb", "wikitext-2", "wikitext-103")  # cut into windows
# Models whose papers decode by the embedding
TIED = ("hyena", "l2t-hyena", "longhorn", "mamba", "tnn", "transformer")


@dataclass(frozen=True)
class Run:
    """What is trained on what, where, and how long."""

    model: str
    data: str
    preset: str = "small"
    seed: int = 0  # of weights, batches and dropout
    data_seed: int = 0  # of generated data sets
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 0  # 0: all cores
    minutes: float = 0.0  # train at most so long; 0: no limit
    data_dir: str = ""  # "": $REF_DATA_DIR or the user's cache
    max_length: int = 0  # tokens that a text is cut to, or of a window; 0: the data set's own

    def __post_init__(self):
        check_choice("preset", self.preset, PRESETS)
        check_choice("dtype", self.dtype, ("float32", "float64"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        for name in ("seed", "data_seed", "threads", "minutes", "max_length"):
            if not getattr(self, name) >= 0:
                raise Error(f"{name}={getattr(self, name)}: expected 0 or more.")


def _listed(names):
    return ", ".join(names)


@dataclass(frozen=True)
class Recipe:
    """All about a run that is not the model's layer."""

    n_layers: int = described(4, "Blocks.")
    decoder: str = described(
        "auto",
        "auto: mean over positions, match for two documents, lm for a target at each; last: "
        "position.",
    )
    tied: str = described(
        "auto",
        f"lm: the embedding decodes; yes, no; auto: of {_listed(TIED)}.",
        ("auto", "yes", "no"),
    )
    batch_size: int = described(32, "Samples a step.")
    steps: int = described(0, "Optimiser steps; 0: --epochs decides.")
    epochs: float = described(0.0, "Passes over the training data; 0: --minutes decides.")
    lr: float = described(2e-3, "Learning rate.")
    weight_decay: float = described(0.01, "Decoupled, as AdamW's.")
    ssm_lr: float = described(1e-3, "Of the state-space parameters (hope: H; s4: A, B, P; s4d: A).")
    ssm_weight_decay: float = described(0.0, "Of the state-space parameters.")
    dt_lr: float = described(1e-3, "Of log_dt; 0 freezes it.")
    warmup: int = described(200, "Steps of linear warm-up before the cosine.")
    clip: float = described(1.0, "Largest norm of the whole gradient; 0: no clipping.")
    eval_every: int = described(500, "Steps between evaluations on the validation split.")
    eval_samples: int = described(
        0, "Samples or windows that an evaluation looks at; 0: the whole split."
    )
    eval_protocol: str = described(
        "stream",
        "Of language models. stream: contiguous windows, each token once; sliding: windows at "
        "stride 1; last: of those only the last position, each token once after a whole window.",
        ("stream", "sliding", "last"),
    )
    train_stride: int = described(
        0,
        "Language models are trained on the windows that start at every so many tokens; 0: on "
        "windows side by side, from an offset new in each epoch.",
    )
    train_size: int = described(
        0, "Train on the first so many tokens, or on so many samples, only; 0: on all of them."
    )
    embedding_std: float = described(
        0.0, "Deviation of the embedding when it is made; 0: the model's own."
    )
    double_embedding: bool = described(
        False, "AdamW steps a tied embedding twice, as the L2T-Hyena code does."
    )
    select: str = described(
        "last",
        "The network that is tested: last, or best by the validation loss.",
        ("last", "best"),
    )
    on_nan: str = described(
        "stop",
        "A loss that is not finite: stop, or skip that batch, as the L2T-Hyena code does (it is "
        "then in no memory, either).",
        ("stop", "skip"),
    )
    log_every: int = described(10, "Steps between lines of metrics.jsonl.")
    save_every: int = described(0, "Steps between checkpoints; 0: every 30 seconds.")

    def __post_init__(self):
        for name in ("n_layers", "batch_size", "eval_every", "log_every", "warmup"):
            if getattr(self, name) < 1:
                raise Error(f"{name}={getattr(self, name)}: expected at least 1.")
        for name in (
            "steps",
            "epochs",
            "lr",
            "weight_decay",
            "ssm_lr",
            "ssm_weight_decay",
            "dt_lr",
            "clip",
            "eval_samples",
            "save_every",
            "train_stride",
            "train_size",
            "embedding_std",
        ):
            if not getattr(self, name) >= 0:
                raise Error(f"{name}={getattr(self, name)}: expected 0 or more.")
        check_choice("decoder", self.decoder, ("auto", *network.DECODERS))
        check_choice("tied", self.tied, ("auto", "yes", "no"))
        check_choice("eval_protocol", self.eval_protocol, ("stream", "sliding", "last"))
        check_choice("select", self.select, ("last", "best"))
        check_choice("on_nan", self.on_nan, ("stop", "skip"))
        if self.steps and self.epochs:
            raise Error(f"steps={self.steps} and epochs={self.epochs}: give one of the two.")


@functools.cache
def _recipes():
    return tomllib.loads(Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8"))


def preset(model, data, name):
    """Settings by field name.   Error: unknown preset, or no published recipe for this pair"""
    check_choice("preset", name, PRESETS)
    if name == "small":
        small = _recipes()["small"]
        of_model, of_data = small["model"].get(model, {}), small["data"].get(data, {"epochs": 1.0})
        if of_data.get("decoder") == "lm":
            of_model = of_model | small["lm"].get(model, {})
        return small["all"] | of_model | of_data | small.get(model, {}).get(data, {})
    if data not in published(model):
        raise Error(
            f"there is no published recipe of {model} on {data} here; "
            "use --preset small and set what differs."
        )
    paper = _recipes()["paper"][model]
    return paper["all"] | paper[data]


def small_data_sets():
    """The data sets that --preset small has numbers for"""
    return list(_recipes()["small"]["data"])


def published(model):
    """The data sets that have a published recipe of the model"""
    return [data for data in _recipes()["paper"].get(model, {}) if data != "all"]


# The settings of a run


def network_config(settings, layer, decoder, d_input, d_output, tokens=True, pool_from=0):
    """The network.Config of a run's settings, the layer fitted to its data"""
    recipe = Recipe(**settings["recipe"])
    usual = decoder == "lm" and settings["model"] in TIED
    return network.Config(
        model=settings["model"],
        layer=layer,
        n_layers=recipe.n_layers,
        d_input=d_input,
        d_output=d_output,
        tokens=tokens,
        decoder=decoder,
        tied=usual if recipe.tied == "auto" else recipe.tied == "yes",
        decoder_bias=not usual,  # their heads have none, tied or not
        final_norm=layer.prenorm,
        positions=getattr(layer, "context", 0),
        pool_from=pool_from,
        embedding_std=recipe.embedding_std,
    )


def make_settings(options, corrected=False):
    """Everything that decides a run, as config.json keeps it: the preset, what the teacher brings,
    then the options given

    options: field name -> value;  corrected: without the mistakes of the L2T-Hyena code.
    Error: a value that is not one, or does not go with another.
    """
    run = _made(Run, options)
    layer_class = network.model_module(run.model).Config
    chosen = preset(run.model, run.data, run.preset)
    run = _made(Run, {"max_length": chosen.get("max_length", 0)} | options)
    if run.minutes or options.keys() & {"steps", "epochs"}:
        chosen |= {"steps": 0, "epochs": 0.0}  # what is given decides how long it takes
    chosen = chosen | _of_teacher(chosen | options, run.data, corrected) | options
    layer, recipe = _made(layer_class, chosen), _made(Recipe, chosen)
    if not (recipe.steps or recipe.epochs or run.minutes):
        raise Error("steps, epochs and minutes are all 0: nothing to train.")
    # What no data set can make possible is refused before any is loaded.
    decoder = "mean" if recipe.decoder == "auto" else recipe.decoder
    network.Config(
        run.model, layer, recipe.n_layers, 1, 1, decoder=decoder, tied=recipe.tied == "yes"
    )
    settings = asdict(run) | {"layer": asdict(layer), "recipe": asdict(recipe)}
    return settings | {"teaching": _teaching(chosen, recipe)}


def _of_teacher(chosen, data, corrected):
    """The settings that come with a teacher: of a published one what is published"""
    teacher, decoder = chosen.get("teacher", "none"), chosen.get("decoder", "auto")
    check_choice("teacher", teacher, teaching.TEACHERS)
    own = dict(teaching.DEFAULTS[teacher])
    if decoder != "lm":  # one position has no deviation over time
        own |= {"standardise": False, "features": "corrected"}
        own |= {"dln": "pairs"} if teacher == "lstm" else {}
    if teacher == "released":
        there = teaching.quirks_of(chosen["model"] in TIED and decoder == "lm", data in STREAMS)
        own |= {name: teaching.QUIRKS[name][0] for name in there} | {"on_nan": "skip"} | own
    if corrected:
        own |= {name: without for name, (_, without) in teaching.QUIRKS.items()}
    return own


def _teaching(chosen, recipe):
    """The settings of the teacher; {} without one.   Error: as of teaching.Config; two settings
    that do not go together"""
    cfg = _made(teaching.Config, chosen)
    if cfg.teacher == "none":
        return {}
    if cfg.teacher == "released" and cfg.memory_size < recipe.batch_size:
        raise Error(
            f"memory_size={cfg.memory_size} is smaller than batch_size={recipe.batch_size}: the "
            "memory takes a whole batch at once."
        )
    if cfg.teacher == "released" and recipe.batch_size < 2:
        raise Error("batch_size=1: the teacher's targets are standardised over the batch; use 2.")
    if cfg.in_rounds and (recipe.double_embedding or recipe.on_nan == "skip"):
        raise Error(
            f"--teacher {cfg.teacher} differentiates through plain AdamW: it goes with neither "
            "--double-embedding nor --on-nan skip."
        )
    return asdict(cfg)


def changed(settings, options):
    """The settings with other values for fields of Run.   Error: a value that is not one"""
    return settings | asdict(_made(Run, settings | options))


def read_settings(path):
    """The settings in a config.json.   Error: missing, damaged, or with other fields than ours"""
    saved = read_json(path)
    try:
        parts = {"layer", "recipe", "teaching"}
        _check_names(saved, {f.name for f in fields(Run)} | parts | set(RECORDED))
        layer_class = network.model_module(saved["model"]).Config
        _check_names(saved["layer"], {f.name for f in fields(layer_class)})
        _check_names(saved["recipe"], {f.name for f in fields(Recipe)})
        if saved["teaching"]:
            _check_names(saved["teaching"], {f.name for f in fields(teaching.Config)})
        if not isinstance(saved["machine"], dict):
            raise Error("machine is no object.")
        words = saved["vocabulary"]
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise Error("vocabulary is no list of texts.")
        run = {f.name: saved[f.name] for f in fields(Run)}
        own = saved["teaching"] or {"teacher": "none"}
        return saved | make_settings(run | own | saved["layer"] | saved["recipe"])
    except Error as e:
        raise Error(f"{path} is not as this program writes it: {e}") from e


# What a run adds to its settings in config.json. The vocabulary is a language model's, for decoding
# without its data; of other runs it is empty.
RECORDED = ("machine", "data_checksum", "vocabulary")
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def check_kinds(values, *classes, what=""):
    """Error when a value is not of the type of the dataclasses' field of its name"""
    kinds = {f.name: f.type for cls in classes for f in fields(cls)}
    for name, value in values.items():
        kind = kinds.get(name)
        whole = kind is float and type(value) is int
        if kind in _KINDS and type(value) is not kind and not whole:
            raise Error(f"{what}{name}={value!r}: expected {_KINDS[kind]}.")


def _made(cls, values):
    """cls from those of the values that it has.   Error: one is of another type, or not finite"""
    kinds = {f.name: f.type for f in fields(cls)}
    own = {name: value for name, value in values.items() if name in kinds}
    check_kinds(own, cls)
    for name, value in own.items():
        kind = kinds[name]
        if kind in (int, float) and not abs(value) < 2**53:
            raise Error(f"{name}={value}: expected a number below 2**53.")
        own[name] = kind(value)
    return cls(**own)


def _check_names(values, names):
    if not isinstance(values, dict):
        raise Error(f"expected an object, found {values!r:.40}.")
    if missing := sorted(names - values.keys()):
        raise Error(f"{', '.join(missing)} is missing.")
    if unknown := sorted(values.keys() - names):
        raise Error(f"{', '.join(unknown)} is not known.")
