"""Mamba.  Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, COLM 2024,
arXiv 2312.00752.

A diagonal state-space model whose step, input and output maps follow from the input itself:

    [r_t, B_t, C_t] = W_x x_t                                   the selection, section 3.2      (1)
    δ_t = softplus(W_dt r_t + dt_bias),   A = -exp(A_log)                                       (2)
    h_t = exp(δ_t A) h_{t-1} + (δ_t x_t) ⊗ B_t                  eq. (2a)                        (3)
    y_t = h_t C_t + D x_t                                       eq. (2b)                        (4)
    out_t = y_t silu(z_t)                                       the gate, section 3.4           (5)
    M_ts = C_t · Π_{r=s+1..t} exp(δ_r A) · δ_s B_s + [t = s] D  y = M x, the hidden attention   (6)

(1) is shared by all channels, (3) and (4) are one recurrence for each of E channels and N states.
(6) is Ali, Zimerman, Wolf: The Hidden Attention of Mamba Models, arXiv 2403.01590. Going back in
time with g the gradient of h_t, and w = g exp(δ_t A) h_{t-1} that of δ_t A:

    g += dy_t ⊗ C_t,  dδ_t = Σ_n (w A + g B_t x_t),  dA = Σ_t w δ_t,  dB_t = Σ_E g δ_t x_t,
    dC_t = Σ_E dy_t h_t,  dx_t = δ_t Σ_n g B_t,  then g <- g exp(δ_t A); at the end g is dh_0   (7)

    parameter      shape       B batch, L length, D channels, E = expand D inner channels,
    A_log          (E, N)      N states, R rank of δ
    the others are the mixer's: ref/selective.py

The operator is (1) to (4), E wide. The mixer is the paper's figure 3: projections, convolution,
(1) to (5). The block is x + mixer(RMSNorm(x)). A scan's states are never all in memory: h is kept
every sqrt(L) steps and made again in between. The twins keep it after a fixed number of steps,
which a core's caches or registers hold.

Differences from the paper and the published code (mamba_ssm):
- The input's map in (3) is δ B (Euler's), as in the code; the paper's eq. (4) says ZOH.
- Published scans start from h = 0 and have no gradient of the last state; here both are there.
- `selective_scan_ref` has (7) by autograd, and takes time quadratic in L by it.
"""

import math
from dataclasses import dataclass

from ref import Error, block, nn, selective
from ref.backend import array_module, check_activations, check_choice, twins


@dataclass(frozen=True)
class Config:
    """Mamba's layer."""

    d_model: int = 128
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0  # R; 0: d_model / 16, rounded up
    dt_min: float = 1e-3
    dt_max: float = 0.1
    depth: int = 24  # layers whose outputs add up on the residual: their initial scale
    dropout: float = 0.0
    layout: str = "original"  # whose names the published form has: original or transformers

    norm = "rms"
    prenorm = True
    causal = True

    def __post_init__(self):
        selective.check_config(self)
        check_choice("layout", self.layout, selective.LAYOUTS)
        if not 0 < self.dt_min <= self.dt_max:
            raise Error(
                f"dt_min={self.dt_min}, dt_max={self.dt_max}: expected 0 < dt_min <= dt_max."
            )


EMBEDDING_DEVIATION = 0.02  # of a network's, when it is made


def groups(cfg):
    """Parameters without weight decay: A_log and D as published, and norm and biases"""
    return dict.fromkeys(("A_log", "D", "dt_bias", "conv_bias", "norm_weight"), "nodecay")


# Scan


def scan_forward(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None):
    """δ = softplus(dt + dt_bias), (3), (4), (5).   x, dt, z (B, L, E), A (E, N), B, C (B, L, N),
    D, dt_bias (E,), h0 (B, E, N) -> y (B, L, E), h_L (B, E, N)

    Error: shapes that do not fit, or another precision than x's
    """
    selective.check_scan(
        x, {"dt": dt, "z": z}, {"B": B, "C": C}, {"D": D, "dt_bias": dt_bias}, {"h0": h0}
    )
    if A.shape != (x.shape[2], B.shape[2]) or A.dtype != x.dtype:
        expected = (x.shape[2], B.shape[2])
        raise Error(f"A has shape {A.shape} and dtype {A.dtype}; expected {expected}, {x.dtype}.")
    delta, softplus = nn.softplus_forward(dt if dt_bias is None else dt + dt_bias)
    y, h, recurrence = recurrence_forward(x, delta, A, B, C, D, h0)
    gate = None
    if z is not None:
        y, gate = nn.gate_forward(y, z)
    given = D is not None, dt_bias is not None, h0 is not None
    return y, h, (softplus, recurrence, gate, given, h.shape)


