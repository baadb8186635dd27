"""CUDA and MPS without the hardware: whole steps on fake devices.

These are tests of devices and dtypes only: no kernel of either device runs here.
"""

import contextlib
import copy
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchgen
from helpers import Tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import common
from mobilenetv4_baseline import MobileNetV4
from mobilenetv4_enhanced import enhanced_mobilenetv4
from training import devices, muon
from training.config import Config
from training.data import Data
from training.muon import Muon

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
FAKE = torch.device("cuda")  # stands for MPS too: only macOS builds of PyTorch can slice tensors there
PATCHES = []  # defects that a test makes
VARIANTS = {"baseline": MobileNetV4, "enhanced": enhanced_mobilenetv4}
CHOICES = {  # of training.devices, as on each device
    "cuda": dict(memory_format=lambda _: torch.channels_last, fastest_precision=lambda _: "bf16"),
    "mps": dict(memory_format=lambda _: torch.contiguous_format, fastest_precision=lambda _: "fp32"),
}


# ---- Steps on fake devices -----------------------------------------------------------------------------------------


def move(network, device, memory_format):
    """Do what Module.to does, which would exchange tensors in place: fake ones refuse."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in [(name, tensor) for name, tensor in tensors.items() if tensor is not None]:
                layout = memory_format if tensor.dim() == 4 else torch.preserve_format
                moved = tensor.detach().to(device, memory_format=layout)
                tensors[name] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved
    return network


def backward(loss):
    """Do what Tensor.backward does, node by node: PyTorch's own engine asks the hardware for its streams."""
    waiting, gradients, found = Counter(), {loss.grad_fn: [torch.ones_like(loss)]}, {loss.grad_fn}
    stack = [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            waiting[node] += 1
            if node and node not in found:
                found.add(node)
                stack.append(node)
    ready = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            if hasattr(node, "variable"):
                node.variable.grad = gradients[node][0]
                continue
            results = node(*gradients.pop(node))
            results = results if isinstance(results, tuple) else (results,)
            for (other, place), result in zip(node.next_functions, results, strict=True):
                if other is None:
                    continue
                inputs = gradients.setdefault(other, [])
                inputs.extend([None] * (place + 1 - len(inputs)))
                if result is not None:
                    expected = other._input_metadata[place]
                    assert result.device == expected.device
                    result = result.sum_to_size(expected.shape).to(expected.dtype)
                    inputs[place] = result if inputs[place] is None else inputs[place] + result
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)


class Record(TorchDispatchMode):
    """Keeps which operators ran and on which tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result


def is_view(operator):
    return any(result.alias_info and not result.alias_info.is_write for result in operator._schema.returns)


def storage(tensor):
    return tensor.untyped_storage()._cdata


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@contextlib.contextmanager
def fake_device(kind):
    """Compute with tensors that have a device, a type and a shape, but no elements."""
    mode = FakeTensorMode()
    with contextlib.ExitStack() as stack:
        for name, choice in CHOICES[kind].items():
            stack.enter_context(mock.patch.object(devices, name, choice))
        stack.enter_context(mock.patch.object(nn.Module, "to", move))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(mock.patch.object(torch.Tensor, "item", lambda tensor: math.nan))
        stack.enter_context(torch.backends.cudnn.flags(enabled=kind == "cuda"))
        twin = SimpleNamespace(deepcopy=lambda network: copy.deepcopy(network, {id(mode): mode}))
        stack.enter_context(mock.patch.object(common, "copy", twin))
        stack.enter_context(mock.patch.object(common, "check_losses"))  # it looks at values
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_: True))
        for patch in PATCHES:
            stack.enter_context(patch)
        stack.enter_context(mode)
        yield


def train_and_predict(kind, build):
    """Train for an epoch of one step and predict on a fake device; return what was recorded."""
    with fake_device(kind), Record() as record:
        images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8, device=FAKE)
        labels = torch.zeros(4, dtype=torch.int64, device=FAKE)
        classes = [str(label) for label in range(10)]
        data = Data("", classes, images, labels, images, labels, [0.5] * 3, [0.25] * 3, "")
        config = Config(batch_size=4, epochs=1, precision=devices.fastest_precision(FAKE), compile="off")
        state = common.new_state(build, {}, data, config, None)
        record.buffers = {storage(buffer) for buffer in state.raw.buffers()}
        record.statistics = {storage(buffer) for buffer in common.floating_buffers(state.raw)}
        loss_fn = common.make_loss(state, data, config)

        def marked_loss(images, labels):
            record.start = len(record.calls)
            return loss_fn(images, labels)

        def marked_backward(loss):
            backward(loss)
            record.end = len(record.calls)

        with mock.patch.object(torch.Tensor, "backward", marked_backward):
            common.train_epoch(state, marked_loss, data, config, 1, tqdm(disable=True))
        logits = common.predict(state.averaged, data.test_images, data, config, flip=True)
        assert logits.device.type == "cpu" and logits.dtype == torch.float32
        tensors = tensors_in([network.state_dict() for network in (state.raw, state.averaged)])
        tensors += tensors_in([list(optimizer.state.values()) for optimizer in state.optimizers])
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}
    return record


@pytest.fixture(scope="module", params=[(kind, variant) for kind in CHOICES for variant in VARIANTS], ids="-".join)
def recorded(request):
    kind, variant = request.param
    return kind, train_and_predict(kind, VARIANTS[variant])


def test_a_step_the_averages_and_a_prediction_stay_on_one_device(recorded):
    kind, record = recorded
    names = Counter(operator.name() for operator, *_ in record.calls)
    assert names["aten::convolution_backward"] == names["aten::convolution"] // 2 > 30
    assert names["aten::_fused_adamw_"] == 2  # groups
    inputs = [args[:2] for operator, args, *_ in record.calls if operator.name() == "aten::convolution"]
    assert {images.dtype for images, _ in inputs} == {torch.bfloat16 if kind == "cuda" else torch.float32}
    first = [tensor for images, weight in inputs if images.shape[1] == 3 for tensor in (images, weight)]
    assert {tensor.is_contiguous(memory_format=torch.channels_last) for tensor in first} == {kind == "cuda"}


def leave_on_the_cpu(function):
    return lambda *arguments: function(*arguments[:-1], torch.device("cpu"))


@pytest.mark.parametrize(
    ("place", "name", "broken"),
    [
        (common, "draw_epoch", leave_on_the_cpu(common.draw_epoch)),
        (muon, "padding", leave_on_the_cpu(muon.padding)),
        (nn.Module, "to", lambda network, device, memory_format: network),
        (torch, "zeros_like", lambda tensor, zeros=torch.zeros: zeros(tensor.shape)),  # of Muon's momentum
    ],
)
def test_a_tensor_left_on_the_cpu_is_found(place, name, broken):
    train_and_predict("cuda", Tiny)
    patch = mock.patch.object(place, name, broken)
    with pytest.raises((RuntimeError, AssertionError), match="device"), mock.patch(f"{__name__}.PATCHES", [patch]):
        train_and_predict("cuda", Tiny)


def test_every_operator_has_a_kernel_for_the_device(recorded):
    kind, record = recorded
    kernels = read_kernels()
    usable = {kind.upper(), "CompositeImplicitAutograd", "CompositeExplicitAutograd"}
    usable.add("CompositeExplicitAutogradNonFunctional")
    names = {operator.name().removeprefix("aten::") for operator, *_ in record.calls if operator.namespace == "aten"}
    assert len(names) > 60
    assert {name for name in names if not kernels[name] & usable} == set()


def read_kernels():
    """Return, for each operator of PyTorch, the backends that have a kernel of their own for it."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    kernels, delegates = {}, {}
    for entry in text.split("\n- func: ")[1:]:
        name = entry.split("(")[0]
        lines = re.search(r"\n  dispatch:\n((?:    .*\n|\s*#.*\n)*)", entry + "\n")
        keys = re.findall(r"^    ([\w, ]+):", lines[1], re.M) if lines else []
        kernels[name] = {key for line in keys for key in line.split(", ")} or {"CompositeImplicitAutograd"}
        kernels[name] |= {"CPU", "CUDA"} if "\n  ufunc_inner_loop:" in entry else set()
        if other := re.search(r"\n  structured_delegate: (\S+)", entry):
            delegates[name] = other[1]
    for name, other in delegates.items():
        kernels[name] = kernels[name] - {"CompositeImplicitAutograd"} | kernels[other]
    return kernels


