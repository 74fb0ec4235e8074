"""Schemas that hold or do not, and what one says itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchmix.structured_output.keywords import Made


@dataclass(frozen=True)
class Atom:
    """A schema that must hold, or must not."""

    schema: Any
    base: str  # the address of the document that it stands in
    path: str  # where it stands, for messages
    negated: bool = False
    silent: bool = False  # what it declares does not count as evaluated, as within `not`

    @property
    def key(self) -> tuple[int, bool]:
        return id(self.schema), self.negated


@dataclass(frozen=True)
class Limits:
    """What one schema says itself: keywords in draft 2020-12's form (keywords.py)."""

    keywords: Mapping[str, Any]
    base: str
    path: str
    silent: bool = False  # it only says what must not be

    @property
    def declares(self) -> bool:
        """Whether its properties are those of an object that is written."""
        return not isinstance(self.keywords, Made)


Alternative = tuple[Limits, ...]
