"""Which parallel layouts a RAT+ model can take: checked before any process group is made, one sentence for each that cannot be."""

from __future__ import annotations

from argparse import Namespace

from rat_megatron.errors import UserError
from rat_megatron.ratplus.pattern import AttentionPattern


def check_layout(args: Namespace) -> None:
    """Raises UserError, naming the flag and its legal values, unless the model can be cut as the arguments say."""
    _check_heads(args)
    _check_sequence(args)
    _check_pipeline(args)


def check_ranks(args: Namespace) -> None:
    """Raises UserError unless the ranks are whole models."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    model = tp * pp * cp
    if args.world_size % model:
        raise UserError(
            f"{args.world_size} ranks are not whole models of {model} ranks (--tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp}): start a multiple of {model}"
        )


def check_dilations(args: Namespace, words: list[str]) -> None:
    """Under context parallelism a chunk is whole dilation steps: ranks then gather equal numbers of kept keys. Raises UserError."""
    chunk = args.seq_length // (2 * args.context_parallel_size)
    if args.context_parallel_size == 1:
        return
    for head in (head for word in words for layer in AttentionPattern.parse(word).layers for head in layer.heads):
        if not head.blocks and head.dilation and chunk % head.dilation:
            raise UserError(
                f"attention pattern '{head}' does not fit --context-parallel-size {args.context_parallel_size}: its dilation must divide "
                f"the chunk of {chunk} tokens (--seq-length / (2 * --context-parallel-size))"
            )


def query_groups(args: Namespace) -> int:
    """Key and value heads of a layer."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _check_heads(args: Namespace) -> None:
    tp, groups = args.tensor_model_parallel_size, query_groups(args)
    if args.num_attention_heads % groups:
        raise UserError(f"--num-query-groups {groups} does not divide --num-attention-heads {args.num_attention_heads}")
    if groups % tp:
        raise UserError(f"--tensor-model-parallel-size {tp} does not divide the {groups} query groups: choose a divisor of {groups}")
    if args.hidden_size % args.num_attention_heads and args.kv_channels is None:
        raise UserError(f"--num-attention-heads {args.num_attention_heads} does not divide --hidden-size {args.hidden_size}")
    if args.sequence_parallel and tp == 1:
        raise UserError("--sequence-parallel shares the sequence among tensor-parallel ranks: give --tensor-model-parallel-size above 1")
    cp = args.context_parallel_size
    if cp > 1 and "a2a" in args.cp_comm_type and groups // tp % cp:
        raise UserError(
            f"--cp-comm-type a2a shares the {groups // tp} query groups of a rank among --context-parallel-size {cp} ranks, which does not "
            "divide them: use p2p or all_gather"
        )


def _check_sequence(args: Namespace) -> None:
    chunks = 2 * args.context_parallel_size
    if args.context_parallel_size > 1 and args.seq_length % chunks:
        raise UserError(
            f"--context-parallel-size {args.context_parallel_size} cuts a sequence into {chunks} chunks: "
            f"--seq-length {args.seq_length} must be a multiple of {chunks}"
        )
    per_rank = args.seq_length // args.context_parallel_size
    if args.sequence_parallel and per_rank % args.tensor_model_parallel_size:
        raise UserError(
            f"--sequence-parallel: --tensor-model-parallel-size {args.tensor_model_parallel_size} must divide "
            f"the {per_rank} tokens of a rank"
        )


def _check_pipeline(args: Namespace) -> None:
    pp, layers = args.pipeline_model_parallel_size, args.num_layers
    if pp > 1 and args.context_parallel_size > 1 and args.use_tp_pp_dp_mapping:
        raise UserError("--use-tp-pp-dp-mapping has no order for ranks with pipeline and context parallelism: leave it out")
    uneven = (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers, args.pipeline_model_parallel_layout)
    if any(uneven) or args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split:
        return  # Megatron checks what its own flags lay out
    if layers % pp:
        raise UserError(f"--pipeline-model-parallel-size {pp} does not divide the {layers} layers: choose a divisor of {layers}")
    per_stage = layers // pp
    virtual = args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage:
        if per_stage % args.num_layers_per_virtual_pipeline_stage:
            raise UserError(
                f"--num-layers-per-virtual-pipeline-stage {args.num_layers_per_virtual_pipeline_stage} does not divide "
                f"the {per_stage} layers of a pipeline stage"
            )
        virtual = per_stage // args.num_layers_per_virtual_pipeline_stage
    if virtual and virtual > 1 and (pp == 1 or per_stage % virtual):
        raise UserError(
            f"{virtual} virtual pipeline stages need --pipeline-model-parallel-size above 1 and a number that divides "
            f"the {per_stage} layers of a pipeline stage"
        )
