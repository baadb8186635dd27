"""The configuration of a run, its command-line flags, one-line errors, and Ctrl-C."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DEVICES = ("auto", "cuda", "mps", "cpu")


class RunError(Exception):
    """An expected failure, reported in one line without a traceback."""


# ---- Fields --------------------------------------------------------------------------------------------------------


def setting(default: Any, help: str, low: float | None = None, high: float | None = None, **more: Any) -> Any:
    """A field of the configuration: a number from `low` to `high`, one of `choices`, a path or a switch."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, **more})


@dataclass(frozen=True)
class Config:
    """A run. Fields without `local` are saved, and must be the same when a run resumes."""

    epochs: int = setting(45, "passes over the training images", 1, 1e6)
    batch_size: int = setting(128, "images per step", 2, 1e6)
    learning_rate: float = setting(0.025, "peak learning rate of Muon, which trains most matrices", 0, 1e30)
    adam_learning_rate: float = setting(0.004, "peak learning rate of AdamW, which trains the rest", 0, 1e30)
    warmup: float = setting(0.1, "fraction of all steps in which the learning rate rises to its peak", 0, 0.999)
    momentum: float = setting(0.9, "Nesterov momentum of Muon", 0, 0.999)
    weight_decay: float = setting(0.05, "weight decay, not of BN and biases", 0, 100)
    label_smoothing: float = setting(0.1, "probability spread over all classes", 0, 0.999)
    ema_horizon: float = setting(0.05, "EMA horizon as a fraction of all steps, ramped up at the start", 0, 0.999)
    crop_padding: int = setting(4, "maximum random shift in pixels", 0, 511)
    flip: str = setting(
        "alternate",
        "mirror each image in every second epoch; none: for letters and digits",
        choices=("alternate", "none"),
    )
    cutout: int = setting(
        8, "side in pixels of a grey square in the training images without CutMix, 0 disables", 0, 224
    )
    cutmix: float | None = setting(
        None,
        "fraction of the training images that get CutMix instead of cutout (default: epochs / 90, at most 0.5)",
        0,
        1,
        kind=float,
    )
    no_augmentation_end: float = setting(0.1, "fraction of the epochs, at the end, with shifts and flips only", 0, 1)
    image_size: int = setting(32, "side in pixels to which pictures of your own are resized", 16, 512)
    holdout: int = setting(0, "hold out this many training images and evaluate on them, for tuning", 0, 1e6)
    seed: int = setting(0, "random seed", 0, 2**32 - 1)
    precision: str = setting(
        "auto", "of convolutions and matrix products; auto: bf16 where it is faster", choices=("auto", "bf16", "fp32")
    )
    compile: str = setting(
        "auto", "torch.compile; auto: on if epochs x training images >= 200,000", choices=("auto", "on", "off")
    )

    data_dir: Path = setting(
        Path("data"), "CIFAR-10 (downloaded if missing), or train/ and test/ with a folder per class", local=True
    )
    data_url: str | None = setting(
        None, "download CIFAR-10 from here only (default: several mirrors)", local=True, metavar="URL"
    )
    output_dir: Path = setting(Path("runs"), "folder of this run", local=True)
    device: str = setting("auto", "auto: cuda, else mps, else cpu", choices=DEVICES, local=True)
    threads: int = setting(0, "CPU threads, 0: PyTorch's choice", 0, 1024, local=True)
    synthetic: bool = setting(False, "train on drawn shapes, without any data set", local=True)
    fresh: bool = setting(False, "start over and replace the run in --output-dir", local=True)
    init_from: Path | None = setting(None, "start from the weights of this checkpoint (fine-tuning)", local=True)
    summary: bool = setting(False, "print the network layer by layer and exit", local=True)

    def __post_init__(self) -> None:
        if self.cutmix is None:  # fewer in shorter runs, which overfit less; not tuned
            object.__setattr__(self, "cutmix", min(0.5, self.epochs / 90))
        for item in fields(self):
            value, about = getattr(self, item.name), item.metadata
            if "choices" in about and value not in about["choices"]:
                raise ValueError(f"{flag(item.name)} must be one of {', '.join(about['choices'])}, got {value}")
            if about["low"] is not None and not about["low"] <= value <= about["high"]:
                raise ValueError(
                    f"{flag(item.name)} must be from {about['low']:,.10g} to {about['high']:,.10g}, got {value}"
                )
        if self.crop_padding >= self.image_size:
            raise ValueError(
                f"--crop-padding must be less than --image-size {self.image_size}, got {self.crop_padding}"
            )
        if self.synthetic and (self.data_url or self.data_dir != Config.data_dir):
            raise ValueError("--synthetic draws its own images: leave out --data-dir and --data-url")
        if self.init_from and self.init_from.resolve().parent == self.output_dir.resolve():
            raise ValueError(f"--init-from {self.init_from}: in this run's own folder; choose another --output-dir")

    def recipe(self) -> dict[str, Any]:
        """Return the training settings: they are saved, and compared when a run resumes."""
        return {item.name: getattr(self, item.name) for item in fields(self) if "local" not in item.metadata}


