"""Output in an object store: a real S3 server (moto) in a process of its own, real workers, real kills."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import TICKETS, finish, read, start, wait_for

from batchmix.annotate.results import Results
from batchmix.input.config import ShardConfig
from batchmix.output.lease import Lease, shard_name
from batchmix.storage import write_json
from batchmix.storage.bookkeeping import FOLDER, HYDRA, JOURNAL, MERGE, RUN, SUCCESS, SUMMARY, WORKERS
from batchmix.storage.object_store import ObjectStore

boto3, s3fs = pytest.importorskip("boto3"), pytest.importorskip("s3fs")  # all of the `dev` extra
for module in ("moto", "flask", "flask_cors"):  # the server, in a process of its own
    pytest.importorskip(module)

pytestmark = pytest.mark.slow  # starts a server and many processes

BUCKET = "bucket"
SERVER = """
import sys
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server with one bucket; the environment leads every S3 library there."""
    with serving(tmp_path_factory.mktemp("s3")) as (client, _):
        yield client


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[Any, subprocess.Popen[bytes]]]:
    """A server's client and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        deadline = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                break
            except Exception:
                assert time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.2)
        try:
            yield client, server
        finally:
            server.kill()
            server.wait()


def parts(s3: Any, prefix: str) -> dict[str, bytes]:
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/part-").get("Contents", [])
    return {item["Key"]: s3.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read() for item in found}


def rows(s3: Any, prefix: str) -> dict[int, tuple[Any, ...]]:
    """As `read`, of what any reader would see; every object is a whole file."""
    tables = [pa.ipc.open_file(data).read_all() for data in parts(s3, prefix).values()]
    listed = pa.concat_tables(tables).to_pylist() if tables else []
    found = {row["row"]: (row["id"], row["generated_text"], row["finish_reason"]) for row in listed}
    assert len(found) == len(listed), "a row is there twice"
    return found


def leftover_uploads(s3: Any) -> list[Any]:
    return list(s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(TICKETS.read_text(encoding="utf-8").splitlines(keepends=True)[:200]))
    return path


