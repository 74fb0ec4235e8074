"""What the labels of a finished run are, and how they compare with people's: `.batchmix/checks.json`."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from batchmix.annotate.arrow_types import Field
from batchmix.annotate.columns import AGREEMENT, CONFIDENCE, CONSISTENT, INVALID
from batchmix.annotate.metrics import agreement_report, calibration_bin, calibration_report, share_report
from batchmix.annotate.results import Results
from batchmix.errors import BatchmixError
from batchmix.storage import Storage, find_json, write_json, written
from batchmix.storage.bookkeeping import CHECKS

NO_ANSWER = "(no answer)"
_SHOWN_FOREIGN = 5  # gold values that are no label
_MOST_CLASSES = 50  # an integer with more values is a number rather than a class
_MOST_LABELS = 1000  # distinct values counted of a field
_DISAGREEMENTS = 20


def check_results(results: Results, gold: Any, resamples: int) -> dict[str, Any]:
    """Counts of the labels, the least certain rows and, with `gold` (see annotate.gold), the agreement with it.

    One pass over the majority records. Memory does not grow with the rows.
    """
    if results.answer is None:
        raise BatchmixError(
            f"output.dir={results.url}: was not made by batchmix annotate, so it has no labels to check"
        )
    fields = results.answer.fields
    truth = None if gold is None else Gold(results, fields, gold)
    counts = _Counts(fields, truth)
    names = [*(field.name for field in fields), "row", "id", "error", INVALID.name, CONFIDENCE.name, AGREEMENT.name]
    if CONSISTENT in results.schema.names:
        names.append(CONSISTENT)
    for row in results.rows([*names, *(truth.columns if truth else ())]):
        counts.add(row)
    return counts.report(resamples)


def write_checks(results: Results, gold: Any, resamples: int) -> dict[str, Any]:
    """The same, kept beside the parts."""
    checks = check_results(results, gold, resamples)
    with written(results.url, "output.dir"):
        write_json(results.storage, CHECKS, checks)
    return checks


def read_checks(storage: Storage) -> dict[str, Any] | None:
    found: dict[str, Any] | None = find_json(storage, CHECKS)
    return found


def check_fields(gold: dict[str, Any], fields: Sequence[Field]) -> None:
    """BatchmixError where a mapping of fields to columns of people's answers names a field that answers do not have."""
    names = [field.name for field in fields]
    for name in gold:
        if name not in names:
            raise BatchmixError(f"annotate.gold={gold}: {name} is no field of the answer; those are {', '.join(names)}")


