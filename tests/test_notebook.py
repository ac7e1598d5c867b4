"""The quickstart notebook runs from top to bottom, and is committed with what it showed."""

import ast
import copy
from pathlib import Path

import nbformat
import pytest
from PIL import Image

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


def _shown(value: object) -> set[str]:
    """The forms in which Jupyter would show a cell's value."""
    if isinstance(value, Image.Image):
        return {"image/png"}
    return {"image/svg+xml"} if "<svg" in getattr(value, "_repr_svg_", str)() else set()


def _said_what_it_should(text: str, folder: Path) -> None:
    assert "20 steps, cfg 4" in text
    assert "balanced:" in text
    report = folder / "results" / "quickstart" / "report.html"
    assert report.stat().st_size > 50_000
    assert {p.name for p in folder.iterdir()} == {"results"}


@pytest.mark.usefixtures("fakes_here")
def test_cells_run_in_order_plot_and_show_images(notebook, tmp_path, monkeypatch, capsys):
    """Here, a kernel would import everything anew, in 40 s; the slow test starts one."""
    monkeypatch.chdir(tmp_path)
    changed, names, shown = set(), {}, set()
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        source = cell.source
        for published, smaller in SMALLER:
            changed |= {smaller} if published in source else set()
            source = source.replace(published, smaller)
        *statements, last = ast.parse(source).body
        exec(compile(ast.Module(statements, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            shown |= _shown(value)
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
    assert len(changed) == len(SMALLER)
    assert shown == {"image/svg+xml", "image/png"}
    _said_what_it_should(capsys.readouterr().out, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_notebook_runs_plots_and_shows_images_as_published(notebook, tmp_path):
    notebook = copy.deepcopy(notebook)
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
    _said_what_it_should(text, tmp_path)
