"""MobileNetV4-Conv-Small for small images, trained on CIFAR-10: the baseline.

    python mobilenetv4_baseline.py                # train, or continue an interrupted run
    python mobilenetv4_baseline.py --summary      # the network's table: blocks, shapes, parameters, MACs

3,056,370 parameters and 80.0 million multiply-accumulates per 32 x 32 image. Measured accuracy and time: README.md.

Architecture: Qin et al., "MobileNetV4: Universal Models for the Mobile Ecosystem", arXiv 2404.10518, checked against
the authors' configuration (tensorflow/models). Departures from the paper: stride 1 in the stem and stage 1 (the
paper's strides would reduce 32 x 32 to 1 x 1), width 1.15, ReLU6 instead of ReLU, our own initialisation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

import common
from training.cpu import BatchNorm2d, DepthwiseConv2d, ReLU6

# ---- The architecture ----------------------------------------------------------------------------------------------
# Conv-Small as in the authors' configuration, one row per layer or block, none of which differs from the
# paper. The stem is stage 0. The stride of a stage is that of its first row; every other row has stride 1. In
# BLOCKS a kernel of 0 means that the block has no such depthwise convolution. `out` is multiplied by the width.

CONVOLUTIONS = (
    # stage  kernel  out
    (0, 3, 32),
    (1, 3, 32),
    (1, 1, 32),
    (2, 3, 96),
    (2, 1, 64),
)
BLOCKS = (
    # stage  start  middle  expansion  out
    (3, 5, 5, 3, 96),
    (3, 0, 3, 2, 96),
    (3, 0, 3, 2, 96),
    (3, 0, 3, 2, 96),
    (3, 0, 3, 2, 96),
    (3, 3, 0, 4, 96),
    (4, 3, 3, 6, 128),
    (4, 5, 5, 4, 128),
    (4, 0, 5, 4, 128),
    (4, 0, 5, 3, 128),
    (4, 0, 3, 4, 128),
    (4, 0, 3, 4, 128),
)
HEAD = 960  # channels of the last convolution before the pooling
FEATURES = 1280  # features before the classifier, whatever the width


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round to the nearest multiple of `divisor`, at least `divisor` and never below 90% of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


# ---- Layers --------------------------------------------------------------------------------------------------------

Activation = Callable[[], nn.Module]  # a class such as nn.ReLU6, called without arguments


def depthwise(channels: int, kernel_size: int, stride: int = 1, activation: Activation | None = None) -> nn.Module:
    """Depthwise convolution -> BN [-> activation], or nothing at all where `kernel_size` is 0."""
    if kernel_size == 0:
        return nn.Identity()
    layers = [DepthwiseConv2d(channels, kernel_size, stride), BatchNorm2d(channels)]
    return nn.Sequential(*layers, activation()) if activation else nn.Sequential(*layers)


class ConvBNActivation(Conv2dNormActivation):
    """Convolution -> BN -> activation; `activation=None` leaves the last out. Never a bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            norm_layer=BatchNorm2d,
            activation_layer=activation,
            inplace=None,
        )

    @property
    def kind(self) -> str:
        return f"Conv {self[0].kernel_size[0]}x{self[0].kernel_size[1]}"


