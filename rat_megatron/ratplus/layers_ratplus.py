"""The layers of a RAT+ model, their projections and weights: attention over keys and values that a gated recurrence has smoothed.

Source: arXiv 2602.18196. What happens between an attention's projections is in attention_ratplus.py.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_ratplus import HeadSet, Tokens, attend, head_sets
from .cache_ratplus import RatPlusCache
from .configuration_ratplus import RatPlusConfig
from .pattern import LayerPattern
from .rotary_ratplus import channel_order, no_autocast, wide, without_rotation


class RatPlusAttention(nn.Module):
    """Recurrence on keys and values, RoPE, softmax attention under the layer's pattern, output gate."""

    def __init__(self, config: RatPlusConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        self.head_dim = config.head_dim
        query_width, key_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        gates = {"output": (config.use_output_gate, query_width), "forget": (config.use_recurrence, key_width)}
        self.output_gate_proj, self.forget_gate_proj = (
            nn.Linear(config.hidden_size, width, bias=config.gate_bias) if there else None for there, width in gates.values()
        )
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            widths = (query_width, key_width) if config.qk_norm == "layer" else (config.head_dim,) * 2
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=config.rms_norm_eps) for width in widths)
        self.has_rope = layer_idx not in config.layers_without_rope
        self.channel_order = channel_order(config)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        tokens: Tokens,
        pattern: LayerPattern,
        past_key_values: RatPlusCache | None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [b, t, h] -> [b, t, h], real tokens first in every row, and if wanted the weights [b, np, t, s], likewise."""
        projections = (self.q_proj, self.q_norm), (self.k_proj, self.k_norm), (self.v_proj, None), (self.forget_gate_proj, None)
        q, k, v, f = (self._project(hidden_states, projection, norm) for projection, norm in projections)
        rotary = rotary if self.has_rope else without_rotation(rotary)
        dtype, tokens, scores = q.dtype, tokens.to(q.device), self.config.block_scores
        sets = head_sets(pattern, q.shape[1], k.shape[1])
        weights: list[torch.Tensor] | None = [] if output_attentions else None
        with no_autocast(q.device):  # everything here says in which precision it computes
            caches = [None] * len(sets)
            if past_key_values is not None:
                heads, keys = [each.head for each in sets], [k[:, each.groups] for each in sets]
                caches = past_key_values.heads(self.layer_idx, heads, keys, scores)
                kept = caches[0].k.dtype  # another one than the projections' where autocast has begun or ended since
                q, k, v, f = (None if x is None else x.to(kept) for x in (q, k, v, f))
            outputs = [
                attend(
                    q[:, each.queries], None if f is None else f[:, each.groups], k[:, each.groups], v[:, each.groups],
                    rotary, each.head, tokens, cache, scores, weights,
                )
                for each, cache in zip(sets, caches, strict=True)
            ]  # fmt: skip
        out, formed = _join_heads(sets, outputs), _join_heads(sets, weights) if output_attentions else None
        if self.channel_order:
            out = out[..., sorted(range(self.head_dim), key=self.channel_order.__getitem__)]  # back to those of o_proj
        out = out.transpose(1, 2).flatten(2)  # [b, t, np * hn]
        if self.output_gate_proj is not None:
            out = out * torch.sigmoid(wide(self.output_gate_proj(hidden_states)))
        return self.o_proj(out.to(dtype)), formed

    def _project(self, hidden_states: torch.Tensor, projection: nn.Linear | None, norm: nn.RMSNorm | None) -> torch.Tensor | None:
        """[b, t, h] -> [b, np, t, hn], its channels in channel_order."""
        if projection is None:
            return None
        x = projection(hidden_states)
        if norm is not None and self.config.qk_norm == "layer":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.config.qk_norm == "head":
            x = norm(x)
        x = x if self.channel_order is None else x[..., self.channel_order]
        return x.transpose(1, 2)


def _join_heads(sets: list[HeadSet], parts: list[torch.Tensor]) -> torch.Tensor:
    """What the sets have for their query heads [b, some of np, ...], as one tensor [b, np, ...]."""
    if len(sets) == 1:
        return parts[0]
    first = parts[0]
    out = first.new_empty(len(first), sum(part.shape[1] for part in parts), *first.shape[2:])
    for each, part in zip(sets, parts, strict=True):
        out[:, each.queries] = part
    return out


class RatPlusMLP(nn.Module):
    """Up-projection, exact GELU, down-projection; or SwiGLU, where SiLU of a gate projection scales the up-projection."""

    def __init__(self, config: RatPlusConfig):
        super().__init__()
        gated = config.hidden_act == "silu"
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RatPlusDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP with their norms, which stand before them, or behind (``norm_position``)."""

    def __init__(self, config: RatPlusConfig, layer_idx: int):
        super().__init__()
        before = config.norm_position == "before"
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if before else None
        self.self_attn = RatPlusAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RatPlusMLP(config)
        self.post_feedforward_layernorm = None if before else nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **attention_kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [b, t, h] -> [b, t, h], and the attention weights; attention_kwargs as RatPlusAttention.forward takes them."""
        if self.input_layernorm is None:
            attended, weights = self.self_attn(hidden_states, **attention_kwargs)
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
            return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states)), weights
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights
