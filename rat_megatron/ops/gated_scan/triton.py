"""The RAT+ recurrence in one pass over memory, with RoPE on the keys when asked for; functions as in the package's ``__init__``.

A program owns a chunk of steps of one head, as WIDTH rows of consecutive steps. It reduces the chunk to what it does to the state, waits
for the state that its predecessor publishes, publishes its own, and writes the outputs from what it read ("chained scan"). Where that
chain would be too slow, WIDTH chunks form a group: they publish what they do to the state at once, and only groups wait for each other.
Nothing is added in an order that timing decides, so results repeat exactly. Source: RAT+ (arXiv 2602.18196).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rat_megatron.ops.gated_scan.kernels import (
    gated_scan_backward,
    gated_scan_forward,
    gated_scan_join,
    gated_scan_states,
    gated_scan_summary,
)
from rat_megatron.ops.rope.triton import apply_rope

_WIDTH, _STEPS = 8, 8  # rows of a chunk; steps that a row loads at once. More steps take far longer to compile.
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
# From so many steps on, with fewer channels than these in all heads, the chunks' waiting for each other would set the time, so they form
# groups. Measured on an H100.
_LONG, _FEW = 8192, 3072


def gated_scan(
    f: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """f, k and v in bf16, fp16 or fp32, any strides; raises ValueError for other types."""
    _check_types(f, k, v)
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (f, k, v, initial_state))
    return _GatedScan.apply(_unit_stride(f), _unit_stride(k), _unit_stride(v), initial_state, cos, sin, training)


def scan_mixed_qkv(
    mixed_qkv: Tensor, widths: list[int], cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turned queries are a copy, so for the backward pass the states lie in their place in the projection: memory for nothing else."""
    _check_types(mixed_qkv)
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    training = torch.is_grad_enabled() and mixed_qkv.requires_grad
    return _ScanMixedQkv.apply(_unit_stride(mixed_qkv), widths, cos, sin, training)


def scan_summary(f: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check_types(f, k, v)
    return _summarise(f, k, v, adjoint=False)


def adjoint_summary(f: Tensor, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    _check_types(f, grad_k, grad_v)
    return _summarise(f, grad_k, grad_v, adjoint=True)[1:]


def states_of_chunks(decays: Tensor, ends: Tensor, rank: int, back: bool = False) -> Tensor:
    decays, ends = (x if x[0].is_contiguous() else x.contiguous() for x in (decays, ends))
    out = torch.empty(ends.shape[1:], dtype=torch.float32, device=ends.device)
    size = out[0, 0].numel()
    gated_scan_states[(triton.cdiv(size, 128),)](
        decays, ends, out, rank, size, decays.stride(0), ends.stride(0), RANKS=len(decays), BACK=int(back), LANES=128, num_warps=1
    )
    return out


def scan_forward(f: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    _check_types(f, k, v)
    f, k, v = _unit_stride(f), _unit_stride(k), _unit_stride(v)
    keys, values, _, saved = _launch_forward(f, k, v, initial_state.float().contiguous(), None, None, training)
    return keys, values, saved


def scan_backward(f, k, v, saved: Tensor, grad_k, grad_v, grad_final, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """``out`` has unit stride in hn."""
    f, k, v = _unit_stride(f), _unit_stride(k), _unit_stride(v)
    _launch_backward(f, k, v, saved, None, None, grad_k, grad_v, grad_final.float().contiguous(), *out)


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, k, v, initial, cos, sin, training):
        *outputs, saved = _launch_forward(f, k, v, initial, cos, sin, training)
        ctx.save_for_backward(f, k, v, saved, cos, sin)
        ctx.has_initial = initial is not None
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k, grad_v, grad_final):
        f, k, v, *saved = ctx.saved_tensors
        out_k = _dense_like(k)
        out_f, out_v = torch.empty_like(out_k, dtype=f.dtype), torch.empty_like(out_k, dtype=v.dtype)
        grad_initial = _launch_backward(f, k, v, *saved, grad_k, grad_v, grad_final.contiguous(), out_f, out_k, out_v)
        return out_f, out_k, out_v, grad_initial if ctx.has_initial else None, None, None, None


class _ScanMixedQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projection, widths, cos, sin, training):
        query, gate, k, v, f = projection.split(widths, dim=-1)
        room = None
        if cos is not None:
            query, room = apply_rope(query, cos, sin), _room_for_states(projection, k) if training else None
        keys, values, final, saved = _launch_forward(f, k, v, None, cos, sin, training, room)
        ctx.save_for_backward(projection, saved if room is None else None, cos, sin)
        ctx.widths, ctx.state_shape = widths, final.shape
        return query, gate, keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_gate, grad_k, grad_v):
        projection, saved, cos, sin = ctx.saved_tensors
        _, _, k, v, f = projection.split(ctx.widths, dim=-1)
        saved = _room_for_states(projection, k) if saved is None else saved
        grad = torch.empty_like(projection)
        out_query, out_gate, out_k, out_v, out_f = grad.split(ctx.widths, dim=-1)
        if cos is None:
            out_query.copy_(grad_query)
        else:
            apply_rope(grad_query, cos, sin, out_query, back=True)
        out_gate.copy_(grad_gate)
        no_later = torch.zeros(ctx.state_shape, dtype=torch.float32, device=grad.device)
        _launch_backward(f, k, v, saved, cos, sin, grad_k, grad_v, no_later, out_f, out_k, out_v)
        return grad, None, None, None, None


