"""The definition of a derivative, for every input and every parameter of every pair, each on its
own."""

import numpy as np

from ref import network, nn

STEP = 1e-4
TOLERANCE = 1e-8  # correct code stays below 1e-9; a planted fault is never below 1e-3


def directional_error(f, x, g, rng, step=STEP):
    """The error of the gradient g (like x) of the scalar function f at x (float64), along one
    random direction v.

    A four-point stencil, exact to step⁴, against <g, v>; normalised by |g| |v| / sqrt(size).
    """
    v = rng.standard_normal(x.shape)
    f1, f2, f3, f4 = (f(x + step * k * v) for k in (1, -1, 2, -2))
    slope = (8 * (f1 - f2) - (f3 - f4)) / (12 * step)
    scale = np.linalg.norm(g) * np.linalg.norm(v) / np.sqrt(g.size)
    return abs(slope - np.vdot(g, v).real) / (scale or 1.0)


def check_pair(forward, backward, arrays, seed=0):
    """name -> error, for a pair in terms of named arrays.

    forward(arrays) -> y, cache;   backward(dy, cache) -> {name: gradient} for every floating array
    """
    rng = np.random.default_rng([seed, 1])  # not the arrays' own stream: dy = x would hide a lot
    y, cache = forward(arrays)
    y = np.asarray(y)
    dy = rng.standard_normal(y.shape)
    if y.dtype.kind == "c":
        dy = dy + 1j * rng.standard_normal(y.shape)
    grads = backward(dy, cache)
    errors = {}
    for name, x in arrays.items():
        if x.dtype.kind not in "fc":
            continue
        g = np.asarray(grads[name])
        if g.shape != x.shape or g.dtype != x.dtype:
            errors[name] = np.inf
            continue

        def loss(moved, name=name):
            return np.vdot(dy, forward(arrays | {name: moved})[0]).real

        errors[name] = directional_error(loss, x, g, rng)
    return errors


# Configurations of the models that are checked: settings and length

_HOPE = {"d_model": 3, "d_state": 5, "convention": "lra", "dt_min": 0.1, "dt_max": 1.0}
_SSM = {"d_model": 3, "d_state": 4, "dt_min": 0.1, "dt_max": 1.0}
_ATTENTION = {"d_model": 6, "n_heads": 3, "d_mlp": 5, "block": 3, "depth": 2, "context": 12}
_TNN = {"d_model": 3, "expand_ratio": 1.7, "glu_dim": 4, "rpe_dim": 6, "rpe_layers": 2}
_TNN |= {"rpe_act": "silu", "gamma": 0.7}  # relu only where few numbers can come near its kink
_SCAN, _STEPS = {"d_model": 5, "d_state": 3}, {"dt_min": 0.1, "dt_max": 1.0}
_PUBLISHED = {"bidirectional": True, "layout": "published"}
_HYENA = {"d_model": 5, "l_max": 9, "filter_order": 4, "w": 2.0, "d_mlp": 7, "depth": 2}
_STUDENT = {"filter": "gated", "recurrence": "residual", "block": "bare"}
CONFIGURATIONS = {
    "longhorn": [
        (_SCAN | {"dropout": 0.3}, 7),
        (_SCAN | {"update": "exact"}, 9),
        (_SCAN | {"d_state": 1, "expand": 1, "d_conv": 1, "dt_rank": 2}, 10),
        (_SCAN, 2),
    ],
    "mamba": [
        (_SCAN | _STEPS | {"dropout": 0.3}, 7),
        (_SCAN | _STEPS | {"d_state": 1, "expand": 1, "d_conv": 1, "dt_rank": 2}, 10),
        (_SCAN | _STEPS, 2),
    ],
    "hope": [
        (_HOPE | {"bidirectional": True, "norm": "batch", "dropout": 0.3}, 7),
        (_HOPE | {"markov": "real", "prenorm": True}, 8),
        (_HOPE | {"conv": "causal", "norm": "rms", "prenorm": True}, 9),
        (_HOPE | {"conv": "causal", "markov": "real"}, 2),
        (_HOPE | {"d_state": 10, "convention": "minimal"} | _PUBLISHED, 8),
        (_HOPE | {"markov": "real"} | _PUBLISHED, 6),
        (_HOPE | {"conv": "identity"}, 7),
    ],
    "s4": [
        (_SSM | {"bidirectional": True, "norm": "batch", "dropout": 0.3}, 7),
        (_SSM | {"bidirectional": True, "l_max": 11}, 8),
        (_SSM | {"l_max": 9, "norm": "rms", "prenorm": True}, 9),
        (_SSM | {"l_max": 8}, 8),
        (_SSM, 2),
    ],
    "hyena": [
        (_HYENA | {"dropout": 0.3}, 7),
        (_HYENA | {"order": 3, "emb_dim": 5, "num_inner_mlps": 1, "shift": 0.05}, 9),
        (_HYENA | {"order": 4, "num_inner_mlps": 0, "short_filter_order": 1}, 5),
        (_HYENA | {"recurrence": "residual", "order": 1, "block": "bare", "dropout": 0.3}, 8),
        (_HYENA | _STUDENT | {"dropout": 0.3}, 9),
        (_HYENA | _STUDENT, 6),
        (_HYENA | {"filter": "gated", "order": 3}, 7),
        (_HYENA | {"l_max": 1}, 1),
        (_HYENA, 2),
    ],
    "s4d": [
        (_SSM | {"bidirectional": True, "norm": "batch", "dropout": 0.3}, 7),
        (_SSM | {"discretization": "bilinear", "prenorm": True}, 8),
        (_SSM | {"discretization": "bilinear", "bidirectional": True}, 2),
        (_SSM | {"init": "random", "norm": "rms", "prenorm": True}, 130),
        (_SSM, 1),
    ],
    "tnn": [
        (_TNN | {"bidirectional": True, "use_multi_decay": True, "dropout": 0.3}, 7),
        (_TNN | {"use_decay": True, "residual": True}, 8),
        (_TNN | {"use_multi_decay": True, "num_heads": 2, "act_type": "silu"}, 9),
        (_TNN | {"bidirectional": True, "par_type": 2, "rpe_layers": 0, "act_type": "gelu"}, 6),
        (_TNN | {"par_type": 3, "rpe_act": "gelu", "use_decay": True, "act_type": "sigmoid"}, 7),
        (_TNN | {"bidirectional": True, "par_type": 3, "act_type": "exp", "prenorm": False}, 5),
        (_TNN | {"use_multi_decay": True, "act_type": "1+elu", "glu_dim": 0}, 5),
        (_TNN | {"par_type": 2, "rpe_act": "none", "act_type": "leak"}, 5),
        (_TNN | {"rpe_act": "relu", "act_type": "elu"}, 3),
        (_TNN | {"use_multi_decay": True}, 1),
        (_TNN | {"bidirectional": True, "rpe_act": "relu"}, 2),
        (_TNN, 2),
    ],
    "transformer": [
        (_ATTENTION | {"bidirectional": True, "dropout": 0.3}, 7),
        (_ATTENTION | {"n_heads": 1, "block": 16}, 9),
        (_ATTENTION, 8),
        (_ATTENTION, 2),
    ],
}


