"""The notebook of the first half hour runs from top to bottom, and prints what is stored in it but for the figures."""

import importlib.util
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "first-half-hour.ipynb"

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")), reason="needs Jupyter's kernel"
)


def lines(notebook) -> list[str]:
    """What the cells end with, without its numbers."""
    texts = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output
    ]
    return [re.sub(r"\d[\d,.]*", "#", text) for text in texts]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Jupyter's own, of sockets and event loops
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert lines(notebook) == lines(stored)
    assert len(lines(stored)) >= 6
