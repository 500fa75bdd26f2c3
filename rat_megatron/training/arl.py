"""Active recurrence learning: every global batch trains twice, first under a sparse pattern, then under the model's own.

With dense attention alone the recurrence learns only a short memory; the sparse step makes it carry more. The learning rate steps
once per pair, Adam twice. Source: arXiv 2602.18196, active recurrence learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine
from megatron.training.global_vars import get_args
from megatron.training.training import force_param_sync, should_disable_forward_pre_hook

from rat_megatron.model.core_attention import set_attention_pattern
from rat_megatron.pattern import AttentionPattern


class ReplayIterator:
    """An iterator of microbatches that can give the ones it gave since ``mark()`` once more.

    Megatron's RerunDataIterator, which wraps it, forgets its own copies at every training step.
    """

    def __init__(self, source: Iterator[Any]):
        self._source = source
        self._marked = False
        self._taken: list[Any] = []
        self._replay: list[Any] = []

    def __iter__(self) -> ReplayIterator:
        return self

    def __next__(self) -> Any:
        if self._replay:
            return self._replay.pop(0)
        item = next(self._source)
        if self._marked:
            self._taken.append(item)
        return item

    def mark(self) -> None:
        """Starts remembering what is given out."""
        self._marked, self._taken = True, []

    def rewind(self) -> None:
        """Gives everything since ``mark()`` again, then goes on."""
        self._replay = self._taken + self._replay
        self._marked, self._taken = False, []


def unwrap_iterators(data_iterator: Any) -> list[Any]:
    """Our own iterators beneath what Megatron hands to a step: one per virtual pipeline chunk, none where a rank has no data."""
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    return [it.iterable if isinstance(it, RerunDataIterator) else it for it in iterators if it is not None]


class _HeldScheduler:
    """Stands in for the learning-rate scheduler during the sparse step: the schedule counts pairs."""

    def step(self, increment: int) -> None:
        pass


def arl_train_step(train_step: Callable[..., tuple], sparse: AttentionPattern, dense: AttentionPattern) -> Callable[..., tuple]:
    """Wraps Megatron's ``train_step`` so that one iteration is the sparse step, then the dense step, on the same microbatches.

    Returns what the dense step returns, with both steps' losses and the sparse step's gradient norm in its loss dictionary.
    """

    def step(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs):
        iterators = unwrap_iterators(data_iterator)
        for iterator in iterators:
            iterator.mark()
        set_attention_pattern(model, sparse)
        first = train_step(forward_step_func, data_iterator, model, optimizer, _HeldScheduler(), *args, **kwargs)
        set_attention_pattern(model, dense)
        sparse_losses, sparse_skipped, _, should_exit, _, sparse_grad_norm, *_ = first
        if should_exit:
            return first

        for iterator in iterators:
            iterator.rewind()
        _gather_updated_parameters(model, optimizer)
        get_rerun_state_machine().current_iteration -= 1  # a pair counts as one iteration
        second = train_step(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs)

        losses, skipped, *rest = second
        losses = {**losses, **sparse_losses}
        if losses and sparse_grad_norm is not None:
            some_loss = next(iter(losses.values()))
            losses[f"grad norm {sparse}"] = some_loss.new_tensor(float(sparse_grad_norm))
        return losses, int(bool(skipped) or bool(sparse_skipped)), *rest

    return step


def _gather_updated_parameters(model, optimizer) -> None:
    """Brings the sparse step's update to every rank where no forward hook does it: in the first iteration with overlapped gathers."""
    if should_disable_forward_pre_hook(get_args()) and not model[0].remove_forward_pre_hook_handles:
        force_param_sync(model, optimizer)
