"""The top-k kernels in Triton's interpreter, against the torch implementation in float64; real GPUs are tests/gpu's business."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from rat_megatron.ops.topk_attention import topk_attention
from rat_megatron.ratplus.pattern import HeadPattern
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_in_the_interpreter():
    """Triton must know that it interprets before it is imported, so the checks run in one process of their own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def draw(length: int, heads: int, groups: int, head_dim: int = 16, batch: int = 1) -> list[torch.Tensor]:
    """q [b, np, t, hn], k and v [b, ng, t, hn], as views of [t, b, heads, hn], and a gradient of the output."""
    generator = torch.Generator().manual_seed(length + heads)
    tensors = [torch.randn(length, batch, n, head_dim, generator=generator) for n in (heads, groups, groups, heads)]
    return [x.permute(1, 2, 0, 3) for x in tensors]


def values_and_gradients(attention, inputs, grad_out, *arguments) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs, *arguments)
    return [out, *torch.autograd.grad(out, inputs, grad_out)]


def check_equals_the_torch_implementation(word, length, heads, groups, tile, q_positions=None, k_positions=None, fused_blocks=512, dim=16):
    from rat_megatron.ops.topk_attention import triton as topk_attention_triton

    topk_attention_triton._TILE, topk_attention_triton._FUSED_BLOCKS = tile, fused_blocks
    topk_attention_triton._SCORES = 100  # of which torch chooses a few rows at a time
    *inputs, grad_out = draw(length, heads, groups, dim)
    every = torch.arange(length)
    q_at, k_at = (every if at is None else at for at in (q_positions, k_positions))
    inputs[0], grad_out = inputs[0][:, :, : len(q_at)], grad_out[:, :, : len(q_at)]
    head = HeadPattern.parse(word)
    # The choice of blocks in float64 and fp32 could differ only at a near tie, which these inputs do not have.
    expected = values_and_gradients(topk_attention, [x.double() for x in inputs], grad_out.double(), head, 0.25, q_at, k_at)
    actual = values_and_gradients(topk_attention, inputs, grad_out, head, 0.25, q_positions, k_positions, "triton")
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() <= 2e-6 * max(e.norm(), 1.0), (word, length, (a.double() - e).norm() / e.norm())


def check_errors():
    with pytest.raises(ValueError, match="multiple of 16"):
        topk_attention(*(torch.zeros(1, 1, 4, 24) for _ in range(3)), HeadPattern.parse("d2k2"), 1.0, implementation="triton")
    with pytest.raises(ValueError, match="cannot attend"):
        topk_attention(
            torch.zeros(1, 3, 4, 16), *(torch.zeros(1, 2, 4, 16) for _ in range(2)), HeadPattern.parse("d2k2"), 1.0, implementation="triton"
        )


if __name__ == "__main__":
    for word in ("d4k1", "d4k2", "d4k4", "d4k4+d", "d16k2+d", "d70k3", "d4k100"):
        for length in (1, 37):
            check_equals_the_torch_implementation(word, length, 2, 2, tile=16)
    check_equals_the_torch_implementation("d70k3+d", 161, 1, 1, tile=64)
    check_equals_the_torch_implementation("d8k3+d", 33, 2, 1, tile=16, dim=48)
    for groups in (1, 2):
        check_equals_the_torch_implementation("d8k3+d", 33, 4, groups, tile=16)
    for word in ("d4k2", "d4k4+d"):
        check_equals_the_torch_implementation(word, 45, 2, 1, tile=16, fused_blocks=0)
    for word in ("d8k3", "d8k3+d"):
        shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        check_equals_the_torch_implementation(word, 40, 2, 1, 16, q_positions=torch.tensor([30, 3, 4, 5, 39, 11]), k_positions=shuffled)
    check_errors()
