"""Augmentation, optimizer, schedule, averaging and evaluation, each against a plain way of computing the same."""

import copy
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import random_images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import common
from common import Config, Data
from mobilenetv4_baseline import DepthwiseConv2d, MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4

CPU = torch.device("cpu")


def small_data(train: int = 23, test: int = 7) -> Data:
    images = [torch.from_numpy(random_images(count, count)) for count in (train, test)]
    labels = [torch.arange(count) % 3 for count in (train, test)]
    return Data("made up", ["a", "b", "c"], images[0], labels[0], images[1], labels[1], [0.5] * 3, [0.25] * 3, "")


class Tiny(nn.Module):
    """A network small enough to train in a moment, with each kind of layer that is treated apart."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.pointwise = DepthwiseConv2d(8, 3), nn.Conv2d(8, 4, 1)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.dense(x)).relu()
        return self.classifier(self.pointwise(self.depthwise(x)).mean((2, 3)))


def train(config: Config, data: Data | None = None, epochs: int | None = None):
    data = data or small_data()
    torch.manual_seed(config.seed)
    network = Tiny().to(memory_format=common.layout(CPU))
    state = common.State(network, copy.deepcopy(network), common.make_optimizers(network, config))
    forward = common.make_forward(state.raw, data, config)
    losses = []

    def loss_of(images, labels):
        losses.append(nn.functional.cross_entropy(forward(images), labels))
        return losses[-1]

    for epoch in range(1, (config.epochs if epochs is None else epochs) + 1):
        common.train_epoch(state, loss_of, data, config, epoch, tqdm(disable=True))
    return state, losses


# ---- Randomness and augmentation -----------------------------------------------------------------------------------


def test_an_epoch_is_a_fresh_permutation_that_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return common.draw_epoch(100, Config(seed=seed), epoch, CPU)["order"].tolist()

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(100))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(1, 4)}) == 9


def test_two_epochs_in_succession_show_each_image_both_ways():
    drawn = [common.draw_epoch(1000, Config(), epoch, CPU) for epoch in (1, 2, 3)]
    flips = [epoch["flip"][epoch["order"].argsort()] for epoch in drawn]  # by image
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert 400 < flips[0].sum() < 600
    assert not common.draw_epoch(1000, Config(flip="none"), 1, CPU)["flip"].any()


def test_shifts_are_uniform_and_independent_for_each_image():
    shift = common.draw_epoch(9000, Config(crop_padding=4), 1, CPU)["shift"]
    for axis in (0, 1):
        counts = (shift[:, axis] + 4).bincount()
        assert len(counts) == 9
        assert counts.min() > 800
    assert abs(np.corrcoef(shift[:, 0], shift[:, 1])[0, 1]) < 0.05


@pytest.mark.parametrize("cutout", [0, 8])
def test_augmentation_equals_padding_cropping_and_flipping_each_image_alone(cutout):
    config = Config(crop_padding=4, cutout=cutout)
    data = small_data()
    images = data.train_images
    drawn = common.draw_epoch(20, config, 1, CPU)
    augmented, labels = common.augment(data, drawn, slice(5, 15), config)
    assert torch.equal(labels, data.train_labels[drawn["order"][5:15]])
    assert augmented.shape == (10, 32, 32, 3)
    assert augmented.dtype == torch.uint8
    for got, place in zip(augmented.numpy(), range(5, 15), strict=True):
        index = drawn["order"][place]
        padded = np.pad(images[index].numpy(), ((4, 4), (4, 4), (0, 0)), mode="reflect")
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
    drawn = common.draw_epoch(23, config, 1, CPU)
    images, shares = common.augment(data, drawn, slice(0, 23), config)
    plain, labels = common.augment(data, drawn, slice(0, 23), Config(cutout=0))
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
    drawn = common.draw_epoch(9000, Config(cutmix=0.5, cutout=6), 1, CPU)
    mixed, side = drawn["mixed"], drawn["side"]
    assert mixed.float().mean() == pytest.approx(0.5, abs=0.03)
    assert set(side[~mixed].tolist()) == {6}
    area = side[mixed].float().square() / 32**2
    assert area.mean() == pytest.approx(1 / 2, abs=0.03)
    assert area.var() == pytest.approx(1 / 12, abs=0.01)


def test_cutmix_and_cutout_together_give_each_image_one_of_both():
    data, config = small_data(), Config(cutmix=0.5, cutout=10)
    drawn = common.draw_epoch(23, config, 1, CPU)
    images, shares = common.augment(data, drawn, slice(0, 23), config)
    mixed_alone, _ = common.augment(data, drawn | {"side": drawn["side"] * drawn["mixed"]}, slice(0, 23), config)
    cut_alone, _ = common.augment(data, drawn, slice(0, 23), Config(cutout=10))
    mixed = drawn["mixed"]
    assert torch.equal(images[mixed], mixed_alone[mixed])
    assert torch.equal(images[~mixed], cut_alone[~mixed])
    assert (shares[~mixed].amax(1) == 1).all()  # a hole takes nothing from the label
    assert (images[~mixed] == 128).all(3).flatten(1).sum(1).min() >= 5 * 5


def test_mixing_takes_neighbours_as_they_were_augmented_and_can_be_trained_with():
    config = Config(epochs=1, batch_size=8, cutmix=1.0, photometric=1.0)
    data = small_data()
    drawn = common.draw_epoch(23, config, 1, CPU)
    images, _ = common.augment(data, drawn, slice(0, 23), config)
    colored, _ = common.augment(data, drawn, slice(0, 23), Config(photometric=1.0, cutout=0))
    assert ((images == colored) | (images == colored.roll(1, 0))).all()
    _, losses = train(config)
    assert len(losses) == 2 and all(loss.isfinite() for loss in losses)


def reference_colors(image, name, strength):
    """What torchvision's functions make of one image (3, H, W) with the strengths of TrivialAugment's wide table."""
    factor, size = 1 + 0.99 * strength, abs(strength)
    return {
        "none": lambda: image,
        "brightness": lambda: TF.adjust_brightness(image, factor),
        "contrast": lambda: TF.adjust_contrast(image, factor),
        "saturation": lambda: TF.adjust_saturation(image, factor),
        "sharpness": lambda: TF.adjust_sharpness(image, factor),
        "posterize": lambda: TF.posterize(image, 8 - round(6 * size)),
        "solarize": lambda: TF.solarize(image, 255 * (1 - size)),
        "autocontrast": lambda: TF.autocontrast(image),
        "equalize": lambda: TF.equalize(image),
    }[name]()


@pytest.mark.parametrize("name", common.OPERATIONS)
def test_colours_change_as_by_torchvision_each_image_by_its_own_strength(name):
    images = torch.from_numpy(random_images(9, 3))
    images = images // 2 + torch.arange(32, dtype=torch.uint8)[:, None] * 2  # not as even as noise
    strength = torch.linspace(-1, 1, 9)
    changed = common.change_colors(images, torch.full((9,), common.OPERATIONS.index(name)), strength)
    assert changed.dtype == torch.uint8
    for got, image, value in zip(changed, images, strength.tolist(), strict=True):
        expected = reference_colors(image.permute(2, 0, 1), name, value).permute(1, 2, 0)
        assert (got.int() - expected.int()).abs().max() <= 1  # of 255: rounding
    if name not in ("none", "autocontrast", "equalize"):
        assert len({tuple(image.flatten().tolist()) for image in (changed - images)}) >= 5


def test_each_image_of_a_batch_has_its_own_operation():
    images = torch.from_numpy(random_images(1, 3) // 2).expand(9, 32, 32, 3)
    together = common.change_colors(images, torch.arange(9), torch.full((9,), 0.6))
    for operation in range(9):
        alone = common.change_colors(images[:1], torch.tensor([operation]), torch.tensor([0.6]))
        assert torch.equal(together[operation], alone[0])
    assert len({tuple(image.flatten().tolist()) for image in together}) == 9


def test_operations_and_strengths_are_drawn_uniformly_for_the_part_asked_for():
    drawn = common.draw_epoch(9000, Config(photometric=0.5), 1, CPU)
    counts = drawn["operation"].bincount(minlength=9) / 9000
    assert counts[0] == pytest.approx(0.5 + 0.5 / 9, abs=0.03)
    assert counts[1:].tolist() == pytest.approx([0.5 / 9] * 8, abs=0.01)
    assert drawn["strength"].abs().max() <= 1
    assert drawn["strength"].mean() == pytest.approx(0, abs=0.03)
    assert drawn["strength"].var() == pytest.approx(1 / 3, abs=0.02)


def test_the_end_of_a_run_has_shifts_and_reflections_alone():
    config = Config(epochs=10, cutmix=1.0, cutout=8, photometric=1.0, plain_end=0.2)
    data = small_data()
    for epoch in range(1, 11):
        drawn = common.draw_epoch(23, config, epoch, CPU)
        images, shares = common.augment(data, drawn, slice(0, 23), config)
        plain, labels = common.augment(data, drawn, slice(0, 23), Config(cutout=0))
        assert torch.equal(images, plain) == (epoch > 8)
        assert torch.equal(shares, torch.eye(len(data.classes))[labels]) == (epoch > 8)


def test_what_is_switched_off_leaves_order_shifts_and_reflections_as_they_were():
    plain = common.draw_epoch(50, Config(), 3, CPU)
    strong = common.draw_epoch(50, Config(cutmix=0.5, cutout=8, photometric=1.0), 3, CPU)
    assert all(torch.equal(plain[name], strong[name]) for name in ("order", "shift", "flip", "centre"))


def test_the_long_recipe_is_one_flag_away_and_other_flags_change_it(monkeypatch):
    def read(*flags):
        monkeypatch.setattr("sys.argv", ["x", *flags])
        return common.parse_command_line("baseline")

    assert {name: getattr(read("--recipe", "long"), name) for name in common.LONG} == common.LONG
    assert read("--recipe", "long", "--epochs", "30").epochs == 30
    assert read("--epochs", "30", "--recipe", "long").cutmix == common.LONG["cutmix"]
    assert read().epochs == Config.epochs
    with pytest.raises(SystemExit):
        read("--recipe", "longer")


def test_the_network_sees_normalised_images():
    data = small_data()
    seen = []
    common.make_forward(lambda inputs: seen.append(inputs) or inputs, data, Config(precision="fp32"))(data.test_images)
    expected = (data.test_images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    assert torch.allclose(seen[0], expected, atol=1e-6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# ---- Optimizer and schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_muon_equals_that_of_torch_on_matrices(shape):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    start = ours.detach().clone()
    theirs = nn.Parameter(start.clone())
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    optimizers = [
        common.Muon([ours], **settings, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], **settings, nesterov=True, ns_steps=4),
    ]
    for _ in range(5):
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=2e-3)
    assert (theirs - start).abs().max() > 0.02  # the tolerance is small beside what the weights moved


def test_muon_takes_a_convolution_as_a_matrix_whatever_its_memory_format():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(start.clone(memory_format=memory_format))
        weight.grad = gradient.clone(memory_format=memory_format)
        common.Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.0).step()
        results.append(weight.detach())
    matrix = nn.Parameter(start.flatten(1).clone())
    matrix.grad = gradient.flatten(1).clone()
    common.Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.0).step()
    assert torch.equal(results[0], results[1])
    assert torch.allclose(results[0].flatten(1), matrix, atol=1e-6)


def test_muon_takes_the_largest_matrices_in_blocks_of_rows_and_no_others(monkeypatch):
    torch.manual_seed(0)
    start, gradient, results = torch.randn(300, 520), torch.randn(300, 520), []
    for large in (299, 300):
        monkeypatch.setattr(common.Muon, "LARGE", large)
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        common.Muon([weight], lr=0.1, momentum=0.0, weight_decay=0.0).step()
        results.append(start - weight.detach())
    blocks = [0.1 * common.orthogonalize(block[None])[0] for block in gradient.split(128)]
    assert torch.allclose(results[0], torch.cat(blocks), atol=1e-5)
    assert torch.allclose(results[1], 0.1 * common.orthogonalize(gradient[None])[0], atol=1e-5)
    assert not torch.allclose(results[0], results[1], atol=1e-3)


def test_orthogonalizing_brings_singular_values_near_one_and_keeps_the_directions():
    torch.manual_seed(0)
    matrices = torch.randn(3, 10, 30)
    results = common.orthogonalize(matrices, iterations=5)
    values = torch.linalg.svdvals(results)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ results @ right.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    assert torch.allclose(common.orthogonalize(matrices.mT), common.orthogonalize(matrices).mT, atol=1e-5)


@pytest.mark.parametrize("build", [MobileNetV4, enhanced_mobilenetv4])
def test_only_matrices_decay_and_each_parameter_has_one_optimizer(build):
    network = build(width=0.25)
    optimizers = common.make_optimizers(network, Config())
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    given = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, given)) == sorted(map(id, network.parameters()))
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        depthwise = parameter.ndim == 4 and parameter.shape[1] == 1
        assert (id(parameter) in decaying) == (parameter.ndim > 1 and not depthwise), name
    muon = {id(parameter) for parameter in optimizers[0].param_groups[0]["params"]}
    assert id(network.classifier.weight) not in muon
    assert id(network.stem[0][0].weight) in muon


def test_the_rate_rises_and_falls_in_lines_and_ends_near_zero():
    rates = np.array([common.schedule(step, 100, 0.2) for step in range(100)])
    assert rates.argmax() in (19, 20)
    assert rates.max() <= 1
    assert np.allclose(np.diff(rates[:19], 2), 0)
    assert np.allclose(np.diff(rates[21:], 2), 0)
    assert 0 < rates[0] < 0.06 and 0 < rates[-1] < 0.02
    assert common.schedule(0, 1, 0.0) == 1


# ---- Training ------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_weights_and_others_do_not():
    states = [train(Config(epochs=2, batch_size=5, precision="fp32", seed=seed))[0] for seed in (0, 0, 1)]
    weights = [torch.cat([tensor.flatten() for tensor in state.raw.parameters()]) for state in states]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_each_epoch_leaves_its_incomplete_batch_out_and_others_the_next_time():
    _, losses = train(Config(epochs=3, batch_size=5, precision="fp32"))
    assert len(losses) == 3 * (23 // 5)
    left_out = [set(common.draw_epoch(23, Config(), epoch, CPU)["order"][20:].tolist()) for epoch in range(1, 9)]
    assert len(set.union(*left_out)) > 10


def test_training_runs_in_bfloat16_too():
    runs = [train(Config(epochs=1, batch_size=5, precision=precision))[1] for precision in ("bf16", "fp32")]
    losses = [[loss.item() for loss in run] for run in runs]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


@pytest.mark.parametrize("bad_step", [1, 2, 4])
def test_a_bad_loss_ends_its_epoch(bad_step):
    data, config, calls = small_data(), Config(epochs=1, batch_size=5, precision="fp32"), []
    network = Tiny()
    state = common.State(network, Tiny(), common.make_optimizers(network, config))

    def loss_of(images, labels):
        calls.append(None)
        loss = common.make_forward(network, data, config)(images).square().mean()
        return loss * math.nan if len(calls) == bad_step else loss

    with pytest.raises(common.RunError, match=f"nan in epoch 1, step {bad_step}, at a learning rate of"):
        common.train_epoch(state, loss_of, data, config, 1, tqdm(disable=True))


@pytest.mark.parametrize("where", ["raw", "averaged"])
def test_a_weight_a_statistic_or_a_logit_that_is_not_finite_is_caught_behind_a_finite_loss(where):
    state, _ = train(Config(epochs=1, batch_size=5, precision="fp32"))
    common.check_epoch(state, torch.ones(2, 3), 1, 0.05)
    with pytest.raises(common.RunError, match=r"logit .* after epoch 1, with a learning rate of up to 0\.05"):
        common.check_epoch(state, torch.tensor([1.0, math.nan]), 1, 0.05)
    getattr(state, where).norm.running_var[0] = math.inf
    with pytest.raises(common.RunError, match=rf"norm\.running_var of the {where} weights"):
        common.check_epoch(state, torch.ones(2, 3), 1, 0.05)


def test_the_averaged_weights_are_the_moving_average_of_weights_and_statistics(monkeypatch):
    config = Config(epochs=10, batch_size=5, precision="fp32", average=0.05)  # of 40 steps: a memory of 2
    path, lerp = [], torch._foreach_lerp_

    def remember(averaged, current, weight):
        path.append([tensor.clone() for tensor in current])
        lerp(averaged, current, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", remember)
    state, _ = train(config)
    expected = path[0]
    for step, current in enumerate(path):
        new = max(1 / 2, 10 / (10 + step))  # at first the average forgets faster what the weights began with
        expected = [(1 - new) * old + new * latest for old, latest in zip(expected, current, strict=True)]
    assert len(path) == 40
    for got, want in zip(common.floating_tensors(state.averaged), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(state.averaged.norm.running_mean, state.raw.norm.running_mean, atol=1e-5)


def test_gradients_are_clipped_only_when_asked():
    sizes = []
    for clip_norm in (0.0, 1e-3):
        state, _ = train(Config(epochs=1, batch_size=23, precision="fp32", clip_norm=clip_norm, adam_learning_rate=0))
        sizes.append(sum(values["momentum"].norm() ** 2 for values in state.optimizers[0].state.values()) ** 0.5)
    assert sizes[0] > 1e-2
    assert sizes[1] <= 1.001e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [0, 2, 3])
def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_step_and_rate(value, bad_step):
    losses = torch.ones(4)
    losses[bad_step] = value
    with pytest.raises(common.RunError, match=rf"{value} in epoch 7, step {bad_step + 1}, .* 0\.02"):
        common.check_losses(losses, 7, 0.02)


# ---- Evaluation ----------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Is right for the first images, told by their pixels, and for the next ones only if they come reflected."""

    def __init__(self, data: Data, plain: int, reflected: int) -> None:
        super().__init__()
        images = ((data.test_images.float() - 127.5) / 63.75).permute(0, 3, 1, 2)
        self.answers = {
            self.key(image): label.item() for image, label in zip(images[:plain], data.test_labels, strict=False)
        }
        flipped = zip(images[plain : plain + reflected].flip(3), data.test_labels[plain:], strict=False)
        self.answers |= {self.key(image): label.item() for image, label in flipped}

    @staticmethod
    def key(image):
        return tuple(image[:, 0, :4].flatten().round(decimals=3).tolist())

    def forward(self, x):
        answers = [self.answers.get(self.key(image)) for image in x]
        unsure = torch.tensor([0.3, 0.2, 0.1])  # the first class, where nothing is known
        return torch.stack([unsure if answer is None else 10 * torch.eye(3)[answer] for answer in answers])


