"""One Data from any source: what is evaluated on, statistics, the fingerprint, and which images are asked for."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import CPU, random_images, write_folders

from training import data
from training.config import Config, RunError


def load(root, **settings):
    return data.load_data(Config(data_dir=root, **settings), CPU)


def test_statistics_are_those_of_the_training_images(folders):
    loaded = load(folders)
    pixels = loaded.train_images.double().div(255).flatten(0, 2)
    assert loaded.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-12)
    assert loaded.std == pytest.approx(pixels.std(0, correction=0).tolist(), abs=1e-12)


def test_statistics_of_many_images_and_of_one_colour_are_right_too():
    images = random_images(2001, 3) // 4
    mean, std = data.channel_statistics(images)
    pixels = images.reshape(-1, 3) / 255
    assert mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std(0).tolist(), abs=1e-12)
    assert data.channel_statistics(np.full((5, 16, 16, 3), 255, np.uint8))[1] == pytest.approx([1e-5**0.5] * 3)


def test_the_holdout_is_the_last_images_of_each_class_and_balanced(folders):
    everything, held = load(folders), load(folders, holdout=6)
    assert held.test_labels.bincount().tolist() == [2, 2, 2]
    assert torch.equal(held.test_images, everything.train_images[[34, 35, 36, 37, 38, 39]])
    assert torch.equal(held.train_images, everything.train_images[:34])
    assert held.mean != everything.mean
    assert "6 training images held out" in held.source


@pytest.mark.parametrize("count", [7, 39, 300])  # no multiple of 3, and all of a class
def test_a_holdout_that_is_not_balanced_or_takes_all_of_a_class_is_refused(folders, count):
    with pytest.raises(RunError, match=f"--holdout {count}: expected a multiple of 3 that leaves images"):
        load(folders, holdout=count)


def test_the_fingerprint_changes_with_any_pixel_label_or_class_name(monkeypatch):
    def fingerprint(classes=("a", "b"), pixel=0, label=0, test_pixel=0):
        images = [np.zeros((4, 32, 32, 3), np.uint8) for _ in range(2)]
        labels = [np.array([0, 1, 0, 1]) for _ in range(2)]
        images[0][3, 31, 31, 2], images[1][0, 0, 0, 0], labels[0][2] = pixel, test_pixel, label
        source = "made up", list(classes), (images[0], labels[0]), (images[1], labels[1])
        monkeypatch.setattr(data, "read_images", lambda config: source)
        return data.load_data(Config(), CPU).fingerprint

    changes = {"classes": ("a", "c")}, {"pixel": 1}, {"label": 1}, {"test_pixel": 1}
    first, *others = (fingerprint(**change) for change in ({}, *changes))
    assert first.startswith("4 + 4 images, ")
    assert first == fingerprint()
    assert len({first, *others}) == 5


def test_drawn_shapes_need_no_folder_and_are_the_same_at_each_call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "draw_shapes", partial(data.draw_shapes, train=40, test=20))
    config = Config(synthetic=True, image_size=16)
    first, second = (data.load_data(config, CPU) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.train_images.shape[1:] == (16, 16, 3)
    assert not list(tmp_path.iterdir())


def test_other_sizes_than_that_of_cifar10_are_for_pictures_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read_cifar10", lambda *_: pytest.fail("nothing is downloaded"))
    with pytest.raises(RunError, match="--image-size 64: CIFAR-10 has 32"):
        load(tmp_path, image_size=64)


def test_test_images_that_are_copies_of_training_images_are_counted_in_a_notice(tmp_path, capsys):
    root = write_folders(tmp_path)
    load(root)
    assert "copies" not in capsys.readouterr().out
    for number in range(2):
        (root / "test" / "dog" / f"copy {number}.png").write_bytes((root / "train" / "cat" / "00000.png").read_bytes())
    load(root)
    assert "notice: 2 of the 9 test images are copies of training images" in capsys.readouterr().out


def test_a_single_training_image_is_too_few(tmp_path, monkeypatch):
    one = (random_images(1, 1), np.array([0]))
    monkeypatch.setattr(data, "read_images", lambda config: ("made up", ["a", "b"], one, one))
    with pytest.raises(RunError, match="made up: at least 2 training images are needed, got 1"):
        load(tmp_path)
