"""`python -m ref info`: what a model's block holds and what it costs."""

import dataclasses
import math

import numpy as np

from ref import Error, etsc, network, presets, selective


def describe(model, settings, L):
    """Parameters, decoding state, operations and bytes per token of a block, as text"""
    module = network.model_module(model)
    cfg = module.Config(**settings)
    if getattr(cfg, "l_max", None) == 0:
        cfg = dataclasses.replace(cfg, l_max=L)
    params = module.block_init(cfg, np.random.default_rng(0), "float32")
    total = sum(p.size for p in params.values())
    lines = [f"{model}: {_title(module)}", f"settings: {cfg}", "", f"parameters: {total:,}"]
    lines += [f"    {name:12} {p.shape!s:16} {p.size:>12,}" for name, p in params.items()]
    lines += ["", f"operations per token, forward, L = {L:,}:"]
    lines += [f"    {n:>14,.0f}  {what}" for what, n in COSTS[model](cfg, L).items()]
    return "\n".join([*lines, "", *_decoding(module, params, cfg, total), "", *_recipes(model)])


def _decoding(module, params, cfg, total):
    try:
        state = module.state(params, cfg, 1)
    except Error as e:
        return [f"decoding: {e}"]
    own, filters = _numbers(state), state.get("systems", ())
    moved = 4 * (total + 2 * own)
    lines = [
        f"decoding state of a sequence: {own:,} numbers, {4 * own:,} bytes in float32",
        f"bytes per token, decoding, batch 1, float32: {moved:,} (parameters once, state twice)",
    ]
    for system in filters:
        costs = {name: len(system.b) * n for name, n in etsc.cost(system).items()}
        lines.append(
            f"a filter of it, converted for {system.horizon:,} positions: {costs['states']:,} "
            f"numbers, {costs['bytes']:,} bytes per token with its coefficients; as a ring buffer "
            f"{costs['ring_states']:,} and {costs['ring_bytes']:,}"
        )
    return lines


def _numbers(state):
    """Real numbers in a decoding state, but for the coefficients of converted filters"""
    if isinstance(state, dict):
        return sum(_numbers(own) for name, own in state.items() if name != "systems")
    if isinstance(state, (list, tuple)):
        return sum(map(_numbers, state))
    if not hasattr(state, "shape"):
        return 0
    return math.prod(state.shape) * (2 if state.dtype.kind == "c" else 1)


def _recipes(model):
    """What --preset sets, for each data set"""
    lines = [
        "recipes of train.py (--preset small is for any data set, paper is the published one):"
    ]
    for data in presets.small_data_sets():
        for name in presets.PRESETS:
            if name == "small" or data in presets.published(model):
                chosen = presets.preset(model, data, name)
                lines.append(f"    {data}, {name}: {_options(chosen)}")
    return lines


def _options(chosen):
    return " ".join(
        f"--{'' if v is not False else 'no-'}{n.replace('_', '-')}"
        + (f" {v}" if not isinstance(v, bool) else "")
        for n, v in chosen.items()
    )


def _title(module):
    return " ".join(module.__doc__.split("\n\n")[0].split())


def _hope_costs(cfg, L):
    """Operations per token of the block: what -> number"""
    D, directions, bins = cfg.d_model, 2 if cfg.bidirectional else 1, L // 2 + 1
    costs = {"projection and gate": 4 * D * D + 20 * D, "norm, residual, skip": 10 * D}
    if cfg.conv == "identity":
        return costs
    if cfg.conv == "causal":
        kernel, points = 6 * cfg.n * D, 2 * L
        costs["one step of the recurrence, instead of the two below"] = 6 * cfg.n * D
    else:
        kernel, points = 8 * cfg.n * D * directions * bins / L, L
    fft = 2.5 * points * math.log2(max(points, 2))
    costs["kernel, divided by the batch size"] = kernel
    return costs | {"FFT convolution": (2 * fft + 6 * bins) * D / L}


