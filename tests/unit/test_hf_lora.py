"""LoRA with the library `peft`: its defaults know the model, an adapter trains, and merging it changes no logits."""

import subprocess
import sys

import pytest
import torch

from rat_megatron.convert.model_card import write_model_card
from rat_megatron.hf import RatPlusForSequenceClassification
from tests.helpers import REPOSITORY
from tests.unit.test_hf_classification import tiny_classifier
from tests.unit.test_hf_generate import random_tokens, tiny_model

torch.set_num_threads(1)  # at these sizes threads only wait for each other
LINEAR = {"q_proj", "k_proj", "v_proj", "forget_gate_proj", "output_gate_proj", "o_proj", "up_proj", "down_proj"}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def adapted(model):
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("pattern", ["dense", "d4w2s1", "d4k3"])
@pytest.mark.parametrize(("targets", "expected"), [(None, {"q_proj", "v_proj"}), ("all-linear", LINEAR)], ids=["default", "all-linear"])
def test_an_adapter_trains_and_merges(peft, pattern, targets, expected):
    model, ids = tiny_model(pattern, torch.float64).train(), random_tokens(2, 21)
    before = model(ids).logits.detach()
    adapter = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4))
    assert adapted(adapter) == expected
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapter(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    with torch.no_grad():
        logits = adapter.eval()(ids).logits
        assert (logits - before).abs().max() > 1e-3
        written = adapter.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        merged = adapter.merge_and_unload()
        assert type(merged) is type(model) and not adapted(merged)
        torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-9)
        assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), written)


def test_a_classifier_is_trained_beside_its_adapter(peft, tmp_path):
    model, ids = tiny_classifier(RatPlusForSequenceClassification), random_tokens(3, 9)
    body = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    adapter = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
    adapter(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
    trained = {name for name, parameter in adapter.named_parameters() if parameter.grad is not None}
    assert any("score" in name for name in trained) and any("q_proj.lora_B" in name for name in trained)
    torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.5).step()
    adapter.save_pretrained(tmp_path)
    fresh = tiny_classifier(RatPlusForSequenceClassification)
    fresh.model.load_state_dict(body)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits.double(), adapter.eval()(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", ["absent", "broken"])
def test_the_model_loads_without_peft(state, tmp_path):
    (tmp_path / "peft.py").write_text("raise RuntimeError('made for another Transformers')")
    hidden = "sys.modules['peft'] = None" if state == "absent" else f"sys.path.insert(0, {str(tmp_path)!r})"
    code = f"import sys\n{hidden}\nimport rat_megatron.hf\nprint(rat_megatron.hf.RatPlusConfig.model_type)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout == "ratplus\n", done.stderr


def test_readme_and_model_card_name_the_targets(tmp_path):
    write_model_card(tmp_path, tiny_model().config, {}, {})
    for text in ((REPOSITORY / "README.md").read_text(), (tmp_path / "README.md").read_text()):
        assert 'target_modules="all-linear"' in text
