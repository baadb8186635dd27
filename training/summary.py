"""The network layer by layer: kind, output shape, parameters, multiply-accumulates (MACs)."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, image_size: int) -> dict[str, int]:
    """Return the multiply-accumulates of convolutions and matrix products for one image, by module ("" is all)."""
    network = copy.deepcopy(network).to("cpu").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, image_size, image_size))
    root, counts = type(network).__name__, counter.get_flop_counts()
    return {name.removeprefix(root).removeprefix("."): sum(flops.values()) // 2 for name, flops in counts.items()}


def named_layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each layer or block that gets a row; plain Sequentials are looked into."""
    for name, part in network.named_children():
        if type(part) is nn.Sequential:
            yield from named_layers(part, f"{prefix}{name}.")
        else:
            yield prefix + name, part


def print_summary(network: nn.Module, image_size: int) -> None:
    """Print a row for each layer or block, and the totals."""
    macs = count_macs(network, image_size)

    def show(name: str, part: nn.Module, _inputs: Any, output: Tensor) -> None:
        kind, shape = getattr(part, "kind", type(part).__name__), " x ".join(map(str, output.shape[1:]))
        print(f"{name:<12}{kind:<20}{shape:<16}{count_parameters(part):>12,}{macs.get(name, 0):>14,}")

    print(f"{'layer':<12}{'kind':<20}{'output':<16}{'parameters':>12}{'MACs':>14}")
    for name, part in named_layers(network):
        part.register_forward_hook(functools.partial(show, name))
    network.eval()(torch.zeros(1, 3, image_size, image_size))
    print(f"{'total':<48}{count_parameters(network):>12,}{macs['']:>14,}")
