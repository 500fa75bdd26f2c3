"""Layers beyond the paper's, with Transformer Engine: fused they train as Megatron's own do in torch, in FP8 and as CUDA graphs as well."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine", exc_type=ImportError)

from benchmarks import megatron_runs
from tests.gpu.test_training_gpu import GRAPHS, data, losses_of  # noqa: F401, a fixture

FP8 = " ".join(megatron_runs.FP8)
LAYERS = {
    "llama3": "--group-query-attention --num-query-groups 1 --no-rat-output-gate --use-rope-scaling --rope-scaling-factor 32",
    "qwen2.5": "--add-qkv-bias --no-rat-output-gate --kv-channels 64",
    "qwen3": "--qk-layernorm --rat-gate-bias --kv-channels 96",
    "olmo2": "--qk-layernorm --rat-qk-layernorm-over-heads --rat-norm-after --no-rat-output-gate",
    "smollm3": "--no-rope-freq 2 --untie-embeddings-and-output-weights --kv-channels 64 --num-attention-heads 3",
    "partial rotary": "--rotary-percent 0.5 --add-qkv-bias --rat-gate-bias --kv-channels 256",
}


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_fused_changes_no_training(data, monkeypatch, layer):  # noqa: F811
    flags = f"--swiglu {LAYERS[layer]}"
    fused = losses_of(data, flags)
    assert fused[-1, 0] < fused[0, 0] - 0.1
    coarse = losses_of(data, f"{flags} {FP8}")
    graphs = losses_of(data, f"{flags} {FP8} {GRAPHS}")
    monkeypatch.setenv("RAT_KERNELS", "torch")
    plain = losses_of(data, f"{flags} --no-gradient-accumulation-fusion --transformer-impl local")
    for name, actual, expected, tolerance in (("bf16", fused, plain, 2e-2), ("fp8", coarse, fused, 5e-2), ("graphs", graphs, coarse, 2e-2)):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0, msg=lambda text, name=name: f"{name}: {text}")
