"""prepare --deduplicate: the first copy stays, exactly; the same for any number of workers, passes over the hashes and interruptions."""

import json
import random
import signal

import pytest

from rat_megatron.data.prepare import documents, duplicates, packing
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from tests.preparing import contents, run_until_killed, save_byte_tokenizer, train_texts, write_lines

pytestmark = pytest.mark.slow

OPTIONS = {"seq_length": 8, "workers": 1, "val_fraction": 0.0, "deduplicate": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 700)
    monkeypatch.setattr(packing, "SHARD_SAMPLES", 40)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Copies within a unit, across units and files, of one document and of many; and near copies, which are none."""
    rng = random.Random(0)
    distinct = [f"{number} " + "word " * rng.randint(0, 9) for number in range(150)]
    return rng.choices(distinct, k=300) + ["again"] * 40 + [text + " " for text in distinct[:20]] + distinct


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("inputs")
    write_lines(folder / "a.jsonl", texts[:200])
    write_lines(folder / "b.jsonl", texts[200:])
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory, texts, tokenizer):
    """The data set of the same documents, each given once, in the order of their first copies."""
    folder = tmp_path_factory.mktemp("once")
    path = write_lines(folder / "once.jsonl", list(dict.fromkeys(texts)))
    prepare([path], folder / "data", tokenizer=tokenizer, **{**OPTIONS, "deduplicate": False})
    return folder / "data"


def test_only_the_first_copy_stays(inputs, once, texts, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "SHARD_SAMPLES", 1 << 16)  # as for `once`
    data = prepare([inputs], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)
    assert contents(tmp_path / "data" / "train") == contents(once / "train")
    distinct = list(dict.fromkeys(texts))
    assert (data.documents, data.duplicates) == (len(distinct), len(texts) - len(distinct))
    assert f"{data.duplicates:,} of {len(texts):,} documents were copies" in capsys.readouterr().out
    meta = json.loads((tmp_path / "data" / "rat_meta.json").read_text())
    assert (meta["documents"], meta["duplicates"], meta["tokens"]) == (data.documents, data.duplicates, data.tokens)
    assert meta["tokens"] == sum(len(text.encode()) + 1 for text in distinct)


def test_without_the_option_copies_stay(inputs, texts, tokenizer, tmp_path):
    data = prepare([inputs], tmp_path / "data", tokenizer=tokenizer, **{**OPTIONS, "deduplicate": False})
    assert (data.documents, data.duplicates) == (len(texts), 0)


@pytest.mark.parametrize("step, after", [("tokenizing._encode", 5), ("duplicates.drop_duplicates", 1), ("packing._write_shard", 7)])
def test_workers_passes_and_interruptions_change_nothing(inputs, texts, tokenizer, tmp_path, monkeypatch, step, after):
    options = {**OPTIONS, "tokenizer": tokenizer, "val_fraction": 0.3}
    prepare([inputs], tmp_path / "plain", **options)
    monkeypatch.setattr(duplicates, "MEMORY", 50 * duplicates.MEMORY_PER_DOCUMENT)  # 50 documents at once
    assert run_until_killed(f"rat_megatron.data.prepare.{step}", after, [inputs], tmp_path / "killed", **options) == -signal.SIGKILL
    prepare([inputs], tmp_path / "killed", **{**options, "workers": 2})
    assert contents(tmp_path / "killed") == contents(tmp_path / "plain")
    found = train_texts(tmp_path / "plain", tokenizer)[:-1]
    assert found and len(found) == len(set(found)) and set(found) < set(texts)
    order = {text: place for place, text in reversed(list(enumerate(texts)))}
    assert [order[text] for text in found] == sorted(order[text] for text in found), "in the order of the first copies"


def test_other_settings_of_unfinished_work_are_refused(inputs, tokenizer, tmp_path):
    run_until_killed("rat_megatron.data.prepare.packing.pack", 0, [inputs], tmp_path / "data", tokenizer=tokenizer, **OPTIONS)
    with pytest.raises(UserError, match="unfinished run with deduplicate True, not False"):
        prepare([inputs], tmp_path / "data", tokenizer=tokenizer, **{**OPTIONS, "deduplicate": False})
