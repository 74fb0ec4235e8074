"""examples/notebooks/: each runs in a Jupyter kernel, leaves nothing beside itself, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from document_blocks import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("name", NAMES)


def test_there_are_two() -> None:
    assert NAMES == ["annotate_and_review.ipynb", "generate_and_evaluate.ipynb"]


@every_notebook
def test_notebook_has_no_outputs(name: str) -> None:
    cells: list[dict[str, Any]] = json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)


@pytest.mark.slow  # jobs with the built-in model
@every_notebook
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for variable, folder in {"TMPDIR": "tmp", "IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "jupyter"}.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # as a user's kernel has it
    notebook = nbformat.read(FOLDER / name, as_version=4)
    before = sorted(FOLDER.iterdir())
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    assert sorted(FOLDER.iterdir()) == before
    printed = [output["text"] for cell in notebook.cells if cell.cell_type == "code"
               for output in cell.outputs if output.get("name") == "stdout"]  # fmt: skip
    wanted = {
        "annotate_and_review.ipynb": "right before the review",
        "generate_and_evaluate.ipynb": "answers exactly right",
    }
    assert any(wanted[name] in text for text in printed)
