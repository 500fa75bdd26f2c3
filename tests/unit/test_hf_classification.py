"""Labels for sequences and for tokens: the same row by row as in a padded batch, and from folders that were exported to generate."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, Trainer, TrainingArguments

from rat_megatron.checkpoint.hf_folder import write_configs
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM, RatPlusForSequenceClassification, RatPlusForTokenClassification
from tests.evaluating import save_tiny_model
from tests.unit.test_hf_generate import PAD, VOCAB, pad, random_tokens

torch.set_num_threads(1)  # at these sizes threads only wait for each other
LABELS = 5
HEADS = [
    pytest.param(RatPlusForSequenceClassification, AutoModelForSequenceClassification, id="sequence"),
    pytest.param(RatPlusForTokenClassification, AutoModelForTokenClassification, id="token"),
]


def tiny_classifier(kind, pattern="d4w2s1", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = kind(RatPlusConfig(**{**sizes, "attention_pattern": pattern, "num_labels": LABELS, "pad_token_id": PAD, **settings}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.to(dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", ["dense", "d4w2s1", "{dense*2,d4,w2s1}", "d4k3"])
def test_a_padded_batch_is_its_rows_alone(pattern, side):
    sequences = [random_tokens(n) for n in (1, 19, 33, 6)]
    ids, mask = pad(sequences, side)
    model = tiny_classifier(RatPlusForSequenceClassification, pattern)
    alone = torch.cat([model(sequence[None]).logits for sequence in sequences])
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, rtol=0, atol=1e-9)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, alone, rtol=0, atol=1e-9)
    if side == "right":  # without a mask as Transformers' own classes: the id says what is padding
        torch.testing.assert_close(model(ids).logits, alone, rtol=0, atol=1e-9)
    model = tiny_classifier(RatPlusForTokenClassification, pattern)
    logits = model(ids, attention_mask=mask).logits
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(logits[row][mask[row] == 1], model(sequence[None]).logits[0], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_may_end_with_the_token_that_pads(side):
    model, sequences = tiny_classifier(RatPlusForSequenceClassification), [random_tokens(n) for n in (4, 9)]
    sequences[0][-1] = sequences[1][-1] = PAD
    ids, _ = pad(sequences, side)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if side == "left" else slice(4, 9)] = 0
    alone = torch.cat([model(sequence[None], attention_mask=torch.ones(1, len(sequence))).logits for sequence in sequences])
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, rtol=0, atol=1e-9)
    assert (alone[1] - model(sequences[1][None, :-1]).logits).abs().max() > 1e-2, (
        "the last token changes nothing, so this test sees nothing"
    )


@torch.no_grad()
def test_a_sequence_may_come_in_pieces():
    model, (ids, mask) = tiny_classifier(RatPlusForSequenceClassification), pad([random_tokens(n) for n in (5, 14)])
    cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)[1]
    pieces = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(pieces, model(ids, attention_mask=mask).logits, rtol=0, atol=1e-9)


def test_losses_and_gradients():
    ids, mask = pad([random_tokens(n) for n in (7, 12, 3)])
    model, labels = tiny_classifier(RatPlusForSequenceClassification).train(), torch.tensor([0, 4, 2])
    out = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    out.loss.backward()
    model_of_tokens = tiny_classifier(RatPlusForTokenClassification, classifier_dropout=0.3).train()
    assert model_of_tokens.dropout.p == 0.3
    model_of_tokens.dropout.p = 0.0
    labels = torch.where(mask == 1, torch.randint(LABELS, ids.shape), -100)
    out = model_of_tokens(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(
        out.loss.double(), torch.nn.functional.cross_entropy(out.logits[mask == 1], labels[mask == 1]), rtol=1e-5, atol=0
    )
    total = model_of_tokens(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(total, out.loss * int(mask.sum()) / 7)
    out.loss.backward()
    for name, parameter in [*model.named_parameters(), *model_of_tokens.named_parameters()]:
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "settings", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}], ids=["regression", "several labels"]
)
def test_other_problems(settings):
    model, ids = tiny_classifier(RatPlusForSequenceClassification, **settings), random_tokens(3, 8)
    labels = torch.randn(3).double() if "num_labels" in settings else torch.randint(2, (3, LABELS)).double()
    out = model(ids, labels=labels)
    expected = (
        torch.nn.functional.mse_loss(out.logits[:, 0], labels)
        if "num_labels" in settings
        else torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
    )
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(("kind", "auto"), HEADS)
def test_trainer_trains_a_head_and_it_is_loaded_again(tmp_path, kind, auto):
    model, ids = tiny_classifier(kind, dtype=torch.float32), random_tokens(8, 6)
    of_tokens = kind is RatPlusForTokenClassification
    rows = [{"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": row % LABELS if of_tokens else row[0] % LABELS}
            for row in ids]  # fmt: skip
    arguments = TrainingArguments(
        tmp_path / "run",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_steps=9,
    )
    before = model.score.weight.detach().clone()
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(before, model.score.weight)
    model.save_pretrained(tmp_path / "model")
    loaded = auto.from_pretrained(tmp_path / "model")
    assert type(loaded) is kind
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("how", ["exported", "saved"])
def test_exported_models_get_heads_without_this_package(tmp_path, how):
    folder = save_tiny_model(tmp_path / "model", tokenizer=False, attention_pattern="d4")
    write_configs(RatPlusForCausalLM.from_pretrained(folder).config, folder, None)
    script = f"""
import sys
sys.modules["rat_megatron"] = None  # any import of it fails from here on
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
folder = {str(folder)!r}
if {how == "saved"}:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained("again")
    folder = "again"
ids = torch.arange(34).view(2, 17)
body = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).model(ids).last_hidden_state
eager = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
assert len(eager(ids, output_attentions=True).attentions) == 2
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    model = auto.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    hidden = body[:, -1] if "Sequence" in auto.__name__ else body
    assert model.score.bias is None or not model.score.bias.any()
    torch.testing.assert_close(model(ids).logits, model.score(hidden))
    model.save_pretrained(auto.__name__)
    again = auto.from_pretrained(auto.__name__, trust_remote_code=True)
    assert torch.equal(again(ids).logits, model(ids).logits)
    print(type(again).__name__, type(again).__module__.split(".")[0])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [f"RatPlusFor{name}Classification transformers_modules" for name in ("Sequence", "Token")]
    assert done.stdout.splitlines() == names
