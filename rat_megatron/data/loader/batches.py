"""MDS -> Megatron microbatches, through MosaicML Streaming. No Megatron here: `pretrain_rat.py` passes plain numbers.

The training samples are one sequence without end, epoch after epoch, that depends on the data, the blend and the seed alone (order.py). A
global batch of g samples that begins after c consumed ones is the places [c, c + g) of it: a data-parallel rank gets every dp-th place,
whatever the sizes of the batches, and hands its samples out microbatch after microbatch. No sample comes twice in an epoch, unless a
weight asks for more of a stream than it holds.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from rat_megatron.data.loader.order import SHUFFLE_ALGORITHM, SHUFFLE_BLOCK, canonical_nodes, places_of_rank, samples_per_epoch
from rat_megatron.data.loader.shared_memory import claiming_shared_memory
from rat_megatron.data.loader.streams import Stream, cache_folder, samples_of, training_cache_limit
from rat_megatron.errors import UserError

PREFETCHED_READS = 8  # whose shards each worker fetches ahead of the one that it hands out

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of some samples, as _collate gives them


def train_batches(
    streams: list[Stream],
    *,
    micro_batch_size: int,
    seq_length: int,
    eod_id: int,
    seed: int,
    consumed_samples: int = 0,
    data_parallel: tuple[int, int] = (0, 1),
    samples_per_read: int = 64,
    num_workers: int = 2,
    shuffle: bool = True,
    cache: str | None = None,
    cache_limit: int | None = None,
    validation: list[Stream] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's microbatches (see `_microbatch`), from the first one after `consumed_samples` on, without end.

    Collective: every rank constructs it, and draws as many microbatches in each global batch as the others. `data_parallel` is this rank's
    data-parallel rank and their number dp: equal ones see the same samples, in whatever order the ranks of a model lie. A worker reads
    `samples_per_read` samples at a time, which changes nothing of what comes. Of remote shards, at most about `cache_limit` bytes stay in
    the folder `cache`, those of the `validation` streams (default: the same ones) included. Reads RANK, WORLD_SIZE, LOCAL_RANK and
    LOCAL_WORLD_SIZE from the environment; beyond one rank, torch.distributed is initialized. Raises UserError, also while iterated, for
    shards that are damaged or cannot be had, and when a worker dies."""
    from rat_megatron.data.loader.checked_dataset import CheckedDataset

    _check_environment()
    samples = sum(samples_of(stream, "train", cache) for stream in streams)
    length = samples_per_epoch(samples)
    if not length:
        raise UserError("--data-path has no training samples: prepare more text.")
    with claiming_shared_memory():
        dataset = CheckedDataset(
            streams=_streaming_streams(streams, "train", cache),
            batch_size=samples_per_read,
            predownload=PREFETCHED_READS * samples_per_read,
            cache_limit=training_cache_limit(streams, cache, cache_limit, validation),
            num_canonical_nodes=canonical_nodes(samples),
            shuffle=shuffle,
            shuffle_algo=SHUFFLE_ALGORITHM,
            shuffle_seed=seed,
            shuffle_block_size=SHUFFLE_BLOCK,
            replication=_replication(data_parallel),
        )
    _place(dataset, data_parallel)

    def read(first: int, last: int) -> Generator[Columns]:
        """This rank's samples of the places [first, last), all in one epoch, some at a time."""
        epoch = first // length
        state = {"epoch": epoch, "sample_in_epoch": first - epoch * length, "num_canonical_nodes": canonical_nodes(samples)}
        dataset.load_state_dict({**state, "shuffle_seed": seed, "initial_physical_nodes": 1})
        missing = len(places_of_rank(first, last, *dataset.place))
        for columns in _batches(_loader(dataset, samples_per_read, num_workers)):
            missing -= len(columns[0])
            yield columns
        if missing:
            raise RuntimeError(f"epoch {epoch} of the data ended {missing} samples early")

    def microbatches() -> Iterator[dict[str, torch.Tensor]]:
        place, end = consumed_samples, (consumed_samples // length + 1) * length
        samples = _Samples()
        samples.go_on_with(read(place, end))
        while True:
            place += micro_batch_size * data_parallel[1]
            # All ranks begin an epoch at the same microbatch, needed by each or not: they wait for each other there.
            while place > end:
                samples.go_on_with(read(end, end + length))
                end += length
            yield _microbatch(*samples.take(micro_batch_size), seq_length, eod_id)

    return microbatches()


class _Samples:
    """Samples that come some at a time, to be taken in other numbers."""

    def __init__(self) -> None:
        self._source: Iterator[Columns] = iter(())
        self._there: deque[Columns] = deque()

    def go_on_with(self, source: Iterator[Columns]) -> None:
        """Takes all that the source before still has, and begins the next."""
        self._there.extend(self._source)
        self._source = source
        self._there.extend(itertools.islice(source, 1))

    def take(self, count: int) -> Columns:
        """The next `count` samples."""
        parts: list[Columns] = []
        while count:
            tokens, answers, ids = self._there.popleft() if self._there else next(self._source)
            parts.append((tokens[:count], answers[:count], ids[:count]))
            if len(ids) > count:
                self._there.appendleft((tokens[count:], answers[count:], ids[count:]))
            count -= len(parts[-1][2])
        if len(parts) == 1:
            return parts[0]
        tokens, answers, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        return tokens, answers, ids


def validation_batches(
    streams: list[Stream],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int,
    eod_id: int,
    num_samples: int,
    data_parallel: tuple[int, int] = (0, 1),
    num_workers: int = 2,
    cache: str | None = None,
) -> Iterable[dict[str, torch.Tensor]]:
    """This rank's microbatches of one evaluation over `num_samples` samples; each `iter()` begins the same evaluation anew.

    The samples are spread evenly over the validation splits and in the order of the data; the share of a stream is its weight, or its size.
    They are the same for any number of ranks, and none comes twice. Collective when constructed, not when iterated."""
    from rat_megatron.data.loader.checked_dataset import CheckedDataset

    share = _data_parallel_share(global_batch_size, micro_batch_size, data_parallel)
    sizes = [samples_of(stream, "val", cache) for stream in streams]
    indices = _spread(streams, sizes, num_samples - num_samples % global_batch_size, global_batch_size)
    with claiming_shared_memory():
        dataset = CheckedDataset(
            streams=_streaming_streams(streams, "val", cache),
            batch_size=share,
            replication=_replication(data_parallel),
        )
    own = indices.reshape(-1, data_parallel[1], share)[:, data_parallel[0]].flatten()
    return _Validation(_loader(Subset(dataset, own.tolist()), share, num_workers), micro_batch_size, seq_length, eod_id)


class _Validation:
    """Re-iterable: a loader over a fixed list of samples, cut into microbatches."""

    def __init__(self, loader: DataLoader, micro_batch_size: int, seq_length: int, eod_id: int) -> None:
        self.loader, self.micro_batch_size, self.seq_length, self.eod_id = loader, micro_batch_size, seq_length, eod_id

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in _batches(self.loader):
            for tokens, answers, ids in zip(*(column.split(self.micro_batch_size) for column in batch), strict=True):
                yield _microbatch(tokens, answers, ids, self.seq_length, self.eod_id)


def samples_for_validation(streams: list[Stream], cache: str | None = None) -> int:
    """How many samples `validation_batches` can give, each once."""
    sizes = [samples_of(stream, "val", cache) for stream in streams]
    return _possible(sizes, _shares(streams, sizes)) if all(sizes) else 0


def _shares(streams: list[Stream], sizes: list[int]) -> np.ndarray:
    return np.array([size if stream.weight is None else stream.weight for stream, size in zip(streams, sizes, strict=True)])


def _possible(sizes: list[int], shares: np.ndarray) -> int:
    return int((np.array(sizes) * shares.sum() / shares).min())


def _spread(streams: list[Stream], sizes: list[int], num_samples: int, global_batch_size: int) -> np.ndarray:
    """`num_samples` indices into the streams laid end to end: from each its share, at even distances."""
    if not num_samples or not all(sizes):
        raise UserError(f"no validation batch of {global_batch_size} samples: use --eval-iters 0, or prepare with a larger --val-fraction.")
    shares = _shares(streams, sizes)
    possible = _possible(sizes, shares)
    if num_samples > possible:
        paths = ", ".join(stream.path for stream in streams)
        raise UserError(
            f"the validation split of {paths} lasts for {possible} samples, {num_samples} are asked for: use --eval-iters "
            f"{possible // global_batch_size} at most, or prepare with a larger --val-fraction."
        )
    ends = np.rint(np.cumsum(shares) / shares.sum() * num_samples).astype(np.int64)
    indices, offset = [], 0
    for size, count in zip(sizes, np.diff(ends, prepend=0), strict=True):
        count = min(int(count), size)  # rounding may ask for one more
        indices.append(offset + np.arange(count) * size // max(count, 1))
        offset += size
    return np.concatenate(indices)


# ---- parts of both -------------------------------------------------------------------------------------------------------------------


def _data_parallel_share(global_batch_size: int, micro_batch_size: int, data_parallel: tuple[int, int]) -> int:
    """Samples of each global batch that a data-parallel rank gets. Raises UserError when they do not divide."""
    _check_environment()
    groups = data_parallel[1]
    if global_batch_size % (groups * micro_batch_size):
        raise UserError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} "
            f"times the data-parallel size {groups}: change one of them."
        )
    return global_batch_size // groups


