"""Random regexes, JSON Schemas and vocabularies."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

_ATOMS = ["a", "b", "é", "ab", ".", "[a-c]", "[^ab]", r"\d", r"\w", "[é日]", r"[\w-]", '"', "x"]


def combined(inner: st.SearchStrategy[str], *more: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Regexes of regexes: one behind the other, choices, repeats, and `more`."""
    group = inner.map(lambda text: f"(?:{text})")
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(group, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}"])).map("".join),
        *more,
    )


REGEXES = st.recursive(
    st.sampled_from(_ATOMS), lambda inner: combined(inner, inner.map(lambda text: f"(?i:{text})")), max_leaves=6
)
TEXTS = st.text(st.sampled_from(list('abcABCx é日É1٣_-"\n')), max_size=6)

_NUMBERS = st.one_of(st.integers(-200, 200), st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3)))


def _bounded(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    return st.fixed_dictionaries({"type": st.just(kind)}, optional=dict.fromkeys(keys, _NUMBERS))


_CONSTANTS = st.one_of(st.none(), st.booleans(), st.integers(-9, 99), st.text(st.characters(codec="utf-8"), max_size=4))
_STRINGS = st.one_of(
    st.just({"type": "string"}),
    st.tuples(st.integers(0, 3), st.integers(3, 8)).map(
        lambda limits: {"type": "string", "minLength": limits[0], "maxLength": limits[1]}
    ),
    st.sampled_from(["^[A-Z]{2,4}$", "ab|c", r"^\d+\\?$", '^"', "é.?$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"]).map(
        lambda name: {"type": "string", "format": name}
    ),
)
_LEAVES = st.one_of(
    _STRINGS,
    _bounded("integer"),
    _bounded("number"),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
    st.lists(_CONSTANTS, min_size=1, max_size=4, unique_by=repr).map(lambda values: {"enum": values}),
    _CONSTANTS.map(lambda value: {"const": value}),
)


def _nest(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "topic", 'q"\\', "日本", "is urgent"])

    def arrays(parts: tuple[dict[str, Any], int, int]) -> dict[str, Any]:
        return {"type": "array", "items": parts[0], "minItems": parts[1], "maxItems": parts[1] + parts[2]}

    def objects(parts: tuple[dict[str, Any], list[bool], bool]) -> dict[str, Any]:
        properties, needed, closed = parts
        required = [name for name, wanted in zip(properties, needed, strict=False) if wanted]
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        return {**schema, "additionalProperties": False} if closed else schema

    return st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(arrays),
        st.lists(inner, min_size=1, max_size=2).map(lambda first: {"type": "array", "prefixItems": first, "items": False}),
        st.tuples(
            st.dictionaries(names, inner, min_size=1, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4),
            st.booleans(),
        ).map(objects),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        inner.map(lambda value: {"type": "object", "additionalProperties": value}),
    )  # fmt: skip


_PLAIN = st.recursive(_LEAVES, _nest, max_leaves=5)
SCHEMAS = st.one_of(_PLAIN, _PLAIN.map(lambda target: {"$defs": {"x": target}, "$ref": "#/$defs/x"}))


def _recursive(parts: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Two schemas that lead to each other, the first from the second through a member that may be left out."""
    first, second = parts
    back = {"type": "array", "items": {"$ref": "#/$defs/first"}, "maxItems": 2}
    definitions = {
        "first": {
            "type": "object",
            "properties": {"leaf": first, "second": {"$ref": "#/$defs/second"}},
            "required": ["leaf"],
        },
        "second": {"anyOf": [second, back, {"type": "object", "additionalProperties": {"$ref": "#/$defs/second"}}]},
    }
    return {"$defs": definitions, "$ref": "#/$defs/first"}


RECURSIVE = st.one_of(st.tuples(_PLAIN, _PLAIN).map(_recursive), st.sampled_from([{}, {"type": ["object", "array"]}]))
