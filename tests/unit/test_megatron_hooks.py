"""Megatron must still look as our patches suppose: each test here names what to look at again when it fails."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace

import pytest
import torch

from rat_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("megatron_process")


def _source(function) -> str:
    return inspect.getsource(inspect.unwrap(function))


def test_train_calls_the_global_train_step_and_unpacks_eight_values():
    from megatron.training import training

    parameters = "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration".split()
    assert list(inspect.signature(training.train_step).parameters)[:8] == parameters
    assert ") = train_step(\n" in _source(training.train)
    returned = "return {}, skipped_iter, should_checkpoint, should_exit, exit_code, grad_norm, num_zeros_in_grad, log_max_attention_logit"
    assert returned in _source(training.train_step)
    assert "opt_param_scheduler.step(increment=increment)" in _source(training.train_step)


def test_evaluation_and_flops_go_through_globals_of_training():
    from megatron.training import training

    parameters = list(inspect.signature(training.evaluate_and_print_results).parameters)
    assert parameters[:5] == ["prefix", "forward_step_func", "data_iterator", "model", "iteration"]
    assert "total_loss_dict, collected_non_loss_data, timelimit = evaluate(" in _source(training.evaluate_and_print_results)
    for caller in (training.train, training.pretrain):
        assert "evaluate_and_print_results(" in _source(caller)
    assert list(inspect.signature(training.num_floating_point_operations).parameters)[:2] == ["args", "batch_size"]
    for caller in (training.training_log, training.train):
        assert "num_floating_point_operations(" in _source(caller)


def test_cuda_graphs_go_through_the_global_and_keep_their_state_on_the_class():
    from megatron.core import full_cuda_graph
    from megatron.training import training

    for caller in (training.train, training.evaluate):
        assert "forward_backward_func = FullCudaGraphWrapper(\n" in _source(caller)
    kept = {name for name, value in vars(full_cuda_graph.FullCudaGraphWrapper).items() if isinstance(value, dict)}
    assert kept == {"curr_iteration", "cuda_graph", "result"}  # what rat_megatron.training.loop.cuda_graphs has one of for every pattern
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
    graphs = cuda_graphs.CudaGraphOfEachPattern(lambda **kwargs: "without a graph", cuda_graph_warmup_steps=1)
    losses = [graphs(model=[pattern], forward_only=False) for pattern in ("d64", "dense") * 3]
    assert losses[:2] == [None, None] and losses[2] is losses[4] and losses[3] is losses[5]
    assert (losses[2][0]["lm loss"][0], losses[3][0]["lm loss"][0]) == (3.0, 5.0)
    assert graphs(model=["dense"], forward_only=True) == "without a graph"
    cuda_graphs.forget_cuda_graphs()
    assert graphs(model=["dense"], forward_only=False) is None
    cuda_graphs.forget_cuda_graphs()


def test_weight_gradients_are_added_through_names_of_the_module():
    from megatron.core.tensor_parallel import layers

    backward = _source(layers.LinearWithGradAccumulationAndAsyncCommunication.backward)
    for kind in ("fp32", "fp16"):
        assert f"fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_{kind}(\n" in backward
    assert "not _grad_accum_fusion_available" in _source(layers.ColumnParallelLinear.__init__)


def test_megatron_still_refuses_the_fused_cross_entropy_that_we_choose():
    from megatron.core.models.common.language_module import language_module
    from megatron.training import arguments

    # When this fails, --cross-entropy-fusion-impl te can be a default in arguments.py, and builder.py needs no say.
    assert "Transformer Engine cross entropy loss fusion is disabled" in _source(arguments.validate_args)
    # What the patch of megatron_hooks.py takes the place of; nothing reads the logits after this.
    compute_loss = _source(language_module.LanguageModule.compute_language_model_loss)
    assert "te_parallel_cross_entropy(\n                        logits, labels, self.pg_collection.tp, is_cg_capturable" in compute_loss


def test_checkpoint_tracker_is_written_through_the_module_global():
    from megatron.training import checkpointing, training

    assert "with maybe_msc.open(tracker_filename, 'w') as f:" in _source(checkpointing.save_checkpoint)
    assert list(inspect.signature(training.save_checkpoint_and_time).parameters)[0] == "iteration"


def test_megatron_still_stumbles_over_strides_in_checkpoint_metadata(one_iteration):
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    from rat_megatron.checkpoint.torch_dist import find_iteration
    from rat_megatron.training.patches.megatron_hooks import _without_strides

    original, strategy = TorchDistLoadShardedStrategy.load_tensors_metadata, TorchDistLoadShardedStrategy()
    with pytest.raises(TypeError, match="strides"):  # when this passes, the patch can go
        original(strategy, find_iteration(one_iteration))
    assert "decoder.final_layernorm.weight" in _without_strides(original)(strategy, find_iteration(one_iteration))


def test_strictness_still_looks_for_missing_keys_through_the_global():
    from megatron.core.dist_checkpointing import validation

    from rat_megatron.training.patches.megatron_hooks import _without_what_is_left_out

    assert "= _determine_missing_and_unexpected_keys(" in _source(validation.validate_integrity_and_strict_load)
    missing = {"rng_state", "rerun_state_machine_state", "optimizer.state.exp_avg.x", "decoder.weight"}
    determine = lambda *_: (missing, {"unexpected"})  # noqa: E731
    resumed = _without_what_is_left_out(determine, Namespace(finetune=False, no_load_optim=None))
    assert resumed("metadata") == ({"optimizer.state.exp_avg.x", "decoder.weight"}, {"unexpected"})
    adapted = _without_what_is_left_out(determine, Namespace(finetune=True, no_load_optim=None))
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
    from rat_megatron.training.patches import megatron_hooks as hooks

    saved, loaded = gpt_model(), gpt_model()
    state = {key: value for key, value in saved.sharded_state_dict().items() if not key.endswith(left_out)}
    assert len(state) < len(saved.sharded_state_dict())
    dist_checkpointing.save(state, str(tmp_path))
    args = Namespace(dist_ckpt_strictness="log_unexpected")
    load_metadata = TorchDistLoadShardedStrategy.load_tensors_metadata
    monkeypatch.setattr(TorchDistLoadShardedStrategy, "load_tensors_metadata", hooks._without_strides(load_metadata))
    determine = hooks._lacking_fp8_state_only(validation._determine_missing_and_unexpected_keys, args)
    monkeypatch.setattr(validation, "_determine_missing_and_unexpected_keys", determine)
    monkeypatch.setattr(GPTModel, "load_state_dict", hooks._with_weights_whole(GPTModel.load_state_dict))

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


def test_megatron_still_takes_parameters_from_packed_buckets_by_their_padded_places():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from rat_megatron.training.patches.megatron_hooks import _with_padding

    # When either line is gone, see whether Megatron has mended it; tests/distributed/test_resharding.py says whether all is well.
    assert "world_tensors[state_key][param_world_start:param_world_end]" in _source(
        DistributedOptimizer.sharded_param_state_fully_reshardable
    )
    assert "offset_in_world_tensors += gbuf_world_numel_unpadded" in _source(DistributedOptimizer.get_parameter_state_dp_zero)
    buckets = [Namespace(offset=0, numel_unpadded=3), Namespace(offset=5, numel_unpadded=2)]
    state = {"buckets_coalesced": True, 0: {"dtype": {"param": torch.arange(1.0, 6.0), "numel_unpadded": 5}}}
    padded = _with_padding(state, [Namespace(buckets=buckets, numel=8)])
    assert padded[0]["dtype"]["param"].tolist() == [1, 2, 3, 0, 0, 4, 5, 0]
    assert _with_padding(None, []) is None


def test_main_params_are_saved_whole_and_kept_in_halves():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from rat_megatron.training.patches.main_params import join, split, with_main_params_split, with_whole_main_params

    # Remainders would pass through these as they are: into a buffer of fp32, and back into set_scaled_state(), which wants int16.
    for method in ("_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states"):
        assert "master_param" in _source(getattr(DistributedOptimizer, method))
    assert 'dtype=torch.float32, device="cpu"' in _source(DistributedOptimizer.get_parameter_state_dp_zero)

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


def test_megatron_still_cannot_resume_its_distributed_optimizer_with_torchs_adam():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from rat_megatron.training.patches.megatron_hooks import _begun

    assert "assert len(steps) == 1" in _source(DistributedOptimizer.state_dict)
    assert 's["step"] = step' in _source(DistributedOptimizer.load_state_dict)  # one tensor for all parameters
    assert "if not isinstance(tensors[key], torch.Tensor):" in _source(DistributedOptimizer._set_main_param_and_optimizer_states)
    parameter = torch.nn.Parameter(torch.ones(3))
    holder = Namespace(optimizer=torch.optim.AdamW([parameter]), optimizer_state_keys=("exp_avg", "exp_avg_sq"))
    assert _begun(lambda self: self.optimizer.state_dict())(holder)["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(parameter.data, torch.ones(3))


def test_tracker_is_replaced_whole_or_left_alone(tmp_path):
    from rat_megatron.training.patches.megatron_hooks import _AtomicTracker

    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("10")
    with _AtomicTracker().open(str(tracker), "w") as file:
        file.write("20")
        file.flush()
        assert tracker.read_text() == "10"
    assert tracker.read_text() == "20"
    with pytest.raises(KeyboardInterrupt), _AtomicTracker().open(str(tracker), "w") as file:
        file.write("30")
        raise KeyboardInterrupt
    assert tracker.read_text() == "20"


def test_every_parameter_is_decayed():
    from megatron.training.training import get_megatron_optimizer_config

    from rat_megatron.training.patches.megatron_hooks import _decay_every_parameter

    args = Namespace(lr=1e-3, weight_decay=0.1)
    assert [override["wd_mult"] for override in get_megatron_optimizer_config(args)[1].values()] == [0.0]  # what we take away
    assert _decay_every_parameter(get_megatron_optimizer_config)(args)[1] == {}


def test_compile_dependencies_still_runs_make():
    from megatron.training import initialize

    assert "compile_helpers()" in _source(initialize._compile_dependencies)
    assert "_compile_dependencies()" in _source(initialize.initialize_megatron)


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


def test_report_keeps_what_was_measured(tmp_path, monkeypatch):
    from rat_megatron.training.monitoring import metrics

    args = Namespace(global_batch_size=4, seq_length=8, consumed_train_samples=12, rat_pattern="d16", rat_recurrence=True)
    monkeypatch.setattr(metrics, "get_args", lambda: args)
    report = metrics.RunReport(tmp_path / "run")
    report.iteration = 3
    report.add_loss("d16", 2.5)
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert content["patterns"] == {"d16": 2.5} and content["iteration"] == 3 and content["tokens_per_second"] is None
    assert report.timed(lambda value: value + 1)(1) == 2
    report.add_loss("dense", 2.0)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["tokens_per_second"] > 0


@pytest.fixture
def arguments_1_5b(monkeypatch):
    """Validated arguments of the 1.5B baseline, dense, without active recurrence learning."""
    from megatron.training.arguments import parse_args, validate_args

    from rat_megatron.training.arguments import add_rat_args

    monkeypatch.setattr("sys.argv", ["pretrain_rat.py", "--rat-preset", "1.5b", "--no-rat-recurrence", "--rat-arl-pattern", "none"])
    args = parse_args(add_rat_args)
    validate_args(args)
    args.padded_vocab_size = args.vocab_size
    return args


def test_flops_equal_megatrons_where_both_count_the_same(arguments_1_5b):
    from megatron.training.training import num_floating_point_operations

    from rat_megatron.training.monitoring.flops import iteration_flops

    # Megatron counts T * T / 2 pairs of causal attention, we T * (T + 1) / 2.
    assert iteration_flops(arguments_1_5b, 8) == pytest.approx(num_floating_point_operations(arguments_1_5b, 8), rel=1e-4)


def test_the_pairs_of_a_pattern_are_counted_once_a_run(arguments_1_5b, monkeypatch):
    from rat_megatron.ratplus.pattern import AttentionPattern
    from rat_megatron.training.monitoring.flops import iteration_flops

    first, count = iteration_flops(arguments_1_5b, 8), AttentionPattern.flops
    counted: list[int] = []
    monkeypatch.setattr(AttentionPattern, "flops", lambda *args: counted.append(1) or count(*args))
    assert iteration_flops(arguments_1_5b, 16) == 2 * first and not counted
    arguments_1_5b.seq_length = 128
    assert iteration_flops(arguments_1_5b, 8) < first / 32 and len(counted) == 1


def test_flops_count_the_forget_gate_and_the_sparse_step(arguments_1_5b):
    from rat_megatron.training.monitoring.flops import iteration_flops

    args = arguments_1_5b
    baseline = iteration_flops(args, 8)
    args.rat_recurrence = True
    dense = iteration_flops(args, 8)
    assert dense - baseline == 3 * 8 * 4096 * 2 * args.num_layers * args.hidden_size**2
    args.rat_arl_pattern = "d64"
    assert 1.85 < iteration_flops(args, 8) / dense < 1.95  # the paper: about 1.9
