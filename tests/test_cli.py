"""`python -m ref` as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = sorted(str(p) for p in (ROOT / "tests" / "golden").glob("hope_*.safetensors"))


def ref(*arguments, expect=0, **environment):
    run = subprocess.run(
        [sys.executable, "-m", "ref", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == expect, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout + run.stderr


def test_verify_finishes_all_files(tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(GOLDEN[0]).read_bytes()[:1000])
    out = ref("verify", cut, GOLDEN[0], tmp_path / "none", GOLDEN[1], expect=1)
    assert out.count(": ok") == 2 and out.count("FAILED") == 2
    assert "2 of 4 files agree" in out
    assert "rounding alone" not in out
    assert ref("verify", *GOLDEN).count("ok    ") == 13
    assert "ok    " not in ref("verify", "--quiet", *GOLDEN)


def test_case_then_verify(tmp_path):
    path = tmp_path / "c.safetensors"
    for options in (
        ("--part", "mixer", "--conv", "causal", "--d-model", 5, "-L", 13, "-B", 1),
        ("--part", "block", "--bidirectional", "--norm", "batch", "--precision", "bfloat16"),
        ("--part", "operator", "--bidirectional", "--layout", "published", "--seed", 3),
        ("--part", "network", "--precision", "float32"),
    ):
        ref("case", "--model", "hope", *options, "-o", path)
        assert ": ok" in ref("verify", path)


def test_wrong_usage(tmp_path):
    path = tmp_path / "c.safetensors"
    assert "mamba" in ref("case", "--model", "mamba", "--part", "scan", "-o", path, expect=2)
    for arguments in (
        ("verify",),
        ("verfy", "x"),
        ("case", "--model", "hope", "-o", path),
        ("case", "--model", "hope", "--part", "mixer", "--order", 2, "-o", path),
        ("plot", "--what", "hankel"),
        ("gradcheck", "mumba"),
        ("info",),
    ):
        ref(*arguments, expect=2)
    for arguments in (
        ("case", "--model", "hope", "--part", "scan", "-o", path),
        ("case", "--model", "hope", "--part", "mixer", "--precision", "float8", "-o", path),
        ("case", "--model", "hope", "--part", "mixer", "--conv", "cyclic", "-o", path),
        ("case", "--model", "hope", "--part", "mixer", "-o", path / "below" / "file"),
        ("plot", tmp_path / "no-run", "--what", "curves"),
        ("plot", "--model", "hope", "--what", "curves"),
        ("plot", "--model", "hope", "--conv", "identity", "--what", "kernel"),
    ):
        if (
            arguments[1:4] == ("--model", "hope", "--part")
            and arguments[-1] == path / "below" / "file"
        ):
            path.write_text("")
        out = ref(*arguments, expect=1)
        assert out.startswith("Error: ") and out.count("\n") == 1, out


def test_help_has_examples():
    assert "Example" in ref("--help")
    for command in ("verify", "case", "gradcheck", "info", "plot", "bench"):
        assert f"Example: python -m ref {command}" in " ".join(ref(command, "--help").split())


def test_gradcheck_reports_every_pair():
    out = ref("gradcheck")
    assert "FAIL" not in out and "nn layer_norm" in out and "hope block" in out
    assert "FAIL" not in ref("gradcheck", "nn", REF_PLAIN="1")


def test_info():
    out = ref("info", "--model", "hope", "--conv", "causal", "--d-model", 16, "--d-state", 12)
    assert "parameters: 800" in out and "decoding state of a sequence: 96 numbers" in out
    assert "no recurrent step" in ref("info", "--model", "hope")
    assert "operations per token" in ref("info", "--model", "hope", "--conv", "identity")


def test_curves_of_a_killed_run(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: nothing is drawn")
    for lines in ("", '{"step": 1, "los', '{"step": 1, "loss": 2.0, "accuracy": 0.5}\n{"st'):
        (tmp_path / "metrics.jsonl").write_text(lines)
        ref("plot", tmp_path, "--what", "curves")
        assert (tmp_path / "curves.png").stat().st_size > 1000


def test_bench():
    out = ref("bench", "hope", "--rounds", 1)
    assert "BLAS core type" in out and out.count(" ms [") == 3 and "memory x" in out
    assert "CUDA" in ref("bench", "--device", "cuda", expect=1)


@pytest.mark.parametrize("what", ["kernel", "hankel", "matrix"])
def test_plots_of_a_model(what, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: nothing is drawn")
    for options in (("--conv", "causal"), ("--bidirectional",)):
        ref("plot", "--model", "hope", "--what", what, "-L", 32, "-o", tmp_path / "p.png", *options)
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
