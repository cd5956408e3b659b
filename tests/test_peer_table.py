"""`python -m ref verify --peers`: every peer that is installed, and what becomes of one that is
not, that differs, or that fails."""

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ref import Error, nn, peer_packages, peer_twins, peers

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed (the extra `peers`)"
)


@needs_torch
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda p: f"{p.by or p.package}: {p.part}")
def test_a_peer_agrees(peer):
    if not peer.installed():
        pytest.skip(f"{peer.package} is not installed: {peer.absent or 'the extra `peers`'}")
    row = peer.row()
    assert row.ok, row.note
    assert row.verdict == ("known fault" if peer.fault else "agrees"), row.note
    if row.precision == "float64":
        assert row.forward < 1e-11
    if row.verdict == "agrees":
        assert row.excess <= 1
    state = ("batch norm, running moments", "AdamW", "clipping of the gradient's norm")
    assert (row.gradient is None) == (row.part in state)
    assert row.who.partition(", ")[2 if peer.by else 0].partition(" ")[2], "its version"


def test_every_model_and_every_layer_that_was_promised_is_there():
    parts = " ".join(peer.part for peer in peers.PEERS)
    for name in (
        *("hope", "s4d", "s4 ", "hyena", "l2t-student", "longhorn", "mamba", "tnn", "transformer"),
        *("AdamW", "layer norm", "RMS norm", "GELU, erf", "GELU, tanh", "GRU", "LSTM"),
        *("cross-entropy", "conv1d", "Huber", "batch norm", "attention", "GPT-2"),
    ):
        assert name in parts, name
    assert {p.package for p in peers.PEERS} == {"torch", "transformers", "mambapy", "tnn-pytorch"}


@needs_torch
def test_mambapy_is_wrong_for_complex_A_alone():
    pytest.importorskip("mambapy", reason="mambapy is not installed (the extra `peers`)")
    row = next(p for p in peers.PEERS if p.fault).row()
    assert row.verdict == "known fault" and row.gradient > 0.1 and row.forward < 1e-12
    real = peers.part_of("mamba", "scan", peer_packages.mambapy_scan)
    errors, problems = real()
    assert not problems and max(e for e, _ in errors.values()) < 1e-12


# Faults


def sign(y):
    return {n: -t for n, t in y.items()} if isinstance(y, dict) else -y


def planted(f, change):
    return lambda *args, **kwargs: change(f(*args, **kwargs))


def fails(f, model, part, **settings):
    """The Row of f as a peer"""
    return peers.Peer("torch", "planted", peers.part_of(model, part, f, **settings)).row()


@needs_torch
@pytest.mark.parametrize("name", peers.TWINS)
def test_a_sign_is_found_in_every_twin(name):
    f, settings = peers.TWINS[name]
    row = fails(planted(f, sign), *name.partition(",")[0].split(), **settings)
    assert not row.ok and row.forward > 1 and "out.y" in row.note


@needs_torch
@pytest.mark.parametrize("name", peers.LAYERS_OF_TORCH)
def test_a_factor_is_found_in_every_layer(name):
    forward, backward, theirs, *shapes = peers.LAYERS_OF_TORCH[name]

    def scaled(i, dy, cache):
        grads = found if isinstance(found := backward(dy, cache), tuple) else (found,)
        return tuple(g * (1.0001 if i == j else 1) for j, g in enumerate(grads))

    for i in range(len(shapes)):
        _, problems = peers.pair_of(forward, partial(scaled, i), theirs, *shapes)()
        assert [text.partition(":")[0] for text in problems] == [f"grad.{i}"]
    off = planted(theirs, lambda y: 1.0001 * y)
    row = peers.Peer("torch", "planted", peers.pair_of(forward, backward, off, *shapes)).row()
    assert not row.ok and row.forward > 1e-6 and row.gradient > 5e-5


@needs_torch
def test_realistic_faults_are_found():
    no_causal_mask = partial(peer_packages.attention, causal=False)
    assert not fails(no_causal_mask, "transformer", "mixer", n_heads=3).ok
    no_causal_mask = partial(peer_packages.encoder_layer, causal=False)
    assert not fails(no_causal_mask, "transformer", "block", n_heads=3).ok
    least = partial(peer_twins.tnn_operator, least=0.91)
    row = fails(least, "tnn", "operator", use_multi_decay=True, gamma=0.9)
    assert not row.ok
    exact = partial(peer_twins.longhorn_scan, step=peer_twins.exact_step)
    assert not fails(exact, "longhorn", "scan").ok


