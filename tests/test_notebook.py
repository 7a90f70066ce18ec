"""The notebook: every cell of it runs, at toy size."""

import json
from pathlib import Path

from world import make_world

from lora_null.recipes.config.load import RECIPES

NOTEBOOK = Path(RECIPES) / "notebooks" / "quickstart.ipynb"


def test_every_cell_runs(tmp_path, capsys):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] for cell in cells)
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if cell["metadata"].get("tags") == ["parameters"]:
            assert names["recipe"] == "quickstart"
            names |= {"recipe": str(make_world(tmp_path)), "run": str(tmp_path / "run")}
    out = capsys.readouterr().out
    assert "LoRA-Null-v2" in out and "Question: what is 2+2" in out
