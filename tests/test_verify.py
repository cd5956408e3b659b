"""A function of someone else is called, compared, and told where it goes wrong and how; what is
right passes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ref import Error, cases, frameworks, hints, longhorn, mamba, network, sweep, verify
from ref.cases import verify_callable

ROOT = Path(__file__).parents[1]
SIZES = {"B": 2, "L": 31, "D": 6, "N": 5}
LAYERED = [(m, p) for m in network.MODELS for p in ("operator", "mixer", "block", "network")]
SCANS = [("mamba", "scan"), ("longhorn", "scan")]
OWN = [("l2t", p) for p in ("features", "dln", "teacher", "student-loss", "unrolled")]
PARTS = [*SCANS, *LAYERED, *OWN, ("etsc", "solve"), ("s4", "init"), ("l2t-student", "network")]
STATEFUL = [(m, p) for m in ("mamba", "longhorn") for p in ("mixer", "block", "network")]


def by_reference(part, change=None, forward=False):
    """A part of ours as a function of someone else, whose results `change` spoils"""
    change = change or (lambda name, t: t)

    def f(*args, **inputs):
        params = args[0] if args else {}
        inputs |= {"x": args[1]} if len(args) > 1 else {}
        inputs |= {f"state.{n}": t for n, t in inputs.pop("state", {}).items()}
        outputs = part.run(params, inputs, None, steps=False)
        outputs = {n: change(n, t) for n, t in outputs.items() if n.startswith("out.")}

        def backward(douts):
            only = "weight" if part.part == "dln" else "y"
            douts = douts if isinstance(douts, dict) else {only: douts}
            own = None if isinstance(part, cases.OwnPart) and part.part != "dln" else douts
            grads = part.run(params, inputs, own, steps=False)
            grads = {n: change(n, t) for n, t in grads.items() if n.startswith("grad.")}
            return {n.removeprefix("grad.in.").removeprefix("grad.param."): grads[n] for n in grads}

        outputs = {n[4:]: t for n, t in outputs.items()}
        return outputs if forward else (outputs, backward)

    return f


def drawn(model, part, **changes):
    """-> the Part, and how to call verify_callable for it"""
    settings = verify.case_settings(model, part, None, None, None)
    own = {"B": 2, "L": 13} | changes
    state = own.get("initial_state", False)
    given = model, part, settings, own["B"], own["L"], "float32", 0, state
    return cases.draw(*given)[1], own | {"settings": settings}


@pytest.mark.parametrize("model, part", PARTS)
def test_every_part_as_a_function(model, part):
    """In float32 all of it agrees; without its backward as much of it as there is then"""
    p, given = drawn(model, part)
    report = verify_callable(by_reference(p), model, part, **given)
    assert report.ok, report.text()
    names = {row.tensor for row in report.rows}
    whole = cases.make_case(model, part, given["settings"], 2, 13).tensors
    assert names == {n for n in whole if n.startswith(("out.", "grad."))} - {"out.y_steps"}
    only = verify_callable(by_reference(p, forward=True), model, part, **given)
    assert only.ok and any("forward only" in note for note in only.notes)
    assert {row.tensor for row in only.rows} <= names


@pytest.mark.parametrize("model, part", [*SCANS, *STATEFUL])
def test_states_as_a_function(model, part):
    p, given = drawn(model, part, initial_state=True)
    report = verify_callable(by_reference(p), model, part, **given)
    assert report.ok, report.text()
    names = {row.tensor for row in report.rows}
    last = {"out.last_state"} if part == "scan" else {"out.state.conv", "out.state.ssm"}
    assert last < names
    assert any(n.startswith(("grad.in.state", "grad.in.s0", "grad.in.h0")) for n in names)


@pytest.mark.parametrize("precision", cases.PRECISIONS)
@pytest.mark.parametrize("model, part", STATEFUL)
def test_cases_with_states(model, part, precision, tmp_path):
    settings = {"d_model": 4, "d_state": 3}
    case = cases.make_case(model, part, settings, 2, 9, precision, initial_state=True)
    cases.write_case(tmp_path / "c.safetensors", case)
    case = cases.read_case(tmp_path / "c.safetensors")
    rows = {row.tensor: row for row in cases.verify(case)}
    assert all(row.ok for row in rows.values())
    for kind in ("out", "grad.in"):
        assert {f"{kind}.state.conv", f"{kind}.state.ssm"} < rows.keys()
    assert ("out.y_steps" in rows) == (part != "network")
    if part != "network" and precision == "float64":
        y, steps = (case.tensors[f"out.{name}"] for name in ("y", "y_steps"))
        np.testing.assert_allclose(steps, y, atol=1e-12)


@pytest.mark.parametrize("model, part", STATEFUL)
def test_a_state_carries_what_came_before(model, part):
    """Two halves with the state between them are the whole, and so are their gradients"""
    settings = {"d_model": 4, "d_state": 3} | ({"decoder": "lm"} if part == "network" else {})
    case, p = cases.draw(model, part, settings, 2, 10, "float64", initial_state=True)
    sources, x, dy = case.tensors, case.tensors["in.x"], case.tensors["dout.y"]
    whole = cases.run(p, sources)
    first = {n: t for n, t in sources.items() if not n.startswith("dout.")} | {"in.x": x[:, :6]}
    middle = {n[4:]: t for n, t in cases.run(p, first).items() if n.startswith("out.state.")}
    second = sources | {f"in.{n}": t for n, t in middle.items()}
    after = cases.run(p, second | {"in.x": x[:, 6:], "dout.y": dy[:, 6:]})
    douts = {n.replace("grad.in.", "dout."): t for n, t in after.items() if ".state." in n}
    douts = {n: t for n, t in douts.items() if n.startswith("dout.")}
    before = cases.run(p, first | {"dout.y": dy[:, :6]} | douts)
    y = np.concatenate([before["out.y"], after["out.y"]], axis=1)
    np.testing.assert_allclose(y, whole["out.y"], atol=1e-12)
    for name, g in whole.items():
        if name.startswith("grad.param."):
            np.testing.assert_allclose(before[name] + after[name], g, atol=1e-11)
        if name.startswith("grad.in.state."):
            np.testing.assert_allclose(before[name], g, atol=1e-12)
        if name.startswith("out.state."):
            np.testing.assert_allclose(after[name], g, atol=1e-12)


def test_states_where_there_are_none_and_bad_ones():
    for model, part in (("hope", "block"), ("longhorn", "operator"), ("etsc", "solve")):
        with pytest.raises(Error, match=f"{model}'s {part} takes none"):
            cases.make_case(model, part, {}, initial_state=True)
    case = cases.make_case("mamba", "network", {"d_model": 4}, 2, 5, initial_state=True)
    for name, change, sentence in (
        ("in.state.conv", lambda t: t[:1], r"in.state.conv has the shape \(1, 2, 4, 8\)"),
        ("dout.state.ssm", lambda t: t[0], "dout.state.ssm has the shape"),
        ("in.state.conv", None, "in.state.conv .* is missing: a state is state.conv, state.ssm"),
        ("in.state.h", lambda _: np.zeros(2), "in.state.h is not an input"),
        ("dout.state.h", lambda _: np.zeros(2), "dout.state.h is not the gradient"),
    ):
        tensors = dict(case.tensors)
        old = tensors.pop(name, None)
        tensors |= {} if change is None else {name: change(old)}
        with pytest.raises(Error, match=sentence):
            cases.verify(dataclasses.replace(case, tensors=tensors))
    plain = cases.make_case("hope", "block", {"d_model": 4}, 2, 5)
    plain.tensors["in.state.conv"] = np.zeros(2)
    with pytest.raises(Error, match=r"in\.state\.conv is not an input"):
        cases.verify(plain)


# Hints


def scan(change=None, **stand_in):
    """Longhorn's scan as a function, whose results `change` spoils"""

    def f(**arrays):
        y, last, cache = longhorn.scan_forward(**arrays | stand_in)
        spoil = change or (lambda name, t, arrays: t)

        def backward(dy):
            grads = longhorn.scan_backward(dy, cache)
            return {n: spoil(n, g, arrays) for n, g in grads.items()}

        return {
            "y": spoil("y", y, arrays),
            "last_state": spoil("last_state", last, arrays),
        }, backward

    return f


