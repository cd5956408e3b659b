"""The derivative check itself: it passes what is right and fails what is wrong by little."""

import numpy as np
import pytest

from ref import gradcheck, hope, nn


def worst(name="hope"):
    return max(max(errors.values()) for _, errors in gradcheck.errors_of(name))


def test_another_seed():
    assert worst() < gradcheck.TOLERANCE


FAULTS = {
    "a lost factor": (nn, "spectral_conv_backward", lambda dx, dG: (dx, 0.5 * dG)),
    "a lost conjugate": (nn, "spectral_conv_backward", lambda dx, dG: (dx, dG.conj())),
    "one bin too heavy": (nn, "spectral_conv_backward", lambda dx, dG: (dx, dG * _first(dG))),
    "off by one in time": (nn, "fft_conv_backward", lambda dx, dk: (np.roll(dx, 1, 1), dk)),
    "a dropped term": (hope, "block_backward", lambda dx, grads: (0.9 * dx, grads)),
    "a wrong sign": (hope, "ladder_backward", lambda dh, dlog_dt: (dh, -dlog_dt)),
    "one channel missing": (hope, "sample_backward", lambda dh, dt: (dh, dt * _first(dt, 0))),
    "a transposed weight": (nn, "linear_backward", lambda dx, dW, db: (dx, dW[::-1], db)),
}


def _first(x, value=2):
    return np.where(np.arange(len(x)) == 0, value, 1).reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    module, name, spoil = FAULTS[fault]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda dy, cache: spoil(*right(dy, cache)))
    assert worst() > 1e-3


def test_a_wrong_shape_or_precision_is_infinitely_wrong():
    x = np.ones((2, 3))
    for wrong in (np.ones(6), np.ones((2, 3), "float32")):
        errors = gradcheck.check_pair(
            lambda a: (a["x"] * 1, ()), lambda dy, c, g=wrong: {"x": g}, {"x": x}
        )
        assert errors["x"] == np.inf
