"""How fast the operators are, against dense attention and against what torch.compile makes of the plain formulas, in one process.

    python -m benchmarks.kernels [--only ROW...] [--json FILE]

Every row times its candidates in turn, round after round, and prints the median with the lowest and highest round. A floor is a copy
kernel that moves the same bytes. Inputs are slices of one random projection in Megatron's layout, as in training; --tiny tries it all on
any machine. "Difference" is that of our output from the straightforward version's (the scan: from float64), relative.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import straightforward
from benchmarks.timing import (
    captured,
    copy_of_bytes,
    describe,
    difference,
    free_memory,
    machine,
    milliseconds,
    waits_for_device,
    write_json,
)
from rat_megatron.ops.decode import decode_step
from rat_megatron.ops.dilated_attention import dilated_attention
from rat_megatron.ops.gated_scan import gated_scan
from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.pattern import HeadPattern, LayerPattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS, DENSE, PLAIN, FLOOR = "ours", "dense", "torch.compile", "floor"


@dataclass(frozen=True)
class Size:
    """Shapes of a whole table; what is tiny runs on a CPU in seconds."""

    heads: int = 16
    hn: int = 128
    length: int = 4096
    long: int = 262144
    batch: int = 4
    prefill_batch: int = 64
    decode_batch: int = 256
    repetitions: int = 20
    dtype: torch.dtype = torch.bfloat16


TINY = Size(heads=2, hn=16, length=128, long=256, batch=2, prefill_batch=2, decode_batch=3, repetitions=2)
if DEVICE == "cpu":
    TINY = replace(TINY, dtype=torch.float32)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--ours-only", action="store_true", help="leave out the straightforward version, which takes long to compile")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a trial on any machine")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here, after every row")
    args = parser.parse_args(arguments)
    facts = machine()
    print(describe(facts), flush=True)
    print(f"{'row':22}{'goal':>16}{'measured':>12}  {'':4} candidates: median ms (lowest-highest)", flush=True)
    results: dict[str, Any] = {"machine": facts, "tiny": args.tiny, "rows": {}}
    for name in args.only:
        try:
            row = ROWS[name](TINY if args.tiny else Size(), not args.ours_only)
        except Exception as error:  # one row that fails (out of memory, a compiler) must not lose the others
            row = {"error": f"{type(error).__name__}: {error}"[:2000]}
            del error
        results["rows"][name] = row
        print(_line(name, row), flush=True)
        write_json(args.json, results)
        free_memory()
        torch._dynamo.reset()


def _line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:22}failed: {row['error'][:300]}"
    times = "  ".join(f"{key} {t['median']:.3f} ({t['lowest']:.3f}-{t['highest']:.3f})" for key, t in row["times"].items())
    notes = f"  difference {row['difference']:.1e}" if "difference" in row else ""
    notes += "  WAITS FOR THE DEVICE" if row["waits_for_device"] else ""
    return f"{name:22}{row['goal']:>16}{row['measured']:>12}  {'met' if row['met'] else 'MISS':4} {times}{notes}"


def _row(runs: dict[str, Callable], size: Size, goal: float, of: str | None = None, flush: bool = False, divide: int = 1, **more):
    """Times the candidates. The goal is milliseconds of ours, or with ``of`` its share of another candidate's time."""
    runs = {name: run for name, run in runs.items() if run is not None}
    for run in runs.values():  # compiles
        run()
    times = milliseconds(runs, size.repetitions, flush)
    times = {name: {key: value / divide for key, value in summary.items()} for name, summary in times.items()}
    value = times[OURS]["median"] / (times[of]["median"] if of else 1)
    return {
        "goal": f"<= {goal:g} x {of}" if of else f"<= {goal:g} ms",
        "measured": f"{value:.2f} x" if of else f"{value:.3f} ms",
        "value": value,
        "met": value <= goal,
        "times": times,
        "waits_for_device": waits_for_device(runs[OURS]),
        **more,
    }


# ---- inputs --------------------------------------------------------------------------------------------------------------------------


def _projection(length: int, batch: int, parts: int, size: Size) -> list[Tensor]:
    """Slices [s, b, heads, hn] of one projection, whose rows are laid out per head as the model's are."""
    fused = torch.randn(length, batch, size.heads, parts * size.hn, device=DEVICE).to(size.dtype)
    return list(fused.split(size.hn, dim=-1))


def _angles(length: int, size: Size) -> tuple[Tensor, Tensor]:
    frequencies = 10000 ** -(torch.arange(0, size.hn, 2, device=DEVICE) / size.hn)
    angle = torch.arange(length, device=DEVICE)[:, None] * frequencies
    return angle.cos(), angle.sin()


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.permute(1, 2, 0, 3).contiguous() for x in tensors]  # [s, b, heads, hn] -> [b, heads, s, hn]


