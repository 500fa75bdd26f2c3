"""The check of a conversion: Megatron's own model, built from the arguments in the checkpoint, beside the result."""

import logging
import os

import pytest
import torch

from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
from rat_megatron.convert import convert_to_hf, megatron_args, megatron_model
from rat_megatron.convert.megatron_model import megatron_logits
from rat_megatron.errors import UserError
from rat_megatron.model.architecture import FIXED
from tests.converting import VOCAB, megatron_tensors, random_weights, write_checkpoint
from tests.converting import megatron_args as stored_args

torch.set_num_threads(1)  # at these sizes threads only wait for each other
TOKENS = (torch.arange(32) * 7919 + 1) % VOCAB


def checkpoint_of(folder, weights=None, dtype=torch.float32, **changes):
    tensors = {name: tensor.to(dtype) for name, tensor in megatron_tensors(weights or random_weights()).items()}
    return write_checkpoint(folder / "run", tensors, stored_args(params_dtype=dtype, **changes))


OTHERS = {
    "rotary_interleaved": True,
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "squared_relu": True,
    "add_bias_linear": True,
    "softmax_type": "off-by-one",
    "apply_query_key_layer_scaling": True,
    "use_mup": True,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_no_table_refuses_is_noticed(tmp_path, monkeypatch, name):
    """As if the row of rat_megatron.model.architecture were missing: what was trained is another model then, and the check finds it."""
    monkeypatch.delitem(FIXED, name)
    checkpoint = checkpoint_of(tmp_path, **{name: OTHERS[name]})
    with pytest.raises(UserError, match="the converted weights give other logits than|Megatron builds no model|the model of its arguments"):
        convert_to_hf(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


CHANGED = {
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-2,
    "rotary_percent": 0.34,  # 2 of the 6 channels of a head
    "rotary_scaling": {"rope_type": "linear", "factor": 4.0},
    "layers_without_rope": [1],  # the one layer that is built is each layer in turn
}


@pytest.mark.parametrize("setting", CHANGED)
def test_a_config_that_says_something_else_than_the_arguments_is_noticed(tmp_path, monkeypatch, setting):
    right = megatron_args.config_from_args

    def wrong(*args):
        config = right(*args)
        setattr(config, setting, CHANGED[setting])
        return config

    checkpoint = checkpoint_of(tmp_path)
    monkeypatch.setattr(megatron_args, "config_from_args", wrong)
    with pytest.raises(UserError, match="the converted weights give other logits than .*iter_0000020"):
        convert_to_hf(checkpoint, tmp_path / "hf")


def test_a_run_of_any_layout_and_precision_is_compared(tmp_path):
    """How a run was laid out leaves the model as it is, and this process has no part of it."""
    layout = {
        "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True,
        "virtual_pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1, "expert_model_parallel_size": 1,
        "transformer_impl": "transformer_engine", "bf16": True, "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_dot_product_attention": True,
        "fp8_param_gather": True, "first_last_layers_bf16": False, "cuda_graph_impl": "full_iteration", "te_rng_tracker": True,
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, "tp_comm_overlap": True,
        "gradient_accumulation_fusion": True, "masked_softmax_fusion": True, "bias_dropout_fusion": True, "apply_rope_fusion": True,
        "cross_entropy_loss_fusion": True, "overlap_p2p_comm": True, "fp32_residual_connection": True, "hidden_dropout": 0.1,
        "rat_pattern": "[d4,dense]", "rat_preset": "tiny", "tp_comm_overlap_cfg": "nowhere.yaml",
    }  # fmt: skip
    checkpoint = checkpoint_of(tmp_path, dtype=torch.bfloat16, **layout)
    check = convert_to_hf(checkpoint, tmp_path / "hf").check
    assert check.difference < 1e-5 * check.largest_logit and check.rounding is None


def test_both_dtypes_are_those_of_whole_models(tmp_path):
    """Rounding a layer after its fp32 pass is rounding the checkpoint."""
    weights = random_weights(untied=True)
    stored = checkpoint_of(tmp_path, weights, untie_embeddings_and_output_weights=True)
    exact, rounded = megatron_logits(TorchDistCheckpoint(find_iteration(stored)), TOKENS, [None, torch.bfloat16])
    (tmp_path / "rounded").mkdir()
    other = checkpoint_of(tmp_path / "rounded", weights, torch.bfloat16, untie_embeddings_and_output_weights=True)
    (stored_rounded,) = megatron_logits(TorchDistCheckpoint(find_iteration(other)), TOKENS, [None])
    assert torch.equal(rounded, stored_rounded) and not torch.equal(exact, rounded)


def test_rows_of_the_output_layer_come_in_slices(tmp_path, monkeypatch):
    source = TorchDistCheckpoint(find_iteration(checkpoint_of(tmp_path)))
    (whole,) = megatron_logits(source, TOKENS, [None])
    monkeypatch.setattr(megatron_model, "_ROWS", 7)
    (sliced,) = megatron_logits(source, TOKENS, [None])
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)


def test_a_tensor_that_megatron_misses_is_named(tmp_path):
    """An args_from_config checkpoint has few arguments; one whose tensors are not those of its arguments is refused."""
    tensors = megatron_tensors(random_weights())
    del tensors["decoder.layers.mlp.linear_fc2.weight"]
    write_checkpoint(tmp_path / "run", tensors, stored_args())
    with pytest.raises(UserError, match="has no decoder.layers.mlp.linear_fc2.weight, which the model of its arguments has"):
        megatron_logits(TorchDistCheckpoint(find_iteration(tmp_path / "run")), TOKENS, [None])


def state_of_the_process():
    from megatron.core import parallel_state

    return {
        "group": torch.distributed.is_initialized() and torch.distributed.group.WORLD,
        "megatron": {name: value for name, value in vars(parallel_state).items() if name.strip("_").isupper()},
        "cuda": (torch.cuda.current_device, torch.cuda.is_available(), torch.cuda.device_count),
        "modes": torch.overrides._len_torch_function_stack(),
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "logging": logging.root.manager.disable,
        "environment": dict(os.environ),
    }


def test_it_leaves_a_process_as_it_was_twice(tmp_path, monkeypatch):
    import megatron.training.models.gpt  # noqa: F401  what is imported stays

    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")  # which Megatron refuses for its default backend
    source = TorchDistCheckpoint(find_iteration(checkpoint_of(tmp_path)))
    assert not torch.distributed.is_initialized()
    (once,), before = megatron_logits(source, TOKENS, [None]), state_of_the_process()
    (twice,) = megatron_logits(source, TOKENS, [None])
    assert torch.equal(once, twice)
    assert state_of_the_process() == before and before["group"] is False
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2


def test_it_leaves_a_process_as_it_was_when_it_fails(tmp_path):
    source = TorchDistCheckpoint(find_iteration(checkpoint_of(tmp_path)))
    megatron_logits(source, TOKENS, [None])
    before = state_of_the_process()
    source.tensors.pop("decoder.final_layernorm.weight")
    with pytest.raises(UserError, match="has no decoder.final_layernorm.weight"):
        megatron_logits(source, TOKENS, [None])
    assert state_of_the_process() == before


def test_inside_a_process_that_has_megatron(tmp_path, megatron_process):
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    source = TorchDistCheckpoint(find_iteration(checkpoint_of(tmp_path)))
    before, states = state_of_the_process(), get_cuda_rng_tracker().get_states()
    assert before["group"]
    converted = convert_to_hf(tmp_path / "run", tmp_path / "hf")
    assert converted.check.difference < 1e-5 * converted.check.largest_logit
    megatron_logits(source, TOKENS, [None])
    after = state_of_the_process()
    assert after == before
    assert {name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()} == {
        name: state.tolist() for name, state in states.items()
    }
