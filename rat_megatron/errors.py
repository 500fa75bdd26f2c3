"""How bad input ends: one sentence on standard error and exit code 2, no stack trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user gave is wrong. The message is one sentence: what is wrong (flag or file) and what to do."""


def one_line(error: BaseException, limit: int = 400) -> str:
    """The message's words in one line of at most ``limit`` characters, without a trailing period; the error's class when there are none."""
    return " ".join(str(error).split())[:limit].rstrip(".") or type(error).__name__


@contextmanager
def exit_2_on_bad_input() -> Iterator[None]:
    """Turns a UserError or PatternError into its sentence on standard error and exit code 2."""
    try:
        yield
    except (UserError, ValueError) as error:
        from rat_megatron.ratplus.pattern import PatternError  # here because it brings torch, which --help should not wait for

        if not isinstance(error, UserError | PatternError):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
