"""Evaluate a trained network on the images that its run was evaluated on, or on others.

    python -m tools.evaluate runs/baseline/checkpoint.pt
    python -m tools.evaluate results/weights/enhanced.pt --data-dir pictures/test --tta --json

Prints top-1 accuracy, top-5 where there are more than five classes, the cross-entropy, the expected calibration error,
precision and recall of each class, and the confusion matrix. A run with --holdout is evaluated on its held-out images.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import by_class, predict, score
from tools import add_device, add_images, exit_in_one_line, load_images, load_network, new_parser
from training.config import RunError, printable
from training.cpu import keep_freed_memory


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error in per cent (Guo et al., arXiv 1706.04599).

    The mean distance between confidence and accuracy in `bins` equal intervals of confidence, weighted by their images.
    """
    confidence, predicted = probabilities.max(1)
    correct = (predicted == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # intervals are open below and closed above
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, place, correct - confidence.double())
    return 100 * gaps.abs().sum().item() / len(labels)


def measure(logits: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """Return all measures of logits (N, classes) against labels (N,); accuracies and the like in per cent."""
    top1, loss = score(logits, labels).values()
    results: dict[str, Any] = {"images": len(labels), "top1": top1}
    if len(classes) > 5:
        within = (logits.topk(5).indices == labels[:, None]).any(1)
        results["top5"] = 100 * within.double().mean().item()
    results |= {"loss": loss, "calibration_error": calibration_error(logits.softmax(1), labels)}
    results["classes"] = precision_and_recall(logits.argmax(1), labels, classes)
    details = by_class(logits, labels, classes)
    del details["per_class_accuracy"]  # which "classes" has as recall
    return results | details


def precision_and_recall(predicted: Tensor, labels: Tensor, classes: list[str]) -> dict[str, dict[str, Any]]:
    """Return images, recall and precision of each class; None where there is nothing to divide by."""
    groups = labels[predicted == labels], labels, predicted
    counts = zip(*(group.bincount(minlength=len(classes)).tolist() for group in groups), strict=True)
    return {
        name: {
            "images": images,
            "recall": 100 * hits / images if images else None,
            "precision": 100 * hits / taken if taken else None,
        }
        for name, (hits, images, taken) in zip(classes, counts, strict=True)
    }


def report(results: dict[str, Any]) -> str:
    """Return the measures as a text for people."""
    whose = {True: ", the run's own", False: ", not those of the run, or in another order", None: ""}[results["own"]]
    weights = "EMA weights" if results["weights"] == "ema" else "raw weights"
    lines = [f"{results['split']}: {results['images']:,} images{whose} ({printable(results['data'])})"]
    lines.append(f"{weights}{', with flip TTA' * results['tta']}\n")
    lines.append(f"top-1 accuracy     {results['top1']:6.2f}%")
    if "top5" in results:
        lines.append(f"top-5 accuracy     {results['top5']:6.2f}%")
    lines.append(f"cross-entropy      {results['loss']:7.4f}")
    lines.append(f"calibration error  {results['calibration_error']:6.2f}%")
    names = [printable(name) for name in results["classes"]]
    wide = max(8, *map(len, names))
    lines.append(f"\n{'class':<{wide}}  images  recall  precision")
    for name, row in zip(names, results["classes"].values(), strict=True):
        recall, precision = ("-" if row[key] is None else f"{row[key]:.2f}%" for key in ("recall", "precision"))
        lines.append(f"{name:<{wide}}  {row['images']:>6}{recall:>8}{precision:>11}")
    if "confusion_matrix" not in results:
        return "\n".join([*lines, f"\nconfusion matrix left out: {len(names)} classes"])
    matrix = results["confusion_matrix"]
    cell = max(5, len(str(max(map(max, matrix)))) + 1)
    numbers = "".join(f"{index:>{cell}}" for index in range(len(names)))
    lines.append(f"\n{'true':<{wide}}{numbers}   predicted, by number")
    for index, (name, row) in enumerate(zip(names, matrix, strict=True)):
        lines.append(f"{name:<{wide}}" + "".join(f"{value:>{cell}}" for value in row) + f"   {index}")
    return "\n".join(lines)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    trained = load_network(options.checkpoint, weights=options.weights, on=options.device)
    if options.tta and trained.config.flip == "none":
        raise RunError("--tta: this network was trained with --flip none, so that mirror images mean nothing to it")
    with contextlib.redirect_stdout(sys.stderr):  # notices
        data, facts = load_images(trained, options.data_dir, test_set=options.test_set)
    logits = predict(trained.network, data.test_images, data, trained.config)
    if options.tta:
        logits = (logits + predict(trained.network, data.test_images, data, trained.config, flip=True)) / 2
    facts |= {"checkpoint": str(options.checkpoint), "weights": options.weights, "tta": options.tta}
    return facts | measure(logits, data.test_labels.cpu(), data.classes)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run, or a .pt file of tools.export")
    add_images(parser)
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="ema: moving average; raw: after the last step (default: %(default)s)",
    )
    parser.add_argument(
        "--tta", action="store_true", help="flip TTA: average the logits with those of the mirror image"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with exit_in_one_line():
        keep_freed_memory()
        results = evaluate(options)
        print(json.dumps(results) if options.json else report(results))


if __name__ == "__main__":
    main()
