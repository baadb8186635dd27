"""Checkpoints: what a run saves after each epoch, whole or not at all, and reads only after checking all of it."""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.config import RunError, one_line
from training.files import atomic_write, check_archive
from training.schema import FORMAT, check_schema

LARGEST = 2**30  # bytes; no network of this kind comes near
START_OVER = "choose another --output-dir, or start over with --fresh"


@dataclass(frozen=True)
class State:
    """What training changes: the network, its EMA (weights and BN statistics), the optimizers."""

    raw: nn.Module
    averaged: nn.Module
    optimizers: list[torch.optim.Optimizer]


# ---- Load ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def errors_naming(path: Path, kind: str = "checkpoint") -> Iterator[None]:
    """Turn whatever reading a damaged or foreign file raises into one line that names it."""
    try:
        yield
    except Exception as error:  # it can fail anywhere in the parsers
        raise RunError(f"{path}: not a usable {kind} ({one_line(error)})") from None


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, after its checksum and without ever running code from it, and check its schema.

    Returns:
        What was saved, and under "sha256" the checksum.

    Raises:
        RunError: naming the file, if it is missing, damaged, of another program, or of a newer format.
    """
    if not os.path.isfile(path):
        raise RunError(f"{path}: not a file")
    with errors_naming(path):
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{size:,} bytes, more than a checkpoint has")
        content = path.read_bytes()
        if hashlib.sha256(content[:-34]).digest() != content[-32:]:
            raise ValueError("it is damaged, incomplete, or no checkpoint of this project")
        check_archive(io.BytesIO(content), len(content))
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_schema(saved)
        return saved | {"sha256": content[-32:].hex()}


def load_run(path: Path) -> dict[str, Any] | None:
    """Load the checkpoint of the run that is to resume, or return None where there is none.

    Raises:
        RunError: if it cannot be used, or is gone and other files of the run are there.
    """
    previous = previous_of(path)
    if os.path.lexists(path):
        try:
            return load(path)
        except RunError as error:
            rescue = f"; the epoch before is in {previous}: rename it to {path.name}" if previous.exists() else ""
            raise RunError(f"{error}{rescue}; or {START_OVER}") from None
    for other in (previous, path.with_name("metrics.csv"), path.with_name("summary.json")):
        if os.path.lexists(other):
            raise RunError(f"{other} is there without its {path.name}; {START_OVER}")
    return None


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings and data that differ, with both values."""
    old, new = (
        {key: run[key] for key in ("variant", "data", "init_from")} | run["network"] | run["recipe"]
        for run in (saved, now)
    )
    return [f"{key} was {old.get(key)} and is now {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]


def check_same_run(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume a run that was started differently, naming each difference with both values."""
    if changed := differences(saved, now):
        raise RunError(f"{path} is of another run: {'; '.join(changed)}; {START_OVER}")


def load_pretrained(network: nn.Module, saved: dict[str, Any], classes: list[str]) -> None:
    """Start from the EMA weights of another run; where its classes differ, from all but the classifier's."""
    own = {name: value for name, value in network.state_dict().items() if name.startswith("classifier.")}
    network.load_state_dict(saved["averaged"] | (own if saved["classes"] != classes else {}))


def restore(path: Path, saved: dict[str, Any], state: State) -> None:
    """Put weights and optimizer states back; other names, shapes or values than the network needs are refused."""
    with errors_naming(path):
        if "optimizer" not in saved or len(saved.get("metrics", [])) != saved["epoch"]:
            raise ValueError("it holds weights alone, which the tools and --init-from take")
        state.raw.load_state_dict(saved["model"])
        state.averaged.load_state_dict(saved["averaged"])
        for optimizer, values in zip(state.optimizers, saved["optimizer"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # settings are the command line's, not the file's
            optimizer.load_state_dict({"state": values["state"], "param_groups": groups})
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                check_optimizer_state(optimizer.state[parameter], parameter.shape)


def check_optimizer_state(values: dict[str, Any], shape: torch.Size) -> None:
    """Check names and shapes, which an optimizer's load_state_dict does not."""
    shapes = {name: value.shape for name, value in values.items()}
    if shapes not in ({"momentum": shape}, {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}):
        raise ValueError("an optimizer's state has other names or shapes than its weights need")


# ---- Save ----------------------------------------------------------------------------------------------------------


def previous_of(path: Path) -> Path:
    return path.with_name("checkpoint.previous.pt")


def save(path: Path, state: State, epoch: int, identity: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Save what a run needs to resume; the file that was there stays as checkpoint.previous.pt."""
    content = {"format": FORMAT, **identity, "epoch": epoch, "metrics": rows}
    content |= {"model": dict(state.raw.state_dict()), "averaged": dict(state.averaged.state_dict())}
    content["optimizer"] = [optimizer.state_dict() for optimizer in state.optimizers]
    if path.exists():
        previous = previous_of(path)
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:  # a file system without hard links
            with contextlib.suppress(OSError):
                shutil.copyfile(path, previous)
    write(path, content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write plain values and tensors as torch.save does, with a checksum as the comment of that zip archive.

    The archive's own checksums leave its directory out, where one flipped bit can exchange two tensors.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getbuffer()[:-2]  # without the length of its comment, so far 0
    with atomic_write(path) as file:
        file.write(archive)
        file.write(b"\x20\x00" + hashlib.sha256(archive).digest())
