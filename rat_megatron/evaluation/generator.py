"""A loaded model that streams what follows a text, keeps its cache for the next turn, and knows how fast and how large that was."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from rat_megatron.errors import UserError
from rat_megatron.evaluation.model import LoadedModel
from rat_megatron.hf import RatPlusCache
from rat_megatron.ratplus.cache_ratplus import CACHE_NAME
from rat_megatron.ratplus.pattern import AttentionPattern


@dataclass(frozen=True)
class Settings:
    """How to continue: temperature 0 is greedy, above it tokens are drawn from the most likely that reach ``top_p`` together."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def check(self) -> Settings:
        """Raises UserError for a number that makes no sense."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens} is less than 1.")
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature} is negative: 0 is greedy, 1 the model's own distribution.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is not above 0 and at most 1.")
        return self


class Generator:
    """A model under one pattern, with the cache of what it has read and written so far.

    Text goes to stdout as it comes; ``speed`` and ``cache_size`` tell about the last call of ``go_on``, also when it was interrupted.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, pattern: str | None = None):
        self.loaded, self.settings, self.tokenizer = loaded, settings.check(), loaded.need_tokenizer()
        if pattern is not None:
            loaded.model.set_attention_pattern(pattern)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        self.written: list[int] = []  # every token of the conversation, the cache holds the first so many
        self._cache = RatPlusCache()
        self._streamer: _TimedStreamer | None = None

    def go_on(self, ids: list[int]) -> str:
        """Streams what follows these ids, prints a newline, and returns it. The cache serves again where ids begin with what it holds.

        Raises UserError for an empty prompt and for one past the model's positions, which also limit the new tokens.
        """
        limit = self.loaded.config.max_position_embeddings
        if not ids:
            raise UserError("the prompt is empty: give some text as PROMPT or on standard input.")
        if len(ids) >= limit:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but {self.loaded.folder} takes {limit} with the answer: give a shorter one."
            )
        new_tokens = min(self.settings.max_new_tokens, limit - len(ids))
        cached = self._cache.get_seq_length()
        if not cached or ids[:cached] != self.written[:cached] or len(ids) <= cached:
            self._cache, cached = RatPlusCache(len(ids) + new_tokens), 0
        self.written = list(ids)
        self._streamer = _TimedStreamer(self.tokenizer, read=len(ids) - cached)
        tokens = torch.tensor([ids], device=self.loaded.model.device)
        options: dict[str, Any] = {CACHE_NAME: self._cache, "do_sample": False}
        if self.settings.temperature > 0:
            options |= {"do_sample": True, "temperature": self.settings.temperature, "top_p": self.settings.top_p, "top_k": 0}
        output = self.loaded.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            streamer=self._streamer,
            pad_token_id=self.loaded.pad_token_id,
            **options,
        )
        self.written = output[0].tolist()
        return self.tokenizer.decode(self.written[len(ids) :], skip_special_tokens=True)

    def speed(self) -> str:
        """Tokens per second of reading the prompt and of writing."""
        return self._streamer.speed() if self._streamer else "nothing was generated"

    def cache_size(self) -> str:
        """What the cache has allocated, beside what dense attention takes for as many tokens."""
        config, length = self.loaded.config, self._cache.max_length
        entries = AttentionPattern().cache_entries(length, config.num_hidden_layers, config.num_key_value_heads)
        state = config.num_hidden_layers * config.num_key_value_heads * max(4, self.loaded.model.dtype.itemsize)
        dense = 2 * config.head_dim * (entries * self.loaded.model.dtype.itemsize + state)
        return f"cache of {length} tokens: {self._cache.nbytes:,} bytes under {config.attention_pattern}, {dense:,} if dense"


class _TimedStreamer(TextStreamer):
    """Prints text as it comes and notes when. generate() hands it the prompt first, then each token."""

    def __init__(self, tokenizer: Any, read: int):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._read = read
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._times.append(time.perf_counter())
        super().put(value)

    def speed(self) -> str:
        if len(self._times) < 2:
            return "interrupted while reading the prompt"
        started, first, *_, last = *self._times, self._times[-1]
        text = f"prefill: {self._read} tokens, {self._read / (first - started):,.1f} tokens/s"
        after_first = len(self._times) - 2
        return text + (f"; decode: {after_first} tokens, {after_first / (last - first):,.1f} tokens/s" if after_first else "")
