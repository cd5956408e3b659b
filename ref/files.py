"""Files that are whole or not there: atomic writing, and tensors with their metadata."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat

from ref import Error

LARGEST_HEADER = 1 << 24  # bytes; 100,000 tensors take half of it
# safetensors' number types that have NumPy arrays, and their bytes
NUMBERS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
NUMBERS |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}


def one_line(text, most=400):
    """A text from somewhere else as it can be printed: cut, control characters escaped"""
    text = str(text)
    text = text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    """A safetensors file, to read tensors from by name.

    bfloat16 and float16 come as ml_dtypes' and NumPy's types of that name.   Error: missing, not
    readable, a folder or device, cut, another format, a name that is there twice
    """
    import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
    from safetensors import SafetensorError, safe_open

    _check_readable(path)
    try:
        with safe_open(path, framework="numpy") as file:
            _check_names(path)
            yield file
    except (OSError, SafetensorError, TypeError, ValueError) as e:
        raise Error(f"{one_line(path)} is not a whole safetensors file: {one_line(e)}.") from e


def read_tensors(path):
    """-> tensors {name: array}, metadata {str: str}.   Error: as opened, or of a type that NumPy
    does not have;   MemoryError"""
    with opened(path) as file:
        tensors = {name: _tensor(path, file, name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _tensor(path, file, name):
    import numpy as np

    known = file.get_slice(name)
    number, size = known.get_dtype(), math.prod(known.get_shape())
    if number not in NUMBERS:
        names = ", ".join(NUMBERS)
        raise Error(f"{path}: {one_line(name)} is of type {number}; this program reads {names}.")
    np.empty(size * NUMBERS[number], "uint8")  # MemoryError, where safetensors would panic
    return file.get_tensor(name)


def _check_readable(path):
    """Error: no file, not to be read, or one whose opening could wait for ever"""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Error(f"{one_line(path)} is a folder or a device, and not a safetensors file.")
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            left = os.stat(path).st_size - 8
    except FileNotFoundError as e:
        raise Error(f"There is no file {one_line(path)}.") from e
    except (OSError, ValueError) as e:
        text = getattr(e, "strerror", None) or e
        raise Error(f"Cannot read {one_line(path)}: {text}.") from e
    if size > LARGEST_HEADER and size <= left:
        raise Error(f"{path} has a header of {size} bytes; this program reads {LARGEST_HEADER}.")


def _check_names(path):
    """Error: two entries of the header have one name, of which safetensors takes the last"""

    def unique(pairs):
        if len(pairs) > len(names := {name for name, _ in pairs}):
            twice = next(n for n, _ in pairs if n not in names or names.remove(n))
            raise Error(f"{path}: {one_line(twice)!r} is there twice.")

    with open(path, "rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique)
