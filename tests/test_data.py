"""data.py: generated and read data, the cache, batches."""

import dataclasses
import errno
import functools
import hashlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import threading
import tracemalloc

import numba
import numpy as np
import pytest
import scipy.stats

import data
from ref import Error, backend
from ref.kernels import listops

SMALL = {"sizes": (30, 6, 5), "limits": (10, 60)}
OPERATORS = {"[MIN": min, "[MAX": max, "[MED": statistics.median, "[SM": sum}
ID = {text: i for i, text in enumerate(data.LISTOPS_VOCABULARY)}

needs_compiler = pytest.mark.skipif(
    numba.config.DISABLE_JIT, reason="16,000 trees take too long without the compiler"
)


# The literal generator


def literal_tree(rng, depth=1):
    """A digit, or [operator, argument, ...]."""
    if depth < 10 and rng.random() < 0.25:
        operator = rng.choice(list(OPERATORS))
        return [operator, *(literal_tree(rng, depth + 1) for _ in range(rng.randint(2, 10)))]
    return rng.randint(0, 9)


def literal_length(tree):
    return 1 if isinstance(tree, int) else 2 + sum(map(literal_length, tree[1:]))


def literal_value(tree):
    if isinstance(tree, int):
        return tree
    return int(OPERATORS[tree[0]](map(literal_value, tree[1:]))) % 10


def literal_trees(seed, count, low=500, high=2000):
    rng, kept = random.Random(seed), []
    while len(kept) < count:
        tree = literal_tree(rng)
        if low < literal_length(tree) < high:
            kept.append(tree)
    return kept


def words(tree):
    """The tree's tokens as text."""
    if isinstance(tree, int):
        return [str(tree)]
    return [tree[0], *(word for argument in tree[1:] for word in words(argument)), "]"]


def token_ids(tree):
    return [ID[word] for word in words(tree)]


def source(tree):
    """The release's text of a tree: a binary nesting, in parentheses."""
    if isinstance(tree, int):
        return str(tree)
    return functools.reduce(lambda a, b: f"( {a} {b} )", [tree[0], *map(source, tree[1:]), "]"])


# The distribution of generated trees


def describe(tokens):
    """One number of each kind: trees are independent of each other, the nodes of one are not."""
    opened, arities, operators, depths, ninth = [], [], [], [], 0
    for token in tokens:
        if token == data.CLOSE:
            arities.append(opened.pop())
            continue
        if opened:
            opened[-1] += 1
        if token >= data.MIN:
            operators.append(token)
            opened.append(0)
            ninth += len(opened) == 9
        depths.append(len(opened) + (token < data.MIN))
    count = len(operators)
    digits = [token for token in tokens if token < data.MIN]
    return {
        "length": len(tokens),
        "depth": max(depths),
        "mean depth": sum(depths) / len(depths),
        "root operator": tokens[0],
        "root arguments": arities[-1],
        "first digit": digits[0],
        "operators": count,
        "share of operators at depth 9": ninth / count,
        "share of MIN": operators.count(data.MIN) / count,
        "share of MAX": operators.count(data.MAX) / count,
        "share of MED": operators.count(data.MED) / count,
        "share of SM": operators.count(data.SM) / count,
        "mean arguments": sum(arities) / count,
        "share of operators with two arguments": arities.count(2) / count,
        "share of operators with ten arguments": arities.count(10) / count,
        "mean digit": sum(digits) / len(digits) - data.DIGIT,
        "share of digit 0": digits.count(data.DIGIT) / len(digits),
        "share of digit 9": digits.count(data.DIGIT + 9) / len(digits),
    }


def table(rows):
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def chi_squared(a, b, bins=16):
    """p-value of "the independent samples a (n,) and b (m,) have one distribution"."""
    both = np.concatenate([a, b])
    if len(np.unique(both)) > bins:  # bins of about the same number of samples
        edges = np.unique(np.quantile(both, np.arange(1, bins) / bins))
        a, b = np.searchsorted(edges, a), np.searchsorted(edges, b)
    kinds = np.unique(np.concatenate([a, b]))
    counts = np.array([[np.sum(x == kind) for kind in kinds] for x in (a, b)])
    rare = counts.sum(0) < 50
    counts = np.column_stack([counts[:, ~rare], counts[:, rare].sum(1)])
    return scipy.stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue


@pytest.fixture(scope="module")
def generated():
    """[(token ids, target)] of 16,000 trees."""
    drawn = zip(*listops.draw(2024, 0, 16_000, *data.LISTOPS_LIMITS), strict=True)
    return [(tokens[:length].tolist(), target) for tokens, length, target in drawn]


