"""Where the time of one training iteration goes on the GPU: the kernels by name and by kind, and the time in which none runs.

Short gaps lie between kernels that were waiting for the GPU already; in long ones the GPU waits for the host.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch

# The first pattern that a kernel's name matches says what it is.
_KINDS = {
    "communication": r"nccl",
    "attention": r"fmha|flash|sdpa|attention|_topk|fused_attn|thd_|cudnn_generated",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitk|cublaslt|wgrad|dgrad",
    "optimizer": r"multi_tensor|adam|l2norm",
    "norm": r"rmsnorm|layernorm|ln_fwd|ln_bwd|norm_",
    "loss": r"cross_entropy|softmax|log_softmax|nll",
    "scan": r"gated_scan",
    "FP8 casts": r"fp8|cast_transpose|quantize|amax|transpose_kernel",
    "RoPE": r"rope|rotary",
}


class Profile:
    """Records one iteration: the one after which ``after`` is told this number. summary() afterwards."""

    def __init__(self, iteration: int):
        self._iteration = iteration
        self._profiler: torch.profiler.profile | None = None

    def after(self, count: int) -> None:
        """To be called after every iteration, the device idle, with the number of iterations done."""
        activity = torch.profiler.ProfilerActivity
        if count == self._iteration - 1:
            kinds = [activity.CUDA] if torch.cuda.is_available() else [activity.CPU]
            self._profiler = torch.profiler.profile(activities=kinds, acc_events=False)
            self._profiler.start()
        elif count == self._iteration:
            self._profiler.stop()

    def summary(self) -> dict[str, Any]:
        """Milliseconds of the iteration, the share of each kind and of idle time, and the kernels that take longest."""
        events = sorted((e.start_ns(), e.duration_ns(), e.name()) for e in self._profiler.profiler.kineto_results.events() if _on_device(e))
        kernels: dict[str, list[int]] = defaultdict(list)
        kinds: dict[str, int] = defaultdict(int)
        end, busy = events[0][0], 0
        gaps: list[tuple[int, str, str]] = []
        before = ""
        for start, duration, name in events:
            kernels[name].append(duration)
            kinds[_kind(name)] += duration
            gaps.append((max(0, start - end), before, name))
            busy += max(0, start + duration - max(start, end))
            end, before = max(end, start + duration), name
        total = end - events[0][0]
        longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
        self._summary = {
            "milliseconds": total / 1e6,
            "launches": len(events),
            "idle": 1 - busy / total,
            "idle_milliseconds_by_gap": {
                "under 10 us": sum(gap for gap, *_ in gaps if gap < 10_000) / 1e6,
                "10 to 200 us": sum(gap for gap, *_ in gaps if 10_000 <= gap < 200_000) / 1e6,
                "over 200 us": sum(gap for gap, *_ in gaps if gap >= 200_000) / 1e6,
            },
            "longest_gaps": [
                {"milliseconds": gap / 1e6, "after": after[:100], "until": until[:100]} for gap, after, until in sorted(gaps)[:-9:-1]
            ],
            "kinds": dict(sorted(((kind, time / total) for kind, time in kinds.items()), key=lambda item: -item[1])),
            "kernels": [{"name": name[:200], "launches": len(d), "milliseconds": sum(d) / 1e6} for name, d in longest],
        }
        return self._summary

    def show(self, title: str) -> None:
        """Prints the summary; the shares may sum to more than 1 where kernels overlap."""
        s = self._summary
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in s["kinds"].items())
        idle = ", ".join(f"{time:.1f} ms in gaps {which}" for which, time in s["idle_milliseconds_by_gap"].items())
        print(f"profile of {title}: {s['milliseconds']:.1f} ms, {s['launches']} launches, idle {s['idle']:.1%} ({idle}); {shares}")
        for gap in s["longest_gaps"]:
            print(f"  {gap['milliseconds']:9.2f} ms idle after {gap['after'][:50]} until {gap['until'][:50]}")
        for kernel in s["kernels"][:25]:
            print(f"  {kernel['milliseconds']:9.2f} ms {kernel['launches']:6} x {kernel['name'][:110]}", flush=True)


def _on_device(event) -> bool:
    if not torch.cuda.is_available():
        return event.duration_ns() > 0
    return event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()


def _kind(name: str) -> str:
    low = name.lower()
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, low)), "other elementwise")
