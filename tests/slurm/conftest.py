"""A Slurm of two nodes on this machine for all tests of this folder, and data to train on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.helpers import prepare_tiny_data
from tests.slurm.cluster import Cluster


def pytest_collection_modifyitems(items):
    if missing := Cluster.is_possible():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:  # a short path: munge's socket is in it
        try:
            cluster = Cluster(Path(folder) / "first")
        except AssertionError:  # another program has taken one of the ports since they were found free
            cluster = Cluster(Path(folder) / "second")
        yield cluster
        cluster.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return prepare_tiny_data(tmp_path_factory.mktemp("slurm"), seq_length=64)
