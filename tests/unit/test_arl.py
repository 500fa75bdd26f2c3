"""Active recurrence learning against a plain PyTorch loop, with the model of the Hugging Face format as the plain model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rat_megatron.convert import convert_to_hf
from rat_megatron.data.loader.batches import train_batches
from rat_megatron.data.loader.streams import parse_data_path
from rat_megatron.hf import RatPlusForCausalLM
from rat_megatron.training.loop.arl import StepIterator
from rat_megatron.training.monitoring.comparison import compare_runs
from tests.helpers import MODEL_FLAGS, SEQ_LENGTH, TRAIN_FLAGS, pretrain, tensorboard_scalars

pytestmark = pytest.mark.slow


def test_a_step_is_drawn_at_once_and_given_again():
    drawn = []
    iterator = StepIterator(drawn.append(n) or n for n in range(10))
    iterator.load(3)
    assert drawn == [0, 1, 2]
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    iterator.rewind()
    assert [next(iterator) for _ in range(3)] == [0, 1, 2] and drawn == [0, 1, 2]
    iterator.load(2)
    assert [next(iterator) for _ in range(2)] == [3, 4]


@pytest.fixture(scope="module")
def plain_run(one_iteration, tiny_data, tmp_path_factory):
    """The run of the fixture arl_run, written out: returns its model after 20 iterations and what it logged."""
    torch.set_num_threads(1)
    convert_to_hf(one_iteration, tmp_path_factory.mktemp("start") / "hf")
    model = RatPlusForCausalLM.from_pretrained(tmp_path_factory.getbasetemp() / "start0" / "hf", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    sizes = {"micro_batch_size": 2, "seq_length": SEQ_LENGTH}
    batches = train_batches(parse_data_path([str(tiny_data)]), **sizes, eod_id=0, seed=1234, num_workers=0)
    logged = {"lm loss": [], "lm loss d8": [], "grad-norm": [], "grad norm d8": [], "learning-rate": []}
    for iteration in range(1, 21):
        # Megatron steps the schedule after the update: the first iteration's rate is that of step 1.
        rate = _learning_rate(iteration - 1)
        microbatches = [next(batches) for _ in range(2)]
        for pattern, suffix, norm_name in (("d8", " d8", "grad norm d8"), ("dense", "", "grad-norm")):
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.set_attention_pattern(pattern)
            optimizer.zero_grad()
            losses = []
            for batch in microbatches:
                logits = model(batch["tokens"]).logits
                tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
                mask = batch["loss_mask"].flatten()
                losses.append(((tokens * mask).sum(), mask.sum()))
                (losses[-1][0] / losses[-1][1] / len(microbatches)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            logged["lm loss" + suffix].append(float(sum(loss for loss, _ in losses) / sum(count for _, count in losses)))
            logged[norm_name].append(float(norm))
        logged["learning-rate"].append(_learning_rate(iteration))
    return model, logged


def _learning_rate(step: int, peak=1e-2, lowest=1e-4, warmup=4, steps=20) -> float:
    if step <= warmup:
        return peak * step / warmup
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_losses_gradient_norms_and_learning_rate_equal_those_of_a_plain_loop(arl_run, plain_run):
    scalars = tensorboard_scalars(arl_run / "tensorboard")
    for name, expected in plain_run[1].items():
        assert list(scalars[name]) == list(range(1, 21)), name
        actual = list(scalars[name].values())
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_equal_those_of_a_plain_loop(arl_run, plain_run, one_iteration, tmp_path):
    convert_to_hf(arl_run / "checkpoints", tmp_path / "hf")
    trained = RatPlusForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    convert_to_hf(one_iteration, tmp_path / "start")
    start = RatPlusForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32).state_dict()
    for name, expected in plain_run[0].state_dict().items():
        moved = (expected - start[name]).norm()
        assert moved > 0, name
        assert (trained[name] - expected).norm() < 1e-2 * moved, name


def test_log_line_carries_both_losses_and_gradient_norms(arl_run):
    line = next(line for line in (arl_run / "log.txt").read_text().splitlines() if "iteration       20/" in line)
    for part in ("lm loss:", "lm loss d8:", "grad norm:", "grad norm d8:"):
        assert part in line, line


def test_twice_the_same_pattern_under_a_longer_word(tiny_data, tmp_path):
    """Two losses of one name, of which the one after the update counts; what is written has the shortest word."""
    words = ["--rat-pattern", "d16w0s4", "--rat-arl-pattern", "[d16s4]*2", "--rat-eval-patterns", "d16w0s4", "dense", "--lr", 1e-2]
    folders = ["--save", tmp_path / "run", "--tensorboard-dir", tmp_path / "tensorboard"]
    pretrain(*MODEL_FLAGS, *TRAIN_FLAGS, *words, "--data-path", tiny_data, "--train-iters", 3, "--tensorboard-log-interval", 1, *folders)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pattern"] == "d16s4" and set(report["patterns"]) == {"d16s4", "dense"}
    comparison = compare_runs(tmp_path / "compared", tmp_path / "run", adapted=[tmp_path / "run"])
    assert comparison["patterns"]["d16s4"]["adapted"] == report["patterns"]["d16s4"]

    scalars = tensorboard_scalars(tmp_path / "tensorboard")
    assert all(scalars["grad norm d16s4"][iteration] != scalars["grad-norm"][iteration] for iteration in (1, 2, 3))
    after, before = scalars["lm loss"], scalars["lm loss before the update"]
    assert all(after[iteration] != before[iteration] for iteration in (1, 2, 3)) and after[3] < before[3]
