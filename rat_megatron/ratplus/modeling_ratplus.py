"""RAT+ as a Transformers model, with its heads: next tokens, one label a sequence, one label a token.

Source: arXiv 2602.18196 (the layer, dilated attention with window and sinks, hybrids, top-k blocks). This file needs only those
beside it (layers, attention, cache, checks, configuration, rotary, pattern), and runs on transformers 4.57 and 5.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .cache_ratplus import CACHE_NAME, RatPlusCache
from .checks_ratplus import (
    LOSS_ARGUMENTS,
    check_generated_length,
    check_lengths,
    check_pruning,
    refuse_fused,
    refuse_pruned_training,
    refuse_restarts,
    refuse_unknown,
)
from .columns_ratplus import count_tokens, in_order, weights_in_columns
from .configuration_ratplus import RatPlusConfig
from .layers_ratplus import RatPlusDecoderLayer
from .pattern import AttentionPattern
from .rotary_ratplus import rotary_tables

# Transformers 4 copies the files that this one names, and none that those name, from a folder that is loaded with trust_remote_code.
from .attention_ratplus import Tokens  # noqa: F401, I001 isort:skip
from .head_cache_ratplus import HeadCache  # noqa: F401 isort:skip
from .past_ratplus import RecentPast  # noqa: F401 isort:skip
from .snapkv_ratplus import SnapCache  # noqa: F401 isort:skip

_READS_TWICE = "next_sequence_length" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters  # 5.24, with any model
_OF_GENERATE = ("position_ids", "cache_position", "tokenizer", "assistant_tokenizer")  # generate() passes them on, forward has no use


class RatPlusPreTrainedModel(PreTrainedModel):
    config_class = RatPlusConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["RatPlusDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values", "cache"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02) for every matrix, with no scaling by depth; norms 1, the bias of a head for tokens 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def set_attention_pattern(self, word: str) -> None:
        """Switches to another attention pattern, such as ``d16w256s4``, for all calls from now on, and notes it in the config.
        Raises PatternError (a ValueError) when the word does not parse or does not fit the model's layers and heads."""
        self.config.attention_pattern = word


