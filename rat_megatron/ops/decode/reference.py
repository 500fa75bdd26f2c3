"""One decode step in torch, the definition."""

from __future__ import annotations

import torch

from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.rotary_ratplus import apply_rotary


def decode_step(q, f, k, v, cos, sin, cache: HeadCache, lengths: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """Any float type."""
    gate, keep = torch.sigmoid(f.to(cache.state.dtype)), torch.sigmoid(-f.to(cache.state.dtype))
    cache.state.copy_(gate * cache.state + keep * torch.stack([k, v]).to(gate.dtype))
    new_k = apply_rotary(cache.state[0], cos[:, None], sin[:, None]).to(cache.k.dtype)
    new_v = cache.state[1].to(cache.v.dtype)

    slots = cache.k.shape[2]
    at, slot = lengths[:, None], torch.arange(slots, device=lengths.device)
    stored = cache.head.slot_positions(slots, lengths)
    local = at - stored <= cache.head.window
    fixed = torch.where(slot < cache.head.sinks + cache.head.ring_size, local | (slot < cache.head.sinks), ~local)
    seen = ((stored >= 0) & fixed)[:, None, :, None]  # [b, 1, capacity, 1]
    keys, values = (
        torch.cat([kept.where(seen, 0), new[:, :, None]], dim=2).to(gate.dtype) for kept, new in ((cache.k, new_k), (cache.v, new_v))
    )
    queries = apply_rotary(q.to(gate.dtype), cos[:, None], sin[:, None]).unflatten(1, (k.shape[1], -1))  # [b, ng, np / ng, hn]
    scores = queries @ keys.mT * softmax_scale
    hidden = torch.nn.functional.pad(~seen.mT, (0, 1))  # the token sees itself
    out = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ values

    written = (cache.head.slot_positions(slots, lengths + 1) == at)[:, None, :, None]
    cache.k.copy_(torch.where(written, new_k[:, :, None], cache.k))
    cache.v.copy_(torch.where(written, new_v[:, :, None], cache.v))
    return out.flatten(1, 2).to(q.dtype)