def test_what_the_store_promises(s3: Any) -> None:
    store = ObjectStore(f"s3://{BUCKET}/promises")
    assert store.exclusive
    assert store.create("a", lambda file: file.write(b"one"))
    assert not store.create("a", lambda file: file.write(b"two"))
    assert store.create("a", lambda file: file.write(b"one")), "the answer to the first try may have been lost"
    outcomes: list[bool] = []
    threads = [
        threading.Thread(target=lambda i=i: outcomes.append(store.create("b", lambda file: file.write(b"%d" % i))))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    big = os.urandom(120 << 20)  # more than s3fs sends in one piece unless told to
    calls: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def watched(self: Any, method: str, *args: Any, **options: Any) -> Any:
        calls.append(method)
        return await call(self, method, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", watched)
        assert store.create("big", lambda file: file.write(big))
    assert calls == ["put_object"]
    assert store.read("big") == big
    store.move("big", "moved")
    store.move("big", "moved")  # a second time
    assert (store.exists("big"), store.exists("moved")) == (False, True)
    assert store.names("*") == ["a", "b", "moved"]
    store.delete("moved")
    store.delete("moved")


def test_a_bucket_that_is_not_there(s3: Any, data: Path) -> None:
    code, output = finish(start(data, "s3://nowhere/out"))  # type: ignore[arg-type]
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("batchmix: error: output.dir=s3://nowhere/out: cannot be written to ("), output
    assert "Traceback" not in output


class HoldingProxy:
    """Between workers and the server. The next upload of a part that `hold` asks for stands still in its middle."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._wanted = 0
        self.held = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, number: int) -> None:
        """The `number`-th from now on."""
        self.held.clear()
        self._wanted = number

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if data.startswith(b"PUT /bucket/killed/part-") and self._wanted:
                    self._wanted -= 1
                    if not self._wanted:
                        head, _, body = data.partition(b"\r\n\r\n")
                        server.sendall(head + b"\r\n\r\n")
                        body = body or client.recv(1 << 20)
                        server.sendall(body[: len(body) // 2])
                        self.held.set()
                        client.recv(1)  # until the worker is no more
                        return
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                client.sendall(data)


def test_workers_killed_in_the_middle_of_an_upload(
    s3: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "undisturbed"
    code, output = finish(start(data, expected))
    assert code == 0, output
    out: Any = f"s3://{BUCKET}/killed"
    server = urlparse(os.environ["AWS_ENDPOINT_URL"])
    proxy = HoldingProxy((server.hostname or "", server.port or 0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    seen: set[int] = set()
    for number, whole in ((2, 1), (4, 2), (3, 1)):  # the first upload of the second and third worker is a seal
        proxy.hold(number)
        process = start(data, out, "output.flush_seconds=1000")
        wait_for(proxy.held.is_set, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = rows(s3, "killed")
        assert len(found) == len(seen) + 10 * whole, "of what was being uploaded nothing is there"
        assert seen <= set(found)
        assert found.items() <= read(expected).items()
        assert not leftover_uploads(s3)
        seen = set(found)
    workers = [start(data, out, "shard.count=2", f"shard.index={index}", "output.order=input") for index in range(2)]
    for worker in workers:
        code, output = finish(worker)
        assert code == 0, output
    assert rows(s3, "killed") == read(expected)
    tables = [pa.ipc.open_file(content).read_all() for _, content in sorted(parts(s3, "killed").items())]
    assert pa.concat_tables(tables)["row"].to_pylist() == list(range(200))
    listed = s3.list_objects_v2(Bucket=BUCKET, Prefix="killed/")["Contents"]
    names = {item["Key"].removeprefix("killed/") for item in listed}
    assert {SUCCESS, RUN, SUMMARY, f"{HYDRA}/shard-0-of-2/config.yaml"} <= names
    assert any(name.startswith(f"{WORKERS}/") for name in names)
    assert not any(name.startswith((MERGE, JOURNAL)) for name in names)
    assert not [name for name in names if not name.startswith(("part-", f"{FOLDER}/", f"{HYDRA}/"))]
    command = [sys.executable, "-m", "batchmix", "status", f"output.dir={out}"]
    status = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert status.returncode == 0, status.stdout + status.stderr


def test_an_upload_that_is_cut_off_leaves_nothing(s3: Any) -> None:
    """The worker dies when the server has a part of the body: what the server then has is no object."""
    url = urlparse(os.environ["AWS_ENDPOINT_URL"])
    signed = s3.generate_presigned_url("put_object", Params={"Bucket": BUCKET, "Key": "cut/part-00000-000000.arrow"})
    connection = http.client.HTTPConnection(url.hostname or "", url.port)
    connection.putrequest("PUT", signed.split(url.netloc, 1)[1])
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    connection.send(b"x" * 500)
    connection.close()
    time.sleep(0.5)
    assert not parts(s3, "cut")
    assert not leftover_uploads(s3)


def test_another_worker_is_refused(s3: Any, data: Path) -> None:
    store = ObjectStore(f"s3://{BUCKET}/busy")
    lease = Lease(store, shard_name(0, 1), ShardConfig(), "shard 0 of 1")
    code, output = finish(start(data, store.url))  # type: ignore[arg-type]
    assert code == 1, output
    assert f"another process (process {os.getpid()} on {os.uname().nodename}) is writing shard 0 of 1 there" in output
    lease.close()


@pytest.mark.parametrize("form", ["arrow", "jsonl"])
def test_a_task_and_all_that_comes_after_it(s3: Any, data: Path, tmp_path: Path, batchmix: Any, form: str) -> None:
    """The same rows and columns as in a folder; report, review and export read them, and write where they are told to."""
    out, place = f"s3://{BUCKET}/task-{form}", f"s3://{BUCKET}/handed-{form}"

    def run(*arguments: str) -> str:
        done = batchmix(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    task = ["annotate", "tickets", f"data.path={data}", "data.limit=60", f"output.format={form}", "output.order=input",
            "output.rows_per_shard=25"]  # fmt: skip
    here, there = run(*task, "output.dir=out"), run(*task, f"output.dir={out}")
    assert here.splitlines()[-1] == "the report is out/.batchmix/report/report.html"
    assert there.splitlines()[-1] == f"the report is {out}/.batchmix/report/report.html"
    assert there.splitlines()[-7:-1] == here.splitlines()[-7:-1]  # how well the answers agree with people's
    local, store = Results(str(tmp_path / "out")), Results(out)
    assert len(store.names) == len(local.names) == 3
    assert store.schema.field("topic").type == pa.dictionary(pa.int32(), pa.string())
    expected = pa.concat_tables(local.batches())
    assert pa.concat_tables(store.batches()).equals(expected)
    assert store.storage.read(".batchmix/checks.json") == local.storage.read(".batchmix/checks.json")
    store.storage.delete(".batchmix/report/report.html")
    assert run("report", f"output.dir={out}").splitlines()[-1] == there.splitlines()[-1]
    assert b"Confusion matrix of topic" in store.storage.read(".batchmix/report/report.html")
    run("review", "export", f"output.dir={out}", "review.rows=5", "review.path=tasks.json")
    run("review", "export", f"output.dir={out}", "review.rows=5", f"review.path={place}/tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_bytes())
    assert (len(tasks), tasks) == (5, json.loads(ObjectStore(place).read("tasks.json")))
    for task in tasks:
        task["annotations"] = task["predictions"]
    write_json(ObjectStore(place), "said.json", tasks)
    corrections = f"{place}/corrections.jsonl"
    run("review", "import", f"output.dir={out}", f"review.path={place}/said.json", f"review.corrections={corrections}")
    run("export", f"output.dir={out}", f"export.corrections={corrections}", "export.dir=set")
    run("export", f"output.dir={out}", f"export.corrections={corrections}", f"export.dir={place}/set")
    exported = (tmp_path / "set/data/train-00000.parquet").read_bytes()
    assert ObjectStore(f"{place}/set").read("data/train-00000.parquet") == exported
    rows = pq.read_table(pa.BufferReader(exported))
    assert rows["topic"].to_pylist() == expected["topic"].to_pylist()
    assert sum(rows["reviewed"].to_pylist()) == 5
    assert not leftover_uploads(s3)
    nowhere = batchmix("export", f"output.dir={out}", "export.dir=s3://nowhere/set")
    assert nowhere.stderr.splitlines()[-1].startswith(
        "batchmix: error: export.dir=s3://nowhere/set: cannot be written ("
    )


def appeared(client: Any, prefix: str) -> bool:
    time.sleep(0.3)
    return "Contents" in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)


def test_a_store_that_is_gone_in_the_middle_of_a_run_is_one_line(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(TICKETS.read_text().splitlines(keepends=True)[:300]))
    with serving(tmp_path) as (client, server):
        run = start(data, "s3://bucket/gone", "output.flush_seconds=0.2", threads=1)  # type: ignore[arg-type]
        for name in (f"{WORKERS}/", RUN, "part-"):  # each may take its time; asked seldom, to leave the run some
            wait_for(partial(appeared, client, f"gone/{name}"), run)
        server.kill()
        code, output = finish(run)
    assert code == 1, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("batchmix: error: output.dir=s3://bucket/gone: the store fails ("), output
