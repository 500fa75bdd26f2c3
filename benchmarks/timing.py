"""Timing on a GPU for the benchmarks here: interleaved repetitions between CUDA events, and what a figure needs beside it.

Without a GPU the same functions time on the CPU, so that every benchmark can be tried there at small shapes.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]

_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
_HEAD_START = 4_000_000  # cycles that the GPU waits while the host queues what is timed: about 2 ms


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ("torch", "triton", "transformer-engine", "megatron-core", "transformers")
    facts: dict[str, Any] = {"device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors"}
    if torch.cuda.is_available():
        facts["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        facts |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return facts | {name: _version(name) for name in packages} | {"python": platform.python_version()}


def describe(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" if name != "device" else value for name, value in facts.items() if value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def milliseconds(runs: dict[str, Run], repetitions: int, flush: bool = True) -> dict[str, dict[str, float]]:
    """Times every run once in each of ``repetitions`` rounds, after two rounds that are not counted.

    Returns for each the ``median``, ``lowest`` and ``highest`` milliseconds of the device, and ``host``, the median milliseconds that the
    host took to queue the work: where that is more, a single call outside a queue takes that long. The host is ahead of the device when
    the timed region begins. With flush, the caches are cold; a working set far larger than them needs none.
    """
    time_all = _rounds_on_gpu if torch.cuda.is_available() else _rounds_on_cpu
    return {name: _summary(times) for name, times in time_all(runs, repetitions, flush).items()}


def _summary(times: list[tuple[float, float]]) -> dict[str, float]:
    device, host = zip(*times, strict=True)
    return {"median": statistics.median(device), "lowest": min(device), "highest": max(device), "host": statistics.median(host)}


def _rounds_on_gpu(runs: dict[str, Run], repetitions: int, flush: bool) -> dict[str, list[tuple[float, float]]]:
    scratch = torch.empty(_FLUSH_BYTES if flush else 1, dtype=torch.int8, device="cuda")
    noted: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event, float]]] = {name: [] for name in runs}
    for _ in range(repetitions + 2):
        for name, run in runs.items():
            scratch.zero_()
            torch.cuda._sleep(_HEAD_START)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun = time.perf_counter()
            start.record()
            run()
            end.record()
            noted[name].append((start, end, (time.perf_counter() - begun) * 1e3))
            torch.cuda.synchronize()
    return {name: [(start.elapsed_time(end), host) for start, end, host in events[2:]] for name, events in noted.items()}


def _rounds_on_cpu(runs: dict[str, Run], repetitions: int, flush: bool) -> dict[str, list[tuple[float, float]]]:
    noted: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repetitions + 2):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            noted[name].append(((time.perf_counter() - begun) * 1e3,) * 2)
    return {name: times[2:] for name, times in noted.items()}


def waits_for_device(run: Run) -> bool:
    """Whether the host waits for the device inside a call; call it after a first one, which may have compiled."""
    if not torch.cuda.is_available():
        return False
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(run: Run) -> Run:
    """The run as a CUDA graph, to be replayed; on the CPU the run itself. Its inputs and outputs stay where they are, and alive."""
    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and brings up what may not begin inside a capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(what_the_graph_reads: Run = run) -> None:
        graph.replay()

    return replay


def copy_of_bytes(count: int, device: str) -> Run:
    """A copy kernel that moves so many bytes, half read and half written: what memory allows an operator that must move them."""
    source = torch.randn(max(1, count // 4), device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected, in float64 piece by piece (the tensors may be large)."""
    norms = [0.0, 0.0]
    for a, e in zip(actual.detach().reshape(-1).split(1 << 26), expected.detach().reshape(-1).split(1 << 26), strict=True):
        a, e = a.double(), e.double()
        norms[0] += float((a - e).square().sum())
        norms[1] += float(e.square().sum())
    return (norms[0] / norms[1]) ** 0.5


def free_memory() -> None:
    """Gives what is not used any more back to the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Writes the results so far, whole or not at all."""
    if path:
        temporary = Path(path + ".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
