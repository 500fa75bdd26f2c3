"""What the gated scan's Triton kernels are made of: gates, folds over a row's steps, the scan over rows, and how chunks pass states on.

A row's steps come as tuples of tiles, one a step. Steps past the end are loaded as f = inf and zeros, which changes no state.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ON_GPU = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _gate(f):
    """g = sigmoid(f) and 1 - g = sigmoid(-f), both to full relative accuracy down to 1e-34."""
    odds = tl.minimum(f.to(tl.float32) * -1.4426950408889634, 115.0, tl.PropagateNan.ALL)
    if _ON_GPU:  # without the care for denormals and huge divisors, which doubles the instructions
        odds = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [odds], tl.float32, True, 1)
        gate = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + odds], tl.float32, True, 1)
    else:
        odds = tl.exp2(odds)
        gate = 1.0 / (1.0 + odds)
    return gate, odds * gate


@triton.jit
def fold(f, k, v, a, end_k, end_v, STEPS: tl.constexpr):
    for i in tl.static_range(STEPS):
        gate, keep = _gate(f[i])
        a *= gate
        end_k = gate * end_k + keep * k[i].to(tl.float32)
        end_v = gate * end_v + keep * v[i].to(tl.float32)
    return a, end_k, end_v


@triton.jit
def fold_adjoint(f, grad_k, grad_v, a, end_k, end_v, STEPS: tl.constexpr):
    for i in tl.static_range(STEPS):
        gate, _ = _gate(f[i])
        a *= gate
        end_k += a * grad_k[i].to(tl.float32)
        end_v += a * grad_v[i].to(tl.float32)
    return a, end_k, end_v


@triton.jit
def run(f, k, v, state_k, state_v, STEPS: tl.constexpr):
    """The recurrence itself: the states after each step, and the last."""
    out_k, out_v = (), ()
    for i in tl.static_range(STEPS):
        gate, keep = _gate(f[i])
        state_k = gate * state_k + keep * k[i].to(tl.float32)
        state_v = gate * state_v + keep * v[i].to(tl.float32)
        out_k, out_v = out_k + (state_k,), out_v + (state_v,)
    return out_k, out_v, state_k, state_v


@triton.jit
def jumps(f, k, v, state_k, state_v, STEPS: tl.constexpr):
    """How far the state before each step lies from the step's input, x~_{t-1} - x_t: the derivative of x~_t by g_t."""
    out_k, out_v = (), ()
    for i in tl.static_range(STEPS):
        gate, keep = _gate(f[i])
        x_k, x_v = k[i].to(tl.float32), v[i].to(tl.float32)
        out_k, out_v = out_k + (state_k - x_k,), out_v + (state_v - x_v,)
        state_k, state_v = gate * state_k + keep * x_k, gate * state_v + keep * x_v
    return out_k, out_v


