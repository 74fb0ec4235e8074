"""What a backend brings: the operators of the model and of the engine's step. Everything above them is shared.

Legend: T tokens of a step, L of them generated, R rows, D hidden, F expert hidden, E experts, H heads, G kv heads, C
head dim, V vocabulary, W blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from batchmix.kernels.row_state import RowTensors
from batchmix.models.expert_load import LayerLoad
from batchmix.models.kv_cache import KVCache
from batchmix.models.quantized import Weight
from batchmix.structured_output.grammar import TokenSet

if TYPE_CHECKING:
    from batchmix.models.mixtral import Mixtral

# A layer's attention in one step: rotate queries and keys, write keys and values to the cache, attend.
# (layer, qkv [T, (H + 2G) C]) -> [T, H C].
Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens start..start+length-1 of one prompt, packed at `offset` of the step's tokens."""

    offset: int
    start: int
    length: int
    blocks: Sequence[int]  # the prompt's blocks, in order


@dataclass(frozen=True)
class DecodeTokens:
    """The generated tokens of a step: one of each row, then jump-forward tokens, each as a row at its own position,
    then padding. The host may not know yet which rows have ended, nor positions after the first of several steps."""

    positions: Tensor  # int64 [L]: where each token stands in its row
    running: Tensor  # bool [L]: the others write to the scratch block and attend to nothing
    block_table: Tensor  # int32 [L, W]
    host_positions: np.ndarray  # int64 [tokens that are no padding]
    host_blocks: np.ndarray  # int32 [tokens that are no padding, W]


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step: generated ones first, then packed prompt chunks, then padding."""

    size: int
    decode: DecodeTokens | None
    chunks: Sequence[PrefillChunk] = ()
    shared: object = None  # KV blocks that rows have in common: see `Operators.find_shared`

    def prompt_places(self, block_size: int) -> np.ndarray:
        """Position, block and offset in the block of each prompt token, int64 [3, tokens]."""
        positions = [np.arange(chunk.start, chunk.start + chunk.length) for chunk in self.chunks]
        blocks = [np.asarray(c.blocks)[p // block_size] for c, p in zip(self.chunks, positions, strict=True)]
        position = np.concatenate([np.zeros(0, np.int64), *positions])
        return np.stack((position, np.concatenate([np.zeros(0, np.int64), *blocks]), position % block_size))


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
    top_ids: Tensor  # int64 [N, k], k the most that a row asks for
    top: Tensor  # float32 [N, k]


class Operators(Protocol):
    """A backend. Results may overwrite what a docstring says is modified in place."""

    @property
    def row_tile(self) -> int:
        """Steps have a multiple of it of tokens."""

    @property
    def cuts_prompts(self) -> bool:
        """Whether a prompt's bits are the same wherever it is cut into chunks."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, D], weight [D] -> [T, D]."""

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """residual (modified in place) and x [T, D] -> their sum, and its norm, [T, D] each."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, in], weight [out, in] -> [T, out]."""

    def moe(
        self, x: Tensor, router: Tensor, w13: Weight, w2: Weight, top_k: int, residual: Tensor, load: LayerLoad
    ) -> Tensor:
        """x and residual [T, D], router float32 [E, D], w13 [E, 2F, D], w2 [E, D, F] -> residual + experts, [T, D].

        Inputs of experts in fp8 are rounded to fp8, by row. Padding, as `load` has it, gets the residual alone.
        """

    def attend(self, model: Mixtral, cache: KVCache, step: StepTokens) -> Attend:
        """Lay out a step's attention, for every layer."""

    def find_shared(
        self, model: Mixtral, cache: KVCache, block_table: np.ndarray, prompt_tokens: np.ndarray, version: int
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
