"""The Triton recurrence against the torch one, on the CPU: Triton's interpreter runs the kernels, in a process of its own."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from rat_megatron.ops import dispatch
from rat_megatron.ops import gated_scan as definition
from tests.ranks_in_turns import scan_in_turns

pytestmark = pytest.mark.slow

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, and other tests in this process must not see it."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def assert_close(actual, expected, tolerance=5e-6):  # sums of so few random numbers now and then cancel
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e.double()).norm() <= tolerance * e.double().norm()


# One step, less than a row, more than a chunk; channels odd, no power of two, full lanes; a carried state; RoPE; chunks in groups.
@in_interpreter
@pytest.mark.parametrize(
    ("length", "groups", "hn", "state", "rope", "long"),
    [
        (1, 1, 3, True, False, False),
        (70, 2, 6, False, True, False),
        (64, 1, 2, True, True, False),
        (130, 1, 2, True, False, True),
        (1100, 1, 2, False, True, True),
    ],
)
def test_matches_the_torch_implementation(length, groups, hn, state, rope, long, monkeypatch):
    from rat_megatron.ops.gated_scan import triton as gated_scan_triton

    monkeypatch.setattr(gated_scan_triton, "_LONG", 1 if long else 1 << 30)
    fused = torch.randn(1, length, groups, 3 * hn).transpose(0, 1)  # strided, the batch outside
    inputs = [x.requires_grad_() for x in fused.chunk(3, dim=-1)] + [torch.randn(2, 1, groups, hn).requires_grad_()] * state
    exact = [x.detach().double().requires_grad_() for x in inputs]
    tables = [table(torch.rand(length, hn // 2)) for table in (torch.cos, torch.sin)] if rope else [None, None]

    outputs = gated_scan_triton.gated_scan(*inputs[:3], inputs[3] if state else None, *tables)
    expected = definition.gated_scan(*exact[:3], exact[3] if state else None, *(x.double() if rope else x for x in tables))
    weights = [torch.randn_like(x) for x in outputs]
    assert_close(outputs, expected)
    assert_close(torch.autograd.grad(outputs, inputs, weights), torch.autograd.grad(expected, exact, [x.double() for x in weights]))

    with torch.no_grad():  # the kernel that saves nothing
        assert_close(gated_scan_triton.gated_scan(*inputs[:3], inputs[3] if state else None, *tables), expected)
    summary = gated_scan_triton.scan_summary(*inputs[:3])
    assert_close([summary], [definition.scan_summary(*exact[:3])])  # as one: the decay alone may be too small for fp32
    adjoint = gated_scan_triton.adjoint_summary(inputs[0], weights[0], weights[1])
    assert_close([adjoint], [definition.adjoint_summary(exact[0], weights[0].double(), weights[1].double())])


@pytest.mark.skipif(INTERPRETED, reason="the torch implementation alone")
def test_the_definition_turns_the_keys_and_rounds_them_once():
    inputs = [torch.randn(70, 2, 3, 8, dtype=torch.bfloat16) for _ in range(3)]
    cos, sin = (table(torch.rand(70, 4, dtype=torch.float64) * 6) for table in (torch.cos, torch.sin))
    exact = [x.double().requires_grad_() for x in inputs]
    keys, values, final = definition.gated_scan(*exact)
    outputs = definition.gated_scan(*exact, None, cos, sin)
    assert_close(outputs, [rotate(keys, cos, sin), values, final], 1e-12)
    rounded = definition.gated_scan(*inputs, None, cos, sin)
    assert rounded[0].dtype == torch.bfloat16
    assert_close(rounded[:1], [outputs[0].to(torch.bfloat16)], 1e-3)  # rounded before RoPE too, it would be off by 2e-3
    weights = torch.randn_like(keys)
    turned = torch.autograd.grad(outputs[0], exact, weights)
    assert_close(turned, torch.autograd.grad(keys, exact, rotate(weights, cos, -sin)), 1e-12)


# Context parallelism's way, on one process: every chunk from the state that the summaries before it give, and back with the adjoints.
@in_interpreter
@pytest.mark.parametrize(("length", "logit"), [(1, 30.0), (1, -30.0), (9, 30.0), (70, 0.0)])
def test_chunks_joined_by_their_summaries_equal_one_scan(length, logit):
    def run(scan, summary, adjoint, inputs, weights):
        states, outputs, gradients = [torch.zeros_like(inputs[0][0]).expand(2, -1, -1, -1)], [], []
        chunks = [[x[i * length : (i + 1) * length].detach().requires_grad_() for x in inputs] for i in range(3)]
        grads = [[x[i * length : (i + 1) * length] for x in weights] for i in range(3)]
        for f, k, v in chunks:
            outputs.append(scan(f, k, v, states[-1]))
            decay, *ends = summary(f, k, v)
            states.append(decay * states[-1] + torch.stack(ends))
        back = torch.zeros_like(states[0])
        for (f, k, v), outs, grad in zip(reversed(chunks), reversed(outputs), reversed(grads), strict=True):
            gradients.insert(0, torch.autograd.grad(outs, (f, k, v), (*grad, back)))
            back = summary(f, k, v)[0] * back + adjoint(f, *grad)
        return [torch.cat(x) for x in (*list(zip(*outputs, strict=True))[:2], *zip(*gradients, strict=True))]

    f, k, v = (torch.randn(3 * length, 1, 1, 4) for _ in range(3))
    f, weights = f + logit, [torch.randn_like(k) for _ in range(2)]
    functions = (definition.gated_scan, definition.scan_summary, definition.adjoint_summary)
    actual = run(*(partial(function, implementation="triton") for function in functions), (f, k, v), weights)
    exact = [x.double().requires_grad_() for x in (f, k, v)]
    expected = definition.gated_scan(*exact)[:2]
    assert_close(actual, [*expected, *torch.autograd.grad(expected, exact, [x.double() for x in weights])])


@in_interpreter
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("size", "shape"), [(1, (1, 1, 1)), (2, (3, 43)), (4, (2, 3, 5))])
def test_states_of_chunks_are_those_of_the_torch_implementation(size, shape, back):
    gathered = torch.randn(size, 3, 2, *shape)
    decays, ends = gathered[:, 0].sigmoid_(), gathered[:, 1:]
    for rank in range(size):
        states = [definition.states_of_chunks(decays, ends, rank, back, way) for way in ("triton", "torch")]
        torch.testing.assert_close(*states)
        outside = ends.permute(1, 2, 0, *range(3, ends.dim())).contiguous().permute(2, 0, 1, *range(3, ends.dim()))
        assert torch.equal(definition.states_of_chunks(decays, outside, rank, back, "triton"), states[0]), "other strides"


@in_interpreter
def test_both_passes_alone_are_those_of_the_scan():
    """Two chunks as a batch, as context parallelism has them; nothing but the gradients' own places is written."""
    length, heads, hn = 70, 3, 5
    x = torch.randn(2, length, heads, 3 * hn).transpose(0, 1)  # [s, 2, heads, 3 * hn]
    f, k, v = x.chunk(3, dim=-1)
    state, grad_final = (torch.randn(2, 2, heads, hn) for _ in range(2))
    weights = [torch.randn(2, length, heads, hn).transpose(0, 1) for _ in range(2)]
    exact = [x.double().requires_grad_() for x in (f, k, v, state)]
    expected = definition.gated_scan(*exact)
    gradients = torch.autograd.grad(expected, exact[:3], [x.double() for x in (*weights, grad_final)])
    for implementation in ("triton", "torch"):
        *outputs, saved = definition.scan_forward(f, k, v, state, True, implementation)
        assert_close(outputs, expected[:2])
        if implementation == "triton":
            assert all(x.transpose(0, 1).is_contiguous() for x in outputs), "a rank's output without another pass over memory"
        *again, nothing = definition.scan_forward(f, k, v, state, False, implementation)
        assert nothing is None
        assert_close(again, expected[:2])
        grad = torch.full((2, length, heads, 3 * hn + 1), torch.nan).transpose(0, 1)
        out = grad[..., :-1].chunk(3, dim=-1)
        definition.scan_backward(f, k, v, saved, *weights, grad_final, out, implementation)
        assert_close(out, gradients)
        assert grad[..., -1].isnan().all()


