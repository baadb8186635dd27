#!/usr/bin/env bash
# Both networks without CutMix, one after the other, on an otherwise idle machine; run from the repository's root, at
# the commit in versions.txt (now other settings are the default). What an interruption leaves unfinished, the same
# command continues.
set -u
results=results/cpu-45-epochs
for variant in baseline enhanced; do
    mkdir -p $results/$variant
    python mobilenetv4_$variant.py --data-dir data/cifar10 >> $results/$variant/log.txt 2>&1 || exit
    cp runs/$variant/metrics.csv runs/$variant/summary.json $results/$variant/ || exit
    python -m benchmarks.shifts runs/$variant/checkpoint.pt --data-dir data/cifar10 > $results/$variant/shifts.txt || exit
    python -m tools.export runs/$variant/checkpoint.pt results/weights/$variant.pt || exit
done
python -m pip freeze | grep -iE '^(torch|torchvision|numpy|tqdm|pillow)=' > $results/versions.txt
grep -m 1 'model name' /proc/cpuinfo >> $results/versions.txt
nproc >> $results/versions.txt
git rev-parse HEAD >> $results/versions.txt
