"""`python -m ref audit`: where papers, specifications and published code differ, in numbers.

A finding is a function without arguments. Its docstring says what differs; `finding` has where, and
the line in which the numbers that it returns are printed. They are computed when asked for, from
random inputs and parameters as the models start, in float64 unless it says otherwise: what is
published by settings of the models, or by a few lines beside them. `lines` is the command.
"""

import math
import textwrap
from dataclasses import dataclass

import numpy as np

from ref import (
    Error,
    etsc,
    hope,
    hyena,
    hyena_filters,
    longhorn,
    mamba,
    network,
    nn,
    optim,
    presets,
    s4,
    s4d,
    ssm,
    tnn,
    tnn_rpe,
)

FINDINGS = {}


@dataclass(frozen=True)
class Finding:
    """What differs, in words and in numbers."""

    where: str
    line: str  # names of numbers in braces
    compute: object  # () -> {name: number}


def finding(where, line):
    """Puts a function into FINDINGS: hope_frozen_h is hope-frozen-h"""

    def put(compute):
        FINDINGS[compute.__name__.replace("_", "-")] = Finding(where, line, compute)
        return compute

    return put


def check(names):
    """Error: a name that is no finding's"""
    if unknown := [name for name in names if name not in FINDINGS]:
        raise Error(f"no finding {', '.join(unknown)}; there are: {', '.join(FINDINGS)}.")


def lines(names=()):
    """What the command prints: a line a finding; of names the explanation too.   Error: as check"""
    check(names)
    for name in names or FINDINGS:
        found = FINDINGS[name]
        numbers = found.line.format(**found.compute())
        if names:
            texts = " ".join(found.compute.__doc__.split()), numbers
            paragraphs = [textwrap.fill(text, 100) for text in texts]
            yield "\n\n".join([f"{name}: {found.where}", *paragraphs])
        else:
            yield f"{name:{max(map(len, FINDINGS))}}  {numbers}"


def apart(a, b):
    """|a - b| / |b|"""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def random(*shape, seed=0):
    """Normal numbers of this shape"""
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def made(init, cfg, dtype="float64"):
    """Initial parameters"""
    return init(cfg, np.random.default_rng(0), dtype)


# HOPE


@finding(
    "HOPE, s4block.py of the LRA pipeline",
    "{share:.0%} of the {parameters:,} parameters of the ListOps network never move; fitted to a "
    "delay, the error of one layer is {frozen:.0%}, and {trained:.1%} where h is trained",
)
def hope_frozen_h():
    """The pipeline registers the Markov parameters h with the weight decay in the place of the
    learning rate. In the shipped configuration that is 0.0, which makes them a buffer: ListOps,
    IMDB and AAN train with the random h that they start with. Here: train_markov=False."""
    settings = presets.make_settings({"model": "hope", "data": "lra-listops", "preset": "paper"})
    layer = hope.Config(**settings["layer"])
    big = made(network.init, presets.network_config(settings, layer, "mean", 18, 10), "float32")
    parameters, x, numbers = sum(p.size for p in big.values()), random(4, 64, 2), {}
    for name in ("trained", "frozen"):
        cfg = hope.Config(d_model=2, d_state=16, dt_min=1, dt_max=1, train_markov=name == "trained")
        params, rates = made(hope.operator_init, cfg), {"frozen": 0.0, "dt": 0.0}
        groups = {n: optim.Group(rates.get(hope.groups(cfg).get(n), 0.02)) for n in params}
        first, moments, target = params["H"].copy(), optim.adamw_init(params), np.roll(x, 3, axis=1)
        for step in range(1, 201):
            y, cache = hope.operator_forward(params, x, cfg)
            _, grads = hope.operator_backward(y - target, cache)
            optim.adamw_update(params, grads, moments, step, groups)
        numbers |= {name: apart(y, target), f"moved_{name}": float(abs(params["H"] - first).max())}
    return numbers | {"parameters": parameters, "share": big["blocks.H"].size / parameters}


