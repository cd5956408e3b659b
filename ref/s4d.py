"""S4D.  Gu, Gupta, Goel, Ré: On the Parameterization and Initialization of Diagonal State Space
Models, NeurIPS 2022, arXiv 2206.11893.

Each channel is a linear system with a diagonal A, of which N/2 complex modes stand for conjugate
pairs, with B = 1, sampled with period Δ = dt:

    x'(t) = A x(t) + u(t),  y(t) = 2 Re C x(t) + D u(t)           the system                     (1)
    A = -exp(log_A_real) + i A_imag                               Re A < 0: it is stable         (2)
    k_l = 2 Re Σ_n c_n exp(z_n l)                                 the kernel                     (3)
    z = Δ A,  c = C (exp(Δ A) - 1) / A                            zero-order hold                (4)
    z = log((1 + Δ A/2) / (1 - Δ A/2)),  c = C Δ / (1 - Δ A/2)    bilinear                       (5)
    y = k * u + D u                                               the operator                   (6)
    x_t = exp(z) x_{t-1} + u_t,  y_t = 2 Re Σ_n c_n x_tn + D u_t  the same, step by step         (7)

    parameter           shape           B batch, L length, D channels, N = d_state, d directions
    C                   (d, D, N/2, 2)  as (re, im); second direction: from the future
    log_dt              (D,)            log Δ
    log_A_real, A_imag  (D, N/2)        (2)
    D                   (D,)            skip
    W, b                (2D, D), (2D,)  output projection before the GLU
    norm_*              (D,)            of the block

Initial A, n = 0 .. N/2-1: lin -1/2 + iπn; inv -1/2 + i (N/π)(N/(2n+1) - 1); legs the eigenvalues of
the normal part of HiPPO-LegS; random (ours, for comparison) -|a| + ib, a and b standard normal.

The kernel is a product with a Vandermonde matrix that is never formed in the twins: exp(z l) goes
from block to block of l by one multiplication.

Differences from the published code (s4, models/s4/s4d.py): it has zero-order hold and one
direction; bilinear and two directions are here as in its s4.py (the second kernel begins one step
ahead, see ref.ssm). exp(ΔA) - 1 is formed without cancellation.
"""

import math
from dataclasses import dataclass

import numpy as np

from ref import Error, block, nn, ssm
from ref.backend import array_module, check_activations, check_choice, twins


@dataclass(frozen=True)
class Config:
    """S4D's layer."""

    d_model: int = 128
    d_state: int = 64
    init: str = "lin"  # of A: lin, inv, legs, random
    discretization: str = "zoh"  # zoh or bilinear
    bidirectional: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dropout: float = 0.0
    norm: str = "layer"
    prenorm: bool = False

    def __post_init__(self):
        check_choice("init", self.init, ("lin", "inv", "legs", "random"))
        check_choice("discretization", self.discretization, ("zoh", "bilinear"))
        check_choice("norm", self.norm, block.NORMS)
        if self.d_model < 1 or self.d_state < 2 or self.d_state % 2:
            raise Error(
                f"d_model={self.d_model}, d_state={self.d_state}: at least 1, and even, at least 2."
            )
        if not (0 < self.dt_min <= self.dt_max and 0 <= self.dropout < 1):
            raise Error("expected 0 < dt_min <= dt_max and 0 <= dropout < 1.")

    @property
    def causal(self):
        """Whether outputs depend on no later input: what language modelling needs, and `step`."""
        return not self.bidirectional


def groups(cfg):
    """Parameters with a learning rate of their own: name -> ssm, dt, or frozen"""
    return {"log_A_real": "ssm", "A_imag": "ssm", "log_dt": "dt"}


