"""The compact cache: prefill, then token by token, against the layer written out from its definition."""

import math

import pytest
import torch

from rat_megatron.ops.decode import decode_step
from rat_megatron.ops.gated_scan import gated_scan
from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.pattern import HeadPattern
from tests import reference

WORDS = ["dense", "d2", "d16", "d16w8s4", "w8s4", "w8", "s3", "w0", "d4w3s2", "d4s6", "d3w1s5", "d8w8s8", "d70w3", "d4w100s2"]
LENGTH, HEADS, GROUPS, DIM = 41, 4, 2, 8
SCALE = 1 / math.sqrt(DIM)


def layer_inputs(batch: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q [b, t, np, hn], and f, k, v [b, t, ng, hn]."""
    generator = torch.Generator().manual_seed(batch)
    heads = (HEADS, GROUPS, GROUPS, GROUPS)
    return [torch.randn(batch, LENGTH, n, DIM, dtype=torch.float64, generator=generator).to(dtype) for n in heads]


def by_definition(q, f, k, v, head: HeadPattern) -> torch.Tensor:
    keys, values = reference.rotary(reference.recurrence(k, f)), reference.recurrence(v, f)
    return reference.attention(
        reference.rotary(q), keys, values, lambda _, t, j: reference.sees(t, j, head.dilation, head.window, head.sinks)
    )


def rotary_rows(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = DIM // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return angle.cos(), angle.sin()


def empty_cache(head: HeadPattern, batch: int, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> HeadCache:
    return HeadCache(head, torch.empty(batch, GROUPS, 1, DIM, dtype=dtype), length, "bounds")


def poisoned_cache(head: HeadPattern, batch: int, dtype: torch.dtype) -> HeadCache:
    cache = empty_cache(head, batch, dtype)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def prefilled(q, f, k, v, head: HeadPattern, lengths: torch.Tensor, left: bool, cache: HeadCache | None = None) -> HeadCache:
    """The cache after lengths[b] tokens of every row, prefilled as one batch padded on the left or right."""
    cache = cache or poisoned_cache(head, len(lengths), q.dtype)
    width = int(lengths.max())
    if width == 0:
        return cache
    column = torch.arange(width)
    positions = column - (width - lengths[:, None]) if left else column.expand(len(lengths), -1)
    positions = torch.where((positions >= 0) & (positions < lengths[:, None]), positions, -1)
    f, k, v = (x[torch.arange(len(lengths))[:, None], positions] for x in (f, k, v))  # padding: some token or other
    f = f.masked_fill((positions < 0)[:, :, None, None], torch.inf)
    smooth_k, smooth_v, state = gated_scan(*(x.transpose(0, 1) for x in (f, k, v)))
    cos, sin = rotary_rows(positions.flatten().clamp(min=0))
    x1, x2 = smooth_k.transpose(0, 1).chunk(2, dim=-1)
    cos, sin = (x.unflatten(0, positions.shape)[:, :, None].to(q.dtype) for x in (cos, sin))
    keys = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    first = (positions == 0).int().argmax(dim=1, keepdim=True)  # real tokens go first in their rows, as the model sorts them
    order = (first + column) % width
    keys, values = (x[torch.arange(len(lengths))[:, None], order].transpose(1, 2) for x in (keys, smooth_v.transpose(0, 1)))
    cache.write(keys, values, torch.zeros_like(lengths), lengths, width)
    cache.state.copy_(state)
    return cache


def decode_rest(q, f, k, v, cache: HeadCache, lengths: torch.Tensor, step=decode_step) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes until the longest row is full: outputs [b, steps, np, hn] and their positions [b, steps]."""
    rows, outputs, places = torch.arange(len(lengths)), [], []
    for _ in range(LENGTH - int(lengths.max())):
        cos, sin = rotary_rows(lengths)
        token = [x[rows, lengths] for x in (q, f, k, v)]
        outputs.append(step(*token, cos.to(q.dtype), sin.to(q.dtype), cache, lengths, SCALE))
        places.append(lengths)
        lengths = lengths + 1
    return torch.stack(outputs, dim=1), torch.stack(places, dim=1)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("prompts", [[0], [1, 0, 3], [17, 5, 16], [40, 23]])
@pytest.mark.parametrize("word", WORDS)
def test_prefill_then_decode_equals_full_attention(word, prompts, left):
    head, lengths = HeadPattern.parse(word) if word != "w0" else HeadPattern(None), torch.tensor(prompts)
    inputs = layer_inputs(len(prompts))
    out, places = decode_rest(*inputs, prefilled(*inputs, head, lengths, left), lengths)
    expected = by_definition(*inputs, head)[torch.arange(len(prompts))[:, None], places]
    assert (out - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    head, lengths = HeadPattern.parse("d4w3s2"), torch.tensor([9, 2])
    inputs = layer_inputs(2, dtype)
    cache = prefilled(*inputs, head, lengths, left=False)
    out, places = decode_rest(*inputs, cache, lengths)
    expected = by_definition(*(x.double() for x in inputs), head)[torch.arange(2)[:, None], places]
    assert out.dtype == dtype and cache.state.dtype == torch.float32
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("gate", [30.0, -30.0])
def test_saturated_gates(gate):
    head, lengths = HeadPattern.parse("d4w3s2"), torch.tensor([9, 2])
    q, f, k, v = layer_inputs(2)
    f = torch.full_like(f, gate)
    out, places = decode_rest(q, f, k, v, prefilled(q, f, k, v, head, lengths, left=True), lengths)
    expected = by_definition(q, f, k, v, head)[torch.arange(2)[:, None], places]
    assert (out - expected).norm() <= 3e-3 * expected.norm()  # at +30 the definition's own 1 - g has few digits left


@pytest.mark.parametrize("word", WORDS)
def test_slots_hold_exactly_the_tokens_that_later_queries_see(word):
    head = HeadPattern.parse(word) if word != "w0" else HeadPattern(None)
    capacity = head.cache_slots(LENGTH)
    assert capacity <= head.sinks + head.window + 1 + (-(-LENGTH // head.dilation) if head.dilation else 0)
    stored = head.slot_positions(capacity, torch.arange(LENGTH))
    for length, positions in enumerate(stored.tolist()):
        needed = set(head.kept_positions(length).tolist())
        assert needed <= set(positions)
        assert all(p < length for p in positions)


def test_dense_and_dilated_caches_have_no_spare_entry():
    assert HeadPattern().cache_slots(100) == 100
    assert HeadPattern(16).cache_slots(100) == 6
    assert HeadPattern(None, 8, 4).cache_slots(100) == 13


def test_prefill_overwrites_what_the_cache_held():
    head, lengths = HeadPattern.parse("d4w3s2"), torch.tensor([7, 11])
    inputs = layer_inputs(2)
    expected, _ = decode_rest(*inputs, prefilled(*inputs, head, lengths, left=False), lengths)
    used = prefilled(*inputs, head, torch.tensor([40, 31]), left=False)
    actual, _ = decode_rest(*inputs, prefilled(*inputs, head, lengths, left=False, cache=used), lengths)
    assert torch.equal(actual, expected)


def test_a_full_row_writes_nothing_outside_its_slots():
    head, lengths = HeadPattern(4), torch.tensor([LENGTH, 3])
    q, f, k, v = (x[:, 0] for x in layer_inputs(2))
    cache = empty_cache(head, 2)
    out = decode_step(q, f, k, v, *rotary_rows(lengths), cache, lengths + torch.tensor([2, 0]), SCALE)  # positions 43 and 3 are dilated
    assert out.isfinite().all()
    assert not cache.k[0].any() and cache.k[1, :, 0].all() and not cache.k[1, :, 1:].any()


def test_errors_name_the_shapes():
    cache = empty_cache(HeadPattern(4), 1, length=8)
    q, f, k, v = layer_inputs(1)
    lengths = torch.tensor([0])
    cos, sin = rotary_rows(lengths)
    with pytest.raises(ValueError, match="d4k3.*by score"):
        decode_step(q[:, 0], f[:, 0], k[:, 0], v[:, 0], cos, sin, empty_cache(HeadPattern.parse("d4k3"), 1), lengths, SCALE)
    with pytest.raises(ValueError, match="f, k and v"):
        decode_step(q[:, 0], f[:, 0], k[:, 0], v[:, 0, :1], cos, sin, cache, lengths, SCALE)
    with pytest.raises(ValueError, match=r"q \[1, 3, 8\]"):
        decode_step(q[:, 0, :3], f[:, 0], k[:, 0], v[:, 0], cos, sin, cache, lengths, SCALE)
    with pytest.raises(ValueError, match="cos, sin and lengths"):
        decode_step(q[:, 0], f[:, 0], k[:, 0], v[:, 0], cos, sin[:, :2], cache, lengths, SCALE)
