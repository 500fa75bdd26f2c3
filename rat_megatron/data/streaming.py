"""MDS -> Megatron microbatches, through MosaicML Streaming. No Megatron here: `pretrain_rat.py` passes plain numbers.

The order of the training samples is a function of the data and the seed alone: Streaming lays out each epoch as one sequence and hands
global batch k the samples [k * gbs, (k + 1) * gbs) of it, whatever the number of nodes, ranks and workers. What that takes is fixed here
(canonical nodes, shuffle block, `initial_physical_nodes`) and the position follows from the number of consumed samples.

An epoch is as many whole global batches as the data has; the samples left over, fewer than one global batch and CANONICAL_NODES, are others
in every epoch, as each epoch is shuffled anew. No sample comes twice in an epoch, unless a weight asks for more of a stream than it holds.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import math
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from rat_megatron.data.shared_memory import claiming_shared_memory
from rat_megatron.errors import UserError

META_FILE = "rat_meta.json"
SHUFFLE_ALGORITHM = "py1e"
SHUFFLE_BLOCK = 1 << 18  # samples
CANONICAL_NODES = 64  # a node reads its own share of the shards when the number of nodes divides this
SAMPLES_FOR_CANONICAL_NODES = 1 << 16  # smaller data is one sequence, so that no sample is left over for the sake of equal shares
DOWNLOAD_TIMEOUT = 600.0  # seconds for one shard


@dataclass(frozen=True)
class Stream:
    """A data set made by `rat-megatron prepare`: a local folder or a URL, and its share of the samples (None: by size)."""

    path: str
    weight: float | None = None

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


@dataclass(frozen=True)
class DataMeta:
    """What all streams agree on, and their samples per split together; `val_samples` is 0 when a stream has no validation split.

    `tokenizer_path` is the folder (or URL) of the tokenizer's copy in the first stream."""

    seq_length: int
    vocab_size: int
    eod_id: int
    tokenizer_path: str
    tokenizer_name: str
    tokenizer_hash: str
    train_samples: int
    val_samples: int

    @property
    def has_validation(self) -> bool:
        return self.val_samples > 0


def parse_data_path(words: list[str]) -> list[Stream]:
    """The streams of Megatron's --data-path: `PATH`, `PATH PATH ...` or `WEIGHT PATH WEIGHT PATH ...`. Raises UserError."""
    if not words:
        raise UserError("--data-path is empty: name a folder made by `rat-megatron prepare`.")
    weights = [_as_number(word) for word in words[::2]]
    if all(weight is None for weight in weights):
        streams = [Stream(word.rstrip("/")) for word in words]
    elif len(words) % 2 or None in weights or any(_as_number(word) is not None for word in words[1::2]):
        raise UserError(f"--data-path {' '.join(words)} mixes weights and paths: write PATH..., or WEIGHT PATH for every stream.")
    else:
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise UserError(f"--data-path {' '.join(words)}: every weight must be a positive number.")
        streams = [Stream(word.rstrip("/"), weight / sum(weights)) for weight, word in zip(weights, words[1::2], strict=True)]
    paths = [stream.path for stream in streams]
    if repeated := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"--data-path names {repeated} twice: give it once, with a larger weight if more of it is wanted.")
    return streams


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


# ---- checks before training ----------------------------------------------------------------------------------------------------------


def check_streams(streams: list[Stream], *, seq_length: int, vocab_size: int | None = None, cache: str | None = None) -> DataMeta:
    """Checks all that can be checked without reading a sample, and raises UserError for the first thing that is wrong.

    Every stream has a readable rat_meta.json; all share tokenizer, end-of-document id and T; T is `seq_length`; the ids fit `vocab_size`,
    the model's, unless None; every shard of a local stream is there in full. Streaming checks downloaded shards by their hash."""
    metas = [_read_meta(stream, cache) for stream in streams]
    first, first_path = metas[0], streams[0].path
    for stream, meta in zip(streams, metas, strict=True):
        if meta["seq_length"] != seq_length:
            raise UserError(
                f"{stream.path} holds samples of {meta['seq_length']} tokens: use --seq-length {meta['seq_length']}, or prepare it anew."
            )
        if vocab_size is not None and meta["vocab_size"] > vocab_size:
            raise UserError(f"{stream.path} has a vocabulary of {meta['vocab_size']}, the model only {vocab_size}: raise --vocab-size.")
        for key, what in (("tokenizer_hash", "tokenizer"), ("eod_id", "end-of-document token")):
            if meta[key] != first[key]:
                raise UserError(f"{stream.path} and {first_path} were prepared with another {what}: prepare one of them anew.")
        if not stream.is_remote:
            for split, totals in meta["splits"].items():
                if totals["samples"]:
                    _check_shards(Path(stream.path) / split)
    samples = {split: [meta["splits"][split]["samples"] for meta in metas] for split in ("train", "val")}
    return DataMeta(
        seq_length=seq_length,
        vocab_size=max(meta["vocab_size"] for meta in metas),
        eod_id=first["eod_id"],
        tokenizer_path=f"{first_path}/tokenizer",
        tokenizer_name=first["tokenizer_name"],
        tokenizer_hash=first["tokenizer_hash"],
        train_samples=sum(samples["train"]),
        val_samples=sum(samples["val"]) if all(samples["val"]) else 0,
    )


