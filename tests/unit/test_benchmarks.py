"""Every benchmark runs on a machine without a GPU with --tiny, and writes what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as table
from benchmarks import kernels, serving
from tests.helpers import REPOSITORY, pretrain_environment

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="the trial of a machine without a GPU")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """The benchmarks of training, each in processes of its own, which run beside the other tests: name to process and its JSON."""
    folder = tmp_path_factory.mktemp("benchmarks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = {
        "training": [
            sys.executable,
            "-m",
            "benchmarks.training",
            "--only",
            "dense",
            "gpt",
            "--iterations",
            "3",
            "--warm-up",
            "1",
            "--profile",
        ],
        "layouts": [*torchrun, "-m", "benchmarks.layouts", "--only", "cp2-p2p"],
        "checkpoints": [*torchrun, "-m", "benchmarks.checkpoints", "--only", "rows", "--folder", str(folder)],
    }
    started = {}
    for name, command in commands.items():
        words = ["--tiny", "--json", str(folder / f"{name}.json"), "--runs-log", str(folder / name)]
        process = subprocess.Popen(
            [*command, *words], cwd=REPOSITORY, env=pretrain_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started[name] = process, folder / f"{name}.json"
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


def result(runs, name: str) -> tuple[dict, str]:
    process, path = runs[name]
    if process.stdout.closed:
        return json.loads(path.read_text()), ""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return json.loads(path.read_text()), printed


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_kernels(runs, tmp_path, capsys):
    kernels.main(["--tiny", "--json", str(tmp_path / "kernels.json")])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert list(rows) == list(kernels.ROWS)
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert "error" not in row, row
        assert row["value"] > 0 and row["met"] in (True, False) and name in printed
        for times in row["times"].values():
            assert 0 < times["lowest"] <= times["median"] <= times["highest"]
    # What is compared computes the same.
    compared = [name for name, row in rows.items() if "difference" in row]
    assert set(rows) - set(compared) == {"training-d64"} and all(rows[name]["difference"] < 1e-5 for name in compared)


def test_a_row_that_fails_does_not_lose_the_others(tmp_path, capsys, monkeypatch):
    def fails(size, plain):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(kernels.ROWS, "scan-forward", fails)
    kernels.main(["--tiny", "--ours-only", "--only", "scan-forward", "decode-d64", "--json", str(tmp_path / "kernels.json")])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert "out of memory" in rows["scan-forward"]["error"] and rows["decode-d64"]["value"] > 0
    assert "failed: RuntimeError" in capsys.readouterr().out


def test_serving(runs, tmp_path, capsys):
    serving.main(["--tiny", "--only", "1.5b-4096", "block-7.6b", "--json", str(tmp_path / "serving.json")])
    rows = json.loads((tmp_path / "serving.json").read_text())["rows"]
    throughput, block = rows["1.5b-4096"], rows["block-7.6b"]
    assert list(throughput) == ["dense", "d16", "d64"] and "goal over 60 x dense" in throughput["d64"]["judged"]
    assert all(row["tokens_per_second"] == pytest.approx(row["batch"] / row["milliseconds"] * 1e3) for row in throughput.values())
    assert throughput["d64"]["cache_gigabytes"] < throughput["d16"]["cache_gigabytes"] < throughput["dense"]["cache_gigabytes"]
    assert list(block) == [f"{phase} {word}" for phase in ("prefill", "decode") for word in serving.PATTERNS]
    assert all(row["milliseconds"] > 0 for row in block.values())


def test_the_batch_that_serving_tries_first_follows_the_bytes_of_the_cache():
    model = serving._model("1.5b", 100, tiny=True)
    for word in serving.PATTERNS:
        model.set_attention_pattern(word)
        with torch.no_grad():
            cache = serving._filled_cache(model, 3, 64, 100)
        assert cache.nbytes == 3 * serving._cache_bytes(model, 100, torch.float32)
        assert int(cache.lengths[0]) == 64


def test_training(runs):
    results, printed = result(runs, "training")
    for name in ("dense", "gpt"):
        run = results["runs"][name]
        assert "error" not in run, run
        seconds = run["seconds"]
        assert run["tokens_per_second"] == pytest.approx(8 * 256 / seconds["median"]) and len(seconds["counted"]) == 2
        assert len(run["losses"]) == 5  # two more for the profile
        assert run["profile"]["launches"] > 100 and 0 <= run["profile"]["idle"] < 1 and f"profile of {name}" in printed
    assert results["runs"]["dense"]["parameters"] > results["runs"]["gpt"]["parameters"]  # the forget gate's
    assert results["ratios"]["bf16"] > 0 and "dense step over GPT's" in printed


def test_the_table_joins_what_was_measured(runs, tmp_path, capsys):
    kernels.main(["--tiny", "--ours-only", "--only", "decode-d64", "--json", str(tmp_path / "kernels.json")])
    capsys.readouterr()
    result(runs, "training")
    table.main(["--read", str(tmp_path / "kernels.json"), str(runs["training"][1]), "--json", str(tmp_path / "table.json")])
    printed = capsys.readouterr().out
    assert "| decode step, batch 256 at 4096, D=64 |" in printed and "over Megatron's GPT, bf16" in printed
    assert f"torch {version('torch')}" in printed
    assert set(json.loads((tmp_path / "table.json").read_text())) == {"tiny", "machines", "rows", "runs", "ratios"}
    assert "none of it measured at the sizes named" in printed


def test_layouts(runs):
    results, printed = result(runs, "layouts")
    layout = results["layouts"]["cp2-p2p"]
    assert "error" not in layout, layout
    assert layout["difference"] < 1e-5  # fp32: the same losses as one rank's
    assert len(layout["exchange"]) == 2 and all(0 < share < 1 for share in layout["exchange"])
    assert set(results["one GPU"]) == {"bf16", "FP8"} and len(layout["losses"]) == 4
    assert "cp2-p2p" in printed and os.path.exists(runs["layouts"][1])


def test_checkpoints(runs):
    results, printed = result(runs, "checkpoints")
    figures = results["modes"]["rows"]
    assert 0 < figures["stall"] <= figures["whole"] and all(figures[name] > 0 for name in ("load", "tp2", "pp2", "gigabytes"))
    assert "rows" in printed and list(runs["checkpoints"][1].parent.glob("*/iter_*")) == []
