"""Which JSON Schemas people's texts can be guided by: ours and the libraries that are installed, on one set of schemas.

    python benchmarks/bench_schemas.py FOLDER [--sample N] [--walks N] [--engines NAME ...] [--list] [--save]

FOLDER holds JSON files: each a schema, as in JSONSchemaBench's `data` (https://github.com/guidance-ai/jsonschemabench), or a
list of groups with `schema` and `tests`, as in `tests/draft2020-12` of the JSON Schema Test Suite
(https://github.com/json-schema-org/JSON-Schema-Test-Suite). Neither is part of this repository.

For each engine: schemas compiled over the Mixtral tokenizer's vocabulary of 32,000, those with a table of ours, texts that are
invalid of `--walks` random walks a schema, walks over tables that did not end in their budget, and the CPU seconds that compiling
took. Of the Test Suite also: invalid instances that are accepted, written as we write them. Texts are judged by the jsonschema
library, `pattern` by a JavaScript engine (`pip install mini-racer`) and `multipleOf` by the digits that were written. Each engine
runs in a process of its own, so that one that hangs or dies loses a schema, not the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, machine
from schema_engines import ENGINES, Refused
from schema_judge import Judge

from batchmix.measure.result import save_result

LIMIT_SECONDS = 90  # for a schema and its walks
BUDGET = 400  # tokens of a walk
# The Test Suite's folders whose schemas do not say their draft.
_DRAFTS = {f"draft{number}": f"http://json-schema.org/draft-0{number}/schema#" for number in (4, 6, 7)}


def schemas(folder: Path) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Name, schema and tests."""
    draft = _DRAFTS.get(folder.resolve().name)
    for path in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(path.read_text())
        except ValueError:
            continue
        name = str(path.relative_to(folder))
        if isinstance(data, list):
            for group in data:
                schema = group["schema"]
                if draft is not None and isinstance(schema, dict):
                    schema = {"$schema": draft, **schema}
                yield f"{name}: {group['description']}", schema, group["tests"]
        else:
            yield name, data, []


def work(
    engine_name: str, cases: list[tuple[str, Any, list[dict[str, Any]]]], first: int, walks: int, to: Connection
) -> None:
    """Send the result of each case from `first` on."""
    engine, judge = ENGINES[engine_name](), Judge()
    for number, (name, schema, tests) in enumerate(cases[first:], first):
        result: dict[str, Any] = {"name": name}
        started = time.process_time()
        try:
            grammar = engine.compile(schema)
            result |= {"seconds": time.process_time() - started, "table": engine.has_table(grammar)}
        except Refused as error:
            result |= {"seconds": time.process_time() - started, "refused": str(error)}
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # of a library
            result |= {"seconds": time.process_time() - started, "refused": f"{type(error).__name__}: {error}"[:200]}
        except BaseException as error:  # a panic of a Rust library
            result |= {"seconds": time.process_time() - started, "refused": f"panic: {error}"[:200]}
        if "refused" not in result:
            check, source = judge.validator(schema), random.Random(number)
            wrong, texts, unended = [], 0, 0
            for _ in range(walks):
                text = engine.walk(grammar, source, BUDGET)
                if text is None:
                    unended += 1
                    continue
                texts += 1
                if check is not None and not judge.is_valid(check, text):
                    wrong.append(text)
            accepted = [test["description"] for test in tests if not test["valid"]
                        and engine.accepts(grammar, json.dumps(test["data"], ensure_ascii=False))]  # fmt: skip
            missed = [test["description"] for test in tests if test["valid"]
                      and not engine.accepts(grammar, json.dumps(test["data"], ensure_ascii=False))]  # fmt: skip
            result |= {"wrong": wrong[:3], "texts": texts, "unended": unended, "accepted": accepted, "missed": missed}
            result["judged"] = check is not None
        to.send((number, result))
    to.send(None)


def run(engine: str, cases: list[tuple[str, Any, list[dict[str, Any]]]], walks: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    while len(results) < len(cases):
        mine, theirs = multiprocessing.Pipe(False)
        process = multiprocessing.Process(target=work, args=(engine, cases, len(results), walks, theirs))
        process.start()
        theirs.close()
        first = True
        try:
            while mine.poll(LIMIT_SECONDS + 60 * first):
                message = mine.recv()
                first = False
                if message is None:
                    break
                results.append(message[1])
        except EOFError:
            pass
        if len(results) < len(cases):
            name = cases[len(results)][0]
            results.append({"name": name, "seconds": float(LIMIT_SECONDS), "refused": "hung, or died"})
        process.kill()
        process.join()
    return results


def reason(refused: str) -> str:
    """What a refusal is about, without the schema's own names."""
    words = refused.split("'")
    keyword = next((word for word in words[1::2] if word.isidentifier() or word.startswith("$")), "")
    return f"{keyword}: {refused[-70:]}" if keyword else refused[-80:]


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    good = [result for result in results if "refused" not in result]
    seconds = np.array([result["seconds"] for result in good] or [0.0])
    return {
        "schemas": len(results),
        "compiled": len(good),
        "tables": sum(bool(result["table"]) for result in good),
        "schemas_with_wrong_texts": sum(bool(result["wrong"]) for result in good),
        "texts": sum(result["texts"] for result in good),
        "walks_without_end_over_tables": sum(result["unended"] for result in good if result["table"]),
        "invalid_instances_accepted": sum(len(result["accepted"]) for result in good),
        "valid_instances_not_accepted": sum(len(result["missed"]) for result in good),
        "compile_seconds": {
            "median": round(float(np.median(seconds)), 4),
            "p95": round(float(np.quantile(seconds, 0.95)), 4),
            "worst": round(float(seconds.max()), 3),
        },
        "worst_refusal_seconds": round(
            max((result["seconds"] for result in results if "refused" in result), default=0.0), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, help="so many schemas, drawn at random with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--walks", type=int, default=20)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--list", type=Path, help="write each schema's result into this JSON file")
    parser.add_argument("--save", action="store_true", help="write <date>-cpu-schemas-FOLDER.json into --save-folder")
    parser.add_argument("--save-folder", type=Path, default=RESULTS)
    args = parser.parse_args()
    cases = list(schemas(args.folder))
    if args.sample:
        cases = random.Random(args.seed).sample(cases, args.sample)
    found: dict[str, Any] = {}
    listed = {}
    for engine in args.engines:
        if not ENGINES[engine].is_installed():
            print(f"{engine}: not installed")
            continue
        results = listed[engine] = run(engine, cases, args.walks)
        found[engine] = summary(results)
        print(f"{engine}: {json.dumps(found[engine])}")
        refusals = Counter(reason(result["refused"]) for result in results if "refused" in result)
        for text, count in refusals.most_common(25):
            print(f"    {count:5} {text}")
        for result in results:
            if result.get("wrong") or result.get("accepted"):
                print(f"    WRONG {result['name']}: {result['wrong'][:1]} {result['accepted'][:2]}"[:300])
        if args.list:  # after each engine, as a run may be cut short
            args.list.write_text(json.dumps(listed, indent=1))
        if args.save:
            path = save_result(args.save_folder, "cpu", f"schemas-{args.folder.name}", {"machine": machine(), "folder": args.folder.name,
                               "sample": args.sample, "seed": args.seed, "walks": args.walks, "engines": found})  # fmt: skip
            print(f"written: {path.name}")


if __name__ == "__main__":
    main()
