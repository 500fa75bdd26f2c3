"""Top-k block attention: every query sees a few blocks of keys in full, chosen by score.

Sources: the top-k hybrid of RAT+ (arXiv 2602.18196), whose exact scoring is not public; scores as in Quest (arXiv 2406.10774).
"""

from __future__ import annotations

from torch import Tensor

from rat_megatron.ops.dispatch import choose
from rat_megatron.ratplus.pattern import HeadPattern


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: HeadPattern,
    softmax_scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of patterns such as d64k8 and d64k8+d. q [b, np, sq, hn], k and v [b, ng, sk, hn]; returns [b, np, sq, hn].

    Our choice of scores is Quest's: with kmax and kmin the elementwise bounds of the keys (after RoPE) of a block, a query scores the
    block sum_d max(q_d * kmax_d, q_d * kmin_d), an upper bound of its products with those keys. Of the K blocks, one is the query's
    own up to the query, one the first, and the rest the complete past blocks of highest score, for every query and query head apart.
    ``dilate_rest`` adds every D-th key. The selection is not differentiated. Positions are int64 [sq] and [sk] in any order, 0, 1, ...
    when absent; the keys must hold every position up to that of the last query. ``implementation`` overrides the choice: "triton" or
    "torch". Raises ValueError when shapes do not fit.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or k.shape[3] != q.shape[3]:
        raise ValueError(f"queries {list(q.shape)} cannot attend to keys {list(k.shape)} and values {list(v.shape)}")
    operator = choose(__name__, implementation, q, k, v)
    return operator.topk_attention(q, k, v, head, softmax_scale, q_positions, k_positions)
