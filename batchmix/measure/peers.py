"""Other engines on the work of `batchmix benchmark throughput`, each in a process of its own.

    python -m batchmix.measure.peers NAME WORK.json     # prints a line `RESULT {...}` for each workload

Their models have random weights of the same shape, built on the device. Building, loading and a warm-up are not timed.
A peer that has not finished after WORK.json's `seconds` starts no more rows; its rate is that of the rows it did. A peer's
package may lie in folders that are no part of this environment (`benchmark.peers_path`).
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

PEERS = {
    "transformers": "transformers",
    "generate_batch": "transformers",
    "vllm": "vllm",
    "sglang": "sglang",
}  # name -> package
_BATCH_ROWS, _BATCH_TOKENS = 64, 65536  # of transformers' static batches: rows, padded prompt tokens
_START_SECONDS = 240.0  # for imports, weights and warm-up, before a peer's process is ended
_SETTINGS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
             "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
             "PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # fmt: skip

_ROOT = Path(__file__).resolve().parents[2]  # of batchmix

Found = dict[str, Any]
Run = Callable[[list[list[int]], list[int], float], tuple[list[int], float]]  # -> rows done, seconds


def available_peers(path: str | None = None) -> list[str]:
    """Those whose package can be imported here, or from the folders of `path`. A folder without a module is none."""
    places = [*(path.split(os.pathsep) if path else ()), *sys.path]
    found = {name: importlib.machinery.PathFinder.find_spec(package, places) for name, package in PEERS.items()}
    return [name for name, spec in found.items() if spec is not None and spec.origin is not None]


def run_peer(name: str, work: Path, path: str | None = None) -> Iterator[Found]:
    """Results by workload as they come, or one with `error` where the peer failed; its packages are in `path` first."""
    content = json.loads(work.read_text())
    limit = _START_SECONDS + 2 * content["seconds"] * len(content["workloads"])
    command = [sys.executable, "-m", "batchmix.measure.peers", name, str(work)]
    environment = os.environ | _SETTINGS
    if path:  # absolute, and with what made batchmix importable behind it
        places = [*path.split(os.pathsep), *filter(None, [os.environ.get("PYTHONPATH")]), str(_ROOT)]
        environment["PYTHONPATH"] = os.pathsep.join(places)
    log = work.with_name(f"{name}.log")
    expired = threading.Event()

    def end() -> None:
        expired.set()
        _kill(process.pid)

    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        timer = threading.Timer(limit, end)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("RESULT "):
                    yield json.loads(line.removeprefix("RESULT "))
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process.pid)
            process.wait()
    if expired.is_set() or code:
        ended = f"ended after {limit:.0f} s" if expired.is_set() else f"exit code {code}"
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        yield {"peer": name, "error": f"{ended}: {last[:300]}"}


def _kill(pid: int) -> None:
    """A process and all that it started, which may hold the GPU and the pipe of what it prints."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def main() -> None:
    name, path = sys.argv[1:]
    content = json.loads(Path(path).read_text())
    openers: dict[str, Callable[..., contextlib.AbstractContextManager[Run]]] = {
        "transformers": _open_generate,
        "generate_batch": _open_generate_batch,
        "vllm": partial(_open_vllm, content.get("quantization"), content.get("kv_cache_dtype")),
        "sglang": _open_sglang,
        "accelerate": partial(_open_accelerate, content.get("card_bytes")),
    }
    longest = max(
        len(prompt) + answer
        for work in content["workloads"].values()
        for prompt, answer in zip(work["prompts"], work["answers"], strict=True)
    )
    with openers[name](content["model"], content["device"], content["dtype"], longest) as run:
        for workload, work in content["workloads"].items():
            prompts, answers = work["prompts"], work["answers"]
            run(prompts[:8], [min(4, answer) for answer in answers[:8]], 1e9)
            rows, seconds = run(prompts, answers, content["seconds"])
            output = sum(answers[row] for row in rows)
            total = output + sum(len(prompts[row]) for row in rows)
            print("RESULT " + json.dumps({
                "peer": name, "weights": _weights(name, content), "workload": workload, "rows": len(rows), "complete": len(rows) == len(prompts),
                "seconds": round(seconds, 3), "output_tokens": output,
                "output_tokens_per_second": round(output / seconds, 1),
                "total_tokens_per_second": round(total / seconds, 1),
            }), flush=True)  # fmt: skip
    sys.stdout.flush()
    os._exit(0)  # a thread of continuous batching that was cut short must not hold the process


def _weights(name: str, content: dict[str, Any]) -> str:
    """What a peer's weights are in. batchmix may have quantised its own; of the peers only vLLM does it as it loads."""
    fp8 = name == "vllm" and content.get("quantization") == "fp8"
    return "fp8" if fp8 else str(content["dtype"])


def _build(folder: str, device: str, dtype: str, attention: str, on_host: bool = False) -> Any:
    """transformers' Mixtral with random weights for `device`, built there or on the host."""
    import torch
    from transformers import AutoConfig, MixtralForCausalLM
    from transformers.initialization import no_init_weights

    experts = "grouped_mm" if device == "cuda" else "eager"  # the fastest there
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation, config._experts_implementation = attention, experts
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device("cpu" if on_host else device), no_init_weights():
        model = MixtralForCausalLM(config).eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif on_host:
            _fill_with_tiles(parameter)
        else:
            parameter.normal_(0, 0.02)
    model.generation_config.eos_token_id = None
    if hasattr(model, "_optimize_model_for_decode"):
        # Off the CPU it takes batched_mm to decode, which copies the experts' weights for each token: 2 x 352 MB a row.
        model._optimize_model_for_decode = contextlib.nullcontext
    return model


