"""train.py where every position has a target: associative recall, language models."""

import collections
import functools
import json
import math
import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from test_train import (
    KILLED,
    ROOT,
    checkpoint,
    child,
    finished,
    is_sentence,
    killed,
    metrics,
    result,
    same,
    words,
)

import data as data_sets
import train
from ref import generate, network, nn, presets
from ref.files import read_tensors

PROSE = "to be, or not to be: that is the question.\n" * 50
TINY = "--d-model 8 --n-layers 2 --batch-size 4 --warmup 5"
SHORT = f"{TINY} --steps 14 --save-every 3 --eval-every 4 --log-every 5"
TEXT = "--data shakespeare-char --max-length 32"
START = f"--model s4d --d-state 4 --dropout 0.1 {TEXT} {SHORT}"
CAUSAL = {
    "hope": "hope --d-state 4",
    "hyena": "hyena --filter-order 4",
    "tnn": "tnn --rpe-dim 4",
    "transformer": "transformer --n-heads 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, mqar-64-4 with few samples among them"""
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text(PROSE)
    return folder


@pytest.fixture
def few(monkeypatch):
    """mqar-64-4 has few samples"""
    sizes = functools.partial(data_sets.load_mqar, sizes=(60, 10, 9))
    monkeypatch.setitem(data_sets.LOADERS, "mqar-64-4", sizes)


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """Run train.main on the arguments -> exit code, stdout, stderr"""
    monkeypatch.setattr(train, "draw_curves", lambda out: None)

    def run(*arguments):
        given = words(arguments)
        capsys.readouterr()
        if not {"--resume", "--data-dir"} & set(given):
            given += ["--data-dir", str(folder)]
        code = train.main(given)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing interrupts, through the command line"""
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, text, err = finished(child([START, "--data-dir", folder, "--out", out]))
    assert code == 0, err
    return out, text


def made(folder, model, data="shakespeare-char", **options):
    """Settings, Data, recipe, network.Config and parameters of a tiny network, untrained"""
    given = {"model": model, "data": data, "n_layers": 2, "d_model": 8, "batch_size": 4} | options
    if data == "shakespeare-char":
        given = {"max_length": 16} | given
    settings = presets.make_settings(given)
    loaded = data_sets.load(data, folder, progress=False, max_length=settings["max_length"])
    cfg = train.network_config(settings, loaded)
    params = network.init(cfg, np.random.default_rng(0), "float64")
    return settings, loaded, presets.Recipe(**settings["recipe"]), cfg, params


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# What a run writes and says


def test_what_a_language_model_s_run_leaves(whole):
    out, text = whole
    said = result(out)
    assert said["test_perplexity"] == pytest.approx(math.exp(said["test_loss"]), rel=1e-12)
    bits = said["test_loss"] / math.log(2)
    assert said["test_bits_per_character"] == pytest.approx(bits, rel=1e-12)
    assert (said["protocol"], said["window"], said["test_samples"]) == ("stream", 32, 7)
    assert set(said["baselines"]) == {"most frequent character"}
    assert set(said["loss_baselines"]) == {"character frequencies"}
    validated = [line for line in metrics(out) if "valid_loss" in line]
    assert [line["step"] for line in validated] == [4, 8, 12, 14]
    for line in validated:
        assert line["valid_perplexity"] == pytest.approx(math.exp(line["valid_loss"]), rel=1e-12)
        assert line["valid_bits_per_character"] == line["valid_loss"] / math.log(2)
    last = validated[-1]  # there is no test split: both are the validation split
    assert (last["valid_loss"], last["valid_accuracy"]) == (
        said["test_loss"],
        said["test_accuracy"],
    )
    for expected in (
        "s4d on shakespeare-char (1,934 train, 214 valid, 214 test characters in windows of 32; re",
        "the last tenth is the validation split, and the test split too)\n",
        "to beat: most frequent character 0.",
        "character frequencies 2.",
        f", perplexity {math.exp(said['test_loss']):.4g}, {bits:.4f} bits per character, after 14",
        "\n    by the protocol stream, windows of 32\n",
        "\n    character frequencies, loss: 2.",
    ):
        assert expected in text, expected
    assert "--eval-samples" not in text


def test_the_vocabulary_is_kept(whole):
    config = json.loads((whole[0] / "config.json").read_text())
    assert config["vocabulary"] == sorted(set(PROSE))
    assert config["layer"]["bidirectional"] is False and config["max_length"] == 32


def test_curves_have_the_baselines(whole, monkeypatch, tmp_path):
    plots = pytest.importorskip("ref.plots", reason="matplotlib is not installed")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.curves(whole[0], tmp_path / "curves.png")
    left, right = ([text.get_text() for text in a.get_legend().texts] for a in drawn[0].axes)
    assert left[2].startswith("character frequencies 2.5")
    assert right[2].startswith("most frequent character 0.2")
    plots.plt.close(drawn[0])


@pytest.mark.parametrize("data", ["shakespeare-char", "mqar-64-4"])
@pytest.mark.parametrize("model", network.MODELS)
def test_every_model_trains(model, data, call, few, tmp_path):
    start = f"--model {CAUSAL.get(model, f'{model} --d-state 4')} --data {data} {TINY} --steps 3"
    text = "--max-length 40" if data == "shakespeare-char" else ""
    code, said, err = call(start, text, "--out", tmp_path)
    assert code == 0 and "test accuracy" in said, err
    config = json.loads((tmp_path / "config.json").read_text())
    length = 40 if text else 64
    for name in {"context", "l_max"} & config["layer"].keys():
        assert config["layer"][name] == length
    assert config["layer"].get("depth", 2) == 2
    tensors, _ = read_tensors(tmp_path / "checkpoint.safetensors")
    assert ("param.decoder.weight" in tensors) == (model not in presets.TIED)
    assert bool(config["vocabulary"]) == bool(text)


@pytest.mark.parametrize("model", ["s4d", "transformer"])
def test_tied_as_given(model, folder):
    for tied, expected in (("yes", True), ("no", False), ("auto", model in presets.TIED)):
        _, _, _, cfg, params = made(folder, model, tied=tied)
        assert cfg.tied is expected is ("decoder.weight" not in params)


def test_small_presets_are_causal_and_do_not_look_ahead(folder):
    """Batch norm would: its moments are those of later positions too"""
    for model in network.MODELS:
        _, loaded, _, cfg, params = made(folder, model)
        assert cfg.layer.causal and cfg.decoder == "lm" and cfg.layer.norm != "batch"
        x = next(data_sets.eval_batches(loaded.train, loaded, 4)).x
        later = x.copy()
        later[:, 9:] = 0
        logits, other = (network.forward(params, a, cfg)[0] for a in (x, later))
        assert np.abs(logits[:, :9] - other[:, :9]).max() < 1e-9 * np.abs(logits).max()
        assert np.abs(logits[:, 9:] - other[:, 9:]).max() > 1e-6


def test_no_decay_where_a_model_says_so(folder):
    for model, names in (
        ("mamba", {"A_log", "D", "dt_bias", "conv_bias", "norm_weight"}),
        ("longhorn", {"D", "dt_bias", "conv_bias", "norm_weight"}),
    ):
        _, _, recipe, cfg, params = made(folder, model, weight_decay=0.3, lr=0.02)
        groups = train.optimiser_groups(params, cfg, recipe)
        free = {name.rpartition(".")[2] for name, g in groups.items() if g.weight_decay == 0}
        assert free == names
        assert {g.lr for g in groups.values()} == {0.02}
        assert groups["encoder.weight"].weight_decay == 0.3
        assert groups["final.norm_weight"].weight_decay == 0


# Loss and accuracy, by their definitions


@pytest.mark.parametrize("data", ["shakespeare-char", "mqar-64-4"])
@pytest.mark.parametrize("model", ["s4d", "transformer"])
def test_loss_gradient_and_accuracy_count_the_targets_alone(model, data, folder, few):
    """Against the whole network's logits with the ignored ones left out of the cross-entropy"""
    _, loaded, _, cfg, params = made(folder, model, data)
    _, batch = next(data_sets.train_batches(loaded, 4, 0))
    logits, targets, cache = network.predict(params, batch, cfg)
    loss, loss_cache = nn.softmax_cross_entropy_forward(logits, targets)
    _, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)
    asked = int((batch.targets >= 0).sum())
    assert logits.shape == ((4, 16, cfg.d_output) if loaded.window else (asked, 8192))
    assert targets.size == asked == data_sets.targets_of_batch(loaded, 4)

    every, cache = network.forward(params, batch.x, cfg)
    expected, loss_cache = nn.softmax_cross_entropy_forward(every, batch.targets)
    _, other = network.backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)
    assert loss == pytest.approx(expected, rel=1e-12)
    for name, g in other.items():
        assert np.abs(grads[name] - g).max() <= 1e-9 * np.abs(g).max(), name


