"""`rat-megatron evaluate`: losses against Megatron's own, cache sizes against the formula, and what it writes and refuses."""

import json

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from streaming import LocalDataset
from typer.testing import CliRunner

from rat_megatron.cli.main import app
from rat_megatron.convert import convert_to_hf
from rat_megatron.errors import UserError
from rat_megatron.evaluation import loss as loss_module
from rat_megatron.evaluation.evaluate import evaluate
from rat_megatron.evaluation.loss import ValidationSet, validation_loss
from rat_megatron.evaluation.model import load_model
from rat_megatron.evaluation.results import result_table, write_plots
from rat_megatron.ratplus.pattern import AttentionPattern, PatternError
from tests.evaluating import save_tiny_model
from tests.helpers import SEQ_LENGTH
from tests.preparing import EOD, prepare, save_byte_tokenizer, write_lines

torch.set_num_threads(1)  # at these sizes threads only wait for each other
PATTERNS = ["dense", "d16", "d8w4s2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Samples of 48 bytes, in documents short enough that many inputs end one."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Document {i} {'is short' * (i % 7)}" for i in range(120)]
    options = {"seq_length": 48, "workers": 1, "val_fraction": 0.5}
    prepare([write_lines(folder / "a.jsonl", texts)], folder / "out", tokenizer=save_byte_tokenizer(folder / "t"), **options)
    return folder / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", attention_pattern="d4w2")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


# ---- loss ----------------------------------------------------------------------------------------------------------------------------


def test_losses_equal_megatrons(arl_run, tiny_data, tmp_path):
    """A real run evaluated 8 of the validation samples (two batches of 4) under each pattern at its end."""
    report = json.loads((arl_run / "checkpoints" / "report.json").read_text())
    convert_to_hf(arl_run / "checkpoints", tmp_path / "hf")
    results = evaluate(
        tmp_path / "hf", tmp_path / "out", patterns=list(report["patterns"]), data=str(tiny_data), num_samples=8, batch_size=3
    )
    assert results["patterns"].keys() == report["patterns"].keys() and len(report["patterns"]) >= 3
    for word, megatrons in report["patterns"].items():
        assert results["patterns"][word]["loss"]["loss"] == pytest.approx(megatrons, abs=1e-4), word
        assert results["patterns"][word]["loss"]["seq_length"] == SEQ_LENGTH


def test_loss_leaves_out_the_token_after_a_document(loaded, data, monkeypatch):
    """Every sample of the split, computed here one at a time, in one piece and in float64."""
    monkeypatch.setattr(loss_module, "_CHUNK", 70)  # not a divisor of anything
    split = LocalDataset(str(data / "val"))
    samples = [torch.from_numpy(split[i]["tokens"].astype("int64")) for i in range(len(split))]
    assert sum(int((tokens[:-1] == EOD).sum()) for tokens in samples) > len(samples)
    for pattern in PATTERNS:
        loaded.model.set_attention_pattern(pattern)
        sums, counts = [], []
        for tokens in samples:
            logits = loaded.model(tokens[None, :-1]).logits[0].double().detach()
            losses = F.cross_entropy(logits, tokens[1:], reduction="none")[tokens[:-1] != EOD]
            sums.append(losses.sum())
            counts.append(len(losses))
        result = validation_loss(loaded, ValidationSet(str(data), loaded), batch_size=4)
        expected = float(sum(sums) / sum(counts))
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        assert (result["tokens"], result["samples"]) == (sum(counts), len(samples))
        means, weights = torch.stack(sums) / torch.tensor(counts), torch.tensor(counts) / sum(counts)
        by_hand = ((weights * (means - expected)).square().sum() * len(sums) / (len(sums) - 1)).sqrt()
        assert result["stderr"] == pytest.approx(float(by_hand), rel=1e-3)


def test_memory_lengths_are_those_of_the_mean_gates(loaded, data, tmp_path):
    samples = ValidationSet(str(data), loaded, num_samples=3)
    lengths = validation_loss(loaded, samples, batch_size=2)["memory_lengths"]
    first, gates = loaded.model.model.layers[0], []
    for batch in samples.batches(1):
        hidden = first.input_layernorm(loaded.model.model.embed_tokens(batch["tokens"]))
        gates.append(torch.sigmoid(first.self_attn.forget_gate_proj(hidden)[0].double().detach()))
    by_hand = (1 / (1 - torch.cat(gates).mean(0))).median()
    assert len(lengths) == 2 and lengths[0] == pytest.approx(float(by_hand), rel=1e-5)

    plain = load_model(save_tiny_model(tmp_path / "plain", use_recurrence=False))
    assert "memory_lengths" not in validation_loss(plain, ValidationSet(str(data), plain, num_samples=3), batch_size=2)


def test_data_that_does_not_fit_the_model(data, loaded, tmp_path):
    def sentence(data, loaded, **options):
        with pytest.raises(UserError) as error:
            ValidationSet(str(data), loaded, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "more than the" in sentence(data, loaded, num_samples=10_000)
    assert "rat_meta.json does not exist" in sentence(tmp_path, loaded)
    assert "is a URL" in sentence("s3://bucket/data", loaded)
    assert "has samples of 48 tokens" in sentence(data, load_model(save_tiny_model(tmp_path / "short", max_position_embeddings=32)))
    small = load_model(save_tiny_model(tmp_path / "small", vocab_size=200, tokenizer=False))
    assert "has a vocabulary of 257" in sentence(data, small)
    other = load_model(save_tiny_model(tmp_path / "other", tokenizer=False, tokenizer_hash="0123456789abcdef"))
    assert "was trained with another (0123456789abcdef)" in sentence(data, other)
    meta = json.loads((data / "rat_meta.json").read_text())
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "rat_meta.json").write_text(json.dumps({**meta, "tokenizer_hash": "f" * 16}))
    assert "was trained with another" in sentence(tmp_path / "renamed", loaded)  # told from the tokenizer in the model's folder
    (tmp_path / "renamed" / "rat_meta.json").write_text(json.dumps({**meta, "splits": {**meta["splits"], "val": {"samples": 0}}}))
    assert "has no validation samples" in sentence(tmp_path / "renamed", loaded)


# ---- results -------------------------------------------------------------------------------------------------------------------------


def test_the_command_measures_loss_needles_and_cache(folder, data, tmp_path):
    output = tmp_path / "scores"
    words = [option for word in PATTERNS for option in ("--pattern", word)]
    arguments = ["evaluate", str(folder), *words, "--data", str(data), "--num-samples", "6", "--batch-size", "4", "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--needle-length", "300"])
    assert "300 tokens are too few" in str(result.exception) and not output.exists()

    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert list(results["patterns"]) == PATTERNS and results["settings"]["num_samples"] == 6
    for word, of_pattern in results["patterns"].items():
        entries = AttentionPattern.parse(word).cache_entries(48, 2, 4)
        stored = (of_pattern["kv_cache_bytes"]["48"] - 2 * 2 * 32 * 4) / (2 * 8 * 4)  # without the fp32 state; a key and a value
        assert entries - 8 <= stored <= entries  # the formula counts the query's own entry, which each of 8 heads may pass on at once
        assert f"{of_pattern['loss']['loss']:.4f}" in result.stdout
    losses = {word: of_pattern["loss"]["loss"] for word, of_pattern in results["patterns"].items()}
    assert len(set(losses.values())) == 3
    assert sorted(path.name for path in output.iterdir()) == ["loss.png", "results.json"]

    with pytest.raises(UserError, match="results.json exists"):  # nothing that was measured is lost
        evaluate(folder, output, data=str(data))


