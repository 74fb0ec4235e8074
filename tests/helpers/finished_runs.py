"""Output folders as a finished run leaves them, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchmix.annotate.columns import annotation_columns
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.results import Results
from batchmix.config import Config
from batchmix.input.config import DataConfig
from batchmix.input.schema import infer_schema
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputConfig, OutputFormat
from batchmix.output.part_formats import part_format
from batchmix.output.run_info import describe_run
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.storage.bookkeeping import FOLDER, RUN, SUCCESS


def finished(
    folder: Path,
    task: AnnotateConfig,
    rows: Sequence[tuple[dict[str, Any], list[str | None]]],
    logprobs: Sequence[float] | None = None,
    form: OutputFormat = OutputFormat.arrow,
    template: str | None = None,
    id: str = "r{row}",
) -> Results:
    """A finished run of (columns, texts of the samples; None: the row could not be run), two rows a part."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    n = max(len(texts) for _, texts in rows)
    config = Config(annotate=task, data=DataConfig(path="x", template=template), output=OutputConfig(dir=str(folder), format=form),
                    sampling=SamplingConfig(n=n))  # fmt: skip
    run = describe_run(
        config,
        openai_model=None,
        model="m",
        tokenizer="t",
        data={},
        dtype="bfloat16",
        quantization=None,
        max_model_len=64,
    )
    (folder / RUN).write_text(json.dumps(run))
    (folder / SUCCESS).write_text("{}")
    kept = infer_schema(columns for columns, _ in rows)
    columns = OutputColumns(kept, token_ids=False, logprobs=False, annotations=annotation_columns(task))
    parts = part_format(form, columns, "zstd", None)
    for start in range(0, len(rows), 2):
        completions = []
        for row, (values, texts) in list(enumerate(rows))[start : start + 2]:
            prompt = Prompt(row, id.format(row=row), values, [1, 2, 3], config.sampling)
            for sample, text in enumerate(texts):
                if text is None:
                    completions.append(Completion.failed(prompt, "no prompt", sample))
                    continue
                logprob = None if logprobs is None else logprobs[row]
                completions.append(
                    Completion(prompt, sample, [5], "stop", num_tokens=1, text=text, cumulative_logprob=logprob)
                )
        with (folder / f"part-00000-{start // 2:06}.{form.value}").open("wb") as file:
            parts.write(file, parts.records(completions))
    return Results(str(folder))
