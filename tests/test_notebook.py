"""docs/quickstart.ipynb runs from its first cell to its last."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.long
def test_the_notebook_runs_on_the_tiny_model(house, monkeypatch):
    """As off the net, where the demo takes the made-up model; its recipes have the names without SmolLM2."""
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: the notebook was not run")
    import nbformat

    (house / ".cache" / "SmolLM2-135M-Instruct").unlink(missing_ok=True)
    places = os.pathsep.join([str(house), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "1", "VENV": sys.prefix}
    for name, value in (env | {"PYTHONPATH": places}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("demo_smollm2_bf16_", "demo_").replace("LIMIT=100", "LIMIT=20")
    (house / "docs").mkdir()
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(house / "docs")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "error" not in text.lower(), text[-3000:]
    assert "held-out rows" in text and "> lora_r: 16" in text  # the demo's table, and the recipe that is new
    assert "demo_r16_dora/adapter_model.safetensors" in text and "on these 20 rows" in text
    (picture,) = [output["data"]["image/svg+xml"] for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert picture.count("<polyline") == 2 and "demo_r16_dora" in picture
