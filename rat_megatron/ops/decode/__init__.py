"""Decoding over a compact key/value cache: its layout, filling it from a prompt, and one step in plain torch.

The cache keeps what a pattern lets later queries see, S + W + 1 + T / D entries instead of T. ops/decode_triton.py takes the same step
in one kernel. Source: RAT+ (arXiv 2602.18196).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rat_megatron.ops.rope import turn
from rat_megatron.ratplus.pattern import HeadPattern


@dataclass
class DecodeCache:
    """What the heads of one pattern in one layer keep between tokens; a layer whose heads differ holds one cache for each pattern.

    k and v [b, ng, capacity, hn]: keys after RoPE and values, in slots for the S sinks, then a ring for the last W + 1 other tokens,
    then every D-th other token. A D-th token is written to the ring and to its own slot at once, and read from its slot once it has
    left the window, so that nothing ever moves. Slots not in use may hold anything. state [2, b, ng, hn]: the recurrence's last
    (k~, v~) before RoPE; it stays fp32, because rounding it at every token would let decoding drift away from prefill.

    How many tokens every row has seen is no part of the cache, since layers share it: ``lengths`` [b], int32 or int64 on the device,
    which the caller increments once per token after the last layer.
    """

    head: HeadPattern
    max_length: int
    k: torch.Tensor
    v: torch.Tensor
    state: torch.Tensor

    @classmethod
    def empty(
        cls,
        head: HeadPattern,
        batch: int,
        groups: int,
        head_dim: int,
        max_length: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> DecodeCache:
        """A cache for rows of up to max_length tokens, ready for the first token. Raises ValueError for top-k patterns."""
        if head.blocks:
            raise ValueError(f"attention pattern '{head}' chooses keys by score, so it needs all of them: it has no compact cache")
        shape = (batch, groups, head.cache_slots(max_length), head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        state = torch.zeros(2, batch, groups, head_dim, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return cls(head, max_length, keys, values, state)

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


@torch.no_grad()
def prefill_cache(cache: DecodeCache, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, positions: torch.Tensor) -> None:
    """Fills the cache from a prompt, in place, whatever it held before.

    k (after RoPE) and v [b, s, ng, hn], any strides, s >= 1: what attention read in prefill. state [2, b, ng, hn]: gated_scan's final
    one. positions [b, s], int64: 0, 1, ... along the real tokens of a row and -1 at padding, which may stand on either side; padding
    must have left the state alone (a gate logit of +inf does that). A row may be all padding. Afterwards ``lengths`` is
    ``positions.amax(1) + 1``. Raises ValueError when shapes do not fit the cache.
    """
    batch, length, groups, head_dim = k.shape
    if k.shape != v.shape or (batch, groups, head_dim) != (*cache.k.shape[:2], cache.k.shape[3]) or positions.shape != k.shape[:2]:
        shapes = [list(x.shape) for x in (k, v, positions, cache.k)]
        raise ValueError(
            "prefill needs k and v [b, s, ng, hn], positions [b, s] and a cache [b, ng, capacity, hn], not {} {} {} {}".format(*shapes)
        )
    if length > cache.max_length:
        raise ValueError(
            f"a prompt of {length} tokens does not fit a cache made for {cache.max_length}: allocate it with a larger max_length"
        )
    cache.state.copy_(state)
    filled = min(cache.capacity, cache.head.cache_slots(length))
    stored = cache.head.slot_positions(filled, positions.amax(dim=1) + 1)
    first = (positions == 0).int().argmax(dim=1, keepdim=True)  # column of a row's first token
    columns = (first + stored).clamp(min=0)  # unused slots take some token or other
    index = columns[:, None, :, None].expand(batch, groups, filled, head_dim)
    for kept, x in ((cache.k, k), (cache.v, v)):
        kept[:, :, :filled] = x.transpose(1, 2).gather(2, index)  # on a GPU faster than indexing by rows and columns


@torch.no_grad()
def decode_step(
    q: torch.Tensor,
    f: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: DecodeCache,
    lengths: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """One token of every row through recurrence, RoPE, cache and attention; updates the cache in place and leaves lengths alone.

    q [b, np, hn] and f (gate logits), k, v [b, ng, hn]: the projections of the row's token at position lengths[b], before RoPE. cos and
    sin [b, hn / 2] of that position. np is a multiple of ng and head h reads group h // (np // ng). Returns [b, np, hn] in the type of
    q. Gate, state, RoPE and softmax are fp32 (float64 for a float64 cache). A row with lengths[b] >= max_length gets no error, for that
    would wait for the device: keys that no longer fit are dropped. Raises ValueError when shapes do not fit together.
    """
    check_step(q, f, k, v, cos, sin, cache, lengths)
    gate, keep = torch.sigmoid(f.to(cache.state.dtype)), torch.sigmoid(-f.to(cache.state.dtype))
    cache.state.copy_(gate * cache.state + keep * torch.stack([k, v]).to(gate.dtype))
    new_k = turn(cache.state[0], cos[:, None], sin[:, None]).to(cache.k.dtype)
    new_v = cache.state[1].to(cache.v.dtype)

    at, slot = lengths[:, None], torch.arange(cache.capacity, device=lengths.device)
    stored = cache.head.slot_positions(cache.capacity, lengths)
    local = at - stored <= cache.head.window
    fixed = torch.where(slot < cache.head.sinks + cache.head.ring_size, local | (slot < cache.head.sinks), ~local)
    seen = ((stored >= 0) & fixed)[:, None, :, None]  # [b, 1, capacity, 1]
    keys, values = (
        torch.cat([kept.where(seen, 0), new[:, :, None]], dim=2).to(gate.dtype) for kept, new in ((cache.k, new_k), (cache.v, new_v))
    )
    queries = turn(q.to(gate.dtype), cos[:, None], sin[:, None]).unflatten(1, (k.shape[1], -1))  # [b, ng, np / ng, hn]
    scores = queries @ keys.mT * softmax_scale
    hidden = torch.nn.functional.pad(~seen.mT, (0, 1))  # the token sees itself
    out = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ values

    written = (cache.head.slot_positions(cache.capacity, lengths + 1) == at)[:, None, :, None]
    cache.k.copy_(torch.where(written, new_k[:, :, None], cache.k))
    cache.v.copy_(torch.where(written, new_v[:, :, None], cache.v))
    return out.flatten(1, 2).to(q.dtype)


def check_step(q, f, k, v, cos, sin, cache: DecodeCache, lengths) -> None:
    """Raises ValueError unless the arguments of decode_step fit together."""
    batch, groups, _, head_dim = cache.k.shape
    if not f.shape == k.shape == v.shape == (batch, groups, head_dim):
        raise ValueError(f"f, k and v must have the cache's shape {[batch, groups, head_dim]}, not {[list(x.shape) for x in (f, k, v)]}")
    if q.dim() != 3 or (q.shape[0], q.shape[2]) != (batch, head_dim) or q.shape[1] % groups:
        raise ValueError(f"q {list(q.shape)} does not fit a cache of {batch} rows, {groups} key heads and head dimension {head_dim}")
    if not cos.shape == sin.shape == (batch, head_dim // 2) or lengths.shape != (batch,):
        shapes = [list(x.shape) for x in (cos, sin, lengths)]
        raise ValueError(f"cos, sin and lengths must be {[batch, head_dim // 2]} twice and {[batch]}, not {shapes}")
