"""Pictures of any kind arrive as they should or are named; folders, their cache, copies and drawn shapes."""

import contextlib
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import random_images, write_folders
from PIL import Image
from torchvision.datasets import ImageFolder

from training import pictures
from training.config import RunError
from training.pictures import count_copies, decode, draw_shapes, find_pictures, fit_image, read_classes, read_folders

posix = pytest.mark.skipif(os.name != "posix", reason="names, links and pipes of POSIX")


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "pictures with spaces \u00e9", 12, 6)


@pytest.fixture
def decoded(monkeypatch):
    """Return a list that grows by each list of paths that is decoded."""
    calls = []
    monkeypatch.setattr(pictures, "decode", lambda paths, *rest: (calls.append(paths), decode(paths, *rest))[1])
    return calls


def refuse_to_list(monkeypatch, refused: Path) -> None:
    """Make one folder unreadable, also for the superuser, whom permissions do not stop."""
    scandir = os.scandir

    def listing(path="."):
        if Path(path) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)


def png_of(size: tuple[int, int], path: Path) -> None:
    """Write a PNG of one pixel whose header claims another size."""
    Image.new("1", (1, 1)).save(path)
    content = bytearray(path.read_bytes())  # the size stands behind "IHDR", followed by its own checksum
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


# ---- One picture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 300 * 100, (117, 117, 117)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_pictures_of_every_mode_become_rgb(mode, color, expected):
    fitted = fit_image(Image.new(mode, (50, 40), color), 32)
    assert (fitted.mode, fitted.size) == ("RGB", (32, 32))
    assert fitted.getpixel((16, 16)) == expected


def test_the_shorter_side_is_fitted_and_the_centre_kept():
    picture = Image.new("RGB", (128, 64), "red")
    picture.paste("blue", (24, 0, 104, 64))  # what the resizing blurs lies outside
    assert fit_image(picture, 32).getcolors() == [(32 * 32, (0, 0, 255))]


def test_hostile_pictures_are_read_within_bounds(tmp_path):
    Image.new("L", (1, 1), 200).save(tmp_path / "one pixel.png")
    Image.new("1", (1, 3_000_000)).save(tmp_path / "long.png")  # brought to 32 pixels as a whole it would fill 9 GB
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.fromarray(np.full((40, 40), 300 * 100, np.uint16)).save(tmp_path / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 32), "blue").save(tmp_path / "turned.jpg", exif=turned)
    paths = find_pictures(tmp_path)
    centre = {path.name: image[16, 16].tolist() for path, image in zip(paths, decode(paths, 32), strict=True)}
    assert centre["one pixel.png"] == [200] * 3
    assert centre["long.png"] == [0] * 3
    assert centre["animated.webp"] == [255, 0, 0]  # the first frame
    assert centre["print.jpg"] == pytest.approx([254, 0, 0], abs=3)
    assert centre["deep.png"] == [117] * 3
    assert centre["turned.jpg"] == pytest.approx([0, 0, 254], abs=3)


@pytest.mark.parametrize("size", [(7_072, 7_072), (13_300, 13_300), (100_000_000, 2)])
def test_a_picture_of_too_many_pixels_is_named_and_never_unpacked(tmp_path, monkeypatch, size):
    png_of(size, tmp_path / "bomb.png")
    monkeypatch.setattr(pictures, "fit_image", None)
    with pytest.raises(RunError, match=r"bomb\.png: not a readable image \(.*(pixels, more than 50,000,000|exceeds)"):
        decode([tmp_path / "bomb.png"], 32)


def test_a_jpeg_of_too_many_pixels_is_reduced_while_decoding_and_others_are_not(tmp_path, monkeypatch):
    picture = Image.fromarray(random_images(1, 0)[0]).resize((1024, 768), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "large.jpg", quality=95)
    sizes, fit = [], pictures.fit_image
    monkeypatch.setattr(pictures, "fit_image", lambda image, size: (sizes.append(image.size), fit(image, size))[1])
    whole = decode([tmp_path / "large.jpg"], 32)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1024 * 768 - 1)
    reduced = decode([tmp_path / "large.jpg"], 32)
    assert sizes == [(1024, 768), (128, 96)]
    assert np.abs(whole.astype(int) - reduced).mean() < 4
    monkeypatch.setattr(pictures, "MAX_PIXELS", 128 * 96 - 1)
    with pytest.raises(RunError, match=r"large\.jpg: .*128 x 96 pixels, more than 12,287"):
        decode([tmp_path / "large.jpg"], 32)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    Image.fromarray(random_images(1, 0)[0]).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:100])
    with pytest.raises(RunError, match=r"cut\.png: not a readable image"):
        decode([tmp_path / "cut.png"], 32)


