"""How fast one rank's loader hands out microbatches, beside what a GPU takes: .venv/bin/python benchmarks/loader.py

Without --data-path it writes random tokens of the length of a pretraining run's samples to a temporary folder. The first batches, which
find the shards unchecked and the workers just started, are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from rat_megatron.data.loader.batches import train_batches
from rat_megatron.data.loader.streams import Stream, parse_data_path, read_meta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", nargs="+", help="streams as in training; default: random tokens")
    parser.add_argument("--data-cache-path", help="as in training, for remote streams")
    parser.add_argument("--seq-length", type=int, default=4096, help="of the random tokens")
    parser.add_argument("--samples", type=int, default=32768, help="of random tokens")
    parser.add_argument("--batch", type=int, default=8, help="samples of a global batch that this rank gets")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--num-workers", type=int, default=2, help="as in training")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of the rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--consumed", type=float, default=8947.0, help="tokens/s that a GPU trains on; default: 2.6B on an H100")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        streams = parse_data_path(args.data_path or [_random_data(Path(folder), args.samples, args.seq_length)])
        result = measure(streams, args)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"first batch after {result['first_batch_seconds']:.2f} s (start of {args.num_workers} workers, checks of shards)")
        print(f"loader   {result['tokens_per_second']:>12,.0f} tokens/s (median of {args.rounds}; lowest {result['lowest']:,.0f})")
        print(f"consumed {args.consumed:>12,.0f} tokens/s by one GPU")
        print(f"ratio    {result['ratio']:>12.0f} x   on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def measure(streams: list[Stream], args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of this process and its workers, in rounds of --seconds, after one round that is not counted."""
    seq_length = read_meta(streams[0], args.data_cache_path)["seq_length"]
    started = time.perf_counter()
    batches = train_batches(
        streams,
        samples_per_read=args.batch,
        micro_batch_size=args.micro_batch_size,
        seq_length=seq_length,
        eod_id=0,
        seed=1,
        num_workers=args.num_workers,
        cache=args.data_cache_path,
    )
    next(batches)
    first = time.perf_counter() - started
    rates = [_rate(batches, args.seconds, args.micro_batch_size * seq_length) for _ in range(args.rounds + 1)][1:]
    median = statistics.median(rates)
    return {"tokens_per_second": median, "lowest": min(rates), "first_batch_seconds": first, "ratio": median / args.consumed}


def _rate(batches, seconds: float, tokens: int) -> float:
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in islice(batches, 10):
            count += tokens
    return count / (time.perf_counter() - started)


def _random_data(folder: Path, samples: int, seq_length: int) -> str:
    from streaming import MDSWriter

    random = np.random.default_rng(1)
    with MDSWriter(columns={"tokens": f"ndarray:uint16:{seq_length + 1}"}, out=str(folder / "train"), hashes=["xxh64"]) as out:
        for _ in range(samples):
            out.write({"tokens": random.integers(0, 1 << 16, seq_length + 1, np.uint16)})
    meta = {"format_version": 1, "seq_length": seq_length, "splits": {"train": {"samples": samples}, "val": {"samples": 0}}}
    (folder / "rat_meta.json").write_text(json.dumps(meta))
    return str(folder)


if __name__ == "__main__":
    main()
