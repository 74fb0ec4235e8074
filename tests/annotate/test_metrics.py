"""Agreement with people, against scikit-learn on the rows themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.annotate.metrics import agreement_report, calibration_bin, calibration_report, share_report

metrics = pytest.importorskip("sklearn.metrics")  # of the `dev` extra
PAIRS = st.lists(st.tuples(*[st.sampled_from(["a", "b", "c", "d"])] * 2), min_size=1, max_size=60)


@pytest.mark.filterwarnings("ignore")  # sklearn warns of classes without rows, kappa of one class
@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_scores_are_sklearns(pairs: list[tuple[str, str]]) -> None:
    gold, predicted = ([pair[side] for pair in pairs] for side in (0, 1))
    found = agreement_report(Counter(pairs), resamples=5)
    labels = found["labels"]
    assert labels == sorted(set(gold) | set(predicted))
    assert found["confusion"] == metrics.confusion_matrix(gold, predicted, labels=labels).tolist()
    assert found["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(gold, predicted))
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(
        gold, predicted, labels=labels, zero_division=np.nan
    )
    for i, label in enumerate(labels):
        scores = found["classes"][label]
        for name, expected in (("precision", precision[i]), ("recall", recall[i])):
            assert scores[name]["value"] == (None if np.isnan(expected) else pytest.approx(expected))
        assert scores["f1"]["value"] == (pytest.approx(f1[i]) if label in predicted else None), "never predicted"
        assert scores["rows"] == rows[i]
    assert found["macro_f1"]["value"] == pytest.approx(np.nan_to_num(f1).mean())
    if len(labels) > 1:
        assert found["kappa"]["value"] == pytest.approx(metrics.cohen_kappa_score(gold, predicted))
    else:
        assert found["kappa"]["value"] is None


@pytest.mark.slow  # 1,500 resamples of 300 rows through scikit-learn
def test_intervals_are_those_of_a_bootstrap_over_rows() -> None:
    source = np.random.default_rng(3)
    gold = source.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    predicted = np.where(source.random(300) < 0.8, gold, source.choice(["a", "b", "c"], 300))
    found = agreement_report(Counter(zip(gold.tolist(), predicted.tolist(), strict=True)), resamples=4000)
    drawn = []
    for _ in range(1500):
        rows = source.integers(300, size=300)
        g, p = gold[rows], predicted[rows]
        f1 = metrics.f1_score(g, p, labels=["c"], average="macro", zero_division=0)
        drawn.append(((g == p).mean(), f1))
    for values, interval in zip(np.array(drawn).T, (found["accuracy"], found["classes"]["c"]["f1"]), strict=True):
        low, high = np.percentile(values, [2.5, 97.5])
        assert (interval["low"], interval["high"]) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
        assert interval["low"] < interval["value"] < interval["high"]


def test_the_seed_decides() -> None:
    pairs = Counter({("a", "a"): 5000, ("a", "b"): 2000})
    assert agreement_report(pairs, 50, seed=1) == agreement_report(pairs, 50, seed=1)
    assert agreement_report(pairs, 50, seed=1) != agreement_report(pairs, 50, seed=2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_is_its_definition(rows: list[tuple[float, bool]]) -> None:
    bins: dict[tuple[int, bool], tuple[int, float]] = {}
    for confidence, right in rows:
        key = calibration_bin(confidence), right
        count, total = bins.get(key, (0, 0.0))
        bins[key] = count + 1, total + confidence
    found: dict[str, Any] = calibration_report(bins, resamples=20)
    expected = 0.0
    confidence, right = np.array(rows).T
    for index in range(10):
        inside = (confidence > index / 10) & (confidence <= (index + 1) / 10) | ((index == 0) & (confidence == 0))
        if inside.any():
            expected += inside.sum() / len(rows) * abs(right[inside].mean() - confidence[inside].mean())
    assert found["expected_calibration_error"]["value"] == pytest.approx(expected, abs=1e-9)
    assert sum(entry["rows"] for entry in found["bins"]) == len(rows)


def test_a_perfectly_calibrated_judge_has_no_error() -> None:
    found = calibration_report({(7, True): (75, 75 * 0.75), (7, False): (25, 25 * 0.75)}, resamples=100)
    assert found["expected_calibration_error"]["value"] == pytest.approx(0)


def test_shares() -> None:
    found = share_report(90, 100)
    assert (found["rows"], found["value"]) == (100, 0.9)
    assert (found["low"], found["high"]) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))


def test_a_share_of_all_rows_is_not_certain() -> None:
    found = agreement_report({("a", "a"): 40}, resamples=10)
    for share in (share_report(40, 40), found["accuracy"], found["classes"]["a"]["recall"]):
        assert (share["value"], share["high"]) == (1.0, 1.0)
        assert share["low"] == pytest.approx(0.9124, abs=1e-4)


def test_a_class_that_is_never_predicted_has_no_numbers() -> None:
    scores = agreement_report({("a", "b"): 3, ("b", "b"): 1}, resamples=10)["classes"]
    nothing = {"value": None, "low": None, "high": None}
    assert (scores["a"]["precision"], scores["a"]["f1"]) == (nothing, nothing)
    assert scores["a"]["recall"]["value"] == 0
