"""Hyena's tangents, for the products with second derivatives in ref/tangents.py. There are the
notation and the formulas of the shared layers, the equations in ref/hyena.py, ref/hyena_filters.py.

    y = sin(f x)          ty = c e,  e = tf x + f tx,  c = cos(f x)                              (5)
                          s = dy c,  ts = tdy c - dy y e:  tdx = ts f + s tf,  tdf = Σ ts x + s tx
    k = p / S,  p = g h   tS = Σ_time sign(p) tp,  tk = (tp - k tS) / S                          (7)
    S = Σ_time |p| + ..   m = Σ_time dk k:  dp = (dk - sign(k) m) / S,
                          tdp = (tdk - sign(k) tm - dp tS) / S;  the sign is constant

The recurrences (2), (3) are products and convolutions. The window (6) is a constant: its buffers
have neither gradient nor tangent.
"""

from ref import block, hyena, hyena_filters, nn, tangents
from ref.backend import array_module


def shapes(cfg):
    """name -> shape of a block's trained parameters"""
    D, C, K = cfg.d_model, hyena.operator_width(cfg), cfg.short_filter_order
    own = {"W_in": (C, D), "b_in": (C,), "conv_weight": (C, 1, K), "conv_bias": (C,)}
    own |= {"W_out": (D, D), "b_out": (D,), "B": (cfg.filters, D)} | hyena_filters.shapes(cfg)
    if cfg.block == "prenorm":
        own |= block.mlp_block_shapes(D, cfg.d_mlp or 4 * D)
    return {name: shape for name, shape in own.items() if name not in hyena.buffers(cfg)}


# Filters


def sine_tangent(tx, tfreq, cache):
    """tx (..., W), tfreq (W,) -> ty"""
    x, freq = cache
    inside = tfreq * x + freq * tx
    return array_module(x).cos(freq * x) * inside, (tx, tfreq, inside)


def sine_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (..., W) -> dx, tdx, tdfreq"""
    (x, freq), (tx, tfreq, inside) = cache, tcache
    xp = array_module(x)
    c = xp.cos(freq * x)
    slope, tslope = dy * c, tdy * c - dy * xp.sin(freq * x) * inside
    tdx = tslope * freq + slope * tfreq
    return slope * freq, tdx, nn.sum_rows(tslope * x + slope * tx)


def sine_mlp_tangent(tparams, tz, cache):
    """(5).   tz (L, e) -> th (L, F D)"""
    layers, last = cache
    ts, tlayers, n = tz, [], len(layers)
    for i, (linear, sine) in enumerate(layers):
        ts, tlinear = tangents.linear_tangent(ts, tparams[f"F_{i}"], tparams[f"c_{i}"], linear)
        ts, tsine = sine_tangent(ts, tparams["freq"], sine)
        tlayers.append((tlinear, tsine))
    th, tlast = tangents.linear_tangent(ts, tparams[f"F_{n}"], None, last)
    return th, (tlayers, tlast)


def sine_mlp_backward_tangent(dh, tdh, cache, tcache):
    """dh, tdh (L, F D) -> tdz, tangents of the grads"""
    (layers, last), (tlayers, tlast) = cache, tcache
    n, own, tdfreq = len(layers), {}, 0
    ds, tds, own[f"F_{n}"], _ = tangents.linear_backward_tangent(dh, tdh, last, tlast)
    for i in reversed(range(n)):
        (linear, sine), (tlinear, tsine) = layers[i], tlayers[i]
        ds, tds, of_freq = sine_backward_tangent(ds, tds, sine, tsine)
        ds, tds, *of_linear = tangents.linear_backward_tangent(ds, tds, linear, tlinear)
        own[f"F_{i}"], own[f"c_{i}"] = of_linear
        tdfreq = tdfreq + of_freq
    return tds, own | {"freq": tdfreq}


def implicit_tangent(tparams, cache):
    """(5), (6).   -> tk (F, D, L)"""
    mlp, (window,), _ = cache
    th, tmlp = sine_mlp_tangent(tparams, tparams["z"][: len(window)], mlp)
    F, D = tparams["B"].shape
    tk = array_module(th).ascontiguousarray((th * window).T).reshape(F, D, -1)
    return tk, (tmlp,)


def implicit_backward_tangent(dk, tdk, cache, tcache):
    """dk, tdk (F, D, L) -> tangents of the grads"""
    (mlp, (window,), shape), (tmlp,) = cache, tcache
    dh, tdh = (d.reshape(-1, d.shape[2]).T * window for d in (dk, tdk))
    reached, own = sine_mlp_backward_tangent(dh, tdh, mlp, tmlp)
    tdz = array_module(dk).zeros(shape, dtype=dk.dtype)
    tdz[: len(reached)] = reached
    return own | {"z": tdz}


def gated_tangent(tparams, cache):
    """(7).   -> tk (F, D, L)"""
    _, h, W_g, g, sigmoid, total, k = cache
    th, tW_g = tparams["h"][:, :, : h.shape[2]], tparams["W_g"]
    ta = tW_g @ h + W_g @ th + tparams["b_g"][:, None]
    tg, tsigmoid = tangents.sigmoid_tangent(ta, sigmoid)
    tp = tg * h + g * th
    ttotal = (array_module(h).sign(k) * tp).sum(axis=2, keepdims=True)
    tk = (tp - k * ttotal) / total
    return tk, (th, tW_g, tg, tsigmoid, ttotal, tk)


def gated_backward_tangent(dk, tdk, cache, tcache):
    """dk, tdk (F, D, L) -> tangents of the grads"""
    (shape, h, W_g, g, sigmoid, total, k), (th, tW_g, tg, tsigmoid, ttotal, tk) = cache, tcache
    xp = array_module(dk)
    sign, m = xp.sign(k), (dk * k).sum(axis=2, keepdims=True)
    tm = (tdk * k + dk * tk).sum(axis=2, keepdims=True)
    dp = (dk - sign * m) / total
    tdp = (tdk - sign * tm - dp * ttotal) / total
    dg, _, tdg, tdh = tangents.product_backward_tangent(dp, tdp, (g, h), (tg, th))
    da, tda = tangents.sigmoid_backward_tangent(dg, tdg, sigmoid, tsigmoid)
    whole = xp.zeros(shape, dtype=dk.dtype)
    whole[:, :, : h.shape[2]] = tdh + W_g.T @ tda + tW_g.T @ da
    tdW_g = (tda @ h.swapaxes(1, 2) + da @ th.swapaxes(1, 2)).sum(axis=0)
    return {"h": whole, "W_g": tdW_g, "b_g": tda.sum(axis=2).sum(axis=0)}


# Recurrences; a step's tangents are those of the product's factors, and the convolution's


def long_conv_tangent(tx, tk, tb, cache):
    """tx (B, L, D), tk (D, L), tb (D,) -> ty (B, L, D)"""
    conv, skip = cache
    ty, tconv = tangents.fft_conv_tangent(tx, tk, conv)
    ty, tskip = tangents.skip_tangent(ty, tb, tx, skip)
    return ty, (tconv, tskip)


def long_conv_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> dx, dk, tdx, tdk, tdb"""
    (conv, skip), (tconv, tskip) = cache, tcache
    dx_skip, tdb, tdx_skip = tangents.skip_backward_tangent(dy, tdy, skip, tskip)
    dx, dk, tdx, tdk = tangents.fft_conv_backward_tangent(dy, tdy, conv, tconv)
    return dx + dx_skip, dk, tdx + tdx_skip, tdk, tdb


