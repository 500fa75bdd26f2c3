"""prepare into stores: a folder by file://, an S3 server (moto) and an SFTP server (paramiko) get the very files of a local data set."""

import os
import signal
import socket
import threading
from pathlib import Path

import paramiko
import pytest

from rat_megatron.data.prepare import documents, packing
from rat_megatron.data.prepare.destination import Destination, open_destination
from rat_megatron.data.prepare.pipeline import prepare
from rat_megatron.errors import UserError
from tests.preparing import contents, run_until_killed, save_byte_tokenizer, write_lines

pytestmark = pytest.mark.slow

OPTIONS = {"seq_length": 8, "workers": 1, "val_fraction": 0.2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("inputs") / "a.jsonl", [f"{number}: time and tide" for number in range(200)])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(documents, "UNIT_BYTES", 1500)
    monkeypatch.setattr(packing, "SHARD_SAMPLES", 50)


class FolderStore:
    """A store whose files can be seen in a folder of this machine."""

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder

    def files(self) -> dict[str, bytes]:
        return contents(self.folder)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


class S3Store:
    def __init__(self, url: str):
        import boto3

        self.url, (self.bucket, self.prefix) = url, url.removeprefix("s3://").split("/", 1)
        self.client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])

    def files(self) -> dict[str, bytes]:
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/").get("Contents", [])
        read = {entry["Key"]: self.client.get_object(Bucket=self.bucket, Key=entry["Key"])["Body"].read() for entry in listed}
        return {key.removeprefix(f"{self.prefix}/"): content for key, content in read.items()}

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")


