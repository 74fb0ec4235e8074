"""The text that `batchmix plan` prints."""

from __future__ import annotations

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
) -> str:
    """Lengths, refused rows, batches and padding, memory, operations and hours.

    `whole`: on as many cards as hold all weights, where `cost` streams them. `answer`: where its length is from.
    """
    refused = survey.rows - survey.runnable
    lines = [f"{survey.rows:,} rows, {survey.prompt_tokens:,} prompt tokens", survey.histogram()]
    if survey.runnable:
        shares = ", ".join(f"{share:.0%}: {survey.percentile(share):,}" for share in (0.5, 0.9, 0.99, 1.0))
        lines.append(f"lengths in tokens, share of rows up to: {shares}")
    lines.append(f"rows that will be refused: {refused:,}")
    most = sorted(survey.refused.values(), key=lambda refusal: -refusal.rows)
    lines += [f"  {refusal.rows:,} like row {refusal.example_row}: {refusal.example}" for refusal in most[:_REASONS]]
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
        f"  {cost.hours:.3g} hours in all, {_source(cost)}",
    ]
    if whole is not None:
        lines.append(
            f"  model.tensor_parallel_size={whole.gpus} would hold all weights: {whole.hours:.3g} hours on {whole.gpus} cards"
        )
    return "\n".join(lines)


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
