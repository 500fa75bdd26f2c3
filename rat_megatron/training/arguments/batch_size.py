"""The global batch sizes of a run, by the samples consumed before: one for all of it, or a schedule; and which layouts can take them.

Megatron has one schedule, --step-batch-size-schedule, and ignores --rampup-batch-size, its older form; that is brought to the other here.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import pairwise
from typing import Any

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from rat_megatron.errors import UserError
from rat_megatron.training.arguments.flags import given

Steps = list[tuple[int, int]]
"""Samples consumed, and the global batch size from there on; the first from 0."""


def derive_batch_sizes(args: Namespace) -> dict[str, Any]:
    """The arguments that follow from a schedule, none without one. Raises UserError for a schedule that cannot be."""
    flag = "--rampup-batch-size" if args.rampup_batch_size else "--step-batch-size-schedule"
    if args.decrease_batch_size_if_needed:
        raise UserError(
            "--decrease-batch-size-if-needed would train other batches than the learning rate counts on: leave it out, and give batch "
            "sizes that the ranks can share"
        )
    if not (args.rampup_batch_size or args.step_batch_size_schedule):
        return {}
    if args.rampup_batch_size and args.step_batch_size_schedule:
        raise UserError("--rampup-batch-size and --step-batch-size-schedule are two schedules of one batch: give one of them")
    if args.train_iters or not args.train_samples:
        raise UserError(f"{flag} counts samples: give --train-samples in place of --train-iters")
    if args.step_batch_size_schedule and given("--global-batch-size"):
        raise UserError("--step-batch-size-schedule has every batch size of the run: leave out --global-batch-size")
    steps = _ramp(args) if args.rampup_batch_size else _parsed(args)
    for (_, before), (_, after) in pairwise(steps):
        if after <= before:
            raise UserError(
                f"{flag} goes from a batch of {before} samples to one of {after}: let every batch be larger than the one before"
            )
    if steps[-1][0] >= args.train_samples:
        raise UserError(
            f"{flag} comes to its batch of {steps[-1][1]} after {steps[-1][0]} samples, which --train-samples {args.train_samples} never "
            "reaches: let the run be longer, or the batch grow sooner"
        )
    return {
        "step_batch_size_schedule": args.step_batch_size_schedule or " ".join(f"{at * args.seq_length}:{batch}" for at, batch in steps),
        "global_batch_size": steps[-1][1],  # for what is not told the current one: Megatron's validation, among others
    }


def batch_steps(args: Namespace) -> Steps:
    """The global batch sizes of a run, for arguments that ``derive_batch_sizes`` has completed, or those of a checkpoint."""
    if getattr(args, "step_batch_size_schedule", None):
        return _parsed(args)
    return [(0, args.global_batch_size or args.micro_batch_size * _replicas(args))]


def iterations_between(consumed: int, samples: int, steps: Steps) -> int:
    """How many iterations Megatron trains from ``consumed`` samples on to ``samples``: whole batches of one size, or until a schedule's
    last one is full."""
    if len(steps) == 1:
        return max(samples - consumed, 0) // steps[0][1]
    count = 0
    for (_, batch), end in zip(steps, [*(at for at, _ in steps[1:]), samples], strict=True):
        here = max(-(-(min(end, samples) - consumed) // batch), 0)  # a batch that begins before a step's end has its size
        count, consumed = count + here, consumed + here * batch
    return count


def count_on(args: Namespace) -> None:
    """Sets ``train_iters`` of a run that resumes: the iterations of its checkpoint, and those that follow. Has the signature of Megatron's
    ``update_train_iters``, whose place it takes."""
    iteration, consumed = args.rat_resumed
    args.train_iters = iteration + iterations_between(consumed, args.train_samples, batch_steps(args))


def check_batches(args: Namespace, consumed: int) -> None:
    """Raises UserError unless every global batch that is still to come, after ``consumed`` samples, is whole microbatches for each rank."""
    replicas, pp = _replicas(args), args.pipeline_model_parallel_size
    smallest = args.micro_batch_size * replicas
    if args.train_samples and args.train_samples < batch_steps(args)[0][1]:
        raise UserError(
            f"--train-samples {args.train_samples} is less than one batch of {batch_steps(args)[0][1]}: give more, or a smaller one"
        )
    interleaved = args.num_virtual_stages_per_pipeline_rank or args.num_layers_per_virtual_pipeline_stage
    steps = batch_steps(args)
    if args.rampup_batch_size:
        what = f"--rampup-batch-size {' '.join(map(str, args.rampup_batch_size))} has batches of {{batch}} samples, which"
    elif args.step_batch_size_schedule:
        what = "--step-batch-size-schedule has batches of {batch} samples, which"
    else:
        what = "--global-batch-size {batch}"
    for (_, batch), end in zip(steps, [*(at for at, _ in steps[1:]), None], strict=True):
        if end is not None and end <= consumed:
            continue
        if batch % smallest:
            raise UserError(
                f"{what.format(batch=batch)} is not a multiple of --micro-batch-size {args.micro_batch_size} times the {replicas} "
                f"data-parallel ranks: choose a multiple of {smallest}"
            )
        if interleaved and args.microbatch_group_size_per_vp_stage is None and batch // smallest % pp:
            raise UserError(
                f"virtual pipeline stages take microbatches in groups of --pipeline-model-parallel-size {pp}, and a rank has "
                f"{batch // smallest}: {what.format(batch=batch)} must be a multiple of {smallest * pp}"
            )


def _replicas(args: Namespace) -> int:
    return args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size)


def _ramp(args: Namespace) -> Steps:
    """--rampup-batch-size START INCREMENT SAMPLES, as Megatron had it: equally many samples with every batch below the last one."""
    words = " ".join(map(str, args.rampup_batch_size))
    start, increment, samples = args.rampup_batch_size
    if min(start, increment, samples) <= 0:
        raise UserError(f"--rampup-batch-size {words}: START, INCREMENT and SAMPLES must be above 0")
    if not args.global_batch_size:
        raise UserError("--rampup-batch-size needs the batch size to arrive at: give --global-batch-size")
    count, rest = divmod(args.global_batch_size - start, increment)
    if rest or count < 1:
        raise UserError(
            f"--rampup-batch-size {words} does not arrive at --global-batch-size {args.global_batch_size}: let START be below it, and "
            "INCREMENT divide the difference"
        )
    if samples < count:
        raise UserError(f"--rampup-batch-size {words} has {count} increments: give as many samples at least")
    return [(-(-index * samples // count), start + index * increment) for index in range(count + 1)]


def _parsed(args: Namespace) -> Steps:
    """--step-batch-size-schedule as Megatron reads it."""
    words = args.step_batch_size_schedule
    try:
        steps = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(words, args.seq_length)
    except (ValueError, OverflowError):
        raise UserError(f"--step-batch-size-schedule '{words}': write TOKENS:BATCH TOKENS:BATCH ..., such as '0:256 10B:512'") from None
    starts = [at for at, _ in steps]
    if (
        not steps
        or words.split(":")[0].strip() != "0"
        or starts[0] != 0
        or any(after <= before for before, after in pairwise(starts))
        or min(batch for _, batch in steps) <= 0
    ):
        raise UserError(
            f"--step-batch-size-schedule '{words}': the first batch is one of 0 tokens, every later one begins at least a sample of "
            f"{args.seq_length} tokens after the one before, and all are above 0"
        )
    return steps
