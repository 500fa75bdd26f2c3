"""The whole table: the operators and training, each in a process of its own, with goals, spread, device and versions, as Markdown.

python -m benchmarks [--json FILE]                 runs both; about a quarter of an hour on an H100
python -m benchmarks --read FILE... [--json FILE]  from what benchmarks.kernels and benchmarks.training wrote, in any parts
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import describe, write_json
from benchmarks.training import RATIO_GOAL

_WORK = {
    "scan-forward": "gated scan forward, 4x4096x2048",
    "scan-backward": "gated scan backward, 4x4096x2048",
    "scan-262144": "gated scan, 1x262144x2048",
    "prefill-262144-d16": "scan, RoPE and attention, 1x262144, D=16",
    "prefill-262144-d64": "scan, RoPE and attention, 1x262144, D=64",
    "prefill-64x4096-d64": "scan, RoPE and attention, 64x4096, D=64",
    "training-d64": "scan and attention, forward and backward, 2x4096, D=64",
    "decode-dense": "decode step, batch 256 at 4096, D=1",
    "decode-d16": "decode step, batch 256 at 4096, D=16",
    "decode-d64": "decode step, batch 256 at 4096, D=64",
    "arl-1.5b": "1.5B, ARL iteration, bf16",
    "arl-1.5b-fp8": "1.5B, ARL iteration, FP8",
    "arl-2.6b": "2.6B, ARL iteration, bf16",
    "arl-2.6b-fp8": "2.6B, ARL iteration, FP8",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", nargs="+", type=Path, metavar="FILE", help="JSON of earlier runs; of a row in several, the last counts")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a trial on any machine")
    parser.add_argument("--json", metavar="FILE", help="write all of it here")
    args = parser.parse_args(arguments)
    merged: dict[str, Any] = {"tiny": False, "machines": {}, "rows": {}, "runs": {}, "ratios": {}}
    for part in [json.loads(path.read_text()) for path in args.read] if args.read else _run_both(args.tiny):
        merged["tiny"] |= part["tiny"]
        for key in ("rows", "runs", "ratios"):
            merged[key] |= part.get(key, {})
            merged["machines"] |= {name: part["machine"] for name in part.get(key, {})}
    print(table(merged))
    write_json(args.json, merged)


def _run_both(tiny: bool) -> list[dict[str, Any]]:
    """Runs the two benchmarks, whose lines go to stderr while they run."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for module, more in (("kernels", []), ("training", ["--runs-log", f"{folder}/log"])):
            command = [sys.executable, "-m", f"benchmarks.{module}", "--json", f"{folder}/{module}.json", *more, *["--tiny"] * tiny]
            subprocess.run(command, stdout=sys.stderr, check=True)
            results.append(json.loads(Path(folder, f"{module}.json").read_text()))
    return results


def table(merged: dict[str, Any]) -> str:
    """Markdown: one line for each goal, and what it was measured on."""
    lines = ["| work | measured | lowest-highest | goal | | beside it |", "|---|---|---|---|---|---|"]
    for name, row in merged["rows"].items():
        if "error" in row:
            lines.append(f"| {_WORK[name]} | failed | | | | {row['error'][:80]} |")
            continue
        ours = row["times"]["ours"]
        others = ", ".join(f"{other} {times['median']:.3g} ms" for other, times in row["times"].items() if other != "ours")
        lines.append(
            f"| {_WORK[name]} | {ours['median']:.3g} ms ({row['measured']}) | {ours['lowest']:.3g}-{ours['highest']:.3g} ms "
            f"| {row['goal']} | {_verdict(row['met'])} | {others} |"
        )
    for name, run in merged["runs"].items():
        if "error" in run or not run["goal"]:
            continue
        seconds = run["seconds"]
        lines.append(
            f"| {_WORK[name]} | {run['tokens_per_second']:,.0f} tokens/s | {seconds['lowest']:.3f}-{seconds['highest']:.3f} s "
            f"| >= {run['goal']:,.0f} | {_verdict(run['tokens_per_second'] >= run['goal'])} "
            f"| {run['peak_gigabytes']:.1f} GB, MFU {run['model_flops_utilisation']:.1%} |"
        )
    for kind, ratio in merged["ratios"].items():
        lines.append(
            f"| 1.5B, RAT+ dense step over Megatron's GPT, {kind} | {ratio:.3f} | | <= {RATIO_GOAL} | {_verdict(ratio <= RATIO_GOAL)} | |"
        )
    if merged["tiny"]:
        lines += ["", "With --tiny: a trial, none of it measured at the sizes named."]
    return "\n".join([*lines, "", *dict.fromkeys(describe(facts) for facts in merged["machines"].values())])


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    main()