class UniversalInvertedBottleneck(nn.Module):
    """The one block of MobileNetV4 (paper, section 4): four kinds, by which depthwise convolutions are present.

    There is no activation after the start depthwise, after the projection or after the addition; the stride sits on
    the middle depthwise (on the start one where it stands alone); the residual is there exactly when the shape stays.

    Args:
        in_channels: Channels of the input, multiplied by `expansion` inside.
        out_channels: Channels of the output.
        start: Kernel of the depthwise convolution before the expansion, 0 for none.
        middle: Kernel of the depthwise convolution after the expansion, 0 for none.
        stride: 1, or 2 to halve height and width.
        expansion: Expanded width as a multiple of `in_channels`.
        activation: Class of the activation, called without arguments.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        start: int,
        middle: int,
        stride: int,
        expansion: float,
        activation: Activation,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if stride > 1 and not (start or middle):
            raise ValueError(f"a block without depthwise convolutions cannot have stride {stride}")
        expanded = make_divisible(in_channels * expansion)
        self.kind = {(True, True): "ExtraDW", (False, True): "IB", (True, False): "ConvNext", (False, False): "FFN"}[
            start > 0, middle > 0
        ]
        self.residual = stride == 1 and in_channels == out_channels
        self.start = depthwise(in_channels, start, 1 if middle else stride)
        self.expand = ConvBNActivation(in_channels, expanded, activation=activation)
        self.middle = depthwise(expanded, middle, stride, activation)
        self.project = ConvBNActivation(expanded, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)  # (N, in, H, W)
        y = self.expand(y)  # (N, expanded, H, W)
        y = self.middle(y)  # (N, expanded, H / stride, W / stride)
        y = self.project(y)  # (N, out, H / stride, W / stride)
        return x + y if self.residual else y


# ---- The network ---------------------------------------------------------------------------------------------------


class MobileNetV4(nn.Module):
    """MobileNetV4-Conv-Small.

    Args:
        num_classes: Outputs of the classifier.
        width: Multiplies every channel count of the table but the 1280.
        strides: Strides of the stem and of stages 1 to 4; (2, 2, 2, 2, 2) is the paper's, for 224-pixel images.
        activation: Class of the activation, called without arguments.
        block: Builds a block; called as UniversalInvertedBottleneck is.

    Shapes: images (N, 3, H, W), normalised float -> logits (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        width: float = 1.15,
        strides: Sequence[int] = (1, 1, 2, 2, 2),
        activation: Activation = ReLU6,
        block: Callable[..., nn.Module] = UniversalInvertedBottleneck,
    ) -> None:
        super().__init__()
        if num_classes < 1 or not 0 < width < math.inf or len(strides) != 5 or not set(strides) <= {1, 2}:
            raise ValueError(
                "num_classes must be at least 1, width positive, strides five of 1 or 2, "
                f"got {num_classes}, {width}, {tuple(strides)}"
            )
        channels = 3
        stride = dict(enumerate(strides))  # taken by the stage's first row; the others have 1
        stages: list[list[nn.Module]] = [[], [], [], [], []]
        for stage, kernel, out in CONVOLUTIONS:
            out = make_divisible(out * width)
            stages[stage].append(ConvBNActivation(channels, out, kernel, stride.pop(stage, 1), activation))
            channels = out
        for stage, start, middle, expansion, out in BLOCKS:
            out = make_divisible(out * width)
            stages[stage].append(
                block(
                    channels,
                    out,
                    start=start,
                    middle=middle,
                    stride=stride.pop(stage, 1),
                    expansion=expansion,
                    activation=activation,
                )
            )
            channels = out
        self.stem, self.stage1, self.stage2, self.stage3, self.stage4 = (nn.Sequential(*rows) for rows in stages)
        head = make_divisible(HEAD * width)
        self.head = ConvBNActivation(channels, head, activation=activation)
        self.pool = nn.AdaptiveAvgPool2d(1)
        # The paper's 1 x 1 convolution of the pooled 1 x 1 map is this matrix product, which costs far less as one.
        self.features = nn.Sequential(nn.Linear(head, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), activation())
        self.classifier = nn.Linear(FEATURES, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.stage1(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.stage4(x)
        x = self.head(x)  # (N, 960 x width, H / 8, W / 8) at the default strides
        x = self.pool(x).flatten(1)  # (N, 960 x width)
        x = self.features(x)  # (N, 1280)
        return self.classifier(x)  # (N, num_classes)


DEPTHWISE_SCALE = 0.125  # of initial depthwise kernels, as a fraction of the usual


def initialize(network: nn.Module) -> None:
    """Set every weight: He et al. (arXiv 1502.01852) with the fan-out of one group, depthwise kernels at an eighth of
    that standard deviation, the classifier at 0.01, and the last BN of residual branches 0 (arXiv 1706.02677).

    BN undoes the scale of a kernel, but an optimizer's step is the larger beside a smaller one: with depthwise kernels
    at full scale AdamW learns them too slowly (results/tuning). The running variance of their BN starts as small as
    their output; from 1 it would still be wrong at the end of a run of less than 60 steps.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) / module.groups
            scale = DEPTHWISE_SCALE if isinstance(module, DepthwiseConv2d) else 1.0
            nn.init.normal_(module.weight, std=scale * math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            classifier = module is network.classifier
            nn.init.normal_(module.weight, std=0.01 if classifier else math.sqrt(2 / module.out_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if getattr(module, "residual", False):
            nn.init.zeros_(module.project[1].weight)
        if isinstance(module, nn.Sequential) and isinstance(module[0], DepthwiseConv2d):
            nn.init.constant_(module[1].running_var, DEPTHWISE_SCALE**2)


STRIDES = {2: (1, 1, 2, 1, 2), 3: (1, 1, 2, 2, 2), 4: (1, 2, 2, 2, 2), 5: (2, 2, 2, 2, 2)}  # by number of halvings


def network_arguments(config: common.Config) -> dict[str, Any]:
    """Return what the script builds its network with.

    Strides are chosen so that the last feature map is 4 to 8 pixels wide; from 128 pixels on they are the paper's.
    """
    halvings = (config.image_size // 4).bit_length() - 1
    return dict(width=1.15, strides=STRIDES[min(max(halvings, 2), 5)])


if __name__ == "__main__":
    common.main("baseline", MobileNetV4, network_arguments)
