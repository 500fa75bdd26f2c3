"""Checkpoints of the 1.5B model on several GPUs: how long a save holds training up, when it is whole, loading, and at another layout.

    torchrun --nproc-per-node 2 -m benchmarks.checkpoints [--only MODE...] [--folder /dev/shm] [--runs-log FILE] [--json FILE]

"rows-async" is what a run does (rat_megatron/checkpoint/optimizer_rows.py) and "rows" the same with --no-async-save; "megatron" is
Megatron's own way of writing the same format, and "megatron-dp" its default, which loads at the same TP and PP only. Of two saves in a run
the second counts, when buffers are there; of the first, the stall is told too. "stall" is what the save takes from training on the slowest
rank, waiting and finishing included; "whole" is the time until the tracker names the new checkpoint. Loading includes the comparison of
hashes. GB/s is of the bytes that a rank writes.
--tiny tries it all over gloo.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from benchmarks import megatron_runs
from benchmarks.layouts import MODEL, _from_first, _join, _say, _set_up
from benchmarks.megatron_runs import TINY_MODEL, common_flags, leave_groups, random_data
from benchmarks.timing import describe, free_memory, machine, write_json
from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.platform.cpu import use_cpu_if_no_cuda
from rat_megatron.training.patches import Patch, applied

use_cpu_if_no_cuda()  # here, as the process of --async-save imports this file and no more
MODES = ("rows", "rows-async", "megatron", "megatron-dp")
_RESHARDED = {"tp2": "--tensor-model-parallel-size 2 --sequence-parallel", "pp2": "--pipeline-model-parallel-size 2"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--folder", default="/dev/shm", help="where checkpoints are written, and removed again")
    parser.add_argument("--runs-log", metavar="FILE", help="where what the runs print goes, with the rank at the end; default: here")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a trial on any machine")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here, after every mode")
    args = parser.parse_args(arguments)
    first = os.environ["RANK"] == "0"
    args.runs_log = f"{args.runs_log}.{os.environ['RANK']}" if args.runs_log else None
    _set_up()
    folder = Path(_from_first(tempfile.mkdtemp(dir=args.folder) if first else None))
    results: dict[str, Any] = {"machine": machine(), "ranks": dist.get_world_size(), "tiny": args.tiny, "modes": {}}
    try:
        if first:
            random_data(folder / "data", 256, 64 if args.tiny else 1024, 512 if args.tiny else 32000)
        dist.barrier()
        _say(describe(results["machine"]))
        for mode in args.only:
            results["modes"][mode] = figures = _measure(mode, folder, args)
            _say(_line(mode, figures))
            if first:
                write_json(args.json, results)
                shutil.rmtree(folder / mode, ignore_errors=True)
            dist.barrier()
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
    leave_groups()


def _measure(mode: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run that saves twice, then runs that load what it wrote: at the same layout, and at others where the mode can."""
    background = mode.endswith("async")
    interval = (4 if args.tiny else 25) if background else 2
    iterations = (3 if background else 2) * interval  # the last save in the background is waited for
    save, watch = folder / mode, _Watch(folder / mode)
    flags = [*(TINY_MODEL if args.tiny else MODEL), *common_flags(folder / "data", iterations, args.tiny)]
    flags += f"--seq-length {64 if args.tiny else 1024} --micro-batch-size 1 --global-batch-size 4 --seed 5 --save {save}".split()
    flags += ["--use-distributed-optimizer", "--save-interval", str(interval), "--async-save" if background else "--no-async-save"]
    with _mode(mode):
        with _observed(watch):
            megatron_runs.run(flags, watch.between, args.runs_log)
        size = sum(path.stat().st_size for path in (save / f"iter_{iterations:07d}").iterdir())
        loads = {"load": _load(flags, save, [], args)}
        for name, words in _RESHARDED.items() if mode != "megatron-dp" else ():
            loads[name] = _load(flags, save, words.split(), args)
    mine = {
        "first_stall": watch.stalls[0],
        "stall": watch.stalls[1],
        "whole": watch.whole[1],
        "host_gigabytes": watch.host_bytes / 1e9,
    } | loads
    every: list[Any] = [None] * dist.get_world_size()
    _again()
    dist.all_gather_object(every, mine)
    slowest = {name: max(each[name] for each in every) for name in mine}
    return slowest | {"gigabytes": size / 1e9, "gigabytes_per_second_a_rank": size / 1e9 / len(every) / slowest["whole"]}


