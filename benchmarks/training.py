"""How fast a model trains on this GPU, through pretrain_rat.py itself: iterations of active recurrence learning, and RAT+ against GPT.

    python -m benchmarks.training [--only NAME...] [--flags "MORE MEGATRON FLAGS"] [--profile] [--json FILE]

All runs share one process and one set of random tokens. An iteration is a global batch of four microbatches, used twice under ARL;
tokens are counted once. Model FLOPs utilisation is against the bf16 peak of a Hopper GPU, for FP8 too. "gpt" is Megatron's GPT of the
same size (no recurrence, output gate on), "dense" RAT+ without ARL; the two take turns. All but one run replay a CUDA graph of each
step. --tiny tries it all on any machine.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import megatron_runs
from benchmarks.iteration_profile import Profile
from benchmarks.megatron_runs import FP8, GRAPHS, TINY_MODEL, common_flags, keep_threads_few, leave_groups, random_data
from benchmarks.timing import describe, machine, write_json

_PEAK = 989.4e12  # bf16 FLOP/s of an H100 or H200 (SXM) without sparsity
_MICROBATCHES = 4
_WITHOUT_ARL = [*GRAPHS, "--rat-arl-pattern", "none"]
_GPT = [*_WITHOUT_ARL, "--no-rat-recurrence"]

# name: preset, flags, and the tokens/s a GPU to reach (issue: 1.5 and 1.9 or 2 times the reference's 17,165 and 8,947)
RUNS: dict[str, tuple[str, list[str], float | None]] = {
    "arl-1.5b": ("1.5b", GRAPHS, 25700),
    "arl-1.5b without graphs": ("1.5b", [], 25700),
    "arl-1.5b precision-aware": ("1.5b", [*GRAPHS, "--use-precision-aware-optimizer"], 25700),
    "arl-1.5b-fp8": ("1.5b", [*GRAPHS, *FP8], 1.9 * 17165),
    "arl-2.6b": ("2.6b", GRAPHS, 1.5 * 8947),
    "arl-2.6b-fp8": ("2.6b", [*GRAPHS, *FP8], 2 * 8947),
    "gpt": ("1.5b", _GPT, None),
    "dense": ("1.5b", _WITHOUT_ARL, None),
    "gpt again": ("1.5b", _GPT, None),
    "dense again": ("1.5b", _WITHOUT_ARL, None),
    "gpt-fp8": ("1.5b", [*_GPT, *FP8], None),
    "dense-fp8": ("1.5b", [*_WITHOUT_ARL, *FP8], None),
    "gpt-fp8 again": ("1.5b", [*_GPT, *FP8], None),
    "dense-fp8 again": ("1.5b", [*_WITHOUT_ARL, *FP8], None),
}
RATIO_GOAL = 1.06  # of a dense step's time to GPT's


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--iterations", type=int, default=12, help="of each run")
    parser.add_argument("--warm-up", type=int, default=5, help="iterations that are not counted")
    parser.add_argument("--flags", type=shlex.split, default=[], help="more flags of pretrain_rat.py, for every run")
    parser.add_argument("--profile", action="store_true", help="show where the time of one more iteration goes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a trial on any machine")
    parser.add_argument("--runs-log", metavar="FILE", help="where what the runs print goes; default: here")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here, after every run")
    args = parser.parse_args(arguments)
    keep_threads_few()
    results: dict[str, Any] = {"machine": machine(), "tiny": args.tiny, "flags": args.flags, "runs": {}}
    print(describe(results["machine"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = random_data(Path(folder), samples=128, seq_length=256 if args.tiny else 4096, vocab_size=512 if args.tiny else 32000)
        for name in args.only:
            try:
                results["runs"][name] = _measure(name, data, args)
            except (Exception, SystemExit) as error:  # one configuration that fails must not lose the others
                results["runs"][name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
                del error
            leave_groups()
            print(_line(name, results["runs"][name]), flush=True)
            write_json(args.json, results)
    results["ratios"] = _ratios(results["runs"])
    for name, ratio in results["ratios"].items():
        print(f"dense step over GPT's, {name}: {ratio:.3f}, goal <= {RATIO_GOAL}, {'met' if ratio <= RATIO_GOAL else 'MISS'}")
    write_json(args.json, results)


def _measure(name: str, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    preset, flags, goal = RUNS[name]
    profile = Profile(args.iterations + 1) if args.profile and "again" not in name else None
    iterations = args.iterations + 2 * bool(profile)  # the profiled one, and one before it that finds the profiler started
    run = megatron_runs.run(
        [*_model(preset, args.tiny), *_what_a_trial_has(flags, args.tiny), *common_flags(data, iterations, args.tiny), *args.flags],
        profile.after if profile else lambda count: None,
        args.runs_log,
    )
    seconds = run.seconds[args.warm_up : args.iterations]
    median = statistics.median(seconds)
    tokens = _batch(preset) * (256 if args.tiny else 4096)
    result = {
        "tokens_per_second": tokens / median,
        "goal": goal,
        "seconds": {"median": median, "lowest": min(seconds), "highest": max(seconds), "counted": seconds},
        "peak_gigabytes": run.peak_bytes / 1e9,
        "model_flops_utilisation": run.flops / median / _PEAK,
        "parameters": run.parameters,
        "losses": run.losses,
        "left_behind_gigabytes": torch.cuda.memory_allocated() / 1e9,
    }
    if profile:
        try:
            result["profile"] = profile.summary()
            profile.show(name)
        except Exception as error:  # the figures are there all the same
            print(f"no profile of {name}: {type(error).__name__}: {error}"[:500], flush=True)
    return result


def _model(preset: str, tiny: bool) -> list[str]:
    batch = ["--global-batch-size", str(_batch(preset)), "--seed", "1005"]
    if not tiny:
        return ["--rat-preset", preset, *batch]
    return [*TINY_MODEL, "--seq-length", "256", "--micro-batch-size", str(_batch(preset) // _MICROBATCHES), *batch]


def _batch(preset: str) -> int:
    return _MICROBATCHES * {"1.5b": 2, "2.6b": 1}[preset]


def _what_a_trial_has(flags: list[str], tiny: bool) -> list[str]:
    """A CPU has neither FP8 nor CUDA graphs: the trial runs the rest."""
    return [word for word in flags if word not in (*FP8, *GRAPHS)] if tiny and not torch.cuda.is_available() else flags


def _ratios(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Dense step over GPT step, over the iterations of both turns."""
    ratios = {}
    for kind in ("", "-fp8"):
        both = []
        for name in ("dense", "gpt"):
            turns = [runs.get(f"{name}{kind}{turn}", {}).get("seconds", {}) for turn in ("", " again")]
            both.append([second for turn in turns for second in turn.get("counted", [])])
        if all(both):
            ratios["FP8" if kind else "bf16"] = statistics.median(both[0]) / statistics.median(both[1])
    return ratios


def _line(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name:26}failed: {result['error'][:400]}"
    goal = f"goal {result['goal']:,.0f} {'met' if result['tokens_per_second'] >= result['goal'] else 'MISS'}" if result["goal"] else ""
    seconds = result["seconds"]
    return (
        f"{name:26}{result['tokens_per_second']:>10,.0f} tokens/s {goal:18}  iteration {seconds['median']:.3f} s "
        f"({seconds['lowest']:.3f}-{seconds['highest']:.3f})  peak {result['peak_gigabytes']:.1f} GB  "
        f"MFU {result['model_flops_utilisation']:.1%}  {result['parameters'] / 1e9:.3f}B parameters  "
        f"left behind {result['left_behind_gigabytes']:.2f} GB"
    )


if __name__ == "__main__":
    main()
