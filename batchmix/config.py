"""Every configuration key, its type, its default and its meaning. Nothing else in the project defines one.

Hydra fills these dataclasses (see `register`), so a misspelt key or a value of the wrong type is refused
before anything runs. Below `pipeline` and `jobs/` they are plain dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from batchmix.errors import BatchmixError


class ModelFormat(Enum):
    auto = "auto"
    hf = "hf"
    mistral = "mistral"
    random = "random"


class ConvertFormat(Enum):
    hf = "hf"
    fused = "fused"
    mistral = "mistral"


class Dtype(Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Quantization(Enum):
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"


class KVCacheDtype(Enum):
    auto = "auto"
    fp8 = "fp8"


class Offload(Enum):
    auto = "auto"
    never = "never"


class DataFormat(Enum):
    auto = "auto"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"
    csv = "csv"
    openai_batch = "openai_batch"


OnError = Enum("OnError", ["record", "raise"])  # `raise` is a keyword: OnError["raise"]


class Backend(Enum):
    auto = "auto"
    triton = "triton"
    torch = "torch"


class OutputFormat(Enum):
    arrow = "arrow"
    parquet = "parquet"
    jsonl = "jsonl"


class Order(Enum):
    completion = "completion"
    input = "input"


class ClusterKind(Enum):
    none = "none"
    ray = "ray"


class Redo(Enum):
    length = "length"
    error = "error"


class ExportFormat(Enum):
    parquet = "parquet"
    jsonl = "jsonl"
    csv = "csv"


class ReviewTool(Enum):
    label_studio = "label_studio"
    argilla = "argilla"


@dataclass
class ModelConfig:
    """Which checkpoint runs, and in which precision."""

    path: str = "tiny"  # folder, hub id, or `tiny` for the model that ships with batchmix
    # hf: config.json + safetensors; mistral: params.json + consolidated; random: config.json alone, to measure with
    format: ModelFormat = ModelFormat.auto
    dtype: Dtype = Dtype.auto  # auto: as the checkpoint was saved
    quantization: Quantization | None = None  # of the experts; null: as the checkpoint has them
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.auto  # auto: as dtype
    max_model_len: int | None = None  # prompt + completion tokens; null: what the checkpoint allows
    tensor_parallel_size: int = 1  # processes, each on a GPU of its own, that share one model
    # Where the experts are that do not fit the GPU. auto: in host memory, whence they are streamed; never: out of memory
    offload: Offload = Offload.auto
    offload_dir: str | None = None  # for experts that do not fit host memory either: a folder on a fast disk
    revision: str | None = None  # of a hub id


@dataclass
class DataConfig:
    """Where the rows come from and how a row becomes a prompt."""

    path: Any = MISSING  # one or many: file, folder, glob, fsspec URL, or the name of a hub data set
    format: DataFormat = DataFormat.auto
    split: str = "train"  # of a hub data set
    messages_column: str = "messages"  # list of {role, content}
    prompt_column: str = "prompt"  # plain text, sent as one user message
    token_ids_column: str = "prompt_token_ids"  # token ids, used as they are
    id_column: str | None = None  # null: the row's ordinal
    columns: list[str] | None = None  # kept in the output; null: all
    system_prompt: str | None = None
    template: str | None = None  # Jinja over the row's columns; its result is sent as one user message
    swap_columns: list[str] | None = None  # two that change places in data.template for samples 1, 3, 5, ...
    limit: int | None = None  # the first so many rows
    on_error: OnError = OnError["record"]


@dataclass
class StructuredOutputs:
    """What a row's text may be: one of the first three, which are vLLM's. See docs/guided.md."""

    choice: list[str] | None = None  # one of these texts
    regex: str | None = None  # what Python's re.fullmatch accepts
    json: Any = None  # a JSON Schema, as a mapping or as its text
    score_choices: bool = False  # score the choices in the prefill and decode nothing; at most 256 choices


@dataclass
class SamplingConfig:
    """How tokens are chosen. A row's own `sampling` column overrides any of these for that row."""

    max_tokens: int = 1024
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit
    allowed_token_ids: list[int] | None = None
    stop: list[str] | None = None  # at most 1,024 bytes in all
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int = 0
    n: int = 1  # samples per row, at most 10,000
    logprobs: int | None = None  # this many alternatives per token beside the chosen one, at most 100
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None  # guided decoding; null: any text


