"""The Triton backend: batchmix/kernels as the engine's operators, on a GPU or under Triton's interpreter.

Legend: T tokens of a step, L of them generated, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.kernels import linear, moe, norm, post_update, sampling
from batchmix.kernels.attention_decode import attend_decode, plan_decode
from batchmix.kernels.attention_prefill import attend_prefill, plan_prefill
from batchmix.kernels.rotary import rotate_and_cache
from batchmix.kernels.row_state import RowTensors
from batchmix.kernels.shared_splits import SharedSplits, find_shared_splits
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.models.backend import AttentionModel, HostRows, Logprobs
from batchmix.models.expert_load import LayerLoad
from batchmix.models.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.models.quantized import Experts, Quantized
from batchmix.models.step_tokens import Attend, StepTokens
from batchmix.models.torch_sampler import find_logprobs


class TritonOperators:
    """See `Operators`. With `batch_invariant` other rows in the batch change no bit of a row's products; with
    `share_prefix` KV blocks that rows have in common are attended to once for all of them."""

    row_tile = 1
    cuts_prompts = True

    def __init__(self, batch_invariant: bool = False, share_prefix: bool = False) -> None:
        self.batch_invariant = batch_invariant
        self.share_prefix = share_prefix
        self._shared: dict[int, tuple[int, SharedSplits]] = {}  # by tokens of a step: found for which version

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return residual, norm.add_rms_norm(x, residual, weight, eps)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear.linear(x, weight) if self.batch_invariant else F.linear(x, weight)

    def moe(
        self, x: Tensor, router: Tensor, w13: Experts, w2: Experts, top_k: int, residual: Tensor, load: LayerLoad | None
    ) -> Tensor:
        assert not isinstance(w13, tuple)
        assert not isinstance(w2, tuple)
        up, up_scale = (w13.codes, w13.scales) if isinstance(w13, Quantized) else (w13, None)
        down, down_scale = (w2.codes, w2.scales) if isinstance(w2, Quantized) else (w2, None)
        counts, num_valid = (None, None) if load is None else (load.counts, load.num_valid)
        return moe.moe(
            x, router, up, down, top_k, w13_scale=up_scale, w2_scale=down_scale, residual=residual,
            batch_invariant=self.batch_invariant, counts=counts, num_valid=num_valid,
        )  # fmt: skip

    def attend(self, model: AttentionModel, cache: KVCache, step: StepTokens) -> Attend:
        """See `Operators`. Generated tokens go through the decode kernels and prompt chunks through the prefill kernel,
        never otherwise: the two differ in bits. A step of generated tokens alone is laid out on the device, so a CUDA
        graph of it follows the rows."""
        ratio = model.config.num_attention_heads // model.config.num_key_value_heads
        positions, blocks, offsets = cache.places(step)
        decode, num_decode, decode_plan, prefill_plan = step.decode, 0, None, None
        if decode is not None:
            assert step.shared is None or isinstance(step.shared, SharedSplits)
            num_decode = len(decode.positions)
            context = (decode.positions + 1) * decode.running
            decode_plan = plan_decode(decode.block_table, context, cache.block_size, ratio, step.shared)
        if num_prompt := step.size - num_decode:
            # Rows of a table end at different places; a chunk is read only up to its own end.
            chunks, width = step.chunks, max((len(chunk.blocks) for chunk in step.chunks), default=1)
            table = np.full((len(chunks), width), SCRATCH_BLOCK, np.int32)
            for row, chunk in enumerate(chunks):
                table[row, : len(chunk.blocks)] = chunk.blocks
            spans = [(chunk.offset - num_decode, chunk.start, chunk.length) for chunk in chunks]
            on_device, dtype = async_copy_to_gpu(table, cache.keys.device), model.weights.embedding.dtype
            prefill_plan = plan_prefill(spans, on_device, num_prompt, ratio, dtype)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = cache.layer(layer)
            cos, sin = model.cos, model.sin
            q = rotate_and_cache(qkv, cos, sin, positions, blocks, offsets, keys, values, *cache.scales)  # [T, H, C]
            out = torch.empty_like(q)
            if decode_plan is not None:
                attend_decode(q[:num_decode], keys, values, decode_plan, cache.scales, out[:num_decode])
            if prefill_plan is not None:
                attend_prefill(q[num_decode:], keys, values, prefill_plan, cache.scales, out[num_decode:])
            return out.flatten(1)

        return attend

    def find_shared(
        self, model: AttentionModel, cache: KVCache, block_table: np.ndarray, prompt_tokens: np.ndarray, version: int
    ) -> SharedSplits | None:
        if not self.share_prefix:
            return None
        num_tokens = len(block_table)
        known, kept = self._shared.get(num_tokens, (None, None))
        if known != version:
            ratio = model.config.num_attention_heads // model.config.num_key_value_heads
            # Rows share what is of their prompts. An item for each row; what does not fit is left to the rows.
            found = find_shared_splits(
                torch.from_numpy(block_table), torch.from_numpy(prompt_tokens), cache.block_size, ratio, num_tokens
            )
            splits = SharedSplits(*(async_copy_to_gpu(tensor, cache.keys.device) for tensor in found))
            for target, new in zip(kept or (), splits, strict=False):
                target.copy_(new)  # into the same memory, which a captured step reads
            self._shared[num_tokens] = version, kept or splits
        return self._shared[num_tokens][1]

    def sample(self, logits: Tensor, rows: RowTensors, host: HostRows) -> tuple[Tensor, Logprobs | None, Tensor | None]:
        if rows.grammar_classes is not None:
            host.fill_bitmask(rows.grammar_classes)
        tokens, chosen = sampling.sample(
            logits, rows.state, rows.numbers, rows.reals, rows.flags, rows.eos_token_ids, rows.stop_token_ids,
            rows.biases, rows.output_counts, rows.in_prompt, rows.grammar_states, rows.grammar_classes,
        )  # fmt: skip
        processed_logprobs = None if rows.logprob_history is None else chosen
        wanted = np.flatnonzero(host.num_logprobs >= 0)
        if not len(wanted):
            return tokens, None, processed_logprobs
        which = torch.from_numpy(wanted).to(logits.device)
        found = find_logprobs(logits[which].log_softmax(-1), tokens[which], wanted, host)
        # The kernel's sum, and so its log-probability, is rounded otherwise than those that the rank is found among.
        return tokens, replace(found, chosen=chosen[which]), processed_logprobs

    def post_update(self, tokens: Tensor, rows: RowTensors, processed_logprobs: Tensor | None = None) -> None:
        history = None if processed_logprobs is None else rows.logprob_history
        post_update.post_update(
            tokens, processed_logprobs, rows.state, rows.numbers, rows.flags, rows.history, history, rows.output_counts,
            rows.eos_token_ids, rows.stop_token_ids, rows.automata, rows.grammar_states, rows.grammar_classes,
        )  # fmt: skip
