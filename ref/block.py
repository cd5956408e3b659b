"""What blocks of several models share: norms, the residual branch, the S4 family's tail, GPT-2's
block around a mixer."""

import math

from ref import Error, etsc, nn
from ref.backend import array_module

NORMS = ("layer", "rms", "simple", "batch")


def norm_init(kind, D, xp, dtype):
    """norm_weight; unless rms norm_bias; for batch also norm_mean and norm_var; simple: {}"""
    if kind == "simple":
        return {}
    params = {"norm_weight": xp.ones(D, dtype=dtype)}
    if kind != "rms":
        params["norm_bias"] = xp.zeros(D, dtype=dtype)
    if kind == "batch":
        params |= {"norm_mean": xp.zeros(D, dtype=dtype), "norm_var": xp.ones(D, dtype=dtype)}
    return params


def norm_forward(params, x, kind, training):
    """x (..., D) -> y by the norm `kind`; batch statistics when training"""
    if kind == "layer":
        y, cache = nn.layer_norm_forward(x, params["norm_weight"], params["norm_bias"])
    elif kind == "rms":
        y, cache = nn.rms_norm_forward(x, params["norm_weight"])
    elif kind == "simple":
        y, cache = nn.simple_rms_norm_forward(x)
    else:
        names = ("norm_weight", "norm_bias", "norm_mean", "norm_var")
        y, cache = nn.batch_norm_forward(x, *(params[name] for name in names), training)
    return y, (kind, cache)


def norm_backward(dy, cache):
    """dy (..., D) -> dx, grads"""
    kind, cache = cache
    if kind == "simple":
        return nn.simple_rms_norm_backward(dy, cache), {}
    backward = {
        "layer": nn.layer_norm_backward,
        "rms": nn.rms_norm_backward,
        "batch": nn.batch_norm_backward,
    }
    dx, *grads = backward[kind](dy, cache)
    return dx, dict(zip(("norm_weight", "norm_bias"), grads, strict=False))


def norm_running(params, cache):
    """The running moments after norm_forward's training batch, by name; {} but for batch norm"""
    kind, cache = cache
    if kind != "batch":
        return {}
    mean, var = nn.batch_norm_running(params["norm_mean"], params["norm_var"], cache)
    return {"norm_mean": mean, "norm_var": var}


def gelu_glu_init(D, rng, dtype):
    """W (2D, D), b (2D,), uniform in ±1/sqrt(D)"""
    r = 1 / math.sqrt(D)
    return {
        "W": rng.uniform(-r, r, (2 * D, D)).astype(dtype),
        "b": rng.uniform(-r, r, 2 * D).astype(dtype),
    }


def gelu_glu_forward(params, x, dropout, rng):
    """x (B, L, D) -> y = GLU(W dropout(GELU(x)) + b), the dropout's mask shared over time"""
    a, gelu = nn.gelu_forward(x)
    a, drop = nn.dropout_forward(a, dropout, rng, tied=True)
    a, linear = nn.linear_forward(a, params["W"], params["b"])
    y, glu = nn.glu_forward(a)
    return y, (gelu, drop, linear, glu)


def gelu_glu_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    gelu, drop, linear, glu = cache
    da = nn.glu_backward(dy, glu)
    da, dW, db = nn.linear_backward(da, linear)
    da = nn.dropout_backward(da, drop)
    return nn.gelu_backward(da, gelu), {"W": dW, "b": db}


def gelu_mixer_forward(params, x, cfg, operator_forward, rng):
    """operator -> GELU -> dropout -> linear D to 2D -> GLU.   x (B, L, D) -> y (B, L, D)"""
    y, operator = operator_forward(params, x, cfg)
    y, tail = gelu_glu_forward(params, y, cfg.dropout, rng)
    return y, (operator, tail)


def gelu_mixer_backward(dy, cache, operator_backward):
    """dy (B, L, D) -> dx, grads"""
    operator, tail = cache
    dy, tail_grads = gelu_glu_backward(dy, tail)
    dx, grads = operator_backward(dy, operator)
    return dx, grads | tail_grads


