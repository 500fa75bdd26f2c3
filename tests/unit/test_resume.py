"""Runs that are killed and started again by the same command."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS, arl_run_flags, pretrain, pretrain_command, pretrain_environment, tensorboard_scalars

pytestmark = pytest.mark.slow


def _tracked(checkpoints: Path) -> int:
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _start_and_kill(flags: list, reached) -> None:
    """Starts a run and kills it with -9 as soon as reached() says so; the run must not end by itself before."""
    process = subprocess.Popen(
        pretrain_command(*flags), env=pretrain_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _all_tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the latest checkpoint."""
    checkpoint = TorchDistCheckpoint(find_iteration(checkpoints))
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def test_a_run_killed_in_a_step_and_in_a_save_ends_as_the_uninterrupted_one(arl_run, one_iteration, tiny_data, tmp_path):
    flags = arl_run_flags(one_iteration, tiny_data, tmp_path)
    checkpoints = tmp_path / "checkpoints"

    _start_and_kill(flags, reached=lambda: _tracked(checkpoints) == 5 and not time.sleep(0.3))  # somewhere after iteration 5
    saved = _tracked(checkpoints)
    assert 5 <= saved < 20

    saving = checkpoints / f"iter_{saved + 5:07d}"
    _start_and_kill(flags, reached=saving.exists)  # while the next checkpoint is written
    assert _tracked(checkpoints) == saved and not (saving / "metadata.json").exists()

    pretrain(*flags)
    assert _tracked(checkpoints) == 20
    expected, resumed = tensorboard_scalars(arl_run / "tensorboard"), tensorboard_scalars(tmp_path / "tensorboard")
    for name in ("lm loss", "lm loss d8", "grad-norm", "grad norm d8", "learning-rate", "lm loss validation", "lm loss d16 validation"):
        assert resumed[name] == expected[name], name
    expected, resumed = _all_tensors(arl_run / "checkpoints"), _all_tensors(checkpoints)
    assert expected.keys() == resumed.keys() and any(key.startswith("optimizer.") for key in expected)
    for key, tensor in expected.items():
        assert torch.equal(resumed[key], tensor), key


def test_a_finished_run_started_again_touches_nothing(one_iteration, tiny_data):
    before = {path: path.stat().st_mtime_ns for path in one_iteration.rglob("iter_*/*")}
    pretrain(*MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--train-iters", 1, "--save", one_iteration, "--save-interval", 2)
    assert {path: path.stat().st_mtime_ns for path in one_iteration.rglob("iter_*/*")} == before
