"""Exact products with second derivatives: the definition of a derivative, layer by layer and of
whole networks, PyTorch's double backward, symmetry, linearity, precision, devices, bad input."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import strict
from conftest import error

from ref import Error, backend, hyena, hyena_filters, hyena_tangents, network, nn, tangents, tnn

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="torch is not installed (the extra `peers`)"
)
STUDENT = {"filter": "gated", "recurrence": "residual", "block": "bare"}
LAYER = {"d_model": 5, "l_max": 11, "emb_dim": 5, "filter_order": 6, "d_mlp": 7, "dropout": 0.3}
LM = {"d_input": 13, "d_output": 13, "decoder": "lm", "tied": True}
POOLED = {"d_input": 4, "d_output": 3}
PLACED = {"positions": 12, "final_norm": True}
CASES = {  # layer, network, B, L, lengths
    "student": (STUDENT, LM | PLACED, 3, 7, None),
    "student, one token": (STUDENT, LM | PLACED, 1, 1, None),
    "student, all of the filters": (STUDENT | {"dropout": 0.0}, LM | PLACED, 1, 11, None),
    "student, order 3": (STUDENT | {"order": 3, "short_filter_order": 4}, LM, 2, 5, None),
    "student, some positions": (STUDENT, LM | PLACED | {"where": 0.6}, 3, 7, None),
    "gated, standard": ({"filter": "gated", "order": 3}, LM, 2, 7, None),
    "standard": ({"w": 2.0, "shift": 0.1}, LM | {"final_norm": True}, 2, 9, None),
    "standard, order 4": (
        {"order": 4, "num_inner_mlps": 0, "short_filter_order": 1},
        LM | {"tied": False, "decoder_bias": False},
        2,
        5,
        None,
    ),
    "implicit, residual": (STUDENT | {"filter": "implicit", "order": 1}, LM, 2, 7, None),
    "implicit, one token": ({"l_max": 1}, LM | {"tied": False}, 2, 1, None),
    "real input, mean": (
        {},
        POOLED | PLACED | {"tokens": False, "pool_from": 1},
        3,
        7,
        np.array([3, 7, 5]),
    ),
    "last": ({}, POOLED | {"decoder": "last"}, 3, 7, np.array([3, 7, 1])),
    "two documents": (
        STUDENT,
        POOLED | PLACED | {"decoder": "match"},
        4,
        7,
        np.array([3, 7, 5, 6]),
    ),
}
of_cases = pytest.mark.parametrize("name", CASES)


class Problem:
    """l = Σ r y + q y²/2 of the logits y of a network whose parameters are all far from 0"""

    def __init__(self, name, dtype="float64", seed=0):
        layer, net, B, L, lengths = CASES[name]
        rng, net = np.random.default_rng(seed), dict(net)
        share = net.pop("where", None)
        self.cfg = network.Config("hyena", hyena.Config(**LAYER | layer), n_layers=2, **net)
        self.params = network.init(self.cfg, rng)
        buffers = [n for n in self.params if network.is_buffer(n, "hyena", self.cfg.layer)]
        for n, p in self.params.items():
            moved = p if n in buffers else p + 0.3 * rng.standard_normal(p.shape)
            self.params[n] = moved.astype(dtype)
        self.trained = [n for n in self.params if n not in buffers]
        if self.cfg.tokens:
            self.x = rng.integers(0, self.cfg.d_input, (B, L))
        else:
            self.x = rng.standard_normal((B, L, self.cfg.d_input)).astype(dtype)
        self.lengths, self.where = lengths, None if share is None else rng.random((B, L)) < share
        shape = self.forward(self.params)[0].shape
        self.r, self.q = (rng.standard_normal(shape).astype(dtype) for _ in range(2))

    def direction(self, seed):
        rng = np.random.default_rng(seed)
        of = {n: self.params[n] for n in self.trained}
        return {n: rng.standard_normal(p.shape).astype(p.dtype) for n, p in of.items()}

    def forward(self, params):
        rng = np.random.default_rng(7)
        return network.forward(params, self.x, self.cfg, self.lengths, rng, where=self.where)

    def gradients(self, params):
        y, cache = self.forward(params)
        return {"y": y} | network.backward(self.r + self.q * y, cache)[1]

    def products(self, v):
        y, cache = self.forward(self.params)
        ty, tcache = tangents.forward(v, cache)
        return {"y": ty} | tangents.backward(self.r + self.q * y, self.q * ty, cache, tcache)


def apart(ours, exact, floor=1e-3):
    """The largest error of dicts of arrays, each in its own scale, which is at least `floor` of the
    largest"""
    assert ours.keys() == exact.keys()
    assert all(x.shape == exact[n].shape for n, x in ours.items())
    least = floor * max(np.abs(x).max() for x in exact.values())
    return max(
        np.abs(x - exact[n]).max() / max(np.abs(exact[n]).max(), least) for n, x in ours.items()
    )


def slopes(f, step=1e-5):
    """d/dε f(ε) at 0 of a dict of arrays, by a four-point stencil"""
    up, down, far, away = (f(e * step) for e in (1, -1, 2, -2))
    return {n: (8 * (up[n] - down[n]) - far[n] + away[n]) / (12 * step) for n in up}


# Layer by layer

D, W = 5, 4
FILTERS = hyena.Config(d_model=D, l_max=9, emb_dim=5, filter_order=W, order=3)
GATED = replace(FILTERS, filter="gated")


def named(names, results):
    return dict(zip(names, results, strict=True))


def layers():
    """name -> shapes of the inputs; forward(arrays), backward(dy, cache) -> dict,
    tangent(tarrays, cache), backward tangent(dy, tdy, cache, tcache) -> dict, with the gradients
    that go on as well, `on`"""

    def conv_forward(a):
        return nn.fft_conv_forward(a["x"], a["k"])

    def scaled(of):
        return {n: s for n, s in of.items() if n not in ("t", "deltas", "B")}

    yield (
        "linear",
        {"x": (2, 3, W), "W": (D, W), "b": (D,)},
        lambda a: nn.linear_forward(a["x"], a["W"], a["b"]),
        lambda dy, c: named("xWb", nn.linear_backward(dy, c)),
        lambda t, c: tangents.linear_tangent(t["x"], t["W"], t["b"], c),
        lambda *a: named(["on x", *"xWb"], tangents.linear_backward_tangent(*a)),
    )
    for L, K in ((7, 3), (1, 3), (7, 1)):
        yield (
            f"short conv, {L} positions, {K} taps",
            {"x": (2, L, D), "w": (D, 1, K), "b": (D,)},
            lambda a: nn.short_conv_forward(a["x"], a["w"], a["b"]),
            lambda dy, c: named("xwb", nn.short_conv_backward(dy, c)[:3]),
            lambda t, c: tangents.short_conv_tangent(t["x"], t["w"], t["b"], c),
            lambda *a: named(["on x", *"xwb"], tangents.short_conv_backward_tangent(*a)),
        )
    for L in (7, 1):
        yield (
            f"long conv, {L} positions",
            {"x": (2, L, D), "k": (D, L)},
            conv_forward,
            lambda dy, c: named("xk", nn.fft_conv_backward(dy, c)),
            lambda t, c: tangents.fft_conv_tangent(t["x"], t["k"], c),
            lambda *a: named(["on x", "on k", *"xk"], tangents.fft_conv_backward_tangent(*a)),
        )
    yield (
        "skip",
        {"y": (2, 3, D), "D": (D,), "x": (2, 3, D)},
        lambda a: nn.skip_forward(a["y"], a["D"], a["x"]),
        lambda dy, c: named("Dx", nn.skip_backward(dy, c)[1:]),
        lambda t, c: tangents.skip_tangent(t["y"], t["D"], t["x"], c),
        lambda *a: named(["on x", *"Dx"], tangents.skip_backward_tangent(*a)),
    )
    yield (
        "layer norm",
        {"x": (2, 3, D), "w": (D,), "b": (D,)},
        lambda a: nn.layer_norm_forward(a["x"], a["w"], a["b"]),
        lambda dy, c: named("xwb", nn.layer_norm_backward(dy, c)),
        lambda t, c: tangents.layer_norm_tangent(t["x"], t["w"], t["b"], c),
        lambda *a: named(["on x", *"xwb"], tangents.layer_norm_backward_tangent(*a)),
    )
    for kind in ("sigmoid", "gelu_tanh"):
        yield (
            kind,
            {"x": (2, 3, D)},
            lambda a, kind=kind: getattr(nn, f"{kind}_forward")(a["x"]),
            lambda dy, c, kind=kind: {"x": getattr(nn, f"{kind}_backward")(dy, c)},
            lambda t, c, kind=kind: getattr(tangents, f"{kind}_tangent")(t["x"], c),
            lambda *a, kind=kind: named(
                ("on x", "x"), getattr(tangents, f"{kind}_backward_tangent")(*a)
            ),
        )
    yield (
        "sine",
        {"x": (3, W), "f": (W,)},
        lambda a: hyena_filters.sine_forward(a["x"], a["f"]),
        lambda dy, c: named("xf", hyena_filters.sine_backward(dy, c)),
        lambda t, c: hyena_tangents.sine_tangent(t["x"], t["f"], c),
        lambda *a: named(["on x", *"xf"], hyena_tangents.sine_backward_tangent(*a)),
    )
    rng = np.random.default_rng(0)
    window = {"t": rng.random(9), "deltas": rng.random(2 * D), "B": np.zeros((2, D))}
    yield (
        "implicit filters",
        scaled(hyena_filters.shapes(FILTERS)),
        lambda a: hyena_filters.implicit_forward(a | window, 7, FILTERS),
        hyena_filters.implicit_backward,
        lambda t, c: hyena_tangents.implicit_tangent(t | window, c),
        hyena_tangents.implicit_backward_tangent,
    )
    yield (
        "gated filters",
        hyena_filters.shapes(GATED),
        lambda a: hyena_filters.gated_forward(a, 7),
        hyena_filters.gated_backward,
        hyena_tangents.gated_tangent,
        hyena_tangents.gated_backward_tangent,
    )


@pytest.mark.parametrize("layer", [*layers()], ids=lambda layer: layer[0])
def test_layers_are_their_slopes(plain, layer):
    _, shapes, forward, backward, tangent, backward_tangent = layer
    rng = np.random.default_rng(1)
    arrays, t = ({n: rng.standard_normal(s) for n, s in shapes.items()} for _ in range(2))
    y, cache = forward(arrays)
    dy, tdy = rng.standard_normal(y.shape), rng.standard_normal(y.shape)

    def at(e):
        y, cache = forward({n: x + e * t[n] for n, x in arrays.items()})
        return {"y": y} | backward(dy + e * tdy, cache)

    exact = slopes(at, 1e-4)
    for run in (lambda f, *args: f(*args), plain):
        y, cache = run(forward, arrays)
        ty, tcache = run(tangent, t, cache)
        results = run(backward_tangent, dy, tdy, cache, tcache)
        own = backward(dy, cache)
        for n in [n for n in results if n.startswith("on ")]:
            assert error(results.pop(n), own[n[3:]]) < 1e-14
        assert apart({"y": ty} | results, exact) < 1e-8


# Networks


@of_cases
def test_products_are_the_slopes_of_the_gradients(name):
    """And the tangent of the logits that of the logits"""
    problem, v = Problem(name), Problem(name).direction(1)
    exact = slopes(
        lambda e: problem.gradients(
            {n: p + e * v[n] if n in v else p for n, p in problem.params.items()}
        )
    )
    assert apart(problem.products(v), exact) < 1e-8


@of_cases
def test_second_derivatives_are_symmetric(name):
    """All of H, and a corner off its diagonal"""
    problem = Problem(name)
    u, v = problem.direction(2), problem.direction(3)
    corner = {n: u[n] for n in ("blocks.B", "blocks.W_in")}, {"encoder.weight": v["encoder.weight"]}
    for a, b in ((u, v), corner):
        Ha, Hb = problem.products(a), problem.products(b)
        one, other = (sum((x * H[n]).sum() for n, x in of.items()) for of, H in ((a, Hb), (b, Ha)))
        size = sum(np.abs(x * Hb[n]).sum() for n, x in a.items())
        assert size > 0 and abs(one - other) < 1e-13 * size


@of_cases
def test_products_are_linear_in_the_direction_and_missing_names_are_zeros(name):
    problem = Problem(name)
    u, v = problem.direction(4), problem.direction(5)
    Hu, Hv = problem.products(u), problem.products(v)
    both = problem.products({n: 2 * x - 0.5 * v[n] for n, x in u.items()})
    assert apart(both, {n: 2 * x - 0.5 * Hv[n] for n, x in Hu.items()}) < 1e-12
    pieces = [problem.products({n: x}) for n, x in u.items()]
    assert apart({n: sum(piece[n] for piece in pieces) for n in Hu}, Hu) < 1e-12
    assert all((x == 0).all() for x in problem.products({}).values())


@of_cases
def test_shapes_are_those_of_the_gradients(name):
    problem = Problem(name)
    grads = problem.gradients(problem.params)
    del grads["y"]
    assert tangents.shapes(problem.cfg) == {n: g.shape for n, g in grads.items()}
    assert sorted(problem.trained) == sorted(grads)


def torch_logits(torch, params, x, cfg, rng):
    """The student in PyTorch, with matrices for the long convolutions"""
    functional, layer, (B, L) = torch.nn.functional, cfg.layer, x.shape
    D, K = layer.d_model, layer.short_filter_order
    lag = torch.arange(L)[:, None] - torch.arange(L)

    def dropped(a):
        kept = rng.random((B, L, D), dtype="float32") >= layer.dropout
        return a * torch.tensor(kept) / (1 - layer.dropout)

    z = params["encoder.weight"][torch.tensor(x)] + params["encoder.position"][:L]
    for i in range(cfg.n_layers):
        own = {n.removeprefix("blocks."): p[i] for n, p in params.items() if "blocks." in n}
        a = functional.pad((z @ own["W_in"].T + own["b_in"]).mT, (K - 1, 0))
        a = functional.conv1d(a, own["conv_weight"], own["conv_bias"], groups=a.shape[1]).mT
        *gates, y = a.split(D, dim=2)
        h = own["h"][:, :, :L]
        k = h * (torch.einsum("de,fel->fdl", own["W_g"], h) + own["b_g"][:, None]).sigmoid()
        k = k / (k.abs().sum(dim=2, keepdim=True) + 1e-6)
        for o, gate in enumerate(gates):
            T = torch.where(lag >= 0, k[o][:, lag.clamp(min=0)], 0.0)
            y = y + dropped(gate * (torch.einsum("dts,bsd->btd", T, y) + own["B"][o] * y))
        z = z + dropped(y @ own["W_out"].T + own["b_out"])
    norm = params["final.norm_weight"], params["final.norm_bias"]
    return functional.layer_norm(z, (D,), *norm) @ params["encoder.weight"].T


@needs_torch
@pytest.mark.parametrize("L", [1, 2, 7, 11])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_products_are_pytorchs_double_backward(one_torch_thread, L, dropout):
    """Of cross-entropy and the mean square of the logits"""
    import torch

    problem, rng = Problem("student"), np.random.default_rng(L)
    cfg = replace(problem.cfg, layer=replace(problem.cfg.layer, dropout=dropout))
    x, targets = rng.integers(0, 13, (2, 3, L))
    v, params = problem.direction(6), problem.params
    theirs = {n: torch.tensor(p, requires_grad=True) for n, p in params.items()}
    y = torch_logits(torch, theirs, x, cfg, np.random.default_rng(8))
    flat = y.reshape(-1, 13), torch.tensor(targets.ravel())
    loss = torch.nn.functional.cross_entropy(*flat) + 0.1 * (y * y).mean()
    grads = torch.autograd.grad(loss, list(theirs.values()), create_graph=True)
    along = sum((g * torch.tensor(v[n])).sum() for n, g in zip(theirs, grads, strict=True))
    H = torch.autograd.grad(along, list(theirs.values()))

    ours, cache = network.forward(params, x, cfg, rng=np.random.default_rng(8))
    assert error(ours, y.detach().numpy()) < 1e-13
    _, loss_cache = nn.softmax_cross_entropy_forward(ours, targets)
    p = np.exp(ours) / np.exp(ours).sum(axis=2, keepdims=True)
    dy = nn.softmax_cross_entropy_backward(1.0, loss_cache) + 0.2 / ours.size * ours
    ty, tcache = tangents.forward(v, cache)
    tdy = p * (ty - (p * ty).sum(axis=2, keepdims=True)) / targets.size + 0.2 / ours.size * ty
    products = tangents.backward(dy, tdy, cache, tcache)
    assert apart(products, {n: h.numpy() for n, h in zip(theirs, H, strict=True)}) < 1e-12


# Precision, devices, what is left alone


@of_cases
def test_float32_stays_float32(name):
    narrow, wide = Problem(name, "float32"), Problem(name)
    v = narrow.direction(9)
    del v["blocks.B"]
    ours = narrow.products(v)
    assert all(x.dtype == "float32" for x in ours.values())
    wide.params = {n: p.astype("float64") for n, p in narrow.params.items()}
    wide.x = narrow.x if wide.cfg.tokens else narrow.x.astype("float64")
    wide.r, wide.q = narrow.r.astype("float64"), narrow.q.astype("float64")
    exact = wide.products({n: x.astype("float64") for n, x in v.items()})
    assert apart(ours, exact, floor=1e-2) < 1e-4


@of_cases
def test_on_arrays_of_the_device(plain, name):
    problem, device, v = Problem(name), Problem(name), Problem(name).direction(10)
    del v["blocks.B"]
    for of in ("x", "lengths", "where", "r", "q"):
        if (x := getattr(problem, of)) is not None:
            setattr(device, of, strict.asarray(x))
    device.params = {n: strict.asarray(p) for n, p in problem.params.items()}
    ours = device.products({n: strict.asarray(x) for n, x in v.items()})
    expected = problem.products(v)
    assert all(isinstance(x, strict.Array) for x in ours.values())
    assert apart({n: backend.to_host(x) for n, x in ours.items()}, expected) < 1e-12
    assert apart(plain(problem.products, v), expected) < 1e-12


@of_cases
def test_nothing_is_written_to_and_the_same_call_gives_the_same_bits(name):
    problem, v = Problem(name), Problem(name).direction(11)
    y, cache = problem.forward(problem.params)
    dy = problem.r + problem.q * y
    grads = network.backward(dy, cache)[1]
    first = [tangents.forward(v, cache) for _ in range(2)]
    tdy = problem.q * first[0][0]
    products = [tangents.backward(dy, tdy, cache, tcache) for _, tcache in (first[0], *first)]
    assert (first[0][0] == first[1][0]).all() and (tdy == problem.q * first[0][0]).all()
    assert all((x == p[n]).all() for p in products[1:] for n, x in products[0].items())
    assert all((g == grads[n]).all() for n, g in network.backward(dy, cache)[1].items())
    again = Problem(name)
    assert all((p == again.params[n]).all() for n, p in problem.params.items())
    assert all((x == v[n]).all() for n, x in again.direction(11).items())
    assert (dy == problem.r + problem.q * y).all()


# Bad input


def test_other_models_have_none():
    other = network.Config("tnn", tnn.Config(d_model=4), 1, 9, 9, decoder="lm")
    sentence = "exact second derivatives of hyena and none of tnn: use --hvp differences"
    for f in (tangents.check, tangents.shapes):
        with pytest.raises(Error, match=sentence):
            f(other)
    tangents.check(Problem("student").cfg)


def test_the_student_under_its_own_name():
    problem, v = Problem("student"), Problem("student").direction(13)
    expected = problem.products(v)
    problem.cfg = replace(problem.cfg, model="l2t-hyena")
    tangents.check(problem.cfg)
    assert all((x == expected[n]).all() for n, x in problem.products(v).items())


def test_a_direction_that_does_not_fit_gets_its_sentence():
    problem = Problem("standard")
    _, cache = problem.forward(problem.params)
    v = problem.direction(12)
    wrong = (
        ({"blocks.t": problem.params["blocks.t"]}, "'blocks.t', which is no trained parameter"),
        ({"decoder.weight": v["encoder.weight"]}, "'decoder.weight', which is no trained"),
        ({"blocks.B": v["blocks.B"][0]}, r"blocks.B is float64 of the shape \(1, 5\); expected"),
        ({"blocks.B": v["blocks.B"].astype("float32")}, r"blocks.B is float32 .* expected float64"),
    )
    for more, sentence in wrong:
        with pytest.raises(Error, match=sentence):
            tangents.forward(v | more, cache)