@needs_torch
@pytest.mark.parametrize("what", ["decay", "rate", "moments"])
def test_a_fault_in_our_own_optimiser_or_norm_is_found(monkeypatch, what):
    if what == "moments":
        monkeypatch.setattr(nn, "batch_norm_running", lambda mean, var, cache, m: (mean, var))
        row = next(p for p in peers.PEERS if p.part == "batch norm, running moments").row()
    else:
        update = peer_packages.optim.adamw_update

        def off(params, grads, moments, step, groups, scale):
            own = {"weight_decay": 1.001} if what == "decay" else {"lr": 1.001}
            groups = {
                n: replace(g, **{k: v * getattr(g, k) for k, v in own.items()})
                for n, g in groups.items()
            }
            return update(params, grads, moments, step, groups, scale)

        monkeypatch.setattr(peer_packages.optim, "adamw_update", off)
        row = next(p for p in peers.PEERS if p.part == "AdamW").row()
    assert row.verdict == "differs" and row.forward > 1e-6


@needs_torch
def test_what_gives_no_gradient_or_raises_or_has_another_shape_differs():
    def raises(p, x):
        raise ValueError("their API is another one")

    twin = peer_twins.s4d_mixer
    row = fails(raises, "s4d", "mixer")
    assert row.verdict == "differs" and "their API is another one" in row.note
    row = fails(planted(twin, lambda y: y.detach()), "s4d", "mixer")
    assert row.verdict == "differs" and row.gradient is None and "no gradients" in row.note
    row = fails(planted(twin, lambda y: y[:, 1:]), "s4d", "mixer")
    assert row.verdict == "differs" and "shape" in row.note
    row = fails(planted(twin, lambda y: y / 0), "s4d", "mixer")
    assert row.verdict == "differs" and "not finite" in row.note
    _, problems = peers.judged({"out.y": (np.array([np.nan]), np.ones(1))})
    assert problems
    broken = peers.Peer("torch", "broken", lambda: 1 / 0, fault="of gradients")
    assert broken.row().verdict == "differs" and "ZeroDivisionError" in broken.row().note


@needs_torch
def test_a_known_fault_excuses_gradients_alone():
    def of(**errors):
        found = {n.replace("_", "."): (np.array([e]), np.zeros(1)) for n, e in errors.items()}
        return peers.Peer("torch", "p", lambda: peers.judged(found), fault="no conjugate").row()

    assert of(out_y=0.0, grad_x=1.0).verdict == "known fault"
    assert of(out_y=1.0, grad_x=1.0).verdict == "differs"
    assert of(out_y=0.0, grad_x=0.0).verdict == "agrees"
    assert "no longer" in of(out_y=0.0, grad_x=0.0).note


# The command


ABSENT = peers.Peer("no-such-package", "mamba block", lambda: 1 / 0, module="no_such_package")


def made(error):
    found = {"out.y": (np.ones(2) + error, np.ones(2))}
    return peers.Peer("torch", f"error {error}", lambda: peers.judged(found))


@needs_torch
def test_the_table(capsys, tmp_path):
    assert peers.command(peers=[made(0), ABSENT]) == 0
    head, good, absent, count = capsys.readouterr().out.splitlines()
    assert head.split() == ["who", "part", "forward", "gradient", "verdict"]
    assert good.startswith("torch 2") and good.endswith("0.0e+00         -  agrees")
    assert absent.endswith("absent: pip install no-such-package")
    assert count == "1 of 1 agree, 1 not installed"
    path = tmp_path / "deep" / "peers.json"
    assert peers.command(path, peers=[made(0), made(1e-3), ABSENT]) == 1
    out = capsys.readouterr().out
    assert "1.0e-03         -  differs: out.y: error 1.0e-03" in out
    assert out.endswith("1 of 2 agree, 1 not installed\n")
    found = json.loads(path.read_text())
    assert not found["ok"] and [row["ok"] for row in found["peers"]] == [True, False, True]
    assert [row["verdict"] for row in found["peers"]] == ["agrees", "differs", "absent"]
    assert found["peers"][2]["forward"] is None


@needs_torch
def test_quiet_and_json_alone(capsys):
    assert peers.command(quiet=True, peers=[made(0), made(1e-3), ABSENT]) == 1
    _, wrong, count = capsys.readouterr().out.splitlines()
    assert "differs" in wrong and count.startswith("1 of 2 agree")
    assert peers.command("-", peers=[made(0)]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


@needs_torch
def test_threads_are_put_back():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    seen = []
    peers.Peer("torch", "p", lambda: (seen.append(torch.get_num_threads()), ({}, []))[1]).row()
    assert seen == [1] and torch.get_num_threads() == before


def test_without_pytorch_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Error, match="PyTorch, which is not installed"):
        peers.command()


def test_nothing_is_imported_before_it_is_needed():
    code = "import sys, ref.peers; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_twins_have_nothing_of_ours():
    tree = ast.parse(Path(peer_twins.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert sorted(names) == ["importlib", "math"]