@finding(
    "HOPE, Algorithm 1 and the published class",
    "the gradient of Im h is {gradient:g}; y moves by {moved:.0e} when Im h grows 7 times; "
    "in the published bidirectional layout |d Im h| is {layout:.2f} of |d Re h|",
)
def hope_dead_imaginary():
    """h is complex. y = Re ifft(fft(u) G) keeps the Hermitian part of G, in which, for real u, no
    imaginary part of h is left: in paper and code half of the numbers in h do nothing. Only in the
    published bidirectional layout, where both directions share a spectrum, they do."""
    x, cfg = random(2, 64, 4), hope.Config(d_model=4, d_state=16)
    both = hope.Config(d_model=4, d_state=16, bidirectional=True, layout="published")
    params = made(hope.operator_init, cfg)
    re, im = params["H"][..., 0], params["H"][..., 1]

    def published(h):
        g, _ = hope.sample_forward(h, params["log_dt"], 64, 64)
        return np.fft.ifft(np.fft.fft(x, axis=1) * g.T, axis=1).real

    def gradient(cfg):
        _, cache = hope.operator_forward(made(hope.operator_init, cfg), x, cfg)
        return np.moveaxis(hope.operator_backward(random(*x.shape, seed=1), cache)[1]["H"], -1, 0)

    dre, dim = gradient(both)
    numbers = {"gradient": float(abs(gradient(cfg)[1]).max())}
    numbers |= {"layout": float(np.linalg.norm(dim) / np.linalg.norm(dre))}
    return numbers | {"moved": apart(published(re + 7j * im), published(re + 1j * im))}


@finding(
    "HOPE, Algorithm 1 and the published class",
    "of white noise of {L}, {mean:.1%} of the kernel's part of y comes from later inputs, of y_0 "
    "{first:.0%}; y is {difference:.0%} away from the causal one",
)
def hope_circular():
    """The convolution is circular, in paper and code: nothing is padded with zeros, and late inputs
    reach early outputs. A classifier may bear it, a language model not: conv="causal"."""
    L, cfg = 256, hope.Config(d_model=32)
    params, x = made(hope.operator_init, cfg) | {"D": np.zeros(32)}, random(2, L, 32)
    energy = (hope.matrix(params, cfg, L=L)[0] ** 2).sum(axis=0)
    future = np.triu(energy, 1).sum(axis=1) / energy.sum(axis=1)
    y, _ = hope.operator_forward(params, x, cfg)
    causal, _ = hope.operator_forward(params, x, hope.Config(d_model=32, conv="causal"))
    numbers = {"first": float(future[0]), "mean": float(future.mean()), "last": float(future[-1])}
    return numbers | {"L": L, "difference": apart(y, causal)}


@finding(
    "HOPE, minimal class and LRA pipeline",
    "d_state 64: n = {n_minimal} and {n_lra}, deviation of h {std_minimal:.4f} and {std_lra:.4f}, "
    "rms response {gain_minimal:.2f} and {gain_lra:.2f}",
)
def hope_conventions():
    """n, the number of Markov parameters, is d_state/2 in the minimal class and d_state in the LRA
    pipeline; h is scaled by 1/(2 sqrt(d_state)) and by 1/(scale_factor sqrt(n))."""
    numbers = {}
    for name in ("minimal", "lra"):
        cfg = hope.Config(d_model=512, d_state=64, convention=name)
        square = (made(hope.operator_init, cfg)["H"] ** 2).sum(axis=2)
        numbers |= {f"n_{name}": cfg.n, f"std_{name}": math.sqrt(square.mean())}
        numbers[f"gain_{name}"] = math.sqrt(square.sum(axis=1).mean())  # of Ḡ over the whole circle
    return numbers


@finding(
    "HOPE, bidirectional layer",
    "h = (1, 0, ..) with dt = 1 is a delay by 1, where the paper's form has {paper:.0%} of the "
    "kernel's energy; of the published one {published:.1%} is there and {late:.0%} at lag 2; of "
    "random h the kernels are {difference:.0%} apart",
)
def hope_bidirectional():
    """The published layer samples each direction on L/2 nodes that go once round the whole circle,
    and joins both to one spectrum of L bins: lags are doubled. By the formula each has the nodes of
    all L bins."""
    kernels, numbers = {}, {}
    for layout in ("paper", "published"):
        cfg = hope.Config(d_model=4, d_state=16, bidirectional=True, layout=layout)
        params = made(hope.operator_init, cfg)
        kernels[layout] = hope.impulse_response(params, cfg, 64)
        H, log_dt = np.zeros_like(params["H"]), np.zeros(8)
        H[:4, 0, 0] = 1
        k = hope.impulse_response(params | {"H": H, "log_dt": log_dt}, cfg, 64)[0]
        numbers[layout], late = (float(k[lag] ** 2 / (k @ k)) for lag in (1, 2))
    return numbers | {"late": late, "difference": apart(kernels["published"], kernels["paper"])}


