"""What people do after training, one module per job: `python -m tools.NAME` from the repository's root.

Here is what they share.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import common
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BUILDERS = {"baseline": MobileNetV4, "enhanced": enhanced_mobilenetv4}


@contextlib.contextmanager
def failures_in_one_line() -> Iterator[None]:
    """End the program with one line and status 1 on an expected failure, 130 on Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # names may have unshowable letters
    try:
        yield
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (common.RunError, OSError) as error:
        sys.exit(f"error: {common.printable(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def load_network(checkpoint: Path, *, weights: str = common.HEADLINE) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a checkpoint with its weights, for evaluation.

    Args:
        checkpoint: Of a run of either script, or of `tools.export`.
        weights: "averaged", or "raw", which a file of weights alone does not hold.

    Returns:
        The network on the CPU, and all that the checkpoint holds.

    Raises:
        RunError: naming the file, if it is none of these, or damaged.
    """
    saved = common.load_checkpoint(checkpoint)
    with common.reading(checkpoint):
        if saved["variant"] not in BUILDERS:
            raise ValueError(f"its variant is {saved['variant']}, known are {', '.join(BUILDERS)}")
        values = saved["model" if weights == "raw" else weights]
        if not values:
            raise ValueError(f"it holds no {weights} weights")
        network = BUILDERS[saved["variant"]](len(saved["classes"]), **saved["network"])
        network.load_state_dict(values)
        if len(saved["mean"]) != 3 or len(saved["std"]) != 3:
            raise ValueError("its mean and std are not of three channels")
        settings(saved, torch.device("cpu"))
    return network.eval(), saved


def settings(saved: dict[str, Any], device: torch.device, **others: Any) -> common.Config:
    """Return the configuration to predict with as the run of a checkpoint did, where the device has its precision."""
    here = common.fastest_precision(device)
    precision = here if here == "fp32" else saved["recipe"]["precision"]
    return common.Config(image_size=saved["image_size"], precision=precision, **others)


def load_data(saved: dict[str, Any], data_dir: Path, device: torch.device) -> tuple[common.Data, common.Config]:
    """Load the images in `data_dir` as the network of a checkpoint wants them, and the configuration to predict with.

    Args:
        saved: What the checkpoint holds.
        data_dir: What a run's --data-dir takes, or a folder with a folder for some of the network's classes at least.
        device: Where the images go.

    Raises:
        RunError: if there are none, or of other classes.
    """
    config = settings(saved, device, data_dir=data_dir)
    if any((data_dir / name).is_dir() for name in saved["classes"]) and not (data_dir / "test").is_dir():
        return read_pictures(saved, data_dir, device), config
    data = load_splits(config, saved, device)
    if data.classes != saved["classes"]:
        raise common.RunError(
            f"{data_dir}: its classes are {', '.join(data.classes)}, the network's are {', '.join(saved['classes'])}"
        )
    return replace(data, mean=saved["mean"], std=saved["std"]), config


def load_splits(config: common.Config, saved: dict[str, Any], device: torch.device) -> common.Data:
    """Load training and test images; CIFAR-10 is downloaded only for a network that was trained on it."""
    root, known = config.data_dir, config.synthetic or saved["classes"] == CIFAR10_CLASSES
    if not known and not any((root / split).is_dir() for split in ("train", "test")):
        raise common.RunError(f"{root}: holds neither train/ and test/ nor a folder of one of the network's classes")
    return common.load_data(config, device)


def read_pictures(saved: dict[str, Any], folder: Path, device: torch.device) -> common.Data:
    """Read <folder>/<class>/..., all of them for evaluation, with the labels that the network gives to the classes."""
    size, classes = saved["image_size"], saved["classes"]
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # an empty class
        raise common.RunError(f"{folder}: {error}") from None
    if others := set(found.classes) - set(classes):
        raise common.RunError(f"{folder}: the network has no class {', '.join(sorted(others))}")
    common.check_memory(folder, len(found) * size * size * 3)
    with tqdm(total=len(found), desc="reading images", unit="", leave=False, disable=None) as bar:
        images = torch.from_numpy(common.decode([path for path, _ in found.samples], size, bar)).to(device)
    labels = torch.tensor([classes.index(found.classes[target]) for target in found.targets], device=device)
    return as_data(images, labels, saved)


def as_data(images: Tensor, labels: Tensor, saved: dict[str, Any]) -> common.Data:
    """Return images, uint8 (N, H, W, 3), and labels, int64 (N,), as data for evaluation, without training images."""
    return common.Data("", saved["classes"], images[:0], labels[:0], images, labels, saved["mean"], saved["std"], "")


def logits_of(images: Tensor, network: nn.Module, saved: dict[str, Any]) -> Tensor:
    """Return the logits of any images, uint8 (N, H, W, 3), as float32 (N, classes) on the CPU."""
    data = as_data(images, torch.zeros(0, dtype=torch.int64), saved)
    return common.predict(network, images, data, settings(saved, images.device))


def add_device(parser: argparse.ArgumentParser) -> None:
    choices = ("auto", "cuda", "mps", "cpu")
    parser.add_argument(
        "--device", choices=choices, default="auto", help="auto: cuda, else mps, else cpu (default: auto)"
    )


def optional(*names: str) -> list[ModuleType]:
    """Import packages that only some tools need.

    Raises:
        RunError: with the command that installs what is not there.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        packages = sorted({name.split(".")[0] for name in names})
        raise common.RunError(f"this needs more packages ({error}): pip install {' '.join(packages)}") from None
