"""Hostile case files through `python -m ref verify`: one sentence and exit code 1 for each, never a
traceback, a wait or memory beyond the file's size."""

import copy
import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ref import cases, files
from ref.__main__ import main
from ref.options import run_command

ROOT = Path(__file__).parents[1]
CASE = cases.make_case(
    "hope", "operator", {"d_model": 2, "d_state": 4, "conv": "causal"}, B=1, L=5, seed=1
)
CONFIG = CASE.settings
HUGE = 10**12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file that verifies"""
    path = tmp_path_factory.mktemp("whole") / "case.safetensors"
    cases.write_case(path, CASE)
    return path.read_bytes()


@pytest.fixture
def header(whole):
    return json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])


@pytest.fixture
def data(whole):
    return whole[8 + struct.unpack("<Q", whole[:8])[0] :]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "case.safetensors"


@pytest.fixture
def verify(capsys):
    """-> exit code, what is printed, in less than `seconds` of this process: it does not hang"""

    def run(path, seconds=30):
        capsys.readouterr()
        start = time.process_time()
        code = run_command(main, ["verify", str(path)], "python -m ref")
        assert time.process_time() - start < seconds
        out, err = capsys.readouterr()
        assert not err and code in (0, 1)
        assert out.startswith(f"{files.one_line(path)}: {'FAILED' if code else 'ok'}")
        assert len(out) < 5000 and out.replace("\n", "").isprintable()
        return code, out

    return run


@pytest.fixture
def refused(verify):
    """A file, or bytes that are written to one, gets a sentence -> it"""

    def run(path, content=None, seconds=30):
        if content is not None:
            path.write_bytes(content)
        code, out = verify(path, seconds)
        first, sentence, *rest = out.splitlines()
        assert code == 1 and first.endswith(": FAILED") and not rest
        assert sentence.endswith(".") and len(sentence) < 1000
        return sentence.strip()

    return run


def packed(header, data=b"", length=None):
    """A safetensors file of a header (an object, or bytes) and the data"""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(header, name, **entries):
    header = copy.deepcopy(header)
    header[name] |= entries
    return header


def with_case(header, text):
    """The header with another metadata `case`: a text, or what is written as JSON"""
    text = text if isinstance(text, str) else json.dumps(text)
    return header | {"__metadata__": {"case": text}}


def head_of(header):
    return json.loads(header["__metadata__"]["case"])


# Bytes


def test_the_file_itself_verifies(whole, path, verify):
    path.write_bytes(whole)
    assert verify(path)[0] == 0


def test_cut_anywhere(tmp_path, refused, path):
    large = cases.make_case("hope", "operator", CONFIG | {"d_model": 16}, B=4, L=40)
    cases.write_case(path, large)
    content = path.read_bytes()
    assert len(content) > 60_000
    for n in (*range(10), *range(0, len(content), 1024), len(content) - 1):
        assert refused(tmp_path / "cut", content[:n])


def test_every_byte_of_the_header_flipped(whole, data, path, verify):
    rng, codes = random.Random(0), []
    for i in range(len(whole) - len(data)):
        content = bytearray(whole)
        content[i] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        codes.append(verify(path)[0])
    assert codes.count(0) < 0.05 * len(codes)  # in the text `source` and where a space is a tab


def test_every_bit_of_the_length_flipped(whole, path, refused):
    length = struct.unpack("<Q", whole[:8])[0]
    for bit in range(64):
        refused(path, struct.pack("<Q", length ^ (1 << bit)) + whole[8:])


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32, 2**63, 2**63 - 1, 2**64 - 1])
def test_lengths_of_the_header(length, whole, path, refused):
    assert "not a whole safetensors file" in refused(path, struct.pack("<Q", length) + whole[8:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])
def test_numbers_beyond_measure(value, path, verify):
    for name in CASE.tensors:
        t = CASE.tensors[name].copy()
        t.flat[0] = value
        cases.write_case(path, dataclasses.replace(CASE, tensors=CASE.tensors | {name: t}))
        code, out = verify(path)
        assert code == 1 and (name in out or np.isfinite(value))


# Headers


@pytest.mark.parametrize("number", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3"])
def test_types_that_have_no_arrays(number, header, data, path, refused):
    bits = {"4": 4, "6": 6, "8": 8}[number[1]]
    own = {"dtype": number, "shape": [12 * 8 // bits], "data_offsets": [len(data), len(data) + 12]}
    sentence = refused(path, packed(header | {"in.x2": own}, data + bytes(12)))
    assert f"in.x2 is of type {number}" in sentence


@pytest.mark.parametrize("number", ["I4", "X", "", None, 3, ["F64"], "f64", "F64 "])
def test_types_that_there_are_not(number, header, data, path, refused):
    refused(path, packed(changed(header, "in.x", dtype=number), data))


@pytest.mark.parametrize("number", ["C64", "I64", "U64"])
def test_other_types_of_the_same_size(number, header, data, path, refused):
    refused(path, packed(changed(header, "in.x", dtype=number), data))


@pytest.mark.parametrize("name", ["param.log_dt", "dout.y", "out.y", "grad.in.x"])
def test_a_complex_tensor_is_none_of_the_format(name, header, data, path, refused):
    sentence = refused(path, packed(changed(header, name, dtype="C64"), data))
    assert f"{name} is of type complex64" in sentence


SHAPES = [[2**62], [2**63, 2], [2**64], [-1, 5, 2], [-1, -5, 2], [0], [], [1, 5, 2.0], [True, 5, 2]]
SHAPES += [["1", 5, 2], [[1], 5, 2], None, 10, "x", {"a": 1}, [0, 2**62, 2**62], [HUGE, 5, 2]]
SHAPES += [[1] * 65 + [5, 2], [1] * 10_000 + [5, 2], [1, 5, 2, 1], [5, 2], [2, 5]]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape)[:20])
def test_shapes(shape, header, data, path, refused):
    refused(path, packed(changed(header, "in.x", shape=shape), data))


OFFSETS = [[0, 2**63], [2**64 - 1, 2**64 - 1], [10**30, 10**31], [-8, 72], [80, 0], [0, 80, 90]]
OFFSETS += [[0], [], None, "x", [0.0, 80.0], [8, 88], [0, 79], {"a": 0}, [0, 80]]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_offsets(offsets, header, data, path, refused):
    refused(path, packed(changed(header, "in.x", data_offsets=offsets), data))


def test_gaps_and_more(header, data, path, refused):
    moved = {
        n: t if n == "__metadata__" else t | {"data_offsets": [o + 8 for o in t["data_offsets"]]}
        for n, t in header.items()
    }
    refused(path, packed(moved, bytes(8) + data))
    refused(path, packed(header, data + bytes(8)))
    none = {"dtype": "F64", "shape": [0, 3], "data_offsets": [len(data), len(data)]}
    assert "in.none is not an input" in refused(path, packed(header | {"in.none": none}, data))


def test_offsets_out_of_order_are_another_order_of_the_same(header, data, path, verify):
    """Descending: the data of the first name come last, which the format allows"""
    moved, parts, at = {"__metadata__": header["__metadata__"]}, [], 0
    for name in sorted(header.keys() - {"__metadata__"}, reverse=True):
        first, last = header[name]["data_offsets"]
        parts.append(data[first:last])
        moved[name] = header[name] | {"data_offsets": [at, at := at + last - first]}
    path.write_bytes(packed(dict(sorted(moved.items())), b"".join(parts)))
    assert verify(path)[0] == 0


def test_a_name_that_is_there_twice(header, data, path, refused):
    text = json.dumps(header).encode()
    first = text.index(b'"dout.y"')
    entry = text[first : text.index(b"}", first) + 1]
    again = entry.replace(b"dout.y", b"dout.\\u0079")
    for more in (entry, again, entry.replace(b"[1, 5, 2]", b"[5, 1, 2]")):
        sentence = refused(path, packed(text.replace(entry, entry + b", " + more), data))
        assert sentence.endswith("'dout.y' is there twice.")
    for old, new in (
        (b'"shape": [1, 5, 2]', b'"shape": [1, 5, 2], "shape": [1, 5, 2]'),
        (b'{"case": ', b'{"case": "{}", "case": '),
        (b'{"__metadata__"', b'{"__metadata__": {}, "__metadata__"'),
    ):
        assert old in text
        refused(path, packed(text.replace(old, new, 1), data))


HEADERS = [b"", b" ", b"[]", b"null", b"3", b'"x"', b"{}", b"{", b"{}{}", b"\x00", b"\xff\xfe"]
HEADERS += [b"[" * 100_000, b'{"a":' * 100_000, b'{"__metadata__":' * 100_000, b'{"x": {}}']
HEADERS += [b'{"__metadata__": 3}', b'{"__metadata__": []}', b'{"__metadata__": {"case": 3}}']
HEADERS += [b'{"__metadata__": {"case": null}}', b'{"__metadata__": null}', b'{"a": ' + b"1" * 9999]


@pytest.mark.parametrize("text", HEADERS, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("filled", [True, False])
def test_headers(text, filled, data, path, refused):
    refused(path, packed(text, data if filled else b""))


def test_headers_that_are_no_utf8(header, data, path, refused):
    text = json.dumps(header).encode()
    for name in (b"\xff\xfe.y!", b"\xc3.y12", b"\\ud800"):
        refused(path, packed(text.replace(b"dout.y", name, 1), data))


def test_headers_of_spaces(path, refused):
    assert "has a header of" in refused(path, packed(b" " * 100_000_000))
    refused(path, packed(b" " * files.LARGEST_HEADER))
    refused(path, packed(b"{}" + b" " * (files.LARGEST_HEADER - 2)))


@pytest.mark.parametrize("name", ["in.\n\x1b[31m", "in." + "x" * 10**6, "w" * 10**6, "", "out.\r"])
def test_names(name, header, data, path, verify):
    own = {"dtype": "F64", "shape": [0, 3], "data_offsets": [len(data), len(data)]}
    path.write_bytes(packed(header | {name: own}, data))
    assert verify(path)[0] == 1


@pytest.mark.parametrize("prefix", ["in.", "param.", "dout.", "out.", "grad.param.", "w"])
def test_a_hundred_thousand_tensors(prefix, path, header, data, verify):
    n = 100_000 if prefix in ("param.", "out.") else 1000  # the others take the same way
    more = {
        f"{prefix}{i}": {
            "dtype": "F64",
            "shape": [1],
            "data_offsets": [len(data) + 8 * i, len(data) + 8 * i + 8],
        }
        for i in range(n)
    }
    path.write_bytes(packed(header | more, data + bytes(8 * n)))
    code, out = verify(path, seconds=60)
    assert code == 1
    assert (f"{n - 5} more tensors" in out) == (prefix in ("out.", "grad.param."))


# Metadata

NO_CASES = [
    "",
    "[]",
    "3",
    "null",
    '"x"',
    "true",
    "{}",
    "{",
    "NaN",
    "\x00",
    "[" * 10**5,
    "1" * 10**5,
]
NO_CASES += ['{"format":' * 5000, '{"format": ' + "1" * 5000 + "}"]


@pytest.mark.parametrize("text", NO_CASES, ids=lambda text: ascii(text[:20]))
def test_case_that_is_no_case(text, header, data, path, refused):
    assert "is no case file" in refused(path, packed(with_case(header, text), data))
    both = header | {"__metadata__": header["__metadata__"] | {"tolerance": text}}
    if text != "{}":
        refused(path, packed(both, data))


VALUES = [
    None,
    3,
    [],
    {},
    True,
    1.5,
    "",
    [1],
    {"a": 1},
    "x" * 10**7,
    "\n\x1b[31m",
    "\ud800",
    10**40,
]
VALUES += [float("nan"), {"d_model": [1]}, {"d_model": None}, {"x" * 10**6: 1}, "l2t"]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:20])
def test_fields_of_another_kind(value, header, data, path, refused, verify):
    for field in ("format", "model", "part", "precision", "config"):
        head = head_of(header) | {field: value}
        path.write_bytes(packed(with_case(header, head), data))
        assert verify(path)[0] == 1
    head = head_of(header)
    path.write_bytes(packed(with_case(header, head | {"source": value}), data))
    assert verify(path)[0] == 0
    path.write_bytes(packed(with_case(header, head | {"tolerance": value}), data))
    allowed = isinstance(value, dict) and all(isinstance(v, int) for v in value.values())
    assert verify(path)[0] == int(bool(value) and not allowed)


@pytest.mark.parametrize(
    "allowed", ["x", None, [], {}, -1, float("nan"), float("inf"), 10**400], ids=str
)
def test_tolerances(allowed, header, data, path, refused):
    head = head_of(header) | {"tolerance": {"out.y": allowed}}
    refused(path, packed(with_case(header, head), data))
    own = {"tolerance": json.dumps({"out.y": allowed})}
    refused(path, packed(header | {"__metadata__": header["__metadata__"] | own}, data))


SIZES = [HUGE, 2**63, 10**400, -1, 0, 1.5, float("nan"), None, []]


@pytest.mark.parametrize(
    "model", ["hope", "s4", "hyena", "longhorn", "mamba", "tnn", "l2t-student"]
)
def test_settings_beyond_measure(model, path, verify):
    part = "mixer" if model == "l2t-student" else "operator"
    case = cases.make_case(model, part, {"d_model": 2}, B=1, L=4)
    config = cases.module_of(model).Config
    for field in dataclasses.fields(config):
        for value in SIZES if field.type in ("int", int) else SIZES[2:7]:
            own = case.settings | {field.name: value}
            cases.write_case(path, dataclasses.replace(case, settings=own))
            code, out = verify(path)
            assert code == 0 or out.count("\n") == 2 or "tensors agree" in out


@pytest.mark.parametrize(
    "model, part, name",
    [("hope", "network", n) for n in ("n_layers", "d_output", "positions", "embedding_std")]
    + [("s4", "init", "d_state"), ("s4", "operator", "l_max"), ("etsc", "solve", "d_model")]
    + [("l2t", "features", n) for n in ("n_layers", "vocab_size", "context_length")],
)
def test_settings_of_other_parts(model, part, name, path, verify):
    case = cases.make_case(model, part, {} if model in cases.OWN else {"d_model": 2}, B=2, L=4)
    for value in SIZES:
        cases.write_case(path, dataclasses.replace(case, settings=case.settings | {name: value}))
        verify(path)


def test_a_part_of_another_model(path, verify):
    for model in ("mamba", "s4d", "etsc", "l2t", "transformer", "mumba"):
        cases.write_case(path, dataclasses.replace(CASE, model=model))
        assert verify(path)[0] == 1
    for part in ("scan", "network", "mixer", "init", "solve"):
        cases.write_case(path, dataclasses.replace(CASE, part=part))
        assert verify(path)[0] == 1


# Things that are no files


def test_no_files(tmp_path, refused):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "empty").touch()
    for name, sentence in (
        ("", "is a folder or a device"),
        ("fifo", "is a folder or a device"),
        ("loop", "Cannot read"),
        ("dangling", "There is no file"),
        ("none", "There is no file"),
        ("empty", "not a whole safetensors file"),
        ("x" * 300, "Cannot read"),
    ):
        assert sentence in refused(tmp_path / name)
    for device in ("/dev/null", "/dev/zero", "/dev/full", "/dev/stdin"):
        if Path(device).exists() and not Path(device).is_file():
            assert "is a folder or a device" in refused(Path(device))
    if Path("/proc/self/status").exists():
        refused(Path("/proc/self/status"))


def test_no_permission(whole, path, refused):
    path.write_bytes(whole)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "Cannot read" in refused(path) and "Permission denied" in refused(path)


def test_the_other_files_are_checked_all_the_same(whole, tmp_path, ref):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(whole)
    bad.write_bytes(whole[:-1])
    out, err = ref("verify", "--quiet", bad, good, tmp_path, expect=1)
    assert not err and [line.split(":")[0] for line in out.splitlines() if ": " in line][:1]
    assert f"{good}: ok" in out and f"{bad}: FAILED" in out and f"{tmp_path}: FAILED" in out


# Memory

CHILD = """
import resource, sys
from ref.__main__ import main
from ref.options import run_command
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
run_command(main, ["verify", "--quiet", sys.argv[1]], "ref")
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (4 << 30)  # room for the mapped file, not for a copy
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[2:]:
    before = most()
    assert run_command(main, ["verify", "--quiet", path], "ref") == 1
    print("MiB", most() - before)
