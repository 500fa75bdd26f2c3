"""Tasks of lm-evaluation-harness on a RAT+ model, with the protocols of the RAT+ paper's evaluation (arXiv 2602.18196).

The harness's own model class, tasks and metrics are used; here are only settings. Commonsense: zero-shot, no BOS. LongBench: prompts cut in
their middle, greedy, no BOS, own answer lengths, stops and repetition penalties. RULER: the eight NIAH tasks.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from rat_megatron.errors import UserError, one_line
from rat_megatron.evaluation.model import LoadedModel

COMMONSENSE = ("piqa", "arc_easy", "arc_challenge", "winogrande", "lambada_openai", "hellaswag")
RULER_NIAH = tuple(f"niah_{name}" for name in "single_1 single_2 single_3 multikey_1 multikey_2 multikey_3 multiquery multivalue".split())
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # those that the harness has a metric for
_QUESTION = "\nQuestion"
# max_gen_toks, stops, and repetition penalty, of each LongBench task. A model without instruction tuning goes on with the next question.
LONGBENCH = {
    **{f"longbench_{name}": (128, [_QUESTION], None) for name in ("narrativeqa", "qasper")},
    "longbench_multifieldqa_en": (64, [_QUESTION], None),
    **{f"longbench_{name}": (32, [_QUESTION], None) for name in ("hotpotqa", "2wikimqa", "musique")},
    **{f"longbench_{name}": (512, [], 1.2) for name in ("gov_report", "qmsum", "multi_news")},
    "longbench_trec": (64, [_QUESTION], None),
    "longbench_triviaqa": (32, [_QUESTION], None),
    "longbench_samsum": (128, [], None),
    **{f"longbench_{name}": (64, [], None) for name in ("lcc", "repobench-p")},
}
_FIRST_LINE_COUNTS = ("longbench_trec", "longbench_triviaqa", "longbench_samsum")  # as in LongBench's own scoring
GROUPS = {"commonsense": COMMONSENSE, "longbench": tuple(LONGBENCH), "ruler-niah": RULER_NIAH}
# The metric that stands for a task in tables, plots and averages; every metric is in the results.
_METRICS = ("score", "acc", "exact_match", "f1", "perplexity")
_NORMALIZED = ("arc_challenge", "hellaswag")  # whose answers differ much in length
_DATA_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_FOLDERS = ("piqa", "arc", "winogrande", "lambada", "hellaswag", "longbench", "ruler")  # of the tasks above in the harness


def expand(names: list[str]) -> list[str]:
    """Task names, with the names of groups replaced by their tasks, each once."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


class TaskSuite:
    """Tasks with their data, loaded once and run under as many patterns as wanted.

    ``task_data`` is a folder of local data: TASK.jsonl, .json, .parquet or .arrow, or a folder TASK of save_to_disk, with the columns of
    the task's data set on the Hub. Tasks without any there are fetched from the Hub. Raises UserError for an unknown task, for data that
    can neither be found nor fetched, and where lm-eval is missing.
    """

    def __init__(self, names: list[str], loaded: LoadedModel, *, task_data: Path | None = None, batch_size: int = 1):
        if task_data is not None and not task_data.is_dir():
            raise UserError(f"--task-data {task_data} is not a folder: give one that holds TASK.jsonl or the like.")
        model_class = _need_harness()
        self.names = expand(names)
        fitting = [length for length in RULER_LENGTHS if length <= loaded.config.max_position_embeddings]
        loaded.need_tokenizer()
        self._manager = _manager(self.names, {"tokenizer": str(loaded.folder), "max_seq_lengths": fitting[-1:]})
        self._tasks = [_load(self._manager, name, task_data) for name in self.names]
        with _quiet("lm_eval"):
            self._model = model_class(loaded, batch_size=batch_size, cut_in_middle=set(LONGBENCH))

    @property
    def generated(self) -> list[str]:
        """The tasks whose answers the model writes; of others it scores those that are given, at once with the question."""
        return [name for name, task in zip(self.names, self._tasks, strict=True) if task.OUTPUT_TYPE == "generate_until"]

    def run(self, names: list[str] | None = None, limit: int | None = None) -> dict[str, dict[str, float]]:
        """For each task, or those named, its metrics and their standard errors (``acc``, ``acc_stderr``, ...) on the first ``limit``
        documents (default: all), under the model's current attention pattern."""
        names = self.names if names is None else names
        if not names:
            return {}
        from lm_eval import simple_evaluate

        # The standard error of a perplexity comes from resampling. A thousand draws are plenty, and need no processes, which the harness
        # would fork off one that has threads and perhaps a GPU.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        options = {"task_manager": self._manager, "bootstrap_iters": 1000, "log_samples": False}
        with _quiet("lm_eval"):
            wanted = [task for name, task in zip(self.names, self._tasks, strict=True) if name in names]
            results = simple_evaluate(self._model, tasks=wanted, limit=limit, **options)
        return {name: _metrics(results["results"][name]) for name in names}


def headline(task: str, metrics: dict[str, float]) -> str:
    """The name of the metric that stands for a task."""
    if task in _NORMALIZED and "acc_norm" in metrics:
        return "acc_norm"
    return next((name for name in (*_METRICS, *metrics) if name in metrics), "")


