"""HOPE-SSM.  Yu, Mahoney, Erichson: HOPE for a Robust Parameterization of Long-memory State Space
Models, ICLR 2025, arXiv 2405.13975, Algorithm 1.

A linear system is learned through its Markov parameters h_i = C Aⁱ B, the entries of its Hankel
matrix, not through A, B and C. With sampling period Δ = dt, on the FFT nodes w_j = exp(2πi j/L):

    Ḡ(z) = Σ_{i<n} h_i z^-(i+1)                                  transfer function            (1)
    w'_j = ((1+Δ) w_j + Δ-1) / ((Δ-1) w_j + Δ+1) = exp(i θ'_j)   where it is sampled          (2)
    y = Re ifft(fft(u) Ḡ(w')) + D u                              the operator                 (3)
    θ'_j = 2 atan2(sin(θ_j/2), Δ cos(θ_j/2)),  θ_j = 2π j/L      (2) without singular point   (4)
    1/w' = (1 - a z)/(z - a) = A(z),  a = (1-Δ)/(1+Δ)            an all-pass section          (5)
    q_t = s_{t-1} - a p_t,  s_t = a q_t + p_t                    one section, p in, q out     (6)

(3) is a circular convolution. By (5) the system is also a ladder of n all-pass sections,
Ḡ = Σ h_i A^(i+1): the causal convolution and the recurrent step are exact, with n real states a
channel.

    parameter  shape                  B batch, L length, D channels, n Markov parameters, d
    directions
    H          (dD, n, 2) or (dD, n)  h, complex as (re, im), or real; second half: backward
    log_dt     (dD,)                  log Δ
    D          (D,)                   skip
    W, b       (2D, D), (2D,)         output projection before the GLU
    norm_*     (D,)                   of the block

For real u the imaginary part of h has no effect on (3): Re ifft(U g) keeps the Hermitian part of g,
which is (1) with Re h. So the map needs real h, L//2+1 nodes and rfft only; complex h loads, and
Im h gets a gradient of exactly zero.

Differences from the published code (HOPE-SSM):
- It does not zero-pad, so (3) is circular there as in the paper: conv="circular". conv="causal" and
  `step` are new.
- Its bidirectional layer samples both directions on L/2 nodes that go once round the whole circle
  and joins them to one spectrum [g_f, reversed g_b]: layout="published", for checking its
  checkpoints (L even; there Im h matters). layout="paper" is the clean form,
  y = Re ifft(fft(u) (Ḡ_f(w') + Ḡ_b(conj w'))) + D u.
- Its LRA pipeline joins [x, flip(x)] as halves of one 2L spectrum; not offered here.
- Its LRA pipeline hands the weight decay over as the learning rate of h: with the shipped
  configuration (0.0) ListOps, IMDB and AAN train with frozen random h; so does train_markov=False.
- n is d_state/2 in its minimal class and d_state in its LRA pipeline, and h is scaled by
  1/(2 sqrt(d_state)) and by 1/(scale_factor sqrt(n)): convention="minimal" and "lra".
"""

import math
from dataclasses import dataclass

from ref import Error, backend, block, nn, ssm
from ref.backend import array_module, check_activations, check_choice, twins


@dataclass(frozen=True)
class Config:
    """HOPE's layer."""

    d_model: int = 128
    d_state: int = 64
    convention: str = "minimal"  # minimal: n = d_state/2; lra: n = d_state
    conv: str = "circular"  # circular (the paper); causal; identity (y = u, for comparison)
    bidirectional: bool = False
    layout: str = "paper"  # of the bidirectional layer: paper or published
    markov: str = "complex"  # complex or real h
    train_markov: bool = True
    scale_factor: float = 2.0
    dt_min: float = 1e-4
    dt_max: float = 1e-1
    dropout: float = 0.0
    norm: str = "layer"
    prenorm: bool = False

    def __post_init__(self):
        check_choice("convention", self.convention, ("minimal", "lra"))
        check_choice("conv", self.conv, ("circular", "causal", "identity"))
        check_choice("layout", self.layout, ("paper", "published"))
        check_choice("markov", self.markov, ("complex", "real"))
        check_choice("norm", self.norm, block.NORMS)
        if self.d_model < 1 or self.n < 1:
            raise Error(f"d_model={self.d_model} and n={self.n} of d_state: at least 1 of each.")
        if not (0 < self.dt_min <= self.dt_max and 0 <= self.dropout < 1 and self.scale_factor > 0):
            raise Error("expected 0 < dt_min <= dt_max, 0 <= dropout < 1 and scale_factor > 0.")
        if self.conv == "causal" and self.bidirectional:
            raise Error("conv='causal' has one direction only, so bidirectional must be False.")
        if self.layout == "published" and not (self.bidirectional and self.conv == "circular"):
            raise Error("layout='published' needs bidirectional=True and conv='circular'.")

    @property
    def n(self):
        """Markov parameters a channel and direction."""
        return self.d_state // 2 if self.convention == "minimal" else self.d_state

    @property
    def causal(self):
        """Whether outputs depend on no later input: what language modelling needs, and `step`."""
        return self.conv != "circular"


