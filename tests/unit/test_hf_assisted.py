"""Decoding with candidates that may be thrown away: prompt lookup, assistant models, and the notes with which a cache goes back."""

import copy

import pytest
import torch
from transformers import DynamicCache

from rat_megatron.hf import RatPlusCache
from rat_megatron.ratplus.cache_ratplus import CACHE_NAME
from rat_megatron.ratplus.head_cache_ratplus import HeadCache
from rat_megatron.ratplus.past_ratplus import LEAST
from tests.unit.test_hf_generate import PATTERNS, VOCAB, pad, random_tokens
from tests.unit.test_hf_generate import tiny_model as model_that_ends

torch.set_num_threads(1)  # at these sizes threads only wait for each other
MORE_PATTERNS = [*PATTERNS, "d64", "w0", "d4w30s3"]
VARIANTS = pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])


def tiny_model(*args, **kwargs):
    """A model that ends at its length only: assistants before Transformers 5 take no smallest one."""
    model = model_that_ends(*args, **kwargs)
    model.generation_config.eos_token_id = VOCAB
    return model


def check_equal(actual, expected):
    """Prompt lookup before Transformers 5 may write some tokens too many, with any model."""
    assert torch.equal(actual[:, : expected.shape[1]], expected)
    assert actual.shape == expected.shape or CACHE_NAME == "past_key_values"


def rounds_of(model, monkeypatch):
    """Lengths of the calls that a model gets from now on."""
    lengths, forward = [], model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda input_ids=None, **rest: lengths.append(input_ids.shape[1]) or forward(input_ids, **rest)
    )
    return lengths


@pytest.mark.parametrize("pattern", MORE_PATTERNS)
def test_prompt_lookup_gives_what_greedy_search_gives(pattern, monkeypatch):
    model = tiny_model(pattern, torch.float64)
    sentence = random_tokens(1, 9)
    ids = torch.cat([sentence, random_tokens(1, 5), sentence, sentence[:, :4]], dim=1)
    run = {"do_sample": False, "max_new_tokens": 40}
    expected = model.generate(ids, **run)
    calls = rounds_of(model, monkeypatch)
    check_equal(model.generate(ids, prompt_lookup_num_tokens=5, **run), expected)
    assert max(calls[1:]) > 1, "no candidates came after the first call, so this test sees nothing"


@VARIANTS
@pytest.mark.parametrize("pattern", MORE_PATTERNS)
def test_assistants_give_what_greedy_search_gives(pattern, variant, monkeypatch):
    model, ids = tiny_model(pattern, torch.float64, **variant), random_tokens(1, 21)
    run = {"do_sample": False, "max_new_tokens": 40, "no_repeat_ngram_size": 3}
    expected = model.generate(ids, **run)
    assert len(expected[:, 21:].unique()) > 3, "the model only repeats itself, so this test sees nothing"
    close = tiny_model(pattern, torch.float64, **variant)  # agrees sometimes: all of a round, some, or none is thrown away
    for parameter in close.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    for assistant in (close, tiny_model("d4w2s1", torch.float64, num_hidden_layers=1)):
        calls = rounds_of(model, monkeypatch)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **run), expected)
        assert max(calls[1:]) > 1
        monkeypatch.undo()


