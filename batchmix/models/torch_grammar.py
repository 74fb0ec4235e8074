"""The torch backend's form of a grammar's mask: which tokens a row may choose from.

Rows whose state allows few tokens choose among those logits alone, at a fraction of the cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchmix.kernels.row_state import Finish, Number, RowTensors, State
from batchmix.structured_output.grammar import TokenSet

_NARROWEST = 128  # columns; widths are powers of two, so that a row's own set alone decides how its sums are rounded


@dataclass(frozen=True)
class FewTokens:
    """Rows that may choose from few tokens, all of one width."""

    rows: Tensor  # int64 [N], ordinals within the step
    token_ids: Tensor  # int64 [N, width], ascending; 0 beyond a row's own
    logits: Tensor  # float32 [N, width]; -inf beyond


def apply_grammars(
    logits: Tensor, rows: RowTensors, allowed_tokens: Callable[[int, int, int], TokenSet]
) -> tuple[Tensor, list[FewTokens]]:
    """Split the rows of a step: those that choose from all of `logits` [R, V], int64 [N], where what a grammar forbids
    becomes -inf in place; and those that choose from few of them. allowed_tokens: see `HostRows`."""
    state, numbers = rows.state.numpy(), rows.numbers.numpy()
    guided = np.flatnonzero((numbers[Number.GRAMMAR_BASE] >= 0) & (state[State.FINISH] == Finish.RUNNING))
    if not len(guided):
        return torch.arange(len(logits)), []
    left = numbers[Number.MAX_TOKENS] - state[State.GENERATED] - 1
    dropped: dict[int, tuple[np.ndarray, list[int]]] = {}  # by set of tokens, which many rows share
    narrow: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for row in guided.tolist():
        tokens = allowed_tokens(row, int(state[State.GRAMMAR_STATE, row]), int(left[row]))
        if tokens.few_allowed is not None:
            width = max(_NARROWEST, 1 << (len(tokens.few_allowed) - 1).bit_length())
            narrow[width].append((row, tokens.few_allowed))
        elif tokens.few_forbidden is not None:
            dropped.setdefault(id(tokens), (tokens.few_forbidden, []))[1].append(row)
        else:
            logits[row].masked_fill_(torch.from_numpy(~tokens.allowed), float("-inf"))
    for ids, owners in dropped.values():
        places = np.array(owners)[:, None] * logits.shape[1] + ids
        logits.view(-1).index_fill_(0, torch.from_numpy(places.reshape(-1)), float("-inf"))
    groups = [_few(logits, width, entries) for width, entries in narrow.items()]
    wide = np.ones(len(logits), bool)
    for group in groups:
        wide[group.rows.numpy()] = False
    return torch.from_numpy(np.flatnonzero(wide)), groups


def _few(logits: Tensor, width: int, entries: list[tuple[int, np.ndarray]]) -> FewTokens:
    token_ids = np.zeros((len(entries), width), np.int64)
    inside = np.arange(width) < np.array([len(ids) for _, ids in entries])[:, None]
    token_ids[inside] = np.concatenate([ids for _, ids in entries])
    rows, ids = torch.tensor([row for row, _ in entries]), torch.from_numpy(token_ids)
    chosen = logits[rows[:, None], ids].masked_fill_(torch.from_numpy(~inside), float("-inf"))
    return FewTokens(rows, ids, chosen)
