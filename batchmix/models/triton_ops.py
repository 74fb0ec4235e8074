"""The Triton backend: the kernels of batchmix/kernels as the engine's operators, on a GPU or under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.kernels import linear, moe, norm, post_update, sampling
from batchmix.kernels.attention_decode import SharedSplits, find_shared_splits
from batchmix.kernels.row_state import RowTensors
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.models.backend import Attend, DecodeTokens, PrefillChunk
from batchmix.models.expert_load import LayerLoad
from batchmix.models.host_rows import HostRows, Logprobs
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.models.quantized import Quantized, Weight
from batchmix.models.torch_sampler import largest
from batchmix.models.triton_attention import StepAttention

_SHARED_SPLITS = 1  # items of shared splits for each row of a step; what does not fit is left to the rows


class TritonOperators:
    """See `Operators`. With `batch_invariant` other rows in the batch change no bit of a row's products, by construction.

    With `share_prefix` KV blocks that rows have in common are attended to once for all of them.
    """

    row_tile = 1
    cuts_prompts = True

    def __init__(self, batch_invariant: bool = False, share_prefix: bool = False) -> None:
        self.batch_invariant = batch_invariant
        self.share_prefix = share_prefix
        self._shared: dict[int, tuple[int, SharedSplits]] = {}  # by tokens of a step: found for which version

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = norm.rms_norm(x, weight, eps)
        return normed

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return residual, norm.add_rms_norm(x, residual, weight, eps)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        product: Tensor = linear.linear(x, weight) if self.batch_invariant else F.linear(x, weight)
        return product

    def moe(
        self, x: Tensor, router: Tensor, w13: Weight, w2: Weight, top_k: int, residual: Tensor, load: LayerLoad
    ) -> Tensor:
        up, up_scale = (w13.codes, w13.scales) if isinstance(w13, Quantized) else (w13, None)
        down, down_scale = (w2.codes, w2.scales) if isinstance(w2, Quantized) else (w2, None)
        return moe.moe(
            x, router, up, down, top_k, w13_scale=up_scale, w2_scale=down_scale, residual=residual,
            batch_invariant=self.batch_invariant, counts=load.counts, num_valid=load.num_valid,
        )  # fmt: skip

    def attend(
        self,
        model: Mixtral,
        cache: KVCache,
        decode: DecodeTokens | None,
        chunks: Sequence[PrefillChunk],
        num_tokens: int,
        shared: object = None,
    ) -> Attend:
        assert shared is None or isinstance(shared, SharedSplits)
        return StepAttention(model, cache, decode, chunks, num_tokens, shared)

    def find_shared(
        self,
        model: Mixtral,
        cache: KVCache,
        block_table: np.ndarray,
        prompt_tokens: np.ndarray,
        version: int,
        keep: bool,
    ) -> SharedSplits | None:
        if not self.share_prefix:
            return None
        num_tokens, device = len(block_table), cache.keys.device
        known = self._shared.get(num_tokens)
        if keep and known is not None and known[0] == version:
            return known[1]
        ratio = model.config.num_attention_heads // model.config.num_key_value_heads
        # Rows share what is of their prompts.
        found = find_shared_splits(
            torch.from_numpy(block_table), torch.from_numpy(prompt_tokens), cache.block_size, ratio,
            capacity=_SHARED_SPLITS * num_tokens,
        )  # fmt: skip
        splits = SharedSplits(*(async_copy_to_gpu(tensor, device) for tensor in found))
        if not keep:
            return splits
        if known is not None:  # into the same memory, which a captured step reads
            for kept, new in zip(known[1], splits, strict=True):
                kept.copy_(new)
            splits = known[1]
        self._shared[num_tokens] = version, splits
        return splits

    def sample(self, logits: Tensor, rows: RowTensors, host: HostRows) -> tuple[Tensor, Logprobs | None, Tensor | None]:
        if rows.grammar_classes is not None:
            host.fill_bitmask(rows.grammar_classes)
        tokens, chosen = sampling.sample(
            logits, rows.state, rows.numbers, rows.reals, rows.flags, rows.eos_token_ids, rows.stop_token_ids, rows.biases,
            rows.output_counts, rows.in_prompt, rows.grammar_states, rows.grammar_classes,
        )  # fmt: skip
        processed_logprobs = None if rows.logprob_history is None else chosen
        wanted = np.flatnonzero(host.num_logprobs >= 0)
        if not len(wanted):
            return tokens, None, processed_logprobs
        which = torch.from_numpy(wanted).to(logits.device)
        top_ids, top = largest(logits[which].log_softmax(-1), host.num_logprobs[wanted])
        return tokens, Logprobs(wanted, chosen[which], top_ids, top), processed_logprobs

    def post_update(self, tokens: Tensor, rows: RowTensors, processed_logprobs: Tensor | None = None) -> None:
        kept = processed_logprobs is not None and rows.logprob_history is not None
        post_update.post_update(
            tokens, processed_logprobs if kept else None, rows.state, rows.numbers, rows.flags, rows.history,
            rows.logprob_history if kept else None, rows.output_counts, rows.eos_token_ids, rows.stop_token_ids,
            rows.automata, rows.grammar_states, rows.grammar_classes,
        )  # fmt: skip
