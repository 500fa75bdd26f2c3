#!/usr/bin/env bash
# Pretrain with a warmup-stable-decay schedule, and decay from checkpoints of its stable phase: models of several lengths for the price of
# one run and a tenth. A preset's run decays over its last 10%, and so does every branch.
#
#   examples/wsd.sh RUN "5000 10000 20000" --rat-preset 1.5b --data-path DATA
#
# RUN/trunk has the run, RUN/N the model that branched off at iteration N; the numbers are iterations that the run saves (--save-interval).
# What comes after them goes to pretrain_rat.py. Settings: LAUNCH, such as "torchrun --nproc-per-node 8". Run it again and it goes on where
# it stopped.
set -euo pipefail
usage="give a folder for the run, iterations to branch off at, and flags of pretrain_rat.py"
run=${1:?$usage} branches=${2:?$usage}
shift 2

train() { ${LAUNCH:-python} "$(dirname "${BASH_SOURCE[0]}")/../pretrain_rat.py" --lr-decay-style WSD "$@"; }

train "$@" --save "$run/trunk"

for start in $branches; do
    decay=$(((start + 8) / 9)) # a tenth of the branch's length
    train "$@" --load "$run/trunk" --ckpt-step "$start" --save "$run/$start" --train-iters $((start + decay)) --lr-wsd-decay-iters $decay
done
