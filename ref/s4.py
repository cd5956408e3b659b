"""S4.  Gu, Goel, Ré: Efficiently Modeling Long Sequences with Structured State Spaces, ICLR 2022,
arXiv 2111.00396. Rank 1.

Each channel is a linear system, diagonal plus low rank, of which N/2 complex modes stand for
conjugate pairs, begun from HiPPO-LegS and sampled bilinearly with period Δ = dt:

    x'(t) = A x(t) + B u(t),  y(t) = C x(t) + D u(t),  A = Λ - P P^*                             (1)
    Λ = -exp(A_real) - i A_imag                                                                  (2)
    x_t = dA x_{t-1} + dB u_t,  dA = (I - Δ/2 A)⁻¹ (I + Δ/2 A),  dB = (I - Δ/2 A)⁻¹ Δ B          (3)
    k_l = C dA^l dB, l < L = irfft of k̂ at w = exp(-iθ), θ = 2πj/L, j = 0 .. L/2                 (4)
    k̂(w) = 2 [S_CB - (1+w) S_CP S_QB / (1 + (1+w) S_QP)],  Q = conj P, by the Woodbury identity  (5)
    S_xy(w) = Σ x_n y_n Δ / (2 (1-w) - Δ Λ_n (1+w)) over all conjugate pairs, with C~ for C      (6)
    C~ = C (I - dA^L): what makes the truncated sum of (4) a rational function                   (7)

Since 1+w = 2c e^{-iθ/2} and 1-w = 2is e^{-iθ/2} with s = sin θ/2, c = cos θ/2, real Cauchy sums
R_xy = 2 e^{-iθ/2} S_xy remain, without a singular point at w = -1 (c = 0):

    R_xy = Σ_n x_n y_n Δ / (2is - c Δ Λ_n), and the same of the conjugates                       (8)
    k̂ = e^{iθ/2} [R_CB - c R_CP R_QB / (1 + c R_QP)]                                             (9)

    parameter       shape           B batch, L length, D channels, N = d_state, d directions
    C               (d, D, N/2, 2)  C~ of (7) for the length l_max, as (re, im)
    B, P            (D, N/2, 2)
    A_real, A_imag  (D, N/2)        (2)
    log_dt          (D,)            log Δ
    D               (D,)            skip
    W, b            (2D, D), (2D,)  output projection before the GLU
    norm_*          (D,)            of the block

As in the published code C~ is what is trained: `output_matrix` gives C back, `truncated` is its
inverse, `double_length` makes C~ for twice the length. A shorter sequence takes the first taps of
the kernel of l_max; with l_max=0, C~ belongs to whatever length the sequence has.

Differences from the published code (s4, models/s4/s4.py): it writes log Δ as inv_dt with
dt_transform=exp, ranks above 1 and several other parameterisations, not offered here. It doubles
the length by itself when a longer sequence comes; here that is an error that says what to call.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ref import Error, backend, block, nn, ssm
from ref.backend import array_module, check_activations, check_choice, twins


@dataclass(frozen=True)
class Config:
    """S4's layer."""

    d_model: int = 128
    d_state: int = 64
    l_max: int = 0  # length that C~ is made for; 0: the sequence's (train.py: the data's longest)
    bidirectional: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dropout: float = 0.0
    norm: str = "layer"
    prenorm: bool = False

    def __post_init__(self):
        check_choice("norm", self.norm, block.NORMS)
        if self.d_model < 1 or self.d_state < 2 or self.d_state % 2:
            raise Error(
                f"d_model={self.d_model}, d_state={self.d_state}: at least 1, and even, at least 2."
            )
        if not (0 < self.dt_min <= self.dt_max and 0 <= self.dropout < 1 and self.l_max >= 0):
            raise Error("expected 0 < dt_min <= dt_max, 0 <= dropout < 1 and l_max >= 0.")

    @property
    def causal(self):
        """Whether outputs depend on no later input: what language modelling needs, and `step`."""
        return not self.bidirectional


def groups(cfg):
    """Parameters with a learning rate of their own: name -> ssm, dt, or frozen"""
    return dict.fromkeys(("A_real", "A_imag", "B", "P"), "ssm") | {"log_dt": "dt"}