def groups(cfg):
    """Parameters with a learning rate of their own: name -> ssm, dt, or frozen"""
    return {"H": "ssm" if cfg.train_markov else "frozen", "log_dt": "dt"}


def operator_init(cfg, rng, dtype="float32"):
    """H complex normal, log_dt uniform between the logarithms of dt_min and dt_max, D normal"""
    if cfg.conv == "identity":
        return {}
    channels = cfg.d_model * (2 if cfg.bidirectional else 1)
    scale = (
        2 * math.sqrt(cfg.d_state)
        if cfg.convention == "minimal"
        else cfg.scale_factor * math.sqrt(cfg.n)
    )
    H = rng.standard_normal((channels, cfg.n, 2)) * (math.sqrt(0.5) / scale)
    log_dt = rng.uniform(math.log(cfg.dt_min), math.log(cfg.dt_max), channels)
    params = {
        "H": H if cfg.markov == "complex" else H[..., 0],
        "log_dt": log_dt,
        "D": rng.standard_normal(cfg.d_model),
    }
    return {name: p.astype(dtype) for name, p in params.items()}


# Sampling the transfer function


def nodes_forward(log_dt, L, J):
    """(4).   log_dt (D,) -> θ' (D, J) float64"""
    xp = array_module(log_dt)
    half = xp.arange(J, dtype="float64") * (math.pi / L)
    s, c, dt = xp.sin(half), xp.cos(half), xp.exp(log_dt.astype("float64"))[:, None]
    return 2 * xp.arctan2(s, dt * c), (s, c, dt)


def nodes_backward(dangle, cache):
    """dθ' (D, J) -> dlog_dt.   ∂θ'/∂log Δ = -2Δ s c/(s² + Δ² c²), s = sin(θ/2), c = cos(θ/2)"""
    s, c, dt = cache
    return (dangle * (-2 * dt * s * c / (s * s + dt * dt * c * c))).sum(axis=1)


def sample_forward(h, log_dt, L, J):
    """(1) at the first J of the L nodes (4), in float64 whatever the precision: a rounding of w'
    counts i times in its i-th power.   h (D, n), log_dt (D,) -> g (D, J) complex"""
    if twin := twins("hope", h):
        return twin.sample_forward(h, log_dt, L, J), (h, log_dt, L, J)
    xp = array_module(h)
    angle, nodes = nodes_forward(log_dt, L, J)
    powers = xp.repeat(xp.exp(-1j * angle)[:, :, None], h.shape[1], axis=2)
    powers = xp.cumprod(powers, axis=2)  # w'^-1, w'^-2, ... (D, J, n)
    g = (powers @ h.astype("complex128")[:, :, None])[:, :, 0]
    return g.astype(backend.complex_dtype(log_dt.dtype)), (h, log_dt, L, J, nodes, powers)


def sample_backward(dg, cache):
    """dg (D, J) -> dh, dlog_dt

    From ∂g/∂θ' = -i Σ (i+1) h_i w'^-(i+1).
    """
    h, log_dt, L, J, *tables = cache
    if twin := twins("hope", h):
        dh, dlog_dt = twin.sample_backward(dg, h, log_dt, L, J)
    else:
        nodes, powers = tables
        xp, dg = array_module(h), dg.astype("complex128")
        dh = (dg[:, None, :] @ powers.conj())[:, 0].astype(backend.complex_dtype(log_dt.dtype))
        i1 = xp.arange(1, h.shape[1] + 1, dtype="float64")
        slope = (powers @ (i1 * h)[:, :, None].astype("complex128"))[:, :, 0]
        dangle = (dg.conj() * slope).imag  # Re(conj(dg) · -i slope)
        dlog_dt = nodes_backward(dangle, nodes).astype(log_dt.dtype)
    return dh if h.dtype.kind == "c" else dh.real, dlog_dt


