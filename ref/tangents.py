"""Exact products with second derivatives: the network's own backward, differentiated along v.

    g(θ) = ∂l/∂θ, what network.backward gives;   H v = d/dε g(θ + ε v) at ε = 0                  (1)

Forward over reverse (Pearlmutter: Fast exact multiplication by the Hessian, Neural Computation
1994; spec/l2t.md, section 6.3 b): first the tangent of every activation, in the forward's order,
then, in the backward's order, the gradient of every activation together with its own tangent. No
step is chosen and no graph is kept. Dropout masks, spectra and norms' statistics are those of
forward's cache, which has the parameters as well.

In the code t stands for d/dε: tx is the tangent of x, and tdy that of dy, which is ∂l/∂y. A layer
x_forward, x_backward has a second pair:

    x_tangent(tangents of its inputs, cache) -> ty, tcache
    x_backward_tangent(dy, tdy, cache, tcache) -> dx, which the layer before it goes on with; then
                                                  the tangents of all that x_backward returns

    y = f(a, b), linear in each    ty = f(ta, b) + f(a, tb);  with fᵀ for the backward,          (2)
                                   tda = fᵀ(tdy, b) + fᵀ(dy, tb):  linear layers, convolutions,
                                   products, skip
    y = s(x)                       ty = s' tx;  tdx = s' tdy + s'' tx dy                         (3)
      sigmoid                      s'' tx = (1 - 2y) ty
      GELU by tanh, 2y = x (1 + t) s'' = (1 - t²) (u' + x (u''/2 - t u'²)),  t = tanh u
      ReLU                         s'' = 0
    layer norm, y = w x̂ + b        tx̂ = P tx,  ρ = tr/r = -r mean(x̂ tx),                         (4)
      P g = r (g - mean(g) - x̂ mean(x̂ g)),  dx = P(w dy):
                                   tdx = ρ dx + P(tg) - r (tx̂ mean(g x̂) + x̂ mean(g tx̂)),  g = w dy
    masks, means, choices          of gradients and tangents alike the layer's own

What a model's equations define is in its own module, MODULES. At a kink, of ReLU or of |.|, the
derivative is that of the side where the network stands.
"""

import importlib
import math

from ref import Error, network, nn
from ref.backend import array_module, irfft, rfft

MODULES = {"hyena": "ref.hyena_tangents"}


def check(cfg):
    """Error: there are no exact products for the model of this network.Config"""
    if _model(cfg) not in MODULES:
        raise Error(
            f"there are exact second derivatives of {', '.join(MODULES)} and none of {cfg.model}: "
            "use --hvp differences."
        )


def shapes(cfg):
    """name -> shape of the trained parameters of a network.Config; what v and H v are like

    Error: a model without exact products
    """
    check(cfg)
    D, n = cfg.layer.d_model, cfg.n_layers
    own = {"encoder.weight": (cfg.d_input, D) if cfg.tokens else (D, cfg.d_input)}
    if not cfg.tokens:
        own["encoder.bias"] = (D,)
    if cfg.positions:
        own["encoder.position"] = (cfg.positions, D)
    own |= {f"blocks.{name}": (n, *shape) for name, shape in _module(cfg).shapes(cfg.layer).items()}
    if cfg.final_norm:
        own |= {"final.norm_weight": (D,), "final.norm_bias": (D,)}
    if cfg.decoder == "match":
        own |= {"match.weight": (D, 4 * D), "match.bias": (D,)}
    if not cfg.tied:
        own["decoder.weight"] = (cfg.d_output, D)
        if cfg.decoder_bias:
            own["decoder.bias"] = (cfg.d_output,)
    return own


def _model(cfg):
    """The model's own name: with other settings it has others"""
    return network.model_module(cfg.model).__name__.rpartition(".")[2]


def _module(cfg):
    return importlib.import_module(MODULES[_model(cfg)])


