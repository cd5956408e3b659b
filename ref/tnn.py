"""TNN, the Toeplitz neural network.  Qin et al.: Toeplitz Neural Network for Sequence Modeling,
ICLR 2023, arXiv 2305.04749.

Positions are mixed by a Toeplitz matrix for every channel. Its coefficients are no parameters: a
small MLP of the relative position, the RPE, makes them, for as many positions as there are:

    y_i = Σ_j t_{i-j} x_j                                       the operator, Tno                (1)
    h = p_k W_pᵀ + b_p,  p_k = k, k/(L-1) or exp(k/(L-1))       position types 1, 2, 3           (2)
    h <- act(norm(h)) W_rᵀ + b_r  [+ h with residual]           for each of the n layers         (3)
    t_k = f(γ^|k| r_k),  r_k = act(norm(h)) W_tᵀ + b_t          decay, then the activation f     (4)
    γ = λ + (1 - λ) sigmoid(g)                                  a learned decay                  (5)
    o = (silu(x W_uᵀ + b_u) Tno(silu(x W_vᵀ + b_v))) W_oᵀ + b_o the gated Toeplitz unit, GTU    (6)
    o = (silu(x W_1ᵀ + b_1) (x W_2ᵀ + b_2)) W_3ᵀ + b_3          the GLU                          (7)
    x <- x + GTU(norm(x)),  x <- x + GLU(norm(x))               the block; [x + norm(GTU(x))]    (8)
    ∂t_k/∂γ = |k| γ^|k| r_k f' / γ                                                               (9)

norm(x) = x / (|x|/sqrt(D) + 1e-8). Causal: t_k = 0 for k < 0.

    parameter  shape           B batch, L length, D channels, E = expand_ratio D cut to a multiple
    W_p, b_p   (r, 1), (r,)    of the heads, r = rpe_dim, n = rpe_layers, G = glu_dim
    W_r, b_r   (n, r, r), (n, r)   (none if n = 0)
    W_t, b_t   (E, r), (E,)
    gamma      (E,)            use_decay: γ itself, not trained; use_multi_decay: g, and λ is
    W_u, b_u   (E, D), (E,)    cfg.gamma; W_v, b_v the same
    W_o, b_o   (D, E), (D,)
    W_1, b_1   (G, D), (G,)    W_2, b_2 the same
    W_3, b_3   (D, G), (D,)

The operator is (1) to (5), E wide; the mixer is (6), the block (8). Every channel has coefficients
of its own, so that several heads change nothing but E and the shape in which gamma is published.

The forward takes any length: longer than in training, type 1 goes on to further positions, types 2
and 3 divide by another L. l_max is for decoding alone: the number of positions that the recurrent
form is made for. With types 2 and 3 it reproduces the forward of exactly that length.

(2) to (5) are in float64 whatever the precision. In float32, at L = 10⁴, coefficients would be off
by 6e-7 and gradients by 6e-6, with a learned decay by 3e-5 and 1.5e-4.

Differences from the published code (tnn-pytorch, of GitHub: under this name PyPI has no code):
- It fails for L = 1, and for type 3 in both directions; here that is t_0 alone, and exp(k/(L-1))
  for k < 0 too. Its positions of types 2 and 3 are rounded to torch's default dtype.
- With both decays at once it takes g for γ itself; here one of the two is asked for.
- Its layer passes on neither a learned decay nor residual, position type and activation; here the
  block has what its operator has. Dropout, on both branches of (8), is ours.
- Its other norms, gates and layers without bias are not here.
"""

import math
from dataclasses import dataclass

from ref import Error, block, etsc, nn, ssm
from ref.backend import array_module, check_activations, check_choice

RPE_ACTIVATIONS = ("relu", "silu", "gelu", "none")
HOMOGENEOUS = ("none", "relu", "leak")  # f(c t) = c f(t) for c > 0
ELU = {"elu": 0.0, "1+elu": 1.0, "2+elu": 2.0}
ACTIVATIONS = (*HOMOGENEOUS, "silu", "gelu", "sigmoid", "exp", *ELU)
LEAK = 0.01  # slope of leak below 0
TINY = 1e-300  # the least γ that is seen: 0 has no logarithm
HANKEL_SIZE = 256  # coefficients in a Hankel matrix, at most
CONVERTED = True  # state without systems converts the coefficients


