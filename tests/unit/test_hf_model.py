"""The Hugging Face model against the definition written out in tests/reference.py, and its life as a Transformers model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rat_megatron.hf import RatPlusCache, RatPlusConfig, RatPlusForCausalLM, RatPlusModel
from rat_megatron.ratplus.attention_ratplus import block_summary, choose_blocks, gated_scan
from rat_megatron.ratplus.pattern import AttentionPattern, HeadPattern
from rat_megatron.ratplus.rotary_ratplus import rotary_tables
from tests import reference

torch.set_num_threads(1)  # at these sizes threads only wait for each other
LAYERS, HEADS, VOCAB = 2, 4, 61
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
POSITIONAL = ["dense", "d4", "d16", "d16w8s4", "w8s2", "w0", "[dense,d4w2]", "{dense*2,d4,w2s1}", "[{d3,w5,d8s2,dense},d5w1]"]
VARIANTS = [
    pytest.param({}, id="tied"),
    pytest.param({"num_key_value_heads": 2, "tie_word_embeddings": False}, id="gqa-untied"),
    pytest.param({"num_key_value_heads": 1, "head_dim": 6}, id="one-key-head"),
    pytest.param({"use_recurrence": False}, id="baseline"),
    pytest.param({"hidden_act": "silu", "intermediate_size": 40}, id="swiglu"),
    pytest.param({"attention_bias": True, "use_output_gate": False, "num_key_value_heads": 2}, id="biases, no output gate"),
    pytest.param({"qk_norm": "head", "gate_bias": True, "num_key_value_heads": 2, "rope_theta": 1e6}, id="qk-norm, biased gates"),
    pytest.param({"qk_norm": "layer", "norm_position": "after", "use_output_gate": False, "num_key_value_heads": 2}, id="norms after"),
    pytest.param({"rotary_percent": 0.75, "layers_without_rope": [1], "qk_norm": "head", "num_key_value_heads": 2}, id="partial rope"),
    pytest.param({"rotary_scaling": {"rope_type": "linear", "factor": 2.5}}, id="linear"),
    pytest.param({"rotary_scaling": LLAMA3, "rope_theta": 500000.0}, id="llama3"),
]


def tiny_model(pattern="dense", dtype=torch.float64, seed=0, **overrides):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": 8}
    model = RatPlusForCausalLM(RatPlusConfig(**{**sizes, "attention_pattern": pattern, **overrides}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.to(dtype).eval()


def expected_logits(model, tokens, visible=None):
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    config, stretch = model.config, {"linear": lambda f: f / 2.5, "llama3": lambda f: reference.llama3(f, original=32)}
    kind = (config.rotary_scaling or {}).get("rope_type")

    def turn(x, layer):
        if layer in config.layers_without_rope:
            return x
        return reference.rotary(x, config.rope_theta, config.rotary_percent, stretch.get(kind, lambda f: f))

    visible = visible or visible_by_definition(config.attention_pattern)
    return reference.model(weights, tokens, HEADS, config.num_key_value_heads, visible, turn)


def visible_by_definition(word):
    pattern = AttentionPattern.parse(word)

    def visible(layer, head, t, j):
        heads = pattern.layer(layer).heads
        one = heads[head % len(heads)]
        return reference.sees(t, j, one.dilation, one.window, one.sinks)

    return visible


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("pattern", POSITIONAL)
def test_logits_match_the_definition(pattern, length):
    model, tokens = tiny_model(pattern, num_key_value_heads=2), torch.randint(VOCAB, (2, length))
    assert relative_error(model(tokens).logits, expected_logits(model, tokens)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pattern", ["dense", "[d16w8s4,{dense*2,d4,w8s2}]"])
def test_every_variant_matches_the_definition(pattern, variant):
    model, tokens = tiny_model(pattern, **variant), torch.randint(VOCAB, (1, 65))
    expected = expected_logits(model, tokens)
    assert relative_error(model(tokens).logits, expected) < 1e-10
    assert (model.float()(tokens).logits - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS[5:])
@pytest.mark.parametrize("pattern", ["dense", "d4"])
def test_every_variant_goes_on_from_its_cache(pattern, variant):
    """Token by token, after a prompt, and after going back, where a state is taken from an entry of the cache."""
    model, tokens = tiny_model(pattern, **variant), torch.randint(VOCAB, (2, 23))
    expected, cache = model(tokens).logits, RatPlusCache()
    parts = [model(tokens[:, :9], past_key_values=cache).logits]
    parts += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(9, 14)]
    cache.crop(12)
    parts = [torch.cat(parts, dim=1)[:, :12], model(tokens[:, 12:], past_key_values=cache).logits]
    assert relative_error(torch.cat(parts, dim=1), expected) < 1e-10


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 4.0}, LLAMA3,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "mscale": 0.8, "mscale_all_dim": 0.4},
])  # fmt: skip
def test_scaled_angles_are_those_of_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = RatPlusConfig(hidden_size=512, num_attention_heads=8, rope_theta=500000.0, rotary_scaling=scaling)
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=config.max_position_embeddings)
    of_rope = {**scaling, "rope_theta": 500000.0}
    theirs.rope_theta, theirs.rope_scaling = 500000.0, of_rope
    if hasattr(theirs, "rope_parameters"):  # Transformers 5
        theirs.rope_parameters = of_rope
    frequency, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    positions = torch.randint(100_000, (3, 50))
    angle = positions[:, None, :, None] * frequency.double()
    cos, sin = rotary_tables(positions, config, torch.float64)
    # Transformers' frequencies are fp32: of the angles, which reach 1e5, that many digits are theirs.
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=0, atol=2e-2)
    torch.testing.assert_close(cos[:, :, :, -8:], angle[..., -8:].cos() * factor, rtol=0, atol=1e-5)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rotary_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope': linear, llama3, yarn are supported"),
        ({"rotary_scaling": {"rope_type": "yarn", "factor": 2.0}}, "has no number for original_max_position_embeddings"),
        ({"qk_norm": "both"}, "qk_norm is 'head', 'layer' or None"),
        ({"norm_position": "around"}, "norm_position is 'before' or 'after'"),
        ({"layers_without_rope": [2]}, "not all among 2 layers"),
        ({"rotary_percent": 0.5}, "turns channels in pairs"),
        ({"rotary_percent": 0.0}, "turns channels in pairs"),
    ],
)
def test_options_that_cannot_be_have_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        RatPlusConfig(hidden_size=40, num_attention_heads=4, num_hidden_layers=2, **changes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("word", "visible"),
    [
        ("d4k1", lambda layer, head, t, j: j <= t and j // 4 == t // 4),
        ("d4k2", lambda layer, head, t, j: j <= t and j // 4 in (0, t // 4)),
        ("d4k2+d", lambda layer, head, t, j: j <= t and (j // 4 in (0, t // 4) or (j + 1) % 4 == 0)),
        ("d4k99", lambda layer, head, t, j: j <= t),
        ("{dense,d4k2,d3w1,d8k2}", lambda layer, head, t, j: j <= t and [
            True, j // 4 in (0, t // 4), t - j <= 1 or (j + 1) % 3 == 0, j // 8 in (0, t // 8)][head]),
    ],
)  # fmt: skip
def test_top_k_without_a_choice_matches_the_definition(word, visible):
    model, tokens = tiny_model(word, num_key_value_heads=2), torch.randint(VOCAB, (2, 19))
    assert relative_error(model(tokens).logits, expected_logits(model, tokens, visible)) < 1e-10


@pytest.mark.parametrize("scores", ["bounds", "means"])
@pytest.mark.parametrize("word", ["d4k3", "d4k4", "d5k3"])
def test_block_choice_is_that_of_quest_or_moba(word, scores):
    """Own block, first block, then the highest bounds sum_d max(q_d kmax_d, q_d kmin_d), or products with the mean key, in between."""
    torch.manual_seed(1)
    length, pattern = 23, HeadPattern.parse(word)
    size = pattern.dilation
    q, k = torch.randn(2, 4, length, 6), torch.randn(2, 2, length, 6)
    chosen = choose_blocks(q, block_summary(k, size, scores), torch.arange(length)[None], pattern, scores)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(length)).tolist():
        own = t // size
        score = {}
        for block in range(1, own):
            keys = k[b, h // 2, block * size : (block + 1) * size]
            bound = torch.maximum(q[b, h, t] * keys.amax(0), q[b, h, t] * keys.amin(0)).sum()
            score[block] = bound if scores == "bounds" else q[b, h, t] @ keys.mean(0)
        blocks = {0, own, *sorted(score, key=score.get, reverse=True)[: pattern.blocks - 2]}
        assert chosen[b, h, t].nonzero().flatten().tolist() == sorted(blocks)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [*POSITIONAL, "d4k3", "[d4k3+d,{dense,d4k3,w2,d4}]"])
def test_no_token_sees_the_future(pattern):
    model, tokens = tiny_model(pattern), torch.randint(VOCAB, (1, 33))
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCAB
    difference = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[:20].max() < 1e-12
    assert difference[20:].min() > 1e-3


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 64, 65])
def test_gated_scan_is_the_recurrence(length):
    torch.manual_seed(length)
    f, x = torch.randn(2, 3, length, 4, dtype=torch.float64), torch.randn(2, 2, 3, length, 4, dtype=torch.float64)
    expected = torch.stack([reference.recurrence(one.transpose(1, 2), f.transpose(1, 2)).transpose(1, 2) for one in x])
    gate = f.sigmoid()
    update = (1 - gate) * x
    torch.testing.assert_close(gated_scan(gate, update), expected, rtol=0, atol=1e-13)
    if length > 1:  # cut anywhere, the second part goes on from the state of the first
        cut = length // 2
        start = expected[..., cut - 1 : cut, :]
        torch.testing.assert_close(gated_scan(gate[:, :, cut:], update[..., cut:, :], start), expected[..., cut:, :], rtol=0, atol=1e-13)


def test_gated_scan_gradient():
    torch.manual_seed(0)
    gate = torch.rand(1, 1, 5, 2, dtype=torch.float64, requires_grad=True)
    x, state = (torch.randn(2, 1, 1, n, 2, dtype=torch.float64, requires_grad=True) for n in (5, 1))
    assert torch.autograd.gradcheck(gated_scan, (gate, x, state))


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w2", "d4k2"])
def test_bf16_weights_keep_an_fp32_state(pattern):
    model, tokens = tiny_model(pattern, dtype=torch.bfloat16), torch.randint(VOCAB, (2, 40))
    cache = model(tokens[:, :20]).past_key_values
    for t in range(20, 40):
        cache = model(tokens[:, t : t + 1], past_key_values=cache).past_key_values
    whole = model(tokens).past_key_values
    for layer in (0, 1):
        state = cache.layers[layer].heads[0].state
        assert state.dtype == torch.float32
        assert cache.layers[layer].heads[0].k.dtype == torch.bfloat16
        assert not torch.equal(state, state.bfloat16().float()), "the state was rounded to bf16"
    # Layer 0 sees the same inputs both ways: were its state rounded at each token, this would be near 1e-3.
    assert relative_error(*(one.layers[0].heads[0].state for one in (cache, whole))) < 1e-5


def test_weight_names_and_parameter_count():
    names = {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(
            f"model.layers.{i}.{name}.weight"
            for i in range(LAYERS)
            for name in (
                "input_layernorm",
                *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "o", "output_gate", "forget_gate")),
                "post_attention_layernorm",
                "mlp.up_proj",
                "mlp.down_proj",
            )
        ),
    }
    assert set(tiny_model(tie_word_embeddings=False).state_dict()) == names
    gates = {f"model.layers.{i}.self_attn.forget_gate_proj.weight" for i in range(LAYERS)}
    assert set(tiny_model(tie_word_embeddings=False, use_recurrence=False).state_dict()) == names - gates
    with torch.device("meta"):  # the paper's 1.5B and its baseline
        assert RatPlusForCausalLM(RatPlusConfig()).num_parameters() == pytest.approx(1.475e9, abs=1e6)
        assert RatPlusForCausalLM(RatPlusConfig(use_recurrence=False)).num_parameters() == pytest.approx(1.374e9, abs=1e6)


def test_initial_weights():
    torch.manual_seed(0)
    model = RatPlusForCausalLM(RatPlusConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(weight.mean().item()) < 1e-3


@torch.no_grad()
def test_set_attention_pattern():
    model, tokens = tiny_model("dense"), torch.randint(VOCAB, (1, 17))
    model.set_attention_pattern("[d4,d4]")
    assert model.config.attention_pattern == "d4"
    assert relative_error(model(tokens).logits, expected_logits(model, tokens)) < 1e-10
    for word, complaint in (
        ("[dense,d4,d4]", "3 layers, but the model has 2"),
        ("{dense,d4}", "2 heads, but a layer has 4"),
        ("x9", "unknown"),
    ):
        with pytest.raises(ValueError, match=complaint):
            model.set_attention_pattern(word)
    assert model.config.attention_pattern == "d4"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"attention_pattern": "dd"}, "unknown attention pattern"),
        ({"attention_pattern": "[dense]*3", "num_hidden_layers": 2}, "3 layers"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "in pairs"),
        ({"block_scores": "maxima"}, "'bounds' or 'means'"),
    ],
)
def test_config_refuses_what_does_not_fit(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        RatPlusConfig(**settings)


@torch.no_grad()
def test_bad_calls_are_explained():
    model, tokens = tiny_model(), torch.randint(VOCAB, (2, 5))
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        model(tokens, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="RatPlusCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))
    with pytest.raises(ValueError, match="prompt is empty"):
        model(tokens[:, :0])
    model.config.max_position_embeddings = 4
    with pytest.raises(ValueError, match="5 tokens are more than max_position_embeddings, 4"):
        model(tokens)


def test_loss_and_optional_outputs():
    model, tokens = tiny_model("d4"), torch.randint(VOCAB, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100
    out = model(tokens, labels=labels, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss.float(), expected)
    assert len(out.hidden_states) == LAYERS + 1
    torch.testing.assert_close(out.hidden_states[-1] @ model.lm_head.weight.T, out.logits)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, out.logits[:, [0, 3]])
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, out.logits)
    torch.testing.assert_close(model(tokens, return_dict=False, use_cache=False)[0], out.logits)


def test_rope_positions_are_relative():
    model, tokens = tiny_model("d4w2"), torch.randint(VOCAB, (1, 9))
    shifted = model(tokens, position_ids=torch.arange(100, 109)[None]).logits
    torch.testing.assert_close(shifted, model(tokens).logits)
    stretched = model(tokens, position_ids=torch.arange(0, 18, 2)[None]).logits
    assert (stretched - shifted).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", ["dense", "[d4w2,d4k3]"])
def test_gradient_checkpointing_gives_the_same_gradients(pattern):
    tokens = torch.randint(VOCAB, (2, 13))
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(pattern).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        out = model(tokens, labels=tokens)
        assert out.past_key_values is None
        out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == 2, "the layer was not run again in the backward pass"
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model, tokens = tiny_model("[dense,d4w2]", dtype=torch.float32, tie_word_embeddings=tied), torch.randint(VOCAB, (1, 17))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in index) is not tied
    assert len(set(index.values())) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RatPlusForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is RatPlusConfig
    assert loaded.config.attention_pattern == "[dense,d4w2]"
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    body, info = RatPlusModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(body(tokens).last_hidden_state @ model.lm_head.weight.T, model(tokens).logits)


@torch.no_grad()
def test_saved_folder_needs_nothing_of_this_package(tmp_path):
    model, tokens = tiny_model("[d4w2,d4k3]", dtype=torch.float32), torch.arange(17)[None]
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    script = f"""
import sys
sys.modules["rat_megatron"] = None  # any import of it fails from here on
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
logits = model(torch.arange(17)[None]).logits
torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}), rtol=0, atol=1e-5)
tokens = model.generate(torch.arange(1, 6)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
assert tokens.shape == (1, 9), tokens.shape
print(type(model).__module__)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("transformers_modules.")
