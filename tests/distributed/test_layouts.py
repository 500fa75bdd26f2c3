"""Every parallel layout trains as one rank does: losses of ten iterations, the first gradient element by element, the final weights."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.layouts import Run, tensors, train

# What is trained: the dense model with active recurrence learning, sparse patterns, layers of different patterns, grouped queries, SwiGLU.
VARIANTS = {
    "dense": ["--rat-arl-pattern", "d64"],
    "d16": ["--rat-pattern", "d16", "--rat-arl-pattern", "none", "--swiglu"],
    "d64w16s4": ["--rat-pattern", "d64w16s4", "--rat-arl-pattern", "none", "--untie-embeddings-and-output-weights"],
    "hybrid": "--rat-pattern [dense,d64,d16w16s4,{dense,d64*3}] --rat-arl-pattern d8 --group-query-attention --num-query-groups 2".split(),
}

TP2, PP2, CP2 = (["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"])
SP, CP4, VPP2 = ["--sequence-parallel"], ["--context-parallel-size", "4"], ["--num-virtual-stages-per-pipeline-rank", "2"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
SELECTIVE = ["--recompute-granularity", "selective"]
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]

LAYOUTS = {
    "tp2": (TP2, "d16"),
    "tp2+sp, full recompute": (TP2 + SP + FULL, "hybrid"),
    "pp2": (PP2, "d64w16s4"),
    "pp2+vpp2": (PP2 + VPP2, "dense"),
    "cp2": (CP2, "hybrid"),
    "cp4, selective recompute": (CP4 + SELECTIVE, "d64w16s4"),
    "tp2+sp+cp2": (TP2 + SP + CP2, "dense"),
    "pp2+cp2": (PP2 + CP2, "hybrid"),
    "tp2+pp2": (TP2 + PP2, "hybrid"),
    "dp4, distributed optimizer": (OVERLAP, "dense"),
    "cp2+dp2, distributed optimizer": (CP2 + OVERLAP, "d16"),
}


@pytest.fixture(scope="module")
def start(ranks, data):
    """start(variant) -> flags of a run from weights that one rank made, so that every layout starts alike."""
    made: dict[str, list] = {}

    def flags(variant: str) -> list:
        if variant not in made:
            run = train(ranks / f"start-{variant}", *VARIANTS[variant], "--data-path", data, "--train-iters", 1, alone=True)
            made[variant] = [*VARIANTS[variant], "--pretrained-checkpoint", run.checkpoint, "--data-path", data, "--train-iters", 10]
        return made[variant]

    return flags


@pytest.fixture(scope="module")
def alone(ranks, start):
    """alone(variant, *flags) -> the run on one rank."""
    runs: dict[str, Run] = {}

    def run(variant: str, *flags: str) -> Run:
        name = "-".join([variant, *flags])
        if name not in runs:
            runs[name] = train(ranks / f"alone-{name}", *start(variant), *flags, alone=True)
        return runs[name]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_rank_does(ranks, start, alone, layout):
    flags, variant = LAYOUTS[layout]
    expected = alone(variant)
    actual = train(ranks / layout.replace(" ", "-"), *start(variant), *flags)

    assert_same_losses(expected, actual, 1e-4)
    assert expected.losses[9]["lm loss"] < expected.losses[0]["lm loss"] - 0.1  # it learns: the comparison means something
    if "--use-distributed-optimizer" not in flags:  # which keeps shards of gradients only
        gradients, ours = tensors(expected.gradients), tensors(actual.gradients)
        assert gradients.keys() == ours.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=lambda text, n=name: f"{n}: {text}"
            )
    start_weights = tensors(ranks / f"start-{variant}" / "checkpoints", weights_only=True)
    ours = tensors(actual.checkpoint, weights_only=True)
    for name, weight in tensors(expected.checkpoint, weights_only=True).items():
        assert (ours[name] - weight).norm() < 2e-2 * (weight - start_weights[name]).norm(), name


@pytest.mark.parametrize("layout", ["tp2+sp+cp2", "pp2+cp2"])
def test_layout_trains_as_one_rank_does_in_bf16(ranks, start, alone, layout):
    flags, variant = LAYOUTS[layout]
    actual = train(ranks / f"{layout}-bf16", *start(variant), *flags, "--bf16")
    assert_same_losses(alone(variant, "--bf16"), actual, 2e-2)
    assert_same_losses(alone(variant), actual, 2e-2)


def assert_same_losses(expected: Run, actual: Run, tolerance: float) -> None:
    assert len(expected.losses) == len(actual.losses) == 11  # ten iterations and the validation
    for there, here in zip(expected.losses, actual.losses, strict=True):
        assert there.keys() == here.keys() and any("lm loss" in name for name in here)
        assert here == pytest.approx(there, rel=tolerance)
