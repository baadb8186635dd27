"""Evaluate a trained network on the test images of CIFAR-10 or of a folder of class folders.

    python -m tools.evaluate runs/baseline/checkpoint.pt
    python -m tools.evaluate results/weights/enhanced.pt --data-dir pictures/test --flip --json

Prints top-1 accuracy, top-5 where there are more than five classes, the cross-entropy, the expected calibration error,
precision and recall of each class, and the confusion matrix (rows: true classes).
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from tools import add_device, failures_in_one_line, load_data, load_network


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
    count, probabilities = len(classes), logits.softmax(1)
    confusion = (labels * count + logits.argmax(1)).bincount(minlength=count**2).view(count, count)
    hits, truly, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    results: dict[str, Any] = {"images": len(labels), "top1": common.accuracy(logits, labels)}
    if count > 5:
        within = (logits.topk(5).indices == labels[:, None]).any(1)
        results["top5"] = 100 * within.double().mean().item()
    results["loss"] = F.cross_entropy(logits, labels).item()
    results["calibration_error"] = calibration_error(probabilities, labels)
    results["classes"] = {
        name: {
            "images": truly[index].item(),
            "recall": 100 * hits[index].item() / truly[index].item() if truly[index] else None,
            "precision": 100 * hits[index].item() / predicted[index].item() if predicted[index] else None,
        }
        for index, name in enumerate(classes)
    }
    results["confusion_matrix"] = confusion.tolist()
    return results


def report(results: dict[str, Any]) -> str:
    """Return the measures as a text for people."""
    lines = [f"{results['images']:,} images, {results['weights']} weights" + ", with flip averaging" * results["flip"]]
    lines.append(f"top-1 accuracy     {results['top1']:6.2f}%")
    if "top5" in results:
        lines.append(f"top-5 accuracy     {results['top5']:6.2f}%")
    lines.append(f"cross-entropy      {results['loss']:7.4f}")
    lines.append(f"calibration error  {results['calibration_error']:6.2f}%")
    wide = max(8, *map(len, results["classes"]))
    lines.append(f"\n{'class':<{wide}}  images  recall  precision")
    for name, row in results["classes"].items():  # some may be neither among the images nor predicted
        recall, precision = ("-" if row[key] is None else f"{row[key]:.2f}%" for key in ("recall", "precision"))
        lines.append(f"{name:<{wide}}  {row['images']:>6}{recall:>8}{precision:>11}")
    cell = max(5, len(str(max(map(max, results["confusion_matrix"])))) + 1)
    numbers = "".join(f"{index:>{cell}}" for index in range(len(results["classes"])))
    lines.append(f"\n{'true':<{wide}}{numbers}   predicted, by number")
    for index, (name, row) in enumerate(zip(results["classes"], results["confusion_matrix"], strict=True)):
        lines.append(f"{name:<{wide}}" + "".join(f"{value:>{cell}}" for value in row) + f"   {index}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of a run, or of tools.export")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=common.Config.data_dir,
        help="CIFAR-10, or folders of the classes, alone or in train/ and test/ (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        choices=("averaged", "raw"),
        default=common.HEADLINE,
        help="averaged over the last steps, or raw, those of the last one (default: %(default)s)",
    )
    parser.add_argument("--flip", action="store_true", help="average the logits of each image and of its reflection")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args()
    with failures_in_one_line():
        common.keep_freed_memory()
        device = common.pick_device(options.device, 0)
        network, saved = load_network(options.checkpoint, weights=options.weights)
        with contextlib.redirect_stdout(sys.stderr):  # notices
            data, config = load_data(saved, options.data_dir, device)
        network.to(device, memory_format=common.layout(device))
        logits = common.predict(network, data.test_images, data, config)
        if options.flip:
            logits = (logits + common.predict(network, data.test_images, data, config, flip=True)) / 2
        results = {"checkpoint": str(options.checkpoint), "weights": options.weights, "flip": options.flip}
        results |= measure(logits, data.test_labels.cpu(), data.classes)
        print(json.dumps(results) if options.json else report(results))


if __name__ == "__main__":
    main()
