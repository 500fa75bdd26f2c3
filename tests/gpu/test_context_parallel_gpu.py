"""Context parallelism on a GPU: a group of one rank, which holds both chunks, against none, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from rat_megatron.ops.dilated_attention import dilated_attention
from rat_megatron.ops.gated_scan import scan_mixed_qkv
from rat_megatron.parallel.context_parallel import attention_context_parallel, scan_mixed_qkv_context_parallel
from rat_megatron.ratplus.pattern import AttentionPattern

LENGTH, BATCH, GROUPS, DIM = 512, 2, 2, 64
WORDS = ["d16", "d16w16s4", "d4s6", "w20s3", "{d16,d8w3s2,d16,d64}", "dense", "{dense,d16,d8w3s2,d16}"]


@pytest.fixture(scope="module")
def group():
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def attention_of(projection, word: str, group=None) -> torch.Tensor:
    """The scan of a projection and attention under a pattern, over a group if there is one: [s, b, ng, 7 * hn] -> [s, b, 2 * ng, hn]."""
    pattern = AttentionPattern.parse(word).layer(0)
    scan = scan_mixed_qkv(projection, 2 * DIM) if group is None else scan_mixed_qkv_context_parallel(projection, 2 * DIM, group)
    query, gate, k, v = scan
    q = query.reshape(*query.shape[:2], -1, DIM)
    out = dilated_attention(q, k, v, pattern, 0.1) if group is None else attention_context_parallel(q, k, v, pattern, 0.1, group)
    return out * gate.reshape(out.shape)


def random_projection() -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, GROUPS, 7 * DIM, device="cuda").bfloat16().requires_grad_()


@pytest.mark.parametrize("word", WORDS)
def test_both_chunks_are_the_whole_sequence(group, word):
    projection = random_projection()
    exact = projection.detach().double().requires_grad_()
    expected = attention_of(exact, word)
    weights = torch.randn(expected.shape, device="cuda").bfloat16()
    gradient = torch.autograd.grad(expected, exact, weights.double())[0]
    actual = attention_of(projection, word, group)
    for here, there in ((actual, expected), (torch.autograd.grad(actual, projection, weights)[0], gradient)):
        assert (here.double() - there).norm() <= 2e-2 * there.norm()


@pytest.mark.parametrize("word", WORDS)
def test_a_cuda_graph_captures_a_step_and_computes_the_same(group, word):
    projection, weights = random_projection(), torch.randn(LENGTH, BATCH, 2 * GROUPS, DIM, device="cuda").bfloat16()

    def step():
        out = attention_of(projection, word, group)
        return out, torch.autograd.grad(out, projection, weights)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and NCCL connects before a capture
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as Megatron captures
        captured = step()
    with torch.no_grad():
        projection.copy_(random_projection())
    expected = step()
    graph.replay()
    torch.cuda.synchronize()
    for here, there in zip(captured, expected, strict=True):
        if "dense" in word:  # the backward pass of flash attention adds in any order
            assert (here - there).norm() <= 1e-2 * there.norm()
        else:
            assert torch.equal(here, there)


def test_dense_heads_of_a_hybrid_layer_make_no_mask_of_all_scores(group):
    """[s, s] of bool would be 1 GiB here."""
    q, k, v = (torch.randn(32768, 1, heads, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (2, 2, 2))
    pattern = AttentionPattern.parse("{dense,d16}").layer(0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention_context_parallel(q, k, v, pattern, 0.1, group).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**28
