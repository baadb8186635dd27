#!/usr/bin/env bash
# The baseline with one idea of the enhanced network (squeeze-excitation, silu or stochastic-depth), --epochs alone
# changed; run from the repository's root at the commit in versions.txt. The baseline and all three ideas:
# ../cpu-lengths/baseline-8-0 and ../cpu-lengths/enhanced-8-0.
set -eu
name=$1 run=runs/$1-8-0 results=results/ideas-8-epochs/$1-0
mkdir -p $results
python -m benchmarks.ablation --train $name --data-dir data/cifar10 --epochs 8 --seed 0 --output-dir $run \
    >> $results/log.txt 2>&1
cp $run/metrics.csv $run/summary.json $results/
