"""The offline sample corpus: enough text, no repeats, a tokenizer that can write any text."""

import json
import runpy
import sys

import pytest

from rat_megatron.data import corpus
from rat_megatron.data.corpus import EOD_TOKEN, build_corpus
from rat_megatron.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PACKAGES", ())  # the standard library alone keeps the test short
        return folder, build_corpus(folder, vocab_size=1024)


def _texts(folder):
    return [json.loads(line)["text"] for path in sorted((folder / "corpus").glob("*.jsonl")) for line in open(path, encoding="utf-8")]


def test_the_totals_count_what_was_written(built):
    folder, totals = built
    texts = _texts(folder)
    assert totals.documents == len(texts)
    assert totals.text_bytes == sum(len(text.encode()) for text in texts) == sum(totals.bytes_per_source.values())
    assert totals.bytes_per_source["python_topics"] > 300_000
    assert totals.bytes_per_source["standard_library"] > 1_500_000


def test_no_document_comes_twice_and_none_is_from_the_test_suite(built):
    texts = _texts(built[0])
    assert len(set(texts)) == len(texts)
    assert not any("test.support" in text.split("\n")[0] for text in texts)


def test_the_tokenizer_writes_any_text_and_knows_the_end_of_a_document(built):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built[0] / "tokenizer")
    text = "Of  arms\tand the man – naïve, 東京, \x00\U0001f600\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == built[1].vocab_size == 1024
    assert tokenizer.eos_token == EOD_TOKEN
    english = "The function returns a list of all the values that are found in the given file."
    assert len(tokenizer.encode(english)) < len(english) / 2.5, "trained on English, it needs few tokens for it"


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="--vocab-size 256 "):
        build_corpus(tmp_path, vocab_size=256)


def test_the_command_ends_bad_input_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["corpus", str(tmp_path), "--vocab-size", "3"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(corpus.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --vocab-size 3 ")
