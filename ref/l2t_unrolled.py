"""Learning to teach, mode "lstm": L2T-DLN, a loss network that an LSTM teaches.  Hai et al.,
NeurIPS 2023, arXiv 2310.19313.

The paper's equations were not at hand: these are those of its code, numbered here.

    θ_{k+1} = U(θ_k, ∂l(θ_k, φ; batch k)/∂θ),  k < K       the student's steps: ref.hvp          (1)
    l = mean over samples b and classes j of f_φ(a_bj)     its loss, by pairs of classes         (2)
    a_bj = [s_by, s_bj, 1, 0] for j ≠ y, else 0;  s = sigmoid(z), z the logits, y the true class (3)
    f_φ(a) = W_n h_n,  h_i = leaky(W_{i-1} h_{i-1}),  h_0 = a, no biases, slope 0.01             (4)
    G = dE/dφ,  E = held-out cross-entropy of θ_K          the hypergradient: ref.hvp            (5)
    q = (log(|G| + 1e-8) / p, sign G) where |G| >= e^-p, else (-1, e^p G)                        (6)
    u, state' = LSTM_ψ(q, state)                           each coordinate of φ on its own       (7)
    head "linear": u = w h + b, h the output of its last cell, in place of a last cell of width 1
    φ' = φ - scale u                                                                             (8)
    dE(φ')/dψ = (∂u/∂ψ)ᵀ (-scale G(φ'))                    second roll-out, from the same θ_0    (9)

    parameter       shape            F features, C classes, P numbers in φ, H the cell's width
    θ: W            (F, C)           the linear student, z = x W
    φ: mat_i        (n_i, n_{i-1})   (4), n_0 = 4, hidden layers of 40
       final_mat    (1, n)           W_n
    ψ: i.W, i.U     (4H, I), (4H, H) cell i of the LSTM; the last has H = 1, and u is its output h
       i.b, i.c     (4H,)
       head.W, .b   (1, H), (1,)     w and b, only where the head is linear

Coordinates of φ are in the order of its dict, each array row by row. The inputs of (7) are
constants: gradients reach ψ through u and, over more rounds than one, through the states.

leaky is linear on both sides of 0, so that the second derivative of (4) in a is zero wherever there
is one; in θ all of H comes from the sigmoid and the student, and the mixed product is the pass that
carries a tangent through (4) and then back.

Differences from the published code: the student here is linear, there a ResNet (`teach` takes any
student's roll-out); optimisers other than SGD can be unrolled; the gain √2 of φ's Kaiming normal
initialisation is assumed. Its defaults are those of Config: p = 10, and no linear head. That head
is of Andrychowicz et al. 2016, arXiv 1606.04474; with it |u| is not below 1.
"""

import math
from dataclasses import dataclass

from ref import Error, hvp, nn, optim
from ref.backend import array_module, check_choice

SLOPE, P = 0.01, 10.0
HEADS = ("cell", "linear")
MOST_P = 40.0  # e^p times a gradient is far from float32's largest number


@dataclass(frozen=True)
class Config:
    """One round of the linear student, its loss and the teacher."""

    lr: float = 0.1  # of the student's SGD
    K: int = 15
    n_classes: int = 10
    hidden: int = 64  # of every cell but the last; with a linear head of every cell
    cells: int = 4
    p: float = P  # of (6)
    head: str = "cell"
    update_scale: float = 1e-3
    dln_hidden: int = 40
    dln_layers: int = 4  # hidden ones

    def __post_init__(self):
        if self.K < 1:
            raise Error(f"K={self.K}: the student takes at least 1 step in a round.")
        if min(self.n_classes, self.hidden, self.cells, self.dln_hidden, self.dln_layers) < 1:
            raise Error("n_classes, hidden, cells, dln_hidden and dln_layers are at least 1.")
        check_teacher(self.p, self.head)
        if not self.lr > 0 or not math.isfinite(self.update_scale):
            raise Error(f"lr={self.lr}, update_scale={self.update_scale}: positive, and a number.")


