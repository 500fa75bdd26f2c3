"""Which checkpoints stay on the disk: the last K, every N-th, those that other runs start from, and whole ones only."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from rat_megatron.checkpoint import ADAPTED_NAME, TRACKER_NAME
from rat_megatron.checkpoint.hashes import check_hashes, unfinished
from rat_megatron.checkpoint.retention import remove_old
from rat_megatron.training.patches.saving import SECONDS_NAME
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS, pretrain, pretrain_here

FLAGS = [*MODEL_FLAGS, *TRAIN_FLAGS, "--rat-arl-pattern", "none", "--eval-iters", 0]


def names(checkpoint: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoint.glob("iter_*") if path.name[5:].isdigit())


def write(checkpoint: Path, *numbers: int, latest: int) -> None:
    checkpoint.mkdir(exist_ok=True)
    for number in numbers:
        folder = checkpoint / f"iter_{number:07d}"
        folder.mkdir()
        (folder / "metadata.json").write_text("{}")
        (folder / "__0_0.distcp").write_bytes(b"1")
    (checkpoint / TRACKER_NAME).write_text(str(latest))


def test_the_last_and_every_nth_stay(tmp_path):
    write(tmp_path, *range(10, 130, 10), latest=120)
    remove_old(tmp_path, 3, 40)
    assert names(tmp_path) == [40, 80, 100, 110, 120]
    remove_old(tmp_path, 1, None)
    assert names(tmp_path) == [120]
    remove_old(tmp_path, 1, None)
    assert names(tmp_path) == [120] and not list(tmp_path.glob(".iter*"))


def test_what_is_not_this_runs_past_stays(tmp_path):
    write(tmp_path, 10, 20, 30, 40, 50, latest=30)  # 40 and 50: of before it went back to 30
    (tmp_path / "iter_0000010" / ADAPTED_NAME).write_text("/runs/adapted\n")
    unfinished(tmp_path / "iter_0000040").touch()
    write(tmp_path / "iter_0000020.bak", latest=30)
    (tmp_path / "release").mkdir()
    linked = tmp_path / "iter_0000015"
    linked.symlink_to(tmp_path / "iter_0000010")
    remove_old(tmp_path, 1, None)
    assert names(tmp_path) == [10, 15, 30, 40, 50] and (tmp_path / "release").is_dir()


def test_half_of_an_iteration_before_the_latest_goes(tmp_path):
    write(tmp_path, 10, 20, 30, 40, latest=30)
    for number in (20, 40):
        unfinished(tmp_path / f"iter_{number:07d}").touch()
    remove_old(tmp_path, 5, None)
    assert names(tmp_path) == [10, 30, 40] and unfinished(tmp_path / "iter_0000040").exists()
    assert not unfinished(tmp_path / "iter_0000020").exists()


def test_a_removal_that_was_cut_off_is_finished(tmp_path):
    write(tmp_path, 10, 20, latest=20)
    (tmp_path / "iter_0000010").rename(tmp_path / ".iter_0000010.removed")
    (tmp_path / ".iter_0000010.removed" / "metadata.json").unlink()
    remove_old(tmp_path, 2, None)
    assert [path.name for path in sorted(tmp_path.glob("*iter*"))] == ["iter_0000020", TRACKER_NAME]


def threads_are_done() -> None:
    """What is removed at the end of a run, before its process ends."""
    for thread in threading.enumerate():
        if thread.name == "removing checkpoints":
            thread.join()


@pytest.mark.slow
def test_a_run_keeps_few_and_those_that_others_adapt(tiny_data, tmp_path):
    run, adapted = tmp_path / "run", tmp_path / "adapted"
    words = [*FLAGS, "--data-path", tiny_data, "--save-interval", 2, "--lr-decay-iters", 20, "--save", run]
    pretrain_here(*words, "--train-iters", 6, "--rat-keep-checkpoints", 2)
    threads_are_done()
    assert names(run) == [4, 6] and float((run / SECONDS_NAME).read_text()) > 0
    pretrain_here(*FLAGS, "--data-path", tiny_data, "--train-iters", 1, "--pretrained-checkpoint", run, "--ckpt-step", 4, "--save", adapted)
    assert (run / "iter_0000004" / ADAPTED_NAME).read_text() == f"{adapted.resolve()}\n"
    resume = ["--override-opt-param-scheduler", "--train-iters", 14, "--rat-keep-checkpoints", 1, "--save-retain-interval", 4]
    pretrain(*words, *resume, "--async-save")
    assert names(run) == [4, 8, 12, 14]
    assert not list(run.glob(".iter*"))
    # Back to an iteration before: what was saved after it is written anew, and stays the one that the other run adapts.
    (run / TRACKER_NAME).write_text("4")
    shutil.copytree(run / "iter_0000004", run / "iter_0000002")
    (run / "iter_0000002" / ADAPTED_NAME).unlink()
    (run / TRACKER_NAME).write_text("2")
    pretrain_here(*words, *resume[:1], "--train-iters", 10, "--save-retain-interval", 12)
    threads_are_done()
    assert names(run) == [4, 10, 12, 14] and (run / "iter_0000004" / ADAPTED_NAME).exists()
    check_hashes(run / "iter_0000004")
