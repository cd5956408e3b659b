"""Hyena.  Poli et al.: Hyena Hierarchy: Towards Larger Convolutional Language Models, ICML 2023,
arXiv 2302.10866.  And its gated student: L2T-Hyena, arXiv 2511.05926.

Long convolutions, whose filters are functions of time, alternate with gates made from the input:

    x_0 | ... | x_{O-1} | v = conv(u W_inᵀ + b_in)               conv: depthwise, causal, K taps (1)
    v <- v x_i,  v <- k_o * v + B_o v,  i = O-1 .. 1, o = O-1-i;  y = v x_0      definition 3.1  (2)
    y = v;  y <- y + x_i (k_i * y + B_i y),  i = 0 .. O-1        residual form, L2T-Hyena's      (3)
    z_j = [τ, cos(f w), -sin(f w)],  τ = j/(l_max-1),  w = 2πj/l_max                             (4)
    h = sin(ω (... sin(ω (z F_0ᵀ + c_0)) ...)) F_nᵀ              implicit filter, section 3.3    (5)
    k = h (exp(-t |δ|) + shift)                                  its window                      (6)
    k = g h / (Σ_time |g h| + 1e-6),  g = sigmoid(W_g h + b_g)   gated filter, h free            (7)
    M = diag(x_0) T_{O-2} diag(x_1) ... T_0 diag(x_{O-1})        (2) is y = M v                  (8)

* is the causal convolution, T_o its matrix with B_o on the diagonal, f are b frequencies from 1e-4
to b - 1, e = 2b + 1. (2) has O-1 filters, (3) has O; any filter goes with any recurrence.

    parameter              shape              B batch, L length, D channels, O order, F filters,
    W_in, b_in             ((O+1) D, D), -    K taps of the short convolution, e = emb_dim,
    conv_weight, conv_bias ((O+1) D, 1, K), - W = filter_order, n = num_inner_mlps + 1
    W_out, b_out           (D, D), (D,)
    B                      (F, D)             of (2), (3)
    z                      (l_max, e)         starts as (4), trained at a rate of 1e-5
    F_0 .. F_n, c_0 ..     (W, e), (W, W) .., (F D, W), no c_n;  filter after filter
    freq                   (W,)               ω of all sines
    t, deltas              (l_max,), (F D,)   buffers: t is τ of (4); δ of (6)
    h                      (F, D, l_max)      gated: instead of the last four rows
    W_g, b_g               (D, D), (D,)
    norm1_*, norm2_*, W_1, b_1, W_2, b_2      of the block "prenorm", as in ref/block.py

The operator is (2) or (3) for an input that has x_0 .. x_{O-1} and v side by side, the mixer is (1)
to (7) and W_out. The block is "prenorm", x + mixer(LN(x)) and then x + MLP(LN(x)), or "bare",
x + mixer(x), the student's. Filters end at l_max. A shorter input sees their first L rows; the
gate's norm in (7) then runs over these.

Differences from the published code (safari, standalone_hyena.py; L2T-Hyena):
- safari's full class splits the channels of the filters as (d o); here, as in standalone, it is
  (o d). For O = 2 they are the same.
- Dropout acts in (2) and (3), where theirs does, and in both blocks on each residual branch.
- In safari's language model all linear layers start normal with deviation 0.02. Here those of the
  filter start as standalone's, uniform in ±1/sqrt(inputs): their scale is right for any w.
- A gated filter is decoded as for an input of length l_max.
"""

import math
from dataclasses import dataclass

import numpy as np

from ref import Error, block, etsc, hyena_names, nn, ssm
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
    emb_dim: int = 3  # e
    filter_order: int = 64  # W
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
            if not getattr(self, name) > 0:
                raise Error(f"{name}={getattr(self, name)}: expected more than 0.")
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
CONVERTED = True  # state without systems converts the filters
BOUNDED = True  # which end at l_max


def groups(cfg):
    """Parameters with a learning rate of their own: z slow, without weight decay what (5) is made
    of, frozen the buffers"""
    if cfg.filter == "gated":
        return {}
    linears = [name for name in filter_shapes(cfg) if name[:2] in ("F_", "c_")]
    decayless = dict.fromkeys(["freq", *linears], "nodecay")
    return decayless | {"z": "slow"} | dict.fromkeys(buffers(cfg), "frozen")


def buffers(cfg):
    """Parameters that have no gradient"""
    return ("t", "deltas") if cfg.filter == "implicit" else ()


def operator_width(cfg):
    """Channels of the operator's input"""
    return (cfg.order + 1) * cfg.d_model


