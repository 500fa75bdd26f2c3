#!/usr/bin/env bash
# What the pretrain_*.sbatch scripts share: pretraining with the recipe of PRESET.
#
#   pretrain.sh PRESET FLAGS...
#
# DATA is what --data-path takes (folders or URLs, with weights or without), OUTPUT a folder that all nodes share. FLAGS are those of
# pretrain_rat.py and win over the preset. launch.sh lists the other settings: container or virtual environment, restarts, and so on.
set -euo pipefail
: "${DATA:?set DATA to what --data-path takes}" "${OUTPUT:?set OUTPUT to a folder that all nodes share}"
export CHECKPOINTS=$OUTPUT/checkpoints NODE_CACHE=${NODE_CACHE:-/tmp/rat-megatron-$(id -un)}

# shellcheck disable=SC2086  # DATA may be several words
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" pretrain_rat.py --rat-preset "$1" --data-path $DATA \
    --data-cache-path "$NODE_CACHE" --save "$CHECKPOINTS" --tensorboard-dir "$OUTPUT/tensorboard" --rat-hang-timeout-in-mins 20 "${@:2}"