def _check_environment() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        raise UserError("LOCAL_WORLD_SIZE is not set: start with torchrun, or export the number of ranks on each node.")


def _replication(data_parallel: tuple[int, int]) -> int:
    """How many ranks see the same samples."""
    return int(os.environ.get("WORLD_SIZE", "1")) // data_parallel[1]


def _place(dataset: Any, data_parallel: tuple[int, int]) -> None:
    """Gives a StreamingDataset this rank's data-parallel rank: by itself it takes neighbouring ranks for replicas, but the stages of a
    pipeline lie far apart in Megatron's order of ranks."""
    from streaming.base.world import World

    there = dataset._parallel_rank_world
    dataset._parallel_rank_world = World(
        there.num_nodes, there.ranks_per_node, there.workers_per_rank, data_parallel[0] * there.workers_per_rank
    )


def _streaming_streams(streams: list[Stream], split: str, cache: str | None) -> list[Any]:
    """Streaming's own stream objects: local folders are read in place, URLs through a cache folder of their own per split. Weights are
    for training: validation chooses its samples itself."""
    from rat_megatron.data.loader.checked_dataset import CheckedStream

    def one(stream: Stream) -> CheckedStream:
        weight, address = stream.weight if split == "train" else None, f"{stream.path}/{split}"
        if not stream.is_remote:
            return CheckedStream(stream.downloader, local=address, proportion=weight)
        return CheckedStream(stream.downloader, remote=address, local=str(cache_folder(stream, cache) / split), proportion=weight)

    return [one(stream) for stream in streams]


