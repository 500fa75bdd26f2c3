"""Attention under every kind of pattern against the definition: values, gradients, causality, given positions."""

import math

import pytest
import torch

from rat_megatron.ops.dilated_attention import dilated_attention, kept_positions, segment_attention
from rat_megatron.ops.dilated_attention import reference as reference_operator
from rat_megatron.ops.topk_attention import topk_attention
from rat_megatron.ratplus.pattern import AttentionPattern, HeadPattern, LayerPattern
from tests import reference

POSITIONAL = ["dense", "d2", "d16", "d16w8s4", "w8", "w8s2", "s4", "d4w4", "w0", "d4w100", "d70w3"]
HYBRID = ["{dense,d16*3}", "{d2w3,dense,d2w3,w8}", "{d16w8s4*4}"]
TOPK = ["d4k1", "d4k2", "d4k4", "d4k4+d", "d8k3+d", "d4k100", "d70k3"]
MIXED = ["{d4k3,dense,d4k3+d,d8}"]
LENGTHS = [1, 2, 17, 64, 65]
HEADS, DIM = 4, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Short sequences then run through many blocks of queries, as long ones do."""
    monkeypatch.setattr(reference_operator, "_BLOCK", 16)
    monkeypatch.setattr("rat_megatron.ratplus.attention_ratplus._QUERIES", 16)


def layer(word: str) -> LayerPattern:
    return AttentionPattern.parse(word).layer(0)


def random_inputs(length: int, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q [length, 2, 4, 8], k and v [length, 2, groups, 8]."""
    generator = torch.Generator().manual_seed(1000 * groups + length)
    return [
        torch.randn(length, 2, heads, DIM, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, groups, groups)
    ]


def attend(word: str, **options):
    return lambda q, k, v: dilated_attention(q, k, v, layer(word), 1 / math.sqrt(DIM), **options)


