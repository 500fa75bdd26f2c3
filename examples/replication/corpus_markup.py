"""Markup that people read, HTML, man pages and POD, as blocks of plain text: headings and paragraphs, without menus and listings.

Real pages leave tags open, nest what they should not and mark menus by classes of their own, so these readers keep what looks like
running text and care little for the rest.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

PARAGRAPH, TERM = 0, 7  # levels of a block: 1 to 6 are headings, 7 and above terms that are explained, in lists within lists
Block = tuple[int, str]  # level and text, on one line

# Elements whose content is not running text.
SKIPPED_TAGS = set("script style nav aside pre form button select option svg math footer textarea object noscript info".split())
SKIPPED_CLASSES = set(
    # Sphinx, DocBook, Texinfo, Doxygen
    "sphinxsidebar related headerlink viewcode-link toc toctree-wrapper contents navheader navfooter header-panel navbar nav-panel "
    "genindextable copyright copyright-footer spirit-nav legalnotice modindextable indextable footer breadcrumb breadcrumbs "
    "sidebar highlight literal-block programlisting screen synopsis funcsynopsis abstract-toc shortcontents node-path toplang "
    "bottomlang "
    # javadoc
    "top-nav sub-nav skip-nav summary member-signature type-signature modifiers return-type legal-copy inheritance inherited-list "
    # rustdoc, mdBook
    "item-decl code-header srclink since notable-traits example-wrap rustdoc-toggle-summary sidebar-elems "
    # Erlang, LibreOffice, Free Pascal, Qt
    "topbar leftnav-tube fun-types relatedtopics howtoget bug bar naviNextPrevious navigationbar buildversion nav_header "
    "nav_footer".split()
)
SKIPPED_ROLES = {"navigation", "search", "banner", "contentinfo"}
CLASSED_TAGS = set("div span section ul ol dl table a header details blockquote".split())  # those that are always closed
BLOCK_TAGS = set("p div section article main li ul ol dd dl td th tr table blockquote hr body caption figcaption header page item".split())


@dataclass
class Page:
    """The blocks of one file, and the path of the file that the reader is to turn to next, where the file says so."""

    blocks: list[Block] = field(default_factory=list)
    next_path: str | None = None


def html_page(path: str, data: bytes) -> Page:
    """HTML, and XML with the same names of elements (Mallard)."""
    reader = _HtmlReader()
    reader.feed(decoded(data))
    reader.close()
    reader.end_block()
    target = reader.next_target.split("#")[0]
    return Page(reader.blocks, posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) if target else None)


def html_blocks(text: str) -> list[Block]:
    """The blocks of a piece of HTML."""
    return html_page("", text.encode()).blocks


def decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


class _HtmlReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.next_target = ""
        self._level = PARAGRAPH
        self._text: list[str] = []
        self._lists = 0  # of terms, that are open
        self._skipped, self._depth = "", 0  # the element being skipped, and how many of its name are open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
            return
        values = dict(attributes)
        if tag in ("a", "link"):
            if "next" in (values.get("rel") or "").split() and values.get("href"):
                self.next_target = values["href"] or ""
        if _is_skipped(tag, values):
            self._skipped, self._depth = tag, 1
            if tag not in ("a", "span"):
                self.end_block()
        elif tag == "br" or values.get("class") == "classifier":  # Sphinx has a style sheet part the type from the name
            self._text.append(" ")
        elif re.fullmatch("h[1-6]|title|dt", tag):
            self.end_block()
            self._level = max(TERM, TERM + self._lists - 1) if tag == "dt" else 1 if tag == "title" else int(tag[1])
        elif tag in BLOCK_TAGS:
            self.end_block(keep_level=tag in ("div", "p") and self._level in range(1, TERM))
            self._lists += tag == "dl"

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("link", "br", "hr", "div"):
            self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            if not self._depth:
                self._skipped = ""
        elif tag == "head":  # the title of the page is its first heading too
            self._text.clear()
            self.blocks.clear()
            self._level = PARAGRAPH
        elif re.fullmatch("h[1-6]|title|dt", tag):
            self.end_block()
        elif tag in BLOCK_TAGS:
            self.end_block(keep_level=tag in ("div", "p") and self._level in range(1, TERM))
            self._lists -= tag == "dl"

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._text.append(data)

    def end_block(self, keep_level: bool = False) -> None:
        """What was read since the last block becomes one. A heading goes on across the elements in it."""
        if keep_level:
            self._text.append(" ")
            return
        add_block(self.blocks, self._level, "".join(self._text))
        self._text.clear()
        self._level = PARAGRAPH


def _is_skipped(tag: str, values: dict[str, str | None]) -> bool:
    if tag in SKIPPED_TAGS or values.get("role") in SKIPPED_ROLES:
        return True
    return tag in CLASSED_TAGS and not SKIPPED_CLASSES.isdisjoint((values.get("class") or "").split())


def add_block(blocks: list[Block], level: int, text: str) -> None:
    """Adds the text, on one line and without the signs that link to a heading; no text adds nothing."""
    text = " ".join(text.replace("\u00b6", " ").replace("\u200b", "").split())
    if text:
        blocks.append((level, text.encode("utf-8", "replace").decode()))


MAN_ESCAPES = [
    (re.compile(r"\\f(\[\w*\]|\(..|.)|\\[&/,|^%:]|\\s[-+]?\d|\\m\[.*?\]"), ""),
    (re.compile(r"\\\(aq|\\\[aq\]|\\\(cq"), "'"),
    (re.compile(r"\\\((?:lq|rq|dq)|\\\*\(?[lr]q|\\\[[lr]q\]"), '"'),
    (re.compile(r"\\\((?:em|en)|\\\[(?:em|en)\]"), " - "),
    (re.compile(r"\\-|\\\((?:hy|mi)"), "-"),
    (re.compile(r"\\\(ha|\\\[ha\]"), "^"),
    (re.compile(r"\\\(ti|\\\[ti\]"), "~"),
    (re.compile(r"\\[~ 0]"), " "),
    (re.compile(r"\\(?:e|\(rs)"), r"\\"),
    (re.compile(r"\\\((..)|\\\[[^]]*\]|\\\".*"), ""),
]
MAN_FONTS = set("B I SM SB BR BI IB IR RB RI UR MR".split())
MAN_LISTINGS = {"nf": "fi", "EX": "EE", "TS": "TE", "SY": "YS", "de": "."}


def man_page(path: str, data: bytes) -> Page:
    """troff with the macros of man pages."""
    page, level, until = Page(), PARAGRAPH, ""
    text: list[str] = []
    for line in decoded(data).replace("\\\n", "").splitlines():
        macro, _, rest = line[1:].strip().partition(" ") if line[:1] in (".", "'") else ("", "", line)
        if until or macro in MAN_LISTINGS:
            until = "" if macro == until else until or MAN_LISTINGS[macro]
            continue
        if macro in ("SH", "SS", "PP", "P", "LP", "IP", "TP", "TQ", "HP", "RS", "RE", "TH") or not line.strip():
            add_block(page.blocks, level, " ".join(text))
            text, level = [], PARAGRAPH
            if macro in ("SH", "SS", "TH"):
                title = rest.split()[0] if macro == "TH" and rest else rest
                add_block(page.blocks, ("TH", "SH", "SS").index(macro) + 1, _plain_man(title.strip('" ')))
            elif macro in ("TP", "TQ"):
                level = TERM
        elif macro in MAN_FONTS or not line.startswith((".", "'")):
            text.append(_plain_man(_joined_fonts(rest) if len(macro) == 2 else rest.replace('"', "") if macro else line))
            if level == TERM:  # the line after .TP is the term
                add_block(page.blocks, level, " ".join(text))
                text, level = [], PARAGRAPH
    add_block(page.blocks, level, " ".join(text))
    return page


def _joined_fonts(rest: str) -> str:
    """The words of `.BR open (2)` belong together."""
    return "".join(quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', rest))


def _plain_man(text: str) -> str:
    for pattern, replacement in MAN_ESCAPES:
        text = pattern.sub(replacement, text)
    return text


def pod_page(path: str, data: bytes) -> Page:
    """Perl's documentation."""
    page, hidden = Page(), False
    for paragraph in re.split(r"\n[ \t]*\n", decoded(data).replace("\r", "")):
        paragraph = paragraph.strip("\n")
        command = re.match(r"=(\w+)\s*(.*)", paragraph, re.DOTALL)
        if command:
            hidden = command[1] in ("begin", "for", "cut")
            if command[1].startswith("head"):
                add_block(page.blocks, int(command[1][4:] or 1), _plain_pod(command[2]))
            elif command[1] == "item" and command[2].strip("*0123456789. \n"):
                add_block(page.blocks, TERM, _plain_pod(command[2]))
        elif not hidden and not paragraph.startswith((" ", "\t")):
            add_block(page.blocks, PARAGRAPH, _plain_pod(paragraph))
    return page


def _plain_pod(text: str) -> str:
    """`C<...>`, `L<text|target>`, `E<gt>`, `C<< ... >>`, from the inside out."""
    text = re.sub(r"E<(\w+)>", lambda match: {"lt": "\1", "gt": "\2"}.get(match[1], ""), text)
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    while True:
        shorter = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text, flags=re.DOTALL)
        shorter = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", shorter)
        shorter = re.sub(r"[A-Z]<([^<>]*)>", r"\1", shorter)
        if shorter == text:
            return text.replace("\1", "<").replace("\2", ">")
        text = shorter
