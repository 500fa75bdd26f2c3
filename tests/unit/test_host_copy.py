"""The copy in host memory that a checkpoint is written from: what it holds, here and in another process, from save to save."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path

import psutil
import pytest
import torch

from rat_megatron.checkpoint import host_copy
from rat_megatron.checkpoint.host_copy import HostCopy, WriteBuckets, copy_to_host


def buckets(*tensors: torch.Tensor) -> WriteBuckets:
    return [("folder/a.distcp", "a.distcp", ([("common", io.BytesIO(b"pickle"))], [(f"tensor {i}", t) for i, t in enumerate(tensors)]))]


def tensors_of(copied: WriteBuckets) -> list[torch.Tensor]:
    return [tensor for _, _, (_, pairs) in copied for _, tensor in pairs]


def saved_elsewhere(copy: HostCopy, answers) -> None:
    files = []
    for tensor in tensors_of(copy.in_place()):
        file = io.BytesIO()
        torch.save(tensor, file)  # as a checkpoint's writer does: the whole storage
        files.append(file.getvalue())
    answers.put(files)


def test_tensors_of_any_kind_come_whole_to_the_process_that_writes():
    whole = torch.randn(40, 30)
    given = [whole, whole[3:7, 5:9], whole.to(torch.bfloat16), torch.tensor(7), torch.randint(256, (1001,), dtype=torch.uint8)]
    given += [torch.empty(0, 4), torch.randn(3).expand(5, 3)]
    before = [tensor.clone() for tensor in given]
    copy = copy_to_host(buckets(*given), None)
    whole.zero_()  # training goes on
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=saved_elsewhere, args=(copy, answers))
    process.start()
    files = answers.get(timeout=60)
    process.join()
    for file, tensor in zip(files, before, strict=True):
        there = torch.load(io.BytesIO(file))
        assert there.dtype == tensor.dtype and torch.equal(there, tensor)
        assert len(file) < tensor.numel() * tensor.element_size() + 2000  # no more than itself
    assert copy.buckets[0][2][0][0][1].getvalue() == b"pickle"


def test_memory_is_used_again_and_grows():
    first = torch.randn(1000)
    one = copy_to_host(buckets(first), None)
    memory = one.memory
    second = torch.randn(1000)
    assert copy_to_host(buckets(second), memory).memory is memory
    assert torch.equal(tensors_of(one.in_place())[0], second)  # the same place
    more = [torch.randn(5000) for _ in range(3)]
    copy = copy_to_host(buckets(*more), memory)
    assert copy.memory is not memory and copy.memory.size >= 3 * 20_000
    assert all(torch.equal(there, here) for there, here in zip(tensors_of(copy.in_place()), more, strict=True))


def test_memory_to_be_had_is_that_of_the_narrowest_control_group(tmp_path, monkeypatch):
    path = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), None)
    if path is None:
        pytest.skip("no control groups of version 2 here")
    monkeypatch.setattr(host_copy, "_CGROUPS", tmp_path)
    group = tmp_path / path.strip("/")
    group.mkdir(parents=True, exist_ok=True)
    assert host_copy.available_memory() <= psutil.virtual_memory().total
    for name, content in {"memory.max": "5000000", "memory.current": "4000000", "memory.stat": "anon 7\ninactive_file 300000"}.items():
        (group / name).write_text(content + "\n")
    assert host_copy.available_memory() == 1_300_000
    (group / "memory.max").write_text("max\n")
    assert host_copy.available_memory() > 1_300_000
