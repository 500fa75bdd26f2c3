"""Padding stands on either side of a row, but the model computes with real tokens first: there and back."""

from __future__ import annotations

import torch

from .attention_ratplus import Tokens
from .cache_ratplus import RatPlusCache


def in_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Columns of x [b, t, h] in the order [b, t], or as they are."""
    return x if order is None else x.gather(1, order.to(x.device)[..., None].expand_as(x))


def count_tokens(x: torch.Tensor, columns: int, attention_mask: torch.Tensor | None, past: RatPlusCache | None) -> Tokens:
    """Counts the tokens x [b, t, h], whose real ones come first."""
    batch, length = x.shape[:2]
    before = torch.zeros(batch, dtype=torch.long, device=x.device) if past is None else past.lengths.to(x.device)
    if attention_mask is None:
        return Tokens(before, torch.full_like(before, length), None, columns, length)
    counts = (attention_mask[:, columns:] != 0).sum(dim=1).to(x.device)
    return Tokens(before, counts, torch.arange(length, device=x.device) < counts[:, None], columns, length)


def weights_in_columns(
    weights: torch.Tensor, tokens: Tokens, back: torch.Tensor | None, attention_mask: torch.Tensor | None, past: RatPlusCache | None
) -> torch.Tensor:
    """Attention weights [b, np, t, s] of real tokens first, to real tokens first, in the columns of the mask [b, s]; zero at padding.

    back [b, t]: where each column's query is. Without a mask, that of earlier calls tells where the padding is.
    """
    if attention_mask is None and past is not None and past.mask is not None:
        attention_mask = torch.nn.functional.pad(past.mask, (0, tokens.length), value=1)
    if attention_mask is None:
        return weights
    real = (attention_mask != 0).to(weights.device)
    position = (real.cumsum(dim=1) - 1).clamp(min=0)[:, None, None].expand(*weights.shape[:3], -1)
    weights = weights.gather(3, position).masked_fill(~real[:, None, None], 0)
    if back is not None:
        weights = weights.gather(2, back.to(weights.device)[:, None, :, None].expand_as(weights))
    return weights.masked_fill(~real[:, None, tokens.columns :, None], 0)
