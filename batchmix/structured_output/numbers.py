"""JSON numbers between bounds, as patterns of their digits: any number of digits, bounds of any size.

An exponent has up to three digits, the first of three 1 or 2, so that a float64 holds the value; between bounds, what has one
begins with one digit that is not 0 (`1.5e-7`). Near a bound that is excluded, numbers keep a distance of one in the 15th
digit: a float64 tells apart what 15 digits do (C's DBL_DIG), and validators compare floats.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import cache, lru_cache

from batchmix.structured_output.dfa import both
from batchmix.structured_output.pattern import (
    EMPTY,
    NEVER,
    Pattern,
    Unsupported,
    alt,
    chars,
    graph,
    literal,
    optional,
    repeat,
    seq,
)

_FLOAT_DIGITS = 15
_MAX_EXPONENT = 299
_MAX_DIGITS = 1_000  # of a bound
_LONG = 40  # digits of an integer below a bound that has more
_MAX_RESIDUES = 1_000  # states of the multiples of a number
_EXACT = Context(prec=_MAX_DIGITS + 50, Emax=10**6, Emin=-(10**6))


@lru_cache(maxsize=128)
def _digit(low: int = 0, high: int = 9) -> Pattern:
    return chars([(48 + low, 48 + high)]) if low <= high else NEVER


_ANY_DIGITS = repeat(_digit(), 0, None)
_SOME_DIGITS = repeat(_digit(), 1, None)
_NATURAL = alt([_digit(0, 0), seq([_digit(1), _ANY_DIGITS])])
_FRACTION = optional(seq([literal("."), _SOME_DIGITS]))
_NOT_ZEROS = seq([repeat(_digit(0, 0), 0, None), _digit(1), _ANY_DIGITS])  # digits that are not all 0
_MINUS = literal("-")


def _either(parts: list[Pattern]) -> Pattern:
    return alt([part for part in parts if part != NEVER])


@cache
def _exponent(low: int = -_MAX_EXPONENT, high: int = _MAX_EXPONENT) -> Pattern:
    """`e` and a number from low to high, as it may be written: e5, E+05, e-7."""
    low, high = max(low, -_MAX_EXPONENT), min(high, _MAX_EXPONENT)
    if low > high:
        return NEVER
    zero = optional(_digit(0, 0))
    found = []
    if high >= 0:
        found.append(seq([optional(literal("+")), zero, _naturals(max(low, 0), high)]))
    if low < 0:
        found.append(seq([_MINUS, zero, _naturals(max(1, -high), -low)]))
    return seq([chars([(69, 69), (101, 101)]), alt(found)])


@cache
def any_integer() -> Pattern:
    """Any integer of JSON's."""
    return seq([optional(_MINUS), _NATURAL])


@cache
def any_number() -> Pattern:
    """Any number of JSON's."""
    return seq([optional(_MINUS), _NATURAL, _FRACTION, optional(_exponent())])


@cache
def any_fraction() -> Pattern:
    """Numbers that are no integers, with so few digits that they are none as floats."""
    whole = alt([_digit(0, 0), seq([_digit(1), repeat(_digit(), 0, 8)])])
    digits = both([_NOT_ZEROS, repeat(_digit(), 1, 6)])
    return seq([optional(_MINUS), whole, literal("."), digits])


@lru_cache(maxsize=1024)
def integers_between(low: Decimal | None, open_low: bool, high: Decimal | None, open_high: bool) -> Pattern:
    """The integers from `low` to `high`; None: no bound. NEVER where there is none."""
    _check(low, high)
    least = most = None
    if low is not None:  # above 2 is from 3 on, above 2.5 too
        least = int(low.to_integral_value(ROUND_FLOOR)) + 1 if open_low else int(low.to_integral_value(ROUND_CEILING))
    if high is not None:
        most = int(high.to_integral_value(ROUND_CEILING)) - 1 if open_high else int(high.to_integral_value(ROUND_FLOOR))
    if least is not None and most is not None and least > most:
        return NEVER
    found = []
    if least is None or least < 0:
        negative = _naturals(1 if most is None or most >= 0 else -most, None if least is None else -least)
        found.append(seq([_MINUS, negative]))
    if most is None or most >= 0:
        found.append(_naturals(max(0, least or 0), most))
    return _either(found)


def _check(*values: Decimal | None) -> None:
    for value in values:
        if (
            value is not None
            and value
            and (abs(value.adjusted()) > _MAX_DIGITS or len(value.as_tuple().digits) > _MAX_DIGITS)
        ):
            raise Unsupported(f"has a bound of more than {_MAX_DIGITS:,} digits")


