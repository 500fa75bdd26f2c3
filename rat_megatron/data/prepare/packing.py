"""Token ids of all units -> MDS shards of one split, by worker processes, a shard each.

Which samples a shard holds follows from the settings alone, so the shards are the same for any number of workers. Each finished shard
(with a store: uploaded shard) leaves its entry of the index in the work folder, so that a later run over the same tokens does not write
it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rat_megatron.data.format import INDEX_FILE, SHARD_HASH, hash_of
from rat_megatron.data.prepare.destination import Destination
from rat_megatron.data.prepare.duplicates import read_records, read_tokens
from rat_megatron.data.prepare.pool import run_in_workers
from rat_megatron.data.prepare.settings import Settings
from rat_megatron.data.prepare.tokenizing import Part, sample_type
from rat_megatron.files import write_json

SHARD_BYTES = 1 << 26
SHARD_SAMPLES = 1 << 16  # short samples: keep shards well below a shuffle block of the loader, which mixes whole shards


@dataclass(frozen=True)
class Packing:
    """What the workers need. `begins` [parts + 1]: where each part begins in the split's stream of tokens, or of samples with answers."""

    parts: list[Part]
    begins: np.ndarray
    split: str
    samples: int
    settings: Settings
    destination: Destination

    @cached_property
    def key(self) -> str:
        """Changes with the tokens: entries of other ones, from before a file was corrected, are of no use."""
        return hash_of([(part.tokens_file.name, part.tokens) for part in self.parts])

    @cached_property
    def sample_type(self) -> np.dtype:
        return sample_type(self.settings)

    @property
    def shard_samples(self) -> int:
        return max(1, min(SHARD_SAMPLES, SHARD_BYTES // (self.sample_type.itemsize + 4)))  # MDS spends 4 bytes on the place of a sample


def samples_in(parts: list[Part], settings: Settings) -> int:
    """Samples share one token with the next, and a tail of fewer than T tokens is left out; with answers, a sample is a document."""
    total = sum(_sizes(parts, settings))
    return total if settings.has_answers else max(0, total - 1) // settings.seq_length


def _sizes(parts: list[Part], settings: Settings) -> list[int]:
    return [part.documents if settings.has_answers else part.tokens for part in parts]


def pack(parts: list[Part], split: str, settings: Settings, destination: Destination, workers: int) -> None:
    """Writes the shards and the index of one split to the work folder, or straight to the store; nothing when there is not a sample."""
    from rich.progress import Progress

    samples = samples_in(parts, settings)
    if not samples:
        return
    packing = Packing(parts, np.cumsum([0, *_sizes(parts, settings)]), split, samples, settings, destination)
    shards = range(-(-samples // packing.shard_samples))
    entries = {shard: json.loads(_entry_file(packing, shard).read_text()) for shard in shards if _is_finished(packing, shard)}
    if not entries:
        shutil.rmtree(destination.work / split, ignore_errors=True)
    (destination.work / split).mkdir(exist_ok=True)
    written = run_in_workers(_write_shard, packing, [shard for shard in shards if shard not in entries], workers)
    with Progress() as progress:
        bar = progress.add_task(f"pack {split}", total=len(shards), completed=len(entries))
        for shard, entry in written:
            entries[shard] = entry
            progress.update(bar, advance=1)
    index = {"version": 2, "shards": [entries[shard] for shard in shards]}
    (destination.work / split / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
    destination.upload(f"{split}/{INDEX_FILE}")


def _entry_file(packing: Packing, shard: int) -> Path:
    return packing.destination.work / f"{packing.split}.{shard:05}.{packing.key}.entry"


def _is_finished(packing: Packing, shard: int) -> bool:
    """A shard may have gone to its place already, when a run was killed between its last two steps; then it is written again."""
    there = packing.destination.is_store or (packing.destination.work / packing.split / _shard_name(shard)).is_file()
    return there and _entry_file(packing, shard).is_file()


def _shard_name(shard: int) -> str:
    return f"shard.{shard:05}.mds"


def _write_shard(packing: Packing, shard: int) -> dict[str, Any]:
    """Its entry of the index."""
    from streaming import MDSWriter

    work = packing.destination.work
    first = shard * packing.shard_samples
    last = min(first + packing.shard_samples, packing.samples)
    folder = work / f"{packing.split}.{shard:05}.{os.getpid()}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    columns = {name: f"ndarray:{kind.base}:{kind.shape[0]}" for name, (kind, *_) in packing.sample_type.fields.items()}
    with MDSWriter(columns=columns, out=str(folder), hashes=[SHARD_HASH], size_limit=None) as writer:
        for sample in _samples(packing, first, last):
            writer.write(sample)
    [entry] = json.loads((folder / INDEX_FILE).read_text())["shards"]
    name = _shard_name(shard)
    os.replace(folder / entry["raw_data"]["basename"], work / packing.split / name)
    shutil.rmtree(folder)
    entry["raw_data"]["basename"] = name
    packing.destination.upload(f"{packing.split}/{name}")
    write_json(_entry_file(packing, shard), entry)
    return entry


def _samples(packing: Packing, first: int, last: int) -> Iterator[dict[str, np.ndarray]]:
    """The samples [first, last) of the split, by column."""
    length = packing.settings.seq_length
    if packing.settings.has_answers:
        for record in np.concatenate(list(_pieces(packing, first, last))):
            yield {name: record[name] for name in record.dtype.names}
    else:
        ids = np.concatenate(list(_pieces(packing, first * length, last * length + 1)))
        for begin in range(0, len(ids) - 1, length):
            yield {"tokens": ids[begin : begin + length + 1]}


def _pieces(packing: Packing, begin: int, end: int) -> Iterator[np.ndarray]:
    """What the parts hold of [begin, end) of the split's stream."""
    settings = packing.settings
    number = int(np.searchsorted(packing.begins, begin, side="right")) - 1
    while number < len(packing.parts) and packing.begins[number] < end:
        part, offset = packing.parts[number], int(packing.begins[number])
        within = max(0, begin - offset), min(int(packing.begins[number + 1]), end) - offset
        if within[0] < within[1]:
            yield (read_records if settings.has_answers else read_tokens)(part, *within, settings)
        number += 1
