"""examples/replication/table.py: results of several models beside each other."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.helpers import REPOSITORY

TABLE = [sys.executable, str(REPOSITORY / "examples" / "replication" / "table.py")]


def test_a_row_for_each_result_and_a_column_for_each_model(tmp_path):
    for model, loss, lengths in (("with", 3.25, [1.0, 2.5, 9.0]), ("without", 3.5, None)):
        for scores, pattern in (("dense", "dense"), ("d4", "d4")):
            found = {"loss": {"loss": loss} | ({"memory_lengths": lengths} if lengths else {})}
            if pattern == "d4":
                found["needles"] = {"512": {"single": {"score": 0.5}}}
            folder = tmp_path / model / f"scores-{scores}"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"patterns": {pattern: found}}))
    printed = subprocess.run([*TABLE, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [
        "| | with | without |",
        "|---|---:|---:|",
        "| d4: loss | 3.2500 | 3.5000 |",
        "| d4: memory, tokens | 2.50 (1.00 to 9.00) |  |",
        "| d4: single, 512 | 0.50 | 0.50 |",
        "| dense: loss | 3.2500 | 3.5000 |",
        "| dense: memory, tokens | 2.50 (1.00 to 9.00) |  |",
    ]


def test_a_folder_without_results_has_its_sentence(tmp_path):
    result = subprocess.run([*TABLE, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2 and "evaluate its models first" in result.stderr and "Traceback" not in result.stderr
