"""The script that counts the files of a step: what is counted, and that a listened-to function stays as it was."""

from __future__ import annotations

import ast
import json
import sys
from types import SimpleNamespace

from benchmarks.files_of_a_step import files_between


def test_only_what_begins_in_between_is_counted(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps({"loops/rl.py": [90, 150], "start/rl.py": [90, 201]}))
    (tmp_path / "2.json").write_text(json.dumps({"loops/rl.py": [100], "roles/learner.py": [200]}))
    (tmp_path / "3.unfinished").write_text("{")
    assert files_between(tmp_path, 100, 200) == {"loops/rl.py": ["1", "2"], "roles/learner.py": ["2"]}


def test_each_function_notes_its_file_and_does_what_it_did(script, monkeypatch):
    listener = script("benchmarks/step_listener/sitecustomize.py")
    noted = []
    monkeypatch.setitem(sys.modules, "sitecustomize", SimpleNamespace(note=noted.append))
    source = (
        'def f(x):\n    "Says so."\n    return x + 1\n'
        "class C:\n    def g(self):\n        yield from (f(1), f(2))\n"
        "async def h():\n    return 3\n"
    )
    names = {}
    exec(compile(ast.fix_missing_locations(listener.WithNotes("a.py").visit(ast.parse(source))), "a.py", "exec"), names)
    assert noted == [] and names["f"].__doc__ == "Says so."
    assert list(names["C"]().g()) == [2, 3] and noted == ["a.py"] * 3
    try:
        names["h"]().send(None)
    except StopIteration as end:
        assert end.value == 3
    assert len(noted) == 4
