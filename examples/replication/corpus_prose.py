"""What of a text is English prose, and what of it has been read before: the parts of a corpus that decide what stays."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from corpus_markup import PARAGRAPH, TERM, Block

# Words English cannot do without: half of running text, a third of terse documentation, hardly any of code or other languages.
COMMON_WORDS = frozenset(
    "the of and to a in is that for it as was with be by on not he i this are or his from at which but have an had they you were "
    "their one all we can her has there been if more when will would who so no out up into than them only its time could other "
    "some what these two may then do first any my now such like our over me even most made after also did many before must through "
    "where your how because each between both under same use used using does should without set via per unto thou thee thy shall "
    "said him she".split()
)
SHORTEST_PROSE = 5  # words
COMMON_SHARE = 0.2  # of the words
LETTER_SHARE = 0.75  # of the characters that are no spaces
WORDS = re.compile(r"[A-Za-zÀ-ɏ]+(?:['’][A-Za-z]+)?")
BOILERPLATE = re.compile(
    r"copyright (?:©|\(c\)|\d)|©|all rights reserved|licensed under|permission is hereby granted|without warranty of any kind"
    r"|gnu (?:general|free|lesser)|last (?:updated|modified)|(?:this|the) page (?:is|was)|report (?:a )?bug|javascript is disabled"
    r"|please cite us if you|has been upgraded from version|nightly-only experimental api|this function was introduced in",
    re.IGNORECASE,
)
LONGEST_HEADING = 200  # characters
LONGEST_BOILERPLATE = 500  # characters: prose about licenses is longer


def is_prose(text: str) -> bool:
    """English sentences rather than code, numbers, names, another language, or what stands at the foot of every page."""
    words = [word.lower() for word in WORDS.findall(text)]
    if len(words) < SHORTEST_PROSE or sum(word in COMMON_WORDS for word in words) < COMMON_SHARE * len(words):
        return False
    if sum(map(len, words)) < LETTER_SHARE * (len(text) - text.count(" ")):
        return False
    return not (len(text) < LONGEST_BOILERPLATE and BOILERPLATE.search(text))


def prose_blocks(blocks: Iterable[Block]) -> list[Block]:
    """The headings, and the paragraphs that are prose."""
    return [(level, text) for level, text in blocks if level != PARAGRAPH or is_prose(text)]


def with_needed_headings(blocks: Iterable[Block]) -> list[Block]:
    """The paragraphs, and the headings that stand above one: a heading is dropped where the next of its level or higher comes first.

    A book's title, which stands on each of its pages, comes once.
    """
    kept: list[Block] = []
    pending: list[Block] = []
    title = ""
    for level, text in blocks:
        if level == PARAGRAPH:
            kept += [heading for heading in pending if heading != (1, title)]
            kept.append((level, text))
            title = next((text for level, text in pending if level == 1), title)
            pending = []
        else:
            pending = [heading for heading in pending if heading[0] < level]
            pending.append((level, text[:LONGEST_HEADING]))
    return kept


class Deduplicator:
    """Knows every paragraph that it was given, whatever its case, digits and punctuation."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def fresh(self, blocks: Iterable[Block]) -> tuple[list[Block], int]:
        """The blocks without paragraphs seen before (headings and terms may repeat), and the bytes that this leaves out."""
        kept, dropped = [], 0
        for level, text in blocks:
            if level == PARAGRAPH:
                key = hashlib.blake2b(" ".join(WORDS.findall(text.lower())).encode(), digest_size=10).digest()
                if key in self._seen:
                    dropped += len(text.encode())
                    continue
                self._seen.add(key)
            kept.append((level, text))
        return kept, dropped


def as_text(blocks: Iterable[Block]) -> str:
    """A paragraph after the other; a term stands before its explanation, as a heading does."""
    lines: list[str] = []
    for level, text in blocks:
        lines.append(text + ("\n" if level >= TERM else "\n\n"))
    return "".join(lines).strip()
