"""Megatron torch_dist checkpoints to Hugging Face folders: a tiny checkpoint is written with DCP as Megatron lays it out."""

import io
import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from safetensors import safe_open
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rat_megatron.cli.convert import app
from rat_megatron.convert.checkpoint import TorchDistCheckpoint, find_iteration, read_checkpoint_args
from rat_megatron.convert.names import split_fused_qkv
from rat_megatron.convert.to_hf import convert_to_hf
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusForCausalLM
from tests import reference

torch.set_num_threads(1)  # at these sizes threads only wait for each other
LAYERS, HIDDEN, HEADS, GROUPS, HN, FFN, VOCAB, PADDED = 2, 24, 4, 2, 6, 40, 50, 64
PROJECTIONS = ("q", "output_gate", "k", "v", "forget_gate")


def megatron_args(**changes):
    settings = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "kv_channels": HN,
        "ffn_hidden_size": FFN,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "layernorm_epsilon": 1e-6,
        "rotary_base": 10000,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "untie_embeddings_and_output_weights": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "swiglu": False,
        "num_experts": None,
        "attention_backend": AttnBackend.auto,
        "params_dtype": torch.float32,
        "rat_recurrence": True,
        "rat_pattern": "d4w2",
        "rat_eod_id": 2,
    }
    return Namespace(**{**settings, **changes})


def random_weights(untied=False, recurrence=True):
    """Hugging Face weights by name; the embedding and output projection still have Megatron's padding rows."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (PADDED, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if untied:
        shapes["lm_head.weight"] = (PADDED, HIDDEN)
    widths = {"q": HEADS * HN, "output_gate": HEADS * HN, "k": GROUPS * HN, "v": GROUPS * HN, "forget_gate": GROUPS * HN}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (HIDDEN,), layer + "post_attention_layernorm.weight": (HIDDEN,)}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (widths[p], HIDDEN) for p in PROJECTIONS[: 4 + recurrence]}
        shapes |= {layer + "self_attn.o_proj.weight": (HIDDEN, HEADS * HN)}
        shapes |= {layer + "mlp.up_proj.weight": (FFN, HIDDEN), layer + "mlp.down_proj.weight": (HIDDEN, FFN)}
    return {name: torch.randn(shape) * 0.2 + ("norm" in name) for name, shape in shapes.items()}


def megatron_tensors(weights, stacked=True, fused_norms=False):
    """The same weights under Megatron's keys. Rows of the fused projection are gathered head by head, as the layout is defined."""

    def fused(i):
        rows, per_group = [], HEADS // GROUPS
        for g in range(GROUPS):
            for p in PROJECTIONS:
                weight = weights.get(f"model.layers.{i}.self_attn.{p}_proj.weight")
                if weight is not None:
                    heads = range(g * per_group, (g + 1) * per_group) if p in ("q", "output_gate") else [g]
                    rows += [weight[h * HN : (h + 1) * HN] for h in heads]
        return torch.cat(rows)

    norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    norms = norms if fused_norms else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    layers = [
        {
            norms[0]: weights[f"model.layers.{i}.input_layernorm.weight"],
            norms[1]: weights[f"model.layers.{i}.post_attention_layernorm.weight"],
            "self_attention.linear_qkv.weight": fused(i),
            "self_attention.linear_proj.weight": weights[f"model.layers.{i}.self_attn.o_proj.weight"],
            "mlp.linear_fc1.weight": weights[f"model.layers.{i}.mlp.up_proj.weight"],
            "mlp.linear_fc2.weight": weights[f"model.layers.{i}.mlp.down_proj.weight"],
        }
        for i in range(LAYERS)
    ]
    tensors = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(HIDDEN),
    }
    if "lm_head.weight" in weights:
        tensors["output_layer.weight"] = weights["lm_head.weight"]
    if stacked:
        return tensors | {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    return tensors | {f"decoder.layers.{i}.{name}": weight for i, layer in enumerate(layers) for name, weight in layer.items()}


class _StoreBytesAsTheyAre(DefaultSavePlanner):
    def transform_object(self, write_item, object):
        return object


def write_checkpoint(root, tensors, args, step=20, common=None):
    """As Megatron 0.19 does: DCP with the arguments as an object in it, then metadata.json, then the tracker."""
    folder = root / f"iter_{step:07d}"
    stored = io.BytesIO()
    torch.save([common or {"args": args, "iteration": step, "checkpoint_version": 3.0}], stored)
    extra = {"common_state/shard_0_1": stored, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1": io.BytesIO(b"never read")}
    planner = _StoreBytesAsTheyAre(flatten_state_dict=False)
    save({**tensors, **extra}, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))
    return root


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "run", megatron_tensors(random_weights()), megatron_args())


