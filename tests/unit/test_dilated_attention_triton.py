"""Fused dilated attention in Triton's interpreter, on the CPU: values and gradients against the torch implementation in float64.

Triton chooses the interpreter when it is imported, so the checks run in a process of their own, which is this file as a script.
"""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rat_megatron.ops import dilated_attention as reference
from rat_megatron.ops.dilated_attention import folding
from rat_megatron.ratplus.pattern import AttentionPattern, HeadPattern, LayerPattern

pytestmark = pytest.mark.slow

SCALE, DIM = 0.3, 16
# Pattern, length, query heads, key heads, sequences: no dilation, no window, length 1, below D, no multiple of D, W > T, S > T.
WHOLE = [
    ("d16", 40, 2, 2, 1),
    ("d4s3", 37, 2, 1, 3),
    ("d8w5s2", 50, 4, 2, 1),
    ("w9s2", 45, 2, 1, 1),
    ("d4w100", 20, 2, 2, 1),
    ("s40", 33, 2, 2, 1),
    ("d64", 20, 1, 1, 1),
    ("w0", 1, 2, 2, 2),
]
# Pattern, length, query heads, key heads, sequences, head size: queries that the kernel turns.
TURNED = [
    ("d4", 37, 2, 2, 2, 16),
    ("d4w3s2", 37, 4, 2, 1, 64),
    ("w5s1", 33, 2, 1, 2, 16),
    ("d8", 20, 2, 1, 1, 64),
    ("d4w3", 1, 1, 1, 1, 16),
    ("d4w3s2", 18, 1, 1, 1, 256),
    ("d4w3s2", 21, 2, 1, 2, 48),
]
# Pattern, length, first query, keys held before it.
SEGMENTS = [("d4s3", 30, 17, 0), ("d4w3s2", 30, 13, 5), ("w4s6", 25, 12, 8), ("d4s6", 30, 3, 0)]


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_agrees_with_the_torch_implementation():
    root = Path(__file__).parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def test_folds_only_what_cudnn_can_serve():
    q = torch.empty(4096, 1, 1, 128, dtype=torch.bfloat16)
    assert not folding.can_fold(q, HeadPattern(16))  # on the CPU
    assert folding.skipped_rows(HeadPattern(16, window=32)) == 48
    assert folding.whole_rows(q[:100], HeadPattern(16)) == 96


def random(length: int, heads: int, batch: int, dtype: torch.dtype, dim: int = DIM) -> torch.Tensor:
    return torch.randn(length, batch, heads, dim).to(dtype).requires_grad_()


