"""The hypergradient: the derivative of a held-out loss through K steps of an optimiser, by hand.

    θ_{k+1}, s_{k+1} = U(θ_k, s_k, g°_k),  g°_k = ∂l_k/∂θ at (θ_k, φ),  k < K    inner steps     (1)
    E(φ) = L(θ_K)                                                         the held-out loss      (2)
    v = ∂L/∂θ_K;   for k = K-1 .. 0:                                      the reverse recursion  (3)
        v, s̄, a = Uᵀ(v, s̄);   G = G + C_k a;   v = v + H_k a
    H_k = ∂²l_k/∂θ²,  C_k = ∂²l_k/∂φ∂θ  at θ_k;   at the end G = dE/dφ and v = dE/dθ_0

θ are the student's parameters, φ those of its loss, dicts of arrays; s the optimiser's moments, a
and v like the trained part of θ, G like φ. Uᵀ is the transpose of the derivative of U; of plain SGD
a = -η v. The last product with H only makes dE/dθ_0: without it, K = 1 needs none.

The steps, g = c g°, c = min(1, clip / (|g°| + 1e-6)) where there is a clip, η the rate:

    sgd        θ' = (1 - η decay) θ - η g                                                        (4)
    momentum   m' = μ m + g,  θ' = (1 - η decay) θ - η m'                                        (5)
    adamw      m' = β1 m + (1 - β1) g,  s' = β2 s + (1 - β2) g²,
               θ' = (1 - η decay) θ - η m̂ / D,  m̂ = m' / (1 - β1^n),
               D = r + eps,  r = sqrt(s' / (1 - β2^n)),  n from 1                                (6)

adamw is ref.optim's step, the same bits. `adamw-frozen` takes the same steps and leaves s̄ = 0 in
reverse: an approximation, which is named where it is used.

Kept are the K gradients, beside the θ_0 and the moments that the caller has. θ_k and the moments
before step k are the first k steps taken again, elementwise and bit for bit: no gradient is
computed twice, and adamw, too, has K copies instead of 3 K.

Equations: spec/l2t.md, sections 6.2, 6.5 and 6.6.
"""

import math
from dataclasses import dataclass, field

from ref import Error, optim
from ref.backend import array_module, check_choice, item

KINDS = ("sgd", "momentum", "adamw", "adamw-frozen")


@dataclass(frozen=True)
class Optimiser:
    """What the inner steps are."""

    kind: str = "sgd"
    group: optim.Group = field(default_factory=lambda: optim.Group(0.1))  # of every name that ...
    groups: dict = field(default_factory=dict)  # ... has none here: name -> optim.Group
    momentum: float = 0.9  # of kind momentum
    clip: float | None = None  # the largest norm of all gradients together

    def __post_init__(self):
        check_choice("the inner optimiser", self.kind, KINDS)
        if not 0 <= self.momentum < 1:
            raise Error(f"momentum={self.momentum}: expected 0 <= momentum < 1.")
        if self.clip is not None and not self.clip > 0:
            raise Error(f"clip={self.clip}: expected a positive norm, or None for no clipping.")


@dataclass(frozen=True)
class Tape:
    """What the reverse recursion needs of the inner steps."""

    theta: dict  # θ_0
    moments: dict  # before the first step
    gradients: list  # g°_0 .. g°_{K-1}
    step: int  # steps that the moments had seen
    scales: tuple  # factors on the rates
    optimiser: Optimiser


def moments_init(theta, optimiser):
    """The moments before the first step, zeros like θ: m.* and of adamw v.* too"""
    if optimiser.kind == "sgd":
        return {}
    moments = optim.adamw_init(theta)
    keep = ("m.",) if optimiser.kind == "momentum" else ("m.", "v.")
    return {name: m for name, m in moments.items() if name.startswith(keep)}


# The norm's clipping


def clip_forward(g, largest):
    """g° -> g, cache.   largest None: as it is"""
    norm = optim.gradient_norm(g) if largest is not None else 0.0
    return (g if largest is None else optim.clip(g, norm, largest)), (g, norm, largest)