def _filled(v, cfg, like):
    """v with zeros for what it lacks.   Error: a name or an array that is none of the network's"""
    xp, expected = array_module(like), shapes(cfg)
    for name, t in v.items():
        if name not in expected:
            raise Error(f"v has {name!r}, which is no trained parameter of this network.")
        if t.shape != expected[name] or t.dtype != like.dtype:
            raise Error(
                f"v's {name} is {t.dtype} of the shape {tuple(t.shape)}; expected {like.dtype} of "
                f"the shape {expected[name]}."
            )
    return v | {n: xp.zeros(s, dtype=like.dtype) for n, s in expected.items() if n not in v}


# The network


def forward(v, cache):
    """v like the trained parameters, missing names are zeros; cache of network.forward -> tangent
    of its y along v, tcache

    Error: a model without exact products; v does not fit the network
    """
    cfg, encoder, blocks, final, pool, match, (decoder, where, *_) = cache
    check(cfg)
    v, model, x = _filled(v, cfg, decoder[1]), _module(cfg), encoder[0]
    if cfg.tokens:
        tz = v["encoder.weight"][x]
    else:
        tz, _ = nn.linear_forward(x, v["encoder.weight"], v["encoder.bias"])
    if cfg.positions:
        tz = tz + v["encoder.position"][: x.shape[1]]
    tblocks, tfinal, tmatch = [], None, None
    for i in range(cfg.n_layers):
        tz, own = model.block_tangent(network.layer_params(v, i), tz, blocks[i])
        tblocks.append(own)
    if cfg.final_norm:
        tnorm = v["final.norm_weight"], v["final.norm_bias"]
        tz, tfinal = layer_norm_tangent(tz, *tnorm, final[1])
    if cfg.decoder != "lm":
        tz = (last_tangent if cfg.decoder == "last" else mean_pool_tangent)(tz, pool)
    if cfg.decoder == "match":
        tz, tmatch = match_tangent(tz, v["match.weight"], v["match.bias"], match)
    if where is not None:
        tz = tz[where]
    tW = v["encoder.weight" if cfg.tied else "decoder.weight"]
    ty, tdecoder = linear_tangent(tz, tW, v.get("decoder.bias"), decoder)
    return ty, (tblocks, tfinal, tmatch, tdecoder)


def backward(dy, tdy, cache, tcache):
    """dy = ∂l/∂y and its tangent along v, both like y -> H v, (1), with the names and shapes of
    network.backward's grads"""
    cfg, encoder, blocks, final, pool, match, (decoder, where, shape, _) = cache
    tblocks, tfinal, tmatch, tdecoder = tcache
    model, xp, products = _module(cfg), array_module(dy), {}
    dz, tdz, tdW, tdb = linear_backward_tangent(dy, tdy, decoder, tdecoder)
    if not cfg.tied:
        products |= {"decoder.weight": tdW} | ({"decoder.bias": tdb} if cfg.decoder_bias else {})
    if where is not None:
        chosen, (dz, tdz) = (dz, tdz), (xp.zeros(shape, dtype=dz.dtype) for _ in range(2))
        dz[where], tdz[where] = chosen
    if cfg.decoder == "match":
        dz, tdz, own = match_backward_tangent(dz, tdz, match, tmatch)
        products |= own
    if cfg.decoder != "lm":
        spread = nn.last_backward if cfg.decoder == "last" else nn.mean_pool_backward
        dz, tdz = spread(dz, pool), spread(tdz, pool)
    if cfg.final_norm:
        dz, tdz, *own = layer_norm_backward_tangent(dz, tdz, final[1], tfinal)
        products |= dict(zip(("final.norm_weight", "final.norm_bias"), own, strict=True))
    for i in reversed(range(cfg.n_layers)):
        dz, tdz, own = model.block_backward_tangent(dz, tdz, blocks[i], tblocks[i])
        for name, g in own.items():
            if i == cfg.n_layers - 1:
                products[f"blocks.{name}"] = xp.empty((cfg.n_layers, *g.shape), dtype=g.dtype)
            products[f"blocks.{name}"][i] = g
    if cfg.positions:
        own = xp.zeros((cfg.positions, tdz.shape[2]), dtype=tdz.dtype)
        own[: tdz.shape[1]] = tdz.sum(axis=0)
        products["encoder.position"] = own
    if cfg.tokens:
        products["encoder.weight"] = nn.embedding_backward(tdz, encoder)
    else:
        _, products["encoder.weight"], products["encoder.bias"] = nn.linear_backward(tdz, encoder)
    if cfg.tied:
        products["encoder.weight"] += tdW
    return products


