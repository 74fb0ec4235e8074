"""`batchmix plan table`: what runs on which card, in Markdown, as docs/memory.md has it."""

from __future__ import annotations

from batchmix.dtypes import Quantization
from batchmix.engine.config import EngineConfig
from batchmix.memory import HOST_SHARE
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.planning.cost import Footprint, footprint
from batchmix.planning.estimate import Setting, place
from batchmix.planning.gpus import get_gpu
from batchmix.planning.memory import gpu_workspace_bytes
from batchmix.planning.placement import Placement, assumed, cards, select_placement

MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
    rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
MIXTRAL_8X22B = MixtralConfig(
    vocab_size=32768, hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=65536,
    rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
MODELS = {"Mixtral-8x7B": MIXTRAL_8X7B, "Mixtral-8x22B": MIXTRAL_8X22B}
GPUS = ("rtx4090", "l40s", "a100_80gb", "h100", "h200", "b200")
MAX_MODEL_LEN = 4096
HOST_GB = 256.0
_HEADER = (
    "| plan.gpu | model.quantization | on one card | rows at once | decode, tokens/s | bound by | cards that hold all"
    " | tokens/s of each |\n|---|---|---|---|---|---|---|---|"
)


def table_text() -> str:
    """A table for each model: rows of 512 tokens and answers of 256, MAX_MODEL_LEN tokens at most, HOST_GB of host memory."""
    parts = []
    for name, config in MODELS.items():
        rows = [_row(config, gpu, quantization) for gpu in GPUS for quantization in _formats(gpu)]
        parts.append(f"### {name}\n\n{_HEADER}\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _formats(gpu_name: str) -> tuple[Quantization | None, ...]:
    eight_bits = Quantization.fp8 if get_gpu(gpu_name).fp8 else Quantization.int8
    return None, eight_bits, Quantization.int4


def _row(config: MixtralConfig, gpu_name: str, quantization: Quantization | None) -> str:
    defaults, gpu = EngineConfig(), get_gpu(gpu_name)
    model = footprint(config, 2, quantization)
    setting = Setting(
        gpu, 1, defaults.gpu_memory_utilization, HOST_SHARE * HOST_GB * 1e9, has_disk=False, stream=False,
        max_model_len=MAX_MODEL_LEN, max_num_seqs=None, prefill_tokens=defaults.max_num_batched_tokens,
        workspace=lambda rows: gpu_workspace_bytes(config, rows, defaults.max_num_batched_tokens, 2),
    )  # fmt: skip
    count, whole = place(model, setting, assumed(MAX_MODEL_LEN))
    one = select_placement(
        model,
        cards(gpu, 1, setting.share, setting.host_bytes),
        assumed(MAX_MODEL_LEN),
        longest=MAX_MODEL_LEN,
        prefill_tokens=setting.prefill_tokens,
        workspace=setting.workspace,
    )
    found = "does not fit the host | | |" if one is None else _placement(one, model)
    of_each = f"{whole.tokens_per_second / count:,.0f}"
    return f"| {gpu_name}, {gpu.memory_gb:.0f} GB | {quantization.value if quantization else 'null'} | {found} | {count} | {of_each} |"


def _placement(one: Placement, model: Footprint) -> str:
    where = "all" if not one.streamed else f"{one.streamed} of {model.layers} layers streamed"
    if one.kv_on_host:
        where += ", KV cache on the host"
    return f"{where} | {one.rows:,} | {one.tokens_per_second:,.0f} | {one.bound}"
