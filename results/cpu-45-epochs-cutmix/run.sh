#!/usr/bin/env bash
# The default run of one network (baseline or enhanced), on an otherwise idle machine; run from the repository's root at
# the commit in versions.txt. What an interruption leaves unfinished, the same command continues.
set -eu
variant=$1
results=results/cpu-45-epochs-cutmix/$variant
mkdir -p $results
python mobilenetv4_$variant.py --data-dir data/cifar10 >> $results/log.txt 2>&1
cp runs/$variant/metrics.csv runs/$variant/summary.json $results/
python -m benchmarks.shifts runs/$variant/checkpoint.pt --data-dir data/cifar10 > $results/shifts.txt
python -m tools.evaluate runs/$variant/checkpoint.pt > $results/evaluate.txt
python -m tools.export runs/$variant/checkpoint.pt results/weights/$variant.pt
