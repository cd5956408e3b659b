"""Hyena's long filters: functions of time made by a small MLP of sines, or free and gated.

    z_j = [τ, cos(f w), -sin(f w)],  τ = j/(l_max-1),  w = 2πj/l_max                             (4)
    h = sin(ω (... sin(ω (z F_0ᵀ + c_0)) ...)) F_nᵀ              implicit filter, section 3.3    (5)
    k = h (exp(-t |δ|) + shift)                                  its window                      (6)
    k = g h / (Σ_time |g h| + 1e-6),  g = sigmoid(W_g h + b_g)   gated filter, h free            (7)

f are b frequencies from 1e-4 to b - 1, e = 2b + 1. The papers, the letters and where the equations
(1) to (3) and (8) are: ref/hyena.py.

    parameter              shape
    z                      (l_max, e)         starts as (4), trained at a rate of 1e-5
    F_0 .. F_n, c_0 ..     (W, e), (W, W) .., (F D, W), no c_n;  filter after filter
    freq                   (W,)               ω of all sines
    t, deltas              (l_max,), (F D,)   buffers: t is τ of (4); δ of (6)
    h                      (F, D, l_max)      gated: instead of the last four rows
    W_g, b_g               (D, D), (D,)

Filters end at l_max. A shorter input of length L sees their first L rows. The norm in (7) then runs
over these, so that a gated filter of L taps is another one than the first L taps of l_max.
"""

import math

import numpy as np

from ref import Error, nn
from ref.backend import array_module


def shapes(cfg):
    """name -> shape of the filters' parameters"""
    F, D, L, e, W = cfg.filters, cfg.d_model, cfg.l_max, cfg.emb_dim, cfg.filter_order
    if cfg.filter == "gated":
        return {"h": (F, D, L), "W_g": (D, D), "b_g": (D,)}
    own, n = {"z": (L, e), "t": (L,), "deltas": (F * D,), "freq": (W,)}, cfg.num_inner_mlps + 1
    for i in range(n):
        own |= {f"F_{i}": (W, W if i else e), f"c_{i}": (W,)}
    return own | {f"F_{n}": (F * D, W)}


def init(cfg, rng):
    """(4); h normal; linear layers uniform in ±1/sqrt(inputs).   -> params, float64"""
    params = {}
    for name, shape in shapes(cfg).items():
        if name[:2] in ("F_", "W_"):
            r = 1 / math.sqrt(shape[1])
        if name[:2] in ("F_", "W_", "c_", "b_"):  # a bias follows its weight
            params[name] = rng.uniform(-r, r, shape)
    if cfg.filter == "gated":
        return params | {"h": rng.standard_normal((cfg.filters, cfg.d_model, cfg.l_max))}
    params |= {"z": positions(cfg.l_max, cfg.emb_dim), "t": np.linspace(0, 1, cfg.l_max)}
    ends = (math.log(cfg.target) / pct for pct in (cfg.slow_decay_pct, cfg.fast_decay_pct))
    params["deltas"] = np.linspace(*ends, cfg.filters * cfg.d_model)
    return params | {"freq": np.full(cfg.filter_order, cfg.w)}


def positions(L, e):
    """(4).   -> z (L, e), float64"""
    j, bands = np.arange(L)[:, None], (e - 1) // 2
    angle = np.linspace(1e-4, bands - 1, bands) * (2 * math.pi * j / L)
    return np.concatenate([j / max(1, L - 1), np.cos(angle), -np.sin(angle)], axis=1)


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
    """The filters that an input of length L sees.   -> k (F, D, L)   Error: L is beyond l_max"""
    check_length(cfg, L)
    if cfg.filter == "implicit":
        return implicit_forward(params, L, cfg)
    return gated_forward(params, L)


def filter_backward(dk, cache):
    """dk (F, D, L) -> grads"""
    implicit = len(cache) == 3
    return implicit_backward(dk, cache) if implicit else gated_backward(dk, cache)


def check_length(cfg, L):
    """Error: the filters are shorter than L, or their length is not known"""
    if not cfg.l_max:
        raise Error("l_max=0 stands for the data's length: give l_max, where the filters end.")
    if cfg.l_max < L:
        raise Error(
            f"the filters end at l_max={cfg.l_max}, and the input is {L} long: give a shorter one, "
            "or train with a larger l_max."
        )
