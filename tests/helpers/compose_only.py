"""Commands of batchmix whose configuration is composed and checked as ever, and whose job then does nothing.

Reads a list of {folder, arguments} from standard input, writes a list of {code, error} to standard output.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from batchmix import cli, hydra_app
from batchmix.config import JOBS


def compose_only(commands: Sequence[tuple[Path, Sequence[str]]]) -> list[str | None]:
    """Of each command, run in its folder: the line that refuses it, None where it is right."""
    given = json.dumps([{"folder": str(folder), "arguments": list(arguments)} for folder, arguments in commands])
    environment = os.environ | {"DATA_URL": "rows.jsonl"}  # which docs/cookbook.md sets
    done = subprocess.run([sys.executable, __file__], input=given, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [answer["error"] if answer["code"] else None for answer in json.loads(done.stdout)]


def _whole(arguments: Sequence[str]) -> list[str]:
    """Without `...`, for which a file and a folder are given, and without Slurm's launcher, which would submit. Of a sweep
    over shards two."""
    arguments = [re.sub(r"range\(0,\d+\)", "range(0,2)", word) for word in arguments]
    kept = [word for word in arguments if word not in ("...", "…")]
    if len(kept) < len(arguments):
        there = {word.partition("=")[0] for word in kept}
        wanted = {"data": "data.path=rows.jsonl", "output": "output.dir=out"}
        kept += [
            override
            for group, override in wanted.items()
            if group in JOBS[kept[0]] and override.partition("=")[0] not in there
        ]
    return [word for word in kept if not word.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))]


def _main() -> None:
    real: Callable[..., int] = hydra_app._run
    hydra_app._run = lambda name, function, arguments: real(name, _do_nothing, arguments)
    answers = []
    for command in json.load(sys.stdin):
        os.chdir(command["folder"])
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = cli.main(_whole(command["arguments"]))
            except SystemExit as left:
                code = int(left.code or 0)
        answers.append({"code": code, "error": error.getvalue().strip()})
    print(json.dumps(answers))


def _do_nothing(config: object) -> None:
    """In the place of a job."""


if __name__ == "__main__":
    _main()
