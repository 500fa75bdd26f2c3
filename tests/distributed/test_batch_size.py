"""A batch that grows, on several layouts and across a change of them: the losses of one rank."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import train

RAMP = "--rampup-batch-size 4 4 8 --global-batch-size 8 --train-samples 24 --rat-arl-pattern d8".split()  # batches of 4, 4, 8, 8
PP2_VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2".split()


def test_a_ramp_trains_as_on_one_rank_and_goes_on_under_another_layout(ranks, data):
    folder, run = ranks / "ramp", ["--data-path", data, *RAMP]
    expected = train(folder / "alone", *run, alone=True).losses
    assert len(expected) == 5  # four iterations and the validation
    whole = train(folder / "dp4", *run, "--use-distributed-optimizer")
    resumed = train(folder / "pp2+vpp2+dp2", *run, *PP2_VPP2, "--load", whole.checkpoint, "--ckpt-step", 2, "--use-distributed-optimizer")
    for there, here in zip(expected + expected[2:], whole.losses + resumed.losses, strict=True):
        assert here == pytest.approx(there, rel=1e-4)
