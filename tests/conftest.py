"""What every test shares."""

import numpy as np
import pytest

from ref import backend


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is filled with NaN, so that an element that a kernel forgets is seen"""
    lend = backend.empty

    def empty(shape, dtype):
        x = lend(shape, dtype)
        if x.dtype.kind in "fc":
            x.fill(np.nan)
        return x

    monkeypatch.setattr(backend, "empty", empty)
    for name in ("nn", "etsc", "hope", "longhorn", "mamba", "s4", "s4d", "transformer"):
        module = pytest.importorskip(f"ref.kernels.{name}")
        if hasattr(module, "empty"):
            monkeypatch.setattr(module, "empty", empty)


@pytest.fixture(scope="module")
def one_torch_thread():
    """PyTorch's waiting threads would spin against ours"""
    torch = pytest.importorskip("torch", reason="torch is not installed (the extra `peers`)")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain(monkeypatch):
    """A context that forces the readable form"""

    def run(f, *args, **kwargs):
        with monkeypatch.context() as m:
            m.setenv("REF_PLAIN", "1")
            return f(*args, **kwargs)

    return run


@pytest.fixture
def ref(capsys):
    """Run `python -m ref ARGUMENTS` in this process -> stdout, stderr"""
    from ref.__main__ import main
    from ref.options import run_command

    threads = backend.threads()

    def run(*arguments, expect=0):
        capsys.readouterr()
        assert run_command(main, [*map(str, arguments)], "python -m ref") == expect
        captured = capsys.readouterr()
        return captured.out, captured.err

    yield run
    backend.set_threads(threads)


def error(a, b):
    """Largest deviation of a from b over b's largest magnitude"""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / (np.abs(b).max() or 1.0)


def idx(array):
    """The bytes of a file in MNIST's format"""
    header = b"".join(n.to_bytes(4, "big") for n in (0x0800 + array.ndim, *array.shape))
    return header + array.astype(np.uint8).tobytes()
