"""What happens between a RAT+ layer's projections: recurrence, RoPE, attention under a pattern, with or without a cache. Plain torch.

Source: arXiv 2602.18196; top-k blocks as in Quest (arXiv 2406.10774) and MoBA (arXiv 2502.13189). Cost and memory follow the keys seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .head_cache_ratplus import HeadCache
from .pattern import HeadPattern, LayerPattern
from .rotary_ratplus import apply_rotary, wide

# `import rat_megatron.hf` puts fused kernels here. A model loaded with trust_remote_code runs without.
kernels = None

_QUERIES = 256  # that attend at a time where a mask is needed; they share the keys kept of the tokens before them


@dataclass
class Tokens:
    """The tokens of one forward pass. Every row has its real tokens first, then padding, whose results nobody reads.

    before [b]: tokens that the cache has seen of a row. counts [b]: real ones now. real [b, t]: which are, None when all are.
    columns: the tokens given before, padding included, so an upper bound of ``before`` without asking the device.
    """

    before: torch.Tensor
    counts: torch.Tensor
    real: torch.Tensor | None
    columns: int
    length: int

    @property
    def positions(self) -> torch.Tensor:
        """[b, t]; padding goes on counting."""
        return self.before[:, None] + torch.arange(self.length, device=self.before.device)

    def to(self, device: torch.device) -> Tokens:
        real = None if self.real is None else self.real.to(device)
        return Tokens(self.before.to(device), self.counts.to(device), real, self.columns, self.length)

    def piece(self, start: int, length: int) -> Tokens:
        """The tokens from column start on, up to length of them."""
        real = None if self.real is None else self.real[:, start : start + length]
        earlier = self.counts.clamp(max=start)
        counts = (self.counts - start).clamp(0, length)
        return Tokens(self.before + earlier, counts, real, self.columns + start, min(length, self.length - start))


@dataclass
class HeadSet:
    """The query heads of a layer that share a pattern, and the key heads they read, head h of n the key head h // (n // groups).

    Indices are slices where they can be. Key heads that serve unequal numbers of query heads are repeated for each.
    """

    head: HeadPattern
    queries: slice | list[int]
    groups: slice | list[int]


def head_sets(pattern: LayerPattern, num_heads: int, num_groups: int) -> list[HeadSet]:
    """The layer's heads by pattern, in the order in which the patterns first appear."""
    if pattern.is_uniform:
        return [HeadSet(pattern.heads[0], slice(None), slice(None))]
    sets = []
    for head in dict.fromkeys(pattern.heads):
        queries = [h for h in range(num_heads) if pattern.heads[h] == head]
        groups = [h // (num_heads // num_groups) for h in queries]
        distinct = list(dict.fromkeys(groups))
        if len({groups.count(group) for group in distinct}) == 1:
            groups = distinct
        sets.append(HeadSet(head, _span(queries), _span(groups)))
    return sets


def _span(indices: list[int]) -> slice | list[int]:
    run = slice(indices[0], indices[-1] + 1)
    return run if indices == list(range(run.start, run.stop)) else indices


def attend(q, f, k, v, rotary, head: HeadPattern, tokens: Tokens, cache, scores: str, weights: list | None = None) -> torch.Tensor:
    """The heads of one pattern, from projections to attention's output [b, np, t, hn]; updates their HeadCache, if there is one.

    q [b, np, t, hn]; k, v and the gate logits f (None in the plain-attention baseline) [b, ng, t, hn]. rotary: cosines and sines
    [b or 1, 1, t, hn / 2]. scores: what top-k patterns choose blocks by, "bounds" or "means". To ``weights``, if it is a list, are
    added the attention weights [b, np, t, s], columns by position; only then they are formed.
    """
    head, scores = head.of_prompt, head.scores or scores
    if f is not None and tokens.real is not None:
        f = f.masked_fill(~tokens.real[:, None, :, None], torch.inf)  # padding leaves the state as it is
    past, fused = None if cache is None else cache.past, weights is None and kernels is not None
    if fused and f is not None and cache is not None and q.shape[2] == 1 and not cache.reading and kernels.can_decode(q, cache):
        if past is not None:
            past.note(cache, cache.state[:, :, :, None], k, v, tokens)  # of k and v a single token's notes need the shape only
        return kernels.decode(q, f, k, v, rotary, cache, cache.counted(tokens.before))
    states = None if cache is None else cache.state.clone()[:, :, :, None]
    if f is None:
        k = apply_rotary(k, *rotary)
    elif past is None:
        k, v, state = recur(f, k, v, rotary, None if cache is None else states[:, :, :, 0])
    else:
        k, v, state, states = _recur_stepwise(f, k, v, rotary, states[:, :, :, 0], past.columns(tokens))
    if past is not None:
        past.note(cache, states if f is not None else states.expand(-1, -1, -1, past.columns(tokens), -1), k, v, tokens)
    if f is not None and cache is not None:
        cache.state.copy_(state.detach())
    out = _attend(q, k, v, rotary, head, tokens, cache, scores, weights)
    if cache is not None and cache.reading:
        cache.observe(apply_rotary(q, *rotary), tokens)
    return out


def _attend(q, k, v, rotary, head: HeadPattern, tokens: Tokens, cache, scores: str, weights: list | None) -> torch.Tensor:
    """As attend, behind the recurrence: k (after RoPE) and v [b, ng, t, hn]; q before RoPE."""
    if weights is not None:
        out, formed = _attend_eagerly(apply_rotary(q, *rotary), k, v, head, tokens, cache, scores)
        weights.append(formed)
        return out
    if cache is None:
        return _attend_alone(q, k, v, rotary, head, tokens, scores)
    whole = head.is_dense or torch.is_grad_enabled() or (kernels is not None and kernels.can_attend(q, head))
    if tokens.columns == 0 and whole:  # what goes through the cache has no gradients
        cache.write(k, v, tokens.before, tokens.counts, q.shape[2])
        return _attend_alone(q, k, v, rotary, head, tokens, scores)
    q = apply_rotary(q, *rotary)
    if head.blocks:
        return _attend_top_k(q, k, v, tokens, cache)
    if q.shape[2] == 1 or head.is_dense:
        return _attend_stored(q, k, v, tokens, cache)
    return _attend_in_pieces(q, k, v, tokens, cache)


def recur(f, k, v, rotary, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recurrence, then RoPE of the keys: k~ and v~ [b, ng, t, hn] in the dtypes of k and v, and the state after the last token.

    The state is [2, b, ng, hn] in fp32 (float64), from before RoPE, as the one given is.
    """
    if kernels is not None and kernels.can_scan(k):
        return kernels.scan(f, k, v, rotary, state)
    smoothed = _smooth(f, k, v, state)
    return apply_rotary(smoothed[0].to(k.dtype), *rotary), smoothed[1].to(v.dtype), smoothed[..., -1, :]


def _smooth(f, k, v, state: torch.Tensor | None) -> torch.Tensor:
    """k and v after the recurrence, before RoPE, in fp32 (float64): [2, b, ng, t, hn]."""
    logits = wide(f)
    gate, keep = torch.sigmoid(logits), torch.sigmoid(-logits)  # 1 - gate would lose its digits where the gate is near 1
    return gated_scan(gate, keep * wide(torch.stack([k, v])), None if state is None else state[:, :, :, None])


def _recur_stepwise(f, k, v, rotary, state: torch.Tensor, last: int) -> tuple[torch.Tensor, ...]:
    """As recur, and the states [2, b, ng, last, hn] before each of the last tokens, which no kernel gives."""
    cut = k.shape[2] - last
    parts = []
    if cut:
        early_k, early_v, state = recur(f[:, :, :cut], k[:, :, :cut], v[:, :, :cut], [table[:, :, :cut] for table in rotary], state)
        parts.append((early_k, early_v))
    smoothed = _smooth(f[:, :, cut:], k[:, :, cut:], v[:, :, cut:], state)
    states = torch.cat([state[:, :, :, None], smoothed[:, :, :, :-1]], dim=3).detach()
    parts.append((apply_rotary(smoothed[0].to(k.dtype), *(table[:, :, cut:] for table in rotary)), smoothed[1].to(v.dtype)))
    k, v = (torch.cat(both, dim=2) for both in zip(*parts, strict=True))
    return k, v, smoothed[..., -1, :], states


def gated_scan(gate: torch.Tensor, update: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
    """h_t = g_t * h_{t-1} + u_t along the second last dimension; in RAT+, u_t = (1 - g_t) * x_t.

    gate [b, np, t, hn], update [..., b, np, t, hn] and the state before the first token [..., b, np, 1, hn] (zeros when None), all in
    the dtype to compute in; returns h, shaped like update.
    """
    if state is not None:
        update = torch.cat([update[..., :1, :] + gate[..., :1, :] * state, update[..., 1:, :]], dim=-2)
    return _scan(gate, update)


def _scan(gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """h_t = g_t * h_{t-1} + u_t: joins neighbours in pairs, solves for the second of each, fills in the first. O(t) work, log2(t) deep."""
    length = update.shape[-2]
    if length == 1:
        return update
    pairs = length // 2
    first_gate, second_gate = gate[..., 0::2, :], gate[..., 1::2, :]
    first, second = update[..., 0::2, :], update[..., 1::2, :]
    out = torch.empty_like(update)
    out[..., 1::2, :] = solved = _scan(second_gate * first_gate[..., :pairs, :], second + second_gate * first[..., :pairs, :])
    out[..., 0, :] = update[..., 0, :]
    out[..., 2::2, :] = first[..., 1:, :] + first_gate[..., 1:, :] * solved[..., : first.shape[-2] - 1, :]
    return out


def _softmax_attention(q, k, v, mask: torch.Tensor | None = None, is_causal: bool = False, scale: float | None = None) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)


def _attend_eagerly(q, k, v, head: HeadPattern, tokens: Tokens, cache, scores: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's output [b, np, t, hn] with its weights [b, np, t, s], of whole sequences or after a cache, whose tokens come first."""
    at, summary, held = torch.arange(tokens.columns + q.shape[2], device=q.device), None, None
    if cache is not None:
        held = cache.held(len(at))
        own = k, v
        k, v = cache.in_order(k, v, tokens)
        cache.write(*own, tokens.before, tokens.counts, len(at))
        summary = cache.blocks
    elif head.blocks:
        summary = block_summary(k, head.dilation, scores)
    seen = (
        _seen_in_blocks(q, summary, tokens.positions, at, head, scores)
        if head.blocks
        else head.mask(tokens.positions[:, None, :, None], at)
    )
    if held is not None:
        seen = seen & held.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, :, None]
    k, v = (wide(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = (wide(q) @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ v).to(q.dtype), weights.to(q.dtype)


def _attend_alone(q, k, v, rotary, head: HeadPattern, tokens: Tokens, scores: str) -> torch.Tensor:
    """Whole sequences, without a cache: q [b, np, t, hn] before RoPE, k (after it) and v [b, ng, t, hn]."""
    if kernels is not None and scores == "bounds" and kernels.can_attend(q, head):
        return kernels.attention(q, k, v, rotary, head)
    q = apply_rotary(q, *rotary)
    if head.is_dense:
        return _softmax_attention(q, k, v, is_causal=True)
    if not head.blocks and not torch.is_grad_enabled():
        return _attend_in_pieces(q, k, v, tokens, HeadCache(head, k, k.shape[2], scores))
    at = torch.arange(q.shape[2], device=q.device)
    if not head.blocks:
        return _softmax_attention(q, k, v, head.mask(at[:, None], at))
    return attend_to_blocks(q, k, v, block_summary(k, head.dilation, scores), at[None], head, scores)


def _attend_in_pieces(q, k, v, tokens: Tokens, cache) -> torch.Tensor:
    """A dilated pattern piece by piece: every piece sees what the cache kept of those before it, and itself."""
    outputs = []
    for start in range(0, q.shape[2], _QUERIES):
        now = tokens.piece(start, _QUERIES)
        piece_q, piece_k, piece_v = (x[:, :, start : start + _QUERIES] for x in (q, k, v))
        slots = cache.in_use(now.columns)
        positions = now.positions
        within = cache.head.mask(positions[:, :, None], positions[:, None])[:, None]  # [b, 1, t, t]
        mask = torch.cat([cache.visible(slots, now.before, positions), within], dim=-1)
        keys, values = torch.cat([cache.k[:, :, :slots], piece_k], dim=2), torch.cat([cache.v[:, :, :slots], piece_v], dim=2)
        outputs.append(_softmax_attention(piece_q, keys, values, mask))
        cache.write(piece_k, piece_v, now.before, now.counts, now.columns + now.length)
    return torch.cat(outputs, dim=2)


def _attend_stored(q, k, v, tokens: Tokens, cache) -> torch.Tensor:
    """Stores the tokens, then attends to what is stored: one token a row, or any number under the dense pattern, which keeps all."""
    after = tokens.before + tokens.counts
    total = tokens.columns + tokens.length
    if tokens.length == 1:
        cache.write_token(k, v, tokens.before, tokens.real)
    else:
        cache.write(k, v, tokens.before, tokens.counts, total)
    slots = cache.in_use(total)
    keys, values = cache.k[:, :, :slots], cache.v[:, :, :slots]
    mask = cache.visible(slots, after, tokens.positions)
    if not cache.head.is_dense and not cache.head.ring_size:  # the token may have no place in the cache, but sees itself
        own = (cache.head.slot_positions(slots, after) != tokens.positions).all(dim=1)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        mask = torch.cat([mask, own[:, None, None, None]], dim=-1)
    if tokens.real is not None:
        mask = mask | ~tokens.real[:, None, :, None]  # a row without keys would give NaN
    outputs = [
        _softmax_attention(queries, keys, values, seen)
        for queries, seen in zip(q.split(_QUERIES, dim=2), mask.split(_QUERIES, dim=2), strict=True)
    ]
    return torch.cat(outputs, dim=2)


def _attend_top_k(q, k, v, tokens: Tokens, cache) -> torch.Tensor:
    """Stores the tokens, then attends to the blocks that each query chooses; a single query a row reads only those."""
    if tokens.length == 1:
        cache.write_token(k, v, tokens.before, tokens.real)
        return _attend_one_to_blocks(q, tokens, cache)
    total = tokens.columns + tokens.length
    cache.write(k, v, tokens.before, tokens.counts, total)
    slots = cache.in_use(total)
    return attend_to_blocks(q, cache.k[:, :, :slots], cache.v[:, :, :slots], cache.blocks, tokens.positions, cache.head, cache.scores)


def _attend_one_to_blocks(q, tokens: Tokens, cache) -> torch.Tensor:
    (batch, heads), size = q.shape[:2], cache.head.dilation
    chosen = choose_blocks(q, cache.blocks, tokens.positions, cache.head, cache.scores)[:, :, 0, :-1]  # [b, np, blocks]
    count = min(cache.head.blocks, chosen.shape[-1])
    wanted, block = chosen.int().topk(count, dim=-1)  # [b, np, count]
    token = (block[..., None] * size + torch.arange(size, device=q.device)).flatten(2)  # [b, np, count * size]
    seen = wanted.bool().repeat_interleave(size, dim=-1) & (token <= tokens.before[:, None, None])
    group = torch.arange(heads, device=q.device)[:, None] // (heads // cache.k.shape[1])
    row = torch.arange(batch, device=q.device)[:, None, None]
    keys, values = cache.k[row, group, token], cache.v[row, group, token]
    if cache.head.dilate_rest:
        rest_k, rest_v = (x[:, :, size - 1 :: size].repeat_interleave(heads // x.shape[1], dim=1) for x in (cache.k, cache.v))
        last = torch.arange(chosen.shape[-1], device=q.device) * size + size - 1
        keys, values = torch.cat([keys, rest_k], dim=2), torch.cat([values, rest_v], dim=2)
        seen = torch.cat([seen, ~chosen & (last <= tokens.before[:, None, None])], dim=-1)
    if tokens.real is not None:
        seen = seen | ~tokens.real[:, None]
    return _softmax_attention(q, keys, values, seen[:, :, None])


def attend_to_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary: torch.Tensor,
    positions: torch.Tensor,
    head: HeadPattern,
    scores: str,
    scale: float | None = None,
) -> torch.Tensor:
    """Top-k attention of queries [b, np, t, hn] at positions [b or 1, t] over k, v [b, ng, s, hn] at 0, 1, ..., whose blocks' summary is
    given as HeadCache.blocks. ``scale``: of the products, 1 / sqrt(hn) when absent."""
    at, outputs = torch.arange(k.shape[2], device=q.device), []
    for queries, places in zip(q.split(_QUERIES, dim=2), positions.split(_QUERIES, dim=1), strict=True):
        seen = _seen_in_blocks(queries, summary, places, at, head, scores)
        outputs.append(_softmax_attention(queries, k, v, seen, scale=scale))
    return torch.cat(outputs, dim=2)


@torch.no_grad()
def _seen_in_blocks(q, summary, positions: torch.Tensor, at: torch.Tensor, head: HeadPattern, scores: str) -> torch.Tensor:
    """Which keys at positions ``at`` [s] the queries see: [b, np, t, s]; other arguments as attend_to_blocks."""
    seen = choose_blocks(q, summary, positions, head, scores)[..., at // head.dilation]
    if head.dilate_rest:
        seen = seen | ((at + 1) % head.dilation == 0)
    return seen & (at <= positions[:, None, :, None])


@torch.no_grad()
def block_summary(k: torch.Tensor, size: int, scores: str) -> torch.Tensor:
    """What complete blocks of k [b, ng, t, hn] are scored by, as HeadCache.blocks: [2 or 1, b, ng, blocks + 1, hn]."""
    blocks = F.pad(k, (0, 0, 0, -k.shape[2] % size + size)).unflatten(2, (-1, size))
    return wide(blocks).sum(3)[None] if scores == "means" else torch.stack([blocks.amax(3), blocks.amin(3)])


@torch.no_grad()
def choose_blocks(q: torch.Tensor, summary: torch.Tensor, positions: torch.Tensor, head: HeadPattern, scores: str) -> torch.Tensor:
    """Which blocks queries q [b, np, t, hn] at positions [b or 1, t] see: [b, np, t, blocks + 1], the last for padding and never seen.

    Scores are Quest's with "bounds", a block's bound on q . k: the sum over channels d of max(q_d * kmax_d, q_d * kmin_d); and MoBA's with
    "means", q . the mean key. Only blocks that ended before the query's own are scored. The query's own block and the first are always
    among the K (K = 1 is the own block alone), the rest are the best scored. Query heads choose each for themselves.
    """
    count = summary.shape[3] - 1
    block, own = torch.arange(count + 1, device=q.device), (positions // head.dilation)[:, None, :, None]
    chosen = (block == own) | ((block == 0) & (head.blocks > 1))  # [b, 1, t, count + 1]
    best = min(head.blocks - 2, count)
    if best > 0:
        queries = wide(q).unflatten(1, (summary.shape[2], -1))  # [b, ng, np / ng, t, hn]
        summary = wide(summary)[:, :, :, None].mT
        if scores == "means":
            scored = queries @ summary[0] / head.dilation
        else:
            scored = queries.clamp(min=0) @ summary[0] + queries.clamp(max=0) @ summary[1]
        candidate = (block > 0) & (block < own)
        scored = scored.flatten(1, 2).masked_fill(~candidate, -torch.inf)
        top = torch.zeros_like(scored, dtype=torch.bool).scatter(-1, scored.topk(best, dim=-1).indices, True)
        chosen = chosen | (top & candidate)
    return (chosen & (block < count)).expand(*q.shape[:3], -1)