def filter_shapes(cfg):
    """name -> shape of the filters' parameters.   Error: l_max is not known"""
    F, D, L, e, W = cfg.filters, cfg.d_model, cfg.l_max, cfg.emb_dim, cfg.filter_order
    if cfg.filter == "gated":
        return {"h": (F, D, L), "W_g": (D, D), "b_g": (D,)}
    shapes, n = {"z": (L, e), "t": (L,), "deltas": (F * D,), "freq": (W,)}, cfg.num_inner_mlps + 1
    for i in range(n):
        shapes |= {f"F_{i}": (W, W if i else e), f"c_{i}": (W,)}
    return shapes | {f"F_{n}": (F * D, W)}


# Initial values


def operator_init(cfg, rng, dtype="float32"):
    """(4); B and h normal; linear layers uniform in ±1/sqrt(inputs).   Error: l_max=0"""
    _check_length(cfg, 1)
    params = {"B": rng.standard_normal((cfg.filters, cfg.d_model))}
    for name, shape in filter_shapes(cfg).items():
        if name[:2] in ("F_", "W_"):
            r = 1 / math.sqrt(shape[1])
        if name[:2] in ("F_", "W_", "c_", "b_"):  # a bias follows its weight
            params[name] = rng.uniform(-r, r, shape)
    if cfg.filter == "gated":
        params["h"] = rng.standard_normal((cfg.filters, cfg.d_model, cfg.l_max))
    else:
        params |= {"z": positions(cfg.l_max, cfg.emb_dim), "t": np.linspace(0, 1, cfg.l_max)}
        ends = (math.log(cfg.target) / pct for pct in (cfg.slow_decay_pct, cfg.fast_decay_pct))
        params["deltas"] = np.linspace(*ends, cfg.filters * cfg.d_model)
        params["freq"] = np.full(cfg.filter_order, cfg.w)
    return {name: p.astype(dtype) for name, p in params.items()}


def positions(L, e):
    """(4).   -> z (L, e), float64"""
    j, bands = np.arange(L)[:, None], (e - 1) // 2
    angle = np.linspace(1e-4, bands - 1, bands) * (2 * math.pi * j / L)
    return np.concatenate([j / max(1, L - 1), np.cos(angle), -np.sin(angle)], axis=1)


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


# Filters


def sine_forward(x, freq):
    """x (..., W), freq (W,) -> y = sin(freq x)"""
    return array_module(x).sin(freq * x), (x, freq)


def sine_backward(dy, cache):
    """dy (..., W) -> dx, dfreq"""
    x, freq = cache
    slope = dy * array_module(x).cos(freq * x)
    return slope * freq, nn.sum_rows(slope * x)


def sine_mlp_forward(params, z, cfg):
    """(5).   z (L, e) -> h (L, F D)"""
    s, layers, n = z, [], cfg.num_inner_mlps + 1
    for i in range(n):
        s, linear = nn.linear_forward(s, params[f"F_{i}"], params[f"c_{i}"])
        s, sine = sine_forward(s, params["freq"])
        layers.append((linear, sine))
    h, last = nn.linear_forward(s, params[f"F_{n}"])
    return h, (layers, last)


def sine_mlp_backward(dh, cache):
    """dh (L, F D) -> dz, grads of every F, c, and freq, which is in all sines"""
    layers, last = cache
    n, grads, dfreq = len(layers), {}, 0
    ds, grads[f"F_{n}"], _ = nn.linear_backward(dh, last)
    for i, (linear, sine) in reversed([*enumerate(layers)]):
        ds, own = sine_backward(ds, sine)
        ds, grads[f"F_{i}"], grads[f"c_{i}"] = nn.linear_backward(ds, linear)
        dfreq = dfreq + own
    return ds, grads | {"freq": dfreq}


def window_forward(h, t, deltas, shift):
    """(6).   h (L, C), t (L,), deltas (C,) -> k (L, C)"""
    xp = array_module(h)
    window = xp.exp(-t[:, None] * xp.abs(deltas)) + shift
    return h * window, (window,)


def window_backward(dk, cache):
    """dk (L, C) -> dh; t and deltas are constants"""
    (window,) = cache
    return dk * window


def implicit_forward(params, L, cfg):
    """(5), (6).   -> k (F, D, L)"""
    h, mlp = sine_mlp_forward(params, params["z"][:L], cfg)
    h, window = window_forward(h, params["t"][:L], params["deltas"], cfg.shift)
    k = array_module(h).ascontiguousarray(h.T).reshape(cfg.filters, cfg.d_model, L)
    return k, (mlp, window, params["z"].shape)


def implicit_backward(dk, cache):
    """dk (F, D, L) -> grads; rows of z beyond L have none"""
    mlp, window, shape = cache
    dh = window_backward(dk.reshape(-1, dk.shape[2]).T, window)
    own, grads = sine_mlp_backward(dh, mlp)
    dz = array_module(dk).zeros(shape, dtype=dk.dtype)
    dz[: len(own)] = own
    return grads | {"z": dz}


