"""data.py: downloads, against a server of our own."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import os
import re
import tarfile
import threading

import numpy as np
import pytest

import data

CONTENT = np.random.default_rng(0).bytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `served` {name: bytes}; the other attributes are what can go wrong."""

    served, asked = {}, []  # asked: the Range of every request
    ranges = True
    status = None
    cut_after = None  # bytes of an answer
    hang_up = False
    announce_length = True

    def do_GET(self):
        content = self.served.get(self.path.strip("/"))
        self.asked.append(self.headers["Range"])
        if self.hang_up:
            self.close_connection = True
            return
        if self.status or content is None:
            self.send_error(self.status or 404)
            return
        first = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(first[1]) if first and self.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.announce_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.cut_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A Handler class of its own, with `url` and `offer(name, content)` to put into DOWNLOADS."""
    handler = type("Handler", (Handler,), {"served": {}, "asked": []})
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "DOWNLOADS", {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        handler.url = f"http://127.0.0.1:{running.server_port}/"

        def offer(name, content, **other):
            handler.served[name] = content
            right = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            data.DOWNLOADS[name] = data.Download(handler.url + name, **(right | other))

        handler.offer = staticmethod(offer)
        yield handler
        running.shutdown()
        thread.join()


def fetch(folder, name="file.bin"):
    return data._download(name, folder / "set", False)


def found(folder):
    return {path.name: path.read_bytes() for path in (folder / "set").iterdir()}


def refusal(folder, match):
    """The message of a download that fails: one paragraph that ends in a full stop."""
    with pytest.raises(data.DataError, match=match) as caught:
        fetch(folder)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_good_file(server, tmp_path):
    server.offer("file.bin", CONTENT)
    assert fetch(tmp_path) == tmp_path / "set" / "file.bin"
    assert found(tmp_path) == {"file.bin": CONTENT}
    assert server.asked == [None]


def test_a_file_of_unknown_length(server, tmp_path):
    server.announce_length = False
    server.offer("file.bin", CONTENT)
    fetch(tmp_path)
    assert found(tmp_path) == {"file.bin": CONTENT}


def test_progress_is_one_line_off_a_terminal(server, tmp_path, capsys):
    server.offer("file.bin", CONTENT)
    data._download("file.bin", tmp_path, True)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "file.bin: 300,000 bytes\n")


def test_a_wrong_checksum(server, tmp_path):
    server.offer("file.bin", CONTENT, sha256="0" * 64)
    message = refusal(tmp_path, "expected a file with sha256 000.*deleted.*Run the command again")
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert found(tmp_path) == {}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_and_what_comes_after(server, tmp_path, ranges):
    server.offer("file.bin", CONTENT)
    server.cut_after, server.ranges = 100_000, ranges
    refusal(tmp_path, "broken after 100,000.*Run the command again: it goes on from there")
    assert found(tmp_path) == {"file.bin.part": CONTENT[:100_000]}
    refusal(tmp_path, f"broken after {200_000 if ranges else 100_000:,}")
    server.cut_after = None
    fetch(tmp_path)
    assert found(tmp_path) == {"file.bin": CONTENT}
    assert server.asked == [None, "bytes=100000-", f"bytes={200_000 if ranges else 100_000}-"]


def test_a_broken_connection_of_unknown_length(server, tmp_path):
    server.offer("file.bin", CONTENT)
    server.cut_after, server.announce_length = 100_000, False
    refusal(tmp_path, "broken after 100,000")


def test_a_wrong_beginning_is_found_at_the_end(server, tmp_path):
    server.offer("file.bin", CONTENT)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.part").write_bytes(bytes(100_000))
    refusal(tmp_path, "sha256")
    assert found(tmp_path) == {}
    fetch(tmp_path)
    assert found(tmp_path) == {"file.bin": CONTENT}


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    server.offer("file.bin", CONTENT)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.part").write_bytes(CONTENT)
    fetch(tmp_path)
    assert found(tmp_path) == {"file.bin": CONTENT}
    assert server.asked == []


def test_a_part_that_is_too_long_starts_again(server, tmp_path):
    server.offer("file.bin", CONTENT)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.part").write_bytes(CONTENT + b"more")
    fetch(tmp_path)
    assert found(tmp_path) == {"file.bin": CONTENT}
    assert server.asked == ["bytes=300004-", None]


def test_another_size_is_refused_before_anything_is_written(server, tmp_path):
    server.offer("file.bin", CONTENT, size=299_999)
    refusal(tmp_path, "expected 299,999 bytes, the server offers 300,000")
    assert found(tmp_path) == {}


@pytest.mark.parametrize(
    ("status", "words"), [(404, "404 Not Found"), (403, "403 Forbidden"), (500, "500 Internal")]
)
def test_a_server_that_refuses(server, tmp_path, status, words):
    server.offer("file.bin", CONTENT)
    server.status = status
    refusal(tmp_path, f"the server answered {words}.*--data-dir")
    assert found(tmp_path) == {}


def test_a_server_that_hangs_up(server, tmp_path):
    server.offer("file.bin", CONTENT)
    server.hang_up = True
    refusal(tmp_path, f"Cannot reach {server.url}file.bin.*--data-dir")


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    nowhere = data.Download("http://127.0.0.1:9/file.bin", 1, "")
    monkeypatch.setitem(data.DOWNLOADS, "file.bin", nowhere)
    refusal(tmp_path, "Cannot reach http://127.0.0.1:9/file.bin.*--data-dir")


def test_a_full_disk(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.offer("file.bin", CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refusal(tmp_path, r"Cannot write .*file.bin.part: No space left.*--data-dir")
    fetch(tmp_path)
    assert found(tmp_path) == {"file.bin": CONTENT}


def test_a_folder_that_cannot_be(server, tmp_path):
    server.offer("file.bin", CONTENT)
    (tmp_path / "set").write_text("")
    refusal(tmp_path, r"Cannot write .*--data-dir")
    assert server.asked == []


def test_ctrl_c_leaves_what_has_come(server, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    server.offer("file.bin", CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path)
    assert found(tmp_path) == {"file.bin.part": CONTENT}
    fetch(tmp_path)
    assert found(tmp_path) == {"file.bin": CONTENT}


# Sets


def idx(*sizes):
    """A gzip file of random digits in MNIST's format."""
    header = b"".join(n.to_bytes(4, "big") for n in (0x0800 + len(sizes), *sizes))
    return gzip.compress(header + np.random.default_rng(0).integers(0, 10, sizes, "u1").tobytes())