@pytest.fixture(scope="module")
def p_values(generated):
    """Name -> p-value against 4,000 trees of the literal generator."""
    trees = literal_trees(2024, 4_000)
    ours = table([describe(tokens) | {"label": target} for tokens, target in generated])
    literal = table([describe(token_ids(t)) | {"label": literal_value(t)} for t in trees])
    return {key: chi_squared(ours[key], literal[key]) for key in ours}


@needs_compiler
def test_trees_have_the_literal_generators_distribution(p_values):
    print({key: f"{p:.3g}" for key, p in p_values.items()})
    assert {key: p for key, p in p_values.items() if not p > 1e-3} == {}


@needs_compiler
def test_every_label_is_the_value_of_its_tree(generated):
    assert all(data.listops_value(tokens) == target for tokens, target in generated)


@needs_compiler
def test_samples_are_different_and_their_lengths_reach_the_limits(generated):
    assert len({bytes(tokens) for tokens, _ in generated}) == len(generated)
    lengths = {len(tokens) for tokens, _ in generated}
    assert min(lengths) == 501
    assert max(lengths) == 1999


@pytest.mark.parametrize("seed", range(3))
def test_value_of_literal_trees(seed):
    for tree in literal_trees(seed, 300, 0, 300):
        assert data.listops_value(token_ids(tree)) == literal_value(tree)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 8 ]", 2),
        ("[MAX 4 2 8 ]", 8),
        ("[MED 1 2 4 7 ]", 3),
        ("[MED 1 2 3 7 ]", 2),
        ("[MED 9 0 3 ]", 3),
        ("[SM 9 8 7 ]", 4),
        ("[SM 1 [MAX 2 9 ] [MED 3 4 ] 0 ]", 3),
    ],
)
def test_value_of_small_expressions(text, value):
    assert data.listops_value([ID[word] for word in text.split()]) == value


def test_a_sample_does_not_depend_on_the_number_of_threads_or_of_samples():
    limits = (10, 60)
    one, two = [], []
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = listops.draw(5, 0, 301, *limits)
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        two = listops.draw(5, 0, 301, *limits)
    finally:
        numba.set_num_threads(threads)
    part = listops.draw(5, 100, 201, *limits)
    for a, b, c in zip(one, two, part, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[100:], c)


def test_a_parallel_launch_waits_for_the_lock():
    thread = threading.Thread(target=listops.draw, args=(0, 0, 1, 10, 60))
    with backend.parallel_lock:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


# Generated splits


def samples(split):
    return [split.values[a:b].tolist() for a, b in itertools.pairwise(split.offsets)]


def same(a, b):
    """Two {name: Split} hold the same."""
    return a.keys() == b.keys() and all(
        np.array_equal(getattr(a[s], part), getattr(b[s], part))
        and getattr(a[s], part).dtype == getattr(b[s], part).dtype
        for s in a
        for part in data.SPLIT_PARTS
    )


def splits_of(loaded):
    return {"train": loaded.train, "valid": loaded.valid, "test": loaded.test}


def test_generated_splits():
    splits = data.generate_listops(3, **SMALL)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 30,
        "valid": 6,
        "test": 5,
    }
    for split in splits.values():
        assert split.values.dtype == np.uint8
        assert split.offsets.dtype == split.targets.dtype == np.int64
        assert split.offsets[-1] == len(split.values)
        for sample, target in zip(samples(split), split.targets, strict=True):
            assert sample[-1] == data.EOS
            assert 10 < len(sample) - 1 < 60
            assert data.listops_value(sample[:-1]) == target
    assert same(splits, data.generate_listops(3, **SMALL))
    assert not same(splits, data.generate_listops(4, **SMALL))
    assert not same(splits, data.generate_listops(2**64 - 1, **SMALL))


def test_a_duplicate_gives_its_place_to_the_next_sample():
    limits, sizes = (1, 6), (400, 60, 40)  # lengths 4 and 5: 4,400 trees, so that some come twice
    drawn = listops.draw(0, 0, 2000, *limits)
    distinct = {}
    for tokens, length, target in zip(*drawn, strict=True):
        distinct.setdefault((*tokens[:length].tolist(), data.EOS), target)
    splits = data.generate_listops(0, sizes, limits)
    found = [tuple(sample) for split in splits.values() for sample in samples(split)]
    assert len(set(found)) == 500
    assert found == list(distinct)[:500]
    targets = np.concatenate([split.targets for split in splits.values()])
    assert targets.tolist() == list(distinct.values())[:500]
    assert len({tuple(t) for t in drawn[0][:500].tolist()}) < 500, "this seed has no duplicate"