def test_needles_and_the_models_own_pattern(tmp_path):
    folder = save_tiny_model(tmp_path / "model", max_position_embeddings=1024, attention_pattern="d8w4")
    results = evaluate(folder, tmp_path / "out", needle_lengths=[1024], needle_count=1, batch_size=2)
    assert list(results["patterns"]) == ["d8w4"] and results["model"]["attention_pattern"] == "d8w4"
    needles = results["patterns"]["d8w4"]["needles"]["1024"]
    assert set(needles) == {"single", "multikey", "multikey-hay", "multiquery", "multivalue"}
    assert all(0 <= summary["score"] <= 1 and summary["questions"] == 1 for summary in needles.values())
    assert sum(share is not None for share in needles["multiquery"]["by_depth"]) == 4
    assert (tmp_path / "out" / "needles.png").is_file()


def test_plots_and_table_of_all_kinds(tmp_path):
    def of_pattern(size, score):
        return {
            "kv_cache_bytes": {"1024": size, "4096": 4 * size},
            "loss": {"loss": 2 + score, "seq_length": 1024, "stderr": 0.01},
            "tasks": {"piqa": {"acc": score, "acc_stderr": 0.02, "acc_norm": score}, "hellaswag": {"acc": 0.1, "acc_norm": score}},
            "averages": {"commonsense": score},
            "needles": {"4096": {"single": {"score": score, "questions": 3, "by_depth": [None] * 10}}},
        }

    patterns = {"dense": of_pattern(2**24, 0.75), "d16": of_pattern(2**20, 0.5)}
    results = {"model": {"folder": "m", "max_position_embeddings": 4096}, "patterns": patterns}
    write_plots(tmp_path, results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "needles.png", "tasks.png"]
    for path in tmp_path.iterdir():
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300 and pixels[..., :3].std() > 0.01  # not blank
    table = result_table(results)
    assert [column.header for column in table.columns] == ["", "dense", "d16"]
    cells = dict(zip(table.columns[0].cells, zip(table.columns[1].cells, table.columns[2].cells, strict=True), strict=True))
    assert cells["piqa (acc)"] == ("0.750 ± 0.020", "0.500 ± 0.020") and cells["hellaswag (acc_norm)"] == ("0.750", "0.500")
    assert cells["KV cache of 4096 tokens, KiB"] == ("65,536.0", "4,096.0")


def test_bad_input_ends_before_anything_is_written(folder, data, tmp_path):
    output = tmp_path / "out"
    for options, says in [
        ({}, "nothing to evaluate"),
        ({"patterns": ["d4x"], "data": str(data)}, "unknown attention pattern"),
        ({"needle_lengths": [5000]}, "--needle-length 5000 is past the 512 positions"),
        ({"data": str(data), "dtype": "int8"}, "--dtype int8"),
    ]:
        with pytest.raises((UserError, PatternError), match=says):
            evaluate(folder, output, **options)
    assert not output.exists()
