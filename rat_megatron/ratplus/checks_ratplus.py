"""What a RAT+ model cannot do right is refused here, in one sentence, before it computes anything: ValueErrors of forward and generate."""

from __future__ import annotations

import torch

from .attention_ratplus import Tokens
from .cache_ratplus import RatPlusCache
from .pattern import AttentionPattern

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")  # what Trainer and the loss functions pass on
_PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # how Transformers and TRL mark packed documents
_ONE_ROW_EACH = (
    "packed documents are not supported and would be mixed: give each document a row of its own, padded (in TRL: packing=False, "
    "padding_free=False)"
)


def refuse_unknown(arguments: dict, known: tuple[str, ...] = ()) -> None:
    """Raises ValueError for arguments of forward that nobody reads, unless they are None."""
    names = [name for name, value in arguments.items() if value is not None and name not in known]
    if packed := [name for name in names if name in _PACKED]:
        raise ValueError(f"{', '.join(packed)}: {_ONE_ROW_EACH}")
    if names:
        hint = " (make the tokenizer leave it out: model_input_names)" if "token_type_ids" in names else ""
        raise ValueError(f"forward() does not know {', '.join(names)}: correct the name or leave it out{hint}")


def refuse_fused(attn_implementation: str) -> None:
    """Raises ValueError where attention runs fused: only eager attention has weights to show."""
    if attn_implementation != "eager":
        raise ValueError(
            f"output_attentions is not possible with attn_implementation='{attn_implementation}', which never forms the weights: load the "
            'model with attn_implementation="eager", or call set_attn_implementation("eager")'
        )


def refuse_pruned_training(pattern: AttentionPattern) -> None:
    """Raises ValueError for a pattern that only what is generated shows."""
    if pattern.prunes_prompt:
        raise ValueError(
            f"attention pattern '{pattern}' drops keys of a prompt once it is read, and a training sample has no prompt: train under "
            "another"
        )


def check_pruning(pattern: AttentionPattern, cached: bool, candidates: bool) -> None:
    """Raises ValueError where generate() could not follow a pattern that drops keys behind the prompt."""
    if pattern.prunes_prompt and not cached:
        raise ValueError(f"attention pattern '{pattern}' is what a cache keeps of a prompt: generate with use_cache=True")
    if pattern.prunes_prompt and candidates:
        raise ValueError(
            f"attention pattern '{pattern}' drops keys behind the prompt, which candidates would share a call with: leave out "
            "prompt_lookup_num_tokens and assistant_model, or take another pattern, for the assistant too"
        )


def check_lengths(x: torch.Tensor, columns: int, attention_mask: torch.Tensor | None, past: RatPlusCache | None, limit: int) -> None:
    """Raises ValueError unless x [b, t, h], after ``columns`` cached ones, fits its mask [b, columns + t] and the limit of positions."""
    batch, length = x.shape[:2]
    total = columns + length
    if length == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if attention_mask is not None and attention_mask.shape != (batch, total):
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}, but [batch, cached + new tokens] is {(batch, total)}")
    if attention_mask is not None and attention_mask.dtype != torch.bool and length > 1 and not _is_recorded():
        if ((attention_mask != 0) & (attention_mask != 1)).any():
            raise ValueError(f"attention_mask holds more than 0 and 1; {_ONE_ROW_EACH}")
    if total > limit and not _is_recorded():  # padding takes no position
        if attention_mask is not None:
            total = int((attention_mask != 0).sum(dim=1).max())
        elif past is not None and past.lengths is not None:
            total = int(past.lengths.max()) + length
        if past is not None and past.recording:  # candidates may reach past the limit: what remains of them does not
            total -= max(0, past.wanted - 1)
        if total > limit:
            raise ValueError(f"{total} tokens are more than max_position_embeddings, {limit}: shorten the prompt or raise it in the config")


def check_generated_length(attention_mask: torch.Tensor | None, columns: int, limit: int) -> None:
    """Raises ValueError when ``columns``, all that will be read, hold too many real tokens. The mask [b, prompt] says which are."""
    padding = 0
    if columns > limit and attention_mask is not None:
        padding = int((attention_mask == 0).sum(dim=1).min())
    if columns - padding > limit:
        raise ValueError(
            f"the prompt and max_new_tokens (or max_length) make {columns - padding + 1} tokens, but the model reads up to {limit} "
            "(max_position_embeddings): shorten one of them"
        )


def refuse_restarts(position_ids: torch.Tensor, tokens: Tokens) -> None:
    """Raises ValueError where positions [b or 1, t] do not rise from one real token to the next: another document begins there.

    Looks at several tokens at once only, so that decoding does not wait for the device.
    """
    if tokens.length == 1 or _is_recorded():
        return
    position_ids = position_ids.expand(len(tokens.before), -1)
    falls = torch.cat([position_ids[:, :1] < tokens.before[:, None], position_ids[:, 1:] <= position_ids[:, :-1]], dim=1)
    if (falls if tokens.real is None else falls & tokens.real).any():
        raise ValueError(f"position_ids start again within a row; {_ONE_ROW_EACH}")


def _is_recorded() -> bool:
    """Whether torch.compile or a CUDA graph records the calls, so that no value may be asked for."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
