"""Pictures in class folders, the one rule that fits any picture to the network, and drawn shapes."""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from training.config import RunError, one_line, printable
from training.files import atomic_write, check_archive

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, 3) uint8, labels (N,) int64
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")  # some others would start programs
FIT = 2  # version of fit_image: raised when it changes, so that no older cache is used
MAX_PIXELS = 50_000_000  # of one picture while it is decoded, which takes up to 20 bytes for each
BAR = dict(desc="reading images", unit="", leave=False, disable=None)


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """Convert a picture of any mode to RGB, crop the square in its centre, resize it to `size` x `size` pixels."""
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


def decode(paths: Sequence[str | Path], size: int, bar: tqdm | None = None) -> np.ndarray:
    """Return the pictures as uint8 (N, size, size, 3); RunError names the first one that cannot be read."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for index, path in enumerate(paths):
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device might never end
            raise RunError(f"{printable(path)}: not a file")
        try:
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    image.draft(None, (size, size))  # a JPEG is reduced up to eight times while it is decoded
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width:,} x {image.height:,} pixels, more than {MAX_PIXELS:,} in all")
                images[index] = np.asarray(fit_image(image, size))
        except Exception as error:  # a damaged file can fail anywhere in the decoders
            raise RunError(f"{printable(path)}: not a readable image ({one_line(error)})") from None
        if bar is not None:
            bar.update()
    return images


def count_copies(train_images: np.ndarray, test_images: np.ndarray) -> int:
    """Return how many test images equal a training image, pixel by pixel."""
    train, test = ([sha256(image).digest() for image in images] for images in (train_images, test_images))
    return sum(map(set(train).__contains__, test))


def refuse(error: OSError) -> NoReturn:
    raise RunError(f"{printable(error.filename)} cannot be read: {error.strerror}") from None


def listing(names: Iterable[str]) -> str:
    return printable(", ".join(sorted(names)[:10]))


def list_files(folder: Path) -> list[Path]:
    """Return all files in a folder and below; each folder is read once, so that links that loop end."""
    found: dict[str, list[Path]] = {}
    for current, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(folders) if (real := os.path.realpath(current)) not in found else []
        found.setdefault(real, [Path(current, name) for name in names])
    return [path for files in found.values() for path in files]


def list_pictures(folder: Path, names: list[str]) -> tuple[list[Path], np.ndarray]:
    """Return the pictures of <folder>/<name>/..., ordered by (file name, label), and the labels, indices of `names`."""
    found, others = [], []
    for label, name in enumerate(names):
        files = list_files(folder / name)
        pictures = [path for path in files if path.name.lower().endswith(ENDINGS) and path.name[:2] != "._"]  # of macOS
        if not pictures:
            raise RunError(f"{printable(folder / name)}: no picture in this folder (endings: {' '.join(ENDINGS)})")
        found += [(path, label) for path in pictures]
        others += [path for path in set(files).difference(pictures) if not path.name.startswith(".")]
    if others:
        files, are = ("files", "are") if len(others) > 1 else ("file", "is")
        endings = listing({path.suffix.lower() or "none" for path in others})
        print(f"notice: {printable(folder)}: {len(others)} {files} with other endings ({endings}) {are} not used")
    found.sort(key=lambda item: (item[0].name, item[1], str(item[0].parent)))
    return [path for path, _ in found], np.array([label for _, label in found], dtype=np.int64)


def find_pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder and below, sorted; RunError if there are none."""
    return sorted(list_pictures(folder, [""])[0])


def class_names(folder: Path, *, least: int) -> list[str]:
    names = sorted(next(os.walk(folder, onerror=refuse))[1])
    if len(names) < least:
        raise RunError(f"{printable(folder)}: expected {least} class folders or more, found {listing(names) or 'none'}")
    return names


def read_classes(folder: Path, size: int, classes: list[str]) -> Arrays:
    """Read all pictures of <folder>/<class>/...; some of `classes` may be missing, others are refused."""
    names = class_names(folder, least=1)
    if unknown := set(names) - set(classes):
        raise RunError(f"{printable(folder)}: the network has no class {listing(unknown)}")
    paths, labels = list_pictures(folder, names)
    with tqdm(total=len(paths), **BAR) as bar:
        return decode(paths, size, bar), np.array([classes.index(name) for name in names], dtype=np.int64)[labels]


def read_folders(root: Path, size: int) -> tuple[list[str], Arrays, Arrays]:
    """Return the sorted class names, and the pictures of <root>/{train,test}/<class>/..., by (file name, class)."""
    splits = [root / "train", root / "test"]
    for split in splits:
        if not split.exists():
            raise RunError(f"{printable(root)}: has no folder {split.name} (found: {listing(os.listdir(root))})")
    classes, others = (class_names(split, least=2) for split in splits)
    if differing := set(classes) ^ set(others):
        raise RunError(f"{printable(root)}: only one of train and test has {listing(differing)}")
    (train, train_labels), (test, test_labels) = (list_pictures(split, classes) for split in splits)
    train_images, test_images = read_pictures(root, [train, test], size)
    return classes, (train_images, train_labels), (test_images, test_labels)