def expected_logits(weights, tokens):
    cut = {name: weight[:VOCAB] if name in ("model.embed_tokens.weight", "lm_head.weight") else weight for name, weight in weights.items()}
    return reference.model(cut, tokens, HEADS, GROUPS, lambda layer, head, t, j: reference.sees(t, j, 4, 2))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "by-layer"])
@pytest.mark.parametrize("fused_norms", [True, False], ids=["te-norms", "local-norms"])
@pytest.mark.parametrize(("untied", "recurrence"), [(False, True), (True, True), (False, False)], ids=["tied", "untied", "baseline"])
def test_converted_model_is_the_trained_one(tmp_path, stacked, fused_norms, untied, recurrence):
    weights = random_weights(untied, recurrence)
    args = megatron_args(untie_embeddings_and_output_weights=untied, rat_recurrence=recurrence)
    write_checkpoint(tmp_path / "run", megatron_tensors(weights, stacked, fused_norms), args)
    report = convert_to_hf(tmp_path / "run", tmp_path / "hf")
    model = RatPlusForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(VOCAB, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(model.double()(tokens).logits, expected_logits(weights, tokens), rtol=0, atol=1e-10)
    assert report.parameters == model.num_parameters()
    assert report.tensors == len(weights)
    assert (report.iteration, report.pattern, report.dtype, report.shards) == ("iter_0000020", "d4w2", "float32", 1)


def test_split_fused_qkv_checks_its_rows():
    with pytest.raises(ValueError, match="has 84 rows, expected 2 groups of 36"):
        split_fused_qkv(torch.zeros(84, HIDDEN), HEADS, GROUPS, HN, recurrence=False)


def test_shards_dtype_pattern_and_files(tmp_path, checkpoint):
    report = convert_to_hf(checkpoint, tmp_path / "hf", pattern="[dense,d4]", dtype="bfloat16", max_shard_size=8000)
    folder = tmp_path / "hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert report.shards == len(set(index["weight_map"].values())) > 2
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


def write_tokenizer(folder):
    words = {"<s>": 1, "</s>": 3, "<unk>": 0, **{f"w{i}": i for i in range(4, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("given", ["by flag", "by the training data"])
def test_tokenizer_and_special_ids(tmp_path, given):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    remembered = {"rat_eod_id": None} if given == "by flag" else {"rat_tokenizer_path": str(tokenizer)}
    write_checkpoint(tmp_path / "run", megatron_tensors(random_weights()), megatron_args(**remembered))
    report = convert_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer=tokenizer if given == "by flag" else None)
    assert report.tokenizer == tokenizer
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


class _Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", [".metadata", "common_state", "common.pt"])
def test_no_code_of_a_checkpoint_is_run(tmp_path, checkpoint, place):
    target, folder = tmp_path / "was-run", checkpoint / "iter_0000020"
    if place == ".metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(_Evil(target)))
    elif place == "common.pt":
        torch.save({"args": _Evil(target)}, folder / "common.pt")
    else:
        write_checkpoint(tmp_path / "run", megatron_tensors(random_weights()), None, common={"args": _Evil(target)})
    with pytest.raises(UserError, match=r"posix\.mkdir, which is not on the list"):
        convert_to_hf(checkpoint, tmp_path / "hf")
    assert not target.exists()
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda args, tensors: delattr(args, "rat_recurrence"), "is not a RAT\\+ checkpoint"),
        (lambda args, tensors: delattr(args, "kv_channels"), "does not say its kv_channels"),
        (lambda args, tensors: setattr(args, "swiglu", True), "swiglu=True: a RAT\\+ model has swiglu=False"),
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
        app, ["to-hf", str(checkpoint), str(tmp_path / "hf"), "--iteration", "20", "--pattern", "d4", "--dtype", "bfloat16"]
    )
    assert run.exit_code == 0, run.output
    assert "bfloat16" in run.output
    assert "pattern d4," in run.output
    assert "logits of a fixed prompt are finite" in run.output
    assert "Example: rat-megatron convert to-hf" in CliRunner().invoke(app, ["to-hf", "--help"]).output
