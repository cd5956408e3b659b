"""train.py --teacher: ref.teaching, ref.rounds, and what a run keeps of them."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import strict
from conftest import error, idx
from test_gpu import cupy_device
from test_lm_train import PROSE
from test_train import checkpoint, is_sentence, metrics, result, same, words

import data as data_sets
import train
from ref import (
    Error,
    backend,
    gradcheck,
    hvp,
    hyena,
    l2t_unrolled,
    network,
    optim,
    presets,
    rounds,
    tangents,
    teaching,
)

TINY = "--d-model 8 --n-layers 2 --batch-size 4 --max-length 16 --warmup 5"
SHORT = f"{TINY} --steps 12 --save-every 4 --eval-every 6 --log-every 4"
STUDENT = f"--model l2t-hyena --data shakespeare-char --dropout 0.1 {SHORT}"
SMALL_NETWORKS = "--gru-size 4 --dln-layers 2 --dln-size 5"
TEACHERS = {
    "static": "--teacher static --static-weight 0.3",
    "random": "--teacher static --weights random --weight-std 0.2",
    "released": f"--teacher released {SMALL_NETWORKS} --teacher-size 5 --memory-size 9",
    "corrected": f"--teacher released --corrected {SMALL_NETWORKS} --teacher-size 5",
    "hypergrad": f"--teacher hypergrad --inner-steps 4 {SMALL_NETWORKS} --meta-share 0.2",
    "sgd": f"--teacher hypergrad --inner sgd --inner-steps 2 {SMALL_NETWORKS} --meta-share 0.2",
    "lstm": "--teacher lstm --inner-steps 2 --lstm-size 3 --lstm-cells 2 --teacher-every 2 "
    f"--truncation 2 {SMALL_NETWORKS} --meta-share 0.2",
}
LINEAR = f"{TEACHERS['lstm']} --lstm-head linear --lstm-p 5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short text, and files in the format of MNIST"""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "input.txt").write_text(PROSE)
    for prefix, n in (("train", 40), ("t10k", 5)):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, n)))
    return folder


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """Run train.main on the arguments -> exit code, stdout, stderr"""
    monkeypatch.setattr(train, "draw_curves", lambda out: None)

    def run(*arguments):
        given = words(arguments)
        if "--resume" not in given:
            given += ["--data-dir", str(folder)]
        capsys.readouterr()
        code = train.main(given)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# From the command line


@pytest.mark.parametrize("name", [*TEACHERS, "linear head"])
def test_resumed_it_has_the_same_bits(call, tmp_path, monkeypatch, name):
    """Killed at the third checkpoint; the teacher's state is among the tensors of the second"""
    start = f"{STUDENT} {TEACHERS.get(name, LINEAR)}"
    code, _, err = call(start, "--out", tmp_path / "whole")
    assert code == 0, err
    save, left = train.runs.save_checkpoint, [3]

    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(train.runs, "save_checkpoint", dying)
        assert call(start, "--out", tmp_path / "cut")[0] == 1
    assert checkpoint(tmp_path / "cut")[1]["step"] == 4
    assert call("--resume", tmp_path / "cut")[0] == 0
    assert same(tmp_path / "cut", tmp_path / "whole")
    kept = [n for n in checkpoint(tmp_path / "whole")[0] if n.startswith("teacher.")]
    assert bool(kept) == (name not in ("static", "random"))
    of_head = {f"teacher.teacher{moment}/{m}head.{n}" for n in "Wb"
               for moment, m in (("", ""), ("_moments", "m."), ("_moments", "v."))}  # fmt: skip
    assert of_head <= set(kept) if name == "linear head" else not of_head & set(kept)


def test_what_is_logged(call, tmp_path):
    """The cross-entropy without weights for every teacher, and what belongs to each"""
    every = {"loss", "accuracy", "gradient_norm", "weighted_loss", "lr", "epoch", "step"}
    weights = {"weight_mean", "weight_std", "effective_penalty", "regulariser"}
    own = {
        "static": weights,
        "released": weights | {"teacher_loss", "dln_loss", "teacher_r2"},
        "hypergrad": weights | {"dln_loss", "hypergradient_norm", "alignment"},
        "lstm": weights | {"dln_loss", "teacher_loss", "hypergradient_norm", "alignment"},
    }
    for name, names in own.items():
        out = tmp_path / name
        assert call(f"{STUDENT} {TEACHERS[name]}", "--out", out)[0] == 0
        lines = [line for line in metrics(out) if "loss" in line]
        assert lines[-1].keys() == every | names and lines[-1]["step"] == 12
        first = lines[0]
        assert first["weighted_loss"] == pytest.approx(
            (1 - first["weight_mean"]) * first["loss"]
            + first["weight_mean"] * first["regulariser"],
            rel=0.05,
        )
        assert result(out)["teacher"] == name


