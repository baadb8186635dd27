"""What is chosen for a device, by what it can do: the devices themselves are mocked."""

import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import CPU

from training import devices
from training.config import Config, RunError

MPS = torch.device("mps")


def resolve(device=CPU, images=50_000, **settings):
    return devices.resolve_auto(Config(**settings), device, images)


def give(monkeypatch, *, cuda=False, mps=False, torchrun=False, works=True):
    """Make PyTorch report these devices; `works`: whether the GPU runs a kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: torchrun)
    monkeypatch.setenv("LOCAL_RANK", "0")

    def ones(*size, device):
        if not works:
            raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")
        return torch.full(size, 1.0)

    monkeypatch.setattr(torch, "ones", ones)


@pytest.mark.parametrize(
    ("here", "requested", "chosen"),
    [
        ({}, "auto", "cpu"),
        ({"mps": True}, "auto", "mps"),
        ({"mps": True}, "cpu", "cpu"),
        ({"cuda": True, "mps": True}, "auto", "cuda:0"),
        ({"cuda": True}, "cpu", "cpu"),
        ({"mps": True, "torchrun": True}, "auto", "cpu"),  # whose gradients gloo could not average
        ({"cuda": True, "torchrun": True}, "auto", "cuda:0"),
    ],
)
def test_auto_takes_the_fastest_device_that_works(monkeypatch, here, requested, chosen):
    give(monkeypatch, **here)
    assert devices.choose(requested) == torch.device(chosen)


@pytest.mark.parametrize(
    ("here", "requested", "message"),
    [
        ({"cuda": True}, "mps", "not available here, only cuda, cpu"),
        ({"mps": True}, "cuda", "not available here, only mps, cpu"),
        ({"mps": True, "torchrun": True}, "mps", "not available with torchrun, only cpu"),
        ({"torchrun": True}, "cuda", "not available here, only cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch, here, requested, message):
    give(monkeypatch, **here)
    with pytest.raises(RunError, match=f"--device {requested}: {message}$"):
        devices.choose(requested)


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    give(monkeypatch, cuda=True, torchrun=True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.choose("auto") == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(RunError, match="more processes than GPUs; torchrun --nproc-per-node=4"):
        devices.choose("auto")


@pytest.mark.parametrize(("mps", "chosen"), [(True, "mps"), (False, "cpu")])
def test_a_gpu_whose_first_kernel_dies_is_left_out_with_one_line(monkeypatch, capsys, mps, chosen):
    give(monkeypatch, cuda=True, mps=mps, works=False)
    assert devices.choose("auto") == torch.device(chosen)
    printed = "".join(capsys.readouterr())
    assert re.fullmatch(r"notice: cuda:0 is not used.*no kernel image is available for execution.*\n", printed)
    with pytest.raises(RunError, match=r"--device cuda: not available here.*cpu"):
        devices.choose("cuda")


def test_choosing_changes_nothing_and_setting_up_sets_the_threads():
    devices.choose("cpu")
    assert torch.get_num_threads() == 1
    devices.set_up(CPU, 2)
    assert torch.get_num_threads() == 2
    assert not torch.backends.cudnn.allow_tf32


def test_images_come_channels_last_but_on_mps_and_old_gpus(monkeypatch):
    assert devices.memory_format(MPS) == torch.contiguous_format
    assert devices.memory_format(CPU) == torch.channels_last
    for capability, expected in (((7, 5), torch.contiguous_format), ((8, 0), torch.channels_last)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert devices.memory_format(torch.device("cuda")) == expected


def test_on_mps_training_is_in_float32_and_not_compiled(monkeypatch):
    monkeypatch.setattr(devices, "can_compile", lambda device: pytest.fail("there is nothing to compile"))
    resolved = resolve(MPS, epochs=100)
    assert (resolved.precision, resolved.compile) == ("fp32", "off")


@pytest.mark.parametrize(
    ("processor", "precision"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
    ],
)
def test_bfloat16_is_chosen_on_a_cpu_that_computes_faster_in_it(processor, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert resolve(compile="off").precision == precision


def test_the_name_of_a_cpu_says_whether_it_has_amx(monkeypatch):
    known = {"cpu_name": "Intel Xeon", "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    without = devices.describe(torch.device("cpu"))
    known["amx_bf16"] = True
    assert without.startswith("cpu (Intel Xeon, ") and devices.describe(torch.device("cpu")) == without[:-1] + ", AMX)"


@pytest.mark.parametrize("supported", [False, True])
def test_torch_2_10_which_does_not_tell_makes_apart_computes_in_bfloat16_where_it_can(supported, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    assert resolve(compile="off").precision == ("bf16" if supported else "fp32")


def test_compilation_is_chosen_by_the_length_of_the_whole_run_where_it_works(monkeypatch):
    monkeypatch.setattr(devices, "can_compile", lambda device: True)
    assert (resolve(epochs=10).compile, resolve(epochs=1, images=1000).compile) == ("on", "off")
    assert (resolve(epochs=10, compile="off").compile, resolve(epochs=1, images=9, compile="on").compile) == (
        "off",
        "on",
    )
    monkeypatch.setattr(devices, "can_compile", lambda device: False)
    assert resolve(epochs=10).compile == "off"


def test_the_compiler_options_suit_the_device(monkeypatch):
    options = {}
    for kind in ("cpu", "cuda", "mps"):
        assert callable(devices.compiled(torch.relu, torch.device(kind)))  # PyTorch knows all of them
    monkeypatch.setattr(torch, "compile", lambda function, **settings: options.update(settings["options"]))
    devices.compiled(torch.relu, torch.device("mps"))
    assert options["layout_optimization"] is False
    devices.compiled(torch.relu, torch.device("cuda"))
    assert options["deterministic"]


def test_compiled_code_has_a_folder_of_its_own_unless_the_user_chose_one(monkeypatch):
    pytorchs = os.path.join(tempfile.gettempdir(), "torchinductor_somebody")  # which importing PyTorch's parts can set
    for chosen, expected in (("", devices.own_cache()), (pytorchs, devices.own_cache()), ("/mine", Path("/mine"))):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen)
        assert devices.cache_folder() == expected


def test_each_gpu_has_a_folder_of_compiled_code_and_where_nothing_locks_there_is_none(monkeypatch, tmp_path):
    assert devices.own_cache().name == "compiled"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for gpu, name in ((0, "compiled"), (2, "compiled-2")):
        monkeypatch.setattr(torch.cuda, "current_device", lambda it=gpu: it)
        assert devices.own_cache().name == name
    monkeypatch.setattr(devices, "own_cache", lambda: tmp_path / "compiled")
    monkeypatch.setattr(devices, "LOCKS", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    with devices.compile_cache():
        assert not (tmp_path / "compiled").exists()


def test_after_a_death_while_compiling_neither_code_nor_precompiled_headers_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "own_cache", lambda: tmp_path / "compiled")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")  # put back afterwards
    header = tmp_path / "torchinductor_somebody" / "precompiled_headers" / "a.h"
    precompiled, code = header.with_name("a.h.gch"), tmp_path / "compiled" / "code.so"
    header.parent.mkdir(parents=True)
    for died in (False, True):
        with devices.compile_cache():
            code.touch()
        header.touch()
        precompiled.touch()
        if died:
            (tmp_path / "compiled" / "unfinished").touch()
        with devices.compile_cache():
            pass
        assert header.exists()
        assert precompiled.exists() == code.exists() == (not died)


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or the user's compiled code would be dropped

    def fail(*_, **__):
        raise RuntimeError("No C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    devices.can_compile.cache_clear()
    assert not devices.can_compile(CPU)
    devices.can_compile.cache_clear()
    assert capsys.readouterr().out.count("\n") == 1
