"""What a run prints and writes for people: header, a row per epoch, metrics.csv, summary.json, the result."""

import csv
import io
import json
import platform
import shlex
from dataclasses import asdict
from typing import Any

import torch
import torchvision
from torch import nn

from training import devices
from training.config import Config, printable
from training.data import Data
from training.files import RunFolder, atomic_write
from training.processes import Processes
from training.summary import count_macs, count_parameters

Row = dict[str, float]  # of metrics.csv
WEIGHTS = {"raw": "raw weights", "averaged": "EMA weights"}  # names for people of the keys in files


def split_name(config: Config) -> str:
    """Return what the images for evaluation are called: accuracies on held-out images must never pass for others."""
    return "holdout" if config.holdout else "test"


def collect_facts(network: nn.Module, data: Data, config: Config, processes: Processes) -> dict[str, Any]:
    """Return what the header and summary.json say about network, data, device and versions."""
    device = data.train_images.device
    return {
        "parameters": count_parameters(network),
        "macs": count_macs(network, config.image_size)[""],
        "data": f"{data.source}: {len(data.train_images):,} training images, {len(data.test_images):,} for evaluation",
        "device": devices.describe(device),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size,
        "precision": config.precision,
        "compiled": config.compile == "on" and devices.can_compile(device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}",
    }


def environment(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts on which the last bits of the weights depend."""
    return {key: facts[key] for key in ("device", "threads", "processes", "compiled", "versions")}


def print_header(facts: dict[str, Any], identity: dict[str, Any], config: Config, saved: dict[str, Any] | None) -> None:
    done = saved["epoch"] if saved else 0
    network = ", ".join(f"{key} {value}" for key, value in identity["network"].items())
    threads = f"{facts['processes']} x {facts['threads']} threads"
    print(f"network   {identity['variant']}: {facts['parameters']:,} parameters, {facts['macs'] / 1e6:.1f} M MACs")
    print(f"          {config.image_size} x {config.image_size} pixels, {network}")
    print(f"data      {printable(facts['data'])}")
    print(f"device    {facts['device']}, {threads}, {facts['precision']}{', compiled' * facts['compiled']}")
    print(f"versions  {facts['versions']}")
    print(f"run       {printable(config.output_dir)}, {done} of {config.epochs} epochs done")
    if done == config.epochs:
        print("          nothing to train, evaluating the last epoch")
        return
    if config.init_from and not saved:
        print(f"          from the weights of {printable(config.init_from)}")
    same = "leave out --fresh to resume" if config.fresh else "the same command resumes"
    print(f"          Ctrl-C stops; {same} after the last finished epoch")
    if saved:
        now, then = environment(facts), saved.get("environment", {})
        changed = [f"{key} was {then.get(key)} and is now {now[key]}" for key in now if then.get(key) != now[key]]
        on_cpu = facts["device"].startswith("cpu")
        exact = "bit for bit as without this interruption" if on_cpu else "on this device not bit for bit"
        if changed:
            exact = f"but not bit for bit: {'; '.join(changed)}"
        print(f"          resuming after epoch {done}, {printable(exact)}")


def print_columns(split: str) -> None:
    scores = f"{split + ' accuracy':>16}  {split + ' loss':>12}"
    print(f"\nepoch  learning rate    loss  {scores}  images/s  seconds        left")


def duration(seconds: float) -> str:
    """Return a time for people, as 45 s, 12 min or 1 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def print_row(row: Row, split: str, seconds_left: float) -> None:
    accuracy, loss, left = row[f"{split}_accuracy"], row[f"{split}_loss"], duration(seconds_left)
    print(
        f"{row['epoch']:>5}  {row['learning_rate']:>13.6f}  {row['loss']:>6.4f}  {accuracy:>15.2f}%  {loss:>12.4f}  "
        f"{row['images_per_second']:>8.1f}  {row['seconds']:>7.1f}  {left:>10}"
    )


def write_metrics(folder: RunFolder, rows: list[Row]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[-1], extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_write(folder.metrics) as file:
        file.write(text.getvalue().encode())


def write_summary(
    folder: RunFolder, results: dict[str, Any], facts: dict[str, Any], identity: dict[str, Any], config: Config
) -> None:
    summary = {"variant": identity["variant"], "epochs": config.epochs, **results, **facts}
    summary |= {"network": identity["network"], "configuration": asdict(config)}
    with atomic_write(folder.summary) as file:
        file.write(json.dumps(summary, indent=2, default=str).encode())


def print_result(folder: RunFolder, results: dict[str, Any], config: Config) -> None:
    """Print accuracies, time and the next commands."""
    split = split_name(config)
    print()
    for weights, value in results[f"{split}_accuracy"].items():
        name = WEIGHTS[weights.removesuffix("_tta")] + " + flip TTA" * weights.endswith("_tta")
        print(f"{split} accuracy {value:6.2f}%  {name}{' (headline)' * (weights == 'averaged')}")
    print(f"{split} loss     {results[f'{split}_loss']['averaged']:7.4f}  {WEIGHTS['averaged']}")
    print(f"training time {duration(results['seconds'])} ({results['seconds']:,.0f} seconds); next:")
    checkpoint, run = (shlex.quote(path.as_posix()) for path in (folder.checkpoint, folder.path))
    for command in (f"evaluate {checkpoint}", f"predict {checkpoint} PICTURE", f"plot {run}"):
        print(f"  python -m tools.{command}")
