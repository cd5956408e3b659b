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
    H = mean huber(ŷ - t)
    J_T = H + 0.01 Σ |p|                                 each tensor p of the teacher           (7)
    J_D = H + 1e-3 mean w² + mean tanh²(r/5) / 2 - 2 var w + max(mean r - 1, 0)²                (8)
    π_i ∝ softmax(CE/2)_i / 2 + 1/(2n) + 0.1 ε_i         of n entries, ε_i uniform in [0, 1)    (9)

    parameter      shape             B batch, S positions, V classes, H units of the GRU
    W, U, b, c     (3H, 5), (3H, H), (3H,), (3H,)  the GRU, as in ref.nn
    norm_*         (H,)              of BatchNorm
    W_i, b_i       (M, H or M), (M,) hidden layers i < n_layers of the MLP; the last one to 1
    W_r, b_r       (1, H), (1,)      residual
    W_i, b_i       (T, 1), (T,), ... of the teacher: two hidden layers of T units, the output

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
"""

import math
from dataclasses import dataclass

import numpy as np

from ref import Error, backend, nn
from ref.backend import array_module, check_choice

CHANNELS = 5  # of the features
MASK = 1e9  # that the released features subtract
STD_FLOOR = 1e-4  # of a channel's deviation over time
TARGET_EPS = 1e-6  # beside the deviation of the targets
TEACHER_HIDDEN = 2  # layers
CORRECTED = {"features": "corrected", "memory_path": "same"}  # the settings without the mistakes


@dataclass(frozen=True)
class Config:
    """Mode "released": networks, losses and memory."""

    features: str = "released"  # (1): released or corrected
    standardise: bool = True  # features over time; the sequence's overall level is lost
    gru_size: int = 64  # H
    n_layers: int = 4  # hidden ones of the MLP
    layer_size: int = 256  # M
    dropout: float = 0.1  # between them
    batch_norm: bool = True
    residual: bool = True
    clamp: tuple = (0.05, 0.95)  # of w; (0, 1): none
    memory_path: str = "released"  # released: (3); same: (2)
    teacher_size: int = 128  # T
    teacher_bias: float = 15.0  # of its output, initially
    loss_form: str = "convex"  # (5); additive: CE + w R
    reg_strength: float = 0.1  # λ₀
    huber_delta: float = 1.0
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
        for name in ("gru_size", "n_layers", "layer_size", "teacher_size", "memory_size"):
            if getattr(self, name) < 1:
                raise Error(f"{name}={getattr(self, name)}: expected at least 1.")
        if not (len(self.clamp) == 2 and 0 <= self.clamp[0] < self.clamp[1] <= 1):
            raise Error(f"clamp={self.clamp}: expected two bounds, 0 <= lower < upper <= 1.")
        if not 0 <= self.dropout < 1:
            raise Error(f"dropout={self.dropout}: expected 0 <= dropout < 1.")
        for name in ("temperature", "huber_delta"):
            if not 0 < getattr(self, name) < math.inf:
                raise Error(f"{name}={getattr(self, name)}: expected more than 0, and finite.")
        if not 0 <= self.noise < math.inf:
            raise Error(f"noise={self.noise}: expected 0 or more, and finite.")


# Features


def features_forward(logits, y, cfg):
    """(1).   logits (B, S, V), y (B, S) classes -> F (B, S, 5)

    Of the released form channels 4 and 5 are rounding noise.
    Error: fewer than 2 positions or 3 classes, a class that is none.
    """
    _check_logits(logits, y)
    xp, (_, S, V) = array_module(logits), logits.shape
    if S < 2 or V < 3:
        raise Error(f"features of {S} positions and {V} classes: expected at least 2 and 3.")
    logp, hit = _log_softmax(logits), y[..., None] == xp.arange(V)
    right = (logp * hit).sum(axis=2)
    if cfg.features == "released":
        masked = logp - MASK * (~hit).astype(logits.dtype)
        best = masked.max(axis=2)
        mean = (masked.sum(axis=2) - best) / (V - 1)
        std = masked.std(axis=2, ddof=1)
        corrected = None
    else:
        best = xp.where(hit, -xp.inf, logp).max(axis=2)
        mean = (logp * ~hit).sum(axis=2) / (V - 1)
        centred = (logp - mean[..., None]) * ~hit
        std = xp.sqrt((centred * centred).sum(axis=2) / (V - 2))
        corrected = logp, hit, centred, std
    F = xp.stack([right, best, right - best, mean, std], axis=2)
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
    logp, hit, centred, std = corrected
    xp, V, d = array_module(dF), logp.shape[2], [dF[..., i, None] for i in range(CHANNELS)]
    first = xp.where(hit, -xp.inf, logp).argmax(axis=2)
    largest = first[..., None] == xp.arange(V)
    std = std[..., None] + (std == 0)[..., None]
    dlogp = (d[0] + d[2]) * hit + (d[1] - d[2]) * largest
    dlogp += d[3] * ~hit / (V - 1) + d[4] * centred / ((V - 2) * std)
    return dlogp - xp.exp(logp) * dlogp.sum(axis=2, keepdims=True)


def _log_softmax(z):
    xp, z = array_module(z), z - z.max(axis=-1, keepdims=True)
    return z - xp.log(xp.exp(z).sum(axis=-1, keepdims=True))


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
    H, M = cfg.gru_size, cfg.layer_size
    shapes = {"W": (3 * H, CHANNELS), "U": (3 * H, H), "b": (3 * H,), "c": (3 * H,)}
    params = {n: rng.uniform(-1, 1, shape) / math.sqrt(H) for n, shape in shapes.items()}
    params |= {"norm_weight": np.ones(H), "norm_bias": np.zeros(H)}
    params |= _linear_init("r", 1, H, rng) | _mlp_init([H, *[M] * cfg.n_layers, 1], rng)
    return {name: p.astype(dtype) for name, p in params.items()}


def teacher_init(cfg, rng, dtype="float32"):
    """The same; the output's bias is teacher_bias"""
    params = _mlp_init([1, *[cfg.teacher_size] * TEACHER_HIDDEN, 1], rng)
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
    """n hidden layers, GELU after each, dropout between them.   x (B, I) -> (B,)"""
    layers = []
    for i in range(n):
        x, linear = nn.linear_forward(x, params[f"W_{i}"], params[f"b_{i}"])
        x, gelu = nn.gelu_forward(x)
        x, drop = nn.dropout_forward(x, dropout, rng if i < n - 1 else None)
        layers.append((linear, gelu, drop))
    y, out = nn.linear_forward(x, params[f"W_{n}"], params[f"b_{n}"])
    return y[:, 0], (layers, out)


