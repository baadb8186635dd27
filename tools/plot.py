"""Draw what happened in a run, because people would rather look; needs `pip install matplotlib`.

    python -m tools.plot runs/baseline                        # all four pictures, into that folder
    python -m tools.plot runs/baseline runs/enhanced --output-dir runs   # curves.png alone, both runs in it

curves.png: loss and accuracy of each epoch. confusion.png: which classes are taken for which. mistakes.png: the most
confident errors. samples.png: training images as the network sees them, augmented by the settings of the run.
"""

import argparse
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import common
from tools import failures_in_one_line, load_network, load_splits, logits_of, optional

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes
LINES = ("-", "--", "-.", ":")
MOST = 36  # classes whose names and shares can be read in confusion.png


def draw_curves(runs: list[Path], file: Path, plt: Any) -> None:
    """Draw loss and accuracy after each epoch; several runs differ in colour and in the kind of line."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    root = os.path.commonpath([run.resolve().parent for run in runs])
    for index, run in enumerate(runs):
        metrics, label = read_metrics(run), os.path.relpath(run.resolve(), root)
        *_, name = metrics
        style = dict(color=COLORS[index % len(COLORS)], linestyle=LINES[index % len(LINES)])
        style |= dict(label=f"{label} (held out)" if name == "holdout_accuracy" else label)
        style |= dict(marker="." if len(metrics["epoch"]) < 60 else "")
        for axis, column in zip(axes, ("loss", name), strict=True):
            axis.plot(metrics["epoch"], metrics[column], **style)
    for axis, name in zip(axes, ("training loss", "accuracy (%)"), strict=True):
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(loc="lower right")
    figure.savefig(file, dpi=120)


def read_metrics(run: Path) -> dict[str, list[float]]:
    """Read the columns of metrics.csv of a run.

    Raises:
        RunError: if it is not there, empty, or of another program.
    """
    table = run / "metrics.csv"
    with common.reading(table, "table"):
        rows = list(csv.DictReader(table.open())) if table.exists() else []
        name = "test_accuracy" if rows and "test_accuracy" in rows[0] else "holdout_accuracy"
        columns = {column: [float(row[column]) for row in rows] for column in ("epoch", "loss", name)}
    if not rows:
        raise common.RunError(f"{table}: no epochs there; expected the folder of a run")
    return columns


def draw_confusion(summary: dict[str, Any], file: Path, plt: Any) -> None:
    """Draw the confusion matrix in per cent of each true class; colour shows the errors alone."""
    classes = list(summary["per_class_accuracy"])
    counts = torch.tensor(summary["confusion_matrix"], dtype=torch.double)
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    errors = shares.clone().fill_diagonal_(0)
    side, few = min(2.5 + 0.6 * len(classes), 24), len(classes) <= MOST
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    picture = axis.imshow(errors.numpy(), cmap="Blues", vmax=max(1, 1.4 * errors.max().item()))
    for row in range(len(classes)):
        for column in range(len(classes)):
            if shares[row, column] > 0 and few:
                weight = "bold" if row == column else "normal"
                axis.text(
                    column, row, f"{shares[row, column]:.1f}", ha="center", va="center", fontsize=8, weight=weight
                )
    if few:
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted", ylabel="true", title="per cent of each true class")
    figure.colorbar(picture, label="errors (%)", shrink=0.8)
    figure.savefig(file, dpi=120)


def draw_grid(images: torch.Tensor, titles: list[str], file: Path, plt: Any) -> None:
    """Draw images, uint8 (N, H, W, 3), eight in a row, with a title over each."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns, 2.05 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images.cpu().numpy(), titles, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=8)
    figure.savefig(file, dpi=120)


def short(name: str) -> str:
    """Return a name as long as the width of an image allows."""
    return name if len(name) <= 11 else name[:10] + "\u2026"


def draw_mistakes(logits: torch.Tensor, data: common.Data, file: Path, plt: Any) -> None:
    """Draw the 32 most confident errors, if there are any, with their true classes and what they were taken for."""
    confidence, predicted = logits.softmax(1).max(1)
    labels = data.test_labels.cpu()
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:32]
    file.unlink(missing_ok=True)
    if not len(wrong):
        return
    names = [short(name) for name in data.classes]
    titles = [f"{names[labels[index]]}\nas {names[predicted[index]]} {100 * confidence[index]:.0f}%" for index in wrong]
    draw_grid(data.test_images.cpu()[wrong], titles, file, plt)


def draw_samples(data: common.Data, config: common.Config, file: Path, plt: Any) -> None:
    """Draw 32 images of the first batch as they were trained on, with their labels or, when mixed, their shares."""
    drawn = common.draw_epoch(len(data.train_images), config, 1, data.train_images.device)
    images, labels = (part[:32] for part in common.augment(data, drawn, slice(config.batch_size), config))
    shares = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, len(data.classes)).float()
    titles = []
    for row in shares.cpu():
        best = [index for index in row.argsort(descending=True).tolist() if row[index] > 0.005]
        parts = [
            short(data.classes[index]) + (f" {100 * row[index]:.0f}%" if row[index] < 0.995 else "") for index in best
        ]
        titles.append("\n".join(parts))
    draw_grid(images, titles, file, plt)


def draw_all(run: Path, folder: Path, data_dir: Path | None, plt: Any) -> Iterator[Path]:
    """Draw confusion.png, mistakes.png and samples.png of one run, and yield the path of each.

    Raises:
        RunError: if the run has not finished, or the data are not those that it was trained on.
    """
    if not (run / "summary.json").exists():
        raise common.RunError(
            f"{run / 'summary.json'}: not there; the other pictures are drawn when a run has finished"
        )
    network, saved = load_network(run / "checkpoint.pt")
    with common.reading(run / "summary.json", "summary"):
        summary = json.loads((run / "summary.json").read_text())
        then, known = summary["configuration"], common.Config().decisive()
        config = common.Config(
            **{key: value for key, value in saved["recipe"].items() if key in known},
            data_dir=data_dir or Path(then["data_dir"]),
            synthetic=then["synthetic"],
        )
        draw_confusion(summary, folder / "confusion.png", plt)
    yield folder / "confusion.png"
    data = load_splits(config, saved, common.pick_device("cpu", 0))
    if data.fingerprint != saved["data"]:
        raise common.RunError(f"{config.data_dir}: not the images that {run} was trained on; --data-dir names another")
    draw_mistakes(logits_of(data.test_images, network, saved), data, folder / "mistakes.png", plt)
    if (folder / "mistakes.png").exists():
        yield folder / "mistakes.png"
    draw_samples(data, config, folder / "samples.png", plt)
    yield folder / "samples.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, as runs/baseline")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="(default: where the run had its images from)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where the pictures go (default: the first RUN)")
    options = parser.parse_args()
    with failures_in_one_line():
        matplotlib, _ = optional("matplotlib", "matplotlib.pyplot")
        matplotlib.use("Agg")  # draws into files, needs no screen
        matplotlib.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
        folder = options.output_dir or options.runs[0]
        curves = folder / "curves.png"
        for run in options.runs:
            read_metrics(run)
        folder.mkdir(parents=True, exist_ok=True)
        draw_curves(options.runs, curves, matplotlib.pyplot)
        print(curves)
        if len(options.runs) == 1:
            for file in draw_all(options.runs[0], folder, options.data_dir, matplotlib.pyplot):
                print(file)


if __name__ == "__main__":
    main()
