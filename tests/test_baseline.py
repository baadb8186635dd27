"""The baseline: equal to timm's network, of the published size, each part with the properties the paper gives it."""

import math
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from helpers import CPU
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from mobilenetv4_baseline import (
    ConvBNActivation,
    MobileNetV4,
    UniversalInvertedBottleneck,
    depthwise,
    make_divisible,
    network_arguments,
)
from training import devices
from training.config import Config
from training.cpu import (
    BatchNorm2d,
    BatchNormFunction,
    DepthwiseConv2d,
    DepthwiseFunction,
    ReLU6,
    ReLU6Function,
    SiLU,
    SiLUFunction,
    compiles_for_training,
)

PAPER = (2, 2, 2, 2, 2)
STRIDES = (
    # strides        side of the last map and million MACs of a 32-pixel image, at width 1.0 and 1.15
    (PAPER, 1, 5.0, 6.5),
    ((1, 2, 2, 2, 1), 4, 26.7, 35.1),
    ((1, 2, 1, 2, 2), 4, 50.6, 67.7),
    ((1, 1, 2, 2, 2), 4, 58.5, 80.0),
    ((1, 1, 2, 1, 2), 8, 159.6, 212.9),
)
KINDS = {(3, 5): "ExtraDW", (0, 3): "IB", (5, 0): "ConvNext", (0, 0): "FFN"}  # by kernels (start, middle)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


# ---- Helpers, also of test_enhanced.py. Randomness is a function of a seed. ----------------------------------------


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(builder: Callable[..., MobileNetV4] = MobileNetV4, **arguments) -> MobileNetV4:
    """Build a network with the weights of seed 0, small unless a width is given."""
    torch.manual_seed(0)
    return builder(**{"width": 0.25, **arguments})


def make_block(
    start: int, middle: int, out: int = 16, stride: int = 1, builder=UniversalInvertedBottleneck, **arguments
) -> UniversalInvertedBottleneck:
    """Build a block of 16 channels, 48 inside, with the weights of seed 0."""
    torch.manual_seed(0)
    arguments = {"activation": ReLU6, "expansion": 3, **arguments}
    return builder(16, out, start=start, middle=middle, stride=stride, **arguments)


def randomise(network: nn.Module) -> nn.Module:
    """Make every batch norm do something different, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(2)
    for norm in network.modules():
        if isinstance(norm, BATCH_NORMS):
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator)
            nn.init.normal_(norm.bias, 0, 0.3, generator)
            nn.init.normal_(norm.running_mean, 0, 0.3, generator)
            nn.init.uniform_(norm.running_var, 0.5, 1.5, generator)
    return network


def stages_of(network: MobileNetV4) -> list[nn.Sequential]:
    return [network.stem, network.stage1, network.stage2, network.stage3, network.stage4]


def blocks_of(network: nn.Module) -> list[UniversalInvertedBottleneck]:
    return [module for module in network.modules() if isinstance(module, UniversalInvertedBottleneck)]


def parameters_of(builder: Callable[..., MobileNetV4], **arguments) -> int:
    return sum(parameter.numel() for parameter in builder(**arguments).parameters())


def multiply_accumulates(builder: Callable[..., MobileNetV4], **arguments) -> int:
    """Count one 32-pixel image's multiply-accumulates."""
    network = builder(**arguments).eval().to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 32, 32, device="meta"))
    return counter.get_total_flops() // 2


@torch.no_grad()
def trace(network: nn.Module, images: Tensor, modules: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Run the network and return each module's (input, output)."""
    traces = {}
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: traces.update({module: (inputs[0], output)}))
    network(images)
    return [traces[module] for module in modules]