def mlp_backward(dy, cache):
    """dy (B,) -> dx (B, I), grads"""
    layers, out = cache
    n, grads = len(layers), {}
    dx, grads[f"W_{n}"], grads[f"b_{n}"] = nn.linear_backward(dy[:, None], out)
    for i in range(n - 1, -1, -1):
        linear, gelu, drop = layers[i]
        dx = nn.gelu_backward(nn.dropout_backward(dx, drop), gelu)
        dx, grads[f"W_{i}"], grads[f"b_{i}"] = nn.linear_backward(dx, linear)
    return dx, grads


def raw_forward(params, F, cfg, live, rng=None):
    """(2) if live, else (3).   F (B, S, 5) -> r (B,);   rng: for dropout"""
    h, gru = nn.gru_forward(F, *(params[n] for n in "WUbc"), last=True)
    a, norm = h, None
    if live and cfg.batch_norm:
        affine = params["norm_weight"], params["norm_bias"]
        a, norm = nn.batch_norm_forward(h, *affine, None, None, True)
    r, mlp = mlp_forward(params, a, cfg.n_layers, cfg.dropout, rng)
    residual = None
    if live and cfg.residual:
        more, residual = nn.linear_forward(a, params["W_r"], params["b_r"])
        r = r + more[:, 0]
    return r, (params, gru, norm, mlp, residual)


def raw_backward(dr, cache):
    """dr (B,) -> dF (B, S, 5), grads; of what the path leaves out, zeros"""
    params, gru, norm, mlp, residual = cache
    unused = ("norm_weight", "norm_bias", "W_r", "b_r")
    grads = {n: array_module(dr).zeros_like(params[n]) for n in unused}
    da, own = mlp_backward(dr, mlp)
    if residual is not None:
        more, grads["W_r"], grads["b_r"] = nn.linear_backward(dr[:, None], residual)
        da = da + more
    if norm is not None:
        da, grads["norm_weight"], grads["norm_bias"] = nn.batch_norm_backward(da, norm)
    dF, *gates, _ = nn.gru_backward(da, gru)
    return dF, grads | own | dict(zip("WUbc", gates, strict=True))


def weight_forward(r, clamp=(0, 1)):
    """(4).   r (B,) -> w (B,)"""
    s, sigmoid = nn.sigmoid_forward(r)
    return array_module(r).clip(s, *clamp), (s, sigmoid, clamp)


def weight_backward(dw, cache):
    """dw (B,) -> dr (B,), zero outside of the bounds"""
    s, sigmoid, (low, high) = cache
    return nn.sigmoid_backward(dw * ((s >= low) & (s <= high)), sigmoid)


