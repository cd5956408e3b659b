"""CUDA C as C++: `RawModule` stands in for CuPy's, for kernels on strict arrays."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

FLAGS = ["-O2", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(')


def kernels(code):
    """The names of the kernels in CUDA source"""
    return KERNEL.findall(code)


@functools.cache
def library(code, macros):
    """CUDA source as a loaded library.   Skips the test where there is no compiler"""
    if not shutil.which("g++"):
        pytest.skip("no g++ here to compile the CUDA kernels as C++")
    header = Path(__file__).with_name("cuda_shim.h").read_text(encoding="utf-8")
    exports = [f"EXPORT({name})" for name in kernels(code)]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        source.write_text("\n".join([header, code, *exports]), encoding="utf-8")
        command = ["g++", *FLAGS, *macros, "-o", binary, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(binary))


class RawModule:
    """As cupy.RawModule, and with the check of the arguments' types that CuPy does not make"""

    launched = ()  # names of the kernels so far
    reverse = False  # the last thread of a grid runs first

    def __init__(self, *, code, options):
        self.library = library(code, tuple(x for x in options if x.startswith("-D")))

    def get_function(self, name):
        return functools.partial(self.launch, name)

    def launch(self, name, grid, block, arguments):
        arguments = [x if isinstance(x, int) else x._x for x in arguments]
        codes = ctypes.create_string_buffer(64)
        getattr(self.library, f"signature_{name}")(codes)
        given = "".join("q" if isinstance(x, int) else x.dtype.char for x in arguments)
        assert given == codes.value.decode(), f"{name} takes {codes.value.decode()}, got {given}"
        arrays = [x for x in arguments if not isinstance(x, int)]
        assert all(x.flags.c_contiguous for x in arrays), f"{name} takes contiguous arrays"
        values = [
            ctypes.c_longlong(x) if isinstance(x, int) else ctypes.c_void_p(x.ctypes.data)
            for x in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        kernel = getattr(self.library, f"launch_{name}")
        kernel(*grid, *block, ctypes.c_bool(self.reverse), pointers)
        RawModule.launched = {*RawModule.launched, name}