"""


def test_memory(whole, header, data, tmp_path):
    """In MiB beyond what a good file takes; the files are of 16 MiB, or of 3 GiB of nothing"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("there is no /proc to read the child's size from")
    paths = {name: tmp_path / name for name in ("good", "spaces", "sparse", "length", "wide")}
    paths["good"].write_bytes(whole)
    paths["spaces"].write_bytes(packed(b" " * files.LARGEST_HEADER))
    entry = {"dtype": "F64", "shape": [3 << 27], "data_offsets": [len(data), len(data) + (3 << 30)]}
    sparse = packed(header | {"in.x2": entry}, data)
    paths["sparse"].write_bytes(sparse)
    os.truncate(paths["sparse"], len(sparse) + (3 << 30))
    paths["length"].write_bytes(struct.pack("<Q", 2**39) + whole[8:])
    os.truncate(paths["length"], 2**40)
    paths["wide"].write_bytes(packed(changed(header, "in.x", shape=[HUGE, 5, 2]), data))

    command = [sys.executable, "-c", CHILD, *map(str, paths.values())]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and not run.stderr, run.stderr
    grown = [int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("MiB")]
    assert len(grown) == len(paths) - 1 and max(grown) < 64, run.stdout
    assert "out of memory" in run.stdout and run.stdout.count("FAILED") == len(grown)
