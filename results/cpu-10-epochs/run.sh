#!/usr/bin/env bash
# The two 10-epoch runs of the README's table, one after the other, on an otherwise idle machine; run from the
# repository's root. The baseline is killed with SIGKILL in its sixth epoch and continued by the same command.
set -u
results=results/cpu-10-epochs
python -m pip freeze | grep -iE '^(torch|torchvision|numpy|tqdm|pillow)=' > $results/versions.txt
grep -m 1 'model name' /proc/cpuinfo >> $results/versions.txt
nproc >> $results/versions.txt
git rev-parse HEAD >> $results/versions.txt

train() { python mobilenetv4_$1.py --epochs 10 --data-dir data/cifar10 >> $results/$1.log 2>&1; }

train baseline &
while ! grep -q '^5,' runs/baseline/metrics.csv 2> /dev/null; do sleep 1; done
sleep 60
pkill -KILL -f 'mobilenetv4_baseline.py --epochs 10'
wait
echo '(killed here with SIGKILL; the same command again)' >> $results/baseline.log
train baseline
train enhanced
for variant in baseline enhanced; do
    mkdir -p $results/$variant
    mv $results/$variant.log $results/$variant/log.txt
    cp runs/$variant/metrics.csv runs/$variant/summary.json $results/$variant/
done
