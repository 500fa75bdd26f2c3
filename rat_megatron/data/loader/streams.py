"""The streams of --data-path, what they say about themselves, and all that can be checked of them before training starts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rat_megatron.data.format import FORMAT_VERSION, INDEX_FILE, META_FILE, SHARD_HASH, SPLITS
from rat_megatron.data.loader.download import Downloader
from rat_megatron.errors import UserError

SHARDS_AT_LEAST = 4  # in a cache with a limit; Streaming asks for as many


@dataclass(frozen=True)
class Stream:
    """A data set made by `rat-megatron prepare`: a local folder or a URL, and its share of the samples (None: by size)."""

    path: str
    weight: float | None = None

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @cached_property
    def downloader(self) -> Downloader:
        """What fetches the files of a remote stream."""
        return Downloader()


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


def check_streams(
    streams: list[Stream],
    *,
    seq_length: int,
    vocab_size: int | None = None,
    cache: str | None = None,
    cache_limit: int | None = None,
    validation: list[Stream] | None = None,
) -> DataMeta:
    """Checks all that can be checked without reading a sample, and raises UserError for the first thing that is wrong.

    Every stream has a readable rat_meta.json; all share tokenizer, end-of-document id and T; T is `seq_length`; the ids fit
    `vocab_size`, the model's, unless None; every shard has a hash, and those of a local stream are there in full; `cache_limit` bytes
    are enough, also for the `validation` streams where these are others. The index of a remote stream is fetched anew, so that a cache
    made from older data under the same URL is noticed shard by shard."""
    metas = [read_meta(stream, cache) for stream in streams]
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
        for split, totals in meta["splits"].items():
            if totals["samples"]:
                _check_shards(stream, split, totals["samples"], cache)
    samples = {split: [meta["splits"][split]["samples"] for meta in metas] for split in SPLITS}
    together = DataMeta(
        seq_length=seq_length,
        vocab_size=max(meta["vocab_size"] for meta in metas),
        eod_id=first["eod_id"],
        tokenizer_path=f"{first_path}/tokenizer",
        tokenizer_name=first["tokenizer_name"],
        tokenizer_hash=first["tokenizer_hash"],
        train_samples=sum(samples["train"]),
        val_samples=sum(samples["val"]) if all(samples["val"]) else 0,
    )
    training_cache_limit(streams, cache, cache_limit, validation)
    return together


def _check_shards(stream: Stream, split: str, samples: int, cache: str | None) -> None:
    if stream.is_remote:
        _download_index(stream, split, cache)
    shards = read_index(stream, split, cache)
    if (listed := sum(shard["samples"] for shard in shards)) != samples:
        raise UserError(
            f"{stream.path}/{split}/{INDEX_FILE} lists {listed} samples, {META_FILE} says {samples}: copy or prepare the data anew."
        )
    for shard in shards:
        path, info = f"{stream.path}/{split}/{shard['raw_data']['basename']}", shard["raw_data"]
        if SHARD_HASH not in info["hashes"]:
            raise UserError(f"{stream.path}/{split}/{INDEX_FILE} has no {SHARD_HASH} hash of shard {path}: prepare the data anew.")
        if stream.is_remote:
            continue
        if not os.path.isfile(path):
            raise UserError(f"shard {path} is missing: copy or prepare the data anew.")
        if (size := os.path.getsize(path)) != info["bytes"]:
            raise UserError(f"shard {path} has {size} bytes instead of {info['bytes']}: copy or prepare the data anew.")


def training_cache_limit(streams: list[Stream], cache: str | None, limit: int | None, validation: list[Stream] | None = None) -> int | None:
    """The part of `limit`, the bytes of the cache, that training may fill: what the validation shards leave, as those all stay. They are
    those of the `validation` streams, or else of `streams`.

    None without a limit or a remote stream. Raises UserError when the disk is smaller, and when training would be left too little."""
    remote = [stream for stream in streams if stream.is_remote]
    if limit is None or not remote:
        return None
    folder = cache_folder(remote[0], cache)
    folder.mkdir(parents=True, exist_ok=True)
    if (disk := shutil.disk_usage(folder).total) < limit:
        raise UserError(f"--rat-data-cache-limit of {limit:,} bytes is more than the disk of {cache} has, {disk:,}: lower it.")
    validated = [stream for stream in validation or streams if stream.is_remote and samples_of(stream, "val", cache)]
    stays = sum(shard["raw_data"]["bytes"] for stream in validated for shard in read_index(stream, "val", cache))
    shards = [shard["raw_data"]["bytes"] for stream in streams for shard in read_index(stream, "train", cache)]
    indices = sum(_index_path(stream, "train", cache).stat().st_size for stream in streams)
    needed = stays + indices + SHARDS_AT_LEAST * max(shards) + 1
    if limit < needed:
        raise UserError(
            f"--rat-data-cache-limit of {limit:,} bytes is too low for the validation shards and {SHARDS_AT_LEAST} training shards: "
            f"give at least {needed:,}, and much more to keep shards for the next epoch."
        )
    return limit - stays


# ---- the files of a stream -----------------------------------------------------------------------------------------------------------


def read_meta(stream: Stream, cache: str | None) -> dict[str, Any]:
    """rat_meta.json. Raises UserError when it is missing, damaged or of another version."""
    path = Path(stream.path) / META_FILE
    if stream.is_remote:
        path = cache_folder(stream, cache) / f"{META_FILE}.{os.getpid()}"  # every rank fetches its own: no barrier needed
        path.unlink(missing_ok=True)
        stream.downloader.download(f"{stream.path}/{META_FILE}", path)
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a folder that `rat-megatron prepare` has finished.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the data anew.") from error
    finally:
        if stream.is_remote:
            path.unlink(missing_ok=True)
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format {meta.get('format_version')}, this version reads {FORMAT_VERSION}: prepare the data anew.")
    return meta


def samples_of(stream: Stream, split: str, cache: str | None) -> int:
    """Samples of a split, 0 without it."""
    return read_meta(stream, cache)["splits"][split]["samples"]


def read_index(stream: Stream, split: str, cache: str | None) -> list[dict[str, Any]]:
    """The shards of a split that is there, in order, as its index.json describes them. Raises UserError."""
    path = _index_path(stream, split, cache)
    if stream.is_remote and not path.is_file():
        _download_index(stream, split, cache)
    try:
        return json.loads(path.read_text())["shards"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or prepare the data anew.") from error


def cache_folder(stream: Stream, cache: str | None) -> Path:
    """The folder of a remote stream in the cache; Streaming wants one for each split, beneath it."""
    if cache is None:
        raise UserError(f"--data-path {stream.path} is a URL: name a local folder for its shards with --data-cache-path.")
    return Path(cache) / hashlib.sha256(stream.path.encode()).hexdigest()[:16]


def _download_index(stream: Stream, split: str, cache: str | None) -> None:
    """Puts the store's index where Streaming looks for it. Every rank does so, and each replaces it as a whole."""
    stream.downloader.download(f"{stream.path}/{split}/{INDEX_FILE}", _index_path(stream, split, cache))


def _index_path(stream: Stream, split: str, cache: str | None) -> Path:
    return (cache_folder(stream, cache) if stream.is_remote else Path(stream.path)) / split / INDEX_FILE
