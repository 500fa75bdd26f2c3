"""The copy in host memory that a checkpoint is written from, of tensors on a GPU."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from rat_megatron.checkpoint.host_copy import copy_to_host
from tests.unit.test_host_copy import buckets, tensors_of


def test_what_training_changes_afterwards_is_not_in_the_copy():
    given = [torch.randn(300, 257, device="cuda"), torch.randn(64, 64, device="cuda")[3:9, 1:], torch.randn(17)]
    given += [torch.randn(2**21, device="cuda").to(torch.bfloat16)]
    before = [tensor.cpu().clone() for tensor in given]
    copy = copy_to_host(buckets(*given), None)
    for tensor in given:
        tensor.zero_()
    assert copy.memory.pinned
    assert all(torch.equal(there, here) for there, here in zip(tensors_of(copy.in_place()), before, strict=True))
    memory = copy.memory
    del copy
    memory.close()


def test_memory_that_is_gone_is_not_copied_from():
    """Its addresses belong to others then, whose bytes a copy must give."""
    for _ in range(4):
        copy = copy_to_host(buckets(torch.randn(2**26, device="cuda")), None)
        del copy  # without close()
        there = torch.randn(2**26)  # as large, so that it is mapped where that was
        assert torch.equal(there.cuda().cpu(), there)