def _read_meta(stream: Stream, cache: str | None) -> dict[str, Any]:
    path = Path(stream.path) / META_FILE
    if stream.is_remote:
        path = _cache_folder(stream, cache) / f"{META_FILE}.{os.getpid()}"  # every rank fetches its own: no barrier needed
        _download(f"{stream.path}/{META_FILE}", path)
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a folder that `rat-megatron prepare` has finished.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the data anew.") from error
    finally:
        if stream.is_remote:
            path.unlink(missing_ok=True)
    if meta.get("format_version") != 1:
        raise UserError(f"{path} has format {meta.get('format_version')}, this version reads 1: prepare the data anew.")
    return meta


def _download(url: str, path: Path) -> None:
    from streaming.base.storage.download import CloudDownloader

    path.unlink(missing_ok=True)
    try:
        CloudDownloader.direct_download(url, str(path), DOWNLOAD_TIMEOUT)
    except Exception as error:  # each storage service raises its own
        raise UserError(f"{url} cannot be downloaded, check the address and the credentials: {error}") from error


def _check_shards(folder: Path) -> None:
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'index.json'} cannot be read ({error}): copy or prepare the data anew.") from error
    for shard in shards:
        path, size = folder / shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        if not path.is_file():
            raise UserError(f"shard {path} is missing: copy or prepare the data anew.")
        if path.stat().st_size != size:
            raise UserError(f"shard {path} has {path.stat().st_size} bytes instead of {size}: copy or prepare the data anew.")


def _cache_folder(stream: Stream, cache: str | None) -> Path:
    if cache is None:
        raise UserError(f"--data-path {stream.path} is a URL: name a local folder for its shards with --data-cache-path.")
    return Path(cache) / hashlib.sha256(stream.path.encode()).hexdigest()[:16]


# ---- the two iterators ---------------------------------------------------------------------------------------------------------------


