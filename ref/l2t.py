"""Learning to teach, mode "released": the loss of L2T-Hyena as its code has it.  arXiv 2511.05926.

A dynamic loss network (DLN) weighs, for each sequence b, cross-entropy against the size of the
logits z. It learns from a teacher that predicts, from the weight alone, how well the student did on
sequences kept in a memory. No gradient of a validation loss is in it: that is L2T-DLN, another
algorithm of the same name (arXiv 2310.19313).

    F = zscore_s [log p_y, m, log p_y - m, μ, σ]         m, μ, σ of log p_v, see features       (1)
    h = GRU(F)_S,  r = MLP(BatchNorm(h)) + W_r BatchNorm(h) + b_r      live path                (2)
    r = MLP(GRU(F)_S)                                                  memory path              (3)
    w = clamp(sigmoid(r))                                live; from the memory without clamp    (4)
    l = mean_b [(1 - w_b) CE_b + w_b R_b],  R_b = λ₀ mean_sv z²        the student's loss       (5)
    ŷ = T(w),  t = (CE - mean CE) / (std CE + 1e-6)      teacher and target, from the memory    (6)
    H = mean huber(ŷ - t)                                huber_reg times in (7) and (8)
    J_T = H + 0.01 Σ |p|                                 each tensor p of the teacher           (7)
    J_D = H + 1e-3 mean w² + mean tanh²(r/5) / 2 - 2 var w + max(mean r - 1, 0)²                (8)
    π_i ∝ softmax(CE/2)_i / 2 + 1/(2n) + 0.1 ε_i         of n entries, ε_i uniform in [0, 1)    (9)

    parameter      shape             B batch, S positions, V classes, H units of the GRU
    W, U, b, c     (3H, 5), (3H, H), (3H,), (3H,)  the GRU, as in ref.nn
    norm_*         (H,)              of BatchNorm
    W_i, b_i       (M, H or M), (M,) hidden layers i < dln_layers of the MLP; the last one to 1
    W_r, b_r       (1, H), (1,)      residual
    W_i, b_i       (T, 1 or 6), ...  of the teacher: two hidden layers of T units, the output

(5) reaches the student only, w counting as constant there; (7) and (8) reach both networks, hence H
twice. So W_r, b_r and norm_* are never trained.

Differences between paper, specification and code. Of the paper the abstract and the published code
are known; equations and defaults are the code's. Each of its oddities is a setting of Config, and
CORRECTED turns those off that are taken for mistakes:

- features="released": the mask meant to take the correct class out of m, μ, σ takes out the others.
  Then channel 2 is channel 1, channel 3 is 0, and channels 4 and 5 are what cancellation at 1e9
  leaves: rounding noise, in which no two implementations agree. features="corrected" takes m, μ, σ
  over the wrong classes.
- memory_path="released": what is trained, (3), is not the map that is used, (2). "same" is (2), (4)
  on the memory as well, and then everything is trained.
- BatchNorm always takes the moments of its batch: the code evaluates without the DLN, so running
  moments are never read, and are not here.
- A teacher's output bias of 15 (teacher_bias) against standardised targets: at first H is linear
  and its gradient knows nothing of the targets.

Variants that neither has:

- regulariser: R_b from the sum over V ("logits-sum"), λ₀ mean_s (log V - entropy of p) ("entropy"),
  or λ₀ |θ|² of the student's parameters ("weights").
- granularity="batch": one weight, r in (4) being the mean of the batch's r. "token": (2) to (5)
  with GRU(F)_s at every position s, w (B, S); BatchNorm takes its moments over B S rows. In (6) to
  (8) r and w are then their means over the positions.
- teacher_input="weight+features": T has F_S, the features of the last position, beside w; no
  gradient reaches them.
- huber_reg=0 and teacher_norm_reg=0: no teacher, (8) is its penalties.
"""

import math
from dataclasses import dataclass

import numpy as np

from ref import Error, nn
from ref.backend import array_module, check_choice, twins
from ref.l2t_memory import CHANNELS, memory_exchange, memory_init  # noqa: F401  init: for callers

