"""Every parallel layout trains as one rank does: losses of ten iterations, the first gradient element by element, the final weights."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.layouts import Run, tensors, train

# What is trained: the dense model with active recurrence learning, sparse patterns, layers of different patterns, grouped queries.
VARIANTS = {
    "dense": ["--rat-arl-pattern", "d64"],
    "d64w16s4": ["--rat-pattern", "d64w16s4", "--rat-arl-pattern", "none", "--untie-embeddings-and-output-weights"],
    "hybrid": "--rat-pattern [dense,d64,d16w16s4,{dense,d64*3}] --rat-arl-pattern d8 --group-query-attention --num-query-groups 2".split(),
}

TP2, PP2, CP2 = (["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"])
SP, VPP2 = ["--sequence-parallel"], ["--num-virtual-stages-per-pipeline-rank", "2", "--micro-batch-size", "1", "--global-batch-size", "4"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
SELECTIVE = ["--recompute-granularity", "selective"]
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]

LAYOUTS = {
    "tp2": (TP2, "dense"),
    "tp2+sp, full recompute": (TP2 + SP + FULL, "hybrid"),
    "pp2": (PP2, "d64w16s4"),
    "pp2+vpp2": (PP2 + VPP2, "dense"),
    "cp2": (CP2, "hybrid"),
    "cp4, selective recompute": (["--context-parallel-size", "4"] + SELECTIVE, "d64w16s4"),
    "tp2+pp2": (TP2 + PP2, "hybrid"),
    "dp4, distributed optimizer": (OVERLAP, "dense"),
}

_alone: dict[str, Run] = {}


@pytest.fixture(scope="module")
def start(ranks, data):
    """start(variant) -> flags of a run from weights that one rank made, so that every layout starts alike."""
    made: dict[str, list] = {}

    def flags(variant: str) -> list:
        if variant not in made:
            folder = ranks / f"start-{torch.distributed.get_rank()}-{variant}"
            train(folder, *VARIANTS[variant], "--data-path", data, "--train-iters", 1, alone=True)
            made[variant] = ["--pretrained-checkpoint", ranks / f"start-0-{variant}" / "checkpoints"]
            torch.distributed.barrier()
        return [*VARIANTS[variant], *made[variant], "--data-path", data, "--train-iters", 10]

    return flags


def alone(ranks, start, variant: str) -> Run:
    """The run on one rank; every rank makes its own, for its own comparison."""
    if variant not in _alone:
        flags = start(variant)
        _alone[variant] = train(ranks / f"alone-{torch.distributed.get_rank()}-{variant}", *flags, alone=True)
        torch.distributed.barrier()
    return _alone[variant]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_rank_does(ranks, start, layout):
    flags, variant = LAYOUTS[layout]
    expected = alone(ranks, start, variant)
    actual = train(ranks / layout.replace(" ", "-"), *start(variant), *flags)

    assert len(expected.losses) == len(actual.losses) == 11  # ten iterations and the validation
    for there, here in zip(expected.losses, actual.losses, strict=True):
        assert there.keys() == here.keys() and any("lm loss" in name for name in here)
        assert here == pytest.approx(there, rel=1e-4)
    assert expected.losses[9]["lm loss"] < expected.losses[0]["lm loss"] - 0.1  # it learns: the comparison means something

    if "--use-distributed-optimizer" not in flags:
        gradients, ours = tensors(expected.gradients), tensors(actual.gradients)
        assert gradients.keys() == ours.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=lambda text, n=name: f"{n}: {text}"
            )
    start_weights = tensors(ranks / f"start-0-{variant}" / "checkpoints", weights_only=True)
    ours = tensors(actual.checkpoint, weights_only=True)
    for name, weight in tensors(expected.checkpoint, weights_only=True).items():
        assert (ours[name] - weight).norm() < 2e-2 * (weight - start_weights[name]).norm(), name
