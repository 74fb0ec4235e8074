"""Launch kernels at little cost to the host.

Triton finds the compiled kernel of a launch by going over all arguments and settings, some of which it reads from the
environment each time. An engine's launches repeat, layer by layer and step by step, so they are remembered here.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

P = ParamSpec("P")
T = TypeVar("T")
_INTERPRETED = triton.knobs.runtime.interpret  # read by Triton, too, where a kernel is decorated
_INT32 = 1 << 31


class Kernel:
    """A jitted function that is launched as one of Triton's: `kernel[grid](*arguments, **settings)`.

    `arguments` are all that are no constexprs, by position; `settings` are constexprs, warps, stages and the like.
    """

    def __init__(self, function: Callable[..., Any], counts: Sequence[str], of_rows: Sequence[str]) -> None:
        self.__name__ = function.__name__
        self.jit: Any = triton.jit(
            function, do_not_specialize=list(counts), do_not_specialize_on_alignment=list(of_rows)
        )
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # what is launched, and its constexprs

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        found: Callable[..., None] = self.jit[grid] if _INTERPRETED else functools.partial(self._launch, grid)
        return found

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        key = driver.active.get_current_device(), *map(_specialization, arguments), *settings.items()
        known = self._known.get(key)
        if known is None:
            compiled = self.jit.run(*arguments, grid=grid, warmup=True, **settings)
            if compiled is None:  # a hook took it, which records what would be compiled
                return
            constexprs = self.jit.params[len(arguments) :]
            constants = tuple(settings.get(parameter.name, parameter.default) for parameter in constexprs)
            known = self._known[key] = compiled, constants
        known[0][(*grid, 1, 1)[:3]](*arguments, *known[1])


def kernel(*counts: str, of_rows: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a kernel that is launched; those that kernels call are `triton.jit`'s.

    One kernel is compiled for all values of the integers named by `counts`, which change from step to step, and for all
    alignments of the pointers named by `of_rows`, which point at the first row of a step.
    """
    return lambda function: Kernel(function, counts, of_rows)


class Operator(Generic[P, T]):
    """A launcher that is also an operator of torch.library, `batchmix::<name>`.

    Called, it launches at once; dispatch costs several times a launch. While torch compiles or exports it is `op`, which
    has a fake implementation. `op` also refuses to be differentiated, which a launcher does not notice.
    """

    def __init__(self, name: str, launcher: Callable[P, T], mutates_args: Iterable[str]) -> None:
        functools.update_wrapper(self, launcher)
        self._launcher = launcher
        self.op: Any = torch.library.custom_op(f"batchmix::{name}", launcher, mutates_args=mutates_args)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            result: T = self.op(*args, **kwargs)
            return result
        return self._launcher(*args, **kwargs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate what gives an output of the right shape and dtype, and computes nothing."""
        registered: Callable[..., Any] = self.op.register_fake(fake)
        return registered


def operator(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[P, T]], Operator[P, T]]:
    """Make a launcher an `Operator`. An argument that it changes has no default: torch 2.11 would not pass it on."""
    return lambda launcher: Operator(name, launcher, mutates_args)


def constexprs(*values: int) -> tuple[tl.constexpr, ...]:
    """Numbers as kernels may read them from their module: fields of a packed block, say."""
    return tuple(tl.constexpr(int(value)) for value in values)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own takes microseconds to find out that it is not inside a kernel.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n; 1 for n below 1."""
    return 1 << max(n - 1, 0).bit_length()


def _specialization(argument: Any) -> Any:
    """What of an argument decides which kernel is compiled, as `native_specialize_impl` of Triton sees it."""
    if isinstance(argument, Tensor):
        return argument.dtype if argument.data_ptr() % 16 == 0 else (argument.dtype,)
    if argument is None or isinstance(argument, bool):
        return argument
    if isinstance(argument, int):
        return 1 if argument == 1 else (argument % 16 == 0, -_INT32 <= argument < _INT32)
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return type(argument)
