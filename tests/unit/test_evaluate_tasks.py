"""Tasks of lm-evaluation-harness from local data: scores are compared with ones computed here from the model's logits and texts."""

import json
import math
import re
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from rat_megatron.errors import UserError
from rat_megatron.evaluation.evaluate import evaluate
from rat_megatron.evaluation.harness_model import HarnessModel, cut_middle
from rat_megatron.evaluation.model import load_model
from rat_megatron.evaluation.tasks import COMMONSENSE, LONGBENCH, TaskSuite, _metrics, averages, expand, headline
from tests.evaluating import save_tiny_model
from tests.preparing import EOD

pytestmark = pytest.mark.slow

torch.set_num_threads(1)  # at these sizes threads only wait for each other

PIQA = [
    {"goal": "To dry a wet shoe", "sol1": "fill it with paper.", "sol2": "fill it with soup.", "label": 0},
    {"goal": "To open a jar", "sol1": "paint the lid.", "sol2": "tap the lid and turn.", "label": 1},
    {"goal": "To cool tea", "sol1": "wait a little while before you drink it.", "sol2": "boil it.", "label": 0},
    {"goal": "To find north", "sol1": "ask a spoon.", "sol2": "use a compass.", "label": 1},
]
ARC = [
    {"id": str(i), "question": question, "choices": {"text": list(answers), "label": list("ABCD")[: len(answers)]}, "answerKey": key}
    for i, (question, answers, key) in enumerate(
        [
            ("Which of these is a metal?", ("wood", "iron", "glass", "wool"), "B"),
            ("What do plants need?", ("light", "music", "money"), "A"),
            ("What melts at room temperature?", ("rock", "gold", "salt", "ice"), "D"),
        ]
    )
]
WINOGRANDE = [
    {"sentence": "The vase fell off the shelf since the _ was narrow.", "option1": "vase", "option2": "shelf", "answer": "2"},
    {"sentence": "Ann thanked Kim because _ had helped her.", "option1": "Ann", "option2": "Kim", "answer": "2"},
    {"sentence": "The box did not fit because the _ was too big.", "option1": "box", "option2": "car", "answer": "1"},
]
LAMBADA = [{"text": "the farmer fed the hen and then the hen laid an egg"}, {"text": "she looked for the key but there was no key"}]
HELLASWAG = [
    {
        "activity_label": "Cooking",
        "ctx_a": "A man stands in a kitchen.",
        "ctx_b": "he",
        "endings": ["cuts an onion.", "flies away.", "is a lamp.", "swims to the boat [title] and sings."],
        "label": label,
    }
    for label in ("0", "3")
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", attention_pattern="d4w2"))


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    """Each task's data in its own columns, in every format that is read."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("piqa", PIQA), ("arc_easy", ARC), ("arc_challenge", ARC[::-1]), ("lambada_openai", LAMBADA)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(WINOGRANDE).to_parquet(folder / "winogrande.parquet")
    DatasetDict({"validation": Dataset.from_list(HELLASWAG), "train": Dataset.from_list(HELLASWAG)}).save_to_disk(folder / "hellaswag")
    return folder


@torch.no_grad()
def log_likelihood(loaded, context, continuation):
    """Sum of the log-probabilities of a continuation, and whether each token of it is the likeliest; zero-shot, no BOS."""
    ids = loaded.tokenizer(context + continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = len(loaded.tokenizer(context, add_special_tokens=False)["input_ids"])
    log_p = loaded.model(ids).logits[0].double().log_softmax(-1)[start - 1 : -1]
    target = ids[0, start:]
    return log_p.gather(1, target[:, None]).sum().item(), bool((log_p.argmax(-1) == target).all())


def accuracies(loaded, questions):
    """acc and acc_norm (per byte of the answer) of (context, answers, right)."""
    hits, normalized = [], []
    for context, answers, right in questions:
        scores = torch.tensor([log_likelihood(loaded, context, f" {answer}")[0] for answer in answers])
        hits.append(scores.argmax().item() == right)
        normalized.append((scores / torch.tensor([len(answer) for answer in answers])).argmax().item() == right)
    return sum(hits) / len(hits), sum(normalized) / len(normalized)


def arc_questions(rows):
    return [(f"Question: {r['question']}\nAnswer:", r["choices"]["text"], "ABCD".index(r["answerKey"])) for r in rows]


def expected_commonsense(loaded):
    piqa = [(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]) for row in PIQA]
    context = "Cooking: A man stands in a kitchen. He"
    endings = ["cuts an onion.", "flies away.", "is a lamp.", "swims to the boat. and sings."]
    winogrande = []
    for row in WINOGRANDE:
        start, rest = row["sentence"].split("_")
        scores = [log_likelihood(loaded, start + row[option], f" {rest.strip()}")[0] for option in ("option1", "option2")]
        winogrande.append(scores.index(max(scores)) == int(row["answer"]) - 1)
    lambada = [log_likelihood(loaded, *row["text"].rsplit(" ", 1)[:1], " " + row["text"].split(" ")[-1]) for row in LAMBADA]
    return {
        "piqa": accuracies(loaded, piqa),
        "arc_easy": accuracies(loaded, arc_questions(ARC)),
        "arc_challenge": accuracies(loaded, arc_questions(ARC)),
        "hellaswag": accuracies(loaded, [(context, endings, label) for label in (0, 3)]),
        "winogrande": (sum(winogrande) / len(winogrande), None),
        "lambada_openai": (sum(hit for _, hit in lambada) / len(lambada), None),
        "perplexity": torch.tensor([value for value, _ in lambada]).mean().neg().exp().item(),
    }


def test_commonsense(loaded, task_data):
    suite = TaskSuite(["commonsense"], loaded, task_data=task_data, batch_size=3)
    assert suite.names == list(COMMONSENSE)
    perplexities = []
    for pattern in ("d4w2", "dense", "d4w2"):  # what one evaluation leaves must not change the next
        loaded.model.set_attention_pattern(pattern)
        results, expected = suite.run(), expected_commonsense(loaded)
        for task in COMMONSENSE:
            acc, acc_norm = expected[task]
            assert results[task]["acc"] == pytest.approx(acc), task
            assert acc_norm is None or results[task]["acc_norm"] == pytest.approx(acc_norm), task
            assert results[task]["acc_stderr"] >= 0
        assert results["lambada_openai"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
        perplexities.append(results["lambada_openai"]["perplexity"])
        mean = sum(results[task]["acc_norm" if task in ("arc_challenge", "hellaswag") else "acc"] for task in COMMONSENSE) / 6
        assert averages(results) == {"commonsense": pytest.approx(mean)}
    assert perplexities[0] == perplexities[2] != perplexities[1]


@pytest.mark.parametrize("cut", [False, True])
def test_no_token_is_put_before_a_prompt(loaded, cut):
    """Although the tokenizer would."""
    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|eod|> $A", special_tokens=[("<|eod|>", EOD)])
    assert len(tokenizer("abc")["input_ids"]) == 4
    model = HarnessModel(replace(loaded, tokenizer=tokenizer), batch_size=2, cut_in_middle=set())
    model._cutting = cut
    assert len(model.tok_encode("abc")) == 3
    ids, mask = model.tok_batch_encode(["abc", "abcdefgh"], left_truncate_len=7)
    expected = ["abc", "abcfgh"] if cut else ["abc", "bcdefgh"]
    texts = [tokenizer.decode(row[keep == 1]).replace(" ", "") for row, keep in zip(ids, mask, strict=True)]  # it has no decoder
    assert texts == expected


# ---- LongBench -----------------------------------------------------------------------------------------------------------------------

QASPER = (
    "You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or sentence "
    "if possible. If the question cannot be answered based on the information in the article, write"
)


def longbench_row(context, answers, question="Who wrote it?", **more):
    return {"input": question, "question": question, "context": context, "answers": answers, "all_classes": None, **more}


def test_longbench_prompts_are_cut_in_their_middle_and_answers_are_greedy(loaded, tmp_path):
    """Local data is made so that the right answer is what the model writes after the prompt that the protocol asks for."""
    name = "longbench_narrativeqa"
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(longbench_row("placeholder", ["x"])) + "\n")
    suite = TaskSuite([name], loaded, task_data=tmp_path)
    task = suite._tasks[0]
    rows = [longbench_row("A short story.", []), longbench_row("Once upon a time " + "there was a house by the sea " * 30, [])]
    for row in rows:
        ids = loaded.tokenizer(task.doc_to_text(row), add_special_tokens=False)["input_ids"]
        limit = 512 - 128 - 1
        if len(ids) > limit:
            ids = ids[:191] + ids[-192:]
        output = loaded.model.generate(torch.tensor([ids]), max_new_tokens=128, do_sample=False, pad_token_id=0)[0, len(ids) :]
        row["answers"] = [loaded.tokenizer.decode(output, skip_special_tokens=True).split("\nQuestion")[0]]
    assert all(len(row["answers"][0].split()) > 0 for row in rows)
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = TaskSuite([name], loaded, task_data=tmp_path, batch_size=2).run()[name]
    assert results["score"] == pytest.approx(1.0)
    assert headline(name, results) == "score"


def test_longbench_settings(loaded, tmp_path):
    names = ["longbench_gov_report", "longbench_trec", "longbench_lcc", "longbench_samsum", "longbench_musique"]
    for name in names:
        row = longbench_row("text", ["DESC"], **({"all_classes": ["DESC", "NUM"]} if "trec" in name else {}))
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    tasks = dict(zip(names, TaskSuite(names, loaded, task_data=tmp_path)._tasks, strict=True))
    settings = {name: task.config.generation_kwargs for name, task in tasks.items()}
    greedy = {"do_sample": False, "temperature": 0.0}
    assert settings["longbench_gov_report"] == {**greedy, "max_gen_toks": 512, "until": [], "repetition_penalty": 1.2}
    assert settings["longbench_trec"] == {**greedy, "max_gen_toks": 64, "until": ["\nQuestion"]}
    assert settings["longbench_lcc"] == {**greedy, "max_gen_toks": 64, "until": []}
    assert settings["longbench_samsum"] == {**greedy, "max_gen_toks": 128, "until": []}
    assert settings["longbench_musique"] == {**greedy, "max_gen_toks": 32, "until": ["\nQuestion"]}
    score = tasks["longbench_trec"].config.process_results
    doc = {"answers": ["DESC"], "all_classes": ["DESC", "NUM"]}
    assert score(doc, ["\nDESC\nNUM"])["score"] == 1.0  # the first line with text counts
    assert score(doc, ["NUM\nDESC"])["score"] == 0.0


def test_longbench_protocol_covers_the_fourteen_english_tasks():
    assert len(LONGBENCH) == 14 and expand(["longbench", "longbench_lcc", "piqa"]) == [*LONGBENCH, "piqa"]
    assert {name for name, (_, _, penalty) in LONGBENCH.items() if penalty} == {
        f"longbench_{n}" for n in ("gov_report", "qmsum", "multi_news")
    }


@pytest.mark.parametrize("length", [1, 6, 7, 20])
def test_cutting_the_middle(length):
    cut = cut_middle(list(range(20)), length)
    assert len(cut) == length and cut == sorted(set(cut))
    assert length == 1 or (cut[0], cut[-1]) == (0, 19)


# ---- other tasks ---------------------------------------------------------------------------------------------------------------------


def test_a_single_task_and_its_limit(loaded, task_data):
    suite = TaskSuite(["winogrande"], loaded, task_data=task_data)
    first = [row["answer"] for row in suite._tasks[0].validation_docs()][:1]
    assert first == ["2"] and suite.run(limit=1)["winogrande"]["acc"] in (0.0, 1.0)
    assert "acc_stderr" not in suite.run(limit=1)["winogrande"] and averages(suite.run(limit=1)) == {}


def test_tasks_whose_answers_are_written(loaded, task_data, tmp_path, capsys):
    """SnapKV shows in these only: the others would have the scores of dense attention."""
    for file in task_data.glob("piqa*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "longbench_triviaqa.jsonl").write_text(json.dumps(longbench_row("a long story " * 20, ["x"])) + "\n")
    suite = TaskSuite(["piqa", "longbench_triviaqa"], loaded, task_data=tmp_path)
    assert suite.generated == ["longbench_triviaqa"] and suite.run([]) == {}
    patterns = ["d16", "snap64w8"]
    results = evaluate(
        loaded.folder, tmp_path / "out", patterns=patterns, tasks=suite.names, task_data=tmp_path, task_limit=1
    )["patterns"]  # fmt: skip
    assert [list(results[word]["tasks"]) for word in patterns] == [["piqa", "longbench_triviaqa"], ["longbench_triviaqa"]]
    assert "snap64w8: without piqa" in capsys.readouterr().err


def test_metrics_as_the_harness_names_them():
    """RULER's tasks have one for each length, -1 where it was not asked for; others have several filters, and no error of some."""
    ruler = {"alias": "niah", "4096,none": 0.25, "4096_stderr,none": "N/A", "8192,none": -1, "8192_stderr,none": 0.1}
    assert _metrics(ruler) == {"4096": 0.25} and headline("niah_single_1", _metrics(ruler)) == "4096"
    filtered = {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75, "sample_len": 3, "perplexity,none": math.nan}
    assert _metrics(filtered) == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}


