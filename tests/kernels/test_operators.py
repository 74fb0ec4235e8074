"""What holds for every `batchmix::` operator, by its schema: a new one is covered as soon as its module exists."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import batchmix.kernels


def registered(namespace: str) -> dict[str, Any]:
    """Schemas of the operators of a namespace, by name."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")]
    return {name: torch._C._get_schema(*(name.split(".") if "." in name else (name, ""))) for name in names}


def defaults_up_to_a_mutated_argument(schema: Any) -> list[str]:
    """The arguments with a default among those up to the last one that the operator changes."""
    last = max((i for i, argument in enumerate(schema.arguments) if argument.is_write), default=-1)
    return [argument.name for argument in schema.arguments[: last + 1] if argument.has_default_value()]


def test_no_mutated_argument_and_none_before_one_has_a_default() -> None:
    """torch 2.11 leaves out trailing arguments that equal their default, then looks up mutated ones by position."""
    for module in pkgutil.iter_modules(batchmix.kernels.__path__):
        importlib.import_module(f"batchmix.kernels.{module.name}")
    schemas = registered("batchmix")
    assert {"batchmix::post_update", "batchmix::sort_pairs", "batchmix::rotate_and_cache"} <= set(schemas)
    found = {name: defaults_up_to_a_mutated_argument(schema) for name, schema in schemas.items()}
    assert {name: arguments for name, arguments in found.items() if arguments} == {}


def test_operators_are_defined_in_kernels_alone() -> None:
    """One that is defined elsewhere would not be looked at here."""
    package = Path(batchmix.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.parent != package / "kernels"]
    elsewhere = [path for path in sources if "custom_op(" in path.read_text(encoding="utf-8")]
    assert elsewhere == []


@pytest.mark.parametrize(("defaults", "expected"), [((), []), ((None,), []), ((None, None), ["changed"])])
def test_a_default_of_a_mutated_argument_is_found(defaults: tuple[None, ...], expected: list[str]) -> None:
    def operator(x: Tensor, changed: Tensor | None, after: Tensor | None) -> None:
        pass

    operator.__defaults__ = defaults
    operator.__annotations__ = {"x": Tensor, "changed": Tensor | None, "after": Tensor | None, "return": None}
    name = f"batchmix_test::defaults_{len(defaults)}"
    torch.library.custom_op(name, operator, mutates_args=("changed",))
    assert defaults_up_to_a_mutated_argument(registered("batchmix_test")[name]) == expected
