"""Whether a step on Apple MPS is right, and how fast: for whoever has a Mac.

    python -m benchmarks.mps_check

Compares one step's gradients with the CPU's, for both variants in fp32, and times training steps: eager in fp32 and
bf16, and compiled. Please paste the block that it prints into an issue. Expected: differences up to 0.05 in the
baseline, where rounding takes values across the corners of ReLU6, and 0.001 in the enhanced network (between two memory
formats of a CPU: 0.02 and 0.00005); by calculation 110 ms a step of the baseline on an M1, 15 to 20 ms on a Max chip.
Neither has been measured on a Mac.
"""

import argparse
import functools
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
from tools import BUILDERS, add_device, exit_in_one_line, new_parser
from training import devices
from training.augmentation import augment, draw_epoch
from training.config import Config, argument, one_line
from training.cpu import keep_freed_memory
from training.data import random_data

CPU = torch.device("cpu")
SETTINGS = {  # what is timed
    "eager fp32": dict(precision="fp32", compile="off"),
    "eager bf16": dict(precision="bf16", compile="off"),
    "compiled fp32": dict(precision="fp32", compile="on"),
}


def gradients(build: Callable[..., nn.Module], config: Config, device: torch.device) -> dict[str, Tensor]:
    """Return the gradients of one batch, augmented on the device, without anything random in the network."""
    data = random_data(config.batch_size, device)
    state = common.new_state(build, {}, data, config, None)
    for name, layer in state.raw.named_modules():
        if hasattr(layer, "p"):  # stochastic depth
            layer.p = 0.0
        if name.endswith("project.1"):  # begins at zero, where the branch before it has no gradient
            nn.init.ones_(layer.weight)
    batch = augment(data, draw_epoch(config.batch_size, config, 1, device), slice(None), config)
    common.make_loss(state, data, config)(*batch).backward()
    return {name: parameter.grad.cpu() for name, parameter in state.raw.named_parameters()}


def largest_difference(build: Callable[..., nn.Module], config: Config, device: torch.device) -> str:
    """Return the largest distance of a weight's gradient from the CPU's, relative to its norm, and the weight's name.

    Norms count as a thousandth of the largest one at least: what BN cancels has a gradient of rounding errors alone.
    """
    found, expected = (gradients(build, config, place) for place in (device, CPU))
    least = max(value.norm() for value in expected.values()) / 1000
    differences = {
        name: ((found[name] - value).norm() / value.norm().clamp(min=least)).item() for name, value in expected.items()
    }
    worst = max(differences, key=differences.__getitem__)
    return f"largest relative difference {differences[worst]:.1e} ({worst})"


def time_steps(build: Callable[..., nn.Module], config: Config, device: torch.device, steps: int) -> str:
    """Train for an epoch of so many steps, then for another one whose time counts."""
    if config.compile == "on" and not devices.can_compile(device):
        raise RuntimeError("torch.compile does not work here")
    data = random_data(steps * config.batch_size, device)
    state = common.new_state(build, {}, data, config, None)
    loss_fn = common.make_loss(state, data, config)
    for epoch in (1, 2):
        begun = time.perf_counter()
        common.train_epoch(state, loss_fn, data, config, epoch, tqdm(disable=True))
        devices.synchronize(device)
    return f"{1000 * (time.perf_counter() - begun) / steps:.1f} ms a step"


def guarded(task: Callable[[], str]) -> str:
    try:
        return task()
    except Exception as error:  # whatever an untried device raises is a result
        return f"failed: {type(error).__name__}: {one_line(error)}"


def describe_machine(device: torch.device) -> str:
    chip = platform.processor() or platform.machine()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        chip = subprocess.run(command, capture_output=True, text=True).stdout.strip() or chip
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.platform()
    return f"{system}, {chip}, torch {torch.__version__}, {device.type}"


def report(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    config = Config(batch_size=options.batch_size, epochs=2, precision="fp32", compile="off")
    yield describe_machine(device)
    for variant, build in BUILDERS.items():
        yield f"{variant}, gradients: {guarded(functools.partial(largest_difference, build, config, device))}"
        for name, settings in SETTINGS.items():
            task = functools.partial(time_steps, build, replace(config, **settings), device, options.steps)
            yield f"{variant}, {name}, batch {options.batch_size}: {guarded(task)}"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=argument(int, 1, 1e4), default=50, help="timed (default: %(default)s)")
    parser.add_argument("--batch-size", type=argument(int, 2, 1e4), default=128, help="images (default: %(default)s)")
    add_device(parser)
    parser.set_defaults(device="mps")
    options = parser.parse_args()
    with exit_in_one_line():
        keep_freed_memory()
        device = devices.choose(options.device)
        devices.set_up(device)
        print("```")
        for line in report(options, device):
            print(line)
        print("```")


if __name__ == "__main__":
    main()
