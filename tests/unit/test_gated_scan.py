"""The recurrence against its definition: values, gradients, state carried over, saturated gates, any length and layout."""

import pytest
import torch

from rat_megatron.ops.gated_scan import (
    adjoint_summary,
    gated_scan,
    scan_backward,
    scan_forward,
    scan_mixed_qkv,
    scan_summary,
    states_of_chunks,
)
from tests import reference
from tests.ranks_in_turns import own_part, scan_in_turns

LENGTHS = [1, 2, 17, 64, 65, 300]  # below, at and above a chunk; 300 leaves tokens past the last full chunk


def random_inputs(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """f, k, v [length, 2, 3, 4] and an initial state [2, 2, 3, 4]."""
    generator = torch.Generator().manual_seed(seed + length)
    f, k, v = (torch.randn(length, 2, 3, 4, dtype=torch.float64, generator=generator).to(dtype) for _ in range(3))
    state = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=generator)
    return [x.requires_grad_() for x in (f, k, v, state if dtype == torch.float64 else state.float())]


def scan_by_definition(f, k, v, state):
    """A token before the first, with gate 0, sets the state: the definition starts from zero."""
    f = torch.cat([torch.full_like(f[:1], -torch.inf), f])
    k, v = (torch.cat([start[None], x]) for start, x in zip(state, (k, v), strict=True))
    k, v = (reference.recurrence(x.transpose(0, 1), f.transpose(0, 1)).transpose(0, 1)[1:] for x in (k, v))
    return k, v, torch.stack([k[-1], v[-1]])


def values_and_gradients(scan, inputs, seed: int = 1):
    """Outputs of ``scan`` and gradients of all inputs under random weights on all outputs."""
    generator = torch.Generator().manual_seed(seed)
    outputs = scan(*inputs)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(torch.bfloat16).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def assert_close(actual, expected, tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e.double()).norm() <= tolerance * e.double().norm()


