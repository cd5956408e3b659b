"""NumPy as strict as CuPy, for running code under `xp` where no GPU is.

This module stands for the array module and `Array` for its array type. A function of NumPy is here
when CuPy has it too; it takes and returns Arrays, those of one element included. Refused is what
CuPy refuses (NumPy arrays among the arguments, conversion to a NumPy array) and what CuPy allows
although it halts the device: float(x), bool(x), and x.item(), x.get() anywhere but in ref.backend.
"""

import functools
import operator
import sys
import types

import numpy as np
import scipy.special

from ref import backend

try:
    import cupy
except ImportError:
    cupy = None  # then all of NumPy's names are let through


def _unwrap(x, what):
    """x with NumPy arrays for Arrays, in lists too.   TypeError: what CuPy does not take"""
    if isinstance(x, Array):
        return x._x
    if isinstance(x, (list, tuple)):
        return type(x)([_unwrap(y, what) for y in x])
    if isinstance(x, np.ndarray):
        raise TypeError(f"{what}: a NumPy array meets arrays on the device")
    scalar = (bool, int, float, complex, np.generic)
    if x is None or x is ... or isinstance(x, (*scalar, str, slice, type, np.dtype)):
        return x
    raise TypeError(f"{what}: unsupported type {type(x)}")


def _wrap(x):
    if isinstance(x, (np.ndarray, np.generic)):
        return Array(np.asarray(x))
    return tuple(_wrap(y) for y in x) if isinstance(x, (list, tuple)) else x


def _function(function, what):
    """A function or method of NumPy between Arrays. Ufuncs take no lists"""
    ufunc = isinstance(function, np.ufunc)

    def call(*args, **kwargs):
        if ufunc and any(isinstance(x, (list, tuple)) for x in args):
            raise TypeError(f"{what}: unsupported type list")
        args = [_unwrap(x, what) for x in args]
        return _wrap(function(*args, **{name: _unwrap(x, what) for name, x in kwargs.items()}))

    for name in ("at", "reduce", "accumulate", "outer") if ufunc else ():
        setattr(call, name, _function(getattr(function, name), f"{what}.{name}"))
    return call


@functools.cache
def _resolve(numpy_module, cupy_module, name):
    if cupy_module is not None and not hasattr(cupy_module, name):
        raise AttributeError(f"{numpy_module.__name__}.{name}: CuPy does not have it")
    found = getattr(numpy_module, name)
    if isinstance(found, types.ModuleType):
        return _Namespace(found, cupy_module and getattr(cupy_module, name))
    as_it_is = isinstance(found, type) or not callable(found)  # number types, pi, newaxis
    return found if as_it_is else _function(found, name)


class _Namespace:
    """numpy.linalg, numpy.fft, with some functions written here"""

    def __init__(self, numpy_module, cupy_module, **own):
        self._modules = numpy_module, cupy_module
        self.__dict__.update(own)

    def __getattr__(self, name):
        return _resolve(*self._modules, name)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _resolve(np, cupy, name)


def asarray(x, dtype=None):
    """The way from the host to the device"""
    return Array(np.array(x._x if isinstance(x, Array) else x, dtype=dtype))


array = asarray
erf = _function(scipy.special.erf, "erf")


def _irfft(X, n=None, axis=-1):
    """NumPy ignores imaginary parts in bins 0 and n/2, with cuFFT the result is undefined"""
    n = 2 * (X.shape[axis] - 1) if n is None else n
    x = np.moveaxis(_unwrap(X, "irfft"), axis, 0)
    ends = x[[0, n // 2] if n % 2 == 0 and n // 2 < len(x) else [0]]
    if np.abs(ends.imag).max() > 100 * np.finfo(x.dtype).eps * np.abs(x).max():
        raise ValueError("irfft: bins 0 and n/2 are to be real")
    return Array(np.fft.irfft(X._x, n, axis))


fft = _Namespace(np.fft, cupy and cupy.fft, irfft=_irfft)


def _solve(a, b):
    """NumPy's broadcasts stacks of matrices, CuPy's does not"""
    if b.ndim > 1 and a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"solve: {a.shape} and {b.shape} are not stacks alike")
    return Array(np.linalg.solve(_unwrap(a, "solve"), _unwrap(b, "solve")))


def _eig(a):
    raise TypeError("linalg.eig: CuPy has it only from 14 on; backend.eig is for all")


linalg = _Namespace(np.linalg, cupy and cupy.linalg, solve=_solve, eig=_eig, eigvals=_eig)


class Array:
    """A NumPy array in the place of one on the device"""

    __slots__ = ("_x",)
    __module__ = "strict"  # by which ref.backend.array_module finds the functions
    __array_ufunc__ = None  # NumPy's scalars leave operators to this class
    __hash__ = None

    def __init__(self, x):
        self._x = x

    def __getattr__(self, name):
        if name.startswith("__") or (cupy is not None and not hasattr(cupy.ndarray, name)):
            raise AttributeError(f"{name}: CuPy's arrays do not have it")
        if name in ("tolist", "tobytes", "tofile", "dump", "dumps"):
            raise TypeError(f"{name} copies to the host")
        found = getattr(self._x, name)
        return _function(found, name) if callable(found) else _wrap(found)

    def item(self):
        _called_by(backend.item)
        return self._x.item()

    def get(self):
        _called_by(backend.to_host)
        return self._x.copy()

    def __len__(self):
        return len(self._x)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        index = _index(index)
        if not any(i is ... for i in index):
            index = (*index, ...)  # so that one element is an array, a view, and no scalar
        return Array(self._x[index])

    def __setitem__(self, index, value):
        self._x[_index(index)] = _unwrap(value, "assignment")

    def _refuse(self, *args, **kwargs):
        raise TypeError("implicit conversion of an array on the device")

    __array__ = __bool__ = __int__ = __float__ = __complex__ = _refuse


def _called_by(function):
    if sys._getframe(2).f_code is not function.__code__:
        raise TypeError(f"a copy to the host goes through backend.{function.__name__}")


def _index(index):
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is ... or isinstance(i, (int, slice, Array)) for i in index):
        raise IndexError(f"an index is an integer, a slice or an array on the device, not {index}")
    return _unwrap(index, "index")


def _add_operators():
    def unary(f):
        return lambda self: _wrap(f(self._x))

    def binary(f):
        return lambda self, other: _wrap(f(self._x, _unwrap(other, f.__name__)))

    def reflected(f):
        return lambda self, other: _wrap(f(_unwrap(other, f.__name__), self._x))

    def in_place(f):
        def operate(self, other):
            f(self._x, _unwrap(other, f.__name__))
            return self

        return operate

    for name in ("neg", "pos", "abs", "invert"):
        setattr(Array, f"__{name}__", unary(getattr(operator, name)))
    for name in ("lt", "le", "eq", "ne", "gt", "ge"):
        setattr(Array, f"__{name}__", binary(getattr(operator, name)))
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
        setattr(Array, f"__{name}__", binary(getattr(operator, name)))
        setattr(Array, f"__r{name}__", reflected(getattr(operator, name)))
        if name != "matmul":
            setattr(Array, f"__i{name}__", in_place(getattr(operator, f"i{name}")))
    for name in ("and", "or", "xor"):
        setattr(Array, f"__{name}__", binary(getattr(operator, f"__{name}__")))
        setattr(Array, f"__r{name}__", reflected(getattr(operator, f"__{name}__")))


_add_operators()
