"""People's answers, a JSON line a row: `{"row": 7, "id": "t7", "values": {"sentiment": "negative"}}`.

`batchmix review import` writes the file and `batchmix export` puts its values in the place of the model's. Both refuse a row whose
id in the run is another: the answers are of a run on other data, or on the same data in another order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchmix.annotate.arrow_types import Field, resolve
from batchmix.annotate.columns import INVALID
from batchmix.annotate.results import Results
from batchmix.errors import BatchmixError
from batchmix.storage import open_file, written

REVIEWED = "reviewed"  # column: a person's answer stands here


@dataclass(frozen=True)
class Correction:
    """What people said of a row. `id` is the row's own; None in files of earlier releases. `prompt` is what they read, which the
    file does not have."""

    id: str | None
    values: dict[str, Any]
    prompt: str | None = None


Corrections = dict[int, Correction]


def write_corrections(path: str, corrections: Corrections) -> None:
    """`path`: review.corrections, of this machine or in an object store."""
    lines = [
        json.dumps({"row": row, "id": corrections[row].id, "values": corrections[row].values}, ensure_ascii=False)
        for row in sorted(corrections)
    ]
    with written(path, "review.corrections"):
        storage, name = open_file(path, "review.corrections")
        if storage.exists(name) and not _is_ours(storage.read(name)):
            raise BatchmixError(
                f"review.corrections={path}: is there and is no file of corrections; give another name, or delete it"
            )
        storage.replace(name, lambda file: file.writelines(line.encode() + b"\n" for line in lines))


def read_corrections(path: str, fields: Sequence[Field]) -> Corrections:
    """BatchmixError where the file is none of ours, or a value does not fit its field."""
    found: Corrections = {}
    known = {field.name: field for field in fields}
    storage, file = open_file(path, "export.corrections")
    try:
        lines = _lines(storage.read(file))
    except (OSError, ValueError) as error:
        raise BatchmixError(f"export.corrections={path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        where = f"export.corrections={path}, line {number}"
        try:
            row, correction = _entry(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BatchmixError(f'{where}: must be {{"row": number, "values": {{field: value}}}}') from None
        for name, value in correction.values.items():
            if name not in known:
                raise BatchmixError(f"{where}: {name} is no field of the answers; those are {', '.join(known)}")
            check_value(known[name], value, where)
        found[row] = correction
    return found


def _lines(data: bytes) -> list[str]:
    """Those that are not blank."""
    return [line for line in data.decode().split("\n") if line.strip()]  # splitlines ends one at more characters


def _entry(line: str) -> tuple[int, Correction]:
    """ValueError, KeyError, TypeError or AttributeError where the line is no correction."""
    entry = json.loads(line)
    id = entry.get("id")
    return int(entry["row"]), Correction(None if id is None else str(id), dict(entry["values"]))


def _is_ours(data: bytes) -> bool:
    try:
        return all(_entry(line) for line in _lines(data))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def of_run(corrections: Corrections, results: Results, where: str) -> Corrections:
    """Those of rows that the run has. BatchmixError where a row's id in the run is another."""
    found: Corrections = {}
    others: list[str] = []
    wanted = pa.array(list(corrections), pa.int64())
    for table in results.batches(["row", "id"]):
        for record in table.filter(pc.is_in(table["row"], value_set=wanted)).to_pylist():
            row, given = record["row"], corrections[record["row"]]
            found[row] = given
            if given.id is not None and given.id != record["id"]:
                others.append(f"row {row} is {given.id!r} there and {record['id']!r} in the run")
    if others:
        raise BatchmixError(
            f"{where}: {len(others):,} of {len(corrections):,} rows have another id in output.dir={results.url}"
            f" ({others[0]}); give the output.dir that the review was exported from"
        )
    return found


def check_value(field: Field, value: Any, where: str) -> Any:
    """The value; BatchmixError where the field's column cannot hold it, or its schema does not allow it."""
    try:
        if field.type == pa.bool_() and not isinstance(value, bool | None):
            raise ValueError
        field.column([value])
    except (KeyError, ValueError, TypeError, OverflowError, pa.ArrowException):
        wanted = f"one of {', '.join(field.labels)}" if field.labels is not None else str(field.type)
        raise BatchmixError(f"{where}: {field.name}={value!r} must be {wanted}") from None
    if field.schema is not None and not (value is None and _may_be_left_out(field)):
        import jsonschema  # there where a task has a schema

        kind = jsonschema.validators.validator_for(field.root, default=jsonschema.Draft202012Validator)
        misfit = next(kind(field.root).evolve(schema=field.schema).iter_errors(value), None)
        if misfit is not None:
            reason = " ".join(misfit.message.split())
            raise BatchmixError(f"{where}: {field.name}={value!r} does not fit the schema: {reason}")
    return value


def _may_be_left_out(field: Field) -> bool:
    return field.name not in (resolve(field.root, field.root) or {}).get("required", ())


def settle(values: Iterable[Any]) -> Any:
    """What most people say; of equals, the first to say it."""
    given = list(values)
    texts = [json.dumps(value, sort_keys=True) for value in given]
    return given[texts.index(Counter(texts).most_common(1)[0][0])]


def corrected(table: pa.Table, corrections: Corrections, fields: Sequence[Field]) -> pa.Table:
    """The records with people's answers in the place of the model's, and the column `reviewed`."""
    rows = table["row"].to_pylist()
    said: list[Mapping[str, Any]] = [corrections[row].values if row in corrections else {} for row in rows]
    for field in fields:
        if any(field.name in own for own in said):
            values = table[field.name].to_pylist()
            if field.as_json:
                values = [None if value is None else json.loads(value) for value in values]
            values = [own.get(field.name, value) for own, value in zip(said, values, strict=True)]
            table = table.set_column(table.schema.get_field_index(field.name), field.arrow, field.column(values))
    names = {field.name for field in fields}
    whole = [own.keys() >= names for own in said]
    if any(whole):
        reasons = [
            None if done else reason for done, reason in zip(whole, table[INVALID.name].to_pylist(), strict=True)
        ]
        table = table.set_column(
            table.schema.get_field_index(INVALID.name), INVALID.arrow, pa.array(reasons, pa.string())
        )
    return table.append_column(REVIEWED, pa.array([row in corrections for row in rows], pa.bool_()))
