"""The Hugging Face model on a GPU: with the fused kernels of this package it says what it says in plain torch."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from rat_megatron.hf import RatPlusCache, RatPlusConfig, RatPlusForCausalLM
from rat_megatron.ratplus import attention_ratplus
from tests.unit.test_hf_generate import pad, random_tokens

PATTERNS = ["dense", "d4", "d16w8s4", "w8s2", "[dense,d4w2]", "{dense*2,d4,w2s1}", "d4k3", "d4k4+d", "snap16w4"]
LAYERS = [
    {"use_output_gate": False, "attention_bias": True, "head_dim": 64},
    {"qk_norm": "head", "gate_bias": True, "head_dim": 96, "hidden_act": "silu"},
    {"qk_norm": "layer", "norm_position": "after", "head_dim": 256, "rotary_percent": 0.5},
]


def model_on_gpu(pattern: str, dtype: torch.dtype = torch.float32, **layer) -> RatPlusForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = RatPlusForCausalLM(RatPlusConfig(**sizes, attention_pattern=pattern, pad_token_id=0, **layer))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model.to("cuda", dtype).eval()


def decoded(model, ids, mask, rest) -> torch.Tensor:
    """Logits of the real tokens: the prompt's, then those of every further token by itself."""
    out = model(ids, attention_mask=mask, use_cache=True)
    logits, cache = [out.logits[mask == 1]], out.past_key_values
    for token in rest.split(1, dim=1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits.append(model(token, attention_mask=mask, past_key_values=cache).logits[:, 0])
    return torch.cat(logits)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_change_nothing(pattern, monkeypatch):
    ids, mask = (x.cuda() for x in pad([random_tokens(n) for n in (3, 200, 77)]))
    rest = random_tokens(3, 20).cuda()
    with_kernels = decoded(model_on_gpu(pattern), ids, mask, rest)
    monkeypatch.setattr(attention_ratplus, "kernels", None)
    without = decoded(model_on_gpu(pattern, torch.float64), ids, mask, rest)
    if "k" in pattern or "snap" in pattern:  # a near tie may fall the other way, and change what follows
        assert ((with_kernels - without).abs().amax(-1) < 1e-2).float().mean() > 0.9
    else:
        assert (with_kernels - without).norm() / without.norm() < 1e-3  # fp32 products on the tensor cores


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: " ".join(map(str, layer.values())))
def test_layers_beyond_the_papers(layer, monkeypatch):
    ids, mask = (x.cuda() for x in pad([random_tokens(n) for n in (3, 200, 77)]))
    rest = random_tokens(3, 20).cuda()
    with_kernels = decoded(model_on_gpu("d16w8s4", **layer), ids, mask, rest)
    monkeypatch.setattr(attention_ratplus, "kernels", None)
    without = decoded(model_on_gpu("d16w8s4", torch.float64, **layer), ids, mask, rest)
    assert (with_kernels - without).norm() / without.norm() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d16", "d16w8s4"])
def test_a_decode_step_can_be_a_cuda_graph(pattern):
    model, prompt, rest = model_on_gpu(pattern, torch.bfloat16), random_tokens(2, 40).cuda(), random_tokens(2, 30).cuda()
    expected = decoded(model, prompt, torch.ones_like(prompt), rest)[80:].unflatten(0, (30, 2))
    cache = RatPlusCache(80)
    model(prompt, past_key_values=cache)
    token = rest[:, :1].clone()
    saved = [(head.k.clone(), head.v.clone(), head.state.clone(), cache.lengths.clone()) for layer in cache.layers for head in layer.heads]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(token, past_key_values=cache)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, past_key_values=cache).logits
    for head, (k, v, state, lengths) in zip((head for layer in cache.layers for head in layer.heads), saved, strict=True):
        head.k.copy_(k), head.v.copy_(v), head.state.copy_(state), cache.lengths.copy_(lengths)
    for t in range(30):
        token.copy_(rest[:, t : t + 1])
        graph.replay()
        assert (logits[:, 0].float() - expected[t].float()).norm() / expected[t].float().norm() < 2e-2


def test_generate_in_bf16():
    model, (ids, mask) = model_on_gpu("d16w8s4", torch.bfloat16), pad([random_tokens(n) for n in (5, 70)])
    out = model.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert out.shape == (2, 90)


def test_training_step_equals_plain_torch(monkeypatch):
    tokens, gradients = random_tokens(2, 130).cuda(), []
    for dtype, lent in ((torch.float32, attention_ratplus.kernels), (torch.float64, None)):
        monkeypatch.setattr(attention_ratplus, "kernels", lent)
        model = model_on_gpu("d16w8s4", dtype).train()
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.model.layers[0].self_attn.forget_gate_proj.weight.grad.double())
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_are_undone_after_kernels(pattern):
    model, tokens = model_on_gpu(pattern), random_tokens(2, 220).cuda()
    cache = RatPlusCache()
    cache.activate_past_recording()
    model(tokens[:, :200], past_key_values=cache)
    model(tokens[:, 200:211], past_key_values=cache)
    for t in range(211, 216):
        model(tokens[:, t : t + 1], past_key_values=cache)
    for length in (214, 207, 199):
        cache.crop(length)
        logits = model(tokens[:, -4:], past_key_values=cache).logits
        expected = model(torch.cat([tokens[:, :length], tokens[:, -4:]], dim=1)).logits[:, length:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_assistants_write_what_greedy_search_writes(pattern):
    model, ids = model_on_gpu(pattern), random_tokens(1, 90).cuda()
    run = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": 61}  # none of the vocabulary; prompt lookup must have one
    expected = model.generate(ids, **run)
    for helper in ({"assistant_model": model_on_gpu("d4")}, {"prompt_lookup_num_tokens": 5}):
        written = model.generate(ids, **helper, **run)[:, : expected.shape[1]]
        if not torch.equal(written, expected):  # fp32: where they part, rounding decides between two tokens
            at = int((written != expected).int().argmax())
            best = model(expected[:, :at]).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] < 1e-3 and {int(written[0, at]), int(expected[0, at])} == set(best.indices.tolist())
