"""Validation loss of one model under several attention patterns, each on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rat_megatron.model.core_attention import set_attention_pattern
from rat_megatron.ratplus.pattern import AttentionPattern
from rat_megatron.training.loop.arl import unwrap_iterators
from rat_megatron.training.monitoring.metrics import RunMetrics


class RestartableIterator:
    """An iterator over something that can be iterated again; ``restart()`` sends it back to the beginning."""

    def __init__(self, batches: Iterable[Any]):
        self._batches = batches
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> RestartableIterator:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._batches)
        return next(self._iterator)

    def restart(self) -> None:
        self._iterator = None


def loss_name(pattern: AttentionPattern, target: AttentionPattern) -> str:
    """The name of a loss in logs and on TensorBoard: 'lm loss' for the pattern the run trains, 'lm loss d64' for another."""
    return "lm loss" if pattern == target else f"lm loss {pattern}"


def evaluate_patterns(
    evaluate_and_print_results: Callable, patterns: list[AttentionPattern], target: AttentionPattern, metrics: RunMetrics
) -> Callable:
    """Wraps Megatron's ``evaluate_and_print_results``: every evaluation is one per pattern, from the first validation batch on."""

    def evaluate(prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs):
        metrics.iteration = iteration
        for pattern in patterns:
            set_attention_pattern(model, pattern)
            for iterator in unwrap_iterators(data_iterator):
                iterator.restart()
            evaluate_and_print_results(prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs)
        set_attention_pattern(model, target)

    return evaluate


def record_losses(evaluate: Callable, target: AttentionPattern, metrics: RunMetrics) -> Callable:
    """Wraps Megatron's ``evaluate`` so that the losses it returns also reach the run's metrics."""

    def recording(*args, **kwargs):
        losses, *rest = evaluate(*args, **kwargs)
        for name, loss in (losses or {}).items():
            metrics.add_loss(name.removeprefix("lm loss").strip() or str(target), float(loss))
        return losses, *rest

    return recording
