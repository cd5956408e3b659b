"""What gives a run's student its loss, and how that is learned: `train.py --teacher`.

    none       cross-entropy
    static     the mixture of ref.l2t (5) with weights that nobody learns: constant, random, or
               those of another run over again
    released   ref.l2t: the published L2T-Hyena
    hypergrad  a loss network that descends a held-out loss; ref.rounds
    lstm       a loss network that an LSTM updates, L2T-DLN; ref.rounds

A teacher here has
    steps            of the student between two of its own
    loss(...)        the first three kinds: the gradient of a step's loss in the logits
    learn(...)       ... and the step of what is learned
    round(...)       the others: so many steps of the student, and its own
    state            nested dicts of arrays, all that a checkpoint has to keep of it
All that is random in a step follows from (seed, step).
"""

import json
import math
from dataclasses import asdict, dataclass, fields

import numpy as np

from ref import Error, backend, hvp, l2t, l2t_unrolled, network, nn, optim
from ref.backend import array_module, check_choice, item
from ref.files import read_tensors
from ref.options import described

TEACHERS = ("none", "static", "released", "hypergrad", "lstm")
MEMORY, DROPOUT, HELD_OUT, WEIGHTS = 1, 2, 3, 4  # beside (seed, step): what is drawn
SMALL = {  # a loss network that is differentiated through, or updated coordinate by coordinate
    "features": "corrected",
    "memory_path": "same",
    "gru_size": 8,
    "dln_layers": 1,
    "dln_size": 16,
    "dln_dropout": 0.0,
    "batch_norm": False,
    "dln_residual": False,
    "clamp_low": 0.0,
    "clamp_high": 1.0,
    "dln_lr": 1e-3,
    "dln_weight_decay": 0.0,
    "dln_clip": 1.0,
    "teacher_lr": 1e-3,
    "teacher_weight_decay": 0.0,
    "teacher_clip": 0.0,
}
DEFAULTS = {"none": {}, "static": {}, "released": {}, "hypergrad": SMALL, "lstm": SMALL}
QUIRKS = {  # of the published code: setting -> its value there, and one without the mistake
    "features": ("released", "corrected"),
    "memory_path": ("released", "same"),
    "double_embedding": (True, False),
    "embedding_std": (1.0, 0.0),
    "train_stride": (1, 0),
}


