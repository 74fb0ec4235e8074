"""Seconds of one engine step: as a card's measured kernels add up, else by the roofline of its data sheet.

A measured table is measured/<gpu>-<dtype>.json, of one model's shape on one card; it names the source of each figure.
The experts take most of a step, and how long depends on the rows of each: of M tokens an expert has Binomial(M, K / E), as
if the router chose evenly and each token for itself. An expert reads its weights once for every tile of its rows, the first
time from memory; how many rows a tile has follows from those of the average expert.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from batchmix.models.mixtral_config import MixtralConfig
from batchmix.planning.cost import Footprint, footprint
from batchmix.planning.gpus import GPU

EFFICIENCY = 0.6  # share of a data sheet's rates assumed to be reached: an assumption, not a measurement
MEASURED = Path(__file__).parent / "measured"
_MOST_TOKENS = 16384  # of a step in the table of experts; beyond, time grows in proportion
_DEVIATIONS = 6  # of an expert's rows: what lies beyond has a probability of 2e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Step:
    """The work of one step. Tokens of decode and prefill share it; padding rows reach no expert and no key."""

    decode_rows: float = 0
    context_tokens: float = 0  # keys that decode rows attend to, in all; a key that rows share counts once
    prefill_tokens: float = 0
    prefill_pairs: float = 0  # (query, key) of the prompt chunks
    logits_rows: float = 0
    padding_rows: float = 0  # they have projections and logits

    @property
    def tokens(self) -> float:
        """What the experts see."""
        return self.decode_rows + self.prefill_tokens


class StepCost(Protocol):
    """What a step takes on some device."""

    def seconds(self, step: Step) -> float: ...


@dataclass(frozen=True)
class RooflineCost:
    """A step takes as long as its bytes or its operations, whichever is longer. Weights are read once, whole."""

    model: Footprint
    hbm: float  # bytes a second, as they are reached
    flops: float

    def seconds(self, step: Step) -> float:
        """The longer of the two."""
        return max(self.hbm_seconds(step), self.compute_seconds(step))

    def hbm_seconds(self, step: Step) -> float:
        """Of reading weights and cached keys and values."""
        return (self.model.weight_bytes + step.context_tokens * self.model.kv_bytes) / self.hbm

    def compute_seconds(self, step: Step) -> float:
        """Of all products."""
        model = self.model
        operations = model.token_flops * step.tokens + model.head_flops * (step.logits_rows + step.padding_rows)
        operations += (model.token_flops - model.expert_flops) * step.padding_rows
        operations += model.key_flops * (step.context_tokens + step.prefill_pairs)
        return operations / self.flops


class MeasuredCost:
    """The sum of a step's kernels, none of which overlaps another, from a measured table."""

    def __init__(self, model: Footprint, table: Mapping[str, Any]) -> None:
        self.model = model
        self._table = table
        self._tokens = _grid()
        self._experts = _layer_curve(self._tokens, table)

    def experts_us(self, tokens: float) -> float:
        """Of one layer's experts, in microseconds."""
        if tokens > _MOST_TOKENS:
            return float(self._experts[-1]) * tokens / _MOST_TOKENS
        return float(np.interp(tokens, self._tokens, self._experts))

    def seconds(self, step: Step) -> float:
        """Of all layers, the head and sampling; none where there is no token."""
        if not step.tokens:
            return 0.0
        table, model = self._table, self.model
        rows = step.tokens + step.padding_rows
        layer = self.experts_us(step.tokens)
        layer += max(table["projections"]["floor"], table["projections"]["row"] * rows)
        layer += table["rest"]["fixed"] + table["rest"]["row"] * rows
        if step.decode_rows:
            attention = table["decode_attention"]
            layer += attention["fixed"] + attention["row"] * (step.decode_rows + step.padding_rows)
            layer += 1e6 * step.context_tokens * model.kv_bytes / model.layers / attention["bandwidth"]
        if step.prefill_tokens:
            attention = table["prefill_attention"]
            computing = 1e6 * step.prefill_pairs * model.key_flops / model.layers / attention["flops"]
            layer += max(attention["token"] * step.prefill_tokens, computing)
        logits = step.logits_rows + step.padding_rows
        last = 0.0
        if logits:
            last = max(table["head"]["floor"], table["head"]["row"] * logits)
            last += table["sampling"]["fixed"] + table["sampling"]["row"] * logits
        return float(1e-6 * (model.layers * layer + last))


