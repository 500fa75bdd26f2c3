"""Patches one by one: the fault that each mends, in Megatron as it is, and gone. A run with all of them is in test_patched_runs.py.

Source is compared with strings only where behaviour needs a GPU.
"""

from __future__ import annotations

import inspect
import weakref
from argparse import Namespace

import pytest
import torch

from rat_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("megatron_process")


def _source(function) -> str:
    return inspect.getsource(inspect.unwrap(function))


def test_cuda_graphs_go_through_the_global_and_keep_their_state_on_the_class():
    from megatron.core import full_cuda_graph
    from megatron.training import training

    for caller in (training.train, training.evaluate):
        assert "forward_backward_func = FullCudaGraphWrapper(\n" in _source(caller)
    kept = {name for name, value in vars(full_cuda_graph.FullCudaGraphWrapper).items() if isinstance(value, dict)}
    assert kept == {"curr_iteration", "cuda_graph", "result"}  # what loop/cuda_graphs.py has one of for every pattern
    assert "FullCudaGraphWrapper.cuda_graph[training_str]" in _source(full_cuda_graph.FullCudaGraphWrapper.__call__)


def test_each_pattern_has_a_graph_of_its_own_and_validation_none(monkeypatch):
    from rat_megatron.training.loop import cuda_graphs

    monkeypatch.setattr(cuda_graphs, "unwrap_model", lambda model: model)
    monkeypatch.setattr(cuda_graphs, "get_attention_pattern", lambda model: model)
    base = cuda_graphs.FullCudaGraphWrapper

    def captured(self, **kwargs):  # as Megatron's: the second call of a graph's life captures
        if base.curr_iteration["training"] == 1:
            base.cuda_graph["training"] = base.result["training"] = [{"lm loss": torch.tensor([float(len(kwargs["model"][0])), 1.0])}]
        base.curr_iteration["training"] += 1
        return base.result["training"]

    monkeypatch.setattr(base, "__call__", captured)
    run = cuda_graphs.CudaGraphs()
    graphs = run.wrapper(base)(lambda **kwargs: "without a graph", cuda_graph_warmup_steps=1)

    def step(pattern, num_microbatches):
        return graphs(model=[pattern], forward_only=False, num_microbatches=num_microbatches)

    losses = [step(pattern, 4) for pattern in ("d64", "dense") * 3]
    assert losses[:2] == [None, None] and losses[2] is losses[4] and losses[3] is losses[5]
    assert (losses[2][0]["lm loss"][0], losses[3][0]["lm loss"][0]) == (3.0, 5.0)
    assert graphs(model=["dense"], forward_only=True, num_microbatches=2) == "without a graph"
    assert step("dense", 4) is losses[3], "validation has batches of its own size"
    gone = weakref.ref(losses[2][0]["lm loss"])
    del losses
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert step("d64", 8) is None and gone() is None, "a batch of another size has graphs of its own, and the memory of the others"
    assert step("d64", 8)[0]["lm loss"][0] == 3.0 and step("dense", 8) is None
    run.close()
    assert step("dense", 8) is None
    run.close()


def test_weight_gradients_are_added_through_names_of_the_module():
    from megatron.core.tensor_parallel import layers

    from rat_megatron.training.patches import applied, fused, table

    with applied(table._kernels(Namespace(gradient_accumulation_fusion=True))):  # as on a GPU without Apex
        assert layers._grad_accum_fusion_available and layers.fused_weight_gradient_mlp_cuda is fused.WeightGradient
    assert not layers._grad_accum_fusion_available and not hasattr(layers, "fused_weight_gradient_mlp_cuda")
    backward = _source(layers.LinearWithGradAccumulationAndAsyncCommunication.backward)
    for kind in ("fp32", "fp16"):
        assert f"fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_{kind}(\n" in backward
    assert "not _grad_accum_fusion_available" in _source(layers.ColumnParallelLinear.__init__)


def test_megatron_still_refuses_the_fused_cross_entropy_that_we_choose():
    from megatron.core.models.common.language_module import language_module
    from megatron.training import arguments

    # When this fails, --cross-entropy-fusion-impl te can be a default in flags.py, and config.py needs no say.
    assert "Transformer Engine cross entropy loss fusion is disabled" in _source(arguments.validate_args)
    # What the patch takes the place of; nothing reads the logits after this.
    compute_loss = _source(language_module.LanguageModule.compute_language_model_loss)
    assert "te_parallel_cross_entropy(\n                        logits, labels, self.pg_collection.tp, is_cg_capturable" in compute_loss