def _learning(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _bytes(tensors: int, x: Tensor) -> int:
    return tensors * x.numel() * x.element_size()


# ---- the scan ------------------------------------------------------------------------------------------------------------------------


def scan_forward(size: Size, plain: bool, length: int | None = None, batch: int | None = None, goal=(1.3, FLOOR)) -> dict[str, Any]:
    f, k, v = inputs = _projection(length or size.length, batch or size.batch, 3, size)
    learning = _learning(inputs)
    runs = {
        OURS: lambda: gated_scan(f, k, v),
        "ours for training": lambda: gated_scan(*learning),
        PLAIN: _plain_scan(inputs) if plain else None,
        FLOOR: copy_of_bytes(_bytes(5, k), DEVICE),
    }
    part = slice(0, 1), slice(0, min(2, size.heads))  # a few heads over the whole length
    exact = gated_scan(*(x[:, part[0], part[1]].double() for x in inputs), implementation="torch")
    ours = gated_scan(f, k, v)
    worst = max(difference(a[:, part[0], part[1]], e) for a, e in zip(ours[:2], exact[:2], strict=True))
    del ours, exact
    return _row(runs, size, *goal, difference=worst)


def _plain_scan(inputs: list[Tensor]) -> Callable:
    scan, inputs = straightforward.compiled(straightforward.scan), _heads_first(*inputs)
    return torch.no_grad()(lambda: scan(*inputs))


def scan_backward(size: Size, plain: bool) -> dict[str, Any]:
    inputs = _learning(_projection(size.length, size.batch, 3, size))
    weights = [torch.randn_like(inputs[1]) for _ in range(2)]
    outputs = gated_scan(*inputs)[:2]
    both = None
    if plain:
        scan, plain_inputs = straightforward.compiled(straightforward.scan), _learning(_heads_first(*inputs))
        plain_weights = _heads_first(*weights)
        both = lambda: torch.autograd.grad(scan(*plain_inputs), plain_inputs, plain_weights)  # noqa: E731
    runs = {
        OURS: lambda: torch.autograd.grad(outputs, inputs, weights, retain_graph=True),
        "ours fwd+bwd": lambda: torch.autograd.grad(gated_scan(*inputs)[:2], inputs, weights),
        f"{PLAIN} fwd+bwd": both,
        FLOOR: copy_of_bytes(_bytes(8, inputs[1]), DEVICE),
    }
    part = [x[:, :1, :2].detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(gated_scan(*part, implementation="torch")[:2], part, [w[:, :1, :2].double() for w in weights])
    worst = max(difference(a[:, :1, :2], e) for a, e in zip(runs[OURS](), exact, strict=True))
    return _row(runs, size, 1.5, FLOOR, difference=worst)


def scan_long(size: Size, plain: bool) -> dict[str, Any]:
    return scan_forward(size, plain, size.long, 1, (2.6,))


# ---- scan, RoPE and attention --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefill(size: Size, plain: bool, word: str, goal: float, long: bool) -> dict[str, Any]:
    length, batch = (size.long, 1) if long else (size.length, size.prefill_batch)
    head, scale = HeadPattern.parse(word), 1 / math.sqrt(size.hn)
    pattern = LayerPattern((head,))
    f, q, k, v = _projection(length, batch, 4, size)
    cos, sin = _angles(length, size)

    def ours():
        keys, values, _ = gated_scan(f, k, v, None, cos, sin)
        return dilated_attention(q, keys, values, pattern, scale, cos=cos, sin=sin)

    keys, values, _ = gated_scan(f, k, v, None, cos, sin)
    queries, dense = straightforward.rope(q, cos[:, None, None], sin[:, None, None]), _heads_first(q, k, v)
    runs = {
        OURS: ours,
        "attention alone": lambda: dilated_attention(queries, keys, values, pattern, scale),
        "scan with RoPE": lambda: gated_scan(f, k, v, None, cos, sin),
        DENSE: lambda: straightforward.dense_attention(*dense),
    }
    more = {}
    if plain:
        operator = straightforward.compiled(straightforward.operator)
        mask = straightforward.dilated_block_mask(length, head.dilation, DEVICE)
        plain_inputs = _heads_first(f, q, k, v)
        runs[PLAIN] = lambda: operator(*plain_inputs, cos, sin, mask)
        more["difference"] = difference(ours().permute(1, 2, 0, 3), runs[PLAIN]())
    slow = size.repetitions // 4 if long else size.repetitions // 2
    row = _row(runs, replace(size, repetitions=max(2, slow)), goal, **more)
    return row | {"over_dense": row["times"][DENSE]["median"] / row["times"][OURS]["median"]}


def training(size: Size, plain: bool) -> dict[str, Any]:
    """The sparse step's attention forward and backward, scan included, against dense attention without a scan."""
    batch, pattern, scale = 2, LayerPattern((HeadPattern(64),)), 1 / math.sqrt(size.hn)
    f, q, k, v = inputs = _learning(_projection(size.length, batch, 4, size))
    weight = torch.randn(size.length, batch, size.heads, size.hn, device=DEVICE).to(size.dtype)
    cos, sin = _angles(size.length, size)

    def ours(*tables: Tensor):
        keys, values, _ = gated_scan(f, k, v, None, *tables)
        return torch.autograd.grad(dilated_attention(q, keys, values, pattern, scale), inputs, weight)

    dense_inputs, (dense_weight,) = _learning(_heads_first(q, k, v)), _heads_first(weight)
    runs = {
        OURS: ours,
        "ours with RoPE of keys": lambda: ours(cos, sin),
        DENSE: lambda: torch.autograd.grad(straightforward.dense_attention(*dense_inputs), dense_inputs, dense_weight),
    }
    more = {}
    if plain and DEVICE == "cuda":  # FlexAttention has no backward on a CPU
        operator = straightforward.compiled(straightforward.operator)
        mask, still = straightforward.dilated_block_mask(size.length, 64, DEVICE), (torch.ones_like(cos), torch.zeros_like(sin))
        plain_inputs = _learning(_heads_first(*inputs))
        runs[PLAIN] = lambda: torch.autograd.grad(operator(*plain_inputs, *still, mask), plain_inputs, dense_weight)
        more["difference"] = max(difference(a.permute(1, 2, 0, 3), b) for a, b in zip(ours(), runs[PLAIN](), strict=True))
    return _row(runs, size, 0.5, DENSE, flush=True, **more)


# ---- decoding ------------------------------------------------------------------------------------------------------------------------


def decode(size: Size, plain: bool, word: str, goal: tuple) -> dict[str, Any]:
    head, batch, scale = HeadPattern.parse(word), size.decode_batch, 1 / math.sqrt(size.hn)
    layers = 1 if head.is_dense else 4  # as in a model, whose layers do not find their cache in L2
    like = torch.empty(batch, size.heads, 1, size.hn, dtype=size.dtype, device=DEVICE)
    caches = [HeadCache(head, like, size.length, "bounds") for _ in range(layers)]
    for cache in caches:
        for tensor in (cache.k, cache.v, cache.state):
            tensor.normal_()
    q, f, k, v = torch.randn(batch, size.heads, 4 * size.hn, device=DEVICE).to(size.dtype).split(size.hn, dim=-1)
    cos, sin = (table[-1].expand(batch, -1).contiguous() for table in _angles(size.length, size))
    lengths = torch.full((batch,), size.length - 1, device=DEVICE)
    copies = [copy_of_bytes(_bytes(2, cache.k), DEVICE) for cache in caches]
    runs = {
        OURS: captured(lambda: [decode_step(q, f, k, v, cos, sin, cache, lengths, scale) for cache in caches]),
        FLOOR: captured(lambda: [copy() for copy in copies]),
    }
    more = {}
    if plain:
        decode_plain = torch.no_grad()(straightforward.compiled(straightforward.decode))
        exact = [x.clone() for x in (caches[0].k, caches[0].v, caches[0].state)]
        expected = decode_plain(q, f, k, v, cos, sin, *exact)
        more["difference"] = difference(decode_step(q, f, k, v, cos, sin, caches[0], lengths, scale), expected)
        del exact, expected
        runs[PLAIN] = captured(lambda: [decode_plain(q, f, k, v, cos, sin, c.k, c.v, c.state) for c in caches])
    return _row(runs, size, *goal, flush=not head.is_dense, divide=layers, **more)


ROWS: dict[str, Callable[[Size, bool], dict[str, Any]]] = {
    "scan-forward": scan_forward,
    "scan-backward": scan_backward,
    "scan-262144": scan_long,
    "training-d64": training,
    "decode-dense": partial(decode, word="dense", goal=(1.5, FLOOR)),
    "decode-d16": partial(decode, word="d16", goal=(1.5, FLOOR)),
    "decode-d64": partial(decode, word="d64", goal=(0.1,)),
    "prefill-64x4096-d64": partial(prefill, word="d64", goal=4.0, long=False),
    "prefill-262144-d64": partial(prefill, word="d64", goal=12.5, long=True),
    "prefill-262144-d16": partial(prefill, word="d16", goal=36.0, long=True),
}


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(16, os.cpu_count() or 1)))
    main()
