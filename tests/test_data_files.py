"""data.py: the readers of text and images, on small files in the official formats and real ones."""

import collections
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import os
import random
import shutil
import sys
import tarfile
from pathlib import Path

import numba
import numpy as np
import pytest
import scipy.ndimage
from conftest import idx
from PIL import Image

import data
from ref import Error

REAL = Path(data.__file__).resolve().parent.parent / "shared" / "data"


def needs_real(name):
    return pytest.mark.skipif(not (REAL / name).exists(), reason=f"there is no {REAL / name}")


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    """The user's cache, in a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("REF_DATA_DIR", raising=False)
    return folder / "ref-sequence-models"


def samples(split):
    return [split.values[a:b].tolist() for a, b in itertools.pairwise(split.offsets)]


def everything(loaded):
    """All samples and targets of a Data."""
    return [(samples(s), s.targets.tolist()) for s in (loaded.train, loaded.valid, loaded.test)]


def text_of(loaded, sample):
    """A sample's characters; <unk> as U+FFFD."""
    assert sample[-1] == data.EOS
    special = {data.UNK: "\ufffd"}
    return "".join(special.get(token) or loaded.vocabulary[token] for token in sample[:-1])


def refused(match, read, *args, **kwargs):
    """The message of a DataError: one paragraph that ends in a full stop."""
    with pytest.raises(data.DataError, match=match) as caught:
        read(*args, **kwargs)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def is_refused(path, match, read, *args, **kwargs):
    assert refused(match, read, *args, **kwargs).startswith(str(path))


# smnist


MNIST_TRAIN, MNIST_TEST = 36, 7


@pytest.fixture
def digits():
    """{file name: array} of small files in MNIST's format."""
    rng = np.random.default_rng(0)
    return {
        f"{prefix}-{kind}": rng.integers(0, top, shape)
        for prefix, n in (("train", MNIST_TRAIN), ("t10k", MNIST_TEST))
        for kind, top, shape in (
            ("images-idx3-ubyte", 256, (n, 28, 28)),
            ("labels-idx1-ubyte", 10, (n,)),
        )
    }


@pytest.fixture
def mnist(tmp_path, digits):
    """The folder, with two of the files packed."""
    (tmp_path / "mnist").mkdir()
    for name, array in digits.items():
        packed = "labels" in name
        path = tmp_path / "mnist" / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return tmp_path


def by_target(batches):
    return {(x.tobytes(), int(t)) for batch in batches for x, t in zip(batch.x, batch.targets)}  # noqa: B905


def test_mnist(mnist, digits):
    loaded = data.load("smnist", mnist)
    assert [len(s) for s in (loaded.train, loaded.valid, loaded.test)] == [33, 3, 7]
    assert (loaded.d_input, loaded.d_output, loaded.tokens, loaded.grid) == (1, 10, False, 1)
    assert (loaded.max_length, loaded.noise, loaded.pool_from, loaded.documents) == (784, 0, 0, 1)
    assert loaded.train.values.dtype == np.uint8
    assert "mnist; 3 images of train are the validation split" in loaded.source

    def expected(prefix):
        pixels = digits[f"{prefix}-images-idx3-ubyte"].reshape(-1, 784, 1) / 255
        x = (pixels - 0.1307) / 0.3081
        return list(zip(x, digits[f"{prefix}-labels-idx1-ubyte"].tolist(), strict=True))

    def found(*splits):
        return [
            (batch.x[i], int(batch.targets[i]))
            for split in splits
            for batch in data.eval_batches(split, loaded, 5)
            for i in range(len(batch.x))
        ]

    def agree(found, expected):
        assert len(found) == len(expected)
        for x, label in found:
            (same,) = [other for other, target in expected if np.abs(x - other).max() < 1e-5]
            assert x.dtype == np.float32
            assert label == next(t for o, t in expected if o is same)

    agree(found(loaded.test), expected("t10k"))
    agree(found(loaded.train, loaded.valid), expected("train"))
    assert everything(loaded) == everything(data.load("smnist", mnist / "mnist", seed=5))


def test_noisy_mnist(mnist):
    plain, noisy = data.load("smnist", mnist), data.load("smnist-noise", mnist)
    assert everything(plain) == everything(noisy)
    assert (noisy.max_length, noisy.noise, noisy.pool_from) == (1568, 784, 784)
    a, b = (next(iter(data.eval_batches(of.test, of, 7))) for of in (plain, noisy))
    np.testing.assert_array_equal(a.x, b.x[:, :784])
    assert b.x.shape == (7, 1568, 1)
    assert b.lengths.tolist() == [1568] * 7
    assert 0 <= b.x[:, 784:].min() < 0.01 < 0.99 < b.x[:, 784:].max() < 1


def big(n):
    return n.to_bytes(4, "big")


BAD_MNIST = {  # name -> what becomes of the file, the message, of images or labels
    "empty": (lambda c: b"", "magic number 00000803 at byte 0, found nothing", "images"),
    "two bytes": (lambda c: c[:2], "magic number 00000803 at byte 0, found 0000", "images"),
    "labels for images": (lambda c: big(0x801) + c[4:], "00000803 .* found 00000801", "images"),
    "images for labels": (lambda c: big(0x803) + c[4:], "00000801 .* found 00000803", "labels"),
    "floats": (lambda c: big(0xD03) + c[4:], "00000803 .* found 00000d03", "images"),
    "little-endian": (lambda c: c[3::-1] + c[4:], "found 03080000", "images"),
    "32 x 32": (lambda c: c[:8] + big(32) + big(32) + c[16:], "28 x 28 .* found 32 x 32", "images"),
    "header cut": (lambda c: c[:10], "28 x 28 pixels in bytes 8 to 15", "images"),
    "none": (lambda c: c[:4] + big(0) + c[8:16], "expected samples, found a count of 0", "images"),
    "cut": (lambda c: c[:-1], "expected 28,240 bytes for 36 samples, found 28,239", "images"),
    "too long": (lambda c: c + b"\0", "28,240 bytes for 36 samples, found 28,241", "images"),
    "too many": (lambda c: c[:4] + big(2**31) + c[8:], "for 2,147,483,648 samples", "images"),
    "fewer labels": (lambda c: c[:4] + big(35) + c[8:-1], "36 labels as .* found 35", "labels"),
    "label 10": (lambda c: c[:11] + b"\n" + c[12:], "0 to 9 at byte 11, found 10", "labels"),
    "label 255": (lambda c: c[:-1] + b"\xff", "0 to 9 at byte 43, found 255", "labels"),
    "half a gzip": (lambda c: gzip.compress(c)[:-9], "gzip .* end early, at byte", "images"),
    "gzip header": (lambda c: gzip.compress(c)[:7], "gzip .* end early, at byte 7", "labels"),
    "gzip with an error": (
        lambda c: gzip.compress(c)[:200] + b"\xff" * 50 + gzip.compress(c)[250:],
        "gzip file, found damage",
        "images",
    ),
    "gzip with another checksum": (
        lambda c: gzip.compress(c)[:-8] + bytes(8),
        "gzip file, found damage .*CRC",
        "labels",
    ),
}


