"""The command line: layers of defaults, and bad input that ends before training with one sentence and exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from rat_megatron.errors import UserError
from rat_megatron.ratplus.pattern import PatternError
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS, pretrain

pytestmark = pytest.mark.usefixtures("megatron_process")


@pytest.fixture
def check(monkeypatch):
    """check(flags...) -> (arguments as given, what follows from the data); raises what the user would see."""

    def run(*flags):
        from rat_megatron.training.arguments import read_command_line
        from rat_megatron.training.arguments.checks import check_and_derive

        monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *map(str, flags)])
        given = read_command_line()
        return given, check_and_derive(given)

    return run


def test_preset_fills_what_is_not_given_and_the_command_line_wins(check, tiny_data):
    given, derived = check("--rat-preset", "tiny", "--seq-length", 64, "--num-layers", 2, "--lr=0.5", "--data-path", tiny_data)
    assert (given.num_layers, given.lr, given.hidden_size, given.normalization) == (2, 0.5, 128, "RMSNorm")
    assert (given.adam_beta2, given.adam_eps, given.weight_decay, given.min_lr) == (0.95, 1e-8, 0.1, 1e-6)
    assert given.dist_ckpt_optim_fully_reshardable and given.attention_output_gate
    assert derived["vocab_size"] == 300 and derived["rat_eod_id"] == 0
    assert derived["rat_arl_pattern"] == "d64" and derived["rat_eval_patterns"] == ["dense"]


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_number_of_checkpoints_is_one_or_more(check, number):
    with pytest.raises(UserError, match=f"'{number}' is no number of checkpoints: give 1 or more"):
        check("--rat-preset", "tiny", "--rat-keep-checkpoints", number)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--micro-batch-size", "0"], "--micro-batch-size 0 must be above 0"),
        (["--global-batch-size", "-4"], "--global-batch-size -4 must be above 0"),
        (["--save-retain-interval", "0"], "--save-retain-interval 0 must be above 0"),
        (["--save-interval", "2", "--save-retain-interval", "3"], "--save-retain-interval 3 is not a multiple of --save-interval 2"),
        (["--lr", "nan"], "--lr nan is no learning rate"),
        (["--ckpt-step", "5"], "--ckpt-step 5 names an iteration, but there is no checkpoint"),
    ],
)
def test_numbers_that_cannot_be_end_in_a_sentence(check, tiny_data, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        check("--rat-preset", "tiny", "--seq-length", 64, "--data-path", tiny_data, "--save", tmp_path, *flags)


def test_saves_in_the_background_are_megatrons_own(check, tiny_data, tmp_path):
    flags = ["--rat-preset", "tiny", "--seq-length", 64, "--data-path", tiny_data]
    saving = check(*flags, "--save", tmp_path, "--async-save")[1]
    assert saving["use_persistent_ckpt_worker"] and saving["async_strategy"] == "mcore" and "async_save" not in saving
    assert check(*flags)[1]["async_save"] is False  # nothing is saved
    assert not check(*flags, "--save", tmp_path, "--no-async-save")[0].async_save
    with pytest.raises(UserError, match="--async-strategy nvrx would write checkpoints without hashes"):
        check(*flags, "--async-strategy", "nvrx")


@pytest.mark.parametrize("preset, lr, steps, batch", [("1.5b", 8e-5, 476, 512), ("2.6b", 7e-5, 381, 640), ("7.6b", 2e-5, 317, 768)])
def test_adaptation_has_its_own_recipe(check, one_iteration, tiny_data, preset, lr, steps, batch):
    with pytest.raises(UserError, match="holds samples of 64 tokens"):
        check("--rat-preset", preset, "--data-path", tiny_data, "--pretrained-checkpoint", one_iteration)
    from megatron.training.arguments import parse_args

    from rat_megatron.training.arguments.flags import add_rat_args

    given = parse_args(add_rat_args)
    assert (given.lr, given.train_iters, given.global_batch_size, given.bf16) == (lr, steps, batch, True)


def test_adaptation_trains_one_step_a_batch_unless_asked(check, one_iteration, tiny_data):
    flags = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data, "--pretrained-checkpoint", one_iteration]
    assert check(*flags, "--rat-pattern", "d16w0s4")[1] | {"load": 0} == check(*flags, "--rat-pattern", "d16s4")[1] | {"load": 0}
    assert check(*flags)[1]["rat_arl_pattern"] == "none"
    assert check(*flags, "--rat-arl-pattern", "d8")[1]["rat_arl_pattern"] == "d8"


BAD = {
    "unknown pattern word": (["--rat-pattern", "d16x"], "unknown attention pattern 'd16x'"),
    "unknown evaluation pattern": (["--rat-eval-patterns", "dense", "x"], "unknown attention pattern 'x'"),
    "unknown ARL pattern": (["--rat-arl-pattern", "off"], "unknown attention pattern 'off'"),
    "pattern of generation": (["--rat-pattern", "snap64w8"], "'snap64w8' drops keys of a prompt .* train and validate under another"),
    "ARL pattern of generation": (["--rat-arl-pattern", "[dense,snap64w8]"], "'snap64w8' drops keys"),
    "evaluation pattern of generation": (["--rat-eval-patterns", "dense", "snap64w8"], "'snap64w8' drops keys"),
    "blocks by means": (["--rat-pattern", "d16k8means"], "'d16k8means' chooses blocks by the means .* write 'd16k8'"),
    "list of the wrong length": (["--rat-pattern", "[dense,d16]*3"], "lists 6 layers, but the model has 2"),
    "heads of the wrong number": (["--rat-pattern", "{dense,d16}"], "lists 2 heads, but a layer has 4"),
    "T of the data": (["--seq-length", "128"], "holds samples of 64 tokens: use --seq-length 64"),
    "vocabulary": (["--vocab-size", "200"], "vocabulary of 300, the model only 200"),
    "FP8": (["--fp8-format", "hybrid"], "need a GPU with Transformer Engine"),
    "FP8 attention": (["--fp8-format", "hybrid", "--fp8-dot-product-attention"], "need a GPU with Transformer Engine"),
    "FP8 attention alone": (["--fp8-dot-product-attention"], "--fp8-dot-product-attention needs FP8 layers around it: give --fp8-format"),
    "FP8 of all attention alone": (["--fp8-multi-head-attention"], "--fp8-multi-head-attention needs FP8 layers around it"),
    "Transformer Engine": (["--transformer-impl", "transformer_engine"], "needs a GPU with Transformer Engine"),
    "unknown flag": (["--rat-patern", "d16"], "unrecognized arguments: --rat-patern"),
    "unknown preset": (["--rat-preset", "3b"], "invalid choice: '3b'"),
    "not a number": (["--num-layers", "two"], "invalid int value: 'two'"),
    "CUDA graph": (["--cuda-graph-impl", "full_iteration"], "--cuda-graph-impl full_iteration needs a GPU"),
    "CUDA graph of a layer": (["--cuda-graph-impl", "local"], "local would train one attention pattern .* use .* full_iteration"),
    "MoE": (["--num-experts", "4"], "--num-experts is not part of a RAT\\+ layer"),
    "heads and hidden size": (["--hidden-size", "30"], "--num-attention-heads 4 does not divide --hidden-size 30"),
    "tensor parallel size": (["--tensor-model-parallel-size", "3"], "does not divide the 4 query groups"),
    "sequence parallelism alone": (["--sequence-parallel"], "give --tensor-model-parallel-size above 1"),
    "meta device": (["--init-model-with-meta-device"], "--init-model-with-meta-device gives weights no values but with Megatron's FSDP"),
    "rerun": (["--rerun-mode", "report_stats"], "--rerun-mode report_stats is not known to Megatron itself: give validate_results"),
    "overlap alone": (["--tp-comm-overlap"], "--tp-comm-overlap needs --sequence-parallel and --tensor-model-parallel-size above 1"),
    "overlap without Transformer Engine": (
        ["--tp-comm-overlap", "--sequence-parallel", "--tensor-model-parallel-size", "2"],
        "--tp-comm-overlap overlaps inside Transformer Engine's layers",
    ),
    "pipeline stages": (["--pipeline-model-parallel-size", "3"], "does not divide the 2 layers"),
    "virtual stages": (
        ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
        "2 virtual pipeline stages need .* divides the 1 layers",
    ),
    "context-parallel chunks": (["--context-parallel-size", "3"], "--seq-length 64 must be a multiple of 6"),
    "dilation of a chunk": (["--context-parallel-size", "2", "--rat-pattern", "d32s4"], "'d32s4' does not fit .* chunk of 16 tokens"),
    "dilation of the sparse step": (["--context-parallel-size", "2"], "'d64' does not fit --context-parallel-size 2"),
    "pipeline and context in Megatron's other order": (
        ["--context-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--use-tp-pp-dp-mapping", "--rat-arl-pattern", "d8"],
        "--use-tp-pp-dp-mapping has no order",
    ),
    "all-to-all of few heads": (
        ["--context-parallel-size", "2", "--tensor-model-parallel-size", "4", "--cp-comm-type", "a2a"],
        "--cp-comm-type a2a shares the 1 query groups of a rank",
    ),
    "too few ranks": (["--tensor-model-parallel-size", "2"], "1 ranks are not whole models of 2 ranks .* start a multiple of 2"),
    "global batch": (["--global-batch-size", "5"], "--global-batch-size 5 is not a multiple of .* choose a multiple of 2"),
    "warm-up": (["--lr-warmup-iters", "5"], "--lr-warmup-iters 5 must be below the 1 iterations"),
    "no deviations": (["--rat-skip-spikes", "0"], "--rat-skip-spikes 0 is no number of standard deviations: give one above 0"),
    "endless deviations": (["--rat-skip-spikes", "inf"], "--rat-skip-spikes inf is no number of standard deviations"),
    "skipping in fp16": (
        ["--rat-skip-spikes", "6", "--fp16"],
        "cannot undo a step with --fp16, as its loss scale .*: leave one of them out",
    ),
    "skipping and moments in FP8": (["--rat-skip-spikes", "6", "--exp-avg-sq-dtype", "fp8"], "cannot undo a step with --exp-avg-dtype fp8"),
    "missing load folder": (["--load", "nowhere"], "--load nowhere holds no checkpoint"),
    "missing pretrained checkpoint": (["--pretrained-checkpoint", "nowhere"], "nowhere holds no checkpoint"),
    "missing data": (["--data-path", "nowhere"], "nowhere/rat_meta.json does not exist"),
}


@pytest.mark.parametrize("flags, sentence", BAD.values(), ids=BAD)
def test_bad_input_has_its_sentence(check, tiny_data, flags, sentence):
    good = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data]
    check(*good)
    with pytest.raises((UserError, PatternError), match=sentence) as caught:
        check(*good, *flags)
    assert "\n" not in str(caught.value)


FP8 = ["--fp8-format", "hybrid"]
ATTENTION = [*FP8, "--fp8-dot-product-attention"]
HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.fixture
def check_fp8(monkeypatch):
    """check_fp8(compute capability, flags...) on a machine that says it has such a GPU and Transformer Engine."""
    import torch
    from megatron.training.arguments import parse_args

    from rat_megatron.training.arguments import fp8
    from rat_megatron.training.arguments.flags import add_rat_args

    def run(capability, *flags):
        monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *MODEL_FLAGS, *TRAIN_FLAGS, *map(str, flags)])
        args = parse_args(add_rat_args)
        args.transformer_impl = "local" if "--transformer-impl" in flags else "transformer_engine"
        with monkeypatch.context() as patch:
            patch.setattr(fp8, "HAVE_TE", True)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
            fp8.check_fp8(args)

    return run


@pytest.mark.parametrize(
    "capability, flags, sentence",
    [
        (HOPPER, ["--transformer-impl", "local", *FP8], "--fp8-format needs Transformer Engine's layers"),
        ((8, 0), FP8, "newer GPU than one of compute capability 8.0: leave out --fp8-format"),
        (HOPPER, [*FP8, "--fp8-recipe", "mxfp8"], "mxfp8 needs a newer GPU .* 9.0: give --fp8-recipe delayed, tensorwise or blockwise"),
        ((8, 9), ATTENTION, "--fp8-dot-product-attention needs a GPU of compute capability 9.0, this one has 8.9"),
        (
            HOPPER,
            [*ATTENTION, "--fp8-recipe", "blockwise"],
            "does not reach attention with --fp8-recipe blockwise: give",
        ),
        (BLACKWELL, [*ATTENTION, "--fp8-recipe", "blockwise"], "does not reach attention with --fp8-recipe blockwise"),
        (HOPPER, [*ATTENTION, "--fp8-recipe", "tensorwise"], "delayed scaling only, not with Float8CurrentScaling: .* or export NVTE_DPA"),
        (HOPPER, [*FP8, "--fp8-multi-head-attention", "--fp8-recipe", "tensorwise"], "--fp8-multi-head-attention works on this GPU with"),
        (HOPPER, [*FP8, "--hidden-size", 40], "multiples of 16, and the --hidden-size is 40"),
        (HOPPER, [*FP8, "--tensor-model-parallel-size", 4], "and the width of attention .* is 8"),
        (HOPPER, [*FP8, "--ffn-hidden-size", 72], "and the --ffn-hidden-size .* is 72"),
        (HOPPER, [*FP8, "--micro-batch-size", 1, "--seq-length", 60], "multiple of 8 tokens .* --seq-length 60 gives 60"),
    ],
)
def test_fp8_that_cannot_be_has_its_sentence(check_fp8, capability, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        check_fp8(capability, *flags)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_that_can_be_passes(check_fp8, monkeypatch, recipe):
    check_fp8(HOPPER, *FP8, "--fp8-recipe", recipe)
    if recipe != "blockwise":
        check_fp8(BLACKWELL, *ATTENTION, "--fp8-recipe", recipe)
        monkeypatch.setenv("NVTE_DPA_FP8_RECIPE", "DelayedScaling")  # attention's own
        check_fp8(HOPPER, *ATTENTION, "--fp8-recipe", recipe)
        monkeypatch.setenv("NVTE_DPA_FP8_RECIPE", "F16")
        with pytest.raises(UserError, match="not with F16"):
            check_fp8(BLACKWELL, *ATTENTION, "--fp8-recipe", recipe)


def test_fp8_attention_reaches_megatrons_configuration(check, tiny_data, monkeypatch):
    """Under Megatron's own names; one flag implies the other."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import validate_args

    from rat_megatron.model.config import RATTransformerConfig
    from rat_megatron.training.arguments import checks

    monkeypatch.setattr(checks, "check_fp8", lambda args: None)  # this machine has none
    given, derived = check(*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data, "--fp8-multi-head-attention")
    vars(given).update(derived)
    validate_args(given)
    config = core_transformer_config_from_args(given, RATTransformerConfig)
    assert config.fp8_dot_product_attention and config.fp8_multi_head_attention