def scan_backward(dy, cache, dlast=None):
    """dy (B, L, E), dlast (B, E, N) the gradient of h_L -> {argument: gradient}, of those given

    Error: another shape or precision
    """
    softplus, recurrence, gate, (has_D, has_bias, has_h0), state_shape = cache
    selective.check_gradients(dy, dlast, recurrence[0], state_shape)
    grads = {}
    if gate is not None:
        dy, grads["z"] = nn.gate_backward(dy, gate)
    dx, ddelta, dA, dB, dC, dD, dh0 = recurrence_backward(dy, recurrence, dlast)
    grads |= {"x": dx, "dt": nn.softplus_backward(ddelta, softplus), "A": dA, "B": dB, "C": dC}
    if has_D:
        grads["D"] = dD
    if has_bias:
        grads["dt_bias"] = nn.sum_rows(grads["dt"])
    if has_h0:
        grads["h0"] = dh0
    return grads


def recurrence_forward(x, delta, A, B, C, D=None, h0=None):
    """(3), (4).   x, delta (B, L, E), A (E, N), B, C (B, L, N), D (E,), h0 (B, E, N)
    -> y (B, L, E), h_L (B, E, N)"""
    xp, (batch, L, E) = array_module(x), x.shape
    if twin := _fast(x):
        y, h, kept = twin.scan_forward(x, delta, A, B, C, D, h0)
        return y, h, (x, delta, A, B, C, D, kept)
    h = xp.zeros((batch, E, A.shape[1]), dtype=x.dtype) if h0 is None else h0
    y, kept = xp.empty(x.shape, dtype=x.dtype), []
    for t in range(L):
        if t % selective.spacing(L) == 0:
            kept.append(h)
        h = update(h, x[:, t], delta[:, t], A, B[:, t])
        y[:, t] = (h * C[:, t, None]).sum(axis=-1)
    return (y if D is None else y + D * x), h, (x, delta, A, B, C, D, kept)


def recurrence_backward(dy, cache, dlast=None):
    """dy (B, L, E), dlast (B, E, N) -> dx, ddelta, dA, dB, dC, dD (None without D), dh0.   (7)"""
    x, delta, A, B, C, D, kept = cache
    if twin := _fast(x):
        return twin.scan_backward(dy, x, delta, A, B, C, D, kept, dlast)
    xp, (batch, L, _) = array_module(x), x.shape
    g = xp.zeros((batch, *A.shape), dtype=x.dtype) if dlast is None else dlast
    dx, ddelta = (xp.empty(x.shape, dtype=x.dtype) for _ in range(2))
    dB, dC = (xp.empty(B.shape, dtype=x.dtype) for _ in range(2))
    dA = xp.zeros(A.shape, dtype=x.dtype)

    def step(h, t):
        return update(h, x[:, t], delta[:, t], A, B[:, t])

    for t, before, h in selective.states_backwards(step, kept, L):
        g = g + dy[:, t, :, None] * C[:, t, None]
        dC[:, t] = (dy[:, t, :, None] * h).sum(axis=1)
        dB[:, t] = (g * (delta[:, t] * x[:, t])[..., None]).sum(axis=1)
        through_input = (g * B[:, t, None]).sum(axis=-1)
        dx[:, t] = delta[:, t] * through_input
        g = g * _decay(delta[:, t], A)
        w = g * before
        ddelta[:, t] = (w * A).sum(axis=-1) + x[:, t] * through_input
        dA += (w * delta[:, t, :, None]).sum(axis=0)
    dD = None if D is None else nn.sum_rows(dy * x)
    return (dx if D is None else dx + D * dy), ddelta, dA, dB, dC, dD, g


def update(h, x, delta, A, B):
    """(3).   h (B, E, N), x, delta (B, E), A (E, N), B (B, N) -> h (B, E, N)"""
    return _decay(delta, A) * h + (delta * x)[..., None] * B[:, None]