def step_cost(model: Footprint, gpu: GPU, efficiency: float = EFFICIENCY) -> StepCost:
    """Of `model` on one card: measured where there is a table, else `efficiency` of the data sheet's rates."""
    return measured_cost(model, gpu) or RooflineCost(
        model, gpu.bandwidth_gbs * 1e9 * efficiency, gpu.tflops * 1e12 * efficiency
    )


@functools.lru_cache(64)
def measured_cost(model: Footprint, gpu: GPU) -> MeasuredCost | None:
    """From the table of this card and shape, whatever the number of layers; None where there is none."""
    for path in sorted(MEASURED.glob("*.json")):
        table = json.loads(path.read_text())
        shape = MixtralConfig(**table["shape"])
        there = footprint(replace(shape, num_hidden_layers=model.layers), table["itemsize"])
        if table["gpu"] == gpu.name and there == model:
            return MeasuredCost(model, table)
    return None


def _grid() -> Floats:
    """Numbers of tokens between which an expert's time is close to a line."""
    parts = (range(64), range(64, 1024, 8), range(1024, 4096, 64), range(4096, _MOST_TOKENS + 1, 512))
    return np.concatenate([np.array(part, np.float64) for part in parts])


def _layer_curve(tokens: Floats, table: Mapping[str, Any]) -> Floats:
    """Microseconds of a layer's experts for so many tokens each: what is expected, and more tokens never take less."""
    share = table["shape"]["num_experts_per_tok"] / table["shape"]["num_local_experts"]
    experts = table["shape"]["num_local_experts"]
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, _MOST_TOKENS + 1)))])
    curve = np.zeros(len(tokens))
    for place, count in enumerate(tokens.astype(int).tolist()):
        rows, probability = _binomial(count, share, log_factorials)
        for product in ("up", "down"):
            each = _expert_us(rows, count * share, table["experts"][product], experts)
            curve[place] += experts * float(each @ probability)
    return np.maximum.accumulate(curve)


def _binomial(count: int, share: float, log_factorials: Floats) -> tuple[Floats, Floats]:
    """(numbers of rows, how likely each is) of an expert that `share` of `count` tokens reach."""
    middle, reach = count * share, _DEVIATIONS * math.sqrt(count * share * (1 - share)) + 1
    rows = np.arange(max(0, int(middle - reach)), min(count, int(middle + reach)) + 1)
    logs = log_factorials[count] - log_factorials[rows] - log_factorials[count - rows]
    likely = np.exp(logs + rows * math.log(share) + (count - rows) * math.log1p(-share))
    return rows.astype(np.float64), likely / likely.sum()


def _expert_us(rows: Floats, average: float, measured: list[dict[str, Any]], experts: int) -> Floats:
    """One expert's microseconds in one product, by its rows, with the tile that the engine takes for the average expert.

    An expert that has any row reads its weights, which is all that few rows cost.
    """
    taken = next(entry for entry in measured if entry["until"] is None or average <= entry["until"])
    block = taken["block_m"]
    tiles = math.ceil(taken["rows"] / block)
    change = _tiles_us(np.ceil(rows / block), block, measured) - _tiles_us(np.array([tiles]), block, measured)
    times = np.maximum(taken["us"] + change, measured[0]["us"]) * taken.get("uneven", 1.0) / experts
    return np.where(rows > 0, times, 0.0)


def _tiles_us(tiles: Floats, block: int, measured: list[dict[str, Any]]) -> Floats:
    """Microseconds where every expert has so many row tiles of `block` rows.

    Between what was measured with such tiles, and beyond it at the rate of the measurement with most rows.
    """
    known = {math.ceil(entry["rows"] / block): entry["us"] for entry in measured if entry["block_m"] == block}
    beyond = np.maximum(tiles - max(known), 0) * block * measured[-1]["us"] / measured[-1]["rows"]
    us: Floats = np.interp(tiles, list(known), list(known.values())) + beyond
    return us
