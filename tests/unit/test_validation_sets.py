"""Streams for training and for validation apart, several validation sets, and the whole of a set: a loss for each, by name."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from rat_megatron.convert import convert_to_hf
from rat_megatron.data.loader.batches import validation_batches
from rat_megatron.data.loader.streams import Stream, samples_of
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusForCausalLM
from rat_megatron.training.monitoring.comparison import compare_runs
from tests.helpers import MODEL_FLAGS, SEQ_LENGTH, TRAIN_FLAGS, prepare_tiny_data, pretrain, tensorboard_scalars
from tests.preparing import write_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_process")]
PATTERNS = ["dense", "d8"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tiny_data):
    """Two more data sets of the same tokenizer: digits and letters."""
    folder = tmp_path_factory.mktemp("sets")
    for name, words in (("digits", "0123456789"), ("letters", "abcdefghij")):
        texts = [" ".join(words[(i * k) % 10] for k in range(40)) + str(i) for i in range(60)]
        options = {"tokenizer": str(tiny_data / "tokenizer"), "seq_length": SEQ_LENGTH, "workers": 1, "val_fraction": 0.5}
        prepare([write_lines(folder / f"{name}.jsonl", texts)], folder / name, **options)
    return {name: folder / name for name in ("digits", "letters")}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data, sets):
    """Folder of a run of two iterations, validated at its end on both sets in full."""
    folder = tmp_path_factory.mktemp("run")
    streams = ["--train-data-path", tiny_data, "--valid-data-path", *sets.values()]
    several = ["--multiple-validation-sets", "--validation-set-names", *sets, "--full-validation"]
    outputs = ["--save", folder / "checkpoints", "--tensorboard-dir", folder / "tensorboard", "--save-interval", 2]
    flags = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 2, "--eval-interval", 2, "--rat-arl-pattern", "d8", *streams]
    result = pretrain(*flags, *several, *outputs, "--rat-eval-patterns", *PATTERNS)
    (folder / "log.txt").write_text(result.stdout)
    return folder


def test_each_set_has_its_loss_in_log_tensorboard_and_report(run, sets, tmp_path):
    """Those of the exported model on all whole batches of the set's validation split."""
    convert_to_hf(run / "checkpoints", tmp_path / "hf")
    model = RatPlusForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    report = json.loads((run / "checkpoints" / "report.json").read_text())
    assert "patterns" not in report and list(report["validation_sets"]) == list(sets)
    scalars, log = tensorboard_scalars(run / "tensorboard"), (run / "log.txt").read_text()
    for name, path in sets.items():
        stream = Stream(str(path))
        samples = samples_of(stream, "val", None) // 4 * 4
        assert samples > 8, "another number than --eval-iters"
        options = {"global_batch_size": 4, "micro_batch_size": 4, "seq_length": SEQ_LENGTH, "eod_id": 0, "num_workers": 0}
        batches = list(validation_batches([stream], num_samples=samples, **options))
        assert list(report["validation_sets"][name]) == PATTERNS
        for word in PATTERNS:
            model.set_attention_pattern(word)
            total = count = 0.0
            with torch.no_grad():
                for batch in batches:
                    logits = model(batch["tokens"]).logits
                    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
                    total += (losses * batch["loss_mask"].flatten()).sum().item()
                    count += batch["loss_mask"].sum().item()
            tag = "lm loss" if word == "dense" else f"lm loss {word}"
            assert report["validation_sets"][name][word] == pytest.approx(total / count, abs=2e-4)
            assert scalars[f"{tag} validation-{name}"][2] == pytest.approx(total / count, abs=2e-4)
            lines = re.findall(rf" validation-{name} loss at iteration 2\b[^|]*\| {tag} value: (\S+)", log)
            assert list(map(float, lines)) == pytest.approx([total / count] * len(lines), abs=2e-4) and lines
    assert f"`dense on {next(iter(sets))}`" in (tmp_path / "hf" / "README.md").read_text()


def test_report_has_a_table_for_each_set(run, sets, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    comparison = compare_runs(tmp_path / "out", run / "checkpoints", adapted=[run / "checkpoints"])
    losses = json.loads((run / "checkpoints" / "report.json").read_text())["validation_sets"]
    printed = capsys.readouterr().out
    for name in sets:
        of_set = comparison["validation_sets"][name]["patterns"]
        assert of_set["dense"] == {"pretrained": losses[name]["dense"], "adapted": losses[name]["dense"]}
        assert of_set["d8"] == {"pretrained": losses[name]["d8"]}
        assert f"Validation loss on {name}" in printed and f"{losses[name]['d8']:.3f}" in printed
        assert (tmp_path / "out" / f"report-{name}.png").is_file()
    (tmp_path / "one").mkdir()
    one = {"pattern": "dense", "patterns": {"dense": 2.0}, "tokens_per_second": 1.0, "iteration": 2}
    (tmp_path / "one" / "report.json").write_text(json.dumps(one))
    with pytest.raises(UserError, match="was not evaluated on digits"):
        compare_runs(tmp_path / "out", run / "checkpoints", adapted=[tmp_path / "one"])


def test_a_resumed_run_goes_on_with_a_single_set(run, tiny_data, sets):
    flags = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 3, "--override-opt-param-scheduler", "--rat-arl-pattern", "d8"]
    result = pretrain(*flags, "--data-path", tiny_data, "--save", run / "checkpoints", "--full-validation")
    samples = samples_of(Stream(str(tiny_data)), "val", None) // 4 * 4
    assert f"Evaluating on {samples} samples" in result.stdout
    assert list(json.loads((run / "checkpoints" / "report.json").read_text())["patterns"]) == ["dense"]