def test_megatron_still_stumbles_over_strides_in_checkpoint_metadata(one_iteration):
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    from rat_megatron.checkpoint.torch_dist import find_iteration
    from rat_megatron.training.patches.loading import without_strides

    original, strategy = TorchDistLoadShardedStrategy.load_tensors_metadata, TorchDistLoadShardedStrategy()
    with pytest.raises(TypeError, match="strides"):  # when this passes, the patch can go
        original(strategy, find_iteration(one_iteration))
    assert "decoder.final_layernorm.weight" in without_strides(original)(strategy, find_iteration(one_iteration))


def test_states_of_ranks_may_be_missing():
    from rat_megatron.training.patches.loading import without_what_is_left_out

    missing = {"rng_state", "rerun_state_machine_state", "optimizer.state.exp_avg.x", "decoder.weight"}
    determine = lambda *_: (missing, {"unexpected"})  # noqa: E731
    resumed = without_what_is_left_out(determine, Namespace(finetune=False, no_load_optim=None))
    assert resumed("metadata") == ({"optimizer.state.exp_avg.x", "decoder.weight"}, {"unexpected"})
    adapted = without_what_is_left_out(determine, Namespace(finetune=True, no_load_optim=None))
    assert adapted("metadata") == ({"decoder.weight"}, {"unexpected"})


@pytest.fixture(scope="module")
def gpt_model(megatron_process):
    """make() -> a tiny RAT+ model with fresh weights."""
    from megatron.core.models.gpt import GPTModel

    from rat_megatron.model.config import RATTransformerConfig
    from rat_megatron.model.layer_spec import get_rat_block_spec

    def make():
        config = RATTransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, normalization="RMSNorm", add_bias_linear=False, transformer_impl="local"
        )
        return GPTModel(config, get_rat_block_spec(config), 32, 8, position_embedding_type="rope")

    return make


