"""What each of the three ideas of the enhanced network brings: alone, and taken away from all three.

    python -m benchmarks.ablation --seeds 3    # the default epochs: for a GPU
    python -m benchmarks.ablation --seeds 3 --epochs 3 --compile on    # hours on two CPU cores

Any other flag is one of the training's (see `python mobilenetv4_enhanced.py --help`). Each run becomes a row of
results/ablation.csv; a run that has one is skipped, one that was interrupted resumes, so the same command resumes
everything. Then come mean, standard deviation and differences of all runs with these settings.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import common
from mobilenetv4_baseline import network_arguments
from mobilenetv4_enhanced import enhanced_mobilenetv4
from tools import exit_in_one_line, new_parser
from training.config import Config, RunError, argument, parse_command_line
from training.cpu import ReLU6, SiLU
from training.data import load_data
from training.files import atomic_write, exclusive
from training.report import split_name

IDEAS = {
    # name                         squeeze_excitation, stochastic_depth, silu
    "baseline":                    (0.0,  0.0, False),
    "squeeze-excitation":          (0.25, 0.0, False),
    "stochastic-depth":            (0.0,  0.1, False),
    "silu":                        (0.0,  0.0, True),
    "all":                         (0.25, 0.1, True),
    "all-but-squeeze-excitation":  (0.0,  0.1, True),
    "all-but-stochastic-depth":    (0.25, 0.0, True),
    "all-but-silu":                (0.25, 0.1, False),
}  # fmt: skip


# ---- One run -------------------------------------------------------------------------------------------------------


def build(num_classes: int, *, silu: bool, **arguments: Any) -> nn.Module:
    return enhanced_mobilenetv4(num_classes, activation=SiLU if silu else ReLU6, **arguments)


def train(name: str) -> None:
    """Train one network in this process, as the scripts do, by the flags of the command line."""
    ideas = dict(zip(("squeeze_excitation", "stochastic_depth", "silu"), IDEAS[name], strict=True))
    common.main(f"ablation-{name}", build, lambda config: network_arguments(config) | ideas)


def measure(name: str, seed: int, flags: list[str], runs: Path) -> dict[str, Any]:
    """Train, or resume, in a process of its own, and return what is to be kept of the result."""
    output = runs / f"{name}-{seed}"
    own = ["--seed", str(seed), "--output-dir", str(output)]
    command = [sys.executable, "-m", "benchmarks.ablation", "--train", name, *flags, *own]
    if status := subprocess.run(command).returncode:
        raise RunError(f"{name} with seed {seed}: training ended with status {status}")
    summary = json.loads((output / "summary.json").read_text())
    accuracies = summary.get("test_accuracy") or summary["holdout_accuracy"]
    flipped = f"{summary['headline']}_tta"
    return {
        "accuracy": f"{accuracies[summary['headline']]:.2f}",
        "raw": f"{accuracies['raw']:.2f}",
        "with_flip": f"{accuracies[flipped]:.2f}" if flipped in accuracies else "",  # nothing with --flip none
        **{key: summary[key] for key in ("parameters", "macs", "seconds", "device", "versions")},
    }


# ---- All runs ------------------------------------------------------------------------------------------------------


def read(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.open(newline=""))) if table.exists() else []


def add(table: Path, row: dict[str, Any]) -> None:
    """Add a row to the table, which is whole at every moment; what others have added meanwhile stays."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(table.with_name(f".{table.name}.lock"), wait=True):
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*read(table), row])
        with atomic_write(table) as file:
            file.write(text.getvalue().encode())


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--seeds", type=argument(int, 1, 1e6), default=3, help="runs of each network, seeds 0, 1, ... (default: 3)"
    )
    parser.add_argument(
        "--table", type=Path, default=Path("results/ablation.csv"), help="a row for each run (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/ablation"), help="where the runs are kept (default: %(default)s)"
    )
    parser.add_argument("--train", choices=IDEAS, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    sys.argv[1:] = flags
    if options.train:
        return train(options.train)

    config = parse_command_line("ablation")
    with exit_in_one_line():
        if config.init_from:
            raise RunError("--init-from: the networks begin at random here")
        if config.summary:
            raise RunError("--summary: the scripts print it")
        if config.seed or config.output_dir != Path("runs", "ablation"):
            raise RunError("--seed, --output-dir: each run has its own; see --seeds and --runs")
        data = load_data(config, torch.device("cpu")).fingerprint
        settings = {key: value for key, value in config.recipe().items() if key != "seed"}
        same = {"settings": "; ".join(f"{key} {value}" for key, value in settings.items()), "data": data}
        place = hashlib.sha256(repr(same).encode()).hexdigest()[:8]
        for seed in range(options.seeds):  # all networks with one seed, then the next
            for name in IDEAS:
                key = {"network": name, "seed": str(seed), **same}
                if not any(key.items() <= row.items() for row in read(options.table)):
                    add(options.table, key | measure(name, seed, flags, options.runs / place))
        rows = [row for row in read(options.table) if same.items() <= row.items()]
        print(*report(rows, config), sep="\n")


# ---- Report --------------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, str]], config: Config) -> Iterator[str]:
    """Yield the lines of the table.

    The standard deviation of one run is taken as the same for all networks and pooled over them. A difference of two
    means is within its noise when it is at most two of its standard errors, the noise being that of the seed; of twenty
    differences that are none, one is expected outside of it.
    """
    accuracies: dict[str, list[float]] = {}
    for name in IDEAS:
        if found := [float(row["accuracy"]) for row in rows if row["network"] == name]:
            accuracies[name] = found
    freedom = sum(len(values) - 1 for values in accuracies.values())
    squares = sum((len(values) - 1) * statistics.variance(values) for values in accuracies.values() if len(values) > 1)
    deviation = math.sqrt(squares / freedom) if freedom else math.nan

    means = {name: statistics.mean(values) for name, values in accuracies.items()}

    def difference(names: list[str], references: list[str]) -> str:
        """Compare as many networks with as many others; "" with one that is missing or compared with itself."""
        if names == references or not {*names, *references} <= means.keys():
            return ""
        value = sum(means[name] for name in names) - sum(means[name] for name in references)
        error = 2 * deviation * math.sqrt(sum(1 / len(accuracies[name]) for name in (*names, *references)))
        verdict = "unknown noise" if math.isnan(error) else "within noise" if abs(value) <= error else ""
        return f"{value / len(names):+.2f} +- {error / len(names):.2f} {verdict}"

    yield f"{split_name(config)}_accuracy after {config.epochs} epochs, EMA weights"
    yield f"{'':<28}{'runs':>5}{'mean':>8}{'sd':>7}   {'to the baseline':<29}{'to all three':<29}parameters"
    for name, values in accuracies.items():
        own = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "?"
        size = next(row["parameters"] for row in rows if row["network"] == name)
        yield (
            f"{name:<28}{len(values):>5}{means[name]:>8.2f}{own:>7}   {difference([name], ['baseline']):<29}"
            f"{difference([name], ['all']):<29}{int(size):,}"
        )
    for index, idea in enumerate(list(IDEAS)[1:4]):
        having, lacking = ([name for name in IDEAS if bool(IDEAS[name][index]) is has] for has in (True, False))
        if text := difference(having, lacking):
            yield f"the four networks with {idea} less the four without it: {text}".rstrip()
    yield f"one run's standard deviation, pooled: {deviation:.2f} points ({freedom} degrees of freedom)"
    yield "+- is twice the standard error of the difference"
    if len(kinds := {(row["device"], row["versions"]) for row in rows}) > 1:
        yield f"notice: the runs are of {len(kinds)} kinds of machine or versions, which the differences include"


if __name__ == "__main__":
    main()