@dataclass(frozen=True)
class Config(l2t.Config):
    """Mode and settings of a teacher; those of ref.l2t are the networks' and the losses'."""

    teacher: str = described("none", "Where the loss comes from.", TEACHERS)
    weights: str = described(
        "constant", "static: constant, random (beta) or replay.", ("constant", "random", "replay")
    )
    static_weight: float = described(0.5, "static: the weight of the regulariser, or its mean.")
    weight_std: float = described(0.1, "static, random: deviation of the weights.")
    replay: str = described("", "static, replay: the run whose mean weights are taken again.")
    dln_lr: float = described(5e-7, "AdamW of the loss network.")
    dln_weight_decay: float = described(0.01, "Of the loss network.")
    dln_clip: float = described(1.0, "Largest norm of its gradient; 0: no clipping.")
    teacher_lr: float = described(2e-6, "AdamW of the teacher.")
    teacher_weight_decay: float = described(0.01, "Of the teacher.")
    teacher_clip: float = described(0.1, "Largest norm of its gradient; 0: no clipping.")
    teaching_schedule: str = described(
        "cosine", "Of both rates: cosine to 0, or constant.", ("cosine", "constant")
    )
    dln: str = described(
        "weights",
        "hypergrad, lstm: weights, ref.l2t's loss network; pairs: L2T-DLN's, by pairs of classes; "
        "lstm on samples: pairs.",
        ("weights", "pairs"),
    )
    inner_steps: int = described(1, "hypergrad, lstm: K, the student's steps in a round.")
    inner: str = described(
        "adamw",
        "hypergrad, lstm: what is differentiated through; adamw: the student's own steps; "
        "adamw-frozen, momentum, sgd: in their place.",
        hvp.KINDS,
    )
    inner_lr: float = described(0.0, "Of sgd and momentum; 0: --lr.")
    inner_momentum: float = described(0.9, "Of momentum.")
    commit: str = described(
        "second",
        "Which steps the student keeps: first, or second, those with the new loss network.",
        ("first", "second"),
    )
    meta_split: str = described(
        "tail",
        "Held-out data of hypergrad and lstm; tail: a part of train that the student does not "
        "see; train: it sees them, too; valid: it is selected by them, too.",
        ("tail", "train", "valid"),
    )
    meta_share: float = described(0.05, "tail: that part.")
    meta_batch_size: int = described(0, "Samples of the held-out loss; 0: --batch-size.")
    hvp: str = described(
        "auto",
        "Second derivatives: exact, differences, or auto: exact where there are such.",
        ("auto", "exact", "differences"),
    )
    hvp_step: float = described(0.0, "Of differences, relative; 0: by the precision.")
    detach: bool = described(True, "The features are constants to the student.")
    dln_optimiser: str = described("adam", "hypergrad: adam or sgd.", ("adam", "sgd"))
    lstm_size: int = described(
        64, "lstm: width of every cell but the last; with --lstm-head linear of every cell."
    )
    lstm_cells: int = described(4, "lstm: cells.")
    lstm_p: float = described(
        10.0, "lstm: p of the gradients that it is given, log|G| / p and the sign from e^-p on."
    )
    lstm_head: str = described(
        "cell",
        "lstm: its output; cell: of a last cell of width 1; linear: a map of the last's.",
        l2t_unrolled.HEADS,
    )
    update_scale: float = described(1e-3, "lstm: factor on the updates; hypergrad, sgd: the rate.")
    teacher_every: int = described(1, "lstm: M, updates of the loss network for one of the LSTM.")
    truncation: int = described(1, "lstm: J <= M, updates that its gradient goes back through.")
    pair_size: int = described(40, "pairs: width of the hidden layers.")
    pair_layers: int = described(4, "pairs: hidden layers.")

    def __post_init__(self):
        super().__post_init__()
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("weights", self.weights, ("constant", "random", "replay"))
        check_choice("teaching_schedule", self.teaching_schedule, ("cosine", "constant"))
        check_choice("dln", self.dln, ("weights", "pairs"))
        check_choice("inner", self.inner, hvp.KINDS)
        check_choice("commit", self.commit, ("first", "second"))
        check_choice("meta_split", self.meta_split, ("tail", "train", "valid"))
        check_choice("hvp", self.hvp, ("auto", "exact", "differences"))
        check_choice("dln_optimiser", self.dln_optimiser, ("adam", "sgd"))
        l2t_unrolled.check_teacher(self.lstm_p, self.lstm_head, "lstm_")
        at_least = dict.fromkeys(("lstm_size", "lstm_cells", "teacher_every", "truncation"), 1)
        at_least |= dict.fromkeys(("pair_size", "pair_layers"), 1)
        for name in fields(self):
            if name.type is float:
                at_least.setdefault(name.name, 0)
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise Error(f"{name}={getattr(self, name)}: expected at least {least}.")
        if self.inner_steps < 1:
            raise Error(
                f"inner_steps={self.inner_steps}: the student takes at least 1 step before the "
                "held-out loss is taken."
            )
        if self.truncation > self.teacher_every:
            raise Error(
                f"truncation={self.truncation}, teacher_every={self.teacher_every}: the LSTM's "
                "gradient goes back to its last update at most."
            )
        if self.features == "released" and self.teacher not in ("none", "static"):
            if not self.standardise:
                raise Error(
                    "features=released without standardise are of the size 1e9: use corrected."
                )
            if not self.detach:
                raise Error(
                    "features=released are rounding noise, without gradient: use corrected."
                )
        if not self.inner_momentum < 1:
            raise Error(f"inner_momentum={self.inner_momentum}: expected less than 1.")
        self._check_weights()

    def _check_weights(self):
        mean, std = self.static_weight, self.weight_std
        if self.loss_form == "convex" and mean > 1:
            raise Error(f"static_weight={mean}: expected 0 to 1, or --loss-form additive.")
        if self.weights == "random" and not (0 < mean < 1 and 0 < std * std < mean * (1 - mean)):
            raise Error(
                f"static_weight={mean}, weight_std={std}: no weights between 0 and 1 have this "
                "mean and deviation."
            )
        if (self.weights == "replay") != bool(self.replay):
            raise Error("--weights replay and --replay RUN go together: whose weights?")

    @property
    def in_rounds(self):
        """Whether the student's steps are differentiated through"""
        return self.teacher in ("hypergrad", "lstm")