def test_evaluation_counts_every_image_once_and_adds_the_reflected_ones():
    data = small_data(test=553)  # not a multiple of the evaluation's batch
    guessed = [(data.test_labels[first:] == 0).sum().item() for first in range(554)]
    state = common.State(Oracle(data, 100, 50), Oracle(data, 200, 30), [])
    results = common.evaluate(state, data, Config(precision="fp32"))
    expected = {
        "raw": 100 + guessed[100],
        "raw_tta": 150 + guessed[150],
        "averaged": 200 + guessed[200],
        "averaged_tta": 230 + guessed[230],
    }
    assert results["test_accuracy"] == pytest.approx({name: 100 * hits / 553 for name, hits in expected.items()})
    confusion = np.array(results["confusion_matrix"])
    assert confusion.sum(1).tolist() == data.test_labels.bincount().tolist()
    assert confusion.trace() == expected[common.HEADLINE]
    per_class = {name: 100 * confusion[i, i] / confusion[i].sum() for i, name in enumerate(data.classes)}
    assert results["per_class_accuracy"] == pytest.approx(per_class, rel=1e-12)


def test_a_held_out_accuracy_is_called_so():
    state, _ = train(Config(epochs=1, batch_size=5, precision="fp32"))
    assert "holdout_accuracy" in common.evaluate(state, small_data(), Config(precision="fp32", holdout=3))
    assert "test_accuracy" in common.evaluate(state, small_data(), Config(precision="fp32"))


