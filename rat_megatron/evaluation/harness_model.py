"""lm-evaluation-harness's model class around a RAT+ model that is loaded already; only the truncation of LongBench is its own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from rat_megatron.errors import UserError
from rat_megatron.evaluation.model import LoadedModel


class HarnessModel(HFLM):
    """No token is put before a prompt. Prompts of ``cut_in_middle`` tasks lose their middle when they are too long, others their
    beginning."""

    def __init__(self, loaded: LoadedModel, *, batch_size: int, cut_in_middle: set[str]):
        super().__init__(
            pretrained=loaded.model,
            backend="causal",
            tokenizer=_ending_tokenizer(loaded),
            max_length=loaded.config.max_position_embeddings,
            batch_size=batch_size,
            add_bos_token=False,
        )
        self._cut_in_middle = cut_in_middle
        self._cutting = False

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = [""] * len(requests)
        for self._cutting in (False, True):
            own = [i for i, request in enumerate(requests) if (request.task_name in self._cut_in_middle) == self._cutting]
            if own:
                texts = super().generate_until([requests[i] for i in own], disable_tqdm)
                for i, text in zip(own, texts, strict=True):
                    answers[i] = text
        return answers

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [b, s]; left_truncate_len is the room that the answer leaves, and a prompt stays under it."""
        if not self._cutting:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [cut_middle(self.tok_encode(text), left_truncate_len - 1) for text in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]


def cut_middle(ids: list[int], length: int) -> list[int]:
    """At most ``length`` ids: the first half of that and the last."""
    if len(ids) <= length:
        return ids
    return ids[: length // 2] + ids[len(ids) - (length - length // 2) :]


def _ending_tokenizer(loaded: LoadedModel) -> Any:
    """A copy of the tokenizer that has the end-of-text token which the harness needs, also to pad with when there is no other."""
    tokenizer = deepcopy(loaded.need_tokenizer())
    if tokenizer.eos_token_id is None:
        if loaded.config.eos_token_id is None:
            raise UserError(
                f"neither the tokenizer in {loaded.folder} nor its config.json names an end-of-text token: set eos_token_id there."
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(loaded.config.eos_token_id)
    return tokenizer
