"""SnapKV: of a prompt that has been read, each key head keeps the keys that the prompt's last queries attend to. Plain torch.

Source: arXiv 2404.14469. Ours are the choice for grouped queries, which the paper has no word on, and the order among equals.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .head_cache_ratplus import HeadCache
from .pattern import HeadPattern
from .rotary_ratplus import wide

_POOLED = 7  # neighbouring keys share the largest weight among them: the kernel of the paper's experiments


class SnapCache(HeadCache):
    """The cache of a pattern such as snap1024w32, for a prompt of more columns than its budget B; a shorter one is dense.

    While ``reading`` the prompt it keeps all keys, and of the last tokens of each row the ``queries`` [b, np, observed, hn], after RoPE.
    Behind the prompt, the first B slots of a row that had n > B tokens hold those at the positions ``kept`` [b, ng, B], in order; it has
    let go of ``dropped`` [b] = n - B. Other rows keep all they have. Later tokens follow, that at position p in slot p - dropped.
    """

    def __init__(self, pattern: HeadPattern, k: torch.Tensor, max_length: int, scores: str, prompt_length: int):
        """As HeadCache; prompt_length: columns of the prompt, padding included."""
        self.pattern, self.prompt_length, self.reading = pattern, prompt_length, True
        self.dropped = torch.zeros(len(k), dtype=torch.long, device=k.device)
        self.queries: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        super().__init__(pattern.of_prompt, k, max_length, scores)

    @property
    def tensors(self) -> dict[str, int]:
        more = {"dropped": 0} | ({"queries": 0} if self.queries is not None else {}) | ({"kept": 0} if self.kept is not None else {})
        return super().tensors | more

    def grow(self, max_length: int) -> None:
        self.max_length = max(self.max_length, max_length)
        slots = min(self.max_length, self.prompt_length) if self.reading else self.max_length - self._saved
        more = max(0, slots - self.k.shape[2])
        self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))

    @torch.no_grad()
    def observe(self, q: torch.Tensor, tokens: Any) -> None:
        """Takes note of the prompt's queries q [b, np, t, hn], after RoPE, of tokens that are stored; at its end chooses what to keep."""
        last = torch.arange(self.pattern.observed, device=q.device)
        place = tokens.counts[:, None] - len(last) + last  # [b, observed]: of each row's last tokens; below 0 an earlier call's
        self.queries = torch.where(
            (place >= 0)[:, None, :, None],
            _take(q, place.clamp(min=0)),
            0 if self.queries is None else _take(self.queries, (place + len(last)).clamp(max=len(last) - 1)),
        )
        if tokens.columns + tokens.length < self.prompt_length:
            return
        lengths = tokens.before + tokens.counts
        self.kept = choose_prompt_keys(self.queries, self.k, lengths, self.pattern).int()
        index = self.kept.long()[..., None].expand(-1, -1, -1, self.k.shape[3])
        self.k, self.v = self.k.gather(2, index), self.v.gather(2, index)
        self.dropped = (lengths - self.pattern.budget).clamp(min=0)
        self.queries, self.reading = None, False
        self.grow(self.max_length)

    @property
    def _saved(self) -> int:
        """Slots that rows of as many tokens as there are columns need less, and no row more than those."""
        return 0 if self.reading else self.prompt_length - self.pattern.budget

    def counted(self, lengths: torch.Tensor) -> torch.Tensor:
        return lengths - self.dropped

    def in_use(self, length: int) -> int:
        return super().in_use(length - self._saved)

    def write(self, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor, counts: torch.Tensor, length: int) -> None:
        super().write(k, v, self.counted(before), counts, length)

    def write_token(self, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor, real: torch.Tensor | None) -> None:
        super().write_token(k, v, self.counted(position), real)

    def visible(self, slots: int, lengths: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return super().visible(slots, self.counted(lengths), queries - self.dropped[:, None])

    def in_order(self, k: torch.Tensor, v: torch.Tensor, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kept is None:
            return super().in_order(k, v, tokens)
        length, groups, slots = tokens.columns + k.shape[2], k.shape[1], self.in_use(tokens.columns)
        slot = torch.arange(slots, device=k.device)
        later = (slot + self.dropped[:, None])[:, None, self.pattern.budget :].expand(-1, groups, -1)
        stored = torch.cat([self.kept.long(), later], dim=2)[:, :, :slots]
        stored = torch.where(slot < self.counted(tokens.before)[:, None, None], stored, length)
        position = torch.cat([stored, tokens.positions[:, None].expand(-1, groups, -1)], dim=2)
        index = position[..., None].expand(-1, -1, -1, k.shape[3])
        k, v = (torch.cat([kept[:, :, :slots], x], dim=2) for kept, x in ((self.k, k), (self.v, v)))
        return tuple(x.new_zeros(*x.shape[:2], length + 1, x.shape[3]).scatter(2, index, x)[:, :, :length] for x in (k, v))

    def held(self, length: int) -> torch.Tensor | None:
        if self.kept is None:
            return None
        of_prompt = self.kept.new_zeros(*self.kept.shape[:2], max(length, self.prompt_length), dtype=torch.bool)
        of_prompt = of_prompt.scatter(2, self.kept.long(), True)[:, :, :length]
        return of_prompt | (torch.arange(length, device=self.k.device) >= self.dropped[:, None, None] + self.pattern.budget)

    def _holds_last(self, before: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return super()._holds_last(self.counted(before), self.counted(lengths))


@torch.no_grad()
def choose_prompt_keys(q: torch.Tensor, k: torch.Tensor, lengths: torch.Tensor, pattern: HeadPattern) -> torch.Tensor:
    """Positions [b, ng, budget], in order, of the keys that each key head keeps of rows of lengths [b] tokens; 0, 1, ... for rows of up
    to budget.

    q [b, np, observed, hn]: the queries of a row's last tokens; k [b, ng, s, hn], both after RoPE. A key's weight is the sum of what these
    queries' softmax gives it, averaged over the query heads that share the key head, and then the largest among its neighbours. The
    observed tokens are kept themselves; the rest of the budget goes to the earlier ones of largest weight, among equals to the first.
    """
    at, last = torch.arange(k.shape[2], device=k.device), torch.arange(pattern.observed, device=k.device)
    own = (lengths[:, None] - pattern.observed + last).clamp(min=0)  # [b, observed]
    queries = wide(q).unflatten(1, (k.shape[1], -1))  # [b, ng, np / ng, observed, hn]
    scores = queries @ wide(k)[:, :, None].mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(at > own[:, None, None, :, None], -torch.inf)
    weight = scores.softmax(dim=-1).sum(dim=3).mean(dim=2)  # [b, ng, s]
    later = (at >= lengths[:, None] - pattern.observed)[:, None]
    pooled = F.max_pool1d(weight.masked_fill(later, -torch.inf), _POOLED, stride=1, padding=_POOLED // 2).masked_fill(later, -torch.inf)
    best = pooled.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.budget - pattern.observed]
    kept = torch.cat([best.sort(dim=-1).values, own[:, None].expand(-1, k.shape[1], -1)], dim=2)
    return torch.where((lengths > pattern.budget)[:, None, None], kept, torch.arange(pattern.budget, device=k.device))


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens index [b, n] of x [b, np, t, hn]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
