#!/usr/bin/env bash
# One run of a network (baseline or enhanced) with --epochs alone changed, on an otherwise idle machine; run from the
# repository's root at the commit in versions.txt. What an interruption leaves unfinished, the same command continues.
set -eu
variant=$1 epochs=$2 seed=$3
run=$variant-$epochs-$seed results=results/cpu-lengths/$variant-$epochs-$seed
mkdir -p $results
python mobilenetv4_$variant.py --data-dir data/cifar10 --epochs $epochs --seed $seed --output-dir runs/$run \
    >> $results/log.txt 2>&1
cp runs/$run/metrics.csv runs/$run/summary.json $results/
python -m benchmarks.shifts runs/$run/checkpoint.pt --data-dir data/cifar10 > $results/shifts.txt
python -m tools.evaluate runs/$run/checkpoint.pt > $results/evaluate.txt
