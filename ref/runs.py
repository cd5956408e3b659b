"""What a training run keeps and shows: checkpoint, metrics, progress bar, the wish to stop, the time budget."""

import json
import os
import platform
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from ref import Error, backend
from ref.files import read_tensors, write_atomically, write_tensors

FORMAT = "ref-checkpoint-1"


def machine():
    """What decides the rounding of a run besides its settings"""
    return {
        "processor": platform.machine(),
        "threads": backend.threads(),
        "BLAS core type": backend.blas_core(),
        "numpy": np.__version__,
    }


def save_checkpoint(path, params, moments, state):
    """Parameters, optimiser moments, and how far the run is; random numbers and batches follow from seed and step"""
    tensors = {f"param.{name}": backend.to_host(p) for name, p in params.items()}
    tensors |= {f"adamw.{name}": backend.to_host(p) for name, p in moments.items()}
    write_tensors(path, tensors, {"format": FORMAT, "state": json.dumps(state)})


def load_checkpoint(path, params, moments):
    """-> params, moments, state.   Error: missing, damaged, or of another configuration"""
    tensors, metadata = read_tensors(path)
    expected = {f"param.{n}": p for n, p in params.items()} | {
        f"adamw.{n}": p for n, p in moments.items()
    }
    if metadata.get("format") != FORMAT:
        raise Error(
            f"{path} is not a checkpoint of this program (format {metadata.get('format')!r}, not {FORMAT!r})."
        )
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = tensors.get(name), expected.get(name)
        if have is None or want is None or have.shape != want.shape or have.dtype != want.dtype:
            what = ["nothing" if t is None else f"{t.dtype} {t.shape}" for t in (have, want)]
            raise Error(
                f"{path} is of another configuration: {name} is {what[0]} there, {what[1]} in config.json."
            )
    state = json.loads(metadata["state"])
    return (
        {n: tensors[f"param.{n}"] for n in params},
        {n: tensors[f"adamw.{n}"] for n in moments},
        state,
    )


class Log:
    """metrics.jsonl: one object a line. On resume, lines after the checkpoint's step are dropped."""

    def __init__(self, out, step):
        self.path, self.recent, self.evaluated = out / "metrics.jsonl", [], 0
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that was being written when the process was killed
                if entry["step"] <= step:
                    kept.append(line)
                    self.evaluated = entry["step"] if "valid_loss" in entry else self.evaluated
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self.file = self.path.open("a")

    def write(self, **entry):
        self.evaluated = entry["step"] if "valid_loss" in entry else self.evaluated
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def add(self, step, loss, accuracy, norm, lr, epoch, seconds, every):
        self.recent = [*self.recent[-49:], (loss, accuracy)]
        if step % every == 0:
            means = np.mean(self.recent[-every:], axis=0)
            entry = {"loss": means[0], "accuracy": means[1], "gradient_norm": norm, "lr": lr}
            self.write(step=step, epoch=epoch, **entry, seconds=round(seconds, 2))

    def running(self):
        """Mean loss and accuracy of the last steps"""
        return np.mean(self.recent, axis=0)

    def flush(self):
        self.file.flush()
        os.fsync(self.file.fileno())


class Progress:
    """A bar with loss, accuracy, speed and time left; plain lines where the output is no terminal."""

    def __init__(self, step, total):
        self.bar = tqdm(
            initial=step,
            total=total,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.started, self.first, self.printed = time.monotonic(), step, time.monotonic()

    def update(self, step, total, loss, accuracy):
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.total = total
            self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)
            self.bar.update(1)
        elif now - self.printed > 15 or step == total:
            rate = (step - self.first) / (now - self.started)
            left = (total - step) / rate / 60
            print(
                f"step {step}/{total}  loss {loss:.3f}  accuracy {accuracy:.3f}  {rate:.2f} step/s  {left:.1f} min left",
                flush=True,
            )
            self.printed = now

    def say(self, line):
        self.bar.write(line, file=sys.stdout) if not self.bar.disable else print(line, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


class Interrupt:
    """SIGINT and SIGTERM ask the loop to stop after the current step; asked twice, the process ends at once."""

    asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        if self.asked:
            sys.exit(1)
        self.asked = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Budget:
    """How many steps fit into `minutes`: found from the speed of the first tenth, then fixed for good."""

    def __init__(self, minutes, fixed):
        self.seconds, self.fixed, self.first = (
            60 * minutes if minutes else float("inf"),
            fixed,
            None,
        )

    def spent(self, seconds):
        """Whether the time is over"""
        return seconds >= self.seconds

    def steps(self, step, total, seconds):
        """The number of steps of the run, after `step` of them in `seconds`"""
        if self.first is None:
            self.first = (step, seconds)  # compilation ends with the first step
        if self.fixed or seconds < 0.1 * self.seconds or step == self.first[0]:
            return total
        self.fixed = True
        rate = (step - self.first[0]) / (seconds - self.first[1])
        return step + max(1, int((self.seconds - seconds) * rate))
