"""One decode step in one Triton kernel: gate, state, RoPE, cache write and attention over the compact cache.

Decoding is bound by reading the cache, so every entry is read once and shared by the query heads of its group; long caches with few
rows are split over programs, whose partial results a second small kernel merges in a fixed order. Source: RAT+ (arXiv 2602.18196).
"""

from __future__ import annotations

import torch
import triton

from rat_megatron.ops.decode.kernels import decode_kernel, merge_kernel
from rat_megatron.ops.dispatch import HEAD_DIMS, processor_count
from rat_megatron.ratplus.head_cache_ratplus import HeadCache

_LOG2_E = 1.4426950408889634
_BLOCK = 32  # entries per step of the loop; small programs with deep pipelines: within 3% of the best tiling for every shape measured
_WARPS, _STAGES = 2, 3
_PROGRAMS_PER_PROCESSOR = 4  # as many of them run at once
_SMALLEST_SHARE = 256  # entries below which a program of its own does not pay


def decode_step(q, f, k, v, cos, sin, cache: HeadCache, lengths: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """For bf16, fp16 and fp32 on a GPU.

    q, f, k, v need unit stride in hn, a multiple of 16 up to 256; the cache must be contiguous and its state fp32. The launch depends
    on shapes alone, so the step can be captured in a CUDA graph: keep the cache and ``lengths`` in place and increment ``lengths`` on
    the device after the last layer. Results do not change between runs. Raises ValueError for other layouts.
    """
    batch, groups, capacity, head_dim = cache.k.shape
    if head_dim not in HEAD_DIMS or any(x.stride(-1) != 1 for x in (q, f, k, v, cos, sin)):
        raise ValueError(f"the decode kernel needs a head dimension that is a multiple of 16 up to 256, not {head_dim}, of unit stride")
    if not all(x.is_contiguous() for x in (cache.k, cache.v, cache.state, lengths)) or cache.state.dtype != torch.float32:
        raise ValueError("the decode kernel needs a contiguous cache, state and lengths, and the state in fp32")

    heads, head, splits = q.shape[1], cache.head, _split_count(batch * groups, capacity, q.device)
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    partial, bounds = out, out  # not used by a single share
    if splits > 1:
        partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        bounds = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=q.device)
    decode_kernel[(batch * groups, splits)](
        q, f, k, v, cos, sin, cache.k, cache.v, cache.state, lengths, out, partial, bounds,
        *(x.stride(i) for x in (q, f, k, v) for i in (0, 1)), cos.stride(0), sin.stride(0),
        softmax_scale * _LOG2_E, batch, groups, capacity,
        ROWS=heads // groups, TILE_ROWS=max(16, triton.next_power_of_2(heads // groups)), HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim), SINKS=head.sinks, WINDOW=head.window, RING=head.ring_size, DILATION=head.dilation or 0,
        SPLITS=splits, BLOCK=_BLOCK, STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(batch * heads,)](
            partial, bounds, out, batch * heads, HEAD_DIM=head_dim, LANES=triton.next_power_of_2(head_dim),
            SPLITS=splits, TILE=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out


def _split_count(programs: int, capacity: int, device: torch.device) -> int:
    """Shares of the entries of one row and key head: enough to fill the GPU once, each worth a program."""
    return max(1, min(_PROGRAMS_PER_PROCESSOR * processor_count(device) // programs, capacity // _SMALLEST_SHARE))
