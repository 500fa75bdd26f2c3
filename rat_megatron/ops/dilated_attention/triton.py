"""Fused attention over the keys that a dilated pattern keeps: Triton kernels, with cuDNN for a long dilated past.

A query sees two disjoint sets of keys: its band, the W keys before it and itself, and of the kept list, the sinks and then the dilated
keys, those older than the band. One online softmax runs over both, and every gradient is summed in a fixed order.
Source: RAT+ (arXiv 2602.18196), dilated attention with local window and sinks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rat_megatron.ops.dilated_attention import folding, kernels
from rat_megatron.ops.dispatch import HEAD_DIMS, fill_tiles, processor_count
from rat_megatron.ops.rope import apply_rope, check_rope
from rat_megatron.ratplus.pattern import HeadPattern

# Kept keys from which cuDNN on folded queries is faster than the kernels here. Measured on an H100, forward; half of it is a tie.
_FOLD_FROM = 2048
# Programs per processor among which the queries of few kept keys are split: more balance better but leave more partial sums.
_SPLIT_INTO = 2


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: HeadPattern,
    softmax_scale: float,
    implementation: str | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a whole sequence, in which every query sees the keys that one positional pattern keeps.

    q: [s, b, np, hn]; k and v: [s, b, ng, hn], with unit stride in hn and any other strides; bf16, fp16 or fp32. np is a multiple of ng
    and head h reads group h // (np // ng). hn is a multiple of 16 up to 256; where it is no power of two, copies
    are filled up with zeros. Returns [s, b, np, hn], contiguous.
    ``implementation`` overrides how the dilated past is computed: "triton", or "folded" for cuDNN on folded queries, whose backward
    is not deterministic and therefore never the choice when gradients are wanted. cos and sin [s, hn / 2]: q comes before RoPE and is
    turned by them, as apply_rope() does. Raises ValueError for inputs that do not fit.
    """
    _check(q, k, v, head, softmax_scale)
    check_rope(q, cos, sin)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"a whole sequence has as many queries as keys, not {q.shape[0]} and {k.shape[0]}")
    if implementation not in (None, "triton", "folded"):
        raise ValueError(f"implementation is None, 'triton' or 'folded', not {implementation!r}")
    if implementation == "folded" and not folding.can_fold(q, head):
        raise ValueError(f"attention pattern '{head}' on {q.shape[0]} tokens of {q.dtype} does not fit the folded implementation")
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    folded = implementation == "folded"
    if implementation is None and not learning:
        folded = folding.can_fold(q, head) and q.shape[0] >= _FOLD_FROM * head.dilation
    tables = () if cos is None else (cos.contiguous(), sin.contiguous())
    hn = q.shape[3]
    if tables and (learning or folded or hn & (hn - 1)):  # backward and cuDNN read the turned queries, and filled ones have other halves
        q, tables = apply_rope(q, *tables), ()
    q, k, v = fill_tiles(q, k, v)
    out = _DilatedAttention.apply(q, k, v, k.detach()[:0], v.detach()[:0], head, softmax_scale, 0, folded, tables)
    return out[..., :hn].contiguous()


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, kept_k: Tensor, kept_v: Tensor, head: HeadPattern, softmax_scale: float, start: int
) -> Tensor:
    """Attention of a stretch of a longer sequence, as context parallelism or a cached prefix needs it.

    q: [s, b, np, hn], the tokens from position ``start`` on. k and v: [h + s, b, ng, hn], the same tokens and the h before them, with
    h >= min(window, start). kept_k and kept_v: [n, b, ng, hn], the sinks and dilated keys of the sequence in order, at least those before
    the first of k; later ones are ignored. Types and strides as in dilated_attention(). Returns [s, b, np, hn], contiguous.
    """
    _check(q, k, v, head, softmax_scale)
    base = start + q.shape[0] - k.shape[0]
    if base > max(0, start - head.window) or base < 0:
        raise ValueError(f"queries from {start} on with window {head.window} cannot use keys from {base} on")
    if kept_k.shape != kept_v.shape or kept_k.shape[1:] != k.shape[1:] or len(kept_k) < _entries(head.dilation, head.sinks, base):
        raise ValueError(
            f"{_entries(head.dilation, head.sinks, base)} keys are kept before position {base}: {list(kept_k.shape)} does not hold them"
        )
    hn = q.shape[3]
    q, k, v, kept_k, kept_v = fill_tiles(q, k, v, kept_k, kept_v)
    return _DilatedAttention.apply(q, k, v, kept_k, kept_v, head, softmax_scale, start, False, ())[..., :hn].contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, head: HeadPattern, softmax_scale: float) -> None:
    if head.blocks:
        raise ValueError(f"attention pattern '{head}' chooses keys by score: it has no kept list")
    if k.shape != v.shape or k.shape[1] != q.shape[1] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit together")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"queries, keys and values are one of bf16, fp16 and fp32, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[3] not in HEAD_DIMS or softmax_scale <= 0:
        raise ValueError(f"head size {q.shape[3]} is not a multiple of 16 up to 256, or scale {softmax_scale} is not positive")


