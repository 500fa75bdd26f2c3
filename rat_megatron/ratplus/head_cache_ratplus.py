"""What one layer's heads of one pattern keep between tokens: keys, values, the recurrent state. Plain torch.

Source: arXiv 2602.18196. Per row and key head a dilated pattern keeps S + W + 1 + T / D entries instead of T; where each token lies,
``HeadPattern.slot_positions`` says. Entries are keys after RoPE and values, so their order does not matter to attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .past_ratplus import RecentPast
from .pattern import HeadPattern
from .rotary_ratplus import apply_rotary


class HeadCache:
    """What the heads of one pattern in one layer keep between tokens.

    k and v [b, ng, slots, hn], slots for rows of up to ``max_length`` tokens, which ``grow`` raises; a top-k pattern has whole blocks.
    ``state`` [2, b, ng, hn]: the recurrence's last (k~, v~) before RoPE. It is fp32 at least, whatever the weights are: rounding it at
    every token would let decoding drift away from prefill. ``blocks`` of a top-k pattern: what its blocks are scored by, the elementwise
    bounds [2, b, ng, blocks + 1, hn] of their keys (scores "bounds", the maxima first) or their sums in fp32 [1, ...] ("means"); the
    last one takes padding. ``past``: notes with which the last tokens can be undone, None where nobody will ask for it.
    """

    reading = False  # whether it wants to observe() queries: SnapCache does, until the prompt ends

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

    def counted(self, lengths: torch.Tensor) -> torch.Tensor:
        """lengths [b] of rows as the slots count them."""
        return lengths

    def held(self, length: int) -> torch.Tensor | None:
        """At which of the positions up to ``length`` there is still a key, [b, ng, length], beside what the pattern's mask says."""
        return None

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

    def crop(self, before: torch.Tensor, lengths: torch.Tensor, tables: Callable) -> None:
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
