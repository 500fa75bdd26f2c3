"""RMSNorm for layers without Transformer Engine, fit for sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm over the last dimension, built as Megatron builds its norms.

    Under sequence parallelism each tensor-parallel rank sees part of the sequence, so the weight carries the mark by which Megatron
    sums its gradient over them; Megatron's own local norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel
