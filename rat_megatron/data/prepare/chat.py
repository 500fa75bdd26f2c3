"""Conversations -> prompts and answers, in the tokenizer's own chat template.

Every answer of the assistant is a sample of its own behind the prompt that it had when it was given: what a chat gives the model then,
by `apply_chat_template`. Templates that leave something of earlier answers out (the reasoning, say) are so followed turn by turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError

from rat_megatron.data.prepare.settings import MESSAGES, Settings
from rat_megatron.errors import UserError, one_line


class Chat:
    """Goes to the workers, with the Transformers tokenizer. Raises UserError for one without a chat template."""

    def __init__(self, tokenizer: Any, settings: Settings):
        if not tokenizer.chat_template:
            raise UserError(f"--tokenizer {settings.tokenizer_name} has no chat template, which {MESSAGES} needs: give one that has.")
        self._tokenizer, self._end = tokenizer, tokenizer.convert_ids_to_tokens(settings.eod_id)

    def answers(self, conversations: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, str, str]]:
        """Prompt, answer, and the conversation's first prompt, for every answer in conversations that are JSON.

        An answer ends before the end-of-document token, which every sample gets, if the template ends it with that one. Raises UserError.
        """
        for (text,) in conversations:
            messages = [{key: value for key, value in message.items() if value is not None} for message in json.loads(text)]
            first = None
            for turn, message in enumerate(messages):
                if message.get("role") == "assistant" and turn:  # a greeting answers nothing
                    prompt = self._render(messages[:turn], add_generation_prompt=True)
                    whole = self._render(messages[: turn + 1], add_generation_prompt=False)
                    if not whole.startswith(prompt):
                        raise UserError(
                            "the chat template of --tokenizer changes a prompt once it is answered, so that no answer can be told from it: "
                            f"{_beginning(messages)}"
                        )
                    first = prompt if first is None else first
                    answer = whole[len(prompt) :]
                    if answer.rstrip().endswith(self._end):
                        answer = answer.rstrip().removesuffix(self._end)
                    if answer.strip():
                        yield prompt, answer, first

    def _render(self, messages: list[dict[str, Any]], **options: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"a conversation does not fit the chat template of --tokenizer ({one_line(error)}): {_beginning(messages)}"
            ) from error


def _beginning(messages: list[dict[str, Any]]) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."