@dataclass
class EngineConfig:
    """How the work is laid out on the device."""

    device: str = "auto"  # auto: a GPU if there is one; cpu, cuda, cuda:1, ...; of several processes, the first's
    data_parallel_size: int = 1  # models that run side by side on this machine, each with a share of the rows
    backend: Backend = Backend.auto  # auto: triton on a GPU, torch on the CPU
    gpu_memory_utilization: float = 0.9  # share of the device's memory; on CPU, of the memory now free
    max_num_seqs: int | None = (
        None  # rows decoded together; null: as many as the KV cache holds, at most 1,024, 256 on CPU
    )
    max_num_batched_tokens: int = 8192  # prompt tokens in one prefill step; a chunk of a long prompt may have 2,048
    sort_window: int = 16384  # rows held at once and sorted by length
    share_prefix: bool = True  # triton backend only: what prompts begin with in common is computed once
    cuda_graphs: bool = True  # triton backend only
    batch_invariant: bool = False  # triton backend: the same tiles for any number of rows; torch's are so already
    trace: bool = False  # write _trace.json, a Chrome trace of all threads and the device, into output.dir


@dataclass
class OutputConfig:
    """Where the answers go."""

    dir: str = MISSING  # a folder, or a place in an object store such as s3://bucket/run
    format: OutputFormat = OutputFormat.arrow
    rows_per_shard: int = 10_000
    flush_seconds: float = 60.0  # at most this much finished work is lost when the process is killed
    compression: str | None = "zstd"  # zstd, lz4 or null
    order: Order = Order.completion
    overwrite: bool = False
    redo: Redo | None = None  # rerun only the rows of this finish_reason and replace them
    token_ids: bool = False  # add the column `generated_token_ids`


@dataclass
class ShardConfig:
    """Which share of the rows this process runs: those with row % count == index."""

    index: int = 0
    count: int = 1
    heartbeat_seconds: float = 10.0  # how often this worker says that it is alive, see docs/clusters.md
    takeover_seconds: float = 90.0  # without a heartbeat, after which another process may take this shard over


@dataclass
class ClusterConfig:
    """Other machines that run the rows for this process; `cluster=ray` sets `kind`."""

    kind: ClusterKind = ClusterKind.none
    # Of a Ray cluster: auto, HOST:PORT or local; null: the one that RAY_ADDRESS names or this machine belongs to, else local
    address: str | None = None
    workers: int | None = None  # models at once; null: as many as the cluster has room for, also while it grows
    cpus_per_worker: int = 1
    rows_per_unit: int = 4096  # rows that a worker is given at a time


@dataclass
class AnnotateConfig:
    """A labelling task, as the files of conf/annotate/ state it (docs/annotate.md). At most one of choice, regex,
    json_schema and pydantic; with none of them an answer is any text."""

    input: str | None = None  # Jinja over the row's columns: the row's own text, which ends the prompt
    instruction: str | None = None  # Jinja too; begins the prompt, so rows share what it does not take from columns
    examples: Any = None  # list of {input: text, answer: value}, or a .jsonl, .json or .yaml file of them
    field: str = "label"  # name of the column of an answer that is no JSON object
    choice: list[str] | None = None  # the labels that there are
    regex: str | None = None  # what an answer matches as a whole; named groups become columns
    json_schema: Any = None  # of the answer, or a file of it; properties become columns
    pydantic: str | None = None  # package.module:Class, whose JSON schema is meant
    swap_labels: list[str] | None = None  # labels that change places where data.swap_columns do
    gold: Any = None  # column of people's answers, or {field: column}; the results are checked against it
    bootstrap: int = 1000  # resamples behind an interval of the checks
    report_rows: int = 500  # rows in the table of report.html


@dataclass
class ExportConfig:
    """What `batchmix export` makes of a finished run in output.dir."""

    dir: str = ""  # where the files and the data-set card go
    format: ExportFormat = ExportFormat.parquet
    rows_per_file: int = 1_000_000
    samples: bool = False  # every sample of a row; else the majority's (of texts without a task, the first)
    corrections: str | None = None  # people's answers, a file of `batchmix review import`, take the model's place
    repo_id: str | None = None  # push to this data set on the hub
    private: bool = True  # where repo_id is made anew
    license: str | None = None  # of the data, as the hub spells it: apache-2.0, cc-by-4.0, ...
    title: str | None = None  # of the card; null: the folder's name


