#!/usr/bin/env bash
# How soon a run can end at 83.28% and at 90%: short runs of the baseline, one after the other, on an otherwise idle
# machine, without CutMix; run from the repository's root, at an earlier commit. The 8 epochs are compiled, and the code
# is compiled anew.
set -u
results=results/cpu-short
for epochs in 3 8; do
    TORCH_HOME=runs/short-torch python mobilenetv4_baseline.py --data-dir data/cifar10 --epochs $epochs \
        --output-dir runs/short-$epochs > $results/$epochs-epochs.log 2>&1 || exit
    cp runs/short-$epochs/metrics.csv $results/$epochs-epochs.csv || exit
    cp runs/short-$epochs/summary.json $results/$epochs-epochs.json || exit
done
grep -E -m 4 '^(cpu family|model|model name|cpu MHz)\s' /proc/cpuinfo > $results/processor.txt
nproc >> $results/processor.txt
git rev-parse HEAD >> $results/processor.txt