@pytest.mark.parametrize(
    ("given", "on"),
    [
        ("released", ["features", "memory_path", "double_embedding", "embedding_std"]),
        ("corrected", []),
        ("hypergrad", []),
        ("static", []),
    ],
)
def test_result_lists_the_quirks_that_were_on(call, tmp_path, given, on):
    assert call(f"{STUDENT} {TEACHERS[given]}", "--out", tmp_path / "run")[0] == 0
    expected = [*on, "train_stride"] if on else []
    assert result(tmp_path / "run")["quirks"] == expected
    if on:
        more = "--no-double-embedding --embedding-std 0.02 --memory-path same"
        assert call(f"{STUDENT} {TEACHERS[given]} {more}", "--out", tmp_path / "own")[0] == 0
        assert result(tmp_path / "own")["quirks"] == ["features", "train_stride"]


@pytest.mark.parametrize("name", [n for n in TEACHERS if n not in ("corrected", "sgd", "random")])
@pytest.mark.parametrize("data", ["smnist", "mqar-64-4"])
def test_other_students_and_data(call, tmp_path, monkeypatch, name, data):
    """A classifier, and a recall model with targets at few positions; Mamba has differences only"""
    sizes = "--d-model 4 --n-layers 1 --batch-size 2 --steps 4 --log-every 2 --eval-samples 2"
    monkeypatch.setitem(
        data_sets.LOADERS,
        "mqar-64-4",
        lambda *a: data_sets.load_mqar(*a, sizes=(40, 4, 4)),
    )
    own = f"{sizes} {TEACHERS[name].replace('--inner-steps 4', '')}"
    if name == "lstm" and data == "smnist":
        own = own.replace(SMALL_NETWORKS, "--pair-size 3 --pair-layers 1")
    code, _, err = call(f"--model s4d --d-state 2 --data {data} {own}", "--out", tmp_path / "run")
    assert code == 0, err
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line)


BAD = {
    "--teacher released --memory-size 3": "memory_size=3 is smaller than batch_size=4",
    "--teacher hypergrad --inner-steps 0": "inner_steps=0",
    "--teacher lstm --truncation 2": "truncation=2",
    "--teacher hypergrad --double-embedding": "--double-embedding",
    "--teacher hypergrad --temperature 3": "--temperature does nothing with --teacher hypergrad",
    "--teacher none --reg-strength 3": "--reg-strength does nothing with --teacher none",
    "--teacher static --corrected": "--corrected is for --teacher released",
    "--teacher static --static-weight 1.5": "static_weight=1.5",
    "--teacher static --weights replay": "--replay RUN",
    "--teacher static --weights random --weight-std 0.6": "weight_std=0.6",
    "--teacher hypergrad --no-detach --features released": "features=released",
    "--teacher lstm --lstm-p 0": "lstm_p=0.0: expected more than 0 and at most 40",
    "--teacher lstm --lstm-p -2": "lstm_p=-2.0: expected more than 0",
    "--teacher lstm --lstm-p 41": "lstm_p=41.0: expected more than 0",
    "--teacher lstm --lstm-head last": "'last' is not one of 'cell', 'linear'",
    "--teacher released --lstm-p 5": "--lstm-p does nothing with --teacher released",
    "--teacher released --lstm-head cell": "--lstm-head does nothing with --teacher released",
    "--teacher nobody": "'nobody'",
    "--teacher released --batch-size 1": "batch_size=1",
    "--teacher hypergrad --inner momentum --inner-momentum 1": "inner_momentum=1",
    "--teacher lstm --dln-lr 0.1": "--dln-lr does nothing",
    "--teacher hypergrad --lstm-size 4": "--lstm-size does nothing",
    "--teacher hypergrad --update-scale 4": "--update-scale does nothing",
    "--teacher hypergrad --dln-optimiser sgd --dln-lr 0.1": "--dln-lr does nothing",
    "--teacher hypergrad --inner-lr 0.1": "--inner-lr does nothing",
    "--teacher hypergrad --meta-split valid --meta-share 0.1": "--meta-share does nothing",
    "--teacher hypergrad --pair-size 4": "--pair-size does nothing",
    "--teacher lstm --dln pairs --reg-strength 4": "--reg-strength does nothing",
    "--teacher static --weight-std 0.1": "--weight-std does nothing",
}