@pytest.mark.parametrize("left_out", ["._extra_state", "linear_proj.weight"])
def test_a_checkpoint_may_lack_the_state_of_fp8_and_nothing_else(gpt_model, tmp_path, monkeypatch, left_out):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import validation
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from megatron.core.models.gpt import GPTModel
    from torch.distributed.checkpoint.api import CheckpointException

    from rat_megatron.errors import UserError
    from rat_megatron.training.patches import loading as hooks

    saved, loaded = gpt_model(), gpt_model()
    state = {key: value for key, value in saved.sharded_state_dict().items() if not key.endswith(left_out)}
    assert len(state) < len(saved.sharded_state_dict())
    dist_checkpointing.save(state, str(tmp_path))
    args = Namespace(dist_ckpt_strictness="log_unexpected")
    load_metadata = TorchDistLoadShardedStrategy.load_tensors_metadata
    monkeypatch.setattr(TorchDistLoadShardedStrategy, "load_tensors_metadata", hooks.without_strides(load_metadata))
    determine = hooks.lacking_fp8_state_only(validation._determine_missing_and_unexpected_keys, args)
    monkeypatch.setattr(validation, "_determine_missing_and_unexpected_keys", determine)
    monkeypatch.setattr(GPTModel, "load_state_dict", hooks.with_weights_whole(GPTModel.load_state_dict))

    def load(strict):
        return dist_checkpointing.load(loaded.sharded_state_dict(), str(tmp_path), strict=strict)

    if left_out == "._extra_state":
        loaded.load_state_dict(load("log_unexpected"))
        for (name, there), here in zip(saved.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(there, here), name
        with pytest.raises(CheckpointException, match="_extra_state"):  # Megatron's own default; when this passes, the hook can go
            load("assume_ok_unexpected")
    else:
        with pytest.raises(UserError, match="the checkpoint lacks decoder.layers.*linear_proj.weight: give the flags"):
            load("log_unexpected")
        args.dist_ckpt_strictness = "ignore_all"  # as the user says
        lacking = load("ignore_all")
        for strict in (True, False):  # Megatron tries again without
            with pytest.raises(UserError, match="does not fit the model in decoder.layers.*linear_proj.weight: give"):
                loaded.load_state_dict(lacking, strict=strict)


def test_megatron_and_torch_still_load_what_is_no_tensor_as_they_did():
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
    from megatron.training import checkpointing
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    assert "module.load_state_dict(state_dict, strict=False)" in _source(checkpointing.load_checkpoint)
    # When this fails, checkpoints are safe from pickles: then Transformer Engine should be asked to refuse them, as it does by itself.
    assert "weights_only=False" in _source(DefaultLoadPlanner.load_bytes) and MCoreLoadPlanner.load_bytes is DefaultLoadPlanner.load_bytes


def test_main_params_are_saved_whole_and_kept_in_halves():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from rat_megatron.training.patches.optimizer import join, split, with_main_params_split, with_whole_main_params

    # Remainders would pass through these as they are: into a checkpoint of fp32, and back into set_scaled_state(), which wants int16.
    for method in ("_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states"):
        assert "master_param" in _source(getattr(DistributedOptimizer, method))

    main = torch.cat([torch.randn(5000), torch.randn(1000) * 1e-30, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    main = main[main.view(torch.int32) % 2**16 != 2**15]  # in the middle between two bf16 numbers: below
    rounded_up = ((main.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)  # as the optimizer splits
    for parameter in (rounded_up, main.bfloat16()):
        remainder = split(parameter, main)
        assert remainder.dtype == torch.int16
        assert torch.equal(join(parameter, remainder).view(torch.int32), main.view(torch.int32))
    between = torch.tensor([1 + 2**-8, -1 - 2**-8])  # torch rounds these to even: down
    assert torch.equal(join(between.bfloat16(), split(between.bfloat16(), between)).view(torch.int32), between.view(torch.int32) - 1)
    with pytest.raises(UserError, match="not its fp32 main parameter"):
        split(rounded_up, main * 1.01)

    inner = Namespace(store_param_remainders=True, param_groups=[{"params": [rounded_up]}])
    config = Namespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True)
    holder, kept = Namespace(optimizer=inner, config=config, model_param_group_index_map={"weight": (0, 0)}), {}
    with_main_params_split(lambda self, name, tensors: kept.update(tensors))(holder, "weight", {"param": main, "exp_avg": main})
    assert kept["param"].dtype == torch.int16 and kept["exp_avg"] is main
    whole = with_whole_main_params(lambda self, name: dict(kept))(holder, "weight")
    assert torch.equal(whole["param"].view(torch.int32), main.view(torch.int32)) and whole["exp_avg"] is main
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False
    with_main_params_split(lambda self, name, tensors: kept.update(tensors))(holder, "weight", {"param": main})
    assert kept["param"] is main


def test_a_state_with_steps_of_its_own_changes_no_parameter():
    from rat_megatron.training.patches.optimizer import begun

    parameter = torch.nn.Parameter(torch.ones(3))
    holder = Namespace(optimizer=torch.optim.AdamW([parameter]), optimizer_state_keys=("exp_avg", "exp_avg_sq"))
    assert begun(lambda self: self.optimizer.state_dict())(holder)["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(parameter.data, torch.ones(3))


def test_tracker_is_replaced_whole_or_left_alone(tmp_path):
    from megatron.core.msc_utils import maybe_msc

    from rat_megatron.training.patches.saving import AtomicTracker

    told: list = []
    tracker, access = (
        tmp_path / "latest_checkpointed_iteration.txt",
        AtomicTracker(maybe_msc, lambda folder: told.append((folder, tracker.read_text()))),
    )
    tracker.write_text("10")
    with access.open(str(tracker), "w") as file:
        file.write("20")
        file.flush()
        assert tracker.read_text() == "10"
    assert tracker.read_text() == "20"
    with pytest.raises(KeyboardInterrupt), access.open(str(tracker), "w"):
        raise KeyboardInterrupt
    assert tracker.read_text() == "20" and list(tmp_path.iterdir()) == [tracker] and told == [(tmp_path, "20")]
    with pytest.raises(KeyboardInterrupt), maybe_msc.open(str(tracker), "w"):
        raise KeyboardInterrupt
    assert tracker.read_text() == ""  # as Megatron leaves it; when this fails, the patch can go


def test_the_tracker_of_a_store_is_left_to_megatron(tmp_path, monkeypatch):
    from rat_megatron.training.patches.saving import AtomicTracker

    opened = []
    access = AtomicTracker(Namespace(open=lambda *words, **_: opened.append(words)), opened.append)
    monkeypatch.chdir(tmp_path)
    access.open("msc://bucket/run/latest_checkpointed_iteration.txt", "w")
    access.open("msc://bucket/run/latest_checkpointed_iteration.txt", "r")
    assert [words[1] for words in opened] == ["w", "r"] and not list(tmp_path.iterdir())


def test_every_parameter_is_decayed():
    from megatron.training.training import get_megatron_optimizer_config

    from rat_megatron.training.patches.optimizer import decay_every_parameter

    args = Namespace(lr=1e-3, weight_decay=0.1)
    assert [override["wd_mult"] for override in get_megatron_optimizer_config(args)[1].values()] == [0.0]  # what we take away
    assert decay_every_parameter(get_megatron_optimizer_config)(args)[1] == {}


def test_cpu_platform_gives_cuda_words_a_meaning():
    if torch.cuda.is_available():
        pytest.skip("the CPU platform is off where a CUDA device is present")
    tensor = torch.ones(2, device="cuda").cuda().to("cuda").to(torch.device("cuda", 0))
    assert tensor.device.type == "cpu" and tensor.type() == "torch.cuda.FloatTensor" and torch.cuda.current_device() == 0
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(4)) and not torch.cuda.is_available()
