"""Triton kernel of rotary position embedding (rotate-half)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length"])
def rope_turn(
    x, out, cos, sin, length, groups, x_s, x_b, x_g, o_s, o_b, o_g,
    HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head."""
    head = tl.program_id(0) % HEADS
    group = tl.program_id(0) // HEADS % groups
    batch = (tl.program_id(0) // HEADS // groups).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    there = (row < length) & (lane < HALF)
    x += batch * x_b + group.to(tl.int64) * x_g + row * x_s + head * 2 * HALF + lane
    out += batch * o_b + group.to(tl.int64) * o_g + row * o_s + head * 2 * HALF + lane
    c = tl.load(cos + row * HALF + lane, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + row * HALF + lane, mask=there, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    low = tl.load(x, mask=there, other=0.0).to(tl.float32)
    high = tl.load(x + HALF, mask=there, other=0.0).to(tl.float32)
    tl.store(out, (low * c - high * s).to(out.dtype.element_ty), mask=there)
    tl.store(out + HALF, (high * c + low * s).to(out.dtype.element_ty), mask=there)
