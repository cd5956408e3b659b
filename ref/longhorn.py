"""Longhorn.  Liu, Wang, Wu, Feng, Stone, Liu: Longhorn: State Space Models are Amortized Online
Learners, ICLR 2025, arXiv 2407.14207.

The state S_t, a row of N numbers for each of E channels, learns online to recall x_t from the key
k_t. The update is the solution of

    S_t = argmin_S |S - S_{t-1}|² + |S k_t - x_t|²_{diag β_t}                                    (1)
    Δ_t = β_t / (1 + β_t κ_t),   κ_t = k_t · k_t                the step size                    (2)
    S_t = S_{t-1} + Δ_t (x_t - S_{t-1} k_t) ⊗ k_t               (1) solved exactly: rank one     (3)
    S_t = (1 - Δ_t ⊗ k_t²) S_{t-1} + (Δ_t x_t) ⊗ k_t            its diagonal: what is trained    (4)
    y_t = S_t q_t + D x_t,   out_t = y_t silu(z_t)              readout, skip and gate           (5)
    [r_t, k_t, q_t] = W_x x_t,  β_t = sigmoid(W_dt r_t + dt_bias)                                (6)

The factor 1 - Δ k² of (4), which forgets, lies in (0, 1] by itself: no gate has to be learned for
it and nothing kept stable. k and q are shared by all channels. Going back in time with g the
gradient of S_t, and S short for S_{t-1}:

    g += dy_t ⊗ q_t,  dq_t = Σ_E dy_t S_t,  dx_t = Δ_t (g k_t)
    (4): dΔ_t = x_t (g k_t) - Σ_N g k_t² S,     dk_t = Σ_E Δ_t g (x_t - 2 k_t S) + 2 k_t dκ_t,
         then g <- g (1 - Δ_t ⊗ k_t²)
    (3): dΔ_t = (g k_t) (x_t - S k_t),  dk_t = Σ_E Δ_t (g (x_t - S k_t) - (g k_t) S) + 2 k_t dκ_t,
         then g <- g - Δ_t (g k_t) ⊗ k_t
    both: dβ_t = dΔ_t / (1 + β_t κ_t)²,  dκ_t = -Σ_E dΔ_t Δ_t²;  at the end g is dS_0            (7)

    B batch, L length, D channels, E = expand D inner channels, N states, R rank of β;
    parameters: the mixer's, in ref/selective.py, and nothing else

The operator is (6) and (2) to (5) without the gate, E wide. The mixer is Mamba's with this operator
in it: projections, convolution, gate. The block is x + mixer(RMSNorm(x)). States are never all in
memory: S is kept every sqrt(L) steps and made again in between. The twins keep it after a fixed
number of steps, which a core's caches or registers hold, and do not lose the digits of a decay next
to 0, as 1 - Δ k² here does in float32.

Differences from the published code (longhorn, longhorn_cuda):
- update="exact" runs (3), which the paper derives and does not train; it has no fast twin.
- `selective_scan_online7_ref`, asked for the last state, returns the one after N steps.
- Its cached decoding fails: `allocate_inference_cache` reads a `dt_proj` that the class has not.
  `step` here is the recurrence that its `step` writes down.
"""

from dataclasses import dataclass

from ref import Error, block, nn, selective
from ref.backend import array_module, check_activations, check_choice, twins


@dataclass(frozen=True)
class Config:
    """Longhorn's layer."""

    d_model: int = 128
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0  # R; 0: d_model / 16, rounded up
    update: str = "diagonal"  # (4); exact: (3)
    depth: int = 24  # layers whose outputs add up on the residual: their initial scale
    dropout: float = 0.0
    layout: str = "original"  # whose names the published form has: original or transformers

    norm = "rms"
    prenorm = True
    causal = True

    def __post_init__(self):
        selective.check_config(self)
        check_choice("update", self.update, UPDATES)
        check_choice("layout", self.layout, selective.LAYOUTS)


