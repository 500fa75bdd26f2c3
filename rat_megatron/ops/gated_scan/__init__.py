"""The RAT+ recurrence over keys and values: x~_t = g_t x~_{t-1} + (1 - g_t) x_t, one gate for both.

A torch implementation with an explicit backward. Scan in two levels: summarise chunks of steps, scan the summaries (recursively),
then run every chunk from its true start, all chunks at once. Source: RAT+ (arXiv 2602.18196).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from rat_megatron.ops.dispatch import triton_takes
from rat_megatron.ops.rope import check_rope, turn

# Steps run one after the other inside a chunk while all chunks advance together. 16 to 64 are equally fast on a CPU for 256 to
# 4096 tokens; a plain loop over tokens takes up to four times as long, a log-depth scan over tokens up to eight times.
_CHUNK = 32


def gated_scan(
    f: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the recurrence over keys and values and, given cos and sin, turns the keys by RoPE afterwards.

    f (gate logits), k and v: [s, b, ng, hn], any memory layout, s >= 1. initial_state: [2, b, ng, hn] (key part, value part), zeros
    when absent. cos and sin: [s, hn / 2], of the angle of each step and pair of channels (c, c + hn / 2). Returns k~ and v~
    [s, b, ng, hn] in the types of k and v, and the final state [2, b, ng, hn], before RoPE. Gate, recurrence, RoPE and state are fp32
    (float64 when an input is). Differentiable once in f, k, v and initial_state, through all three outputs. The backward saves only
    the inputs, and the kernels some states, and recomputes the rest. Raises ValueError when shapes differ.

    ``implementation`` overrides the choice: "triton", kernels that pass over memory once, where they can run, and "torch" elsewhere.
    """
    if _use_triton(implementation, f, k, v):
        from rat_megatron.ops.gated_scan.triton import gated_scan as gated_scan_triton

        return gated_scan_triton(f, k, v, initial_state, cos, sin)
    dtype = _check(f, k, v)
    state_shape = (2, *k.shape[1:])
    if initial_state is None:
        initial_state = k.new_zeros(state_shape)
    elif initial_state.shape != state_shape:
        raise ValueError(f"initial_state has shape {list(initial_state.shape)}, but k and v ask for {list(state_shape)}")
    check_rope(k, cos, sin)
    if cos is None:
        return _GatedScan.apply(f, k, v, initial_state.to(dtype))
    keys, values, final = _GatedScan.apply(f, k.to(dtype), v, initial_state.to(dtype))  # the keys are rounded once, after RoPE
    return turn(keys, cos[:, None, None], sin[:, None, None]).to(k.dtype), values, final