# Bilinear layers: (2)


def product_backward_tangent(dy, tdy, cache, tcache):
    """Of y = a b; cache a, b, tcache ta, tb -> da, db, tda, tdb"""
    (a, b), (ta, tb) = cache, tcache
    return dy * b, dy * a, tdy * b + dy * tb, tdy * a + dy * ta


def linear_tangent(tx, tW, tb, cache):
    """tx (..., I), tW (O, I), tb (O,) or None -> ty (..., O)"""
    x, W = cache
    ty, _ = nn.linear_forward(tx, W, tb)
    return ty + nn.linear_forward(x, tW)[0], (tx, tW)


def linear_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (..., O) -> dx, tdx, tdW, tdb"""
    dx, _ = nn.linear_forward(dy, cache[1].T)
    tdx, tdW, tdb = nn.linear_backward(tdy, cache)
    also_dx, also_dW, _ = nn.linear_backward(dy, tcache)
    return dx, tdx + also_dx, tdW + also_dW, tdb


def short_conv_tangent(tx, tw, tb, cache):
    """tx (B, L, C), tw (C, 1, K), tb (C,) -> ty (B, L, C); what came before x is a constant"""
    x, w, before = cache
    ty, _ = nn.short_conv_forward(tx, w, tb)
    also, _ = nn.short_conv_forward(x, tw, None, before)
    return ty + also, (tx, tw, array_module(tx).zeros_like(before))


def short_conv_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, C) -> dx, tdx, tdw, tdb"""
    dx, *_ = nn.short_conv_backward(dy, cache)
    tdx, tdw, tdb, _ = nn.short_conv_backward(tdy, cache)
    also_dx, also_dw, *_ = nn.short_conv_backward(dy, tcache)
    return dx, tdx + also_dx, tdw + also_dw, tdb


def fft_conv_tangent(tx, tk, cache):
    """Causal, with a tap for every position.   tx (B, L, D), tk (D, L) -> ty (B, L, D)"""
    X, G, n, *_ = cache
    tX, tG = rfft(tx, n, axis=1), rfft(tk, n, axis=1).T
    return irfft(tX * G + X * tG, n, axis=1)[:, : tx.shape[1]], (tX, tG)


def fft_conv_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> dx, dk, tdx, tdk"""
    (X, G, n, *_), (tX, tG), L = cache, tcache, dy.shape[1]
    dY, tdY, H, X, tX = rfft(dy, n, axis=1), rfft(tdy, n, axis=1), G.conj(), X.conj(), tX.conj()
    dx, tdx = (irfft(d, n, axis=1)[:, :L] for d in (dY * H, tdY * H + dY * tG.conj()))
    products = (X * dY).sum(axis=0), (X * tdY + tX * dY).sum(axis=0)
    dk, tdk = (irfft(p, n, axis=0)[:L].T for p in products)
    return dx, dk, tdx, tdk


def skip_tangent(ty, tD, tx, cache):
    """Of y + D x.   ty, tx (..., D), tD (D,) -> (..., D)"""
    D, x = cache
    return ty + tD * x + D * tx, (tD, tx)


def skip_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (..., D), which are also those of y -> dx, tdD, tdx"""
    (D, x), (tD, tx) = cache, tcache
    return D * dy, nn.sum_rows(tdy * x + dy * tx), D * tdy + tD * dy


# Norm and activations: (3), (4)


