"""The GPU side where no GPU is: CUDA kernels as C++, names used of CuPy, models on strict arrays.

Tests marked `gpu` make the same comparisons on CuPy; they are skipped without a device.
"""

import ast
import functools
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cuda_shim
import numpy as np
import pytest
import strict

from ref import Error, backend, block, hope, network, nn, optim, s4
from ref.kernels import cuda, hope_cuda, longhorn_cuda, mamba_cuda, s4_cuda, s4d_cuda, scan_cuda

ROOT = Path(hope.__file__).parent.parent
CU_FILES = sorted((ROOT / "ref" / "kernels").glob("*.cu"))
CUDA = {"hope": hope_cuda, "s4": s4_cuda, "s4d": s4d_cuda}
SCANS = {"longhorn": longhorn_cuda, "mamba": mamba_cuda}  # on real arrays, with tests of their own
EVERY = CUDA | SCANS
PLAIN = backend.plain()  # the whole suite runs without Numba


@pytest.fixture
def plain(monkeypatch):
    """Readable forms, where a test does not call for another"""
    monkeypatch.setenv("REF_PLAIN", "1")


def cupy_device():
    """CuPy.   Skips the test where there is no device"""
    try:
        return backend.select_device("cuda")
    except Error as e:
        pytest.skip(str(e))


def to_numpy(x):
    return np.asarray(x if isinstance(x, np.generic) else backend.to_host(x))


def error(a, b, axis=None):
    """The largest difference of a and b, relative to the largest element of b (along axis)"""
    a, b = np.atleast_1d(to_numpy(a)), np.atleast_1d(to_numpy(b))
    assert a.shape == b.shape
    largest = np.abs(b).max(axis=axis, keepdims=True)
    return (np.abs(a - b) / np.where(largest == 0, 1, largest)).max()


# The kernels


class Margins:
    """An array module whose arrays lie between margins and are NaN until written.

    The margins of inputs are NaN, so that a read beyond them shows, those of other arrays STAMP, so
    that a write does.
    """

    WIDTH, STAMP = 64, 12345.678

    def __init__(self, xp):
        self.xp, self.blocks = xp, []

    def __getattr__(self, name):
        return getattr(self.xp, name)

    def array(self, shape, dtype, margin, value):
        size = int(np.prod(shape))
        block = self.xp.full(size + 2 * self.WIDTH, margin, dtype=dtype)
        inside = block[self.WIDTH : self.WIDTH + size].reshape(shape)
        inside[...] = value
        self.blocks.append((block, block.copy()))
        return inside

    def empty(self, shape, dtype):
        nan = complex(np.nan, np.nan) if np.dtype(dtype).kind == "c" else np.nan
        return self.array(shape, dtype, self.STAMP, nan)

    def zeros(self, shape, dtype):
        return self.array(shape, dtype, self.STAMP, 0)

    def put(self, x):
        """A host array, moved here"""
        return self.array(x.shape, x.dtype, np.nan, backend.to_device(x, self.xp))

    def check(self):
        """Nothing was written beyond an array"""
        for after, before in self.blocks:
            for margin in (slice(self.WIDTH), slice(-self.WIDTH, None)):
                a, b = backend.to_host(after[margin]), backend.to_host(before[margin])
                assert a.tobytes() == b.tobytes()