class Gold:
    """People's answers of a row: a column of labels, of JSON or of objects, or a column for each field."""

    def __init__(self, results: Results, fields: list[Field], gold: Any) -> None:
        self._by_field: dict[str, str] = {}
        self._whole: str | None = None
        if isinstance(gold, dict):
            check_fields(gold, fields)
        given = gold if isinstance(gold, dict) else {None: gold}
        for field, name in given.items():
            column = results.column_of(str(name))
            if column is None:
                raise BatchmixError(f"annotate.gold={gold}: the rows have no column {name!r}; they have"
                                    f" {', '.join(results.schema.names)}")  # fmt: skip
            if field is None:
                self._whole = column
            else:
                self._by_field[field] = column
        if self._whole is not None and len(fields) == 1:
            self._by_field, self._whole = {fields[0].name: self._whole}, None
        self._single = fields[0].name if len(fields) == 1 else None
        self.columns = [self._whole] if self._whole else list(self._by_field.values())

    def of(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The fields that people filled in; None where they did not."""
        if self._whole is None:
            found = {field: row[column] for field, column in self._by_field.items() if row[column] is not None}
            return {field: self._unwrap(field, value) for field, value in found.items()} or None
        value = row[self._whole]
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise self._no_object(row) from None
        if value is not None and not isinstance(value, dict):
            raise self._no_object(row)
        return value

    def _no_object(self, row: dict[str, Any]) -> BatchmixError:
        return BatchmixError(
            f"annotate.gold={self._whole}: row {row['row']} holds no JSON object; a column of one field's labels is written"
            f" annotate.gold={{FIELD: {self._whole}}}. The answers are kept: batchmix report output.dir=... annotate.gold=..."
            " compares them"
        )

    def _unwrap(self, field: str, value: Any) -> Any:
        """`{"score": 3}`, or its JSON, in the one gold column of a task with the one field `score`, is 3."""
        if field != self._single:
            return value
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError:
                return value
        return value[field] if isinstance(value, dict) and field in value else value


class _Counts:
    def __init__(self, fields: list[Field], truth: Gold | None) -> None:
        self._fields = fields
        self._truth = truth
        self._labels: dict[str, Counter[str]] = {field.name: Counter() for field in fields}
        self._pairs: dict[str, Counter[tuple[str, str]]] = {field.name: Counter() for field in fields}
        self._hits: dict[str, Counter[bool]] = {field.name: Counter() for field in fields}
        self._exact: Counter[bool] = Counter()
        self._bins: dict[tuple[int, bool], tuple[int, float]] = {}
        self._rows = self._errors = self._invalid = self._consistent = 0
        self._has_consistent = False
        self._error: str | None = None  # of the first row that could not be run
        self._least: list[tuple[float, int, dict[str, Any]]] = []  # a heap, the most certain on top

    def add(self, row: dict[str, Any]) -> None:
        self._rows += 1
        if row["error"] is not None:
            self._errors += 1
            self._error = self._error or row["error"]
        self._invalid += row[INVALID.name] is not None
        if CONSISTENT in row:
            self._has_consistent = True
            self._consistent += row[CONSISTENT] is not None
        for field in self._fields:
            value = row[field.name]
            if value is not None and len(self._labels[field.name]) < _MOST_LABELS:
                self._labels[field.name].update(_values(value))
        certainty = certainty_of(row)
        if certainty is not None and certainty < 1:
            entry = (-certainty, -row["row"], {"row": row["row"], "id": row["id"], "certainty": certainty})
            (heapq.heappushpop if len(self._least) >= _DISAGREEMENTS else heapq.heappush)(self._least, entry)
        gold = self._truth.of(row) if self._truth is not None and row["error"] is None else None
        if gold is not None:
            self._compare(row, gold, certainty)

    def _compare(self, row: dict[str, Any], gold: dict[str, Any], certainty: float | None) -> None:
        exact = True
        for field in self._fields:
            if field.name not in gold:
                continue
            said, true = label_of(row[field.name]), label_of(gold[field.name])
            exact &= said == true
            self._hits[field.name][said == true] += 1
            if field.is_class and len(self._pairs[field.name]) <= _MOST_CLASSES**2:
                self._pairs[field.name][true, said] += 1
        self._exact[exact] += 1
        if certainty is not None:
            key = calibration_bin(certainty), exact
            rows, total = self._bins.get(key, (0, 0.0))
            self._bins[key] = rows + 1, total + certainty

    def report(self, resamples: int) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": self._rows, "error_rows": self._errors, "invalid_rows": self._invalid}
        if self._has_consistent:
            found["consistent_rows"] = self._consistent
        if self._error is not None:
            found["error_example"] = self._error
        found["fields"] = {field.name: self._field(field, resamples) for field in self._fields}
        found["least_certain"] = [entry for _, _, entry in sorted(self._least, key=lambda e: (-e[0], -e[1]))]
        if self._exact:
            found["exact_match"] = share_report(self._exact[True], self._exact.total())
        if self._bins:
            found["calibration"] = calibration_report(self._bins, resamples)
        return found

    def _field(self, field: Field, resamples: int) -> dict[str, Any]:
        labels = self._labels[field.name]
        known = {label: labels[label] for label in field.labels or ()}
        entry: dict[str, Any] = {"labels": known | dict(labels.most_common(_MOST_CLASSES)), "distinct": len(labels)}
        if hits := self._hits[field.name]:
            entry["exact_match"] = share_report(hits[True], hits.total())
        pairs = self._pairs[field.name]
        foreign = Counter[str]()
        for (gold, _), rows in pairs.items():
            if field.labels and gold not in field.labels:
                foreign[gold] += rows
        if foreign:
            entry["foreign_gold"] = dict(foreign.most_common(_SHOWN_FOREIGN))
            entry["foreign_gold_rows"] = foreign.total()
        if pairs and len({label for pair in pairs for label in pair}) <= _MOST_CLASSES + 1:
            entry["agreement"] = agreement_report(pairs, resamples)
        return entry


def certainty_of(row: dict[str, Any]) -> float | None:
    """How sure a majority record is: its confidence, or else the samples' agreement; 0 where it is no answer, None where
    the row could not be run."""
    if row["error"] is not None:
        return None
    if row[INVALID.name] is not None:
        return 0.0
    found: float | None = row[AGREEMENT.name] if row[CONFIDENCE.name] is None else row[CONFIDENCE.name]
    return found


def label_of(value: Any) -> str:
    """A value as the label that tables and plots show; equal values have equal labels."""
    if value is None:
        return NO_ANSWER
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _values(value: Any) -> Iterator[str]:
    """What of a value is counted: a list's items one by one."""
    yield from (map(label_of, value) if isinstance(value, list) else [label_of(value)])


def _gold_labels(agreement: dict[str, Any]) -> set[str]:
    return {label for label, row in zip(agreement["labels"], agreement["confusion"], strict=True) if any(row)}


def checks_text(checks: dict[str, Any]) -> str:
    """The few lines for the end of a run."""

    def of(share: dict[str, Any]) -> str:
        return f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"

    lines = [f"labels: {checks['rows'] - checks['error_rows'] - checks['invalid_rows']:,} of {checks['rows']:,} rows"]
    if checks["invalid_rows"]:
        lines[0] += f", {checks['invalid_rows']:,} answers are invalid (column invalid)"
    if checks["error_rows"]:
        lines.append(
            f"rows without an answer (column error): {checks['error_rows']:,}, for example: {checks['error_example']}"
        )
    if "exact_match" in checks:
        exact = checks["exact_match"]
        lines.append(f"exact match with people's answers: {of(exact)} of {exact['rows']:,} rows")
    for name, field in checks["fields"].items():
        if agreement := field.get("agreement"):
            kappa = agreement["kappa"]["value"]
            lines.append(f"{name}: accuracy {of(agreement['accuracy'])}"
                         + (f", kappa {kappa:.3f}" if kappa is not None else ""))  # fmt: skip
            if not _gold_labels(agreement) & set(field["labels"]):
                lines.append(f"  no gold value of {name} is one of its labels: is annotate.gold the right column?")
            elif foreign := field.get("foreign_gold"):
                lines.append(
                    f"  gold values of {name} that are none of its labels, which count as wrong:"
                    f" {field['foreign_gold_rows']:,} ({', '.join(f'{label!r} {n:,}' for label, n in foreign.items())})"
                )
    if "calibration" in checks:
        lines.append(f"expected calibration error: {checks['calibration']['expected_calibration_error']['value']:.3f}")
    return "\n".join(lines)
