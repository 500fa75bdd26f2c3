"""Runs that end elsewhere than their checkpoint's run would have: trained longer, or with a decay of their own from its stable phase."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rat_megatron.checkpoint import ADAPTED_NAME
from rat_megatron.errors import UserError
from tests.helpers import MODEL_FLAGS, REPOSITORY, TRAIN_FLAGS, pretrain_environment, pretrain_here, tensorboard_scalars

pytestmark = pytest.mark.slow

COMMON = [*MODEL_FLAGS, *TRAIN_FLAGS, "--rat-arl-pattern", "d8", "--save-interval", 4, "--eval-iters", 0]
WSD = ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "minus_sqrt", "--lr-warmup-iters", 2]
TRUNK = [*WSD, "--train-iters", 10, "--lr-wsd-decay-iters", 3]  # stable until iteration 7
LOGGED = ("lm loss", "lm loss d8", "grad-norm", "learning-rate")


def train(folder: Path, data: Path, *flags) -> dict[str, dict[int, float]]:
    """Runs, or goes on, in this folder; returns what it has logged so far."""
    save = folder / "checkpoints"
    pretrain_here(*COMMON, "--data-path", data, "--save", save, "--tensorboard-dir", folder / "tensorboard", *flags)
    return tensorboard_scalars(folder / "tensorboard")


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, tiny_data):
    """Folder of a whole WSD run, with checkpoints 4, 8 and 10, and what it logged."""
    folder = tmp_path_factory.mktemp("trunk")
    return folder / "checkpoints", train(folder, tiny_data, *TRUNK)


@pytest.fixture
def stable(trunk, tmp_path):
    """A folder whose checkpoints end in the trunk's stable phase."""
    shutil.copytree(trunk[0] / "iter_0000004", tmp_path / "stable" / "checkpoints" / "iter_0000004")
    (tmp_path / "stable" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    return tmp_path / "stable"


def rates(start: int, decay: int, last: int) -> dict[int, float]:
    """The learning rate after each iteration: warmup of two, stable until `start`, then 1 - sqrt over `decay`."""
    shape = {it: min(it / 2, 1.0) if it <= start else 1 - math.sqrt((it - start) / decay) for it in range(1, last + 1)}
    return {it: 1e-2 * share if it <= 2 else 1e-4 + share * (1e-2 - 1e-4) for it, share in shape.items()}


def test_a_wsd_run_trained_longer_is_one_that_was_as_long_from_the_start(stable, tiny_data, tmp_path):
    longer = [*WSD, "--train-iters", 12, "--lr-wsd-decay-iters", 4]
    whole = train(tmp_path / "whole", tiny_data, *longer)
    resumed = train(stable, tiny_data, *longer)
    for name in LOGGED:
        assert resumed[name] == {iteration: value for iteration, value in whole[name].items() if iteration > 4}, name
    assert whole["learning-rate"] == pytest.approx(rates(8, 4, 12), rel=1e-5)


def test_a_constant_rate_is_trained_longer_with_the_samples_of_more_epochs(tiny_data, tmp_path):
    constant = ["--lr-decay-style", "constant", "--lr-warmup-iters", 1, "--global-batch-size", 260, "--micro-batch-size", 130]
    constant += ["--rat-arl-pattern", "none"]  # 764 samples: the first epoch ends within the third batch
    whole = train(tmp_path / "whole", tiny_data, *constant, "--train-iters", 4)
    train(tmp_path / "run", tiny_data, *constant, "--train-iters", 2)
    resumed = train(tmp_path / "run", tiny_data, *constant, "--train-iters", 4)
    assert resumed["lm loss"] == whole["lm loss"] and resumed["learning-rate"] == whole["learning-rate"]


def test_a_branch_decays_from_the_trunk_and_leaves_it_as_it_is(trunk, tiny_data, tmp_path):
    checkpoints, logged = trunk
    before = files(checkpoints)
    branch = [*WSD, "--load", checkpoints, "--ckpt-step", 4, "--train-iters", 8, "--lr-wsd-decay-iters", 4]
    train(tmp_path, tiny_data, *branch, "--exit-interval", 6)
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "6"
    branched = train(tmp_path, tiny_data, *branch)  # the same command goes on in the branch
    assert list(branched["lm loss"]) == [5, 6, 7, 8]
    for name in ("lm loss", "lm loss d8", "grad-norm"):
        assert branched[name][5] == logged[name][5], name
    assert branched["lm loss d8"][6] == logged["lm loss d8"][6], "the first rate that is another is that of iteration 6"
    assert branched["lm loss"][6] != logged["lm loss"][6]
    assert branched["learning-rate"] == pytest.approx({it: rate for it, rate in rates(4, 4, 8).items() if it > 4}, rel=1e-5)
    marked = files(checkpoints)
    assert marked.pop(checkpoints / "iter_0000004" / ADAPTED_NAME)  # which keeps it from being removed
    assert marked == before
    written = files(tmp_path / "checkpoints")
    train(tmp_path, tiny_data, *branch)
    assert files(tmp_path / "checkpoints").items() >= {path: at for path, at in written.items() if "iter_" in str(path)}.items()


def test_the_example_trains_a_run_and_its_branches_and_goes_on(tiny_data, tmp_path):
    flags = [*COMMON, "--rat-preset", "tiny", "--data-path", tiny_data, "--train-iters", 10, "--lr-warmup-iters", 2]
    script = [REPOSITORY / "examples" / "wsd.sh", tmp_path, "4", *flags, "--lr-wsd-decay-iters", 2, "--lr-decay-style", "WSD"]
    environment = pretrain_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for _ in range(2):
        result = subprocess.run(["bash", *map(str, script)], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
    for name, last in (("trunk", "10"), ("4", "5")):
        assert (tmp_path / name / "latest_checkpointed_iteration.txt").read_text() == last


# ---- what the user gives -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def check(monkeypatch, tiny_data):
    """check(flags...) checks the command line of a run; returns its arguments and what follows from them."""
    from rat_megatron.platform.cpu import use_cpu_if_no_cuda

    use_cpu_if_no_cuda()

    def run(*flags):
        from rat_megatron.training.arguments import read_command_line
        from rat_megatron.training.arguments.checks import check_and_derive

        monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *map(str, [*MODEL_FLAGS, *flags, "--data-path", tiny_data])])
        args = read_command_line()
        return args, check_and_derive(args)

    return run


