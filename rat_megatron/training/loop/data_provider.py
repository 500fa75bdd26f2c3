"""From --data-path to the iterators that Megatron's loop draws microbatches from."""

from __future__ import annotations

import itertools

from megatron.core import mpu
from megatron.training import get_args

from rat_megatron.data.loader.batches import train_batches, validation_batches
from rat_megatron.data.loader.streams import parse_data_path
from rat_megatron.training.arguments.data import validation_streams
from rat_megatron.training.loop.arl import StepIterator
from rat_megatron.training.loop.validation import RestartableIterator


class DataProvider:
    """Megatron's train_valid_test_datasets_provider: iterators for training, from the samples consumed so far on, and for validation.

    Megatron calls it once for every virtual pipeline chunk: each gets iterators of its own over the same batches. There is no test set.
    """

    is_distributed = True  # every rank reads its own samples; ranks of one model replica read the same

    def __init__(self):
        self._of_chunks: list[tuple] = []

    def __call__(self, num_samples: list[int | None], vp_stage: int | None = None):
        if not vp_stage:
            train, valid = _build_batches()
            chunks = get_args().virtual_pipeline_model_parallel_size or 1
            self._of_chunks = [(branch, valid) for branch in (itertools.tee(train, chunks) if train else [None] * chunks)]
        train, valid = self._of_chunks[vp_stage or 0]
        return train and StepIterator(train), RestartableIterator(valid) if valid else None, None


def _build_batches():
    """What the streams give this rank: training microbatches without end, and those of one validation of each set."""
    args = get_args()
    streams = parse_data_path(args.data_path)
    common = {
        "seq_length": args.seq_length,
        "eod_id": args.rat_eod_id,
        "data_parallel": (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()),
        "num_workers": args.num_workers,
        "cache": args.data_cache_path,
    }
    train, valid = None, []
    if not args.skip_train:
        train = train_batches(
            streams,
            micro_batch_size=args.micro_batch_size,
            samples_per_read=max(args.global_batch_size // mpu.get_data_parallel_world_size(), 1),
            seed=args.seed,
            consumed_samples=args.consumed_train_samples,
            cache_limit=args.rat_data_cache_limit,
            validation=[stream for of_set in validation_streams(args) for stream in of_set],
            **common,
        )
    for of_set, iterations in zip(validation_streams(args), args.rat_validation_sets.values(), strict=False):  # none without validation
        valid += [
            validation_batches(
                of_set,
                global_batch_size=args.eval_global_batch_size,
                micro_batch_size=args.eval_micro_batch_size,
                num_samples=iterations * args.eval_global_batch_size,
                **common,
            )
        ]
    return train, valid
