"""Megatron torch_dist checkpoints to Hugging Face folders."""

import gc
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rat_megatron.checkpoint.torch_dist import StoredTensor, TorchDistCheckpoint, find_iteration, read_checkpoint_args, write_torch_dist
from rat_megatron.cli.main import app
from rat_megatron.convert import convert_to_hf, megatron_weights
from rat_megatron.convert.names import FUSED_QKV, fuse_qkv, split_fused_qkv
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusForCausalLM
from tests.converting import (
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    HN,
    VOCAB,
    Evil,
    expected_logits,
    megatron_args,
    megatron_tensors,
    random_weights,
    write_checkpoint,
    write_tokenizer,
)  # fmt: skip

torch.set_num_threads(1)  # at these sizes threads only wait for each other


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "run", megatron_tensors(random_weights()), megatron_args())


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "by-layer"])
@pytest.mark.parametrize("fused_norms", [True, False], ids=["te-norms", "local-norms"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"untie_embeddings_and_output_weights": True}, {"rat_recurrence": False}, {"swiglu": True}],
    ids=["tied", "untied", "baseline", "swiglu"],
)
def test_converted_model_is_the_trained_one(tmp_path, stacked, fused_norms, changes):
    args = megatron_args(**changes)
    weights = random_weights(args.untie_embeddings_and_output_weights, args.rat_recurrence, args.swiglu)
    write_checkpoint(tmp_path / "run", megatron_tensors(weights, stacked, fused_norms), args)
    converted = convert_to_hf(tmp_path / "run", tmp_path / "hf")
    model = RatPlusForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(VOCAB, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(model.double()(tokens).logits, expected_logits(weights, tokens), rtol=0, atol=1e-10)
    assert converted.check.parameters == model.num_parameters()
    assert converted.check.tensors == len(weights)
    assert converted.check.difference < 1e-5 * converted.check.largest_logit and converted.check.rounding is None
    assert (converted.source, converted.pattern, converted.dtype, converted.shards) == ("iter_0000020", "d4w2", "float32", 1)


def test_split_fused_qkv_checks_its_rows():
    with pytest.raises(ValueError, match="has 84 rows, expected 2 groups of 36"):
        split_fused_qkv(torch.zeros(84, HIDDEN), HEADS, GROUPS, HN, recurrence=False)


@pytest.mark.parametrize("recurrence", [True, False])
def test_fusing_is_the_inverse_of_splitting(recurrence):
    rows = (2 * HEADS + (2 + recurrence) * GROUPS) * HN
    weight = torch.randn(rows, HIDDEN)
    parts = split_fused_qkv(weight, HEADS, GROUPS, HN, recurrence)
    assert len(parts) == len(FUSED_QKV.hf) - (not recurrence)
    assert torch.equal(fuse_qkv(list(parts.values()), GROUPS), weight)


def test_check_notices_rows_in_the_wrong_order(tmp_path, checkpoint, monkeypatch):
    """The check does not use what the conversion uses: heads that go to the wrong place are found, and nothing is written."""

    def wrong(*args, **kwargs):
        parts = split_fused_qkv(*args, **kwargs)
        return parts | {"q": parts["q"].roll(HN, dims=0)}

    monkeypatch.setattr(megatron_weights, "split_fused_qkv", wrong)
    with pytest.raises(UserError, match="other logits than .*iter_0000020"):
        convert_to_hf(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_check_says_what_rounding_does(tmp_path, checkpoint):
    converted = convert_to_hf(checkpoint, tmp_path / "hf", dtype="bfloat16")
    assert converted.check.difference < 1e-5 * converted.check.largest_logit
    tokens = (torch.arange(32) * 7919 + 1)[None] % VOCAB
    rounded = RatPlusForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    rounded.set_attention_pattern("dense")
    weights = {name: weight[:VOCAB] if "embed" in name else weight for name, weight in random_weights().items()}
    exact = RatPlusForCausalLM(rounded.config)
    exact.load_state_dict(weights, strict=False)
    with torch.no_grad():
        difference = (rounded(tokens).logits - exact(tokens).logits).abs().max().item()
    assert converted.check.rounding == pytest.approx(difference, rel=1e-2)
    said = str(converted)
    assert f"differ by at most {converted.check.difference:.2g}" in said and f"{converted.check.rounding:.2g} from those" in said


def test_memory_follows_the_shard_not_the_model(tmp_path):
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        pytest.skip("this system does not tell the peak of a process's memory")
    layers, hidden, ffn, heads = 24, 256, 2048, 4  # 130 MB in fp32, 5 MB a layer
    stacked = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (5 * hidden, hidden),
        "self_attention.linear_proj.weight": (hidden, hidden),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    tensors = {f"decoder.layers.{name}": StoredTensor(torch.Size(shape), torch.float32, layers) for name, shape in stacked.items()}
    tensors["embedding.word_embeddings.weight"] = StoredTensor(torch.Size([512, hidden]), torch.float32)
    tensors["decoder.final_layernorm.weight"] = StoredTensor(torch.Size([hidden]), torch.float32)
    size = sum(tensor.shape.numel() * 4 * (tensor.layers or 1) for tensor in tensors.values())
    args = megatron_args(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, kv_channels=hidden // heads, ffn_hidden_size=ffn,
        group_query_attention=False, vocab_size=512, padded_vocab_size=512,
    )  # fmt: skip
    folder = tmp_path / "run" / "release"
    write_torch_dist(folder, tensors, lambda key, layer: torch.randn(tensors[key].shape) / 16, {"args": args}, {})
    read_checkpoint_args(folder)  # imports what it needs
    gc.collect()

    def memory(line):
        return next(int(text.split()[1]) * 1024 for text in status.read_text().splitlines() if text.startswith(line))

    reset.write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    converted = convert_to_hf(folder, tmp_path / "hf", max_shard_size="10MB")
    assert converted.shards > 10
    assert memory("VmHWM") - before < size / 2


def test_shards_dtype_pattern_and_files(tmp_path, checkpoint):
    converted = convert_to_hf(checkpoint, tmp_path / "hf", pattern="[dense,d4]", dtype="bfloat16", max_shard_size="8KB")
    folder = tmp_path / "hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert converted.shards == len(set(index["weight_map"].values())) > 2
    stored = {}
    for path in folder.glob("model-*.safetensors"):
        assert path.stat().st_size < 8000 + 2000  # and its header
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}
    assert set(stored) == set(index["weight_map"])
    assert sum(weight.nbytes for weight in stored.values()) == index["metadata"]["total_size"]
    weights = random_weights()
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"].bfloat16())
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "ratplus",
        "vocab_size": VOCAB,
        "num_key_value_heads": GROUPS,
        "head_dim": HN,
        "intermediate_size": FFN,
        "attention_pattern": "[dense,d4]",
        "use_recurrence": True,
        "hidden_act": "gelu",
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "architectures": ["RatPlusForCausalLM"],
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "some files have other permissions"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"], "temporary files were left behind"


def test_only_the_asked_layer_is_read(checkpoint):
    """Layers that are stored as chunks of one stacked tensor are read one by one."""
    source = TorchDistCheckpoint(find_iteration(checkpoint))
    weights = random_weights()
    layer = source.read("decoder.layers.mlp.linear_fc1.weight", 1)
    assert layer.untyped_storage().nbytes() == FFN * HIDDEN * 4
    assert torch.equal(layer, weights["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(source.read("embedding.word_embeddings.weight"), weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("given", ["by flag", "by the training data"])
def test_tokenizer_and_special_ids(tmp_path, given):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    remembered = {"rat_eod_id": None} if given == "by flag" else {"rat_tokenizer_path": str(tokenizer)}
    write_checkpoint(tmp_path / "run", megatron_tensors(random_weights()), megatron_args(**remembered))
    converted = convert_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer=tokenizer if given == "by flag" else None)
    assert converted.tokenizer == tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("w7").input_ids == [7]
    config = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["bos_token_id"] == 1
    assert config["eos_token_id"] == (3 if given == "by flag" else 2)  # the end of document that was trained on wins


def test_exported_folder_runs_without_this_package(tmp_path, checkpoint):
    convert_to_hf(checkpoint, tmp_path / "hf")
    script = f"""
import sys
sys.modules["rat_megatron"] = None  # any import of it fails from here on
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hf")!r}, trust_remote_code=True)
torch.save(model.double()(torch.arange(17)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = expected_logits(random_weights(), torch.arange(17)[None])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-10)


def test_which_iteration(tmp_path, checkpoint):
    later = {name: 2 * weight for name, weight in random_weights().items()}
    write_checkpoint(checkpoint, megatron_tensors(later), megatron_args(), step=40)

    def gate(output, **which):
        folder = which.pop("folder", checkpoint)
        convert_to_hf(folder, tmp_path / output, **which)
        return AutoModelForCausalLM.from_pretrained(tmp_path / output).state_dict()["model.layers.0.self_attn.forget_gate_proj.weight"]

    name = "model.layers.0.self_attn.forget_gate_proj.weight"
    assert torch.equal(gate("latest"), later[name])
    assert torch.equal(gate("first", step=20), later[name] / 2)
    assert torch.equal(gate("folder", folder=checkpoint / "iter_0000020"), later[name] / 2)
    with pytest.raises(UserError, match="iter_0000030 does not exist .*iter_0000020, iter_0000040"):
        convert_to_hf(checkpoint, tmp_path / "none", step=30)


def test_arguments_of_older_checkpoints(checkpoint):
    assert read_checkpoint_args(checkpoint).attention_backend is AttnBackend.auto
    torch.save({"args": megatron_args(num_layers=7)}, checkpoint / "iter_0000020" / "common.pt")
    assert read_checkpoint_args(checkpoint).num_layers == 7


@pytest.mark.parametrize("place", [".metadata", "common_state", "common.pt"])
def test_no_code_of_a_checkpoint_is_run(tmp_path, checkpoint, place):
    target, folder = tmp_path / "was-run", checkpoint / "iter_0000020"
    if place == ".metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(target)))
    elif place == "common.pt":
        torch.save({"args": Evil(target)}, folder / "common.pt")
    else:
        write_checkpoint(tmp_path / "run", megatron_tensors(random_weights()), None, common={"args": Evil(target)})
    with pytest.raises(UserError, match=r"posix\.mkdir, which is not on the list"):
        convert_to_hf(checkpoint, tmp_path / "hf")
    assert not target.exists()
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda args, tensors: delattr(args, "rat_recurrence"), "is not a RAT\\+ checkpoint"),
        (lambda args, tensors: delattr(args, "kv_channels"), "does not say its kv_channels"),
        (lambda args, tensors: setattr(args, "quick_geglu", True), "quick_geglu=True: a RAT\\+ model has quick_geglu=False"),
        (lambda args, tensors: setattr(args, "rat_pattern", "d4x"), "unknown attention pattern 'd4x'"),
        (lambda args, tensors: setattr(args, "hidden_size", 32), "has \\(50, 24\\) for model.embed_tokens.weight"),
        (lambda args, tensors: setattr(args, "rat_recurrence", False), "linear_qkv.weight does not fit"),
        (lambda args, tensors: setattr(args, "num_layers", 3), "stacks 2 layers in .*, but its arguments say 3"),
        (lambda args, tensors: setattr(args, "num_layers", 1), "stacks 2 layers in .*, but its arguments say 1"),
        (lambda args, tensors: tensors.pop("decoder.final_layernorm.weight"), "no tensor for model.norm.weight"),
        (
            lambda args, tensors: tensors.update({"decoder.layers.mlp.router.weight": torch.zeros(2, 3)}),
            "holds decoder.layers.mlp.router.weight",
        ),
        (lambda args, tensors: tensors.update({"output_layer.weight": torch.zeros(64, 24)}), "holds output_layer.weight"),
        (lambda args, tensors: tensors["decoder.final_layernorm.weight"].fill_(float("nan")), "NaN or infinite"),
    ],
)
def test_wrong_checkpoints_are_explained(tmp_path, spoil, complaint):
    args, tensors = megatron_args(), megatron_tensors(random_weights())
    spoil(args, tensors)
    write_checkpoint(tmp_path / "run", tensors, args)
    with pytest.raises(UserError, match=complaint):
        convert_to_hf(tmp_path / "run", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_wrong_folders_are_explained(tmp_path, checkpoint):
    folder, output = checkpoint / "iter_0000020", tmp_path / "hf"

    def complains(match, source=checkpoint, **options):
        with pytest.raises(UserError, match=match):
            convert_to_hf(source, output, **options)

    complains("is not a folder", tmp_path / "nowhere")
    complains("holds no checkpoint", tmp_path)
    complains("float16 is not one of", dtype="float16")
    complains("--max-shard-size 5XB is no size", max_shard_size="5XB")
    complains("--max-shard-size 0GB is no size", max_shard_size="0GB")
    complains("2 heads, but a layer has 4", pattern="{dense,d4}")
    complains("--tokenizer .* is not a folder", tokenizer=tmp_path / "nowhere")
    complains("no tokenizer that Transformers can load", tokenizer=checkpoint)
    output.mkdir()
    (output / "kept").write_text("x")
    complains("not an empty folder")
    assert (output / "kept").read_text() == "x"
    (output / "kept").unlink()
    next(folder.glob("__0_*.distcp")).rename(tmp_path / "elsewhere")
    complains(r"\.distcp is missing")
    (folder / ".metadata").write_bytes(b"\x80\x05nonsense")
    complains(r"\.metadata cannot be read")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    complains("stored as 'zarr'")
    (folder / "metadata.json").unlink()
    complains("no metadata.json")


def test_command_line(tmp_path, checkpoint):
    run = CliRunner().invoke(
        app, ["convert", "to-hf", str(checkpoint), str(tmp_path / "hf"), "--iteration", "20", "--pattern", "d4", "--dtype", "bfloat16"]
    )
    assert run.exit_code == 0, run.output
    assert "bfloat16" in run.output
    assert "pattern d4," in run.output
    assert "check: 22 tensors, 10,344 parameters; logits of a fixed prompt" in run.output
    assert "Example: rat-megatron convert to-hf" in CliRunner().invoke(app, ["convert", "to-hf", "--help"]).output


def test_model_card_says_what_is_known(tmp_path, checkpoint):
    recipe = {
        "global_batch_size": 16, "train_iters": 40, "consumed_train_samples": 320, "lr": 8e-4, "min_lr": 1e-6, "lr_decay_style": "cosine",
        "lr_warmup_fraction": 0.05, "optimizer": "adam", "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "clip_grad": 1.0,
        "rat_arl_pattern": "d8", "pretrained_checkpoint": None,
    }  # fmt: skip
    write_checkpoint(checkpoint, megatron_tensors(random_weights()), megatron_args(**recipe), step=20)
    report = {"iteration": 20, "pattern": "d4w2", "patterns": {"dense": 3.25, "d4w2": 3.5}}
    (checkpoint / "report.json").write_text(json.dumps(report))
    convert_to_hf(checkpoint, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- rat-plus\n")
    for line in (
        'model.set_attention_pattern("d4w2")',
        "| Tokens | 10,240 |",
        "| Batch | 16 sequences of 32 tokens |",
        "| Steps | 40 planned, 20 done |",
        "| Learning rate | 0.0008 at its peak, cosine to 1e-06, warm-up 0.05 of the steps |",
        "| Optimizer | AdamW, betas 0.9 and 0.95, weight decay 0.1, gradient clipping 1 |",
        "| Trained with | pattern `d4w2`, and each batch first under `d8` (active recurrence learning) |",
        "| Start | pretrained from scratch |",
        "| `dense` | 3.2500 |",
        "| `d4w2` | 3.5000 |",
    ):
        assert line in card.splitlines(), line

    (checkpoint / "report.json").write_text(json.dumps(report | {"iteration": 40}))  # losses of other weights
    adapted = megatron_args(**recipe | {"rat_arl_pattern": "none", "pretrained_checkpoint": "/runs/private/pretrained"})
    write_checkpoint(checkpoint, megatron_tensors(random_weights()), adapted, step=20)
    convert_to_hf(checkpoint, tmp_path / "hf2")
    card = (tmp_path / "hf2" / "README.md").read_text()
    assert "| Start | adapted from pretrained weights |" in card and "| Trained with | pattern `d4w2` |" in card
    assert "Validation loss" not in card and "private" not in card


def test_card_of_a_checkpoint_that_says_nothing(tmp_path, checkpoint):
    convert_to_hf(checkpoint, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Recipe" not in card and "Validation loss" not in card and "None" not in card


@pytest.mark.parametrize("known", [True, False])
def test_config_notes_the_tokenizer_of_the_data(tmp_path, known):
    facts = {"tokenizer_name": "some/tokenizer", "tokenizer_hash": "0123456789abcdef"}
    args = megatron_args(**({f"rat_{name}": value for name, value in facts.items()} if known else {}))
    checkpoint = write_checkpoint(tmp_path / "run", megatron_tensors(random_weights()), args)
    convert_to_hf(checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {name: config.get(name) for name in facts} == (facts if known else dict.fromkeys(facts))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.to_dict().get("tokenizer_hash") == config.get("tokenizer_hash")
    if known:
        with pytest.raises(UserError, match="not the tokenizer that the training data was made with"):
            convert_to_hf(checkpoint, tmp_path / "other", tokenizer=write_tokenizer(tmp_path / "tokenizer"))
