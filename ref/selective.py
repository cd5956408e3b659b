"""What Mamba and Longhorn share: the mixer around a selective scan, its state, and the time loop.

    [x, z] = u W_inᵀ,  x = silu(conv(x))           conv: depthwise, causal, K taps
    [r, b, c] = x W_xᵀ,  dt = r W_dtᵀ + dt_bias     the selection: what enters, stays, is read
    out = (scan(x, dt, b, c) silu(z)) W_outᵀ

    parameter               shape                   B batch, L length, D channels,
    W_in                    (2E, D)                 E = expand D inner channels, N states,
    conv_weight, conv_bias  (E, 1, K), (E,)         R rank of dt, K taps
    W_x                     (R + 2N, E)             rows in the order r, b, c
    W_dt, dt_bias           (E, R), (E,)
    D                       (E,)
    W_out                   (D, E)

b and c are Mamba's B and C, Longhorn's k and q. The state after a position is the convolution's
last K inputs, oldest first, and the scan's own: {"conv": (B, K, E), "ssm": (B, E, N)}.
"""

import math

from ref import Error, block, nn
from ref.backend import array_module, check_activations


def check_config(cfg):
    """Error: a size or the dropout of a Config is out of range"""
    for name in ("d_model", "d_state", "d_conv", "expand", "depth"):
        if getattr(cfg, name) < 1:
            raise Error(f"{name}={getattr(cfg, name)}: expected at least 1.")
    if cfg.dt_rank < 0 or not 0 <= cfg.dropout < 1:
        raise Error(
            f"dt_rank={cfg.dt_rank}, dropout={cfg.dropout}: "
            "expected dt_rank >= 0 and 0 <= dropout < 1."
        )