# ---- Command line --------------------------------------------------------------------------------------------------


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def argument(kind: type, low: float | None = None, high: float | None = None) -> Callable[[str], Any]:
    """Return a type for argparse: a number within its limits, or any other value that is not empty."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if text and (low is None or low <= value <= high):
                return value
        expected = {int: "a whole number", float: "a number"}.get(kind, "a value")
        limits = "" if low is None else f" from {low:,.10g} to {high:,.10g}"
        raise argparse.ArgumentTypeError(f"expected {expected}{limits}, got {text!r}")

    return parse


def parse_command_line(name: str) -> Config:
    """Make the flags from the fields of Config and parse them; a bad one ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=f"Train the {name} network on CIFAR-10 or on folders of pictures. The same command resumes a run.",
        epilog=f"example: python mobilenetv4_{name}.py --epochs 10 --data-dir pictures --output-dir runs/pictures",
        allow_abbrev=False,
    )
    training = parser.add_argument_group("training settings")
    local = parser.add_argument_group("data, output and device")
    for item in fields(Config):
        group, about = local if "local" in item.metadata else training, item.metadata
        kind = about.get("kind", type(item.default))
        help = about["help"] + " (default: %(default)s)" * (kind is not bool and item.default is not None)
        options: dict[str, Any] = dict(default=item.default, help=help)
        if kind is bool:
            options |= dict(action="store_true")
        elif "choices" in about:
            options |= dict(choices=about["choices"])
        elif kind in (int, float):
            options |= dict(type=argument(kind, about["low"], about["high"]), metavar={int: "N", float: "X"}[kind])
        else:
            metavar = about.get("metavar", "PATH")
            options |= dict(type=argument(Path if metavar == "PATH" else str), metavar=metavar)
        group.add_argument(flag(item.name), **options)
    parser.set_defaults(output_dir=Path("runs", name))
    try:
        return Config(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


# ---- Errors and Ctrl-C ---------------------------------------------------------------------------------------------


def one_line(error: Exception) -> str:
    """Return the message of any exception as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def printable(text: Any) -> str:
    """Escape line breaks, terminal codes and undecodable bytes, which names of files and classes may hold."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


@contextlib.contextmanager
def errors_in_one_line(advice: str = "") -> Iterator[None]:
    """End the program with one line and status 1 on an expected failure: RunError, no memory (what to do about it is
    `advice`), a closed pipe."""
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed: the next file opened would get what is printed
            setattr(sys, stream, open(os.devnull, "r+"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook or IDLE
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RunError as error:
        sys.exit("error: " + "\n".join(map(printable, str(error).splitlines())))
    except (MemoryError, RuntimeError) as error:
        no_memory = "out of memory|not enough memory|can't alloc|ALLOC_FAILED"  # the last: cuBLAS, cuDNN
        if isinstance(error, MemoryError) or re.search(no_memory, str(error)):
            sys.exit(f"error: out of memory{advice}")
        raise


def stop_on_interrupt() -> None:
    """End at once on Ctrl-C: an exception could be swallowed by code that is compiling."""

    def stop(*_: Any) -> None:
        os.write(2, b"\ninterrupted; the same command (without --fresh) resumes after the last finished epoch\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, stop)
