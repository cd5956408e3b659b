"""train.py: what a run writes, that interruptions change no bit, what it says to bad input."""

import errno
import importlib
import itertools
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import numpy as np
import pytest

import data as data_sets
import train
from ref import Error, backend, network, optim, presets, runs
from ref.files import read_tensors, write_tensors

ROOT = Path(__file__).parent.parent
START = "--model hope --data lra-listops"
TINY = "--d-model 8 --n-layers 2 --d-state 8 --batch-size 8 --dropout 0.1 --warmup 5"
# 14 is no multiple of save_every, and neither of log_every: what has to be kept in between shows.
SHORT = f"{TINY} --steps 14 --save-every 3 --eval-every 4 --log-every 5"
KEPT = ("config.json", "checkpoint.safetensors", "metrics.jsonl")


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    """A folder with the release's files, small"""
    folder = tmp_path_factory.mktemp("tsv")
    rng = np.random.default_rng(0)
    operators = {"[MIN": min, "[MAX": max, "[SM": lambda digits: sum(digits) % 10}
    for name, count in (("train", 200), ("val", 30), ("test", 30)):
        lines = ["Source\tTarget"]
        for _ in range(count):
            operator = str(rng.choice(list(operators)))
            digits = rng.integers(0, 10, rng.integers(2, 9)).tolist()
            source = f"( {operator} {' '.join(map(str, digits))} ] )"
            lines.append(f"{source}\t{operators[operator](digits)}")
        (folder / f"basic_{name}.tsv").write_text("\n".join(lines) + "\n")
    data_sets.load("lra-listops", folder)  # makes the cache: no run has to say that it reads them
    return folder


def words(arguments):
    """Texts at their spaces, all else, as paths, whole"""
    split = (a.split() if isinstance(a, str) else [str(a)] for a in arguments)
    return list(itertools.chain.from_iterable(split))


@pytest.fixture
def call(tsv, capsys, monkeypatch):
    """Run train.main on the arguments -> exit code, stdout, stderr.   Without curves, for speed"""
    monkeypatch.setattr(train, "draw_curves", lambda out: None)

    def run(*arguments, fresh=True):
        start = [START, "--data-dir", tsv] if fresh else []
        capsys.readouterr()
        code = train.main(words([*start, *arguments]))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def resume(call):
    def run(out, *arguments):
        return call("--resume", out, *arguments, fresh=False)

    return run


def child(arguments, program=("train.py",), **options):
    """The same in a process of its own, started"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    command = [sys.executable, *program, *words(arguments)]
    return subprocess.Popen(command, cwd=ROOT, **options)


def finished(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# A process that kills itself with `signal` when it calls module.name for the count-th time
KILLED = """
import importlib, os, sys, train
module, name, count, number, *arguments = sys.argv[1:]
module, left = importlib.import_module(module), [int(count)]
call = getattr(module, name)
def dying(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), int(number))
    return call(*args, **kwargs)
setattr(module, name, dying)
sys.exit(train.main(arguments))
"""


def killed(moment, arguments):
    module, name, count = moment
    process = child([module, name, count, signal.SIGKILL, *arguments], ("-c", KILLED))
    assert finished(process)[0] == -signal.SIGKILL


@pytest.fixture
def signalled(monkeypatch):
    """Send this process a signal when module.name is called for the count-th time"""

    def at(module, name, count, number=signal.SIGINT):
        module = importlib.import_module(module)
        original, left = getattr(module, name), [count]

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    return at


def metrics(out):
    """The lines of metrics.jsonl without their times"""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def checkpoint(out):
    """-> name -> (dtype, shape, bytes), state without its time"""
    tensors, metadata = read_tensors(out / "checkpoint.safetensors")
    state = json.loads(metadata["state"])
    return {n: (t.dtype, t.shape, t.tobytes()) for n, t in tensors.items()}, state | {"seconds": 0}


def result(out):
    return json.loads((out / "result.json").read_text()) | {"seconds": 0}


def same(a, b):
    """Two runs of the same bits"""
    (tensors, state), (expected, state_expected) = checkpoint(a), checkpoint(b)
    differ = [name for name in expected.keys() | tensors if tensors.get(name) != expected.get(name)]
    assert not differ and state == state_expected
    assert metrics(a) == metrics(b)
    assert result(a) == result(b)
    assert not list(a.glob("*.tmp"))
    return True


def is_sentence(err):
    """One line, one or two sentences, no traceback"""
    line = err.strip()
    assert line.startswith("Error: ") and "\n" not in line and "Traceback" not in line, err
    return len(re.findall(r"[.!?](\s|$)", line)) <= 2


def last(err):
    """Its last line: before it, off a terminal, data.py names each file that it reads"""
    return err.splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tsv, tmp_path_factory):
    """A run that nothing interrupts, through the command line, its output on pipes"""
    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = [START, SHORT, "--data-dir", tsv, "--out", out]
    code, text, err = finished(child(arguments))
    assert code == 0, err
    return out, text, err


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of its folder, to be spoilt"""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


# What a run writes and says