@pytest.fixture(scope="module")
def s3():
    """The environment of a user of an S3 server with one bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        S3Store("s3://bucket/x").client.create_bucket(Bucket="bucket")
        yield
    server.stop()


@pytest.fixture(scope="module")
def sftp(tmp_path_factory):
    """An SFTP server over a folder: its address with user and password, and the folder."""
    root, key = tmp_path_factory.mktemp("sftp"), paramiko.RSAKey.generate(2048)

    class Login(paramiko.ServerInterface):
        def check_auth_password(self, username, password):
            return paramiko.AUTH_SUCCESSFUL if (username, password) == ("me", "secret") else paramiko.AUTH_FAILED

        def check_channel_request(self, kind, channel):
            return paramiko.OPEN_SUCCEEDED

    def status(function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)
        return paramiko.SFTP_OK

    class Files(paramiko.SFTPServerInterface):
        def _real(self, path):
            return root / self.canonicalize(path).lstrip("/")

        def stat(self, path):
            try:
                return paramiko.SFTPAttributes.from_stat(self._real(path).stat())
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno)

        def open(self, path, flags, attr):
            try:
                mode = "wb" if flags & (os.O_WRONLY | os.O_RDWR) else "rb"
                handle = paramiko.SFTPHandle(flags)
                handle.readfile = handle.writefile = open(self._real(path), mode)
                handle.stat = lambda: paramiko.SFTPAttributes.from_stat(os.fstat(handle.readfile.fileno()))
                return handle
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno)

        def mkdir(self, path, attr):
            return status(os.mkdir, self._real(path))

        def posix_rename(self, old, new):
            return status(os.replace, self._real(old), self._real(new))

    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files)
            transport.start_server(server=Login())

    threading.Thread(target=serve, daemon=True).start()
    port = listener.getsockname()[1]
    known_hosts = root.parent / f"known_hosts.{port}"
    known_hosts.write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(known_hosts))
        yield f"sftp://me:secret@127.0.0.1:{port}", root
    listener.close()


@pytest.fixture(params=["file", "s3", "sftp"])
def store(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("s3")
        return S3Store(f"s3://bucket/corpora/{tmp_path.name}")
    if request.param == "sftp":
        address, root = request.getfixturevalue("sftp")
        return FolderStore(f"{address}/corpora/{tmp_path.name}", root / "corpora" / tmp_path.name)
    return FolderStore(f"file://{tmp_path}/elsewhere", tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def local(tmp_path_factory, inputs, tokenizer):
    output = tmp_path_factory.mktemp("local") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "UNIT_BYTES", 1500)
        patch.setattr(packing, "SHARD_SAMPLES", 50)
        prepare([inputs], output, tokenizer=tokenizer, **OPTIONS)
    return contents(output)


def test_a_store_gets_the_files_of_a_local_data_set(store, local, inputs, tokenizer, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    prepare([inputs], store.url, tokenizer=tokenizer, work_dir=work, **OPTIONS)
    assert store.files() == local
    assert not list(work.iterdir()), "nothing is left behind"
    prepare([inputs], store.url, tokenizer=tokenizer, work_dir=work, **OPTIONS)
    assert "is complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a data set made with seed 1005, not 3"):
        prepare([inputs], store.url, tokenizer=tokenizer, work_dir=work, seed=3, **OPTIONS)
    assert store.files() == local
    store.remove("rat_meta.json")
    with pytest.raises(UserError, match="is not empty and was not written by this command"):
        prepare([inputs], store.url, tokenizer=tokenizer, work_dir=work, **OPTIONS)


@pytest.mark.parametrize("step, after", [("packing._write_shard", 4), ("destination.write_json", 1)])
def test_a_killed_run_goes_on_and_uploads_no_shard_again(store, local, inputs, tokenizer, tmp_path, step, after):
    options = {**OPTIONS, "tokenizer": tokenizer, "work_dir": tmp_path / "work"}
    assert run_until_killed(f"rat_megatron.data.prepare.{step}", after, [inputs], store.url, **options) == -signal.SIGKILL
    before = store.files()
    assert "rat_meta.json" not in before and len([name for name in before if name.endswith(".mds")]) >= after
    store.remove("train/shard.00001.mds")  # seen to be missing in the end, if it is not uploaded again
    prepare([inputs], store.url, **options)
    after_all = store.files()
    assert after_all == {name: content for name, content in local.items() if name != "train/shard.00001.mds"}


def test_a_local_folder_with_a_work_folder_elsewhere(local, inputs, tokenizer, tmp_path):
    prepare([inputs], tmp_path / "data", tokenizer=tokenizer, work_dir=tmp_path / "work", **OPTIONS)
    assert contents(tmp_path / "data") == local


@pytest.mark.parametrize(
    "address, complaint",
    [
        ("s3://nowhere/data", "--output s3://nowhere/data cannot be used, check the address and the credentials: "),
        ("ftp://host/data", "--output ftp://host/data cannot be used, check .*: Invalid Cloud provider prefix: ftp"),
        ("sftp://127.0.0.1:1/data", "--output sftp://127.0.0.1:1/data cannot be used"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_before_the_work(s3, inputs, tokenizer, tmp_path, address, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        prepare([inputs], address, tokenizer=tokenizer, work_dir=tmp_path / "work", **OPTIONS)
    assert "\n" not in str(raised.value)


def test_an_sftp_host_whose_key_is_not_known_is_refused(sftp, inputs, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "known_hosts").touch()
    monkeypatch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(tmp_path / "known_hosts"))
    with pytest.raises(UserError, match="cannot be used, check the address and the credentials: .*not found in known_hosts"):
        prepare([inputs], f"{sftp[0]}/unknown", tokenizer=tokenizer, work_dir=tmp_path / "work", **OPTIONS)


def test_an_upload_goes_on_over_a_new_connection(sftp, tmp_path, monkeypatch):
    address, root = sftp
    opened = open_destination(f"{address}/reconnected", tmp_path)
    monkeypatch.setattr(paramiko.SFTPClient, "put", lambda client, *_: client.sock.close() or client.stat("/"))  # the connection is lost
    monkeypatch.setattr(opened, "close", lambda: monkeypatch.undo() or Destination.close(opened))  # before the second attempt
    opened.work.mkdir()
    for name in ("a.json", "b.json"):
        (opened.work / name).write_text(name)
        opened.upload(name)
    assert contents(root / "reconnected") == {"a.json": b"a.json", "b.json": b"b.json"}


def test_a_url_needs_a_folder_for_unfinished_work(inputs, tokenizer):
    with pytest.raises(UserError, match="--output s3://bucket/data is a URL: name a local folder for unfinished work with --work-dir"):
        prepare([inputs], "s3://bucket/data", tokenizer=tokenizer, **OPTIONS)


def test_a_store_that_fails_ends_the_run_with_a_sentence(local, inputs, tokenizer, tmp_path, monkeypatch):
    """A file lies where the folder of the shards belongs; without it the run goes on."""
    monkeypatch.setattr("rat_megatron.data.prepare.destination.ATTEMPTS", 1)
    target, options = tmp_path / "mounted", {**OPTIONS, "tokenizer": tokenizer, "work_dir": tmp_path / "work"}
    target.mkdir()
    (target / "val").write_text("in the way")
    with pytest.raises(UserError, match="val/shard.0000[0-9].mds cannot be uploaded, start the same command again to go on: "):
        prepare([inputs], f"file://{target}", **options)
    (target / "val").unlink()
    prepare([inputs], f"file://{target}", **options)
    assert contents(target) == local


def test_no_password_is_printed(sftp, inputs, tokenizer, tmp_path, capsys):
    address, _ = sftp
    for _ in range(2):
        prepare([inputs], f"{address}/printed", tokenizer=tokenizer, work_dir=tmp_path / "work", **OPTIONS)
    with pytest.raises(UserError) as raised:
        prepare([inputs], f"{address}/printed", tokenizer=tokenizer, work_dir=tmp_path / "work", seed=3, **OPTIONS)
    said = capsys.readouterr().out + str(raised.value)
    assert "is complete already" in said and "sftp://me:***@" in said and "secret" not in said
