"""Parallel layouts of a 1.5B model on two GPUs against one: loss curves, tokens/s, memory, and the time of the scan's exchange.

    torchrun --nproc-per-node 2 -m benchmarks.layouts [--only NAME...] [--runs-log FILE] [--json FILE]

Every run starts from the checkpoint of its precision, in FP8 with the scales of delayed scaling, and sees the same batches under active
recurrence learning. Checkpoints and the curves of one GPU come from each rank alone, the first in bf16 and the second in FP8. "-64k" is
T = 65,536 with full recomputation, "-graphs" replays a CUDA graph of each step. Under context parallelism, "exchange" is the share of an
iteration in which the GPU waits for the scan's boundary states: on the rank that waits least, and on the one that waits longest, where it
holds the wait for a slower rank too; a graph hides it. "-overlap" hides tensor-parallel communication in matrix products, through NVLink
multicast, or through CUDA IPC with UB_SKIPMC=1 in the environment. --tiny tries it all over gloo, overlap apart.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import megatron_runs
from benchmarks.megatron_runs import FP8, GRAPHS, TINY_MODEL, Run, common_flags, keep_threads_few, leave_groups, random_data
from benchmarks.timing import describe, free_memory, machine, write_json

MODEL = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 8192 --vocab-size 32000 --bf16 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --lr 1e-4 --lr-decay-style constant --weight-decay 0.1 "
    "--clip-grad 1.0 --adam-beta2 0.95"
).split()
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
_PARALLEL = {
    "tp2sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "cp2-p2p": "--context-parallel-size 2 --cp-comm-type p2p",
    "cp2-all_gather": "--context-parallel-size 2 --cp-comm-type all_gather",
    "cp2-a2a": "--context-parallel-size 2 --cp-comm-type a2a",
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2": "",
}
_OVERLAP = {"tp2sp-overlap": f"{_PARALLEL['tp2sp']} --tp-comm-overlap"}
_LONG = [f"{name}-64k" for name in _PARALLEL if name.startswith("cp2")]
_GRAPHS = [f"{name}-graphs" for name in _PARALLEL]
NAMES = [*_PARALLEL, _LONG[0], *(f"{name}-fp8" for name in [*_PARALLEL, _LONG[0]]), *_GRAPHS]  # in order of value
MORE_NAMES = [
    *(f"{name}{fp8}" for name in _LONG[1:] for fp8 in ("", "-fp8")),
    *(f"{name}-fp8-graphs" for name in _PARALLEL),
    *(f"{name}{fp8}{graphs}" for name in _OVERLAP for fp8 in ("", "-fp8") for graphs in ("", "-graphs")),
]  # if asked for


class Kind(NamedTuple):
    """What runs have in common that are compared with one curve of one GPU; precision apart."""

    long: bool
    graphs: bool

    @classmethod
    def of(cls, name: str) -> Kind:
        return cls("-64k" in name, name.endswith("-graphs"))

    def __str__(self) -> str:
        return (", T = 65,536" if self.long else "") + (", CUDA graphs" if self.graphs else "")


_ITERATIONS, _LONG_ITERATIONS, _WARM_UP = 10, 5, 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*NAMES, *MORE_NAMES]
    parser.add_argument("--only", nargs="+", choices=names, default=NAMES, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=500, help="start no further layout after so long")
    parser.add_argument("--runs-log", metavar="FILE", help="where what the runs print goes, with the rank at the end; default: here")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a trial on any machine")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here, after every layout")
    args = parser.parse_args(arguments)
    begun = time.perf_counter()
    rank = int(os.environ["RANK"])
    args.runs_log = f"{args.runs_log}.{rank}" if args.runs_log else None
    _set_up()
    folder = Path(_from_first(tempfile.mkdtemp() if rank == 0 else None))
    try:
        _measure_all(folder, args, begun)
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    leave_groups()


def _measure_all(folder: Path, args: argparse.Namespace, begun: float) -> None:
    first = dist.get_rank() == 0
    results: dict[str, Any] = {"machine": machine(), "tiny": args.tiny, "one GPU": {}, "layouts": {}}
    _say(describe(results["machine"]))
    kinds = sorted({Kind.of(name) for name in args.only})
    if first:
        for long in {False, *(kind.long for kind in kinds)}:  # the start needs the short ones
            random_data(folder / f"data{long:d}", 16 if long else 64, _length(long, args.tiny), 512 if args.tiny else 32000)
    dist.barrier()
    _start(folder, args)
    _say(f"data and starting weights after {time.perf_counter() - begun:.0f} s")
    curves = {}
    for kind in kinds:
        curves[kind] = _alone(folder, kind, args)
        for precision, run in zip(("bf16", "FP8"), curves[kind], strict=True):
            name = f"{precision}{kind}"
            results["one GPU"][name] = _figures([run], kind.long, args.tiny)
            _say(_line(f"one GPU, {name}", results["one GPU"][name]))
    for name in args.only:
        if _from_first(time.perf_counter() - begun) > args.seconds:
            _say(f"{name:22}not started: {args.seconds:.0f} s are over")
            continue
        results["layouts"][name] = _layout(name, folder, curves, args)
        _say(_line(name, results["layouts"][name]) + f"  at {time.perf_counter() - begun:.0f} s")
        if first:
            write_json(args.json, results)


def _layout(name: str, folder: Path, curves: dict[Kind, list[Run]], args: argparse.Namespace) -> dict[str, Any]:
    """Runs one layout on both ranks and compares its losses with those of one GPU in the same precision."""
    kind, fp8 = Kind.of(name), "-fp8" in name
    words = (_PARALLEL | _OVERLAP)[re.sub("-64k|-fp8|-graphs", "", name)].split()
    exchange = _Exchange()
    try:
        with exchange.timed():
            run = megatron_runs.run([*_flags(folder, kind, fp8, args), *words], exchange.after, args.runs_log)
        mine: Any = (run, exchange.seconds)
    except (Exception, SystemExit) as error:  # both ranks fail alike, or the other one's time-out ends the program
        mine = f"{type(error).__name__}: {error}"[:2000]
        del error
    leave_groups()
    free_memory()
    _join()
    every: list[Any] = [None, None]
    dist.all_gather_object(every, mine)
    if failed := [each for each in every if isinstance(each, str)]:
        return {"error": failed[0]}
    runs = [run for run, _ in every]
    figures = _figures(runs, kind.long, args.tiny)
    one = curves[kind][fp8]
    figures["difference"] = _largest_difference(figures["losses"], one.losses)
    figures["over_one_gpu"] = figures["tokens_per_second"] / _figures([one], kind.long, args.tiny)["tokens_per_second"]
    if not kind.graphs and any(exchanged for _, exchanged in every):
        figures["exchange"] = [
            statistics.median(part / whole for part, whole in zip(exchanged[_WARM_UP:], run.seconds[_WARM_UP:], strict=True))
            for run, exchanged in every
        ]
    return figures


class _Exchange:
    """Seconds of every iteration that the device spends on the exchange of the scan's boundary states."""

    def __init__(self):
        self.seconds: list[float] = []
        self._noted: list[tuple[Any, Any]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        from rat_megatron.parallel import context_parallel

        all_gather = context_parallel._all_gather

        def noted(x, group):
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return all_gather(x, group)
            start = _now()
            gathered = all_gather(x, group)
            self._noted.append((start, _now()))
            return gathered

        context_parallel._all_gather = noted
        try:
            yield
        finally:
            context_parallel._all_gather = all_gather

    def after(self, count: int) -> None:
        """Called after every iteration, the device idle."""
        on_gpu = torch.cuda.is_available()
        if self._noted:
            self.seconds.append(sum(start.elapsed_time(end) / 1e3 if on_gpu else end - start for start, end in self._noted))
            self._noted = []


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# ---- runs ----------------------------------------------------------------------------------------------------------------------------


def _start(folder: Path, args: argparse.Namespace) -> None:
    """Each rank trains one iteration in its precision, and saves the weights and scales from which that precision's runs start.

    A single microbatch, because its gradients are four times those of one of four: two ranks with two microbatches each, or with half of
    each sequence, have twice the gradients of one GPU, and scales made for that one would clip them at first.
    """
    fp8 = os.environ["LAYOUTS_RANK"] == "1"
    flags = [*_model(args.tiny), *_of_length(False, args.tiny), "--global-batch-size", "1", *common_flags(folder / "data0", 1, args.tiny)]
    with _single_rank():
        megatron_runs.run([*flags, *_in(fp8), "--save", str(_start_of(folder, fp8)), "--no-save-optim"], log=args.runs_log)
    dist.barrier()


def _start_of(folder: Path, fp8: bool) -> Path:
    return folder / ("start-fp8" if fp8 else "start")


def _in(fp8: bool) -> list[str]:
    return FP8 if fp8 and torch.cuda.is_available() else []


def _alone(folder: Path, kind: Kind, args: argparse.Namespace) -> list[Run]:
    """The run of one GPU in bf16, by the first rank, and in FP8, by the second, at the same time."""
    with _single_rank():
        run = megatron_runs.run(_flags(folder, kind, os.environ["LAYOUTS_RANK"] == "1", args), log=args.runs_log)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, run)
    return every


