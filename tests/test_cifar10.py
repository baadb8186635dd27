"""CIFAR-10: what is read is what was verified, whatever servers send and wherever a process died."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from training import cifar10
from training.config import RunError
from training.files import exclusive

CLASSES = ["cat", "dog", "ship"]
BATCHES = [*cifar10.FILES][:-1]


class Python2Pickler(pickle._Pickler):
    """Writes bytes and strings as Python 2 did, which wrote the official files."""

    def save_text(self, text):
        text = text.encode() if isinstance(text, str) else text
        self.write(b"T" + len(text).to_bytes(4, "little") + text)
        self.memoize(text)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_text, str: save_text}  # noqa: RUF012


def pickled(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def md5(content):
    return hashlib.md5(content).hexdigest()


def expect(monkeypatch, archive, files):
    """Put what the reader expects in place of the official sums."""
    monkeypatch.setattr(cifar10, "FILES", {name: md5(content) for name, content in files.items()})
    monkeypatch.setattr(cifar10, "ARCHIVE_BYTES", len(archive))
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", md5(archive))


def packed(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def images():
    return {
        name: np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        for seed, name in enumerate(BATCHES)
    }


@pytest.fixture
def files(images):
    """Seven small files in the official form."""
    labels = {name: [(seed + index) % 3 for index in range(4)] for seed, name in enumerate(images)}
    batches = {
        name: pickled({"batch_label": name, "labels": labels[name], "data": planes(pixels)})
        for name, pixels in images.items()
    }
    return {**batches, "batches.meta": pickled({"num_vis": 3072, "label_names": CLASSES})}


def planes(pixels):
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)


@pytest.fixture
def archive(monkeypatch, files):
    """The archive of the seven files, which the reader expects, within short limits of time."""
    content = packed({f"{cifar10.FOLDER}/{name}": content for name, content in files.items()})
    expect(monkeypatch, content, files)
    for name, value in {"TIMEOUT": 0.4, "WINDOW": 0.1, "BLOCK": 1000}.items():
        monkeypatch.setattr(cifar10, name, value)
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    return content


class Server:
    """Serves one archive on localhost, badly if told so, and remembers which ranges it was asked for."""

    def __init__(self, content):
        self.content, self.ranges, self.stopped = content, [], threading.Event()
        self.cut_after = self.status = self.location = None
        self.knows_ranges = self.tells_length = True
        self.rate = self.delay = 0  # bytes per second, seconds
        self.trickle, self.continues = False, False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(OSError):  # the other side may leave at any time
                    outer.serve(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/cifar-10-python.tar.gz"

    def serve(self, request):
        self.ranges.append(request.headers.get("Range"))
        time.sleep(self.delay)
        while self.continues and not self.stopped.wait(0.01):
            request.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.location:
            request.send_response(302)
            request.send_header("Location", self.location)
            return request.end_headers()
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1]) if self.knows_ranges else 0
        if self.status or start >= len(self.content) > 0:
            return request.send_error(self.status or 416)
        rest = self.content[start:]
        request.send_response(206 if start else 200)
        if self.tells_length:
            request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        rest = rest[: self.cut_after]
        step = 1 if self.trickle else 500 if self.rate else max(len(rest), 1)
        for index in range(0, len(rest), step):
            request.wfile.write(rest[index : index + step])
            if (self.rate or self.trickle) and self.stopped.wait(0.05 if self.trickle else step / self.rate):
                return None

    def close(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def servers(archive, monkeypatch):
    servers = [Server(archive) for _ in range(3)]
    monkeypatch.setattr(cifar10, "MIRRORS", tuple(server.url for server in servers))
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def server(servers):
    return servers[0]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def right(images):
    """Return whether what was read is what was made."""

    def check(result):
        classes, train, test = result
        return (
            classes == CLASSES
            and np.array_equal(train[0], np.concatenate([images[name] for name in BATCHES[:5]]))
            and np.array_equal(test[0], images["test_batch"])
            and train[1].tolist() == [(seed + index) % 3 for seed in range(5) for index in range(4)]
        )

    return check


@pytest.fixture
def extracted(root, files):
    """A data directory that holds the seven files and no archive."""
    (root / cifar10.FOLDER).mkdir(parents=True)
    for name, content in files.items():
        (root / cifar10.FOLDER / name).write_bytes(content)
    return root


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---- Reading -------------------------------------------------------------------------------------------------------


def test_the_sums_are_those_of_torchvision():
    lists = {**dict(CIFAR10.train_list + CIFAR10.test_list), CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    assert lists == cifar10.FILES
    assert [*lists] == [*cifar10.FILES]
    assert (CIFAR10.filename, CIFAR10.tgz_md5) == (cifar10.ARCHIVE, cifar10.ARCHIVE_MD5)
    assert (CIFAR10.base_folder, CIFAR10.url) == (cifar10.FOLDER, cifar10.MIRRORS[-1])


def test_what_is_read_equals_what_torchvision_reads(monkeypatch, archive, extracted):
    sums = cifar10.FILES
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in BATCHES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    classes, *splits = cifar10.read_cifar10(extracted)
    for (images, labels), train in zip(splits, (True, False), strict=True):
        theirs = CIFAR10(extracted, train=train)
        assert np.array_equal(images, theirs.data)
        assert labels.tolist() == theirs.targets
        assert classes == theirs.classes
        assert (images.dtype, labels.dtype, images.flags.c_contiguous) == (np.uint8, np.int64, True)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_pickled_by_this_numpy_are_read_too(protocol):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.dumps(array, protocol)
    if protocol == 2:  # where bytes are made by a function
        with pytest.raises(RunError, match=r"_codecs\.encode has no place"):
            cifar10.Unpickler(io.BytesIO(content)).load()
    else:
        assert np.array_equal(cifar10.Unpickler(io.BytesIO(content), encoding="latin1").load(), array)


def test_a_payload_never_runs_even_under_the_expected_md5(tmp_path, monkeypatch, archive, files, extracted):
    files["data_batch_2"] = pickle.dumps(Payload(tmp_path / "ran"))
    (extracted / cifar10.FOLDER / "data_batch_2").write_bytes(files["data_batch_2"])
    expect(monkeypatch, archive, files)
    with pytest.raises(RunError, match=r"\.mkdir has no place in a file of CIFAR-10"):
        cifar10.read_cifar10(extracted)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["numpy.load", "numpy.core.multiarray.array", "copyreg._reconstructor", "builtins.getattr", "os.system"]
)
def test_nothing_but_arrays_is_built(name):
    module, _, function = name.rpartition(".")
    with pytest.raises(RunError, match=name):
        cifar10.Unpickler(io.BytesIO(f"c{module}\n{function}\n.".encode())).load()


def test_a_file_exchanged_after_its_verification_is_not_read(tmp_path, monkeypatch, archive, extracted, right):
    payload, genuine = pickle.dumps(Payload(tmp_path / "ran")), hashlib.md5

    def exchange(content=b"", **options):
        for path in (extracted / cifar10.FOLDER).iterdir():
            if content and path.read_bytes() == content:
                path.write_bytes(payload)
        return genuine(content, **options)

    monkeypatch.setattr(cifar10.hashlib, "md5", exchange)
    assert right(cifar10.read_cifar10(extracted, "http://127.0.0.1:9/nothing"))
    assert (extracted / cifar10.FOLDER / "test_batch").read_bytes() == payload


def test_a_batch_of_unknown_origin_is_neither_unpickled_nor_trained_on(tmp_path, archive, extracted):
    (extracted / cifar10.FOLDER / "data_batch_2").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(RunError, match="refused"):
        cifar10.read_cifar10(extracted, "http://127.0.0.1:9/nothing")
    assert not (tmp_path / "ran").exists()


# ---- Archive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [b"damaged", None, "pipe"])
def test_a_damaged_or_missing_file_is_healed_from_the_archive(archive, extracted, right, name, damage):
    (extracted / cifar10.ARCHIVE).write_bytes(archive)
    path = extracted / cifar10.FOLDER / name
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage:
        path.write_bytes(damage)
    assert right(cifar10.read_cifar10(extracted, "http://127.0.0.1:9/nothing"))
    assert path.is_file()


def test_a_damaged_file_without_an_archive_is_healed_by_a_download(server, extracted, right):
    (extracted / cifar10.FOLDER / "data_batch_1").write_bytes(b"damaged")
    assert right(cifar10.read_cifar10(extracted))
    assert server.ranges == [None]


def test_a_damaged_archive_is_downloaded_again(server, root, archive, right):
    root.mkdir()
    (root / cifar10.ARCHIVE).write_bytes(archive[:-1] + b"x")
    assert right(cifar10.read_cifar10(root))
    assert (root / cifar10.ARCHIVE).read_bytes() == archive


def test_an_interrupted_extraction_is_healed_without_a_download(monkeypatch, server, root, right):
    write, written = cifar10.atomic_write, []

    def interrupted(path):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cifar10, "atomic_write", interrupted)
        cifar10.read_cifar10(root)
    assert len([*(root / cifar10.FOLDER).iterdir()]) == 2
    assert right(cifar10.read_cifar10(root))
    assert server.ranges == [None]


def test_an_archive_writes_only_the_seven_files_and_nothing_outside(tmp_path, monkeypatch, root, files, right):
    members = {f"{cifar10.FOLDER}/{name}": content for name, content in files.items()}
    hostile = {"../outside": b"x", str(tmp_path / "absolute"): b"x", f"{cifar10.FOLDER}/../../up": b"x"}
    archive = packed({**hostile, **members, f"{cifar10.FOLDER}/more": b"x", "../cifar-10-batches-py/test_batch": b"x"})
    expect(monkeypatch, archive, files)
    root.mkdir()
    (root / cifar10.ARCHIVE).write_bytes(archive)
    assert right(cifar10.read_cifar10(root))
    assert os.listdir(tmp_path) == ["data"]
    assert {path.name for path in root.iterdir()} == {".data.lock", cifar10.FOLDER, cifar10.ARCHIVE}
    assert {path.name for path in (root / cifar10.FOLDER).iterdir()} == {*files}


def test_a_member_of_other_bytes_is_not_written(monkeypatch, root, files):
    members = {f"{cifar10.FOLDER}/{name}": content for name, content in files.items()}
    archive = packed({**members, f"{cifar10.FOLDER}/test_batch": b"other"})
    expect(monkeypatch, archive, files)
    root.mkdir()
    (root / cifar10.ARCHIVE).write_bytes(archive)
    with pytest.raises(RunError, match="does not hold its files"):
        cifar10.read_cifar10(root)
    assert not (root / cifar10.FOLDER / "test_batch").exists()


def test_an_archive_that_is_no_archive_ends_in_the_message(monkeypatch, root, files):
    expect(monkeypatch, b"no archive", files)
    root.mkdir()
    (root / cifar10.ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(RunError, match="CIFAR-10 is not in"):
        cifar10.read_cifar10(root)


def test_files_that_are_there_need_neither_network_nor_lock(archive, extracted, right):
    assert right(cifar10.read_cifar10(extracted, "http://127.0.0.1:9/nothing"))
    assert os.listdir(extracted) == [cifar10.FOLDER]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Train",
            r"data: holds neither CIFAR-10 nor train/ and test/ folders \(found: Train\); rename Train to train$",
        ),
        ("photos", r"\(found: photos\)$"),
    ],
)
def test_a_folder_of_something_else_gets_no_download(server, root, name, message):
    (root / name).mkdir(parents=True)
    with pytest.raises(RunError, match=message):
        cifar10.read_cifar10(root)
    assert os.listdir(root) == [name]
    assert not server.ranges


def test_beside_other_things_an_archive_is_taken(archive, root, right):
    (root / "MNIST").mkdir(parents=True)
    (root / cifar10.ARCHIVE).write_bytes(archive)
    assert right(cifar10.read_cifar10(root))


def test_a_folder_that_holds_only_what_is_of_cifar10_gets_a_download(server, root, archive, right, capsys):
    (root / cifar10.FOLDER).mkdir(parents=True)
    for name in (".hidden", ".data.lock", cifar10.ARCHIVE):
        (root / name).write_bytes(b"")
    (root / f"{cifar10.ARCHIVE}.part").write_bytes(archive[:100])
    assert right(cifar10.read_cifar10(root))
    assert f"CIFAR-10 is not in {root}: downloading it" in capsys.readouterr().out


def test_a_data_directory_that_is_a_file_is_named(archive, root):
    root.write_text("")
    with pytest.raises(RunError, match=r"File exists: .*data"):
        cifar10.read_cifar10(root)


# ---- Download ------------------------------------------------------------------------------------------------------


def test_the_archive_is_downloaded_once_from_the_first_source(servers, root, archive, right, capfd):
    assert right(cifar10.read_cifar10(root))
    assert right(cifar10.read_cifar10(root))
    assert [server.ranges for server in servers] == [[None], [], []]
    assert (root / cifar10.ARCHIVE).read_bytes() == archive
    output, errors = capfd.readouterr()
    assert re.search(rf"MB from {servers[0].host} in \d+ s \(", output)
    assert not errors  # without a terminal there is no bar


def test_a_named_source_is_the_only_one(servers, root, right):
    assert right(cifar10.read_cifar10(root, servers[1].url))
    assert [server.ranges for server in servers] == [[], [None], []]
    shutil.rmtree(root)
    servers[1].status = 500
    with pytest.raises(RunError, match="500"):
        cifar10.read_cifar10(root, servers[1].url)
    assert not servers[0].ranges


def make_bad(server, how):
    match how:
        case "404":
            server.status = 404
        case "silent":
            server.delay = 1
        case "trickle":
            server.trickle = True
        case "continue":
            server.continues = True
        case "another file":
            server.content = b"<html>sign in</html>"
        case "another file of unknown size":
            server.content, server.tells_length = b"<html>sign in</html>", False
        case "too large":
            server.content += b"x"
        case "endless":
            server.content, server.tells_length = b"x" * 10**7, False
        case "wrong bytes":
            server.content = b"x" * len(server.content)
        case "redirect in a circle":
            server.location = server.url
        case "redirect to a file":
            server.location = "file:///etc/hostname"
        case "redirect to nowhere":
            server.location = "http://127.0.0.1:9/"


BAD = {
    "404": "HTTP Error 404: Not Found",
    "silent": "no answer within 0.4 s",
    "trickle": "no answer within 0.4 s",
    "continue": "no answer within 0.4 s",
    "another file": "another file, of 20 bytes",
    "another file of unknown size": "the connection broke after 20 bytes",
    "too large": "another file",
    "endless": "the MD5 of what came is wrong",
    "wrong bytes": "the MD5 of what came is wrong",
    "redirect in a circle": "302",
    "redirect to a file": "is not allowed",
    "redirect to nowhere": r": \[Errno \d+\] Connection refused\n",
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_source_gives_way_to_the_next_and_alone_ends_in_a_message(servers, root, right, capsys, how):
    make_bad(servers[0], how)
    with pytest.raises(RunError, match=BAD[how]):
        cifar10.read_cifar10(root, servers[0].url)
    assert not (root / cifar10.ARCHIVE).exists()
    part = root / f"{cifar10.ARCHIVE}.part"
    assert not part.exists() or part.stat().st_size <= cifar10.ARCHIVE_BYTES
    assert right(cifar10.read_cifar10(root))
    assert servers[0].host in capsys.readouterr().out
    assert servers[1].ranges


def test_no_more_is_read_than_the_archive_has(server, root, monkeypatch):
    received = []

    class Bar(contextlib.nullcontext):
        def __init__(self, **_):
            super().__init__()

        update = received.append

    monkeypatch.setattr(cifar10, "tqdm", Bar)
    make_bad(server, "endless")
    with pytest.raises(RunError, match="MD5"):
        cifar10.read_cifar10(root, server.url)
    assert sum(received) < cifar10.ARCHIVE_BYTES + cifar10.BLOCK


def test_a_host_that_accepts_and_never_answers_gives_way_to_the_next(servers, root, right, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as hole:
        url = f"http://127.0.0.1:{hole.getsockname()[1]}/"
        monkeypatch.setattr(cifar10, "MIRRORS", (url, servers[0].url))
        start = time.monotonic()
        assert right(cifar10.read_cifar10(root))
    assert time.monotonic() - start < 3


def test_a_redirect_is_followed_with_its_range(servers, root, archive, right):
    servers[0].location = servers[1].url
    root.mkdir()
    (root / f"{cifar10.ARCHIVE}.part").write_bytes(archive[:777])
    assert right(cifar10.read_cifar10(root, servers[0].url))
    assert servers[1].ranges == ["bytes=777-"]


def test_the_next_source_continues_what_a_broken_one_began(servers, root, right):
    servers[0].cut_after = 5000
    assert right(cifar10.read_cifar10(root))
    assert [server.ranges for server in servers] == [[None], ["bytes=5000-"], []]


def test_a_single_source_that_breaks_again_and_again_is_continued(server, root, archive, right):
    server.cut_after = 10_000
    assert right(cifar10.read_cifar10(root, server.url))
    assert server.ranges == [None, *(f"bytes={start}-" for start in range(10_000, len(archive), 10_000))]


def test_crumbs_come_to_an_end(server, root, monkeypatch, archive):
    server.cut_after = 2  # less than a ten-thousandth at a time
    with pytest.raises(RunError, match="the connection broke after 2 bytes"):
        cifar10.read_cifar10(root, server.url)


def test_a_source_without_ranges_sends_all_again(servers, root, right):
    servers[0].cut_after, servers[1].knows_ranges = 5000, False
    assert right(cifar10.read_cifar10(root))
    servers[1].cut_after = 1000
    shutil.rmtree(root)
    with pytest.raises(RunError, match="the connection broke after 1,000 bytes"):
        cifar10.read_cifar10(root, servers[1].url)


def test_a_source_that_tells_no_length_will_do(server, root, right):
    server.tells_length = False
    assert right(cifar10.read_cifar10(root, server.url))


def test_a_slow_source_gives_way_while_another_is_left(servers, root, right, capsys):
    servers[0].rate = 30_000
    assert right(cifar10.read_cifar10(root))
    assert servers[0].ranges == [None]
    assert int(servers[1].ranges[0][6:-1]) > 1000
    assert "slower than 300 kB/s" in capsys.readouterr().out


def test_where_all_are_slow_the_fastest_goes_on_to_the_end(servers, root, right):
    for server, rate in zip(servers, (10_000, 120_000, 30_000), strict=True):
        server.rate = rate
    assert right(cifar10.read_cifar10(root))
    assert [len(server.ranges) for server in servers] == [1, 2, 1]


def test_the_only_source_may_be_slow_for_longer_than_any_limit(server, root, right):
    server.rate = 60_000
    start = time.monotonic()
    assert right(cifar10.read_cifar10(root, server.url))
    assert time.monotonic() - start > 2 * cifar10.TIMEOUT
    assert server.ranges == [None]


def test_a_wrong_partial_file_is_dropped_and_fetched_once_more(server, root, right):
    root.mkdir()
    (root / f"{cifar10.ARCHIVE}.part").write_bytes(b"x" * 1000)
    assert right(cifar10.read_cifar10(root, server.url))
    assert server.ranges == ["bytes=1000-", None]


def test_a_leftover_that_is_longer_than_the_archive_is_dropped(server, root, right):
    root.mkdir()
    (root / f"{cifar10.ARCHIVE}.part").write_bytes(b"x" * (len(server.content) + 1))
    assert right(cifar10.read_cifar10(root, server.url))
    assert server.ranges[1] is None


def test_a_source_that_answers_416_to_everything_ends_in_a_message(server, root):
    server.status = 416
    root.mkdir()
    (root / f"{cifar10.ARCHIVE}.part").write_bytes(b"x" * 1000)
    with pytest.raises(RunError, match="416"):
        cifar10.read_cifar10(root, server.url)
    assert server.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("url", ["nothing", "http://", "http://[::1", "http://127.0.0.1:x/", "ftp://", "http://\u00e9"])
def test_a_bad_url_ends_in_the_message(archive, root, url):
    with pytest.raises(RunError, match="CIFAR-10 is not in"):
        cifar10.read_cifar10(root, url)


def test_the_message_names_each_source_and_what_helps(servers, root):
    for server, status in zip(servers, (404, 500, 503), strict=True):
        server.status = status
    with pytest.raises(RunError) as caught:
        cifar10.read_cifar10(root)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"CIFAR-10 is not in {root} and could not be downloaded:"
    for line, server in zip(lines[1:4], servers, strict=True):
        assert line.startswith(f"  {server.host}: HTTP Error {server.status}")
    assert lines[4] == "What helps:"
    for part in (servers[-1].url, cifar10.ARCHIVE_MD5, str(root / cifar10.ARCHIVE)):
        assert part in lines[5]
    assert lines[6].startswith("  --data-dir PATH")
    assert lines[7:] == ["  python mobilenetv4_baseline.py --synthetic --epochs 2 --output-dir runs/trial"]


def test_what_cannot_be_written_is_named(server, root):
    part = root / f"{cifar10.ARCHIVE}.part"
    part.mkdir(parents=True)
    with pytest.raises(RunError, match=r"Is a directory: .*\.part"):
        cifar10.read_cifar10(root)


def test_an_error_of_our_own_is_not_taken_for_one_of_the_network(server, root, monkeypatch):
    monkeypatch.setattr(cifar10, "BLOCK", "many")
    with pytest.raises(TypeError):
        cifar10.read_cifar10(root, server.url)


def test_an_answer_brings_no_terminal_codes(server, root, monkeypatch, capsys):
    monkeypatch.setitem(http.server.BaseHTTPRequestHandler.responses, 404, ("\x1b[2J", ""))
    server.status = 404
    with pytest.raises(RunError):
        cifar10.read_cifar10(root, server.url)
    assert "\x1b" not in capsys.readouterr().out


# ---- Two processes -------------------------------------------------------------------------------------------------


def test_one_that_waits_says_so_and_takes_what_the_other_made(server, root, files, right, capsys):
    root.mkdir()
    results = []
    with exclusive(root / ".data.lock", wait=False):
        other = threading.Thread(target=lambda: results.append(cifar10.read_cifar10(root)))
        other.start()
        other.join(0.2)
        assert other.is_alive()
        (root / cifar10.FOLDER).mkdir()
        for name, content in files.items():
            (root / cifar10.FOLDER / name).write_bytes(content)
    other.join(10)
    assert right(results[0])
    assert capsys.readouterr().out == f"waiting for another process that downloads CIFAR-10 to {root}\n"
    assert not server.ranges


def test_two_processes_download_once_and_end_well(server, root):
    server.delay = 0.3
    names = ("FILES", "ARCHIVE_BYTES", "ARCHIVE_MD5")
    program = "\n".join(
        [
            "import pathlib, sys, training.cifar10 as cifar10",
            *(f"cifar10.{name} = {getattr(cifar10, name)!r}" for name in names),
            "classes, train, test = cifar10.read_cifar10(pathlib.Path(sys.argv[1]), sys.argv[2])",
            "print(classes, train[0].sum(), test[0].sum())",
        ]
    )
    command = [sys.executable, "-W", "error", "-c", program, str(root), server.url]
    processes = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({output.splitlines()[-1] for output, _ in outputs}) == 1
    assert not any(errors for _, errors in outputs)
    assert server.ranges == [None]
