"""A second look at a network that nobody tuned to: accuracy on the test images shifted by two pixels.

    python -m benchmarks.shifts runs/baseline/checkpoint.pt --data-dir data/cifar10

Each of the eight directions in turn, without test-time augmentation; what a shift uncovers is a reflection, as in
training. Prints the accuracy of the images as they are, of each direction, and the mean and the lowest of the eight.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor

import common
from tools import failures_in_one_line, load_data, load_network


def shift(images: Tensor, down: int, right: int) -> Tensor:
    """Move the content of images (N, H, W, 3) by so many pixels, reflecting at the borders."""
    count, device = len(images), images.device
    drawn = {
        "order": torch.arange(count, device=device),
        "shift": torch.tensor([[-down, -right]], device=device).expand(count, 2),
        "flip": torch.zeros(count, dtype=torch.bool, device=device),
    }
    return common.shift_and_flip(images, drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of a run, or of tools.export")
    parser.add_argument("--data-dir", type=Path, default=common.Config.data_dir, help="(default: %(default)s)")
    parser.add_argument(
        "--pixels", type=int, default=2, choices=range(1, 16), metavar="N", help="of a shift (default: %(default)s)"
    )
    options = parser.parse_args()
    with failures_in_one_line():
        device = common.pick_device("auto", 0)
        network, saved = load_network(options.checkpoint)
        data, config = load_data(saved, options.data_dir, device)
        network.to(device, memory_format=common.layout(device))
        accuracies = {}
        for down, right in itertools.product((0, -options.pixels, options.pixels), repeat=2):
            logits = common.predict(network, shift(data.test_images, down, right), data, config)
            accuracies[down, right] = common.accuracy(logits, data.test_labels)
            print(f"{down:+3d} down {right:+3d} right  {accuracies[down, right]:6.2f}%")
        del accuracies[0, 0]
        print(f"mean of the eight {sum(accuracies.values()) / 8:.2f}%, lowest {min(accuracies.values()):.2f}%")


if __name__ == "__main__":
    main()