def _load(flags: list[str], save: Path, layout: list[str], args: argparse.Namespace) -> float:
    """Seconds in which a run at this layout loads the checkpoint; it ends there, at its last iteration."""
    _again()
    seconds = []

    def noting(setup: Callable) -> Callable:
        def noted(*words: Any, **kwargs: Any) -> Any:
            result = setup(*words, **kwargs)
            seconds.append(training.get_timers()("load-checkpoint").active_time())
            return result

        return noted

    from megatron.training import training

    with applied([Patch(training, "setup_model_and_optimizer", noting, "How long loading takes.")]):
        megatron_runs.run([*flags, "--no-async-save", *layout], log=args.runs_log)
    return seconds[0]


def _again() -> None:
    leave_groups()
    free_memory()
    _join()


class _Watch:
    """Seconds that each save takes from training, seconds until it is the latest, and the most host memory beyond what was in use."""

    def __init__(self, save: Path):
        self.stalls: list[float] = []
        self.whole: list[float] = []
        self.host_bytes = 0
        self._tracker, self._begun, self._latest, self._done = save / TRACKER_NAME, 0.0, "", threading.Event()

    def saving(self, save: Callable) -> Callable:
        def watched(*words: Any, **kwargs: Any) -> None:
            self._wait()
            self._begun = time.perf_counter()
            save(*words, **kwargs)
            self._wait()
            self.stalls.append(time.perf_counter() - self._begun)
            self._look()

        return watched

    def finalizing(self, finalize: Callable) -> Callable:
        def watched(*words: Any, **kwargs: Any) -> None:
            begun = time.perf_counter()
            finalize(*words, **kwargs)
            if self.stalls:
                self.stalls[-1] += time.perf_counter() - begun
                self._look()

        return watched

    def between(self, _: int) -> None:
        """After an iteration: room for the next checkpoint."""
        if self._latest and os.environ["RANK"] == "0":
            for folder in self._tracker.parent.glob("iter_*"):
                if int(folder.name[5:]) < int(self._latest):
                    shutil.rmtree(folder, ignore_errors=True)

    def _look(self) -> None:
        latest = self._tracker.read_text() if self._tracker.exists() else ""
        if latest != self._latest:
            self._latest = latest
            self.whole.append(time.perf_counter() - self._begun)

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()

    @contextmanager
    def host_memory(self) -> Iterator[None]:
        """The most memory of the machine in use meanwhile, beyond that before; the files of a RAM disk do not count."""
        disk = self._tracker.parent.parent
        before = _in_use(disk)

        def look() -> None:
            while not self._done.wait(0.1):
                self.host_bytes = max(self.host_bytes, _in_use(disk) - before)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()


def _in_use(folder: Path) -> int:
    memory = psutil.virtual_memory()
    return memory.total - memory.available - psutil.disk_usage(str(folder)).used  # files on a RAM disk


@contextmanager
def _observed(watch: _Watch) -> Iterator[None]:
    from megatron.training import training

    patches = [
        Patch(training, "save_checkpoint_and_time", watch.saving, "What a save takes."),
        Patch(training, "maybe_finalize_async_save", watch.finalizing, "What finishing it takes."),
    ]
    with applied(patches), watch.host_memory():
        yield


@contextmanager
def _mode(mode: str) -> Iterator[None]:
    """For Megatron's own two ways: its methods in the place of ours, and its default."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from rat_megatron.checkpoint import optimizer_rows
    from rat_megatron.training.arguments import flags

    patches = []
    if mode.startswith("megatron"):
        names = {"sharded_rows": "sharded_param_state_fully_reshardable", "load_rows": "load_parameter_state_from_fully_reshardable"}
        patches = [
            Patch(optimizer_rows, name, lambda _, own=own: getattr(DistributedOptimizer, own), "To compare.") for name, own in names.items()
        ]
    load = "load_parameter_state_from_dp_reshardable"
    patches += [Patch(DistributedOptimizer, load, torch.no_grad(), "It fails where main parameters are those of the model: in fp32.")]
    defaults = flags._CHECKPOINTING
    before = defaults["dist_ckpt_optim_fully_reshardable"]
    defaults["dist_ckpt_optim_fully_reshardable"] = mode != "megatron-dp"
    try:
        with applied(patches):
            yield
    finally:
        defaults["dist_ckpt_optim_fully_reshardable"] = before


def _line(mode: str, figures: dict[str, Any]) -> str:
    line = f"{mode:12} stall {figures['stall']:6.2f} s (the first {figures['first_stall']:.2f} s)  whole {figures['whole']:6.2f} s"
    line += f"  {figures['gigabytes_per_second_a_rank']:5.2f} GB/s a rank  load {figures['load']:6.2f} s"
    line += "".join(f"  at {name} {figures[name]:6.2f} s" for name in _RESHARDED if name in figures)
    return line + f"  host memory +{figures['host_gigabytes']:.1f} GB  ({figures['gigabytes']:.3g} GB)"


if __name__ == "__main__":
    main()