@in_interpreter
@pytest.mark.parametrize(
    ("size", "chunk", "batch", "groups", "hn", "query_width", "outermost", "dtype"),
    [
        (2, 9, 1, 1, 4, 8, False, torch.float32),
        (1, 66, 2, 2, 5, 10, False, torch.float32),  # an odd number of channels, queries of two heads in a group
        (2, 7, 2, 2, 4, 4, True, torch.float32),  # sequences and groups that are not one dimension in memory
        (3, 8, 2, 1, 4, 12, False, torch.bfloat16),
        (1, 1, 1, 2, 2, 2, False, torch.float32),
    ],
)
def test_a_scan_over_several_ranks_is_that_of_one(size, chunk, batch, groups, hn, query_width, outermost, dtype, monkeypatch):
    length = 2 * size * chunk
    shape = (length, batch, groups, 2 * query_width + 3 * hn)
    projection = torch.randn(shape).to(dtype)
    if outermost:
        projection = projection.transpose(0, 1).contiguous().transpose(0, 1)
    exact = projection.double().requires_grad_()
    expected = definition.scan_mixed_qkv(exact, query_width)
    weights = [torch.randn(x.shape).to(dtype) for x in expected]
    gradient = torch.autograd.grad(expected, exact, [x.double() for x in weights])
    for fused in (True, False):
        monkeypatch.setattr(dispatch, "triton_takes", lambda *tensors, fused=fused: fused)
        actual = scan_in_turns(monkeypatch, projection, query_width, weights, size)
        assert all(x.dtype == dtype for x in actual)
        assert_close(actual, [*expected, *gradient], 5e-6 if dtype == torch.float32 else 5e-3)


