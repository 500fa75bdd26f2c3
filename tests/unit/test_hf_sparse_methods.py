"""Sparse methods of the literature as pattern words: StreamingLLM, Quest and MoBA, and SnapKV beside them in one evaluation."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from rat_megatron.cli.main import app
from rat_megatron.hf import RatPlusCache
from rat_megatron.ratplus.pattern import AttentionPattern
from tests import reference
from tests.evaluating import save_tiny_model
from tests.preparing import prepare, write_lines
from tests.unit.test_hf_attentions import attention_inside
from tests.unit.test_hf_generate import pad, random_tokens, tiny_model

torch.set_num_threads(1)  # at these sizes threads only wait for each other


# ---- StreamingLLM --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])
def test_streaming_llm_sees_sinks_and_window_and_keeps_no_more(variant):
    model, prompts, rest = tiny_model("w5s2", torch.float64, **variant), [random_tokens(n) for n in (4, 31)], random_tokens(2, 25)
    ids, mask = pad(prompts)
    cache, sizes = RatPlusCache(), set()
    logits = [model(ids, attention_mask=mask, past_key_values=cache).logits]
    for token in rest.split(1, dim=1):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        logits.append(model(token, attention_mask=mask, past_key_values=cache).logits)
        sizes.add(cache.layers[0].heads[0].k.shape[2])
    assert sizes == {2 + 5 + 1}
    for row, prompt in enumerate(prompts):
        tokens = torch.cat([prompt, rest[row]])[None]
        expected = reference.model(model.state_dict(), tokens, 4, 2, lambda layer, head, t, j: j <= t and (j < 2 or t - j <= 5))
        actual = torch.cat(logits, dim=1)[row][mask[row] == 1]
        torch.testing.assert_close(actual, expected[0], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 2])
def test_streaming_llm_differs_from_the_paper_in_the_distance_to_the_sinks(sinks):
    """The paper's positions are places in its cache. They say the same distances until a token is let go of, and always in the window."""
    window, length = 5, 30
    model, tokens = tiny_model(f"w{window}s{sinks}", torch.float64, num_hidden_layers=1), random_tokens(1, length)
    model.set_attn_implementation("eager")
    _, [(q, k, v, f, attended)] = attention_inside(model, tokens)
    k, v = (reference.recurrence(x, f)[0].repeat_interleave(2, dim=1) for x in (k, v))  # [t, np, hn]
    same = []
    for t in range(length):
        cache = [j for j in range(t + 1) if j < sinks or t - j <= window]
        keys = reference.rotary(k[cache][None])[0]
        query = reference.rotary(q[:, t].expand(len(cache), -1, -1)[None])[0, -1]
        shares = (torch.einsum("hd,jhd->hj", query, keys) / math.sqrt(8)).softmax(-1)
        same.append((torch.einsum("hj,jhd->hd", shares, v[cache]) - attended[0, t]).abs().max() < 1e-10)
    assert same == [sinks == 0 or t <= window + sinks for t in range(length)]


# ---- Quest and MoBA ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("word", ["d4k3", "d4k3+d"])
def test_a_word_may_say_what_blocks_are_scored_by(word):
    ids, rest, logits = random_tokens(2, 40), random_tokens(2, 6), {}
    for scores in ("bounds", "means"):
        model = tiny_model(word, torch.float64, block_scores=scores)
        for named in (word, word.replace("k3", "k3bounds"), word.replace("k3", "k3means")):
            cache = RatPlusCache()
            out = [model(ids, past_key_values=cache, attention_pattern=named).logits]
            out += [model(token, past_key_values=cache, attention_pattern=named).logits for token in rest.split(1, dim=1)]
            logits[scores, named[4:].removesuffix("+d")] = torch.cat(out, dim=1)
    bounds, means = logits["bounds", ""], logits["means", ""]
    assert not torch.equal(bounds, means)
    assert torch.equal(logits["means", "bounds"], bounds) and torch.equal(logits["bounds", "bounds"], bounds)
    assert torch.equal(logits["bounds", "means"], means) and torch.equal(logits["means", "means"], means)


# ---- side by side --------------------------------------------------------------------------------------------------------------------


def test_four_methods_at_one_budget_in_one_command(tmp_path):
    """A budget of 128 keys; of loss and needles SnapKV, which shows in what is generated only, has the needles."""
    folder = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    lines = write_lines(tmp_path / "text.jsonl", [f"River {i} ran through the valley." for i in range(40)])
    prepare([lines], tmp_path / "data", tokenizer=str(folder), seq_length=256, workers=1, val_fraction=0.5)
    words = ["d16k8", "d16k8means", "w123s4", "snap128w32"]
    options = [option for word in words for option in ("--pattern", word)]
    options += [
        "--data",
        str(tmp_path / "data"),
        "--num-samples",
        "1",
        "--needle-length",
        "700",
        "--needle-count",
        "1",
        "--batch-size",
        "5",
    ]
    result = CliRunner().invoke(app, ["evaluate", str(folder), *options, "--output", str(tmp_path / "out")], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())["patterns"]
    assert list(results) == words
    assert [word for word in words if "loss" in results[word]] == words[:3] and "snap128w32: no validation loss" in result.output
    losses = [results[word]["loss"]["loss"] for word in words[:3]]
    assert len(set(losses)) == 3
    assert all(len(results[word]["needles"]["700"]) == 5 for word in words)
    for word in words:
        entries = AttentionPattern.parse(word).cache_entries(700, 2, 4)
        stored = results[word]["kv_cache_bytes"]["700"]
        of_keys = 2 * 8 * 4 * entries
        assert of_keys <= stored <= 1.2 * of_keys
    # where its keys stand is noted besides, four bytes for a key and value of 64 here
    assert results["snap128w32"]["kv_cache_bytes"]["700"] == pytest.approx(results["w123s4"]["kv_cache_bytes"]["700"], rel=0.1)
