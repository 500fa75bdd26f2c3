"""Attention patterns: one word that says which keys a query may see.

The same word is used in flags, configs, logs, plots and file names. Definition: RAT+ paper (arXiv 2602.18196), dilated attention
with local window and sinks, and its layer, head and top-k block hybrids; SnapKV (arXiv 2404.14469).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

GRAMMAR = (
    "'dense', 'd16', 'd16w256s4', 'w256s4', 'd64k8', 'd64k8+d', 'd64k8means', 'snap1024w32', a list of layers such as '[dense,d64]*12', "
    "or the heads of a layer such as '{dense*4,d64*12}'"
)

_MAX_REPEAT = 4096  # more layers or heads than any model has: a typing error, not a pattern
_BLOCKS = r"k(?P<k>\d{1,9})(?P<scores>bounds|means)?(?P<rest>\+d)?"  # numbers fit int64
_WORD = re.compile(rf"(?:d(?P<d>\d{{1,9}}))?(?:{_BLOCKS})?(?:w(?P<w>\d{{1,9}}))?(?:s(?P<s>\d{{1,9}}))?")
_SNAP = re.compile(r"snap(?P<budget>\d{1,9})w(?P<observed>\d{1,9})")


class PatternError(ValueError):
    """A pattern word that does not parse, or does not fit the model."""


@dataclass(frozen=True)
class HeadPattern:
    """What one head's queries see.

    Query t sees key j <= t when ``t - j <= window``, or ``j < sinks``, or ``(j + 1) % dilation == 0``. ``dilation`` 1 is dense and
    None leaves only window and sinks. With ``blocks`` = K > 0, keys lie in blocks of ``dilation`` tokens and each query sees K of
    them in full up to itself: its own, the first and those of highest score; ``dilate_rest`` adds every ``dilation``-th key, and
    ``scores`` says what blocks are scored by, "bounds" or "means" of their keys (None: what the model does).

    With ``budget`` = B > 0 (SnapKV) a prompt is read densely. Each key head then keeps B keys of it: those of its last ``observed``
    tokens, and those that the queries of these tokens attend to most. Later tokens see the kept keys and each other.
    """

    dilation: int | None = 1
    window: int = 0
    sinks: int = 0
    blocks: int = 0
    dilate_rest: bool = False
    scores: str | None = None
    budget: int = 0
    observed: int = 0

    @classmethod
    def parse(cls, word: str) -> HeadPattern:
        """Reads one word such as ``d16w256s4``; raises PatternError."""
        if word == "dense":
            return cls()
        if snap := _SNAP.fullmatch(word):
            budget, observed = int(snap["budget"]), int(snap["observed"])
            if not 1 <= observed < budget:
                raise PatternError(
                    f"attention pattern '{word}' keeps {budget} keys of a prompt, those of its last {observed} tokens among them: the "
                    "first number must be larger than the second, and that at least 1, as in snap1024w32"
                )
            return cls(budget=budget, observed=observed)
        match = _WORD.fullmatch(word)
        if not word or not match:
            raise PatternError(f"unknown attention pattern '{word}': write {GRAMMAR}")
        dilation, blocks, window, sinks = (int(match[g]) if match[g] is not None else None for g in ("d", "k", "w", "s"))
        if dilation == 0:
            raise PatternError(f"attention pattern '{word}' has dilation 0: the smallest is d1, which is dense")
        if blocks is not None:
            if dilation is None or dilation < 2 or blocks < 1 or window is not None or sinks is not None:
                raise PatternError(
                    f"attention pattern '{word}': top-k needs a block size of at least 2 and at least one block, "
                    "and no window or sinks, as in d64k8"
                )
            return cls(dilation, blocks=blocks, dilate_rest=match["rest"] is not None, scores=match["scores"])
        return cls() if dilation == 1 else cls(dilation, window or 0, sinks or 0)

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        if self.blocks:
            return f"d{self.dilation}k{self.blocks}{self.scores or ''}" + ("+d" if self.dilate_rest else "")
        if self.budget:
            return f"snap{self.budget}w{self.observed}"
        parts = [f"{letter}{n}" for letter, n in (("d", self.dilation), ("w", self.window), ("s", self.sinks)) if n]
        return "".join(parts) or "w0"

    @property
    def is_dense(self) -> bool:
        return self.dilation == 1 and not self.blocks and not self.budget

    @property
    def of_prompt(self) -> HeadPattern:
        """What tokens of a prompt see, whatever becomes of their keys behind it."""
        return HeadPattern() if self.budget else self

    def mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """True where a query sees a key. queries [..., q, 1] and keys [..., 1, k] hold token positions; returns [..., q, k].

        Not for top-k patterns and SnapKV, whose masks depend on the scores.
        """
        if self.blocks or self.budget:
            raise PatternError(f"attention pattern '{self}' chooses keys by score: it has no fixed mask")
        seen = (queries - keys <= self.window) | (keys < self.sinks)
        if self.dilation is not None:
            seen = seen | ((keys + 1) % self.dilation == 0)
        return seen & (keys <= queries)

    def kept_positions(self, length: int) -> torch.Tensor:
        """Positions [n], in order, of the first ``length`` tokens that the query at position ``length`` still sees."""
        keys = torch.arange(length)
        if self.blocks:
            return keys
        return keys[self.mask(torch.tensor([[length]]), keys[None])[0]]

    @property
    def ring_size(self) -> int:
        """Slots of a compact cache's ring: W + 1, so that writing a token spares those its own query sees; without a window, none."""
        return self.window + 1 if self.window else 0

    def cache_slots(self, max_length: int) -> int:
        """Entries of a compact cache per row and key head, for rows of up to max_length tokens: at most S + W + 1 + max_length / D."""
        if self.blocks:
            return max_length
        dilated = max(0, max_length // self.dilation - self.sinks // self.dilation) if self.dilation else 0
        return self.sinks + self.ring_size + dilated

    def slot_positions(self, slots: int, lengths: torch.Tensor) -> torch.Tensor:
        """Position of the token in every slot after lengths [b] tokens, -1 in unused slots: [b, slots]. This defines the compact cache.

        First the S sinks, then a ring for the last W + 1 other tokens, then every D-th other token, which stands in the ring too while
        it is that recent; top-k patterns and dense ones keep every token in order.
        """
        last = lengths[:, None].long() - 1
        slot = torch.arange(slots, device=lengths.device)
        ring, dilation = self.ring_size, 1 if self.blocks else self.dilation or 1
        in_ring = (slot >= self.sinks) & (slot < self.sinks + ring)
        recent = last - (last - slot) % max(ring, 1)  # the last position whose slot this is: position p has sinks + (p - sinks) % ring
        dilated = (slot - self.sinks - ring + 1 + self.sinks // dilation) * dilation - 1
        position = torch.where(slot < self.sinks, slot, torch.where(in_ring, recent, dilated))
        return torch.where((position <= last) & (~in_ring | (recent >= self.sinks)), position, -1)

    def pairs(self, length: int) -> int:
        """Number of (query, key) pairs that ``length`` tokens make; of SnapKV, those of a prompt."""
        t = torch.arange(length, dtype=torch.int64)
        if self.of_prompt.is_dense:
            return length * (length + 1) // 2
        if self.blocks:
            block = t // self.dilation
            full = block.clamp(max=self.blocks - 1)
            seen = t % self.dilation + 1 + full * self.dilation
            if self.dilate_rest:
                seen += block - full
            return int(seen.sum())
        past = (t - self.window).clamp(min=0)  # keys older than the window
        sinks = past.clamp(max=self.sinks)
        seen = t - past + 1 + sinks
        if self.dilation is not None:
            seen += past // self.dilation - sinks // self.dilation
        return int(seen.sum())

    def flops(self, length: int, head_dim: int) -> int:
        """Forward FLOPs of one head over one sequence: 2*dh for a score and 2*dh for its value, per pair seen. SnapKV scores the pairs of
        its last queries again where it has to choose."""
        chosen_by = self.observed * length - self.observed * (self.observed - 1) // 2 if 0 < self.budget < length else 0
        return 4 * head_dim * self.pairs(length) + 2 * head_dim * chosen_by

    def cache_entries(self, length: int) -> int:
        """Key/value entries a compact cache holds for ``length`` tokens: S + W + 1 + ceil(length/D), never more than ``length``; B of a
        prompt under SnapKV, to which every token generated adds one."""
        if self.budget:
            return min(length, self.budget)
        if self.is_dense or self.blocks:
            return length
        dilated = -(-length // self.dilation) if self.dilation else 0
        return min(length, self.sinks + self.window + 1 + dilated)


@dataclass(frozen=True)
class LayerPattern:
    """The patterns of one layer's heads; a single entry serves every head."""

    heads: tuple[HeadPattern, ...] = (HeadPattern(),)

    def __str__(self) -> str:
        return str(self.heads[0]) if len(self.heads) == 1 else "{" + _fold(self.heads) + "}"

    @property
    def is_uniform(self) -> bool:
        return len(set(self.heads)) == 1

    @property
    def is_dense(self) -> bool:
        return all(head.is_dense for head in self.heads)

    @property
    def is_positional(self) -> bool:
        """Whether the mask follows from positions alone (no top-k, no SnapKV)."""
        return not any(head.blocks or head.budget for head in self.heads)

    def mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """As HeadPattern.mask, with a leading dimension of heads: [1 or H, ..., q, k]."""
        return torch.stack([head.mask(queries, keys) for head in self.heads])

    def head_slice(self, start: int, count: int) -> LayerPattern:
        """The pattern of heads start to start+count: what one tensor-parallel rank computes."""
        return self if len(self.heads) == 1 else LayerPattern(self.heads[start : start + count])


@dataclass(frozen=True)
class AttentionPattern:
    """The patterns of a model's layers; a single entry that was not written as a list serves every layer."""

    layers: tuple[LayerPattern, ...] = (LayerPattern(),)
    is_list: bool = False

    @classmethod
    def parse(cls, word: str) -> AttentionPattern:
        """Reads a pattern word; raises PatternError with the grammar."""
        text = re.sub(r"\s", "", word)
        if not text.startswith("["):
            return cls((_parse_layer(text),))
        return cls(tuple(_parse_list(text)), is_list=True)

    def __str__(self) -> str:
        return _shortest_list(self.layers) if self.is_list else str(self.layers[0])

    @property
    def is_dense(self) -> bool:
        return all(layer.is_dense for layer in self.layers)

    @property
    def is_positional(self) -> bool:
        return all(layer.is_positional for layer in self.layers)

    @property
    def prunes_prompt(self) -> bool:
        """Whether heads let go of keys of a prompt once it is read (SnapKV): only what is generated then shows the pattern."""
        return any(head.budget for layer in self.layers for head in layer.heads)

    def check_trainable(self) -> None:
        """Raises PatternError for heads that only the Transformers model has, for inference."""
        for head in (head for layer in self.layers for head in layer.heads):
            if head.budget:
                raise PatternError(
                    f"attention pattern '{head}' drops keys of a prompt once it is read, and a training sample has no prompt: train and "
                    "validate under another, and give this one to generate or evaluate"
                )
            if head.scores == "means":
                raise PatternError(
                    f"attention pattern '{head}' chooses blocks by the means of their keys, as generate and evaluate can; training has "
                    f"their bounds: write '{replace(head, scores=None)}'"
                )

    def layer(self, index: int) -> LayerPattern:
        """The pattern of the layer with this index, counted from 0 over the whole model."""
        return self.layers[index] if self.is_list else self.layers[0]

    def check(self, num_layers: int, num_heads: int) -> None:
        """Raises PatternError unless the pattern fits a model of this many layers and attention heads."""
        if self.is_list and len(self.layers) != num_layers:
            raise PatternError(f"attention pattern '{self}' lists {len(self.layers)} layers, but the model has {num_layers}")
        for layer in self.layers:
            if len(layer.heads) not in (1, num_heads):
                raise PatternError(f"attention pattern '{layer}' lists {len(layer.heads)} heads, but a layer has {num_heads}")

    def fit(self, num_layers: int, num_heads: int) -> AttentionPattern:
        """The same pattern in the shortest form for such a model: layers or heads that are all alike are one word. Raises as ``check``."""
        self.check(num_layers, num_heads)
        layers = tuple(LayerPattern(layer.heads[:1]) if layer.is_uniform else layer for layer in self.layers)
        return AttentionPattern(layers[:1]) if len(set(layers)) == 1 else AttentionPattern(layers, self.is_list)

    def flops(self, length: int, head_dim: int, num_layers: int, num_heads: int) -> int:
        """Forward FLOPs of the attention products of one sequence, all layers and heads."""
        return sum(head.flops(length, head_dim) for head in self._all_heads(num_layers, num_heads))

    def cache_entries(self, length: int, num_layers: int, num_heads: int) -> int:
        """Cache entries of one sequence, summed over layers and heads."""
        return sum(head.cache_entries(length) for head in self._all_heads(num_layers, num_heads))

    def _all_heads(self, num_layers: int, num_heads: int) -> list[HeadPattern]:
        self.check(num_layers, num_heads)
        layers = [self.layer(i).heads for i in range(num_layers)]
        return [head for heads in layers for head in (heads * num_heads if len(heads) == 1 else heads)]


def _parse_layer(text: str) -> LayerPattern:
    if not text.startswith("{"):
        return LayerPattern((HeadPattern.parse(text),))
    if not text.endswith("}"):
        raise PatternError(f"attention pattern '{text}' must end with '}}', with repeats inside the braces: write {GRAMMAR}")
    heads = tuple(_parse_items(text[1:-1], HeadPattern.parse))
    if len(heads) > _MAX_REPEAT:
        raise PatternError(f"attention pattern '{text}' has {len(heads)} heads: more than any model has")
    return LayerPattern(heads)


def _parse_list(text: str) -> list[LayerPattern]:
    body, repeat = _split_repeat(text)
    if not body.endswith("]"):
        raise PatternError(f"attention pattern '{text}' lacks its closing ']': write {GRAMMAR}")
    layers = _parse_items(body[1:-1], _parse_layer)
    if len(layers) * repeat > _MAX_REPEAT:
        raise PatternError(f"attention pattern '{text}' has {len(layers) * repeat} layers: more than any model has")
    return layers * repeat


def _parse_items(text: str, parse_item: Callable[[str], Any]) -> list:
    """Reads ``a,b*2``: items split at the commas outside braces, each repeated as often as it says."""
    items: list = []
    for part in re.split(r",(?![^{]*\})", text):
        item, count = _split_repeat(part)
        items += [parse_item(item)] * count
    return items


def _split_repeat(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*)\*(\d{1,9})", text)
    if not match:
        return text, 1
    if not 1 <= int(match[2]) <= _MAX_REPEAT:
        raise PatternError(f"attention pattern '{text}' repeats {match[2]} times: write a number from 1 to {_MAX_REPEAT}")
    return match[1], int(match[2])


def _fold(items: Sequence) -> str:
    return ",".join(f"{item}*{n}" if n > 1 else str(item) for item, n in ((k, len(list(g))) for k, g in groupby(items)))


def _shortest_list(layers: Sequence) -> str:
    """The shortest way to write a list of layers: one period of it, its runs folded, times the number of periods."""
    forms = []
    for period in (n for n in range(1, len(layers) + 1) if len(layers) % n == 0):
        repeat = len(layers) // period
        if tuple(layers) == tuple(layers[:period]) * repeat:
            forms.append(f"[{_fold(layers[:period])}]" + (f"*{repeat}" if repeat > 1 else ""))
    return min(forms, key=len)