def gelu_mixer_step(params, x_t, state, cfg, operator_step):
    """One time step of the block around such a mixer.   x_t (B, D) -> y_t (B, D), state"""

    def mixer_step(params, x, cfg, rng):
        nonlocal state
        y, state = operator_step(params, x[:, 0], state, cfg)
        return gelu_glu_forward(params, y[:, None], 0, None)

    y, _ = residual_forward(params, x_t[:, None], cfg, mixer_step, None)
    return y[:, 0], state


def converted_state(systems, batch):
    """The state of a block whose only filter, the operator's, is decoded by systems[0]"""
    return {"systems": tuple(systems), "long": [etsc.start(systems[0], batch)]}


def converted_step(x_t, state, D):
    """One time step of the operator.   x_t (B, D), D (D,) the skip -> y_t (B, D), state"""
    y, after = etsc.step(state["systems"][0], x_t, state["long"][0])
    return y + D * x_t, state | {"long": [after]}


def _prefilled(params, x, state, cfg, operator_step):
    """The state of a block after its operator's input x (B, L, D): converted, in one pass; of the
    model's own form, step by step"""
    if "systems" in state:
        return state | {"long": [etsc.prefill(state["systems"][0], x, state["long"][0])]}
    for t in range(x.shape[1]):
        _, state = operator_step(params, x[:, t], state, cfg)
    return state


def gelu_mixer_prefill(params, x, state, cfg, operator_forward, operator_step):
    """The block's forward over x (B, L, D), from a fresh state -> y (B, L, D), state after it"""

    def mixer(params, x, cfg, rng):
        nonlocal state
        state = _prefilled(params, x, state, cfg, operator_step)
        return gelu_mixer_forward(params, x, cfg, operator_forward, rng)

    y, _ = residual_forward(params, x, cfg, mixer, None)
    return y, state


def residual_forward(params, x, cfg, mixer_forward, rng):
    """x (B, L, D) -> x + dropout(mixer(norm(x))); without prenorm norm(x + dropout(mixer(x)))"""
    training, norm = rng is not None, None
    z = x
    if cfg.prenorm:
        z, norm = norm_forward(params, z, cfg.norm, training)
    z, mixer = mixer_forward(params, z, cfg, rng)
    z, drop = nn.dropout_forward(z, cfg.dropout, rng, tied=True)
    y = x + z
    if not cfg.prenorm:
        y, norm = norm_forward(params, y, cfg.norm, training)
    return y, (cfg.prenorm, norm, mixer, drop)


def residual_backward(dy, cache, mixer_backward):
    """dy (B, L, D) -> dx, grads"""
    prenorm, norm, mixer, drop = cache
    if not prenorm:
        dy, norm_grads = norm_backward(dy, norm)
    dz = nn.dropout_backward(dy, drop)
    dz, grads = mixer_backward(dz, mixer)
    if prenorm:
        dz, norm_grads = norm_backward(dz, norm)
    return dy + dz, grads | norm_grads


def residual_running(params, cache):
    """The running moments after residual_forward's training batch, by name"""
    return norm_running(params, cache[1])


# Attention or another mixer, and an MLP, each after a layer norm, as in GPT-2


def gpt2_init(shapes, depth, rng, dtype, last):
    """name -> array of the shape: W* normal, deviation 0.02, of those in `last`, which write on the
    residual, over sqrt(2 depth); norms' weights one; all others zero"""
    params = {}
    for name, shape in shapes.items():
        if name.startswith("W"):
            deviation = 0.02 / (math.sqrt(2 * depth) if name in last else 1)
            params[name] = (deviation * rng.standard_normal(shape)).astype(dtype)
        else:
            xp = array_module(next(iter(params.values())))
            params[name] = (xp.ones if "weight" in name else xp.zeros)(shape, dtype=dtype)
    return params


def mlp_block_shapes(D, M):
    """name -> shape of the MLP and of both norms"""
    norms = {f"norm{i}_{kind}": (D,) for i in (1, 2) for kind in ("weight", "bias")}
    return norms | {"W_1": (M, D), "b_1": (M,), "W_2": (D, M), "b_2": (D,)}


