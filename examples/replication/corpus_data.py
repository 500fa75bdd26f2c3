"""Documentation that programs read, as blocks of plain text: JSON descriptions of services, the YAML in Ansible's modules; and the formats
of the literary texts.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

import yaml
from corpus_markup import PARAGRAPH, TERM, Block, Page, add_block, decoded, html_blocks, html_page

# Keys of service descriptions that group what they hold, and name nothing of their own.
GROUPS = set("operations shapes members resources methods schemas properties parameters items member key value".split())
ZLIB_HEADER = b"\x78\x9c"
ANSIBLE_STRINGS = re.compile(r"^(DOCUMENTATION|RETURN)\s*=\s*[rRuU]?(\"\"\"|''')(.*?)\2", re.DOTALL | re.MULTILINE)
ANSIBLE_MARKUP = re.compile(r"\b(?:[BCIMVOEPU]|RV)\(([^()]*(?:\([^()]*\))?[^()]*)\)|\b[LR]\(([^(),]*),[^()]*\)|\bHORIZONTALLINE\b")


def json_page(path: str, data: bytes) -> Page:
    """The descriptions in a JSON file at any depth, below the names of what they describe: plain text, or HTML as botocore has it."""
    page = Page()
    content = json.loads(data)
    title = content.get("title") or content.get("metadata", {}).get("serviceFullName", "")
    add_block(page.blocks, 1, title)
    _describe(content, page.blocks, 0)
    return page


def _describe(node: Any, blocks: list[Block], level: int) -> None:
    if isinstance(node, list):
        for item in node:
            _describe(item, blocks, level)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("documentation"), str):
        blocks.extend(block for block in html_blocks(node["documentation"]) if block[0] == PARAGRAPH)
    if isinstance(node.get("description"), str):
        for paragraph in re.split(r"\n\s*\n", re.sub(r"<[^<>]*>", " ", node["description"])):
            add_block(blocks, PARAGRAPH, paragraph)
    for text in node.get("enumDescriptions", []):
        add_block(blocks, PARAGRAPH, text)
    for key, value in node.items():
        if isinstance(value, dict | list):
            if key not in GROUPS:
                add_block(blocks, TERM + level, key)
            _describe(value, blocks, level + (key not in GROUPS))


def ansible_page(path: str, data: bytes) -> Page:
    """What an Ansible module or plugin says of itself, its options and the values it returns."""
    page = Page()
    for name, _, text in ANSIBLE_STRINGS.findall(decoded(data)):
        try:
            content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, ValueError):  # a template, or a date that is none
            continue
        if isinstance(content, dict):
            if name == "DOCUMENTATION":
                _module(content, page.blocks)
            else:
                add_block(page.blocks, 2, "Return values")
                _options(content, page.blocks)
    return page


def _module(content: dict[str, Any], blocks: list[Block]) -> None:
    name = content.get("module") or content.get("name") or ""
    add_block(blocks, 1, f"{name}: {_plain_ansible(content.get('short_description') or '')}")
    _texts(content.get("description"), blocks)
    if content.get("requirements"):
        add_block(blocks, 2, "Requirements")
        _texts(content["requirements"], blocks)
    add_block(blocks, 2, "Options")
    _options(content.get("options"), blocks)
    add_block(blocks, 2, "Notes")
    _texts(content.get("notes"), blocks)


def _options(options: Any, blocks: list[Block], level: int = TERM) -> None:
    for name, option in options.items() if isinstance(options, dict) else ():
        if isinstance(option, dict):
            add_block(blocks, level, str(name))
            _texts(option.get("description"), blocks)
            _options(option.get("suboptions") or option.get("contains"), blocks, level + 1)


def _texts(texts: Any, blocks: list[Block]) -> None:
    for text in texts if isinstance(texts, list) else [texts]:
        if isinstance(text, str):
            add_block(blocks, PARAGRAPH, _plain_ansible(text))


def _plain_ansible(text: str) -> str:
    return ANSIBLE_MARKUP.sub(lambda match: match[1] or match[2] or "", text)


def brown_page(path: str, data: bytes) -> Page:
    """A sample of the Brown corpus: every word has its part of speech behind a slash, a paragraph is indented or follows an empty line."""
    page = Page()
    for paragraph in re.split(r"\n\s*\n", decoded(data)):
        words = [re.sub(r"/[^/]*$", "", word) for word in paragraph.split()]
        add_block(page.blocks, PARAGRAPH, _joined_words(words))
    return page


def _joined_words(words: list[str]) -> str:
    text = " ".join(words)
    text = re.sub(r" ([.,;:?!)%]|'')(?=[ ]|$)", r"\1", text)
    text = re.sub(r"(^| )(``|[($]) ", r"\1\2", text)
    return re.sub(r"([.?!;,])\1", r"\1", text).replace("``", '"').replace("''", '"')


def sword_page(path: str, data: bytes) -> Page:
    """A testament as SWORD keeps it: a zlib stream of OSIS XML for each book, with bytes of no meaning between them."""
    books, start = [], data.find(ZLIB_HEADER)
    while start >= 0:
        stream = zlib.decompressobj()
        try:
            books.append(stream.decompress(data[start:]))
            start = data.find(ZLIB_HEADER, len(data) - len(stream.unused_data))
        except zlib.error:
            start = data.find(ZLIB_HEADER, start + 1)
    return html_page(path, re.sub(rb"<note\b.*?</note>", b"", b"".join(books), flags=re.DOTALL))


def text_page(path: str, data: bytes) -> Page:
    """Plain text whose paragraphs are parted by empty lines."""
    page = Page()
    for paragraph in re.split(r"\n\s*\n", decoded(data)):
        add_block(page.blocks, PARAGRAPH, paragraph)
    return page
