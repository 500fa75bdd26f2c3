"""Nothing silently wrong in the Hugging Face model: what it cannot do is refused, what it is told takes effect, autocast decodes."""

import pytest
import torch
from transformers import GenerationConfig

from rat_megatron.hf import RatPlusCache, RatPlusConfig
from rat_megatron.ratplus.rotary_ratplus import apply_rotary, rotary_tables
from tests.unit.test_hf_generate import FEW_PATTERNS, PAD, pad, random_tokens, tiny_model

GREEDY = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# ---- packed documents ----------------------------------------------------------------------------------------------------------------


def packed_batch(how):
    """Two documents, of 5 and 7 tokens, in one row, as TRL and Transformers' collators mark them."""
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    return {
        "position_ids": {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]},
        "documents of one token": {"position_ids": torch.zeros(1, 12, dtype=torch.long)},
        "seq_idx": {"seq_idx": torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)},
        "cu_seq_lens": {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7},
        "mask": {"attention_mask": torch.tensor([[1] * 5 + [2] * 7])},
        "additive mask": {"attention_mask": torch.zeros(1, 12).index_fill(1, torch.arange(5), -1e9)},
    }[how]


@pytest.mark.parametrize("call", [lambda model: model, lambda model: model.model], ids=["with_logits", "base"])
@pytest.mark.parametrize("how", ["position_ids", "documents of one token", "seq_idx", "cu_seq_lens", "mask", "additive mask"])
def test_packed_documents_are_refused(how, call):
    model = tiny_model()
    with pytest.raises(ValueError, match="give each document a row of its own"):
        call(model)(random_tokens(1, 12), **packed_batch(how))
    with pytest.raises(ValueError, match="give each document a row of its own"), torch.enable_grad():
        call(model.train())(random_tokens(1, 12), **packed_batch(how))


def test_what_the_collator_for_packed_batches_makes_is_refused():
    collators = pytest.importorskip("transformers.data.data_collator")
    for marks in ({}, {"return_flash_attn_kwargs": True}, {"return_position_ids": False, "return_seq_idx": True}):
        collate = collators.DataCollatorWithFlattening(return_tensors="pt", **marks)
        batch = collate([{"input_ids": random_tokens(n).tolist()} for n in (4, 9, 3)])
        with pytest.raises(ValueError, match="packing=False"):
            tiny_model()(**batch)


@torch.no_grad()
def test_a_document_that_begins_in_a_later_piece_is_refused():
    model, tokens = tiny_model(), random_tokens(2, 20)
    cache = RatPlusCache()
    model(tokens[:, :11], position_ids=torch.arange(11)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="start again"):
        model(tokens[:, 11:], position_ids=torch.arange(9)[None], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 1], ids=["as Transformers 5", "as Transformers 4"])
def test_positions_of_padded_rows_are_accepted(side, filler):
    model, (ids, mask) = tiny_model("d4w2s1", torch.float64), pad([random_tokens(n) for n in (3, 14, 8)], side)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
    expected = model(ids, attention_mask=mask).logits
    for shift in (0, 100):
        actual = model(ids, attention_mask=mask, position_ids=positions + shift).logits
        torch.testing.assert_close(actual[mask == 1], expected[mask == 1], rtol=0, atol=1e-9)
    cache, cut = RatPlusCache(), 6
    model(ids[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut], past_key_values=cache)
    rest = model(ids[:, cut:], attention_mask=mask, position_ids=positions[:, cut:], past_key_values=cache).logits
    torch.testing.assert_close(rest[mask[:, cut:] == 1], expected[:, cut:][mask[:, cut:] == 1], rtol=0, atol=1e-9)