def operator_init(cfg, rng, dtype="float32"):
    """A by cfg.init, C complex normal, log_dt uniform between the logarithms of dt_min and dt_max,
    D normal"""
    D, N, n = cfg.d_model, cfg.d_state, np.arange(cfg.d_state // 2)
    if cfg.init == "random":
        a, A_imag = rng.standard_normal((2, D, N // 2))
        log_A_real = np.log(np.abs(a))
    else:
        imaginary = {
            "lin": lambda: math.pi * n,
            "inv": lambda: N / math.pi * (N / (2 * n + 1) - 1),
            "legs": lambda: -ssm.legs_nplr(N)[0].imag,
        }
        A_imag = np.tile(imaginary[cfg.init](), (D, 1))
        log_A_real = np.full((D, N // 2), math.log(0.5))
    directions = 2 if cfg.bidirectional else 1
    params = {
        "C": rng.standard_normal((directions, D, N // 2, 2)) * math.sqrt(0.5),
        "log_dt": rng.uniform(math.log(cfg.dt_min), math.log(cfg.dt_max), D),
        "log_A_real": log_A_real,
        "A_imag": A_imag,
        "D": rng.standard_normal(D),
    }
    return {name: p.astype(dtype) for name, p in params.items()}


# The kernel


def vandermonde_forward(c, z, L):
    """(3).   c (d, D, n), z (D, n) complex -> k (d, D, L)"""
    if twin := twins("s4d", z):
        return twin.vandermonde_forward(c, z, L), (c, z, L)
    xp = array_module(z)
    powers = xp.exp(z[:, :, None] * xp.arange(L, dtype=z.real.dtype))  # (D, n, L)
    k = 2 * (c[:, :, None, :] @ powers)[:, :, 0].real
    return xp.ascontiguousarray(k), (c, z, L, powers)


def vandermonde_backward(dk, cache):
    """dk (d, D, L) -> dc, dz.   From ∂exp(z l)/∂z = l exp(z l)"""
    c, z, L, *table = cache
    if twin := twins("s4d", z):
        return twin.vandermonde_backward(dk, c, z)
    (powers,), xp = table, array_module(z)
    l = xp.arange(L, dtype=z.real.dtype)
    conjugate = powers.conj()
    dc = 2 * (conjugate @ dk[..., None])[..., 0]
    slope = 2 * (conjugate @ (l * dk)[..., None])[..., 0]
    return dc, (c.conj() * slope).sum(axis=0)


def discretize_forward(C, A, dt, cfg):
    """(4) or (5).   C (d, D, n), A (D, n) complex, dt (D, 1) -> z (D, n), c (d, D, n)"""
    if cfg.discretization == "zoh":
        z = dt * A
        E = _expm1(z)
        return z, C * (E / A), (cfg, C, A, dt, E)
    xp, x = array_module(A), 0.5 * dt * A
    # log((1+x)/(1-x)) without cancellation: |1+x|²/|1-x|² = 1 + 4 Re x/|1-x|²
    r = x.real * x.real + x.imag * x.imag
    z = 0.5 * xp.log1p(4 * x.real / (1 - 2 * x.real + r)) + 1j * xp.arctan2(2 * x.imag, 1 - r)
    return z, C * (dt / (1 - x)), (cfg, C, A, dt, x)


def discretize_backward(dz, dc, cache):
    """dz (D, n), dc (d, D, n) -> dC, dA, ddt"""
    cfg, C, A, dt, *more = cache
    dfactor = (C.conj() * dc).sum(axis=0)
    if cfg.discretization == "zoh":
        (E,) = more
        dz = dz + ((E + 1) / A).conj() * dfactor
        dA = dz * dt - (E / (A * A)).conj() * dfactor
        ddt = (A.conj() * dz).real.sum(axis=1)
        return dc * (E / A).conj(), dA, ddt
    (x,) = more
    factor = dt / (1 - x)
    dx = (2 / (1 - x * x)).conj() * dz + (factor / (1 - x)).conj() * dfactor
    ddt = (0.5 * A.conj() * dx + dfactor / (1 - x).conj()).real.sum(axis=1)
    return dc * factor.conj(), 0.5 * dt * dx, ddt


def _expm1(z):
    """exp(z) - 1.   = expm1(a) cos b - 2 sin²(b/2) + i exp(a) sin b,  z = a + ib"""
    xp, half = array_module(z), array_module(z).sin(0.5 * z.imag)
    real = xp.expm1(z.real) * xp.cos(z.imag) - 2 * half * half
    return real + 1j * (xp.exp(z.real) * xp.sin(z.imag))


def modes(params):
    """C (d, D, n) and A (D, n) complex, dt (D, 1): the parameters of (1), in float64 whatever the
    precision: a rounding of z counts l times in the kernel"""
    xp = array_module(params["log_dt"])
    params = {name: params[name].astype("float64") for name in _KERNEL}
    A = -xp.exp(params["log_A_real"]) + 1j * params["A_imag"]
    return ssm.as_complex(params["C"]), A, xp.exp(params["log_dt"])[:, None]


def kernel_forward(params, L, cfg):
    """-> k (d, D, L)"""
    C, A, dt = modes(params)
    z, c, discrete = discretize_forward(C, A, dt, cfg)
    k, vandermonde = vandermonde_forward(c, z, L)
    return k.astype(params["C"].dtype), (A, dt, discrete, vandermonde)


def kernel_backward(dk, cache):
    """dk (d, D, L) -> grads of C, log_dt, log_A_real, A_imag"""
    A, dt, discrete, vandermonde = cache
    dc, dz = vandermonde_backward(dk.astype("float64"), vandermonde)
    dC, dA, ddt = discretize_backward(dz, dc, discrete)
    grads = {
        "C": ssm.as_pairs(dC),
        "log_dt": ddt * dt[:, 0],
        "log_A_real": dA.real * A.real,
        "A_imag": dA.imag,
    }
    return {name: g.astype(dk.dtype) for name, g in grads.items()}


# Operator, mixer, block


def operator_forward(params, x, cfg):
    """(6).   x (B, L, D) -> y (B, L, D)"""
    check_activations(x, cfg.d_model)
    k, kernel = kernel_forward(params, x.shape[1], cfg)
    y, conv = ssm.convolution_forward(x, k)
    y, skip = nn.skip_forward(y, params["D"], x)
    return y, (kernel, conv, skip)


def operator_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    kernel, conv, skip = cache
    _, dD, dx_skip = nn.skip_backward(dy, skip)
    dx, dk = ssm.convolution_backward(dy, conv)
    return dx + dx_skip, kernel_backward(dk, kernel) | {"D": dD}


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
    """The block's long filter, causal, without the skip.   -> k (1, D, L)"""
    return impulse_response(params, cfg, L)[None]


def state(params, cfg, batch, systems=None):
    """The block's state before the first step: (B, D, N/2) zeros, or that of `systems`, which the
    kernel was converted to (ref.etsc).   Error: it is not causal"""
    if not cfg.causal:
        raise Error("bidirectional=True sees all of a sequence: no recurrent step.")
    if systems:
        return block.converted_state(systems, batch)
    C = ssm.as_complex(params["C"][0])
    return {"x": array_module(C).zeros((batch, *C.shape), dtype=C.dtype)}


def operator_step(params, x_t, state, cfg):
    """(7).   x_t (B, D) -> y_t (B, D), state"""
    if "systems" in state:
        return block.converted_step(x_t, state, params["D"])
    z, c, _ = discretize_forward(*modes(params), cfg)
    factor, c = (a.astype(state["x"].dtype) for a in (array_module(z).exp(z), c[0]))
    x = factor * state["x"] + x_t[:, :, None]
    return 2 * (c * x).sum(axis=-1).real + params["D"] * x_t, {"x": x}


def step(params, x_t, state, cfg):
    """One time step of the block.   x_t (B, D) -> y_t (B, D), state"""
    return block.gelu_mixer_step(params, x_t, state, cfg, operator_step)


def prefill(params, x, cfg, state):
    """The block's forward over x (B, L, D), from a fresh state -> y (B, L, D), state after it"""
    return block.gelu_mixer_prefill(params, x, state, cfg, operator_forward, operator_step)


# Looking at it


def impulse_response(params, cfg, L):
    """The operator's answer to an impulse at t = 0, without the skip.   -> k (D, L)"""
    return kernel_forward(params, L, cfg)[0][0]


def matrix(params, cfg, x=None, L=None):
    """The operator as a matrix, y_t = Σ_s M[t, s] u_s, for L or x's length.   -> M (1, D, L, L)"""
    k, _ = kernel_forward(params, ssm.length_of(x, L), cfg)
    return ssm.toeplitz(k, params["D"])[None]


def hankel_values(params, cfg):
    """Hankel singular values of the sampled systems, both directions.   -> (dD, N), descending"""
    z, c, _ = discretize_forward(*modes(params), cfg)
    xp = array_module(z)
    A, B = ssm.with_conjugates(xp.exp(z)), xp.ones((len(z), 2 * z.shape[1]))
    values = [ssm.hankel_singular_values(A, B, ssm.with_conjugates(own)) for own in c]
    return xp.concatenate(values)


# Names of the published code

_KERNEL = {name: f"kernel.{name}" for name in ("C", "log_dt", "log_A_real", "A_imag")}
PUBLISHED = {
    "operator": {"D": "D"} | _KERNEL,
    "mixer": {"D": "D"} | _KERNEL | block.PUBLISHED_TAIL,
    "block": block.within("layer.", {"D": "D"} | _KERNEL | block.PUBLISHED_TAIL)
    | block.within("norm.", block.PUBLISHED_NORM),
}
PUBLISHED_LAYER = {"layer.": "s4_layers.{i}.", "norm.": "norms.{i}."}  # a block within a network


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params; of one direction C has no leading axis there"""
    params = block.from_published(tensors, PUBLISHED[part])
    return params | ({"C": params["C"][None]} if "C" in params and not cfg.bidirectional else {})


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names and shapes"""
    if "C" in params and not cfg.bidirectional:
        params = params | {"C": params["C"][0]}
    return block.to_published(params, PUBLISHED[part])


def config_of(settings, tensors, part):
    """The Config of a case: widths off its published tensors' shapes, the rest from its settings"""
    names = {name.rpartition(".")[2]: t for name, t in tensors.items()}
    if "log_A_real" in names and names["log_A_real"].ndim == 2:
        D, n = names["log_A_real"].shape
        settings = settings | {"d_model": D, "d_state": 2 * n}
    return Config(**settings)


def case_outputs(part, params, x, cfg):
    """Outputs of a case besides y: kernel (D, L), in two directions (2, D, L)"""
    if part == "network":
        return {}
    k, _ = kernel_forward(params, x.shape[1], cfg)
    return {"kernel": k if cfg.bidirectional else k[0]}
