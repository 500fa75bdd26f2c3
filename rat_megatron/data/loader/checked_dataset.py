"""Streaming's dataset over shards that are checked: each against its hash when the node first opens it, and after every download.

Streaming by itself checks no hash of a local or cached shard, ends an epoch early without an error when a download fails, leaves other
processes waiting for a shard that one failed to get, and under a cache limit deletes shards of local streams too and may wait for ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from streaming import Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format import FileInfo, Reader
from streaming.base.shared import SharedArray, _get_path
from streaming.base.world import World

from rat_megatron.data.loader.download import Downloader, damage, remove_unfinished
from rat_megatron.data.loader.order import places_of_rank, samples_per_epoch
from rat_megatron.data.loader.shared_memory import CHECKED
from rat_megatron.errors import UserError

UNCHECKED, BEING_CHECKED, WHOLE = 0, 1, 2
SENTENCE_BYTES = 2000

log = logging.getLogger(__name__)


class CheckedStream(Stream):
    """Streaming's stream whose downloads are those of `downloader`; `local` alone is data to be read in place."""

    def __init__(self, downloader: Downloader, **settings: Any) -> None:
        super().__init__(**settings)
        self._checked_downloader = downloader
        self._files: dict[str, FileInfo] = {}  # before index.json has been read: nothing is known of any file

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        shards = super().get_shards(world, allow_unsafe_types)
        self._files = {info.basename: info for shard in shards for pair in shard.file_pairs for info in pair if info}
        return shards

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        if self.remote is not None:
            remove_unfinished(Path(self.local))
        super().set_up_local(shards, cache_usage_per_shard)

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        path = Path(self.local) / (to_basename or from_basename)
        if self.remote is None:
            raise UserError(f"shard {path} is missing: copy or prepare the data anew.")
        self._checked_downloader.download(f"{self.remote}/{from_basename}", path, self._files.get(from_basename))
        return str(path)


