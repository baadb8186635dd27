"""Time to an accuracy: this project's networks, and airbench94, which is made for nothing else, on the same machine.

    pip install onnx onnxscript onnxruntime
    python -m benchmarks.time_to_accuracy --output-dir runs/time airbench94 baseline:45

Each contender is trained in turn, NAME:EPOCHS by its script, with nothing else running; a run that is there already is
resumed or only evaluated. Printed are the training time, which for ours includes compilation and the evaluation after
each epoch; the accuracy of one view, of two (flip) and of six (flip, and shifts by one pixel) on the test images; and
what each network costs where it is used: parameters, MACs, and as ONNX in float32 and in 8 bits the size and the
latency of one image.

airbench94 (Jordan, arXiv 2404.00498) is written here from its description, with the settings that its author published
for its Muon version: 8 epochs, batches of 2,000; bf16 where it is faster, eager.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from benchmarks.shifts import shift
from tools import Trained, exit_in_one_line, export, load_images, load_network, new_parser, optional
from training import devices
from training.augmentation import augment, draw_epoch
from training.config import DEVICES, Config, RunError, argument, flag
from training.cpu import keep_freed_memory
from training.data import Data, load_data
from training.muon import orthogonalize
from training.summary import count_macs, count_parameters

EPOCHS, BATCH, SMOOTHING = 8, 2000, 0.2
BIAS_RATE, HEAD_RATE, DECAY = 0.053, 0.67, 2e-6 * BATCH  # of a loss summed over the batch
FILTER_RATE, FILTER_MOMENTUM, ITERATIONS = 0.24, 0.6, 3  # of Muon
WHITENING_EPOCHS = 3  # in which the biases of the whitening layer are trained
VIEWS = {(0, 0): 0.5, (-1, -1): 0.25, (1, 1): 0.25}  # shifts and weights, each with its mirror image: six views


# ---- airbench94 ----------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def normalization(channels: int) -> nn.Module:
    """BN that follows its statistics quickly and trains its bias alone."""
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer


def convolution(inputs: int, outputs: int) -> nn.Module:
    """A 3x3 convolution whose first filters hand its inputs on."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:inputs])
    return layer


def group(inputs: int, outputs: int) -> list[nn.Module]:
    first = [convolution(inputs, outputs), nn.MaxPool2d(2), normalization(outputs), nn.GELU()]
    return [*first, convolution(outputs, outputs), normalization(outputs), nn.GELU()]


def airbench94() -> nn.Sequential:
    """Build the network: a frozen whitening layer, three groups of two convolutions, a linear classifier."""
    whitening = nn.Conv2d(3, 24, 2)
    whitening.weight.requires_grad_(False)
    classifier = nn.Linear(256, 10, bias=False)
    classifier.weight.data /= classifier.weight.std()
    groups = [*group(24, 64), *group(64, 256), *group(256, 256)]
    return nn.Sequential(whitening, nn.GELU(), *groups, nn.MaxPool2d(3), nn.Flatten(), classifier, Scale(1 / 256))


@torch.no_grad()
def whiten(layer: nn.Conv2d, images: Tensor) -> None:
    """Set the filters to the eigenvectors of patches of images (N, 3, H, W), scaled to unit variance, and to their
    negatives."""
    patches = F.unfold(images, layer.kernel_size).transpose(1, 2).flatten(0, 1)  # (patches, 12)
    variances, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (variances + 5e-4).sqrt()).T.view(-1, *layer.weight.shape[1:])
    layer.weight.copy_(torch.cat([filters, -filters]))


@torch.no_grad()
def step_filters(filters: list[Tensor], momenta: list[Tensor], rate: float) -> None:
    """Take a step of Muon, whose weights keep their norm."""
    for weight, momentum in zip(filters, momenta, strict=True):
        momentum.mul_(FILTER_MOMENTUM).add_(weight.grad)
        update = weight.grad.add(momentum, alpha=FILTER_MOMENTUM).flatten(1)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        direction = orthogonalize(update[None].bfloat16(), ITERATIONS)[0]
        weight.sub_(direction.view_as(weight), alpha=rate)