def test_a_run_leaves_its_files(whole):
    out, _, _ = whole
    files = {*KEPT, "result.json", "curves.png"}
    assert {path.name for path in out.iterdir()} == files
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 4, 5, 8, 10, 12, 14]
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 8, 12, 14]
    said = result(out)
    assert set(said["baselines"]) == {"majority class", "root operator alone"}
    assert 0 <= said["test_accuracy"] <= 1 and said["test_loss"] > 0
    assert said["step"] == said["steps"] == 14


def test_without_matplotlib(tsv, tmp_path):
    program = "import sys; sys.modules['matplotlib'] = None; import train; sys.exit(train.main())"
    arguments = [START, TINY, "--steps 1 --data-dir", tsv, "--out", tmp_path]
    code, _, err = finished(child(arguments, ("-c", program)))
    assert code == 0 and err.startswith("curves.png is not drawn: matplotlib is not installed")
    assert (tmp_path / "result.json").exists() and not (tmp_path / "curves.png").exists()


def test_what_it_prints_on_a_pipe(whole, tsv):
    _, text, err = whole
    assert "\r" not in text + err and "\x1b" not in text + err
    for expected in (
        "hope on lra-listops (200 train, 30 valid, 30 test; read from basic_train.tsv",
        r"1,146 parameters, float32, about \d+\.\d MiB a step, (cpu|cuda \(.*\)), seed 0",
        rf"{backend.threads()} threads, BLAS core type \w+, 14 steps of 8",
        r"to beat: majority class 0\.\d{4}, root operator alone 0\.\d{4}",
        r"step 8: validation loss \d\.\d{4}, accuracy \d\.\d{4}",
        r"step 14/14  loss \d\.\d{3}  accuracy 0\.\d{3}  \d+\.\d\d step/s  0\.0 min left",
        r"test accuracy 0\.\d{4}, loss \d\.\d{4}, after 14 of 14 steps in",
        r"    majority class: 0\.\d{4}",
        r"    root operator alone: 0\.\d{4}",
    ):
        assert re.search("^" + expected.replace("(200", r"\(200"), text, re.MULTILINE), expected


def test_config_says_what_decides_the_run(whole, tsv):
    settings = json.loads((whole[0] / "config.json").read_text())
    assert settings["preset"] == "small" and settings["layer"]["dropout"] == 0.1
    assert settings["data_dir"] == str(tsv)
    assert set(settings["machine"]) >= {"processor", "device", "threads", "BLAS core type", "numpy"}


def test_validation_and_training_lines_are_means(call, tmp_path):
    """Every fifth line is the mean of the five lines of a run that writes each"""
    assert call(SHORT, "--out", tmp_path / "a")[0] == 0
    assert call(SHORT, "--log-every 1 --out", tmp_path / "b")[0] == 0
    each = {line["step"]: line for line in metrics(tmp_path / "b") if "loss" in line}
    line = next(line for line in metrics(tmp_path / "a") if line["step"] == 10)
    assert line["loss"] == pytest.approx(np.mean([each[i]["loss"] for i in range(6, 11)]))
    assert line["gradient_norm"] == each[10]["gradient_norm"]


def test_the_bar_on_a_terminal(tsv, tmp_path):
    """With loss, accuracy, speed and time left; Ctrl-C in it leaves a clean line"""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    arguments = [START, TINY, "--data-dir", tsv, "--steps 1000000 --out", tmp_path / "run"]
    process = child(arguments, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    seen, sent = "", False
    while True:
        try:
            seen += os.read(master, 4096).decode(errors="replace")
        except OSError:  # the terminal is gone with the process
            break
        if not sent and "step/s, loss " in seen:
            sent = True
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    bar = (
        r"\r +0%\|.*\| \d+/1000000 \[00:\d\d<[\d:]+, +[\d.]+step/s, loss \d\.\d+, accuracy 0\.\d+\]"
    )
    assert re.search(bar, seen), seen
    after = seen.partition("Stopping after this step; once more ends at once.")[2]
    assert re.search(r"\nStopped after step \d+; everything is saved\. To go on:\r\n", after), seen
    assert f"    python train.py --resume {tmp_path / 'run'}\r\n" in after


# Settings


def test_same_seed_same_bits_other_seed_others(call, whole, tmp_path):
    assert call(SHORT, "--out", tmp_path / "same")[0] == 0
    assert same(tmp_path / "same", whole[0])
    assert call(SHORT, "--seed 1 --out", tmp_path / "other")[0] == 0
    first, other = metrics(whole[0])[0], metrics(tmp_path / "other")[0]
    assert first["loss"] != other["loss"]


def test_float64_is_float64_everywhere(call, tmp_path):
    assert call(SHORT, "--dtype float64 --out", tmp_path / "run")[0] == 0
    tensors, _ = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"float64"}


def test_fractional_epochs(call, tmp_path, tsv):
    per_epoch = data_sets.steps_per_epoch(data_sets.load("lra-listops", tsv), 8)
    assert call(TINY, "--epochs 0.3 --out", tmp_path / "run")[0] == 0
    assert result(tmp_path / "run")["step"] == math.ceil(0.3 * per_epoch) < per_epoch


