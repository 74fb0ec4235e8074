"""The rows that the report shows, and the lengths of all."""

from __future__ import annotations

import heapq
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchmix.annotate.checks import Gold, certainty_of, label_of
from batchmix.annotate.columns import AGREEMENT, CONFIDENCE, INVALID, MAJORITY
from batchmix.annotate.prompts import RowPrompts
from batchmix.annotate.results import Results

_TEXT_CHARS = 4000  # of a prompt or an answer
_SAMPLES_CHARS = 16_000  # of all samples of a row together, but
_LEAST_SAMPLE_CHARS = 200  # of each sample
_SHARED_CHARS = 200  # a beginning that prompts share is shown once from this length on


@dataclass(frozen=True)
class ShownSample:
    """One answer to a row; `note` says what there is to know of it beside its text."""

    text: str
    majority: bool
    note: str


@dataclass(frozen=True)
class PeopleAnswer:
    """What people say of one field."""

    field: str
    label: str
    differs: bool  # from the model's answer


@dataclass
class ShownRow:
    """A row as the table shows it. `certainty` orders the rows, `confidence` is what a person reads of it."""

    row: int
    id: str
    prompt: str
    samples: list[ShownSample]
    people: list[PeopleAnswer]
    certainty: float | None
    confidence: str
    error: str | None  # of the majority's sample: why it has no answer, or no valid one

    @property
    def disagrees(self) -> bool:
        return any(answer.differs for answer in self.people)

    @property
    def order(self) -> tuple[int, float, int]:
        """Errors come first, then disagreements with people, then all others; the least certain first in each."""
        group = 0 if self.error is not None else 1 if self.disagrees else 2
        return group, math.inf if self.certainty is None else self.certainty, self.row


@dataclass
class Sample:
    """What one pass over the records finds, and the rows to show."""

    rows: list[ShownRow] = field(default_factory=list)
    shared_prompt: str = ""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    num_rows: int = 0
    num_errors: int = 0

    @property
    def description(self) -> str:
        shown = len(self.rows)
        if shown == self.num_rows:
            return f"All {shown:,} rows."
        return (f"{shown:,} of {self.num_rows:,} rows: rows without a valid answer, rows where model and people disagree, and the"
                " least certain rows (at most a quarter each); the others are drawn by chance.")  # fmt: skip


def read_sample(results: Results, gold: Any, num_rows: int) -> Sample:
    """Memory grows with `num_rows`, not with the run. Which rows are shown depends on them, not on the order of parts."""
    sample = Sample(lengths={"prompt": Counter(), "completion": Counter()})
    if not results.names:
        return sample
    answer = results.answer
    truth = Gold(results, answer.fields, gold) if answer is not None and gold is not None else None
    wanted = pa.array(sorted(_choose(results, truth, num_rows, sample)), pa.int64())
    records: dict[int, list[dict[str, Any]]] = {}
    for table in results.batches(samples=True):
        for record in table.filter(pc.is_in(table["row"], value_set=wanted)).to_pylist():
            records.setdefault(record["row"], []).append(record)
    prompts = RowPrompts(results)
    sample.rows = sorted((_shown(results, truth, prompts, records.pop(row)) for row in list(records)),
                         key=lambda row: row.order)  # fmt: skip
    known = [row.prompt for row in sample.rows if row.prompt]
    shared = _common_beginning(known) if len(known) > 1 else ""
    if len(shared) >= _SHARED_CHARS:
        sample.shared_prompt = _cut(shared)
        for row in sample.rows:
            row.prompt = "… " + row.prompt[len(shared) :] if row.prompt else ""
    for row in sample.rows:
        row.prompt = _cut(row.prompt)
    return sample


