"""Textbook layers as forward/backward pairs of pure functions.

x_forward(...) -> y, cache;   x_backward(dy, cache) -> gradients in the order of the forward's array
arguments. B batch, L length, D channels; "(..., D)" means any leading axes. float32 in, float32
out.
"""

import math

from ref import Error, backend
from ref.backend import array_module, check_choice, irfft, rfft, twins

EPS = 1e-5  # of the norms, inside the root
SIMPLE_EPS = 1e-8  # of the simple norm, outside of it


def sum_rows(x):
    """(..., D) -> (D,), one axis at a time: the rounding of short sums, not of one long one."""
    while x.ndim > 1:
        x = x.sum(axis=-2)
    return x


# Linear and embedding


def linear_forward(x, W, b=None):
    """x (..., I), W (O, I), b (O,) -> y (..., O) = x Wᵀ + b"""
    y = (x.reshape(-1, x.shape[-1]) @ W.T).reshape(*x.shape[:-1], W.shape[0])
    if b is not None:
        y += b
    return y, (x, W)


def linear_backward(dy, cache):
    """dy (..., O) -> dx, dW, db"""
    x, W = cache
    rows = dy.reshape(-1, dy.shape[-1])
    dx = (rows @ W).reshape(x.shape)
    return dx, rows.T @ x.reshape(-1, x.shape[-1]), sum_rows(dy)


def embedding_forward(tokens, W):
    """tokens (...) integers, W (V, D) -> y (..., D), row W[token] for each"""
    return W[tokens], (tokens, W.shape)


