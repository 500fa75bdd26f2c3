"""Pretrain or adapt a RAT+ language model with Megatron: the counterpart of Megatron's pretrain_gpt.py.

python pretrain_rat.py --rat-preset tiny --data-path DATA --save CHECKPOINTS
torchrun --nproc-per-node 8 pretrain_rat.py --rat-preset 1.5b --data-path DATA --save CHECKPOINTS --tensorboard-dir TB
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial

from rat_megatron.training.loop.exit_signal import EarlyExitSignal

EXIT_SIGNAL = EarlyExitSignal()  # before the imports that follow, which take a while

from rat_megatron.errors import exit_2_on_bad_input  # noqa: E402
from rat_megatron.platform.cpu import patch_megatron_for_cpu, use_cpu_if_no_cuda  # noqa: E402

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists on it with tensor parallelism
ON_CPU = use_cpu_if_no_cuda()  # before Megatron is imported

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model  # noqa: E402
from megatron.training import get_args, get_timers, pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from rat_megatron.checkpoint.run_marker import clear_finished, mark_finished  # noqa: E402
from rat_megatron.data.loader.batches import train_batches, validation_batches  # noqa: E402
from rat_megatron.data.loader.streams import parse_data_path  # noqa: E402
from rat_megatron.model.builder import rat_model_config_from_args  # noqa: E402
from rat_megatron.model.core_attention import get_attention_pattern  # noqa: E402
from rat_megatron.ratplus.pattern import AttentionPattern  # noqa: E402
from rat_megatron.training.arguments import parse_arguments  # noqa: E402
from rat_megatron.training.loop.arl import StepIterator  # noqa: E402
from rat_megatron.training.loop.validation import RestartableIterator, loss_name  # noqa: E402
from rat_megatron.training.monitoring.loss_spikes import nan_noted  # noqa: E402
from rat_megatron.training.monitoring.watchdog import Watchdog  # noqa: E402
from rat_megatron.training.patches.megatron_hooks import install_hooks  # noqa: E402


def data_provider(num_samples: list[int | None], vp_stage: int | None = None):
    """Iterators of microbatches for training, positioned by the samples consumed so far, and for validation; no test set.

    Megatron calls it once for every virtual pipeline chunk: each gets iterators of its own over the same batches.
    """
    if not vp_stage:
        train, valid = _build_batches()
        chunks = get_args().virtual_pipeline_model_parallel_size or 1
        data_provider.of_chunks = [(branch, valid) for branch in (itertools.tee(train, chunks) if train else [None] * chunks)]
    train, valid = data_provider.of_chunks[vp_stage or 0]
    return train and StepIterator(train), valid and RestartableIterator(valid), None


data_provider.is_distributed = True  # every rank reads its own samples; ranks of one model replica read the same


def _build_batches():
    """What the streams of --data-path give this rank: training microbatches without end and those of one validation."""
    args = get_args()
    streams = parse_data_path(args.data_path)
    common = {
        "seq_length": args.seq_length,
        "eod_id": args.rat_eod_id,
        "data_parallel": (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()),
        "num_workers": args.num_workers,
        "cache": args.data_cache_path,
    }
    train = valid = None
    if not args.skip_train:
        train = train_batches(
            streams,
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            seed=args.seed,
            consumed_samples=args.consumed_train_samples,
            cache_limit=args.rat_data_cache_limit,
            **common,
        )
    if args.eval_iters:
        valid = validation_batches(
            streams,
            global_batch_size=args.eval_global_batch_size,
            micro_batch_size=args.eval_micro_batch_size,
            num_samples=args.eval_iters * args.eval_global_batch_size,
            **common,
        )
    return train, valid


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
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=torch.isnan if sample_ids is None else nan_noted(sample_ids),
            message="found NaN in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )
    if args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        # Megatron divides by this number and averages over the ranks: make that the mean over all their tokens.
        torch.distributed.all_reduce(num_tokens, group=mpu.get_context_parallel_group())
        loss = loss * args.context_parallel_size
    return loss, num_tokens, {name: report}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: GPTModel):
    """One forward pass under the model's current attention pattern, whose loss it names."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    name = loss_name(get_attention_pattern(unwrap_model(model)), AttentionPattern.parse(get_args().rat_pattern))
    return output, partial(loss_func, batch["loss_mask"], batch["sample_ids"], name)


def main() -> None:
    with exit_2_on_bad_input():
        args = parse_arguments()
        config = pretrain_cfg_container_from_args(args, rat_model_config_from_args(args))
        if ON_CPU:
            patch_megatron_for_cpu(args.async_save)
        watchdog = Watchdog(args.rat_hang_timeout_in_mins) if args.rat_hang_timeout_in_mins else None
        install_hooks(args, EXIT_SIGNAL, watchdog)
        clear_finished(args.save)
        step = watchdog.beating(forward_step) if watchdog else forward_step
        alone = None if "MASTER_ADDR" in os.environ else torch.distributed.HashStore()  # plain python needs no rendezvous
        pretrain(config, data_provider, ModelType.encoder_or_decoder, step, store=alone)
        mark_finished(args.save)  # Megatron leaves the program where a signal or a time limit stops it
        if watchdog:
            watchdog.stop()


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