@pytest.mark.parametrize("given", BAD)
def test_wrong_usage(call, tmp_path, given):
    code, _, err = call(f"{STUDENT} {given}", "--out", tmp_path / "run")
    assert (code, is_sentence(err)) == (2, True)
    assert BAD[given] in err


LATER = {
    "--model mamba --teacher hypergrad --hvp exact": "--hvp exact",
    "--model l2t-hyena --teacher hypergrad --hvp exact --no-detach": "--hvp exact",
    "--model l2t-hyena --teacher hypergrad --meta-share 0.001": "",
    "--model l2t-hyena --teacher static --weights replay --replay nowhere": "metrics.jsonl",
    "--model l2t-hyena --teacher released --no-write-first --tied no": "tied",
}


@pytest.mark.parametrize("given", LATER)
def test_what_does_not_go_together(call, tmp_path, given):
    """Found when data and student are there"""
    code, _, err = call(f"{given} --data shakespeare-char {SHORT}", "--out", tmp_path / "run")
    assert (code, is_sentence(err.splitlines()[-1])) == (1, True)
    assert LATER[given] in err
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_another_runs_weights(call, tmp_path):
    """Control C4: the mean weight of every step of an adaptive run; the run may be gone later"""
    released = f"{STUDENT} {TEACHERS['released']} --log-every 1"
    assert call(released, "--out", tmp_path / "first")[0] == 0
    replay = f"{STUDENT} --log-every 1 --teacher static --weights replay"
    assert call(replay, "--replay", tmp_path / "first", "--out", tmp_path / "again")[0] == 0
    means = [
        [line["weight_mean"] for line in metrics(tmp_path / run) if "weight_mean" in line]
        for run in ("first", "again")
    ]
    assert error(means[1], means[0]) < 1e-6 and len(means[0]) == 12
    (tmp_path / "first" / "metrics.jsonl").unlink()
    assert call("--resume", tmp_path / "again", "--eval-only")[0] == 0


def test_best_and_last(call, tmp_path):
    """--select best tests the parameters of the lowest validation loss, kept in a file"""
    start = f"{STUDENT} --teacher none --lr 0.3 --warmup 1 --eval-every 1 --embedding-std 1"
    assert call(start, "--select best --out", tmp_path / "best")[0] == 0
    assert call(start, "--out", tmp_path / "last")[0] == 0
    valid = [line["valid_loss"] for line in metrics(tmp_path / "last") if "valid_loss" in line]
    chosen = result(tmp_path / "best")
    assert chosen["valid_loss"] == min(valid) < valid[-1]
    assert chosen["selected_step"] == 1 + valid.index(min(valid))
    assert chosen["test_loss"] != result(tmp_path / "last")["test_loss"]
    code, text, _ = call("--resume", tmp_path / "best", "--eval-only")
    assert code == 0 and f"loss {chosen['test_loss']:.4f}" in text


