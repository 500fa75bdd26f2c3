"""What fixes the order of the training samples: its rules, the facts that a checkpoint keeps of it, and which shard a sample comes from.

A run that resumes with other facts would repeat some samples and miss others without a word; so they are compared first.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np

from rat_megatron.data.format import hash_of
from rat_megatron.data.loader.streams import Stream, read_index

SHUFFLE_ALGORITHM = "py1e"
SHUFFLE_BLOCK = 1 << 18  # samples
CANONICAL_NODES = 64  # a node reads its own share of the shards when the number of nodes divides this
SAMPLES_FOR_CANONICAL_NODES = 1 << 16  # smaller data is one sequence, so that no sample is left over for the sake of equal shares


def canonical_nodes(samples: int) -> int:
    """The number of equal parts that Streaming cuts an epoch of `samples` into."""
    return CANONICAL_NODES if samples >= SAMPLES_FOR_CANONICAL_NODES else 1


def samples_per_epoch(samples: int) -> int:
    """Samples of an epoch of data that has `samples`: equal parts for the canonical nodes. The few left over are others in every epoch, as
    each is shuffled anew."""
    return samples - samples % canonical_nodes(samples)


def places_of_rank(first: int, last: int, place: int, dp: int) -> range:
    """The places in [first, last) of the endless sequence of samples that one of `dp` data-parallel ranks gets: those that are `place`
    modulo dp. Any dp * n places in a row hold n of them, so every global batch is shared equally, wherever it begins."""
    return range(first + (place - first) % dp, last, dp)


# ---- facts in the checkpoint ---------------------------------------------------------------------------------------------------------


def order_facts(streams: list[Stream], *, seed: int, cache: str | None = None) -> dict[str, Any]:
    """All that the order of the training samples depends on, as plain numbers, strings, lists and dicts.

    A stream is known by `content`, a hash of its index.json, which has the hash of every shard, T and the type of the ids: its `path` is
    only for messages. `algorithm` is a hash of the order that the installed libraries give a small example."""
    indices = [read_index(stream, "train", cache) for stream in streams]
    return {
        "streams": [
            {"path": stream.path, "weight": stream.weight, "content": hash_of(index), "samples": sum(shard["samples"] for shard in index)}
            for stream, index in zip(streams, indices, strict=True)
        ],
        "seed": seed,
        "rules": [SHUFFLE_ALGORITHM, SHUFFLE_BLOCK, CANONICAL_NODES, SAMPLES_FOR_CANONICAL_NODES],
        "algorithm": hash_of(_example_order()),
        "libraries": f"mosaicml-streaming {version('mosaicml-streaming')}, numpy {version('numpy')}",
    }


def order_difference(there: dict[str, Any], here: dict[str, Any], consumed_samples: int) -> str | None:
    """What keeps a run with the facts `here` from going on where one with the facts `there` has consumed so many samples, and the flag
    that would help; None when it goes on with the very next sample. `there` and `here` name the checkpoint's facts and this run's."""
    if there["seed"] != here["seed"]:
        return f"--seed {there['seed']} there, {here['seed']} here"
    contents = [[stream["content"] for stream in facts["streams"]] for facts in (there, here)]
    for stream in here["streams"]:
        if stream["content"] not in contents[0]:
            return f"--data-path {stream['path']} here is not what was trained on there"
    for stream in there["streams"]:
        if stream["content"] not in contents[1]:
            return f"--data-path {stream['path']} there is missing here"
    if contents[0] != contents[1]:
        return f"--data-path in the order {', '.join(stream['path'] for stream in there['streams'])} there, in another here"
    for before, now in zip(there["streams"], here["streams"], strict=True):
        if before["weight"] != now["weight"]:
            return f"--data-path gives {now['path']} the weight {_weight(before)} there, {_weight(now)} here"
    if there["rules"] != here["rules"] or there["algorithm"] != here["algorithm"]:
        return f"samples in the order of {there['libraries']} there, of {here['libraries']} here, which differs"
    length = samples_per_epoch(sum(stream["samples"] for stream in here["streams"]))
    if batch := there.get("global_batch_size"):  # of an older version, whose epochs were whole global batches
        whole = length - length % batch
        if divmod(consumed_samples, whole) != divmod(consumed_samples, length):
            return f"epochs of {whole} samples there, whole batches of --global-batch-size {batch}, and of {length} here"
    return None


def _weight(stream: dict[str, Any]) -> str:
    return "of its size" if stream["weight"] is None else f"{stream['weight']:.6g}"


def _example_order() -> list[int]:
    """Two epochs' order of a blend of two streams with a few shards, as Streaming computes it for a run."""
    from streaming import Stream as StreamingStream
    from streaming import StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    sizes = np.array([50, 30, 41, 17, 90, 28, 64], np.int64)
    streams = [StreamingStream(local=name, proportion=weight) for name, weight in (("a", 0.75), ("b", 0.25))]
    example: Any = SimpleNamespace(
        streams=streams,
        num_streams=2,
        samples_per_shard=sizes,
        sample_offset_per_shard=sizes.cumsum() - sizes,
        shard_offset_per_stream=np.array([0, 4]),
        shards_per_stream=np.array([4, 3]),
        epoch_size=StreamingStream.apply_weights(streams, np.array([138, 182]), None, 1),
        sampling_method="balanced",
        sampling_granularity=1,
        epoch_seed_change=True,
        partition_algo="relaxed",
        num_canonical_nodes=4,
        initial_physical_nodes=1,
        batch_size=8,
        shuffle=True,
        shuffle_algo=SHUFFLE_ALGORITHM,
        shuffle_seed=1,
        shuffle_block_size=64,
    )
    example.resample_streams = lambda epoch: StreamingDataset.resample_streams(example, epoch)
    one_rank = World(1, 1, 1, 0)
    return [int(sample) for epoch in (0, 1) for sample in generate_work("random", example, one_rank, epoch, 16).flatten()]


# ---- where a sample comes from -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleOrigin:
    """Where a training sample lies: its id, its stream's path, its shard's path or URL, and its index in that shard."""

    sample_id: int
    stream: str
    shard: str
    index: int


def describe_samples(streams: list[Stream], ids: list[int], cache: str | None = None) -> list[SampleOrigin]:
    """The origin of each training sample, by its `sample_ids` entry of a microbatch. Raises IndexError for an id that there is not."""
    shards = [
        (stream.path, f"{stream.path}/train/{shard['raw_data']['basename']}", shard["samples"])
        for stream in streams
        for shard in read_index(stream, "train", cache)
    ]
    ends = np.cumsum([samples for _, _, samples in shards])

    def origin(sample_id: int) -> SampleOrigin:
        if not 0 <= sample_id < ends[-1]:
            raise IndexError(f"sample {sample_id} of {ends[-1]}")
        at = int(np.searchsorted(ends, sample_id, side="right"))
        stream, shard, samples = shards[at]
        return SampleOrigin(sample_id, stream, shard, sample_id - int(ends[at]) + samples)

    return [origin(int(sample_id)) for sample_id in ids]
