"""What rat_megatron.hf lends the model on a GPU, with the torch references in the place of the kernels: same results, other shapes."""

import copy

import pytest
import torch

from rat_megatron.hf import RatPlusCache, kernels
from rat_megatron.hf.kernels import can_attend, can_decode, can_scan
from rat_megatron.ratplus import attention_ratplus
from tests.unit.test_hf_generate import pad, random_tokens, tiny_model

torch.set_num_threads(1)  # at these sizes threads only wait for each other


@pytest.fixture
def lent(monkeypatch):
    """Kernels that take tensors of the CPU, and which of them were called."""
    calls = []
    for name in ("scan", "attention", "decode"):
        monkeypatch.setattr(kernels, name, _noted(getattr(kernels, name), name, calls))
    monkeypatch.setattr(kernels, "triton_takes", lambda *tensors: True)
    return calls


def _noted(function, name, calls):
    def noted(*args):
        calls.append(name)
        return function(*args)

    return noted


@torch.no_grad()
@pytest.mark.parametrize(
    "pattern", ["dense", "d4", "d4w3s2", "w3", "[d4w2,{dense*2,d4,w2s1}]", "d4k3", "[dense,{d4k3,d4*3}]", "[d4w2,snap9w3]"]
)
def test_results_are_those_without_kernels(pattern, lent, monkeypatch):
    model, prompts, rest = tiny_model(pattern), [random_tokens(n) for n in (3, 30, 11)], random_tokens(3, 9)
    ids, mask = pad(prompts)

    def logits():
        seen = mask
        out = model(ids, attention_mask=seen, use_cache=True)
        whole, cache = [out.logits[seen == 1].flatten()], out.past_key_values
        for token in rest.split(1, dim=1):
            seen = torch.cat([seen, seen.new_ones(3, 1)], dim=1)
            seen[1, -1] = token[1, 0] % 2  # a row may pause
            whole.append(model(token, attention_mask=seen, past_key_values=cache).logits[seen[:, -1] == 1].flatten())
        return torch.cat(whole), cache.layers[0].heads[0].state

    with_kernels = logits()
    assert "scan" in lent
    assert ("attention" in lent) == (pattern != "dense")
    assert ("decode" in lent) == (pattern != "d4k3")
    monkeypatch.setattr(attention_ratplus, "kernels", None)
    torch.testing.assert_close(with_kernels, logits(), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w3s2", "d4k3", "[d4w2,{dense*2,d4,w2s1}]"])
@pytest.mark.parametrize("positions", ["counted", "of all rows", "of each row"])
def test_the_kernels_turn_keys_and_queries_where_rows_have_the_same_positions(pattern, positions, lent, monkeypatch):
    model, ids, given = tiny_model(pattern), random_tokens(2, 30), 3 * torch.arange(30) + 5
    given = {"counted": None, "of all rows": given[None], "of each row": torch.stack([given, torch.arange(30)])}[positions]
    monkeypatch.setattr(kernels, "apply_rotary", _noted(kernels.apply_rotary, "apply_rotary", lent))

    def logits():
        return model(ids, position_ids=given, use_cache=True).logits

    with_kernels = logits()
    assert "scan" in lent and ("apply_rotary" in lent) == (positions == "of each row")
    monkeypatch.setattr(attention_ratplus, "kernels", None)
    torch.testing.assert_close(with_kernels, logits(), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w3s2", "d4k3"])
def test_a_second_chunk_goes_on_at_positions_of_each_row(pattern, lent, monkeypatch):
    model, rest = tiny_model(pattern), random_tokens(3, 9)
    ids, mask = pad([random_tokens(n) for n in (3, 30, 11)])

    def logits():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        return model(rest, attention_mask=torch.cat([mask, torch.ones_like(rest)], dim=1), past_key_values=cache).logits

    with_kernels = logits()
    monkeypatch.setattr(attention_ratplus, "kernels", None)
    torch.testing.assert_close(with_kernels, logits(), rtol=0, atol=1e-5)


def test_gradients_flow_through_the_kernels_of_whole_sequences(lent, monkeypatch):
    model, tokens = tiny_model("d4w3s2", torch.float64), random_tokens(2, 21)
    gradients = []
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.model.layers[0].self_attn.forget_gate_proj.weight.grad)
        model.zero_grad()
        monkeypatch.setattr(attention_ratplus, "kernels", None)
    assert "attention" in lent and "decode" not in lent
    torch.testing.assert_close(*gradients)


def test_tensors_of_the_cpu_are_left_to_torch():
    q = torch.randn(1, 2, 1, 32)
    cache = tiny_model("d4")(random_tokens(1, 8)).past_key_values.layers[0].heads[0]
    assert attention_ratplus.kernels is kernels
    assert not can_scan(q) and not can_attend(q, cache.head) and not can_decode(q, cache)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4", "d4w3s2", "[d4w2,{dense*2,d4,w2s1}]", "d4k3"])
def test_tokens_are_undone_after_kernels(pattern, lent, monkeypatch):
    """Of a long prompt the last tokens are noted, of decoding steps each: a kernel gives no state before its last."""
    model, tokens = tiny_model(pattern, torch.float64), random_tokens(2, 67)
    cache = RatPlusCache()
    cache.activate_past_recording()
    model(tokens[:, :60], past_key_values=cache)
    assert "scan" in lent
    for t in range(60, 64):
        model(tokens[:, t : t + 1], past_key_values=cache)
    assert ("decode" in lent) == (pattern != "d4k3")
    caches = {63: copy.deepcopy(cache), 61: copy.deepcopy(cache), 60: copy.deepcopy(cache), 47: cache}
    monkeypatch.setattr(attention_ratplus, "kernels", None)
    for length, shorter in caches.items():
        shorter.crop(length)
        logits = model(tokens[:, -4:], past_key_values=shorter).logits
        expected = model(torch.cat([tokens[:, :length], tokens[:, -4:]], dim=1)).logits[:, length:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    ids = tokens[:1, :30]
    run = {"do_sample": False, "max_new_tokens": 20}
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, **run)
    monkeypatch.setattr(attention_ratplus, "kernels", kernels)
    assert torch.equal(model.generate(ids, assistant_model=tiny_model("d4", torch.float64, num_hidden_layers=1), **run), expected)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w3s2", "d4k3"])
def test_weights_are_formed_without_kernels(pattern, lent, monkeypatch):
    model, tokens = tiny_model(pattern), random_tokens(2, 30)
    model.set_attn_implementation("eager")
    cache = RatPlusCache()
    pieces = [model(tokens[:, :29], past_key_values=cache, output_attentions=True)]
    pieces.append(model(tokens[:, 29:], past_key_values=cache, output_attentions=True))
    assert set(lent) == {"scan"}
    monkeypatch.setattr(attention_ratplus, "kernels", None)
    expected = model(tokens, output_attentions=True)
    torch.testing.assert_close(pieces[1].attentions[1], expected.attentions[1][:, :, 29:], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([piece.logits for piece in pieces], dim=1), expected.logits, rtol=0, atol=1e-5)
