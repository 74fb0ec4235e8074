"""Many short commands, each in a process of its own, forked from one in which Python and Hydra have started already."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from batchmix import cli

Done = subprocess.CompletedProcess[str]


def run_commands(commands: Sequence[Sequence[str]], folder: Path) -> list[Done]:
    """Run commands in `folder`, two at a time. The first word of each is `batchmix` or the path of a script."""
    with tempfile.TemporaryDirectory() as outputs:
        given = json.dumps([outputs, [list(command) for command in commands]])
        here = subprocess.run([sys.executable, __file__], cwd=folder, input=given, capture_output=True, text=True)
        assert here.returncode == 0, here.stderr
        return [
            subprocess.CompletedProcess(
                command, code, *(Path(outputs, f"{number}.{name}").read_text() for name in ("out", "err"))
            )
            for number, (command, code) in enumerate(zip(commands, json.loads(here.stdout), strict=True))
        ]


def _main() -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        cli.main(["generate", "data.pth=x"])  # fills the caches of Hydra and of its parser
    outputs, commands = json.load(sys.stdin)
    numbers: dict[int, int] = {}  # of the commands, by process
    codes = [-1] * len(commands)

    def wait() -> None:
        process, status = os.wait()
        codes[numbers.pop(process)] = os.waitstatus_to_exitcode(status)

    for number, command in enumerate(commands):
        if len(numbers) == 2:
            wait()
        process = os.fork()
        if not process:
            _become(command, Path(outputs, str(number)))
        numbers[process] = number
    while numbers:
        wait()
    print(json.dumps(codes))


def _become(command: list[str], output: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = command
    if command[0] == "batchmix":
        runpy.run_module("batchmix", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _main()
