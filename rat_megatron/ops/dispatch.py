"""Which implementation of an operator serves some tensors: the Triton kernels, or torch, which is the definition.

An operator is a package: ``__init__`` is what others call, ``reference`` the torch functions, ``triton`` those of the same names and
signatures on the kernels of ``kernels``.
"""

from __future__ import annotations

import functools
import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F

HEAD_DIMS = range(16, 257, 16)
"""Those of the kernels of attention."""


def fill_tiles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Zeros behind the head dimension, the last, up to a power of two: they change no product of queries and keys."""
    head_dim = tensors[0].shape[-1]
    missing = (1 << (head_dim - 1).bit_length()) - head_dim
    return [F.pad(x, (0, missing)) if missing else x for x in tensors]


def triton_takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels serve these tensors: on a CUDA device, in a type they compute in, with a head dimension of whole multiples of 16.

    Never with RAT_KERNELS=torch in the environment, to see whether a kernel is at fault.
    """
    if os.environ.get("RAT_KERNELS") == "torch":
        return False
    head_dim = tensors[0].shape[-1]
    types = (torch.bfloat16, torch.float16, torch.float32)
    tileable = head_dim in HEAD_DIMS
    return tileable and all(x.is_cuda and x.dtype in types for x in tensors) and find_spec("triton") is not None


def choose(operator: str, implementation: str | None, *tensors: torch.Tensor) -> ModuleType:
    """The module of an operator's package that serves these tensors; "torch" or "triton" overrides the choice. Raises ValueError."""
    if implementation not in (None, "torch", "triton"):
        raise ValueError(f"implementation is None, 'torch' or 'triton', not {implementation!r}")
    fused = implementation == "triton" or (implementation is None and triton_takes(*tensors))
    return import_module(f"{operator}.{'triton' if fused else 'reference'}")


@functools.cache
def processor_count(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
