"""Files that are whole or not there: atomic writing, and tensors with their metadata."""

import contextlib
import hashlib
import json
import os
import secrets

from ref import Error


def write_atomically(path, content):
    """Write bytes under another name in the same folder, then rename.   Error: the disk refuses"""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise Error(f"Cannot write {path}: {e.strerror or e}.") from e
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def check_writable(folder):
    """Error when no file can be made in folder, or in the nearest folder above it that exists"""
    existing = folder
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    probe = existing / f".{secrets.token_hex(8)}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as e:
        raise Error(f"Cannot write {folder}: {e.strerror or e}.") from e


def remove_leftovers(folder):
    """Delete what write_atomically leaves when the process is killed in it"""
    for leftover in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def read_json(path):
    """The object in a JSON file.   Error: missing or not JSON"""
    try:
        return json.loads(path.read_text())
    except OSError as e:
        raise Error(f"Cannot read {path}: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise Error(f"Cannot read {path}: it is not JSON.") from e


def checksum(tensors, text=""):
    """sha256 of a text and of {name: array}: names, number types, shapes and content"""
    import numpy as np

    digest = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {t.shape}\n".encode())
        digest.update(np.ascontiguousarray(t))
    return digest.hexdigest()


def write_tensors(path, tensors, metadata):
    """A safetensors file of NumPy arrays (made contiguous) and metadata {str: str}, atomically"""
    import numpy as np
    from safetensors.numpy import save

    write_atomically(
        path, save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata)
    )


@contextlib.contextmanager
def opened(path):
    """A safetensors file, to read tensors from by name.   Error: missing, cut, or another format

    bfloat16 and float16 come as ml_dtypes' and NumPy's types of that name.
    """
    import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError as e:
        raise Error(f"There is no file {path}.") from e
    except (OSError, SafetensorError, TypeError, ValueError) as e:
        raise Error(f"{path} is not a whole safetensors file: {e}.") from e


def read_tensors(path):
    """-> tensors {name: array}, metadata {str: str}.   Error: as opened"""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
