"""Fused dilated attention on a GPU: values and gradients against a masked softmax in float64, and the same bits every time."""

from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from rat_megatron.ops.dilated_attention import kept_positions
from rat_megatron.ops.dilated_attention.triton import dilated_attention, segment_attention
from rat_megatron.ratplus.pattern import HeadPattern

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 6e-3, FP16: 1e-3, FP32: 1e-5}


def masked_attention(q, k, v, head: HeadPattern, softmax_scale: float, start: int = 0) -> torch.Tensor:
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("sbnd,tbnd->bnst", q, k.repeat_interleave(group, 2)) * softmax_scale
    mask = head.mask(torch.arange(start, start + len(q))[:, None], torch.arange(len(k))).to(q.device)
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(group, 2))


def random(length: int, batch: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(length, batch, heads, dim, device="cuda").to(dtype).requires_grad_()


def values_and_gradients(function, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    torch.empty(64 << 20, device="cuda").fill_(torch.nan)  # the allocator hands this memory out next
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def check(function, expected_function, inputs: list[torch.Tensor], repeatable: bool = True) -> None:
    dtype = inputs[0].dtype
    grad = torch.randn(inputs[0].shape, device="cuda").to(dtype)
    actual = values_and_gradients(function, inputs, grad)
    expected = values_and_gradients(expected_function, [x.detach().double().requires_grad_() for x in inputs], grad)
    for got, want in zip(actual, expected, strict=True):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm() + 1e-6
    if repeatable:
        assert all(torch.equal(x, y) for x, y in zip(actual, values_and_gradients(function, inputs, grad), strict=True))


@pytest.mark.parametrize(
    ("word", "length", "heads", "groups", "batch", "dim", "dtype"),
    [
        ("d16", 333, 4, 4, 1, 128, BF16),
        ("d64", 1024, 4, 2, 3, 128, BF16),
        ("d64", 63, 2, 2, 2, 64, BF16),
        ("d16w100s4", 777, 4, 2, 3, 128, BF16),
        ("w256s4", 700, 4, 4, 1, 64, BF16),
        ("d16w64s4", 500, 2, 2, 1, 256, BF16),
        ("d64", 700, 2, 1, 2, 256, BF16),
        ("d16w64s4", 500, 4, 2, 2, 96, BF16),
        ("d64", 1024, 3, 1, 1, 96, BF16),
        ("w64s4", 300, 3, 3, 1, 96, FP32),
        ("d64s4", 513, 4, 1, 2, 128, FP16),
        ("d4w900s70", 300, 2, 1, 1, 128, FP16),
        ("s400", 300, 2, 2, 1, 128, BF16),
        ("w0", 1, 2, 2, 1, 128, BF16),
        ("d16w40s3", 257, 2, 1, 2, 128, FP32),
        ("d8", 200, 2, 2, 1, 256, FP32),
        ("d8", 200, 3, 3, 1, 16, FP32),
    ],
)
def test_agrees_with_a_masked_softmax(word, length, heads, groups, batch, dim, dtype):
    options = {"head": HeadPattern.parse(word), "softmax_scale": dim**-0.5}
    inputs = [random(length, batch, n, dim, dtype) for n in (heads, groups, groups)]
    check(partial(dilated_attention, implementation="triton", **options), partial(masked_attention, **options), inputs)


def random_tables(length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 3 * torch.randn(length, dim // 2, device="cuda")
    return angle.cos(), angle.sin()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [s, b, np, hn] in float64, as a product of complex numbers."""
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())[:, None, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize(
    ("word", "length", "heads", "groups", "batch", "dim", "dtype"),
    [
        ("d4", 333, 4, 4, 1, 16, BF16),
        ("d64", 1024, 4, 2, 3, 128, BF16),
        ("d4w3s2", 777, 4, 2, 3, 64, BF16),
        ("w5s1", 300, 2, 1, 2, 128, FP16),
        ("d16w100s4", 500, 2, 2, 1, 256, BF16),
        ("d64s4", 63, 2, 2, 1, 32, BF16),
        ("d16w20s4", 400, 4, 2, 2, 96, BF16),
        ("d16w40s3", 257, 2, 1, 2, 128, FP32),
        ("d16", 33000, 1, 1, 1, 128, BF16),  # cuDNN's, which wants the queries turned before
    ],
)
def test_turns_the_queries(word, length, heads, groups, batch, dim, dtype):
    head, scale, (cos, sin) = HeadPattern.parse(word), dim**-0.5, random_tables(length, dim)
    q, k, v = (random(length, batch, n, dim, dtype).detach() for n in (heads, groups, groups))
    torch.empty(64 << 20, device="cuda").fill_(torch.nan)  # the allocator hands this memory out next
    out = dilated_attention(q, k, v, head, scale, cos=cos, sin=sin)
    some = slice(max(0, length - 1024), length)  # the whole mask of a long sequence would not fit
    expected = masked_attention(turned(q, cos, sin)[some], k.double(), v.double(), head, scale, some.start)
    assert (out[some].double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    strided = torch.zeros(batch, length, 2 * heads, dim + 8, device="cuda", dtype=dtype)[:, :, ::2, :dim].transpose(0, 1).copy_(q)
    assert torch.equal(dilated_attention(strided, k, v, head, scale, cos=cos, sin=sin), out)


def test_gradients_flow_through_turned_queries():
    options, (cos, sin) = {"head": HeadPattern.parse("d16w20s4"), "softmax_scale": 0.125}, random_tables(300, 64)
    inputs = [random(300, 2, n, 64, BF16) for n in (4, 2, 2)]
    check(
        partial(dilated_attention, cos=cos, sin=sin, **options),
        lambda q, k, v: masked_attention(turned(q, cos, sin), k, v, **options),
        inputs,
    )


@pytest.mark.parametrize(
    ("word", "length", "dim"),
    [("d16", 1024, 128), ("d16", 1003, 128), ("d16s4", 1030, 128), ("d16w32s4", 1024, 128), ("d16", 1024, 64), ("d16s4", 1030, 96)],
)
def test_folded_queries_agree_with_a_masked_softmax(word, length, dim):
    options = {"head": HeadPattern.parse(word), "softmax_scale": dim**-0.5}
    inputs = [random(length, 2, n, dim, BF16) for n in (4, 2, 2)]
    check(partial(dilated_attention, implementation="folded", **options), partial(masked_attention, **options), inputs, repeatable=False)


@pytest.mark.parametrize(("word", "start", "before"), [("d16s4", 320, 0), ("d16w100s4", 320, 100), ("w64s4", 333, 64), ("d64", 128, 0)])
def test_a_segment_is_attended_as_within_the_whole_sequence(word, start, before):
    head = HeadPattern.parse(word)
    at = kept_positions(head, 600)
    old = at[at < start - before].cuda()
    q, k, v = (random(600, 2, n, 128, BF16) for n in (4, 2, 2))
    options = {"head": head, "softmax_scale": 128**-0.5, "start": start}

    def segment(q, k, v):
        return segment_attention(q, k[start - before :], v[start - before :], k[old], v[old], **options)

    check(segment, partial(masked_attention, **options), [q.detach()[start:].clone().requires_grad_(), k, v])


def test_any_memory_layout():
    head = HeadPattern.parse("d16w20s4")
    q, k, v = (random(300, 2, n, 64, BF16).detach() for n in (4, 2, 2))
    batch_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(dilated_attention(*batch_first, head, 0.125), dilated_attention(q, k, v, head, 0.125))


def test_large_scores_stay_finite():
    inputs = [(random(500, 1, 2, 128, BF16).detach() * 30).requires_grad_() for _ in range(3)]
    for word in ("d16", "d16w20s4"):
        attend = partial(dilated_attention, head=HeadPattern.parse(word), softmax_scale=1.0)
        results = values_and_gradients(attend, inputs, torch.ones_like(inputs[0]))
        assert all(x.isfinite().all() for x in results)


def test_refuses_to_fold_a_short_past():
    q = random(128, 1, 2, 64, BF16)
    with pytest.raises(ValueError, match="does not fit the folded implementation"):
        dilated_attention(q, q, q, HeadPattern(64), 0.125, implementation="folded")


def test_a_long_prefill_chooses_the_folded_queries():
    head = HeadPattern.parse("d4")
    q, k, v = (random(8200, 1, 2, 64, BF16).detach() for _ in range(3))
    chosen = dilated_attention(q, k, v, head, 0.125)
    assert torch.equal(chosen, dilated_attention(q, k, v, head, 0.125, implementation="folded"))
    other = dilated_attention(q, k, v, head, 0.125, implementation="triton")
    assert (chosen.double() - other.double()).norm() <= 1e-2 * other.double().norm()
