"""Names of other engines lead to keys that are there."""

from __future__ import annotations

import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix import install_hint
from batchmix.config_errors import known_keys
from batchmix.other_names import ABSENT, RENAMED, explain_other_name
from batchmix.written_config import quoted

KEY = re.compile(r"\b(?:sampling|model|engine|data|output)(?:\.\w+)+")


def test_every_key_that_is_named_is_there() -> None:
    texts = [*RENAMED.values(), *ABSENT.values()]
    named = {key for text in texts for key in KEY.findall(text)}
    assert named <= set(known_keys())
    assert len(named) > 20
    assert not set(RENAMED) & set(ABSENT)


def test_no_key_of_ours_is_explained_away() -> None:
    ours = {key.rpartition(".")[2] for key in known_keys()}
    assert {name for name in ours if explain_other_name(name)} == set()


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab '\"\\$`!{}=,[]()é\t"), max_size=12))
def test_a_quoted_text_reaches_the_key_as_it_is(text: str) -> None:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = f"x{text}"  # quotes around a text are taken for an attempt to quote it
    (argument,) = shlex.split(quoted("data.template", text))
    assert OverridesParser.create().parse_override(argument).value() == text


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, "pip install 'batchmix[s3]'"),
        ('{"url": "file:///src/my%20clone", "dir_info": {"editable": true}}', "pip install -e '/src/my clone[s3]'"),
        ('{"url": "file:///src/clone", "dir_info": {}}', "pip install '/src/clone[s3]'"),
        ('{"url": "file:///a/batchmix.whl", "archive_info": {}}', "pip install 'batchmix[s3]'"),
    ],
)
def test_extras_come_from_where_batchmix_did(
    origin: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return origin

    monkeypatch.setattr(install_hint, "distribution", lambda name: Installed())
    assert install_hint.install_hint("s3") == expected