@pytest.mark.parametrize("data", ["shakespeare-char", "mqar-64-4"])
def test_an_evaluation_is_a_mean_over_targets(data, folder, few):
    """Literally: one sample or window at a time, position by position"""
    _, loaded, recipe, cfg, params = made(folder, "s4d", data, batch_size=3)
    losses, right = [], []
    if loaded.window:
        tokens = loaded.test.values.tolist()
        pairs = [(tokens[i : i + 16], tokens[i + 1 : i + 17]) for i in range(0, 214, 16)]
        assert len(pairs[-1][1]) == 214 % 16 != 0
    else:
        pairs = zip(loaded.test.values.reshape(9, 64).tolist(), loaded.test.targets, strict=True)
    for x, targets in pairs:
        x = np.array([x[: len(targets)]])
        logits = log_softmax(network.forward(params, x, cfg)[0][0])
        for row, target in zip(logits, targets, strict=True):
            if target >= 0:
                losses.append(-row[target])
                right.append(row.argmax() == target)
    assert len(losses) == (214 if loaded.window else 36)
    loss, accuracy = train.evaluate(params, cfg, loaded.test, loaded, recipe)
    assert loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert accuracy == np.mean(right)


def test_an_evaluation_of_some_windows_is_part_of_all(folder):
    _, loaded, recipe, cfg, params = made(folder, "s4d", eval_samples=3)
    assert train.evaluated(loaded.test, loaded, recipe) == (3, 14)
    loss, _ = train.evaluate(params, cfg, loaded.test, loaded, recipe)
    batches = data_sets.eval_batches(loaded.test, loaded, 1, 3)
    rows = [log_softmax(network.forward(params, b.x, cfg)[0][0]) for b in batches]
    batches = data_sets.eval_batches(loaded.test, loaded, 1, 3)
    losses = [
        -row[target]
        for logits, b in zip(rows, batches, strict=True)
        for row, target in zip(logits, b.targets[0], strict=True)
    ]
    assert loss == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize("model", ["s4d", "hyena", "transformer"])
