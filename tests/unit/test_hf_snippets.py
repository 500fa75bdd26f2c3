"""The Python that README.md and the model card show, run as it stands on an exported folder, without this package."""

import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rat_megatron.checkpoint.hf_folder import write_configs
from rat_megatron.convert.model_card import write_model_card
from rat_megatron.hf import RatPlusForCausalLM
from tests.evaluating import save_tiny_model
from tests.helpers import REPOSITORY
from tests.preparing import EOD, save_byte_tokenizer

pytestmark = pytest.mark.slow

torch.set_num_threads(1)  # at these sizes threads only wait for each other


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder as `rat-megatron convert to-hf` writes it, with a tokenizer that was made for no model in particular."""
    root = tmp_path_factory.mktemp("exported")
    save_byte_tokenizer(root / "tokenizer")
    folder = save_tiny_model(root / "model", tokenizer=False, attention_pattern="d4")
    config = RatPlusForCausalLM.from_pretrained(folder).config
    write_configs(config, folder, root / "tokenizer")
    write_model_card(folder, config, {}, {})
    return folder


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_alone(code, tmp_path):
    """What the code prints in a process that cannot import this package."""
    script = tmp_path / "snippet.py"
    script.write_text('import sys\nsys.modules["rat_megatron"] = None\n' + code)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("document", ["README.md", "model card"])
def test_the_snippets_run_as_they_stand(exported, tmp_path, document):
    text = ((REPOSITORY if document == "README.md" else exported) / "README.md").read_text()
    assert snippets(text)
    for code in snippets(text):
        code = re.sub('"(MODEL|PATH_OR_NAME)"', repr(str(exported)), code)
        assert run_alone(code, tmp_path).replace(" ", "").startswith("The")  # this tokenizer puts blanks between its bytes


@torch.no_grad()
def test_batches_of_prompts_generate_what_each_does_alone(exported):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == EOD == model.generation_config.pad_token_id
    prompts = ["The river", "A", "Once upon a time"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    run = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(**batch, **run)[:, batch.input_ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **run)[0, alone.input_ids.shape[1] :], together[row])
