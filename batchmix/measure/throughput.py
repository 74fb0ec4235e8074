"""`batchmix benchmark throughput`: whole runs, JSONL to Arrow, beside the roofline of this device and beside peers."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import platform
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from batchmix import pipeline
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, ModelFormat
from batchmix.config import Config
from batchmix.dtypes import Dtype, KVCacheDtype, Quantization, dtype_name
from batchmix.engine.device import select_device
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.kernels.gpu import current_gpu
from batchmix.measure.case import SHAPES
from batchmix.measure.peers import PEERS, available_peers, run_peer
from batchmix.measure.result import save_result
from batchmix.measure.roofline import Device, Roofline, roofline
from batchmix.measure.timing import Ceilings, measure_ceilings
from batchmix.measure.workloads import WORKLOADS, Work, draw_work, full_layers, save_model
from batchmix.models.kv_cache import BLOCK_SIZE
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.output.config import OutputConfig
from batchmix.planning.cost import Footprint, footprint
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.sampling import SamplingConfig
from batchmix.storage.bookkeeping import METRICS, SUMMARY

_RESERVED = 4 << 30  # bytes of a GPU that the roofline leaves to the driver and to activations
_CACHE_SHARE = 0.15  # of a GPU's memory, left for the cache where benchmark.layers is null
_MOST_ROWS = 4096  # decoded together, in the roofline of a GPU
_WARM_UP_ROWS = 64
_CPU_SHRINK = 16  # of what the ceilings are measured on


def benchmark_throughput(config: Config) -> Path:
    """Run, print a line for each workload and engine as it is known, and write it all to a JSON file, whose path is given.

    The file is written anew after each of them. With benchmark.name=peers only the peers run.
    """
    benchmark = config.benchmark
    alone = benchmark.name == "peers"
    names, peers = _names(config), _peers(config)
    if alone and not peers:
        raise BatchmixError(
            f"benchmark peers: none of {', '.join(PEERS)} can be imported here (see benchmark.peers_path)"
        )
    device = select_device(config.engine).device
    if device.type == "cpu" and benchmark.shape != "tiny":
        raise BatchmixError(
            f"benchmark {benchmark.name}: there is no GPU, and benchmark.shape={benchmark.shape} would take days on a CPU;"
            f" to try the code path, batchmix benchmark {benchmark.name} benchmark.shape=tiny benchmark.rows=40"
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    precision = dtype_name(dtype)
    layers = benchmark.layers or _fitting_layers(benchmark.shape, device)
    gpu = current_gpu(device).name if device.type == "cuda" else platform.processor() or "cpu"
    quantization = config.model.quantization and config.model.quantization.value
    found: dict[str, dict[str, Any]] = {}
    result = {
        "device": gpu,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "shape": benchmark.shape,
        "layers": layers,
        "dtype": precision,
        "quantization": quantization,
        "kv_cache_dtype": config.model.kv_cache_dtype.value,
        "workloads": found,
    }
    path = Path()

    def keep(name: str, engine: str, value: dict[str, Any]) -> None:
        nonlocal path
        found[name][engine] = value
        path = save_result(benchmark.dir, gpu, _title(config, names), result)

    with tempfile.TemporaryDirectory(prefix="batchmix-") as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        save_model(folder, benchmark.shape, layers, precision)
        model = open_checkpoint(ModelConfig(path=str(folder), format=ModelFormat.random)).config
        tokenizer = load_tokenizer(folder)

        def draw(name: str, rows: int | None, title: str | None = None) -> Work:
            return draw_work(name, rows, benchmark.shape, model, tokenizer, folder.parent, title)

        works = [draw(name, benchmark.rows) for name in names]
        found |= {work.name: {"work": _describe(work)} for work in works}
        if not alone:
            # Kernels are compiled when they first run, which is no more part of a rate than the peers' warm-up is of theirs.
            few = draw("annotate", min(_WARM_UP_ROWS, benchmark.rows or _WARM_UP_ROWS), "warm-up")
            ceilings = measure_ceilings(device, None if device.type == "cuda" else _CPU_SHRINK)
            result["ceilings"] = asdict(ceilings)
            print(
                f"{gpu}: {benchmark.shape} with {layers} of {full_layers(benchmark.shape)} layers in {precision}; copy"
                f" {ceilings.copy / 1e9:,.0f} GB/s (read plus written),"
                f" {precision} product {ceilings.matmul[precision] / 1e12:,.2f} TFLOP/s",
                flush=True,
            )
            run_work(config, folder, few, device)
            for work in works:
                ours = run_work(config, folder, work, device)
                best = _best(config, model, work, ours, ceilings, device, dtype)
                ours["share_of_roofline"] = round(best.seconds / ours["seconds"], 4)
                ours["share_of_overlapped_roofline"] = round(best.overlapped_seconds / ours["seconds"], 4)
                found[work.name]["roofline"] = _roofline_json(best, work)
                keep(work.name, "batchmix", ours)
                print(_line(work, best, ours), flush=True)
        plan = folder.parent / "work.json"
        plan.write_text(json.dumps({
            "model": str(folder), "device": device.type, "dtype": precision, "seconds": benchmark.peer_seconds,
            "quantization": quantization, "kv_cache_dtype": config.model.kv_cache_dtype.value,
            "workloads": {work.name: {"prompts": work.prompts, "answers": work.answers} for work in works},
        }))  # fmt: skip
        failed = []
        for peer in peers:
            for measured in run_peer(peer, plan, benchmark.peers_path):
                print(_peer_line(measured, found, quantization), flush=True)
                if "workload" in measured:
                    keep(measured["workload"], peer, measured)
                else:
                    failed.append(f"{peer}: {measured['error']}")
    if alone and failed:
        raise BatchmixError(f"benchmark peers: {failed[0]}")
    return path


def _title(config: Config, names: list[str]) -> str:
    """Of the file: runs that differ in what they are compared by have files of their own."""
    kind = "peers" if config.benchmark.name == "peers" else "throughput"
    cache = "kv-fp8" if config.model.kv_cache_dtype is KVCacheDtype.fp8 else ""
    weights = config.model.quantization.value if config.model.quantization else cache
    return "-".join(filter(None, [kind, *names, weights]))


def _names(config: Config) -> list[str]:
    """The workloads asked for."""
    benchmark = config.benchmark
    if benchmark.shape not in SHAPES:
        raise BatchmixError(f"benchmark.shape={benchmark.shape}: the shapes are {', '.join(SHAPES)}")
    for key, value in (("rows", benchmark.rows), ("layers", benchmark.layers)):
        if value is not None and value < 1:
            raise BatchmixError(f"benchmark.{key}={value}: must be at least 1")
    for name in benchmark.only or ():
        if name not in WORKLOADS:
            raise BatchmixError(f"benchmark.only has {name!r}; the workloads are {', '.join(WORKLOADS)}")
    return list(benchmark.only or WORKLOADS)


def _peers(config: Config) -> list[str]:
    path = config.benchmark.peers_path
    for folder in path.split(os.pathsep) if path else ():
        if not Path(folder).is_dir():
            raise BatchmixError(f"benchmark.peers_path has {folder!r}, which is no folder")
    there = available_peers(path)
    for name in config.benchmark.peers or ():
        if name not in PEERS:
            raise BatchmixError(f"benchmark.peers has {name!r}; the peers are {', '.join(PEERS)}")
        if name not in there:
            raise BatchmixError(f"benchmark.peers has {name!r}, which cannot be imported here")
    return there if config.benchmark.peers is None else list(config.benchmark.peers)


def _fitting_layers(shape: str, device: torch.device) -> int:
    """As many as leave room for a cache; all of them on a CPU, where shapes are tiny."""
    layers = full_layers(shape)
    if device.type == "cpu":
        return layers
    sizes, (free, total) = SHAPES[shape], torch.cuda.mem_get_info(device)
    attention = sizes.hidden * sizes.head_dim * 2 * (sizes.heads + sizes.kv_heads)
    layer = 2 * (sizes.experts * 3 * sizes.hidden * sizes.intermediate + attention)
    tables = 2 * 2 * sizes.vocab * sizes.hidden
    fitting = int((free - _RESERVED - _CACHE_SHARE * total - tables) // layer)
    if fitting < 1:
        raise BatchmixError(f"benchmark.shape={shape}: not one layer fits the {free / 2**30:.1f} GiB that are free")
    return min(layers, fitting)


def run_work(config: Config, folder: Path, work: Work, device: torch.device) -> dict[str, Any]:
    """One run through the pipeline as `batchmix generate` does it, and what its own summary says."""
    out = folder.parent / f"out-{work.name}"
    longest = max(len(prompt) + answer for prompt, answer in zip(work.prompts, work.answers, strict=True))
    job = replace(
        config,
        model=replace(config.model, path=str(folder), format=ModelFormat.random, dtype=Dtype.auto,
                      max_model_len=longest + 1),
        data=DataConfig(path=str(folder.parent / f"{work.name}.jsonl"), id_column="id"),
        sampling=SamplingConfig(),
        output=OutputConfig(dir=str(out)),
    )  # fmt: skip
    # What it prints names a folder that will be gone.
    with _peak_memory(device) as peak, contextlib.redirect_stdout(io.StringIO()):
        pipeline.generate(job)
    summary = json.loads((out / SUMMARY).read_text())
    if summary["error_rows"] or summary["completion_tokens"] != work.output_tokens:
        raise BatchmixError(
            f"{work.name}: {summary['error_rows']} error rows and {summary['completion_tokens']:,} tokens, not"
            f" {work.output_tokens:,}"
        )
    last = json.loads((out / METRICS).read_text().splitlines()[-1])
    seconds = max(summary["generate_seconds"], 1e-9)
    return {
        "seconds": seconds,
        "total_seconds": summary["total_seconds"],
        "output_tokens_per_second": round(work.output_tokens / seconds, 1),
        "total_tokens_per_second": round((work.prompt_tokens + work.output_tokens) / seconds, 1),
        "device_busy": summary["device_busy"],
        "peak_memory_gib": round(peak[0] / 2**30, 2),
        "kv_tokens": last["kv_blocks_total"] * BLOCK_SIZE,
        "out_of_memory": summary["out_of_memory"],
        "streamed_bytes": summary["streamed_bytes"],
        "decode_streamed_bytes": summary["decode_streamed_bytes"],
        "stage_seconds": summary["seconds"],
    }


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Most bytes at once: on a GPU of tensors since the start of the block, on a CPU of this process so far."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device)
        gc.collect()  # the engine and its graphs, so that the next one, or a peer's process, finds the GPU empty
        torch.cuda.empty_cache()
    else:
        peak[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _best(config: Config, model: MixtralConfig, work: Work, ours: dict[str, Any], ceilings: Ceilings,
          device: torch.device, dtype: torch.dtype) -> Roofline:  # fmt: skip
    """The roofline of `work`, with weights and cache as `config` has them."""
    kv_itemsize = 1 if config.model.kv_cache_dtype is KVCacheDtype.fp8 else dtype.itemsize
    size = footprint(model, dtype.itemsize, config.model.quantization, kv_itemsize)
    parameters = 3 * model.num_local_experts * model.hidden_size * model.intermediate_size
    return roofline(
        model, dtype.itemsize, [len(prompt) for prompt in work.prompts], work.answers, work.shared,
        _device(size, dtype, ceilings, device, ours, config.model),
        expert_itemsize=size.layer_bytes / parameters, kv_itemsize=kv_itemsize,
    )  # fmt: skip


def _device(
    size: Footprint,
    dtype: torch.dtype,
    ceilings: Ceilings,
    device: torch.device,
    ours: dict[str, Any],
    asked: ModelConfig,
) -> Device:
    """The limits of the roofline. Of a GPU the cache is what its memory could hold, whatever the engine made of it."""
    rate = ceilings.matmul[dtype_name(dtype)]
    if device.type == "cpu":
        return Device(ceilings.copy, rate, ours["kv_tokens"], 256)
    total = torch.cuda.mem_get_info(device)[1]
    room = total - _RESERVED - size.weight_bytes
    experts = ceilings.matmul.get("fp8") if asked.quantization is Quantization.fp8 else None
    return Device(ceilings.copy, rate, room // size.kv_bytes, _MOST_ROWS, experts)


def _describe(work: Work) -> dict[str, Any]:
    return {"rows": len(work.prompts), "prompt_tokens": work.prompt_tokens, "output_tokens": work.output_tokens,
            "shared_tokens": work.shared, "longest_prompt": max(map(len, work.prompts))}  # fmt: skip


def _roofline_json(best: Roofline, work: Work) -> dict[str, Any]:
    return {
        "prefill_seconds": round(best.prefill_seconds, 3),
        "decode_seconds": round(best.decode_seconds, 3),
        "overlapped_seconds": round(best.overlapped_seconds, 3),
        "rows_at_once": round(best.rows_at_once, 1),
        "output_tokens_per_second": round(work.output_tokens / best.seconds, 1),
    }


def _line(work: Work, best: Roofline, ours: dict[str, Any]) -> str:
    return (
        f"{work.name}: {len(work.prompts):,} rows, {work.prompt_tokens:,} tokens in ({work.shared:,} shared),"
        f" {work.output_tokens:,} out | batchmix {ours['seconds']:.1f} s,"
        f" {ours['output_tokens_per_second']:,.0f} output tokens/s, {ours['total_tokens_per_second']:,.0f} in all |"
        f" {ours['share_of_roofline']:.1%} of the serial roofline ({best.seconds:.2f} s at {best.rows_at_once:,.0f} rows at"
        f" once), {ours['share_of_overlapped_roofline']:.1%} of the overlapped one ({best.overlapped_seconds:.2f} s)"
        f" | device busy {ours['device_busy']:.1%} | {ours['peak_memory_gib']:.1f} GiB at most"
    )


def _peer_line(result: dict[str, Any], found: dict[str, dict[str, Any]], quantization: str | None) -> str:
    if "error" in result:
        return f"{result['peer']}: {result['error']}"
    ours = found[result["workload"]].get("batchmix")
    rate = result["output_tokens_per_second"]
    beside = f": batchmix is {ours['output_tokens_per_second'] / rate:.2f} x" if ours and rate else ""
    part = "" if result["complete"] else f", {result['rows']:,} rows in the time it had"
    other = "" if quantization in (None, result["weights"]) else f" with weights in {result['weights']}"
    return (
        f"{result['workload']}: {result['peer']}{other} {rate:,.0f} output tokens/s,"
        f" {result['total_tokens_per_second']:,.0f} in all{part}{beside if rate else ': no row was done in time'}"
    )
