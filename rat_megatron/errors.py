"""How a program ends early: one sentence on standard error, no stack trace; exit code 2 for bad input, 1 for a run that failed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user gave is wrong. The message is one sentence: what is wrong (flag or file) and what to do."""


class RunFailed(Exception):
    """A run cannot go on, through no fault of its input: a full disk, weights that are not finite. One sentence, as UserError's."""


def one_line(error: BaseException, limit: int = 400) -> str:
    """What an error says, on one line and without its full stop; its class where it says nothing."""
    return (" ".join(str(error).split())[:limit] or type(error).__name__).rstrip(".")


@contextmanager
def exit_2_on_bad_input() -> Iterator[None]:
    """Turns a UserError or PatternError into its sentence on standard error and exit code 2; a RunFailed, into exit code 1."""
    try:
        yield
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except (UserError, ValueError) as error:
        from rat_megatron.ratplus.pattern import PatternError  # here because it brings torch, which --help should not wait for

        if not isinstance(error, UserError | PatternError):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
