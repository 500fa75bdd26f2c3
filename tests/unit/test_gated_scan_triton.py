"""The Triton recurrence against the torch one, on the CPU: Triton's interpreter runs the kernels, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from rat_megatron.ops import gated_scan as definition

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


def assert_close(actual, expected, tolerance=1e-6):
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e.double()).norm() <= tolerance * e.double().norm()


# One step, less than a row, more than a chunk; channels odd, no power of two, full lanes; a carried state; RoPE; chunks of two blocks.
@in_interpreter
@pytest.mark.parametrize(
    ("length", "groups", "hn", "state", "rope", "long"),
    [(1, 1, 3, True, False, False), (70, 2, 6, False, True, False), (64, 1, 2, True, True, False), (130, 1, 2, True, False, True)],
)
def test_matches_the_torch_implementation(length, groups, hn, state, rope, long, monkeypatch):
    from rat_megatron.ops import gated_scan_triton

    monkeypatch.setattr(gated_scan_triton, "_LONG", 1 if long else 1 << 30)
    fused = torch.randn(1, length, groups, 3 * hn).transpose(0, 1)  # strided, the batch outside
    inputs = [x.requires_grad_() for x in fused.chunk(3, dim=-1)] + [torch.randn(2, 1, groups, hn).requires_grad_()] * state
    exact = [x.detach().double().requires_grad_() for x in inputs]
    tables = [table(torch.rand(length, hn // 2)) for table in (torch.cos, torch.sin)] if rope else [None, None]

    outputs = gated_scan_triton.gated_scan(*inputs[:3], inputs[3] if state else None, *tables)
    keys, values, final = definition.gated_scan(*exact)
    expected = [rotate(keys, *(x.double() for x in tables)) if rope else keys, values, final]
    weights = [torch.randn_like(x) for x in outputs]
    assert_close(outputs, expected)
    assert_close(torch.autograd.grad(outputs, inputs, weights), torch.autograd.grad(expected, exact, [x.double() for x in weights]))

    with torch.no_grad():  # the kernel that saves nothing
        assert_close(gated_scan_triton.gated_scan(*inputs[:3], inputs[3] if state else None, *tables), expected)
    summary = gated_scan_triton.scan_summary(*inputs[:3])
    assert_close([summary], [definition.scan_summary(*exact[:3])])  # as one: the decay alone may be too small for fp32
    adjoint = gated_scan_triton.adjoint_summary(inputs[0], weights[0], weights[1])
    assert_close([adjoint], [definition.adjoint_summary(exact[0], weights[0].double(), weights[1].double())])


@in_interpreter
@pytest.mark.parametrize("logit", [30.0, -30.0, torch.inf, -torch.inf])
def test_saturated_gates_stay_finite(logit):
    from rat_megatron.ops.gated_scan_triton import gated_scan

    f, k, v = (torch.randn(9, 1, 1, 2) for _ in range(3))
    inputs = [x.requires_grad_() for x in (torch.full_like(f, logit), k, v)]
    outputs = gated_scan(*inputs)
    assert all(x.isfinite().all() for x in [*outputs, *torch.autograd.grad([x.sum() for x in outputs], inputs)])


@in_interpreter
def test_refuses_what_does_not_fit():
    from rat_megatron.ops.gated_scan_triton import gated_scan

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
