"""The notebook and the scripts of examples/ do what they say."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

pytestmark = pytest.mark.system


@pytest.fixture
def example(repo_root):
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, repo_root / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


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


def test_grpo_with_functions_of_its_own(example, tmp_path, capsys):
    example("grpo_own_function").main(steps=10, run_dir=str(tmp_path / "run"))
    assert re.search(r"^step 10: rising \d\.\d\d$", capsys.readouterr().out, re.MULTILINE)


def test_a_loop_over_roles(example, capsys):
    example("loop_over_roles").main(steps=2)
    assert re.search(r"^step 2: reward \d\.\d{3}, \('\d\+\d=', '.*'\)$", capsys.readouterr().out, re.MULTILINE)


def test_a_loss_and_an_advantage_of_its_own(example, tmp_path, capsys):
    example("custom_loss").main(steps=2, run_dir=str(tmp_path / "run"))
    assert "over the range: " in capsys.readouterr().out
