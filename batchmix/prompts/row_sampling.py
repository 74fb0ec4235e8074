"""The sampling of each row: the run's own, with what the row itself asks for, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from batchmix.records import InputRow
from batchmix.sampling import SamplingConfig
from batchmix.sampling_checks import override_sampling
from batchmix.templates.messages import PromptError

_CACHED_SAMPLINGS = 1024  # rows with a seed of their own would fill any cache
_CACHED_CHARS = 2**24  # of their text: a row may bring thousands of choices


class Grammars(Protocol):
    """What can be known of the grammars of rows with `sampling.structured_outputs`."""

    def tokens_needed(self, sampling: SamplingConfig) -> int:
        """The fewest tokens of an answer; PromptError where there is no such grammar. May take seconds: it compiles."""


class RowSamplings:
    """Of one run. PromptError where the run's own sampling cannot work.

    `vocab_size` and `eos_token_ids` are the model's; without a tokenizer, stop texts and grammars are refused.
    """

    def __init__(
        self,
        base: SamplingConfig,
        has_tokenizer: bool,
        vocab_size: int,
        grammars: Grammars | None,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._base = base
        self._has_tokenizer = has_tokenizer
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._eos_token_ids = frozenset(eos_token_ids)
        self._cached: dict[str, SamplingConfig | PromptError] = {}
        self._cached_chars = 0
        # id of a row that was put aside: its sampling, or why it has none
        self._prepared: dict[int, SamplingConfig | PromptError | RecursionError] = {}
        self._check(base)

    def needs_grammar(self, row: InputRow) -> bool:
        """Whether the row has a grammar of its own that is not compiled."""
        if row.error is not None or not row.sampling or row.sampling.get("structured_outputs") is None:
            return False
        return repr(row.sampling) not in self._cached

    def prepare(self, row: InputRow) -> None:
        """Compile the row's own grammar."""
        try:
            self._prepared[id(row)] = self.merged(row.sampling)
        except (PromptError, RecursionError) as error:
            self._prepared[id(row)] = error

    def of(self, row: InputRow) -> SamplingConfig:
        """The row's sampling; PromptError or RecursionError where it has none."""
        if id(row) not in self._prepared:
            return self.merged(row.sampling)
        found = self._prepared.pop(id(row))
        if isinstance(found, PromptError | RecursionError):
            raise found
        return found

    def merged(self, overrides: Mapping[str, Any] | None) -> SamplingConfig:
        """The sampling of one row: the job's own instance, or one that all rows with these overrides share. PromptError
        or RecursionError where no row can have it."""
        if not overrides or all(value is None for value in overrides.values()):
            return self._base
        key = repr(overrides)
        sampling = self._cached.get(key)
        if sampling is None:
            try:
                sampling = override_sampling(self._base, overrides)
                self._check(sampling)
            except (ValueError, PromptError) as error:
                sampling = PromptError(str(error))
            if len(self._cached) >= _CACHED_SAMPLINGS or self._cached_chars > _CACHED_CHARS:
                self._cached.clear()
                self._cached_chars = 0
            self._cached[key] = sampling
            self._cached_chars += len(key)
        if isinstance(sampling, PromptError):
            raise sampling
        return sampling

    def _check(self, sampling: SamplingConfig) -> None:
        for key in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(sampling, key) or ():
                if not 0 <= token < self._vocab_size:
                    size = self._vocab_size
                    raise PromptError(f"sampling.{key} has token {token}; the model's vocabulary has {size}")
        if sampling.min_tokens:
            ending = self._eos_token_ids | set(sampling.stop_token_ids or ())
            choosable = range(self._vocab_size) if sampling.allowed_token_ids is None else sampling.allowed_token_ids
            if len(ending) >= len(set(choosable)) and ending.issuperset(choosable):
                raise PromptError(
                    f"sampling.min_tokens={sampling.min_tokens}: every token that could be chosen ends the text"
                )
        if (sampling.logprobs or 0) > self._vocab_size:
            raise PromptError(f"sampling.logprobs={sampling.logprobs}: the model's vocabulary has {self._vocab_size}")
        if sampling.stop and not self._has_tokenizer:
            raise PromptError("sampling.stop needs a tokenizer, and the model folder has none; use stop_token_ids")
        needed = self.tokens_needed(sampling)
        if needed > sampling.max_tokens:
            raise PromptError(
                f"sampling.max_tokens={sampling.max_tokens}: the shortest text that sampling.structured_outputs allows"
                f" has {needed} tokens"
            )

    def tokens_needed(self, sampling: SamplingConfig) -> int:
        """The tokens of the shortest text that a row's grammar allows, of the longest choice that is scored; else 0."""
        if sampling.structured_outputs is None:
            return 0
        if self._grammars is None:
            raise PromptError("sampling.structured_outputs needs a tokenizer, and the model folder has none")
        return self._grammars.tokens_needed(sampling)
