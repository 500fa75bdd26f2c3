"""The one table of the architecture: for every Megatron argument that changes what the model computes, what RAT+ supports.

Training refuses the rest before it starts, the layer specs refuse them in a TransformerConfig, and the converter in the arguments of a
checkpoint. A test walks every flag of Megatron's parser, so that none is missing here. Needs no Megatron.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPTIONS: dict[str, Any] = {
    "attention_output_gate": True,
    "add_qkv_bias": False,
    "rat_gate_bias": False,
    "qk_layernorm": False,
    "rat_qk_layernorm_over_heads": False,
    "rat_norm_after": False,
    "rotary_percent": 1.0,
    "no_rope_freq": None,
}
"""What a layer may have beyond the paper's, and the values there: those of checkpoints that do not say."""

ROTARY: dict[str, Any] = {
    "rotary_base": 10000,
    "position_embedding_type": "rope",
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_original_max_position_embeddings": None,
    "yarn_beta_fast": None,
    "yarn_beta_slow": None,
    "yarn_correction_range_round_to_int": None,
}
"""The angles of RoPE, likewise: a run from --pretrained-checkpoint may have others, for longer sequences."""

EXPORTED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "group_query_attention": "num_key_value_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "vocab_size": "vocab_size",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "untie_embeddings_and_output_weights": "tie_word_embeddings",
    "swiglu": "hidden_act",
    "attention_output_gate": "use_output_gate",
    "add_qkv_bias": "attention_bias",
    "rat_gate_bias": "gate_bias",
    "qk_layernorm": "qk_norm",
    "rat_qk_layernorm_over_heads": "qk_norm",
    "rat_norm_after": "norm_position",
    "rotary_percent": "rotary_percent",
    "no_rope_freq": "layers_without_rope",
    **dict.fromkeys(set(ROTARY) - {"rotary_base"}, "rotary_scaling"),
}
"""Arguments with any value, and the key of the Hugging Face config that they become (rat_megatron.convert.megatron_args)."""

FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_interleaved": False,
    "mrope_section": None,
    "add_bias_linear": False,
    "qk_l2_norm": False,
    "qk_clip": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "window_attn_skip_freq": None,
    "attention_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
    "use_kitchen_attention": False,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "squared_relu": False,
    "openai_gelu": False,
    "quick_geglu": False,
    "use_te_activation_func": False,
    "use_transformer_engine_op_fuser": False,
    "bias_gelu_fusion": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "num_experts": None,
    "mtp_num_layers": None,
    "mtp_hybrid_override_pattern": None,
    "use_mup": False,
    "is_hybrid_model": False,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
}
"""Arguments with one value only: any other is another model than RAT+. Fused GELUs are among them: they are tanh approximations."""


@dataclass(frozen=True)
class Unused:
    """Flags that would change nothing, or only go wrong, in this program. Title of a group of Megatron's parser, prefix, or name."""

    reason: str
    groups: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def holds(self, group: str, name: str) -> bool:
        return name not in self.but and (group in self.groups or name.startswith(self.prefixes or ("\0",)) or name in self.names)


