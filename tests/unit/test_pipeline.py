"""The whole way on real runs: pretrain, adapt, evaluate under patterns, export; the exported model equals Megatron's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers import MODEL_FLAGS, SEQ_LENGTH, TRAIN_FLAGS, pretrain, tensorboard_scalars

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, arl_run, tiny_data):
    """The ARL run's model adapted to a hybrid pattern in three iterations."""
    folder = tmp_path_factory.mktemp("adapted")
    pretrain(
        *MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--pretrained-checkpoint", arl_run / "checkpoints",
        "--rat-pattern", "[d16w8s4,dense]", "--rat-eval-patterns", "dense", "[d16w8s4,dense]", "--train-iters", 3, "--save", folder,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, adapted):
    """The adapted model in Hugging Face format, written by the command line."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    command = [sys.executable, "-m", "rat_megatron.cli.main", "convert", "to-hf", str(adapted), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_pattern_is_validated_on_the_same_batches(arl_run):
    report = json.loads((arl_run / "checkpoints" / "report.json").read_text())
    scalars = tensorboard_scalars(arl_run / "tensorboard")
    assert list(report["patterns"]) == ["dense", "d16", "[d8,d16w8s4]"] and report["iteration"] == 20
    for word, loss in report["patterns"].items():
        name = "lm loss validation" if word == "dense" else f"lm loss {word} validation"
        assert list(scalars[name]) == [10, 20] and scalars[name][20] == pytest.approx(loss, rel=1e-6)
        assert scalars[name][20] < scalars[name][10]  # it learns
    assert len(set(report["patterns"].values())) == 3  # each pattern had its own mask
    assert report["tokens_per_second"] > 0


def test_adaptation_starts_from_the_pretrained_weights(arl_run, adapted):
    before = json.loads((arl_run / "checkpoints" / "report.json").read_text())["patterns"]["dense"]
    after = json.loads((adapted / "report.json").read_text())
    assert after["pattern"] == "[d16w8s4,dense]" and after["iteration"] == 3
    assert abs(after["patterns"]["dense"] - before) < 0.3  # a fresh model is more than one above


def test_reported_loss_is_that_of_the_exported_model(exported, adapted, tiny_data):
    """The validation loss, from its definition, with the exported model and the held-out shards themselves."""
    import numpy as np
    from streaming import StreamingDataset

    from rat_megatron.hf import RatPlusForCausalLM

    model = RatPlusForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert model.config.attention_pattern == "[d16w8s4,dense]"
    dataset = StreamingDataset(local=str(tiny_data / "val"), batch_size=1)
    picked = [index * len(dataset) // 8 for index in range(8)]  # 2 evaluation iterations of 4 samples, at even distances
    samples = torch.from_numpy(np.stack([dataset[index]["tokens"] for index in picked]).astype(np.int64))
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples[:, 1:], reduction="none")
    counted = samples[:, :-1] != model.config.eos_token_id
    reported = json.loads((adapted / "report.json").read_text())["patterns"]["[d16w8s4,dense]"]
    assert float(losses[counted].mean()) == pytest.approx(reported, abs=2e-5)


@pytest.mark.parametrize("word", ["dense", "d16", "d16w8s4", "[d16w8s4,dense]", "{dense,d4,d8w2,d16s4}", "d8k2", "d8k2+d"])
def test_exported_logits_equal_megatrons(megatron_process, adapted, exported, word):
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel

    from rat_megatron.checkpoint.torch_dist import find_iteration
    from rat_megatron.hf import RatPlusForCausalLM
    from rat_megatron.model.config import RATTransformerConfig
    from rat_megatron.model.core_attention import set_attention_pattern
    from rat_megatron.model.layer_spec import get_rat_block_spec
    from rat_megatron.ratplus.pattern import AttentionPattern

    config = RATTransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, normalization="RMSNorm", layernorm_epsilon=1e-6,
        add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0, transformer_impl="local",
    )  # fmt: skip
    ours = GPTModel(
        config, get_rat_block_spec(config), 300, SEQ_LENGTH, position_embedding_type="rope", share_embeddings_and_output_weights=True
    )
    state = dist_checkpointing.load(ours.sharded_state_dict(), str(find_iteration(adapted)))
    missing, _ = ours.load_state_dict({name: state[name] for name, _ in ours.named_parameters()}, strict=False)
    assert all(name.endswith("_extra_state") for name in missing)
    theirs = RatPlusForCausalLM.from_pretrained(exported, dtype=torch.float32)
    theirs.set_attention_pattern(word)
    set_attention_pattern([ours], AttentionPattern.parse(word))
    for length in (1, 17, SEQ_LENGTH):
        tokens = torch.randint(0, 300, (2, length))
        with torch.no_grad():
            expected = ours(tokens, torch.arange(length).expand(2, length), None)
            assert (theirs(tokens).logits - expected).abs().max() < 1e-4


def test_exported_folder_works_without_this_package(exported, tmp_path):
    """AutoModelForCausalLM with trust_remote_code in a process that cannot import rat_megatron; the tokenizer came along."""
    script = f"""
import sys
sys.modules["rat_megatron"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(exported)!r})
inputs = tokenizer("Return the", return_tensors="pt", return_token_type_ids=False)
model.set_attention_pattern("d16w8s4")
output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
tokens = inputs.input_ids
for _ in range(12):
    tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
assert output.tolist() == tokens[:, :output.shape[1]].tolist() and output.shape[1] > tokens.shape[1] - 12
"""
    environment = {"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
