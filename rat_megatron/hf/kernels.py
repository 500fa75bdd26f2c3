"""Lends the model of rat_megatron/ratplus the fused kernels of rat_megatron.ops, on a GPU."""

from __future__ import annotations

import math

import torch

from rat_megatron.ops.decode import decode_step
from rat_megatron.ops.dilated_attention import dilated_attention
from rat_megatron.ops.dispatch import triton_takes
from rat_megatron.ops.gated_scan import gated_scan
from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.pattern import HeadPattern, LayerPattern
from rat_megatron.ratplus.rotary_ratplus import apply_rotary


def can_scan(k: torch.Tensor) -> bool:
    """Whether scan() serves tensors like k."""
    return triton_takes(k)


def scan(f, k, v, rotary, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As attention_ratplus.recur."""
    cos, sin = _shared(rotary)
    k, v, state = gated_scan(*(x.permute(2, 0, 1, 3) for x in (f, k, v)), state, cos, sin)  # [b, ng, t, hn] -> [t, b, ng, hn]
    k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
    return k if cos is not None else apply_rotary(k, *rotary), v, state


def can_attend(q: torch.Tensor, head: HeadPattern) -> bool:
    """Whether attention() serves whole sequences of q under a sparse pattern."""
    return not head.is_dense and triton_takes(q)


def attention(q, k, v, rotary, head: HeadPattern) -> torch.Tensor:
    """q [b, np, t, hn] before RoPE, k (after it) and v [b, ng, t, hn], from position 0 on; top-k blocks by their bounds."""
    cos, sin = _shared(rotary)
    if cos is None:
        q = apply_rotary(q, *rotary)
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    return dilated_attention(q, k, v, LayerPattern((head,)), 1 / math.sqrt(q.shape[-1]), cos=cos, sin=sin).permute(1, 2, 0, 3)


def _shared(rotary) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cosines and sines [t, hn / 2] that serve all rows; None twice where rows have positions of their own, which no kernel takes."""
    cos, sin = rotary
    return (cos[0, 0], sin[0, 0]) if len(cos) == 1 else (None, None)


def can_decode(q: torch.Tensor, cache: HeadCache) -> bool:
    """Whether decode() serves q [b, np, 1, hn] with this cache."""
    return cache.k.shape[2] > 0 and not cache.head.blocks and not torch.is_grad_enabled() and triton_takes(q, cache.k)


def decode(q, f, k, v, rotary, cache: HeadCache, lengths: torch.Tensor) -> torch.Tensor:
    """One token a row, before recurrence and RoPE; updates the cache. Returns attention's output [b, np, 1, hn]."""
    cos, sin = (table[:, 0, 0].expand(len(lengths), -1) for table in rotary)
    return decode_step(*(x[:, :, 0] for x in (q, f, k, v)), cos, sin, cache, lengths, 1 / math.sqrt(q.shape[-1]))[:, :, None]
