"""Draw what happened in a run; needs `pip install matplotlib`.

    python -m tools.plot runs/baseline                        # all four pictures, into that folder
    python -m tools.plot runs/baseline runs/enhanced --output-dir runs   # curves.png alone, both runs in it

curves.png: losses and accuracy of each epoch. confusion.png: which classes are taken for which. mistakes.png: the most
confident errors. samples.png: training images as the network sees them, augmented by the settings of the run.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import predict
from tools import exit_in_one_line, load_images, load_network, make_folder, new_parser, optional
from training.augmentation import augment, draw_epoch
from training.checkpoint import errors_naming
from training.config import Config, RunError, printable
from training.data import Data
from training.files import atomic_write

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes
LINES = ("-", "--", "-.", ":")
READABLE = 36  # classes whose names and numbers fit into confusion.png


def draw_curves(runs: list[Path], file: Path, plt: Any) -> None:
    """Draw losses and accuracy after each epoch; several runs differ in colour and in the kind of line."""
    tables, root = [read_metrics(run) for run in runs], os.path.commonpath([run.resolve().parent for run in runs])
    panels = {"loss": "training loss", "cross-entropy": "cross-entropy", "accuracy": "accuracy (%)"}
    panels = {column: name for column, name in panels.items() if any(column in table for table in tables)}
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for index, (run, table) in enumerate(zip(runs, tables, strict=True)):
        label = printable(os.path.relpath(run.resolve(), root)) + " (held out)" * table["held out"]
        style = dict(color=COLORS[index % len(COLORS)], linestyle=LINES[index % len(LINES)], label=label)
        style |= dict(marker="." if len(table["epoch"]) < 60 else "")
        for axis, column in zip(axes, panels, strict=True):
            if column in table:
                axis.plot(table["epoch"], table[column], **style)
    for axis, name in zip(axes, panels.values(), strict=True):
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].legend(loc="lower right")
    save(figure, file)


def read_metrics(run: Path) -> dict[str, Any]:
    """Read the columns of metrics.csv: epoch, loss, accuracy, cross-entropy (which old runs lack), and "held out"."""
    file = run / "metrics.csv"
    with errors_naming(file, "table"):
        rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
        split = "holdout" if rows and "holdout_accuracy" in rows[0] else "test"
        columns = {"epoch": "epoch", "loss": "loss", "accuracy": f"{split}_accuracy"}
        if rows and f"{split}_loss" in rows[0]:
            columns["cross-entropy"] = f"{split}_loss"
        table = {name: [float(row[column]) for row in rows] for name, column in columns.items()}
    if not rows:
        raise RunError(f"{printable(file)}: no epochs there; expected the folder of a run")
    return table | {"held out": split == "holdout"}


def save(figure: Any, file: Path) -> None:
    with atomic_write(file) as target:
        figure.savefig(target, dpi=120, format="png")


def draw_confusion(classes: list[str], counts: Tensor, file: Path, plt: Any) -> None:
    """Draw the confusion matrix in per cent of each true class; colour shows the errors alone."""
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    errors = shares.clone().fill_diagonal_(0)
    side, few = min(2.5 + 0.6 * len(classes), 24), len(classes) <= READABLE
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    picture = axis.imshow(errors.numpy(), cmap="Blues", vmax=max(1, 1.4 * errors.max().item()))
    if few:
        for row, column in shares.nonzero().tolist():
            style = dict(ha="center", va="center", fontsize=8, weight="bold" if row == column else "normal")
            axis.text(column, row, f"{shares[row, column]:.1f}", **style)
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted", ylabel="true", title="per cent of each true class")
    figure.colorbar(picture, label="errors (%)", shrink=0.8)
    save(figure, file)


def draw_grid(images: Tensor, titles: list[str], file: Path, plt: Any) -> None:
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
    save(figure, file)


def short(name: str) -> str:
    """Return a name, printable, as long as the width of an image allows."""
    name = printable(name)
    return name if len(name) <= 11 else name[:10] + "\u2026"


def draw_mistakes(logits: Tensor, data: Data, file: Path, plt: Any) -> None:
    """Draw the 32 most confident errors, if there are any, with their true classes and what they were taken for."""
    confidence, predicted = logits.softmax(1).max(1)
    labels = data.test_labels.cpu()
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:32]
    if not len(wrong):
        file.unlink(missing_ok=True)
        return
    names = [short(name) for name in data.classes]
    titles = [f"{names[labels[index]]}\nas {names[predicted[index]]} {100 * confidence[index]:.0f}%" for index in wrong]
    draw_grid(data.test_images.cpu()[wrong], titles, file, plt)


def draw_samples(data: Data, config: Config, file: Path, plt: Any) -> None:
    """Draw 32 images of the first batch as they were trained on, with their labels or, when mixed, their shares."""
    drawn = draw_epoch(len(data.train_images), config, 1, data.train_images.device)
    images, labels = (part[:32] for part in augment(data, drawn, slice(config.batch_size), config))
    shares = labels if labels.ndim == 2 else F.one_hot(labels, len(data.classes)).float()
    titles = []
    for row in shares.cpu():
        mixed = [(index, row[index]) for index in row.argsort(descending=True).tolist() if row[index] > 0.005]
        names = [short(data.classes[index]) + f" {100 * share:.0f}%" * bool(share < 0.995) for index, share in mixed]
        titles.append("\n".join(names))
    draw_grid(images, titles, file, plt)


def draw_all(run: Path, folder: Path, data_dir: Path | None, plt: Any) -> Iterator[Path]:
    """Draw confusion.png, mistakes.png and samples.png of one run, and yield the path of each.

    Raises:
        RunError: if the run has not finished, or the images are not those that it was trained on.
    """
    file = run / "summary.json"
    if not file.exists():
        raise RunError(f"{printable(file)}: not there; the other pictures are drawn when a run has finished")
    with errors_naming(file, "summary"):
        summary = json.loads(file.read_text())
        classes, matrix = list(map(printable, summary["per_class_accuracy"])), summary.get("confusion_matrix")
        counts = torch.tensor(matrix).double().view(len(classes), len(classes)) if matrix else None
    if counts is not None:
        draw_confusion(classes, counts, folder / "confusion.png", plt)
        yield folder / "confusion.png"
    else:
        print(f"confusion.png is left out: {len(classes)} classes")
    trained = load_network(run / "checkpoint.pt")
    data, facts = load_images(trained, data_dir)
    if not facts["own"]:
        raise RunError(
            f"{printable(facts['data'])}: not the images that {printable(run)} was trained on; use --data-dir"
        )
    draw_mistakes(predict(trained.network, data.test_images, data, trained.config), data, folder / "mistakes.png", plt)
    if (folder / "mistakes.png").exists():
        yield folder / "mistakes.png"
    else:
        print("no mistakes: mistakes.png is left out")
    draw_samples(data, trained.config, folder / "samples.png", plt)
    yield folder / "samples.png"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, as runs/baseline")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="(default: where the run read its images)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where the pictures go (default: the first RUN)")
    options = parser.parse_args()
    with exit_in_one_line():
        matplotlib, plt = optional("matplotlib", "matplotlib.pyplot")
        matplotlib.use("Agg")  # draws into files, needs no screen
        matplotlib.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
        folder = options.output_dir or options.runs[0]
        for run in options.runs:
            read_metrics(run)
        make_folder(folder)
        draw_curves(options.runs, folder / "curves.png", plt)
        print(printable(folder / "curves.png"))
        if len(options.runs) == 1:
            for file in draw_all(options.runs[0], folder, options.data_dir, plt):
                print(printable(file))


if __name__ == "__main__":
    main()
