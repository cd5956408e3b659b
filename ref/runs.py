"""What a training run keeps and shows: checkpoint, metrics, progress, interrupts, time budget."""

import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time

import numpy as np
import scipy
from tqdm import tqdm

from ref import Error, __version__, backend, network
from ref.files import checksum, read_tensors, write_atomically, write_tensors

FORMAT = "ref-checkpoint-1"
DIVERGED = "Training has diverged: try again with a smaller --lr, or with --clip."


def machine(xp):
    """What decides the rounding of a run besides its settings"""
    import numba

    return {
        "program": __version__,
        "processor": platform.machine(),
        "device": backend.device_name(xp),
        "threads": backend.threads(),
        "BLAS core type": backend.blas_core(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "kernels": "readable form" if backend.plain() else f"numba {numba.__version__}",
    }


def data_checksum(data):
    """Of all samples of all splits, in order"""
    digest = hashlib.blake2b(digest_size=16)
    for split in (data.train, data.valid, data.test):
        for array in (split.values, split.offsets, split.targets):
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def check_same(settings, now):
    """Whether a run can go on here: a warning where rounding will differ.   Error: other data"""
    if settings["data_checksum"] != now["data_checksum"]:
        raise Error("the data are not those of the run. Name their folder with --data-dir.")
    then, now = settings["machine"], now["machine"]
    differ = [
        f"{what} was {then.get(what)} and is {now.get(what)}"
        for what in now | then
        if then.get(what) != now.get(what)
    ]
    if differ:
        print(
            f"Warning: {', '.join(differ)}: the results will differ in rounding.", file=sys.stderr
        )


def save_checkpoint(path, params, moments, state, teacher=None):
    """Parameters, optimiser moments, how far the run is, and the tensors of its teacher

    Random numbers and batches follow from seed and step.   Error: a value is not finite, or the
    file cannot be written; the checkpoint before stays.
    """
    tensors = {f"param.{name}": backend.to_host(p) for name, p in params.items()}
    tensors |= {f"adamw.{name}": backend.to_host(p) for name, p in moments.items()}
    tensors |= {f"teacher.{name}": p for name, p in (teacher or {}).items()}
    if not all(np.isfinite(t).all() for t in tensors.values()):
        raise Error(f"a parameter is not finite after step {state['step']}. {DIVERGED}")
    text = json.dumps(state)
    metadata = {"format": FORMAT, "state": text, "sha256": checksum(tensors, text)}
    write_tensors(path, tensors, metadata)


def load_checkpoint(path, params, moments=None, teacher=None):
    """-> params, moments, state, teacher's tensors.   Error: missing, damaged, or of another
    configuration

    Without moments those in the file are left alone, and the teacher's.
    """
    tensors, metadata = read_tensors(path)
    expected = {f"param.{n}": p for n, p in params.items()}
    expected |= {f"adamw.{n}": p for n, p in (moments or {}).items()}
    expected |= {f"teacher.{n}": p for n, p in (teacher or {}).items()}
    if metadata.get("format") != FORMAT:
        raise Error(
            f"{path} is not a checkpoint of this program: its format is "
            f"{metadata.get('format')!r}, not {FORMAT!r}."
        )
    if metadata.get("sha256") != checksum(tensors, metadata.get("state", "")):
        raise Error(f"{path} is damaged: its checksum differs.")
    names = {n for n in tensors if moments is not None or n.startswith("param.")}
    for name in sorted(expected.keys() | names):
        have, want = tensors.get(name), expected.get(name)
        if have is None or want is None or have.shape != want.shape or have.dtype != want.dtype:
            what = ["nothing" if t is None else f"{t.dtype} {t.shape}" for t in (have, want)]
            raise Error(
                f"{path} is of another configuration: {name} is {what[0]} there, "
                f"{what[1]} in config.json."
            )
    params = {n: tensors[f"param.{n}"] for n in params}
    moments = {n: tensors[f"adamw.{n}"] for n in moments or ()}
    teacher = {n: tensors[f"teacher.{n}"] for n in teacher or ()}
    return params, moments, json.loads(metadata["state"]), teacher


class Log:
    """metrics.jsonl: one object a line. Lines after the step to resume from are dropped."""

    def __init__(self, out, step, recent, every):
        self.path, self.recent, self.every, self.evaluated = out / "metrics.jsonl", recent, every, 0
        kept = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
                known, validated = entry["step"] <= step, "valid_loss" in entry
            except (ValueError, TypeError, KeyError):
                continue  # the line that was being written when the process was killed
            if known:
                kept.append(line + b"\n")
                self.evaluated = entry["step"] if validated else self.evaluated
        write_atomically(self.path, b"".join(kept))
        self.file = self.path.open("ab", buffering=0)

    def write(self, **entry):
        """One line.   Error: the disk refuses"""
        self.evaluated = entry["step"] if "valid_loss" in entry else self.evaluated
        line = (json.dumps(entry) + "\n").encode()
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError as e:
            raise Error(f"Cannot write {self.path}: {e.strerror or e}.") from e

    def add(self, step, loss, accuracy, **entry):
        """After a training step: a line for the first and every `every`-th, of means"""
        self.recent = [*self.recent, (loss, accuracy)][-max(self.every, 50) :]
        if step == 1 or step % self.every == 0:
            loss, accuracy = np.mean(self.recent[-self.every :], axis=0)
            self.write(step=step, loss=loss, accuracy=accuracy, **entry)

    def running(self):
        """Mean loss and accuracy of the last steps; not numbers where there are none"""
        if not self.recent:
            return math.nan, math.nan
        return np.mean(self.recent[-50:], axis=0)


class Progress:
    """A bar with loss, accuracy, speed and time left; plain lines where there is no terminal."""

    def __init__(self, step, total):
        self.bar = tqdm(
            initial=step,
            total=total if math.isfinite(total) else None,
            unit="step",
            smoothing=0.1,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.first, self.started = step, time.monotonic()
        self.printed = self.started

    def update(self, step, total, loss, accuracy):
        now, known = time.monotonic(), math.isfinite(total)
        if not self.bar.disable:
            self.bar.total = total if known else None
            self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)
            self.bar.update(1)
        elif now - self.printed > 15 or step == total:
            rate = (step - self.first) / (now - self.started)
            of, left = f"/{total}", f"  {(total - step) / rate / 60:.1f} min left"
            now_at = f"step {step}{of if known else ''}  loss {loss:.3f}  accuracy {accuracy:.3f}"
            print(f"{now_at}  {rate:.2f} step/s{left if known else ''}")
            self.printed = now

    def evaluating(self):
        """Why the bar stands still now"""
        self.bar.set_postfix_str("evaluating")

    def say(self, line):
        self.bar.write(line, file=sys.stdout) if not self.bar.disable else print(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


class Interrupt:
    """SIGINT and SIGTERM ask the loop to stop after its step; asked twice, it ends at once."""

    asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nStopping after this step; once more ends at once.\n")  # safe in a handler

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Budget:
    """The time a run may take.

    Where it decides the number of steps too (`total` is infinite until then), that is found from
    the speed of the first tenth of the time, and holds for good.
    """

    def __init__(self, minutes):
        self.seconds, self.first = 60 * minutes if minutes else math.inf, None

    def spent(self, seconds):
        """Whether the time is over"""
        return seconds >= self.seconds

    def total(self, step, total, seconds):
        """The number of steps of the run, after `step` of them in `seconds`"""
        if self.first is None:
            self.first = (step, seconds)  # compilation ends with the first step
        if math.isfinite(total) or seconds < 0.1 * self.seconds or step == self.first[0]:
            return total
        rate = (step - self.first[0]) / (seconds - self.first[1])
        return step + max(1, int((self.seconds - seconds) * rate))


def memory_estimate(params, cfg, batch_size, length, decoded=0):
    """Bytes that a training step on the longest batch holds: four times the parameters, and what
    the forward pass keeps; of a language model also the logits of `decoded` positions, in whose
    place their gradient comes

    Found from short sequences, one and two of them: a sample's own part grows with its length; the
    kernels, which a batch shares, may or may not.
    """
    own = {id(p.base if p.base is not None else p) for p in params.values()}
    documents, cfg = 2 if cfg.decoder == "match" else 1, dataclasses.replace(cfg, pool_from=0)

    def kept(samples, L):
        shape = (samples * documents, L) if cfg.tokens else (samples, L, cfg.d_input)
        x = np.zeros(shape, "int32" if cfg.tokens else params["encoder.weight"].dtype)
        _, cache = network.forward(params, x, cfg, rng=np.random.default_rng(0))
        return sum(nbytes for key, nbytes in _arrays(cache).items() if key not in own)

    short = min(64, length)
    half = max(1, short // 2)
    one = kept(1, short)
    sample = kept(2, short) - one
    shared, of_half = one - sample, 2 * kept(1, half) - kept(2, half)
    growth = max(0, shared - of_half) / max(1, short - half)
    kernels = shared + growth * (length - short)
    total = kernels + sample * batch_size * length / short
    logits = decoded * cfg.d_output * params["encoder.weight"].itemsize
    return 4 * sum(p.nbytes for p in params.values()) + 1.5 * total + logits


def _arrays(tree):
    """id -> bytes of every array in nested tuples, lists and dicts"""
    if isinstance(tree, np.ndarray):
        owner = tree.base if isinstance(tree.base, np.ndarray) else tree
        return {id(owner): owner.nbytes}
    children = (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    )
    found = {}
    for child in children:
        found |= _arrays(child)
    return found
