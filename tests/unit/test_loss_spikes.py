"""A NaN and a jump of the loss leave the samples they came from beside the checkpoints; a run without progress shows its stacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from rat_megatron.checkpoint.torch_dist import TRACKER_NAME, TorchDistCheckpoint, find_iteration
from rat_megatron.training.loop.arl import StepIterator
from rat_megatron.training.monitoring import loss_spikes
from rat_megatron.training.monitoring.loss_spikes import Track
from tests.helpers import MODEL_FLAGS, REPOSITORY, TRAIN_FLAGS, pretrain_environment, tensorboard_scalars

pytestmark = pytest.mark.slow

# Runs pretrain_rat.py with something wrong in the model's output from a given microbatch on.
FAULTY = """
import sys, time
sys.path.insert(0, {repository!r})
from rat_megatron import pretrain
from rat_megatron.training.loop import forward_step
count = 0
loss_func = forward_step.loss_func
def faulty(loss_mask, sample_ids, name, output):
    global count
    count += sample_ids is not None
    if count >= {microbatch}:
        pass
        {fault}
    return loss_func(loss_mask, sample_ids, name, output)
forward_step.loss_func = faulty
pretrain.main()
"""

NO_EVALUATION = ["--eval-interval", 1000]


def run_faulty(tiny_data, folder, microbatch: int, fault: str, *flags) -> subprocess.CompletedProcess:
    program = FAULTY.format(repository=str(REPOSITORY), microbatch=microbatch, fault=fault)
    words = [*MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--rat-arl-pattern", "d8", "--save", folder, *flags]
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, env=pretrain_environment(), capture_output=True, text=True, timeout=240)


def _state(checkpoints, iteration: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of one iteration."""
    checkpoint = TorchDistCheckpoint(find_iteration(checkpoints, iteration))
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


# Two microbatches of two samples in each of two steps an iteration: in iteration 4, 13 and 14 are sparse, 15 and 16 dense.
@pytest.mark.parametrize("microbatch, interval, saved", [(13, 1, 3), (14, 2, 3), (15, 1, 3), (16, 2, 2)])
def test_a_nan_in_either_step_leaves_a_whole_iteration_from_which_the_run_goes_on(
    arl_start, tiny_data, tmp_path, microbatch, interval, saved
):
    flags = ["--train-iters", 6, "--lr-warmup-iters", 2, "--eval-iters", 0, "--save-interval", interval]
    flags += ["--tensorboard-dir", tmp_path / "tensorboard"]
    result = run_faulty(tiny_data, tmp_path, microbatch, "output = output * float('nan')", *flags)
    assert result.returncode == 16, result.stderr[-3000:]  # Megatron's exit code of a result that is the same when computed again
    assert f"(exit code 16); on the disk is iteration {saved}, whole" in result.stdout and "--iterations-to-skip 4" in result.stdout
    assert (tmp_path / TRACKER_NAME).read_text() == str(saved) and not (tmp_path / "iter_0000004").exists()
    expected, found = _state(arl_start, saved), _state(tmp_path, saved)
    assert any(key.startswith("optimizer.") for key in expected) and expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key

    resumed = run_faulty(tiny_data, tmp_path, 10**9, "", *flags)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, found = tensorboard_scalars(arl_start / "tensorboard"), tensorboard_scalars(tmp_path / "tensorboard")
    for name in ("lm loss", "lm loss d8"):
        assert {step: found[name][step] for step in range(1, 7)} == {step: expected[name][step] for step in range(1, 7)}, name


