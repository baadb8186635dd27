"""Muon against torch.optim.Muon, plain matrices and the singular value decomposition."""

import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_muon_equals_that_of_torch_on_matrices(shape):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    start = ours.detach().clone()
    theirs = nn.Parameter(start.clone())
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    optimizers = [
        Muon([ours], **settings, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], **settings, nesterov=True, ns_steps=4),
    ]
    for _ in range(5):
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=2e-3)
    assert (theirs - start).abs().max() > 0.02  # the tolerance is small beside what the weights moved


def step_of(start, gradient, momentum=0.9):
    """Return how far one step moves a weight."""
    weight = nn.Parameter(start.clone())
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1, momentum=momentum, weight_decay=0.0).step()
    return start - weight.detach()


def test_muon_takes_a_convolution_as_a_matrix_whatever_its_memory_format():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3)
    layouts = (torch.contiguous_format, torch.channels_last)
    steps = [step_of(*(tensor.clone(memory_format=layout) for tensor in (start, gradient))) for layout in layouts]
    assert torch.equal(*steps)
    assert torch.allclose(steps[0].flatten(1), step_of(start.flatten(1), gradient.flatten(1)), atol=1e-6)


def test_muon_takes_the_largest_matrices_in_blocks_of_rows_and_no_others(monkeypatch):
    torch.manual_seed(0)
    start, gradient, steps = torch.randn(300, 520), torch.randn(300, 520), []
    for large in (299, 300):
        monkeypatch.setattr(Muon, "LARGE", large)
        steps.append(step_of(start, gradient, momentum=0.0))
    blocks = [0.1 * orthogonalize(block[None])[0] for block in gradient.split(128)]
    assert torch.allclose(steps[0], torch.cat(blocks), atol=1e-5)
    assert torch.allclose(steps[1], 0.1 * orthogonalize(gradient[None])[0], atol=1e-5)
    assert not torch.allclose(*steps, atol=1e-3)


def test_matrices_of_several_shapes_are_stepped_as_each_alone():
    torch.manual_seed(0)
    starts, gradients = ([torch.randn(shape) for shape in ((4, 9), (6, 5), (4, 9))] for _ in range(2))
    weights = [nn.Parameter(start.clone()) for start in starts]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.0).step()
    for weight, start, gradient in zip(weights, starts, gradients, strict=True):
        torch.testing.assert_close(start - weight.detach(), step_of(start, gradient), rtol=1e-4, atol=1e-5)


def test_orthogonalizing_brings_singular_values_near_one_and_keeps_the_directions():
    torch.manual_seed(0)
    matrices = torch.randn(3, 10, 30)
    results = orthogonalize(matrices, iterations=5)
    values = torch.linalg.svdvals(results)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ results @ right.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    assert torch.allclose(orthogonalize(matrices.mT), orthogonalize(matrices).mT, atol=1e-5)