def settings_of(**options):
    return presets.make_settings({"model": "hope", "data": "lra-listops"} | options)


def test_presets():
    small, paper = settings_of(), settings_of(preset="paper")
    assert small == settings_of(preset="small") != paper
    published = {"batch_size": 20, "steps": 800_000, "n_layers": 8, "dt_lr": 0.0, "clip": 0.0}
    assert published.items() <= paper["recipe"].items()
    layer = {"d_model": 128, "d_state": 64, "convention": "lra", "bidirectional": True}
    assert layer.items() <= paper["layer"].items()
    assert settings_of(preset="paper", d_model=8)["layer"]["d_model"] == 8


def test_what_is_given_decides_how_long_it_takes():
    def length(**options):
        recipe = settings_of(**options)["recipe"]
        return recipe["steps"], recipe["epochs"]

    assert length(steps=7) == (7, 0.0)
    assert length(epochs=0.5) == (0, 0.5)
    assert length(minutes=3.0) == (0, 0.0)
    assert length(minutes=3.0, steps=7) == (7, 0.0)
    assert length() == (settings_of()["recipe"]["steps"], 0.0)


def test_paper_runs(call, tmp_path):
    paper = "--preset paper --d-model 8 --n-layers 2 --steps 2"
    assert call(paper, "--out", tmp_path / "run")[0] == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["preset"] == "paper" and settings["recipe"]["dt_lr"] == 0
    tensors, _ = checkpoint(tmp_path / "run")
    assert not any("log_dt" in name for name in tensors if name.startswith("adamw."))


# Time


def test_minutes_with_steps_end_early_and_can_be_extended(call, resume, tmp_path):
    out = tmp_path / "run"
    code, text, _ = call(TINY, "--steps 1000000 --minutes 0.01 --out", out)
    assert (
        code == 0 and f"The time is over. To train on:\n    python train.py --resume {out}" in text
    )
    first = result(out)
    assert 0 < first["step"] < first["steps"] == 10**6
    assert metrics(out)[-1].keys() == {"step", "valid_loss", "valid_accuracy"}
    assert resume(out)[0] == 0 and result(out) == first  # its minutes are over
    seconds = json.loads((out / "result.json").read_text())["seconds"]
    assert resume(out, "--minutes", seconds / 60 + 0.02)[0] == 0
    assert result(out)["step"] > first["step"]


def test_minutes_alone_fit_the_schedule(call, tmp_path):
    out = tmp_path / "run"
    code, text, _ = call(TINY, "--minutes 0.02 --log-every 1 --out", out)
    assert code == 0 and "in 0.02 minutes as many steps of 8" in text
    rates = [line["lr"] for line in metrics(out) if "lr" in line]
    assert rates[-1] < 0.9 * max(rates)
    assert json.loads((out / "result.json").read_text())["seconds"] < 60


def test_budget_finds_the_steps_from_the_first_tenth():
    budget = runs.Budget(1)  # 60 seconds; 2 for the first step, then ten steps a second
    assert math.isinf(budget.total(1, math.inf, 2.0))
    assert math.isinf(budget.total(30, math.inf, 4.9))
    assert budget.total(41, math.inf, 6.0) == 41 + 540
    assert budget.total(42, 581, 30.0) == 581 and runs.Budget(1).total(1, 50, 59.0) == 50
    assert budget.spent(60.0) and not budget.spent(59.9)
    assert not runs.Budget(0).spent(1e9)


def test_interrupted_before_the_time_has_decided(call, resume, signalled, tmp_path):
    out = tmp_path / "run"
    signalled("ref.optim", "adamw_update", 3)
    assert call(TINY, "--minutes 60 --out", out)[0] == 0
    assert checkpoint(out)[1]["total"] == math.inf
    assert resume(out, "--minutes 1e-6")[0] == 0
    assert result(out)["step"] == result(out)["steps"] == 3


# Interrupted and resumed: the same bits

ANY_MOMENT = {
    "in a step": ("ref.optim", "adamw_update", 8),
    "after writing a checkpoint's bytes": ("os", "replace", 5),
    "while writing a checkpoint": ("os", "fsync", 4),
    "in an evaluation": ("ref.network", "forward", 12),
    "before the first checkpoint": ("ref.runs", "save_checkpoint", 1),
    "in the test at the end": ("train", "report", 1),
}


@pytest.mark.parametrize("moment", ANY_MOMENT.values(), ids=ANY_MOMENT)
def test_killed_and_resumed(whole, tsv, tmp_path, resume, moment):
    out = tmp_path / "run"
    killed(moment, [START, SHORT, "--data-dir", tsv, "--out", out])
    assert (out / "config.json").exists() and not (out / "result.json").exists()
    assert bool(list(out.glob("*.tmp"))) == (moment[0] == "os")
    code, _, err = resume(out)
    assert code == 0 and err == ""
    assert same(out, whole[0])