def operator_init(cfg, rng, dtype="float32"):
    """Λ, P, B of HiPPO-LegS, B clipped to ±2; C complex normal, turned to C~ when l_max is known;
    log_dt uniform between the logarithms of dt_min and dt_max; D normal"""
    D, (W, P, B, _) = cfg.d_model, ssm.legs_nplr(cfg.d_state)
    directions = 2 if cfg.bidirectional else 1
    params = {
        "C": rng.standard_normal((directions, D, cfg.d_state // 2, 2)) * math.sqrt(0.5),
        "B": np.tile(ssm.as_pairs(B).clip(-2, 2), (D, 1, 1)),
        "P": np.tile(ssm.as_pairs(P), (D, 1, 1)),
        "A_real": np.tile(np.log(-W.real), (D, 1)),
        "A_imag": np.tile(-W.imag, (D, 1)),
        "log_dt": rng.uniform(math.log(cfg.dt_min), math.log(cfg.dt_max), D),
        "D": rng.standard_normal(D),
    }
    if cfg.l_max:
        params["C"] = truncated(params, cfg.l_max)
    return {name: p.astype(dtype) for name, p in params.items()}


# The kernel


def cauchy_forward(v, a, L):
    """(8): Σ_n v_n / (2is - c a_n) + conj(v_n) / (2is - c conj(a_n)) at θ = 2πj/L, j = 0 .. L/2.

    v (S, D, n) for S sums, a (D, n) complex, Re a < 0 -> R (S, D, L//2+1) complex
    """
    if twin := twins("s4", a):
        return twin.cauchy_forward(v, a, L), (v, a, L)
    xp, (c, s) = array_module(a), half_angles(a, L)
    u1, u2 = (1 / (2j * s - c * pole[:, :, None]) for pole in (a, a.conj()))  # (D, n, J)
    R = v[:, :, None, :] @ u1 + v.conj()[:, :, None, :] @ u2
    return xp.ascontiguousarray(R[:, :, 0]), (v, a, L, c, u1, u2)


def cauchy_backward(dR, cache):
    """dR (S, D, J) -> dv, da.   With u = 1/(2is - ca): ∂u/∂a = c u²"""
    v, a, L, *tables = cache
    if twin := twins("s4", a):
        return twin.cauchy_backward(dR, v, a, L)
    c, u1, u2 = tables
    dR = dR[..., None]
    dv = (u1.conj() @ dR)[..., 0] + (u2 @ dR.conj())[..., 0]
    slope = ((c * u1 * u1).conj() @ dR)[..., 0] + ((c * u2 * u2) @ dR.conj())[..., 0]
    return dv, (v.conj() * slope).sum(axis=0)


def half_angles(like, L):
    """cos θ/2 and sin θ/2 at θ = 2πj/L, j = 0 .. L/2, in the precision of `like`; exact at θ = π"""
    xp = array_module(like)
    half = xp.arange(L // 2 + 1, dtype="float64") * (math.pi / L)
    s, c = xp.sin(half), xp.cos(half)
    if L % 2 == 0:
        c[-1] = 0
    return c.astype(like.real.dtype), s.astype(like.real.dtype)


def products_forward(C, B, P):
    """The numerators of R_CB, R_CP for each direction, R_QB and R_QP.   C (d, D, n), B, P (D, n)
    -> (2d+2, D, n)"""
    xp, Q = array_module(P), P.conj()
    return xp.concatenate([C * B, C * P, (Q * B)[None], (Q * P)[None]]), (C, B, P)


def products_backward(dv, cache):
    """dv (2d+2, D, n) -> dC, dB, dP"""
    C, B, P = cache
    d = len(C)
    dCB, dCP, dQB, dQP = dv[:d], dv[d : 2 * d], dv[2 * d], dv[2 * d + 1]
    dC = dCB * B.conj() + dCP * P.conj()
    dB = (dCB * C.conj()).sum(axis=0) + dQB * P
    dP = (dCP * C.conj()).sum(axis=0) + dQB.conj() * B + 2 * dQP.real * P  # Q P = |P|²
    return dC, dB, dP


def woodbury_forward(R, L):
    """(9).   R (2d+2, D, J) -> k̂ (d, D, J)"""
    d, (c, s) = len(R) // 2 - 1, half_angles(R, L)
    CB, CP, QB, QP = R[:d], R[d : 2 * d], R[2 * d], R[2 * d + 1]
    ratio = c / (1 + c * QP)
    return (c + 1j * s) * (CB - CP * (QB * ratio)), (CP, QB, ratio, c, s)


def woodbury_backward(dk_hat, cache):
    """dk̂ (d, D, J) -> dR (2d+2, D, J).   From ∂ratio/∂R_QP = -ratio²"""
    CP, QB, ratio, c, s = cache
    dCB = (c - 1j * s) * dk_hat
    dCP = -dCB * (QB * ratio).conj()
    dsum = -(CP.conj() * dCB).sum(axis=0)  # the gradient of QB ratio
    dQB, dQP = dsum * ratio.conj(), -dsum * (QB * ratio * ratio).conj()
    return array_module(dCB).concatenate([dCB, dCP, dQB[None], dQP[None]])


def modes(params):
    """C (d, D, n), B, P, Λ (D, n) complex, dt (D, 1): the parameters of (1), in float64 whatever
    the precision: at a resonance of (8) the difference of two large numbers remains"""
    xp = array_module(params["log_dt"])
    params = {name: p.astype("float64") for name, p in params.items()}
    poles = -xp.exp(params["A_real"]) - 1j * params["A_imag"]
    C, B, P = (ssm.as_complex(params[name]) for name in "CBP")
    return C, B, P, poles, xp.exp(params["log_dt"])[:, None]


def kernel_forward(params, L, cfg):
    """(4): the first L taps of the kernel of l_max.   -> k (d, D, L)   Error: L > l_max"""
    nodes = cfg.l_max or L
    if nodes < L:
        raise Error(
            f"C~ is made for the length l_max={nodes}, and a length of {L} was asked for "
            "(in Python, s4.double_length makes it for twice as many)."
        )
    C, B, P, poles, dt = modes(params)
    v, products = products_forward(C, B, P)
    R, cauchy = cauchy_forward(dt * v, dt * poles, nodes)
    k_hat, woodbury = woodbury_forward(R, nodes)
    k = backend.irfft(k_hat, nodes, axis=2)[:, :, :L]
    return k.astype(params["C"].dtype), (nodes, dt, poles, v, products, cauchy, woodbury)


def kernel_backward(dk, cache):
    """dk (d, D, L) -> grads of C, B, P, A_real, A_imag, log_dt"""
    nodes, dt, poles, v, products, cauchy, woodbury = cache
    dk_hat = backend.rfft(dk.astype("float64"), nodes, axis=2) * (2 / nodes)
    dk_hat[:, :, 0] *= 0.5  # a node between 0 and π stands for itself and its mirror
    if nodes % 2 == 0:
        dk_hat[:, :, -1] *= 0.5
    dv, da = cauchy_backward(woodbury_backward(dk_hat, woodbury), cauchy)
    dC, dB, dP = products_backward(dt * dv, products)
    dpoles = dt * da
    ddt = (v.conj() * dv).real.sum(axis=(0, 2)) + (poles.conj() * da).real.sum(axis=1)
    grads = {
        "C": ssm.as_pairs(dC),
        "B": ssm.as_pairs(dB),
        "P": ssm.as_pairs(dP),
        "A_real": dpoles.real * poles.real,
        "A_imag": -dpoles.imag,
        "log_dt": ddt * dt[:, 0],
    }
    return {name: g.astype(dk.dtype) for name, g in grads.items()}


# Operator, mixer, block


def operator_forward(params, x, cfg):
    """Convolution with (4), and skip.   x (B, L, D) -> y (B, L, D)"""
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


# The system behind the kernel: dense, in complex128


def dense(params):
    """(3) with all conjugate pairs.   -> dA (D, N, N), dB (D, N), Λ - P P^* (D, N, N)"""
    _, B, P, poles, dt = modes(params)
    xp = array_module(P)
    B, P, poles = (ssm.with_conjugates(x) for x in (B, P, poles))
    eye = xp.eye(P.shape[1])
    A = poles[:, :, None] * eye - P[:, :, None] * P.conj()[:, None, :]
    half = 0.5 * dt[:, :, None] * A
    right = xp.concatenate([eye + half, (dt * B)[:, :, None]], axis=2)
    solved = xp.linalg.solve(eye - half, right)
    return solved[:, :, :-1], solved[:, :, -1], A


def truncated(params, L):
    """(7), C -> C~.   params with C in the place of C~ -> (d, D, N/2, 2), float64"""
    I_minus_power, C = _truncation(params, L)
    return _half_pairs(C @ I_minus_power)


def output_matrix(params, L):
    """(7) backwards, C~ -> C.   params with C~ for the length L -> C (d, D, N/2, 2), float64"""
    I_minus_power, C = _truncation(params, L)
    transposed = array_module(C).linalg.solve(
        I_minus_power.transpose(0, 2, 1), C.transpose(0, 2, 1)
    )
    return _half_pairs(transposed.transpose(0, 2, 1))


def double_length(params, cfg):
    """Parameters and Config for twice l_max: C~ (I + dA^L), since I - X² = (I - X)(I + X)"""
    if not cfg.l_max:
        raise Error("l_max=0: this C~ belongs to no length that could be doubled.")
    I_minus_power, C = _truncation(params, cfg.l_max)
    C = _half_pairs(2 * C - C @ I_minus_power)
    return params | {"C": C.astype(params["C"].dtype)}, replace(cfg, l_max=2 * cfg.l_max)


def _truncation(params, L):
    """I - dA^L (D, N, N) and C with conjugates as rows (D, d, N).   Error: L below 1"""
    if L < 1:
        raise Error(f"C~ of the length {L}: expected at least 1. Give l_max, the length it is for.")
    dA, xp = dense(params)[0], array_module(params["C"])
    C = ssm.with_conjugates(ssm.as_complex(params["C"].astype("float64")))
    power = xp.linalg.matrix_power(dA, L)
    return xp.eye(power.shape[1]) - power, C.transpose(1, 0, 2)


def _half_pairs(C):
    """Rows with conjugates (D, d, N) -> (d, D, N/2, 2)"""
    own = array_module(C).ascontiguousarray(C.transpose(1, 0, 2)[:, :, : C.shape[2] // 2])
    return ssm.as_pairs(own)


# Recurrent form


def kernels(params, cfg, L):
    """The block's long filter, causal, without the skip; beyond l_max by C~ for L, made anew.
    -> k (1, D, L)"""
    if 0 < cfg.l_max < L:
        C = output_matrix(params, cfg.l_max)
        params = params | {"C": truncated(params | {"C": C}, L).astype(params["C"].dtype)}
        cfg = replace(cfg, l_max=L)
    return impulse_response(params, cfg, L)[None]


def state(params, cfg, batch, systems=None):
    """The block's state before the first step: x (B, D, N/2) zeros, and C (D, N/2), recovered from
    C~ once; or that of `systems`, which the kernel was converted to (ref.etsc).

    Error: it is not causal; l_max=0
    """
    if not cfg.causal:
        raise Error("bidirectional=True sees all of a sequence: no recurrent step.")
    if systems:
        return block.converted_state(systems, batch)
    if not cfg.l_max:
        raise Error("a recurrent step needs l_max, the length that C~ is made for.")
    C = ssm.as_complex(output_matrix(params, cfg.l_max).astype(params["C"].dtype)[0])
    return {"x": array_module(C).zeros((batch, *C.shape), dtype=C.dtype), "C": C}


def operator_step(params, x_t, state, cfg):
    """(3) in O(N): I - Δ/2 A = M + Δ/2 P P^* with M diagonal.   x_t (B, D) -> y_t (B, D), state"""
    if "systems" in state:
        return block.converted_step(x_t, state, params["D"])
    x, (_, B, P, poles, dt) = state["x"], modes(params)
    B, P, poles, dt = (
        B.astype(x.dtype),
        P.astype(x.dtype),
        poles.astype(x.dtype),
        dt.astype(x_t.dtype),
    )
    half = 0.5 * dt
    M = 1 - half * poles

    def inner(x):
        """P^* x over all conjugate pairs, real"""
        return 2 * (P.conj() * x).real.sum(axis=-1, keepdims=True)

    x = (x + half * (poles * x - P * inner(x)) + dt * B * x_t[:, :, None]) / M
    x = x - P / M * (inner(x) * (half / (1 + half * inner(P / M))))
    y = 2 * (state["C"] * x).real.sum(axis=-1) + params["D"] * x_t
    return y, state | {"x": x}


def recurrence(params, cfg, form="dense"):
    """(3) for `recurrence_step`.   -> dA, dB, C; form dense: dA (D, N, N); diagonal: dA (D, N)

    The eigenvectors of HiPPO-LegS are ill conditioned: the diagonal form is right to 1e-11 for
    N = 8, 1e-5 for N = 16 and not at all for N = 32. float64 inside.   Error: it is not causal
    """
    check_choice("form", form, ("dense", "diagonal"))
    if not cfg.causal:
        raise Error("bidirectional=True sees all of a sequence: no recurrent step.")
    dA, dB, A = dense(params)
    C = ssm.with_conjugates(ssm.as_complex(output_matrix(params, cfg.l_max)[0]))
    if form == "dense":
        return dA, dB, C
    xp, (values, V) = array_module(A), backend.eig(A)
    half = 0.5 * xp.exp(params["log_dt"].astype("float64"))[:, None]
    dB = xp.linalg.solve(V, dB[:, :, None])[:, :, 0]
    return (1 + half * values) / (1 - half * values), dB, (C[:, None, :] @ V)[:, 0]


def recurrence_step(system, x_t, state):
    """x_t (B, D), state (B, D, N) complex, zeros at first -> y_t (B, D) without the skip, state"""
    dA, dB, C = system
    moved = dA * state if dA.ndim == 2 else (dA @ state[..., None])[..., 0]
    state = moved + dB * x_t[:, :, None]
    return (C * state).sum(axis=-1).real, state


def step(params, x_t, state, cfg):
    """One time step of the block.   x_t (B, D) -> y_t (B, D), state"""
    return block.gelu_mixer_step(params, x_t, state, cfg, operator_step)


def prefill(params, x, cfg, state):
    """The block's forward over x (B, L, D), from a fresh state -> y (B, L, D), state after it

    As by steps L may be above l_max.
    """

    def operator(params, x, cfg):
        y, _ = ssm.convolution_forward(x, kernels(params, cfg, x.shape[1]))
        return nn.skip_forward(y, params["D"], x)

    return block.gelu_mixer_prefill(params, x, state, cfg, operator, operator_step)


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
    dA, dB, _ = dense(params)
    C = output_matrix(params, cfg.l_max) if cfg.l_max else params["C"]
    rows = ssm.with_conjugates(ssm.as_complex(C))
    values = [ssm.hankel_singular_values(dA, dB, own) for own in rows]
    return array_module(dA).concatenate(values)


def init_outputs(cfg):
    """The part `init` of a case: what of HiPPO-LegS does not depend on the eigenvectors' phases.
    W (N/2, 2), abs_P2 (1, N/2), B_conjP (N/2, 2)"""
    W, P, B, _ = ssm.legs_nplr(cfg.d_state)
    pairs = {"W": ssm.as_pairs(W), "B_conjP": ssm.as_pairs(B * P.conj())}
    return pairs | {"abs_P2": (np.abs(P) ** 2)[None]}


# Names of the published code

_KERNEL = {name: f"kernel.{name}" for name in ("A_real", "A_imag", "B", "C", "P")}
_KERNEL |= {"D": "D", "log_dt": "kernel.inv_dt"}
PUBLISHED = {
    "init": {},
    "operator": _KERNEL,
    "mixer": _KERNEL | block.PUBLISHED_TAIL,
    "block": block.within("layer.", _KERNEL | block.PUBLISHED_TAIL)
    | block.within("norm.", block.PUBLISHED_NORM),
}
PUBLISHED_LAYER = {"layer.": "s4_layers.{i}.", "norm.": "norms.{i}."}  # a block within a network
PUBLISHED_SETTINGS = ("dt_transform", "rank")


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params; B, P and D have one more axis there, and log_dt
    is a column.   Error: its l_kernel is not l_max"""
    for name, length in tensors.items():  # () in the published code, (1,) where a file wants axes
        if name.endswith("l_kernel") and cfg.l_max and backend.item(length) != cfg.l_max:
            raise Error(f"{name} is {backend.item(length)}, but l_max is {cfg.l_max}.")
    params = block.from_published(tensors, PUBLISHED[part])
    params |= {name: params[name][0] for name in ("B", "P", "D") if name in params}
    return params | ({"log_dt": params["log_dt"][:, 0]} if "log_dt" in params else {})


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names and shapes"""
    params = params | {name: params[name][None] for name in ("B", "P", "D") if name in params}
    params |= {"log_dt": params["log_dt"][:, None]} if "log_dt" in params else {}
    return block.to_published(params, PUBLISHED[part])


def published_buffers(cfg, part):
    """What a published state dict has besides: kernel.l_kernel, the length that C~ is made for"""
    if part == "init":
        return {}
    prefix = "layer." if part == "block" else ""
    return {f"{prefix}kernel.l_kernel": np.array([cfg.l_max])}


def config_of(settings, tensors, part):
    """The Config of a case: widths off its published tensors' shapes, the rest from its settings.
    Error: another rank or dt_transform"""
    settings = dict(settings)
    if (found := settings.pop("rank", 1)) != 1:
        raise Error(f"rank={found}: S4 is here with rank 1.")
    if (found := settings.pop("dt_transform", "exp")) != "exp":
        raise Error(f"dt_transform={found!r}: S4 is here with dt_transform='exp'.")
    names = {name.rpartition(".")[2]: t for name, t in tensors.items()}
    if "A_real" in names and names["A_real"].ndim == 2:
        D, n = names["A_real"].shape
        settings |= {"d_model": D, "d_state": 2 * n}
    return Config(**settings)


def case_outputs(part, params, x, cfg):
    """Outputs of a case besides y: kernel (d, D, L)"""
    if part == "network":
        return {}
    return {"kernel": kernel_forward(params, x.shape[1], cfg)[0]}