def spoiled(tensor, change):
    """A function whose one tensor is changed, by a function of it or of it and the arguments"""

    def spoil(name, t, arrays):
        if name != tensor:
            return t
        return change(t.copy(), arrays) if change.__code__.co_argcount == 2 else change(t.copy())

    return scan(spoil)


def put(t, where, value):
    t[where] = value
    return t


def restarted(t, arrays):
    parts = []
    for begin in (0, 16):
        now = {n: a[:, begin : begin + 16] if a.ndim == 3 else a for n, a in arrays.items()}
        parts.append(longhorn.scan_forward(**now)[0])
    return np.concatenate(parts, axis=1)


def not_reset(t, arrays):
    one = {n: a.reshape(1, -1, a.shape[2]) if a.ndim == 3 else a for n, a in arrays.items()}
    return longhorn.scan_forward(**one)[0].reshape(t.shape)


NOISE = np.random.default_rng(3).standard_normal((2, 31, 6)).astype("float32")
PLANTED = [
    (
        "y",
        lambda t: np.roll(t, 1, axis=1),
        "it is one step late: at t it has what belongs to t - 1",
    ),
    ("y", lambda t: np.roll(t, -1, 1), "it is one step early: at t it has what belongs to t + 1"),
    ("dt", lambda t: t[:, ::-1], "it is reversed in time"),
    ("k", lambda t: -t, "its sign is wrong"),
    ("x", lambda t: 2 * t, "it is 2 times what it should be"),
    ("x", lambda t: t / np.float32(2**0.5), "it is 1/(sqrt 2) times what it should be"),
    ("D", lambda t: t / 31, "it is 1/L (= 31) times what it should be"),
    ("D", lambda t: -t / 2, "it is -1/2 times what it should be"),
    ("dt_bias", lambda t: t / 62, "it is 1/B L (= 62) times what it should be"),
    ("z", lambda t: t * np.float32(0.7391), "it is 0.7391 times what it should be"),
    ("q", lambda t: 0 * t, "it is zero everywhere"),
    (
        "y",
        lambda t: t.swapaxes(1, 2).reshape(t.shape),
        "the axes time and channel are swapped in memory",
    ),
    ("y", lambda t: t[::-1], "the batches are in reverse order"),
    ("y", lambda t: t[[0, 0]], "every batch has the values of batch 0"),
    ("y", restarted, "right up to t = 15; from t = 16 on it begins anew: the state is not carried"),
    (
        "y",
        not_reset,
        "each batch goes on from the last state of the one before: the state is not reset",
    ),
    ("y", lambda t, a: longhorn.scan_forward(**a | {"D": None})[0], "it is what comes without D"),
    ("y", lambda t, a: longhorn.scan_forward(**a | {"z": None})[0], "it is what comes without z"),
    ("dt", lambda t: put(t, 1, NOISE[1]), "right for batch 0 alone"),
    ("dt", lambda t: put(t, np.s_[:, 8:], NOISE[:, 8:]), "right up to t = 7, wrong from t = 8 on"),
    ("dt", lambda t: put(t, np.s_[:, :8], NOISE[:, :8]), "wrong up to t = 7, right from t = 8 on"),
    (
        "x",
        lambda t: put(t, np.s_[1, 8:16, 2:4], 0),
        "one block is wrong, the rest right: batch = 1, t = 8 to 15, channel = 2 to 3",
    ),
    (
        "y",
        lambda t: put(t, np.s_[:, 17:28, 1:5], 0),
        "one block is wrong, the rest right: t = 17 to 27, channel = 1 to 4",
    ),
    ("x", lambda t: put(t, np.s_[:, :, 3], 1), "one block is wrong, the rest right: channel = 3"),
    (
        "y",
        lambda t: t * (1 + 1e-6 * np.float32(1.6) ** np.arange(31)[:, None]).astype("float32"),
        "its error grows",
    ),
]


