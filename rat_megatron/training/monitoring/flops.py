"""FLOPs of a RAT+ training iteration. Megatron's own count misses the forget gate and sparse patterns, and counts one step."""

from __future__ import annotations

from argparse import Namespace
from functools import cache

from rat_megatron.ratplus.pattern import AttentionPattern

_FORWARD_AND_BACKWARD = 3  # the backward pass costs two forwards
_MULTIPLY_ADD = 2


def step_flops(args: Namespace, num_samples: int, pattern: str) -> int:
    """FLOPs of one forward and backward pass over ``num_samples`` sequences of ``args.seq_length`` tokens under a pattern.

    Matrix products only, attention counted over the pairs that are seen, as Megatron counts.
    """
    query_width = args.kv_channels * args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    kv_width = args.kv_channels * groups
    projections = (3 if args.attention_output_gate else 2) * query_width  # q, out, output gate
    projections += (3 if args.rat_recurrence else 2) * kv_width  # k, v, forget gate
    mlp = (3 if args.swiglu else 2) * args.ffn_hidden_size
    per_token = args.num_layers * args.hidden_size * (projections + mlp) + args.hidden_size * args.padded_vocab_size
    attention = _attention_flops(pattern, args.seq_length, args.kv_channels, args.num_layers, args.num_attention_heads)
    return _FORWARD_AND_BACKWARD * num_samples * (_MULTIPLY_ADD * args.seq_length * per_token + attention)


def iteration_flops(args: Namespace, batch_size: int, **_packed_sequences) -> int:
    """FLOPs of one iteration over ``batch_size`` sequences: the dense step, and the sparse step under active recurrence learning.

    Has the signature of Megatron's ``num_floating_point_operations``, whose place it takes.
    """
    flops = step_flops(args, batch_size, args.rat_pattern)
    if args.rat_arl_pattern != "none":
        flops += step_flops(args, batch_size, args.rat_arl_pattern)
    return flops


@cache  # Megatron asks every iteration, and the GPU waits for the answer
def _attention_flops(pattern: str, seq_length: int, head_dim: int, num_layers: int, num_heads: int) -> int:
    return AttentionPattern.parse(pattern).flops(seq_length, head_dim, num_layers, num_heads)