def test_a_batch_without_a_finite_loss_is_skipped(call, tmp_path, monkeypatch):
    """Neither student nor teacher step, nor does the batch reach the memory"""
    step, at = teaching.Released.loss, {1, 5}

    def spoilt(self, logits, targets, B, number, square=None):
        dlogits, dsquare, values = step(self, logits, targets, B, number, square)
        return dlogits, dsquare, values | ({"loss": math.nan} if number in at else {})

    monkeypatch.setattr(teaching.Released, "loss", spoilt)
    start = f"{STUDENT} {TEACHERS['released']} --log-every 1"
    assert call(start, "--out", tmp_path / "skipped")[0] == 0
    count = np.frombuffer(checkpoint(tmp_path / "skipped")[0]["teacher.memory/at"][2], "int64")
    assert count[0] == 10 * 4 % 9
    lines = [line for line in metrics(tmp_path / "skipped") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, *range(6, 13)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    rates = [line["lr"] for line in lines]
    assert rates[2] * 4 / 3 == pytest.approx(rates[3]), "the schedule does not count it either"
    code, _, err = call(start, "--on-nan stop --out", tmp_path / "stopped")
    assert code == 1 and "at step 1" in err


# Identities


def built(teacher, recipe=(), seed=3, dtype="float64", K=1, V=11, inner=None, groups=None, **own):
    """A two-layer student of L2T-Hyena with a teacher: Config, params, Rounds, batches, held out"""
    layer = hyena.Config(
        d_model=6, l_max=8, filter="gated", recurrence="residual", block="bare", dropout=0.2
    )
    cfg = network.Config(
        "hyena", layer, 2, V, V, decoder="lm", tied=True, final_norm=True, positions=8,
        embedding_std=1.0,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    params = network.init(cfg, rng, dtype)
    params["blocks.h"] = params["blocks.h"] + 0.5  # off the kinks of its norm
    batches = [batch(rng, V, 8) for _ in range(K)]
    held_out = batch(rng, V, 8)
    recipe = presets.Recipe(**dict(recipe) | {"lr": 0.05, "weight_decay": 0.1})
    chosen = teaching.SMALL | {"teacher": teacher, "inner_steps": K, "dln_dropout": 0.1} | own
    groups = dict.fromkeys(params, optim.Group(0.05, 0.1))
    made = rounds.Rounds(
        teaching.Config(**chosen), cfg, groups, recipe, lambda rng: held_out, seed, dtype
    )
    for name, p in made.state["dln"].items():
        made.state["dln"][name] = p + 0.5 * rng.standard_normal(p.shape).astype(dtype)
    return cfg, params, made, batches, held_out


def batch(rng, V, L, B=3):
    tokens = rng.integers(0, V, (B, L + 1))
    return data_sets.Batch(tokens[:, :-1].astype("int32"), tokens[:, 1:], np.full(B, L))


def features_of(made, params, moments, batches, held_out):
    """The features of a roll-out, as constants"""
    found, loss = [], made._loss

    def watched(theta, phi, batch, step, features=None, **given):
        z, y, _ = made._forward(theta, batch, step)
        found.append(rounds.l2t.features_forward(z, y, made.cfg)[0])
        return loss(theta, phi, batch, step, features, **given)

    made._loss = watched
    made.roll_out(params, moments, made.state["dln"], batches, 3, lambda step: 1.0, held_out)
    made._loss = loss
    return found


TOLERANCE = gradcheck.TOLERANCE


def stencil(made, f, at, G, seed, step=1e-3):
    """Error of G along one random direction of φ, by four points"""
    rng = np.random.default_rng(seed)
    v = {name: rng.standard_normal(p.shape) for name, p in at.items()}

    def moved(k):
        return f({name: p + k * step * v[name] for name, p in at.items()})

    slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    size = math.sqrt(hvp.inner(G, G) * hvp.inner(v, v) / sum(p.size for p in at.values()))
    return abs(slope - hvp.inner(G, v)) / size


@pytest.mark.parametrize("method", ["exact", "differences"])
@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("inner", ["momentum", "adamw"])
def test_hypergradient_is_the_slope_of_the_held_out_loss(inner, granularity, method):
    """Two layers, K = 3, clipping, dropout with the masks of the steps, constant features"""
    clip = {"clip": 0.5} if inner == "adamw" else {"clip": 0.0}
    more = {"granularity": granularity, "hvp": method, "inner_lr": 0.2}
    _, params, made, batches, held_out = built("hypergrad", clip, K=3, inner=inner, **more)
    rng = np.random.default_rng(0)
    moments = {f"m.{name}": 0.01 * rng.standard_normal(p.shape) for name, p in params.items()}
    moments |= {f"v.{name}": 1e-4 * (1 + rng.random(p.shape)) for name, p in params.items()}
    features = features_of(
        made, params, moments, batches, held_out
    )  # moments: a first step is a jump
    own = batches, 3, lambda step: 1.0, held_out, features
    E, G, *_ = made.roll_out(params, moments, made.state["dln"], *own)

    def value(phi):
        return made.roll_out(params, moments, phi, *own)[0]

    assert value(made.state["dln"]) == E
    for seed in range(3):
        assert stencil(made, value, made.state["dln"], G, seed) < 1e-7


@pytest.mark.parametrize("regulariser", ["logits", "weights", "entropy"])
def test_exact_products_are_those_of_differences(regulariser):
    _, params, made, batches, _ = built("hypergrad", regulariser=regulariser)
    rng = np.random.default_rng(0)
    v = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    own = params, made.state["dln"], batches[0], 1, v
    exact = made._products(*own)
    made.exact = False
    for ours, theirs in zip(exact, made._products(*own), strict=True):
        assert ours.keys() == theirs.keys()
        for name, product in theirs.items():
            assert error(ours[name], product) < 1e-6, name


def test_attached_features_are_differentiated():
    """The student's gradient of the whole loss, features and loss network within, by a stencil"""
    own = {"detach": False, "hvp": "differences", "granularity": "sequence"}
    _, params, made, batches, _ = built("hypergrad", **own)
    grads = made._loss(params, made.state["dln"], batches[0], 1)[0]

    def value(moved):
        return made._loss(moved, made.state["dln"], batches[0], 1)[2][0]

    assert stencil(made, value, params, grads, 0, 1e-5) < TOLERANCE
    made.cfg = replace(made.cfg, detach=True)
    assert (
        stencil(made, value, params, made._loss(params, made.state["dln"], batches[0], 1)[0], 0)
        > 1e-4
    )


@pytest.mark.parametrize("inner", ["adamw", "sgd"])
def test_one_step_needs_no_hessian_product(monkeypatch, inner):
    _, params, made, batches, _ = built("hypergrad", inner=inner)
    monkeypatch.setattr(tangents, "backward", None)
    made.round(params, optim.adamw_init(params), batches, 1, 10, lambda step: 1.0)


def test_committed_steps_are_those_of_training():
    """The student of a round under constant weights takes the steps of --teacher static"""
    cfg, params, made, batches, _ = built("hypergrad", {"clip": 0.7}, K=3, dtype="float32")
    dln = made.state["dln"]
    dln["W_1"], dln["b_1"] = 0 * dln["W_1"], np.float32([0.3])
    w = float(rounds.l2t.weight_forward(np.float32([0.3]))[0][0])
    moments = optim.adamw_init(params)
    theta, after, _ = made.commit(params, moments, dln, batches, 1, lambda step: 1 / step)
    static = teaching.Static(teaching.Config(teacher="static", static_weight=w), 3)
    recipe = presets.Recipe(clip=0.7)
    params = {name: p.copy() for name, p in params.items()}
    for step, one in enumerate(batches, 1):
        own = params, moments, one, step, step, 3, 1 / step, static, cfg, recipe
        teaching.train_step(*own, made.trained, 3)
    for name, p in params.items():
        assert np.array_equal(theta[name], p), name
    for name, p in moments.items():
        assert np.array_equal(after[name], p), name


def test_constant_weights_are_the_static_run(call, tmp_path, monkeypatch):
    """The released step with a loss network that gives one weight is the static run, bit for bit"""
    init = teaching.l2t.dln_init

    def constant(cfg, rng, dtype):
        params = init(cfg, rng, dtype)
        last = cfg.dln_layers
        zero = {n: 0 * params[n] for n in (f"W_{last}", "W_r", "b_r")}
        return params | zero | {f"b_{last}": np.full(1, 0.4, dtype)}

    monkeypatch.setattr(teaching.l2t, "dln_init", constant)
    w = teaching.l2t.weight_forward(np.full(1, 0.4, "float32"))[0][0]
    student = "--no-double-embedding --embedding-std 0.02 --train-stride 1"
    own = f"{STUDENT} {TEACHERS['released']} --dln-lr 0 --teacher-lr 0 {student}"
    assert call(own, "--out", tmp_path / "released")[0] == 0
    own = f"{STUDENT} --teacher static --static-weight {float(w)!r} {student}"
    assert call(own, "--out", tmp_path / "static")[0] == 0
    ours, theirs = (checkpoint(tmp_path / run)[0] for run in ("released", "static"))
    student = [name for name in theirs if name.startswith(("param.", "adamw."))]
    assert student and all(ours[name] == theirs[name] for name in student)


@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_half_a_weight_is_a_penalty_of_a_tenth(call, tmp_path, clip):
    """(CE + 0.1 z²)/2 against CE + 0.1 z²: to AdamW's epsilon, the clipping threshold halved"""
    own = f"{STUDENT} --dtype float64 --teacher static --embedding-std 1"
    mixed = f"{own} --static-weight 0.5 --clip {clip / 2}"
    added = f"{own} --loss-form additive --static-weight 1 --reg-strength 0.1 --clip {clip}"
    assert call(mixed, "--out", tmp_path / "mixed")[0] == 0
    assert call(added, "--out", tmp_path / "added")[0] == 0
    losses = [[line["loss"] for line in metrics(tmp_path / run) if "loss" in line]
              for run in ("mixed", "added")]  # fmt: skip
    assert error(*losses) < 1e-4
    norms = [[line["gradient_norm"] for line in metrics(tmp_path / run) if "loss" in line]
             for run in ("mixed", "added")]  # fmt: skip
    assert error(2 * np.array(norms[0]), norms[1]) < 1e-3


def test_identity_teacher_is_sgd_on_the_loss_network():
    own = {"update_scale": 0.01, "dln_optimiser": "sgd"}
    _, params, made, batches, held_out = built("hypergrad", K=2, **own)
    moments, phi = optim.adamw_init(params), made.state["dln"]

    def roll_out(phi):
        return made.roll_out(params, moments, phi, batches, 1, lambda step: 1.0, held_out)

    done = l2t_unrolled.teach(phi, roll_out, l2t_unrolled.identity_teacher, 0.01)
    theta, *_ = made.round(params, moments, batches, 1, 10, lambda step: 1.0)
    for name, p in done.phi.items():
        assert np.array_equal(made.state["dln"][name], p)
        assert not np.array_equal(p, phi[name]) or name in (
            "W_r",
            "b_r",
            "norm_weight",
            "norm_bias",
        )
    assert all(np.array_equal(theta[name], p) for name, p in done.second[2].items())


of_teachers = pytest.mark.parametrize(
    ("head", "p"), [("cell", 10.0), ("linear", 10.0), ("linear", 5.0)]
)


@of_teachers
def test_a_round_of_the_lstm_is_the_published_one(head, p):
    """M = J = 1: ref.l2t_unrolled.teach, and a step of Adam along its gradient"""
    own = {"lstm_size": 4, "lstm_cells": 3, "update_scale": 0.1, "teaching_schedule": "constant"}
    own |= {"lstm_head": head, "lstm_p": p}
    _, params, made, batches, held_out = built("lstm", K=2, dln="weights", **own)
    moments, psi = optim.adamw_init(params), made.state["teacher"]

    def roll_out(phi):
        return made.roll_out(params, moments, phi, batches, 1, lambda step: 1.0, held_out)

    size = sum(x.size for x in made.state["dln"].values())
    teacher = l2t_unrolled.lstm_teacher(psi, l2t_unrolled.teacher_state(psi, size), p)
    assert psi["2.U"].shape == ((4, 1) if head == "cell" else (16, 4))
    assert ("head.W" in psi) == (head == "linear")
    done = l2t_unrolled.teach(made.state["dln"], roll_out, teacher, 0.1)
    theta, _, lines = made.round(params, moments, batches, 1, 10, lambda step: 1.0)
    assert all(np.array_equal(theta[name], x) for name, x in done.second[2].items())
    assert all(np.array_equal(made.state["dln"][name], x) for name, x in done.phi.items())
    expected, after = {n: x.copy() for n, x in psi.items()}, optim.adamw_init(psi)
    teaching.adamw(expected, done.grads, after, 1, made.cfg.teacher_lr, 0.0, 0.0)
    assert all(np.array_equal(made.state["teacher"][name], x) for name, x in expected.items())
    assert lines[-1]["dln_loss"] == done.first[0] and lines[-1]["teacher_loss"] == done.second[0]


@of_teachers
def test_lstm_gradient_through_several_updates(head, p):
    """J = 3 of M = 4: of <c, φ'> in ψ, the inputs constants; the update before is a constant"""
    own = {"lstm_size": 3, "lstm_cells": 2, "update_scale": 0.1, "lstm_head": head, "lstm_p": p}
    _, _, made, *_ = built("lstm", dln="weights", teacher_every=4, truncation=3, **own)
    rng, phi = np.random.default_rng(0), made.state["dln"]
    G = [{n: 0.1 * rng.standard_normal(x.shape) for n, x in phi.items()} for _ in range(5)]
    cells = []
    for i in range(4):
        cells.append(made.state["cells"])
        made.state |= {"dln": made._lstm(G[i]), "rounds": made.state["rounds"] + 1}
    grads = made.teacher_gradient(G[4])

    def value(psi):
        state, total = [cells[1][str(i)] for i in range(2)], 0.0
        for g in G[1:4]:
            u, state, _ = l2t_unrolled.teacher_forward(psi, l2t_unrolled.flatten(g), state, p)
            total -= 0.1 * float(u @ l2t_unrolled.flatten(G[4]))
        return total

    assert stencil(made, value, made.state["teacher"], grads, 0, 1e-4) < TOLERANCE


@pytest.mark.parametrize("teacher", ["hypergrad", "lstm", "linear head"])
def test_float32_stays_float32(teacher):
    own = {} if teacher == "hypergrad" else {"lstm_size": 3}
    if teacher == "linear head":
        own, teacher = own | {"lstm_head": "linear", "lstm_p": 5.0}, "lstm"
    _, params, made, batches, _ = built(teacher, K=2, dtype="float32", dln="weights", **own)
    params, moments, _ = made.round(
        params, optim.adamw_init(params), batches, 1, 10, lambda step: 1.0
    )
    state = teaching.tensors_of(made.state)
    del state["rounds"]
    for name, p in (params | moments | state).items():
        assert p.dtype == "float32", name


# The student's part of the released code


def test_doubled_embedding_is_pytorchs(one_torch_thread):
    """A parameter listed twice: two steps of AdamW in one, and twice in the norm"""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    layer = hyena.Config(d_model=4, l_max=5, filter="gated", recurrence="residual", block="bare")
    cfg = network.Config("hyena", layer, 1, 7, 7, decoder="lm", tied=True, final_norm=True)
    params = network.init(cfg, rng, "float64")
    recipe = presets.Recipe(clip=0.3, double_embedding=True)
    groups = dict.fromkeys(params, optim.Group(0.01, 0.15))
    theirs = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in params.items()}
    listed = [*theirs.values(), theirs["encoder.weight"]]
    with pytest.warns(UserWarning, match="duplicate"):
        adamw = torch.optim.AdamW(listed, lr=0.01, weight_decay=0.15, foreach=False)
    moments, teacher = optim.adamw_init(params), teaching.CrossEntropy()
    for step in (1, 2, 3):
        one = batch(rng, 7, 5)
        logits, targets, cache = network.predict(params, one, cfg)
        dlogits, *_ = teacher.loss(logits, targets, 3, step)
        for name, g in network.backward(dlogits, cache)[1].items():
            theirs[name].grad = torch.tensor(g)
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in listed))
        for p in theirs.values():
            p.grad *= min(1.0, 0.3 / (norm + 1e-6))
        adamw.step()
        own = params, moments, one, step, step, 3, 1.0, teacher, cfg, recipe
        values = teaching.train_step(*own, groups, 0)
        assert values["gradient_norm"] == pytest.approx(norm, rel=1e-12)
    for name, p in params.items():
        assert error(p, theirs[name].detach().numpy()) < 1e-12, name


