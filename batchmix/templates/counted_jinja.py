"""Jinja whose work is counted, so that a template without an end, or of gigabytes, fails on a row instead of the run.

Steps are counted, never seconds: the same row fails on every machine. A step is an iteration of a loop, a call, a filter, a test,
an item of a list that one of these walks over, or 64 characters of a text that it reads or makes. What can make a long text
from a short one (`*`, center, format, ...) is bounded before it runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

T = TypeVar("T")
MAX_STEPS = 250_000  # for one row: a second or two at most. The text of a prompt of 30,000 tokens is 2,000 of them
_MAX_CHARS = 2**23  # of one text, or items of one list
_MAX_BITS = 2**16  # of an integer
_CHARS = 64  # of a text that make a step
_LAZY = {"map", "select", "reject", "selectattr", "rejectattr", "items"}  # walk over nothing by themselves
_SHORT = {"length", "count", "first", "last", "default", "d", "attr", "safe", "items"}  # do not walk at all
_PARTS = ("iterable", "joined", "weighed")  # filters of this module's own, which no template can name
_steps: ContextVar[list[int] | None] = ContextVar("steps", default=None)  # those left, in a list of one


class TooManySteps(Exception):
    """A template takes more steps, or makes a longer text, than one row may."""


class CountedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates count their steps while `counted` is entered."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum", None)  # random text, of any length
        plain = self.finalize
        self.finalize = lambda value: _weighed(value) if plain is None else plain(_weighed(value))
        self.count_filters_and_tests()

    def count_filters_and_tests(self) -> None:
        """Have all filters and tests counted, also those added by now."""
        for table, is_filter in ((self.filters, True), (self.tests, False)):
            for name, function in list(table.items()):
                if not hasattr(function, "is_counted"):
                    table[name] = _counted(name, function, is_filter)
        self.filters |= {
            f" {name}": function for name, function in zip(_PARTS, (_iterated, _joined, _weighed), strict=True)
        }

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The text of a template, a macro or a block."""
        return "".join(_printed(pieces))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | list | tuple):
            _, args = _bounded(method.__name__, owner, args, kwargs)
        _charge(1 + sum(map(_weight, (*args, *kwargs.values()))))
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, range) else _weighed(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _bound_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bound(left.bit_length() * max(right, 0), _MAX_BITS)
        elif operator == "%" and isinstance(left, str | bytes):
            _bound(_formatted(str(left), right if isinstance(right, tuple) else (right,)))
        _charge(1 + _weight(left) + _weight(right))
        return super().call_binop(context, operator, left, right)


def counted(render: Callable[[], T]) -> T:
    """What `render` gives. TooManySteps where that takes more than MAX_STEPS."""
    token = _steps.set([MAX_STEPS])
    try:
        return render()
    finally:
        _steps.reset(token)


def count_steps_of(template: jinja2.Template, source: str) -> None:
    """Have a template that another library has compiled from `source`, in a sandbox of its own, count its steps."""
    theirs = template.environment
    if isinstance(theirs, CountedEnvironment):
        return
    environment = CountedEnvironment(
        trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks,
        keep_trailing_newline=theirs.keep_trailing_newline, undefined=theirs.undefined,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )  # fmt: skip
    environment.filters |= theirs.filters
    environment.globals |= {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    environment.count_filters_and_tests()
    template.__dict__.update(environment.from_string(source).__dict__)


def _charge(steps: int) -> None:
    left = _steps.get()
    if left is None:  # a constant that the compiler works out
        return
    left[0] -= steps
    if left[0] < 0:
        raise TooManySteps(
            f"it takes more than {MAX_STEPS:,} steps, or makes a text of more than {_MAX_CHARS:,} characters"
        )


def _bound(size: int, most: int = _MAX_CHARS) -> None:
    """Refuse what would be larger than a row may need."""
    if size > most:
        raise TooManySteps(
            f"it takes more than {MAX_STEPS:,} steps, or makes a text of more than {_MAX_CHARS:,} characters"
        )
    _charge(size // _CHARS)


def _weight(value: Any) -> int:
    """Steps to walk over a value, all that is in it included."""
    if isinstance(value, str | bytes):
        return len(value) // _CHARS
    if isinstance(value, range):
        return len(value)
    if not isinstance(value, list | tuple | Mapping | set | frozenset):
        return 0
    left = _steps.get()
    most = MAX_STEPS if left is None else left[0]
    found, stack = 0, [value]
    while stack and found <= most:  # lists within lists can have more items than there is memory
        item = stack.pop()
        if isinstance(item, str | bytes):
            found += len(item) // _CHARS
        elif isinstance(item, Mapping):
            found += len(item)
            stack += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            found += len(item)
            stack += item
    return found


def _weighed(value: Any) -> Any:
    _charge(_weight(value))
    return value


def _iterated(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _charge(1)
        yield value


def _printed(pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        _charge(1 + len(piece) // _CHARS)
        yield piece


def _joined(values: list[Any]) -> str:
    _bound(sum(len(value) if isinstance(value, str) else _CHARS * _weight(value) for value in values))
    return "".join(map(str, values))


def _counted(name: str, function: Callable[..., Any], is_filter: bool) -> Callable[..., Any]:
    """A filter or a test."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment comes before the value

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if is_filter and len(args) > first:
            value, others = _bounded(name, args[first], args[first + 1 :], kwargs)
            args = (*args[:first], value, *others)
        _charge(1 + (0 if name in _SHORT or name in _LAZY else sum(map(_weight, (*args[first:], *kwargs.values())))))
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _iterated(result)
        return result if name in _SHORT or not is_filter else _weighed(result)

    run.is_counted = True  # type: ignore[attr-defined]
    return run


def _bounded(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The value and `args` of a method or filter. TooManySteps where the result would be too large."""
    given = (*args, *kwargs.values())
    numbers = [abs(item) for item in given if isinstance(item, int)]
    width = max(numbers, default=0)
    text = value if isinstance(value, str | bytes) else ""
    texts = [len(item) for item in given if isinstance(item, str | bytes)]
    if name in ("center", "ljust", "rjust", "zfill", "batch", "slice", "to_bytes", "truncate"):
        _bound(width)
    elif name == "round":
        _bound(width, 400)  # 10 to the power of it is worked out
    elif name == "expandtabs":
        _bound(len(text) + len(text) * width)
    elif name == "indent":
        _bound(len(text) + (1 + len(text.splitlines())) * max(width, *texts, 4))
    elif name == "tojson":
        _bound(_CHARS * (1 + _weight(value)) * (1 + width))
    elif name in ("replace", "wordwrap", "urlize"):
        old = args[0] if name == "replace" and args else None
        count = len(text)
        if isinstance(text, str) and isinstance(old, str):
            count = text.count(old)
        _bound(len(text) + count * (texts[-1] if name == "replace" and texts else sum(texts)))
    elif name == "translate":
        table = args[0] if args and isinstance(args[0], Mapping) else {}
        _bound(len(text) * max([1, *(len(item) for item in table.values() if isinstance(item, str))]))
    elif name in ("format", "format_map"):
        _bound(_formatted(str(text), given))
    elif name in ("split", "rsplit", "splitlines", "list"):
        _charge(len(text) // (2 if name != "list" else 1) if not texts else 0)
    elif name == "join":  # of a text and then the items, or of the items and then a text
        value, args = _listed(value), tuple(map(_listed, args))
        parts = [part for part in (value, *args, *kwargs.values()) if hasattr(part, "__len__")]
        most = max(map(len, parts), default=0)
        separator = text if args and not isinstance(args[0], str | int) else "x" * max(texts, default=0)
        _bound(len(separator) * most + _CHARS * sum(map(_weight, parts)))
    return value, args


def _listed(values: Any) -> Any:
    """`values`, as a list if they can be looked at just once."""
    return list(values) if isinstance(values, Iterator) else values


def _bound_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(other, int):
            if isinstance(one, str | bytes | list | tuple):
                _bound(len(one) * max(other, 0))
            elif isinstance(one, int):
                _bound(one.bit_length() + other.bit_length(), _MAX_BITS)


def _formatted(form: str, values: tuple[Any, ...]) -> int:
    """The most characters that a format can give: each of its fields as wide as the widest."""
    widths = [int(number) for number in re.findall(r"%[^a-zA-Z%]*?(\d+)", form)]
    widths += [int(number) for spec in re.findall(r"\{[^{}]*:([^{}]*)", form) for number in re.findall(r"\d+", spec)]
    widths += [int(number) for number in re.findall(r"%[^a-zA-Z%]*?\.(\d+)", form)]
    if "*" in form or re.search(r"\{[^{}]*\{", form):  # a width that is a value
        widths += [abs(value) for value in values if isinstance(value, int)]
    longest = max(
        (len(value) if isinstance(value, str) else _CHARS * (1 + _weight(value)) for value in values), default=0
    )
    return len(form) + (form.count("%") + form.count("{")) * (max(widths, default=0) + longest)


class _Counting(NodeTransformer):
    """Has a template's syntax tree count what no method of an environment sees."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "iterable")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "weighed")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "weighed")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "weighed") if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: nodes.Node, name: str) -> nodes.Expr:
    if isinstance(node, nodes.Const):
        return node
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, f" {name}", [], [], None, None, lineno=node.lineno)