def test_what_the_trunk_cannot_give_has_its_sentence(check, trunk, tmp_path):
    checkpoints, new = trunk[0], tmp_path / "new"
    cases = [
        (
            ["--load", checkpoints, "--train-iters", 20],
            r"iteration 10 in .* decay of its run, which began after iteration 7: .*\(one of 4\)",
        ),
        (["--load", checkpoints, "--train-iters", 20, "--ckpt-step", 8], "iteration 8 in .* lies in the decay of its run"),
        (
            ["--load", checkpoints, "--ckpt-step", 4, "--train-iters", 6, "--lr-wsd-decay-iters", 4],
            "--lr-wsd-decay-iters 4 is more than the 2 that are left after iteration 4 in .*: give --train-iters 8",
        ),
        (
            ["--save", checkpoints, "--ckpt-step", 4, "--train-iters", 20],
            f"--save {checkpoints} is the run that this one branches from at iteration 4, .* give another folder by --save",
        ),
        (
            ["--load", checkpoints, "--ckpt-step", 4, "--lr-warmup-iters", 0, "--lr-warmup-fraction", "0.2", "--train-iters", 20],
            r"with a warmup in samples of 8, this run asks for 16.0: give the checkpoint's \(--lr-warmup-iters 2\)",
        ),
        (["--load", checkpoints, "--ckpt-step", 4, "--lr", "1e-3"], "was trained with --lr 0.01, this run asks for 0.001"),
        (["--load", checkpoints, "--ckpt-step", 4, "--lr-decay-style", "cosine"], "was trained with --lr-decay-style WSD"),
        (
            ["--load", checkpoints, "--ckpt-step", 4, "--weight-decay-incr-style", "linear", "--start-weight-decay", 0.1]
            + ["--end-weight-decay", 0.1, "--train-iters", 20],
            "was trained with --weight-decay-incr-style constant, this run asks for linear",
        ),
        (["--lr-wsd-decay-iters", 9], "--lr-wsd-decay-iters 9 and a warmup of 2 are more than the run of 10"),
        (["--lr-wsd-decay-samples", 9], "--lr-wsd-decay-samples does not count as --train-iters does: give --lr-wsd-decay-iters"),
    ]
    for flags, sentence in cases:
        with pytest.raises(UserError, match=sentence) as caught:
            check(*COMMON, *TRUNK, *([] if "--save" in flags else ["--save", new]), *flags)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--lr-decay-style WSD decays over the last part of the run: give --lr-wsd-decay-iters"):
        check(*COMMON, *WSD, "--train-iters", 10)
    for flags in ([], ["--override-opt-param-scheduler", "--train-iters", 20], ["--use-checkpoint-opt-param-scheduler", "--lr", "1e-3"]):
        assert "override_opt_param_scheduler" not in check(*COMMON, *TRUNK, "--load", checkpoints, *flags)[1] or not flags
    assert check(*COMMON, *TRUNK, "--load", checkpoints, "--ckpt-step", 4, "--train-iters", 20)[1]["override_opt_param_scheduler"]
    assert not check(*COMMON, *TRUNK, "--load", checkpoints)[1]["override_opt_param_scheduler"]


def test_a_preset_has_what_belongs_to_wsd(check):
    tiny = ["--rat-preset", "tiny", "--seq-length", 64]

    def schedule(*flags):
        args = check(*tiny, *flags)[0]
        return args.lr_wsd_decay_style, args.lr_wsd_decay_iters, args.lr_warmup_iters, args.lr_warmup_fraction

    assert schedule() == ("exponential", None, 0, 0.05)
    assert schedule("--lr-decay-style", "WSD") == ("minus_sqrt", 15, 8, None)
    assert schedule("--lr-decay-style", "WSD", "--train-iters", 300) == ("minus_sqrt", 30, 8, None)
    assert schedule("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", 3, "--lr-wsd-decay-style", "linear") == ("linear", 3, 8, None)
    assert schedule("--lr-decay-style", "WSD", "--lr-warmup-fraction", "0.1") == ("minus_sqrt", 15, 0, 0.1)
    assert schedule("--lr-decay-style", "constant", "--train-iters", 300) == ("exponential", None, 8, None)
    args = check(*tiny, "--lr-decay-style", "WSD", "--train-samples", 8000)[0]
    assert (args.train_iters, args.lr_wsd_decay_samples, args.lr_warmup_samples) == (None, 800, 64)
