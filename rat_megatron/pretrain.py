"""Pretrain or adapt a RAT+ language model with Megatron: the counterpart of Megatron's pretrain_gpt.py.

python -m rat_megatron.pretrain --rat-preset tiny --data-path DATA --save CHECKPOINTS
torchrun --nproc-per-node 8 -m rat_megatron.pretrain --rat-preset 1.5b --data-path DATA --save CHECKPOINTS --tensorboard-dir TB
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from rat_megatron.training.loop.exit_signal import EarlyExitSignal

EXIT_SIGNAL = EarlyExitSignal()  # before the imports that follow, which take a while

from rat_megatron.errors import exit_2_on_bad_input  # noqa: E402
from rat_megatron.platform.cpu import cpu_patches, use_cpu_if_no_cuda  # noqa: E402

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists on it with tensor parallelism
# Transformer Engine does not load the FP8 state of delayed scaling unless told so, as it is a pickle; torch has unpickled all that is no
# tensor by then.
os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
ON_CPU = use_cpu_if_no_cuda()  # before Megatron is imported

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from rat_megatron.checkpoint.retention import keep_source  # noqa: E402
from rat_megatron.checkpoint.run_marker import clear_finished, mark_finished  # noqa: E402
from rat_megatron.model.config import rat_model_config_from_args  # noqa: E402
from rat_megatron.training.arguments import parse_arguments  # noqa: E402
from rat_megatron.training.loop.cuda_graphs import CudaGraphs  # noqa: E402
from rat_megatron.training.loop.data_provider import DataProvider  # noqa: E402
from rat_megatron.training.loop.forward_step import forward_step  # noqa: E402
from rat_megatron.training.monitoring.metrics import RunMetrics  # noqa: E402
from rat_megatron.training.monitoring.watchdog import Watchdog  # noqa: E402
from rat_megatron.training.patches import applied  # noqa: E402
from rat_megatron.training.patches.table import megatron_patches  # noqa: E402


def main() -> None:
    """One run, as the command line says. Bad input ends with one sentence and exit code 2."""
    with exit_2_on_bad_input(), closing(CudaGraphs()) as graphs:
        args = parse_arguments()
        config = pretrain_cfg_container_from_args(args, rat_model_config_from_args(args))
        watchdog = Watchdog(args.rat_hang_timeout_in_mins) if args.rat_hang_timeout_in_mins else None
        metrics = RunMetrics(Path(args.save) if args.save else None)
        patches = megatron_patches(args, EXIT_SIGNAL, metrics, graphs, watchdog)
        if ON_CPU:
            patches += cpu_patches(args.async_save)
        clear_finished(args.save)
        keep_source(args)
        step = watchdog.beating(forward_step) if watchdog else forward_step
        alone = None if "MASTER_ADDR" in os.environ else torch.distributed.HashStore()  # plain python needs no rendezvous
        with applied(patches):
            pretrain(config, DataProvider(), ModelType.encoder_or_decoder, step, store=alone)
        mark_finished(args.save)  # Megatron leaves the program where a signal or a time limit stops it
        if watchdog:
            watchdog.stop()


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