def test_the_paper_run_has_its_steps():
    """Ten epochs of the 929,589 - 64 windows of Penn Treebank, in batches of 128"""
    given = {"model": "l2t-hyena", "data": "ptb", "preset": "paper"}
    for more in ({}, {"teacher": "none"}, {"teacher": "hypergrad"}):
        recipe = presets.Recipe(**presets.make_settings(given | more)["recipe"])
        assert recipe.steps == 10 * ((929_589 - 64) // 128) == 72_610
        assert recipe.warmup == 2 * recipe.steps // 10
    split = data_sets._stream(np.arange(500, dtype="uint8") % 7)
    splits = dict.fromkeys(("train", "valid", "test"), split)
    made = data_sets.windowed(data_sets._stream_data("t", splits, "abcdefg", "word", ""), 8)
    for stride, windows in ((0, 61), (1, 492)):
        recipe = presets.Recipe(epochs=2.0, batch_size=4, train_stride=stride)
        assert train.planned_steps(recipe, made) == 2 * (windows // 4)


def test_what_no_gradient_reaches_does_not_decay():
    """As in PyTorch, where it has none"""
    own = {"gru_size": 3, "dln_size": 4, "teacher_size": 4, "memory_size": 8, "dln_lr": 0.01}
    for path in ("released", "same"):
        cfg = teaching.Config(teacher="released", dln_weight_decay=0.5, memory_path=path, **own)
        teacher, rng = teaching.Released(cfg, 0, 6, "float64"), np.random.default_rng(0)
        before = {n: p.copy() for n, p in teacher.state["dln"].items()}
        for step in range(1, 4):
            z, y = rng.standard_normal((4, 6, 9)), rng.integers(0, 9, (4, 6))
            teacher.loss(z, y, 4, step)
            teacher.learn(step, 10)
        after = teacher.state["dln"].items()
        same_as_before = {n for n, p in after if np.array_equal(p, before[n])}
        expected = {"norm_weight", "norm_bias", "W_r", "b_r"} if path == "released" else set()
        assert same_as_before == expected


def test_a_single_sequence_teaches_nothing(call, tmp_path):
    """A batch of one, which a rare length may leave"""
    cfg = teaching.Config(teacher="released", gru_size=3, dln_size=4, teacher_size=4)
    teacher, rng = teaching.Released(cfg, 0, 6, "float64"), np.random.default_rng(0)
    kept = {n: p.copy() for n, p in teaching.tensors_of(teacher.state).items()}
    z, y = rng.standard_normal((1, 6, 9)), rng.integers(0, 9, (1, 6))
    dlogits, _, values = teacher.loss(z, y, 1, 1)
    teacher.learn(1, 10)
    assert dlogits.shape == z.shape and values["weight_std"] == 0
    assert all(np.array_equal(p, kept[n]) for n, p in teaching.tensors_of(teacher.state).items())


def test_replayed_weights_on_the_device():
    cfg = teaching.Config(teacher="static", weights="replay", replay="x")
    schedule = {"steps": np.array([1.0, 3.0]), "weights": np.array([0.2, 0.4])}
    teacher = teaching.Static(cfg, 0, schedule)
    teacher.state = teaching.restored(teacher.state, teaching.tensors_of(teacher.state), strict)
    rng = np.random.default_rng(0)
    z, y = rng.standard_normal((2, 3, 5)), rng.integers(0, 5, (2, 3))
    *_, values = teacher.loss(strict.asarray(z), strict.asarray(y), 2, 2)
    assert values["weight_mean"] == pytest.approx(0.3)


def test_random_weights_have_the_moments():
    cfg = teaching.Config(
        teacher="static", weights="random", static_weight=0.3, weight_std=0.12, granularity="token"
    )
    w = teaching.Static(cfg, 0)._weights(np.zeros((400, 100)), 1)
    assert abs(w.mean() - 0.3) < 2e-3 and abs(w.std() - 0.12) < 2e-3
    assert w.min() > 0 and w.max() < 1


def test_settings_have_different_names():
    """No setting of a teacher is one of a student or of its recipe: each is one option"""
    own = {field.name for field in teaching.fields(teaching.Config)}
    others = {field.name for field in teaching.fields(presets.Recipe)}
    others |= {field.name for field in teaching.fields(presets.Run)}
    for model in network.MODELS:
        layer = network.model_module(model).Config
        others |= {field.name for field in teaching.fields(layer)}
    assert not own & others
    for names in (teaching.OF_WEIGHTS, teaching.OF_LOSS, teaching.OF_ROUNDS, teaching.OF_PREDICTOR):
        assert names <= own
    for a, b in pairwise((teaching.OF_WEIGHTS, teaching.OF_LOSS, teaching.OF_ROUNDS)):
        assert not a & b


def test_sequences_with_different_numbers_of_targets():
    with pytest.raises(Error, match="different numbers of targets"):
        teaching.by_sequence(np.zeros((5, 3)), np.zeros(5, int), 2)


def test_config_says_which_teacher(call, tmp_path):
    assert call(f"{STUDENT} --teacher none", "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teaching"] == {}
    settings = presets.read_settings(tmp_path / "run" / "config.json")
    assert settings["layer"]["filter"] == "gated" and settings["model"] == "l2t-hyena"


# On the device


@pytest.mark.parametrize("machine", ["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "name", ["static", "released", "hypergrad", "differences", "lstm", "linear head"]
)
def test_on_arrays_of_the_device(plain, name, machine):
    """A step or a round there gives the numbers of the readable form"""
    device = strict if machine == "strict" else cupy_device()
    own = {"lstm_size": 3, "dln": "weights"} if name in ("lstm", "linear head") else {}
    own |= {"lstm_head": "linear"} if name == "linear head" else {}
    own |= {"hvp": "differences"} if name == "differences" else {}
    own |= {"dln_optimiser": "sgd"}  # Adam makes a rounding error a whole step
    rounded = name not in ("static", "released")
    kind = {"differences": "hypergrad", "linear head": "lstm"}.get(name, name)
    cfg, params, made, batches, _ = built(kind if rounded else "hypergrad", K=2, **own)
    if name == "static":
        teacher = teaching.Static(teaching.Config(teacher="static"), 3)
    elif name == "released":
        chosen = {"gru_size": 3, "dln_size": 4, "teacher_size": 4, "memory_size": 7}
        chosen |= {"features": "corrected"}
        teacher = teaching.Released(teaching.Config(teacher="released", **chosen), 3, 8, "float64")
    else:
        teacher = made
    kept, moments = teaching.tensors_of(teacher.state), optim.adamw_init(params)

    def run(xp):
        def there(arrays):
            return {n: backend.to_device(p.copy(), xp) for n, p in arrays.items()}

        fresh = {n: p.copy() for n, p in kept.items()}
        teacher.state = teaching.restored(teacher.state, fresh, xp)
        theta, own = there(params), there(moments)
        if rounded:
            theta, *_ = teacher.round(theta, own, batches, 1, 10, lambda step: 1.0)
        else:
            recipe = presets.Recipe(double_embedding=True)
            given = batches[0], 1, 1, 10, 1.0, teacher, cfg, recipe
            teaching.train_step(theta, own, *given, made.trained, 3)
            theta = {n: m for n, m in own.items() if n.startswith("m.")}
        state = teaching.tensors_of(teacher.state)
        theta |= {n: p for n, p in state.items() if n.startswith("dln_moments/m")}
        return {n: backend.to_host(p) for n, p in theta.items()}

    expected, found = plain(run, np), run(device)
    for name, p in expected.items():
        assert error(found[name], p) < 1e-9, name
