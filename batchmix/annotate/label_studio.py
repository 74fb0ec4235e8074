"""Label Studio: tasks with predictions to import, the labelling interface for them, and its JSON export read back.

Formats: https://labelstud.io/grammar/predictions and https://labelstud.io/grammar/task_format. A choice is a `Choices` control, a
number a `Number`, everything else a `TextArea` (lists and objects as JSON).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import pyarrow as pa

from batchmix.annotate.arrow_types import Field, without_null
from batchmix.annotate.corrections import Correction, Corrections, settle
from batchmix.annotate.review_item import ReviewItem, from_text, labels_of, to_text
from batchmix.errors import BatchmixError
from batchmix.storage import find_json, open_file, write_json, write_text, written

_MOST_BUTTONS = 20  # labels; more of them are a menu
_SHOWN = "prompt_text"  # name of the object that the controls belong to
_TEXT = f'<Text name="{_SHOWN}" value="$prompt"/>'


def write(path: str, items: Sequence[ReviewItem], fields: Sequence[Field], model: str) -> tuple[list[str], str]:
    """The tasks at `path` (review.path), the interface beside it; returns what to do with them, and a place for the answers."""
    with written(path, "review.path"):
        storage, name = open_file(path, "review.path")
        interface = f"{os.path.splitext(name)[0]}.xml"
        if interface == name:
            raise BatchmixError(
                f"review.path={path}: {name} is the labelling interface's; give a name that ends in .json"
            )
        if storage.exists(name) and not _is_ours(find_json(storage, name)):
            raise BatchmixError(f"review.path={path}: is there and was not written by review export; give another name")
        if storage.exists(interface) and _TEXT.encode() not in storage.read(interface):
            raise BatchmixError(
                f"review.path={path}: {interface} beside it is there and was not written by review export; give another name"
            )
        storage.make_folder()
        write_json(storage, name, [_task(item, fields, model) for item in items])
        write_text(storage, interface, _interface(fields))
    stem = os.path.splitext(path)[0]
    answers = f"{stem}-answers.json"
    return [
        f"{len(items):,} tasks: import {path} into a project whose labelling interface is {stem}.xml",
        f"when people are done, export as JSON to {answers} and run",
    ], answers


def read(path: str, fields: Sequence[Field]) -> Corrections:
    """What people said, by row: of several, what most say."""
    storage, file = open_file(path, "review.path")
    try:
        tasks = json.loads(storage.read(file).decode())
    except (OSError, ValueError) as error:
        raise BatchmixError(f"review.path={path}: cannot be read ({error})") from None
    found: Corrections = {}
    for number, task in enumerate(tasks if isinstance(tasks, list) else [tasks]):
        where = f"review.path={path}, task {number + 1}"
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict) or "annotations" not in task or not str(data.get("row")).isdecimal():
            raise BatchmixError(f"{where}: is no task of Label Studio's JSON export (not JSON-MIN) of what we made")
        if data.get("id") is None:
            raise BatchmixError(
                f"{where}: has no data.id, which tells whether row {data['row']} is the same row in the run"
            )
        said = [_values(annotation, fields, where) for annotation in _annotations(task, where)]
        names = list(dict.fromkeys(name for values in said for name in values))
        if names:
            found[int(data["row"])] = Correction(
                str(data["id"]),
                {name: settle(values[name] for values in said if name in values) for name in names},
                data.get("prompt"),
            )
    return found


def _is_ours(tasks: Any) -> bool:
    """Whether a file holds tasks that nobody has answered: an export of Label Studio has annotations in each."""
    return isinstance(tasks, list) and all(
        isinstance(task, dict)
        and task.keys() == {"data", "predictions"}
        and isinstance(task["data"], dict)
        and "row" in task["data"]
        for task in tasks
    )


def _task(item: ReviewItem, fields: Sequence[Field], model: str) -> dict[str, Any]:
    result: list[dict[str, Any]] = []
    for field in fields:
        if field.name in item.values:
            kind, value = _value(field, item.values[field.name])
            result.append({"id": f"{item.row}-{len(result)}", "from_name": field.name, "to_name": _SHOWN, "type": kind,
                           "value": value})  # fmt: skip
    return {
        "data": {"row": item.row, "id": item.id, "prompt": item.prompt, "answer": item.answer},
        "predictions": [{"model_version": model, "score": item.certainty, "result": result}],
    }


def _value(field: Field, value: Any) -> tuple[str, dict[str, Any]]:
    if labels_of(field) is not None:
        return "choices", {"choices": [to_text(field, value)]}
    if field.type in (pa.int64(), pa.float64()):
        return "number", {"number": value}
    return "textarea", {"text": [to_text(field, value)]}


def _annotations(task: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Those that people submitted; a task that nobody has seen may have null in their place."""
    given = task["annotations"] or []
    if not isinstance(given, list) or not all(isinstance(annotation, dict) for annotation in given):
        raise BatchmixError(f"{where}: annotations is no list of objects")
    return [annotation for annotation in given if not annotation.get("was_cancelled")]