@pytest.mark.parametrize("tensor, change, hint", PLANTED, ids=[f"{p[0]}-{p[2]}" for p in PLANTED])
def test_a_planted_fault_gives_its_hint_and_no_other(tensor, change, hint):
    report = verify_callable(spoiled(tensor, change), "longhorn", "scan", **SIZES)
    (row,) = (row for row in report.rows if not row.ok)
    assert row.tensor.rpartition(".")[2] == tensor and row.hint.startswith(hint), row.hint
    assert f"hint: {hint}" in report.text()
    assert not any(row.hint for row in report.rows if row.ok)


def test_a_gradient_that_is_not_summed():
    """Over the batches, and over time"""

    def of(where):
        def f(**arrays):
            y, _, cache = longhorn.scan_forward(**arrays)

            def backward(dy):
                grads, part = longhorn.scan_backward(dy, cache), np.zeros_like(dy)
                part[where] = dy[where]
                return grads | {"D": longhorn.scan_backward(part, cache)["D"]}

            return y, backward

        return f

    for where, hint in (
        (np.s_[1], "it is the part of batch 1 alone: not summed over the batches"),
        (np.s_[:, 30], "it is the part of t = 30 alone: not summed over time"),
    ):
        report = verify_callable(of(where), "longhorn", "scan", **SIZES)
        assert {r.tensor: r.hint for r in report.rows if not r.ok} == {"grad.in.D": hint}


def test_a_conjugate_and_swapped_parts():
    for change, hint in (
        (lambda t: t * [1, -1], "it is the complex conjugate"),
        (lambda t: t[..., ::-1], "real and imaginary parts are swapped"),
    ):
        case = cases.make_case("s4d", "mixer", {"d_model": 3, "d_state": 8})
        tensors = case.tensors | {
            "grad.param.kernel.C": change(case.tensors["grad.param.kernel.C"])
        }
        rows = cases.verify(dataclasses.replace(case, tensors=tensors))
        assert [row.hint for row in rows if not row.ok] == [hint]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_hints_at_half_precision(precision):
    """What is planted stands out from what rounding may do"""
    case = cases.make_case("longhorn", "scan", {"d_model": 6, "d_state": 5}, 2, 31, precision)
    for tensor, change, hint in (
        ("out.y", lambda t: np.roll(t, 1, axis=1), "it is one step late"),
        ("out.y", lambda t: put(t, np.s_[:, 8:], 0), "right up to t = 7, wrong from t = 8 on"),
        ("grad.in.D", lambda t: t / 31, "it is 1/L (= 31) times what it should be"),
        ("grad.in.q", lambda t: t * 2**0.5, "it is sqrt 2 times what it should be"),
        ("grad.in.k", lambda t: -t, "its sign is wrong"),
    ):
        t = case.tensors[tensor]
        wrong = {tensor: change(t.astype("float64")).astype(t.dtype)}
        rows = cases.verify(dataclasses.replace(case, tensors=case.tensors | wrong))
        (row,) = (row for row in rows if not row.ok)
        assert row.tensor == tensor and row.hint.startswith(hint), row


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_random_wrong_values_give_no_hint(precision):
    case = cases.make_case("longhorn", "scan", {"d_model": 6, "d_state": 5}, 2, 31, precision)
    names = [n for n in case.tensors if n.startswith(("out.", "grad."))]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        tensors = dict(case.tensors)
        for name in names:
            t = tensors[name].astype("float64")
            noise = rng.standard_normal(t.shape) * np.abs(t).max()
            few = rng.random(t.shape) < (1, 0.3, 0.02)[seed]
            few.flat[rng.integers(few.size)] = True
            tensors[name] = np.where(few, noise, t).astype(tensors[name].dtype)
        rows = cases.verify(dataclasses.replace(case, tensors=tensors))
        assert [(row.tensor, row.hint) for row in rows if row.hint] == []
        assert sum(not row.ok for row in rows) > 5


