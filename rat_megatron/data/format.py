"""The format of prepared data: what `rat-megatron prepare` writes and the loader reads. File names, splits, hashes.

OUTPUT/{train,val}/index.json and shards are MDS; a sample is the column `tokens`, T+1 ids, the first being the last of the sample before.
With answers (fine-tuning) there is a second column, `answer`. OUTPUT/tokenizer is a copy of the tokenizer, OUTPUT/rat_meta.json the facts.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

FORMAT_VERSION = 1
META_FILE = "rat_meta.json"
INDEX_FILE = "index.json"
SPLITS = ("train", "val")
SHARD_HASH = "xxh64"  # of every shard, in index.json
ANSWER_TYPE = "uint32"  # of the column `answer`: where it begins in `tokens`, and the end of its end-of-document id (exclusive)


def hash_of(value: Any) -> str:
    """16 hexadecimal digits for what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Of what decides the ids of a Transformers tokenizer: vocabulary, merges, normalization; not of names, paths or versions."""
    if not tokenizer.is_fast:
        return hash_of(sorted(tokenizer.get_vocab().items()))
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return hash_of({key: value for key, value in parts.items() if key not in ("version", "truncation", "padding")})
