"""The Numba side: elementary functions, any thread count, several Python threads, no compiler at
all, REF_PLAIN."""

import os
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
from conftest import error
from scipy import special

from ref import backend, etsc, hope, hyena, longhorn, mamba, nn, s4, s4d, tnn, transformer
from ref.kernels import numeric

COMPILED = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="NUMBA_DISABLE_JIT is set")


@numba.njit
def _exp(x, y):
    for i in range(len(x)):
        y[i] = numeric.exp(x[i])


@numba.njit
def _normal_cdf(x, y):
    for i in range(len(x)):
        y[i] = numeric.normal_cdf(x[i], numeric.exp(x.dtype.type(-0.5) * x[i] * x[i]))


@COMPILED
def test_elementary_functions():
    for f, exact, bounds in ((_exp, np.exp, (-87, 88)), (_normal_cdf, special.ndtr, (-4, 12))):
        for dtype, allowed in (("float32", 6e-7), ("float64", 1e-14)):
            x = np.linspace(*bounds, 400_001).astype(dtype)
            y = np.empty_like(x)
            f(x, y)
            truth = exact(x.astype("float64"))
            assert np.abs(y / truth - 1).max() < allowed, (f.__name__, dtype)
    edge = np.array([-np.inf, -1e4, -104, 0, 88.5, 100, 1e4, np.inf, np.nan], "float32")
    y = np.empty_like(edge)
    _exp(edge, y)
    with np.errstate(over="ignore"):
        expected = np.exp(edge)
    assert (y[:3] == 0).all() and y[3] == 1 and np.isinf(y[5:8]).all() and np.isnan(y[8])
    assert abs(y[4] / expected[4] - 1) < 1e-6


def everything(dtype="float32"):
    """Results of every twin that runs in parallel"""
    rng = np.random.default_rng(0)
    results = []
    for model, settings in (
        (hope, dict(d_state=20, bidirectional=True, norm="batch")),
        (hope, dict(d_state=20, conv="causal")),
        (s4, dict(d_state=20, bidirectional=True, norm="batch", l_max=301)),
        (s4d, dict(d_state=20, bidirectional=True, norm="batch")),
        (hyena, dict(l_max=310, filter_order=13)),
        (hyena, dict(l_max=310, filter="gated", recurrence="residual", block="bare")),
        (tnn, dict(use_multi_decay=True)),
        (transformer, dict(n_heads=1)),
        (mamba, dict(d_state=13)),
        (longhorn, dict(d_state=13)),
    ):
        cfg = model.Config(d_model=37, **settings)
        params = model.block_init(cfg, rng, dtype)
        x, dy = rng.standard_normal((2, 3, 301, 37)).astype(dtype)
        y, cache = model.block_forward(params, x, cfg, np.random.default_rng(1))
        dx, grads = model.block_backward(dy, cache)
        results += [y, dx, *grads.values(), *model.running_statistics(params, cache).values()]
    return results