def check_teacher(p, head, prefix=""):
    """Error for a p or a head that there is not; prefix of their names"""
    check_choice(f"{prefix}head", head, HEADS)
    if not 0 < p <= MOST_P:
        raise Error(f"{prefix}p={p}: expected more than 0 and at most {MOST_P:g}.")


# The loss by pairs of classes


def dln_init(cfg, rng, dtype="float32"):
    """φ, normal with variance 2 / rows"""
    widths = [4, *[cfg.dln_hidden] * cfg.dln_layers, 1]
    names = [*(f"mat_{i}" for i in range(cfg.dln_layers)), "final_mat"]
    shapes = zip(names, widths[1:], widths, strict=False)
    return {
        name: (rng.standard_normal((n, m)) * math.sqrt(2 / n)).astype(dtype)
        for name, n, m in shapes
    }


def pair_loss_forward(phi, z, y):
    """(2) to (4).   z (B, C) logits, y (B,) -> loss.   Error: a label that is no class"""
    xp, C = array_module(z), z.shape[1]
    if xp.__name__ == "numpy" and (wrong := y[(y < 0) | (y >= C)]).size:
        raise Error(f"label {wrong[0]} is outside the {C} classes of the logits.")
    s, _ = nn.sigmoid_forward(z)
    true = (xp.arange(C)[None, :] == y[:, None]).astype(z.dtype)
    layers, slopes, others = list(phi.values()), [], 1 - true
    hs = [xp.concatenate([_pairs(s, true), _column(others), _column(0 * others)], axis=1)]
    for W in layers[:-1]:
        a = hs[-1] @ W.T
        slopes.append(xp.where(a > 0, xp.ones_like(a), SLOPE))
        hs.append(slopes[-1] * a)
    return (hs[-1] @ layers[-1].T).mean(), (phi, s, true, hs, slopes)


def pair_loss_backward(dloss, cache):
    """dloss (a number) -> dz (B, C), dφ"""
    phi, s, true, hs, slopes = cache
    dh, deltas = _adjoints(phi, hs, slopes, dloss)
    dphi = {n: d.T @ h for n, d, h in zip(phi, deltas, hs, strict=True)}
    return _pairs_backward(dh, true) * s * (1 - s), dphi


def pair_loss_tangent(dz, cache):
    """dz (B, C), a direction of the logits -> the derivatives of ∂l/∂z (B, C) and ∂l/∂φ along it.

    From ∂²f/∂a² = 0: the adjoints of (4) do not move, its hidden layers do.
    """
    phi, s, true, hs, slopes = cache
    xp, ds = array_module(dz), s * (1 - s) * dz
    pairs = _pairs(ds, true)
    tangents = [xp.concatenate([pairs, xp.zeros_like(pairs)], axis=1)]
    for W, slope in zip(list(phi.values())[:-1], slopes, strict=True):
        tangents.append(slope * (tangents[-1] @ W.T))
    dh, deltas = _adjoints(phi, hs, slopes, 1.0)
    of_phi = {n: d.T @ h for n, d, h in zip(phi, deltas, tangents, strict=True)}
    return _pairs_backward(dh, true) * (1 - 2 * s) * ds, of_phi


def _pairs(s, true):
    """s (B, C) -> (B C, 2): [s_by, s_bj] where j ≠ y, else 0"""
    of_true = (s * true).sum(axis=1, keepdims=True)
    xp, others = array_module(s), 1 - true
    return xp.concatenate([_column(of_true * others), _column(s * others)], axis=1)


def _pairs_backward(da, true):
    """da (B C, 2 or more) -> ds (B, C)"""
    others = 1 - true
    of_true, of_class = (da[:, i].reshape(true.shape) * others for i in (0, 1))
    return of_class + true * of_true.sum(axis=1, keepdims=True)


def _column(x):
    return x.reshape(-1, 1)