def _flags(folder: Path, kind: Kind, fp8: bool, args: argparse.Namespace) -> list[str]:
    words = [*_model(args.tiny), *_of_length(kind.long, args.tiny), *(RECOMPUTE if kind.long else [])]
    words += common_flags(folder / f"data{kind.long:d}", _iterations(kind.long, args.tiny), args.tiny)
    words += ["--pretrained-checkpoint", str(_start_of(folder, fp8)), "--rat-arl-pattern", "d64", *_in(fp8)]
    return words + (GRAPHS if kind.graphs and torch.cuda.is_available() else [])


def _model(tiny: bool) -> list[str]:
    return [*(TINY_MODEL if tiny else MODEL), "--seed", "1005"]


def _of_length(long: bool, tiny: bool) -> list[str]:
    return f"--seq-length {_length(long, tiny)} --micro-batch-size 1 --global-batch-size {_batch(long)}".split()


def _length(long: bool, tiny: bool) -> int:
    return (512 if tiny else 65536) if long else (256 if tiny else 4096)


def _iterations(long: bool, tiny: bool) -> int:
    return _WARM_UP + 2 if tiny else (_LONG_ITERATIONS if long else _ITERATIONS)


def _batch(long: bool) -> int:
    return 1 if long else 4


# ---- figures -------------------------------------------------------------------------------------------------------------------------