@pytest.mark.parametrize("pattern", ["dense", "d16w8s4", "{dense*2,d4,w2s1}", "d4k3"])
def test_many_candidates_after_a_short_or_padded_prompt(pattern, monkeypatch):
    """More than are noted of any prompt."""
    model, assistant = tiny_model(pattern, torch.float64), tiny_model("d4", torch.float64, num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 2 * LEAST
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids, mask = pad([random_tokens(1), random_tokens(13)])
    run = {"do_sample": False, "max_new_tokens": 90}
    for row in (0, 1):
        prompt = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        expected = model.generate(**prompt, **run)
        calls = rounds_of(model, monkeypatch)
        assert torch.equal(model.generate(**prompt, assistant_model=assistant, **run), expected)
        assert calls[0] == 13 + 2 * LEAST
        monkeypatch.undo()


def test_prompt_lookup_with_a_pattern_of_the_call_and_a_cache_that_goes_on():
    model, sentence = tiny_model("dense", torch.float64), random_tokens(1, 9)
    ids = torch.cat([sentence, sentence, sentence[:, :4]], dim=1)
    run = {"do_sample": False, "max_new_tokens": 12, "attention_pattern": "d4w3s1"}
    first = model.generate(ids, prompt_lookup_num_tokens=4, return_dict_in_generate=True, **run)
    check_equal(first.sequences, model.generate(ids, **run))
    cache = getattr(first, CACHE_NAME)
    longer = torch.cat([first.sequences, sentence], dim=1)
    expected = model.generate(longer, **run)

    def go_on(**candidates):
        return model.generate(longer, **{CACHE_NAME: copy.deepcopy(cache)}, **candidates, **run)

    assert torch.equal(go_on(), expected)
    if CACHE_NAME == "past_key_values":
        check_equal(go_on(prompt_lookup_num_tokens=4), expected)
    else:
        with pytest.raises(ValueError, match="leave out the cache"):
            go_on(prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("way", ["argument", "generation_config"])
def test_a_pattern_of_the_call_is_not_the_assistants(way, monkeypatch):
    """Which may have other layers, and a pattern of its own."""
    model, ids = tiny_model("dense", torch.float64), random_tokens(1, 20)
    assistant = tiny_model("d4", torch.float64, num_hidden_layers=1)
    run = {"do_sample": False, "max_new_tokens": 20}
    plain = model.generate(ids, **run)
    if way == "argument":
        run["attention_pattern"] = "[dense,d4w2]"
    else:
        model.generation_config.attention_pattern = "[dense,d4w2]"
    expected = model.generate(ids, **run)
    assert not torch.equal(expected, plain)
    patterns, forward = set(), assistant.model.forward
    monkeypatch.setattr(assistant.model, "forward", lambda *args, **rest: patterns.add(rest["attention_pattern"]) or forward(*args, **rest))
    assert torch.equal(model.generate(ids, assistant_model=assistant, **run), expected)
    assert patterns == {None}


def test_candidates_may_reach_past_the_last_position():
    model, sentence = tiny_model("d4w2s1", torch.float64, max_position_embeddings=40), random_tokens(1, 9)
    ids = torch.cat([sentence, sentence, sentence[:, :4]], dim=1)
    run = {"do_sample": False, "max_new_tokens": 19}
    check_equal(model.generate(ids, prompt_lookup_num_tokens=10, **run), model.generate(ids, **run))
    with pytest.raises(ValueError, match="make 42 tokens"):
        model.generate(ids, prompt_lookup_num_tokens=10, do_sample=False, max_new_tokens=20)
    cache = RatPlusCache()
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="41 tokens are more"):
        model(random_tokens(1, 41), past_key_values=cache)


@torch.no_grad()
@VARIANTS
@pytest.mark.parametrize("pattern", MORE_PATTERNS)
def test_a_cache_that_keeps_its_past_goes_back_to_any_length(pattern, variant):
    """After a padded prompt and pieces of all sizes, by any number of columns: exactly the cache of the shorter sequence."""
    model, (ids, mask) = tiny_model(pattern, torch.float64, **variant), pad([random_tokens(n) for n in (3, 20, 11)])
    cache, more = RatPlusCache(), random_tokens(3, 38)
    cache.activate_past_recording()
    model(ids, attention_mask=mask, past_key_values=cache)
    everything, full = torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)
    for start, end in ((20, 27), (27, 28), (28, 44), (44, 45), (45, 46)):
        model(everything[:, start:end], attention_mask=full[:, :end], past_key_values=cache)
    rest = everything[:, 46:]
    for back in (0, 1, 2, 3, 7, 18, 19, 30):
        shorter, kept = copy.deepcopy(cache), 46 - back
        shorter.crop(kept)
        assert shorter.get_seq_length() == kept
        sequence, its_mask = torch.cat([everything[:, :kept], rest], dim=1), torch.cat([full[:, :kept], torch.ones_like(rest)], dim=1)
        expected = model(sequence, attention_mask=its_mask).logits[:, kept:]
        logits = [model(rest[:, :5], attention_mask=its_mask[:, : kept + 5], past_key_values=shorter).logits]
        shorter.crop(kept + 3)  # and once more, within the piece that followed
        logits = [logits[0][:, :3]]
        for t in range(3, rest.shape[1]):
            logits.append(model(rest[:, t : t + 1], attention_mask=its_mask[:, : kept + t + 1], past_key_values=shorter).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["d4w2s1", "d4k3"])
