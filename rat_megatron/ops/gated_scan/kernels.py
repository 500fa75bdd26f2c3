"""Triton kernels of the gated scan: forward, backward, and the summaries that context parallelism exchanges.

Tiles are [WIDTH, HALF]: rows of consecutive steps by channels. A head's channels are two halves, _l (low) and _h (high), so that a thread
has both of a RoPE pair; with an odd hn one lane of the high half is masked. A suffix 0 marks what precedes a row.

A program waits only for programs of a lower number. The hardware starts programs in the order of their numbers and puts no running one
aside for one not started, so the lowest unfinished one can always go on (CUB's scans rely on the same). Source: arXiv 2602.18196.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rat_megatron.ops.gated_scan.kernel_parts import (
    again,
    enter,
    fold,
    fold_adjoint,
    join,
    jumps,
    load_halves,
    load_rows,
    load_state,
    origin,
    rotate,
    run,
    run_adjoint,
    scan,
    store,
    store_state,
)


@triton.jit
def gated_scan_forward(
    f, k, v, out_k, out_v, initial, chain, saved, final, cos, sin, length, heads, groups, chunks,
    f_s, f_b, f_g, k_s, k_b, k_g, v_s, v_b, v_g, o_s, o_b, o_g, saved_s, saved_part, saved_b, saved_g, saved_half,
    HN: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    INITIAL: tl.constexpr, GROUPED: tl.constexpr, SAVE: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    PAIR: tl.constexpr = (HN + 1) // 2
    chunk = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    row = tl.arange(0, WIDTH)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    low, high = lane < PAIR, lane < HN - PAIR
    first = (chunk.to(tl.int64) * WIDTH + row) * STEPS
    f += origin(head, groups, f_b, f_g) + first * f_s + lane
    k += origin(head, groups, k_b, k_g) + first * k_s + lane
    v += origin(head, groups, v_b, v_g) + first * v_s + lane
    out = origin(head, groups, o_b, o_g) + first * o_s + lane
    size = tl.cast(heads, tl.int64) * HN
    here = head.to(tl.int64) * HN + lane + tl.zeros((WIDTH, 1), tl.int32)

    left = length - first
    f_low, f_high = load_halves(f, f_s, float("inf"), PAIR, low, high, left, STEPS, EVEN)
    k_low, k_high = load_halves(k, k_s, 0.0, PAIR, low, high, left, STEPS, EVEN)
    v_low, v_high = load_halves(v, v_s, 0.0, PAIR, low, high, left, STEPS, EVEN)
    one, zero = tl.full((WIDTH, HALF), 1.0, tl.float32), tl.zeros((WIDTH, HALF), tl.float32)
    a_l, k_l, v_l, a0_l, k0_l, v0_l = scan(*fold(f_low, k_low, v_low, one, zero, zero, STEPS))
    a_h, k_h, v_h, a0_h, k0_h, v0_h = scan(*fold(f_high, k_high, v_high, one, zero, zero, STEPS))
    in_kl, in_kh, in_vl, in_vh = enter(
        chunk, chunks, initial, chain, final, size, here, row, a_l, k_l, v_l, a_h, k_h, v_h, low, high, PAIR, WIDTH, INITIAL, GROUPED
    )
    k_l, v_l = k0_l + a0_l * in_kl, v0_l + a0_l * in_vl
    k_h, v_h = k0_h + a0_h * in_kh, v0_h + a0_h * in_vh

    if SAVE:
        saved += origin(head, groups, saved_b, saved_g) + first // STEPS * saved_s + lane
        store_state(saved, saved_part, saved_half, k_l, k_h, v_l, v_h, low & (left > 0), high & (left > 0))
    k_low, v_low, k_l, v_l = run(again(f_low, STEPS), again(k_low, STEPS), again(v_low, STEPS), k_l, v_l, STEPS)
    k_high, v_high, k_h, v_h = run(again(f_high, STEPS), again(k_high, STEPS), again(v_high, STEPS), k_h, v_h, STEPS)
    if ROPE:
        angle = first * PAIR + lane
        k_low, k_high = rotate(k_low, k_high, cos + angle, sin + angle, PAIR, 1.0, low, left, STEPS, EVEN)
    out_k += out
    out_v += out
    for i in tl.static_range(STEPS):
        store(out_k + i * o_s, k_low[i], low & (i < left), EVEN)
        store(out_k + i * o_s + PAIR, k_high[i], high & (i < left), EVEN)
        store(out_v + i * o_s, v_low[i], low & (i < left), EVEN)
        store(out_v + i * o_s + PAIR, v_high[i], high & (i < left), EVEN)


@triton.jit
def gated_scan_backward(
    f, k, v, grad_k, grad_v, out_f, out_k, out_v, saved, chain, grad_initial, grad_final, cos, sin, length, heads, groups, chunks,
    f_s, f_b, f_g, k_s, k_b, k_g, v_s, v_b, v_g, dk_s, dk_b, dk_g, dv_s, dv_b, dv_g, o_s, o_b, o_g,
    saved_s, saved_part, saved_b, saved_g, saved_half,
    HN: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """With d_t the gradient of x~_t, the adjoint c_t = g_t (d_t + c_{t+1}) is what reaches the state before step t.

    Chunks and rows run from the end; the steps of a row are folded forwards and replayed backwards.
    """
    PAIR: tl.constexpr = (HN + 1) // 2
    turn = tl.program_id(0) // heads
    chunk = chunks - 1 - turn
    head = tl.program_id(0) % heads
    row = tl.arange(0, WIDTH)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    low, high = lane < PAIR, lane < HN - PAIR
    first = (chunk.to(tl.int64) * WIDTH + (WIDTH - 1 - row)) * STEPS
    f += origin(head, groups, f_b, f_g) + first * f_s + lane
    k += origin(head, groups, k_b, k_g) + first * k_s + lane
    v += origin(head, groups, v_b, v_g) + first * v_s + lane
    grad_k += origin(head, groups, dk_b, dk_g) + first * dk_s + lane
    grad_v += origin(head, groups, dv_b, dv_g) + first * dv_s + lane
    out = origin(head, groups, o_b, o_g) + first * o_s + lane
    angle = first * PAIR + lane
    size = tl.cast(heads, tl.int64) * HN
    here = head.to(tl.int64) * HN + lane + tl.zeros((WIDTH, 1), tl.int32)

    left = length - first
    f_low, f_high = load_halves(f, f_s, float("inf"), PAIR, low, high, left, STEPS, EVEN)
    v_low, v_high = load_halves(grad_v, dv_s, 0.0, PAIR, low, high, left, STEPS, EVEN)
    k_low, k_high = load_halves(grad_k, dk_s, 0.0, PAIR, low, high, left, STEPS, EVEN)
    if ROPE:
        k_low, k_high = rotate(k_low, k_high, cos + angle, sin + angle, PAIR, -1.0, low, left, STEPS, EVEN)
    one, zero = tl.full((WIDTH, HALF), 1.0, tl.float32), tl.zeros((WIDTH, HALF), tl.float32)
    a_l, k_l, v_l, a0_l, k0_l, v0_l = scan(*fold_adjoint(f_low, k_low, v_low, one, zero, zero, STEPS))
    a_h, k_h, v_h, a0_h, k0_h, v0_h = scan(*fold_adjoint(f_high, k_high, v_high, one, zero, zero, STEPS))
    in_kl, in_kh, in_vl, in_vh = enter(
        turn, chunks, grad_final, chain, grad_initial, size, here, row, a_l, k_l, v_l, a_h, k_h, v_h, low, high, PAIR, WIDTH, True, False
    )
    k_l, v_l = k0_l + a0_l * in_kl, v0_l + a0_l * in_vl
    k_h, v_h = k0_h + a0_h * in_kh, v0_h + a0_h * in_vh

    state = saved + origin(head, groups, saved_b, saved_g) + first // STEPS * saved_s + lane
    state_kl, state_kh, state_vl, state_vh = load_state(state, saved_part, saved_half, low & (left > 0), high & (left > 0))
    # One half after the other, which halves the registers; RoPE mixes the halves of grad_k, so each reads both.
    f_rows = load_rows(f, f_s, float("inf"), low, left, STEPS, EVEN)
    k_rows = load_rows(k, k_s, 0.0, low, left, STEPS, EVEN)
    v_rows = load_rows(v, v_s, 0.0, low, left, STEPS, EVEN)
    dv_rows = load_rows(grad_v, dv_s, 0.0, low, left, STEPS, EVEN)
    if ROPE:
        dk_rows, other = load_halves(grad_k, dk_s, 0.0, PAIR, low, high, left, STEPS, EVEN)
        dk_rows, other = rotate(dk_rows, other, cos + angle, sin + angle, PAIR, -1.0, low, left, STEPS, EVEN)
    else:
        dk_rows = load_rows(grad_k, dk_s, 0.0, low, left, STEPS, EVEN)
    jump_k, jump_v = jumps(f_rows, k_rows, v_rows, state_kl, state_vl, STEPS)
    k_l, v_l = run_adjoint(
        f_rows, dk_rows, dv_rows, jump_k, jump_v, k_l, v_l, out_f + out, out_k + out, out_v + out, o_s, low, left, STEPS, EVEN
    )
    f_rows = load_rows(f + PAIR, f_s, float("inf"), high, left, STEPS, EVEN)
    k_rows = load_rows(k + PAIR, k_s, 0.0, high, left, STEPS, EVEN)
    v_rows = load_rows(v + PAIR, v_s, 0.0, high, left, STEPS, EVEN)
    dv_rows = load_rows(grad_v + PAIR, dv_s, 0.0, high, left, STEPS, EVEN)
    if ROPE:
        other, dk_rows = load_halves(grad_k, dk_s, 0.0, PAIR, low, high, left, STEPS, EVEN)
        other, dk_rows = rotate(other, dk_rows, cos + angle, sin + angle, PAIR, -1.0, low, left, STEPS, EVEN)
    else:
        dk_rows = load_rows(grad_k + PAIR, dk_s, 0.0, high, left, STEPS, EVEN)
    out += PAIR
    jump_k, jump_v = jumps(f_rows, k_rows, v_rows, state_kh, state_vh, STEPS)
    k_h, v_h = run_adjoint(
        f_rows, dk_rows, dv_rows, jump_k, jump_v, k_h, v_h, out_f + out, out_k + out, out_v + out, o_s, high, left, STEPS, EVEN
    )


@triton.jit
def gated_scan_summary(
    f, x, y, parts, length, span, heads, groups, pieces, f_s, f_b, f_g, x_s, x_b, x_g, y_s, y_b, y_g,
    HN: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """parts [pieces, 3, heads, HN]: decay and ends of each piece of WIDTH rows of span steps; ADJOINT: pieces and rows from the end."""
    piece = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    row = tl.arange(0, WIDTH)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    segment = piece * WIDTH + row
    if ADJOINT:
        segment = pieces * WIDTH - 1 - segment
    first = segment.to(tl.int64) * span
    left = tl.minimum(length - first, span)
    f += origin(head, groups, f_b, f_g) + first * f_s + lane
    x += origin(head, groups, x_b, x_g) + first * x_s + lane
    y += origin(head, groups, y_b, y_g) + first * y_s + lane
    a = tl.full((WIDTH, LANES), 1.0, tl.float32)
    end_x = tl.zeros((WIDTH, LANES), tl.float32)
    end_y = end_x
    for _ in range(0, span, STEPS):
        f_rows = load_rows(f, f_s, float("inf"), lane < HN, left, STEPS, False)
        x_rows = load_rows(x, x_s, 0.0, lane < HN, left, STEPS, False)
        y_rows = load_rows(y, y_s, 0.0, lane < HN, left, STEPS, False)
        if ADJOINT:
            a, end_x, end_y = fold_adjoint(f_rows, x_rows, y_rows, a, end_x, end_y, STEPS)
        else:
            a, end_x, end_y = fold(f_rows, x_rows, y_rows, a, end_x, end_y, STEPS)
        f += STEPS * f_s
        x += STEPS * x_s
        y += STEPS * y_s
        left -= STEPS
    a, end_x, end_y = tl.associative_scan((a, end_x, end_y), 0, join)
    size = tl.cast(heads, tl.int64) * HN
    out = parts + piece * 3 * size + head.to(tl.int64) * HN + lane + tl.zeros((WIDTH, 1), tl.int32)
    last = (row == WIDTH - 1) & (lane < HN)
    tl.store(out, a, mask=last)
    tl.store(out + size, end_x, mask=last)
    tl.store(out + 2 * size, end_y, mask=last)


@triton.jit
def gated_scan_join(parts, out, size, PIECES: tl.constexpr, LANES: tl.constexpr):
    """Joins parts [PIECES, 3, size], in order, to out [3, size]."""
    piece = tl.arange(0, PIECES)[:, None]
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)[None, :]
    at = parts + piece * 3 * tl.cast(size, tl.int64) + lane
    a = tl.load(at, mask=lane < size, other=1.0)
    x = tl.load(at + size, mask=lane < size, other=0.0)
    y = tl.load(at + 2 * size, mask=lane < size, other=0.0)
    a, x, y = tl.associative_scan((a, x, y), 0, join)
    out += lane + tl.zeros((PIECES, 1), tl.int32)
    last = (piece == PIECES - 1) & (lane < size)
    tl.store(out, a, mask=last)
    tl.store(out + size, x, mask=last)
    tl.store(out + 2 * size, y, mask=last)


@triton.jit(do_not_specialize=["rank"])
def gated_scan_states(decays, ends, out, rank, size, decays_r, ends_r, RANKS: tl.constexpr, BACK: tl.constexpr, LANES: tl.constexpr):
    """out [2, 2, size]: key and value part of the states before two chunks of RANKS * 2, those numbered rank and 2 * RANKS - 1 - rank.

    decays [RANKS, 2, size], ends [RANKS, 2, 2, size]: of every rank's two chunks. BACK: from the last chunk to the first.
    """
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = lane < size
    decays += lane
    ends += lane
    k = tl.zeros((LANES,), tl.float32)
    v, k_up, v_up, k_down, v_down = k, k, k, k, k
    # What is found is written at the end: a store among the loads would keep them from being under way together.
    for at in tl.static_range(2 * RANKS):
        owner = at if at < RANKS else 2 * RANKS - 1 - at
        chunk = BACK if at < RANKS else 1 - BACK  # back, the order of ranks is the same, and every rank's second chunk comes first
        if at < RANKS:
            k_up, v_up = tl.where(owner == rank, k, k_up), tl.where(owner == rank, v, v_up)
        else:
            k_down, v_down = tl.where(owner == rank, k, k_down), tl.where(owner == rank, v, v_down)
        a = tl.load(decays + owner * decays_r + chunk * size, mask=there, other=0.0)
        k = a * k + tl.load(ends + owner * ends_r + chunk * size, mask=there, other=0.0)
        v = a * v + tl.load(ends + owner * ends_r + (2 + chunk) * size, mask=there, other=0.0)
    out += lane
    tl.store(out + BACK * size, k_up, mask=there)
    tl.store(out + (2 + BACK) * size, v_up, mask=there)
    tl.store(out + (1 - BACK) * size, k_down, mask=there)
    tl.store(out + (3 - BACK) * size, v_down, mask=there)