def layer_norm_tangent(tx, tweight, tbias, cache):
    """tx (..., D), tweight, tbias (D,) -> ty (..., D)"""
    x, mean, r, weight = cache
    xhat = (x - mean) * r
    along = (xhat * tx).mean(axis=-1, keepdims=True)
    txhat = r * (tx - tx.mean(axis=-1, keepdims=True) - xhat * along)
    return tweight * xhat + weight * txhat + tbias, (txhat, -r * along, tweight)


def layer_norm_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (..., D) -> dx, tdx, tdweight, tdbias"""
    (x, mean, r, weight), (txhat, rho, tweight) = cache, tcache
    xhat, g, tg = (x - mean) * r, weight * dy, tweight * dy + weight * tdy
    m = (g * xhat).mean(axis=-1, keepdims=True)
    tm = (tg * xhat + g * txhat).mean(axis=-1, keepdims=True)
    dx = r * (g - g.mean(axis=-1, keepdims=True) - xhat * m)
    tdx = rho * dx + r * (tg - tg.mean(axis=-1, keepdims=True) - xhat * tm - txhat * m)
    return dx, tdx, nn.sum_rows(tdy * xhat + dy * txhat), nn.sum_rows(tdy)


def sigmoid_tangent(tx, cache):
    """tx (...) -> ty"""
    ty = nn.sigmoid_backward(tx, cache)
    return ty, (ty,)


def sigmoid_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (...) -> dx, tdx"""
    (y,), (ty,) = cache, tcache
    dx, tdx = nn.sigmoid_backward(dy, cache), nn.sigmoid_backward(tdy, cache)
    return dx, tdx + dy * (1 - 2 * y) * ty


def gelu_tanh_tangent(tx, cache):
    """tx (...) -> ty"""
    return nn.gelu_tanh_backward(tx, cache), (tx,)