def test_notes_of_bf16_are_exact(pattern):
    """Rows come back bit by bit, state and all, where a crop without notes has the state from rounded entries."""
    model, tokens = tiny_model(pattern, torch.bfloat16), random_tokens(2, 40)
    cache, short = RatPlusCache(64), RatPlusCache(64)
    cache.activate_past_recording()
    for each in (cache, short):
        model(tokens[:, :21], past_key_values=each)
    model(tokens[:, 21:33], past_key_values=cache)
    cache.crop(21)
    for mine, expected in zip(cache.layers, short.layers, strict=True):
        for name in mine.heads[0].tensors:
            a, b = getattr(mine.heads[0], name), getattr(expected.heads[0], name)
            if name == "blocks":
                a, b = a[:, :, :, :-1], b[:, :, :, :-1]  # the last takes padding
            if name in "kv":
                a, b = (x[:, :, mine.heads[0].head.slot_positions(x.shape[2], cache.lengths)[0] >= 0] for x in (a, b))
            assert torch.equal(a, b), name


@torch.no_grad()
def test_notes_are_as_small_as_the_candidates():
    model = tiny_model("d16w8s4", torch.float32)
    plain, cache = RatPlusCache(5000), RatPlusCache(5000)
    cache.activate_past_recording()
    for each in (plain, cache):
        each_of = model.model(random_tokens(1, 3000), past_key_values=each)[1]
        assert each_of is each
    one = 2 * 2 * 8 * 4 * 2  # a token's state, k and v, and its entry in the ring: two layers, two key heads, eight channels, fp32
    assert 0 < cache.nbytes - plain.nbytes <= 2 * one * LEAST + 100
    for _ in range(4):
        model(random_tokens(1, 7), past_key_values=cache)
        cache.crop(-5)
    cache.crop(cache.columns)
    assert cache.nbytes - plain.nbytes <= 2 * one * LEAST + 100
    copy_of = copy.deepcopy(cache)
    cache.record_past(False)
    for each in (cache, copy_of):
        model(random_tokens(1, 1), past_key_values=each)
    assert cache.nbytes == plain.nbytes < copy_of.nbytes
    with pytest.raises(ValueError, match="window has moved|recurrent state"):
        cache.crop(-3)
    copy_of.crop(-3)


@torch.no_grad()
def test_rows_with_notes_move_together():
    model, tokens, following = tiny_model("d4w2", torch.float64), random_tokens(3, 11), random_tokens(3, 1)
    cache = RatPlusCache()
    cache.activate_past_recording()
    model(tokens, past_key_values=cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    cache.crop(-4)
    expected = model(torch.cat([tokens[order, :7], following], dim=1)).logits[:, 7:]
    torch.testing.assert_close(model(following, past_key_values=cache).logits, expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("notes", [True, False])
@pytest.mark.parametrize("pattern", ["dense", "d4w5", "d4k3"])
def test_a_crop_leaves_autocast(pattern, notes, monkeypatch):
    """What it computes is the same on a CPU, where autocast changes matrix products only: so where it computes is looked at, too."""
    model, tokens, crop, inside = tiny_model(pattern), random_tokens(2, 17), HeadCache.crop, []
    monkeypatch.setattr(HeadCache, "crop", lambda *given: inside.append(torch.is_autocast_enabled("cpu")) or crop(*given))
    caches = [RatPlusCache() for _ in range(2)]
    for autocast, cache in zip((False, True), caches, strict=True):
        if notes:
            cache.activate_past_recording()
        model(tokens, past_key_values=cache)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cache.crop(16)
    assert inside == [False] * 4
    for exact, cropped in zip(*(cache.layers for cache in caches), strict=True):
        for name in exact.heads[0].tensors:
            assert torch.equal(getattr(exact.heads[0], name), getattr(cropped.heads[0], name)), name


@torch.no_grad()
def test_padding_that_a_later_call_does_not_repeat_is_remembered():
    model, (ids, mask), more = tiny_model("dense", torch.float64), pad([random_tokens(n) for n in (3, 9)]), random_tokens(2, 2)
    cache = RatPlusCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    model(more, past_key_values=cache)
    cache.crop(4)  # of the first row that is padding alone
    assert cache.lengths.tolist() == [0, 4]
    logits = model(more, past_key_values=cache).logits
    torch.testing.assert_close(logits[0], model(more[:1]).logits[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_crop_by_zero_is_what_it_is_to_the_installed_transformers():
    model, tokens, other = tiny_model("d4w2s1"), random_tokens(1, 9), DynamicCache()
    cache = RatPlusCache()
    model(tokens, past_key_values=cache)
    other.update(torch.ones(1, 1, 9, 2), torch.ones(1, 1, 9, 2), 0)
    for each in (cache, other):
        each.crop(0)
    assert cache.get_seq_length() == other.get_seq_length()