def test_where_it_is_wrong():
    change = lambda t: put(t, np.s_[1, 8:16, 2:4], 0)  # noqa: E731
    report = verify_callable(spoiled("y", change), "longhorn", "scan", **SIZES)
    (row,) = (row for row in report.rows if not row.ok)
    assert row.wrong == {
        "batch": {"first": 1, "last": 1, "count": 1, "of": 2},
        "time": {"first": 8, "last": 15, "count": 8, "of": 31},
        "channel": {"first": 2, "last": 3, "count": 2, "of": 6},
    }
    text = (
        "wrong first at t = 8, last at t = 15, 8 of 31; batches: 1 of 2, first 1; channels: 2 of 6"
    )
    assert text in report.text()


def test_axes_by_name_and_shape():
    axes = hints.axes
    assert axes("out.y", (2, 9, 4), 2, 9) == ("batch", "time", "channel")
    assert axes("grad.in.A", (2, 9), 2, 9, {"A"}) == ("axis 0", "axis 1")
    assert axes("grad.param.W", (2, 9, 4), 2, 9) == ("axis 0", "axis 1", "axis 2")
    assert axes("out.last_state", (2, 9, 4), 2, 9) == ("batch", "channel", "state")
    assert axes("out.state.ssm", (3, 2, 9, 4), 2, 9) == ("layer", "batch", "channel", "state")
    assert axes("out.y", (2, 5), 2, 9) == ("batch", "channel")
    assert axes("out.theta", (9, 2), None, None) == ("axis 0", "axis 1")
    assert axes("out.kernel", (2, 9), 2, 9) == ("axis 0", "axis 1")


# What f may do wrong

PROBLEMS = [
    ("y", lambda t: t.astype("float16"), "has the precision float16; expected float32 or better"),
    ("y", lambda t: t.astype("int64"), "has the type int64; expected float32"),
    ("y", lambda t: t[:1], "has the shape (1, 31, 6); expected (2, 31, 6)"),
    ("y", lambda t: put(t, 0, np.nan), "186 values are not finite, the first at [0, 0, 0]"),
    ("k", lambda t: t[:, 1:], "has the shape (2, 30, 5); expected (2, 31, 5)"),
    ("k", lambda t: None, "is missing: f did not give it"),
    ("y", lambda t: t.tolist(), "is a list; expected an array"),
    ("y", lambda t: None, "is a NoneType; expected an array"),
]


@pytest.mark.parametrize("tensor, change, sentence", PROBLEMS, ids=lambda v: str(v)[:30])
def test_a_bad_tensor_gets_its_sentence(tensor, change, sentence):
    report = verify_callable(spoiled(tensor, change), "longhorn", "scan", **SIZES)
    (row,) = (row for row in report.rows if not row.ok)
    assert row.problem == sentence and row.tensor.endswith(f".{tensor}")
    assert not report.ok and json.loads(report.json())["rows"]


def test_a_hint_about_axes_in_another_order():
    report = verify_callable(spoiled("y", lambda t: t.swapaxes(0, 1)), "longhorn", "scan", **SIZES)
    (row,) = (row for row in report.rows if not row.ok)
    assert row.problem == "has the shape (31, 2, 6); expected (2, 31, 6)"
    assert row.hint == "its axes are in the order [1, 0, 2] of what is expected"


def raising(e):
    def f(*args, **kwargs):
        raise e

    return f


def with_backward(backward):
    return lambda **a: (longhorn.scan_forward(**a)[0], backward)


def test_a_function_that_fails_gets_its_sentence():
    for f, sentence in (
        (
            raising(ValueError("no\nsuch thing")),
            "f raised ValueError: no such thing (test_verify.py, line ",
        ),
        (raising(KeyError("h0")), "f raised KeyError: 'h0' (test_verify.py, line "),
        (raising(Error("no shape.")), "f raised ref.Error: no shape (test_verify.py, line "),
        (raising(SystemExit(0)), "f raised SystemExit: 0 (test_verify.py, line "),
        (lambda **a: (a["x"], 3), "f's second result is an int; expected a function"),
        (lambda **a: None, "f gave a NoneType; expected y"),
        (lambda **a: (a["x"], a["x"], a["x"]), "f gave a tuple; expected y"),
        (lambda: 0, "f raised TypeError"),
    ):
        report = verify_callable(f, "longhorn", "scan", **SIZES)
        assert not report.ok and report.rows == () and report.problem.startswith(sentence)
        assert report.text().endswith(report.problem) and "Traceback" not in report.text()
    for backward, sentence in (
        (raising(ValueError("dk")), "it raised ValueError: dk"),
        (lambda dy: [dy], "it gave a list; expected a dict by argument"),
    ):
        report = verify_callable(with_backward(backward), "longhorn", "scan", **SIZES)
        ((name, problem),) = ((r.tensor, r.problem) for r in report.rows if not r.ok)
        assert name == "backward" and problem.startswith(sentence)
    report = verify_callable(lambda **a: {"last": a["x"]}, "longhorn", "scan", **SIZES)
    problems = {r.tensor: r.problem for r in report.rows}
    assert problems["out.y"].startswith("is missing") and "not something" in problems["out.last"]
    other = with_backward(lambda dy: {"s0": dy, "kk": dy})
    problems = {r.tensor: r.problem for r in verify_callable(other, "longhorn", "scan").rows}
    assert "no argument of this name; it has D, dt, dt_bias, k, q, x, z" in problems["grad.kk"]
    assert "grad.in.k" in problems and "grad.s0" in problems


