"""Fine-tuning on answers: what prepare writes, what counts in the loss, and examples/sft.sh as it stands."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from streaming import LocalDataset
from transformers import PreTrainedTokenizerFast

from rat_megatron.data.loader.streams import Stream
from rat_megatron.data.prepare import documents, packing
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from tests.helpers import MODEL_FLAGS, REPOSITORY, SEQ_LENGTH, TRAIN_FLAGS, pretrain_environment, tensorboard_scalars
from tests.preparing import EOD, contents, run_until_killed, save_byte_tokenizer, write_lines
from tests.streaming_data import batches_of

pytestmark = pytest.mark.slow

T = 32
OPTIONS = {"seq_length": T, "workers": 1, "val_fraction": 0.2, "text_column": "prompt", "answer_column": "answer"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Prompts and answers whose bytes are their tokens: too long ones, one that just fits, an end that is spelled out, and copies."""
    rng = random.Random(0)
    pairs = [("".join(rng.choices("abc ", k=rng.randint(1, 25))), "".join(rng.choices("xyz", k=rng.randint(1, 12)))) for _ in range(300)]
    return [*pairs, ("p" * 20, "q" * 12), ("p" * 21, "q" * 12), ("<|eod|>", "y<|eod|>"), ("n\0", "o"), ("n", "\0o"), *pairs[:50]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, pairs) -> Path:
    """Lines and a table, with an empty prompt and an empty answer among them."""
    folder = tmp_path_factory.mktemp("inputs")
    _write_pairs(folder / "a.jsonl", [*pairs[:200], ("", "unasked"), ("unanswered", "")])
    prompts, answers = zip(*pairs[200:], strict=True)
    table = pyarrow.table({"answer": [*answers, None], "prompt": [*prompts, "unanswered too"]})
    pyarrow.parquet.write_table(table, folder / "b.parquet", row_group_size=17)
    return folder


