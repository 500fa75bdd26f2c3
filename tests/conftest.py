"""What several test files share: a Megatron process group, small data, and real training runs of pretrain_rat.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import MODEL_FLAGS, SEQ_LENGTH, TRAIN_FLAGS, arl_run_flags, pretrain


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Folder of a small data set, prepared from the documentation of a few Python modules: T = 64, vocabulary 300."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from rat_megatron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
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
    prepare([folder / "text.jsonl"], data, tokenizer=str(folder / "tokenizer"), seq_length=SEQ_LENGTH, workers=1, val_fraction=0.2)
    return data


def _docstrings(module_name: str) -> list[str]:
    import ast
    import importlib

    tree = ast.parse(Path(importlib.import_module(module_name).__file__).read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]


@pytest.fixture(scope="session")
def one_iteration(tmp_path_factory, tiny_data) -> Path:
    """Checkpoint folder after a single iteration: common starting weights for the runs that are compared."""
    folder = tmp_path_factory.mktemp("one_iteration")
    pretrain(*MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--train-iters", 1, "--save", folder, "--save-interval", 1)
    return folder


@pytest.fixture(scope="session")
def arl_run(tmp_path_factory, tiny_data, one_iteration) -> Path:
    """Folder of an uninterrupted run of 20 ARL iterations: checkpoints/, tensorboard/ and log.txt."""
    folder = tmp_path_factory.mktemp("arl_run")
    result = pretrain(*arl_run_flags(one_iteration, tiny_data, folder))
    (folder / "log.txt").write_text(result.stdout)
    return folder


@pytest.fixture(scope="session")
def megatron_process():
    """Megatron's parallel state for one rank in this process, on the CPU where there is no GPU."""
    from rat_megatron.platform.cpu import patch_megatron_for_cpu, use_cpu_if_no_cuda

    on_cpu = use_cpu_if_no_cuda()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if on_cpu:
        patch_megatron_for_cpu()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
