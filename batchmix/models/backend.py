"""What a backend brings: the operators of the model and of the engine's step. Everything above them is shared.

Legend: T tokens of a step, R rows, D hidden, F expert hidden, E experts, K experts per token, H heads, G kv heads, C head
dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from batchmix.kernels.row_state import RowTensors
from batchmix.models.expert_load import LayerLoad
from batchmix.models.host_rows import HostRows, Logprobs
from batchmix.models.kv_cache import KVCache
from batchmix.models.quantized import Weight

if TYPE_CHECKING:
    from batchmix.models.mixtral import Mixtral


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens start..start+length-1 of one prompt, packed at `offset` of the step's tokens."""

    offset: int
    start: int
    length: int
    blocks: Sequence[int]  # the prompt's blocks, in order

    @property
    def end(self) -> int:
        """Of the step's tokens, the first behind it."""
        return self.offset + self.length


@dataclass(frozen=True)
class DecodeTokens:
    """The generated tokens of a step, which are its first: one of each row, then jump-forward tokens, then padding.

    L of them, each with its row's blocks: to the attention a jump-forward token is a row at its own position. Device and
    host agree, but that the host may not know yet which rows have ended.
    """

    positions: Tensor  # int64 [L]: where each token stands in its row
    running: Tensor  # bool [L]: the others write to the scratch block and attend to nothing
    block_table: Tensor  # int32 [L, W]
    host_positions: np.ndarray  # int64 [tokens that are no padding]
    host_blocks: np.ndarray  # int32 [tokens that are no padding, W]


class Attend(Protocol):
    """One step's attention: which tokens are whose, and where they lie, for every layer."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, attend. qkv [T, (H + 2G) C] -> [T, H C]."""


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

        Where the experts are quantised to fp8, what they are multiplied with is too, by row. Tokens that `load` takes for
        padding go to no expert: they get the residual alone. It counts the others.
        """

    def attend(
        self,
        model: Mixtral,
        cache: KVCache,
        decode: DecodeTokens | None,
        chunks: Sequence[PrefillChunk],
        num_tokens: int,
        shared: object = None,
    ) -> Attend:
        """Attention of a step of `num_tokens` tokens: generated ones first, then packed prompt chunks, then padding.

        `shared`: what `find_shared` found for `decode`.
        """

    def find_shared(
        self,
        model: Mixtral,
        cache: KVCache,
        block_table: np.ndarray,
        prompt_tokens: np.ndarray,
        version: int,
        keep: bool,
    ) -> object:
        """The KV blocks that rows have in common, for `attend`; outside of captured steps.

        block_table int32 [L, W] and prompt_tokens int64 [L] of the step's decode tokens; `version`: another one when
        these change. `keep`: in memory that stays where it is for all steps of L tokens, for a captured one.
        """

    def sample(self, logits: Tensor, rows: RowTensors, host: HostRows) -> tuple[Tensor, Logprobs | None, Tensor | None]:
        """The next tokens, int64 [R], of rows 0..R-1. logits float32 [R, V], modified in place.

        Last their log-probabilities among the tokens that were allowed, float32 [R], 0 where the row does not ask for
        it; None where no row has asked.
        """

    def post_update(self, tokens: Tensor, rows: RowTensors, processed_logprobs: Tensor | None = None) -> None:
        """Append these tokens to rows 0..R-1 and see which rows have ended; those that had ended stay as they are."""
