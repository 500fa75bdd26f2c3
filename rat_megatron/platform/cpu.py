"""Lets Megatron run on a machine without CUDA: the same loop, optimizer and checkpoints, over gloo, on the CPU.

It is how a newcomer tries rat-megatron and how its parallelism is tested. Megatron names CUDA devices, streams and random states in
plain words all over; here those words are given a CPU meaning. Nothing of this runs where a CUDA device is present.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import os
import queue
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rat_megatron.training.patches import Patch, applied


def use_cpu_if_no_cuda() -> bool:
    """Turns the CPU platform on unless CUDA is present; call before Megatron is imported. Returns whether it is on."""
    if torch.cuda.is_available():
        return False
    if not getattr(torch.cuda, "_rat_cpu_platform", False):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's fusers would otherwise compile for minutes
        importlib.import_module("torch._dynamo").config.disable = True  # also those that were made before
        warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer-engine)")  # neither runs without CUDA
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
        _replace_cuda_functions()
        _CudaWordsMeanCpu().__enter__()
        # torch turns a mode off while it handles a function; Tensor.backward is one, and runs the backward functions of Megatron.
        torch.autograd._engine_run_backward = _with_cuda_words(torch.autograd._engine_run_backward)
        torch.cuda._rat_cpu_platform = True
        if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
            print("rat-megatron: no CUDA device here, running on the CPU over gloo", flush=True)
    return True


def cpu_patches(async_save: bool = False) -> list[Patch]:
    """The few places where Megatron insists on CUDA; call after use_cpu_if_no_cuda() returned True."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.training.training as training

    without_cuda = functools.partial(functools.partial, allow_no_cuda=True)
    patches = [
        Patch(training, "initialize_megatron", without_cuda, "It asserts torch.cuda.is_available() unless told otherwise."),
        Patch(megatron_random, "_lazy_call", lambda _: lambda call: call(), "torch would queue these calls until CUDA comes up."),
        Patch(megatron_random, "_lazy_init", lambda _: lambda: None, "The same."),
    ]
    if not async_save:
        why = (
            "Writers report through a process of their own, spawned to keep clear of CUDA: it imports the whole program anew, and outlives "
            "a killed run. Without CUDA, and without writing in the background, a queue in this process does."
        )
        patches += [Patch(filesystem_async, "_results_queue", lambda _: queue.Queue(), why)]
    return patches


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """In the block Megatron's modules run on the CPU, uncompiled, with a GPU present or not; at its end torch is as it was."""
    current = Patch(torch.cuda, "current_device", lambda _: lambda: 0, "RoPE's angles are made on it; asking for it would start CUDA.")
    # Megatron compiles some functions, which takes minutes on a CPU.
    with applied([current]), _CudaWordsMeanCpu(), torch.compiler.set_stance("force_eager"):
        yield


def _is_cuda(device: Any) -> bool:
    """Whether a value given as a device means CUDA: "cuda", "cuda:1", torch.device("cuda") or an index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, int) and not isinstance(device, bool))


class _CudaWordsMeanCpu(TorchFunctionMode):
    """Rewrites device arguments that mean CUDA, and makes moves to the device the identity."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer sorts parameters by the names of CUDA tensor types.
            return func(args[0]).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _with_cuda_words(function: Callable) -> Callable:
    def run(*args, **kwargs):
        with _CudaWordsMeanCpu():
            return function(*args, **kwargs)

    return run


class _NoStream:
    """A stream or event that does nothing: on the CPU everything has already happened."""

    cuda_stream = 0
    priority = 0
    device = torch.device("cpu")

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _replace_cuda_functions() -> None:
    """Gives torch.cuda's functions a meaning on the CPU. Each gets a function of its own: Dynamo refuses one under two names."""
    cuda = torch.cuda
    stream = _NoStream()

    cuda.current_device = lambda: 0
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.get_device_name = lambda device=None: "cpu"
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="cpu", total_memory=0, major=0, minor=0, multi_processor_count=os.cpu_count()
    )

    # The CPU's own generator stands for the device's.
    cuda.default_generators = (torch.default_generator,)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)

    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    for module, name in [(cuda, name) for name in _NOTHING_TO_DO] + [(cuda.nvtx, "range_push"), (cuda.nvtx, "range_pop")]:
        setattr(module, name, lambda *args, **kwargs: None)
    for name in _NO_MEMORY:
        setattr(cuda, name, lambda device=None: 0)
    cuda.memory_stats = lambda device=None: defaultdict(int)


_NOTHING_TO_DO = ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats")
_NO_MEMORY = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved", "device_memory_used")
