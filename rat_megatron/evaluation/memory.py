"""How long a model's recurrence remembers: from the gates that it opens on text.

A gate of g keeps of what came n tokens before a share of g^n, which has fallen to 1/e after about 1 / (1 - g) tokens. That is called the
memory length here, of the mean gate of a channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class GateMeans:
    """Means of every layer's gates over the tokens that it has seen."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, layer: int, logits: Tensor) -> None:
        """logits [b, t, channels]."""
        gates = torch.sigmoid(logits.float()).flatten(0, -2)
        self._sums[layer] = self._sums.get(layer, 0) + gates.sum(0, dtype=torch.float64)
        self._tokens[layer] = self._tokens.get(layer, 0) + len(gates)

    def memory_lengths(self) -> list[float]:
        """Of every layer with a recurrence, in order, the median over its channels, in tokens."""
        means = [self._sums[layer] / self._tokens[layer] for layer in sorted(self._sums)]
        return [float((1 / (1 - mean).clamp(min=1e-9)).median()) for mean in means]


@contextmanager
def watched_gates(model: Any, found: GateMeans) -> Iterator[None]:
    """Adds to ``found`` what the layers of a RatPlusForCausalLM have for gates while the context is open."""
    handles = []
    for index, layer in enumerate(model.model.layers):
        if layer.self_attn.forget_gate_proj is not None:
            handles.append(
                layer.self_attn.forget_gate_proj.register_forward_hook(lambda _, inputs, output, index=index: found.add(index, output))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
