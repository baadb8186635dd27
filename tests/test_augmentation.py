"""Augmentation against a plain way of computing the same, image by image, and the distributions of what is drawn."""

import numpy as np
import pytest
import torch
from helpers import CPU, small_data

from training.augmentation import augment, draw_epoch
from training.config import Config

ALL = slice(0, 23)


def test_an_epoch_is_a_fresh_permutation_that_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return draw_epoch(100, Config(seed=seed), epoch, CPU)["order"].tolist()

    first = order(0, 1)
    torch.manual_seed(7)  # no hidden state has a part in it
    assert order(0, 1) == first
    assert sorted(first) == list(range(100))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(1, 4)}) == 9


def test_two_successive_epochs_show_each_image_both_ways():
    drawn = [draw_epoch(1000, Config(), epoch, CPU) for epoch in (1, 2, 3)]
    flips = [epoch["flip"][epoch["order"].argsort()] for epoch in drawn]  # by image
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert 400 < flips[0].sum() < 600
    assert not draw_epoch(1000, Config(flip="none"), 1, CPU)["flip"].any()


def test_shifts_are_uniform_and_independent_for_each_image():
    shift = draw_epoch(9000, Config(crop_padding=4), 1, CPU)["shift"]
    for axis in (0, 1):
        counts = (shift[:, axis] + 4).bincount()
        assert len(counts) == 9
        assert counts.min() > 800
    assert abs(np.corrcoef(shift[:, 0], shift[:, 1])[0, 1]) < 0.05


@pytest.mark.parametrize("cutout", [0, 8])
def test_augmentation_equals_padding_cropping_and_flipping_each_image_alone(cutout):
    config, data = Config(crop_padding=4, cutout=cutout, cutmix=0.0), small_data()
    drawn = draw_epoch(20, config, 1, CPU)
    augmented, labels = augment(data, drawn, slice(5, 15), config)
    assert torch.equal(labels, data.train_labels[drawn["order"][5:15]])
    assert augmented.shape == (10, 32, 32, 3)
    assert augmented.dtype == torch.uint8
    for got, place in zip(augmented.numpy(), range(5, 15), strict=True):
        padded = np.pad(data.train_images[drawn["order"][place]].numpy(), ((4, 4), (4, 4), (0, 0)), mode="reflect")
        down, right = (drawn["shift"][place] + 4).tolist()
        expected = padded[down : down + 32, right : right + 32]
        if drawn["flip"][place]:
            expected = expected[:, ::-1]
        if cutout:
            row, column = drawn["centre"][place].tolist()
            expected = expected.copy()
            expected[max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = 128
        np.testing.assert_array_equal(got, expected)


def test_cutmix_takes_a_square_of_the_neighbour_and_its_share_of_the_label():
    data, config = small_data(), Config(cutmix=0.5, cutout=0)
    drawn = draw_epoch(23, config, 1, CPU)
    images, shares = augment(data, drawn, ALL, config)
    plain, labels = augment(data, drawn, ALL, Config(cutout=0, cutmix=0.0))
    assert shares.dtype == torch.float32
    mixed = drawn["mixed"]
    for number in range(23):
        own, other = plain[number], plain[number - 1]
        changed = (images[number] != own).any(2)
        if not mixed[number]:
            assert not changed.any()
        rows, columns = (changed.any(axis).nonzero().flatten() for axis in (1, 0))
        area = 0
        if len(rows):
            square = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            assert torch.equal(images[number][square], other[square])
            area = changed[square].numel() / 32**2
        expected = torch.zeros(len(data.classes))
        expected[labels[number]] += 1 - area
        expected[labels[number - 1]] += area
        assert torch.allclose(shares[number], expected, atol=0.01)  # a pixel may be the same in both
    assert 6 <= mixed.sum() <= 17


def test_the_squares_of_cutmix_have_uniform_areas_and_cutout_takes_the_rest():
    drawn = draw_epoch(9000, Config(cutmix=0.5, cutout=6), 1, CPU)
    mixed, side = drawn["mixed"], drawn["side"]
    assert mixed.float().mean() == pytest.approx(0.5, abs=0.03)
    assert set(side[~mixed].tolist()) == {6}
    area = side[mixed].float().square() / 32**2
    assert area.mean() == pytest.approx(1 / 2, abs=0.03)
    assert area.var() == pytest.approx(1 / 12, abs=0.01)


def test_cutmix_and_cutout_together_give_each_image_one_of_both():
    data, config = small_data(), Config(cutmix=0.5, cutout=10)
    drawn = draw_epoch(23, config, 1, CPU)
    images, shares = augment(data, drawn, ALL, config)
    mixed_alone, _ = augment(data, drawn | {"side": drawn["side"] * drawn["mixed"]}, ALL, config)
    cut_alone, _ = augment(data, drawn, ALL, Config(cutout=10, cutmix=0.0))
    mixed = drawn["mixed"]
    assert torch.equal(images[mixed], mixed_alone[mixed])
    assert torch.equal(images[~mixed], cut_alone[~mixed])
    assert (shares[~mixed].amax(1) == 1).all()  # a hole takes nothing from the label
    assert (images[~mixed] == 128).all(3).flatten(1).sum(1).min() >= 5 * 5


def test_the_last_epochs_have_shifts_and_flips_alone_where_asked_for():
    config, data = Config(epochs=10, cutmix=1.0, cutout=8, no_augmentation_end=0.2), small_data()
    for epoch in range(1, 11):
        drawn = draw_epoch(23, config, epoch, CPU)
        images, shares = augment(data, drawn, ALL, config)
        plain, labels = augment(data, drawn, ALL, Config(cutout=0, cutmix=0.0))
        assert torch.equal(images, plain) == (epoch > 8)
        assert torch.equal(shares, torch.eye(len(data.classes))[labels]) == (epoch > 8)


def test_cutmix_leaves_order_shifts_and_flips_as_they_were():
    plain, strong = (draw_epoch(50, Config(cutmix=share), 3, CPU) for share in (0.0, 0.5))
    assert all(torch.equal(plain[name], strong[name]) for name in ("order", "shift", "flip", "centre"))
