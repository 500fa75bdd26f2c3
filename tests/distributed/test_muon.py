"""Muon under parallel layouts: its steps against float64, runs against one rank, and checkpoints from layout to layout."""

from __future__ import annotations

from argparse import Namespace
from contextlib import contextmanager

import pytest
import torch

from tests.distributed.layouts import tensors, train
from tests.distributed.test_layouts import assert_same_losses
from tests.muon_steps import largest_difference, steps_of_megatron, steps_of_the_definition

TP2, PP2, CP2 = (["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"])
SP, VPP2 = ["--sequence-parallel"], ["--num-virtual-stages-per-pipeline-rank", "2"]
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

    with _parallel_state(tp):
        before, gradients, after = steps_of_megatron(ranks / f"steps-tp{tp}", 2, _optimizer(Namespace(use_layer_wise_distributed_optimizer=False)), tp=tp)
    assert largest_difference(before, steps_of_the_definition(before, gradients), after) < 1e-5


@pytest.fixture(scope="module")
def start(ranks, data):
    """start(*flags) -> flags of runs of Muon from the same weights."""
    weights = train(ranks / "muon-start", *MUON, "--data-path", data, "--train-iters", 1, alone=True).checkpoint
    return [*MUON, "--data-path", data, "--pretrained-checkpoint", weights, "--lr-decay-iters", 6]


@pytest.fixture(scope="module")
def alone(ranks, start):
    return {
        "fp32": train(ranks / "muon-alone", *start, "--train-iters", 6, alone=True),
        "bf16": train(ranks / "muon-alone-bf16", *start, "--bf16", "--train-iters", 6, alone=True),
    }


LAYOUTS = {
    "tp2+sp+pp2": (TP2 + SP + PP2, "fp32", 1e-4),
    "cp2+dp2": (CP2, "fp32", 1e-4),
    "dp4, layer-wise": (LAYER_WISE, "bf16", 1e-2),
    "tp2+dp2, layer-wise": (TP2 + LAYER_WISE, "bf16", 1e-2),
    "pp2+vpp2+dp2, layer-wise": (PP2 + VPP2 + LAYER_WISE, "bf16", 1e-2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_rank_does(ranks, start, alone, layout):
    flags, precision, tolerance = LAYOUTS[layout]
    expected = alone[precision]
    actual = train(ranks / f"muon-{layout}", *start, *flags, *(["--bf16"] if precision == "bf16" else []), "--train-iters", 6)
    print(layout, [max(abs(h[k]/t[k]-1) for k in t) for t, h in zip(expected.losses, actual.losses)], expected.losses[0])
    if torch.distributed.get_rank() == 0: open("/tmp/muon/l.txt","a").write(layout + str([max(abs(h[k]/t[k]-1) for k in t) for t, h in zip(expected.losses, actual.losses)]) + str(expected.losses) + "\n")
