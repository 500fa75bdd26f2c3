"""Faults of local data and of the loader's processes: a damaged shard never trains, and every end is one sentence in bounded time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from rat_megatron.data.loader.batches import validation_batches
from rat_megatron.data.loader.shared_memory import claiming_shared_memory
from rat_megatron.data.loader.streams import Stream, check_streams
from rat_megatron.errors import UserError
from tests.helpers import MODEL_FLAGS, REPOSITORY, TRAIN_FLAGS, pretrain_environment
from tests.streaming_data import EOD, GLOBAL_BATCH, T, batches_of, ids_of, write_data

pytestmark = pytest.mark.slow

EPOCH = 41 * GLOBAL_BATCH // 2  # microbatches: an epoch needs every shard


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("written") / "data", train=1000, val=50)


@pytest.fixture
def data(written, tmp_path):
    """A data set to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-9] ^= 16
    shard.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_flipped_bit_in_a_local_shard_never_trains(data, workers):
    shard = data / "train" / "shard.00002.mds"
    flip_a_bit(shard)
    check_streams([Stream(str(data))], seq_length=T)  # nothing to be seen before a shard is read
    seen = []
    with pytest.raises(UserError, match=rf"^shard {shard} is damaged \(xxh64 \w+ instead of \w+\): copy or prepare the data anew\.$"):
        for batch in islice(batches_of(str(data), num_workers=workers), EPOCH):
            seen.extend(batch["tokens"][:, 0].tolist())
    per_shard = (shard.stat().st_size - 8) // 16 + 1
    assert not [number for number in seen if 2 * per_shard <= number < 3 * per_shard - 3]


def test_validation_notices_a_flipped_bit_too(data):
    shard = data / "val" / "shard.00000.mds"
    flip_a_bit(shard)
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "seq_length": T, "eod_id": EOD, "num_samples": 20, "num_workers": 1}
    with pytest.raises(UserError, match=f"^shard {shard} is damaged"):
        ids_of(validation_batches([Stream(str(data))], **settings))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault, problem", [("missing", "is missing: copy or"), ("truncated", r"has \d+ bytes instead of \d+: copy or")])
def test_a_shard_that_vanishes_or_shrinks_after_the_start_is_named(data, workers, fault, problem):
    batches = batches_of(str(data), num_workers=workers)
    shard = data / "train" / "shard.00003.mds"
    if fault == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(UserError, match=f"^shard {shard} {problem} prepare the data anew.$"):
        ids_of(islice(batches, EPOCH))


def test_each_shard_is_compared_with_its_hash_once(data, monkeypatch):
    from rat_megatron.data.loader import checked_dataset

    compared = []
    monkeypatch.setattr(checked_dataset, "damage", lambda path, info: compared.append(path.name))
    ids_of(islice(batches_of(str(data)), 2 * EPOCH))
    assert sorted(compared) == sorted(path.name for path in (data / "train").glob("*.mds"))


def test_a_dead_worker_ends_the_run_with_the_remedy(written):
    batches = batches_of(written, num_workers=2)
    next(batches)
    victim = multiprocessing.active_children()[0]
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"^a process that reads the data has died \(.*pid.*\).*: lower --num-workers or ask for more memory"
    ):
        os.kill(victim.pid, signal.SIGKILL)
        ids_of(islice(batches, 3 * EPOCH))
    assert time.monotonic() - started < 20
    assert len(ids_of(islice(batches_of(written, num_workers=1), 10))) == 20, "and the next loader in this process works"


def test_two_ranks_of_a_run_end_with_the_sentence(tiny_data, tmp_path):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    shard = data / "train" / "shard.00000.mds"
    flip_a_bit(shard)
    flags = [*MODEL_FLAGS, *TRAIN_FLAGS, "--num-workers", "1", "--data-path", data, "--train-iters", "3", "--eval-iters", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", REPOSITORY / "pretrain_rat.py"]
    result = subprocess.run(
        list(map(str, [*command, *flags])), env=pretrain_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    own = result.stderr.split("torch/distributed/elastic")[0]  # what the launcher itself says comes after
    assert f"error: shard {shard} is damaged" in own and "Traceback" not in own, result.stderr[-3000:]
    assert "exitcode  : 2 " in result.stderr


def test_a_block_that_another_rank_is_just_creating_is_waited_for():
    from streaming.base.shared import SharedMemory

    path = Path("/dev/shm") / f"rat_megatron_test_{os.getpid()}"
    path.touch()  # as it is between its creation and its size
    resized = threading.Timer(0.5, os.truncate, (path, 64))
    try:
        with pytest.raises(ValueError, match="empty file"):
            SharedMemory(name=path.name, size=64, auto_cleanup=False)  # if this no longer fails, Streaming waits by itself
        resized.start()
        with claiming_shared_memory():
            block = SharedMemory(name=path.name, size=64, auto_cleanup=False)
        assert len(block.buf) >= 64
        block.shm.close()
    finally:
        resized.join()
        path.unlink()