# S4 and S4D


@finding(
    "S4, initialisation in s4.py",
    "N = 64: {clipped} of {modes} entries of B are cut, the largest from {largest:.0f}; the kernel "
    "of 1,024 taps moves by {kernel:.0%}",
)
def s4_clipped_b():
    """B of HiPPO-LegS, in the basis of the eigenvectors, is clipped to ±2; the paper takes it as it
    is. What is cut depends on the phases of the eigenvectors, which are free: here their first
    components are real."""
    cfg, (_, _, B, _) = s4.Config(d_model=8, l_max=1024), ssm.legs_nplr(64)
    params, B = made(s4.operator_init, cfg), ssm.as_pairs(B)
    paper = params | {"B": np.tile(B, (8, 1, 1))}
    kernel, unclipped = (s4.kernel_forward(p, 1024, cfg)[0] for p in (params, paper))
    numbers = {"clipped": int((abs(B).max(axis=1) > 2).sum()), "modes": len(B)}
    return numbers | {"largest": float(abs(B).max()), "kernel": apart(kernel, unclipped)}


@finding(
    "S4D, s4d.py",
    "float32, |dt A| from {smallest:.0e}: worst relative error {subtracted:.0e}, and {kept:.0e} "
    "without the subtraction: {digits:.1f} digits are lost",
)
def s4d_subtraction():
    """The factor exp(dt A) - 1 of the zero-order hold is formed by that subtraction, in float32:
    where dt A is small, most digits of the exponential are those of the 1."""
    params = made(s4d.operator_init, s4d.Config(d_model=64), "float32")
    A = -np.exp(params["log_A_real"]) + 1j * params["A_imag"]
    z = np.exp(params["log_dt"])[:, None] * A
    exact = s4d._expm1(z.astype("complex128"))
    subtracted, kept = (float(abs(e / exact - 1).max()) for e in (np.exp(z) - 1, s4d._expm1(z)))
    numbers = {"smallest": float(abs(z).min()), "digits": math.log10(subtracted / kept)}
    return numbers | {"subtracted": subtracted, "kept": kept}


# ETSC


@finding(
    "ETSC, phases in the published solver",
    "error of the kernel at n = 64, 512 and 2,048: {plain_64:.0e}, {plain_512:.0e} and "
    "{plain_2048:.0e}; with j k modulo m {exact_64:.0e}, {exact_512:.0e} and {exact_2048:.0e}",
)
def etsc_phases():
    """λ_k^j is made as exp(θ_k j), θ_k = -2πik/m. The angle grows to 2πn, and its rounding with it;
    j k modulo m, in integers, keeps it on the circle."""
    numbers = {}
    for n in (64, 512, 2048):
        t, j, k = random(n), np.arange(n)[:, None], np.arange(1, n + 1)
        theta, b = etsc.solve(t[:, None])
        tables = {"plain": np.exp(theta[0, :, 0] * j), "exact": etsc.roots(j * k % (n + 1), n + 1)}
        numbers |= {f"{name}_{n}": apart((M @ b[1:, 0]).real, t) for name, M in tables.items()}
    return numbers


@finding(
    "ETSC, paper and published code",
    "n = {n}: {full} real numbers of state a channel, or {half}, with kernels {difference:.0e} "
    "apart, errors {error_full:.0e} and {error_half:.0e}",
)
def etsc_full_spectrum():
    """n coefficients become n complex modes. Those of real coefficients come in conjugate pairs, of
    which one is enough: half of the state and of the work. Here: spectrum="full"."""
    n, t = 512, random(2, 512)
    full, half = (etsc.to_ssm(t, spectrum=kind) for kind in ("full", "half"))
    numbers = {"n": n, "full": 2 * full.modes, "half": int(half.states.max())}
    errors = {"error_full": float(full.error.max()), "error_half": float(half.error.max())}
    kernels = [etsc.coefficients(system, n) for system in (full, half)]
    return numbers | errors | {"difference": apart(*kernels)}