def dln_forward(params, F, cfg, rng=None):
    """(2), (4): the weights of a batch.   F (B, S, 5) -> w (B,);   rng: for dropout"""
    r, raw = raw_forward(params, F, cfg, True, rng)
    w, squash = weight_forward(r, cfg.clamp)
    return w, (raw, squash)


def dln_backward(dw, cache):
    """dw (B,) -> dF (B, S, 5), grads"""
    raw, squash = cache
    return raw_backward(weight_backward(dw, squash), raw)


# The student's loss


def student_loss_forward(logits, y, w, cfg):
    """(5).   logits (B, S, V), y (B, S), w (B,) -> l, (CE (B,), R (B,)), cache

    Error: as features_forward.
    """
    _check_logits(logits, y)
    xp, logp = array_module(logits), _log_softmax(logits)
    hit = y[..., None] == xp.arange(logits.shape[2])
    ce = -(logp * hit).sum(axis=2).mean(axis=1)
    reg = cfg.reg_strength * (logits * logits).mean(axis=2).mean(axis=1)
    share = 1 - w if cfg.loss_form == "convex" else xp.ones_like(w)
    return (share * ce + w * reg).mean(), (ce, reg), (logits, logp, hit, w, share, ce, reg, cfg)


def student_loss_backward(dloss, cache):
    """dloss (a number) -> dlogits (B, S, V), dw (B,)

    B ∂l/∂z = (1 - w) (p - 1[v = y]) / S + w λ₀ 2 z / (S V)
    """
    logits, logp, hit, w, share, ce, reg, cfg = cache
    B, S, V = logits.shape
    share, pull = share[:, None, None] / S, w[:, None, None] * (2 * cfg.reg_strength / (S * V))
    dlogits = share * (array_module(logits).exp(logp) - hit) + pull * logits
    dw = reg - ce if cfg.loss_form == "convex" else reg
    return dlogits * (dloss / B), dw * (dloss / B)


# Losses of the teacher and of the DLN


