"""Small data sets for the tests of streaming: every sample says who it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter

from rat_megatron.data.loader.batches import train_batches
from rat_megatron.data.loader.streams import Stream

EOD = 3
T = 2  # samples [number, EOD or 0, number]: the first token says which sample it is
GLOBAL_BATCH = 24


def write_data(folder: Path, train: int, val: int = 0, first: int = 0, **changes) -> str:
    """A data set whose samples say who they are: tokens [id, EOD if id is odd else 0, id]. Ids count from `first`."""
    for split, count in (("train", train), ("val", val)):
        if count:
            columns = {"tokens": f"ndarray:uint32:{T + 1}"}
            with MDSWriter(columns=columns, out=str(folder / split), hashes=["xxh64"], size_limit=4000) as out:  # some shards
                for number in range(first, first + count):
                    out.write({"tokens": np.array([number, EOD if number % 2 else 0, number], np.uint32)})
    meta = {"format_version": 1, "seq_length": T, "vocab_size": 1000, "eod_id": EOD, "tokenizer_name": "t", "tokenizer_hash": "h"}
    splits = {"train": {"samples": train}, "val": {"samples": val}}
    (folder / "rat_meta.json").write_text(json.dumps({**meta, "splits": splits, **changes}))
    return str(folder)


def batches_of(path: str | list[Stream], **changes) -> Iterator[dict[str, torch.Tensor]]:
    """Training microbatches of two samples, read by this process itself."""
    settings = {"samples_per_read": GLOBAL_BATCH, "micro_batch_size": 2, "seq_length": T, "eod_id": EOD, "seed": 7, "num_workers": 0}
    return train_batches([Stream(path)] if isinstance(path, str) else path, **{**settings, **changes})


def ids_of(microbatches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    """Who the samples say they are."""
    return torch.cat([batch["tokens"][:, 0] for batch in microbatches]).tolist()