@pytest.mark.parametrize("kind", BAD_MNIST)
def test_bad_mnist_is_a_sentence_with_file_and_byte(mnist, digits, kind):
    damage, match, of = BAD_MNIST[kind]
    name = "train-images-idx3-ubyte" if of == "images" else "train-labels-idx1-ubyte"
    path = mnist / "mnist" / (name if of == "images" else f"{name}.gz")
    path.write_bytes(damage(idx(digits[name])))
    is_refused(path, match, data.load, "smnist", mnist)


def test_a_huge_file_is_not_read_into_memory(mnist, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MOST", 20_000)
    refused("found more than 20,000", data.load, "smnist", mnist)


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte"])
def test_a_missing_mnist_file(mnist, name):
    (mnist / "mnist" / name).unlink()
    stem = name.removesuffix(".gz")
    message = refused(f"Expected {stem} or {stem}.gz in {mnist} or", data.load, "smnist", mnist)
    assert "found none. Add --download to have https://" in message
    (mnist / "mnist" / name).mkdir()
    refused("Cannot read", data.load, "smnist", mnist)


@needs_real("mnist")
def test_the_real_mnist():
    loaded = data.load("smnist", REAL)
    splits = loaded.train, loaded.valid, loaded.test
    assert [len(s) for s in splits] == [55_000, 5_000, 10_000]
    of_train = sum(np.bincount(split.targets) for split in splits[:2])
    assert of_train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert loaded.baselines == {"majority class": 0.1135}
    pixels = np.concatenate([split.values for split in splits[:2]])
    counts = np.bincount(pixels[:, 0], minlength=256)
    x = loaded.scale[0] * np.arange(256) + loaded.shift[0]
    mean = counts @ x / len(pixels)
    assert abs(mean) < 1e-3
    assert abs(counts @ (x - mean) ** 2 / len(pixels) - 1) < 1e-3
    # A seven lies on its image the right way round: a bar at the top, a foot left of the middle.
    sevens = loaded.test.values.reshape(-1, 28, 28)[loaded.test.targets == 7].mean(0)
    assert sevens[7:10].sum() > 1.5 * sevens[18:21].sum()
    assert sevens[20:26, :14].sum() > sevens[20:26, 14:].sum()


# scifar10 and lra-image

RECORDS = 20


@pytest.fixture
def photos():
    """{file name: records (20, 3073)} in CIFAR-10's binary format."""
    rng = np.random.default_rng(1)
    records = {name: rng.integers(0, 256, (RECORDS, 3073), "u1") for name in data.CIFAR_FILES}
    for of_file in records.values():
        of_file[:, 0] %= 10
    return records


@pytest.fixture
def cifar(tmp_path, photos, monkeypatch):
    """The folder with the files unpacked."""
    for name in ("scifar10", "scifar10-noise", "lra-image"):
        load = functools.partial(data.load_cifar, name=name, records=RECORDS)
        monkeypatch.setitem(data.LOADERS, name, load)
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, records in photos.items():
        (folder / name).write_bytes(records.tobytes())
    return tmp_path


def pack(path, members):
    """A tar.gz file of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_cifar(cifar, photos):
    loaded = data.load("scifar10", cifar)
    assert [len(s) for s in (loaded.train, loaded.valid, loaded.test)] == [90, 10, 20]
    assert (loaded.d_input, loaded.d_output, loaded.max_length) == (3, 10, 1024)
    (batch,) = data.eval_batches(loaded.test, loaded, 100)
    records = photos["test_batch.bin"]
    planes = records[:, 1:].reshape(RECORDS, 3, 1024) / 255
    for channel, (mean, deviation) in enumerate(
        [(0.4914, 0.2023), (0.4822, 0.1994), (0.4465, 0.2010)]
    ):
        expected = (planes[:, channel] - mean) / deviation
        np.testing.assert_allclose(batch.x[:, :, channel], expected, atol=1e-6)
    assert batch.targets.tolist() == records[:, 0].tolist()
    of_train = [s.tobytes() for f in data.CIFAR_FILES[:-1] for s in photos[f][:, :1]]
    targets = np.concatenate([loaded.train.targets, loaded.valid.targets])
    assert sorted(targets.astype("u1").tobytes()) == sorted(b"".join(of_train))


def test_noisy_cifar(cifar):
    loaded = data.load("scifar10-noise", cifar)
    assert (loaded.max_length, loaded.noise, loaded.pool_from) == (2048, 1024, 1024)
    (batch,) = data.eval_batches(loaded.test, loaded, 100)
    assert batch.x.shape == (20, 2048, 3)
    noise = batch.x[:, 1024:].astype(float)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.03


def test_grey_is_pillows(cifar, photos):
    loaded = data.load("lra-image", cifar)
    assert (loaded.d_input, loaded.max_length) == (1, 1024)
    records = photos["test_batch.bin"]
    colours = records[:, 1:].reshape(RECORDS, 3, 32, 32).transpose(0, 2, 3, 1)
    grey = [np.asarray(Image.fromarray(image).convert("L")).ravel() for image in colours]
    np.testing.assert_array_equal(loaded.test.values.reshape(RECORDS, 1024), grey)
    (batch,) = data.eval_batches(loaded.test, loaded, 100)
    expected = (np.array(grey) / 255 - 122.6 / 255) / (61 / 255)
    np.testing.assert_allclose(batch.x[..., 0], expected, atol=1e-6)


def test_cifar_in_an_archive_or_straight_in_the_folder(cifar, photos):
    unpacked = everything(data.load("scifar10", cifar))
    folder = cifar / "cifar10" / "cifar-10-batches-bin"
    assert everything(data.load("scifar10", folder)) == unpacked
    shutil.rmtree(folder)
    members = {f"cifar-10-batches-bin/{name}": r.tobytes() for name, r in photos.items()}
    members["cifar-10-batches-bin/readme.html"] = b"x" * 100_000
    pack(cifar / "cifar10" / "cifar-10-binary.tar.gz", members)
    assert everything(data.load("scifar10", cifar)) == unpacked


BAD_CIFAR = {
    "empty": (lambda c: b"", "61,460 bytes, 20 records of 3,073, found 0"),
    "cut in a record": (lambda c: c[:-1], "61,460 bytes, 20 records of 3,073, found 61,459"),
    "cut after one": (lambda c: c[:-3073], "found 58,387"),
    "too long": (lambda c: c + b"\0", "61,460 bytes, 20 records of 3,073, found more than 61,460"),
    "label 10": (lambda c: c[:6146] + b"\n" + c[6147:], "0 to 9 at byte 6,146, found 10"),
    "no labels": (lambda c: b"\xff" + c[1:], "0 to 9 at byte 0, found 255"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", BAD_CIFAR)
def test_bad_cifar_is_a_sentence_with_file_and_byte(cifar, photos, kind, packed):
    damage, match = BAD_CIFAR[kind]
    folder = cifar / "cifar10" / "cifar-10-batches-bin"
    content = {name: records.tobytes() for name, records in photos.items()}
    content["data_batch_3.bin"] = damage(content["data_batch_3.bin"])
    (folder / "data_batch_3.bin").write_bytes(content["data_batch_3.bin"])
    path = folder
    if packed:
        shutil.rmtree(folder)
        path = cifar / "cifar10" / "cifar-10-binary.tar.gz"
        pack(path, {f"cifar-10-batches-bin/{name}": c for name, c in content.items()})
        if kind == "too long":  # it is not even read
            match = "at most 61,460 bytes, found 61,461"
    message = refused(match, data.load, "scifar10", cifar)
    assert message.startswith(str(path))
    assert "data_batch_3.bin" in message


def test_a_missing_cifar_file(cifar, photos):
    folder = cifar / "cifar10" / "cifar-10-batches-bin"
    (folder / "test_batch.bin").unlink()
    is_refused(folder, "expected test_batch.bin in it, found none", data.load, "scifar10", cifar)
    shutil.rmtree(folder)
    refused("cifar-10-binary.tar.gz .* found none. Add --download", data.load, "lra-image", cifar)
    path = cifar / "cifar10" / "cifar-10-binary.tar.gz"
    pack(path, {"cifar-10-batches-bin/data_batch_1.bin": photos["data_batch_1.bin"].tobytes()})
    is_refused(path, "expected data_batch_2.bin, data_.* in it", data.load, "scifar10", cifar)


BAD_ARCHIVE = {
    "empty": (lambda c: b"", "tar archive, found damage|its end early, at byte 0"),
    "no gzip": (lambda c: b"PK\3\4" + bytes(1000), "a gzip file, found damage"),
    "half": (lambda c: c[: len(c) // 2], "a whole gzip file, found its end early, at byte"),
    "without its end": (lambda c: c[:-4], "a whole gzip file, found its end early, at byte"),
    "one byte": (lambda c: c[:900] + bytes([c[900] ^ 1]) + c[901:], "a gzip file, found damage"),
    "another checksum": (lambda c: c[:-8] + bytes(8), "a gzip file, found damage .*CRC"),
    "no tar": (lambda c: gzip.compress(b"text" * 1000), "a tar archive, found damage"),
    "tar cut": (lambda c: gzip.compress(gzip.decompress(c)[:50_000]), "found damage"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVE)
def test_a_damaged_archive_is_a_sentence(cifar, photos, kind):
    damage, match = BAD_ARCHIVE[kind]
    shutil.rmtree(cifar / "cifar10" / "cifar-10-batches-bin")
    path = cifar / "cifar10" / "cifar-10-binary.tar.gz"
    pack(path, {f"cifar-10-batches-bin/{name}": r.tobytes() for name, r in photos.items()})
    path.write_bytes(damage(path.read_bytes()))
    is_refused(path, match, data.load, "scifar10", cifar)


@needs_real("cifar10")
def test_the_real_cifar_images():
    content = (REAL / "cifar10" / "data_batch_1_first4000.bin").read_bytes()
    images, labels = data.read_cifar(content, "it", 4000)
    assert images.shape == (4000, 1024, 3)
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # frog, truck, truck, deer, ...
    assert np.bincount(labels).min() > 350
    pixels = images / 255
    np.testing.assert_allclose(pixels.mean((0, 1)), data.CIFAR_MEAN, atol=0.01)
    # 0.2023 and its companions are means over images of each image's own deviation.
    np.testing.assert_allclose(pixels.std(1).mean(0), data.CIFAR_DEVIATION, atol=0.01)
    grey = data._grey(images).astype(float)
    assert abs(grey.mean() - 122.6) < 2
    assert abs(grey.std() - 61) < 2
    # Rows lie below each other: neighbours in a row and in a column are alike.
    square = grey.reshape(-1, 32, 32)
    across, down = np.abs(np.diff(square, axis=2)).mean(), np.abs(np.diff(square, axis=1)).mean()
    assert 0.8 < across / down < 1.25


# lra-text

REVIEWS = 12
LETTERS = "abcdefgh ijklmno<br />.ÄÖ語😀\n\t\x85"


def review(rng):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 300)))


@pytest.fixture
def reviews():
    """{"train/pos/0_9.txt": text, ...}, one of them longer than what is kept of it."""
    rng = random.Random(0)
    texts = {
        f"{split}/{label}/{i}_{stars}.txt": review(rng)
        for split in ("train", "test")
        for label, stars in (("pos", 9), ("neg", 2))
        for i in range(REVIEWS)
    }
    texts["train/pos/3_9.txt"] = "long " * 1000 + "z" * 30  # no z is among the first 4,095
    texts["test/neg/4_2.txt"] = "?" * 4095 + "!"
    texts["test/neg/5_2.txt"] = "b" * 4095
    return texts


@pytest.fixture
def imdb(tmp_path, reviews, monkeypatch):
    """The folder of data, with the reviews unpacked."""
    load = functools.partial(data.load_imdb, reviews=REVIEWS)
    monkeypatch.setitem(data.LOADERS, "lra-text", load)
    for name, text in reviews.items():
        path = tmp_path / "imdb" / "aclImdb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "imdb" / "aclImdb" / "train" / "unsup").mkdir()
    (tmp_path / "imdb" / "aclImdb" / "train" / "unsup" / "0_0.txt").write_text("unlabelled")
    (tmp_path / "imdb" / "aclImdb" / "train" / "pos" / "notes.md").write_text("no review")
    return tmp_path


def archive_reviews(folder, reviews, name="aclImdb_v1.tar.gz", **other):
    shutil.rmtree(folder / "imdb" / "aclImdb", ignore_errors=True)
    names = list(reviews)
    random.Random(1).shuffle(names)
    members = {f"aclImdb/{name}": reviews[name].encode() for name in names}
    members |= {f"aclImdb/{name}": content for name, content in other.items()}
    members["aclImdb/train/unsup/1_0.txt"] = b"\xff"
    pack(folder / "imdb" / name, members)
    return folder / "imdb" / name


def literal_vocabulary(texts, longest, least):
    """The published rule, with a Counter."""
    counts = collections.Counter()
    for text in texts:
        counts.update(text[: longest - 1])
    kept = sorted((-n, c) for c, n in counts.items() if n >= least)
    return ("<pad>", "<unk>", "<eos>", *(c for _, c in kept))


def test_imdb(imdb, reviews):
    loaded = data.load("lra-text", imdb)
    train = [text for name, text in reviews.items() if name.startswith("train")]
    assert loaded.vocabulary == literal_vocabulary(train, 4096, 15)
    assert "Ä" in loaded.vocabulary
    assert not {"z", "?", "!"} & set(loaded.vocabulary)
    assert (loaded.d_input, loaded.d_output) == (len(loaded.vocabulary), 2)
    assert (loaded.pad, loaded.grid, loaded.max_length, loaded.tokens) == (0, 128, 4096, True)
    assert loaded.valid is loaded.test
    assert "the validation split is the test split, as published" in loaded.source
    assert loaded.baselines == {"majority class": 0.5}
    for split in ("train", "test"):
        found = getattr(loaded, split)
        expected = [
            ("".join(c if c in loaded.vocabulary else "\ufffd" for c in text[:4095]), "pos" in name)
            for name, text in reviews.items()
            if name.startswith(split)
        ]
        pairs = zip(samples(found), found.targets.tolist(), strict=True)
        assert sorted((text_of(loaded, s), t) for s, t in pairs) == sorted(expected)
    assert loaded.test.lengths.max() == loaded.train.lengths.max() == 4096


def test_characters_are_counted_in_every_text():
    rng = random.Random(2)
    texts = {"train": [review(rng)[:9] for _ in range(2001)], "test": ["§§a"]}
    texts["train"][-1] = "§"
    tokenised, vocabulary = data._tokenised(texts, 9, 1)
    assert vocabulary == literal_vocabulary(texts["train"], 9, 1)
    values, offsets = tokenised["test"]
    assert offsets.tolist() == [0, 4]
    assert [vocabulary[token] for token in values] == ["§", "§", "a", "<eos>"]


@pytest.mark.parametrize("name", ["aclImdb_v1.tar.gz", "aclImdb_labeled.tar.gz"])
def test_imdb_in_an_archive(imdb, reviews, name, user_cache):
    unpacked = everything(data.load("lra-text", imdb))
    archive_reviews(imdb, reviews, name)
    loaded = data.load("lra-text", imdb)
    assert name in loaded.source
    assert everything(loaded) == unpacked
    assert sorted(p.name for p in imdb.iterdir()) == ["imdb", "lra-text.safetensors"]
    assert not user_cache.exists()


def test_parsed_once_and_again_when_a_file_changes(imdb, monkeypatch, capsys):
    read, calls = data.read_imdb, []
    monkeypatch.setattr(data, "read_imdb", lambda *args: calls.append(args) or read(*args))
    first, second = (data.load("lra-text", imdb, progress=False) for _ in range(2))
    assert len(calls) == 1
    assert everything(first) == everything(second)
    assert first.vocabulary == second.vocabulary
    assert capsys.readouterr().err == ""
    path = imdb / "imdb" / "aclImdb" / "test" / "pos" / "7_9.txt"
    path.write_text("changed")
    third = data.load("lra-text", imdb, progress=False)
    assert len(calls) == 2
    assert "changed" in [text_of(third, sample) for sample in samples(third.test)]


@pytest.mark.parametrize("closed", ["by its mode", "by the disk"])
def test_a_folder_for_reading_only_has_its_cache_elsewhere(imdb, user_cache, monkeypatch, closed):
    replace, calls = os.replace, []

    def refuse(source, target):
        calls.append(target)
        if Path(target).parent == imdb:
            raise OSError(30, "Read-only file system")
        replace(source, target)

    if closed == "by its mode":
        imdb.chmod(0o555)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    first = data.load("lra-text", imdb, progress=False)
    assert [path.name for path in user_cache.iterdir()] == ["lra-text.safetensors"]
    assert [path.name for path in imdb.iterdir()] == ["imdb"]
    monkeypatch.setattr(data, "read_imdb", lambda *_: pytest.fail("read again"))
    assert everything(data.load("lra-text", imdb, progress=False)) == everything(first)
    imdb.chmod(0o755)


def test_max_length(imdb):
    whole, cut = data.load("lra-text", imdb), data.load("lra-text", imdb, max_length=100)
    assert cut.vocabulary == whole.vocabulary
    assert cut.max_length == 128
    assert cut.source == f"{whole.source}; samples cut to 100 tokens"
    assert cut.valid is cut.test
    for split in ("train", "test"):
        a, b = getattr(whole, split), getattr(cut, split)
        for long, short in zip(samples(a), samples(b), strict=True):
            assert short == (long if len(long) <= 100 else [*long[:99], data.EOS])
        assert a.targets.tolist() == b.targets.tolist()
    assert everything(data.load("lra-text", imdb, max_length=9999)) == everything(whole)
    assert data.load("lra-text", imdb, max_length=9999).max_length == 4096
    assert data.load("lra-text", imdb, max_length=2).train.lengths.max() == 2


def test_bad_max_length_is_a_sentence_before_the_files_are_read(tmp_path):
    for length in (-1, 1):
        with pytest.raises(Error, match=f"max_length is {length}; expected at least 2"):
            data.load("lra-text", tmp_path, max_length=length)
    for name in ("smnist", "scifar10-noise", "lra-image", "lra-pathx", "pathfinder-gen"):
        with pytest.raises(Error, match=f"max_length cuts text, but {name} has samples of one"):
            data.load(name, tmp_path, max_length=100)


BAD_REVIEW = {
    "invalid UTF-8": (b"good \xff", "UTF-8 text, found invalid start byte at byte 5"),
    "cut UTF-8": ("Ä".encode()[:1], "UTF-8 text, found unexpected end of data at byte 0"),
    "UTF-16": ("film".encode("utf-16"), "UTF-8 text, found invalid start byte at byte 0"),
    "empty": (b"", "expected from 1 to 1,048,576 bytes, found 0"),
    "huge": (b"a" * 1_048_577, "from 1 to 1,048,576 bytes, found more than 1,048,576"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", BAD_REVIEW)
def test_a_bad_review_is_a_sentence_with_file_and_byte(imdb, reviews, kind, packed):
    content, match = BAD_REVIEW[kind]
    path = imdb / "imdb" / "aclImdb"
    (path / "test" / "neg" / "3_2.txt").write_bytes(content)
    if packed:
        path = archive_reviews(imdb, reviews, **{"test/neg/3_2.txt": content})
        if kind == "huge":  # it is not even read
            match = "at most 1,048,576 bytes, found 1,048,577"
    message = refused(match, data.load, "lra-text", imdb, progress=False)
    assert message.startswith(f"{path}, ")
    assert "test/neg/3_2.txt: " in message


def test_missing_reviews(imdb, reviews):
    folder = imdb / "imdb" / "aclImdb"
    (folder / "train" / "neg" / "3_2.txt").unlink()
    is_refused(f"{folder}, train/neg: ", "12 reviews, found 11", data.load, "lra-text", imdb)
    shutil.rmtree(folder / "test" / "pos")
    is_refused("Cannot read", "No such file", data.load, "lra-text", imdb)
    del reviews["test/pos/1_9.txt"]
    path = archive_reviews(imdb, reviews)
    is_refused(f"{path}, test/pos: ", "12 reviews, found 11", data.load, "lra-text", imdb)
    path.unlink()
    message = refused("aclImdb or .* found none", data.load, "lra-text", imdb)
    assert "Add --download to have https://ai.stanford.edu/" in message


@needs_real("imdb")
def test_the_real_imdb(user_cache):
    before = {path: path.stat().st_mtime_ns for path in REAL.rglob("*")}
    loaded = data.load("lra-text", REAL, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in REAL.rglob("*")}
    assert (user_cache / "lra-text.safetensors").exists()
    assert (len(loaded.train), len(loaded.test)) == (25_000, 25_000)
    assert loaded.train.targets.mean() == loaded.test.targets.mean() == 0.5
    assert loaded.d_input == 134
    assert loaded.vocabulary[3:8] == (" ", "e", "t", "a", "o")
    assert loaded.train.values.dtype == np.uint8
    # The first of the negative ones by name, and the first of the positive ones.
    assert text_of(loaded, samples(loaded.train)[0]).startswith("Story of a man who has unnatural")
    a, b = loaded.train.offsets[12_500:12_502]
    assert text_of(loaded, loaded.train.values[a:b].tolist()).startswith("Bromwell High is a cart")
    assert loaded.train.lengths.max() == 4096
    # <unk> stands for so little that no tenth of a per cent of the text is lost.
    assert np.mean(loaded.test.values == data.UNK) < 1e-4


# lra-retrieval


def pair(rng, label):
    def text():
        return "b'" + "".join(rng.choice("abc \\n\"'xyz") for _ in range(rng.randint(0, 60))) + "'"

    return f"{label}\tP{rng.randint(0, 99):02}-1001\tW99-0101\t{text()}\t{text()}"


@pytest.fixture
def papers():
    """{file name: lines}."""
    rng = random.Random(0)
    lines = {
        name: [pair(rng, rng.choice(("0", "1", "0.0", "1.0"))) for _ in range(20 - 5 * i)]
        for i, name in enumerate(data.AAN_FILES.values())
    }
    lines["new_aan_pairs.train.tsv"][3] = f"1\ta\tb\t{'q' * 5000}\tshort"
    lines["new_aan_pairs.eval.tsv"][0] = "0\ta\tb\t\tÜ"  # an empty text, and an unknown character
    lines["new_aan_pairs.test.tsv"][1] = '"1"\t"a"\t"b"\t"say ""x"""\t"y"'
    return lines


@pytest.fixture
def aan(tmp_path, papers):
    write_aan(tmp_path / "aan", papers)
    return tmp_path


def write_aan(folder, papers, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in papers.items():
        (folder / name).write_bytes("".join(line + end for line in lines).encode())


def test_aan(aan, papers):
    loaded = data.load("lra-retrieval", aan)
    assert (loaded.documents, loaded.d_output, loaded.grid, loaded.max_length) == (2, 2, 128, 4096)
    assert loaded.source.startswith("read from new_aan_pairs.train.tsv")
    expected = {
        split: [line.split("\t") for line in papers[name]] for split, name in data.AAN_FILES.items()
    }
    expected["test"][1] = ["1", "a", "b", 'say "x"', "y"]
    train = [text for line in expected["train"] for text in line[3:]]
    assert loaded.vocabulary == literal_vocabulary(train, 4000, 1)
    for split, lines in expected.items():
        found = getattr(loaded, split)
        assert len(found) == len(lines)
        assert len(found.offsets) == 2 * len(lines) + 1
        assert found.targets.tolist() == [int(float(line[0])) for line in lines]
        known = [[text[:3999].replace("Ü", "\ufffd") for text in line[3:]] for line in lines]
        texts = [text_of(loaded, sample) for sample in samples(found)]
        assert texts == [text for both in known for text in both]


def test_aan_batches(aan):
    loaded = data.load("lra-retrieval", aan, max_length=1000)
    lengths = set()
    for batch in data.eval_batches(loaded.train, loaded, 4):
        B = len(batch.targets)
        assert len(batch.x) == len(batch.lengths) == 2 * B
        lengths.add(batch.x.shape[1])
    assert lengths == {128, 1024}


def test_aan_in_the_unpacked_release_with_windows_line_ends(aan, papers, tmp_path):
    first = everything(data.load("lra-retrieval", aan))
    other = tmp_path / "other"
    write_aan(other / "lra_release" / "tsv_data", papers, "\r\n")
    assert everything(data.load("lra-retrieval", other)) == first
    assert everything(data.load("lra-retrieval", other / "lra_release" / "tsv_data")) == first


BAD_AAN = {
    "empty": (b"", None, "expected samples, found none"),
    "four columns": (b"1\ta\tb\tc\td\n0\ta\tb\tc\n", 2, "five columns .*, found 4"),
    "six columns": (b"1\ta\tb\tc\td\te\n", 1, "five columns .*, found 6"),
    "blank line": (b"1\ta\tb\tc\td\n\n", 2, "five columns .*, found 1"),
    "commas": (b"1,a,b,c,d\n", 1, "five columns .*, found 1"),
    "header": (b"label\tid1\tid2\ttext1\ttext2\n", 1, "a label 0 or 1, found 'label'"),
    "label 2": (b"2\ta\tb\tc\td\n", 1, "a label 0 or 1, found '2'"),
    "label 0.5": (b"0.5\ta\tb\tc\td\n", 1, r"a label 0 or 1, found '0\.5'"),
    "no label": (b"\ta\tb\tc\td\n", 1, "a label 0 or 1, found ''"),
    "invalid UTF-8": (b"1\ta\tb\tc\td\n1\ta\tb\t\xe9\td\n", 2, "UTF-8 .* at byte 6"),
    "cut in a line": (b"1\ta\tb\tc\td\n0\ta\tb", 2, "five columns .*, found 3"),
    "huge line": (b"1\ta\tb\tc\t" + b"d" * 70_000, 1, "at most 65,536 bytes, found more"),
}


@pytest.mark.parametrize("kind", BAD_AAN)
def test_bad_aan_is_a_sentence_with_file_and_line(aan, kind, monkeypatch):
    content, line, match = BAD_AAN[kind]
    monkeypatch.setattr(data, "AAN_LINE", 1 << 16)
    path = aan / "aan" / "new_aan_pairs.eval.tsv"
    path.write_bytes(content)
    where = f"{path}: " if line is None else f"{path}, line {line}: "
    is_refused(where, match, data.load, "lra-retrieval", aan, progress=False)


def test_a_missing_aan_file(aan):
    path = aan / "aan" / "new_aan_pairs.test.tsv"
    path.unlink()
    message = refused("Expected new_aan_pairs.test.tsv in", data.load, "lra-retrieval", aan)
    assert "lra_release.gz" in message
    assert "by hand" in message
    assert refused("by hand", data.load, "lra-retrieval", aan, download=True) == message
    path.symlink_to("nowhere")
    is_refused(f"Cannot read {path}", "No such file", data.load, "lra-retrieval", aan)


# lra-pathfinder and lra-pathx


def write_pathfinder(folder, side, count=30, lists=11):
    """A level in the release's layout.   -> {image's bytes: label}"""
    level = folder / f"pathfinder{side}" / "curv_contour_length_14"
    (level / "metadata").mkdir(parents=True)
    rng, expected = np.random.default_rng(side), {}
    for k in range(lists):
        (level / "imgs" / str(k)).mkdir(parents=True)
        lines = []
        for i in range(count // lists + (k < count % lists)):
            image, label = rng.integers(0, 256, (side, side), "u1"), int(rng.integers(2))
            Image.fromarray(image).save(level / "imgs" / str(k) / f"sample_{i}.png")
            lines.append(f"imgs/{k} sample_{i}.png {i} {label} 1.8 14 4 2 1.5 1 1\n")
            expected[image.tobytes()] = label
        (level / "metadata" / f"{k}.npy").write_text("".join(lines))
    return level, expected


@pytest.mark.parametrize(("name", "side"), [("lra-pathfinder", 32), ("lra-pathx", 128)])
@pytest.mark.parametrize("place", ["", "lra_release", "pathfinder"])
def test_pathfinder(tmp_path, name, side, place):
    _, expected = write_pathfinder(tmp_path / place, side)
    loaded = data.load(name, tmp_path)
    assert [len(s) for s in (loaded.train, loaded.valid, loaded.test)] == [24, 3, 3]
    assert (loaded.d_input, loaded.d_output, loaded.max_length) == (1, 2, side * side)
    found = {}
    for split in (loaded.train, loaded.valid, loaded.test):
        images = split.values.reshape(-1, side * side)
        found |= {image.tobytes(): t for image, t in zip(images, split.targets, strict=True)}
    assert found == expected
    batch = next(data.eval_batches(loaded.train, loaded, 4))
    first = loaded.train.values[: side * side]
    np.testing.assert_allclose(batch.x[0], (first / 255 - 0.5) / 0.5, atol=1e-6)


def test_pathfinder_is_read_once(tmp_path, monkeypatch):
    write_pathfinder(tmp_path, 32)
    first = data.load("lra-pathfinder", tmp_path, progress=False)
    monkeypatch.setattr(data, "_read_png", lambda *_: pytest.fail("read again"))
    second = data.load("lra-pathfinder", tmp_path, progress=False, seed=3)
    assert everything(first) == everything(second)


def test_lists_are_taken_by_their_number(tmp_path):
    level, _ = write_pathfinder(tmp_path, 32)
    names = [path.name for path in data._pathfinder_lists(level)]
    assert names == [f"{k}.npy" for k in range(11)]


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


BAD_PNG = {
    "empty": (b"", "damage"),
    "text": (b"no image" * 20, "damage"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "damage"),
    "cut": (png(np.random.default_rng(0).integers(0, 256, (32, 32), "u1"))[:600], "damage"),
    "half a header": (png(np.zeros((32, 32), "u1"))[:20], "damage"),
    "33 x 32": (png(np.zeros((32, 33), "u1")), "found one of 33 x 32"),
    "64 x 64": (png(np.zeros((64, 64), "u1")), "found one of 64 x 64"),
}


@pytest.mark.parametrize("kind", BAD_PNG)
def test_a_bad_image_is_a_sentence(tmp_path, kind):
    content, match = BAD_PNG[kind]
    path = write_pathfinder(tmp_path, 32)[0] / "imgs" / "1" / "sample_1.png"
    path.write_bytes(content)
    is_refused(
        f"{path}: expected a PNG image of 32 x 32", match, data.load, "lra-pathfinder", tmp_path
    )
    path.unlink()
    is_refused(path, "found none", data.load, "lra-pathfinder", tmp_path)


def test_an_image_in_colour_is_read_as_grey(tmp_path):
    level, _ = write_pathfinder(tmp_path, 32)
    for path in level.rglob("*.png"):
        path.write_bytes(png(np.full((32, 32, 3), 77, "u1")))
    loaded = data.load("lra-pathfinder", tmp_path)
    assert set(loaded.train.values.ravel().tolist()) == {77}


BAD_LIST = {
    "a NumPy file": (b"\x93NUMPY\1\0", 1, "UTF-8 text, found invalid start byte at byte 0"),
    "three words": (b"imgs/0 sample_0.png 0\n", 1, "name, number and label, found 3 words"),
    "blank line": (b"imgs/0 sample_0.png 0 1\n\n", 2, "found 0 words"),
    "label 2": (b"imgs/0 sample_0.png 0 2 1.8\n", 1, "a label 0 or 1, found '2'"),
    "outside": (
        b"../../imgs sample_0.png 0 1\n",
        1,
        r"an image inside of .* found '\.\./\.\./imgs",
    ),
    "absolute": (b"imgs /etc/passwd 0 1\n", 1, "an image inside of .* found '/etc/passwd'"),
    "cut in a line": (b"imgs/0 sample_0.png 0 1 1.8\nimgs/0 samp", 2, "found 2 words"),
}


@pytest.mark.parametrize("kind", BAD_LIST)
def test_a_bad_list_is_a_sentence_with_file_and_line(tmp_path, kind):
    content, line, match = BAD_LIST[kind]
    path = write_pathfinder(tmp_path, 32)[0] / "metadata" / "2.npy"
    path.write_bytes(content)
    is_refused(f"{path}, line {line}: ", match, data.load, "lra-pathfinder", tmp_path)


def test_bad_folders_of_pathfinder(tmp_path, monkeypatch):
    message = refused("Expected pathfinder128/curv_contour", data.load, "lra-pathx", tmp_path)
    assert "lra_release.gz" in message
    level, _ = write_pathfinder(tmp_path, 32, count=9, lists=1)
    is_refused(level, "at least ten images, found 9", data.load, "lra-pathfinder", tmp_path)
    (level / "metadata" / "notes.npy").write_text("")
    is_refused(level, "found notes.npy", data.load, "lra-pathfinder", tmp_path)
    for path in (level / "metadata").iterdir():
        path.unlink()
    is_refused(level, "0.npy, 1.npy, ..., found none", data.load, "lra-pathfinder", tmp_path)
    (level / "metadata").rmdir()
    is_refused("Cannot read", "No such file", data.load, "lra-pathfinder", tmp_path)


def test_without_pillow_images_are_a_sentence(tmp_path, monkeypatch):
    write_pathfinder(tmp_path, 32)
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(r"needs Pillow.*extra `images`", data.load, "lra-pathfinder", tmp_path)


# pathfinder-gen and pathx-gen

needs_compiler = pytest.mark.skipif(
    numba.config.DISABLE_JIT, reason="thousands of images take too long without the compiler"
)


@pytest.fixture(scope="module")
def drawn():
    """Images (3000, 128, 128), labels (3000,), and the middles (3000, 2, 2) of their discs."""
    from ref.kernels import pathfinder

    images, labels = pathfinder.draw(1, 0, 3000, 128)
    images = images.reshape(-1, 128, 128)
    full = scipy.ndimage.uniform_filter(images, (0, 7, 7)) > 150  # only a disc is so large
    within = np.zeros((3, 3, 3), bool)
    within[1] = True
    discs, count = scipy.ndimage.label(full, within)
    found = np.array(scipy.ndimage.center_of_mass(full, discs, np.arange(1, count + 1)))
    assert found[:, 0].tolist() == np.repeat(np.arange(3000), 2).tolist()  # two on every image
    return images, labels, found[:, 1:].reshape(-1, 2, 2)


@needs_compiler
def test_the_label_says_whether_the_discs_are_on_one_path(drawn):
    """Where gaps within a path are closed and those between paths are not."""
    for image, label, middles in list(zip(*drawn, strict=True))[:400]:
        near = scipy.ndimage.distance_transform_edt(image < 128) < 2.3
        paths, count = scipy.ndimage.label(near)
        a, b = (paths[tuple(middle.round().astype(int))] for middle in middles)
        assert count == 8  # two long ones and six short ones
        assert a > 0
        assert (a == b) == label


def share_told(statistics, labels):
    """Accuracy on the second half of a quadratic rule learnt from the first half."""
    z = (statistics - statistics.mean(0)) / (statistics.std(0) + 1e-9)
    z = np.column_stack(
        [
            np.ones(len(z)),
            z,
            *(
                z[:, i] * z[:, j]
                for i, j in itertools.combinations_with_replacement(range(z.shape[1]), 2)
            ),
        ]
    )
    half = len(z) // 2
    gram = z[:half].T @ z[:half] + 10 * np.eye(z.shape[1])
    rule = np.linalg.solve(gram, z[:half].T @ (2 * labels[:half] - 1))
    return np.mean((z[half:] @ rule > 0) == labels[half:])


@needs_compiler
def test_trivial_statistics_do_not_tell_the_label(drawn):
    images, labels, middles = drawn
    assert abs(labels.mean() - 0.5) < 0.03
    light = images.reshape(len(images), -1)
    apart = np.hypot(*(middles[:, 0] - middles[:, 1]).T)
    between = middles.mean(1)
    off = np.hypot(*(between - 64).T)
    from_middle = np.sort(np.hypot(*(middles - 64).transpose(2, 0, 1)), axis=1)
    statistics = {
        "light": light.sum(1, dtype=float),
        "lit pixels": (light > 0).sum(1),
        "distance of the discs": apart,
        "their place": between,
        "its distance from the middle": off,
        "distances from the middle": from_middle,
    }
    told = {name: share_told(np.column_stack([s]), labels) for name, s in statistics.items()}
    told["all of them"] = share_told(np.column_stack(list(statistics.values())), labels)
    print({name: f"{share:.3f}" for name, share in told.items()})
    assert {name: share for name, share in told.items() if share >= 0.55} == {}
    # The rule does find what there is to find.
    telling = apart + 3 * labels * np.random.default_rng(0).random(len(labels)) * apart.std()
    assert share_told(telling[:, None], labels) > 0.6


@needs_compiler
def test_image_i_depends_on_nothing_but_seed_i_and_side():
    from ref.kernels import pathfinder

    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = pathfinder.draw(5, 0, 31, 32)
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        two = pathfinder.draw(5, 0, 31, 32)
    finally:
        numba.set_num_threads(threads)
    part, large, other = (
        pathfinder.draw(5, 10, 21, 32),
        pathfinder.draw(5, 0, 31, 128),
        pathfinder.draw(6, 0, 31, 32),
    )
    for a, b, c in zip(one, two, part, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[10:], c)
    np.testing.assert_array_equal(one[1], large[1])
    small = large[0].reshape(31, 32, 4, 32, 4).mean((2, 4)).reshape(31, -1)
    for i in range(31):
        assert np.argmax([np.corrcoef(small[i], image)[0, 1] for image in one[0]]) == i
    assert not np.array_equal(one[0], other[0])


@needs_compiler
def test_generated_pathfinder(tmp_path, monkeypatch):
    for name, side in (("pathfinder-gen", 32), ("pathx-gen", 128)):
        load = functools.partial(data.load_pathfinder_gen, name=name, side=side, sizes=(20, 4, 3))
        monkeypatch.setitem(data.LOADERS, name, load)
        loaded = data.load(name, tmp_path, progress=False)
        assert loaded.name == name
        assert [len(s) for s in (loaded.train, loaded.valid, loaded.test)] == [20, 4, 3]
        assert (loaded.d_input, loaded.d_output, loaded.max_length) == (1, 2, side * side)
        assert "our generator from seed 0" in loaded.source
        batch = next(data.train_batches(loaded, 4, 0))[1]
        assert (batch.x.min(), batch.x.max()) == (-1, 1)
        other = data.load(name, tmp_path, seed=1, progress=False)
        assert everything(loaded) != everything(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}-1-{seed}-20-4-3.safetensors"
        for name in ("pathfinder-gen", "pathx-gen")
        for seed in (0, 1)
    ]
    monkeypatch.setattr(data, "generate_pathfinder", lambda *_: pytest.fail("generated again"))
    again = data.load("pathx-gen", tmp_path, seed=1, progress=False)
    assert everything(again) == everything(other)


@needs_compiler
def test_the_generators_version_goes_with_its_images():
    splits = data.generate_pathfinder(0, 32, (30, 5, 5))
    content = b"".join(s.values.tobytes() + s.targets.tobytes() for s in splits.values())
    pinned = {"1": "b5b84332cc4ecbe951b88803f68856db2e91155644e1f32d7047b413c107602f"}
    assert hashlib.sha256(content).hexdigest() == pinned[data.PATHFINDER_VERSION], (
        "the same seed gives other images: raise PATHFINDER_VERSION and pin the new digest"
    )


# Every set


def test_every_set_is_missing_with_a_sentence(tmp_path):
    generated = {"lra-listops", "pathfinder-gen", "pathx-gen"}
    for name in set(data.NAMES) - generated - {n for n in data.NAMES if n.startswith("mqar")}:
        message = refused("Expected .* found none", data.load, name, tmp_path / "none")
        assert str(tmp_path / "none") in message
        assert "--data-dir" in message
    assert list(tmp_path.iterdir()) == []


def test_dataclasses_have_defaults_for_what_most_sets_do_not_need():
    names = [f.name for f in dataclasses.fields(data.Data) if f.default is not dataclasses.MISSING]
    usual = ["documents", "scale", "shift", "noise", "pool_from", "per_position", "window", "unit"]
    assert names == usual
