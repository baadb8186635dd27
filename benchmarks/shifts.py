"""Robustness: accuracy on the test images shifted by two pixels.

    python -m benchmarks.shifts runs/baseline/checkpoint.pt

Each of the eight directions in turn, without test-time augmentation; what a shift uncovers is a reflection, as in
training. A run with --holdout is evaluated on its held-out images.
Prints the accuracy of the images as they are, of each direction, and the mean and the lowest of the eight.
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor

import common
from tools import add_device, add_images, exit_in_one_line, load_images, load_network, new_parser
from training.augmentation import shift_and_flip
from training.config import printable
from training.cpu import keep_freed_memory


def shift(images: Tensor, down: int, right: int) -> Tensor:
    """Move the content of images (N, H, W, 3) by so many pixels, reflecting at the borders."""
    count, device = len(images), images.device
    drawn = {
        "order": torch.arange(count, device=device),
        "shift": torch.tensor([[-down, -right]], device=device).expand(count, 2),
        "flip": torch.zeros(count, dtype=torch.bool, device=device),
    }
    return shift_and_flip(images, drawn)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="of a run, or of tools.export")
    add_images(parser)
    parser.add_argument(
        "--pixels", type=int, default=2, choices=range(1, 16), metavar="N", help="of a shift (default: %(default)s)"
    )
    add_device(parser)
    options = parser.parse_args()
    with exit_in_one_line():
        keep_freed_memory()
        trained = load_network(options.checkpoint, on=options.device)
        data, facts = load_images(trained, options.data_dir, test_set=options.test_set)
        print(f"{facts['split']}: {len(data.test_images):,} images ({printable(facts['data'])})")
        accuracies = {}
        for down, right in itertools.product((0, -options.pixels, options.pixels), repeat=2):
            logits = common.predict(trained.network, shift(data.test_images, down, right), data, trained.config)
            accuracies[down, right] = common.score(logits, data.test_labels)["accuracy"]
            print(f"{down:+3d} down {right:+3d} right  {accuracies[down, right]:6.2f}%")
        del accuracies[0, 0]
        print(f"mean of the eight {sum(accuracies.values()) / 8:.2f}%, lowest {min(accuracies.values()):.2f}%")


if __name__ == "__main__":
    main()
