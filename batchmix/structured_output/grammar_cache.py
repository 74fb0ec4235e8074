"""Tables of grammars on disk, by their content, so that resumed runs and other shards of a job do not compile them again."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from batchmix.structured_output.grammar import CompiledGrammar
from batchmix.user_cache import user_cache, write_whole

_MAX_FILES = 1_000  # of which the oldest go


@dataclass(frozen=True)
class GrammarCache:
    """A folder of tables for one vocabulary. What cannot be read or written is as if it was not there."""

    folder: Path
    pieces: Sequence[bytes]  # of the vocabulary
    others: tuple[Any, ...]  # whatever else all tables depend on

    @classmethod
    def of(cls, pieces: Sequence[bytes], *others: Any) -> GrammarCache:
        """In the user's cache folder."""
        return cls(user_cache("grammars"), pieces, others)

    @cached_property
    def vocabulary(self) -> str:
        """A hash of the pieces and the others; made only once a table is looked for."""
        digest = hashlib.sha256(repr((np.__version__, self.others)).encode())
        for source in sorted(Path(__file__).parent.glob("*.py")):  # what a table means is what this code makes of it
            digest.update(source.read_bytes())
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()

    def get(self, key: Any) -> tuple[CompiledGrammar, list[str]] | None:
        """The grammar that was put under the key, and the keywords that its schema had in vain."""
        try:
            with np.load(self._path(key), allow_pickle=False) as file:
                notes = json.loads(str(file["notes"]))
                forced = {int(state): int(token) for state, token in file["forced"]}
                grammar = CompiledGrammar(
                    file["table"], file["token_class"], notes["start"], notes["shortest"], notes["shortest_longer"],
                    notes["has_end"], forced,
                )  # fmt: skip
                return grammar, notes["unknown"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def put(self, key: Any, grammar: CompiledGrammar, unknown: Iterable[str]) -> None:
        """Keep the grammar, as one of a bounded number."""
        notes = {"start": grammar.start, "shortest": grammar.shortest, "shortest_longer": grammar.shortest_longer,
                 "has_end": grammar.has_end, "unknown": list(unknown)}  # fmt: skip
        forced = np.array(sorted(grammar.forced.items()), np.int64).reshape(-1, 2)
        content = io.BytesIO()
        np.savez(content, table=grammar.table, token_class=grammar.token_class, forced=forced, notes=json.dumps(notes))
        try:
            write_whole(self._path(key), content.getvalue())
            self._trim()
        except OSError:
            return

    def _path(self, key: Any) -> Path:
        name = hashlib.sha256((self.vocabulary + repr(key)).encode(errors="surrogatepass")).hexdigest()
        return self.folder / f"{name}.npz"

    def _trim(self) -> None:
        files = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(self.folder)]
        for _, path in sorted(files)[: max(0, len(files) - _MAX_FILES)]:
            os.unlink(path)
