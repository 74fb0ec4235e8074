"""The columns that a task adds to its run's own: typed values of each answer, and what the samples of a row say together.

They are made where completions become records, in the sink, and not in a pass over the finished run: a row is committed
with all its samples at once, so a majority can be taken there, and the promises of the output (a row exactly once, a killed
run goes on, shards, redo, every format) hold for these columns as they do for the text, because there is no second set
of files that could be behind the first. The cost is that a changed schema needs a new run; the old texts are in
`generated_text`.

A record is one sample. Its typed fields are its own; `majority` marks one sample of each row, the first of those that
gave the row's most frequent answer, so `filter(majority)` is one record a row. `agreement` is the share of the row's
valid samples that gave that answer and `entropy` (nats) that of the distribution of answers; both are null where no
sample is valid. Answers are compared as a whole, so that the fields of a majority record come from one answer.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from batchmix.annotate.answer import Answer, Choice, Invalid
from batchmix.annotate.arrow_types import Field
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.task import answer_of
from batchmix.records import Completion

CONFIDENCE = Field("confidence", pa.float64())  # probability of the sample's answer
INVALID = Field("invalid", pa.string())  # why the text is no answer
MAJORITY = Field("majority", pa.bool_())
AGREEMENT = Field("agreement", pa.float64())
ENTROPY = Field("entropy", pa.float64())
CONSISTENT = "consistent"  # with swapped columns: the answer of both orders where they agree, else null
ALWAYS = (CONFIDENCE, INVALID, MAJORITY, AGREEMENT, ENTROPY)


def annotation_columns(task: AnnotateConfig) -> AnnotationColumns | None:
    """The columns of a prepared task; None where there is no task."""
    answer = answer_of(task)
    return None if answer is None else AnnotationColumns(answer, task.swap_labels)


class AnnotationColumns:
    """Makes the columns of a task. `swap_labels` change places in the odd samples, whose prompt had its columns swapped."""

    def __init__(self, answer: Answer, swap_labels: Sequence[str] | None) -> None:
        self.answer = answer
        self.fields = [*answer.fields, *ALWAYS]
        self._swap: dict[str, str] = {}
        if swap_labels is not None:
            assert isinstance(answer, Choice)
            first, second = swap_labels
            self._swap = {first: second, second: first}
            kind = answer.fields[0]
            self.fields.append(Field(CONSISTENT, kind.type, kind.labels))

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([field.arrow for field in self.fields])

    def arrays(self, completions: Sequence[Completion]) -> list[pa.Array]:
        """One array for each field. Completions of one row stand side by side."""
        records: list[dict[str, Any]] = []
        for _, samples in groupby(completions, key=lambda completion: completion.prompt.row):
            records += self._row(list(samples))
        return [field.column([record.get(field.name) for record in records]) for field in self.fields]

    def _row(self, samples: list[Completion]) -> Iterator[dict[str, Any]]:
        """The records of one row's samples."""
        parsed = [self._parse(sample) for sample in samples]
        keys = [None if values is None else json.dumps(values, sort_keys=True) for values, _ in parsed]
        votes = Counter(key for key in keys if key is not None)
        shared: dict[str, Any] = {}
        winner = 0
        if votes:
            best, count = votes.most_common(1)[0]  # of equals, the first seen
            winner = keys.index(best)
            shares = [number / votes.total() for number in votes.values()]
            shared[AGREEMENT.name] = count / votes.total()
            shared[ENTROPY.name] = max(0.0, -sum(share * math.log(share) for share in shares))
            if self._swap and count == len(samples):
                shared[CONSISTENT] = (parsed[winner][0] or {}).get(self.answer.fields[0].name)
        for place, (sample, (found, reason)) in enumerate(zip(samples, parsed, strict=True)):
            own = {CONFIDENCE.name: None if found is None else confidence(sample, self.answer), INVALID.name: reason}
            yield {**(found or {}), **own, MAJORITY.name: place == winner, **shared}

    def _parse(self, sample: Completion) -> tuple[dict[str, Any] | None, str | None]:
        """The sample's values, or why there are none; neither for a row that could not be run."""
        if sample.error is not None:
            return None, None
        try:
            values = self.answer.parse(sample.text or "")
        except Invalid as error:
            cut = "cut off at sampling.max_tokens: " if sample.finish_reason == "length" else ""
            return None, f"{cut}{error}"
        if self._swap and sample.sample_index % 2:
            values = {name: self._swap.get(value, value) for name, value in values.items()}
        return values, None


def confidence(sample: Completion, answer: Answer) -> float | None:
    """The probability of a valid answer.

    Of the choice among all choices, where they were scored. Of a guided text, that of its tokens among those which the
    grammar allowed, as far as they say what the answer is. Else that of all tokens, where sampling.logprobs asked for them.
    """
    outputs = sample.prompt.sampling.structured_outputs
    if sample.choice_probabilities is not None and outputs is not None and outputs.choice is not None:
        return float(sample.choice_probabilities[outputs.choice.index(sample.text or "")])
    if sample.guided_logprobs is not None:
        return math.exp(sum(_of_decisions(sample, answer)))
    if sample.cumulative_logprob is None:
        return None
    return min(1.0, math.exp(sample.cumulative_logprob))


def _of_decisions(sample: Completion, answer: Answer) -> list[float]:
    """The log-probabilities of the tokens that have a part in what the text decides."""
    text, logprobs, ends = sample.text or "", list(sample.guided_logprobs or ()), sample.token_ends
    assert ends is not None
    spans = [(len(text[:low].encode()), len(text[:high].encode())) for low, high in answer.decisions(text)]
    if not spans:
        return logprobs
    tokens = zip([0, *ends], ends, logprobs, strict=False)
    return [logprob for start, end, logprob in tokens if any(start < high and end > low for low, high in spans)]
