"""Numbers between bounds and multiples, against decimals."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from hypothesis import given, reject, settings
from hypothesis import strategies as st

from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.numbers import any_fraction, any_number, integers_between, multiples, numbers_between
from batchmix.structured_output.pattern import NEVER, Pattern, TooLarge

BOUNDS = st.one_of(
    st.none(), st.integers(-300, 300).map(Decimal), st.decimals(-20, 20, places=3),
    st.sampled_from(["4102444800", "1e20", "-1e10", "1e-7", "-9223372036854775808", "1.7976931348623157e308", "0", "-0.001"]).map(Decimal),
)  # fmt: skip


HUGE = Decimal("1e100")  # bounds beyond may take more states than an automaton may have; those rows go to llguidance


def has(pattern: Pattern, text: str, *bounds: Decimal | None) -> bool:
    try:
        return pattern != NEVER and build_automaton(pattern).has(text)
    except TooLarge:
        assert any(bound is not None and abs(bound) > HUGE for bound in bounds), "no table of an everyday bound"
        reject()


def near(*bounds: Decimal | None) -> list[str]:
    found = ["0", "1", "-1", "10", "0.5", "-2.75", "100", "123456789012", "0.12345678901234567"]
    for bound in bounds:
        for step in ("-1", "-0.001", "0", "0.001", "1"):
            if bound is not None and abs(bound) < 10**25:
                found.append(format(bound + Decimal(step), "f"))
    return [text for text in found if Decimal(text) or not text.startswith("-")]


@settings(max_examples=60, deadline=None)
@given(BOUNDS, st.booleans(), BOUNDS, st.booleans())
def test_numbers_are_those_between_the_bounds(low, open_low, high, open_high):
    integers = integers_between(low, open_low, high, open_high)
    numbers = numbers_between(low, open_low, high, open_high)
    for text in near(low, high):
        value = Decimal(text)
        inside = low is None or value > low or (value == low and not open_low)
        inside = inside and (high is None or value < high or (value == high and not open_high))
        if re.fullmatch("-?[0-9]+", text):
            assert has(integers, text, low, high) == inside
        # Nearer to an open bound than floats tell, no number is written.
        close = any(is_open and bound is not None and bound != value and abs(value - bound) < abs(bound) * Decimal("1e-14")
                    for bound, is_open in ((low, open_low), (high, open_high)))  # fmt: skip
        if not close:
            assert has(numbers, text, low, high) == inside, text


@settings(max_examples=60, deadline=None)
@given(BOUNDS, BOUNDS, st.integers(1, 9), st.text("0123456789", max_size=4), st.integers(-320, 320))
def test_exponents_are_those_between_the_bounds(low, high, digit, rest, exponent):
    text = f"{digit}{'.' if rest else ''}{rest}e{exponent}"
    value = Decimal(text)
    inside = (low is None or value >= low) and (high is None or value <= high) and abs(exponent) < 300
    assert has(numbers_between(low, False, high, False), text, low, high) == inside
    assert has(any_number(), text) == (abs(exponent) < 300)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from("1 2 3 7 10 100 250 1000 0.5 0.1 0.01 0.25 2.5 0.125".split()), st.booleans(), st.data())
def test_multiples(of, integers, data):
    pattern = multiples(Decimal(of), integers)
    times = data.draw(st.integers(-(10**6), 10**6))
    step = data.draw(st.sampled_from(["0", "1", "0.1", "0.005"]))
    text = format(Decimal(of) * times + Decimal(step), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    value = Decimal(text)
    whole = value == value.to_integral_value()
    assert has(pattern, text) == (value % Decimal(of) == 0 and (whole or not integers))
    assert not has(pattern, f"{text}e1")


def test_numbers_that_are_no_integers_are_none_as_floats():
    fractions: Any = build_automaton(any_fraction())
    for text in ("0.5", "-12.000001", "999999999.999999"):
        assert fractions.has(text)
        assert not float(text).is_integer()
    for text in ("1", "1.0", "1.00", "12345678901.5", "0.9999999999999999999"):
        assert not fractions.has(text)