def check_for_cuda_graphs(record):
    """Refuse what CUDA graphs refuse: tensors of the CPU, results whose size or flow depends on values, and tensors
    from outside changed in place that are not always at the same address, as buffers of a module are."""
    own, changed, refused = set(), set(), {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    for operator, args, kwargs, result in record.calls[record.start : record.end]:
        assert not refused & set(operator.tags), operator
        tensors = tensors_in([args, kwargs, result])
        assert {tensor.device.type for tensor in tensors if tensor.dim()} <= {"cuda"}, operator
        if not any(returned.alias_info for returned in operator._schema.returns):
            own |= {storage(tensor) for tensor in tensors_in(result)}
        for argument, value in zip(operator._schema.arguments, args, strict=False):
            statistics = operator.name().endswith("batch_norm") and argument.name.startswith("running")
            if statistics or (argument.alias_info and argument.alias_info.is_write):
                changed |= {storage(tensor) for tensor in tensors_in(value)}
    assert record.statistics <= changed
    assert changed <= own | record.buffers, "something else than a buffer is changed in place"


def test_cuda_graphs_can_hold_the_loss_and_its_gradients(recorded):
    check_for_cuda_graphs(recorded[1])


def test_a_tensor_changed_in_place_that_is_no_buffer_is_found():
    class Counting(Tiny):
        def train(self, mode=True):
            self.steps = torch.zeros((), device=FAKE)
            return super().train(mode)

        def forward(self, x):
            self.steps.add_(1)
            return super().forward(x)

    check_for_cuda_graphs(train_and_predict("cuda", Tiny))
    with pytest.raises(AssertionError, match="something else than a buffer"):
        check_for_cuda_graphs(train_and_predict("cuda", Counting))


# ---- Muon's one batch ----------------------------------------------------------------------------------------------


def muon_steps(dtype=torch.float32):
    """Take two steps on the baseline's matrices; return these and the operators of the second step."""
    torch.manual_seed(0)
    network = MobileNetV4().to(memory_format=torch.channels_last)
    optimizer = common.make_optimizers(network, Config(precision="fp32"))[0]
    weights = optimizer.param_groups[0]["params"]
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        with Record() as record:
            optimizer.step()
    return weights, [operator for operator, *_ in record.calls if not is_view(operator)]


def test_one_padded_batch_takes_the_same_steps_as_a_batch_for_each_shape(monkeypatch):
    grouped, many = muon_steps()
    monkeypatch.setattr(Muon, "BY_SHAPE", ())
    padded, few = muon_steps()
    assert max((one - other).abs().max() for one, other in zip(grouped, padded, strict=True)) < 1e-6
    assert len(few) <= 60 < len(many)
