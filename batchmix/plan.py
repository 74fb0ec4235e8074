"""`batchmix plan`: what a run would find and cost."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from batchmix.checkpoints.checkpoint import Checkpoint, open_checkpoint
from batchmix.checkpoints.config import OffloadMode
from batchmix.config import Config
from batchmix.dtypes import Quantization
from batchmix.engine.build import cache_dtype
from batchmix.engine.request import PREFILL_CHUNK
from batchmix.errors import BatchmixError
from batchmix.input.source import open_source
from batchmix.memory import HOST_SHARE, host_bytes
from batchmix.models.kv_cache import BLOCK_SIZE
from batchmix.observability.clock import StageClock
from batchmix.planning.cost import footprint
from batchmix.planning.estimate import Setting, Workload, estimate, place
from batchmix.planning.gpus import GPU, get_gpu
from batchmix.planning.memory import gpu_workspace_bytes
from batchmix.planning.picture import save_picture
from batchmix.planning.placement import assumed
from batchmix.planning.planner import Limits, plan
from batchmix.planning.report import plan_text
from batchmix.planning.sampled_rows import sample
from batchmix.planning.survey import Survey
from batchmix.prompts.prompt import without_pauses
from batchmix.records import Prompt
from batchmix.signals import KeyboardStop
from batchmix.stages import Prompts
from batchmix.storage.bookkeeping import LENGTHS
from batchmix.templates.chat_template import read_chat_template

_LINE_EVERY = 30.0  # seconds
_log = logging.getLogger(__name__)


def plan_report(config: Config) -> None:
    """Print what a run would find and cost. Reads and tokenises `plan.sample_rows` rows; loads no weights. Ctrl-C ends the
    reading, and what was read is the sample."""
    config = read_chat_template(config)
    gpu = get_gpu(config.plan.gpu)
    source = open_source(config.data, config.shard)
    checkpoint = open_checkpoint(config.model, weights=False)
    if checkpoint.quantization is Quantization.fp8 and not gpu.fp8:
        raise BatchmixError(
            f"model.quantization=fp8: plan.gpu={config.plan.gpu} does not multiply e4m3; use int8 or int4"
        )
    kv_itemsize = cache_dtype(checkpoint, checkpoint.dtype).itemsize
    model = footprint(checkpoint.config, checkpoint.dtype.itemsize, checkpoint.quantization, kv_itemsize)
    setting = _setting(config, checkpoint, gpu)
    _, placement = place(model, setting, assumed(checkpoint.max_model_len))  # before lengths are known
    limits = Limits(placement.max_num_seqs, placement.kv_tokens // BLOCK_SIZE, BLOCK_SIZE, config.engine.sort_window)
    survey = Survey(naive_batch=placement.max_num_seqs)
    builder = Prompts.open(config, checkpoint).builder
    total, skipped = sample(source, config.plan.sample_rows, config.shard.count)
    rows = builder.show_first(source.rows(skipped))
    with KeyboardStop() as interrupt:
        built = builder.build(rows, keep=[], clock=StageClock(), stopping=lambda: interrupt.received)
        with closing(without_pauses(built)) as prompts:
            watched = survey.watch(_with_progress(prompts, interrupt))
            batches = sum(1 for batch in plan(watched, limits) if batch.prompts[0].error is None)
    if interrupt.received:
        if not survey.runnable:
            raise KeyboardInterrupt
        _log.warning("interrupted: what follows is estimated from the first %s rows that were read", f"{survey.rows:,}")
    total = survey.rows if total is None else total
    scale = total / max(1, survey.rows)
    answer = config.plan.expected_tokens or config.sampling.max_tokens
    where = (
        "plan.expected_tokens" if config.plan.expected_tokens else "sampling.max_tokens; plan.expected_tokens sets it"
    )
    runnable, prompt_tokens, squared, samples = (
        round(count * scale) for count in (survey.runnable, survey.prompt_tokens, survey.squared_tokens, survey.samples)
    )
    work = Workload(runnable, prompt_tokens, squared, samples, answer)
    cost = estimate(model, setting, work)
    whole = estimate(model, replace(setting, stream=False), work) if cost.placement.streamed else None
    print(plan_text(survey, round(batches * scale), gpu, work, model, cost, whole, where, total, config))
    folder = config.output.dir if "://" not in config.output.dir else ""  # a picture is for a person at this machine
    picture = config.plan.histogram or (str(Path(folder, LENGTHS)) if folder else None)
    if picture is not None and survey.runnable:
        try:
            save_picture(survey, Path(picture))
        except OSError as error:
            raise BatchmixError(f"plan.histogram={picture}: cannot be written ({error.strerror})") from None
        print(f"histogram: {picture}")


def _with_progress(prompts: Iterable[Prompt], interrupt: KeyboardStop) -> Iterator[Prompt]:
    """The prompts, until interrupted, with a bar where a person looks, else a line now and then."""
    said, rows = time.monotonic(), 0
    with tqdm(unit=" rows", disable=not sys.stderr.isatty(), leave=False) as bar:
        for prompt in prompts:
            if interrupt.received:
                return
            yield prompt
            rows += 1
            bar.update()
            if bar.disable and time.monotonic() - said > _LINE_EVERY:
                said = time.monotonic()
                _log.info("%s rows read", f"{rows:,}")


def _setting(config: Config, checkpoint: Checkpoint, gpu: GPU) -> Setting:
    """What `batchmix plan` assumes: this run on `gpu`."""
    host = config.plan.host_memory_gb
    prefill = max(PREFILL_CHUNK, config.engine.max_num_batched_tokens)
    return Setting(
        gpu=gpu,
        cards=config.model.tensor_parallel_size,
        share=config.engine.gpu_memory_utilization,
        host_bytes=host_bytes() if host is None else HOST_SHARE * host * 1e9,
        has_disk=config.model.offload_dir is not None,
        stream=config.model.offload is OffloadMode.auto,
        max_model_len=checkpoint.max_model_len,
        max_num_seqs=config.engine.max_num_seqs,
        prefill_tokens=prefill,
        workspace=lambda rows: gpu_workspace_bytes(checkpoint.config, rows, prefill, checkpoint.dtype.itemsize),
    )
