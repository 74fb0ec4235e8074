"""Whether this tree's engine gives the answers of another revision, bit for bit, on this machine.

    python benchmarks/same_answers.py d866006

Both run the same rows: prompts of up to 3,400 tokens, several samples, penalties, stop strings, scored choices,
jump-forward tokens, grammars on the host and log-probabilities. They do so once with all the memory they want, once with
so few KV blocks that rows are preempted, and once with a step that runs out of memory. Every token and log-probability
is compared. Without a GPU the Triton kernels run `--triton-rows` rows with short prompts and answers in Triton's
interpreter, both revisions at once; each kind of wish needs 12 rows, and they take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

_ROOT = Path(__file__).parents[1]
_TREE = {
    "type": "object", "required": ["name"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 6}, "child": {"$ref": "#"}},
}  # fmt: skip
_TICKET = {
    "type": "object", "additionalProperties": False, "required": ["category", "urgent", "summary"],
    "properties": {
        "category": {"enum": ["billing", "technical", "account", "other"]},
        "urgent": {"type": "boolean"},
        "summary": {"type": "string", "maxLength": 20},
    },
}  # fmt: skip
_WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "n": 2},
    {"temperature": 1.0, "logprobs": 4},
    {"temperature": 0.0, "stop": ["e", "the"], "min_tokens": 3},
    {"temperature": 1.0, "logit_bias": {"13": 3.0}, "stop_token_ids": [13], "ignore_eos": True},
    {"temperature": 1.0, "structured_outputs": {"json": _TICKET}},
    {"temperature": 0.0, "structured_outputs": {"json": _TICKET, "token_probabilities": True}},
    {"temperature": 1.0, "structured_outputs": {"json": _TREE}, "max_tokens": 40},
    {"temperature": 1.0, "structured_outputs": {"choice": ["billing", "account", "technical", "other"], "score_choices": True}},
    {"temperature": 0.0, "structured_outputs": {"regex": "[0-9]{3}-[a-z]{2,5}"}},
]  # fmt: skip
_RUN = """
import importlib
import importlib.util
import sys
import torch
helpers, how, *arguments = sys.argv[1:]
if how == "interpreted":
    sys.path.append(helpers)
    import faster_interpreter
# Where an engine starts: the module of d866006, or today's.
name = next(name for name in ("batchmix.engine.start", "batchmix.engine.build") if importlib.util.find_spec(name))
starting = importlib.import_module(name)
if how == "preempted":
    starting.kv_blocks = lambda free, block_bytes, blocks_per_row, max_num_seqs: blocks_per_row
    if name == "batchmix.engine.build":  # start rows whatever they will grow by
        from batchmix.engine.scheduler import Scheduler
        Scheduler._needed_tokens = lambda *_: 0.0
if how == "out_of_memory":
    Mixtral = starting.Mixtral
    run, calls = Mixtral.__call__, []
    def failing(self, *arguments):
        calls.append(None)
        if len(calls) == 12:
            raise torch.OutOfMemoryError("a step that fails")
        return run(self, *arguments)
    Mixtral.__call__ = failing
from batchmix.cli import main
sys.exit(main(["generate", *arguments]))
"""


def write_rows(path: Path, count: int, short: bool) -> None:
    """Rows with wishes of all kinds, and prompts of all lengths up to about 3,400 tokens. `short`: of 6 words, and as
    many tokens of an answer, where a ticket is asked for 18."""
    texts = [json.loads(line) for line in (_ROOT / "examples" / "support_tickets.jsonl").open()]
    prompts = [str(row["messages"][0]["content"]) for row in texts]
    with path.open("w") as file:
        for row in range(count):
            prompt = prompts[row % len(prompts)]
            if row % 10 == 3:
                words = " ".join(prompts[row : row + 150]).split()
                prompt = " ".join(words[: 3400 * (row % 7 + 1) // 12])
            wishes = {"seed": row % 5, "max_tokens": 8 + row % 30, **_WISHES[row % len(_WISHES)]}
            if short:
                prompt = " ".join(prompt.split()[:6])
                wishes["max_tokens"] = 18 if wishes.get("structured_outputs", {}).get("json") is _TICKET else 6
            file.write(json.dumps({"id": f"row {row}", "prompt": prompt, "sampling": wishes}) + "\n")


def start(root: Path, rows: Path, out: Path, how: str, overrides: list[str]) -> subprocess.Popen[bytes]:
    """`batchmix generate` of the tree at `root`."""
    command = [
        sys.executable, "-c", _RUN, str(_ROOT / "tests" / "helpers"), how, f"data.path={rows}", "data.id_column=id",
        f"output.dir={out}", "output.token_ids=true", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    if how == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(command, cwd=out.parent, env=environment)


def wait(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"{process.args}: exit code {process.returncode}")


def answers(out: Path) -> pa.Table:
    """All rows in the order of their numbers."""
    return ds.dataset(out, format="arrow", exclude_invalid_files=True).to_table().sort_by(
        [("row", "ascending"), ("sample_index", "ascending")]
    )  # fmt: skip


def compare(rev: str, count: int, triton_rows: int, overrides: list[str]) -> bool:
    """Whether all runs agree; prints a line for each. SystemExit where a run did not do what it is for."""
    import torch

    same = True
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", old, rev], cwd=_ROOT, check=True)
        try:
            runs = {how: count for how in ("plain", "preempted", "out_of_memory") if count}
            if triton_rows and not torch.cuda.is_available():
                runs["interpreted"] = triton_rows
            for how, rows in runs.items():
                file, outs, processes = Path(folder, f"{how}.jsonl"), [], []
                write_rows(file, rows, short=how == "interpreted")
                more = ["engine.backend=triton", "engine.device=cpu", "model.dtype=float32"] * (how == "interpreted")
                more += ["model.max_model_len=3072"] * (how == "preempted")  # as many blocks as that row needs
                for name, root in (("old", old), ("new", _ROOT)):
                    outs.append(Path(folder, f"{how} {name}"))
                    processes.append(start(root, file, outs[-1], how, [*more, *overrides]))
                    if how != "interpreted":  # which takes one core and little memory
                        wait(processes.pop())
                for process in processes:
                    wait(process)
                tables = list(map(answers, outs))
                columns = [name for name in tables[0].column_names if name in tables[1].column_names]
                differing = [name for name in columns if tables[0][name] != tables[1][name]]
                summary = json.loads((outs[1] / ".batchmix/summary.json").read_text())["runs"][-1]
                print(f"{how} {' '.join(more)}: {tables[0].num_rows} answers,"
                      f" {f'other values in {differing}' if differing else 'all equal'};"
                      f" {summary['prompt_tokens']:,} prompt tokens, {summary['preempted']:,} preempted")  # fmt: skip
                if how in ("preempted", "out_of_memory") and not summary[how]:
                    raise SystemExit(f"{how}: the run had no such step, so it shows nothing")
                same = same and not differing
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=_ROOT, check=True)
    return same


def main() -> None:
    """Exit code 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as model.dtype=bfloat16")
    parser.add_argument("--rows", type=int, default=120, help="of each run with the backend of this machine")
    parser.add_argument("--triton-rows", type=int, default=12, help="in Triton's interpreter, where there is no GPU")
    given = parser.parse_args()
    sys.exit(not compare(given.rev, given.rows, given.triton_rows, given.overrides))


if __name__ == "__main__":
    main()