@finding(
    "ETSC, the published form has no horizon",
    "n = {n}, white noise: at lag n the kernel is {first:.1f} times the rms coefficient; the lags "
    "from n to 2n have {energy:.2f} of the energy of those before, with γ = 0.99 {decayed:.2f}",
)
def etsc_horizon():
    """The exact system is right for n lags. Decoded further it does not fade: its kernel at lag n
    is -γ^n Σ t_j, and from lag m = n + 1 on it begins again, times γ^m."""
    n, t, numbers = 64, random(1, 64), {}
    for name, gamma in (("energy", 1.0), ("decayed", 0.99)):
        k = etsc.coefficients(etsc.to_ssm(t, gamma), 2 * n + 1)[0]
        numbers[name] = float((k[n:] ** 2).sum() / (k[:n] ** 2).sum())
        numbers[f"again_{name}"] = apart(k[n + 1 :], gamma ** (n + 1) * k[:n])
    return numbers | {"n": n, "first": abs(t.sum()) / math.sqrt((t * t).mean())}


# Hyena


@finding(
    "Hyena, standalone_hyena.py and safari's hyena.py",
    "the same weights read the other way: y is {order_2:g} away for order 2, {order_3:.0%} for "
    "order 3, {order_4:.0%} for order 4",
)
def hyena_filter_order():
    """The filters' channels are split (o d) in the standalone class and (d o) in the full one, as
    published: a checkpoint of order 3 or more is another model to each."""
    numbers = {}
    for order in (2, 3, 4):
        cfg = hyena.Config(d_model=8, order=order, l_max=32)
        params, x, other = made(hyena.mixer_init, cfg), random(2, 32, 8), {}
        for name in (f"F_{cfg.num_inner_mlps + 1}", "deltas", "B"):
            p = params[name]
            other[name] = p.reshape(8, cfg.filters, -1).swapaxes(0, 1).reshape(p.shape)
        y, theirs = (hyena.mixer_forward(p, x, cfg)[0] for p in (params, params | other))
        numbers[f"order_{order}"] = apart(theirs, y)
    return numbers


@finding(
    "Hyena, safari's language model",
    "rms tap of the filters {safari:.3f} instead of {standalone:.3f}, {ratio:.1f} times smaller",
)
def hyena_filter_init():
    """The language model draws every linear layer anew, normal with deviation 0.02, biases zero:
    also those behind the filters, which the standalone class leaves uniform in ±1/sqrt(inputs)."""
    cfg = hyena.Config(d_model=64, l_max=256, emb_dim=5, w=10.0)
    params = made(hyena.operator_init, cfg)
    theirs = {n: 0.02 * random(*p.shape) for n, p in params.items() if n.startswith("F_")}
    theirs |= {n: np.zeros_like(p) for n, p in params.items() if n.startswith("c_")}
    kernels = (hyena_filters.filter_forward(p, 256, cfg)[0] for p in (params, params | theirs))
    standalone, safari = (math.sqrt((k * k).mean()) for k in kernels)
    return {"standalone": standalone, "safari": safari, "ratio": standalone / safari}


# Longhorn, Mamba, TNN


@finding(
    "Longhorn, its derivation and what it trains",
    "keys of length {long:.1f}: y is {y_long:.0%} away, and what a step minimises {cost:.1f} times "
    "its minimum; of length {short:.1f}: {y_short:.1%} away; of one state {y_one:.0e}",
)
def longhorn_diagonal():
    """The objective of a step has an exact solution, of rank one; what is trained keeps the
    diagonal of it alone. For one state they are the same. Here: update="exact"."""
    x, dt, cost, numbers = random(2, 64, 8), random(2, 64, 8, seed=1), {}, {}
    for name, N, scale in (("long", 16, 1.0), ("short", 16, 0.1), ("one", 1, 1.0)):
        k, q = scale * random(2, 64, N), random(2, 64, N, seed=1)
        y, exact = (longhorn.scan_forward(x, dt, k, q, update=u)[0] for u in longhorn.UPDATES)
        numbers |= {f"y_{name}": apart(y, exact), name: math.sqrt((k * k).sum(axis=2).mean())}
    S, key, beta = random(2, 8, 16), random(2, 16), nn.sigmoid(dt[:, 0])
    delta = beta / (1 + beta * (key * key).sum(axis=1, keepdims=True))
    for name in longhorn.UPDATES:
        after = getattr(longhorn, f"{name}_update")(S, x[:, 0], delta, key)
        missed = (after * key[:, None]).sum(axis=2) - x[:, 0]
        cost[name] = ((after - S) ** 2).sum() + (beta * missed * missed).sum()
    return numbers | {"cost": float(cost["diagonal"] / cost["exact"])}