def test_last_positions_of_windows(folder, model):
    """Against a loop over the positions, each the last of a window on its own"""
    _, loaded, recipe, cfg, params = made(folder, model, batch_size=9, eval_protocol="last")
    tokens, losses, right = loaded.test.values.astype(int), {}, {}
    for at in range(16, 215):
        row = log_softmax(network.forward(params, tokens[None, at - 16 : at], cfg)[0][0, -1])
        losses[at], right[at] = -row[tokens[at]], row.argmax() == tokens[at]
    loss, accuracy = train.evaluate(params, cfg, loaded.test, loaded, recipe)
    assert train.evaluated(loaded.test, loaded, recipe) == (199, 199)
    assert loss == pytest.approx(np.mean([*losses.values()]), rel=1e-12)
    assert accuracy == np.mean([*right.values()])
    some = replace(recipe, eval_samples=25)
    assert train.evaluated(loaded.test, loaded, some) == (25, 199)
    starts = np.sort(np.random.default_rng(0).permutation(199)[:25])
    loss, accuracy = train.evaluate(params, cfg, loaded.test, loaded, some)
    assert loss == pytest.approx(np.mean([losses[at] for at in starts + 16]), rel=1e-12)
    assert accuracy == np.mean([right[at] for at in starts + 16])


def test_recall_can_be_learned(folder, few):
    """A few samples by heart: the queries' accuracy goes up, the loss below that of guessing"""
    _, loaded, recipe, cfg, params = made(folder, "transformer", "mqar-64-4", d_model=32, lr=5e-3)
    groups = train.optimiser_groups(params, cfg, recipe)
    moments = train.optim.adamw_init(params)
    batches = data_sets.train_batches(loaded, 20, 0)
    for step in range(1, 41):
        _, batch = next(batches)
        logits, targets, cache = network.predict(params, batch, cfg)
        loss, loss_cache = nn.softmax_cross_entropy_forward(logits, targets)
        _, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)
        train.optim.adamw_update(params, grads, moments, step, groups)
    assert loss < 5 < math.log(4096)


