"""The RAT+ recurrence over keys and values: x~_t = g_t x~_{t-1} + (1 - g_t) x_t, one gate for both. Source: arXiv 2602.18196."""

from __future__ import annotations

import torch
from torch import Tensor

from rat_megatron.ops.dispatch import choose
from rat_megatron.ops.gated_scan.shapes import check_inputs, check_state, mixed_qkv_widths
from rat_megatron.ops.rope import check_rope


def gated_scan(
    f: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the recurrence over keys and values and, given cos and sin, turns the keys by RoPE afterwards.

    f (gate logits), k and v: [s, b, ng, hn], any memory layout, s >= 1. initial_state: [2, b, ng, hn] (key part, value part), zeros
    when absent. cos and sin: [s, hn / 2], of the angle of each step and pair of channels (c, c + hn / 2). Returns k~ and v~
    [s, b, ng, hn] in the types of k and v, and the final state [2, b, ng, hn], before RoPE. Gate, recurrence, RoPE and state are fp32
    (float64 when an input is). Differentiable once in f, k, v and initial_state, through all three outputs. The backward saves only
    the inputs, and the kernels some states, and recomputes the rest. Raises ValueError when shapes differ.

    ``implementation`` overrides the choice: "triton", kernels that pass over memory once, where they can run, and "torch" elsewhere.
    """
    check_inputs(f, k, v)
    check_state(initial_state, k)
    check_rope(k, cos, sin)
    return choose(__name__, implementation, f, k, v).gated_scan(f, k, v, initial_state, cos, sin)


def scan_mixed_qkv(
    mixed_qkv: Tensor,
    query_width: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    implementation: str | None = None,
    output_gate: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gated_scan on a layer's fused projection, whose gradient the kernels write in its place instead of joining five.

    mixed_qkv: [s, b, ng, 2 * query_width + 3 * hn], in every group [query | output gate | k | v | f]. Returns query and output gate
    [s, b, ng, query_width], and k~ and v~ [s, b, ng, hn]. Given cos and sin, RoPE turns the queries too, whose width then is a multiple of
    hn; the kernels then use their place in the projection, which is not to be read again. Else query and gate are slices of the
    projection. Without ``output_gate`` there is none in the projection, and its place among the results has no channels. Everything
    else as in gated_scan, from no state.
    """
    widths = mixed_qkv_widths(mixed_qkv, query_width, output_gate)
    _, _, k, v, f = mixed_qkv.split(widths, dim=-1)
    check_inputs(f, k, v)
    check_rope(k, cos, sin)
    if cos is not None and query_width % k.shape[3]:
        raise ValueError(f"RoPE turns whole heads of {k.shape[3]} channels, not queries of {query_width}")
    return choose(__name__, implementation, k).scan_mixed_qkv(mixed_qkv, widths, cos, sin)


# ---- what context parallelism exchanges: none of it is differentiable, as it is called inside an autograd function --------------------


@torch.no_grad()
def scan_summary(f: Tensor, k: Tensor, v: Tensor, implementation: str | None = None) -> Tensor:
    """What a stretch of tokens does to the state: h_out = A * h_in + B.

    f, k and v: [s, b, ng, hn]. Returns fp32 (float64 for float64) [3, b, ng, hn]: A, the product of the gates, and B for keys and
    values, the final state from a zero start.
    """
    check_inputs(f, k, v)
    return choose(__name__, implementation, f, k, v).scan_summary(f, k, v)


@torch.no_grad()
def adjoint_summary(f: Tensor, grad_k: Tensor, grad_v: Tensor, implementation: str | None = None) -> Tensor:
    """The gradient of the initial state that comes from a stretch's own outputs; one from after it arrives A times as large.

    f: [s, b, ng, hn]; grad_k and grad_v: [s, b, ng, hn], the gradients of k~ and v~. Returns fp32 (float64 for float64) [2, b, ng, hn].
    The counterpart of scan_summary for the backward pass.
    """
    check_inputs(f, grad_k, grad_v)
    return choose(__name__, implementation, f, grad_k, grad_v).adjoint_summary(f, grad_k, grad_v)


@torch.no_grad()
def states_of_chunks(decays: Tensor, ends: Tensor, rank: int, back: bool = False, implementation: str | None = None) -> Tensor:
    """The states before the two chunks of one rank, from the summaries of all ranks: of c ranks, rank r holds chunks r and 2c - 1 - r.

    decays: [c, 2, ..., hn], every rank's A of its two chunks; ends: [c, 2, 2, ..., hn], its B of keys and values for both, in fp32 (or
    float64). Returns [2, 2, ..., hn], key and value part for both chunks. ``back`` goes from the end of the sequence: given as ends what
    adjoint_summary says of the chunks, it returns the gradients of the states after the rank's two.
    """
    if decays.dim() < 3 or ends.shape != (len(decays), 2, *decays.shape[1:]) or decays.shape[1] != 2 or not 0 <= rank < len(decays):
        raise ValueError(f"rank {rank} cannot have decays {list(decays.shape)} and ends {list(ends.shape)} of two chunks a rank")
    return choose(__name__, implementation, decays, ends).states_of_chunks(decays, ends, rank, back)


@torch.no_grad()
def scan_forward(
    f: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, training: bool, implementation: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """gated_scan's forward pass alone, for autograd functions that exchange states between the passes.

    Arguments, k~ and v~ as in gated_scan. The third result is what scan_backward needs besides the inputs, if ``training``. The kernels'
    outputs lie in memory in the order of k.
    """
    check_inputs(f, k, v)
    return choose(__name__, implementation, f, k, v).scan_forward(f, k, v, initial_state, training)


@torch.no_grad()
def scan_backward(
    f: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_final: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    implementation: str | None = None,
) -> None:
    """gated_scan's backward pass alone: writes the gradients of f, k and v into ``out``, three of their shape and with strides alike.

    f, k, v and saved: what scan_forward was given and returned. grad_k, grad_v [s, b, ng, hn] and grad_final [2, b, ng, hn]: the gradients
    of k~, of v~ and of the final state, which arrives from after the stretch.
    """
    choose(__name__, implementation, f, k, v).scan_backward(f, k, v, saved, grad_k, grad_v, grad_final, out)
