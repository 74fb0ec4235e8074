"""Sets of characters that Unicode's properties name, of the version that Python has."""

from __future__ import annotations

import sys
import unicodedata
from functools import cache

from batchmix.structured_output.pattern import Range, Unsupported, complement

# https://tc39.es/ecma262/#table-unicode-general-category-values; the short names are unicodedata's.
_LONG = {
    "Letter": "L", "Cased_Letter": "LC", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Titlecase_Letter": "Lt",
    "Modifier_Letter": "Lm", "Other_Letter": "Lo", "Mark": "M", "Combining_Mark": "M", "Nonspacing_Mark": "Mn",
    "Spacing_Mark": "Mc", "Enclosing_Mark": "Me", "Number": "N", "Decimal_Number": "Nd", "digit": "Nd",
    "Letter_Number": "Nl", "Other_Number": "No", "Punctuation": "P", "punct": "P", "Connector_Punctuation": "Pc",
    "Dash_Punctuation": "Pd", "Open_Punctuation": "Ps", "Close_Punctuation": "Pe", "Initial_Punctuation": "Pi",
    "Final_Punctuation": "Pf", "Other_Punctuation": "Po", "Symbol": "S", "Math_Symbol": "Sm", "Currency_Symbol": "Sc",
    "Modifier_Symbol": "Sk", "Other_Symbol": "So", "Separator": "Z", "Space_Separator": "Zs", "Line_Separator": "Zl",
    "Paragraph_Separator": "Zp", "Control": "Cc", "cntrl": "Cc", "Format": "Cf", "Private_Use": "Co",
}  # fmt: skip
_SHORT = {*_LONG.values()}


@cache
def _by_category() -> dict[str, list[Range]]:
    found: dict[str, list[Range]] = {}
    start, current = 0, unicodedata.category("\0")
    for code in range(1, sys.maxunicode + 2):
        category = unicodedata.category(chr(code)) if code <= sys.maxunicode else ""
        if category != current:
            found.setdefault(current, []).append((start, code - 1))
            start, current = code, category
    return found


@cache
def assigned() -> tuple[Range, ...]:
    """The characters that have a meaning."""
    return tuple(complement(_by_category()["Cn"]))


@cache
def property_ranges(name: str) -> tuple[Range, ...]:
    """The characters of a property as `\\p{...}` names it. Unsupported for those that Python does not know."""
    if name == "Any":
        return ((0, sys.maxunicode),)
    if name == "ASCII":
        return ((0, 0x7F),)
    if name == "Assigned":
        return assigned()
    key, equals, value = name.partition("=")
    value = value if equals else key
    if equals and key not in ("General_Category", "gc"):
        raise Unsupported(f"has the property {name!r}; supported are general categories, as in \\p{{L}} and \\p{{Nd}}")
    short = _LONG.get(value, value)
    if short not in _SHORT:
        raise Unsupported(f"has the property {name!r}; supported are general categories, as in \\p{{L}} and \\p{{Nd}}")
    wanted = ("Lu", "Ll", "Lt") if short == "LC" else (short,)
    ranges = [one for category, ranges in _by_category().items() if category.startswith(wanted) for one in ranges]
    return tuple(sorted(ranges))
