"""SnapKV: what a cache keeps of a prompt, against the method written out, however the prompt and what follows come."""

import copy
import math
import re

import pytest
import torch
from transformers import GenerationConfig

from rat_megatron.hf import RatPlusCache
from rat_megatron.ratplus.cache_ratplus import CACHE_NAME
from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.pattern import AttentionPattern, HeadPattern
from rat_megatron.ratplus.snapkv_ratplus import SnapCache, choose_prompt_keys
from tests import reference
from tests.unit.test_hf_attentions import attention_inside
from tests.unit.test_hf_generate import pad, random_tokens, tiny_model

torch.set_num_threads(1)  # at these sizes threads only wait for each other
WORDS = ["snap12w4", "[d4w2,snap9w1]", "[d3k3means,{dense*2,snap10w2,snap16w5}]"]
VARIANTS = pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def kept_by_definition(q, k, head: HeadPattern) -> set[int]:
    """Of one key head, k [t, hn], and the query heads that share it, q [heads, t, hn], after RoPE."""
    length, earlier = len(k), len(k) - head.observed
    if length <= head.budget:
        return set(range(length))
    weight = [0.0] * earlier
    for queries in q:
        for t in range(earlier, length):
            shares = (queries[t] @ k[: t + 1].T / math.sqrt(k.shape[1])).softmax(0).tolist()
            for j in range(earlier):
                weight[j] += shares[j] / len(q)
    pooled = [max(weight[max(0, j - 3) : j + 4]) for j in range(earlier)]
    best = sorted(range(earlier), key=lambda j: (-pooled[j], j))[: head.budget - head.observed]
    return {*best, *range(earlier, length)}


