"""prepare's inputs: every format and compression gives the same data; folders of save_to_disk; the Hub, from a server of our own."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from rat_megatron.data.prepare import documents
from rat_megatron.data.prepare.inputs import InputFile
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from tests.preparing import contents, save_byte_tokenizer, train_texts, write_lines

pytestmark = pytest.mark.slow

TEXTS = [f"{number}: time and tide wait für no one, 京 {'or so ' * (number % 7)}" for number in range(120)]
OPTIONS = {"seq_length": 8, "workers": 1, "val_fraction": 0.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 1500)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("expected")
    prepare([write_lines(folder / "a.jsonl", TEXTS)], folder / "data", tokenizer=tokenizer, **OPTIONS)
    return shards(folder / "data")


def shards(output: Path) -> dict[str, bytes]:
    return contents(output / "train")


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def arrow(path: Path, texts: list[str], writer) -> None:
    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    with pyarrow.OSFile(str(path), "wb") as file, writer(file, table.schema) as out:
        out.write_table(table, max_chunksize=7)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


WRITERS = {
    "jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts[:9])) + gzip.compress(lines(texts[9:]))),
    "json.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts))),
    "jsonl.zst": lambda path, texts: path.write_bytes(zstd(lines(texts[:9])) + zstd(lines(texts[9:]))),
    "jsonl.xz": lambda path, texts: path.write_bytes(lzma.compress(lines(texts))),
    "jsonl.bz2": lambda path, texts: path.write_bytes(bz2.compress(lines(texts))),
    "parquet": lambda path, texts: pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": texts}), path, row_group_size=7),
    "stream.arrow": lambda path, texts: arrow(path, texts, pyarrow.ipc.new_stream),
    "file.arrow": lambda path, texts: arrow(path, texts, pyarrow.ipc.new_file),
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_in_a_folder_of_two_files_gives_the_same_shards(expected, tokenizer, tmp_path, kind):
    (tmp_path / "in").mkdir()
    for name, texts in (("a", TEXTS[:50]), ("b", TEXTS[50:])):
        WRITERS[kind](tmp_path / "in" / f"{name}.{kind}", texts)
    prepare([tmp_path / "in"], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)
    assert shards(tmp_path / "data") == expected


def test_plain_text_may_be_compressed(expected, tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    for number, text in enumerate(TEXTS):
        ending = list(COMPRESS)[number % len(COMPRESS)]
        (tmp_path / "in" / f"{number:03}.txt{ending}").write_bytes(COMPRESS[ending](text.encode()))
    prepare([tmp_path / "in"], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)
    assert shards(tmp_path / "data") == expected


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_a_truncated_compressed_file_is_named(tokenizer, tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](lines([os.urandom(3000).hex()]))[:-20])
    with pytest.raises(UserError, match=f"a.jsonl{ending} cannot be read: "):
        prepare([path], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)


def test_a_folder_of_save_to_disk(expected, tokenizer, tmp_path):
    """Several files, and the cache that a later `map` leaves beside them."""
    Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))}).save_to_disk(tmp_path / "in", num_shards=3)
    load_from_disk(tmp_path / "in").map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "in").glob("cache-*.arrow"))
    prepare([tmp_path / "in"], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)
    assert shards(tmp_path / "data") == expected


def test_of_a_folder_of_several_splits_one_is_read(expected, tokenizer, tmp_path):
    splits = {"train": Dataset.from_dict({"text": TEXTS}), "test": Dataset.from_dict({"text": ["secret"] * 50})}
    DatasetDict(splits).save_to_disk(tmp_path / "in")
    prepare([tmp_path / "in"], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)
    assert shards(tmp_path / "data") == expected
    prepare([tmp_path / "in"], tmp_path / "test", tokenizer=tokenizer, split="test", **OPTIONS)
    assert set(train_texts(tmp_path / "test", tokenizer)[:-1]) == {"secret"}
    with pytest.raises(UserError, match="no split 'dev', only train, test: choose one with --split"):
        prepare([tmp_path / "in"], tmp_path / "dev", tokenizer=tokenizer, split="dev", **OPTIONS)


@pytest.mark.parametrize("option", ["subset", "split"])
def test_an_option_that_chooses_nothing_is_refused(tokenizer, tmp_path, option):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(UserError, match=f"--{option} x chooses nothing"):
        prepare([path], tmp_path / "data", tokenizer=tokenizer, **{option: "x"}, **OPTIONS)


def test_an_arrow_file_without_the_column_names_those_it_has(tokenizer, tmp_path):
    arrow(tmp_path / "a.arrow", TEXTS, pyarrow.ipc.new_stream)
    with pytest.raises(UserError, match="no column 'body', only n, text: choose one with --text-column"):
        prepare([tmp_path / "a.arrow"], tmp_path / "data", tokenizer=tokenizer, text_column="body", **OPTIONS)
    (tmp_path / "b.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="b.arrow is not a readable Arrow file"):
        prepare([tmp_path / "b.arrow"], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)


# ---- the Hub -------------------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: default
  data_files: other/*.parquet
- config_name: sample
  data_files:
  - {split: train, path: sample/train-*}
  - {split: test, path: sample/test.jsonl.gz}
- config_name: tables
  data_files: tables/*.csv
---
"""