def scan_of_projection(
    projection: torch.Tensor,
    query_width: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """gated_scan on a layer's fused projection, whose gradient the kernels write in its place instead of joining five.

    projection: [s, b, ng, 2 * query_width + 3 * hn], in every group [query | output gate | k | v | f]. Returns query and output gate
    [s, b, ng, query_width], and k~ and v~ [s, b, ng, hn]. Given cos and sin, RoPE turns the queries too, whose width then is a multiple of
    hn; the kernels then use their place in the projection, which is not to be read again. Else query and gate are slices of the
    projection. Everything else as in gated_scan, from no state.
    """
    widths = projection_widths(projection, query_width)
    query, gate, k, v, f = projection.split(widths, dim=-1)
    if cos is not None and query_width % k.shape[3]:
        raise ValueError(f"RoPE turns whole heads of {k.shape[3]} channels, not queries of {query_width}")
    if _use_triton(implementation, f, k, v):
        from rat_megatron.ops.gated_scan.triton import scan_of_projection as scan_triton

        return scan_triton(projection, query_width, cos, sin)
    keys, values, _ = gated_scan(f, k, v, None, cos, sin, implementation)
    if cos is not None:
        heads = query.unflatten(-1, (-1, k.shape[3]))
        query = turn(heads, cos[:, None, None, None], sin[:, None, None, None]).flatten(-2)
    return query, gate, keys, values


def projection_widths(projection: torch.Tensor, query_width: int) -> list[int]:
    """Of query, output gate, k, v and f in the last dimension of scan_of_projection's input; raises ValueError if it is no such width."""
    rest = projection.shape[-1] - 2 * query_width
    if query_width < 1 or rest <= 0 or rest % 3:
        raise ValueError(f"a projection of width {projection.shape[-1]} does not hold two of {query_width} and three alike")
    return [query_width, query_width, *[rest // 3] * 3]


@torch.no_grad()
def scan_summary(f: torch.Tensor, k: torch.Tensor, v: torch.Tensor, implementation: str | None = None) -> torch.Tensor:
    """What a stretch of tokens does to the state: h_out = A * h_in + B.

    f, k and v: [s, b, ng, hn]. Returns fp32 (float64 for float64) [3, b, ng, hn]: A, the product of the gates, and B for keys and
    values, the final state from a zero start. Not differentiable: context parallelism exchanges summaries inside its own
    autograd function. ``implementation`` as in gated_scan.
    """
    if _use_triton(implementation, f, k, v):
        from rat_megatron.ops.gated_scan.triton import scan_summary as scan_summary_triton

        return scan_summary_triton(f, k, v)
    gate, keep = _gates(f, _check(f, k, v))
    decay, ends = _reduce(gate, torch.stack([k, v]).to(gate.dtype).mul_(keep))
    return torch.stack([decay, *ends])


@torch.no_grad()
def adjoint_summary(f: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, implementation: str | None = None) -> torch.Tensor:
    """The gradient of the initial state that comes from a stretch's own outputs; one from after it arrives A times as large.

    f: [s, b, ng, hn]; grad_k and grad_v: [s, b, ng, hn], the gradients of k~ and v~. Returns fp32 (float64 for float64) [2, b, ng, hn].
    The counterpart of scan_summary for the backward pass. ``implementation`` as in gated_scan.
    """
    if _use_triton(implementation, f, grad_k, grad_v):
        from rat_megatron.ops.gated_scan.triton import adjoint_summary as adjoint_summary_triton

        return adjoint_summary_triton(f, grad_k, grad_v)
    gate, _ = _gates(f, _check(f, grad_k, grad_v))
    _, first = _reduce(gate.roll(-1, 0).flip(0), torch.stack([grad_k, grad_v]).to(gate.dtype).flip(1))
    return gate[0] * first


@torch.no_grad()
def states_of_chunks(
    decays: torch.Tensor, ends: torch.Tensor, rank: int, back: bool = False, implementation: str | None = None
) -> torch.Tensor:
    """The states before the two chunks of one rank, from the summaries of all ranks: of c ranks, rank r holds chunks r and 2c - 1 - r.

    decays: [c, 2, ..., hn], every rank's A of its two chunks; ends: [c, 2, 2, ..., hn], its B of keys and values for both, in fp32 (or
    float64). Returns [2, 2, ..., hn], key and value part for both chunks. ``back`` goes from the end of the sequence: given as ends what
    adjoint_summary says of the chunks, it returns the gradients of the states after the rank's two. Not differentiable;
    ``implementation`` as in gated_scan.
    """
    if decays.dim() < 3 or ends.shape != (len(decays), 2, *decays.shape[1:]) or decays.shape[1] != 2 or not 0 <= rank < len(decays):
        raise ValueError(f"rank {rank} cannot have decays {list(decays.shape)} and ends {list(ends.shape)} of two chunks a rank")
    if _use_triton(implementation, decays, ends):
        from rat_megatron.ops.gated_scan.triton import states_of_chunks as states_of_chunks_triton

        return states_of_chunks_triton(decays, ends, rank, back)
    size = len(decays)
    state, states = torch.zeros_like(ends[0, :, 0]), torch.empty_like(ends[0])
    for at in range(2 * size):  # back, the order of ranks is the same, and every rank's second chunk comes first
        owner, chunk = (at, int(back)) if at < size else (2 * size - 1 - at, int(not back))
        if owner == rank:
            states[:, chunk] = state
        state = decays[owner, chunk] * state + ends[owner, :, chunk]
    return states


@torch.no_grad()
def scan_forward(
    f: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial_state: torch.Tensor, training: bool, implementation: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """gated_scan's forward pass alone, for autograd functions that exchange states between the passes, as context parallelism does.

    Arguments, k~ and v~ as in gated_scan. The third result is what scan_backward needs besides the inputs, if ``training``.
    """
    if _use_triton(implementation, f, k, v):
        from rat_megatron.ops.gated_scan.triton import scan_forward as scan_forward_triton

        return scan_forward_triton(f, k, v, initial_state, training)
    initial_state = initial_state.to(_check(f, k, v))
    keys, values, _ = _forward(f, k, v, initial_state)
    return keys, values, initial_state if training else None


@torch.no_grad()
def scan_backward(
    f: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    grad_final: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    implementation: str | None = None,
) -> None:
    """gated_scan's backward pass alone: writes the gradients of f, k and v into ``out``, three of their shape and with strides alike.

    f, k, v and saved: what scan_forward was given and returned. grad_k, grad_v [s, b, ng, hn] and grad_final [2, b, ng, hn]: the gradients
    of k~, of v~ and of the final state, which arrives from after the stretch.
    """
    if _use_triton(implementation, f, k, v):
        from rat_megatron.ops.gated_scan.triton import scan_backward as scan_backward_triton

        return scan_backward_triton(f, k, v, saved, grad_k, grad_v, grad_final, out)
    for place, gradient in zip(out, _backward(f, k, v, saved, grad_k, grad_v, grad_final)[:3], strict=True):
        place.copy_(gradient)


def _use_triton(implementation: str | None, *tensors: torch.Tensor) -> bool:
    if implementation not in (None, "torch", "triton"):
        raise ValueError(f"implementation is None, 'torch' or 'triton', not {implementation!r}")
    return implementation == "triton" or (implementation is None and triton_takes(*tensors))


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, k, v, initial_state):
        ctx.save_for_backward(f, k, v, initial_state)
        return _forward(f, k, v, initial_state)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k, grad_v, grad_final):
        return _backward(*ctx.saved_tensors, grad_k, grad_v, grad_final)


def _forward(f, k, v, initial_state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k~, v~ and the final state."""
    gate, keep = _gates(f, initial_state.dtype)
    states = torch.stack([k, v]).to(gate.dtype).mul_(keep)  # [2, s, b, ng, hn]
    _scan_(gate, states, initial_state)
    # Copies, so that one output kept alive does not hold the memory of all.
    return states[0].to(k.dtype, copy=True), states[1].to(v.dtype, copy=True), states[:, -1].clone()


def _backward(f, k, v, initial_state, grad_k, grad_v, grad_final) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of f, k, v and the initial state."""
    gate, keep = _gates(f, initial_state.dtype)
    inputs = torch.stack([k, v]).to(gate.dtype)
    states = keep * inputs
    _scan_(gate, states, initial_state)

    # The adjoint obeys the same recurrence from the end: dh_t = dx~_t + g_{t+1} dh_{t+1}. The gate that roll() brings round to
    # the last token meets a zero state.
    adjoint = torch.stack([grad_k, grad_v]).to(gate.dtype).flip(1)
    adjoint[:, 0] += grad_final
    _scan_(gate.roll(-1, 0).flip(0), adjoint, torch.zeros_like(grad_final))
    adjoint = adjoint.flip(1)

    previous = torch.cat([initial_state[:, None], states[:, :-1]], dim=1)
    grad_f = (adjoint * (previous - inputs)).sum(0) * gate * keep
    grad_initial = gate[0] * adjoint[:, 0]
    grad_k, grad_v = adjoint * keep
    return grad_f.to(f.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_initial


def _check(f: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.dtype:
    """Returns the type to compute in; raises ValueError when the inputs do not fit together."""
    if not f.shape == k.shape == v.shape or f.dim() != 4 or f.shape[0] == 0:
        raise ValueError(f"f, k and v must share one shape [s, b, ng, hn] with s >= 1, not {[list(x.shape) for x in (f, k, v)]}")
    return torch.float64 if torch.float64 in (f.dtype, k.dtype, v.dtype) else torch.float32


def _gates(f: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """g and 1 - g. The second is sigmoid(-f): the difference would lose every digit when the gate is near 1."""
    f = f.to(dtype)
    return torch.sigmoid(f), torch.sigmoid(-f)


def _scan_(gate: torch.Tensor, x: torch.Tensor, state: torch.Tensor) -> None:
    """x_t <- gate_t * x_{t-1} + x_t in place, from x_{-1} = state. gate [s, ...], x [2, s, ...], state [2, ...]."""
    chunks, in_chunks = gate.shape[0] // _CHUNK, 0
    if chunks > 1:
        in_chunks = chunks * _CHUNK
        chunk_gate, chunk_x = _chunked(gate, x, chunks)
        decay, ends = _summarise(chunk_gate, chunk_x)
        _scan_(decay, ends, state)  # ends: now the true state after each chunk
        _steps_(chunk_gate, chunk_x, torch.cat([state[:, None], ends[:, :-1]], dim=1))
        state = ends[:, -1]
    _steps_(gate[in_chunks:], x[:, in_chunks:], state)


def _reduce(gate: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay [...] and end state from zero [2, ...] of all steps. gate [s, ...], x [2, s, ...]."""
    chunks = gate.shape[0] // _CHUNK
    if chunks < 2:
        return _summarise(gate, x)
    decay, ends = _summarise(*_chunked(gate, x, chunks))
    rest = chunks * _CHUNK  # a summary is itself a step, so the tokens past the last full chunk join the summaries
    return _reduce(torch.cat([decay, gate[rest:]]), torch.cat([ends, x[:, rest:]], dim=1))


def _chunked(gate: torch.Tensor, x: torch.Tensor, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the full chunks with the step inside a chunk in front: [_CHUNK, chunks, ...] and [2, _CHUNK, chunks, ...]."""
    length = chunks * _CHUNK
    gate = gate[:length].unflatten(0, (chunks, _CHUNK)).transpose(0, 1)
    return gate, x[:, :length].unflatten(1, (chunks, _CHUNK)).transpose(1, 2)


def _summarise(gate: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay and end state from zero, step by step, leaving x as it is."""
    decay, end = gate[0].clone(), x[:, 0].clone()
    for t in range(1, gate.shape[0]):
        end.mul_(gate[t]).add_(x[:, t])
        decay.mul_(gate[t])
    return decay, end


def _steps_(gate: torch.Tensor, x: torch.Tensor, state: torch.Tensor) -> None:
    """The recurrence itself, in place and step by step."""
    for t in range(gate.shape[0]):
        state = x[:, t].addcmul_(gate[t], state)