def test_killed_at_a_random_step_again_and_again(call, tsv, tmp_path):
    """Through the real command line, as often as it takes"""
    long = f"{TINY} --steps 250 --save-every 7 --eval-every 100 --log-every 1"
    assert call(long, "--out", tmp_path / "whole")[0] == 0
    out, kills, rng = tmp_path / "run", 0, np.random.default_rng()
    process = child([START, long, "--data-dir", tsv, "--out", out])
    for target in (int(rng.integers(10, 80)), int(rng.integers(90, 160))):
        while process.poll() is None:
            log = out / "metrics.jsonl"
            if log.exists() and log.read_bytes().count(b"\n") >= target:
                process.kill()
                break
            time.sleep(0.001)
        kills += process.wait() == -signal.SIGKILL
        process = child(["--resume", out])
    assert finished(process)[0] == 0 and kills
    assert same(out, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(whole, tsv, tmp_path, resume, number):
    """The checkpoint is of the step that it stopped at, not of the last regular save"""
    out = tmp_path / "run"
    arguments = [START, SHORT, "--data-dir", tsv, "--out", out]
    process = child(["ref.optim", "adamw_update", 5, int(number), *arguments], ("-c", KILLED))
    code, text, err = finished(process)
    assert code == 0 and err.strip() == "Stopping after this step; once more ends at once."
    command = f"python train.py --resume {out}"
    assert text.endswith(f"Stopped after step 5; everything is saved. To go on:\n    {command}\n")
    assert checkpoint(out)[1]["step"] == 5
    assert resume(*command.split()[3:])[0] == 0
    assert same(out, whole[0])


def test_interrupted_again_and_again(call, resume, whole, tmp_path, signalled, monkeypatch):
    """In steps and in evaluations, at least eight times"""
    out, stops = tmp_path / "run", 0
    signalled("ref.network", "forward", 5)  # the first four find out what a step holds
    assert call(SHORT, "--out", out)[0] == 0
    while not (out / "result.json").exists() and stops < 50:
        with monkeypatch.context():
            # An evaluation takes four batches: of two stops in a row the second is beyond it.
            signalled("ref.network", "forward", 10 if stops % 2 else 6, signal.SIGTERM)
            assert resume(out)[0] == 0
        stops += 1
    assert stops > 8
    assert same(out, whole[0])


@pytest.mark.parametrize("count", [1, 2, 4, 5], ids=["first", "second", "last", "test"])
def test_interrupted_in_an_evaluation(call, resume, whole, tmp_path, signalled, count):
    out = tmp_path / "run"
    signalled("train", "evaluate", count)
    code, text, _ = call(SHORT, "--out", out)
    step = min(4 * count, 14)
    assert code == 0 and f"Stopped after step {step}; everything is saved." in text
    assert not (out / "result.json").exists()
    assert resume(out)[0] == 0
    assert same(out, whole[0])


def test_asked_twice_it_ends_at_once(call, resume, whole, tmp_path, signalled):
    out = tmp_path / "run"
    signalled("ref.optim", "adamw_update", 8)
    signalled("ref.network", "running_statistics", 8)
    code, _, err = call(SHORT, "--out", out)
    assert code == 1 and err.endswith("Interrupted.\n")
    assert checkpoint(out)[1]["step"] == 6  # the last regular one
    assert resume(out)[0] == 0
    assert same(out, whole[0])


def test_interrupted_before_it_starts(call, tmp_path, signalled):
    signalled("data", "load", 1)
    # A shell that started the tests in its background would have had them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = call(SHORT, "--out", tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 1 and err.strip() == "Interrupted." and not (tmp_path / "run").exists()


def test_resuming_a_finished_run_changes_nothing(resume, whole, copy):
    code, text, _ = resume(copy)
    assert code == 0 and "test accuracy" in text
    assert same(copy, whole[0])


def test_resume_copes_with_the_end_of_metrics(call, resume, whole, tmp_path, signalled):
    """A line cut by a kill, one that is no line of ours, and lines beyond the checkpoint"""
    out = tmp_path / "run"
    signalled("ref.optim", "adamw_update", 6)
    assert call(SHORT, "--out", out)[0] == 0
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "loss": 7}\n[1]\n\xff\n3\n{"step": 6, "lo')
    assert resume(out)[0] == 0
    assert same(out, whole[0])


# Evaluation only


def test_eval_only(resume, whole, copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    code, text, _ = resume(copy, "--eval-only")
    said = result(copy)
    assert code == 0 and f"test accuracy {said['test_accuracy']:.4f}, " in text
    assert f"    majority class: {said['baselines']['majority class']:.4f}" in text
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_eval_only_needs_a_checkpoint(resume, copy):
    (copy / "checkpoint.safetensors").unlink()
    code, _, err = resume(copy, "--eval-only")
    assert code == 1 and is_sentence(err) and "There is no file" in err


# Another machine, other data


def edit(out, **changes):
    settings = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(settings))


def test_another_machine_gives_a_warning(resume, copy, whole):
    machine = json.loads((copy / "config.json").read_text())["machine"]
    edit(copy, machine=machine | {"numpy": "1.0", "BLAS core type": "Abacus", "planet": "Mars"})
    code, _, err = resume(copy)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("Warning: BLAS core type was Abacus and is ")
    assert ", numpy was 1.0 and is " in err and ", planet was Mars and is None: the results" in err
    assert "threads" not in err


def test_threads_are_kept_and_can_be_changed(call, resume, tmp_path):
    if backend.available_cores() < 2:
        pytest.skip("one core")
    out = tmp_path / "run"
    try:
        assert call(SHORT, "--threads 1 --out", out)[0] == 0
        backend.set_threads(2)
        code, text, err = resume(out)
        assert code == 0 and "\n1 threads, " in text and not err
        code, text, err = resume(out, "--threads 2")
        assert "\n2 threads, " in text and err.startswith("Warning: threads was 1 and is 2: ")
    finally:
        backend.set_threads(backend.available_cores())


def test_data_may_move_but_not_change(resume, copy, tsv, tmp_path):
    moved = shutil.copytree(tsv, tmp_path / "moved")
    edit(copy, data_dir=str(tmp_path / "gone"))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "basic_test.tsv").touch()
    code, _, err = resume(copy)
    assert code == 1 and is_sentence(err) and "found no basic_train.tsv" in err
    assert resume(copy, "--data-dir", moved)[0] == 0
    lines = (moved / "basic_train.tsv").read_text().splitlines()
    (moved / "basic_train.tsv").write_text("\n".join(lines[:-1]))
    code, _, err = resume(copy, "--data-dir", moved)
    assert code == 1 and is_sentence(last(err)) and "the data are not those of the run" in err


