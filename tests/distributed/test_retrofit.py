"""Models of other families, retrofitted: every layout trains them as one rank does, and what it trained is exported as Megatron has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rat_megatron.checkpoint import TRACKER_NAME
from tests.distributed.layouts import train
from tests.distributed.test_layouts import CP2, PP2, SP, TP2
from tests.families import CONFIGS
from tests.helpers import REPOSITORY, pretrain_environment

LAYOUTS = {"tp2+sp+pp2": TP2 + SP + PP2, "cp2": CP2}
ITERATIONS = 5
MAKE = """
from pathlib import Path
from rat_megatron.convert import convert_retrofit
from tests.families import CONFIGS, write_model
for name in CONFIGS:
    folder = Path({folder!r}) / name
    write_model(name, folder / "model")
    convert_retrofit(folder / "model", folder / "checkpoints", output_gate=name == "mistral")
"""
EXPORT = """
from pathlib import Path
from rat_megatron.convert import convert_to_hf
for folder in Path({folder!r}).iterdir():
    for layout in ("alone", "tp2+sp+pp2"):
        convert_to_hf(folder / layout / "checkpoints", folder / layout / "ratplus")  # which compares logits
"""


def in_one_process(program: str, folder: Path) -> None:
    """On the first rank, outside of torchrun, while the others wait."""
    if torch.distributed.get_rank() == 0:
        subprocess.run([sys.executable, "-c", program.format(folder=str(folder))], check=True, env=pretrain_environment(), cwd=REPOSITORY)
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def retrofitted(ranks):
    in_one_process(MAKE, ranks / "retrofit")
    return ranks / "retrofit"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_trains_it_as_one_rank_does(retrofitted, data, name):
    folder = retrofitted / name
    flags = [
        "--pretrained-checkpoint",
        folder / "checkpoints",
        "--rat-arl-pattern",
        "d16",
        "--data-path",
        data,
        "--train-iters",
        ITERATIONS,
    ]
    expected = train(folder / "alone", *flags, alone=True, model=[])  # its sizes are the checkpoint's
    assert expected.losses[ITERATIONS - 1]["lm loss"] < expected.losses[0]["lm loss"] - 0.05
    for layout, words in LAYOUTS.items():
        actual = train(folder / layout, *flags, *words, model=[])
        assert len(actual.losses) == len(expected.losses) == ITERATIONS + 1
        for there, here in zip(expected.losses, actual.losses, strict=True):
            assert here == pytest.approx(there, rel=1e-4), layout


def test_what_was_trained_is_exported_as_megatron_has_it(retrofitted):
    assert all((retrofitted / name / "tp2+sp+pp2" / "checkpoints" / TRACKER_NAME).is_file() for name in CONFIGS)  # by the test above
    in_one_process(EXPORT, retrofitted)
