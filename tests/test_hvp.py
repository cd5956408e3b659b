"""The hypergradient: the definition of a derivative, PyTorch through the unroll, golden case,
identities, precision, bad input.  And the linear student, its loss and the LSTM teacher."""

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import strict
from conftest import error

from ref import (
    Error,
    backend,
    cases,
    gradcheck,
    hvp,
    hyena,
    l2t_hypergrad,
    network,
    nn,
    optim,
)
from ref import l2t as released
from ref import l2t_unrolled as l2t

GOLDEN = Path(__file__).parent / "golden" / "l2t_unrolled_a.safetensors"
F, C, B, K = 6, 5, 7, 4  # features, classes, samples, inner steps
CFG = l2t.Config(K=K, n_classes=C, hidden=3, cells=3, dln_hidden=8, dln_layers=2)
GROUPS = {"top": optim.Group(0.3, 0.1), "rest": optim.Group(0.05)}
OPTIMISERS = {
    "sgd": hvp.Optimiser("sgd", groups=GROUPS),
    "sgd clipped": hvp.Optimiser("sgd", groups=GROUPS, clip=0.01),
    "momentum": hvp.Optimiser("momentum", groups=GROUPS),
    "momentum clipped": hvp.Optimiser("momentum", groups=GROUPS, momentum=0.7, clip=0.01),
    "adamw": hvp.Optimiser("adamw", groups=GROUPS),
    "adamw clipped": hvp.Optimiser("adamw", groups=GROUPS, clip=0.01),
    "adamw, clip not reached": hvp.Optimiser("adamw", groups=GROUPS, clip=100.0),
    "adamw, one rate is 0": hvp.Optimiser(
        "adamw", groups=GROUPS | {"top": optim.Group(0.0, 0.1)}, clip=0.01
    ),
    "adamw frozen": hvp.Optimiser("adamw-frozen", groups=GROUPS, clip=0.01),
}
EXACT = [name for name in OPTIMISERS if name != "adamw frozen"]
needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="torch is not installed (the extra `peers`)"
)


def of_every(names):
    return pytest.mark.parametrize("kind", names)


class Problem:
    """K batches for the linear student in two arrays, its rows `top` and the `rest`"""

    def __init__(self, seed=0, dtype="float64", K=K, warm=False):
        rng = np.random.default_rng(seed)
        sources = l2t.case_sources(replace(CFG, K=K), B, F, rng)
        sources = {n: t.astype(dtype) if t.dtype.kind == "f" else t for n, t in sources.items()}
        self.xs, self.ys, self.xv, self.yv = (sources[f"in.{n}"] for n in ("xs", "ys", "xv", "yv"))
        names, psi = l2t.published_names(CFG)
        self.phi = {own: sources[f"param.{name}"] for own, name in names.items()}
        self.phi["final_mat"] = 30 * self.phi["final_mat"]  # gradients far above rounding
        self.psi = {own: sources[f"param.{name}"] for own, name in psi.items()}
        self.theta = split(sources["in.W0"])
        self.moments, self.step = None, 0
        if warm:  # an optimiser that has taken two steps
            self.step, self.moments = 2, {}
            for name, p in self.theta.items():
                self.moments[f"m.{name}"] = 0.01 * rng.standard_normal(p.shape).astype(dtype)
                self.moments[f"v.{name}"] = (1e-4 * (1 + rng.random(p.shape))).astype(dtype)

    def gradient(self, k, theta, phi=None):
        joined, phi = {"W": join(theta)}, self.phi if phi is None else phi
        return split(l2t.student_gradients(joined, phi, self.xs[k], self.ys[k])[1]["W"])

    def gradients(self, k, theta):
        _, dtheta, dphi = l2t.student_gradients(
            {"W": join(theta)}, self.phi, self.xs[k], self.ys[k]
        )
        return split(dtheta["W"]), dphi

    def products(self, k, theta, v):
        H, mixed = l2t.student_products(
            {"W": join(theta)}, self.phi, self.xs[k], self.ys[k], {"W": join(v)}
        )
        return split(H["W"]), mixed

    def unroll(self, optimiser, theta=None, phi=None, schedule=None):
        moments = self.moments
        if moments is not None:
            used = hvp.moments_init(self.theta, optimiser)
            moments = {name: moments[name] for name in used}
        return hvp.unroll(
            self.theta if theta is None else theta,
            len(self.xs),
            lambda k, theta: self.gradient(k, theta, phi),
            optimiser,
            moments,
            self.step,
            schedule,
        )

    def held_out(self, theta):
        loss, grads = l2t.cross_entropy_gradient({"W": join(theta)}, self.xv, self.yv)
        return loss, split(grads["W"])

    def value(self, optimiser, **given):
        """E"""
        return self.held_out(self.unroll(optimiser, **given)[0])[0]

    def hypergradient(self, optimiser, products=None, schedule=None):
        theta, _, tape = self.unroll(optimiser, schedule=schedule)
        callbacks = hvp.callbacks(products or self.products)
        return hvp.hypergradient(self.held_out(theta)[1], tape, *callbacks, start=True)


def split(W):
    return {"top": W[:2], "rest": W[2:]}


def join(theta):
    return backend.array_module(theta["top"]).concatenate([theta["top"], theta["rest"]])


def relative(ours, theirs):
    """The error of dicts of arrays, each in its own scale"""
    assert ours.keys() == theirs.keys()
    return max(error(x, theirs[name]) for name, x in ours.items())


def slope_error(f, at, grads, seed, step=gradcheck.STEP):
    """Of the gradient of f(dict) along one random direction in all arrays together"""
    flat = np.concatenate([x.ravel() for x in at.values()])

    def of_flat(x):
        ends = np.cumsum([p.size for p in at.values()])[:-1]
        pieces = zip(at.items(), np.split(x, ends), strict=True)
        return f({name: piece.reshape(p.shape) for (name, p), piece in pieces})

    g = np.concatenate([grads[name].ravel() for name in at])
    return gradcheck.directional_error(of_flat, flat, g, np.random.default_rng(seed), step)


# The recursion


def schedule(k):
    return 1 / (1 + k)


@of_every(EXACT)
@pytest.mark.parametrize("warm", [False, True])
def test_hypergradient_is_the_slope_of_the_held_out_loss(kind, warm):
    """Along random directions of φ and of θ_0, by a four-point stencil of E itself"""
    problem, optimiser = Problem(seed=1, warm=warm), OPTIMISERS[kind]
    G, start = problem.hypergradient(optimiser)
    for seed in range(3):
        by_phi = slope_error(
            lambda phi: problem.value(optimiser, phi=phi), problem.phi, G, seed, 1e-5
        )
        by_theta = slope_error(
            lambda theta: problem.value(optimiser, theta=theta), problem.theta, start, seed, 1e-5
        )
        assert max(by_phi, by_theta) < 1e-7


