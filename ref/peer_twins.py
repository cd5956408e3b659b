"""The models a second time, in plain PyTorch, from their papers: what
`python -m ref verify --peers` compares with where nobody has published a package.

Each function here is a callable for ref.cases.verify_callable: p has tensors under published names,
x is (B, L, D), and autograd makes the gradients. Each is in the form that is farthest from ours:

    model      ours                               here
    HOPE       real h, half the nodes, FFT        complex h, powers of (2) at all nodes, DFT matrix;
                                                  causal: the ladder of all-pass sections, in time
    S4D        kernel, FFT convolution            the recurrence of its modes
    S4         Cauchy sums on the nodes, FFT      dense discretised matrices, C of C~, recurrence
    Hyena      FFT convolutions                   Toeplitz matrices
    TNN        FFT                                Toeplitz matrix; decay as a power of |i - j|
    Longhorn   compiled scan, (2) and (3)         loop over time; exact: normal equations of (1)
    Mamba      compiled scan                      no scan: the matrix of hidden attention

tests/torch_twins.py has fast forms under our own names, to measure time against.
"""

import importlib
import math


class Lazy:
    """A module that is imported when something of it is used: nothing in ref/ needs PyTorch"""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


torch = Lazy("torch")
functional = Lazy("torch.nn.functional")


def under(prefix, p):
    """The tensors whose names begin with prefix, without it"""
    return {name[len(prefix) :]: t for name, t in p.items() if name.startswith(prefix)}


def as_complex(t):
    """(..., 2) -> (...) complex"""
    return torch.complex(t[..., 0], t[..., 1])


def linear(p, name, x):
    """x Wᵀ + b"""
    return functional.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def short_conv(p, name, x):
    """y_t = b + Σ_j w_j x_{t-K+1+j}, zeros before t = 0.   x (B, L, C) -> y (B, L, C)"""
    w, L = p[f"{name}.weight"], x.shape[1]
    x = functional.pad(x, (0, 0, w.shape[2] - 1, 0))
    return p[f"{name}.bias"] + sum(w[:, 0, j] * x[:, j : j + L] for j in range(w.shape[2]))


def lags(L):
    """i - j.   -> (L, L)"""
    t = torch.arange(L)
    return t[:, None] - t[None, :]


def convolution(k, x):
    """Σ_j k_{i-j} x_j with the matrix.   k (D, L) or more taps, x (B, L, D) -> (B, L, D)"""
    i = lags(x.shape[1])
    matrix = torch.where(i >= 0, k[:, i.clamp(min=0)], torch.zeros_like(k[:1, :1, None]))
    return torch.einsum("dij,bjd->bid", matrix, x)


def both_directions(system, C, x):
    """Σ_d of one direction or two, the second one over the future from x_{t+1} on.

    system(C_d, x) -> y, causal; C (d, ...)
    """
    y = system(C[0], x)
    if len(C) == 2:
        after = system(C[1], x.flip(1)).flip(1)
        y = y + torch.cat([after[:, 1:], torch.zeros_like(after[:, :1])], dim=1)
    return y


# HOPE, S4D, S4: operator, then GELU, linear and GLU, and the block around it


def tail(p, y):
    """GLU(W GELU(y) + b), GELU with erf"""
    a = 0.5 * y * (1 + torch.special.erf(y / math.sqrt(2)))
    a = a @ p["output_linear.0.weight"][:, :, 0].T + p["output_linear.0.bias"]
    D = y.shape[2]
    return a[..., :D] / (1 + torch.exp(-a[..., D:]))


def layer_norm(p, x):
    """(x - mean)/sqrt(var + 1e-5) weight + bias"""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * p["weight"] + p["bias"]


def post_norm_block(mixer):
    """-> block(p, x) = norm(x + mixer(x))"""
    return lambda p, x: layer_norm(under("norm.", p), x + mixer(under("layer.", p), x))


def hope_nodes(log_dt, L):
    """(2).   log_dt (D,) -> w' (D, L)"""
    dt = log_dt.exp()[:, None]
    w = torch.exp(2j * math.pi * torch.arange(L, dtype=log_dt.dtype) / L)
    return ((1 + dt) * w + dt - 1) / ((dt - 1) * w + dt + 1)