# Wrong usage: 2, one or two sentences, and nothing written

USAGE = {
    "--model foo": "'foo' is not one of 'hope'",
    "--data foo": "'foo' is not one of 'lra-listops'",
    "--preset foo": "'foo' is not one of 'small', 'paper'",
    "--dtype float16": "'float16' is not one of",
    "--device tpu": "'tpu' is not one of",
    "--foo 1": "No such option",
    "foo": "unexpected extra argument",
    "--steps": "requires an argument",
    "--conv foo": "expected one of: circular, causal, identity",
    "--norm foo": "expected one of",
    "--decoder foo": "expected one of: auto, mean, last, match, lm",
    "--decoder lm": "language modelling needs a causal map",
    "--conv causal": "bidirectional",
    "--batch-size 0": "batch_size=0: expected at least 1",
    "--batch-size 2.5": "'2.5' is not a valid int",
    "--lr -1": "lr=-1.0: expected 0 or more",
    "--lr nan": "lr=nan: expected",
    "--lr inf": "lr=inf: expected",
    "--lr fast": "'fast' is not a valid float",
    "--steps -3": "steps=-3: expected 0 or more",
    "--steps 0": "nothing to train",
    "--epochs -0.5": "epochs=-0.5: expected 0 or more",
    "--steps 5 --epochs 1": "give one of the two",
    "--minutes 0": "not in the range",
    "--minutes nan": "minutes=nan: expected",
    "--d-model 0": "d_model",
    "--d-state 0": "d_state",
    "--n-layers 0": "n_layers=0: expected at least 1",
    "--log-every 0": "log_every=0: expected at least 1",
    "--dropout 1.5": "dropout",
    "--dropout nan": "dropout",
    "--scale-factor 0": "scale_factor",
    "--scale-factor nan": "scale_factor=nan: expected",
    "--seed -1": "seed=-1: expected 0 or more",
    f"--seed {10**30}": "expected a number below",
    f"--warmup {10**30}": "expected a number below",
    "--threads 0": "not in the range",
    "--threads 9999": "--threads 9999: expected 1 to",
    "--eval-only": "--eval-only needs --resume RUN",
}


@pytest.mark.parametrize("given", USAGE)
def test_wrong_usage(call, tmp_path, given):
    code, out, err = call("--out", tmp_path / "run", given)
    assert (code, out) == (2, "") and is_sentence(err) and USAGE[given] in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["--model", "--data"])
def test_missing_model_or_data(call, tmp_path, missing):
    rest = re.sub(rf"{missing} \S+", "", START)
    code, _, err = call(rest, "--out", tmp_path / "run", fresh=False)
    assert code == 2 and is_sentence(err) and f"{missing} is missing" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", ["--lr 1", "--out elsewhere", "--seed 0", "--preset small", START]
)
def test_resume_goes_with_few_options(resume, copy, given):
    code, _, err = resume(copy, given)
    assert code == 2 and is_sentence(err)
    assert f"cannot be combined with {', '.join(sorted(given.split()[::2]))}." in err


def test_wrong_values_for_resume(resume, copy):
    for given in ("--minutes nan", "--threads 9999", "--device tpu"):
        code, _, err = resume(copy, given)
        assert code == 2 and is_sentence(err)


# Everything else that fails: 1, one or two sentences, and nothing half-written


