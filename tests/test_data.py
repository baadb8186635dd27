"""Where the images come from, and that they arrive as they are."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import re
import struct
import tarfile
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import CLASSES, flags, run_script_here, start, write_folders
from PIL import Image
from torchvision.datasets import CIFAR10

import common
from common import Config, RunError

CPU = torch.device("cpu")


class Server:
    """Serves one archive on localhost, badly if told so, and remembers what it was asked for."""

    def __init__(self, content: bytes) -> None:
        self.content, self.cut_after, self.stall, self.ranges = content, None, False, []
        self.knows_ranges = self.tells_length = True
        self.delay = 0.0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.ranges.append(self.headers.get("Range"))
                if self.path == "/missing":
                    return self.send_error(404)
                time.sleep(outer.delay)
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if outer.knows_ranges else 0
                if start >= len(outer.content):
                    return self.send_error(416)
                rest = outer.content[start:]
                self.send_response(206 if start else 200)
                if outer.tells_length:
                    self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: outer.cut_after])
                if outer.stall:
                    self.wfile.flush()
                    time.sleep(3)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/cifar-10-python.tar.gz"


@pytest.fixture
def server(official):
    server = Server(official[0])
    yield server
    server.server.shutdown()
    server.server.server_close()


def load(root, **settings):
    return common.load_data(Config(data_dir=root, **settings), CPU)


def test_class_folders_give_the_same_tensors_as_the_official_batches(tmp_path, official):
    archive, images = official
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / CIFAR10.filename).write_bytes(archive)
    batches = {
        "train": np.concatenate([images[name] for name, _ in CIFAR10.train_list]),
        "test": np.concatenate([images[name] for name, _ in CIFAR10.test_list]),
    }
    for split, first in (("train", 0), ("test", 50000)):
        for index, pixels in enumerate(batches[split]):
            folder = tmp_path / "folders" / split / CLASSES[index % 8 % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{first + index:05d}.png")
    ours, theirs = load(tmp_path / "folders"), load(tmp_path / "data")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.classes, ours.mean, ours.std) == (theirs.classes, theirs.mean, theirs.std)
    assert ours.fingerprint == theirs.fingerprint


def test_statistics_are_those_of_the_training_images(folders):
    data = load(folders)
    pixels = data.train_images.double().div(255).flatten(0, 2)
    assert data.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-12)
    assert data.std == pytest.approx(pixels.std(0, correction=0).tolist(), abs=1e-12)


def test_a_second_start_takes_the_cache_and_a_changed_file_is_noticed(folders, monkeypatch):
    first = load(folders)
    decoded = []
    decode = common.decode
    monkeypatch.setattr(common, "decode", lambda paths, *rest: (decoded.append(paths), decode(paths, *rest))[1])
    second = load(folders)
    assert not decoded
    assert torch.equal(first.train_images, second.train_images)
    assert first.fingerprint == second.fingerprint
    Image.new("RGB", (32, 32), "red").save(folders / "train" / "cat" / "00000.png")
    third = load(folders)
    assert decoded
    assert third.fingerprint != first.fingerprint


def test_a_damaged_cache_is_made_again_and_holds_no_pickle(folders):
    first = load(folders)
    cache = folders / ".cache-32px.npz"
    with np.load(cache, allow_pickle=False) as arrays:
        assert {arrays[name].dtype.kind for name in arrays} == {"u", "U"}
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes(content)
    assert load(folders).fingerprint == first.fingerprint
    cache.write_bytes(b"")
    assert load(folders).fingerprint == first.fingerprint
    with np.load(cache) as arrays:
        np.savez(cache, key=arrays["key"], train=arrays["train"][:5], test=arrays["test"])
    assert load(folders).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 300 * 100, (117, 117, 117)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_pictures_of_every_mode_become_rgb(mode, color, expected):
    fitted = common.fit_image(Image.new(mode, (50, 40), color), 32)
    assert (fitted.mode, fitted.size) == ("RGB", (32, 32))
    assert fitted.getpixel((16, 16)) == expected


def test_the_shorter_side_is_fitted_and_the_centre_kept():
    picture = Image.new("RGB", (128, 64), "red")
    picture.paste("blue", (24, 0, 104, 64))  # what the resizing blurs lies outside
    assert common.fit_image(picture, 32).getcolors() == [(32 * 32, (0, 0, 255))]


def test_an_image_that_cannot_be_read_is_named(folders):
    path = folders / "test" / "dog" / "00001.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"00001\.png: not a readable image"):
        load(folders)


def test_hostile_pictures_are_read_within_bounds_or_named(folders):
    cat = folders / "train" / "cat"
    Image.new("L", (1, 1), 200).save(cat / "one pixel.png")
    Image.new("1", (1, 3_000_000)).save(cat / "long.png")  # brought to 32 pixels as a whole it would fill 9 GB
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(cat / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(cat / "print.jpg")
    Image.fromarray(np.full((40, 40), 300 * 100, np.uint16)).save(cat / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 32), "blue").save(cat / "turned.jpg", exif=turned)
    data = load(folders)
    names = sorted(path.name for split in ("train",) for path in (folders / split).rglob("*.*"))
    centre = {name: data.train_images[index, 16, 16].tolist() for index, name in enumerate(names)}
    assert centre["one pixel.png"] == [200] * 3
    assert centre["long.png"] == [0] * 3
    assert centre["animated.webp"] == [255, 0, 0]  # the first frame
    assert centre["print.jpg"] == pytest.approx([254, 0, 0], abs=3)
    assert centre["deep.png"] == [117] * 3
    assert centre["turned.jpg"] == pytest.approx([0, 0, 254], abs=3)


@pytest.mark.parametrize("size", [(20_000, 20_000), (100_000_000, 2)])
def test_a_decompression_bomb_is_named_and_never_unpacked(folders, size):
    bomb = folders / "train" / "cat" / "bomb.png"
    Image.new("1", (1, 1)).save(bomb)
    content = bytearray(bomb.read_bytes())  # the size stands behind "IHDR", followed by its own checksum
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    bomb.write_bytes(content)
    with pytest.raises(RunError, match=r"bomb\.png: not a readable image \(Image size"):
        load(folders)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_or_a_broken_link_among_the_pictures_is_named_and_not_waited_for(folders):
    pipe = folders / "test" / "dog" / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(RunError, match=r"pipe\.png: not a file"):
        load(folders)
    pipe.unlink()
    pipe.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"pipe\.png"):
        load(folders)


def test_classes_may_have_any_name(tmp_path):
    names = ["-x", "a b", "a\nb", "\u00e9", os.fsdecode(b"\xff")]
    root = write_folders(tmp_path, classes=names)
    data = load(root)
    assert data.classes == sorted(names)
    path = tmp_path / "checkpoint.pt"
    torch.save({"classes": data.classes}, path)
    assert torch.load(path, weights_only=True)["classes"] == data.classes


def test_a_picture_starts_no_program_whatever_its_name(folders, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{} loop\n%%EOF\n"
    (folders / "train" / "cat" / "script.png").write_bytes(script)
    with pytest.raises(RunError, match=r"script\.png: not a readable image"):
        load(folders)
    assert not started


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_of_unknown_range_are_named_rather_than_guessed(folders, mode):
    Image.new(mode, (32, 32), 1).save(folders / "train" / "cat" / "deep.tif")
    with pytest.raises(RunError, match=r"deep\.tif: not a readable image \(32 bits a pixel"):
        load(folders)


def test_pictures_that_are_there_more_than_once_are_told(folders, capsys):
    os.symlink(".", folders / "train" / "cat" / "loop")
    load(folders)
    assert re.search(r"notice: \d+ of the \d+ pictures in .* are links", capsys.readouterr().out)


@pytest.mark.parametrize("kind", [np.float64, np.int64, bool])
def test_a_cache_of_another_kind_is_made_again(folders, kind):
    first = load(folders)
    cache = folders / ".cache-32px.npz"
    with np.load(cache) as arrays:
        key, train, test = (arrays[name] for name in ("key", "train", "test"))
    np.savez(cache, key=key, train=train.astype(kind), test=test.astype(kind))
    assert load(folders).fingerprint == first.fingerprint
    np.savez(cache, key=key, train=np.asfortranarray(train), test=test)
    assert load(folders).fingerprint == first.fingerprint
    np.savez_compressed(cache, key=key, train=np.zeros((10**5, 100), np.uint8), test=test)
    assert common.read_cache(cache, str(key), [(10**5, 100), test.shape]) is None  # never unpacked


def test_a_run_may_be_kept_where_its_pictures_are(folders):
    result = run_script_here("baseline", *flags(folders, folders, 1))
    assert result.returncode == 0, result.stderr


def test_a_download_that_never_ends_is_ended(tmp_path, server, monkeypatch):
    monkeypatch.setattr(common, "ARCHIVE_BYTES", len(server.content))
    server.tells_length, right, server.content = False, server.content, b"x" * 10**6
    with pytest.raises(RunError, match="what came is larger than"):
        load(tmp_path / "data", data_url=server.url)
    assert not list((tmp_path / "data").glob("cifar*"))
    server.content = right
    load(tmp_path / "data", data_url=server.url)


def test_a_data_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(RunError, match="File exists"):
        load(tmp_path / "data", data_url="http://127.0.0.1:9/nothing")


def test_classes_that_differ_an_empty_class_and_a_missing_split_are_refused(tmp_path):
    root = write_folders(tmp_path / "a")
    (root / "train" / "emu").mkdir()
    with pytest.raises(RunError, match="emu"):
        load(root)
    Image.new("RGB", (32, 32)).save(root / "train" / "emu" / "1.png")
    with pytest.raises(RunError, match="only one of train and test has emu"):
        load(root)
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(RunError):
        load(tmp_path / "b")


def test_a_set_too_large_for_memory_is_refused_with_its_size(folders, monkeypatch):
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * 47 * 32 * 32 * 3 - 1}
    monkeypatch.setattr(common.os, "sysconf", memory.__getitem__)
    with pytest.raises(RunError, match=r"its images take .* GiB at this size"):
        load(folders)
    memory["SC_PHYS_PAGES"] += 1
    load(folders)


def test_the_holdout_is_the_last_images_of_each_class_and_balanced(folders):
    everything, data = load(folders), load(folders, holdout=6)
    assert data.test_labels.bincount().tolist() == [2, 2, 2]
    assert torch.equal(data.test_images, everything.train_images[[34, 35, 36, 37, 38, 39]])
    assert torch.equal(data.train_images, everything.train_images[:34])
    assert data.mean != everything.mean
    with pytest.raises(RunError, match="--holdout 7"):
        load(folders, holdout=7)


def test_the_archive_is_downloaded_once_and_checked(tmp_path, server, official):
    data = load(tmp_path / "data", data_url=server.url)
    assert torch.equal(data.train_images[:8], torch.from_numpy(official[1]["data_batch_1"]))
    assert data.classes == CLASSES
    load(tmp_path / "data", data_url=server.url)
    assert len(server.ranges) == 1


def test_an_archive_already_there_needs_no_network(tmp_path, official):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / CIFAR10.filename).write_bytes(official[0])
    assert len(load(tmp_path / "data", data_url="http://127.0.0.1:9/nothing").train_labels) == 40


def test_a_cut_download_continues_where_it_stopped(tmp_path, server):
    server.cut_after = 1000
    total = len(server.content)
    load(tmp_path / "data", data_url=server.url)
    assert server.ranges[:3] == [None, "bytes=1000-", "bytes=2000-"]
    assert len(server.ranges) == -(-total // 1000)


def test_a_stalled_download_ends_in_one_message_and_the_next_try_heals_it(tmp_path, server, monkeypatch):
    urlopen = common.urllib.request.urlopen
    monkeypatch.setattr(common.urllib.request, "urlopen", lambda request, timeout: urlopen(request, timeout=0.3))
    server.cut_after, server.stall = 0, True
    with pytest.raises(RunError, match=CIFAR10.tgz_md5):
        load(tmp_path / "data", data_url=server.url)
    server.cut_after, server.stall = None, False
    load(tmp_path / "data", data_url=server.url)


def test_other_bytes_are_never_used(tmp_path, server):
    right, server.content = server.content, b"x" * len(server.content)
    with pytest.raises(RunError, match="MD5"):
        load(tmp_path / "data", data_url=server.url)
    assert not list((tmp_path / "data").glob("cifar*"))
    server.content = right
    load(tmp_path / "data", data_url=server.url)


@pytest.mark.parametrize("path", ["missing", None])
def test_without_the_file_or_the_network_the_message_names_every_way_on(tmp_path, server, path):
    url = server.url.replace(CIFAR10.filename, "missing") if path else "http://127.0.0.1:9/nothing"
    with pytest.raises(RunError) as caught:
        load(tmp_path / "data", data_url=url)
    message = str(caught.value)
    for part in (url, CIFAR10.tgz_md5, str(tmp_path / "data"), "--data-dir", "--data-url", "--synthetic"):
        assert part in message
    assert "\n" not in message


def test_two_downloads_at_once_end_well(tmp_path, server):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(load(tmp_path / "data", data_url=server.url).fingerprint))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert len(server.ranges) == 1


def test_both_scripts_download_at_once_and_end_well(tmp_path, server):
    sums = (CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta, CIFAR10.tgz_md5)
    names = ("train_list", "test_list", "meta", "tgz_md5")
    patch = "from torchvision.datasets import CIFAR10\n" + "".join(
        f"CIFAR10.{name} = {value!r}\n" for name, value in zip(names, sums, strict=True)
    )
    server.delay = 1.0  # both are there before the first has it
    processes = [
        start(
            variant,
            *("--data-dir", tmp_path / "data", "--data-url", server.url, "--epochs", 1),
            *("--output-dir", tmp_path / variant),
            patch=patch,
        )
        for variant in ("baseline", "enhanced")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert server.ranges == [None]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        ".data.lock",
        CIFAR10.base_folder,
        CIFAR10.filename,
    ]


def test_two_starts_at_once_decode_the_pictures_once(folders):
    with common.exclusive(folders / ".data.lock", wait=False):
        other = threading.Thread(target=load, args=(folders,))
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert not (folders / ".cache-32px.npz").exists()
    other.join(60)
    assert (folders / ".cache-32px.npz").exists()


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folders, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(path)

    monkeypatch.setattr(common, "exclusive", refuse)
    monkeypatch.setattr(common, "replacing", lambda path: refuse_to_write(path))

    @contextlib.contextmanager
    def refuse_to_write(path):
        raise RunError(f"{path} cannot be written")
        yield

    assert len(load(folders).train_labels) == 40


def test_an_archive_writes_nothing_outside_the_data_directory(tmp_path, official, monkeypatch):
    archive = tmp_path / "data" / "inside" / CIFAR10.filename
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(RunError, match="outside"):
        load(archive.parent)
    assert os.listdir(tmp_path / "data") == ["inside"]


def test_a_batch_of_unknown_origin_is_never_unpickled(tmp_path, server):
    load(tmp_path / "data", data_url=server.url)
    (tmp_path / "data" / CIFAR10.filename).unlink()
    server.content = b""
    batch = tmp_path / "data" / CIFAR10.base_folder / "data_batch_2"
    batch.write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    with pytest.raises(RunError):
        load(tmp_path / "data", data_url=server.url)
    assert not (tmp_path / "ran").exists()


def test_a_cache_of_unknown_origin_is_never_unpickled(folders):
    first = load(folders)
    cache = folders / ".cache-32px.npz"
    with np.load(cache) as arrays:
        key = arrays["key"]
    payload = np.array([Payload(str(folders / "ran"))], dtype=object)
    np.savez(cache, key=key, train=payload, test=payload)
    assert load(folders).fingerprint == first.fingerprint
    assert not (folders / "ran").exists()


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [b"damaged", None])
def test_a_damaged_or_missing_batch_is_healed_from_the_archive(tmp_path, server, name, damage):
    first = load(tmp_path / "data", data_url=server.url)
    path = tmp_path / "data" / CIFAR10.base_folder / name
    path.unlink() if damage is None else path.write_bytes(damage)
    assert load(tmp_path / "data", data_url=server.url).fingerprint == first.fingerprint
    assert len(server.ranges) == 1


def test_a_server_that_knows_no_ranges_and_always_cuts_ends_in_a_message(tmp_path, server):
    server.knows_ranges, server.cut_after = False, 1000
    with pytest.raises(RunError, match="the connection broke after 1,000 bytes"):
        load(tmp_path / "data", data_url=server.url)


def test_a_server_that_tells_no_length_will_do(tmp_path, server):
    server.tells_length = False
    load(tmp_path / "data", data_url=server.url)


def test_a_leftover_that_is_no_beginning_of_the_archive_is_dropped(tmp_path, server):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{CIFAR10.filename}.part").write_bytes(b"x" * (len(server.content) + 1))
    with pytest.raises(RunError, match="416"):
        load(tmp_path / "data", data_url=server.url)
    load(tmp_path / "data", data_url=server.url)


def test_the_cache_is_one_for_each_size(folders):
    assert load(folders, image_size=16).train_images.shape[1:] == (16, 16, 3)
    assert load(folders, image_size=32).train_images.shape[1:] == (32, 32, 3)
    assert load(folders, image_size=16).train_images.shape[1:] == (16, 16, 3)
