"""Case files: every kind of disagreement is found and named, every kind of bad file gets its
sentence."""

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ref import Error, backend, cases, files, hope

GOLDEN = Path(__file__).parent / "golden"
PARTS = ("operator", "mixer", "block", "network")


def made(part="operator", precision="float64", **settings):
    settings = {"d_model": 3, "d_state": 8, "conv": "causal"} | settings
    return cases.make_case("hope", part, settings, B=2, L=9, precision=precision, seed=5)


def changed(case, **tensors):
    """The case with some tensors replaced (by a function of the old one, or by nothing)"""
    new = dict(case.tensors)
    for name, change in tensors.items():
        name = name.replace("__", ".")
        if change is None:
            del new[name]
        else:
            new[name] = change(new[name].copy()) if name in new else change(None)
    return dataclasses.replace(case, tensors=new)


@pytest.mark.parametrize("precision", cases.PRECISIONS)
@pytest.mark.parametrize("part", PARTS)
def test_what_is_written_verifies(part, precision, tmp_path):
    case = made(part, precision, norm="batch")
    cases.write_case(tmp_path / "c.safetensors", case)
    read = cases.read_case(tmp_path / "c.safetensors")
    assert (read.model, read.part, read.precision) == ("hope", part, precision)
    assert {t.dtype for t in read.tensors.values() if t.dtype.kind != "i"} == {
        cases.PRECISIONS[precision]
    }
    rows = cases.verify(read)
    assert rows and all(row.ok for row in rows), rows
    assert {"out.y"} < {row.tensor for row in rows}
    assert ("out.y_steps" in {row.tensor for row in rows}) == (part in ("operator", "block"))


def test_computes_from_inputs_parameters_and_upstream_gradients_only():
    for path in sorted(GOLDEN.glob("hope_*.safetensors")):
        case = cases.read_case(path)
        sources = {n: t for n, t in case.tensors.items() if n.startswith(cases.SOURCES)}
        results = cases.compute(dataclasses.replace(case, tensors=sources))
        wanted = case.tensors.keys() - sources.keys()
        assert wanted <= results.keys()
        for name in wanted:
            deviation = np.abs(results[name] - case.tensors[name]).max()
            assert deviation < 1e-9 * np.abs(case.tensors[name]).max()


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_every_tensor_is_compared(precision):
    """A deviation of a few times what the precision allows is found in each, at its place"""
    case = made("mixer", precision)
    size = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.5}[precision]
    for name in [n for n in case.tensors if n.startswith(("out.", "grad."))]:

        def off(t):
            worst = np.abs(t).max()
            t[(0,) * t.ndim] += t.dtype.type(size * float(worst) * 4)
            return t

        rows = {r.tensor: r for r in cases.verify(changed(case, **{name.replace(".", "__"): off}))}
        assert not rows.pop(name).ok
        assert all(row.ok for row in rows.values())


def test_rounding_at_the_case_s_precision_passes_and_its_scale_is_shown():
    case = made("block", "float32")
    rows = cases.verify(case)
    assert all(0 < row.unavoidable < 1e-5 and row.allowed > 4 * row.unavoidable for row in rows)
    case = made("block", "float64")
    assert all(row.allowed == 1e-9 and row.unavoidable == 0 for row in cases.verify(case))
    own = dataclasses.replace(case, tolerance={"out.y": 1e-20})
    assert [row.tensor for row in cases.verify(own) if row.allowed == 1e-20] == ["out.y"]


@pytest.mark.parametrize("conv", ["circular", "causal"])
def test_an_implementation_in_float32_passes_as_float32(conv):
    """What a correct float32 kernel gives, here ours, is within what float32 may cost"""
    if conv == "causal" and backend.plain():
        pytest.skip(
            "the twin of the ladder is float64 inside; the readable form rounds each section"
        )
    case = made("block", "float32", d_model=8, d_state=64, conv=conv)
    cfg = cases.part_of(case).cfg
    params = hope.from_published(case.of("param."), cfg, "block")
    y, cache = hope.block_forward(params, case.tensors["in.x"], cfg)
    dx, grads = hope.block_backward(case.tensors["dout.y"], cache)
    theirs = {"out.y": y, "grad.in.x": dx}
    theirs |= {f"grad.param.{n}": g for n, g in hope.to_published(grads, cfg, "block").items()}
    case = dataclasses.replace(case, tensors=case.tensors | theirs)
    rows = cases.verify(case)
    assert all(row.ok for row in rows), rows


def test_perturbation_leaves_the_modules_as_they_were():
    from ref import nn

    before = dict(vars(nn)), dict(vars(hope))
    cases.verify(made("mixer", "float16"))
    assert (dict(vars(nn)), dict(vars(hope))) == before


def zeros(*shape):
    return lambda _: np.zeros(shape)


BAD = [
    ({"param__log_dt": None}, "param.log_dt \\(3,\\) is missing"),
    ({"param__extra": zeros(3)}, "param.extra is not a parameter"),
    ({"param__log_dt": zeros(4)}, "param.log_dt has the shape \\(4,\\); expected \\(3,\\)"),
    ({"in__x": None}, "in.x is missing"),
    ({"in__h0": zeros(2)}, "in.h0 is not an input"),
    ({"in__x": zeros(2, 9, 4)}, "expected \\(B, L, 3\\)"),
    ({"in__x": lambda x: x * np.nan}, "in.x has values that are not finite"),
    ({"dout__y": None}, "dout.y is missing"),
    ({"dout__z": zeros(2)}, "dout.z is not"),
    ({"dout__y": zeros(2, 9)}, "dout.y has the shape"),
]


