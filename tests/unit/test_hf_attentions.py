"""output_attentions: the weights that attention uses, against the definition, in the columns of the input and through a cache."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from rat_megatron.hf import RatPlusCache, RatPlusForSequenceClassification
from rat_megatron.ratplus.cache_ratplus import CACHE_NAME
from tests import reference
from tests.unit.test_hf_classification import tiny_classifier
from tests.unit.test_hf_generate import PATTERNS, pad, random_tokens
from tests.unit.test_hf_generate import tiny_model as fused_model
from tests.unit.test_hf_model import POSITIONAL, visible_by_definition

torch.set_num_threads(1)  # at these sizes threads only wait for each other
VARIANTS = pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])


def tiny_model(pattern, dtype=torch.float64, **overrides):
    model = fused_model(pattern, dtype, **overrides)
    model.set_attn_implementation("eager")
    return model


def attention_inside(model, tokens):
    """Outputs of a call, and of every layer the projections q, k, v, f [b, t, heads, hn] and attention's own output [b, t, np, hn]."""
    layers, hooks = [], []
    for layer in model.model.layers:
        found = {}
        layers.append(found)
        for name, module in layer.self_attn.named_children():
            hooks.append(module.register_forward_hook(lambda _, given, out, name=name, found=found: found.update({name: (given[0], out)})))
    outputs = model(tokens, output_attentions=True)
    for hook in hooks:
        hook.remove()
    hn = model.config.head_dim
    inside = []
    for found in layers:
        attended = found["o_proj"][0] / found["output_gate_proj"][1].sigmoid()
        projections = [found[f"{name}_proj"][1].unflatten(-1, (-1, hn)) if f"{name}_proj" in found else None
                       for name in ("q", "k", "v", "forget_gate")]  # fmt: skip
        inside.append((*projections, attended.unflatten(-1, (-1, hn))))
    return outputs, inside