@pytest.fixture(params=["c++", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request, monkeypatch):
    """Where the CUDA kernels run: on strict arrays as C++, or on CuPy's"""
    if request.param == "cuda":
        return cupy_device()
    monkeypatch.setitem(sys.modules, "cupy", cuda_shim)
    monkeypatch.setattr(cuda, "launcher", functools.cache(cuda.launcher.__wrapped__))
    return strict


@pytest.fixture
def memory(machine, monkeypatch):
    """That machine's memory, guarded"""
    margins = Margins(machine)
    for kernels in (*EVERY.values(), scan_cuda):
        monkeypatch.setattr(kernels, "array_module", lambda x: margins)
    yield margins
    margins.check()


# D, n, L: ones, even and odd, a last block that is full, one that is not, n above CHUNK
SIZES = [
    (1, 1, 1),
    (3, 1, 2),
    (2, 5, 3),
    (2, 8, 64),
    (2, 3, 127),
    (4, 33, 130),
    (3, 7, 257),
    (2, 70, 151),
]
DT = [1e-4, 0.1, 1.0, 30.0]


def complex_normal(rng, shape, dtype="complex128"):
    return rng.standard_normal((*shape, 2)).view("complex128")[..., 0].astype(dtype)


def log_dt_near(rng, D, dt):
    """log_dt (D,), the first that of dt"""
    log_dt = np.log(dt) + 0.01 * rng.standard_normal(D)
    log_dt[0] = np.log(dt)
    return log_dt


def hope_sampling(D, n, L, dt, dtype):
    """dg, h, log_dt, L, J for real and complex h, for half of the nodes and all"""
    rng, complex_dtype = np.random.default_rng(n), backend.complex_dtype(dtype)
    log_dt = log_dt_near(rng, D, dt)
    h, dg = (complex_normal(rng, (D, N)) for N in (n, L))
    for J in sorted({L // 2 + 1, L}):
        few = dg[:, :J].astype(complex_dtype)
        yield few, h.astype(complex_dtype), log_dt.astype(dtype), L, J
        yield few, h.real.astype(dtype), log_dt.astype(dtype), L, J


def hope_ladder(D, n, L, dt, dtype):
    """dk, h, log_dt, L"""
    rng = np.random.default_rng(n)
    log_dt = log_dt_near(rng, D, dt)
    dk, h = rng.standard_normal((D, L)), rng.standard_normal((D, n))
    return *(x.astype(dtype) for x in (dk, h, log_dt)), L


def hope_results(kernels, put, D, n, L, dt, dtype):
    """Everything that a module like ref.kernels.hope gives, by name"""
    results = {}
    for k, case in enumerate(hope_sampling(D, n, L, dt, dtype)):
        arguments = [put(x) if isinstance(x, np.ndarray) else x for x in case]
        results[f"g {k}"] = kernels.sample_forward(*arguments[1:])
        dh, results[f"dlog_dt {k}"] = kernels.sample_backward(*arguments)
        results[f"dh {k}"] = dh if case[1].dtype.kind == "c" else dh.real
    *arrays, L = hope_ladder(D, n, L, dt, dtype)
    dk, h, log_dt = map(put, arrays)
    results["k"] = kernels.ladder_forward(h, log_dt, L)
    results["ladder dh"], results["ladder dlog_dt"] = kernels.ladder_backward(dk, h, log_dt, L)
    return results


def poles(rng, D, n, dt, dtype):
    """dt times n modes for each of D channels, of low and high frequency, one of them real"""
    A = -0.5 * np.exp(rng.standard_normal((D, n))) + 3j * np.arange(n)
    return (np.exp(log_dt_near(rng, D, dt))[:, None] * A).astype(dtype)


def s4_results(kernels, put, D, n, L, dt, dtype):
    """Everything that a module like ref.kernels.s4 gives, by name; the last of 7 sums goes alone"""
    rng, results, dtype = np.random.default_rng(n), {}, backend.complex_dtype(dtype)
    a = put(poles(rng, D, n, dt, dtype))
    for S in (1, 4, 6, 7):
        v, dR = (put(complex_normal(rng, (S, D, N), dtype)) for N in (n, L // 2 + 1))
        results[f"R {S}"] = kernels.cauchy_forward(v, a, L)
        results[f"dv {S}"], results[f"da {S}"] = kernels.cauchy_backward(dR, v, a, L)
    return results


def s4d_results(kernels, put, D, n, L, dt, dtype):
    """Everything that a module like ref.kernels.s4d gives, by name"""
    rng, results, complex_dtype = np.random.default_rng(n), {}, backend.complex_dtype(dtype)
    z = put(poles(rng, D, n, dt, complex_dtype))
    for d in (1, 2):
        c = put(complex_normal(rng, (d, D, n), complex_dtype))
        dk = put(rng.standard_normal((d, D, L)).astype(dtype))
        results[f"k {d}"] = kernels.vandermonde_forward(c, z, L)
        results[f"dc {d}"], results[f"dz {d}"] = kernels.vandermonde_backward(dk, c, z)
    return results


def scan_case(model, B, L, E, N, dtype, ends=True):
    """The arguments of scan_forward, dy, dlast; D, first state and dlast are None without ends"""
    rng = np.random.default_rng(L)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    step = rng.uniform(0.01, 1, (B, L, E)).astype(dtype)  # Mamba's delta, Longhorn's beta
    shared = normal(B, L, N), normal(B, L, N)
    own = (-np.exp(normal(E, N)), *shared) if model == "mamba" else shared
    D, first, dlast = (normal(E), normal(B, E, N), normal(B, E, N)) if ends else (None,) * 3
    return (normal(B, L, E), step, *own, D, first), normal(B, L, E), dlast


SCAN_RESULTS = {
    "longhorn": ("y", "S", "dx", "dbeta", "dk", "dq", "dD", "dS0"),
    "mamba": ("y", "h", "dx", "ddelta", "dA", "dB", "dC", "dD", "dh0"),
}


def run_scan(model, kernels, put, arguments, dy, dlast):
    """Everything that a module like ref.kernels.mamba gives for a case, by name"""
    put = [x if x is None else put(x) for x in (*arguments, dy, dlast)]
    *given, first, dy, dlast = put
    y, last, kept = kernels.scan_forward(*given, first)
    results = y, last, *kernels.scan_backward(dy, *given, kept, dlast)
    named = zip(SCAN_RESULTS[model], results, strict=True)
    return {name: x for name, x in named if x is not None}


def scan_results(model):
    def results(kernels, put, E, N, L, dt, dtype):
        return run_scan(model, kernels, put, *scan_case(model, 2, L, E, N, dtype))

    return results


def kernel_results(model, kernels, put, *case):
    results = {"hope": hope_results, "s4": s4_results, "s4d": s4d_results}
    results |= {model: scan_results(model) for model in SCANS}
    return results[model](kernels, put, *case)


class Readable:
    """The readable forms of a model with the signatures of its kernels"""

    def __init__(self, model):
        self.model = network.model_module(model)

    def __getattr__(self, name):
        pair, _, way = name.rpartition("_")
        forward = getattr(self.model, f"{pair}_forward")
        if way == "forward":
            return lambda *args: forward(*args)[0]

        def gradients(dy, *args):
            args = (*args, dy.shape[-1]) if pair == "vandermonde" else args
            return getattr(self.model, name)(dy, forward(*args)[1])

        return gradients


def compare(ours, theirs, tolerance, axis=None):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert error(ours[name], theirs[name], axis) < tolerance, name


def at_every_size(test):
    test = pytest.mark.parametrize("dt", DT)(test)
    test = pytest.mark.parametrize("D, n, L", SIZES)(test)
    return pytest.mark.parametrize("model", CUDA)(test)


@at_every_size
def test_cuda_kernels_are_the_readable_form(memory, plain, model, D, n, L, dt):
    case = D, n, L, dt, "float64"
    expected = kernel_results(model, Readable(model), np.copy, *case)
    compare(kernel_results(model, CUDA[model], memory.put, *case), expected, 1e-12, axis=-1)


@pytest.mark.skipif(PLAIN, reason="REF_PLAIN asks for no Numba")
@at_every_size
def test_cuda_kernels_are_the_numba_twins_in_float32(memory, model, D, n, L, dt):
    case, twins = (D, n, L, dt, "float32"), importlib.import_module(f"ref.kernels.{model}")
    expected = kernel_results(model, twins, np.copy, *case)
    compare(kernel_results(model, CUDA[model], memory.put, *case), expected, 5e-6, axis=-1)


@at_every_size
def test_cuda_kernels_are_in_float64_inside(memory, plain, model, D, n, L, dt):
    def wide(x):
        return x.astype("complex128" if x.dtype.kind == "c" else "float64")

    case = D, n, L, dt, "float32"
    exact = kernel_results(model, Readable(model), wide, *case)
    ours = kernel_results(model, CUDA[model], memory.put, *case)
    assert ours.keys() == exact.keys()
    for name in ours:  # what remains is the rounding of the result
        assert error(ours[name], exact[name], axis=-1) < 2e-7, name


@pytest.mark.parametrize("dtype", cuda.REAL)
@pytest.mark.parametrize("model", EVERY)
def test_cuda_kernels_take_strided_arrays_and_leave_them_as_they_are(memory, model, dtype):
    def strided(x):
        y = memory.put(np.repeat(x, 2, axis=-1))[..., ::2]
        given.append((x, y))
        return y

    case, given = (3, 5, 20, 0.1, dtype), []
    result = kernel_results(model, EVERY[model], strided, *case)
    compare(result, kernel_results(model, EVERY[model], memory.put, *case), 1e-30)
    assert all((to_numpy(y) == x).all() for x, y in given)


@pytest.mark.parametrize("dtype", cuda.REAL)
@pytest.mark.parametrize("model", EVERY)
def test_cuda_threads_share_nothing(memory, monkeypatch, model, dtype):
    case = model, EVERY[model], memory.put, 3, 9, 200, 0.1, dtype
    first = kernel_results(*case)
    monkeypatch.setattr(cuda_shim.RawModule, "reverse", True)  # on a GPU this is the second run
    compare(first, kernel_results(*case), 1e-30)


def test_every_kernel_is_among_those_compared(machine, monkeypatch):
    if machine is not strict:
        pytest.skip("launches are counted where the kernels run as C++")
    monkeypatch.setattr(cuda_shim.RawModule, "launched", set())
    for model, kernels in EVERY.items():
        kernel_results(model, kernels, strict.asarray, 1, 1, 20, 1.0, "float32")
    assert EVERY.keys() == {path.stem for path in CU_FILES}
    names = {name for path in CU_FILES for name in cuda_shim.kernels(cuda.source(path.stem))}
    assert names == cuda_shim.RawModule.launched


@pytest.mark.parametrize("threads", [1, 31, 32, 33, (1 << 15) - 1, 1 << 15, (1 << 15) + 1])
def test_launch_covers_all_threads_once(monkeypatch, threads):
    launches = []
    fake = types.SimpleNamespace(get_function=lambda name: lambda *a: launches.append((name, *a)))
    fake.RawModule = lambda **kwargs: fake
    monkeypatch.setitem(sys.modules, "cupy", fake)
    cuda.launcher.__wrapped__("hope", "float32")("some_kernel", threads, 1, 2)
    [(name, (blocks,), (block,), arguments)] = launches
    assert (name, arguments) == ("some_kernel", (1, 2))
    assert (blocks - 1) * block < threads <= blocks * block and block % 32 == 0


@pytest.mark.parametrize("dtype", cuda.REAL)
@pytest.mark.parametrize("path", CU_FILES, ids=lambda path: path.name)
def test_cuda_source_compiles_with_nvcc(path, dtype, tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    macro, output = f"-DREAL={cuda.REAL[dtype]}", tmp_path / "kernels.ptx"
    command = ["nvcc", "-ptx", "-arch=sm_90", "-std=c++14", macro, "-o", output, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptx = output.read_text()
    assert all(f".entry {name}(" in ptx for name in cuda_shim.kernels(cuda.source(path.stem)))


@pytest.mark.parametrize("path", CU_FILES, ids=lambda path: path.name)
def test_cuda_source_is_what_nvrtc_takes_from_cupy(path):
    """NVRTC has no standard headers, and CuPy writes the source out in the locale's encoding"""
    assert "#include" not in path.read_text(encoding="utf-8")
    assert path.read_bytes().isascii()


# The scans, against their equations step by step with every state in memory


def scan_loop(a, u, k, q, h0, dy, dlast):
    """h_t = a_t h_(t-1) + u_t k_t, y_t = h_t q_t.   a (B, L, E, N), u, dy (B, L, E), k, q (B, L, N)
    -> y, h_L, gradients of a, u, k, q, h0"""
    states, L = [h0], u.shape[1]
    for t in range(L):
        states.append(a[:, t] * states[-1] + u[:, t, :, None] * k[:, t, None])
    g, gradients = dlast, []
    for t in reversed(range(L)):
        g = g + dy[:, t, :, None] * q[:, t, None]
        gradients.insert(0, g)
        g = g * a[:, t]
    before, after, gs = (np.stack(x, axis=1) for x in (states[:-1], states[1:], gradients))
    y = np.einsum("blen,bln->ble", after, q)
    du, dk = np.einsum("blen,bln->ble", gs, k), np.einsum("blen,ble->bln", gs, u)
    return y, states[-1], gs * before, du, dk, np.einsum("blen,ble->bln", after, dy), g


def mamba_loop(x, delta, A, B, C, D, h0, dy, dlast):
    a = np.exp(delta[..., None] * A)
    y, h, da, du, dB, dC, dh0 = scan_loop(a, delta * x, B, C, h0, dy, dlast)
    w = da * a
    ddelta, dA = (w * A).sum(axis=-1) + x * du, np.einsum("blen,ble->en", w, delta)
    return y + D * x, h, delta * du + D * dy, ddelta, dA, dB, dC, (x * dy).sum(axis=(0, 1)), dh0


def longhorn_loop(x, beta, k, q, D, s0, dy, dlast):
    shrink = 1 + beta * (k * k).sum(axis=-1, keepdims=True)
    delta = beta / shrink
    a = 1 - delta[..., None] * k[:, :, None] ** 2
    y, S, da, du, dk, dq, ds0 = scan_loop(a, delta * x, k, q, s0, dy, dlast)
    ddelta = x * du - (da * k[:, :, None] ** 2).sum(axis=-1)
    dkappa = -(ddelta * delta**2).sum(axis=-1, keepdims=True)
    dk += 2 * k * dkappa - 2 * k * (da * delta[..., None]).sum(axis=2)
    dbeta = ddelta / shrink**2
    return y + D * x, S, delta * du + D * dy, dbeta, dk, dq, (x * dy).sum(axis=(0, 1)), ds0


def exact_scan(model, arguments, dy, dlast):
    """What run_scan gives, by a loop in float64"""
    *given, D, first = arguments
    (B, _, E), N = dy.shape, given[-1].shape[2]
    D, missing = np.zeros(E) if D is None else D, np.zeros((B, E, N))
    first, last = (missing if x is None else x for x in (first, dlast))
    loop = {"longhorn": longhorn_loop, "mamba": mamba_loop}[model]
    results = loop(*(x.astype("float64") for x in (*given, D, first, dy, last)))
    results = dict(zip(SCAN_RESULTS[model], results, strict=True))
    return results if arguments[-2] is not None else results | {"dD": None}


# B, L, E, N: one chunk of time, some, many; blocks of channels that are full, that are not
SCAN_SIZES = [
    (1, 1, 1, 1),
    (2, 1, 5, 3),
    (1, 2, 33, 1),
    (2, 3, 100, 17),
    (1, 16, 64, 2),
    (2, 17, 65, 3),
    (1, 127, 5, 16),
    (2, 127, 33, 3),
    (1, 1021, 1, 17),
    (2, 1021, 5, 1),
    (1, 1021, 33, 16),
    (1, 1021, 100, 3),
]
FULL = {
    "one part": 1,
    "some parts": 128,
    "all chunks": 1 << 40,
}  # threads that are said to be enough
SCAN_TOLERANCE = {"float32": 2e-6, "float64": 1e-13}


def close(ours, exact, dtype, tolerance, axis=None):
    """Whether a scan's results are of that precision and near the loop's"""
    assert ours.keys() == {name for name, x in exact.items() if x is not None}
    for name, x in ours.items():
        assert x.dtype == dtype and np.isfinite(to_numpy(x)).all(), name
        assert error(x, exact[name], axis) < tolerance, name


def of_every_scan(test):
    test = pytest.mark.parametrize("dtype", cuda.REAL)(test)
    test = pytest.mark.parametrize("full", FULL)(test)
    return pytest.mark.parametrize("model", SCANS)(test)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("B, L, E, N", SCAN_SIZES)
@of_every_scan
def test_scans_are_their_equations(memory, monkeypatch, model, full, dtype, B, L, E, N, ends):
    monkeypatch.setattr(scan_cuda, "FULL", FULL[full])
    case = scan_case(model, B, L, E, N, dtype, ends)
    ours = run_scan(model, SCANS[model], memory.put, *case)
    close(ours, exact_scan(model, *case), dtype, SCAN_TOLERANCE[dtype])
    monkeypatch.setattr(cuda_shim.RawModule, "reverse", True)  # on a GPU this is the second run
    compare(ours, run_scan(model, SCANS[model], memory.put, *case), 1e-30)


@of_every_scan
def test_scans_bear_extreme_values(memory, monkeypatch, model, full, dtype):
    """Errors by rows, for these are many orders of magnitude apart"""
    monkeypatch.setattr(scan_cuda, "FULL", FULL[full])
    (x, step, *own, D, first), dy, dlast = scan_case(model, 2, 70, 5, 16, dtype)
    step[0, 3], step[1, 40] = 0, 1
    if model == "mamba":
        own[0][:3] *= 1e10  # decays of 0, where delta A is -inf in float32 too
        own[0][3, 4] = 0  # that of 1
        step[:, [20, 55]] = 1e30
        x[:, 20] = x[:, 55, 3] = 0  # all is forgotten, or kept: nothing is taken
    else:
        for t, size in ((10, 0), (20, 1e4), (33, 1e9), (48, 1e15), (49, 1e15), (60, 1e-15)):
            own[0][:, t] *= size
    case = (x, step, *own, D, first), dy, dlast
    ours = run_scan(model, SCANS[model], memory.put, *case)
    close(ours, exact_scan(model, *case), dtype, 10 * SCAN_TOLERANCE[dtype], axis=-1)


@pytest.mark.parametrize("dtype", cuda.REAL)
def test_mamba_forgets_by_a_decay_of_zero(memory, dtype):
    (x, delta, A, B, C, D, h0), _, _ = scan_case("mamba", 1, 40, 7, 3, dtype)
    x[:, :30], A[:] = 1e20, -1e10
    _, last, _ = mamba_cuda.scan_forward(*map(memory.put, (x, delta, A, B, C, D, h0)))
    assert error(last, (delta * x)[:, -1, :, None] * B[:, -1, None]) < SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", cuda.REAL)
def test_longhorn_keeps_the_digits_of_a_decay_next_to_zero(memory, dtype):
    """Where a key of 1e4 or 1e15 takes in nothing, what is left of one state is S/(1 + beta k^2)"""
    (x, beta, k, q, D, s0), _, _ = scan_case("longhorn", 1, 1, 7, 1, dtype)
    x[:], wide = 0, beta[:, 0, :, None].astype("float64")
    for key in (1e4, 1e15):
        k[:] = key
        _, last, _ = longhorn_cuda.scan_forward(*map(memory.put, (x, beta, k, q, D, s0)))
        assert error(last, s0 / (1 + wide * key**2)) < SCAN_TOLERANCE[dtype]


def test_the_gradient_of_large_keys_does_not_underflow(memory):
    (x, beta, k, q, D, s0), dy, _ = scan_case("longhorn", 2, 5, 33, 4, "float32")
    case = (1e-15 * x, beta, 1e15 * k, q, D, 1e-15 * s0), dy, None
    ours = run_scan("longhorn", longhorn_cuda, memory.put, *case)["dk"]
    assert error(ours, exact_scan("longhorn", *case)["dk"], axis=-1) < 1e-5


@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("model", SCANS)
def test_scans_keep_no_state_of_every_step(memory, monkeypatch, model, full):
    monkeypatch.setattr(scan_cuda, "FULL", FULL[full])
    (B, L, E, N), put = (1, 509, 256, 64), memory.xp.asarray
    run_scan(model, SCANS[model], put, *scan_case(model, B, L, E, N, "float32"))
    sizes = [block.nbytes // 4 for block, _ in memory.blocks]
    assert max(sizes) < B * L * E * N / 7 and sum(sizes) < B * L * E * N / 2


@pytest.mark.parametrize("B, L, E", [(1, 1, 1), (1, 16, 3), (8, 2048, 768), (1, 65537, 1536)])
def test_a_scan_is_split_where_the_channels_do_not_fill_the_card(B, L, E):
    chunks, span, parts = scan_cuda.split(B, L, E)
    assert (chunks - 1) * scan_cuda.STEPS < L <= chunks * scan_cuda.STEPS
    assert (parts - 1) * span < chunks <= parts * span
    assert parts * B * E <= 4 * scan_cuda.FULL + B * E  # so the sums of each part are small
    assert parts == chunks or parts * B * E >= 2 * scan_cuda.FULL
    assert scan_cuda.split(scan_cuda.FULL, L, E) == (chunks, chunks, 1)


@pytest.mark.parametrize("model", SCANS)
def test_steps_of_a_chunk_are_as_in_the_source(model):
    assert f"const int STEPS = {scan_cuda.STEPS};" in cuda.source(model)


# Which code runs on CuPy's arrays


def test_kernel_modules_do_not_import_cupy():
    names = ", ".join(kernels.__name__ for kernels in EVERY.values())
    code = f"import {names}, sys; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_twins_of_cupy_arrays(monkeypatch):
    monkeypatch.delenv("REF_PLAIN", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    x = type("ndarray", (), {"__module__": "cupy"})()
    assert {model: backend.twins(model, x) for model in EVERY} == EVERY
    assert backend.twins("nn", x) is None  # there are no kernels: the readable form
    monkeypatch.setenv("REF_PLAIN", "1")
    assert backend.twins("hope", x) is None


# Names used of CuPy


def signature(function):
    """A CuPy function's signature; those in Cython have it in their documentation's first line"""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        line = (function.__doc__ or "").partition("\n")[0]
        parameters = re.search(r"\((.*?)\)( ->|$)", line)[1].replace("\\", "")
        parameters = re.sub(r"\b\w+ (\w+)", r"\1", parameters)  # types before the names
        return inspect.signature(eval(f"lambda {parameters}: 0"))


def does_not_take(function, call, own=0):
    """What CuPy's function does not take of a call, or None. own: 1 for a method's self"""
    if any(isinstance(x, ast.Starred) for x in call.args) or any(
        k.arg is None for k in call.keywords
    ):
        return None
    try:
        signature(function).bind(*[0] * (len(call.args) + own), **{k.arg: 0 for k in call.keywords})
    except TypeError as e:
        return str(e)
    return None


def is_module(node):
    """Whether an expression stands for the array module: xp, or array_module(...)"""
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", getattr(node.func, "attr", "")) == "array_module"
    return isinstance(node, ast.Name) and node.id == "xp"


def cupy_faults(source, cupy):
    """What the source uses that CuPy does not have, or not with these arguments"""
    tree, faults = ast.parse(source), []
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {
        (name.asname or name.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            faults += misnamed_modules(node)
        if not isinstance(node, ast.Attribute):
            continue
        call, root, names = calls.get(id(node)), node, []
        while isinstance(root, ast.Attribute):
            root, names = root.value, [root.attr, *names]
        problem = None
        if is_module(root):
            if id(node) in inner:
                continue
            try:
                found = functools.reduce(getattr, names, cupy)
            except AttributeError as e:
                problem = str(e)
            else:
                problem = does_not_take(found, call) if call else None
        elif hasattr(np.ndarray, node.attr) and not (
            node.attr.startswith("__") or (isinstance(root, ast.Name) and root.id in imported)
        ):
            method = getattr(cupy.ndarray, node.attr, None)
            if method is None:
                problem = "CuPy's arrays do not have it"
            elif call and call.keywords:
                problem = does_not_take(method, call, own=1)
        if problem:
            faults.append(f"line {node.lineno}: {'.'.join(names)}: {problem}")
    return faults


def misnamed_modules(node):
    """Array modules assigned to another name than xp, which the check would not see"""
    pairs = [(target, node.value) for target in node.targets]
    for target, value in pairs:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs += zip(target.elts, value.elts, strict=True)
        elif isinstance(value, ast.Call) and is_module(value) and not is_module(target):
            yield f"line {node.lineno}: an array module is called xp"


def source_of_device_code():
    """Files that name an array module: what runs on the device is in them"""
    files = [*ROOT.glob("*.py"), *(ROOT / "ref").glob("*.py")]
    files += [*(ROOT / "ref" / "kernels").glob("*cuda.py")]
    return [path for path in files if re.search(r"\bxp\b|array_module", path.read_text("utf-8"))]


@pytest.mark.parametrize("path", source_of_device_code(), ids=lambda path: path.name)
def test_cupy_has_what_is_used_of_it(path):
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    assert cupy_faults(path.read_text(encoding="utf-8"), cupy) == []


@pytest.mark.parametrize(
    "line",
    [
        "xp.nosuch(x)",
        "xp.linalg.nosuch(x)",
        "xp.add.nosuch(x, i, y)",
        "array_module(x).nosuch",
        "xp.sum(x, where=m)",
        "xp.exp(x, where=m)",
        "xp.add.at(x, i, y, where=m)",
        "xp.tril(x, 1, 2)",
        "x.setflags(write=False)",
        "x.sum(initial=0)",
        "(x + y).T.mean(where=m)",
        "module = array_module(x)",
        "D, module = 1, backend.array_module(x)",
    ],
)
def test_the_check_of_names_finds_faults(line):
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    assert len(cupy_faults(line, cupy)) == 1


def test_the_error_function_exists():
    pytest.importorskip("cupy", exc_type=ImportError)
    assert callable(importlib.import_module("cupyx.scipy.special").erf)


# Strict arrays


@pytest.mark.parametrize(
    "use",
    [
        lambda x, h: x + h,
        lambda x, h: h * x,
        lambda x, h: x.__iadd__(h),
        lambda x, h: x == h,
        lambda x, h: np.exp(x),
        lambda x, h: np.asarray(x),
        lambda x, h: strict.exp(h),
        lambda x, h: strict.stack([x, h]),
        lambda x, h: strict.maximum([1, 2, 3], x),
        lambda x, h: x.__setitem__(0, h[0:1]),
        lambda x, h: x[h.astype(int)],
        lambda x, h: x[[0, 1]],
        lambda x, h: float(x[0]),
        lambda x, h: int(x[0]),
        lambda x, h: bool(x[:1]),
        lambda x, h: range(x.sum().astype(int)),
        lambda x, h: 1 if x.sum() > 0 else 0,
        lambda x, h: max(x),
        lambda x, h: x.sum().item(),
        lambda x, h: x.get(),
        lambda x, h: x.tolist(),
        lambda x, h: strict.fft.irfft(x + 1j, 4, 0),
        lambda x, h: strict.linalg.solve(strict.eye(3), strict.ones((2, 3, 1))),
        lambda x, h: strict.linalg.eig(strict.eye(3)),
    ],
)
def test_strict_arrays_refuse(use):
    with pytest.raises((TypeError, IndexError, ValueError)):
        use(strict.asarray(np.ones(3)), np.ones(3))


def test_strict_arrays_lack_what_cupy_lacks():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    missing = next(name for name in ("frompyfunc", "nditer", "bmat") if not hasattr(cupy, name))
    with pytest.raises(AttributeError, match="CuPy does not have it"):
        getattr(strict, missing)
    with pytest.raises(AttributeError, match="do not have it"):
        strict.asarray(np.ones(3)).setflags(write=False)


def test_strict_arrays_stay_arrays():
    x = strict.asarray(np.arange(6.0).reshape(2, 3))
    for y in (x[1, 2], x.sum(), x.max(axis=1)[0], strict.exp(x[0, 0]), x[0] @ x[1], 2 * x[0, 0]):
        assert isinstance(y, strict.Array)
    x[0] += 1  # through a view
    x[0, 0] *= 5
    assert backend.to_host(x)[0].tolist() == [5, 2, 3] and backend.item(x[1, 2]) == 5
    assert (np.float32(2) * strict.asarray(np.ones(2, "float32"))).dtype == "float32"


# Every layer and every model's training step on strict arrays, and with the CUDA kernels


@pytest.fixture(params=["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def xp(request):
    """An array module that is not NumPy"""
    return strict if request.param == "strict" else cupy_device()


def layer_arguments(rng):
    """Names and arguments of nn.<name>_forward, once for each of its options"""
    B, L, D = 2, 7, 6
    x, weight, bias = rng.standard_normal((B, L, D)), rng.standard_normal(D), rng.standard_normal(D)
    tokens, lengths = rng.integers(0, 5, (B, L)), np.array([3, L])
    response = np.fft.rfft(rng.standard_normal((L, D)), axis=0)
    simple = ("gelu", "gelu_tanh", "sigmoid", "silu", "softplus", "relu", "glu")
    yield from ((name, (x,)) for name in simple)
    yield "linear", (x, rng.standard_normal((4, D)), rng.standard_normal(4))
    yield "linear", (x, rng.standard_normal((4, D)))
    yield "embedding", (tokens, rng.standard_normal((5, D)))
    yield "layer_norm", (x, weight, bias)
    yield "rms_norm", (x, weight)
    yield "simple_rms_norm", (x,)
    for training in (True, False):
        yield "batch_norm", (x, weight, bias, 0.1 * bias, weight**2 + 1, training)
    yield "short_conv", (x, rng.standard_normal((D, 1, 4)), bias)
    yield "short_conv", (x, rng.standard_normal((D, 1, 4)), None, rng.standard_normal((B, 3, D)))
    yield "spectral_conv", (x, response)
    for K, mode in ((L, "causal"), (3, "causal"), (L + 2, "causal"), (L, "circular")):
        yield "fft_conv", (x, rng.standard_normal((D, K)), mode)
    yield "fft_conv", (x, rng.standard_normal((D, 2 * L - 1)), "two-sided")
    yield "mean_pool", (x, lengths)
    yield "last", (x, lengths)
    yield "softmax_cross_entropy", (x, np.where(tokens == 3, -1, tokens))
    yield "softmax_cross_entropy", (x, np.where(tokens == 3, 7, tokens), 7, True)
    yield "dropout", (x, 0.3)
    yield "skip", (x, bias, 2 * x)
    yield "gate", (x, 2 * x)
    gru = [rng.standard_normal(shape) for shape in ((9, D), (9, 3), (9,), (9,))]
    yield "gru", (x, *gru)
    yield "gru", (x, *gru, rng.standard_normal((B, 3)), True)
    lstm = [rng.standard_normal(shape) for shape in ((2, L, 3), (12, D), (12, 3), (12,), (12,))]
    yield "lstm_cell", (x[0], *lstm)
    yield "huber", (x, 2 * x[::-1].copy(), 0.8)


LAYERS = list(layer_arguments(np.random.default_rng(0)))


def run_layer(name, arguments, put):
    arguments = [put(x) if isinstance(x, np.ndarray) else x for x in arguments]
    if name == "dropout":
        arguments.append(np.random.default_rng(1))
    y, cache = getattr(nn, f"{name}_forward")(*arguments)
    dy = 2.0 if y.ndim == 0 else put(np.random.default_rng(2).standard_normal(y.shape))
    gradients = getattr(nn, f"{name}_backward")(dy, cache)
    results = [y, *(gradients if isinstance(gradients, tuple) else (gradients,))]
    if name == "batch_norm" and arguments[-1]:
        results += nn.batch_norm_running(*arguments[3:5], cache)
    if name == "softmax_cross_entropy":
        results.append(1.0 * nn.softmax_cross_entropy_correct(cache))
    return results


@pytest.mark.parametrize("name, arguments", LAYERS, ids=lambda x: x if isinstance(x, str) else "")
def test_layers(xp, plain, name, arguments):
    expected = run_layer(name, arguments, np.copy)
    ours = run_layer(name, arguments, lambda x: backend.to_device(x, xp))
    for a, b in zip(ours, expected, strict=True):
        assert type(a).__module__ == xp.__name__ and a.dtype == b.dtype
        assert error(a, b) < 1e-12


def test_no_layer_is_left_out():
    every = {name[: -len("_forward")] for name in vars(nn) if name.endswith("_forward")}
    assert every == {name for name, _ in LAYERS}


DROPOUT, PRENORM = {"dropout": 0.2}, {"prenorm": True}
BATCH, RMS, SIMPLE = {"norm": "batch"}, {"norm": "rms"}, {"norm": "simple"}
CAUSAL, BOTH = {"conv": "causal"}, {"bidirectional": True}
PUBLISHED, REAL = BOTH | {"layout": "published"}, {"markov": "real"}
BILINEAR, LAST, MATCH = {"discretization": "bilinear"}, {"decoder": "last"}, {"decoder": "match"}
LM, GATED, BARE = {"decoder": "lm", "tied": True}, {"filter": "gated"}, {"block": "bare"}
MULTI = {"use_multi_decay": True}
# model, options of its layer, options of the network. No batch norm upon batch norm: the second's
# mean is rounding, in which no two computations agree.
STEPS = [
    ("hope", DROPOUT, {}),
    ("hope", REAL | PRENORM | RMS, {"tokens": False}),
    ("hope", PRENORM | BATCH | {"convention": "lra"}, LAST | {"final_norm": True}),
    ("hope", BOTH | DROPOUT | BATCH, LAST),
    ("hope", BOTH | REAL, {"tokens": False, "final_norm": True}),
    ("hope", PUBLISHED | RMS, MATCH | {"final_norm": True}),
    ("hope", PUBLISHED | REAL | {"train_markov": False}, {}),
    ("hope", CAUSAL | PRENORM | DROPOUT, LM),
    ("hope", CAUSAL | REAL | PRENORM | BATCH, {"decoder": "lm", "final_norm": True}),
    ("hope", {"conv": "identity"}, {"decoder": "lm", "tokens": False}),
    ("hope", PRENORM | SIMPLE, {"final_norm": True}),
    ("s4", DROPOUT | BATCH, MATCH | {"pool_from": 1, "positions": 12}),
    ("s4", BOTH | PRENORM | {"l_max": 16}, LAST | {"tokens": False}),
    ("s4", PRENORM | RMS | {"l_max": 10}, LM | {"positions": 10, "final_norm": True}),
    ("s4", BOTH | BATCH | {"l_max": 11}, {"pool_from": 2}),
    ("s4", SIMPLE, {}),
    ("s4d", DROPOUT | {"init": "inv"}, MATCH | {"pool_from": 1, "positions": 12}),
    ("s4d", BOTH | BILINEAR | BATCH | {"init": "legs"}, LAST | {"tokens": False}),
    ("s4d", PRENORM | RMS, LM | {"positions": 10, "final_norm": True}),
    ("s4d", BOTH | PRENORM | DROPOUT, {"pool_from": 2}),
    ("s4d", BILINEAR | {"init": "random"}, MATCH),
    ("s4d", PRENORM | SIMPLE, {"final_norm": True}),
    ("hyena", DROPOUT | {"shift": 0.05}, LM | {"final_norm": True}),
    ("hyena", {"order": 3, "num_inner_mlps": 0}, LAST | {"tokens": False}),
    ("hyena", GATED | BARE | {"recurrence": "residual"}, LM | {"positions": 12}),
    ("hyena", BARE | DROPOUT | {"recurrence": "residual", "order": 1}, MATCH | {"pool_from": 1}),
    ("hyena", GATED | {"short_filter_order": 2}, {"pool_from": 2, "final_norm": True}),
    ("longhorn", DROPOUT, LM | {"final_norm": True}),
    ("longhorn", {"update": "exact"}, MATCH | {"pool_from": 1}),
    ("longhorn", {"d_conv": 1, "dt_rank": 2}, LAST | {"tokens": False}),
    ("longhorn", {"expand": 3}, {"pool_from": 2}),
    ("mamba", DROPOUT, LM | {"final_norm": True}),
    ("mamba", {"d_conv": 1, "dt_rank": 2}, MATCH | {"pool_from": 1}),
    ("mamba", {"layout": "transformers"}, LAST | {"tokens": False}),
    ("mamba", {"expand": 3}, {"pool_from": 2}),
    ("tnn", DROPOUT | {"use_decay": True}, LM | {"final_norm": True}),
    ("tnn", BOTH | MULTI | {"residual": True, "num_heads": 3}, MATCH | {"pool_from": 1}),
    ("tnn", MULTI | {"par_type": 2, "rpe_act": "silu"}, LAST | {"tokens": False}),
    ("tnn", BOTH | {"par_type": 3, "prenorm": False, "rpe_layers": 0, "act_type": "leak"}, {}),
    ("tnn", {"rpe_act": "gelu", "act_type": "1+elu"}, {"pool_from": 2, "final_norm": True}),
    ("tnn", {"use_decay": True, "act_type": "exp"}, {}),
    ("transformer", DROPOUT, LM | {"positions": 12, "final_norm": True}),
    ("transformer", BOTH, MATCH | {"pool_from": 1}),
    ("transformer", {}, LAST | {"tokens": False}),
    ("transformer", BOTH | DROPOUT | {"block": 100}, {}),
]
CHOICES = {  # what is to occur among them
    "hope": {
        "conv": {"circular", "causal", "identity"},
        "norm": set(block.NORMS),
        "layout": {"paper", "published"},
        "markov": {"complex", "real"},
        "convention": {"minimal", "lra"},
        "bidirectional": {False, True},
        "prenorm": {False, True},
        "train_markov": {False, True},
    },
    "s4": {
        "norm": set(block.NORMS),
        "bidirectional": {False, True},
        "prenorm": {False, True},
        "l_max": {0, 10, 11, 16},  # none, as long as the sequence, odd and longer, even and longer
    },
    "s4d": {
        "init": {"lin", "inv", "legs", "random"},
        "discretization": {"zoh", "bilinear"},
        "norm": set(block.NORMS),
        "bidirectional": {False, True},
        "prenorm": {False, True},
    },
    "hyena": {
        "order": {1, 2, 3},
        "filter": {"implicit", "gated"},
        "recurrence": {"standard", "residual"},
        "block": {"prenorm", "bare"},
        "num_inner_mlps": {0, 2},
        "short_filter_order": {2, 3},
        "shift": {0.0, 0.05},
    },
    "longhorn": {
        "update": {"diagonal", "exact"},
        "d_conv": {1, 4},
        "expand": {2, 3},
        "dt_rank": {0, 2},
    },
    "mamba": {
        "layout": {"original", "transformers"},
        "d_conv": {1, 4},
        "expand": {2, 3},
        "dt_rank": {0, 2},
    },
    "tnn": {
        "bidirectional": {False, True},
        "use_decay": {False, True},
        "use_multi_decay": {False, True},
        "num_heads": {1, 3},
        "residual": {False, True},
        "rpe_layers": {0, 2},
        "rpe_act": {"relu", "silu", "gelu"},
        "par_type": {1, 2, 3},
        "act_type": {"none", "exp", "leak", "1+elu"},
        "prenorm": {False, True},
    },
    "transformer": {"bidirectional": {False, True}, "block": {4, 100}},
}


def step_id(value):
    return ",".join(map(str, value.values())) if isinstance(value, dict) else value


def configuration(model, layer, net):
    small = {"d_state": 8, "dt_min": 0.05}
    if model == "transformer":
        small = {"n_heads": 2, "block": 4, "context": 12}
    if model == "longhorn":
        small = {"d_state": 8}
    if model == "hyena":
        small = {"l_max": 12, "filter_order": 5}
    if model == "tnn":
        small = {"l_max": 12, "expand_ratio": 1.5, "rpe_dim": 5, "rpe_layers": 2}
    layer = network.model_module(model).Config(d_model=6, **small | layer)
    return network.Config(model, layer, n_layers=2, d_input=9, d_output=9, **net)


def test_no_option_is_left_out():
    configs = [configuration(*step) for step in STEPS]
    assert CHOICES.keys() == set(network.MODELS)
    for model, choices in CHOICES.items():
        own = [cfg for cfg in configs if cfg.model == model]
        assert {cfg.decoder for cfg in own} == set(network.DECODERS)
        for option, values in choices.items():
            assert {getattr(cfg.layer, option) for cfg in own} == values, (model, option)
    for option in ("tokens", "tied", "final_norm", "positions", "pool_from"):
        assert len({getattr(cfg, option) for cfg in configs}) > 1


def train(cfg, xp, dtype, L=10):
    """Two training steps and an evaluation.   -> everything computed on the way, by name"""

    def put(x):
        return backend.to_device(x, xp)

    rng, results = np.random.default_rng(3), {}
    params = {name: put(p) for name, p in network.init(cfg, rng, dtype).items()}
    moments = optim.adamw_init(params)
    rates = {"main": (0.01, 0.1), "ssm": (0.001, 0.1), "dt": (0.001,), "frozen": (0.0,)}
    rates |= {"nodecay": (0.01,), "slow": (1e-3,)}
    groups = {name: optim.Group(*rates[g]) for name, g in network.groups(params, cfg).items()}
    B = 6 if cfg.decoder == "match" else 3
    tokens, values = rng.integers(0, 9, (B, L), "uint8"), rng.standard_normal((B, L, 9))
    x = tokens if cfg.tokens else values.astype(dtype)
    targets = rng.integers(-1, 9, {"lm": (B, L), "match": 3}.get(cfg.decoder, B))
    shortest = cfg.pool_from + 1
    lengths = np.array([shortest, L - 3, L, L, shortest + 1, shortest])[:B]
    lengths = None if cfg.decoder == "lm" else put(lengths)
    x, targets = put(x), put(targets)
    for step in (1, 2):
        y, cache = network.forward(params, x, cfg, lengths, rng)
        results[f"{step} y"] = to_numpy(y).copy()
        loss, softmax = nn.softmax_cross_entropy_forward(y, targets, consume_logits=step == 2)
        dx, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, softmax), cache)
        norm = optim.gradient_norm(grads)
        grads = optim.clip(grads, norm, 0.5 * norm)
        scale = optim.warmup_cosine(step, 10, 2)
        optim.adamw_update(params, grads, moments, step, groups, scale)
        params |= network.running_statistics(params, cache)
        assert isinstance(norm, float)
        held = (params | moments | grads).values()
        assert all(backend.array_module(p) is xp for p in held)
        results |= {f"{step} loss": to_numpy(loss), f"{step} norm": np.asarray(norm)}
        results |= {f"{step} d {name}": to_numpy(g) for name, g in grads.items()}
        results |= {f"{step} dx": to_numpy(dx)} if dx is not None else {}
    results |= {name: to_numpy(p) for name, p in (params | moments).items()}
    results["evaluation"] = to_numpy(network.forward(params, x, cfg, None)[0])
    return results


def arrays_in(name, tree):
    """name, array of a decoding state, without the systems that converted filters share"""
    if isinstance(tree, (list, dict)):
        named = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for own, child in named:
            if own != "systems":
                yield from arrays_in(f"{name} {own}", child)
    elif hasattr(tree, "dtype"):
        yield name, tree


def looks(module, params, x, cfg):
    """What is not part of training: the recurrent step, the operator as kernel, as matrix and as
    system, published names"""
    results = {}
    if cfg.causal and getattr(cfg, "l_max", True):
        state = module.state(params, cfg, 2)
        for t in range(4):
            results[f"y {t}"], state = module.step(params, x[:, t], state, cfg)
        results |= dict(arrays_in("state", state))
    if hasattr(module, "final_state"):
        y, cache = module.block_forward(params, x, cfg, state=state)
        dstate = module.final_state(cache)
        dx, grads = module.block_backward(y, cache, dstate)
        results |= {"on": y, "d on": dx} | dstate | {n: g for n, g in grads.items() if "." in n}
    if getattr(cfg, "conv", None) == "identity":
        return results
    width = network.part_width(module.__name__.rpartition(".")[2], "operator", cfg)
    x = backend.array_module(x).concatenate([x] * (width // x.shape[2]), axis=2)
    results["matrix"] = module.matrix(params, cfg, x, L=4)
    if hasattr(module, "kernels"):
        results["kernel"] = module.impulse_response(params, cfg, 4)
        results["hankel"] = module.hankel_values(params, cfg)
    if module is s4:
        results["cut"], results["whole"] = s4.truncated(params, 9), s4.output_matrix(params, 9)
    if module is s4 and cfg.l_max:
        twice, doubled = s4.double_length(params, cfg)
        results["twice"] = s4.impulse_response(twice, doubled, 4)
        for form in ("dense", "diagonal") if cfg.causal else ():
            system = s4.recurrence(params, cfg, form)
            h = backend.array_module(x).zeros((2, 6, 8), dtype="complex128")
            for t in range(2):
                results[f"{form} {t}"], h = s4.recurrence_step(system, x[:, t], h)
    published = module.to_published(params, cfg, "block")
    if module is s4:
        buffers = s4.published_buffers(cfg, "block").items()
        published |= {name: backend.to_device(b, backend.array_module(x)) for name, b in buffers}
    return results | module.from_published(published, cfg, "block")


@pytest.mark.parametrize("model, layer, net", STEPS, ids=step_id)
def test_decoding_and_looking(xp, plain, model, layer, net):
    cfg, module = configuration(model, layer, net).layer, network.model_module(model)
    params = module.block_init(cfg, np.random.default_rng(4), "float64")
    x = np.random.default_rng(5).standard_normal((2, 4, 6))

    def run(xp):
        own = {name: backend.to_device(p, xp) for name, p in params.items()}
        results = looks(module, own, backend.to_device(x, xp), cfg)
        assert all(array.__class__.__module__ == xp.__name__ for array in results.values())
        return results

    compare(run(xp), run(np), 1e-12 if xp is strict else 1e-9)


@pytest.mark.parametrize("part", ["operator", "mixer", "block"])
@pytest.mark.parametrize("model, layer, net", STEPS, ids=step_id)
def test_parts(xp, plain, model, layer, net, part):
    """Each pair called alone, at an odd length where there is one"""
    cfg, module = configuration(model, layer, net).layer, network.model_module(model)
    params = getattr(module, f"{part}_init")(cfg, np.random.default_rng(4), "float64")
    L = 6 if getattr(cfg, "layout", "") == "published" else 7
    width = network.part_width(model, part, cfg)
    x, dy = np.random.default_rng(5).standard_normal((2, 3, L, width))

    def run(xp):
        own = {name: backend.to_device(p, xp) for name, p in params.items()}
        rng = () if part == "operator" else (np.random.default_rng(6),)
        y, cache = getattr(module, f"{part}_forward")(own, backend.to_device(x, xp), cfg, *rng)
        own = backend.to_device(dy[:, :, : y.shape[2]], xp)  # Hyena's operator gives less
        dx, grads = getattr(module, f"{part}_backward")(own, cache)
        return {"y": y, "dx": dx} | grads

    compare(run(xp), run(np), 1e-12 if xp is strict else 1e-9)


@pytest.mark.parametrize("model, layer, net", STEPS, ids=step_id)
def test_training_step(xp, monkeypatch, model, layer, net):
    cfg = configuration(model, layer, net)
    with monkeypatch.context() as m:
        m.setenv("REF_PLAIN", "1")
        expected = train(cfg, np, "float64")
    compare(train(cfg, xp, "float64"), expected, 1e-12 if xp is strict else 1e-9)


@pytest.mark.parametrize("model, layer, net", STEPS, ids=step_id)
def test_training_step_stays_in_float32(xp, plain, model, layer, net):
    results = train(configuration(model, layer, net), xp, "float32")
    wrong = {name: x.dtype for name, x in results.items() if x.dtype != "float32"}
    assert [name for name in wrong if not name.endswith("norm")] == []


@pytest.mark.parametrize("model, layer, net", [s for s in STEPS if s[0] in EVERY], ids=step_id)
def test_training_step_with_cuda_kernels(machine, plain, monkeypatch, model, layer, net):
    cfg = configuration(model, layer, net)
    expected = train(cfg, np, "float64")
    monkeypatch.setattr(network.model_module(model), "twins", lambda model, x: EVERY[model])
    compare(train(cfg, machine, "float64"), expected, 1e-12 if machine is strict else 1e-9)
