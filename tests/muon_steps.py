"""Steps of Megatron's Muon on a tiny RAT+ model, with gradients that a test makes up, and the same steps in float64 from the definition.

Sources: arXiv 2502.16982 (Muon with AdamW's scale, and AdamW for the rest); coefficients of leloykun.github.io/ponder/muon-opt-coeffs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from rat_megatron.training.patches import Patch, applied

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCABULARY = 2, 32, 8, 4, 96, 40
LR, WEIGHT_DECAY, MOMENTUM, SCALE = 0.03, 0.1, 0.95, 0.2
BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
COEFFICIENTS = (
    *((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037)),
    *((2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)),
)


def steps_of_megatron(
    folder: Path, steps: int, patches: Iterable[Patch], recurrent: bool = True, tp: int = 1, bf16: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """(weights before, gradients of each step, weights after) by name, whole, [layers, ...] where a layer has them.

    Every rank calls this, with Megatron's parallel state for ``tp``, and sees ``folder``.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from rat_megatron.model.config import RATTransformerConfig
    from rat_megatron.model.layer_spec import get_rat_block_spec

    config = RATTransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=GROUPS, ffn_hidden_size=FFN, bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32, transformer_impl="local", tensor_model_parallel_size=tp,
        rat_recurrence=recurrent, gradient_accumulation_fusion=False,
    )  # fmt: skip
    model = GPTModel(config, get_rat_block_spec(config), VOCABULARY, 8, position_embedding_type="rope")
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp_config, Float16Module(config, model) if bf16 else model)
    settings = OptimizerConfig(
        optimizer="muon", lr=LR, weight_decay=WEIGHT_DECAY, clip_grad=0.0, adam_beta1=BETA1, adam_beta2=BETA2, adam_eps=EPSILON, bf16=bf16,
        params_dtype=config.params_dtype, muon_momentum=MOMENTUM, muon_nesterov=True, muon_extra_scale_factor=SCALE,
        muon_tp_mode="duplicated", muon_fp32_matmul_prec="high",
    )  # fmt: skip
    with applied(patches):
        optimizer = get_megatron_optimizer(settings, [chunk], config_overrides={})
    before = _whole(folder / "before", model)
    gradients = []
    seed = [torch.seed()]
    torch.distributed.broadcast_object_list(seed)
    generator = torch.Generator().manual_seed(seed[0])
    for _ in range(steps):
        gradients.append({name: torch.randn(weight.shape, generator=generator) for name, weight in before.items()})
        for parameter, sharded in _sharded(model):
            part = tuple(map(slice, sharded.global_offset, map(sum, zip(sharded.global_offset, _local(sharded), strict=True))))
            parameter.main_grad.copy_(gradients[-1][sharded.key][part].view_as(parameter))
        assert optimizer.step()[0]
    return before, gradients, _whole(folder / "after", model)


def steps_of_the_definition(before: dict[str, Tensor], gradients: list[dict[str, Tensor]], recurrent: bool = True) -> dict[str, Tensor]:
    """The weights after a step for each of the gradients, in float64."""
    after = {}
    for name, weight in before.items():
        given = [gradient[name].double() for gradient in gradients]
        if "linear_" not in name or "norm" in name:
            after[name] = _adam(weight.double(), given)
            continue
        rows = [HIDDEN // HEADS * size for size in (HEADS // GROUPS, HEADS // GROUPS, 1, 1, *([1] if recurrent else []))]
        layers = zip(weight.double(), *given, strict=True)
        after[name] = torch.stack([_muon(layer[0], layer[1:], rows if "linear_qkv" in name else None) for layer in layers])
    return after


def largest_difference(before: dict[str, Tensor], expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Of the steps that the weights took, by relative norm; expected weights are rounded as the actual ones are."""
    assert before.keys() == expected.keys() == actual.keys()
    rounded = {name: weight.to(actual[name].dtype).double() for name, weight in expected.items()}
    return max(float((actual[name].double() - weight).norm() / (weight - before[name]).norm()) for name, weight in rounded.items())


def _muon(weight: Tensor, gradients: Iterable[Tensor], rows: list[int] | None) -> Tensor:
    """weight and gradients [out, in]; ``rows`` of q, gate, k, v, ... in a query group of the fused projection, None for a plain matrix."""
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = MOMENTUM * average + (1 - MOMENTUM) * gradient
        direction = (1 - MOMENTUM) * gradient + MOMENTUM * average  # Nesterov
        weight = weight - LR * WEIGHT_DECAY * weight
        if rows is None:
            weight = weight - LR * _orthogonalized(direction)
            continue
        kinds = direction.unflatten(0, (GROUPS, -1)).split(rows, dim=1)
        updates = [_orthogonalized(kind.flatten(0, 1)).unflatten(0, (GROUPS, -1)) for kind in kinds]
        weight = weight - LR * torch.cat(updates, dim=1).flatten(0, 1)
    return weight


def _orthogonalized(matrix: Tensor) -> Tensor:
    x = matrix / matrix.norm()
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return SCALE * math.sqrt(max(matrix.shape)) * x


def _adam(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        update = first / (1 - BETA1**step) / ((second / (1 - BETA2**step)).sqrt() + EPSILON)
        weight = weight - LR * WEIGHT_DECAY * weight - LR * update
    return weight


def _sharded(model):
    """Every parameter with its place in the whole."""
    parameters = dict(model.named_parameters())
    return [(parameters[name], sharded) for name, sharded in model.sharded_state_dict().items() if name in parameters]


def _local(sharded) -> tuple[int, ...]:
    return (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)


def _whole(folder: Path, model) -> dict[str, Tensor]:
    """The model's parameters, whole, by way of a checkpoint."""
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(dict(enumerate(sharded for _, sharded in _sharded(model))), str(folder))
    checkpoint = TorchDistCheckpoint(folder)
    return {key: checkpoint.read(key) for key in checkpoint.tensors}
