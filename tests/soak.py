"""Kill a real run on real images at random moments, resume it, and compare it with one that nothing disturbed.

    python -m tests.soak --data-dir data/cifar10 --kills 6 --output-dir runs/soak

Both runs train on 10,000 images of CIFAR-10's class folders, compiled. Ends with status 0 if the two final checkpoints
are equal in every tensor and value but the times; what it prints is the log in results/soak.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import equal_runs


def take_part(source: Path, target: Path) -> None:
    """Link the first 1,000 training and 200 test images of each class."""
    for split, count in (("train", 1000), ("test", 200)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                os.link(image, target / split / folder.name / image.name)


def train(command: list[str], seconds: float | None) -> bool:
    """Run the command to its end, or kill it after `seconds`; return whether it was killed."""
    process = subprocess.Popen(command, stderr=subprocess.STDOUT)
    try:
        if process.wait(seconds):
            sys.exit(f"the run failed with status {process.returncode}")
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/soak"))
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--variant", choices=["baseline", "enhanced"], default="baseline")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    if options.output_dir.exists():
        sys.exit(f"--output-dir {options.output_dir}: exists already")
    if not (options.data_dir / "train").is_dir():
        sys.exit(f"--data-dir {options.data_dir}: holds no train/ and test/ with class folders of CIFAR-10")
    pictures, checkpoints = options.output_dir / "pictures", []
    take_part(options.data_dir, pictures)
    moments = random.Random(options.seed)
    for name, kills in (("undisturbed", 0), ("killed", options.kills)):
        script = [sys.executable, f"mobilenetv4_{options.variant}.py", "--data-dir", pictures, "--compile", "on"]
        command = [*map(str, script), "--epochs", str(options.epochs), "--output-dir", str(options.output_dir / name)]
        print(f"# {name}: {' '.join(['python', *command[1:]])}", flush=True)
        begun, deaths = time.monotonic(), 0
        while train(command, moments.uniform(5, 80) if deaths < kills else None):
            deaths += 1
            print(f"# killed with SIGKILL for the {deaths}. time", flush=True)
        if deaths < kills:
            sys.exit(f"the run ended after {deaths} of {kills} kills; more --epochs make it longer")
        checkpoints.append(options.output_dir / name / "checkpoint.pt")
        print(f"# {name}: {time.monotonic() - begun:.0f} seconds", flush=True)
    equal = equal_runs(*checkpoints)
    print("# the two are equal" if equal else "# THE TWO DIFFER")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
