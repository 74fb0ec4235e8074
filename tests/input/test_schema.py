from __future__ import annotations

import json
import logging
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.input.csv_types import infer_csv_schema, parse_field
from batchmix.input.schema import LOOSE, Conformer, as_json_text, infer_schema, loose, settle, short
from batchmix.records import InputRow

LONE = "\ud800"


def infer(*values: Any) -> pa.Field:
    return settle(infer_schema([{"x": value} for value in values])).field("x")


def conform(kind: pa.DataType | pa.Field, *values: Any) -> list[InputRow]:
    field = kind if isinstance(kind, pa.Field) else pa.field("x", kind)
    rows = [InputRow(number, str(number), {"x": value}) for number, value in enumerate(values)]
    Conformer(pa.schema([field]), ["x"]).check(rows)
    return rows


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([True, None], pa.bool_()),
        (["a", None], pa.string()),
        ([["a"], []], pa.list_(pa.string())),
        ([[{"role": "user", "content": "hi"}]], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ([{"a": 1}, {"b": "x"}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([[{"content": "fine"}], [{"content": LONE}]], pa.list_(pa.struct([("content", pa.string())]))),
    ],
)
def test_types_are_inferred(values: list[Any], kind: pa.DataType) -> None:
    assert infer(*values) == pa.field("x", kind)


@pytest.mark.parametrize(
    "values",
    [
        [None, None],
        [1, "a"],
        [1, None, "a"],
        [1, True],
        [1.5, True],
        [2**63],
        [2**53 + 1, 1.5],
        [[1], "a"],
        [{"a": 1}, {"a": "x"}],
        [[], []],
        [{"a": None}],
        [{}],
        [[{}]],
        [{LONE: 1}],
        [json.loads("[" * 40 + "1" + "]" * 40)],
        [{str(number): number} for number in range(1000)],
    ],
)
def test_values_without_a_common_type_become_json_text(values: list[Any]) -> None:
    assert infer(*values).metadata == LOOSE
    assert infer(*values).type == pa.string()
    if values != [{LONE: 1}]:
        assert [row.error for row in conform(loose("x"), *values)] == [None] * len(values)


def test_columns_stay_in_order_of_appearance_and_names_that_are_no_text_are_left_out() -> None:
    assert infer_schema([{"b": 1}, {"a": 1, LONE: 2, "b": 3}]).names == ["b", "a"]
    assert infer_schema([]).names == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int64(), 2.5),
        (pa.int64(), True),
        (pa.int64(), "1"),
        (pa.int64(), 2**63),
        (pa.int64(), 10**400),
        (pa.int64(), float("nan")),
        (pa.float64(), True),
        (pa.float64(), 2**53 + 1),
        (pa.bool_(), 1),
        (pa.string(), 5),
        (pa.string(), LONE),
        (pa.list_(pa.string()), "abc"),
        (pa.list_(pa.int64()), [2.5]),
        (pa.list_(pa.struct([("a", pa.int64())])), [[("a", 1)]]),
        (pa.list_(pa.struct([("a", pa.int64())])), "text"),
        (pa.struct([("a", pa.int64())]), {"a": "x"}),
        (pa.struct([("a", pa.float64())]), {"a": False}),
        (pa.timestamp("us"), "2020-01-01"),
        (loose("x"), LONE),
        (loose("x"), [LONE]),
        (loose("x"), json.loads("[" * 500 + "]" * 500)),
    ],
)
def test_a_value_that_does_not_fit_makes_an_error_row(kind: Any, value: Any) -> None:
    bad, good = conform(kind, value, None)
    assert bad.columns == {"x": None}
    assert bad.error is not None
    assert bad.error.startswith("column 'x' holds ")
    assert bad.error.isascii()
    assert bad.error.isprintable()
    assert len(bad.error) < 250
    assert good.error is None


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.int64(), 2.0),
        (pa.float64(), 2),
        (pa.float64(), float("nan")),
        (pa.int32(), 7),
        (pa.large_string(), "a"),
        (pa.struct([("a", pa.int64()), ("b", pa.int64())]), {"a": 1}),
        (pa.list_(pa.int64()), [None, 1]),
        (pa.map_(pa.string(), pa.int64()), [("a", 1)]),
        (loose("x"), {"any": ["thing", 1]}),
    ],
)
def test_a_value_that_fits_is_left_alone(kind: Any, value: Any) -> None:
    (row,) = conform(kind, value)
    assert row.error is None
    assert row.columns["x"] is value


