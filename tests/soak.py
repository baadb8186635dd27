"""Kill a real run on real images at random moments, continue it, and compare it with one that nothing disturbed.

    python tests/soak.py --data-dir data/cifar10 --kills 6 --output-dir runs/soak

Both runs train on 10,000 images of CIFAR-10's class folders, compiled. Ends with status 0 if the two final checkpoints
are equal byte for byte; what it prints is the log in results/soak.
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path


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
    shutil.rmtree(options.output_dir, ignore_errors=True)
    pictures, digests = options.output_dir / "pictures", []
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
        digests.append(hashlib.sha256((options.output_dir / name / "checkpoint.pt").read_bytes()).hexdigest())
        print(f"# {name}: {time.monotonic() - begun:.0f} seconds, checkpoint.pt has SHA-256 {digests[-1]}", flush=True)
    print("# the two are equal" if digests[0] == digests[1] else "# THE TWO DIFFER")
    sys.exit(digests[0] != digests[1])


if __name__ == "__main__":
    main()
