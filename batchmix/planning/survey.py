"""What is in a data set, as a run would see it: lengths, refused rows, and what naive batching would waste."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchmix.observability.error_reasons import ErrorReasons
from batchmix.records import Prompt

_BINS, _BAR = 12, 40  # rows and columns of the histogram in text


@dataclass
class Survey:
    """Counts over a stream of prompts; its memory does not grow with their number.

    `naive_batch`: rows of the batch, in input order and padded to its longest, that padding is reckoned for.
    """

    naive_batch: int
    rows: int = 0
    refused: ErrorReasons = field(default_factory=ErrorReasons)
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1024, np.int64))  # rows of each length
    padded_tokens: int = 0
    samples: int = 0
    _batch: list[int] = field(default_factory=list)

    def watch(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """The same prompts, counted on their way."""
        for prompt in prompts:
            self.rows += 1
            if prompt.error is not None:
                self.refused.add(prompt.row, prompt.error)
            else:
                self._count(len(prompt.token_ids))
                self.samples += prompt.num_samples
            yield prompt
        self._end_batch()

    def _count(self, length: int) -> None:
        if length >= len(self.lengths):
            self.lengths = np.pad(self.lengths, (0, max(length + 1, 2 * len(self.lengths)) - len(self.lengths)))
        self.lengths[length] += 1
        self._batch.append(length)
        if len(self._batch) == self.naive_batch:
            self._end_batch()

    def _end_batch(self) -> None:
        if self._batch:
            self.padded_tokens += max(self._batch) * len(self._batch)
        self._batch = []

    @property
    def runnable(self) -> int:
        """Rows that can run."""
        return int(self.lengths.sum())

    @property
    def prompt_tokens(self) -> int:
        """Of the rows that can run."""
        return int(self.lengths @ np.arange(len(self.lengths)))

    @property
    def squared_tokens(self) -> int:
        """The sum of the squares of the lengths."""
        return int(self.lengths @ np.arange(len(self.lengths)) ** 2)

    @property
    def naive_padding(self) -> float:
        """Share of the naive batches' tokens that would be padding."""
        return 1 - self.prompt_tokens / self.padded_tokens if self.padded_tokens else 0.0

    def prompt_tokens_error(self, total: int) -> float:
        """Half the 95 % interval of the prompt tokens of `total` rows, as a share of them, if these rows were drawn from
        all at random without replacement (Cochran, "Sampling techniques", 1977, section 2.6)."""
        mean = self.prompt_tokens / max(1, self.rows)
        if self.rows < 2 or not mean or total <= self.rows:
            return 0.0
        variance = (self.squared_tokens - self.rows * mean**2) / (self.rows - 1)
        return 1.96 * math.sqrt(max(0.0, variance) / self.rows * (1 - self.rows / total)) / mean

    def percentile(self, share: float) -> int:
        """The smallest length that at least `share` of the rows do not exceed."""
        return int(np.searchsorted(self.lengths.cumsum(), share * self.runnable))

    def histogram(self) -> str:
        """The distribution of lengths as lines of text."""
        if not self.runnable:
            return "no row can run"
        longest = int(np.flatnonzero(self.lengths)[-1])
        width = -(-(longest + 1) // _BINS)
        counts = [int(self.lengths[low : low + width].sum()) for low in range(0, longest + 1, width)]
        scale = _BAR / max(counts)
        return "\n".join(
            f"  {low:>6}-{low + width - 1:<6} {'█' * round(count * scale):<{_BAR}} {count:,}"
            for low, count in zip(range(0, longest + 1, width), counts, strict=True)
        )