def embedding_backward(dy, cache):
    """dy (..., D) -> dW (V, D), the sum over the places where a token stands"""
    tokens, (V, D) = cache
    if twin := twins("nn", dy):
        return twin.embedding_backward(dy, tokens, V)
    xp, rows, tokens = array_module(dy), dy.reshape(-1, D), tokens.reshape(-1)
    dW, piece = xp.zeros((V, D), dtype=dy.dtype), max(1, (1 << 22) // V)
    for i in range(0, len(rows), piece):  # products: unlike scattering, the same bits each time
        one_hot = tokens[None, i : i + piece] == xp.arange(V)[:, None]
        dW += one_hot.astype(dy.dtype) @ rows[i : i + piece]
    return dW


# Norms


def layer_norm_forward(x, weight, bias):
    """x (..., D) -> y = weight x̂ + bias,  x̂ = (x - mean) r,  r = 1 / sqrt(var + eps) over D"""
    if twin := twins("nn", x):
        y, mean, r = twin.layer_norm_forward(x, weight, bias, EPS)
        return y, (x, mean, r, weight)
    mean = x.mean(axis=-1, keepdims=True)
    centred = x - mean
    r = 1 / array_module(x).sqrt((centred * centred).mean(axis=-1, keepdims=True) + EPS)
    return weight * (centred * r) + bias, (x, mean, r, weight)


def layer_norm_backward(dy, cache):
    """dy (..., D) -> dx, dweight, dbias.   dx = r (g - mean(g) - x̂ mean(g x̂)),  g = weight dy"""
    x, mean, r, weight = cache
    if twin := twins("nn", dy):
        return twin.layer_norm_backward(dy, x, mean, r, weight)
    xhat, g = (x - mean) * r, dy * weight
    dx = r * (g - g.mean(axis=-1, keepdims=True) - xhat * (g * xhat).mean(axis=-1, keepdims=True))
    return dx, sum_rows(dy * xhat), sum_rows(dy)


def rms_norm_forward(x, weight):
    """x (..., D), weight (D,) -> y = weight x̂,  x̂ = x / sqrt(mean(x²) + eps) over D"""
    if twin := twins("nn", x):
        y, r = twin.rms_norm_forward(x, weight, EPS)
        return y, (x, r, weight)
    r = 1 / array_module(x).sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    return weight * (x * r), (x, r, weight)


def rms_norm_backward(dy, cache):
    """dy (..., D) -> dx, dweight.   dx = r (g - x̂ mean(g x̂)),  g = weight dy"""
    x, r, weight = cache
    if twin := twins("nn", dy):
        return twin.rms_norm_backward(dy, x, r, weight)
    xhat, g = x * r, dy * weight
    return r * (g - xhat * (g * xhat).mean(axis=-1, keepdims=True)), sum_rows(dy * xhat)


def simple_rms_norm_forward(x):
    """x (..., D) -> y = x / (s + 1e-8),  s = |x| / sqrt(D): no gain, nothing inside the root"""
    s = array_module(x).sqrt((x * x).mean(axis=-1, keepdims=True))
    return x / (s + SIMPLE_EPS), (x, s)


def simple_rms_norm_backward(dy, cache):
    """dy (..., D) -> dx = r (dy - r x mean(x dy) / s),  r = 1 / (s + 1e-8); at x = 0: r dy"""
    x, s = cache
    r = 1 / (s + SIMPLE_EPS)
    slope = (x * dy).mean(axis=-1, keepdims=True) / (s + (s == 0))
    return r * (dy - x * (r * slope))


def batch_norm_forward(x, weight, bias, mean, var, training):
    """x (..., D) -> y = weight x̂ + bias by the batch's moments (training) or the running ones.

    The cache's last entry is the batch's (mean, var, count), for batch_norm_running.
    """
    xp, count = array_module(x), math.prod(x.shape[:-1])
    if training:
        mean, var = _moments(x, count)
    r = 1 / xp.sqrt(var + EPS)
    if twin := twins("nn", x):
        y = twin.scale_shift(x, mean, weight * r, bias)
    else:
        y = weight * ((x - mean) * r) + bias
    return y, (x, r, weight, training, (mean, var, count))


def _moments(x, count):
    if twin := twins("nn", x):
        return twin.batch_norm_moments(x)
    mean = sum_rows(x) / count
    centred = x - mean
    return mean, sum_rows(centred * centred) / count


def batch_norm_backward(dy, cache):
    """dy (..., D) -> dx, dweight, dbias.

    Training: dx = weight r (dy - mean(dy) - x̂ mean(dy x̂)).
    """
    x, r, weight, training, (mean, _, count) = cache
    twin = twins("nn", dy)
    if twin:
        dweight, dbias = twin.batch_norm_sums(dy, x, mean, r)
    else:
        xhat = (x - mean) * r
        dweight, dbias = sum_rows(dy * xhat), sum_rows(dy)
    if not training:
        return dy * (weight * r), dweight, dbias
    if twin:
        means = dbias / count, dweight / count
        dx = twin.batch_norm_input_gradient(dy, x, mean, r, weight * r, *means)
    else:
        dx = weight * r * (dy - dbias / count - xhat * (dweight / count))
    return dx, dweight, dbias


def batch_norm_running(mean, var, cache, momentum=0.1):
    """Running moments after a training batch: exponential averages, the variance unbiased"""
    batch_mean, batch_var, count = cache[-1]
    unbiased = batch_var * (count / max(count - 1, 1))
    return mean + momentum * (batch_mean - mean), var + momentum * (unbiased - var)


# Activations


def gelu_forward(x):
    """y = x Φ(x), Φ the normal distribution function (erf form)"""
    if twin := twins("nn", x):
        return twin.gelu_forward(x), (x,)
    return x * (0.5 * (1 + backend.erf(x * math.sqrt(0.5)))), (x,)


def gelu_backward(dy, cache):
    """dx = dy (Φ(x) + x φ(x))"""
    (x,) = cache
    if twin := twins("nn", x):
        return twin.gelu_backward(dy, x)
    xp = array_module(x)
    density = xp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return dy * (0.5 * (1 + backend.erf(x * math.sqrt(0.5))) + x * density)


def gelu_tanh_forward(x):
    """y = x (1 + t) / 2,  t = tanh(c (x + 0.044715 x³)),  c = sqrt(2/π)"""
    if twin := twins("nn", x):
        return twin.gelu_tanh_forward(x), (x,)
    return 0.5 * x * (1 + _gelu_tanh(x)), (x,)


def gelu_tanh_backward(dy, cache):
    """dx = dy ((1 + t)/2 + x (1 - t²) c (1 + 3·0.044715 x²) / 2)"""
    (x,) = cache
    if twin := twins("nn", x):
        return twin.gelu_tanh_backward(dy, x)
    t = _gelu_tanh(x)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope)


