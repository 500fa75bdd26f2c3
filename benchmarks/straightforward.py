"""RAT+ attention as one writes it down with what torch brings, and dense attention: what benchmarks/kernels.py compares with.

Everything is [b, heads, s, hn] here, as torch's attention takes it. Source: RAT+ (arXiv 2602.18196).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_BLOCK = 128  # of FlexAttention's masks


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention through cuDNN (on the CPU, torch's own)."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def scan(f: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gated recurrence over keys and values [b, heads, s, hn], in fp32."""
    gate = torch.sigmoid(f.float())

    def combine(before, after):
        (a, x, y), (next_a, next_x, next_y) = before, after
        return a * next_a, next_a * x + next_x, next_a * y + next_y

    # "generic": under torch.compile, "pointwise" gives the gate a gradient of zero without a word.
    _, keys, values = associative_scan(combine, (gate, (1 - gate) * k.float(), (1 - gate) * v.float()), dim=2, combine_mode="generic")
    return keys.to(k.dtype), values.to(v.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE of x [b, heads, s, hn] by cos and sin [s, hn / 2], in fp32."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def dilated_block_mask(length: int, dilation: int, device: str) -> BlockMask:
    """FlexAttention's mask of every dilation-th key and the query's own: each block up to the diagonal holds some."""

    def seen(b, h, query, key):
        return (key <= query) & (((key + 1) % dilation == 0) | (key == query))

    if length % _BLOCK or dilation > _BLOCK:
        return create_block_mask(seen, None, None, length, length, device=device)
    blocks = length // _BLOCK
    row = torch.arange(blocks, dtype=torch.int32, device=device)
    columns = row.expand(1, 1, blocks, blocks).contiguous()
    return BlockMask.from_kv_blocks((row + 1)[None, None], columns, BLOCK_SIZE=_BLOCK, mask_mod=seen, seq_lengths=(length, length))


def operator(f: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask) -> Tensor:
    """Scan, RoPE and attention under the mask; to be compiled."""
    k, v = scan(f, k, v)
    return flex_attention(rope(q, cos, sin), rope(k, cos, sin), v, block_mask=mask)


def compiled(function):
    """torch.compile for fixed shapes; on the CPU, where Megatron's compilation is off too, the function itself."""
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


def decode(q, f, k, v, cos, sin, cache_k, cache_v, state) -> Tensor:
    """One token: state, RoPE, the last entry of a full cache, and attention over it; to be compiled.

    q, f, k, v [b, heads, hn], cos and sin [b, hn / 2], cache_k and cache_v [b, heads, n, hn], state [2, b, heads, hn] in fp32.
    """
    gate = torch.sigmoid(f.float())
    state.copy_(gate * state + (1 - gate) * torch.stack([k, v]).float())
    cos, sin = cos[:, None], sin[:, None]
    cache_k[:, :, -1] = rope(state[0], cos, sin).to(cache_k.dtype)
    cache_v[:, :, -1] = state[1].to(cache_v.dtype)
    return F.scaled_dot_product_attention(rope(q, cos, sin)[:, :, None], cache_k, cache_v)[:, :, 0]
