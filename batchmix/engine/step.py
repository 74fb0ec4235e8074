"""What prefill and decode steps have in common."""

from __future__ import annotations

import torch

from batchmix.engine.slots import Slots
from batchmix.model.mixtral import Mixtral


def pad(tokens: int, tile: int) -> int:
    """`tokens` rounded up to a count that a step may have, a multiple of the backend's `row_tile`."""
    return -(-tokens // tile) * tile


def choose(model: Mixtral, slots: Slots, first: int, logits: torch.Tensor, decoded: bool) -> None:
    """Append a token to slots first..first+R-1. logits float32 [R, V] (spent); `decoded`: see `Operators.advance`."""
    tokens, logprobs = model.ops.choose(logits, slots, first)
    model.shards.agree(tokens)
    if logprobs is not None:  # read in every step, so what is planned is what there is
        rows = first + logprobs.rows
        slots.answers.hear_logprobs(rows, slots.planned[rows], logprobs.chosen, logprobs.top_ids, logprobs.top)
    model.ops.advance(slots, first, tokens, decoded)
