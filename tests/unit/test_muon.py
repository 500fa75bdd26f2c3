"""Muon on one process: its steps against float64."""

from __future__ import annotations

from argparse import Namespace
import pytest

from tests.muon_steps import largest_difference, steps_of_megatron, steps_of_the_definition

pytestmark = pytest.mark.usefixtures("megatron_process")


@pytest.mark.parametrize("recurrent", [True, False])
def test_steps_are_those_of_the_definition(tmp_path, recurrent):
    from rat_megatron.training.patches.table import _optimizer

    before, gradients, after = steps_of_megatron(tmp_path, 3, _optimizer(Namespace(use_layer_wise_distributed_optimizer=False)), recurrent)
    assert largest_difference(before, steps_of_the_definition(before, gradients, recurrent), after) < 1e-5


def test_without_the_patch_the_fused_projection_is_cut_in_wrong_places(tmp_path):
    before, gradients, after = steps_of_megatron(tmp_path, 1, [])
    expected = steps_of_the_definition(before, gradients)
    qkv = "decoder.layers.self_attention.linear_qkv.weight"
    assert largest_difference({qkv: before[qkv]}, {qkv: expected[qkv]}, {qkv: after[qkv]}) > 0.1  # when this fails, the patch can go
    for weights in (before, expected, after):
        del weights[qkv]
    assert largest_difference(before, expected, after) < 1e-5
