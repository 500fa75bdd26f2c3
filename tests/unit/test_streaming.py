"""Streaming: the samples are one sequence that depends on data and seed alone, whatever ranks, workers, batches and restarts; bad data is
named before training."""

import inspect
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming.base.world import World

from rat_megatron.data.loader import order, shared_memory, streams
from rat_megatron.data.loader.batches import validation_batches
from rat_megatron.data.loader.checked_dataset import CheckedDataset
from rat_megatron.data.loader.streams import Stream, check_streams, parse_data_path
from rat_megatron.errors import UserError
from tests.streaming_data import EOD, GLOBAL_BATCH, T, batches_of, ids_of, write_data

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")  # torch and Streaming are imported once


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """1000 training samples: an epoch of 41 global batches and 16 samples."""
    return write_data(tmp_path_factory.mktemp("data"), train=1000, val=50)


def run_ranks(ranks: int, function: Callable[[], Any]) -> list[Any]:
    """What `function()` returns on each rank, in processes that believe to be `ranks` ranks of one node."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = FORK.Queue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        if ranks > 1:
            torch.distributed.init_process_group("gloo")
        results.put((rank, function()))
        if ranks > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    processes = [FORK.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        by_rank = dict(results.get(timeout=60) for _ in processes)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()  # pytest would wait at its end for one that still lives
    return [by_rank[rank] for rank in range(ranks)]


def global_batches(
    path, *, ranks: int = 1, dp_ranks: list[int] | None = None, count: int = 3, sizes: list[int] | None = None, micro: int = 2, **changes
) -> list[list[int]]:
    """The first `count` global batches, or those of the `sizes`, sorted. `dp_ranks`: each rank's data-parallel rank; equal ones see
    the same samples."""
    dp_ranks, sizes = dp_ranks or list(range(ranks)), sizes or [GLOBAL_BATCH] * count
    dp = max(dp_ranks) + 1

    def batches_of_rank() -> list[list[int]]:
        iterator = batches_of(path, data_parallel=(dp_ranks[int(os.environ.get("RANK", "0"))], dp), micro_batch_size=micro, **changes)
        return [ids_of(islice(iterator, size // dp // micro)) for size in sizes]

    by_rank = run_ranks(ranks, batches_of_rank)
    leaders = [dp_ranks.index(dp_rank) for dp_rank in range(dp)]
    assert all(by_rank[rank] == by_rank[leaders[dp_rank]] for rank, dp_rank in enumerate(dp_ranks))
    return [sorted(sum((by_rank[leader][step] for leader in leaders), [])) for step in range(len(sizes))]


def cut(sequence: list[int], sizes: list[int], start: int = 0) -> list[list[int]]:
    """The global batches of the `sizes` that the sequence holds from `start` on, sorted."""
    ends = np.cumsum([start, *sizes])
    return [sorted(sequence[first:last]) for first, last in zip(ends[:-1], ends[1:], strict=True)]


@pytest.fixture(scope="module")
def sequence(data):
    """The order of the samples, three epochs of it, from one process without workers that reads one at a time."""
    return ids_of(islice(batches_of(data, micro_batch_size=1, samples_per_read=1), 3000))


@pytest.fixture(scope="module")
def reference(sequence):
    """Global batches of GLOBAL_BATCH."""
    return cut(sequence, [GLOBAL_BATCH] * 124)


def test_every_epoch_takes_each_sample_once_in_another_order(sequence):
    epochs = [sequence[first : first + 1000] for first in (0, 1000, 2000)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1000))
    assert list(range(1000)) not in epochs and len({tuple(epoch) for epoch in epochs}) == 3


LAYOUTS = [
    ([0], 2),
    ([0, 1], 1),
    ([0, 0], 2),
    ([0, 1, 2], 1),  # an epoch is no multiple
    ([0, 1, 2, 3], 0),
    ([0, 0, 1, 1], 1),  # tensor or context parallelism
    ([0, 1, 0, 1], 1),  # two pipeline stages in Megatron's order of ranks
    ([0, 1, 0, 1], 0),
]


@pytest.mark.parametrize("dp_ranks, workers", LAYOUTS)
def test_global_batches_are_the_same_on_any_layout_and_after_resuming(data, reference, dp_ranks, workers):
    layout = {"ranks": len(dp_ranks), "dp_ranks": dp_ranks, "num_workers": workers}
    assert global_batches(data, count=3, **layout) == reference[:3]
    for start in (39, 41, 60):  # across the end of the first epoch, which lies within a batch, and in the middle of the second
        assert global_batches(data, count=4, consumed_samples=start * GLOBAL_BATCH, **layout) == reference[start : start + 4]


@pytest.mark.parametrize(
    "start, sizes, micro",
    [
        (0, [12, 12, 24, 36, 36, 48], 1),
        (950, [12, 24, 36, 24], 3),  # 1000 lies within a microbatch, of all ranks or of some
        (977, [24, 12], 1),  # consumed by other numbers of ranks
        (5, [24, 960, 24, 480, 1200], 4),  # most of an epoch, and more than one
    ],
)
@pytest.mark.parametrize("dp_ranks, workers", [([0, 1], 2), ([0, 1, 2, 3], 0)])
def test_global_batches_of_any_sizes_are_the_next_samples_in_order(data, sequence, start, sizes, micro, dp_ranks, workers):
    sizes = [size for size in sizes if size % (micro * (max(dp_ranks) + 1)) == 0]
    batches = global_batches(
        data,
        ranks=len(dp_ranks),
        dp_ranks=dp_ranks,
        sizes=sizes,
        micro=micro,
        consumed_samples=start,
        num_workers=workers,
        samples_per_read=7,
    )
    assert batches == cut(sequence, sizes, start)


def test_data_smaller_than_a_microbatch_of_all_ranks_come_again(tmp_path):
    small = write_data(tmp_path, train=5)
    sequence = ids_of(islice(batches_of(small, micro_batch_size=1), 40))
    assert all(sorted(sequence[first : first + 5]) == list(range(5)) for first in range(0, 40, 5))
    for workers in (0, 1):
        assert global_batches(small, ranks=4, sizes=[16, 16], num_workers=workers) == cut(sequence, [16, 16])


def test_canonical_nodes_keep_the_order_too_and_repeat_nothing_at_the_end(data, monkeypatch):
    monkeypatch.setattr(order, "SAMPLES_FOR_CANONICAL_NODES", 500)  # the forks see it too
    sequence = ids_of(islice(batches_of(data, micro_batch_size=1), 2000))
    epochs = [sequence[:960], sequence[960:1920]]
    assert [len(set(epoch)) for epoch in epochs] == [960, 960], "1000 samples are 15 for each of 64 nodes, and 40 left over"
    assert set(epochs[0]) != set(epochs[1]), "other samples are left over in every epoch"
    for start in (912, 1872):
        assert global_batches(data, count=3, consumed_samples=start, ranks=2, num_workers=1) == cut(sequence, [24] * 3, start)


@pytest.mark.parametrize("nodes, ranks", [(1, 4), (2, 2), (4, 2), (12, 1), (3, 2)])
def test_ranks_share_the_places_and_a_node_reads_its_own_canonical_nodes(nodes, ranks):
    """What one machine cannot be: several nodes."""
    worlds = [World(nodes, ranks, 2, 2 * rank) for rank in range(nodes * ranks)]
    places = [CheckedDataset.place.fget(type("Dataset", (), {"_parallel_rank_world": world})) for world in worlds]
    taken = [list(order.places_of_rank(101, 101 + 640 * nodes * ranks, *place)) for place in places]
    assert sorted(sum(taken, [])) == list(range(101, 101 + 640 * nodes * ranks)) and len(set(map(len, taken))) == 1
    by_node = [
        {place % order.CANONICAL_NODES for world, own in zip(worlds, taken, strict=True) if world.node == node for place in own}
        for node in range(nodes)
    ]
    if order.CANONICAL_NODES % nodes == 0:
        assert sum(map(len, by_node)) == order.CANONICAL_NODES


def test_a_microbatch_leaves_out_what_follows_an_end_of_document(data):
    batch = next(batches_of(data, micro_batch_size=4, seed=11))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
        "tokens": ((4, T), torch.int64),
        "labels": ((4, T), torch.int64),
        "loss_mask": ((4, T), torch.float32),
        "position_ids": ((4, T), torch.int64),
        "sample_ids": ((4,), torch.int64),
    }
    assert (batch["tokens"][:, 1:] == batch["labels"][:, :-1]).all()
    assert (batch["labels"][:, -1] == batch["tokens"][:, 0]).all()
    assert (batch["position_ids"] == torch.arange(T)).all()
    odd = batch["tokens"][:, 0] % 2 == 1
    assert odd.any() and not odd.all()
    assert (batch["loss_mask"][:, 1] == (~odd).float()).all() and (batch["tokens"][:, 0] == EOD).sum() == (
        batch["loss_mask"][:, 0] == 0
    ).sum()


def test_the_seed_decides_the_order_and_the_global_generator_is_not_touched(data, reference):
    state = torch.get_rng_state()
    assert global_batches(data, count=1, seed=8) != reference[:1]
    next(batches_of(data, num_workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_blend_hits_its_weights(data, tmp_path):
    other = write_data(tmp_path, train=3000, first=10_000)
    streams = parse_data_path(["3", data, "1", other])
    counts = Counter(number >= 10_000 for batch in global_batches(streams, count=60) for number in batch)
    assert abs(counts[True] / counts.total() - 0.25) < 0.03
    unweighted = Counter(number >= 10_000 for batch in global_batches(parse_data_path([data, other]), count=60) for number in batch)
    assert abs(unweighted[True] / unweighted.total() - 0.75) < 0.03


# ---- validation ----------------------------------------------------------------------------------------------------------------------


def validation(streams, **changes):
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "seq_length": T, "eod_id": EOD, "num_samples": 20, "num_workers": 1}
    return validation_batches(streams, **{**settings, **changes})


def test_every_evaluation_sees_the_same_samples_spread_over_the_split(data):
    batches = validation([Stream(data)])
    first = ids_of(batches)
    stopped = iter(batches)
    next(stopped)
    del stopped  # an evaluation that was cut short
    assert first == ids_of(batches) == sorted(first)
    assert len(set(first)) == 20 and first[0] == 0 and first[-1] > 45
    assert len(set(ids_of(validation([Stream(data)], num_samples=48)))) == 48


def test_ranks_share_the_validation_batches(data):
    together = ids_of(validation([Stream(data)]))
    by_rank = run_ranks(4, lambda: ids_of(validation([Stream(data)], data_parallel=(int(os.environ["RANK"]) % 2, 2))))
    assert by_rank[0] == by_rank[2] and by_rank[1] == by_rank[3]
    assert sorted(by_rank[0] + by_rank[1]) == together


def test_validation_of_a_blend_follows_the_weights(data, tmp_path):
    other = write_data(tmp_path, train=30, val=200, first=10_000)
    weighted = ids_of(validation(parse_data_path(["1", data, "3", other]), num_samples=40))
    assert sum(number >= 10_000 for number in weighted) == 30 and len(set(weighted)) == 40
    by_size = ids_of(validation(parse_data_path([data, other]), num_samples=40))
    assert sum(number >= 10_000 for number in by_size) == 32


def test_more_validation_than_there_is_names_the_remedy(data, tmp_path):
    with pytest.raises(UserError, match="lasts for 50 samples, 52 are asked for: use --eval-iters 12 at most"):
        validation([Stream(data)], num_samples=52)
    with pytest.raises(UserError, match="no validation batch.*--eval-iters 0"):
        validation([Stream(write_data(tmp_path, train=30))])


# ---- what the user gives -------------------------------------------------------------------------------------------------------------


def test_data_path_reads_as_in_megatron():
    assert parse_data_path(["a"]) == [Stream("a")]
    assert parse_data_path(["a/", "b", "c"]) == [Stream("a"), Stream("b"), Stream("c")]
    assert parse_data_path(["3", "a", "1", "s3://bucket/b"]) == [Stream("a", 0.75), Stream("s3://bucket/b", 0.25)]


@pytest.mark.parametrize(
    "words, complaint",
    [
        ([], "is empty"),
        (["1", "a", "b"], "mixes weights and paths"),
        (["1", "a", "b", "c"], "mixes weights and paths"),
        (["1", "2"], "mixes weights and paths"),
        (["0", "a", "1", "b"], "must be a positive number"),
        (["nan", "a"], "must be a positive number"),
        (["a", "a/"], "names a twice"),
    ],
)
def test_a_bad_data_path_is_explained(words, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_data_path(words)


def test_whole_streams_pass_and_tell_what_the_model_needs(data, tmp_path):
    meta = check_streams([Stream(data)], seq_length=T, vocab_size=1024)
    assert (meta.train_samples, meta.val_samples, meta.eod_id, meta.vocab_size, meta.has_validation) == (1000, 50, EOD, 1000, True)
    assert meta.tokenizer_path == f"{data}/tokenizer"
    without = Stream(write_data(tmp_path, train=30))
    assert not check_streams([Stream(data), without], seq_length=T).has_validation


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"seq_length": 8}, "holds samples of 8 tokens: use --seq-length 8"),
        ({"vocab_size": 2000}, "vocabulary of 2000, the model only 1024: raise --vocab-size"),
        ({"tokenizer_hash": "x"}, "prepared with another tokenizer"),
        ({"eod_id": 5}, "prepared with another end-of-document token"),
        ({"format_version": 9}, "has format 9, this version reads 1"),
    ],
)
def test_a_stream_that_does_not_fit_is_named(data, tmp_path, changes, complaint):
    other = write_data(tmp_path, train=30, **changes)
    with pytest.raises(UserError, match=f"^{other}.*{complaint}"):
        check_streams([Stream(data), Stream(other)], seq_length=T, vocab_size=1024)


def test_missing_and_truncated_shards_are_named(tmp_path):
    path = write_data(tmp_path / "data", train=1000, val=10)
    shard = tmp_path / "data" / "train" / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"{shard} has \d+ bytes instead of \d+"):
        check_streams([Stream(path)], seq_length=T)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        check_streams([Stream(path)], seq_length=T)
    (tmp_path / "data" / "val" / "index.json").write_text("{")
    shutil.rmtree(tmp_path / "data" / "train")
    with pytest.raises(UserError, match="train/index.json cannot be read"):
        check_streams([Stream(path)], seq_length=T)
    with pytest.raises(UserError, match="nowhere/rat_meta.json does not exist"):
        check_streams([Stream(str(tmp_path / "nowhere"))], seq_length=T)


def test_batches_that_cannot_be_are_explained(data, monkeypatch):
    with pytest.raises(UserError, match="--global-batch-size 24 is not a multiple of --micro-batch-size 5 times the data-parallel size 1"):
        validation([Stream(data)], micro_batch_size=5, global_batch_size=24)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE is not set"):
        batches_of(data)


# ---- killed runs and downloads -------------------------------------------------------------------------------------------------------


def _run_forever(path: str, cache: str, started) -> None:
    os.setsid()
    iterator = batches_of(path, cache=cache, num_workers=1)
    next(iterator)
    started.set()
    time.sleep(60)


def test_a_killed_run_does_not_break_the_next(data, tmp_path, monkeypatch):
    """Streaming takes a cache folder with shared memory left over for one in use; a stream with a cache is one with a URL."""
    monkeypatch.setattr(streams.Stream, "is_remote", property(lambda stream: True))  # a local folder stands for the bucket
    cache, started = str(tmp_path), FORK.Event()
    process = FORK.Process(target=_run_forever, args=(data, cache, started))
    process.start()
    assert started.wait(60)
    left = _blocks_mapped_by(process.pid)
    with shared_memory.claiming_shared_memory():  # no run of a test beside this one clears them first
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert any(path.exists() for path in left), "nothing was left over: this test tests nothing"
    check_streams([Stream(data)], seq_length=T, cache=cache)
    assert len(next(batches_of(data, cache=cache))["tokens"]) == 2
    assert not any(path.exists() for path in left if path not in _blocks_mapped_by(os.getpid()))


def test_clearing_after_a_killed_run_is_logged(caplog):
    with shared_memory.claiming_shared_memory():
        block = Path("/dev/shm/999998_locals")
        block.touch()
        shared_memory.clean_stale_shared_memory()
    assert not block.exists()
    assert "blocks of shared memory that a killed run left in /dev/shm" in caplog.messages[-1]


def test_shared_memory_of_a_live_run_is_left_alone(data, tmp_path):
    started = FORK.Event()
    process = FORK.Process(target=_run_forever, args=(data, str(tmp_path), started))
    process.start()
    assert started.wait(60)
    mapped = _blocks_mapped_by(process.pid)
    next(batches_of(data))
    assert mapped and all(path.exists() for path in mapped)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def test_a_block_that_its_run_removes_meanwhile_is_no_concern(monkeypatch):
    monkeypatch.setattr(shared_memory, "_unmapped", lambda blocks: [Path("/dev/shm/999999_locals")])
    shared_memory.clean_stale_shared_memory()


def test_runs_that_start_together_on_one_node_do_not_collide(data):
    together = FORK.Barrier(4)

    def start(result) -> None:
        try:
            for _ in range(6):
                together.wait(60)
                batches_of(data)
            result.put(None)
        except BaseException as error:  # it is the test's to report
            together.abort()
            result.put(repr(error))
            raise

    results = FORK.Queue()
    processes = [FORK.Process(target=start, args=(results,)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [None] * 4
    for process in processes:
        process.join()


def _blocks_mapped_by(pid: int) -> set[Path]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        Path(line.split()[-1])
        for line in lines
        if "/dev/shm/" in line and line.endswith(("_locals", "_barrier", "_next_epoch", "_rat_checked"))
    }


def test_a_url_needs_a_cache_folder():
    with pytest.raises(UserError, match="s3://bucket/data is a URL: name a local folder for its shards with --data-cache-path"):
        check_streams([Stream("s3://bucket/data")], seq_length=T)


def _dataset_of(batches):
    return inspect.getclosurevars(batches.gi_frame.f_locals["read"]).nonlocals["dataset"]


def test_an_iteration_that_is_given_up_leaves_no_thread_polling(data):
    batches = batches_of(data)
    next(batches)
    iteration = _dataset_of(batches)._iterator
    assert iteration._num_exited == 0, "no thread polls: this test tests nothing"
    batches.close()
    deadline = time.monotonic() + 10
    while iteration._num_exited < iteration._num_threads_to_exit:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_iteration_given_up_late_does_not_end_the_next(data):
    batches = batches_of(data)
    next(batches)
    dataset = _dataset_of(batches)
    earlier, later = iter(dataset), iter(dataset)
    next(earlier), next(later)
    earlier.close()
    assert dataset._iterator._num_exited == 0
    assert sum(1 for _ in later) > 100


def test_a_program_ends_while_its_workers_wait(data):
    script = f"""
from rat_megatron.data.loader.batches import train_batches
from rat_megatron.data.loader.streams import Stream
batches = train_batches([Stream({data!r})], micro_batch_size=2, seq_length=2, eod_id=3, seed=7, num_workers=2)
next(batches)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_signals_to_the_process_group_do_not_reach_the_workers(data):
    iterator = batches_of(data, num_workers=1, consumed_samples=GLOBAL_BATCH)
    next(iterator)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid, number)
    assert len(ids_of(islice(iterator, 5 * GLOBAL_BATCH))) == 10 * GLOBAL_BATCH
    assert all(worker.is_alive() for worker in workers)
