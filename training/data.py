"""The data set as tensors on the device: CIFAR-10, class folders or drawn shapes."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.cifar10 import read_cifar10
from training.config import Config, RunError
from training.pictures import Arrays, count_copies, draw_shapes, read_folders


@dataclass(frozen=True)
class Data:
    """All images, as uint8 (N, H, W, 3) in 0..255 on the device, with labels int64 (N,)."""

    source: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: list[float]  # of the training images, per channel, in 0..1
    std: list[float]
    fingerprint: str  # of images, labels, their order and the class names


def load_data(config: Config, device: torch.device) -> Data:
    """Load training and test images, and with `holdout` a part of the training images in place of the test images."""
    source, classes, train, test = read_images(config)
    if config.holdout:
        train, test = split_holdout(train, config.holdout, len(classes))
        source += f", {len(test[1]):,} training images held out"
    if len(train[1]) < 2:
        raise RunError(f"{source}: at least 2 training images are needed, got {len(train[1])}")
    digest = hashlib.sha256(repr(classes).encode())
    for array in (*train, *test):
        digest.update(array)
    fingerprint = f"{len(train[1])} + {len(test[1])} images, {digest.hexdigest()[:16]}"
    tensors = [torch.from_numpy(array).to(device) for array in (*train, *test)]
    return Data(source, classes, *tensors, *channel_statistics(train[0]), fingerprint)


def read_images(config: Config) -> tuple[str, list[str], Arrays, Arrays]:
    """Return what the images are, the class names, training and test images."""
    root = config.data_dir
    if config.synthetic:
        return "drawn shapes", *draw_shapes(config.image_size)
    if any((root / split).is_dir() for split in ("train", "test")):
        classes, train, test = read_folders(root, config.image_size)
        if copies := count_copies(train[0], test[0]):
            print(f"notice: {copies} of the {len(test[0])} test images are copies of training images")
        return f"pictures in {root}", classes, train, test
    if config.image_size != 32:
        raise RunError(f"--image-size {config.image_size}: CIFAR-10 has 32; other sizes are for pictures of your own")
    return f"CIFAR-10 in {root}", *read_cifar10(root, config.data_url)


def split_holdout(train: Arrays, count: int, classes: int) -> tuple[Arrays, Arrays]:
    """Take the last count / classes training images of each class away; return (the rest, these), in order."""
    images, labels = train
    each, remainder = divmod(count, classes)
    if remainder or each >= np.bincount(labels, minlength=classes).min():
        raise RunError(f"--holdout {count}: expected a multiple of {classes} that leaves images of every class")
    held = np.zeros(len(labels), dtype=bool)
    for label in range(classes):
        held[np.flatnonzero(labels == label)[-each:]] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel in 0..1, exactly, from the counts of the 256 values."""
    counts = np.zeros((3, 256))
    for batch in np.array_split(images, len(images) // 1000 + 1):
        counts += [np.bincount(batch[..., channel].ravel(), minlength=256) for channel in range(3)]
    values, pixels = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / pixels
    variance = counts @ values**2 / pixels - mean**2
    return mean.tolist(), np.sqrt(np.maximum(variance, 1e-5)).tolist()


def random_data(count: int, device: torch.device) -> Data:
    """Return `count` random images, 32 x 32, of ten classes, for measurements."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator).to(device)
    labels = (torch.arange(count) % 10).to(device)
    classes = [str(label) for label in range(10)]
    return Data("random", classes, images, labels, images, labels, [0.5] * 3, [0.25] * 3, "")