@torch.no_grad()
@VARIANTS
@pytest.mark.parametrize("pattern", [*POSITIONAL, "d4k3", "d4k4+d", "[d4k3,{dense,d4k3+d,w2,d4}]"])
def test_weights_are_those_of_the_definition(pattern, variant):
    model, tokens = tiny_model(pattern, **variant), random_tokens(2, 37)
    outputs, inside = attention_inside(model, tokens)
    torch.testing.assert_close(outputs.logits, fused_model(pattern, torch.float64, **variant)(tokens).logits, rtol=0, atol=1e-10)
    for layer, (weights, (q, k, v, f, attended)) in enumerate(zip(outputs.attentions, inside, strict=True)):
        if f is not None:
            k, v = reference.recurrence(k, f), reference.recurrence(v, f)
        k, v = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (reference.rotary(k), v))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 37).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close((weights @ v).transpose(1, 2), attended, rtol=0, atol=1e-10)
        scores = reference.rotary(q).transpose(1, 2) @ k.mT / math.sqrt(model.config.head_dim)
        heads = model.model.attention_pattern.layer(layer).heads
        for head in range(4):
            own = heads[head % len(heads)]
            if own.blocks:  # which were chosen is tested elsewhere: here that whole blocks were, as many as there should be
                seen = weights[:, head] > 0
                blocks = torch.nn.functional.pad(seen, (0, -37 % own.dilation)).unflatten(2, (-1, own.dilation))
                at = torch.arange(37)
                if not own.dilate_rest:
                    assert torch.equal(blocks.any(-1).sum(-1), (at // own.dilation + 1).clamp(max=own.blocks).expand(2, -1))
                    assert (blocks.all(-1).sum(-1) >= (at // own.dilation).clamp(max=own.blocks - 1)).all()
            else:
                visible = visible_by_definition(pattern)
                seen = torch.tensor([[visible(layer, head, t, j) for j in range(37)] for t in range(37)]).expand(2, -1, -1)
            expected = scores[:, head].masked_fill(~seen, -torch.inf).softmax(-1)
            torch.testing.assert_close(weights[:, head], expected, rtol=0, atol=1e-12)


@torch.no_grad()
@VARIANTS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_of_padded_rows_and_of_pieces_are_those_of_whole_rows(pattern, side, variant):
    """Columns are the input's; a cache's own tokens come first, zero where the compact cache let go of them."""
    model, (ids, mask) = tiny_model(pattern, **variant), pad([random_tokens(n) for n in (2, 30, 11)], side)
    whole = model(ids, attention_mask=mask, output_attentions=True)
    cache, rows = RatPlusCache(), [[], []]
    for start, end in ((0, 9), (9, 10), (10, 26), (26, 27), (27, 30)):
        piece = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, output_attentions=True)
        torch.testing.assert_close(
            piece.logits[mask[:, start:end] == 1], whole.logits[:, start:end][mask[:, start:end] == 1], rtol=0, atol=1e-9
        )
        for layer, weights in enumerate(piece.attentions):
            assert weights.shape == (3, 4, end - start, end)
            rows[layer].append(torch.nn.functional.pad(weights, (0, 30 - end)))
    for layer, weights in enumerate(whole.attentions):
        torch.testing.assert_close(torch.cat(rows[layer], dim=2), weights, rtol=0, atol=1e-9)
        for row, real in enumerate(mask == 1):
            alone = model(ids[row, real][None], output_attentions=True).attentions[layer][0]
            torch.testing.assert_close(weights[row][:, real][:, :, real], alone, rtol=0, atol=1e-9)
            assert weights[row][:, ~real].eq(0).all() and weights[row][:, :, ~real].eq(0).all()


@torch.no_grad()
def test_weights_after_padding_that_a_later_call_does_not_repeat():
    model, (ids, mask) = tiny_model("d4w2"), pad([random_tokens(n) for n in (3, 9)])
    cache = RatPlusCache()
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    weights = model(ids[:, 8:], past_key_values=cache, output_attentions=True).attentions[0]
    expected = model(ids, attention_mask=mask, output_attentions=True).attentions[0][:, :, 8:]
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_returns_weights(dtype):
    model, ids = tiny_model("d4w2s1", dtype), random_tokens(2, 9)
    run = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}
    out = model.generate(ids, output_attentions=True, **run)
    assert [step[1].shape for step in out.attentions] == [(2, 4, 9, 9), (2, 4, 1, 10), (2, 4, 1, 11), (2, 4, 1, 12)]
    assert out.attentions[0][0].dtype == dtype and out.attentions[3][0].sum(-1).sub(1).abs().max() < 1e-2
    assert torch.equal(out.sequences, model.generate(ids, **run).sequences)
    looked_up = model.generate(ids[:1].repeat(1, 2), output_attentions=True, prompt_lookup_num_tokens=3, **(run | {"min_new_tokens": None}))
    assert all(step[0].shape[0] == 1 and step[0].shape[-1] >= 18 for step in looked_up.attentions)


def test_gradients_flow_through_weights():
    model, tokens = tiny_model("[d4w2,d4k3]").train(), random_tokens(2, 13)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = model(tokens, labels=tokens, output_attentions=True)
        (out.loss + sum(weights.square().sum() for weights in out.attentions)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    model.gradient_checkpointing_disable()
    model(tokens, labels=tokens).loss.backward()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (model.get_parameter(name).grad - gradients[0][name]).abs().max() > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_only_eager_attention_has_weights(tmp_path):
    model, tokens = fused_model("d4"), random_tokens(1, 9)
    assert model.config._attn_implementation == "sdpa" and model(tokens).attentions is None
    with pytest.raises(ValueError, match='output_attentions is not possible .*"eager"'):
        model(tokens, output_attentions=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded(tokens).attentions is None
    assert len(loaded(tokens, output_attentions=True).attentions) == 2
    torch.testing.assert_close(loaded(tokens, output_attentions=True).logits, model(tokens).logits, rtol=0, atol=1e-5)
    loaded.config.output_attentions = True
    assert len(loaded(tokens).attentions) == 2
    with pytest.raises(ValueError, match="sdpa"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")(tokens, output_attentions=True)


@torch.no_grad()
def test_other_heads_pass_weights_on():
    model = tiny_classifier(RatPlusForSequenceClassification)
    model.set_attn_implementation("eager")
    out = model(random_tokens(2, 9), output_attentions=True)
    assert getattr(out, CACHE_NAME) is None and out.attentions[1].shape == (2, 4, 9, 9)