def test_wrong_use_is_an_error():
    for given, sentence in (
        (dict(dtype="float8"), "dtype='float8'"),
        (dict(framework="mxnet"), "framework='mxnet'"),
        (dict(framework="jax:gpu"), "only torch takes a device"),
        (dict(seeds=0), "seeds=0"),
        (dict(settings={"order": 2}), "the setting 'order'"),
        (dict(part="solve"), "longhorn has no part 'solve'"),
        (dict(model="mumba"), "model='mumba'"),
        (dict(B=0), "B=0"),
        (dict(model="transformer", part="block", N=3), "the setting 'd_state'"),
        (
            dict(case=cases.make_case("mamba", "scan", {"d_model": 3})),
            "the case is of mamba's scan",
        ),
    ):
        with pytest.raises(Error, match=sentence):
            verify_callable(scan(), **{"model": "longhorn", "part": "scan"} | given)


def test_a_function_may_spoil_its_arguments_and_take_complex_numbers_back():
    def f(**arrays):
        y, _, cache = longhorn.scan_forward(**{n: a.copy() for n, a in arrays.items()})
        for a in arrays.values():
            a[:] = 7
        return y, lambda dy: longhorn.scan_backward(dy, cache)

    assert verify_callable(f, "longhorn", "scan", **SIZES).ok

    def solve(params, t):
        from ref import etsc

        theta, b = etsc.solve(t)
        return {"theta": theta, "b": b}

    assert verify_callable(solve, "etsc", "solve", "float64").ok


def test_a_case_of_someone_else_is_what_f_is_called_with():
    case = cases.read_case(ROOT / "tests" / "golden" / "longhorn_scan_a.safetensors")
    report = verify_callable(scan(), "longhorn", "scan", case=case)
    assert report.ok and report.case.precision == "float64" and report.sizes["L"] > 1
    case = cases.read_case(ROOT / "tests" / "golden" / "mamba_network_a.safetensors")
    f = by_reference(cases.part_of(case))
    tied = verify_callable(f, "mamba", "network", case=case)
    assert tied.ok or {r.tensor for r in tied.rows if not r.ok} == {"grad.param.lm_head.weight"}


# What is allowed


def test_long_sums_in_float32_are_allowed_what_they_cost():
    """Over 6000 positions, one after the other"""

    def one_by_one(**arrays):
        y, last, cache = longhorn.scan_forward(**arrays)

        def backward(dy):
            grads = longhorn.scan_backward(dy, cache)
            rows = grads["dt"].reshape(-1, 3)
            return grads | {"dt_bias": np.add.accumulate(rows)[-1]}

        return {"y": y, "last_state": last}, backward

    sizes = {"B": 3, "L": 2048, "D": 3, "N": 2}
    for f in (scan(), one_by_one):
        report = verify_callable(f, "longhorn", "scan", **sizes)
        assert report.ok, report.text()
    double = verify_callable(scan(), "longhorn", "scan", "float64", **sizes)
    assert all(row.allowed == 1e-9 and row.unavoidable == 0 for row in double.rows)


def test_what_rounding_hides_is_said():
    settings = {"d_model": 8, "d_state": 16}
    case = cases.make_case("s4", "mixer", settings, 2, 13, "bfloat16")
    report = verify.report(case)
    vague = [row.tensor for row in report.rows if row.allowed > verify.VAGUE]
    (note,) = report.remarks()
    assert report.ok and vague and ", ".join(vague) in note and note in report.text()
    assert verify.report(cases.make_case("s4", "mixer", settings, 2, 13)).remarks() == ()


def test_outputs_alone_cost_no_backward(monkeypatch):
    def backward(*_):
        raise AssertionError

    monkeypatch.setattr(longhorn, "recurrence_backward", backward)
    f = lambda **a: longhorn.scan_forward(**a)[0]  # noqa: E731
    assert verify_callable(f, "longhorn", "scan", **SIZES).ok


# Seeds and shapes


def test_the_worst_of_several_seeds():
    calls = []

    def f(**arrays):
        y, _, cache = longhorn.scan_forward(**arrays)
        calls.append(arrays["x"])
        return (y if len(calls) != 2 else 2 * y), lambda dy: longhorn.scan_backward(dy, cache)

    report = verify_callable(f, "longhorn", "scan", seeds=3, seed=5, **SIZES)
    assert len(calls) == 3 and not np.array_equal(calls[0], calls[1])
    assert [(r.tensor, r.seed) for r in report.rows if not r.ok] == [("out.y", 6)]
    assert "3 seeds" in report.text() and len(report.rows) == 8


