"""Data sets: generated, or read from the files of their release, and cut into batches.

`load` gives a `Data`; `train_batches` and `eval_batches` give its batches. A sample's padded length
follows from its own length alone and a batch holds samples of one padded length: what a network
computes for a sample then does not depend on the batch that it came in.

A further data set is a further section below and one line in `LOADERS`.
"""

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ref import Error, files


class DataError(Error):
    """A data file is missing, damaged or not in its format, or cannot be written."""


@dataclass(frozen=True, eq=False)
class Split:
    """N samples, one after the other."""

    values: np.ndarray  # token ids (S,) uint8, uint16 or int32, or real values (S, C) float32
    offsets: np.ndarray  # (N + 1,) int64; sample i is values[offsets[i] : offsets[i + 1]]
    targets: np.ndarray  # (N,) int64

    def __len__(self):
        return len(self.targets)

    @property
    def lengths(self):
        """(N,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set and what a network has to know of it."""

    name: str
    train: Split
    valid: Split
    test: Split
    d_input: int  # token ids: the vocabulary's size; real values: channels
    tokens: bool  # True when values are token ids
    d_output: int  # classes
    pad: int  # the token or value that fills a batch beyond a sample's end
    grid: int  # padded lengths are multiples of this
    max_length: int  # the longest padded length
    vocabulary: tuple  # token strings by id
    baselines: dict  # name -> test accuracy of a guess that needs no network
    source: str  # one sentence: how it was generated, or from which files it was read


class Batch(NamedTuple):
    """B samples of one padded length L."""

    x: np.ndarray  # (B, L) int32 token ids, or (B, L, C) float32
    targets: np.ndarray  # (B,) int64
    lengths: np.ndarray  # (B,) int64, without padding


def load(name, data_dir=None, seed=0, progress=True):
    """The data set of that name (see NAMES).

    data_dir holds the release's files or takes the cache of generated data; by default it is
    $REF_DATA_DIR, else a folder in the user's cache. seed is the generator's. progress allows a bar
    on a terminal.   Error: an unknown name, a bad file, a folder that cannot be written.
    """
    if name not in LOADERS:
        raise Error(f"There is no data set {name!r}; expected one of: {', '.join(NAMES)}.")
    if not 0 <= seed < 2**64:
        raise Error(f"The data seed is {seed}; expected an integer from 0 to 2**64 - 1.")
    return LOADERS[name](_folder(data_dir), seed, progress)


# Batches