def test_no_target_at_every_position(call, tmp_path):
    causal = "--decoder lm --conv causal --no-bidirectional"
    code, _, err = call(TINY, causal, "--out", tmp_path / "run")
    assert code == 1 and is_sentence(err) and "one target a sample" in err
    assert not (tmp_path / "run").exists()


def test_no_gpu(call, tmp_path):
    if backend._cupy_or_reason()[0] is not None:
        pytest.skip("there is one")
    code, _, err = call(TINY, "--device cuda --out", tmp_path / "run")
    assert code == 1 and is_sentence(err) and "--device cuda" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["file", "file/run", "file/a/b"])
def test_an_out_that_cannot_be_written(call, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    code, text, err = call(SHORT, "--out", tmp_path / below)
    assert (code, text) == (1, "") and is_sentence(err) and "Not a directory" in err
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_out_with_too_long_a_name(call, tmp_path):
    code, _, err = call(SHORT, "--out", tmp_path / ("a" * 300))
    assert code == 1 and is_sentence(err) and "File name too long" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", KEPT)
def test_an_out_that_holds_a_run(call, tmp_path, name):
    (tmp_path / name).write_text("mine")
    code, _, err = call(SHORT, "--out", tmp_path)
    assert code == 1 and is_sentence(err) and "holds a run already" in err
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_name_that_is_no_text(tsv, tmp_path):
    """Printed as the bytes that it is"""
    out = os.fsencode(tmp_path) + b"/\xff"
    arguments = [START, SHORT, "--data-dir", tsv, "--out", Path(os.fsdecode(out))]
    process = child(
        ["ref.optim", "adamw_update", 2, int(signal.SIGINT), *arguments], ("-c", KILLED), text=False
    )
    code, text, _ = finished(process)
    assert code == 0 and b"--resume '" + out + b"'\n" in text


def test_resume_where_there_is_no_run(resume, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        code, _, err = resume(folder)
        assert code == 1 and is_sentence(err) and "holds no run" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("train", "Source\tTarget\n[MAX 1 2\t2\n", "basic_train.tsv, line 2: expected balanced"),
        ("val", "Quelle\tZiel\n[MAX 1 2 ]\t2\n", "basic_val.tsv, line 1: expected the header"),
        ("test", None, "found no basic_test.tsv"),
    ],
)
def test_bad_data(call, tsv, tmp_path, name, text, said):
    folder = shutil.copytree(tsv, tmp_path / "data")
    (folder / "lra-listops-tsv.safetensors").unlink(missing_ok=True)
    path = folder / f"basic_{name}.tsv"
    path.write_text(text) if text else path.unlink()
    code, out, err = call(SHORT, "--out", tmp_path / "run", "--data-dir", folder)
    assert (code, out) == (1, "") and said in err
    assert is_sentence(last(err)) and not (tmp_path / "run").exists()


def test_too_large_for_memory(call, tmp_path):
    code, _, err = call("--d-model 1000000000000 --out", tmp_path / "run")
    assert code == 1 and is_sentence(err) and "out of memory" in err
    assert not (tmp_path / "run").exists()


def test_diverging(call, tmp_path):
    """No warning of NumPy's comes before the sentence: pytest would make it an error"""
    code, _, err = call(SHORT, "--lr 1e15 --weight-decay 1e15 --clip 0 --out", tmp_path / "run")
    assert code == 1 and is_sentence(err) and "Training has diverged" in err
    assert "the last checkpoint is of step 0" in err
    assert checkpoint(tmp_path / "run")[1]["step"] == 0
    assert not list(tmp_path.glob("*/*.tmp"))
    for line in metrics(tmp_path / "run"):
        assert all(math.isfinite(value) for value in line.values())


@pytest.mark.parametrize("where", ["loss", "gradient", "validation", "parameters"])
def test_a_nan_is_never_saved(call, tmp_path, monkeypatch, where):
    """At step 6, which is saved"""
    steps = [0]
    forward, update, norm = network.forward, optim.adamw_update, optim.gradient_norm

    def counted_update(params, *args, **kwargs):
        steps[0] += 1
        update(params, *args, **kwargs)
        if where == "parameters" and steps[0] == 6:
            params["decoder.bias"][0] = np.nan

    def spoilt_forward(params, x, cfg, lengths=None, rng=None):
        y, cache = forward(params, x, cfg, lengths, rng)
        training = rng is not None
        if (where == "loss" and training and steps[0] == 5) or (
            where == "validation" and not training and steps[0] == 8
        ):
            y = y * np.float32("nan")
        return y, cache

    def spoilt_norm(grads):
        return math.nan if where == "gradient" and steps[0] == 5 else norm(grads)

    monkeypatch.setattr(optim, "adamw_update", counted_update)
    monkeypatch.setattr(network, "forward", spoilt_forward)
    monkeypatch.setattr(optim, "gradient_norm", spoilt_norm)
    out = tmp_path / "run"
    code, _, err = call(SHORT, "--out", out)
    assert code == 1 and is_sentence(err) and "diverged" in err
    tensors, metadata = read_tensors(out / "checkpoint.safetensors")
    assert all(np.isfinite(t).all() for t in tensors.values())
    assert json.loads(metadata["state"])["step"] == (6 if where == "validation" else 3)
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_a_full_disk_while_saving(call, resume, whole, tmp_path, monkeypatch):
    """The checkpoint before stays whole; with room again, the run goes on from it"""
    out, fsync, calls = tmp_path / "run", os.fsync, [0]

    def full(descriptor):
        calls[0] += 1
        if calls[0] >= 5:  # config, metrics, checkpoints of steps 0 and 3
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        code, _, err = call(SHORT, "--out", out)
    assert code == 1 and is_sentence(err)
    assert f"Cannot write {out / 'checkpoint.safetensors'}: No space left on device" in err
    assert not list(out.glob("*.tmp")) and checkpoint(out)[1]["step"] == 3
    assert resume(out)[0] == 0
    assert same(out, whole[0])


