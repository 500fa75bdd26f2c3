"""Attention over the keys that a pattern keeps: a torch implementation on scaled_dot_product_attention, and the choice of kernels.

Source: RAT+ (arXiv 2602.18196), dilated attention with local window and sinks, and its hybrids over heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rat_megatron.ops.dispatch import triton_takes
from rat_megatron.ops.rope import check_rope, turn
from rat_megatron.ops.topk_attention import topk_attention
from rat_megatron.ratplus.pattern import HeadPattern, LayerPattern

# Consecutive queries that share one gathered set of keys: fewer waste less on masked keys, more make fewer calls. Measured.
_BLOCK = 64


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
    implementation: str | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention in which every query sees the keys that the pattern of its head keeps.

    q: [sq, b, np, hn]; k and v: [sk, b, ng, hn], k after RoPE; np is a multiple of ng and head h reads group h // (np // ng). q comes
    after RoPE too, or before it with cos and sin [sq, hn / 2], of the angle of each query and pair of channels (c, c + hn / 2): it is
    then turned as turn() does, inside the kernel where one runs that can.
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

    def attend(head: HeadPattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if fused and not head.is_dense and not head.blocks:
            return _fused_attention(q, k, v, head, softmax_scale, cos, sin)
        if cos is not None:
            q = turn(q, cos, sin)
        if fused and head.blocks:
            return _fused_topk(q, k, v, head, softmax_scale)
        if in_order and not head.blocks and implementation != "masked":
            if head.is_dense and implementation is None:
                return _sdpa(q, k, v, softmax_scale, is_causal=True)
            return _kept_attention(q, k, v, head, softmax_scale)
        q_at = torch.arange(q.shape[2], device=q.device) if q_positions is None else q_positions
        k_at = torch.arange(k.shape[2], device=k.device) if k_positions is None else k_positions
        if head.blocks:
            return topk_attention(q, k, v, head, softmax_scale, q_at, k_at)
        return _sdpa(q, k, v, softmax_scale, attn_mask=head.mask(q_at[:, None], k_at))

    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [s, b, heads, hn] -> [b, heads, s, hn]
    if pattern.is_uniform:
        out = attend(pattern.heads[0], q, k, v)
    else:
        outputs, order = [], []
        for head in dict.fromkeys(pattern.heads):
            members = [h for h in range(heads) if pattern.heads[h] == head]
            shared = [h // (heads // groups) for h in members]
            outputs.append(attend(head, q[:, members], k[:, shared], v[:, shared]))
            order += members
        out = torch.cat(outputs, dim=1)[:, sorted(range(heads), key=order.__getitem__)]
    return out.permute(2, 0, 1, 3)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, **mask) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1], **mask)


def _fused_topk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: HeadPattern, softmax_scale: float) -> torch.Tensor:
    from rat_megatron.ops.topk_attention.triton import topk_attention as topk_triton

    return topk_triton(q, k, v, head, softmax_scale)


def _fused_attention(q, k, v, head: HeadPattern, softmax_scale: float, cos, sin) -> torch.Tensor:
    from rat_megatron.ops.dilated_attention.triton import dilated_attention as dilated_triton

    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))  # [b, heads, s, hn] -> [s, b, heads, hn]
    return dilated_triton(q, k, v, head, softmax_scale, cos=cos, sin=sin).permute(1, 2, 0, 3)


def _kept_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: HeadPattern, softmax_scale: float) -> torch.Tensor:
    """Attention of a whole sequence without [s, s] scores or mask. q [b, np, s, hn], k and v [b, ng, s, hn]; returns [b, np, s, hn]."""
    kept_at = kept_positions(head, q.shape[2])
    kept_k, kept_v = (x[:, :, kept_at.to(x.device)] for x in (k, v))
    return _attend_in_blocks(q, k, v, kept_k, kept_v, kept_at, head, softmax_scale, start=0)


def kept_positions(head: HeadPattern, length: int) -> torch.Tensor:
    """Positions [n], in order, that the pattern keeps of ``length`` tokens wherever the query is: dilated ones and sinks."""
    return HeadPattern(head.dilation, sinks=head.sinks).kept_positions(length)


def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept_k: torch.Tensor,
    kept_v: torch.Tensor,
    kept_at: torch.Tensor,
    head: HeadPattern,
    softmax_scale: float,
    start: int,
) -> torch.Tensor:
    """Attention of a stretch of a longer sequence, for one positional pattern: what context parallelism runs on each of its chunks.

    q: [s, b, np, hn], the tokens from position ``start`` on. k and v: [h + s, b, ng, hn], the same tokens and the h before them, with
    h >= min(window, start). kept_k and kept_v: [n, b, ng, hn], keys at kept_at [n] (on the CPU, in order), with all of kept_positions()
    before the first of k. Returns [s, b, np, hn].
    """
    if triton_takes(q, k, v):
        from rat_megatron.ops.dilated_attention.triton import segment_attention as segment_triton

        return segment_triton(q, k, v, kept_k, kept_v, head, softmax_scale, start)
    q, k, v, kept_k, kept_v = (x.permute(1, 2, 0, 3) for x in (q, k, v, kept_k, kept_v))
    return _attend_in_blocks(q, k, v, kept_k, kept_v, kept_at, head, softmax_scale, start).permute(2, 0, 1, 3)


def _attend_in_blocks(q, k, v, kept_k, kept_v, kept_at, head: HeadPattern, softmax_scale: float, start: int) -> torch.Tensor:
    """segment_attention with heads in front: q [b, np, s, hn], k and v [b, ng, h + s, hn], kept_k and kept_v [b, ng, n, hn].

    Every block of queries runs one softmax over two sets of keys: the blocks that its window reaches, in full, and before them only
    the dilated and sink keys. The exact mask over this short list of keys decides.
    """
    before = k.shape[2] - q.shape[2]
    at = torch.arange(start - before, start + q.shape[2])
    # Blocks come from one split, so that backward writes every gradient once, not a full-length one for every block.
    sizes = _block_sizes(before)[::-1] + _block_sizes(q.shape[2])
    blocks_k, blocks_v, blocks_at = k.split(sizes, dim=2), v.split(sizes, dim=2), at.split(sizes)
    first = len(_block_sizes(before))  # the block of keys at which the queries begin
    reach = -(-head.window // _BLOCK)

    outputs = []
    for i, q_block in enumerate(q.split(_BLOCK, dim=2), start=first):
        local = slice(max(0, i - reach), i + 1)
        old = int(torch.searchsorted(kept_at, int(blocks_at[local.start][0])))
        keys = torch.cat([kept_k[:, :, :old], *blocks_k[local]], dim=2)
        values = torch.cat([kept_v[:, :, :old], *blocks_v[local]], dim=2)
        mask = head.mask(blocks_at[i][:, None], torch.cat([kept_at[:old], *blocks_at[local]]))
        outputs.append(_sdpa(q_block, keys, values, softmax_scale, attn_mask=mask.to(q.device)))
    return torch.cat(outputs, dim=2)


def _block_sizes(length: int) -> list[int]:
    return [_BLOCK] * (length // _BLOCK) + [length % _BLOCK] * (length % _BLOCK > 0)
