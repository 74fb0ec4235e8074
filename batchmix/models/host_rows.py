"""What goes between host and operators where tokens are sampled: what the host alone knows, and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from batchmix.structured_output.grammar import TokenSet


@dataclass(frozen=True)
class HostRows:
    """Of the rows 0..R-1 of a step, beside their `RowTensors`."""

    num_logprobs: np.ndarray  # int64 [R]: most likely tokens that are logged with the one chosen; -1: nothing is logged
    # Of a row with a grammar, in a state of it and with so many tokens left after the next: what may come next.
    allowed_tokens: Callable[[int, int, int], TokenSet]
    # Writes what may come next into grammar_classes, for rows whose text the host follows; not waited for.
    fill_bitmask: Callable[[Tensor], None]


@dataclass
class Logprobs:
    """Of the rows `rows` of a step (ordinals within the step)."""

    rows: np.ndarray  # int64 [N]
    chosen: Tensor  # float32 [N]
    top_ids: Tensor  # int64 [N, k], k the most that a row asks for
    top: Tensor  # float32 [N, k]
