"""Model families of the Hub that become RAT+ models, and back: one file each, for what their config.json says. See ``family.py``.

To add one: a file with a Family like those here, its line in FAMILIES, and its configuration in tests/unit/test_retrofit.py.
"""

from __future__ import annotations

from rat_megatron.convert.families.family import Family
from rat_megatron.convert.families.llama import LLAMA
from rat_megatron.convert.families.mistral import MISTRAL
from rat_megatron.convert.families.olmo2 import OLMO2
from rat_megatron.convert.families.qwen2 import QWEN2
from rat_megatron.convert.families.qwen3 import QWEN3
from rat_megatron.convert.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3, SMOLLM3)}
"""By ``model_type`` in config.json. SmolLM2 is a Llama."""
