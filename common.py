"""Train and evaluate an image classifier on CIFAR-10, or on any folder of class folders: the loop of both scripts.

A script hands over a name, a function that builds its network, and a function that returns, for a configuration, the
builder's arguments as plain values:

    common.main("baseline", MobileNetV4, lambda config: dict(width=1.15, strides=(1, 1, 2, 2, 2), dropout=0.1))

The file reads in the order in which data flows: configuration, device, data, augmentation, summary, optimizer,
training, evaluation, checkpoint, run. Everything random is a function of (seed, epoch) and the learning rate is a
function of the step, so a run that was interrupted continues as if nothing had happened.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import hashlib
import http.client
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import (
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    equalize,
)
from tqdm import tqdm

try:
    import fcntl  # POSIX only; elsewhere nothing is locked
except ImportError:
    fcntl = None

FORMAT = 1  # of the checkpoint; raised when an older program could misread it
PARTS = dict(format=int, variant=str, network=dict, recipe=dict, data=str, epoch=int, model=dict, averaged=dict)
WAYS_ON = "give this run a place of its own with --output-dir, or replace that one with --fresh"


class RunError(Exception):
    """An expected failure, told to the user in one line."""


class CheckpointError(RunError):
    """A checkpoint that cannot be used, or is of another run; whoever wanted to continue it is told the ways on."""


# ---- Configuration -------------------------------------------------------------------------------------------------


def setting(default: Any, help: str, low: float | None = None, high: float | None = None, **more: Any) -> Any:
    """A field of the configuration: a number from `low` to `high`, one of `choices`, a text, a folder or a switch."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, **more})


@dataclass(frozen=True)
class Config:
    """A run. All but places and actions decides the weights that come out: it is saved, and compared on continuing."""

    recipe: str = setting(
        "default", "long: 300 epochs, more augmentation and larger maps, for a GPU", choices=("default", "long")
    )
    epochs: int = setting(45, "passes over the training images", 1, 1e6)
    batch_size: int = setting(128, "images per step", 2, 1e6)
    learning_rate: float = setting(0.025, "peak rate of Muon, which trains the inner matrices", 0, 1e30)
    adam_learning_rate: float = setting(0.004, "peak rate of AdamW, for all else", 0, 1e30)
    warmup: float = setting(0.1, "part of the steps in which the rate rises to its peak", 0, 0.999)
    momentum: float = setting(0.9, "momentum of Muon", 0, 0.999)
    weight_decay: float = setting(0.05, "decay of matrices, per step times the rate", 0, 100)
    label_smoothing: float = setting(0.1, "probability spread over all classes", 0, 0.999)
    clip_norm: float = setting(0.0, "longest gradient, 0 for no limit", 0, 1e30)
    average: float = setting(0.05, "memory of the averaged weights: this part of all steps, less at first", 0, 0.999)
    crop_padding: int = setting(4, "pixels by which training images are shifted at most", 0, 511)
    flip: str = setting("alternate", "mirror training images; none: for letters", choices=("alternate", "none"))
    cutout: int = setting(8, "side in pixels of a square hidden in training images", 0, 224)
    cutmix: float = setting(0.0, "part of the training images that get a square of another one", 0, 1)
    photometric: float = setting(0.0, "part of the training images that get one of nine operations on colours", 0, 1)
    plain_end: float = setting(0.0, "part of the epochs, at the end, without cutout, cutmix and photometric", 0, 1)
    image_size: int = setting(32, "side in pixels to which class-folder images are brought", 16, 512)
    holdout: int = setting(0, "train without this many images and evaluate on them, for tuning", 0, 1e6)
    seed: int = setting(0, "of everything random", 0, 2**32 - 1)
    precision: str = setting("auto", "of most operations; auto: what is faster here", choices=("auto", "bf16", "fp32"))
    compile: str = setting("auto", "compile the network; auto: where it pays back", choices=("auto", "on", "off"))

    data_dir: Path = setting(Path("data"), "CIFAR-10, or train/ and test/ with a folder for each class", place=True)
    data_url: str = setting(CIFAR10.url, "where CIFAR-10 is downloaded from; its MD5 decides", place=True)
    output_dir: Path = setting(Path("runs"), "where the run is kept", place=True)
    device: str = setting("auto", "cuda, else mps, else cpu", choices=("auto", "cuda", "mps", "cpu"), place=True)
    threads: int = setting(0, "CPU threads, 0 for PyTorch's choice", 0, 1024, place=True)
    synthetic: bool = setting(False, "train on made-up images, to try the installation", place=True)
    fresh: bool = setting(False, "start over, replacing the run that is there", place=True)
    init_from: Path | None = setting(None, "begin with this checkpoint's averaged weights", place=True)
    evaluate: Path | None = setting(None, "evaluate FILE, or else the run's checkpoint, and stop", place=True)
    summary: bool = setting(False, "print the network's table and stop", place=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, about = getattr(self, item.name), item.metadata
            if "choices" in about and value not in about["choices"]:
                raise ValueError(f"{item.name} must be one of {', '.join(about['choices'])}, got {value}")
            if about["low"] is not None and not about["low"] <= value <= about["high"]:
                raise ValueError(f"{item.name} must be from {about['low']:g} to {about['high']:g}, got {value}")
        if self.crop_padding >= self.image_size:
            raise ValueError(f"crop_padding must be less than image_size {self.image_size}, got {self.crop_padding}")

    def decisive(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if "place" not in item.metadata}


LONG = dict(epochs=300, cutmix=0.5, photometric=1.0, plain_end=0.1)  # of --recipe long; other flags change it


def reader(kind: type, low: float | None, high: float | None) -> Callable[[str], Any]:
    """Return what reads a flag: a number within its limits, or else anything that is not empty."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if text and (low is None or low <= value <= high):
                return value
        wanted = {int: "a whole number", float: "a number"}.get(kind, "something")
        limits = "" if low is None else f" from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"expected {wanted}{limits}, got {text!r}")

    return read


def parse_command_line(name: str) -> Config:
    """Make the flags from the fields of Config and read them; a bad one ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=f"Train the {name} network on CIFAR-10 or on class folders; the same command continues the run.",
        epilog=f"example: python mobilenetv4_{name}.py --epochs 10 --data-dir pictures --output-dir runs/pictures",
        allow_abbrev=False,
    )
    recipe = parser.add_argument_group("recipe: decides the weights that come out")
    places = parser.add_argument_group("places and actions")
    for item in fields(Config):
        group, about = places if "place" in item.metadata else recipe, item.metadata
        flag, kind = "--" + item.name.replace("_", "-"), type(item.default)
        text = about["help"] + " (default: %(default)s)"
        if kind is bool:
            group.add_argument(flag, action="store_true", help=about["help"])
        elif "choices" in about:
            group.add_argument(flag, choices=about["choices"], default=item.default, help=text)
        elif item.default is None:
            may_be_alone = {"nargs": "?", "const": True} if item.name == "evaluate" else {}
            group.add_argument(flag, type=reader(Path, None, None), metavar="FILE", help=about["help"], **may_be_alone)
        else:
            unit = {int: "N", float: "X", str: "URL"}.get(kind, "DIR")
            read = reader(Path if unit == "DIR" else kind, about["low"], about["high"])
            group.add_argument(flag, type=read, default=item.default, metavar=unit, help=text)
    parser.set_defaults(output_dir=Path("runs", name))
    if parser.parse_args().recipe == "long":
        parser.set_defaults(**LONG)
    options = parser.parse_args()
    if options.evaluate is True:
        options.evaluate = options.output_dir / "checkpoint.pt"
    try:
        return Config(**vars(options))
    except ValueError as error:
        parser.error(str(error))


