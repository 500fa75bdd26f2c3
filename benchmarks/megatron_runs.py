"""Runs of pretrain_rat.py inside this process, one after another, and what each iteration took: for the benchmarks of training.

One process, because starting Python, CUDA and the libraries takes longer than the iterations that are timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import free_memory
from rat_megatron.training.patches import Patch, applied

TINY_MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --make-vocab-size-divisible-by 1 --lr 1e-3 "
    "--lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95"
).split()
GRAPHS = "--cuda-graph-impl full_iteration".split()
FP8 = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max".split()


@dataclass
class Run:
    """Iterations of one run: seconds of each, losses by name, FLOPs of one; parameters and peak bytes on this rank."""

    seconds: list[float] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)
    flops: int = 0
    parameters: int = 0
    peak_bytes: int = 0


def run(flags: list[str], on_iteration: Callable[[int], None] = lambda count: None, log: str | None = None) -> Run:
    """Trains with these flags of pretrain_rat.py; calls on_iteration with the number of iterations done, after each.

    What the run prints goes to the end of the file ``log`` instead, if there is one.

    The device is waited for at the end of every iteration, as Megatron does on its own when it logs. What a run leaves in Megatron, in
    Transformer Engine and on the device is taken back, also when it fails.
    """
    result = Run()
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _printing_to(log), run_program(flags) as main:
        from megatron.training import training

        with applied(_observers(training, result, on_iteration)):
            main()
        result.peak_bytes = torch.cuda.max_memory_allocated()
    free_memory()
    return result


def _observers(training: Any, result: Run, on_iteration: Callable[[int], None]) -> list[Patch]:
    last = 0.0

    def noting_setup(setup: Callable) -> Callable:
        def setup_noted(*args, **kwargs):
            model, *rest = setup(*args, **kwargs)
            result.parameters = sum(p.numel() for chunk in model for p in chunk.parameters())
            nonlocal last
            last = time.perf_counter()
            return model, *rest

        return setup_noted

    def noting_log(log: Callable) -> Callable:
        def log_noted(losses, *args, **kwargs):
            nonlocal last
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            result.seconds.append(now - last)
            result.losses.append({name: float(value) for name, value in losses.items()})
            options = training.get_args()
            result.flops = training.num_floating_point_operations(options, options.global_batch_size)
            report = log(losses, *args, **kwargs)
            on_iteration(len(result.seconds))
            last = time.perf_counter()
            return report

        return log_noted

    return [
        Patch(training, "setup_model_and_optimizer", noting_setup, "The number of parameters, and the time from which the first counts."),
        Patch(training, "training_log", noting_log, "What every iteration took, and its losses."),
    ]


@contextmanager
def _printing_to(log: str | None) -> Iterator[None]:
    """Turns the process's own outputs to a file: libraries and workers hold on to the streams that they found."""
    if log is None:
        yield
        return
    sys.stdout.flush()
    outside = os.dup(1), os.dup(2)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, source in zip((1, 2), outside, strict=True):
            os.dup2(source, target)
            os.close(source)


@contextmanager
def run_program(flags: list[str]) -> Iterator[Callable[[], None]]:
    """The program's main() for these flags. What a run leaves in Megatron and Transformer Engine, beside the patches, which it takes back
    itself, is taken back at the end: globals, groups, FP8 state and buffers."""
    from rat_megatron.platform.cpu import use_cpu_if_no_cuda

    use_cpu_if_no_cuda()
    from megatron.core import full_cuda_graph
    from megatron.core.tensor_parallel import random
    from megatron.training import training

    from rat_megatron.pretrain import main

    arguments, timestamps = sys.argv, dict(training._STARTUP_TIMESTAMPS)
    places = [(place, dict(vars(place))) for place in (full_cuda_graph, random, training)]  # their globals
    sys.argv = ["pretrain_rat.py", *flags]
    try:
        yield main
    finally:
        sys.argv = arguments
        training.destroy_global_state()
        for place, names in places:
            vars(place).update(names)
        training._STARTUP_TIMESTAMPS.clear()
        training._STARTUP_TIMESTAMPS.update(timestamps)  # ranks that have run before would reduce theirs, and wait for the others
        if "transformer_engine.pytorch" in sys.modules:
            from transformer_engine.pytorch.module.base import destroy_ub
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()
            destroy_ub()  # buffers of --tp-comm-overlap


def leave_groups() -> None:
    """Ends the process groups of the run before, and their communicators."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def random_data(folder: Path, samples: int, seq_length: int, vocab_size: int = 32000) -> Path:
    """Writes training data of random tokens in which there is something to learn: half of the tokens follow from the one before."""
    from streaming import MDSWriter

    random = np.random.default_rng(1)
    ids = 1 + (random.zipf(1.2, (seq_length + 1, samples)) - 1) % (vocab_size - 1)
    follower, follows = 1 + random.permutation(vocab_size), random.random(ids.shape) < 0.5
    for at in range(1, seq_length + 1):
        ids[at] = np.where(follows[at], 1 + (follower[ids[at - 1]] - 1) % (vocab_size - 1), ids[at])
    with MDSWriter(columns={"tokens": f"ndarray:uint16:{seq_length + 1}"}, out=str(folder / "train"), hashes=["xxh64"]) as out:
        for sample in ids.T.astype(np.uint16):
            out.write({"tokens": sample})
    facts = {"format_version": 1, "seq_length": seq_length, "vocab_size": vocab_size, "eod_id": 0}
    facts |= {"tokenizer_name": "none", "tokenizer_hash": "none"}
    facts |= {"splits": {"train": {"samples": samples}, "val": {"samples": 0}}}
    (folder / "rat_meta.json").write_text(json.dumps(facts))
    return folder


def common_flags(data: Path, iterations: int, tiny: bool) -> list[str]:
    """What every timed run has: no validation, a log line and so a wait for the device at every iteration."""
    words = f"--data-path {data} --train-iters {iterations} --eval-iters 0 --log-interval 1 --save-interval 100000"
    return [*words.split(), *("--num-workers 0" if tiny else "--num-workers 2 --distributed-timeout-minutes 3").split()]


def keep_threads_few() -> None:
    """On a CPU, one thread a process: several processes share few cores."""
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
