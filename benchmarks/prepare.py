"""How fast `rat-megatron prepare` tokenizes on one core, against the tokenizer's own batch speed in the same process on the same text.

    python benchmarks/prepare.py [--text FILE...] [--tokenizer FOLDER] [--rounds 7] [--json]

Without --text, the offline sample corpus and a tokenizer of 32,000 words trained on it. What a worker does with a unit (read, decode,
tokenize, hash, write) is measured for JSONL, gzipped JSONL and Parquet and with --deduplicate, each time right after the tokenizer
alone (`encode_batch_fast` on texts in memory, its ids not even read). A ratio is the median over the rounds. Seconds are those of the
processor, so that other load on the machine counts little; waiting for a disk is not in them. Packing is timed by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

import pyarrow
import pyarrow.parquet

from rat_megatron.data.corpus import build_corpus
from rat_megatron.data.prepare import tokenizing
from rat_megatron.data.prepare.destination import Destination
from rat_megatron.data.prepare.documents import plan_units, read_documents
from rat_megatron.data.prepare.inputs import list_files
from rat_megatron.data.prepare.packing import pack
from rat_megatron.data.prepare.settings import load_tokenizer, make_settings

VOCABULARY = 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", type=Path, help="input files of prepare; default: the offline sample corpus")
    parser.add_argument("--tokenizer", help="default: trained on the sample corpus")
    parser.add_argument("--megabytes", type=float, default=3, help="of text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # progress bars are no part of the result
        result = measure(Path(folder), arguments.text, arguments.tokenizer, arguments.megabytes, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['documents']:,} documents, {result['tokens']:,} tokens, {result['rounds']} rounds, load {result['load']:.1f}")
    print(f"{'':24}{'tokens/s a core':>16}{'of the tokenizer':>18}{'lowest':>8}{'highest':>9}")
    for name, row in result["rows"].items():
        ratios = f"{row['ratio']:>17.1%}{row['lowest']:>9.1%}{row['highest']:>9.1%}" if "ratio" in row else ""
        print(f"{name:24}{row['tokens_per_second']:>16,.0f}{ratios}")


def measure(folder: Path, text: list[Path] | None, tokenizer_name: str | None, megabytes: float, rounds: int) -> dict[str, Any]:
    """Medians over the rounds; `load` is the machine's mean load of the last minute at the end."""
    if not (text and tokenizer_name):
        build_corpus(folder, vocab_size=VOCABULARY)
    tokenizer = load_tokenizer(tokenizer_name or str(folder / "tokenizer"))
    settings = make_settings(
        tokenizer, "benchmark", eod_token=None, seq_length=4096, text_column="text", answer_column=None,
        val_fraction=0.005, seed=1, deduplicate=False, special_tokens="split",
    )  # fmt: skip
    text_tokenizer = tokenizing.text_tokenizer(tokenizer, settings)
    texts = _read(text or [folder / "corpus"], megabytes)
    units = {}
    for name, path in _write_inputs(folder, texts).items():
        [units[name]] = plan_units(list_files([path], excluded=folder / "out"), {"--text-column": "text"})
    work = folder / "work"
    work.mkdir()
    runs: dict[str, Callable[[], Any]] = {}
    for name, unit in units.items():
        runs[f"prepare, {name}"] = lambda unit=unit: tokenizing.tokenize_unit((work, text_tokenizer, settings), unit)
    with_hashes = replace(settings, deduplicate=True)
    runs["prepare, deduplicate"] = lambda: tokenizing.tokenize_unit((work, text_tokenizer, with_hashes), units["jsonl"])

    seconds: dict[str, list[float]] = {name: [] for name in ("tokenizer alone", *runs)}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    _tokenizer_alone(tokenizer, texts)  # fills the tokenizer's cache of words
    for _ in range(rounds):
        for name, run in runs.items():
            alone, own = _seconds(lambda: _tokenizer_alone(tokenizer, texts)), _seconds(run)
            seconds["tokenizer alone"].append(alone)
            seconds[name].append(own)
            ratios[name].append(alone / own)
    counts = json.loads((work / f"{units['jsonl'].key}.json").read_text())
    tokens = sum(count["tokens"] for count in counts.values())
    rows: dict[str, dict[str, float]] = {name: {"tokens_per_second": tokens / statistics.median(times)} for name, times in seconds.items()}
    for name, found in ratios.items():
        rows[name] |= {"ratio": statistics.median(found), "lowest": min(found), "highest": max(found)}
    rows["packing"] = {"tokens_per_second": counts["train"]["tokens"] / _packing_seconds(units["jsonl"], work, tokenizer, settings)}
    return {"documents": len(texts), "tokens": tokens, "rounds": rounds, "load": os.getloadavg()[0], "rows": rows}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _read(paths: list[Path], megabytes: float) -> list[str]:
    texts, size = [], 0
    for unit in plan_units(list_files(paths, excluded=Path("/nowhere")), {"--text-column": "text"}):
        for (document,) in read_documents(unit, {"--text-column": "text"}):
            texts.append(document)
            size += len(document)
            if size >= megabytes * 1e6:
                return texts
    return texts


def _write_inputs(folder: Path, texts: list[str]) -> dict[str, Path]:
    """The same documents, each file small enough to be one unit."""
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    paths = {name: folder / f"in.{name}" for name in ("jsonl", "jsonl.gz", "parquet")}
    paths["jsonl"].write_bytes(lines)
    paths["jsonl.gz"].write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), paths["parquet"], compression="zstd", row_group_size=1000)
    return paths


def _tokenizer_alone(tokenizer: Any, texts: list[str]) -> None:
    for batch in tokenizing._batches((text,) for text in texts):
        tokenizer.backend_tokenizer.encode_batch_fast([text for (text,) in batch], add_special_tokens=False)


def _packing_seconds(unit: Any, work: Path, tokenizer: Any, settings: Any) -> float:
    parts, _ = tokenizing.tokenize([unit], work, tokenizer, settings, workers=1)
    parts = parts["train"] * 16  # a few whole shards
    started = time.perf_counter()
    pack(parts, "train", settings, Destination(str(work), work, is_store=False), workers=1)
    return (time.perf_counter() - started) / 16


if __name__ == "__main__":
    main()