def clip_backward(dg, cache):
    """dg -> dg°.   From ∂c/∂g° = -c g° / ((|g°| + 1e-6) |g°|)"""
    g, norm, largest = cache
    if largest is None or largest >= norm + 1e-6:
        return dg
    c = largest / (norm + 1e-6)
    along = c * inner(g, dg) / ((norm + 1e-6) * norm)
    return {name: c * d - along * g[name] for name, d in dg.items()}


def inner(a, b):
    """<a, b> of two dicts over the names of b, a Python number, summed in float64"""
    return item(sum((a[name] * y).sum(dtype="float64") for name, y in b.items()))


# One step


def step_forward(theta, moments, g, n, scale, optimiser):
    """(4) to (6), step n from 1, rates times scale.   -> θ', moments', cache

    Of θ what g has no gradient for stays as it is.
    """
    groups = {name: optimiser.groups.get(name, optimiser.group) for name in g}
    g, clipped = clip_forward(g, optimiser.clip)
    after = {name: m.copy() for name, m in moments.items()}
    moved = theta | {name: theta[name].copy() for name in g}
    if optimiser.kind.startswith("adamw"):
        optim.adamw_update(moved, g, after, n, groups, scale)
    else:
        for name, own in groups.items():
            rate, direction = scale * own.lr, g[name]
            if optimiser.kind == "momentum":
                direction = after[f"m.{name}"] = optimiser.momentum * moments[f"m.{name}"] + g[name]
            moved[name] = (1 - rate * own.weight_decay) * theta[name] - rate * direction
    return moved, after, (g, clipped, after, n, scale, groups, optimiser)


def step_backward(dtheta, dmoments, cache):
    """dθ', dmoments' -> dθ, dmoments, dg°: the transposed step, of which g° is an input"""
    g, clipped, moments, n, scale, groups, optimiser = cache
    adjoint = _adamw_backward if optimiser.kind.startswith("adamw") else _sgd_backward
    before, back, dg = {}, {}, {}
    kinds = sorted({name.partition(".")[0] for name in moments})
    for name, own in groups.items():
        v, rate = dtheta[name], scale * own.lr
        of, later = ({kind: x[f"{kind}.{name}"] for kind in kinds} for x in (moments, dmoments))
        if own.lr == 0 and optimiser.kind.startswith("adamw"):  # then nothing of it is stepped
            before[name], dg[name], earlier = v, array_module(v).zeros_like(v), later
        else:
            before[name] = (1 - rate * own.weight_decay) * v
            dg[name], earlier = adjoint(v, later, g[name], of, n, rate, optimiser)
        back |= {f"{kind}.{name}": d for kind, d in earlier.items()}
    return before, back, clip_backward(dg, clipped)


def _sgd_backward(v, later, g, of, n, rate, optimiser):
    """(4), (5).   dθ', dm' -> dg, {"m": dm}"""
    if optimiser.kind == "sgd":
        return -rate * v, {}
    mbar = later["m"] - rate * v
    return mbar, {"m": optimiser.momentum * mbar}


def _adamw_backward(v, later, g, of, n, rate, optimiser):
    """(6).   dθ', dm', ds' -> dg, {"m": dm, "v": ds}.   Where s' = 0, r has no slope: 0 it is"""
    (b1, b2), xp = optim.BETAS, array_module(v)
    m_hat = of["m"] / (1 - b1**n)
    r = xp.sqrt(of["v"]) * (1 / math.sqrt(1 - b2**n))
    D = r + optim.EPS
    mbar, sbar = later["m"] - rate / (1 - b1**n) * v / D, later["v"]
    if optimiser.kind != "adamw-frozen":
        positive = r > 0
        slope = 0.5 / (1 - b2**n) / xp.where(positive, r, 1)  # ∂r/∂s'
        sbar = sbar + xp.where(positive, rate * (v / D) * (m_hat / D) * slope, 0)
    dg = (1 - b1) * mbar + 2 * (1 - b2) * g * sbar
    return dg, {"m": b1 * mbar, "v": b2 * sbar}


# K steps