def response_forward(params, L, cfg):
    """What (3) multiplies rfft(u) with.   -> G (L//2+1, D) complex"""
    if cfg.layout == "published":
        return _published_response_forward(params, L, cfg)
    g, sample = sample_forward(_real_markov(params), params["log_dt"], L, L // 2 + 1)
    G = g[: cfg.d_model] + g[cfg.d_model :].conj() if cfg.bidirectional else g
    return array_module(G).ascontiguousarray(G.T), (cfg, sample, params["H"])


def response_backward(dG, cache):
    """dG (L//2+1, D) -> grads of H and log_dt"""
    cfg, sample, H = cache
    if cfg.layout == "published":
        return _published_response_backward(dG, cache)
    xp, dg = array_module(dG), dG.T
    dg = xp.concatenate([dg, dg.conj()]) if cfg.bidirectional else dg
    dh, dlog_dt = sample_backward(xp.ascontiguousarray(dg), sample)
    return {"H": _like(H, dh), "log_dt": dlog_dt}


def _real_markov(params):
    return params["H"] if params["H"].ndim == 2 else params["H"][..., 0]


def _like(H, dh):
    """The gradient of H whose real part alone had an effect"""
    return dh if H.ndim == 2 else ssm.as_pairs(dh + 0j)


def _as_complex(H):
    return H + 0j if H.ndim == 2 else ssm.as_complex(H)


def _published_response_forward(params, L, cfg):
    """The Hermitian part of [g_f, reversed g_b], each on L/2 nodes round the whole circle"""
    if L % 2:
        raise Error(f"layout='published' needs an even length and got L={L}.")
    xp, D, H = array_module(params["H"]), cfg.d_model, params["H"]
    g, sample = sample_forward(_as_complex(H), params["log_dt"], L // 2, L // 2)
    S = xp.concatenate([g[:D], g[D:, ::-1]], axis=1).T
    mirrored = xp.roll(S[::-1], 1, axis=0).conj()
    return (0.5 * (S + mirrored))[: L // 2 + 1], (cfg, sample, H)


def _published_response_backward(dG, cache):
    """dG (L/2+1, D) -> grads.   The bins above L/2 get their share from their mirrors."""
    _, sample, H = cache
    xp, half = array_module(dG), len(dG) - 1
    dS = xp.concatenate([0.5 * dG, 0.5 * dG[1:-1][::-1].conj()])
    dS[0], dS[half] = dG[0].real, dG[half].real
    dg = xp.concatenate([dS[:half].T, dS[half:][::-1].T])
    dh, dlog_dt = sample_backward(xp.ascontiguousarray(dg), sample)
    return {"H": dh.real if H.ndim == 2 else ssm.as_pairs(dh), "log_dt": dlog_dt}


# The ladder: the same system as a causal convolution and as a recurrence


def pole(log_dt):
    """a of (5).   (1-Δ)/(1+Δ) = -tanh(log Δ / 2)"""
    return -array_module(log_dt).tanh(0.5 * log_dt)


def ladder_step(h, a, s, p):
    """(6) through all n sections.   p (B, D), s (B, D, n), h (D, n), a (D,) -> y (B, D), s"""
    y, states = 0, []
    for i in range(h.shape[1]):
        q = s[..., i] - a * p
        states.append(a * q + p)
        y = y + h[:, i] * q
        p = q
    return y, array_module(h).stack(states, axis=-1)


def ladder_forward(h, log_dt, L):
    """The causal kernel, the ladder's impulse response.   h (D, n), log_dt (D,) -> k (D, L)"""
    if twin := twins("hope", h):
        return twin.ladder_forward(h, log_dt, L), (h, log_dt, L)
    xp, a = array_module(h), pole(log_dt)
    q = xp.zeros((len(h), L), dtype=h.dtype)
    q[:, 0] = 1
    sections = [q]  # (D, L) after 0, 1, ... n sections
    for _ in range(h.shape[1]):
        p, q, s = q, xp.empty_like(q), xp.zeros_like(a)
        for t in range(L):
            q[:, t] = s - a * p[:, t]
            s = a * q[:, t] + p[:, t]
        sections.append(q)
    Q = xp.stack(sections, axis=1)
    return (h[:, None, :] @ Q[:, 1:])[:, 0], (h, log_dt, L, Q)


def ladder_backward(dk, cache):
    """dk (D, L) -> dh, dlog_dt.   ∂A/∂a = (z⁻² - 1)/(1 - a z⁻¹)²,  ∂a/∂log Δ = -(1 - a²)/2"""
    h, log_dt, L, *table = cache
    if twin := twins("hope", h):
        return twin.ladder_backward(dk, h, log_dt, L)
    (Q,), xp, a = table, array_module(h), pole(log_dt)
    dh = (Q[:, 1:] @ dk[:, :, None])[:, :, 0]
    i1 = xp.arange(1, h.shape[1] + 1, dtype=h.dtype)
    r = ((i1 * h)[:, None, :] @ Q[:, :-1])[:, 0]  # ∂k/∂a = ∂A/∂a applied to r = Σ (i+1) h_i A^i
    da, before, last = xp.zeros_like(a), xp.zeros_like(a), xp.zeros_like(a)
    for t in range(L):
        w = 2 * a * last - a * a * before - r[:, t] + (r[:, t - 2] if t >= 2 else 0)
        da = da + dk[:, t] * w
        before, last = last, w
    return dh, da * (-0.5 * (1 - a * a))


# Operator, mixer, block


def operator_forward(params, x, cfg):
    """(3), or the causal convolution with the ladder's kernel.   x (B, L, D) -> y (B, L, D)"""
    check_activations(x, cfg.d_model)
    if cfg.conv == "identity":
        return x, (cfg, None, None, None, None)
    if cfg.conv == "causal":
        k, kernel = ladder_forward(_real_markov(params), params["log_dt"], x.shape[1])
        y, conv = nn.fft_conv_forward(x, k, "causal")
    else:
        G, kernel = response_forward(params, x.shape[1], cfg)
        y, conv = nn.spectral_conv_forward(x, G)
    y, skip = nn.skip_forward(y, params["D"], x)
    return y, (cfg, params["H"], kernel, conv, skip)


def operator_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    cfg, H, kernel, conv, skip = cache
    if cfg.conv == "identity":
        return dy, {}
    _, dD, dx_skip = nn.skip_backward(dy, skip)
    if cfg.conv == "causal":
        dx, dk = nn.fft_conv_backward(dy, conv)
        dh, dlog_dt = ladder_backward(dk, kernel)
        grads = {"H": _like(H, dh), "log_dt": dlog_dt}
    else:
        dx, dG = nn.spectral_conv_backward(dy, conv)
        grads = response_backward(dG, kernel)
    return dx + dx_skip, grads | {"D": dD}


def mixer_init(cfg, rng, dtype="float32"):
    """Operator and output projection"""
    return operator_init(cfg, rng, dtype) | block.gelu_glu_init(cfg.d_model, rng, dtype)


def mixer_forward(params, x, cfg, rng=None):
    """operator -> GELU -> dropout -> linear D to 2D -> GLU.   x (B, L, D) -> y (B, L, D)"""
    return block.gelu_mixer_forward(params, x, cfg, operator_forward, rng)


def mixer_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    return block.gelu_mixer_backward(dy, cache, operator_backward)


def block_init(cfg, rng, dtype="float32"):
    """Mixer and norm"""
    params = mixer_init(cfg, rng, dtype)
    return params | block.norm_init(cfg.norm, cfg.d_model, array_module(params["W"]), dtype)


def block_forward(params, x, cfg, rng=None):
    """The mixer with residual and norm.   x (B, L, D) -> y (B, L, D)"""
    return block.residual_forward(params, x, cfg, mixer_forward, rng)


def block_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    return block.residual_backward(dy, cache, mixer_backward)


def running_statistics(params, cache):
    """The block's running moments (batch norm) after a training batch, by name"""
    return block.residual_running(params, cache)


# Recurrent form


def kernels(params, cfg, L):
    """The block's long filter, causal, without the skip.   -> k (1, D, L)   Error: another conv"""
    if cfg.conv != "causal":
        raise Error(f"conv={cfg.conv!r} has no causal kernel; use conv='causal'.")
    return impulse_response(params, cfg, L)[None]


def state(params, cfg, batch, systems=None):
    """The block's state before the first step: (B, D, n) zeros, or that of `systems`, which the
    kernel was converted to (ref.etsc).   Error: the map is not causal."""
    if cfg.conv == "circular":
        raise Error("conv='circular' sees all of a sequence: no recurrent step; use conv='causal'.")
    if cfg.conv == "identity":
        return {}
    if systems:
        return block.converted_state(systems, batch)
    D = params["D"]
    return {"s": array_module(D).zeros((batch, cfg.d_model, cfg.n), dtype=D.dtype)}


def operator_step(params, x_t, state, cfg):
    """One time step of the causal operator.   x_t (B, D) -> y_t (B, D), state"""
    if cfg.conv == "identity":
        return x_t, state
    if "systems" in state:
        return block.converted_step(x_t, state, params["D"])
    y, s = ladder_step(_real_markov(params), pole(params["log_dt"]), state["s"], x_t)
    return y + params["D"] * x_t, {"s": s}


def step(params, x_t, state, cfg):
    """One time step of the block.   x_t (B, D) -> y_t (B, D), state"""
    return block.gelu_mixer_step(params, x_t, state, cfg, operator_step)


def prefill(params, x, cfg, state):
    """The block's forward over x (B, L, D), from a fresh state -> y (B, L, D), state after it"""
    return block.gelu_mixer_prefill(params, x, state, cfg, operator_forward, operator_step)


# Looking at it


def impulse_response(params, cfg, L):
    """The operator's answer to an impulse at t = 0, without the skip.   -> k (D, L)"""
    _has_kernel(cfg)
    if cfg.conv == "causal":
        return ladder_forward(_real_markov(params), params["log_dt"], L)[0]
    return backend.irfft(response_forward(params, L, cfg)[0], L, axis=0).T


def matrix(params, cfg, x=None, L=None):
    """The operator as a matrix, y_t = Σ_s M[t, s] u_s, for L or x's length.   -> M (1, D, L, L)"""
    L = ssm.length_of(x, L)
    k, D = impulse_response(params, cfg, L), params["D"]
    xp = array_module(D)
    t = xp.arange(L)
    M = k[:, (t[:, None] - t[None, :]) % L]
    if cfg.conv == "causal":
        M = xp.tril(M)
    return (M + D[:, None, None] * xp.eye(L, dtype=D.dtype))[None]


def hankel_singular_values(h):
    """Of H[i, j] = h_{i+j}, zero beyond, descending.   h (..., n), real or complex -> (..., n)"""
    xp, n = array_module(h), h.shape[-1]
    index = xp.arange(n)[:, None] + xp.arange(n)[None, :]
    hankel = xp.where(index < n, h[..., xp.minimum(index, n - 1)], 0)
    return xp.linalg.svd(hankel, compute_uv=False)


def hankel_values(params, cfg):
    """hankel_singular_values of a layer's h (dD, n).   Error: it has none"""
    _has_kernel(cfg)
    return hankel_singular_values(_as_complex(params["H"]))


def _has_kernel(cfg):
    if cfg.conv == "identity":
        raise Error("conv='identity' has no kernel to show.")


# Names of the published code

_KERNEL = {"H": "kernel.H", "log_dt": "kernel.log_dt"}
PUBLISHED = {
    "operator": {"D": "D", "H": "H", "log_dt": "log_dt"},
    "mixer": {"D": "D"} | _KERNEL | block.PUBLISHED_TAIL,
    "block": block.within("layer.", {"D": "D"} | _KERNEL | block.PUBLISHED_TAIL)
    | block.within("norm.", block.PUBLISHED_NORM),
}
PUBLISHED_LAYER = {"layer.": "s4_layers.{i}.", "norm.": "norms.{i}."}  # a block within a network


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params"""
    params = block.from_published(tensors, PUBLISHED[part])
    if cfg.markov == "real" and "H" in params:
        params["H"] = params["H"][..., 0]
    return params


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names and shapes"""
    if cfg.markov == "real" and "H" in params:
        params = params | {"H": ssm.as_pairs(params["H"] + 0j)}
    return block.to_published(params, PUBLISHED[part])


def config_of(settings, tensors, part):
    """The Config of a case: widths off its published tensors' shapes, the rest from its settings"""
    names = {name.rpartition(".")[2]: t for name, t in tensors.items()}
    if "D" not in names or "H" not in names:
        return Config(**settings)
    settings = dict(settings, d_model=names["D"].shape[0])
    n = names["H"].shape[1]
    if settings.get("d_state") == n:
        return Config(**settings | {"convention": "lra"})
    return Config(**settings | {"convention": "minimal", "d_state": 2 * n})


def case_outputs(part, params, x, cfg):
    """Outputs of a case besides y: kernel_f (D, L, 2), (1) at all nodes"""
    if part == "network" or cfg.conv != "circular" or cfg.bidirectional:
        return {}
    h, L = _as_complex(params["H"]), x.shape[1]
    return {"kernel_f": ssm.as_pairs(sample_forward(h, params["log_dt"], L, L)[0])}