def test_more_trees_than_there_are_is_an_error():
    with pytest.raises(Error, match="Expected 11 different trees, found 10"):
        data.generate_listops(0, (9, 1, 1), (0, 4))


def test_the_generators_version_goes_with_its_samples():
    splits = data.generate_listops(0, **SMALL)
    content = b"".join(split.values.tobytes() for split in splits.values())
    pinned = {"1": "6da487e1dda283c0053971baaf28cdc2181742484f4367d62d92959f50d4f2bd"}
    assert hashlib.sha256(content).hexdigest() == pinned[data.LISTOPS_VERSION], (
        "the same seed gives other samples: raise LISTOPS_VERSION and pin the new digest"
    )


# The cache


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(folder=tmp_path) -> (Data, True when it was generated rather than read)."""
    calls = []
    generate = data.generate_listops
    monkeypatch.setattr(
        data, "generate_listops", lambda *args: calls.append(args) or generate(*args)
    )
    monkeypatch.setitem(data.LOADERS, "lra-listops", functools.partial(data.load_listops, **SMALL))

    def load(folder=tmp_path, seed=0):
        calls.clear()
        loaded = data.load("lra-listops", folder, seed, progress=False)
        return loaded, bool(calls)

    return load


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_the_second_load_reads_the_cache(load, tmp_path, capsys):
    first, was_generated = load()
    assert was_generated
    assert "lra-listops-1-0-30-6-5-10-60" in only_file(tmp_path).name
    second, was_generated = load(str(tmp_path))
    assert not was_generated
    assert same(splits_of(first), splits_of(second))
    other, was_generated = load(seed=1)
    assert was_generated
    assert not same(splits_of(first), splits_of(other))
    assert capsys.readouterr().err == ""


def test_what_a_network_has_to_know(load):
    loaded, _ = load()
    assert (loaded.name, loaded.tokens, loaded.d_input, loaded.d_output) == (
        "lra-listops",
        True,
        18,
        10,
    )
    assert (loaded.pad, loaded.grid, loaded.max_length) == (0, 128, 2048)
    assert loaded.vocabulary.index("[SM") == 16
    assert len(loaded.vocabulary) == 18
    assert list(loaded.baselines) == ["majority class", "root operator alone"]
    assert "generated" in loaded.source
    assert "seed 0" in loaded.source


def test_baselines():
    def split(*pairs):
        """Samples of one token, with their targets."""
        tokens, targets = np.array(pairs).T
        return data.Split(tokens.astype(np.uint8), np.arange(len(pairs) + 1), targets)

    train = split((13, 0), (13, 0), (13, 4), (14, 9), (14, 9), (14, 9), (15, 9), (15, 5), (15, 5))
    test = split((13, 0), (13, 9), (14, 9), (15, 5), (15, 5), (16, 9), (16, 5), (13, 5))
    assert data._majority_class(train, test) == 3 / 8
    # 0 for 13, 9 for 14, 5 for 15, and the majority's 9 for 16, which train does not have.
    assert data._first_token_alone(train, test, 18, 10) == 5 / 8


def damaged(content):
    """Name -> what can have become of a cache file."""
    n = len(content)
    middle = bytearray(content)
    middle[n * 3 // 4] ^= 1
    return {
        "empty": b"",
        "a few bytes": content[:5],
        "half the header": content[:400],
        "half": content[: n // 2],
        "one byte short": content[:-1],
        "one byte long": content + b"\0",
        "one bit": bytes(middle),
        "text": b"Source\tTarget\r\n" * 1000,
        "zeros": bytes(n),
        "another version": content.replace(b'"version":"1"', b'"version":"0"'),
        "another number type": content.replace(b'"dtype":"U8"', b'"dtype":"I8"', 1),
        "another seed": content.replace(b'"seed":"0"', b'"seed":"1"'),
    }


@pytest.mark.parametrize("kind", damaged(b"0"))
def test_a_cache_that_is_not_whole_is_made_again(load, tmp_path, capsys, kind):
    first, _ = load()
    path = only_file(tmp_path)
    content = path.read_bytes()
    bad = damaged(content)[kind]
    assert bad != content
    path.write_bytes(bad)
    second, was_generated = load()
    assert was_generated
    assert same(splits_of(first), splits_of(second))
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(path) in message
    assert "making it again" in message
    assert load()[1] is False


def test_any_flipped_bit_in_a_cache_is_noticed_or_harmless(tmp_path):
    splits, arguments = data.generate_listops(0, **SMALL), {"name": "made", "version": "1"}
    path = tmp_path / "cache.safetensors"
    data._write_cache(path, splits, arguments, ("ä",))
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    taken = 0
    for i in [*range(header), *rng.integers(header, len(content), 500)]:
        bad = bytearray(content)
        bad[i] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        found = data._read_cache(path, arguments)
        assert found is None or (same(found[0], splits) and found[1] == ("ä",)), f"byte {i}"
        taken += found is not None
    assert taken < 10  # blanks that fill the header up


def test_a_cache_of_another_program_is_replaced(load, tmp_path):
    from safetensors.numpy import save_file

    load()
    path = only_file(tmp_path)
    save_file({"weight": np.zeros(3, np.float16)}, path)
    assert load()[1] is True
    assert load()[1] is False


def test_a_half_written_cache_is_never_taken(load, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(data.Path, "unlink", lambda *_, **__: None)  # not even tidying up happens
        with pytest.raises(KeyboardInterrupt):
            load()
    half = only_file(tmp_path)
    assert half.name.endswith(".tmp")
    half.write_bytes(half.read_bytes()[:100])
    assert load()[1] is True
    assert load()[1] is False


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(load, tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(data.DataError, match=r"Cannot write .*No space left.*--data-dir"):
        load()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_leaves_nothing(load, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_a_sentence_before_the_work(load, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "generate_listops", lambda *_: pytest.fail("generated for nothing"))
    with pytest.raises(data.DataError, match=r"Cannot write .*file/deeper"):
        load(tmp_path / "file" / "deeper")
    with pytest.raises(data.DataError, match=r"Cannot write .*file"):
        load(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write there")
def test_a_folder_for_reading_only_is_a_sentence(load, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(data.DataError, match="Cannot write"):
        load()


def test_the_default_folder(load, tmp_path, monkeypatch):
    monkeypatch.setenv("REF_DATA_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(None)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]
    monkeypatch.delenv("REF_DATA_DIR")
    load(None)
    assert only_file(tmp_path / "xdg").name == "ref-sequence-models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(None)
    assert only_file(tmp_path / "home" / ".cache").name == "ref-sequence-models"


def test_bad_arguments_are_sentences(tmp_path):
    with pytest.raises(Error, match=r"'listops'; expected one of: .*lra-listops"):
        data.load("listops", tmp_path)
    for seed in (-1, 2**64):
        with pytest.raises(Error, match="seed"):
            data.load("lra-listops", tmp_path, seed)
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_to_stderr_and_only_when_asked(capsys):
    data.generate_listops(0, **SMALL, progress=True)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    data.generate_listops(0, **SMALL, progress=False)
    assert capsys.readouterr() == ("", "")


def test_import_is_light():
    code = "import data, sys; sys.exit('numba' in sys.modules or 'scipy' in sys.modules)"
    folder = os.path.dirname(data.__file__)
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode == 0


# The release's files

HEADER = "Source\tTarget\n"


def write_release(folder, trees, end="\r\n"):
    """Write trees {file name: [tree]} in the release's format; its lines end with CR LF."""
    for name, of_file in trees.items():
        lines = ["Source\tTarget", *(f"{source(t)}\t{literal_value(t)}" for t in of_file)]
        (folder / name).write_bytes("".join(line + end for line in lines).encode())


