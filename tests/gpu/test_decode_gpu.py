"""The decode kernel on a GPU: against the torch step in float64, in a CUDA graph, and with the same result every time."""

import math
from copy import copy
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from rat_megatron.ops.decode import decode_step
from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.pattern import HeadPattern

torch_step = partial(decode_step, implementation="torch")
DIM, MAX_LENGTH = 64, 300
SCALE = 1 / math.sqrt(DIM)
LENGTHS = [0, 1, 31, 64, 255, 298]


def token(batch: int, heads: int, groups: int, dtype: torch.dtype, seed: int, dim: int = DIM) -> list[torch.Tensor]:
    """q, f, k, v and the rotary rows of one token per row, f, k and v as views of one tensor."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, fkv = (torch.randn(batch, n, w, generator=generator, device="cuda").to(dtype) for n, w in ((heads, dim), (groups, 3 * dim)))
    angle = torch.rand(batch, dim // 2, generator=generator, device="cuda") * 6
    return [q, *fkv.split(dim, dim=-1), angle.cos(), angle.sin()]


def random_cache(head: HeadPattern, groups: int, lengths: torch.Tensor, dtype: torch.dtype, dim=DIM, max_length=MAX_LENGTH) -> HeadCache:
    """A cache of random entries, NaN where no token is."""
    cache = HeadCache(head, torch.empty(len(lengths), groups, 1, dim, dtype=dtype, device="cuda"), max_length, "bounds")
    generator = torch.Generator("cuda").manual_seed(5)
    stored = head.slot_positions(cache.k.shape[2], lengths)[:, None, :, None]
    for kept in (cache.k, cache.v):
        kept.normal_(generator=generator).masked_fill_(stored < 0, torch.nan)
    cache.state.normal_(generator=generator)
    return cache


def copy_of(cache: HeadCache, dtype: torch.dtype | None = None) -> HeadCache:
    state_dtype = torch.float64 if dtype == torch.float64 else None
    clone = copy(cache)
    for name, kind in (("k", dtype), ("v", dtype), ("state", state_dtype)):
        tensor = getattr(cache, name)
        setattr(clone, name, tensor.clone().to(kind or tensor.dtype))
    return clone


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def check_steps(word: str, heads: int, groups: int, dtype: torch.dtype, tolerance: float, lengths=LENGTHS, dim=DIM, max_length=MAX_LENGTH):
    lengths = torch.tensor(lengths, device="cuda")
    cache = random_cache(HeadPattern.parse(word), groups, lengths, dtype, dim, max_length)
    exact = copy_of(cache, torch.float64)
    for step in range(2):
        inputs = token(len(lengths), heads, groups, dtype, step, dim)
        out = decode_step(*inputs, cache, lengths, SCALE)
        expected = torch_step(*(x.double() for x in inputs), exact, lengths, SCALE)
        assert out.dtype == dtype and error(out, expected) <= tolerance
        assert error(cache.state, exact.state) <= 1e-6
        assert torch.equal(cache.k.isnan(), exact.k.isnan())
        assert error(cache.k.nan_to_num(), exact.k.nan_to_num()) <= tolerance
        assert error(cache.v.nan_to_num(), exact.v.nan_to_num()) <= tolerance
        lengths += 1


@pytest.mark.parametrize("word", ["dense", "d16", "d64s4", "d16w24s4", "w24s4", "d4w3s2"])
def test_equals_the_torch_step_in_float64(word):
    check_steps(word, 4, 4, torch.bfloat16, 1e-2)


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (3, 1), (2, 2)])
def test_query_heads_share_key_heads(heads, groups):
    check_steps("d4w3s2", heads, groups, torch.float16, 1e-3)
    check_steps("d4w3s2", heads, groups, torch.float32, 1e-6)


@pytest.mark.parametrize("dim", [16, 64, 96, 128, 256])
def test_head_dimensions(dim):
    check_steps("d4w3s2", 4, 2, torch.bfloat16, 1e-2, dim=dim)
    check_steps("d4w3s2", 4, 2, torch.float32, 1e-6, dim=dim)


@pytest.mark.parametrize("heads", [2, 8])
def test_a_long_cache_of_few_rows_is_split(heads):
    check_steps("d2w8s4", heads, 2, torch.bfloat16, 1e-2, lengths=[19_990], dim=128, max_length=20_000)
    check_steps("d2w8s4", heads, 2, torch.bfloat16, 1e-2, lengths=[3], dim=128, max_length=20_000)


def test_runs_in_a_cuda_graph_and_repeats_itself():
    head, start = HeadPattern.parse("d4w3s2"), torch.tensor(LENGTHS[:5], device="cuda")
    inputs = token(5, 4, 4, torch.bfloat16, 0)
    first = random_cache(head, 4, start, torch.bfloat16)
    eager_cache, lengths, expected = copy_of(first), start.clone(), []
    for _ in range(5):
        expected.append(decode_step(*inputs, eager_cache, lengths, SCALE))
        lengths += 1

    cache, lengths = copy_of(first), start.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_step(*inputs, cache, lengths, SCALE)
        lengths += 1
    for name in ("k", "v", "state"):
        getattr(cache, name).copy_(getattr(first, name))
    lengths.copy_(start)
    for eager in expected:
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, eager)
    assert all(torch.equal(getattr(cache, name).nan_to_num(), getattr(eager_cache, name).nan_to_num()) for name in ("k", "v", "state"))


@pytest.mark.parametrize("gate", [30.0, -30.0])
def test_saturated_gates(gate):
    lengths = torch.tensor([0, 7], device="cuda")
    cache = random_cache(HeadPattern(4), 4, lengths, torch.float32)
    exact = copy_of(cache, torch.float64)
    q, f, *rest = token(2, 4, 4, torch.float32, 0)
    out = decode_step(q, torch.full_like(f, gate), *rest, cache, lengths, SCALE)
    expected = torch_step(*(x.double() for x in (q, torch.full_like(f, gate), *rest)), exact, lengths, SCALE)
    assert error(out, expected) <= 1e-5
