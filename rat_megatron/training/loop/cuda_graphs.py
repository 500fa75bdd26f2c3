"""CUDA graphs of whole training steps, one for every attention pattern: the host starts a step at once, not kernel by kernel.

Megatron's own graph of a full iteration is one for all of training, and would replay the pattern that it was captured under.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader
from megatron.core.optimizer.optimizer_cuda_graph import OptimizerCudaGraphWrapper
from megatron.core.utils import unwrap_model

from rat_megatron.model.core_attention import get_attention_pattern


class CudaGraphs:
    """The graphs of one run. Megatron keeps a graph on its class, where they take turns; close() lets go of all and their memory."""

    def __init__(self):
        self._of_pattern: dict[str, tuple[dict[str, Any], ...]] = {}  # what FullCudaGraphWrapper keeps on its class

    def wrapper(self, base: type[FullCudaGraphWrapper]) -> type[FullCudaGraphWrapper]:
        """Takes the place of FullCudaGraphWrapper, around a forward-backward function of Megatron's; validation runs without a graph."""
        of_pattern = self._of_pattern

        class CudaGraphOfEachPattern(base):
            def __call__(self, **kwargs: Any) -> list[dict[str, torch.Tensor]]:
                """The losses of every microbatch, as the wrapped function returns them. loss_spikes.py looks at their mean."""
                if kwargs["forward_only"]:
                    return self.forward_backward_func(**kwargs)
                nothing_yet = {"training": 0}, {"training": None}, {"training": None}
                state = of_pattern.setdefault(str(get_attention_pattern(unwrap_model(kwargs["model"][0]))), nothing_yet)
                base.curr_iteration, base.cuda_graph, base.result = state
                return super().__call__(**kwargs)

        return CudaGraphOfEachPattern

    def close(self) -> None:
        """The optimizer's graph goes too."""
        self._of_pattern.clear()
        FullCudaGraphWrapper.curr_iteration, FullCudaGraphWrapper.cuda_graph = {"training": 0}, {"training": None}
        FullCudaGraphWrapper.result = {"training": None}
        OptimizerCudaGraphWrapper.curr_iteration, OptimizerCudaGraphWrapper.cuda_graph, OptimizerCudaGraphWrapper.result = 0, None, None
        StaticBufferLoader.static_buffers = {"training": [], "validation": []}