def torch_steps(problem, optimiser, theta, phi, schedule=None):
    """The inner steps in PyTorch, one formula after another, with a graph.   -> θ_K"""
    torch = pytest.importorskip("torch")
    (b1, b2), kind = optim.BETAS, optimiser.kind
    before = problem.moments or {}
    m, s = (
        {n: torch.tensor(before.get(f"{x}.{n}", np.zeros(p.shape))) for n, p in theta.items()}
        for x in "mv"
    )
    for k in range(len(problem.xs)):
        z = torch.tensor(problem.xs[k]) @ torch.cat([theta["top"], theta["rest"]])
        loss = torch_pair_loss(torch, phi, z, problem.ys[k])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        g = dict(zip(theta, grads, strict=True))
        if optimiser.clip is not None:
            norm = torch.cat([x.ravel() for x in grads]).norm()
            c = optimiser.clip / (norm + 1e-6)
            g = {n: x * c if c < 1 else x for n, x in g.items()}
        n, after = problem.step + k + 1, {}
        for name, p in theta.items():
            group = optimiser.groups.get(name, optimiser.group)
            eta = group.lr * (1 if schedule is None else schedule(k))
            if kind == "sgd":
                move = g[name]
            elif kind == "momentum":
                move = m[name] = optimiser.momentum * m[name] + g[name]
            else:
                m[name] = b1 * m[name] + (1 - b1) * g[name]
                of_s = g[name].detach() if kind == "adamw-frozen" else g[name]
                s[name] = b2 * s[name] + (1 - b2) * of_s**2
                moving = s[name] > 0  # the slope of the root at 0 would be NaN
                safe = torch.where(moving, s[name] / (1 - b2**n), 1.0)
                r = torch.where(moving, safe.sqrt(), 0.0)
                move = m[name] / (1 - b1**n) / (r + optim.EPS)
            after[name] = (1 - eta * group.weight_decay) * p - eta * move
        theta = after
    return theta


def torch_pair_loss(torch, phi, z, y):
    """Sample after sample and class after class, the definition"""
    s, layers, rows = z.sigmoid(), list(phi.values()), []
    for b, j in itertools.product(range(len(z)), range(z.shape[1])):
        h = torch.stack([s[b, y[b]], s[b, j], torch.ones(()), torch.zeros(())]).to(z)
        h = h * float(j != y[b])
        for W in layers[:-1]:
            h = torch.nn.functional.leaky_relu(W @ h, 0.01)
        rows.append(layers[-1] @ h)
    return torch.stack(rows).mean()


def torch_hypergradient(problem, optimiser, schedule=None):
    torch = pytest.importorskip("torch")
    theta, phi = (
        {n: torch.tensor(p, requires_grad=True) for n, p in given.items()}
        for given in (problem.theta, problem.phi)
    )
    last = torch_steps(problem, optimiser, theta, phi, schedule)
    z = torch.tensor(problem.xv) @ torch.cat([last["top"], last["rest"]])
    loss = torch.nn.functional.cross_entropy(z, torch.tensor(problem.yv))
    grads = torch.autograd.grad(loss, [*phi.values(), *theta.values()])
    named = dict(zip([*phi, *theta], [g.numpy() for g in grads], strict=True))
    return {n: named[n] for n in phi}, {n: named[n] for n in theta}


@needs_torch
@of_every(OPTIMISERS)
@pytest.mark.parametrize("warm", [False, True])
def test_hypergradient_is_pytorchs(one_torch_thread, kind, warm):
    problem, optimiser = Problem(seed=2, warm=warm), OPTIMISERS[kind]
    ours = problem.hypergradient(optimiser, schedule=schedule)
    theirs = torch_hypergradient(problem, optimiser, schedule)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-12


@needs_torch
@of_every(["adamw", "adamw clipped", "momentum"])
def test_coordinates_that_never_had_a_gradient(one_torch_thread, kind):
    """Where s' = 0: of features that are always 0"""
    problem = Problem(seed=3)
    problem.xs[:, :, [0, 3]] = 0
    ours = problem.hypergradient(OPTIMISERS[kind])
    theirs = torch_hypergradient(problem, OPTIMISERS[kind])
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-12
    moments = problem.unroll(OPTIMISERS["adamw"])[1]
    assert (moments["v.top"][0] == 0).all() and (moments["v.rest"][1] == 0).all()


def test_frozen_preconditioner_takes_the_same_steps_and_is_an_approximation():
    problem, frozen = Problem(), OPTIMISERS["adamw frozen"]
    exact = replace(frozen, kind="adamw")
    assert problem.value(frozen) == problem.value(exact)
    G, _ = problem.hypergradient(frozen)
    assert relative(G, problem.hypergradient(exact)[0]) > 1e-3


def test_one_step_needs_no_hessian_product():
    problem, optimiser = Problem(K=1), OPTIMISERS["sgd"]
    theta, _, tape = problem.unroll(optimiser)
    _, v = problem.held_out(theta)

    def refuse(*args):
        raise AssertionError("a Hessian product")

    G, start = hvp.hypergradient(v, tape, refuse, lambda *args: problem.products(*args)[1])
    a = {name: -GROUPS[name].lr * x for name, x in v.items()}
    assert start is None
    assert relative(G, problem.products(0, problem.theta, a)[1]) < 1e-15
    with pytest.raises(AssertionError, match="Hessian"):
        hvp.hypergradient(v, tape, refuse, lambda *args: problem.products(*args)[1], start=True)


@of_every(["sgd", "momentum clipped", "adamw clipped"])
def test_callbacks_on_their_own_are_those_of_one_computation(kind):
    problem = Problem(seed=11)
    theta, _, tape = problem.unroll(OPTIMISERS[kind])
    apart = (lambda *args: problem.products(*args)[0]), (lambda *args: problem.products(*args)[1])
    ours = hvp.hypergradient(problem.held_out(theta)[1], tape, *apart, start=True)
    for a, b in zip(ours, problem.hypergradient(OPTIMISERS[kind]), strict=True):
        assert all((a[n] == x).all() for n, x in b.items())


def test_products_are_asked_for_once_a_step_at_the_parameters_of_that_step():
    problem, optimiser = Problem(), OPTIMISERS["adamw clipped"]
    seen, asked = [], []

    def gradient(k, theta):
        seen.append(theta)
        return problem.gradient(k, theta)

    def hessian(k, theta, a):
        asked.append((k, theta))
        return problem.products(k, theta, a)[0]

    theta, _, tape = hvp.unroll(problem.theta, K, gradient, optimiser)
    v = problem.held_out(theta)[1]
    hvp.hypergradient(v, tape, hessian, lambda *args: problem.products(*args)[1])
    assert [k for k, _ in asked] == [3, 2, 1]
    for k, at in asked:
        assert all((at[n].tobytes() == seen[k][n].tobytes()) for n in at)
    at, _ = hvp.replay(tape, K)
    assert all((at[n] == theta[n]).all() for n in at)


def test_what_is_kept_is_one_copy_a_step():
    problem = Problem(warm=True)
    for optimiser in OPTIMISERS.values():
        _, _, tape = problem.unroll(optimiser)
        assert tape.theta is problem.theta and len(tape.gradients) == K
        kept = [x for x in tape.moments.values() if x is not problem.moments]
        assert all(any(x is m for m in problem.moments.values()) for x in kept)
        assert sum(g.size for of in tape.gradients for g in of.values()) == K * F * C


def test_inner_steps_of_adamw_are_those_of_training():
    """Bit for bit, frozen groups, clipping and schedule included"""
    problem = Problem(dtype="float32", warm=True)
    for groups in (GROUPS | {"top": optim.Group(0.0, 0.1)}, GROUPS):
        optimiser = hvp.Optimiser("adamw", groups=groups, clip=0.02)
        theta, moments, _ = problem.unroll(optimiser, schedule=schedule)
        trained = {n: p.copy() for n, p in problem.theta.items()}
        state = {n: m.copy() for n, m in problem.moments.items()}
        for k in range(K):
            grads = problem.gradient(k, trained)
            grads = optim.clip(grads, optim.gradient_norm(grads), 0.02)
            optim.adamw_update(trained, grads, state, 3 + k, groups, schedule(k))
        assert all((theta[n] == p).all() for n, p in trained.items())
        assert all((moments[n] == m).all() for n, m in state.items())