@pytest.fixture(scope="module")
def arl_start(tiny_data, tmp_path_factory):
    """The same run without a fault, with a checkpoint of every iteration."""
    folder = tmp_path_factory.mktemp("without_fault")
    flags = [
        "--train-iters",
        6,
        "--lr-warmup-iters",
        2,
        "--eval-iters",
        0,
        "--save-interval",
        1,
        "--tensorboard-dir",
        folder / "tensorboard",
    ]
    result = run_faulty(tiny_data, folder, 10**9, "", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_a_nan_in_the_first_iteration_saves_nothing(tiny_data, tmp_path):
    result = run_faulty(
        tiny_data, tmp_path, 2, "output = output * float('nan')", "--train-iters", 2, "--save-interval", 1, "--eval-iters", 0
    )
    assert result.returncode == 16 and "on the disk is no checkpoint" in result.stdout, result.stderr[-3000:]
    assert not list(tmp_path.glob("iter_*")) and [path.name for path in (tmp_path / "suspicious_samples").iterdir()]


def test_samples_are_not_blamed_for_weights_that_are_not_finite(tiny_data, tmp_path):
    fault = (
        "from megatron.training.global_vars import get_args; import gc\n        "
        "[p.data.fill_(float('nan')) for m in gc.get_objects() if type(m).__name__ == 'GPTModel' for p in m.parameters()]\n        "
        "output = output * float('nan')"
    )
    result = run_faulty(tiny_data, tmp_path, 13, fault, "--train-iters", 8, "--save-interval", 2, "--eval-iters", 0)
    assert result.returncode == 16, result.stderr[-3000:]
    assert "The weights themselves are not finite" in result.stdout and not list((tmp_path / "suspicious_samples").iterdir())
    assert (tmp_path / TRACKER_NAME).read_text() == "2" and not (tmp_path / "iter_0000003").exists()


def test_a_nan_ends_the_run_and_names_its_samples(tiny_data, tmp_path):
    result = run_faulty(tiny_data, tmp_path, 14, "output = output * float('nan')", "--train-iters", 8)
    assert result.returncode in (16, 17), result.stderr[-3000:]  # Megatron's exit codes of a result that failed validation
    notes = sorted((tmp_path / "suspicious_samples").glob("*nan*.json"))
    assert [path.name for path in notes] == ["iteration-0000004-nan-rank00000.json"]
    note = json.loads(notes[0].read_text())
    assert note["iteration"] == 4 and note["split"] == "train" and len(note["sample_ids"]) == 2 and note["data_path"] == [str(tiny_data)]


def test_a_jump_is_logged_with_the_samples_of_its_batch(tiny_data, tmp_path):
    result = run_faulty(
        tiny_data, tmp_path, 4 * 59 + 1, "output = output * 3 if count <= 4 * 60 else output", "--train-iters", 62, *NO_EVALUATION
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"lm loss jumped from [\d.]+ to [\d.]+ at iteration 60\n", result.stdout)
    note = json.loads((tmp_path / "suspicious_samples" / "iteration-0000060-jump-lm-loss.json").read_text())
    assert note["loss"] > 2 * note["running_mean"] and len(note["sample_ids"]) == 4
    assert not list((tmp_path / "suspicious_samples").glob("*0000061*"))


def test_a_jump_to_infinity_is_one(tiny_data, tmp_path):
    """Where Megatron does not look, the run goes on, and its note says what the loss was; the weights that come of it are not saved."""
    fault = f"output = output / (loss_mask == 0) if count == {4 * 51 + 4} else output"
    flags = ["--train-iters", 53, "--no-check-for-nan-in-loss-and-grad", *NO_EVALUATION]
    result = run_faulty(tiny_data, tmp_path, 4 * 51 + 4, fault, *flags)
    assert result.returncode == 1, result.stderr[-3000:]
    assert "the weights are not finite after iteration 53, which is therefore not saved" in result.stderr
    assert re.search(r"lm loss jumped from [\d.]+ to inf at iteration 52\n", result.stdout)
    note = json.loads((tmp_path / "suspicious_samples" / "iteration-0000052-jump-lm-loss.json").read_text())
    assert note["loss"] == "inf" and note["running_mean"] > 1 and len(note["sample_ids"]) == 4


@pytest.mark.parametrize("value, fault", [("nan", "output * float('nan')"), ("inf", "output / (loss_mask == 0)")])
def test_a_validation_loss_that_is_not_finite_ends_no_run(tiny_data, tmp_path, value, fault):
    fault = f"output = output if output.requires_grad else {fault}"
    result = run_faulty(tiny_data, tmp_path, 0, fault, "--train-iters", 2, "--eval-interval", 1, "--rat-eval-patterns", "dense", "d8")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
    for pattern in ("dense", "d8"):
        assert f"rat-megatron: the validation loss under {pattern} is {value} at iteration 1\n" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["patterns"] == {"dense": None, "d8": None} and report["iteration"] == 2
    notes = [json.loads(path.read_text()) for path in (tmp_path / "suspicious_samples").glob("*")]
    assert {note["split"] for note in notes} == ({"val"} if value == "nan" else set())


@pytest.mark.parametrize("times, verdict", [("always", "is reproducible within the tolerance"), ("once", "Possible transient error")])
def test_check_for_spiky_loss_tells_a_fault_of_the_device_from_one_of_the_data(tiny_data, tmp_path, times, verdict):
    """It looks from the hundredth microbatch of each step on; a spike that comes again when computed again is no fault of the device."""
    first = 4 * 51 + 3  # of the dense step of iteration 52
    fault = "output = output * 100" if times == "always" else f"output = output * 100 if count == {first} else output"
    result = run_faulty(tiny_data, tmp_path, first, fault, "--train-iters", 52, "--check-for-spiky-loss", *NO_EVALUATION)
    assert result.returncode == 0, result.stderr[-3000:]
    log = result.stdout + result.stderr
    assert "message='Spiky loss'" in log and verdict in log
    assert ("Possible transient error" in log) == (times == "once")


def test_a_run_without_progress_shows_its_stacks_and_ends(tiny_data, tmp_path):
    result = run_faulty(tiny_data, tmp_path, 5, "time.sleep(1000)", "--train-iters", 3, "--rat-hang-timeout-in-mins", "0.05")
    assert result.returncode == 1
    assert "most recent call first" in result.stderr and "in faulty" in result.stderr and "no progress for 0.05 minutes" in result.stderr


@pytest.mark.parametrize("name", ["lm loss", "lm loss d64", "grad norm d64", "grad norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_under_a_cuda_graph_what_is_not_finite_ends_the_run(megatron_process, name, value, tmp_path, monkeypatch):
    options = Namespace(curr_iteration=6, save=str(tmp_path), data_path=["data"], cuda_graph_impl="full_iteration", rat_skip_spikes=None)
    monkeypatch.setattr(loss_spikes, "get_args", lambda: options)
    values = {"lm loss": 2.0, "lm loss d64": 2.1, "grad norm d64": 0.5, "grad norm": 0.4}
    source = StepIterator(iter([{"sample_ids": torch.tensor([7, 3])}]))
    source.load(1)

    def train_step(*_):
        *losses, (_, norm) = values.items()
        return {key: torch.tensor(number) for key, number in losses}, 0, False, False, None, norm, None, 0

    step = loss_spikes.noting_spikes(train_step)
    step(None, source)
    values[name] = value
    with pytest.raises(RuntimeError, match=f"found {value} in {name} of iteration 7: see suspicious_samples/"):
        step(None, source)
    note = json.loads((tmp_path / f"suspicious_samples/iteration-0000007-nan-{name.replace(' ', '-')}.json").read_text())
    assert note["sample_ids"] == [3, 7] and note["reason"] == f"nan of {name}"
    options.cuda_graph_impl = "none"  # there Megatron has checked every microbatch
    step(None, source)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_falling_noisy_loss_does_not_jump(noise):
    import random

    generator = random.Random(3)
    track = Track()
    values = [5.0 - 0.002 * n + noise * generator.gauss(0, 1) for n in range(1000)]
    assert all(track.jumped_from(value) is None for value in values)
    assert track.jumped_from(float("nan")) is None
    assert track.jumped_from(values[-1] + 1.0) is not None and track.jumped_from(values[-1] + 1.0) is not None


def test_infinity_hides_no_later_jump():
    track = Track()
    for value in (float("inf"), float("nan"), *[2.0 + index % 2 / 100 for index in range(60)]):
        assert track.jumped_from(value) is None  # while there is nothing to compare with
    assert track.jumped_from(float("inf")) == pytest.approx(2.0, abs=0.02)
    assert track.jumped_from(-float("inf")) is None
    assert track.jumped_from(9.0) == pytest.approx(2.0, abs=0.02)
