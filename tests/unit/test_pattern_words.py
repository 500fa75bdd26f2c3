"""A pattern word that is longer than it must be is brought to its shortest form wherever it enters."""

from __future__ import annotations

import json
import sys

import pytest

from rat_megatron.convert import convert_to_hf
from rat_megatron.convert.model_card import measured_losses
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from rat_megatron.evaluation.evaluate import evaluate
from rat_megatron.evaluation.generator import Generator, Settings
from rat_megatron.evaluation.model import load_model
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM
from rat_megatron.training.monitoring.comparison import compare_runs
from tests.converting import megatron_args, megatron_tensors, random_weights, write_checkpoint
from tests.evaluating import save_tiny_model
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS
from tests.preparing import write_lines

LONG = {"d4w0s2": "d4s2", " d4 w0 s2": "d4s2", "[dense]*2": "dense", "[d4w0, d4]": "d4", "{d1*4}": "dense", "[dense,d8w0]": "[dense,d8]"}
words = pytest.mark.parametrize(("word", "shortest"), LONG.items(), ids=LONG.values())


@words
def test_flags_of_training(megatron_process, tiny_data, monkeypatch, word, shortest):
    from rat_megatron.training.arguments import read_command_line
    from rat_megatron.training.arguments.checks import check_and_derive

    flags = ["--rat-pattern", word, "--rat-arl-pattern", word, "--rat-eval-patterns", word, "d16", shortest, "--data-path", tiny_data]
    monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", "1", *map(str, flags)])
    derived = check_and_derive(read_command_line())
    assert derived["rat_pattern"] == derived["rat_arl_pattern"] == shortest
    assert derived["rat_eval_patterns"] == [shortest, "d16"]  # each once


@words
def test_the_configuration_and_the_model(word, shortest):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert RatPlusConfig(**sizes, attention_pattern=word).attention_pattern == shortest
    model = RatPlusForCausalLM(RatPlusConfig(**sizes, attention_pattern="d16"))
    model.set_attention_pattern(word)
    assert model.config.attention_pattern == shortest
    model.config.attention_pattern = word
    assert model.config.to_dict()["attention_pattern"] == shortest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_evaluate_and_generate(model, tmp_path):
    text = write_lines(tmp_path / "text.jsonl", [f"River {i} ran through the valley." for i in range(40)])
    prepare([text], tmp_path / "data", tokenizer=str(model), seq_length=48, workers=1, val_fraction=0.5)
    results = evaluate(model, tmp_path / "out", patterns=[*LONG, "d4s2"], data=str(tmp_path / "data"), num_samples=1)
    assert list(results["patterns"]) == list(dict.fromkeys(LONG.values()))
    for word, shortest in LONG.items():
        loaded = load_model(model)
        Generator(loaded, Settings(), word)
        assert loaded.config.attention_pattern == shortest


def test_conversion(tmp_path):
    """Also of a checkpoint whose arguments hold the word as it was typed."""
    for number, (word, shortest) in enumerate(LONG.items()):
        args = megatron_args(rat_pattern=word)
        run = write_checkpoint(tmp_path / f"run{number}", megatron_tensors(random_weights()), args)
        typed, stored = tmp_path / f"typed{number}", tmp_path / f"stored{number}"
        assert convert_to_hf(run, typed, pattern=word).pattern == shortest
        assert convert_to_hf(run, stored).pattern == shortest
        assert json.loads((stored / "config.json").read_text())["attention_pattern"] == shortest
        (folder,) = run.glob("iter_*")
        report = {"iteration": int(folder.name.removeprefix("iter_")), "pattern": shortest, "patterns": {word: 2.5}}
        (run / "report.json").write_text(json.dumps(report))
        assert list(measured_losses(folder, args).values()) == [2.5]


def test_report_of_runs_that_kept_their_words_as_typed(tmp_path):
    def run(name, pattern, **content):
        (tmp_path / name).mkdir()
        report = {"pattern": pattern, "tokens_per_second": 5.0, "iteration": 7, **content}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        return tmp_path / name

    base = run("base", "dense", patterns={"dense": 2.0, "d16w0s4": 2.5})
    adapted = run("adapted", "d16w0s4", patterns={"d16s4": 2.1})
    report = compare_runs(tmp_path / "out", base, adapted=[adapted])
    assert report["patterns"] == {"dense": {"pretrained": 2.0}, "d16s4": {"pretrained": 2.5, "adapted": 2.1}}
    with pytest.raises(UserError, match="--baseline-adapted needs --baseline"):
        compare_runs(tmp_path / "out", base, baseline_adapted=[adapted])
    other = run("other", "d16s4", patterns={"dense": 2.1})
    with pytest.raises(UserError, match="adapted to d16s4 was not evaluated under it: .* --rat-eval-patterns d16s4"):
        compare_runs(tmp_path / "out", base, adapted=[other])
    for name, content in {"unknown": {"patterns": {"d16x": 2.0}}, "none": {}, "list": {"patterns": [2.0]}}.items():
        with pytest.raises(UserError, match=r"report.json is damaged"):
            compare_runs(tmp_path / "out", run(name, "dense", **content))
