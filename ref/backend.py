"""What the models do not say: array module, device, twin, number of threads, memory."""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading

import numpy as np
import scipy.fft
import threadpoolctl

from ref import Error

parallel_lock = (
    threading.Lock()
)  # Numba's workqueue layer aborts the process when two threads enter it at once


def plain():
    """True when REF_PLAIN=1 asks for the readable form everywhere."""
    return os.environ.get("REF_PLAIN", "0") not in ("", "0")


# Array modules and devices


def array_module(x):
    """The module whose functions take x: numpy, cupy, or that of another package's array type."""
    return np if isinstance(x, np.ndarray) else sys.modules[type(x).__module__.partition(".")[0]]


def twins(model, x):
    """The fast twins of `model` for x's kind of array; None where the readable form must run."""
    if plain():
        return None
    kind = array_module(x).__name__
    if kind == "cupy":
        return _cuda_twins(model)
    twin = importlib.import_module(f"ref.kernels.{model}") if kind == "numpy" else None
    return twin if getattr(twin, "COMPILED", True) else None  # under NUMBA_DISABLE_JIT


@functools.cache
def _cuda_twins(model):
    name = f"ref.kernels.{model}_cuda"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


@functools.cache
def _cupy_or_reason():
    """(cupy, None) if a kernel, a product and an FFT run on device 0, else (None, reason)."""
    try:
        cupy = importlib.import_module("cupy")
    except Exception as e:
        return None, f"CuPy cannot be imported ({e.__class__.__name__})"
    try:
        if not cupy.cuda.is_available():
            return None, "CuPy finds no CUDA device"
        x = cupy.arange(4, dtype="float32")
        value = float(cupy.fft.rfft((x[:, None] @ x[None, :] + 1)[0])[0].real)
        return (cupy, None) if value == 4.0 else (None, "the CUDA device computes wrong results")
    except (
        Exception
    ) as e:  # a driver without toolkit, no memory, an unsupported card: all mean the same here
        return None, f"the CUDA device does not work ({str(e).splitlines()[0]})"


def select_device(name="auto"):
    """'auto', 'cpu' or 'cuda' -> numpy or cupy.   Error: 'cuda' without a usable device."""
    if name == "cpu":
        return np
    cupy, reason = _cupy_or_reason()
    if cupy is None and name == "cuda":
        raise Error(
            f"--device cuda: {reason}. Install the extra gpu12 or gpu13, or use --device cpu."
        )
    return np if cupy is None else cupy


def device_name(xp):
    """'cpu', or the GPU's own name"""
    if xp is np:
        return "cpu"
    return f"cuda ({xp.cuda.runtime.getDeviceProperties(0)['name'].decode()})"


def synchronize(xp):
    """Wait until the device has done what it was asked to"""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def to_device(x, xp):
    """A host array as an array of module xp."""
    return x if xp is np else xp.asarray(x)


def to_host(x):
    """Any array as a NumPy array."""
    return np.asarray(x) if isinstance(x, (np.ndarray, np.generic)) else x.get()


def item(x):
    """The Python number in an array of one element: the only way from device to host in a model."""
    return x.item()


# Number types

_COMPLEX = {"float32": "complex64", "float64": "complex128"}


def complex_dtype(dtype):
    """float32 -> complex64, float64 -> complex128."""
    return np.dtype(_COMPLEX[np.dtype(dtype).name])


def check_activations(x, channels, what="x"):
    """Border check of x (B, L, channels).   Error: another shape or precision, or empty."""
    if x.dtype.name not in _COMPLEX:
        raise Error(f"{what} has dtype {x.dtype}; the models compute in float32 or float64.")
    if x.ndim != 3 or x.shape[2] != channels or 0 in x.shape:
        raise Error(
            f"{what} has shape {tuple(x.shape)}; expected (B, L, {channels}), B and L at least 1."
        )


