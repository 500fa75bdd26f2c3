"""Changes of Megatron's behaviour: each names what it replaces and why, and all are applied and taken back together.

The list for a training run is in ``table.py``; what a machine without CUDA needs besides, in ``rat_megatron/platform/cpu.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_INHERITED = object()


@dataclass(frozen=True)
class Patch:
    """``make`` gets what ``owner.name`` is (of several on one name, what the one before made of it) and returns what it becomes."""

    owner: Any
    name: str
    make: Callable[[Any], Any]
    why: str
    may_be_missing: bool = False  # Megatron has the name only beside another library; ``make`` then gets None


@contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """In the block the patches are in force, in their order; at its end, however it ends, all is as it was."""
    before: list[tuple[Patch, Any]] = []
    try:
        for patch in patches:
            original = vars(patch.owner).get(patch.name, _INHERITED)
            default = (None,) if patch.may_be_missing else ()
            setattr(patch.owner, patch.name, patch.make(getattr(patch.owner, patch.name, *default)))
            before.append((patch, original))
        yield
    finally:
        for patch, original in reversed(before):
            if original is _INHERITED:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, original)
