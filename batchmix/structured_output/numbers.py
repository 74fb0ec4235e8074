"""JSON numbers between bounds, as patterns of their digits.

Integers have at most 18 digits, so they fit into int64. A number has at most 9 digits before the point and 6 after it,
so that a float64 tells apart what the digits do; without bounds it may have an exponent of up to two digits.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from batchmix.structured_output.pattern import (
    EMPTY,
    NEVER,
    Pattern,
    Unsupported,
    alt,
    chars,
    literal,
    optional,
    repeat,
    seq,
)

_INTEGER_DIGITS, _NUMBER_DIGITS, _FRACTION_DIGITS = 18, 9, 6


def _digit(low: int = 0, high: int = 9) -> Pattern:
    return chars([(48 + low, 48 + high)]) if low <= high else NEVER


def _digits(low: int, high: int | None = None) -> Pattern:
    return repeat(_digit(), low, low if high is None else high)


def _natural(digits: int) -> Pattern:
    """0 or up to so many digits, the first not 0."""
    return alt([_digit(0, 0), seq([_digit(1), _digits(0, digits - 1)])])


def any_integer() -> Pattern:
    """Any integer of JSON's of at most 18 digits."""
    return seq([optional(literal("-")), _natural(_INTEGER_DIGITS)])


def any_number() -> Pattern:
    """Any number of JSON's that a float64 holds."""
    fraction = optional(seq([literal("."), _digits(1, _FRACTION_DIGITS)]))
    sign = optional(chars([(43, 43), (45, 45)]))
    exponent = optional(seq([chars([(69, 69), (101, 101)]), sign, _digits(1, 2)]))
    return seq([optional(literal("-")), _natural(_NUMBER_DIGITS), fraction, exponent])


def integers_between(low: Decimal | None, high: Decimal | None) -> Pattern:
    """The integers from `low` to `high`, both included; None: no bound. NEVER where there is none."""
    limit = 10**_INTEGER_DIGITS - 1
    least = -limit if low is None else max(-limit, int(low.to_integral_value(ROUND_CEILING)))
    most = limit if high is None else min(limit, int(high.to_integral_value(ROUND_FLOOR)))
    if least > most:
        return NEVER
    found = []
    if least < 0:
        found.append(seq([literal("-"), _naturals_between(max(1, -most), -least)]))
    if most >= 0:
        found.append(_naturals_between(max(0, least), most))
    return alt(found)


def _naturals_between(low: int, high: int) -> Pattern:
    """0 <= low <= high, without leading zeros."""
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        parts.append(_same_length(str(first), str(last)))
    return alt(parts)


def _same_length(low: str, high: str) -> Pattern:
    """Digit strings of one length from `low` to `high`."""
    if not low:
        return EMPTY
    first, last = int(low[0]), int(high[0])
    rest = len(low) - 1
    if first == last:
        return seq([_digit(first, first), _same_length(low[1:], high[1:])])
    if set(low[1:]) <= {"0"}:
        first -= 1
    if set(high[1:]) <= {"9"}:
        last += 1
    parts: list[Pattern] = [seq([_digit(first + 1, last - 1), _digits(rest)])]
    if set(low[1:]) - {"0"}:
        parts.append(seq([_digit(first, first), _same_length(low[1:], "9" * rest)]))
    if set(high[1:]) - {"9"}:
        parts.append(seq([_digit(last, last), _same_length("0" * rest, high[1:])]))
    return alt(part for part in parts if part != NEVER)


def numbers_between(low: Decimal | None, open_low: bool, high: Decimal | None, open_high: bool) -> Pattern:
    """Decimal numbers without exponent between the bounds; an open bound is left out itself.

    Unsupported for bounds of more digits than a number has.
    """
    for bound in (low, high):
        if bound is not None and abs(bound) >= 10**_NUMBER_DIGITS:
            raise Unsupported(f"has the bound {bound}; those of numbers must be below 10^{_NUMBER_DIGITS}")
    found = [_positive(max(Decimal(0), low or Decimal(0)), open_low and low is not None and low >= 0, high, open_high)]
    if low is None or low < 0:  # mirrored
        above = None if low is None else -low
        below = Decimal(0) if high is None or high > 0 else -high
        negative = _positive(below, open_high and high is not None and high <= 0, above, open_low)
        found.append(seq([literal("-"), negative]))
    return alt(part for part in found if part != NEVER)


def _positive(low: Decimal, open_low: bool, high: Decimal | None, open_high: bool) -> Pattern:
    """low >= 0."""
    if high is None:
        high, open_high = Decimal(10**_NUMBER_DIGITS), True
    if high < low:
        return NEVER
    first, last = math.floor(low), math.floor(high)
    least, most = _fraction_digits(low - first), _fraction_digits(high - last)
    if first == last:
        return seq([_naturals_between(first, first), _fraction(least, open_low, most, open_high)])
    parts = [seq([_naturals_between(first, first), _fraction(least, open_low, None, False)])]
    if first + 1 <= last - 1:
        parts.append(seq([_naturals_between(first + 1, last - 1), _fraction(None, False, None, False)]))
    parts.append(seq([_naturals_between(last, last), _fraction(None, False, most, open_high)]))
    return alt(part for part in parts if part != NEVER)


def _fraction_digits(fraction: Decimal) -> str:
    """The digits behind the point of a number in [0, 1), without zeros at the end."""
    return format(fraction, "f").partition(".")[2].rstrip("0")


def _fraction(low: str | None, open_low: bool, high: str | None, open_high: bool) -> Pattern:
    """What may follow an integer part: nothing, or a point and digits between .low and .high (None: no bound)."""
    digits = _continuation(low, open_low, high, open_high, _FRACTION_DIGITS, False)
    parts = [EMPTY] if _holds_zero(low, open_low, high, open_high) else []
    return alt(parts if digits == NEVER else [*parts, seq([literal("."), digits])])


def _holds_zero(low: str | None, open_low: bool, high: str | None, open_high: bool) -> bool:
    return (low is None or (not low and not open_low)) and (high is None or bool(high) or not open_high)


def _continuation(
    low: str | None, open_low: bool, high: str | None, open_high: bool, room: int, may_end: bool
) -> Pattern:
    """Up to `room` digits of a fraction between .low and .high; none, which stands for 0, only where it `may_end`."""
    if low is None and high is None:
        return _digits(0 if may_end else 1, room)
    parts: list[Pattern] = [EMPTY] if may_end and _holds_zero(low, open_low, high, open_high) else []
    for digit in range(10 if room else 0):
        least = int(low[:1] or 0) if low is not None else 0
        most = 9 if high is None else int(high[:1] or 0)
        if least <= digit <= most:
            rest_low = low[1:] if low is not None and digit == least else None
            rest_high = high[1:] if high is not None and digit == most else None
            rest = _continuation(rest_low, open_low, rest_high, open_high, room - 1, True)
            if rest != NEVER:
                parts.append(seq([_digit(digit, digit), rest]))
    return alt(parts)
