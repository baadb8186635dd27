"""A trained network from a checkpoint, and the images that its run was evaluated on.

trained = load_network(Path("runs/baseline/checkpoint.pt"))
data, facts = load_images(trained)
logits = common.predict(trained.network, data.test_images, data, trained.config)
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import predict
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4
from training import devices
from training.checkpoint import errors_naming, load
from training.config import Config, RunError, printable
from training.data import Data, load_data
from training.pictures import SHAPES, read_classes
from training.report import split_name

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BUILDERS = {"baseline": MobileNetV4, "enhanced": enhanced_mobilenetv4}


@dataclass(frozen=True)
class Trained:
    """A trained network on its device, in evaluation mode, with what its checkpoint says."""

    path: Path
    network: nn.Module
    saved: dict[str, Any]
    config: Config  # the run's settings, in float32 where bf16 does not suit the device
    device: torch.device


def load_network(path: Path, *, weights: str = "ema", on: str = "cpu") -> Trained:
    """Load the network of a checkpoint of either script, or of `tools.export`.

    Args:
        path: The checkpoint.
        weights: "ema", or "raw", which a file of weights alone does not hold.
        on: The device, as `--device` takes it.

    Raises:
        RunError: naming the file, if it is none of these, or damaged; or if there is no such device.
    """
    device = devices.choose(on)
    devices.set_up(device)
    saved = load(path)
    with errors_naming(path):
        network, config = build_network(saved, weights), run_settings(saved)
    if devices.fastest_precision(device) == "fp32":
        config = replace(config, precision="fp32")
    return Trained(path, network.to(device, memory_format=devices.memory_format(device)), saved, config, device)


def build_network(saved: dict[str, Any], weights: str) -> nn.Module:
    """Build on the meta device, which needs no memory whatever widths the file asks for, then assign the weights."""
    if saved["variant"] not in BUILDERS:
        raise ValueError(f"its variant is {saved['variant']}, known are {', '.join(BUILDERS)}")
    values = saved[{"ema": "averaged", "raw": "model"}[weights]]
    if not values:
        raise ValueError(f"it holds no {weights} weights")
    with torch.device("meta"):
        network = BUILDERS[saved["variant"]](len(saved["classes"]), **saved["network"])
    network.load_state_dict({name: tensor.float() for name, tensor in values.items()}, assign=True)
    return network.eval()


def run_settings(saved: dict[str, Any]) -> Config:
    """Return the settings of the run; what its checkpoint lacks gets its default."""
    known = Config(image_size=saved["image_size"]).recipe()
    return Config(**{key: type(default)(saved["recipe"].get(key, default)) for key, default in known.items()})


def load_images(
    trained: Trained, data_dir: Path | None = None, *, test_set: bool = False
) -> tuple[Data, dict[str, Any]]:
    """Load the images that a run was evaluated on: its hold-out if it had one, else the test images.

    Args:
        trained: From load_network.
        data_dir: What a run's --data-dir takes, or a folder with a folder for some of the classes at least. By default
            the run's data folder.
        test_set: Whether to take the test images although the run held images out.

    Returns:
        The images, uint8, with the run's mean and std, and facts about those for evaluation: "split", "data" (where
        they come from), "own" (whether they are those of the run, in its order; None where it has not seen them).

    Raises:
        RunError: if there are none, or of other classes.
    """
    saved, config = trained.saved, with_source(trained, data_dir)
    root, classes = config.data_dir, saved["classes"]
    if data_dir and not os.path.isdir(root):  # else CIFAR-10 would be downloaded into a mistyped folder
        raise RunError(f"--data-dir {printable(root)}: not a folder")
    if data_dir and not os.path.isdir(root / "test") and any(os.path.isdir(root / name) for name in classes):
        images, labels = map(torch.from_numpy, read_classes(root, config.image_size, classes))
        data = as_data(images.to(trained.device), labels.to(trained.device), saved)
        return data, {"split": "pictures", "data": f"pictures in {root}", "own": False}
    splits = any(os.path.isdir(root / split) for split in ("train", "test"))
    if not (config.synthetic or splits or classes == CIFAR10_CLASSES):  # else CIFAR-10 would be downloaded
        raise RunError(
            f"{printable(root)}: holds neither train/ and test/ nor a folder of one of the network's classes"
        )
    unseen = test_set and config.holdout > 0  # by the run
    if unseen:
        config = replace(config, holdout=0)
    data = load_data(config, trained.device)
    if data.classes != classes:
        found, expected = (printable(", ".join(names))[:300] for names in (data.classes, classes))
        raise RunError(f"{printable(root)}: its classes are {found}, the network's are {expected}")
    own = None if unseen else data.fingerprint == saved["data"]
    data = replace(data, mean=saved["mean"], std=saved["std"])
    return data, {"split": split_name(config), "data": data.source, "own": own}


def with_source(trained: Trained, data_dir: Path | None) -> Config:
    """Return the run's settings with the place of its images: `data_dir`, else what summary.json says, else data/."""
    if data_dir:
        return replace(trained.config, data_dir=data_dir)
    summary = trained.path.with_name("summary.json")
    with errors_naming(summary, "summary"):
        then = json.loads(summary.read_text())["configuration"] if os.path.isfile(summary) else {}
        if then.get("synthetic", trained.saved["classes"] == list(SHAPES)):
            return replace(trained.config, synthetic=True)
        return replace(trained.config, data_dir=Path(then.get("data_dir", Config.data_dir)))


def as_data(images: Tensor, labels: Tensor, saved: dict[str, Any]) -> Data:
    """Return images, uint8 (N, H, W, 3), and labels, int64 (N,), as data for evaluation, without training images."""
    return Data("", saved["classes"], images[:0], labels[:0], images, labels, saved["mean"], saved["std"], "")


def logits_of(images: Tensor, trained: Trained) -> Tensor:
    """Return the logits of any images, uint8 (N, H, W, 3), as float32 (N, classes) on the CPU."""
    images = images.to(trained.device)
    data = as_data(images, torch.zeros(0, dtype=torch.int64), trained.saved)
    return predict(trained.network, images, data, trained.config)
