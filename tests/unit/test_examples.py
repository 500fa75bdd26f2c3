"""The scripts of examples/ that make RAT+ models of others, and longer contexts of those, as they stand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.torch_dist import read_checkpoint_args
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.hf import RatPlusForCausalLM
from tests.families import write_model
from tests.helpers import REPOSITORY, SEQ_LENGTH, pretrain_environment

pytestmark = pytest.mark.slow

FLAGS = "--micro-batch-size 2 --global-batch-size 4 --lr 1e-4 --min-lr 1e-5 --num-workers 0 --eval-iters 1 --log-interval 1".split()


def run_example(name: str, *words: str | Path, **settings: str) -> None:
    environment = pretrain_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | settings
    result = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / name), *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def retrofitted(tiny_data, tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a model and of the run that examples/retrofit.sh makes of it."""
    folder = tmp_path_factory.mktemp("retrofit")
    write_model("qwen3", folder / "model")
    shutil.copytree(tiny_data.parent / "tokenizer", folder / "model", dirs_exist_ok=True)
    run_retrofit(folder, tiny_data)
    return folder / "model", folder / "run"


def run_retrofit(folder: Path, data: Path) -> None:
    flags = [*FLAGS, "--seq-length", SEQ_LENGTH, "--train-iters", 4, "--rat-arl-pattern", "d8"]
    run_example("retrofit.sh", folder / "model", data, folder / "run", "d8s4", *flags, ADAPT="--train-iters 2 --lr 5e-5")


def test_a_model_of_another_family_is_trained_adapted_and_exported(retrofitted, tiny_data):
    model, run = retrofitted
    tokens = torch.randint(300, (2, 32))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
        for name, pattern in (("dense-hf", "dense"), ("d8s4-hf", "d8s4")):
            exported = RatPlusForCausalLM.from_pretrained(run / name, dtype=torch.float32)
            assert exported.config.attention_pattern == pattern
            exported.set_attention_pattern("dense")  # what the sparse pattern leaves out would be a difference too
            # Trained a little: another model, and not one from nothing.
            assert 1e-3 < (exported(tokens).logits - logits).norm() / logits.norm() < 0.3, name
    assert set(json.loads((run / "dense" / "report.json").read_text())["patterns"]) >= {"dense", "d8s4"}
    assert [(run / name / TRACKER_NAME).read_text() for name in ("dense", "d8s4")] == ["4", "2"]

    before = files(run)
    run_retrofit(run.parent, tiny_data)  # all is there
    assert before and files(run) == before


def test_sequences_grow_with_the_base_of_rope(retrofitted, tiny_data, tmp_path):
    _, run = retrofitted
    text, tokenizer = tiny_data.parent / "text.jsonl", str(tiny_data.parent / "tokenizer")
    for length in (128, 256):
        prepare([text], tmp_path / f"data-{length}", tokenizer=tokenizer, seq_length=length, workers=1, val_fraction=0.2)
    words = [run / "dense", tmp_path / "run", "128:2000000 256:5000000:1", tmp_path / "data", *FLAGS, "--train-iters", 2]
    run_example("long_context.sh", *words, "--rat-arl-pattern", "d8")
    for length, base in ((128, 2000000), (256, 5000000)):
        args = read_checkpoint_args(tmp_path / "run" / str(length))
        assert (args.seq_length, args.rotary_base, args.num_query_groups) == (length, base, 2)
    assert Path(args.pretrained_checkpoint).name == "128"