# How far parameters are moved off their initial values; where gates and norms multiply many small
# ones, further, for else a gradient drowns in the rounding of the loss
NOISE = {"hyena": 0.2, "longhorn": 0.3, "mamba": 0.3, "tnn": 0.3}


def _moved(params, rng, model, layer):
    """params, all but constants moved upwards: no zeros, no variance below what it was"""
    far, moved = NOISE.get(model, 0.1), _trained(params, model, layer)
    return params | {n: p + far * np.abs(rng.standard_normal(p.shape)) for n, p in moved.items()}


# The layers of ref/nn.py: name -> (arrays, forward of them, names of the gradients that backward
# returns)


def nn_pairs(rng):
    """name -> (forward, backward, arrays); sizes odd and all different, no zeros"""
    B, L, D, E, V, K = 2, 7, 5, 3, 11, 4

    def normal(*shape):
        return rng.standard_normal(shape)

    x, lengths = normal(B, L, D), np.array([7, 3])
    targets = np.array([[1, 5, -1, 0, 10, 3, 2], [-1, 4, 4, 9, 8, 7, 6]])
    affine = {"x": x, "weight": 1 + 0.3 * normal(D), "bias": normal(D)}
    moments = {"mean": normal(D), "var": 1 + normal(D) ** 2}
    pairs = {
        "linear": ({"x": x, "W": normal(E, D), "b": normal(E)}, {}),
        "embedding": ({"W": normal(V, D)}, {"tokens": rng.integers(0, V, (B, L))}),
        "layer_norm": (affine, {}),
        "rms_norm": ({"x": x, "weight": affine["weight"]}, {}),
        "simple_rms_norm": ({"x": x}, {}),
        "batch_norm": (affine, moments | {"training": True}),
        "batch_norm in evaluation": (affine, moments | {"training": False}),
        "glu": ({"a": normal(B, L, 2 * D)}, {}),
        "dropout": ({"x": x}, {"p": 0.4, "rng": 1}),
        "dropout tied": ({"x": x}, {"p": 0.4, "rng": 1, "tied": True}),
        "short_conv": (
            {"x": x, "w": normal(D, 1, K), "b": normal(D), "before": normal(B, K - 1, D)},
            {},
        ),
        "spectral_conv": ({"x": x, "G": normal(L // 2 + 1, D) + 1j * normal(L // 2 + 1, D)}, {}),
        "fft_conv causal": ({"x": x, "k": normal(D, L)}, {"mode": "causal"}),
        "fft_conv causal short": ({"x": x, "k": normal(D, 3)}, {"mode": "causal"}),
        "fft_conv causal long": ({"x": x, "k": normal(D, L + 6)}, {"mode": "causal"}),
        "fft_conv circular": ({"x": x, "k": normal(D, 5)}, {"mode": "circular"}),
        "fft_conv two-sided": ({"x": x, "k": normal(D, 2 * L - 1)}, {"mode": "two-sided"}),
        "skip": ({"y": normal(B, L, D), "D": normal(D), "x": x}, {}),
        "gate": ({"y": x, "z": 2 * normal(B, L, D)}, {}),
        "mean_pool": ({"x": x}, {"lengths": lengths}),
        "mean_pool from a position on": ({"x": x}, {"lengths": lengths, "first": 2}),
        "last": ({"x": x}, {"lengths": lengths}),
        "softmax_cross_entropy": ({"logits": normal(B, L, V)}, {"targets": targets}),
    }
    for name, last in (("gru", False), ("gru last", True)):
        weights = {"W": normal(3 * E, D), "U": normal(3 * E, E), "b": normal(3 * E)}
        weights |= {"c": normal(3 * E), "h0": normal(B, E)}
        pairs[name] = {"x": x} | weights, {"last": last}
    weights = {"W": normal(4 * E, D), "U": normal(4 * E, E), "b": normal(4 * E)}
    lstm = {"x": normal(B, D), "state": normal(2, B, E)} | weights | {"c": normal(4 * E)}
    pairs["lstm_cell"] = lstm, {}
    far = np.array([0.3, -0.6, 0.5, 2.0, -3.1])  # on both sides of delta, none near it
    pairs["huber"] = {"y": x + far, "target": x + 0.01 * normal(B, L, D)}, {"delta": 1.2}
    for name in ("gelu", "gelu_tanh", "sigmoid", "silu", "softplus", "relu"):
        pairs[name] = ({"x": 2 * normal(B, L, D)}, {})
    return {name: _nn_pair(name, *pair) for name, pair in pairs.items()}


def _nn_pair(name, arrays, others):
    base = name.partition(" ")[0]

    def forward(arrays):
        dtype = next(iter(arrays.values())).dtype  # running moments follow the arrays
        floats = {n: v for n, v in others.items() if getattr(v, "dtype", None) == np.float64}
        given = others | {n: v.astype(dtype) for n, v in floats.items()}
        if "rng" in given:
            given["rng"] = np.random.default_rng(given["rng"])
        return getattr(nn, f"{base}_forward")(**arrays, **given)

    def backward(dy, cache):
        grads = getattr(nn, f"{base}_backward")(dy, cache)
        return dict(zip(arrays, grads if isinstance(grads, tuple) else (grads,), strict=True))

    return forward, backward, arrays


# Parts of models, in training mode: with dropout and batch statistics


def model_pairs(model, rng):
    """(label, forward, backward, arrays) of every configuration that the model names"""
    module = network.model_module(model)
    for settings, L in CONFIGURATIONS[model]:
        cfg = module.Config(**settings)
        usual = CONFIGURATIONS[model][-1][0]
        label = [f"{k}={v}" for k, v in settings.items() if usual.get(k) != v]
        label = ", ".join([*label, f"L={L}"])
        for part in ("operator", "mixer", "block"):
            params = getattr(module, f"{part}_init")(cfg, rng, "float64")
            params = _moved(params, rng, model, cfg)
            pair = _part_pair(module, part, cfg, params)
            x = rng.standard_normal((2, L, network.part_width(model, part, cfg)))
            yield f"{part}: {label}", *pair, _trained(params, model, cfg) | {"x": x}
        if hasattr(module, "scan_forward"):
            yield from _scan_pairs(module, cfg, label, L, rng)
            yield from _state_pairs(model, module, cfg, label, L, rng)
    yield from _network_pairs(model, module, rng)


def _scan_pairs(module, cfg, label, L, rng):
    """A scan with all of its arguments, the last state an output, and with those it must have"""
    arrays = module.scan_inputs(cfg, 2, L, rng)
    settings = {"update": cfg.update} if hasattr(cfg, "update") else {}
    optional = ("D", "z", "dt_bias", module.SCAN_STATE)

    def forward(arrays):
        y, last, cache = module.scan_forward(**arrays, **settings)
        return _joined(y, last), (cache, y.shape, last.shape)

    def backward(dout, cache):
        cache, *shapes = cache
        dy, dlast = _cut(dout, shapes)
        return module.scan_backward(dy, cache, dlast)

    yield f"scan: {label}", forward, backward, arrays
    needed = {n: a for n, a in arrays.items() if n not in optional}
    yield f"scan, bare: {label}", forward, backward, needed


def _state_pairs(model, module, cfg, label, L, rng):
    """Mixer and block from a state to a state"""
    for part in ("mixer", "block"):
        params = getattr(module, f"{part}_init")(cfg, rng, "float64")
        params = _moved(params, rng, model, cfg)
        state = module.state(params, cfg, 2)
        state = {f"state.{n}": rng.standard_normal(a.shape) for n, a in state.items()}
        after = module.mixer_state if part == "mixer" else module.final_state

        def forward(arrays, part=part, params=params, state=state, after=after):
            given, before = {n: arrays[n] for n in params}, {n[6:]: arrays[n] for n in state}
            run = getattr(module, f"{part}_forward")
            y, cache = run(given, arrays["x"], cfg, np.random.default_rng(1), before)
            last = after(cache)
            shapes = y.shape, last["conv"].shape, last["ssm"].shape
            return _joined(y, last["conv"], last["ssm"]), (cache, shapes)

        def backward(dout, cache, part=part):
            cache, shapes = cache
            dy, dconv, dssm = _cut(dout, shapes)
            run = getattr(module, f"{part}_backward")
            dx, grads = run(dy, cache, {"conv": dconv, "ssm": dssm})
            return grads | {"x": dx}

        x = rng.standard_normal((2, L, cfg.d_model))
        yield f"{part} with states: {label}", forward, backward, params | state | {"x": x}


def _joined(*outputs):
    return np.concatenate([y.ravel() for y in outputs])


def _cut(dout, shapes):
    """The inverse of _joined"""
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    return [d.reshape(s) for d, s in zip(np.split(dout, ends[:-1]), shapes, strict=True)]


def _part_pair(module, part, cfg, params):
    def forward(arrays):
        extra = () if part == "operator" else (np.random.default_rng(1),)
        given = {n: arrays.get(n, p) for n, p in params.items()}
        return getattr(module, f"{part}_forward")(given, arrays["x"], cfg, *extra)

    def backward(dy, cache):
        dx, grads = getattr(module, f"{part}_backward")(dy, cache)
        return _with_moments(params, grads) | {"x": dx}

    return forward, backward


def _network_pairs(model, module, rng):
    settings, L = CONFIGURATIONS[model][0]
    causal = next((s for s, _ in CONFIGURATIONS[model] if module.Config(**s).causal), None)
    kinds = [
        ("mean", settings, {"pool_from": 2}),
        ("last", settings, {"tokens": False}),
        ("match", settings, {"positions": L + 2}),
    ]
    if causal:
        kinds += [("lm", causal, {"d_output": 6, "tied": True}), ("lm", causal, {})]
    for decoder, layer, extra in kinds:
        own = {"n_layers": 2, "d_input": 6, "d_output": 4, "decoder": decoder} | extra
        cfg = network.Config(model, module.Config(**layer), **own, final_norm=True)
        params = network.init(cfg, rng, "float64")
        params = _moved(params, rng, model, cfg.layer)
        x = rng.integers(0, 6, (2, L)) if cfg.tokens else rng.standard_normal((2, L, 6))
        lengths = None if decoder == "lm" else np.array([L, L - 2])

        def forward(arrays, cfg=cfg, params=params, lengths=lengths):
            given = {n: arrays.get(n, p) for n, p in params.items()}
            return network.forward(given, arrays["x"], cfg, lengths, np.random.default_rng(1))

        def backward(dy, cache, params=params):
            dx, grads = network.backward(dy, cache)
            return _with_moments(params, grads) | {"x": dx}

        trained = _trained(params, model, cfg.layer)
        yield f"network: {decoder}, {extra}", forward, backward, trained | {"x": x}


def _trained(params, model, layer):
    """The params without the model's constants"""
    return {n: p for n, p in params.items() if not network.is_buffer(n, model, layer)}


def _with_moments(params, grads):
    """Running moments take no part in training mode: their derivative is zero"""
    moments = {n: np.zeros_like(p) for n, p in params.items() if n.endswith(("_mean", "_var"))}
    return moments | grads


def errors_of(name, seed=0):
    """(label, {array: error}) for every pair of a model, or of ref/nn.py when name is 'nn'"""
    rng = np.random.default_rng(seed)
    if name == "nn":
        for label, (forward, backward, arrays) in nn_pairs(rng).items():
            yield label, check_pair(forward, backward, arrays, seed)
    else:
        for label, forward, backward, arrays in model_pairs(name, rng):
            yield label, check_pair(forward, backward, arrays, seed)
