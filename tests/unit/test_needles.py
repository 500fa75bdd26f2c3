"""Needle tests: what the questions hold, how long they are, how answers are scored, and the file for fine-tuning."""

import json
import random
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from rat_megatron.errors import UserError
from rat_megatron.evaluation.model import LoadedModel, load_model
from rat_megatron.evaluation.needles import _FILLER, KINDS, Needle, NeedleTask, NeedleWriter, write_jsonl
from tests.evaluating import save_tiny_model
from tests.preparing import save_byte_tokenizer

torch.set_num_threads(1)  # at these sizes threads only wait for each other
# (names hidden, names asked for, numbers of each); a hay of needles hides as many as fit
COUNTS = {"single": (1, 1, 1), "multikey": (4, 1, 1), "multiquery": (4, 4, 1), "multivalue": (1, 1, 4), "multikey-hay": (None, 1, 1)}


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return PreTrainedTokenizerFast.from_pretrained(save_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """As Llama's: a text gets a leading mark, so that a sentence by itself has more tokens than in its place; words of up to 5 letters."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["?"], show_progress=False, max_token_length=6)
    tokenizer.train_from_iterator([*_FILLER, "The number of the is", "0123456789"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tokens(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1500, 6000])
def test_lengths_are_met_and_never_passed(kind, length, byte_tokenizer, sentencepiece_tokenizer):
    for tokenizer in (byte_tokenizer, sentencepiece_tokenizer):
        longest = max(tokens(tokenizer, f" {text}") for text in [*_FILLER[:3], "The number of the velvet umber compass is 1234567."])
        for seed in range(4):
            [needle] = NeedleWriter(tokenizer, length, kind, room=128).write(1, seed)
            assert length - 2 * longest <= tokens(tokenizer, needle.prompt) + 128 <= length


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_holds_what_is_asked_for_and_the_distractors(kind, byte_tokenizer):
    names, asked, values = COUNTS[kind]
    for needle in NeedleWriter(byte_tokenizer, 5000, kind).write(5, seed=3):
        text, question = needle.prompt.split("Question:")
        hidden = re.findall(r"The number of (the [a-z ]+) is (\d{7})\.", text)
        numbers = dict.fromkeys(name for name, _ in hidden)
        in_question = [name for name in numbers if name in question]
        assert len(in_question) == asked and len(needle.expected) == asked * values
        assert sorted(number for name, number in hidden if name in in_question) == sorted(needle.expected)
        assert len({number for _, number in hidden}) == len(hidden)
        assert names is None or len(numbers) == names
        if names is None:
            assert len(numbers) > 50 and not any(sentence in text for sentence in _FILLER)
        assert not any(number in question for _, number in hidden)
        assert needle.score(needle.prompt + needle.answer) == [True] * len(needle.expected)
        assert re.findall(r"\d{7}", needle.answer) == list(needle.expected)


def test_needles_lie_at_their_depths_and_visit_all(byte_tokenizer):
    needles = list(NeedleWriter(byte_tokenizer, 8000, "single").write(10, seed=1))
    places = [needle.prompt.index(needle.expected[0]) / len(needle.prompt) for needle in needles]
    assert all(abs(place - needle.depths[0]) < 0.08 for place, needle in zip(places, needles, strict=True))
    assert sorted(int(needle.depths[0] * 10) for needle in needles) == list(range(10))


def test_questions_follow_from_seed_and_index(byte_tokenizer):
    writer = NeedleWriter(byte_tokenizer, 1200, "multikey")
    first = list(writer.write(3, seed=5))
    assert first == list(NeedleWriter(byte_tokenizer, 1200, "multikey").write(6, seed=5))[:3]
    assert len({needle.prompt for needle in [*first, *writer.write(3, seed=6)]}) == 6


def test_a_length_without_room_for_the_question(byte_tokenizer):
    with pytest.raises(UserError, match=r"250 tokens are too few for a 'single' needle test .* give (\d+) or more") as error:
        NeedleWriter(byte_tokenizer, 250, "single").one(0, 0)
    enough = int(re.search(r"give (\d+)", str(error.value))[1])
    assert len(list(NeedleWriter(byte_tokenizer, enough, "single").write(20, seed=0))) == 20


def test_lines_for_fine_tuning(byte_tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", byte_tokenizer, length=1000, count=7, seed=1, kinds=["single", "multivalue"])
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) == 7 and all(line.keys() == {"prompt", "answer"} for line in lines)
    assert [len(re.findall(r"\d{7}", line["answer"])) for line in lines] == [1, 4, 1, 4, 1, 4, 1]
    for line in lines:
        assert 900 < tokens(byte_tokenizer, line["prompt"]) + tokens(byte_tokenizer, line["answer"]) <= 1000
        assert all(number in line["prompt"] for number in re.findall(r"\d{7}", line["answer"]))
    with pytest.raises(UserError, match="too few"):
        write_jsonl(tmp_path / "b.jsonl", byte_tokenizer, length=100, count=7, seed=1, kinds=["single"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]  # nothing half-written
    with pytest.raises(UserError, match="unknown kind of needle test 'double'"):
        write_jsonl(tmp_path / "b.jsonl", byte_tokenizer, length=1000, count=7, seed=1, kinds=["double"])


# ---- on a model ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=1024))


def test_a_batch_is_continued_as_each_prompt_alone(loaded):
    prompts = ["Short", "A somewhat longer prompt, which pads the others", "Of middling length"]
    together = loaded.continue_greedily(prompts, 12)
    assert together == [loaded.continue_greedily([prompt], 12)[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_scores_are_the_share_of_numbers_found(loaded, monkeypatch):
    """With a model that finds what it finds, known in advance: the first two numbers of the text."""

    def first_two(loaded, prompts, max_new_tokens):
        assert max_new_tokens == 128 and all(tokens(loaded.tokenizer, prompt) <= 1024 - 128 for prompt in prompts)
        return [" and ".join(re.findall(r"\d{7}", prompt)[:2]) for prompt in prompts]

    monkeypatch.setattr(LoadedModel, "continue_greedily", first_two)
    task = NeedleTask(loaded, 1024, count=10, seed=2)
    results = task.run(loaded, batch_size=4)
    assert results["single"] == {"score": 1.0, "questions": 10, "stderr": 0.0, "by_depth": [1.0] * 10}
    assert results["multivalue"]["score"] == 0.5 and results["multivalue"]["stderr"] == 0.0
    hits = [needle.score(first_two(loaded, [needle.prompt], 128)[0])[0] for needle in task.questions["multikey"]]
    score = sum(hits) / 10
    assert results["multikey"]["score"] == score and 0 < score < 1
    assert results["multikey"]["by_depth"] == [float(hit) for hit in hits]  # question i lies in the tenth i
    assert results["multikey"]["stderr"] == pytest.approx((score * (1 - score) / 9) ** 0.5)


def test_a_real_run_scores_what_the_model_writes(loaded):
    """The tiny model knows no numbers: one question is given what it writes as the number that is expected."""
    task = NeedleTask(loaded, 1024, count=2, seed=random.randrange(1000))
    first, second = task.questions["single"]
    written = loaded.continue_greedily([first.prompt], 128)[0]
    task.questions = {"single": [Needle(first.prompt, (written[20:40],), first.depths), second]}
    assert task.run(loaded, batch_size=2)["single"]["score"] == 0.5


def test_a_length_past_the_model(loaded):
    with pytest.raises(UserError, match="--needle-length 2000 is past the 1024 positions"):
        NeedleTask(loaded, 2000, count=1, seed=0)
