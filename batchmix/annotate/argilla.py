"""Argilla 2: a folder that `argilla.Dataset.from_disk` loads, and one that `to_disk` wrote read back.

The folder has `.argilla/settings.json`, `.argilla/dataset.json` and `records.json`, as argilla 2.8 writes them. A choice is a
label question, everything else a text question (numbers, lists and objects as JSON). Argilla allows lower-case names
only, so a field with another name has its place among the fields as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from batchmix.annotate.arrow_types import Field
from batchmix.annotate.corrections import Correction, Corrections, settle
from batchmix.annotate.review_item import ReviewItem, from_text, labels_of, to_text
from batchmix.errors import BatchmixError
from batchmix.storage import find_json, last_component, open_file, open_storage, write_json, written

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RECORDS = "records.json"
_GUIDELINES = "The model's answer is a suggestion. Submit each question with the right answer."


def write(path: str, items: Sequence[ReviewItem], fields: Sequence[Field], model: str) -> tuple[list[str], str]:
    """The folder `path` (review.path); returns what to do with it, and a place for people's answers."""
    storage = open_storage(path, "review.path")
    dataset = {"name": last_component(storage), "status": "draft", "allow_extra_metadata": True}
    with written(path, "review.path"):
        for name, is_ours in ((".argilla/settings.json", _is_our_settings), (_RECORDS, _are_our_records)):
            if storage.exists(name) and not is_ours(find_json(storage, name)):
                raise BatchmixError(
                    f"review.path={path}: {name} is there and is not as review export wrote it; give another folder"
                )
        storage.make_folder(".argilla")
        write_json(storage, ".argilla/settings.json", _settings(fields))
        write_json(storage, ".argilla/dataset.json", dataset)
        write_json(storage, _RECORDS, [_record(item, fields, model) for item in items])
    answers = f"{path.rstrip('/')}-answers"
    return [
        f'{len(items):,} records: argilla.Dataset.from_disk("{path}", workspace=...) makes a data set of them',
        f'when people are done, Dataset.to_disk("{answers}") and run',
    ], answers


def read(path: str, fields: Sequence[Field]) -> Corrections:
    """What people said, by row: of several, what most say. `path`: the folder, or its records.json."""
    folder = open_storage(path, "review.path")
    try:
        storage, file = (folder, _RECORDS) if folder.exists(_RECORDS) else open_file(path, "review.path")
        records = json.loads(storage.read(file).decode())
    except (OSError, ValueError) as error:
        raise BatchmixError(f"review.path={path}: cannot be read ({error})") from None
    questions = {_question_name(field, place): field for place, field in enumerate(fields)}
    found: Corrections = {}
    for number, record in enumerate(records if isinstance(records, list) else []):
        where = f"review.path={path}, record {number + 1}"
        metadata = record.get("metadata") or {}
        for name in ("row", "id"):
            if metadata.get(name) is None:
                raise BatchmixError(f"{where}: has no metadata.{name}, so it is none of what we made")
        values = {}
        for name, responses in (record.get("responses") or {}).items():
            if name not in questions:
                raise BatchmixError(f"{where}: {name} is no question of ours; those are {', '.join(questions)}")
            field = questions[name]
            said = [from_text(field, response["value"], where) for response in responses
                    if response.get("status") not in ("draft", "discarded")]  # fmt: skip
            if said:
                values[field.name] = settle(said)
        if values:
            found[int(metadata["row"])] = Correction(
                str(metadata["id"]), values, (record.get("fields") or {}).get("prompt")
            )
    return found


def _is_our_settings(settings: Any) -> bool:
    return isinstance(settings, dict) and settings.get("guidelines") == _GUIDELINES


def _are_our_records(records: Any) -> bool:
    """Whether they are records that nobody has answered."""
    return isinstance(records, list) and all(
        isinstance(record, dict)
        and not record.get("responses")
        and isinstance(record.get("metadata"), dict)
        and "row" in record["metadata"]
        for record in records
    )


def _question_name(field: Field, place: int) -> str:
    return field.name if _NAME.fullmatch(field.name) else f"field_{place}"


def _record(item: ReviewItem, fields: Sequence[Field], model: str) -> dict[str, Any]:
    return {
        "id": str(item.row),
        "fields": {"prompt": item.prompt, "answer": item.answer},
        "metadata": {"row": item.row, "id": item.id, "certainty": item.certainty},
        "suggestions": {
            _question_name(field, place): {
                "value": to_text(field, item.values[field.name]),
                "score": None,
                "agent": model,
            }
            for place, field in enumerate(fields)
            if field.name in item.values
        },
        "responses": {},
        "vectors": {},
    }


def _settings(fields: Sequence[Field]) -> dict[str, Any]:
    return {
        "guidelines": _GUIDELINES,
        "fields": [
            {"name": name, "title": name, "required": required, "type": "text", "settings": {"type": "text", "use_markdown": False}}
            for name, required in (("prompt", True), ("answer", False))
        ],
        "questions": [_question(field, place) for place, field in enumerate(fields)],
        "vectors": [],
        "metadata": [
            {"name": "row", "title": "row", "visible_for_annotators": True,
             "settings": {"type": "integer", "visible_for_annotators": True, "min": 0, "max": None}},
            {"name": "certainty", "title": "certainty", "visible_for_annotators": True,
             "settings": {"type": "float", "visible_for_annotators": True, "min": 0, "max": 1}},
        ],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }  # fmt: skip


def _question(field: Field, place: int) -> dict[str, Any]:
    labels = labels_of(field)
    # Argilla's label question needs two labels at least.
    if labels is not None and len(labels) > 1:
        options = [{"text": label, "value": label} for label in labels]
        kind: dict[str, Any] = {"type": "label_selection", "options": options, "visible_options": None}
    else:
        kind = {"type": "text", "use_markdown": False}
    name = _question_name(field, place)
    return {
        "name": name,
        "title": field.name,
        "description": None,
        "required": True,
        "type": kind["type"],
        "settings": kind,
    }
