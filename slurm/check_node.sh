#!/usr/bin/env bash
# Whether a node can train; run on each by launch.sh. The last line of LOGS/node-NAME.log says why not, LOGS/topology-NAME that it can.
#
#   check_node.sh PYTHON LOGS
set -uo pipefail
python=$1 logs=$2
exec >"$logs/node-$SLURMD_NODENAME.log" 2>&1

fail() {
    echo "$1"
    exit 1
}

if command -v nvidia-smi >/dev/null; then
    gpus=$(timeout 60 nvidia-smi -L | grep -c '^GPU ') || fail "nvidia-smi finds no GPU, or does not answer"
    [ "$gpus" -ge "${SLURM_GPUS_ON_NODE:-1}" ] || fail "$gpus GPUs work, $SLURM_GPUS_ON_NODE were asked for"
fi
if [ -n "${NODE_CACHE:-}" ]; then
    { mkdir -p "$NODE_CACHE" && touch "$NODE_CACHE/.written"; } || fail "NODE_CACHE $NODE_CACHE cannot be written"
fi
timeout 300 "$python" -c "import torch" || fail "$python cannot import torch"
echo "${SLURM_TOPOLOGY_ADDR:-$SLURMD_NODENAME} $SLURMD_NODENAME" >"$logs/topology-$SLURMD_NODENAME"
if [ "$SLURM_PROCID" = 0 ]; then
    timeout 300 "$python" -m rat_megatron.cli.main doctor >"$logs/environment.txt" 2>/dev/null
fi
exit 0
