"""Small data sets that the tests make themselves, and the way in which they run the scripts."""

import contextlib
import hashlib
import io
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = ["cat", "dog", "ship"]


def random_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write_folders(root: Path, train: int = 40, test: int = 7, classes: list[str] = CLASSES) -> Path:
    """Write <root>/{train,test}/<class>/<index>.png of random images; image i is of class i modulo the number."""
    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        for index, pixels in enumerate(random_images(count, seed)):
            folder = root / split / classes[index % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread: beside another busy process two threads make the tests ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "pictures with spaces \u00e9")


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Return the bytes of a small archive in the official layout, whose MD5 sums torchvision is told to expect."""
    base = tmp_path / "made" / CIFAR10.base_folder
    base.mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    images = {name: random_images(8, seed) for seed, name in enumerate(names)}
    sums = {}
    for name, pixels in images.items():
        labels = [index % 3 for index in range(8)]
        content = pickle.dumps({"data": pixels.transpose(0, 3, 1, 2).reshape(8, -1), "labels": labels})
        (base / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({"label_names": CLASSES})
    (base / "batches.meta").write_bytes(content)
    archive = tmp_path / "made" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(content).hexdigest()})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive.read_bytes(), images


def flags(folders: Path, output: Path, epochs: int = 2) -> list[object]:
    return ["--data-dir", folders, "--output-dir", output, "--epochs", epochs, "--batch-size", 32]


def start(variant: str, *flags: object, python: tuple[str, ...] = (), patch: str = "", **options) -> subprocess.Popen:
    """Start a script as a user does, on one thread, with options of Python or after a patch of what it imports."""
    script = [f"mobilenetv4_{variant}.py"]
    if patch:
        runner = (
            "import runpy, sys; sys.argv.pop(0); sys.path.insert(0, ''); "
            + "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        script = ["-c", f"{patch}\n{runner}", *script]
    return subprocess.Popen(
        [sys.executable, *python, *script, *map(str, ("--threads", 1, *flags))],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def run_script(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a script, started as by `start`, to its end and return its exit status, output and errors."""
    process = start(*arguments, **options)
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_here(main: Callable[[], object], *arguments: object) -> subprocess.CompletedProcess:
    """Run a program's main function in this process, which saves the time of importing PyTorch."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    status, on_interrupt = 0, signal.getsignal(signal.SIGINT)
    with (
        mock.patch.object(sys, "argv", ["program", *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:  # whose text the interpreter would print
            status = end.code if isinstance(end.code, int) else 1
            print("" if isinstance(end.code, int) else end.code, file=errors, end="\n" * isinstance(end.code, str))
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
    text = [stream.buffer.getvalue().decode() for stream in (output, errors)]
    return subprocess.CompletedProcess(arguments, status, *text)


def run_script_here(variant: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as `run_script` does, but in this process."""
    script = str(REPOSITORY / f"mobilenetv4_{variant}.py")
    return run_here(lambda: runpy.run_path(script, run_name="__main__"), "--threads", 1, *arguments)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until the running process has written `path`."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
