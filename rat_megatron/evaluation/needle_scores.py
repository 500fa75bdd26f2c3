"""Runs the needle tests of needles.py on a model: greedy answers of up to 128 tokens, scored by the share of expected numbers found."""

from __future__ import annotations

from collections import defaultdict
from itertools import batched
from typing import Any

import torch

from rat_megatron.errors import UserError
from rat_megatron.evaluation.model import LoadedModel
from rat_megatron.evaluation.needles import DEPTHS, KINDS, Needle, NeedleWriter

ANSWER_TOKENS = 128  # a model may write so many; they count in the length, as RULER counts


class NeedleTest:
    """``count`` questions of each kind at one length, written once, so that every pattern gets the same ones.

    Raises UserError where the length does not fit the model or holds no question.
    """

    def __init__(self, loaded: LoadedModel, length: int, *, count: int, seed: int, kinds: list[str] | None = None):
        limit = loaded.config.max_position_embeddings
        if length > limit:
            raise UserError(f"--needle-length {length} is past the {limit} positions of {loaded.folder}: give {limit} or less.")
        tokenizer = loaded.need_tokenizer()
        self.length = length
        self.questions: dict[str, list[Needle]] = {
            kind: list(NeedleWriter(tokenizer, length, kind, room=ANSWER_TOKENS).write(count, seed)) for kind in kinds or KINDS
        }

    def run(self, loaded: LoadedModel, *, batch_size: int) -> dict[str, dict[str, Any]]:
        """For each kind its score, standard error (from 2 questions on), number of questions and score by depth, under the model's
        current attention pattern. ``by_depth`` has the score of the needles in each tenth of the text, None where there were none."""
        return {kind: _summary(questions, self._found(loaded, questions, batch_size)) for kind, questions in self.questions.items()}

    @staticmethod
    def _found(loaded: LoadedModel, questions: list[Needle], batch_size: int) -> list[list[bool]]:
        return [
            needle.score(text)
            for some in batched(questions, batch_size)
            for needle, text in zip(some, continue_greedily(loaded, [needle.prompt for needle in some], ANSWER_TOKENS), strict=True)
        ]


@torch.inference_mode()
def continue_greedily(loaded: LoadedModel, prompts: list[str], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, as one batch; no token is put before the prompts."""
    tokenizer, device = loaded.need_tokenizer(), loaded.model.device
    rows = [tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)  # [b, s], padded on the left
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    output = loaded.model.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=loaded.pad_token_id
    )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def _summary(questions: list[Needle], found: list[list[bool]]) -> dict[str, Any]:
    scores = torch.tensor([sum(row) / len(row) for row in found], dtype=torch.float64)
    bins = defaultdict(list)
    for needle, row in zip(questions, found, strict=True):
        for depth, hit in zip(needle.depths, row, strict=True):
            bins[int(depth * DEPTHS)].append(hit)
    summary: dict[str, Any] = {"score": float(scores.mean()), "questions": len(scores)}
    if len(scores) > 1:
        summary["stderr"] = float(scores.std() / len(scores) ** 0.5)
    summary["by_depth"] = [sum(bins[i]) / len(bins[i]) if bins[i] else None for i in range(DEPTHS)]
    return summary
