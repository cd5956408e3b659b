"""`python -m ref` as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ref import Error

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
    assert "mumba" in ref("case", "--model", "mumba", "--part", "scan", "-o", path, expect=2)
    for arguments in (
        ("verify",),
        ("verfy", "x"),
        ("case", "--model", "hope", "-o", path),
        ("case", "--model", "hope", "--part", "mixer", "--order", 2, "-o", path),
        ("plot", "--what", "hankel"),
        ("gradcheck", "mumba"),
        ("info",),
        (),
        ("info", "--model", "s4d", "--model", "s4", "--init", "legs"),
        ("info", "--model", "s4", "--d-state", 3),
        ("case", "--model", "hope", "--part", "mixer", "--conv", "cyclic", "-o", path),
        ("plot", "--model", "transformer", "--n-heads", 3, "--what", "matrix"),
    ):
        ref(*arguments, expect=2)
    for arguments in (
        ("case", "--model", "hope", "--part", "scan", "-o", path),
        ("case", "--model", "hope", "--part", "mixer", "--precision", "float8", "-o", path),
        ("case", "--model", "s4", "--part", "mixer", "--l-max", 8, "-L", 9, "-o", path),
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
    for command in ("verify", "case", "gradcheck", "info", "plot", "generate", "bench"):
        assert f"Example: python -m ref {command}" in " ".join(ref(command, "--help").split())


def test_gradcheck_reports_every_pair():
    out = ref("gradcheck", "nn", "hope")
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


def test_models_side_by_side(tmp_path):
    plots = pytest.importorskip("ref.plots", reason="matplotlib is not installed")
    models, settings = ("hope", "s4", "s4d"), {"d_model": 3, "d_state": 8, "init": "legs"}
    layers = plots.initial_layers(models, settings, 20, 0)
    assert list(layers) == [
        "hope at initialisation, d_model 3, d_state 8",
        "s4 at initialisation, d_model 3, d_state 8",
        "s4d at initialisation, d_model 3, d_state 8, init legs",
    ]
    assert layers["s4 at initialisation, d_model 3, d_state 8"][2].l_max == 20
    path = tmp_path / "p.png"
    for what in ("hankel", "kernel"):
        plots.draw(what, None, models, settings, 20, 0, path)
        assert path.read_bytes()[:4] == b"\x89PNG"
    plots.draw("matrix", None, ("transformer", "s4"), {"d_model": 4}, 20, 0, path)
    with pytest.raises(Error, match="no kernel to show"):
        plots.draw("kernel", None, ("transformer",), {}, 20, 0, path)


def test_plots_of_a_folder_that_is_no_whole_run(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: nothing is drawn")
    for content in ("{}", "[1, 2]", '{"model": "s4"}'):
        (tmp_path / "config.json").write_text(content)
        out = ref("plot", tmp_path, "--what", "kernel", expect=1)
        assert "config.json" in out
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n')
    ref("plot", tmp_path, "--what", "curves")
