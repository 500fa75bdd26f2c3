"""The decode kernel in Triton's interpreter, against the torch step; real GPUs are tests/gpu's business."""

import os
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch

from rat_megatron.ops.decode import decode_step
from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.pattern import HeadPattern
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_in_the_interpreter():
    """Triton must know that it interprets before it is imported, so the checks run in one process of their own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def check_steps_equal_the_torch_step(word, heads, groups, dtype, tolerance, lengths, splits=1, steps=2, head_dim=16, max_length=80):
    """Several tokens of every row, from caches of random entries; unused slots hold NaN, and so do slots the pattern has left."""
    from rat_megatron.ops.decode import triton as decode_triton

    decode_triton._split_count = lambda *_: splits
    head, batch = HeadPattern.parse(word), len(lengths)
    generator = torch.Generator().manual_seed(len(word) + heads)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    cache = HeadCache(head, torch.empty(batch, groups, 1, head_dim, dtype=dtype), max_length, "bounds")
    lengths = torch.tensor(lengths)
    stored = head.slot_positions(cache.k.shape[2], lengths)[:, None, :, None]
    cache.k.copy_(draw(*cache.k.shape).where(stored >= 0, torch.nan))
    cache.v.copy_(draw(*cache.v.shape).where(stored >= 0, torch.nan))
    cache.state.copy_(draw(*cache.state.shape))
    expected_cache = deepcopy(cache)
    for _ in range(steps):
        q, fkv = draw(batch, heads, head_dim), draw(batch, groups, 3 * head_dim)
        f, k, v = fkv.split(head_dim, dim=-1)  # strided, as a fused projection leaves them
        cos, sin = draw(batch, head_dim // 2), draw(batch, head_dim // 2)
        expected = decode_step(q, f, k, v, cos, sin, expected_cache, lengths, 0.3, "torch")
        out = decode_step(q, f, k, v, cos, sin, cache, lengths, 0.3, "triton")
        assert_close(out, expected, tolerance)
        for name in ("k", "v", "state"):
            actual, wanted = getattr(cache, name), getattr(expected_cache, name)
            assert torch.equal(actual.isnan(), wanted.isnan())
            assert_close(actual.nan_to_num(), wanted.nan_to_num(), tolerance)
        lengths = lengths + 1


def assert_close(actual, expected, tolerance):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error


def check_saturated_gates():
    for gate in (30.0, -30.0, torch.inf, -torch.inf):
        caches = [HeadCache(HeadPattern(4), torch.empty(1, 1, 1, 16), 8, "bounds") for _ in range(2)]
        x = torch.randn(3, 1, 1, 16, generator=torch.Generator().manual_seed(1))
        inputs = (x[0], torch.full_like(x[0], gate), x[1], x[2], torch.ones(1, 8), torch.zeros(1, 8))
        for lengths in (torch.tensor([3]), torch.tensor([4])):
            out = decode_step(*inputs, caches[0], lengths, 0.3, "triton")
            expected = decode_step(*inputs, caches[1], lengths, 0.3, "torch")
            assert torch.allclose(out, expected, rtol=1e-5, atol=0)


def check_errors():
    cache = HeadCache(HeadPattern(4), torch.empty(1, 1, 1, 16), 8, "bounds")
    strided = deepcopy(cache)
    strided.k = torch.zeros(1, 1, 16, 2).mT
    x, tables, lengths = torch.zeros(1, 1, 16), torch.zeros(1, 8), torch.tensor([0])
    with pytest.raises(ValueError, match="contiguous cache"):
        decode_step(x, x, x, x, tables, tables, strided, lengths, 1.0, "triton")
    with pytest.raises(ValueError, match="of unit stride"):
        decode_step(torch.zeros(1, 1, 32)[..., ::2], x, x, x, tables, tables, cache, lengths, 1.0, "triton")


if __name__ == "__main__":
    RAGGED = [0, 5, 36, 77]
    for word in ("dense", "d4w3s2", "w5s2", "s3", "d3s7", "d4w40"):
        check_steps_equal_the_torch_step(word, 1, 1, torch.float32, 1e-6, RAGGED)
    for splits in (1, 2, 3):
        check_steps_equal_the_torch_step("dense", 2, 2, torch.float32, 1e-6, [77, 30], splits)
        check_steps_equal_the_torch_step("d2w3s2", 6, 2, torch.float32, 1e-6, [36, 3], splits)
    for splits in (1, 2):
        check_steps_equal_the_torch_step("d2w3s2", 2, 1, torch.float32, 1e-6, [36, 3], splits, head_dim=48)
    for heads in (1, 20):
        check_steps_equal_the_torch_step("d2w3s2", heads, 1, torch.float16, 1e-3, RAGGED)  # the interpreter multiplies no bf16 matrices
    check_steps_equal_the_torch_step("d4", 1, 1, torch.float32, 1e-6, [79, 80, 86], steps=4)  # full rows
    check_saturated_gates()
    check_errors()