def test_a_set_is_downloaded_once_and_only_when_asked(server, tmp_path):
    for prefix, n in (("train", 24), ("t10k", 5)):
        server.offer(f"{prefix}-images-idx3-ubyte.gz", idx(n, 28, 28))
        server.offer(f"{prefix}-labels-idx1-ubyte.gz", idx(n))
    with pytest.raises(data.DataError, match=f"--download to have {server.url}train-images"):
        data.load("smnist", tmp_path, progress=False)
    assert (server.asked, list(tmp_path.iterdir())) == ([], [])
    loaded = data.load("smnist", tmp_path, progress=False, download=True)
    assert [len(s) for s in (loaded.train, loaded.valid, loaded.test)] == [22, 2, 5]
    assert len(list((tmp_path / "mnist").iterdir())) == len(server.asked) == 4
    data.load("smnist", tmp_path, progress=False, download=True)
    data.load("smnist-noise", tmp_path / "mnist", progress=False)
    assert len(server.asked) == 4


def test_words_are_downloaded(server, tmp_path):
    for split in ("train", "valid", "test"):
        server.offer(f"ptb.{split}.txt", b" the cat \n the <unk> \n")
    loaded = data.load("ptb", tmp_path, progress=False, max_length=2, download=True)
    assert loaded.vocabulary == ("the", "<eos>", "cat", "<unk>")
    assert len(list((tmp_path / "ptb").iterdir())) == len(server.asked) == 3
    with pytest.raises(data.DataError, match=r"It is part of wikitext-2-v1\.zip"):
        data.load("wikitext-2", tmp_path, progress=False, download=True)


def archive(**members):
    """A tar.gz file of names with bytes, or with the TarInfo's type and target."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = content
            tar.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))
    return stream.getvalue()


BAD_MEMBERS = {
    "leaves its folder": ("../escaped.bin", b"x"),
    "leaves it later": ("cifar-10-batches-bin/../../escaped.bin", b"x"),
    "absolute": ("/tmp/escaped.bin", b"x"),
    "symbolic link": ("cifar-10-batches-bin/test_batch.bin", (tarfile.SYMTYPE, "../../escaped")),
    "hard link": ("cifar-10-batches-bin/test_batch.bin", (tarfile.LNKTYPE, "/etc/passwd")),
    "device": ("cifar-10-batches-bin/test_batch.bin", (tarfile.CHRTYPE, "")),
    "pipe": ("cifar-10-batches-bin/test_batch.bin", (tarfile.FIFOTYPE, "")),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_an_archive_that_reaches_out_of_its_folder_is_refused(server, tmp_path, monkeypatch, kind):
    name, content = BAD_MEMBERS[kind]
    record = bytes(data.CIFAR_RECORD)
    good = {f"cifar-10-batches-bin/{name}": record for name in data.CIFAR_FILES[:-1]}
    server.offer("cifar-10-binary.tar.gz", archive(**good, **{name: content}))
    load = functools.partial(data.load_cifar, records=1)
    monkeypatch.setitem(data.LOADERS, "scifar10", load)
    folder = tmp_path / "deep" / "deeper"
    with pytest.raises(data.DataError, match=re.escape(repr(name))) as caught:
        data.load("scifar10", folder, progress=False, download=True)
    assert str(folder / "cifar10" / "cifar-10-binary.tar.gz") in str(caught.value)
    files = [path.name for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
    assert files == ["cifar-10-binary.tar.gz"]


def test_the_table_is_well_formed():
    assert len(data.DOWNLOADS) == 10
    for name, download in data.DOWNLOADS.items():
        assert download.url.startswith("https://")
        assert download.url.endswith("/" + name)
        assert re.fullmatch("[0-9a-f]{64}", download.sha256)
        assert download.size > 0
    assert len({download.sha256 for download in data.DOWNLOADS.values()}) == 10
