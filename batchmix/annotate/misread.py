"""What a task file says but hardly means.

YAML takes some labels for something else than they seem to be: 010 is the number 8, yes is true. A loaded file no longer has their
text, so its nodes are looked at. What stands in quotes is a text, and fine. And a name in `required` may be a typo.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

import yaml

_INT, _BOOL, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("int", "bool", "float"))
# As 1e5: a number to OmegaConf, which reads task files, but not to PyYAML.
_POWER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


def misread_labels(text: str) -> str | None:
    """What is wrong with the labels of a task file in YAML, of `choice` and of any `enum` or `const` in `json_schema`."""
    task = _value(yaml.compose(text, yaml.SafeLoader), "annotate")
    choice = _value(task, "choice")
    for number, label in enumerate(choice.value if isinstance(choice, yaml.SequenceNode) else []):
        if isinstance(label, yaml.ScalarNode) and _becomes_another_text(label):
            meaning = float(label.value) if _is_power(label) else _meaning(label)
            return f"annotate.choice[{number}] is {meaning} to YAML, not a text; put quotes around yes, no, on, off and numbers"
    return _misread(_value(task, "json_schema"), "annotate.json_schema")


def misread_enum(text: str) -> str | None:
    """The same of a JSON Schema in a YAML file of its own."""
    return _misread(yaml.compose(text, yaml.SafeLoader), "")


def undeclared(schema: Any, where: str = "annotate.json_schema") -> Iterator[str]:
    """A line for each name in `required` that is none of the `properties` beside it."""
    if isinstance(schema, list):
        for number, item in enumerate(schema):
            yield from undeclared(item, f"{where}[{number}]")
    if not isinstance(schema, dict):
        return
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        for name in required:
            if name not in properties:
                near = difflib.get_close_matches(str(name), map(str, properties), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                yield f"{where}.required names {name!r}, which is none of its properties{hint}"
    for key, value in schema.items():
        if key not in ("enum", "const", "default", "examples"):
            yield from undeclared(value, f"{where}.{key}")


def _misread(schema: yaml.Node | None, where: str) -> str | None:
    """Booleans and numbers may be meant, where they are written as JSON has them."""
    for path, value in _allowed_values(schema, where, set()):
        if (value.tag == _BOOL and value.value.lower() not in ("true", "false")) or _is_another_number(value):
            return f"{path} is {_meaning(value)} to YAML, not the text {value.value!r}; put quotes around yes, no, on, off and numbers where texts are meant"
    return None


def _allowed_values(node: yaml.Node | None, where: str, seen: set[int]) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """The scalars of each `enum` and `const`, with their paths. An alias is looked at once."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _allowed_values(item, f"{where}[{number}]", seen)
        return
    for key, value in node.value:
        path = f"{where}.{key.value}" if where else str(key.value)
        if key.value == "enum" and isinstance(value, yaml.SequenceNode):
            for number, item in enumerate(value.value):
                if isinstance(item, yaml.ScalarNode):
                    yield f"{path}[{number}]", item
        elif key.value == "const" and isinstance(value, yaml.ScalarNode):
            yield path, value
        else:
            yield from _allowed_values(value, path, seen)


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in reversed(pairs) if name.value == key), None)


def _becomes_another_text(label: yaml.ScalarNode) -> bool:
    return label.tag in (_BOOL, _FLOAT) or _is_another_number(label) or _is_power(label)


def _is_power(node: yaml.ScalarNode) -> bool:
    return node.style is None and _POWER.fullmatch(node.value) is not None


def _is_another_number(node: yaml.ScalarNode) -> bool:
    """Whether it is an integer of another text: octal as 010 and 0o10, 0x10, 1_000, or 1:30, which is 90."""
    return bool(node.tag == _INT and node.value != str(_meaning(node)))


def _meaning(node: yaml.ScalarNode) -> object:
    return yaml.constructor.SafeConstructor().construct_object(node)
