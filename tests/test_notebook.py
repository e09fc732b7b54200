"""examples/tour.ipynb: its cells run one after the other, as plain code, and as Jupyter runs them where that is."""

import json

import pytest

from tests.pages import ROOT

NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def cells():
    found = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(found) >= 8
    return found


def test_it_is_committed_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


@pytest.mark.slow
def test_cells_run(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("Agg")
    namespace = {"__name__": "__main__"}
    for i, cell in enumerate(cells()):
        exec(compile("".join(cell["source"]), f"cell {i}", "exec"), namespace)
    assert capsys.readouterr().out.count("% of held-out digits right") == 2
    losses = namespace["losses"]
    assert losses["fused"][-1] < 0.5 * losses["fused"][0]
    assert losses["fused"][:3] == pytest.approx(losses["plain"][:3], rel=1e-3)


@pytest.mark.slow
def test_jupyter_runs_it(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
