"""``rat-megatron doctor``: what of the software and hardware is here, and what each part of a model will run on."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "mosaicml-streaming", "transformers", "rat-megatron")


def doctor() -> None:
    """Show versions, GPUs, and which implementation each part of a RAT+ model will use on this machine."""
    import torch

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    te = cuda and _imports("transformer_engine.pytorch")
    apex = find_spec("fused_weight_gradient_mlp_cuda") is not None
    triton = cuda and find_spec("triton") is not None and os.environ.get("RAT_KERNELS") != "torch"
    facts = {
        "machine": f"{platform.node()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "GPUs": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
        "CUDA, cuDNN, NCCL": _cuda_versions(torch) if cuda else "-",
        **{name: _version(name) for name in PACKAGES},
        "NVIDIA Apex": "its extensions are here" if apex else "-",
        "NCCL settings": " ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("NCCL_")) or "-",
    }
    parts = {
        "linear layers, norms": "Transformer Engine" if te else "Megatron's local layers",
        "dense attention": "Transformer Engine" if te else "torch",
        "sparse attention": "Triton" if triton else "torch",
        "gated scan": "Triton" if triton else "torch",
        "optimizer": "Transformer Engine" if te else ("Apex" if cuda and apex else "torch"),
        "gradient accumulation in the weight gradient": "Apex" if cuda and apex else ("Transformer Engine" if te else "apart"),
        "cross-entropy": "Transformer Engine" if te and _te_cross_entropy_is_sound() else "Megatron's",
        "communication": "NCCL" if cuda else "gloo",
        "FP8": "yes" if te else "needs a GPU with Transformer Engine",
    }
    console = Console(width=140)
    for title, rows in (("What is here", facts), ("What will be used", parts)):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # a library that does not fit this machine's fails in many ways
        return False
    return True


def _te_cross_entropy_is_sound() -> bool:
    from rat_megatron.model.builder import te_cross_entropy_is_sound

    return te_cross_entropy_is_sound()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _cuda_versions(torch) -> str:
    return f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {'.'.join(map(str, torch.cuda.nccl.version()))}"