def test_compilation_is_chosen_from_the_configured_total(monkeypatch):
    monkeypatch.setattr(common, "can_compile", lambda device: True)

    def choose(epochs, images, saved=None):
        return common.settle(Config(epochs=epochs), CPU, images, saved).compile

    assert (choose(10, 50_000), choose(1, 1000)) == ("on", "off")
    assert choose(10, 50_000, {"compile": "off", "precision": "fp32"}) == "off"
    assert choose(1, 1000, {"compile": "on"}) == "on"
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    assert choose(10, 50_000) == "off"  # and is recorded so


def test_who_asks_for_compilation_where_there_is_none_can_continue(monkeypatch):
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    first = common.settle(Config(compile="on"), CPU, 50_000, None)
    assert first.compile == common.settle(Config(compile="on"), CPU, 50_000, first.decisive()).compile == "on"


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 0), ("momentum", -0.1), ("average", math.nan), ("seed", 2**32), ("precision", "fp8")]
)
def test_a_configuration_beyond_its_limits_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        Config(**{name: value})


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("No C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    common.can_compile.cache_clear()
    assert not common.can_compile(CPU)
    common.can_compile.cache_clear()
    assert capsys.readouterr().out.count("\n") == 1


def test_a_batch_larger_than_the_data_is_brought_down_and_told(capsys):
    assert common.settle(Config(batch_size=128, compile="off"), CPU, 40, None).batch_size == 40
    assert "--batch-size 128 is brought down to the 40" in capsys.readouterr().out


def test_the_device_is_the_one_asked_for_or_the_best_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.pick_device("auto", 0).type == "mps"
    assert common.pick_device("cpu", 0).type == "cpu"
    with pytest.raises(common.RunError, match=r"--device cuda: .* mps, cpu"):
        common.pick_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.pick_device("auto", 0).type == "cuda"


def test_images_come_channels_last_except_on_mps():
    assert common.layout(torch.device("mps")) == torch.contiguous_format
    assert common.layout(CPU) == common.layout(torch.device("cuda")) == torch.channels_last


def test_on_mps_training_is_in_float32_and_not_compiled(monkeypatch):
    monkeypatch.setattr(common, "can_compile", lambda device: pytest.fail("there is nothing to compile"))
    settled = common.settle(Config(epochs=100), torch.device("mps"), 50_000, None)
    assert (settled.precision, settled.compile) == ("fp32", "off")


def test_the_settings_for_mps_train_the_same_network(monkeypatch):
    config = Config(epochs=3, batch_size=5, precision="fp32", compile="off")
    usual, _ = train(config)
    monkeypatch.setattr(common, "layout", lambda device: torch.contiguous_format)
    contiguous, _ = train(config)
    assert contiguous.raw.dense.weight.is_contiguous()
    for expected, got in zip(usual.raw.parameters(), contiguous.raw.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


class Reads(TorchDispatchMode):
    """Counts what makes the program wait for a device: values that Python looks at."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero)
        return function(*args, **(kwargs or {}))


def test_nothing_in_an_epoch_waits_for_the_device_but_its_end():
    counts = []
    for images in (20, 200):
        with Reads() as reads:
            train(Config(epochs=1, batch_size=5, precision="fp32", compile="off"), small_data(images))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("present", "precision"), [(False, "fp32"), (True, "bf16")])
def test_bfloat16_is_chosen_on_a_cpu_by_what_the_processor_has(present, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: present)
    assert common.settle(Config(compile="off"), CPU, 1000, None).precision == precision


def test_every_field_of_the_configuration_has_help_and_a_flag(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mobilenetv4_baseline.py", "--help"])
    with pytest.raises(SystemExit):
        common.parse_command_line("baseline")
    text = capsys.readouterr().out
    for item in fields(Config):
        assert f"--{item.name.replace('_', '-')}" in text
        assert item.metadata["help"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--epochs", v) for v in ("0", "-1", "1.5", "nan", "inf", "", "ten")]
    + [("--learning-rate", v) for v in ("-1", "nan", "inf", "")]
    + [("--batch-size", "1"), ("--average", "1"), ("--seed", "-1"), ("--data-dir", ""), ("--device", "tpu")],
)
def test_a_bad_value_is_told_with_its_flag_before_anything_else(flag, value, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mobilenetv4_baseline.py", flag, value])
    with pytest.raises(SystemExit) as caught:
        common.parse_command_line("baseline")
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert flag in last
    assert repr(value) in last
