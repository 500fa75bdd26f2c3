"""The RAT+ layer inside Megatron's GPTModel against the float64 definition, and what the specs promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rat_megatron.convert.names import FUSED_MLP, FUSED_QKV, FUSED_QKV_BIAS, TABLE, split_fused_qkv
from rat_megatron.ratplus.pattern import AttentionPattern, PatternError
from tests import reference
from tests.reference import model as reference_model
from tests.reference import sees

pytestmark = pytest.mark.usefixtures("megatron_process")

VOCAB, LENGTH, LAYERS, HEADS = 64, 40, 3, 4


def build(recurrence=True, groups=HEADS, tied=True, pattern="dense", rope=None, **kwargs):
    """A GPTModel with RAT+ layers and random weights, norms included."""
    from megatron.core.models.gpt import GPTModel

    from rat_megatron.model.config import RATTransformerConfig
    from rat_megatron.model.layer_spec import get_rat_block_spec

    config = RATTransformerConfig(
        num_layers=LAYERS, hidden_size=32, num_attention_heads=HEADS, num_query_groups=groups, ffn_hidden_size=96, normalization="RMSNorm",
        layernorm_epsilon=1e-6, add_bias_linear=False, rat_recurrence=recurrence, rat_pattern=pattern, transformer_impl="local",
        attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, **kwargs,
    )  # fmt: skip
    rope = {"position_embedding_type": "rope"} | (rope or {})
    model = GPTModel(config, get_rat_block_spec(config), VOCAB, 64, share_embeddings_and_output_weights=tied, **rope)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        scale, shift = (0.2, 1.0) if "norm" in name else (0.3, 0.0)
        parameter.data = shift + scale * torch.randn(parameter.shape, generator=generator)
        if name.endswith("linear_qkv.bias") and not config.add_qkv_bias:
            parameter.data *= model.get_submodule(name.removesuffix(".linear_qkv.bias"))._of_gates
    return model


def by_hf_name(model, groups=HEADS, recurrence=True, of=lambda parameter: parameter.detach()) -> dict[str, torch.Tensor]:
    """The model's parameters (or what ``of`` takes of them) under the names of the Hugging Face format, fused ones apart."""
    tensors, named = {}, dict(model.named_parameters())
    for row in TABLE:
        for layer in range(LAYERS if row.per_layer else 1):
            if found := row.find(named, layer):
                tensor = of(named.pop(found[0]))
                if row in (FUSED_QKV, FUSED_QKV_BIAS):
                    parts = split_fused_qkv(tensor, HEADS, groups, 8, recurrence, model.config.attention_output_gate)
                    names = {name.split(".")[-2].removesuffix("_proj"): name for name in row.hf}
                    if row is FUSED_QKV_BIAS and not model.config.add_qkv_bias:
                        assert not any(parts.pop(name).any() for name in ("q", "k", "v"))  # nor has what ``of`` takes of them
                    tensors |= {names[name].format(layer=layer): part for name, part in parts.items()}
                    continue
                parts = tensor.chunk(1 + (row is FUSED_MLP and model.config.gated_linear_unit))
                tensors |= {name.format(layer=layer): part for name, part in zip(row.hf[-len(parts) :], parts, strict=True)}
    assert not named, f"parameters without a name in the table: {list(named)}"
    return tensors


def visible_by(word: str):
    """visible(layer, head, t, j) of a pattern of positions, from the definition."""
    pattern = AttentionPattern.parse(word)

    def visible(layer, head, t, j):
        heads = pattern.layer(layer).heads
        one = heads[head % len(heads)]
        return sees(t, j, one.dilation, one.window, one.sinks)

    return visible


def set_attention_pattern(chunks, pattern):
    from rat_megatron.model import core_attention  # Megatron is imported once the fixture has prepared the machine

    core_attention.set_attention_pattern(chunks, pattern)


def logits_of(model, tokens):
    """[b, s, vocab], attention under the pattern the model is switched to."""
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def relative(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


PATTERNS = ["dense", "d4", "d8w5s2", "w6s3", "[dense,d16,d4w4]", "{dense*2,d8,d4w2s1}"]


SWIGLU = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}