# ---- Device --------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Make Linux keep freed memory in the process, in huge pages; must come before the first tensor.

    Otherwise each activation of tens of megabytes goes back to the kernel and is faulted in again, page by page, at
    every step. Elsewhere this does nothing.
    """
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
        m_trim_threshold, m_mmap_max = -1, -4  # from glibc's malloc.h; another C library may have no mallopt
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)


def pick_device(requested: str, threads: int) -> torch.device:
    """Return the device asked for, or the best there is, with PyTorch set up for it."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if requested not in ("auto", *found):
        raise RunError(f"--device {requested}: there is none here; this machine has {', '.join(found)}")
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # numbers too small for the normal format would be tens of times slower
    torch.backends.cudnn.deterministic = True
    device = found[0] if requested == "auto" else requested
    return torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)


def join_processes(device: torch.device) -> None:
    """Join the other processes that torchrun started; without torchrun this does nothing."""
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # one machine: its restarts would find addresses of the dead
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def rank_and_size() -> tuple[int, int]:
    """Return which of the processes that train together this one is, from 0, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def from_first(value: Any) -> Any:
    """Return what the first process has."""
    box = [value]
    if rank_and_size()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]


def average_processes(tensors: list[Tensor]) -> None:
    """Replace tensors of one type by their mean over all processes."""
    _, size = rank_and_size()
    if size > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def layout(device: torch.device) -> torch.memory_format:
    """Return the faster order of an image tensor's values: channels last, which is 30 times slower on MPS alone."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def settle(config: Config, device: torch.device, images: int, saved: dict[str, Any] | None) -> Config:
    """Replace each `auto` of the recipe, by what the run began with or else by what suits the device.

    Compilation is chosen from the configured total, never from what is left, so that a continued run agrees.
    """
    if config.batch_size > images:
        print(f"notice: --batch-size {config.batch_size} is brought down to the {images} training images")
        config = replace(config, batch_size=images)
    _, size = rank_and_size()
    if config.batch_size % size or config.batch_size < 2 * size:  # BN needs two images
        raise RunError(
            f"--batch-size {config.batch_size}: {size} processes cannot share it equally, two images or more each"
        )
    pays_back = config.epochs * images >= 200_000 and device.type != "mps"  # compiling is won back on some 120,000
    choices = {"precision": fastest_precision(device), "compile": "on" if pays_back else "off"} | (saved or {})
    if config.compile == "auto" and choices["compile"] == "on" and not saved and not can_compile(device):
        choices["compile"] = "off"
    return replace(config, **{key: choices[key] for key in ("precision", "compile") if getattr(config, key) == "auto"})


