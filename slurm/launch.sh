#!/usr/bin/env bash
# Runs a program on every GPU of a Slurm job, and the job again until the program has finished: what the *.sbatch files here call.
#
#   launch.sh PROGRAM FLAGS...      PROGRAM is pretrain_rat.py, or another Python file or `-m MODULE`
#
# Settings, all from the environment (sbatch hands it over):
#   OUTPUT               folder for logs, checkpoints and the job's notes; shared by all nodes
#   CHECKPOINTS          where the program saves and resumes; the job is requeued until it is finished there. Unset: the program runs once
#   RAT_HOME             this repository; default: where sbatch was called
#   VENV                 virtual environment; default: $RAT_HOME/.venv
#   CONTAINER_IMAGE      a container instead of it (Pyxis: srun --container-image), with CONTAINER_MOUNTS besides RAT_HOME and OUTPUT
#   CHECKPOINT_SECONDS   time that the program's end with its last checkpoint may take, kept free before the job's limit. Default:
#                        twice what the last checkpoint took and two minutes; 600 where there is none
#   NODE_CACHE           folder of each node that must be writable, for downloaded shards
#   MAX_RESTARTS         restarts in a row without a new checkpoint, after which the job fails. Default 3
set -euo pipefail

: "${OUTPUT:?set OUTPUT to a folder that all nodes share}"
RAT_HOME=${RAT_HOME:-$SLURM_SUBMIT_DIR}
VENV=${VENV:-$RAT_HOME/.venv}
MAX_RESTARTS=${MAX_RESTARTS:-3}
attempt=${SLURM_RESTART_COUNT:-0}
logs=$OUTPUT/logs/$SLURM_JOB_ID-$attempt
notes=$OUTPUT/slurm
mkdir -p "$logs" "$notes"

say() { echo "$(date '+%F %T') launch: $*"; }

main() {
    # Slurm sends USR1 ahead of the time limit (#SBATCH --signal), and TERM when it preempts the job: save, and end.
    trap stop_at_limit USR1
    trap stop TERM
    CHECKPOINT_SECONDS=${CHECKPOINT_SECONDS:-$(checkpoint_seconds)}
    say "job $SLURM_JOB_ID, start $((attempt + 1)), $SLURM_NNODES nodes ($SLURM_JOB_NODELIST), logs in $logs"
    say "$CHECKPOINT_SECONDS seconds before the limit are kept free for the last checkpoint"
    set_environment
    check_nodes
    before=$(iteration)
    run_program "$@" || status=$?
    status=${status:-0}
    after=$(iteration)
    say "the program ended with exit code $status, the last checkpoint is of iteration $after"
    if finished; then
        say "finished"
        rm -f "$notes/restarts"
        exit 0
    fi
    if complaint=$(grep -ahm1 '^error: ' "$logs"/rank*.log) && [ "$after" = "$before" ]; then
        say "not requeued, as it would end the same way: $complaint"
        exit 2
    fi
    [ -n "${CHECKPOINTS:-}" ] || exit "$status"
    requeue
}

# ---- environment ---------------------------------------------------------------------------------------------------------------------

set_environment() {
    container=()
    python=$VENV/bin/python
    if [ -n "${CONTAINER_IMAGE:-}" ]; then
        python=python3
        container=(--container-image="$CONTAINER_IMAGE"
            --container-mounts="$RAT_HOME:$RAT_HOME,$OUTPUT:$OUTPUT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    fi
    export PYTHONPATH=$RAT_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

    # Megatron orders the kernels of tensor and sequence parallelism by a single hardware queue.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # Say what went wrong, not what goes right.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # A failed collective ends its rank, and so the job, instead of leaving the other ranks waiting in it.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # The last collectives of every rank are kept, and written out when one times out: shows which rank stayed behind.
    export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$logs/nccl-}
    # Memory is not cut into pieces that fit nothing, which weeks of alternating sparse and dense steps would do.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
}