@in_interpreter
@pytest.mark.parametrize("logit", [30.0, -30.0, torch.inf, -torch.inf])
def test_saturated_gates_stay_finite(logit):
    from rat_megatron.ops.gated_scan.triton import gated_scan

    f, k, v = (torch.randn(9, 1, 1, 2) for _ in range(3))
    inputs = [x.requires_grad_() for x in (torch.full_like(f, logit), k, v)]
    outputs = gated_scan(*inputs)
    assert all(x.isfinite().all() for x in [*outputs, *torch.autograd.grad([x.sum() for x in outputs], inputs)])


@in_interpreter
def test_refuses_what_does_not_fit():
    gated_scan = partial(definition.gated_scan, implementation="triton")
    f, k, v = (torch.randn(9, 1, 1, 2) for _ in range(3))
    with pytest.raises(ValueError, match="share one shape"):
        gated_scan(f[:8], k, v)
    with pytest.raises(ValueError, match="must be bf16"):
        gated_scan(f.double(), k, v)
    with pytest.raises(ValueError, match="initial_state has shape"):
        gated_scan(f, k, v, torch.zeros(2, 1, 1, 3))
    with pytest.raises(ValueError, match="both cos and sin"):
        gated_scan(f, k, v, cos=torch.ones(9, 1))
    with pytest.raises(ValueError, match="hn / 2"):
        gated_scan(f, k, v, cos=torch.ones(9, 2), sin=torch.ones(9, 2))
    with pytest.raises(ValueError, match="'torch' or 'triton'"):
        definition.scan_summary(f, k, v, implementation="cuda")


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "query_width", "rope", "gated"), [(70, 6, False, True), (70, 12, True, True), (136, 4, True, True), (72, 8, True, False)]
)
def test_scan_of_a_projection_is_that_of_its_slices(length, query_width, rope, gated, dtype):
    """Lengths that are a multiple of eight: the states for the backward pass lie in the projection."""
    from rat_megatron.ops.gated_scan import triton as gated_scan_triton

    hn = 4
    widths = [query_width, query_width * gated, hn, hn, hn]
    tables = [table(torch.rand(length, hn // 2)) for table in (torch.cos, torch.sin)] if rope else [None, None]
    projection = torch.randn(length, 2, 2, (1 + gated) * query_width + 3 * hn).to(dtype).requires_grad_()
    query, gate, k, v, f = projection.split(widths, dim=-1)
    if rope:
        query = rotate(query.float().unflatten(-1, (-1, hn)).flatten(2, 3), *tables).to(dtype).reshape(query.shape)
    expected = query, gate, *definition.gated_scan(f, k, v, None, *tables)[:2]
    weights = [torch.randn_like(x) for x in expected]
    gradient = torch.autograd.grad(expected, projection, weights)
    tolerance = 5e-6 if dtype == torch.float32 else 5e-3
    plain = partial(definition.scan_mixed_qkv, implementation="torch", output_gate=gated)
    for function, sizes in ((gated_scan_triton.scan_mixed_qkv, widths), (plain, query_width)):
        used_up = projection.detach().clone().requires_grad_()
        outputs = function(used_up, sizes, *tables)
        assert_close(outputs, expected, tolerance)
        assert_close(torch.autograd.grad(outputs, used_up, weights), gradient, tolerance)
    with torch.no_grad():
        assert_close(gated_scan_triton.scan_mixed_qkv(projection.clone(), widths, *tables), expected, tolerance)


@in_interpreter
def test_states_in_the_projection_take_no_memory_of_their_own():
    from rat_megatron.ops.gated_scan import triton as gated_scan_triton

    projection = torch.randn(64, 1, 2, 5 * 4).bfloat16()
    before, k = projection.clone(), projection[..., 8:12]
    room = gated_scan_triton._room_for_states(projection, k)
    room.fill_(1.0)
    assert room.shape == (8, 2, 1, 2, 2, 2) and room.data_ptr() == projection.data_ptr()
    kept = projection.view(8, 8, 2, 20)  # four of eight tokens hold a state
    assert (kept[:, :4, :, :4].view(torch.float32) == 1.0).all() and not (kept[:, 4:, :, :4].view(torch.float32) == 1.0).any()
    assert torch.equal(projection[..., 4:], before[..., 4:]), "nothing but queries is written over"
    assert gated_scan_triton._room_for_states(projection[:63], k[:63]) is None
    odd = projection.flatten()[1:].as_strided((56, 1, 2, 20), (40, 40, 20, 1))
    assert gated_scan_triton._room_for_states(odd, odd[..., 8:12]) is None