# Interrupted and resumed: the same bits


@pytest.mark.parametrize(
    "moment", [("ref.optim", "adamw_update", 8), ("os", "replace", 5), ("train", "evaluate", 3)]
)
def test_killed_and_resumed(whole, folder, tmp_path, call, moment):
    out = tmp_path / "run"
    killed(moment, [START, "--data-dir", folder, "--out", out])
    assert not (out / "result.json").exists()
    code, _, err = call("--resume", out)
    assert code == 0 and err == ""
    assert same(out, whole[0])


def test_stopped_in_the_middle_of_an_epoch(whole, folder, tmp_path, call):
    out = tmp_path / "run"
    arguments = [START, "--data-dir", folder, "--out", out]
    code, text, _ = finished(
        child(["ref.optim", "adamw_update", 5, 15, *arguments], ("-c", KILLED))
    )
    assert code == 0 and checkpoint(out)[1]["step"] == 5
    assert call(*text.splitlines()[-1].split()[2:])[0] == 0
    assert same(out, whole[0])


def test_mqar_resumed(call, few, tmp_path, monkeypatch):
    start = f"--model s4d --data mqar-64-4 --d-state 4 {SHORT} --batch-size 8"
    assert call(start, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as m:
        update, left = train.optim.adamw_update, [6]

        def dying(*args):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            update(*args)

        m.setattr(train.optim, "adamw_update", dying)
        assert call(start, "--out", tmp_path / "cut")[0] == 1
    assert call("--resume", tmp_path / "cut")[0] == 0
    assert same(tmp_path / "cut", tmp_path / "whole")
    counts = collections.Counter(line.get("epoch") for line in metrics(tmp_path / "whole"))
    assert counts[0] and counts[1], "more than one epoch"


# Other windows than in training


def lengths(out):
    return json.loads((out / "lengths.json").read_text())


def files_of(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lengths.json"}


def test_loss_against_length(whole, call):
    out, before = whole[0], files_of(whole[0])
    code, text, err = call("--resume", out, "--eval-lengths 16,32,64,214")
    assert (code, err) == (0, "")
    said = lengths(out)
    assert (said["protocol"], said["trained"], said["step"]) == ("stream", 32, 14)
    assert [row["length"] for row in said["lengths"]] == [16, 32, 64, 214]
    trained = said["lengths"][1]
    assert trained["loss"] == result(out)["test_loss"]
    assert trained["accuracy"] == result(out)["test_accuracy"]
    assert trained["perplexity"] == result(out)["test_perplexity"]
    assert len({row["loss"] for row in said["lengths"]}) == 4
    head, *rows = text.splitlines()[-5:]
    assert head.split() == ["length", "loss", "perplexity", "accuracy"]
    for row, line in zip(said["lengths"], rows, strict=True):
        assert line.split()[:2] == [str(row["length"]), f"{row['loss']:.4f}"]
    assert files_of(out) == before
    (out / "lengths.json").unlink()


def test_a_longer_window_sees_more(whole, folder):
    """By definition: the whole split in one window, token by token"""
    settings = presets.read_settings(whole[0] / "config.json")
    loaded = data_sets.load("shakespeare-char", folder, max_length=32)
    cfg = train.network_config(settings, loaded)
    tensors, _ = read_tensors(whole[0] / "checkpoint.safetensors")
    params = {n[6:]: t.astype("float64") for n, t in tensors.items() if n.startswith("param.")}
    state, losses = network.state(params, cfg, 1), []
    for token, target in zip(loaded.test.values[:-1], loaded.test.targets, strict=True):
        y, state = network.step(params, np.array([token]), state, cfg)
        losses.append(-log_softmax(y[0])[target])
    windows = data_sets.windowed(loaded, 214)
    loss, _ = train.evaluate(params, cfg, loaded.test, windows, presets.Recipe(batch_size=1))
    assert loss == pytest.approx(np.mean(losses), rel=1e-9)


def test_s4_is_the_same_map_at_any_length(folder):
    """Its C~ belongs to a length: what comes first does not depend on the window"""
    _, loaded, _, cfg, params = made(folder, "s4", d_state=4)
    x = loaded.train.values[None, :100].astype(int)
    for length in (17, 32, 33, 100):
        longer, stretched = network.stretch(params, cfg, length)
        assert stretched.layer.l_max >= length
        logits, _ = network.forward(longer, x[:, :length], stretched)
        usual, _ = network.forward(params, x[:, :16], cfg)
        assert np.abs(logits[:, :16] - usual).max() < 1e-9 * np.abs(usual).max()
    assert network.stretch(params, cfg, 16) == (params, cfg)
    assert cfg.layer.l_max == 16


def test_lengths_of_every_model(call, tmp_path):
    for model in network.MODELS:
        start = f"--model {CAUSAL.get(model, f'{model} --d-state 4')} {TEXT} {TINY} --steps 2"
        assert call(start, "--out", tmp_path / model)[0] == 0
        code, _, err = call("--resume", tmp_path / model, "--eval-lengths 8,64")
        ends = {
            "transformer": "--eval-lengths 64: the network has 32 learned positions",
            "hyena": "hyena's filters end at l_max=32: 64 positions do not fit.",
        }
        if model in ends:
            assert code == 1 and is_sentence(err) and ends[model] in err
            assert call("--resume", tmp_path / model, "--eval-lengths 8,32")[0] == 0
        else:
            assert code == 0, err
        assert lengths(tmp_path / model)["lengths"][0]["length"] == 8


def test_the_other_protocol(whole, call, folder):
    out = whole[0]
    code, text, _ = call("--resume", out, "--eval-only --eval-protocol sliding")
    assert code == 0 and "    by the protocol sliding, windows of 32\n" in text
    loaded = data_sets.load("shakespeare-char", folder, max_length=32)
    settings = presets.read_settings(out / "config.json")
    cfg = train.network_config(settings, loaded)
    tensors, _ = read_tensors(out / "checkpoint.safetensors")
    params = {n[6:]: t.astype("float64") for n, t in tensors.items() if n.startswith("param.")}
    tokens, losses = loaded.test.values.astype(int), []
    for start in range((215 - 32) // 4 * 4):
        logits, _ = network.forward(params, tokens[None, start : start + 32], cfg)
        own = log_softmax(logits[0])
        losses += [-own[t, tokens[start + t + 1]] for t in range(32)]
    said = float(text.partition(", loss ")[2].partition(",")[0])
    assert said == pytest.approx(np.mean(losses), abs=1e-4)
    assert call("--resume", out, "--eval-lengths 16 --eval-protocol sliding")[0] == 0
    assert lengths(out)["protocol"] == "sliding"
    (out / "lengths.json").unlink()
    assert presets.read_settings(out / "config.json")["recipe"]["eval_protocol"] == "stream"


def test_the_last_positions_of_a_run(whole, call, monkeypatch):
    """Of one target a window --eval-samples is the number at every length"""
    out = whole[0]
    code, text, _ = call("--resume", out, "--eval-only --eval-protocol last --eval-samples 30")
    assert code == 0 and "    by the protocol last, windows of 32\n" in text
    assert "    on 30 of the 183 windows (--eval-samples)\n" in text
    counts, scores = [], train.scores

    def counted(*args):
        loss, right = scores(*args)
        counts.append(right.size)
        return loss, right

    monkeypatch.setattr(train, "scores", counted)
    lengths_of = "--eval-lengths 16,32 --eval-protocol last --eval-samples 30"
    code, _, err = call("--resume", out, lengths_of)
    assert code == 0, err
    assert lengths(out)["protocol"] == "last" and sum(counts) == 60
    (out / "lengths.json").unlink()


# What it refuses


@pytest.mark.parametrize(
    "given, code, said",
    [
        ("--model s4d --bidirectional", 2, "needs a causal map, and this s4d is not"),
        ("--model transformer --bidirectional", 2, "needs a causal map"),
        ("--model hope --conv circular", 2, "language modelling needs a causal map"),
        ("--model s4d --decoder mean", 1, "has a target at every position"),
        ("--model s4d --eval-protocol leaping", 2, "'leaping' is not one of"),
        ("--model s4d --tied perhaps", 2, "'perhaps' is not one of 'auto', 'yes', 'no'"),
        ("--model s4d --max-length 5000", 1, "too few for a window of 5,000"),
        ("--model s4d --max-length 1", 2, "not in the range"),
        ("--model s4d --l-max 5", 2, "No such option"),
        ("--model s4 --l-max 5", 1, "--l-max 5 is below the 32 steps"),
        ("--model s4d --eval-lengths 16", 2, "--eval-lengths needs --resume RUN"),
        ("--model s4d --preset paper", 2, "no published recipe of s4d on shakespeare-char"),
    ],
)
def test_refusals(call, tmp_path, given, code, said):
    found, out, err = call(TEXT, given, "--out", tmp_path / "run")
    assert (found, out) == (code, "") and is_sentence(err) and said in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        ("--eval-lengths 0", "expected numbers such as 256,512,1024"),
        ("--eval-lengths 16,", "expected numbers"),
        ("--eval-lengths many", "expected numbers"),
        ("--eval-lengths -5", "expected numbers"),
        ("--eval-only --eval-protocol leaping", "'leaping' is not one of"),
        ("--eval-protocol sliding", "cannot be combined with --eval-protocol"),
        ("--eval-only --max-length 64", "cannot be combined with --max-length"),
    ],
)
def test_refusals_of_a_run(whole, call, given, said):
    code, out, err = call("--resume", whole[0], given)
    assert (code, out) == (2, "") and is_sentence(err) and said in err, err
    assert not (whole[0] / "lengths.json").exists()


def test_refusals_where_there_is_no_stream(whole, call, few, tmp_path):
    start = f"--model s4d --data mqar-64-4 {TINY} --d-state 4 --steps 1"
    assert call(start, "--out", tmp_path / "run")[0] == 0
    code, _, err = call("--resume", tmp_path / "run", "--eval-lengths 64")
    assert code == 1 and is_sentence(err) and "is for language models, and mqar-64-4" in err
    code, _, err = call(start, "--eval-protocol sliding --out", tmp_path / "other")
    assert code == 1 and is_sentence(err) and "--eval-protocol sliding is for language mod" in err
    code, _, err = call(start, "--eval-protocol last --out", tmp_path / "other")
    assert code == 1 and is_sentence(err) and "--eval-protocol last is for language mod" in err
    code, _, err = call(start, "--max-length 32 --out", tmp_path / "other")
    assert code == 1 and is_sentence(err) and "mqar-64-4 has samples of one length" in err
    code, _, err = call("--resume", whole[0], "--eval-lengths 215")
    assert code == 1 and is_sentence(err) and "valid split has 215 tokens, too few" in err


def test_a_longer_text_is_other_data(call, tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text(PROSE)
    start = f"{START} --steps 1 --out"
    assert call(start, tmp_path / "run", "--data-dir", tmp_path)[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"data_dir": str(tmp_path)}))
    (tmp_path / "input.txt").write_text(PROSE.replace("question", "answer"))
    code, _, err = call("--resume", tmp_path / "run")
    assert code == 1 and is_sentence(err) and "the data are not those of the run" in err


