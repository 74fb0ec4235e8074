"""All that can go wrong before a model is loaded does so here: what a run is about to do is opened and checked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchmix.annotate.columns import annotation_columns
from batchmix.checkpoints.checkpoint import Checkpoint, open_checkpoint
from batchmix.config import Config
from batchmix.distributed.config import ClusterKind
from batchmix.dtypes import dtype_name
from batchmix.engine.build import check_engine
from batchmix.engine.device import check_places
from batchmix.errors import BatchmixError
from batchmix.input.source import Source, check_apart, open_source
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.output.columns import ID, OutputColumns
from batchmix.output.logprobs import TokenTexts
from batchmix.output.output_folder import OutputFolder
from batchmix.output.part_formats import part_format
from batchmix.output.parts import Parts
from batchmix.output.run_info import (
    COLUMNS,
    columns_of,
    describe_run,
    differences,
    messages_column,
    provenance,
    read_run,
)
from batchmix.prompts.escapes import warn_of_escapes
from batchmix.prompts.tokenizer import Tokenizer, tokenizer_fingerprint
from batchmix.stages import Prompts
from batchmix.storage import Storage
from batchmix.storage.layout import open_output
from batchmix.templates.chat_template import read_chat_template

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that may begin. A context manager: it has the lease of its shard until the end of the block."""

    config: Config  # with data.chat_template read
    source: Source
    checkpoint: Checkpoint
    prompts: Prompts
    parts: Parts
    output: OutputFolder
    description: dict[str, Any]  # what `run.json` says

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()

    def check_unchanged(self) -> None:
        """BatchmixError where a file of the input was written to while it was read."""
        source, run = self.source, self.description
        changed = differences({"data": run["identity"]["data"]}, {"data": source.fingerprint()})
        if not changed and source.versions() != run["data_versions"]:
            changed = [f"data: {change}"] if (change := source.find_change(self.output.extents(), None)) else []
        if changed:
            raise BatchmixError(f"{'; '.join(changed)} while it was read, so output.dir={self.output.storage.url} may hold "
                                "answers to either; put back what it was and run the command again, or set "
                                "output.overwrite=true to start afresh once nobody writes to it")  # fmt: skip


def open_run(config: Config) -> Run:
    """Open source, checkpoint, tokenizer, grammars and output of a run. BatchmixError for what a user can mend."""
    config = read_chat_template(config)
    on_ray = config.cluster.kind is ClusterKind.ray
    if not on_ray:  # whose nodes are not this machine
        check_places(config.engine, config.model.tensor_parallel_size)
    check_apart(config.data, config.output.dir, f"part-00000-000000.{config.output.format.value}")
    storage = open_output(config.output.dir)
    version = COLUMNS if config.output.overwrite else columns_of(storage)
    source = open_source(config.data, config.shard, usual_ids=version == COLUMNS)
    checkpoint = open_checkpoint(config.model)
    for note in checkpoint.notes:
        _log.warning("%s", note)
    if not on_ray:
        check_engine(checkpoint, config.engine)
    TensorParallel(size=config.model.tensor_parallel_size).check(checkpoint.config, checkpoint.quantization)
    prompts = Prompts.open(config, checkpoint)
    warn_of_escapes(config)
    description = _describe(config, source, checkpoint, version)
    parts = _parts(config, storage, source, prompts.tokenizer, description)
    output = OutputFolder(
        config.output, config.shard, parts, description, config.data.limit, config.data.max_error_share
    )
    try:
        _check_data(source, output)
    except BaseException:
        output.close()
        raise
    return Run(config, source, checkpoint, prompts, parts, output, description)


def _describe(config: Config, source: Source, checkpoint: Checkpoint, columns: int) -> dict[str, Any]:
    run = describe_run(
        config,
        openai_model=checkpoint.folder.name if source.openai_batch else None,
        model=checkpoint.fingerprint(),
        tokenizer=tokenizer_fingerprint(checkpoint.folder),
        data=source.fingerprint(),
        dtype=dtype_name(checkpoint.dtype),
        quantization=None if checkpoint.quantization is None else checkpoint.quantization.value,
        max_model_len=checkpoint.max_model_len,
        id_column=source.id_column,
        columns=columns,
    )
    return run | {"data_versions": source.versions()}


def _check_data(source: Source, output: OutputFolder) -> None:
    """BatchmixError where what was read for the rows there has other bytes now."""
    change = source.find_change(output.extents(), read_run(output.storage).get("data_versions"))
    if change is not None:
        raise BatchmixError(f"output.dir={output.storage.url} holds rows made with other settings (data: {change}); choose "
                            "another output.dir, or set output.overwrite=true to delete them and start afresh")  # fmt: skip


def _parts(config: Config, storage: Storage, source: Source, tokenizer: Tokenizer | None, run: dict[str, Any]) -> Parts:
    structured = config.sampling.structured_outputs
    today = run["identity"].get("columns") == COLUMNS
    filled = {run["identity"].get("id_column")} & {ID}  # its values are in the output's own column of that name
    columns = OutputColumns(
        pa.schema([field for field in source.schema if field.name not in filled]),
        token_ids=config.output.token_ids or tokenizer is None,
        logprobs=config.sampling.logprobs is not None,
        choice_probabilities=structured is not None and structured.score_choices,
        guided_logprobs=structured is not None and structured.token_probabilities and config.annotate.input is None,
        provenance=provenance(run),
        annotations=annotation_columns(config.annotate),
        tokens=TokenTexts(tokenizer) if today else None,
        messages=messages_column(run),
    )
    if source.openai_batch and config.annotate.input is not None:
        raise BatchmixError("data.format=openai_batch: its requests are prompts already; annotate rows with columns")
    form = part_format(config.output.format, columns, config.output.compression, run["openai_model"])
    return Parts(storage, form)
