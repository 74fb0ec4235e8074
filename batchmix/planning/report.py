"""The text that `batchmix plan` prints."""

from __future__ import annotations

import math

from batchmix.config import Config
from batchmix.planning.cost import Footprint
from batchmix.planning.estimate import Cost, Workload
from batchmix.planning.gpus import GPU
from batchmix.planning.placement import LINK_EFFICIENCY
from batchmix.planning.step_cost import EFFICIENCY
from batchmix.planning.survey import Survey

_REASONS = 5


def plan_text(
    survey: Survey,
    batches: int,
    gpu: GPU,
    work: Workload,
    model: Footprint,
    cost: Cost,
    whole: Cost | None,
    answer: str,
    total: int,
    config: Config,
) -> str:
    """Lengths, refused rows, batches and padding, memory, operations, hours, dollars and settings.

    `batches`, `work` and `cost` are of `total` rows, of which the survey may have seen a sample. `whole`: on as many cards
    as hold all weights, where `cost` streams them. `answer`: where its length is from.
    """
    refused = survey.rows - survey.runnable
    lines = [f"{total:,} rows, {work.prompt_tokens:,} prompt tokens", survey.histogram()]
    if total > survey.rows:
        error = survey.prompt_tokens_error(total)
        lines[0] = (
            f"{total:,} rows, about {work.prompt_tokens:,} prompt tokens (within {error:.1%}, 95 %): estimated from"
            f" {survey.rows:,} rows (plan.sample_rows), as are the lines below"
        )
    if survey.runnable:
        shares = ", ".join(f"{share:.0%}: {survey.percentile(share):,}" for share in (0.5, 0.9, 0.99, 1.0))
        lines.append(f"lengths in tokens, share of rows up to: {shares}")
    share = f" of these {survey.rows:,}" if total > survey.rows else ""
    lines.append(f"rows that will be refused: {refused:,}{share}")
    most = survey.refused.most_common()
    lines += [f"  {reason.rows:,} like row {reason.example_row}: {reason.example}" for reason in most[:_REASONS]]
    if len(most) > _REASONS:
        lines.append(f"  and {len(most) - _REASONS} more reasons")
    lines.append(
        f"batches: {batches:,}; batches of {survey.naive_batch} rows in input order would be "
        f"{survey.naive_padding:.1%} padding, these have none"
    )
    placement = cost.placement
    lines += [
        f"on {_cards(gpu, cost)}, answers of {work.output_tokens:,} tokens ({answer}):",
        f"  weights {model.weight_bytes / 2**30:.2f} GiB{placement.streamed_text(model)};"
        f" KV cache {model.kv_bytes / 1024:.1f} KiB a token{' on the host' if placement.kv_on_host else ''},"
        f" {placement.kv_tokens:,} tokens fit, {placement.rows:,} rows at once",
        f"  prefill {cost.prefill_flops:.3g} FLOP, {_time(cost.prefill_seconds)};"
        f" decode {cost.decode_flops:.3g} FLOP, {_time(cost.decode_seconds)}",
        f"  a decode step {_step_time(placement.step_seconds)}, bound by {placement.bound}:"
        f" {placement.tokens_per_second:,.0f} tokens/s",
        f"  {hours_text(cost.hours)} in all{_dollars(cost.hours * cost.gpus, config)}, {_source(cost)}",
    ]
    if (deadline := config.plan.deadline_hours) is not None:
        lines.append(f"  within {hours_text(deadline)}: {_copies(cost, deadline, config)}")
    if whole is not None:
        lines.append(
            f"  model.tensor_parallel_size={whole.gpus} would hold all weights: {hours_text(whole.hours)}"
            f" on {whole.gpus} cards{_dollars(whole.hours * whole.gpus, config)}"
        )
    lines.append(f"  run it so: {' '.join(_settings(cost, config))}")
    return "\n".join(lines)


def hours_text(hours: float) -> str:
    """`12 h 5 min`"""
    minutes = round(60 * hours)
    if minutes < 1:
        return f"{max(1, round(3600 * hours))} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _dollars(card_hours: float, config: Config) -> str:
    rate = config.plan.dollars_per_hour
    return "" if rate is None else f" and {card_hours * rate:,.2f} dollars"


def _copies(cost: Cost, deadline: float, config: Config) -> str:
    copies = max(1, math.ceil(cost.hours / deadline))
    if copies == 1:
        return f"{cost.gpus} card{'s' * (cost.gpus != 1)} will do"
    return (
        f"{copies * cost.gpus} cards, {copies} copies of the model (engine.data_parallel_size={copies} in one machine,"
        f" shard.count={copies} over several){_dollars(cost.hours * cost.gpus, config)}"
    )


def _settings(cost: Cost, config: Config) -> list[str]:
    """Overrides of a run as it is planned."""
    model = config.model
    given = [f"engine.max_num_seqs={cost.placement.max_num_seqs}", f"model.tensor_parallel_size={cost.gpus}"]
    given += [f"model.{key}={getattr(model, key).name}" for key in ("quantization", "kv_cache_dtype")
              if getattr(model, key) is not None]  # fmt: skip
    return given


def _source(cost: Cost) -> str:
    if cost.placement.measured:
        return "by the sum of kernels measured on such a card (an estimate: the run was not measured)"
    return (
        f"assuming {EFFICIENCY:.0%} of the card's data sheet and {LINK_EFFICIENCY:.0%} of its link (an estimate, not"
        " measured)"
    )


def _cards(gpu: GPU, cost: Cost) -> str:
    return gpu.name if cost.gpus == 1 else f"{cost.gpus} x {gpu.name}"


def _step_time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _time(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:,.1f} h"