@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_definition_in_float64(length):
    inputs = random_inputs(length)
    assert_close(values_and_gradients(gated_scan, inputs), values_and_gradients(scan_by_definition, inputs), 1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_starts_from_zero_without_a_state(length):
    f, k, v, state = random_inputs(length)
    expected = values_and_gradients(lambda f, k, v: scan_by_definition(f, k, v, torch.zeros_like(state)), [f, k, v])
    assert_close(values_and_gradients(gated_scan, [f, k, v]), expected, 1e-12)


def test_gradients_by_finite_differences():
    torch.autograd.gradcheck(gated_scan, random_inputs(5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("length", LENGTHS)
def test_lower_precision_loses_only_the_rounding_of_inputs_and_outputs(length, dtype, tolerance):
    inputs = random_inputs(length, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    actual = values_and_gradients(gated_scan, inputs)
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32, dtype, dtype, dtype, torch.float32]
    assert_close(actual, values_and_gradients(scan_by_definition, exact), tolerance)


@pytest.mark.parametrize("logit", [30.0, 100.0, -30.0, -100.0])
def test_saturated_gates_stay_finite(logit):
    f, k, v, state = random_inputs(65, torch.float32)
    f = torch.full_like(f, logit).requires_grad_()
    assert all(x.isfinite().all() for x in values_and_gradients(gated_scan, [f, k, v, state]))


def test_saturated_gates_keep_or_replace_the_state():
    f, k, v, state = random_inputs(65, torch.float32)
    closed_k, closed_v, _ = gated_scan(torch.full_like(f, -100.0), k, v, state)
    assert torch.equal(closed_k, k) and torch.equal(closed_v, v)
    assert torch.equal(gated_scan(torch.full_like(f, 100.0), k, v, state)[2], state)
    # A gate that fp32 cannot tell from 1 still lets its share of the tokens in.
    open_k, _, _ = gated_scan(torch.full_like(f, 30.0), k, v)
    share = torch.sigmoid(torch.tensor(-30.0, dtype=torch.float64))
    assert_close([open_k], [share * k.double().cumsum(0)], 1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_any_memory_layout(length):
    generator = torch.Generator().manual_seed(length)
    fused = torch.randn(2, length, 3, 12, dtype=torch.float64, generator=generator).transpose(0, 1).requires_grad_()
    strided = values_and_gradients(lambda x: gated_scan(*x.chunk(3, dim=-1)), [fused])
    packed = values_and_gradients(lambda x: gated_scan(*(part.contiguous() for part in x.chunk(3, dim=-1))), [fused])
    assert_close(strided, packed, 1e-12)


@pytest.mark.parametrize(("length", "cut"), [(2, 1), (65, 17), (300, 64), (300, 299)])
def test_two_halves_with_the_state_carried_equal_one_scan(length, cut):
    def in_halves(f, k, v, state):
        first_k, first_v, state = gated_scan(f[:cut], k[:cut], v[:cut], state)
        second_k, second_v, state = gated_scan(f[cut:], k[cut:], v[cut:], state)
        return torch.cat([first_k, second_k]), torch.cat([first_v, second_v]), state

    inputs = random_inputs(length)
    assert_close(values_and_gradients(in_halves, inputs), values_and_gradients(gated_scan, inputs), 1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_summary_maps_the_initial_state_to_the_final_one(length):
    f, k, v, state = random_inputs(length)
    decay, *ends = scan_summary(f, k, v)
    assert_close([decay], [torch.sigmoid(f).prod(0)], 1e-12)
    assert_close([decay * state + torch.stack(ends)], [gated_scan(f, k, v, state)[2]], 1e-12)


def test_summaries_of_stretches_compose():
    f, k, v, state = random_inputs(300)
    for part in (slice(0, 100), slice(100, 117), slice(117, 300)):
        decay, *ends = scan_summary(f[part], k[part], v[part])
        state = decay * state + torch.stack(ends)
    assert_close([state], [gated_scan(*random_inputs(300))[2]], 1e-12)


def test_summary_is_fp32_and_not_differentiable():
    summary = scan_summary(*random_inputs(17, torch.bfloat16)[:3])
    assert summary.shape == (3, 2, 3, 4) and summary.dtype == torch.float32 and not summary.requires_grad


def test_later_tokens_do_not_change_earlier_outputs():
    f, k, v, state = (x.detach() for x in random_inputs(300, torch.float32))
    before = gated_scan(f, k, v, state)
    for x in (f, k, v):
        x[150] += 1.0
    after = gated_scan(f, k, v, state)
    assert all(torch.equal(a[:150], b[:150]) and not torch.equal(a[150], b[150]) for a, b in zip(before[:2], after[:2], strict=True))


def test_is_deterministic():
    inputs = random_inputs(300, torch.float32)
    runs = [values_and_gradients(gated_scan, inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_outputs_hold_no_memory_but_their_own():
    for x in gated_scan(*random_inputs(65, torch.float32)):
        assert x.untyped_storage().nbytes() == x.nbytes


def test_refuses_shapes_that_do_not_fit():
    f, k, v, state = random_inputs(17)
    with pytest.raises(ValueError, match="share one shape"):
        gated_scan(f[:16], k, v)
    with pytest.raises(ValueError, match="s >= 1"):
        gated_scan(f[:0], k[:0], v[:0])
    with pytest.raises(ValueError, match="initial_state has shape"):
        gated_scan(f, k, v, state[0])


@pytest.mark.parametrize("length", [1, 17, 65, 130])
def test_adjoint_summary_is_the_gradient_of_the_initial_state(length):
    f, k, v, grad_k, grad_v = (torch.randn(length, 2, 2, 3, dtype=torch.float64) for _ in range(5))
    initial = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    out_k, out_v, _ = gated_scan(f, k, v, initial)
    (expected,) = torch.autograd.grad((out_k * grad_k + out_v * grad_v).sum(), initial)
    assert (adjoint_summary(f, grad_k, grad_v) - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_states_of_chunks_are_those_of_one_chunk_after_the_other(size, back):
    decays, ends = torch.rand(2 * size, 2, 3, dtype=torch.float64), torch.randn(2 * size, 2, 2, 3, dtype=torch.float64)
    before, state = [None] * 2 * size, torch.zeros(2, 2, 3, dtype=torch.float64)
    for chunk in reversed(range(2 * size)) if back else range(2 * size):
        before[chunk], state = state, decays[chunk] * state + ends[chunk]
    gathered_decays = torch.stack([own_part(decays, rank, size) for rank in range(size)])
    gathered_ends = torch.stack([own_part(ends, rank, size) for rank in range(size)]).transpose(1, 2)
    for rank in range(size):
        actual = states_of_chunks(gathered_decays, gathered_ends, rank, back)
        assert torch.equal(actual.transpose(0, 1), own_part(torch.stack(before), rank, size))


def test_states_of_chunks_refuses_what_does_not_fit():
    decays, ends = torch.rand(2, 2, 3), torch.rand(2, 2, 2, 3)
    for wrong in ((decays[:1], ends, 0), (decays, ends[:, :1], 0), (decays[:, :1], ends[:, :, :1], 0), (decays, ends, 2)):
        with pytest.raises(ValueError, match="two chunks a rank"):
            states_of_chunks(*wrong)


@pytest.mark.parametrize("length", LENGTHS)
def test_both_passes_alone_are_those_of_autograd(length):
    f, k, v, state = random_inputs(length)
    expected = gated_scan(f, k, v, state)
    weights = [torch.randn_like(x) for x in expected]
    *outputs, saved = scan_forward(f, k, v, state, training=True)
    out = torch.empty(length, 2, 3, 12, dtype=torch.float64).chunk(3, dim=-1)
    scan_backward(f, k, v, saved, *weights, out)
    assert_close([*outputs, *out], [*expected[:2], *torch.autograd.grad(expected, (f, k, v), weights)], 1e-12)
    assert scan_forward(f, k, v, state, training=False)[2] is None


@pytest.mark.parametrize(("size", "chunk"), [(1, 3), (2, 1), (2, 70), (4, 17)])
def test_a_scan_over_several_ranks_is_that_of_one(size, chunk, monkeypatch):
    projection = torch.randn(2 * size * chunk, 2, 3, 2 * 10 + 3 * 5, dtype=torch.float64).requires_grad_()
    expected = scan_mixed_qkv(projection, 10)
    weights = [torch.randn_like(x) for x in expected]
    actual = scan_in_turns(monkeypatch, projection, 10, weights, size)
    assert_close(actual, [*expected, *torch.autograd.grad(expected, projection, weights)], 1e-12)
