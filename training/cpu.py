"""All that exists for the speed of a CPU: kept memory, and layers that compile well."""

import contextlib
import ctypes
import itertools
import math
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep_freed_memory() -> None:
    """Make Linux keep freed memory in the process, in huge pages; must come before the first tensor.

    Otherwise each activation of tens of megabytes goes back to the kernel and is faulted in again, page by page, at
    every step. Elsewhere this does nothing.
    """
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
        m_trim_threshold, m_mmap_max = -1, -4  # from glibc's malloc.h; another C library may have no mallopt
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)


def compiles_for_training(layer: nn.Module, x: Tensor) -> bool:
    return layer.training and x.device.type == "cpu" and torch.compiler.is_compiling()


class BatchNormFunction(torch.autograd.Function):
    """BN in training, to be compiled for a CPU: one pass over the input for the statistics, one for the sums backward.

    Both reduce each image first, which stays in the cache, then the batch; PyTorch's go through the whole batch, a few
    channels at a time. The statistics are sums of the distances from each image's first pixel, so that a variance is
    not lost beside a large mean.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        first = x[:, :, :1, :1].float()
        distance = x.float() - first
        means = distance.mean((2, 3))  # (N, C)
        variances = distance.square().mean((2, 3)) - means.square()
        means = means + first[:, :, 0, 0]
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)  # (C,)
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        scale = weight * inverse
        shift = bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        x, gradient, dtype, count = x.float(), gradient.float(), x.dtype, x.numel() / len(mean)
        of_bias = gradient.sum((2, 3)).sum(0)  # (C,)
        of_weight = (gradient * (x - mean[:, None, None])).sum((2, 3)).sum(0) * inverse
        scale = weight * inverse
        slope = -scale * inverse * of_weight / count
        shift = -scale * of_bias / count - slope * mean
        of_input = gradient * scale[:, None, None] + x * slope[:, None, None] + shift[:, None, None]
        return of_input.to(dtype), of_weight, of_bias, None


class BatchNorm2d(nn.BatchNorm2d):
    """BN that compiles well for a CPU.

    Nowhere does it update num_batches_tracked, which would cost a kernel launch per layer on a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not compiles_for_training(self, x):
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        y, mean, variance = BatchNormFunction.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() / len(mean)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y


class ReLU6Function(torch.autograd.Function):
    """ReLU6 whose backward pass takes its output, which the next layer saves anyway, and not its input.

    That is BN's output, which compiled code would compute again and write to memory in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu6(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.where((y <= 0) | (y >= 6), 0, gradient)


class SiLUFunction(torch.autograd.Function):
    """SiLU whose backward pass takes input and output: output / input is the sigmoid, without an exponential.

    With an output in bfloat16 the derivative is off by at most 0.4% of |1 - y|; for large y it is set to its limit, 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.silu(x)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, y = (tensor.float() for tensor in ctx.saved_tensors)
        sigmoid = (y + 1e-30 / 2) / (x + 1e-30)  # 1 / 2 at 0; BN's output is 0 or far from 1e-30
        large = 8 if gradient.dtype == torch.bfloat16 else 20  # where it is 1.002, and 1.00000004
        return (gradient * torch.where(y >= large, 1, y + sigmoid * (1 - y))).to(gradient.dtype)


class ReLU6(nn.ReLU6):
    """ReLU6, with a gradient that is fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return ReLU6Function.apply(x) if compiles_for_training(self, x) else super().forward(x)


class SiLU(nn.SiLU):
    """SiLU, with a gradient that is fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return SiLUFunction.apply(x) if compiles_for_training(self, x) else super().forward(x)


class DepthwiseFunction(torch.autograd.Function):
    """A depthwise convolution, to be compiled for a CPU, whose gradients avoid oneDNN's slow ones.

    In bfloat16 the gradient of the input is a convolution by the flipped kernel, for stride 2 of the gradient with
    zeros between; oneDNN's own takes up to 100 times as long. The gradient of a 5x5 kernel is slow in float32 too, and
    here 25 sums of products, one for each place of the kernel over the padded input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight.to(x.dtype), None, stride, weight.shape[-1] // 2, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        number, channels, height, width = x.shape
        stride, side, weights = ctx.stride, weight.shape[-1], weight.to(x.dtype)
        padding = side // 2

        def native(*wanted: bool) -> tuple[Tensor, Tensor, None]:
            return torch.ops.aten.convolution_backward(
                gradient, x, weights, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], channels, wanted
            )

        if gradient.dtype == torch.bfloat16:
            spread = gradient
            if stride > 1:
                spread = gradient.new_zeros(number, height, width, channels).permute(0, 3, 1, 2)
                spread[:, :, ::stride, ::stride] = gradient
            of_input = F.conv2d(spread, weights.flip(2, 3), None, 1, padding, 1, channels)
        else:
            of_input = native(True, False, False)[0]
        if side < 5:
            return of_input, native(False, True, False)[1].to(weight.dtype), None
        groups = math.gcd(number, 16), -1  # of images, each of which stays in the cache
        padded, products = F.pad(x, [padding] * 4).float().unflatten(0, groups), []
        for row, column in itertools.product(range(side), repeat=2):
            inputs = padded[..., row : row + height : stride, column : column + width : stride]
            products.append((inputs * gradient.unflatten(0, groups)).sum((1, 3, 4)).sum(0))  # (C,)
        of_weight = torch.stack(products, -1).view(channels, side, side, 1).permute(0, 3, 1, 2)  # channels last
        return of_input, of_weight, None


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution, with gradients that are fast on a CPU.

    Args:
        channels: Input and output channels.
        kernel_size: Side of the kernel in pixels, odd; padding keeps the size.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(channels, channels, kernel_size, stride, padding=kernel_size // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            if compiles_for_training(self, x):
                return DepthwiseFunction.apply(x, self.weight, self.stride[0])
            return super().forward(x.to(self.weight.dtype))  # in float32: see DepthwiseFunction
