"""What decides the result of `prepare` besides the inputs; stored in rat_meta.json, so that unfinished or finished data is recognized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rat_megatron.data.format import FORMAT_VERSION, hash_of, tokenizer_hash
from rat_megatron.errors import UserError, one_line

MESSAGES = "--messages-column"


@dataclass(frozen=True)
class Settings:
    """Each field is a key of rat_meta.json."""

    format_version: int
    seq_length: int
    vocab_size: int
    eod_id: int
    token_dtype: str  # uint16 | uint32
    tokenizer_name: str
    tokenizer_hash: str
    text_column: str
    val_fraction: float
    seed: int
    deduplicate: bool
    answer_column: str | None  # each document is a sample of its own, with a loss on its answer only
    special_tokens: str  # keep | split those that are spelled out in the text
    messages_column: str | None  # each answer of a conversation is a sample of its own, likewise
    chat_template_hash: str | None  # of the template that they are put into

    @property
    def columns(self) -> dict[str, str]:
        """Those that are read of a document, by the flag that names them."""
        if self.messages_column is not None:
            return {MESSAGES: self.messages_column}
        answer = {} if self.answer_column is None else {"--answer-column": self.answer_column}
        return {"--text-column": self.text_column, **answer}

    @property
    def has_answers(self) -> bool:
        """Whether only answers count in the loss."""
        return self.answer_column is not None or self.messages_column is not None


def load_tokenizer(name: str) -> Any:
    """The Transformers tokenizer of this name or folder. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError, KeyError) as error:
        remedy = "give a Hugging Face name or a folder made by save_pretrained"
        raise UserError(f"--tokenizer {name} cannot be loaded, {remedy}: {one_line(error)}.") from error


def make_settings(tokenizer: Any, name: str, *, eod_token: str | None, messages_column: str | None = None, **others: Any) -> Settings:
    """Settings with what follows from the tokenizer filled in. Raises UserError when no token can end a document."""
    vocabulary = tokenizer.get_vocab()
    if eod_token is not None and eod_token not in vocabulary:
        raise UserError(f"--eod-token {eod_token} is not in the vocabulary of --tokenizer {name}: choose one of its tokens.")
    eod_id = tokenizer.eos_token_id if eod_token is None else vocabulary[eod_token]
    if eod_id is None:
        raise UserError(f"--tokenizer {name} has no end-of-sequence token: name the token that ends a document with --eod-token.")
    vocab_size = max(len(tokenizer), max(vocabulary.values()) + 1)  # the second is larger when the vocabulary has holes
    return Settings(
        format_version=FORMAT_VERSION,
        vocab_size=vocab_size,
        eod_id=eod_id,
        token_dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        tokenizer_name=Path(name).resolve().name if Path(name).is_dir() else name,  # no path of this machine in the data set
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template_hash=None if messages_column is None else hash_of(tokenizer.chat_template),
        messages_column=messages_column,
        **others,
    )
