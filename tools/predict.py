"""Tell what is in pictures: the classes that a trained network finds most probable.

    python -m tools.predict runs/baseline/checkpoint.pt cat.jpg holiday/
    python -m tools.predict results/weights/enhanced.pt cat.jpg --json

Pictures of any size, and folders of them; each is cropped to the square in its centre and resized as the training
images were. One that cannot be read is named, the others are predicted, and the exit status is 1.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import common
from tools import add_device, failures_in_one_line, load_network, logits_of

SUFFIXES = {*IMG_EXTENSIONS, ".gif"}  # looked for in folders


def find_pictures(paths: list[Path]) -> list[Path]:
    """Replace each folder by the pictures in it and below, in order of their names.

    Raises:
        RunError: if a folder holds none.
    """
    found = []
    for path in paths:
        inside = (
            sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        if not inside:
            raise common.RunError(f"{path}: no picture in this folder")
        found += inside
    return found


def decode(paths: list[Path], size: int) -> tuple[list[Path], np.ndarray]:
    """Return the pictures that can be read, as uint8 (N, size, size, 3); each other one is told on stderr."""
    readable, images = [], []
    for path in paths:
        try:
            images.append(common.decode([str(path)], size, tqdm(disable=True)))
            readable.append(path)
        except common.RunError as error:
            print(f"error: {common.printable(error)}", file=sys.stderr)
    return readable, np.concatenate([np.empty((0, size, size, 3), np.uint8), *images])


def report(path: Path, probabilities: dict[str, float], options: argparse.Namespace) -> str:
    """Return one line about one picture."""
    if options.json:
        return json.dumps({"image": str(path), "probabilities": probabilities})
    best = sorted(probabilities.items(), key=lambda item: -item[1])[: options.top]
    return f"{common.printable(path)}: " + ", ".join(f"{name} {100 * value:.1f}%" for name, value in best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of a run, or of tools.export")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="a picture, or a folder of pictures")
    parser.add_argument(
        "--top", type=common.reader(int, 1, 1e6), default=3, metavar="N", help="classes to tell (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with all probabilities")
    options = parser.parse_args()
    with failures_in_one_line():
        device = common.pick_device(options.device, 0)
        network, saved = load_network(options.checkpoint)
        network.to(device, memory_format=common.layout(device))
        paths, told = find_pictures(options.images), 0
        for start in range(0, len(paths), 250):
            readable, images = decode(paths[start : start + 250], saved["image_size"])
            if not readable:
                continue
            probabilities = logits_of(torch.from_numpy(images).to(device), network, saved).softmax(1)
            for path, row in zip(readable, probabilities.tolist(), strict=True):
                print(report(path, dict(zip(saved["classes"], row, strict=True)), options))
            told += len(readable)
    sys.exit(0 if told == len(paths) else 1)


if __name__ == "__main__":
    main()