# One task on each node says that it can work, and where in the network it is. Nodes that do not are left out of the next start.
check_nodes() {
    srun --ntasks-per-node=1 --ntasks="$SLURM_NNODES" --kill-on-bad-exit=0 --no-kill --wait=0 "${container[@]}" \
        bash "$RAT_HOME/slurm/check_node.sh" "$python" "$logs" || true
    cat "$logs"/topology-* 2>/dev/null | sort >"$logs/nodes" || true
    local node bad=() silent=()
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        if [ -f "$logs/topology-$node" ]; then continue; fi
        if [ -s "$logs/node-$node.log" ]; then bad+=("$node"); else silent+=("$node"); fi
        say "node $node cannot be used: $(tail -n 1 "$logs/node-$node.log" 2>/dev/null || echo "no answer")"
    done
    # Nodes that say nothing are to blame only where another did answer.
    if [ $((${#bad[@]} + ${#silent[@]})) -lt "$SLURM_NNODES" ]; then bad+=("${silent[@]}"); fi
    if [ ${#bad[@]} -gt 0 ]; then requeue "$(IFS=, && echo "${bad[*]}")"; fi
    if [ ${#silent[@]} -gt 0 ]; then requeue; fi
    # Neighbours in the network become neighbours in rank: by switch where Slurm knows them, else by name.
    awk -v tasks="$SLURM_NTASKS_PER_NODE" '{for (i = 0; i < tasks; i++) print $2}' "$logs/nodes" >"$logs/hostfile"
    cat "$logs/environment.txt" 2>/dev/null || true
}

# ---- the program ---------------------------------------------------------------------------------------------------------------------

run_program() {
    local flags=()
    if [ "$1" = pretrain_rat.py ]; then
        flags=(--exit-signal-handler)
        local minutes
        minutes=$((($(seconds_left) - CHECKPOINT_SECONDS) / 60))
        if [ "$minutes" -gt 0 ]; then flags+=(--exit-duration-in-mins "$minutes"); fi
        set -- "$RAT_HOME/pretrain_rat.py" "${flags[@]}" "${@:2}"
    fi
    MASTER_ADDR=$(scontrol show node "$(head -n 1 "$logs/hostfile")" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export MASTER_ADDR MASTER_PORT SLURM_HOSTFILE=$logs/hostfile LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    say "$SLURM_NTASKS ranks, rendezvous at $MASTER_ADDR:$MASTER_PORT: $*"
    # Every task sees all GPUs of its node and takes the one of its number: NCCL needs to see its neighbours. Where a rank fails, the others
    # get a minute to end by themselves and to say where they were.
    # shellcheck disable=SC2016  # the task expands it
    srun --ntasks="$SLURM_NTASKS" --distribution=arbitrary --output="$logs/rank%t.log" --open-mode=append \
        --kill-on-bad-exit=0 --wait="${SLURM_WAIT:-60}" "${container[@]}" \
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"' bash "$python" "$@" &
    local step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal interrupts the wait
    wait "$step"                                                     # the shell remembers how it ended
}

stop() {
    say "signal: asking every rank for a checkpoint"
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}

# When no more than CHECKPOINT_SECONDS are left: for a program that does not look at the clock itself, as --exit-duration-in-mins does.
stop_at_limit() {
    local early=$(($(seconds_left) - CHECKPOINT_SECONDS))
    if [ "$early" -le 0 ]; then stop; else (sleep "$early" && stop) & fi
}

checkpoint_seconds() {
    local last
    last=$(cat "${CHECKPOINTS:-/nowhere}/checkpoint_seconds" 2>/dev/null || true)
    if [ -n "$last" ]; then awk -v last="$last" 'BEGIN {print int(2 * last) + 120}'; else echo 600; fi
}

seconds_left() {
    local end
    end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
    end=$(date -d "$end" +%s 2>/dev/null || echo 0) # "Unknown" without a limit
    echo $((end > 0 ? end - $(date +%s) : 0))
}

# ---- what happens afterwards ---------------------------------------------------------------------------------------------------------

iteration() { cat "${CHECKPOINTS:-/nowhere}/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

finished() { [ "${status:-1}" = 0 ] && { [ -z "${CHECKPOINTS:-}" ] || [ -f "$CHECKPOINTS/finished" ]; }; }

# requeue [NODES]: starts this job anew, without NODES; fails it after too many starts that came no further.
requeue() {
    local count=0 last=-1 now
    now=$(iteration)
    if [ -f "$notes/restarts" ]; then read -r count last <"$notes/restarts"; fi
    count=$((now > last ? 0 : count + 1))
    echo "$count $now" >"$notes/restarts"
    if [ "$count" -ge "$MAX_RESTARTS" ]; then
        say "not requeued: $count restarts without a new checkpoint (MAX_RESTARTS=$MAX_RESTARTS); the logs of the last start are in $logs"
        exit 1
    fi
    trap '' TERM USR1 # Slurm ends this script, but not before it is done
    if [ $# -gt 0 ]; then
        say "requeued without $1"
        scontrol requeuehold "$SLURM_JOB_ID"
        local excluded
        excluded=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' | grep -v null || true)
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${excluded:+$excluded,}$1"
        scontrol release "$SLURM_JOB_ID"
    else
        say "requeued"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    trap 'exit 1' TERM
    sleep 300 &
    wait
    exit 1
}

main "$@"
