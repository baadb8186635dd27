"""Ship a trained network: the headline weights of a run, in half precision, without what only training needs.

python -m tools.export runs/baseline/checkpoint.pt baseline.pt
python mobilenetv4_baseline.py --evaluate baseline.pt
"""

import argparse
from pathlib import Path

import common


def export_weights(checkpoint: Path, file: Path) -> None:
    """Write the averaged weights and BN statistics as float16, with the settings, classes, mean and std of the run.

    Raises:
        RunError: if the checkpoint cannot be read, or the file not written.
    """
    saved = common.load_checkpoint(checkpoint)
    kept = {key: value for key, value in saved.items() if key != "optimizer"}
    weights = saved[common.HEADLINE]
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    for name, tensor in halves.items():
        if not tensor.isfinite().all():
            raise common.RunError(f"{checkpoint}: {name} has values beyond the range of half precision")
    common.write_checkpoint(file, kept | {"model": {}, "averaged": halves})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path, help="what is written, ending with .pt")
    options = parser.parse_args()
    with common.failures_in_one_line(common.Config()):
        if options.file.suffix != ".pt":
            raise common.RunError(f"{options.file}: expected a name that ends with .pt")
        export_weights(options.checkpoint, options.file)
        print(f"{options.file}: {options.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
