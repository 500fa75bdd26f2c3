"""Validation loss of one model under several attention patterns, each on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.training.global_vars import get_args

from rat_megatron.model.core_attention import set_attention_pattern
from rat_megatron.ratplus.pattern import AttentionPattern
from rat_megatron.training.arguments.data import ONE_SET
from rat_megatron.training.loop.arl import unwrap_iterators
from rat_megatron.training.monitoring.metrics import RunMetrics


class RestartableIterator:
    """An iterator over one of several sets, each of which can be iterated again; ``restart`` goes to the beginning of a set."""

    def __init__(self, sets: list[Iterable[Any]]):
        self._sets, self._current = sets, 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> RestartableIterator:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._sets[self._current])
        return next(self._iterator)

    def restart(self, current: int = 0) -> None:
        self._iterator, self._current = None, current


def loss_name(pattern: AttentionPattern, target: AttentionPattern) -> str:
    """The name of a loss in logs and on TensorBoard: 'lm loss' for the pattern the run trains, 'lm loss d64' for another."""
    return "lm loss" if pattern == target else f"lm loss {pattern}"


def evaluate_patterns(
    evaluate_and_print_results: Callable, patterns: list[AttentionPattern], target: AttentionPattern, metrics: RunMetrics
) -> Callable:
    """Wraps Megatron's ``evaluate_and_print_results``: every evaluation is one per pattern and validation set, from its first batch on."""

    def evaluate(prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs):
        metrics.iteration = iteration
        sets = dict(get_args().rat_validation_sets)
        for pattern in patterns:
            set_attention_pattern(model, pattern)
            for index, (name, iterations) in enumerate(sets.items()):
                for iterator in unwrap_iterators(data_iterator):
                    iterator.restart(index)
                metrics.validation_set = name
                batches = data_iterator if name == ONE_SET else [data_iterator]
                with _named_by_megatron(name, iterations):
                    evaluate_and_print_results(prefix, forward_step_func, batches, model, iteration, *args, **kwargs)
        set_attention_pattern(model, target)

    return evaluate


@contextmanager
def _named_by_megatron(name: str, iterations: int) -> Iterator[None]:
    """Lets Megatron name a set among several as it does: 'validation-NAME' in the log and in TensorBoard.

    It is the only one of Megatron's --multiple-validation-sets meanwhile, as those could be neither restarted nor used in a pipeline with
    virtual stages, and never without --full-validation.
    """
    args = get_args()
    changes: dict[str, Any] = {"multiple_validation_sets": True, "validation_set_names": [name], "eval_iters": [iterations]}
    before = {key: getattr(args, key) for key in changes}
    vars(args).update(changes if name != ONE_SET else {})
    try:
        yield
    finally:
        vars(args).update(before)


def record_losses(evaluate: Callable, target: AttentionPattern, metrics: RunMetrics) -> Callable:
    """Wraps Megatron's ``evaluate`` so that the losses it returns also reach the run's metrics."""

    def recording(*args, **kwargs):
        losses, *rest = evaluate(*args, **kwargs)
        for name, loss in (losses or {}).items():
            metrics.add_loss(name.removeprefix("lm loss").strip() or str(target), float(loss))
        return losses, *rest

    return recording