def _fast(x):
    """The twins; but one position, a step of decoding, is a few array expressions as it is"""
    return twins("mamba", x) if x.shape[1] > 1 else None


def _decay(delta_t, A):
    """exp(δ A).   delta_t (B, E), A (E, N) -> (B, E, N)"""
    return array_module(A).exp(delta_t[..., None] * A)


SCAN_IN_TIME = ("x", "dt", "B", "C", "z")  # arguments with an axis of time
SCAN_STATE = "h0"


def scan_inputs(cfg, batch, L, rng):
    """Random arguments of a scan of d_model channels, float64"""
    E, N = cfg.d_model, cfg.d_state
    shapes = dict.fromkeys(("x", "dt", "z"), (batch, L, E)) | {
        "B": (batch, L, N),
        "C": (batch, L, N),
    }
    shapes |= {"A": (E, N), "D": (E,), "dt_bias": (E,), "h0": (batch, E, N)}
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return inputs | {"A": -array_module(inputs["A"]).exp(inputs["A"])}


# Operator: selection and scan


def operator_width(cfg):
    """E, the channels of the operator"""
    return selective.sizes(cfg)[0]


def operator_init(cfg, rng, dtype="float32"):
    """A = -1..-N in every channel, δ log-uniform in [dt_min, dt_max] at r = 0"""
    params = mixer_init(cfg, rng, dtype)
    return {name: params[name] for name in PUBLISHED["operator"]}


def operator_forward(params, x, cfg):
    """(1) to (4).   x (B, L, E) -> y (B, L, E)"""
    check_activations(x, operator_width(cfg))
    return gated_forward(params, x, cfg)


def operator_backward(dy, cache):
    """dy (B, L, E) -> dx, grads"""
    dx, _, _, grads = gated_backward(dy, cache)
    return dx, grads


def gated_forward(params, x, cfg, z=None, h0=None):
    """(1) to (5), (5) where z is given.   x, z (B, L, E), h0 (B, E, N) -> y (B, L, E)"""
    dt, B, C, selection = selective.selection_forward(params, x)
    A = -array_module(x).exp(params["A_log"])
    y, h, scan = scan_forward(x, dt, A, B, C, params["D"], z, None, h0)
    return y, (selection, A, scan, h)


def gated_backward(dy, cache, dlast=None):
    """dy (B, L, E), dlast (B, E, N) -> dx, dz, dh0, grads.   ∂A/∂A_log = A"""
    selection, A, scan, _ = cache
    g = scan_backward(dy, scan, dlast)
    dx, grads = selective.selection_backward(g["dt"], g["B"], g["C"], selection)
    grads |= {"A_log": g["A"] * A, "D": g["D"]}
    return dx + g["x"], g.get("z"), g.get("h0"), grads


# Mixer and block


def mixer_init(cfg, rng, dtype="float32"):
    """A = -1..-N in every channel, dt_bias such that δ is log-uniform in [dt_min, dt_max]"""
    E, params = selective.sizes(cfg)[0], selective.init(cfg, rng, dtype)
    xp = array_module(params["D"])
    A_log = xp.log(xp.arange(1, cfg.d_state + 1, dtype="float64"))
    params["A_log"] = xp.tile(A_log, (E, 1)).astype(dtype)
    delta = xp.exp(rng.uniform(math.log(cfg.dt_min), math.log(cfg.dt_max), E))
    delta = xp.maximum(delta, min(1e-4, cfg.dt_max))
    params["dt_bias"] = (delta + xp.log(-xp.expm1(-delta))).astype(dtype)  # softplus inverted
    return params


def mixer_forward(params, x, cfg, rng=None, state=None):
    """The paper's layer, from a state when one is given.   x (B, L, D) -> y (B, L, D)"""
    return selective.mixer_forward(params, x, cfg, gated_forward, state)


def mixer_backward(dy, cache, dstate=None):
    """dy (B, L, D), dstate the gradient of the last state -> dx, grads (see selective)"""
    return selective.mixer_backward(dy, cache, gated_backward, dstate)


def block_init(cfg, rng, dtype="float32"):
    """Mixer and norm"""
    return selective.block_init(cfg, rng, dtype, mixer_init)


