"""The GPU side where no GPU is: the CUDA kernels as C++, the names used of CuPy, the models on strict arrays.

Tests marked `gpu` make the same comparisons on CuPy; they are skipped without a device.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cuda_shim
import numpy as np
import pytest
import strict

from ref import Error, backend, hope, network, nn, optim
from ref.kernels import cuda, hope_cuda

ROOT = Path(hope.__file__).parent.parent
SOURCES = sorted((ROOT / "ref" / "kernels").glob("*.cu"))


@pytest.fixture
def plain(monkeypatch):
    """The readable forms run where they are not replaced"""
    monkeypatch.setenv("REF_PLAIN", "1")


def device(name):
    """CuPy.   Skips the test where there is no GPU"""
    try:
        return backend.select_device(name)
    except Error as e:
        pytest.skip(str(e))


def error(a, b):
    """The largest difference of a and b relative to the largest element of b in the same row"""
    a, b = np.atleast_1d(backend.to_host(a)), np.atleast_1d(backend.to_host(b))
    assert a.shape == b.shape
    rows = np.abs(b).max(axis=-1, keepdims=True)
    return (np.abs(a - b) / np.where(rows == 0, 1, rows)).max()


# The kernels


class Margins:
    """An array module whose arrays lie between margins of NaN, and are NaN themselves until written"""

    WIDTH = 64

    def __init__(self, xp):
        self.xp, self.blocks = xp, []

    def __getattr__(self, name):
        return getattr(self.xp, name)

    def empty(self, shape, dtype):
        size = int(np.prod(shape))
        nan = complex(np.nan, np.nan) if np.dtype(dtype).kind == "c" else np.nan
        block = self.xp.full(size + 2 * self.WIDTH, nan, dtype=dtype)
        self.blocks.append(block)
        return block[self.WIDTH : self.WIDTH + size].reshape(shape)

    def zeros(self, shape, dtype):
        x = self.empty(shape, dtype)
        x[...] = 0
        return x

    def put(self, x):
        """A host array, moved here"""
        y = self.empty(x.shape, x.dtype)
        y[...] = backend.to_device(x, self.xp)
        return y

    def check(self):
        """No kernel wrote beyond its arrays"""
        for block in map(backend.to_host, self.blocks):
            assert np.isnan(block[: self.WIDTH]).all() and np.isnan(block[-self.WIDTH :]).all()


@pytest.fixture(params=["c++", pytest.param("cuda", marks=pytest.mark.gpu)])
def memory(request, monkeypatch):
    """Where the CUDA kernels run: NumPy arrays with the kernels as C++, or CuPy's"""
    xp = np if request.param == "c++" else device("cuda")
    if xp is np:
        monkeypatch.setattr(cuda, "launcher", cuda_shim.launcher)
    margins = Margins(xp)
    monkeypatch.setattr(hope_cuda, "array_module", lambda x: margins)
    yield margins
    margins.check()


# D, n, L: ones, primes, whole blocks; the last has n above CHUNK
SIZES = [(1, 1, 1), (3, 1, 2), (2, 8, 64), (4, 33, 130), (3, 7, 257), (2, 70, 151)]
DT = [1e-4, 0.1, 1.0, 30.0]


def sampling_arguments(memory, D, n, L, dt, dtype):
    """h real and complex, J half of the nodes and all: (dg, h, log_dt, L, J) on the host and in memory"""
    rng = np.random.default_rng(n)
    log_dt = (np.log(dt) + 0.01 * rng.standard_normal(D)).astype(dtype)
    log_dt[0] = np.log(dt)
    complex_type = backend.complex_dtype(dtype)
    h = rng.standard_normal((D, n)) + 1j * rng.standard_normal((D, n))
    for J, h_type in itertools.product({L // 2 + 1, L}, (dtype, complex_type)):
        dg = (rng.standard_normal((D, J)) + 1j * rng.standard_normal((D, J))).astype(complex_type)
        ours = (h if h_type == complex_type else h.real).astype(h_type)
        yield tuple(
            (put(dg), put(ours), put(log_dt), L, J) for put in (lambda x: x, memory.put)
        )


def ladder_arguments(memory, D, n, L, dt, dtype):
    """(dk, h, log_dt, L) on the host and in memory"""
    rng = np.random.default_rng(n)
    log_dt = np.log(dt) + 0.01 * rng.standard_normal(D)
    dk, h = rng.standard_normal((D, L)), rng.standard_normal((D, n))
    host = [x.astype(dtype) for x in (dk, h, log_dt)]
    return (*host, L), (*map(memory.put, host), L)


@pytest.mark.parametrize("dt", DT)
@pytest.mark.parametrize("D, n, L", SIZES)
def test_cuda_kernels_are_the_readable_form(memory, plain, D, n, L, dt):
    for host, there in sampling_arguments(memory, D, n, L, dt, "float64"):
        g, cache = hope.sample_forward(*host[1:])
        assert error(hope_cuda.sample_forward(*there[1:]), g) < 1e-12
        for ours, theirs in zip(
            hope_cuda.sample_backward(*there), hope.sample_backward(host[0], cache), strict=True
        ):
            kind = theirs.dtype.kind
            assert error(ours if kind == "c" else ours.real, theirs) < 1e-12
    host, there = ladder_arguments(memory, D, n, L, dt, "float64")
    k, cache = hope.ladder_forward(*host[1:])
    assert error(hope_cuda.ladder_forward(*there[1:]), k) < 1e-12
    for ours, theirs in zip(
        hope_cuda.ladder_backward(*there), hope.ladder_backward(host[0], cache), strict=True
    ):
        assert error(ours, theirs) < 1e-12