@posix
def test_names_are_told_without_their_line_breaks_terminal_codes_and_undecodable_bytes(tmp_path):
    path = tmp_path / os.fsdecode(b"a\n\x1b[31m\xff.png")
    path.write_bytes(b"")
    with pytest.raises(RunError, match=r"a\\n\\x1b\[31m\\udcff\.png: not a readable image"):
        decode([path], 32)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_of_unknown_range_are_named_rather_than_guessed(tmp_path, mode):
    Image.new(mode, (32, 32), 1).save(tmp_path / "deep.tif")
    with pytest.raises(RunError, match=r"deep\.tif: not a readable image \(32 bits a pixel"):
        decode([tmp_path / "deep.tif"], 32)


@posix
def test_a_pipe_or_a_broken_link_among_the_pictures_is_named_and_not_waited_for(root):
    pipe = root / "test" / "dog" / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(RunError, match=r"pipe\.png: not a file"):
        read_folders(root, 32)
    pipe.unlink()
    pipe.symlink_to("nowhere")
    with pytest.raises(RunError, match=r"pipe\.png cannot be read: No such file"):
        read_folders(root, 32)


def test_a_picture_starts_no_program_whatever_its_name(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{} loop\n%%EOF\n"
    (tmp_path / "script.png").write_bytes(script)
    with pytest.raises(RunError, match=r"script\.png: not a readable image"):
        decode([tmp_path / "script.png"], 32)
    assert not started


# ---- Folders -------------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_file_name_then_class_then_folder_as_torchvision_lists_them(root):
    names, pixels = ("same.png", "Z.png", ".hidden.png"), iter(random_images(18, 3))
    for place in ("train/dog/a", "train/dog/a/z", "train/dog/a-b", "train/cat", "train/dog", "test/ship/B"):
        for name in names:
            (root / place).mkdir(exist_ok=True)
            Image.fromarray(next(pixels)).save(root / place / name)
    classes, *splits = read_folders(root, 32)
    for (images, labels), split in zip(splits, ("train", "test"), strict=True):
        theirs = ImageFolder(str(root / split))
        samples = sorted(theirs.samples, key=lambda item: (os.path.basename(item[0]), item[1]))
        assert classes == theirs.classes
        assert labels.dtype == np.int64
        assert labels.tolist() == [label for _, label in samples]
        assert np.array_equal(images, np.stack([np.asarray(Image.open(path)) for path, _ in samples]))


@posix
def test_classes_may_have_any_name(tmp_path):
    names = ["-x", "a b", "a\nb", "\u00e9", os.fsdecode(b"\xff")]
    classes, (_, labels), _ = read_folders(write_folders(tmp_path, 10, 5, names), 32)
    assert classes == sorted(names)
    assert labels.tolist() == [classes.index(names[index % 5]) for index in range(10)]


def test_every_usual_ending_is_taken_in_training_and_prediction_whatever_its_case(root):
    image = Image.fromarray(random_images(1, 0)[0])
    for name in ("a.JPG", "b.jpeg", "c.jfif", "d.WebP", "e.tif", "f.TIFF", "g.bmp", "h.ppm", "i.GIF"):
        image.save(root / "train" / "cat" / name, "JPEG" if name == "c.jfif" else None)
    assert len(find_pictures(root / "train")) == 12 + 9
    assert len(read_folders(root, 32)[1][1]) == 12 + 9


def test_files_with_other_endings_are_counted_in_one_notice_without_hidden_ones(root, capsys):
    pictures = sorted((root / "train").rglob("*.png"))
    for name in ("cat/a.heic", "dog/b.TXT", "dog/c.txt", "dog/README", "dog/.DS_Store", "cat/._x.heic", "cat/._x.png"):
        (root / "train" / name).write_bytes(b"")
    read_folders(root, 32)
    notice = f"notice: {root / 'train'}: 4 files with other endings (.heic, .txt, none) are not used\n"
    assert capsys.readouterr().out == notice
    assert find_pictures(root / "train") == pictures
    assert capsys.readouterr().out == notice
    assert len(find_pictures(root / "test")) == 6
    assert capsys.readouterr().out == ""


@posix
def test_links_are_followed_and_those_that_loop_end(root, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "inside"
    elsewhere.mkdir(parents=True)
    Image.fromarray(random_images(1, 5)[0]).save(elsewhere / "new.png")
    (root / "train" / "cat" / "loop").symlink_to(".")
    (root / "train" / "cat" / "more").symlink_to(elsewhere.parent)
    (elsewhere / "back").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "itself").symlink_to("itself")
    assert len(read_folders(root, 32)[1][1]) == 12 + 1
    assert len(find_pictures(root / "train" / "cat")) == 4 + 1


@pytest.mark.parametrize("place", ["train", "train/cat", "train/cat/a/b", "test/dog/x"])
def test_a_folder_that_cannot_be_read_is_named_and_not_skipped(root, monkeypatch, place):
    (root / place).mkdir(parents=True, exist_ok=True)
    refuse_to_list(monkeypatch, root / place)
    with pytest.raises(RunError, match=f"{place.split('/')[-1]} cannot be read: Permission denied"):
        read_folders(root, 32)
    with pytest.raises(RunError, match="Permission denied"):
        find_pictures(root)


def test_a_missing_split_classes_that_differ_and_an_empty_class_are_refused_by_name(root):
    (root / "train" / "emu").mkdir()
    (root / "test" / "owl").mkdir()
    with pytest.raises(RunError, match="only one of train and test has emu, owl"):
        read_folders(root, 32)
    (root / "test" / "emu").mkdir()
    (root / "test" / "owl").rmdir()
    with pytest.raises(RunError, match=r"emu: no picture in this folder \(endings: \.jpg"):
        read_folders(root, 32)
    (root / "test").rename(root / "other")
    with pytest.raises(RunError, match=r"has no folder test \(found: .*train"):
        read_folders(root, 32)
    (root / "test").write_text("")
    with pytest.raises(RunError, match="test cannot be read: Not a directory"):
        read_folders(root, 32)


def test_one_class_or_none_is_refused(tmp_path):
    with pytest.raises(RunError, match="expected 2 class folders or more, found cat"):
        read_folders(write_folders(tmp_path / "one", 3, 3, ["cat"]), 32)
    (tmp_path / "none" / "train").mkdir(parents=True)
    (tmp_path / "none" / "test").mkdir()
    with pytest.raises(RunError, match="expected 2 class folders or more, found none"):
        read_folders(tmp_path / "none", 32)


def test_a_folder_of_class_folders_gets_the_labels_of_the_given_classes(root):
    classes = ["ship", "ape", "dog", "cat"]
    images, labels = read_classes(root / "test", 16, classes)
    assert labels.tolist() == [3, 2, 0, 3, 2, 0]
    assert images.shape == (6, 16, 16, 3)
    with pytest.raises(RunError, match="the network has no class dog, ship"):
        read_classes(root / "test", 16, ["cat"])
    with pytest.raises(RunError, match="expected 1 class folders or more, found none"):
        read_classes(root / "test" / "cat", 16, classes)


def test_copies_of_training_images_among_the_test_images_are_counted():
    train, test = random_images(9, 1), random_images(5, 2)
    assert count_copies(train, test) == 0
    test[1], test[3], test[4] = train[8], train[8], train[0]
    test[4, 31, 31, 2] ^= 1
    assert count_copies(train, test) == 2


# ---- Cache ---------------------------------------------------------------------------------------------------------


def equal(one, other) -> bool:
    return one[0] == other[0] and all(map(np.array_equal, (*one[1], *one[2]), (*other[1], *other[2])))


def test_a_second_start_takes_the_cache_and_one_of_another_size_has_its_own(root, decoded):
    first = read_folders(root, 32)
    assert len(decoded) == 2
    assert equal(read_folders(root, 32), first)
    assert len(decoded) == 2
    assert read_folders(root, 16)[1][0].shape[1:] == (16, 16, 3)
    assert equal(read_folders(root, 32), first)
    assert len(decoded) == 4


def test_a_changed_file_is_noticed(root):
    before = read_folders(root, 32)
    Image.new("RGB", (32, 32), "red").save(root / "train" / "cat" / "00000.png")
    assert not equal(read_folders(root, 32), before)


@posix
def test_pictures_exchanged_with_equal_sizes_and_times_are_noticed(root):
    paths = root / "train" / "cat" / "00000.png", root / "train" / "dog" / "00001.png"
    for path in paths:
        path.write_bytes(path.read_bytes().ljust(5000, b"\0"))  # what stands behind the end is not read
        os.utime(path, ns=(10**18, 10**18))
    before = read_folders(root, 32)
    paths[0].rename(root / "aside")
    paths[1].rename(paths[0])
    (root / "aside").rename(paths[1])
    after = read_folders(root, 32)
    assert np.array_equal(after[1][0][:2], before[1][0][[1, 0]])
    content = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(content), strict=True):  # in place, which only the change time tells
        path.write_bytes(other)
        os.utime(path, ns=(10**18, 10**18))
    assert equal(read_folders(root, 32), before)


