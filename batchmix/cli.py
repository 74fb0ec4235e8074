"""`batchmix JOB [overrides]`: finds the job and hands over. Imports nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from batchmix import __version__
from batchmix.redact import redact
from batchmix.signals import hear_interrupts

JOBS = Path(__file__).with_name("jobs")
EXIT_USAGE, EXIT_KEYBOARD = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    jobs = sorted(path.stem for path in JOBS.glob("*.py") if path.stem != "__init__")
    first = arguments[0] if arguments else ""
    if first in jobs:
        return run_job(first, arguments[1:])
    if first in ("-h", "--help"):
        print(help_text(jobs))
        return 0
    if first == "--version":
        print(f"batchmix {__version__}")
        return 0
    if first in ("-sc", "--shell-completion"):
        return complete(arguments, jobs)
    print(f"batchmix: error: {redact(wrong_job(first, jobs))}", file=sys.stderr)
    return EXIT_USAGE


def run_job(name: str, arguments: Sequence[str]) -> int:
    """Import `jobs/<name>.py` and run its `main`."""
    try:
        with hear_interrupts():
            exit_code: int = importlib.import_module(f"batchmix.jobs.{name}").main(arguments)
    except KeyboardInterrupt:
        print("batchmix: interrupted", file=sys.stderr)
        return EXIT_KEYBOARD
    return exit_code


def help_text(jobs: Sequence[str]) -> str:
    """The usage, with the first line of each job's docstring (read, not imported)."""
    width = max(map(len, jobs))
    lines = [f"  {job:{width}}  {_summary(JOBS / f'{job}.py')}" for job in jobs]
    return "\n".join(
        [
            "usage: batchmix JOB [key=value ...]",
            "",
            "jobs:",
            *lines,
            "",
            "batchmix JOB --help     the keys of a job and their defaults",
            "batchmix JOB --cfg job  the configuration that the overrides give, without running it",
            "batchmix --version      the version",
            'eval "$(batchmix -sc install=bash)"  completion of jobs, keys and choices with the tab key',
        ]
    )


def wrong_job(given: str, jobs: Sequence[str]) -> str:
    """One line on a first argument that is no job."""
    choices = f"the jobs are {', '.join(jobs)}"
    if not given:
        return f"no job given; {choices} (see batchmix --help)"
    if "=" in given or given.startswith("-"):
        return f"{given}: the job comes first, as in batchmix generate {given}; {choices}"
    close = difflib.get_close_matches(given, jobs, n=1)
    return f"{given}: no such job{f', did you mean {close[0]}?' if close else ''}; {choices}"


def complete(arguments: Sequence[str], jobs: Sequence[str]) -> int:
    """Answer the shell's completion request: the job here, the rest of the line by the job's Hydra app."""
    if not any(argument.startswith("query=") for argument in arguments):
        return run_job(jobs[0], arguments)  # install and uninstall: the same script for every job
    command, _, line = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    job, separator, rest = line.lstrip().partition(" ")
    if separator and job in jobs:
        os.environ["COMP_LINE"] = f"{command} {rest}"
        return run_job(job, arguments)
    print(" ".join(name for name in jobs if name.startswith(job)))
    return 0


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
