"""Configuration of a RAT+ model in Hugging Face format (arXiv 2602.18196). Keys are Llama's, plus the recurrence and the pattern."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig

from .pattern import AttentionPattern
from .rotary_ratplus import check_scaling


class RatPlusConfig(PretrainedConfig):
    """What a RAT+ model is made of; the defaults are the 1.5B model of the paper.

    ``use_recurrence`` False is the plain-attention baseline, which has no forget gate. ``attention_pattern`` is one word, such as
    ``dense``, ``d16w256s4`` or ``[dense,d64]*12``; it is kept in its shortest form. ``block_scores`` says what top-k patterns
    choose blocks by where the word does not (``d64k8means``): "bounds" of their keys, as Quest does and as they are trained here, or
    their "means", as MoBA does.
    ``hidden_act`` is "gelu", as in the paper, or "silu": SwiGLU, with a gate projection (arXiv 2002.05202).

    What other families have, all off in the paper's layer: ``use_output_gate`` False leaves the output gate out. ``attention_bias`` is a
    bias of q, k and v, ``gate_bias`` one of the forget and output gates. ``qk_norm`` normalizes queries and keys, the latter before the
    recurrence: "head" over each head (as Qwen3), "layer" over all heads at once (as OLMo2). ``norm_position`` "after" puts the norms of a
    layer behind its attention and MLP (as OLMo2). ``rotary_percent``: the share of a head's channels, the first ones, that RoPE turns.
    ``rotary_scaling``: a longer range for RoPE, {"rope_type": "linear", "llama3" or "yarn", "factor": ...} and what else Transformers'
    models of that type have there. ``layers_without_rope``: indices of layers that RoPE leaves alone (as SmolLM3).

    Raises ValueError for sizes that do not fit together and for a pattern that does not parse or does not fit the layers and heads.
    """

    model_type = "ratplus"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "gelu",
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        use_recurrence: bool = True,
        use_output_gate: bool = True,
        attention_bias: bool = False,
        gate_bias: bool = False,
        qk_norm: str | None = None,
        norm_position: str = "before",
        rotary_percent: float = 1.0,
        rotary_scaling: dict | None = None,
        layers_without_rope: list[int] | None = None,
        attention_pattern: str = "dense",
        block_scores: str = "bounds",
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_recurrence = use_recurrence
        self.use_output_gate = use_output_gate
        self.attention_bias = attention_bias
        self.gate_bias = gate_bias
        self.qk_norm = qk_norm
        self.norm_position = norm_position
        self.rotary_percent = rotary_percent
        self.rotary_scaling = rotary_scaling
        self.layers_without_rope = sorted(layers_without_rope or [])
        self.block_scores = block_scores
        self.use_cache = use_cache
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2 or int(self.head_dim * rotary_percent) % 2 or not 0 < rotary_percent <= 1:
            raise ValueError(f"head_dim {self.head_dim} with rotary_percent {rotary_percent}: rotary embedding turns channels in pairs")
        check_scaling(rotary_scaling)
        if not set(self.layers_without_rope) <= set(range(num_hidden_layers)):
            raise ValueError(f"layers_without_rope {self.layers_without_rope} are not all among {num_hidden_layers} layers")
        if qk_norm not in (None, "head", "layer"):
            raise ValueError(f"qk_norm is 'head', 'layer' or None, not {qk_norm!r}")
        if norm_position not in ("before", "after"):
            raise ValueError(f"norm_position is 'before' or 'after', not {norm_position!r}")
        if hidden_act not in ("gelu", "silu"):
            raise ValueError(f"hidden_act is 'gelu' or 'silu', not {hidden_act!r}")
        if block_scores not in ("bounds", "means"):
            raise ValueError(f"block_scores is 'bounds' or 'means', not {block_scores!r}")
        self.attention_pattern = attention_pattern
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    def __setattr__(self, name: str, value) -> None:
        """A pattern is checked and brought to its shortest form whenever it is set; the model follows from its next call on."""
        super().__setattr__(name, str(self.parse_pattern(value)) if name == "attention_pattern" else value)

    def parse_pattern(self, word: str) -> AttentionPattern:
        """Reads a pattern word that fits this model, in its shortest form; raises PatternError (a ValueError) for any other."""
        return AttentionPattern.parse(word).fit(self.num_hidden_layers, self.num_attention_heads)
