"""The facts that fix the order of samples: what keeps it, what changes it, and what a run that resumes says about it."""

from __future__ import annotations

import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from rat_megatron.checkpoint.torch_dist import read_checkpoint_args
from rat_megatron.data.loader import order
from rat_megatron.data.loader.order import describe_samples, order_difference, order_facts
from rat_megatron.data.loader.streams import Stream, parse_data_path
from rat_megatron.errors import UserError
from tests.helpers import MODEL_FLAGS, TRAIN_FLAGS, pretrain
from tests.streaming_data import GLOBAL_BATCH, batches_of, ids_of, write_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "a", train=1000)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "b", train=500, first=5000)


def facts(words: list[str], seed: int = 7):
    return order_facts(parse_data_path(words), seed=seed)


def test_the_same_data_in_another_place_keep_the_order(data, other, tmp_path):
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    assert order_difference(facts(["1", data, "3", other]), facts(["1", str(moved), "3", other]), 240) is None
    first = [ids_of(islice(batches_of(path), 60)) for path in (data, str(moved))]
    assert first[0] == first[1]


def test_what_changes_the_order_is_named(data, other, tmp_path):
    there = facts(["1", data, "3", other])
    changed = write_data(tmp_path / "changed", train=500, first=6000)
    for words, settings, sentence in [
        (["1", data, "3", other], {"seed": 8}, "--seed 7 there, 8 here"),
        (["1", data, "1", other], {}, f"--data-path gives {data} the weight 0.25 there, 0.5 here"),
        ([data, other], {}, f"--data-path gives {data} the weight 0.25 there, of its size here"),
        (["3", other, "1", data], {}, f"--data-path in the order {data}, {other} there, in another here"),
        (["1", data, "3", changed], {}, f"--data-path {changed} here is not what was trained on there"),
        ([data], {}, f"--data-path {other} there is missing here"),
    ]:
        assert order_difference(there, facts(words, **settings), 240) == sentence
    libraries = {**there, "algorithm": "another", "libraries": "mosaicml-streaming 9"}
    assert "order of mosaicml-streaming 9 there" in order_difference(libraries, there, 240)


def test_a_run_of_whole_batches_an_epoch_goes_on_until_its_epoch_ends(data):
    """What older versions did: 16 samples of these were left out in every epoch."""
    here = facts([data])
    there = {**here, "global_batch_size": GLOBAL_BATCH}
    assert order_difference(there, here, 960) is None
    assert order_difference({**here, "global_batch_size": 10}, here, 1200) is None, "whole batches: 1000 samples"
    sentence = "epochs of 984 samples there, whole batches of --global-batch-size 24, and of 1000 here"
    for consumed in (984, 1200):
        assert order_difference(there, here, consumed) == sentence


def test_the_example_notices_another_rule(monkeypatch):
    usual = order._example_order()
    assert len(set(usual)) > 200
    assert usual == order._example_order()
    monkeypatch.setattr(order, "SHUFFLE_ALGORITHM", "py2s")
    assert order._example_order() != usual


def test_sample_ids_lead_to_the_sample_on_disk(data, other):
    from streaming.base.format import reader_from_json

    streams = parse_data_path([data, other])
    for batch in islice(batches_of(streams, num_workers=2), 100):
        for origin, tokens in zip(describe_samples(streams, batch["sample_ids"].tolist()), batch["tokens"], strict=True):
            assert origin.shard.startswith(f"{origin.stream}/train/shard.")
            folder, basename = origin.shard.rsplit("/", 1)
            (info,) = [
                shard for shard in order.read_index(Stream(origin.stream), "train", None) if shard["raw_data"]["basename"] == basename
            ]
            assert np.array_equal(reader_from_json(folder, None, info)[origin.index]["tokens"][:-1], tokens)
    with pytest.raises(IndexError):
        describe_samples(streams, [1500])


# ---- in a run ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch, megatron_process, tiny_data):
    """start(flags...) checks the command line of a run; returns what follows from the data and the checkpoint."""

    def run(*flags, data: Path = tiny_data):
        from megatron.training.arguments import parse_args

        from rat_megatron.training.arguments.checks import check_and_derive
        from rat_megatron.training.arguments.flags import add_rat_args

        words = ["pretrain_rat.py", *MODEL_FLAGS, *TRAIN_FLAGS, "--train-iters", "1", "--data-path", data, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        return check_and_derive(parse_args(add_rat_args))

    return run


def test_a_checkpoint_keeps_the_facts_and_resuming_compares_them(start, one_iteration, tiny_data, tmp_path, capsys):
    stored = read_checkpoint_args(one_iteration).rat_data_order
    assert stored == start()["rat_data_order"] and stored["streams"][0]["path"] == str(tiny_data)
    moved = Path(shutil.copytree(tiny_data, tmp_path / "moved"))
    start("--save", one_iteration, data=moved)
    sentence = r"was trained on samples in another order \(--seed 1234 there, 99 here\): .*--rat-allow-data-change"
    for flags in (["--save", one_iteration], ["--load", one_iteration]):
        with pytest.raises(UserError, match=sentence):
            start(*flags, "--seed", "99")
    assert "rat-megatron:" not in capsys.readouterr().out
    start("--save", one_iteration, "--seed", "99", "--rat-allow-data-change")
    line = capsys.readouterr().out.strip()
    assert line.startswith("rat-megatron: --rat-allow-data-change: after 4 samples") and "\n" not in line
    for flags in (["--pretrained-checkpoint", one_iteration], ["--load", one_iteration, "--finetune"]):
        start(*flags, "--seed", "99")


def test_a_checkpoint_without_the_facts_is_taken_and_said(start, one_iteration, monkeypatch, capsys):
    from rat_megatron.training.arguments import resume

    old = read_checkpoint_args(one_iteration)
    del old.rat_data_order  # as before there were any
    monkeypatch.setattr(resume, "read_checkpoint_args", lambda *_: old)
    start("--save", one_iteration, "--seed", "99")
    assert "does not say which data it was trained on" in capsys.readouterr().out


def test_the_program_goes_on_with_other_data_when_told(one_iteration, tiny_data, tmp_path):
    shutil.copytree(one_iteration, tmp_path / "run")
    flags = [*MODEL_FLAGS, *TRAIN_FLAGS, "--data-path", tiny_data, "--save", tmp_path / "run", "--train-iters", "2", "--seed", "99"]
    allowed = pretrain(*flags, "--rat-allow-data-change", "--override-opt-param-scheduler")
    assert allowed.stdout.count("--rat-allow-data-change: after 4 samples") == 1
    assert read_checkpoint_args(tmp_path / "run").rat_data_order["seed"] == 99


@pytest.mark.parametrize("word", ["many", "5xb"])
def test_a_bad_size_has_its_sentence(start, word):
    with pytest.raises(UserError, match=f"--rat-data-cache-limit: '{word}' is no size: write 500gb"):
        start("--rat-data-cache-limit", word)