# Words


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A folder with small files of ptb; train has all of 600 words"""
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    for split, lines in (("train", 80), ("valid", 20), ("test", 20)):
        drawn = [f"w{i}" for i in range(600)] if split == "train" else []
        drawn += [f"w{i}" for i in rng.zipf(1.5, 10 * lines - len(drawn)) % 600]
        drawn = np.array(drawn)[rng.permutation(len(drawn))].reshape(lines, -1)
        text = "".join(" ".join(line) + "\n" for line in drawn)
        (folder / f"ptb.{split}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("protocol", data_sets.PROTOCOLS)
@pytest.mark.parametrize("model", ["s4d", "mamba"])
def test_words_are_trained_on(model, protocol, sentences, call, tmp_path):
    out = tmp_path / "run"
    start = f"--model {model} --d-state 4 --data ptb --max-length 8 {TINY} --steps 4 --log-every 1"
    how = f"--eval-protocol {protocol} --eval-samples 12"
    code, text, err = call(start, how, "--out", out, "--data-dir", sentences)
    assert code == 0 and "bits" not in text, err
    assert f"{model} on ptb (879 train, 219 valid, 219 test words in windows of 8; read" in text
    assert "; 601 different words; not the release's files" in text
    said = result(out)
    unigram = said["loss_baselines"]["word frequencies"]
    in_words = f"{unigram:.4f} (loss, perplexity {math.exp(unigram):.4g})\n"
    assert f"word frequencies {in_words}" in text
    line = f"    word frequencies, loss: {unigram:.4f}, perplexity {math.exp(unigram):.4g}\n"
    assert line in text
    assert said["test_perplexity"] == pytest.approx(math.exp(said["test_loss"]), rel=1e-12)
    assert said["protocol"] == protocol and "test_bits_per_character" not in said
    assert f"by the protocol {protocol}, windows of 8" in text and "on 12 of the " in text
    _, _, vocabulary = generate.load(out)
    assert len(vocabulary) == 601 and set(vocabulary) == {"<eos>", *(f"w{i}" for i in range(600))}
    code, _, err = call("--resume", out, "--eval-lengths 4,16")
    assert (code, err) == (0, "")
    assert [row["length"] for row in lengths(out)["lengths"]] == [4, 16]


def test_the_accuracy_of_a_step_is_that_of_its_logits(sentences, call, tmp_path):
    """The loss takes the logits' place: what is right is counted before"""
    start = f"--model s4d --d-state 4 --data ptb --max-length 8 {TINY} --steps 9 --log-every 1"
    given = (start, "--lr 0.1 --warmup 1", "--data-dir", sentences)
    assert call(*given, "--out", tmp_path / "run")[0] == 0
    seen, predict = [], network.predict

    def looked_at(*args):
        logits, targets, cache = predict(*args)
        seen.append(((logits.argmax(axis=-1) == targets).mean(), log_softmax(logits)))
        return logits, targets, cache

    with pytest.MonkeyPatch.context() as m:
        m.setattr(network, "predict", looked_at)
        assert call(*given, "--out", tmp_path / "other")[0] == 0
    logged = [line["accuracy"] for line in metrics(tmp_path / "other") if "accuracy" in line]
    assert logged == [right for right, _ in seen[:9]] and max(logged) > 0.1
    assert same(tmp_path / "run", tmp_path / "other")