def _write_pairs(path: Path, pairs) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs))
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many units and shards from little data."""
    monkeypatch.setattr(documents, "UNIT_BYTES", 3000)
    monkeypatch.setattr(packing, "SHARD_SAMPLES", 40)


def _samples(output: Path, split: str) -> list[tuple[list[int], list[int]]]:
    data = LocalDataset(str(output / split))
    return [(sample["tokens"].tolist(), sample["answer"].tolist()) for sample in (data[index] for index in range(len(data)))]


def test_each_document_is_a_sample_that_says_where_its_answer_is(inputs, pairs, tokenizer, tmp_path, capsys):
    data = prepare([inputs], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)
    encode = PreTrainedTokenizerFast.from_pretrained(tokenizer).backend_tokenizer
    expected = []
    for pair in pairs:
        prompt, answer = (encode.encode(text).ids for text in pair)
        if (end := len(prompt) + len(answer) + 1) <= T + 1:
            expected.append(([*prompt, *answer, *[EOD] * (T + 2 - end)], [len(prompt), end]))
    train, val = (_samples(tmp_path / "data", split) for split in ("train", "val"))
    assert train == [sample for sample in expected if sample not in val], "in the order of the inputs"
    assert val == [sample for sample in expected if sample in val] and len(val) > 20
    assert {tuple(tokens[: place[0]]) for tokens, place in train}.isdisjoint(tuple(tokens[: place[0]]) for tokens, place in val)
    too_long = len(pairs) - len(expected)
    assert too_long > 5 and f"{too_long} more documents have over {T + 1} tokens" in capsys.readouterr().out
    meta = json.loads((tmp_path / "data" / "rat_meta.json").read_text())
    assert (meta["answer_column"], meta["too_long"], meta["documents"]) == ("answer", too_long, len(expected))
    assert (data.too_long, data.train_samples, data.val_samples) == (too_long, len(train), len(val))
    assert meta["tokens"] == sum(place[1] for _, place in expected) == data.tokens


@pytest.mark.parametrize("step, after", [("tokenizing._encode", 5), ("packing._write_shard", 3), ("duplicates.drop_duplicates", 1)])
def test_a_killed_run_ends_as_the_uninterrupted_one_and_copies_are_dropped(inputs, pairs, tokenizer, tmp_path, step, after):
    options = {**OPTIONS, "tokenizer": tokenizer, "deduplicate": True}
    data = prepare([inputs], tmp_path / "plain", **options)
    assert run_until_killed(f"rat_megatron.data.prepare.{step}", after, [inputs], tmp_path / "killed", **options) == -signal.SIGKILL
    prepare([inputs], tmp_path / "killed", **{**options, "workers": 2})
    assert contents(tmp_path / "killed") == contents(tmp_path / "plain")
    prepare([_write_pairs(tmp_path / "once.jsonl", dict.fromkeys(pairs))], tmp_path / "once", **{**options, "deduplicate": False})
    for split in ("train", "val"):
        assert _samples(tmp_path / "plain", split) == _samples(tmp_path / "once", split)
    assert data.duplicates >= 45


def test_only_the_answer_and_its_end_count_beside_plain_text_too(inputs, tokenizer, tmp_path):
    """One microbatch after the other, from a blend of answers and plain text."""
    prepare([inputs], tmp_path / "answers", tokenizer=tokenizer, **OPTIONS)
    lines = write_lines(tmp_path / "text.jsonl", ["some words"] * 900)
    prepare([lines], tmp_path / "text", tokenizer=tokenizer, seq_length=T, workers=1, val_fraction=0.0)
    places = {tuple(tokens): place for tokens, place in _samples(tmp_path / "answers", "train")}
    streams = [Stream(str(tmp_path / "answers"), 0.5), Stream(str(tmp_path / "text"), 0.5)]
    batches = batches_of(streams, seq_length=T, eod_id=EOD)
    seen = {"answer": 0, "text": 0}
    for _ in range(24):
        batch = next(batches)
        for tokens, labels, mask in zip(batch["tokens"].tolist(), batch["labels"].tolist(), batch["loss_mask"].tolist(), strict=True):
            place = places.get((tokens[0], *labels))
            counted = [label for label, counts in zip(labels, mask, strict=True) if counts]
            if place is None:
                assert mask == [float(token != EOD) for token in tokens]
            else:
                assert counted == labels[place[0] - 1 : place[1] - 1] and counted[-1] == EOD and EOD not in counted[:-1]
            seen["text" if place is None else "answer"] += 1
    assert min(seen.values()) > 8


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"answer_column": "prompt"}, "--answer-column prompt is the --text-column too"),
        ({"answer_column": "reply"}, "line 1 of .*a.jsonl has no field 'reply': name the one with the text with --answer-column"),
        ({"seq_length": 2}, r"0 documents that fit and none for a training sample of --seq-length 2 \(\d+ have more than 3 tokens\)"),
    ],
)
def test_bad_columns_and_documents_have_their_sentence(tokenizer, tmp_path, change, sentence):
    _write_pairs(tmp_path / "a.jsonl", [("long prompt", "long answer")] * 3)
    with pytest.raises(UserError, match=sentence):
        prepare([tmp_path / "a.jsonl"], tmp_path / "data", **{**OPTIONS, "tokenizer": tokenizer, **change})


def test_tables_and_plain_text_without_answers_are_refused(inputs, tokenizer, tmp_path):
    with pytest.raises(UserError, match="b.parquet has no column 'reply', only answer, prompt: choose one with --answer-column"):
        prepare([inputs / "b.parquet"], tmp_path / "data", **{**OPTIONS, "tokenizer": tokenizer, "answer_column": "reply"})
    (tmp_path / "a.txt").write_text("no answer")
    with pytest.raises(UserError, match="a.txt is plain text and has no --answer-column: give JSONL"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", **{**OPTIONS, "tokenizer": tokenizer})


def test_the_example_learns_answers_and_reports_their_loss_alone(one_iteration, tiny_data, tmp_path):
    """The whole of examples/sft.sh; the loss that the run reports, from its definition, with the model that it exports."""
    from rat_megatron.hf import RatPlusForCausalLM

    rng = random.Random(1)
    words = [rng.choice("abcdefgh") for _ in range(160)]
    pairs = [(f"{rng.randint(0, 10 ** rng.randint(1, 20))} say {word}:", word * rng.randint(1, 6)) for word in words]
    arguments = [
        _write_pairs(tmp_path / "answers.jsonl", pairs), tiny_data / "tokenizer", tmp_path / "run", *MODEL_FLAGS, *TRAIN_FLAGS[:4],
        "--pretrained-checkpoint", one_iteration, "--rat-pattern", "d16s4", "--lr", "3e-2", "--min-lr", "1e-3", "--num-workers", "0",
        "--log-interval", "1", "--tensorboard-log-interval", "1", "--tensorboard-dir", tmp_path / "tensorboard",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "SEQ_LENGTH": str(SEQ_LENGTH), "VAL_FRACTION": "0.3"}
    command = [str(REPOSITORY / "examples" / "sft.sh"), *map(str, arguments)]
    result = subprocess.run(command, env=pretrain_environment() | settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    losses = tensorboard_scalars(tmp_path / "tensorboard")
    assert len(losses["lm loss"]) == 4 * (json.loads((tmp_path / "run/data/rat_meta.json").read_text())["splits"]["train"]["samples"] // 32)
    assert min(losses["lm loss"].values()) < losses["lm loss"][1] - 1
    samples = _samples(tmp_path / "run" / "data", "val")
    picked = [samples[index * len(samples) // 32] for index in range(32)]  # one evaluation iteration, at even distances
    tokens, places = (torch.tensor(column) for column in zip(*picked, strict=True))
    model = RatPlusForCausalLM.from_pretrained(tmp_path / "run" / "hf", dtype=torch.float32)
    first_weights = (tmp_path / "run" / "hf" / "model.safetensors").read_bytes()
    assert model.config.attention_pattern == "d16s4"
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    answers = [row[begin - 1 : end - 1] for row, (begin, end) in zip(token_losses, places.tolist(), strict=True)]
    reported = json.loads((tmp_path / "run/checkpoints/report.json").read_text())["patterns"]["d16s4"]
    assert float(torch.cat(answers).mean()) == pytest.approx(reported, abs=2e-5)
    assert abs(float(token_losses.mean()) - reported) > 0.1

    again = subprocess.run(command, env=pretrain_environment() | settings, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-4000:]
    weights = (tmp_path / "run" / "hf" / "model.safetensors").read_bytes()
    assert weights == first_weights and sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "data", "hf"]
