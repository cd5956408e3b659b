"""The recurrent form of a network whose blocks convolve with long filters: every filter as a
diagonal state-space model (ref.etsc), and what that costs a token beside the ring buffer of the
last inputs, which is exact too."""

import json
import math
import time

import numpy as np

from ref import Error, backend, etsc, files, network, presets, ssm

METHODS = ("exact", "hankel", "adam")
FORMAT = "ref-systems-1"
PROBE = 512  # tokens that the converted network is compared with the convolution on


def systems(params, cfg, method="exact", horizon=None, **how):
    """For each block the etsc.System of each of its long filters; for network.state.

    horizon: how many positions can be decoded; None: what the layer was trained for (its l_max)
    how: what etsc.to_ssm takes, such as rank or tol

    Error: the model has no causal long filter, none that is defined so far, or no l_max
    """
    model = network.model_module(cfg.model)
    if not hasattr(model, "kernels"):
        raise Error(f"{cfg.model} has no long convolution: there is nothing to convert.")
    horizon = getattr(cfg.layer, "l_max", 0) if horizon is None else horizon
    if horizon < 1:
        raise Error("a conversion needs a horizon, the number of positions that are to be decoded.")
    return [
        layer_systems(model, network.layer_params(params, i), cfg.layer, method, horizon, **how)
        for i in range(cfg.n_layers)
    ]


def layer_systems(model, params, layer, method, horizon, **how):
    """The etsc.System of each long filter of one block; model is its module"""
    if getattr(layer, "bidirectional", False):
        raise Error("bidirectional=True sees all of a sequence: it has no recurrent form.")
    gamma = None
    if hasattr(model, "coefficients"):
        filters, gamma = model.coefficients(params, layer, horizon)
    else:
        filters = model.kernels(params, layer, horizon)
    return tuple(etsc.to_ssm(t, gamma, method, horizon, **how) for t in filters)


def for_decoding(params, cfg, method, positions, horizon=None, **how):
    """The systems that so many positions are decoded by, or None: by the model's own form.

    method auto: its own form where it has one, else exact; one of METHODS: converted
    horizon None: as many positions as are needed, or as the filters are defined for
    Error: as of `systems`
    """
    model = network.model_module(cfg.model)
    if method == "auto":
        if not hasattr(model, "CONVERTED"):
            return None
        method = "exact"
    if horizon is None:
        trained = getattr(cfg.layer, "l_max", 0)
        horizon = trained if hasattr(model, "BOUNDED") else max(trained, positions)
    return systems(params, cfg, method, horizon, **how)


def horizon(state):
    """The least horizon of a network's decoding state; infinite where nothing is converted"""
    own = [block.get("systems", ()) for block in state["blocks"]]
    return min((system.horizon for filters in own for system in filters), default=math.inf)


# The command


def convert(run, method, horizon, output, dtype=None, **how):
    """`python -m ref convert`: print what each filter of a run's language model becomes, what that
    costs, and how far the converted network is from the convolution; with output write the systems

    Error: no such run, one of no language model, or as of `systems`
    """
    from ref import generate  # it imports this module

    params, cfg, vocabulary = generate.load(run, dtype)
    if horizon is None:
        horizon = presets.read_settings(run / "config.json")["max_length"]
    layers = systems(params, cfg, method, horizon, **how)
    total = sum(p.size for p in params.values())
    print(f"{run}: {cfg.model}, {cfg.n_layers} layers, {total:,} parameters, {method}")
    for line in table(layers):
        print(line)
    length, alone = _length(cfg, layers)
    if alone:
        print(f"the filters depend on an input's length: this is the map of {length:,} positions")
    if output is not None:
        write(output, layers)
        print(output)
    backend.set_threads(1)  # one token's work is too small to be shared out
    for line in whole(params, cfg, layers, len(vocabulary), length):
        print(line)


def _length(cfg, layers):
    """-> positions of an input whose convolution the systems are, and whether of no other's"""
    model, horizon = network.model_module(cfg.model), layers[0][0].horizon
    if not (hasattr(model, "depends_on_length") and model.depends_on_length(cfg.layer)):
        return min(horizon, cfg.positions or horizon), False
    return (cfg.layer.l_max if hasattr(model, "BOUNDED") else horizon), True


COLUMNS = (
    ("filter", 6),
    ("channels", 8),
    ("horizon", 7),
    ("states", 6),
    ("error", 7),
    ("sup", 7),
    ("bound", 7),
    ("bytes", 10),
    ("of ring", 10),
    ("operations", 10),
    ("of ring", 10),
)


def table(layers):
    """Lines of text: each filter's size, errors (the worst channel's) and cost per token"""
    yield ""
    yield "  ".join(f"{name:>{width}}" for name, width in COLUMNS)
    for i, filters in enumerate(layers):
        for j, system in enumerate(filters):
            cells = f"{i}.{j}", *_cells(system)
            yield "  ".join(f"{c:>{width}}" for c, (_, width) in zip(cells, COLUMNS, strict=True))
    yield ""
    yield "filter: layer and filter; states: real numbers that a channel keeps, the most of any;"
    yield "error: |k - t| / |t| over the horizon, of the worst channel; sup: that of the transfer"
    yield "function, absolute, and the bound by the discarded singular values, both of the channel"
    yield "where sup is nearest to its bound or most above it; the bound is that of balanced"
    yield "truncation (triangle) before the residues are fitted, and a guide for the rectangle;"
    yield "bytes and operations per token, of all channels, beside those of a ring buffer of the"
    yield "last `horizon` inputs, which is exact too."
    yield ""


def _cells(system):
    cost, error = etsc.cost(system), backend.to_host(system.error)
    if system.bound is None:
        sup = bound = "-"
    else:
        bounds, sups = backend.to_host(system.bound), backend.to_host(system.sup_error)
        worst = int((sups / np.maximum(bounds, 1e-300)).argmax())
        bound, sup = f"{bounds[worst]:.1e}", f"{sups[worst]:.1e}"
    channels = len(system.b)
    yield from (f"{channels:,}", f"{system.horizon:,}", f"{cost['states']:,}")
    yield from (f"{error.max():.1e}", sup, bound)
    for what in ("bytes", "ring_bytes", "operations", "ring_operations"):
        yield f"{channels * cost[what]:,}"


def whole(params, cfg, layers, vocabulary, length):
    """Lines of text: the converted network's logits beside those of the convolution of so many
    positions, and its speed"""
    x = np.random.default_rng(0).integers(0, vocabulary, (1, length))
    L = min(PROBE, length, *(system.horizon for filters in layers for system in filters))
    longer, longer_cfg = network.stretch(params, cfg, length)
    expected, _ = network.forward(longer, x, longer_cfg, where=np.arange(length)[None] < L)
    state, worst, times = network.state(params, cfg, 1, layers), 0.0, []
    for t in range(L):
        began = time.perf_counter()
        y, state = network.step(params, x[:, t], state, cfg)
        times.append(time.perf_counter() - began)
        worst = max(worst, float(np.abs(y - expected[t]).max()))
    worst /= float(np.abs(expected).max())
    precision = params["encoder.weight"].dtype
    yield (
        f"logits of {L:,} random tokens, step by step: at most {worst:.1e} of the largest logit "
        f"away from the convolution's ({precision})"
    )
    yield f"{1 / np.median(times):,.0f} tokens a second"


def write(path, layers):
    """The systems as a safetensors file: LAYER.FILTER.lam, .b (C, n, 2) as (re, im), and .d (C,)"""
    tensors, horizons = {}, {}
    for i, filters in enumerate(layers):
        for j, system in enumerate(filters):
            own = {"lam": ssm.as_pairs(system.lam), "b": ssm.as_pairs(system.b), "d": system.d}
            tensors |= {
                f"{i}.{j}.{n}": np.ascontiguousarray(backend.to_host(t)) for n, t in own.items()
            }
            horizons[f"{i}.{j}"] = system.horizon
    head = {"format": FORMAT, "method": layers[0][0].method, "horizon": horizons}
    files.write_tensors(path, tensors, {"systems": json.dumps(head)})
