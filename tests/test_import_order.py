"""Imports run one way: down the list of CONTRIBUTING.md. No folder knows one above it, no modules form a circle."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the lowest to the highest: what stands in a line may import what stands before it.
ORDER = """
kernels
redact errors signals install_hint other_names config_key sampling dtypes config sampling_checks config_checks config_files written_config
records json_file user_cache memory
storage observability templates input prompts structured_output
models checkpoints planning offload engine
output stages distributed annotate
config_errors hydra_app preflight pipeline plan annotation evaluate measure for_transformers api
cli __main__ jobs
""".split()
MAX_LINES = 350  # of a module outside kernels/


def modules() -> dict[str, Path]:
    """All modules of the package by their dotted name, kernels/ and jobs/ as the symlinks in it have them."""
    paths = [*ROOT.glob("batchmix/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("jobs/*.py")]
    found = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "batchmix" else ("batchmix", *parts))
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports: anywhere in it, for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known and alias.name != "batchmix")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from (name for name in (whole, node.module) if name in known and name != "batchmix")


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def room(name: str) -> str:
    """The folder of a module, or its own name where it lies in none; all `config.py`, which hold keys alone, are one."""
    parts = name.split(".")
    return "config" if parts[-1] == "config" else "".join(parts[1:2])


def test_imports_run_down() -> None:
    rank = {name: place for place, name in enumerate(ORDER)}
    up = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name != "batchmix" and rank[room(other)] > rank[room(name)]
    ]
    assert not up


def test_the_order_has_no_room_that_is_not_there() -> None:
    assert {room(name) for name in modules().keys() - {"batchmix"}} - {"conf"} == set(ORDER)


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, by however many steps."""
    reached = {name: set(others) for name, others in arrows.items()}
    for middle in arrows:
        for name in arrows:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return sorted(name for name in arrows if name in reached[name])


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_no_modules_import_one_another() -> None:
    assert circles(graph()) == []


def test_modules_can_be_read_in_one_go() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES and room(name) != "kernels"} == {}


def test_the_picture_shows_the_folders_in_this_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = [name for name in ORDER if any((ROOT / "batchmix" / name).glob("*.py"))]
    table = re.findall(r"^\| `(?:batchmix/)?(\w+)/` \|", text, re.MULTILINE)
    assert [name for name in table if name in folders] == folders
    picture = text.split("```mermaid")[1].split("```")[0]
    arrows = set(re.findall(r"^\s*(\w+) -.?-> (\w+)", picture, re.MULTILINE))
    assert {name for arrow in arrows for name in arrow} >= {"input", "prompts", "planning", "engine", "output", "jobs"}
    known = graph()
    for one, other in arrows:
        imports = {room(target) for name, targets in known.items() if room(name) == other for target in targets}
        assert one in imports, f"{other} imports nothing of {one}"
