"""A sample corpus of real English text that needs no network: what every installation of this project already carries.

Sources: Python's reference topics, the docstrings and longer comments of the standard library, the docstrings of three packages that torch
brings along, and the descriptions of the installed packages. Enough to try the whole way of the data; not a data set to publish results on.

    python -m rat_megatron.data.corpus OUTPUT [--vocab-size 4096]
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rat_megatron.errors import UserError, exit_2_on_bad_input

EOD_TOKEN = "<|endoftext|>"
PACKAGES = ("numpy", "networkx", "sympy")  # dependencies of torch, rich in explanatory prose
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages", "pydoc_data"}
SHORTEST_DOCUMENT = 200  # characters
SHORTEST_DOCSTRING = 40  # characters: one-line stubs repeat themselves without end
SHORTEST_COMMENT = 3  # lines


@dataclass(frozen=True)
class CorpusTotals:
    """What `build_corpus` wrote: documents and UTF-8 bytes of text, of each source, and how long it took."""

    documents: int
    text_bytes: int
    bytes_per_source: dict[str, int]
    vocab_size: int
    seconds: float


def build_corpus(
    output: Path, vocab_size: Annotated[int, typer.Option(help="At least 257: all bytes and the end-of-document token.")] = 4096
) -> CorpusTotals:
    """Writes OUTPUT/corpus/SOURCE.jsonl, one {"text": ...} a line, and a byte-level BPE tokenizer trained on it to OUTPUT/tokenizer."""
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size} is too small: 256 bytes and {EOD_TOKEN} need at least 257.")
    start = time.perf_counter()
    folder = Path(output) / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    documents, bytes_per_source = 0, {}
    for source, texts in _sources().items():
        size = 0
        with open(folder / f"{source}.jsonl", "w", encoding="utf-8") as out:
            for text in texts:
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                documents, size = documents + 1, size + len(text.encode())
        bytes_per_source[source] = size
    learned = _train_tokenizer(folder, Path(output) / "tokenizer", vocab_size)
    totals = CorpusTotals(documents, sum(bytes_per_source.values()), bytes_per_source, learned, time.perf_counter() - start)
    for source, size in bytes_per_source.items():
        print(f"{source:>22}: {size / 1e6:6.2f} MB")
    print(f"{documents:,} documents, {totals.text_bytes / 1e6:.2f} MB, vocabulary {learned:,}, {totals.seconds:.1f} s")
    print(f"corpus: {folder}   tokenizer: {Path(output) / 'tokenizer'}")
    return totals


def _sources() -> dict[str, Iterator[str]]:
    """Name of each source -> its documents, without repeats across sources (the iterators share what was seen: read them in order)."""
    seen: set[str] = set()
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    sources = {
        "python_topics": _topics(seen),
        "standard_library": _documents_of_folder(standard_library, seen, with_comments=True),
    }
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            sources[name] = _documents_of_folder(Path(spec.origin).parent, seen, with_comments=False)
    sources["package_descriptions"] = _descriptions(seen)
    return sources


def _topics(seen: set[str]) -> Iterator[str]:
    """The language reference by topic, as `help("topics")` shows it."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        text = topics[name].strip()
        if text not in seen:  # some topics have two names
            seen.add(text)
            yield text


def _descriptions(seen: set[str]) -> Iterator[str]:
    """The long descriptions (README files) of the installed packages."""
    distributions = {distribution.metadata["Name"]: distribution for distribution in importlib.metadata.distributions()}
    for name in sorted(distributions, key=str):
        metadata: Any = distributions[name].metadata
        text = (metadata.get_payload() or metadata.get("Description") or "").encode("utf-8", "replace").decode().strip()
        if len(text) >= SHORTEST_DOCUMENT and text not in seen:
            seen.add(text)
            yield text


def _documents_of_folder(root: Path, seen: set[str], with_comments: bool) -> Iterator[str]:
    """One document for each module under `root`: its docstrings and comments in the order of the source."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # old escape sequences in other people's code
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates and files in other encodings
            continue
        parts = _docstrings(tree) + (_comments(source) if with_comments else [])
        fresh = []
        for _, text in sorted(parts):
            if text not in seen:
                seen.add(text)
                fresh.append(text)
        document = "\n\n".join(fresh)
        if len(document) >= SHORTEST_DOCUMENT:
            yield document


def _docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, text) of every docstring; functions and classes are headed by their name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST_DOCSTRING:
                heading = "" if isinstance(node, ast.Module) else f"{node.name}: "
                found.append((node.body[0].lineno, heading + text.encode("utf-8", "replace").decode()))
    return found


def _comments(source: str) -> list[tuple[int, str]]:
    """(line, text) of every block of whole-line comments that is long enough to be prose."""
    found, block = [], []
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and not stripped.startswith("#!"):
            block.append(stripped.lstrip("#").removeprefix(" "))
            continue
        if len(block) >= SHORTEST_COMMENT:
            found.append((number - len(block), "\n".join(block).strip()))
        block = []
    return [(number, text) for number, text in found if len(text) >= SHORTEST_DOCSTRING]


def _train_tokenizer(corpus: Path, output: Path, vocab_size: int) -> int:
    """Trains the tokenizer on the corpus, saves it in Hugging Face form and returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        for path in sorted(corpus.glob("*.jsonl")):
            with open(path, encoding="utf-8") as lines:
                yield from (json.loads(line)["text"] for line in lines)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be written
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD_TOKEN, clean_up_tokenization_spaces=False)
    wrapped.save_pretrained(output)
    return len(wrapped)


if __name__ == "__main__":
    with exit_2_on_bad_input():
        typer.run(build_corpus)
