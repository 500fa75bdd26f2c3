"""Generation with the Hugging Face model: whatever goes through the cache must equal one full forward pass."""

import pytest
import torch

from rat_megatron.hf import RatPlusCache, RatPlusConfig, RatPlusForCausalLM

torch.set_num_threads(1)  # at these sizes threads only wait for each other
VOCAB, PAD, EOS = 61, 0, 60
PATTERNS = ["dense", "d16", "d16w8s4", "w8s2", "[dense,d4w2]", "{dense*2,d4,w2s1}", "d4k3", "d4k4+d", "[d4k3,{dense,d4k3+d,w2,d4}]"]
FEW_PATTERNS = ["dense", "d4w2s1", "{dense*2,d4,w2s1}", "d4k3"]


def tiny_model(pattern="dense", dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = RatPlusForCausalLM(RatPlusConfig(**{**sizes, "attention_pattern": pattern, **overrides}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.to(dtype).eval()


def random_tokens(*shape):
    return torch.randint(1, VOCAB - 1, shape)  # neither padding nor end of text


def pad(sequences, side="left"):
    """[b, t] ids and mask of sequences of unequal length."""
    longest = max(len(s) for s in sequences)
    filler = [torch.full((longest - len(s),), PAD) for s in sequences]
    ids = torch.stack([torch.cat([f, s] if side == "left" else [s, f]) for f, s in zip(filler, sequences, strict=True)])
    return ids, (ids != PAD).long()


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_equals_the_full_forward(pattern, variant):
    model, tokens = tiny_model(pattern, **variant), random_tokens(2, 41)
    full = model(tokens).logits
    for prefill in (1, 16, 23):
        out = model(tokens[:, :prefill], use_cache=True)
        logits, cache = [out.logits], out.past_key_values
        for t in range(prefill, 41):
            logits.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
        assert cache.get_seq_length() == 41
        torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prompt_may_come_in_pieces(pattern):
    model, tokens = tiny_model(pattern), random_tokens(2, 30)
    cache, logits = RatPlusCache(), []
    for piece in tokens.split([7, 12, 1, 10], dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing(pattern, variant, side):
    model, sequences = tiny_model(pattern, **variant), [random_tokens(n) for n in (1, 19, 33, 6)]
    ids, mask = pad(sequences, side)
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(logits[row][mask[row] == 1], model(sequence[None]).logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_after_padding(pattern, side):
    model, prompts, rest = tiny_model(pattern), [random_tokens(n) for n in (3, 20, 11)], random_tokens(3, 9)
    ids, mask = pad(prompts, side)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    logits = []
    for t in range(rest.shape[1]):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        logits.append(model(rest[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    for row, prompt in enumerate(prompts):
        full = model(torch.cat([prompt, rest[row]])[None]).logits[0, len(prompt) :]
        torch.testing.assert_close(torch.cat(logits, dim=1)[row], full, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "strategy", [{"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}], ids=["greedy", "beams"]
)
@pytest.mark.parametrize("pattern", FEW_PATTERNS)
def test_generate_equals_generate_without_cache(pattern, strategy):
    model, (ids, mask) = tiny_model(pattern, torch.float64), pad([random_tokens(n) for n in (4, 13, 1)])
    run = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, **strategy}
    with_cache = model.generate(ids, **run)
    assert with_cache.shape[0] == 3 * strategy.get("num_return_sequences", 1)
    assert len(with_cache[:, ids.shape[1] :].unique()) > 3, "the model only repeats itself, so this test sees nothing"
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **run))


@pytest.mark.parametrize("pattern", FEW_PATTERNS)
def test_a_ragged_batch_generates_what_each_prompt_does_alone(pattern):
    model, prompts = tiny_model(pattern, torch.float64), [random_tokens(n) for n in (4, 13, 1)]
    ids, mask = pad(prompts)
    run = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **run)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **run)
        assert torch.equal(alone[0, len(prompt) :], together[row])


def test_sampling_is_the_same_with_and_without_cache():
    model, ids = tiny_model("d4w2s1", torch.float64), random_tokens(2, 6)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        samples.append(model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=10, use_cache=use_cache))
    assert torch.equal(*samples)
    assert len({tuple(row.tolist()) for row in samples[0]}) > 2


def test_generate_goes_on_from_a_cache():
    model, ids = tiny_model("d4w2s1", torch.float64), random_tokens(1, 6)
    run = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "return_dict_in_generate": True}
    first = model.generate(ids, **run)
    assert isinstance(first.past_key_values, RatPlusCache)
    longer = torch.cat([first.sequences, random_tokens(1, 3)], dim=1)
    expected = model.generate(longer, **run).sequences
    assert torch.equal(model.generate(longer, past_key_values=first.past_key_values, **run).sequences, expected)


@torch.no_grad()
def test_the_pattern_may_change_while_decoding():
    model, tokens = tiny_model("dense"), random_tokens(1, 20)
    cache = RatPlusCache()
    model(tokens[:, :19], past_key_values=cache)
    dense_cache = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    model.set_attention_pattern("d4")
    sparse = model(tokens[:, 19:], past_key_values=cache).logits
    assert all(torch.equal(layer.keys[:, :, :19], keys) for layer, (keys, _) in zip(cache.layers, dense_cache, strict=True))
    assert (sparse - model(tokens).logits[:, 19:]).abs().max() > 1e-4  # layer 1 was filled under dense attention


@torch.no_grad()
def test_cache_rows_move_together():
    model, tokens, following = tiny_model("d4w2"), random_tokens(3, 11), random_tokens(3, 1)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0

    def logits(rows, change):
        cache = RatPlusCache()
        model(tokens, attention_mask=mask, past_key_values=cache)
        change(cache)
        return model(following[rows], past_key_values=cache).logits

    expected = logits([0, 1, 2], lambda cache: None)
    order, twice = torch.tensor([2, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    for rows, change in (
        (order, lambda cache: cache.reorder_cache(order)),
        (order, lambda cache: cache.batch_select_indices(order)),
        (twice, lambda cache: cache.batch_repeat_interleave(2)),
    ):
        torch.testing.assert_close(logits(rows, change), expected[rows], rtol=0, atol=1e-5)


@torch.no_grad()
def test_reset_and_crop():
    model, tokens = tiny_model("d4w2"), random_tokens(2, 9)
    cache = RatPlusCache()
    assert cache.get_seq_length() == 0
    fresh = model(tokens, past_key_values=cache).logits
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens, past_key_values=cache).logits, fresh)


def test_generate_refuses_what_cannot_be_right():
    model, ids = tiny_model(), random_tokens(1, 5)
    with pytest.raises(ValueError, match="cache_implementation 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2)
