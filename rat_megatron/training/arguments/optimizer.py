"""Which optimizers train a RAT+ model, and what Muon asks of the other flags.

Megatron has Muon from NVIDIA's package emerging-optimizers. What is refused here would end in a traceback, or train otherwise than asked.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib.util import find_spec
from typing import get_args

from rat_megatron.errors import UserError

_OPTIMIZERS = ("adam", "sgd", "muon")


def check_optimizer(args: Namespace) -> None:
    """Raises UserError, naming the flag and the remedy, for an optimizer that RAT+ does not have, or flags that do not fit it."""
    if args.optimizer == "dist_muon":
        raise UserError("--optimizer dist_muon is Megatron's old name: give --optimizer muon with --use-distributed-optimizer")
    if args.optimizer not in _OPTIMIZERS:
        raise UserError(f"--optimizer {args.optimizer} is not supported: give {', '.join(_OPTIMIZERS[:-1])} or {_OPTIMIZERS[-1]}")
    if args.optimizer == "muon":
        _check_package()
        _check_muon(args)
    elif typed := next((word.split("=")[0] for word in sys.argv[1:] if word.startswith("--muon-")), None):
        raise UserError(f"{typed} would change nothing with --optimizer {args.optimizer}: leave it out, or give --optimizer muon")


def check_same_optimizer(args: Namespace, stored: Namespace, source: str) -> None:
    """Raises UserError unless the state stored in ``source`` has this optimizer's names and shapes, which differ where ranks share it."""
    remedy = "or --no-load-optim to begin its state anew"
    there, here = getattr(stored, "optimizer", args.optimizer), args.optimizer
    if there != here:
        raise UserError(
            f"the checkpoint in {source} was trained with --optimizer {there}, this run asks for {here}: give {there}, {remedy}"
        )
    shared = getattr(stored, "use_distributed_optimizer", False) or getattr(stored, "use_layer_wise_distributed_optimizer", False)
    if shared != (args.use_distributed_optimizer or args.use_megatron_fsdp):
        was, do = ("with", "give") if shared else ("without", "leave out")
        raise UserError(
            f"the checkpoint in {source} was trained {was} --use-distributed-optimizer, which keeps the optimizer's state in another form: "
            f"{do} --use-distributed-optimizer, {remedy}"
        )


def _check_package() -> None:
    if find_spec("emerging_optimizers") is None:
        raise UserError("--optimizer muon needs the package emerging-optimizers: pip install 'emerging-optimizers>=0.3,<0.4'")


def _check_muon(args: Namespace) -> None:
    if args.fp16:
        raise UserError("--optimizer muon does not train with --fp16: give --bf16, or neither")
    if args.use_distributed_optimizer and not args.bf16:
        raise UserError("--optimizer muon with --use-distributed-optimizer needs --bf16: give it, or leave out --use-distributed-optimizer")
    unfit = {
        "--swiglu": args.swiglu,  # it would orthogonalize the gate and the up projection as one matrix
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer,
        "--optimizer-cpu-offload": args.optimizer_cpu_offload,
        "--optimizer-cuda-graph": args.optimizer_cuda_graph,  # the learning rate would stay that of the capture
        "--fp8-param-gather": args.fp8_param_gather,
        "--fp4-param-gather": args.fp4_param_gather,
        "--overlap-param-gather-with-optimizer-step": args.overlap_param_gather_with_optimizer_step,
        "--num-distributed-optimizer-instances above 1": args.num_distributed_optimizer_instances > 1,
        "--no-use-layer-wise-param-layout": not args.use_layer_wise_param_layout,
        "--muon-scalar-optimizer lion": args.muon_scalar_optimizer != "adam",
        "--muon-fp32-matmul-prec low": args.muon_fp32_matmul_prec == "low",  # torch has no such precision
        "--muon-num-ns-steps below 1": args.muon_num_ns_steps < 1,
    }
    for flag, is_given in unfit.items():
        if is_given:
            raise UserError(f"--optimizer muon is not supported with {flag}: leave it out")
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.use_distributed_optimizer and args.cuda_graph_impl == "full_iteration" and args.world_size > model:
        # No such run has ended well yet; none has been seen on GPUs in a process of its own.
        raise UserError(
            "--optimizer muon with --use-distributed-optimizer has not been tried under --cuda-graph-impl on several data-parallel ranks: "
            "leave either out"
        )
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT

    known = [name for name in get_args(NSCoeffT) if name != "custom"]  # which no flag gives the values of
    if args.muon_coefficient_type not in known:
        raise UserError(f"--muon-coefficient-type {args.muon_coefficient_type} is not known: give one of {', '.join(known)}")
