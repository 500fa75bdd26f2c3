"""The compact cache of a RAT+ model, all layers together, as Transformers takes it. Source: arXiv 2602.18196."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_ratplus import RatPlusConfig
from .head_cache_ratplus import HeadCache
from .past_ratplus import RecentPast
from .pattern import AttentionPattern, HeadPattern
from .rotary_ratplus import no_autocast, rotary_tables, without_rotation
from .snapkv_ratplus import SnapCache

# What Transformers calls a cache among the arguments and the outputs of a model: "past_key_values" before 5.24, "cache" since.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_CROPS_BY = "tokens_to_remove" in inspect.signature(Cache.crop).parameters  # as Transformers 5 does: there crop(0) removes nothing


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

    ``prompt_length``: columns of the prompt, padding included, behind which SnapKV patterns choose what to keep. generate() says it;
    elsewhere the first call is the prompt, unless it is given here, for one that comes in several.
    """

    def __init__(self, max_length: int | None = None, prompt_length: int | None = None):
        super().__init__(layers=[])
        self.max_length = max_length or 0
        self.recording, self.wanted = False, 0
        self.word: str | None = None  # the pattern of a generate() call with candidates, which an assistant does not share
        self.reset()
        self.prompt_length = prompt_length or 0

    def reset(self) -> None:
        """Forgets all tokens, and the pattern."""
        self.layers: list[Any] = []
        self.columns = 0  # tokens given so far, padding included
        self.lengths: torch.Tensor | None = None
        self.pattern: AttentionPattern | None = None
        self.mask: torch.Tensor | None = None  # the attention mask so far
        self.prompt_length = 0  # until the first call

    def begin(self, x: torch.Tensor, pattern: AttentionPattern, config: RatPlusConfig) -> None:
        """Makes ready for the tokens x [b, t, h]; raises ValueError when the cache belongs to another pattern or batch."""
        if self.lengths is None:
            self.layers = [RatPlusCacheLayer() for _ in range(config.num_hidden_layers)]
            self.record_past(self.recording)
            self.lengths, self.pattern = torch.zeros(x.shape[0], dtype=torch.long, device=x.device), pattern
            self.config = config
            self.prompt_length = self.prompt_length or x.shape[1]
        if self.pattern != pattern:
            raise ValueError(
                f"the cache holds what attention pattern '{self.pattern}' needs, but this call attends under '{pattern}': start a new one"
            )
        if len(self.lengths) != x.shape[0]:
            raise ValueError(f"the cache has {len(self.lengths)} rows, but the batch has {x.shape[0]}")
        needed = self.columns + x.shape[1]
        if pattern.prunes_prompt and self.columns < self.prompt_length < needed:
            raise ValueError(
                f"pattern '{pattern}' lets go of keys behind the prompt, whose {self.prompt_length} columns end within this call, which "
                f"goes on to column {needed}: give what follows the prompt in another call"
            )
        if needed > self.max_length:
            self.max_length = needed if not self.columns else max(needed, self.max_length + self.max_length // 8 + 16)

    def heads(self, layer: int, heads: list[HeadPattern], keys: list[torch.Tensor], scores: str) -> list[HeadCache]:
        """A layer's caches, with room for this step. keys: one k [b, ng, t, hn] for each pattern among its heads."""
        caches = self.layers[layer].heads
        if not caches:
            caches.extend(self._head_cache(head, k, head.scores or scores) for head, k in zip(heads, keys, strict=True))
        for cache in caches:
            cache.grow(self.max_length)
            if not self.layers[layer].record_past:
                cache.past = None
            elif cache.past is None:
                cache.past = RecentPast(cache, self.wanted)
        return caches

    def _head_cache(self, head: HeadPattern, k: torch.Tensor, scores: str) -> HeadCache:
        if 0 < head.budget < self.prompt_length:
            return SnapCache(head, k, self.max_length, scores, self.prompt_length)
        return HeadCache(head.of_prompt, k, self.max_length, scores)

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
        if columns < self.prompt_length and any(isinstance(cache, SnapCache) for _, cache in caches):
            raise ValueError(
                f"pattern '{self.pattern}' lets go of keys of the prompt, which cannot be cut any more: crop to its {self.prompt_length} "
                "columns or more"
            )
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