@COMPILED
def test_results_do_not_depend_on_the_number_of_threads():
    before = numba.get_num_threads()
    if before < 2:
        pytest.skip("one core: nothing to compare")
    try:
        runs = []
        for n in (1, 2):
            backend.set_threads(n)
            runs.append(everything())
    finally:
        backend.set_threads(before)
    for a, b in zip(*runs, strict=True):
        if a.ndim == 3:  # the BLAS's own threads may change the last bit of a product
            assert error(a, b) < 1e-5
    rng = np.random.default_rng(0)
    h, log_dt = rng.standard_normal((33, 20)), rng.uniform(-5, 1, 33)
    x = rng.standard_normal((5, 99, 33)).astype("float32")
    v = rng.standard_normal((2, 33, 5)) + 1j
    a = -0.1 + 0.1j * rng.standard_normal((33, 5))
    B, C = rng.standard_normal((2, 5, 99, 7)).astype("float32")
    A, delta = -np.exp(rng.standard_normal((33, 7))).astype("float32"), np.abs(x)
    twins = []
    for n in (1, 2):
        backend.set_threads(n)
        scan, state, scanned = mamba.recurrence_forward(x, delta, A, B, C, x[0, 0])
        recall, learned, recalled = longhorn.recurrence_forward(x, delta, B, C, x[0, 0])
        g, cache = hope.sample_forward(h, log_dt, 200, 101)
        k, ladder = hope.ladder_forward(h, log_dt, 200)
        norm = nn.batch_norm_forward(x, x[0, 0], x[0, 1], None, None, True)
        gelu, gelu_cache = nn.gelu_forward(x)
        loss, entropy = nn.softmax_cross_entropy_forward(x, np.arange(5 * 99).reshape(5, 99) % 33)
        R, cauchy = s4.cauchy_forward(v, a, 200)
        powers, vandermonde = s4d.vandermonde_forward(v, a, 200)
        system = etsc.to_ssm(k, np.linspace(0.5, 1, 33))
        decoded, after = etsc.step(system, h.T[:5], etsc.start(system, 5))
        twins.append(
            [
                g,
                *hope.sample_backward(g, cache),
                R,
                *s4.cauchy_backward(R, cauchy),
                powers,
                *s4d.vandermonde_backward(powers, vandermonde),
                k,
                *hope.ladder_backward(k, ladder),
                norm[0],
                *nn.batch_norm_backward(x, norm[1]),
                gelu,
                nn.gelu_backward(x, gelu_cache),
                loss,
                nn.softmax_cross_entropy_backward(1.0, entropy),
                scan,
                *mamba.recurrence_backward(x, scanned, state),
                recall,
                *longhorn.recurrence_backward(x, recalled, learned),
                decoded,
                etsc.step(system, h.T[5:10], after)[1]["u"],
            ]
        )
    backend.set_threads(before)
    assert all((a == b).all() for a, b in zip(*twins, strict=True))


def test_four_python_threads_at_once():
    """The workqueue layer aborts the process when two threads enter it:
    the lock must keep them apart"""
    expected = everything("float64")
    results = [None] * 4

    def work(i):
        for _ in range(3):
            results[i] = everything("float64")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for result in results:
        assert max(map(error, result, expected)) < 1e-12


def python(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


SMALL = """
import numpy as np, sys
from ref import etsc, hope, hyena, longhorn, mamba, s4, s4d, tnn, transformer
for model, settings in (
    (hope, {"d_state": 6, "norm": "batch"}),
    (hope, {"d_state": 6, "conv": "causal"}),
    (s4, {"d_state": 6, "l_max": 5}),
    (s4d, {"d_state": 6, "bidirectional": True}),
    (hyena, {"l_max": 5, "filter_order": 4}),
    (tnn, {"use_multi_decay": True, "rpe_dim": 4}),
    (transformer, {"n_heads": 1}),
    (mamba, {"d_state": 2}),
    (longhorn, {"d_state": 2}),
):
    rng = np.random.default_rng(0)
    cfg = model.Config(d_model=3, **settings)
    p = model.block_init(cfg, rng, "float64")
    x = rng.standard_normal((2, 5, 3))
    y, cache = model.block_forward(p, x, cfg, rng)
    dx, grads = model.block_backward(x, cache)
    print(y.sum(), dx.sum(), *(abs(g).sum() for g in grads.values()))
system = etsc.to_ssm(x[0].T, 0.9)
for x_t in x[:, :, 0].T:
    y, s = etsc.step(system, np.tile(x_t[:, None], 3), etsc.start(system, 2))
    print(y.sum(), abs(s["u"]).sum())
"""


def test_without_the_compiler():
    """The same sources run as plain Python under NUMBA_DISABLE_JIT=1"""
    compiled = np.array(python(SMALL).split(), "float64")
    interpreted = np.array(python(SMALL, NUMBA_DISABLE_JIT="1").split(), "float64")
    assert error(interpreted, compiled) < 1e-12


def test_the_readable_form_needs_no_numba():
    loaded = python(SMALL + "print('numba' in sys.modules)", REF_PLAIN="1")
    assert loaded.endswith("False")


def test_a_threading_layer_chosen_by_the_host_is_respected():
    show = "import ref.kernels, numba; print(numba.config.THREADING_LAYER)"
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_THREADING_LAYER"}
    run = subprocess.run(
        [sys.executable, "-c", show], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "workqueue"
    assert python(show, NUMBA_THREADING_LAYER="omp") == "omp"


def test_importing_is_light():
    """The command line answers --help without loading the heavy libraries"""
    heavy = ("numba", "cupy", "torch", "matplotlib")
    code = f"import sys, ref.network, ref.options; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"
