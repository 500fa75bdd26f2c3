"""Real runs of pretrain_rat.py for the tests, on shapes small enough for a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# The shape of the model and data that the training runs of the tests use.
SEQ_LENGTH = 64
MODEL_FLAGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --make-vocab-size-divisible-by 4".split()
TRAIN_FLAGS = (
    f"--seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --min-lr 1e-4 --lr-decay-style cosine "
    "--weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --log-interval 1 --tensorboard-log-interval 1 --eval-interval 10 --eval-iters 2 "
    "--num-workers 0"
).split()


def pretrain(*flags: str | Path, check: bool = True) -> subprocess.CompletedProcess:
    """Runs pretrain_rat.py to its end; with check, a failure shows the end of its log."""
    result = subprocess.run(pretrain_command(*flags), env=pretrain_environment(), capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def pretrain_here(*flags: str | Path, without: tuple[str, ...] = ()) -> None:
    """Runs pretrain_rat.py in this process, which saves the start of another; ``without`` names patches of Megatron to leave out."""
    from unittest.mock import patch

    import torch

    from benchmarks.megatron_runs import leave_groups, run_program

    torch.set_num_threads(1)
    with run_program(list(map(str, flags))) as main:
        from rat_megatron import pretrain
        from rat_megatron.training.patches.table import megatron_patches

        def table(*parts):
            return [row for row in megatron_patches(*parts) if row.name not in without]

        with patch.object(pretrain, "megatron_patches", table):
            try:
                main()
            except SystemExit as end:  # how Megatron stops for --exit-interval
                assert not end.code
            finally:
                leave_groups()


def pretrain_command(*flags: str | Path) -> list[str]:
    return [sys.executable, str(REPOSITORY / "pretrain_rat.py"), *map(str, flags)]


def pretrain_environment() -> dict[str, str]:
    """One thread, so that sums are taken in one order, and no trace of an enclosing torchrun."""
    outside = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in outside} | {"OMP_NUM_THREADS": "1"}


def tensorboard_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar that a run (with its resumptions) wrote: {tag: {iteration: value}}, later values over earlier ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return scalars


def arl_run_flags(start: Path, data: Path, folder: Path) -> list[str | Path]:
    """The flags of the run that several tests look at: 20 iterations of ARL with d8, from given weights."""
    return [
        *MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", data, "--pretrained-checkpoint", start, "--rat-arl-pattern", "d8",
        "--rat-eval-patterns", "dense", "d16", "[d8,d16w8s4]", "--train-iters", 20, "--lr-warmup-iters", 4,
        "--save", folder / "checkpoints", "--save-interval", 5, "--tensorboard-dir", folder / "tensorboard",
    ]  # fmt: skip


def prepare_tiny_data(folder: Path, seq_length: int) -> Path:
    """Prepares the documentation of a few Python modules as training data with a vocabulary of 300; returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from rat_megatron.data.prepare.pipeline import prepare

    texts = [doc for name in ("argparse", "json", "logging", "random", "typing", "string") for doc in _docstrings(name)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eod>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eod>").save_pretrained(folder / "tokenizer")
    data = folder / "data"
    prepare([folder / "text.jsonl"], data, tokenizer=str(folder / "tokenizer"), seq_length=seq_length, workers=1, val_fraction=0.2)
    return data


def _docstrings(module_name: str) -> list[str]:
    import ast
    import importlib

    tree = ast.parse(Path(importlib.import_module(module_name).__file__).read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