UPDATES = ("diagonal", "exact")
EMBEDDING_DEVIATION = 0.02  # of a network's, when it is made


def groups(cfg):
    """Parameters without weight decay"""
    return dict.fromkeys(("D", "dt_bias", "conv_bias", "norm_weight"), "nodecay")


# Scan


def scan_forward(x, dt, k, q, D=None, z=None, dt_bias=None, s0=None, update="diagonal"):
    """β = sigmoid(dt + dt_bias), (2), (4) or (3), (5).   x, dt, z (B, L, E), k, q (B, L, N),
    D, dt_bias (E,), s0 (B, E, N) -> y (B, L, E), S_L (B, E, N)

    Error: shapes that do not fit, another precision than x's, an unknown update
    """
    check_choice("update", update, UPDATES)
    selective.check_scan(
        x, {"dt": dt, "z": z}, {"k": k, "q": q}, {"D": D, "dt_bias": dt_bias}, {"s0": s0}
    )
    beta, sigmoid = nn.sigmoid_forward(dt if dt_bias is None else dt + dt_bias)
    y, S, recurrence = recurrence_forward(x, beta, k, q, D, s0, update)
    gate = None
    if z is not None:
        y, gate = nn.gate_forward(y, z)
    given = D is not None, dt_bias is not None, s0 is not None
    return y, S, (sigmoid, recurrence, gate, given, S.shape)


def scan_backward(dy, cache, dlast=None):
    """dy (B, L, E), dlast (B, E, N) the gradient of S_L -> {argument: gradient}, of those given

    Error: another shape or precision
    """
    sigmoid, recurrence, gate, (has_D, has_bias, has_s0), state_shape = cache
    selective.check_gradients(dy, dlast, recurrence[0], state_shape)
    grads = {}
    if gate is not None:
        dy, grads["z"] = nn.gate_backward(dy, gate)
    dx, dbeta, dk, dq, dD, ds0 = recurrence_backward(dy, recurrence, dlast)
    grads |= {"x": dx, "dt": nn.sigmoid_backward(dbeta, sigmoid), "k": dk, "q": dq}
    if has_D:
        grads["D"] = dD
    if has_bias:
        grads["dt_bias"] = nn.sum_rows(grads["dt"])
    if has_s0:
        grads["s0"] = ds0
    return grads


def recurrence_forward(x, beta, k, q, D=None, s0=None, update="diagonal"):
    """(2), (4) or (3), (5) without the gate.   x, beta (B, L, E), k, q (B, L, N), D (E,),
    s0 (B, E, N) -> y (B, L, E), S_L (B, E, N)"""
    xp, (B, L, E) = array_module(x), x.shape
    if update == "diagonal" and (twin := _fast(x)):
        y, S, kept = twin.scan_forward(x, beta, k, q, D, s0)
        return y, S, (x, beta, k, q, D, kept, update)
    S = xp.zeros((B, E, k.shape[2]), dtype=x.dtype) if s0 is None else s0
    delta, y, kept = _step_size(beta, k), xp.empty(x.shape, dtype=x.dtype), []
    for t in range(L):
        if t % selective.spacing(L) == 0:
            kept.append(S)
        S = _UPDATE[update](S, x[:, t], delta[:, t], k[:, t])
        y[:, t] = (S * q[:, t, None]).sum(axis=-1)
    return (y if D is None else y + D * x), S, (x, beta, k, q, D, kept, update)