def sizes(cfg):
    """E, R of a Config; dt_rank = 0 stands for D/16, rounded up"""
    return cfg.expand * cfg.d_model, cfg.dt_rank or -(-cfg.d_model // 16)


def init(cfg, rng, dtype):
    """Uniform in ±1/sqrt(inputs), W_out then over sqrt(depth); D ones, dt_bias zero"""
    (E, R), D, N, K = sizes(cfg), cfg.d_model, cfg.d_state, cfg.d_conv

    def uniform(inputs, *shape):
        r = 1 / math.sqrt(inputs)
        return rng.uniform(-r, r, shape)

    params = {
        "W_in": uniform(D, 2 * E, D),
        "conv_weight": uniform(K, E, 1, K),
        "conv_bias": uniform(K, E),
        "W_x": uniform(E, R + 2 * N, E),
        "W_dt": uniform(R, E, R),
        "W_out": uniform(E, D, E) / math.sqrt(cfg.depth),
    }
    params = {name: p.astype(dtype) for name, p in params.items()}
    xp = array_module(params["W_in"])
    return params | {"D": xp.ones(E, dtype=dtype), "dt_bias": xp.zeros(E, dtype=dtype)}


def block_init(cfg, rng, dtype, mixer_init):
    """Mixer and norm"""
    params = mixer_init(cfg, rng, dtype)
    xp = array_module(params["D"])
    return params | block.norm_init(cfg.norm, cfg.d_model, xp, dtype)


OPERATOR = ("W_x", "W_dt", "dt_bias", "A_log", "D")  # parameters of the operator alone


# Selection


def selection_forward(params, x):
    """x (..., E) -> dt (..., E), b, c (..., N)"""
    rbc, project = nn.linear_forward(x, params["W_x"])
    R = params["W_dt"].shape[1]
    N = (rbc.shape[-1] - R) // 2
    dt, widen = nn.linear_forward(rbc[..., :R], params["W_dt"], params["dt_bias"])
    return dt, rbc[..., R : R + N], rbc[..., R + N :], (project, widen)


def selection_backward(ddt, db, dc, cache):
    """ddt (..., E), db, dc (..., N) -> dx, grads"""
    project, widen = cache
    dr, dW_dt, ddt_bias = nn.linear_backward(ddt, widen)
    drbc = array_module(ddt).concatenate([dr, db, dc], axis=-1)
    dx, dW_x, _ = nn.linear_backward(drbc, project)
    return dx, {"W_x": dW_x, "W_dt": dW_dt, "dt_bias": ddt_bias}


# Mixer and block around an operator


def mixer_forward(params, u, cfg, gated_forward, state=None):
    """u (B, L, D), state before it -> y (B, L, D)

    gated_forward(params, x, cfg, z, s0) -> y, cache: selection, scan and gate; cache[-1] is the
    scan's last state.
    """
    check_activations(u, cfg.d_model)
    check_state(state, cfg, u)
    E, K, L = sizes(cfg)[0], cfg.d_conv, u.shape[1]
    xz, project = nn.linear_forward(u, params["W_in"])
    x, z = xz[..., :E], xz[..., E:]
    given, state = state is not None, empty_state(params, cfg, len(u)) if state is None else state
    window = array_module(u).concatenate([state["conv"], x[:, -K:]], axis=1)[:, -K:]
    x, conv = nn.short_conv_forward(
        x, params["conv_weight"], params["conv_bias"], state["conv"][:, 1:]
    )
    x, silu = nn.silu_forward(x)
    y, gated = gated_forward(params, x, cfg, z, state["ssm"])
    y, out = nn.linear_forward(y, params["W_out"])
    last = {"conv": window, "ssm": gated[-1]}
    return y, (given, L, project, conv, silu, gated, out, last)


def mixer_backward(dy, cache, gated_backward, dstate=None):
    """dy (B, L, D), dstate the gradient of the state after it -> dx, grads

    gated_backward(dy, cache, dlast) -> dx, dz, ds0, grads.

    When forward was given a state, grads has its gradient too: state.conv and state.ssm.
    """
    given, L, project, conv, silu, gated, out, last = cache
    xp, dlast = array_module(dy), None if dstate is None else dstate["ssm"]
    if dstate is not None:
        check_like("the gradient of state conv", dstate["conv"], last["conv"].shape, dy.dtype)
    dy, dW_out, _ = nn.linear_backward(dy, out)
    dx, dz, ds0, grads = gated_backward(dy, gated, dlast)
    dx = nn.silu_backward(dx, silu)
    dx, dw, db, dbefore = nn.short_conv_backward(dx, conv)
    if given or dstate is not None:
        B, _, E = dx.shape
        none = xp.zeros((B, 1, E), dtype=dx.dtype)  # the oldest of the K reaches no later output
        dinputs = xp.concatenate([none, dbefore, dx], axis=1)
        if dstate is not None:
            dinputs[:, L:] += dstate["conv"]
        K = dinputs.shape[1] - L
        dstate_conv, dx = dinputs[:, :K], dinputs[:, K:]
    if given:
        grads |= {"state.conv": dstate_conv, "state.ssm": ds0}
    dx, dW_in, _ = nn.linear_backward(xp.concatenate([dx, dz], axis=-1), project)
    grads |= {"W_in": dW_in, "conv_weight": dw, "conv_bias": db, "W_out": dW_out}
    return dx, grads


def block_forward(params, x, cfg, mixer_forward, rng, state):
    """x (B, L, D) -> x + mixer(RMSNorm(x))"""
    check_activations(x, cfg.d_model)

    def mixer(params, x, cfg, rng):
        return mixer_forward(params, x, cfg, rng, state)

    return block.residual_forward(params, x, cfg, mixer, rng)


def block_backward(dy, cache, mixer_backward, dstate):
    """dy (B, L, D) -> dx, grads"""
    return block.residual_backward(dy, cache, lambda dy, own: mixer_backward(dy, own, dstate))


# State


def state_shapes(cfg, batch):
    """name -> shape of what a state holds"""
    E = sizes(cfg)[0]
    return {"conv": (batch, cfg.d_conv, E), "ssm": (batch, E, cfg.d_state)}


def empty_state(params, cfg, batch):
    """The state before the first position: zeros"""
    xp, dtype = array_module(params["D"]), params["D"].dtype
    return {name: xp.zeros(s, dtype=dtype) for name, s in state_shapes(cfg, batch).items()}


def check_state(state, cfg, x):
    """Error: a state that is given lacks something, or is not for inputs like x (B, L, D)"""
    for name, shape in state_shapes(cfg, len(x)).items() if state is not None else ():
        if name not in state:
            raise Error(f"the state has no {name!r}; expected conv and ssm, as `state` makes them.")
        check_like(f"state {name}", state[name], shape, x.dtype)


def mixer_state(cache):
    """The state after what mixer_forward saw"""
    return cache[-1]


def block_state(cache):
    """The state after what block_forward saw"""
    return mixer_state(cache[2])


# The readable scans


def check_scan(x, wide, narrow, vectors, state):
    """Error: shapes or precisions that do not go with x (B, L, E); what is None is left out

    wide: name -> (B, L, E); narrow: name -> (B, L, N); vectors: name -> (E,); state: its name ->
    (B, E, N)
    """
    check_activations(x, x.shape[-1])
    (B, L, E), N = x.shape, next(iter(narrow.values())).shape[-1]
    if N < 1:
        raise Error(f"{next(iter(narrow))} has no states: expected (B, L, N) with N at least 1.")
    expected = [(wide, (B, L, E)), (narrow, (B, L, N)), (vectors, (E,)), (state, (B, E, N))]
    for arrays, shape in expected:
        for name, a in arrays.items():
            check_like(name, a, shape, x.dtype)


def check_gradients(dy, dlast, x, state_shape):
    """Error: gradients of y and of the last state that do not go with x (B, L, E)"""
    check_like("dy", dy, x.shape, x.dtype)
    check_like("the gradient of the last state", dlast, state_shape, x.dtype)


def check_like(name, a, shape, dtype):
    """Error: a, unless it is None, has another shape or precision"""
    if a is not None and (a.shape != shape or a.dtype != dtype):
        found = f"{name} has shape {tuple(a.shape)} and dtype {a.dtype}"
        raise Error(f"{found}; expected {tuple(shape)}, {dtype}.")


def spacing(L):
    """Steps between the states that a scan keeps: about sqrt(L), so that it keeps as many"""
    return math.isqrt(L - 1) + 1


def states_backwards(step, kept, L):
    """Yields t, h_{t-1}, h_t for t = L-1 .. 0; h_t = step(h_{t-1}, t), made again from kept, the
    states before every spacing(L)-th t"""
    c = spacing(L)
    for i in reversed(range(len(kept))):
        times, states = range(i * c, min(L, (i + 1) * c)), [kept[i]]
        for t in times:
            states.append(step(states[-1], t))
        for t in reversed(times):
            yield t, states[t - i * c], states[t - i * c + 1]


# Names of the published code, whose layouts differ in the embedding's name and in whether the head
# that is tied to it is listed too

LAYOUTS = ("original", "transformers")
MIXER_NAMES = {
    "W_in": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "W_x": "x_proj.weight",
    "W_out": "out_proj.weight",
    "D": "D",
}
PUBLISHED_SETTINGS = (  # of a network, and what of it is no field of a Config
    "vocab_size",
    "pad_vocab_size_multiple",
    "n_layer",
    "norm_eps",
    "rms_norm",
    "fused_add_norm",
    "residual_in_fp32",
    "tie_embeddings",
)
EMBEDDING = {
    "original": "backbone.embedding.weight",
    "transformers": "backbone.embeddings.weight",
}


def published(names):
    """The parts' published names, {ours: theirs}, from those of the mixer"""
    return {
        "operator": {ours: theirs for ours, theirs in names.items() if ours in OPERATOR},
        "mixer": names,
        "block": {"norm_weight": "norm.weight"} | block.within("mixer.", names),
    }


def published_network(layer):
    """Ours -> published names, outside of the blocks"""
    return {
        "encoder.weight": EMBEDDING[layer.layout],
        "final.norm_weight": "backbone.norm_f.weight",
        "decoder.weight": "lm_head.weight",
    }


def lists_tied_head(layer):
    """Whether the published state dict has a tied head beside the embedding"""
    return layer.layout == "original"


def config_fields(settings, tensors, dt_weight):
    """A Config's fields: sizes off published tensors' shapes, the rest from a case's settings"""
    sizes = {}
    for name, t in tensors.items():
        if name.endswith("in_proj.weight"):
            sizes |= {"d_model": t.shape[1], "expand": t.shape[0] // (2 * t.shape[1])}
        elif name.endswith("conv1d.weight"):
            sizes["d_conv"] = t.shape[2]
        elif name.endswith(dt_weight):
            sizes["dt_rank"] = t.shape[1]
    for name, t in tensors.items():
        if name.endswith("x_proj.weight"):
            sizes["d_state"] = (t.shape[0] - sizes["dt_rank"]) // 2
            if "d_model" not in sizes:  # of the operator alone
                D = settings.get("d_model", t.shape[1])
                sizes |= {"d_model": D, "expand": t.shape[1] // D}
    if EMBEDDING["transformers"] in tensors:
        sizes["layout"] = "transformers"
    return sizes | {n: v for n, v in settings.items() if n not in PUBLISHED_SETTINGS}


def network_settings(settings, tensors):
    """The network.Config fields of a published language model.   Error: another norm"""
    if settings.get("norm_eps", nn.EPS) != nn.EPS:
        raise Error(f"norm_eps={settings['norm_eps']}: the norms here have {nn.EPS}.")
    if not settings.get("rms_norm", True):
        raise Error("rms_norm=False: the norms here are RMS norms.")
    embedding = next(tensors[name] for name in EMBEDDING.values() if name in tensors)
    vocabulary = len(embedding)
    if settings.get("vocab_size", vocabulary) > vocabulary:
        raise Error(f"vocab_size={settings['vocab_size']}: the embedding has {vocabulary} rows.")
    layers = {name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}
    return {
        "n_layers": settings.get("n_layers", settings.get("n_layer", len(layers))),
        "d_input": vocabulary,
        "d_output": vocabulary,
        "tokens": True,
        "decoder": "lm",
        "tied": settings.get("tie_embeddings", True),
        "decoder_bias": False,
        "final_norm": True,
    }


def case_outputs(part, params, x, cfg, mixer_forward):
    """What the published cases have besides y and y_steps: the mixer's last states"""
    if part != "mixer":
        return {}
    last = mixer_state(mixer_forward(params, x, cfg)[1])
    return {"final_conv_state": last["conv"].swapaxes(1, 2), "final_ssm_state": last["ssm"]}