def _figures(runs: list[Run], long: bool, tiny: bool) -> dict[str, Any]:
    seconds = statistics.median(max(times) for times in zip(*(run.seconds[_WARM_UP:] for run in runs), strict=True))
    return {
        "tokens_per_second": _batch(long) * _length(long, tiny) / seconds,
        "seconds": seconds,
        "peak_gigabytes": max(run.peak_bytes for run in runs) / 1e9,
        "losses": max((run.losses for run in runs), key=lambda steps: len(steps[0])),  # the last pipeline stage has them
        "runs": [asdict(run) | {"losses": None} for run in runs],
    }


def _largest_difference(losses: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """The largest relative difference of a loss, over all iterations and both steps."""
    names = [name for name in expected[0] if "loss" in name]
    return max(abs(a[n] - e[n]) / abs(e[n]) for a, e in zip(losses, expected, strict=True) for n in names)


def _line(name: str, figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"{name:22}failed: {figures['error'][:400]}"
    line = f"{name:22}{figures['tokens_per_second']:>9,.0f} tokens/s  {figures['peak_gigabytes']:6.1f} GB a GPU"
    line += f"  loss {figures['losses'][0]['lm loss']:.4f} -> {figures['losses'][-1]['lm loss']:.4f}"
    if "difference" in figures:
        line += f"  largest difference {figures['difference']:.1e}  {figures['over_one_gpu']:.2f} x one GPU"
    if "exchange" in figures:
        line += f"  exchange {min(figures['exchange']):.2%}-{max(figures['exchange']):.2%}"
    return line


# ---- ranks ---------------------------------------------------------------------------------------------------------------------------


def _set_up() -> None:
    from rat_megatron.platform.cpu import use_cpu_if_no_cuda

    os.environ["LAYOUTS_RANK"] = os.environ["RANK"]
    if use_cpu_if_no_cuda():
        keep_threads_few()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _join()


def _join() -> None:
    """Forms the group of both ranks, again if need be: what an earlier one left in torchrun's store is kept apart by a prefix."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank = int(os.environ["RANK"])
    times = store.add(f"joined/{rank}", 1)
    _begin(dist.PrefixStore(f"layouts{times}", store), rank, int(os.environ["WORLD_SIZE"]))


def _begin(store: dist.Store, rank: int, size: int) -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=8))
    # From the first collective on, the group's barriers use its device: without one, that of the rank's number, which another may hold.
    dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device() if on_gpu else "cpu"))


@contextmanager
def _single_rank() -> Iterator[None]:
    """For a while every process is the only rank of its own group, on its own device."""
    outside = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    leave_groups()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    _begin(dist.HashStore(), 0, 1)
    try:
        yield
    finally:
        leave_groups()
        os.environ.update(outside)
        _join()


def _from_first(value: Any) -> Any:
    """The first rank's value on both."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