def test_a_damaged_cache_is_made_again_and_holds_no_pickle(root, decoded):
    first, cache = read_folders(root, 32), root / ".cache-32px.npz"
    with np.load(cache, allow_pickle=False) as arrays:
        key, train, test = (arrays[name] for name in ("key", "train", "test"))
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    for damage in (
        lambda: cache.write_bytes(content),
        lambda: cache.write_bytes(b""),
        lambda: np.savez(cache, key=key, train=train[:5], test=test),
        lambda: np.savez(cache, key=key, train=train.astype(np.float64), test=test),
        lambda: np.savez(cache, key=key, train=train.astype(bool), test=test),
        lambda: np.savez(cache, train=train, test=test),
    ):
        damage()
        decoded.clear()
        assert equal(read_folders(root, 32), first)
        assert len(decoded) == 2
    np.savez(cache, key=key, train=np.asfortranarray(train), test=test)
    again = read_folders(root, 32)
    assert equal(again, first)
    assert again[1][0].flags.c_contiguous


def test_a_cache_that_would_fill_the_memory_is_never_unpacked(tmp_path):
    cache, zeros = tmp_path / "cache.npz", np.zeros((10**5, 100), np.uint8)
    np.savez_compressed(cache, key="key", train=zeros, test=zeros)
    assert pictures.read_cache(cache, "key", [zeros.shape] * 2) is None