def test_a_large_vocabulary_s_run_holds_one_array_of_logits(call, tmp_path):
    words = [f"v{i}" for i in range(6_000)]
    (tmp_path / "ptb.train.txt").write_text(" ".join([*words, "<unk>"]) + "\n")
    for split in ("valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(" ".join(words[:4_000]) + "\n")
    start = "--model s4d --d-state 4 --data ptb --max-length 64 --d-model 4 --n-layers 1 --warmup 1"
    start += " --batch-size 64 --steps 3 --tied yes"
    assert call(start, "--data-dir", tmp_path, "--out", tmp_path / "first")[0] == 0  # compiles
    tracemalloc.start()
    code, text, _ = call(start, "--data-dir", tmp_path, "--out", tmp_path / "second")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    logits = 4 * 64 * 64 * 6_002
    estimate = 2**20 * float(text.partition("about ")[2].partition(" MiB")[0])
    assert code == 0 and logits < peak < 1.5 * logits and logits < estimate < 1.5 * logits


def test_help_names_what_is_new():
    code, text, _ = finished(child(["--help"]))
    text = " ".join(text.split())
    assert code == 0 and "--eval-lengths INTEGERS" in text and "256,512,1024" in text
    assert "--eval-protocol" in text and "--tied" in text
    assert os.path.exists(ROOT)


def test_a_rate_of_parameters_that_a_model_lacks_is_refused(capsys):
    for model, option in (
        ("mamba", "--dt-lr"),
        ("longhorn", "--ssm-lr"),
        ("transformer", "--dt-lr"),
    ):
        code = train.main(["--model", model, "--data", "shakespeare-char", option, "0.1"])
        assert code == 2 and f"{option} is for parameters that {model}" in capsys.readouterr().err
