"""What several test modules share: small data, a small network, and the ways in which they run programs."""

import contextlib
import copy
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import common
from training import checkpoint, devices
from training.checkpoint import State
from training.config import Config
from training.cpu import DepthwiseConv2d
from training.data import Data

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = ["cat", "dog", "ship"]
CPU = torch.device("cpu")
ON_CPU = ("--threads", 1, "--device", "cpu")  # one thread: see conftest.py


# ---- Small data ----------------------------------------------------------------------------------------------------


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


def small_data(train: int = 23, test: int = 7) -> Data:
    """Return random images of three classes in turn."""
    images = [torch.from_numpy(random_images(count, count)) for count in (train, test)]
    labels = [torch.arange(count) % 3 for count in (train, test)]
    return Data("made up", ["a", "b", "c"], images[0], labels[0], images[1], labels[1], [0.5] * 3, [0.25] * 3, "")


# ---- A small network -----------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A network small enough to train in a moment, with each kind of layer that is treated apart."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.dense, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.pointwise = DepthwiseConv2d(8, 3), nn.Conv2d(8, 4, 1)
        self.classifier = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.dense(x)).relu()
        return self.classifier(self.pointwise(self.depthwise(x)).mean((2, 3)))


def new_tiny(config: Config) -> State:
    """Return the state of a run of the small network before its first step."""
    torch.manual_seed(config.seed)
    network = Tiny().to(memory_format=devices.memory_format(CPU))
    return State(network, copy.deepcopy(network), common.make_optimizers(network, config))


def train(config: Config, data: Data | None = None, epochs: int | None = None) -> tuple[State, list[Tensor]]:
    """Train the small network, all epochs or the first ones; return its state and the loss of each step."""
    data, state, losses = data or small_data(), new_tiny(config), []
    forward = common.make_forward(state.raw, data, config)

    def loss_fn(images: Tensor, labels: Tensor) -> Tensor:
        losses.append(nn.functional.cross_entropy(forward(images), labels))
        return losses[-1]

    for epoch in range(1, (config.epochs if epochs is None else epochs) + 1):
        common.train_epoch(state, loss_fn, data, config, epoch, tqdm(disable=True))
    return state, losses


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def equal(one: Any, other: Any) -> bool:
    """Compare nested plain values and tensors, bit for bit."""
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def without_times(path: Path) -> dict[str, Any]:
    """Load a checkpoint without its checksum and without the times in its metrics."""
    saved = checkpoint.load(path)
    del saved["sha256"]
    times = ("images_per_second", "seconds")
    saved["metrics"] = [{key: row[key] for key in row if key not in times} for row in saved.get("metrics", [])]
    return saved


def equal_runs(one: Path, other: Path) -> bool:
    """Return whether two checkpoints are equal in every tensor and value but the times."""
    return equal(without_times(one), without_times(other))


# ---- Programs ------------------------------------------------------------------------------------------------------


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
        [sys.executable, *python, *script, *map(str, (*ON_CPU, *flags))],
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
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    status, on_interrupt = 0, signal.getsignal(signal.SIGINT)
    with (
        mock.patch.object(sys, "argv", ["program", *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:  # whose text the interpreter would print
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=errors)
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
    text = [stream.buffer.getvalue().decode() for stream in (output, errors)]
    return subprocess.CompletedProcess(arguments, status, *text)


def run_script_here(variant: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as `run_script` does, but in this process."""
    script = str(REPOSITORY / f"mobilenetv4_{variant}.py")
    return run_here(lambda: runpy.run_path(script, run_name="__main__"), *ON_CPU, *arguments)


def run_tiny(*arguments: object) -> subprocess.CompletedProcess:
    """Train the small network in this process, with the whole program of a script around it."""
    return run_here(lambda: common.main("tiny", Tiny, lambda config: {}), *ON_CPU, *arguments)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until the running process has written `path`."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
