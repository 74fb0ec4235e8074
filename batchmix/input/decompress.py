"""Compressed input files, told by their first bytes and unpacked a piece at a time.

A piece is never more than a few MB, however well a file is packed: 64 KB of zstd can hold 2 GB.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
_PIECE_BYTES = 64 << 10  # unpacked at once, at most, where the library can be told so
_ZSTD_PIECE_BYTES = 256  # packed bytes given to zstd at once: 4 of them can stand for 128 KiB
_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs
_XZ_MEMORY_BYTES = 256 << 20  # `xz -9` needs 65 MiB
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}


def compression_of(head: bytes) -> str | None:
    """gzip, zstd, bzip2, xz or None, from a file's first 8 bytes."""
    if head[:1] and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18":
        return "zstd"  # a frame to be skipped, with which parallel compressors begin
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def decompressed(stored: IO[bytes], compression: str | None) -> IO[bytes] | io.BufferedReader:
    """The file's bytes as they were before compression. What it raises for a damaged file is the library's."""
    if compression is None:
        return stored
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=stored))
    frames: dict[str, tuple[Callable[[], Any], int]] = {
        "zstd": (_ZstdFrame, _ZSTD_PIECE_BYTES),
        "bzip2": (bz2.BZ2Decompressor, _PIECE_BYTES),
        "xz": (lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES), _PIECE_BYTES),
    }
    return io.BufferedReader(_Frames(stored, *frames[compression]))


class _ZstdFrame:
    """zstandard's decompressor with the interface of the standard library's. It gives all that its input holds."""

    def __init__(self) -> None:
        frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
        self._frame: Any = frame
        self.needs_input = True

    def decompress(self, packed: bytes, _: int) -> bytes:
        unpacked: bytes = self._frame.decompress(packed)
        return unpacked

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data)


class _Frames(io.RawIOBase):
    """Compressed frames, one or many. EOFError where the last one is cut off, which zstandard's reader hides; bytes
    that are no frame, which those of bz2 and lzma ignore, raise their library's error; zeros between frames are padding.
    """

    def __init__(self, stored: IO[bytes], new: Callable[[], Any], piece_bytes: int) -> None:
        self._stored, self._new, self._piece_bytes = stored, new, piece_bytes
        self._frame: Any = None  # None between frames
        self._packed = memoryview(b"")
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer)
        while not self._ready:
            piece = b""
            if self._frame is None or self._frame.needs_input:
                piece = self._next_piece()
                if not piece:
                    if self._frame is not None:
                        raise EOFError("the compressed file is cut off")
                    return 0
            if self._frame is None:
                piece = piece.lstrip(b"\x00")
                if not piece:
                    continue
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(piece, _PIECE_BYTES))
            if self._frame.eof:
                self._packed = memoryview(self._frame.unused_data + bytes(self._packed))
                self._frame = None
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _next_piece(self) -> bytes:
        if not self._packed:
            self._packed = memoryview(self._stored.read(_PIECE_BYTES))
        piece = bytes(self._packed[: self._piece_bytes])
        self._packed = self._packed[self._piece_bytes :]
        return piece
