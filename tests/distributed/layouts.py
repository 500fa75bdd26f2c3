"""Runs pretrain_rat.py for one parallel layout after another, and on one rank, in new processes beside those of the tests."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.megatron_runs import run_program
from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
from rat_megatron.training.patches import Patch, applied

MODEL = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64".split()
RECIPE = (
    "--make-vocab-size-divisible-by 1 --seq-length 512 --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --lr-decay-style "
    "cosine --weight-decay 0.1 --adam-beta2 0.95 --log-interval 100 --eval-iters 1 --eval-interval 100 --num-workers 0 "
    "--save-interval 1000 --dist-ckpt-strictness raise_all --seed 7 --distributed-timeout-minutes 3"
).split()


_SERVER = multiprocessing.get_context("forkserver")


@dataclass
class Run:
    """What a run left: the losses of each iteration and of the validation, its checkpoint, and the gradients of its first step."""

    losses: list[dict[str, float]]
    checkpoint: Path
    gradients: Path


def train(
    folder: Path,
    *flags: str | Path,
    alone: bool = False,
    model: list[str] = MODEL,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Run:
    """Trains under the flags' layout, on all ranks or (``alone``) on the first one by itself, in ``folder``.

    ``within``: makes a context for the run, in which a test may change the program; a function of a module.
    """
    flags = [*model, *RECIPE, *map(str, flags), "--save", str(folder / "checkpoints")]
    ended = _Ended()
    first_rank = torch.distributed.get_rank() == 0
    torch.distributed.destroy_process_group()
    try:
        if first_rank or not alone:
            ended = _in_a_process_of_its_own(flags, folder, alone, within)
    finally:
        join_ranks()
    every: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, ended)
    failures = [f"rank {rank}: {one.failure}" for rank, one in enumerate(every) if one.failure]
    if failures:  # on every rank, which else would go on to different tests, and wait for each other there
        raise RuntimeError("\n".join(failures))
    losses = max((one.losses for one in every), key=lambda steps: len(steps[0]) if steps else 0)  # the last pipeline stage has them
    return Run(losses, folder / "checkpoints", folder / "gradients")


@dataclass
class _Ended:
    """What became of a run on this rank."""

    losses: list[dict[str, float]] = field(default_factory=list)
    failure: str = ""


def start_server() -> None:
    """Starts the process of which every run of this rank is a fork, so that what takes seconds to import is imported once."""
    _SERVER.set_forkserver_preload(["streaming", "rat_megatron.pretrain", __name__])


def _in_a_process_of_its_own(*run: Any) -> _Ended:
    """_train_here(*run) in a new process.

    Some of a run's groups live as long as its process does, since Megatron's optimizer and C++ hold on to them, and each has three
    threads over gloo, of which one wakes a hundred times a second: a few dozen runs in one process have thousands, and stand still.
    """
    receiving, sending = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_report, args=(sending, run))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        process.join()
        return _Ended(failure=f"exit code {process.exitcode}")
    finally:
        process.join()


def _report(sending: Connection, run: tuple) -> None:
    torch.set_num_threads(1)
    try:
        sending.send(_Ended(_train_here(*run)))
    except BaseException:
        sending.send(_Ended(failure=traceback.format_exc()))
        raise


def _train_here(flags: list[str], folder: Path, alone: bool, within: Callable[[], AbstractContextManager[None]]) -> list[dict[str, float]]:
    losses: list[dict[str, float]] = []
    if alone:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        join_ranks()
    with within(), run_program(flags) as main:
        from megatron.training import training

        observers = [
            Patch(training, "training_log", _noting(lambda args, _: losses.append(_floats(args[0]))), "Losses of every iteration."),
            Patch(training, "evaluate", _noting(lambda _, result: losses.append(_floats(result[0]))), "Losses of every validation."),
            Patch(training, "finalize_model_grads", partial(_saving_first_gradients, folder=folder / "gradients"), "Gradients to compare."),
        ]
        with applied(observers):
            main()
    return losses


def _floats(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}


def _noting(note: Callable[[tuple, Any], None]) -> Callable[[Callable], Callable]:
    """Has note(args, result) see every call of a function."""

    def wrap(function: Callable) -> Callable:
        def noting(*args, **kwargs):
            result = function(*args, **kwargs)
            note(args, result)
            return result

        return noting

    return wrap


def _saving_first_gradients(finalize: Callable, folder: Path) -> Callable:
    """Wraps finalize_model_grads: the whole gradient of the first step is saved as a checkpoint of its own, in the weights' place."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import get_model_config

    def finalize_and_save(model, *args, **kwargs):
        finalize(model, *args, **kwargs)
        config = get_model_config(model[0])
        config.finalize_model_grads_func = finalize  # the first step only
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        if model[0].ddp_config.use_distributed_optimizer or parameters[0].dtype != parameters[0].main_grad.dtype:
            return  # shards of gradients only, or a type that would part the weights from their hooks
        folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        weights = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.main_grad
        state = {f"chunk{index}": chunk.module.sharded_state_dict() for index, chunk in enumerate(model)}
        dist_checkpointing.save(state, str(folder))
        for parameter, data in zip(parameters, weights, strict=True):
            parameter.data = data

    return finalize_and_save


def tensors(folder: Path, weights_only: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer state included unless weights_only, whole, whatever layout wrote it."""
    checkpoint = TorchDistCheckpoint(find_iteration(folder))
    return {key: checkpoint.read(key) for key in checkpoint.tensors if not (weights_only and key.startswith("optimizer."))}


def join_ranks() -> None:
    """Forms the group of all ranks, again if need be: what an earlier one left in torchrun's store is kept apart by a prefix."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = torch.distributed.PrefixStore(f"group{store.add(f'joined/{rank}', 1)}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=4))
