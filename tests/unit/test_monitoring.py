"""What a run measures: its metrics file, and the FLOPs of an iteration beside Megatron's own count."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

pytestmark = pytest.mark.usefixtures("megatron_process")


def test_report_keeps_what_was_measured(tmp_path, monkeypatch):
    from rat_megatron.training.monitoring import metrics

    args = Namespace(global_batch_size=400, seq_length=8, consumed_train_samples=12, rat_pattern="d16", rat_recurrence=True)
    monkeypatch.setattr(metrics, "get_args", lambda: args)
    run = metrics.RunMetrics(tmp_path / "run")
    run.iteration = 3
    run.add_loss("d16", 2.5)
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert content["patterns"] == {"d16": 2.5} and content["iteration"] == 3 and content["tokens_per_second"] is None
    times = iter((1.0, 3.0, 4.0, 6.0, 7.0, 9.0))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    for batch in (4, 4, 6):  # while the batch grows
        monkeypatch.setattr(metrics, "get_current_running_global_batch_size", lambda batch=batch: batch)
        assert run.timed(lambda value: value + 1)(1) == 2
    run.add_loss("dense", 2.0)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["tokens_per_second"] == 16.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_null_for_those_who_read_it(tmp_path, monkeypatch, capsys, value):
    from rat_megatron.convert.model_card import measured_losses
    from rat_megatron.training.monitoring import metrics
    from rat_megatron.training.monitoring.comparison import compare_runs
    from tests.converting import megatron_args

    args = megatron_args(global_batch_size=4, consumed_train_samples=12, rat_pattern="d16")
    monkeypatch.setattr(metrics, "get_args", lambda: args)
    run = metrics.RunMetrics(tmp_path / "run")
    run.iteration, run.validation_set = 3, "code"
    run.add_loss("d16", value)
    run.add_loss("dense", 2.0)
    assert capsys.readouterr().out == f"rat-megatron: the validation loss on code under d16 is {value} at iteration 3\n"
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert content["validation_sets"] == {"code": {"d16": None, "dense": 2.0}}
    assert measured_losses(tmp_path / "run" / "iter_0000003", args) == {"dense on code": 2.0}
    compare_runs(tmp_path / "out", tmp_path / "run", adapted=[tmp_path / "run"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "d16" in line]
    assert row.count("not finite") == 2
    assert json.loads((tmp_path / "out" / "report.json").read_text())["validation_sets"]["code"]["patterns"]["d16"]["adapted"] is None


@pytest.fixture
def arguments_1_5b(monkeypatch):
    """Validated arguments of the 1.5B baseline, dense, without active recurrence learning."""
    from megatron.training.arguments import parse_args, validate_args

    from rat_megatron.training.arguments.flags import add_rat_args

    monkeypatch.setattr("sys.argv", ["pretrain_rat.py", "--rat-preset", "1.5b", "--no-rat-recurrence", "--rat-arl-pattern", "none"])
    args = parse_args(add_rat_args)
    validate_args(args)
    args.padded_vocab_size = args.vocab_size
    return args


def test_flops_equal_megatrons_where_both_count_the_same(arguments_1_5b):
    from megatron.training.training import num_floating_point_operations

    from rat_megatron.training.monitoring.flops import iteration_flops

    # Megatron counts T * T / 2 pairs of causal attention, we T * (T + 1) / 2.
    assert iteration_flops(arguments_1_5b, 8) == pytest.approx(num_floating_point_operations(arguments_1_5b, 8), rel=1e-4)


def test_the_pairs_of_a_pattern_are_counted_once_a_run(arguments_1_5b, monkeypatch):
    from rat_megatron.ratplus.pattern import AttentionPattern
    from rat_megatron.training.monitoring.flops import iteration_flops

    first, count = iteration_flops(arguments_1_5b, 8), AttentionPattern.flops
    counted: list[int] = []
    monkeypatch.setattr(AttentionPattern, "flops", lambda *args: counted.append(1) or count(*args))
    assert iteration_flops(arguments_1_5b, 16) == 2 * first and not counted
    arguments_1_5b.seq_length = 128
    assert iteration_flops(arguments_1_5b, 8) < first / 32 and len(counted) == 1


def test_flops_count_the_forget_gate_and_the_sparse_step(arguments_1_5b):
    from rat_megatron.training.monitoring.flops import iteration_flops

    args = arguments_1_5b
    baseline = iteration_flops(args, 8)
    args.rat_recurrence = True
    dense = iteration_flops(args, 8)
    assert dense - baseline == 3 * 8 * 4096 * 2 * args.num_layers * args.hidden_size**2
    args.rat_arl_pattern = "d64"
    assert 1.85 < iteration_flops(args, 8) / dense < 1.95  # the paper: about 1.9