def teacher_forward(params, w):
    """(6).   w (B,) -> ŷ (B,)"""
    return mlp_forward(params, w[:, None], TEACHER_HIDDEN)


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

    -> J_T + J_D, {"teacher_loss": J_T, "dln_loss": J_D, "huber": H, "weight": w, "prediction": ŷ,
    "target": t}, cache.   Without huber_twice H counts once in the sum.   rng: for dropout
    Error: a sample of one, which has no deviation.
    """
    if len(ce) < 2:
        raise Error("a batch of 1 sequence has no deviation to standardise by: use at least 2.")
    same = cfg.memory_path == "same"
    r, raw = raw_forward(dln, F, cfg, same, rng)
    w, squash = weight_forward(r, cfg.clamp if same else (0, 1))
    prediction, predictor = teacher_forward(teacher, w)
    target = standardised(ce)
    H, huber = nn.huber_forward(prediction, target, cfg.huber_delta)
    norms, norm_cache = norm_penalty_forward(teacher)
    penalty, penalty_cache = weight_penalty_forward(r, w, cfg)
    J_T, J_D = H + cfg.teacher_norm_reg * norms, H + penalty
    values = {"teacher_loss": J_T, "dln_loss": J_D, "huber": H}
    values |= {"weight": w, "prediction": prediction, "target": target}
    total = J_T + J_D if cfg.huber_twice else J_T + penalty
    return total, values, (raw, squash, predictor, huber, norm_cache, penalty_cache, cfg)


def teaching_backward(dloss, cache):
    """dloss (a number) -> the teacher's grads, the DLN's; H is in both losses"""
    raw, squash, predictor, huber, norms, penalty, cfg = cache
    dr, dw_penalty = weight_penalty_backward(dloss, penalty)
    dprediction, _ = nn.huber_backward((2 if cfg.huber_twice else 1) * dloss, huber)
    dw, grads = teacher_backward(dprediction, predictor)
    sizes = norm_penalty_backward(cfg.teacher_norm_reg * dloss, norms)
    _, dln_grads = raw_backward(dr + weight_backward(dw + dw_penalty, squash), raw)
    return {n: g + sizes[n] for n, g in grads.items()}, dln_grads


# Memory


def memory_init(cfg, S, xp=np, dtype="float32"):
    """An empty ring of memory_size sequences of length S: F, CE, where to write, how many there"""
    n = cfg.memory_size
    F, ce = xp.zeros((n, S, CHANNELS), dtype=dtype), xp.zeros(n, dtype=dtype)
    return {"features": F, "ce": ce, "at": 0, "count": 0}


def memory_write(memory, F, ce):
    """F (B, S, 5), ce (B,) in the places of the oldest.   Error: the memory is smaller"""
    n, B = len(memory["ce"]), len(ce)
    if n < B:
        raise Error(f"a memory of {n} entries is smaller than the batch of {B}: make it larger.")
    if F.shape != (B, *memory["features"].shape[1:]):
        expected = (B, *memory["features"].shape[1:])
        raise Error(f"features {tuple(F.shape)}: this memory takes {expected}.")
    xp = array_module(ce)
    where = (xp.arange(B) + memory["at"]) % n
    features, kept = memory["features"].copy(), memory["ce"].copy()
    features[where], kept[where] = F, ce
    at, count = (memory["at"] + B) % n, min(memory["count"] + B, n)
    return {"features": features, "ce": kept, "at": at, "count": count}


def sampling_probabilities(ce, uniform, cfg):
    """(9).   ce, uniform (n,) on the host -> π (n,) float64, summing to 1"""
    scaled = ce.astype("float64") / cfg.temperature
    softmax = np.exp(scaled - scaled.max())
    weight = 0.5 * softmax / softmax.sum() + 0.5 / len(ce) + cfg.noise * uniform
    return weight / weight.sum()


def memory_sample(memory, B, cfg, rng):
    """B entries with replacement, by (9) -> F (B, S, 5), ce (B,); zeros while there are fewer"""
    features, ce, count = (memory[n] for n in ("features", "ce", "count"))
    xp = array_module(ce)
    if count < B:
        return xp.zeros((B, *features.shape[1:]), dtype=ce.dtype), xp.zeros(B, dtype=ce.dtype)
    p = sampling_probabilities(backend.to_host(ce[:count]), rng.random(count), cfg)
    picked = np.searchsorted(np.cumsum(p), rng.random(B), side="right")
    picked = backend.to_device(np.minimum(picked, count - 1), xp)  # the sum may end below 1
    return features[picked], ce[picked]


def memory_exchange(memory, F, ce, cfg, rng):
    """Write the batch and take a sample of its size -> memory, F, ce.   Error: as memory_write"""
    if cfg.write_first:
        memory = memory_write(memory, F, ce)
        return memory, *memory_sample(memory, len(ce), cfg, rng)
    sample = memory_sample(memory, len(ce), cfg, rng)
    return memory_write(memory, F, ce), *sample


# The step


def released_step(teacher, dln, memory, logits, y, cfg, rng, dropout=None):
    """(1) to (9) on the student's logits (B, S, V), with classes y (B, S)

    -> dlogits (B, S, V), the teacher's grads, the DLN's, memory, values: those of teaching_forward
    and "loss" l, "ce", "reg", "live_weight" (B,). All grads are of l + J_T + J_D.
    rng: of the memory; dropout: another, of the DLN's, or None.   Error: as of the parts.
    """
    F, _ = features_forward(logits, y, cfg)
    w, _ = dln_forward(dln, F, cfg, dropout)
    loss, (ce, reg), student = student_loss_forward(logits, y, w, cfg)
    memory, F, sampled = memory_exchange(memory, F, ce, cfg, rng)
    _, values, teaching = teaching_forward(teacher, dln, F, sampled, cfg, dropout)
    dlogits, _ = student_loss_backward(1.0, student)
    teacher_grads, dln_grads = teaching_backward(1.0, teaching)
    values |= {"loss": loss, "ce": ce, "reg": reg, "live_weight": w}
    return dlogits, teacher_grads, dln_grads, memory, values


# Names of the published code


def dln_names(n_layers):
    """{ours: theirs} of the DLN"""
    gru = "feature_summarizer_gru."
    names = {"W": f"{gru}weight_ih_l0", "U": f"{gru}weight_hh_l0"}
    names |= {"b": f"{gru}bias_ih_l0", "c": f"{gru}bias_hh_l0"}
    names |= {f"norm_{kind}": f"batch_norm.{kind}" for kind in ("weight", "bias")}
    places = {"r": "residual", n_layers: f"net.{3 * n_layers - 1}"}
    return names | _linear_names(places | {i: f"net.{3 * i}" for i in range(n_layers)})


def teacher_names():
    """{ours: theirs} of the teacher"""
    return _linear_names({i: f"teacher_net.{2 * i}" for i in range(TEACHER_HIDDEN + 1)})


def _linear_names(places):
    kinds = {"W": "weight", "b": "bias"}
    return {f"{k}_{i}": f"{at}.{kind}" for i, at in places.items() for k, kind in kinds.items()}