def by_definition(word: str):
    heads = layer(word).heads * (1 if len(layer(word).heads) > 1 else HEADS)

    def attend_one(q, k, v):  # [1, t, h, d]: top-k sees other keys in every sequence
        chosen = {h: quest_blocks(q[0, :, h], k[0, :, h // (HEADS // k.shape[2])], head) for h, head in enumerate(heads) if head.blocks}

        def visible(h, t, j):
            head = heads[h]
            if not head.blocks:
                return reference.sees(t, j, head.dilation, head.window, head.sinks)
            return j <= t and (j // head.dilation in chosen[h][t] or (head.dilate_rest and (j + 1) % head.dilation == 0))

        return reference.attention(q, k, v, visible)

    def attend_all(q, k, v):
        sequences = zip(*(x.transpose(0, 1).split(1) for x in (q, k, v)), strict=True)
        return torch.cat([attend_one(*sequence) for sequence in sequences]).transpose(0, 1)

    return attend_all


def quest_blocks(q, k, head: HeadPattern) -> list[set[int]]:
    """The blocks that every query of one head sees: its own, the first, and the others of highest bound. q and k [t, d]."""
    seen = []
    for t in range(len(q)):
        own = t // head.dilation
        scores = {}
        for block in range(1, own):
            keys = k[block * head.dilation : (block + 1) * head.dilation]
            scores[block] = torch.maximum(q[t] * keys.amax(0), q[t] * keys.amin(0)).sum().item()
        best = sorted(scores, key=scores.__getitem__, reverse=True)[: max(0, head.blocks - 2)]
        seen.append({own, *([0] if head.blocks > 1 else []), *best})
    return seen


def values_and_gradients(attention, inputs) -> list[torch.Tensor]:
    out = attention(*inputs)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return [out, *torch.autograd.grad(out, inputs, weights.to(out.dtype))]


def assert_close(actual, expected, tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        size = e.double().norm()
        if size < 1e-9:  # every query sees one key alone, so that q and k have no gradient: measure against inputs of size 1
            size = math.sqrt(e.numel())
        assert (a.double() - e.double()).norm() <= tolerance * size


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("word", POSITIONAL + HYBRID + TOPK + MIXED)
def test_matches_the_definition_in_float64(word, length):
    inputs = random_inputs(length)
    expected = values_and_gradients(by_definition(word), inputs)
    for implementation in (None, "masked", "kept"):
        assert_close(values_and_gradients(attend(word, implementation=implementation), inputs), expected, 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("word", ["dense", "d4w4", "{d2w3,dense,d2w3,w8}", "d4k4+d"])
def test_query_heads_share_key_heads(word, groups):
    inputs = random_inputs(33, groups)
    assert_close(values_and_gradients(attend(word), inputs), values_and_gradients(by_definition(word), inputs), 1e-12)


@pytest.mark.parametrize(
    ("word", "implementation"), [("dense", None), ("d4w2s1", "kept"), ("d4w2s1", "masked"), ("d2k3+d", None), (MIXED[0], None)]
)
def test_gradients_by_finite_differences(word, implementation, monkeypatch):
    monkeypatch.setattr(reference_operator, "_BLOCK", 4)
    torch.autograd.gradcheck(attend(word, implementation=implementation), random_inputs(9), fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("word", ["dense", "d16w8s4", "w8s2", HYBRID[1]])
def test_lower_precision(word, dtype, tolerance):
    inputs = random_inputs(65, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    actual = values_and_gradients(attend(word), inputs)
    assert all(x.dtype == dtype for x in actual)
    assert_close(actual, values_and_gradients(attend(word, implementation="masked"), exact), tolerance)


@pytest.mark.parametrize("word", ["dense", "d2", "d64", "d16w256s4", "w256s4", "d64w5"])
def test_kept_equals_masked_with_blocks_of_the_real_size(word, monkeypatch):
    monkeypatch.undo()
    inputs = random_inputs(700, dtype=torch.float64)
    kept, masked = (values_and_gradients(attend(word, implementation=name), inputs) for name in ("kept", "masked"))
    assert_close(kept, masked, 1e-12)


def test_kept_keeps_no_square_of_the_length():
    length = 1024
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.untyped_storage().nbytes() // x.itemsize), lambda _: None):
        attend("d64w16s4")(*random_inputs(length))
    assert 0 < max(sizes) < length * length // 8


@pytest.mark.parametrize("token", [0, 17, 64])
@pytest.mark.parametrize("word", ["dense", "d16w8s4", "w8", HYBRID[1], *TOPK[2:4]])
def test_a_token_changes_nothing_before_it(word, token):
    inputs = [x.detach() for x in random_inputs(65, dtype=torch.float32)]
    for implementation in (None, "masked", "kept"):
        before = attend(word, implementation=implementation)(*inputs)
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[token] += 1.0
        after = attend(word, implementation=implementation)(*changed)
        assert torch.equal(before[:token], after[:token]) and not torch.equal(before[token], after[token])


@pytest.mark.parametrize("word", POSITIONAL + HYBRID + TOPK + MIXED)
def test_positions_in_any_order(word):
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randperm(65, generator=generator)[:20], torch.randperm(65, generator=generator)

    def shuffled(q, k, v):
        return attend(word, q_positions=queries, k_positions=keys)(q[queries], k[keys], v[keys])

    inputs = random_inputs(65)
    expected = values_and_gradients(lambda q, k, v: attend(word)(q, k, v)[queries], inputs)
    assert_close(values_and_gradients(shuffled, inputs), expected, 1e-12)


@pytest.mark.parametrize("word", POSITIONAL)
def test_decoding_needs_only_the_kept_positions(word):
    q, k, v = random_inputs(65)
    at = torch.tensor([64])
    keys = torch.cat([layer(word).heads[0].kept_positions(64), at])
    step = attend(word, q_positions=at, k_positions=keys)(q[at], k[keys], v[keys])
    assert_close([step], [attend(word)(q, k, v)[at]], 1e-12)


def random_tables(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 3 * torch.randn(length, DIM // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    return angle.cos(), angle.sin()


def turned(x, cos, sin):
    """RoPE of x [s, b, np, hn] as a product of complex numbers."""
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)[:, None, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("word", ["dense", "d4", "d4w3s2", "w5s1", "d4k3", "d4k4+d", HYBRID[1], *MIXED])
def test_turns_the_queries(word):
    inputs, (cos, sin) = random_inputs(65), random_tables(65)
    expected = values_and_gradients(lambda q, k, v: attend(word)(turned(q, cos, sin), k, v), inputs)
    for implementation in (None, "masked", "kept"):
        assert_close(values_and_gradients(attend(word, implementation=implementation, cos=cos, sin=sin), inputs), expected, 1e-12)
    at = torch.tensor([40, 3, 64])
    some = attend(word, q_positions=at, k_positions=torch.arange(65), cos=cos[at], sin=sin[at])
    q, k, v = inputs
    assert_close([some(q[at], k, v)], [expected[0][at]], 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_turns_the_queries_in_lower_precision(dtype, tolerance):
    inputs, (cos, sin) = random_inputs(65, dtype=dtype), random_tables(65)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    actual = values_and_gradients(attend("d4w3s2", cos=cos.float(), sin=sin.float()), inputs)
    assert all(x.dtype == dtype for x in actual)
    assert_close(actual, values_and_gradients(lambda q, k, v: attend("d4w3s2")(turned(q, cos, sin), k, v), exact), tolerance)


def test_any_memory_layout():
    q, k, v = random_inputs(65)
    strided = [x.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_() for x in (q, k, v)]
    for word in ("dense", "d16w8s4", HYBRID[1], "d4k4+d"):
        assert_close(values_and_gradients(attend(word), strided), values_and_gradients(attend(word), [q, k, v]), 1e-12)


def test_refuses_what_does_not_fit():
    q, k, v = random_inputs(17)
    with pytest.raises(ValueError, match="4 query heads cannot share keys"):
        attend("dense")(q, torch.cat([k, k[:, :, :1]], dim=2), v)
    with pytest.raises(ValueError, match="lists 3 heads, but the queries have 4"):
        attend("{dense,d4*2}")(q, k, v)
    with pytest.raises(ValueError, match="not 'fast'"):
        attend("d4", implementation="fast")(q, k, v)
    with pytest.raises(ValueError, match="'kept' needs queries and keys of the same tokens"):
        attend("d4", implementation="kept", k_positions=torch.arange(17))(q, k, v)
    with pytest.raises(ValueError, match="needs both cos and sin"):
        attend("d4", cos=torch.ones(17, 4))(q, k, v)
    with pytest.raises(ValueError, match=r"must be \[s, hn / 2\]"):
        attend("d4", cos=torch.ones(17, 8), sin=torch.ones(17, 8))(q, k, v)


@pytest.mark.parametrize("word", ["d4", "d8w5s2", "d16w70s3", "w6s3"])
def test_a_segment_is_attended_as_within_the_whole_sequence(word):
    head = LayerPattern((HeadPattern.parse(word),)).heads[0]
    q, k, v = (torch.randn(200, 2, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    start, kept_at = 120, kept_positions(head, 200)
    begin = start - head.window
    actual = segment_attention(q[start:], k[begin:], v[begin:], k[kept_at], v[kept_at], kept_at, head, 0.5, start)
    expected = dilated_attention(q, k, v, LayerPattern((head,)), 0.5, implementation="masked")[start:]
    assert (actual - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("word", ["d4k3", "d4k4+d", "d7k100"])
def test_a_key_long_after_the_queries_is_in_no_block(word):
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (30, 31, 31))
    order, head = torch.randperm(31), AttentionPattern.parse(word).layer(0).heads[0]
    at = torch.where(torch.arange(31) < 30, torch.arange(31), 1000)
    expected = topk_attention(q, k[:, :, :30], v[:, :, :30], head, 0.3, at[:30], at[:30])
    torch.testing.assert_close(topk_attention(q, k[:, :, order], v[:, :, order], head, 0.3, at[:30], at[order]), expected)