def unroll(theta, K, gradient, optimiser, moments=None, step=0, schedule=None):
    """(1).   -> θ_K, moments_K, Tape

    gradient(k, θ) -> g of the trained names; for the same k the same batch and dropout.
    moments, step: of an optimiser that has taken steps before; schedule: k -> factor on the rates.
    Error: K below 1, or no gradient at all
    """
    if K < 1 or K % 1:
        raise Error(f"K={K}: the student takes at least 1 step before the held-out loss is taken.")
    moments = moments_init(theta, optimiser) if moments is None else moments
    scales = tuple(1.0 if schedule is None else float(schedule(k)) for k in range(K))
    tape = Tape(theta, moments, [], step, scales, optimiser)
    for k in range(K):
        tape.gradients.append(gradient(k, theta))
        if not tape.gradients[-1]:
            raise Error(f"the gradient of inner step {k} is empty: nothing is trained.")
        theta, moments, _ = _step(tape, k, theta, moments)
    return theta, moments, tape


def replay(tape, k):
    """θ_k and the moments before step k, of 0 .. K"""
    theta, moments = tape.theta, tape.moments
    for j in range(k):
        theta, moments, _ = _step(tape, j, theta, moments)
    return theta, moments


def _step(tape, k, theta, moments):
    n = tape.step + k + 1
    return step_forward(theta, moments, tape.gradients[k], n, tape.scales[k], tape.optimiser)


def callbacks(products):
    """products(k, θ_k, a) -> H a, C a: the two callbacks of `hypergradient`, computed together"""
    kept = {}

    def mixed_product(k, theta, a):
        kept[k], C = products(k, theta, a)
        return C

    return (lambda k, theta, a: kept.pop(k)), mixed_product


def hypergradient(v, tape, hessian_product, mixed_product, start=False):
    """(3).   v = ∂L/∂θ_K -> dE/dφ, dE/dθ_0 (None unless start)

    hessian_product(k, θ_k, a) -> H_k a;   mixed_product(k, θ_k, a) -> C_k a, like φ.
    What L has of φ itself is the caller's to add. The moments before the first step are constants.
    """
    if strange := v.keys() ^ tape.gradients[0].keys():
        name = sorted(strange)[0]
        raise Error(
            f"the gradients of the inner steps and of the held-out loss do not both have {name!r}; "
            "expected the same names."
        )
    G, dmoments = None, {n: array_module(m).zeros_like(m) for n, m in tape.moments.items()}
    for k in reversed(range(len(tape.gradients))):
        theta, moments = replay(tape, k)
        _, _, cache = _step(tape, k, theta, moments)
        v, dmoments, a = step_backward(v, dmoments, cache)
        C = mixed_product(k, theta, a)
        G = C if G is None else {name: G[name] + c for name, c in C.items()}
        if k > 0 or start:
            H = hessian_product(k, theta, a)
            v = {name: x + H[name] for name, x in v.items()}
    return G, (v if start else None)


# Products with second derivatives, from first ones


def central_differences(gradients, theta, v, step=None):
    """H v, C v by central differences of gradients(θ) -> ∂l/∂θ, ∂l/∂φ; either may be {}.

    θ is moved by step |θ| along v/|v|, to both sides; where θ = 0 the distance is step itself.
    step: ε^(1/3) / 5 of θ's precision, 1e-6 in float64 and 1e-3 in float32. Of order ε^(1/3)
    truncation, which is step², and rounding, ε / step, are alike; deep students bend more than
    linear ones, hence the 5. Dropout must be the same on both sides, and a step across a kink, such
    as that of ReLU, leaves an error of the size of the bend.
    """
    xp, length = array_module(next(iter(v.values()))), math.sqrt(inner(v, v))
    if length == 0:
        return tuple({n: xp.zeros_like(g) for n, g in of.items()} for of in gradients(theta))
    if step is None:
        step = max(float(xp.finfo(x.dtype).eps) for x in v.values()) ** (1 / 3) / 5
    moved = {name: theta[name] for name in v}
    h = step * (math.sqrt(inner(moved, moved)) or 1.0) / length
    up, down = (gradients(theta | {n: theta[n] + e * x for n, x in v.items()}) for e in (h, -h))
    return tuple(
        {name: (g - minus[name]) / (2 * h) for name, g in plus.items()}
        for plus, minus in zip(up, down, strict=True)
    )
