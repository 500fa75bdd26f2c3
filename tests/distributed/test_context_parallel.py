"""The recurrence and attention over several ranks against one: values, gradients, and the bytes that each rank sends."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import pytest
import torch
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rat_megatron.ops import dispatch
from rat_megatron.ops.dilated_attention import dilated_attention
from rat_megatron.ops.gated_scan import gated_scan, states_of_chunks
from rat_megatron.parallel import context_parallel
from rat_megatron.parallel.context_parallel import attention_context_parallel, chunks_of, scan_mixed_qkv_context_parallel
from rat_megatron.ratplus.pattern import AttentionPattern

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


def scan_context_parallel(q, gate, k, v, f, group) -> tuple[torch.Tensor, ...]:
    """The scan of a projection that holds these: queries and output gates, k~ and v~."""
    return scan_mixed_qkv_context_parallel(torch.cat([q, gate, k, v, f], dim=-1), q.shape[-1], group)


def check_scan(group) -> None:
    widths = [DIM * HEADS // GROUPS] * 2 + [DIM] * 3
    inputs = [same_everywhere(LENGTH, BATCH, GROUPS, width, seed=seed) for seed, width in enumerate(widths)]
    assert_same_as_one_rank(
        lambda q, gate, k, v, f: (q * 1, gate * 1, *gated_scan(f, k, v)[:2]),
        lambda *parts: scan_context_parallel(*parts, group),
        inputs,
        group,
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
        patch.setattr(context_parallel, "states_of_chunks", lambda a, b, *args, **way: states_of_chunks(a.flip(0), b.flip(0), *args, **way))
        check_scan(group)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(context_parallel, "states_of_chunks", lambda *args, back=False: states_of_chunks(*args))
        check_scan(group)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(context_parallel, "in_sequence_order", lambda gathered, size: gathered.chunk(2 * size))
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
    inputs = [torch.randn(length // size, BATCH, GROUPS, DIM, dtype=torch.bfloat16) for _ in range(5)]
    forward, backward = bytes_sent(lambda *parts: scan_context_parallel(*parts, groups[size]), inputs)
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


# ---- the device ----------------------------------------------------------------------------------------------------------------------


class OnDevice(TorchDispatchMode):
    """Stands for a device in a step on meta tensors, this rank alone: collectives send nothing, and what a CUDA graph forbids is noticed.

    Meta tensors have no values, so reading one raises; a tensor of the host that meets one would be copied to the device in every step.
    """

    def __init__(self):
        super().__init__()
        self.launched: list[str] = []  # what is no view and no allocation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.launched.append(name)
            work = FakeWork().boxed()
            return (args[0], work) if len(func._schema.returns) == 2 else work
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert len(devices) <= 1, f"{func} takes a tensor of the host to the device"
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel()]
        if devices == {"meta"} and written and not func.is_view and "empty" not in name:
            self.launched.append(name)
        return out


class Kernels(torch.autograd.Function):
    """Stands for segment_attention's kernels, which are not under test: they launch the same whatever is around them."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def launched_on_device(monkeypatch, function, inputs: list[torch.Tensor]) -> tuple[list[str], list[str]]:
    """What the forward and the backward pass of a step launch."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")  # where Megatron gathers
    inputs = [x.to("meta").requires_grad_() for x in inputs]
    with OnDevice() as forward:
        outputs = function(*inputs)
    with OnDevice() as backward:
        torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs])
    return forward.launched, backward.launched


def test_scan_launches_one_kernel_for_both_chunks_and_joins_no_outputs(groups, monkeypatch):
    kernels = pytest.importorskip("rat_megatron.ops.gated_scan.triton")
    launched = []
    for name in ("summary", "join", "states", "forward", "backward"):
        launch = lambda *args, name=name, **options: launched.append(name)  # noqa: E731
        monkeypatch.setattr(kernels, f"gated_scan_{name}", defaultdict(lambda launch=launch: launch))  # whatever the grid
    monkeypatch.setattr(dispatch, "triton_takes", lambda *tensors: True)
    projection = torch.randn(LENGTH // 4, BATCH, GROUPS, 2 * 16 + 3 * DIM, dtype=torch.bfloat16)
    run = partial(scan_mixed_qkv_context_parallel, query_width=16, group=groups[4])
    forward, backward = launched_on_device(monkeypatch, run, [projection])
    assert launched == ["summary", "join", "states", "forward", "summary", "join", "states", "backward"]
    # "full" is the room where a scan's programs leave states to each other; the gradients of query and gate are copied to their places.
    assert forward == ["_allgather_base_", "full"] and backward == ["_allgather_base_", "copy_", "copy_", "full"]


LAUNCHES = {"d16": (4, 10), "d8w3": (11, 18), "d16w16s4": (14, 22)}  # at most, forward and backward, beside the attention's kernels


@pytest.mark.parametrize("word", [*PATTERNS, "{dense,d16,d8w3s2,d16}"])
def test_attention_takes_nothing_from_the_host(groups, word, monkeypatch):
    monkeypatch.setattr(context_parallel, "segment_attention", lambda *args: Kernels.apply(*args[:5]))
    pattern = AttentionPattern.parse(word).layer(0)
    inputs = [torch.randn(LENGTH // 4, BATCH, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    forward, backward = launched_on_device(
        monkeypatch, lambda q, k, v: [attention_context_parallel(q, k, v, pattern, 0.3, groups[4])], inputs
    )
    if word in LAUNCHES:
        assert len(forward) <= LAUNCHES[word][0] and len(backward) <= LAUNCHES[word][1], (forward, backward)
