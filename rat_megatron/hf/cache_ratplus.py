"""The cache of a RAT+ model while it generates: keys and values as usual, and the recurrent state."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer


class RatPlusCacheLayer(DynamicLayer):
    """One layer: ``keys`` (after RoPE) and ``values`` [b, np, s, hn], and ``state`` [2, b, np, 1, hn].

    The state is the recurrence's last (k~, v~) before RoPE. It stays fp32 whatever the weights are: rounding it at every token
    would let decoding drift away from prefill. It is None before the first token and in a model without recurrence.
    """

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.state: torch.Tensor | None = None

    def reset(self) -> None:
        self.keys = self.values = self.state = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.state is not None:
            self.state = self.state.index_select(1, beam_idx.to(self.state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=1)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.state is not None:
            self.state = self.state[:, indices]


class RatPlusCache(Cache):
    """The layers' caches, and ``positions`` [b, s]: the place of each cached token in its own sequence, -1 for padding.

    Every token is kept, so the attention pattern may change between calls.
    """

    def __init__(self):
        super().__init__(layer_class_to_replicate=RatPlusCacheLayer)
        self.positions: torch.Tensor | None = None

    def get_state(self, layer_idx: int) -> torch.Tensor | None:
        """The recurrent state that a layer's next token starts from, [2, b, np, 1, hn] fp32; None at the first."""
        return self.layers[layer_idx].state if layer_idx < len(self.layers) else None

    def set_state(self, state: torch.Tensor, layer_idx: int) -> None:
        """Stores the state; call it after ``update``, which creates the layer."""
        self.layers[layer_idx].state = state

    def append_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Adds the positions [b, t] of new tokens; returns those of all tokens, [b, s + t]."""
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)
        return self.positions

    def reset(self) -> None:
        super().reset()
        self.positions = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.positions is not None:
            self.positions = self.positions[indices]

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("a RAT+ cache cannot be cropped: its recurrent state has no way back; reset it and run the shorter prompt again")