def limited(arguments, size):
    """A child in which no file grows beyond `size` bytes"""
    setrlimit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    program = f"import sys, train; {setrlimit}; sys.exit(train.main(sys.argv[1:]))"
    return finished(child(arguments, ("-c", program)))


def test_no_room_for_the_metrics(tsv, tmp_path, resume, call):
    """A line that does not fit is an error, and what is there of it does no harm"""
    long = f"{TINY} --steps 150 --save-every 40 --log-every 1"
    out, size = tmp_path / "run", 20_000
    code, _, err = limited([START, long, "--data-dir", tsv, "--out", out], size)
    assert code == 1 and is_sentence(err)
    assert f"Cannot write {out / 'metrics.jsonl'}: " in err
    assert (out / "metrics.jsonl").stat().st_size == size
    assert resume(out)[0] == 0
    assert call(long, "--out", tmp_path / "whole")[0] == 0
    assert same(out, tmp_path / "whole")


def test_half_a_line_of_metrics_is_an_error(tmp_path, monkeypatch):
    log = runs.Log(tmp_path, 0, [], 1)
    monkeypatch.setattr(log, "file", types.SimpleNamespace(write=lambda line: len(line) - 1))
    with pytest.raises(Error, match=r"Cannot write .*metrics\.jsonl: the disk is full"):
        log.write(step=1)


def test_no_room_for_the_checkpoint(tsv, tmp_path):
    out = tmp_path / "run"
    code, _, err = limited([START, SHORT, "--data-dir", tsv, "--out", out], 5_000)
    assert code == 1 and is_sentence(err)
    assert f"Cannot write {out / 'checkpoint.safetensors'}: File too large" in err
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl"}


def test_nobody_reads_the_output():
    """A full device under the output: a sentence. A pipe that was closed: the exit code alone."""
    with open("/dev/full", "w") as full:
        code, _, err = finished(child(["--version"], stdout=full))
    assert code == 1 and err == "Error: the output: No space left on device.\n"
    reader, writer = os.pipe()
    os.close(reader)
    code, _, err = finished(child(["--version"], stdout=writer))
    os.close(writer)
    assert (code, err) == (1, "")


# Damaged checkpoints


@pytest.mark.parametrize("part", [0, 4, 8, 100, 0.5, 0.9, -1])
def test_a_truncated_checkpoint(resume, copy, part):
    path = copy / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if 0 < part < 1 else part])
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for options in ((), ("--eval-only",)):
        code, _, err = resume(copy, *options)
        assert code == 1 and is_sentence(err) and "is not a whole safetensors file" in err
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_flipped_bit_anywhere(whole, tmp_path):
    """In the header's length, in the header, in the data"""
    path = tmp_path / "checkpoint.safetensors"
    content = (whole[0] / "checkpoint.safetensors").read_bytes()
    settings = presets.read_settings(whole[0] / "config.json")
    cfg = train.network_config(settings, data_sets.load("lra-listops", settings["data_dir"]))
    params = network.init(cfg, np.random.default_rng(0))
    groups = train.optimiser_groups(params, cfg, presets.Recipe(**settings["recipe"]))
    moments = optim.adamw_init({n: p for n, p in params.items() if groups[n].lr})
    path.write_bytes(content)
    runs.load_checkpoint(path, params, moments)
    header = int.from_bytes(content[:8], "little")
    for i in [*range(0, 8 + header, 5), *range(8 + header, len(content), 97)]:
        path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
        with pytest.raises(Error, match="checkpoint") as e:
            runs.load_checkpoint(path, params, moments)
        assert is_sentence(f"Error: {e.value}")


def test_a_flipped_header_through_the_command_line(resume, copy):
    path = copy / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    code, _, err = resume(copy)
    assert code == 1 and is_sentence(err) and "checkpoint.safetensors" in err


def test_a_checkpoint_of_another_configuration(call, resume, copy, tmp_path):
    for name, options in {
        "wider": "--d-model 16",
        "deeper": "--n-layers 3",
        "double": "--dtype float64",
        "frozen": "--dt-lr 0",
    }.items():
        assert call(SHORT, options, "--steps 1 --out", tmp_path / name)[0] == 0
        shutil.copy(tmp_path / name / "checkpoint.safetensors", copy)
        code, _, err = resume(copy)
        assert code == 1 and is_sentence(err) and "is of another configuration: " in err


