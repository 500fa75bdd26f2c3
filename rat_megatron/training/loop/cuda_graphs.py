"""CUDA graphs of whole training steps, one for every attention pattern: the host starts a step at once, not kernel by kernel.

Megatron's own graph of a full iteration is one for all of training, and would replay the pattern and the number of microbatches that it
was captured with.
"""

from __future__ import annotations

import gc
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
        self._num_microbatches: int | None = None  # of the graphs there are

    def wrapper(self, base: type[FullCudaGraphWrapper]) -> type[FullCudaGraphWrapper]:
        """Takes the place of FullCudaGraphWrapper, around a forward-backward function of Megatron's; validation runs without a graph."""
        of_pattern, begin = self._of_pattern, self._begin

        class CudaGraphOfEachPattern(base):
            def __call__(self, **kwargs: Any) -> list[dict[str, torch.Tensor]]:
                """The losses of every microbatch, as the wrapped function returns them. loss_spikes.py looks at their mean."""
                if kwargs["forward_only"]:
                    return self.forward_backward_func(**kwargs)
                begin(kwargs["num_microbatches"])
                nothing_yet = {"training": 0}, {"training": None}, {"training": None}
                state = of_pattern.setdefault(str(get_attention_pattern(unwrap_model(kwargs["model"][0]))), nothing_yet)
                base.curr_iteration, base.cuda_graph, base.result = state
                return super().__call__(**kwargs)

        return CudaGraphOfEachPattern

    def close(self) -> None:
        """The optimizer's graph goes too."""
        self._forget()
        OptimizerCudaGraphWrapper.curr_iteration, OptimizerCudaGraphWrapper.cuda_graph, OptimizerCudaGraphWrapper.result = 0, None, None
        StaticBufferLoader.static_buffers = {"training": [], "validation": []}

    def _begin(self, num_microbatches: int) -> None:
        """Where a step has another number of microbatches than the one before, the graphs go before others are captured."""
        if self._num_microbatches not in (None, num_microbatches):
            torch.cuda.synchronize()
            self._forget()
            gc.collect()
            torch.cuda.empty_cache()  # the memory of graphs is of no use to anything else until then
        self._num_microbatches = num_microbatches

    def _forget(self) -> None:
        self._of_pattern.clear()
        FullCudaGraphWrapper.curr_iteration, FullCudaGraphWrapper.cuda_graph = {"training": 0}, {"training": None}
        FullCudaGraphWrapper.result = {"training": None}
