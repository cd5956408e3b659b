"""The recipes behind --preset, and every model on every kind of data set from the command line."""

import json
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import idx

import data as data_sets
import train
from ref import Error, info, network, presets, teaching
from ref.files import read_tensors

ROOT = Path(__file__).parent.parent
RECIPES = tomllib.loads((ROOT / "ref" / "recipes.toml").read_text())
TINY = ("--d-model", "6", "--n-layers", "2", "--batch-size", "4")


def test_every_recipe_is_one():
    """No name is misspelt, each makes settings, and a model and a data set stand behind it"""
    run = {"max_length"} | {f.name for f in fields(presets.Recipe)}
    small, paper = RECIPES["small"], RECIPES["paper"]
    assert small["model"].keys() == paper.keys() <= set(network.NAMES)
    assert small["data"].keys() == set(data_sets.NAMES)
    assert set(presets.STREAMS) == set(data_sets.STREAMS)
    teacher = {f.name for f in fields(teaching.Config)}
    for model in network.NAMES:
        known = run | teacher | {f.name for f in fields(network.model_module(model).Config)}
        for recipe in (small["all"], small["model"][model], *paper[model].values()):
            assert recipe.keys() <= known
        for data in data_sets.NAMES:
            assert small["data"][data].keys() <= run
            for name in presets.PRESETS:
                if name == "small" or data in presets.published(model):
                    settings = presets.make_settings({"model": model, "data": data, "preset": name})
                    chosen = presets.preset(model, data, name)
                    given = settings | settings["layer"] | settings["recipe"]
                    given |= settings["teaching"]
                    assert {n: given[n] for n in chosen} == chosen
        assert set(presets.published(model)) <= set(data_sets.NAMES)


def test_info_prints_them():
    text = info.describe("s4d", {}, 100)
    assert "    smnist, small: --d-model 64 --n-layers 4 --bidirectional" in text
    assert "    lra-pathfinder, paper: --bidirectional --init lin" in text
    assert "smnist-noise, paper" not in text
    assert "--prenorm" in text and "--decoder last" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files in the formats of MNIST, of AAN and of lra-listops"""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for prefix, n in (("train", 24), ("t10k", 5)):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, n)))
    for name in ("train", "eval", "test"):
        texts = [
            ["".join(rng.choice(list("abc "), rng.integers(1, 90))) for _ in "12"] for _ in range(9)
        ]
        lines = [f"{i % 2}\tP{i}\tQ{i}\t{a}\t{b}\n" for i, (a, b) in enumerate(texts)]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines))
    for name in ("train", "val", "test"):
        lines = [f"[MAX {i} {9 - i} ]\t{max(i, 9 - i)}\n" for i in range(9)]
        (folder / f"basic_{name}.tsv").write_text("Source\tTarget\n" + "".join(lines))
    return folder


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """Run train.main -> exit code, stdout and stderr together"""
    monkeypatch.setattr(train, "draw_curves", lambda out: None)

    def run(*arguments):
        capsys.readouterr()
        code = train.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.mark.parametrize("data", ["smnist", "smnist-noise", "lra-retrieval", "lra-listops"])
@pytest.mark.parametrize("model", network.MODELS)
def test_every_model_trains_on_every_kind(model, data, call, folder, tmp_path):
    own = {"transformer": ("--n-heads", "2"), "tnn": ("--rpe-dim", "4")}
    own["hyena"] = ("--filter-order", "4")
    own = own.get(model, ("--d-state", "4"))
    start = ("--model", model, "--data", data, "--data-dir", folder, *TINY, "--steps", 3, *own)
    code, text = call(*start, "--out", tmp_path / "run")
    assert code == 0 and "test accuracy" in text, text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    longest = {"smnist": 784, "smnist-noise": 1568, "lra-retrieval": 1024, "lra-listops": 2048}
    if model in ("s4", "hyena"):
        assert config["layer"]["l_max"] == longest[data]
    if model == "transformer":
        assert config["layer"]["context"] == longest[data] and config["layer"]["depth"] == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_samples"] == (5 if "smnist" in data else 9)


def test_a_resumed_run_draws_the_same_noise(call, folder, tmp_path):
    start = ("--model", "s4", "--data", "smnist-noise", "--data-dir", folder, *TINY)
    more = ("--d-state", "4", "--steps", "4", "--save-every", "2")
    assert call(*start, *more, "--out", tmp_path / "whole")[0] == 0
    train_batches = data_sets.train_batches

    def interrupted(*args, **kwargs):
        batches = train_batches(*args, **kwargs)
        yield next(batches)
        yield next(batches)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(data_sets, "train_batches", interrupted)
        assert call(*start, *more, "--out", tmp_path / "cut")[0] == 1
    assert call("--resume", tmp_path / "cut")[0] == 0
    whole, cut = (
        read_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


def test_a_picture_of_another_run_s_checkpoint(call, folder, tmp_path):
    plots = pytest.importorskip("ref.plots", reason="matplotlib is not installed")
    start = ("--data", "smnist", "--data-dir", folder, *TINY, "--steps", 1, "--d-state", 4)
    for model in ("s4", "s4d"):
        assert call("--model", model, *start, "--out", tmp_path / model)[0] == 0
    plots.draw("kernel", tmp_path / "s4", (), {}, 5000, 0, tmp_path / "p.png")
    (tmp_path / "s4" / "checkpoint.safetensors").replace(
        tmp_path / "s4d" / "checkpoint.safetensors"
    )
    with pytest.raises(Error, match="are not of one run"):
        plots.draw("kernel", tmp_path / "s4d", (), {}, 50, 0, tmp_path / "p.png")


def test_evaluations_on_a_part(call, folder, tmp_path):
    start = ("--model", "hope", "--data", "smnist", "--data-dir", folder, *TINY, "--steps", 3)
    code, text = call(*start, "--eval-samples", 3, "--out", tmp_path / "run")
    assert code == 0 and "on 3 of the 5 test samples (--eval-samples)" in text


def test_bad_combinations_get_their_sentence(call, folder, tmp_path):
    for wrong, sentence in (
        ("--data lra-retrieval --decoder last", "2 document(s) a sample, and --decoder last does"),
        ("--data smnist --decoder match", "expected --decoder mean"),
        ("--data smnist --max-length 9", "max_length"),
        ("--data smnist-noise --preset paper", "no published recipe of hope on smnist-noise"),
        ("--data smnist --model s4 --l-max 100", "--l-max 100 is below the 784 steps"),
        ("--data smnist --decoder middle", "expected one of: auto, mean"),
        ("--data lra-image", "cifar-10-batches-bin"),
        ("--data lra-text", "aclImdb"),
    ):
        model = () if "--model" in wrong else ("--model", "hope")
        start = (*model, *wrong.split(), "--data-dir", folder, "--steps", "2")
        code, text = call(*start, "--out", tmp_path / "run")
        assert code in (1, 2) and sentence in text and "Traceback" not in text, text
        assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