def test_an_earlier_error_is_kept_and_a_missing_column_fits() -> None:
    schema = pa.schema([("x", pa.int64())])
    rows = [InputRow(0, "0", {"x": "a"}, error="first"), InputRow(1, "1", {}, error="bad line"), InputRow(2, "2", {})]
    Conformer(schema, ["x"]).check(rows)
    assert [row.error for row in rows] == ["first", "bad line", None]


def test_new_columns_and_keys_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    kind = pa.list_(pa.struct([("role", pa.string())]))
    conformer = Conformer(pa.schema([("messages", kind)]), ["messages"])
    rows = [InputRow(0, "0", {"messages": [{"role": "user", "name": "x"}], "late": 1, LONE: 2})]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            conformer.check(rows)
        for number in range(5000):
            conformer.check([InputRow(0, "0", {f"new{number}": 1})])
    assert "'late', 'messages.name'" in caplog.messages[0]
    assert len(caplog.messages) < 30
    assert rows[0].error is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
    | st.sampled_from([LONE, "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", LONE]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(sample=st.lists(json_values, max_size=4), later=st.lists(json_values, max_size=4))
def test_whatever_comes_the_columns_can_be_written(sample: list[Any], later: list[Any]) -> None:
    schema = settle(infer_schema([{"x": value} for value in sample] or [{"x": None}]))
    field = schema.field("x")
    rows = [InputRow(number, str(number), {"x": value}) for number, value in enumerate([*sample, *later])]
    Conformer(schema, ["x"]).check(rows)
    values = [row.columns["x"] for row in rows]
    array = pa.array([as_json_text(value) for value in values] if field.metadata == LOOSE else values, field.type)
    assert len(array) == len(rows)
    kept = [value for value, row in zip([*sample, *later], rows, strict=True) if row.error is None]
    assert all(value is None or type(value) is type(row.columns["x"])
               for value, row in zip(kept, [row for row in rows if row.error is None], strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (["1", None, "-20", "0"], pa.int64()),
        (["1", "007"], pa.string()),
        (["+1"], pa.string()),
        (["9" * 19], pa.string()),
        (["9" * 25], pa.string()),
        (["1.5", "2", None], pa.float64()),
        ([".5", "1e-3", "-2.", "inf", "nan", "-Inf"], pa.float64()),
        (["1.5", "01"], pa.string()),
        (["1.5", str(2**53 + 1)], pa.string()),
        (["1_000"], pa.string()),
        (["٣"], pa.string()),
        (["true", "FALSE"], pa.bool_()),
        (["true", "1"], pa.string()),
        (["a", "1"], pa.string()),
        ([None, None], pa.null()),
    ],
)
def test_csv_types(fields: list[str | None], kind: pa.DataType) -> None:
    assert infer_csv_schema([{"x": field} for field in fields], ()).field("x").type == kind
    assert infer_csv_schema([{"x": field} for field in fields], {"x"}).field("x").type == pa.string()


def test_csv_fields_are_parsed_or_left_as_they_are() -> None:
    assert [parse_field(text, pa.int64()) for text in ("1", " 007 ", "-5", "1.0", "x")] == [1, 7, -5, "1.0", "x"]
    assert [parse_field(text, pa.float64()) for text in ("1", "2.5e3", "x")] == [1.0, 2500.0, "x"]
    assert [parse_field(text, pa.bool_()) for text in ("true", "False", "0")] == [True, False, "0"]
    assert parse_field(" 1 ", pa.string()) == " 1 "


def test_short_is_one_ascii_line() -> None:
    for value in ("a\nb" * 100, LONE, ["x" * 100] * 50, 10**4000, {"ü": object()}):
        text = short(value)
        assert text.isascii()
        assert text.isprintable()
        assert len(text) <= 80