@pytest.mark.parametrize("change, sentence", BAD, ids=lambda v: str(v)[:40])
def test_bad_sources_get_their_sentence(change, sentence):
    with pytest.raises(Error, match=sentence):
        cases.verify(changed(made(), **change))


def test_bad_claims_get_their_sentence():
    for change, sentence in (
        ({"out__y": lambda y: y[:1]}, "has the shape \\(1, 9, 3\\); expected \\(2, 9, 3\\)"),
        ({"out__y": lambda y: np.where(np.arange(3) == 1, np.nan, y)}, "18 values are not finite"),
        ({"out__state": zeros(2)}, "not something this part computes; it computes out.y"),
    ):
        (row,) = (row for row in cases.verify(changed(made(), **change)) if not row.ok)
        import re

        assert re.search(sentence, row.problem)
    with pytest.raises(Error, match="nothing to compare"):
        case = made()
        keep = {n: t for n, t in case.tensors.items() if n.startswith(cases.SOURCES)}
        cases.verify(dataclasses.replace(case, tensors=keep))


def test_bad_files_get_their_sentence(tmp_path):
    good = tmp_path / "good.safetensors"
    cases.write_case(good, made())
    content = good.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    path = tmp_path / "bad.safetensors"

    def head(**changes):
        case = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["case"])
        case = {n: v for n, v in (case | changes).items() if v is not None}
        save_file({"in.x": np.zeros(3)}, path, {"case": json.dumps(case)})

    for n in (0, 5, 8, 100, 8 + size, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(Error, match="not a whole safetensors file"):
            cases.read_case(path)
    path.write_text("PK\x03\x04 something else altogether")
    with pytest.raises(Error, match="not a whole safetensors file"):
        cases.read_case(path)
    with pytest.raises(Error, match="There is no file"):
        cases.read_case(tmp_path / "none.safetensors")
    save_file({"in.x": np.zeros(3)}, path)
    with pytest.raises(Error, match="is no case file"):
        cases.read_case(path)
    for changes, sentence in (
        (dict(format="ssm-case-2"), "format 'ssm-case-2'"),
        (dict(precision="float8"), "precision 'float8'"),
        (dict(part=None), "no case file"),
    ):
        head(**changes)
        with pytest.raises(Error, match=sentence):
            cases.read_case(path)
    save_file(
        {"weight": np.zeros(3)},
        path,
        {"case": json.loads(content[8 : 8 + size])["__metadata__"]["case"]},
    )
    with pytest.raises(Error, match="the name 'weight'"):
        cases.read_case(path)


def test_settings_and_parameters_of_the_wrong_kind():
    case = cases.make_case("s4", "network", {"d_model": 3, "d_state": 4}, L=9)
    A_real = next(name for name in case.tensors if name.endswith("1.kernel.A_real"))
    for settings, tensors, sentence in (
        ({"l_max": 9.0}, {}, "l_max=9.0: expected an integer"),
        ({"bidirectional": 1}, {}, "bidirectional=1: expected true or false"),
        ({"n_layers": 10**9}, {}, "n_layers=1000000000, but there are"),
        ({}, {A_real: np.zeros(4)}, "expected \\(3, 2\\)"),
        ({}, {"in.lengths": np.array([1, 2, 3])}, "expected \\(2,\\) integers"),
        ({}, {"in.lengths": np.array([1.0, 2.0])}, "expected \\(2,\\) integers"),
    ):
        other = dataclasses.replace(
            case, settings=case.settings | settings, tensors=case.tensors | tensors
        )
        with pytest.raises(Error, match=sentence):
            cases.verify(other)
    for settings in ({"foo": 0}, {"d_model": "4"}, {"bidirectional": "yes"}):
        with pytest.raises(Error, match="the setting"):
            cases.make_case("s4", "network", settings)


def test_a_buffer_may_have_an_axis_or_none():
    case = cases.make_case("s4", "operator", {"d_model": 3, "d_state": 4}, L=9)
    for shape in ((), (1,)):
        length = case.tensors["param.kernel.l_kernel"].reshape(shape)
        tensors = case.tensors | {"param.kernel.l_kernel": length}
        assert all(row.ok for row in cases.verify(dataclasses.replace(case, tensors=tensors)))


def test_settings_that_do_not_fit(tmp_path):
    case = made()
    for changes, sentence in (
        (dict(model="mumba"), "model='mumba' is not known"),
        (dict(part="scan"), "hope has no part 'scan'"),
        (dict(settings=case.settings | {"order": 2}), "setting 'order'"),
        (dict(settings=case.settings | {"conv": "cyclic"}), "conv='cyclic'"),
        (dict(settings=case.settings | {"bidirectional": True}), "one direction only"),
        (dict(settings=case.settings | {"dropout": "a"}), "do not describe|dropout"),
    ):
        with pytest.raises(Error, match=sentence):
            cases.verify(dataclasses.replace(case, **changes))


def test_read_case_checks_write_case_atomically(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    cases.write_case(path, made())
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Error, match="No space left"):
        cases.write_case(path, made("mixer"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
