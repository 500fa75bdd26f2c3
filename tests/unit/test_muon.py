"""Muon on one process: its steps against float64, and its place on the command line."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest

from rat_megatron.errors import UserError
from tests.helpers import MODEL_FLAGS
from tests.muon_steps import largest_difference, steps_of_megatron, steps_of_the_definition

QKV = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.mark.parametrize("recurrent, bf16, tolerance", [(True, False, 1e-5), (False, False, 1e-5), (True, True, 2e-2)])
def test_steps_are_those_of_the_definition(megatron_process, tmp_path, recurrent, bf16, tolerance):
    """Muon for matrices, Adam for embeddings and norms, and weight decay for all."""
    from rat_megatron.training.patches.table import _optimizer

    patches = _optimizer(Namespace(optimizer="muon", use_layer_wise_distributed_optimizer=False))
    before, gradients, after = steps_of_megatron(tmp_path, 3, patches, recurrent, bf16=bf16)
    assert largest_difference(before, steps_of_the_definition(before, gradients, recurrent), after) < tolerance


def test_without_the_forget_gate_the_fused_projection_is_cut_in_wrong_places(megatron_process, tmp_path):
    before, gradients, after = steps_of_megatron(tmp_path, 1, [])
    expected = steps_of_the_definition(before, gradients)
    assert largest_difference(*({QKV: weights.pop(QKV)} for weights in (before, expected, after))) > 0.1
    assert largest_difference(before, expected, after) < 1e-5


@pytest.fixture
def check(megatron_process, monkeypatch):
    """check(flags...) -> the arguments as given; raises what the user would see of the optimizer."""
    from rat_megatron.training.arguments import read_command_line
    from rat_megatron.training.arguments.optimizer import check_optimizer

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *MODEL_FLAGS, *flags])
        args = read_command_line()
        check_optimizer(args)
        return args

    return run


def test_a_preset_has_a_recipe_for_muon(check):
    with_muon, with_adam = check("--rat-preset", "1.5b", "--optimizer", "muon"), check("--rat-preset", "1.5b")
    different = {name for name, value in vars(with_muon).items() if value != getattr(with_adam, name)}
    assert different == {"optimizer", "muon_momentum", "muon_nesterov", "muon_extra_scale_factor", "muon_tp_mode"}
    assert (with_muon.muon_momentum, with_muon.muon_extra_scale_factor, with_muon.muon_scale_mode) == (0.95, 0.2, "spectral")
    assert check("--rat-preset", "tiny", "--optimizer=muon", "--muon-momentum", "0.9").muon_momentum == 0.9


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--optimizer", "dist_muon"], "dist_muon is Megatron's old name: give --optimizer muon with --use-distributed-optimizer"),
        (["--optimizer", "adaptive_muon"], "--optimizer adaptive_muon is not supported: give adam, sgd or muon"),
        (["--optimizer", "soap"], "--optimizer soap is not supported"),
        (["--optimizer", "lion"], "--optimizer lion is not supported"),
        (["--muon-momentum", "0.9"], "--muon-momentum would change nothing with --optimizer adam: leave it out, or give --optimizer muon"),
        (["--optimizer", "muon", "--fp16"], "--optimizer muon does not train with --fp16: give --bf16, or neither"),
        (["--optimizer", "muon", "--use-distributed-optimizer"], "with --use-distributed-optimizer needs --bf16: give it, or leave out"),
        (["--optimizer", "muon", "--optimizer-cuda-graph"], "--optimizer muon is not supported with --optimizer-cuda-graph: leave it out"),
        (["--optimizer", "muon", "--bf16", "--use-precision-aware-optimizer"], "is not supported with --use-precision-aware-optimizer"),
        (["--optimizer", "muon", "--muon-scalar-optimizer", "lion"], "is not supported with --muon-scalar-optimizer lion"),
        (["--optimizer", "muon", "--muon-coefficient-type", "cubic"], "cubic is not known: give one of simple, quintic, polar_express,"),
        (["--optimizer", "muon", "--muon-coefficient-type", "custom"], "custom is not known"),
    ],
)
def test_what_does_not_fit_has_its_sentence(check, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        check(*flags)


def test_graphs_are_refused_where_ranks_share_the_matrices(check):
    from rat_megatron.training.arguments.optimizer import check_optimizer

    args = check("--optimizer", "muon", "--bf16", "--use-distributed-optimizer")
    args.cuda_graph_impl = "full_iteration"  # which is refused earlier without a GPU
    check_optimizer(args)
    args.world_size, args.tensor_model_parallel_size = 2, 2
    check_optimizer(args)
    args.world_size = 4
    with pytest.raises(UserError, match="has not been tried under --cuda-graph-impl on several data-parallel ranks"):
        check_optimizer(args)


def test_the_package_may_be_missing(check, monkeypatch):
    from rat_megatron.training.arguments import optimizer

    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    check()
    with pytest.raises(UserError, match="needs the package emerging-optimizers: pip install 'emerging-optimizers"):
        check("--optimizer", "muon")
