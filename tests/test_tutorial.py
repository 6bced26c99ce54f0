"""The tutorial notebook runs from its first cell to its last, with smaller sizes, and its results make sense.

It takes minutes, so it has a target of its own: `make notebook`. The workflow of continuous integration runs that.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT

SIZES = """\
WINDOWS, LENGTH = 2, 128
OUT = "tutorial-quantized"
SETTINGS = {
    "calibration.search.windows": 8,
    "calibration.search.length": 64,
    "calibration.train.windows": 2,
    "calibration.train.length": 64,
    "calibration.end_to_end.windows": 2,
    "calibration.end_to_end.length": 64,
    "calibration.validation.windows": 2,
    "calibration.validation.length": 64,
    "calibration.evaluation.windows": 1,
    "calibration.evaluation.length": 128,
    "quantizer_init.mse_samples": 1,
    "activation_plots.windows": 2,
    "evaluation.tasks": {},
}
"""


def read_output(cell, kind: str) -> str:
    """Return the text of a cell's streams, or of its last result."""
    if kind == "stream":
        return "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"][-1]


@pytest.mark.slow
@pytest.mark.skipif("NOTEBOOK" not in os.environ, reason="takes minutes; run it with: make notebook")
def test_the_tutorial_runs_and_the_prefix_removes_the_outliers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(ROOT / "notebooks/tutorial.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "tutorial.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("WINDOWS, LENGTH = ")
    cells[0].source = SIZES
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    outliers, placed, compared, generated = cells[2], cells[4], cells[6], cells[7]
    assert "'first'" in read_output(outliers, "result")
    printed = read_output(placed, "stream")
    without, with_prefix = (int(word) for word in printed.replace(",", "").split() if word.isdigit())
    assert without > 1000 > 100 > with_prefix
    assert "<|im_start|>" in read_output(compared, "stream")
    assert (tmp_path / "tutorial-quantized/manifest.json").is_file()
    assert "The capital of France is" in read_output(generated, "result")
