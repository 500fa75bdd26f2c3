"""RAT+ for Transformers. Importing this package registers it, so ``AutoModelForCausalLM`` knows ``model_type: ratplus``.

The model itself is in rat_megatron/ratplus, whose files travel with every exported model; here it is registered and lent our kernels.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rat_megatron.hf import kernels
from rat_megatron.ratplus import attention_ratplus
from rat_megatron.ratplus.cache_ratplus import RatPlusCache
from rat_megatron.ratplus.configuration_ratplus import RatPlusConfig
from rat_megatron.ratplus.modeling_ratplus import RatPlusForCausalLM, RatPlusModel

attention_ratplus.kernels = kernels

__all__ = ["RatPlusCache", "RatPlusConfig", "RatPlusForCausalLM", "RatPlusModel"]

AutoConfig.register(RatPlusConfig.model_type, RatPlusConfig, exist_ok=True)
AutoModel.register(RatPlusConfig, RatPlusModel, exist_ok=True)
AutoModelForCausalLM.register(RatPlusConfig, RatPlusForCausalLM, exist_ok=True)

# save_pretrained then writes the code and its auto_map beside the weights, for trust_remote_code=True.
RatPlusConfig.register_for_auto_class()
RatPlusModel.register_for_auto_class("AutoModel")
RatPlusForCausalLM.register_for_auto_class("AutoModelForCausalLM")
