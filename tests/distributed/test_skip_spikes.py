"""--rat-skip-spikes on several ranks: all decide alike, also where only some have the losses, and all weights are as they were."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from megatron.training.global_vars import get_args

from rat_megatron.checkpoint.torch_dist import TRACKER_NAME, TorchDistCheckpoint, find_iteration
from rat_megatron.training.loop import forward_step
from rat_megatron.training.monitoring import loss_spikes
from tests.distributed.layouts import tensors, train

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {
    "tp2+pp2": [*TP2, *PP2, "--sequence-parallel"],
    "pp2+vpp2+dp2, bf16 overlapped": [*PP2, "--num-virtual-stages-per-pipeline-rank", "2", "--bf16", *OVERLAP],
    "dp4, distributed optimizer": OVERLAP[:1],
    "tp2+dp2, muon": [*TP2, "--optimizer", "muon", "--bf16", *OVERLAP],
}
POISONED, LAST = 7, 9


@contextmanager
def _poisoned() -> Iterator[None]:
    """Five times the loss of the dense step in one iteration."""
    loss_func = forward_step.loss_func

    def poison(loss_mask, sample_ids, name, output):
        factor = 5 if get_args().curr_iteration + 1 == POISONED and name == "lm loss" else 1
        return loss_func(loss_mask, sample_ids, name, factor * output)

    with pytest.MonkeyPatch.context() as change:
        change.setattr(loss_spikes, "_WARM_UP", 5)
        change.setattr(forward_step, "loss_func", poison)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_left_out_has_never_been(ranks, data, layout):
    folder = ranks / f"skip {layout}"
    flags = [*LAYOUTS[layout], "--data-path", data, "--rat-arl-pattern", "d64", "--train-iters", LAST, "--eval-iters", 0]
    skipping = ["--rat-skip-spikes", 30, "--save-interval", 1]
    checkpoint = train(folder / "skipping", *flags, *skipping, within=_poisoned).checkpoint
    before, after = (_state(checkpoint, iteration) for iteration in (POISONED - 1, POISONED))
    assert before.keys() == after.keys() and not [key for key in before if not torch.equal(before[key], after[key])]
    left = _state(checkpoint, LAST)
    assert all(not torch.equal(after[key], left[key]) for key in after)

    if layout == "tp2+pp2":  # goes on from the statistics before
        if torch.distributed.get_rank() == 0:
            shutil.copytree(checkpoint / "iter_0000006", folder / "resumed" / "checkpoints" / "iter_0000006")
            (folder / "resumed" / "checkpoints" / TRACKER_NAME).write_text("6")
        torch.distributed.barrier()
        _assert_same(left, tensors(train(folder / "resumed", *flags, *skipping, within=_poisoned).checkpoint))
    _assert_same(left, tensors(train(folder / "expected", *flags, "--iterations-to-skip", POISONED).checkpoint))


def _state(checkpoint, iteration: int) -> dict[str, torch.Tensor]:
    found = TorchDistCheckpoint(find_iteration(checkpoint, iteration))
    return {key: found.read(key) for key in found.tensors}


def _assert_same(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> None:
    assert there.keys() == here.keys() and any(key.startswith("optimizer.") for key in there)
    assert not [key for key in there if not torch.equal(there[key], here[key])]
