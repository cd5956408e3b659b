"""Compiling and launching <model>.cu, the CUDA C that stands beside this file.

A kernel takes a long long for every Python integer and a pointer for every array. Arrays are
C-contiguous and of the kernel's own precision: nothing is converted or checked on the way.
"""

import functools
import importlib
from pathlib import Path

REAL = {"float32": "float", "float64": "double"}  # what the macro REAL stands for in a .cu file


def source(model):
    """The text of <model>.cu"""
    return Path(__file__).with_name(f"{model}.cu").read_text(encoding="utf-8")


@functools.cache
def launcher(model, dtype):
    """launch(name, threads, *arguments) for the kernels of <model>.cu; dtype float32 or float64

    Compiled when first launched, once for each device, and kept on disk by CuPy.
    """
    cupy = importlib.import_module("cupy")
    module = cupy.RawModule(code=source(model), options=("-std=c++14", f"-DREAL={REAL[dtype]}"))
    kernel = functools.cache(module.get_function)

    def launch(name, threads, *arguments):
        block = 128 if threads >= 1 << 15 else 32  # a few threads, over many multiprocessors
        kernel(name)((-(-threads // block),), (block,), arguments)

    return launch
