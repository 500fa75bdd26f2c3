"""Attention over the keys that a pattern keeps.

Source: RAT+ (arXiv 2602.18196), dilated attention with local window and sinks, and its hybrids over heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rat_megatron.ops.dilated_attention import reference
from rat_megatron.ops.dilated_attention.heads import attend_by_head
from rat_megatron.ops.dispatch import triton_takes
from rat_megatron.ops.rope import apply_rope, check_rope
from rat_megatron.ops.topk_attention import topk_attention
from rat_megatron.ratplus.pattern import HeadPattern, LayerPattern


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    implementation: str | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which every query sees the keys that the pattern of its head keeps.

    q: [sq, b, np, hn]; k and v: [sk, b, ng, hn], k after RoPE; np is a multiple of ng and head h reads group h // (np // ng). q comes
    after RoPE too, or before it with cos and sin [sq, hn / 2], of the angle of each query and pair of channels (c, c + hn / 2): it is
    then turned as apply_rope() does, inside the kernel where one runs that can.
    Positions are int64 [sq] and [sk], 0, 1, ... when absent. They may be any subset in any order, as long as every query finds its
    own position among the keys (and a top-k pattern every position before it too). Returns [sq, b, np, hn] in the type of q. Softmax
    is fp32 (float64 for float64). Top-k patterns choose blocks as topk_attention says.

    ``implementation`` overrides the choice for sparse patterns: "masked" masks all [sq, sk] scores and serves any positions; "kept"
    gathers the keys seen, at a cost in proportion to them; "triton" is a kernel that does so on a GPU. "kept" and "triton" need queries
    and keys of the same tokens in order; there the choice is "triton" where it can run, else "kept", and elsewhere "masked". Raises
    ValueError when shapes, pattern and implementation do not fit together.
    """
    heads, groups = q.shape[2], k.shape[2]
    check_rope(q, cos, sin)
    if heads % groups or k.shape != v.shape:
        raise ValueError(f"{heads} query heads cannot share keys {list(k.shape)} and values {list(v.shape)}")
    if len(pattern.heads) not in (1, heads):
        raise ValueError(f"attention pattern '{pattern}' lists {len(pattern.heads)} heads, but the queries have {heads}")
    in_order = q_positions is None and k_positions is None and q.shape[0] == k.shape[0]
    if implementation not in (None, "masked", "kept", "triton"):
        raise ValueError(f"implementation is None, 'masked', 'kept' or 'triton', not {implementation!r}")
    if implementation in ("kept", "triton") and not in_order:
        raise ValueError(f"implementation '{implementation}' needs queries and keys of the same tokens, without positions")
    fused = implementation == "triton" or (implementation is None and in_order and triton_takes(q, k, v))

    def attend(head: HeadPattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if fused and not head.is_dense and not head.blocks:
            from rat_megatron.ops.dilated_attention import triton

            return triton.dilated_attention(q, k, v, head, softmax_scale, cos=cos, sin=sin)
        if cos is not None:
            q = apply_rope(q, cos, sin)
        if head.blocks:
            of_blocks = "torch" if implementation in ("masked", "kept") else implementation
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [s, b, heads, hn] -> [b, heads, s, hn]
            return topk_attention(q, k, v, head, softmax_scale, q_positions, k_positions, of_blocks).permute(2, 0, 1, 3)
        if in_order and head.is_dense and implementation is None:
            return reference.causal_attention(q, k, v, softmax_scale)
        if in_order and implementation != "masked":
            kept_at = kept_positions(head, len(q))
            kept_k, kept_v = (x[kept_at.to(x.device)] for x in (k, v))
            return reference.segment_attention(q, k, v, kept_k, kept_v, kept_at, head, softmax_scale, start=0)
        q_at = torch.arange(len(q), device=q.device) if q_positions is None else q_positions
        k_at = torch.arange(len(k), device=k.device) if k_positions is None else k_positions
        return reference.masked_attention(q, k, v, head, softmax_scale, q_at, k_at)

    return attend_by_head(q, k, v, pattern, attend)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, kept_k: Tensor, kept_v: Tensor, kept_at: Tensor, head: HeadPattern, softmax_scale: float, start: int
) -> Tensor:
    """Attention of a stretch of a longer sequence, for one positional pattern: what context parallelism runs on each of its chunks.

    q: [s, b, np, hn], the tokens from position ``start`` on. k and v: [h + s, b, ng, hn], the same tokens and the h before them, with
    h >= min(window, start). kept_k and kept_v: [n, b, ng, hn], keys at kept_at [n] (on the CPU, in order), with all of kept_positions()
    before the first of k. Returns [s, b, np, hn].
    """
    if triton_takes(q, k, v):
        from rat_megatron.ops.dilated_attention import triton

        return triton.segment_attention(q, k, v, kept_k, kept_v, head, softmax_scale, start)
    return reference.segment_attention(q, k, v, kept_k, kept_v, kept_at, head, softmax_scale, start)


def kept_positions(head: HeadPattern, length: int) -> Tensor:
    """Positions [n], in order, that the pattern keeps of ``length`` tokens wherever the query is: dilated ones and sinks."""
    return HeadPattern(head.dilation, sinks=head.sinks).kept_positions(length)
