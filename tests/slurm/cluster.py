"""A real Slurm of two nodes on this machine: slurmctld, two slurmd and munge, in a folder of its own, ended by their process ids."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("n1", "n2")

# No node has GPUs: training runs on the CPU.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=20
KillWait=10
InactiveLimit=0
MinJobAge=3600
SchedulerParameters=sched_interval=2,requeue_delay=1
JobRequeue=1
GresTypes=gpu
NodeName=n[1-2] NodeHostname=localhost Port=[{node_port}-{last_node_port}] CPUs=4 RealMemory=2000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Starts when made; ``close`` ends every process it started."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "MUNGE_SOCKET": str(folder / "munge/socket")}
        self.processes: dict[str, subprocess.Popen] = {}
        self._write_configuration()
        munge = folder / "munge"
        self._start(
            "munged", "--foreground", "--force", "--socket", munge / "socket", "--key-file", munge / "key", "--pid-file", munge / "pid",
            "--log-file", munge / "log", "--seed-file", munge / "seed", "--num-threads", "2",
        )  # fmt: skip
        wait_for(lambda: (munge / "socket").exists(), 10, "munged")
        self._start("slurmctld", "-D", "-f", folder / "slurm.conf")
        for node in NODES:
            self.start_node(node)
        try:
            wait_for(lambda: self.states() == {node: "idle" for node in NODES}, 60, "two idle nodes")
        except AssertionError:
            self.close()
            raise

    @staticmethod
    def is_possible() -> str | None:
        """What is missing, if anything."""
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            return f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
        if os.getuid() != 0:
            return "needs root: it starts slurmd"
        mounting = subprocess.run(["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"], capture_output=True)
        return "needs the right to mount: each node has a /dev/shm of its own" if mounting.returncode else None

    def start_node(self, name: str) -> None:
        """A slurmd with a /dev/shm of its own, as a node of its own has."""
        own_memory = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        self._start(*own_memory, "slurmd", "-D", "-f", self.folder / "slurm.conf", "-N", name, key=name)

    def kill_node(self, name: str) -> None:
        """Kills slurmd and all that runs under it, as a node that loses power."""
        self._kill(lambda environment: name in (environment.get("TEST_NODE"), environment.get("SLURMD_NODENAME")))
        self.processes.pop(name).wait()

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> str:
        """Output of a command that sees this cluster."""
        result = subprocess.run(
            [str(word) for word in command], env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert not check or result.returncode == 0, result.stderr
        return result.stdout.strip()

    def states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
        return dict(line.split() for line in lines)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def close(self) -> None:
        self._kill(lambda environment: True)
        for process in self.processes.values():
            process.wait()

    def _kill(self, chosen: Callable[[dict[str, str]], bool]) -> None:
        """Kills those processes of this cluster, daemons, steps and tasks, whose environment is ``chosen``."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and chosen(environment):
                    parent = process.parent()
                    process.kill()
                    if parent is not None and parent.name() == "slurmstepd":  # which hides its environment
                        parent.kill()

    def _start(self, *command: str | Path, key: str | None = None) -> None:
        key = key or str(command[0])
        with open(self.folder / f"{key}.out", "a") as log:
            self.processes[key] = subprocess.Popen(
                [str(word) for word in command], env=self.environment | {"TEST_NODE": key}, stdout=log, stderr=log, start_new_session=True
            )

    def _write_configuration(self) -> None:
        (self.folder / "munge").mkdir(parents=True)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        first, second, third = _free_ports(3)
        while third != second + 1:  # the nodes' ports are a range
            first, second, third = _free_ports(3)
        text = CONFIGURATION.format(folder=self.folder, controller_port=first, node_port=second, last_node_port=third)
        (self.folder / "slurm.conf").write_text(text)


def wait_for(condition, seconds: float, what: str):
    """The first true value of ``condition()``; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    sockets[0].bind(("", 0))
    sockets[1].bind(("", 0))
    ports = [sockets[0].getsockname()[1], sockets[1].getsockname()[1]]
    with suppress(OSError):
        sockets[2].bind(("", ports[1] + 1))
        ports.append(ports[1] + 1)
    for each in sockets:
        each.close()
    return ports if len(ports) == count else _free_ports(count)