MASK = 1e9  # that the released features subtract
STD_FLOOR = 1e-4  # of a channel's deviation over time
TARGET_EPS = 1e-6  # beside the deviation of the targets
TEACHER_HIDDEN = 2  # layers
REGULARISERS = ("logits", "logits-sum", "entropy", "weights")
CORRECTED = {"features": "corrected", "memory_path": "same"}  # the settings without the mistakes


@dataclass(frozen=True)
class Config:
    """Mode "released": networks, losses and memory."""

    features: str = "released"  # (1): released or corrected
    standardise: bool = True  # features over time; the sequence's overall level is lost
    gru_size: int = 64  # H
    dln_layers: int = 4  # hidden ones of the MLP
    dln_size: int = 256  # M
    dln_dropout: float = 0.1  # between them
    batch_norm: bool = True
    dln_residual: bool = True
    granularity: str = "sequence"  # of w: sequence, batch or token
    clamp_low: float = 0.05  # bounds of w; 0 and 1: none
    clamp_high: float = 0.95
    memory_path: str = "released"  # released: (3); same: (2)
    teacher_size: int = 128  # T
    teacher_bias: float = 15.0  # of its output, initially
    teacher_input: str = "weight"  # or weight+features
    loss_form: str = "convex"  # (5); additive: CE + w R
    regulariser: str = "logits"  # R: logits, logits-sum, entropy or weights
    reg_strength: float = 0.1  # λ₀
    huber_delta: float = 1.0
    huber_reg: float = 1.0  # of H, wherever it stands
    huber_twice: bool = True  # False: each network is reached by its own loss's H alone
    teacher_norm_reg: float = 0.01  # the coefficients of (7) and (8), in their order
    dln_weight_reg: float = 1e-3
    saturation_reg: float = 0.5
    variance_bonus: float = 2.0
    raw_mean_reg: float = 1.0
    memory_size: int = 500
    temperature: float = 2.0  # of (9)
    noise: float = 0.1
    write_first: bool = True  # the batch is in the memory when it is sampled

    def __post_init__(self):
        check_choice("features", self.features, ("released", "corrected"))
        check_choice("memory_path", self.memory_path, ("released", "same"))
        check_choice("loss_form", self.loss_form, ("convex", "additive"))
        check_choice("granularity", self.granularity, ("sequence", "batch", "token"))
        check_choice("teacher_input", self.teacher_input, ("weight", "weight+features"))
        check_choice("regulariser", self.regulariser, REGULARISERS)
        for name in ("gru_size", "dln_layers", "dln_size", "teacher_size", "memory_size"):
            if getattr(self, name) < 1:
                raise Error(f"{name}={getattr(self, name)}: expected at least 1.")
        if not 0 <= self.clamp_low < self.clamp_high <= 1:
            bounds = f"clamp_low={self.clamp_low}, clamp_high={self.clamp_high}"
            raise Error(f"{bounds}: expected 0 <= clamp_low < clamp_high <= 1.")
        if not 0 <= self.dln_dropout < 1:
            raise Error(f"dln_dropout={self.dln_dropout}: expected 0 <= dln_dropout < 1.")
        for name in ("temperature", "huber_delta"):
            if not 0 < getattr(self, name) < math.inf:
                raise Error(f"{name}={getattr(self, name)}: expected more than 0, and finite.")
        for name in ("noise", "huber_reg"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Error(f"{name}={getattr(self, name)}: expected 0 or more, and finite.")


# Positions


def summarise(logits, y, cfg, features=True):
    """What features and loss need of each position: {name: (B, S)}.   logits (B, S, V), y (B, S)

    "top" max z and "log_z" log Σ exp(z - top), so that log p = z - top - log_z; "right" log p_y;
    "size" Σ z², for the regulariser entropy Σ p log p; and, of features, "best", "mean" and "std",
    m, μ and σ of (1). Made once, it serves features_forward and student_loss_forward.
    Error: a class that is none. On a GPU, for which no step should wait, log p_y is NaN instead.
    """
    _check_logits(logits, y)
    xp, entropy = array_module(logits), cfg.regulariser == "entropy"
    if (twin := twins("l2t", logits)) and logits.dtype.name in ("float32", "float64"):
        mask = MASK if cfg.features == "released" else 0.0
        top, log_z, right, squares, information, best, mean, std = twin.summarise(logits, y, mask)
        size = information if entropy else squares
    else:
        top = logits.max(axis=2)
        logp = logits - top[..., None]
        log_z = xp.log(xp.exp(logp).sum(axis=2))
        logp -= log_z[..., None]
        at = _places(y, logits.shape[2])
        right = logp[at]
        right[at[2] != y] = math.nan
        size = (xp.exp(logp) * logp if entropy else logits * logits).sum(axis=2)
        if features:
            moments = _released if cfg.features == "released" else _wrong
            best, mean, std = moments(logp, at)
    summary = {"top": top, "log_z": log_z, "right": right, "size": size}
    return summary | ({"best": best, "mean": mean, "std": std} if features else {})


def _released(logp, at):
    """m, μ, σ of (1) with the wrong classes masked; logp is lost"""
    V, right = logp.shape[2], logp[at]
    logp -= MASK
    logp[at] = right
    best = logp.max(axis=2)
    return best, (logp.sum(axis=2) - best) / max(V - 1, 1), logp.std(axis=2, ddof=1)


def _wrong(logp, at):
    """m, μ, σ of (1) over the wrong classes; logp is lost"""
    xp, V = array_module(logp), logp.shape[2]
    logp[at] = -math.inf
    best = logp.max(axis=2)
    logp[at] = 0
    mean = logp.sum(axis=2) / (V - 1)
    logp -= mean[..., None]
    logp[at] = 0
    logp *= logp
    return best, mean, xp.sqrt(logp.sum(axis=2) / max(V - 2, 1))


def log_probabilities(logits, summary):
    """-> log p (B, S, V)"""
    logp = logits - summary["top"][..., None]
    logp -= summary["log_z"][..., None]
    return logp


def _places(y, V):
    """The index of every position's class; of what is no class, of class 0"""
    xp, (B, S) = array_module(y), y.shape
    known = xp.where((y >= 0) & (y < V), y, 0)
    return xp.arange(B)[:, None], xp.arange(S)[None, :], known


# Features


def features_forward(logits, y, cfg, summary=None):
    """(1).   logits (B, S, V), y (B, S) classes -> F (B, S, 5);   summary: of summarise, if there

    Of the released form channels 4 and 5 are rounding noise.
    Error: fewer than 2 classes, or 2 positions to standardise over; a class that is none.
    """
    _check_logits(logits, y)
    (_, S, V), least = logits.shape, 2 if cfg.standardise else 1
    if least > S or V < 2:
        raise Error(f"features of {S} positions and {V} classes: expected at least {least} and 2.")
    summary = summary or summarise(logits, y, cfg)
    right, best, mean, std = (summary[n] for n in ("right", "best", "mean", "std"))
    F = array_module(logits).stack([right, best, right - best, mean, std], axis=2)
    corrected = None if cfg.features == "released" else (logits, y, summary)
    if not cfg.standardise:
        return F, (corrected, None)
    F, scaling = _over_time_forward(F)
    return F, (corrected, scaling)


def features_backward(dF, cache):
    """dF (B, S, 5) -> dlogits (B, S, V), of the corrected form.   Error: of the released one"""
    corrected, scaling = cache
    if corrected is None:
        raise Error("the released features are rounding noise: features='corrected' for gradients.")
    if scaling is not None:
        dF = _over_time_backward(dF, scaling)
    logits, y, summary = corrected
    xp, V, d = array_module(dF), logits.shape[2], [dF[..., i] for i in range(CHANNELS)]
    logp, at, std = log_probabilities(logits, summary), _places(y, V), summary["std"]
    slope = d[4] / (max(V - 2, 1) * (std + (std == 0)))
    dlogp = (logp - summary["mean"][..., None]) * slope[..., None]
    dlogp += (d[3] / (V - 1))[..., None]
    dlogp[at] = d[0] + d[2]
    p = xp.exp(logp)
    logp[at] = -math.inf
    dlogp[*at[:2], logp.argmax(axis=2)] += d[1] - d[2]
    p *= dlogp.sum(axis=2, keepdims=True)
    dlogp -= p
    return dlogp


def _over_time_forward(F):
    """F (B, S, 5) -> (F - mean) / max(std, 1e-4) over S, std unbiased"""
    xp = array_module(F)
    centred = F - F.mean(axis=1, keepdims=True)
    std = xp.sqrt((centred * centred).sum(axis=1, keepdims=True) / (F.shape[1] - 1))
    scale = xp.maximum(std, STD_FLOOR)
    return centred / scale, (centred / scale, scale, std > STD_FLOOR)


def _over_time_backward(dy, cache):
    """dF = (dy - mean(dy) - y Σ dy y / (S - 1)) / scale, without the last term at the floor"""
    y, scale, free = cache
    slope = (dy * y).sum(axis=1, keepdims=True) / (y.shape[1] - 1) * free
    return (dy - dy.mean(axis=1, keepdims=True) - y * slope) / scale


def _check_logits(logits, y):
    """Error: shapes that do not belong together; on the host also classes that are none"""
    if logits.ndim != 3 or y.shape != logits.shape[:2] or 0 in logits.shape:
        shapes = f"logits {tuple(logits.shape)} and classes {tuple(y.shape)}"
        raise Error(f"{shapes}: expected (B, S, V) and (B, S), none of them 0.")
    if array_module(y).__name__ == "numpy" and (y.min() < 0 or y.max() >= logits.shape[2]):
        raise Error(f"a target is outside the {logits.shape[2]} classes of the logits.")


# Networks


def dln_init(cfg, rng, dtype="float32"):
    """PyTorch's initial values: uniform within 1/sqrt(H) for the GRU, 1/sqrt(inputs) elsewhere"""
    H, M = cfg.gru_size, cfg.dln_size
    shapes = {"W": (3 * H, CHANNELS), "U": (3 * H, H), "b": (3 * H,), "c": (3 * H,)}
    params = {n: rng.uniform(-1, 1, shape) / math.sqrt(H) for n, shape in shapes.items()}
    params |= {"norm_weight": np.ones(H), "norm_bias": np.zeros(H)}
    params |= _linear_init("r", 1, H, rng) | _mlp_init([H, *[M] * cfg.dln_layers, 1], rng)
    return {name: p.astype(dtype) for name, p in params.items()}


def teacher_init(cfg, rng, dtype="float32"):
    """The same; the output's bias is teacher_bias"""
    inputs = 1 + (CHANNELS if cfg.teacher_input == "weight+features" else 0)
    params = _mlp_init([inputs, *[cfg.teacher_size] * TEACHER_HIDDEN, 1], rng)
    params[f"b_{TEACHER_HIDDEN}"] = np.full(1, cfg.teacher_bias)
    return {name: p.astype(dtype) for name, p in params.items()}


def _mlp_init(sizes, rng):
    layers = enumerate(zip(sizes[1:], sizes[:-1], strict=True))
    return {n: p for i, shape in layers for n, p in _linear_init(i, *shape, rng).items()}


def _linear_init(i, outputs, inputs, rng):
    bound = 1 / math.sqrt(inputs)
    return {
        f"W_{i}": rng.uniform(-bound, bound, (outputs, inputs)),
        f"b_{i}": rng.uniform(-bound, bound, outputs),
    }


def mlp_forward(params, x, n, dropout=0.0, rng=None):
    """n hidden layers, GELU after each, dropout between them.   x (..., I) -> (...)"""
    layers = []
    for i in range(n):
        x, linear = nn.linear_forward(x, params[f"W_{i}"], params[f"b_{i}"])
        x, gelu = nn.gelu_forward(x)
        x, drop = nn.dropout_forward(x, dropout, rng if i < n - 1 else None)
        layers.append((linear, gelu, drop))
    y, out = nn.linear_forward(x, params[f"W_{n}"], params[f"b_{n}"])
    return y[..., 0], (layers, out)


def mlp_backward(dy, cache):
    """dy (...) -> dx (..., I), grads"""
    layers, out = cache
    n, grads = len(layers), {}
    dx, grads[f"W_{n}"], grads[f"b_{n}"] = nn.linear_backward(dy[..., None], out)
    for i in range(n - 1, -1, -1):
        linear, gelu, drop = layers[i]
        dx = nn.gelu_backward(nn.dropout_backward(dx, drop), gelu)
        dx, grads[f"W_{i}"], grads[f"b_{i}"] = nn.linear_backward(dx, linear)
    return dx, grads


def raw_forward(params, F, cfg, live, rng=None):
    """(2) if live, else (3).   F (B, S, 5) -> r (B,), of tokens (B, S);   rng: for dropout"""
    h, gru = nn.gru_forward(F, *(params[n] for n in "WUbc"), last=cfg.granularity != "token")
    a, norm = h, None
    if live and cfg.batch_norm:
        affine = params["norm_weight"], params["norm_bias"]
        a, norm = nn.batch_norm_forward(h, *affine, None, None, True)
    r, mlp = mlp_forward(params, a, cfg.dln_layers, cfg.dln_dropout, rng)
    residual = None
    if live and cfg.dln_residual:
        more, residual = nn.linear_forward(a, params["W_r"], params["b_r"])
        r = r + more[..., 0]
    if cfg.granularity == "batch":
        r = _averaged(r)
    return r, (params, gru, norm, mlp, residual, cfg)


def raw_backward(dr, cache):
    """dr like r -> dF (B, S, 5), grads; of what the path leaves out, zeros"""
    params, gru, norm, mlp, residual, cfg = cache
    unused = ("norm_weight", "norm_bias", "W_r", "b_r")
    grads = {n: array_module(dr).zeros_like(params[n]) for n in unused}
    if cfg.granularity == "batch":
        dr = _averaged(dr)
    da, own = mlp_backward(dr, mlp)
    if residual is not None:
        more, grads["W_r"], grads["b_r"] = nn.linear_backward(dr[..., None], residual)
        da = da + more
    if norm is not None:
        da, grads["norm_weight"], grads["norm_bias"] = nn.batch_norm_backward(da, norm)
    dF, *gates, _ = nn.gru_backward(da, gru)
    return dF, grads | own | dict(zip("WUbc", gates, strict=True))


def _averaged(r):
    """Every element the mean; as a matrix symmetric, so that it is its own backward"""
    return array_module(r).zeros_like(r) + r.mean()


def left_out(cfg, live):
    """Names of the parameters that (2), if live, or (3) has no gradient for"""
    norm = () if live and cfg.batch_norm else ("norm_weight", "norm_bias")
    return norm + (() if live and cfg.dln_residual else ("W_r", "b_r"))


def weight_forward(r, clamp=(0, 1)):
    """(4).   r (...) -> w (...)"""
    s, sigmoid = nn.sigmoid_forward(r)
    return array_module(r).clip(s, *clamp), (s, sigmoid, clamp)


def weight_backward(dw, cache):
    """dw (...) -> dr (...), zero outside of the bounds"""
    s, sigmoid, (low, high) = cache
    return nn.sigmoid_backward(dw * ((s >= low) & (s <= high)), sigmoid)


def dln_forward(params, F, cfg, rng=None):
    """(2), (4): a batch's weights.   F (B, S, 5) -> w (B,), of tokens (B, S);   rng: for dropout"""
    r, raw = raw_forward(params, F, cfg, True, rng)
    w, squash = weight_forward(r, (cfg.clamp_low, cfg.clamp_high))
    return w, (raw, squash)


def dln_backward(dw, cache):
    """dw like w -> dF (B, S, 5), grads"""
    raw, squash = cache
    return raw_backward(weight_backward(dw, squash), raw)


# The student's loss


def student_loss_forward(logits, y, w, cfg, square=None, summary=None):
    """(5).   logits (B, S, V), y (B, S), w (B,), of tokens (B, S) -> l, (CE (B,), R (B,)), cache

    square: |θ|², a number or an array of one, for the regulariser weights. summary: of summarise,
    if there.   Error: as summarise; weights of another shape, no |θ|².
    """
    _check_logits(logits, y)
    expected = y.shape if cfg.granularity == "token" else y.shape[:1]
    if w.shape != expected:
        kind = f"{cfg.granularity} weights {tuple(w.shape)}"
        raise Error(f"{kind}: for these logits expected {tuple(expected)}.")
    summary = summary or summarise(logits, y, cfg, features=False)
    xp, each = array_module(logits), w if w.ndim == 2 else w[:, None]
    ce, reg = -summary["right"], _regulariser(logits, summary, square, cfg)
    share = 1 - each if cfg.loss_form == "convex" else xp.ones_like(each)
    loss = (share * ce + each * reg).mean()
    cache = (logits, y, summary, each, share, ce, reg, cfg)
    return loss, (ce.mean(axis=1), reg.mean(axis=1)), cache


def _regulariser(logits, summary, square, cfg):
    """-> R of each position (B, S)"""
    xp, size, V = array_module(logits), summary["size"], logits.shape[2]
    if cfg.regulariser == "weights":
        if square is None:
            raise Error("the regulariser weights needs |θ|², the argument square.")
        size = xp.zeros_like(size) + xp.asarray(square, dtype=size.dtype)
    elif cfg.regulariser == "entropy":
        size = xp.maximum(size + math.log(V), 0)
    elif cfg.regulariser == "logits":
        size = size / V
    return cfg.reg_strength * size


def student_loss_backward(dloss, cache):
    """dloss (a number) -> dlogits (B, S, V), dw like w, dsquare (0.0 unless the weights count)

    B S ∂l/∂z = (1 - w) (p - 1[v = y]) + w ∂R/∂z,  ∂R/∂z = 2 λ₀ z / V, of the sum 2 λ₀ z, of the
    entropy λ₀ p (log p - Σ p log p)
    """
    logits, y, summary, each, share, ce, reg, cfg = cache
    xp, (B, S, V) = array_module(logits), logits.shape
    strength, scale = each * (cfg.reg_strength * dloss / (B * S)), dloss / (B * S)
    share, none = share * scale + xp.zeros_like(ce), xp.zeros_like(ce)
    on_p, on_plogp, on_z = share, none, none
    if cfg.regulariser == "entropy":
        on_p, on_plogp = share - strength * summary["size"], strength + none
    elif cfg.regulariser != "weights":
        on_z = strength * (2 / V if cfg.regulariser == "logits" else 2) + none
    dlogits = _logit_gradient(logits, y, summary, (on_p, on_plogp, on_z, share), cfg)
    dw = (reg - ce if cfg.loss_form == "convex" else reg) * scale
    dsquare = strength.mean() * (B * S) if cfg.regulariser == "weights" else 0.0
    return dlogits, dw if cfg.granularity == "token" else dw.sum(axis=1), dsquare


def _logit_gradient(logits, y, summary, coefficients, cfg):
    """a p + b p log p + c z - d 1[v = y], the coefficients a, b, c, d (B, S) -> (B, S, V)"""
    if (twin := twins("l2t", logits)) and logits.dtype.name in ("float32", "float64"):
        return twin.logit_gradient(logits, y, summary["top"], summary["log_z"], coefficients)
    xp, (a, b, c, d) = array_module(logits), (x[..., None] for x in coefficients)
    logp = log_probabilities(logits, summary)
    gradient = xp.exp(logp)
    if cfg.regulariser == "entropy":
        logp *= b
        logp += a
        gradient *= logp
    else:
        gradient *= a
    if cfg.regulariser.startswith("logits"):
        gradient += c * logits
    gradient[_places(y, logits.shape[2])] -= d[..., 0]
    return gradient


# Losses of the teacher and of the DLN


def teacher_forward(params, w, features=None):
    """(6).   w (B,), features (B, 5) where the teacher has them -> ŷ (B,)"""
    x = w[:, None]
    if features is not None:
        x = array_module(w).concatenate([x, features], axis=1)
    return mlp_forward(params, x, TEACHER_HIDDEN)


def teacher_backward(dy, cache):
    """dy (B,) -> dw (B,), grads"""
    dx, grads = mlp_backward(dy, cache)
    return dx[:, 0], grads


def standardised(ce):
    """The targets of (6).   ce (B,) -> t (B,)"""
    return (ce - ce.mean()) / (ce.std(ddof=1) + TARGET_EPS)


def norm_penalty_forward(params):
    """-> Σ |p| over the tensors"""
    norms = {n: array_module(p).sqrt((p * p).sum()) for n, p in params.items()}
    return sum(norms.values()), (params, norms)


def norm_penalty_backward(dloss, cache):
    """dloss (a number) -> grads: p / |p|, and 0 where p = 0"""
    params, norms = cache
    return {n: p * (dloss / (norms[n] + (norms[n] == 0))) for n, p in params.items()}


def weight_penalty_forward(r, w, cfg):
    """(8) without H.   r, w (B,) -> a number"""
    xp = array_module(r)
    t, over = xp.tanh(r / 5), xp.maximum(r.mean() - 1, 0)
    penalty = cfg.dln_weight_reg * (w * w).mean() + cfg.saturation_reg * (t * t).mean()
    penalty = penalty - cfg.variance_bonus * w.var(ddof=1) + cfg.raw_mean_reg * over * over
    return penalty, (w, t, over, cfg)


def weight_penalty_backward(dloss, cache):
    """dloss (a number) -> dr, dw (B,)"""
    w, t, over, cfg = cache
    B = len(w)
    dr = cfg.saturation_reg * 0.4 * t * (1 - t * t) / B + cfg.raw_mean_reg * 2 * over / B
    dw = cfg.dln_weight_reg * 2 * w / B - cfg.variance_bonus * 2 * (w - w.mean()) / (B - 1)
    return dr * dloss, dw * dloss


def teaching_forward(teacher, dln, F, ce, cfg, rng=None):
    """(3), (4), (6) to (8) on a sample of the memory, F (B, S, 5) and ce (B,)

    -> J_T + J_D, {"teacher_loss": J_T, "dln_loss": J_D, "huber": H, "weight": w (B,), "prediction":
    ŷ, "target": t}, cache.   Without huber_twice H counts once in the sum.   rng: for dropout
    Error: a sample of one, which has no deviation.
    """
    if len(ce) < 2:
        raise Error("a batch of 1 sequence has no deviation to standardise by: use at least 2.")
    same = cfg.memory_path == "same"
    every_r, raw = raw_forward(dln, F, cfg, same, rng)
    every_w, squash = weight_forward(every_r, (cfg.clamp_low, cfg.clamp_high) if same else (0, 1))
    r, w = (x.mean(axis=1) if x.ndim == 2 else x for x in (every_r, every_w))
    seen = F[:, -1] if cfg.teacher_input == "weight+features" else None
    prediction, predictor = teacher_forward(teacher, w, seen)
    target = standardised(ce)
    H, huber = nn.huber_forward(prediction, target, cfg.huber_delta)
    norms, norm_cache = norm_penalty_forward(teacher)
    penalty, penalty_cache = weight_penalty_forward(r, w, cfg)
    pull = cfg.huber_reg * H
    J_T, J_D = pull + cfg.teacher_norm_reg * norms, pull + penalty
    values = {"teacher_loss": J_T, "dln_loss": J_D, "huber": H}
    values |= {"weight": w, "prediction": prediction, "target": target}
    total = J_T + J_D if cfg.huber_twice else J_T + penalty
    cache = (raw, squash, predictor, huber, norm_cache, penalty_cache, every_r.shape, cfg)
    return total, values, cache


def teaching_backward(dloss, cache):
    """dloss (a number) -> the teacher's grads, the DLN's; H is in both losses"""
    raw, squash, predictor, huber, norms, penalty, shape, cfg = cache
    dr, dw_penalty = weight_penalty_backward(dloss, penalty)
    times = cfg.huber_reg * (2 if cfg.huber_twice else 1)
    dprediction, _ = nn.huber_backward(times * dloss, huber)
    dw, grads = teacher_backward(dprediction, predictor)
    sizes = norm_penalty_backward(cfg.teacher_norm_reg * dloss, norms)
    dw = dw + dw_penalty
    if len(shape) == 2:  # of the means over S positions
        dr, dw = (d[:, None].repeat(shape[1], axis=1) / shape[1] for d in (dr, dw))
    _, dln_grads = raw_backward(dr + weight_backward(dw, squash), raw)
    return {n: g + sizes[n] for n, g in grads.items()}, dln_grads


# The step


def released_step(teacher, dln, memory, logits, y, cfg, rng, dropout=None, square=None):
    """(1) to (9) on the student's logits (B, S, V), with classes y (B, S)

    -> dlogits (B, S, V), the teacher's grads, the DLN's, memory, values: those of student_step and
    teaching_step. All grads are of l + J_T + J_D.
    rng: of the memory; dropout: another, of the DLN's, or None; square: as of student_loss_forward.
    Error: as of the parts.
    """
    summary = summarise(logits, y, cfg)
    F, _ = features_forward(logits, y, cfg, summary)
    w, _ = dln_forward(dln, F, cfg, dropout)
    dlogits, values = student_step(logits, y, w, cfg, square, summary)
    taught = teaching_step(teacher, dln, memory, F, values["ce"], cfg, rng, dropout)
    teacher_grads, dln_grads, memory, more = taught
    return dlogits, teacher_grads, dln_grads, memory, more | values


def student_step(logits, y, w, cfg, square=None, summary=None):
    """(5) with the weights w that it is given, of a network or not; as of student_loss_forward

    -> dlogits (B, S, V), values: "loss" l, "ce", "reg" (B,), "live_weight" w, "square_gradient"
    """
    loss, (ce, reg), cache = student_loss_forward(logits, y, w, cfg, square, summary)
    dlogits, _, dsquare = student_loss_backward(1.0, cache)
    values = {"loss": loss, "ce": ce, "reg": reg, "live_weight": w, "square_gradient": dsquare}
    return dlogits, values


def teaching_step(teacher, dln, memory, F, ce, cfg, rng, dropout=None):
    """(3), (6) to (9): the memory gets F (B, S, 5) and ce (B,), teacher and DLN a sample of it

    -> the teacher's grads, the DLN's, memory, values: those of teaching_forward
    """
    memory, F, ce = memory_exchange(memory, F, ce, cfg, rng)
    _, values, cache = teaching_forward(teacher, dln, F, ce, cfg, dropout)
    return *teaching_backward(1.0, cache), memory, values


# Names of the published code


def dln_names(dln_layers):
    """{ours: theirs} of the DLN"""
    gru = "feature_summarizer_gru."
    names = {"W": f"{gru}weight_ih_l0", "U": f"{gru}weight_hh_l0"}
    names |= {"b": f"{gru}bias_ih_l0", "c": f"{gru}bias_hh_l0"}
    names |= {f"norm_{kind}": f"batch_norm.{kind}" for kind in ("weight", "bias")}
    places = {"r": "residual", dln_layers: f"net.{3 * dln_layers - 1}"}
    return names | _linear_names(places | {i: f"net.{3 * i}" for i in range(dln_layers)})


def teacher_names():
    """{ours: theirs} of the teacher"""
    return _linear_names({i: f"teacher_net.{2 * i}" for i in range(TEACHER_HIDDEN + 1)})


def _linear_names(places):
    kinds = {"W": "weight", "b": "bias"}
    return {f"{k}_{i}": f"{at}.{kind}" for i, at in places.items() for k, kind in kinds.items()}