def gated_forward(params, L):
    """(7).   -> k (F, D, L)"""
    h, W_g = params["h"][:, :, :L], params["W_g"]
    g, sigmoid = nn.sigmoid_forward(W_g @ h + params["b_g"][:, None])
    total = array_module(h).abs(g * h).sum(axis=2, keepdims=True) + 1e-6
    k = g * h / total
    return k, (params["h"].shape, h, W_g, g, sigmoid, total, k)


def gated_backward(dk, cache):
    """dk (F, D, L) -> grads.   From ∂k/∂(g h): d(g h) = (dk - sign(k) Σ_time dk k) / total"""
    shape, h, W_g, g, sigmoid, total, k = cache
    xp = array_module(dk)
    dgh = (dk - xp.sign(k) * (dk * k).sum(axis=2, keepdims=True)) / total
    da = nn.sigmoid_backward(dgh * h, sigmoid)
    dh = xp.zeros(shape, dtype=dk.dtype)
    dh[:, :, : h.shape[2]] = dgh * g + W_g.T @ da
    dW_g = (da @ h.swapaxes(1, 2)).sum(axis=0)
    return {"h": dh, "W_g": dW_g, "b_g": da.sum(axis=2).sum(axis=0)}


def filter_forward(params, L, cfg):
    """-> k (F, D, L).   Error: L is beyond l_max"""
    _check_length(cfg, L)
    if cfg.filter == "implicit":
        return implicit_forward(params, L, cfg)
    return gated_forward(params, L)


def filter_backward(dk, cache):
    """dk (F, D, L) -> grads"""
    implicit = len(cache) == 3
    return implicit_backward(dk, cache) if implicit else gated_backward(dk, cache)


def _check_length(cfg, L):
    if not cfg.l_max:
        raise Error("l_max=0 stands for the data's length: give l_max, where the filters end.")
    if cfg.l_max < L:
        raise Error(
            f"the filters end at l_max={cfg.l_max}, and the input is {L} long: give a shorter one, "
            "or train with a larger l_max."
        )


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
    k, filters = filter_forward(params, x.shape[1], cfg)
    y, steps = recurrence_forward(
        x, cfg, lambda o, a: long_conv_forward(a, k[o], params["B"][o]), rng
    )
    return y, (cfg, filters, steps)


def operator_backward(dy, cache):
    """dy (B, L, D) -> dx (B, L, (O+1) D), grads"""
    cfg, filters, steps = cache
    run = standard_backward if cfg.recurrence == "standard" else residual_backward
    dx, dks, dBs = run(dy, steps)
    stack = array_module(dy).stack
    grads = filter_backward(stack(dks), filters) | {"B": stack(dBs)}
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
    """The filters, without B.   -> k (F, D, L)   Error: L is beyond l_max"""
    return filter_forward(params, L, cfg)[0]


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
    _check_length(cfg, x.shape[1])
    k = kernels(params, cfg, cfg.l_max)[:, :, : x.shape[1]]

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
    """The filters, one after the other, without B.   -> k (F D, L)"""
    return kernels(params, cfg, L).reshape(-1, L)


def matrix(params, cfg, x=None, L=None):
    """M with y = M v, (8), for the operator's input x (B, L, (O+1) D), or its first L positions, by
    products of Toeplitz matrices -> (B, D, L, L), exactly 0 above the diagonal.   Error: no x"""
    if x is None:
        raise Error("Hyena's matrix depends on its input: give x (B, L, (order + 1) d_model).")
    x, D = x[:, :L], cfg.d_model
    L = x.shape[1]
    T = [
        ssm.toeplitz(own[None], b)
        for own, b in zip(kernels(params, cfg, L), params["B"], strict=True)
    ]
    gates = [x[..., i * D : (i + 1) * D].swapaxes(1, 2)[..., None] for i in range(cfg.order)]
    run = standard_forward if cfg.recurrence == "standard" else residual_forward
    return run(gates, array_module(x).eye(L, dtype=x.dtype), cfg, lambda o, M: (T[o] @ M, None))[0]


def hankel_values(params, cfg):
    """Singular values of each filter's Hankel matrix, k_{1+i+j} of its first 256 taps and 0 beyond.
    -> (F D, n), descending"""
    return ssm.finite_hankel_values(kernels(params, cfg, cfg.l_max).reshape(-1, cfg.l_max)[:, :256])


# Names of the published code

PUBLISHED = hyena_names.PARTS
PUBLISHED_SETTINGS = hyena_names.SETTINGS
POSITIONS_HAVE_BATCH = True  # those of the network: (1, l_max, D) there
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