@triton.jit
def run_adjoint(
    f, grad_k, grad_v, jump_k, jump_v, c_k, c_v, out_f, out_k, out_v, o_s, lane, left, STEPS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """The adjoint recurrence from the last step to the first, writing the gradients; returns its state before the first step."""
    for i in tl.static_range(STEPS - 1, -1, -1):
        gate, keep = _gate(f[i])
        a_k, a_v = c_k + grad_k[i].to(tl.float32), c_v + grad_v[i].to(tl.float32)
        c_k, c_v = gate * a_k, gate * a_v
        store(out_f + i * o_s, keep * (c_k * jump_k[i] + c_v * jump_v[i]), lane & (i < left), EVEN)
        store(out_k + i * o_s, keep * a_k, lane & (i < left), EVEN)
        store(out_v + i * o_s, keep * a_v, lane & (i < left), EVEN)
    return c_k, c_v


@triton.jit
def rotate(low, high, cos, sin, stride, sign, lane, left, STEPS: tl.constexpr, EVEN: tl.constexpr):
    """RoPE of each step by its angle (sign 1) or back (sign -1)."""
    out_low, out_high = (), ()
    for i in tl.static_range(STEPS):
        c = _load(cos + i * stride, 0.0, lane & (i < left), EVEN).to(tl.float32)
        s = _load(sin + i * stride, 0.0, lane & (i < left), EVEN).to(tl.float32) * sign
        x, y = low[i].to(tl.float32), high[i].to(tl.float32)
        out_low, out_high = out_low + (x * c - y * s,), out_high + (y * c + x * s,)
    return out_low, out_high


@triton.jit
def scan(a, k, v):
    """Decay and ends of the rows up to and with each, and of the rows before each."""
    one, zero = tl.full(a.shape, 1.0, tl.float32), tl.zeros(a.shape, tl.float32)
    return tl.associative_scan((a, k, v, one, zero, zero), 0, _join_with_before)


@triton.jit
def join(a, k, v, next_a, next_k, next_v):
    return a * next_a, next_a * k + next_k, next_a * v + next_v


@triton.jit
def _join_with_before(a, k, v, a0, k0, v0, next_a, next_k, next_v, next_a0, next_k0, next_v0):
    return a * next_a, next_a * k + next_k, next_a * v + next_v, a * next_a0, next_a0 * k + next_k0, next_a0 * v + next_v0


@triton.jit
def origin(head, groups, batch_stride, group_stride):
    return (head // groups).to(tl.int64) * batch_stride + (head % groups).to(tl.int64) * group_stride


@triton.jit
def _load(pointer, other, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=other)


@triton.jit
def store(pointer, x, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointer, x)
    else:
        tl.store(pointer, x, mask=mask)


@triton.jit
def load_rows(pointer, stride, other, lane, left, STEPS: tl.constexpr, EVEN: tl.constexpr):
    rows = ()
    for i in tl.static_range(STEPS):
        rows = rows + (_load(pointer + i * stride, other, lane & (i < left), EVEN),)
    return rows


@triton.jit
def load_halves(pointer, stride, other, PAIR: tl.constexpr, low, high, left, STEPS: tl.constexpr, EVEN: tl.constexpr):
    low_rows = load_rows(pointer, stride, other, low, left, STEPS, EVEN)
    return low_rows, load_rows(pointer + PAIR, stride, other, high, left, STEPS, EVEN)


@triton.jit
def load_state(pointer, part, half, low, high):
    """A state whose value part lies ``part`` after its key part, and whose high halves lie ``half`` after the low ones."""
    k_l, k_h = tl.load(pointer, mask=low, other=0.0), tl.load(pointer + half, mask=high, other=0.0)
    pointer += part
    return k_l, k_h, tl.load(pointer, mask=low, other=0.0), tl.load(pointer + half, mask=high, other=0.0)


@triton.jit
def store_state(pointer, part, half, k_l, k_h, v_l, v_h, low, high):
    tl.store(pointer, k_l, mask=low)
    tl.store(pointer + half, k_h, mask=high)
    tl.store(pointer + part, v_l, mask=low)
    tl.store(pointer + part + half, v_h, mask=high)


@triton.jit
def await_state(pointer, size, PAIR: tl.constexpr, low, high):
    """Reads a state until all of it is there. Each word tells for itself, so no order among the writes matters."""
    k_l, k_h, v_l, v_h = _poll(pointer, size, PAIR, low, high)
    while tl.max(((k_l == -1) | (k_h == -1) | (v_l == -1) | (v_h == -1)).to(tl.int32)) > 0:
        k_l, k_h, v_l, v_h = _poll(pointer, size, PAIR, low, high)
    k_l, k_h = k_l.to(tl.float32, bitcast=True), k_h.to(tl.float32, bitcast=True)
    return k_l, k_h, v_l.to(tl.float32, bitcast=True), v_h.to(tl.float32, bitcast=True)


@triton.jit
def _poll(pointer, size, PAIR: tl.constexpr, low, high):
    k_l = tl.load(pointer, mask=low, other=0, volatile=True)
    k_h = tl.load(pointer + PAIR, mask=high, other=0, volatile=True)
    v_l = tl.load(pointer + size, mask=low, other=0, volatile=True)
    return k_l, k_h, v_l, tl.load(pointer + size + PAIR, mask=high, other=0, volatile=True)


@triton.jit
def publish_state(pointer, size, PAIR: tl.constexpr, k_l, k_h, v_l, v_h, low, high):
    tl.store(pointer, _word(k_l), mask=low)
    tl.store(pointer + PAIR, _word(k_h), mask=high)
    tl.store(pointer + size, _word(v_l), mask=low)
    tl.store(pointer + size + PAIR, _word(v_h), mask=high)


@triton.jit
def _word(x):
    word = x.to(tl.int32, bitcast=True)
    return tl.where(word == -1, 0x7FFFFFFF, word)  # of all NaNs, that one must never be sent