def test_parameters_without_a_gradient_stay_and_frozen_ones_only_take_part_in_the_norm():
    problem = Problem(seed=4)
    constant = np.ones(3)
    groups = {"top": optim.Group(0.0), "rest": optim.Group(2.0)}
    for kind in ("adamw", "sgd"):
        optimiser = hvp.Optimiser(kind, groups=groups, clip=0.01)
        theta, _, tape = hvp.unroll(
            problem.theta | {"running": constant}, K, problem.gradient, optimiser
        )
        assert theta["running"] is constant and (theta["top"] == problem.theta["top"]).all()
        v = problem.held_out(theta)[1]
        G, start = hvp.hypergradient(v, tape, *hvp.callbacks(problem.products), start=True)
        assert start.keys() == {"top", "rest"}
        value = lambda phi, of=optimiser: problem.value(of, phi=phi)  # noqa: E731
        assert slope_error(value, problem.phi, G, 0, 1e-5) < 1e-7


@of_every(EXACT)
def test_one_step_against_the_definition(kind):
    """θ' and moments by θ, moments and gradient, whose norm is above 2"""
    rng, optimiser = np.random.default_rng(0), OPTIMISERS[kind]
    if optimiser.clip == 0.01:
        optimiser = replace(optimiser, clip=1.0)
    theta = {"top": rng.standard_normal((2, 3)), "rest": rng.standard_normal(5)}
    moments = hvp.moments_init(theta, optimiser)
    moments = {n: abs(rng.standard_normal(m.shape)) + 0.1 for n, m in moments.items()}
    arrays = {f"theta.{n}": p for n, p in theta.items()} | moments
    arrays |= {f"g.{n}": rng.standard_normal(p.shape) for n, p in theta.items()}

    def pick(arrays, prefix):
        return {n[len(prefix) :]: x for n, x in arrays.items() if n.startswith(prefix)}

    def forward(arrays):
        given = {n: arrays[n] for n in moments}
        of = (pick(arrays, "theta."), given, pick(arrays, "g."))
        moved, after, cache = hvp.step_forward(*of, 3, 0.9, optimiser)
        return np.concatenate([x.ravel() for x in (moved | after).values()]), cache

    def backward(dy, cache):
        ends = np.cumsum([x.size for x in (theta | moments).values()])[:-1]
        shapes = (theta | moments).items()
        pieces = zip(shapes, np.split(dy, ends), strict=True)
        given = {n: piece.reshape(x.shape) for (n, x), piece in pieces}
        later = {n: given[n] for n in moments}
        dtheta, dmoments, dg = hvp.step_backward({n: given[n] for n in theta}, later, cache)
        named = {f"theta.{n}": d for n, d in dtheta.items()} | dmoments
        return named | {f"g.{n}": d for n, d in dg.items()}

    errors = gradcheck.check_pair(forward, backward, arrays)
    assert errors.keys() == arrays.keys() and max(errors.values()) < 1e-8


# Products by central differences


def apart(ours, exact):
    """The largest deviation of a dict of arrays, over the largest of all the exact values"""
    assert ours.keys() == exact.keys()
    scale = max(np.abs(x).max() for x in exact.values())
    return max(np.abs(x - exact[n]).max() for n, x in ours.items()) / scale


def test_central_differences_are_near_the_exact_products():
    """In float64 of the pair loss; in float32 of a smooth one, for the step would cross the kinks
    of leaky ReLU"""
    problem, rng = Problem(seed=5), np.random.default_rng(0)
    for length in (1e-6, 1.0, 1e6):
        v = {n: length * rng.standard_normal(p.shape) for n, p in problem.theta.items()}
        gradients = lambda theta: problem.gradients(1, theta)  # noqa: E731
        ours = hvp.central_differences(gradients, problem.theta, v)
        for a, b in zip(ours, problem.products(1, problem.theta, v), strict=True):
            assert apart(a, b) < 3e-9
    for dtype, allowed in (("float64", 1e-9), ("float32", 1e-3)):
        theta, phi, batches = weighted_case(dtype=dtype)
        for length in (1e-3, 1.0, 1e3):
            v = {"W": (length * rng.standard_normal(theta["W"].shape)).astype(dtype)}
            ours = hvp.central_differences(
                lambda at, phi=phi, of=batches[0]: l2t_hypergrad.linear_gradients(
                    at, phi, of, WEIGHTED
                )[1:],
                theta,
                v,
            )
            exact = l2t_hypergrad.linear_products(theta, phi, batches[0], WEIGHTED, v)
            for a, b in zip(ours, exact, strict=True):
                assert all(x.dtype == dtype for x in (*a.values(), *b.values()))
                assert apart(a, b) < allowed


@of_every(["sgd", "momentum", "adamw clipped"])
def test_hypergradient_by_central_differences(kind):
    problem, optimiser = Problem(seed=6), OPTIMISERS[kind]

    def products(k, theta, a):
        return hvp.central_differences(lambda theta: problem.gradients(k, theta), theta, a)

    ours, exact = (problem.hypergradient(optimiser, of) for of in (products, None))
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b) < 1e-7


def test_central_differences_move_by_a_share_of_the_parameters():
    seen = []

    def gradients(theta):
        seen.append(theta["W"])
        return {"W": theta["W"] ** 2}, {}

    for size, distance in ((3.0, 3e-3), (100.0, 0.1), (0.0, 1e-3)):
        theta = {"W": np.array([size, 0.0]), "constant": np.ones(9)}
        H, _ = hvp.central_differences(gradients, theta, {"W": np.array([3.0, 4.0])}, 1e-3)
        for moved, sign in zip(seen[-2:], (1, -1), strict=True):
            assert error(moved - theta["W"], sign * distance * np.array([0.6, 0.8])) < 1e-10
        assert error(H["W"], 2 * theta["W"] * [3.0, 4.0]) < 1e-10


def test_central_differences_along_nothing_and_at_zero():
    problem = Problem()
    zero = {n: np.zeros_like(p) for n, p in problem.theta.items()}
    gradients = lambda theta: problem.gradients(0, theta)  # noqa: E731
    H, mixed = hvp.central_differences(gradients, problem.theta, zero)
    assert not any(x.any() for x in (*H.values(), *mixed.values()))
    v = {n: np.ones_like(p) for n, p in zero.items()}
    ours = hvp.central_differences(gradients, zero, v)
    exact = problem.products(0, zero, v)
    assert apart(ours[1], exact[1]) < 1e-8
    assert max(np.abs(x).max() for x in ours[0].values()) < 1e-8  # exact: 0, sigmoid has no bend
    assert not any(x.any() for x in exact[0].values())


# The linear student and the pair loss


def pair_case(seed=0, B=B, C=C, dtype="float64"):
    rng = np.random.default_rng(seed)
    phi = l2t.dln_init(replace(CFG, dln_hidden=6, dln_layers=3), rng, dtype)
    return phi, rng.standard_normal((B, C)).astype(dtype), rng.integers(0, C, B), rng


