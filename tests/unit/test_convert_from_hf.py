"""Hugging Face folders to Megatron checkpoints, and back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration, read_checkpoint_args
from rat_megatron.cli.main import app
from rat_megatron.convert import convert_from_hf, convert_to_hf, megatron_weights
from rat_megatron.convert.names import fuse_qkv
from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM
from tests.converting import megatron_args, megatron_tensors, random_weights, write_checkpoint, write_tokenizer
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS, pretrain

pytestmark = pytest.mark.slow

torch.set_num_threads(1)  # at these sizes threads only wait for each other


def write_model(folder, dtype=torch.float32, shard="5GB", **changes):
    """A random model as Transformers saves it; norms differ from 1 so that their place matters."""
    settings = {
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "intermediate_size": 40, "max_position_embeddings": 32, "attention_pattern": "d4w2", "initializer_range": 0.2,
        "eos_token_id": 2, "tokenizer_name": "some/tokenizer",
    }  # fmt: skip
    model = RatPlusForCausalLM(RatPlusConfig(**{**settings, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def stored_weights(folder):
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def same(one, other):
    """Bit by bit, with names and types."""
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype is other[name].dtype and torch.equal(weight, other[name]), name


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": False, "shard": "8KB"}, {"use_recurrence": False, "num_key_value_heads": 4}, {"dtype": torch.bfloat16}],
    ids=["tied, grouped", "untied, sharded", "baseline", "bfloat16"],
)
def test_there_and_back_is_the_same_folder(tmp_path, settings):
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "hf"))
    folder = write_tokenizer(write_model(tmp_path / "hf", tokenizer_hash=tokenizer_hash(tokenizer), **settings))
    converted = convert_from_hf(folder, tmp_path / "run")
    convert_to_hf(tmp_path / "run", tmp_path / "back")
    weights, config = stored_weights(folder), RatPlusConfig.from_pretrained(folder)
    same(stored_weights(tmp_path / "back"), weights)
    back = RatPlusConfig.from_pretrained(tmp_path / "back")
    named_by_the_tokenizer = {"bos_token_id", "pad_token_id", "initializer_range", "auto_map"}
    assert (back.bos_token_id, back.pad_token_id) == (1, 3)
    assert {k: v for k, v in back.to_dict().items() if k not in named_by_the_tokenizer} == {
        k: v for k, v in config.to_dict().items() if k not in named_by_the_tokenizer
    }
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (converted.check.tensors, converted.check.parameters) == (len(weights), sum(weight.numel() for weight in weights.values()))
    assert converted.check.difference < 1e-5 * converted.check.largest_logit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "run"]


@pytest.mark.parametrize(("recurrence", "swiglu"), [(True, False), (False, False), (True, True)])
def test_checkpoint_is_the_one_that_was_exported(tmp_path, recurrence, swiglu):
    """Tensors of a checkpoint, out and in again; the padding of the vocabulary does not go along."""
    tensors = megatron_tensors(random_weights(untied=True, recurrence=recurrence, swiglu=swiglu), fused_norms=True)
    args = megatron_args(untie_embeddings_and_output_weights=True, rat_recurrence=recurrence, swiglu=swiglu)
    convert_to_hf(write_checkpoint(tmp_path / "run", tensors, args), tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    again = TorchDistCheckpoint(find_iteration(tmp_path / "again"))
    cut = {name: weight[:50] if weight.shape[0] == 64 else weight for name, weight in tensors.items() if not name.startswith("optimizer")}
    same({name: again.read(name) for name in again.tensors}, cut)
    assert again.folder.name == "release"
    stored = vars(read_checkpoint_args(tmp_path / "again"))
    assert {name: value for name, value in vars(args).items() if name in stored and name != "padded_vocab_size"} == {
        name: stored[name] for name in vars(args) if name in stored and name != "padded_vocab_size"
    }


def test_training_continues_from_it(one_iteration, arl_run, tiny_data, tmp_path):
    """Megatron finds every tensor that it asks for and no other, and its first loss is that of a run from the original checkpoint."""
    convert_to_hf(one_iteration, tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    run = pretrain(
        *MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--pretrained-checkpoint", tmp_path / "again", "--rat-arl-pattern", "d8",
        "--train-iters", 1, "--eval-iters", 0, "--dist-ckpt-strictness", "raise_all",
    )  # fmt: skip

    def first_loss(log):  # of the sparse step, which comes before any update
        return re.search(r"iteration +1/.*lm loss d8: (\S+)", log)[1]

    assert first_loss(run.stdout) == first_loss((arl_run / "log.txt").read_text())


def test_check_notices_rows_in_the_wrong_order(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "hf")
    monkeypatch.setattr(megatron_weights, "fuse_qkv", lambda parts, groups: fuse_qkv([parts[1], parts[0], *parts[2:]], groups))
    with pytest.raises(UserError, match="other logits than"):
        convert_from_hf(folder, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path, size=-100):
    content = path.read_bytes()
    path.write_bytes(content[:size])


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "config.json").unlink(), "hf has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda f: change_config(f, model_type="llama"), "model_type 'llama' in config.json: only 'ratplus' is a RAT\\+ model"),
        (lambda f: change_config(f, attention_pattern="d4x"), "unknown attention pattern 'd4x'"),
        (lambda f: change_config(f, attention_pattern="snap16w4"), "cannot be trained .* drops keys of a prompt once it is read"),
        (lambda f: change_config(f, attention_pattern="d4k2means"), "cannot be trained .* write 'd4k2'"),
        (lambda f: change_config(f, hidden_act="relu"), "hidden_act is 'gelu' or 'silu', not 'relu'"),
        (lambda f: change_config(f, hidden_act="silu"), "has no model.layers.0.mlp.gate_proj.weight"),
        (lambda f: change_config(f, num_hidden_layers=3), r"has no model.layers.2.\S+, which its config.json asks for \(10 missing\)"),
        (lambda f: change_config(f, num_hidden_layers=1), "holds model.layers.1.*, which the model of its config.json does not have"),
        (lambda f: change_config(f, use_recurrence=False), "holds model.layers.0.self_attn.forget_gate_proj.weight"),
        (lambda f: change_config(f, intermediate_size=32), r"has \(24, 40\) for .*down_proj.weight, but its config.json says \(24, 32\)"),
        (lambda f: change_config(f, tie_word_embeddings=False), "has no lm_head.weight"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors is truncated or damaged"),
        (lambda f: truncate(f / "model.safetensors", 20), "model.safetensors is truncated or damaged"),
        (lambda f: change_weights(f, lambda w: w.update({NORM: w[NORM].bfloat16()})), "mixes bfloat16 and float32"),
        (lambda f: change_weights(f, lambda w: w.update({NORM: w[NORM].to(torch.int32)})), "stores model.norm.weight as I32"),
        (lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": torch.randn(50, 24)})), "tie_word_embeddings: true"),
        (lambda f: change_weights(f, lambda w: w[UP].fill_(float("nan"))), "NaN or infinite"),
    ],
)
def test_wrong_folders_are_explained(tmp_path, spoil, complaint):
    spoil(write_model(tmp_path / "hf"))
    with pytest.raises(UserError, match=complaint) as raised:
        convert_from_hf(tmp_path / "hf", tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: sorted(f.glob("model-*"))[1].unlink(), "model-00002-of-.* is missing"),
        (lambda f: truncate(sorted(f.glob("model-*"))[1]), "model-00002-of-.* is truncated"),
        (lambda f: sorted(f.glob("model-*"))[1].write_bytes(sorted(f.glob("model-*"))[2].read_bytes()), "index.json says that .* is in"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json is damaged"),
    ],
)
def test_wrong_shards_are_explained(tmp_path, spoil, complaint):
    spoil(write_model(tmp_path / "hf", shard="8KB"))
    with pytest.raises(UserError, match=complaint):
        convert_from_hf(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_head_that_is_stored_though_tied(tmp_path):
    folder = write_model(tmp_path / "hf")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    converted = convert_from_hf(folder, tmp_path / "run")
    assert converted.check.tensors == len(stored_weights(folder)) - 1


def test_command_line(tmp_path):
    folder = write_model(tmp_path / "hf")
    run = CliRunner().invoke(app, ["convert", "from-hf", str(folder), str(tmp_path / "run")])
    assert run.exit_code == 0, run.output
    assert "release, float32, pattern d4w2" in run.output
    assert "check: 22 tensors, 10,344 parameters; logits of a fixed prompt" in run.output
    again = CliRunner().invoke(app, ["convert", "from-hf", str(folder), str(tmp_path / "run")])
    assert isinstance(again.exception, UserError) and "exists and is not an empty folder" in str(again.exception)