class Hub(BaseHTTPRequestHandler):
    """What `datasets` and `huggingface_hub` ask of the Hub for one public data set, team/corpus, out of the folder `root`.

    Every third read of a Parquet file fails with 503, as the real one does on a bad day."""

    protocol_version = "HTTP/1.1"
    root: Path
    reads = 0

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entries(self) -> list[dict]:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        folders = sorted({path.parent for path in files} - {self.root})
        return [
            *({"type": "directory", "oid": "0" * 40, "size": 0, "path": str(path.relative_to(self.root))} for path in folders),
            *({"type": "file", "oid": "1" * 40, "size": path.stat().st_size, "path": str(path.relative_to(self.root))} for path in files),
        ]

    def do_GET(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:4] == ["datasets", "team", "corpus", "resolve"]:
            return self.send_file(self.root.joinpath(*parts[5:]))
        if parts[:3] != ["api", "datasets", "team"] or parts[3] != "corpus":
            return self.answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        what, rest = (parts[4], "/".join(parts[6:])) if len(parts) > 4 else ("revision", "")
        if what == "tree":
            deep = parse_qs(url.query).get("recursive") in (["true"], ["True"])
            chosen = [entry for entry in self.entries() if not rest or entry["path"].startswith(rest + "/")]
            body = [entry for entry in chosen if deep or "/" not in entry["path"].removeprefix(rest).strip("/")]
        else:
            siblings = [{"rfilename": entry["path"]} for entry in self.entries() if entry["type"] == "file"]
            body = {"_id": "0", "id": "team/corpus", "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
        self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        body = [entry for entry in self.entries() if entry["path"] in asked]
        self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        content, status, headers = path.read_bytes(), 200, {"ETag": '"1"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            type(self).reads += 1
            if path.suffix == ".parquet" and type(self).reads % 3 == 0:
                return self.answer(503)
            begin, end = wanted.removeprefix("bytes=").split("-")
            status, headers["Content_Range"] = 206, f"bytes {wanted.removeprefix('bytes=')}/{len(content)}"
            content = content[int(begin) : int(end) + 1]
        self.answer(status, content, **headers)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The environment in which programs take our server for the Hub."""
    root = tmp_path_factory.mktemp("hub") / "root"
    for folder in ("other", "sample", "tables"):
        (root / folder).mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    for number, texts in enumerate((TEXTS[:50], TEXTS[50:])):
        WRITERS["parquet"](root / "sample" / f"train-{number}.parquet", texts)
    WRITERS["jsonl.gz"](root / "sample" / "test.jsonl.gz", ["test"] * 50)
    WRITERS["parquet"](root / "other" / "all.parquet", ["other"] * 50)
    (root / "tables" / "a.csv").write_text("text\nx\n")
    Hub.root = root
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(root.parent / "home"),
        "OMP_NUM_THREADS": "1",
    }
    server.shutdown()


HUB_COMMANDS = {
    "by name": ["hf://team/corpus", "--subset", "sample"],
    "of a commit": [f"hf://team/corpus@{COMMIT}", "--subset", "sample", "--split", "test"],
    "unknown": ["hf://team/nothing"],
    "no such split": ["hf://team/corpus", "--subset", "sample", "--split", "dev"],
    "no such format": ["hf://team/corpus", "--subset", "tables"],
    "no such column": ["hf://team/corpus", "--subset", "sample", "--text-column", "body"],
}
RUN_ALL = """
import contextlib, io, json, sys
from rat_megatron.cli.main import main
ended = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["rat-megatron", "prepare", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            main()
        except SystemExit as exit:
            ended[name] = exit.code, printed.getvalue()
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def hub_runs(hub, tokenizer, tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """The folder with the output of every one of HUB_COMMANDS, and their exit codes and errors; one process runs them all."""
    folder = tmp_path_factory.mktemp("hub_runs")
    options = ["--tokenizer", tokenizer, "--seq-length", "8", "--workers", "1", "--val-fraction", "0"]
    commands = {name: [*arguments, *options, "--output", str(folder / name)] for name, arguments in HUB_COMMANDS.items()}
    ended = subprocess.run([sys.executable, "-c", RUN_ALL, json.dumps(commands)], env=hub, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout.splitlines()[-1])


def test_a_data_set_of_the_hub_by_name(expected, hub, hub_runs, tokenizer):
    folder, ended = hub_runs
    assert ended["by name"][0] == ended["of a commit"][0] == 0, ended
    assert Hub.reads > 3, "some reads failed and were tried again"
    assert shards(folder / "by name") == expected
    assert set(train_texts(folder / "of a commit", tokenizer)[:-1]) == {"test"}
    assert not list(Path(hub["HF_HOME"]).rglob("*.parquet")), "streamed, not downloaded"


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("unknown", "error: input hf://team/nothing cannot be found: "),
        ("no such split", "has no split 'dev', only train, test: choose one with --split."),
        ("no such format", "such as a.csv: try its Parquet copy, hf://team/corpus@refs/convert/parquet."),
        ("no such column", "has no column 'body', only text, n: choose one with --text-column."),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub_runs, name, complaint):
    code, printed = hub_runs[1][name]
    assert code == 2 and complaint in printed and "Traceback" not in printed, printed


def test_reading_from_the_hub_is_tried_again(monkeypatch):
    file = InputFile("hf://datasets/team/corpus@main/a.parquet", "a", "parquet", None, 1, None)
    failures = [ConnectionResetError("reset by peer")]

    def read(result):
        if failures:
            raise failures.pop()
        return result

    assert documents.retrying(file, read, "read") == "read"
    monkeypatch.setattr(documents, "HUB_ATTEMPTS", 1)
    failures.append(ConnectionResetError("reset by peer"))
    with pytest.raises(UserError, match="a.parquet cannot be read, start the same command again to go on: reset by peer"):
        documents.retrying(file, read, "read")
