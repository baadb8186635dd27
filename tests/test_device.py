"""What is chosen for a device, by what it can do: the devices themselves are mocked."""

import pytest
import torch
from helpers import CPU

from training import device
from training.config import Config, RunError

MPS = torch.device("mps")


def resolve(where=CPU, images=50_000, **settings):
    return device.resolve_auto(Config(**settings), where, images)


def test_the_device_is_the_one_asked_for_or_the_best_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose("auto").type == "mps"
    assert device.choose("cpu").type == "cpu"
    with pytest.raises(RunError, match=r"--device cuda: .* mps, cpu"):
        device.choose("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device, "runs_kernels", lambda where: True)
    assert device.choose("auto").type == "cuda"
    assert device.choose("mps").type == "mps"


def test_a_gpu_that_cannot_run_a_kernel_is_named_and_not_used(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", fail)
    assert device.choose("auto") == CPU
    told = "".join(capsys.readouterr())
    assert told.startswith("notice: cuda:0 is not used")
    assert told.count("\n") == 1


def test_choosing_changes_nothing_and_setting_up_sets_the_threads():
    device.choose("cpu")
    assert torch.get_num_threads() == 1
    device.set_up(CPU, 2)
    assert torch.get_num_threads() == 2


def test_images_come_channels_last_but_on_mps_and_old_gpus(monkeypatch):
    assert device.memory_format(MPS) == torch.contiguous_format
    assert device.memory_format(CPU) == torch.channels_last
    for capability, expected in (((7, 5), torch.contiguous_format), ((8, 0), torch.channels_last)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where, it=capability: it)
        assert device.memory_format(torch.device("cuda")) == expected


def test_on_mps_training_is_in_float32_and_not_compiled(monkeypatch):
    monkeypatch.setattr(device, "can_compile", lambda where: pytest.fail("there is nothing to compile"))
    resolved = resolve(MPS, epochs=100)
    assert (resolved.precision, resolved.compile) == ("fp32", "off")


@pytest.mark.parametrize(("present", "precision"), [(False, "fp32"), (True, "bf16")])
def test_bfloat16_is_chosen_on_a_cpu_by_what_the_processor_has(present, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": present}, raising=False)
    assert resolve(compile="off").precision == precision


def test_compilation_is_chosen_by_the_length_of_the_whole_run_where_it_works(monkeypatch):
    monkeypatch.setattr(device, "can_compile", lambda where: True)
    assert (resolve(epochs=10).compile, resolve(epochs=1, images=1000).compile) == ("on", "off")
    assert (resolve(epochs=10, compile="off").compile, resolve(epochs=1, images=9, compile="on").compile) == (
        "off",
        "on",
    )
    monkeypatch.setattr(device, "can_compile", lambda where: False)
    assert resolve(epochs=10).compile == "off"


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("No C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    device.can_compile.cache_clear()
    assert not device.can_compile(CPU)
    device.can_compile.cache_clear()
    assert capsys.readouterr().out.count("\n") == 1
