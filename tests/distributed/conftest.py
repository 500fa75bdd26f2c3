"""These tests are run by every rank of `torchrun --nproc-per-node 4 -m pytest tests/distributed`, over gloo where there is no GPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.distributed.layouts import join_ranks, start_server
from tests.helpers import prepare_tiny_data

RANKS = 4


def pytest_collection_modifyitems(items):
    if os.environ.get("WORLD_SIZE") != str(RANKS):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"needs torchrun --nproc-per-node {RANKS}: see the Makefile"))


@pytest.fixture(scope="session")
def ranks():
    """Joins the ranks; yields a folder that all of them see."""
    from rat_megatron.platform.cpu import use_cpu_if_no_cuda

    use_cpu_if_no_cuda()
    import torch

    torch.set_num_threads(1)
    start_server()
    join_ranks()
    name = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(name)
    yield Path(name[0])
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def data(ranks) -> Path:
    """Training data with T = 512: long enough for d64 and eight context-parallel chunks."""
    import torch

    if torch.distributed.get_rank() == 0:
        prepare_tiny_data(ranks, seq_length=512)
    torch.distributed.barrier()
    return ranks / "data"