def expected_logits(model, prompt, rest):
    """Logits of the rest by definition: the prompt's tokens see all before them, later ones what is kept and each other."""
    pattern, kept = model.model.attention_pattern, {}
    for layer, (q, k, _, f, _) in enumerate(attention_inside_of(model, prompt[None])):
        k = reference.rotary(k if f is None else reference.recurrence(k, f))[0]
        q, heads = reference.rotary(q)[0], pattern.layer(layer).heads * (4 if len(pattern.layer(layer).heads) == 1 else 1)
        for head in range(4):
            alike = [other for other in range(head // 2 * 2, head // 2 * 2 + 2) if heads[other] == heads[head]]
            if heads[head].budget:
                kept[layer, head] = kept_by_definition(q[:, alike].transpose(0, 1), k[:, head // 2], heads[head])

    def visible(layer, head, t, j):
        heads = pattern.layer(layer).heads
        one = heads[head % len(heads)]
        if one.budget:
            return j <= t and (t < len(prompt) or j >= len(prompt) or j in kept[layer, head])
        return reference.sees(t, j, one.dilation, one.window, one.sinks)

    return reference.model(model.state_dict(), torch.cat([prompt, rest])[None], 4, 2, visible)[0, len(prompt) :]


def attention_inside_of(model, tokens):
    model.set_attn_implementation("eager")
    inside = attention_inside(model, tokens)[1]
    model.set_attn_implementation("sdpa")
    return inside


def logits_after(model, cache, mask, rest, pieces):
    logits, start = [], 0
    for count in pieces:
        mask = torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)
        logits.append(model(rest[:, start : start + count], attention_mask=mask, past_key_values=cache).logits)
        start += count
    return torch.cat(logits, dim=1)


# ---- the definition ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@VARIANTS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("word", [WORDS[0], WORDS[1], "{dense*2,snap10w2,snap16w5}"])
def test_what_follows_a_prompt_sees_what_the_definition_keeps(word, side, variant):
    """Rows longer and shorter than the budget, tokens one by one and several at once."""
    model, prompts, rest = tiny_model(word, torch.float64, **variant), [random_tokens(n) for n in (3, 30, 12, 17)], random_tokens(4, 9)
    ids, mask = pad(prompts, side)
    out = model(ids, attention_mask=mask, use_cache=True)
    dense = model(ids, attention_mask=mask, attention_pattern=re.sub(r"snap\d+w\d+", "dense", word), use_cache=False).logits
    torch.testing.assert_close(out.logits[mask == 1], dense[mask == 1], rtol=0, atol=1e-10)
    cache = getattr(out, CACHE_NAME)
    logits = logits_after(model, copy.deepcopy(cache), mask, rest, [1] * 9)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[row], expected_logits(model, prompt, rest[row]), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits_after(model, cache, mask, rest, [1, 4, 1, 3]), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_choice_is_that_of_the_definition(groups):
    """Of rows of several lengths, in keys that lie in no order of weight; plateaus of pooled weights are cut at their first key."""
    head, lengths = HeadPattern.parse("snap14w3"), torch.tensor([40, 15, 14, 2, 33])
    q, k = torch.randn(5, 4, 40, 8, dtype=torch.float64), torch.randn(5, groups, 40, 8, dtype=torch.float64)
    last = torch.stack([row[:, max(0, n - 3) : max(3, n)] for row, n in zip(q, lengths.tolist(), strict=True)])
    chosen = choose_prompt_keys(last, 3 * k, lengths, head)
    assert chosen.shape == (5, groups, 14) and (chosen.diff(dim=-1) > 0).all()
    for row, n in enumerate(lengths.tolist()):
        for group in range(groups):
            queries = q[row].unflatten(0, (groups, -1))[group, :, :n]
            kept = kept_by_definition(queries, 3 * k[row, group, :n], head) if n > 14 else set(range(14))
            assert set(chosen[row, group].tolist()) == kept


# ---- how prompts come ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("word", WORDS)
def test_a_prompt_in_pieces_is_that_in_one(word, side):
    model, rest = tiny_model(word, torch.float64), random_tokens(3, 7)
    ids, mask = pad([random_tokens(n) for n in (5, 29, 18)], side)
    whole = getattr(model(ids, attention_mask=mask, use_cache=True), CACHE_NAME)
    expected = logits_after(model, whole, mask, rest, [1] * 7)
    for pieces in ([7, 12, 1, 9], [28, 1], [1] * 29):
        cache, start = RatPlusCache(prompt_length=29), 0
        for count in pieces:
            model(ids[:, start : start + count], attention_mask=mask[:, : start + count], past_key_values=cache)
            start += count
        torch.testing.assert_close(logits_after(model, cache, mask, rest, [1] * 7), expected, rtol=0, atol=1e-10)
        assert torch.equal(cache.layers[1].heads[-1].kept, whole.layers[1].heads[-1].kept)
    cache = RatPlusCache(prompt_length=29)
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    with pytest.raises(ValueError, match="29 columns end within this call, which goes on to column 36"):
        model(torch.cat([ids[:, 20:], rest], dim=1), past_key_values=cache)
    cache.reset()
    model(ids, attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(logits_after(model, cache, mask, rest, [1] * 7), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("word", WORDS)
def test_generate_with_ragged_batches_and_chunks(word):
    model, prompts = tiny_model(word, torch.float64), [random_tokens(n) for n in (4, 41, 19)]
    ids, mask = pad(prompts)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    assert not torch.equal(together, model.generate(ids, attention_mask=mask, attention_pattern="dense", **GREEDY))
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **GREEDY)
        assert torch.equal(alone[0, len(prompt) :], together[row, 41:])
    for size in (1, 8, 64):
        assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **GREEDY), together)
    config = GenerationConfig(pad_token_id=0, attention_pattern=word, **GREEDY)
    model.set_attention_pattern("dense")
    assert torch.equal(model.generate(ids, attention_mask=mask, generation_config=config), together)


def test_generate_goes_on_from_a_cache_that_has_chosen():
    """The next turn of a conversation: nothing more is dropped."""
    model, ids = tiny_model("snap12w4", torch.float64), random_tokens(1, 30)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    cache = getattr(first, CACHE_NAME)
    longer = torch.cat([first.sequences, random_tokens(1, 25)], dim=1)
    kept = cache.layers[0].heads[0].kept
    mask = torch.ones_like(longer)  # what was generated may hold the id of padding
    second = model.generate(longer, attention_mask=mask, **{CACHE_NAME: cache}, **GREEDY)
    assert cache.layers[0].heads[0].kept is kept and cache.get_seq_length() == second.shape[1] - 1
    read = RatPlusCache()
    model(ids, **{CACHE_NAME: read})
    logits = [model(part, **{CACHE_NAME: read}).logits for part in second[:, 30:-1].split(1, dim=1)]
    assert torch.equal(torch.cat(logits, dim=1)[:, -12:].argmax(-1), second[:, -12:])


def test_beams_are_those_of_each_prompt_and_rows_move_together():
    model, prompts = tiny_model("[snap9w2,{dense*2,snap12w4*2}]", torch.float64), [random_tokens(n) for n in (11, 28)]
    ids, mask = pad(prompts)
    run = {"do_sample": False, "max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(ids, attention_mask=mask, **run)[:, 28:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **run)[:, len(prompt) :]
        assert torch.equal(alone, together[2 * row : 2 * row + 2, : alone.shape[1]])
    with torch.no_grad():
        following, order = random_tokens(2, 1), torch.tensor([1, 0, 0])
        cache = getattr(model(ids, attention_mask=mask, use_cache=True), CACHE_NAME)
        expected = model(following, past_key_values=copy.deepcopy(cache)).logits[order]
        cache.reorder_cache(order)
        torch.testing.assert_close(model(following[order], past_key_values=cache).logits, expected, rtol=0, atol=1e-10)


# ---- the cache -----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_of_up_to_the_budget_is_dense():
    model, ids, rest = tiny_model("snap30w4", torch.float64), random_tokens(2, 30), random_tokens(2, 9)
    cache = getattr(model(ids, use_cache=True), CACHE_NAME)
    assert type(cache.layers[0].heads[0]) is HeadCache
    logits = [model(token, past_key_values=cache).logits for token in rest.split(1, dim=1)]
    full = model(torch.cat([ids, rest], dim=1), attention_pattern="dense").logits[:, 30:]
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=0, atol=1e-10)


def test_the_cache_holds_the_budget_and_what_is_generated():
    model = tiny_model("[snap64w8,dense]", num_key_value_heads=4)
    out = model.generate(random_tokens(3, 200), return_dict_in_generate=True, **(GREEDY | {"max_new_tokens": 30, "min_new_tokens": 30}))
    cache = getattr(out, CACHE_NAME)
    snap, dense = (layer.heads[0] for layer in cache.layers)
    assert isinstance(snap, SnapCache) and snap.k.shape[2] == 64 + 29 and dense.k.shape[2] == 229
    assert snap.k.untyped_storage().nbytes() == snap.k.nbytes  # nothing of the prompt stays behind it
    notes = snap.kept.nbytes + snap.dropped.nbytes
    assert cache.nbytes == 3 * 8 * 4 * (2 * 4 * (64 + 29 + 229) + 2 * 4 * 2) + notes and notes < snap.k.nbytes / 8
    assert AttentionPattern.parse("[snap64w8,dense]").cache_entries(200, 2, 4) == 4 * (64 + 200)


@torch.no_grad()
@VARIANTS
@pytest.mark.parametrize("notes", [True, False])
def test_a_cache_is_cropped_to_any_length_from_the_prompt_on(notes, variant):
    model, rest = tiny_model("[snap12w4,{dense*2,snap10w3*2}]", torch.float64, **variant), random_tokens(3, 12)
    ids, mask = pad([random_tokens(n) for n in (5, 29, 18)])
    cache = RatPlusCache()
    if notes:
        cache.activate_past_recording()
    model(ids, attention_mask=mask, past_key_values=cache)
    fresh = copy.deepcopy(cache)
    expected = logits_after(model, copy.deepcopy(cache), mask, rest, [1] * 12)
    logits_after(model, cache, mask, random_tokens(3, 3), [3])
    cache.crop(29)
    torch.testing.assert_close(logits_after(model, cache, mask, rest, [5, 1, 3, 3]), expected, rtol=0, atol=1e-9)
    cache.crop(33)
    longer = torch.cat([mask, mask.new_ones(3, 4)], dim=1)
    torch.testing.assert_close(logits_after(model, cache, longer, rest[:, 4:], [1] * 8), expected[:, 4:], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="crop to its 29 columns or more"):
        fresh.crop(-1)
    torch.testing.assert_close(logits_after(model, fresh, mask, rest, [12]), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_are_zero_where_nothing_is_kept(side):
    model, rest = tiny_model("[snap12w4,{dense*2,snap10w3*2}]", torch.float64), random_tokens(3, 6)
    model.set_attn_implementation("eager")
    ids, mask = pad([random_tokens(n) for n in (5, 29, 18)], side)
    eager, fused = (getattr(model(ids, attention_mask=mask, use_cache=True), CACHE_NAME) for _ in range(2))
    for start, end in ((0, 1), (1, 4), (4, 6)):
        mask = torch.cat([mask, mask.new_ones(3, end - start)], dim=1)
        run = {"attention_mask": mask}
        out = model(rest[:, start:end], past_key_values=eager, output_attentions=True, **run)
        plain = model(rest[:, start:end], past_key_values=fused, **run)
        torch.testing.assert_close(out.logits, plain.logits, rtol=0, atol=1e-10)
        weights = out.attentions[0]
        assert weights.shape == (3, 4, end - start, 29 + end)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, end - start).double())
        seen = (weights[:, :, -1] > 0).sum(-1)
        assert seen.tolist() == [[n + end] * 4 for n in (5, 12, 12)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model, ids = tiny_model("snap12w4", dtype), random_tokens(2, 30)
    assert model.generate(ids, **GREEDY).shape == (2, 42)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_model("snap12w4").generate(ids, **GREEDY).shape == (2, 42)


# ---- refused -------------------------------------------------------------------------------------------------------------------------


def test_where_it_makes_no_sense_it_is_refused():
    model, ids = tiny_model("[dense,snap9w2]"), random_tokens(1, 20)
    with pytest.raises(ValueError, match="use_cache=True"):
        model.generate(ids, use_cache=False, **GREEDY)
    with pytest.raises(ValueError, match="candidates"):
        model.generate(ids, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=12)
    assistant = tiny_model("dense", num_hidden_layers=1)
    with pytest.raises(ValueError, match="candidates"):
        model.generate(ids, assistant_model=assistant, do_sample=False, max_new_tokens=12)
    assistant.set_attention_pattern("snap9w2")
    with pytest.raises(ValueError, match="for the assistant too"):
        tiny_model("dense").generate(ids, assistant_model=assistant, do_sample=False, max_new_tokens=12)
    with pytest.raises(ValueError, match="train under another"):
        model.train()(ids, labels=ids)
    model.eval()(ids, labels=ids)
    assert torch.equal(model(ids).logits, model(ids, attention_pattern="dense").logits)
