"""What a data set will cost on a GPU: memory, floating-point operations and hours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batchmix.planning.cost import Footprint
from batchmix.planning.gpus import GPU
from batchmix.planning.placement import Placement, Rows, cards, select_placement


@dataclass(frozen=True)
class Workload:
    """Sums over the rows that can run: `squared_tokens` adds up each prompt's length squared."""

    rows: int
    prompt_tokens: int
    squared_tokens: int
    samples: int  # of all rows
    output_tokens: int  # expected of each sample

    def mean(self) -> Rows:
        """A row, all samples being rows."""
        return Rows(self.prompt_tokens / max(1, self.rows), self.output_tokens, max(1, self.samples))


@dataclass(frozen=True)
class Setting:
    """What a plan is made for."""

    gpu: GPU
    cards: int  # that share one model
    share: float  # of their memory
    host_bytes: float
    has_disk: bool
    stream: bool  # whether weights may lie on the host
    max_model_len: int
    max_num_seqs: int | None
    prefill_tokens: int
    workspace: Callable[[int], float]  # bytes of the largest step on one card, by rows at once


@dataclass(frozen=True)
class Cost:
    """Operations and seconds of a workload. `gpus`: cards that share the model, at least as many as it needs."""

    gpus: int
    placement: Placement
    prefill_flops: float
    decode_flops: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def hours(self) -> float:
        """Prefill and decode together."""
        return (self.prefill_seconds + self.decode_seconds) / 3600


def place(model: Footprint, setting: Setting, rows: Rows) -> tuple[int, Placement]:
    """(cards, placement): the setting's cards if the model fits, streamed or not, else twice as many, and so on."""
    gpus = setting.cards
    while (placement := _place_on(gpus, model, setting, rows)) is None:
        gpus *= 2
    return gpus, placement


def _place_on(gpus: int, model: Footprint, setting: Setting, rows: Rows) -> Placement | None:
    return select_placement(
        model,
        cards(setting.gpu, gpus, setting.share, setting.host_bytes, setting.has_disk),
        rows,
        longest=setting.max_model_len,
        prefill_tokens=setting.prefill_tokens,
        workspace=lambda limit: gpus * setting.workspace(limit),
        max_num_seqs=setting.max_num_seqs,
        stream=setting.stream,
    )


def estimate(model: Footprint, setting: Setting, work: Workload) -> Cost:
    """The cost of `work`."""
    gpus, placement = place(model, setting, work.mean())
    prefill = model.token_flops * work.prompt_tokens + model.key_flops * work.squared_tokens / 2
    prefill += model.head_flops * work.rows
    output = work.samples * work.output_tokens
    decode = output * (model.token_flops + model.head_flops + model.key_flops * work.mean().context)
    return Cost(
        gpus, placement, prefill, decode, work.rows * placement.prefill_seconds,
        output * placement.step_seconds / placement.rows,
    )  # fmt: skip