@dataclass(frozen=True)
class Config:
    """TNN's layer."""

    d_model: int = 128
    expand_ratio: float = 3.0  # E / D of the GTU
    num_heads: int = 1
    glu_dim: int = 0  # G; 0: d_model, as the published README recommends
    bidirectional: bool = False
    use_decay: bool = False
    use_multi_decay: bool = False
    gamma: float = 0.999  # γ of use_decay, λ of use_multi_decay
    rpe_dim: int = 0  # r; 0: d_model / 8, at least 32, as the published README recommends
    rpe_layers: int = 3
    rpe_act: str = "relu"  # relu, silu, gelu, none
    residual: bool = False  # around the layers of the RPE
    par_type: int = 1  # position type
    act_type: str = "none"  # f: none, relu, leak, silu, gelu, sigmoid, exp, elu, 1+elu, 2+elu
    l_max: int = 0  # positions that decoding is made for; 0: the length of the data
    prenorm: bool = True
    dropout: float = 0.0

    norm = "simple"

    def __post_init__(self):
        check_choice("rpe_act", self.rpe_act, RPE_ACTIVATIONS)
        check_choice("act_type", self.act_type, ACTIVATIONS)
        if self.par_type not in (1, 2, 3):
            raise Error(f"par_type={self.par_type}: expected 1 (k), 2 (k/L) or 3 (exp(k/L)).")
        if self.use_decay and self.use_multi_decay:
            raise Error("use_decay is a fixed decay, use_multi_decay a learned one: give one.")
        if not (0 < self.gamma <= 1 or (self.use_multi_decay and self.gamma == 0)):
            raise Error(f"gamma={self.gamma}: expected more than 0 and at most 1.")
        if min(self.glu_dim, self.rpe_dim, self.rpe_layers, self.l_max) < 0:
            raise Error(
                f"glu_dim={self.glu_dim}, rpe_dim={self.rpe_dim}, rpe_layers={self.rpe_layers}, "
                f"l_max={self.l_max}: expected 0 or more."
            )
        counted = min(self.d_model, self.num_heads) >= 1 and 0 < self.expand_ratio < math.inf
        if not (counted and self.width >= 1):
            raise Error(
                f"d_model={self.d_model}, expand_ratio={self.expand_ratio}, "
                f"num_heads={self.num_heads}: expected a channel for every head, and no less."
            )
        if not 0 <= self.dropout < 1:
            raise Error(f"dropout={self.dropout}: expected 0 <= dropout < 1.")

    @property
    def causal(self):
        """Whether outputs depend on no later input: what language modelling needs, and `step`."""
        return not self.bidirectional

    @property
    def width(self):
        """E"""
        return int(self.expand_ratio * self.d_model) // self.num_heads * self.num_heads


EMBEDDING_DEVIATION = 0.02  # of a network's, when it is made


def operator_width(cfg):
    """Channels of the operator's input: E"""
    return cfg.width


def groups(cfg):
    """Parameters with a learning rate of their own: a fixed decay has none"""
    return dict.fromkeys(buffers(cfg), "frozen")


def buffers(cfg):
    """Parameters that have no gradient"""
    return ("gamma",) if cfg.use_decay else ()


def _init(cfg, part, rng, dtype):
    """Every linear layer as PyTorch's, weight and bias uniform in ±1/sqrt(inputs); g normal"""
    D, E, G, r = cfg.d_model, cfg.width, cfg.glu_dim or cfg.d_model, cfg.rpe_dim
    r = r or max(D // 8, 32)
    weights, params = {"W_p": (r, 1), "W_r": (cfg.rpe_layers, r, r), "W_t": (E, r)}, {}
    if part != "operator":
        weights = {"W_u": (E, D), "W_v": (E, D), "W_o": (D, E)} | weights
    if part == "block":
        weights |= {"W_1": (G, D), "W_2": (G, D), "W_3": (D, G)}
    for name, shape in weights.items():
        if 0 not in shape:
            bound = 1 / math.sqrt(shape[-1])
            params[name] = rng.uniform(-bound, bound, shape)
            params["b" + name[1:]] = rng.uniform(-bound, bound, shape[:-1])
    if cfg.use_multi_decay:
        params["gamma"] = rng.standard_normal(E)
    elif cfg.use_decay:
        params["gamma"] = rng.uniform(cfg.gamma, cfg.gamma, E)
    return {name: p.astype(dtype) for name, p in params.items()}


# Coefficients


def activation_forward(x, kind):
    """f(x) or act(x), by its published name.   elu(x) = x, or exp(x) - 1 where x < 0"""
    xp = array_module(x)
    if kind == "none":
        return x, (kind, None)
    if kind == "exp":
        y = xp.exp(x)
        return y, (kind, y)
    if kind == "leak":
        slope = LEAK + (1 - LEAK) * (x > 0).astype(x.dtype)
        return slope * x, (kind, slope)
    if kind in ELU:
        low = xp.minimum(x, 0)
        return xp.maximum(x, 0) + xp.expm1(low) + ELU[kind], (kind, xp.exp(low))
    y, cache = getattr(nn, f"{kind}_forward")(x)
    return y, (kind, cache)


def activation_backward(dy, cache):
    """dy -> dx"""
    kind, cache = cache
    if kind == "none":
        return dy
    if kind in ("exp", "leak", *ELU):
        return dy * cache  # the slope itself
    return getattr(nn, f"{kind}_backward")(dy, cache)


def positions(lags, L, cfg):
    """p_k of (2).   lags (n,) -> p (n,)"""
    if cfg.par_type == 1:
        return lags
    p = lags / max(1, L - 1)  # of L = 1 there is k = 0 alone
    return p if cfg.par_type == 2 else array_module(p).exp(p)


def rpe_forward(params, p, cfg):
    """(2), (3) and r of (4).   p (n,) -> r (n, E)"""
    h, first = nn.linear_forward(p[:, None], params["W_p"], params["b_p"])
    layers = []
    for W, b in zip(params.get("W_r", ()), params.get("b_r", ()), strict=True):
        a, layer = _layer_forward(h, W, b, cfg)
        h = h + a if cfg.residual else a
        layers.append(layer)
    r, last = _layer_forward(h, params["W_t"], params["b_t"], cfg)
    return r, (cfg, first, layers, last)


def rpe_backward(dr, cache):
    """dr (n, E) -> grads"""
    cfg, first, layers, last = cache
    grads, weights, biases = {}, [], []
    dh, grads["W_t"], grads["b_t"] = _layer_backward(dr, last)
    for layer in reversed(layers):
        da, dW, db = _layer_backward(dh, layer)
        dh = dh + da if cfg.residual else da
        weights.insert(0, dW)
        biases.insert(0, db)
    if layers:
        xp = array_module(dr)
        grads |= {"W_r": xp.stack(weights), "b_r": xp.stack(biases)}
    _, grads["W_p"], grads["b_p"] = nn.linear_backward(dh, first)
    return grads


def _layer_forward(h, W, b, cfg):
    """norm -> act -> linear.   h (n, r), W (o, r) -> (n, o)"""
    a, norm = nn.simple_rms_norm_forward(h)
    a, act = activation_forward(a, cfg.rpe_act)
    a, linear = nn.linear_forward(a, W, b)
    return a, (norm, act, linear)


def _layer_backward(da, cache):
    """da (n, o) -> dh, dW, db"""
    norm, act, linear = cache
    da, dW, db = nn.linear_backward(da, linear)
    return nn.simple_rms_norm_backward(activation_backward(da, act), norm), dW, db


def decay_rate(gamma, cfg):
    """γ, by (5) if it is learned.   gamma (E,) -> (E,)"""
    return cfg.gamma + (1 - cfg.gamma) * nn.sigmoid(gamma) if cfg.use_multi_decay else gamma


def decay_forward(r, gamma, lags, cfg):
    """γ^|k| r_k.   r (n, E), gamma (E,), lags (n,) -> (n, E)"""
    xp, rate = array_module(r), decay_rate(gamma, cfg)
    rate = xp.maximum(rate, TINY)
    powers = xp.exp(xp.abs(lags)[:, None] * xp.log(rate))
    y = powers * r
    return y, (cfg, gamma, rate, powers, y, lags)


def decay_backward(dy, cache):
    """dy (n, E) -> dr, dgamma (of a fixed decay None).   (9)"""
    cfg, gamma, rate, powers, y, lags = cache
    if not cfg.use_multi_decay:
        return dy * powers, None
    s, xp = nn.sigmoid(gamma), array_module(dy)
    drate = (xp.abs(lags)[:, None] * y * dy).sum(axis=0) / rate
    return dy * powers, drate * (1 - cfg.gamma) * s * (1 - s)


def coefficients_forward(params, L, cfg):
    """(2) to (5) for L positions.   -> t (E, L), or of both directions (E, 2L-1), t_0 at L-1"""
    xp, dtype = array_module(params["W_t"]), params["W_t"].dtype
    params = {name: params[name].astype("float64") for name in _OPERATOR if name in params}
    lags = xp.arange(0 if cfg.causal else 1 - L, L, dtype="float64")
    t, rpe = rpe_forward(params, positions(lags, L, cfg), cfg)
    decay = None
    if "gamma" in params:
        t, decay = decay_forward(t, params["gamma"], lags, cfg)
    t, act = activation_forward(t, cfg.act_type)
    return xp.ascontiguousarray(t.T).astype(dtype), (rpe, decay, act)


def coefficients_backward(dt, cache):
    """dt like t -> grads of the operator's trained parameters"""
    rpe, decay, act = cache
    dr, dgamma = activation_backward(dt.T.astype("float64"), act), None
    if decay:
        dr, dgamma = decay_backward(dr, decay)
    grads = rpe_backward(dr, rpe) | ({} if dgamma is None else {"gamma": dgamma})
    return {name: g.astype(dt.dtype) for name, g in grads.items()}


# Operator, mixer, block


def operator_init(cfg, rng, dtype="float32"):
    """RPE and decay"""
    return _init(cfg, "operator", rng, dtype)


def operator_forward(params, x, cfg):
    """(1).   x (B, L, E) -> y (B, L, E)"""
    check_activations(x, cfg.width)
    t, made = coefficients_forward(params, x.shape[1], cfg)
    y, conv = nn.fft_conv_forward(x, t, "causal" if cfg.causal else "two-sided")
    return y, (made, conv)


def operator_backward(dy, cache):
    """dy (B, L, E) -> dx, grads"""
    made, conv = cache
    dx, dt = nn.fft_conv_backward(dy, conv)
    return dx, coefficients_backward(dt, made)


def mixer_init(cfg, rng, dtype="float32"):
    """Operator and projections of the GTU"""
    return _init(cfg, "mixer", rng, dtype)


def mixer_forward(params, x, cfg, rng=None):
    """(6): dropout is the block's.   x (B, L, D) -> y (B, L, D)"""
    check_activations(x, cfg.d_model)
    return gtu_forward(params, x, cfg, lambda v: operator_forward(params, v, cfg))


def gtu_forward(params, x, cfg, operator):
    """(6).   x (..., D), operator: v (..., E) -> its output and cache -> y (..., D)"""
    u, linear_u = nn.linear_forward(x, params["W_u"], params["b_u"])
    v, linear_v = nn.linear_forward(x, params["W_v"], params["b_v"])
    v, silu = nn.silu_forward(v)
    v, mixed = operator(v)
    y, gate = nn.gate_forward(v, u)
    y, out = nn.linear_forward(y, params["W_o"], params["b_o"])
    return y, (linear_u, linear_v, silu, mixed, gate, out)


def mixer_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    linear_u, linear_v, silu, mixed, gate, out = cache
    dy, dW_o, db_o = nn.linear_backward(dy, out)
    dv, du = nn.gate_backward(dy, gate)
    dv, grads = operator_backward(dv, mixed)
    dv, dW_v, db_v = nn.linear_backward(nn.silu_backward(dv, silu), linear_v)
    du, dW_u, db_u = nn.linear_backward(du, linear_u)
    grads |= {"W_u": dW_u, "b_u": db_u, "W_v": dW_v, "b_v": db_v, "W_o": dW_o, "b_o": db_o}
    return du + dv, grads


def glu_forward(params, x):
    """(7).   x (..., D) -> y (..., D)"""
    z, linear_1 = nn.linear_forward(x, params["W_1"], params["b_1"])
    y, linear_2 = nn.linear_forward(x, params["W_2"], params["b_2"])
    y, gate = nn.gate_forward(y, z)
    y, out = nn.linear_forward(y, params["W_3"], params["b_3"])
    return y, (linear_1, linear_2, gate, out)


def glu_backward(dy, cache):
    """dy (..., D) -> dx, grads"""
    linear_1, linear_2, gate, out = cache
    dy, dW_3, db_3 = nn.linear_backward(dy, out)
    dy, dz = nn.gate_backward(dy, gate)
    dx, dW_2, db_2 = nn.linear_backward(dy, linear_2)
    dz, dW_1, db_1 = nn.linear_backward(dz, linear_1)
    grads = {"W_1": dW_1, "b_1": db_1, "W_2": dW_2, "b_2": db_2, "W_3": dW_3, "b_3": db_3}
    return dx + dz, grads


def block_init(cfg, rng, dtype="float32"):
    """GTU and GLU"""
    return _init(cfg, "block", rng, dtype)


def block_forward(params, x, cfg, rng=None):
    """(8).   x (B, L, D) -> y (B, L, D)"""
    check_activations(x, cfg.d_model)
    return branches_forward(params, x, cfg, lambda v: operator_forward(params, v, cfg), rng)


def branches_forward(params, x, cfg, operator, rng=None):
    """(8) around an operator, as of gtu_forward.   x (..., D) -> y (..., D)"""
    x, mix = _branch_forward(x, cfg, lambda z: gtu_forward(params, z, cfg, operator), rng)
    y, glu = _branch_forward(x, cfg, lambda z: glu_forward(params, z), rng)
    return y, (mix, glu)


def block_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    mix, glu = cache
    dx, grads = _branch_backward(dy, glu, glu_backward)
    dx, mixer_grads = _branch_backward(dx, mix, mixer_backward)
    return dx, mixer_grads | grads


def _branch_forward(x, cfg, f, rng):
    """x (..., D) -> x + dropout(f(norm(x))); without prenorm x + dropout(norm(f(x)))"""
    z, norm = nn.simple_rms_norm_forward(x) if cfg.prenorm else (x, None)
    z, inner = f(z)
    if not cfg.prenorm:
        z, norm = nn.simple_rms_norm_forward(z)
    z, drop = nn.dropout_forward(z, cfg.dropout, rng)
    return x + z, (cfg.prenorm, norm, inner, drop)


def _branch_backward(dy, cache, f_backward):
    """dy (..., D) -> dx, grads"""
    prenorm, norm, inner, drop = cache
    dz = nn.dropout_backward(dy, drop)
    if not prenorm:
        dz = nn.simple_rms_norm_backward(dz, norm)
    dz, grads = f_backward(dz, inner)
    if prenorm:
        dz = nn.simple_rms_norm_backward(dz, norm)
    return dy + dz, grads


def running_statistics(params, cache):
    """Running moments after a training batch: the simple norm has none"""
    return {}


# Recurrent form


def coefficients(params, cfg, L):
    """What etsc.to_ssm takes: t (1, E, L) and γ (E,) float64, the kernel being γ^k t_k; where there
    is no decay, or f does not commute with it, the kernel itself and None.

    Error: the map is not causal
    """
    if "gamma" not in params or cfg.act_type not in HOMOGENEOUS:
        return kernels(params, cfg, L), None
    rest = {name: p for name, p in params.items() if name != "gamma"}
    return kernels(rest, cfg, L), decay_rate(params["gamma"].astype("float64"), cfg)


def kernels(params, cfg, L):
    """The block's long filter t, causal, for L positions.   -> k (1, E, L)   Error: it is not"""
    if not cfg.causal:
        raise Error("bidirectional=True sees all of a sequence: it has no recurrent step.")
    return coefficients_forward(params, L, cfg)[0][None]


def state(params, cfg, batch, systems=None):
    """The block's state before the first position, that of `systems` (ref.etsc) or of the exact
    conversion for l_max positions.   Error: the map is not causal; l_max=0 without systems"""
    if systems is None:
        if cfg.causal and not cfg.l_max:
            raise Error("decoding needs l_max, the number of positions that it is made for.")
        t, gamma = coefficients(params, cfg, cfg.l_max)
        systems = [etsc.to_ssm(t[0], gamma)]
    return block.converted_state(systems, batch)


def operator_step(params, x_t, state, cfg):
    """One position of (1).   x_t (B, E) -> y_t (B, E), state   Error: beyond the horizon"""
    y, after = etsc.step(state["systems"][0], x_t, state["long"][0])
    return y, state | {"long": [after]}


def mixer_step(params, x_t, state, cfg):
    """One position of the mixer.   x_t (B, D) -> y_t (B, D), state"""
    return _carried(gtu_forward, params, x_t, operator_step, state, cfg)


def step(params, x_t, state, cfg):
    """One position of the block.   x_t (B, D) -> y_t (B, D), state"""
    return _carried(branches_forward, params, x_t, operator_step, state, cfg)


def prefill(params, x, cfg, state):
    """The block's forward over x (B, L, D), from a fresh state -> y (B, L, D), state after it

    Position types 2 and 3 divide by the state's horizon, as they do in its steps.
    """
    check_activations(x, cfg.d_model)
    return _carried(branches_forward, params, x, _operator_prefill, state, cfg)


def _operator_prefill(params, x, state, cfg):
    """x (B, L, E), a fresh state -> y (B, L, E), state"""
    system = state["systems"][0]
    after = etsc.prefill(system, x, state["long"][0])
    t, _ = coefficients_forward(params, x.shape[1] if cfg.par_type == 1 else system.horizon, cfg)
    return nn.fft_conv_forward(x, t)[0], state | {"long": [after]}


def _carried(forward, params, x, operator, state, cfg):
    """forward around an operator that takes a state and returns the next one.   -> y, state"""

    def inner(v):
        nonlocal state
        y, state = operator(params, v, state, cfg)
        return y, None

    y, _ = forward(params, x, cfg, inner)
    return y, state


# Looking at it


def impulse_response(params, cfg, L):
    """The operator's answer to an impulse at position 0 of L.   -> t (E, L)"""
    return coefficients_forward(params, L, cfg)[0][:, -L:]


def matrix(params, cfg, x=None, L=None):
    """(1) as a matrix, y_t = Σ_s M[t, s] x_s, for L or x's length.   -> M (1, E, L, L)"""
    L = ssm.length_of(x, L)
    t, first = coefficients_forward(params, L, cfg)[0], 0 if cfg.causal else L - 1
    xp = array_module(t)
    lag = xp.arange(L)[:, None] - xp.arange(L)[None, :] + first
    return xp.where(lag >= 0, t[:, xp.maximum(lag, 0)], 0)[None]


def hankel_values(params, cfg):
    """Singular values of each channel's Hankel matrix, t_{1+i+j} of the first l_max coefficients or
    HANKEL_SIZE if that is less, 0 beyond; then of t_{-1-i-j}.   -> (E or 2E, n), descending"""
    n = min(cfg.l_max or HANKEL_SIZE, HANKEL_SIZE)
    t = coefficients_forward(params, n, cfg)[0]
    sides = [t] if cfg.causal else [t[:, n - 1 :], t[:, :n][:, ::-1]]
    return array_module(t).concatenate([ssm.finite_hankel_values(side) for side in sides])


# Names of the published code; of a whole language model there are none, those are ours

_OPERATOR = {
    "W_p": "rpe.pos_proj.weight",
    "b_p": "rpe.pos_proj.bias",
    "W_r": "rpe.layers.{i}.2.weight",  # one for each layer of the RPE
    "b_r": "rpe.layers.{i}.2.bias",
    "W_t": "rpe.out.2.weight",
    "b_t": "rpe.out.2.bias",
    "gamma": "gamma",  # (heads, 1, E / heads)
}
_MIXER = block.within("toep.", _OPERATOR) | {
    f"{ours}_{name}": f"{theirs}.{kind}"
    for name, theirs in (("u", "u_proj"), ("v", "v_proj"), ("o", "o"))
    for ours, kind in (("W", "weight"), ("b", "bias"))
}
_GLU = {f"W_{i}": f"l{i}.weight" for i in (1, 2, 3)} | {f"b_{i}": f"l{i}.bias" for i in (1, 2, 3)}
PUBLISHED = {
    "operator": _OPERATOR,
    "mixer": _MIXER,
    "block": block.within("token_mixer.", _MIXER) | block.within("feature_mixer.", _GLU),
}
PUBLISHED_LAYER = {"": "layers.{i}."}  # a block within a network
PUBLISHED_NETWORK = {"encoder.weight": "embed_tokens.weight", "decoder.weight": "lm_head.weight"}
PUBLISHED_SETTINGS = dict.fromkeys(("norm", "norm_type"), ("simplermsnorm", "simple"))
PUBLISHED_SETTINGS |= dict.fromkeys(("gtu_act", "glu_act", "act_fun"), ("silu",))
PUBLISHED_SETTINGS |= dict.fromkeys(("causal", "act", "h", "dim", "layers", "rpe_embedding"))


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params"""
    params, xp = {}, array_module(next(iter(tensors.values())))
    for ours, theirs in PUBLISHED[part].items():
        names = [theirs.format(i=i) for i in range(cfg.rpe_layers)]
        if "{i}" in theirs and names and names[0] in tensors:
            params[ours] = xp.stack([tensors[name] for name in names])
        elif theirs in tensors:
            params[ours] = tensors[theirs].reshape(-1) if ours == "gamma" else tensors[theirs]
    return params


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names and shapes"""
    tensors = {}
    for ours, theirs in PUBLISHED[part].items():
        if "{i}" in theirs and ours in params:
            tensors |= {theirs.format(i=i): p for i, p in enumerate(params[ours])}
        elif ours in params:
            shape = (cfg.num_heads, 1, -1) if ours == "gamma" else params[ours].shape
            tensors[theirs] = params[ours].reshape(shape)
    return tensors


def config_of(settings, tensors, part):
    """The Config of a case: sizes off its published tensors' shapes, the rest from its settings"""
    for name, allowed in PUBLISHED_SETTINGS.items():
        if allowed and name in settings:
            check_choice(name, settings[name], allowed)
    own = {name: value for name, value in settings.items() if name not in PUBLISHED_SETTINGS}
    theirs = {"act": "rpe_act", "h": "num_heads"}
    own |= {ours: settings[name] for name, ours in theirs.items() if name in settings}
    if "causal" in settings:
        own["bidirectional"] = not settings["causal"]
    sizes, rpes = {}, {name.partition("rpe.")[0] for name in tensors if "rpe." in name}
    for name, t in tensors.items():
        if name.endswith("rpe.out.2.weight"):
            E, own["rpe_dim"] = t.shape
            sizes = {"d_model": E, "expand_ratio": 1.0} | sizes
        elif name.endswith("u_proj.weight"):
            sizes = {"d_model": t.shape[1], "expand_ratio": (t.shape[0] + 0.5) / t.shape[1]}
        elif name.endswith("feature_mixer.l1.weight"):
            own["glu_dim"] = len(t)
        elif name.endswith("gamma"):
            own["num_heads"] = len(t)
    if rpes:
        layers = sum("rpe.layers." in name and name.endswith("2.weight") for name in tensors)
        own["rpe_layers"] = layers // len(rpes)
    return Config(**own | sizes)


def case_outputs(part, params, x, cfg):
    """Outputs of a case besides y: the coefficients t as kernel, (E, L) or (E, 2L-1)"""
    if part == "network":
        return {}
    return {"kernel": coefficients_forward(params, x.shape[1], cfg)[0]}
