"""What the keywords of a JSON Schema forbid, said in keywords."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batchmix.structured_output.json_values import type_of
from batchmix.structured_output.keywords import ONLY, TYPES, Negated


def forbidden_by_limits(words: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each keyword, what it forbids; nothing of those whose opposite no keyword says."""
    number, text, array, mapping = (ONLY[name] for name in ("number", "string", "array", "object"))
    if "type" in words:
        others = frozenset(TYPES) - words["type"]
        if others:
            yield {"type": others}
        if "integer" in words["type"]:
            yield {"type": number, "fraction": True}
    if "const" in words or "enum" in words:
        yield from _forbidden_by_constants([words["const"]] if "const" in words else words["enum"])
    for key, opposite in (("minimum", "exclusiveMaximum"), ("maximum", "exclusiveMinimum"),
                          ("exclusiveMinimum", "maximum"), ("exclusiveMaximum", "minimum")):  # fmt: skip
        if key in words:
            yield {"type": number, opposite: words[key]}
    for kind, suffix in ((text, "Length"), (array, "Items"), (mapping, "Properties")):
        if words.get(f"min{suffix}", 0) > 0:
            yield {"type": kind, f"max{suffix}": words[f"min{suffix}"] - 1}
        if f"max{suffix}" in words:
            yield {"type": kind, f"min{suffix}": words[f"max{suffix}"] + 1}
    if "pattern" in words:
        yield {"type": text, "notPattern": words["pattern"]}
    for name in words.get("required", ()):
        yield {"type": mapping, "properties": {name: False}}
    for name, one in words.get("properties", {}).items():
        if one is not True and one != {}:
            yield {"type": mapping, "required": [name], "properties": {name: Negated(one)}}
    for name, needed in words.get("dependentRequired", {}).items():
        for other in needed:
            yield {"type": mapping, "required": [name], "properties": {other: False}}
    first = words.get("prefixItems", [])
    for place, one in enumerate(first):
        yield {"type": array, "minItems": place + 1, "prefixItems": [True] * place + [Negated(one)]}
    if words.get("items", True) is not True:
        yield {
            "type": array,
            "minItems": len(first) + 1,
            "prefixItems": [True] * len(first) + [Negated(words["items"])],
        }
    if "contains" in words and words.get("minContains", 1) == 1:
        yield {"type": array, "items": Negated(words["contains"])}


def _forbidden_by_constants(values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    texts = [value for value in values if isinstance(value, str)]
    yield {"type": ONLY["string"], "notTexts": texts}
    present = {type_of(value) for value in values} - {"string"}
    others = frozenset(TYPES) - present - {"string"}
    if others:
        yield {"type": others}
    if "boolean" in present:
        rest = [value for value in (True, False) if not any(value is one for one in values)]
        if rest:
            yield {"enum": rest}
    numbers = sorted({value for value in values if isinstance(value, int | float) and not isinstance(value, bool)})
    for low, high in zip([None, *numbers], [*numbers, None], strict=True):
        if numbers:
            limits = {"exclusiveMinimum": low, "exclusiveMaximum": high}
            yield {"type": ONLY["number"], **{key: value for key, value in limits.items() if value is not None}}
