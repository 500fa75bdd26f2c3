"""A NaN and a jump of the loss leave the samples they came from beside the checkpoints; a run without progress shows its stacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from rat_megatron.training.loop.arl import StepIterator
from rat_megatron.training.monitoring import loss_spikes
from rat_megatron.training.monitoring.loss_spikes import _Track
from tests.helpers import MODEL_FLAGS, REPOSITORY, TRAIN_FLAGS, pretrain_environment

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


def test_a_nan_ends_the_run_and_names_its_samples(tiny_data, tmp_path):
    # Two microbatches of two samples in each of two steps an iteration: the 14th is the second one of the dense step of iteration 4.
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


def test_a_run_without_progress_shows_its_stacks_and_ends(tiny_data, tmp_path):
    result = run_faulty(tiny_data, tmp_path, 5, "time.sleep(1000)", "--train-iters", 3, "--rat-hang-timeout-in-mins", "0.05")
    assert result.returncode == 1
    assert "most recent call first" in result.stderr and "in faulty" in result.stderr and "no progress for 0.05 minutes" in result.stderr


@pytest.mark.parametrize("name", ["lm loss", "lm loss d64", "grad norm d64", "grad norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_under_a_cuda_graph_what_is_not_finite_ends_the_run(megatron_process, name, value, tmp_path, monkeypatch):
    options = Namespace(curr_iteration=6, save=str(tmp_path), data_path=["data"], cuda_graph_impl="full_iteration")
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
    track = _Track()
    values = [5.0 - 0.002 * n + noise * generator.gauss(0, 1) for n in range(1000)]
    assert all(track.jumped_from(value) is None for value in values)
    assert track.jumped_from(float("nan")) is None
    assert track.jumped_from(values[-1] + 1.0) is not None and track.jumped_from(values[-1] + 1.0) is not None
