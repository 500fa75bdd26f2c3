"""Active recurrence learning: every global batch trains twice, first under a sparse pattern, then under the model's own.

With dense attention alone the recurrence learns only a short memory; the sparse step makes it carry more. The learning rate steps
once per pair, Adam twice. Source: arXiv 2602.18196, active recurrence learning.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine
from megatron.training.global_vars import get_args
from megatron.training.training import force_param_sync, should_disable_forward_pre_hook

from rat_megatron.model.core_attention import set_attention_pattern
from rat_megatron.ratplus.pattern import AttentionPattern


class StepIterator:
    """An iterator of microbatches that draws those of a training step at once and can give them again.

    Drawing may wait for the node's other ranks, where the data begins a new epoch; under pipeline parallelism those may be waiting for
    this rank's activations. So every rank draws before it computes. Megatron's RerunDataIterator, which wraps this one, forgets its own
    copies at every call of its training step.
    """

    def __init__(self, source: Iterator[Any]):
        self._source = source
        self._step: list[Any] = []
        self._position = 0

    def __iter__(self) -> StepIterator:
        return self

    def __next__(self) -> Any:
        self._position += 1
        return self._step[self._position - 1]

    def load(self, count: int) -> None:
        """Draws the next ``count`` microbatches, in the place of those before."""
        self._step, self._position = [next(self._source) for _ in range(count)], 0

    def sample_ids(self) -> list[int]:
        """The samples of the step's microbatches, as the streams count them."""
        return [number for microbatch in self._step for number in microbatch["sample_ids"].tolist()]

    def rewind(self) -> None:
        """Goes back to the first microbatch of the step."""
        self._position = 0


def step_loaded_first(train_step: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wraps Megatron's ``train_step`` so that its microbatches are drawn before anything is computed."""

    def step(forward_step_func, data_iterator, *args, **kwargs):
        for iterator in unwrap_iterators(data_iterator):
            iterator.load(get_num_microbatches())
        return train_step(forward_step_func, data_iterator, *args, **kwargs)

    return step


def leave_out_step(data_iterator: Any) -> None:
    """In the place of Megatron's ``dummy_train_step``: the step's microbatches are drawn, on every rank, and not used."""
    for iterator in unwrap_iterators(data_iterator):
        iterator.load(get_num_microbatches())
    get_rerun_state_machine().current_iteration += 1


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

    Returns what the dense step returns, with both steps' losses and the sparse step's gradient norm in its loss dictionary. Where the
    dense step ends the run it never asks for a checkpoint: the weights are then those of half an iteration.
    """

    def step(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs):
        set_attention_pattern(model, sparse)
        first = train_step(forward_step_func, data_iterator, model, optimizer, _HeldScheduler(), *args, **kwargs)
        set_attention_pattern(model, dense)
        sparse_losses, sparse_skipped, _, should_exit, _, sparse_grad_norm, *_ = first
        if should_exit:
            return first

        for iterator in unwrap_iterators(data_iterator):
            iterator.rewind()
        _gather_updated_parameters(model, optimizer)
        get_rerun_state_machine().current_iteration -= 1  # a pair counts as one iteration
        second = train_step(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs)

        losses, skipped, should_checkpoint, should_exit, *rest = second
        if should_exit:
            return losses, skipped, False, True, *rest
        again = " before the update" if sparse == dense else ""  # the same pattern twice: two losses of one name
        losses |= {f"{name}{again}": loss for name, loss in sparse_losses.items()}
        if losses and sparse_grad_norm is not None:
            some_loss = next(iter(losses.values()))
            losses[f"grad norm {sparse}"] = some_loss.new_tensor(float(sparse_grad_norm))
        return losses, int(bool(skipped) or bool(sparse_skipped)), should_checkpoint, should_exit, *rest

    return step


def names_of_values(args: Namespace) -> list[str]:
    """The names of an iteration's losses and gradient norms: of arl_train_step's loss dictionary, and of the norm beside it."""
    names = ["lm loss", "grad norm"]
    if args.rat_arl_pattern == "none":
        return names
    if args.rat_arl_pattern == args.rat_pattern:
        return [*names, "lm loss before the update", f"grad norm {args.rat_arl_pattern}"]
    return [*names, f"lm loss {args.rat_arl_pattern}", f"grad norm {args.rat_arl_pattern}"]


def _gather_updated_parameters(model, optimizer) -> None:
    """Brings the sparse step's update to every rank where no forward hook does it: in the first iteration with overlapped gathers."""
    if should_disable_forward_pre_hook(get_args()) and not model[0].remove_forward_pre_hook_handles:
        force_param_sync(model, optimizer)
