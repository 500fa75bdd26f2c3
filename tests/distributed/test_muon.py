"""Muon under parallel layouts: its steps against float64, and runs that go from layout to layout against one rank."""

from __future__ import annotations

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from tests.distributed.layouts import tensors, train
from tests.muon_steps import largest_difference, steps_of_megatron, steps_of_the_definition

TP2, PP2, CP2 = (["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"])
SP = ["--sequence-parallel"]
MUON = (
    "--optimizer muon --muon-nesterov --muon-extra-scale-factor 0.2 --muon-tp-mode duplicated --muon-fp32-matmul-prec high "
    "--lr 5e-3 --rat-arl-pattern d8 --group-query-attention --num-query-groups 2"
).split()
LAYER_WISE = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@contextmanager
def _parallel_state(tp: int):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from rat_megatron.platform.cpu import cpu_patches
    from rat_megatron.training.patches import applied

    with applied([] if torch.cuda.is_available() else cpu_patches()):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("tp", [1, 2])
def test_steps_are_those_of_the_definition(ranks, tp):
    from rat_megatron.training.patches.table import _optimizer

    patches = _optimizer(Namespace(optimizer="muon", use_layer_wise_distributed_optimizer=False))
    with _parallel_state(tp):
        before, gradients, after = steps_of_megatron(ranks / f"steps-tp{tp}", 2, patches, tp=tp)
    assert largest_difference(before, steps_of_the_definition(before, gradients), after) < 1e-5


@dataclass(frozen=True)
class Course:
    """A run of four iterations: two under one layout, then others that only load and save, then two under another."""

    flags: list[str]
    first: list[str]
    between: dict[str, list[str]]
    second: list[str]
    tolerance: float


COURSES = {
    "whole": Course(["--global-batch-size", "2"], TP2 + SP + PP2, {"one rank": []}, CP2, 1e-4),
    "layer-wise": Course(["--bf16"], TP2 + LAYER_WISE, {"pp2+cp2": PP2 + CP2 + LAYER_WISE, "one rank": LAYER_WISE}, LAYER_WISE, 2e-2),
}


@pytest.mark.parametrize("name", COURSES)
def test_runs_go_from_layout_to_layout_as_one_rank_does(ranks, data, start, name):
    course, folder = COURSES[name], ranks / f"muon-{name}"
    run = [*MUON, *course.flags, "--data-path", data, "--pretrained-checkpoint", start, "--lr-decay-iters", 4]
    alone = train(folder / "alone", *run, "--train-iters", 4, alone=True)
    assert alone.losses[3]["lm loss"] < alone.losses[0]["lm loss"] - 0.3
    last = train(folder / "first", *run, *course.first, "--train-iters", 2)
    losses, written = last.losses[:2], tensors(last.checkpoint)
    assert sum("momentum_buffer" in key for key in written) == 4
    for between, flags in course.between.items():
        # At its last iteration already: loads, and writes what it loaded.
        last = train(folder / between, *run, *flags, "--load", last.checkpoint, "--train-iters", 2, alone=between == "one rank")
        again = tensors(last.checkpoint)
        assert again.keys() == written.keys()
        different = [key for key, tensor in written.items() if not torch.equal(tensor, again[key])]
        assert not different, f"{between}: {different}"
    last = train(folder / "second", *run, *course.second, "--load", last.checkpoint, "--train-iters", 4, "--override-opt-param-scheduler")
    losses += last.losses
    assert len(losses) == len(alone.losses) == 5  # four iterations and the validation
    for there, here in zip(alone.losses, losses, strict=True):
        assert here == pytest.approx(there, rel=course.tolerance)


@pytest.fixture(scope="module")
def start(ranks, data):
    """Weights that one rank made."""
    return train(ranks / "muon-start", *MUON, "--data-path", data, "--train-iters", 1, alone=True).checkpoint