@dataclass
class ReviewConfig:
    """What `batchmix review` hands to people and takes back."""

    action: str = "export"  # export or import; batchmix review ACTION is short for it
    tool: ReviewTool = ReviewTool.label_studio
    rows: int = 100  # the least certain ones
    path: str = ""  # export: the file (Label Studio) or folder (Argilla) to make; import: what the tool exported
    corrections: str = "corrections.jsonl"  # import: the file to make, for export.corrections


@dataclass
class PlanConfig:
    """What `batchmix plan` estimates for."""

    gpu: str = "h200"  # a name in batchmix/plan/gpus.py
    histogram: str | None = None  # PNG file; null: lengths.png in output.dir where that is set, else none
    expected_tokens: int | None = None  # answer length to assume; null: sampling.max_tokens
    host_memory_gb: float | None = None  # of the machine that the GPU is in; null: as this one has


@dataclass
class BenchmarkConfig:
    """What `batchmix benchmark` measures."""

    name: str = "kernels"  # kernels, throughput or offload; batchmix benchmark NAME is short for it
    shape: str = "8x7b"  # whose sizes: 8x7b, 8x22b; tiny is for machines without a GPU
    # Of kernels' moe, prefill, decode, linear, elementwise, sampling; of throughput's annotate, synthesise, long.
    only: list[str] | None = None
    rows: int | None = None  # of throughput's annotate and synthesise, long has a tenth; null: 4,000
    layers: int | None = None  # of throughput's model; null: as many as fit
    # Of throughput's transformers, generate_batch, vllm, sglang, of offload's accelerate; null: all that are installed
    peers: list[str] | None = None
    peer_seconds: float = 120.0  # on each workload, after which a peer of throughput starts no more rows
    formats: list[str] | None = None  # of weights, for moe; null: all that the GPU runs
    tokens: list[int] | None = None  # for moe and linear; null: 1 to 65,536
    dir: str = "."  # where <date>-<gpu>-<name>.json goes


@dataclass
class TuneConfig:
    """What `batchmix tune` searches."""

    seconds: float = 1800.0  # in all
    shape: str = "8x7b"
    formats: list[str] = field(default_factory=lambda: ["bfloat16", "fp8", "int8", "int4"])
    rows: list[int] | None = None  # of an average expert; null: 4 to 4,096
    dir: str | None = None  # of the tables; null: where the kernels look for them


@dataclass
class ConvertConfig:
    """What `batchmix convert` writes into output.dir."""

    # hf: config.json, the hub's names; fused: the same with transformers 5's own names; mistral: params.json
    format: ConvertFormat = ConvertFormat.hf
    dtype: Dtype = Dtype.auto  # auto: every tensor as it is stored
    max_shard_size: str = (
        "5GB"  # of a file, 10^9 bytes each; format=mistral has one file, as mistral_inference reads it
    )


@dataclass
class EvaluateConfig:
    """What `batchmix evaluate` compares answers with."""

    gold_column: str = "gold"  # of the data; compared as text, spaces at both ends aside


