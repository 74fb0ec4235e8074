"""The tensors in a checkpoint's files, memory-mapped: safetensors, and torch's own .pth and .pt.

Opening reads and checks headers alone. What is wrong with a file is a BatchmixError of one line that names it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchmix.dtypes import dtype_name
from batchmix.errors import BatchmixError
from batchmix.json_file import shown

_BLOCK_BYTES = 16 << 20  # hashed at once, without Python's lock
_libc = ctypes.CDLL(None)


_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


class SafetensorsFile:
    """One safetensors file. The library checks that the header is whole and covers the file exactly."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = file = cast(Any, safe_open(path, "pt"))  # its methods have no types
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            reason = _cut_off(path) or f"is damaged or no safetensors file ({first_line(error)})"
            raise BatchmixError(f"{path}: {reason}") from None

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class PthFile:
    """One file of torch.save with tensors by name. Read with weights_only, so that nothing in it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # what a damaged pickle or zip raises is anything
            raise BatchmixError(
                f"{path}: is damaged, cut off or no file of tensors saved by torch 1.6 or later ({first_line(error)})"
            ) from None
        if not isinstance(state, dict):
            raise BatchmixError(f"{path}: holds a {type(state).__name__}, not tensors by name")
        # detach: a parameter would take its gradient along to where it is copied
        self._state = {str(name): tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self.dtypes = {name: _header_name(tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._state[name]


class TensorFiles:
    """All tensors of a checkpoint under their own names: a `TensorSource`.

    With `hashed`, each is hashed when it is first read, which brings its pages into memory for whoever reads it.
    """

    def __init__(self, paths: Sequence[Path], hashed: bool = False) -> None:
        self._hashed, self._lock = hashed, threading.Lock()
        self._digests: dict[str, str] = {}
        self._files: dict[str, SafetensorsFile | PthFile] = {}
        for path in paths:
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else PthFile(path)
            twice = next((name for name in file.shapes if name in self._files), None)
            if twice is not None:
                raise BatchmixError(
                    f"{path}: tensor {in_line(twice)} is in {self._files[twice].path.name} too; slices of a tensor-parallel run"
                    " cannot be joined here (each tensor must be whole and in one file)"
                )
            self._files |= dict.fromkeys(file.shapes, file)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: file.shapes[name] for name, file in self._files.items()}

    def dtype(self, name: str) -> str:
        """As a safetensors header has it: F32, BF16, I8, ..."""
        return self._files[name].dtypes[name]

    def dtypes(self) -> set[str]:
        """All that there are."""
        return {dtype for file in self._files.values() for dtype in file.dtypes.values()}

    def path(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files[name].path

    def read(self, name: str) -> Tensor:
        tensor = self._files[name].read(name)
        with self._lock:
            first = self._hashed and name not in self._digests
            if first:
                self._digests[name] = ""
        if first:
            self._digests[name] = _digest(tensor)
        return tensor

    def fingerprint(self) -> str | None:
        """Of the names, dtypes, shapes and bytes of all tensors read; None without `hashed`. Call it when none is being read."""
        if not self._hashed:
            return None
        shapes = self.shapes()
        found = [(name, self.dtype(name), shapes[name], digest) for name, digest in sorted(self._digests.items())]
        return xxhash.xxh3_128(repr(found).encode()).hexdigest()

    def release(self, name: str) -> None:
        release_pages(self.read(name))


def _digest(tensor: Tensor) -> str:
    """Of its bytes, in the order of its elements."""
    digest = xxhash.xxh3_128()
    for block in torch.split(tensor.reshape(-1).view(torch.uint8), _BLOCK_BYTES):  # reshape copies odd strides
        digest.update(cast(Any, block.numpy()))
    return digest.hexdigest()


def release_pages(tensor: Tensor) -> None:
    """Take the pages of a view of a mapped file out of this process; they stay in the page cache, to be mapped again.

    The kernel would do so itself only when memory is short, and until then a loader looks as large as its checkpoint.
    """
    start = tensor.data_ptr()
    length = (sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.itemsize
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.numel() and last > first:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def in_line(name: str) -> str:
    """A tensor's name, which can be any text, for a message of one line."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _header_name(dtype: torch.dtype) -> str:
    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}.get(
        dtype, dtype_name(dtype)
    )


def _cut_off(path: Path) -> str | None:
    """What to say of a file that ends too early, for which its header must be whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                return None
            header = json.loads(file.read(min(length, size)))
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        cut = min((end, name) for name, end in ends.items() if end > size)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
    return f"is cut off: tensor {in_line(cut[1])} ends at byte {cut[0]:,}, the file at {size:,}"