def steps_per_epoch(data, batch_size):
    """Training batches in every epoch."""
    return sum(max(len(b) // batch_size, 1) for b in _buckets(data.train, data.grid, batch_size))


def train_batches(data, batch_size, seed, start=0):
    """Endless iterator of (epoch, Batch) from step `start` on.

    Batch number `step` is a function of (data, batch_size, seed, step) alone. Every epoch shuffles
    each bucket of one padded length and cuts it into full batches; what is left over sits it out,
    but a bucket smaller than a batch gives one smaller batch. Then the batches are shuffled.
    Error: batch_size below 1, seed or start below 0, an empty split.
    """
    buckets = _buckets(data.train, data.grid, batch_size)
    if seed < 0 or start < 0:
        raise Error(f"Seed and step are {seed} and {start}; expected both to be at least 0.")
    return _train_batches(data, buckets, batch_size, seed, start)


def _train_batches(data, buckets, batch_size, seed, start):
    epoch, skip = divmod(start, steps_per_epoch(data, batch_size))
    while True:
        rng = np.random.default_rng([seed, epoch])
        batches = []
        for bucket in buckets:
            shuffled, size = rng.permutation(bucket), min(batch_size, len(bucket))
            batches += np.split(shuffled[: len(bucket) // size * size], len(bucket) // size)
        for i in rng.permutation(len(batches))[skip:]:
            yield epoch, _batch(data.train, data, batches[i])
        epoch, skip = epoch + 1, 0


def eval_batches(split, data, batch_size):
    """Iterator of batches that holds every sample of the split once, the shortest first.

    Error: batch_size below 1, an empty split.
    """
    buckets = _buckets(split, data.grid, batch_size)
    return (
        _batch(split, data, bucket[i : i + batch_size])
        for bucket in buckets
        for i in range(0, len(bucket), batch_size)
    )


def _buckets(split, grid, batch_size):
    """Indices of the samples of each padded length, in ascending order."""
    if batch_size < 1:
        raise Error(f"The batch size is {batch_size}; expected at least 1.")
    if len(split) == 0:
        raise Error("The split has no samples; expected at least one to make batches of.")
    padded = _padded(split.lengths, grid)
    return [np.flatnonzero(padded == length) for length in np.unique(padded)]


def _padded(lengths, grid):
    return -(-lengths // grid) * grid


def _batch(split, data, samples):
    """The samples of these indices (B,), all of one padded length."""
    starts = split.offsets[samples]
    lengths = split.offsets[samples + 1] - starts
    shape = (len(samples), _padded(lengths[0], data.grid), *split.values.shape[1:])
    x = np.full(shape, data.pad, np.int32 if data.tokens else np.float32)
    for row, start, length in zip(x, starts, lengths, strict=True):
        row[:length] = split.values[start : start + length]
    return Batch(x, split.targets[samples], lengths)


# Baselines


def _majority_class(train, test):
    """Test accuracy of the most frequent target in train."""
    return float(np.mean(test.targets == np.bincount(train.targets).argmax()))


def _first_token_alone(train, test, d_input, d_output):
    """Test accuracy of the most frequent target in train given the sample's first token."""
    counts = np.zeros((d_input, d_output), np.int64)
    np.add.at(counts, (train.values[train.offsets[:-1]], train.targets), 1)
    counts[counts.sum(1) == 0] = np.bincount(train.targets, minlength=d_output)
    guess = counts.argmax(1)[test.values[test.offsets[:-1]]]
    return float(np.mean(test.targets == guess))


# Folders, the cache, progress


def _folder(data_dir):
    if data_dir is None:
        data_dir = os.environ.get("REF_DATA_DIR")
    if not data_dir:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        data_dir = os.path.join(cache, "ref-sequence-models")
    return Path(os.path.expanduser(data_dir))


@contextlib.contextmanager
def _advice():
    """Add to the error of a folder or disk that refuses what the user can do about it"""
    try:
        yield
    except Error as error:
        raise DataError(
            f"{error} Make room or choose another folder with --data-dir or REF_DATA_DIR."
        ) from None


SPLIT_PARTS = ("values", "offsets", "targets")


def _write_cache(path, splits, arguments):
    """Write splits {name: Split} and arguments {name: str} to one safetensors file.

    The file has its name only once it is complete.   DataError: it cannot be written.
    """
    tensors = {f"{s}.{part}": getattr(splits[s], part) for s in splits for part in SPLIT_PARTS}
    with _advice():
        files.write_tensors(path, tensors, arguments | {"sha256": files.checksum(tensors)})


def _read_cache(path, arguments):
    """{name: Split} as written with the same arguments. None: no file, a damaged or another one."""
    if not os.path.lexists(path):
        return None
    try:
        tensors, metadata = files.read_tensors(path)
    except Error as error:
        return _not_usable(path, f"cannot be read ({error})")
    checksum = metadata.pop("sha256", None)
    if metadata != arguments:
        return _not_usable(path, "was made by another version or from other arguments")
    if checksum != files.checksum(tensors):
        return _not_usable(path, "is damaged (its checksum differs)")
    splits = {name.partition(".")[0] for name in tensors}
    return {s: Split(*(tensors[f"{s}.{part}"] for part in SPLIT_PARTS)) for s in splits}


def _not_usable(path, reason):
    print(f"{path} {reason}; making it again.", file=sys.stderr)


def _bar(total, what, unit, progress):
    """A progress bar on a terminal, one line elsewhere, nothing when progress is False."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    if progress and not terminal:
        print(f"{what}: {total:,} {unit}", file=sys.stderr)
    shown = progress and terminal
    return tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True, disable=not shown)


# lra-listops: MIN, MAX, MED and SM of digits, nested (Nangia and Bowman 2018, arXiv:1804.06028; Tay
# et al. 2020, Long Range Arena, arXiv:2011.04006). The target is the value of the expression.

SPECIAL = ("<pad>", "<unk>", "<eos>")
LISTOPS_VOCABULARY = (*SPECIAL, *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
PAD, EOS, DIGIT, MIN, MAX, MED, SM, CLOSE = 0, 2, 3, 13, 14, 15, 16, 17

LISTOPS_VERSION = "1"  # of the generator: raise it whenever the same seed gives other samples
LISTOPS_SIZES = (96_000, 2_000, 2_000)  # train, valid, test
LISTOPS_LIMITS = (500, 2_000)  # lower < length < upper, in tokens without <eos>
LISTOPS_LONGEST = 2_048  # tokens with <eos>; longer samples of a release are cut as published
LISTOPS_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
LISTOPS_LINE = 1 << 20  # bytes; no line of the release is longer than a few per cent of this


def load_listops(folder, seed, progress=True, sizes=LISTOPS_SIZES, limits=LISTOPS_LIMITS):
    """From the release's TSV files when the folder (a Path) has any of them, else generated."""
    if any(os.path.lexists(folder / name) for name in LISTOPS_FILES.values()):
        splits = read_listops(folder, progress)
        source = f"read from {', '.join(LISTOPS_FILES.values())} in {folder}"
    else:
        splits = cached_listops(folder, seed, progress, sizes, limits)
        source = f"generated by version {LISTOPS_VERSION} of our generator from seed {seed}"
    train, test, d_input = splits["train"], splits["test"], len(LISTOPS_VOCABULARY)
    return Data(
        name="lra-listops",
        **splits,
        d_input=d_input,
        tokens=True,
        d_output=10,
        pad=PAD,
        grid=128,
        max_length=LISTOPS_LONGEST,
        vocabulary=LISTOPS_VOCABULARY,
        baselines={
            "majority class": _majority_class(train, test),
            "root operator alone": _first_token_alone(train, test, d_input, 10),
        },
        source=source,
    )


def listops_value(tokens):
    """The value 0..9 of an expression in token ids, without <eos>.   DataError: it is not one."""
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    operators, arguments = [], [[]]  # of the operators still open; arguments[0] takes the result
    for token in tokens:
        if DIGIT <= token < MIN:
            arguments[-1].append(token - DIGIT)
        elif MIN <= token < CLOSE:
            operators.append(token)
            arguments.append([])
        elif token != CLOSE:
            raise DataError(f"expected digits, operators and ], found token id {token}")
        elif not operators:
            raise DataError("expected balanced brackets, found a ] that closes nothing")
        elif not arguments[-1]:
            raise DataError("expected every operator to have arguments, found one without")
        else:
            value = _listops_apply(operators.pop(), arguments.pop())
            arguments[-1].append(value)
    if operators:
        raise DataError(f"expected balanced brackets, found {len(operators)} without a ]")
    if len(arguments[0]) != 1:
        raise DataError(f"expected one expression, found {len(arguments[0])}")
    return arguments[0][0]


def _listops_apply(operator, arguments):
    if operator == MIN:
        return min(arguments)
    if operator == MAX:
        return max(arguments)
    if operator == SM:
        return sum(arguments) % 10
    ordered, n = sorted(arguments), len(arguments)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2  # the median, truncated


# lra-listops, generated


def cached_listops(folder, seed, progress, sizes, limits):
    """{"train", "valid", "test": Split}, generated unless the folder's cache file has them."""
    arguments = {
        "name": "lra-listops",
        "version": LISTOPS_VERSION,
        "seed": str(seed),
        "sizes": " ".join(map(str, sizes)),
        "limits": " ".join(map(str, limits)),
    }
    path = folder / ("-".join(arguments.values()).replace(" ", "-") + ".safetensors")
    splits = _read_cache(path, arguments)
    if splits is None:
        with _advice():  # before the work is done rather than after it
            files.check_writable(folder)
        splits = generate_listops(seed, sizes, limits, progress)
        _write_cache(path, splits, arguments)
    return splits


def generate_listops(seed, sizes=LISTOPS_SIZES, limits=LISTOPS_LIMITS, progress=False):
    """{"train", "valid", "test": Split} of those sizes, all distinct, lower < length < upper.

    A tree's root has depth 1. A node at a depth below 10 is an operator with probability 1/4, else
    a digit; at depth 10 it is a digit. Digits, operators and the number 2..10 of arguments are
    uniform. A tree's length counts its digits, operators and closing brackets. Every sample has a
    random stream of its own, numbered from 0; one that was there before is left out.
    """
    from ref.kernels import listops

    slab, total = 2_000, sum(sizes)
    values, lengths, targets, seen = bytearray(), [], [], set()
    with _bar(total, "lra-listops, generating", "samples", progress) as bar:
        first = 0
        while len(targets) < total:
            if first > 100 * total + slab:
                raise DataError(f"Expected {total} different trees, found {len(targets)}.")
            before = len(targets)
            count = min(slab, max(total - before, 100))
            drawn = listops.draw(seed, first, count, *limits)
            for tokens, length, target in zip(*drawn, strict=True):
                sample = tokens[:length].tobytes()
                # What differs in the digest differs, and it is much smaller to remember.
                digest = hashlib.blake2b(sample, digest_size=16).digest()
                if digest not in seen and len(targets) < total:
                    seen.add(digest)
                    values += sample
                    values.append(EOS)
                    lengths.append(length + 1)
                    targets.append(target)
            first += count
            bar.update(len(targets) - before)
    every = _listops_split(values, lengths, targets)
    return dict(zip(LISTOPS_FILES, _cut(every, sizes), strict=True))


def _listops_split(values, lengths, targets):
    """Split of token ids (bytearray), lengths with <eos> and targets (lists)."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Split(np.frombuffer(values, np.uint8), offsets, np.array(targets, np.int64))


def _cut(split, sizes):
    """Consecutive parts of the split, of those sizes."""
    first = 0
    for size in sizes:
        offsets = split.offsets[first : first + size + 1]
        values = split.values[offsets[0] : offsets[-1]]
        yield Split(values, offsets - offsets[0], split.targets[first : first + size])
        first += size


# lra-listops, the release's files


def read_listops(folder, progress):
    """{"train", "valid", "test": Split} from the folder's TSV files.

    The result is kept beside them and serves for as long as their sizes and times stay the same.
    DataError: one of the three is missing or bad.
    """
    paths = {split: folder / name for split, name in LISTOPS_FILES.items()}
    for path in paths.values():
        if not os.path.isfile(path):
            raise DataError(
                f"Expected {', '.join(LISTOPS_FILES.values())} in {folder}, found no {path.name}. "
                "Put it there, or name a folder with none of the three to generate the data."
            )
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths.values()]
    arguments = {"name": "lra-listops-tsv", "version": "1", "files": json.dumps(stats)}
    cache = folder / "lra-listops-tsv.safetensors"
    splits = _read_cache(cache, arguments)
    if splits is None:
        splits = {split: read_listops_tsv(path, progress) for split, path in paths.items()}
        try:
            _write_cache(cache, splits, arguments)
        except DataError as error:  # the release may well lie in a folder that is for reading only
            print(f"{error} Going on without.", file=sys.stderr)
    return splits


LISTOPS_ID = {text.encode(): i for i, text in enumerate(LISTOPS_VOCABULARY) if i >= DIGIT}
LISTOPS_SPACES = bytes.maketrans(b"()", b"  ")


def read_listops_tsv(path, progress=False):
    """Split from one file: a header Source<TAB>Target, then an expression and its value on a line.

    Parentheses are dropped. More than 2,048 tokens with <eos> are cut to that many, as in the
    published pipelines.   DataError: what is not in the format; a target that is not the value.
    """
    values, lengths, targets = bytearray(), [], []
    try:
        with (
            open(path, "rb") as file,
            _bar(os.fstat(file.fileno()).st_size, path.name, "bytes", progress) as bar,
        ):
            # A bounded readline: a file without line ends is not read into memory.
            for number, line in enumerate(iter(lambda: file.readline(LISTOPS_LINE + 1), b""), 1):
                bar.update(len(line))
                try:
                    sample = _parse_listops_line(number, line)
                except DataError as error:
                    raise DataError(
                        f"{path}, line {number}: {error}. Take the file from the release again."
                    ) from None
                if sample is not None:
                    tokens, target = sample
                    values += tokens
                    lengths.append(len(tokens))
                    targets.append(target)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}. Check that it is a file you may read."
        ) from None
    if not targets:
        raise DataError(
            f"{path}: expected a header and samples, found none. "
            "Take the file from the release again."
        )
    return _listops_split(values, lengths, targets)


def _parse_listops_line(number, line):
    """bytes -> (token ids with <eos>, target); None for the header, which is line 1."""
    if len(line) > LISTOPS_LINE:
        raise DataError(f"expected at most {LISTOPS_LINE:,} bytes, found more")
    if b"\0" in line:
        raise DataError("expected text, found a NUL byte")
    if not line.isascii():
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"expected UTF-8 text, found {error.reason}") from None
    columns = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
    if number == 1:
        if columns != [b"Source", b"Target"]:
            raise DataError(f"expected the header Source<TAB>Target, found {_quoted(line)}")
        return None
    if len(columns) != 2:
        raise DataError(f"expected two columns with a tab between them, found {len(columns)}")
    words, label = columns[0].translate(LISTOPS_SPACES).split(), columns[1]
    if len(label) != 1 or not label.isdigit():
        raise DataError(f"expected a label from 0 to 9, found {_quoted(label)}")
    try:
        tokens = bytes(map(LISTOPS_ID.__getitem__, words))
    except KeyError as error:
        raise DataError(
            f"expected digits, [MIN, [MAX, [MED, [SM and ], found {_quoted(error.args[0])}"
        ) from None
    if not tokens:
        raise DataError("expected an expression, found nothing")
    value = listops_value(tokens)
    if len(tokens) >= LISTOPS_LONGEST:
        tokens = tokens[: LISTOPS_LONGEST - 1]
    elif value != int(label):
        raise DataError(f"the expression's value is {value}, but its label is {int(label)}")
    return tokens + bytes([EOS]), int(label)


def _quoted(text):
    """Bytes for a message."""
    return repr(text[:40].decode(errors="backslashreplace")) + (" ..." if len(text) > 40 else "")


LOADERS = {"lra-listops": load_listops}
NAMES = tuple(LOADERS)