# ---- arguments and settings ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_unknown_arguments_are_refused():
    model, tokens = tiny_model(), random_tokens(1, 6)
    for name in ("atention_mask", "head_mask", "sliding_window", "num_items_in_batch"):
        with pytest.raises(ValueError, match=f"does not know {name}"):
            model.model(tokens, **{name: torch.tensor(3)})
    with pytest.raises(ValueError, match="model_input_names"):
        model(tokens, token_type_ids=torch.zeros_like(tokens))
    model(tokens, head_mask=None, return_dict=False)
    model.config._attn_implementation = "eager"  # only then does Transformers let the next line be
    model.config.output_attentions = True
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens)


def test_what_the_loss_takes_reaches_it():
    model, tokens = tiny_model(), random_tokens(2, 9)
    mean = model(tokens, labels=tokens).loss
    torch.testing.assert_close(model(tokens, labels=tokens, num_items_in_batch=torch.tensor(4)).loss, mean * 16 / 4)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(tokens, shift_labels=shifted).loss, mean)
    marked = tokens.masked_fill(tokens % 2 == 0, -1)
    assert model(tokens, labels=marked, ignore_index=-1).loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize("way", ["config", "generation_config", "given generation_config", "argument", "argument over generation_config"])
def test_a_pattern_takes_effect_wherever_it_is_set(way):
    model, ids = tiny_model("dense", torch.float64), random_tokens(2, 20)
    expected = tiny_model("d4w1", torch.float64).generate(ids, **GREEDY)
    assert not torch.equal(expected, model.generate(ids, **GREEDY))
    arguments = {}
    if way == "config":
        model.config.attention_pattern = "d4w1s0"
        assert model.config.attention_pattern == "d4w1", "not in its shortest form"
    elif way == "generation_config":
        model.generation_config.attention_pattern = "d4w1"
    elif way == "given generation_config":
        settings = GenerationConfig(attention_pattern="d4w1", pad_token_id=PAD, eos_token_id=model.generation_config.eos_token_id, **GREEDY)
        arguments["generation_config"] = settings
    else:
        arguments["attention_pattern"] = "d4w1"
        if way != "argument":
            model.generation_config.attention_pattern = "d8"
    for use_cache in (True, False):
        run = arguments if "generation_config" in arguments else GREEDY | arguments
        assert torch.equal(model.generate(ids, use_cache=use_cache, **run), expected)


def test_a_pattern_that_does_not_fit_is_refused_where_it_is_set():
    model = tiny_model("d4")
    with pytest.raises(ValueError, match="3 layers, but the model has 2"):
        model.config.attention_pattern = "[dense]*3"
    assert model.config.attention_pattern == "d4" == RatPlusConfig.from_dict(model.config.to_dict()).attention_pattern
    with pytest.raises(ValueError, match="unknown attention pattern"):
        model.generate(random_tokens(1, 4), attention_pattern="q4", max_new_tokens=2)
    with pytest.raises(AttributeError):
        model.model.attention_pattern = "d8"  # beside the config it would be lost when the model is saved


def test_generate_refuses_positions():
    model, ids = tiny_model(), random_tokens(1, 6)
    with pytest.raises(ValueError, match="give it no position_ids"):
        model.generate(ids, position_ids=torch.arange(6)[None], max_new_tokens=2)


@pytest.mark.parametrize("pattern", FEW_PATTERNS)
def test_generate_from_embeddings(pattern):
    model, (ids, mask) = tiny_model(pattern, torch.float64), pad([random_tokens(n) for n in (4, 13, 1)])
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    embeddings = model.get_input_embeddings()(ids).detach()
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY), expected)
    both = model.generate(ids, inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(both[:, -12:], expected)


# ---- lengths -------------------------------------------------------------------------------------------------------------------------


def test_too_long_an_answer_is_refused_before_any_work(monkeypatch):
    model, ids = tiny_model(max_position_embeddings=40), random_tokens(2, 30)
    calls = []
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: calls.append(1))
    embeddings = model.get_input_embeddings()(ids).detach()
    for prompt in ({"input_ids": ids}, {"inputs_embeds": embeddings}):
        for length in ({"max_new_tokens": 12}, {"max_new_tokens": 10**9}):
            with pytest.raises(ValueError, match=r"the model reads up to 40 \(max_position_embeddings\)"):
                model.generate(**prompt, **length)
    assert not calls


