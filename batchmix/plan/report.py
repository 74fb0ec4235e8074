"""The text that `batchmix plan` prints."""

from __future__ import annotations

from batchmix.plan.cost import EFFICIENCY, Cost, Workload
from batchmix.plan.gpus import GPU
from batchmix.plan.survey import Survey

_REASONS = 5


def plan_text(survey: Survey, batches: int, gpu: GPU, work: Workload, cost: Cost, answer: str) -> str:
    """Lengths, refused rows, batches and padding, memory, operations and hours. `answer`: where its length is from."""
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
    cards = gpu.name if cost.gpus == 1 else f"{cost.gpus} x {gpu.name}"
    lines += [
        f"on {cards}, answers of {work.output_tokens:,} tokens ({answer}):",
        f"  weights {cost.weight_bytes / 2**30:.2f} GiB, KV cache {cost.kv_bytes_per_token / 1024:.1f} KiB a token,"
        f" {cost.kv_tokens:,} tokens fit, {cost.rows_at_once:,} rows at once",
        f"  prefill {cost.prefill_flops:.3g} FLOP, {_time(cost.prefill_seconds)};"
        f" decode {cost.decode_flops:.3g} FLOP, {_time(cost.decode_seconds)}",
        f"  {cost.hours:.3g} hours in all, assuming {EFFICIENCY:.0%} of the card's data sheet (an estimate, not measured)",
    ]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:,.1f} h"