def recurrence_backward(dy, cache, dlast=None):
    """dy (B, L, E), dlast (B, E, N) -> dx, dbeta, dk, dq, dD (None without D), dS0.   (7)"""
    x, beta, k, q, D, kept, update = cache
    if update == "diagonal" and (twin := _fast(x)):
        return twin.scan_backward(dy, x, beta, k, q, D, kept, dlast)
    xp, (B, L, E) = array_module(x), x.shape
    g = xp.zeros((B, E, k.shape[2]), dtype=x.dtype) if dlast is None else dlast
    dx, ddelta = (xp.empty(x.shape, dtype=x.dtype) for _ in range(2))
    dk, dq = (xp.empty(k.shape, dtype=x.dtype) for _ in range(2))
    delta = _step_size(beta, k)

    def step(S, t):
        return _UPDATE[update](S, x[:, t], delta[:, t], k[:, t])

    for t, before, S in selective.states_backwards(step, kept, L):
        g = g + dy[:, t, :, None] * q[:, t, None]
        dq[:, t] = (dy[:, t, :, None] * S).sum(axis=1)
        given = before, x[:, t], delta[:, t], k[:, t]
        g, dx[:, t], ddelta[:, t], dk[:, t] = _UPDATE_BACKWARD[update](g, *given)
    dkappa = -(ddelta * delta * delta).sum(axis=-1, keepdims=True)
    shrink = 1 + beta * (k * k).sum(axis=-1, keepdims=True)
    dk, dbeta = dk + 2 * k * dkappa, ddelta / (shrink * shrink)
    dD = None if D is None else nn.sum_rows(dy * x)
    return (dx if D is None else dx + D * dy), dbeta, dk, dq, dD, g


def _fast(x):
    """The twins; but one position, a step of decoding, is a few array expressions as it is"""
    return twins("longhorn", x) if x.shape[1] > 1 else None


def _step_size(beta, k):
    """(2).   beta (B, L, E), k (B, L, N) -> Δ (B, L, E)"""
    return beta / (1 + beta * (k * k).sum(axis=-1, keepdims=True))


def diagonal_update(S, x, delta, k):
    """(4).   S (B, E, N), x, delta (B, E), k (B, N) -> S (B, E, N)"""
    k, delta = k[:, None], delta[..., None]
    return (1 - delta * (k * k)) * S + delta * x[..., None] * k


def diagonal_update_backward(g, S, x, delta, k):
    """g (B, E, N), S before the update -> gradients of S, x, delta, k: (7) without dκ"""
    k, delta, x = k[:, None], delta[..., None], x[..., None]
    gk = (g * k).sum(axis=-1)
    ddelta = x[..., 0] * gk - (g * (k * k) * S).sum(axis=-1)
    dk = (delta * g * (x - 2 * k * S)).sum(axis=1)
    return g * (1 - delta * (k * k)), delta[..., 0] * gk, ddelta, dk


def exact_update(S, x, delta, k):
    """(3), the solution of (1).   S (B, E, N), x, delta (B, E), k (B, N) -> S (B, E, N)"""
    k = k[:, None]
    missing = x - (S * k).sum(axis=-1)
    return S + (delta * missing)[..., None] * k


def exact_update_backward(g, S, x, delta, k):
    """g (B, E, N), S before the update -> gradients of S, x, delta, k: (7) without dκ"""
    k = k[:, None]
    gk, missing = (g * k).sum(axis=-1), x - (S * k).sum(axis=-1)
    dx = delta * gk
    dk = ((delta * missing)[..., None] * g - dx[..., None] * S).sum(axis=1)
    return g - dx[..., None] * k, dx, gk * missing, dk


_UPDATE = {"diagonal": diagonal_update, "exact": exact_update}
_UPDATE_BACKWARD = {"diagonal": diagonal_update_backward, "exact": exact_update_backward}


SCAN_IN_TIME = ("x", "dt", "k", "q", "z")  # arguments with an axis of time
SCAN_STATE = "s0"