def _choose(results: Results, truth: Gold | None, num_rows: int, sample: Sample) -> set[int]:
    """The rows to show; fills the counts of `sample`."""
    kinds: dict[str, list[tuple[float, int]]] = {"error": [], "disagrees": [], "unsure": [], "chance": []}
    room = {kind: num_rows if kind == "chance" else -(-num_rows // 4) for kind in kinds}
    names = ["row", "error", "prompt_tokens", "completion_tokens", CONFIDENCE.name, AGREEMENT.name, INVALID.name]
    if results.answer is not None and truth is not None:
        names += [*(known.name for known in results.answer.fields), *truth.columns]
    for row in results.rows(names):
        number, chance = row["row"], float(zlib.crc32(str(row["row"]).encode()))
        sample.num_rows += 1
        failed = row["error"] is not None
        sample.num_errors += failed
        if not failed:
            sample.lengths["prompt"][row["prompt_tokens"] or 0] += 1
            sample.lengths["completion"][row["completion_tokens"] or 0] += 1
        keys = {"chance": chance}
        if failed or row.get(INVALID.name) is not None:
            keys["error"] = chance
        elif results.answer is not None:
            certainty = certainty_of(row)
            if certainty is not None and certainty < 1:
                keys["unsure"] = certainty
            if any(answer.differs for answer in _people(results, truth, row)):
                keys["disagrees"] = chance
        for kind, key in keys.items():  # the smallest keys: a heap of their negatives, the largest on top
            if room[kind]:
                entry = (-key, number)
                (heapq.heappushpop if len(kinds[kind]) >= room[kind] else heapq.heappush)(kinds[kind], entry)
    chosen = dict.fromkeys(number for kind in kinds for _, number in sorted(kinds[kind], reverse=True))
    return set(list(chosen)[:num_rows])


def _people(results: Results, truth: Gold | None, record: dict[str, Any]) -> Iterator[PeopleAnswer]:
    """What people say of a majority record's fields; nothing of those that they left out, or where the row has no answer."""
    gold = truth.of(record) if truth is not None and record["error"] is None else None
    if gold is None or results.answer is None:
        return
    for known in results.answer.fields:
        if known.name in gold:
            label = label_of(gold[known.name])
            yield PeopleAnswer(known.name, _cut(label), label != label_of(record[known.name]))


def _shown(results: Results, truth: Gold | None, prompts: RowPrompts, records: list[dict[str, Any]]) -> ShownRow:
    """A row, from the records of all its samples."""
    records.sort(key=lambda record: record["sample_index"])
    task = results.answer is not None
    chosen = next(record for record in records if record[MAJORITY.name]) if task else records[0]
    several = len(records) > 1
    limit = min(_TEXT_CHARS, max(_LEAST_SAMPLE_CHARS, _SAMPLES_CHARS // len(records)))
    samples = [
        ShownSample(_cut(record["generated_text"] or "", limit), several and task and record is chosen,
                    _note(results, record) if several else "")
        for record in records
    ]  # fmt: skip
    invalid = chosen[INVALID.name] if task else None
    scored = task and chosen[CONFIDENCE.name] is not None
    certainty = None
    if task and (scored or several or invalid is not None):  # one sample agrees with itself, which says nothing
        certainty = certainty_of(chosen)
    return ShownRow(
        row=chosen["row"],
        id=chosen["id"],
        prompt=prompts.of(chosen),
        samples=samples,
        people=list(_people(results, truth, chosen)),
        certainty=certainty,
        confidence="" if certainty is None or invalid else f"{certainty:.3f}{'' if scored else ' (agreement)'}",
        error=chosen["error"] if chosen["error"] is not None else invalid,
    )


def _note(results: Results, record: dict[str, Any]) -> str:
    """Of one sample of several: why it has no valid answer, else how sure it is and what it means."""
    reason: str | None = record["error"]
    if reason is not None or results.answer is None:
        return reason or ""
    if record[INVALID.name] is not None:
        return f"invalid: {record[INVALID.name]}"
    notes = []
    if record[MAJORITY.name]:
        notes.append(f"agreement {record[AGREEMENT.name]:.3f}")
    if record[CONFIDENCE.name] is not None:
        notes.append(f"confidence {record[CONFIDENCE.name]:.3f}")
    if results.task.swap_labels is not None and record["sample_index"] % 2:
        notes.append(f"columns were swapped: means {label_of(record[results.answer.fields[0].name])}")
    return ", ".join(notes)


def _common_beginning(texts: list[str]) -> str:
    low, high = min(texts), max(texts)  # what these two share, all do
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]


def _cut(text: str, limit: int = _TEXT_CHARS) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"
