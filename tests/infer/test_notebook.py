"""The notebook runs on CPU, with a small model in place of the published one."""

from __future__ import annotations

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs/colab.ipynb"


def test_the_notebook_samples_and_fine_tunes(published, capsys):
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] == "code" and not code.startswith("%"):
            exec(code.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(published))), names)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(losses) == names["STEPS"] and losses[-1] < losses[0]
