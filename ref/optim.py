"""AdamW with parameter groups, learning-rate schedule, and clipping of the gradient's norm."""

import math
from dataclasses import dataclass

from ref.backend import array_module, item, twins

BETAS = (0.9, 0.999)
EPS = 1e-8


@dataclass(frozen=True)
class Group:
    """Learning rate and decoupled weight decay of some parameters; rate 0: not trained."""

    lr: float
    weight_decay: float = 0.0


def adamw_init(params):
    """The optimiser's state: first and second moments, zeros like params"""
    moments = {}
    for name, p in params.items():
        xp = array_module(p)
        moments[f"m.{name}"], moments[f"v.{name}"] = xp.zeros_like(p), xp.zeros_like(p)
    return moments


def adamw_update(params, grads, moments, step, groups, scale=1.0):
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2, as PyTorch does it),
    in place.

    step counts from 1; groups: name -> Group; scale multiplies every learning rate (the schedule).

        m = β1 m + (1-β1) g,  v = β2 v + (1-β2) g²
        p = p (1 - lr decay) - lr m̂ / (sqrt(v̂) + eps),  m̂ = m / (1-β1^step),
        v̂ = v / (1-β2^step)
    """
    b1, b2 = BETAS
    for name, g in grads.items():
        lr, decay = scale * groups[name].lr, groups[name].weight_decay
        if groups[name].lr == 0:
            continue
        p, m, v = params[name], moments[f"m.{name}"], moments[f"v.{name}"]
        size, root = lr / (1 - b1**step), 1 / math.sqrt(1 - b2**step)
        in_place = p.flags.c_contiguous and m.flags.c_contiguous and v.flags.c_contiguous
        if in_place and (twin := twins("optim", p)):
            twin.adamw(p, g, m, v, b1, b2, size, root, EPS, 1 - lr * decay)
            continue
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g * g - v)
        p *= 1 - lr * decay
        p -= size * m / (array_module(p).sqrt(v) * root + EPS)


def warmup_cosine(step, total, warmup):
    """Factor on the rates at `step` (from 1): up over `warmup` steps, then half a cosine to 0"""
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def gradient_norm(grads):
    """The Euclidean norm of all gradients together, a Python float"""
    flat, piece = [g.reshape(-1) for g in grads.values()], 1 << 20  # of a gradient in float64
    parts = (g[i : i + piece] for g in flat for i in range(0, len(g), piece))
    return math.sqrt(item(sum((part.astype("float64") ** 2).sum() for part in parts)))


def clip(grads, norm, largest):
    """grads scaled so that their norm is at most `largest`; norm is their gradient_norm"""
    factor = min(1.0, largest / (norm + 1e-6))
    return grads if factor == 1.0 else {name: g * factor for name, g in grads.items()}
