"""What a backend brings: the operators of the model and of the engine's step. Everything above them is shared.

Legend: T tokens of a step, L of them generated, R rows, D hidden, F expert hidden, E experts, H heads, G kv heads, C
head dim, V vocabulary, W blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from batchmix.kernels.row_state import RowTensors
from batchmix.models.expert_load import LayerLoad
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.quantized import Experts
from batchmix.models.step_tokens import Attend, StepTokens
from batchmix.models.weights import Weights
from batchmix.structured_output.grammar import TokenSet


class AttentionModel(Protocol):
    """What attention needs to know of a `Mixtral`."""

    config: MixtralConfig
    weights: Weights
    cos: Tensor  # float32 [max_model_len, C/2]
    sin: Tensor


@dataclass(frozen=True)
class HostRows:
    """What only the host knows of the rows 0..R-1 whose tokens are sampled."""

    num_logprobs: np.ndarray  # int64 [R]: most likely tokens that are logged with the one chosen; -1: nothing is logged
    # Of a row with a grammar, in a state of it and with so many tokens left after the next: what may come next.
    allowed_tokens: Callable[[int, int, int], TokenSet]
    # Writes what may come next into grammar_classes, for rows whose text the host follows; not waited for.
    fill_bitmask: Callable[[Tensor], None]


@dataclass
class Logprobs:
    """Of the rows `rows` (ordinals within the step): log-probabilities of the chosen and of the most likely tokens."""

    rows: np.ndarray  # int64 [N]
    chosen: Tensor  # float32 [N]
    ranks: Tensor  # int64 [N], of the chosen tokens in the vocabulary, from 1
    top_ids: Tensor  # int64 [N, k], k the most that a row asks for
    top: Tensor  # float32 [N, k]


class Operators(Protocol):
    """A backend. Results may overwrite what a docstring says is modified in place."""

    row_tile: int  # steps have a multiple of it of tokens
    cuts_prompts: bool  # whether a prompt's bits are the same wherever it is cut into chunks

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, D], weight [D] -> [T, D]."""

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """residual (modified in place) and x [T, D] -> their sum, and its norm, [T, D] each."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, in], weight [out, in] -> [T, out]."""

    def moe(
        self, x: Tensor, router: Tensor, w13: Experts, w2: Experts, top_k: int, residual: Tensor, load: LayerLoad | None
    ) -> Tensor:
        """x and residual [T, D], router float32 [E, D], w13 [E, 2F, D], w2 [E, D, F] -> residual + experts, [T, D].

        Inputs of experts in fp8 are rounded to fp8, by row. Padding, as `load` has it, gets the residual alone.
        """

    def attend(self, model: AttentionModel, cache: KVCache, step: StepTokens) -> Attend:
        """Lay out a step's attention, for every layer."""

    def find_shared(
        self, model: AttentionModel, cache: KVCache, block_table: np.ndarray, prompt_tokens: np.ndarray, version: int
    ) -> object:
        """The KV blocks that rows have in common, for `StepTokens`; called outside of captured steps.

        block_table int32 [L, W] and prompt_tokens int64 [L] of the step's decode tokens; `version`: another one when
        these change. Lies where it is for all steps of L tokens, so that captured ones can read it.
        """

    def sample(self, logits: Tensor, rows: RowTensors, host: HostRows) -> tuple[Tensor, Logprobs | None, Tensor | None]:
        """The next tokens, int64 [R], of rows 0..R-1. logits float32 [R, V], modified in place.

        Last their log-probabilities among the tokens that were allowed, float32 [R], 0 where the row does not ask for
        it; None where no row has asked.
        """

    def post_update(self, tokens: Tensor, rows: RowTensors, processed_logprobs: Tensor | None = None) -> None:
        """Append these tokens to rows 0..R-1 and see which rows have ended; those that had ended stay as they are."""
