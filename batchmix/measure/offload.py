"""`batchmix benchmark offload`: a model larger than the card, beside its link and accelerate's `device_map="auto"`."""

from __future__ import annotations

import importlib.util
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, ModelFormat
from batchmix.config import Config
from batchmix.engine.device import select_device
from batchmix.errors import BatchmixError
from batchmix.kernels.gpu import current_gpu
from batchmix.measure.case import SHAPES
from batchmix.measure.peers import run_peer
from batchmix.measure.result import save_result
from batchmix.measure.throughput import run_work
from batchmix.measure.workloads import draw_work, full_layers, save_model
from batchmix.offload import setup as offloading
from batchmix.prompts.tokenizer import load_tokenizer

CARD_BYTES = 24e9  # of the card, whatever it has
PEER = "accelerate"


def benchmark_offload(config: Config) -> Path:
    """Run, print one line for each engine, and write it all to a JSON file, whose path is given."""
    benchmark = config.benchmark
    if benchmark.shape not in SHAPES:
        raise BatchmixError(f"benchmark.shape={benchmark.shape}: the shapes are {', '.join(SHAPES)}")
    if benchmark.peers not in (None, [], [PEER]):
        raise BatchmixError(f"benchmark.peers={benchmark.peers}: the one peer is {PEER}; [] runs none")
    device = select_device(config.engine).device
    if device.type == "cpu" and benchmark.shape != "tiny":
        raise BatchmixError(
            f"benchmark offload: there is no GPU to stream benchmark.shape={benchmark.shape} to; to try the code path,"
            " batchmix benchmark offload benchmark.shape=tiny benchmark.rows=4"
        )
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    layers = benchmark.layers or full_layers(benchmark.shape)
    peer = importlib.util.find_spec(PEER) is not None if benchmark.peers is None else bool(benchmark.peers)
    with tempfile.TemporaryDirectory(prefix="batchmix-") as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        save_model(folder, benchmark.shape, layers, dtype)
        model = open_checkpoint(ModelConfig(path=str(folder), format=ModelFormat.random)).config
        work = draw_work("offload", benchmark.rows, benchmark.shape, model, load_tokenizer(folder), folder.parent)
        with _small_card(config, device) as small:
            ours = run_work(small, folder, work, device)
            link = _link_rate(device)
        seconds = max(ours["stage_seconds"]["decode"], 1e-3)
        rate = ours["decode_streamed_bytes"] / seconds
        ours |= {"decode_bytes_per_second": rate, "share_of_link": link and round(rate / link, 4)}
        gpu = current_gpu(device).name if device.type == "cuda" else platform.processor() or "cpu"
        print(
            f"{gpu} as a card of {CARD_BYTES / 1e9:.0f} GB: {benchmark.shape} with {layers} layers in {dtype},"
            f" {len(work.prompts):,} rows, {work.prompt_tokens:,} tokens in, {work.output_tokens:,} out | batchmix"
            f" {ours['output_tokens_per_second']:,.1f} output tokens/s, {work.output_tokens / seconds:,.1f} in decode,"
            f" {rate / 1e9:.1f} GB/s streamed in decode, "
            + (f"{rate / link:.1%} of the link's {link / 1e9:.1f} GB/s" if link else "there is no link"),
            flush=True,
        )
        plan = folder.parent / "work.json"
        plan.write_text(json.dumps({
            "model": str(folder), "device": device.type, "dtype": dtype, "seconds": benchmark.peer_seconds,
            "card_bytes": CARD_BYTES, "workloads": {"offload": {"prompts": work.prompts, "answers": work.answers}},
        }))  # fmt: skip
        peers = list(run_peer(PEER, plan)) if peer else []
    for result in peers:
        print(_peer_line(result, ours), flush=True)
    result = {
        "device": gpu,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "shape": benchmark.shape,
        "layers": layers,
        "dtype": dtype,
        "card_bytes": CARD_BYTES,
        "link_bytes_per_second": link,
        "batchmix": ours,
        "peers": peers,
    }
    return save_result(benchmark.dir, gpu, "offload", result)


@contextmanager
def _small_card(config: Config, device: torch.device) -> Iterator[Config]:
    """A card of CARD_BYTES: torch gives no more of it, and `config` asks for no more."""
    if device.type == "cpu":
        yield config
        return
    share = min(1.0, CARD_BYTES / torch.cuda.mem_get_info(device)[1])
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        yield replace(config, engine=replace(config.engine, gpu_memory_utilization=share))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _link_rate(device: torch.device) -> float | None:
    """Bytes a second to the device; None where there is no link."""
    link = offloading.open_transfer_stream(device, 1, None)
    return None if link is None else offloading.measure_link(link)


def _peer_line(result: dict[str, Any], ours: dict[str, Any]) -> str:
    if "error" in result:
        return f"{PEER}: {result['error']}"
    rate = result["output_tokens_per_second"]
    ratio = f"batchmix is {ours['output_tokens_per_second'] / rate:.2f} x" if rate else "no row was done in time"
    return f"{PEER} {rate:,.1f} output tokens/s, {result['rows']:,} rows: {ratio}"
