"""The code speaks the field's words (docs/glossary.md): none of ours from before is left as an identifier."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("batchmix", "kernels", "jobs")
# Words that are common English too (choose, cut, once, look, tell, place) are left out: they may mean what they say.
GONE = {
    "hear", "listen", "Look", "put_back", "start_over", "Slots", "Mirror", "Answers", "SharedTables", "hear_logprobs",
    "Readback", "GpuReadback", "to_device", "Arrival", "choose_place", "advance", "Lanes", "Piece", "forced_runs",
    "forced_tokens", "Guide", "Guides", "HostGuide", "HostText", "HostTexts", "among_allowed", "ladder", "rung", "add_up",
    "agree", "smallest", "ALONE", "Shards", "Followers", "Link", "CudaLink", "ticket", "Place", "Row",
    "Waiting", "Admission", "upright", "along_m", "along_n",
}  # fmt: skip


def identifiers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.keyword | ast.alias):
            yield from filter(None, [node.arg if isinstance(node, ast.keyword) else node.name.rpartition(".")[2]])


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_word_from_before_is_an_identifier(folder: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
        for name in identifiers(path)
        if name in GONE
    }
    assert not found
