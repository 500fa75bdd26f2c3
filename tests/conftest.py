"""What several test files share: a Megatron process group, small data, and real training runs of pretrain_rat.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import MODEL_FLAGS, SEQ_LENGTH, TRAIN_FLAGS, arl_run_flags, prepare_tiny_data, pretrain


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Folder of a small data set, prepared from the documentation of a few Python modules: T = 64, vocabulary 300."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny"), SEQ_LENGTH)


@pytest.fixture(scope="session")
def one_iteration(tmp_path_factory, tiny_data) -> Path:
    """Checkpoint folder after a single iteration: common starting weights for the runs that are compared."""
    folder = tmp_path_factory.mktemp("one_iteration")
    pretrain(*MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--train-iters", 1, "--save", folder, "--save-interval", 1)
    return folder


@pytest.fixture(scope="session")
def arl_run(tmp_path_factory, tiny_data, one_iteration) -> Path:
    """Folder of an uninterrupted run of 20 ARL iterations: checkpoints/, tensorboard/ and log.txt."""
    folder = tmp_path_factory.mktemp("arl_run")
    result = pretrain(*arl_run_flags(one_iteration, tiny_data, folder))
    (folder / "log.txt").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def megatron_process():
    """Megatron's parallel state for one rank in this process, on the CPU where there is no GPU; gone when the module's tests are done."""
    from rat_megatron.platform.cpu import cpu_patches, use_cpu_if_no_cuda
    from rat_megatron.training.patches import applied

    on_cpu = use_cpu_if_no_cuda()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with applied(cpu_patches() if on_cpu else []):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
