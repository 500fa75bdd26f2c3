"""The shipped scripts on a real Slurm: after requeues, limits, lost ranks and lost nodes they go on with the very same losses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.helpers import REPOSITORY, tensorboard_scalars
from tests.slurm.cluster import Cluster, wait_for

ITERATIONS = 32
TRAINING = (
    "--rat-preset tiny --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --make-vocab-size-divisible-by 4 "
    "--seq-length 64 --micro-batch-size 1 --global-batch-size 8 --rat-arl-pattern d8 --rat-eval-patterns dense --lr 1e-2 "
    f"--train-iters {ITERATIONS} --eval-iters 1 --eval-interval {ITERATIONS} --num-workers 1 --log-interval 1 --tensorboard-log-interval 1 "
    "--save-interval 4"
).split()
TWO_NODES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=20"]


def submit(
    cluster: Cluster, output: Path, data: Path, *flags: str, sbatch: list[str] = TWO_NODES, script: str = "pretrain_1.5b", **environment
) -> str:
    """Submits a shipped script as its users do, with the tiny model; returns the job's number."""
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "DATA": data,
        "OUTPUT": output,
        "CHECKPOINT_SECONDS": 15,
        "SLURM_WAIT": 8,  # seconds for all ranks to exit; on a busy machine one takes several longer than another
        "NODE_CACHE": "/tmp/rat-slurm-test",
        "TMPDIR": "/dev/shm",  # which each of our nodes has for itself
        **environment,
    }
    words = ["--parsable", f"--chdir={REPOSITORY}", f"--output={output}.log", *sbatch, f"slurm/{script}.sbatch", *flags]
    return cluster.run("sbatch", *words, **{name: str(value) for name, value in settings.items()})


def submit_training(cluster: Cluster, output: Path, data: Path, *flags: str, **others) -> str:
    return submit(cluster, output, data, *TRAINING, *flags, **others)


def state(cluster: Cluster, job: str) -> str:
    return cluster.job(job)["JobState"]


def log(output: Path) -> str:
    path = output.with_name(output.name + ".log")
    return path.read_text() if path.exists() else ""


def wait_for_end(cluster: Cluster, job: str, output: Path, seconds: float = 240) -> str:
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
    try:
        return wait_for(lambda: (now := state(cluster, job)) in ends and now, seconds, "the end of the job")
    except AssertionError:
        tails = [f"{path}\n{path.read_text()[-1500:]}" for path in sorted(output.glob("logs/*/rank0.log"))]
        raise AssertionError("\n".join([log(output)[-4000:], *tails])) from None


def last_iteration(output: Path) -> int:
    """As far as any log says."""
    found = [int(n) for path in output.glob("logs/*/rank3.log") for n in re.findall(r"iteration +(\d+)/", path.read_text(errors="replace"))]
    return max(found, default=0)


def checkpoint(output: Path) -> int:
    path = output / "checkpoints/latest_checkpointed_iteration.txt"
    return int(path.read_text() or 0) if path.exists() else 0


def losses(output: Path) -> dict[str, dict[int, float]]:
    scalars = tensorboard_scalars(output / "tensorboard")
    return {name: scalars[name] for name in ("lm loss", "lm loss d8", "grad-norm")}


