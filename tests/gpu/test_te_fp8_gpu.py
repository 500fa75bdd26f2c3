"""RAT+ layers on Transformer Engine in FP8: the attention that it chooses, errors to float64, and checkpoints between FP8 and bf16."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine", exc_type=ImportError)
if torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a GPU with FP8 attention", allow_module_level=True)

from rat_megatron.convert.names import FUSED_QKV, TABLE, split_fused_qkv
from tests.reference import model as reference_model

pytestmark = pytest.mark.usefixtures("megatron_process")

VOCAB, LENGTH, BATCH, LAYERS, HEADS, GROUPS, DIM = 128, 256, 2, 2, 4, 2, 128  # heads of 128: the others have no FP8 backward on Hopper


def build(recipe: str | None = None, attention: bool = False):
    """A GPTModel of two RAT+ layers on Transformer Engine, always with the same weights; in bf16 without a recipe."""
    from megatron.core.models.gpt import GPTModel

    from rat_megatron.model.config import RATTransformerConfig
    from rat_megatron.model.layer_spec import get_rat_block_spec

    fp8 = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_dot_product_attention": attention} if recipe else {}
    config = RATTransformerConfig(
        num_layers=LAYERS, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=DIM,
        ffn_hidden_size=1024, normalization="RMSNorm", layernorm_epsilon=1e-6, add_bias_linear=False, attention_dropout=0.0,
        hidden_dropout=0.0, transformer_impl="transformer_engine", bf16=True, params_dtype=torch.bfloat16, **fp8,
    )  # fmt: skip
    model = GPTModel(
        config, get_rat_block_spec(config), VOCAB, LENGTH, position_embedding_type="rope", share_embeddings_and_output_weights=True
    ).cuda()
    generator = torch.Generator("cuda").manual_seed(5)
    for name, parameter in model.named_parameters():
        scale, shift = (0.2, 1.0) if "norm" in name else (0.05, 0.0)
        parameter.data.copy_(shift + scale * torch.randn(parameter.shape, generator=generator, device="cuda"))
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCAB, (BATCH, LENGTH), device="cuda", generator=torch.Generator("cuda").manual_seed(6))


def run(model, tokens, times: int = 3):
    """Logits [b, s, vocab] and the gradient of every parameter, of the last of some equal steps: delayed scaling takes its scales from
    those before."""
    direction = torch.randn(*tokens.shape, VOCAB, device="cuda", generator=torch.Generator("cuda").manual_seed(7))
    for _ in range(times):
        model.zero_grad()
        model.set_is_first_microbatch()  # or a layer would use the weights that it has cast before
        logits = model(tokens, torch.arange(tokens.shape[1], device="cuda").expand_as(tokens), None)
        logits.backward(direction.to(logits.dtype))
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def chosen_backend():
    """What Transformer Engine's last call of attention ran on: (its kind of cuDNN attention or None, whether it was asked for FP8)."""
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    params = _attention_backends["attention_params"]
    asked = bool(params.fp8 and params.fp8_meta["recipe"].fp8_dpa)
    if not _attention_backends["use_fused_attention"]:
        return None, asked
    return FusedAttnBackend(int(_attention_backends["fused_attention_backend"])).name, asked