class RatPlusModel(RatPlusPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: RatPlusConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RatPlusDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._parsed = config.attention_pattern, config.parse_pattern(config.attention_pattern)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def attention_pattern(self) -> AttentionPattern:
        """The pattern that the config names now."""
        if self._parsed[0] != self.config.attention_pattern:
            self._parsed = self.config.attention_pattern, self.config.parse_pattern(self.config.attention_pattern)
        return self._parsed[1]

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
        attention_pattern: str | None = None,
        cache: RatPlusCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [b, t, h] of input_ids [b, t] or inputs_embeds [b, t, h].

        attention_mask [b, s], s counting cached tokens too, is 0 at padding, which may stand on either side. A padded token is not
        seen, leaves the recurrent state alone and takes no position: the pattern counts real tokens. position_ids [b, t], which rise
        along a row, only replace the positions that RoPE uses. attention_pattern is this call's, in place of the model's. A cache is
        made when use_cache (default: config.use_cache, except in training); gradients do not flow through it. ``cache`` is what
        Transformers calls past_key_values since 5.24. output_attentions (with attn_implementation="eager" only) adds each layer's weights
        [b, np, t, s], cached tokens among the s: zero where the pattern does not look, at padding, and for padding.

        Raises ValueError for input that does not fit, an empty prompt and more tokens than config.max_position_embeddings among it, for
        packed documents, and for arguments that it does not know.
        """
        refuse_unknown(kwargs)
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions:
            refuse_fused(self.config._attn_implementation)
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

        if attention_pattern is None and past_key_values is not None:
            attention_pattern = past_key_values.word
        pattern = self.attention_pattern if attention_pattern is None else self.config.parse_pattern(attention_pattern)
        if self.training:
            refuse_pruned_training(pattern)
        columns = 0 if past_key_values is None else past_key_values.get_seq_length()
        check_lengths(hidden_states, columns, attention_mask, past_key_values, self.config.max_position_embeddings)
        if past_key_values is not None:
            past_key_values.begin(hidden_states, pattern, self.config)

        # Real tokens go first in their rows, so that one causal mask serves all; at the end they go back to their columns.
        order = None
        if attention_mask is not None and hidden_states.shape[1] > 1:
            order = (attention_mask[:, columns:] == 0).to(hidden_states.device).int().argsort(dim=1, stable=True)
            hidden_states = in_order(hidden_states, order)
            position_ids = position_ids if position_ids is None else position_ids.to(order.device).expand(order.shape).gather(1, order)
        tokens = count_tokens(hidden_states, columns, attention_mask, past_key_values)
        if position_ids is not None:
            position_ids = position_ids.to(hidden_states.device)
            refuse_restarts(position_ids, tokens)
        else:  # where nothing came before, one table serves all rows
            position_ids = tokens.positions if columns else tokens.positions[:1]
        rotary = rotary_tables(position_ids, self.config, hidden_states.dtype)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        back = None if order is None else order.argsort(dim=1)
        all_hidden_states: tuple[torch.Tensor, ...] = ()
        attentions: tuple[torch.Tensor, ...] = ()
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states += (in_order(hidden_states, back),)
            hidden_states, weights = layer(
                hidden_states,
                rotary=rotary,
                tokens=tokens,
                pattern=pattern.layer(index),
                past_key_values=past_key_values,
                output_attentions=output_attentions,
            )
            if output_attentions:
                attentions += (weights_in_columns(weights, tokens, back, attention_mask, past_key_values),)
        hidden_states = in_order(self.norm(hidden_states), back)
        if past_key_values is not None:
            past_key_values.end(tokens.length, tokens.counts, attention_mask)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values},
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )


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
        attention_pattern: str | None = None,
        cache: RatPlusCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [b, t, vocab], of the last logits_to_keep tokens or of the indices it lists (0: all), and with labels [b, t] the loss.

        The other arguments are RatPlusModel.forward's, and what the loss function takes. Labels are shifted here; -100 is ignored.
        """
        refuse_unknown(kwargs, LOSS_ARGUMENTS)
        past = cache if past_key_values is None else past_key_values
        if isinstance(past, RatPlusCache) and isinstance(logits_to_keep, int):
            past.wanted = logits_to_keep  # after a prompt with candidates: theirs, some of which will be undone
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            attention_pattern=attention_pattern,
            cache=cache,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs) -> dict:
        """Leaves positions to the model, which counts real tokens: Transformers' own are columns when a prompt comes in chunks."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        return {name: value for name, value in inputs.items() if name not in _OF_GENERATE}

    def _assisted_decoding(self, *args, **model_kwargs):
        """Keeps this call's pattern from the assistant, which Transformers gives all arguments of this model's forward."""
        cache, word = model_kwargs.get(CACHE_NAME), model_kwargs.pop("attention_pattern", None)
        if word is None or cache is None:
            return super()._assisted_decoding(*args, **model_kwargs)
        cache.word = word
        try:
            return super()._assisted_decoding(*args, **model_kwargs)
        finally:
            cache.word = None

    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        if model_kwargs.get("position_ids") is not None:
            raise ValueError("generate() counts positions itself, padding left out: give it no position_ids")
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, generation_mode, batch_size, max_cache_length) -> None:
        """Gives generate() a RatPlusCache, with room for all tokens, where Transformers would make a DynamicCache.

        This is where both versions of Transformers know the length, so what cannot end well is refused here, before any work.
        """
        of_assistant = getattr(generation_config, "is_assistant", False)  # before 5 that one is told which cache to make
        if generation_config.cache_implementation is not None and not of_assistant:
            raise ValueError(f"cache_implementation '{generation_config.cache_implementation}' does not apply: RAT+ has a cache of its own")
        check_generated_length(model_kwargs.get("attention_mask"), max_cache_length, self.config.max_position_embeddings)
        model_kwargs.pop("position_ids", None)  # Transformers' own, which it would hand on to an assistant
        settings = self.generation_config if of_assistant else generation_config  # an assistant is given a copy of the other model's
        if (word := getattr(settings, "attention_pattern", None)) is not None:
            model_kwargs["attention_pattern"] = word
        given = model_kwargs.get(CACHE_NAME)
        if isinstance(given, RatPlusCache):
            given._is_user_defined = True  # as Transformers does: the caller goes on with it, so it may hold no token too many
        elif given is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = RatPlusCache(max_cache_length)
        cache, assisted = model_kwargs.get(CACHE_NAME), generation_mode == GenerationMode.ASSISTED_GENERATION
        if isinstance(cache, RatPlusCache):
            if assisted and cache.get_seq_length() and _READS_TWICE:
                raise ValueError(
                    "with candidates this Transformers reads the tokens of a given cache again: leave out the cache or the candidates"
                )
            cache.record_past(assisted or of_assistant)
            if not cache.get_seq_length() and model_kwargs.get("attention_mask") is not None:
                cache.prompt_length = model_kwargs["attention_mask"].shape[1]
        word = model_kwargs.get("attention_pattern")
        pattern = self.model.attention_pattern if word is None else self.config.parse_pattern(word)
        check_pruning(pattern, cached=cache is not None, candidates=assisted or of_assistant)


class RatPlusForSequenceClassification(RatPlusPreTrainedModel):
    """One label a row, from its last real token: the only one that has seen all of it.

    Not Transformers' generic class: that finds padding by its id, and so reads a text that ends with the end-of-text token one token too
    early where that token pads too; and it builds the body through AutoModel, which a folder loaded with trust_remote_code may not.
    """

    accepts_loss_kwargs = False  # Trainer then divides by the steps it accumulates over: every row has one label

    def __init__(self, config: RatPlusConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RatPlusModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RatPlusCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = False,
        cache: RatPlusCache | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [b, num_labels], and with labels [b] ([b, num_labels] of several labels a row) the loss that config.problem_type names.

        Padding may stand on either side and is what attention_mask says; without one, what config.pad_token_id says of input_ids.
        The other arguments are RatPlusModel.forward's.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = _last_real(hidden_states, input_ids, attention_mask, self.config.pad_token_id)
        logits = self.score(hidden_states[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RatPlusForTokenClassification(RatPlusPreTrainedModel):
    """One label a token. Attention is causal: a token's label follows from it and those before it."""

    def __init__(self, config: RatPlusConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RatPlusModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = False,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Logits [b, t, num_labels], and with labels [b, t] the loss; -100 is ignored.

        The other arguments are RatPlusModel.forward's, and what the loss function takes.
        """
        of_loss = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **of_loss)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def _last_real(x: torch.Tensor, input_ids: torch.Tensor | None, mask: torch.Tensor | None, pad_token_id: int | None) -> torch.Tensor:
    """The column [b] of each row's last real token among x [b, t, h], whose mask [b, s] may begin with cached tokens."""
    if mask is not None:
        real = mask[:, -x.shape[1] :] != 0
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        return torch.full((len(x),), x.shape[1] - 1, device=x.device)
    column = torch.arange(x.shape[1], device=x.device)
    return (column * real.to(x.device)).argmax(dim=1)