def _ssm_costs(cfg, L):
    """S4D's; S4's kernel has 2d+2 Cauchy sums at the nodes instead"""
    D, N, directions = cfg.d_model, cfg.d_state, 2 if cfg.bidirectional else 1
    fft = 2.5 * 2 * L * math.log2(2 * L)
    costs = {"projection and gate": 4 * D * D + 20 * D, "norm, residual, skip": 10 * D}
    low_rank = hasattr(cfg, "l_max")
    if cfg.causal:
        step = (20 if low_rank else 7) * N * D
        costs["one step of the recurrence, instead of the two below"] = step
    kernel = 2 * N * D * directions
    if low_rank:
        nodes = (cfg.l_max or L) // 2 + 1
        kernel = (15 + 8 * (2 * directions + 2)) * N / 2 * D * nodes / L
    costs["kernel, divided by the batch size"] = kernel
    return costs | {"FFT convolution": (2 * fft + 6 * L) * D / L}


def _hyena_costs(cfg, L):
    """A sine, exponential or sigmoid counts as 10 operations"""
    D, O, F, W = cfg.d_model, cfg.order, cfg.filters, cfg.filter_order
    M, fft = cfg.d_mlp or 4 * D, 2.5 * 2 * L * math.log2(2 * L)
    layers = cfg.emb_dim * W + cfg.num_inner_mlps * W * W + W * F * D
    filters = 2 * layers + 10 * (cfg.num_inner_mlps + 1) * W + 12 * F * D
    costs = {
        "projections": 2 * (O + 1) * D * D + 2 * D * D,
        "short convolution": (2 * cfg.short_filter_order + 1) * (O + 1) * D,
        "gates": (O + 2 * F) * D,
        "one step of the recurrence, instead of the two below": 5 * (cfg.l_max or L) * F * D,
        "filters, divided by the batch size": (2 * D + 16) * F * D,
    }
    if cfg.filter == "implicit":
        costs["filters, divided by the batch size"] = filters
    costs["FFT convolutions"] = (2 * fft + 6 * L) * F * D / L
    if cfg.block == "bare":
        return costs | {"residual": D}
    return costs | {"MLP": 4 * D * M + 15 * M, "norms, residuals": 18 * D}


def _tnn_costs(cfg, L):
    """A power or an exponential counts as 10 operations"""
    D, E, G, directions = cfg.d_model, cfg.width, cfg.glu_dim or cfg.d_model, 1 + cfg.bidirectional
    r = cfg.rpe_dim or max(D // 8, 32)
    decay = 12 if cfg.use_decay or cfg.use_multi_decay else 0
    fft = 2.5 * 2 * L * math.log2(2 * L)
    costs = {"projections and gate": 6 * D * E + 40 * E}
    if cfg.causal:
        step = 5 * (cfg.l_max or L) * E
        costs["one step of the recurrence, instead of the two below"] = step
    coefficients = 2 * r * (1 + cfg.rpe_layers * r + E) + 5 * (1 + cfg.rpe_layers) * r + decay * E
    costs["coefficients, divided by the batch size"] = directions * coefficients
    costs["FFT convolution"] = (2 * fft + 6 * L) * E / L
    return costs | {"GLU": 6 * D * G + 20 * G, "norms, residuals": 12 * D}


def _attention_costs(cfg, L):
    D, M = cfg.d_model, cfg.d_mlp or 4 * cfg.d_model
    keys = (L + 1) / 2 if cfg.causal else L
    return {
        "projections": 8 * D * D,
        "attention": (4 * D + 6 * cfg.n_heads) * keys,
        "MLP": 4 * D * M + 15 * M,
        "norms, residuals": 18 * D,
    }


def _scan_costs(cfg, L):
    """An exponential of Mamba's counts as 10 operations"""
    (E, R), D, N = selective.sizes(cfg), cfg.d_model, cfg.d_state
    one = 10 + 6 if hasattr(cfg, "dt_min") else 7
    return {
        "projections": 6 * D * E + 2 * E * (2 * R + 2 * N),
        "short convolution": (2 * cfg.d_conv + 1) * E,
        "scan, which is one step of the recurrence too": (one * N + 10) * E,
        "gate, activations": 20 * E,
        "norm, residual": 6 * D,
    }


COSTS = {
    "hope": _hope_costs,
    "hyena": _hyena_costs,
    "longhorn": _scan_costs,
    "mamba": _scan_costs,
    "s4": _ssm_costs,
    "s4d": _ssm_costs,
    "tnn": _tnn_costs,
    "transformer": _attention_costs,
}