def standard_tangent(tgates, tv, tk, tB, cache):
    """(2).   tgates: of x_0 .. x_{O-1}, tv (B, L, D), tk (F, D, L), tB (F, D) -> ty (B, L, D)"""
    v, gate, steps = cache
    tsteps = []
    for o, ((before, own, drop, conv), tgate) in enumerate(
        zip(steps, reversed(tgates[1:]), strict=True)
    ):
        ta = tangents.dropout_tangent(tv * own + before * tgate, drop)
        tc, tconv = long_conv_tangent(ta, tk[o], tB[o], conv)
        tsteps.append(((tv, tgate), tconv))
        tv = tc
    return tv * gate + v * tgates[0], ((tv, tgates[0]), tsteps)


def standard_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> gradients of the gates and v, and of every k; tangents of both, and of
    every B's gradient; as lists"""
    (v, gate, steps), (tfactors, tsteps) = cache, tcache
    dv, dgate, tdv, tdgate = tangents.product_backward_tangent(dy, tdy, (v, gate), tfactors)
    dgates, tdgates, of_filters = [dgate], [tdgate], []
    for (v, gate, drop, conv), (tfactors, tconv) in reversed([*zip(steps, tsteps, strict=True)]):
        da, dk, tda, tdk, tdB = long_conv_backward_tangent(dv, tdv, conv, tconv)
        da, tda = nn.dropout_backward(da, drop), nn.dropout_backward(tda, drop)
        dv, dgate, tdv, tdgate = tangents.product_backward_tangent(da, tda, (v, gate), tfactors)
        dgates, tdgates = [*dgates, dgate], [*tdgates, tdgate]
        of_filters = [(dk, tdk, tdB), *of_filters]
    dks, tdks, tdBs = zip(*of_filters, strict=True)
    return [*dgates, dv], dks, [*tdgates, tdv], tdks, tdBs


def residual_tangent(tgates, tv, tk, tB, cache):
    """(3).   tgates: of x_0 .. x_{O-1}, tv (B, L, D), tk (F, D, L), tB (F, D) -> ty (B, L, D)"""
    (steps,) = cache
    ty, tsteps = tv, []
    for o, ((c, gate, drop, conv), tgate) in enumerate(zip(steps, tgates, strict=True)):
        tc, tconv = long_conv_tangent(ty, tk[o], tB[o], conv)
        ty = ty + tangents.dropout_tangent(tc * gate + c * tgate, drop)
        tsteps.append(((tc, tgate), tconv))
    return ty, (tsteps,)