def _loader(dataset: Any, batch_size: int, num_workers: int) -> DataLoader:
    """Yields this rank's samples, `batch_size` at a time, as `_collate` gives them."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # the loader draws seeds for its workers: not from the model's generator
    )


def _batches(loader: DataLoader) -> Generator[Columns]:
    """The loader's batches; what goes wrong in its workers raises UserError here, or wherever the program is when a worker dies."""
    batches = iter(loader)
    workers = getattr(batches, "_workers", [])  # there are none when this process reads itself
    if workers:
        _explain_dead_workers()
        atexit.register(_kill, workers)
    try:
        yield from batches
    except UserError as error:  # the worker's trace comes before its sentence
        _kill(workers)
        raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
    except (RuntimeError, OSError, EOFError) as error:  # a dead worker may first be noticed by its broken connection
        dead = _dead_worker(error) or _first_dead(workers)
        _kill(workers)
        raise dead or error from None


def _explain_dead_workers() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is threading.main_thread() and callable(handler) and not isinstance(handler, _Explaining):
        signal.signal(signal.SIGCHLD, _Explaining(handler))


class _Explaining:
    """Torch raises from its handler of SIGCHLD as soon as a worker dies: puts our sentence in the place of its own."""

    def __init__(self, handler: Callable[[int, Any], Any]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            raise _dead_worker(error) or error from None


def _dead_worker(error: Exception) -> UserError | None:
    if not str(error).startswith("DataLoader worker"):
        return None
    return _death(str(error).splitlines()[0].strip().rstrip("."))


def _first_dead(workers: list[Any]) -> UserError | None:
    dead = next((worker for worker in workers if multiprocessing.connection.wait([worker.sentinel], timeout=1 / len(workers))), None)
    return dead and _death(f"pid {dead.pid}, exit code {dead.exitcode}")


def _death(reason: str) -> UserError:
    return UserError(
        f"a process that reads the data has died ({reason}), most often for want of memory: lower --num-workers or ask for more memory, "
        "and start again from the last checkpoint."
    )


def _kill(workers: list[Any]) -> None:
    """Workers ignore the signal by which the loader, or a program that ends, would stop them, and they would be waited for."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
    for worker in workers:
        worker.kill()
        worker.join()
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)


def _collate(samples: list[dict[str, Any]]) -> Columns:
    """tokens [n, s + 1], answers [n, 2] (0, 0 for a sample of plain text) and ids [n] of n samples."""
    tokens, answers = (np.stack(column).astype(np.int64) for column in zip(*map(_tokens_and_answer, samples), strict=True))
    return torch.from_numpy(tokens), torch.from_numpy(answers), torch.tensor([int(sample["id"]) for sample in samples])


def _tokens_and_answer(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return sample["tokens"], sample.get("answer", np.zeros(2))


def _ignore_signals(_: int) -> None:
    """Slurm and Ctrl-C signal the whole process group; only the training process may decide what that means."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _microbatch(tokens: torch.Tensor, answers: torch.Tensor, ids: torch.Tensor, seq_length: int, eod_id: int) -> dict[str, torch.Tensor]:
    """[b, s + 1], [b, 2], [b] -> [b, s]: tokens, labels, position_ids (int64) and loss_mask (float32); and sample_ids [b] (int64), each
    sample's index in the streams laid end to end."""
    inputs = tokens[:, :-1].contiguous()
    return {
        "tokens": inputs,
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": loss_mask(inputs, answers, eod_id),
        "position_ids": torch.arange(seq_length).expand(len(ids), seq_length).contiguous(),
        "sample_ids": ids.clone(),
    }


def loss_mask(inputs: torch.Tensor, answers: torch.Tensor, eod_id: int) -> torch.Tensor:
    """Which predictions count. inputs [b, s]; answers [b, 2], column `answer` of the samples, 0, 0 where there is none -> float32 [b, s].

    With an answer, those of its tokens and its end. In plain text all but the token after an end-of-document token: nothing before it
    tells how the next document begins."""
    predicted = torch.arange(1, inputs.shape[1] + 1)  # [s] places in the sample
    begin, end = answers.split(1, dim=1)
    return torch.where(end > 0, (begin <= predicted) & (predicted < end), inputs != eod_id).float()