TEXTS = {  # of the settings of ref.l2t
    "features": "Of the logits, for the loss network: released or corrected.",
    "standardise": "The features over time.",
    "gru_size": "Loss network: width of its GRU.",
    "dln_layers": "Loss network: hidden layers after the GRU.",
    "dln_size": "Loss network: their width.",
    "dln_dropout": "Loss network: between them.",
    "batch_norm": "Loss network: after the GRU.",
    "dln_residual": "Loss network: a linear map beside the layers.",
    "granularity": "A weight for every sequence, batch or token.",
    "clamp_low": "Lower bound of the weights.",
    "clamp_high": "Upper bound of the weights.",
    "memory_path": "released: loss network on the memory without norm, residual and bounds; same.",
    "teacher_size": "released: width of the teacher.",
    "teacher_bias": "released: of the teacher's output, initially.",
    "teacher_input": "released: weight or weight+features.",
    "loss_form": "convex: (1 - w) CE + w R; additive: CE + w R.",
    "regulariser": "R: the strength times logits (mean z²), logits-sum, entropy or weights.",
    "reg_strength": "Strength of the regulariser.",
    "huber_delta": "released: where the teacher's loss becomes linear.",
    "huber_reg": "released: coefficient of that loss; 0 with --teacher-norm-reg 0: no teacher.",
    "huber_twice": "released: it is in the losses of both networks and reaches both twice.",
    "teacher_norm_reg": "released: coefficient of the norms of the teacher's parameters.",
    "dln_weight_reg": "released: coefficient of the mean squared weight.",
    "saturation_reg": "released: coefficient of the penalty on saturated weights.",
    "variance_bonus": "released: coefficient of the weights' variance, which is rewarded.",
    "raw_mean_reg": "released: coefficient of the penalty on a large mean before the sigmoid.",
    "memory_size": "released: sequences in the memory.",
    "temperature": "released: of the sampling from the memory.",
    "noise": "released: of the sampling from the memory.",
    "write_first": "released: the batch is in the memory when it is sampled.",
}

# Settings that are of no use to some teachers, or beside others
OF_WEIGHTS = {"weights", "static_weight", "weight_std", "replay"}
OF_LOSS = {"loss_form", "reg_strength", "regulariser", "granularity"}
OF_FEATURES = {
    *("features", "standardise", "gru_size", "dln_layers", "dln_size", "dln_dropout", "detach"),
    *("batch_norm", "dln_residual", "clamp_low", "clamp_high"),
}
OF_LSTM = {
    *("lstm_size", "lstm_cells", "lstm_p", "lstm_head", "teacher_every", "truncation"),
    *("teacher_lr", "teacher_weight_decay", "teacher_clip"),
}
OF_ADAM = {"dln_lr", "dln_weight_decay", "dln_clip"}  # of the loss network
OF_PAIRS = {"pair_size", "pair_layers"}
OF_ROUNDS = {
    *("dln", "inner_steps", "inner", "inner_lr", "inner_momentum", "commit", "meta_split"),
    *(
        "meta_share",
        "meta_batch_size",
        "hvp",
        "hvp_step",
        "detach",
        "dln_optimiser",
        "update_scale",
    ),
    *OF_PAIRS,
    *(OF_LSTM - {"teacher_lr", "teacher_weight_decay", "teacher_clip"}),
}
OF_PREDICTOR = {
    *("memory_path", "teacher_size", "teacher_bias", "teacher_input", "huber_delta", "huber_twice"),
    *("huber_reg", "teacher_norm_reg", "dln_weight_reg", "saturation_reg", "variance_bonus"),
    *("raw_mean_reg", "memory_size", "temperature", "noise", "write_first"),
}


def unused(given, settings):
    """Those of the settings given that do nothing beside the others.   settings: of a Config, or {}
    without a teacher"""
    own = {field.name for field in fields(Config)} - {"teacher"}
    if settings:
        cfg = Config(**settings)
        own = _unused_rounds(cfg) if cfg.in_rounds else OF_WEIGHTS | OF_ROUNDS
        if cfg.teacher == "static":
            own = {field.name for field in fields(Config)} - {"teacher"} - OF_WEIGHTS - OF_LOSS
            own |= {"static_weight"} if cfg.weights == "replay" else set()
            own |= {"weight_std"} if cfg.weights != "random" else set()
    return sorted(own & set(given))