def mlp_forward(params, x):
    """linear D to M -> GELU -> linear M to D.   x (B, L, D) -> y (B, L, D)"""
    a, up = nn.linear_forward(x, params["W_1"], params["b_1"])
    a, gelu = nn.gelu_tanh_forward(a)
    y, down = nn.linear_forward(a, params["W_2"], params["b_2"])
    return y, (up, gelu, down)


def mlp_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    up, gelu, down = cache
    da, dW_2, db_2 = nn.linear_backward(dy, down)
    da = nn.gelu_tanh_backward(da, gelu)
    dx, dW_1, db_1 = nn.linear_backward(da, up)
    return dx, {"W_1": dW_1, "b_1": db_1, "W_2": dW_2, "b_2": db_2}


def mlp_block_forward(params, x, cfg, mixer_forward, rng):
    """x' = x + dropout(mixer(LN(x))), y = x' + dropout(MLP(LN(x'))).   x (B, L, D) -> y (B, L, D)

    mixer_forward(params, x, cfg, rng) -> y, cache
    """
    a, norm1 = nn.layer_norm_forward(x, params["norm1_weight"], params["norm1_bias"])
    a, mixer = mixer_forward(params, a, cfg, rng)
    a, drop1 = nn.dropout_forward(a, cfg.dropout, rng)
    x = x + a
    a, norm2 = nn.layer_norm_forward(x, params["norm2_weight"], params["norm2_bias"])
    a, mlp = mlp_forward(params, a)
    a, drop2 = nn.dropout_forward(a, cfg.dropout, rng)
    return x + a, (norm1, mixer, drop1, norm2, mlp, drop2)


def mlp_block_backward(dy, cache, mixer_backward):
    """dy (B, L, D) -> dx, grads"""
    norm1, mixer, drop1, norm2, mlp, drop2 = cache
    da = nn.dropout_backward(dy, drop2)
    da, grads = mlp_backward(da, mlp)
    da, dweight2, dbias2 = nn.layer_norm_backward(da, norm2)
    dx = dy + da
    da = nn.dropout_backward(dx, drop1)
    da, mixer_grads = mixer_backward(da, mixer)
    da, dweight1, dbias1 = nn.layer_norm_backward(da, norm1)
    norms = {"norm1_weight": dweight1, "norm1_bias": dbias1}
    norms |= {"norm2_weight": dweight2, "norm2_bias": dbias2}
    return dx + da, grads | mixer_grads | norms


def mlp_block_step(params, x_t, state, cfg, mixer_step):
    """One time step of such a block.   x_t (B, D) -> y_t (B, D), state"""

    def mixer(params, x, cfg, rng):
        nonlocal state
        y, state = mixer_step(params, x[:, 0], state, cfg)
        return y[:, None], None

    y, _ = mlp_block_forward(params, x_t[:, None], cfg, mixer, None)
    return y[:, 0], state


# Published names that the S4 family shares

PUBLISHED_TAIL = {"W": "output_linear.0.weight", "b": "output_linear.0.bias"}
PUBLISHED_NORM = {
    "norm_weight": "weight",
    "norm_bias": "bias",
    "norm_mean": "running_mean",
    "norm_var": "running_var",
}


def within(prefix, names):
    """Our names -> the published ones below prefix"""
    return {ours: prefix + theirs for ours, theirs in names.items()}


def untied(tensors, aliases):
    """Published tensors without the names {listed: the other name of the same parameter} under
    which a tied one stands again.   Error: the two differ"""
    for name in aliases.keys() & tensors.keys():
        one, other = tensors[name], tensors.get(aliases[name])
        if other is None or not array_module(one).array_equal(one, other):
            raise Error(f"{name} is tied to {aliases[name]}, but the two differ.")
    return {name: t for name, t in tensors.items() if name not in aliases}


def from_published(tensors, names):
    """Published tensors -> params, by names {ours: theirs}; W is a Conv1d of width 1 there"""
    params = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    return params | ({"W": params["W"][:, :, 0]} if "W" in params else {})


def to_published(params, names):
    """params (or their gradients) -> the published names and shapes"""
    params = params | ({"W": params["W"][:, :, None]} if "W" in params else {})
    return {theirs: params[ours] for ours, theirs in names.items() if ours in params}