@dataclass
class Config:
    """One job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    review: ReviewConfig = field(default_factory=ReviewConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


_MANY = 2**31 - 1  # counts of tokens are 32-bit integers in the output
_RANGES: dict[str, tuple[float, float, bool]] = {
    # key: (low, high, low itself is allowed)
    "max_tokens": (1, _MANY, True),
    "min_tokens": (0, _MANY, True),
    "temperature": (0, math.inf, True),
    "top_p": (0, 1, False),
    "top_k": (-1, _MANY, True),
    "min_p": (0, 1, True),
    "repetition_penalty": (0, math.inf, False),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "n": (1, 10_000, True),  # a row is committed with all its samples, which wait for each other in memory
    "logprobs": (0, 100, True),  # 0.8 GiB on the host for 256 rows of 4,096 tokens
    "seed": (-(2**63), 2**63 - 1, True),
}
_MAX_STOP_BYTES = 1024  # of a row's stop strings: each takes a state of an automaton, 8 bytes for every token there is
_BOOLS = {"include_stop_str_in_output", "skip_special_tokens", "ignore_eos"}
_INTS = {"max_tokens", "min_tokens", "top_k", "n", "logprobs", "seed"}
_SAMPLING_KEYS = {f.name: f for f in dataclasses.fields(SamplingConfig)}
MAX_SCORED_CHOICES = 256  # each is a prefill chunk of its own


def check_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """Return `sampling` if every value is in range; ValueError with one line naming the key otherwise."""
    for key, (low, high, closed) in _RANGES.items():
        value = getattr(sampling, key)
        if value is None:
            continue
        if value in (math.inf, -math.inf) or value != value:
            raise ValueError(f"sampling.{key}={value} is no number")
        if not (low <= value <= high and (closed or value > low)):
            raise ValueError(
                f"sampling.{key}={reprlib.repr(value)} must be {'at least' if closed else 'above'} {low}"
                + (f" and at most {high}" if high < math.inf else "")
            )
    if sampling.min_tokens > sampling.max_tokens:
        raise ValueError(f"sampling.min_tokens={sampling.min_tokens} is above max_tokens={sampling.max_tokens}")
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise ValueError("sampling.allowed_token_ids is empty: no token could be chosen")
    if any(not text for text in sampling.stop or ()):
        raise ValueError("sampling.stop has an empty string, which would stop every row at once")
    try:
        size = sum(len(text.encode()) for text in sampling.stop or ())
    except UnicodeEncodeError:
        raise ValueError("sampling.stop has a text that is not valid Unicode") from None
    if size > _MAX_STOP_BYTES:
        raise ValueError(f"sampling.stop has {size} bytes in all; at most {_MAX_STOP_BYTES} can be searched for")
    for token, bias in (sampling.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise ValueError(f"sampling.logit_bias has {bias} for token {token}, which is no number; -100 bans a token")
    if sampling.structured_outputs is not None:
        _check_structured(sampling.structured_outputs, sampling)
    return sampling


def _check_structured(outputs: StructuredOutputs, sampling: SamplingConfig) -> None:
    """ValueError where the values are of the wrong kind; what a regex or a schema says is checked by `guided`."""
    key = "sampling.structured_outputs"
    given = [name for name in ("choice", "regex", "json") if getattr(outputs, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{key} has {' and '.join(given) or 'nothing'}; give one of choice, regex and json")
    choice = outputs.choice
    if choice is not None:
        if not isinstance(choice, list | tuple) or not all(isinstance(text, str) and text for text in choice):
            raise ValueError(f"{key}.choice must be a list of texts that are not empty")
        if len(set(choice)) < max(len(choice), 1):
            raise ValueError(f"{key}.choice {'has a text twice' if choice else 'is empty: nothing could be chosen'}")
    if not isinstance(outputs.regex or "", str):
        raise ValueError(f"{key}.regex={reprlib.repr(outputs.regex)} must be a text")
    if any("\ud800" <= char <= "\udfff" for text in [*(choice or ()), outputs.regex or ""] for char in text):
        raise ValueError(f"{key} has a text that is not valid Unicode")
    if outputs.json is not None and not isinstance(outputs.json, str | Mapping):
        raise ValueError(f"{key}.json={reprlib.repr(outputs.json)} must be a JSON Schema, a mapping or its text")
    if sampling.stop:
        raise ValueError(f"sampling.stop does not go with {key}, which says itself where the text ends")
    if not isinstance(outputs.score_choices, bool):
        raise ValueError(f"{key}.score_choices={reprlib.repr(outputs.score_choices)} must be true or false")
    if outputs.score_choices:
        if choice is None or len(choice) > MAX_SCORED_CHOICES:
            raise ValueError(f"{key}.score_choices needs {key}.choice, of at most {MAX_SCORED_CHOICES} texts")
        if sampling.logprobs is not None:
            raise ValueError(f"sampling.logprobs does not go with {key}.score_choices, which decodes no tokens")


def override_sampling(base: SamplingConfig, overrides: Mapping[str, Any]) -> SamplingConfig:
    """`base` with a row's own values, which come from data and so may be anything.

    None means "not given". ValueError with one line where a key is unknown or a value is of the wrong type.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    unknown = sorted(set(given) - set(_SAMPLING_KEYS))
    if unknown:
        raise ValueError(f"sampling has no key {reprlib.repr(unknown[0])}")
    for key, value in given.items():
        given[key] = _coerce(key, value)
    return check_sampling(dataclasses.replace(base, **given))


