"""The notebook, cell by cell and with two epochs."""

import json
from pathlib import Path

import pytest
from matplotlib import pyplot

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow
def test_all_cells_run_in_order(tmp_path, monkeypatch):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    assert code[0] == "EPOCHS = 20"
    # Light measures, the same flow.
    light = ["--evaluation.num_examples=16", "--flatness.num_examples=16", "--final.steps=2"]
    code[0] = f"EPOCHS = 2; LIGHT = {light}"
    code[1] = code[1].replace("*measures_of_end]", "*measures_of_end, *LIGHT]")
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("agg")
    names = {"__name__": "notebook"}
    for cell in code:
        exec(cell, names)
    pyplot.close("all")
    assert len(names["run"]) == 2
    assert names["axes"].get_title() == "AT on Digits"
    assert names["early_stopping"].best_epoch in (0, 1)
    logged = names["trainer"].callback_metrics
    assert {"flatness/average/val", "val/robust_error", "gradient/alignment/val"} <= set(logged)
