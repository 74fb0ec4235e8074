"""What the patterns of arrays and objects ask of the translation that they are parts of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from batchmix.structured_output.alternatives import Alternatives
from batchmix.structured_output.keywords import Reader
from batchmix.structured_output.limits import Atom
from batchmix.structured_output.pattern import Pattern


class Translator(Protocol):
    """Of one document; `json_schema.Translation` is the one there is."""

    reader: Reader
    alternatives: Alternatives

    def atom(self, schema: Any, base: str, path: str) -> Atom:
        """The schema as one that must hold."""

    def schema(self, atoms: Sequence[Atom], path: str, depth: int) -> Pattern:
        """The values for which all of the schemas hold."""

    def finite(self, atoms: Sequence[Atom]) -> list[Any] | None:
        """All values of the schemas, each once, None where they are too many or not all known."""
