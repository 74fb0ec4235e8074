"""The rows that the report shows, and the lengths of all."""

from __future__ import annotations

import heapq
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchmix.annotate.checks import Gold, certainty_of, label_of
from batchmix.annotate.columns import AGREEMENT, CONFIDENCE, INVALID
from batchmix.annotate.prompts import RowPrompts
from batchmix.annotate.results import Results

_TEXT_CHARS = 4000  # of a prompt or an answer
_SHARED_CHARS = 200  # a beginning that prompts share is shown once from this length on


@dataclass
class Sample:
    """What one pass over the records finds, and the rows to show."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    shared_prompt: str = ""
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    num_rows: int = 0
    num_errors: int = 0

    @property
    def description(self) -> str:
        shown = len(self.rows)
        if shown == self.num_rows:
            return f"All {shown:,} rows."
        return (f"{shown:,} of {self.num_rows:,} rows: rows with errors and the least certain ones (a quarter each, at most),"
                " the rest by chance.")  # fmt: skip


def read_sample(results: Results, gold: Any, num_rows: int) -> Sample:
    """Memory grows with `num_rows`, not with the run. Which rows are shown depends on them, not on the order of parts."""
    sample = Sample(lengths={"prompt": Counter(), "completion": Counter()})
    if not results.names:
        return sample
    chosen = _choose(results, num_rows, sample)
    shown = _Shown(results, gold)
    wanted = pa.array(sorted(chosen), pa.int64())
    for table in results.batches():
        for row in table.filter(pc.is_in(table["row"], value_set=wanted)).to_pylist():
            sample.rows.append(shown.of(row))
    sample.rows.sort(key=lambda row: row["row"])
    prompts = [row["prompt"] for row in sample.rows if row["prompt"]]
    shared = _common_beginning(prompts) if len(prompts) > 1 else ""
    if len(shared) >= _SHARED_CHARS:
        sample.shared_prompt = _cut(shared)
        for row in sample.rows:
            row["prompt"] = "… " + row["prompt"][len(shared) :] if row["prompt"] else ""
    for row in sample.rows:
        row.update(prompt=_cut(row["prompt"]), answer=_cut(row["answer"]), gold=_cut(row["gold"]))
    return sample


def _choose(results: Results, num_rows: int, sample: Sample) -> set[int]:
    """The rows to show; fills the counts of `sample`."""
    kinds: dict[str, list[tuple[float, int]]] = {"error": [], "unsure": [], "chance": []}
    room = {"error": num_rows // 4, "unsure": num_rows // 4, "chance": num_rows}
    names = ["row", "error", "prompt_tokens", "completion_tokens", CONFIDENCE.name, AGREEMENT.name, INVALID.name]
    for row in results.rows(names):
        number, chance = row["row"], zlib.crc32(str(row["row"]).encode())
        sample.num_rows += 1
        failed = row["error"] is not None
        sample.num_errors += failed
        if not failed:
            sample.lengths["prompt"][row["prompt_tokens"] or 0] += 1
            sample.lengths["completion"][row["completion_tokens"] or 0] += 1
        certainty = certainty_of(row) if results.answer is not None else None
        keys = {"chance": float(chance)}
        if failed or row.get(INVALID.name) is not None:
            keys["error"] = float(chance)
        elif certainty is not None:
            keys["unsure"] = certainty
        for kind, key in keys.items():  # the smallest keys: a heap of their negatives, the largest on top
            if room[kind]:
                entry = (-key, number)
                (heapq.heappushpop if len(kinds[kind]) >= room[kind] else heapq.heappush)(kinds[kind], entry)
    chosen: dict[int, None] = {}
    for kind in ("error", "unsure", "chance"):
        chosen |= dict.fromkeys(number for _, number in sorted(kinds[kind], reverse=True))
    return set(list(chosen)[:num_rows])


class _Shown:
    """A record as the table shows it."""

    def __init__(self, results: Results, gold: Any) -> None:
        self._answer = results.answer
        self._gold = (
            Gold(results, results.answer.fields, gold) if results.answer is not None and gold is not None else None
        )
        self._prompts = RowPrompts(results)

    def of(self, row: dict[str, Any]) -> dict[str, Any]:
        gold = self._gold.of(row) if self._gold is not None and row["error"] is None else None
        right = (
            None if gold is None else all(label_of(row.get(name)) == label_of(value) for name, value in gold.items())
        )
        return {
            "row": row["row"],
            "id": row["id"],
            "prompt": self._prompts.of(row),
            "answer": row["generated_text"] or "",
            "confidence": certainty_of(row) if self._answer is not None else None,
            "gold": "" if gold is None else json.dumps(gold, ensure_ascii=False),
            "right": right,
            "error": row["error"] if row["error"] is not None else row.get(INVALID.name),
        }


def _common_beginning(texts: list[str]) -> str:
    low, high = min(texts), max(texts)  # what these two share, all do
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else f"{text[:_TEXT_CHARS]}… ({len(text) - _TEXT_CHARS:,} more characters)"
