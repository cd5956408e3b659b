"""Sampling from language models, and `python -m ref generate`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import train
from ref import Error, backend, checkpoints, generate, network
from ref.__main__ import main
from ref.options import run_command

ROOT = Path(__file__).parent.parent
TEXT = "to be, or not to be: that is the question.\n" * 40
WAYS = {"hope": {"conv": "causal"}, "transformer": {"n_heads": 2, "context": 40}}


def small_network(model, dtype="float64", tied=False):
    """-> params, cfg of a causal network over 11 tokens, every parameter away from its start"""
    fields = network.model_module(model).Config.__dataclass_fields__
    usual = {"d_model": 6, "d_state": 4, "l_max": 40, "prenorm": True, "norm": "layer", "depth": 2}
    own = {n: v for n, v in usual.items() if n in fields} | WAYS.get(model, {})
    layer = network.model_module(model).Config(**own)
    positions = getattr(layer, "context", 0)
    cfg = network.Config(
        model, layer, 2, 11, 11, decoder="lm", tied=tied, final_norm=True, positions=positions
    )
    rng = np.random.default_rng(1)
    params = network.init(cfg, rng, dtype)
    for name, p in params.items():
        p += (0.1 * rng.standard_normal(p.shape)).astype(p.dtype)
        if name.startswith(("encoder", "decoder")):
            p *= 3
    return params, cfg


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", network.MODELS)
def test_step_agrees_with_forward(model, tied):
    params, cfg = small_network(model, tied=tied)
    x = np.random.default_rng(0).integers(0, 11, (3, 37))
    logits, _ = network.forward(params, x, cfg)
    state = network.state(params, cfg, 3)
    for t in range(37):
        y, state = network.step(params, x[:, t], state, cfg)
        assert np.abs(y - logits[:, t]).max() < 1e-9 * np.abs(logits).max()


def sizes(tree):
    """Bytes of all arrays in nested dicts, lists and tuples"""
    if isinstance(tree, (dict, list, tuple)):
        return sum(map(sizes, tree.values() if isinstance(tree, dict) else tree))
    return getattr(tree, "nbytes", 0)


@pytest.mark.parametrize("model", network.MODELS)
def test_memory_does_not_grow(model):
    params, cfg = small_network(model)
    state, seen = network.state(params, cfg, 1), set()
    for _ in range(30):
        _, state = network.step(params, np.array([3]), state, cfg)
        seen.add(sizes(state))
    assert len(seen) == 1


# Choosing


def probabilities(logits, **how):
    """How often choose takes each token, over evenly spaced random numbers"""
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    counts = np.zeros(len(logits))
    for i in range(2000):
        rng = type("Even", (), {"random": lambda self, i=i: (i + 0.5) / 2000})()
        counts[generate.choose(np.array(logits), **how, rng=rng)] += 1
    return counts / 2000


LOGITS = np.log([0.1, 0.4, 0.2, 0.3])
LIKELIEST = [0, 1, 0, 0]


@pytest.mark.parametrize(
    "how, expected",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.0}, LIKELIEST),
        ({"temperature": 1e-300}, LIKELIEST),
        ({"temperature": 0.5}, np.array([1, 16, 4, 9]) / 30),
        ({"temperature": 1e300}, [0.25] * 4),
        ({"top_k": 1}, LIKELIEST),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1e-9}, LIKELIEST),
        ({"top_p": 0.39}, LIKELIEST),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.89}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.91}, [0.1, 0.4, 0.2, 0.3]),
        # Of the three likeliest, with 4/9, 3/9, 2/9: two make up 0.75, of all four it takes three.
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),
        # The nucleus is that of the distribution at this temperature: 16/30 alone is beyond 1/2.
        ({"temperature": 0.5, "top_p": 0.5}, LIKELIEST),
    ],
)
def test_choosing(how, expected):
    assert np.abs(probabilities(LOGITS, **how) - expected).max() <= 1 / 2000
    shifted = probabilities(LOGITS.astype("float32") + np.float32(700), **how)
    assert np.abs(shifted - expected).max() <= 2 / 2000


def test_top_k_of_equals_is_k():
    chosen = probabilities(np.zeros(6), top_k=2)
    assert sorted(chosen.tolist()) == [0, 0, 0, 0, 0.5, 0.5]


def test_a_seed_s_choices_have_the_distribution():
    rng = np.random.default_rng(0)
    drawn = [generate.choose(LOGITS, 1.0, 0, 1.0, rng) for _ in range(4000)]
    counts = np.bincount(drawn, minlength=4)
    assert scipy.stats.chisquare(counts, 4000 * np.exp(LOGITS)).pvalue > 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad, temperature):
    with pytest.raises(Error, match="not finite"):
        generate.choose(np.array([0.0, bad]), temperature, 0, 1.0, np.random.default_rng(0))


# Sampling


@pytest.mark.parametrize("model", network.MODELS)
def test_greedy_is_what_the_whole_sequence_gives(model):
    params, cfg = small_network(model)
    seen = set()
    for prompt in ([1, 5, 2], [7], [4, 4, 0, 9], [10, 3]):
        tokens = list(prompt)
        for _ in range(8):
            logits, _ = network.forward(params, np.array([tokens]), cfg)
            tokens.append(int(logits[0, -1].argmax()))
        found = list(generate.sample(params, cfg, prompt, 8, temperature=0))
        assert prompt + found == tokens
        seen |= set(found)
    assert len(seen) > 1


def test_the_same_seed_the_same_tokens():
    params, cfg = small_network("s4d", "float32")

    def tokens(seed):
        rng = None if seed is None else np.random.default_rng(seed)
        return list(generate.sample(params, cfg, [1], 50, rng=rng))

    assert tokens(0) == tokens(0) != tokens(1)
    assert tokens(None) != tokens(None)
    assert all(type(token) is int and 0 <= token < 11 for token in tokens(0))


def test_tokens_come_one_by_one(monkeypatch):
    params, cfg = small_network("s4d")
    calls = []
    for name in ("prefill", "step"):
        f = getattr(network, name)
        monkeypatch.setattr(
            network, name, lambda *args, f=f, name=name: calls.append(name) or f(*args)
        )
    tokens = generate.sample(params, cfg, [1, 2, 3], 1000)
    assert not calls
    next(tokens)
    assert calls == ["prefill"]
    next(tokens)
    assert calls == ["prefill", "step"]
    assert len(list(generate.sample(params, cfg, [1], 0))) == 0


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"temperature": -1}, "temperature=-1: expected 0"),
        ({"temperature": np.nan}, "temperature=nan: expected 0"),
        ({"temperature": np.inf}, "temperature=inf: expected 0"),
        ({"top_k": -1}, "top_k=-1: expected 0"),
        ({"top_p": 0}, "top_p=0: expected more than 0"),
        ({"top_p": 1.1}, "top_p=1.1: expected more than 0"),
        ({"top_p": np.nan}, "top_p=nan: expected more than 0"),
        ({"n": -1}, "expected at least one to start from"),
        ({"prompt_tokens": []}, "0 prompt tokens"),
    ],
)
def test_wrong_arguments_are_sentences_at_once(wrong, said):
    params, cfg = small_network("s4d")
    with pytest.raises(Error, match=said):
        generate.sample(params, cfg, **({"prompt_tokens": [1], "n": 3} | wrong))


def test_a_token_outside_the_vocabulary():
    params, cfg = small_network("s4d")
    with pytest.raises(Error, match="token 11 is outside the vocabulary of 11"):
        list(generate.sample(params, cfg, [11], 1))


def test_a_transformer_ends_with_its_positions():
    params, cfg = small_network("transformer")
    assert len(list(generate.sample(params, cfg, [1, 2], 39))) == 39
    with pytest.raises(Error, match=r"has 40 positions\. Ask for at most 39 tokens"):
        generate.sample(params, cfg, [1, 2], 40)
    with pytest.raises(Error, match=r"Ask for at most 0 tokens"):
        generate.sample(params, cfg, [1] * 60, 3)


# The command


def trained(folder, model, *options):
    """A run's folder"""
    out = folder / model
    start = ["--model", model, "--data", "shakespeare-char", "--data-dir", str(folder)]
    small = {"d-model": 8, "n-layers": 2, "steps": 3, "batch-size": 4, "max-length": 64}
    small = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    assert train.main([*start, *small, *options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of s4d; its data are gone"""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "input.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "draw_curves", lambda out: None)
        trained(folder, "s4d")
        trained(folder, "transformer", "--n-heads", "2")
    (folder / "input.txt").unlink()
    return folder


def started(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    options["env"] = {n: v for n, v in os.environ.items() if n != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "ref", "generate", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, **options)


@pytest.fixture
def ask(ref):
    """What `generate` prints -> stdout, stderr"""
    return lambda *arguments, **how: ref("generate", *arguments, **how)


def test_the_command(ask, folder):
    out, err = ask(folder / "s4d", "--prompt", "to be", "--tokens", 30)
    assert out.startswith("to be") and out.endswith("\n") and len(out) == 5 + 30 + 1
    assert set(out) <= set(TEXT)
    assert err.startswith("30 tokens in ") and err.endswith(" a second\n") and err.count("\n") == 1
    assert ask(folder / "s4d", "--prompt", "to be", "--tokens", 30)[0] == out
    assert ask(folder / "s4d", "--prompt", "to be", "--tokens", 30, "--seed", 1)[0] != out
    rest = folder / "s4d", "--prompt", "to be", "--tokens", 30
    one = {ask(*rest, *how)[0] for how in (("--temperature", 0), ("--top-k", 1), ("--top-p", 1e-9))}
    assert len(one) == 1 and out not in one


def test_the_command_is_the_function(ask, folder):
    params, cfg, vocabulary = generate.load(folder / "s4d")
    start = generate.encode("to be", vocabulary)
    rng = np.random.default_rng(7)
    tokens = generate.sample(params, cfg, start, 20, 0.8, 9, 0.9, rng)
    text = "to be" + "".join(vocabulary[token] for token in tokens) + "\n"
    how = ("--temperature", 0.8, "--top-k", 9, "--top-p", 0.9, "--seed", 7)
    assert ask(folder / "s4d", "--prompt", "to be", "--tokens", 20, *how)[0] == text


def test_an_empty_prompt_goes_on_from_a_line_s_end(ask, folder):
    empty, _ = ask(folder / "s4d", "--tokens", 20)
    line, _ = ask(folder / "s4d", "--tokens", 20, "--prompt", "\n")
    assert len(empty) == 21 and "\n" + empty == line
    assert generate.encode("", ["b", "a"]) == [0]
    assert generate.encode("", ["the", "<eos>", "cat"]) == [1]
    assert generate.encode("cat  the", ["the", "<eos>", "cat"]) == [2, 0]


def test_words_have_spaces_between(monkeypatch, capsys):
    params, cfg = small_network("s4d")
    words = [*(f"w{i}" for i in range(6)), "<eos>", *(f"w{i}" for i in range(6, 10))]
    monkeypatch.setattr(generate, "load", lambda run, dtype: (params, cfg, words))
    monkeypatch.setattr(backend, "set_threads", lambda threads: None)
    generate.generate("run", "w3 w4", 60, 1.0, 0, 1.0, 0)
    out = capsys.readouterr().out
    start = generate.encode("w3 w4", words)
    rng = np.random.default_rng(0)
    tokens = [words[token] for token in generate.sample(params, cfg, start, 60, rng=rng)]
    assert "<eos>" in tokens and len(set(tokens)) > 3
    lines = " ".join(["w3 w4", *tokens]).split("<eos>")
    assert out == "\n".join(line.strip() for line in lines) + "\n"


def test_a_prompt_of_several_lines(monkeypatch, capsys):
    words = ["<eos>", "<unk>", "the", "cat", *map(str, range(7))]
    for prompt, ids in (
        ("the cat\n", [2, 3, 0]),
        ("the\n\ncat", [2, 0, 0, 3]),
        ("\n", [0]),
        ("the <eos> 3 ", [2, 0, 7]),
    ):
        assert generate.encode(prompt, words) == ids
    assert generate.encode("the\ncat", words[1:]) == [1, 2], "no line ends: white space"
    with pytest.raises(Error, match=r"word 'dog' is not among the 11 words .* Write <unk> for it"):
        generate.encode("the dog", words)
    shown = {"": "cat", "a": " cat", "\n": "cat", " ": "cat", " a": " cat"}
    assert {before: generate._word("cat", before) for before in shown} == shown
    assert generate._word("<eos>", " a") == generate._word("<eos>", "\n") == "\n"
    params, cfg = small_network("s4d")
    monkeypatch.setattr(generate, "load", lambda run, dtype: (params, cfg, words))
    monkeypatch.setattr(backend, "set_threads", lambda threads: None)
    for prompt in ("the cat\n", "the cat "):
        generate.generate("run", prompt, 1, 1.0, 3, 1.0, 3)
        out = capsys.readouterr().out
        assert out[:8] == prompt and out[8] not in " " and out.endswith("\n")


def test_no_tokens(ask, folder):
    out, err = ask(folder / "s4d", "--prompt", "to", "--tokens", 0)
    assert out == "to\n" and err.startswith("0 tokens")


def test_wrong_usage(ask, folder, tmp_path):
    run = folder / "s4d"
    for wrong, code, said in (
        ((run, "--prompt", "tö be"), 1, "the prompt's character 'ö' is not among the"),
        ((run, "--prompt", "\udcff"), 1, "is not among the"),
        ((run, "--temperature", -1), 1, "temperature=-1.0: expected 0"),
        ((run, "--temperature", "nan"), 1, "temperature=nan: expected 0"),
        ((run, "--temperature", "warm"), 2, "'warm' is not a valid float"),
        ((run, "--top-k", -1), 1, "top_k=-1: expected 0"),
        ((run, "--top-p", 0), 1, "top_p=0.0: expected more than 0"),
        ((run, "--tokens", -1), 2, "not in the range"),
        ((run, "--seed", -1), 2, "not in the range"),
        ((folder / "transformer", "--tokens", 65), 1, "this transformer has 64 positions. Ask"),
        ((tmp_path / "none",), 1, "holds no run: there is no config.json in it."),
        ((tmp_path,), 1, "holds no run"),
        ((), 2, "Missing argument 'RUN'"),
    ):
        out, err = ask(*wrong, expect=code)
        assert out == "" and err.count("\n") == 1 and said in err, err
        assert err.startswith("Error: ")
    assert len(ask(folder / "transformer", "--tokens", 64)[0]) == 65


@pytest.mark.parametrize("damage", ["cut", "none", "other", "vocabulary", "no text"])
def test_a_damaged_run(ask, folder, tmp_path, damage):
    run = Path(shutil.copytree(folder / "s4d", tmp_path / "run"))
    path, config = run / "checkpoint.safetensors", run / "config.json"
    settings = json.loads(config.read_text())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "none":
        path.unlink()
    elif damage == "other":
        shutil.copy(folder / "transformer" / path.name, path)
    else:
        changed = {"vocabulary": {"vocabulary": 3}, "no text": {"vocabulary": []}}[damage]
        config.write_text(json.dumps(settings | changed))
    said = {
        "cut": "is not a whole safetensors file",
        "none": "There is no file",
        "other": "is of another configuration",
        "vocabulary": "vocabulary is no list of texts",
        "no text": "which is no text to go on with",
    }[damage]
    out, err = ask(run, expect=1)
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 1 and said in err


def test_text_is_seen_as_it_comes_and_ctrl_c_ends_it(folder):
    process = started(folder / "s4d", "--prompt", "to be", "--tokens", 10**9, text=False)
    chunks = [os.read(process.stdout.fileno(), 1 << 16) for _ in range(20)]
    assert b"".join(chunks).startswith(b"to be")
    assert any(not chunk.endswith(b"\n") for chunk in chunks[1:]), "whole lines at a time"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith(b"\n")
    assert err.count(b"\n") == 1 and b" tokens in " in err


def test_nobody_reads_on(folder):
    process = started(folder / "s4d", "--tokens", 10**9)
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1 and err == ""


def test_it_needs_no_more_than_the_run(ask, folder, tmp_path):
    """Neither the data, nor the folder where it was trained, nor the optimiser's state"""
    run = tmp_path / "elsewhere"
    run.mkdir()
    for name in ("config.json", "checkpoint.safetensors"):
        shutil.copy(folder / "s4d" / name, run)
    before = {path.name: os.stat(path).st_mtime_ns for path in run.iterdir()}
    assert len(ask(run, "--tokens", 5)[0]) == 6
    assert {path.name: os.stat(path).st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.parametrize("tied", ["yes", "no"])
def test_a_run_becomes_a_checkpoint(folder, tmp_path, capsys, tied):
    (tmp_path / "input.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "draw_curves", lambda out: None)
        trained(tmp_path, "mamba", "--tied", tied)
    made = ["checkpoint", tmp_path / "mamba", "-o", tmp_path / "made", "--layout", "transformers"]
    assert run_command(main, list(map(str, made)), "python -m ref") == 0
    assert "a run of mamba, " in capsys.readouterr().out
    params, cfg = checkpoints.load(tmp_path / "made")
    own, _, _ = generate.load(tmp_path / "mamba")
    assert cfg.tied == (tied == "yes") and own.keys() == params.keys()
    assert all(np.array_equal(own[name], params[name]) for name in own)
    other = ["checkpoint", str(folder / "s4d"), "-o", str(tmp_path / "no")]
    assert run_command(main, other, "python -m ref") == 1
    assert "s4d has no published layout" in capsys.readouterr().err
