#!/usr/bin/env bash
# Turn a model of the Hub into a RAT+ model: the same weights and gates that begin almost shut, continued pretraining with active recurrence
# learning, adaptation to sparse patterns, and Hugging Face folders of the results.
#
#   examples/retrofit.sh MODEL DATA RUN "d16s4 d64s4" --rat-preset retrofit-135m
#
# MODEL is a folder of a Llama, Mistral, Qwen2.5, Qwen3, OLMo2 or SmolLM model, DATA what rat-megatron prepare made with its tokenizer, RUN
# a folder for the rest; then patterns to adapt to and flags of pretrain_rat.py. Settings: LAUNCH, such as "torchrun --nproc-per-node 8",
# and ADAPT, flags of the adaptation: by default 1B tokens in the presets' batches; the paper adapts at a tenth of the rate, ADAPT="--lr
# 3e-5 --train-iters 954" here. Run it again and it goes on where it stopped.
set -euo pipefail
usage="give the model's folder, the data, a folder for the run, patterns, and flags of pretrain_rat.py"
model=${1:?$usage} data=${2:?$usage} run=${3:?$usage} patterns=${4:?$usage}
shift 4

train() { ${LAUNCH:-python} "$(dirname "${BASH_SOURCE[0]}")/../pretrain_rat.py" --data-path "$data" "$@"; }

[ -e "$run/start" ] || rat-megatron convert retrofit "$model" "$run/start"
train "$@" --pretrained-checkpoint "$run/start" --save "$run/dense" --rat-eval-patterns dense $patterns
[ -e "$run/dense-hf" ] || rat-megatron convert to-hf "$run/dense" "$run/dense-hf"

for pattern in $patterns; do
    train "$@" --pretrained-checkpoint "$run/dense" --save "$run/$pattern" --rat-pattern "$pattern" --rat-arl-pattern none \
        ${ADAPT:---train-iters 954}
    [ -e "$run/$pattern-hf" ] || rat-megatron convert to-hf "$run/$pattern" "$run/$pattern-hf"
done
