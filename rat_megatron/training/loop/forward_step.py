"""One forward pass of a microbatch, and its loss: what Megatron's schedules call."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
from megatron.training import get_args, get_timers

from rat_megatron.model.core_attention import get_attention_pattern
from rat_megatron.ratplus.pattern import AttentionPattern
from rat_megatron.training.loop.validation import loss_name
from rat_megatron.training.monitoring.loss_spikes import is_nan_noted

_SPIKE = 10  # times the largest of the first losses, as Megatron's pretrain_gpt.py has it


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: GPTModel):
    """One forward pass under the model's current attention pattern, whose loss it names."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    name = loss_name(get_attention_pattern(unwrap_model(model)), AttentionPattern.parse(get_args().rat_pattern))
    return output, partial(loss_func, batch["loss_mask"], batch["sample_ids"], name)


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The next microbatch on this rank's device: tokens, labels, loss_mask, position_ids [b, s / cp]; in training also sample_ids [b]."""
    microbatch = next(data_iterator)  # as StepIterator keeps it, sample_ids included
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in microbatch.items() if name != "sample_ids"}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {**batch, "sample_ids": microbatch.get("sample_ids")}


def loss_func(loss_mask: torch.Tensor, sample_ids: torch.Tensor | None, name: str, output: torch.Tensor):
    """Summed cross-entropy of the tokens that count, how many they are, and both for the log. output, loss_mask [b, s / cp]."""
    args = get_args()
    loss = (output.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    if args.check_for_nan_in_loss_and_grad:
        is_nan = torch.isnan if sample_ids is None else is_nan_noted(sample_ids)
        if torch.is_grad_enabled():
            get_rerun_state_machine().validate_result(
                result=loss, rejection_func=is_nan, message="found NaN in local forward loss calculation", tolerance=0.0, fatal=True
            )
        else:  # noted; the rerun state machine, which computes training steps again, would end an evaluation with a traceback
            is_nan(loss)
    if args.check_for_spiky_loss:
        rerun_machine = get_rerun_state_machine()
        rerun_machine.validate_result(
            result=loss.detach().clone(),  # Megatron divides the loss in place, and would find that another one than it kept
            rejection_func=partial(rerun_machine.is_unexpectedly_large, threshold=_SPIKE, context=name),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    if args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        # Megatron divides by this number and averages over the ranks: make that the mean over all their tokens.
        torch.distributed.all_reduce(num_tokens, group=mpu.get_context_parallel_group())
        loss = loss * args.context_parallel_size
    return loss, num_tokens, {name: report}