@contextlib.contextmanager
def _open_generate(folder: str, device: str, dtype: str, longest: int) -> Iterator[Run]:
    """Static batches of prompts of like length; a batch runs until its longest answer is there."""
    yield _generate(_build(folder, device, dtype, "sdpa"), device)


@contextlib.contextmanager
def _open_accelerate(card_bytes: float, folder: str, device: str, dtype: str, longest: int) -> Iterator[Run]:
    """The same with weights where accelerate's device_map="auto" puts them on a card of `card_bytes`."""
    from accelerate import dispatch_model, infer_auto_device_map

    model = _build(folder, device, dtype, "sdpa", on_host=True)
    if device == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, card_bytes / torch.cuda.mem_get_info()[1]))
        # As from_pretrained does it. A quarter: the cache and prefill of 64 rows, and a layer on its way, take the rest.
        limits = {0: int(card_bytes / 4), "cpu": 1 << 50}
        places = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
        model = dispatch_model(model, places)
    yield _generate(model, device)


def _fill_with_tiles(parameter: Any) -> None:
    """Random numbers that repeat: to draw all of a large model's on the host would take minutes."""
    import torch

    tile, flat = torch.empty(1 << 20, dtype=parameter.dtype).normal_(0, 0.02), parameter.view(-1)
    for start in range(0, len(flat), len(tile)):
        flat[start : start + len(tile)] = tile[: len(flat) - start]


def _generate(model: Any, device: str) -> Run:
    import torch

    @torch.inference_mode()
    def run(prompts: list[list[int]], answers: list[int], limit: float) -> tuple[list[int], float]:
        batches = _static_batches(prompts)
        random.Random(0).shuffle(batches)  # so that those done in time are a fair sample
        done: list[int] = []
        started = time.perf_counter()
        for batch in batches:
            if time.perf_counter() - started > limit:
                break
            width = max(len(prompts[row]) for row in batch)
            tokens = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for place, row in enumerate(batch):
                tokens[place, width - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[place, width - len(prompts[row]) :] = 1
            new = max(answers[row] for row in batch)
            model.generate(
                input_ids=tokens.to(device), attention_mask=mask.to(device), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0,
            ).tolist()  # fmt: skip
            done += batch
        return done, time.perf_counter() - started

    return run


def _static_batches(prompts: list[list[int]]) -> list[list[int]]:
    batches: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        last = batches[-1] if batches else []
        if last and len(last) < _BATCH_ROWS and (len(last) + 1) * len(prompts[last[0]]) <= _BATCH_TOKENS:
            last.append(row)
        else:
            batches.append([row])
    return batches


@contextlib.contextmanager
def _open_generate_batch(folder: str, device: str, dtype: str, longest: int) -> Iterator[Run]:
    """transformers' continuous batching, in the order of the rows."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _build(folder, device, dtype, "sdpa")
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run(prompts: list[list[int]], answers: list[int], limit: float) -> tuple[list[int], float]:
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(), block=False, timeout=5
        ) as manager:
            started = time.perf_counter()
            rows = {
                manager.add_request(prompt, max_new_tokens=answer): row
                for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            }
            done: list[int] = []
            while len(done) < len(prompts) and time.perf_counter() - started < limit:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("the generation thread stopped")
                if result is not None and result.error:
                    raise RuntimeError(str(result.error))
                if result is not None and result.is_finished():
                    done.append(rows[result.request_id])
            return done, time.perf_counter() - started

    yield run


@contextlib.contextmanager
def _open_vllm(
    quantization: str | None, cache: str | None, folder: str, device: str, dtype: str, longest: int
) -> Iterator[Run]:
    """vLLM with its defaults (prefix caching too), random weights by load_format=dummy. fp8 takes in all linear layers."""
    from vllm import LLM, SamplingParams

    asked = {"quantization": "fp8"} if quantization == "fp8" else {}
    asked |= {"kv_cache_dtype": "fp8"} if cache == "fp8" else {}
    engine = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=dtype, max_model_len=longest + 8,
                 max_num_seqs=1024, gpu_memory_utilization=0.92, disable_log_stats=True, **asked)  # fmt: skip

    def run(prompts: list[list[int]], answers: list[int], limit: float) -> tuple[list[int], float]:
        rows = list(range(len(prompts)))
        started = time.perf_counter()
        engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in answers],
            use_tqdm=False,
        )
        return rows, time.perf_counter() - started

    yield run


@contextlib.contextmanager
def _open_sglang(folder: str, device: str, dtype: str, longest: int) -> Iterator[Run]:
    """SGLang's offline engine with its defaults (prefix caching too), random weights by load_format=dummy."""
    import sglang

    engine = sglang.Engine(model_path=folder, load_format="dummy", skip_tokenizer_init=True, dtype=dtype,
                           context_length=longest + 8, max_running_requests=1024, log_level="error")  # fmt: skip

    def run(prompts: list[list[int]], answers: list[int], limit: float) -> tuple[list[int], float]:
        sampling = [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in answers]
        started = time.perf_counter()
        found = engine.generate(input_ids=prompts, sampling_params=sampling)
        seconds = time.perf_counter() - started
        counts = [answer["meta_info"]["completion_tokens"] for answer in found]
        if counts != answers:
            raise RuntimeError(f"{sum(counts)} tokens came for the {sum(answers)} asked for")
        return list(range(len(prompts))), seconds

    try:
        yield run
    finally:
        engine.shutdown()  # ends its processes


if __name__ == "__main__":
    main()