def _gelu_tanh(x):
    return array_module(x).tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow, and exact to rounding where it is small"""
    xp = array_module(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, xp.ones_like(e), e) / (1 + e)


def sigmoid_forward(x):
    """y = sigmoid(x)"""
    twin = twins("nn", x)
    y = twin.sigmoid_forward(x) if twin else sigmoid(x)
    return y, (y,)


def sigmoid_backward(dy, cache):
    """dx = dy y (1 - y)"""
    (y,) = cache
    twin = twins("nn", dy)
    return twin.sigmoid_backward(dy, y) if twin else dy * y * (1 - y)


def silu_forward(x):
    """y = x s,  s = sigmoid(x)"""
    twin = twins("nn", x)
    return (twin.silu_forward(x) if twin else x * sigmoid(x)), (x,)


def silu_backward(dy, cache):
    """dx = dy s (1 + x (1 - s))"""
    (x,) = cache
    if twin := twins("nn", dy):
        return twin.silu_backward(dy, x)
    s = sigmoid(x)
    return dy * s * (1 + x * (1 - s))


def gate_forward(y, z):
    """y, z (...) -> y silu(z)"""
    twin = twins("nn", y)
    return (twin.gate_forward(y, z) if twin else y * (z * sigmoid(z))), (y, z)


def gate_backward(dout, cache):
    """dout (...) -> dy, dz.   s = sigmoid(z)"""
    y, z = cache
    if twin := twins("nn", dout):
        return twin.gate_backward(dout, y, z)
    s = sigmoid(z)
    return dout * (z * s), dout * y * s * (1 + z * (1 - s))


def softplus_forward(x):
    """y = log(1 + exp(x)), for any x"""
    if twin := twins("nn", x):
        return twin.softplus_forward(x), (x,)
    xp = array_module(x)
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x))), (x,)


def softplus_backward(dy, cache):
    """dx = dy sigmoid(x)"""
    (x,) = cache
    twin = twins("nn", dy)
    return twin.softplus_backward(dy, x) if twin else dy * sigmoid(x)


def relu_forward(x):
    """y = max(x, 0)"""
    return array_module(x).maximum(x, 0), (x,)


def relu_backward(dy, cache):
    """dx = dy where x > 0"""
    (x,) = cache
    return dy * (x > 0)


def glu_forward(a):
    """a (..., 2D) -> y (..., D) = a[first half] sigmoid(a[second half])"""
    if twin := twins("nn", a):
        return twin.glu_forward(a), (a,)
    D = a.shape[-1] // 2
    return a[..., :D] * sigmoid(a[..., D:]), (a,)


def glu_backward(dy, cache):
    """dy (..., D) -> da (..., 2D)"""
    (a,) = cache
    if twin := twins("nn", a):
        return twin.glu_backward(dy, a)
    xp, D = array_module(a), a.shape[-1] // 2
    s = sigmoid(a[..., D:])
    return xp.concatenate([dy * s, dy * a[..., :D] * s * (1 - s)], axis=-1)


# Dropout


def dropout_forward(x, p, rng, tied=False):
    """x (B, L, D) -> x · mask, mask 0 with probability p, else 1/(1-p).

    tied: one mask (B, 1, D) for all times.
    rng is a NumPy Generator, or None outside training: then y is x.
    """
    if rng is None or p == 0:
        return x, (None,)
    shape = (x.shape[0], 1, x.shape[2]) if tied else x.shape
    keep = rng.random(shape, dtype="float32") >= p
    mask = backend.to_device(keep.astype(x.dtype) * x.dtype.type(1 / (1 - p)), array_module(x))
    return x * mask, (mask,)


def dropout_backward(dy, cache):
    """dx = dy · mask"""
    (mask,) = cache
    return dy if mask is None else dy * mask


# Convolutions


def short_conv_forward(x, w, b=None, before=None):
    """Depthwise causal convolution.   x (B, L, C), w (C, 1, K), b (C,) -> y (B, L, C)

    y_t = b + Σ_j w[:, 0, j] x_{t-K+1+j}

    before (B, K-1, C) are the inputs that came before x; zeros when not given.
    """
    xp, (B, L, C), K = array_module(x), x.shape, w.shape[2]
    if before is None:
        before = xp.zeros((B, K - 1, C), dtype=x.dtype)
    if twin := twins("nn", x):
        return twin.short_conv_forward(x, w, b, before), (x, w, before)
    padded = xp.concatenate([before, x], axis=1)
    y = sum(w[:, 0, j] * padded[:, j : j + L] for j in range(K))
    return (y if b is None else y + b), (x, w, before)


def short_conv_backward(dy, cache):
    """dy (B, L, C) -> dx, dw, db, dbefore"""
    x, w, before = cache
    if twin := twins("nn", dy):
        return twin.short_conv_backward(dy, x, w, before)
    xp, L, K = array_module(dy), dy.shape[1], w.shape[2]
    padded = xp.concatenate([before, x], axis=1)
    dw = xp.stack([sum_rows(dy * padded[:, j : j + L]) for j in range(K)], axis=1)
    dpadded = xp.zeros(padded.shape, dtype=dy.dtype)
    for j in range(K):
        dpadded[:, j : j + L] += w[:, 0, j] * dy
    return dpadded[:, K - 1 :], dw[:, None, :], sum_rows(dy), dpadded[:, : K - 1]


def short_conv_step(x_t, state, w, b=None):
    """One time step.   x_t (B, C), state (B, K-1, C) the last inputs, oldest first -> y_t, state"""
    xp = array_module(x_t)
    window = xp.concatenate([state, x_t[:, None]], axis=1)
    y = (window * w[:, 0].T).sum(axis=1)
    return (y if b is None else y + b), window[:, 1:]


def spectral_conv_forward(x, G):
    """Circular convolution by frequency response.   x (B, L, D), G (L//2+1, D) -> irfft(rfft(x) G)

    Of a real system G[0] and (L even) G[L/2] are real, and so they must be here.
    """
    L = x.shape[1]
    X = rfft(x, L, axis=1)
    return irfft(_spectral_product(X, G), L, axis=1), (X, G, L)


def spectral_conv_backward(dy, cache):
    """dy (B, L, D) -> dx, dG.

    Each bin between 0 and L/2 stands for itself and its mirror: it counts twice.
    """
    X, G, L = cache
    dX, dG = _spectral_gradients(rfft(dy, L, axis=1), X, G)
    dG = dG * dy.dtype.type(2 / L)
    dG[0] *= 0.5
    if L % 2 == 0:
        dG[-1] *= 0.5
    return irfft(dX, L, axis=1), dG


def _spectral_product(X, G):
    """X (B, J, D), G (J, D) -> X G"""
    twin = twins("nn", X)
    return twin.spectral_product(X, G) if twin else X * G


def _spectral_gradients(dY, X, G):
    """dY, X (B, J, D), G (J, D) -> conj(G) dY, and conj(X) dY summed over the batch (J, D)"""
    if twin := twins("nn", X):
        return twin.spectral_gradients(dY, X, G)
    return dY * G.conj(), (X.conj() * dY).sum(axis=0)


def fft_conv_forward(x, k, mode="causal"):
    """Long convolution by FFT.  x (B, L, D), k (D, K) -> y (B, L, D)

    causal:     y_t = Σ_{s<=t} k_{t-s} x_s, k_i = 0 for i >= K
    circular:   y_t = Σ_s k_{(t-s) mod L} x_s, K <= L
    two-sided:  y_t = Σ_s k_{L-1+t-s} x_s, K = 2L-1: lag 0 stands at index L-1
    """
    check_choice("mode", mode, ("causal", "circular", "two-sided"))
    L, K = x.shape[1], k.shape[1]
    if (K > L and mode == "circular") or (K != 2 * L - 1 and mode == "two-sided"):
        raise Error(f"a {mode} kernel of {K} taps does not fit a sequence of length {L}.")
    k = k[:, :L] if mode == "causal" else k
    n = L if mode == "circular" else backend.fast_length(2 * L - 1)
    first = L - 1 if mode == "two-sided" else 0
    X, G = rfft(x, n, axis=1), rfft(k, n, axis=1).T
    y = irfft(_spectral_product(X, G), n, axis=1)[:, first : first + L]
    return y, (X, G, n, first, K)


def fft_conv_backward(dy, cache):
    """dy (B, L, D) -> dx, dk.   The adjoint of a convolution is a correlation."""
    X, G, n, first, K = cache
    xp, (B, L, D) = array_module(dy), dy.shape
    if first:
        dy = xp.concatenate([xp.zeros((B, first, D), dtype=dy.dtype), dy], axis=1)
    dX, products = _spectral_gradients(rfft(dy, n, axis=1), X, G)
    reached = min(K, L) if not first else K
    dk = xp.zeros((D, K), dtype=dy.dtype)
    dk[:, :reached] = irfft(products, n, axis=0)[:reached].T
    return irfft(dX, n, axis=1)[:, :L], dk


def skip_forward(y, D, x):
    """y, x (..., D), D (D,) -> y + D x, the feedthrough of a state-space layer"""
    twin = twins("nn", x)
    return (twin.skip_forward(y, D, x) if twin else y + D * x), (D, x)


def skip_backward(dy, cache):
    """dy (..., D) -> dy (for y), dD, dx"""
    D, x = cache
    if twin := twins("nn", x):
        return dy, *twin.skip_backward(dy, D, x)
    return dy, sum_rows(dy * x), D * dy


# Recurrent cells


def gru_forward(x, W, U, b, c, h0=None, last=False):
    """x (B, L, I), W (3H, I), U (3H, H), b, c (3H,), h0 (B, H) -> h (B, L, H); last: (B, H)

    r, u = sigmoid(W x + b + U h + c),  n = tanh(W x + b + r (U h + c)),  h' = (1 - u) n + u h

    The rows of W, U, b, c are those of r, u, n in turn (PyTorch's weight_ih, weight_hh, bias_ih,
    bias_hh). h0: zeros when not given.
    """
    xp, (B, L, _), H = array_module(x), x.shape, U.shape[1]
    h = xp.zeros((B, H), dtype=x.dtype) if h0 is None else h0
    a, _ = linear_forward(x, W, b)
    states, gates = [h], []
    for t in range(L):
        m = h @ U.T + c
        r = sigmoid(a[:, t, :H] + m[:, :H])
        u = sigmoid(a[:, t, H : 2 * H] + m[:, H : 2 * H])
        n = xp.tanh(a[:, t, 2 * H :] + r * m[:, 2 * H :])
        h = (1 - u) * n + u * h
        states.append(h)
        gates.append((r, u, n, m[:, 2 * H :]))
    return h if last else xp.stack(states[1:], axis=1), (x, W, U, states, gates, last)


def gru_backward(dy, cache):
    """dy (B, L, H), or (B, H) of the last -> dx, dW, dU, db, dc, dh0"""
    x, W, U, states, gates, last = cache
    xp, da, dm = array_module(dy), [], []
    dh = dy if last else xp.zeros_like(states[0])
    for t in range(len(gates) - 1, -1, -1):
        h, (r, u, n, m) = states[t], gates[t]
        dh = dh if last else dh + dy[:, t]
        dn = dh * (1 - u) * (1 - n * n)
        du = dh * (h - n) * u * (1 - u)
        dr = dn * m * r * (1 - r)
        da.append(xp.concatenate([dr, du, dn], axis=1))
        dm.append(xp.concatenate([dr, du, dn * r], axis=1))
        dh = dh * u + dm[-1] @ U
    before = xp.stack(states[:-1], axis=1)
    dx, dW, db = linear_backward(xp.stack(da[::-1], axis=1), (x, W))
    _, dU, dc = linear_backward(xp.stack(dm[::-1], axis=1), (before, U))
    return dx, dW, dU, db, dc, dh


def lstm_cell_forward(x, state, W, U, b, c):
    """One step.   x (B, I), state (2, B, H), W (4H, I), U (4H, H), b, c (4H,) -> state

    i, f, o = sigmoid(W x + b + U h + c),  g = tanh(W x + b + U h + c)
    s' = f s + i g,  h' = o tanh(s')

    state[0] is h, the output, and state[1] the cell's s; rows in the order i, f, g, o, as in
    PyTorch.
    """
    xp, H = array_module(x), U.shape[1]
    h, s = state[0], state[1]
    a = linear_forward(x, W, b)[0] + linear_forward(h, U, c)[0]
    i, f, o = (sigmoid(a[:, k * H : (k + 1) * H]) for k in (0, 1, 3))
    g = xp.tanh(a[:, 2 * H : 3 * H])
    new = f * s + i * g
    t = xp.tanh(new)
    return xp.stack([o * t, new]), (x, h, s, W, U, i, f, g, o, t)


def lstm_cell_backward(dstate, cache):
    """dstate (2, B, H) -> dx, dstate, dW, dU, db, dc"""
    x, h, s, W, U, i, f, g, o, t = cache
    xp, dh = array_module(dstate), dstate[0]
    ds = dstate[1] + dh * o * (1 - t * t)
    di, df, do = ds * g * i * (1 - i), ds * s * f * (1 - f), dh * t * o * (1 - o)
    da = xp.concatenate([di, df, ds * i * (1 - g * g), do], axis=1)
    dx, dW, db = linear_backward(da, (x, W))
    dh, dU, dc = linear_backward(da, (h, U))
    return dx, xp.stack([dh, ds * f]), dW, dU, db, dc


# Pooling and loss


def mean_pool_forward(x, lengths, first=0):
    """x (B, L, D), lengths (B,) -> (B, D), the mean over each sequence's positions from first on"""
    xp, lengths = array_module(x), lengths[:, None]
    t = xp.arange(x.shape[1])[None, :]
    mask = ((t >= first) & (t < lengths)) / (lengths - first)
    mask = mask.astype(x.dtype)
    return (mask[:, None, :] @ x)[:, 0], (mask,)


def mean_pool_backward(dy, cache):
    """dy (B, D) -> dx (B, L, D)"""
    (mask,) = cache
    return mask[:, :, None] * dy[:, None, :]


def last_forward(x, lengths):
    """x (B, L, D), lengths (B,) -> (B, D), each sequence's own last position"""
    at = (array_module(x).arange(len(x)), lengths - 1)
    return x[at], (at, x.shape)


def last_backward(dy, cache):
    """dy (B, D) -> dx (B, L, D)"""
    at, shape = cache
    dx = array_module(dy).zeros(shape, dtype=dy.dtype)
    dx[at] = dy
    return dx


def huber_forward(y, target, delta=1.0):
    """y, target (...) -> mean of e²/2 where |e| <= delta, else of delta (|e| - delta/2);
    e = y - target"""
    xp, e = array_module(y), y - target
    size = xp.abs(e)
    loss = xp.where(size <= delta, 0.5 * e * e, delta * (size - 0.5 * delta)).mean()
    return loss, (e, delta)


def huber_backward(dloss, cache):
    """dloss (a number) -> dy, dtarget = -dy.   ∂(loss of e)/∂e = e, cut at ±delta"""
    e, delta = cache
    dy = array_module(e).clip(e, -delta, delta) * (dloss / e.size)
    return dy, -dy


def softmax_cross_entropy_forward(logits, targets, ignore=-1, consume_logits=False):
    """logits (..., V), targets (...) integers -> mean of -log softmax(logits)[target] in nats, over
    targets != ignore

    The gradient is made at once. consume_logits: in the place of the logits, which are lost, so
    that with a large V there is one array of their size.

    Error: a target outside of the V classes. On a GPU, whose results no step should wait for, such
    a target makes the loss NaN instead.
    """
    _check_targets(targets, logits.shape[-1], ignore)
    flags = logits.flags
    consumed = consume_logits and flags.c_contiguous and getattr(flags, "writeable", True)
    gradient = logits if consumed else logits.copy()
    twin = twins("softmax", logits) if logits.dtype.name in ("float32", "float64") else None
    cross_entropy = twin.cross_entropy if twin else _cross_entropy
    rows = gradient.reshape(-1, logits.shape[-1])
    loss, correct = cross_entropy(rows, targets.reshape(-1), ignore)
    return loss, (gradient, consumed, correct.reshape(targets.shape))


def softmax_cross_entropy_backward(dloss, cache):
    """dloss (a number) -> dlogits (..., V) = dloss (softmax - one-hot) / count, zero where ignored

    Of consumed logits and dloss = 1 it is the very array that they were in.
    """
    gradient, consumed, _ = cache
    as_it_is = consumed and isinstance(dloss, (int, float)) and dloss == 1
    return gradient if as_it_is else gradient * dloss


def softmax_cross_entropy_correct(cache):
    """(...) booleans: whether the target has the first of the largest logits; ignored: False"""
    return cache[2]


def _check_targets(targets, V, ignore):
    if array_module(targets).__name__ == "numpy":
        wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore)]
        if wrong.size:
            raise Error(f"target {wrong[0]} is outside the {V} classes of the logits.")


def _cross_entropy(p, targets, ignore):
    """p (n, V) logits, targets (n,) -> loss, correct (n,); p becomes the gradient of the loss"""
    xp, counted = array_module(p), targets != ignore
    known = (targets >= 0) & (targets < p.shape[1])
    at = (xp.arange(len(p)), xp.where(counted & known, targets, 0))
    count = xp.maximum(counted.sum(), 1).astype(p.dtype)
    correct = counted & (p.argmax(axis=1) == targets)
    p -= p.max(axis=1, keepdims=True)
    target_logit = p[at]
    xp.exp(p, out=p)
    Z = p.sum(axis=1, keepdims=True)
    losses, scale = xp.log(Z[:, 0]) - target_logit, counted.astype(p.dtype) / count
    losses[~known] = math.nan
    p /= Z
    p *= scale[:, None]
    p[at] -= scale
    p[~counted] = 0
    return xp.where(counted, losses, xp.zeros_like(losses)).sum() / count, correct