@pytest.mark.slow
def test_help_prints():
    result = pretrain("--help")
    assert "--rat-pattern" in result.stdout and "--tensor-model-parallel-size" in result.stdout


def test_missing_size_names_the_flag(check, tiny_data):
    with pytest.raises(UserError, match="--num-layers is missing: give it, or a --rat-preset"):
        check("--data-path", tiny_data)


@pytest.mark.parametrize("flags", [["--no-rat-recurrence"], ["--num-layers", "3"], ["--hidden-size", "64"], ["--ffn-hidden-size", "96"]])
def test_checkpoint_of_another_architecture(check, one_iteration, tiny_data, flags):
    good = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data]
    for start in ("--pretrained-checkpoint", "--load", "--save"):
        check(*good, start, one_iteration)
        with pytest.raises(UserError, match="the checkpoint in .* has .*, this run asks for"):
            check(*good, start, one_iteration, *flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train-iters", 2], "was trained with --train-iters times --global-batch-size 4, this run asks for 8: give"),
        (["--lr", "1e-3"], "was trained with --lr 0.01, this run asks for 0.001"),
        (["--weight-decay", "0.2"], "was trained with --weight-decay 0.1, this run asks for 0.2"),
        (["--lr-warmup-fraction", "0.5"], "a warmup in samples of 0, this run asks for 2.0"),
    ],
)
def test_a_resumed_run_keeps_its_schedule_unless_asked(check, one_iteration, tiny_data, flags, sentence):
    good = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data]
    for start in ("--load", "--save"):
        with pytest.raises(UserError, match=sentence):
            check(*good, start, one_iteration, *flags)
        for choice in ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler", "--finetune", "--no-load-optim"):
            check(*good, start, one_iteration, *flags, choice)
    check(*good, "--pretrained-checkpoint", one_iteration, *flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--optimizer", "sgd"], "was trained with --optimizer adam, this run asks for sgd: give adam, or --no-load-optim to begin its"),
        (["--use-distributed-optimizer"], "was trained without --use-distributed-optimizer, .*: leave out --use-distributed-optimizer, or"),
    ],
)
def test_a_resumed_run_keeps_its_optimizer_unless_asked(check, one_iteration, tiny_data, flags, sentence):
    good = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data, *flags]
    for start in ("--load", "--save"):
        with pytest.raises(UserError, match=sentence):
            check(*good, start, one_iteration, "--override-opt-param-scheduler")
        for choice in ("--finetune", "--no-load-optim"):
            check(*good, start, one_iteration, choice)
    check(*good, "--pretrained-checkpoint", one_iteration)