def _adjoints(phi, hs, slopes, dloss):
    """∂l/∂a (B C, 4), and ∂l of what each layer gives before its activation"""
    xp, layers, rows = array_module(hs[0]), list(phi.values()), len(hs[0])
    deltas = [xp.full((rows, 1), 1 / rows, dtype=hs[0].dtype) * dloss]
    for W, slope in zip(layers[:0:-1], slopes[::-1], strict=True):
        deltas.append(slope * (deltas[-1] @ W))
    return deltas[-1] @ layers[0], deltas[::-1]


# The linear student


def student_gradients(theta, phi, x, y):
    """x (B, F), y (B,) -> l, ∂l/∂θ, ∂l/∂φ"""
    loss, cache = pair_loss_forward(phi, x @ theta["W"], y)
    dz, dphi = pair_loss_backward(1.0, cache)
    return loss, {"W": x.T @ dz}, dphi


def student_products(theta, phi, x, y, v):
    """v like θ -> H v, C v, exact"""
    _, cache = pair_loss_forward(phi, x @ theta["W"], y)
    dz, of_phi = pair_loss_tangent(x @ v["W"], cache)
    return {"W": x.T @ dz}, of_phi


def cross_entropy_gradient(theta, x, y):
    """x (B, F), y (B,) -> mean cross-entropy of softmax(x W), its gradient in θ"""
    loss, cache = nn.softmax_cross_entropy_forward(x @ theta["W"], y)
    return loss, {"W": x.T @ nn.softmax_cross_entropy_backward(1.0, cache)}


