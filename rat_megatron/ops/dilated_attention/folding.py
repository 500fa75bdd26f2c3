"""Dilated attention as cuDNN's dense causal attention on folded queries: the part of the past that is far longer than a window.

The D queries of one chunk see the same kept keys, those of the chunks before it. Folded so that they are the D query heads of one
key head, they make plain causal attention of length T / D. Source: RAT+ (arXiv 2602.18196), dilated attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rat_megatron.ratplus.pattern import HeadPattern

_LEAST_CHUNKS = 16  # cuDNN refuses a sequence of one token, and folding so few would gain nothing


def can_fold(q: Tensor, head: HeadPattern) -> bool:
    """Whether cuDNN can serve the old keys of these queries [s, b, np, hn]: whole chunks of window, half precision, a long past."""
    if not q.is_cuda or torch.version.hip or not torch.backends.cudnn.is_available():
        return False
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[3] > 128 or head.dilation is None or head.window % head.dilation:
        return False
    return q.shape[0] >= skipped_rows(head) + _LEAST_CHUNKS * head.dilation


def skipped_rows(head: HeadPattern) -> int:
    """Queries at the start of a sequence that see no dilated key older than their window: theirs is not computed here."""
    return head.window + head.dilation


def whole_rows(q: Tensor, head: HeadPattern) -> int:
    """Queries of a sequence that make whole chunks; those after them see one more key than this form has."""
    return q.shape[0] // head.dilation * head.dilation


def folded_forward(q: Tensor, k: Tensor, v: Tensor, head: HeadPattern, softmax_scale: float) -> tuple[Tensor, Tensor, tuple]:
    """Softmax over the dilated keys older than the window, for queries skipped_rows() to whole_rows() of a sequence from position 0.

    q [s, b, np, hn], k and v [s, b, ng, hn]. Returns the output [n, b, np, hn] in the type of q, its log-sum-exp [b * np, n] in fp32,
    and what folded_backward() needs.
    """
    kept_k, kept_v = _kept(k, q, head), _kept(v, q, head)
    out, lse, _, _, max_q, max_k, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _fold(q, head), kept_k, kept_v, None, True, 0.0, True, False, scale=softmax_scale
    )
    lse = lse.reshape(*out.shape[:3]).transpose(1, 2).reshape(out.shape[0], -1)  # [b * np, D, n / D] -> [b * np, n]
    return _unfold(out, q), lse, (kept_k, kept_v, max_q, max_k, seed, offset)


def folded_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, saved: tuple, head: HeadPattern, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that flow through the keys of folded_forward().

    grad and out [s, b, np, hn] and lse [b, np, s] are those of the whole softmax, of which these keys are a part: P = exp(S - lse) and
    sum(grad * out) are then the whole's, so the part's gradients come out exact. Returns dq [n, b, np, hn] for the rows of
    folded_forward() and dk, dv [b * np, m, hn] of the first m dilated keys, one for every query head.
    """
    kept_k, kept_v, max_q, max_k, seed, offset = saved
    chunks = lse.flatten(0, 1)[:, skipped_rows(head) : whole_rows(q, head)].unflatten(1, (-1, head.dilation))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _fold(grad, head), _fold(q, head), kept_k, kept_v, _fold(out, head), chunks.transpose(1, 2).contiguous()[..., None],
        seed, offset, None, None, None, max_q, max_k, 0.0, True, scale=softmax_scale,
    )  # fmt: skip
    return _unfold(dq, q), dk.squeeze(1).contiguous(), dv.squeeze(1).contiguous()


def _fold(x: Tensor, head: HeadPattern) -> Tensor:
    """[s, b, np, hn] -> [b * np, D, chunks, hn], a view when x is contiguous."""
    rows = x[skipped_rows(head) : whole_rows(x, head)].contiguous()
    return rows.view(-1, head.dilation, x.shape[1] * x.shape[2], x.shape[3]).permute(2, 1, 0, 3)


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    """[b * np, D, chunks, hn] -> [chunks * D, b, np, hn], a view when cuDNN wrote in the layout of its queries."""
    return x.permute(2, 1, 0, 3).contiguous().view(-1, *q.shape[1:])


def _kept(x: Tensor, q: Tensor, head: HeadPattern) -> Tensor:
    """The dilated rows that folded queries see, one copy for every query head: [s, b, ng, hn] -> [b * np, 1, chunks, hn]."""
    chunks = (whole_rows(q, head) - skipped_rows(head)) // head.dilation
    rows = x[head.dilation - 1 :: head.dilation][:chunks].permute(1, 2, 0, 3)  # [b, ng, chunks, hn]
    rows = rows[:, :, None].expand(-1, -1, q.shape[2] // x.shape[2], -1, -1)
    return rows.reshape(-1, 1, chunks, x.shape[3])
