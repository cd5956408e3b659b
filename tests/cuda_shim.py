"""The .cu files of ref/kernels as C++: `launcher` stands in for the one of ref.kernels.cuda."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ref.kernels import cuda

BLOCK = 32
FLAGS = ["-O2", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(')


def kernels(model):
    """The names of the kernels in <model>.cu"""
    return KERNEL.findall(cuda.source(model))


@functools.cache
def library(model, dtype):
    """<model>.cu as a loaded library.   Skips the test where there is no compiler"""
    if not shutil.which("g++"):
        pytest.skip("no g++ here to compile the CUDA kernels as C++")
    header = Path(__file__).with_name("cuda_shim.h").read_text(encoding="utf-8")
    exports = [f"EXPORT({name})" for name in kernels(model)]
    with tempfile.TemporaryDirectory() as folder:
        code, binary = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        code.write_text("\n".join([header, cuda.source(model), *exports]), encoding="utf-8")
        command = ["g++", *FLAGS, f"-DREAL={cuda.REAL[dtype]}", "-o", binary, code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(binary))


def launcher(model, dtype, reverse=False):
    """As ref.kernels.cuda.launcher, for NumPy arrays; checks their types, which CuPy does not.

    reverse: the last thread of the grid runs first.
    """

    def launch(name, threads, *arguments):
        codes = ctypes.create_string_buffer(64)
        getattr(library(model, dtype), f"signature_{name}")(codes)
        given = "".join("q" if isinstance(x, int) else x.dtype.char for x in arguments)
        assert given == codes.value.decode(), f"{name} takes {codes.value.decode()}, got {given}"
        arrays = [x for x in arguments if not isinstance(x, int)]
        assert all(x.flags.c_contiguous for x in arrays), f"{name} takes contiguous arrays"
        values = [
            ctypes.c_longlong(x) if isinstance(x, int) else ctypes.c_void_p(x.ctypes.data)
            for x in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        kernel = getattr(library(model, dtype), f"launch_{name}")
        kernel(-(-threads // BLOCK), BLOCK, ctypes.c_bool(reverse), pointers)

    return launch
