"""Special tokens that are spelled out in the text: what `prepare` makes of them, and that a chat is trained as it is served."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from streaming import LocalDataset
from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rat_megatron.cli.main import app
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusForCausalLM
from tests.evaluating import save_tiny_model
from tests.preparing import EOD, documents_of, samples_of, save_byte_tokenizer, stream_of, write_lines

torch.set_num_threads(1)  # at these sizes threads only wait for each other
BEGIN, END = EOD + 1, EOD + 2


def chat_template(end: str) -> str:
    turn = "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}" + end + "\n{% endfor %}"
    return turn + "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"


def save_chat_tokenizer(folder: Path, end: str = "<|end|>") -> str:
    """One token a byte, <|eod|>, and two markers of turns."""
    save_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|end|>"]})
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = chat_template(end)
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<|eod|>", "<|begin|>", "<|end|>"]) == [EOD, BEGIN, END]
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def answers(tmp_path):
    """answers(pairs, ...) -> ids of prompt and answer of each pair."""

    def run(pairs, tokenizer, seq_length=64, **options):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs))
        columns = {"text_column": "prompt", "answer_column": "answer", "val_fraction": 0}
        prepare([file], tmp_path / "data", tokenizer=tokenizer, seq_length=seq_length, workers=1, **columns, **options)
        data = LocalDataset(str(tmp_path / "data" / "train"))
        found = []
        for index in range(len(data)):
            tokens, (begin, end) = data[index]["tokens"].tolist(), data[index]["answer"]
            assert set(tokens[end - 1 :]) == {EOD}
            found.append((tokens[:begin], tokens[begin : end - 1]))
        return found

    return run


@pytest.mark.parametrize("end", ["<|end|>", "<|eod|>"])
def test_a_conversation_is_trained_as_generate_serves_it(answers, tmp_path, monkeypatch, end):
    """Two turns: what the model has read by then is the prompt that is trained, also where a turn ends with the end-of-document token."""
    folder = save_tiny_model(tmp_path / "model", tokenizer=False, vocab_size=END + 1)
    save_chat_tokenizer(folder, end)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    settings = json.loads((folder / "generation_config.json").read_text())
    others = [token for token in range(END + 1) if token not in letters]
    (folder / "generation_config.json").write_text(json.dumps(settings | {"suppress_tokens": others}))

    read: list[int] = []
    forward = RatPlusForCausalLM.forward

    @functools.wraps(forward)  # generate() looks at its signature
    def noting(self, input_ids=None, **kwargs):
        read.extend(input_ids[0].tolist())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(RatPlusForCausalLM, "forward", noting)
    result = CliRunner().invoke(app, ["generate", str(folder), "Hello", "--chat", "--max-new-tokens", "4"], input="More <|begin|>\n")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.split()
    assert len(first) == len(second) == 4 and (first + second).isalpha()

    turns = [("user", "Hello"), ("assistant", first), ("user", "More <|begin|>")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompts = [tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True) for n in (1, 3)]
    trained = answers(list(zip(prompts, (first, second), strict=True)), str(folder), seq_length=160)
    served = read + tokenizer(second)["input_ids"][-1:]  # the last token that is written is not read
    assert [prompt + answer for prompt, answer in trained] == [served[: len(trained[0][0]) + 4], served]
    assert served.count(BEGIN) == 5 and served.count(END if end == "<|end|>" else EOD) == 3


def test_answers_keep_special_tokens_unless_asked_not_to(answers, tokenizer, tmp_path):
    pairs = [("<|begin|>a<|eod|>", "b<|end|>c<|eod|>d")]
    (kept,) = answers(pairs, tokenizer)
    a, b, c, d = AutoTokenizer.from_pretrained(tokenizer)("abcd")["input_ids"]
    assert kept == ([BEGIN, a, EOD], [b, END, c, EOD, d])
    meta = tmp_path / "data" / "rat_meta.json"
    assert json.loads(meta.read_text())["special_tokens"] == "keep"
    with pytest.raises(UserError, match="made with special_tokens keep, not split: give another folder"):
        answers(pairs, tokenizer, special_tokens="split")
    without = {name: value for name, value in json.loads(meta.read_text()).items() if name != "special_tokens"}
    meta.write_text(json.dumps(without))  # made when all were split
    with pytest.raises(UserError, match="made with special_tokens split, not keep"):
        answers(pairs, tokenizer)
    answers(pairs, tokenizer, special_tokens="split")  # is complete already


def test_answers_split_them_when_asked(answers, tokenizer):
    (split,) = answers([("<|begin|>a<|eod|>", "b<|end|>")], tokenizer, special_tokens="split")
    assert max(max(part) for part in split) < EOD and [len(part) for part in split] == [17, 8]


@pytest.mark.parametrize("choice", [None, "split", "keep"])
def test_a_document_cannot_end_itself(tokenizer, tmp_path, choice):
    texts = [f"<|begin|>{n}<|eod|><|end|>" for n in range(20)]
    options = {} if choice is None else {"special_tokens": choice}
    text = write_lines(tmp_path / "text.jsonl", texts)
    prepare([text], tmp_path / "data", tokenizer=tokenizer, seq_length=8, workers=1, val_fraction=0, **options)
    found = documents_of(stream_of(samples_of(tmp_path / "data", "train")))[:-1]  # the last one may be cut
    encode = AutoTokenizer.from_pretrained(tokenizer)

    def plain(text):
        return encode(text, split_special_tokens=True)["input_ids"]

    if choice == "keep":
        assert found == [[BEGIN, *plain(f"{n}<|eod|>"), END, EOD] for n in range(len(found))] and len(found) > 17
    else:
        assert found == [[*plain(text), EOD] for text in texts[: len(found)]] and len(found) > 17


def test_an_end_of_document_token_that_is_no_special_one_ends_no_document_either(tmp_path):
    save_byte_tokenizer(tmp_path / "t")
    parts = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    parts["added_tokens"][0]["special"] = False
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "t" / "special_tokens_map.json").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    settings["added_tokens_decoder"][str(EOD)]["special"] = False
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    text = write_lines(tmp_path / "text.jsonl", ["one<|eod|>two"] * 9)
    options = {"tokenizer": str(tmp_path / "t"), "seq_length": 8, "workers": 1, "val_fraction": 0, "eod_token": "<|eod|>"}
    prepare([text], tmp_path / "data", **options)
    assert (samples_of(tmp_path / "data", "train")[:, 1:] == EOD).sum() == 9 * 14 // 8 * 8 // 14


def test_a_tokenizer_that_cuts_and_fills_up_does_neither_here(tokenizer, tmp_path):
    """tokenizer.json may say so, for other uses than training."""
    save_chat_tokenizer(tmp_path / "cutting")
    backend = Tokenizer.from_file(str(tmp_path / "cutting" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    backend.save(str(tmp_path / "cutting" / "tokenizer.json"))
    text = write_lines(tmp_path / "text.jsonl", ["a" * 20, "b"] * 9)
    for name, folder in (("plain", tokenizer), ("cut", str(tmp_path / "cutting"))):
        prepare([text], tmp_path / name, tokenizer=folder, seq_length=8, workers=1, val_fraction=0)
    assert (samples_of(tmp_path / "cut", "train") == samples_of(tmp_path / "plain", "train")).all()


def test_an_unknown_choice_has_its_sentence(tokenizer, tmp_path):
    text = write_lines(tmp_path / "text.jsonl", ["a"])
    with pytest.raises(UserError, match="--special-tokens all is not known: give keep or split"):
        prepare([text], tmp_path / "data", tokenizer=tokenizer, special_tokens="all")
