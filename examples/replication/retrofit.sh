#!/usr/bin/env bash
# What memory does for a model that exists: continued pretraining of one model on English text, with memory and without, everything else
# alike; then both are adapted to sparse patterns, and asked for their loss and for needles.
#
#   examples/replication/retrofit.sh MODEL TEXT RUN ["without:0 with:0.01"] [flags of pretrain_rat.py]
#
# MODEL is a folder such as SmolLM2-135M-Instruct, TEXT a folder of JSONL such as corpus.py writes (train/), RUN a folder for the rest. A
# variant is a name and its gates at first (rat-megatron convert retrofit --memory): gates of 0 stay 0, as their gradient is 0 too, so that
# is the model without memory. A tenth of the samples are needle questions, of which only the answers count, as no base model answers in
# their form. Settings: LAUNCH, such as "torchrun --nproc-per-node 8", LENGTH, ITERATIONS, ADAPTATION and SAVED (iterations), BATCH,
# QUESTIONS, VAL_FRACTION and SAMPLES, of the validation split. Run it again and it goes on where it stopped; table.py puts the results of
# all variants beside each other.
set -euo pipefail
usage="give the model's folder, a folder of text, and one for the run"
model=${1:?$usage} text=${2:?$usage} run=${3:?$usage} variants=${4:-without:0 with:0.01}
shift $(($# < 4 ? $# : 4))
here=$(dirname "${BASH_SOURCE[0]}")
length=${LENGTH:-2048} iterations=${ITERATIONS:-150} adaptation=${ADAPTATION:-30} questions=${QUESTIONS:-50}
patterns="dense d4s4 d16s4 d64s4 w256s4"

prepare() { rat-megatron prepare "$@" --tokenizer "$model" --seq-length "$length" --val-fraction "${VAL_FRACTION:-0.02}"; }
[ -e "$run/text" ] || prepare "$text" --output "$run/text"
if [ ! -e "$run/needles" ]; then
    python -m rat_megatron.evaluation.needles "$run/needles.jsonl" --tokenizer "$model" --length "$length" --count $((40 * questions))
    prepare "$run/needles.jsonl" --text-column prompt --answer-column answer --output "$run/needles"
fi

train() {
    ${LAUNCH:-python} "$here/../../pretrain_rat.py" --rat-preset retrofit-135m --data-path 0.9 "$run/text" 0.1 "$run/needles" \
        --seq-length "$length" --global-batch-size "${BATCH:-64}" --calculate-per-token-loss --eval-iters 0 --log-interval 10 "$@"
}
evaluate() { # FOLDER SCORES PATTERN...
    words=()
    for pattern in "${@:3}"; do words+=(--pattern "$pattern"); done
    [ -e "$2/results.json" ] || rat-megatron evaluate "$1" --output "$2" "${words[@]}" --data "$run/text" --num-samples "${SAMPLES:-100}" \
        --needle-length "$length" --needle-count "$questions" --batch-size 25
}

for variant in $variants; do
    name=${variant%:*} gates=${variant#*:}
    of=$run/$name
    [ -e "$of/start" ] || rat-megatron convert retrofit "$model" "$of/start" --memory "$gates"
    train --pretrained-checkpoint "$of/start" --save "$of/trained" --train-iters "$iterations" --save-interval "${SAVED:-$iterations}" "$@"
    for pattern in $patterns; do
        train --pretrained-checkpoint "$of/trained" --save "$of/$pattern" --train-iters "$adaptation" --save-interval "$adaptation" \
            --rat-pattern "$pattern" --rat-arl-pattern none --lr 1e-4 --lr-warmup-iters 0 "$@"
        [ -e "$of/hf-$pattern" ] || rat-megatron convert to-hf "$of/$pattern" "$of/hf-$pattern"
        evaluate "$of/hf-$pattern" "$of/scores-$pattern" "$pattern"
    done
    evaluate "$of/hf-dense" "$of/scores-top-k" d64k8 d64k8+d # chosen by score: dense attention's weights
done
python "$here/table.py" "$run"
