"""Checkpoints that are damaged, cut short, poisoned or half-written: what is on the disk is not used, and not lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.hashes import HASHES_NAME, check_hashes, unfinished, write_hashes
from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, latest_iteration
from rat_megatron.convert import convert_to_hf
from rat_megatron.errors import UserError
from tests.helpers import MODEL_FLAGS, REPOSITORY, TRAIN_FLAGS, pretrain, pretrain_command, pretrain_environment

pytestmark = pytest.mark.slow

FLAGS = [*MODEL_FLAGS, *TRAIN_FLAGS, "--rat-arl-pattern", "d8", "--eval-iters", 0, "--save-interval", 2]
FLAGS += ["--override-opt-param-scheduler"]


@pytest.fixture(scope="module")
def saved(tiny_data, tmp_path_factory) -> Path:
    """A run of four iterations with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    result = pretrain(*FLAGS, "--data-path", tiny_data, "--train-iters", 4, "--save", folder)
    assert "rat-megatron: hashed" in result.stdout
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def resume(tiny_data, folder, *flags, check=False):
    return pretrain(*FLAGS, "--data-path", tiny_data, "--train-iters", 6, "--save", folder, *flags, check=check)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "iter_" in str(path) or path.name == TRACKER_NAME}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)


def test_a_checkpoint_has_a_hash_of_every_file_and_is_checked(saved, copy, tiny_data):
    stored = json.loads((saved / "iter_0000004" / HASHES_NAME).read_text())
    assert stored["algorithm"] == "xxh64"
    assert set(stored["files"]) | {HASHES_NAME} == {path.name for path in (saved / "iter_0000004").iterdir()}
    result = resume(tiny_data, copy, check=True)
    assert result.stdout.count("rat-megatron: checked") == 1 and "loading distributed checkpoint" in result.stdout
    assert (copy / TRACKER_NAME).read_text() == "6"