def residual_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> gradients of the gates and v, and of every k; tangents of both, and of
    every B's gradient; as lists"""
    (steps,), (tsteps,) = cache, tcache
    dgates, tdgates, of_filters = [], [], []
    for (c, gate, drop, conv), (tfactors, tconv) in reversed([*zip(steps, tsteps, strict=True)]):
        da, tda = nn.dropout_backward(dy, drop), nn.dropout_backward(tdy, drop)
        dc, dgate, tdc, tdgate = tangents.product_backward_tangent(da, tda, (c, gate), tfactors)
        dx, dk, tdx, tdk, tdB = long_conv_backward_tangent(dc, tdc, conv, tconv)
        dgates, tdgates = [dgate, *dgates], [tdgate, *tdgates]
        of_filters = [(dk, tdk, tdB), *of_filters]
        dy, tdy = dy + dx, tdy + tdx
    dks, tdks, tdBs = zip(*of_filters, strict=True)
    return [*dgates, dy], dks, [*tdgates, tdy], tdks, tdBs


# Operator, mixer, block


def operator_tangent(tparams, tx, cache):
    """tx (B, L, (O+1) D) -> ty (B, L, D)"""
    cfg, made, steps = cache
    tk, tmade = (implicit_tangent if cfg.filter == "implicit" else gated_tangent)(tparams, made)
    D = cfg.d_model
    *tgates, tv = (tx[..., i * D : (i + 1) * D] for i in range(cfg.order + 1))
    run = standard_tangent if cfg.recurrence == "standard" else residual_tangent
    ty, tsteps = run(tgates, tv, tk, tparams["B"], steps)
    return ty, (tmade, tsteps)


def operator_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> dx, tdx (B, L, (O+1) D), tangents of the grads"""
    (cfg, made, steps), (tmade, tsteps) = cache, tcache
    run = standard_backward_tangent if cfg.recurrence == "standard" else residual_backward_tangent
    dx, dks, tdx, tdks, tdBs = run(dy, tdy, steps, tsteps)
    xp = array_module(dy)
    of_filters = implicit_backward_tangent if cfg.filter == "implicit" else gated_backward_tangent
    own = of_filters(xp.stack(dks), xp.stack(tdks), made, tmade) | {"B": xp.stack(tdBs)}
    return xp.concatenate(dx, axis=2), xp.concatenate(tdx, axis=2), own


def mixer_tangent(tparams, tx, cache):
    """(1), operator, linear.   tx (B, L, D) -> ty (B, L, D)"""
    project, conv, operator, out = cache
    ta, tproject = tangents.linear_tangent(tx, tparams["W_in"], tparams["b_in"], project)
    taps = tparams["conv_weight"], tparams["conv_bias"]
    ta, tconv = tangents.short_conv_tangent(ta, *taps, conv)
    ty, toperator = operator_tangent(tparams, ta, operator)
    ty, tout = tangents.linear_tangent(ty, tparams["W_out"], tparams["b_out"], out)
    return ty, (tproject, tconv, toperator, tout)


def mixer_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> dx, tdx, tangents of the grads"""
    (project, conv, operator, out), (tproject, tconv, toperator, tout) = cache, tcache
    dy, tdy, tdW_out, tdb_out = tangents.linear_backward_tangent(dy, tdy, out, tout)
    da, tda, own = operator_backward_tangent(dy, tdy, operator, toperator)
    da, tda, tdw, tdb = tangents.short_conv_backward_tangent(da, tda, conv, tconv)
    dx, tdx, tdW_in, tdb_in = tangents.linear_backward_tangent(da, tda, project, tproject)
    own |= {"W_in": tdW_in, "b_in": tdb_in, "conv_weight": tdw, "conv_bias": tdb}
    return dx, tdx, own | {"W_out": tdW_out, "b_out": tdb_out}


def block_tangent(tparams, tx, cache):
    """tx (B, L, D) -> ty (B, L, D)"""
    if len(cache) > 2:
        return tangents.mlp_block_tangent(tparams, tx, cache, mixer_tangent)
    mixer, drop = cache
    ta, tmixer = mixer_tangent(tparams, tx, mixer)
    return tx + tangents.dropout_tangent(ta, drop), tmixer


def block_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> dx, tdx, tangents of the grads"""
    if len(cache) > 2:
        return tangents.mlp_block_backward_tangent(dy, tdy, cache, tcache, mixer_backward_tangent)
    mixer, drop = cache
    da, tda = nn.dropout_backward(dy, drop), nn.dropout_backward(tdy, drop)
    dx, tdx, own = mixer_backward_tangent(da, tda, mixer, tcache)
    return dy + dx, tdy + tdx, own
