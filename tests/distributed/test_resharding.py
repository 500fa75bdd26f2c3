"""Checkpoints move between layouts: weights and optimizer bit by bit, and the run goes on with the same batches."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from rat_megatron.checkpoint.torch_dist import find_iteration
from rat_megatron.training.patches import Patch, applied
from tests.distributed.layouts import tensors, train
from tests.helpers import pretrain_environment

TP2, PP2, CP2 = (["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"])
SP, VPP2 = ["--sequence-parallel"], ["--num-virtual-stages-per-pipeline-rank", "2"]

# Each loads what the one before wrote: (TP, PP, CP, DP) from (2, 2, 1, 1) by way of four others to one rank.
CHAIN = {
    "pp2+cp2": PP2 + CP2,
    "dp4": [],
    "tp2+sp+cp2": TP2 + SP + CP2,
    "cp2+dp2": CP2,
    "pp2+vpp2+dp2": PP2 + VPP2,
}


@contextmanager
def _megatrons_own() -> Iterator[None]:
    """The optimizer's state as Megatron reads and writes it: the format is the same."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as owner

    from rat_megatron.checkpoint import optimizer_rows

    names = {"sharded_rows": "sharded_param_state_fully_reshardable", "load_rows": "load_parameter_state_from_fully_reshardable"}
    with applied([Patch(optimizer_rows, name, lambda _, own=own: getattr(owner, own), "To compare.") for name, own in names.items()]):
        yield


def _optimizer_elements(checkpoint: Path) -> Counter[str]:
    """Elements of the optimizer's state in the files of each rank."""
    folder = find_iteration(checkpoint)
    metadata = FileSystemReader(folder).read_metadata()
    found: Counter[str] = Counter()
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith("optimizer.state."):
            chunks = {chunk.offsets: chunk.sizes for chunk in metadata.state_dict_metadata[index.fqn].chunks}
            found[place.relative_path.split("_")[2]] += chunks[index.offset].numel()
    return found


def test_checkpoints_move_between_layouts(ranks, data):
    folder = ranks / "resharding"  # test_layouts.py has folders of the same names
    run = ["--data-path", data, "--rat-arl-pattern", "d8", "--lr-decay-iters", 8, "--group-query-attention", "--num-query-groups", 2]
    run += ["--use-distributed-optimizer", "--swiglu"]  # whose fused projection is two tensors to a checkpoint
    start = ["--pretrained-checkpoint", train(folder / "start", *run, "--train-iters", 1, alone=True).checkpoint]
    uninterrupted = train(folder / "uninterrupted", *run, *start, "--train-iters", 8, alone=True)
    last = train(folder / "tp2+pp2", *run, *start, *TP2, *PP2, "--train-iters", 4)
    written = tensors(last.checkpoint)
    assert sum(name.startswith("optimizer.state.exp_avg") for name in written) > 10
    for name, flags in [*CHAIN.items(), ("megatron", CP2), ("one rank", [])]:
        # At its last iteration already: loads, and writes what it loaded.
        how = {"alone": name == "one rank", "within": _megatrons_own if name == "megatron" else nullcontext}
        last = train(folder / f"again {name}", *run, *flags, "--load", last.checkpoint, "--train-iters", 4, **how)
        if name in ("dp4", "cp2+dp2"):
            written_by_rank = _optimizer_elements(last.checkpoint)
            assert len(written_by_rank) == 4
            share = sum(written_by_rank.values()) / 4
            assert all(abs(elements / share - 1) < 0.1 for elements in written_by_rank.values()), written_by_rank
        again = tensors(last.checkpoint)
        assert again.keys() == written.keys()
        different = [key for key, tensor in written.items() if not torch.equal(tensor, again[key])]
        assert not different, f"{name}: {different}"

    assert uninterrupted.losses[4]["lm loss"] != pytest.approx(uninterrupted.losses[3]["lm loss"], rel=1e-3)  # batches differ
    for name, flags in (("dp4", []), ("tp2+sp+cp2", TP2 + SP + CP2)):
        longer = ["--train-iters", 8, "--override-opt-param-scheduler"]
        resumed = train(folder / f"resumed {name}", *run, *flags, "--load", last.checkpoint, *longer)
        assert len(resumed.losses) == 5  # four iterations and the validation
        for there, here in zip(uninterrupted.losses[4:], resumed.losses, strict=True):
            assert here == pytest.approx(there, rel=1e-4)


def test_an_average_is_evaluated_at_any_layout(ranks, data):
    folder = ranks / "average"
    run = ["--data-path", data, "--rat-arl-pattern", "none", "--train-iters", 2]
    trained = train(folder / "trained", *run, *CP2, "--save-interval", 1)
    if torch.distributed.get_rank() == 0:
        command = [sys.executable, "-m", "rat_megatron.cli.main", "convert", "average", trained.checkpoint, folder / "mean", "--last", "2"]
        subprocess.run(list(map(str, command)), env=pretrain_environment(), check=True, capture_output=True)
    torch.distributed.barrier()
    evaluate = [*run, "--load", folder / "mean", "--skip-train"]
    (expected,) = train(folder / "alone", *evaluate, alone=True).losses
    (losses,) = train(folder / "tp2+pp2", *evaluate, *TP2, *PP2).losses
    assert losses == pytest.approx(expected, rel=1e-4)
    assert expected["lm loss"] != pytest.approx(trained.losses[-1]["lm loss"], rel=1e-5)  # that of the last iteration
