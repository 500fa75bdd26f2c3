"""Exact deduplication for `prepare`: of documents with the same text, the first in the order of the inputs stays.

The workers hash every document (128 bits, 24 bytes a document on disk); here the hashes of a split are sorted, in several passes
when they are more than fit the memory that is allowed. The result depends on the inputs alone. Nothing is written again: whoever reads
a part leaves out what is dropped.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rat_megatron.data.prepare.settings import Settings
from rat_megatron.data.prepare.tokenizing import INDEX_TYPE, Part, sample_type

MEMORY_PER_DOCUMENT = 64  # bytes at the peak of a pass: 57 measured; besides 16 for every duplicate of all passes
MEMORY = 4 << 30  # bytes of a pass: 67 million documents; more documents take further passes over the hashes


def drop_duplicates(parts: list[Part]) -> list[Part]:
    """The parts of one split, each with the documents whose text came before, in this or an earlier part, dropped."""
    begins = np.cumsum([0, *(part.documents for part in parts)])
    duplicates = _find_duplicates(parts, begins)
    cuts = np.searchsorted(duplicates, begins)
    result = []
    for part, begin, first, last in zip(parts, begins, cuts, cuts[1:], strict=False):
        if first < last:
            dropped = duplicates[first:last] - begin
            tokens = int(_read_index(part)["tokens"][dropped].sum())
            part = replace(part, documents=part.documents - len(dropped), tokens=part.tokens - tokens, dropped=dropped)
        result.append(part)
    return result


def _find_duplicates(parts: list[Part], begins: np.ndarray) -> np.ndarray:
    """[duplicates] ascending numbers of the documents, counted through all parts, that repeat an earlier one."""
    passes = max(1, -(-int(begins[-1]) * MEMORY_PER_DOCUMENT // MEMORY))
    width = np.uint64((2**64 - 1) // passes)
    found = [np.empty(0, np.int64)]
    for number in range(passes):
        columns: list[list[np.ndarray]] = [[], [], []]
        for part, begin in zip(parts, begins, strict=False):
            index = _read_index(part)
            chosen = np.flatnonzero(np.minimum(index["first"] // width, passes - 1) == number)
            for column, values in zip(columns, (index["first"][chosen], index["second"][chosen], chosen + begin), strict=True):
                column.append(values)
        first, second, document = (np.concatenate(column) for column in columns)
        del columns
        order = np.lexsort((second, first))  # stable: copies stay in the order of the inputs
        repeated = (np.diff(first[order]) == 0) & (np.diff(second[order]) == 0)
        found.append(document[order[1:][repeated]])
    return np.sort(np.concatenate(found))


# ---- reading what is kept -----------------------------------------------------------------------------------------------------------


def read_tokens(part: Part, begin: int, end: int, settings: Settings) -> np.ndarray:
    """The tokens [begin, end) of a part, counted among those of the documents that are kept."""
    dtype = np.dtype(settings.token_dtype)
    if not len(part.dropped):
        return np.fromfile(part.tokens_file, dtype, end - begin, offset=begin * dtype.itemsize)
    lengths = _read_index(part)["tokens"].astype(np.int64)
    kept = np.ones(len(lengths), bool)
    kept[part.dropped] = False
    kept_ends, ends = np.cumsum(lengths * kept), np.cumsum(lengths)
    first, last = np.searchsorted(kept_ends, begin, side="right"), np.searchsorted(kept_ends, end, side="left")  # documents
    before = int(ends[first] - lengths[first])
    ids = np.fromfile(part.tokens_file, dtype, int(ends[last]) - before, offset=before * dtype.itemsize)
    ids = ids[np.repeat(kept[first : last + 1], lengths[first : last + 1])]
    skipped = begin - int(kept_ends[first] - lengths[first])
    return ids[skipped : skipped + end - begin]


def read_records(part: Part, begin: int, end: int, settings: Settings) -> np.ndarray:
    """The samples with answers [begin, end) of a part, counted among the documents that are kept; `end` is above `begin`."""
    kept = np.delete(np.arange(part.documents + len(part.dropped)), part.dropped)[begin:end]
    dtype, first = sample_type(settings), int(kept[0])
    return np.fromfile(part.tokens_file, dtype, int(kept[-1]) - first + 1, offset=first * dtype.itemsize)[kept - first]


def _read_index(part: Part) -> np.ndarray:
    """[documents] of INDEX_TYPE, dropped ones too."""
    return np.fromfile(part.index_file, INDEX_TYPE)
