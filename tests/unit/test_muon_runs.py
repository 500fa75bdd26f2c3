"""Runs of Muon in this process: resumed, and without a patch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.megatron_runs import leave_groups, run_program
from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS

pytestmark = pytest.mark.slow

QKV = "decoder.layers.self_attention.linear_qkv.weight"
LAYER_WISE = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.fixture
def run(tiny_data):
    """run(folder, flags, without names of patches): a run of this process, whose checkpoints are in the folder."""
    torch.set_num_threads(1)

    def run(folder: Path, *flags, without: tuple[str, ...] = ()) -> None:
        words = [*MODEL_FLAGS, *TRAIN_FLAGS, "--optimizer", "muon", "--muon-nesterov", "--rat-arl-pattern", "d8", *flags]
        words += ["--data-path", tiny_data, "--save", folder]
        with run_program(list(map(str, words))) as main, pytest.MonkeyPatch.context() as change:
            from rat_megatron import pretrain

            made = pretrain.megatron_patches
            change.setattr(pretrain, "megatron_patches", lambda *parts: [row for row in made(*parts) if row.name not in without])
            try:
                main()
            finally:
                leave_groups()

    return run


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = TorchDistCheckpoint(find_iteration(folder))
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


@pytest.mark.parametrize("flags", [[], LAYER_WISE], ids=["whole", "layer-wise"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(run, tmp_path, flags):
    flags = ["--train-iters", 4, "--save-interval", 2, "--eval-iters", 0, *flags]
    run(tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "iter_0000004")
    (tmp_path / "resumed" / "latest_checkpointed_iteration.txt").write_text("2")
    before = _tensors(tmp_path / "resumed")
    run(tmp_path / "resumed", *flags)
    expected, resumed = _tensors(tmp_path / "whole"), _tensors(tmp_path / "resumed")
    assert expected.keys() == resumed.keys() and f"optimizer.state.momentum_buffer.{QKV}" in expected
    for key, tensor in expected.items():
        assert torch.equal(resumed[key], tensor) and not torch.equal(before[key], tensor), key


def test_without_matrices_apart_each_rank_has_all_gradients(run, tmp_path):
    """Then embeddings and norms, too, are in Muon's hands, with states of other names; when this fails, the patches can go."""
    for name, without in (("patched", ()), ("not", ("_ddp_wrap", "DistributedOptimizer"))):
        run(tmp_path / name, "--train-iters", 1, "--save-interval", 1, "--eval-iters", 0, *LAYER_WISE, without=without)
        of_embedding = "param" if name == "patched" else "fp32_param"
        mains = {key for key in _tensors(tmp_path / name) if key.endswith(("param.embedding.word_embeddings.weight", f"param.{QKV}"))}
        assert mains == {f"optimizer.state.{of_embedding}.embedding.word_embeddings.weight", f"optimizer.state.fp32_param.{QKV}"}
