"""Secrets of URLs and of environment variables: that none of what batchmix writes or says has one."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from batchmix.errors import BatchmixError
from batchmix.redact import FromEnvironment, RedactingFormatter, fingerprint, forget, redact, redact_url, remember_url

WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=8)
# Printable and unusual, but for white space, which ends a URL in a text; the marks make it one to be looked for.
ODD = "abcXYZ019-._~!$&'()*+,;=%{}|^`<>\"\\éß漢"
QUERY_SECRET = st.text(ODD + "/?:@[]", min_size=2, max_size=8).map(lambda text: f"Q7{text}7Q")
USER = st.text(ODD, min_size=2, max_size=8).map(lambda text: f"Q7{text}7Q")
# Unquoted as they are typed: AWS makes keys with `/` in them, people passwords with `@`.
PASSWORD = st.one_of(
    *(st.text(ODD + more, min_size=2, max_size=8).map(lambda text: f"Q7{text}7Q") for more in ("/:", "@:", ""))
)
SIGNED = st.sampled_from(["X-Amz-Signature", "sig", "X-Goog-Signature", "token", "AWSAccessKeyId", "versionId"])


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


@st.composite
def urls(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A URL and the secrets in it."""
    scheme = draw(st.sampled_from(["http", "https", "s3", "gs", "az", "ftp", "sftp", "HTTPS", "hdfs"]))
    host, path = draw(WORD), draw(st.lists(WORD, max_size=3))
    secrets: list[str] = []

    def secret(strategy: st.SearchStrategy[str]) -> str:
        secrets.append(draw(strategy))
        return secrets[-1]

    userinfo = ""
    if draw(st.booleans()):
        quoted = partial(quote, safe="") if draw(st.booleans()) else str
        userinfo = secret(USER.map(quoted))
        if draw(st.booleans()):
            userinfo += ":" + secret(PASSWORD.map(quoted))
        userinfo += "@"
    port = (
        f":{draw(st.integers(1, 65535))}" if scheme.lower() in ("http", "https", "ftp") and draw(st.booleans()) else ""
    )
    url = f"{scheme}://{userinfo}{host}{port}/{'/'.join(path)}"
    if draw(st.booleans()):
        names = draw(st.lists(SIGNED, min_size=1, max_size=3))
        url += "?" + "&".join(f"{name}={secret(QUERY_SECRET)}" for name in names)
    if scheme.lower() in ("http", "https") and draw(st.booleans()):
        url += "#" + secret(QUERY_SECRET)
    if draw(st.booleans()):
        url = draw(st.sampled_from(["simplecache::", "zip://*.csv::", "filecache::"])) + url
    return url, secrets


@settings(deadline=None, max_examples=100)
@given(urls())
def test_nothing_is_left_of_a_secret(case: tuple[str, list[str]]) -> None:
    url, secrets = case
    shown = redact_url(url)
    for secret in secrets:
        assert secret not in shown
        assert "Q7" not in shown
    assert redact_url(shown) == shown
    if not secrets:
        assert shown == url


@settings(deadline=None, max_examples=100)
@given(st.lists(urls(), min_size=1, max_size=3), st.sampled_from([", ", ",", " and "]))
def test_nor_in_a_text_that_names_several(cases: list[tuple[str, list[str]]], between: str) -> None:
    text = f"data.path=[{between.join(url for url, _ in cases)}]: cannot be read (url='{cases[0][0]}')"
    # An unquoted `/`, `?` or `#` in a password leaves no way to see where the URL's parts end.
    assume(not any(set(url.partition("://")[2].rpartition("@")[0]) & set("/@") for url, _ in cases))
    assert "Q7" not in redact(text)
    assert "Q7" not in str(BatchmixError(text))
    assert "Q7" not in str(pickle.loads(pickle.dumps(BatchmixError(text))))