def test_a_sweep_names_the_smallest_failing_shape():
    def f(**arrays):
        y, _, cache = longhorn.scan_forward(**arrays)
        if arrays["x"].shape[1] >= 64 and arrays["x"].shape[2] % 2:
            y = put(y.copy(), np.s_[:, :, -1], 0)
        return y, lambda dy: longhorn.scan_backward(dy, cache)

    lines = []
    found = cases.sweep(f, "longhorn", "scan", show=lines.append)
    assert len(lines) == len(found.reports) == 24 and not found.skipped
    shapes = [r.sizes for r in found.reports]
    assert {s["L"] for s in shapes} == set(sweep.LENGTHS) and {s["B"] for s in shapes} == {1, 2, 3}
    for letter in "DN":
        assert {s[letter] % 2 for s in shapes} == {0, 1}
    failing = [s for s in shapes if s["L"] >= 64 and s["D"] % 2]
    assert [r.sizes for r in found.reports if not r.ok] == failing
    assert found.smallest == min(failing, key=lambda s: (s["L"], s["B"] * s["D"] * s["N"]))
    assert "the smallest that fails: B 1, L 127" in found.text() or found.smallest["L"] == 64
    assert "one block is wrong" in found.closing() and not found.ok
    assert json.loads(found.json())["smallest"] == found.smallest
    assert {r.tensor for r in found.rows if not r.ok} == {"out.y"}
    right = verify_callable(scan(), "longhorn", "scan", sweep=True, seeds=2, D=4)
    assert right.ok and right.smallest is None and {r.sizes["D"] for r in right.reports} == {4}
    assert right.text().endswith("24 of 24 shapes agree")


def test_a_sweep_takes_the_shapes_that_a_model_has(monkeypatch):
    monkeypatch.setattr(sweep, "LENGTHS", (1, 2, 7))
    for model, part in (("s4", "operator"), ("transformer", "block"), ("etsc", "solve")):

        def f(*args, model=model, part=part, **inputs):
            raise ValueError(model)

        found = cases.sweep(f, model, part)
        assert len(found.reports) == 9 and all("ValueError" in r.problem for r in found.reports)
    found = cases.sweep(f, "hope", "network", settings={"decoder": "match"})
    assert len(found.skipped) == 6 and "two documents" in found.skipped[0][1]
    assert "two documents" in found.text()
    with pytest.raises(Error, match="the setting 'order'"):
        cases.sweep(f, "hope", "block", settings={"order": 1})


# Other packages' arrays


def torch_scan(x, dt, k, q, D, z, dt_bias, s0=None):
    """Longhorn in PyTorch, from its equations (2), (4), (5)"""
    import torch

    beta = torch.sigmoid(dt + dt_bias)
    delta = beta / (1 + beta * (k * k).sum(-1, keepdim=True))
    S = x.new_zeros(len(x), x.shape[2], k.shape[2]) if s0 is None else s0
    ys = []
    for t in range(x.shape[1]):
        d, key = delta[:, t, :, None], k[:, t, None]
        S = (1 - d * key * key) * S + d * x[:, t, :, None] * key
        ys.append((S * q[:, t, None]).sum(-1))
    y = torch.stack(ys, 1) + D * x
    return {"y": y * torch.nn.functional.silu(z), "last_state": S}


@pytest.mark.parametrize("precision", cases.PRECISIONS)
@pytest.mark.usefixtures("one_torch_thread")
def test_pytorch_by_autograd(precision):
    given = {"dtype": precision, "framework": "torch", "initial_state": True} | SIZES
    report = verify_callable(torch_scan, "longhorn", "scan", **given)
    assert report.ok and {"grad.in.s0", "grad.in.dt_bias"} < {r.tensor for r in report.rows}, report

    def wrong(**a):
        return torch_scan(**a | {"D": 1.3 * a["D"]})

    found = verify_callable(wrong, "longhorn", "scan", **given)
    assert {"out.y", "grad.in.D"} <= {r.tensor for r in found.rows if not r.ok}


@pytest.mark.usefixtures("one_torch_thread")
def test_pytorch_in_other_ways():
    import torch

    def detached(**a):
        with torch.no_grad():
            return torch_scan(**a)

    def through_numpy(**a):  # refuses tensors that want gradients
        a = {n: t.numpy() for n, t in a.items()}
        y, _, cache = longhorn.scan_forward(**a)

        def backward(dy):
            grads = longhorn.scan_backward(dy.numpy(), cache)
            return {n: torch.from_numpy(np.ascontiguousarray(g)) for n, g in grads.items()}

        return torch.from_numpy(y), backward

    def unused(**a):
        return torch_scan(**a | {"k": a["k"].detach()})["y"]

    def half(**a):
        return torch_scan(**a)["y"].half()

    def crooked(**a):
        return torch_scan(**a)["y"][:, 1:]

    run = {"framework": "torch"} | SIZES
    report = verify_callable(detached, "longhorn", "scan", **run)
    assert report.ok and "forward only" in report.text()
    report = verify_callable(through_numpy, "longhorn", "scan", **run)
    assert report.ok and len(report.rows) == 8
    report = verify_callable(unused, "longhorn", "scan", **run)
    assert {r.tensor: r.problem for r in report.rows if not r.ok} == {
        "grad.in.k": "is missing: f did not give it"
    }
    report = verify_callable(half, "longhorn", "scan", **run)
    (row,) = (row for row in report.rows if row.tensor == "out.y")
    assert row.problem == "has the precision float16; expected float32 or better"
    report = verify_callable(crooked, "longhorn", "scan", **run)
    assert not report.ok and any("another shape" in note for note in report.notes)