def _naturals(low: int, high: int | None) -> Pattern:
    """low <= n <= high, without leading zeros; NEVER where there is none."""
    if high is None:
        longer = seq([_digit(1), repeat(_digit(), len(str(low)), None)])
        same = _same_length(str(low), "9" * len(str(low)))
        return alt([same, longer])
    parts = []
    if high >= 10**_LONG and low < 10 ** (_LONG - 1):  # longer ones are written with an exponent
        return alt([_naturals(low, 10 ** (_LONG - 1) - 1), seq([_digit(1), repeat(_digit(), _LONG - 1, _LONG - 1)])])
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        if first <= last:
            parts.append(_same_length(str(first), str(last)))
    return _either(parts)


def _same_length(low: str, high: str) -> Pattern:
    """Digit strings of one length from `low` to `high`."""
    common = next((i for i in range(len(low)) if low[i] != high[i]), len(low))
    head = literal(low[:common])
    if common == len(low):
        return head
    at_least, at_most = EMPTY, EMPTY  # of the digits behind place i
    for i in range(len(low) - 1, common, -1):
        rest = repeat(_digit(), len(low) - 1 - i, len(low) - 1 - i)
        a, b = int(low[i]), int(high[i])
        at_least = _either([seq([_digit(a, a), at_least]), seq([_digit(a + 1), rest])])
        at_most = _either([seq([_digit(b, b), at_most]), seq([_digit(0, b - 1), rest])])
    a, b = int(low[common]), int(high[common])
    rest = repeat(_digit(), len(low) - 1 - common, len(low) - 1 - common)
    middle = seq([_digit(a + 1, b - 1), rest])
    return seq([head, _either([seq([_digit(a, a), at_least]), middle, seq([_digit(b, b), at_most])])])


@lru_cache(maxsize=1024)
def numbers_between(low: Decimal | None, open_low: bool, high: Decimal | None, open_high: bool) -> Pattern:
    """The numbers between the bounds; an open bound is left out itself. NEVER where there is none."""
    _check(low, high)
    if low is not None and high is not None and (low > high or (low == high and (open_low or open_high))):
        return NEVER
    low, open_low = _closed(low, open_low, 1)
    high, open_high = _closed(high, open_high, -1)
    found = []
    if high is None or high >= 0:
        reaches_zero = low is None or low <= 0
        found.append(
            _positive(Decimal(0) if reaches_zero or low is None else low, open_low and low == 0, high, open_high)
        )
    if low is None or low < 0:  # mirrored
        below = Decimal(0) if high is None or high > 0 else -high
        found.append(seq([_MINUS, _positive(below, open_high and high == 0, None if low is None else -low, open_low)]))
    return _either(found)


def _closed(bound: Decimal | None, is_open: bool, step: int) -> tuple[Decimal | None, bool]:
    """An open bound as a closed one at a distance that floats tell apart; one of 0, which they do, stays open."""
    if bound is None or not is_open or not bound:
        return bound, is_open
    return closed_bound(bound, step), False


def closed_bound(bound: Decimal, step: int) -> Decimal:
    """The number next to a bound that is not 0, upwards for a `step` of 1 and downwards for -1, which floats tell from it."""
    return _EXACT.add(bound, step * Decimal(1).scaleb(bound.adjusted() - _FLOAT_DIGITS + 1, _EXACT))


def _positive(low: Decimal, open_low: bool, high: Decimal | None, open_high: bool) -> Pattern:
    """0 <= low; only zero is an open bound."""
    if high is not None and (high < low or (open_low and not high) or (open_high and not high)):
        return NEVER
    if not low and high is None:
        if not open_low:
            return seq([_NATURAL, _FRACTION, optional(_exponent())])
        mantissa = alt([seq([_digit(0, 0), literal("."), _NOT_ZEROS]), seq([_digit(1), _ANY_DIGITS, _FRACTION])])
        return seq([mantissa, optional(_exponent())])
    return _either([_decimals(low, open_low, high), _scientific(low, high)])


def _decimals(low: Decimal, open_low: bool, high: Decimal | None) -> Pattern:
    """Without exponent."""
    first, last = _whole(low), None if high is None else _whole(high)
    least, most = _fraction_digits(low), None if high is None else _fraction_digits(high)
    if first == last:
        return seq([_naturals(first, first), _fraction(least, open_low, most)])
    parts = [seq([_naturals(first, first), _fraction(least, open_low, None)])]
    if last is None or first + 1 <= last - 1:
        parts.append(seq([_naturals(first + 1, None if last is None else last - 1), _FRACTION]))
    if last is not None:
        parts.append(seq([_naturals(last, last), _fraction(None, False, most)]))
    return _either(parts)