@finding(
    "Longhorn, selective_scan_online7_ref",
    "{L} positions, N = {N}: the state that is returned is {difference:.0%} away from the last one",
)
def longhorn_last_state():
    """Asked for the last state, the reference scan compares the position with the wrong axis and
    returns the state after N positions, not after L."""
    L, N = 64, 16
    sequence = [random(2, L, width, seed=i) for i, width in enumerate((8, 8, N, N))]
    _, last, _ = longhorn.scan_forward(*sequence)
    _, returned, _ = longhorn.scan_forward(*(a[:, :N].copy() for a in sequence))
    return {"L": L, "N": N, "difference": apart(returned, last)}


@finding(
    "Mamba, selective_scan; eq. (4) of the paper is a zero-order hold",
    "y is {d_0:.1%}, {d_1:.0%}, {d_2:.0%} and {d_3:.0%} away at δ = 0.001, 0.01, 0.1 and 1",
)
def mamba_euler():
    """The input enters as δ B x, by Euler's rule; the paper's zero-order hold has (exp(δA) - 1)/A
    in the place of δ. The difference grows with δ |A|; A starts as -1..-16, δ in 0.001..0.1."""
    x, B, C = random(2, 64, 8), random(2, 64, 16), random(2, 64, 16, seed=1)
    A, numbers = -np.tile(np.arange(1.0, 17.0), (8, 1)), {}
    for i, delta in enumerate((0.001, 0.01, 0.1, 1.0)):
        euler, *_ = mamba.recurrence_forward(x, np.full(x.shape, delta), A, B, C)
        h, hold = np.zeros((2, 8, 16)), np.empty_like(x)
        for t in range(64):
            h = np.exp(delta * A) * h + np.expm1(delta * A) / A * x[:, t, :, None] * B[:, t, None]
            hold[:, t] = (h * C[:, t, None]).sum(axis=2)
        numbers[f"d_{i}"] = apart(euler, hold)
    return numbers


@finding(
    "TNN, tnn-pytorch",
    "inputs of 64 and of 128: coefficients of the same lags {type_1:g} (type 1), {type_2:.0%} (2) "
    "and {type_3:.0%} (3) apart; positions in float32 cost {rounded:.0e}; L = 1 has {lags} lags to "
    "divide by, here y = t_0 x to {single:g}",
)
def tnn_positions():
    """Position type 1 is the lag k; types 2 and 3 are k/(L-1) and its exponential: there the same
    lag has another coefficient in an input of another length. Theirs are rounded to torch's default
    dtype, also for a model in float64, and their operator fails at L = 1, where t_0 would do."""
    x, numbers, single = random(2, 1, 48), {}, 0.0
    for kind in (1, 2, 3):
        cfg = tnn.Config(d_model=16, par_type=kind)
        params = made(tnn.operator_init, cfg)
        t, short, long = (tnn_rpe.coefficients_forward(params, L, cfg)[0] for L in (1, 64, 128))
        numbers[f"type_{kind}"] = apart(long[:, :64], short)
        single = max(single, apart(tnn.operator_forward(params, x, cfg)[0], t[:, 0] * x))
    p = tnn_rpe.positions(np.arange(64.0), 64, cfg)
    fine, coarse = (tnn_rpe.rpe_forward(params, q, cfg)[0] for q in (p, p.astype("f").astype("d")))
    return numbers | {"rounded": apart(coarse, fine), "single": single, "lags": x.shape[1] - 1}


from ref import audit_l2t  # noqa: E402, F401  its findings come after these