class _DilatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, kept_k, kept_v, head, softmax_scale, start, folded, tables):
        q, k, v, kept_k, kept_v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, kept_k, kept_v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[2], q.shape[0], dtype=torch.float32, device=q.device)
        past = folding.folded_forward(q, k, v, head, softmax_scale) if folded else (None, None, ())
        if len(q) and out.numel():
            for part in _parts(q, k, v, kept_k, kept_v, head, start, folded):
                _launch_forward(part, q, k, v, out, lse, tables, past[:2] if part.old_from else None, head, softmax_scale)
        tensors = [x for x in past[2] if isinstance(x, Tensor)]
        ctx.save_for_backward(q, k, v, kept_k, kept_v, out, lse, *tensors)
        ctx.args = head, softmax_scale, start, folded, past[2][len(tensors) :]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, kept_k, kept_v, out, lse, *tensors = ctx.saved_tensors
        head, softmax_scale, start, folded, sizes = ctx.args
        grad = grad.contiguous()
        delta = torch.empty_like(lse)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Without a window, the keys before the first query get no gradient but through the kept list.
        allocate = torch.zeros if not head.window and len(k) > len(q) else torch.empty
        dk, dv = (allocate(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        dkept_k, dkept_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (kept_k, kept_v))
        if not out.numel():
            return dq, dk.zero_(), dv.zero_(), dkept_k, dkept_v, None, None, None, None, None

        past = None
        if folded:
            past = folding.folded_backward(grad, q, out, lse, (*tensors, *sizes), head, softmax_scale)
        parts = _parts(q, k, v, kept_k, kept_v, head, start, folded)
        group = q.shape[2] // k.shape[2]
        own = [x[-len(q) :] for x in (dk, dv)]
        if group > 1 and not head.window:  # heads that share a key write apart and are summed
            own = [torch.empty(q.shape, dtype=torch.float32, device=q.device) for _ in range(2)]
        for part in parts:
            _launch_query_grad(part, q, k, v, out, lse, grad, delta, dq, *own, past and past[0], head, softmax_scale)
        if head.window:
            _launch_band_grad(replace(parts[-1], start=start), q, k, v, lse, grad, delta, dk, dv, head, softmax_scale)
        elif group > 1:
            for x, each in zip((dk, dv), own, strict=True):
                x[-len(q) :] = each.unflatten(2, (-1, group)).sum(3)
        for part in parts:
            _launch_kept_grad(part, q, k, lse, grad, delta, dk, dv, dkept_k, dkept_v, head, softmax_scale)
        if folded:
            past_k, past_v = (x.unflatten(0, (-1, group)).transpose(0, 1) for x in past[1:])
            _launch_add(past_k, past_v, dk, dv, dkept_k, dkept_v, head.dilation, 0, start)
        return dq, dk, dv, dkept_k, dkept_v, None, None, None, None, None


# ---- the kept list -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A stretch of queries, and the kept list that the kernels walk for them."""

    rows: slice
    start: int  # position of the first
    base: int  # position of the first local key
    kept_k: Tensor  # [n, b, ng, hn], sinks first
    kept_v: Tensor
    dilation: int  # of the list after the sinks; 0: it ends there
    skip: int = 0  # sinks at every skip-th position are counted elsewhere
    old_from: int = 0  # the queries from this one on enter with cuDNN's result for the dilated keys; 0: none


def _parts(q, k, v, kept_k, kept_v, head: HeadPattern, start: int, folded: bool) -> list[_Part]:
    """One part, or for folded queries two: whole chunks, which lack only the sinks, and the tail, which lacks everything."""
    base = start + q.shape[0] - k.shape[0]
    whole = folding.whole_rows(q, head) if folded else 0
    parts = []
    if whole:
        sinks = slice(min(head.sinks, whole))
        parts.append(_Part(slice(0, whole), start, base, k[sinks], v[sinks], 0, head.dilation, folding.skipped_rows(head)))
    if whole < q.shape[0]:
        lists = _kept_list(k, kept_k, head, base), _kept_list(v, kept_v, head, base)
        parts.append(_Part(slice(whole, q.shape[0]), start + whole, base, *lists, head.dilation or 0))
    return parts


def _kept_list(x: Tensor, before: Tensor, head: HeadPattern, base: int) -> Tensor:
    """The kept rows of a sequence from position 0: those before ``base`` from their own list, the rest from x, which begins there."""
    pieces = [(before, slice(_entries(head.dilation, head.sinks, base))), (x, slice(min(max(0, head.sinks - base), len(x))))]
    if head.dilation:
        first = max(base, head.sinks) // head.dilation * head.dilation + head.dilation - 1 - base
        pieces.append((x, slice(min(first, len(x)), len(x), head.dilation)))
    rows = [source[piece] for source, piece in pieces if piece.stop > (piece.start or 0)]
    return torch.cat(rows) if len(rows) > 1 else (rows or [x[:0]])[0]


def _entries(dilation: int | None, sinks: int, position: int) -> int:
    """How many entries of the kept list lie before a position."""
    return min(position, sinks) + (max(0, position // dilation - sinks // dilation) if dilation else 0)


# ---- launches ------------------------------------------------------------------------------------------------------------------------


def _launch_forward(part: _Part, q, k, v, out, lse, tables, past, head: HeadPattern, scale: float) -> None:
    q, out, *tables, lse = _rows(part, (q, out, *tables), (lse,))
    tiles = _tiles("forward", q, head, len(part.kept_k))
    kernels.dilated_attention_forward[q.shape[1] * q.shape[2], triton.cdiv(len(q), tiles["BM"])](
        q, k, v, part.kept_k, part.kept_v, out, lse, *(past or (out, lse)), *(tables or (None, None)),
        *_strides(q, k, v, part.kept_k, part.kept_v), *_sizes(part, q, k, lse), part.old_from, scale,
        **_constants(part, q, k, head), OLD=past is not None, ROPE=bool(tables), **tiles,
    )  # fmt: skip


def _launch_query_grad(part: _Part, q, k, v, out, lse, grad, delta, dq, own_dk, own_dv, past_dq, head: HeadPattern, scale: float) -> None:
    """Writes dq and delta = sum(grad * out) and, where there is no window, what every query gives to its own key's dk and dv."""
    q, out, grad, dq, own_dk, own_dv, lse, delta = _rows(part, (q, out, grad, dq, own_dk, own_dv), (lse, delta))
    old = past_dq if part.old_from else None
    tiles = _tiles("query_grad", q, head)
    kernels.dilated_attention_query_grad[q.shape[1] * q.shape[2], triton.cdiv(len(q), tiles["BM"])](
        q, k, v, part.kept_k, part.kept_v, out, lse, grad, delta, dq, own_dk, own_dv, dq if old is None else old,
        *_strides(q, k, v, part.kept_k, part.kept_v), *_sizes(part, q, k, lse), part.old_from, scale,
        **_constants(part, q, k, head), OLD=old is not None, **tiles,
    )  # fmt: skip


def _launch_band_grad(part: _Part, q, k, v, lse, grad, delta, dk, dv, head: HeadPattern, scale: float) -> None:
    """Writes dk and dv of the local keys, as far as they flow through the bands of the queries."""
    tiles = _tiles("key_grad", q, head)
    shared = k.shape[1] * k.shape[2]
    kernels.dilated_attention_key_grad[shared, triton.cdiv(len(k), tiles["BN"]), 1](
        q, k, v, lse, grad, delta, dk, dv, *_strides(q, k, v), 0, k.shape[3], shared * k.shape[3],
        *_sizes(part, q, k, lse), len(k), scale, **_constants(part, q, k, head), BAND=True, **tiles,
    )  # fmt: skip


def _launch_kept_grad(part: _Part, q, k, lse, grad, delta, dk, dv, dkept_k, dkept_v, head: HeadPattern, scale: float) -> None:
    """Adds the gradients of the part's kept list. Few keys seen by many queries: the queries are split, and partial sums added later."""
    q, grad, lse, delta = _rows(part, (q, grad), (lse, delta))
    entries, shared = min(len(part.kept_k), _entries(part.dilation, head.sinks, part.start + len(q))), k.shape[1] * k.shape[2]
    if not entries:
        return
    tiles = _tiles("key_grad", q, head)
    key_tiles, query_tiles = triton.cdiv(entries, tiles["BN"]), triton.cdiv(len(q), tiles["BM"])
    splits = max(1, min(query_tiles, _SPLIT_INTO * processor_count(q.device) // (key_tiles * shared)))
    sums = torch.empty(2, splits, shared, entries, k.shape[3], dtype=torch.float32, device=q.device)
    kernels.dilated_attention_key_grad[shared, key_tiles, splits](
        q, part.kept_k, part.kept_v, lse, grad, delta, *sums, *_strides(q, part.kept_k, part.kept_v), *sums.stride()[1:4],
        *_sizes(part, q, k, lse), entries, scale, **_constants(part, q, k, head), BAND=False, **tiles,
    )  # fmt: skip
    _launch_add(sums[0], sums[1], dk, dv, dkept_k, dkept_v, part.dilation, head.sinks, part.base)


def _launch_add(sums_k, sums_v, dk, dv, dkept_k, dkept_v, dilation: int, sinks: int, base: int) -> None:
    """Adds sums [splits, b * ng, n, hn] over the first n keys of a kept list to where these keys came from."""
    splits, shared, entries, size = sums_k.shape
    kernels.dilated_attention_add[shared, triton.cdiv(entries, 32)](
        sums_k, sums_v, dk, dv, dkept_k, dkept_v, *sums_k.stride()[:3], splits, entries, base, _entries(dilation, sinks, base),
        D=dilation, S=sinks, HN=size, BN=32,
    )  # fmt: skip


def _rows(part: _Part, queries: tuple[Tensor, ...], stats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The part's rows of tensors [s, ...] and of tensors [b, np, s]."""
    if part.rows == slice(0, len(queries[0])):
        return *queries, *stats
    return *(x[part.rows] for x in queries), *(x[:, :, part.rows] for x in stats)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _sizes(part: _Part, q: Tensor, k: Tensor, lse: Tensor) -> tuple[int, ...]:
    return lse.stride(1), q.shape[2], len(q), part.start, len(k), part.base, len(part.kept_k)


def _constants(part: _Part, q: Tensor, k: Tensor, head: HeadPattern) -> dict:
    return {
        "D": part.dilation,
        "SKIP": part.skip,
        "W": head.window,
        "S": head.sinks,
        "GROUP": q.shape[2] // k.shape[2],
        "HN": q.shape[3],
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # of no effect on half precision
    }


def _tiles(kernel: str, q: Tensor, head: HeadPattern, entries: int = 0) -> dict[str, int]:
    """Queries (BM) and keys (BN) a program holds, its warps and the depth of its load pipeline. Measured on an H100 at hn = 128."""
    if q.dtype == torch.float32 or q.shape[3] > 128:
        return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    if kernel == "key_grad":
        return {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 2}
    if kernel == "forward" and head.window:
        return {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
    if kernel == "forward" and entries <= 512:  # bound by memory: three programs at once rather than a deep pipeline
        return {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 1, "maxnreg": 168}
    if kernel == "forward":
        return {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2}
