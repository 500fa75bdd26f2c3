"""Every Triton kernel compiles for an H100, on any machine: the compiler refuses what the interpreter of the other tests takes."""

from __future__ import annotations

import importlib
import math
import os
import re
from pathlib import Path

import pytest
import torch

import rat_megatron.ops
from rat_megatron.ratplus.pattern import AttentionPattern, HeadPattern

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1" or "nvidia" not in triton.backends.backends:
    pytest.skip("needs Triton's compiler for NVIDIA GPUs", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = pytest.mark.slow

HN = 128  # of every released model


class Hopper:
    """Stands for the driver of a GPU, as far as compilation asks it."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return -1  # no real one, whose kernels are kept apart

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> dict[str, int]:
    """Launches compile and do nothing else; notes each kernel's name and how many bytes of shared memory it takes."""
    names: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        names[self.__name__] = max(names.get(self.__name__, 0), kernel.metadata.shared)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return names


def random(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def tables(length: int, hn: int = HN) -> list[torch.Tensor]:
    return [table(torch.rand(length, hn // 2)) for table in (torch.cos, torch.sin)]


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def scans(dtype: torch.dtype) -> None:
    from rat_megatron.ops.gated_scan import triton as ops

    f, k, v = (random(70, 1, 2, HN, dtype=dtype) for _ in range(3))
    backward(*ops.gated_scan(f, k, v, torch.zeros(2, 1, 2, HN)))
    with torch.no_grad():
        ops.gated_scan(*(random(8192, 1, 1, HN, dtype=dtype) for _ in range(3)), None, *tables(8192))  # in groups
    backward(*ops.scan_mixed_qkv(random(64, 1, 2, 7 * HN, dtype=dtype), [2 * HN, 2 * HN, HN, HN, HN], *tables(64)))
    ops.scan_summary(f, k, v)
    ops.adjoint_summary(f, k, v)
    ops.states_of_chunks(torch.rand(2, 2, 2, HN), torch.rand(2, 2, 2, 2, HN), 1)


def attention(word: str, length: int, monkeypatch) -> None:
    from rat_megatron.ops.dilated_attention import triton as ops

    monkeypatch.setattr(ops, "processor_count", lambda device: 132)
    q, k, v = random(length, 1, 4, HN), random(length, 1, 2, HN), random(length, 1, 2, HN)
    head = HeadPattern.parse(word)
    backward(ops.dilated_attention(q, k, v, head, 0.1))
    with torch.no_grad():
        ops.dilated_attention(q, k, v, head, 0.1, cos=tables(length)[0], sin=tables(length)[1])


def attention_after_cudnn(monkeypatch) -> None:
    from rat_megatron.ops.dilated_attention import folding
    from rat_megatron.ops.dilated_attention import triton as ops

    q, k, v, head = random(1088, 1, 4, HN), random(1088, 1, 2, HN), random(1088, 1, 2, HN), HeadPattern.parse("d64s4")
    rows = folding.whole_rows(q, head) - folding.skipped_rows(head)
    past = torch.zeros(rows, 1, 4, HN, dtype=torch.bfloat16), torch.zeros(4, rows), ()
    monkeypatch.setattr(folding, "can_fold", lambda *args: True)
    monkeypatch.setattr(folding, "folded_forward", lambda *args: past)
    with torch.no_grad():
        ops.dilated_attention(q, k, v, head, 0.1, implementation="folded")


def top_k(word: str) -> None:
    from rat_megatron.ops.topk_attention.triton import topk_attention

    q, k, v = random(1, 4, 300, HN), random(1, 2, 300, HN), random(1, 2, 300, HN)
    backward(topk_attention(q, k, v, AttentionPattern.parse(word).layer(0).heads[0], 0.1))


def decoding(word: str, splits: int, hn: int, monkeypatch) -> None:
    from rat_megatron.ops.decode import triton as decode_triton
    from rat_megatron.ratplus.head_cache_ratplus import HeadCache

    monkeypatch.setattr(decode_triton, "_split_count", lambda *args: splits)
    cache = HeadCache(HeadPattern.parse(word), torch.empty(3, 2, 1, hn, dtype=torch.bfloat16), 512, "bounds")
    q, f, k, v = (torch.randn(3, heads, hn).bfloat16() for heads in (4, 2, 2, 2))
    decode_triton.decode_step(q, f, k, v, *tables(3, hn), cache, torch.full((3,), 7), 1 / math.sqrt(hn))


def test_every_kernel_compiles(compiled, monkeypatch):
    for dtype in (torch.bfloat16, torch.float32):
        scans(dtype)
    for word, length in (("d64", 256), ("d16w64s4", 256), ("d2", 1100)):  # a short list of kept keys, a band, a long list
        attention(word, length, monkeypatch)
    attention_after_cudnn(monkeypatch)
    for word in ("d64k4", "d16k4+d"):
        top_k(word)
    for word, splits, hn in (("d16w8s4", 1, HN), ("dense", 2, HN), ("dense", 2, 96)):
        decoding(word, splits, hn, monkeypatch)
    assert compiled.keys() == launched_kernels()
    assert max(compiled.values()) <= 227 * 1024, "shared memory that a program can have on an H100"


def launched_kernels() -> set[str]:
    """The names of all kernels that a file of rat_megatron.ops launches, ``name[grid](...)``."""
    names = set()
    for path in Path(rat_megatron.ops.__path__[0]).glob("*/triton.py"):
        module = importlib.import_module(f"rat_megatron.ops.{path.parent.name}.triton")
        for name in re.findall(r"(\w+)\[", path.read_text()):
            found = getattr(module, name, None) or getattr(getattr(module, "kernels", None), name, None)
            if isinstance(found, JITFunction):
                names.add(found.__name__)
    return names
