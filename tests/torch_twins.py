"""The models' layers in plain PyTorch with autograd, written from the papers: what ours is compared
with, in values by tests/test_torch_twins.py and in time by `python -m ref bench --against torch`.

Every function takes a dict p of tensors under our parameters' names and shapes. Activations are
channels first, x (B, D, L): FFTs along the last axis and a convolution of width 1 take half of the
time that eager PyTorch needs for (B, L, D). float32 computes in complex64 throughout. Equation
numbers are those of ref/hope.py, ref/s4d.py, ref/mamba.py and ref/longhorn.py; of S4, those of its
own docstrings below. The scans and what is around them have (B, L, D), as ours.

A kernel has several forms, equal but for rounding:

    published     S4D: one complex exponential for each entry of the (D, N/2, L) table
    materialised  the table by cheaper means, kept by autograd; S4: of the reciprocals in (1)
    recomputed    in blocks of channels that fit in the cache, and once more in the backward
    factored      S4D: l = i + m j splits the table into factors, and only these are formed

and so has a scan:

    products outside  decays and inputs of all positions (B, L, E, N) first, then a loop over time
    all in the loop   nothing of that size: every step makes its own
    pscan             Mamba: mamba.py's parallel scan of the products, where it is installed

The slices of a loop come by unbind, whose gradient is one stack: indexing costs a whole array of
zeros at every step of the backward, so that selective_scan_ref takes time quadratic in L.
"""

import importlib.util
import math

import torch
from torch.nn import functional

CHANNELS = 16  # of a block of the recomputed forms; from 4 to 32 the times are the same


# HOPE


def hope_sampling(h, log_dt, L):
    """(1) at the L nodes (2), as published: the whole table of powers.   h (D, n) complex,
    log_dt (D,) -> g (D, L)"""
    dt = log_dt.exp()[:, None]
    i1 = torch.arange(1, h.shape[1] + 1, device=dt.device)
    w = torch.exp(2j * math.pi * torch.arange(L, dtype=dt.dtype, device=dt.device) / L)
    mapped = ((1 + dt) * w + dt - 1) / ((dt - 1) * w + dt + 1)
    powers = torch.exp(-1j * mapped.angle()[:, :, None] * i1)
    return torch.einsum("dn,dln->dl", h, powers)


def hope_mixer(p, x):
    """The published layer, one direction: complex FFTs, every node.   x (B, D, L) -> y (B, D, L)"""
    g = hope_sampling(torch.view_as_complex(p["H"]), p["log_dt"], x.shape[2])
    return gelu_glu(p, torch.fft.ifft(torch.fft.fft(x) * g).real + x * p["D"][:, None])


# What the mixers share


def gelu_glu(p, y):
    """y (B, D, L) -> GLU(W GELU(y) + b)"""
    y = functional.conv1d(functional.gelu(y), p["W"][:, :, None], p["b"])
    return functional.glu(y, dim=1)


def convolution(x, k):
    """x (B, D, L), k (1, D, L) causal, or (2, D, L): the second one flipped, in the padding of the
    first, so that its tap 0 meets x_{t+1}   -> y (B, D, L)"""
    L = x.shape[2]
    k = k[0] if len(k) == 1 else torch.cat([k[0], k[1].flip(1)], dim=1)
    return torch.fft.irfft(torch.fft.rfft(x, 2 * L) * torch.fft.rfft(k, 2 * L), 2 * L)[:, :, :L]


# S4D


def s4d_kernel(p, L, form, discretization="zoh"):
    """(3) by (4) or (5).   -> k (d, D, L)"""
    C, dt = torch.view_as_complex(p["C"]), p["log_dt"].exp()[:, None]
    A = torch.complex(-p["log_A_real"].exp(), p["A_imag"])
    if discretization == "zoh":
        z = dt * A
        c = C * (torch.expm1(z) / A)
    else:
        x = 0.5 * dt * A
        z, c = 2 * torch.atanh(x), C * (dt / (1 - x))
    return S4D_FORMS[form](c, z, L)


