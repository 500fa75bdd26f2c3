"""What a training step changes, kept on its device before the step and put back, bit by bit, where the step is to leave no trace.

Of a distributed optimizer these are this rank's own shards; the other ranks' weights come back with the gather that follows an update.
Everything is put back in place, as CUDA graphs and Megatron's buffers know tensors by their address.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training.global_vars import get_args
from megatron.training.training import force_param_sync, should_disable_forward_pre_hook
from torch import Tensor


class Snapshot:
    """A copy of weights, optimizer state, FP8 scales and random states; its memory is taken once."""

    def __init__(self):
        self._copies: dict[tuple, Tensor] = {}
        self._steps: list[Any] = []
        self._random: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, model: list, optimizer: Any) -> None:
        """Copies what there is now, over what was copied before."""
        tensors = dict(_tensors(model, optimizer))
        if self._copies.keys() != tensors.keys():
            self._copies = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
        torch._foreach_copy_(list(self._copies.values()), [tensors[key] for key in self._copies])
        self._steps = [group.get("step") for group in _groups(optimizer)]
        self._random = {name: state.clone() for name, state in _random_states().items()}

    @torch.no_grad()
    def put_back(self, model: list, optimizer: Any) -> bool:
        """Makes all as it was; every rank calls this. False, and nothing has changed, where the step has made state that was not there."""
        tensors = dict(_tensors(model, optimizer))
        new = torch.tensor([self._copies.keys() != tensors.keys()], dtype=torch.int, device="cuda")  # some ranks may have no parameters
        torch.distributed.all_reduce(new, op=torch.distributed.ReduceOp.MAX)
        if new.item():
            return False
        torch._foreach_copy_([tensors[key] for key in self._copies], list(self._copies.values()))
        for group, step in zip(_groups(optimizer), self._steps, strict=True):
            if not isinstance(step, Tensor | None):
                group["step"] = step
        _set_random_states(self._random)
        _gather_weights(model, optimizer)
        return True


def _tensors(model: list, optimizer: Any) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor that a step changes, but gradients, under a key that stays the same."""
    for number, part in enumerate(_parts(optimizer)):
        inner = part.optimizer
        params = [param for group in inner.param_groups for param in group["params"]]
        # Weights of 16 bits beside their fp32 copies, which the inner optimizer has: shards of the distributed optimizer, or whole.
        groups = [*getattr(part, "shard_float16_groups", []), *getattr(part, "float16_groups", [])]
        known = {id(param) for param in params}  # --use-precision-aware-optimizer updates those shards themselves
        params += [param for group in groups for param in group if id(param) not in known]
        for index, param in enumerate(params):
            yield (number, index), param.detach()
            for kind, states in (("state", inner.state), ("scale", getattr(inner, "_scales", {}))):  # scales of 16-bit moments
                for name, value in states.get(param, {}).items():
                    if isinstance(value, Tensor):
                        yield (number, index, kind, name), value
        for index, group in enumerate(inner.param_groups):
            if isinstance(group.get("step"), Tensor):  # under --optimizer-cuda-graph
                yield (number, "step", index), group["step"]
    for chunk, module in enumerate(model):
        for name, layer in module.named_modules():
            for kind in ("scaling_fwd", "scaling_bwd"):  # Transformer Engine's FP8 with delayed scaling
                state = getattr(layer, "fp8_meta", {}).get(kind)
                for attribute, value in vars(state).items() if state is not None else ():
                    if isinstance(value, Tensor):
                        yield (chunk, name, kind, attribute), value


def _parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers around one of torch's kind each; a rank may have no parameters for one. Muon's chain is in a chain."""
    if chained := getattr(optimizer, "chained_optimizers", None):
        return [part for one in chained for part in _parts(one)]
    return [] if getattr(optimizer, "is_stub_optimizer", False) else [optimizer]


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return [group for part in _parts(optimizer) for group in part.optimizer.param_groups]


def _random_states() -> dict[str, Tensor]:
    """RAT+ draws nothing; --hidden-dropout does."""
    tracked = get_cuda_rng_tracker().get_states()
    states = {name: state.get_state() if isinstance(state, torch.Generator) else state for name, state in tracked.items()}
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(), **states}


def _set_random_states(states: dict[str, Tensor]) -> None:
    tracker = get_cuda_rng_tracker()
    tracked = tracker.get_states()
    for name, state in tracked.items():
        if isinstance(state, torch.Generator):  # of CUDA graphs, which keep to it
            state.set_state(states[name])
        else:
            tracked[name] = states[name].clone()
    tracker.set_states(tracked)
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["cuda"])


def _gather_weights(model: list, optimizer: Any) -> None:
    """Brings what only one rank has of the weights to every other, where the next forward pass will not."""
    overlapped = should_disable_forward_pre_hook(get_args()) and model[0].remove_forward_pre_hook_handles
    if model[0].ddp_config.use_distributed_optimizer and not overlapped:  # Muon's too
        force_param_sync(model, optimizer)