def test_bytes_that_changed_end_the_run_before_it_trains(copy, tiny_data):
    folder = copy / "iter_0000004"
    file = folder / "__0_0.distcp"
    flip(file, file.stat().st_size // 2)
    before = contents(copy)
    result = resume(tiny_data, copy)
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert f"{file} is damaged, its bytes are not those that were written" in line and f"in {copy} is iter_0000002" in line, line
    assert contents(copy) == before
    with pytest.raises(UserError, match="newest whole iteration in .* is iter_0000002"):
        convert_to_hf(copy, copy / "hf")
    assert not (copy / "hf").exists()

    (copy / TRACKER_NAME).write_text("2")  # as the sentence says
    (folder / "__9_0.distcp").write_bytes(b"of another layout")
    (copy / "iter_0000002" / HASHES_NAME).unlink()
    result = resume(tiny_data, copy, check=True)
    assert "written without hashes: its files are not checked" in result.stdout
    assert (copy / TRACKER_NAME).read_text() == "6" and not (folder / "__9_0.distcp").exists()
    check_hashes(folder)  # written anew


# ---- seen before anything starts: the command line is checked in this process --------------------------------------------------------


@pytest.fixture
def derived(monkeypatch, megatron_process, tiny_data):
    """derived(flags...) -> what follows from the command line, once checked."""

    def run(*flags) -> dict:
        from megatron.training.arguments import parse_args

        from rat_megatron.training.arguments.checks import check_and_derive
        from rat_megatron.training.arguments.flags import add_rat_args

        words = ["pretrain_rat.py", *FLAGS, "--train-iters", 6, "--data-path", tiny_data, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        return check_and_derive(parse_args(add_rat_args))

    return run


@pytest.fixture
def refusal(derived):
    """refusal(flags...) -> the sentence with which the command line is refused."""

    def run(*flags) -> str:
        with pytest.raises(UserError) as error:
            derived(*flags)
        return str(error.value)

    return run


@pytest.mark.parametrize("damage", ["cut", "gone", ".metadata", "metadata.json"])
def test_damage_is_named_with_the_newest_whole_iteration(copy, refusal, damage):
    file = copy / "iter_0000004" / (damage if "metadata" in damage else "__0_0.distcp")
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "gone":
        file.unlink()
    else:
        flip(file, file.stat().st_size // 2)
    for flags in (["--save", copy], ["--load", copy], ["--pretrained-checkpoint", copy]):
        sentence = refusal(*flags)
        assert str(file) in sentence and f"the newest whole iteration in {copy} is iter_0000002" in sentence, sentence
        assert f"write 2 into {copy / TRACKER_NAME}" in sentence


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_of_a_checkpoint_without_hashes_is_named(copy, refusal, damage):
    (copy / "iter_0000004" / HASHES_NAME).unlink()
    file = copy / "iter_0000004" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1000) if damage == "cut" else file.unlink()
    for flags in (["--save", copy], ["--load", copy], ["--pretrained-checkpoint", copy]):
        assert f"{file} is {'damaged, it has' if damage == 'cut' else 'missing'}" in refusal(*flags)


@pytest.mark.parametrize("content", ["", "ten", "7", "{", "\0", "-2"])
def test_a_tracker_that_names_nothing_ends_the_run(copy, refusal, content):
    (copy / TRACKER_NAME).write_text(content)
    for flags in (["--save", copy], ["--load", copy, "--save", copy / "new"], ["--pretrained-checkpoint", copy]):
        assert "iter_0000002, iter_0000004" in refusal(*flags)


def test_iterations_without_a_tracker_are_not_overwritten(copy, saved, refusal):
    (copy / TRACKER_NAME).unlink()
    for flags in (
        ["--save", copy],
        ["--load", saved, "--save", copy],
        ["--pretrained-checkpoint", saved, "--save", copy],
        ["--load", copy],
    ):
        assert "iter_0000002, iter_0000004" in refusal(*flags)


def test_an_iteration_that_a_kill_cut_short_is_written_anew(copy, tiny_data):
    """Between Megatron's last file and the tracker, in the first save of a run."""
    (copy / TRACKER_NAME).unlink()
    shutil.rmtree(copy / "iter_0000004")
    unfinished(copy / "iter_0000002").touch()
    resume(tiny_data, copy, check=True)
    assert (copy / TRACKER_NAME).read_text() == "6" and not list(copy.glob(".*unfinished"))


def test_checkpoints_of_another_start_are_not_overwritten(copy, saved, refusal):
    for flags in (["--load", saved], ["--load", saved, "--finetune"]):
        assert f"--save {copy} holds checkpoints already" in refusal(*flags, "--save", copy)


def test_ckpt_step_names_an_iteration_of_the_pretrained_checkpoint(copy, saved, tmp_path, refusal, derived):
    (copy / "iter_0000002" / ".metadata").write_bytes(b"")
    flags = ["--pretrained-checkpoint", copy, "--ckpt-step", 2, "--save"]
    assert "iter_0000002" in refusal(*flags, tmp_path / "new")
    assert derived(*flags, saved)["ckpt_step"] is None


def test_angles_of_rope_may_change_with_a_new_run_only(saved, tmp_path, refusal, derived, capfd):
    changed = "rotary_base 10000 becomes 20000"
    assert f"others than in the checkpoint in {saved} ({changed}): give its flags" in refusal("--save", saved, "--rotary-base", 20000)
    derived("--pretrained-checkpoint", saved, "--save", tmp_path / "new", "--rotary-base", 20000)
    assert f"the weights in {saved} were trained with: {changed}" in capfd.readouterr().out
    derived("--pretrained-checkpoint", saved, "--save", tmp_path / "new")
    assert "angles" not in capfd.readouterr().out


@pytest.mark.parametrize("flag", ["--save", "--load", "--pretrained-checkpoint"])
def test_a_store_is_no_folder_for_checkpoints(refusal, flag):
    assert f"{flag} msc://bucket/run is no folder" in refusal(flag, "msc://bucket/run")


# ---- runs with a fault ---------------------------------------------------------------------------------------------------------------

# Runs pretrain_rat.py with a limit or fault after its second iteration.
FAULTY = """
import sys
sys.path.insert(0, {repository!r})
from rat_megatron import pretrain
import megatron.training.training as training
decide = training.checkpoint_and_decide_exit
def faulty(model, optimizer, scheduler, iteration, *rest):
    if iteration == 4:
        {fault}
    return decide(model, optimizer, scheduler, iteration, *rest)
training.checkpoint_and_decide_exit = faulty
if __name__ == "__main__":  # the process of --async-save imports this file too
    pretrain.main()
"""


def run_faulty(tiny_data, folder, fault: str, *flags) -> subprocess.CompletedProcess:
    program = Path(f"{folder}.py")
    program.write_text(FAULTY.format(repository=str(REPOSITORY), fault=fault))
    words = [*FLAGS, "--data-path", tiny_data, "--train-iters", 6, "--save", folder, *flags]
    command = [sys.executable, *map(str, [program, *words])]
    # Into files, and in a session of its own: a killed run leaves a helper of multiprocessing behind, which would keep pipes open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(command, env=pretrain_environment(), stdout=out, stderr=err, start_new_session=True) as process:
            try:
                code = process.wait(timeout=240)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, code, *(file.seek(0) or file.read() for file in (out, err)))


POISON = "next(model[0].parameters()).data.view(-1)[3] = float('-inf')"


def test_weights_that_are_not_finite_are_not_saved(tiny_data, tmp_path):
    result = run_faulty(tiny_data, tmp_path, POISON)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the weights are not finite after iteration 4" in result.stderr and "still that of iteration 2" in result.stderr
    assert (tmp_path / TRACKER_NAME).read_text() == "2" and not (tmp_path / "iter_0000004").exists()


def test_weights_that_are_not_finite_are_not_trained_on(copy, tiny_data):
    from rat_megatron.checkpoint.torch_dist import StoredTensor, write_torch_dist

    folder = copy / "iter_0000004"
    checkpoint = TorchDistCheckpoint(folder)
    tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
    key = next(key for key in tensors if key.endswith("word_embeddings.weight") and not key.startswith("optimizer"))
    tensors[key][0, 0] = float("nan")
    common = {"args": checkpoint.args(), "iteration": 4, "checkpoint_version": 3.0}
    shutil.rmtree(folder)
    write_torch_dist(
        folder, {key: StoredTensor(value.shape, value.dtype) for key, value in tensors.items()}, lambda key, _: tensors[key], common, {}
    )
    result = resume(tiny_data, copy, "--no-load-optim", "--no-load-rng", "--dist-ckpt-strictness", "ignore_all")
    assert result.returncode == 2 and "are not finite: resume from an iteration before" in result.stderr, result.stderr[-3000:]
    assert (copy / TRACKER_NAME).read_text() == "4" and not (copy / "iter_0000006").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", folder], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["", "async"])
def test_a_full_disk_ends_in_a_sentence(tiny_data, small_disk, flags):
    result = pretrain(*FLAGS, "--data-path", tiny_data, "--train-iters", 20, "--save", small_disk, *flags, check=False)
    assert result.returncode == 1, result.stderr[-3000:]
    line = result.stderr.strip().splitlines()[-1]
    assert "iter_0000004 could not be written" in line and "no space left on device" in line and "still that of iteration 2" in line, line
    assert (small_disk / TRACKER_NAME).read_text() == "2" and [path.name for path in small_disk.glob("iter_*")] == ["iter_0000002"]
    check_hashes(small_disk / "iter_0000002")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two iterations hold the same tensors, the optimizer's too, bit by bit."""
    check_hashes(one)
    one, other = TorchDistCheckpoint(one), TorchDistCheckpoint(other)
    return one.tensors.keys() == other.tensors.keys() and all(torch.equal(one.read(key), other.read(key)) for key in one.tensors)


def test_saves_in_the_background_are_whole(tiny_data, saved, tmp_path):
    pretrain(*FLAGS, "--data-path", tiny_data, "--train-iters", 4, "--save", tmp_path, "--async-save")
    for name in ("iter_0000002", "iter_0000004"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {path.name for path in (saved / name).iterdir()}
        assert same_weights(tmp_path / name, saved / name)


def test_host_memory_is_taken_once_while_training_begins(tiny_data, tmp_path):
    look = "import gc; from rat_megatron.checkpoint.host_copy import HostMemory; from rat_megatron.training.patches import saving"
    look += "; there = [memory.size for memory in gc.get_objects() if isinstance(memory, HostMemory)]"
    look += "; print('as taken:', there == [int(saving._bytes_a_rank(model) * saving._MARGIN)])"  # another would be as large as the copy
    result = run_faulty(tiny_data, tmp_path / "run", look, "--async-save", "--save-interval", 1)
    assert result.returncode == 0 and "as taken: True" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGTERM)", "megatron.training.get_args().exit_duration_in_mins = 1e-9"])
def test_a_signal_and_a_time_limit_wait_for_the_save_in_flight(tiny_data, tmp_path, end):
    folder = tmp_path / "run"
    result = run_faulty(tiny_data, folder, f"import os, signal, megatron.training; {end}", "--async-save", "--exit-signal-handler")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / TRACKER_NAME).read_text() == "4" and not (folder / "finished").exists()
    check_hashes(folder / "iter_0000004")