@torch.no_grad()
def test_padding_does_not_count_towards_the_limit():
    model, prompts = tiny_model("d4w2s1", torch.float64, max_position_embeddings=40), [random_tokens(n) for n in (20, 6)]
    ids, mask = pad([*prompts, random_tokens(45)])
    ids, mask = ids[:2], mask[:2]  # 45 columns, of which no row has more than 20 real ones
    run = {"do_sample": False, "min_new_tokens": 21, "max_new_tokens": 21}
    together = model.generate(ids, attention_mask=mask, **run)[:, 45:]
    alone = model.generate(prompts[0][None], **run)[0, 20:]
    assert torch.equal(together[0], alone)
    with pytest.raises(ValueError, match="make 42 tokens"):
        model.generate(ids, attention_mask=mask, max_new_tokens=22)
    model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="45 tokens are more"):
        model(ids)


def test_the_cache_has_room_for_the_answer_and_not_for_the_limit():
    model, ids = tiny_model("dense", max_position_embeddings=10**7), random_tokens(1, 10)
    for new in (4, 100):
        run = {"max_new_tokens": new, "min_new_tokens": new, "return_dict_in_generate": True}
        cache = model.generate(ids, **run).past_key_values
        keys_and_values = 2 * 2 * 2 * 8 * 4 * (10 + new - 1)  # layers, k and v, key heads, channels, fp32
        assert cache.nbytes == keys_and_values + 2 * 2 * 2 * 8 * 4


# ---- precision -----------------------------------------------------------------------------------------------------------------------


def decode(model, tokens, prefill, autocast):
    """Logits of tokens after a prefill of some; autocast says whether each of the two parts runs in bf16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast[0]):
        cache = model(tokens[:, :prefill], use_cache=True).past_key_values
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast[1]):
        logits = [model(token, past_key_values=cache).logits for token in tokens[:, prefill:].split(1, dim=1)]
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [(True, True), (True, False), (False, True)], ids=["all", "prefill", "decoding"])
@pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])
@pytest.mark.parametrize("pattern", ["dense", "d4w2s1", "{dense*2,d4,w2s1}", "d4k9", "d4k9+d"])  # with all blocks: no choice that flips
def test_decoding_under_autocast(pattern, variant, autocast):
    model, tokens = tiny_model(pattern, **variant), random_tokens(3, 30)
    expected = model(tokens).logits[:, 11:]
    assert relative_error(decode(model, tokens, 11, autocast), expected) < 0.03
    half = tiny_model(pattern, torch.bfloat16, **variant)(tokens).logits[:, 11:]
    assert relative_error(decode(model, tokens, 11, autocast), half) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w2s1", "d4k3"])
def test_generate_under_autocast(pattern):
    model, (ids, mask) = tiny_model(pattern), pad([random_tokens(n) for n in (4, 13, 1)])
    with torch.autocast("cpu", torch.bfloat16):
        for strategy in ({}, {"num_beams": 3}):
            assert model.generate(ids, attention_mask=mask, **GREEDY, **strategy).shape == (3, 25)


def test_rotary_turns_bf16_in_fp32_and_rounds_once():
    positions = torch.randint(0, 100_000, (2, 50))
    cos, sin = rotary_tables(positions, RatPlusConfig(hidden_size=128, num_attention_heads=2), torch.bfloat16)
    x = torch.randn(2, 4, 50, 64).bfloat16()
    assert cos.dtype == torch.float32
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x.float(), cos, sin).bfloat16())
    angle = positions[:, None, :, None].double() / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)
    low, high = x.double().chunk(2, dim=-1)
    exact = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)
    assert relative_error(apply_rotary(x, cos, sin), exact) < 3e-3