def test_a_foreign_checkpoint(resume, copy):
    path = copy / "checkpoint.safetensors"
    for metadata in ({}, {"format": "pt"}, {"format": runs.FORMAT}):
        write_tensors(path, {"weight": np.ones(3)}, metadata)
        code, _, err = resume(copy)
        assert code == 1 and is_sentence(err) and str(path) in err


def test_a_checkpoint_that_is_a_folder(resume, copy):
    (copy / "checkpoint.safetensors").unlink()
    (copy / "checkpoint.safetensors").mkdir()
    code, _, err = resume(copy)
    assert code == 1 and is_sentence(err)


# Damaged settings


def without(values, name):
    return {k: v for k, v in values.items() if k != name}


DAMAGED = {
    "not JSON": (lambda s: "{", "it is not JSON"),
    "empty": (lambda s: "", "it is not JSON"),
    "no text": (lambda s: b"\xff\xfe\x00", "it is not JSON"),
    "deep": (lambda s: "[" * 100_000, "it is not JSON"),
    "a list": (lambda s: [], "expected an object"),
    "null": (lambda s: None, "expected an object"),
    "empty object": (lambda s: {}, "is missing"),
    "no model": (lambda s: without(s, "model"), "model is missing"),
    "no seed": (lambda s: without(s, "seed"), "seed is missing"),
    "no machine": (lambda s: without(s, "machine"), "machine is missing"),
    "machine": (lambda s: s | {"machine": "mine"}, "machine is no object"),
    "no layer": (lambda s: without(s, "layer"), "layer is missing"),
    "layer": (lambda s: s | {"layer": 3}, "expected an object, found 3"),
    "field": (lambda s: s | {"layer": without(s["layer"], "norm")}, "norm is missing"),
    "no lr": (lambda s: s | {"recipe": without(s["recipe"], "lr")}, "lr is missing"),
    "key": (lambda s: s | {"colour": "red"}, "colour is not known"),
    "layer's key": (lambda s: s | {"layer": s["layer"] | {"x": 1}}, "x is not known"),
    "recipe's key": (lambda s: s | {"recipe": s["recipe"] | {"x": 1}}, "x is not known"),
    "model": (lambda s: s | {"model": "foo"}, "model='foo' is not known"),
    "model's type": (lambda s: s | {"model": ["hope"]}, "model=['hope']"),
    "data": (lambda s: s | {"data": "foo"}, "'foo'"),
    "data's type": (lambda s: s | {"data": {}}, "data={}: expected a text"),
    "data_dir's type": (lambda s: s | {"data_dir": None}, "data_dir=None: expected a text"),
    "checksum": (lambda s: s | {"data_checksum": 5}, "the data are not those"),
    "dtype": (lambda s: s | {"dtype": "int8"}, "dtype='int8' is not known"),
    "device": (lambda s: s | {"device": "tpu"}, "device='tpu' is not known"),
    "preset": (lambda s: s | {"preset": "huge"}, "preset='huge' is not known"),
    "seed": (lambda s: s | {"seed": -1}, "seed=-1"),
    "seed's type": (lambda s: s | {"seed": "0"}, "seed='0': expected an integer"),
    "threads": (lambda s: s | {"threads": 9999}, "--threads 9999"),
    "d_model's type": (lambda s: s | {"layer": s["layer"] | {"d_model": "8"}}, "d_model='8'"),
    "prenorm's type": (lambda s: s | {"layer": s["layer"] | {"prenorm": 0}}, "prenorm=0"),
    "lr's type": (lambda s: s | {"recipe": s["recipe"] | {"lr": None}}, "lr=None"),
    "NaN": (lambda s: s | {"recipe": s["recipe"] | {"lr": math.nan}}, "lr=nan"),
    "infinity": (lambda s: s | {"layer": s["layer"] | {"dt_max": math.inf}}, "dt_max=inf"),
    "value": (lambda s: s | {"recipe": s["recipe"] | {"batch_size": 0}}, "batch_size=0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_settings(resume, copy, damage):
    spoil, said = DAMAGED[damage]
    path = copy / "config.json"
    spoilt = spoil(json.loads(path.read_text()))
    text = spoilt if isinstance(spoilt, (str, bytes)) else json.dumps(spoilt)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, err = resume(copy)
    assert code == 1 and is_sentence(err) and said in err


def test_whole_numbers_are_numbers(resume, copy, whole):
    """JSON written by others may have 1 for 1.0"""
    settings = json.loads((copy / "config.json").read_text())
    edit(copy, recipe=settings["recipe"] | {"clip": 1}, minutes=0)
    assert resume(copy)[0] == 0
    assert same(copy, whole[0])


# Help


def test_help(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Example: python train.py --model hope" in text and "--d-state INTEGER" in text
    assert train.main([]) == 2
    assert is_sentence(capsys.readouterr().err)
