"""Training throughput: this project's loop, the loop that a user would write instead, and the machine's limits.

    pip install timm
    python -m benchmarks.throughput                # about 10 minutes on two CPU cores; nothing else may run
    python -m benchmarks.throughput --levers baseline   # without one of the loop's levers at a time
    python -m benchmarks.throughput --device cuda

The contenders take turns, one at a time, so that a machine whose speed drifts is the same for all; every turn is a
process of its own, since the allocator's settings are a process's, and so is its luck with the memory it gets, which is
worth 10%. Images are random, except for the start-up.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from tqdm import tqdm

import common
from mobilenetv4_baseline import MobileNetV4
from tools import BUILDERS, exit_in_one_line, new_parser, optional
from training import cpu, devices
from training.config import Config, RunError, argument
from training.data import load_data, random_data
from training.muon import Muon
from training.summary import count_macs, count_parameters

try:
    import resource  # POSIX only; elsewhere memory is not measured
except ImportError:
    resource = None

PROJECT_SIZE = 50_000  # images of CIFAR-10, by which the project's loop decides whether to compile


# ---- The contenders ------------------------------------------------------------------------------------------------


def plain_depthwise(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Do what training.cpu.DepthwiseConv2d does where it is not compiled."""
    with torch.autocast("cpu", enabled=False):
        return nn.Conv2d.forward(layer, x.to(layer.weight.dtype))


Patches = list[tuple[Any, str, Any]]
LEVERS: dict[str, Patches | dict[str, str]] = {  # of the loop on a CPU: how each is taken away, by patches or a setting
    "freed memory kept": [(cpu, "keep_freed_memory", lambda: None)],
    "channels last": [(devices, "memory_format", lambda _: torch.contiguous_format)],
    "bf16": {"precision": "fp32"},
    "compilation": {"compile": "off"},
    "BN by image": [(cpu.BatchNorm2d, "forward", nn.BatchNorm2d.forward)],
    "activations' gradients": [(cpu.ReLU6, "forward", nn.ReLU6.forward), (cpu.SiLU, "forward", nn.SiLU.forward)],
    "depthwise gradients": [(cpu.DepthwiseConv2d, "forward", plain_depthwise)],
    "blocks in Muon": [(Muon, "LARGE", 1 << 30)],
    "flushed denormals": [(torch, "set_flush_denormal", lambda flush: None)],
}


def set_up(name: str) -> torch.device:
    cpu.keep_freed_memory()
    device = devices.choose(name)
    devices.set_up(device)
    return device


