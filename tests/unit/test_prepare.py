"""prepare: every token once, the same result for any number of workers and after any interruption, one sentence for bad input."""

import gzip
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from rat_megatron.data.prepare import documents, packing, tokenizing
from rat_megatron.data.prepare.pipeline import PreparedData, prepare
from rat_megatron.errors import UserError
from tests.preparing import EOD, contents, documents_of, run_until_killed, samples_of, save_byte_tokenizer, stream_of

T = 32
EXTRA = {"tokenizer": "bytes", "seq_length": T, "workers": 1, "val_fraction": 0.2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    words = ["time", "and", "tide", "wait", "für", "no", "one", "\n", "<|eod|>", "京"]
    return [f"{number}: " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for number in range(600)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, texts):
    """The same kind of documents in every format, spread over files, with the blank lines and empty documents of real data."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines[:300]) + '\n\n{"text": ""}\n')
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[300:400]))  # no newline at the end
    (folder / "b.jsonl.zst").write_bytes(pyarrow.Codec("zstd").compress(("\n".join(lines[400:450])).encode(), asbytes=True))
    table = pyarrow.table({"text": [*texts[450:550], None], "n": list(range(101))})
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=17)
    (folder / "d").mkdir()
    for number, text in enumerate(texts[550:]):
        (folder / "d" / f"{number:03}.txt").write_text(text)
    (folder / "README").write_text("not an input")
    return folder


def make_small(patch):
    """Many units and shards from little data; the workers are forks and see it too."""
    patch.setattr(documents, "UNIT_BYTES", 3000)
    patch.setattr(packing, "SHARD_SAMPLES", 300)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, inputs, tokenizer):
    output = tmp_path_factory.mktemp("prepared") / "data"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return output, prepare([inputs], output, **{**EXTRA, "tokenizer": tokenizer})


def test_every_token_of_every_document_is_in_the_samples_once(prepared, texts, tokenizer):
    output, data = prepared
    encode = PreTrainedTokenizerFast.from_pretrained(tokenizer).backend_tokenizer
    encode.encode_special_tokens = True
    expected = {text: [*encode.encode(text).ids, EOD] for text in texts}
    meta = json.loads((output / "rat_meta.json").read_text())
    found = []
    for split in ("train", "val"):
        stream = stream_of(samples_of(output, split))
        totals = meta["splits"][split]
        assert 0 <= totals["tokens"] - len(stream) < T, "only a tail shorter than a sample is left out"
        whole = documents_of(stream)
        in_order = [ids for ids in expected.values() if ids in whole]
        assert whole[: len(in_order)] == in_order, "documents keep the order of the inputs"
        found += in_order
        left_out = [ids for ids in whole[len(in_order) :]]
        assert len(left_out) <= 1, "at most the last document is cut"
    assert sum(totals["tokens"] for totals in meta["splits"].values()) == sum(map(len, expected.values())) == meta["tokens"] == data.tokens
    assert meta["documents"] == data.documents == len(texts)
    assert len(found) >= len(texts) - 2 * T, "the dropped tails hold few documents"


def test_a_document_cannot_forge_an_end_of_document(prepared, texts):
    assert any("<|eod|>" in text for text in texts)
    output, data = prepared
    ends = sum(int((stream_of(samples_of(output, split)) == EOD).sum()) for split in ("train", "val"))
    assert data.documents - 2 * T <= ends <= data.documents


def test_rat_meta_describes_the_data(prepared):
    output, data = prepared
    meta = json.loads((output / "rat_meta.json").read_text())
    assert (meta["format_version"], meta["seq_length"], meta["vocab_size"], meta["eod_id"], meta["token_dtype"]) == (
        1,
        T,
        257,
        EOD,
        "uint16",
    )
    for split, samples in (("train", data.train_samples), ("val", data.val_samples)):
        assert meta["splits"][split]["samples"] == samples == len(samples_of(output, split))
        shards = json.loads((output / split / "index.json").read_text())["shards"]
        assert all("xxh64" in shard["raw_data"]["hashes"] for shard in shards)
    assert samples_of(output, "val").dtype == np.uint16
    assert str(output.parent) not in json.dumps(meta), "no path of this machine"
    assert len(PreTrainedTokenizerFast.from_pretrained(output / "tokenizer")) == meta["vocab_size"]
    assert not (output / ".unfinished").exists()


def test_the_result_does_not_depend_on_workers_units_or_the_place_of_the_inputs(prepared, inputs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 1 << 20)
    moved = tmp_path / "elsewhere"
    moved.symlink_to(inputs)
    prepare([moved], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer, "workers": 2})
    assert contents(tmp_path / "data") == contents(prepared[0])


def test_the_split_follows_the_text_and_the_seed(prepared, texts, tokenizer, tmp_path):
    (tmp_path / "reversed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*reversed(texts), texts[0]]))
    held_out = {}
    for name, seed in (("same", 1005), ("other", 1)):
        prepare([tmp_path / "reversed.jsonl"], tmp_path / name, **{**EXTRA, "tokenizer": tokenizer, "seed": seed})
        held_out[name] = {tuple(ids) for ids in documents_of(stream_of(samples_of(tmp_path / name, "val")))[:-1]}
    original = {tuple(ids) for ids in documents_of(stream_of(samples_of(prepared[0], "val")))[:-1]}
    assert len(held_out["same"] ^ original) <= 10, "but for those in the dropped tails"
    assert len(held_out["other"] & original) < len(original) / 2
    assert 0.14 < len(original) / len(texts) < 0.26


@pytest.mark.parametrize(
    "step, after",
    [
        ("tokenizing._encode", 9),
        ("packing.pack", 0),
        ("packing._write_shard", 4),
        ("packing.write_json", 4),  # a shard is there, but not its entry
        ("packing.pack", 1),
        ("destination.write_json", 1),  # rat_meta.json
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(prepared, inputs, tokenizer, tmp_path, step, after):
    """Killed while tokenizing, before and while packing, between the splits, and between moving the parts and writing rat_meta.json."""
    output = tmp_path / "data"
    options = {**EXTRA, "tokenizer": tokenizer}
    assert run_until_killed(f"rat_megatron.data.prepare.{step}", after, [inputs], output, **options) == -signal.SIGKILL
    assert not (output / "rat_meta.json").exists()
    kinds = ("*.train", "train/*.mds", "*.entry")
    done_before = {path: path.stat().st_mtime_ns for kind in kinds for path in (output / ".unfinished").glob(kind)}
    if step == "tokenizing._encode":
        assert len(done_before) >= after
    if step == "packing._write_shard":
        assert len([path for path in done_before if path.suffix == ".entry"]) == after
    kept = {path: path.open("rb") for path in done_before}  # still readable after the folder is gone
    data = prepare([inputs], output, **options)
    assert contents(output) == contents(prepared[0])
    unfinished_shard = {output / ".unfinished" / "train" / "shard.00004.mds"}
    again = [path for path, file in kept.items() if os.fstat(file.fileno()).st_mtime_ns != done_before[path]]
    assert not set(again) - unfinished_shard, "what was finished was written again"
    assert step == "tokenizing._encode" or data.tokens_per_second == 0, "nothing was left to tokenize"


def test_runs_killed_at_any_moment_lose_and_repeat_nothing(prepared, inputs, tokenizer, tmp_path):
    output, kills = tmp_path / "data", 0
    while not (output / "rat_meta.json").exists():
        child = os.fork()
        if child == 0:
            try:
                prepare([inputs], output, **{**EXTRA, "tokenizer": tokenizer, "workers": 2})
            finally:
                os._exit(0)
        time.sleep(0.05 * 1.5**kills)
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    prepare([inputs], output, **{**EXTRA, "tokenizer": tokenizer})
    assert kills and contents(output) == contents(prepared[0])


def test_a_run_killed_at_its_very_end_leaves_nothing_behind(prepared, inputs, tokenizer, tmp_path):
    options = {**EXTRA, "tokenizer": tokenizer}
    run_until_killed("rat_megatron.data.prepare.packing._write_shard", 3, [inputs], tmp_path / "data", **options)
    (tmp_path / "data" / "rat_meta.json.7.tmp").write_text("{")  # between its writing and its new name
    prepare([inputs], tmp_path / "data", **options)
    assert contents(tmp_path / "data") == contents(prepared[0])


def test_a_dead_worker_ends_the_run_with_a_sentence(prepared, inputs, tokenizer, tmp_path, capfd):
    options = {**EXTRA, "tokenizer": tokenizer}
    assert run_until_killed("rat_megatron.data.prepare.tokenizing._encode", 9, [inputs], tmp_path / "data", victim="worker", **options) == 3
    assert "UserError a worker process died, perhaps for lack of memory: start the same command again" in capfd.readouterr().err
    prepare([inputs], tmp_path / "data", **options)
    assert contents(tmp_path / "data") == contents(prepared[0])


def test_a_full_disk_ends_the_run_with_a_sentence(inputs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "open", lambda path, mode: open("/dev/full" if ".val." in path.name else path, mode), raising=False)
    with pytest.raises(UserError, match="the disk is full .*: make room and start the same command again"):
        prepare([inputs], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer})


def test_what_is_done_is_not_done_again(prepared, inputs, tokenizer, tmp_path, capsys):
    output, data = prepared
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = prepare([inputs], output, **{**EXTRA, "tokenizer": tokenizer, "workers": 2})
    assert "complete already" in capsys.readouterr().out
    assert again == PreparedData(data.documents, data.tokens, data.train_samples, data.val_samples, 0.0, 0.0)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_data_of_a_version_that_knew_no_deduplication_is_complete(inputs, tokenizer, tmp_path, capsys):
    options = {**EXTRA, "tokenizer": tokenizer}
    prepare([inputs], tmp_path / "data", **options)
    meta = json.loads((tmp_path / "data" / "rat_meta.json").read_text())
    assert meta["special_tokens"] == "split"
    del meta["deduplicate"], meta["duplicates"], meta["special_tokens"]
    (tmp_path / "data" / "rat_meta.json").write_text(json.dumps(meta))
    prepare([inputs], tmp_path / "data", **options)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with deduplicate False, not True"):
        prepare([inputs], tmp_path / "data", deduplicate=True, **options)
    with pytest.raises(UserError, match="made with special_tokens split, not keep"):
        prepare([inputs], tmp_path / "data", special_tokens="keep", **options)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"seq_length": 16}, "seq_length 32, not 16"),
        ({"seed": 2}, "seed 1005, not 2"),
        ({"special_tokens": "keep"}, "special_tokens split, not keep"),
    ],
)
def test_other_settings_never_overwrite(prepared, inputs, tokenizer, change, complaint):
    before = contents(prepared[0])
    with pytest.raises(UserError, match=complaint):
        prepare([inputs], prepared[0], **{**EXTRA, "tokenizer": tokenizer, **change})
    assert contents(prepared[0]) == before


def test_other_inputs_or_a_foreign_folder_are_refused(prepared, inputs, tokenizer, tmp_path):
    with pytest.raises(UserError, match="other input files"):
        prepare([inputs / "a.jsonl"], prepared[0], **{**EXTRA, "tokenizer": tokenizer})
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        prepare([inputs], tmp_path, **{**EXTRA, "tokenizer": tokenizer})
    assert (tmp_path / "precious").read_text() == "mine"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD_INPUTS = {
    "missing": (lambda folder: folder / "nowhere.txt", "nowhere.txt does not exist"),
    "a URL": (lambda folder: "s3://bucket/text", "input s3://bucket/text cannot be read from there: copy it"),
    "unknown kind": (lambda folder: write(folder / "a.pdf", "x"), "a.pdf is of no known kind"),
    "empty folder": (lambda folder: folder / "empty", "empty holds no .txt"),
    "bad JSON": (
        lambda folder: write(folder / "a.jsonl", '{"text": "x"}\n' * 700 + '{"text": \n' + '{"text": "x"}\n' * 9),
        "line 701 of .*a.jsonl",
    ),
    "bad JSON, gzip": (lambda folder: write(folder / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n\n{"text"')), "line 3 of .*a.jsonl.gz"),
    "no such field": (lambda folder: write(folder / "a.jsonl", '{"content": "x"}\n'), "line 1 of .*a.jsonl has no field 'text'"),
    "field is no text": (lambda folder: write(folder / "a.jsonl", '{"text": 3}\n'), "line 1 of .*a.jsonl holds int"),
    "not UTF-8": (lambda folder: write(folder / "a.txt", b"caf\xe9"), "a.txt is not UTF-8"),
    "no text": (lambda folder: write(folder / "a.txt", ""), "hold 0 tokens, too few"),
    "broken gzip": (lambda folder: write(folder / "a.jsonl.gz", b"not gzip at all"), "a.jsonl.gz cannot be read"),
    "broken parquet": (lambda folder: write(folder / "a.parquet", b"PAR1 is not enough"), "a.parquet is not a readable Parquet file"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_named(tokenizer, tmp_path, case):
    (tmp_path / "empty").mkdir()
    make, complaint = BAD_INPUTS[case]
    with pytest.raises(UserError, match=complaint) as raised:
        prepare([make(tmp_path)], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer})
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "data" / "rat_meta.json").exists()


def test_a_parquet_file_without_the_column_names_those_it_has(tokenizer, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text', only content, n: choose one with --text-column"):
        prepare([tmp_path / "a.parquet"], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer})
    with pytest.raises(UserError, match="column 'n' of .* holds int64, not text"):
        prepare([tmp_path / "a.parquet"], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer, "text_column": "n"})


def test_after_a_bad_line_is_corrected_the_run_goes_on(tokenizer, tmp_path):
    good = write(tmp_path / "good.jsonl", "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(50)))
    bad = write(tmp_path / "worse.jsonl", '{"text": "x"\n')
    with pytest.raises(UserError, match="line 1 of"):
        prepare([good, bad], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer})
    write(bad, '{"text": "x"}\n')
    assert prepare([good, bad], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer}).documents == 51


def test_the_end_of_document_token_must_be_known(tmp_path, inputs, tokenizer):
    without = save_byte_tokenizer(tmp_path / "without", eos=False)
    with pytest.raises(UserError, match="no end-of-sequence token.*--eod-token"):
        prepare([inputs], tmp_path / "data", **{**EXTRA, "tokenizer": without})
    with pytest.raises(UserError, match="--eod-token <none> is not in the vocabulary"):
        prepare([inputs], tmp_path / "data", **{**EXTRA, "tokenizer": without, "eod_token": "<none>"})
    prepare([inputs / "a.jsonl"], tmp_path / "data", **{**EXTRA, "tokenizer": without, "eod_token": "<|eod|>"})
    assert json.loads((tmp_path / "data" / "rat_meta.json").read_text())["eod_id"] == EOD


@pytest.mark.parametrize("change", [{"seq_length": 0}, {"workers": 0}, {"val_fraction": 1.0}, {"tokenizer": "/nowhere/at/all"}])
def test_bad_flags_are_named(inputs, tokenizer, tmp_path, change):
    with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} {next(iter(change.values()))} "):
        prepare([inputs], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer, **change})


def test_two_runs_into_one_folder_are_refused(inputs, tokenizer, tmp_path, monkeypatch):
    import filelock

    (tmp_path / "data" / ".unfinished").mkdir(parents=True)
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda lock: (_ for _ in ()).throw(filelock.Timeout("lock")))
    with pytest.raises(UserError, match="another run is writing"):
        prepare([inputs], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer})


def test_the_command_prints_its_totals_and_ends_bad_input_with_code_2(inputs, tokenizer, tmp_path, monkeypatch, capsys):
    from rat_megatron.cli.main import main

    command = ["rat-megatron", "prepare", "--output", str(tmp_path / "data"), "--tokenizer", tokenizer, "--seq-length", "32"]
    monkeypatch.setattr(sys, "argv", [*command, "--workers", "1", str(inputs)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "600 documents" in printed and "tokens/s" in printed
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: input {tmp_path / 'nowhere'} does not exist.\n"


def test_settings_of_an_unfinished_run_are_kept(prepared, inputs, tokenizer, tmp_path):
    run_until_killed("rat_megatron.data.prepare.packing.pack", 0, [inputs], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer})
    with pytest.raises(UserError, match="holds an unfinished run with seq_length 32, not 16"):
        prepare([inputs], tmp_path / "data", **{**EXTRA, "tokenizer": tokenizer, "seq_length": 16})
