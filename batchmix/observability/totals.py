"""What a set of completions adds up to."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchmix.records import Completion


@dataclass
class Totals:
    """Counts of rows, samples and tokens. Prompt tokens are counted once a row, whatever its number of samples."""

    rows: int = 0
    error_rows: int = 0  # with a sample that failed; while counting, with a first one that did
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: dict[str, int] = field(default_factory=dict)  # by sample

    def add(self, other: Totals) -> None:
        """Count what `other` has counted too."""
        self.rows += other.rows
        self.error_rows += other.error_rows
        self.samples += other.samples
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        for reason, count in other.finish_reasons.items():
            self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + count

    def count(self, completion: Completion) -> None:
        """Add one sample. A row counts with its first sample; one that could not be run comes once for all of them."""
        samples = completion.prompt.sampling.n if completion.prompt.error is not None else 1
        self.samples += samples
        self.finish_reasons[completion.finish_reason] = self.finish_reasons.get(completion.finish_reason, 0) + samples
        self.completion_tokens += completion.num_tokens
        if completion.sample_index == 0:
            self.rows += 1
            self.error_rows += completion.error is not None
            self.prompt_tokens += len(completion.prompt.token_ids)
