"""The optimiser, against its definition and against PyTorch's."""

import math

import numpy as np
import pytest
from conftest import error

from ref import optim


def trajectory(dtype, steps=20):
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((3, 5)).astype(dtype),
        "b": rng.standard_normal(7).astype(dtype),
    }
    params["frozen"] = rng.standard_normal(2).astype(dtype)
    groups = {"a": optim.Group(0.1, 0.3), "b": optim.Group(0.02), "frozen": optim.Group(0.0, 0.5)}
    moments = optim.adamw_init({n: params[n] for n in "ab"})
    start = {n: p.copy() for n, p in params.items()}
    grads = [
        {n: rng.standard_normal(p.shape).astype(dtype) for n, p in params.items()}
        for _ in range(steps)
    ]
    for i, g in enumerate(grads, 1):
        optim.adamw_update(params, g, moments, i, groups, scale=1 / i)
    return start, grads, params


def test_twin_is_the_readable_form(plain):
    for dtype, allowed in (("float64", 1e-14), ("float32", 2e-6)):
        (_, _, a), (_, _, b) = trajectory(dtype), plain(trajectory, dtype)
        assert all(error(a[n], b[n]) < allowed and a[n].dtype == dtype for n in a)


def test_the_norm_of_gradients_of_any_size_and_layout():
    rng = np.random.default_rng(0)
    large = rng.standard_normal((1100, 1000)).astype("float32")
    grads = {"large": large, "odd": large[:7, ::2].T, "one": np.float32([[3]])}
    exact = math.sqrt(sum((g.astype("longdouble") ** 2).sum() for g in grads.values()))
    assert optim.gradient_norm(grads) == pytest.approx(exact, rel=1e-14)


def test_any_memory_layout_is_updated_in_place():
    rng = np.random.default_rng(0)
    straight, g = rng.standard_normal((2, 5, 7))
    for odd in (np.asfortranarray(straight), np.repeat(straight, 2, axis=1)[:, ::2]):
        results = []
        for p in (straight.copy(), odd):
            params, groups = {"p": p}, {"p": optim.Group(0.1, 0.3)}
            moments = optim.adamw_init(params)
            for i in (1, 2):
                optim.adamw_update(params, {"p": g}, moments, i, groups)
            assert params["p"] is p
            results.append(p)
        assert error(results[1], results[0]) < 1e-14


def test_as_pytorch_does_it():
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    start, grads, params = trajectory("float64")
    ours = {n: torch.tensor(p, requires_grad=True) for n, p in start.items() if n != "frozen"}
    theirs = torch.optim.AdamW(
        [
            {"params": [ours["a"]], "lr": 0.1, "weight_decay": 0.3},
            {"params": [ours["b"]], "lr": 0.02, "weight_decay": 0.0},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda i: 1 / (i + 1))
    for g in grads:
        for n, p in ours.items():
            p.grad = torch.tensor(g[n])
        theirs.step()
        schedule.step()
    assert all(error(params[n], p.detach().numpy()) < 1e-13 for n, p in ours.items())
    assert (params["frozen"] == start["frozen"]).all()


def test_schedule():
    at = [optim.warmup_cosine(i, 100, 10) for i in range(1, 101)]
    assert at[0] == 0.1 and at[9] == 1.0 and at[99] == 0.0
    assert at[54] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(at[9:], at[10:], strict=False))
    assert optim.warmup_cosine(101, 100, 10) == 0.0
    assert optim.warmup_cosine(5, 5, 5) == 1.0  # a run shorter than its warm-up


def test_clipping():
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    norm = optim.gradient_norm(grads)
    assert norm == 5.0
    assert optim.clip(grads, norm, 10.0) is grads
    clipped = optim.clip(grads, norm, 1.0)
    assert math.isclose(optim.gradient_norm(clipped), 1.0, rel_tol=1e-6)
    assert clipped["a"].dtype == np.float64 and grads["a"][0] == 3.0
    large = {"a": np.full(10, 1e30, "float32")}
    assert np.isfinite(optim.gradient_norm(large))
