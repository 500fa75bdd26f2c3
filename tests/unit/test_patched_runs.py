"""Runs in this process, with all patches of Megatron or without some: all are reached, needed, and taken back."""

from __future__ import annotations

import inspect
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.megatron_runs import leave_groups, run_program
from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
from rat_megatron.training.patches import Patch, applied
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS

pytestmark = pytest.mark.slow

RUN = [*MODEL_FLAGS, *TRAIN_FLAGS, "--rat-arl-pattern", "d8", "--use-distributed-optimizer", "--rat-hang-timeout-in-mins", "5"]
NOT_HERE = {"FullCudaGraphWrapper"}  # needs a GPU; test_patches.py compares its source


@pytest.fixture
def run(tiny_data, monkeypatch):
    """run(folder, flags, without names of patches, more patches) -> the table of patches that were applied."""
    torch.set_num_threads(1)

    def run(folder: Path, *flags, without: tuple[str, ...] = (), more=lambda rows: []) -> list[Patch]:
        used: list[Patch] = []
        words = [*RUN, "--data-path", tiny_data, "--save", folder, *flags]
        with run_program(list(map(str, words))) as main:
            from rat_megatron import pretrain
            from rat_megatron.training.patches.table import megatron_patches

            def table(*parts):
                used.extend(megatron_patches(*parts))
                return [*(row for row in used if row.name not in without), *more(used)]

            monkeypatch.setattr(pretrain, "megatron_patches", table)
            try:
                main()
            finally:
                monkeypatch.undo()
                leave_groups()
        return used

    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = TorchDistCheckpoint(find_iteration(folder))
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def counting(calls: Counter, rows: list[Patch]) -> list[Patch]:
    """Patches around the functions of the rows, which count how often Megatron calls each."""

    def make(name):
        def around(function):
            def counted(*args, **kwargs):
                calls[name] += 1
                return function(*args, **kwargs)

            return counted

        return around

    names = {(row.owner, row.name) for row in rows if inspect.isroutine(getattr(row.owner, row.name))}
    return [Patch(owner, name, make(name), "counts") for owner, name in names]


def test_megatron_calls_every_patched_name_and_has_its_own_back(run, tmp_path):
    calls: Counter = Counter()
    rows = run(tmp_path, "--train-iters", 2, "--save-interval", 2, "--eval-interval", 2, more=lambda rows: counting(calls, rows))
    own = {(row.owner, row.name): getattr(row.owner, row.name) for row in rows}
    more = ["--train-iters", 4, "--iterations-to-skip", 3, "--override-opt-param-scheduler"]
    run(tmp_path, *more, more=lambda rows: counting(calls, rows))
    assert all(getattr(owner, name) is function for (owner, name), function in own.items()), "a second run leaves what the first one left"
    assert not any("rat_megatron" in (getattr(function, "__module__", None) or "") for function in own.values())
    missing = {row.name for row in rows if inspect.isroutine(getattr(row.owner, row.name))} - calls.keys()
    assert missing <= NOT_HERE, f"Megatron no longer calls {sorted(missing)} where the table of patches has them"
    assert calls["train_step"] == 3, "once an iteration, each of which is two steps inside"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    for row in rows:
        assert row.why.endswith("."), row.name


def test_patches_are_taken_back_however_a_run_ends():
    class Base:
        inherited = 1

    class Owner(Base):
        own = 2

    rows = [
        Patch(Owner, "own", lambda x: x + 10, "."),
        Patch(Owner, "own", lambda x: x * 2, "."),
        Patch(Owner, "inherited", lambda x: x + 1, "."),
    ]
    for error in (None, ValueError, SystemExit):
        try:
            with applied(rows):
                assert (Owner.own, Owner.inherited) == (24, 2)
                if error:
                    raise error
        except (ValueError, SystemExit):
            pass
        assert Owner.own == 2 and "inherited" not in vars(Owner)
    with pytest.raises(AttributeError), applied([*rows, Patch(Owner, "gone", lambda x: x, ".")]):
        pass
    with applied([*rows, Patch(Owner, "gone", lambda x: (x, 1), ".", may_be_missing=True)]):
        assert Owner.gone == (None, 1)
    assert not hasattr(Owner, "gone")
    assert Owner.own == 2 and "inherited" not in vars(Owner)


