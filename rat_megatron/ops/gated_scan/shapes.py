"""Shapes that both implementations of the gated scan need, and their checks."""

from __future__ import annotations

from torch import Tensor


def mixed_qkv_widths(mixed_qkv: Tensor, query_width: int, output_gate: bool = True) -> list[int]:
    """Of query, output gate (0 without one), k, v and f in the last dimension of scan_mixed_qkv's input; ValueError for another width."""
    gate_width = query_width if output_gate else 0
    rest = mixed_qkv.shape[-1] - query_width - gate_width
    if query_width < 1 or rest <= 0 or rest % 3:
        held = f"two of {query_width}" if output_gate else f"one of {query_width}"
        raise ValueError(f"a projection of width {mixed_qkv.shape[-1]} does not hold {held} and three alike")
    return [query_width, gate_width, *[rest // 3] * 3]


def check_inputs(f: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless the three fit together."""
    if not f.shape == k.shape == v.shape or f.dim() != 4 or f.shape[0] == 0:
        raise ValueError(f"f, k and v must share one shape [s, b, ng, hn] with s >= 1, not {[list(x.shape) for x in (f, k, v)]}")


def check_state(initial_state: Tensor | None, k: Tensor) -> None:
    """Raises ValueError unless a state, if there is one, is one of k's heads."""
    if initial_state is not None and initial_state.shape != (2, *k.shape[1:]):
        raise ValueError(f"initial_state has shape {list(initial_state.shape)}, but k and v ask for {[2, *k.shape[1:]]}")
