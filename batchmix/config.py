"""Every configuration key, its type, its default and its meaning. Nothing else in the project defines one.

Hydra fills these dataclasses (see `register`), so a misspelt key or a value of the wrong type is refused
before anything runs. Below `pipeline` and `jobs/` they are plain dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


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


class OffloadMode(Enum):
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
    offload: OffloadMode = OffloadMode.auto
    offload_dir: str | None = None  # for experts that do not fit host memory either: a folder on a fast disk
    revision: str | None = None  # of a hub id


@dataclass
class DataConfig:
    """Where the rows come from and how a row becomes a prompt."""

    path: Any = MISSING  # one or many: file, folder, glob, fsspec URL, or the name of a hub data set
    format: DataFormat = DataFormat.auto
    split: str = "train"  # of a hub data set
    csv_delimiter: str | None = None  # one character, \t for a tab; null: a comma, a tab in files called .tsv
    csv_encoding: str | None = None  # as Python calls it: cp1252, utf-16, ...; null: utf-8
    # Where the prompt is. null for all three: whichever of the columns prompt_token_ids, messages and prompt a row has,
    # in this order. Where one is named, only those that are named count.
    messages_column: str | None = None  # list of {role, content}
    prompt_column: str | None = None  # plain text, sent as one user message or to a base model as it is
    token_ids_column: str | None = None  # token ids, used as they are
    id_column: str | None = None  # null: the row's ordinal
    columns: list[str] | None = None  # kept in the output; null: all
    # What makes text of messages and prompts: auto (the model's own, none for a base model), none, mistral, a Jinja file or
    # Jinja text. See docs/prompts.md
    chat_template: str = "auto"
    system_prompt: str | None = None  # Jinja over the row's columns; for rows whose messages have no system message
    system_prompt_column: str | None = None  # each row's system prompt; where it is null, data.system_prompt
    # Jinja over the columns of a row, in at most 250,000 steps; its result is the row's prompt
    template: str | None = None
    swap_columns: list[str] | None = None  # two that change places in data.template for samples 1, 3, 5, ...
    limit: int | None = None  # the first so many rows
    # Memory for rows on their way from the input to the output, beside the model; null: 2 % of what is free, at least
    # 128 MiB and at most 4 GiB. A row larger than that is held alone.
    max_buffered_bytes: int | None = None
    on_error: OnError = OnError["record"]


MAX_SCORED_CHOICES = 256  # each is a prefill chunk of its own


@dataclass
class StructuredOutputs:
    """What a row's text may be: one of the first three, which are vLLM's. See docs/guided.md."""

    choice: list[str] | None = None  # one of these texts
    regex: str | None = None  # what Python's re.fullmatch accepts
    json: Any = None  # a JSON Schema, as a mapping or as its text
    score_choices: bool = False  # score the choices in the prefill and decode nothing; at most 256 choices
    token_probabilities: bool = False  # a column guided_logprobs: of each token among those that were allowed


@dataclass
class SamplingConfig:
    """How tokens are chosen. A row's own `sampling` column overrides any of these for that row.

    Reals are used as float32 and checked as such: 1e-46 would be 0 there, and is refused.
    """

    max_tokens: int = 1024
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # 1e-6 to 1e6
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit, at most 1e30 either way
    allowed_token_ids: list[int] | None = None
    stop: list[str] | None = None  # at most 1,024 bytes in all
    stop_token_ids: list[int] | None = None  # at most 1,024
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
    # Rows decoded together; null: as many as the KV cache holds, at most 1,024, 256 on CPU.
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = (
        8192  # of a step: rows that decode and prompt chunks, which may have 2,048 tokens each
    )
    sort_window: int = 16384  # rows held at once and sorted by length
    share_prefix: bool = True  # triton backend only: what prompts begin with in common is computed once
    cuda_graphs: bool = True  # triton backend only
    # triton backend: the same tiles for any number of rows. torch's products give a row the same bits whatever other rows
    # are in the batch as it is; with true, a machine whose matrix library cannot is refused where it is warned of otherwise.
    batch_invariant: bool = False
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
    guard_formulas: bool = (
        True  # csv: a ' before texts that begin with =, +, -, @, tab or newline, which spreadsheets run
    )
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

    gpu: str = "h200"  # a name in batchmix/planning/gpus.py
    # File for a picture of the lengths, .svg or .html; null: _lengths.svg in output.dir where that is set, else none
    histogram: str | None = None
    expected_tokens: int | None = None  # answer length to assume; null: sampling.max_tokens
    host_memory_gb: float | None = None  # of the machine that the GPU is in; null: as this one has


@dataclass
class BenchmarkConfig:
    """What `batchmix benchmark` measures."""

    name: str = "kernels"  # kernels, throughput, peers or offload; batchmix benchmark NAME is short for it
    shape: str = "8x7b"  # whose sizes: 8x7b, 8x22b; tiny is for machines without a GPU
    # Of kernels' moe, prefill, decode, linear, elementwise, launch, sampling; of throughput's annotate, synthesise, long.
    only: list[str] | None = None
    rows: int | None = None  # of throughput's annotate and synthesise, long has a tenth; null: 4,000
    layers: int | None = None  # of throughput's model; null: as many as fit
    # Of throughput's transformers, generate_batch, vllm, sglang, of offload's accelerate; null: all that are installed
    peers: list[str] | None = None
    peers_path: str | None = (
        None  # folders of packages (a:b) that peers of throughput import first, such as vLLM unpacked
    )
    peer_seconds: float = 120.0  # on each workload, after which a peer of throughput starts no more rows
    formats: list[str] | None = None  # of weights, for moe; null: all that the GPU runs
    tokens: list[int] | None = None  # for moe and linear; null: 1 to 65,536
    dir: str = "."  # where <date>-<gpu>-<name>.json goes


@dataclass
class TuneConfig:
    """What `batchmix tune` searches."""

    seconds: float = 240.0  # in all; 60 a format let a machine of 16 cores try every tile
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
    max_shard_size: str = "5GB"  # of a file, GB: 10^9 bytes; format=mistral has one file, as mistral_inference reads it


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
