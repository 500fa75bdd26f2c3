"""Runs pretrain_rat.py inside this process for one parallel layout after another, and on one rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
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


@dataclass
class Run:
    """What a run left: the losses of each iteration and of the validation, its checkpoint, and the gradients of its first step."""

    losses: list[dict[str, float]]
    checkpoint: Path
    gradients: Path


def train(folder: Path, *flags: str | Path, alone: bool = False, model: list[str] = MODEL) -> Run:
    """Trains under the flags' layout, on all ranks or (``alone``) on the first one by itself, in ``folder``."""
    flags = [*model, *RECIPE, *map(str, flags), "--save", str(folder / "checkpoints")]
    losses: list[dict[str, float]] = []
    first_rank = torch.distributed.get_rank() == 0
    with _single_rank() if alone else nullcontext():
        if first_rank or not alone:
            _train_here(flags, folder, losses)
    if not alone:  # the layout's groups go, and with them their many threads
        torch.distributed.destroy_process_group()
        join_ranks()
    every: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, losses)
    losses = max(every, key=lambda steps: len(steps[0]) if steps else 0)  # the last pipeline stage has them
    return Run(losses, folder / "checkpoints", folder / "gradients")


def _train_here(flags: list[str], folder: Path, losses: list[dict[str, float]]) -> None:
    with run_program(flags) as main:
        from megatron.training import training

        observers = [
            Patch(training, "training_log", _noting(lambda args, _: losses.append(_floats(args[0]))), "Losses of every iteration."),
            Patch(training, "evaluate", _noting(lambda _, result: losses.append(_floats(result[0]))), "Losses of every validation."),
            Patch(training, "finalize_model_grads", partial(_saving_first_gradients, folder=folder / "gradients"), "Gradients to compare."),
        ]
        with applied(observers):
            main()


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


@contextmanager
def _single_rank() -> Iterator[None]:
    """For a while every process is the only rank of its own group."""
    outside = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    torch.distributed.destroy_process_group()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.environ.update(outside)
        join_ranks()


def join_ranks() -> None:
    """Forms the group of all ranks, again if need be: what an earlier one left in torchrun's store is kept apart by a prefix."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = torch.distributed.PrefixStore(f"group{store.add(f'joined/{rank}', 1)}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=4))