def relative(actual, expected) -> float:
    actual, expected = (x.double().cpu() for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def expected(megatron_process, tokens):
    """Logits in float64, from the definition."""
    named, weights = dict(build().named_parameters()), {}
    for row in TABLE:
        for layer in range(LAYERS if row.per_layer else 1):
            if found := row.find(named, layer):
                tensor = named[found[0]].detach().cpu()
                parts = list(split_fused_qkv(tensor, HEADS, GROUPS, DIM, recurrence=True).values()) if row is FUSED_QKV else [tensor]
                weights |= {name.format(layer=layer): part for name, part in zip(row.hf[-len(parts) :], parts, strict=True)}
    return reference_model(weights, tokens.cpu(), HEADS, GROUPS, lambda layer, head, t, j: j <= t)


@pytest.fixture(scope="module")
def in_bf16(megatron_process, tokens):
    return run(build(), tokens)


@pytest.mark.parametrize("multi_head", [False, True])
def test_dense_attention_runs_on_cudnns_fp8_kernel(multi_head, tokens, expected, in_bf16):
    model = build("delayed", attention=True)
    model.config.fp8_multi_head_attention = multi_head
    logits, gradients = run(model, tokens)
    assert chosen_backend() == ("FP8", True)
    linear_only, _ = run(build("delayed"), tokens)
    assert chosen_backend()[0] != "FP8" and not chosen_backend()[1]
    assert 1e-4 < relative(logits, linear_only) < 0.1, "FP8 attention is another computation, and nearly the same"
    assert relative(in_bf16[0], expected) < 0.02
    assert relative(logits, expected) < 0.15
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and relative(gradient, in_bf16[1][name]) < 0.35, name


def test_tensorwise_attention_is_where_the_command_line_lets_it_be(tokens):
    model = build("tensorwise", attention=True)
    if torch.cuda.get_device_capability() >= (10, 0):
        run(model, tokens)
        assert chosen_backend() == ("FP8", True)
    else:
        with pytest.raises(ValueError, match="No dot product attention backend"):
            run(model, tokens)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_linear_layers_of_every_recipe(recipe, tokens, expected, in_bf16):
    from transformer_engine.pytorch.quantization import check_fp8_block_scaling_support

    supported, reason = check_fp8_block_scaling_support()
    if recipe == "blockwise" and not supported:
        pytest.skip(reason)
    logits, gradients = run(build(recipe), tokens)
    assert relative(in_bf16[0], expected) * 1.5 < relative(logits, expected) < 0.15, "FP8's error, not bf16's"
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and relative(gradient, in_bf16[1][name]) < 0.35, name


@pytest.fixture
def hooks(monkeypatch):
    """Megatron's loading as pretrain_rat.py patches it."""
    from argparse import Namespace

    from megatron.core.dist_checkpointing import validation
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from megatron.core.models.gpt import GPTModel

    from rat_megatron.training.patches import loading as hooks

    load_metadata = hooks.without_strides(TorchDistLoadShardedStrategy.load_tensors_metadata)
    determine = validation._determine_missing_and_unexpected_keys
    determine = hooks.lacking_fp8_state_only(determine, Namespace(dist_ckpt_strictness="log_unexpected"))
    monkeypatch.setattr(TorchDistLoadShardedStrategy, "load_tensors_metadata", load_metadata)
    monkeypatch.setattr(validation, "_determine_missing_and_unexpected_keys", determine)
    monkeypatch.setattr(GPTModel, "load_state_dict", hooks.with_weights_whole(GPTModel.load_state_dict))
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")


def load(model, folder):
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict="log_unexpected"))


def scales_of(model) -> list[torch.Tensor]:
    """Of every linear layer and every attention in FP8, forward."""
    modules = [module for module in model.modules() if "scaling_fwd" in getattr(module, "fp8_meta", {})]
    return [module.fp8_meta["scaling_fwd"].scale.clone() for module in modules]


@pytest.mark.parametrize("there, here", [("delayed", None), (None, "delayed"), ("delayed", "delayed"), ("delayed", "tensorwise")])
def test_checkpoints_go_between_fp8_and_bf16(there, here, tokens, hooks, tmp_path):
    from megatron.core import dist_checkpointing

    saved = build(there, attention=there is not None)
    run(saved, tokens)
    for parameter in saved.parameters():  # not those that a new model has
        parameter.data.mul_(1.25)
    dist_checkpointing.save(saved.sharded_state_dict(), str(tmp_path))
    loaded, fresh = (build(here, attention=here == "delayed") for _ in range(2))
    load(loaded, tmp_path)
    for (name, before), after in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after), name
    if there == here == "delayed":
        scales = list(zip(scales_of(saved), scales_of(loaded), strict=True))
        assert len(scales) == 5 * LAYERS and all(torch.equal(before, after) for before, after in scales)
        assert relative(run(loaded, tokens)[0], run(saved, tokens)[0]) <= 1e-6, "it goes on as if it had never stopped"
    for parameter in fresh.parameters():
        parameter.data.mul_(1.25)
    bar = 0.25 if here == "delayed" else 1e-6  # there the scales of other steps, and so other roundings: each is within 0.15 of exact
    assert relative(run(loaded, tokens)[0], run(fresh, tokens)[0]) <= bar
