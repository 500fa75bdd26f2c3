"""Questions with answers, for fine-tuning: every document is a sample of its own, and only its answer counts in the loss.

A sample is prompt, answer and the end-of-document id, filled up with that id to T+1 tokens. Prompt and answer are tokenized apart, so that
the prompt's ids are those of the prompt alone, as an evaluation gives it to the model; a space between the two must be in the text of one.
Several documents never share a sample: RAT+'s recurrence does not reset at their ends, so that one would see the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rat_megatron.data.format import ANSWER_TYPE

if TYPE_CHECKING:
    from rat_megatron.data.prepare.settings import Settings
    from rat_megatron.data.prepare.tokenizing import Part


def sample_type(settings: Settings) -> np.dtype:
    """A sample, with answers or without: its fields are the columns of the MDS shards."""
    answer = [("answer", ANSWER_TYPE, (2,))] if settings.answer_column else []
    return np.dtype([("tokens", settings.token_dtype, (settings.seq_length + 1,)), *answer])


def answer_record(prompt: list[int], answer: list[int], settings: Settings) -> np.ndarray:
    """The sample of one document, a scalar of `sample_type`. Prompt and answer have at most T tokens together."""
    record = np.empty((), sample_type(settings))
    end = len(prompt) + len(answer)
    record["tokens"][:end] = prompt + answer
    record["tokens"][end:] = settings.eod_id
    record["answer"] = len(prompt), end + 1
    return record


def read_records(part: Part, begin: int, end: int, settings: Settings) -> np.ndarray:
    """The samples [begin, end) of a part, counted among the documents that are kept; `end` is above `begin`."""
    kept = np.delete(np.arange(part.documents + len(part.dropped)), part.dropped)[begin:end]
    dtype, first = sample_type(settings), int(kept[0])
    return np.fromfile(part.tokens_file, dtype, int(kept[-1]) - first + 1, offset=first * dtype.itemsize)[kept - first]