def transfer(h, z):
    """(1), Σ_i h_i z^-(i+1).   h (D, n), z (D, L) -> (D, L)"""
    return sum(h[:, i, None] * z ** -(i + 1) for i in range(h.shape[1]))


def hope_circular(p, x):
    """(3), in two directions where there are twice as many channels"""
    L, D = x.shape[1:]
    z = hope_nodes(p["kernel.log_dt"], L)
    h = as_complex(p["kernel.H"])
    g = transfer(h[:D], z[:D])
    if len(h) == 2 * D:
        g = g + transfer(h[D:], z[D:].conj())
    t = torch.arange(L)
    F = torch.exp(-2j * math.pi * (t[:, None] * t % L).to(x.dtype) / L)
    y = F.conj() @ (g.T * (F @ x.to(F.dtype))) / L
    return y.real + p["D"] * x


def hope_causal(p, x):
    """The ladder: each section's output is the next one's input, and y = Σ h_i q_i"""
    dt, h = p["kernel.log_dt"].exp(), p["kernel.H"][..., 0]
    a, states, y = (1 - dt) / (1 + dt), [torch.zeros_like(x[:, 0])] * h.shape[1], []
    for u in x.unbind(1):
        total, signal = p["D"] * u, u
        for i, s in enumerate(states):
            q = s - a * signal
            states[i] = a * q + signal
            total, signal = total + h[:, i] * q, q
        y.append(total)
    return torch.stack(y, dim=1)


def hope_circular_mixer(p, x):
    """HOPE's mixer, circular"""
    return tail(p, hope_circular(p, x))


def hope_causal_mixer(p, x):
    """HOPE's mixer, causal"""
    return tail(p, hope_causal(p, x))


def s4d_mixer(p, x):
    """x_n <- exp(Δ A_n) x_n + u, y = 2 Re Σ C_n (exp(Δ A_n) - 1)/A_n x_n"""
    A = torch.complex(-p["kernel.log_A_real"].exp(), p["kernel.A_imag"])
    step = (p["kernel.log_dt"].exp()[:, None] * A).exp()
    C = as_complex(p["kernel.C"])

    def system(C, x):
        state, y = torch.zeros_like(A)[None], []
        for u in x.unbind(1):
            state = step * state + u[:, :, None]
            y.append(2 * (C * (step - 1) / A * state).sum(-1).real)
        return torch.stack(y, dim=1)

    return tail(p, both_directions(system, C if C.ndim == 3 else C[None], x) + p["D"] * x)


def s4_matrices(p):
    """The discretised system of all 2n modes, C = C~ (I - Ā^L)^-1.   -> Ā (D, 2n, 2n), B̄ (D, 2n),
    C (d, D, 2n)"""

    def whole(z):
        return torch.cat([z, z.conj()], dim=-1)

    W = whole(torch.complex(-p["kernel.A_real"].exp(), -p["kernel.A_imag"]))
    B, C, P = (whole(as_complex(p[f"kernel.{name}"])) for name in "BCP")
    half = p["kernel.inv_dt"].exp()[:, :, None] / 2
    A = torch.diag_embed(W) - P[0][:, :, None] * P[0].conj()[:, None, :]
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    step = torch.linalg.solve(eye - half * A, eye + half * A)
    given = torch.linalg.solve(eye - half * A, 2 * half * B[0][:, :, None])[:, :, 0]
    L = int(p["kernel.l_kernel"])
    rest = (eye - torch.linalg.matrix_power(step, L)).mT
    C = torch.stack([torch.linalg.solve(rest, c[:, :, None])[:, :, 0] for c in C])
    return step, given, C


def s4_mixer(p, x):
    """s <- Ā s + B̄ u, y = Re(C s)"""
    step, given, C = s4_matrices(p)

    def system(C, x):
        state, y = torch.zeros_like(given)[None], []
        for u in x.unbind(1):
            state = torch.einsum("dmn,bdn->bdm", step, state.expand(len(u), -1, -1))
            state = state + given * u[:, :, None]
            y.append((C * state).sum(-1).real)
        return torch.stack(y, dim=1)

    return tail(p, both_directions(system, C, x) + p["D"][0] * x)


hope_block = post_norm_block(hope_circular_mixer)
s4d_block = post_norm_block(s4d_mixer)
s4_block = post_norm_block(s4_mixer)