def test_cuda_graphs_leave_megatrons_checks_out(check, tiny_data, monkeypatch):
    from rat_megatron.training.arguments import checks

    monkeypatch.setattr(checks, "_check_features", lambda args: None)  # which refuses them without a GPU
    good = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data]
    graphs = check(*good, "--cuda-graph-impl", "full_iteration")[1]
    assert graphs["rerun_mode"] == "disabled" and graphs["check_for_nan_in_loss_and_grad"] is False
    assert "rerun_mode" not in check(*good, "--cuda-graph-impl", "full_iteration", "--rerun-mode", "report_stats")[1]
    assert not {"rerun_mode", "check_for_nan_in_loss_and_grad"} & check(*good)[1].keys()


def test_cuda_graphs_need_heads_that_the_kernels_take(check, tiny_data, monkeypatch):
    graphs = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data, "--cuda-graph-impl", "full_iteration"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="whose heads are multiples of 16 wide up to 256, not 40: leave it out"):
        check(*graphs, "--kv-channels", 40)


def test_cuda_graphs_hold_no_wait_for_the_device(check, tiny_data, monkeypatch):
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import validate_args

    from rat_megatron.model.config import rat_model_config_from_args

    args, derived = check(*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data)
    vars(args).update(derived)
    validate_args(args)
    assert rat_model_config_from_args(args).transformer.batch_p2p_sync
    monkeypatch.setattr(TransformerConfig, "__post_init__", lambda self: None)  # it asks for Transformer Engine
    args.cuda_graph_impl = "full_iteration"
    assert not rat_model_config_from_args(args).transformer.batch_p2p_sync


