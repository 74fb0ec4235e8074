"""Everything but the model: a million JSONL rows through source, prompt, plan and sink, with a stand-in engine.

    python benchmarks/bench_pipeline.py [--rows N] [--save]

The stand-in answers every prompt at once with its first tokens. Prints prompt tokens a second and the peak memory of
the process, which must not grow with the number of rows.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from common import save

from batchmix.checkpoints.checkpoint import TINY
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.input.rowset import RowSet
from batchmix.input.source import open_source
from batchmix.observability.clock import StageClock
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputConfig, OutputFormat
from batchmix.output.part_formats import part_format
from batchmix.output.parts import PartLog, Parts
from batchmix.output.sink import Sink
from batchmix.planning.planner import Limits, plan
from batchmix.prompts.prompt import PromptBuilder, without_pauses
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.records import Batch, Completion
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder

EXAMPLES = Path(__file__).parent.parent / "examples" / "support_tickets.jsonl"
ANSWER_TOKENS = 16


def write_rows(path: Path, count: int) -> None:
    """Messages of 1 to 8 customer texts, so about 30 to 450 tokens, shorter ones more often."""
    texts = [json.loads(line)["messages"][0]["content"] for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
    source = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            content = "\n".join(source.choices(texts, k=min(source.randint(1, 8), source.randint(1, 8))))
            line = {"id": f"row-{row}", "messages": [{"role": "user", "content": content}], "language": "en"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def answer(batches: Iterable[Batch]) -> Iterator[Completion]:
    """The stand-in engine."""
    for batch in batches:
        for prompt in batch.prompts:
            ids = prompt.token_ids[:ANSWER_TOKENS]
            yield Completion(prompt, 0, ids, "length", num_tokens=len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-pipeline.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data, out = Path(temporary, "rows.jsonl"), Path(temporary, "out")
        write_rows(data, args.rows)
        out.mkdir()
        clock, started, tokens = StageClock(), time.perf_counter(), 0
        source = open_source(DataConfig(path=str(data), id_column="id"), ShardConfig())
        tokenizer = load_tokenizer(TINY)
        assert tokenizer is not None
        builder = PromptBuilder(
            DataConfig(path=str(data)), SamplingConfig(), tokenizer, max_model_len=4096, vocab_size=32000
        )
        prompts = without_pauses(builder.build(source.rows(RowSet()), keep=source.schema.names, clock=clock))
        limits = Limits(max_num_seqs=256, kv_blocks=20_000, block_size=64, sort_window=16384)
        columns = OutputColumns(source.schema, token_ids=False, logprobs=False)
        parts = Parts(LocalFolder(out), part_format(OutputFormat.arrow, columns, OutputConfig().compression, None))
        log = PartLog(parts, "", 0, 0, lambda: None)
        sink = Sink(log, tokenizer=tokenizer, rows_per_shard=10_000, flush_seconds=60.0, clock=clock)
        with closing(prompts), sink:
            for completion in answer(plan(prompts, limits)):
                tokens += len(completion.prompt.token_ids)
                sink.write(completion)
        seconds = time.perf_counter() - started
        totals = parts.totals()
    assert (totals.rows, totals.error_rows) == (args.rows, 0), totals
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    stages = {name: round(value, 1) for name, value in clock.seconds.items()}
    print(f"{args.rows:,} rows, {tokens:,} prompt tokens in {seconds:.1f} s: {tokens / seconds:,.0f} prompt tokens/s,"
          f" {args.rows / seconds:,.0f} rows/s, peak memory {peak:.2f} GiB; seconds by thread: {stages}")  # fmt: skip
    if args.save:
        save("pipeline", {"rows": args.rows, "prompt_tokens": tokens, "seconds": round(seconds, 1),
                          "prompt_tokens_per_second": round(tokens / seconds), "peak_gib": round(peak, 2),
                          "stage_seconds": stages})  # fmt: skip


if __name__ == "__main__":
    main()