# Hyena


def implicit_filters(p, L, D):
    """MLP of the position features, times its window.   -> k (F, D, L), bias (F, D)"""
    p = under("filter_fn.", p)
    h, freq = p["pos_emb.z"][0, :L], p["implicit_filter.1.freq"]
    last = max(int(name.split(".")[1]) for name in p if name.startswith("implicit_filter."))
    for i in range(0, last, 2):
        h = torch.sin(freq * linear(p, f"implicit_filter.{i}", h))
    h = linear(p, f"implicit_filter.{last}", h)
    h = h * torch.exp(-p["pos_emb.t"][0, :L] * p["modulation.deltas"][0].abs())
    return h.T.unflatten(0, (-1, D)), p["bias"].unflatten(0, (-1, D))


def hyena_mixer(p, x):
    """v <- conv(v x_i) + bias v, i = O-1 .. 1; then y = v x_0"""
    L, D = x.shape[1:]
    filters = zip(*implicit_filters(p, L, D), strict=True)
    first, *gates, v = short_conv(p, "short_filter", linear(p, "in_proj", x)).split(D, dim=2)
    for gate, (k, bias) in zip(reversed(gates), filters, strict=True):
        v = v * gate
        v = convolution(k, v) + bias * v
    return linear(p, "out_proj", v * first)


def hyena_block(p, x):
    """x + mixer(LN(x)), then x + MLP(LN(x)), GELU with tanh"""
    x = x + hyena_mixer(under("mixer.", p), layer_norm(under("norm1.", p), x))
    a = linear(p, "mlp.fc1", layer_norm(under("norm2.", p), x))
    a = a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2
    return x + linear(p, "mlp.fc2", a)


def student_mixer(p, x):
    """L2T-Hyena's student: gated filters, y <- y + x_i (conv(y, h_i) + B_i y)"""
    L, D = x.shape[1:]
    h = p["filter.h_basis"][:, :, :L]
    gate = linear(p, "filter.gate.gate_proj", h.mT).mT
    h = h / (1 + torch.exp(-gate))
    h = h / (h.abs().sum(dim=2, keepdim=True) + 1e-6)
    x = short_conv(p, "proj_input.conv", linear(p, "proj_input.linear", x))
    *gates, y = x.split(D, dim=2)
    for x_i, h_i, B_i in zip(gates, h, p["B"][:, :, 0], strict=True):
        y = y + x_i * (convolution(h_i, y) + B_i * y)
    return linear(p, "proj_output", y)


# TNN, positions of type 1


def simple_norm(x):
    """x / (|x| / sqrt(D) + 1e-8)"""
    return x / (x.square().sum(dim=-1, keepdim=True).sqrt() / math.sqrt(x.shape[-1]) + 1e-8)


def tnn_operator(p, x, causal=True, least=None):
    """Σ_j t_{i-j} x_j, t_k = γ^|k| RPE(k).   least: λ of a learned decay"""
    L = x.shape[1]
    k = torch.arange(1 - L, L, dtype=x.dtype)
    h = linear(p, "rpe.pos_proj", k[:, None])
    layers = sum(name.startswith("rpe.layers.") for name in p) // 2
    for name in (*(f"rpe.layers.{i}.2" for i in range(layers)), "rpe.out.2"):
        h = linear(p, name, torch.relu(simple_norm(h)))
    if "gamma" in p:
        gamma = p["gamma"].flatten()
        gamma = gamma if least is None else least + (1 - least) / (1 + torch.exp(-gamma))
        h = h * gamma ** k.abs()[:, None]
    i = lags(L)
    T = h[i + L - 1]  # (L, L, E)
    return torch.einsum("ije,bje->bie", T * (i >= 0)[:, :, None] if causal else T, x)


def tnn_block(p, x, **form):
    """x + GTU(norm(x)), then x + GLU(norm(x))"""
    mixer, glu = under("token_mixer.", p), under("feature_mixer.", p)
    z = simple_norm(x)
    u, v = (silu(linear(mixer, f"{name}_proj", z)) for name in "uv")
    x = x + linear(mixer, "o", u * tnn_operator(under("toep.", mixer), v, **form))
    z = simple_norm(x)
    return x + linear(glu, "l3", silu(linear(glu, "l1", z)) * linear(glu, "l2", z))


