"""Conversations for fine-tuning: each answer is a sample behind the prompt it had, in the tokenizer's own chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from streaming import LocalDataset
from tokenizers import decoders
from transformers import AutoTokenizer

from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from tests.preparing import save_byte_tokenizer

T = 64
TEMPLATE = (
    "{% if messages[0]['role'] not in ('system', 'user') %}{{ raise_exception('who asks?') }}{% endif %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<|eod|>\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
OPTIONS = {"seq_length": T, "workers": 1, "val_fraction": 0.4, "messages_column": "messages"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer = AutoTokenizer.from_pretrained(save_byte_tokenizer(folder / "bytes"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    return folder / "chat"


def conversation(number: int) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"ä{number}"}]
    more = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    return [[{"role": "system", "content": "s"}] * (number % 2) + turns, turns + more, turns[:1]][number % 3]


def write_lines(path: Path, conversations: list) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def samples(folder: Path, split: str, tokenizer) -> list[tuple[str, str]]:
    """Prompt and answer of each sample, the answer with its end; what comes after is filled up with that."""
    data, eod = LocalDataset(str(folder / split)), tokenizer.eos_token_id
    found = []
    for sample in (data[index] for index in range(len(data))):
        tokens, (begin, end) = sample["tokens"].tolist(), sample["answer"].tolist()
        assert set(tokens[end:]) <= {eod}
        words = tokenizer.convert_ids_to_tokens(tokens)
        found.append(tuple(decoders.ByteLevel().decode(part) for part in (words[:begin], words[begin:end])))
    return found


def test_each_answer_is_a_sample_behind_the_prompt_it_had(tokenizer, tmp_path):
    conversations = [conversation(number) for number in range(60)]
    write_lines(tmp_path / "a.jsonl", [*conversations[:40], None, [{"role": "user", "content": "long" * T}, conversation(0)[-1]]])
    struct = pyarrow.struct([(name, pyarrow.string()) for name in ("role", "content", "name")])
    table = pyarrow.table({"messages": pyarrow.array(conversations[40:], pyarrow.list_(struct))})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    data = prepare([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path / "data", tokenizer=str(tokenizer), **OPTIONS)

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    train, val = (samples(tmp_path / "data", split, loaded) for split in ("train", "val"))
    expected = []
    for messages in conversations:
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = loaded.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
                expected.append((prompt, message["content"] + "<|eod|>"))
    assert len(expected) == 60 and sorted(train + val) == sorted(expected)
    assert min(len(train), len(val)) > 10 and data.too_long == 1
    openings = [{prompt[: prompt.index("a:")] for prompt, _ in side} for side in (train, val)]
    assert openings[0].isdisjoint(openings[1])  # no conversation is on both sides


def test_an_answer_that_the_template_ends_otherwise_keeps_that_end(tokenizer, tmp_path):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = TEMPLATE.replace("<|eod|>", "|")
    loaded.save_pretrained(tmp_path / "tokenizer")
    lines = write_lines(tmp_path / "a.jsonl", [conversation(0)])
    prepare([lines], tmp_path / "data", tokenizer=str(tmp_path / "tokenizer"), **OPTIONS | {"val_fraction": 0.0})
    assert samples(tmp_path / "data", "train", loaded) == [("u:q0|\na:", "ä0|\n<|eod|>")]


def test_another_template_is_another_data_set(tokenizer, tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [conversation(1)])
    options = OPTIONS | {"val_fraction": 0.0}
    prepare([lines], tmp_path / "data", tokenizer=str(tokenizer), **options)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = TEMPLATE.replace("<|eod|>", "|")
    loaded.save_pretrained(tmp_path / "other" / "chat")
    with pytest.raises(UserError, match="with chat_template_hash"):
        prepare([lines], tmp_path / "data", tokenizer=str(tmp_path / "other" / "chat"), **options)


GREETING = [{"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("written", "change", "sentence"),
    [
        ("hello", {}, "field 'messages' in line 1 of .* is no list of messages, each with a role and its content"),
        (["hello"], {}, "is no list of messages"),
        (conversation(1), {"messages_column": "chat"}, "has no field 'chat': name the one with the text with --messages-column"),
        (conversation(1), {"answer_column": "answer"}, "--messages-column and --answer-column are two ways to name answers"),
        (conversation(1), {"special_tokens": "split"}, "--special-tokens split would tear the tokens of the chat template apart"),
        (GREETING + conversation(0), {}, r"does not fit the chat template of --tokenizer \(who asks\?\): \[\{\"role\": \"assistant\""),
    ],
)
def test_bad_input_has_its_sentence(tokenizer, tmp_path, written, change, sentence):
    lines = write_lines(tmp_path / "a.jsonl", [written])
    with pytest.raises(UserError, match=sentence):
        prepare([lines], tmp_path / "data", tokenizer=str(tokenizer), **OPTIONS | change)


def test_what_cannot_hold_conversations_has_its_sentence(tokenizer, tmp_path):
    plain, table = tmp_path / "a.txt", tmp_path / "a.parquet"
    plain.write_text("text")
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["text"]}), table)
    for path, sentence in (
        (plain, "is plain text and has no --messages-column"),
        (table, "holds string, not conversations: choose another"),
    ):
        with pytest.raises(UserError, match=sentence):
            prepare([path], tmp_path / "data", tokenizer=str(tokenizer), **OPTIONS)
    without = save_byte_tokenizer(tmp_path / "bytes")
    with pytest.raises(UserError, match="has no chat template, which --messages-column needs: give one that has"):
        prepare([write_lines(tmp_path / "a.jsonl", [conversation(1)])], tmp_path / "data", tokenizer=without, **OPTIONS)
