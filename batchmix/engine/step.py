"""What prefill and decode steps have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from batchmix.engine.async_copy import async_copy_to_gpu
from batchmix.engine.slots import InputBatch
from batchmix.engine.state import State
from batchmix.model.backend import Chunk
from batchmix.model.mixtral import Mixtral
from batchmix.report.device_clock import DeviceClock


@dataclass
class Piece:
    """Tokens of a row that are computed together in a prefill step."""

    token_ids: Sequence[int]
    start: int  # position of the first in its row
    blocks: list[int]  # of the row, as far as the piece's last token at least


def pad(tokens: int, tile: int) -> int:
    """`tokens` rounded up to a count that a step may have, a multiple of the backend's `row_tile`."""
    return -(-tokens // tile) * tile


def prefill(
    model: Mixtral, state: State, device_clock: DeviceClock, pieces: Sequence[Piece]
) -> tuple[torch.Tensor, list[int]]:
    """Run pieces through the model, packed without padding; hidden [T, D], T padded, and where in it each piece ends."""
    cache = state.cache
    ends = np.cumsum([len(piece.token_ids) for piece in pieces]).tolist()
    tokens = np.zeros(pad(ends[-1], model.ops.row_tile), np.int64)
    chunks = []
    for piece, end in zip(pieces, ends, strict=True):
        length = len(piece.token_ids)
        tokens[end - length : end] = piece.token_ids
        chunks.append(Chunk(end - length, piece.start, length, piece.blocks))
    attend = cache.around_prefill(model.ops.prefill(model, cache, chunks, len(tokens)), chunks)
    model.expert_load.set_num_valid(ends[-1])
    with device_clock.work("prefill"):
        hidden = model(async_copy_to_gpu(tokens, cache.keys.device), attend)
    state.stats.prompt_tokens += ends[-1]
    return hidden, ends


def choose(model: Mixtral, slots: InputBatch, first: int, logits: torch.Tensor) -> None:
    """Append a token to slots first..first+R-1. logits float32 [R, V] (spent)."""
    end = first + len(logits)
    rows = slots.rows(first, end)
    tokens, logprobs, processed_logprobs = model.ops.sample(logits, rows, slots.host_rows(first, end))
    model.tp.broadcast(tokens)
    if logprobs is not None:  # read in every step, so what is planned is what there is
        logged = first + logprobs.rows
        slots.answers.append_logprobs(logged, slots.planned[logged], logprobs.chosen, logprobs.top_ids, logprobs.top)
    model.ops.post_update(tokens, rows, processed_logprobs)
