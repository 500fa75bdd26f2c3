#!/usr/bin/env bash
# A whole RAT+ run, from text to a Hugging Face model, small enough for two CPU cores: `make quickstart`.
#
# Everything goes to runs/quickstart (or the folder given). Run it again and each step goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${1:-runs/quickstart}
mkdir -p "$run/logs"
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=$(((cores + 1) / 2)) # two trainings at a time

patterns="dense d16 d64"

# Training says much; the terminal gets the lines that matter, the log file gets all.
train() { # NAME FLAGS...: one training run of pretrain_rat.py
    local name=$1 log="$run/logs/$1.log"
    shift
    if ! python pretrain_rat.py --rat-preset tiny --data-path "$run/data" --rat-eval-patterns $patterns \
        --save "$run/checkpoints/$name" --tensorboard-dir "$run/tensorboard/$name" "$@" 2>&1 | tee "$log" |
        sed -unE "s|.* iteration +([0-9]+)/ +([0-9]+) .*(lm loss: .*) loss scale.*|  $name \1/\2  \3|p"; then
        grep -a '^error: ' "$log" >&2 || tail -n 20 "$log" >&2
        echo "error: training '$name' failed, its log is $log" >&2
        return 1
    fi
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # no training is left behind when another fails

echo "1. Text: English documentation from this Python installation, and a tokenizer trained on it"
[ -d "$run/corpus/tokenizer" ] || python -m rat_megatron.data.corpus "$run/corpus" --vocab-size 2048

echo "2. Data: tokens in MDS shards, 2% of the documents held out"
rat-megatron prepare "$run/corpus/corpus" --output "$run/data" --tokenizer "$run/corpus/tokenizer" --seq-length 256 --val-fraction 0.02

echo "3. Pretraining: RAT+ and the plain-attention baseline, each batch used under d64 and dense"
train baseline --no-rat-recurrence &
train pretrained
wait $!

echo "4. Adaptation to each pattern, with a short second run"
base="--pretrained-checkpoint $run/checkpoints/pretrained"
plain="--no-rat-recurrence --pretrained-checkpoint $run/checkpoints/baseline"
train adapted-dense $base --rat-pattern dense &
train adapted-d16 $base --rat-pattern d16
wait $!
train adapted-d64 $base --rat-pattern d64 &
train baseline-d16 $plain --rat-pattern d16
wait $!
train baseline-dense $plain --rat-pattern dense &
train baseline-d64 $plain --rat-pattern d64
wait $!

echo "5. Hugging Face format: the model adapted to d16"
rm -rf "$run/hf"
rat-megatron convert to-hf "$run/checkpoints/adapted-d16" "$run/hf"
python examples/generate.py "$run/hf" "Return a new"

echo "6. Report"
rat-megatron report "$run" --pretrained "$run/checkpoints/pretrained" --baseline "$run/checkpoints/baseline" \
    $(for pattern in $patterns; do echo "--adapted $run/checkpoints/adapted-$pattern --baseline-adapted $run/checkpoints/baseline-$pattern"; done)
echo "Plot and numbers: $run/report.png, $run/report.json   curves: tensorboard --logdir $run/tensorboard"
