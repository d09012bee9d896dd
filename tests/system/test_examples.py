"""The notebook and the scripts of examples/ do what they say."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.system


def test_the_notebook(repo_root, tmp_path, monkeypatch):
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some notebook servers do: no bar for it
    notebook = nbformat.read(repo_root / "examples" / "grpo_in_a_notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells[0].source.splitlines()) <= 15
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for output in cells[0].outputs)
    assert re.search(r"^run 20/20  reward \d\.\d+", said, re.MULTILINE), said
    assert not re.search("\x1b|\r", said), "plain lines, nothing that a terminal would draw over"
    # Of what is drawn at random, one in some fifteen characters would be right.
    first, *_, last = [float(line.split()[1]) for line in cells[1].outputs[0].text.splitlines()]
    assert first < 0.2 and last > 0.6


def test_grpo_with_functions_of_its_own(script, tmp_path, capsys):
    script("examples/grpo_own_function.py").main(steps=10, run_dir=str(tmp_path / "run"))
    assert re.search(r"^step 10: rising \d\.\d\d$", capsys.readouterr().out, re.MULTILINE)


def test_a_loop_over_roles(script, capsys):
    script("examples/loop_over_roles.py").main(steps=2)
    line = r"^step 2: reward \d\.\d{3}, \('\d\+\d=', '.*'\), gradient \d+\.\d\d$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def test_a_loss_and_an_advantage_of_its_own(script, tmp_path, capsys):
    script("examples/custom_loss.py").main(steps=2, run_dir=str(tmp_path / "run"))
    assert "over the range: " in capsys.readouterr().out