def tasks(node: str) -> list[psutil.Process]:
    """The training processes of a node, not their data workers."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        try:
            if "pretrain_rat.py" in " ".join(process.info["cmdline"] or []) and process.environ().get("SLURMD_NODENAME") == node:
                if process.parent().name() == "slurmstepd":
                    found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.fixture(scope="module")
def uninterrupted(cluster, data, tmp_path_factory) -> Path:
    """A run of two nodes with two ranks each that nothing happened to."""
    output = tmp_path_factory.mktemp("uninterrupted")
    job = submit_training(cluster, output, data)
    assert wait_for_end(cluster, job, output) == "COMPLETED", log(output)
    return output


def test_it_trains_and_a_finished_run_is_not_requeued(uninterrupted):
    text = log(uninterrupted)
    assert "launch: finished" in text and "requeued" not in text and "What will be used" in text
    assert len(losses(uninterrupted)["lm loss"]) == ITERATIONS and checkpoint(uninterrupted) == ITERATIONS
    assert losses(uninterrupted)["lm loss"][ITERATIONS] < losses(uninterrupted)["lm loss"][1] - 0.1
    logs = sorted(path.name for path in uninterrupted.glob("logs/*-0/rank*.log"))
    assert logs == [f"rank{rank}.log" for rank in range(4)]


def test_requeue_lost_rank_and_lost_node_lead_to_the_losses_of_an_uninterrupted_run(cluster, data, uninterrupted, tmp_path):
    job = submit_training(cluster, tmp_path, data, "--rat-hang-timeout-in-mins", "5")
    try:
        wait_for(lambda: checkpoint(tmp_path) >= 4, 120, "the first checkpoint")
        cluster.run("scontrol", "requeue", job)

        wait_for(lambda: checkpoint(tmp_path) >= 8, 120, "a checkpoint after the requeue")
        tasks("n2")[0].send_signal(signal.SIGKILL)
        wait_for(lambda: "start 3" in log(tmp_path), 60, "the start after the lost rank")

        wait_for(lambda: checkpoint(tmp_path) >= 12, 120, "a checkpoint after the lost rank")
        cluster.kill_node("n2")
        wait_for(lambda: state(cluster, job) == "PENDING", 90, "Slurm to miss the node")
    finally:
        if "n2" not in cluster.processes:
            cluster.start_node("n2")
    assert wait_for_end(cluster, job, tmp_path) == "COMPLETED", log(tmp_path)
    assert "start 4" in log(tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_limit_of_a_minute_leads_to_a_checkpoint_a_requeue_and_the_same_losses(cluster, data, uninterrupted, tmp_path):
    sbatch = [*TWO_NODES[:-1], "--time=1", "--signal=B:USR1@1"]  # Slurm looks every half minute, so it signals up to that much earlier
    job = submit_training(cluster, tmp_path, data, "--save-interval", "1000", sbatch=sbatch, CHECKPOINT_SECONDS=40)
    wait_for(lambda: last_iteration(tmp_path) >= 2 or "signal: asking" in log(tmp_path), 90, "the second iteration")
    held = tasks("n2")  # until the limit is near, lest the run finishes before
    for process in held:
        process.suspend()
    wait_for(lambda: "signal: asking every rank for a checkpoint" in log(tmp_path), 70, "Slurm's warning of the limit")
    for process in held:
        process.resume()
    wait_for(lambda: "requeued" in log(tmp_path), 30, "the requeue")
    assert 0 < checkpoint(tmp_path) < ITERATIONS
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    assert wait_for_end(cluster, job, tmp_path) == "COMPLETED", log(tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_rank_that_hangs_ends_the_start_with_the_stacks_of_the_others(cluster, data, uninterrupted, tmp_path):
    job = submit_training(cluster, tmp_path, data, "--rat-hang-timeout-in-mins", "0.2", MAX_RESTARTS=1)
    wait_for(lambda: last_iteration(tmp_path) >= 2, 120, "the second iteration")
    tasks("n2")[1].send_signal(signal.SIGSTOP)
    wait_for(lambda: "ended with exit code" in log(tmp_path), 120, "the end of the start")
    stacks = [(tmp_path / f"logs/{job}-0/rank{rank}.log").read_text(errors="replace") for rank in range(3)]
    assert all("most recent call first" in text and "no progress for 0.2 minutes" in text for text in stacks)
    wait_for(lambda: "requeued" in log(tmp_path), 30, "the requeue")
    cluster.run("scancel", job)


def test_one_node_goes_on_where_two_stopped(cluster, data, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("12")
    (tmp_path / "checkpoints/checkpoint_seconds").write_text("45.5\n")
    job = submit_training(cluster, tmp_path, data, sbatch=["--nodes=1", *TWO_NODES[1:]], CHECKPOINT_SECONDS="")
    assert wait_for_end(cluster, job, tmp_path) == "COMPLETED", log(tmp_path)
    assert "211 seconds before the limit are kept free" in log(tmp_path) and "--exit-duration-in-mins 16" in log(tmp_path)
    assert float((tmp_path / "checkpoints/checkpoint_seconds").read_text()) < 45  # of the last save
    expected = losses(uninterrupted)["lm loss"]
    assert losses(tmp_path)["lm loss"] == pytest.approx({n: loss for n, loss in expected.items() if n > 12}, rel=1e-4)


def test_adaptation_evaluation_and_conversion(cluster, data, uninterrupted, tmp_path):
    one_node = ["--nodes=1", *TWO_NODES[1:]]
    adapted, evaluated, model = tmp_path / "adapted", tmp_path / "evaluated", tmp_path / "model"
    start = {"PRETRAINED": uninterrupted / "checkpoints", "PATTERN": "d16s4"}
    few = [*TRAINING, "--train-iters", "3", "--rat-arl-pattern", "none", "--rat-eval-patterns", "d16s4"]
    job = submit(cluster, adapted, data, *few, sbatch=one_node, script="adapt", **start)
    assert wait_for_end(cluster, job, adapted) == "COMPLETED", log(adapted)
    load = {"LOAD": adapted / "checkpoints"}
    patterns = ["--rat-eval-patterns", "dense", "d16s4"]
    job = submit(cluster, evaluated, data, *TRAINING, *patterns, sbatch=one_node, script="evaluate", **load)
    assert wait_for_end(cluster, job, evaluated) == "COMPLETED", log(evaluated)
    there, here = (json.loads(path.read_text())["patterns"] for path in (adapted / "checkpoints/report.json", evaluated / "report.json"))
    assert here.keys() == {"dense", "d16s4"} and here["d16s4"] == pytest.approx(there["d16s4"], rel=1e-5)

    one_task = ["--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1G"]
    job = submit(cluster, model, data, "--pattern", "d16s4", sbatch=one_task, script="convert", **load)
    assert wait_for_end(cluster, job, model) == "COMPLETED", log(model)
    assert json.loads((model / "config.json").read_text())["attention_pattern"] == "d16s4"


def test_a_node_that_cannot_work_is_left_out_of_the_next_start(cluster, data, tmp_path):
    first = cluster.run("sinfo", "--noheader", "--Node", "--format=%N").split()[0]
    cache = Path("/tmp/rat-slurm-bad")
    cache.mkdir(exist_ok=True)
    slurmd = cluster.processes[first].pid
    subprocess.run(["nsenter", "--target", str(slurmd), "--mount", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(cache)], check=True)
    job = submit_training(cluster, tmp_path, data, sbatch=["--nodes=1", *TWO_NODES[1:]], NODE_CACHE=cache)
    wait_for(lambda: "start 2" in log(tmp_path), 90, "the second start")
    assert f"node {first} cannot be used: NODE_CACHE {cache} cannot be written" in log(tmp_path)
    facts = cluster.job(job)
    assert facts["ExcNodeList"] == first and facts["NodeList"] != first
    cluster.run("scancel", job)


def test_bad_input_is_not_requeued(cluster, data, tmp_path):
    job = submit_training(cluster, tmp_path, data, "--rat-pattern", "d16x", sbatch=["--nodes=1", *TWO_NODES[1:]])
    assert wait_for_end(cluster, job, tmp_path) == "FAILED"
    assert "not requeued, as it would end the same way: error: unknown attention pattern 'd16x'" in log(tmp_path)
    assert cluster.job(job)["ExitCode"] == "2:0"


def test_restarts_that_come_no_further_are_bounded(cluster, tmp_path):
    (tmp_path / "crash.py").write_text("raise RuntimeError('as ever')\n")
    script = tmp_path / "crash.sbatch"
    script.write_text(f"#!/bin/bash\nexport CHECKPOINTS=$OUTPUT/checkpoints\nexec bash {REPOSITORY}/slurm/launch.sh {tmp_path}/crash.py\n")
    words = ["--parsable", "--requeue", "--open-mode=append", "--nodes=1", "--ntasks-per-node=1", f"--output={tmp_path}.log"]
    job = cluster.run("sbatch", *words, f"--chdir={REPOSITORY}", script, OUTPUT=str(tmp_path), MAX_RESTARTS="2", SLURM_WAIT="3")
    assert wait_for_end(cluster, job, tmp_path) == "FAILED"
    text = log(tmp_path)
    assert text.count("launch: requeued") == 2 and "not requeued: 2 restarts without a new checkpoint" in text and os.getuid() == 0