def fastest_precision(device: torch.device) -> str:
    """Return bf16 where the device computes with it, else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # AMX brings it too
    return "bf16" if fast else "fp32"


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Try to compile something small; where that fails, say so in one line."""
    try:
        with compiling():
            torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever is missing: a C++ compiler, its headers, Triton
        print(f"notice: nothing can be compiled here, training goes on uncompiled, slower ({one_line(error)})")
        return False


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Have the cache of compiled code for this process alone, and leave a mark there until all is on the disk.

    A process that dies meanwhile leaves damaged files, which PyTorch would try to load, or take for a processor that
    can do less; the next process finds the mark and drops the cache.
    """
    codecache = importlib.import_module("torch._inductor.codecache")  # has settled already where headers go
    cache = Path(torch.hub.get_dir()).with_name("compiled")
    if " " in str(cache):  # at which the compiler's command line would be split
        cache = Path(codecache.default_cache_dir(), "compiled")
    mark = cache / "compiling"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(cache.with_name(cache.name + ".lock"), wait=True):
        if mark.exists():
            shutil.rmtree(cache)
        cache.mkdir(exist_ok=True)
        mark.touch()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(cache / "headers"), str(cache / "headers" / "locks")
        yield
        if os.name == "posix":
            os.sync()
        mark.unlink()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---- Data ----------------------------------------------------------------------------------------------------------


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
    fingerprint: str


Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, 3) uint8, labels (N,) int64


def load_data(config: Config, device: torch.device) -> Data:
    """Load training and test images from class folders, else as CIFAR-10, with everything derived from them."""
    if config.synthetic:
        source, classes, train, test = "synthetic images: the accuracy means nothing", *synthetic_images(config)
    elif any((config.data_dir / split).is_dir() for split in ("train", "test")):
        source, classes, train, test = f"class folders in {config.data_dir}", *read_folders(config)
    elif config.image_size != 32:
        raise RunError(f"--image-size {config.image_size}: CIFAR-10 has 32; other sizes are for class folders")
    else:
        source, classes, train, test = f"CIFAR-10 in {config.data_dir}", *read_cifar10(config)
    if config.holdout:
        train, test = split_holdout(train, config.holdout, len(classes))
        source += f", the last {len(test[1])} training images held out"
    if len(train[1]) < 2:
        raise RunError(f"{source}: at least 2 training images are needed, got {len(train[1])}")
    digest = hashlib.sha256(repr(classes).encode())
    for array in (*train, *test):
        digest.update(array)
    fingerprint = f"{len(train[1])} + {len(test[1])} images, {digest.hexdigest()[:16]}"
    tensors = [torch.from_numpy(array).to(device) for array in (*train, *test)]
    return Data(source, classes, *tensors, *channel_statistics(train[0]), fingerprint)


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel in 0..1, exactly, from the counts of the 256 values."""
    counts = np.zeros((3, 256))
    for batch in np.array_split(images, len(images) // 1000 + 1):
        counts += [np.bincount(batch[..., channel].ravel(), minlength=256) for channel in range(3)]
    values, pixels = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / pixels
    variance = counts @ values**2 / pixels - mean**2
    return mean.tolist(), np.sqrt(np.maximum(variance, 1e-5)).tolist()


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


def synthetic_images(config: Config) -> tuple[list[str], Arrays, Arrays]:
    """Make noisy images of ten random patterns, one for each class."""
    generator, shape = np.random.default_rng(0), (config.image_size, config.image_size, 3)
    patterns = generator.integers(0, 128, (10, *shape), dtype=np.uint8)

    def draw(count: int) -> Arrays:
        labels = np.arange(count, dtype=np.int64) % 10
        return patterns[labels] + generator.integers(0, 128, (count, *shape), dtype=np.uint8), labels

    return [f"pattern {label}" for label in range(10)], draw(1280), draw(320)


FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")  # of pictures; some others would start programs


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """Bring any picture to RGB and `size` x `size` pixels: the square in its centre, resized.

    This is the one rule for training images, test images and prediction.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I"):
        raise ValueError("32 bits a pixel, of unknown range")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = (left, top, left + side, top + side)
    return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, square)


def read_folders(config: Config) -> tuple[list[str], Arrays, Arrays]:
    """Read <data-dir>/train and /test, each ordered by (file name, class)."""
    root, size = config.data_dir, config.image_size
    try:
        folders = [ImageFolder(str(root / split)) for split in ("train", "test")]
    except FileNotFoundError as error:  # no train or test, no class, or an empty one
        raise RunError(f"{root}: {error}") from None
    classes = folders[0].classes
    if other := set(classes) ^ set(folders[1].classes):
        raise RunError(f"{root}: only one of train and test has {', '.join(sorted(other))}")
    splits = [sorted(split.samples, key=lambda item: (os.path.basename(item[0]), item[1])) for split in folders]
    check_memory(root, sum(map(len, splits)) * size * size * 3)
    with contextlib.ExitStack() as alone:  # of two runs that begin together, the second takes the first one's cache
        with contextlib.suppress(OSError):  # a folder that cannot be written has neither lock nor cache
            alone.enter_context(exclusive(root / ".data.lock", wait=True))
        images = read_images(root, splits, size)
    labels = [np.array([label for _, label in split], dtype=np.int64) for split in splits]
    return classes, (images[0], labels[0]), (images[1], labels[1])


def read_images(root: Path, splits: list[list[tuple[str, int]]], size: int) -> list[np.ndarray]:
    """Return the pictures of both splits, decoded, or from the cache beside them where not one has changed."""
    files = [(path, os.stat(path)) for split in splits for path, _ in split]
    if links := len(files) - len({(status.st_dev, status.st_ino) for _, status in files}):
        print(f"notice: {links} of the {len(files)} pictures in {root} are links to others of them")
    listing = [(path.removeprefix(str(root)), status.st_size, status.st_mtime_ns) for path, status in files]
    key, cache = hashlib.sha256(repr((FORMAT, size, listing)).encode()).hexdigest(), root / f".cache-{size}px.npz"
    images = read_cache(cache, key, [(len(split), size, size, 3) for split in splits])
    if images is None:
        with tqdm(total=len(files), desc="reading images", unit="", leave=False, disable=None) as bar:
            images = [decode([path for path, _ in split], size, bar) for split in splits]
        with contextlib.suppress(RunError), replacing(cache) as file:
            np.savez(file, key=key, train=images[0], test=images[1])
    return images


def check_memory(root: Path, needed: int) -> None:
    """Refuse images whose `needed` bytes are more than half of this machine's memory."""
    memory = math.inf
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells its memory
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise RunError(
            f"{root}: its images take {needed / 2**30:.1f} GiB at this size, more than half of the "
            f"{memory / 2**30:.1f} GiB here; a smaller --image-size takes less"
        )


def read_cache(path: Path, key: str, shapes: list[tuple[int, ...]]) -> list[np.ndarray] | None:
    """Return the decoded images, or None where there is no cache, or a damaged one, or one of other files."""
    try:
        check_archive(path, path.stat().st_size)
        with np.load(path, allow_pickle=False) as cache:  # a zip archive, whose checksums are verified
            arrays = [np.ascontiguousarray(cache[name]) for name in ("train", "test")]
            fresh = str(cache["key"]) == key and [array.shape for array in arrays] == shapes
    except Exception:  # a damaged file can fail anywhere in the parsers
        return None
    return arrays if fresh and {array.dtype for array in arrays} == {np.dtype(np.uint8)} else None


def check_archive(file: Path | BinaryIO, size: int) -> None:
    """Refuse a zip archive that would fill the memory: one that unpacks to more than the `size` of its file."""
    with zipfile.ZipFile(file) as archive:
        if sum(item.file_size for item in archive.infolist()) > size:
            raise ValueError(f"it unpacks to more than its {size:,} bytes")


def decode(paths: list[str], size: int, bar: tqdm) -> np.ndarray:
    """Return the pictures as uint8 (N, size, size, 3); one that cannot be read is named."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for index, path in enumerate(paths):
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device might never end
            raise RunError(f"{path}: not a file")
        try:
            with Image.open(path, formats=FORMATS) as image:
                images[index] = np.asarray(fit_image(image, size))
        except Exception as error:  # a damaged file can fail anywhere in the decoders
            raise RunError(f"{path}: not a readable image ({one_line(error)})") from None
        bar.update()
    return images


def read_cifar10(config: Config) -> tuple[list[str], Arrays, Arrays]:
    """Read the official batches, each after its MD5; fetch them first where one is missing or damaged."""
    try:
        splits = official_batches(config.data_dir)
    except RuntimeError:
        splits = fetch_cifar10(config.data_dir, config.data_url)
    train, test = ((np.ascontiguousarray(split.data), np.array(split.targets, dtype=np.int64)) for split in splits)
    return list(splits[0].classes), train, test


def official_batches(root: Path) -> list[CIFAR10]:
    return [CIFAR10(root, train=train) for train in (True, False)]


def fetch_cifar10(root: Path, url: str) -> list[CIFAR10]:
    """Extract the official archive into `root`, downloading it if it is not there. One process at a time does so."""
    archive = root / CIFAR10.filename
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive(root / ".data.lock", wait=True):
            with contextlib.suppress(RuntimeError):
                return official_batches(root)  # another process was faster
            if not check_integrity(archive, CIFAR10.tgz_md5):
                print(f"downloading CIFAR-10 (170 MB) from {url} to {root}")
                download(url, archive, CIFAR10.tgz_md5)
            shutil.unpack_archive(archive, root, filter="data")  # nothing is written outside of `root`
            return official_batches(root)
    except (OSError, RuntimeError, ValueError, tarfile.TarError, http.client.HTTPException) as error:
        raise RunError(
            f"CIFAR-10 is not in {root} and cannot be had from {url} ({one_line(error)}). Ways on: put "
            f"{CIFAR10.filename} (MD5 {CIFAR10.tgz_md5}) into {root}; name a mirror with --data-url; point --data-dir "
            "to a folder with train/ and test/ that hold a folder of images for each class; try the installation "
            "with --synthetic"
        ) from None


ARCHIVE_BYTES = 170_498_071


def download(url: str, archive: Path, md5: str) -> None:
    """Download `url`, continuing what an earlier try left; only a file with this MD5 becomes `archive`.

    Raises:
        OSError: if a try brings nothing new (30 seconds without a byte end it), or if the MD5 is another.
    """
    part, longest = archive.with_name(archive.name + ".part"), -1
    while not check_integrity(part, md5):
        size = part.stat().st_size if part.exists() else 0
        if size <= longest:
            raise OSError(f"the connection broke after {size:,} bytes")
        longest = size
        request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
        try:
            response = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what lies there is no beginning of this file
                part.unlink()
            raise
        start = size if response.status == 206 else 0
        whole = start + int(response.headers["Content-Length"] or 0)
        bar = tqdm(total=whole or None, initial=start, unit="B", unit_scale=True, leave=False, disable=None)
        cut = contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException)
        with response, bar, open(part, "ab" if start else "wb") as file, cut:
            while block := response.read(1 << 16):
                bar.update(file.write(block))
                if file.tell() > ARCHIVE_BYTES:
                    part.unlink()
                    raise OSError(f"what came is larger than {ARCHIVE_BYTES:,} bytes")
        if part.stat().st_size >= whole > start and not check_integrity(part, md5):
            part.unlink()
            raise OSError(f"the MD5 of what came is not {md5}")
    os.replace(part, archive)


# ---- Augmentation --------------------------------------------------------------------------------------------------


def random_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a generator on the CPU that is a function of (seed, epoch), so that devices draw the same."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_epoch(count: int, config: Config, epoch: int, device: torch.device) -> dict[str, Tensor]:
    """Draw the order of an epoch's images and, in this order, the shift, reflection, square and colours of each.

    Which images are reflected alternates from epoch to epoch (Jordan, arXiv 2404.00498), so that any two epochs in
    succession show each image both ways. The square of an image is a piece of another one, whose area is uniform
    until the border cuts it (CutMix; Yun et al., arXiv 1905.04899, with one square a batch), or grey, of fixed size
    (cutout; DeVries and Taylor, arXiv 1708.04552).
    """
    generator = random_generator(config.seed, epoch)
    order = torch.randperm(count, generator=generator)
    shift = torch.randint(-config.crop_padding, config.crop_padding + 1, (count, 2), generator=generator)
    centre = torch.randint(0, config.image_size, (count, 2), generator=generator)
    first = torch.randint(0, 2, (count,), generator=random_generator(config.seed, 0)).bool()
    flip = (first ^ bool(epoch % 2)) & (config.flip == "alternate")
    mixed, area, colored, strength = torch.rand(4, count, generator=generator)
    mixed = mixed < config.cutmix
    side = torch.where(mixed, (config.image_size * area.sqrt()).round().long(), config.cutout)
    operation = torch.randint(0, len(OPERATIONS), (count,), generator=generator)
    operation = torch.where(colored < config.photometric, operation, OPERATIONS.index("none"))
    if epoch > config.epochs - round(config.epochs * config.plain_end):
        side, operation = torch.zeros_like(side), torch.full_like(operation, OPERATIONS.index("none"))
    drawn = dict(shift=shift, flip=flip, centre=centre, side=side, mixed=mixed)
    drawn |= dict(operation=operation, strength=2 * strength - 1)
    return {"order": order.to(device)} | {name: tensor[order].to(device) for name, tensor in drawn.items()}


def augment(data: Data, drawn: dict[str, Tensor], batch: slice, config: Config) -> tuple[Tensor, Tensor]:
    """Gather a batch of training images and labels, augmented as drawn.

    Returns:
        Images, (N, H, W, 3) uint8, and labels, (N,) int64, or with CutMix their shares (N, classes) float32.
    """
    drawn = {name: tensor[batch] for name, tensor in drawn.items()}
    images, labels = shift_and_flip(data.train_images, drawn), data.train_labels[drawn["order"]]
    if config.photometric:
        images = change_colors(images, drawn["operation"], drawn["strength"])
    if not config.cutout and not config.cutmix:
        return images, labels
    pixels = torch.arange(images.shape[1], device=images.device)
    place = pixels - drawn["centre"][:, :, None] + drawn["side"][:, None, None] // 2  # in the square, (N, 2, size)
    inside = (place >= 0) & (place < drawn["side"][:, None, None])
    square = inside[:, 0, :, None] & inside[:, 1, None, :]  # (N, H, W)
    if not config.cutmix:
        return images.masked_fill(square[..., None], 128), labels
    mixed = drawn["mixed"][:, None, None, None]
    images = torch.where(square[..., None], torch.where(mixed, images.roll(1, 0), 128), images)
    shares = F.one_hot(labels, len(data.classes)).float()
    other = (square.float().mean((1, 2)) * drawn["mixed"])[:, None]
    return images, shares.lerp(shares.roll(1, 0), other)


def shift_and_flip(images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Gather of images (all, H, W, 3) those drawn, each shifted, reflecting at the borders, and then reflected."""
    size = images.shape[1]
    pixels = torch.arange(size, device=images.device)
    rows, columns = ((pixels + drawn["shift"][:, axis, None]).abs() for axis in (0, 1))  # (N, size)
    rows, columns = (size - 1 - (size - 1 - place).abs() for place in (rows, columns))
    columns = torch.where(drawn["flip"][:, None], columns.flip(1), columns)
    return images[drawn["order"][:, None, None], rows[:, :, None], columns[:, None, :]]


OPERATIONS = (
    "none", "brightness", "contrast", "saturation", "sharpness", "posterize", "solarize", "autocontrast", "equalize"
)  # fmt: skip


def change_colors(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Change each image by the one operation and strength drawn for it: the colour half of TrivialAugment.

    Operations and their ranges: Mueller and Hutter, arXiv 2103.10158, the wide table. torchvision's own class draws
    once for a whole batch; its functions are the tests' oracle.

    Shapes: images (N, H, W, 3) uint8, operation (N,) an index of OPERATIONS, strength (N,) in -1..1.
    """
    x = images.permute(0, 3, 1, 2)
    strength = strength[:, None, None, None]
    exact, factor, none = x.float(), 1 + 0.99 * strength, 0.0
    ends = torch.zeros_like(x), adjust_contrast(x, none), adjust_saturation(x, none), adjust_sharpness(x, none)
    blends = [torch.lerp(end.float(), exact, factor).clamp(0, 255).to(torch.uint8) for end in ends]
    lost = (6 * strength.abs()).round().to(torch.uint8)  # bits
    posterized = x >> lost << lost
    solarized = torch.where(x >= 255 * (1 - strength.abs()), 255 - x, x)
    results = torch.stack([x, *blends, posterized, solarized, autocontrast(x), equalize(x)])
    return results[operation, torch.arange(len(x), device=x.device)].permute(0, 2, 3, 1)


def make_forward(network: nn.Module, data: Data, config: Config) -> Callable[[Tensor], Tensor]:
    """Return the function from images, uint8 (N, H, W, 3), to logits, float32 (N, classes)."""
    device = data.train_images.device
    mean, std = (torch.tensor(values, device=device) * 255 for values in (data.mean, data.std))

    def forward(images: Tensor) -> Tensor:
        inputs = ((images.float() - mean) / std).permute(0, 3, 1, 2)  # (N, 3, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return network(inputs.contiguous(memory_format=layout(device))).float()

    return forward


# ---- Summary -------------------------------------------------------------------------------------------------------


def named_parts(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each part that gets a row in the summary: plain Sequentials are looked into."""
    for name, part in network.named_children():
        if type(part) is nn.Sequential:
            yield from named_parts(part, f"{prefix}{name}.")
        else:
            yield prefix + name, part


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, image_size: int) -> dict[str, int]:
    """Return the multiply-accumulates of convolutions and matrix products for one image, by module ("" is all)."""
    network = copy.deepcopy(network).to("cpu").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, image_size, image_size))
    root, counts = type(network).__name__, counter.get_flop_counts()
    return {name.removeprefix(root).removeprefix("."): sum(flops.values()) // 2 for name, flops in counts.items()}


def print_summary(network: nn.Module, image_size: int) -> None:
    """Print kind, output shape, parameters and MACs of each part, and the totals."""
    macs = count_macs(network, image_size)

    def show(name: str, part: nn.Module, _inputs: Any, output: Tensor) -> None:
        kind, shape = getattr(part, "kind", type(part).__name__), " x ".join(map(str, output.shape[1:]))
        print(f"{name:<12}{kind:<20}{shape:<16}{count_parameters(part):>12,}{macs.get(name, 0):>14,}")

    print(f"{'layer':<12}{'kind':<20}{'output':<16}{'parameters':>12}{'MACs':>14}")
    for name, part in named_parts(network):
        part.register_forward_hook(functools.partial(show, name))
    network.eval()(torch.zeros(1, 3, image_size, image_size))
    print(f"{'total':<48}{count_parameters(network):>12,}{macs['']:>14,}")


# ---- Optimizer -----------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Jordan et al., kellerjordan.github.io/posts/muon).

    torch.optim.Muon takes one two-dimensional parameter at a time; this one takes convolutions too, as matrices
    (out, in x height x width), and orthogonalises all of the same shape at once, very large ones in blocks of rows:
    whole, the one of this network would take as long as all convolutions forward, and train no better (results/tuning).

    Args:
        params: Weights of dense convolutions and linear layers.
        lr: Spectral norm of a step, times sqrt(rows / columns) for tall matrices.
        momentum: Of the gradients, Nesterov's.
        weight_decay: Part of the weights, times lr, that each step takes away.
        dtype: In which the matrix products are done.
    """

    LARGE, BLOCK = 512, 128  # of a matrix with more rows and columns, so many rows are taken at a time

    def __init__(
        self, params: Any, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            velocities = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, gradients)
            updates = torch._foreach_add(gradients, velocities, alpha=group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight, update in zip(weights, updates, strict=True):
                matrix = update.flatten(1)
                rows = self.BLOCK if min(matrix.shape) > self.LARGE else len(matrix)
                for part, block in zip(weight.split(rows), matrix.split(rows), strict=True):
                    shapes.setdefault(block.shape, []).append((part, block))
            for (rows, columns), pairs in shapes.items():
                steps = orthogonalize(torch.stack([matrix for _, matrix in pairs]).to(self.dtype))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for (weight, _), step in zip(pairs, steps, strict=True):
                    weight.add_(step.view_as(weight), alpha=-rate)


def orthogonalize(matrices: Tensor, iterations: int = 4) -> Tensor:
    """Bring the singular values of (B, rows, columns) near 1 by Newton-Schulz iterations of the fifth order."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a, b, c = 3.4445, -4.7750, 2.0315  # steepest at 0, after the post named above
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def make_optimizers(network: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Return Muon for dense and 1x1 convolutions and inner linear layers, and AdamW for all else.

    Only matrices decay: no depthwise convolution, no BN parameter, no bias.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    classifier = layers.pop().weight
    matrices = [layer.weight for layer in layers if getattr(layer, "groups", 1) == 1]
    taken = {id(weight) for weight in (*matrices, classifier)}
    others = [parameter for parameter in network.parameters() if id(parameter) not in taken]
    groups = [{"params": [classifier], "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return [
        Muon(matrices, config.learning_rate, config.momentum, config.weight_decay, dtype),
        torch.optim.AdamW(groups, config.adam_learning_rate, fused=True),
    ]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the part of the peak rate at `step` of `steps`: up in a line during the warm-up, then down to zero."""
    rise = warmup * steps
    return min((step + 1) / (rise + 1), (steps - step) / (steps - rise))


# ---- Training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What training changes: the network, the moving average of its weights and BN statistics, the optimizers."""

    raw: nn.Module
    averaged: nn.Module
    optimizers: list[torch.optim.Optimizer]


Loss = Callable[[Tensor, Tensor], Tensor]  # from images and labels, as augment returns them


def make_loss(state: State, data: Data, config: Config) -> Loss:
    """Return the loss to train with: compiled where the configuration says so, with gradients of all processes."""
    forward = make_forward(state.raw, data, config)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(forward(images), labels, label_smoothing=config.label_smoothing)

    if config.compile == "on" and can_compile(data.train_images.device):
        loss_of = compile_loss(loss_of, state, data, config)
    if rank_and_size()[1] > 1:
        loss_of = nn.parallel.DistributedDataParallel(LossModule(state.raw, loss_of))
        loss_of.broadcast_buffers = False  # train_epoch averages them, once in an epoch
    return loss_of


class LossModule(nn.Module):
    """A loss as a module, which DistributedDataParallel wants, with the network's parameters."""

    def __init__(self, network: nn.Module, loss_of: Loss) -> None:
        super().__init__()
        self.network, self.loss_of = network, loss_of

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss_of(images, labels)


def compile_loss(loss_of: Loss, state: State, data: Data, config: Config) -> Loss:
    """Compile the loss and its gradient, in a first step that leaves the network as it was."""
    # On a CPU what is cheap to compute again is not to go through memory, however often it is read.
    options = {"realize_reads_threshold": 100} if data.train_images.device.type == "cpu" else None
    fast = torch.compile(loss_of, dynamic=False, options=options)
    statistics = list(state.raw.train().buffers())
    before = [tensor.clone() for tensor in statistics]
    try:
        with compiling():
            share = slice(config.batch_size // rank_and_size()[1])
            drawn = draw_epoch(len(data.train_images), config, 1, data.train_images.device)
            fast(*augment(data, drawn, share, config)).backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RunError(f"the network cannot be compiled here ({one_line(error)}); --compile off does without") from None
    torch._foreach_copy_(statistics, before)
    state.raw.zero_grad()
    return fast


def train_epoch(state: State, loss_of: Loss, data: Data, config: Config, epoch: int, bar: tqdm) -> tuple[float, float]:
    """Train for one epoch (the first is 1); return its mean loss and the part of the peak rate at its end.

    The images that do not fill a batch are left out, others in each epoch. Of several processes, each takes its share
    of every batch. Losses stay on the device.
    """
    device, count, (rank, size) = data.train_images.device, len(data.train_images), rank_and_size()
    steps = count // config.batch_size
    total = config.epochs * steps
    state.raw.train()
    drawn = draw_epoch(count, config, epoch, device)
    torch.manual_seed(random_generator(config.seed, epoch).initial_seed() + rank)  # of dropout and stochastic depth
    averaging = floating_tensors(state.averaged), floating_tensors(state.raw)
    losses = torch.zeros(steps, device=device)
    for step in range(steps):
        done = (epoch - 1) * steps + step
        rate = schedule(done, total, config.warmup)
        start, share = step * config.batch_size, config.batch_size // size
        batch = slice(start + rank * share, start + (rank + 1) * share)
        loss = loss_of(*augment(data, drawn, batch, config))
        loss.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(state.raw.parameters(), config.clip_norm)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
        torch._foreach_lerp_(*averaging, max(1 / max(1.0, config.average * total), 10 / (10 + done)))
        losses[step] = loss.detach()
        bar.update()
        if step == steps - 1 or step % 100 == 99:  # reading a loss waits for the device
            average_processes([losses[: step + 1]])
            check_losses(losses[: step + 1], epoch, rate * config.learning_rate)
    average_processes([tensor for network in (state.raw, state.averaged) for tensor in statistics_of(network)])
    return losses.mean().item(), rate


def statistics_of(network: nn.Module) -> list[Tensor]:
    """Return BN's running means and variances."""
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]


def floating_tensors(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


def check_losses(losses: Tensor, epoch: int, rate: float) -> None:
    """Stop at the first loss that is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise RunError(
            f"the loss became {losses[bad[0]].item()} in epoch {epoch}, step {bad[0].item() + 1}, at a learning rate "
            f"of about {rate:.3g}; nothing of this epoch was saved; a lower --learning-rate may help"
        )


def check_epoch(state: State, logits: Tensor, epoch: int, rate: float) -> None:
    """Stop if a weight, a BN statistic or a logit is not finite, which finite losses can hide."""
    tensors = {"a logit of the evaluation": logits}
    for weights, network in (("raw", state.raw), ("averaged", state.averaged)):
        tensors |= {f"{name} of the {weights} weights": tensor for name, tensor in network.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(
                f"{name} is not finite after epoch {epoch}, with a learning rate of up to {rate:.3g}; this epoch was "
                "not saved; a lower --learning-rate may help"
            )


# ---- Evaluation ----------------------------------------------------------------------------------------------------

HEADLINE = "averaged"  # the weights a result is quoted for: chosen on held-out images, never on the test set


def accuracy_name(config: Config) -> str:
    return "holdout_accuracy" if config.holdout else "test_accuracy"


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, data: Data, config: Config, *, flip: bool = False) -> Tensor:
    """Return the logits of all images, float32 (N, classes) on the CPU, those of the reflected images if `flip`.

    Of several processes, each computes its share of the batches, and all get all logits.
    """
    network.eval()
    forward, (rank, size) = make_forward(network, data, config), rank_and_size()
    logits = torch.zeros(len(images), len(data.classes), device=images.device)
    share = max(1, min(250, 2**21 // images.shape[1] ** 2))  # at most two million pixels at a time
    batches = list(zip(images.split(share), logits.split(share), strict=True))
    for batch, result in batches[rank::size]:
        result.copy_(forward(batch.flip(2) if flip else batch))
    if size > 1:
        dist.all_reduce(logits)
    return logits.cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in per cent."""
    return 100 * (logits.argmax(1) == labels.cpu()).sum().item() / len(labels)


def evaluate(state: State, data: Data, config: Config) -> dict[str, Any]:
    """Evaluate raw and averaged weights on every test image, without and with flip test-time augmentation.

    Test-time augmentation averages the logits of an image and of its reflection. Per-class accuracies and the
    confusion matrix (rows: true classes) are those of the headline weights without it.
    """
    labels, classes, accuracies = data.test_labels.cpu(), len(data.classes), {}
    networks = {"raw": state.raw} if state.raw is not state.averaged else {}
    for weights, network in (networks | {"averaged": state.averaged}).items():
        logits = predict(network, data.test_images, data, config)
        mirrored = predict(network, data.test_images, data, config, flip=True)
        accuracies |= {weights: accuracy(logits, labels), weights + "_tta": accuracy(logits + mirrored, labels)}
        if weights == HEADLINE:
            confusion = (labels * classes + logits.argmax(1)).bincount(minlength=classes**2).view(classes, classes)
    per_class = 100 * confusion.diag().double() / confusion.sum(1)
    return {
        accuracy_name(config): accuracies,
        "per_class_accuracy": dict(zip(data.classes, per_class.tolist(), strict=True)),
        "confusion_matrix": confusion.tolist(),
    }


# ---- Checkpoint ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of `path` only when it is whole and on the disk; else nothing changes.

    Raises:
        RunError: naming `path` and the cause, if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a run that died
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise RunError(f"{path} cannot be written: {error.strerror or error}") from None
        raise


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock that dies with this process; without `wait`, raise BlockingIOError if another one holds it."""
    with open(path, "a+") as file:  # which changes nothing in what may lie there
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def save_checkpoint(path: Path, state: State, epoch: int, about: dict[str, Any]) -> None:
    """Save what a run needs to continue, with no time of day, so that equal runs give equal bytes."""
    weights = {"model": state.raw.state_dict(), "averaged": state.averaged.state_dict()}
    optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
    write_checkpoint(path, {"format": FORMAT, **about, "epoch": epoch, **weights, "optimizer": optimizers})


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write plain types and tensors as torch.save does, with a checksum as the comment of that zip archive.

    The archive's own checksums leave its directory out, where one flipped bit can exchange two tensors.
    """
    buffer = io.BytesIO()
    torch.save(plain(content), buffer)
    archive = buffer.getbuffer()[:-2]  # without the length of its comment, so far 0
    with replacing(path) as file:
        file.write(archive)
        file.write(b"\x20\x00" + hashlib.sha256(archive).digest())


def plain(value: Any) -> Any:
    """Rebuild nested plain types, since pickle's bytes tell which equal strings are one object and which are two."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value


@contextlib.contextmanager
def reading(path: Path, kind: str = "checkpoint") -> Iterator[None]:
    """Turn whatever a damaged or foreign file raises into one line."""
    try:
        yield
    except Exception as error:  # it can fail anywhere in the parsers
        raise CheckpointError(f"{path}: not a usable {kind} ({one_line(error)})") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU after its checksum, without ever running code from it.

    Raises:
        RunError: naming the file, if it is damaged, of another program, or of a newer format.
    """
    if not path.is_file():
        raise RunError(f"{path}: not a file")
    content = path.read_bytes()
    with reading(path):
        if hashlib.sha256(content[:-34]).digest() != content[-32:]:
            raise ValueError("it does not match its checksum")
        check_archive(io.BytesIO(content), len(content))
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved.get("format", 0) > FORMAT:
            raise ValueError(f"its format is {saved['format']}, this program reads up to {FORMAT}")
        if lacking := [key for key, kind in PARTS.items() if not isinstance(saved.get(key), kind)]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        values = [*saved["recipe"].values(), *saved["network"].values()]
        values = [item for value in values for item in (value if isinstance(value, list) else [value])]
        if odd := [type(value).__name__ for value in values if not isinstance(value, int | float | str)]:
            raise ValueError(f"a setting is a {odd[0]}")
        if not 1 <= saved["epoch"] <= saved["recipe"]["epochs"]:
            raise ValueError(f"its epoch is {saved['epoch']} of {saved['recipe']['epochs']}")
        return saved


def check_same_run(path: Path, saved: dict[str, Any], about: dict[str, Any]) -> None:
    """Refuse to continue a run that was begun otherwise, naming each difference with both values."""
    then, now = (
        {"variant": run["variant"], "data": run["data"], "init_from": run.get("init_from"), **run["network"]}
        | run["recipe"]
        for run in (saved, about)
    )
    keys = [key for key in then | now if then.get(key) != now.get(key)]
    if keys:
        changed = "; ".join(f"{key} was {then.get(key)} and is now {now.get(key)}" for key in keys)
        raise CheckpointError(f"{path} is of another run: {changed}")


def load_initial(config: Config, path: Path) -> dict[str, Any]:
    """Load the checkpoint to begin with, which is not to be `path`, the run's own."""
    if config.init_from.resolve() == path.resolve():
        raise RunError(f"--init-from {config.init_from}: it would be replaced by this run's; copy it elsewhere first")
    try:
        return load_checkpoint(config.init_from)
    except RunError as error:
        raise RunError(f"--init-from {error}") from None


def begin_with(path: Path, initial: dict[str, Any], network: nn.Module, classes: list[str]) -> None:
    """Copy the headline weights of a checkpoint into the network; where its classes are others, all but the classifier.

    Raises:
        RunError: if they are of another network.
    """
    *_, classifier = (name for name, layer in network.named_modules() if isinstance(layer, nn.Linear))
    own = {name: value for name, value in network.state_dict().items() if name.startswith(f"{classifier}.")}
    other = initial.get("classes") != classes
    try:
        network.load_state_dict(initial[HEADLINE] | (own if other else {}))
    except Exception as error:  # other names or shapes, or no tensors at all
        raise RunError(f"--init-from {path}: the weights of another network ({one_line(error)})") from None
    print(f"beginning with the weights of {path}" + f" and a new classifier of {len(classes)} classes" * other)


def restore(path: Path, saved: dict[str, Any], state: State, *, with_optimizers: bool = True) -> None:
    """Put weights and optimizer states back; other names, other shapes and values that are not finite are refused."""
    with reading(path):
        state.raw.load_state_dict(saved["model"] or saved["averaged"])
        state.averaged.load_state_dict(saved["averaged"])
        for tensor in (*floating_tensors(state.raw), *floating_tensors(state.averaged)):
            if not tensor.isfinite().all():
                raise ValueError("a weight is not finite")
        if not with_optimizers:
            return
        if "optimizer" not in saved:
            raise ValueError("it holds weights alone, which --evaluate takes")
        for optimizer, values in zip(state.optimizers, saved["optimizer"], strict=True):
            names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            optimizer.load_state_dict(
                {"state": values["state"], "param_groups": optimizer.state_dict()["param_groups"]}
            )
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                values = optimizer.state[parameter]
                if values.keys() != names or {value.shape for value in values.values() if value.ndim} != {
                    parameter.shape
                }:
                    raise ValueError("the optimizer's state has other names or shapes than the weights")


# ---- Run -----------------------------------------------------------------------------------------------------------


def run(name: str, build: Callable[..., nn.Module], arguments: dict[str, Any], config: Config) -> None:
    """Train from the beginning or from the checkpoint to the end, then evaluate, report and save."""
    keep_freed_memory()
    device = pick_device(config.device, config.threads)
    if config.summary:
        print_summary(build(num_classes=10, **arguments), config.image_size)
        return
    join_processes(device)
    rank, size = rank_and_size()

    # What is there already, and what can be told of it before the data are there
    path, summary = config.evaluate or config.output_dir / "checkpoint.pt", config.output_dir / "summary.json"
    initial = load_initial(config, path) if config.init_from and not config.evaluate else None
    saved = load_checkpoint(path) if rank == 0 and os.path.lexists(path) and not config.fresh else None
    saved = from_first(saved)
    if not saved and summary.exists() and not config.fresh and not config.evaluate:
        raise CheckpointError(f"{summary} is of a finished run whose checkpoint.pt is gone")
    if config.evaluate:
        if saved is None:
            raise RunError(f"--evaluate: there is no {path}, or --fresh would have it replaced")
        arguments = saved["network"]
        with reading(path):
            then = {key: value for key, value in saved["recipe"].items() if key in config.decisive()}
            config = replace(config, **{key: type(getattr(config, key))(value) for key, value in then.items()})
        if fastest_precision(device) == "fp32":  # where bf16 would be emulated
            config = replace(config, precision="fp32")
    about = {"variant": name, "network": plain(arguments)}
    if saved:
        known = {key: value for key, value in config.decisive().items() if value != "auto" and key != "batch_size"}
        recipe = saved["recipe"] | (known if not config.evaluate else {})
        check_same_run(path, saved, saved | about | {"recipe": recipe})

    # Data and network
    data = load_data(config, device)
    config = settle(config, device, len(data.train_images), saved and saved["recipe"])
    config = replace(config, **from_first(config.decisive()))  # another processor may choose otherwise
    about |= {
        "recipe": config.decisive(),
        "seed": config.seed,
        "data": data.fingerprint,
        "classes": data.classes,
        "image_size": config.image_size,
        "mean": data.mean,
        "std": data.std,
        "init_from": initial and hashlib.sha256(config.init_from.read_bytes()).hexdigest()[:16],
    }
    if config.evaluate:  # which an older program may have saved with fewer settings
        about |= {key: saved.get(key) for key in ("recipe", "init_from")}
    if from_first(about) != about:
        raise RunError(f"process {rank} has other settings or data than process 0")
    torch.manual_seed(config.seed)
    with reading(path) if config.evaluate else contextlib.nullcontext():
        network = build(num_classes=len(data.classes), **arguments)
    if initial and not saved:
        begin_with(config.init_from, initial, network, data.classes)
    network.to(device, memory_format=layout(device))
    averaged = copy.deepcopy(network) if not saved or saved["model"] else network  # published: one of the two alone
    state = State(network, averaged, make_optimizers(network, config))
    if saved:
        check_same_run(path, saved, about)
        restore(path, saved, state, with_optimizers=not config.evaluate)
    done = saved["epoch"] if saved else 0

    # What is about to happen
    reason = "the best found of cuda, mps, cpu" if config.device == "auto" else "asked for"
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {
        "parameters": count_parameters(network),
        "macs": count_macs(network, config.image_size)[""],
        "device": f"{device.type} ({reason}), {chip}, {size} x {torch.get_num_threads()} threads, {config.precision}, "
        f"compilation {config.compile}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}",
        "data": f"{data.source}: {len(data.train_images):,} training images, {len(data.test_images):,} for evaluation",
    }
    print(f"{name}: {facts['parameters']:,} parameters, {facts['macs']:,} MACs per image of {config.image_size} pixels")
    print(f"network: {', '.join(f'{key} {value}' for key, value in about['network'].items())}")
    print(*(f"{key}: {facts[key]}" for key in ("device", "versions", "data")), sep="\n")
    doing = "evaluating" if config.evaluate else "training" if done < config.epochs else "nothing to train"
    print(f"{doing}: {done} of {config.epochs} epochs done in {config.evaluate or config.output_dir}")
    if 0 < done < config.epochs and not config.evaluate:
        print(f"continuing after epoch {done}: bit for bit on the same machine, device, versions and thread count")

    # Training, evaluation, report
    seconds = 0.0 if config.evaluate else train(state, data, config, about, done)
    results = evaluate(state, data, config)
    for weights, value in results[accuracy_name(config)].items():
        print(f"{accuracy_name(config)} {weights:<13}{value:6.2f}%{'  (headline)' if weights == HEADLINE else ''}")
    if config.synthetic:
        print("the images are made up: this accuracy means nothing")
    if not config.evaluate and rank == 0:
        if done < config.epochs or not summary.exists():  # a finished run's stays that of what trained
            report = {"variant": name, "epochs": config.epochs, "headline": HEADLINE, **results, **facts}
            report["seconds"] = None if math.isnan(seconds) else round(seconds, 1)
            report |= {"network": about["network"], "configuration": asdict(config)}
            with replacing(summary) as file:
                file.write(json.dumps(report, indent=2, default=str).encode())
        print(f"{seconds:,.0f} seconds; checkpoint.pt, metrics.csv and summary.json are in {config.output_dir}")


def train(state: State, data: Data, config: Config, about: dict[str, Any], done: int) -> float:
    """Train what is left, with a row of metrics.csv and a checkpoint after each epoch; return the seconds in all."""
    path, table, summary = (config.output_dir / name for name in ("checkpoint.pt", "metrics.csv", "summary.json"))
    first = rank_and_size()[0] == 0  # of several processes, which alone writes
    if first and not done:
        for old in (summary, table, path):  # the last one last: what dies in between has still its old run
            old.unlink(missing_ok=True)
    names = f"epoch,learning_rate,loss,{accuracy_name(config)},weights,images_per_second,seconds"
    lines = read_rows(table, done) if first and done else []
    headline, begun = getattr(state, HEADLINE), time.perf_counter()
    if done < config.epochs:
        loss_of = make_loss(state, data, config)
        column = f"{accuracy_name(config)} ({HEADLINE})"
        print(f"epoch  learning rate     loss  {column:>27}  images/s  seconds")
    steps = len(data.train_images) // config.batch_size
    with tqdm(
        total=config.epochs * steps, initial=done * steps, unit="step", leave=False, disable=None if first else True
    ) as bar:
        for epoch in range(done + 1, config.epochs + 1):
            start = time.perf_counter()
            loss, rate = train_epoch(state, loss_of, data, config, epoch, bar)
            speed = steps * config.batch_size / (time.perf_counter() - start)
            logits = predict(headline, data.test_images, data, config)
            check_epoch(state, logits, epoch, config.learning_rate)
            result = accuracy(logits, data.test_labels)
            seconds, begun, rate = time.perf_counter() - begun, time.perf_counter(), rate * config.learning_rate
            lines.append(f"{epoch},{rate:.6f},{loss:.4f},{result:.2f},{HEADLINE},{speed:.1f},{seconds:.1f}")
            if first:
                with replacing(table) as file:
                    file.write("\n".join([names, *lines, ""]).encode())
                save_checkpoint(path, state, epoch, about)
            with tqdm.external_write_mode():
                print(f"{epoch:>5}  {rate:>13.6f}  {loss:>7.4f}  {result:>26.2f}%  {speed:>8.1f}  {seconds:>7.1f}")
    return sum(float(line.rsplit(",", 1)[1]) for line in lines)


def read_rows(table: Path, done: int) -> list[str]:
    """Return the rows of the epochs done (one more may be ahead of the checkpoint), all unknown if any is lost."""
    with contextlib.suppress(OSError, ValueError):
        rows = table.read_text().splitlines()[1 : done + 1]
        numbers = [[float(cell) for cell in row.split(",") if cell != HEADLINE] for row in rows]
        sound = all(len(row) == 6 and all(0 <= number < math.inf for number in row) for row in numbers)
        if sound and [row[0] for row in numbers] == [*range(1, done + 1)]:
            return rows
    print(f"notice: {table} does not hold the {done} epochs done; their time is not known")
    return [f"{epoch}{',nan' * 6}" for epoch in range(1, done + 1)]


@contextlib.contextmanager
def failures_in_one_line(config: Config) -> Iterator[None]:
    """End the program with one line and status 1 on an expected failure, 130 on Ctrl-C; never with a traceback."""

    def interrupt(*_: Any) -> None:
        """End at once: an exception would wait for others' code, which may swallow it, and for a second Ctrl-C."""
        writes = not config.evaluate and not config.summary  # else the files are another process's
        for name in ("checkpoint.pt", "metrics.csv", "summary.json") if writes else ():
            (config.output_dir / f"{name}.tmp").unlink(missing_ok=True)
        line = "interrupted; the same command (without --fresh) continues after the last finished epoch\n"
        os.write(2, ("\r\x1b[K" * sys.stderr.isatty() + line).encode())  # over what is left of a progress bar
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (RunError, OSError) as error:
        ways_on = f"; {WAYS_ON}" if isinstance(error, CheckpointError) and not config.evaluate else ""
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"error: {printable(error)}{ways_on}")  # as in `| head`
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|not enough memory|can't alloc", str(error))):
            raise
        sys.exit(f"error: out of memory; a --batch-size smaller than {config.batch_size} needs less")


def printable(error: Exception) -> str:
    """Return an error's text with line breaks and terminal codes, as a file's name can hold them, made visible."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(error))


@contextlib.contextmanager
def writing_alone(directory: Path) -> Iterator[None]:
    """Make sure, before any work, that a run can be kept in `directory`, and that no other run writes there."""
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(directory / ".lock", wait=False))
        except BlockingIOError:
            raise RunError(f"--output-dir {directory}: another run is writing there") from None
        except OSError as error:
            raise RunError(f"--output-dir {directory}: {error.strerror}") from None
        yield


def main(name: str, build: Callable[..., nn.Module], arguments: Callable[[Config], dict[str, Any]]) -> None:
    """Read the command line and run; the whole program of a script.

    Args:
        name: Of the variant; names the run's folder and is kept in the checkpoint.
        build: Returns the network, called with num_classes and what `arguments` returns.
        arguments: Returns plain values, which are kept in the checkpoint, for a configuration.
    """
    config = parse_command_line(name)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # what was asked for has been begun
        config = replace(config, fresh=False)
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed: the next file opened, a checkpoint, would get what is printed
            setattr(sys, stream, open(os.devnull, "r+"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # paths may have unshowable letters
    first = not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"  # it alone prints and writes
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    reads = config.summary or config.evaluate or not first
    alone = contextlib.nullcontext() if reads else writing_alone(config.output_dir)
    with failures_in_one_line(config), alone:
        run(name, build, arguments(config), config)
    if rank_and_size()[1] > 1:
        dist.destroy_process_group()
