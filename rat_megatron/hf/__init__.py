"""RAT+ for Transformers. Importing this package registers it, so that the Auto classes know ``model_type: ratplus``.

The model itself is in rat_megatron/ratplus, whose files travel with every exported model; here it is registered and lent our kernels.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from rat_megatron.hf import kernels
from rat_megatron.ratplus import attention_ratplus
from rat_megatron.ratplus.cache_ratplus import RatPlusCache
from rat_megatron.ratplus.configuration_ratplus import RatPlusConfig
from rat_megatron.ratplus.modeling_ratplus import (
    RatPlusForCausalLM,
    RatPlusForSequenceClassification,
    RatPlusForTokenClassification,
    RatPlusModel,
)

attention_ratplus.kernels = kernels

__all__ = [
    "RatPlusCache",
    "RatPlusConfig",
    "RatPlusForCausalLM",
    "RatPlusForSequenceClassification",
    "RatPlusForTokenClassification",
    "RatPlusModel",
]

AutoConfig.register(RatPlusConfig.model_type, RatPlusConfig, exist_ok=True)
RatPlusConfig.register_for_auto_class()
for _auto, _model in (
    (AutoModel, RatPlusModel),
    (AutoModelForCausalLM, RatPlusForCausalLM),
    (AutoModelForSequenceClassification, RatPlusForSequenceClassification),
    (AutoModelForTokenClassification, RatPlusForTokenClassification),
):
    _auto.register(RatPlusConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)  # save_pretrained then writes the code and its auto_map, for trust_remote_code=True

# What `peft` adapts when a LoraConfig names no target_modules: the queries and values, as in its table for Llama and most others.
try:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as _lora_targets
except Exception:  # not installed, or one that does not go with this Transformers: no reason not to load the model
    pass
else:
    _lora_targets.setdefault(RatPlusConfig.model_type, ["q_proj", "v_proj"])
