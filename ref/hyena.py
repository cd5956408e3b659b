"""Hyena.  Poli et al.: Hyena Hierarchy: Towards Larger Convolutional Language Models, ICML 2023,
arXiv 2302.10866.  And its gated student: L2T-Hyena, arXiv 2511.05926.

Long convolutions, whose filters are functions of time, alternate with gates made from the input:

    x_0 | ... | x_{O-1} | v = conv(u W_inᵀ + b_in)               conv: depthwise, causal, K taps (1)
    v <- v x_i,  v <- k_o * v + B_o v,  i = O-1 .. 1, o = O-1-i;  y = v x_0      definition 3.1  (2)
    y = v;  y <- y + x_i (k_i * y + B_i y),  i = 0 .. O-1        residual form, L2T-Hyena's      (3)
    k                                      implicit or gated filters, in ref/hyena_filters.py (4-7)
    M = diag(x_0) T_{O-2} diag(x_1) ... T_0 diag(x_{O-1})        (2) is y = M v                  (8)

* is the causal convolution, T_o its matrix with B_o on the diagonal. (2) has O-1 filters, (3) has
O; any filter goes with any recurrence.

    parameter              shape              B batch, L length, D channels, O order, F filters,
    W_in, b_in             ((O+1) D, D), -    K taps of the short convolution
    conv_weight, conv_bias ((O+1) D, 1, K), -
    W_out, b_out           (D, D), (D,)
    B                      (F, D)             of (2), (3)
    z, F_i, c_i, freq, t, deltas; h, W_g, b_g of the filters
    norm1_*, norm2_*, W_1, b_1, W_2, b_2      of the block "prenorm", as in ref/block.py

The operator is (2) or (3) for an input that has x_0 .. x_{O-1} and v side by side, the mixer is (1)
to (7) and W_out. The block is "prenorm", x + mixer(LN(x)) and then x + MLP(LN(x)), or "bare",
x + mixer(x), the student's. Filters end at l_max.

Differences from the published code (safari, standalone_hyena.py; L2T-Hyena):
- safari's full class splits the channels of the filters as (d o); here, as in standalone, it is
  (o d). For O = 2 they are the same.
- Dropout acts in (2) and (3), where theirs does, and in both blocks on each residual branch.
- In safari's language model all linear layers start normal with deviation 0.02. Here those of the
  filter start as standalone's, uniform in ±1/sqrt(inputs): their scale is right for any w.
- A gated filter depends on the input's length; it is decoded as for an input of length l_max.
"""

import math
from dataclasses import dataclass

from ref import Error, block, etsc, hyena_filters, hyena_names, nn, ssm
from ref.backend import array_module, check_activations, check_choice