@pytest.fixture
def check(monkeypatch):
    """check(flags...) -> what follows from them; raises what the user would see."""

    def run(*flags):
        from rat_megatron.training.arguments import read_command_line
        from rat_megatron.training.arguments.checks import check_and_derive

        words = [*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, *flags]
        monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *map(str, words)])
        return check_and_derive(read_command_line())

    return run


def test_iterations_of_each_set(check, tiny_data, sets):
    apart = ["--train-data-path", tiny_data, "--valid-data-path", *sets.values()]
    sizes = [samples_of(Stream(str(path)), "val", None) for path in sets.values()]
    assert check("--data-path", tiny_data)["rat_validation_sets"] == {"": 2}
    assert check(*apart)["rat_validation_sets"] == {"": 2} and check(*apart)["data_path"] == [str(tiny_data)]
    assert check(*apart, "--full-validation")["rat_validation_sets"] == {"": sum(sizes) // 4}
    assert check(*apart, "--full-validation", "--eval-global-batch-size", 2)["eval_iters"] == sum(sizes) // 2
    assert check(*apart, "--multiple-validation-sets")["rat_validation_sets"] == {"0": 2, "1": 2}
    both = check("--data-path", *sets.values(), "--multiple-validation-sets", "--full-validation")
    assert both["rat_validation_sets"] == {"0": sizes[0] // 4, "1": sizes[1] // 4} and both["eval_iters"] == max(sizes) // 4
    assert check("--train-data-path", tiny_data, "--eval-iters", 0)["rat_validation_sets"] == {}
    weights = [word for path in sets.values() for word in (3, path)]
    assert check("--train-data-path", tiny_data, "--valid-data-path", *weights)["rat_validation_sets"] == {"": 2}


def test_what_does_not_go_together_has_its_sentence(check, tiny_data, sets, tmp_path):
    data, valid, several = ["--data-path", tiny_data], ["--valid-data-path", *sets.values()], "--multiple-validation-sets"
    train = ["--train-data-path", tiny_data]
    other = prepare_tiny_data(tmp_path, SEQ_LENGTH)
    meta = json.loads((other / "rat_meta.json").read_text())
    (other / "rat_meta.json").write_text(json.dumps({**meta, "tokenizer_hash": "0" * 16}))
    bad = {
        "--valid-data-path and --data-path cannot both be given: name the streams by": [*data, *valid],
        "--train-data-path and --data-path cannot both be given": [*data, *train],
        "--train-data-path is missing beside --valid-data-path": valid,
        "--valid-data-path is missing beside --train-data-path: give it too, .* or --eval-iters 0": train,
        "--data-path is missing": [],
        "--validation-set-names needs --multiple-validation-sets": [*train, *valid, "--validation-set-names", "a", "b"],
        "has 1 names for 2 validation sets": [*train, *valid, several, "--validation-set-names", "a"],
        "every name must be another": [*train, *valid, several, "--validation-set-names", "a", "a"],
        "every name must be another, of letters": [*train, *valid, several, "--validation-set-names", "a", "b/c"],
        "name them without weights": [*train, "--valid-data-path", 1, sets["digits"], 2, sets["letters"], several],
        "--valid-data-path were prepared with another tokenizer": [*train, "--valid-data-path", other],
        "is no whole batch of 4096 samples: lower --eval-global": [*train, *valid, "--full-validation", "--eval-global-batch-size", 4096],
        "--test-data-path is for Megatron's own datasets": [*data, "--test-data-path", tiny_data],
        "--data-args-path is for Megatron's own datasets": ["--data-args-path", "list.txt"],
        "--per-split-data-args-path is for Megatron's own datasets": ["--per-split-data-args-path", "list.txt"],
    }
    for sentence, flags in bad.items():
        with pytest.raises(UserError, match=sentence) as caught:
            check(*flags)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_written_has_its_sentence(check, tiny_data, tmp_path):
    good = ["--data-path", tiny_data]
    (tmp_path / "file").write_text("")
    for flag in ("--save", "--tensorboard-dir", "--data-cache-path"):
        for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/here"):
            with pytest.raises(UserError, match=f"{flag} {folder} cannot be written .*: give another folder"):
                check(*good, flag, folder)
        check(*good, flag, tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="--wandb-project needs the package wandb: install it, or leave the flag out"):
        check(*good, "--wandb-project", "p", "--wandb-exp-name", "e")


def test_the_program_ends_with_exit_code_2_and_no_trace(tiny_data, tmp_path):
    (tmp_path / "file").write_text("")
    result = pretrain(*MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", 1, "--data-path", tiny_data, "--save", tmp_path / "file", check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr + result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: --save {tmp_path / 'file'} cannot be written")
