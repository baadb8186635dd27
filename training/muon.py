"""Muon: momentum whose matrices are made orthogonal before each step (kellerjordan.github.io/posts/muon)."""

import functools
import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon for convolutions and linear layers, many matrices at once.

    torch.optim.Muon takes one matrix at a time; this one takes convolutions too, as matrices (out, in x height x
    width), and very large matrices in blocks of rows: whole, the 1280 x 1104 one slows the training and gains nothing
    (results/tuning). On other devices than a CPU all matrices form one batch, padded with zeros.

    Args:
        params: Weights of dense convolutions and linear layers.
        lr: Spectral norm of a step, times sqrt(rows / columns) for tall matrices.
        momentum: Nesterov momentum.
        weight_decay: Decoupled, multiplied by lr.
        dtype: Precision of the matrix products.
    """

    BY_SHAPE = ("cpu",)  # devices on which a batch holds one shape only
    LARGE, BLOCK = 512, 128  # a matrix with more rows and columns than LARGE is taken in blocks of BLOCK rows

    def __init__(
        self, params: Any, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        self.padding = functools.cache(padding)  # of these weights, the same at every step

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [weight.grad for weight in weights]
            for weight in (weight for weight in weights if not self.state[weight]):
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            updates = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for blocks, matrices in self.batches(weights, updates):
                scale, steps = self.directions(matrices)
                steps = [in_format_of(block, step) for block, step in zip(blocks, steps, strict=True)]
                torch._foreach_add_(blocks, steps, alpha=-group["lr"] * scale)

    def batches(self, weights: list[Tensor], updates: list[Tensor]) -> Collection[tuple[list[Tensor], list[Tensor]]]:
        """Return (blocks of weights, their updates as matrices): all at once, or on a CPU a batch for each shape."""
        batches: dict[torch.Size | None, tuple[list[Tensor], list[Tensor]]] = {}
        for weight, update in zip(weights, updates, strict=True):
            matrix = update.flatten(1)
            rows = self.BLOCK if min(matrix.shape) > self.LARGE else len(matrix)
            for block, part in zip(weight.split(rows), matrix.split(rows), strict=True):
                key = part.shape if weight.device.type in self.BY_SHAPE else None
                blocks, matrices = batches.setdefault(key, ([], []))
                blocks.append(block)
                matrices.append(part)
        return batches.values()

    def directions(self, matrices: list[Tensor]) -> tuple[float, Iterable[Tensor]]:
        """Return (scale, orthogonal matrices); matrices of several shapes, in one padded batch, are scaled already."""
        rows, columns = matrices[0].shape
        if len({matrix.shape for matrix in matrices}) == 1:
            stacked = torch.empty(len(matrices), rows, columns, dtype=self.dtype, device=matrices[0].device)
            torch._foreach_copy_(list(stacked), matrices)
            return max(1, rows / columns) ** 0.5, orthogonalize(stacked)
        source, place, scale = self.padding(tuple(matrix.shape for matrix in matrices), matrices[0].device)
        elements = torch.cat([*(matrix.flatten() for matrix in matrices), matrices[0].new_zeros(1)]).to(self.dtype)
        steps = orthogonalize(elements[source]).flatten()[place] * scale
        return 1.0, steps.split([matrix.numel() for matrix in matrices])


def padding(shapes: tuple[torch.Size, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out matrices as one batch (B, rows, columns), tall ones transposed, all filled up with zeros.

    Returns:
        For each place of the batch the index of its element, of all elements in turn and a zero after the last; for
        each element its place in the flattened batch, and its scale.
    """
    sizes = [math.prod(shape) for shape in shapes]
    source = torch.full((len(shapes), max(map(min, shapes)), max(map(max, shapes))), sum(sizes))
    for matrix, shape, elements in zip(source, shapes, torch.arange(sum(sizes)).split(sizes), strict=True):
        elements = elements.view(shape)
        matrix[: min(shape), : max(shape)] = elements if shape[0] <= shape[1] else elements.mT
    place = torch.zeros(sum(sizes) + 1, dtype=torch.int64)
    place[source.flatten()] = torch.arange(source.numel())
    scale = [torch.full((rows * columns,), max(1, rows / columns) ** 0.5) for rows, columns in shapes]
    return source.to(device), place[:-1].to(device), torch.cat(scale).to(device)


def in_format_of(block: Tensor, step: Tensor) -> Tensor:
    """Return a step in the shape and memory format of its block: if one differs, foreach takes one at a time."""
    step, last = step.reshape(block.shape), torch.channels_last
    return step.contiguous(memory_format=last) if block.is_contiguous(memory_format=last) else step


def orthogonalize(matrices: Tensor, iterations: int = 4) -> Tensor:
    """Bring the singular values of (B, rows, columns) near 1 by Newton-Schulz iterations of the fifth order.

    The post has 5 iterations; 4 are faster, and the singular values need not be close to 1.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a, b, c = 3.4445, -4.7750, 2.0315  # the post's, with a steep slope at 0
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
