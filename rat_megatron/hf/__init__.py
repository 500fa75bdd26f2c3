"""RAT+ for Transformers. Importing this package registers it, so ``AutoModelForCausalLM`` knows ``model_type: ratplus``.

The *_ratplus.py files and pattern.py import nothing of Megatron or rat_megatron: they travel with every exported model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import attention_ratplus, kernels
from .cache_ratplus import RatPlusCache
from .configuration_ratplus import RatPlusConfig
from .modeling_ratplus import RatPlusForCausalLM, RatPlusModel

attention_ratplus.kernels = kernels

__all__ = ["RatPlusCache", "RatPlusConfig", "RatPlusForCausalLM", "RatPlusModel"]

AutoConfig.register(RatPlusConfig.model_type, RatPlusConfig, exist_ok=True)
AutoModel.register(RatPlusConfig, RatPlusModel, exist_ok=True)
AutoModelForCausalLM.register(RatPlusConfig, RatPlusForCausalLM, exist_ok=True)

# save_pretrained then writes the code and its auto_map beside the weights, for trust_remote_code=True.
RatPlusConfig.register_for_auto_class()
RatPlusModel.register_for_auto_class("AutoModel")
RatPlusForCausalLM.register_for_auto_class("AutoModelForCausalLM")