def s4d_mixer(p, x, form, discretization="zoh"):
    """x (B, D, L) -> y (B, D, L)"""
    k = s4d_kernel(p, x.shape[2], form, discretization)
    return gelu_glu(p, convolution(x, k) + x * p["D"][:, None])


def exponentials(z, L):
    """exp(z l), l < L.   z (D, n) -> (D, n, L); torch.exp of complex numbers takes four times as
    long"""
    l = torch.arange(L, dtype=z.real.dtype, device=z.device)
    size, angle = (z.real[:, :, None] * l).exp(), z.imag[:, :, None] * l
    return torch.complex(size * angle.cos(), size * angle.sin())


def factors(z, L):
    """m about sqrt(L): exp(z i), i < m, and exp(z m j), m j < L.   -> (D, n, m), (D, n, L/m)"""
    m = 1 << L.bit_length() // 2
    return exponentials(z, m), exponentials(m * z, -(-L // m))


def vandermonde(z, L):
    """exp(z l), l < L, as products of the two factors.   z (D, n) -> (D, n, L)"""
    low, high = factors(z, L)
    return (high[:, :, :, None] * low[:, :, None, :]).flatten(2)[:, :, :L]


def weighted(c, table):
    """2 Re Σ_n c_n table_n.   c (d, D, n), table (D, n, L) -> (d, D, L)"""
    return 2 * (c.transpose(0, 1) @ table).transpose(0, 1).real


def s4d_published(c, z, L):
    """c (d, D, n), z (D, n) -> k (d, D, L)"""
    l = torch.arange(L, dtype=z.real.dtype, device=z.device)
    return weighted(c, torch.exp(z[:, :, None] * l))


def s4d_materialised(c, z, L):
    """c (d, D, n), z (D, n) -> k (d, D, L)"""
    return weighted(c, vandermonde(z, L))


def s4d_factored(c, z, L):
    """k_{i + m j} = 2 Re Σ_n (c_n exp(z_n m j)) exp(z_n i).   c (d, D, n), z (D, n) -> (d, D, L)"""
    low, high = factors(z, L)
    left = c[:, :, :, None] * high  # (d, D, n, L/m)
    return 2 * (left.transpose(2, 3) @ low).real.flatten(2)[:, :, :L]


class S4DRecomputed(torch.autograd.Function):
    """s4d_materialised, of which only c and z are kept"""

    @staticmethod
    def forward(ctx, c, z, L):
        ctx.save_for_backward(c, z)
        k = z.real.new_empty(*c.shape[:2], L)
        for i in range(0, len(z), CHANNELS):
            own = slice(i, i + CHANNELS)
            k[:, own] = weighted(c[:, own], vandermonde(z[own], L))
        return k

    @staticmethod
    def backward(ctx, dk):
        """dc = 2 Σ_l conj(exp(z l)) dk_l; dz the same with l dk_l, times conj(c)"""
        c, z = ctx.saved_tensors
        d, L = len(c), dk.shape[2]
        l = torch.arange(L, dtype=dk.dtype, device=dk.device)
        right = torch.cat([dk, l * dk]).permute(1, 2, 0)  # (D, L, 2d)
        sums = z.new_empty(*z.shape, 2 * d)
        for i in range(0, len(z), CHANNELS):
            own = slice(i, i + CHANNELS)
            sums[own] = vandermonde(z[own], L) @ right[own].to(z.dtype)
        sums = 2 * sums.permute(2, 0, 1).conj()
        return sums[:d], (c.conj() * sums[d:]).sum(0), None


S4D_FORMS = {
    "published": s4d_published,
    "materialised": s4d_materialised,
    "recomputed": S4DRecomputed.apply,
    "factored": s4d_factored,
}


# S4


def s4_kernel(p, L, form):
    """The kernel of length L that C~ is made for.   -> k (d, D, L) = irfft of k̂

    S_xy = Σ x_n y_n Δ / (2 (1-w) - Δ A_n (1+w)) over all conjugate pairs, w = exp(-2πi j/L)   (1)
    k̂ = 2 [S_CB - (1+w) S_CP S_QB / (1 + (1+w) S_QP)],  Q = conj P                              (2)
    """
    C, B, P = (torch.view_as_complex(p[name]) for name in "CBP")
    A, dt = torch.complex(-p["A_real"].exp(), -p["A_imag"]), p["log_dt"].exp()[:, None]
    d, Q, (minus, plus) = len(C), P.conj(), s4_nodes(L, dt)
    products = torch.cat([C * B, C * P, (Q * B)[None], (Q * P)[None]])
    S = S4_FORMS[form](dt * products, dt * A, minus, plus)
    CB, CP, QB, QP = S[:d], S[d : 2 * d], S[2 * d], S[2 * d + 1]
    return torch.fft.irfft(2 * (CB - plus * CP * (QB / (1 + plus * QP))), L)


def s4_mixer(p, x, form):
    """x (B, D, L) -> y (B, D, L)"""
    k = s4_kernel(p, x.shape[2], form)
    return gelu_glu(p, convolution(x, k) + x * p["D"][:, None])


def s4_nodes(L, like):
    """2 (1-w) and 1+w, (J,) complex in the precision of `like`, J = L//2+1; 1+w = 0 exactly at
    w = -1"""
    w = torch.exp(-2j * math.pi / L * torch.arange(L // 2 + 1, dtype=torch.float64))
    if L % 2 == 0:
        w[-1] = -1
    dtype = torch.complex64 if like.dtype == torch.float32 else torch.complex128
    return ((2 * (1 - w)).to(like.device, dtype), (1 + w).to(like.device, dtype))


# With α = 2 (1-w) and β = 1+w a conjugate pair of (1) is one fraction, of two real numerators:
#     v/(α - βa) + conj(v)/(α - β conj(a)) = (2α Re v - 2β Re(v conj(a))) / q,
#     q = α² - 2αβ Re a + β² |a|²


def s4_reciprocals(a, minus, plus):
    """1/q, q by one real product.   a (D, n), minus, plus (J,) -> (D, n, J)"""
    coefficients = torch.stack([a.real, a.real * a.real + a.imag * a.imag], dim=2)
    q = torch.addmm(as_real(minus * minus), coefficients.flatten(0, 1), s4_slopes(minus, plus))
    return torch.view_as_complex(q.unflatten(1, (-1, 2))).reciprocal().unflatten(0, a.shape)


def s4_slopes(minus, plus):
    """∂q/∂Re a and ∂q/∂|a|².   -> (2, 2J) real"""
    return as_real(torch.stack([-2 * minus * plus, plus * plus]))


def s4_numerators(v, a):
    """Re v and Re(v conj(a)).   v (S, D, n), a (D, n) -> (D, 2S, n) real"""
    return torch.cat([v.real, (v * a.conj()).real]).transpose(0, 1)


def as_real(z):
    """(..., J) complex -> (..., 2J) real, as it lies in memory"""
    return torch.view_as_real(z).flatten(-2)


def s4_materialised(v, a, minus, plus):
    """(1): all sums as one real product with the table 1/q.   v (S, D, n), a (D, n) -> (S, D, J)"""
    sums = s4_numerators(v, a) @ as_real(s4_reciprocals(a, minus, plus))
    sums = torch.view_as_complex(sums.unflatten(2, (-1, 2))).transpose(0, 1)
    return 2 * (minus * sums[: len(v)] - plus * sums[len(v) :])


class S4Recomputed(torch.autograd.Function):
    """s4_materialised, of which only v and a are kept"""

    @staticmethod
    def forward(ctx, v, a, minus, plus):
        ctx.save_for_backward(v, a, minus, plus)
        S = v.new_empty(*v.shape[:2], len(minus))
        for i in range(0, len(a), CHANNELS):
            own = slice(i, i + CHANNELS)
            S[:, own] = s4_materialised(v[:, own], a[own], minus, plus)
        return S

    @staticmethod
    def backward(ctx, dS):
        """Of the numerators x: Re(conj(1/q) dsums); of q: -conj(1/q)² Σ x dsums"""
        v, a, minus, plus = ctx.saved_tensors
        S, dv, da = len(v), torch.empty_like(v), torch.empty_like(a)
        dsums = torch.cat([2 * minus.conj() * dS, -2 * plus.conj() * dS]).transpose(0, 1)
        dsums = as_real(dsums.contiguous())  # (D, 2S, 2J)
        slopes = s4_slopes(minus, plus).T
        for i in range(0, len(a), CHANNELS):
            own = slice(i, i + CHANNELS)
            table = s4_reciprocals(a[own], minus, plus)
            dx = (dsums[own] @ as_real(table).mT).transpose(0, 1)  # (2S, D, n)
            dtable = s4_numerators(v[:, own], a[own]).mT @ dsums[own]
            dq = torch.view_as_complex(dtable.unflatten(2, (-1, 2)))
            dq *= (table * table).conj_physical_()
            dreal, dsquares = (as_real(dq) @ -slopes).unbind(2)
            dv[:, own] = dx[:S] + dx[S:] * a[own]
            da[own] = (dx[S:] * v[:, own]).sum(0) + dreal + 2 * a[own] * dsquares
        return dv, da, None, None


S4_FORMS = {"materialised": s4_materialised, "recomputed": S4Recomputed.apply}


# Hyena, of order O: B (F, D), x_0 .. x_{O-1} and v side by side


def hyena_filters(p, L, shift=0.0):
    """Implicit filters, or, where there are h and W_g, gated ones.   -> k (F, D, L)"""
    if "h" in p:
        h = p["h"][:, :, :L]
        h = h * torch.sigmoid(p["W_g"] @ h + p["b_g"][:, None])
        return h / (h.abs().sum(dim=2, keepdim=True) + 1e-6)
    s, i = p["z"][:L], 0
    while f"c_{i}" in p:
        s = torch.sin(p["freq"] * functional.linear(s, p[f"F_{i}"], p[f"c_{i}"]))
        i += 1
    window = torch.exp(-p["t"][:L, None] * p["deltas"].abs()) + shift
    return (functional.linear(s, p[f"F_{i}"]) * window).T.unflatten(0, p["B"].shape)


def hyena_operator(p, x, recurrence="standard", shift=0.0):
    """x (B, (O+1) D, L) -> y (B, D, L)"""
    *gates, v = x.split(p["B"].shape[1], dim=1)
    filters = zip(hyena_filters(p, x.shape[2], shift), p["B"][:, :, None], strict=True)
    if recurrence == "residual":
        for gate, (k, b) in zip(gates, filters, strict=True):
            v = v + gate * (convolution(v, k[None]) + b * v)
        return v
    for gate, (k, b) in zip(gates[:0:-1], filters, strict=True):
        v = v * gate
        v = convolution(v, k[None]) + b * v
    return v * gates[0]


def hyena_mixer(p, x, **form):
    """x (B, D, L) -> y (B, D, L)"""
    L, (C, _, K) = x.shape[2], p["conv_weight"].shape
    x = functional.conv1d(x, p["W_in"][:, :, None], p["b_in"])
    x = functional.conv1d(x, p["conv_weight"], p["conv_bias"], padding=K - 1, groups=C)[:, :, :L]
    y = hyena_operator(p, x, **form)
    return functional.conv1d(y, p["W_out"][:, :, None], p["b_out"])


# TNN, its RPE with relu and without residual; λ for a learned decay, where gamma is g


def simple_norm(x):
    """x (..., D) -> x / (|x| / sqrt(D) + 1e-8)"""
    return x / (x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + 1e-8)


def tnn_coefficients(p, lags, least=None):
    """γ^|k| RPE(k).   lags (n,), least: λ -> t (E, n)"""
    h = functional.linear(lags[:, None], p["W_p"], p["b_p"])
    layers = zip(p.get("W_r", ()), p.get("b_r", ()), strict=True)
    for W, b in (*layers, (p["W_t"], p["b_t"])):
        h = functional.linear(functional.relu(simple_norm(h)), W, b)
    if "gamma" in p:
        gamma = p["gamma"] if least is None else least + (1 - least) * p["gamma"].sigmoid()
        h = h * gamma ** lags.abs()[:, None]
    return h.T


def tnn_operator(p, x, causal=True, least=None):
    """x (B, E, L) -> y (B, E, L); in both directions t_{-k} stands at 2L - k"""
    L = x.shape[2]
    lags = torch.arange(L, dtype=x.dtype, device=x.device)
    t = tnn_coefficients(p, lags, least)
    if not causal:
        before = tnn_coefficients(p, lags[1:].flip(0).neg(), least)
        t = torch.cat([t, t[:, :1], before], dim=1)
    return torch.fft.irfft(torch.fft.rfft(x, 2 * L) * torch.fft.rfft(t, 2 * L), 2 * L)[:, :, :L]


def tnn_mixer(p, x, **form):
    """x (B, D, L) -> y (B, D, L)"""
    u, v = (
        functional.silu(functional.conv1d(x, p[f"W_{name}"][:, :, None], p[f"b_{name}"]))
        for name in "uv"
    )
    y = u * tnn_operator(p, v, **form)
    return functional.conv1d(y, p["W_o"][:, :, None], p["b_o"])


# Transformer


def transformer_block(p, x, heads, causal, form):
    """x (B, L, D) -> y (B, L, D), pre-LN; form: fused (PyTorch's own attention) or softmax"""
    D = x.shape[2]
    a = torch.nn.functional.layer_norm(x, (D,), p["norm1_weight"], p["norm1_bias"])
    qkv = torch.nn.functional.linear(a, p["W_qkv"], p["b_qkv"])
    q, k, v = qkv.unflatten(2, (3, heads, D // heads)).permute(2, 0, 3, 1, 4)
    o = TRANSFORMER_FORMS[form](q, k, v, causal).transpose(1, 2).flatten(2)
    x = x + torch.nn.functional.linear(o, p["W_o"], p["b_o"])
    a = torch.nn.functional.layer_norm(x, (D,), p["norm2_weight"], p["norm2_bias"])
    a = torch.nn.functional.linear(a, p["W_1"], p["b_1"])
    a = torch.nn.functional.gelu(a, approximate="tanh")
    return x + torch.nn.functional.linear(a, p["W_2"], p["b_2"])


def attention_fused(q, k, v, causal):
    """q, k, v (B, H, L, d) -> (B, H, L, d)"""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attention_softmax(q, k, v, causal):
    """The same with the table of weights (B, H, L, L)"""
    S = (q * q.shape[3] ** -0.5) @ k.mT
    if causal:
        S = S + torch.full_like(S[0, 0], -math.inf).triu(1)
    return S.softmax(-1) @ v


TRANSFORMER_FORMS = {"fused": attention_fused, "softmax": attention_softmax}


# Mamba and Longhorn


def recurrence(decay, inputs, c):
    """h_t = decay_t h_{t-1} + inputs_t, y_t = h_t c_t.   decay, inputs (B, L, E, N), c (B, L, N)
    -> y (B, L, E)"""
    h, y = torch.zeros_like(inputs[:, 0]), []
    for a, u, c_t in zip(*(t.unbind(1) for t in (decay, inputs, c)), strict=True):
        h = a * h + u
        y.append((h @ c_t[:, :, None])[:, :, 0])
    return torch.stack(y, 1)


def products(x, delta, A, b):
    """exp(δ A), δ x b.   x, delta (B, ..., E), A (E, N), b (B, ..., N) -> each (B, ..., E, N)"""
    return (delta[..., None] * A).exp(), (delta * x)[..., None] * b[..., None, :]


def mamba_outside(x, delta, A, b, c):
    """(3), (4) without skip.   x, delta (B, L, E), A (E, N), b, c (B, L, N) -> y (B, L, E)"""
    return recurrence(*products(x, delta, A, b), c)


def mamba_inside(x, delta, A, b, c):
    """The same, position by position"""
    h, y = x.new_zeros(len(x), *A.shape), []
    for x_t, d_t, b_t, c_t in zip(*(t.unbind(1) for t in (x, delta, b, c)), strict=True):
        decay, u = products(x_t, d_t, A, b_t)
        h = decay * h + u
        y.append((h @ c_t[:, :, None])[:, :, 0])
    return torch.stack(y, 1)


def mamba_pscan(x, delta, A, b, c):
    """The same by mamba.py"""
    h = importlib.import_module("mambapy.pscan").pscan(*products(x, delta, A, b))
    return (h @ c[..., None])[..., 0]


MAMBA_FORMS = {"products outside": mamba_outside, "all in the loop": mamba_inside}
if importlib.util.find_spec("mambapy"):
    MAMBA_FORMS["pscan"] = mamba_pscan


def mamba_scan(x, delta, A, b, c, D, form):
    """(3), (4).   x, delta (B, L, E), A (E, N), b, c (B, L, N), D (E,) -> y (B, L, E)"""
    return MAMBA_FORMS[form](x, delta, A, b, c) + D * x


def longhorn_products(x, delta, k):
    """1 - Δ k², Δ x k.   x, delta (B, ..., E), k (B, ..., N) -> each (B, ..., E, N)"""
    return 1 - delta[..., None] * (k * k)[..., None, :], (delta * x)[..., None] * k[..., None, :]


def longhorn_outside(x, delta, k, q):
    """(4), (5) without skip.   x, delta (B, L, E), k, q (B, L, N) -> y (B, L, E)"""
    return recurrence(*longhorn_products(x, delta, k), q)


def longhorn_inside(x, delta, k, q):
    """The same, position by position"""
    h, y = x.new_zeros(len(x), x.shape[2], k.shape[2]), []
    for x_t, d_t, k_t, q_t in zip(*(t.unbind(1) for t in (x, delta, k, q)), strict=True):
        decay, u = longhorn_products(x_t, d_t, k_t)
        h = decay * h + u
        y.append((h @ q_t[:, :, None])[:, :, 0])
    return torch.stack(y, 1)


LONGHORN_FORMS = {"products outside": longhorn_outside, "all in the loop": longhorn_inside}


def longhorn_scan(x, beta, k, q, D, form):
    """(2), (4), (5).   x, beta (B, L, E), k, q (B, L, N), D (E,) -> y (B, L, E)"""
    delta = beta / (1 + beta * (k * k).sum(-1, keepdim=True))
    return LONGHORN_FORMS[form](x, delta, k, q) + D * x


def selective_mixer(p, u, scan):
    """The mixer around a scan(x, dt, b, c).   u (B, L, D) -> y (B, L, D)"""
    L, (E, R) = u.shape[1], p["W_dt"].shape
    x, z = functional.linear(u, p["W_in"]).chunk(2, dim=2)
    w = p["conv_weight"]
    x = functional.conv1d(x.mT, w, p["conv_bias"], padding=w.shape[2] - 1, groups=E)[:, :, :L].mT
    x = functional.silu(x)
    rbc = functional.linear(x, p["W_x"])
    b, c = rbc[..., R:].chunk(2, dim=2)
    dt = functional.linear(rbc[..., :R], p["W_dt"], p["dt_bias"])
    return functional.linear(scan(x, dt, b, c) * functional.silu(z), p["W_out"])


def mamba_mixer(p, u, form):
    """u (B, L, D) -> y (B, L, D)"""

    def scan(x, dt, b, c):
        return mamba_scan(x, functional.softplus(dt), -p["A_log"].exp(), b, c, p["D"], form)

    return selective_mixer(p, u, scan)


def longhorn_mixer(p, u, form):
    """u (B, L, D) -> y (B, L, D)"""
    return selective_mixer(
        p, u, lambda x, dt, k, q: longhorn_scan(x, dt.sigmoid(), k, q, p["D"], form)
    )


def mamba_block(p, x, form):
    """x (B, L, D) -> x + mixer(RMSNorm(x))"""
    return x + mamba_mixer(p, functional.rms_norm(x, x.shape[2:], p["norm_weight"], 1e-5), form)


def longhorn_block(p, x, form):
    """x (B, L, D) -> x + mixer(RMSNorm(x))"""
    return x + longhorn_mixer(p, functional.rms_norm(x, x.shape[2:], p["norm_weight"], 1e-5), form)
