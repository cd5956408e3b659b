"""data.py: training windows at a stride, the first part of a data set, what is held out of it."""

import collections
import dataclasses
import functools
import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from test_data import (
    check_batch,
    documents_of,
    equal,
    images,
    make_data,
    same,
    samples,
    splits_of,
    take,
)
from test_lm_data import check_windows, of_stream

import data
from ref import Error


def mqar():
    """31 samples of mqar-64-4; no other has a sample's targets"""
    splits = data.generate_mqar(1, 64, 4, (31, 2, 2))
    made = make_data([64] * 31, grid=1, valid=[64] * 2)
    sizes = {"d_input": 8192, "d_output": 8192, "per_position": True}
    return dataclasses.replace(made, **splits, **sizes)


LENGTHS = np.random.default_rng(1).integers(1, 41, 60)
KINDS = {
    "text": functools.partial(make_data, LENGTHS),
    "one length": functools.partial(make_data, [16] * 29),
    "numbers": functools.partial(make_data, LENGTHS[:41], channels=3),
    "two documents": lambda: documents_of(make_data(LENGTHS)),
    "images": images,
    "images and noise": functools.partial(images, noise=6),
    "targets at positions": mqar,
}


@pytest.fixture(params=KINDS)
def made(request):
    return KINDS[request.param]()


def permuted(count):
    """Tokens that all differ, so that a window shows where it comes from"""
    return np.random.default_rng(0).permutation(count).tolist()


def contents(split, documents=1):
    """[(tokens or numbers of a sample's documents, its targets)]"""
    found = zip(*[iter(samples(split))] * documents, strict=True)
    return list(zip(found, split.targets.tolist(), strict=True))


# Windows at a stride


def epoch_of(made, *args, epoch=0):
    """-> starts of the windows, batch by batch, of one epoch"""
    steps = data.steps_per_epoch(made, args[0], *args[2:])
    start, tokens = epoch * steps, made.train.values.tolist()
    batches = take(data.train_batches(made, *args[:2], start, *args[2:]), steps + 1)
    assert [e for e, _ in batches] == [epoch] * steps + [epoch + 1]
    return [check_windows(batch, tokens) for _, batch in batches[:-1]]