def parameters_without_gradient(network: nn.Module) -> list[str]:
    """Return the names of parameters whose gradient is missing or zero, with no branch beginning at zero."""
    for norm in network.modules():
        if isinstance(norm, BATCH_NORMS):
            nn.init.ones_(norm.weight)
    nn.functional.cross_entropy(network(normal(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    return [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]


def loss_after_training(builder: Callable[..., MobileNetV4], steps: int = 40) -> float:
    """Train on 64 random images with arbitrary labels and return their loss in eval mode."""
    images, labels = normal(64, 3, 16, 16), torch.arange(64) % 10
    network = build(builder, width=0.5, strides=(1, 2, 2, 2, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(network.eval()(images), labels).item()


# ---- Oracles: timm's network and the published sizes ---------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_those_of_timm_after_copying_its_weights(training):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = randomise(timm.create_model("mobilenetv4_conv_small", pretrained=False)).train(training)
    network = MobileNetV4(1000, width=1.0, strides=PAPER, activation=nn.ReLU).train(training)
    weights = dict(zip(network.state_dict(), reference.state_dict().values(), strict=True))
    weights["features.0.weight"] = weights["features.0.weight"].flatten(1)  # a 1 x 1 convolution in timm
    network.load_state_dict(weights)
    images = normal(4, 3, 96, 96)
    with torch.no_grad():
        logits, expected = network(images), reference(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    pairs = zip(network.buffers(), reference.buffers(), strict=True)  # the statistics just updated
    pairs = [(own, other) for own, other in pairs if own.is_floating_point()]  # and not the number of batches
    assert len(pairs) == 2 * len([norm for norm in network.modules() if isinstance(norm, BATCH_NORMS)])
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "width, num_classes, parameters", [(1.0, 1000, 3_774_024), (1.0, 10, 2_505_834), (1.15, 10, 3_056_370)]
)
def test_parameter_count_is_the_published_one_at_every_stride(width, num_classes, parameters):
    for strides, *_ in STRIDES:
        assert parameters_of(MobileNetV4, num_classes=num_classes, width=width, strides=strides) == parameters


@pytest.mark.parametrize("strides, _, narrow, wide", STRIDES)
def test_multiply_accumulates_are_the_documented_ones(strides, _, narrow, wide):
    counts = [multiply_accumulates(MobileNetV4, width=width, strides=strides) for width in (1.0, 1.15)]
    assert [round(count / 1e6, 1) for count in counts] == [narrow, wide]


def test_defaults_are_the_documented_ones():
    assert parameters_of(MobileNetV4) == 3_056_370
    assert round(multiply_accumulates(MobileNetV4) / 1e6, 1) == 80.0


# ---- The table -----------------------------------------------------------------------------------------------------


def test_rows_have_the_kinds_of_the_papers_table():
    kinds = [[row.kind for row in stage] for stage in stages_of(build())]
    assert kinds[0] == ["Conv 3x3"]
    assert kinds[1] == kinds[2] == ["Conv 3x3", "Conv 1x1"]
    assert kinds[3] == ["ExtraDW", "IB", "IB", "IB", "IB", "ConvNext"]
    assert kinds[4] == ["ExtraDW", "ExtraDW", "IB", "IB", "IB", "IB"]


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("strides, last", [row[:2] for row in STRIDES])
def test_stages_have_the_shapes_that_the_strides_give(strides, last, size):
    network = build(strides=strides).eval().to("meta")
    images = torch.empty(2, 3, size, size, device="meta")
    traces = trace(network, images, [*stages_of(network), network.head])
    shapes = [tuple(output.shape) for _, output in traces]
    sides = [size // math.prod(strides[: stage + 1]) for stage in (0, 1, 2, 3, 4, 4)]
    channels = [8, 8, 16, 24, 32, 240]
    assert shapes == [(2, count, side, side) for count, side in zip(channels, sides, strict=True)]
    assert sides[-1] == last * size // 32
    assert network(images).shape == (2, 10)


def test_any_width_leaves_1280_features():
    assert [build(width=width).classifier.in_features for width in (0.25, 0.5, 1.15)] == [1280] * 3


# ---- The block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels, kind", KINDS.items())
def test_kernels_decide_the_kind_of_a_block(kernels, kind):
    block = make_block(*kernels)
    assert block.kind == kind
    sides = {convolution.kernel_size[0] for convolution in block.modules() if isinstance(convolution, DepthwiseConv2d)}
    assert sides == set(kernels) - {0}


def test_an_ffn_cannot_have_a_stride():
    with pytest.raises(ValueError, match="stride 2"):
        make_block(0, 0, stride=2)


@pytest.mark.parametrize(
    "kernels, out, stride",
    [
        (kernels, out, stride)
        for kernels in KINDS
        for out in (16, 24)
        for stride in (1, 2)
        if any(kernels) or stride == 1
    ],
)
def test_a_block_whose_projection_gives_zero_is_the_identity_exactly_where_the_shape_stays(kernels, out, stride):
    block = make_block(*kernels, out, stride).eval()
    nn.init.zeros_(block.project[1].weight)
    nn.init.zeros_(block.project[1].bias)
    x, zeros = normal(2, 16, 8, 8), torch.zeros(2, out, 8 // stride, 8 // stride)
    assert torch.equal(block(x), x if out == 16 and stride == 1 else zeros)


@pytest.mark.parametrize("kernels", KINDS)
def test_only_expansion_and_middle_depthwise_are_followed_by_an_activation(kernels):
    block = make_block(*kernels)
    depthwise, pointwise = [DepthwiseConv2d, BatchNorm2d], [nn.Conv2d, BatchNorm2d]
    layers = {name: [type(layer) for layer in part.children()] for name, part in block.named_children()}
    assert layers == {
        "start": depthwise if kernels[0] else [],
        "expand": [*pointwise, ReLU6],
        "middle": [*depthwise, ReLU6] if kernels[1] else [],
        "project": pointwise,
    }
    x = normal(4, 16, 8, 8)
    start, expand, middle, project, whole = (
        output for _, output in trace(block, x, (block.start, block.expand, block.middle, block.project, block))
    )
    assert all((output < -0.1).any() for output in (start, project, whole))
    assert all((output >= 0).all() for output in (expand, middle))
    assert torch.equal(whole, x + project)


@pytest.mark.parametrize("kernels, sides", [((3, 5), (8, 8, 4)), ((0, 3), (8, 8, 4)), ((5, 0), (4, 4, 4))])
def test_stride_sits_on_the_middle_depthwise_or_on_a_start_one_that_stands_alone(kernels, sides):
    block = make_block(*kernels, stride=2)
    traces = trace(block, normal(2, 16, 8, 8), (block.start, block.expand, block.middle, block.project))
    assert tuple(output.shape[-1] for _, output in traces) == (*sides, sides[-1])


def test_expanded_width_is_a_multiple_of_8_made_from_the_input_channels():
    block = make_block(0, 3, out=64, expansion=2.6)  # 16 x 2.6 = 41.6
    assert (block.expand[0].in_channels, block.expand[0].out_channels, block.project[0].in_channels) == (16, 40, 40)


# ---- Layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_equals_a_grouped_convolution(kernel_size, stride):
    ours = DepthwiseConv2d(8, kernel_size, stride)
    reference = nn.Conv2d(8, 8, kernel_size, stride, kernel_size // 2, groups=8, bias=False)
    reference.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(normal(2, 8, 9, 9)), reference(normal(2, 8, 9, 9)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_gradients_of_depthwise_convolutions_are_those_of_pytorch(kernel_size, stride, dtype, tolerance):
    outcomes = []
    for function in (
        lambda x, weight: DepthwiseFunction.apply(x.to(dtype), weight, stride),
        lambda x, weight: nn.functional.conv2d(x, weight, None, stride, kernel_size // 2, 1, 8),
    ):
        inputs = [normal(6, 8, 9, 10).requires_grad_(), normal(8, 1, kernel_size, kernel_size).requires_grad_()]
        output = function(*inputs)
        output.backward(normal(*output.shape).to(output.dtype))
        outcomes.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for own, expected in zip(*outcomes, strict=True):
        assert own.shape == expected.shape
        assert (own.float() - expected).norm() < tolerance * expected.norm()


def test_depthwise_stays_in_float32_under_autocast_on_a_cpu():
    ours, x = DepthwiseConv2d(8, 3), normal(2, 8, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
        assert nn.Conv2d(8, 8, 1)(y).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, ours(x.float()))


def test_only_the_classifier_has_a_bias():
    layers = {name: layer for name, layer in build().named_modules() if not isinstance(layer, BATCH_NORMS)}
    assert [name for name, layer in layers.items() if getattr(layer, "bias", None) is not None] == ["classifier"]
    assert ConvBNActivation(8, 8)[0].bias is None


def test_make_divisible_is_nearest_at_least_the_divisor_and_never_below_90_percent():
    for divisor in (4, 8, 16):
        for channels in (value / 10 for value in range(1, 3000)):
            rounded = make_divisible(channels, divisor)
            assert rounded % divisor == 0
            assert rounded >= max(divisor, 0.9 * channels)
            nearest = abs(rounded - channels) <= divisor / 2
            assert nearest or rounded == divisor or rounded - divisor < 0.9 * channels < rounded
    assert [make_divisible(channels) for channels in (1, 12, 16, 32 * 1.15, 43)] == [8, 16, 16, 40, 40]
    assert [make_divisible(channels) for channels in (11, 18, 960 * 1.15)] == [16, 24, 1104]


# ---- Initialisation and training -----------------------------------------------------------------------------------


def test_initial_depthwise_convolutions_have_an_eighth_of_the_scale_that_keeps_their_input():
    layers = [layer for layer in build(width=1.0).modules() if isinstance(layer, DepthwiseConv2d)]
    scales = [layer(normal(2, layer.in_channels, 16, 16)).std().item() for layer in layers]
    assert len(scales) == 15
    assert all(1 < 8 * scale < 1.6 for scale in scales)  # sqrt(2): most inputs come from an activation, which halves


def test_initial_running_variance_is_that_of_the_depthwise_convolutions_output():
    layers = [layer for layer in build(width=1.0).eval().modules() if isinstance(layer, nn.Sequential)]
    layers = [layer[:2] for layer in layers if isinstance(layer[0], DepthwiseConv2d)]
    scales = [layer(normal(2, layer[0].in_channels, 16, 16)).std().item() for layer in layers]
    assert len(scales) == 15
    assert all(1 < scale < 1.6 for scale in scales)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strides", [row[0] for row in STRIDES])
def test_initial_blocks_are_the_identity_exactly_where_the_shape_stays(strides, training):
    network = build(strides=strides).train(training)
    traces = trace(network, normal(2, 3, 32, 32), blocks_of(network))
    assert [torch.equal(x, y) for x, y in traces] == [False, *[True] * 5, False, *[True] * 5]
    assert traces[0][1].any() and traces[6][1].any()


def test_initial_logits_are_small():
    assert build(width=1.15)(normal(16, 3, 32, 32)).abs().max() < 3


def test_every_parameter_gets_a_gradient():
    assert parameters_without_gradient(build()) == []


def test_training_overfits_random_images():
    assert loss_after_training(MobileNetV4) < 0.1


# ---- What the baseline is not --------------------------------------------------------------------------------------


def test_the_network_holds_no_layer_but_the_papers():
    leaves = {type(module) for module in MobileNetV4().modules() if not list(module.children())}
    layers = {nn.Conv2d, DepthwiseConv2d, nn.Linear, nn.BatchNorm1d, BatchNorm2d, ReLU6}
    assert leaves == layers | {nn.AdaptiveAvgPool2d, nn.Identity}


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_classes", 0),
        ("num_classes", -7),
        ("width", 0),
        ("width", -0.5),
        ("strides", (2, 2, 2, 2)),
        ("strides", (1, 1, 2, 2, 3)),
        ("strides", (0, 1, 2, 2, 2)),
    ],
)
def test_a_bad_argument_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*got.* {re.escape(str(value))}(?![\d.])"):
        MobileNetV4(**{name: value})


# ---- Layers made faster, where a CPU runs compiled code ------------------------------------------------------------


@pytest.fixture
def compiled():
    """Return torch.compile, which must work where there are a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists() or not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("nothing can be compiled here")
    assert devices.can_compile(CPU)
    return lambda network: devices.compiled(network, CPU)


class Parallel(nn.Module):
    """Depthwise layers of several (kernel, stride[, activation]), one beside the other."""

    def __init__(self, kinds: list[tuple]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(depthwise(24, *kind) for kind in kinds)
        randomise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def outcome(network: nn.Module, forward: Callable[..., tuple[Tensor, ...]], images: Tensor) -> dict[str, Tensor]:
    """Return outputs, all gradients of a random function of them, and the statistics after that training step."""
    images = images.clone(memory_format=torch.channels_last).requires_grad_()
    outputs = forward(images)
    sum((output * normal(*output.shape)).sum() for output in outputs).backward()
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    found |= {f"gradient of {name}": weight.grad for name, weight in network.named_parameters()}
    found |= {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    return found | {"gradient of the input": images.grad}


def check_compiled(dtype, tolerance, kinds, compiled):
    images = (normal(6, 24, 9, 10) + 3).to(dtype)  # odd and even; not of mean zero
    network, again = Parallel(kinds), Parallel(kinds)
    expected = outcome(network, network, images.float())
    counters.clear()
    got = outcome(again, compiled(again), images)
    assert not counters["graph_break"]
    assert got.keys() == expected.keys()
    assert len([name for name in got if "gradient" in name]) == 3 * len(kinds) + 1
    for name, value in expected.items():
        difference = (got[name].float() - value.float()).norm() / value.float().norm()
        assert difference < tolerance, f"{name}: {difference}"


def test_compiled_layers_learn_in_bfloat16_what_plain_ones_do(compiled):
    check_compiled(torch.bfloat16, 0.02, [(3, 1, SiLU), (5, 2, ReLU6)], compiled)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_compiled_layers_of_every_kind_learn_what_plain_ones_do(dtype, tolerance, compiled):
    check_compiled(dtype, tolerance, [(3, 1), (3, 2, SiLU), (5, 1, ReLU6), (5, 2)], compiled)


def test_fast_layers_stand_in_for_plain_ones_where_a_training_step_is_compiled_for_a_cpu_and_nowhere_else():
    layer, x = ReLU6(), torch.zeros(1)
    assert not compiles_for_training(layer, x)
    for training in (True, False):
        layer.train(training)
        traced = torch.compile(lambda x: x + compiles_for_training(layer, x), backend="eager")
        assert traced(x).item() == training


@pytest.mark.parametrize(("fast", "plain"), [(ReLU6Function, nn.functional.relu6), (SiLUFunction, nn.functional.silu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_from_the_output_are_those_of_the_activation(fast, plain, dtype):
    places = torch.cat([torch.linspace(-100, 100, 2001), torch.linspace(-7, 7, 1000), torch.tensor([0.0, 1e-20])])
    x, other = (places.to(dtype).requires_grad_() for _ in range(2))
    gradients = normal(len(places)).to(dtype)
    fast.apply(x).backward(gradients)
    plain(other).backward(gradients)
    error = (x.grad - other.grad).abs() / gradients.abs()
    error[(places > 5.9) & (places < 6.1)] = 0  # the corner, where bfloat16 rounds to 6
    assert error.max() < (1e-5 if dtype == torch.float32 else 0.03)
    assert error[places.abs() < 4].max() < 0.02
    x = torch.tensor([math.nan], dtype=dtype, requires_grad=True)
    fast.apply(x).backward(torch.tensor([math.nan], dtype=dtype))
    assert x.grad.isnan().all()


@pytest.mark.parametrize(("shape", "mean"), [((2, 3, 1, 1), 0), ((2, 3, 4, 4), 1), ((8, 3, 4, 4), 1000)])
def test_the_gradients_of_bn_are_those_of_pytorch(shape, mean):
    images, gradients = normal(*shape) + mean, normal(*shape)
    images[0, :, 0, 0] += 20  # the first pixel, from which distances are measured, is an outlier
    outcomes = []
    for function in (
        lambda x, weight, bias: BatchNormFunction.apply(x, weight, bias, 1e-5)[0],
        lambda x, weight, bias: nn.functional.batch_norm(x, None, None, weight, bias, True),
    ):
        inputs = [tensor.clone().requires_grad_() for tensor in (images, normal(3), normal(3))]
        output = function(*inputs)
        output.backward(gradients)
        outcomes.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for own, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=2e-3 if mean == 1000 else 1e-5)


def test_compiled_bn_does_not_lose_a_small_variance_beside_a_large_mean(compiled):
    norm, plain = BatchNorm2d(3), nn.BatchNorm2d(3)
    images = normal(8, 3, 4, 4) + 1000
    torch.testing.assert_close(compiled(norm)(images), plain(images), rtol=0, atol=1e-2)
    torch.testing.assert_close(norm.running_var, plain.running_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [16, 31, 32, 47, 63, 64, 96, 127])
def test_the_strides_leave_a_last_map_of_about_the_same_size_whatever_the_images(size):
    network = MobileNetV4(**network_arguments(Config(image_size=size)) | {"width": 0.25}).eval()
    ((_, output),) = trace(network, torch.zeros(1, 3, size, size), [network.head])
    assert 4 <= output.shape[2] == output.shape[3] <= 8


def test_the_strides_are_the_documented_ones_at_the_sizes_of_cifar10_and_of_the_paper():
    assert network_arguments(Config())["strides"] == (1, 1, 2, 2, 2)
    assert network_arguments(Config(image_size=224))["strides"] == PAPER
