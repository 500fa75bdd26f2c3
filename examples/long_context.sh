#!/usr/bin/env bash
# Train a RAT+ model on longer and longer sequences, with a larger base of RoPE at each length and context parallelism for the longest.
#
#   examples/long_context.sh CHECKPOINTS RUN "16384:500000:2 65536:8000000:8" DATA --lr 2e-5 --train-iters 500 --global-batch-size 64 ...
#
# Each word is a length, the base of RoPE (--rotary-base) and how many GPUs share a sequence (--context-parallel-size); data of that length
# are in DATA-LENGTH (rat-megatron prepare --seq-length LENGTH --output DATA-LENGTH). What comes after them goes to pretrain_rat.py; the
# architecture is that of CHECKPOINTS. RUN/LENGTH has the model of a length. Settings: LAUNCH, such as "torchrun --nproc-per-node 8". Run it
# again and it goes on where it stopped.
set -euo pipefail
usage="give checkpoints to start from, a folder for the run, LENGTH:BASE:GPUS words, the data, and flags of pretrain_rat.py"
start=${1:?$usage} run=${2:?$usage} lengths=${3:?$usage} data=${4:?$usage}
shift 4

train() { ${LAUNCH:-python} "$(dirname "${BASH_SOURCE[0]}")/../pretrain_rat.py" "$@"; }

for word in $lengths; do
    IFS=: read -r length base gpus <<<"$word"
    train "$@" --pretrained-checkpoint "$start" --save "$run/$length" --data-path "$data-$length" --seq-length "$length" \
        --rotary-base "$base" --context-parallel-size "${gpus:-1}" --recompute-granularity full --recompute-method uniform \
        --recompute-num-layers 1
    start=$run/$length
done