UNUSED = (
    Unused(
        "belongs to another program of Megatron and would change nothing here",
        groups=("rl", "biencoder", "vision", "Logits Distillation", "inference", "sft"),
        prefixes=("inference_", "mamba_", "hybrid_context_", "encoder_", "decoder_seq", "decoder_num", "relative_attention_"),
        names=(
            *(
                "flash_decode",
                "nccl_all_reduce_for_prefill",
                "symmetric_ar_type",
                "mlp_chunks_for_prefill",
                "onnx_safe",
                "bert_binary_head",
            ),
            *("mask_prob", "short_seq_prob", "sample_rate", "yaml_cfg", "use_mamba_mem_eff_path", "max_seqlen_per_dp_cp_rank"),
        ),
        but=("cuda_graph_modules", "cuda_graph_scope_deprecated"),
    ),
    Unused(
        "is for layers that a RAT+ model does not have",
        groups=("moe", "mla", "experimental_attention_variant", "heterogeneous architecture"),
        prefixes=("moe_", "expert_", "mtp_", "dsa_", "linear_", "qk_clip_", "mup_"),
        names=(
            *("use_grouped_gemm_for_shared_expert", "use_grouped_gemm_for_dense_mlp", "use_fused_weighted_squared_relu", "rope_type"),
            *("high_priority_a2a_comm_stream", "overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
            *("ep_overlap_early_attn_memory_release", "save_tokens_per_expert_interval", "kitchen_attention_backend"),
            *("apply_wd_to_qk_layernorm", "no_weight_decay_cond_type", "add_position_embedding", "log_max_attention_logit"),
        ),
        but=("rotary_scaling_factor", "mscale", "mscale_all_dim"),  # YaRN's, which Megatron's parser has among them
    ),
    Unused(
        "is for Megatron's own datasets, and RAT+ reads MDS streams",
        prefixes=("fim_", "dataloader_fast", "dataloader_defer"),
        names=(
            *("split", "test_data_path", "data_args_path", "per_split_data_args_path", "per_dataset_sequences_path", "mmap_bin_files"),
            *("phase_transition_iterations", "num_dataset_builder_threads", "object_storage_cache_path", "mid_level_dataset_surplus"),
            *("allow_ambiguous_pad_tokens", "create_attention_mask_in_dataloader"),
        ),
    ),
    Unused(
        "has no effect: the data of --data-path are tokens already, and say which tokenizer made them",
        groups=("tokenizer",),
        but=("vocab_size", "padded_vocab_size", "pad_vocab_size", "vocab_extra_ids"),
    ),
    Unused(
        "is not supported: tokens of one document would see those of another",
        names=("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "dataloader_inter_document_masking"),
    ),
    Unused(
        "would change the arguments after they were checked: give the flags of the checkpoint",
        names=("use_checkpoint_args", "use_mp_args_from_checkpoint_args"),
    ),
    Unused(
        "would change nothing here",  # the first is left out where models are built from a configuration, the second is for experts
        names=("freeze_all_layers", "fused_residual_rmsnorm"),
    ),
    Unused(
        "is not supported: Megatron's layers take no input in fp32 where their weights are in bf16 or fp16",
        names=("fp32_residual_connection",),
    ),
    Unused(
        "is not supported: Megatron's configuration lacks what it sets; give --init-method-std",
        names=("init_method_xavier_uniform",),
    ),
    Unused("is not supported: RAT+'s own kernels do not keep to it", names=("batch_invariant_mode",)),
    Unused(
        "is for tests with nvidia_resiliency_ext, which this program does not have",
        prefixes=("fault_injector_",),
    ),
    Unused(
        "is nvidia_resiliency_ext's, in whose place this program has a watchdog: give --rat-hang-timeout-in-mins",
        groups=("In-process restart", "ft_package"),
    ),
    Unused(
        "is not supported",
        prefixes=("delta_offload_", "lion_"),
        names=(
            *("delay_wgrad_compute", "fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size"),
            *("delay_offload_until_cuda_graph", "activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads"),
            "hierarchical_context_parallel_sizes",
        ),
    ),
)
"""Flags that are refused where they differ from their default; the first rule that holds gives the reason."""

YARN = tuple(name for name in ROTARY if name.startswith(("yarn_", "mscale", "rotary_scaling")))
"""Arguments that only --position-embedding-type yarn has a use for."""

SPEC = ["rat_megatron.model.layer_spec", "get_rat_block_spec"]


def other_values(settings: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and the only right one of each attribute of ``settings`` (arguments or a TransformerConfig) that no RAT+ model has."""
    for name, right in FIXED.items():
        value = getattr(settings, name, right)
        if value != right:
            yield name, value, right
    if (kind := getattr(settings, "position_embedding_type", "rope")) not in ("rope", "yarn"):
        yield "position_embedding_type", kind, "rope"


def unused_flags(args: Namespace, groups: dict[str, str], defaults: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and reason of each argument that differs from its default and has no use; ``groups`` are the parser's group of each name."""
    for name, group in groups.items():
        if name in defaults and getattr(args, name, defaults[name]) != defaults[name]:
            for rule in UNUSED:
                if rule.holds(group, name):
                    yield name, rule.reason
                    break
