"""The compact cache of a RAT+ model: what an attention pattern lets later tokens see, and the recurrent state. Plain torch.

Source: arXiv 2602.18196. Per row and key head a dilated pattern keeps S + W + 1 + T / D entries instead of T; where each token lies,
``HeadPattern.slot_positions`` says. Entries are keys after RoPE and values, so their order does not matter to attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_ratplus import RatPlusConfig
from .past_ratplus import RecentPast
from .pattern import AttentionPattern, HeadPattern
from .rotary_ratplus import apply_rotary, no_autocast, rotary_tables, without_rotation

# What Transformers calls a cache among the arguments and the outputs of a model: "past_key_values" before 5.24, "cache" since.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_CROPS_BY = "tokens_to_remove" in inspect.signature(Cache.crop).parameters  # as Transformers 5 does: there crop(0) removes nothing


class HeadCache:
    """What the heads of one pattern in one layer keep between tokens.

    k and v [b, ng, slots, hn], slots for rows of up to ``max_length`` tokens, which ``grow`` raises; a top-k pattern has whole blocks.
    ``state`` [2, b, ng, hn]: the recurrence's last (k~, v~) before RoPE. It is fp32 at least, whatever the weights are: rounding it at
    every token would let decoding drift away from prefill. ``blocks`` of a top-k pattern: what its blocks are scored by, the elementwise
    bounds [2, b, ng, blocks + 1, hn] of their keys (scores "bounds", the maxima first) or their sums in fp32 [1, ...] ("means"); the
    last one takes padding. ``past``: notes with which the last tokens can be undone, None where nobody will ask for it.
    """

    def __init__(self, head: HeadPattern, k: torch.Tensor, max_length: int, scores: str):
        """An empty cache for rows and key heads like those of k [b, ng, t, hn]."""
        self.head, self.scores, self.max_length, self.past = head, scores, 0, None
        wide = torch.promote_types(k.dtype, torch.float32)
        self.k, self.v = (k.new_zeros(*k.shape[:2], 0, k.shape[3]) for _ in range(2))
        self.state = k.new_zeros(2, *k.shape[:2], k.shape[3], dtype=wide)
        self.blocks: torch.Tensor | None = None
        if head.blocks:
            self.blocks = self._unscored(k, 1, wide)
        self.grow(max_length)

    def _unscored(self, like: torch.Tensor, count: int, wide: torch.dtype) -> torch.Tensor:
        shape = (*like.shape[:2], count, like.shape[3])
        if self.scores == "means":
            return like.new_zeros(1, *shape, dtype=wide)
        largest = torch.finfo(like.dtype).max
        return torch.stack([like.new_full(shape, -largest), like.new_full(shape, largest)])

    @property
    def tensors(self) -> dict[str, int]:
        """Names of the tensors, with the axis along which each has its rows."""
        return {"k": 0, "v": 0, "state": 1} | ({"blocks": 1} if self.blocks is not None else {})

    def grow(self, max_length: int) -> None:
        """Makes room for rows of up to max_length tokens; a smaller number changes nothing."""
        if max_length <= self.max_length:
            return
        if self.head.blocks:
            max_length = -(-max_length // self.head.dilation) * self.head.dilation
            more = max_length // self.head.dilation + 1 - self.blocks.shape[3]
            self.blocks = torch.cat([self.blocks[:, :, :, :-1], self._unscored(self.k, more + 1, self.state.dtype)], dim=3)
        self.max_length = max_length
        more = self.head.cache_slots(max_length) - self.k.shape[2]
        self.k, self.v = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))

    def in_use(self, length: int) -> int:
        """Slots that rows of up to ``length`` tokens can fill: the first so many. In a compiled model all, whose number never changes."""
        return self.k.shape[2] if torch.compiler.is_compiling() else min(self.k.shape[2], self.head.cache_slots(length))

    @torch.no_grad()
    def write(self, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor, counts: torch.Tensor, length: int) -> None:
        """Stores the first counts [b] tokens of k, v [b, ng, t, hn], which follow the ``before`` [b] tokens of each row.

        length: of the longest row then, or more.
        """
        slots = self.in_use(length)
        source = self.head.slot_positions(slots, before + counts) - before[:, None]  # [b, slots]
        new = (source >= 0)[:, None, :, None]
        source = source.clamp(0, k.shape[2] - 1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        for stored, x in ((self.k, k), (self.v, v)):
            stored[:, :, :slots] = torch.where(new, x.gather(2, source), stored[:, :, :slots])
        if self.blocks is not None:
            column = torch.arange(k.shape[2], device=k.device)
            self._note_blocks(k, before[:, None] + column, column < counts[:, None])

    @torch.no_grad()
    def write_token(self, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor, real: torch.Tensor | None) -> None:
        """Stores one token a row, k and v [b, ng, 1, hn] at position [b], where real [b, 1] (all when None)."""
        head, row = self.head, torch.arange(len(position), device=position.device)
        dilation = 1 if head.blocks else head.dilation
        behind_sinks = position - head.sinks
        places = []  # slot [b], and whether the token goes there
        if head.sinks or head.ring_size:
            ring = head.sinks + behind_sinks % max(head.ring_size, 1)
            places.append((torch.where(behind_sinks < 0, position, ring), (behind_sinks < 0) | (head.ring_size > 0)))
        if dilation:
            slot = head.sinks + head.ring_size + (position + 1) // dilation - 1 - head.sinks // dilation
            places.append((slot, (behind_sinks >= 0) & ((position + 1) % dilation == 0)))
        for slot, wanted in places if self.k.shape[2] else ():
            wanted = wanted & (slot < self.k.shape[2]) if real is None else wanted & (slot < self.k.shape[2]) & real[:, 0]
            slot = torch.where(wanted, slot, 0)
            for stored, x in ((self.k, k), (self.v, v)):
                stored[row, :, slot] = torch.where(wanted[:, None, None], x[:, :, 0], stored[row, :, slot])
        if self.blocks is not None:
            self._note_blocks(k, position[:, None], torch.ones_like(position[:, None], dtype=torch.bool) if real is None else real)

    def _note_blocks(self, k: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> None:
        """Takes keys [b, ng, t, hn] at positions [b, t] into the scores of their blocks."""
        spare = self.blocks.shape[3] - 1
        block = torch.where(real, positions // self.head.dilation, spare).clamp(max=spare)[:, None, :, None].expand_as(k)
        if self.scores == "means":
            self.blocks[0].scatter_add_(2, block, k.to(self.blocks.dtype))
        else:
            self.blocks[0].scatter_reduce_(2, block, k, "amax")
            self.blocks[1].scatter_reduce_(2, block, k, "amin")

    def in_order(self, k: torch.Tensor, v: torch.Tensor, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [b, ng, s, hn] by position: what is kept of the tokens before, zeros elsewhere, and k, v [b, ng, t, hn]."""
        length, slots = tokens.columns + k.shape[2], self.in_use(tokens.columns)
        stored = self.head.slot_positions(slots, tokens.before)
        position = torch.cat([torch.where(stored < 0, length, stored), tokens.positions], dim=1)
        index = position[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        k, v = (torch.cat([kept[:, :, :slots], x], dim=2) for kept, x in ((self.k, k), (self.v, v)))
        return tuple(x.new_zeros(*x.shape[:2], length + 1, x.shape[3]).scatter(2, index, x)[:, :, :length] for x in (k, v))

    def visible(self, slots: int, lengths: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Whether queries at positions [b, t] see the tokens in the first slots: [b, 1, t, slots], for rows of lengths [b] tokens.

        Not for a top-k pattern's choice: all tokens up to the query count here.
        """
        head, slot = self.head, torch.arange(slots, device=lengths.device)
        stored, queries = self.head.slot_positions(slots, lengths)[:, None, None], queries[:, None, :, None]
        seen = (stored >= 0) & (stored <= queries)
        if head.ring_size:
            recent = queries - stored <= head.window
            if head.dilation:
                recent &= (stored + 1) % head.dilation != 0  # that one is read from its own slot
            seen &= recent | (slot < head.sinks) | (slot >= head.sinks + head.ring_size)
        return seen

    def check_crop(self, before: torch.Tensor, lengths: torch.Tensor, recurrent: bool) -> None:
        """Raises ValueError unless rows of ``before`` [b] tokens can be cut to ``lengths`` [b]: what those need must still be here."""
        if self._can_undo(before - lengths):
            return
        head, ring = self.head, self.head.ring_size
        oldest = torch.maximum(lengths - head.window, torch.full_like(lengths, head.sinks))
        if ring and (oldest < torch.minimum(lengths, before - ring)).any():
            raise ValueError(f"pattern '{head}' has let go of tokens that the shorter sequence needs: its window has moved past them")
        if recurrent and not (self._holds_last(before, lengths).any(dim=1) | (lengths == 0) | (lengths == before)).all():
            kept = f", such as a multiple of {head.dilation}" if head.dilation else ""
            raise ValueError(f"pattern '{head}' has let go of the token whose recurrent state is needed: crop behind one it keeps{kept}")

    def crop(
        self, before: torch.Tensor, lengths: torch.Tensor, tables: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Cuts rows of ``before`` [b] tokens to ``lengths`` [b]. Without notes on the tokens in between, the state comes from the last
        remaining one's entry, in its precision; ``tables`` gives this layer's cosines and sines of positions [b, t]."""
        if self._can_undo(before - lengths):
            self.past.undo(self, before, lengths)
        else:
            self._state_from_entry(before, lengths, tables)
            self.past = None if self.past is None else RecentPast(self, self.past.wanted)
        if self.blocks is not None:
            self._shorten_blocks(lengths)

    def _can_undo(self, removed: torch.Tensor) -> bool:
        return self.past is not None and self.past.covers(removed)

    def _state_from_entry(self, before: torch.Tensor, lengths: torch.Tensor, tables: Callable) -> None:
        share = self._holds_last(before, lengths).to(self.state.dtype)
        share = (share / share.sum(dim=1, keepdim=True).clamp(min=1))[:, None, :, None]
        k, v = ((share * x).sum(dim=2, keepdim=True) for x in (self.k, self.v))  # [b, ng, 1, hn], zero where no token is left
        cos, sin = tables((lengths - 1)[:, None])
        square = cos.square() + sin.square()  # 1, but for YaRN's factor
        state = torch.stack([apply_rotary(k, cos / square, -sin / square), v])[:, :, :, 0]
        self.state = torch.where((lengths < before)[:, None, None], state, self.state)

    def _shorten_blocks(self, lengths: torch.Tensor) -> None:
        """Takes tokens behind lengths [b] out of the scores: later blocks start anew, the one that is cut is scored again."""
        size, count = self.head.dilation, self.blocks.shape[3]
        later = torch.arange(count, device=lengths.device) >= (lengths // size)[:, None]  # [b, count]
        self.blocks = torch.where(later[None, :, None, :, None], self._unscored(self.k, count, self.state.dtype), self.blocks)
        positions = (lengths // size * size)[:, None] + torch.arange(size, device=lengths.device)
        index = positions.clamp(max=self.k.shape[2] - 1)[:, None, :, None].expand(-1, self.k.shape[1], -1, self.k.shape[3])
        self._note_blocks(self.k.gather(2, index), positions, positions < lengths[:, None])

    def _holds_last(self, before: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Which slots [b, slots] of rows of ``before`` [b] tokens hold the token before position lengths [b]: one, two alike, or none."""
        stored = self.head.slot_positions(self.k.shape[2], before)
        return (stored >= 0) & (stored == lengths[:, None] - 1)


class RatPlusCacheLayer:
    """One layer: a HeadCache for each pattern among its heads, made when the layer first runs."""

    is_compileable = is_sliding = False  # what Transformers asks every layer
    record_past = False  # Transformers ends RatPlusCache.activate_past_recording here

    def __init__(self):
        self.heads: list[HeadCache] = []


class RatPlusCache(Cache):
    """The cache of a whole model, for one attention pattern: ``layers``, and ``lengths`` [b], how many tokens every row has seen.

    Rows have lengths of their own: padding takes no place. ``max_length`` tokens (prompt and answer) get room at once; without it, or
    past it, the cache grows as needed. To try several continuations, copy it (``copy.deepcopy``): it is small.
    """

    def __init__(self, max_length: int | None = None):
        super().__init__(layers=[])
        self.max_length = max_length or 0
        self.recording, self.wanted = False, 0
        self.word: str | None = None  # the pattern of a generate() call with candidates, which an assistant does not share
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens, and the pattern."""
        self.layers: list[Any] = []
        self.columns = 0  # tokens given so far, padding included
        self.lengths: torch.Tensor | None = None
        self.pattern: AttentionPattern | None = None
        self.mask: torch.Tensor | None = None  # the attention mask so far

    def begin(self, x: torch.Tensor, pattern: AttentionPattern, config: RatPlusConfig) -> None:
        """Makes ready for the tokens x [b, t, h]; raises ValueError when the cache belongs to another pattern or batch."""
        if self.lengths is None:
            self.layers = [RatPlusCacheLayer() for _ in range(config.num_hidden_layers)]
            self.record_past(self.recording)
            self.lengths, self.pattern = torch.zeros(x.shape[0], dtype=torch.long, device=x.device), pattern
            self.config = config
        if self.pattern != pattern:
            raise ValueError(
                f"the cache holds what attention pattern '{self.pattern}' needs, but this call attends under '{pattern}': start a new one"
            )
        if len(self.lengths) != x.shape[0]:
            raise ValueError(f"the cache has {len(self.lengths)} rows, but the batch has {x.shape[0]}")
        needed = self.columns + x.shape[1]
        if needed > self.max_length:
            self.max_length = needed if not self.columns else max(needed, self.max_length + self.max_length // 8 + 16)

    def heads(self, layer: int, heads: list[HeadPattern], keys: list[torch.Tensor], scores: str) -> list[HeadCache]:
        """A layer's caches, with room for this step. keys: one k [b, ng, t, hn] for each pattern among its heads."""
        caches = self.layers[layer].heads
        if not caches:
            caches.extend(HeadCache(head, k, self.max_length, scores) for head, k in zip(heads, keys, strict=True))
        for cache in caches:
            cache.grow(self.max_length)
            if not self.layers[layer].record_past:
                cache.past = None
            elif cache.past is None:
                cache.past = RecentPast(cache, self.wanted)
        return caches

    def end(self, columns: int, counts: torch.Tensor | int, mask: torch.Tensor | None) -> None:
        """Counts tokens once all layers have them: columns in all, counts [b] of them real, under this attention mask (None: all real)."""
        self.lengths += counts
        self.columns += columns
        if mask is None and self.mask is not None:  # the padding of earlier calls is still there
            mask = torch.nn.functional.pad(self.mask, (0, columns), value=1)
        self.mask = mask

    def activate_past_recording(self) -> None:
        """From now on the cache can go back, exactly and under every pattern, to any length since its last crop and 32 tokens before.

        Of a prompt it can give up the last 32 tokens, or as many as its call wanted logits of (an integer ``logits_to_keep``). For decoding
        with candidates; generate() calls this itself. It costs one state, and one entry of a window, for every token that can be undone.
        """
        self.record_past(True)

    def record_past(self, on: bool) -> None:
        """Begins to keep, or lets go of, what undoing the last tokens takes."""
        self.recording = on
        for layer in self.layers:
            layer.record_past = on

    def crop(self, max_length: int) -> None:
        """Cuts the sequences to max_length columns, or by -max_length; 0 means what it means to the installed Transformers' own caches:
        all of them before 5, none since. Back to where ``activate_past_recording`` reaches this is exact; elsewhere the state comes from
        an entry, and HeadCache.check_crop says when that cannot be."""
        columns = max(0, self.columns + max_length) if max_length < 0 or (max_length == 0 and _CROPS_BY) else max_length
        if self.lengths is None:
            return
        columns = min(columns, self.columns)
        if columns == self.columns and not self.recording:
            return
        cut = self.columns - columns if self.mask is None else (self.mask[:, columns:] != 0).sum(dim=1).to(self.lengths.device)
        lengths = self.lengths - cut
        caches = [(index, cache) for index, layer in enumerate(self.layers) for cache in layer.heads]
        for _, cache in caches:
            cache.check_crop(self.lengths.to(cache.k.device), lengths.to(cache.k.device), self.config.use_recurrence)
        for layer, cache in caches:
            with torch.no_grad(), no_autocast(cache.k.device):
                cache.crop(self.lengths.to(cache.k.device), lengths.to(cache.k.device), partial(self._tables, layer, cache.k.dtype))
        self.columns, self.lengths = columns, lengths
        self.mask = None if self.mask is None else self.mask[:, :columns]

    def _tables(self, layer: int, dtype: torch.dtype, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tables = rotary_tables(positions, self.config, dtype)
        return without_rotation(tables) if layer in self.config.layers_without_rope else tables

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take(lambda x, axis: x.index_select(axis, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(lambda x, axis: x.repeat_interleave(repeats, dim=axis))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._take(lambda x, axis: x.index_select(axis, rows.to(x.device)))

    def _take(self, rows) -> None:
        """Puts rows(tensor, its axis of rows) in the place of every tensor."""
        for holder in self._holders():
            for name, axis in holder.tensors.items():
                setattr(holder, name, rows(getattr(holder, name), axis))
        if self.lengths is not None:
            self.lengths = rows(self.lengths, 0)
        if self.mask is not None:
            self.mask = rows(self.mask, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, recurrent states, block scores, and notes on tokens that can be undone."""
        return sum(getattr(holder, name).nbytes for holder in self._holders() for name in holder.tensors)

    def _holders(self) -> list[HeadCache | RecentPast]:
        """All that holds tensors."""
        caches = [cache for layer in self.layers for cache in layer.heads]
        return [*caches, *(cache.past for cache in caches if cache.past is not None)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens given so far, padding included."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the cache grows."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """Whether crop() leaves no trace, once ``activate_past_recording`` was called: Transformers 5 asks."""
        return True

    @property
    def max_batch_size(self) -> int:
        return 0 if self.lengths is None else len(self.lengths)

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None