def test_damaged_shards_are_found_before_training(check, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    good = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tmp_path / "data"]
    check(*good)
    shard = next((tmp_path / "data" / "train").glob("*.mds"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="shard .* has .* bytes instead of"):
        check(*good)
    shard.unlink()
    with pytest.raises(UserError, match="shard .* is missing"):
        check(*good)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, sentence", [(["--rat-pattern", "d16x"], "unknown attention pattern"), (["--eval-iters", "9999"], "use --eval-iters")]
)
def test_the_program_ends_with_exit_code_2_and_no_trace(tiny_data, tmp_path, flags, sentence):
    save = tmp_path / "run"
    result = pretrain(*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data, "--save", save, *flags, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: ") and sentence in last
    assert "Traceback" not in result.stderr + result.stdout and not save.exists()


def test_report_puts_runs_side_by_side(tmp_path):
    def run(name, pattern, **losses):
        content = {"pattern": pattern, "patterns": losses, "tokens_per_second": 5.0, "iteration": 7}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(content))

    run("base", "dense", dense=2.0, d16=2.5)
    run("adapted", "d16", dense=2.2, d16=2.1)
    run("plain", "dense", dense=2.1, d16=4.0)
    flags = ["--pretrained", tmp_path / "base", "--adapted", tmp_path / "adapted", "--baseline", tmp_path / "plain"]
    command = [sys.executable, "-m", "rat_megatron.cli.main", "report"]
    result = subprocess.run([*command, tmp_path / "out", *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["patterns"] == {"dense": {"pretrained": 2.0}, "d16": {"pretrained": 2.5, "adapted": 2.1}}
    assert report["baseline"] == {"dense": {"pretrained": 2.1}, "d16": {"pretrained": 4.0}} and report["tokens_per_second"] == 5.0
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000 and "2.100" in result.stdout
    missing = subprocess.run([*command, tmp_path / "out", "--pretrained", tmp_path / "none"], capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "report.json does not exist" in missing.stderr
