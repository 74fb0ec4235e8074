"""The torch backend's form of a guide's mask: -inf for the tokens that a row's guide does not allow next.

Most states allow few tokens (a key, a digit) or forbid few (inside a string). Of such rows only those tokens are
touched, all rows together, which costs less than a pass over the logits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.slots import Slots


def apply_guides(logits: Tensor, slots: Slots, span: slice) -> None:
    """logits float32 [R, V], contiguous, of the slots in `span`, changed in place."""
    rows = np.flatnonzero(slots.guide_base[span].numpy() >= 0)
    if not len(rows):
        return
    states = slots.guide_state[span].numpy()
    left = slots.max_tokens[span].numpy() - slots.generated[span].numpy() - 1
    kept: list[tuple[int, np.ndarray]] = []
    dropped: list[tuple[int, np.ndarray]] = []
    for row in rows.tolist():
        guide = slots.row_guides[span.start + row]
        assert guide is not None
        tokens = guide.allowed_tokens(int(states[row]), int(left[row]))
        if tokens.few_allowed is not None:
            kept.append((row, tokens.few_allowed))
        elif tokens.few_forbidden is not None:
            dropped.append((row, tokens.few_forbidden))
        else:
            logits[row].masked_fill_(torch.from_numpy(~tokens.allowed), float("-inf"))
    flat = logits.view(-1)
    if dropped:
        flat.index_fill_(0, _places(dropped, logits.shape[1]), float("-inf"))
    if kept:
        places = _places(kept, logits.shape[1])
        values = flat[places]
        logits.index_fill_(0, torch.tensor([row for row, _ in kept]), float("-inf"))
        flat[places] = values


def _places(tokens: list[tuple[int, np.ndarray]], vocab: int) -> Tensor:
    """Where the tokens of these rows lie in the flattened logits."""
    counts = [len(ids) for _, ids in tokens]
    starts = np.repeat([row * vocab for row, _ in tokens], counts)
    return torch.from_numpy(starts + np.concatenate([ids for _, ids in tokens]))
