"""docs/configuration.md is what the dataclasses say."""

from __future__ import annotations

import re

from config_reference import PAGE, reference

from batchmix.config_errors import known_keys


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_the_page_has_every_key_and_a_line_about_each() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| .+ \| .+ \| (.*) \|$", reference(), re.MULTILINE)
    keys = [key for key in known_keys() if "." in key and key != "sampling.structured_outputs"]
    assert [key for key, _ in rows] == [key.partition(".")[2] for key in keys]
    assert [key for key, text in rows if not text] == []
