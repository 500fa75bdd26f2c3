"""The top-k kernels on a GPU: against the torch implementation in float64, and with the same result every time."""

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from rat_megatron.ops.topk_attention import topk_attention
from rat_megatron.ops.topk_attention import triton as module
from rat_megatron.ratplus import attention_ratplus
from rat_megatron.ratplus.pattern import HeadPattern


def draw(length: int, heads: int, groups: int, dtype: torch.dtype, dim: int = 64) -> list[torch.Tensor]:
    """q [b, np, t, hn], k and v [b, ng, t, hn] as views of [t, b, heads, hn], and a gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(length)
    tensors = [torch.randn(length, 2, n, dim, generator=generator, device="cuda").to(dtype) for n in (heads, groups, groups, heads)]
    return [x.permute(1, 2, 0, 3) for x in tensors]


def values_and_gradients(attention, inputs, grad_out, *arguments) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs, *arguments)
    return [out, *torch.autograd.grad(out, inputs, grad_out)]


def check(word: str, length: int, heads: int, groups: int, dtype: torch.dtype, tolerance: float, monkeypatch, dim: int = 64):
    *inputs, grad_out = draw(length, heads, groups, dtype, dim)
    head, scale, at = HeadPattern.parse(word), 1 / math.sqrt(dim), torch.arange(length, device="cuda")
    actual = values_and_gradients(topk_attention, inputs, grad_out, head, scale)
    chosen = module._chosen_blocks(*inputs[:2], head, at)
    # Near ties could fall otherwise in float64, so the choice is compared for itself, and given to the reference.
    monkeypatch.setattr(module, "_FUSED_BLOCKS", 0)
    by_torch = module._chosen_blocks(*inputs[:2], head, at)
    assert (chosen != by_torch).float().mean() <= 1e-5
    monkeypatch.undo()
    monkeypatch.setattr(attention_ratplus, "_QUERIES", length)
    monkeypatch.setattr(attention_ratplus, "choose_blocks", lambda *_: torch.nn.functional.pad(chosen.mT > 0, (0, 1)))
    exact = [x.double() for x in inputs]
    expected = values_and_gradients(topk_attention, exact, grad_out.double(), head, scale, at, at)
    for name, a, e in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        assert a.dtype == dtype and (a.double() - e).norm() <= tolerance * max(e.norm().item(), 1.0), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("word", "length"), [("d64k4", 700), ("d64k4+d", 700), ("d16k3+d", 129), ("d100k3", 333), ("d2k5", 1023), ("d64k4", 1)]
)
def test_equals_the_torch_implementation_in_float64(word, length, dtype, tolerance, monkeypatch):
    check(word, length, 4, 2, dtype, tolerance, monkeypatch)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(hn, torch.bfloat16) for hn in (64, 96, 128, 256)] + [(128, torch.float32), (96, torch.float32), (16, torch.float16)]
)
def test_head_dimensions(dim, dtype, monkeypatch):
    check("d64k4", 700, 2, 2, dtype, 1e-2, monkeypatch, dim)


def test_any_order_of_positions():
    *inputs, grad_out = draw(300, 4, 2, torch.float32)
    order = torch.randperm(300, device="cuda")
    head, at = HeadPattern.parse("d16k4+d"), order[:100]
    q, k, v = inputs[0][:, :, order[:100]], inputs[1][:, :, order], inputs[2][:, :, order]
    whole = module.topk_attention(*inputs, head, 1 / 8)
    part = module.topk_attention(q, k, v, head, 1 / 8, at, order)
    assert (part - whole[:, :, at]).norm() <= 1e-5 * part.norm()


def test_heads_of_128_and_the_same_result_every_time():
    *inputs, grad_out = draw(1000, 4, 2, torch.bfloat16, dim=128)
    head = HeadPattern.parse("d64k6+d")
    once, again = (values_and_gradients(topk_attention, inputs, grad_out, head, 1 / math.sqrt(128)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
