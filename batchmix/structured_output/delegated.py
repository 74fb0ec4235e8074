"""JSON Schemas that our compiler refuses for their size, said so that llguidance reads them as we would.

Only keywords that it keeps as the standard does are passed on. `pattern`, the names of `patternProperties` and formats are
written as our own regexes without classes that engines differ in, so that no pattern is read by another's rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from batchmix.structured_output.ecma_regex import found_pattern
from batchmix.structured_output.formats import FORMATS
from batchmix.structured_output.json_values import decimal, refusal
from batchmix.structured_output.keywords import KEYWORDS
from batchmix.structured_output.lark import regex_text
from batchmix.structured_output.numbers import closed_bound
from batchmix.structured_output.pattern import Unsupported
from batchmix.structured_output.references import References, draft_of

_AS_IT_IS = {"$ref", "const", "enum", "type", "required", "minItems", "maxItems", "maxProperties", "minLength", "maxLength",
             "multipleOf", "$schema"}  # fmt: skip
_SCHEMAS = {"items", "additionalItems", "additionalProperties"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_NAMED = {"properties", "$defs", "definitions"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_EXACT = 2**53  # whole numbers up to it are floats, which the library's bounds are
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_DEPTH = 64


def delegated_schema(schema: Any) -> str:
    """The schema for llguidance, as JSON. Unsupported, in one line, where it has what the library would read otherwise."""
    draft = draft_of(schema)
    references = References(schema, draft)
    if len({id(document) for document in references.documents.values()}) > 1:
        raise Unsupported("has parts with an $id")
    found = _written(schema, draft, "", 0)
    if not isinstance(found, dict):
        raise Unsupported("says nothing")
    found.setdefault("$schema", "https://json-schema.org/draft/2020-12/schema")
    return json.dumps(found | {"x-guidance": _SEPARATORS})


def _written(schema: Any, draft: int, path: str, depth: int) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        raise refusal(path, "is nested too deeply or no schema")
    found: dict[str, Any] = {}
    for key, value in schema.items():
        where = f"{path}/{key}"
        if key in _AS_IT_IS:
            found[key] = value
        elif key in _SCHEMAS and not isinstance(value, list):
            found[key] = _written(value, draft, where, depth + 1)
        elif key in _LISTS or (key == "items" and draft < 2020):
            found[key] = [_written(one, draft, where, depth + 1) for one in value]
        elif key in _NAMED:
            found[key] = {name: _written(one, draft, f"{where}/{name}", depth + 1) for name, one in value.items()}
        elif key == "patternProperties":
            found[key] = {_regex(name): _written(one, draft, where, depth + 1) for name, one in value.items()}
        elif key in _BOUNDS:
            _bound(found, key, value, where)
        elif key == "pattern":
            found[key] = _regex(value)
        elif key == "format" and value in FORMATS and "pattern" not in schema:
            found["pattern"] = _regex(f"^(?:{FORMATS[value]})$")
        elif key == "minProperties" and value in (0, 1):
            found[key] = value
        elif key in KEYWORDS and key != "format":
            raise refusal(path, f"has the keyword {key!r} besides")
        elif key == "format" and value in FORMATS:
            raise refusal(path, "has 'pattern' and 'format' at once besides")
    return found


def _regex(regex: Any) -> str:
    return f"^(?:{regex_text(found_pattern(regex))})$"


def _bound(found: dict[str, Any], key: str, value: Any, path: str) -> None:
    bound = decimal(value, path)
    if abs(bound) >= _EXACT:
        raise refusal(path, f"is {value}, which has too many digits besides")
    if key.startswith("exclusive") and bound:
        plain, step = (key.removeprefix("exclusive").lower(), 1 if key == "exclusiveMinimum" else -1)
        if plain in found:
            raise refusal(path, "stands beside another bound")
        found[plain] = _number(closed_bound(bound, step))
    elif key in found:
        raise refusal(path, "stands beside another bound")
    else:
        found[key] = value


def _number(value: Decimal) -> float | int:
    return int(value) if value == value.to_integral_value() else float(value)