@pytest.mark.usefixtures("one_torch_thread")
def test_pytorch_with_a_tied_parameter_and_tokens():
    """Each of its two names has the whole gradient"""

    def network_of_nothing(params, x):
        E, D = params["backbone.embedding.weight"], params["lm_head.weight"]
        assert E is D and x.dtype.is_floating_point is False
        return (E[x] * 0.5) @ D.T

    settings = {"decoder": "lm", "tied": True, "decoder_bias": False}
    given = {"settings": settings, "framework": "torch", "L": 5}
    report = verify_callable(network_of_nothing, "mamba", "network", **given)
    rows = {row.tensor: row for row in report.rows}
    both = [rows[f"grad.param.{n}.weight"] for n in ("backbone.embedding", "lm_head")]
    assert both[0].value == both[1].value and not both[0].problem
    assert rows["grad.param.backbone.norm_f.weight"].problem.startswith("is missing")


def test_arrays_there_and_back():
    rng = np.random.default_rng(0)
    for framework in ("numpy", "torch", "jax"):
        if framework != "numpy":
            pytest.importorskip(framework)
        for precision, dtype in cases.PRECISIONS.items():
            if framework == "jax" and precision == "float64":
                continue  # needs its switch
            a = rng.standard_normal((2, 3)).astype(dtype)
            back = frameworks.received(frameworks.sent(a, framework))
            assert back.dtype == dtype and np.array_equal(back, a), (framework, precision)
    with pytest.raises(Error, match="is a str; expected an array"):
        frameworks.received("y")


@pytest.mark.parametrize("precision", cases.PRECISIONS)
def test_jax_by_vjp(precision):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy

    def jax_scan(x, dt, A, B, C, D, z, dt_bias, h0=None):
        delta = jax.nn.softplus(dt + dt_bias)

        def one(h, now):
            x, d, B, C = now
            h = jnp.exp(d[..., None] * A) * h + (d * x)[..., None] * B[:, None]
            return h, (h * C[:, None]).sum(-1)

        now = tuple(jnp.swapaxes(a, 0, 1) for a in (x, delta, B, C))
        h, ys = jax.lax.scan(one, h0, now)
        return {"y": (jnp.swapaxes(ys, 0, 1) + D * x) * jax.nn.silu(z), "last_state": h}

    given = {"dtype": precision, "framework": "jax", "initial_state": True} | SIZES
    before = jax.config.jax_enable_x64
    report = verify_callable(jax_scan, "mamba", "scan", **given)
    assert report.ok and {"grad.in.h0", "grad.in.A"} < {r.tensor for r in report.rows}, report
    assert jax.config.jax_enable_x64 == before

    def not_differentiable(**a):
        return jax.pure_callback(lambda x: x, a["x"], a["x"])

    report = verify_callable(not_differentiable, "mamba", "scan", framework="jax")
    assert "backward" in {r.tensor for r in report.rows} or "forward only" in report.text()


# The command


@pytest.fixture
def command(ref, monkeypatch, tmp_path):
    """Run `python -m ref ARGUMENTS` in this process and in tmp_path -> what it prints"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["ref", *map(str, arguments)])
        return "".join(ref(*arguments, expect=expect))

    return run


MODULE = """
from ref import longhorn

class Kernels:
    @staticmethod
    def scan(**arrays):
        y, _, cache = longhorn.scan_forward(**arrays)
        return y, lambda dy: longhorn.scan_backward(dy, cache)

def wrong(**arrays):
    y, backward = Kernels.scan(**arrays)
    return -y, backward

