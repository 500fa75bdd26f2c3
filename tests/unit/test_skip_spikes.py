"""--rat-skip-spikes: an iteration that is left out changes no weights and no state, and the run goes on as if it had never been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.training.global_vars import get_args

from benchmarks.megatron_runs import leave_groups, run_program
from rat_megatron.checkpoint.torch_dist import TRACKER_NAME, TorchDistCheckpoint, find_iteration
from rat_megatron.training.loop import forward_step
from rat_megatron.training.monitoring import loss_spikes
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS, tensorboard_scalars

pytestmark = pytest.mark.slow

POISONED = 12  # iteration
RUN = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 15, "--lr-warmup-iters", 2, "--eval-iters", 0, "--save-interval", 1]
SKIP = ["--rat-skip-spikes", 30]
ARL = ["--rat-arl-pattern", "d8"]
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.fixture
def run(tiny_data, monkeypatch):
    """run(folder, flags, poison) trains in this process; poison(output) takes the place of a step's losses [b, s] where it is not None."""
    monkeypatch.setattr(loss_spikes, "_WARM_UP", 8)  # a run of a few seconds, and so more deviations below
    torch.set_num_threads(1)
    loss_func = forward_step.loss_func

    def run(folder: Path, *flags, poison=lambda name, output: output, iterations=(POISONED,)) -> None:
        def poisoned(loss_mask, sample_ids, name, output):
            if get_args().curr_iteration + 1 in iterations:
                output = poison(name, output)
            return loss_func(loss_mask, sample_ids, name, output)

        words = [*RUN, "--data-path", tiny_data, "--save", folder, *flags]
        monkeypatch.setattr(forward_step, "loss_func", poisoned)
        try:
            with run_program(list(map(str, words))) as main:
                main()
        finally:
            leave_groups()

    return run


def state(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of one iteration."""
    checkpoint = TorchDistCheckpoint(find_iteration(folder, iteration))
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def assert_same(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> None:
    assert there.keys() == here.keys() and any(key.startswith("optimizer.") for key in there)
    assert not [key for key in there if not torch.equal(there[key], here[key])]


def large(of: str):
    return lambda name, output: 5 * output if name == of else output


def steep(name, output):
    """The loss as it is, with a hundred times its gradient."""
    return output + 100 * (output - output.detach())


def not_a_number(name, output):
    return output * float("nan")


@pytest.mark.parametrize(
    ("flags", "poison", "far"),
    [
        (ARL, large("lm loss"), "lm loss"),
        ([*ARL, "--bf16", *OVERLAP], large("lm loss d8"), "lm loss d8"),
        ([*ARL, *OVERLAP, "--hidden-dropout", 0.1], not_a_number, "lm loss"),
        (["--rat-arl-pattern", "none", "--bf16"], steep, "grad norm"),
    ],
    ids=["fp32", "bf16 overlapped", "NaN and dropout", "gradient of bf16"],
)
def test_what_is_left_out_has_never_been(run, tmp_path, capfd, flags, poison, far):
    skipping, expected, resumed = tmp_path / "skipping", tmp_path / "expected", tmp_path / "resumed"
    run(skipping, *flags, *SKIP, "--tensorboard-dir", tmp_path / "tensorboard", poison=poison)
    log = capfd.readouterr().out
    assert log.count("is left out") == 1 and f"rat-megatron: iteration {POISONED} is left out: its {far} is" in log
    assert log.count("number of skipped iterations:   1 |") == 1
    assert_same(state(skipping, POISONED - 1), state(skipping, POISONED))
    note = json.loads((skipping / "suspicious_samples" / f"iteration-{POISONED:07d}-skipped-{far.replace(' ', '-')}.json").read_text())
    assert note["reason"] == f"skipped of {far}" and len(note["sample_ids"]) == 4
    scalars = tensorboard_scalars(tmp_path / "tensorboard")
    assert scalars["skipped-train-samples"] == {iteration: 4.0 for iteration in range(POISONED, 16)}

    run(expected, *flags, "--iterations-to-skip", POISONED)  # Megatron's way, for who knows it beforehand
    assert_same(state(expected, 15), state(skipping, 15))

    if OVERLAP[0] not in flags or "--bf16" not in flags:
        return  # once is enough
    resumed.mkdir()
    shutil.copytree(skipping / "iter_0000010", resumed / "iter_0000010")
    (resumed / TRACKER_NAME).write_text("10")
    run(resumed, *flags, *SKIP, poison=poison)  # its statistics would be too few, were they not in the checkpoint
    assert_same(state(expected, 15), state(resumed, 15))
    assert TorchDistCheckpoint(find_iteration(resumed)).args().rat_spikes == TorchDistCheckpoint(find_iteration(skipping)).args().rat_spikes


def test_ten_in_a_row_end_the_run(run, tmp_path, capfd):
    flags = [*ARL, *SKIP, "--train-iters", 30]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *flags, poison=large("lm loss"), iterations=range(11, 30))
    assert ended.value.code == 1
    assert "error: the last 10 iterations, up to 20, were left out by --rat-skip-spikes: look at their samples" in capfd.readouterr().err
    assert_same(state(tmp_path, 10), state(tmp_path, 19))


def test_the_first_iteration_cannot_be_left_out(run, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *ARL, *SKIP, poison=not_a_number, iterations=(1,))
    assert ended.value.code == 1 and not list(tmp_path.glob("iter_*"))
    assert "error: iteration 1 has a lm loss of nan and cannot be left out" in capfd.readouterr().err