def test_kills_at_random_moments_of_saves_lose_nothing(tiny_data, tmp_path):
    """Killed three times while one save follows another, a run ends with the weights of one that was left alone."""
    words = [*FLAGS, "--data-path", tiny_data, "--train-iters", 24, "--save-interval", 1]
    killed, latest = tmp_path / "killed", 0
    for _ in range(3):
        with (tmp_path / "log").open("a") as log, subprocess.Popen(
            pretrain_command(*words, "--save", killed, "--async-save"), env=pretrain_environment(), stdout=log, stderr=log
        ) as process:  # fmt: skip
            while process.poll() is None and int(latest_iteration(killed) or 0) < latest + 2:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.4))
            started = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        assert len(started) > 1 and not psutil.wait_procs(started, timeout=60)[1]  # they would keep its host memory
        latest = int(latest_iteration(killed))
        check_hashes(killed / f"iter_{latest:07d}")
    pretrain(*words, "--save", killed, "--async-save")
    pretrain(*words, "--save", tmp_path / "alone", "--save-interval", 24)
    assert same_weights(killed / "iter_0000024", tmp_path / "alone" / "iter_0000024")


def test_a_writer_that_is_gone_ends_the_run(tiny_data, tmp_path):
    kill = "from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller as caller"
    kill += "; from megatron.training.async_utils import maybe_finalize_async_save as finish; finish(blocking=True)"
    kill += "; decide(model, optimizer, scheduler, iteration, *rest); caller._persistent_process.kill()"  # with iteration 4 in flight
    result = run_faulty(tiny_data, tmp_path, kill, "--async-save")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "the process that writes checkpoints has ended (exit code -9)" in result.stderr and "still that of iteration 2" in result.stderr
    assert (tmp_path / TRACKER_NAME).read_text() == "2"


def test_hashes_in_one_process(tmp_path):
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(torch.randint(256, (100_000,), dtype=torch.uint8).numpy().tobytes())
    (folder / "__3_1.distcp").write_bytes(b"")
    write_hashes(folder)
    check_hashes(folder)
    flip(folder / "__0_0.distcp", 77_777)
    with pytest.raises(UserError, match="__0_0.distcp is damaged, its bytes.*no other iteration in .* is known to be whole"):
        check_hashes(folder)
    (folder / HASHES_NAME).write_text("[]")
    with pytest.raises(UserError, match="hashes.json cannot be read"):
        check_hashes(folder)