def block_forward(params, x, cfg, rng=None, state=None):
    """x + mixer(RMSNorm(x)), from a state when one is given.   x (B, L, D) -> y (B, L, D)"""
    return selective.block_forward(params, x, cfg, mixer_forward, rng, state)


def block_backward(dy, cache, dstate=None):
    """dy (B, L, D), dstate the gradient of the last state -> dx, grads"""
    return selective.block_backward(dy, cache, mixer_backward, dstate)


def running_statistics(params, cache):
    """Running moments after a training batch: an RMS norm has none"""
    return {}


# Recurrent form


def state(params, cfg, batch):
    """The state before the first position: zeros {"conv": (B, K, E), "ssm": (B, E, N)}"""
    return selective.empty_state(params, cfg, batch)


mixer_state = selective.mixer_state  # after what a mixer's forward saw, from its cache
final_state = selective.block_state  # after what a block's forward saw


def operator_step(params, x_t, state, cfg):
    """One position of the operator.   x_t (B, E) -> y_t (B, E), state"""
    y, cache = gated_forward(params, x_t[:, None], cfg, None, state["ssm"])
    return y[:, 0], state | {"ssm": cache[-1]}


def mixer_step(params, x_t, state, cfg):
    """One position of the mixer.   x_t (B, D) -> y_t (B, D), state"""
    y, cache = mixer_forward(params, x_t[:, None], cfg, None, state)
    return y[:, 0], mixer_state(cache)


def step(params, x_t, state, cfg):
    """One position of the block.   x_t (B, D) -> y_t (B, D), state"""
    y, cache = block_forward(params, x_t[:, None], cfg, None, state)
    return y[:, 0], final_state(cache)


# Looking at it


def matrix(params, cfg, x=None, L=None, channels=None):
    """M of (6) for the operator's input x (B, L, E), or its first L positions -> (B, E, L, L)

    channels: of so many, from the first on.   Error: no x
    """
    if x is None:
        raise Error("Mamba's matrix depends on its input: give x (B, L, E).")
    x, xp = x[:, :L], array_module(x)
    dt, B, C, _ = selective.selection_forward(params, x)
    delta, _ = nn.softplus_forward(dt[..., :channels])
    A, D, (batch, L, E) = -xp.exp(params["A_log"][:channels]), params["D"][:channels], delta.shape
    M = xp.zeros((batch, E, L, L), dtype=x.dtype)
    reach = xp.zeros((batch, E, L, A.shape[1]), dtype=x.dtype)  # of every x_s into h_t
    for t in range(L):
        reach = reach * _decay(delta[:, t], A)[:, :, None]
        reach[:, :, t] = delta[:, t, :, None] * B[:, t, None]
        M[:, :, t] = (reach * C[:, None, t, None]).sum(axis=-1)
        M[:, :, t, t] += D
    return M


def impulse_response(params, cfg, L):
    """Error: the scan is no convolution"""
    raise Error("Mamba is no linear time-invariant map: it has no kernel to show; see matrix.")


def hankel_values(params, cfg):
    """Error: the scan is no convolution"""
    raise Error("Mamba is no linear time-invariant map: it has no Hankel matrix.")


# Names of the published code

PUBLISHED = selective.published(
    selective.MIXER_NAMES | {"W_dt": "dt_proj.weight", "dt_bias": "dt_proj.bias", "A_log": "A_log"}
)
PUBLISHED_LAYER = {"": "backbone.layers.{i}."}  # a block within a network
PUBLISHED_SETTINGS = selective.PUBLISHED_SETTINGS
published_network = selective.published_network
lists_tied_head = selective.lists_tied_head
network_settings = selective.network_settings


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params"""
    return block.from_published(tensors, PUBLISHED[part])


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names"""
    return block.to_published(params, PUBLISHED[part])


def config_of(settings, tensors, part):
    """The Config of a case: sizes off its published tensors' shapes, the rest from its settings"""
    return Config(**selective.config_fields(settings, tensors, "dt_proj.weight"))


def case_outputs(part, params, x, cfg):
    """What the published cases have besides y and y_steps: the mixer's last states"""
    return selective.case_outputs(part, params, x, cfg, mixer_forward)