def read_pictures(root: Path, splits: list[list[Path]], size: int) -> list[np.ndarray]:
    """Return the pictures of both splits, decoded, or from the cache in `root` where not one has changed."""
    try:
        files = [(str(path).removeprefix(str(root)), os.stat(path)) for split in splits for path in split]
    except OSError as error:  # such as a link to nowhere
        refuse(error)
    about = [(name, s.st_size, s.st_mtime_ns, s.st_ino, s.st_ctime_ns) for name, s in files]
    key, cache = sha256(repr((f"fit {FIT}", size, about)).encode()).hexdigest(), root / f".cache-{size}px.npz"
    images = read_cache(cache, key, [(len(split), size, size, 3) for split in splits]) if cache.is_file() else None
    if images is None:
        with tqdm(total=len(files), **BAR) as bar:
            images = [decode(split, size, bar) for split in splits]
        with contextlib.suppress(RunError), atomic_write(cache) as file:  # a read-only folder has no cache
            np.savez(file, key=key, train=images[0], test=images[1])
    return images


def read_cache(path: Path, key: str, shapes: list[tuple[int, ...]]) -> list[np.ndarray] | None:
    """Return the decoded images, or None where the cache is damaged or one of other files."""
    with contextlib.suppress(Exception):  # a damaged file can fail anywhere in the parsers
        check_archive(path, path.stat().st_size)
        with np.load(path, allow_pickle=False) as cache:  # a zip archive, whose checksums are verified
            images = [np.ascontiguousarray(cache[name]) for name in ("train", "test")]
            if str(cache["key"]) == key and [(i.shape, i.dtype) for i in images] == [(s, np.uint8) for s in shapes]:
                return images
    return None


# Drawn shapes: negative inside; x: right, y: down, both about -1..1; r: radius; m: max(|x|, |y|)
SHAPES: dict[str, Callable[..., np.ndarray]] = {
    "checkerboard": lambda x, y, r, m: np.maximum(m - 0.9, 0.14 * np.sin(7 * x) * np.sin(7 * y)),
    "circle": lambda x, y, r, m: r - 0.9,
    "crescent": lambda x, y, r, m: np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.45, y)),
    "cross": lambda x, y, r, m: np.maximum(m - 0.95, np.minimum(abs(x), abs(y)) - 0.25),
    "heart": lambda x, y, r, m: np.hypot(1.1 * x, y - 0.2 + 0.65 * np.sqrt(abs(x))) - 0.8,
    "ring": lambda x, y, r, m: abs(r - 0.75) - 0.18,
    "square": lambda x, y, r, m: m - 0.8,
    "star": lambda x, y, r, m: r * np.cos(abs((np.arctan2(x, -y) + 0.628) % 1.257 - 0.628) - 1.236) - 0.328,
    "stripes": lambda x, y, r, m: np.maximum(m - 0.9, -0.115 * np.cos(8.73 * y)),
    "triangle": lambda x, y, r, m: np.maximum(y - 0.5, 0.866 * abs(x) - 0.5 * y - 0.5),
}


def draw_shape(kind: str, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return a shape of random place, size, angle and colour over a noisy gradient, uint8 (size, size, 3)."""
    y, x = (np.mgrid[:size, :size] + 0.5) * 2 / size - 1  # centres of the pixels, (size, size) each
    radius, angle, slope = generator.uniform((0.6, -0.3, 0), (0.85, 0.3, 2 * np.pi))
    left, top = generator.uniform(radius - 1, 1 - radius, 2)
    turned = np.exp(-1j * angle) * ((x - left) + 1j * (y - top)) / radius
    inside = SHAPES[kind](turned.real, turned.imag, abs(turned), np.maximum(abs(turned.real), abs(turned.imag)))
    cover = np.clip(0.5 - inside * radius * size / 2, 0, 1)[..., None]  # the edge is one pixel wide
    start, end, color = generator.uniform([[0], [0], [165]], [[90], [90], [255]], (3, 3))  # dark ground, light shape
    ground = start + (end - start) * (0.5 + (x * np.cos(slope) + y * np.sin(slope)) / 2.83)[..., None]
    image = ground + (color - ground) * cover + generator.normal(0, 8, (size, size, 3))
    return (image if generator.random() < 0.5 else 255 - image).clip(0, 255).astype(np.uint8)


def draw_shapes(size: int, *, train: int = 2560, test: int = 400) -> tuple[list[str], Arrays, Arrays]:
    """Draw ten kinds of shapes in turn, the same at each call; return class names, training and test images."""
    generator, classes = np.random.default_rng(0), list(SHAPES)
    labels = np.arange(train + test, dtype=np.int64) % len(classes)
    images = np.stack([draw_shape(classes[label], size, generator) for label in labels])
    return classes, (images[:train], labels[:train]), (images[train:], labels[train:])