def _unused_rounds(cfg):
    own = OF_WEIGHTS | OF_PREDICTOR | (OF_LOSS | OF_FEATURES if cfg.dln == "pairs" else OF_PAIRS)
    if cfg.teacher == "lstm":
        own |= OF_ADAM | {"dln_optimiser"}
    else:
        own |= OF_LSTM
        sgd = cfg.dln_optimiser == "sgd"
        own |= OF_ADAM | {"teaching_schedule"} if sgd else {"update_scale"}
    if cfg.inner != "momentum":
        own |= {"inner_momentum"} | ({"inner_lr"} if cfg.inner.startswith("adamw") else set())
    own |= {"meta_share"} if cfg.meta_split != "tail" else set()
    return own | ({"hvp_step"} if cfg.hvp == "exact" else set())


def quirks_of(tied, stream):
    """The published code's oddities that there are for such a student and data"""
    only = {"double_embedding": tied, "embedding_std": tied, "train_stride": stream}
    return [name for name in QUIRKS if only.get(name, True)]


def quirks_on(settings, recipe):
    """Which of the published code's oddities a run has, by name"""
    values = asdict(recipe)
    if settings.get("teacher") not in (None, "none", "static"):
        values |= settings
    return [name for name, (there, _) in QUIRKS.items() if values.get(name) == there]


# A batch as ref.l2t has it: every sequence with the same number of targets


def by_sequence(logits, targets, B):
    """logits (..., V), targets (...) of B sequences -> (B, S, V), (B, S); of classifiers S = 1

    Error: sequences with different numbers of targets, where B does not divide their sum.
    """
    if len(targets) % B or (targets.ndim == 2 and len(targets) != B):
        raise Error(
            "the sequences of a batch have different numbers of targets: a teacher's weights need "
            "the same number in each."
        )
    return logits.reshape(B, -1, logits.shape[-1]), targets.reshape(B, -1)


def positions(data):
    """S of a data set"""
    if data.window:
        return data.window
    return int((data.train.targets[0] >= 0).sum()) if data.per_position else 1


def square_norm(params, names):
    """|θ|² over the names"""
    return sum((params[name] * params[name]).sum() for name in names)


def described_weights(w, cfg):
    """The weights' mean, deviation and effective strength of the penalty"""
    share = 1 - w if cfg.loss_form == "convex" else 1.0
    tiny = np.finfo(w.dtype.name).tiny
    strength = cfg.reg_strength * w / array_module(w).maximum(share, tiny)
    values = {"weight_mean": w.mean(), "weight_std": w.std(), "effective_penalty": strength.mean()}
    return {name: item(value) for name, value in values.items()}


def correct(logits, targets):
    """Share of targets with the largest logit"""
    return item((logits.argmax(axis=-1) == targets).mean())


def mixture_numbers(z, y, values, cfg):
    """What to log of a mixed loss; values as of l2t.student_step"""
    numbers = {
        "loss": values["ce"].mean(),
        "weighted_loss": values["loss"],
        "regulariser": values["reg"].mean(),
    }
    numbers = {name: item(value) for name, value in numbers.items()}
    return numbers | {"accuracy": correct(z, y)} | described_weights(values["live_weight"], cfg)


def factor(cfg, step, total):
    """On the rates of teacher and loss network at `step` (from 1)"""
    if cfg.teaching_schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / total)))


def adamw(params, grads, moments, step, rate, decay, largest):
    """One step in place, with clipping; -> the gradient's norm"""
    norm = optim.gradient_norm(grads)
    if largest:
        grads = optim.clip(grads, norm, largest)
    groups = dict.fromkeys(grads, optim.Group(rate, decay))
    optim.adamw_update(params, grads, moments, step, groups)
    return norm


# The teachers of single steps


class CrossEntropy:
    """--teacher none."""

    steps, in_rounds = 1, False
    penalises_weights = False  # of the student: then the loss takes and differentiates |θ|²

    def __init__(self):
        self.state = {}

    def __str__(self):
        """What describes the run beside its student; "" when nothing does"""
        return ""

    def loss(self, logits, targets, B, step, square=None):
        """logits (..., V), targets (...) of B sequences -> ∂/∂logits, ∂/∂|θ|², what to log: "loss"
        is always the cross-entropy.   logits are lost"""
        loss, cache = nn.softmax_cross_entropy_forward(logits, targets, consume_logits=True)
        dlogits = nn.softmax_cross_entropy_backward(1.0, cache)
        right = nn.softmax_cross_entropy_correct(cache).mean()
        return dlogits, 0.0, {"loss": item(loss), "accuracy": item(right)}

    def learn(self, step, total):
        """The step of what is learned, after one that was finite"""


