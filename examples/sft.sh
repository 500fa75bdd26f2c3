#!/usr/bin/env bash
# Fine-tune an adapted RAT+ model on prompts with answers; only the answers count in the loss. The values are those by which the paper
# prepares a model for RULER (about 18,000 samples): 4 epochs, batches of 32, learning rate 1e-5, weight decay 0.01, 5% warm-up.
#
#   examples/sft.sh ANSWERS.jsonl DATA/tokenizer RUN --rat-preset 1.5b --pretrained-checkpoint ADAPTED --rat-pattern d16s4
#
# ANSWERS.jsonl has a "prompt" and an "answer" a line. An answer that follows a word begins with its space. What comes after RUN goes to
# pretrain_rat.py and wins. Settings: SEQ_LENGTH, EPOCHS, VAL_FRACTION, LAUNCH, such as "torchrun --nproc-per-node 8", and MESSAGES_COLUMN,
# such as "messages": then a line has a conversation, which is put into the tokenizer's own chat template, and every answer in it counts.
set -euo pipefail
usage="give ANSWERS.jsonl, a tokenizer, a folder for the run, and flags of pretrain_rat.py"
answers=${1:?$usage} tokenizer=${2:?$usage} run=${3:?$usage}
shift 3
batch=32

# Each document becomes a sample of its own; those that are longer than a sample are left out and counted.
columns=(--text-column prompt --answer-column answer)
[ -z "${MESSAGES_COLUMN:-}" ] || columns=(--messages-column "$MESSAGES_COLUMN")
rat-megatron prepare "$answers" "${columns[@]}" --output "$run/data" --tokenizer "$tokenizer" \
    --seq-length "${SEQ_LENGTH:-4096}" --val-fraction "${VAL_FRACTION:-0.02}"

samples() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))["splits"][sys.argv[2]]["samples"])' "$run/data/rat_meta.json" "$1"; }
batches=$(($(samples train) / batch)) # an epoch is whole batches
if [ "$batches" -eq 0 ]; then
    echo "error: $answers gives fewer than $batch training samples: give more documents" >&2
    exit 2
fi

# Answers differ in length: --calculate-per-token-loss weighs all tokens of a batch alike, however it is cut into microbatches.
${LAUNCH:-python} "$(dirname "${BASH_SOURCE[0]}")/../pretrain_rat.py" --data-path "$run/data" --save "$run/checkpoints" \
    --seq-length "${SEQ_LENGTH:-4096}" --global-batch-size $batch --train-iters $((${EPOCHS:-4} * batches)) \
    --lr 1e-5 --weight-decay 0.01 --lr-warmup-fraction 0.05 --rat-arl-pattern none --calculate-per-token-loss \
    --eval-interval "$batches" --eval-iters $(($(samples val) / batch)) "$@"

# A second run converts anew, and takes the place of the first one's model only when it is whole.
rm -rf "$run/hf.new"
rat-megatron convert to-hf "$run/checkpoints" "$run/hf.new"
rm -rf "$run/hf"
mv "$run/hf.new" "$run/hf"
