"""Transformer Engine's kernels in the places of others: see ``table.py`` for the reasons."""

from __future__ import annotations

from typing import Any

import torch


class WeightGradient:
    """Apex's fused_weight_gradient_mlp_cuda on Transformer Engine's matrix product: total += grad_output^T input."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input: torch.Tensor, grad_output: torch.Tensor, total: torch.Tensor) -> None:
        """input [n, h_in], grad_output [n, h_out], total [h_out, h_in]."""
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(input, grad_output, out_dtype=total.dtype, layout="NT", out=total, accumulate=True, grad=True)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, tp_group: Any, is_cg_capturable: bool) -> torch.Tensor:
    """logits [s, b, v / tp], labels [s, b] -> losses [s, b] in fp32."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy(logits.contiguous(), labels, dist_process_group=tp_group, overwrite_input=True)
