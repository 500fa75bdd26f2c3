"""The Triton recurrence on a GPU, compared with float64."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from rat_megatron.ops import gated_scan as public

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from rat_megatron.ops.gated_scan import triton as gated_scan_triton
from rat_megatron.ops.gated_scan.triton import adjoint_summary, gated_scan, scan_summary
from rat_megatron.ratplus.rotary_ratplus import apply_rotary
from tests.ranks_in_turns import scan_in_turns

definition = SimpleNamespace(
    **{name: partial(getattr(public, name), implementation="torch") for name in ("gated_scan", "scan_summary", "adjoint_summary")}
)
LENGTHS = [1, 2, 63, 64, 65, 300, 4096, 262144]


def random_inputs(length, groups, hn, dtype, batch=1):
    """f, k, v as slices of one projection, [length, batch, groups, hn], and an initial state."""
    fused = torch.randn(length, batch, groups, 3 * hn, device="cuda").to(dtype)
    return [x.requires_grad_() for x in (*fused.chunk(3, dim=-1), torch.randn(2, batch, groups, hn, device="cuda"))]


def assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        error = ((a.double() - e.double()).norm() / e.double().norm()).item()
        assert error <= tolerance, error


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients(length, dtype, tolerance):
    inputs = random_inputs(length, 1 if length > 4096 else 3, 128, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = gated_scan(*inputs), definition.gated_scan(*exact)
    weights = [torch.randn_like(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights)
    assert_close(outputs, expected, tolerance)
    assert_close(gradients, torch.autograd.grad(expected, exact, [x.double() for x in weights]), tolerance)
    again = gated_scan(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, inputs, weights), gradients, strict=True))
    with torch.no_grad():
        assert_close(gated_scan(*inputs), expected, tolerance)
        # Compared as one: the decay alone may be too small for fp32.
        assert_close([scan_summary(*inputs[:3])], [definition.scan_summary(*exact[:3])], 1e-6)
        adjoint = adjoint_summary(inputs[0], weights[0], weights[1])
        assert_close([adjoint], [definition.adjoint_summary(exact[0], weights[0].double(), weights[1].double())], 1e-6)


@pytest.mark.parametrize(
    ("hn", "dtype", "tolerance"), [(hn, torch.bfloat16, 3e-3) for hn in (64, 96, 128, 256)] + [(96, torch.float32, 1e-6)]
)
def test_rope_on_the_keys_alone(hn, dtype, tolerance):
    inputs = random_inputs(300, 2, hn, dtype, batch=3)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    cos, sin = (table(torch.rand(300, hn // 2, device="cuda") * 6) for table in (torch.cos, torch.sin))
    outputs = gated_scan(*inputs, cos, sin)
    expected = definition.gated_scan(*exact, cos.double(), sin.double())
    weights = [torch.randn_like(x) for x in outputs]
    assert_close(outputs, expected, tolerance)
    gradients = torch.autograd.grad(expected, exact, [x.double() for x in weights])
    assert_close(torch.autograd.grad(outputs, inputs, weights), gradients, tolerance)


@pytest.mark.parametrize("logit", [30.0, -30.0])
def test_saturated_gates(logit):
    f, k, v, state = random_inputs(300, 2, 128, torch.float32)
    f = torch.full_like(f, logit).requires_grad_()
    outputs = gated_scan(f, k, v, state)
    assert all(x.isfinite().all() for x in torch.autograd.grad([x.sum() for x in outputs], [f, k, v, state]))
    exact = definition.gated_scan(*(x.detach().double() for x in (f, k, v, state)))
    assert_close(outputs, exact, 1e-6)


def test_a_nan_spreads_and_hangs_nothing():
    f, k, v, _ = (x.detach() for x in random_inputs(4096, 2, 128, torch.bfloat16))
    k[100], f[200] = torch.nan, torch.nan
    keys, values, _ = gated_scan(f, k, v)
    assert keys[:100].isfinite().all() and keys[100:].isnan().all()
    assert values[:200].isfinite().all() and values[200:].isnan().all()


def test_the_public_functions_choose_the_kernels(monkeypatch):
    f, k, v, state = (x.detach() for x in random_inputs(300, 2, 128, torch.bfloat16))
    for name, arguments in (("gated_scan", (f, k, v, state)), ("scan_summary", (f, k, v)), ("adjoint_summary", (f, k, v))):
        chosen, kernels, torchs = (
            getattr(public, name)(*arguments, implementation=implementation) for implementation in (None, "triton", "torch")
        )
        pairs = list(zip(chosen, kernels, torchs, strict=True))
        assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)
        with monkeypatch.context() as patch:
            patch.setenv("RAT_KERNELS", "torch")
            assert all(torch.equal(a, b) for a, b in zip(getattr(public, name)(*arguments), torchs, strict=True))


@pytest.mark.parametrize(("length", "logit"), [(1, 30.0), (1, -30.0), (1, 0.0), (1000, 30.0), (1000, -30.0), (1000, 0.0)])
def test_chunks_joined_by_their_summaries_equal_one_scan(length, logit):
    f, k, v, state = (x.detach().float() for x in random_inputs(3 * length, 2, 128, torch.float32))
    f = f + logit
    exact = public.gated_scan(*(x.double() for x in (f, k, v)), state.double())
    outputs = []
    for part in (slice(0, length), slice(length, 2 * length), slice(2 * length, 3 * length)):
        outputs.append(public.gated_scan(f[part], k[part], v[part], state)[:2])
        decay, *ends = public.scan_summary(f[part], k[part], v[part])
        state = decay * state + torch.stack(ends)
    assert_close([*(torch.cat(x) for x in zip(*outputs, strict=True)), state], exact, 2e-6)


@pytest.mark.parametrize(
    ("length", "groups", "heads", "hn"), [(300, 3, 2, 128), (4096, 2, 1, 128), (300, 2, 3, 64), (300, 2, 2, 96), (300, 1, 2, 256)]
)
def test_scan_of_a_projection_is_that_of_its_slices(length, groups, heads, hn):
    query_width = heads * hn
    cos, sin = (table(torch.rand(length, hn // 2, device="cuda") * 6) for table in (torch.cos, torch.sin))
    projection = torch.randn(length, 2, groups, 2 * query_width + 3 * hn, device="cuda").bfloat16().requires_grad_()
    query, gate, k, v, f = projection.split([query_width, query_width, hn, hn, hn], dim=-1)
    turned = apply_rotary(query.unflatten(-1, (-1, hn)), cos[:, None, None, None], sin[:, None, None, None]).flatten(-2)
    expected = turned, gate, *gated_scan(f, k, v, None, cos, sin)[:2]
    used_up = projection.detach().clone().requires_grad_()
    outputs = public.scan_mixed_qkv(used_up, query_width, cos, sin)
    assert all("ScanMixedQkv" in type(x.grad_fn).__name__ for x in outputs), "one gradient buffer, not five to join"
    assert all(torch.equal(a, e) for a, e in zip(outputs[1:], expected[1:], strict=True))
    assert_close(outputs[:1], expected[:1], 2e-3)
    weights = [torch.randn_like(x) for x in expected]
    gradient, wanted = torch.autograd.grad(outputs, used_up, weights)[0], torch.autograd.grad(expected, projection, weights)[0]
    assert torch.equal(gradient[..., query_width:], wanted[..., query_width:])
    assert_close([gradient[..., :query_width]], [wanted[..., :query_width]], 5e-3)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("size", "shape"), [(1, (2, 128)), (2, (32, 128)), (8, (3, 5, 43))])
def test_states_of_chunks(size, shape, back):
    gathered = torch.randn(size, 3, 2, *shape, device="cuda")
    decays, ends = gathered[:, 0].sigmoid_(), gathered[:, 1:]
    for rank in range(size):
        states = public.states_of_chunks(decays, ends, rank, back, implementation="triton")
        exact = public.states_of_chunks(decays.double(), ends.double(), rank, back)
        torch.testing.assert_close(states.double(), exact, rtol=1e-5, atol=1e-6)


def test_states_of_chunks_chooses_the_kernel(monkeypatch):
    gathered = torch.randn(4, 3, 2, 4, 128, device="cuda")
    decays, ends = gathered[:, 0].sigmoid_(), gathered[:, 1:]
    launched = []
    monkeypatch.setattr(gated_scan_triton, "states_of_chunks", lambda *args: launched.append(args))
    public.states_of_chunks(decays, ends, 1)
    public.states_of_chunks(decays.double(), ends.double(), 1)
    assert len(launched) == 1


# Every rank after the other, on one GPU. The last: few heads and a long chunk, whose programs wait for each other in groups.
@pytest.mark.parametrize(
    ("size", "chunk", "batch", "groups", "hn", "dtype", "tolerance"),
    [
        (2, 1024, 1, 16, 128, torch.bfloat16, 5e-3),
        (2, 333, 2, 3, 128, torch.bfloat16, 5e-3),
        (4, 65, 2, 2, 64, torch.float32, 2e-6),
        (2, 16384, 1, 1, 128, torch.bfloat16, 5e-3),
    ],
)
def test_a_scan_over_several_ranks_is_that_of_one(size, chunk, batch, groups, hn, dtype, tolerance, monkeypatch):
    query_width = 2 * hn
    projection = torch.randn(2 * size * chunk, batch, groups, 2 * query_width + 3 * hn, device="cuda").to(dtype)
    exact = projection.double().requires_grad_()
    expected = public.scan_mixed_qkv(exact, query_width)
    weights = [torch.randn(x.shape, device="cuda").to(dtype) for x in expected]
    gradient = torch.autograd.grad(expected, exact, [x.double() for x in weights])
    actual = scan_in_turns(monkeypatch, projection, query_width, weights, size)
    assert_close(actual, [*expected, *gradient], tolerance)
    again = scan_in_turns(monkeypatch, projection, query_width, weights, size)
    assert all(torch.equal(a, b) for a, b in zip(again, actual, strict=True))
