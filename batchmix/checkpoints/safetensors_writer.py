"""Writes safetensors files tensor by tensor: the library's own writer wants all of a file's tensors in memory at once.

The format is at https://github.com/huggingface/safetensors#format: eight bytes with the header's length, the header in
JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batchmix.checkpoints.staging import PIECE_BYTES

_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor to be written. `pieces` gives it in parts, one below the other, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: list[Entry], count: Callable[[int], None]) -> None:
    """Write one file and see it onto the disk; `count` is told the elements of every tensor that is through."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            before = file.tell()
            for piece in entry.pieces():
                rows = max(1, PIECE_BYTES // max(1, piece[:1].numel() * entry.dtype.itemsize))
                for part in torch.split(piece, rows):
                    file.write(part.to(entry.dtype).contiguous().view(torch.uint8).numpy().data)
            assert file.tell() - before == entry.nbytes, entry.name
            count(math.prod(entry.shape))
        file.flush()
        os.fsync(file.fileno())


def write_sharded(folder: Path, entries: list[Entry], max_bytes: int, count: Callable[[int], None]) -> None:
    """Write model.safetensors, or files of at most `max_bytes` (or of one tensor) and the index, as transformers does."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", entries, count)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, count)
        weight_map |= {entry.name: name for entry in shard}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