def scan_inputs(cfg, batch, L, rng):
    """Random arguments of a scan of d_model channels, float64"""
    E, N = cfg.d_model, cfg.d_state
    shapes = dict.fromkeys(("x", "dt", "z"), (batch, L, E)) | {
        "k": (batch, L, N),
        "q": (batch, L, N),
    }
    shapes |= {"D": (E,), "dt_bias": (E,), "s0": (batch, E, N)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


# Operator: selection and scan


def operator_width(cfg):
    """E, the channels of the operator"""
    return selective.sizes(cfg)[0]


def operator_init(cfg, rng, dtype="float32"):
    """The selection and the skip"""
    params = mixer_init(cfg, rng, dtype)
    return {name: params[name] for name in PUBLISHED["operator"]}


def operator_forward(params, x, cfg):
    """(6), (2) to (5) without the gate.   x (B, L, E) -> y (B, L, E)"""
    check_activations(x, operator_width(cfg))
    return gated_forward(params, x, cfg)


def operator_backward(dy, cache):
    """dy (B, L, E) -> dx, grads"""
    dx, _, _, grads = gated_backward(dy, cache)
    return dx, grads


def gated_forward(params, x, cfg, z=None, s0=None):
    """(6), (2) to (5), the gate where z is given.   x, z (B, L, E), s0 (B, E, N) -> y (B, L, E)"""
    dt, k, q, selection = selective.selection_forward(params, x)
    y, S, scan = scan_forward(x, dt, k, q, params["D"], z, None, s0, cfg.update)
    return y, (selection, scan, S)


def gated_backward(dy, cache, dlast=None):
    """dy (B, L, E), dlast (B, E, N) -> dx, dz, dS0, grads"""
    selection, scan, _ = cache
    g = scan_backward(dy, scan, dlast)
    dx, grads = selective.selection_backward(g["dt"], g["k"], g["q"], selection)
    return dx + g["x"], g.get("z"), g.get("s0"), grads | {"D": g["D"]}


# Mixer and block


def mixer_init(cfg, rng, dtype="float32"):
    """Uniform in ±1/sqrt(inputs), W_out then over sqrt(depth); D ones, dt_bias zero"""
    return selective.init(cfg, rng, dtype)


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
    """M with y = M x: what x_s adds to y_t, given all keys and step sizes.

    x (B, L, E) the operator's input, or its first L positions -> (B, E, L, L).   channels: of so
    many, from the first on.   Error: no x
    """
    if x is None:
        raise Error("Longhorn's matrix depends on its input: give x (B, L, E).")
    x, xp = x[:, :L], array_module(x)
    dt, k, q, _ = selective.selection_forward(params, x)
    delta = _step_size(nn.sigmoid(dt[..., :channels]), k)
    D, (B, L, E) = params["D"][:channels], delta.shape
    M = xp.zeros((B, E, L, L), dtype=x.dtype)
    # What x_s = 1 alone leaves in the state, every s a batch of its own
    reach = xp.zeros((B * L, E, k.shape[2]), dtype=x.dtype)
    for t in range(L):
        now = xp.zeros((B, L, E), dtype=x.dtype)
        now[:, t] = 1
        own = (xp.repeat(a[:, t], L, axis=0) for a in (delta, k))
        reach = _UPDATE[cfg.update](reach, now.reshape(B * L, E), *own)
        y = (reach * xp.repeat(q[:, t], L, axis=0)[:, None]).sum(axis=-1)
        M[:, :, t] = y.reshape(B, L, E).swapaxes(1, 2)
        M[:, :, t, t] += D
    return M


def impulse_response(params, cfg, L):
    """Error: the scan is no convolution"""
    raise Error("Longhorn is no linear time-invariant map: it has no kernel to show; see matrix.")


def hankel_values(params, cfg):
    """Error: the scan is no convolution"""
    raise Error("Longhorn is no linear time-invariant map: it has no Hankel matrix.")


# Names of the published code

PUBLISHED = selective.published(
    selective.MIXER_NAMES | {"W_dt": "dt_head.weight", "dt_bias": "dt_head.bias"}
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
    return Config(**selective.config_fields(settings, tensors, "dt_head.weight"))


def case_outputs(part, params, x, cfg):
    """What the published cases have besides y and y_steps: the mixer's last states"""
    return selective.case_outputs(part, params, x, cfg, mixer_forward)
