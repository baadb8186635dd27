"""The enhanced network: each idea against a reference, each can be switched off, and nothing else is different."""

from functools import partial

import pytest
import torch
from test_baseline import (
    BATCH_NORMS,
    KINDS,
    blocks_of,
    build,
    loss_after_training,
    make_block,
    multiply_accumulates,
    normal,
    parameters_of,
    parameters_without_gradient,
    randomise,
)
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation as TorchvisionSqueezeExcitation
from torchvision.ops import StochasticDepth

from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import EnhancedBottleneck, SqueezeExcitation, enhanced_mobilenetv4
from training.cpu import ReLU6, SiLU

OFF = {"squeeze_excitation": 0.0, "stochastic_depth": 0.0, "activation": ReLU6}  # each idea, switched off
plain = partial(enhanced_mobilenetv4, **OFF)


def enhanced_block(start: int, middle: int, out: int = 16, stride: int = 1, rate: float = 0.0) -> EnhancedBottleneck:
    """Build a block with every idea, in evaluation mode."""
    ideas = {"squeeze_excitation": 0.25, "stochastic_depth": rate, "activation": SiLU}
    return randomise(make_block(start, middle, out, stride, EnhancedBottleneck, **ideas)).eval()


def ideas_in(network: nn.Module) -> set[str]:
    modules = list(network.modules())
    present = {
        "squeeze_excitation": any(isinstance(module, SqueezeExcitation) for module in modules),
        "stochastic_depth": any(isinstance(module, StochasticDepth) and module.p > 0 for module in modules),
        "activation": any(isinstance(module, nn.SiLU) for module in modules),
    }
    return {idea for idea, found in present.items() if found}


# ---- The whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, parameters", [(1.0, 3_366_858), (1.15, 4_172_682)])
def test_parameter_count_is_the_documented_one(width, parameters):
    assert parameters_of(enhanced_mobilenetv4, width=width) == parameters


@pytest.mark.parametrize("training", [False, True])
def test_with_every_idea_off_it_is_the_baseline(training):
    baseline = randomise(build()).train(training)
    network = build(plain).train(training)
    network.load_state_dict(baseline.state_dict())
    images = normal(4, 3, 32, 32)
    assert torch.equal(network(images), baseline(images))
    assert all(torch.equal(*pair) for pair in zip(network.buffers(), baseline.buffers(), strict=True))


def test_with_every_idea_off_it_begins_as_the_baseline():
    weights = build(plain).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in build().state_dict().items())


@pytest.mark.parametrize("idea", OFF)
def test_each_idea_can_be_switched_off_alone(idea):
    assert ideas_in(build(enhanced_mobilenetv4)) == set(OFF)
    network = build(enhanced_mobilenetv4, **{idea: OFF[idea]})
    assert ideas_in(network) == set(OFF) - {idea}
    assert network(normal(2, 3, 32, 32)).shape == (2, 10)


def test_silu_stands_exactly_where_the_baseline_has_its_activation():
    baseline, network = build(), build(enhanced_mobilenetv4)
    places = [
        [name for name, module in found.named_modules() if isinstance(module, kind)]
        for found, kind in ((baseline, nn.ReLU6), (network, nn.SiLU))
    ]
    assert places[0] == places[1]
    assert not any(isinstance(module, (nn.ReLU, nn.ReLU6)) for module in network.modules())


def test_arguments_of_the_baseline_are_handed_on():
    network = build(enhanced_mobilenetv4, num_classes=7, width=0.5, strides=(2, 2, 2, 2, 2))
    assert network(normal(2, 3, 64, 64)).shape == (2, 7)
    assert [layer.stride for layer in (network.stem[0][0], network.stage1[0][0])] == [(2, 2)] * 2


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_bad_rate_is_refused_by_name_and_value(rate):
    with pytest.raises(ValueError, match=f"stochastic_depth.*got {rate}"):
        enhanced_mobilenetv4(stochastic_depth=rate)


def test_a_bad_argument_of_the_baseline_is_refused_too():
    with pytest.raises(ValueError, match=r"width.*got.*-0\.5"):
        enhanced_mobilenetv4(width=-0.5)


def test_every_parameter_gets_a_gradient():
    assert parameters_without_gradient(build(enhanced_mobilenetv4)) == []


def test_training_overfits_random_images():
    assert loss_after_training(enhanced_mobilenetv4) < 0.1


# ---- Squeeze-and-excitation ----------------------------------------------------------------------------------------


def torchvision_copy(ours: SqueezeExcitation) -> TorchvisionSqueezeExcitation:
    theirs = TorchvisionSqueezeExcitation(ours.squeeze.in_features, ours.squeeze.out_features, nn.SiLU)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    weights = zip(shapes.items(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict({name: value.reshape(shape) for (name, shape), value in weights})
    return theirs


def test_squeeze_excitation_equals_torchvisions_in_values_and_gradients():
    torch.manual_seed(0)
    ours = SqueezeExcitation(24, 8)
    results = []
    for layer in (ours, torchvision_copy(ours)):
        x = normal(4, 24, 5, 5).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad.flatten() for parameter in layer.parameters())])
    assert all(value.any() for value in results[0])
    torch.testing.assert_close(*results)


