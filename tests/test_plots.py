"""Curves of runs: what is drawn, which runs belong together, and the numbers of the table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ref import Error

plots = pytest.importorskip("ref.plots", reason="matplotlib is not installed: nothing is drawn")

ROOT = Path(__file__).parents[1]
WEIGHTS = {"weight_mean": 0.6, "weight_std": 0.1, "effective_penalty": 0.15, "regulariser": 0.3}
HELD_OUT = {"dln_loss": 3.0, "hypergradient_norm": 1e-3, "alignment": math.nan}
LOGGED = {
    "none": {},
    "static": WEIGHTS | {"weighted_loss": 2.0},
    "released": WEIGHTS | {"weighted_loss": 2.0, "teacher_loss": 9.0, "dln_loss": 1.0},
    "hypergrad": WEIGHTS | HELD_OUT | {"weighted_loss": 2.0},
    "lstm": WEIGHTS | HELD_OUT | {"weighted_loss": 2.0, "teacher_loss": 2.9},
    "pairs": HELD_OUT | {"weighted_loss": 2.0, "teacher_loss": 2.9},
}


def make_run(folder, valid, seed=0, test=None, perplexity=True, more=None, **config):
    """Write a run with these validation losses at steps 10, 20, ...; test: its loss, once it has
    ended"""
    folder.mkdir(parents=True)
    usual = {"data": "ptb", "data_checksum": "ab", "seed": seed, "recipe": {"lr": 1e-3}}
    (folder / "config.json").write_text(json.dumps(usual | config))
    lines = []
    for i, loss in enumerate(valid):
        step = 10 * (i + 1)
        train = {"step": step, "loss": loss - 0.5, "accuracy": 0.25} | (more or {})
        entry = {"step": step, "valid_loss": loss, "valid_accuracy": 0.5, "seconds": 6.0 * step}
        if perplexity:
            entry["valid_perplexity"] = math.exp(loss)
        lines += [train, entry]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if test is not None:
        result = {"test_loss": test, "test_accuracy": 0.75, "step": 10 * len(valid)}
        result |= {"test_perplexity": math.exp(test)} if perplexity else {}
        result |= {"seconds": 90.0, "baselines": {}}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved"""
    figures = []

    def keep(figure, path):
        figure.canvas.draw()
        figures.append(figure)

    monkeypatch.setattr(plots, "_save", keep)
    yield figures
    for figure in figures:
        plots.plt.close(figure)


def legend(axis):
    return [text.get_text() for text in axis.get_legend().texts]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("teacher", LOGGED)
def test_a_second_row_for_a_teacher(teacher, tmp_path, drawn):
    run = make_run(tmp_path / "run", [3.0, 2.0, 2.5], test=2.0, more=LOGGED[teacher])
    plots.curves(run, tmp_path / "p.png")
    labels = [axis.get_ylabel() for axis in drawn[0].axes]
    kinds = {
        "none": [],
        "static": ["weight", "regulariser", "effective penalty"],
        "released": [
            *("weight", "loss of the loss network", "effective penalty"),
            "loss of the teacher",
        ],
        "hypergrad": ["weight", "held-out loss (nats)", "effective penalty"],
        "lstm": [
            *("weight", "held-out loss (nats) of the loss network", "effective penalty"),
            "held-out loss (nats) of the teacher",
        ],
        "pairs": [
            *("norm of the hypergradient", "held-out loss (nats) of the loss network"),
            "held-out loss (nats) of the teacher",
        ],
    }
    assert labels == ["loss (nats)", "accuracy", *kinds[teacher]]
    kind = {"none": ["training", "validation"]}.get(
        teacher,
        [
            *("training, cross-entropy", "validation"),
            f"training, {'learned' if teacher == 'pairs' else 'weighted'} loss",
        ],
    )
    assert legend(drawn[0].axes[0]) == kind


def test_weight_band_and_penalty(tmp_path, drawn):
    run = make_run(tmp_path / "run", [3.0, 2.0, 2.5], more=LOGGED["hypergrad"])
    plots.curves(run, tmp_path / "p.png")
    weight, _, penalty = drawn[0].axes[2:]
    (line,), (band,) = weight.lines, weight.collections
    assert line.get_ydata() == pytest.approx([0.6] * 3)
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.5, 0.7))
    assert penalty.get_yscale() == "log"
    assert penalty.lines[0].get_ydata() == pytest.approx([0.15] * 3)


