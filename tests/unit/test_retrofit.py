"""Models of other families become RAT+ models with the same logits, and go back bit by bit."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from rat_megatron.convert import convert_retrofit, convert_to_hf
from rat_megatron.convert.families import FAMILIES
from rat_megatron.convert.megatron_model import megatron_logits
from rat_megatron.convert.retrofit import RetrofittedFolder, original_logits
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusForCausalLM
from tests.converting import write_tokenizer
from tests.families import CONFIGS, write_model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """original(name, dtype) -> its folder, with a tokenizer, a chat template and a generation config."""
    folder = tmp_path_factory.mktemp("original")

    def make(name: str, dtype=torch.float32):
        path = folder / f"{name}-{dtype}"
        if not path.exists():
            write_model(name, path, dtype)
            write_tokenizer(path)
            (path / "chat_template.jinja").write_text("{% for m in messages %}w{{ m['content'] }} {% endfor %}")
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6, "do_sample": True}))
        return path

    return make


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_without_memory_a_model_computes_what_it_did(original, tmp_path, name):
    """In float64 the logits are the original's, by the folder that to-hf writes of the checkpoint."""
    folder = original(name)
    convert_retrofit(folder, tmp_path / "checkpoints", memory=0.0)
    convert_to_hf(tmp_path / "checkpoints", tmp_path / "ratplus")
    tokens = torch.randint(CONFIGS[name].vocab_size, (2, 300))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")(tokens).logits
    model = RatPlusForCausalLM.from_pretrained(tmp_path / "ratplus", dtype=torch.float64)
    # Norms and the angles of RoPE are fp32 in Transformers, whatever the model is: that many digits are right.
    assert (model(tokens).logits - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_goes_back_bit_by_bit(original, tmp_path, name, dtype):
    folder = original(name, dtype)
    result = convert_retrofit(folder, tmp_path / "checkpoints")
    assert result.check.difference < 1e-3 * result.check.largest_logit < result.difference * 100  # the memory of 0.01 can be seen
    convert_to_hf(tmp_path / "checkpoints", tmp_path / "back", without_memory=True)
    there, here = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert there.keys() == here.keys() and all(torch.equal(here[key], value) for key, value in there.items())
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((folder / file).read_text())


def test_what_surrounds_the_model_stays(original, tmp_path):
    convert_retrofit(original("llama3"), tmp_path / "checkpoints", output_gate=True)
    convert_to_hf(tmp_path / "checkpoints", tmp_path / "ratplus")
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ratplus")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "7"}], tokenize=False) == "w7 "
    generation = GenerationConfig.from_pretrained(tmp_path / "ratplus")
    assert (generation.eos_token_id, generation.temperature) == ([2, 3], 0.6)
    with pytest.raises(UserError, match="has an output gate, which its family does not"):
        convert_to_hf(tmp_path / "checkpoints", tmp_path / "back", without_memory=True)


@torch.no_grad()
def test_an_output_gate_changes_nothing_at_first(original, tmp_path):
    convert_retrofit(original("qwen3"), tmp_path / "checkpoints", memory=0.0, output_gate=True)
    convert_to_hf(tmp_path / "checkpoints", tmp_path / "ratplus")
    tokens = torch.randint(512, (1, 60))
    expected = AutoModelForCausalLM.from_pretrained(original("qwen3"), dtype=torch.float64)(tokens).logits
    actual = RatPlusForCausalLM.from_pretrained(tmp_path / "ratplus", dtype=torch.float64)(tokens).logits
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()  # a projection was multiplied, and rounded to fp32


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
def test_megatron_turns_by_the_same_angles_far_into_a_text(original, tmp_path, name):
    """Megatron's own builder ignores --rope-scaling-factor, which 32 tokens hardly show."""
    folder = RetrofittedFolder(original(name), 0.0, output_gate=False)
    convert_retrofit(original(name), tmp_path / "checkpoints", memory=0.0)
    tokens = torch.randperm(512)[:500]
    (logits,) = megatron_logits(TorchDistCheckpoint(tmp_path / "checkpoints" / "release"), tokens, [None])
    expected = original_logits(original(name), tokens, [None])[0]
    assert (logits[:, : folder.config.vocab_size] - expected).norm() < 1e-5 * expected.norm()


def test_every_family_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' in config.json, which is none of the families .*: Llama .llama., Mistral"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "is a mixture of experts .'mixtral'., and only dense models"),
        ({"mlp_bias": True}, "Llama with mlp_bias True is not supported, only False"),
        ({"hidden_act": "gelu"}, "Llama with hidden_act 'gelu' is not supported, only 'silu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic': linear, llama3, yarn are supported"),
        ({"rope_scaling": {"type": "linear", "factor": 1.5}}, "where Megatron has whole numbers"),
        ({"num_hidden_layers": 5}, r"has no model.layers.4.*, which its config.json asks for"),
        ({"num_hidden_layers": 3}, r"holds model.layers.3.*, which the model of its config.json does not have"),
        ({"intermediate_size": 64}, r"\(32, 48\) for .*, but its config.json says \(32, 64\)"),
        ({"hidden_size": None}, "cannot become a RAT"),
        ({"model_type": "mistral", "sliding_window": 100}, "sliding_window of 100, and only full attention is retrofitted"),
    ],
)
def test_what_cannot_become_rat_has_a_sentence(original, tmp_path, changes, sentence):
    folder = tmp_path / "model"
    shutil.copytree(original("llama2"), folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=sentence):
        convert_retrofit(folder, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("memory", [-0.1, 1.0])
def test_a_memory_that_cannot_be(original, tmp_path, memory):
    with pytest.raises(UserError, match="is no gate: give 0 or more"):
        convert_retrofit(original("llama2"), tmp_path / "checkpoints", memory=memory)


def test_a_checkpoint_that_was_no_other_model_does_not_go_back(original, tmp_path):
    convert_retrofit(original("llama2"), tmp_path / "checkpoints")
    convert_to_hf(tmp_path / "checkpoints", tmp_path / "ratplus")
    from rat_megatron.convert import convert_from_hf

    convert_from_hf(tmp_path / "ratplus", tmp_path / "again")
    with pytest.raises(UserError, match="was not made by 'rat-megatron convert retrofit'"):
        convert_to_hf(tmp_path / "again", tmp_path / "back", without_memory=True)


@pytest.mark.parametrize("preset", [[], ["--rat-preset", "retrofit-135m"]], ids=["", "preset"])
def test_a_run_has_the_architecture_of_its_checkpoint(original, tmp_path, monkeypatch, megatron_process, preset):
    from rat_megatron.training.arguments import read_command_line

    convert_retrofit(original("qwen3"), tmp_path / "checkpoints")
    monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", "--pretrained-checkpoint", str(tmp_path / "checkpoints"), *preset])
    args = read_command_line()
    sizes = (args.num_layers, args.hidden_size, args.kv_channels, args.num_query_groups, args.ffn_hidden_size, args.rotary_base)
    assert sizes == (4, 32, 16, 2, 48, 1000000) and args.swiglu and args.qk_layernorm and args.rat_gate_bias
    assert not args.attention_output_gate and not args.untie_embeddings_and_output_weights and args.layernorm_epsilon == 1e-5
    assert (args.lr, args.rat_arl_pattern) == ((3e-4, "d64") if preset else (None, None))


def test_gates_begin_alike(original):
    folder = RetrofittedFolder(original("qwen2.5"), 0.25, output_gate=False)
    bias = folder.read("model.layers.1.self_attn.forget_gate_proj.bias")
    torch.testing.assert_close(torch.sigmoid(bias), torch.full_like(bias, 0.25))
    assert not folder.read("model.layers.1.self_attn.forget_gate_proj.weight").any()