def averages(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of the tasks' headline metrics, for every group of which all tasks were run."""
    return {
        group: sum(results[task][headline(task, results[task])] for task in tasks) / len(tasks)
        for group, tasks in GROUPS.items()
        if all(results.get(task) for task in tasks)
    }


# ---- the harness's tasks -------------------------------------------------------------------------------------------------------------


def _need_harness() -> type:
    """The model class for the harness; raises UserError without the harness and what it imports."""
    try:
        from rat_megatron.evaluation.harness_model import HarnessModel
    except ImportError as error:
        raise UserError(f"--task needs lm-evaluation-harness ({one_line(error)}): install rat-megatron[eval].") from error
    return HarnessModel


def _manager(names: list[str], metadata: dict[str, Any]) -> Any:
    from lm_eval import tasks

    if not set().union(*GROUPS.values()).issuperset(names):
        return tasks.TaskManager(metadata=metadata)
    # To index the thousands of other tasks takes a quarter of a minute.
    folders = [Path(tasks.__file__).parent / name for name in _FOLDERS]
    return tasks.TaskManager(include_defaults=False, include_path=folders, metadata=metadata)


def _load(manager: Any, name: str, task_data: Path | None) -> Any:
    """One task with the paper's settings. Raises UserError."""
    if name not in manager.all_subtasks:
        kind = "a group of tasks" if name in manager.all_tasks else "no task"
        raise UserError(
            f"--task {name} is {kind} of lm-evaluation-harness: name a task (`lm_eval ls subtasks` lists them) or {', '.join(GROUPS)}."
        )
    found = task_data and _find_data(task_data, name)
    if name in RULER_NIAH and not found and not manager.metadata["max_seq_lengths"]:
        raise UserError(f"--task {name} begins at {RULER_LENGTHS[0]} tokens, more than the model takes: use --needle-length instead.")
    overrides = {"custom_dataset": _reader(found)} if found else {}
    try:
        with _quiet("huggingface_hub", "lm_eval"):
            task = manager.load({"group": "rat_megatron", "task": [{"task": name, **overrides}]})["tasks"][name]
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--task {name} needs a package that is not here ({one_line(error)}): install rat-megatron[eval].") from error
    except Exception as error:  # the Hub, `datasets` and the tasks' own code fail in many ways
        if found:
            raise UserError(f"{found} is not the data of task {name}: {type(error).__name__}, {one_line(error)}.") from error
        raise UserError(_how_to_get(manager, name, error)) from error
    if name in LONGBENCH:
        max_gen_toks, until, penalty = LONGBENCH[name]
        settings = {"do_sample": False, "temperature": 0.0, "max_gen_toks": max_gen_toks, "until": until}
        task.set_config("generation_kwargs", settings | ({"repetition_penalty": penalty} if penalty else {}))
    if name in _FIRST_LINE_COUNTS:
        task.config.process_results = _of_first_line(task.config.process_results)
    return task


def _of_first_line(process_results: Callable) -> Callable:
    def process(doc: dict, results: list[str]) -> dict[str, float]:
        return process_results(doc, [text.lstrip("\n").split("\n")[0] for text in results])

    return process


def _find_data(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}{suffix}" for suffix in (*_DATA_FORMATS, "")) if path.exists()), None)


def _reader(path: Path) -> Callable[..., Mapping[str, Any]]:
    """What the harness calls for a task's splits. A single file or set serves as whichever split the task evaluates."""

    def read(**_: Any) -> Mapping[str, Any]:
        from datasets import DatasetDict, load_dataset, load_from_disk

        try:
            if path.is_dir():
                data = load_from_disk(str(path))
            else:
                data = load_dataset(_DATA_FORMATS[path.suffix], data_files=str(path), split="train")
        except Exception as error:  # as many kinds as formats
            raise UserError(f"{path} cannot be read as the data of a task: {one_line(error)}.") from error
        return data if isinstance(data, DatasetDict) else defaultdict(lambda: data)

    return read


def _how_to_get(manager: Any, name: str, error: Exception) -> str:
    """The sentence for a task whose data is not here: what to download where there is a network, and where to put it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=False)
    if name in RULER_NIAH:
        return (
            f"the data of task {name} cannot be made, it takes the essays of the Hub's baber/paul_graham_essays ({one_line(error)}): put "
            f"{name}.jsonl, written where there is a network, into a folder and give it with --task-data, or use --needle-length."
        )
    arguments = ", ".join(repr(value) for value in (config["dataset_path"], config.get("dataset_name")) if value)
    return (
        f"the data of task {name} is not in --task-data and cannot be fetched ({one_line(error)}): where there is a network, run "
        f"datasets.load_dataset({arguments}).save_to_disk('FOLDER/{name}'), and give --task-data FOLDER."
    )


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" and "acc_stderr,none" as "acc" and "acc_stderr"; the filter stays when it is another."""
    metrics = {}
    for key, value in results.items():
        name, comma, filter_name = key.partition(",")
        if comma and isinstance(value, (int, float)) and math.isfinite(value):
            metrics[name if filter_name == "none" else key] = float(value)
    # RULER's tasks have a metric for every length, and -1 for those that were not asked for.
    unused = {name for name, value in metrics.items() if value == -1}
    return {name: value for name, value in metrics.items() if name.replace("_stderr", "") not in unused}


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Silences warnings that say again and again what a single sentence says in the end;
    what is printed goes to stderr, as progress does."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
