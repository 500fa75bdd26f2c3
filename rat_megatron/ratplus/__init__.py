"""The model for Transformers, and the attention patterns. These files travel with every exported model: they import each other, torch
and Transformers, and nothing else. Register and speed up the model with ``import rat_megatron.hf``.
"""
