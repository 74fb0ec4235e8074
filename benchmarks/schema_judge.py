"""Whether a text is a valid instance of a JSON Schema: jsonschema, with ECMA-262's regexes and exact multiples."""

from __future__ import annotations

import json
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import jsonschema
from jsonschema import _keywords, _utils
from py_mini_racer import MiniRacer

_TEST = """
const known = new Map();
function found(regex, text) {
  let one = known.get(regex);
  if (one === undefined) {
    try { one = new RegExp(regex, "u") } catch (_) { try { one = new RegExp(regex) } catch (_) { one = null } }
    known.set(regex, one);
  }
  if (one === null || !one.unicode || !/[\\ud800-\\udbff]/.test(text)) return one === null ? null : one.test(text);
  // V8 also looks for a match between the two halves of a character, where ECMA-262 (AdvanceStringIndex) does not.
  const here = new RegExp(regex, "uy");
  for (let at = 0; at <= text.length; at += text.codePointAt(at) > 0xffff ? 2 : 1) {
    here.lastIndex = at;
    if (here.test(text)) return true;
  }
  return false;
}
"""


class Written(float):
    """A number with the text that it was written as."""

    text: str


def _number(text: str) -> Written:
    found = Written(text)
    found.text = text
    return found


def _multiple_of(validator: Any, step: Any, instance: Any, schema: Any) -> Any:
    if validator.is_type(instance, "number"):
        value = Fraction(getattr(instance, "text", None) or repr(instance))
        if value % Fraction(repr(step)):
            yield jsonschema.ValidationError(f"{instance} is not a multiple of {step}")


class Judge:
    """Valid or not, format included."""

    def __init__(self) -> None:
        self._engine = MiniRacer()
        self._engine.eval(_TEST)
        _keywords.re = _utils.re = SimpleNamespace(search=self.found)

    def found(self, regex: str, text: str) -> bool:
        """Whether JavaScript finds the regex in the text. ValueError where it has no such regex."""
        found = self._engine.call("found", regex, text)
        if found is None:
            raise ValueError(f"JavaScript has no such regex: {regex}")
        return bool(found)

    def validator(self, schema: Any) -> Any:
        """None where the schema is wrong itself, so that no text can be judged."""
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        if "$schema" not in schema and '"exclusiveM' in json.dumps(schema) if isinstance(schema, dict) else False:
            kind = kind if kind.META_SCHEMA and _valid(kind, schema) else jsonschema.Draft4Validator
        if not _valid(kind, schema):
            return None
        extended = jsonschema.validators.extend(kind, {"multipleOf": _multiple_of})
        return extended(schema, format_checker=kind.FORMAT_CHECKER)

    def is_valid(self, check: Any, text: str) -> bool:
        try:
            return bool(check.is_valid(json.loads(text, parse_float=_number)))
        except RecursionError:
            return True  # of the library
        except ValueError as error:
            return "JavaScript has no such regex" in str(error)
        except Exception as error:
            # A reference to another document.
            return "Unresolvable" in type(error).__name__ or "RefResolution" in type(error).__name__


def _valid(kind: Any, schema: Any) -> bool:
    try:
        kind.check_schema(schema, format_checker=jsonschema.FormatChecker([]))  # which would read regexes as Python's
    except Exception:  # SchemaError, or whatever jsonschema stumbles over in a schema that is none
        return False
    return True