@settings(deadline=None, max_examples=100)
@given(urls())
def test_nor_where_a_remembered_one_stands_alone(case: tuple[str, list[str]]) -> None:
    """As in errors of stores, which name `key:secret@bucket/file`, or a request that they have quoted anew."""
    forget()
    remember_url(case[0])
    _, _, stripped = case[0].rpartition("::")
    path = stripped.partition("://")[2]
    for text in (path, case[0]):
        assert "Q7" not in redact(f"cannot open {text}: gone")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:hunter2@host:80/in.jsonl?X-Amz-Signature=1#f", "http://***@host:80/in.jsonl?***"),
        ("s3://AKIA:se/c+ret@bucket/a.parquet", "s3://***@bucket/a.parquet"),
        ("s3://AKIA:12/3@bucket/a.parquet", "s3://***@bucket/a.parquet"),
        ("http://user:pa?ss@host/x", "http://***"),
        ("http://user:12#3@host/x", "http://***"),
        ("az://c/x?sv=1&se=2&sig=a%2Fb", "az://c/x?***"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("abfs://user:key@account/x", "abfs://***@account/x"),
        ("zip://*.csv::https://u:p@host/a.zip?sig=1", "zip://*.csv::https://***@host/a.zip?***"),
        ("https://token@github.com/x", "https://***@github.com/x"),
        ("hf://datasets/me/set@main/a.parquet", "hf://datasets/me/set@main/a.parquet"),
        ("hf_abcdefghijklmnop", "hf_***"),
        ("http://[::1]:80/x?a", "http://[::1]:80/x?***"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),  # a pattern
        ("gs://bucket/a#b.jsonl", "gs://bucket/a#b.jsonl"),  # a key
        ("/data/what?.jsonl#1", "/data/what?.jsonl#1"),
        ("file:///data/a@b/x?.jsonl", "file:///data/a@b/x?.jsonl"),
        ("https://host:8080/a@1.2/x", "https://host:8080/a@1.2/x"),
        ("", ""),
    ],
)
def test_urls(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_url(shown) == shown


def test_a_fingerprint_tells_texts_apart_and_is_slow_to_guess() -> None:
    started = time.process_time()
    assert fingerprint("http://u:a@h") == fingerprint("http://u:a@h") != fingerprint("http://u:b@h")
    assert time.process_time() - started > 0.01  # a bare hash takes a microsecond


def test_a_text_from_the_environment_remembers_where_from() -> None:
    text = FromEnvironment("value", "${oc.env:X}")
    again = pickle.loads(pickle.dumps(text))
    assert (again, again.written, type(again)) == ("value", "${oc.env:X}", FromEnvironment)


def test_logs_and_their_tracebacks_are_redacted() -> None:
    try:
        raise OSError("http://user:hunter2@host/x?sig=1")
    except OSError:
        record = logging.LogRecord("x", 20, "x", 1, "reading %s", ("s3://key:hunter2@b/x",), sys.exc_info())
    text = RedactingFormatter().format(record)
    assert "hunter2" not in text
    assert "sig" not in text
    assert "reading s3://***@b/x" in text
    assert "Traceback" in text


def test_tracebacks_of_bugs_are_redacted() -> None:
    code = """
import sys, threading
from batchmix.redact import redact_tracebacks
redact_tracebacks()
def fail(): raise RuntimeError("http://user:hunter2@host/x?sig=hunter2")
thread = threading.Thread(target=fail); thread.start(); thread.join()
fail()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: http://***@host/x?***") == 2
    assert "hunter2@" not in done.stderr.replace('"http://user:hunter2@host/x?sig=hunter2"', "")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of a server of tmp_path/www, which takes any user and any query."""
    (tmp_path / "www").mkdir()
    server = HTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path / "www"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def run(
    folder: Path, *arguments: str, environment: dict[str, str], secrets: list[str]
) -> subprocess.CompletedProcess[str]:
    """The command; no argument of a process that it starts has a secret, nor has what it prints."""
    command = [sys.executable, "-m", "batchmix", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    lines: list[str] = []
    while process.poll() is None:
        with suppress(psutil.Error):  # it has ended
            lines += [" ".join(child.cmdline()) for child in psutil.Process(process.pid).children(recursive=True)]
        time.sleep(0.1)
    output, _ = process.communicate()
    for secret in secrets:
        assert secret not in output
        assert not [line for line in lines if secret in line]
    return subprocess.CompletedProcess(command, process.returncode, output)


def test_a_run_writes_and_says_no_secret(tmp_path: Path, address: str) -> None:
    secrets = ["hunter2secret", "sig2secret", "usersecret", "systemsecret", "foldersecret"]
    (tmp_path / "www" / "in.jsonl").write_text('{"prompt": "hi"}\n{"prompt": 3, "sampling": {"top_p": -1}}\n')
    (tmp_path / "foldersecret").mkdir()
    environment = {"URL": f"http://usersecret:hunter2secret@{address}/in.jsonl?sig=sig2secret", "SYSTEM": "systemsecret",
                   "FOLDER": str(tmp_path / "foldersecret")}  # fmt: skip
    call = partial(run, tmp_path, environment=environment, secrets=secrets)
    literal = f"data.path=['{environment['URL']}','{environment['URL'].replace('sig=', 'x=1&sig=')}']"
    common = ["sampling.max_tokens=2", "data.system_prompt=${oc.env:SYSTEM}"]

    done = call("generate", literal, "output.dir=${oc.env:FOLDER}/out", *common)
    assert done.returncode == 0, done.stdout
    assert call("report", "output.dir=${oc.env:FOLDER}/out").returncode == 0
    assert call("export", "output.dir=${oc.env:FOLDER}/out", "export.dir=${oc.env:FOLDER}/card").returncode == 0
    out = tmp_path / "foldersecret" / "out"
    files = [path for path in (tmp_path / "foldersecret").rglob("*") if path.is_file()]
    assert {"_run.json", "report.html", "README.md", "config.yaml", "part-00000-000000.arrow"} <= {
        f.name for f in files
    }
    for path in files:
        assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path
    written = json.loads((out / "_run.json").read_text())
    shown = f"http://***@{address}/in.jsonl?***"
    assert written["config"]["data"]["path"] == [shown, shown]
    assert written["config"]["data"]["system_prompt"] == "${oc.env:SYSTEM}"
    assert written["config"]["output"]["dir"] == "${oc.env:FOLDER}/out"
    assert set(written["fingerprints"]) == {"data.path[0]", "data.path[1]", "data.system_prompt", "output.dir"}
    assert written["fingerprints"]["data.system_prompt"] == fingerprint("systemsecret")
    hydra = {path.name: OmegaConf.load(path) for path in (out / ".hydra").iterdir()}
    assert OmegaConf.to_container(hydra["config.yaml"])["data"]["path"] == [shown, shown]  # type: ignore[call-overload, index]
    assert f'data.path=["{shown}", "{shown}"]' in hydra["overrides.yaml"]

    # Credentials that were renewed are no other data; another system prompt is.
    environment["URL"] = f"http://usersecret:hunter2secret_new@{address}/in.jsonl?sig=sig2secret_new"
    done = call("generate", "data.path=['${oc.env:URL}','${oc.env:URL}']", f"output.dir={out}", *common)
    assert done.returncode == 0, done.stdout
    assert "is complete" in done.stdout
    environment["SYSTEM"] = "systemsecret_new"
    done = call("generate", "data.path=['${oc.env:URL}','${oc.env:URL}']", f"output.dir={out}", *common)
    assert done.returncode == 1
    assert "data.system_prompt was" in done.stdout
    environment["SYSTEM"] = "systemsecret"
    (tmp_path / "www" / "in.jsonl").write_text('{"prompt": "ho"}\n{"prompt": 3, "sampling": {"top_p": -1}}\n')
    done = call("generate", "data.path=['${oc.env:URL}','${oc.env:URL}']", f"output.dir={out}", *common)
    assert done.returncode == 1
    assert "holds rows made with other settings (data: " in done.stdout, done.stdout