@pytest.fixture
def release(tmp_path):
    """The three files in tmp_path.   -> {file name: [tree]}"""
    trees = {
        name: literal_trees(seed, 20 - 5 * seed, 10, 200)
        for seed, name in enumerate(data.LISTOPS_FILES.values())
    }
    write_release(tmp_path, trees)
    return trees


def check_release(loaded, trees):
    for split, name in data.LISTOPS_FILES.items():
        expected = [[*token_ids(tree), data.EOS] for tree in trees[name]]
        assert samples(getattr(loaded, split)) == expected
        assert getattr(loaded, split).targets.tolist() == [literal_value(t) for t in trees[name]]


@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize("place", [".", "listops", "lra_release/listops-1000"])
def test_the_release_is_read(load, tmp_path, release, end, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    write_release(tmp_path / place, release, end)
    text = (tmp_path / place / "basic_test.tsv").read_text()
    assert text.startswith("Source\tTarget\n( ( ( ")
    loaded, was_generated = load()
    assert not was_generated
    check_release(loaded, release)
    assert loaded.source.startswith("read from basic_train.tsv")
    assert str(tmp_path) in loaded.source


def test_a_last_line_without_end_is_whole(load, tmp_path, release):
    path = tmp_path / "basic_val.tsv"
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    check_release(load()[0], release)


def test_the_release_is_parsed_once_and_again_when_it_changes(
    load, tmp_path, release, monkeypatch, capsys
):
    read, calls = data.read_listops_tsv, []
    monkeypatch.setattr(
        data, "read_listops_tsv", lambda *args: calls.append(args[0].name) or read(*args)
    )
    first, _ = load()
    second, _ = load()
    assert calls == list(data.LISTOPS_FILES.values())
    assert same(splits_of(first), splits_of(second))
    assert capsys.readouterr().err == ""
    release["basic_test.tsv"] = literal_trees(9, 7, 10, 200)
    write_release(tmp_path, release)
    check_release(load()[0], release)
    assert len(calls) == 6


def test_a_release_in_a_folder_for_reading_only_is_read(
    load, tmp_path, release, monkeypatch, capsys
):
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refused)
    check_release(load()[0], release)
    assert "Going on without" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(data.LISTOPS_FILES.values())


