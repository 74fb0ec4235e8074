"""README.md and docs/: every Python block and every command runs, or is named here with what it needs, and composes."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from compose_only import compose_only
from document_blocks import PAGES, ROOT, Block, blocks

from batchmix.config import JOBS

RUN = ("bash", "python")
FILES = ("yaml", "json", "jinja", "text")
READ_ALONE = ("text", "console", "mermaid", "yaml", "json")
PACKAGES = ("polars", "duckdb")  # of the dev extra where its blocks are to run
NEEDS = {  # of blocks that do not run here, and why
    "install": "it would change this environment; test_wheel.py installs",
    "model": "weights of Mixtral",
    "data": "a file of the reader's",
    "people": "answers from Label Studio",
    "gpu": "a GPU",
    "slurm": "Slurm",
    "ray": "a Ray cluster",
    "kubernetes": "Docker and Kubernetes",
    "cluster": "several machines",
    "s3": "an object store",
    "vllm": "vLLM",
    "minutes": "it takes minutes, or is a test itself",
}
NOT_RUN = {
    "README.md": {"install": 1, "model": 1},
    "docs/annotate.md": {"model": 2, "people": 2},
    "docs/checkpoints.md": {"model": 1},
    "docs/clusters.md": {"slurm": 2, "ray": 2, "kubernetes": 3, "cluster": 2, "s3": 1},
    "docs/coming-from-vllm.md": {"vllm": 1, "model": 1},
    "docs/cookbook.md": {"model": 2, "slurm": 2, "s3": 3, "gpu": 1},
    "docs/guided.md": {"data": 1},
    "docs/kernels.md": {"data": 1, "model": 1, "gpu": 1, "minutes": 1},
    "docs/memory.md": {"model": 1, "gpu": 1},
    "docs/parallel.md": {"gpu": 1},
    "docs/performance.md": {"gpu": 2, "minutes": 3},
    "docs/quantization.md": {"model": 1, "minutes": 1},
    "docs/quickstart.md": {"install": 1},
    "docs/reliability.md": {"minutes": 3},
}
# Programs of blocks that do not run; a name that is none of them, or no file of the repository, is a mistake.
PROGRAMS = (
    "batchmix", "python", "python3", "pip", "pytest", "make", "sbatch", "ray", "docker", "kubectl",
)  # fmt: skip
RECORD = '#!/bin/bash\nprintf "%s\\0" "$0" "$@" >> "$RECORDED"; printf "\\0" >> "$RECORDED"\n'

every_page = pytest.mark.parametrize("page", PAGES)


def runs(block: Block) -> bool:
    """Whether the block is run here, or would be where its package is installed."""
    return block.language in RUN and block.value("needs") in (None, *PACKAGES)


@every_page
def test_every_block_says_what_becomes_of_it(page: str) -> None:
    for block in blocks(page):
        needs, title = block.value("needs"), block.value("title")
        known = [word for word in block.words if word == "output" or re.match("(needs|title)=", word)]
        assert list(block.words) == known, f"{block.where}: {block.words}"
        if title is not None:
            assert block.language in FILES, block.where
        elif "output" in block.words:
            assert block.language == "text", block.where
        else:
            assert block.language in RUN + READ_ALONE, f"{block.where}: {block.language!r}"
        assert needs is None or (block.language in RUN and needs in (*NEEDS, *PACKAGES)), (
            f"{block.where}: needs={needs}"
        )


def test_what_does_not_run_is_listed() -> None:
    found = {page: dict(Counter(block.value("needs") for block in blocks(page) if block.language in RUN and not runs(block)))
             for page in PAGES}  # fmt: skip
    assert {page: needs for page, needs in found.items() if needs} == NOT_RUN


def prepare(page: str, folder: Path) -> Path:
    """The page's folder: empty but for `examples/`, as in a clone."""
    folder.mkdir(exist_ok=True)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def write_file(block: Block, folder: Path) -> None:
    path = folder / str(block.value("title"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `batchmix` and `python` are those of this process."""
    for name, module in {"batchmix": "-m batchmix", "python": ""}.items():
        write_program(tmp_path / "bin" / name, f'#!/bin/bash\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.slow  # jobs with the built-in model
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, blocks(page)))])
def test_page_runs(page: str, tmp_path: Path, shell: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(page, tmp_path / "page")
    monkeypatch.chdir(folder)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    printed, missing = "", []
    for block in blocks(page):
        if block.value("title"):
            write_file(block, folder)
        elif "output" in block.words:
            assert printed.strip() == block.text.strip(), block.where
        elif runs(block) and block.value("needs") and not find_spec(str(block.value("needs"))):
            missing.append(block.value("needs"))
        elif runs(block) and block.language == "bash":
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=shell,
                                  capture_output=True, text=True, timeout=300)  # fmt: skip
            assert done.returncode == 0, f"{block.where}: {done.stderr}"
            printed = done.stdout
        elif runs(block):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block.text, block.where, "exec"), module.__dict__)
            printed = output.getvalue()
    if page == "docs/python.md":
        assert "prompt has 5002 tokens; at most 4095 fit model.max_model_len=4096" in module.bad.error
        assert len(module.frame) == 2
    if missing:
        pytest.skip(f"all else of {page} ran; not installed: {', '.join(map(str, missing))}")


def recorded(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a block, as bash reads them, without running any: each program writes down how it was called."""
    records = folder / "recorded"
    records.write_bytes(b"")
    programs = [folder / "bin" / name for name in PROGRAMS]
    scripts = [folder / path.relative_to(ROOT) for path in (ROOT / "jobs").rglob("*.sh")]
    for program in [*programs, *scripts]:
        write_program(program, RECORD)
    environment = os.environ | {"PATH": str(folder / "bin"), "RECORDED": str(records)}
    text = f"source() {{ :; }}\n{block.text}"
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{block.where}: {done.stderr}"
    called = [record.split("\0") for record in records.read_text().split("\0\0") if record]
    return [
        [str((folder / program).relative_to(folder)).removeprefix("bin/"), *arguments] for program, *arguments in called
    ]


def inline_commands(page: str) -> Iterator[tuple[str, str]]:
    """Of `batchmix JOB key=value` within a sentence: where, and the command."""
    inside = False
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        inside ^= line.lstrip().startswith("```")
        for command in () if inside else re.findall(r"`batchmix ([a-z]+ [^`]*=[^`]*)`", line):
            if command.partition(" ")[0] in JOBS:
                yield f"{page}:{number}", command


@pytest.mark.slow  # a hundred configurations
def test_commands_that_do_not_run_compose(tmp_path: Path) -> None:
    commands: list[tuple[str, Path, list[str]]] = []
    for page in PAGES:
        folder = prepare(page, tmp_path / page.replace("/", "-"))
        for block in blocks(page):
            if block.value("title"):
                write_file(block, folder)
            elif block.language == "bash" and not runs(block):
                for program, *arguments in recorded(block, folder):
                    if program == "batchmix":
                        commands.append((block.where, folder, arguments))
                    named = [word for word in arguments if re.match(r"(tests|benchmarks|jobs)/", word)]
                    assert all((ROOT / word).exists() for word in named), f"{block.where}: {named}"
        commands += [(where, folder, shlex.split(command)) for where, command in inline_commands(page)]
    assert len(commands) >= 50
    errors = compose_only([(folder, arguments) for _, folder, arguments in commands])
    wrong = [f"{where}: {shlex.join(arguments)}: {error}"
             for (where, _, arguments), error in zip(commands, errors, strict=True) if error]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@every_page
def test_python_that_does_not_run_is_python(page: str) -> None:
    for block in blocks(page):
        if block.language != "python" or runs(block):
            continue
        for node in ast.walk(ast.parse(block.text, block.where)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("batchmix"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), block.where


@every_page
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page}: {target}"


@functools.cache
def messages() -> list[str]:
    """Every text of the package's code, with \\0 where a value is put in."""
    texts = []
    for path in [*(ROOT / "batchmix").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if not isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) or id(node) in docstrings:
                continue
            if (text := written(node)) is not None:
                texts.append(re.sub(r"%(?:\d*[sdr]|\.?\d*f)", "\0", text))
    return texts


def written(node: ast.expr) -> str | None:
    """The text of a literal; None of another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) or "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = written(node.left), written(node.right)
        return None if left is None and right is None else f"{left or chr(0)}{right or chr(0)}"
    return None


def quoted_messages() -> list[str]:
    """The first cell of each row of a table in docs/troubleshooting.md."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (`+)(.+?)\1 \| .+ \|$", text, re.MULTILINE)


def test_messages_of_troubleshooting_are_in_the_code() -> None:
    rows = [line for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| `")]  # fmt: skip
    quoted = [message for _, message in quoted_messages()]
    assert len(quoted) == len(rows) >= 80  # no row is written so that it is not read
    gone = []
    for message in quoted:
        fixed = [part.strip(" :;,=()/") for part in re.split(r"<[^<>]+>", message)]
        fixed = [part for part in fixed if re.search(r"\w", part)]
        assert sum(len(re.findall(r"\w+", part)) for part in fixed) >= 2, message
        pattern = re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
        if not any(pattern.search(text) for text in messages()):
            gone.append(message)
    assert not gone
