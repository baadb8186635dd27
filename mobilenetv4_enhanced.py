"""MobileNetV4 enhanced: the baseline's table with squeeze-and-excitation, stochastic depth and SiLU.

    python mobilenetv4_enhanced.py                # train, or continue an interrupted run
    python mobilenetv4_enhanced.py --summary      # the network's table: blocks, shapes, parameters, MACs

4,172,682 parameters. Measured accuracy and time: README.md. None of the three ideas is in the paper's Conv-Small.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import common
from mobilenetv4_baseline import (
    BLOCKS,
    Activation,
    MobileNetV4,
    UniversalInvertedBottleneck,
    make_divisible,
    network_arguments,
)
from training.cpu import SiLU


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from all channels' means (Hu et al., arXiv 1709.01507).

    torchvision.ops.SqueezeExcitation with matrix products in place of its convolutions of a 1 x 1 map, which are slow
    on a CPU (a test checks that they are equal), and SiLU, as in EfficientNet, in place of ReLU, of whose units most
    died in training (results/tuning).

    Args:
        channels: Channels of the input and the output.
        squeezed: Hidden channels; SiLU follows the first layer, sigmoid the second.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3))  # (N, C)
        gate = F.silu(self.squeeze(gate))
        gate = self.excite(gate).sigmoid()
        return x * gate[:, :, None, None]


class EnhancedBottleneck(UniversalInvertedBottleneck):
    """The baseline's block with two of the ideas in its forward; the third, SiLU, is its activation.

    Args:
        squeeze_excitation: Width of squeeze-and-excitation, which stands after the activation of a middle depthwise
            convolution, as a fraction of the expanded width; 0 for none.
        stochastic_depth: Probability of dropping the residual branch of one image (Huang et al., arXiv 1603.09382);
            kept branches are scaled up so that the mean stays.
        *args, **kwargs: As in UniversalInvertedBottleneck.
    """

    def __init__(self, *args: Any, squeeze_excitation: float, stochastic_depth: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        expanded = self.expand[0].out_channels
        squeezed = make_divisible(expanded * squeeze_excitation)
        squeeze = squeeze_excitation > 0 and kwargs["middle"] > 0
        self.squeeze_excite = SqueezeExcitation(expanded, squeezed) if squeeze else nn.Identity()
        self.stochastic_depth = StochasticDepth(stochastic_depth, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        y = self.expand(y)
        y = self.middle(y)
        y = self.squeeze_excite(y)
        y = self.project(y)
        return x + self.stochastic_depth(y) if self.residual else y


def enhanced_mobilenetv4(
    num_classes: int = 10,
    *,
    squeeze_excitation: float = 0.25,
    stochastic_depth: float = 0.1,
    activation: Activation = SiLU,
    **network: Any,
) -> MobileNetV4:
    """Build the enhanced network; each idea can be switched off alone (0, 0, ReLU6).

    Args:
        num_classes: Outputs of the classifier.
        squeeze_excitation: See EnhancedBottleneck.
        stochastic_depth: Rate of the last block; block i of n has i / (n - 1) of it.
        activation: Class of the activation outside squeeze-and-excitation.
        network: width and strides, as in MobileNetV4.
    """
    if not 0 <= stochastic_depth < 1:
        raise ValueError(f"stochastic_depth must be at least 0 and below 1, got {stochastic_depth}")
    rates = iter([stochastic_depth * index / (len(BLOCKS) - 1) for index in range(len(BLOCKS))])

    def block(*args: Any, **kwargs: Any) -> EnhancedBottleneck:
        return EnhancedBottleneck(*args, squeeze_excitation=squeeze_excitation, stochastic_depth=next(rates), **kwargs)

    return MobileNetV4(num_classes, activation=activation, block=block, **network)


if __name__ == "__main__":
    ideas = dict(squeeze_excitation=0.25, stochastic_depth=0.1)
    common.main("enhanced", enhanced_mobilenetv4, lambda config: network_arguments(config) | ideas)
