"""How well two labellings agree, from the counts of their pairs alone.

Counts are all that is kept of the rows, so any number of them is checked in one pass, and a bootstrap costs the same for a
thousand rows and a billion: drawing n rows with replacement is one multinomial draw over the kinds of row there are.
(scikit-learn's functions take the rows themselves, a thousand times over; the tests compare with it.)

Definitions: precision, recall and F1 as in sklearn.metrics.precision_recall_fscore_support (null where undefined); Cohen's
kappa as in Cohen, "A coefficient of agreement for nominal scales", 1960; the expected calibration error as in Guo et al.,
"On calibration of modern neural networks", 2017, over ten bins of equal width. Intervals are of 95 %: Wilson's of shares of rows (accuracy, precision, recall), of the
others the 2.5th and 97.5th percentiles of the resamples.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NUM_BINS = 10
_Z = 1.959963984540054  # of 95 %
_EDGES = [(index + 1) / NUM_BINS for index in range(NUM_BINS)]


def agreement_report(pairs: Mapping[tuple[str, str], int], resamples: int, seed: int = 0) -> dict[str, Any]:
    """Accuracy, kappa, macro F1 and each class's precision, recall and F1, with intervals, and the confusion matrix.

    `pairs`: (gold, predicted) -> rows. `confusion` has a row for each gold label, in the order of `labels`.
    """
    labels = sorted({label for pair in pairs for label in pair})
    place = {label: index for index, label in enumerate(labels)}
    cells = sorted(pairs)
    counts = np.array([[pairs[cell] for cell in cells]], np.float64)
    gold, predicted = (np.array([place[cell[side]] for cell in cells]) for side in (0, 1))
    value = _scores(counts, gold, predicted, len(labels))
    drawn = _scores(_resample(counts[0], resamples, seed), gold, predicted, len(labels))
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    confusion[gold, predicted] = counts[0].astype(np.int64)
    rows, answers, hits = confusion.sum(1).tolist(), confusion.sum(0).tolist(), confusion.diagonal().tolist()
    return {
        "rows": int(counts.sum()),
        "accuracy": _share(sum(hits), int(counts.sum())),
        **{name: _interval(value[name][0], drawn[name]) for name in ("kappa", "macro_f1")},
        "classes": {
            label: {
                "rows": rows[i],
                "precision": _share(hits[i], answers[i]),
                "recall": _share(hits[i], rows[i]),
                "f1": _interval(value["f1"][0, i], drawn["f1"][:, i]) if answers[i] else _share(0, 0),
            }
            for i, label in enumerate(labels)
        },
        "labels": labels,
        "confusion": confusion.tolist(),
    }


def share_report(hits: int, rows: int) -> dict[str, Any]:
    """The share of rows that are hits, with its interval."""
    return {"rows": rows, **_share(hits, rows)}


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, "Probable inference", 1927), which takes rows to be independent."""
    share, z2 = hits / rows, _Z**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = _Z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_report(
    bins: Mapping[tuple[int, bool], tuple[int, float]], resamples: int, seed: int = 0
) -> dict[str, Any]:
    """The expected calibration error, and each bin's rows, mean confidence and accuracy.

    `bins`: (bin, right) -> rows and the sum of their confidences. In resamples the mean confidence of such a cell stands
    for that of its rows.
    """
    cells = sorted(bins)
    counts = np.array([[bins[cell][0] for cell in cells]], np.float64)
    mean = np.array([bins[cell][1] / bins[cell][0] for cell in cells])
    right = np.array([cell[1] for cell in cells], np.float64)
    member = np.eye(NUM_BINS)[[cell[0] for cell in cells]]  # [cells, bins]

    def error(counts: Floats) -> Floats:
        total = np.abs((counts * right) @ member - (counts * mean) @ member).sum(1)
        result: Floats = total / counts.sum(1)
        return result

    rows, confidence, hits = ((counts * factor) @ member for factor in (1.0, mean, right))
    filled = np.flatnonzero(rows[0])
    return {
        "expected_calibration_error": _interval(error(counts)[0], error(_resample(counts[0], resamples, seed))),
        "bins": [
            {"low": b / NUM_BINS, "high": (b + 1) / NUM_BINS, "rows": int(rows[0, b]),
             "confidence": float(confidence[0, b] / rows[0, b]), "accuracy": float(hits[0, b] / rows[0, b])}
            for b in filled.tolist()
        ],
    }  # fmt: skip


def calibration_bin(confidence: float) -> int:
    """Which of the bins (0, 0.1], (0.1, 0.2], ... a confidence lies in; 0 lies in the first."""
    return min(NUM_BINS - 1, bisect_left(_EDGES, confidence))


def _resample(counts: Floats, resamples: int, seed: int) -> Floats:
    """[resamples, cells]"""
    source = np.random.default_rng(seed)
    total = int(counts.sum())
    return source.multinomial(total, counts / total, size=resamples).astype(np.float64)


def _scores(
    counts: Floats, gold: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_labels: int
) -> dict[str, Floats]:
    """counts [R, cells] -> kappa, macro_f1 [R] and f1 [R, labels]."""
    identity = np.eye(num_labels)
    right = counts * (gold == predicted)
    hits, of_gold, of_predicted = right @ identity[gold], counts @ identity[gold], counts @ identity[predicted]
    total = counts.sum(1)
    accuracy = right.sum(1) / total
    chance = (of_gold * of_predicted).sum(1) / total**2
    f1 = _divide(2 * hits, of_gold + of_predicted)
    present = (of_gold + of_predicted) > 0  # a class that a resample lacks has no part in its mean
    return {
        "kappa": np.where(chance < 1, _divide(accuracy - chance, 1 - chance), np.nan),
        "macro_f1": f1.sum(1) / present.sum(1),
        "f1": f1,
    }


def _divide(over: Floats, under: Floats) -> Floats:
    result: Floats = np.divide(over, under, out=np.zeros_like(over), where=under > 0)
    return result


def _share(hits: int, rows: int) -> dict[str, float | None]:
    low, high = wilson(hits, rows) if rows else (None, None)
    return {"value": hits / rows if rows else None, "low": low, "high": high}


def _interval(value: float, drawn: Floats) -> dict[str, float | None]:
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(drawn):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}