def test_windows_at_stride_1_by_hand():
    made = of_stream([3, 1, 4, 0, 5, 2], 3)
    assert data.steps_per_epoch(made, 1, 1) == 3 == 6 - 3, "N - S"
    batches = take(data.train_batches(made, 1, 0, stride=1), 3)
    assert all(epoch == 0 and batch.x.dtype == np.int32 for epoch, batch in batches)
    assert sorted((b.x.tolist(), b.targets.tolist(), b.lengths.tolist()) for _, b in batches) == [
        ([[1, 4, 0]], [[4, 0, 5]], [3]),
        ([[3, 1, 4]], [[1, 4, 0]], [3]),
        ([[4, 0, 5]], [[0, 5, 2]], [3]),
    ]


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 8, 200])
@pytest.mark.parametrize("window", [2, 7, 99, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_an_epoch_has_every_window_once(window, batch_size, stride):
    made = of_stream(permuted(101), window)
    there = list(range(0, 101 - window, stride))
    size = min(batch_size, len(there))
    assert data.steps_per_epoch(made, batch_size, stride) == len(there) // size
    for epoch in range(3):
        batches = epoch_of(made, batch_size, 0, stride, epoch=epoch)
        assert {len(batch) for batch in batches} == {size}
        starts = list(itertools.chain(*batches))
        assert len(starts) == len(set(starts)) == len(there) // size * size
        assert set(starts) <= set(there) and (batch_size == 4 or set(starts) == set(there))


def test_each_epoch_has_its_own_order_and_remainder():
    made = of_stream(permuted(101), 6)
    epochs = [epoch_of(made, 10, 3, 1, epoch=epoch) for epoch in range(20)]
    assert len({tuple(itertools.chain(*batches)) for batches in epochs}) == 20
    dropped = [set(range(95)).difference(*batches) for batches in epochs]
    assert {len(few) for few in dropped} == {5} and len(set().union(*dropped)) > 40
    first = np.array([batches[0] for batches in epochs]).ravel()
    assert scipy.stats.kstest(first / 95, "uniform").pvalue > 1e-3
    assert np.abs(np.diff(epochs[0][0])).max() > 1, "windows beside each other in a batch"


@pytest.mark.parametrize("stride", [1, 3])
def test_a_batch_at_a_stride_is_a_function_of_its_step(stride):
    made = of_stream(permuted(101), 6)
    steps = data.steps_per_epoch(made, 4, stride)
    assert steps > 5
    whole = take(data.train_batches(made, 4, 5, stride=stride), 3 * steps)
    for start in (1, steps // 2, steps - 1, steps, steps + 1, 2 * steps, 3 * steps - 1):
        resumed = take(data.train_batches(made, 4, 5, start, stride), 3 * steps - start)
        assert all(equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    other = take(data.train_batches(made, 4, 6, stride=stride), 3 * steps)
    assert not any(equal(a, b) for a, b in zip(whole, other, strict=True))


def test_stride_0_is_windows_beside_each_other():
    made = of_stream(permuted(101), 6)
    plain, zero = data.train_batches(made, 4, 5), data.train_batches(made, 4, 5, stride=0)
    assert all(equal(a, b) for a, b in zip(take(plain, 9), take(zero, 9), strict=True))
    assert len({start % 6 for start in itertools.chain(*epoch_of(made, 4, 5))}) == 1


@pytest.mark.parametrize("count", [128, 129, 130, 257, 32_768, 32_770, 60_000])
def test_every_start_of_a_longer_stream(count):
    """Whatever type the starts are held in"""
    made = of_stream(np.arange(count), 1)
    _, batch = next(data.train_batches(made, count, 0, stride=1))
    assert np.array_equal(np.sort(batch.x[:, 0]), np.arange(count - 1))
    assert np.array_equal(batch.targets, batch.x + 1)
    assert batch.x.dtype == np.int32 and batch.targets.dtype == np.int64


def test_a_late_epoch_of_a_long_stream_takes_little():
    count, window = 400_000, 64
    made = of_stream(np.arange(count) % 50_000, window)
    tracemalloc.start()
    epoch, batch = next(data.train_batches(made, 8, 0, 10**12, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epoch == 10**12 // ((count - window) // 8) and batch.x.shape == (8, window)
    assert peak < 8 * window * count / 4, "all windows at once"


def test_a_stride_that_does_not_fit_is_a_sentence(made):
    stream = of_stream(range(20))
    for make in (data.steps_per_epoch, functools.partial(data.train_batches, seed=0)):
        with pytest.raises(Error, match="stride of training windows is 1; expected 0, for it has"):
            make(made, 4, stride=1)
        with pytest.raises(Error, match="stride of training windows is -1; expected at least 0"):
            make(stream, 4, stride=-1)


# Fewer samples or tokens


def test_fewer_samples(made):
    for count in (1, 7, len(made.train)):
        part = data.part(made, count)
        own, all_of_them = (contents(d.train, made.documents) for d in (part, made))
        places = [all_of_them.index(sample) for sample in own]
        assert places == sorted(set(places)) and len(places) == count, "in the split's order"
        assert part.valid is made.valid and part.test is made.test
        for name in data.SPLIT_PARTS:
            assert getattr(part.train, name).dtype == getattr(made.train, name).dtype
        for _, batch in take(data.train_batches(part, 3, 0), 4):
            assert len(batch.targets) <= min(count, 3)
    assert same(splits_of(data.part(made, 7)), splits_of(data.part(made, 7)))
    source = f"made; only 7 of {len(made.train)} training samples"
    assert data.part(made, 7).source == source
    for count in (0, -1, len(made.train) + 1):
        with pytest.raises(Error, match=rf": {count} .* expected from 1 to {len(made.train)}"):
            data.part(made, count)


def test_the_first_tokens():
    made = of_stream([3, 1, 4, 0, 5, 2, 6, 7], 3)
    part = data.part(made, 5)
    assert part.train.values.tolist() == [3, 1, 4, 0, 5]
    assert part.train.targets.tolist() == [1, 4, 0, 5] and part.train.offsets.tolist() == [0, 5]
    assert sorted(itertools.chain(*epoch_of(part, 1, 0, 1))) == [0, 1]
    assert part.test is made.test and part.vocabulary == made.vocabulary
    assert part.baselines == made.baselines and part.loss_baselines == made.loss_baselines
    assert part.source == "made; only 5 of 8 training characters"
    assert same(splits_of(data.part(made, 8)), splits_of(made))
    assert len(data.part(made, 4).train) == 3, "a window and the token after it"
    for count in (-1, 0, 3, 9):
        message = f"{count} training characters are asked for; expected from 4 to 8"
        with pytest.raises(Error, match=message):
            data.part(made, count)


# Held-out parts


@pytest.mark.parametrize("share", [0.05, 0.3, 0.95])
def test_samples_held_out(made, share):
    inner, held = data.held_out(made, share)
    every = contents(made.train, made.documents)
    parts = [contents(split, made.documents) for split in (inner.train, held)]
    assert len(parts[1]) == round(share * len(every))
    where = [[every.index(sample) for sample in part] for part in parts]
    assert sorted(itertools.chain(*where)) == list(range(len(every)))
    assert all(at == sorted(at) for at in where), "not in the order of the split"
    for name, split in itertools.product(data.SPLIT_PARTS, (inner.train, held)):
        assert getattr(split, name).dtype == getattr(made.train, name).dtype
    assert inner.valid is made.valid and inner.test is made.test
    assert inner.source == f"made; {len(held)} of {len(every)} training samples held out"
    again, also = data.held_out(made, share)
    assert same({"a": again.train, "b": also}, {"a": inner.train, "b": held})


def test_samples_sorted_by_class_are_held_out_of_every_class():
    made = make_data([4] * 1000)
    made = dataclasses.replace(
        made, train=dataclasses.replace(made.train, targets=np.arange(1000) // 500)
    )
    _, held = data.held_out(made, 0.2)
    assert 70 < collections.Counter(held.targets.tolist())[0] < 130


@pytest.mark.parametrize("share, count", [(0.05, 5), (0.29, 29), (0.5, 50), (0.951, 95)])
def test_the_tail_of_a_stream_is_held_out(share, count):
    made = of_stream(permuted(100), 4)
    inner, held = data.held_out(made, share)
    tokens = made.train.values.tolist()
    assert inner.train.values.tolist() == tokens[: 100 - count]
    assert held.values.tolist() == tokens[100 - count :]
    for split in (inner.train, held):
        assert split.targets.tolist() == split.values.tolist()[1:]
        assert split.offsets.tolist() == [0, len(split.values)]
    assert inner.test is made.test and inner.window == 4
    assert inner.source == f"made; {count} of 100 training characters held out"

    def read(batches):
        return {t for b in batches for part in (b.x, b.targets) for t in part.ravel().tolist()}

    rng = np.random.default_rng(0)
    trained = read(b for _, b in take(data.train_batches(inner, 8, 0, stride=1), 60))
    meta = read(data.drawn(held, inner, 8, rng) for _ in range(60))
    assert trained == set(tokens[: 100 - count]) and meta == set(tokens[100 - count :])


def test_parts_of_parts():
    made = of_stream(permuted(100), 4)
    inner, held = data.held_out(data.part(made, 60), 0.25)
    assert inner.train.values.tolist() == made.train.values[:45].tolist()
    assert held.values.tolist() == made.train.values[45:60].tolist()
    some = data.part(make_data([3] * 40), 20)
    inner, held = data.held_out(some, 0.25)
    assert sorted([*inner.train.targets, *held.targets]) == sorted(some.train.targets)
    assert sorted(some.train.targets) != list(range(20))


def test_shares_that_do_not_fit_are_sentences(made):
    for share in (0, 1, -0.1, 1.5, float("nan"), float("inf")):
        with pytest.raises(Error, match=f"share to hold out is {share}; expected a number between"):
            data.held_out(made, share)
    n = len(made.train)
    for share, count in ((1e-3, 0), (0.999, n)):
        message = f"share of {share} holds out {count} of {n} training samples; expected at least 1"
        with pytest.raises(Error, match=message):
            data.held_out(made, share)
    stream = of_stream(range(100), 4)
    for count in (5, 95):
        assert len(data.held_out(stream, count / 100)[1].values) == count
    for count in (4, 96):
        message = f"holds out {count} of 100 training characters; expected at least 5 in either"
        with pytest.raises(Error, match=message):
            data.held_out(stream, count / 100)


# Batches drawn at random


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_drawn_samples(made, batch_size):
    inner, held = data.held_out(made, 0.6)
    rng = np.random.default_rng(0)
    # What a sample looks like in a batch, by its targets; noise aside.
    steps = -(-held.lengths.reshape(-1, made.documents).max(1) // made.grid) * made.grid
    quiet = dataclasses.replace(inner, noise=0)
    expected = {
        batch.targets.tobytes(): batch for batch in data.eval_batches(held, quiet, batch_size=1)
    }
    assert len(expected) == len(held)
    for _ in range(40):
        batch = data.drawn(held, inner, batch_size, rng)
        assert len(batch.targets) == batch_size
        assert batch.targets.dtype == batch.lengths.dtype == np.int64
        length = batch.x.shape[1] - made.noise
        for row in range(batch_size):
            own = expected[batch.targets[row].tobytes()]
            rows = [row + i * batch_size for i in range(made.documents)]
            assert batch.x.dtype == own.x.dtype
            np.testing.assert_array_equal(batch.x[rows, :length], own.x)
            np.testing.assert_array_equal(batch.lengths[rows], own.lengths + made.noise)
        if batch_size <= np.sum(steps == length):
            assert len({targets.tobytes() for targets in batch.targets}) == batch_size


def test_every_sample_is_drawn_as_often():
    """Also where few have the padded length of its own"""
    made = make_data([5] * 30 + [12] * 3 + [20] * 7)
    rng = np.random.default_rng(0)
    drawn = [data.drawn(made.train, made, 1, rng) for _ in range(8_000)]
    for batch in drawn[:50]:
        check_batch(batch, made, made.train)
    counts = np.bincount([batch.targets[0] for batch in drawn], minlength=40)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    batches = [data.drawn(made.train, made, 4, rng) for _ in range(2_000)]
    slots = np.bincount(np.concatenate([b.targets for b in batches]), minlength=40)
    shares = np.array([slots[:30].sum(), slots[30:33].sum(), slots[33:].sum()]) / 8_000
    np.testing.assert_allclose(shares, [0.75, 0.075, 0.175], atol=0.03)
    few = [b for b in batches if b.x.shape[1] == 16]
    assert all(len(b.targets) == 4 and set(b.targets.tolist()) <= {30, 31, 32} for b in few)


@pytest.mark.parametrize("window", [1, 4, 99, 100])
def test_drawn_windows(window):
    tokens = permuted(101)
    made = of_stream(tokens, window)
    rng, starts = np.random.default_rng(0), []
    for _ in range(300):
        batch = data.drawn(made.train, made, 10, rng)
        assert batch.x.shape == (10, window)
        found = check_windows(batch, tokens)
        starts += found
        assert window > 90 or len(set(found)) == 10, "a window twice in a batch"
    counts = np.bincount(starts, minlength=101 - window)
    assert len(counts) == 101 - window, "a window beyond the end"
    assert window == 100 or scipy.stats.chisquare(counts).pvalue > 1e-3


def test_noise_of_a_drawn_batch_is_the_generators():
    made = KINDS["images and noise"]()
    rng = np.random.default_rng(0)
    noise = [data.drawn(made.train, made, 8, rng).x[:, 10:] for _ in range(20)]
    assert noise[0].shape == (8, 6, 2)
    every = np.ravel(noise)
    assert len(np.unique(every)) > 0.99 * every.size
    assert scipy.stats.kstest(every, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, "stream"])
def test_the_generator_decides_what_is_drawn(kind):
    made = of_stream(permuted(101)) if kind == "stream" else KINDS[kind]()

    def batches(seed):
        rng = np.random.default_rng(seed)
        return [(0, data.drawn(made.train, made, 4, rng)) for _ in range(10)]

    assert all(equal(a, b) for a, b in zip(batches([3, 1]), batches([3, 1]), strict=True))
    assert not all(equal(a, b) for a, b in zip(batches([3, 1]), batches([3, 2]), strict=True))


def test_what_cannot_be_drawn_is_a_sentence(made):
    rng, stream = np.random.default_rng(0), of_stream(range(20), 4)
    for of, batch_size in itertools.product((made, stream), (0, -1)):
        with pytest.raises(Error, match=f"batch size is {batch_size}; expected at least 1"):
            data.drawn(of.train, of, batch_size, rng)
    empty = data.Split(made.train.values[:0], np.zeros(1, np.int64), made.train.targets[:0])
    with pytest.raises(Error, match="no samples"):
        data.drawn(empty, made, 4, rng)
    with pytest.raises(Error, match="has 4 tokens, too few for a window of 4 and the token after"):
        data.drawn(data._stream(stream.train.values[:4]), stream, 4, rng)
    assert data.drawn(data._stream(stream.train.values[:5]), stream, 4, rng).x.shape == (4, 4)
