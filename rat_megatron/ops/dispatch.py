"""When the Triton kernels can take the place of their torch references."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def triton_takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels serve these tensors: on a CUDA device, in a type they compute in, with a head dimension that fills a tile.

    Never with RAT_KERNELS=torch in the environment, to see whether a kernel is at fault.
    """
    if os.environ.get("RAT_KERNELS") == "torch":
        return False
    head_dim = tensors[0].shape[-1]
    types = (torch.bfloat16, torch.float16, torch.float32)
    tileable = 16 <= head_dim <= 256 and not head_dim & (head_dim - 1)
    return tileable and all(x.is_cuda and x.dtype in types for x in tensors) and find_spec("triton") is not None
