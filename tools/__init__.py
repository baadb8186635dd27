"""What people do after training, one module per job, from the repository's root:

    python -m tools.evaluate CHECKPOINT           # accuracy, calibration, classes, confusion matrix
    python -m tools.predict CHECKPOINT PICTURE    # the most probable classes
    python -m tools.export CHECKPOINT FILE        # ONNX, torch.export, or weights alone
    python -m tools.plot RUN                      # curves, confusion matrix, mistakes, samples

Here is what these programs share; how they load a network and its images is in tools/trained.py.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tools.trained import BUILDERS, Trained, load_images, load_network, logits_of
from training.config import DEVICES, RunError, errors_in_one_line, printable

__all__ = ["BUILDERS", "Trained", "load_images", "load_network", "logits_of"]


def new_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda, else mps, else cpu")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which images: the arguments of load_images."""
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="as in training, or a folder per class (default: the run's images)"
    )
    parser.add_argument("--test-set", action="store_true", help="the test images, even where the run had --holdout")


@contextlib.contextmanager
def exit_in_one_line() -> Iterator[None]:
    """End the program with one line and status 1 on an expected failure, with status 130 on Ctrl-C."""
    try:
        with errors_in_one_line():
            yield
    except KeyboardInterrupt:
        sys.exit(130)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{printable(path)}: {error.strerror}") from None


def optional(*names: str) -> list[ModuleType]:
    """Import packages that only some tools need; RunError says how to install what is not there."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        packages = sorted({name.split(".")[0] for name in names})
        raise RunError(f"this needs more packages ({error}): pip install {' '.join(packages)}") from None