def test_losses_that_are_near_share_an_axis(tmp_path, drawn):
    run = make_run(tmp_path / "run", [3.0, 2.0, 2.5], more=LOGGED["lstm"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "dln_loss" in line:
            line["dln_loss"], line["teacher_loss"] = line["loss"], line["loss"] + 0.01
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plots.curves(run, tmp_path / "p.png")
    axes = drawn[0].axes
    assert len(axes) == 5 and axes[3].get_ylabel() == "held-out loss (nats)"
    assert legend(axes[3]) == ["loss network", "teacher"]


@pytest.mark.parametrize("teacher", LOGGED)
def test_the_selected_step_is_marked(teacher, tmp_path, drawn):
    run = make_run(tmp_path / "run", [3.0, 2.0, 2.5], test=2.0, more=LOGGED[teacher])
    plots.curves(run, tmp_path / "p.png")
    result = json.loads((run / "result.json").read_text()) | {"selected_step": 20}
    (run / "result.json").write_text(json.dumps(result))
    plots.curves(run, tmp_path / "p.png")
    panels = 2 if teacher == "none" else 4
    for before, after in list(zip(drawn[0].axes, drawn[1].axes, strict=True))[:panels]:
        assert len(after.lines) == len(before.lines) + 1
        assert list(after.lines[-1].get_xdata()) == [20, 20]
    assert legend(drawn[1].axes[0])[-1] == "best step, 20"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("teacher", LOGGED)
def test_killed_runs(teacher, tmp_path, drawn):
    """Nothing, half a line, one line and a half, NaN: alone, and two of them together"""
    line = json.dumps({"step": 1, "loss": 2.0, "accuracy": 0.5} | LOGGED[teacher])
    skipped = json.dumps({"step": 2, "loss": math.nan, "accuracy": math.nan} | LOGGED[teacher])
    contents = ["", line[:9], f"{line}\n{line[:20]}", f"{line}\n{skipped}\n"]
    runs = [make_run(tmp_path / f"r-{i}", [], seed=i) for i in range(len(contents))]
    for run, content in zip(runs, contents, strict=True):
        (run / "metrics.jsonl").write_text(content)
        plots.curves(run, tmp_path / "p.png")
    table = plots.compare(runs, tmp_path / "p.png")
    assert table.splitlines()[1].split() == ["r", *"0123", "1-2", *"------"]
    assert len(drawn) == len(contents) + 1
    training = drawn[-1].axes[0].lines[0]  # of the runs that have any
    assert training.get_xydata().tolist() == [[1, 2]]


def test_runs_that_differ_in_their_seed(tmp_path, drawn):
    runs = [make_run(tmp_path / f"a-{seed}", [3.0, 2.0 - seed], seed) for seed in range(2)]
    where = {"machine": {"threads": 2}, "threads": 2, "data_dir": "/x", "vocabulary": ["a"]}
    runs.append(make_run(tmp_path / "a-2", [3.0, 2.0, 2.5], 2, **where))
    runs.append(make_run(tmp_path / "a-0-again", [3.0, 2.0], 0))
    runs.append(make_run(tmp_path / "b-0", [3.0, 2.0], 0, recipe={"lr": 2e-3}))
    groups = plots.grouped(runs)
    assert {name: [run.name for run in group] for name, group in groups.items()} == {
        "a": ["a-0", "a-1", "a-2"],
        "a-0-again": ["a-0-again"],
        "b-0": ["b-0"],
    }
    plots.compare(runs, tmp_path / "p.png")
    axis = drawn[0].axes[0]
    assert legend(axis)[:3] == ["a, 3 seeds", "a-0-again", "b-0"]
    (mean,) = (line for line in axis.lines if line.get_label() == "a, 3 seeds")
    assert mean.get_xdata().tolist() == [10, 20]
    assert mean.get_ydata() == pytest.approx([3.0, 5 / 3])
    of_group = {line.get_color() for line in axis.lines[:9]}
    assert of_group == {"C0"} and axis.lines[9].get_color() == "C1"
    least = [line.get_xydata().tolist()[0] for line in axis.lines if len(line.get_xdata()) == 1]
    assert least[:4] == [[20, 2], [20, 1], [20, 2], [20, pytest.approx(5 / 3)]]


def test_names_of_groups(tmp_path):
    """What the folders have in common, or all of them where that is nothing or not enough"""
    kinds = {"m-0": 0, "n-0": 1, "x": 2, "y": 2, "m-1": 0, "n-1": 1}
    runs = [
        make_run(tmp_path / name, [2.0], seed, recipe={"lr": kind})
        for seed, (name, kind) in enumerate(kinds.items())
    ]
    assert list(plots.grouped(runs)) == ["m", "n", "x, y"]
    runs.append(make_run(tmp_path / "m-2", [2.0], 0, recipe={"lr": 7}))
    runs.append(make_run(tmp_path / "m-3", [2.0], 1, recipe={"lr": 7}))
    assert list(plots.grouped(runs)) == ["m-0, m-1", "n", "x, y", "m-2, m-3"]
    same = [make_run(tmp_path / part / "run", [2.0], recipe={"lr": part}) for part in "pq"]
    assert list(plots.grouped(same)) == [str(run) for run in same]


def test_a_seed_that_replays_its_own_run(tmp_path):
    """The weights of released-0 and of released-1 are of one kind, those of other-0 are not"""
    released = [make_run(tmp_path / f"released-{seed}", [2.0], seed) for seed in range(2)]
    other = make_run(tmp_path / "other-0", [2.0], recipe={"lr": 9})
    runs = [
        make_run(tmp_path / f"{kind}-{seed}", [2.0], seed, teaching={"replay": str(run)})
        for kind, seed, run in (("r", 0, released[0]), ("r", 1, released[1]), ("o", 2, other))
    ]
    assert list(plots.grouped(runs)) == ["r", "o-2"]


def test_the_table(tmp_path):
    """By hand: perplexities e^2 = 7.389 and e^3 = 20.086; their mean 13.737, deviation 8.978"""
    runs = [
        make_run(tmp_path / "a-0", [4.0, 2.0, 3.0], 0, test=2.0),
        make_run(tmp_path / "a-1", [3.0, 4.0, 4.0], 1, test=3.0),
        make_run(tmp_path / "b", [7.0, 2.0], 0, recipe={"lr": 1}),
        make_run(tmp_path / "c-0", [2.0], 3, test=2.0, recipe={"lr": 2, "eval_samples": 20}),
        make_run(tmp_path / "c-1", [2.0], 4, recipe={"lr": 2, "eval_samples": 20}),
    ]
    rows = plots.table(plots.grouped(runs)).splitlines()
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]
    assert cells[0] == [
        *("seeds", "steps", "best valid perplexity", "at step", "last valid perplexity"),
        *("test perplexity", "minutes"),
    ]
    assert cells[1] == [
        *("a", "0 1", "30", "13.74 ± 8.98", "10-20", "37.34 ± 24.40", "13.74 ± 8.98"),
        "1.5 ± 0.0",
    ]
    assert cells[2] == ["b", "0", "20", "7.389", "20", "7.389", "-", "2.0"]
    assert cells[3] == [
        *("c", "3 4", "10", "7.389 ± 0.000", "10", "7.389 ± 0.000", "7.389 (1 of 2)"),
        "1.2 ± 0.4",
    ]
    assert rows[4:] == [
        "a ± b: mean and sample deviation over the seeds",
        "not evaluated alike: eval_samples is None, 20",
    ]


def test_the_table_of_classifiers(tmp_path):
    runs = [
        make_run(tmp_path / name, [4.0, 2.0, 3.0], test=2.5, perplexity=False, max_length=length)
        for name, length in (("a", 1), ("b", 2))
    ]
    rows = plots.compare(runs, tmp_path / "p.png").splitlines()
    assert rows[0].split("  ")[-3:] == ["test loss", "test accuracy", "minutes"]
    assert rows[1].split() == ["a", "0", "30", "2.0000", "20", "3.0000", "2.5000", "0.7500", "1.5"]
    assert rows[3:] == ["not evaluated alike: max_length is 1, 2"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_do_not_go_together(tmp_path):
    a, b = (make_run(tmp_path / name, [2.0], recipe={"lr": name}) for name in "ab")
    mnist = make_run(tmp_path / "mnist", [2.0], data="mnist")
    other = make_run(tmp_path / "other", [2.0], data_checksum="cd")
    bare, odd = (make_run(tmp_path / name, [2.0]) for name in ("bare", "odd"))
    (bare / "config.json").unlink()
    (odd / "config.json").write_text('["seed", "data", "data_checksum"]')
    for runs, said in (
        ((a, tmp_path / "nothing"), "nothing is not the folder of a run"),
        ((a, mnist), "different data, ptb and mnist"),
        ((a, other), "different data, two versions of ptb"),
        ((a, b, tmp_path / "b" / ".." / "b"), "is given twice"),
        ((a, bare), "Cannot read .*config.json"),
        ((a, odd), "config.json is not as train.py writes it"),
    ):
        with pytest.raises(Error, match=said) as raised:
            plots.compare(runs, tmp_path / "p.png")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "p.png").exists()


def test_the_command(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, [3.0, 2.0], test=2.0, recipe={"lr": name})
    make_run(tmp_path / "c", [3.0], data="mnist")

    def plot(*arguments):
        command = [sys.executable, "-m", "ref", "plot", *arguments]
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = plot("a", "b", "--what", "curves")
    assert done.returncode == 0 and done.stdout.endswith("\ncurves.png\n"), done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["a", "b"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plot("a", "--what", "curves").stdout == "a/curves.png\n"
    wrong = plot("a", "b", "--what", "kernel")
    assert wrong.returncode == 2 and "several are for --what curves" in wrong.stderr
    wrong = plot("a", "c", "--what", "curves")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
