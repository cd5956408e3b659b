"""`python -m ref info`: what a model's block holds and what it costs."""

import math

import numpy as np

from ref import Error, network


def describe(model, settings, L):
    """Parameters, decoding state, operations and bytes per token of a block, as text"""
    module = network.model_module(model)
    cfg = module.Config(**settings)
    params = module.block_init(cfg, np.random.default_rng(0), "float32")
    total = sum(p.size for p in params.values())
    lines = [f"{model}: {_title(module)}", f"settings: {cfg}", "", f"parameters: {total:,}"]
    lines += [f"    {name:12} {p.shape!s:16} {p.size:>12,}" for name, p in params.items()]
    lines += ["", f"operations per token, forward, L = {L:,}:"]
    lines += [f"    {n:>14,.0f}  {what}" for what, n in COSTS[model](cfg, L).items()]
    try:
        state = module.state(params, cfg, 1)
    except Error as e:
        return "\n".join([*lines, "", f"decoding: {e}"])
    floats = sum(math.prod(s.shape) for s in state.values())
    moved = 4 * (total + 2 * floats)
    lines += [
        "",
        f"decoding state of a sequence: {floats:,} numbers, {4 * floats:,} bytes in float32",
        f"bytes per token, decoding, batch 1, float32: {moved:,} (parameters once, state twice)",
    ]
    return "\n".join(lines)


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


COSTS = {"hope": _hope_costs}
