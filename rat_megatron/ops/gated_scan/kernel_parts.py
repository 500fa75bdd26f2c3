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
def again(rows, STEPS: tl.constexpr):
    """The same rows, as the compiler cannot know: what it once computed from them would else stay in registers, at twice the size."""
    out = ()
    for i in tl.static_range(STEPS):
        x = rows[i]
        if _ON_GPU:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 32 // x.dtype.primitive_bitwidth)
        out = out + (x,)
    return out


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
def enter(
    turn, turns, begin, chain, end, size, here, row, a_l, k_l, v_l, a_h, k_h, v_h, low, high,
    PAIR: tl.constexpr, WIDTH: tl.constexpr, BEGIN: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """The states that enter the turn-th chunk of the chain, [1, HALF]: low and high half of the key part, then of the value part.

    a, k and v [WIDTH, HALF]: decay and ends of the chunk's rows up to and with each. The chain begins at ``begin`` (BEGIN; else at
    zero), and its last chunk writes ``end``. ``chain`` holds the states after each chunk, or GROUPED: those after every WIDTH chunks, and
    behind them each chunk's own decay and ends, from which the WIDTH chunks after such a state all find theirs at once.
    """
    last_l, last_h = (row == WIDTH - 1) & low, (row == WIDTH - 1) & high  # the last row receives and hands on
    group, place = turn, WIDTH - 1
    if GROUPED:
        group, place = turn // WIDTH, turn % WIDTH
        summaries = chain + tl.cdiv(turns, WIDTH) * 2 * size
        if (place < WIDTH - 1) & (turn < turns - 1):
            own = summaries + turn * 3 * size + here
            _publish(own, PAIR, a_l, a_h, last_l, last_h)
            _publish_state(own + size, size, PAIR, k_l, k_h, v_l, v_h, last_l, last_h)
        before = row < place
        b_l, x_l, y_l, b_h, x_h, y_h = _await_summaries(
            summaries + (group * WIDTH + row) * 3 * size + here, size, PAIR, before & low, before & high
        )
        b_l, x_l, y_l = tl.associative_scan((b_l, x_l, y_l), 0, join)
        b_h, x_h, y_h = tl.associative_scan((b_h, x_h, y_h), 0, join)
    if group > 0:
        in_kl, in_kh, in_vl, in_vh = _await_state(chain + (group - 1) * 2 * size + here, size, PAIR, last_l, last_h)
    elif BEGIN:
        in_kl, in_kh, in_vl, in_vh = load_state(begin + here, size, PAIR, last_l, last_h)
    else:
        in_kl = tl.zeros(a_l.shape, tl.float32)
        in_kh, in_vl, in_vh = in_kl, in_kl, in_kl
    if GROUPED:
        in_kl, in_kh, in_vl, in_vh = x_l + b_l * in_kl, x_h + b_h * in_kh, y_l + b_l * in_vl, y_h + b_h * in_vh
    k_l, k_h, v_l, v_h = k_l + a_l * in_kl, k_h + a_h * in_kh, v_l + a_l * in_vl, v_h + a_h * in_vh
    if turn == turns - 1:
        store_state(end + here, size, PAIR, k_l, k_h, v_l, v_h, last_l, last_h)
    elif place == WIDTH - 1:
        _publish_state(chain + group * 2 * size + here, size, PAIR, k_l, k_h, v_l, v_h, last_l, last_h)
    tl.debug_barrier()  # nothing of what follows is to move before the publication
    if GROUPED:  # the other rows hold what entered them
        in_kl, in_vl = tl.where(row == WIDTH - 1, in_kl, 0.0), tl.where(row == WIDTH - 1, in_vl, 0.0)
        in_kh, in_vh = tl.where(row == WIDTH - 1, in_kh, 0.0), tl.where(row == WIDTH - 1, in_vh, 0.0)
    in_kl, in_kh = tl.sum(in_kl, 0, keep_dims=True), tl.sum(in_kh, 0, keep_dims=True)
    return in_kl, in_kh, tl.sum(in_vl, 0, keep_dims=True), tl.sum(in_vh, 0, keep_dims=True)


@triton.jit
def _await_summaries(pointer, size, PAIR: tl.constexpr, low, high):
    """Decays and ends of chunks, one a row; of rows without one, what changes no state. As _await_state()."""
    a_l, a_h, k_l, k_h, v_l, v_h = _poll_summaries(pointer, size, PAIR, low, high)
    while tl.max(((a_l == -1) | (a_h == -1) | (k_l == -1) | (k_h == -1) | (v_l == -1) | (v_h == -1)).to(tl.int32)) > 0:
        a_l, a_h, k_l, k_h, v_l, v_h = _poll_summaries(pointer, size, PAIR, low, high)
    a_l, k_l, v_l = a_l.to(tl.float32, bitcast=True), k_l.to(tl.float32, bitcast=True), v_l.to(tl.float32, bitcast=True)
    return a_l, k_l, v_l, a_h.to(tl.float32, bitcast=True), k_h.to(tl.float32, bitcast=True), v_h.to(tl.float32, bitcast=True)


@triton.jit
def _poll_summaries(pointer, size, PAIR: tl.constexpr, low, high):
    a_l = tl.load(pointer, mask=low, other=0x3F800000, volatile=True)  # the word of 1.0
    a_h = tl.load(pointer + PAIR, mask=high, other=0x3F800000, volatile=True)
    k_l, k_h, v_l, v_h = _poll(pointer + size, size, PAIR, low, high)
    return a_l, a_h, k_l, k_h, v_l, v_h


@triton.jit
def _await_state(pointer, size, PAIR: tl.constexpr, low, high):
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
def _publish_state(pointer, size, PAIR: tl.constexpr, k_l, k_h, v_l, v_h, low, high):
    _publish(pointer, PAIR, k_l, k_h, low, high)
    _publish(pointer + size, PAIR, v_l, v_h, low, high)


@triton.jit
def _publish(pointer, PAIR: tl.constexpr, x_l, x_h, low, high):
    tl.store(pointer, _word(x_l), mask=low)
    tl.store(pointer + PAIR, _word(x_h), mask=high)


@triton.jit
def _word(x):
    word = x.to(tl.int32, bitcast=True)
    return tl.where(word == -1, 0x7FFFFFFF, word)  # of all NaNs, that one must never be sent