def _scientific(low: Decimal, high: Decimal | None) -> Pattern:
    """One digit that is not 0, perhaps a fraction, and an exponent."""
    least = low.adjusted() if low else -_MAX_EXPONENT - 1
    most = high.adjusted() if high else _MAX_EXPONENT + 1
    if high is not None and not high:
        return NEVER
    found = [seq([_digit(1), _FRACTION, _exponent(least + 1, most - 1)])]
    one = Decimal(1)
    at_least = low.scaleb(-least, _EXACT) if low else one
    at_most = high.scaleb(-most, _EXACT) if high else None
    if least == most and high is not None:
        assert at_most is not None
        found.append(seq([_decimals(at_least, False, at_most), _exponent(least, least)]))
    else:
        if low:
            found.append(seq([_digits_from(at_least), _exponent(least, least)]))
        if at_most is not None:
            found.append(seq([_decimals(one, False, at_most), _exponent(most, most)]))
    return _either(found)


def _digits_from(low: Decimal) -> Pattern:
    """From 1 <= low < 10 up to below 10."""
    first = _whole(low)
    return _either([
        seq([_digit(first, first), _fraction(_fraction_digits(low), False, None)]), seq([_digit(first + 1), _FRACTION]),
    ])  # fmt: skip


def _whole(value: Decimal) -> int:
    return int(value.to_integral_value(ROUND_FLOOR))


def _fraction_digits(value: Decimal) -> str:
    """The digits behind the point, without zeros at the end."""
    return format(value, "f").partition(".")[2].rstrip("0")


def _fraction(low: str | None, open_low: bool, high: str | None) -> Pattern:
    """What may follow an integer part: nothing, or a point and digits between .low and .high (None: no bound).

    `open_low` is for .low of 0 only.
    """
    if low is not None and high is not None and low > high:  # without zeros at their ends
        return NEVER
    zero = (not low and not open_low) if low is not None else True
    if low == "" and not open_low:
        low = None
    if low is None and high is None:
        return _FRACTION
    digits = _NOT_ZEROS if low == "" and high is None else _between(low, high)
    return _either([EMPTY, seq([literal("."), digits])] if zero else [seq([literal("."), digits])])


def _between(low: str | None, high: str | None) -> Pattern:
    """Digits, at least one, of a fraction from .low (above 0 where that is empty, no bound where None) to .high."""
    parts = []
    if low is not None:
        parts.append(_NOT_ZEROS if not low else _at_least(low))
    if high is not None:
        parts.append(_at_most(high))
    return both([*parts, _SOME_DIGITS])


def _at_least(low: str) -> Pattern:
    rest = _ANY_DIGITS
    for digit in map(int, reversed(low)):
        rest = _either([seq([_digit(digit, digit), rest]), seq([_digit(digit + 1), _ANY_DIGITS])])
    return rest


def _at_most(high: str) -> Pattern:
    rest = repeat(_digit(0, 0), 0, None)
    for digit in map(int, reversed(high)):
        rest = _either([EMPTY, seq([_digit(digit, digit), rest]), seq([_digit(0, digit - 1), _ANY_DIGITS])])
    return rest


@lru_cache(maxsize=1024)
def multiples(of: Decimal, integers: bool) -> Pattern:
    """The multiples of a number above 0, without exponent; of those the integers. Unsupported where it has too many digits."""
    places = max(0, -int(of.normalize().as_tuple().exponent))
    unit = int(of.scaleb(places))
    if unit * (places + 1) > _MAX_RESIDUES:
        raise Unsupported(f"is {of}, whose multiples are too many to tell; at most {_MAX_RESIDUES} is supported")

    # A node is a remainder of the digits so far, and how many of them stand behind the point. 0 and 1 are the start.
    def node(place: int, remainder: int) -> int:
        return 2 + place * unit + remainder

    end, trailing = 2 + (places + 1) * unit, 3 + (places + 1) * unit
    edges: list[tuple[int, Pattern, int]] = [(0, optional(_MINUS), 1)]
    edges += [(1, _digit(digit, digit), node(0, digit % unit)) for digit in range(1, 10)]
    zero = trailing + 1
    edges.append((1, _digit(0, 0), zero))  # which no digit follows
    after_point = seq([literal("."), repeat(_digit(0, 0), 1, None)])
    for remainder in range(unit):
        for digit in range(10):
            after = (remainder * 10 + digit) % unit
            edges.append((node(0, remainder), _digit(digit, digit), node(0, after)))
            if places:
                point = seq([literal("."), _digit(digit, digit)])
                edges.append((node(0, remainder), point, node(1, after)))
                if not remainder:
                    edges.append((zero, point, node(1, digit % unit)))
            for place in range(1, places):
                edges.append((node(place, remainder), _digit(digit, digit), node(place + 1, after)))
        for place in range(places + 1):
            if remainder * 10 ** (places - place) % unit == 0:
                edges.append((node(place, remainder), EMPTY, end if place == 0 else trailing))
    edges.append((trailing, repeat(_digit(0, 0), 0, None), end))
    edges.append((zero, EMPTY, end))
    if not integers:
        edges.append((node(0, 0), after_point, end))
        edges.append((zero, after_point, end))
    found = graph(edges, end)
    return both([found, any_integer()]) if integers else both([found, any_number()])
