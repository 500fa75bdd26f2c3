"""Remote shards, from an S3 store on this machine that can be made to fail: it heals, or one sentence names the file and the remedy."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from rat_megatron.data.loader import download, streams
from rat_megatron.data.loader.batches import validation_batches
from rat_megatron.data.loader.order import describe_samples
from rat_megatron.data.loader.streams import Stream, cache_folder, check_streams
from rat_megatron.errors import UserError
from tests.streaming_data import EOD, GLOBAL_BATCH, T, batches_of, ids_of, write_data

pytestmark = pytest.mark.slow

SHARD = "train/shard.00001.mds"


class Store:
    """What the server does: `answers[name]` are the answers to the next requests of a file: a status, "hang", or "flip" (a byte)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = f"s3://{folder.name}"
        self.answers: dict[str, list] = {}
        self.gets: Counter[str] = Counter()
        self.ended = threading.Event()


@pytest.fixture(scope="module")
def server():
    """An S3 endpoint: GET and HEAD of the objects of one bucket, which is a folder."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(with_body=False)

        def do_GET(self, with_body: bool = True):
            store: Store = self.server.store
            name = self.path.split("?")[0].removeprefix(f"/{store.folder.name}/")
            path = store.folder / name
            answers = store.answers.get(name, [])
            answer = (answers.pop(0) if with_body or isinstance(answers[0], int) else None) if answers else None
            if answer == "hang":
                store.ended.wait(30)
                return
            if isinstance(answer, int) or not path.is_file():
                self.send_response(answer or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = path.read_bytes()
            if answer == "flip":
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"1"')
            self.end_headers()
            if with_body:
                store.gets[name] += 1
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("written") / "bucket", train=1000, val=50)


@pytest.fixture
def store(server, written, tmp_path, monkeypatch):
    """A store with a data set; pauses between attempts are short."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    settings = {"S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)
    shutil.copytree(written, tmp_path / "bucket")
    server.store = Store(tmp_path / "bucket")
    yield server.store
    server.store.ended.set()


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def read(store: Store, cache: str, batches: int = 41, **changes) -> list[int]:
    """The ids of the first global batches; 41 are an epoch, which needs every shard."""
    return ids_of(islice(batches_of(store.url, cache=cache, **changes), batches * GLOBAL_BATCH // 2))


def test_a_remote_stream_is_read_as_a_local_one_and_stays_in_the_cache(store, cache, written):
    assert check_streams([Stream(store.url)], seq_length=T, cache=cache).train_samples == 1000
    local = ids_of(islice(batches_of(written), 41 * 12))
    assert read(store, cache) == local
    fetched = store.gets.copy()
    assert read(store, cache, num_workers=1) == local
    assert {name for name, count in (store.gets - fetched).items() if count and name.endswith(".mds")} == set()
    val = validation_batches(
        [Stream(store.url)], global_batch_size=4, micro_batch_size=2, seq_length=T, eod_id=EOD, num_samples=48, cache=cache, num_workers=1
    )
    assert len(set(ids_of(val))) == 48
    (origin,) = describe_samples([Stream(store.url)], [999], cache)
    assert origin.shard.startswith(f"{store.url}/train/shard.")


@pytest.mark.parametrize("answers", [[500, 503], ["flip"], ["hang"]], ids=str)
def test_a_bad_moment_of_the_store_heals_and_says_so(store, cache, written, caplog, monkeypatch, answers):
    if answers == ["hang"]:
        monkeypatch.setattr(download, "ATTEMPT_SECONDS", 5.0)  # enough for the other shards on a machine that is busy
    store.answers[SHARD] = list(answers)
    assert read(store, cache) == ids_of(islice(batches_of(written), 41 * 12))
    healed = [record.message for record in caplog.records if "downloaded at attempt" in record.message]
    assert len(healed) == 1 and healed[0].startswith(f"{store.url}/{SHARD}: downloaded at attempt {len(answers) + 1}")


def test_a_store_that_does_not_recover_ends_with_the_address(store, cache, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 0.3)
    store.answers[SHARD] = [500] * 1000
    with pytest.raises(UserError, match=rf"^{store.url}/{SHARD} cannot be downloaded \(attempt \d+: .*500.*\): check that .*$"):
        read(store, cache, num_workers=2)
    store.answers["rat_meta.json"] = [500] * 1000
    with pytest.raises(UserError, match="rat_meta.json cannot be downloaded"):
        check_streams([Stream(store.url)], seq_length=T, cache=cache)


def test_a_store_that_hangs_is_given_up_in_bounded_time(store, cache, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", 4.0)  # enough for the other shards on a machine that is busy
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 4.5)
    store.answers[SHARD] = ["hang"] * 1000
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"^{store.url}/{SHARD} cannot be downloaded \(attempt [12]: (not complete within|Read timeout).*$"
    ):
        read(store, cache, num_workers=1)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_ends_at_once(store, cache, workers):
    (store.folder / SHARD).unlink()
    with pytest.raises(UserError, match=rf"^{store.url}/{SHARD} cannot be downloaded \(attempt 1: .*not found.*\): check that .*$"):
        read(store, cache, num_workers=workers)


@pytest.mark.parametrize("fault, problem", [("flip", "is damaged"), ("truncate", r"has \d+ bytes instead of \d+")])
def test_a_shard_damaged_in_the_store_never_trains(store, cache, fault, problem):
    content = (store.folder / SHARD).read_bytes()
    (store.folder / SHARD).write_bytes(content[:-7] if fault == "truncate" else content[:-7] + bytes([content[-7] ^ 4]) + content[-6:])
    with pytest.raises(UserError, match=f"^{store.url}/{SHARD} {problem}.*, also when downloaded again: copy or prepare the data anew$"):
        read(store, cache, num_workers=1)
    assert store.gets[SHARD] >= download.DAMAGED_COPIES  # another thread may have begun to try too, and ends on its own
    deadline = time.monotonic() + 30
    while list(Path(cache).rglob(f"*00001*{download.UNFINISHED}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(Path(cache).rglob("*00001*")), "neither the damaged copy nor a part of it stays"


def test_a_cached_shard_that_was_damaged_is_fetched_again(store, cache, caplog):
    expected = read(store, cache)
    cached = cache_folder(Stream(store.url), cache) / SHARD
    content = cached.read_bytes()
    cached.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    left = cached.with_name(f"{cached.name}.1.2.part.Abc")
    left.write_bytes(b"what a killed run began")
    assert read(store, cache) == expected and cached.read_bytes() == content and not left.exists()
    assert [record.message for record in caplog.records if str(cached) in record.message and "downloading it again" in record.message]
    assert store.gets[SHARD] == 2


def test_data_replaced_under_the_same_address_are_not_mixed_with_cached_shards(store, cache, tmp_path):
    read(store, cache)
    shutil.rmtree(store.folder)
    write_data(store.folder, train=1000, val=50, first=5000)
    check_streams([Stream(store.url)], seq_length=T, cache=cache)
    assert min(read(store, cache)) >= 5000


def test_the_cache_keeps_to_its_limit_and_local_shards_stay(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(streams.Stream, "is_remote", property(lambda stream: stream.path.endswith("bucket")))  # quicker than S3
    remote = write_data(tmp_path / "bucket", train=3000, val=50)
    local = write_data(tmp_path / "local", train=1000, first=5000)
    there = sorted((tmp_path / "local" / "train").glob("*.mds"))
    both, folder = [Stream(remote, 0.5), Stream(local, 0.5)], cache_folder(Stream(remote), cache) / "train"
    for limit, sentence in ((10_000, "is too low for .*: give at least [0-9,]+"), (1 << 60, "is more than the disk of .* has")):
        with pytest.raises(UserError, match=f"--rat-data-cache-limit of {limit:,} bytes {sentence}"):
            check_streams(both, seq_length=T, cache=cache, cache_limit=limit)
    limit, most = 30_000, 0
    check_streams(both, seq_length=T, cache=cache, cache_limit=limit)
    batches = batches_of(both, cache=cache, cache_limit=limit)
    for _ in range(8):
        ids_of(islice(batches, 12))
        most = max(most, 4000 * len(list(folder.glob("*.mds"))))
    everything = sum(path.stat().st_size for path in (tmp_path / "bucket" / "train").iterdir())
    assert limit / 2 < most <= limit + 2 * 4000 < everything, "beside the limit, a shard may be on its way in each thread"
    assert sorted((tmp_path / "local" / "train").glob("*.mds")) == there


def test_a_full_disk_ends_with_the_folder(store, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = os.getuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=False).returncode == 0
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(UserError, match=f"^no space is left in the cache folder {small}/.*: free some, or give a lower --rat"):
            read(store, str(small), num_workers=1)
        assert not list(small.rglob("*.part*"))
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_two_runs_do_not_share_a_cache(store, cache):
    first = batches_of(store.url, cache=cache)
    assert first
    with pytest.raises(UserError, match="is in use by another run on this node: give another --data-cache-path"):
        batches_of(store.url, cache=cache)


def test_the_first_pauses_grow(store, cache, caplog, monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.02)
    store.answers["rat_meta.json"] = [500] * 3
    with caplog.at_level(logging.WARNING):
        check_streams([Stream(store.url)], seq_length=T, cache=cache)
    pauses = [record.args[-1] for record in caplog.records if "the next in" in record.msg]
    assert pauses == [0.02, 0.04, 0.08]
