"""The benchmarks run, at their smallest, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_throughput_benchmark_prints_rates_ratios_shares_and_limits():
    options = ("--images", "64", "--batch-size", "32", "--turns", "1", "--set", "compile=off")
    command = [sys.executable, "-m", "benchmarks.throughput", *options, "--contenders", "baseline"]
    root, environment = Path(__file__).parents[1], {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^baseline +\d+\.\d +\d+\.\d +\d+\.\d +1\.00 ", result.stdout, re.M)
    assert re.search(r"^baseline: .*convolution, backward \d+%", result.stdout, re.M)
    assert re.search(r"^baseline: at most [\d,]+ images/s by arithmetic", result.stdout, re.M)