def _coerce(key: str, value: Any) -> Any:
    wrong = ValueError(f"sampling.{key}={reprlib.repr(value)} is of the wrong type")
    if key in _BOOLS:
        if not isinstance(value, bool):
            raise wrong
    elif key == "stop":
        value = [value] if isinstance(value, str) else value
        if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise wrong
    elif key == "structured_outputs":
        if not isinstance(value, Mapping):
            raise wrong
        given = {name: item for name, item in value.items() if item is not None}
        if unknown := sorted(given.keys() - {f.name for f in dataclasses.fields(StructuredOutputs)}):
            raise ValueError(f"sampling.structured_outputs has no key {reprlib.repr(unknown[0])}")
        value = StructuredOutputs(**given)
    elif key in ("stop_token_ids", "allowed_token_ids"):
        if not (isinstance(value, list) and all(type(token) is int for token in value)):
            raise wrong
    elif key == "logit_bias":
        try:  # a column of objects has the keys of all rows, null where a row has none; one of maps has pairs
            value = {int(token): float(bias) for token, bias in dict(value).items() if bias is not None}
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    else:
        try:
            number = int(value) if key in _INTS else float(value)
        except (ValueError, OverflowError):  # not a number, infinity, more than a float holds
            raise wrong from None
        if key in _INTS and number != value:
            raise wrong
        value = number
    return value


def check(config: Config) -> Config:
    """Return `config` if its values make sense together; BatchmixError naming the key otherwise."""

    def refuse(key: str, value: object, remedy: str) -> BatchmixError:
        return BatchmixError(f"{key}={value}: {remedy}")

    try:
        check_sampling(config.sampling)
    except ValueError as error:
        raise BatchmixError(str(error)) from None
    if not 0 <= config.shard.index < config.shard.count:
        raise refuse("shard.index", config.shard.index, f"must be from 0 to shard.count - 1 = {config.shard.count - 1}")
    for group, key in (("engine", "max_num_seqs"), ("engine", "max_num_batched_tokens"), ("engine", "sort_window"),
                       ("output", "rows_per_shard"), ("model", "max_model_len"), ("model", "tensor_parallel_size"),
                       ("engine", "data_parallel_size"), ("data", "limit"), ("plan", "expected_tokens"),
                       ("cluster", "workers"), ("cluster", "cpus_per_worker"), ("cluster", "rows_per_unit"),
                       ("export", "rows_per_file"), ("review", "rows"), ("annotate", "bootstrap")):  # fmt: skip
        value = getattr(getattr(config, group), key)
        if value is not None and value < 1:
            raise refuse(f"{group}.{key}", value, "must be at least 1")
    if config.cluster.kind is ClusterKind.ray:
        if config.engine.data_parallel_size > 1:
            raise refuse(
                "engine.data_parallel_size",
                config.engine.data_parallel_size,
                "cluster=ray has a model on each GPU without it; leave it at 1",
            )
        if config.engine.trace:
            raise refuse("engine.trace", "true", "traces one machine; leave it out with cluster=ray")
    if not 0 < config.engine.gpu_memory_utilization <= 1:
        raise refuse(
            "engine.gpu_memory_utilization", config.engine.gpu_memory_utilization, "must be above 0, at most 1"
        )
    if any("\ud800" <= char <= "\udfff" for char in config.output.dir):
        raise refuse("output.dir", config.output.dir, "pyarrow opens no files in a folder whose name is not Unicode")
    if not 0 < config.shard.heartbeat_seconds <= config.shard.takeover_seconds / 3:
        raise refuse("shard.heartbeat_seconds", config.shard.heartbeat_seconds,
                     f"must be above 0 and at most a third of shard.takeover_seconds={config.shard.takeover_seconds}")  # fmt: skip
    if not config.output.flush_seconds > 0:
        raise refuse("output.flush_seconds", config.output.flush_seconds, "must be above 0")
    if config.output.compression not in (None, "zstd", "lz4"):
        raise refuse("output.compression", config.output.compression, "must be zstd, lz4 or null")
    return config