class Static(CrossEntropy):
    """Weights that follow from the step alone."""

    def __init__(self, cfg, seed, schedule=None):
        self.cfg, self.seed = cfg, seed
        self.penalises_weights = cfg.regulariser == "weights"
        self.state = {} if schedule is None else {"replay": schedule}

    def __str__(self):
        cfg = self.cfg
        weights = {
            "constant": f"all {cfg.static_weight:g}",
            "random": f"drawn, {cfg.static_weight:g} ± {cfg.weight_std:g}",
            "replay": f"those of {cfg.replay}",
        }[cfg.weights]
        text = f"static: weights {weights}, "
        return text + f"{cfg.loss_form}, {cfg.regulariser} times {cfg.reg_strength:g}"

    def loss(self, logits, targets, B, step, square=None):
        """As CrossEntropy"""
        z, y = by_sequence(logits, targets, B)
        w = backend.to_device(self._weights(y, step).astype(z.dtype.name), array_module(z))
        dlogits, values = l2t.student_step(z, y, w, self.cfg, square)
        numbers = mixture_numbers(z, y, values, self.cfg)
        return dlogits.reshape(logits.shape), values["square_gradient"], numbers

    def _weights(self, y, step):
        """On the host, (B,) or (B, S)"""
        shape = y.shape if self.cfg.granularity == "token" else y.shape[:1]
        mean = self.cfg.static_weight
        if self.cfg.weights == "replay":
            replay = self.state["replay"]
            steps, weights = (backend.to_host(replay[name]) for name in ("steps", "weights"))
            return np.full(shape, np.interp(step, steps, weights))
        if self.cfg.weights == "constant":
            return np.full(shape, mean)
        size = mean * (1 - mean) / self.cfg.weight_std**2 - 1  # a + b of the beta distribution
        rng = np.random.default_rng([self.seed, step, WEIGHTS])
        drawn = (1,) if self.cfg.granularity == "batch" else shape
        return np.broadcast_to(rng.beta(mean * size, (1 - mean) * size, drawn), shape)


def replayed(run, kept=None):
    """The mean weights that a run has logged: steps, weights;  kept: the checkpoint of a run that
    takes them again already, and has them.   Error: there are none"""
    if kept is not None and kept.exists():
        tensors, _ = read_tensors(kept)
        return {name: tensors[f"teacher.replay/{name}"] for name in ("steps", "weights")}
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise Error(f"--replay {run}: there is no metrics.jsonl in it.")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # of a run that was killed
        if math.isfinite(entry.get("weight_mean", math.nan)):
            found.append((entry["step"], entry["weight_mean"]))
    if not found:
        raise Error(f"--replay {run}: the run has no weights; it had no teacher.")
    steps, weights = np.array(found, dtype="float64").T
    return {"steps": steps, "weights": weights}


