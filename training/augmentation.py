"""Augmentation: what is drawn for an epoch, as a function of (seed, epoch), and what is done to a batch."""

import numpy as np
import torch
from torch import Tensor

from training.config import Config
from training.data import Data


def random_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a generator on the CPU that is a function of (seed, epoch), so that all devices draw the same."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_epoch(count: int, config: Config, epoch: int, device: torch.device) -> dict[str, Tensor]:
    """Draw the order of an epoch's images and, in this order, the shift, flip and square of each.

    Flips alternate from epoch to epoch (Jordan, arXiv 2404.00498), so that any two successive epochs show each image
    both ways. Each image gets one square, clipped at the border: of the image before it in the batch, with an area
    uniform in 0..1 (CutMix; Yun et al., arXiv 1905.04899, there one square per batch), or grey and of fixed size
    (cutout; DeVries and Taylor, arXiv 1708.04552). The last epochs have no squares.
    """
    generator = random_generator(config.seed, epoch)
    order = torch.randperm(count, generator=generator)
    shift = torch.randint(-config.crop_padding, config.crop_padding + 1, (count, 2), generator=generator)
    centre = torch.randint(0, config.image_size, (count, 2), generator=generator)
    first = torch.randint(0, 2, (count,), generator=random_generator(config.seed, 0)).bool()
    flip = (first ^ bool(epoch % 2)) & (config.flip == "alternate")
    mixed, area = torch.rand(2, count, generator=generator)
    mixed = mixed < config.cutmix
    side = torch.where(mixed, (config.image_size * area.sqrt()).round().long(), config.cutout)
    if epoch > config.epochs - round(config.epochs * config.no_augmentation_end):
        side = torch.zeros_like(side)
    drawn = dict(order=torch.arange(count), shift=shift, flip=flip, centre=centre, side=side, mixed=mixed)
    return {name: tensor[order].to(device) for name, tensor in drawn.items()}


def augment(data: Data, drawn: dict[str, Tensor], batch: slice, config: Config) -> tuple[Tensor, Tensor]:
    """Gather a batch of training images and labels, augmented as drawn.

    Returns:
        Images (N, H, W, 3) uint8, and labels (N,) int64, or with CutMix class probabilities (N, classes) float32.
    """
    drawn = {name: tensor[batch] for name, tensor in drawn.items()}
    images, labels = shift_and_flip(data.train_images, drawn), data.train_labels[drawn["order"]]
    if not config.cutout and not config.cutmix:
        return images, labels
    square = inside_square(drawn, images.shape[1])  # (N, H, W)
    if not config.cutmix:
        return images.masked_fill(square[..., None], 128), labels
    mixed = drawn["mixed"][:, None, None, None]
    images = torch.where(square[..., None], torch.where(mixed, images.roll(1, 0), 128), images)
    one_hot = (labels[:, None] == torch.arange(len(data.classes), device=labels.device)).float()
    share = (square.float().mean((1, 2)) * drawn["mixed"])[:, None]  # of the other image, (N, 1)
    return images, one_hot.lerp(one_hot.roll(1, 0), share)


def shift_and_flip(images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Gather of images (all, H, W, 3) those drawn, each shifted with reflection at the borders, then flipped."""
    size = images.shape[1]
    pixels = torch.arange(size, device=images.device)
    rows, columns = ((pixels + drawn["shift"][:, axis, None]).abs() for axis in (0, 1))  # (N, size)
    rows, columns = (size - 1 - (size - 1 - place).abs() for place in (rows, columns))
    columns = torch.where(drawn["flip"][:, None], columns.flip(1), columns)
    return images[drawn["order"][:, None, None], rows[:, :, None], columns[:, None, :]]


def inside_square(drawn: dict[str, Tensor], size: int) -> Tensor:
    """Return which pixels lie in the square of each image, bool (N, size, size)."""
    pixels = torch.arange(size, device=drawn["centre"].device)
    place = pixels - drawn["centre"][:, :, None] + drawn["side"][:, None, None] // 2  # (N, 2, size)
    inside = (place >= 0) & (place < drawn["side"][:, None, None])
    return inside[:, 0, :, None] & inside[:, 1, None, :]
