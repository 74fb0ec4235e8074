from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.input import strict_json
from batchmix.input.schema import as_json_text, infer_schema
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputFormat
from batchmix.output.part_formats import part_format
from batchmix.records import Completion, Prompt, TokenLogprob
from batchmix.sampling import SamplingConfig

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def parse(text: str | bytes) -> Any:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def nulled(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nulled(item) for key, item in value.items()}
    return [nulled(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=100, deadline=None)
@given(values)
def test_what_is_no_number_is_null_and_the_rest_as_ever(value: Any) -> None:
    assert parse(strict_json.dumps(value)) == nulled(value)
    if not isinstance(value, str):
        assert value is None or parse(as_json_text(value) or "") == nulled(value)


@pytest.mark.parametrize("openai", [None, "model"])
def test_lines_of_the_output_are_json(openai: str | None) -> None:
    row = {"score": math.nan, "v": [math.inf, 1.0], "deep": {"x": -math.inf}}
    columns = OutputColumns(infer_schema([row]), token_ids=False, logprobs=True)
    entry = TokenLogprob(5, -math.inf, [(6, math.nan)])
    done = Completion(
        Prompt(0, "0", row, [1], SamplingConfig()),
        0,
        [5],
        "stop",
        cumulative_logprob=-math.inf,
        logprobs=[entry],
        text="a",
    )
    (line,) = part_format(OutputFormat.jsonl, columns, None, openai).records([done])
    found = parse(line)
    if openai is None:
        assert (found["score"], found["v"], found["deep"]) == (None, [None, 1.0], {"x": None})
        assert found["cumulative_logprob"] is None