@posix
def test_a_cache_that_is_no_regular_file_is_ignored(root):
    first, cache = read_folders(root, 32), root / ".cache-32px.npz"
    cache.unlink()
    os.mkfifo(cache)  # reading it would never end
    assert equal(read_folders(root, 32), first)
    cache.unlink()
    cache.mkdir()
    assert equal(read_folders(root, 32), first)


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_cache_of_unknown_origin_is_never_unpickled(root):
    first, cache = read_folders(root, 32), root / ".cache-32px.npz"
    with np.load(cache) as arrays:
        key = arrays["key"]
    payload = np.array([Payload(str(root / "ran"))], dtype=object)
    np.savez(cache, key=key, train=payload, test=payload)
    assert equal(read_folders(root, 32), first)
    cache.write_bytes(pickle.dumps(Payload(str(root / "ran"))))
    assert equal(read_folders(root, 32), first)
    assert not (root / "ran").exists()


def test_a_folder_that_cannot_be_written_is_read_all_the_same(root, monkeypatch):
    @contextlib.contextmanager
    def refuse_to_write(path):
        raise RunError(f"{path} cannot be written")
        yield

    monkeypatch.setattr(pictures, "atomic_write", refuse_to_write)
    assert len(read_folders(root, 32)[1][1]) == 12
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]


# ---- Drawn shapes --------------------------------------------------------------------------------------------------


def test_drawn_shapes_are_the_same_at_each_call_balanced_and_all_different():
    classes, train, test = draw_shapes(32, train=200, test=50)
    again = draw_shapes(32, train=200, test=50)
    assert len(classes) == 10
    assert equal((classes, train, test), again)
    for (images, labels), count in ((train, 200), (test, 50)):
        assert (images.shape, images.dtype, labels.dtype) == ((count, 32, 32, 3), np.uint8, np.int64)
        assert np.bincount(labels).tolist() == [count / 10] * 10
    assert len({image.tobytes() for image in (*train[0], *test[0])}) == 250


@pytest.mark.parametrize("size", [16, 33, 100])
def test_each_shape_lies_inside_its_image_and_stands_out_from_the_ground(size):
    middle = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = np.meshgrid(middle, middle)
    covers = []
    for inside in pictures.SHAPES.values():
        cover = inside(x, y, np.hypot(x, y), np.maximum(abs(x), abs(y))) < 0
        assert 0.15 < cover.mean() < 0.75
        covers.append(cover)
    for index, cover in enumerate(covers):
        assert all((cover ^ other).mean() > 0.07 for other in covers[:index])
    images = draw_shapes(size, train=20, test=0)[1][0].astype(float).mean(-1)
    for image in images:
        assert np.quantile(image, 0.9) - np.quantile(image, 0.1) > 40


def test_kinds_of_drawn_shapes_are_told_by_their_outlines_and_not_by_their_colours():
    _, (images, labels), _ = draw_shapes(32, train=1000, test=0)
    colors = images.mean((1, 2))
    means = np.stack([colors[labels == label].mean(0) for label in range(10)])
    nearest = np.square(colors[:, None] - means).sum(-1).argmin(1)
    assert (nearest == labels).mean() < 0.25
