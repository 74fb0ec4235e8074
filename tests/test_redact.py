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
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from processes import TICKETS
from slow_cases import slow_after

from batchmix.errors import BatchmixError
from batchmix.jobs.export import main as export
from batchmix.jobs.generate import main as generate
from batchmix.jobs.report import main as report
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


SECRETS = ["hunter2secret", "sig2secret", "usersecret", "systemsecret", "foldersecret"]


@pytest.fixture
def environment(tmp_path: Path, address: str) -> dict[str, str]:
    (tmp_path / "www" / "in.jsonl").write_text('{"prompt": "hi"}\n{"prompt": 3, "sampling": {"top_p": -1}}\n')
    (tmp_path / "foldersecret").mkdir()
    return {"URL": f"http://usersecret:hunter2secret@{address}/in.jsonl?sig=sig2secret", "SYSTEM": "systemsecret",
            "FOLDER": str(tmp_path / "foldersecret")}  # fmt: skip


def files_without_secrets(folder: Path) -> set[str]:
    """The names of all files, once each was looked through."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert not [secret for secret in SECRETS if secret.encode() in path.read_bytes()], path
    return {path.name for path in files}


COMMON = ["sampling.max_tokens=2", "data.system_prompt=${oc.env:SYSTEM}"]
TWICE = "data.path=['${oc.env:URL}','${oc.env:URL}']"
OUT = "output.dir=${oc.env:FOLDER}/out"


@pytest.mark.slow  # starts four jobs
def test_a_run_writes_and_says_no_secret(
    tmp_path: Path, address: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def call(main: Callable[..., int], *arguments: str, shown: str = "") -> tuple[int, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = main(arguments)
        said = "".join(capfd.readouterr())
        assert not [secret for secret in SECRETS if secret in said and secret != shown], said
        return code, said

    literal = f"data.path=['{environment['URL']}','{environment['URL'].replace('sig=', 'x=1&sig=')}']"
    code, said = call(generate, literal, OUT, *COMMON)
    assert code == 0, said
    assert call(report, OUT)[0] == 0
    assert call(export, OUT, "export.dir=${oc.env:FOLDER}/card")[0] == 0
    out = tmp_path / "foldersecret" / "out"
    assert {"run.json", "report.html", "README.md", "config.yaml", "overrides.yaml", "part-00000-000000.arrow",
            "train-00000.parquet"} <= files_without_secrets(out.parent)  # fmt: skip
    written = json.loads((out / ".batchmix/run.json").read_text())
    url = f"http://***@{address}/in.jsonl?***"
    assert written["config"]["data"]["path"] == [url, url]
    assert written["config"]["data"]["system_prompt"] == "${oc.env:SYSTEM}"
    assert written["config"]["output"]["dir"] == "${oc.env:FOLDER}/out"
    assert set(written["fingerprints"]) == {"data.path[0]", "data.path[1]", "data.system_prompt", "output.dir"}
    assert written["fingerprints"]["data.system_prompt"] == fingerprint("systemsecret")
    config, overrides = (
        yaml.safe_load((out / ".hydra" / name).read_text()) for name in ("config.yaml", "overrides.yaml")
    )
    assert config["data"]["path"] == [url, url]
    assert overrides == [f'data.path=["{url}", "{url}"]', OUT, *COMMON]

    # Credentials that were renewed are no other data; neither is the same text, given in another way.
    environment["URL"] = f"http://usersecret:hunter2secret_new@{address}/in.jsonl?sig=sig2secret_new"
    code, said = call(generate, TWICE, OUT, *COMMON)
    assert code == 0, said
    assert "is complete" in said
    code, said = call(generate, TWICE, OUT, "data.system_prompt=systemsecret", "sampling.max_tokens=3")
    assert code == 1
    assert "(sampling.max_tokens was 2, is now 3)" in said

    environment["SYSTEM"] = "systemsecret_new"
    code, said = call(generate, TWICE, OUT, *COMMON)
    assert code == 1
    assert "(data.system_prompt was {" in said
    environment["SYSTEM"] = "systemsecret"
    (tmp_path / "www" / "in.jsonl").write_text('{"prompt": "ho"}\n{"prompt": 3, "sampling": {"top_p": -1}}\n')
    code, said = call(generate, TWICE, OUT, *COMMON)
    assert code == 1
    assert "holds rows made with other settings (data: " in said


@pytest.mark.parametrize(
    "argument",
    slow_after(
        3,
        [
            "data.path=http://usersecret:hunter2secret@ADDRESS/none.jsonl?sig=sig2secret",  # `=` unquoted
            "data.path='http://usersecret:hunter2secret@ADDRESS/none.jsonl?sig=sig2secret'",
            "data.path='http://usersecret:hunter2secret@ADDRESS/in.txt?sig=sig2secret'",
            "data.path='nosuch://usersecret:hunter2secret@ADDRESS/in.jsonl?sig=sig2secret'",
            "data.path=${oc.env:FOLDER}/none.jsonl",
            "data.limit=${oc.env:SYSTEM}",
            "output.dir='nosuch://usersecret:hunter2secret@ADDRESS/out?sig=sig2secret'",
            "http://usersecret:hunter2secret@ADDRESS/in.jsonl?sig=sig2secret",
            "--http://usersecret:hunter2secret@ADDRESS/in.jsonl?sig=sig2secret",
        ],
    ),
)
def test_errors_say_no_secret(
    tmp_path: Path, address: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], argument: str,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    defaults = [f"data.path={TICKETS}", f"output.dir={tmp_path / 'out'}"]
    arguments = [other for other in defaults if other.partition("=")[0] != argument.partition("=")[0]]
    try:
        code: Any = generate([*arguments, argument.replace("ADDRESS", address)])
    except SystemExit as stop:  # usage
        code = stop.code
    said = "".join(capfd.readouterr())
    assert code in (1, 2)
    assert said.startswith("batchmix: error: ")
    assert not [secret for secret in SECRETS if secret in said], said


@pytest.mark.slow  # three processes, two of them with a model
def test_no_process_of_a_run_has_a_secret_in_its_arguments(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "batchmix", "generate", TWICE, OUT, *COMMON, "engine.data_parallel_size=2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    lines: set[str] = set()
    while process.poll() is None:
        with suppress(psutil.Error):  # it has ended
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            lines |= {" ".join(member.cmdline()) for member in family}
        time.sleep(0.2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert len(lines) >= 3
    assert not [secret for secret in SECRETS if secret in output or any(secret in line for line in lines)]
    assert "run.json" in files_without_secrets(tmp_path / "foldersecret")
