#!/usr/bin/env bash
# The default run of one network (baseline or enhanced), on an otherwise idle machine; run from the repository's root at
# the commit in versions.txt. What an interruption leaves unfinished, the same command continues.
set -eu
variant=$1
results=results/cpu-45-epochs-depthwise/$variant
mkdir -p $results
python mobilenetv4_$variant.py --data-dir data/cifar10 --seed 0 --output-dir runs/$variant-0 >> $results/log.txt 2>&1
cp runs/$variant-0/metrics.csv runs/$variant-0/summary.json $results/
python -m benchmarks.shifts runs/$variant-0/checkpoint.pt --data-dir data/cifar10 > $results/shifts.txt
python -m tools.evaluate runs/$variant-0/checkpoint.pt > $results/evaluate.txt
