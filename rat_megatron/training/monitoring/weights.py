"""Whether a model's weights are finite: one reduction per parameter, without a copy of any."""

from __future__ import annotations

import torch


def here_finite(model: list[torch.nn.Module]) -> bool:
    """Whether all weights of this rank's part of the model are finite."""
    weights = [parameter.detach() for chunk in model for parameter in chunk.parameters() if parameter.numel()]
    largest = [torch.linalg.vector_norm(weight, float("inf")).float() for weight in weights]
    return bool(torch.stack(largest).isfinite().all()) if largest else True


def all_finite(model: list[torch.nn.Module]) -> bool:
    """Whether those of every rank are; every rank calls this."""
    bad = torch.tensor([0 if here_finite(model) else 1], dtype=torch.int, device="cuda")
    torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return not bad.item()