def _room_for_states(projection: Tensor, k: Tensor) -> Tensor | None:
    """The queries' place in a projection as fp32 [s / _STEPS, 2, b, ng, 2, hn / 2], if it fits: a half state a token, four in _STEPS."""
    length, batch, groups, hn = k.shape
    if length % _STEPS or hn % 2 or any(stride % 2 for stride in projection.stride()[:3]) or projection.storage_offset() % 2:
        return None
    words = projection if projection.dtype == torch.float32 else projection.view(torch.float32)
    s, b, g, _ = words.stride()
    shape, strides = (length // _STEPS, 2, batch, groups, 2, hn // 2), (_STEPS * s, 2 * s, b, g, s, 1)
    return words.as_strided(shape, strides)


def _launch_forward(f, k, v, initial, cos, sin, training: bool, room: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """k~, v~, the final state, and for the backward pass the state before every _STEPS steps, in ``room`` if there is some."""
    length, batch, groups, hn = f.shape
    heads = batch * groups
    out_k = _dense_like(k)
    out_v = torch.empty_like(out_k, dtype=v.dtype)
    final = torch.empty(2, batch, groups, hn, dtype=torch.float32, device=f.device)
    chunks = triton.cdiv(length, _WIDTH * _STEPS)
    grouped = heads * hn < _FEW and length >= _LONG
    saved = room
    if training and room is None:
        saved = torch.empty(triton.cdiv(length, _STEPS), *final.shape, device=f.device)
    gated_scan_forward[(chunks * heads,)](
        f, k, v, out_k, out_v, initial, _unpublished(chunks, final, grouped), saved, final, cos, sin, length, heads, groups, chunks,
        *_strides(f, k, v, out_k), *_saved_strides(saved, hn), **_options(f, 2), maxnreg=128,  # two programs on a processor
        INITIAL=initial is not None, GROUPED=grouped, SAVE=training, ROPE=cos is not None,
    )  # fmt: skip
    return out_k, out_v, final, saved


def _launch_backward(f, k, v, saved, cos, sin, grad_k, grad_v, grad_final, out_f, out_k, out_v) -> Tensor:
    """Writes the gradients into out_f, out_k and out_v, whose strides are alike; returns that of the initial state."""
    length, batch, groups, _ = f.shape
    heads = batch * groups
    grad_k, grad_v = _unit_stride(grad_k), _unit_stride(grad_v)
    grad_initial = torch.empty_like(grad_final)
    chunks = triton.cdiv(length, _WIDTH * _STEPS)
    gated_scan_backward[(chunks * heads,)](
        f, k, v, grad_k, grad_v, out_f, out_k, out_v, saved, _unpublished(chunks, grad_final), grad_initial, grad_final, cos, sin,
        length, heads, groups, chunks, *_strides(f, k, v, grad_k, grad_v, out_k), *_saved_strides(saved, f.shape[3]), **_options(f, 4),
        ROPE=cos is not None,
    )  # fmt: skip
    return grad_initial


def _summarise(f: Tensor, k: Tensor, v: Tensor, adjoint: bool) -> Tensor:
    """Decay and end of both recurrences over all steps, [3, b, ng, hn]; adjoint: of the adjoint recurrence, which runs from the end."""
    f, k, v = _unit_stride(f), _unit_stride(k), _unit_stride(v)
    length, batch, groups, hn = f.shape
    heads = batch * groups
    # Enough pieces to fill the chip, and few enough for one program to join them.
    pieces = min(32, triton.next_power_of_2(triton.cdiv(1024, heads)), triton.next_power_of_2(triton.cdiv(length, 256)))
    span = triton.cdiv(length, pieces * _WIDTH)
    lanes = triton.next_power_of_2(hn)
    parts = torch.empty(pieces, 3, batch, groups, hn, dtype=torch.float32, device=f.device)
    gated_scan_summary[(pieces * heads,)](
        f, k, v, parts, length, span, heads, groups, pieces, *_strides(f, k, v),
        HN=hn, LANES=lanes, WIDTH=_WIDTH, STEPS=_STEPS, ADJOINT=adjoint, num_warps=max(1, min(8, lanes * _WIDTH // 128)),
    )  # fmt: skip
    out = torch.empty_like(parts[0])
    gated_scan_join[(triton.cdiv(heads * hn, 32),)](parts, out, heads * hn, PIECES=pieces, LANES=32, num_warps=4)
    return out


def _check_types(*tensors: Tensor) -> None:
    if any(x.dtype not in _TYPES for x in tensors):
        raise ValueError(f"f, k and v must be bf16, fp16 or fp32, not {[x.dtype for x in tensors]}; the torch implementation takes float64")


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _dense_like(x: Tensor) -> Tensor:
    """An empty tensor without gaps, its dimensions in the order in memory of x's."""
    out = torch.empty_like(x)
    return out if out.stride(3) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _saved_strides(saved: Tensor | None, hn: int) -> tuple[int, ...]:
    """Of saved states [rows, 2, b, ng, hn] or [rows, 2, b, ng, 2, hn / 2]: row, part, sequence, group and half of the channels."""
    if saved is None:
        return 0, 0, 0, 0, 0
    return (*saved.stride()[:4], saved.stride(4) if saved.dim() == 6 else (hn + 1) // 2)


def _unpublished(chunks: int, state: Tensor, grouped: bool = False) -> Tensor:
    """Room for what chunks tell each other, filled with the word that means "not there yet": a NaN that no arithmetic gives."""
    words = 3 * chunks + 2 * triton.cdiv(chunks, _WIDTH) if grouped else 2 * chunks
    return torch.full((words, *state.shape[1:]), -1, dtype=torch.int32, device=state.device)


def _options(f: Tensor, channels: int) -> dict:
    """``channels``: of each half of a row, how many a thread has; measured."""
    length, hn = f.shape[0], f.shape[3]
    half = triton.next_power_of_2((hn + 1) // 2)
    even = length % (_WIDTH * _STEPS) == 0 and hn == 2 * half
    warps = max(1, min(16, half * _WIDTH // (32 * channels)))
    return {"HN": hn, "HALF": half, "WIDTH": _WIDTH, "STEPS": _STEPS, "EVEN": even, "num_warps": warps}