def silu(x):
    """x sigmoid(x)"""
    return x / (1 + torch.exp(-x))


# Longhorn and Mamba


def longhorn_step(s, x, beta, k):
    """(3).   s (B, E, N), x, beta (B, E), k (B, N) -> s"""
    delta = beta / (1 + beta * k.square().sum(-1, keepdim=True))
    kept = 1 - delta[:, :, None] * k.square()[:, None, :]
    return kept * s + (delta * x)[:, :, None] * k[:, None, :]


def exact_step(s, x, beta, k):
    """The minimum of (1): s (I + β k kᵀ) = s_before + β x kᵀ"""
    outer = k[:, None, :, None] * k[:, None, None, :]
    left = torch.eye(k.shape[1], dtype=k.dtype) + beta[:, :, None, None] * outer
    right = s + (beta * x)[:, :, None] * k[:, None, :]
    return torch.linalg.solve(left, right[..., None])[..., 0]


def longhorn_recurrence(x, dt, k, q, s0=None, step=longhorn_step):
    """y_t = S_t q_t, β = sigmoid(dt).   -> y (B, L, E), S (B, E, N)"""
    s = x.new_zeros(len(x), x.shape[2], k.shape[2]) if s0 is None else s0
    beta, y = 1 / (1 + torch.exp(-dt)), []
    for t in range(x.shape[1]):
        s = step(s, x[:, t], beta[:, t], k[:, t])
        y.append((s * q[:, t, None, :]).sum(-1))
    return torch.stack(y, dim=1), s


def longhorn_scan(x, dt, k, q, D, z, dt_bias, s0=None, step=longhorn_step):
    """(y + D x) silu(z)"""
    y, s = longhorn_recurrence(x, dt + dt_bias, k, q, s0, step)
    return {"y": (y + D * x) * silu(z), "last_state": s}


def attention(x, dt, A, B, C, h0=None):
    """y_t = Σ_s C_t exp(A (Δ_{s+1} + .. + Δ_t)) Δ_s B_s x_s, without any state.   -> y, h_L"""
    delta = torch.logaddexp(dt, torch.zeros_like(dt))
    total = delta.cumsum(1)
    i = lags(x.shape[1])
    between = (total[:, :, None] - total[:, None]) * (i >= 0)[:, :, None]  # (B, L, L, E)
    decay = (between[..., None] * A).exp() * (i >= 0)[:, :, None, None]
    given = (delta * x)[..., None] * B[:, :, None, :]
    y = torch.einsum("btn,btsen,bsen->bte", C, decay, given)
    last = (decay[:, -1] * given).sum(1)
    if h0 is not None:
        left = (total[..., None] * A).exp() * h0[:, None]
        y, last = y + (left * C[:, :, None, :]).sum(-1), last + left[:, -1]
    return y, last


def mamba_scan(x, dt, A, B, C, D, z, dt_bias, h0=None):
    """(y + D x) silu(z)"""
    y, h = attention(x, dt + dt_bias, A, B, C, h0)
    return {"y": (y + D * x) * silu(z), "last_state": h}


def selective_mixer(p, u, recurrence, dt_name):
    """The layer around recurrence(x, dt, b, c) -> y, state.   u (B, L, D) -> y (B, L, D)"""
    x, z = linear(p, "in_proj", u).chunk(2, dim=2)
    x = silu(short_conv(p, "conv1d", x))
    R = p[f"{dt_name}.weight"].shape[1]
    r, b, c = linear(p, "x_proj", x).tensor_split((R, R + (len(p["x_proj.weight"]) - R) // 2), 2)
    y, _ = recurrence(x, linear(p, dt_name, r), b, c)
    return linear(p, "out_proj", (y + p["D"] * x) * silu(z))


def longhorn_mixer(p, u):
    """Longhorn's layer"""
    return selective_mixer(p, u, longhorn_recurrence, "dt_head")


def mamba_mixer(p, u):
    """Mamba's layer"""

    def recurrence(x, dt, b, c):
        return attention(x, dt, -p["A_log"].exp(), b, c)

    return selective_mixer(p, u, recurrence, "dt_proj")


def longhorn_block(p, u):
    """u + mixer(RMSNorm(u))"""
    norm = u / (u.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]
    return u + longhorn_mixer(under("mixer.", p), norm)
