"""RAT+ as a Transformers model: attention over keys and values that a gated recurrence has smoothed along the sequence.

Source: arXiv 2602.18196 (the layer, dilated attention with window and sinks, hybrids, top-k blocks). This file needs only the three
beside it (configuration, cache, pattern), and runs on transformers 4.57 and 5.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_ratplus import RatPlusCache
from .configuration_ratplus import RatPlusConfig
from .pattern import AttentionPattern, HeadPattern, LayerPattern


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or unchanged when it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gated_scan(gate: torch.Tensor, update: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
    """h_t = g_t * h_{t-1} + u_t along the second last dimension; in RAT+, u_t = (1 - g_t) * x_t.

    gate [b, np, t, hn], update [..., b, np, t, hn] and the state before the first token [..., b, np, 1, hn] (zeros when None), all in
    the dtype to compute in; returns h, shaped like update.
    """
    if state is not None:
        update = torch.cat([update[..., :1, :] + gate[..., :1, :] * state, update[..., 1:, :]], dim=-2)
    return _scan(gate, update)


def _scan(gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """h_t = g_t * h_{t-1} + u_t: joins neighbours in pairs, solves for the second of each, fills in the first. O(t) work, log2(t) deep."""
    length = update.shape[-2]
    if length == 1:
        return update
    pairs = length // 2
    first_gate, second_gate = gate[..., 0::2, :], gate[..., 1::2, :]
    first, second = update[..., 0::2, :], update[..., 1::2, :]
    out = torch.empty_like(update)
    out[..., 1::2, :] = solved = _scan(second_gate * first_gate[..., :pairs, :], second + second_gate * first[..., :pairs, :])
    out[..., 0, :] = update[..., 0, :]
    out[..., 2::2, :] = first[..., 1:, :] + first_gate[..., 1:, :] * solved[..., : first.shape[-2] - 1, :]
    return out


def rotary_tables(positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [b, 1, t, hn / 2] for positions [b, t]; angles in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    inverse_frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim)
    angle = positions[:, None, :, None] * inverse_frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE of x [b, np, t, hn]."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


@torch.no_grad()
def block_mask(
    pattern: HeadPattern, q: torch.Tensor, k: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor:
    """Which keys the queries of a top-k block pattern see: [b, np, t, s], for q [b, np, t, hn] and k [b, np, s, hn] after RoPE.

    Scores are Quest's (arXiv 2406.10774): a block's bound on q . k, the sum over channels d of max(q_d * kmax_d, q_d * kmin_d) with
    the channel-wise maxima and minima of its keys. Only blocks that ended before the query's own are scored. The query's own block
    and the first are always among the K (K = 1 is the own block alone), the rest are the best scored. query_positions [b or 1, t, 1],
    key_positions [b or 1, 1, s]; padding is at -1.
    """
    size, queries, keys = pattern.dilation, query_positions[:, None], key_positions[:, None]  # [b, 1, t, 1], [b, 1, 1, s]
    count = -(-k.shape[2] // size)
    block, own = torch.arange(count, device=k.device), queries // size
    chosen = (block == own) | ((block == 0) & (pattern.blocks > 1))  # [b, 1, t, count]
    best = min(pattern.blocks - 2, count)
    if best > 0:
        bounds = k.new_zeros(*k.shape[:2], count + 1, k.shape[3])
        block_of_key = torch.where(keys < 0, count, keys // size).transpose(2, 3).expand_as(k)  # padding falls into a spare block
        highest, lowest = (bounds.scatter_reduce(2, block_of_key, k, how, include_self=False)[:, :, :count] for how in ("amax", "amin"))
        scores = _wide(q).clamp(min=0) @ _wide(highest).mT + _wide(q).clamp(max=0) @ _wide(lowest).mT
        candidate = (block > 0) & (block < own)
        top = scores.masked_fill(~candidate, -torch.inf).topk(best, dim=-1).indices
        chosen = chosen | (torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top, True) & candidate)
    shape = (*q.shape[:3], k.shape[2])
    seen = chosen.expand(*q.shape[:3], count).gather(-1, (keys.clamp(min=0) // size).expand(shape))
    if pattern.dilate_rest:
        seen = seen | ((keys + 1) % size == 0)
    return seen & (keys <= queries)


class VisibleKeys:
    """Which keys each query sees in one forward pass. Layers with the same pattern share one mask, unless it depends on scores.

    queries [b, t] and keys [b, s] are positions in the row's own sequence; padding is at -1 and no token sees it.
    """

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor):
        self.padded = bool((keys < 0).any())
        rows = slice(None) if self.padded else slice(1)  # without padding all rows are alike
        self.queries, self.keys = queries[rows, :, None], keys[rows, None, :]
        self._masks: dict[LayerPattern, torch.Tensor] = {}

    @property
    def real(self) -> torch.Tensor:
        """False where a query is padding: [b or 1, 1, t, 1]."""
        return (self.queries >= 0)[:, None]

    def mask(self, pattern: LayerPattern, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
        """A layer's mask [b or 1, np or 1, t, s] for q [b, np, t, hn] and k [b, np, s, hn]; None where plain causal attention will do."""
        length = q.shape[2]
        if pattern.is_dense and not self.padded and length in (1, k.shape[2]):
            return None
        if not pattern.is_positional:
            return self._hide_padding(self._scored(pattern, q, k))
        if pattern not in self._masks:
            self._masks[pattern] = self._hide_padding(pattern.mask(self.queries, self.keys).transpose(0, 1))
        return self._masks[pattern].to(q.device)

    def _scored(self, pattern: LayerPattern, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        queries, keys = self.queries.to(q.device), self.keys.to(q.device)
        heads = pattern.heads if len(pattern.heads) > 1 else pattern.heads * q.shape[1]
        seen = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
        for head in set(heads):
            at = [i for i, other in enumerate(heads) if other == head]
            seen[:, at] = block_mask(head, q[:, at], k[:, at], queries, keys) if head.blocks else head.mask(queries, keys)[:, None]
        return seen

    def _hide_padding(self, seen: torch.Tensor) -> torch.Tensor:
        if not self.padded:
            return seen
        queries, keys = self.queries[:, None].to(seen.device), self.keys[:, None].to(seen.device)
        return (seen & (keys >= 0)) | (queries < 0)  # a padded query sees everything: a row without keys would give NaN


class RatPlusAttention(nn.Module):
    """Recurrence on keys and values, RoPE, softmax attention under the layer's pattern, output gate."""

    def __init__(self, config: RatPlusConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_width, key_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.output_gate_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.forget_gate_proj = nn.Linear(config.hidden_size, key_width, bias=False) if config.use_recurrence else None
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        visible: VisibleKeys,
        pattern: LayerPattern,
        past_key_values: RatPlusCache | None,
    ) -> torch.Tensor:
        """hidden_states [b, t, h] -> [b, t, h]."""
        q, k, v = (self._heads(projection(hidden_states)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        state = None
        if self.forget_gate_proj is not None:
            k, v, state = self._recur(hidden_states, k, v, visible, past_key_values)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
            past_key_values.set_state(state, self.layer_idx)
        k, v = (x.repeat_interleave(self.num_key_value_groups, dim=1) if self.num_key_value_groups > 1 else x for x in (k, v))
        mask = visible.mask(pattern, q, k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        out = out.transpose(1, 2).flatten(2)  # [b, t, np * hn]
        gate = torch.sigmoid(_wide(self.output_gate_proj(hidden_states)))
        return self.o_proj((out * gate).to(out.dtype))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, t, np * hn] -> [b, np, t, hn]

    def _recur(
        self, hidden_states: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: VisibleKeys, past_key_values: RatPlusCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """k~, v~ [b, np, t, hn] in the dtype of k, and the state after the last token, [2, b, np, 1, hn] in fp32."""
        logits = _wide(self._heads(self.forget_gate_proj(hidden_states)))
        gate, keep = torch.sigmoid(logits), torch.sigmoid(-logits)  # 1 - gate would lose its digits where the gate is near 1
        if visible.padded:
            real = visible.real.to(gate.device)  # padding leaves the state as it is
            gate, keep = torch.where(real, gate, 1.0), torch.where(real, keep, 0.0)
        past = past_key_values.get_state(self.layer_idx) if past_key_values is not None else None
        smoothed = gated_scan(gate, keep * _wide(torch.stack([k, v])), past)
        k, v = smoothed.to(k.dtype)
        return k, v, smoothed[..., -1:, :].clone()  # a copy: a view would keep the whole scan alive in the cache


class RatPlusMLP(nn.Module):
    """Up-projection, exact GELU, down-projection; not gated."""

    def __init__(self, config: RatPlusConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class RatPlusDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RatPlusConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = RatPlusAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RatPlusMLP(config)

    def forward(self, hidden_states: torch.Tensor, **attention_kwargs) -> torch.Tensor:
        """hidden_states [b, t, h] -> [b, t, h]; attention_kwargs as RatPlusAttention.forward takes them."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **attention_kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RatPlusPreTrainedModel(PreTrainedModel):
    config_class = RatPlusConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["RatPlusDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # the recurrent state cannot be rewound, so generate() refuses assisted decoding

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02) for every matrix, with no scaling by depth; norms 1."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def set_attention_pattern(self, word: str) -> None:
        """Switches to another attention pattern, such as ``d16w256s4``, for all calls from now on, and notes it in the config.

        Raises PatternError (a ValueError) when the word does not parse or does not fit the model's layers and heads.
        """
        pattern = self.config.parse_pattern(word)
        self.base_model.attention_pattern = pattern
        self.config.attention_pattern = str(pattern)


class RatPlusModel(RatPlusPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: RatPlusConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RatPlusDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention_pattern: AttentionPattern = config.parse_pattern(config.attention_pattern)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RatPlusCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [b, t, h] of input_ids [b, t] or inputs_embeds [b, t, h].

        attention_mask [b, s], s counting cached tokens too, is 0 at padding, which may stand on either side. A padded token is not
        seen, leaves the recurrent state alone and takes no position: the pattern counts real tokens. position_ids [b, t] only
        replace the positions that RoPE uses. A cache is made when use_cache (default: config.use_cache, except in training).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions is not supported: attention runs fused and never forms its weights")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise ValueError("gradient checkpointing runs each layer twice and so cannot fill a cache: pass no past_key_values")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = RatPlusCache()
        if past_key_values is not None and not isinstance(past_key_values, RatPlusCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}, but RAT+ needs a RatPlusCache (or none)")

        positions = _count_positions(hidden_states, attention_mask, past_key_values)
        key_positions = positions if past_key_values is None else past_key_values.append_positions(positions)
        visible = VisibleKeys(positions, key_positions)
        rotary_positions = positions.clamp(min=0) if position_ids is None else position_ids
        rotary = rotary_tables(rotary_positions, self.config.head_dim, self.config.rope_theta, hidden_states.dtype)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden_states = ()
        for index, layer in enumerate(self.layers):
            all_hidden_states += (hidden_states,)
            pattern = self.attention_pattern.layer(index)
            hidden_states = layer(hidden_states, rotary=rotary, visible=visible, pattern=pattern, past_key_values=past_key_values)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
        )


def _count_positions(x: torch.Tensor, attention_mask: torch.Tensor | None, past: RatPlusCache | None) -> torch.Tensor:
    """Positions [b, t] of the tokens x [b, t, h] among the real tokens of their row, -1 for padding."""
    batch, length = x.shape[:2]
    start = torch.zeros(batch, 1, dtype=torch.long, device=x.device)
    cached = 0
    if past is not None and past.positions is not None:
        cached = past.positions.shape[1]
        start = past.positions.amax(dim=1, keepdim=True).to(x.device) + 1
    if attention_mask is None:
        return start + torch.arange(length, device=x.device)
    if attention_mask.shape != (batch, cached + length):
        expected = (batch, cached + length)
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, but [batch, cached + new tokens] is {expected}")
    real = (attention_mask[:, cached:] != 0).to(x.device)
    return torch.where(real, start + real.cumsum(dim=1) - 1, -1)


class RatPlusForCausalLM(RatPlusPreTrainedModel, GenerationMixin):
    """RAT+ with its output projection, tied to the embedding when the config says so."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RatPlusConfig):
        super().__init__(config)
        self.model = RatPlusModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RatPlusCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [b, t, vocab], of the last logits_to_keep tokens or of the indices it lists (0: all), and with labels [b, t] the loss.

        The other arguments are RatPlusModel.forward's. Labels are shifted here; -100 is ignored.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """Gives generate() a RatPlusCache where Transformers would make a DynamicCache, which has no place for the recurrent state."""
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation '{generation_config.cache_implementation}' does not apply: RAT+ has a cache of its own")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RatPlusCache()
