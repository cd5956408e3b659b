"""TNN, the Toeplitz neural network.  Qin et al.: Toeplitz Neural Network for Sequence Modeling,
ICLR 2023, arXiv 2305.04749.

Positions are mixed by a Toeplitz matrix for every channel. Its coefficients are no parameters: a
small MLP of the relative position, the RPE, makes them, for as many positions as there are:

    y_i = Σ_j t_{i-j} x_j                                       the operator, Tno                (1)
    t_k = f(γ^|k| RPE(k))                                       in ref/tnn_rpe.py              (2-5)
    o = (silu(x W_uᵀ + b_u) Tno(silu(x W_vᵀ + b_v))) W_oᵀ + b_o the gated Toeplitz unit, GTU    (6)
    o = (silu(x W_1ᵀ + b_1) (x W_2ᵀ + b_2)) W_3ᵀ + b_3          the GLU                          (7)
    x <- x + GTU(norm(x)),  x <- x + GLU(norm(x))               the block; [x + norm(GTU(x))]    (8)

norm(x) = x / (|x|/sqrt(D) + 1e-8). Causal: t_k = 0 for k < 0.

    parameter  shape           B batch, L length, D channels, E = expand_ratio D cut to a multiple
    W_u, b_u   (E, D), (E,)    of the heads, G = glu_dim; W_v, b_v the same
    W_o, b_o   (D, E), (D,)
    W_1, b_1   (G, D), (G,)    W_2, b_2 the same
    W_3, b_3   (D, G), (D,)
    W_p, b_p, W_r, b_r, W_t, b_t, gamma of the coefficients

The operator is (1) to (5), E wide; the mixer is (6), the block (8). Every channel has coefficients
of its own, so that several heads change nothing but E and the shape in which gamma is published.

The forward takes any length: longer than in training, type 1 goes on to further positions, types 2
and 3 divide by another L. l_max is for decoding alone: the number of positions that the recurrent
form is made for. With types 2 and 3 it reproduces the forward of exactly that length.

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

from ref import Error, block, etsc, nn, ssm, tnn_names, tnn_rpe
from ref.backend import array_module, check_activations, check_choice

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
    rpe_act: str = "relu"  # act: any that f can be
    residual: bool = False  # around the layers of the RPE
    par_type: int = 1  # position type
    act_type: str = "none"  # f: none, relu, leak, silu, gelu, sigmoid, exp, elu, 1+elu, 2+elu
    l_max: int = 0  # positions that decoding is made for; 0: the length of the data
    prenorm: bool = True
    dropout: float = 0.0

    norm = "simple"

    def __post_init__(self):
        check_choice("rpe_act", self.rpe_act, tnn_rpe.ACTIVATIONS)
        check_choice("act_type", self.act_type, tnn_rpe.ACTIVATIONS)
        if self.par_type not in (1, 2, 3):
            raise Error(f"par_type={self.par_type}: expected 1 (k), 2 (k/L) or 3 (exp(k/L)).")
        if self.use_decay and self.use_multi_decay:
            raise Error(
                "use_decay is a fixed decay, use_multi_decay a learned one: give one (where a "
                "preset sets use_decay, --no-use-decay)."
            )
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


def depends_on_length(cfg):
    """Whether an input's length changes the coefficients: positions of types 2 and 3 are parts"""
    return cfg.par_type != 1


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


# Operator, mixer, block


def operator_init(cfg, rng, dtype="float32"):
    """RPE and decay"""
    return _init(cfg, "operator", rng, dtype)


def operator_forward(params, x, cfg):
    """(1).   x (B, L, E) -> y (B, L, E)"""
    check_activations(x, cfg.width)
    t, made = tnn_rpe.coefficients_forward(params, x.shape[1], cfg)
    y, conv = nn.fft_conv_forward(x, t, "causal" if cfg.causal else "two-sided")
    return y, (made, conv)


def operator_backward(dy, cache):
    """dy (B, L, E) -> dx, grads"""
    made, conv = cache
    dx, dt = nn.fft_conv_backward(dy, conv)
    return dx, tnn_rpe.coefficients_backward(dt, made)


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
    if "gamma" not in params or cfg.act_type not in tnn_rpe.HOMOGENEOUS:
        return kernels(params, cfg, L), None
    rest = {name: p for name, p in params.items() if name != "gamma"}
    return kernels(rest, cfg, L), tnn_rpe.decay_rate(params["gamma"].astype("float64"), cfg)


def kernels(params, cfg, L):
    """The block's long filter t, causal, for L positions.   -> k (1, E, L)   Error: it is not"""
    if not cfg.causal:
        raise Error("bidirectional=True sees all of a sequence: it has no recurrent step.")
    return tnn_rpe.coefficients_forward(params, L, cfg)[0][None]


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
    L = x.shape[1] if cfg.par_type == 1 else system.horizon
    t, _ = tnn_rpe.coefficients_forward(params, L, cfg)
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
    return tnn_rpe.coefficients_forward(params, L, cfg)[0][:, -L:]


def two_sided_response(params, cfg, L):
    """Its answer at every lag, from -(L-1) to L-1, of a map in both directions.   -> t (E, 2L-1)"""
    return tnn_rpe.coefficients_forward(params, L, cfg)[0]


def matrix(params, cfg, x=None, L=None):
    """(1) as a matrix, y_t = Σ_s M[t, s] x_s, for L or x's length.   -> M (1, E, L, L)"""
    L = ssm.length_of(x, L)
    t, first = tnn_rpe.coefficients_forward(params, L, cfg)[0], 0 if cfg.causal else L - 1
    xp = array_module(t)
    lag = xp.arange(L)[:, None] - xp.arange(L)[None, :] + first
    return xp.where(lag >= 0, t[:, xp.maximum(lag, 0)], 0)[None]


def hankel_values(params, cfg):
    """Singular values of each channel's Hankel matrix, t_{1+i+j} of the first l_max coefficients or
    HANKEL_SIZE if that is less, 0 beyond; then of t_{-1-i-j}.   -> (E or 2E, n), descending"""
    n = min(cfg.l_max or HANKEL_SIZE, HANKEL_SIZE)
    t = tnn_rpe.coefficients_forward(params, n, cfg)[0]
    sides = [t] if cfg.causal else [t[:, n - 1 :], t[:, :n][:, ::-1]]
    return array_module(t).concatenate([ssm.finite_hankel_values(side) for side in sides])


# Names of the published code

PUBLISHED = tnn_names.PARTS
PUBLISHED_LAYER = tnn_names.LAYER
PUBLISHED_NETWORK = tnn_names.NETWORK
PUBLISHED_SETTINGS = tnn_names.SETTINGS
from_published = tnn_names.from_published
to_published = tnn_names.to_published


def config_of(settings, tensors, part):
    """The Config of a case: sizes off its published tensors' shapes, the rest from its settings"""
    return Config(**tnn_names.config_fields(settings, tensors))


def case_outputs(part, params, x, cfg):
    """Outputs of a case besides y: the coefficients t as kernel, (E, L) or (E, 2L-1)"""
    if part == "network":
        return {}
    return {"kernel": tnn_rpe.coefficients_forward(params, x.shape[1], cfg)[0]}