def _values(annotation: dict[str, Any], fields: Sequence[Field], where: str) -> dict[str, Any]:
    """One person's answers; what was left without a choice, a text or a number is none."""
    known = {field.name: field for field in fields}
    found = {}
    results = annotation.get("result") or []
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise BatchmixError(f"{where}: result is no list of objects")
    for result in results:
        field = known.get(str(result.get("from_name")))
        if field is None:
            raise BatchmixError(
                f"{where}: {result.get('from_name')} is no field of the answers; those are {', '.join(known)}"
            )
        text = _text(result.get("value") or {}, where)
        if text is not None:
            found[field.name] = from_text(field, text, where)
    return found


def _text(value: Any, where: str) -> str | None:
    """What a control holds; None where it was left empty."""
    given = next((value[kind] for kind in ("choices", "number", "text") if kind in value), None)
    if given is None or given == []:
        return None
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        return given[0] if "choices" in value else "\n".join(given)
    if isinstance(given, str | int | float):
        return given if isinstance(given, str) else json.dumps(given)
    raise BatchmixError(f"{where}: {json.dumps(value)[:80]} is no choice, number or text")


def _interface(fields: Sequence[Field]) -> str:
    lines = [
        "<View>",
        '  <Header value="Prompt"/>',
        f"  {_TEXT}",
        '  <Header value="Answer of the model"/>',
        '  <Text name="answer_text" value="$answer"/>',
    ]
    for field in fields:
        name = quoteattr(field.name)
        lines.append(f"  <Header value={name}/>")
        labels = labels_of(field)
        if labels is not None:
            layout = ' layout="select"' if len(labels) > _MOST_BUTTONS else ""
            lines.append(f'  <Choices name={name} toName="{_SHOWN}" choice="single"{layout}>')
            lines += [f"    <Choice value={quoteattr(label)}/>" for label in labels]
            lines.append("  </Choices>")
        elif field.type in (pa.int64(), pa.float64()):
            lines.append(f'  <Number name={name} toName="{_SHOWN}"{_limits(field)}/>')
        else:
            lines.append(f'  <TextArea name={name} toName="{_SHOWN}" editable="true" maxSubmissions="1" rows="4"/>')
    return "\n".join([*lines, "</View>", ""])


def _limits(field: Field) -> str:
    """The attributes of a `Number` that keep people within the schema, as far as it has such."""
    schema = without_null(field.schema, field.root) or {}
    whole = field.type == pa.int64()
    values = [
        value for value in schema.get("enum", [schema["const"]] if "const" in schema else []) if value is not None
    ]
    low, high = _number(schema, "minimum"), _number(schema, "maximum")
    if whole:  # bounds that are no whole numbers are those of the whole numbers between them
        above, below = _number(schema, "exclusiveMinimum"), _number(schema, "exclusiveMaximum")
        lows = [math.ceil(low)] if low is not None else []
        lows += [math.floor(above) + 1] if above is not None else []
        highs = [math.floor(high)] if high is not None else []
        highs += [math.ceil(below) - 1] if below is not None else []
        low, high = max(lows, default=None), min(highs, default=None)
    if values:
        low, high = min(values), max(values)
    step = schema.get("multipleOf", 1 if whole else None)
    given = {"min": low, "max": high, "step": step}
    return "".join(f' {name}="{json.dumps(value)}"' for name, value in given.items() if value is not None)


def _number(schema: Mapping[str, Any], key: str) -> float | None:
    """None too where the key is a boolean, as exclusiveMinimum is in old drafts."""
    value = schema.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