def test_the_wrappers_name_the_arguments_that_megatron_passes():
    from rat_megatron.platform.cpu import use_cpu_if_no_cuda

    use_cpu_if_no_cuda()
    from megatron.training import training

    def leading(function, count):
        return list(inspect.signature(function).parameters)[:count]

    step = "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration".split()
    assert leading(training.train_step, 8) == step
    assert leading(training.train, 2) == ["forward_step_func", "model"]
    assert leading(training.train, 2) == ["forward_step_func", "model"]
    assert leading(training.training_log, 4) == ["loss_dict", "total_loss_dict", "learning_rate", "iteration"]
    assert leading(training.evaluate_and_print_results, 5) == ["prefix", "forward_step_func", "data_iterator", "model", "iteration"]
    assert leading(training.num_floating_point_operations, 2) == ["args", "batch_size"]
    assert leading(training.save_checkpoint_and_time, 1) == ["iteration"]


# Each of these passes without its patch once Megatron has mended the fault: the patch can go then.


def test_without_the_padding_of_buckets_parameters_are_taken_from_wrong_places(run, tmp_path):
    small_buckets = ["--train-iters", 1, "--save-interval", 1, "--eval-iters", 0, "--ddp-bucket-size", 700, "--overlap-grad-reduce"]
    run(tmp_path / "patched", *small_buckets)
    run(tmp_path / "not", *small_buckets, without=("sharded_param_state_fully_reshardable",))
    differing = {}
    for name in ("patched", "not"):
        there = tensors(tmp_path / name)
        main = {key.removeprefix("optimizer.state.param."): key for key in there if key.startswith("optimizer.state.param.")}
        assert main, sorted(there)
        differing[name] = [key for key, of_optimizer in main.items() if not torch.equal(there[key], there[of_optimizer])]
    assert differing["patched"] == [] and differing["not"]


def test_without_the_state_of_torchs_adam_no_run_resumes(run, tmp_path):
    flags = ["--eval-iters", 0, "--override-opt-param-scheduler"]
    run(tmp_path, "--train-iters", 1, *flags)
    with pytest.raises((AssertionError, RuntimeError, KeyError, IndexError, TypeError, ValueError)):
        run(tmp_path, "--train-iters", 2, *flags, without=("state_dict", "_set_main_param_and_optimizer_states", "load_state_dict"))


def test_without_the_look_at_what_is_saved_a_finished_run_writes_over_its_last_checkpoint(run, tmp_path):
    flags = ["--train-iters", 1, "--eval-iters", 0]
    run(tmp_path, *flags)
    written = {path: path.stat().st_mtime_ns for path in find_iteration(tmp_path).iterdir()}
    run(tmp_path, *flags)
    assert written == {path: path.stat().st_mtime_ns for path in find_iteration(tmp_path).iterdir()}
    run(tmp_path, *flags, without=("save_checkpoint_and_time",))
    assert written != {path: path.stat().st_mtime_ns for path in find_iteration(tmp_path).iterdir()}


@pytest.mark.parametrize("log_interval", [1, 2])
def test_without_the_end_of_an_interval_the_second_line_of_a_resumed_run_counts_an_iteration_twice(run, tmp_path, capfd, log_interval):
    flags = ["--train-iters", 6, "--eval-iters", 0, "--save-interval", 3, "--log-interval", log_interval]

    def lines(folder, **without):
        capfd.readouterr()
        run(folder, *flags, **without)
        found = re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", capfd.readouterr().out)
        return {int(iteration): float(loss) for iteration, loss in found}

    whole = lines(tmp_path / "whole")
    assert list(whole) == ([1, 2, 3, 4, 5, 6] if log_interval == 1 else [1, 2, 4, 6])
    for name in ("resumed", "unpatched"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "iter_0000006")
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = lines(tmp_path / "resumed")
    unpatched = lines(tmp_path / "unpatched", without=("training_log",))
    assert list(resumed) == list(unpatched) == ([4, 5, 6] if log_interval == 1 else [4, 6])
    after = 5 if log_interval == 1 else 6  # the line after the first one
    assert resumed[after] == pytest.approx(whole[after], rel=1e-5)
    assert unpatched[after] != pytest.approx(whole[after], rel=1e-4)