def gelu_tanh_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (...) -> dx, tdx.   u = c (x + 0.044715 x³),  c = sqrt(2/π)"""
    (x,), (tx,) = cache, tcache
    c, a = math.sqrt(2 / math.pi), 0.044715
    t, slope = array_module(x).tanh(c * (x + a * x * x * x)), c * (1 + 3 * a * x * x)
    bend = (1 - t * t) * (slope + x * (3 * c * a * x - t * slope * slope))
    dx, tdx = nn.gelu_tanh_backward(dy, cache), nn.gelu_tanh_backward(tdy, cache)
    return dx, tdx + dy * bend * tx


# Linear and without parameters: the backward of such a layer is its own tangent


def dropout_tangent(tx, cache):
    """tx · mask: of tangents as of gradients"""
    return nn.dropout_backward(tx, cache)


def mean_pool_tangent(tx, cache):
    """tx (B, L, D) -> ty (B, D)"""
    (mask,) = cache
    return (mask[:, None, :] @ tx)[:, 0]


def last_tangent(tx, cache):
    """tx (B, L, D) -> ty (B, D)"""
    at, _ = cache
    return tx[at]


# The head for two documents: linear ReLU of [p1, p2, p1 p2, p1 - p2]


def match_tangent(tp, tW, tb, cache):
    """tp (2B, D), first documents first -> tz (B, D)"""
    p1, p2, linear, (a,) = cache
    tp1, tp2 = tp[: len(p1)], tp[len(p1) :]
    tfeatures = [tp1, tp2, tp1 * p2 + p1 * tp2, tp1 - tp2]
    ta, tlinear = linear_tangent(array_module(tp).concatenate(tfeatures, axis=1), tW, tb, linear)
    return ta * (a > 0), (tp1, tp2, tlinear)


def match_backward_tangent(dz, tdz, cache, tcache):
    """dz, tdz (B, D) -> dp, tdp (2B, D), tangents of the grads"""
    (p1, p2, linear, relu), (tp1, tp2, tlinear) = cache, tcache
    xp = array_module(dz)
    da, tda = nn.relu_backward(dz, relu), nn.relu_backward(tdz, relu)
    df, tdf, tdW, tdb = linear_backward_tangent(da, tda, linear, tlinear)
    d1, d2, dproduct, dminus = xp.split(df, 4, axis=1)
    td1, td2, tdproduct, tdminus = xp.split(tdf, 4, axis=1)
    own = product_backward_tangent(dproduct, tdproduct, (p1, p2), (tp1, tp2))
    dp = xp.concatenate([d1 + own[0] + dminus, d2 + own[1] - dminus])
    tdp = xp.concatenate([td1 + own[2] + tdminus, td2 + own[3] - tdminus])
    return dp, tdp, {"match.weight": tdW, "match.bias": tdb}


# An MLP, and GPT-2's block around a mixer: ref.block


def mlp_tangent(tparams, tx, cache):
    """tx (B, L, D) -> ty (B, L, D)"""
    up, gelu, down = cache
    ta, tup = linear_tangent(tx, tparams["W_1"], tparams["b_1"], up)
    ta, tgelu = gelu_tanh_tangent(ta, gelu)
    ty, tdown = linear_tangent(ta, tparams["W_2"], tparams["b_2"], down)
    return ty, (tup, tgelu, tdown)


def mlp_backward_tangent(dy, tdy, cache, tcache):
    """dy, tdy (B, L, D) -> dx, tdx, tangents of the grads"""
    (up, gelu, down), (tup, tgelu, tdown) = cache, tcache
    da, tda, tdW_2, tdb_2 = linear_backward_tangent(dy, tdy, down, tdown)
    da, tda = gelu_tanh_backward_tangent(da, tda, gelu, tgelu)
    dx, tdx, tdW_1, tdb_1 = linear_backward_tangent(da, tda, up, tup)
    return dx, tdx, {"W_1": tdW_1, "b_1": tdb_1, "W_2": tdW_2, "b_2": tdb_2}


def mlp_block_tangent(tparams, tx, cache, mixer_tangent):
    """tx (B, L, D) -> ty (B, L, D).   mixer_tangent(tparams, tx, cache) -> ty, tcache"""
    norm1, mixer, drop1, norm2, mlp, drop2 = cache
    tnorm1, tnorm2 = ([tparams[f"norm{i}_{kind}"] for kind in ("weight", "bias")] for i in (1, 2))
    ta, tnorm1 = layer_norm_tangent(tx, *tnorm1, norm1)
    ta, tmixer = mixer_tangent(tparams, ta, mixer)
    tx = tx + dropout_tangent(ta, drop1)
    ta, tnorm2 = layer_norm_tangent(tx, *tnorm2, norm2)
    ta, tmlp = mlp_tangent(tparams, ta, mlp)
    return tx + dropout_tangent(ta, drop2), (tnorm1, tmixer, tnorm2, tmlp)


def mlp_block_backward_tangent(dy, tdy, cache, tcache, mixer_backward_tangent):
    """dy, tdy (B, L, D) -> dx, tdx, tangents of the grads"""
    (norm1, mixer, drop1, norm2, mlp, drop2), (tnorm1, tmixer, tnorm2, tmlp) = cache, tcache
    da, tda = nn.dropout_backward(dy, drop2), nn.dropout_backward(tdy, drop2)
    da, tda, tdgrads = mlp_backward_tangent(da, tda, mlp, tmlp)
    da, tda, tdweight2, tdbias2 = layer_norm_backward_tangent(da, tda, norm2, tnorm2)
    dx, tdx = dy + da, tdy + tda
    da, tda = nn.dropout_backward(dx, drop1), nn.dropout_backward(tdx, drop1)
    da, tda, own = mixer_backward_tangent(da, tda, mixer, tmixer)
    da, tda, tdweight1, tdbias1 = layer_norm_backward_tangent(da, tda, norm1, tnorm1)
    norms = {"norm1_weight": tdweight1, "norm1_bias": tdbias1}
    norms |= {"norm2_weight": tdweight2, "norm2_bias": tdbias2}
    return dx + da, tdx + tda, tdgrads | own | norms
