"""The kernels of `numba_kernels` as machine code, on disk and in this process.

Numba compiles them once on a machine. From then on llvmlite alone loads what it made: numba takes half a second to import.
They run on the threads of torch's own pool (GNU OpenMP), of which each takes its share: another pool's threads would wait
for a core on which torch's spin.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchmix.dtypes import dtype_name
from batchmix.install_hint import install_hint
from batchmix.user_cache import user_cache, write_whole

DTYPES = (torch.float32, torch.bfloat16)
_SOURCES = [Path(__file__).with_name(name) for name in ("numba_math.py", "numba_kernels.py", "numba_cache.py")]
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_NEVER_CALLED = ("numba_gil_ensure", "numba_gil_release")  # of Python errors, which the kernels cannot have
_GRAIN = 1 << 15  # elements below which one thread is faster than several, as torch's own operators have it

_log = logging.getLogger(__name__)


class Kernels:
    """The compiled kernels for a model of one dtype."""

    def __init__(self, code: bytes) -> None:
        import llvmlite.binding as llvm

        openmp, abort = _openmp(), ctypes.CDLL(None).abort
        assert openmp is not None
        for name in _OPENMP[1:]:
            llvm.add_symbol(name, _address_of(getattr(openmp, name)))
        for name in _NEVER_CALLED:
            llvm.add_symbol(name, _address_of(abort))
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())  # owns the code
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._address = functools.cache(self._engine.get_function_address)
        # (function, its argument, threads, flags): each thread calls the function
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._run = prototype(_address_of(openmp.GOMP_parallel))

    def __call__(self, kernel: str, *job: int | float | Tensor | np.ndarray, work: int = 0) -> None:
        """Run a kernel on its job's sizes and dense tensors; in one thread where there is little `work`, in elements."""
        address = self._address(kernel)
        assert address, kernel
        numbers = np.array([_number(value) for value in job], np.int64)
        self._run(address, numbers.ctypes.data, 1 if work < _GRAIN else torch.get_num_threads(), 0)


def unavailable() -> str | None:
    """What is missing for the kernels to be compiled and run here, or None."""
    if missing := [name for name in ("numba", "llvmlite") if find_spec(name) is None]:
        return f"{' and '.join(missing)} cannot be imported ({install_hint('cpu')})"
    return None if _openmp() is not None else "torch's threads are not GNU OpenMP's"


@functools.cache
def load_kernels(dtype: torch.dtype) -> Kernels:
    """From the user's cache folder; compiled, and put there, where it has none for this machine."""
    path = user_cache("kernels") / f"{dtype_name(dtype)}-{_key()}"
    try:
        digest, code = (content := path.read_bytes())[:32], content[32:]
        if hashlib.sha256(code).digest() == digest:
            return Kernels(code)
    except OSError:
        pass
    started = time.perf_counter()
    code = _compile(dtype)
    _log.info("compiled the CPU kernels for %s in %.1f s, once on this machine", dtype, time.perf_counter() - started)
    try:
        write_whole(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        _log.warning("the CPU kernels are compiled anew at each start: %s", error)
    return Kernels(code)


def _compile(dtype: torch.dtype) -> bytes:
    """An object file with all kernels."""
    import llvmlite.binding as llvm
    from numba import cfunc, types

    from batchmix.models.numba_kernels import kernels
    from batchmix.models.numba_math import FUSED

    openmp = _openmp()
    for name in _OPENMP[1:]:  # numba links what it compiles at once
        llvm.add_symbol(name, _address_of(getattr(openmp, name)))
    modules = []
    for function in kernels(types.float32 if dtype is torch.float32 else types.uint16):
        signature = types.void(types.CPointer(types.int64))
        compiled = cfunc(signature, error_model="numpy", fastmath=FUSED)(function)
        module = llvm.parse_assembly(compiled.inspect_llvm())
        module.get_function(compiled.native_name).name = function.__name__
        modules.append(module)
    for module in modules[1:]:
        modules[0].link_in(module)
    return bytes(_target_machine().emit_object(modules[0]))


def _key() -> str:
    """A hash of all that the machine code depends on."""
    import llvmlite.binding as llvm

    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    machine = llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    parts = *(source.read_bytes() for source in _SOURCES), repr((*versions, *machine)).encode()
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _target_machine() -> Any:
    """Code for the CPU of this machine."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch runs on, found as a library that torch's depends on; None where it is another kind."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return library if all(hasattr(library, symbol) for symbol in _OPENMP) else None
    except OSError:
        return None


def _address_of(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _number(value: int | float | Tensor | np.ndarray) -> int:
    """A size as it is, of a tensor its address, of a float its float32 bits."""
    if isinstance(value, Tensor):
        assert value.is_contiguous(), value.stride()
        return value.data_ptr()
    if isinstance(value, np.ndarray):
        assert value.dtype == np.int64, value.dtype
        assert value.flags.c_contiguous, value.strides
        return value.ctypes.data
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value


if __name__ == "__main__":  # what the first run would wait for
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if (reason := unavailable()) is not None:
        _log.info("no CPU kernels: %s", reason)
    else:
        for each in DTYPES:
            load_kernels(each)
