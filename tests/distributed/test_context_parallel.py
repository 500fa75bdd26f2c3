"""The recurrence and attention over several ranks against one: values, gradients, and the bytes that each rank sends."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rat_megatron.ops.dilated_attention import dilated_attention
from rat_megatron.ops.gated_scan import gated_scan
from rat_megatron.parallel import context_parallel
from rat_megatron.parallel.context_parallel import attention_context_parallel, chunks_of, gated_scan_context_parallel
from rat_megatron.pattern import AttentionPattern

LENGTH, BATCH, HEADS, GROUPS, DIM = 128, 2, 4, 2, 8
SIZES = [2, 4]
PATTERNS = ["dense", "d16", "d8w3", "d16w16s4", "d4s6", "w5s3", "w20", "d16k4", "{dense,d16,d8w3s2,d8k4+d}"]


@pytest.fixture(scope="module")
def groups(ranks):
    """{size: this rank's context-parallel group of that size}."""
    return {size: torch.distributed.new_subgroups(size)[0] for size in SIZES}


def same_everywhere(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own_part(x: torch.Tensor, group) -> torch.Tensor:
    """This rank's two chunks of a whole sequence [s, ...]."""
    chunks = x.chunk(2 * group.size())
    return torch.cat([chunks[index] for index in chunks_of(group.rank(), group.size())])


def assert_same_as_one_rank(whole, split, inputs: list[torch.Tensor], group) -> None:
    """Compares split(*parts) with whole(*inputs), and the gradients of all inputs under random weights on all outputs."""
    inputs = [x.requires_grad_() for x in inputs]
    expected = whole(*inputs)
    weights = [same_everywhere(*x.shape, seed=50 + index) for index, x in enumerate(expected)]
    expected_gradients = torch.autograd.grad(expected, inputs, weights)
    parts = [own_part(x.detach(), group).requires_grad_() for x in inputs]
    actual = split(*parts)
    gradients = torch.autograd.grad(actual, parts, [own_part(x, group) for x in weights])
    for there, here in zip([*expected, *expected_gradients], [*actual, *gradients], strict=True):
        torch.testing.assert_close(here, own_part(there.detach(), group), rtol=1e-10, atol=1e-12)


def check_scan(group) -> None:
    inputs = [same_everywhere(LENGTH, BATCH, GROUPS, DIM, seed=seed) for seed in range(3)]
    assert_same_as_one_rank(
        lambda f, k, v: gated_scan(f, k, v)[:2], lambda f, k, v: gated_scan_context_parallel(f, k, v, group), inputs, group
    )


def check_attention(word: str, group) -> None:
    pattern = AttentionPattern.parse(word).layer(0)
    inputs = [same_everywhere(LENGTH, BATCH, heads, DIM, seed=heads + seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS))]
    assert_same_as_one_rank(
        lambda q, k, v: [dilated_attention(q, k, v, pattern, 0.3)],
        lambda q, k, v: [attention_context_parallel(q, k, v, pattern, 0.3, group)],
        inputs,
        group,
    )


@pytest.mark.parametrize("size", SIZES)
def test_scan(groups, size):
    check_scan(groups[size])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("word", PATTERNS)
def test_attention(groups, word, size):
    check_attention(word, groups[size])


def test_a_wrong_order_of_chunks_or_a_wrong_halo_is_noticed(groups, monkeypatch):
    """That the checks above can fail."""
    group, shift = groups[4], context_parallel._shift
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(context_parallel, "in_sequence_order", lambda gathered, size: gathered)
        check_scan(group)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(context_parallel, "in_sequence_order", lambda gathered, size: gathered)
        check_attention("d16", group)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(context_parallel, "_shift", lambda *args, **kwargs: shift(*args, **kwargs)[::-1])
        check_attention("d8w3", group)


# ---- bytes sent ----------------------------------------------------------------------------------------------------------------------


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank puts into collectives; what a reduce-scatter keeps for itself is not counted."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__ if func.namespace == "c10d" else None
        if name:
            tensor = args[0][0] if name in ("broadcast_", "reduce_") else args[1]
            share = 1 if name != "_reduce_scatter_base_" else 1 - args[0].numel() / tensor.numel()
            self.total += int(tensor.numel() * tensor.element_size() * share)
        return func(*args, **(kwargs or {}))


def bytes_sent(function, inputs: list[torch.Tensor]) -> tuple[int, int]:
    """Bytes that this rank sends in the forward and in the backward pass."""
    inputs = [x.requires_grad_() for x in inputs]
    with SentBytes() as forward:
        outputs = function(*inputs)
    with SentBytes() as backward:
        torch.autograd.grad(outputs, inputs, [torch.randn_like(x) for x in outputs])
    return forward.total, backward.total


@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("size", SIZES)
def test_scan_sends_two_states_of_fp32_whatever_the_length(groups, size, length):
    inputs = [torch.randn(length // size, BATCH, GROUPS, DIM, dtype=torch.bfloat16) for _ in range(3)]
    forward, backward = bytes_sent(lambda f, k, v: gated_scan_context_parallel(f, k, v, groups[size]), inputs)
    state = BATCH * GROUPS * DIM * 4
    assert forward == 2 * 3 * state  # of both chunks: the gates' product, the end state of keys and of values
    assert backward == 2 * 2 * state  # the products are kept


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("word", ["dense", "d16", "d8w3", "d16w16s4", "d64s4"])
def test_attention_sends_kept_keys_sinks_and_halo_only(groups, size, word):
    length, group = 512, groups[size]
    head = AttentionPattern.parse(word).layer(0).heads[0]
    shapes = [(length // size, BATCH, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    pattern = AttentionPattern.parse(word).layer(0)
    sent = bytes_sent(lambda q, k, v: [attention_context_parallel(q, k, v, pattern, 0.3, group)], inputs)

    token = BATCH * 2 * GROUPS * DIM * 2  # a key and a value in bf16
    kept = length // size // head.dilation
    sinks = sum((position + 1) % head.dilation != 0 for position in range(head.sinks))
    neighbours = (group.rank() > 0) + (group.rank() < size - 1)
    halo = neighbours * head.window
    assert sent[0] == token * (kept + sinks + halo)
    # Back go the gradients of what the other ranks sent, so each rank sends what it received.
    assert sent[1] == token * (kept * (size - 1) + sinks + halo)
