"""What Megatron's optimizer becomes, mostly in its checkpoints: see ``table.py`` for the reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import tag_params_for_buffer_routing

from rat_megatron.errors import UserError

_LOW, _HIGH = -(2**15), 2**15 - 1


def decay_every_parameter(get_megatron_optimizer_config):
    def get_config(args: Any):
        config, overrides = get_megatron_optimizer_config(args)
        return config, {key: value for key, value in overrides.items() if value.get("wd_mult") != 0.0}

    return get_config


def with_forget_gate(get_qkv_split_shapes: Callable) -> Callable:
    """Wraps ``_get_qkv_split_shapes``: rows of a query group in the fused projection, of query, output gate, key and value."""

    def shapes(config: Any) -> list[int]:
        return get_qkv_split_shapes(config) + ([config.kv_channels] if getattr(config, "rat_recurrence", False) else [])

    return shapes


def with_matrices_apart(ddp_wrap: Callable) -> Callable:
    """Wraps ``_ddp_wrap`` as wrap_model_chunks_with_ddp() in megatron/training/training.py goes about it."""

    def wrap(model: list, data_parallel_random_init: bool, ddp_config: Any, *rest: Any, **kwargs: Any) -> list:
        tag_params_for_buffer_routing(model)
        return ddp_wrap(model, data_parallel_random_init, replace(ddp_config, use_distributed_optimizer=True), *rest, **kwargs)

    return wrap


def begun(state_dict: Callable) -> Callable:
    def begin(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            for parameter in (parameter for group in self.optimizer.param_groups for parameter in group["params"]):
                moments = {key: torch.zeros_like(parameter) for key in self.optimizer_state_keys}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    return begin


def without_step(set_states: Callable) -> Callable:
    def set_all_but_step(self: Any, parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        set_states(self, parameter, {"step": None, **tensors})  # what is no tensor is left as it is

    return set_all_but_step


def with_steps_apart(load_state_dict: Callable) -> Callable:
    def load(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    return load


# ---- fp32 main parameters that Transformer Engine's Adam keeps as what the bf16 parameter lacks: the difference of their bits ----------


def with_whole_main_params(get_states: Callable) -> Callable:
    """Wraps DistributedOptimizer's ``_get_main_param_and_optimizer_states``: the main parameter comes out as fp32."""

    def get(self: Any, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = get_states(self, model_param)
        if tensors["param"].dtype == torch.int16:
            tensors["param"] = join(_parameter(self, model_param), tensors["param"])
        return tensors

    return get


def with_main_params_split(set_states: Callable) -> Callable:
    """Wraps ``_set_main_param_and_optimizer_states``: an fp32 main parameter goes in as what the optimizer keeps of it."""

    def set_split(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and getattr(self.optimizer, "store_param_remainders", False):
            parameter = _parameter(self, model_param)
            if parameter.dtype == torch.bfloat16:
                tensors = tensors | {"param": split(parameter, tensors["param"].to(parameter.device))}
        set_states(self, model_param, tensors)

    return set_split


def join(parameter: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 main parameter of a bf16 parameter and its int16 remainder, all of one shape."""
    return (_bits(parameter) + remainder.to(torch.int32)).view(torch.float32)


def split(parameter: torch.Tensor, main: torch.Tensor) -> torch.Tensor:
    """The int16 remainder of a main parameter, fp32, beside the bf16 parameter that was rounded from it, all of one shape.

    join() gives the main parameter back bit by bit, but for one in the middle between two bf16 numbers that was rounded down to even,
    as torch rounds and this optimizer does not: it loses its last bit. Raises UserError if ``parameter`` was not rounded from ``main``.
    """
    difference = main.float().contiguous().view(torch.int32) - _bits(parameter)
    if ((difference < _LOW) | (difference > _HIGH + 1)).any():
        raise UserError("a bf16 parameter of the checkpoint is not its fp32 main parameter, rounded: resume from another --ckpt-step")
    return difference.clamp(_LOW, _HIGH).to(torch.int16)


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().contiguous().view(torch.int16).to(torch.int32) << 16


def _parameter(optimizer: Any, model_param: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter of the model, as the optimizer updates it."""
    group, order = optimizer.model_param_group_index_map[model_param]
    return optimizer.optimizer.param_groups[group]["params"][order]
