"""The case format as the README documents it: a reader and a writer made from that section alone,
in Python without any library, and its C++ compiled."""

import json
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ref import cases

README = Path(__file__).parents[1] / "README.md"
SECTION = re.search(r"\n### Other languages\n(.*?)(?=\n##|\Z)", "\n" + README.read_text(), re.S)
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
pytestmark = pytest.mark.skipif(
    SECTION is None, reason="README.md has no section 'Other languages' yet"
)


def block(marker):
    """The text of the code block below <!-- marker -->"""
    return re.search(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```", SECTION[1], re.S)[1]


# The reader: what the block `format` says, and nothing else

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
CODES = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i"}


def read(path):
    """-> {name: (type, shape, list of numbers)}, the case's own object"""
    content = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + n].decode("utf-8")), content[8 + n :]
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        numbers = decoded(entry["dtype"], data[first:end])
        assert len(numbers) == math.prod(entry["shape"])
        tensors[name] = entry["dtype"], entry["shape"], numbers
    return tensors, json.loads(metadata["case"])


def decoded(kind, content):
    if kind == "BF16":
        pairs = (content[i : i + 2] for i in range(0, len(content), 2))
        return [struct.unpack("<f", b"\0\0" + pair)[0] for pair in pairs]
    return list(struct.unpack(f"<{len(content) // SIZES[kind]}{CODES[kind]}", content))


def same(path):
    """Every tensor, bit by bit, and the metadata are those of the program's own reader"""
    tensors, head = read(path)
    case = cases.read_case(path)
    assert tensors.keys() == case.tensors.keys()
    for name, (kind, shape, numbers) in tensors.items():
        t = case.tensors[name]
        assert tuple(shape) == t.shape
        assert numbers == t.astype("int64" if kind[0] == "I" else "float64").ravel().tolist(), name
    assert (head["model"], head["part"]) == (case.model, case.part)
    assert (head["precision"], head["config"]) == (case.precision, case.settings)
    assert head["format"] == cases.FORMAT
    return {kind for kind, _, _ in tensors.values()}


@pytest.mark.parametrize(
    "precision, kind",
    [("float64", "F64"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")],
)
@pytest.mark.parametrize("model, part", [("hope", "network"), ("mamba", "scan"), ("s4", "init")])
def test_reads_what_is_written(model, part, precision, kind, tmp_path):
    settings = {"d_model": 3, "d_state": 4}
    cases.write_case(
        tmp_path / "c", cases.make_case(model, part, settings, L=7, precision=precision)
    )
    assert same(tmp_path / "c") - {"I64"} == {kind}
    for word in (kind, f'"{cases.FORMAT}"', precision, "in.*", "grad.param.*"):
        assert word in block("format")


@pytest.mark.skipif(not GOLDEN, reason="the golden cases are not here")
def test_reads_the_golden_cases():
    kinds = set()
    for path in GOLDEN:
        if path.stat().st_size < 300_000:
            kinds |= same(path)
    assert kinds == {"F64", "I64"}


def test_what_is_written_from_the_document_verifies(tmp_path, ref):
    """A header and data put together by hand, in another order and with spaces between"""
    cases.write_case(tmp_path / "c", cases.make_case("mamba", "scan", {"d_model": 3}, L=7))
    tensors, head = read(tmp_path / "c")
    header, data = {}, b""
    for name, (kind, shape, numbers) in sorted(tensors.items(), reverse=True):
        content = struct.pack(f"<{len(numbers)}{CODES[kind]}", *numbers)
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"data_offsets": offsets, "shape": shape, "dtype": kind}
        data += content
    header["__metadata__"] = {"case": json.dumps(head, indent=1)}
    text = json.dumps(header, indent=2).encode()
    (tmp_path / "d").write_bytes(struct.pack("<Q", len(text)) + text + data)
    out, _ = ref("verify", tmp_path / "d")
    assert ": ok" in out


# C++

MAIN = """
int main(int argc, char** argv) {
  std::vector<float> x = read(argv[1], argv[2]);
  for (float v : x) std::printf("%a\\n", v);
  if (argc > 3) { for (float& v : x) v += std::stof(argv[3]); write(argv[1], argv[2], x); }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Of the two blocks: print a tensor, and with a number add it and write the tensor back"""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "case.cpp").write_text(block("c++") + block("c++ back") + MAIN)
    strict = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
    command = [compiler, *strict, "case.cpp", "-o", "case"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return folder / "case"


def test_cpp_reads_every_tensor_and_writes_one(program, tmp_path, ref):
    path = tmp_path / "c"
    case = cases.make_case("mamba", "mixer", {"d_model": 3, "d_state": 4}, precision="float32")
    cases.write_case(path, case)
    before = path.read_bytes()

    def run(*arguments):
        command = [program, path, *arguments]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return [float.fromhex(line) for line in out.split()]

    for name, t in case.tensors.items():
        assert run(name) == t.ravel().tolist(), name
    for name in ("out", "none", "out."):
        with pytest.raises(subprocess.CalledProcessError):
            run(name)
    cases.write_case(tmp_path / "d", cases.make_case("mamba", "mixer", {"d_model": 3}))
    with pytest.raises(subprocess.CalledProcessError):  # float64
        subprocess.run([program, tmp_path / "d", "out.y"], capture_output=True, check=True)
    run("out.y", "0")
    assert path.read_bytes() == before
    ref("verify", path)
    run("out.y", "0.5")
    out, _ = ref("verify", path, expect=1)
    assert "FAIL  out.y" in out and out.count("FAIL  ") == 1
    wrong = cases.read_case(path).tensors["out.y"]
    assert np.abs(wrong - case.tensors["out.y"] - 0.5).max() < 1e-6
