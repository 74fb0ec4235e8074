"""How much memory a step takes beside the weights, and how much is left for the KV cache."""

from __future__ import annotations

from batchmix.errors import BatchmixError
from batchmix.models.mixtral_config import MixtralConfig

LOGITS_COPIES = 4  # float32 copies of a step's logits that sampling works on
WIDENED_COPIES = 2  # float32 copies of one expert that is widened to run
PREFILL_COPIES = 8  # activations of a step, in units of tokens x hidden size x 4 bytes, beside the expert rows


def workspace_bytes(config: MixtralConfig, max_num_seqs: int, max_num_batched_tokens: int, quantized: bool) -> int:
    """An estimate of what the largest step takes beside weights and KV cache, on a CPU: a token for each row, and chunks."""
    tokens = max_num_seqs + max_num_batched_tokens
    activations = tokens * 4 * config.hidden_size * PREFILL_COPIES
    experts = tokens * config.num_experts_per_tok * 4 * (3 * config.intermediate_size + config.hidden_size)
    if quantized:
        experts += 3 * config.hidden_size * config.intermediate_size * 4 * WIDENED_COPIES
    return activations + experts + max_num_seqs * config.vocab_size * 4 * LOGITS_COPIES


def gpu_workspace_bytes(config: MixtralConfig, max_num_seqs: int, max_num_batched_tokens: int, itemsize: int) -> int:
    """As `workspace_bytes`, of the Triton backend, before the weights are there to measure it with.

    Of a layer: 8 activations of hidden size, and the experts' inputs, hidden values and outputs.
    """
    hidden = config.hidden_size
    experts = config.num_experts_per_tok * (2 * hidden + config.intermediate_size)
    logits = max_num_seqs * config.vocab_size * 4 * LOGITS_COPIES
    return (max_num_seqs + max_num_batched_tokens) * itemsize * (8 * hidden + experts) + logits


def gpu_cache_bytes(free: int, total: int, workspace: int, utilization: float) -> int:
    """What the KV cache may take of a GPU's `free` bytes: the share 1 - utilization of all its memory stays untouched."""
    return int(free - workspace - (1 - utilization) * total)


def kv_blocks(free: int, block_bytes: int, blocks_per_row: int, max_num_seqs: int) -> int:
    """Blocks for the KV cache: as many as `free` bytes hold, at most what max_num_seqs rows of full length use.

    BatchmixError where not even one row of full length fits.
    """
    affordable = free // block_bytes
    if affordable < blocks_per_row:
        needed, there = blocks_per_row * block_bytes / 2**30, max(0, free) / 2**30
        raise BatchmixError(
            f"the KV cache of one row needs {needed:.2f} GiB and {there:.2f} GiB are left;"
            " lower model.max_model_len, engine.max_num_seqs or engine.max_num_batched_tokens"
        )
    return int(min(affordable, blocks_per_row * max_num_seqs))
