"""Choosing and setting up a device (CPU, CUDA or Apple MPS): precision, memory format, compilation."""

import contextlib
import functools
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from training.config import Config, RunError, one_line
from training.files import LOCKS, exclusive

# ---- Choice and set-up ---------------------------------------------------------------------------------------------


def choose(requested: str) -> torch.device:
    """Return the device asked for; for `auto`, CUDA if a kernel runs on it, else MPS, else the CPU.

    Raises:
        RunError: if there is no such device here.
    """
    torchrun = torch.distributed.is_torchelastic_launched()
    index = int(os.environ["LOCAL_RANK"]) if torchrun else 0
    found = [torch.device("cpu")]
    if torch.backends.mps.is_available() and not torchrun:  # gloo cannot average tensors on MPS
        found.insert(0, torch.device("mps"))
    if requested != "cpu" and torch.cuda.is_available():
        if index >= (count := torch.cuda.device_count()):
            raise RunError(f"more processes than GPUs; torchrun --nproc-per-node={count}, or --device cpu, would work")
        if runs_kernels(torch.device("cuda", index)):
            found.insert(0, torch.device("cuda", index))
    for device in found:
        if requested in ("auto", device.type):
            return device
    where = "with torchrun" if torchrun and requested == "mps" else "here"
    raise RunError(f"--device {requested}: not available {where}, only {', '.join(device.type for device in found)}")


def runs_kernels(device: torch.device) -> bool:
    """Try one kernel: this build of PyTorch may hold none for an old GPU, though it reports the GPU as available."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError as error:
        print(f"notice: {device} is not used: this build of PyTorch fails on it ({one_line(error)})", file=sys.stderr)
        return False


def set_up(device: torch.device, threads: int = 0) -> None:
    """Set PyTorch's process-wide switches: threads, the current GPU, deterministic cuDNN, flushed denormals."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # numbers too small for the normal format would be tens of times slower on a CPU
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # as in matrix products: fp32 is what was asked for
    no_runtime = "No CUDA runtime is found"  # PyTorch warns of this whenever it compiles for a CPU
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: no_runtime not in str(record.msg))


def describe(device: torch.device) -> str:
    """Return a device's name for people."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    known = capabilities()
    name = known.get("cpu_name") or platform.processor() or platform.machine()
    amx = ", AMX" * bool(known.get("amx_bf16"))  # which some virtual machines hide
    return f"{device.type} ({name}, {torch.backends.cpu.get_cpu_capability()}{amx})"


# ---- What suits a device -------------------------------------------------------------------------------------------


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the faster layout of image tensors: channels last, but for MPS and for GPUs without bf16 tensor cores."""
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.contiguous_format if device.type == "mps" or old_gpu else torch.channels_last


def fastest_precision(device: torch.device) -> str:
    """Return bf16 where the hardware computes faster with it, else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu_computes_bf16()
    return "bf16" if fast else "fp32"


def cpu_computes_bf16() -> bool:
    """Return whether the CPU computes faster in bf16: with AMX, or with AVX-512 BF16 on other makes than Intel's.

    On an Intel processor whose virtual machine hides AMX a training step took 1.3 times as long in bf16
    (results/throughput).
    """
    known = capabilities()
    if not known:  # torch 2.10 does not tell the makes apart
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return bool(known.get("amx_bf16") or (known.get("avx512_bf16") and "Intel" not in known.get("cpu_name", "")))


def capabilities() -> dict[str, Any]:
    """Return what PyTorch knows about the CPU, before torch 2.11 nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def evaluation_batch(device: torch.device, image_size: int) -> int:
    """Return how many images to evaluate at once: 250 on a CPU (its cache), else 2048, at most 2 million pixels."""
    return max(1, min(250 if device.type == "cpu" else 2048, 2**21 // image_size**2))


def resolve_auto(config: Config, device: torch.device, images: int) -> Config:
    """Replace `auto` in the configuration by what suits the device and the length of the whole run."""
    choices = {}
    if config.precision == "auto":
        choices["precision"] = fastest_precision(device)
    if config.compile == "auto":
        # The time that compiling takes is won back after about 120,000 images.
        pays_back = config.epochs * images >= 200_000 and device.type != "mps"
        choices["compile"] = "on" if pays_back and can_compile(device) else "off"
    return replace(config, **choices)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---- Compilation ---------------------------------------------------------------------------------------------------


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Try to compile something small; where that fails, say why in one line."""
    try:
        with compile_cache():
            compiled(lambda x: x + 1, device)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever is missing: a C++ compiler, its headers, Triton
        print(f"notice: torch.compile does not work here, training uncompiled and slower ({one_line(error)})")
        return False


def compiled(function: Callable, device: torch.device) -> Callable:
    """Return torch.compile of a training step's loss, with the compiler options that suit the device."""
    options = {
        "cpu": {},
        "cuda": {"deterministic": True, "triton.cudagraphs": True},  # a step is bound by kernel launches
        "mps": {"layout_optimization": False},  # channels last is several times slower there
    }
    fast = torch.compile(function, dynamic=False, options=options[device.type])
    if device.type != "cuda":
        return fast

    def step(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the memory of the step before is free again
        return fast(*arguments)

    return step


def own_cache() -> Path:
    """Return our folder of compiled code: one for each GPU, so that the processes of several compile at once."""
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return Path(torch.hub.get_dir()).with_name(f"compiled-{gpu}" if gpu else "compiled")


def cache_folder() -> Path:
    """Return where compiled code is kept: where a user's TORCHINDUCTOR_CACHE_DIR says, else in a folder of our own."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")  # + user: PyTorch's, which it sets too
    return Path(chosen) if chosen and not chosen.startswith(default) else own_cache()


def drop_precompiled_headers() -> None:
    """Remove them from PyTorch's own folders, where it keeps them whatever the folder of compiled code."""
    for header in Path(tempfile.gettempdir()).glob("torchinductor_*/precompiled_headers/*.?ch"):  # of GCC or Clang
        with contextlib.suppress(OSError):  # another user's
            header.unlink()


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Compile with a cache that is dropped if a process died or failed while it wrote there.

    So damaged code is never loaded. Precompiled headers are dropped with it. A user's own cache is used as it is, and
    PyTorch's where nothing locks.
    """
    cache = cache_folder()
    if cache != own_cache() or " " in str(cache) or not LOCKS:
        yield  # a compiler's command line would be split at a space
        return
    unfinished = cache / "unfinished"
    cache.mkdir(parents=True, exist_ok=True)
    with exclusive(cache.with_name(cache.name + ".lock"), wait=True):
        if unfinished.exists():
            shutil.rmtree(cache)
            cache.mkdir()
            drop_precompiled_headers()
        unfinished.touch()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        yield
        unfinished.unlink()
