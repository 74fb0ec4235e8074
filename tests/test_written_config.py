"""How texts from environment variables are written, and read back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import OmegaConf

from batchmix.errors import BatchmixError
from batchmix.hydra_app import to_config
from batchmix.output.run_info import differences
from batchmix.redact import FromEnvironment, fingerprint, forget
from batchmix.written_config import hidden_texts, identifying, to_plain, value_of, written_override


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget()
    monkeypatch.setenv("FOLDER", "/somewhere/secret")
    monkeypatch.setenv("SIZE", "7")
    yield
    forget()


def config_of(**groups: Any) -> Any:
    given: dict[str, Any] = {"data": {"path": "x"}, "output": {"dir": "${oc.env:FOLDER}/out"}}
    return to_config(
        OmegaConf.create(OmegaConf.to_container(OmegaConf.merge(given, groups), resolve=False)), "annotate"
    )  # type: ignore[arg-type]


def test_the_interpolation_is_written_also_where_it_comes_through_another_key() -> None:
    config = config_of(
        data={"path": ["${output.dir}/a.jsonl", "b.jsonl"], "limit": "${oc.env:SIZE}", "columns": ["${oc.env:FOLDER}"],
              "split": "${data.limit}"},
        output={"format": "${oc.env:FORM,parquet}", "compression": "${oc.env:COMPRESSION,lz4}"},
    )  # fmt: skip
    assert config.data.path == ["/somewhere/secret/out/a.jsonl", "b.jsonl"]
    assert config.output.dir == "/somewhere/secret/out"
    plain = to_plain(config)
    assert plain["data"]["path"] == ["${output.dir}/a.jsonl", "b.jsonl"]
    assert plain["data"]["columns"] == ["${oc.env:FOLDER}"]
    assert plain["output"]["dir"] == "${oc.env:FOLDER}/out"
    # Numbers and choices are what they are, and so is what a finished run is read back by.
    assert (plain["data"]["limit"], plain["output"]["format"], plain["output"]["compression"]) == (7, "parquet", "lz4")
    assert set(hidden_texts(config)) == {"data.path[0]", "data.columns[0]", "output.dir", "data.split"}


def test_a_task_from_the_environment_is_written_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = config_of(annotate={"input": "{{ text }}", "instruction": "For ${oc.env:FOLDER}"})
    assert to_plain(config)["annotate"]["instruction"] == "For /somewhere/secret"
    assert "annotate.instruction is For ${oc.env:FOLDER}: a task belongs to its answers" in caplog.text


def test_a_text_is_one_however_it_was_given() -> None:
    config = config_of(data={"system_prompt": "${oc.env:FOLDER}", "columns": ["${oc.env:FOLDER}"]})
    plain = to_plain(config, identifying)
    identity = {"data.system_prompt": plain["data"]["system_prompt"], "data.columns": plain["data"]["columns"]}
    assert "secret" not in str(identity)
    assert not differences(identity, {"data.system_prompt": "/somewhere/secret", "data.columns": ["/somewhere/secret"]})
    assert not differences({"data.system_prompt": "/somewhere/secret", "data.columns": ["/somewhere/secret"]}, identity)
    assert len(differences(identity, {"data.system_prompt": "other", "data.columns": ["other"]})) == 2


def test_files_are_what_they_hold() -> None:
    one, other = ({"files": [{"name": name, "bytes": 3, "sha256_ends": "a"}]} for name in ("a.jsonl", "b.jsonl"))
    assert not differences({"data": one}, {"data": other})
    other["files"][0]["bytes"] = 4
    assert differences({"data": one}, {"data": other}) == ["data: b.jsonl has changed"]
    assert differences({"data": one}, {"data": {"hub": "a", "split": "train", "hash": "b"}})


def test_a_template_is_read_back_where_its_variable_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(data={"template": "${oc.env:FOLDER} {{ text }}"})
    fingerprints = {key: fingerprint(text) for key, text in hidden_texts(config).items()}
    run = {"config": to_plain(config), "fingerprints": fingerprints}
    assert run["config"]["data"]["template"] == "${oc.env:FOLDER} {{ text }}"
    assert value_of(run, "data", "template") == "/somewhere/secret {{ text }}"
    assert value_of(run, "data", "split") == "train"
    monkeypatch.setenv("FOLDER", "elsewhere")
    with pytest.raises(BatchmixError, match=r"data\.template=.*was another value when the run was made"):
        value_of(run, "data", "template")
    monkeypatch.delenv("FOLDER")
    with pytest.raises(BatchmixError, match="set the variables that it names"):
        value_of(run, "data", "template")


def test_overrides_as_they_are_written() -> None:
    plain = {"data": {"path": ["s3://***@b/x", "y"], "limit": 3}}
    hidden = {"data.path[0]": "s3://k:s@b/x"}
    assert written_override("data.path=[s3://k:s@b/x,y]", plain, hidden) == 'data.path=["s3://***@b/x", "y"]'
    assert written_override("+data.path=[${oc.env:X},y]", plain, hidden) == "+data.path=[${oc.env:X},y]"
    assert written_override("data.limit=3", plain, hidden) == "data.limit=3"
    assert written_override("data.template=https://h/?q={{ x }}", plain, hidden) == "data.template=https://h/?q={{ x }}"
    assert written_override("hydra.x=http://u:p@h/y", plain, hidden) == "hydra.x=http://***@h/y"
    assert isinstance(FromEnvironment("a", "b"), str)