class Released(CrossEntropy):
    """The published code's step: ref.l2t (1) to (9), three optimisers."""

    def __init__(self, cfg, seed, S, dtype):
        self.cfg, self.seed, self.pending = cfg, seed, None
        self.penalises_weights = cfg.regulariser == "weights"
        rng = np.random.default_rng([seed, 0, MEMORY])
        dln, teacher = l2t.dln_init(cfg, rng, dtype), l2t.teacher_init(cfg, rng, dtype)
        self.state = {"dln": dln, "teacher": teacher}
        self.state |= {f"{name}_moments": optim.adamw_init(p) for name, p in self.state.items()}
        self.state["memory"] = l2t.memory_init(cfg, S, np, dtype)

    def __str__(self):
        sizes = [sum(p.size for p in self.state[name].values()) for name in ("dln", "teacher")]
        text = "released: loss network of {:,} and teacher of {:,} parameters".format(*sizes)
        if self.cfg.huber_reg == 0:
            text = f"released: loss network of {sizes[0]:,} parameters, reached by no teacher"
        text += f", features {self.cfg.features}, memory path {self.cfg.memory_path}"
        return f"{text}, memory of {self.cfg.memory_size:,} sequences"

    def loss(self, logits, targets, B, step, square=None):
        """As CrossEntropy"""
        z, y = by_sequence(logits, targets, B)
        rng = np.random.default_rng([self.seed, step, MEMORY])
        dropout = np.random.default_rng([self.seed, step, DROPOUT])
        networks = self.state["teacher"], self.state["dln"]
        if B == 1:  # of a rare length; its loss has nothing to be standardised by
            return self._alone(z, y, dropout, square, logits.shape)
        dlogits, *learned, values = l2t.released_step(
            *networks, self.state["memory"], z, y, self.cfg, rng, dropout, square
        )
        self.pending = learned
        target, missed = values["target"], values["prediction"] - values["target"]
        spread = item((target * target).sum())
        numbers = mixture_numbers(z, y, values, self.cfg)
        numbers |= {name: item(values[name]) for name in ("teacher_loss", "dln_loss")}
        numbers["teacher_r2"] = 1 - item((missed * missed).sum()) / spread if spread else 0.0
        return dlogits.reshape(logits.shape), values["square_gradient"], numbers

    def _alone(self, z, y, dropout, square, shape):
        """The loss of a single sequence, from which nothing is learned"""
        F, _ = l2t.features_forward(z, y, self.cfg)
        w, _ = l2t.dln_forward(self.state["dln"], F, self.cfg, dropout)
        dlogits, values = l2t.student_step(z, y, w, self.cfg, square)
        numbers, self.pending = mixture_numbers(z, y, values, self.cfg), None
        return dlogits.reshape(shape), values["square_gradient"], numbers

    def learn(self, step, total):
        """AdamW of both networks; the batch is in the memory"""
        if self.pending is None:
            return
        cfg, (teacher, dln, self.state["memory"]) = self.cfg, self.pending
        unused = l2t.left_out(cfg, live=cfg.memory_path == "same")
        dln = {name: g for name, g in dln.items() if name not in unused}
        for name, grads in (("teacher", teacher), ("dln", dln)):
            rate, decay, largest = (
                getattr(cfg, f"{name}_{what}") for what in ("lr", "weight_decay", "clip")
            )
            own = self.state[name], grads, self.state[f"{name}_moments"], step
            adamw(*own, rate * factor(cfg, step, total), decay, largest)


def train_step(
    params, moments, batch, step, number, total, rate, teacher, cfg, recipe, groups, seed
):
    """One step of the student, in place, and of its teacher.   -> what to log

    number: of the optimisers' steps, without those that were skipped;  rate: factor on the learning
    rates. Where loss or gradient are not finite nothing is stepped, and the batch is in no memory.
    """
    logits, targets, cache = network.predict(
        params, batch, cfg, np.random.default_rng([seed, step])
    )
    trained, square = [name for name in params if groups[name].lr], None
    if teacher.penalises_weights:
        square = square_norm(params, trained)
    own = logits, targets, len(batch.targets), step, square
    dlogits, dsquare, values = teacher.loss(*own)
    _, grads = network.backward(dlogits, cache)
    grads = {name: grads[name] for name in trained if name in grads}
    if teacher.penalises_weights:
        grads = {name: g + 2 * dsquare * params[name] for name, g in grads.items()}

    twice = ["encoder.weight"] if recipe.double_embedding else []
    norm = optim.gradient_norm(grads)
    if twice:
        norm = math.hypot(norm, optim.gradient_norm({name: grads[name] for name in twice}))
    values["gradient_norm"] = norm
    if not math.isfinite(values["loss"] + norm):
        return values
    if recipe.clip:
        grads = optim.clip(grads, norm, recipe.clip)
    doubled = {name: grads.pop(name) for name in twice}
    optim.adamw_update(params, grads, moments, number, groups, rate)
    for n in (2 * number - 1, 2 * number) if twice else ():
        optim.adamw_update(params, doubled, moments, n, groups, rate)
    params |= network.running_statistics(params, cache)
    teacher.learn(number, total)
    return values


# State in a checkpoint


def tensors_of(state, prefix=""):
    """Nested dicts of arrays and whole numbers -> {"a/b": array on the host}"""
    flat = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= tensors_of(value, f"{prefix}{name}/")
        elif isinstance(value, int):
            flat[prefix + name] = np.array([value], dtype="int64")
        else:
            flat[prefix + name] = backend.to_host(value)
    return flat


def restored(state, tensors, xp, prefix=""):
    """The same nested dicts, of the values in tensors, on the device"""
    back = {}
    for name, value in state.items():
        if isinstance(value, dict):
            back[name] = restored(value, tensors, xp, f"{prefix}{name}/")
        elif isinstance(value, int):
            back[name] = int(tensors[prefix + name][0])
        else:
            back[name] = backend.to_device(tensors[prefix + name], xp)
    return back
