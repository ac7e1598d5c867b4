"""The quickstart notebook runs from top to bottom, and is committed with what it showed."""

import ast
import copy
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_committed_with_its_outputs(notebook):
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    assert len(cells) >= 6
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert all(c.outputs for c in cells)
    assert {o.output_type for o in outputs} <= {"stream", "execute_result", "display_data"}
    assert {"image/svg+xml", "image/png"} <= {kind for o in outputs for kind in o.get("data", {})}
    said = "\n".join(o.text for o in outputs if o.output_type == "stream")
    assert "Traceback" not in said
    assert "Warning" not in said
    assert "/home/" not in NOTEBOOK.read_text()
    assert NOTEBOOK.stat().st_size < 500_000


def test_notebook_uses_the_public_api_alone(notebook):
    source = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    imports = [ast.unparse(n) for n in found if isinstance(n, ast.Import | ast.ImportFrom)]
    assert imports == ["import sd35bench as sb"]
    assert "._" not in source


SMALLER = (
    ("steps=2,8,20", "steps=2,20"),
    ("prompts.limit=6", "prompts.limit=4"),
    ("backend=eager", "backend=fake"),
)
"""A third of the images that readers make, by the backend without a model: loading one and
measuring the machine took 40 s of 67 s."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "changes", [SMALLER, pytest.param((), marks=pytest.mark.slow)], ids=["smaller", "as-published"]
)
def test_notebook_runs_plots_and_shows_images(notebook, changes, tmp_path):
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for published, smaller in changes:
            cell.source = cell.source.replace(published, smaller)
    assert all(any(small in c.source for c in notebook.cells) for _, small in changes)
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install ipykernel")
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    kinds = {kind for o in outputs for kind in o.get("data", {})}
    assert {"image/svg+xml", "image/png"} <= kinds
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "20 steps, cfg 4" in text
    assert "balanced:" in text
    report = tmp_path / "results" / "quickstart" / "report.html"
    assert report.stat().st_size > 50_000
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"results"}
