"""Batches that grow during a run or differ after a resumption: the same samples, losses and end as in one run with that schedule."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rat_megatron.errors import UserError
from rat_megatron.training.arguments.batch_size import iterations_between
from tests.helpers import MODEL_FLAGS, SEQ_LENGTH, TRAIN_FLAGS, pretrain_here, tensorboard_scalars

pytestmark = pytest.mark.slow

START = TRAIN_FLAGS.index("--global-batch-size")
FLAGS = [*MODEL_FLAGS, *TRAIN_FLAGS[:START], *TRAIN_FLAGS[START + 2 :], "--rat-arl-pattern", "d8", "--train-samples", 48]
RAMP = ["--rampup-batch-size", 4, 4, 16, "--global-batch-size", 8]  # four iterations of 4 samples, four of 8
LOGGED = ("lm loss", "lm loss d8", "grad-norm", "grad norm d8", "learning-rate", "batch-size", "lm loss validation")


def train(folder: Path, data: Path, *flags, without=()) -> dict[str, dict[int, float]]:
    """Runs, or goes on, in this folder; returns what it has logged so far."""
    common = ["--data-path", data, "--save", folder / "checkpoints", "--tensorboard-dir", folder / "tensorboard", "--eval-interval", 8]
    pretrain_here(*FLAGS, *common, *flags, without=without)
    return tensorboard_scalars(folder / "tensorboard")


@pytest.fixture(scope="module")
def ramp(tmp_path_factory, tiny_data):
    """Folder of an uninterrupted run, and what it logged."""
    folder = tmp_path_factory.mktemp("ramp")
    return folder, train(folder, tiny_data, *RAMP)


def test_a_ramp_trains_the_batches_that_it_says(ramp):
    folder, logged = ramp
    assert list(logged["batch-size"].values()) == [4, 4, 4, 4, 8, 8, 8, 8]
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert (folder / "checkpoints" / "iter_0000004").is_dir(), "Megatron saves where the batch changes"
    report = json.loads((folder / "checkpoints" / "report.json").read_text())
    assert report["consumed_samples"] == 48 and report["tokens_per_second"] > 0


def test_a_run_whose_batch_is_another_after_a_resumption_is_one_that_ramps_there(ramp, tiny_data, tmp_path):
    train(tmp_path, tiny_data, "--global-batch-size", 4, "--exit-interval", 4)
    resumed = train(tmp_path, tiny_data, "--global-batch-size", 8)
    for name in LOGGED:
        assert resumed[name] == ramp[1][name], name


def test_a_ramp_that_is_interrupted_goes_on_in_it(ramp, tiny_data, tmp_path):
    schedule = ["--step-batch-size-schedule", f"0:4 {16 * SEQ_LENGTH}:8"]  # the same, in Megatron's present form
    for last in (2, 5):
        train(tmp_path, tiny_data, *schedule, "--exit-interval", last)
    resumed = train(tmp_path, tiny_data, *schedule)
    for name in LOGGED:
        assert resumed[name] == ramp[1][name], name


def test_without_the_count_of_iterations_a_run_of_another_batch_ends_too_early(tiny_data, tmp_path):
    flags = ["--eval-iters", 0, "--rat-arl-pattern", "none"]
    train(tmp_path, tiny_data, *flags, "--global-batch-size", 4, "--exit-interval", 6)
    logged = train(tmp_path, tiny_data, *flags, "--global-batch-size", 8, without=("update_train_iters",))
    assert max(logged["lm loss"]) == 6
    assert max(train(tmp_path, tiny_data, *flags, "--global-batch-size", 8)["lm loss"]) == 9, "24 samples in fours, 24 in eights"


@pytest.mark.parametrize(
    ("consumed", "samples", "steps", "count"),
    [
        (0, 48, [(0, 8)], 6),
        (0, 47, [(0, 8)], 5),
        (40, 39, [(0, 8)], 0),
        (0, 48, [(0, 4), (16, 8)], 8),
        (0, 47, [(0, 4), (16, 8)], 8),  # a schedule's last batch is whole
        (0, 48, [(0, 4), (14, 8)], 8),  # the batch that begins at 12 still has 4
        (20, 48, [(0, 4), (16, 8), (30, 10)], 4),  # 28, 36, 46, 56
        (0, 10, [(0, 4), (16, 8)], 3),
    ],
)
def test_iterations_are_counted_as_megatron_counts(consumed, samples, steps, count):
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    assert iterations_between(consumed, samples, steps) == count
    if len(steps) > 1:
        calculator = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, " ".join(f"{at}:{size}" for at, size in steps))
        while consumed < samples:
            calculator.update(consumed, consistency_check=True)
            consumed, count = consumed + calculator.get_current_global_batch_size(), count - 1
        assert count == 0


# ---- what the user gives -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def check(monkeypatch, tiny_data):
    """check(flags...) checks the command line of a run; returns what follows from it."""
    from rat_megatron.platform.cpu import use_cpu_if_no_cuda

    use_cpu_if_no_cuda()

    def run(*flags) -> dict:
        from rat_megatron.training.arguments import read_command_line
        from rat_megatron.training.arguments.checks import check_and_derive

        words = ["pretrain_rat.py", *MODEL_FLAGS, *TRAIN_FLAGS[:START], *TRAIN_FLAGS[START + 2 :], "--data-path", tiny_data, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        return check_and_derive(read_command_line())

    return run


BAD = {
    "iterations": (["--train-iters", 5, *RAMP], "--rampup-batch-size counts samples: give --train-samples in place of --train-iters"),
    "both lengths": (["--train-iters", 5, "--train-samples", 48], "--train-iters and --train-samples both say how long"),
    "no end": (["--rampup-batch-size", 2, 2, 16], "needs the batch size to arrive at: give --global-batch-size"),
    "nothing": ([*RAMP, "--rampup-batch-size", 0, 2, 16], "START, INCREMENT and SAMPLES must be above 0"),
    "no ramp": ([*RAMP, "--rampup-batch-size", 8, 2, 16], "does not arrive at --global-batch-size 8"),
    "past the end": ([*RAMP, "--rampup-batch-size", 2, 4, 16], "does not arrive at --global-batch-size 8"),
    "too steep": ([*RAMP, "--rampup-batch-size", 2, 2, 2], "has 3 increments: give as many samples at least"),
    "odd step": ([*RAMP, "--rampup-batch-size", 2, 3, 16], "2 3 16 has batches of 5 samples, which is not a multiple of .* multiple of 2"),
    "two schedules": ([*RAMP, "--step-batch-size-schedule", "0:4"], "are two schedules of one batch"),
    "schedule and batch": (["--step-batch-size-schedule", "0:4", "--global-batch-size", 4], "leave out --global-batch-size"),
    "words": (["--step-batch-size-schedule", "four"], "'four': write TOKENS:BATCH"),
    "late start": (["--step-batch-size-schedule", "1K:4"], "'1K:4': the first batch is one of 0 tokens"),
    "start within the first sample": (["--step-batch-size-schedule", "5:4"], "'5:4': the first batch is one of 0 tokens"),
    "never reached": ([*RAMP, "--rampup-batch-size", 2, 2, 48], "batch of 8 after 48 samples, which --train-samples 48 never reaches"),
    "less than a batch": (["--global-batch-size", 50], "--train-samples 48 is less than one batch of 50"),
    "within a sample": (["--step-batch-size-schedule", "0:4 63:8"], "at least a sample of 64 tokens after"),
    "falling": (["--step-batch-size-schedule", "0:8 1K:4"], "goes from a batch of 8 samples to one of 4"),
    "odd size": (["--step-batch-size-schedule", "0:4 1K:7"], "has batches of 7 samples, which is not a multiple"),
    "decreasing": (["--global-batch-size", 5, "--decrease-batch-size-if-needed"], "--decrease-batch-size-if-needed would train other"),
    "more than there is": (["--global-batch-size", 4000], r"--data-path has \d+ training samples, fewer than a global batch of 4000"),
    "warmup in iterations": (
        ["--lr-warmup-iters", 2],
        "--lr-warmup-iters does not count as --train-samples does: give --lr-warmup-samples",
    ),
    "warmup of all": (["--lr-warmup-samples", 48], "--lr-warmup-samples 48 must be below the 48 samples of the decay"),
}


@pytest.mark.parametrize("flags, sentence", BAD.values(), ids=BAD)
def test_bad_batches_have_their_sentence(check, flags, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        check(*([] if "--train-iters" in flags else ["--train-samples", 48]), *flags)
    assert "\n" not in str(caught.value)


def test_a_schedule_becomes_megatrons_and_only_what_is_to_come_must_fit(check):
    from rat_megatron.training.arguments.batch_size import check_batches

    derived = check("--train-samples", 480, *RAMP, "--rampup-batch-size", 2, 2, 100)
    assert derived["step_batch_size_schedule"] == f"0:2 {34 * SEQ_LENGTH}:4 {67 * SEQ_LENGTH}:6 {100 * SEQ_LENGTH}:8"
    assert derived["global_batch_size"] == 8
    sizes = {"world_size": 4, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    stages = {"num_virtual_stages_per_pipeline_rank": None, "num_layers_per_virtual_pipeline_stage": None}
    args = Namespace(**derived, **sizes, **stages, micro_batch_size=2, seq_length=SEQ_LENGTH, rampup_batch_size=None, train_samples=480)
    check_batches(args, 100)
    with pytest.raises(UserError, match="batches of 6 samples, which is not a multiple of --micro-batch-size 2 times the 4 data-parallel"):
        check_batches(args, 99)


def test_another_batch_needs_a_length_in_samples(check, ramp):
    resumed = ["--load", ramp[0] / "checkpoints", "--ckpt-step", 4]
    for batch in (2, 4, 8):
        assert check(*resumed, "--train-samples", 48, "--global-batch-size", batch)["rat_resumed"] == (4, 16)
    with pytest.raises(UserError, match="16 samples in 4 iterations, not of --global-batch-size 2: .* give --train-samples 48 in place"):
        check(*resumed, "--train-iters", 24, "--global-batch-size", 2)


def test_a_preset_counts_samples_where_its_batch_grows(check):
    from megatron.training.arguments import parse_args

    from rat_megatron.training.arguments.flags import add_rat_args

    tiny = ["--rat-preset", "tiny", "--micro-batch-size", 2]
    assert "step_batch_size_schedule" in check(*tiny, "--rampup-batch-size", 2, 2, 100, "--global-batch-size", 8)
    given = parse_args(add_rat_args)
    assert (given.train_iters, given.train_samples, given.lr_warmup_fraction) == (None, 1200, 0.05)
    check(*tiny, "--train-samples", 100, "--global-batch-size", 8)