@pytest.mark.parametrize("missing", data.LISTOPS_FILES.values())
def test_a_missing_file_is_named(load, tmp_path, release, missing):
    (tmp_path / missing).unlink()
    with pytest.raises(data.DataError, match=f"found no {missing}"):
        load()


def test_a_folder_in_place_of_a_file(load, tmp_path, release):
    (tmp_path / "basic_val.tsv").unlink()
    (tmp_path / "basic_val.tsv").mkdir()
    with pytest.raises(data.DataError, match=r"found no basic_val.tsv"):
        load()
    with pytest.raises(data.DataError, match=r"Cannot read .*basic_val.tsv"):
        data.read_listops_tsv(tmp_path / "basic_val.tsv")


BAD = {
    "empty": (b"", None, "found none"),
    "header only": (HEADER.encode(), None, "found none"),
    "no header": (b"( ( [MAX 3 ) ] )\t3\n", 1, r"header Source<TAB>Target, found '\( \("),
    "header with commas": (b"Source,Target\n3\t3\n", 1, "header"),
    "byte order mark": (b"\xef\xbb\xbf" + HEADER.encode(), 1, "header"),
    "UTF-16": ((HEADER + "3\t3\n").encode("utf-16"), 1, "NUL|UTF-8"),
    "one column": (b"Source\tTarget\n3\t3\n( 3 )\n", 3, "two columns.*found 1"),
    "three columns": (b"Source\tTarget\n3\t3\n3\t3\t3\n", 3, "two columns.*found 3"),
    "blank line": (b"Source\tTarget\n3\t3\n\n3\t3\n", 3, "two columns"),
    "label 10": (b"Source\tTarget\n3\t10\n", 2, "label from 0 to 9, found '10'"),
    "label -1": (b"Source\tTarget\n3\t-1\n", 2, "label from 0 to 9, found '-1'"),
    "label 3.0": (b"Source\tTarget\n3\t3.0\n", 2, r"label from 0 to 9, found '3\.0'"),
    "no label": (b"Source\tTarget\n3\t\n", 2, "label from 0 to 9, found ''"),
    "label in other digits": ("Source\tTarget\n3\t３\n".encode(), 2, "label from 0 to 9"),
    "unknown operator": (b"Source\tTarget\n3\t3\n( [SUM 3 ] )\t3\n", 3, r"found '\[SUM'"),
    "two digits": (b"Source\tTarget\n[MAX 12 3 ]\t3\n", 2, "found '12'"),
    "no blank": (b"Source\tTarget\n[MAX 1(2) 3]\t3\n", 2, r"found '3\]'"),
    "not ASCII": ("Source\tTarget\n[MAX 1 é ]\t1\n".encode(), 2, "found 'é'"),
    "empty expression": (b"Source\tTarget\n( )\t3\n", 2, "found nothing"),
    "open bracket": (b"Source\tTarget\n( [MAX 3 )\t3\n", 2, "balanced brackets, found 1"),
    "closed twice": (b"Source\tTarget\n[MAX 3 ] ]\t3\n", 2, "closes nothing"),
    "no arguments": (b"Source\tTarget\n[MAX ]\t3\n", 2, "arguments"),
    "two expressions": (b"Source\tTarget\n3 3\t3\n", 2, "one expression, found 2"),
    "wrong label": (b"Source\tTarget\n3\t3\n[MAX 3 4 ]\t3\n", 3, "value is 4.*label is 3"),
    "cut in a line": (b"Source\tTarget\n3\t3\n( ( [MAX 3 ) 4", 3, "two columns"),
    "NUL": (b"Source\tTarget\n[MAX 3 \0 ]\t3\n", 2, "NUL"),
    "zeros at the end": (b"Source\tTarget\n3\t3\n" + bytes(512), 3, "NUL"),
    "invalid UTF-8": (b"Source\tTarget\n[MAX 3 \xff ]\t3\n", 2, "UTF-8"),
    "10 MB in a line": (b"Source\tTarget\n" + b"( " * 5_000_000, 2, "at most 1,048,576 bytes"),
    "10 MB header": (b"S" * 10_000_000, 1, "at most 1,048,576 bytes"),
    "deep": (b"Source\tTarget\n" + b"[MAX " * 200_000 + b"\t3\n", 2, "found 200000 without"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_a_sentence_with_file_and_line(load, tmp_path, release, kind):
    content, line, reason = BAD[kind]
    path = tmp_path / "basic_val.tsv"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=reason) as caught:
        load()
    message = str(caught.value)
    assert message.startswith(str(path) + (": " if line is None else f", line {line}: "))
    assert message.endswith(".")
    assert len(message) < len(str(path)) + 200
    assert "\n" not in message
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path):
    path = tmp_path / "basic_train.tsv"
    with open(path, "wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match="line 1: expected at most"):
            data.read_listops_tsv(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("digits", "label", "kept"), [(2045, 3, 2048), (2046, 9, 2048)])
def test_long_samples_are_cut(tmp_path, digits, label, kept):
    """2,047 tokens fit with <eos>; 2,048 are cut, and what is cut may have any label."""
    path = tmp_path / "basic_train.tsv"
    path.write_text(f"{HEADER}[MAX {'3 ' * digits}]\t{label}\n")
    split = data.read_listops_tsv(path)
    assert split.lengths.tolist() == [kept]
    assert split.values[-1] == data.EOS
    assert split.values[-2] == (data.CLOSE if digits == 2045 else data.DIGIT + 3)
    assert split.targets.tolist() == [label]


def test_a_whole_sample_of_the_longest_length_is_judged(tmp_path):
    path = tmp_path / "basic_train.tsv"
    path.write_text(f"{HEADER}[MAX {'3 ' * 2045}]\t9\n")
    with pytest.raises(data.DataError, match="value is 3"):
        data.read_listops_tsv(path)


# Batches


def make_data(lengths, grid=8, channels=None, valid=(1,)):
    """Data whose sample i has target i and random content."""
    rng = np.random.default_rng(0)

    def split(lengths):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        shape = (offsets[-1],) if channels is None else (offsets[-1], channels)
        values = rng.integers(1, 18, shape)
        values = values.astype(np.uint8 if channels is None else np.float32)
        return data.Split(values, offsets, np.arange(len(lengths)))

    return data.Data(
        name="made",
        train=split(lengths),
        valid=split(valid),
        test=split([1]),
        d_input=18 if channels is None else channels,
        tokens=channels is None,
        d_output=len(lengths),
        pad=0,
        grid=grid,
        max_length=grid * -(-max(lengths, default=0) // grid),
        vocabulary=(),
        baselines={},
        source="made",
    )


@pytest.fixture
def made():
    """97 samples of lengths 1 to 40."""
    return make_data(np.random.default_rng(1).integers(1, 41, 97))


def take(batches, count):
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def equal(a, b):
    return a[0] == b[0] and all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def check_batch(batch, of, split):
    """Content, padding and one padded length that follows from each sample's own."""
    assert batch.x.dtype == (np.int32 if of.tokens else np.float32)
    assert batch.targets.dtype == batch.lengths.dtype == np.int64
    assert len(batch.x) == len(batch.targets) == len(batch.lengths)
    for x, i, length in zip(batch.x, batch.targets, batch.lengths, strict=True):
        own = split.values[split.offsets[i] : split.offsets[i + 1]]
        assert len(own) == length
        assert len(x) == -(-len(own) // of.grid) * of.grid
        np.testing.assert_array_equal(x[:length], own)
        assert np.all(x[length:] == of.pad)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_train_batches_hold_the_samples(made, batch_size):
    steps = data.steps_per_epoch(made, batch_size)
    batches = take(data.train_batches(made, batch_size, 0), 3 * steps)
    assert [epoch for epoch, _ in batches] == [0] * steps + [1] * steps + [2] * steps
    padded = -(-made.train.lengths // 8) * 8
    for _, batch in batches:
        check_batch(batch, made, made.train)
        full = min(batch_size, np.sum(padded == batch.x.shape[1]))
        assert len(batch.x) == full
    for epoch in range(3):
        used = np.concatenate([batch.targets for e, batch in batches if e == epoch])
        assert len(set(used.tolist())) == len(used), "a sample twice in an epoch"
        left = len(made.train) - len(used)
        assert left == sum(n % min(batch_size, n) for n in np.unique(padded, return_counts=True)[1])


def test_each_epoch_has_its_own_order_and_remainder(made):
    steps = data.steps_per_epoch(made, 7)
    batches = take(data.train_batches(made, 7, 0), 6 * steps)
    orders, lengths, remainders = set(), set(), set()
    for epoch in range(6):
        of_epoch = [batch for e, batch in batches if e == epoch]
        used = np.concatenate([batch.targets for batch in of_epoch]).tolist()
        orders.add(tuple(used))
        lengths.add(tuple(batch.x.shape[1] for batch in of_epoch))
        remainders.add(tuple(sorted(set(range(97)) - set(used))))
    assert len(orders) == len(lengths) == len(remainders) == 6
    assert len(set().union(*remainders)) > 2 * len(min(remainders, key=len))


def test_a_batch_is_a_function_of_its_step(made):
    steps = data.steps_per_epoch(made, 4)
    whole = take(data.train_batches(made, 4, 5), 3 * steps)
    for start in (1, steps // 2, steps - 1, steps, steps + 1, 2 * steps, 3 * steps - 1):
        resumed = take(data.train_batches(made, 4, 5, start), 3 * steps - start)
        assert all(equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    other = take(data.train_batches(made, 4, 6), 3 * steps)
    assert not all(equal(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("batch_size", [1, 5, 97, 98, 1000])
def test_eval_batches_hold_every_sample_once(made, batch_size):
    batches = list(data.eval_batches(made.train, made, batch_size))
    for batch in batches:
        check_batch(batch, made, made.train)
        assert 1 <= len(batch.x) <= batch_size
    found = np.concatenate([batch.targets for batch in batches])
    assert sorted(found.tolist()) == list(range(97))


def test_what_a_sample_looks_like_does_not_depend_on_the_batch_size(made):
    def pairs(batch):
        return zip(batch.targets.tolist(), batch.x, strict=True)

    def rows(batch_size):
        batches = data.eval_batches(made.train, made, batch_size)
        return {i: x.tolist() for batch in batches for i, x in pairs(batch)}

    assert rows(1) == rows(7) == rows(1000)


def test_real_values():
    made = make_data([5, 8, 9, 16, 3, 3, 17], channels=3)
    for _, batch in take(data.train_batches(made, 2, 0), 8):
        assert batch.x.shape[2] == 3
        check_batch(batch, made, made.train)


def test_a_single_sample():
    made = make_data([1])
    assert data.steps_per_epoch(made, 32) == 1
    batches = take(data.train_batches(made, 32, 0), 2)
    assert [epoch for epoch, _ in batches] == [0, 1]
    assert batches[0][1].x.shape == (1, 8)


def test_bad_batch_arguments_are_sentences_at_once(made):
    for batch_size in (0, -1):
        for make in (
            lambda: data.train_batches(made, batch_size, 0),  # noqa: B023
            lambda: data.eval_batches(made.valid, made, batch_size),  # noqa: B023
            lambda: data.steps_per_epoch(made, batch_size),  # noqa: B023
        ):
            with pytest.raises(Error, match=f"batch size is {batch_size}; expected at least 1"):
                make()
    empty = make_data([], valid=())
    for make in (
        lambda: data.train_batches(empty, 4, 0),
        lambda: data.eval_batches(empty.valid, empty, 4),
        lambda: data.steps_per_epoch(empty, 4),
    ):
        with pytest.raises(Error, match="no samples"):
            make()
    for seed, start in ((-1, 0), (0, -1)):
        with pytest.raises(Error, match="at least 0"):
            data.train_batches(made, 4, seed, start)


# Two documents, bytes as numbers, noise


def documents_of(made):
    """The same documents, two to a sample."""

    def paired(split):
        n = len(split.offsets) // 2
        return data.Split(split.values, split.offsets, split.targets[:n])

    splits = {name: paired(split) for name, split in splits_of(made).items() if name == "train"}
    return dataclasses.replace(made, **splits, documents=2)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batches_of_two_documents(batch_size):
    made = documents_of(make_data(np.random.default_rng(2).integers(1, 41, 60)))
    split, lengths = made.train, made.train.lengths.reshape(-1, 2)
    assert len(split) == 30
    steps = data.steps_per_epoch(made, batch_size)
    trained = [batch for _, batch in take(data.train_batches(made, batch_size, 0), 2 * steps)]
    evaluated = list(data.eval_batches(split, made, batch_size))
    for batch in trained + evaluated:
        n = len(batch.targets)
        assert n <= batch_size
        assert len(batch.x) == len(batch.lengths) == 2 * n
        for row in range(2 * n):
            i, document = batch.targets[row % n], row // n
            assert batch.x.shape[1] == -(-lengths[i].max() // 8) * 8, "the longer one decides"
            start = split.offsets[2 * i + document]
            length = batch.lengths[row]
            assert length == lengths[i, document]
            np.testing.assert_array_equal(batch.x[row, :length], split.values[start:][:length])
            assert np.all(batch.x[row, length:] == made.pad)
    found = np.concatenate([batch.targets for batch in evaluated])
    assert sorted(found.tolist()) == list(range(30))
    assert len(evaluated) == sum(
        -(-n // batch_size) for n in np.unique(-(-lengths.max(1) // 8), return_counts=True)[1]
    )


def images(noise=0, count=23, steps=10):
    """Bytes (steps, 2) a sample, which a batch scales and shifts."""
    made = make_data([steps] * count, grid=1, channels=2, valid=[steps] * 7)
    as_bytes = {
        name: dataclasses.replace(split, values=split.values.astype(np.uint8))
        for name, split in splits_of(made).items()
    }
    affine = {"scale": (0.5, 2.0), "shift": (-1.0, 0.25)}
    return dataclasses.replace(made, **as_bytes, **affine, noise=noise, pool_from=noise)


@pytest.mark.parametrize("noise", [0, 6])
def test_bytes_become_numbers_in_a_batch(noise):
    made = images(noise)
    for batch in data.eval_batches(made.train, made, 4):
        assert batch.x.dtype == np.float32
        assert batch.x.shape == (len(batch.targets), 10 + noise, 2)
        assert batch.lengths.tolist() == [10 + noise] * len(batch.targets)
        for x, i in zip(batch.x, batch.targets, strict=True):
            own = made.train.values[10 * i : 10 * i + 10]
            np.testing.assert_allclose(x[:10], own * [0.5, 2.0] + [-1.0, 0.25])


def noise_of(batches):
    """sample -> the noise (steps, 2) behind it."""
    return {int(i): x[10:] for b in batches for x, i in zip(b.x, b.targets, strict=True)}


def test_noise_in_evaluation_is_the_samples_own():
    made = images(noise=300)
    whole = noise_of(data.eval_batches(made.train, made, 1000))
    for batch_size in (1, 5):
        other = noise_of(data.eval_batches(made.train, made, batch_size))
        assert all(np.array_equal(whole[i], other[i]) for i in range(23))
    every = np.array([whole[i] for i in range(23)]).reshape(-1)
    assert len(np.unique(every)) > 0.99 * every.size, "no sample or channel has another's noise"
    assert 0 <= every.min() < 0.01
    assert 0.99 < every.max() < 1
    assert scipy.stats.kstest(every, "uniform").pvalue > 1e-3


def test_noise_in_training_is_new_in_every_batch_and_follows_from_its_step():
    made = images(noise=50)
    steps = data.steps_per_epoch(made, 4)
    whole = take(data.train_batches(made, 4, 5), 3 * steps)
    every = np.concatenate([batch.x[:, 10:].ravel() for _, batch in whole])
    assert len(np.unique(every)) > 0.99 * every.size
    assert scipy.stats.kstest(every, "uniform").pvalue > 1e-3
    for start in (1, steps - 1, steps, 2 * steps + 1):
        resumed = take(data.train_batches(made, 4, 5, start), 3 * steps - start)
        assert all(equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    other = np.concatenate(
        [b.x[:, 10:].ravel() for _, b in take(data.train_batches(made, 4, 6), 9)]
    )
    assert not np.isin(other, every).mean() > 0.01
    plain = take(data.train_batches(images(), 4, 5), 3 * steps)
    for (_, a), (_, b) in zip(whole, plain, strict=True):
        np.testing.assert_array_equal(a.targets, b.targets)
        np.testing.assert_array_equal(a.x[:, :10], b.x)


def test_noise_comes_directly_after_samples_of_any_length():
    made = dataclasses.replace(make_data([1, 2, 9], channels=1), noise=7)
    for batch in data.eval_batches(made.train, made, 4):
        for x, i, length in zip(batch.x, batch.targets, batch.lengths, strict=True):
            own = (1, 2, 9)[i]
            assert length == own + 7
            assert len(x) == (8, 16, 16)[i]
            assert np.all((x[own:length] > 0) & (x[own:length] < 1))
            assert np.all(x[length:] == 0)