@dataclass(frozen=True)
class Config:
    """Hyena's layer."""

    d_model: int = 128
    order: int = 2
    l_max: int = 0  # where the filters end; 0: the data's length
    filter: str = "implicit"  # implicit or gated
    recurrence: str = "standard"  # standard (2) or residual (3)
    block: str = "prenorm"  # prenorm or bare
    emb_dim: int = 3  # e of (4)
    filter_order: int = 64  # W of (5)
    num_inner_mlps: int = 2
    w: float = 1.0  # initial freq; published language models have 10 or 14
    shift: float = 0.0
    fast_decay_pct: float = 0.3  # where in time the fastest window falls to `target`
    slow_decay_pct: float = 1.5
    target: float = 1e-2
    short_filter_order: int = 3  # K
    d_mlp: int = 0  # 0: 4 d_model
    depth: int = 12  # layers whose outputs add up on the residual: their initial scale
    dropout: float = 0.0

    norm = "layer"
    prenorm = True  # a final norm goes with either block
    causal = True

    def __post_init__(self):
        check_choice("filter", self.filter, ("implicit", "gated"))
        check_choice("recurrence", self.recurrence, ("standard", "residual"))
        check_choice("block", self.block, ("prenorm", "bare"))
        for name in ("d_model", "filter_order", "short_filter_order", "depth", "order"):
            if getattr(self, name) < 1:
                raise Error(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.filters < 1:
            raise Error("order=1 has no filter in the standard recurrence; use order=2 or more.")
        if self.emb_dim < 3 or self.emb_dim % 2 == 0:
            raise Error(f"emb_dim={self.emb_dim}: expected an odd number, at least 3.")
        for name in ("l_max", "num_inner_mlps", "d_mlp"):
            if getattr(self, name) < 0:
                raise Error(f"{name}={getattr(self, name)}: expected 0 or more.")
        for name in ("w", "fast_decay_pct", "slow_decay_pct"):
            if not 0 < getattr(self, name) < math.inf:
                raise Error(f"{name}={getattr(self, name)}: expected more than 0, and finite.")
        if not math.isfinite(self.shift):
            raise Error(f"shift={self.shift}: expected a finite number.")
        if not (0 < self.target < 1 and 0 <= self.dropout < 1):
            raise Error(
                f"target={self.target}, dropout={self.dropout}: "
                "expected 0 < target < 1 and 0 <= dropout < 1."
            )

    @property
    def filters(self):
        """F"""
        return self.order - (self.recurrence == "standard")

    @property
    def context(self):
        """Learned positions that the network has: a bare block tells none by itself"""
        return self.l_max if self.block == "bare" else 0


EMBEDDING_DEVIATION = 0.02  # of a network's, when it is made
HANKEL_SIZE = 256  # taps in a Hankel matrix, at most
CONVERTED = True  # state without systems converts the filters
BOUNDED = True  # which end at l_max


def groups(cfg):
    """Parameters with a learning rate of their own: z slow, without weight decay what (5) is made
    of, frozen the buffers"""
    if cfg.filter == "gated":
        return {}
    linears = [name for name in hyena_filters.shapes(cfg) if name[:2] in ("F_", "c_")]
    decayless = dict.fromkeys(["freq", *linears], "nodecay")
    return decayless | {"z": "slow"} | dict.fromkeys(buffers(cfg), "frozen")


def buffers(cfg):
    """Parameters that have no gradient"""
    return ("t", "deltas") if cfg.filter == "implicit" else ()


def depends_on_length(cfg):
    """Whether an input's length changes the filters: the norm of gated ones runs over it"""
    return cfg.filter == "gated"


def operator_width(cfg):
    """Channels of the operator's input"""
    return (cfg.order + 1) * cfg.d_model


# Initial values


def operator_init(cfg, rng, dtype="float32"):
    """(4); B and h normal; linear layers uniform in ±1/sqrt(inputs).   Error: l_max=0"""
    hyena_filters.check_length(cfg, 1)
    params = {"B": rng.standard_normal((cfg.filters, cfg.d_model))}
    params |= hyena_filters.init(cfg, rng)
    return {name: p.astype(dtype) for name, p in params.items()}


def mixer_init(cfg, rng, dtype="float32"):
    """Operator and projections: in a prenorm block as GPT-2's, else uniform in ±1/sqrt(inputs)"""
    D, C, K = cfg.d_model, operator_width(cfg), cfg.short_filter_order
    shapes = {"W_in": (C, D), "b_in": (C,), "W_out": (D, D), "b_out": (D,)}
    if cfg.block == "prenorm":
        params = block.gpt2_init(shapes, cfg.depth, rng, dtype, last=("W_out",))
    else:
        r = 1 / math.sqrt(D)
        params = {name: rng.uniform(-r, r, shape).astype(dtype) for name, shape in shapes.items()}
    r = 1 / math.sqrt(K)
    params["conv_weight"] = rng.uniform(-r, r, (C, 1, K)).astype(dtype)
    params["conv_bias"] = rng.uniform(-r, r, C).astype(dtype)
    return params | operator_init(cfg, rng, dtype)


def block_init(cfg, rng, dtype="float32"):
    """Mixer, and of a prenorm block norms and MLP"""
    params = mixer_init(cfg, rng, dtype)
    if cfg.block == "bare":
        return params
    shapes = block.mlp_block_shapes(cfg.d_model, cfg.d_mlp or 4 * cfg.d_model)
    weights = {name: shapes[name] for name in sorted(shapes)}  # W_1 first: it has the array module
    return params | block.gpt2_init(weights, cfg.depth, rng, dtype, last=("W_2",))


# Recurrences. convolve(o, x) -> k_o * x + B_o x, and what there is to keep of it: in training the
# convolution's cache, in decoding the filter's state. What they return ends in one tuple a filter,
# whose last entry that is.


def long_conv_forward(x, k, b):
    """x (B, L, D), k (D, L), b (D,) -> k * x + b x"""
    y, conv = nn.fft_conv_forward(x, k)
    y, skip = nn.skip_forward(y, b, x)
    return y, (conv, skip)


def long_conv_backward(dy, cache):
    """dy (B, L, D) -> dx, dk, db"""
    conv, skip = cache
    _, db, dx_skip = nn.skip_backward(dy, skip)
    dx, dk = nn.fft_conv_backward(dy, conv)
    return dx + dx_skip, dk, db


def standard_forward(gates, v, cfg, convolve, rng=None):
    """(2).   gates: x_0 .. x_{O-1}, v (B, L, D) -> y (B, L, D)"""
    steps = []
    for o, gate in enumerate(reversed(gates[1:])):
        a, drop = nn.dropout_forward(v * gate, cfg.dropout, rng)
        c, own = convolve(o, a)
        steps.append((v, gate, drop, own))
        v = c
    return v * gates[0], (v, gates[0], steps)


def standard_backward(dy, cache):
    """dy (B, L, D) -> gradients of the gates and v, of every k and of every B, as lists"""
    v, gate, steps = cache
    dv, dgates, dks, dBs = dy * gate, [dy * v], [], []
    for v, gate, drop, conv in reversed(steps):
        da, dk, dB = long_conv_backward(dv, conv)
        da = nn.dropout_backward(da, drop)
        dgates.append(da * v)
        dv, dks, dBs = da * gate, [dk, *dks], [dB, *dBs]
    return [*dgates, dv], dks, dBs


def residual_forward(gates, v, cfg, convolve, rng=None):
    """(3).   gates: x_0 .. x_{O-1}, v (B, L, D) -> y (B, L, D)"""
    y, steps = v, []
    for o, gate in enumerate(gates):
        c, own = convolve(o, y)
        a, drop = nn.dropout_forward(gate * c, cfg.dropout, rng)
        y = y + a
        steps.append((c, gate, drop, own))
    return y, (steps,)


def residual_backward(dy, cache):
    """dy (B, L, D) -> gradients of the gates and v, of every k and of every B, as lists"""
    (steps,) = cache
    dgates, dks, dBs = [], [], []
    for c, gate, drop, conv in reversed(steps):
        da = nn.dropout_backward(dy, drop)
        dx, dk, dB = long_conv_backward(da * gate, conv)
        dgates, dks, dBs = [da * c, *dgates], [dk, *dks], [dB, *dBs]
        dy = dy + dx
    return [*dgates, dy], dks, dBs


def recurrence_forward(x, cfg, convolve, rng=None):
    """x (..., (O+1) D) -> y (..., D)"""
    D = cfg.d_model
    *gates, v = (x[..., i * D : (i + 1) * D] for i in range(cfg.order + 1))
    run = standard_forward if cfg.recurrence == "standard" else residual_forward
    return run(gates, v, cfg, convolve, rng)


# Operator, mixer, block


def operator_forward(params, x, cfg, rng=None):
    """(2) or (3).   x (B, L, (O+1) D) -> y (B, L, D).   Error: L is beyond l_max"""
    check_activations(x, operator_width(cfg))
    k, made = hyena_filters.filter_forward(params, x.shape[1], cfg)
    y, steps = recurrence_forward(
        x, cfg, lambda o, a: long_conv_forward(a, k[o], params["B"][o]), rng
    )
    return y, (cfg, made, steps)


def operator_backward(dy, cache):
    """dy (B, L, D) -> dx (B, L, (O+1) D), grads"""
    cfg, made, steps = cache
    run = standard_backward if cfg.recurrence == "standard" else residual_backward
    dx, dks, dBs = run(dy, steps)
    stack = array_module(dy).stack
    grads = hyena_filters.filter_backward(stack(dks), made) | {"B": stack(dBs)}
    return array_module(dy).concatenate(dx, axis=2), grads


def mixer_forward(params, x, cfg, rng=None):
    """(1), operator, linear.   x (B, L, D) -> y (B, L, D).   Error: L is beyond l_max"""
    check_activations(x, cfg.d_model)
    a, project = nn.linear_forward(x, params["W_in"], params["b_in"])
    a, conv = nn.short_conv_forward(a, params["conv_weight"], params["conv_bias"])
    y, operator = operator_forward(params, a, cfg, rng)
    y, out = nn.linear_forward(y, params["W_out"], params["b_out"])
    return y, (project, conv, operator, out)


def mixer_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    project, conv, operator, out = cache
    dy, dW_out, db_out = nn.linear_backward(dy, out)
    da, grads = operator_backward(dy, operator)
    da, dw, db, _ = nn.short_conv_backward(da, conv)
    dx, dW_in, db_in = nn.linear_backward(da, project)
    grads |= {"W_in": dW_in, "b_in": db_in, "conv_weight": dw, "conv_bias": db}
    return dx, grads | {"W_out": dW_out, "b_out": db_out}


def block_forward(params, x, cfg, rng=None):
    """x + mixer(LN(x)), then x + MLP(LN(x)); bare: x + mixer(x).   x (B, L, D) -> y (B, L, D)"""
    return _block_forward(params, x, cfg, mixer_forward, rng)


def _block_forward(params, x, cfg, mixer_forward, rng):
    check_activations(x, cfg.d_model)
    if cfg.block == "prenorm":
        return block.mlp_block_forward(params, x, cfg, mixer_forward, rng)
    a, mixer = mixer_forward(params, x, cfg, rng)
    a, drop = nn.dropout_forward(a, cfg.dropout, rng)
    return x + a, (mixer, drop)


def block_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    if len(cache) > 2:
        return block.mlp_block_backward(dy, cache, mixer_backward)
    mixer, drop = cache
    dx, grads = mixer_backward(nn.dropout_backward(dy, drop), mixer)
    return dy + dx, grads


def running_statistics(params, cache):
    """Running moments after a training batch: a layer norm has none"""
    return {}


# Recurrent form: each filter as the state-space system that it is up to l_max


def kernels(params, cfg, L):
    """The first L taps of what decoding convolves with, the filters of length l_max, without B.
    Gated ones are not those of a forward over L positions, whose norm (7) is another one.

    -> k (F, D, L)   Error: L is beyond l_max
    """
    hyena_filters.check_length(cfg, L)
    k, _ = hyena_filters.filter_forward(params, cfg.l_max if cfg.filter == "gated" else L, cfg)
    return k[:, :, :L]


def state(params, cfg, batch, systems=None):
    """The block's state before the first position: of every filter's system, and the inputs that
    the short convolution still sees, (B, K-1, (O+1) D) zeros

    systems: one etsc.System for each filter; None: exact ones.   Error: l_max=0, another number
    """
    if systems is None:
        systems = [etsc.to_ssm(k) for k in kernels(params, cfg, cfg.l_max)]
    if len(systems) != cfg.filters:
        raise Error(f"{len(systems)} systems were given; expected {cfg.filters}, one a filter.")
    xp, K, dtype = array_module(params["B"]), cfg.short_filter_order, params["B"].dtype
    return {
        "systems": tuple(systems),
        "long": [etsc.start(system, batch) for system in systems],
        "conv": xp.zeros((batch, K - 1, operator_width(cfg)), dtype=dtype),
    }


def operator_step(params, x_t, state, cfg):
    """One position of the operator.   x_t (B, (O+1) D) -> y_t (B, D), state"""

    def convolve(o, x):
        y, after = etsc.step(state["systems"][o], x, state["long"][o])
        return y + params["B"][o] * x, after

    y, (*_, steps) = recurrence_forward(x_t, cfg, convolve)
    return y, state | {"long": [after for *_, after in steps]}


def mixer_step(params, x_t, state, cfg):
    """One position of the mixer.   x_t (B, D) -> y_t (B, D), state"""
    a, _ = nn.linear_forward(x_t, params["W_in"], params["b_in"])
    taps = params["conv_weight"], params["conv_bias"]
    a, window = nn.short_conv_step(a, state["conv"], *taps)
    y, state = operator_step(params, a, state | {"conv": window}, cfg)
    return nn.linear_forward(y, params["W_out"], params["b_out"])[0], state


def step(params, x_t, state, cfg):
    """One position of the block.   x_t (B, D) -> y_t (B, D), state.   Error: l_max is reached"""

    def mixer(params, x, cfg, rng):
        nonlocal state
        y, state = mixer_step(params, x[:, 0], state, cfg)
        return y[:, None], None

    y, _ = _block_forward(params, x_t[:, None], cfg, mixer, None)
    return y[:, 0], state


def prefill(params, x, cfg, state):
    """The first positions of the block at once.   x (B, L, D), a fresh state -> y (B, L, D), state
    after them; as L steps give them.   Error: L is beyond l_max"""
    k = kernels(params, cfg, x.shape[1])

    def mixer(params, x, cfg, rng):
        nonlocal state
        a, _ = nn.linear_forward(x, params["W_in"], params["b_in"])
        window = array_module(a).concatenate([state["conv"], a], axis=1)[:, x.shape[1] :]
        a, _ = nn.short_conv_forward(a, params["conv_weight"], params["conv_bias"], state["conv"])

        def convolve(o, x):
            y, _ = long_conv_forward(x, k[o], params["B"][o])
            return y, etsc.prefill(state["systems"][o], x, state["long"][o])

        y, (*_, steps) = recurrence_forward(a, cfg, convolve)
        state = state | {"conv": window, "long": [after for *_, after in steps]}
        return nn.linear_forward(y, params["W_out"], params["b_out"])

    y, _ = _block_forward(params, x, cfg, mixer, None)
    return y, state


# Looking at it


def impulse_response(params, cfg, L):
    """The filters of an input of length L, one after the other, without B.   -> k (F D, L)"""
    return hyena_filters.filter_forward(params, L, cfg)[0].reshape(-1, L)


def matrix(params, cfg, x=None, L=None):
    """M with y = M v, (8), for the operator's input x (B, L, (O+1) D), or its first L positions, by
    products of Toeplitz matrices -> (B, D, L, L), exactly 0 above the diagonal.   Error: no x"""
    if x is None:
        raise Error("Hyena's matrix depends on its input: give x (B, L, (order + 1) d_model).")
    x, D = x[:, :L], cfg.d_model
    L = x.shape[1]
    k, _ = hyena_filters.filter_forward(params, L, cfg)
    T = [ssm.toeplitz(own[None], b) for own, b in zip(k, params["B"], strict=True)]
    gates = [x[..., i * D : (i + 1) * D].swapaxes(1, 2)[..., None] for i in range(cfg.order)]
    run = standard_forward if cfg.recurrence == "standard" else residual_forward
    return run(gates, array_module(x).eye(L, dtype=x.dtype), cfg, lambda o, M: (T[o] @ M, None))[0]


def hankel_values(params, cfg):
    """Singular values of each filter's Hankel matrix, k_{1+i+j} of its first HANKEL_SIZE taps and 0
    beyond.   -> (F D, n), descending"""
    k = kernels(params, cfg, cfg.l_max)[:, :, :HANKEL_SIZE]
    return ssm.finite_hankel_values(k.reshape(-1, k.shape[2]))


# Names of the published code

PUBLISHED = hyena_names.PARTS
PUBLISHED_SETTINGS = hyena_names.SETTINGS
POSITIONS_HAVE_BATCH = True  # those of the network: (1, l_max, D) there
published_aliases = hyena_names.published_aliases
published_layer = hyena_names.published_layer
published_network = hyena_names.published_network
from_published = hyena_names.from_published
to_published = hyena_names.to_published
network_settings = hyena_names.network_settings


def lists_tied_head(layer):
    """Whether the published state dict has a tied head beside the embedding"""
    return True


def config_of(settings, tensors, part):
    """The Config of a case: sizes off its published tensors' shapes, the rest from its settings"""
    return Config(**hyena_names.config_fields(settings, tensors))


def case_outputs(part, params, x, cfg):
    """What the published cases have besides y: of a mixer the filters, (L, F D)"""
    return {"kernel": impulse_response(params, cfg, x.shape[1]).T} if part == "mixer" else {}