@pytest.mark.parametrize("word", PATTERNS)
@pytest.mark.parametrize("groups, tied, mlp", [(HEADS, True, {}), (2, False, SWIGLU)], ids=["gelu", "gqa-untied-swiglu"])
def test_logits_and_gradients_equal_the_definition(word, groups, tied, mlp):
    model = build(groups=groups, tied=tied, **mlp)
    set_attention_pattern([model], AttentionPattern.parse(word))
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    weights = {name: tensor.double().requires_grad_() for name, tensor in by_hf_name(model, groups).items()}
    expected = reference_model(weights, tokens, HEADS, groups, visible_by(word))
    actual = logits_of(model, tokens)
    assert relative(actual.detach(), expected.detach()) < 1e-5

    direction = torch.randn_like(actual)
    actual.backward(direction)
    expected.backward(direction.double())
    gradients = by_hf_name(model, groups, of=lambda parameter: parameter.grad)
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        assert relative(gradients[name], weight.grad) < 1e-4, name


# What other families' layers have: config, GPTModel's arguments, and RoPE by its definition.
OPTIONS = {
    "qwen2.5": ({"add_qkv_bias": True, "attention_output_gate": False, **SWIGLU}, {}, {}),
    "qwen3": ({"qk_layernorm": True, "rat_gate_bias": True, **SWIGLU}, {"rotary_base": 1000000}, {"base": 1000000}),
    "olmo2": (
        {"qk_layernorm": True, "rat_qk_layernorm_over_heads": True, "rat_norm_after": True, "attention_output_gate": False, **SWIGLU},
        {}, {},
    ),
    "gate bias": ({"rat_gate_bias": True, "attention_output_gate": False}, {}, {}),
    "llama3": ({}, {"rope_scaling": True, "rope_scaling_factor": 32.0}, {"stretch": lambda f: reference.llama3(f, 32.0)}),
    "linear": ({}, {"seq_len_interpolation_factor": 4}, {"stretch": lambda f: f / 4}),
    "partial": ({"no_rope_freq": [0, 1, 0]}, {"rotary_percent": 0.5}, {"share": 0.5, "without": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("word", ["dense", "d8w5s2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_other_families_equal_the_definition(name, word):
    options, rope, definition = OPTIONS[name]
    model = build(groups=2, rope=rope, **options)
    set_attention_pattern([model], AttentionPattern.parse(word))
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    weights = {name: tensor.double().requires_grad_() for name, tensor in by_hf_name(model, 2).items()}
    without = definition.get("without", [])

    def turn(x, layer):
        return x if layer in without else reference.rotary(x, **{key: value for key, value in definition.items() if key != "without"})

    expected = reference_model(weights, tokens, HEADS, 2, visible_by(word), turn)
    actual = logits_of(model, tokens)
    assert relative(actual.detach(), expected.detach()) < 1e-5
    direction = torch.randn_like(actual)
    actual.backward(direction)
    expected.backward(direction.double())
    gradients = by_hf_name(model, 2, of=lambda parameter: parameter.grad)
    assert gradients.keys() == weights.keys()
    for weight_name, weight in weights.items():
        assert relative(gradients[weight_name], weight.grad) < 1e-4, weight_name


def test_baseline_is_the_same_block_without_recurrence():
    model = build(recurrence=False)
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    weights = by_hf_name(model, recurrence=False)
    assert not any("forget_gate" in name for name in weights) and any("output_gate" in name for name in weights)
    expected = reference_model(weights, tokens, HEADS, HEADS, visible_by("dense"))
    assert relative(logits_of(model, tokens).detach(), expected) < 1e-5


@pytest.mark.parametrize("word", [*PATTERNS, "d8k2", "d8k3+d"])
def test_a_changed_token_changes_no_earlier_logit(word):
    model = build(pattern=word)
    tokens = torch.randint(0, VOCAB, (1, LENGTH))
    changed = tokens.clone()
    changed[0, 23] = (changed[0, 23] + 1) % VOCAB
    before, after = (logits_of(model, t).detach() for t in (tokens, changed))
    assert torch.equal(before[:, :23], after[:, :23])
    assert not torch.isclose(before[:, 23], after[:, 23]).all()
    assert not torch.isclose(before[:, -1], after[:, -1]).all()  # the recurrence, at least, carries it to the end


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_any_length_down_to_one_token(length):
    model = build(pattern="d16w2s1")
    tokens = torch.randint(0, VOCAB, (2, length))
    expected = reference_model(by_hf_name(model), tokens, HEADS, HEADS, visible_by("d16w2s1"))
    assert relative(logits_of(model, tokens).detach(), expected) < 1e-5


def test_the_scan_applies_rope_in_a_forward_pass_alone():
    model = build()
    attention = model.decoder.layers[0].self_attention
    hidden = torch.randn(12, 1, model.config.hidden_size)
    query, key, value, gate = attention.get_query_key_value_tensors(hidden)
    logits_of(model, torch.randint(0, 20, (1, 12)))
    for after, before in zip(attention.get_query_key_value_tensors(hidden), (query, key, value, gate), strict=True):
        assert torch.equal(after, before)


def test_gelu_is_exact_and_matrices_start_alike():
    from megatron.core.models.gpt import GPTModel

    from rat_megatron.model.layer_spec import get_rat_block_spec

    config = build().config
    assert config.activation_func is torch.nn.functional.gelu and not config.bias_activation_fusion
    fresh = GPTModel(config, get_rat_block_spec(config), 4096, 64, position_embedding_type="rope", share_embeddings_and_output_weights=True)
    for name, parameter in fresh.named_parameters():
        if parameter.dim() == 2:
            assert abs(parameter.std().item() / 0.02 - 1) < 0.1, name  # the output projections too: no scaling with depth
        else:
            assert (parameter == 1).all(), name


def test_every_projection_has_the_name_of_its_buffer(monkeypatch):
    """By which Transformer Engine finds the buffer that --tp-comm-overlap works in."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    names = []
    for linear in (ColumnParallelLinear, RowParallelLinear):

        def noted(self, *args, original=linear.__init__, **kwargs):
            names.append(kwargs.get("tp_comm_buffer_name"))
            original(self, *args, **kwargs)

        monkeypatch.setattr(linear, "__init__", noted)
    build()
    assert sorted(name for name in names if name) == sorted(["qkv", "proj", "fc1", "fc2"] * LAYERS)


def test_the_pattern_must_fit_the_model():
    with pytest.raises(PatternError, match="lists 2 layers, but the model has 3"):
        build(pattern="[dense,d16]")
    with pytest.raises(PatternError, match="lists 3 heads, but a layer has 4"):
        build(pattern="{dense,d16*2}")
    with pytest.raises(PatternError, match="training sample has no prompt"):
        build(pattern="snap16w4")
    with pytest.raises(PatternError, match="write 'd4k3'"):
        set_attention_pattern([build()], AttentionPattern.parse("d4k3means"))


@pytest.mark.parametrize(
    "preset, recurrence, billions",
    [("1.5b", True, 1.475), ("1.5b", False, 1.374), ("2.6b", True, 2.651), ("2.6b", False, 2.468), ("7.6b", True, 7.648)],
)
def test_presets_have_the_parameters_of_the_paper(preset, recurrence, billions):
    from megatron.core.models.gpt import GPTModel

    from rat_megatron.model.config import RATTransformerConfig
    from rat_megatron.model.layer_spec import get_rat_block_spec
    from rat_megatron.training.arguments.presets import MODEL, PRETRAIN

    values = MODEL | PRETRAIN[preset]
    fields = {field.name for field in dataclasses.fields(RATTransformerConfig)}
    config = RATTransformerConfig(
        **{name: value for name, value in values.items() if name in fields and name != "overlap_param_gather"},
        rat_recurrence=recurrence, transformer_impl="local", use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPTModel(
            config,
            get_rat_block_spec(config),
            values["vocab_size"],
            values["seq_length"],
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
        )
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions


def test_a_megatron_user_builds_the_layer_from_its_spec_alone():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from rat_megatron.model.layer_spec import get_rat_layer_spec
    from rat_megatron.model.rat_attention import RATSelfAttention

    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=HEADS, normalization="RMSNorm", add_bias_linear=False, attention_output_gate=True,
        transformer_impl="local", attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    layer = build_module(get_rat_layer_spec(config), config=config, layer_number=1)
    hidden = torch.randn(LENGTH, 2, 32, requires_grad=True)
    output, _ = layer(hidden, attention_mask=None)
    output.sum().backward()
    assert isinstance(layer.self_attention, RATSelfAttention) and hidden.grad.norm() > 0

    model = GPTModel(config, get_rat_layer_spec(config), VOCAB, 64, position_embedding_type="rope")
    tokens = torch.randint(VOCAB, (2, LENGTH))
    assert model(tokens, torch.arange(LENGTH).expand(2, -1), None, labels=tokens).shape == (2, LENGTH)
    assert all(isinstance(layer.self_attention, RATSelfAttention) for layer in model.decoder.layers)


def test_megatrons_own_spec_flag_takes_the_block_spec(monkeypatch):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from rat_megatron.model.rat_attention import RATSelfAttention

    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 "
        "--lr 1e-3 --train-iters 1 --vocab-size 64 --tokenizer-type NullTokenizer --transformer-impl local --normalization RMSNorm "
        "--disable-bias-linear --attention-output-gate --attention-dropout 0 --position-embedding-type rope --no-masked-softmax-fusion "
        "--no-persist-layer-norm --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion --use-cpu-initialization "
        "--distributed-backend gloo "
        "--spec rat_megatron.model.layer_spec get_rat_block_spec"
    )
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *flags.split()])
    args = parse_args()
    validate_args(args)
    args.padded_vocab_size = args.vocab_size
    config = gpt_config_from_args(args)  # Megatron's TransformerConfig: no word of RAT+ in it
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert isinstance(model, GPTModel)
    assert all(isinstance(layer.self_attention, RATSelfAttention) for layer in model.decoder.layers)
    tokens = torch.randint(64, (1, 64))
    model(tokens, torch.arange(64)[None], None, labels=tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class _AttentionInFP8(torch.nn.Module):
    """What of Transformer Engine's attention a checkpoint is about: a state beside the parameters, which Megatron leaves out."""

    def __init__(self, **_):
        super().__init__()
        self.scales = torch.rand(3)

    def get_extra_state(self):
        return self.scales

    def set_extra_state(self, state):
        self.scales = state

    def sharded_state_dict(self, **_):
        return {}


@pytest.mark.parametrize("recipe, is_kept", [("delayed", True), ("tensorwise", False)])
def test_the_scales_of_fp8_attention_are_in_a_checkpoint(recipe, is_kept, tmp_path):
    from megatron.core import dist_checkpointing

    from rat_megatron.model.core_attention import RATCoreAttention

    def attention_layers():
        model = build(fp8_recipe=recipe)
        for module in model.modules():
            if isinstance(module, RATCoreAttention):
                module.dense = _AttentionInFP8()
        return model, [layer.self_attention.core_attention.dense for layer in model.decoder.layers]

    (saved, there), (loaded, here) = attention_layers(), attention_layers()
    dist_checkpointing.save(saved.sharded_state_dict(), str(tmp_path))
    loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(), str(tmp_path)), strict=is_kept)
    assert [torch.equal(before.scales, after.scales) for before, after in zip(there, here, strict=True)] == [is_kept] * LAYERS


@pytest.mark.parametrize("recurrence", [True, False], ids=["rat", "baseline"])
def test_packed_documents_are_refused(recurrence):
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens = torch.randint(VOCAB, (1, LENGTH))
    bounds = torch.tensor([0, LENGTH // 2, LENGTH], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH)
    with pytest.raises(ValueError, match="do not support packed documents"):
        build(recurrence)(tokens, torch.arange(LENGTH)[None], None, labels=tokens, packed_seq_params=packed)