class Ours:
    """The project's loop with its defaults, whole epochs of `--images` images, or the same without a lever."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        lever = LEVERS.get(name.removeprefix("without "), {})
        for patch in lever if isinstance(lever, list) else []:
            setattr(*patch)
        settings = options.settings | (lever if isinstance(lever, dict) else {})
        device = set_up(options.device)
        config = Config(**{"batch_size": options.batch_size} | settings)
        self.config, self.epoch = devices.resolve_auto(config, device, PROJECT_SIZE), 0
        self.data = random_data(options.images, device)
        build = BUILDERS[name if name in BUILDERS else options.levers]
        self.state = common.new_state(build, {}, self.data, self.config, None)
        self.loss_fn = common.make_loss(self.state, self.data, self.config)
        self.about = f"{self.config.precision}, compilation {self.config.compile}"

    def train(self) -> int:
        self.epoch += 1
        common.train_epoch(self.state, self.loss_fn, self.data, self.config, self.epoch, tqdm(disable=True))
        return len(self.data.train_labels) // self.config.batch_size * self.config.batch_size

    def evaluate(self) -> int:
        return len(common.predict(self.state.averaged, self.data.test_images, self.data, self.config))


class PlainDataset(torch.utils.data.Dataset):
    """What torchvision's CIFAR10 does with one image, on random ones."""

    def __init__(self, count: int, transform: Callable) -> None:
        data = random_data(count, torch.device("cpu"))
        self.images, self.labels = data.train_images.numpy(), data.train_labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Plain:
    """The loop a user would write: timm's network at the same size, a DataLoader of two workers, SGD, eager."""

    def __init__(self, options: argparse.Namespace) -> None:
        (timm_models,) = optional("timm.models.mobilenetv3")
        self.device = set_up(options.device)
        build = timm_models._gen_mobilenet_v4  # what timm.create_model calls, with a width
        self.network = build("mobilenetv4_conv_small", 1.15, num_classes=10, act_layer=nn.ReLU6).to(self.device)
        self.network.conv_stem.stride = self.network.blocks[0][0].conv.stride = (1, 1)
        if count_parameters(self.network) != 3_056_370:
            raise RuntimeError("this version of timm builds another network")
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        normalize = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        loader = torch.utils.data.DataLoader
        settings = dict(batch_size=options.batch_size, num_workers=2, pin_memory=self.device.type == "cuda")
        train, test = (PlainDataset(options.images, transforms.Compose(t)) for t in (augment + normalize, normalize))
        self.batches = loader(train, shuffle=True, drop_last=True, persistent_workers=True, **settings)
        self.test_batches = loader(test, persistent_workers=True, **settings)
        self.about = "fp32, eager, contiguous"

    def train(self) -> int:
        self.network.train()
        for images, labels in self.batches:
            images, labels = images.to(self.device), labels.to(self.device)
            loss = nn.functional.cross_entropy(self.network(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return len(self.batches) * self.batches.batch_size

    @torch.no_grad()
    def evaluate(self) -> int:
        self.network.eval()
        return sum(len(self.network(images.to(self.device)).argmax(1).cpu()) for images, _ in self.test_batches)


# ---- Turns ---------------------------------------------------------------------------------------------------------


def work(name: str, options: argparse.Namespace) -> None:
    """Train and evaluate twice, and print the second time's rates as JSON; or only the shares of "profile NAME"."""
    contender = Plain(options) if name.endswith("plain") else Ours(name.removeprefix("profile "), options)
    for _ in range(2):
        rates = {}
        for task in (contender.train, contender.evaluate):
            begun = time.monotonic()
            images = task()
            devices.synchronize(torch.device(options.device))
            rates[task.__name__] = images / (time.monotonic() - begun)
    memory = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak_memory()
    profiling = name.startswith("profile ")
    print(json.dumps(profile(contender) if profiling else {"about": contender.about, "memory": memory, **rates}))


def peak_memory() -> float:
    """Return the most memory, in bytes, that this process has had."""
    if not resource:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


KINDS = (  # the first that is part of an operation's name
    ("Optimizer", "optimizers"),
    ("convolution_backward", "convolution, backward"),
    ("convolution", "convolution, forward"),
    ("batch_norm", "batch norm, eager"),
    ("Compiled", "compiled: batch norm, activation, ..."),
    ("mm", "matrix products"),
    ("linear", "matrix products"),
)


def profile(contender: Any) -> dict[str, float]:
    """Return the share of a turn's time that each kind of operation takes; the optimizers' are counted as one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        contender.train()
    shares: dict[str, float] = {}

    def add(event: Any, kind: str) -> None:
        kind = next((label for part, label in KINDS if part in event.name), "other") if kind == "other" else kind
        inside = kind if kind == "optimizers" else "other"
        shares[kind] = shares.get(kind, 0) + event.self_cpu_time_total + event.self_device_time_total
        for child in event.cpu_children:
            add(child, inside)

    on_cpu = torch.autograd.DeviceType.CPU
    for event in profiler.events():
        if event.cpu_parent is None and event.device_type == on_cpu:  # kernels are counted in the events that call them
            add(event, "other")
    total = sum(shares.values())
    return {kind: value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}


def turn(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run `work` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--work", name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{name}: failed")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(options: argparse.Namespace, arguments: list[str]) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    for number in range(options.turns):
        for name, turns in results.items():
            turns.append(turn(name, arguments))
            rates = "".join(f"{turns[-1][task]:>9.1f}" for task in ("train", "evaluate"))
            print(f"turn {number + 1}: {name:<28}{rates} images/s", file=sys.stderr)
    return results


# ---- Limits --------------------------------------------------------------------------------------------------------


SIDES = {"cpu": 2048, "cuda": 4096, "mps": 2048}  # of the matrices whose product is timed


def rate_of(operation: Callable[[], Any], amount: float, device: torch.device) -> float:
    """Return the best of 6 rates, in `amount` a second."""
    times = []
    for _ in range(6):
        begun = time.monotonic()
        operation()
        devices.synchronize(device)
        times.append(time.monotonic() - begun)
    return amount / min(times)


def limits(variant: str, device: torch.device, precision: str) -> dict[str, float]:
    """Return the images/s that arithmetic alone and memory traffic alone would allow.

    Arithmetic: three times the forward pass's multiply-accumulates at the rate of a large matrix product. Traffic:
    every convolution's input read and output written once, and in the backward pass both read and the input's
    gradient written, at the rate of a large copy; nothing between convolutions touches memory.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size, network, elements = SIDES[device.type], BUILDERS[variant](), []
    macs = count_macs(network, 32)[""]
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, x, y: elements.append(3 * x[0].numel() + 2 * y.numel()))
    network.eval()(torch.zeros(1, 3, 32, 32))
    matrix = torch.randn(size, size, device=device).to(dtype)
    kernels, pixels = matrix[:, :, None, None], matrix.view(size, size, 1, 1)
    source, target = (torch.zeros(1 << 26, device=device) for _ in range(2))
    products = (lambda: matrix @ matrix, lambda: nn.functional.conv2d(pixels, kernels))  # of different libraries
    flops = max(rate_of(product, 2 * size**3, device) for product in products)
    traffic = rate_of(lambda: target.copy_(source), 2 * 4 * (1 << 26), device)
    return {
        "flops": flops,
        "bytes": traffic,
        "arithmetic": flops / (6 * macs),
        "traffic": traffic / (sum(elements) * dtype.itemsize),
    }


# ---- Start-up ------------------------------------------------------------------------------------------------------


def first_step(options: argparse.Namespace) -> None:
    """Do what a script does until its first step is done, without compiling, and print the seconds since its start."""
    device = set_up(options.device)
    config = devices.resolve_auto(Config(data_dir=options.data_dir, compile="off"), device, PROJECT_SIZE)
    data = load_data(config, device)
    state = common.new_state(MobileNetV4, {}, data, config, None)
    images, labels = data.train_images[: config.batch_size], data.train_labels[: config.batch_size]
    common.make_loss(state, data, config)(images, labels).backward()
    for optimizer in state.optimizers:
        optimizer.step()
    devices.synchronize(torch.device(options.device))
    print(time.time() - float(os.environ["STARTED"]))


def start_up(arguments: list[str]) -> float:
    """Return the median of three starts, after one that leaves a cache."""
    seconds = []
    for _ in range(4):
        environment = {**os.environ, "STARTED": str(time.time())}
        command = [sys.executable, "-m", "benchmarks.throughput", "--work", "start", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE)
        if done.returncode:
            raise RunError("the start-up: failed")
        seconds.append(float(done.stdout.split()[-1]))  # after notices of the data
    return statistics.median(seconds[1:])


# ---- Report --------------------------------------------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    name = name.replace("-", "_")
    if name not in Config().recipe() or name in ("batch_size", "image_size"):  # which the plain loop would not share
        raise argparse.ArgumentTypeError(
            f"expected a setting of our loop alone and its value, as epochs=8, got {text!r}"
        )
    return name, type(getattr(Config(), name))(value)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = new_parser(__doc__)
    default = "(default: %(default)s)"
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu", help=f"where to train {default}")
    parser.add_argument(
        "--batch-size", type=argument(int, 2, 1e6), default=Config.batch_size, help=f"images per step {default}"
    )
    parser.add_argument("--images", type=argument(int, 2, 1e6), default=2560, help=f"in an epoch of one turn {default}")
    parser.add_argument("--turns", type=argument(int, 1, 1e6), default=5, help=f"processes of each contender {default}")
    parser.add_argument("--data-dir", type=Path, help="of the start-up; without it, that is not measured")
    names = ["plain", *BUILDERS]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, help=f"what takes turns {default}")
    parser.add_argument("--levers", choices=BUILDERS, help="a variant, and without each of the loop's levers")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="of the project's settings"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.images < options.batch_size:
        parser.error(f"--images {options.images}: less than --batch-size {options.batch_size}")
    options.settings = dict(options.set)
    if options.levers:
        options.contenders = [options.levers, *(f"without {lever}" for lever in LEVERS)]
    return options