def cross_entropy_product(theta, x, y, v):
    """v like θ -> H v of the mean cross-entropy, exact.   From ∂p = p (∂z - <p, ∂z>)"""
    z, dz = x @ theta["W"], x @ v["W"]
    xp = array_module(z)
    p = xp.exp(z - z.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    dp = p * (dz - (p * dz).sum(axis=1, keepdims=True))
    return {"W": x.T @ (dp / len(x))}


def episode(phi, theta, batches, held_out, optimiser, start=False):
    """(1), (5).   batches (xs (K, B, F), ys (K, B)), held_out (x, y) -> E, G, θ_K, dE/dθ_0 (None
    unless start).   Error: no batch, labels that are no classes"""
    xs, ys = batches

    def gradient(k, theta):
        return student_gradients(theta, phi, xs[k], ys[k])[1]

    def products(k, theta, v):
        return student_products(theta, phi, xs[k], ys[k], v)

    theta, _, tape = hvp.unroll(theta, len(xs), gradient, optimiser)
    loss, v = cross_entropy_gradient(theta, *held_out)
    G, dstart = hvp.hypergradient(v, tape, *hvp.callbacks(products), start)
    return loss, G, theta, dstart


# The teacher


def teacher_init(cfg, rng, dtype="float32"):
    """ψ, uniform between -1/√H and 1/√H"""
    last = cfg.hidden if cfg.head == "linear" else 1
    widths, psi = [2, *[cfg.hidden] * (cfg.cells - 1), last], {}

    def add(name, shape, H):
        psi[name] = (rng.uniform(-1, 1, shape) / math.sqrt(H)).astype(dtype)

    for i, (I, H) in enumerate(zip(widths, widths[1:], strict=False)):
        for name, shape in (("W", (4 * H, I)), ("U", (4 * H, H)), ("b", 4 * H), ("c", 4 * H)):
            add(f"{i}.{name}", shape, H)
    if cfg.head == "linear":
        add("head.W", (1, last), last)
        add("head.b", 1, last)
    return psi


def teacher_state(psi, coordinates):
    """The LSTM's state before the first round: for each cell zeros (2, coordinates, H)"""
    Us = [p for name, p in psi.items() if name.endswith(".U")]
    return [array_module(U).zeros((2, coordinates, U.shape[1]), dtype=U.dtype) for U in Us]


def preprocess(g, p=P):
    """(6).   g (P,) -> (P, 2)"""
    xp, size = array_module(g), abs(g)
    large = size >= math.exp(-p)
    first = xp.where(large, xp.log(size + 1e-8) / p, -xp.ones_like(g))
    return xp.stack([first, xp.where(large, xp.sign(g), math.exp(p) * g)], axis=1)


def teacher_forward(psi, g, state, p=P):
    """(6), (7), with the head that ψ has.   g (P,) -> u (P,), state', cache"""
    x, after, caches, head = preprocess(g, p), [], [], None
    for i, before in enumerate(state):
        cell = (psi[f"{i}.{name}"] for name in "WUbc")
        now, cache = nn.lstm_cell_forward(x, before, *cell)
        x = now[0]
        after.append(now)
        caches.append(cache)
    if "head.W" in psi:
        x, head = nn.linear_forward(x, psi["head.W"], psi["head.b"])
    return x[:, 0], after, (caches, head)


def teacher_backward(du, dstate, cache):
    """du (P,), dstate of the state after (None: nothing used it) -> grads, dstate"""
    caches, head = cache
    xp, grads, before = array_module(du), {}, []
    dx = du[:, None]
    if head is not None:
        dx, grads["head.W"], grads["head.b"] = nn.linear_backward(dx, head)
    for i in reversed(range(len(caches))):
        dnow = xp.stack([dx, xp.zeros_like(dx)])
        dnow = dnow if dstate is None else dnow + dstate[i]
        dx, earlier, *of_cell = nn.lstm_cell_backward(dnow, caches[i])
        grads |= {f"{i}.{name}": d for name, d in zip("WUbc", of_cell, strict=True)}
        before.append(earlier)
    return grads, before[::-1]


# A round


def flatten(phi):
    """φ -> (P,), in the order of the dict, each array row by row"""
    arrays = list(phi.values())
    return array_module(arrays[0]).concatenate([p.reshape(-1) for p in arrays])


def moved(phi, u, scale):
    """(8).   φ - scale u, u (P,)"""
    after, at = {}, 0
    for name, p in phi.items():
        after[name] = p - scale * u[at : at + p.size].reshape(p.shape)
        at += p.size
    return after


@dataclass(frozen=True)
class Round:
    """What came of one round."""

    first: tuple  # E, G and whatever else the roll-out under φ gave
    second: tuple  # the same under φ'; its θ_K is the one that the published code goes on from
    phi: dict  # φ'
    u: object  # (P,)
    state: object  # the teacher's, after
    grads: object  # dE(φ')/dψ


def teach(phi, roll_out, teacher, scale):
    """(5) to (9).   -> Round

    roll_out(φ) -> E, G, ...: the same batches, dropout and θ_0 each time;
    teacher(g (P,)) -> u (P,), state, backward(du (P,)) -> gradients of ψ.
    """
    first = roll_out(phi)
    u, state, backward = teacher(flatten(first[1]))
    after = moved(phi, u, scale)
    second = roll_out(after)
    return Round(first, second, after, u, state, backward(-scale * flatten(second[1])))


def lstm_teacher(psi, state, p=P):
    """The teacher of `teach` that is the LSTM, from a state that is taken as a constant"""

    def teacher(g):
        u, after, cache = teacher_forward(psi, g, state, p)
        return u, after, lambda du: teacher_backward(du, None, cache)[0]

    return teacher


def identity_teacher(g):
    """u = G: plain SGD on φ at the rate `scale`"""
    return g, None, lambda du: {}


# Cases

PARTS = {"W": "weight_ih", "U": "weight_hh", "b": "bias_ih", "c": "bias_hh"}


def published_names(cfg):
    """Our name -> the published one: of φ, then of ψ"""
    mats = [*(f"mat_{i}" for i in range(cfg.dln_layers)), "final_mat"]
    cells = ["recurs", *(f"recurs{i + 1}" for i in range(1, cfg.cells))]
    phi = {name: f"dln.layers.{name}.weight" for name in mats}
    psi = {f"{i}.{n}": f"lstm.{cells[i]}.{p}" for i in range(cfg.cells) for n, p in PARTS.items()}
    return phi, psi


SIZES = {  # setting -> the tensor and the axis that say it
    "n_classes": ("in.W0", -1),
    "K": ("in.xs", 0),
    "dln_hidden": ("param.dln.layers.mat_0.weight", 0),
    "hidden": ("param.lstm.recurs.weight_hh", -1),
}


def config_of(settings, tensors):
    """The Config of a case, sizes from its tensors.   Error: they are not what the settings say"""
    own, published = dict(settings), [name for name in tensors if name.startswith("param.")]
    for name, mark in (("dln_layers", ".mat_"), ("cells", ".weight_hh")):
        if count := sum(mark in tensor for tensor in published):
            own[name] = count
    for name, (tensor, axis) in SIZES.items():
        one_cell = name == "hidden" and own.get("cells") == 1
        if tensor not in tensors or tensors[tensor].ndim == 0 or one_cell:
            continue
        size = tensors[tensor].shape[axis]
        if own.setdefault(name, size) != size:
            raise Error(f"{name}={own[name]}, but {tensor} has {size}.")
    cfg = Config(**own)
    if cfg.head != "cell":
        raise Error(f"head={cfg.head!r}: cases have the published head, cell.")
    return cfg


def case_sources(cfg, B, L, rng):
    """A random case's in.*, batches of B samples with L features, and param.*"""

    def labels(*shape):
        return rng.integers(0, cfg.n_classes, shape)

    phi, psi = published_names(cfg)
    params = dln_init(cfg, rng, "float64") | teacher_init(cfg, rng, "float64")
    return {
        "in.W0": 0.3 * rng.standard_normal((L, cfg.n_classes)),
        "in.xs": rng.standard_normal((cfg.K, B, L)),
        "in.ys": labels(cfg.K, B),
        "in.xv": rng.standard_normal((B, L)),
        "in.yv": labels(B),
    } | {f"param.{name}": params[own] for own, name in (phi | psi).items()}


def case_results(cfg, params, inputs):
    """One round from zero states: of φ the gradient of E(φ), of ψ that of E(φ')"""
    _check_case(cfg, inputs)
    of_phi, of_psi = published_names(cfg)
    phi, psi = ({o: params[name] for o, name in names.items()} for names in (of_phi, of_psi))
    theta, optimiser = {"W": inputs["W0"]}, hvp.Optimiser("sgd", optim.Group(cfg.lr))
    batches, held_out = (inputs["xs"], inputs["ys"]), (inputs["xv"], inputs["yv"])
    state = teacher_state(psi, sum(p.size for p in phi.values()))
    done = teach(
        phi,
        lambda phi: episode(phi, theta, batches, held_out, optimiser),
        lstm_teacher(psi, state, cfg.p),
        cfg.update_scale,
    )
    (E, G, after, _), (E2, *_), (h, c) = done.first, done.second, done.state[-1]
    results = {"val_loss": E, "val_loss_after": E2}
    results = {f"out.{name}": loss.reshape(1) for name, loss in results.items()}
    results |= {"out.WK": after["W"], "out.h3": h, "out.c3": c, "out.update": done.u[:, None]}
    for own, name in of_phi.items():
        short = name.removeprefix("dln.")
        results |= {f"out.dln_updated.{short}": done.phi[own], f"grad.param.{name}": G[own]}
    return results | {f"grad.param.{name}": done.grads[own] for own, name in of_psi.items()}


def _check_case(cfg, inputs):
    """Error: inputs whose shapes do not go together"""
    F, B = len(inputs["W0"]), inputs["yv"].shape
    expected = {"W0": (F, cfg.n_classes), "xs": (*inputs["ys"].shape, F), "xv": (*B, F)}
    for name, shape in expected.items():
        if inputs[name].shape != shape or len(shape) != inputs[name].ndim or 0 in shape:
            raise Error(f"in.{name} has the shape {inputs[name].shape}; expected {shape}.")
    if inputs["ys"].ndim != 2 or len(B) != 1 or len(inputs["ys"]) != cfg.K:
        raise Error(f"in.ys has the shape {inputs['ys'].shape}, in.yv {B}; expected (K, B), (B,).")
