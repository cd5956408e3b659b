"""The findings of `python -m ref audit`: each number that a claim rests on."""

import re
from pathlib import Path

import numpy as np
import pytest

from ref import Error, audit

README = (Path(__file__).parents[1] / "README.md").read_text()

EXACT = {  # numbers that are zero, or whole, by the mathematics
    "hope-frozen-h": {"moved_frozen": 0},
    "hope-dead-imaginary": {"gradient": 0},
    "hope-circular": {"last": 0},
    "hope-conventions": {"n_minimal": 32, "n_lra": 64},
    "hope-bidirectional": {"paper": 1},
    "s4-clipped-b": {"modes": 32},
    "etsc-full-spectrum": {"full": 1024, "half": 512},
    "hyena-filter-order": {"order_2": 0},
    "tnn-positions": {"type_1": 0, "single": 0, "lags": 0},
    "l2t-mask": {"second": 0, "third": 0},
    "l2t-memory-path": {"untrained": 4 * 64 - 63, "parameters": 228_098},
    "l2t-teacher-bias": {"huber_15": 0, "dln_15": 0},
    "l2t-weight-pressure": {"twice": 2},
    "l2t-epochs": {"steps": 7261, "context": 32.5},
}
BANDS = {  # (least, most); the figures of the specification are in them where it has one
    "hope-frozen-h": {"share": (0.3, 0.6), "frozen": (0.9, 1.2), "trained": (0, 0.01)},
    "hope-dead-imaginary": {"moved": (0, 1e-13), "layout": (0.3, 3)},
    "hope-circular": {"first": (0.2, 0.6), "mean": (0.005, 0.1), "difference": (0.05, 0.5)},
    "hope-conventions": {"gain_minimal": (0.34, 0.37), "gain_lra": (0.49, 0.51)},
    "hope-bidirectional": {"published": (0, 0.01), "late": (0.9, 1), "difference": (0.3, 2)},
    "s4-clipped-b": {"clipped": (5, 20), "largest": (40, 41), "kernel": (0.2, 0.8)},
    "s4d-subtraction": {"smallest": (4e-4, 1e-3), "digits": (1.5, 3), "kept": (0, 1e-6)},
    "etsc-phases": {
        "plain_64": (2e-15, 1e-13),
        "plain_2048": (5e-14, 5e-12),
        "exact_64": (0, 1e-15),
        "exact_2048": (0, 3e-15),
    },
    "etsc-full-spectrum": {"difference": (0, 1e-14), "error_full": (0, 1e-14)},
    "etsc-horizon": {
        "energy": (0.9, 1.3),
        "decayed": (0.2, 0.4),
        "again_energy": (0, 1e-14),
        "again_decayed": (0, 1e-14),
    },
    "hyena-filter-order": {"order_3": (0.3, 3), "order_4": (0.3, 10)},
    "hyena-filter-init": {"ratio": (2, 8)},
    "longhorn-diagonal": {
        "y_long": (0.3, 1),
        "y_short": (0.01, 0.2),
        "y_one": (0, 1e-14),
        "cost": (2, 10),
    },
    "longhorn-last-state": {"difference": (0.7, 2)},
    "mamba-euler": {"d_0": (2e-3, 1e-2), "d_1": (0.02, 0.1), "d_2": (0.2, 0.6), "d_3": (2, 5)},
    "tnn-positions": {"type_2": (0.05, 0.5), "type_3": (0.03, 0.5), "rounded": (1e-10, 1e-6)},
    "l2t-mask": {
        "values": (1, 8),
        "fifth": (9.9e6, 1.01e7),
        "noise": (-0.8, 0.8),
        "corrected": (0.999, 1),
    },
    "l2t-memory-path": {"difference": (0.02, 0.3), "live": (0.05, 0.15), "stored": (0, 0.01)},
    "l2t-batch-norm": {"own": (0.005, 0.1)},
    "l2t-tied-embedding": {"one": (1.99, 2.01), "many": (1.8, 2.2), "norm": (1.41, 1.42)},
    "l2t-embedding": {
        "square": (250, 270),
        "loss": (170, 205),
        "small_square": (0.05, 0.2),
        "small_loss": (9.2, 9.4),
    },
    "l2t-teacher-bias": {"huber_0": (0.5, 2), "dln_0": (0.05, 2), "left": (0.15, 0.5)},
    "l2t-logged-loss": {"weight": (0.4, 0.6), "logged": (2, 3), "loss": (4.5, 5)},
    "l2t-static": {"difference": (0, 1e-14), "low": (0.0052, 0.0053), "high": (1.89, 1.91)},
    "l2t-sampling": {"share": (0.95, 0.97), "drawn": (-0.05, 0.05), "quiet": (0.15, 0.4)},
    "l2t-weight-pressure": {"ratio": (0.3, 3)},
    "l2t-epochs": {"times": (63.9, 64), "passes": (190, 193), "fewer": (63, 64)},
}


@pytest.mark.parametrize("name", audit.FINDINGS)
def test_the_numbers_of(name):
    numbers = audit.FINDINGS[name].compute()
    assert EXACT.get(name, {}).keys() | BANDS.get(name, {}).keys()
    for key, value in EXACT.get(name, {}).items():
        assert numbers[key] == pytest.approx(value, rel=1e-12, abs=0), key
    for key, (least, most) in BANDS.get(name, {}).items():
        assert least <= numbers[key] <= most, (key, numbers[key])
    assert all(isinstance(n, str) or np.isfinite(n) for n in numbers.values())
    audit.FINDINGS[name].line.format(**numbers)


def test_differences_that_grow():
    euler = audit.mamba_euler()
    assert euler["d_0"] < euler["d_1"] < euler["d_2"] < euler["d_3"]
    phases = audit.etsc_phases()
    assert phases["plain_64"] < phases["plain_512"] < 10 * phases["plain_2048"]
    assert all(phases[f"plain_{n}"] > 5 * phases[f"exact_{n}"] for n in (64, 512, 2048))
    digits = audit.s4d_subtraction()
    assert digits["subtracted"] > 30 * digits["kept"]


def test_every_finding_is_expected_and_every_expectation_a_finding():
    assert EXACT.keys() | BANDS.keys() == audit.FINDINGS.keys()


def test_a_line_for_each_and_an_explanation_for_the_named(monkeypatch):
    some = {name: audit.FINDINGS[name] for name in ("hope-conventions", "l2t-epochs")}
    monkeypatch.setattr(audit, "FINDINGS", some)
    every = list(audit.lines())
    assert [line.split()[0] for line in every] == list(some)
    assert all("\n" not in line for line in every)
    (text,) = audit.lines(["l2t-epochs"])
    head, words, numbers = text.split("\n\n")
    assert head == f"l2t-epochs: {some['l2t-epochs'].where}"
    assert words.startswith("Training and evaluation take") and "7,261 steps an epoch" in numbers
    assert max(map(len, text.splitlines())) <= 100


def test_an_unknown_name_is_refused_before_anything_is_computed():
    with pytest.raises(Error, match="no finding hope-thawed; there are: hope-frozen-h, "):
        next(audit.lines(["hope-frozen-h", "hope-thawed"]))


def test_commands_of_the_readme_name_findings():
    named = re.findall(r"`python -m ref audit ([a-z0-9-]+)`", README)
    assert set(named) <= audit.FINDINGS.keys()
    if named:
        assert set(named) == audit.FINDINGS.keys()
