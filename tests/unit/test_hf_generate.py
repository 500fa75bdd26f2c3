"""Generation with the Hugging Face model: whatever goes through the cache must equal one full forward pass."""

import copy

import pytest
import torch
from transformers import AutoTokenizer

from rat_megatron.hf import RatPlusCache, RatPlusConfig, RatPlusForCausalLM
from tests.helpers import prepare_tiny_data

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
@pytest.mark.parametrize("call", [lambda model: model, lambda model: model.model], ids=["with_logits", "base"])
def test_a_cache_goes_by_either_name_that_transformers_has_for_it(call):
    model, tokens = tiny_model("d4w2s1", torch.float64), random_tokens(2, 12)
    cache = RatPlusCache()
    call(model)(tokens[:, :9], cache=cache)
    outputs = [call(model)(tokens[:, 9:], **{name: copy.deepcopy(cache)})[0] for name in ("past_key_values", "cache")]
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], call(model)(tokens)[0][:, 9:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_layers_may_lie_where_a_device_map_says(tmp_path):
    """One of them on the disk: accelerate's hooks, which a second GPU would have too, move all that a layer is given, but not the cache."""
    pytest.importorskip("accelerate")
    model, ids = tiny_model("d4w2s1"), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread = RatPlusForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta and not spread.model.layers[0].mlp.up_proj.weight.is_meta
    run = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    assert torch.equal(spread.generate(ids, attention_mask=mask, **run), model.generate(ids, attention_mask=mask, **run))


@torch.no_grad()
def test_every_call_may_have_a_pattern_of_its_own():
    model, ids = tiny_model("dense", torch.float64), random_tokens(2, 20)
    run = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}
    sparse = model.generate(ids, attention_pattern="d4w1", **run)
    assert model.config.attention_pattern == "dense" and not torch.equal(sparse, model.generate(ids, **run))
    cache = RatPlusCache()
    model(ids, past_key_values=cache, attention_pattern="d4w1")
    with pytest.raises(ValueError, match="'d4w1' needs, but this call attends under 'dense'"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="2 rows, but the batch has 1"):
        model(ids[:1], past_key_values=cache, attention_pattern="d4w1")
    model.set_attention_pattern("d4w1")
    assert torch.equal(sparse, model.generate(ids, **run))


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
@pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])
@pytest.mark.parametrize(
    ("pattern", "back_to"),
    [
        ("dense", 12),
        ("d4", 12),
        ("d4", 0),
        ("d64", 0),
        ("w0", 0),
        ("d4w5", 16),
        ("d4s5", 5),
        ("d4w2", 16),
        ("w30", 9),
        ("{dense*2,d4*2}", 12),
        ("d4k3", 9),
        ("d4k4+d", 9),
    ],
)
def test_a_cropped_cache_is_that_of_the_shorter_sequence(pattern, back_to, variant):
    model, tokens, rest = tiny_model(pattern, torch.float64, **variant), random_tokens(3, 17), random_tokens(3, 9)
    mask = torch.ones(3, 17, dtype=torch.long)
    if not back_to % 4:
        mask[1, :4] = 0  # a padded row, still at a multiple of four
    cache = RatPlusCache()
    model(tokens, attention_mask=mask, past_key_values=cache)
    cache.crop(back_to if back_to % 2 else back_to - 17)
    assert cache.get_seq_length() == back_to
    mask = torch.cat([mask[:, :back_to], mask.new_ones(rest.shape)], dim=1)
    expected = model(torch.cat([tokens[:, :back_to], rest], dim=1), attention_mask=mask).logits[:, back_to:]
    logits = [model(rest[:, :5], attention_mask=mask[:, : back_to + 5], past_key_values=cache).logits]
    for t in range(5, 9):
        logits.append(model(rest[:, t : t + 1], attention_mask=mask[:, : back_to + t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pattern", "back_to", "why"), [("d4w2", 12, "window has moved"), ("d4", 10, "multiple of 4"), ("d4", -3, "recurrent")]
)
def test_a_crop_that_cannot_be_leaves_the_cache_alone(pattern, back_to, why):
    model, tokens = tiny_model(pattern), random_tokens(2, 17)
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match=why):
        cache.crop(back_to)
    logits = model(tokens[:, :1], attention_mask=torch.ones(2, 18), past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(logits, model(torch.cat([tokens, tokens[:, :1]], dim=1)).logits[:, 17:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_reset_cache_is_as_new():
    model, tokens = tiny_model("d4w2"), random_tokens(2, 9)
    cache = RatPlusCache()
    assert cache.get_seq_length() == cache.nbytes == 0
    fresh = model(tokens, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(model(tokens, past_key_values=cache).logits, fresh)


@pytest.mark.parametrize(
    ("pattern", "entries"),
    [
        ("dense", 2 * 4 * 96),
        ("d16", 2 * 4 * 6),
        ("d16w8s4", 2 * 4 * (4 + 9 + 6)),
        ("w8s2", 2 * 4 * (2 + 9)),
        ("[dense,d4]", 4 * (96 + 24)),
        ("{dense,d4*3}", 2 * (96 + 3 * 24)),
        ("d8k3", 2 * 4 * (96 + 2 * 13 / 2)),  # and the bounds of twelve blocks, two for a key and a value
    ],
)
def test_the_cache_is_as_small_as_the_formula_says(pattern, entries):
    """S + W + 1 + T / D keys and values of 8 bytes a channel for each key head, and two fp32 states."""
    model = tiny_model(pattern, num_key_value_heads=4)
    run = {"do_sample": False, "min_new_tokens": 30, "max_new_tokens": 30, "return_dict_in_generate": True}
    cache = model.generate(random_tokens(3, 67), **run).past_key_values
    held = sum(getattr(head, name).nbytes for layer in cache.layers for head in layer.heads for name in head.tensors)
    assert cache.nbytes == held
    assert held <= 3 * 8 * (2 * 4 * entries + 2 * 4 * 4 * 2)
    assert held > 3 * 8 * 2 * 4 * entries * (0.8 if pattern != "d16" else 0.5)
    formula = model.model.attention_pattern.cache_entries(96, 2, 4)
    if "k" not in pattern:
        assert held <= 3 * 8 * (2 * 4 * formula + 2 * 4 * 4 * 2)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w2s1", "d4k3"])
def test_a_cache_grows_as_tokens_come(pattern):
    model, tokens = tiny_model(pattern), random_tokens(1, 90)
    cache = RatPlusCache(max_length=8)
    logits = torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["d16", "d16w40s4", "{dense,d8,w3,d8k3}"])
def test_prompts_longer_than_a_piece(pattern):
    """Prefill takes queries in pieces: the same as one mask over all of them, which training uses."""
    model, (ids, mask) = tiny_model(pattern, torch.float64), pad([random_tokens(n) for n in (700, 300, 513)])
    with torch.enable_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits.detach()
    assert (model(ids, attention_mask=mask).logits - expected)[mask == 1].abs().max() < 1e-9
    assert (model(ids, attention_mask=mask, use_cache=False).logits - expected)[mask == 1].abs().max() < 1e-9


@pytest.mark.parametrize("pattern", FEW_PATTERNS)
def test_generate_with_the_prompt_in_chunks(pattern):
    model, (ids, mask) = tiny_model(pattern, torch.float64), pad([random_tokens(n) for n in (4, 29, 1)])
    run = {"attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(ids, prefill_chunk_size=8, **run), model.generate(ids, **run))


def test_generation_stops_at_a_string(tmp_path):
    prepare_tiny_data(tmp_path, seq_length=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    model = tiny_model("d4w2", vocab_size=len(tokenizer))
    ids = tokenizer("def main", return_tensors="pt").input_ids
    free = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=24, min_new_tokens=24)[0, ids.shape[1] :])
    stop = free[5:8]
    text = tokenizer.decode(
        model.generate(ids, do_sample=False, max_new_tokens=24, stop_strings=[stop], tokenizer=tokenizer)[0, ids.shape[1] :]
    )
    assert free.startswith(text) and len(text) < len(free) and stop in text


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w2s1"])
def test_gradients_do_not_depend_on_the_cache(pattern):
    model, tokens = tiny_model(pattern, torch.float64), random_tokens(2, 21)
    gradients = []
    for use_cache in (True, False):
        with torch.enable_grad():
            model(tokens, labels=tokens, use_cache=use_cache).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
        model.zero_grad()
    torch.testing.assert_close(*gradients)


def test_generate_refuses_what_cannot_be_right():
    model, ids = tiny_model(), random_tokens(1, 5)
    with pytest.raises(ValueError, match="cache_implementation 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
