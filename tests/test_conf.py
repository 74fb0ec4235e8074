"""Every file of the Hydra tree composes into a checked `Config`, and says nothing that a dataclass does not have."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from slow_cases import slow_after

from batchmix.config import JOBS, Config
from batchmix.config_errors import descriptions, explain, known_keys
from batchmix.errors import BatchmixError
from batchmix.hydra_app import first_is, register, to_config
from batchmix.output.run_info import differences
from batchmix.sampling import SamplingConfig

CONF = Path(__file__).parents[1] / "conf"
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml"))
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "hydra")
GIVEN = ["data.path=prompts.jsonl", "output.dir=out"]


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("batchmix.conf", version_base="1.3"):
        yield


def composed(*overrides: str, primary: str = "generate") -> DictConfig:
    register(primary)
    given = [override for override in GIVEN if override.partition(".")[0] in JOBS[primary]]
    return compose(primary, overrides=[*given, *overrides])


def config_of(*overrides: str, primary: str = "generate") -> Config:
    return to_config(composed(*overrides, primary=primary), primary)


def test_there_is_a_primary_config_for_each_job() -> None:
    assert sorted(path.stem for path in (CONF.parent / "jobs").glob("*.py")) == PRIMARY


@pytest.mark.parametrize("primary", slow_after(4, PRIMARY))
def test_defaults_are_those_of_the_dataclasses(primary: str) -> None:
    config = config_of(primary=primary)
    expected = Config()
    expected.data.path = "prompts.jsonl" if "data" in JOBS[primary] else ""
    expected.output.dir = "out" if "output" in JOBS[primary] else ""
    if primary == "annotate":
        expected.sampling.temperature, expected.sampling.max_tokens = 0.0, 512
    assert config == expected


def test_plan_needs_no_output_folder() -> None:
    register("plan")
    assert to_config(compose("plan", overrides=["data.path=prompts.jsonl"]), "plan").output.dir == ""


def test_the_output_folder_may_lie_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert config_of("output.dir='~/out'").output.dir == "/home/me/out"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["import", "review.path=x"], ["review.action=import", "review.path=x"]),
        (["review.path=x", "import"], ["review.path=x", "import"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_a_first_bare_word_is_short_for_a_key(given: list[str], expected: list[str]) -> None:
    assert first_is("review.action", given) == expected


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_composes(choice: str) -> None:
    assert isinstance(config_of(choice, primary="annotate"), Config)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_keys_exist(path: Path) -> None:
    group = path.parent.relative_to(CONF).as_posix()
    if group.startswith("hydra"):
        pytest.skip("Hydra's own keys, which it checks itself")
    content = yaml.safe_load(path.read_text())
    content.pop("defaults", None)
    prefix = "" if group in (".", "experiment", "annotate") else f"{group}."
    assert {prefix + key for key in leaves(content)} <= set(known_keys())


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        free = known_keys().get(prefix + key) is Any  # a mapping of the user's own
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and not free else [prefix + key]


def test_choices_change_what_they_say() -> None:
    config = config_of("sampling=greedy", "engine=cpu", "data=openai_batch", "model=mixtral_8x7b_instruct")
    assert config.sampling.temperature == 0
    assert (config.engine.device, config.engine.backend.name) == ("cpu", "torch")
    assert config.data.format.name == "openai_batch"
    assert config.model.path == "mistralai/Mixtral-8x7B-Instruct-v0.1"


def test_an_override_beats_an_experiment() -> None:
    config = config_of("experiment=support_tickets", "sampling.max_tokens=7")
    assert (config.sampling.temperature, config.sampling.max_tokens) == (0, 7)
    assert config.data.path == "prompts.jsonl"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("sampling.logit_bias={3:1.5,10:-2}", "logit_bias", {3: 1.5, 10: -2.0}),
        ("sampling.logit_bias=null", "logit_bias", None),
        ("sampling.stop=[a,'b c']", "stop", ["a", "b c"]),
        ("sampling.stop_token_ids=[2,3]", "stop_token_ids", [2, 3]),
        ("sampling.logprobs=5", "logprobs", 5),
        ("sampling.temperature=1e-3", "temperature", 0.001),
    ],
)
@pytest.mark.parametrize("sampling", ["default", "greedy"])
def test_values_arrive_as_plain_python(override: str, key: str, value: object, sampling: str) -> None:
    arrived = getattr(config_of(f"sampling={sampling}", override).sampling, key)
    assert arrived == value
    assert type(arrived) is type(value)


def test_paths_arrive_as_a_list() -> None:
    assert config_of("data.path=[a.jsonl,s3://b/*.parquet]").data.path == ["a.jsonl", "s3://b/*.parquet"]


def test_a_config_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(BatchmixError, match=r"shard\.index=4"):
        config_of("shard.index=4", "shard.count=4")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.chat_template=none", "none"),  # a word, not null
        ("data.chat_template=chat.jinja", "chat.jinja"),
        ("data.chat_template='{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}'",
         "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"),
    ],
)  # fmt: skip
def test_a_chat_template_arrives_as_it_is_written(override: str, value: str) -> None:
    assert config_of(override).data.chat_template == value


def test_every_job_has_its_groups() -> None:
    assert sorted(JOBS) == PRIMARY
    assert {group for groups in JOBS.values() for group in groups} == {
        field.name for field in dataclasses.fields(Config)
    }


@pytest.mark.parametrize("primary", PRIMARY)
def test_a_job_composes_the_groups_that_it_reads_alone(primary: str) -> None:
    assert set(composed(primary=primary)) == set(JOBS[primary])


@pytest.mark.parametrize("override", ["data.limit=1", "model=tiny"])
def test_keys_of_other_jobs_are_refused_by_name(override: str) -> None:
    group = override.partition("=")[0].partition(".")[0]
    with pytest.raises(HydraException) as caught:
        composed(override, primary="tune")
    assert explain(caught.value, "tune") == f"{group}: batchmix tune does not read it; its keys begin with tune"


def test_keys_of_other_jobs_are_refused_where_they_are_added() -> None:
    with pytest.raises(BatchmixError, match=r"^data: batchmix tune does not read it; its keys begin with tune$"):
        config_of("+data.limit=1", primary="tune")


def test_every_key_has_a_description_in_one_line() -> None:
    for key, text in descriptions().items():
        if "." in key:
            assert text is not None, key
            assert 0 < len(text) <= 120, key
            assert "\n" not in text


def test_every_field_is_a_known_key() -> None:
    for field in dataclasses.fields(SamplingConfig):
        assert f"sampling.{field.name}" in known_keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("choices=[a]", "choices: no such key, did you mean sampling.structured_outputs.choice?"),
        ("choice=a", "choice=a: must be a list of texts, written [a,b] or null"),
    ],
)
def test_keys_of_a_group_that_may_be_null_are_known_too(override: str, message: str) -> None:
    with pytest.raises(HydraException) as caught:
        composed(f"sampling.structured_outputs.{override}")
    assert explain(caught.value, "generate") == f"sampling.structured_outputs.{message}"


def test_of_long_settings_the_place_where_they_differ_is_shown() -> None:
    labels = [f"label {number} ü" for number in range(12_000)]
    old, new = ({"annotate.choice": [*labels[:6000], label, *labels[6000:]]} for label in ("old", "new"))
    (found,) = differences(old, new)
    assert re.search(r'^annotate\.choice was \.\.\..*"label 5999 ü", "old", .*, is now \.\.\..*"new", .*\.\.\.$', found)
    assert len(found) < 500
    assert differences({"a": None}, {"a": "b"}) == ['a was null, is now "b"']