@pytest.mark.parametrize("B, C", [(1, 2), (3, 5), (7, 3), (2, 1)])
def test_pair_loss_and_its_tangent_against_the_definition(B, C):
    phi, z, y, rng = pair_case(1, B, C)

    def forward(arrays):
        given = {n: arrays[n] for n in phi}
        loss, cache = l2t.pair_loss_forward(given, arrays["z"], y)
        return np.asarray(loss), cache

    def backward(dy, cache):
        dz, dphi = l2t.pair_loss_backward(dy, cache)
        return dphi | {"z": dz}

    errors = gradcheck.check_pair(forward, backward, phi | {"z": z})
    assert max(errors.values()) < 1e-8
    loss, cache = l2t.pair_loss_forward(phi, z, y)
    if C == 1:
        assert loss == 0
        return
    dz = rng.standard_normal(z.shape)
    of_z, of_phi = l2t.pair_loss_tangent(dz, cache)
    e, ends = 1e-4, []
    for k in (1, -1, 2, -2):
        moved = l2t.pair_loss_backward(1.0, l2t.pair_loss_forward(phi, z + k * e * dz, y)[1])
        ends.append(moved[1] | {"z": moved[0]})
    for name, tangent in (of_phi | {"z": of_z}).items():
        a, b, c, d = (end[name] for end in ends)
        slope = (8 * (a - b) - (c - d)) / (12 * e)
        scale = max(np.abs(slope).max(), 1e-3 * np.abs(ends[0][name]).max())
        assert np.abs(slope - tangent).max() < 1e-8 * scale


def test_pair_loss_is_its_definition_and_the_true_class_gives_zero():
    phi, z, y, _ = pair_case(2)
    s, total = 1 / (1 + np.exp(-z)), 0.0
    for b, j in itertools.product(range(B), range(C)):
        if j != y[b]:
            h = np.array([s[b, y[b]], s[b, j], 1, 0])
            for W in list(phi.values())[:-1]:
                h = np.maximum(W @ h, 0.01 * (W @ h))
            total += (phi["final_mat"] @ h)[0]
    assert abs(l2t.pair_loss_forward(phi, z, y)[0] - total / (B * C)) < 1e-15


def test_products_are_symmetric_and_linear():
    problem, rng = Problem(seed=7), np.random.default_rng(0)
    u, v = ({n: rng.standard_normal(p.shape) for n, p in problem.theta.items()} for _ in range(2))
    H_u, H_v = (problem.products(0, problem.theta, of)[0] for of in (u, v))
    assert abs(hvp.inner(u, H_v) - hvp.inner(v, H_u)) < 1e-14
    both = {n: 2 * u[n] - v[n] for n in u}
    H = problem.products(0, problem.theta, both)[0]
    assert relative(H, {n: 2 * H_u[n] - H_v[n] for n in u}) < 1e-12


def test_cross_entropy_product_against_central_differences():
    problem, rng = Problem(seed=8), np.random.default_rng(0)
    theta, v = {"W": join(problem.theta)}, {"W": rng.standard_normal((F, C))}
    exact = l2t.cross_entropy_product(theta, problem.xv, problem.yv, v)

    def gradients(theta):
        return l2t.cross_entropy_gradient(theta, problem.xv, problem.yv)[1], {}

    ours, nothing = hvp.central_differences(gradients, theta, v)
    assert relative(ours, exact) < 1e-8 and nothing == {}


def test_the_order_of_the_samples_does_not_matter():
    problem, optimiser = Problem(), OPTIMISERS["momentum clipped"]
    G, _ = problem.hypergradient(optimiser)
    order = np.random.default_rng(0).permutation(B)
    problem.xs, problem.ys = problem.xs[:, order], problem.ys[:, order]
    assert relative(problem.hypergradient(optimiser)[0], G) < 1e-11


# The weighted loss with constant features

WEIGHTED = released.Config(
    gru_size=3,
    dln_layers=2,
    dln_size=4,
    dln_dropout=0.0,
    reg_strength=0.4,
    clamp_low=0.2,
    clamp_high=0.8,
)
D, S, V = 5, 4, 6  # inputs, positions, classes


def weighted_case(seed=0, K=K, dtype="float64"):
    """θ, φ and K batches (x, y, features)"""
    rng = np.random.default_rng(seed)
    theta = {"W": rng.standard_normal((D, V)).astype(dtype)}
    phi = {
        n: (p + 0.3 * np.abs(rng.standard_normal(p.shape))).astype(dtype)
        for n, p in released.dln_init(WEIGHTED, rng, "float64").items()
    }
    phi["norm_bias"] = phi["norm_bias"] - phi["norm_bias"].mean()
    phi[f"b_{WEIGHTED.dln_layers}"] = -phi[f"b_{WEIGHTED.dln_layers}"]
    batches = [
        (
            rng.standard_normal((B, S, D)).astype(dtype),
            rng.integers(0, V, (B, S)),
            rng.standard_normal((B, S, 5)).astype(dtype),
        )
        for _ in range(K)
    ]
    return theta, phi, batches


def weighted_hypergradient(theta, phi, batches, optimiser, cfg=WEIGHTED, start=True):
    """-> E, G, dE/dθ_0;  E: the cross-entropy of the last batch"""

    def gradient(k, theta):
        return l2t_hypergrad.linear_gradients(theta, phi, batches[k], cfg)[1]

    def products(k, theta, v):
        return l2t_hypergrad.linear_products(theta, phi, batches[k], cfg, v)

    theta, _, tape = hvp.unroll(theta, len(batches) - 1, gradient, optimiser)
    x, y, _ = batches[-1]
    E, v = l2t.cross_entropy_gradient(theta, x.reshape(-1, D), y.ravel())
    return E, *hvp.hypergradient(v, tape, *hvp.callbacks(products), start)


@pytest.mark.parametrize("granularity", ["sequence", "batch", "token"])
@pytest.mark.parametrize("regulariser", released.REGULARISERS)
@pytest.mark.parametrize("form", ["convex", "additive"])
def test_tangent_of_the_weighted_loss_against_the_definition(form, regulariser, granularity):
    """Of |θ|² it is the movement of a number beside the logits"""
    own = {"loss_form": form, "regulariser": regulariser, "granularity": granularity}
    rng, cfg = np.random.default_rng(0), replace(WEIGHTED, **own)
    logits, dz = rng.standard_normal((2, B, S, V))
    square, dsquare = (7.0, -3.0) if regulariser == "weights" else (None, 0.0)
    y, e, ends = rng.integers(0, V, (B, S)), 1e-3, []
    w = rng.random((B, S) if granularity == "token" else B)
    _, _, cache = released.student_loss_forward(logits, y, w, cfg, square)
    for k in (1, -1, 2, -2):
        at = None if square is None else square + k * e * dsquare
        _, _, moved = released.student_loss_forward(logits + k * e * dz, y, w, cfg, at)
        ends.append(released.student_loss_backward(1.0, moved)[:2])
    tangents = l2t_hypergrad.student_loss_tangent(dz, cache, dsquare)
    for tangent, (a, b, c, d) in zip(tangents, zip(*ends, strict=True), strict=True):
        assert error(tangent, (8 * (a - b) - (c - d)) / (12 * e)) < 1e-9


