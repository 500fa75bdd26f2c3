"""Mixed precision around the Hugging Face model: lm-evaluation-harness's own HFLM with mixed_precision_dtype, and what else computes
through a cache or shows weights, inside and outside of autocast in turn."""

import pytest
import torch

from rat_megatron.hf import RatPlusCache, RatPlusForSequenceClassification
from tests.evaluating import save_tiny_model
from tests.unit.test_hf_classification import tiny_classifier
from tests.unit.test_hf_generate import pad, random_tokens, tiny_model
from tests.unit.test_hf_trust import relative_error

torch.set_num_threads(1)  # at these sizes threads only wait for each other
PATTERNS = ["dense", "d16", "d16w8s4", "d4k30", "[dense,{dense,d4w2,d4k30+d,w2s1}]"]  # top-k of all blocks: no choice that flips
PROMPTS = ["The river runs", "A", "Once upon a time there was a long story that went on and on"]


def inside():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [{}, {"use_recurrence": False}], ids=["rat", "baseline"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lm_eval_with_mixed_precision(tmp_path, monkeypatch, pattern, variant, dtype):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="the extra eval is not installed")
    from lm_eval.api.instance import Instance

    folder = save_tiny_model(tmp_path / "model", attention_pattern=pattern, **variant)
    run = {"pretrained": str(folder), "backend": "causal", "batch_size": 3, "device": "cpu", "add_bos_token": False}
    mixed = harness.HFLM(dtype=dtype, mixed_precision_dtype="bfloat16", **run)
    exact = harness.HFLM(dtype="float32", **run)

    def requests(kind, arguments):
        return [Instance(kind, {}, argument, i, ("task", i, 1)) for i, argument in enumerate(arguments)]

    continuations = requests("loglikelihood", [(prompt, " and what then?") for prompt in PROMPTS])
    scores = [torch.tensor([score for score, _ in lm.loglikelihood(continuations, disable_tqdm=True)]) for lm in (mixed, exact)]
    assert relative_error(*scores) < 0.03

    written, generate = [], mixed.model.generate
    monkeypatch.setattr(mixed.model, "generate", lambda **given: written.append((given, generate(**given))) or written[-1][1])
    answers = mixed.generate_until(
        requests("generate_until", [(p, {"until": ["\n\n\n"], "max_gen_toks": 24}) for p in PROMPTS]), disable_tqdm=True
    )
    assert len(answers) == 3
    ((given, tokens),) = written
    assert torch.is_autocast_enabled("cpu") is False and tokens.shape[1] > given["input_ids"].shape[1] + 4
    mask = torch.nn.functional.pad(given["attention_mask"], (0, tokens.shape[1] - given["input_ids"].shape[1]), value=1)
    with torch.no_grad():  # every token is the best one of fp32, or so close to it that rounding decides
        logits = exact.model(tokens, attention_mask=mask).logits[:, given["input_ids"].shape[1] - 1 : -1]
    chosen = logits.gather(-1, tokens[:, given["input_ids"].shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.1 * (logits.amax() - logits.amin())
    assert (logits.amax(-1) == chosen).double().mean() > 0.8


@torch.no_grad()
@pytest.mark.parametrize("autocast", [(True, True), (True, False), (False, True)], ids=["all", "prompt", "rest"])
@pytest.mark.parametrize("pattern", ["dense", "d4w2s1", "{dense*2,d4,w2s1}", "d4k9", "d4k9+d"])  # with all blocks: no choice that flips
def test_pieces_that_are_thrown_away_under_autocast(pattern, autocast):
    """A cache may enter and leave autocast between the tokens that it notes and the crop that undoes them."""
    model, (ids, mask), rest = tiny_model(pattern), pad([random_tokens(n) for n in (5, 14)]), random_tokens(2, 9)
    full = torch.cat([mask, torch.ones_like(rest)], dim=1)
    expected = model(torch.cat([ids, rest], dim=1), attention_mask=full).logits[:, 14:]
    cache = RatPlusCache()
    cache.activate_past_recording()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast[0]):
        model(ids, attention_mask=mask, past_key_values=cache)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast[1]):
        model(torch.cat([rest[:, :2], random_tokens(2, 4)], dim=1), attention_mask=full[:, :20], past_key_values=cache)
        cache.crop(15)
        logits = [model(rest[:, 1:5], attention_mask=full[:, :19], past_key_values=cache).logits]
    logits.append(model(rest[:, 5:], attention_mask=full, past_key_values=cache).logits)
    assert relative_error(torch.cat(logits, dim=1), expected[:, 1:]) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["dense", "d4w2s1", "d4k9"])
def test_weights_labels_and_candidates_under_autocast(pattern):
    model, ids = tiny_model(pattern), random_tokens(1, 20)
    model.set_attn_implementation("eager")
    exact = model(ids, output_attentions=True).attentions
    with inside():
        rounded = model(ids, output_attentions=True).attentions
        looked_up = model.generate(ids.repeat(1, 2), prompt_lookup_num_tokens=4, max_new_tokens=10, do_sample=False)
    assert rounded[1].dtype == torch.bfloat16 and relative_error(rounded[1], exact[1]) < 0.03
    assert looked_up.shape[1] >= 50 or looked_up[0, -1] == model.generation_config.eos_token_id
    classifier = tiny_classifier(RatPlusForSequenceClassification, pattern, torch.float32)
    expected = classifier(ids, labels=torch.tensor([1]))
    with inside():
        out = classifier(ids, labels=torch.tensor([1]))
    assert relative_error(out.logits, expected.logits) < 0.03 and abs(out.loss - expected.loss) < 0.1
