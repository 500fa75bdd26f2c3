"""The recurrence in torch, the definition, with an explicit backward; functions and arguments as in the package's ``__init__``.

Scan in two levels: summarise chunks of steps, scan the summaries (recursively), then run every chunk from its true start, all chunks at
once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rat_megatron.ops.rope.reference import apply_rope

# Steps run one after the other inside a chunk while all chunks advance together. 16 to 64 are equally fast on a CPU for 256 to
# 4096 tokens; a plain loop over tokens takes up to four times as long, a log-depth scan over tokens up to eight times.
_CHUNK = 32


def gated_scan(
    f: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _wide(f, k, v)
    initial_state = k.new_zeros((2, *k.shape[1:]), dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if cos is None:
        return _GatedScan.apply(f, k, v, initial_state)
    keys, values, final = _GatedScan.apply(f, k.to(dtype), v, initial_state)  # the keys are rounded once, after RoPE
    return apply_rope(keys, cos, sin).to(k.dtype), values, final


def scan_mixed_qkv(
    mixed_qkv: Tensor, widths: list[int], cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, gate, k, v, f = mixed_qkv.split(widths, dim=-1)
    keys, values, _ = gated_scan(f, k, v, None, cos, sin)
    return query if cos is None else apply_rope(query, cos, sin), gate, keys, values


def scan_summary(f: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gate, keep = _gates(f, _wide(f, k, v))
    decay, ends = _reduce(gate, torch.stack([k, v]).to(gate.dtype).mul_(keep))
    return torch.stack([decay, *ends])


def adjoint_summary(f: Tensor, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    gate, _ = _gates(f, _wide(f, grad_k, grad_v))
    _, first = _reduce(gate.roll(-1, 0).flip(0), torch.stack([grad_k, grad_v]).to(gate.dtype).flip(1))
    return gate[0] * first


def states_of_chunks(decays: Tensor, ends: Tensor, rank: int, back: bool = False) -> Tensor:
    size = len(decays)
    state, states = torch.zeros_like(ends[0, :, 0]), torch.empty_like(ends[0])
    for at in range(2 * size):  # back, the order of ranks is the same, and every rank's second chunk comes first
        owner, chunk = (at, int(back)) if at < size else (2 * size - 1 - at, int(not back))
        if owner == rank:
            states[:, chunk] = state
        state = decays[owner, chunk] * state + ends[owner, :, chunk]
    return states


def scan_forward(f: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    initial_state = initial_state.to(_wide(f, k, v))
    keys, values, _ = _forward(f, k, v, initial_state)
    return keys, values, initial_state if training else None


def scan_backward(f, k, v, saved: Tensor, grad_k, grad_v, grad_final, out: tuple[Tensor, Tensor, Tensor]) -> None:
    for place, gradient in zip(out, _backward(f, k, v, saved, grad_k, grad_v, grad_final)[:3], strict=True):
        place.copy_(gradient)


def _wide(*tensors: Tensor) -> torch.dtype:
    """The type to compute in."""
    return torch.float64 if torch.float64 in (x.dtype for x in tensors) else torch.float32


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, k, v, initial_state):
        ctx.save_for_backward(f, k, v, initial_state)
        return _forward(f, k, v, initial_state)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k, grad_v, grad_final):
        return _backward(*ctx.saved_tensors, grad_k, grad_v, grad_final)


def _forward(f, k, v, initial_state) -> tuple[Tensor, Tensor, Tensor]:
    """k~, v~ and the final state."""
    gate, keep = _gates(f, initial_state.dtype)
    states = torch.stack([k, v]).to(gate.dtype).mul_(keep)  # [2, s, b, ng, hn]
    _scan_(gate, states, initial_state)
    # Copies, so that one output kept alive does not hold the memory of all.
    return states[0].to(k.dtype, copy=True), states[1].to(v.dtype, copy=True), states[:, -1].clone()


def _backward(f, k, v, initial_state, grad_k, grad_v, grad_final) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _gates(f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g and 1 - g. The second is sigmoid(-f): the difference would lose every digit when the gate is near 1."""
    f = f.to(dtype)
    return torch.sigmoid(f), torch.sigmoid(-f)


def _scan_(gate: Tensor, x: Tensor, state: Tensor) -> None:
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


def _reduce(gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Decay [...] and end state from zero [2, ...] of all steps. gate [s, ...], x [2, s, ...]."""
    chunks = gate.shape[0] // _CHUNK
    if chunks < 2:
        return _summarise(gate, x)
    decay, ends = _summarise(*_chunked(gate, x, chunks))
    rest = chunks * _CHUNK  # a summary is itself a step, so the tokens past the last full chunk join the summaries
    return _reduce(torch.cat([decay, gate[rest:]]), torch.cat([ends, x[:, rest:]], dim=1))


def _chunked(gate: Tensor, x: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Views of the full chunks with the step inside a chunk in front: [_CHUNK, chunks, ...] and [2, _CHUNK, chunks, ...]."""
    length = chunks * _CHUNK
    gate = gate[:length].unflatten(0, (chunks, _CHUNK)).transpose(0, 1)
    return gate, x[:, :length].unflatten(1, (chunks, _CHUNK)).transpose(1, 2)


def _summarise(gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and end state from zero, step by step, leaving x as it is."""
    decay, end = gate[0].clone(), x[:, 0].clone()
    for t in range(1, gate.shape[0]):
        end.mul_(gate[t]).add_(x[:, t])
        decay.mul_(gate[t])
    return decay, end


def _steps_(gate: Tensor, x: Tensor, state: Tensor) -> None:
    """The recurrence itself, in place and step by step."""
    for t in range(gate.shape[0]):
        state = x[:, t].addcmul_(gate[t], state)