def train_airbench94(network: nn.Sequential, data: Data, config: Config) -> None:
    """Train for `config.epochs`; all rates fall linearly to zero, those of the whitening layer's biases earlier."""
    whitening, classifier = network[0], network[-2]
    filters = [layer.weight for layer in network[1:] if isinstance(layer, nn.Conv2d)]
    biases = [layer.bias for layer in network if isinstance(layer, nn.BatchNorm2d)]
    momenta = [torch.zeros_like(weight) for weight in filters]
    groups = [([whitening.bias], BIAS_RATE), (biases, BIAS_RATE), ([classifier.weight], HEAD_RATE)]
    groups = [dict(params=params, lr=rate, start=rate, weight_decay=DECAY / rate) for params, rate in groups]
    optimizer = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    steps = len(data.train_images) // config.batch_size
    total, early = config.epochs * steps, min(config.epochs, WHITENING_EPOCHS) * steps
    forward = common.make_forward(network, data, config)
    for step in range(total):
        place = step % steps * config.batch_size
        if place == 0:
            drawn = draw_epoch(len(data.train_images), config, step // steps + 1, data.train_images.device)
        images, labels = augment(data, drawn, slice(place, place + config.batch_size), config)
        F.cross_entropy(forward(images), labels, label_smoothing=SMOOTHING, reduction="sum").backward()
        optimizer.param_groups[0]["lr"] = BIAS_RATE * max(0, 1 - step / early)
        for settings in optimizer.param_groups[1:]:
            settings["lr"] = settings["start"] * (1 - step / total)
        step_filters(filters, momenta, FILTER_RATE * (1 - step / total))
        optimizer.step()
        network.zero_grad()
        if place + config.batch_size > len(data.train_images) - config.batch_size:
            print(f"airbench94: epoch {step // steps + 1} of {config.epochs}", file=sys.stderr)


def run_airbench94(options: argparse.Namespace) -> tuple[Trained, Data, float]:
    """Train airbench94, and return it as the tools take a network, the data, and the seconds of its training."""
    device = devices.choose(options.device)
    devices.set_up(device)
    settings = dict(epochs=options.airbench_epochs, batch_size=BATCH, crop_padding=2, cutout=0, cutmix=0.0)
    config = devices.resolve_auto(Config(**settings, seed=options.seed, data_dir=options.data_dir), device, 0)
    data = load_data(config, device)
    begun = time.perf_counter()
    torch.manual_seed(options.seed)
    network = airbench94()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    images = (data.train_images[:5000].cpu().permute(0, 3, 1, 2) / 255 - mean) / std
    whiten(network[0], images)
    network.to(device, memory_format=devices.memory_format(device))
    train_airbench94(network.train(), data, config)
    devices.synchronize(device)
    seconds = time.perf_counter() - begun
    saved = {"mean": data.mean, "std": data.std, "classes": data.classes, "image_size": 32}
    return Trained(Path("airbench94"), network.eval(), saved, config, device), data, seconds


# ---- Ours ----------------------------------------------------------------------------------------------------------


def run_script(variant: str, epochs: str, options: argparse.Namespace) -> tuple[Trained, Data, float]:
    """Train one of ours by its script, in a process of its own; return what run_airbench94 returns."""
    folder = options.output_dir / f"{variant}-{epochs}-seed-{options.seed}"
    settings = dict(
        epochs=epochs, seed=options.seed, data_dir=options.data_dir, device=options.device, output_dir=folder
    )
    flags = [text for name, value in settings.items() for text in (flag(name), str(value))]
    if subprocess.run([sys.executable, f"mobilenetv4_{variant}.py", *flags], stdout=sys.stderr).returncode:
        raise RunError(f"{variant}, {epochs} epochs: its script failed")
    trained = load_network(folder / "checkpoint.pt", on=options.device)
    return trained, load_images(trained)[0], json.loads((folder / "summary.json").read_text())["seconds"]


# ---- Report --------------------------------------------------------------------------------------------------------


def accuracies(trained: Trained, data: Data) -> list[float]:
    """Return the accuracy of one view, of two, and of six."""
    logits: list[Any] = [0, 0, 0]
    for (down, right), weight in VIEWS.items():
        images = shift(data.test_images, down, right)
        plain, mirrored = (common.predict(trained.network, images, data, trained.config, flip=f) for f in (False, True))
        if (down, right) == (0, 0):
            logits[:2] = [plain, plain + mirrored]
        logits[2] = logits[2] + weight * (plain + mirrored)
    return [common.score(found, data.test_labels)["accuracy"] for found in logits]


def deployed(trained: Trained, data: Data) -> str:
    """Return size and latency of the network as ONNX, in float32 and in 8 bits."""
    trained = replace(trained, network=trained.network.cpu(), device=torch.device("cpu"))
    content = export.to_onnx(trained)
    small = export.quantize(content, export.calibration_images(data))
    parts = []
    for model in (content, small):
        milliseconds = export.latency(export.run_onnx(model), 32)
        parts.append(f"{len(model) / 1e6:>7.2f} MB{milliseconds:>6.2f} ms")
    return "".join(parts)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("contenders", nargs="+", help="airbench94, or a variant and its epochs, as baseline:45")
    parser.add_argument("--data-dir", type=Path, default=Config.data_dir, help="of CIFAR-10 (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/time"), help="(default: %(default)s)")
    parser.add_argument("--airbench-epochs", type=argument(int, 1, 1e6), default=EPOCHS, help="(default: %(default)s)")
    parser.add_argument("--seed", type=argument(int, 0, 2**32 - 1), default=0, help="(default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="(default: %(default)s)")
    options = parser.parse_args()
    for contender in options.contenders:
        if not re.fullmatch(r"airbench94|(baseline|enhanced):[1-9]\d*", contender):
            parser.error(f"{contender}: expected airbench94, baseline:EPOCHS or enhanced:EPOCHS")
    with exit_in_one_line():
        optional("onnx", "onnxscript", "onnxruntime")  # now, and not after hours of training
        keep_freed_memory()
        print(f"{'':<14}{'minutes':>8}{'one view':>10}{'two':>8}{'six':>8}{'parameters':>12}{'M MACs':>8}", end="")
        print(f"{'float32':>19}{'int8':>19}")
        for contender in options.contenders:
            name, _, epochs = contender.partition(":")
            trained, data, seconds = run_script(name, epochs, options) if epochs else run_airbench94(options)
            one, two, six = accuracies(trained, data)
            size = f"{count_parameters(trained.network):>12,}{count_macs(trained.network, 32)[''] / 1e6:>8.1f}"
            print(f"{contender:<14}{seconds / 60:>8.1f}{one:>9.2f}%{two:>7.2f}%{six:>7.2f}%{size}", end="")
            print(deployed(trained, data), flush=True)


if __name__ == "__main__":
    main()