def train_batches(
    streams: list[Stream],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int,
    eod_id: int,
    seed: int,
    consumed_samples: int = 0,
    data_parallel: tuple[int, int] = (0, 1),
    num_workers: int = 2,
    shuffle: bool = True,
    cache: str | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's microbatches (see `_microbatches`), from the first one after `consumed_samples` on, without end.

    Collective: every rank constructs and iterates it. `data_parallel` is this rank's data-parallel rank and their number dp: equal ones see
    the same samples, in whatever order the ranks of a model lie. Of each global batch, one gets 1/dp, as global_batch_size / dp /
    micro_batch_size microbatches in a row. Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from the environment; beyond one rank,
    torch.distributed is initialized."""
    from streaming import StreamingDataset

    share = _data_parallel_share(global_batch_size, micro_batch_size, data_parallel)
    if consumed_samples % global_batch_size:
        raise UserError(
            f"{consumed_samples} samples were consumed, not a multiple of --global-batch-size {global_batch_size}: "
            "keep the batch size of the run that wrote the checkpoint."
        )
    samples = sum(_samples(stream, "train", cache) for stream in streams)
    canonical_nodes = CANONICAL_NODES if samples >= SAMPLES_FOR_CANONICAL_NODES else 1
    # Streaming evens out the canonical nodes with repeated samples at the very end of the sequence: stop before them.
    batches_per_epoch = (samples - samples % canonical_nodes) // global_batch_size
    if not batches_per_epoch:
        raise UserError(
            f"--data-path has {samples} training samples, fewer than --global-batch-size {global_batch_size}: prepare more text."
        )
    logging.getLogger("streaming.base.dataset").setLevel(logging.ERROR)  # warns of a miscount of replicated samples; ours is exact
    with claiming_shared_memory():
        dataset = StreamingDataset(
            streams=_streaming_streams(streams, "train", cache),
            batch_size=share,
            num_canonical_nodes=canonical_nodes,
            shuffle=shuffle,
            shuffle_algo=SHUFFLE_ALGORITHM,
            shuffle_seed=seed,
            shuffle_block_size=SHUFFLE_BLOCK,
            replication=_replication(data_parallel),
            download_timeout=DOWNLOAD_TIMEOUT,
        )
    _place(dataset, data_parallel)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        epoch, first = divmod(consumed_samples // global_batch_size, batches_per_epoch)
        while True:
            dataset.load_state_dict(
                {
                    "epoch": epoch,
                    "sample_in_epoch": first * global_batch_size,
                    "num_canonical_nodes": canonical_nodes,
                    "shuffle_seed": seed,
                    # Streaming then lays out any number of nodes as it would one, also numbers that do not divide the canonical nodes.
                    "initial_physical_nodes": 1,
                }
            )
            for batch in islice(_batches(_loader(dataset, share, num_workers)), batches_per_epoch - first):
                yield from _microbatches(batch, micro_batch_size, seq_length, eod_id)
            epoch, first = epoch + 1, 0

    return batches()


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
    from streaming import StreamingDataset

    share = _data_parallel_share(global_batch_size, micro_batch_size, data_parallel)
    sizes = [_samples(stream, "val", cache) for stream in streams]
    indices = _spread(streams, sizes, num_samples - num_samples % global_batch_size, global_batch_size)
    with claiming_shared_memory():
        dataset = StreamingDataset(
            streams=_streaming_streams([Stream(stream.path) for stream in streams], "val", cache),
            batch_size=share,
            replication=_replication(data_parallel),
            download_timeout=DOWNLOAD_TIMEOUT,
        )
    own = indices.reshape(-1, data_parallel[1], share)[:, data_parallel[0]].flatten()
    return _Validation(_loader(Subset(dataset, own.tolist()), share, num_workers), micro_batch_size, seq_length, eod_id)


class _Validation:
    """Re-iterable: a loader over a fixed list of samples, cut into microbatches."""

    def __init__(self, loader: DataLoader, micro_batch_size: int, seq_length: int, eod_id: int) -> None:
        self.loader, self.micro_batch_size, self.seq_length, self.eod_id = loader, micro_batch_size, seq_length, eod_id

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in _batches(self.loader):
            yield from _microbatches(batch, self.micro_batch_size, self.seq_length, self.eod_id)


def _spread(streams: list[Stream], sizes: list[int], num_samples: int, global_batch_size: int) -> np.ndarray:
    """`num_samples` indices into the streams laid end to end: from each its share, at even distances."""
    if not num_samples or not all(sizes):
        raise UserError(f"no validation batch of {global_batch_size} samples: use --eval-iters 0, or prepare with a larger --val-fraction.")
    shares = np.array([size if stream.weight is None else stream.weight for stream, size in zip(streams, sizes, strict=True)])
    possible = int((np.array(sizes) * shares.sum() / shares).min())
    if num_samples > possible:
        raise UserError(
            f"the validation split lasts for {possible} samples, {num_samples} are asked for: use --eval-iters "
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
    world, groups = int(os.environ.get("WORLD_SIZE", "1")), data_parallel[1]
    if world > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        raise UserError("LOCAL_WORLD_SIZE is not set: start with torchrun, or export the number of ranks on each node.")
    if global_batch_size % (groups * micro_batch_size):
        raise UserError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} "
            f"times the data-parallel size {groups}: change one of them."
        )
    return global_batch_size // groups


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


def _samples(stream: Stream, split: str, cache: str | None) -> int:
    return _read_meta(stream, cache)["splits"][split]["samples"]


def _streaming_streams(streams: list[Stream], split: str, cache: str | None) -> list[Any]:
    """Streaming's own stream objects: local folders are read in place, URLs through a cache folder of their own per split."""
    from streaming import Stream as StreamingStream

    def one(stream: Stream) -> StreamingStream:
        if not stream.is_remote:
            return StreamingStream(local=f"{stream.path}/{split}", proportion=stream.weight)
        local = str(_cache_folder(stream, cache) / split)
        return StreamingStream(remote=f"{stream.path}/{split}", local=local, proportion=stream.weight, validate_hash="xxh64")

    return [one(stream) for stream in streams]


def _loader(dataset: Any, share: int, num_workers: int) -> DataLoader:
    """Yields this rank's share of one global batch, [share, s + 1]."""
    return DataLoader(
        dataset,
        batch_size=share,
        num_workers=num_workers,
        collate_fn=_collate,
        drop_last=True,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # the loader draws seeds for its workers: not from the model's generator
    )


def _batches(loader: DataLoader) -> Iterator[torch.Tensor]:
    """The loader's batches. Its workers ignore the signal by which a program that ends stops them, and are killed instead."""
    batches = iter(loader)
    for worker in getattr(batches, "_workers", []):  # there are none when this process reads itself
        atexit.register(worker.kill)
    return batches


def _collate(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def _ignore_signals(_: int) -> None:
    """Slurm and Ctrl-C signal the whole process group; only the training process may decide what that means."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _microbatches(batch: torch.Tensor, micro_batch_size: int, seq_length: int, eod_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """[share, s + 1] -> dicts of [b, s]: tokens, labels, position_ids (int64) and loss_mask (float32).

    The loss leaves out the token after an end-of-document token: nothing before it tells how the next document begins."""
    position_ids = torch.arange(seq_length).expand(micro_batch_size, seq_length)
    for part in batch.split(micro_batch_size):
        tokens = part[:, :-1].contiguous()
        yield {
            "tokens": tokens,
            "labels": part[:, 1:].contiguous(),
            "loss_mask": (tokens != eod_id).float(),
            "position_ids": position_ids.contiguous(),
        }
