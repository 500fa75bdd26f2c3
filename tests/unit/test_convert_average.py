"""`rat-megatron convert average`: the mean of a run's weights over its checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
from rat_megatron.cli.main import app
from rat_megatron.convert import convert_average, convert_to_hf
from rat_megatron.errors import UserError
from tests.converting import megatron_args, megatron_tensors, random_weights, write_checkpoint
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS, pretrain

EXTRA_STATE = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"


def write_iterations(folder, steps, dtype=torch.float32, layout=None, args=None):
    """{step: tensors} of checkpoints with fresh weights."""
    every = {}
    for step in steps:
        tensors = megatron_tensors(random_weights(), **(layout or {}))  # the names and shapes
        every[step] = {key: (torch.randn(value.shape) * 10 ** torch.empty(1).uniform_(-3, 1)).to(dtype) for key, value in tensors.items()}
        write_checkpoint(folder, every[step], args or megatron_args(params_dtype=dtype), step=step)
    return every


def bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [{}, {"stacked": False}, {"fused_norms": True}], ids=str)
def test_it_is_the_mean_in_float64_rounded_once(tmp_path, dtype, layout):
    every = write_iterations(tmp_path / "run", [10, 20, 30, 40], dtype, layout)
    convert_average(tmp_path / "run", tmp_path / "mean", last=3)
    mean = TorchDistCheckpoint(find_iteration(tmp_path / "mean"))
    assert mean.tensors.keys() == {key for key in every[40] if not key.startswith("optimizer.")}
    for key in mean.tensors:
        expected = np.mean([every[step][key].double().numpy() for step in (20, 30, 40)], axis=0)
        assert torch.equal(mean.read(key), torch.from_numpy(expected).to(dtype)), key
    assert mean.args().rat_averaged_iterations == [20, 30, 40]
    assert mean.read_object(EXTRA_STATE).getvalue() == b"never read"
    convert_to_hf(tmp_path / "mean", tmp_path / "hf")  # whose check has Megatron build a model of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_one_iteration_it_is_that_one(tmp_path, dtype):
    every = write_iterations(tmp_path / "run", [10, 20], dtype)
    every[10]["decoder.final_layernorm.weight"][:2] = torch.tensor([-0.0, torch.finfo(dtype).max])
    write_checkpoint(tmp_path / "run", every[10], megatron_args(params_dtype=dtype), step=10)
    convert_average(tmp_path / "run", tmp_path / "mean", steps=[10])
    mean = TorchDistCheckpoint(find_iteration(tmp_path / "mean"))
    for key in mean.tensors:
        assert torch.equal(bits(mean.read(key)), bits(every[10][key])), key


def test_iterations_after_the_latest_are_not_of_this_run(tmp_path):
    """A run that was taken back to an earlier iteration leaves them."""
    write_iterations(tmp_path / "run", [10, 20, 30, 40])
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("30")
    assert convert_average(tmp_path / "run", tmp_path / "mean", last=2).iterations == [20, 30]
    assert convert_average(tmp_path / "run", tmp_path / "named", steps=[40, 10]).iterations == [10, 40]


def test_what_cannot_be_averaged_is_explained(tmp_path):
    run = tmp_path / "run"
    every = write_iterations(run, [10, 20])

    def complains(match, folder=run, **options):
        with pytest.raises(UserError, match=match):
            convert_average(folder, tmp_path / "mean", **options)

    complains("--last 0 is no number of iterations", last=0)
    complains("--last -1 is no number", last=-1)
    complains(r"fewer than 5 iterations to average \(iter_0000010, iter_0000020\): give a smaller --last")
    complains("cannot both be given", last=2, steps=[10])
    complains("--iteration 10 is given twice", steps=[10, 20, 10])
    complains("iter_0000030 does not exist .*iter_0000010, iter_0000020", steps=[10, 30])
    complains("is one iteration: give the folder around it", run / "iter_0000020")
    complains("is not a folder", tmp_path / "nowhere")
    complains("holds no checkpoint", tmp_path)
    for changes in ({"rotary_base": 500}, {"num_attention_heads": 2}, {"rat_recurrence": False}):
        write_checkpoint(run, every[10], megatron_args(**changes), step=10)
        ((name, value),) = changes.items()
        if name == "rat_recurrence":
            (run / "latest_checkpointed_iteration.txt").write_text("20")
        complains(rf"iter_0000010 and iter_0000020 are different models \({name} {value} and", steps=[10, 20])
    write_checkpoint(run, megatron_tensors(random_weights(), fused_norms=True), megatron_args(), step=10)
    complains("iter_0000010 has no decoder.layers.input_layernorm.weight, which iter_0000020 has", steps=[10, 20])
    padded = every[10] | {"embedding.word_embeddings.weight": torch.zeros(72, 24)}
    write_checkpoint(run, padded, megatron_args(), step=10)
    complains(r"have \(72, 24\) and \(64, 24\) for embedding.word_embeddings.weight", steps=[10, 20])
    every[10]["decoder.final_layernorm.weight"][3] = float("inf")
    write_checkpoint(run, every[10], megatron_args(), step=10)
    complains("iter_0000010 has weights that are not finite, in decoder.final_layernorm.weight: leave it out", steps=[10, 20])
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "something was left behind"
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "kept").write_text("x")
    complains("not an empty folder", steps=[20])


@pytest.mark.slow
def test_megatron_takes_it(arl_run, tiny_data, tmp_path):
    """Evaluation and adaptation load it; a run that would resume without its optimizer does not."""
    run, mean = arl_run / "checkpoints", tmp_path / "mean"
    command = ["convert", "average", str(run), str(mean), "--iteration", "20", "--iteration", "15", "--iteration", "10"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "mean of the weights of iteration 10, 15, 20" in result.output, result.output

    flags = [*MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--rat-arl-pattern", "none"]
    pretrain(*flags, "--load", mean, "--save", tmp_path / "evaluated", "--train-iters", 20, "--skip-train")
    pretrain(*flags, "--pretrained-checkpoint", mean, "--save", tmp_path / "adapted", "--train-iters", 1, "--lr", 0, "--min-lr", 0)
    losses = [json.loads((tmp_path / name / "report.json").read_text())["patterns"]["dense"] for name in ("evaluated", "adapted")]
    assert losses[0] == losses[1]
    convert_to_hf(mean, tmp_path / "hf")
    assert "| Weights | mean of those after 10, 15, 20 steps |" in (tmp_path / "hf" / "README.md").read_text().splitlines()

    refused = pretrain(*flags, "--load", mean, "--save", tmp_path / "resumed", "--train-iters", 30, check=False)
    assert refused.returncode == 2 and "holds averaged weights and no optimizer to resume with" in refused.stderr
