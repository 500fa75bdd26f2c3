"""What it takes to undo the last tokens of a compact cache, kept while candidates are tried that may be thrown away (assisted decoding).

Sinks and dilated tokens lie where they are for good. What later tokens destroy is the recurrent state, which cannot run backwards, and
the ring of the window: both are noted here token by token, so that what is kept grows with the tokens to undo and not with the sequence.
"""

from __future__ import annotations

import torch

LEAST = 32  # tokens of a prompt, or before the last crop, that can be undone: assistants go back one, or a few under another tokenizer


class RecentPast:
    """Notes on the last n tokens of one HeadCache, of every row's real ones, the latest last.

    state [2, b, ng, n, hn]: the recurrent state before each. k, v [b, ng, n, hn]: the entries that it replaced in the ring (n = 0 without
    one). count [b]: on how many tokens of a row there are notes; older places hold nothing of use.
    """

    tensors = {"state": 1, "k": 0, "v": 0, "count": 0}  # noqa: RUF012 (names, with the axis of the rows, as HeadCache.tensors)

    def __init__(self, cache, wanted: int):
        self.wanted = wanted
        self.state = cache.state[:, :, :, None, :][:, :, :, :0]
        self.k, self.v = cache.k[:, :, :0], cache.v[:, :, :0]
        self.count = torch.zeros(len(cache.k), dtype=torch.long, device=cache.k.device)

    def columns(self, tokens) -> int:
        """How many of the last columns of a call to note: of a prompt as many as hold the last ``wanted`` real tokens, later all."""
        if tokens.columns or tokens.length == 1:
            return tokens.length
        padding = 0 if tokens.real is None else tokens.length - int(tokens.counts.min())
        return min(tokens.length, max(self.wanted, LEAST) + padding)

    def note(self, cache, states: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens) -> None:
        """Notes the last n columns of a call before they are written. states [2, b, ng, n, hn]: before each; k, v [b, ng, t, hn]."""
        n = states.shape[3]
        if tokens.length > 1:
            self._keep(LEAST, torch.zeros_like(self.count))
        replaced_k, replaced_v = (x[:, :, :0] for x in (k, v))
        if cache.head.ring_size:
            replaced_k, replaced_v = (self._replaced(cache, stored, x, tokens, n) for stored, x in ((cache.k, k), (cache.v, v)))
        self.state = torch.cat([self.state, states], dim=3)
        self.k, self.v = torch.cat([self.k, replaced_k], dim=2), torch.cat([self.v, replaced_v], dim=2)
        self.count = self.count + n
        if tokens.real is not None:
            self._keep(self.state.shape[3], (tokens.length - tokens.counts).clamp(max=n))

    @staticmethod
    def _replaced(cache, stored: torch.Tensor, x: torch.Tensor, tokens, n: int) -> torch.Tensor:
        """What the last n of the tokens x [b, ng, t, hn] find in their places of the ring: [b, ng, n, hn]."""
        ring, sinks = cache.head.ring_size, cache.head.sinks
        column = torch.arange(tokens.length - n, tokens.length, device=x.device)
        slot = sinks + (tokens.positions[:, -n:] - sinks).clamp(min=0) % ring
        return torch.where((column >= ring)[:, None], x[:, :, (column - ring).clamp(min=0)], _take(stored, 2, slot))

    def covers(self, removed: torch.Tensor) -> bool:
        """Whether so many tokens [b] of the rows can be undone."""
        return bool((removed <= self.count).all())

    def undo(self, cache, before: torch.Tensor, lengths: torch.Tensor) -> None:
        """Brings state and ring of rows of ``before`` [b] tokens back to ``lengths`` [b], and forgets the notes on the tokens undone."""
        total, removed = self.state.shape[3], before - lengths
        if total:
            first = (total - removed).clamp(max=total - 1)[:, None]
            state = _take(self.state, 3, first)[:, :, :, 0]
            cache.state = torch.where((removed > 0)[:, None, None], state, cache.state)
        ring, sinks = cache.head.ring_size, cache.head.sinks
        if ring and total:
            start = lengths.clamp(min=sinks)[:, None]  # from here on tokens of the ring were undone
            position = start + (torch.arange(ring, device=start.device) - (start - sinks)) % ring  # [b, ring]: the first in each place
            undone = (position < before[:, None])[:, None, :, None]
            note = (total - before[:, None] + position).clamp(0, total - 1)
            for stored, replaced in ((cache.k, self.k), (cache.v, self.v)):
                places = stored[:, :, sinks : sinks + ring]
                stored[:, :, sinks : sinks + ring] = torch.where(undone, _take(replaced, 2, note), places)
        self._keep(LEAST, removed)

    def _keep(self, count: int, dropped: torch.Tensor) -> None:
        """Keeps notes on up to count tokens, without the last ``dropped`` [b] of each row."""
        total = self.state.shape[3]
        kept = min(count, total)
        if not kept:
            return
        index = (torch.arange(total - kept, total, device=dropped.device) - dropped[:, None]).clamp(min=0)
        self.count = (self.count - dropped).clamp(min=0, max=kept)
        self.state = _take(self.state, 3, index)
        if self.k.shape[2]:
            self.k, self.v = _take(self.k, 2, index), _take(self.v, 2, index)


def _take(x: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """Entries index [b, n] along an axis of x [..., b, ng, entries, hn] whose rows lie two axes before."""
    index = index[:, None, :, None].expand(-1, x.shape[axis - 1], -1, x.shape[-1])
    return x.gather(axis, index if axis == 2 else index[None].expand(len(x), *index.shape))