VARIANTS = [
    {"regulariser": "logits-sum", "granularity": "token"},
    {"regulariser": "entropy", "granularity": "batch"},
    {"regulariser": "entropy", "granularity": "token", "loss_form": "additive"},
    {"regulariser": "weights"},
    {"regulariser": "weights", "granularity": "token"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_hypergradient_of_the_variants_is_the_slope(settings):
    cfg, (theta, phi, batches) = replace(WEIGHTED, **settings), weighted_case(5, K + 1)
    optimiser = replace(OPTIMISERS["adamw clipped"], group=optim.Group(0.2, 0.1))
    w = [released.dln_forward(phi, F, cfg)[0] for _, _, F in batches[:-1]]
    assert any(((x > 0.2) & (x < 0.8)).any() for x in w)
    _, G, start = weighted_hypergradient(theta, phi, batches, optimiser, cfg)

    def value(theta, phi):
        return weighted_hypergradient(theta, phi, batches, optimiser, cfg)[0]

    for seed in range(3):
        by_phi = slope_error(lambda phi: value(theta, phi), phi, G, seed)
        by_theta = slope_error(lambda theta: value(theta, phi), theta, start, seed)
        assert max(by_phi, by_theta) < 1e-7


@pytest.mark.parametrize("settings", [{}, *VARIANTS], ids=str)
def test_products_of_the_variants_in_float32_and_on_the_device(settings):
    cfg, results = replace(WEIGHTED, **settings), []
    for dtype, put in (("float64", np.copy), ("float32", np.copy), ("float64", strict.array)):
        theta, phi, batches = weighted_case(dtype=dtype)
        v = {"W": np.random.default_rng(0).standard_normal(theta["W"].shape).astype(dtype)}
        theta, phi, v = ({n: put(p) for n, p in of.items()} for of in (theta, phi, v))
        batch = tuple(map(put, batches[0]))
        H, mixed = l2t_hypergrad.linear_products(theta, phi, batch, cfg, v)
        _, W, dphi = l2t_hypergrad.linear_gradients(theta, phi, batch, cfg)
        everything = [H["W"], W["W"], *mixed.values(), *dphi.values()]
        assert all(x.dtype == dtype for x in everything)
        results.append([backend.to_host(x) for x in everything])
    for exact, single, device in zip(*results, strict=True):
        assert error(single, exact) < 1e-3 and error(device, exact) < 1e-11


@of_every(["sgd", "momentum clipped", "adamw clipped"])
def test_hypergradient_of_the_weighted_loss_is_the_slope(kind):
    theta, phi, batches = weighted_case(1, K + 1)
    optimiser = replace(OPTIMISERS[kind], group=optim.Group(0.2, 0.1))
    w = [released.dln_forward(phi, F, WEIGHTED)[0] for _, _, F in batches[:-1]]
    assert any(((x > 0.2) & (x < 0.8)).any() for x in w)
    _, G, start = weighted_hypergradient(theta, phi, batches, optimiser)

    def value(theta, phi):
        return weighted_hypergradient(theta, phi, batches, optimiser)[0]

    for seed in range(3):
        by_phi = slope_error(lambda phi: value(theta, phi), phi, G, seed)
        by_theta = slope_error(lambda theta: value(theta, phi), theta, start, seed)
        assert max(by_phi, by_theta) < 1e-7


@needs_torch
@of_every(["sgd", "momentum clipped"])
def test_hypergradient_of_the_weighted_loss_is_pytorchs(one_torch_thread, kind):
    """By a double backward through recurrence, batch normalisation and MLP"""
    import torch
    from torch.nn import functional

    theta, phi, batches = weighted_case(2, K + 1)
    optimiser = replace(OPTIMISERS[kind], group=optim.Group(0.2, 0.1))
    leaves = {n: torch.tensor(p, requires_grad=True) for n, p in phi.items()}

    def weights(F):
        h = torch.zeros(B, 3, dtype=torch.float64)
        for t in range(S):
            h = torch.gru_cell(F[:, t], h, *(leaves[n] for n in "WUbc"))
        affine = leaves["norm_weight"], leaves["norm_bias"]
        a = h = functional.batch_norm(h, None, None, *affine, training=True)
        for i in range(2):
            a = functional.gelu(a @ leaves[f"W_{i}"].T + leaves[f"b_{i}"])
        r = a @ leaves["W_2"].T + leaves["b_2"] + h @ leaves["W_r"].T + leaves["b_r"]
        return r[:, 0].sigmoid().clamp(0.2, 0.8)

    start = W = torch.tensor(theta["W"], requires_grad=True)
    m = torch.zeros_like(W)
    for x, y, F in batches[:-1]:
        z, w = torch.tensor(x) @ W, weights(torch.tensor(F))
        ce = functional.cross_entropy(z.mT, torch.tensor(y), reduction="none").mean(1)
        loss = ((1 - w) * ce + w * 0.4 * (z**2).mean((1, 2))).mean()
        (g,) = torch.autograd.grad(loss, W, create_graph=True)
        if optimiser.clip:
            assert g.norm() > optimiser.clip
            g = g * (optimiser.clip / (g.norm() + 1e-6))
        m = optimiser.momentum * m + g if optimiser.kind == "momentum" else g
        W = (1 - 0.2 * 0.1) * W - 0.2 * m
    x, y, _ = batches[-1]
    E = functional.cross_entropy((torch.tensor(x) @ W).mT, torch.tensor(y))
    theirs = torch.autograd.grad(E, [*leaves.values(), start])
    ours = weighted_hypergradient(theta, phi, batches, optimiser)
    assert abs(ours[0] - E.item()) < 1e-14
    assert apart(ours[2], {"W": theirs[-1].numpy()}) < 1e-12
    named = {n: g.numpy() for n, g in zip(leaves, theirs, strict=False)}
    assert apart(ours[1], named) < 1e-12


def test_a_constant_weight_is_a_static_penalty():
    """w at its bound: G = 0, and E, dE/dθ_0 are those of CE + λ R at λ = w λ₀ / (1 - w) and the
    rates times 1 - w"""
    theta, phi, batches = weighted_case(3)
    phi["b_2"] = phi["b_2"] + 50
    E, G, start = weighted_hypergradient(theta, phi, batches, hvp.Optimiser())
    assert not any(g.any() for g in G.values())
    form = {"loss_form": "additive", "reg_strength": 0.8 * 0.4 / 0.2}
    static = replace(WEIGHTED, **form, clamp_low=0.0, clamp_high=1.0)
    slower = hvp.Optimiser(group=optim.Group(0.1 * 0.2))
    other = weighted_hypergradient(theta, phi, batches, slower, static)
    assert abs(E - other[0]) < 1e-14 and apart(start, other[2]) < 1e-12


# A whole network as the student


@of_every(["momentum clipped", "adamw clipped"])
def test_hypergradient_of_the_published_student(kind):
    """Two layers of l2t-hyena with dropout and 3 steps; products by central differences, the
    features constant"""
    layer = hyena.Config(
        d_model=4, l_max=S, filter="gated", block="bare", recurrence="residual", dropout=0.2
    )
    outer = {"decoder": "lm", "tied": True, "final_norm": True, "positions": S}
    student, rng = network.Config("hyena", layer, 2, V, V, **outer), np.random.default_rng(0)
    start = network.init(student, rng, "float64")
    start = {n: p + 0.2 * rng.standard_normal(p.shape) for n, p in start.items()}
    _, phi, batches = weighted_case(4, 4)
    tokens = rng.integers(0, V, (4, B, S))
    optimiser = replace(OPTIMISERS[kind], group=optim.Group(0.02, 0.1), clip=0.2)

    def gradients(k, theta, phi):
        x, (_, y, features), mask = tokens[k], batches[k], np.random.default_rng(k)
        w, weights = released.dln_forward(phi, features, WEIGHTED)
        logits, cache = network.forward(theta, x, student, None, mask)
        _, _, loss = released.student_loss_forward(logits, y, w, WEIGHTED)
        dlogits, dw, _ = released.student_loss_backward(1.0, loss)
        return network.backward(dlogits, cache)[1], released.dln_backward(dw, weights)[1]

    def held_out(theta):
        logits, cache = network.forward(theta, tokens[3], student)
        loss, of = nn.softmax_cross_entropy_forward(logits, batches[3][1])
        return loss, network.backward(nn.softmax_cross_entropy_backward(1.0, of), cache)[1]

    def unroll(theta, phi):
        return hvp.unroll(theta, 3, lambda k, theta: gradients(k, theta, phi)[0], optimiser)

    def products(k, theta, a):
        return hvp.central_differences(lambda theta: gradients(k, theta, phi), theta, a)

    theta, _, tape = unroll(start, phi)
    assert all(optim.gradient_norm(g) > 0.2 for g in tape.gradients)
    callbacks = hvp.callbacks(products)
    G, dstart = hvp.hypergradient(held_out(theta)[1], tape, *callbacks, start=True)
    for seed in range(3):
        by_phi = slope_error(lambda phi: held_out(unroll(start, phi)[0])[0], phi, G, seed, 1e-5)
        assert by_phi < 1e-7
    value = lambda theta: held_out(unroll(theta, phi)[0])[0]  # noqa: E731
    assert slope_error(value, start, dstart, 0, 1e-5) < 1e-7  # no kink of the L1 norm in 1e-5


# The teacher


of_teachers = pytest.mark.parametrize(
    ("head", "p"), [("cell", 10.0), ("linear", 10.0), ("linear", 5.0)]
)


def teacher_case(seed=0, P=11, dtype="float64", head="cell"):
    rng = np.random.default_rng(seed)
    psi = l2t.teacher_init(replace(CFG, head=head), rng, dtype)
    g = (rng.standard_normal(P) * np.logspace(-8, 1, P)).astype(dtype)
    state = l2t.teacher_state(psi, P)
    state = [0.5 * rng.standard_normal(s.shape).astype(dtype) for s in state]
    return psi, g, state, rng


@pytest.mark.parametrize("p", [10.0, 5.0, 0.5, l2t.MOST_P])
def test_preprocessing(p):
    edge = np.exp(-p)
    g = np.array([0.0, 1.0, -1.0, edge * 1.0001, -edge * 0.9999, edge, 1e-18, -30.0])
    q = l2t.preprocess(g, p)
    assert p != 10 or (q == l2t.preprocess(g)).all()
    assert q.shape == (8, 2)
    large = abs(g) >= edge
    assert (large == [False, True, True, True, False, True, False, True]).all()
    assert error(q[large, 0], np.log(abs(g[large]) + 1e-8) / p) < 1e-15
    assert (q[large, 1] == np.sign(g[large])).all() and (q[~large, 0] == -1).all()
    assert error(q[~large, 1], g[~large] / edge) < 1e-15
    narrow = l2t.preprocess(g.astype("float32"), p)
    assert narrow.dtype == "float32" and np.isfinite(narrow).all()


def test_a_linear_head_is_what_is_drawn_last():
    """All cells are of one width; PyTorch's bounds, of cells and head alike"""
    cfg = l2t.Config(hidden=16, cells=2, head="linear")
    psi = l2t.teacher_init(cfg, np.random.default_rng(0))
    cells = {n: p.shape for n, p in psi.items() if n[0] in "01"}
    wide = {f"{i}.{n}": (64, *rest) for i in "01" for n, *rest in (("U", 16), ("b",), ("c",))}
    assert cells == wide | {"0.W": (64, 2), "1.W": (64, 16)}
    assert {n: psi[n].shape for n in psi.keys() - cells} == {"head.W": (1, 16), "head.b": (1,)}
    assert all(p.dtype == "float32" and abs(p).max() <= 0.25 for p in psi.values())
    assert abs(psi["head.W"]).max() > 0.15
    drawn = [l2t.teacher_init(cfg, np.random.default_rng(i))["head.b"] for i in range(30)]
    assert 0.2 < abs(np.array(drawn)).max() <= 0.25
    assert [s.shape for s in l2t.teacher_state(psi, 5)] == [(2, 5, 16)] * 2
    one = l2t.teacher_init(replace(cfg, head="cell"), np.random.default_rng(0))
    assert all((one[n] == psi[n]).all() for n in ("0.W", "0.U", "0.b", "0.c"))


@of_teachers
def test_teacher_over_two_rounds_against_the_definition(head, p):
    """From states that are not zero; the first round's gradient through the states as well"""
    psi, g, state, rng = teacher_case(head=head)
    later = rng.standard_normal(len(g))

    def forward(arrays):
        given = {n: arrays[n] for n in psi}
        before = [arrays[f"state.{i}"] for i in range(len(state))]
        u1, between, first = l2t.teacher_forward(given, g, before, p)
        u2, after, second = l2t.teacher_forward(given, later, between, p)
        return np.concatenate([u1, u2, *(s.ravel() for s in after)]), (first, second)

    def backward(dy, caches):
        P = len(g)
        ends = np.cumsum([s.size for s in state])[:-1]
        pieces = np.split(dy[2 * P :], ends)
        dstate = [d.reshape(s.shape) for d, s in zip(pieces, state, strict=True)]
        grads, dstate = l2t.teacher_backward(dy[P : 2 * P], dstate, caches[1])
        more, dstate = l2t.teacher_backward(dy[:P], dstate, caches[0])
        grads = {n: d + more[n] for n, d in grads.items()}
        return grads | {f"state.{i}": d for i, d in enumerate(dstate)}

    arrays = psi | {f"state.{i}": s for i, s in enumerate(state)}
    assert max(gradcheck.check_pair(forward, backward, arrays).values()) < 1e-8


@needs_torch
@of_teachers
def test_teacher_is_pytorchs_cells(one_torch_thread, head, p):
    import torch

    psi, g, state, _ = teacher_case(head=head)
    u, after, _ = l2t.teacher_forward(psi, g, state, p)
    x = torch.tensor(l2t.preprocess(g, p))
    for i, s in enumerate(state):
        W, U, b, c = (torch.tensor(psi[f"{i}.{n}"]) for n in "WUbc")
        h, cell = torch.tensor(s)
        x, cell = torch.lstm_cell(x, (h, cell), W, U, b, c)
        assert error(after[i], torch.stack([x, cell]).numpy()) < 1e-14
    if head == "linear":
        x = torch.nn.functional.linear(x, *(torch.tensor(psi[f"head.{n}"]) for n in "Wb"))
    assert error(u, x[:, 0].numpy()) < 1e-14
    assert head == "linear" or (abs(u) < 1).all()


@pytest.mark.parametrize("head", l2t.HEADS)
def test_coordinates_are_on_their_own(head):
    psi, g, state, rng = teacher_case(head=head)
    u, after, _ = l2t.teacher_forward(psi, g, state)
    order = rng.permutation(len(g))[:5]
    u5, after5, _ = l2t.teacher_forward(psi, g[order], [s[:, order] for s in state])
    assert error(u5, u[order]) < 1e-14
    assert all(error(a, b[:, order]) < 1e-14 for a, b in zip(after5, after, strict=True))


def test_flatten_and_back():
    phi, *_ = pair_case()
    flat = l2t.flatten(phi)
    rows = np.concatenate([row for W in phi.values() for row in W])
    assert (flat == rows).all()
    assert all((x == 0).all() for x in l2t.moved(phi, flat, 1.0).values())


# A round


def of_head(problem, head):
    """The problem's ψ, or one with a linear head"""
    if head == "cell":
        return problem.psi
    dtype = problem.psi["0.W"].dtype
    rng = np.random.default_rng(4)  # E jumps at the kinks of (4): none is within the stencils
    return l2t.teacher_init(replace(CFG, head=head), rng, dtype)


@needs_torch
@of_teachers
def test_teachers_gradient_is_pytorchs(one_torch_thread, head, p):
    """Through the unroll and the cells; what the teacher is fed is a constant"""
    import torch

    problem, optimiser = Problem(seed=10, K=3), hvp.Optimiser("sgd", optim.Group(0.3))
    own = of_head(problem, head)
    done = run_round(problem, own, p=p)
    psi = {n: torch.tensor(x, requires_grad=True) for n, x in own.items()}
    G = torch_hypergradient(problem, optimiser)[0]
    u = torch.tensor(l2t.preprocess(l2t.flatten(G), p))
    for i in range(CFG.cells):
        W, U, b, c = (psi[f"{i}.{n}"] for n in "WUbc")
        h = torch.full((len(u), U.shape[1]), 0.1, dtype=torch.float64)
        u, _ = torch.lstm_cell(u, (h, h), W, U, b, c)
    if head == "linear":
        u = torch.nn.functional.linear(u, psi["head.W"], psi["head.b"])
    phi, at = {}, 0
    for name, x in problem.phi.items():
        phi[name] = torch.tensor(x) - 0.5 * u[at : at + x.size, 0].reshape(x.shape)
        at += x.size
    theta = {n: torch.tensor(p, requires_grad=True) for n, p in problem.theta.items()}
    last = torch_steps(problem, optimiser, theta, phi)
    z = torch.tensor(problem.xv) @ torch.cat([last["top"], last["rest"]])
    loss = torch.nn.functional.cross_entropy(z, torch.tensor(problem.yv))
    theirs = dict(zip(psi, torch.autograd.grad(loss, list(psi.values())), strict=True))
    assert abs(done.second[0] - loss.item()) < 1e-14
    assert relative(done.grads, {n: g.numpy() for n, g in theirs.items()}) < 1e-12


def run_round(problem, psi=None, scale=0.5, phi=None, kind="sgd", teacher=None, p=10.0):
    """A round; `scale` large, for u to matter"""
    psi = problem.psi if psi is None else psi
    theta, optimiser = {"W": join(problem.theta)}, hvp.Optimiser(kind, optim.Group(0.3))
    batches, held_out = (problem.xs, problem.ys), (problem.xv, problem.yv)

    def roll_out(phi):
        return l2t.episode(phi, theta, batches, held_out, optimiser)

    size = sum(x.size for x in problem.phi.values())
    state = [s + 0.1 for s in l2t.teacher_state(psi, size)]
    return l2t.teach(problem.phi, roll_out, teacher or l2t.lstm_teacher(psi, state, p), scale)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@of_teachers
def test_teachers_gradient_is_the_slope_of_the_second_held_out_loss(kind, head, p):
    problem = Problem(seed=9)
    own = of_head(problem, head)
    done = run_round(problem, own, kind=kind, p=p)

    def after(psi):
        return run_round(problem, psi, kind=kind, p=p).second[0]

    for seed in range(3):
        assert slope_error(after, own, done.grads, seed, 1e-5) < 1e-8
    assert done.grads.keys() == own.keys()
    for name in own:
        assert done.grads[name].shape == own[name].shape


def test_identity_teacher_is_plain_sgd_on_the_loss():
    problem = Problem()
    done = run_round(problem, scale=0.2, teacher=l2t.identity_teacher)
    for name, p in problem.phi.items():
        assert (done.phi[name] == p - 0.2 * done.first[1][name]).all()
    assert done.grads == {} and done.state is None
    small = run_round(problem, scale=1e-5, teacher=l2t.identity_teacher)
    fall = small.first[0] - small.second[0]
    G = l2t.flatten(small.first[1])
    assert abs(fall - 1e-5 * (G @ G)) < 1e-3 * fall


def test_a_round_of_scale_zero_changes_nothing():
    done = run_round(Problem(), scale=0.0)
    assert done.first[0] == done.second[0]
    assert all((done.phi[n] == p).all() for n, p in Problem().phi.items())


# Precision, memory layouts, devices


@of_every(OPTIMISERS)
def test_float32_stays_float32(kind):
    for warm in (False, True):
        results, wide = (
            Problem(dtype=dtype, warm=warm).hypergradient(OPTIMISERS[kind])
            for dtype in ("float32", "float64")
        )
        for ours, exact in zip(results, wide, strict=True):
            assert all(x.dtype == "float32" for x in ours.values())
            assert relative(ours, exact) < 2e-2
    for head in l2t.HEADS:
        narrow = Problem(dtype="float32")
        done = run_round(narrow, of_head(narrow, head), kind="adamw", p=5.0)
        arrays = [done.u, *done.phi.values(), *done.grads.values(), *done.state]
        assert all(x.dtype == "float32" for x in arrays)
        assert done.second[0].dtype == "float32"


@pytest.mark.parametrize("layout", ["fortran", "strided", "read-only"])
def test_layouts_of_memory(layout):
    def laid(x):
        if layout == "fortran":
            return np.asfortranarray(x)
        if layout == "strided":
            return np.repeat(x, 2, axis=-1)[..., ::2]
        x = x.copy()
        x.setflags(write=False)
        return x

    problem, other = Problem(warm=True), Problem(warm=True)
    for name in ("theta", "phi", "psi", "moments"):
        setattr(other, name, {n: laid(x) for n, x in getattr(problem, name).items()})
    for name in ("xs", "ys", "xv", "yv"):
        setattr(other, name, laid(getattr(problem, name)))
    for kind in EXACT:
        ours, expected = (p.hypergradient(OPTIMISERS[kind]) for p in (other, problem))
        for a, b in zip(ours, expected, strict=True):
            assert relative(a, b) < 1e-11
    ours, expected = (run_round(p).grads for p in (other, problem))
    assert relative(ours, expected) < 1e-11


def test_nothing_is_written_to_and_the_same_call_gives_the_same_bits():
    problem, before = Problem(warm=True), Problem(warm=True)
    first = problem.hypergradient(OPTIMISERS["adamw clipped"])
    again = problem.hypergradient(OPTIMISERS["adamw clipped"])
    assert all((a[n] == b[n]).all() for a, b in zip(first, again, strict=True) for n in a)
    for name in ("theta", "phi", "psi", "moments"):
        pairs = zip(getattr(problem, name).values(), getattr(before, name).values(), strict=True)
        assert all((a == b).all() for a, b in pairs)


@of_every(OPTIMISERS)
def test_on_arrays_of_the_device(plain, kind):
    problem, device = Problem(warm=True), Problem(warm=True)
    for name in ("theta", "phi", "psi", "moments"):
        there = {n: strict.asarray(x) for n, x in getattr(problem, name).items()}
        setattr(device, name, there)
    for name in ("xs", "ys", "xv", "yv"):
        setattr(device, name, strict.asarray(getattr(problem, name)))
    ours, expected = (p.hypergradient(OPTIMISERS[kind]) for p in (device, problem))
    for a, b in zip(ours, expected, strict=True):
        assert all(isinstance(x, strict.Array) for x in a.values())
        assert relative({n: backend.to_host(x) for n, x in a.items()}, b) < 1e-12
    v = device.held_out(device.theta)[1]
    H, _ = hvp.central_differences(lambda at: device.gradients(0, at), device.theta, v)
    assert all(isinstance(x, strict.Array) for x in H.values())
    for head in l2t.HEADS:
        psi = of_head(problem, head)
        copied = {n: strict.asarray(x) for n, x in psi.items()}
        done, there = run_round(problem, psi), run_round(device, copied)
        assert all(isinstance(x, strict.Array) for x in there.grads.values())
        grads = {n: backend.to_host(x) for n, x in there.grads.items()}
        assert relative(grads, done.grads) < 1e-11


# Bad input


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_there_is_at_least_one_step(steps):
    problem = Problem()
    with pytest.raises(Error, match=rf"K={steps}: the student takes at least 1 step"):
        hvp.unroll(problem.theta, steps, problem.gradient, hvp.Optimiser())


def test_other_bad_input_gets_its_sentence():
    problem = Problem()
    with pytest.raises(Error, match="inner optimiser='adam' is not known"):
        hvp.Optimiser("adam")
    with pytest.raises(Error, match=r"clip=0\.0: expected a positive norm"):
        hvp.Optimiser(clip=0.0)
    with pytest.raises(Error, match="momentum=1"):
        hvp.Optimiser("momentum", momentum=1)
    with pytest.raises(Error, match="inner step 0 is empty"):
        hvp.unroll(problem.theta, 1, lambda k, theta: {}, hvp.Optimiser())
    _, _, tape = problem.unroll(hvp.Optimiser())
    with pytest.raises(Error, match="both have 'W'; expected the same names"):
        hvp.hypergradient({"W": join(problem.theta)}, tape, None, None)
    with pytest.raises(Error, match="label 5 is outside the 5 classes"):
        l2t.pair_loss_forward(problem.phi, np.zeros((2, 5)), np.array([0, 5]))
    for settings, sentence in (
        ({"K": 0}, "K=0: the student takes at least 1 step"),
        ({"hidden": 0}, "at least 1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"update_scale": np.inf}, "update_scale=inf"),
        ({"head": "tail"}, "head='tail' is not known; expected one of: cell, linear"),
        *(({"p": p}, f"^p={p}: expected more than 0 and at most 40") for p in (0, -1.0, np.nan)),
        ({"p": 40.5}, r"p=40\.5: expected"),
    ):
        with pytest.raises(Error, match=sentence):
            l2t.Config(**settings)


# Cases


def test_golden_case(plain):
    case = cases.read_case(GOLDEN)
    for rows in (cases.verify(case), plain(cases.verify, case)):
        assert len(rows) == 32 and all(row.ok and row.error < 1e-12 for row in rows)
    other = replace(case, settings=case.settings | {"p": 5.0})
    assert {"out.update", "out.val_loss_after"} <= {
        r.tensor for r in cases.verify(other) if not r.ok
    }


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_our_own_cases(precision):
    settings = {"K": 2, "n_classes": 3, "hidden": 5, "cells": 2, "dln_layers": 1, "dln_hidden": 7}
    for more in ({}, {"lr": 2.0, "update_scale": 0.1}, {"cells": 1}, {"p": 5.0}):
        case = cases.make_case("l2t", "unrolled", settings | more, 4, 6, precision)
        assert all(row.ok for row in cases.verify(case))
        off = {
            n: -t if n == "grad.param.lstm.recurs.weight_ih" else t for n, t in case.tensors.items()
        }
        rows = cases.verify(replace(case, tensors=off))
        assert [row.tensor for row in rows if not row.ok] == ["grad.param.lstm.recurs.weight_ih"]


def test_bad_cases_get_their_sentence():
    case = cases.read_case(GOLDEN)
    wrong = (
        ({"in.xs": case.tensors["in.xs"][:2]}, {}, "K=3, but in.xs has 2"),
        ({"in.xs": case.tensors["in.xs"][:0]}, {"K": 0}, "K=0: the student takes at least 1"),
        ({"in.ys": case.tensors["in.ys"][:2]}, {}, r"in\.xs has the shape"),
        ({"in.ys": case.tensors["in.ys"] + 4}, {}, "outside the 5 classes"),
        ({"in.yv": case.tensors["in.yv"] + 4}, {}, "outside the 5 classes"),
        ({"in.xv": case.tensors["in.xv"][:, :2]}, {}, r"in\.xv has the shape \(7, 2\)"),
        ({}, {"n_classes": 4}, "n_classes=4, but in.W0 has 5"),
        ({}, {"hidden": 4}, "hidden=4, but"),
        ({}, {"gru_size": 4}, "the setting 'gru_size' is not one of l2t's"),
        ({}, {"head": "linear"}, "head='linear': cases have the published head"),
        ({}, {"p": 0.0}, r"p=0\.0: expected more than 0"),
        ({"param.lstm.recurs.bias_hh": np.zeros(3)}, {}, "bias_hh has the shape"),
    )
    for tensors, settings, sentence in wrong:
        bad = replace(case, tensors=case.tensors | tensors, settings=case.settings | settings)
        with pytest.raises(Error, match=sentence):
            cases.verify(bad)


def test_missing_tensors_get_their_sentence():
    case = cases.read_case(GOLDEN)
    for name in [n for n in case.tensors if n.startswith(cases.SOURCES)]:
        rest = replace(case, tensors={n: t for n, t in case.tensors.items() if n != name})
        if name == "param.dln.layers.mat_3.weight":  # what is left is a network, another one
            assert not all(row.ok for row in cases.verify(rest))
            continue
        with pytest.raises(Error, match=r"(is missing|is nothing that l2t's unrolled takes)\.$"):
            cases.verify(rest)


def test_cases_from_the_command_line(ref, monkeypatch, tmp_path):
    path, of_case = tmp_path / "case.safetensors", ("case", "--model", "l2t", "--part", "unrolled")
    monkeypatch.setattr("sys.argv", ["ref", *of_case])  # which options there are depends on it
    sizes = ("--K", 2, "--n-classes", 3, "--hidden", 2, "--dln-hidden", 4, "-B", 3, "-L", 4)
    ref(*of_case, *sizes, "-o", path)
    case = cases.read_case(path)
    assert case.tensors["in.xs"].shape == (2, 3, 4) and case.tensors["in.W0"].shape == (4, 3)
    assert "32 of 32 tensors agree" in ref("verify", path)[0]
    assert "K=0: the student" in ref(*of_case, "--K", 0, "-o", path, expect=2)[1]
    assert "'gru_size' is not one of" in ref(*of_case, "--gru-size", 3, "-o", path, expect=1)[1]
