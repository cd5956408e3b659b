"""TNN's Toeplitz coefficients as functions of relative position: the RPE, decay, activation.

    h = p_k W_pᵀ + b_p,  p_k = k, k/(L-1) or exp(k/(L-1))       position types 1, 2, 3           (2)
    h <- act(norm(h)) W_rᵀ + b_r  [+ h with residual]           for each of the n layers         (3)
    t_k = f(γ^|k| r_k),  r_k = act(norm(h)) W_tᵀ + b_t          decay, then the activation f     (4)
    γ = λ + (1 - λ) sigmoid(g)                                  a learned decay                  (5)
    ∂t_k/∂γ = |k| γ^|k| r_k f' / γ                                                               (9)

norm(h) = h / (|h|/sqrt(r) + 1e-8). Causal: t_k = 0 for k < 0. The paper and the equations (1) and
(6) to (8), which use the coefficients, are in ref/tnn.py.

    W_p, b_p   (r, 1), (r,)        r = rpe_dim, n = rpe_layers, E channels
    W_r, b_r   (n, r, r), (n, r)   (none if n = 0)
    W_t, b_t   (E, r), (E,)
    gamma      (E,)                use_decay: γ itself, not trained; use_multi_decay: g, and λ is
                                   cfg.gamma

All is in float64 whatever the precision. In float32, at L = 10⁴, coefficients would be off by 6e-7
and gradients by 6e-6, with a learned decay by 3e-5 and 1.5e-4.
"""

from ref import nn
from ref.backend import array_module

PARAMETERS = ("W_p", "b_p", "W_r", "b_r", "W_t", "b_t", "gamma")
HOMOGENEOUS = ("none", "relu", "leak")  # f(c t) = c f(t) for c > 0
ELU = {"elu": 0.0, "1+elu": 1.0, "2+elu": 2.0}
ACTIVATIONS = (*HOMOGENEOUS, "silu", "gelu", "sigmoid", "exp", *ELU)
LEAK = 0.01  # slope of leak below 0
TINY = 1e-300  # the least γ that is seen: 0 has no logarithm


def activation_forward(x, kind):
    """f(x) or act(x), by its published name.   elu(x) = x, or exp(x) - 1 where x < 0"""
    xp = array_module(x)
    if kind == "none":
        return x, (kind, None)
    if kind == "exp":
        y = xp.exp(x)
        return y, (kind, y)
    if kind == "leak":
        slope = LEAK + (1 - LEAK) * (x > 0).astype(x.dtype)
        return slope * x, (kind, slope)
    if kind in ELU:
        low = xp.minimum(x, 0)
        return xp.maximum(x, 0) + xp.expm1(low) + ELU[kind], (kind, xp.exp(low))
    y, cache = getattr(nn, f"{kind}_forward")(x)
    return y, (kind, cache)


def activation_backward(dy, cache):
    """dy -> dx"""
    kind, cache = cache
    if kind == "none":
        return dy
    if kind in ("exp", "leak", *ELU):
        return dy * cache  # the slope itself
    return getattr(nn, f"{kind}_backward")(dy, cache)


def positions(lags, L, cfg):
    """p_k of (2).   lags (n,) -> p (n,)"""
    if cfg.par_type == 1:
        return lags
    p = lags / max(1, L - 1)  # of L = 1 there is k = 0 alone
    return p if cfg.par_type == 2 else array_module(p).exp(p)


def rpe_forward(params, p, cfg):
    """(2), (3) and r of (4).   p (n,) -> r (n, E)"""
    h, first = nn.linear_forward(p[:, None], params["W_p"], params["b_p"])
    layers = []
    for W, b in zip(params.get("W_r", ()), params.get("b_r", ()), strict=True):
        a, layer = _layer_forward(h, W, b, cfg)
        h = h + a if cfg.residual else a
        layers.append(layer)
    r, last = _layer_forward(h, params["W_t"], params["b_t"], cfg)
    return r, (cfg, first, layers, last)


def rpe_backward(dr, cache):
    """dr (n, E) -> grads"""
    cfg, first, layers, last = cache
    grads, weights, biases = {}, [], []
    dh, grads["W_t"], grads["b_t"] = _layer_backward(dr, last)
    for layer in reversed(layers):
        da, dW, db = _layer_backward(dh, layer)
        dh = dh + da if cfg.residual else da
        weights.insert(0, dW)
        biases.insert(0, db)
    if layers:
        xp = array_module(dr)
        grads |= {"W_r": xp.stack(weights), "b_r": xp.stack(biases)}
    _, grads["W_p"], grads["b_p"] = nn.linear_backward(dh, first)
    return grads


def _layer_forward(h, W, b, cfg):
    """norm -> act -> linear.   h (n, r), W (o, r) -> (n, o)"""
    a, norm = nn.simple_rms_norm_forward(h)
    a, act = activation_forward(a, cfg.rpe_act)
    a, linear = nn.linear_forward(a, W, b)
    return a, (norm, act, linear)


def _layer_backward(da, cache):
    """da (n, o) -> dh, dW, db"""
    norm, act, linear = cache
    da, dW, db = nn.linear_backward(da, linear)
    return nn.simple_rms_norm_backward(activation_backward(da, act), norm), dW, db


def decay_rate(gamma, cfg):
    """γ, by (5) if it is learned.   gamma (E,) -> (E,)"""
    return cfg.gamma + (1 - cfg.gamma) * nn.sigmoid(gamma) if cfg.use_multi_decay else gamma


def decay_forward(r, gamma, lags, cfg):
    """γ^|k| r_k.   r (n, E), gamma (E,), lags (n,) -> (n, E)"""
    xp, rate = array_module(r), decay_rate(gamma, cfg)
    rate = xp.maximum(rate, TINY)
    powers = xp.exp(xp.abs(lags)[:, None] * xp.log(rate))
    y = powers * r
    return y, (cfg, gamma, rate, powers, y, lags)


def decay_backward(dy, cache):
    """dy (n, E) -> dr, dgamma (of a fixed decay None).   (9)"""
    cfg, gamma, rate, powers, y, lags = cache
    if not cfg.use_multi_decay:
        return dy * powers, None
    s, xp = nn.sigmoid(gamma), array_module(dy)
    drate = (xp.abs(lags)[:, None] * y * dy).sum(axis=0) / rate
    return dy * powers, drate * (1 - cfg.gamma) * s * (1 - s)


def coefficients_forward(params, L, cfg):
    """(2) to (5) for L positions.   -> t (E, L), or of both directions (E, 2L-1), t_0 at L-1"""
    xp, dtype = array_module(params["W_t"]), params["W_t"].dtype
    params = {name: params[name].astype("float64") for name in PARAMETERS if name in params}
    lags = xp.arange(0 if cfg.causal else 1 - L, L, dtype="float64")
    t, rpe = rpe_forward(params, positions(lags, L, cfg), cfg)
    decay = None
    if "gamma" in params:
        t, decay = decay_forward(t, params["gamma"], lags, cfg)
    t, act = activation_forward(t, cfg.act_type)
    return xp.ascontiguousarray(t.T).astype(dtype), (rpe, decay, act)


def coefficients_backward(dt, cache):
    """dt like t -> grads of the operator's trained parameters"""
    rpe, decay, act = cache
    dr, dgamma = activation_backward(dt.T.astype("float64"), act), None
    if decay:
        dr, dgamma = decay_backward(dr, decay)
    grads = rpe_backward(dr, rpe) | ({} if dgamma is None else {"gamma": dgamma})
    return {name: g.astype(dt.dtype) for name, g in grads.items()}