# ---- bad input -----------------------------------------------------------------------------------------------------------------------


def sentence(*arguments, **options):
    with pytest.raises(UserError) as error:
        TaskSuite(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_network_and_data(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    says = sentence(["arc_challenge"], loaded, task_data=tmp_path)
    assert re.search(r"load_dataset\('allenai/ai2_arc', 'ARC-Challenge'\)\.save_to_disk\('FOLDER/arc_challenge'\)", says)
    assert "--task-data FOLDER" in says


def test_without_the_harness(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "rat_megatron.evaluation.harness_model", None)
    assert sentence(["piqa"], loaded).endswith("install rat-megatron[eval].")


def test_bad_tasks_and_data(loaded, tmp_path):
    assert "--task-data" in sentence(["piqa"], loaded, task_data=tmp_path / "nowhere")
    (tmp_path / "piqa.jsonl").write_text('{"question": "no such column"}\n')
    assert "piqa.jsonl is not the data of task piqa" in sentence(["piqa"], loaded, task_data=tmp_path)
    (tmp_path / "piqa.jsonl").write_text("{no json\n")
    assert "piqa.jsonl cannot be read" in sentence(["piqa"], loaded, task_data=tmp_path)
    assert "begins at 4096 tokens" in sentence(["niah_single_1"], loaded)
