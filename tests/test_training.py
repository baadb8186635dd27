"""Optimizers, schedule, EMA, the loop and evaluation, each against a plain way of computing the same."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, new_tiny, small_data, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import common
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4
from training import devices
from training.augmentation import draw_epoch
from training.checkpoint import State
from training.config import Config, RunError
from training.data import Data
from training.processes import Processes

ONE = Config(epochs=1, batch_size=5, precision="fp32")


# ---- Optimizers, schedule, normalisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("build", [MobileNetV4, enhanced_mobilenetv4])
def test_only_weights_decay_and_each_parameter_has_one_optimizer(build):
    network = build(width=0.25)
    optimizers = common.make_optimizers(network, Config())
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    given = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, given)) == sorted(map(id, network.parameters()))
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        assert (id(parameter) in decaying) == (parameter.ndim > 1), name
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


def test_the_network_sees_normalised_images():
    data, seen = small_data(), []
    common.make_forward(lambda inputs: seen.append(inputs) or inputs, data, ONE)(data.test_images)
    expected = (data.test_images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    assert torch.allclose(seen[0], expected, atol=1e-6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_the_loss_is_the_cross_entropy_with_smoothed_labels():
    data, state = small_data(), new_tiny(ONE)
    found = common.make_loss(state, data, ONE)(data.train_images, data.train_labels)
    logs = common.make_forward(state.raw, data, ONE)(data.train_images).log_softmax(1)
    smoothed = 0.9 * logs[torch.arange(23), data.train_labels] + 0.1 * logs.mean(1)
    torch.testing.assert_close(found, -smoothed.mean())


# ---- The loop ------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_weights_and_others_do_not():
    states = [train(Config(epochs=2, batch_size=5, precision="fp32", seed=seed))[0] for seed in (0, 0, 1)]
    weights = [torch.cat([tensor.flatten() for tensor in state.raw.parameters()]) for state in states]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_each_epoch_leaves_its_incomplete_batch_out_and_others_the_next_time():
    _, losses = train(Config(epochs=3, batch_size=5, precision="fp32"))
    assert len(losses) == 3 * (23 // 5)
    left_out = [set(draw_epoch(23, Config(), epoch, CPU)["order"][20:].tolist()) for epoch in range(1, 9)]
    assert len(set.union(*left_out)) > 10


def test_training_runs_in_bfloat16_too():
    runs = [train(Config(epochs=1, batch_size=5, precision=precision))[1] for precision in ("bf16", "fp32")]
    losses = [[loss.item() for loss in run] for run in runs]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_a_contiguous_layout_trains_the_same_network(monkeypatch):
    config = Config(epochs=3, batch_size=5, precision="fp32")
    usual, _ = train(config)
    monkeypatch.setattr(devices, "memory_format", lambda device: torch.contiguous_format)  # as on MPS
    contiguous, _ = train(config)
    assert contiguous.raw.dense.weight.is_contiguous()
    for expected, got in zip(usual.raw.parameters(), contiguous.raw.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_each_step_has_its_learning_rates_and_the_averaged_weights_are_the_moving_average():
    config, data = Config(epochs=10, batch_size=5, precision="fp32", ema_horizon=0.05), small_data()  # 2 of 40 steps
    state = new_tiny(config)
    loss_fn, path, rates = common.make_loss(state, data, config), [], []

    class Steps(tqdm):  # updated after each step
        def update(self, n=1):
            path.append([tensor.clone() for tensor in common.floating_tensors(state.raw)])
            rates.append([{group["lr"] for group in optimizer.param_groups} for optimizer in state.optimizers])

    for epoch in range(1, 11):
        common.train_epoch(state, loss_fn, data, config, epoch, Steps(disable=True))
    expected = path[0]
    for step, current in enumerate(path):
        new = max(1 / 2, 10 / (10 + step))  # a shorter horizon at first
        expected = [(1 - new) * old + new * latest for old, latest in zip(expected, current, strict=True)]
    fractions = [common.schedule(step, 40, config.warmup) for step in range(40)]
    assert rates == [
        [{fraction * config.learning_rate}, {fraction * config.adam_learning_rate}] for fraction in fractions
    ]
    for got, want in zip(common.floating_tensors(state.averaged), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(state.averaged.norm.running_mean, state.raw.norm.running_mean, atol=1e-5)


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
            train(ONE, small_data(images))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_compiling_leaves_the_network_as_it_was_and_gives_the_same_loss(monkeypatch, tmp_path):
    """Compiled are the fast layers of a CPU; the backend that runs them needs no C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(devices, "can_compile", lambda device: True)
    monkeypatch.setattr(devices, "compiled", lambda f, device: torch.compile(f, backend="aot_eager", dynamic=False))
    data, state = small_data(), train(ONE)[0]
    before = {name: tensor.clone() for name, tensor in state.raw.state_dict().items()}
    compiled = common.make_loss(state, data, replace(ONE, compile="on"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.raw.state_dict().items())
    assert all(parameter.grad is None for parameter in state.raw.parameters())
    gradients = []
    for loss_fn in (common.make_loss(state, data, ONE), compiled):
        loss_fn(data.train_images[:5], data.train_labels[:5]).backward()
        gradients.append([parameter.grad for parameter in state.raw.parameters()])
        state.raw.zero_grad()
    torch.testing.assert_close(*gradients)


# ---- Values that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [1, 2, 4])
def test_a_loss_that_is_not_finite_stops_its_epoch_with_step_and_rate(bad_step, value):
    data, state, calls = small_data(), new_tiny(ONE), []
    true_loss = common.make_loss(state, data, ONE)

    def loss_fn(images, labels):
        calls.append(None)
        return true_loss(images, labels) + (value if len(calls) == bad_step else 0)

    with pytest.raises(RunError, match=rf"became {value} in epoch 1, step {bad_step}, at a learning rate of about 0\."):
        common.train_epoch(state, loss_fn, data, ONE, 1, tqdm(disable=True))


@pytest.mark.parametrize(("where", "weights"), [("raw", "raw weights"), ("averaged", "EMA weights")])
def test_a_weight_a_statistic_or_a_logit_that_is_not_finite_is_caught_behind_a_finite_loss(where, weights):
    state, _ = train(ONE)
    common.check_finite(state, torch.ones(2, 3), 1, 0.05)
    with pytest.raises(RunError, match=r"logit .* after epoch 1, with a learning rate of up to 0\.05"):
        common.check_finite(state, torch.tensor([1.0, math.nan]), 1, 0.05)
    for value in (math.nan, math.inf, -math.inf):
        getattr(state, where).norm.running_var[0] = value
        with pytest.raises(RunError, match=rf"norm\.running_var of the {weights}"):
            common.check_finite(state, torch.ones(2, 3), 1, 0.05)


def test_what_could_not_be_loaded_again_is_not_saved_the_state_of_an_optimizer_too():
    state, _ = train(ONE)
    next(iter(state.optimizers[1].state.values()))["exp_avg_sq"][0] = math.inf  # of a huge gradient: no step follows
    with pytest.raises(RunError, match="exp_avg_sq of AdamW's weight 0 is not finite"):
        common.check_finite(state, torch.ones(2, 3), 1, 0.05)


# ---- Evaluation ----------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Is right for the first images, told by their pixels, and for the next ones only if they come mirrored."""

    def __init__(self, data: Data, plain: int, mirrored: int) -> None:
        super().__init__()
        images = ((data.test_images.float() - 127.5) / 63.75).permute(0, 3, 1, 2)
        self.answers = {
            self.key(image): label.item() for image, label in zip(images[:plain], data.test_labels, strict=False)
        }
        flipped = zip(images[plain : plain + mirrored].flip(3), data.test_labels[plain:], strict=False)
        self.answers |= {self.key(image): label.item() for image, label in flipped}

    @staticmethod
    def key(image):
        return tuple(image[:, 0, :4].flatten().round(decimals=3).tolist())

    def forward(self, x):
        answers = [self.answers.get(self.key(image)) for image in x]
        unsure = torch.tensor([0.3, 0.2, 0.1])  # the first class, where nothing is known
        return torch.stack([unsure if answer is None else 10 * torch.eye(3)[answer] for answer in answers])


def test_evaluation_counts_every_image_once_and_adds_the_mirrored_ones():
    data = small_data(test=553)  # not a multiple of the evaluation's batch
    guessed = [(data.test_labels[first:] == 0).sum().item() for first in range(554)]
    state = State(Oracle(data, 100, 50), Oracle(data, 200, 30), [])
    results = common.evaluate(state, data, ONE)
    expected = {
        "raw": 100 + guessed[100],
        "raw_tta": 150 + guessed[150],
        "averaged": 200 + guessed[200],
        "averaged_tta": 230 + guessed[230],
    }
    assert results["test_accuracy"] == pytest.approx({name: 100 * hits / 553 for name, hits in expected.items()})
    confusion = np.array(results["confusion_matrix"])
    assert confusion.sum(1).tolist() == data.test_labels.bincount().tolist()
    assert confusion.trace() == expected["averaged"]
    per_class = {name: 100 * confusion[i, i] / confusion[i].sum() for i, name in enumerate(data.classes)}
    assert results["per_class_accuracy"] == pytest.approx(per_class, rel=1e-12)
    logits = common.predict(state.averaged, data.test_images, data, ONE)
    probabilities = logits.double().softmax(1)[torch.arange(553), data.test_labels]
    assert results["test_loss"]["averaged"] == pytest.approx(-probabilities.log().mean().item(), rel=1e-5)


def test_without_flips_in_training_there_is_no_flip_averaging():
    state, data = train(ONE)[0], small_data()
    results = common.evaluate(state, data, Config(precision="fp32", flip="none"))
    assert set(results["test_accuracy"]) == set(results["test_loss"]) == {"raw", "averaged"}


def test_the_confusion_matrix_of_very_many_classes_is_left_out():
    for count in (300, 301):
        labels = torch.arange(count)
        details = common.by_class(torch.eye(count), labels, [str(label) for label in range(count)])
        assert set(details["per_class_accuracy"].values()) == {100.0}
        assert ("confusion_matrix" in details) == (count == 300)


# ---- What a run is -------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_is_reduced_with_a_notice(capsys):
    config = common.resolve_settings(Config(batch_size=128, compile="off"), small_data(), None, Processes())
    assert config.batch_size == 23
    assert "--batch-size 128 is reduced to the 23" in capsys.readouterr().out


def test_a_run_that_resumes_keeps_what_auto_chose_at_its_start_unless_told_otherwise():
    saved = {"recipe": {"precision": "bf16", "compile": "on"}}
    kept = common.resolve_settings(Config(batch_size=5), small_data(), saved, Processes())
    assert (kept.precision, kept.compile) == ("bf16", "on")
    told = Config(batch_size=5, precision="fp32", compile="off")
    assert common.resolve_settings(told, small_data(), saved, Processes()) == told
    with pytest.raises(RunError, match=r"not a usable checkpoint \(--precision must be one of"):
        common.resolve_settings(Config(batch_size=5), small_data(), {"recipe": {"precision": [1.0]}}, Processes())