def compare(function, expected_function, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Values and gradients of a function, for random outer gradients, against those of another one in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = expected_function(*exact)
    grad = torch.randn_like(expected).to(inputs[0].dtype)
    actual = function(*inputs)
    assert actual.dtype == inputs[0].dtype and actual.is_contiguous()
    pairs = zip(
        [actual, *torch.autograd.grad(actual, inputs, grad)],
        [expected, *torch.autograd.grad(expected, exact, grad.double())],
        strict=True,
    )
    for got, want in pairs:
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-6


def check_whole(word: str, length: int, heads: int, groups: int, batch: int, dtype: torch.dtype, tolerance: float) -> None:
    head = HeadPattern.parse(word)
    inputs = [random(length, n, batch, dtype) for n in (heads, groups, groups)]
    expected = partial(reference.dilated_attention, pattern=LayerPattern((head,)), softmax_scale=SCALE)
    compare(partial(fused.dilated_attention, head=head, softmax_scale=SCALE), expected, inputs, tolerance)


def check_segment(word: str, length: int, start: int, before: int, dim: int = DIM) -> None:
    head = HeadPattern.parse(word)
    at = reference.kept_positions(head, length)
    q, k, v = (random(length, n, 2, torch.float32, dim).detach() for n in (2, 1, 1))
    inputs = [q[start:], k[start - before :], v[start - before :], k[at], v[at]]
    inputs = [x.clone().requires_grad_() for x in inputs]
    options = {"head": head, "softmax_scale": SCALE, "start": start}
    compare(partial(fused.segment_attention, **options), partial(reference.segment_attention, kept_at=at, **options), inputs, 1e-5)


def random_tables(length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.randn(length, dim // 2).mul(3)
    return angle.cos(), angle.sin()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [s, b, np, hn] in float64, as a product of complex numbers."""
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())[:, None, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def check_turned(word: str, length: int, heads: int, groups: int, batch: int, dim: int, dtype: torch.dtype, tolerance: float) -> None:
    pattern = AttentionPattern.parse(word).layer(0)
    cos, sin = random_tables(length, dim)
    inputs = [random(length, n, batch, dtype, dim) for n in (heads, groups, groups)]

    def expected(q, k, v):
        return reference.dilated_attention(turned(q, cos, sin), k, v, pattern, SCALE, implementation="masked")

    def actual(q, k, v, cos=cos, sin=sin):
        return reference.dilated_attention(q, k, v, pattern, SCALE, implementation="triton", cos=cos, sin=sin)

    compare(lambda *inputs: actual(*inputs).contiguous(), expected, inputs, tolerance)
    q, k, v = (x.detach() for x in inputs)
    exact, outputs = expected(q.double(), k.double(), v.double()), [actual(q, k, v)]
    wide = torch.randn(batch, length, 2 * heads, dim + 8).to(dtype)  # strides that are no multiple of each other
    strided = wide[:, :, ::2, :dim].transpose(0, 1).copy_(q)
    outputs.append(actual(strided, k, v, cos.T.contiguous().T, sin.T.contiguous().T))
    for out in outputs:
        assert out.dtype == dtype and (out.double() - exact).norm() <= tolerance * exact.norm()
    assert torch.equal(*outputs)
    alone = rope_triton.apply_rope(strided, cos, sin)  # what cuDNN is given
    assert alone.is_contiguous() and (alone.double() - turned(q.double(), cos, sin)).norm() <= tolerance * q.double().norm()


def check_any_memory_layout() -> None:
    head = HeadPattern.parse("d4w2s1")
    q = random(20, 2, 2, torch.float32).detach().transpose(0, 1).contiguous().transpose(0, 1)
    k, v = torch.randn(20, 2, 2, 40)[..., :32].split(16, dim=-1)
    expected = fused.dilated_attention(q.contiguous(), k.contiguous(), v.contiguous(), head, SCALE)
    assert torch.equal(fused.dilated_attention(q, k, v, head, SCALE), expected)


def check_large_scores() -> None:
    inputs = [(100 * random(40, 1, 1, torch.float32)).detach().requires_grad_() for _ in range(3)]
    out = fused.dilated_attention(*inputs, HeadPattern.parse("d4w6"), 1.0)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), inputs)))


def check_refuses_what_does_not_fit() -> None:
    q = random(8, 2, 1, torch.float32)
    wrong = [
        ((q, q, q, HeadPattern.parse("d4k2"), SCALE), "chooses keys by score"),
        ((q, q[:4], q[:4], HeadPattern(4), SCALE), "as many queries as keys"),
        ((q, q, q.half(), HeadPattern(4), SCALE), "one of bf16, fp16 and fp32"),
        ((q, q, q, HeadPattern(4), -1.0), "not positive"),
        ((q, q, q, HeadPattern(4), SCALE, "fast"), "not 'fast'"),
        ((q, q, q, HeadPattern(4), SCALE, "folded"), "does not fit the folded implementation"),
        ((q, q, q, HeadPattern(4), SCALE, None, torch.ones(8, 8)), "needs both cos and sin"),
        ((q, q, q, HeadPattern(4), SCALE, None, torch.ones(7, 8), torch.ones(7, 8)), r"must be \[s, hn / 2\]"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            fused.dilated_attention(*arguments)
    with pytest.raises(ValueError, match="cannot use keys from 4 on"):
        fused.segment_attention(q[4:], q[4:], q[4:], q[:1], q[:1], HeadPattern(4, window=2), SCALE, 4)
    with pytest.raises(ValueError, match="1 keys are kept before position 4"):
        fused.segment_attention(q[4:], q[4:], q[4:], q[:0], q[:0], HeadPattern(4), SCALE, 4)


if __name__ == "__main__":
    from rat_megatron.ops.dilated_attention import triton as fused
    from rat_megatron.ops.rope import triton as rope_triton

    fused._tiles = lambda *_: {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1}  # short sequences run through many tiles
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    for case in WHOLE:
        check_whole(*case, torch.float32, 1e-5)
    check_whole("d8w5s2", 50, 4, 2, 1, torch.float16, 2e-3)
    for case in TURNED:
        check_turned(*case, torch.float32, 1e-5)
    check_turned("d4w3s2", 37, 4, 2, 1, 64, torch.float16, 2e-3)
    check_turned("{dense,d4,d4k3,w5s1}", 33, 4, 2, 2, 16, torch.float32, 1e-5)
    for case in SEGMENTS:
        check_segment(*case)
    check_segment("d4w3s2", 30, 13, 5, dim=48)
    check_any_memory_layout()
    check_large_scores()
    check_refuses_what_does_not_fit()
