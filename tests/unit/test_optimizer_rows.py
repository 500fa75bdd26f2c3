"""Which rank writes which rows of a parameter's optimizer state: every element once, whatever the cuts between ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module", autouse=True)
def _megatron(megatron_process):
    """Megatron can be imported."""


@st.composite
def cut_parameters(draw):
    """A parameter and the elements [start, end) of each rank that updates any."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    param = torch.randn(shape)
    cuts = sorted(draw(st.sets(st.integers(1, param.numel() - 1), max_size=6))) if param.numel() > 1 else []
    first = draw(st.integers(0, 3))
    return param, {first + i: cut for i, cut in enumerate(zip([0, *cuts], [*cuts, param.numel()], strict=True))}


@given(cut_parameters())
@settings(max_examples=300, deadline=None)
def test_rows_are_whole_and_each_has_one_owner(cut):
    from rat_megatron.checkpoint.optimizer_rows import owned_rows, shared_pieces, touched_rows

    param, ranges = cut
    flat, width = param.flatten(), param.numel() // param.shape[0]
    pieces = list(shared_pieces(param, ranges))
    written = torch.full_like(flat, torch.nan)
    for rank, (start, end) in ranges.items():
        first, last = owned_rows(start, end, width)
        if first < last:
            others = [flat[piece.start : piece.end] for piece in pieces if piece.owner == rank]
            rows = torch.cat([flat[first * width : end], *others])
            assert len(rows) == (last - first) * width and written[first * width : last * width].isnan().all()
            written[first * width : last * width] = rows
        low, high = touched_rows(start, end, width)
        assert low * width <= start < low * width + width and high * width - width < end <= high * width
    assert torch.equal(written, flat)
    for piece in pieces:
        start, end = ranges[piece.source]
        assert piece.source != piece.owner and start <= piece.start < piece.end <= end
        assert piece.end - piece.start < width  # what travels is less than a row for every cut
