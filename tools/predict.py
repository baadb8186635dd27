"""Predict what is in pictures: the most probable classes.

    python -m tools.predict runs/baseline/checkpoint.pt cat.jpg holiday/
    python -m tools.predict results/weights/enhanced.pt cat.jpg --json

Pictures of any size, and folders of them; each is cropped to the square in its centre and resized as the training
images were. One that cannot be read is named, the others are predicted, and the exit status is 1.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from tools import add_device, exit_in_one_line, load_network, logits_of, new_parser
from training.config import RunError, argument, printable
from training.pictures import decode, find_pictures

BATCH = 250  # pictures that are decoded before the first of them is predicted


def find_all(arguments: list[Path]) -> tuple[list[Path], bool]:
    """Return the files that are named or in folders that are; False if a folder has none, which is named on stderr."""
    paths, complete = [], True
    for path in arguments:
        try:
            paths += find_pictures(path) if os.path.isdir(path) else [path]
        except RunError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            complete = False
    return paths, complete


def decode_readable(paths: list[Path], size: int) -> tuple[list[Path], np.ndarray]:
    """Return the pictures that can be read, as uint8 (N, size, size, 3); each other one is named on stderr."""
    readable, images = [], [np.empty((0, size, size, 3), np.uint8)]
    for path in paths:
        try:
            images.append(decode([path], size))
            readable.append(path)
        except RunError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
    return readable, np.concatenate(images)


def report(path: Path, probabilities: dict[str, float], options: argparse.Namespace) -> str:
    """Return one line about one picture."""
    if options.json:
        return json.dumps({"image": str(path), "probabilities": probabilities})
    best = sorted(probabilities.items(), key=lambda item: -item[1])[: options.top]
    return f"{printable(path)}: " + ", ".join(f"{printable(name)} {100 * value:.1f}%" for name, value in best)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run, or a .pt file of tools.export")
    parser.add_argument("images", type=Path, nargs="+", metavar="PICTURE", help="a picture, or a folder of pictures")
    parser.add_argument(
        "--top", type=argument(int, 1, 1e6), default=3, metavar="N", help="classes to print (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object per line, with all probabilities")
    options = parser.parse_args()
    with exit_in_one_line():
        trained = load_network(options.checkpoint, on=options.device)
        with contextlib.redirect_stdout(sys.stderr):  # notices
            paths, complete = find_all(options.images)
        for start in range(0, len(paths), BATCH):
            readable, images = decode_readable(paths[start : start + BATCH], trained.saved["image_size"])
            complete &= len(readable) == len(paths[start : start + BATCH])
            if not readable:
                continue
            probabilities = logits_of(torch.from_numpy(images), trained).softmax(1)
            for path, row in zip(readable, probabilities.tolist(), strict=True):
                print(report(path, dict(zip(trained.saved["classes"], row, strict=True)), options))
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
