"""Checkpoints of the reference implementation to Hugging Face folders: files in its layout with random weights."""

import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from rat_megatron.cli.main import app
from rat_megatron.convert import convert_from_reference, reference_weights
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusForCausalLM
from tests import reference
from tests.converting import Evil, write_tokenizer

torch.set_num_threads(1)  # at these sizes threads only wait for each other
LAYERS, HIDDEN, HEADS, VOCAB = 2, 24, 4, 50


def random_weights(recurrence=True, untied=False):
    """By Hugging Face name."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if untied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (HIDDEN,), layer + "post_attention_layernorm.weight": (HIDDEN,)}
        for name in ("q", "k", "v", "output_gate", "o") + ("forget_gate",) * recurrence:
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {layer + "mlp.up_proj.weight": (4 * HIDDEN, HIDDEN), layer + "mlp.down_proj.weight": (HIDDEN, 4 * HIDDEN)}
    return {name: torch.randn(shape) * 0.2 + ("norm" in name) for name, shape in shapes.items()}


def reference_task(weights, prefix="", gate_apart=False):
    """The same weights as the reference names and joins them: rows of in_proj in the order output gate, q, k, v, forget gate."""
    embedding = weights["model.embed_tokens.weight"]
    task = {
        "embedding.wte.weight": embedding,
        "backbone.ln.weight": weights["model.norm.weight"],
        "head.lm_head.weight": weights.get("lm_head.weight", embedding),
    }
    for i in range(LAYERS):
        theirs, ours = f"backbone.layers.{i}.", f"model.layers.{i}."
        rows = [weights[f"{ours}self_attn.{name}_proj.weight"] for name in ("output_gate", "q", "k", "v")]
        gate = weights.get(f"{ours}self_attn.forget_gate_proj.weight")
        if gate is not None and gate_apart:
            task[theirs + "seq_layer.fgate_proj.weight"] = gate
        elif gate is not None:
            rows.append(gate)
        task |= {
            theirs + "seq_layer.in_proj.weight": torch.cat(rows),
            theirs + "seq_layer.input_norm.weight": weights[ours + "input_layernorm.weight"],
            theirs + "seq_layer.out_proj.weight": weights[ours + "self_attn.o_proj.weight"],
            theirs + "hidden_layer.ln.weight": weights[ours + "post_attention_layernorm.weight"],
            theirs + "hidden_layer.fc1.weight": weights[ours + "mlp.up_proj.weight"],
            theirs + "hidden_layer.fc2.weight": weights[ours + "mlp.down_proj.weight"],
        }
    return {prefix + name: tensor for name, tensor in task.items()}


def write_file(path, task, **others):
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(7)} for i in range(3)}
    content = {"task": task, "config": {"lr": 1e-3}, "step": 3, "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3}]}}
    torch.save({**content, "lr_scheduler": {"last_epoch": 3}, "resume_kwargs": {}, **others}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("kind", ["joined", "gate apart", "baseline", "untied"])
def test_converted_model_is_the_reference(tmp_path, kind, prefix):
    weights = random_weights(recurrence=kind != "baseline", untied=kind == "untied")
    file = write_file(tmp_path / "model.pth", reference_task(weights, prefix, gate_apart=kind == "gate apart"))
    converted = convert_from_reference(file, tmp_path / "hf", num_attention_heads=HEADS, pattern="d4w2", max_position_embeddings=32)
    model = RatPlusForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.use_recurrence == (kind != "baseline") and model.config.tie_word_embeddings == (kind != "untied")
    assert (model.config.attention_pattern, model.config.max_position_embeddings) == ("d4w2", 32)
    tokens = torch.randint(VOCAB, (2, 17))
    expected = reference.model(weights, tokens, HEADS, HEADS, lambda layer, head, t, j: reference.sees(t, j, 4, 2))
    with torch.no_grad():
        torch.testing.assert_close(model.double()(tokens).logits, expected, rtol=0, atol=1e-10)
    assert (converted.check.tensors, converted.check.parameters) == (len(weights), model.num_parameters())
    assert converted.check.difference < 1e-5 * converted.check.largest_logit


def test_dtype_shards_tokenizer_and_card(tmp_path):
    file = write_file(tmp_path / "model.pth", reference_task(random_weights()))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    converted = convert_from_reference(
        file, tmp_path / "hf", num_attention_heads=HEADS, dtype="bfloat16", tokenizer=tokenizer, max_shard_size="8KB"
    )
    assert converted.shards > 2 and converted.dtype == "bfloat16" and 0 < converted.check.rounding < 0.1 * converted.check.largest_logit
    model = RatPlusForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype is torch.bfloat16 and model.config.eos_token_id == 3
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(model.state_dict()[name], random_weights()[name].bfloat16())
    assert "library_name: transformers" in (tmp_path / "hf" / "README.md").read_text()


@pytest.fixture
def easydict(monkeypatch):
    """A dict class of this name and layout, as the reference's config is; loading must do without it."""

    class EasyDict(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__.update(values)

    module = types.ModuleType("easydict")
    module.EasyDict, EasyDict.__module__, EasyDict.__qualname__ = EasyDict, "easydict", "EasyDict"
    monkeypatch.setitem(sys.modules, "easydict", module)
    return EasyDict


def test_config_of_another_class_is_not_built(tmp_path, easydict, monkeypatch):
    config = easydict({"model": easydict({"d": HIDDEN}), "names": ["a", "b"]})
    file = write_file(tmp_path / "model.pth", reference_task(random_weights()), config=config)
    monkeypatch.delitem(sys.modules, "easydict")
    monkeypatch.setattr(sys, "path", [])  # an import of it would fail
    converted = convert_from_reference(file, tmp_path / "hf", num_attention_heads=HEADS)
    assert converted.check.tensors == 22


@pytest.mark.parametrize("place", ["config", "task", "optimizer"])
def test_no_code_of_a_file_is_run(tmp_path, place):
    target = tmp_path / "was-run"
    task = reference_task(random_weights())
    file = write_file(tmp_path / "model.pth", **({"task": task} | {place: {"x": Evil(target)}}))
    with pytest.raises(UserError, match=r"posix\.mkdir, which is not on the list") as raised:
        convert_from_reference(file, tmp_path / "hf", num_attention_heads=HEADS)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth"]


def test_optimizer_state_is_not_read(tmp_path, monkeypatch):
    """The file is mapped: what lies in it beside the weights may be damaged."""
    file = write_file(tmp_path / "model.pth", reference_task(random_weights()))
    seen = {}
    load = torch.load
    monkeypatch.setattr(reference_weights.torch, "load", lambda *args, **options: seen.update(options) or load(*args, **options))
    convert_from_reference(file, tmp_path / "hf", num_attention_heads=HEADS)
    assert seen["mmap"] is True and seen["weights_only"] is True


def cut_rows(task, rows):
    for i in range(LAYERS):
        task[f"backbone.layers.{i}.seq_layer.in_proj.weight"] = torch.randn(rows, HIDDEN)


LAYER = "backbone.layers.1."


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda task: task.pop("embedding.wte.weight"), "has no tensor embedding.wte.weight"),
        (lambda task: task.pop(LAYER + "hidden_layer.fc1.weight"), "has no tensor backbone.layers.1.hidden_layer.fc1.weight"),
        (lambda task: task.update({"backbone.pos.weight": torch.ones(3)}), "holds backbone.pos.weight under 'task'"),
        (
            lambda task: task.update({LAYER + "hidden_layer.fc1.weight": torch.ones(95, HIDDEN)}),
            r"has \(95, 24\) for model.layers.1.mlp.up",
        ),
        (lambda task: cut_rows(task, 3 * HIDDEN), "72 rows in the in_proj of layer 0: expected 4 or 5 times the width 24"),
        (lambda task: task.update({LAYER + "seq_layer.in_proj.weight": torch.ones(4 * HIDDEN, HIDDEN)}), "4 projections in layer 1"),
        (lambda task: task.update({"backbone.ln.weight": torch.ones(HIDDEN).half()}), "mixes torch.float16 and torch.float32"),
        (lambda task: task["backbone.ln.weight"].fill_(float("nan")), "NaN or infinite"),
        (lambda task: task.update({"embedding.wte.weight": torch.ones(3)}), r"has embedding.wte.weight of shape \(3,\)"),
        (lambda task: task.clear(), "no weights under 'task'"),
        (lambda task: task.update({"step": 3}), "no weights under 'task'"),
    ],
)
def test_wrong_weights_are_explained(tmp_path, spoil, complaint):
    task = reference_task(random_weights())
    spoil(task)
    file = write_file(tmp_path / "model.pth", task)
    with pytest.raises(UserError, match=complaint):
        convert_from_reference(file, tmp_path / "hf", num_attention_heads=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_wrong_files_and_options_are_explained(tmp_path):
    file = write_file(tmp_path / "model.pth", reference_task(random_weights()))

    def complains(match, source=file, **options):
        with pytest.raises(UserError, match=match):
            convert_from_reference(source, tmp_path / "hf", **{"num_attention_heads": HEADS, **options})
        assert not (tmp_path / "hf").exists()

    complains("is not a file", tmp_path / "nowhere.pth")
    complains("float16 is not one of", dtype="float16")
    complains("no multiple of 128: give --num-attention-heads", num_attention_heads=None)
    complains("--num-attention-heads 5 does not divide", num_attention_heads=5)
    complains("head_dim 3 .* turns channels in pairs", num_attention_heads=8)
    complains("unknown attention pattern 'd4x'", pattern="d4x")
    complains("--tokenizer .* is not a folder", tokenizer=tmp_path / "nowhere")
    complains("--max-shard-size big is no size", max_shard_size="big")
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:-200])
    complains("cannot be read as a torch.save file", tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    complains("cannot be read as a torch.save file", tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    complains("no weights under 'task'", tmp_path / "list.pth")


def test_command_line(tmp_path):
    file = write_file(tmp_path / "model.pth", reference_task(random_weights()))
    arguments = ["convert", "from-reference", str(file), str(tmp_path / "hf"), "--num-attention-heads", str(HEADS), "--pattern", "d4"]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "pattern d4," in run.output and "check: 22 tensors" in run.output