def check_choice(what, value, choices):
    """Error when value is not one of choices."""
    if value not in choices:
        raise Error(f"{what}={value!r} is not known; expected one of: {', '.join(choices)}.")


# Functions that the array modules do not share


def rfft(x, n, axis):
    """Real FFT of length n along axis; SciPy's on the host, NumPy's is slow in float32."""
    xp = array_module(x)
    return scipy.fft.rfft(x, n, axis, workers=threads()) if xp is np else xp.fft.rfft(x, n, axis)


def irfft(X, n, axis):
    """Inverse of rfft, 1/n included. Bins 0 and n/2 must be real: cuFFT ignores nothing."""
    xp = array_module(X)
    return scipy.fft.irfft(X, n, axis, workers=threads()) if xp is np else xp.fft.irfft(X, n, axis)


def fast_length(n):
    """The smallest length >= n for which a real FFT is fast."""
    return scipy.fft.next_fast_len(n, real=True)


def erf(x):
    """The error function, elementwise."""
    name = array_module(x).__name__
    scipy_of = {"numpy": "scipy.special", "cupy": "cupyx.scipy.special"}
    return importlib.import_module(scipy_of.get(name, name)).erf(x)


def eig(A):
    """Eigenvalues and eigenvectors of any square matrices, on the host: CuPy 13 has none of it."""
    xp = array_module(A)
    return tuple(to_device(x, xp) for x in np.linalg.eig(to_host(A)))


# Threads


def available_cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_threads = None


def threads():
    """Threads that the FFT, the BLAS and the Numba twins use."""
    return _threads or available_cores()


def set_threads(n):
    """Use n threads everywhere.   Error: n < 1 or more than the Numba pool holds."""
    global _threads
    import numba

    if not 1 <= n <= numba.config.NUMBA_NUM_THREADS:
        raise Error(
            f"--threads {n}: expected 1 to {numba.config.NUMBA_NUM_THREADS} on this machine."
        )
    _threads = n
    numba.set_num_threads(n)
    threadpoolctl.threadpool_limits(n, user_api="blas")


def blas_core():
    """The core type that the BLAS chose, such as 'Haswell': another one, other rounding."""
    found = {
        i.get("architecture") for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"
    }
    return ", ".join(sorted(map(str, found))) or "unknown"


# Memory


class _Block:
    """Memory lent to an array and its views; it returns to the pool when the last one is gone."""

    def __init__(self, nbytes):
        global _free_bytes
        if _pool.get(nbytes):
            self.memory = _pool[nbytes].pop()
            _free_bytes -= nbytes
        else:
            self.memory = np.empty(nbytes, np.uint8)
        self.__array_interface__ = self.memory.__array_interface__

    def __del__(self):
        global _free_bytes
        if _free_bytes + self.memory.nbytes <= _MOST_FREE:
            _pool.setdefault(self.memory.nbytes, []).append(self.memory)
            _free_bytes += self.memory.nbytes


_pool = {}  # size in bytes -> free blocks of that size
_free_bytes = 0
_MOST_FREE = 1 << 28
_SMALL = 1 << 16  # below this, malloc is as fast and touches no fresh pages


def empty(shape, dtype):
    """An uninitialised host array from recycled memory:
    first touch of fresh pages costs more than most kernels.

    A block goes back when the last array on it is gone, so results may be kept for as long as one
    likes.
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if nbytes < _SMALL:
        return np.empty(shape, dtype)
    step = 1 << max(
        nbytes.bit_length() - 4, 0
    )  # sizes in eighths of a power of two, so that blocks fit again
    block = _Block(-(-nbytes // step) * step)
    return np.asarray(block)[:nbytes].view(dtype).reshape(shape)


def keep_freed_memory():
    """Ask glibc to reuse freed memory rather than give it back:
    NumPy's temporaries then touch no fresh pages.

    For programs of our own (train.py, bench), not for import: it holds for the whole process.
    """
    m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 1 << 28)