class CheckedDataset(StreamingDataset):
    """A StreamingDataset over CheckedStreams; its samples have an `id`, their index in the streams laid end to end.

    A shard that is not what index.json says is downloaded again (and that is logged), or, when local, raises UserError wherever its
    samples are read. So does a download that fails for good."""

    def __init__(self, *, streams: list[CheckedStream], **settings: Any) -> None:
        self._failure: Exception | None = None
        try:
            super().__init__(streams=streams, **settings)
        except ValueError as error:
            if "Reused local directory" not in str(error):
                raise
            folders = ", ".join(stream.local for stream in streams if stream.remote is not None)
            raise UserError(f"the cache {folders} is in use by another run on this node: give another --data-cache-path.") from error
        self._is_local = np.array([stream.remote is None for stream in streams])[self.stream_per_shard]
        self._checked = SharedArray(self.num_shards + 1 + SENTENCE_BYTES, np.uint8, _get_path(self._shm_prefix_int, CHECKED))
        self._event = _NodeFailure(self._checked, self.num_shards)
        if self._unique_rank_world.is_local_leader:
            self._checked.numpy()[:] = UNCHECKED
            there = self._is_local & (self._shard_states.numpy() == _ShardState.LOCAL)
            self.cache_usage -= sum(self.shards[shard_id].get_raw_size() for shard_id in np.flatnonzero(there))

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        shard_id, _ = self.spanner[sample_id]
        try:
            self._raise_failure()
            self._check(shard_id)
            return {**self._read(sample_id, retry, self._path(shard_id)), "id": sample_id}
        except Exception as error:
            self._fail(error)
            raise

    def _read(self, sample_id: int, retry: int, path: Path) -> dict[str, Any]:
        try:
            return super().get_item(sample_id, retry)
        except RuntimeError as error:  # a background thread failed, or the shard vanished time and again
            self._raise_failure()
            raise UserError(f"shard {path} vanishes before it is read, the cache cannot hold it: raise --rat-data-cache-limit.") from error
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"shard {path} cannot be read ({error}): check the disk, or copy the data anew.") from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        self._raise_failure()
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            if self._shard_states[shard_id] == _ShardState.PREPARING:  # by this process: the others would wait for ever
                self._shard_states[shard_id] = _ShardState.REMOTE
            raise
        if self._shard_states[shard_id] == _ShardState.LOCAL:
            self._check(shard_id)

    # ---- which samples a worker reads ----------------------------------------------------------------------------------------------

    @property
    def place(self) -> tuple[int, int]:
        """This rank's places in the sequence of samples (see `places_of_rank`), and the number of data-parallel ranks. Neighbours in the
        sequence go to different nodes, as Streaming's canonical nodes take turns in it: each node then reads its own shards."""
        world = self._parallel_rank_world
        return world.node + world.num_nodes * world.rank_of_node, world.num_ranks

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        """The samples of this worker from `sample_in_epoch` on. Streaming's own deals every epoch out by itself, in equal shares, for
        which it repeats samples at the end. Collective on the node, as that is."""
        world = self._unique_worker_world
        if world.is_local_leader:
            order = generate_work(self.batching_method, self, World(1, 1, 1, 0), epoch, 0)
            shared = self._share_work(order)
            self._shared_barrier(world.workers_per_node)
        else:
            self._shared_barrier(world.workers_per_node)
            order, *shared = self._attach_work()
        length = samples_per_epoch(self.epoch_size)
        before = epoch * length
        places = places_of_rank(before + sample_in_epoch, before + length, *self.place)
        places = np.arange(places.start, places.stop, places.step) - before
        turns = np.arange(len(places)) // self.batch_size % world.workers_per_rank  # the loader asks its workers in turn
        own = order.reshape(-1)[places[turns == world.worker_of_rank]]
        self._shared_barrier(world.workers_per_node)
        for block in filter(None, shared):
            block.cleanup()
        return own

    # ---- each shard once per node --------------------------------------------------------------------------------------------------

    def _check(self, shard_id: int) -> None:
        """Compares a shard with its hash unless a process of this node has; what is not there yet is checked when downloaded."""
        while self._checked[shard_id] != WHOLE:
            with FileLock(self._cache_filelock_path):
                mine = self._checked[shard_id] == UNCHECKED
                if mine:
                    self._checked[shard_id] = BEING_CHECKED
            if not mine:
                self._raise_failure()
                time.sleep(TICK)
                continue
            try:
                self._compare(shard_id)
            except BaseException:
                self._checked[shard_id] = UNCHECKED  # whoever waits finds out by itself
                raise
            self._checked[shard_id] = WHOLE

    def _compare(self, shard_id: int) -> None:
        path = self._path(shard_id)
        try:
            problem = damage(path, self.shards[shard_id].raw_data)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"shard {path} cannot be read ({error}): check the disk, or copy the data anew.") from error
        if problem and self._is_local[shard_id]:
            raise UserError(f"shard {path} {problem}: copy or prepare the data anew.")
        if problem:
            log.warning("shard %s %s: downloading it again", path, problem)
            self.evict_shard(shard_id)

    def _path(self, shard_id: int) -> Path:
        return Path(self.streams[self.stream_per_shard[shard_id]].local) / self.shards[shard_id].raw_data.basename

    def _evict_coldest_shard(self) -> None:
        """Removes the cached shard that was not read for the longest time; never one of a local stream."""
        cached = np.flatnonzero((self._shard_states.numpy() == _ShardState.LOCAL) & ~self._is_local)
        self._evict_shard(cached[np.argmin(self._shard_access_times.numpy()[cached])])

    # ---- a failure anywhere on the node reaches whoever iterates -------------------------------------------------------------------

    def _prepare_thread(self, it: _Iterator) -> None:
        self._until_failure(super()._prepare_thread, it)

    def _ready_thread(self, it: _Iterator) -> None:
        self._until_failure(self._follow, it)

    def _follow(self, it: _Iterator) -> None:
        """Streaming's own would wait for ever for a shard that is evicted just after it was fetched."""
        while it.ready_index < it.total and not it.should_exit() and not self._event.is_set():
            if it.ready_index - it.yield_index > self.predownload:
                time.sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            shard_id = None if sample_id == -1 else self.spanner[sample_id][0]
            if shard_id is None or self._shard_states[shard_id] == _ShardState.LOCAL:
                it.ready_index += 1
            else:
                self.prepare_shard(shard_id, False)
                time.sleep(TICK)
        it.on_exit()

    def _until_failure(self, thread: Callable[[_Iterator], None], it: _Iterator) -> None:
        try:
            thread(it)
        except Exception as error:
            self._fail(error)
            it.on_exit()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        try:
            yield from super()._each_sample_id(it)
        finally:  # of an iteration that is given up, too: its threads would go on polling
            it.non_blocking_exit()
        self._raise_failure()

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._event.set(str(error) if isinstance(error, UserError) else repr(error))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._event.is_set():
            raise UserError(self._event.sentence())


class _NodeFailure:
    """Stands in for the event by which Streaming's threads learn of a failure, and reaches all processes of the node: the loader waits
    for its workers in turn, and would never hear of one that fails while another waits for what that one was to fetch."""

    def __init__(self, shared: SharedArray, start: int):
        self._shared, self._start = shared, start  # a byte that says that the sentence is there, and its bytes

    def set(self, sentence: str | None = None) -> None:
        """The first sentence stays. Without one, which is how Streaming calls it, an error follows that brings one."""
        if sentence and not self.is_set():
            text = sentence.encode()[: SENTENCE_BYTES - 1]
            self._shared[self._start + 1 : self._start + 1 + len(text)] = np.frombuffer(text, np.uint8)
            self._shared[self._start] = 1

    def is_set(self) -> bool:
        return bool(self._shared[self._start])

    def sentence(self) -> str:
        return self._shared[self._start + 1 :].tobytes().rstrip(b"\0").decode(errors="ignore")