def report(
    results: dict[str, list[dict[str, Any]]], options: argparse.Namespace, arguments: list[str]
) -> Iterator[str]:
    """Yield the lines of the table: medians, and medians of the ratios of each turn to the first contender's."""

    def median(turns: list[dict[str, Any]], key: str) -> float:
        return statistics.median(result[key] for result in turns)

    def ratio(turns: list[dict[str, Any]], key: str) -> float:
        return statistics.median(own[key] / other[key] for own, other in zip(turns, first, strict=True))

    yield f"{'':<28}{'images/s':>10}{'lowest':>8}{'highest':>9}{'ratio':>7}{'evaluation':>12}{'ratio':>7}{'GiB':>6}"
    first = next(iter(results.values()))
    for name, turns in results.items():
        rates = [result["train"] for result in turns]
        yield (
            f"{name:<28}{median(turns, 'train'):>10.1f}{min(rates):>8.1f}{max(rates):>9.1f}"
            f"{ratio(turns, 'train'):>7.2f}{median(turns, 'evaluate'):>12.1f}{ratio(turns, 'evaluate'):>7.2f}"
            f"{median(turns, 'memory') / 2**30:>6.2f}  {turns[0]['about']}"
        )
    for name in [] if options.levers else results:
        shares = turn(f"profile {name}", arguments)
        yield f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share > 0.005)
    for name in [] if options.levers else [name for name in results if name in BUILDERS]:
        precision = results[name][0]["about"][:4]
        found = limits(name, torch.device(options.device), precision)
        yield (
            f"{name}: at most {found['arithmetic']:,.0f} images/s by arithmetic ({found['flops'] / 1e9:,.0f} GFLOP/s "
            f"in {precision}), {found['traffic']:,.0f} by memory traffic ({found['bytes'] / 1e9:,.0f} GB/s)"
        )


def compare(options: argparse.Namespace, arguments: list[str]) -> None:
    print(f"python -m benchmarks.throughput {' '.join(arguments)}")
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{devices.describe(devices.choose(options.device))}, {os.cpu_count()} cores")
    for line in report(take_turns(options, arguments), options, arguments):
        print(line, flush=True)
    if options.data_dir:
        print(f"import to first step, second start, not compiled: {start_up(arguments):.1f} s")


def main() -> None:
    arguments = sys.argv[1:]
    options = parse(arguments)
    with exit_in_one_line():
        if options.work:
            return first_step(options) if options.work == "start" else work(options.work, options)
        compare(options, arguments)


if __name__ == "__main__":
    main()