number = 3
"""


def test_the_command_with_a_function(command, tmp_path):
    (tmp_path / "their_module.py").write_text(MODULE)
    (tmp_path / "their_broken.py").write_text("import nothing_of_this_name")
    what = ("--model", "longhorn", "--part", "scan")
    right, wrong = (("--callable", f"their_module:{n}") for n in ("Kernels.scan", "wrong"))
    sizes = ("-B", 3, "-L", 9, "--d-model", 4, "--d-state", 3, "--dtype", "float64", "--seed", 4)
    out = command("verify", *right, *what, *sizes, "--json", "r.json")
    assert out.startswith(
        "their_module:Kernels.scan: ok  (longhorn scan, float64, B 3, L 9, D 4, N 3"
    )
    whole = json.loads((tmp_path / "r.json").read_text())
    assert (
        whole["format"] == "ssm-report-1" and whole["ok"] and len(whole["reports"][0]["rows"]) == 8
    )
    out = command("verify", *wrong, *what, "--seeds", 2, "--json", "-", expect=1)
    (report,) = json.loads(out)["reports"]
    assert [row["hint"] for row in report["rows"] if not row["ok"]] == ["its sign is wrong"]
    out = command("verify", *wrong, *what, "--sweep", "--quiet", expect=1)
    assert out.count("FAIL  B") == 24 and "0 of 24 shapes agree; the smallest that fails: B" in out
    for arguments, status, sentence in (
        ((*right, "c.safetensors", *what), 2, "give case files, or --callable"),
        ((), 2, "give case files, or --callable"),
        (("c.safetensors", "--part", "scan"), 2, "--part is for --callable"),
        ((*right, "--model", "longhorn"), 2, "--callable needs --part"),
        ((*right, *what, "--sweep", "-L", 3), 2, "--sweep has its own"),
        ((*right, *what, "--framework", "mxnet"), 1, "framework='mxnet'"),
        (("--callable", "their_module", *what), 1, "expected MODULE:FUNCTION"),
        (("--callable", "their_module:none", *what), 1, "their_module has no none"),
        (("--callable", "their_module:number", *what), 1, "number is an int; expected a function"),
        (
            ("--callable", "their_broken:f", *what),
            1,
            "ModuleNotFoundError: No module named 'nothing",
        ),
    ):
        assert sentence in command("verify", *arguments, expect=status)


def test_a_module_in_the_working_folder(tmp_path):
    """As a user runs it"""
    (tmp_path / "their_own.py").write_text(MODULE)
    own = "--callable", "their_own:wrong", "--model", "longhorn", "--part", "scan"
    run = subprocess.run(
        [sys.executable, "-m", "ref", "verify", *own],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and not run.stderr
    assert "hint: its sign is wrong" in run.stdout


def test_the_report_of_files_as_json(command, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    case = cases.make_case("mamba", "scan", {"d_model": 3, "d_state": 2}, precision="float32")
    cases.write_case(good, case)
    bad.write_bytes(good.read_bytes()[:200])
    out = command("verify", good, bad, "--json", tmp_path / "r.json", expect=1)
    assert "1 of 2 files agree" in out and "tensors agree)" in out
    first, second = json.loads((tmp_path / "r.json").read_text())["reports"]
    assert first["ok"] and first["precision"] == "float32" and len(first["rows"]) == 11
    assert not second["ok"] and "not a whole safetensors file" in second["problem"]


@pytest.mark.parametrize(
    "options",
    [
        ("hope", "--decoder", "mean", "--pool-from", 2, "--d-input", 7, "--n-layers", 1),
        ("hope", "--no-tokens", "--d-input", 3, "--d-output", 4),
        ("s4", "--decoder", "match", "--d-output", 2, "--precision", "bfloat16"),
        ("mamba", "--decoder", "lm", "--tied", "--d-input", 9, "--initial-state"),
        ("longhorn", "--decoder", "lm", "--no-tokens", "--d-input", 2, "--no-decoder-bias"),
        ("transformer", "--decoder", "lm", "--positions", 30, "--final-norm"),
        ("tnn", "--decoder", "last", "--positions", 20),
        ("hyena", "--decoder", "lm", "--tied", "--positions", 24),
    ],
    ids=str,
)
def test_networks_of_every_kind(options, command, tmp_path):
    path = tmp_path / "c.safetensors"
    model, *options = options
    command("case", "--model", model, "--part", "network", *options, "-L", 9, "-o", path)
    case = cases.read_case(path)
    assert all(row.ok for row in cases.verify(case)), case.settings
    cfg = cases.part_of(case).cfg
    words = dict(zip(options, options[1:], strict=False))
    for option in ("--decoder", "--d-input", "--pool-from", "--positions", "--n-layers"):
        if option in words:
            assert getattr(cfg, option[2:].replace("-", "_")) == words[option]
    assert cfg.tokens == ("--no-tokens" not in options) and cfg.tied == ("--tied" in options)


def test_options_of_a_network_are_for_a_network(command, tmp_path):
    path = tmp_path / "c.safetensors"
    out = command(
        "case", "--model", "hope", "--part", "mixer", "--n-layers", 2, "-o", path, expect=1
    )
    assert "the setting 'n_layers' is not one of hope's mixer" in out
    out = command(
        "case", "--model", "s4", "--part", "block", "--initial-state", "-o", path, expect=1
    )
    assert "s4's block takes none" in out


def test_a_state_arrives_as_a_dict():
    """Mamba's own forward, one of whose last states has another sign"""
    settings = {"d_model": 8, "d_state": 16}

    def f(params, x, state):
        cfg = cases.draw("mamba", "mixer", settings, 2, 24, "float32")[1].cfg
        own = mamba.from_published(params, cfg, "mixer")
        y, cache = mamba.mixer_forward(own, x, cfg, None, state)
        last = mamba.mixer_state(cache)
        return {"y": y, "state.conv": last["conv"], "state.ssm": -last["ssm"]}

    report = verify_callable(f, "mamba", "mixer", initial_state=True)
    hints = {r.tensor: r.hint for r in report.rows if not r.ok}
    assert hints == {"out.state.ssm": "its sign is wrong"}