def test_squeeze_excitation_begins_at_the_scale_of_other_layers_and_not_of_the_classifier():
    gates = [module for module in enhanced_mobilenetv4().modules() if isinstance(module, SqueezeExcitation)]
    assert len(gates) == 11
    for layer in (layer for gate in gates for layer in gate.children()):
        assert layer.weight.std().item() == pytest.approx((2 / layer.out_features) ** 0.5, rel=0.05)
        assert not layer.bias.any()


@torch.no_grad()
def reference_forward(block: EnhancedBottleneck, x: Tensor) -> Tensor:
    """Compute an evaluated block of stride 1, with a residual and every idea, from its weights alone."""

    def convolve(part: nn.Module, x: Tensor) -> Tensor:
        weight, norm = part[0].weight, part[1]
        y = nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
        return nn.functional.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    y = convolve(block.start, x) if block.kind in ("ExtraDW", "ConvNext") else x
    y = nn.functional.silu(convolve(block.expand, y))
    if block.kind in ("ExtraDW", "IB"):
        y = nn.functional.silu(convolve(block.middle, y))
        y = torchvision_copy(block.squeeze_excite)(y)
    return x + convolve(block.project, y)


@pytest.mark.parametrize("kernels", KINDS)
def test_squeeze_excitation_stands_between_the_middle_activation_and_the_projection(kernels):
    block, x = enhanced_block(*kernels, rate=0.5), normal(2, 16, 8, 8)
    torch.testing.assert_close(block(x), reference_forward(block, x), rtol=1e-4, atol=1e-4)


def test_squeeze_excitation_is_in_the_blocks_with_a_middle_depthwise_with_a_quarter_of_their_width():
    widths = [
        block.squeeze_excite.squeeze.out_features if isinstance(block.squeeze_excite, SqueezeExcitation) else None
        for block in blocks_of(enhanced_mobilenetv4(width=1.0))
    ]
    assert widths == [48, 48, 48, 48, 48, None, 144, 128, 128, 96, 128, 128]
    assert enhanced_block(0, 3).squeeze_excite.squeeze.out_features == 16  # 48 / 4 = 12, made divisible by 8


def test_squeeze_excitation_costs_one_multiply_accumulate_per_weight():
    costs = [multiply_accumulates(builder, width=1.0) for builder in (MobileNetV4, enhanced_mobilenetv4)]
    gates = [block.squeeze_excite for block in blocks_of(enhanced_mobilenetv4(width=1.0))]
    assert costs[1] - costs[0] == sum(p.numel() for gate in gates for p in gate.parameters() if p.dim() == 2)


# ---- Stochastic depth ----------------------------------------------------------------------------------------------


def activate_stochastic_depth(block: EnhancedBottleneck) -> EnhancedBottleneck:
    """Put the block in training mode, but not its batch norms."""
    for norm in block.train().modules():
        if isinstance(norm, BATCH_NORMS):
            norm.eval()
    return block


@pytest.mark.parametrize("last", [0.1, 0.5])
def test_stochastic_depth_grows_linearly_from_nothing_to_the_rate_of_the_last_block(last):
    network = enhanced_mobilenetv4(width=0.25, stochastic_depth=last)
    rates = [block.stochastic_depth.p for block in blocks_of(network)]
    assert rates == pytest.approx([last * i / 11 for i in range(12)], abs=1e-6)


def test_stochastic_depth_drops_whole_branches_of_single_images_and_scales_up_the_others():
    block, x = enhanced_block(3, 3, rate=0.5), normal(64, 16, 4, 4)
    branch = block(x) - x
    torch.manual_seed(0)
    y = activate_stochastic_depth(block)(x)
    dropped = (y == x).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close((y - x)[~dropped], 2 * branch[~dropped], rtol=1e-4, atol=1e-4)


def test_stochastic_depth_keeps_the_mean():
    block, image = enhanced_block(3, 3, rate=0.25), normal(1, 16, 2, 2)
    branch = block(image) - image
    torch.manual_seed(0)
    y = activate_stochastic_depth(block)(image.expand(4000, -1, -1, -1))
    assert (y == image).flatten(1).all(1).float().mean() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close((y - image).mean(0, keepdim=True), branch, rtol=0.04, atol=1e-3)


def test_stochastic_depth_does_nothing_in_evaluation():
    x = normal(8, 16, 4, 4)
    assert torch.equal(enhanced_block(3, 3, rate=0.9)(x), enhanced_block(3, 3)(x))


@pytest.mark.parametrize("out, stride", [(24, 1), (16, 2)])
def test_stochastic_depth_leaves_a_block_without_a_residual_alone(out, stride):
    x = normal(8, 16, 4, 4)
    y, expected = (activate_stochastic_depth(enhanced_block(3, 3, out, stride, rate))(x) for rate in (0.9, 0.0))
    assert torch.equal(y, expected)
